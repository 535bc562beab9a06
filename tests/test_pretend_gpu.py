"""Steps and samples of three recipes on a GPU that is not there: its tensors have dtype and shape but no data (FakeTensorMode). What would end a
first run (tensors on two devices, dtypes or shapes that do not fit) ends this, and so does a step that makes the host wait. No number is checked.
A CPU build wants a shim for the backward, loaded before PyTorch: hence a second process. `pretend` replaces what else it lacks."""
import os, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch

SHIM = """#include <c10/core/impl/FakeGuardImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>)
namespace at::accelerator { std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; } }
namespace at { struct CUDAHooks : CUDAHooksInterface { CUDAHooks(CUDAHooksArgs) {} bool hasPrimaryContext(DeviceIndex) const override { return true; } };
               REGISTER_CUDA_HOOKS(CUDAHooks) }"""


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++") or bool(torch.version.cuda or torch.version.hip), reason="for CPU builds on Linux")
def test_steps_and_samples_on_a_pretend_gpu(tmp_path):
    home, so = Path(torch.__file__).parent, f"{tmp_path}/shim.so"
    subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", "-xc++", "-", f"-I{home}/include", f"-L{home}/lib", "-lc10", "-ltorch_cpu",
                    f"-Wl,-rpath,{home}/lib", "-o", so], input=SHIM, text=True, check=True)
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": so})
    assert done.returncode == 0, done.stdout + done.stderr


def pretend():
    """-> FakeTensorMode in which tensors of the CPU are real. While it is `strict` a copy that waits for the device raises; .item() always does."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._pytree import tree_leaves
    from transformers import initialization, utils

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            (made := super().__new__(cls)).place = torch.device(device)
            return made
        device = property(lambda self: self.place)

    class Pretend(FakeTensorMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = [a for a in tree_leaves((args, kwargs)) if not isinstance(a, torch.Tensor) or a.ndim or "copy" in func.__name__]    # 0-d ones may mix
            places = {getattr(a, "device", a).type for a in found if isinstance(a, (torch.Tensor, torch.device, Generator))}
            if "cuda" not in places and not any(issubclass(t, FakeTensor) for t in types):
                return func(*args, **{k: v for k, v in (kwargs or {}).items() if k != "pin_memory"})
            assert not self.strict or len(places) < 2 or any(a is True for a in found), f"{func} waits"        # true: non_blocking
            return super().__torch_dispatch__(func, types, args, kwargs)

    def convert(module, *args, **_):
        for own, key, p in [(part._parameters, key, p) for part in module.modules() for key, p in part._parameters.items() if p is not None]:
            own[key] = torch.nn.Parameter(p.detach().to(*args), p.requires_grad)
            vars(own[key]).update(vars(p))
        return module
    torch.nn.Module.to, torch.Generator, torch.Tensor.pin_memory = convert, Generator, lambda self: self
    torch.cuda.Event = type("Event", (), dict.fromkeys(("record", "synchronize"), lambda _: None))
    initialization.TORCH_INIT_FUNCTIONS["trunc_normal_"] = lambda tensor, **_: tensor                     # it asks for values
    utils.import_utils.is_fake_tensor = lambda tensor: False                                              # else transformers asks less than it does
    return Pretend(allow_non_fake_inputs=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import cluster, configs, data, evaluate, pretrained, sample, test_gpu, train
    gpu, mode = torch.device("cuda", 0), pretend()
    for name, *args in ("prx_512", "--model.route=1,3,0.5"), ("nitro_512",), ("nitro_1024", "--model.dual=2"):
        c = configs.parse([f"--config={name}", "--model.depth=5", "--align.block=4", "--train.micro_batch=4", "--sample.steps=2", *args])
        mode.strict = False
        with mode:
            (encode, teacher, vae), perceptual = train.frozen(c, gpu, weights=False), pretrained.perceptual(c, gpu, weights=False)
            with gpu:                                                                                     # the CPU would draw for seconds
                model, ema, optimizer = train.build(c, gpu, teacher.dim)
            null, late = tuple(a.to(gpu) for a in test_gpu.nothing(c)), train.Late(1)
            for number, length in (1, 40), (2, 64):
                mode.strict, host = True, {k: v[:, :length] for k, v in test_gpu.batch_of(c, 4, number).items()}
                batch, draws = train.to_device(c, dict(host), test_gpu.nothing(c), gpu), torch.Generator(gpu).manual_seed(number)
                late.read(test_gpu.step(c, model, ema, optimizer, batch, null, draws, number, encode, teacher, vae, perceptual)[None])
            mode.strict, data.fixed_batches, tokenize = False, lambda *_: [dict(host)], lambda texts: (host["ids"][:len(texts)], host["mask"][:len(texts)])
            assert sample.generate(ema, c, tokenize, encode, ["a", "b"], [0, 1], vae=vae).shape == (2, 3, c.model.size, c.model.size)
            assert evaluate.validation_loss(ema, c, tokenize, encode, None, 4, device=gpu, vae=vae)["images"] == 4
            assert all(x.device.type == "cpu" for file in cluster.snapshot(model, ema, optimizer)[1].values() for _, _, x in file)

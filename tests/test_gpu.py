"""What only a GPU can show; elsewhere these skip. On a machine with one, CUDA or ROCm: python -m pytest tests/test_gpu.py

What they gave on an H200 is in RESULTS.md, "On a GPU"."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cluster
import configs
import kernels
import train
from cluster import clip
from configs import Route

ROOT = Path(__file__).parent.parent
GPU = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
KINDS = {"prx": Route(1, 2, 0.5), "dit": Route(2, None, 0.5), "mmdit": Route(2, None, 0.5)}


@pytest.fixture(autouse=True)
def as_training_sets_it():
    """The same attention kernels as in training: left alone, PyTorch may prefer cuDNN's, which `cluster.device` turns off."""
    precision = torch.get_float32_matmul_precision()
    cluster.device()
    yield
    torch.set_float32_matmul_precision(precision)


def small(kind, *args):
    c = configs.parse(["--config=debug", "--model.size=64", "--model.width=256", "--model.heads=4", *args])
    return replace(c, model=replace(c.model, kind=kind, dual=2 if kind == "mmdit" else 0, bottleneck=0, route=KINDS[kind]))


def batch_of(c, rows=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    length = c.text.length
    return {"image": torch.randint(0, 256, (rows, 3, c.model.size, c.model.size), generator=g, dtype=torch.uint8),
            "ids": torch.randint(0, 256, (rows, length), generator=g), "mask": torch.arange(length) < torch.randint(2, length, (rows, 1), generator=g)}


def nothing(c):
    return torch.zeros(1, c.text.length, dtype=torch.int64), torch.arange(c.text.length)[None] < 1


def step(c, model, ema, optimizer, batch, null, generator, number, encode=None, teacher=None, vae=None, perceptual=None):
    """One step as `train.train` makes it. -> loss, on the device"""
    loss, _ = train.losses(c, model, batch, null, encode, teacher, generator, vae, perceptual)
    loss.backward()
    norm = clip(model.parameters(), c.optim.clip, None)
    optimizer.step(skip=(~norm.isfinite()).float())
    optimizer.zero_grad()
    train.update_ema(c, model, ema, number)
    return loss.detach()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-3), (torch.bfloat16, 3e-2)])
def test_operations_and_their_gradients_equal_float64s(dtype, bound):
    """(fp32 products may use TF32.)"""
    torch.manual_seed(0)
    for name, f, inputs, grads, _ in kernels.cases(False, GPU, dtype):
        exact = [v.detach().cpu().double() if v.is_floating_point() else v.cpu() for v in inputs]
        for g in (f, torch.compile(f)):
            x, y = ([v.detach().requires_grad_(i < grads) for i, v in enumerate(values)] for values in (inputs, exact))
            out, want = g(*x), f(*y)
            upstream = torch.randn(want.shape, dtype=torch.float64)
            got = [out, *torch.autograd.grad(out, x[:grads], upstream.to(out))]
            for a, b in zip(got, [want, *torch.autograd.grad(want, y[:grads], upstream)]):
                assert (a.cpu().double() - b).norm() <= bound * b.norm(), name


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_never_waits_for_the_device(kind, compiled):
    c = small(kind, f"--train.compile={'yes' if compiled else 'no'}", "--train.precision=bf16")
    model, ema, optimizer = train.build(c, GPU, 0)
    train.compile_blocks(c, model, GPU)
    null = tuple(a.to(GPU) for a in nothing(c))
    host = batch_of(c)
    generator, late = torch.Generator(GPU).manual_seed(0), train.Late(1)
    once = lambda number: step(c, model, ema, optimizer, train.to_device(c, dict(host), null, GPU), null, generator, number)
    for number in range(3):
        once(number)
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = once(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    late.read(loss[None])
    assert late.read(loss[None])[0] == pytest.approx(loss.item())


@pytest.mark.parametrize("kind", KINDS)
def test_the_trajectory_is_the_cpus(kind, monkeypatch):
    """With what the CPU draws, and without TF32."""
    torch.set_float32_matmul_precision("highest")
    c = small(kind, "--train.compile=no", "--train.precision=fp32", "--optim.ns_dtype=fp32")
    found = []
    for device in (torch.device("cpu"), GPU):
        model, ema, optimizer = train.build(c, device, 0)
        null = tuple(a.to(device) for a in nothing(c))
        draws = torch.Generator().manual_seed(0)
        with monkeypatch.context() as patch:
            for name, draw in (("randn", torch.randn), ("rand", torch.rand)):
                # not `device=`: that is what the caller says, the generator's, so the draws would stay on the CPU
                patch.setattr(torch, name, lambda *a, draw=draw, place=device, **k: draw(*a, **k).to(place))
            batches = [{k: v.to(device) for k, v in batch_of(c, seed=n).items()} for n in range(6)]
            found.append([step(c, model, ema, optimizer, batch, null, draws, n).item() for n, batch in enumerate(batches)])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_few_graphs_serve_all_shapes(kind):
    """Text lengths and aspect ratios change from batch to batch: after a few, nothing is compiled again. Attention under a mask
    pads keys that are no multiple of 8 in number, so the first shapes have both kinds. A graph too many says which guard made it."""
    torch._dynamo.reset()
    c = small(kind, "--train.compile=yes", "--train.precision=bf16", "--text.length=64")
    model, ema, optimizer = train.build(c, GPU, 0)
    train.compile_blocks(c, model, GPU)
    generator = torch.Generator(GPU).manual_seed(0)

    def once(width, height, length):
        cut = tuple(a[:, :length].to(GPU) for a in nothing(c))
        rows = {"image": torch.zeros(8, 3, height, width, dtype=torch.uint8), "ids": torch.zeros(8, length, dtype=torch.int64),
                "mask": torch.ones(8, length, dtype=torch.bool)}
        step(c, model, ema, optimizer, {k: v.to(GPU) for k, v in rows.items()}, cut, generator, 0)
    for shape in ((64, 64, 16), (48, 80, 24), (80, 48, 32), (64, 64, 56)):
        once(*shape)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for shape in ((96, 48, 40), (48, 96, 48), (64, 64, 40), (56, 72, 64)):
            once(*shape)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_a_run_resumes_and_samples(tmp_path):
    def call(*command):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
    args = ["train.py", "--config=debug", f"--out={tmp_path / 'run'}"]
    call(*args, "--train.images=160")
    call(*args)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert lines[0]["device"] == torch.cuda.get_device_name(0)
    assert lines[-1]["images"] == 320 and any("resumed" in line for line in lines)
    call("sample.py", "red apple", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'out'}")
    assert list((tmp_path / "out").glob("*.png"))


def test_too_large_a_batch_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        with pytest.raises(SystemExit) as stop:
            train.main(["--config=debug", "--model.width=512", "--train.batch=8192", "--train.micro_batch=8192", "--train.images=16384",
                        f"--out={tmp_path}/run"])
        assert "--train.micro_batch" in str(stop.value)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()

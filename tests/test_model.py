"""The denoiser against diffusers' own class, and token routing against its definition."""
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

import configs
import kernels
import train
from model import Denoiser, count, flops, patchify, unpatchify
from pretrained import from_released

SMALL = replace(configs.debug, text=configs.Text(encoder="frozen", dim=24), model=configs.Model(
    size=32, patch=8, width=64, depth=4, heads=4, mlp_ratio=3.5, bottleneck=16, route=configs.Route(1, 2, 0.5)))

OWN = replace(SMALL, text=configs.debug.text)                                  # with our own text transformer


def randomise(model, seed=0):
    """Weights in which every path carries signal (at initialisation gates and output are zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.3 if p.ndim == 1 else 1.5 / p.shape[-1] ** 0.5))
    return model


def inputs(n=3, length=5, dim=24, dtype=torch.float32, size=32):
    g = torch.Generator().manual_seed(1)
    mask = torch.arange(length)[None] < torch.tensor([[5], [2], [4]])[:n]
    return (torch.randn(n, 3, size, size, generator=g, dtype=dtype), torch.rand(n, generator=g, dtype=dtype),
            torch.randn(n, length, dim, generator=g, dtype=dtype), mask)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_dense_output_and_all_gradients_equal_diffusers(dtype, tolerance, monkeypatch):
    """diffusers computes RMS norms, RoPE and the timestep embedding in fp32 whatever the dtype, as ours does for bf16; for
    the float64 comparison both are lifted: `.float()` means double, and RMSNorm is torch's own."""
    from diffusers import PRXTransformer2DModel
    from diffusers.models.normalization import RMSNorm
    m = SMALL.model
    theirs = randomise(PRXTransformer2DModel(in_channels=3, patch_size=8, context_in_dim=24, hidden_size=64, mlp_ratio=3.5, num_heads=4,
                                             depth=4, axes_dim=[8, 8], bottleneck_size=m.bottleneck).to(dtype))
    ours = Denoiser(SMALL, dtype=dtype).to(dtype)
    ours.load_state_dict(from_released("prx", theirs.state_dict()))
    z, t, text, mask = inputs(dtype=dtype)
    if dtype == torch.float64:
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        monkeypatch.setattr(RMSNorm, "forward", lambda self, x: torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps))
        ours.grid, ours.held = (4, 4, z.device), (kernels.rope_table(4, 4, 16, dtype=dtype), 0)
    out = unpatchify(ours(z, t, text, mask)[0], 8, 32, 32)
    reference = theirs(z, t, text, attention_mask=mask, return_dict=False)[0]
    scale = reference.abs().max()
    assert scale > 0.1 and (out - reference).abs().max() <= tolerance * scale
    weight = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward(), (reference * weight).sum().backward()
    gradients = from_released("prx", {n: p.grad for n, p in theirs.named_parameters()})
    for name, p in ours.named_parameters():
        size = gradients[name].abs().max()
        assert size > 0 and (p.grad - gradients[name]).abs().max() <= tolerance * size, name


def test_parameter_count_of_prx_512():
    with torch.device("meta"):
        assert count(Denoiser(configs.prx_512, align_dim=1024)) == 1_177_215_744
        assert count(Denoiser(replace(configs.prx_512, text=replace(configs.prx_512.text, dim=2048)))) == 1_176_756_992


def test_output_is_exactly_zero_at_initialisation():
    z, t, text, mask = inputs()
    assert Denoiser(SMALL)(z, t, text, mask)[0].abs().max() == 0


def test_patchify_order_and_round_trip():
    x = torch.randn(2, 3, 8, 12)
    tokens = patchify(x, 4)
    reference = torch.nn.functional.unfold(x, 4, stride=4).transpose(1, 2)
    assert torch.equal(tokens, reference) and torch.equal(unpatchify(tokens, 4, 8, 12), x)


def test_text_padding_is_never_attended():
    model = randomise(Denoiser(SMALL))
    z, t, text, mask = inputs()
    out = model(z, t, text, mask)[0]
    assert torch.equal(out, model(z, t, torch.where(mask[..., None], text, 1e3), mask)[0])
    alone = model(z[1:2], t[1:2], text[1:2, :2], None)[0]                       # the second caption has two tokens
    torch.testing.assert_close(out[1:2], alone, rtol=1e-4, atol=1e-4)
    own = randomise(Denoiser(OWN))                                                 # the same for our own text transformer
    ids = torch.randint(0, 256, (3, 5))
    padded, cut = own(z, t, ids, mask)[0], own(z[1:2], t[1:2], ids[1:2, :2], mask[1:2, :2])[0]
    torch.testing.assert_close(padded[1:2], cut, rtol=1e-4, atol=1e-4)


def test_text_keys_and_values_can_be_computed_once():
    model = randomise(Denoiser(SMALL))
    z, t, text, mask = inputs()
    assert torch.equal(model(z, t, model.text_kv(text, mask), mask)[0], model(z, t, text, mask)[0])


@pytest.mark.parametrize("end", [2, None])
def test_keeping_all_tokens_equals_dense_exactly(end):
    c = replace(SMALL, model=replace(SMALL.model, route=configs.Route(1, end, 1.0)))
    model = randomise(Denoiser(c))
    z, t, text, mask = inputs()
    ids = kernels.keep_tokens(3, 16, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(ids, torch.arange(16).expand(3, 16))
    assert torch.equal(model(z, t, text, mask, ids)[0], model(z, t, text, mask)[0])


def routed_by_loops(model, z, t, text, mask, ids):
    """TREAD one sample at a time, by plain indexing: the definition."""
    outs = []
    for b in range(len(z)):
        x = model.img_in(patchify(z[b:b + 1], model.patch))
        time = model.time_in(__import__("model").timestep_embedding(t[b:b + 1]))
        vec = torch.nn.functional.silu(time)
        txt = model.read(text[b:b + 1], None)[:, mask[b]]
        table, here = model.positions(4, 4, z.device)[0], slice(None)
        seen = []
        for i, block in enumerate(model.blocks):
            here = ids[b] if model.route.start <= i and (model.route.end is None or i <= model.route.end) else slice(None)
            y = block(x[:, here], vec, txt, None, table[here])
            x = x.clone()
            x[:, here] = y
            seen.append(x)
        out = model.final(x, time)
        outs.append((out if model.route.end is not None else out[:, ids[b]], seen))
    return outs


@pytest.mark.parametrize("start, end", [(1, 2), (1, None), (0, None)])
def test_routing_equals_a_loop_over_samples_and_leaves_the_others_alone(start, end):
    c = replace(SMALL, model=replace(SMALL.model, route=configs.Route(start, end, 0.5)))
    model = randomise(Denoiser(c))
    z, t, text, mask = inputs()
    ids = kernels.keep_tokens(3, 16, 0.5, torch.Generator().manual_seed(3))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out))
    out, _ = model(z, t, text, mask, ids)
    assert [s.shape[1] for s in seen] == ([16, 8, 8, 16] if end == 2 else [16, 8, 8, 8] if start == 1 else [8] * 4)
    entered = []
    model.blocks[-1].register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model(z, t, text, mask, ids)
    if end is not None:                                                         # tokens not kept: bit-identical across blocks 1..2
        for b in range(3):
            others = [i for i in range(16) if i not in ids[b].tolist()]
            assert len(others) == 8 and torch.equal(entered[0][b, others], seen[0][b, others])
            assert torch.equal(entered[0][b, ids[b]], seen[2][b])
    for b, (reference, _) in enumerate(routed_by_loops(model, z, t, text, mask, ids)):
        torch.testing.assert_close(out[b:b + 1], reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("end", [2, None])
def test_gradients_reach_every_parameter_through_the_route(end):
    c = replace(OWN, model=replace(SMALL.model, route=configs.Route(1, end, 0.5)), align=replace(SMALL.align, block=1, hidden=16))
    model = randomise(Denoiser(c, align_dim=8))
    z, t, _, mask = inputs()
    ids = kernels.keep_tokens(3, 16, 0.5, torch.Generator().manual_seed(3))
    out, tapped = model(z, t, torch.randint(0, 256, (3, 5)), mask, ids)
    (out.square().mean() + tapped.square().mean()).backward()
    assert tapped.shape == (3, 8, 8)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_kept_tokens_are_sorted_per_sample_and_change():
    draw = lambda seed: kernels.keep_tokens(64, 100, 0.25, torch.Generator().manual_seed(seed))
    ids = draw(0)
    assert ids.shape == (64, 25) and (ids.diff(dim=1) > 0).all()
    assert len({tuple(row.tolist()) for row in ids}) == 64 and not torch.equal(ids, draw(1)) and torch.equal(ids, draw(0))
    hits = torch.zeros(100).index_add_(0, ids.flatten(), torch.ones(ids.numel()))
    assert hits.min() > 4 and hits.max() < 32                                   # mean 16, deviation 3.5


@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_compiled_blocks_equal_eager_ones_and_compile_once():
    """As train.py compiles them: outputs and gradients, with one graph for all blocks of a shape."""
    from torch._dynamo.testing import CompileCounterWithBackend
    z, t, text, mask = inputs()
    torch._dynamo.reset()
    counter, gradients = CompileCounterWithBackend("inductor"), []
    for compiled in (False, True):
        model = randomise(Denoiser(SMALL))
        for block in model.blocks if compiled else ():
            block.compile(dynamic=False, backend=counter, fullgraph=True)
        out = model(z, t, text, mask)[0]
        out.square().mean().backward()
        gradients.append([out.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item())
    assert counter.frame_count == 1                                             # not one per block


@pytest.fixture(params=["alone", "ddp"])
def wrapped(request, tmp_path):
    """What a rank's model is wrapped in, with buckets for its gradients that are smaller than a block, as the large recipes' are."""
    if request.param == "alone":
        yield lambda model: model
        return
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield lambda model: DistributedDataParallel(model, bucket_cap_mb=0.02)
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["prx", "dit", "mmdit"])
def test_buckets_and_texts_of_any_length_share_a_few_graphs(kind, wrapped):
    """As train.py compiles on a GPU. With a graph for each shape a run with aspect buckets would compile for an hour, then pass the
    limit and go on without. On CPU only what is captured is compared: the backend runs it as it is."""
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    model, counter, after = Denoiser(replace(SMALL, model=replace(SMALL.model, kind=kind, bottleneck=0))), CompileCounter(), []
    train.compile_blocks(configs.parse(["--train.compile=yes"]), model, torch.device("cuda"))             # its settings; the backend is ours
    for block in model.blocks:
        block.compile(dynamic=None, backend=counter, fullgraph=True)
    net = wrapped(model)
    g = torch.Generator().manual_seed(0)
    for k in range(16):
        height, width = [(64, 64), (48, 80), (80, 48), (56, 72)][k % 4]
        length = 8 * (2 + k * 5 % 7)
        mask = torch.arange(length) < torch.randint(8, length + 1, (4, 1), generator=g)                   # (B, L)
        ids = kernels.keep_tokens(4, height * width // 64, 0.5, g)
        net(torch.randn(4, 3, height, width), torch.rand(4), torch.randn(4, length, 24), mask, ids, kernels.text_slots(mask))[0].sum().backward()
        after.append(counter.frame_count)
    assert after[3] == after[-1] <= 6


def test_checkpointing_changes_no_gradient():
    z, t, text, mask = inputs()
    ids = kernels.keep_tokens(3, 16, 0.5, torch.Generator().manual_seed(3))
    gradients = []
    for on in (False, True):
        model = randomise(Denoiser(replace(SMALL, train=replace(SMALL.train, checkpointing=on))))
        model(z, t, text, mask, ids)[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("route", [None, configs.Route(1, 2, 0.5), configs.Route(2, None, 0.25), configs.Route(0, None, 0.5)])
def test_flops_formula_equals_the_counter(route):
    c = replace(SMALL, model=replace(SMALL.model, route=route))
    z, t, text, _ = inputs()
    ids = route and kernels.keep_tokens(1, 16, route.keep, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        Denoiser(c)(z[:1], t[:1], text[:1], None, ids)
    assert counter.get_total_flops() == flops(c, 5)


def test_published_flops():
    dense, routed = flops(configs.prx_512, 256, routed=False), flops(configs.prx_512, 256)
    assert abs(3 * dense / 1e12 - 1.366) < 1e-3 and abs(3 * routed / 1e12 - 0.841) < 1e-3
    assert abs(3 * flops(configs.prx_1024, 256, routed=False) / 1e12 - 5.236) < 1e-3

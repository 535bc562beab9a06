"""Muon and AdamW against torch.optim, and the properties that make Newton-Schulz what it is."""
import io
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import configs
import muon
from model import Denoiser

SHAPES = [(32, 32), (96, 32), (32, 96), (32, 32), (20, 48)]


def same(shapes=SHAPES, pieces=1, seed=0):
    """Two sets of equal parameters."""
    g = torch.Generator().manual_seed(seed)
    values = [torch.randn(s, generator=g) for s in shapes]
    ours, theirs = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    for p in ours:
        p.pieces = pieces
    return ours, theirs


def drive(ours, theirs, mine, other, steps=10):
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn(a.shape, generator=g)
            b.grad = a.grad.clone()
        mine.step()
        other.step()


def group(params, kind="muon", lr=0.02, decay=0.1):
    return dict(params=params, kind=kind, base_lr=lr, decay=decay)


def make(groups, mesh=None, **options):
    return muon.Muon(groups, replace(configs.Optim(), **options), mesh)


@pytest.mark.parametrize("scale, torchs", [("rms", "match_rms_adamw"), ("spectral", "original")])
def test_muon_equals_torch_optim_muon(scale, torchs):
    """torch's multiplies in bf16, one matrix at a time; ours does the same products in batches, in the same order."""
    ours, theirs = same()
    drive(ours, theirs, make([group(ours)], scale=scale), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=torchs))
    for a, b, start in zip(ours, theirs, same()[0]):
        moved = (b - start).abs().max()
        assert moved > (0.05 if scale == "rms" else 0.01) and (a - b).abs().max() < 0.03 * moved, (a - b).abs().max() / moved


def exact_step(w, m, g, lr, decay, mu=0.95):
    """One step for one matrix from the formulas, in float64."""
    m = mu * m + (1 - mu) * g
    u = (1 - mu) * g + mu * m
    x = u / (u.norm() + 1e-7)
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return w * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(w.shape)) * x, m


@pytest.mark.parametrize("split", [True, False])
def test_muon_equals_the_formula_in_float64(split):
    shapes = [(96, 32), (32, 96), (64, 32)]
    ours, _ = same(shapes, pieces=2)
    opt = make([group(ours)], ns_dtype="fp32", split=split)
    k = 2 if split else 1
    reference = [[(piece.double(), torch.zeros_like(piece).double()) for piece in p.detach().clone().chunk(k)] for p in ours]
    g = torch.Generator().manual_seed(1)
    for _ in range(5):
        for i, p in enumerate(ours):
            p.grad = torch.randn(p.shape, generator=g)
            reference[i] = [exact_step(w, m, d.double(), 0.02, 0.1) for (w, m), d in zip(reference[i], p.grad.chunk(k))]
        opt.step()
    for p, pieces in zip(ours, reference):
        torch.testing.assert_close(p.detach().double(), torch.cat([w for w, _ in pieces]), rtol=0, atol=1e-4)


def test_the_update_is_as_large_as_adamws():
    ours, _ = same([(256, 256), (768, 256), (256, 896)])
    before = [p.detach().clone() for p in ours]
    drive(ours, ours, make([group(ours, lr=1.0, decay=0.0)]), torch.optim.SGD(ours, 0.0), steps=1)
    for p, b in zip(ours, before):
        assert 0.16 < (p - b).square().mean().sqrt() < 0.21                     # prx.md: 0.181 to 0.186 at PRX's shapes


def test_first_nesterov_step_is_0975_of_the_gradient(monkeypatch):
    seen = []
    monkeypatch.setattr(muon, "newton_schulz", lambda x, *_: seen.append(x) or torch.zeros_like(x))
    p = nn.Parameter(torch.zeros(4, 4))
    p.grad = torch.randn(4, 4)
    make([group([p])]).step()
    torch.testing.assert_close(seen[0][0], 0.0975 * p.grad)


def test_matrices_of_one_shape_are_one_batch(monkeypatch):
    seen = []
    monkeypatch.setattr(muon, "newton_schulz", lambda x, *_: seen.append(tuple(x.shape)) or torch.zeros_like(x))
    ours, _ = same([(96, 32), (32, 96), (96, 32), (32, 32), (96, 32)])
    ours[0].pieces = ours[2].pieces = 3
    for p in ours:
        p.grad = torch.ones_like(p)
    make([group(ours)]).step()
    assert sorted(seen) == [(1, 32, 32), (1, 32, 96), (1, 96, 32), (6, 32, 32)]                           # the last: q, k and v of two


def test_adamw_equals_torch_optim_adamw():
    ours, theirs = same([(7, 5), (9,), ()])
    drive(ours, theirs, make([group(ours, "adamw", lr=1e-2)], beta1=0.9, beta2=0.95, eps=1e-8),
          torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind, low, high", [("quintic", 0.5, 1.3), ("polar", 0.85, 1.15)])
def test_singular_values_end_near_one(kind, low, high):
    g = torch.Generator().manual_seed(0)
    random = torch.randn(3, 48, 64, generator=g)
    u, _, v = torch.linalg.svd(random, full_matrices=False)
    skewed = u * torch.logspace(0, -2, 48) @ v                                  # condition number 100
    for x in (random, skewed, skewed.mT):
        s = torch.linalg.svdvals(muon.newton_schulz(x, kind, torch.float32))
        assert low < s.min() and s.max() < high, (s.min(), s.max())


class NeverRead(TorchDispatchMode):
    """No value of a tensor may reach the host, which on a GPU would have to wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default), func
        return func(*args, **(kwargs or {}))


def test_never_read_sees_a_host_that_waits():
    for wait in (lambda x: x.item(), lambda x: bool(x > 0), lambda x: torch.ones(2).add_(torch.ones(2), alpha=x)):
        with pytest.raises(AssertionError, match="_local_scalar_dense|is_nonzero"), NeverRead():
            wait(torch.ones(()))


def test_a_gradient_that_is_not_finite_changes_nothing():
    for bad in (math.nan, math.inf, -math.inf):
        ours, _ = same([(8, 8), (8,)])
        opt = make([group(ours[:1]), group(ours[1:], "adamw")])
        for p in ours:
            p.grad = torch.randn_like(p)
        opt.step(skip=torch.zeros(()))
        before = [p.detach().clone() for p in ours], [v.clone() for s in opt.state.values() for v in s.values()]
        for p in ours:
            p.grad = torch.full_like(p, bad)
        with NeverRead():
            opt.step(skip=torch.ones(()))
        after = [p.detach() for p in ours], [v for s in opt.state.values() for v in s.values()]
        assert all(torch.equal(a, b) for x, y in zip(before, after) for a, b in zip(x, y))


@pytest.mark.parametrize("scale", ["rms", "spectral"])
def test_a_step_that_may_be_skipped_and_is_not_is_the_same_to_the_bit(scale):
    (ours, theirs), (a, b) = same(pieces=1), same([(8,), (7, 5)])
    drive([*ours, *a], [*theirs, *b], make([group(ours), group(a, "adamw")], scale=scale), make([group(theirs), group(b, "adamw")], scale=scale), 2)
    assert all(torch.equal(p, q) for p, q in zip([*ours, *a], [*theirs, *b]))
    first, second = make([group(ours), group(a, "adamw")], scale=scale), make([group(theirs), group(b, "adamw")], scale=scale)
    for p, q in zip([*ours, *a], [*theirs, *b]):
        p.grad, q.grad = torch.ones_like(p) / 3, torch.ones_like(p) / 3
    first.step(), second.step(skip=torch.zeros(()))
    assert all(torch.equal(p, q) for p, q in zip([*ours, *a], [*theirs, *b]))


def test_saved_and_loaded_it_goes_on_bit_for_bit():
    a, b = same([(8, 8), (8, 4), (8,)])
    build = lambda ps: make([group(ps[:2]), group(ps[2:], "adamw")])
    first = build(a)
    drive(a, b, first, torch.optim.SGD(b, 0.0), steps=3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    copies = [nn.Parameter(p.detach().clone()) for p in a]
    second = build(copies)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for p, q in zip(a, copies):
        p.grad = torch.ones_like(p) / 3
        q.grad = p.grad.clone()
    first.step(), second.step()
    assert all(torch.equal(p, q) for p, q in zip(a, copies))


def test_distributed_checkpoint_knows_its_state_by_name():
    c = configs.debug
    models = [Denoiser(c) for _ in range(2)]
    first, second = (muon.build(model, c.optim) for model in models)
    for p in models[0].parameters():
        p.grad = torch.randn_like(p)
    first.step()
    found = get_optimizer_state_dict(models[0], first)
    assert set(found["state"]) == {name for name, _ in models[0].named_parameters()}
    assert found["state"]["blocks.0.qkv.weight"]["momentum"].shape == models[0].blocks[0].qkv.weight.shape
    set_optimizer_state_dict(models[1], second, found)
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        assert first.state[p].keys() == second.state[q].keys() and all(torch.equal(v, second.state[q][k]) for k, v in first.state[p].items())


def test_groups_of_the_model():
    model = Denoiser(configs.debug, align_dim=8)
    names = {id(p): n for n, p in model.named_parameters()}
    opt = muon.build(model, configs.Optim(decay=0.1))
    inside = {names[id(p)] for p in opt.param_groups[0]["params"]}
    assert inside == {n for n, p in model.named_parameters() if p.ndim == 2 and (n.startswith("blocks.") or n.startswith("text.blocks."))}
    assert all(p.ndim < 2 for g in opt.param_groups if g["decay"] == 0 for p in g["params"])
    assert all(g["decay"] == 0.1 for g in muon.build(model, configs.Optim(decay=0.1, decay_all=True)).param_groups)
    assert [g["kind"] for g in muon.build(model, configs.Optim(name="adamw")).param_groups] == ["adamw", "adamw"]
    with torch.device("meta"):
        prx = Denoiser(configs.prx_512, align_dim=1024)
    sizes = [sum(p.numel() for p in g["params"]) for g in muon.build(prx, configs.prx_512.optim).param_groups]
    assert sizes[0] == 1_156_055_040 and sum(sizes[1:]) - sum(p.numel() for p in prx.align.parameters()) == 21_160_704


@pytest.mark.parametrize("kind", ["prx", "mmdit"])
def test_adaln_matrices_may_be_adamws(kind):
    c = configs.parse(["--config=debug", f"--model.kind={kind}"])
    model = Denoiser(c)
    names = {id(p): n for n, p in model.named_parameters()}
    kinds = {names[id(p)]: g["kind"] for g in muon.build(model, replace(c.optim, modulation="adamw")).param_groups for p in g["params"]}
    before = {names[id(p)]: g["kind"] for g in muon.build(model, c.optim).param_groups for p in g["params"]}
    moved = {n for n in kinds if kinds[n] != before[n]}
    assert moved == {n for n in kinds if n.startswith("blocks.") and n.endswith("modulation.weight")} and all(kinds[n] == "adamw" for n in moved)


def test_a_parameter_in_two_groups_is_refused():
    model = Denoiser(configs.debug)
    model.named_parameters = lambda **_: [*Denoiser.named_parameters(model), ("again", model.final.linear.weight)]
    with pytest.raises(AssertionError, match="exactly one group"):
        muon.build(model, configs.Optim())
    tied = nn.ModuleDict({"blocks": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    muon.build(tied, configs.Optim())
    tied["head"].weight = tied["blocks"].weight
    with pytest.raises(AssertionError, match="exactly one group"):
        muon.build(tied, configs.Optim())


def test_without_gradient_nothing_moves():
    ours, _ = same([(8, 8), (8, 8), (8,)])
    opt = make([group(ours[:2]), group(ours[2:], "adamw")])
    before = [p.detach().clone() for p in ours]
    opt.step()                                                                  # none has one: frozen, or after zero_grad
    ours[0].grad = torch.ones(8, 8)
    opt.step()
    assert [torch.equal(p, b) for p, b in zip(ours, before)] == [False, True, True]


def test_it_solves_a_least_squares_problem():
    g = torch.Generator().manual_seed(0)
    x, truth = torch.randn(256, 16, generator=g), torch.randn(16, 16, generator=g)
    w = nn.Parameter(torch.zeros(16, 16))
    opt = make([group([w], lr=0.1, decay=0.0)])
    losses = []
    for i in range(200):
        opt.zero_grad()
        (loss := (x @ (w.T - truth)).square().mean()).backward()
        opt.param_groups[0]["lr"] = 0.1 * (1 - i / 200)
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-3 * losses[0]


# ------------------------------------------------------------------------------------------------------------------
# Many ranks: pytest starts four processes of this file, which check every grid of up to four ranks

GRIDS = [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (1, 4), (2, 2)]        # replicas, shards: ddp (n, 1), fsdp (1, n), hsdp (2, 2)
MATRICES = [((96, 32), 3), ((32, 96), 1), ((32, 32), 1), ((21, 50), 3), ((21, 50), 3), ((2, 32), 2), ((32, 32), 1), ((96, 32), 3)]       # shape, pieces
REST = [(7, 5), (9,), (1,), (64, 3)]


def optimizer(params, mesh=None):
    for p, (_, pieces) in zip(params, MATRICES):
        p.pieces = pieces
    return make([group(params[:len(MATRICES)]), group(params[len(MATRICES):], "adamw", 1e-2)], ns_dtype="fp32", mesh=mesh)


def check_grid(replicas, shards):
    g = torch.Generator().manual_seed(0)
    draw = lambda: [torch.randn(s, generator=g) for s in (*(s for s, _ in MATRICES), *REST)]
    start, steps, seen = draw(), [draw() for _ in range(4)], []
    alone = [nn.Parameter(v.clone()) for v in start]
    single = optimizer(alone)
    mesh, everyone = DeviceMesh("cpu", torch.arange(replicas * shards).view(replicas, shards)), dist.new_group(range(replicas * shards))
    if dist.get_rank() >= replicas * shards:
        return
    spread = lambda v: distribute_tensor(v, mesh, [Replicate(), Shard(0)], src_data_rank=None) if shards > 1 else v.clone()
    params = [nn.Parameter(spread(v)) for v in start]
    many = optimizer(params, mesh)
    full = lambda x: x.detach().full_tensor() if shards > 1 and x.ndim else x.detach()
    for k, grads in enumerate(steps):
        for p, q, v in zip(alone, params, grads):
            p.grad, q.grad = v.clone(), spread(v)
        single.step(skip=torch.tensor(float(k == 2)))                           # the third step is skipped
        original, seen[:] = muon.newton_schulz, []
        muon.newton_schulz = lambda x, *args: seen.append((len(x), *x.shape[1:])) or original(x, *args)
        many.step(skip=torch.tensor(float(k == 2)))
        muon.newton_schulz = original
        told = [None] * replicas * shards
        dist.all_gather_object(told, seen, everyone)                            # the banks of each rank, in the same order
        counts = [[n for n, _, _ in bank] for bank in zip(*told, strict=True)]
        assert sum(map(sum, counts)) == sum(pieces for _, pieces in MATRICES)   # every piece is orthogonalised once, by someone
        assert all(max(bank) <= -(-sum(bank) // len(told)) for bank in counts)  # and nobody has two before all have one
    for p, q in zip(alone, params):
        assert (full(q) - p).abs().max() <= 1e-6, (replicas, shards, (full(q) - p).abs().max())
        for name, x in single.state[p].items():                                 # the state lies as its parameter
            y = many.state[q][name]
            assert (full(y) - x).abs().max() <= 1e-6 and x.abs().max() > 0
            assert name == "step" or shards == 1 or y.placements == q.placements


def test_on_any_grid_of_ranks_it_equals_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", __file__]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("equal") == len(GRIDS), done.stderr[-3000:]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for grid in GRIDS:
        check_grid(*grid)
        dist.barrier()
        if dist.get_rank() == 0:
            print(grid, "equal", flush=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)

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
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

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


@pytest.mark.parametrize("scale, torchs", [("rms", "match_rms_adamw"), ("spectral", "original")])
def test_muon_equals_torch_optim_muon(scale, torchs):
    """torch's multiplies in bf16, one matrix at a time; ours does the same products in batches, in the same order."""
    ours, theirs = same()
    drive(ours, theirs, muon.Muon([group(ours)], scale=scale), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=torchs))
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
    opt = muon.Muon([group(ours)], ns_dtype=torch.float32, split=split)
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
    drive(ours, ours, muon.Muon([group(ours, lr=1.0, decay=0.0)]), torch.optim.SGD(ours, 0.0), steps=1)
    for p, b in zip(ours, before):
        assert 0.16 < (p - b).square().mean().sqrt() < 0.21                     # prx.md: 0.181 to 0.186 at PRX's shapes


def test_first_nesterov_step_is_0975_of_the_gradient(monkeypatch):
    seen = []
    monkeypatch.setattr(muon, "newton_schulz", lambda x, *_: seen.append(x) or torch.zeros_like(x))
    p = nn.Parameter(torch.zeros(4, 4))
    p.grad = torch.randn(4, 4)
    muon.Muon([group([p])]).step()
    torch.testing.assert_close(seen[0][0], 0.0975 * p.grad)


def test_matrices_of_one_shape_are_one_batch(monkeypatch):
    seen = []
    monkeypatch.setattr(muon, "newton_schulz", lambda x, *_: seen.append(tuple(x.shape)) or torch.zeros_like(x))
    ours, _ = same([(96, 32), (32, 96), (96, 32), (32, 32)])
    ours[0].pieces = 3
    for p in ours:
        p.grad = torch.ones_like(p)
    muon.Muon([group(ours)]).step()
    assert sorted(seen) == [(2, 32, 96), (4, 32, 32)]                           # q, k, v and the square; a tall one beside a wide one


def test_adamw_equals_torch_optim_adamw():
    ours, theirs = same([(7, 5), (9,), ()])
    drive(ours, theirs, muon.Muon([group(ours, "adamw", lr=1e-2)], beta1=0.9, beta2=0.95, eps=1e-8),
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


def test_a_gradient_that_is_not_finite_changes_nothing():
    for device_side in (False, True):                                           # the second path is the GPU's
        ours, _ = same([(8, 8), (8,)])
        opt = muon.Muon([group(ours[:1]), group(ours[1:], "adamw")])
        for p in ours:
            p.grad = torch.randn_like(p)
        opt.step(skip=torch.zeros(()))
        before = [p.detach().clone() for p in ours], [v.clone() for s in opt.state.values() for v in s.values()]
        for p in ours:
            p.grad = torch.full_like(p, math.nan)
        if device_side:
            with torch.no_grad():
                opt.muon(ours[:1], 0.02, 0.1, torch.ones(()))
                opt.adamw(ours[1:], 0.02, 0.1, torch.ones(()))
        else:
            opt.step(skip=torch.ones(()))
        after = [p.detach() for p in ours], [v for s in opt.state.values() for v in s.values()]
        assert all(torch.equal(a, b) for x, y in zip(before, after) for a, b in zip(x, y))


def test_saved_and_loaded_it_goes_on_bit_for_bit():
    a, b = same([(8, 8), (8, 4), (8,)])
    make = lambda ps: muon.Muon([group(ps[:2]), group(ps[2:], "adamw")])
    first = make(a)
    drive(a, b, first, torch.optim.SGD(b, 0.0), steps=3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    copies = [nn.Parameter(p.detach().clone()) for p in a]
    second = make(copies)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for p, q in zip(a, copies):
        p.grad = torch.ones_like(p) / 3
        q.grad = p.grad.clone()
    first.step(), second.step()
    assert all(torch.equal(p, q) for p, q in zip(a, copies))


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
    opt = muon.Muon([group(ours[:2]), group(ours[2:], "adamw")])
    before = [p.detach().clone() for p in ours]
    opt.step()                                                                  # none has one: frozen, or after zero_grad
    ours[0].grad = torch.ones(8, 8)
    opt.step()
    assert [torch.equal(p, b) for p, b in zip(ours, before)] == [False, True, True]


def test_it_solves_a_least_squares_problem():
    g = torch.Generator().manual_seed(0)
    x, truth = torch.randn(256, 16, generator=g), torch.randn(16, 16, generator=g)
    w = nn.Parameter(torch.zeros(16, 16))
    opt = muon.Muon([group([w], lr=0.1, decay=0.0)])
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
MATRICES, REST = [((96, 32), 3), ((32, 96), 1), ((32, 32), 1), ((21, 50), 3), ((2, 32), 2), ((32, 32), 1)], [(7, 5), (9,), (1,), (64, 3)]


def optimizer(params, mesh=None):
    for p, (_, pieces) in zip(params, MATRICES):
        p.pieces = pieces
    return muon.Muon([group(params[:len(MATRICES)]), group(params[len(MATRICES):], "adamw", 1e-2)], ns_dtype=torch.float32, mesh=mesh)


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
    for k, grads in enumerate(steps):
        for p, q, v in zip(alone, params, grads):
            p.grad, q.grad = v.clone(), spread(v)
        single.step(skip=torch.tensor(float(k == 2)))                           # the third step is skipped
        original, seen[:] = muon.newton_schulz, []
        muon.newton_schulz = lambda x, *args: seen.append((len(x), *x.shape[1:])) or original(x, *args)
        many.step(skip=torch.tensor(float(k == 2)))
        muon.newton_schulz = original
        if k != 2:                                                              # every piece is orthogonalised once, by someone
            told = [None] * replicas * shards
            dist.all_gather_object(told, (sum(n for n, *_ in seen), sum(n * r * r * (2 * c + r) for n, r, c in seen)), everyone)
            assert sum(n for n, _ in told) == sum(pieces for _, pieces in MATRICES)
            assert max(f for _, f in told) <= max(sum(f for _, f in told) / len(told) * 1.35, 32 * 32 * 96)
    for p, q in zip(alone, params):
        full = q.detach().full_tensor() if shards > 1 else q.detach()
        assert (full - p).abs().max() <= 1e-6, (replicas, shards, (full - p).abs().max())
    for p, q in zip(alone, params):                                             # every number of the state is kept once, in its place
        names = [n for n in single.state[p] if n != "step"]
        for name in names:
            found = torch.stack([torch.zeros(p.numel()), torch.zeros(p.numel())])
            for r, n, at, x in many.segments():
                if r is q and n == name:
                    found[:, at:at + len(x)] += torch.stack([x, torch.ones(len(x))])
            dist.all_reduce(found, group=everyone)
            whole = torch.zeros(p.numel())
            for r, n, at, x in single.segments():
                if r is p and n == name:
                    whole[at:at + len(x)] = x
            assert (found[1] == 1).all() and (found[0] - whole).abs().max() <= 1e-6 and whole.abs().max() > 0
    assert sum(x.numel() for s in many.state.values() for k, x in s.items() if k != "step") <= sum(p.numel() * 2 for p in alone) / replicas / shards + 3000


def check_rounded(replicas, shards):
    """AdamW with changes that travel as bf16: each step adds the rounded change, everywhere the same."""
    g = torch.Generator().manual_seed(0)
    draw = lambda: [torch.randn(s, generator=g) for s in REST]
    start, steps, adamw = draw(), [draw() for _ in range(30)], lambda params, mesh=None: muon.Muon([group(params, "adamw", 1e-2)], mesh=mesh)
    alone = [nn.Parameter(v.clone()) for v in start]
    mesh, everyone = DeviceMesh("cpu", torch.arange(replicas * shards).view(replicas, shards)), dist.new_group(range(replicas * shards))
    if dist.get_rank() >= replicas * shards:
        return
    spread = lambda v: distribute_tensor(v, mesh, [Replicate(), Shard(0)], src_data_rank=None) if shards > 1 else v.clone()
    full = lambda q: q.detach().full_tensor() if shards > 1 else q.detach()
    params = [nn.Parameter(spread(v)) for v in start]
    single, many, path = adamw(alone), adamw(params, mesh), [torch.zeros_like(v) for v in start]
    for k, grads in enumerate(steps):
        before = [p.detach().clone() for p in alone]
        for p, q, v in zip(alone, params, grads):
            p.grad, q.grad = v.clone(), spread(v)
        single.step(skip=torch.tensor(float(k == 2)))
        many.step(skip=torch.tensor(float(k == 2)))
        path = [a + (p.detach() - b).abs() for a, p, b in zip(path, alone, before)]
        if k == 0:                                          # by definition
            assert all(torch.equal(full(q), b + (p.detach() - b).bfloat16()) for p, q, b in zip(alone, params, before))
    apart = [(full(q) - p.detach()).abs() for p, q in zip(alone, params)]
    assert all((a <= 2 ** -9 * way + 1e-6).all() for a, way in zip(apart, path)) and max(a.max() for a in apart) > 0
    dist.all_gather_object(told := [None] * replicas * shards, [full(q) for q in params], everyone)
    assert all(torch.equal(a, b) for other in told for a, b in zip(told[0], other))


def test_on_any_grid_of_ranks_it_equals_one_process():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", __file__]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stdout.count("equal") == len(GRIDS) + 3, done.stderr[-3000:]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for grid in GRIDS:
        check_grid(*grid)
        dist.barrier()
        if dist.get_rank() == 0:
            print(grid, "equal", flush=True)
    for grid in [(2, 1), (3, 1), (2, 2)]:
        check_rounded(*grid)
        dist.barrier()
        if dist.get_rank() == 0:
            print(grid, "rounded, equal", flush=True)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)

"""The optimizer: Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for everything else.

    m <- lerp(m, g, 1 - mu);  u = lerp(g, m, mu)                       momentum as an average, Nesterov
    w <- (1 - lr decay) w - lr scale NS(u)                             "rms": 0.2 sqrt(max(rows, cols)) (Liu et al. 2025: as large as an
                                                                       AdamW update); "spectral": sqrt(max(1, rows / cols)) (Jordan)

NS is `newton_schulz`: matrices of one shape go through it as one batch, a bank. Rows that were fused because they
share an input (`weight.pieces`, e.g. q, k and v) are different maps, so by default each is orthogonalised on its own.

Many ranks form a grid, replicas x shards: ddp is (world, 1), fsdp (1, world), hsdp (nodes, ranks of a node). A parameter is
whole or a DTensor that the shards hold by rows. Nothing is done twice: every piece of a matrix has one rank as its home, by
FLOPs; the shards of the home's replica keep the momentum of their rows and send the rows home (all-to-all), home
orthogonalises and sends them back, and all replicas learn of it (all-gather). AdamW's state is cut over the replicas.
"""
from collections import namedtuple
from itertools import zip_longest

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.optim.adamw import adamw

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor          # its name before torch 2.13
Piece = namedtuple("Piece", "p first rows home")            # rows [first, first + rows) of p; home: (replica, shard)


# Newton-Schulz: five steps of X <- a X + (b A + c A A) X with A = X X^T, and (a, b, c) for each step.
COEFFICIENTS = {
    # Keller Jordan's polynomial: singular values end in about [0.68, 1.13].
    "quintic": [(3.4445, -4.7750, 2.0315)] * 5,
    # Polar Express (Amsel et al. 2025): the best polynomial for each step, with a safety factor of 1.02.
    "polar": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
}


def newton_schulz(matrices, kind="quintic", dtype=torch.bfloat16):
    """Orthogonalise each of `matrices` (n, rows, cols), roughly. Computes in `dtype` and returns that."""
    x = matrices.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT                                            # X X^T is then the smaller product
    norm = x.norm(dim=(1, 2), keepdim=True)
    if kind == "quintic":
        x = x / (norm + 1e-7)
    else:
        x = x / (norm * 1.02 + 1e-6)
    for a, b, c in COEFFICIENTS[kind]:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def local(x):
    """What this rank holds of x, all of it unless x is a DTensor (whose import takes half a second: one process need not wait for it)."""
    return x.to_local() if hasattr(x, "to_local") else x


def flat(parts, like, dtype=None):
    return torch.cat([x.flatten() for x in parts]) if parts else local(like).new_empty(0, dtype=dtype)


def unflat(x, sizes):
    """A flat tensor cut into lists of flat tensors, as `sizes` is nested."""
    return [part.split(s) if s else () for part, s in zip(x.split([sum(s) for s in sizes]), sizes)]


class Muon(torch.optim.Optimizer):
    """Groups say `kind` ("muon" or "adamw") and `base_lr`; whoever drives it sets `lr` before each step. `mesh`: a DeviceMesh
    (replicas, shards), none for one process. Gradients are reduced before `step`, and on every replica the same."""

    def __init__(self, groups, momentum=0.95, ns="quintic", ns_dtype=torch.bfloat16, split=True, beta1=0.9, beta2=0.95, eps=1e-8, mesh=None, scale="rms"):
        self.momentum, self.ns, self.ns_dtype, self.scale, self.betas, self.eps, self.mesh = momentum, ns, ns_dtype, scale, (beta1, beta2), eps, mesh
        self.replicas, self.shards = mesh.shape if mesh else (1, 1)
        self.replica, self.shard = mesh.get_coordinate() if mesh else (0, 0)
        self.across, self.within = mesh.get_all_groups() if mesh else (None, None)
        super().__init__([dict(g, lr=g["base_lr"]) for g in groups], {})
        self.pieces = self.settle([p for g in groups if g["kind"] == "muon" for p in g["params"]], split)

    def settle(self, params, split):
        """A home for every piece: the most costly first, each where there is least to do so far. -> {p: its pieces}"""
        pieces, load = {p: [] for p in params}, [0] * (self.replicas * self.shards)
        height = lambda p: p.shape[0] // (getattr(p, "pieces", 1) if split else 1)
        cost = lambda p: min(height(p), p.shape[1]) ** 2 * (2 * max(height(p), p.shape[1]) + min(height(p), p.shape[1]))
        for p in sorted(params, key=cost, reverse=True):
            for first in range(0, p.shape[0], height(p)):
                home = load.index(min(load))
                load[home] += cost(p)
                pieces[p].append(Piece(p, first, height(p), divmod(home, self.shards)))
        return pieces

    @torch.no_grad()
    def step(self, closure=None, skip=None):
        """`skip`: a 0-d tensor; where it is not zero (the gradient is not finite) nothing changes. Decided on the device."""
        if skip is not None and skip.device.type == "cpu":
            if skip:
                return
            skip = None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self.muon if group["kind"] == "muon" else self.adamw)(params, group["lr"], group["decay"], skip)

    def span(self, piece, shard):
        """The rows of the piece that a shard holds (the first, the one after the last), as DTensor cuts them."""
        height = -(-piece.p.shape[0] // self.shards)
        return [min(max(row, shard * height), (shard + 1) * height) for row in (piece.first, piece.first + piece.rows)]

    def size(self, piece, shard):
        lo, hi = self.span(piece, shard)
        return (hi - lo) * piece.p.shape[1]

    def cut(self, x, piece):
        """My rows of the piece: a view of x, which is laid out as the piece's parameter."""
        start = self.shard * -(-piece.p.shape[0] // self.shards)
        lo, hi = self.span(piece, self.shard)
        return local(x)[lo - start:hi - start]

    def averages(self, p):
        """[(piece, momentum of my rows)] of the pieces of p whose home is in this replica: views of one flat tensor."""
        ours = [b for b in self.pieces[p] if b.home[0] == self.replica]
        sizes = [self.size(b, self.shard) for b in ours]
        if "momentum" not in self.state[p]:
            self.state[p]["momentum"] = local(p).new_zeros(sum(sizes))
        return [(b, m.view(-1, p.shape[1])) for b, m in zip(ours, self.state[p]["momentum"].split(sizes) if sizes else ())]

    def muon(self, params, lr, decay, skip):
        ours = [pair for p in params for pair in self.averages(p)]
        momentum, grads, go = [m for _, m in ours], [self.cut(b.p.grad, b) for b, _ in ours], 1.0
        if skip is not None:
            grads, go = [torch.where(skip > 0, m, g) for m, g in zip(momentum, grads)], 1 - skip          # lerp(m, m) = m
        updates = {}
        if ours:
            torch._foreach_lerp_(momentum, grads, 1 - self.momentum)
            updates = dict(zip([b for b, _ in ours], torch._foreach_lerp(grads, momentum, self.momentum)))
        if decay:
            torch._foreach_mul_([local(p) for p in params], 1 - lr * decay * go)
        banks = {}                                                                                        # (rows, cols), rows <= cols
        for b in sorted((b for p in params for b in self.pieces[p]), key=lambda b: b.home):
            banks.setdefault(tuple(sorted((b.rows, b.p.shape[1]))), []).append(b)
        for _ in zip_longest(*(self.bank(bank, updates, lr, go) for bank in banks.values())):
            pass                                                                                          # one talks while others compute

    def bank(self, bank, updates, lr, go):
        """Orthogonalise pieces of one shape, sorted by home, and add them to the weights. Yields while messages are under way."""
        ours = [b for b in bank if b.home[0] == self.replica]
        mine = [b for b in ours if b.home[1] == self.shard]
        away = [[self.size(b, self.shard) for b in ours if b.home[1] == j] for j in range(self.shards)]   # my rows, by their home
        here = [[self.size(b, j) for b in mine] for j in range(self.shards)]                              # rows of mine, by who has them
        parts, p = [updates[b] for b in ours], bank[0].p
        if self.shards > 1:
            got, work = self.exchange(flat(parts, p), away, here)
            yield
            work.wait()
            parts = [torch.cat(rows).view(b.rows, -1) for b, *rows in zip(mine, *unflat(got, here))]
        if mine:
            wide = torch.stack([x if b.rows <= b.p.shape[1] else x.mT for b, x in zip(mine, parts)])      # (n, rows, cols)
            done = newton_schulz(wide, self.ns, self.ns_dtype) * go
            parts = [x if b.rows <= b.p.shape[1] else x.mT for b, x in zip(mine, done)]
        if self.shards > 1:
            rows = [x[slice(*(row - b.first for row in self.span(b, j)))] for j in range(self.shards) for b, x in zip(mine, parts)]
            got, work = self.exchange(flat(rows, p, self.ns_dtype), here, away)
            yield
            work.wait()
            parts = [x for home in unflat(got, away) for x in home]
        if self.replicas > 1:
            sizes = [[self.size(b, self.shard) for b in bank if b.home[0] == i] for i in range(self.replicas)]
            longest = max(map(sum, sizes))
            sent = flat(parts, p, self.ns_dtype)
            sent = F.pad(sent, (0, longest - len(sent)))
            got = sent.new_empty(self.replicas * longest)
            work = all_gather(got, sent, self.across, async_op=True)
            yield
            work.wait()
            parts = [x for row, s in zip(got.split(longest), sizes) for x in unflat(row[:sum(s)], [s])[0]]
        for b, x in zip(bank, parts):
            rows, cols = b.rows, b.p.shape[1]
            scale = 0.2 * max(rows, cols) ** 0.5 if self.scale == "rms" else max(1, rows / cols) ** 0.5
            self.cut(b.p, b).add_(x.view(-1, cols), alpha=-lr * scale)

    def exchange(self, sent, away, here):
        """All-to-all among the shards of a replica. -> what comes, and the work to wait for."""
        got = sent.new_empty(sum(map(sum, here)))
        return got, dist.all_to_all_single(got, sent, [sum(s) for s in here], [sum(s) for s in away], self.within, async_op=True)

    def extent(self, x, whole=False):
        """(start, flat view): this replica's share of the rows of x that this shard holds, or all of them, and where in the
        flattened x it starts. Together the ranks' shares are all of x, once."""
        part = local(x).view(-1)
        start = self.shard * -(-x.shape[0] // self.shards) * x.shape[1:].numel() if hasattr(x, "to_local") else 0
        size = -(-len(part) // self.replicas)
        first = 0 if whole else self.replica * size
        return start + first, part if whole else part[first:first + size]

    def share(self, x):
        return self.extent(x)[1]

    def moments(self, p):
        part, s = self.share(p), self.state[p]
        if not s:
            s.update(step=torch.zeros((), device=part.device), exp_avg=torch.zeros_like(part), exp_avg_sq=torch.zeros_like(part))
        return s

    def adamw(self, params, lr, decay, skip):
        """Each replica updates its share and learns of the others'. With ns_dtype bf16 the changes travel as bf16, half the bytes, as Muon's
        do; then all add what was sent, the owner too, and stay equal to the bit."""
        state, parts = [self.moments(p) for p in params], [self.share(p) for p in params]
        rounded = self.replicas > 1 and self.ns_dtype == torch.bfloat16
        before = [part.clone() for part in parts] if rounded else parts
        adamw(parts, [self.share(p.grad) for p in params], [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state], [],
              [s["step"] for s in state], fused=True, found_inf=skip, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1],
              lr=lr, weight_decay=decay, eps=self.eps, maximize=False)
        if self.replicas > 1:
            sent = torch._foreach_sub(parts, before) if rounded else parts
            if rounded:
                torch._foreach_copy_(parts, before)
            sizes = [-(-local(p).numel() // self.replicas) for p in params]
            sent = torch.cat([F.pad(x.to(self.ns_dtype), (0, size - len(x))) for x, size in zip(sent, sizes)])
            got = sent.new_empty(self.replicas * len(sent))
            all_gather(got, sent, self.across)
            for p, x in zip(params, got.view(self.replicas, -1).split(sizes, 1)):
                whole, x = local(p).view(-1), x.flatten()[:local(p).numel()]
                whole.add_(x) if rounded else whole.copy_(x)

    def segments(self):
        """What this rank keeps of the state: (p, name, start, tensor), where the tensor is entries start, start + 1, ... of the
        flattened state of the whole p. Checkpoints made of these fit any number of ranks. `step` is a number, the same everywhere."""
        for group in self.param_groups:
            for p in group["params"]:
                if group["kind"] == "muon":
                    yield from ((p, "momentum", self.span(b, self.shard)[0] * p.shape[1], m.view(-1)) for b, m in self.averages(p))
                else:
                    yield from ((p, name, self.extent(p)[0] if name != "step" else 0, x.view(-1)) for name, x in self.moments(p).items())


def build(model, o, mesh=None):
    """The optimizer of a model under configs.Optim `o`. Every parameter is in exactly one group."""
    matrices, tables, rest = [], [], []
    for name, p in model.named_parameters(remove_duplicate=False):           # a tied one would appear twice
        path = name.split(".")
        inside = o.name == "muon" and p.ndim == 2 and "blocks" in path and not (o.modulation == "adamw" and path[-2].endswith("modulation"))
        (matrices if inside else tables if p.ndim > 1 else rest).append(p)
    groups = [dict(params=matrices, kind="muon", base_lr=o.lr, decay=o.decay), dict(params=tables, kind="adamw", base_lr=o.adam_lr, decay=o.decay),
              dict(params=rest, kind="adamw", base_lr=o.adam_lr, decay=o.decay * o.decay_all)]
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()}), "every parameter is in exactly one group"
    ns_dtype = torch.float32 if o.ns_dtype == "fp32" else torch.bfloat16
    return Muon([g for g in groups if g["params"]], o.momentum, o.ns, ns_dtype, o.split, o.beta1, o.beta2, o.eps, mesh, o.scale)

"""Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for all else; on one rank or many.

    momentum    m <- mu m + (1 - mu) g
    Nesterov    u  = mu m + (1 - mu) g
    update      w <- (1 - lr decay) w - lr scale NS(u)

NS, the Newton-Schulz iteration, takes a matrix to the nearest orthogonal one, roughly. It needs the whole
matrix, and it is most of the work, so the ranks share the matrices out and each is done once. Matrices of one
shape are stacked into a bank, (n, rows, cols). On many ranks a bank is a DTensor on the mesh of replicas x
shards, and `redistribute` sends it from one of these placements to another:

    Replicate, Shard(1)    as the weights lie: all rows on every rank (ddp) or some on each shard (fsdp, hsdp)
    Replicate, Shard(2)    all rows of some columns: here q, k and v, fused by rows, can be taken apart
    Shard(0), Shard(0)     some whole matrices on each rank: what NS needs
"""
from collections import defaultdict

import torch
from torch.optim.adamw import adamw

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
    """Return what this rank holds of x: all of it, unless x is a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x


class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one, each for its own parameter groups.

    Groups say `kind` ("muon" or "adamw"), `base_lr` and `decay`; the loop sets their `lr` before each step.
    `config` is a configs.Optim, `mesh` a DeviceMesh (replicas, shards), or None on one rank. Parameters are
    tensors, or DTensors sharded by rows, and so is their state. Gradients come averaged over the ranks.
    """

    def __init__(self, groups, config, mesh=None):
        super().__init__([dict(group, lr=group["base_lr"]) for group in groups], {})
        self.config = config
        self.mesh = mesh
        self.replicas, self.shards = mesh.shape if mesh else (1, 1)
        self.ns_dtype = torch.float32 if config.ns_dtype == "fp32" else torch.bfloat16
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if group["kind"] == "muon":
                    state["momentum"] = torch.zeros_like(p)
                else:
                    state["step"] = torch.zeros((), device=p.device)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self, closure=None, skip=None):
        """Update every parameter that has a gradient.

        `skip` is a 0-d float tensor: 1 if the gradient is not finite, and then nothing changes, else 0. It
        stays on the device, where the host need not wait for it. `closure` is not used.
        """
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["kind"] == "muon":
                for bank in self.banks(params):
                    self.muon_step(bank, group["lr"], group["decay"], skip)
            else:
                self.adamw_step(params, group["lr"], group["decay"], skip)

    def pieces(self, p):
        """Return how many matrices p is: q, k and v, say, fused by rows because they share an input."""
        return getattr(p, "pieces", 1) if self.config.split else 1

    def banks(self, params):
        """Return lists of parameters, each list of one shape and one number of pieces: what makes a bank."""
        banks = defaultdict(list)
        for p in params:
            banks[p.shape, self.pieces(p)].append(p)
        return banks.values()

    def muon_step(self, params, lr, decay, skip):
        """Update the matrices of one bank."""
        weights = [local(p) for p in params]
        gradients = [local(p.grad) for p in params]
        momenta = [local(self.state[p]["momentum"]) for p in params]
        gate = 1.0                                          # 0 on a step to skip: then the weights stay
        if skip is not None:
            gate = 1 - skip
            bad = skip > 0
            gradients = [torch.where(bad, m, g) for m, g in zip(momenta, gradients)]    # and the momenta
        torch._foreach_lerp_(momenta, gradients, 1 - self.config.momentum)
        nesterov = torch._foreach_lerp(gradients, momenta, self.config.momentum)

        rows, cols = params[0].shape                        # of all shards together
        height = rows // self.pieces(params[0])
        update = gate * self.orthogonalise(torch.stack(nesterov), rows, height)
        if self.config.scale == "rms":
            scale = 0.2 * max(height, cols) ** 0.5          # an update as large as AdamW's (Liu et al. 2025)
        else:
            scale = max(1, height / cols) ** 0.5            # "spectral" (Jordan et al. 2024)
        if decay:
            torch._foreach_mul_(weights, 1 - lr * decay * gate)
        torch._foreach_add_(weights, update.unbind(), alpha=-lr * scale)

    def orthogonalise(self, bank, rows, height):
        """Orthogonalise the matrices of a bank, each piece of `height` rows on its own.

        `bank` (n, my rows, cols) is what this rank holds of (n, rows, cols). Returns that part of the result.
        """
        n, _, cols = bank.shape
        if self.mesh is None:
            done = newton_schulz(bank.view(-1, height, cols), self.config.ns, self.ns_dtype)
            return done.reshape(n, rows, cols)

        from torch.distributed.tensor import DTensor, Replicate, Shard      # half a second: not on one rank
        bank = DTensor.from_local(
            bank.to(self.ns_dtype), self.mesh, [Replicate(), Shard(1)],
            shape=(n, rows, cols), stride=(rows * cols, cols, 1), run_check=False,
        )
        # Fused matrices are shared out whole if that is even, else in pieces: another all-to-all each way.
        take_apart = rows > height and n % self.mesh.size() > 0
        if take_apart:
            bank = bank.redistribute(placements=[Replicate(), Shard(2)])
            bank = bank.clone()                             # uneven shards left gaps, a view allows none
            bank = bank.view(n * rows // height, height, cols)
        # First each replica keeps some matrices, without a message, then its shards swap rows for matrices.
        # Asked for both at once, DTensor would gather the whole bank on every rank.
        bank = bank.redistribute(placements=[Shard(0), bank.placements[1]])
        bank = bank.redistribute(placements=[Shard(0), Shard(0)])
        mine = bank.to_local()
        done = newton_schulz(mine.reshape(-1, height, cols), self.config.ns, self.ns_dtype)
        mine.copy_(done.reshape(mine.shape))                # in place: now the bank is orthogonal
        if take_apart:
            bank = bank.redistribute(placements=[Replicate(), Shard(2)])
            bank = bank.view(n, rows, cols)
        bank = bank.redistribute(placements=[Replicate(), Shard(1)])
        return bank.to_local()

    def adamw_step(self, params, lr, decay, skip):
        """Update with PyTorch's fused AdamW."""
        states = [self.state[p] for p in params]
        adamw(
            [local(p) for p in params],
            [local(p.grad) for p in params],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [],                                             # max_exp_avg_sqs: AMSGrad's
            [state["step"] for state in states],
            lr=lr, weight_decay=decay,
            beta1=self.config.beta1, beta2=self.config.beta2, eps=self.config.eps,
            amsgrad=False, maximize=False,
            fused=True, found_inf=skip,                     # the fused kernel reads it, and is the fastest
        )


def build(model, config, mesh=None):
    """Return the optimizer of a model under a configs.Optim. Every parameter is in exactly one group."""
    inner = []                                              # matrices of the blocks: Muon's
    outer = []                                              # embeddings, first and last layers
    vectors = []                                            # biases, norms
    for name, p in model.named_parameters(remove_duplicate=False):          # a tied one would appear twice
        in_block = p.ndim == 2 and "blocks" in name.split(".")
        left_out = config.modulation == "adamw" and name.endswith("modulation.weight")
        if config.name == "muon" and in_block and not left_out:
            inner.append(p)
        elif p.ndim > 1:
            outer.append(p)
        else:
            vectors.append(p)
    ids = [id(p) for p in inner + outer + vectors]
    assert len(ids) == len(set(ids)), "every parameter is in exactly one group"
    vector_decay = config.decay if config.decay_all else 0.0
    groups = [
        dict(params=inner, kind="muon", base_lr=config.lr, decay=config.decay),
        dict(params=outer, kind="adamw", base_lr=config.adam_lr, decay=config.decay),
        dict(params=vectors, kind="adamw", base_lr=config.adam_lr, decay=vector_decay),
    ]
    return Muon([group for group in groups if group["params"]], config, mesh)

"""The optimizer: Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for everything else.

    m <- lerp(m, g, 1 - mu);  u = lerp(g, m, mu)                       momentum as an average, Nesterov
    w <- (1 - lr decay) w - lr 0.2 sqrt(max(rows, cols)) NS(u)         (Liu et al. 2025: as large as an AdamW update)

NS is `kernels.newton_schulz`: matrices of one shape go through it as one batch. Rows that were fused because they share an
input (`weight.pieces`, e.g. q, k and v) are different maps, so by default each is orthogonalised on its own.
"""
import torch
from torch.optim.adamw import adamw

from kernels import newton_schulz


class Muon(torch.optim.Optimizer):
    """Groups say `kind` ("muon" or "adamw") and `base_lr`; whoever drives it sets `lr` before each step."""

    def __init__(self, groups, momentum=0.95, ns="quintic", ns_dtype=torch.bfloat16, split=True, beta1=0.9, beta2=0.95, eps=1e-8):
        self.momentum, self.ns, self.ns_dtype, self.split, self.betas, self.eps = momentum, ns, ns_dtype, split, (beta1, beta2), eps
        super().__init__([dict(g, lr=g["base_lr"]) for g in groups], {})

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

    def muon(self, params, lr, decay, skip):
        state = [self.state[p] for p in params]
        for p, s in zip(params, state):
            if not s:
                s["momentum"] = torch.zeros_like(p)
        momentum, grads, go = [s["momentum"] for s in state], [p.grad for p in params], 1.0
        if skip is not None:
            grads, go = [torch.where(skip > 0, m, g) for m, g in zip(momentum, grads)], 1 - skip          # lerp(m, m) = m
        torch._foreach_lerp_(momentum, grads, 1 - self.momentum)
        updates = torch._foreach_lerp(grads, momentum, self.momentum)
        banks = {}                                                                                        # (rows, cols), rows <= cols
        for p, u in zip(params, updates):
            u = u.unflatten(0, (p.pieces if self.split and hasattr(p, "pieces") else 1, -1))              # (pieces, rows, cols)
            banks.setdefault(tuple(sorted(u.shape[1:])), []).append((p, u))
        if decay:
            torch._foreach_mul_(params, 1 - lr * decay * go)
        for shape, bank in banks.items():
            wide = torch.cat([u if u.shape[1] == shape[0] else u.mT for _, u in bank])                    # (n, rows, cols)
            done = newton_schulz(wide, self.ns, self.ns_dtype) * go
            for (p, u), o in zip(bank, done.split([len(u) for _, u in bank])):
                o = o if u.shape[1] == shape[0] else o.mT
                p.add_(o.reshape(p.shape), alpha=-lr * 0.2 * shape[1] ** 0.5)

    def adamw(self, params, lr, decay, skip):
        state = [self.state[p] for p in params]
        for p, s in zip(params, state):
            if not s:
                s.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        adamw(params, [p.grad for p in params], [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state], [],
              [s["step"] for s in state], fused=True, found_inf=skip, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1],
              lr=lr, weight_decay=decay, eps=self.eps, maximize=False)


def build(model, o):
    """The optimizer of a model under configs.Optim `o`. Every parameter is in exactly one group."""
    matrices, tables, rest = [], [], []
    for name, p in model.named_parameters(remove_duplicate=False):           # a tied one would appear twice
        inside = p.ndim == 2 and "blocks" in name.split(".") and o.name == "muon"
        (matrices if inside else tables if p.ndim > 1 else rest).append(p)
    groups = [dict(params=matrices, kind="muon", base_lr=o.lr, decay=o.decay), dict(params=tables, kind="adamw", base_lr=o.adam_lr, decay=o.decay),
              dict(params=rest, kind="adamw", base_lr=o.adam_lr, decay=0.0)]
    grouped = [id(p) for g in groups for p in g["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()}), "every parameter is in exactly one group"
    return Muon([g for g in groups if g["params"]], o.momentum, o.ns, torch.bfloat16, o.split, o.beta1, o.beta2, o.eps)

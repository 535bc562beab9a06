"""The operations that the models and the optimizer are made of, each as the plain PyTorch that defines it.

A fused form, where one is worth its lines, stands beside its definition and is chosen here, nowhere else.

    B batch, N image tokens, K kept image tokens, L text tokens, T keys, C channels, H heads, D head dim
"""
import torch
import torch.nn.functional as F


def wide(x):
    """Statistics, angles and softmax are computed in fp32 at least (float64 stays float64)."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rms_norm(x, weight=None, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) over the last dimension, times `weight`; in fp32."""
    x = wide(x)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight is None else x * weight


def modulate_norm(x, shift, scale, eps=1e-6):
    """adaLN (Peebles & Xie 2022): (1 + scale) LayerNorm(x) + shift, in the dtype of x. x (B, K, C), shift and scale (B, C)."""
    h = F.layer_norm(wide(x), x.shape[-1:], eps=eps)
    return (h * (1 + wide(scale)[:, None]) + wide(shift)[:, None]).to(x.dtype)


def sincos_table(height, width, dim, step=1.0, device=None, dtype=torch.float32):
    """Fixed 2-D positions (N, dim) to add to the tokens: the first half tells the column, the second the row, each [sin, cos]
    (the order of DiT and PixArt). Neighbours are `step` apart. Computed in float64."""
    omega = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=device) / (dim // 4))        # (dim / 4,)
    rows, cols = torch.meshgrid(*(step * torch.arange(n, dtype=torch.float64, device=device) for n in (height, width)), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (cols, rows)]                                       # (N, dim / 4) each
    return torch.cat([f for a in angles for f in (a.sin(), a.cos())], -1).to(dtype)


def rope_table(height, width, dim, theta=10_000.0, device=None, dtype=torch.float32):
    """Angles of 2-axis RoPE for a grid of tokens, as (N, dim / 2, 2) holding [cos, sin]: the first half of the pairs turns
    with the row, the second with the column. Computed in float64."""
    omega = theta ** -(torch.arange(0, dim // 2, 2, dtype=torch.float64, device=device) / (dim // 2))     # (dim / 4,)
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float64, device=device) for n in (height, width)), indexing="ij")
    angle = torch.cat([rows.reshape(-1, 1) * omega, cols.reshape(-1, 1) * omega], -1)                     # (N, dim / 2)
    return torch.stack([angle.cos(), angle.sin()], -1).to(dtype)


def rope(x, table):
    """Turn the pairs (x_2i, x_2i+1) by the angles of `table`. x (B, H, K, D), table (K, D / 2, 2) or (B, 1, K, D / 2, 2)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def norm_rope(x, weight, table, dtype):
    """Per-head RMS norm, then RoPE, of queries or keys, in fp32; returned as `dtype`."""
    return rope(rms_norm(x, weight), table).to(dtype)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v. q (B, H, K, D), k and v (B, H, T, D), mask (B, T) bool, true = attend.

    On CPU the plain form serves the short sequences of the small recipes, where the backward of PyTorch's own is slow in
    bf16; elsewhere, and for long ones, memory matters and PyTorch's own it is."""
    if q.device.type == "cpu" and k.shape[2] <= 192:
        score = wide(q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5                                       # (B, H, K, T)
        if mask is not None:
            score = score.masked_fill(~mask[:, None, None], -torch.inf)
        return score.softmax(-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None])


def geglu(gate_up):
    """GELU(gate) * up (Shazeer 2020), tanh form. gate_up (..., 2 M) -> (..., M)."""
    gate, up = gate_up.chunk(2, -1)
    return gelu(gate) * up


def gelu(x):
    """GELU, tanh form."""
    return F.gelu(x, approximate="tanh")


def keep_tokens(batch, tokens, keep, generator):
    """Which tokens stay: K = round(keep N) of them at random per sample, in ascending order. -> (B, K) int64.

    The argsort stays out of compiled code: on ROCm it becomes a very slow kernel there."""
    noise = torch.rand(batch, tokens, generator=generator, device=generator.device)
    return noise.argsort(1)[:, :max(1, round(keep * tokens))].sort(1).values


def gather_tokens(x, ids):
    """x (B, N, C), ids (B, K) -> (B, K, C)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def scatter_tokens(full, x, ids):
    """`full` (B, N, C) with the tokens `ids` (B, K) replaced by x (B, K, C)."""
    return full.scatter(1, ids[..., None].expand(-1, -1, x.shape[-1]), x)


def on_tokens(f, x, slots):
    """`f`, a map of each token by itself, on the tokens of x (B, L, C) that the flat indices slots (T,) name, each once; the
    others become zeros. None: on all of them. Captions differ in length: this is how none is spent on their padding."""
    if slots is None:
        return f(x)
    y = f(x.flatten(0, 1)[slots])                                                                         # (T, .)
    return y.new_zeros(x.shape[0] * x.shape[1], y.shape[1]).index_copy(0, slots, y).unflatten(0, x.shape[:2])


def text_slots(mask, multiple=8):
    """The flat indices of the true entries of mask (B, L), on the CPU, then as many others as make their number a multiple of
    multiple x B: few shapes, so few compiled graphs. -> (T,) int64"""
    unit = multiple * len(mask)
    return (~mask.flatten()).to(torch.uint8).argsort(stable=True)[:-(-max(1, int(mask.sum())) // unit) * unit]


# Five steps of X <- a X + (b A + c A A) X, A = X X^T. Quintic: Keller Jordan's fixed polynomial, singular values end in
# about [0.68, 1.13]. Polar: Polar Express (Amsel et al. 2025), the best polynomial for each step, safety factor 1.02.
NEWTON_SCHULZ = {
    "quintic": [(3.4445, -4.7750, 2.0315)] * 5,
    "polar": [(8.156554524902461, -22.48329292557795, 15.878769915207462),
              (4.042929935166739, -2.808917465908714, 0.5000178451051316),
              (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
              (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
              (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)],
}


def newton_schulz(g, kind="quintic", dtype=torch.bfloat16):
    """The nearest (semi-)orthogonal matrix to each of a batch, roughly. g (n, rows, cols) -> the same shape, in `dtype`."""
    x = g.to(dtype)
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT                                                                                          # the smaller Gram matrix
    norm = x.norm(dim=(1, 2), keepdim=True)
    x = x / (norm + 1e-7 if kind == "quintic" else norm * 1.02 + 1e-6)
    for a, b, c in NEWTON_SCHULZ[kind]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x

"""The operations that the models are made of, each as the plain PyTorch that defines it.

A fused form, where one is worth its lines, stands beside its definition and is chosen here, nowhere else. So far none is:
`torch.compile` fuses them block by block.

    python kernels.py                       # microseconds, GB/s or TFLOP/s and error of each, eager and compiled, on this machine

    B batch, N image tokens, K kept image tokens, L text tokens, T keys, C channels, H heads, D head dim
"""
import math

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


def exact(device):
    """Where float64 can be computed for a device: on itself, unless it is Apple's, which has none."""
    return "cpu" if device is not None and torch.device(device).type == "mps" else device


def sincos_table(height, width, dim, step=1.0, device=None, dtype=torch.float32):
    """Fixed 2-D positions (N, dim) to add to the tokens: the first half tells the column, the second the row, each [sin, cos]
    (the order of DiT and PixArt). Neighbours are `step` apart. Computed in float64."""
    omega = 10_000.0 ** -(torch.arange(dim // 4, dtype=torch.float64, device=exact(device)) / (dim // 4))      # (dim / 4,)
    rows, cols = torch.meshgrid(*(step * torch.arange(n, dtype=torch.float64, device=exact(device)) for n in (height, width)), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (cols, rows)]                                       # (N, dim / 4) each
    return torch.cat([f for a in angles for f in (a.sin(), a.cos())], -1).to(device, dtype)


def rope_table(height, width, dim, theta=10_000.0, device=None, dtype=torch.float32):
    """Angles of 2-axis RoPE for a grid of tokens, as (N, dim / 2, 2) holding [cos, sin]: the first half of the pairs turns
    with the row, the second with the column. Computed in float64."""
    omega = theta ** -(torch.arange(0, dim // 2, 2, dtype=torch.float64, device=exact(device)) / (dim // 2))   # (dim / 4,)
    rows, cols = torch.meshgrid(*(torch.arange(n, dtype=torch.float64, device=exact(device)) for n in (height, width)), indexing="ij")
    angle = torch.cat([rows.reshape(-1, 1) * omega, cols.reshape(-1, 1) * omega], -1)                     # (N, dim / 2)
    return torch.stack([angle.cos(), angle.sin()], -1).to(device, dtype)


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


# ------------------------------------------------------------------------------------------------------------------
# How fast, and how exact

def cases(big, device, dtype):
    """[(name, function, inputs, how many of the first have a gradient, FLOPs of the forward or 0)]: shapes of a routed block of prx_512; small on CPU."""
    b, n, k, l, h, d, m = (32, 256, 128, 80, 28, 64, 6272) if big else (8, 64, 32, 16, 4, 64, 896)
    c, t = h * d, k + l
    rand = lambda *shape: torch.randn(shape, device=device, dtype=dtype)
    ids = torch.rand(b, n, device=device).argsort(1)[:, :k].sort(1).values
    side = int(n ** 0.5)
    table = rope_table(side, side, d, device=device)[ids].unsqueeze(1)                                    # (B, 1, K, D / 2, 2)
    mask = torch.arange(t, device=device) >= torch.arange(b, device=device)[:, None] % l                  # (B, T): some text is padding
    return [
        ("modulate_norm", modulate_norm, (rand(b, k, c), rand(b, c), rand(b, c)), 3, 0),
        ("gated residual", lambda x, gate, y: x + gate[:, None] * y, (rand(b, k, c), rand(b, c), rand(b, k, c)), 3, 0),
        ("norm_rope", lambda x, w, table: norm_rope(x, w, table, x.dtype), (rand(b, h, k, d), torch.ones(d, device=device, dtype=dtype), table), 2, 0),
        ("geglu", geglu, (rand(b, k, 2 * m),), 1, 0),
        ("gather_tokens", gather_tokens, (rand(b, n, c), ids), 1, 0),
        ("scatter_tokens", scatter_tokens, (rand(b, n, c), rand(b, k, c), ids), 2, 0),
        ("attention, no mask", attention, (rand(b, h, k, d), rand(b, h, t, d), rand(b, h, t, d)), 3, 4 * b * h * k * t * d),
        ("attention, mask", attention, (rand(b, h, k, d), rand(b, h, t, d), rand(b, h, t, d), mask), 3, 4 * b * h * k * t * d),
    ]


def main():
    import argparse
    import torch.utils.benchmark as benchmark
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    args = parser.parse_args()
    device, dtype, big = torch.device(args.device), getattr(torch, args.dtype), args.device.startswith("cuda")
    median = lambda f: benchmark.Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()).adaptive_autorange(max_run_time=1).median
    side, long = (8192, 2 ** 28) if big else (1024, 2 ** 24)
    a, line = torch.randn(side, side, device=device, dtype=dtype), torch.empty(long, device=device, dtype=torch.uint8)
    peak, copy = 2 * side ** 3 / median(lambda: a @ a), 2 * long / median(lambda: line.clone())
    print(f"{torch.cuda.get_device_name(device) if big else 'CPU'}, torch {torch.__version__}, {args.dtype}: "
          f"a matrix product reaches {peak / 1e12:.2f} TFLOP/s, a copy {copy / 1e9:.1f} GB/s\n")
    print(f"{'':20}{'eager us':>10}{'compiled':>10}{'of peak':>9}  {'with backward':>14}{'compiled':>10}   error of both, beside float64's")
    for name, f, inputs, grads, work in cases(big, device, dtype):
        torch.compiler.reset()
        x = [v.requires_grad_(i < grads) for i, v in enumerate(inputs)]
        moved = sum(v.numel() * v.itemsize for v in (*inputs, f(*inputs)))
        exact = f(*(v.detach().double() if v.is_floating_point() else v for v in inputs))
        both = (f, torch.compile(f, dynamic=False))
        error = [((g(*inputs).double() - exact).norm() / exact.norm()).item() for g in both]

        def backward(g):
            out = g(*inputs)
            torch.autograd.grad(out, x[:grads], out.detach())

        def forward(g):
            with torch.no_grad():
                g(*inputs)
        once = [median(lambda: forward(g)) for g in both]                                                 # noqa: B023 (called at once)
        twice = [median(lambda: backward(g)) for g in both] if grads else [math.nan] * 2                   # noqa: B023
        share = work / once[1] / peak if work else moved / once[1] / copy
        print(f"{name:20}{1e6 * once[0]:10.1f}{1e6 * once[1]:10.1f}{share:9.0%}  {1e6 * twice[0]:14.1f}{1e6 * twice[1]:10.1f}   {error[0]:.1e}  {error[1]:.1e}")


if __name__ == "__main__":
    main()

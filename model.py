"""The denoiser: PRX (Photoroom), with token routing (TREAD, lazy masking), a tap for REPA, and a small text transformer.

    B batch, N image tokens, K kept image tokens, L text tokens, C channels, H heads, D head dim, P patch size

The model knows neither what t means nor what it predicts (flow.py does), and draws nothing at random: which tokens are
kept comes in as `keep_ids`. Weights are fp32 masters; every product runs in `dtype`, statistics and angles in fp32.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from configs import Config
from kernels import attention, gather_tokens, geglu, modulate_norm, norm_rope, rms_norm, rope_table, scatter_tokens, sincos_table


class Linear(nn.Linear):
    """Casts its fp32 master weight to the dtype of its input: what autocast does, where one can see it."""

    def __init__(self, fan_in, fan_out, bias=True, pieces=1):
        super().__init__(fan_in, fan_out, bias)
        self.weight.pieces = pieces                                # matrices fused by rows because they share an input: see muon.py

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def patchify(x, patch):
    """(B, c, H, W) -> (B, N, c P P): tokens row by row, features channel-major."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch * patch)


def unpatchify(x, patch, height, width):
    """(B, N, c P P) -> (B, c, height, width), the inverse of `patchify`."""
    b, rows, cols = x.shape[0], height // patch, width // patch
    x = x.reshape(b, rows, cols, -1, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, height, width)


def timestep_embedding(t, dim=256):
    """[cos, sin] of 1000 t at geometric frequencies from 1 to 1/10000, in fp32. t (B,) in [0, 1] -> (B, dim)."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2, dtype=torch.float32, device=t.device) / (dim // 2))
    angle = 1000 * (t.float()[:, None] * freqs)
    return torch.cat([angle.cos(), angle.sin()], -1)


class MLPEmbedder(nn.Module):
    def __init__(self, fan_in, width):
        super().__init__()
        self.in_layer, self.out_layer = Linear(fan_in, width), Linear(width, width)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


def split_heads(x, parts, heads):
    """(B, T, parts H D) -> `parts` tensors (B, H, T, D)."""
    return x.unflatten(-1, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def merge_heads(x):
    """(B, H, T, D) -> (B, T, H D)."""
    return x.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Queries from the image; keys and values from text and image. The text itself is never updated."""

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        hidden, dim = int(width * mlp_ratio), width // heads
        self.heads = heads
        self.modulation = Linear(width, 6 * width, pieces=6)
        self.qkv = Linear(width, 3 * width, bias=False, pieces=3)
        self.txt_kv = Linear(width, 2 * width, bias=False, pieces=2)
        self.q_norm, self.k_norm, self.txt_k_norm = (nn.Parameter(torch.ones(dim)) for _ in range(3))
        self.attn_out = Linear(width, width, bias=False)
        self.mlp_in = Linear(width, 2 * hidden, bias=False, pieces=2)                   # rows: gate, then up
        self.mlp_out = Linear(hidden, width, bias=False)

    def text_kv(self, text):
        """text (B, L, C) -> keys and values (B, H, L, D). They do not depend on t: a sampler computes them once."""
        k, v = split_heads(self.txt_kv(text), 2, self.heads)
        return rms_norm(k, self.txt_k_norm).to(v.dtype), v

    def forward(self, x, vec, text, mask, table):
        """x (B, K, C), vec = silu(time embedding) (B, C), text (B, L, C) or what `text_kv` made of it, mask (B, L + K) or
        None, table the RoPE angles of the K tokens. -> (B, K, C)"""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vec).chunk(6, -1)                  # (B, C) each
        q, k, v = split_heads(self.qkv(modulate_norm(x, shift1, scale1)), 3, self.heads)                  # (B, H, K, D)
        q, k = norm_rope(q, self.q_norm, table, v.dtype), norm_rope(k, self.k_norm, table, v.dtype)
        txt_k, txt_v = text if isinstance(text, tuple) else self.text_kv(text)
        out = attention(q, torch.cat([txt_k, k], 2), torch.cat([txt_v, v], 2), mask)                      # (B, H, K, D)
        x = x + gate1[:, None] * self.attn_out(merge_heads(out))
        return x + gate2[:, None] * self.mlp_out(geglu(self.mlp_in(modulate_norm(x, shift2, scale2))))


class TextBlock(nn.Module):
    """A pre-norm transformer block over text; padding is masked."""

    def __init__(self, width, heads, mlp_ratio=2.0):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads = heads
        self.norm1, self.norm2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.qkv = Linear(width, 3 * width, bias=False, pieces=3)
        self.attn_out = Linear(width, width, bias=False)
        self.mlp_in = Linear(width, 2 * hidden, bias=False, pieces=2)
        self.mlp_out = Linear(hidden, width, bias=False)

    def forward(self, x, mask):
        q, k, v = split_heads(self.qkv(rms_norm(x, self.norm1).to(x.dtype)), 3, self.heads)               # (B, H, L, D)
        x = x + self.attn_out(merge_heads(attention(q, k, v, mask)))
        return x + self.mlp_out(geglu(self.mlp_in(rms_norm(x, self.norm2).to(x.dtype))))


class TextTransformer(nn.Module):
    """Token ids (B, L) -> states (B, L, width): the small text encoder that is trained with the denoiser."""

    def __init__(self, c):
        super().__init__()
        self.embed = nn.Embedding(c.vocab, c.width)
        self.position = nn.Parameter(torch.randn(c.length, c.width) * 0.1)
        self.blocks = nn.ModuleList(TextBlock(c.width, c.heads) for _ in range(c.depth))
        self.norm = nn.Parameter(torch.ones(c.width))

    def forward(self, ids, mask, dtype):
        x = (self.embed(ids) + self.position[:ids.shape[1]]).to(dtype)                                    # (B, L, width)
        for block in self.blocks:
            x = block(x, mask)
        return rms_norm(x, self.norm).to(dtype)


class Final(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.modulation, self.linear = Linear(width, 2 * width), Linear(width, out)

    def forward(self, x, vec):
        return self.linear(modulate_norm(x, *self.modulation(vec).chunk(2, -1)))


class PRX(nn.Module):
    """Photoroom's denoiser at any size. With text.encoder "bpe" our own text transformer is part of it; else it reads states
    of width text.dim. `align_dim`: width of the REPA teacher's tokens, 0 = no projector."""

    def __init__(self, c: Config, align_dim=0, dtype=torch.float32):
        super().__init__()
        m, width = c.model, c.model.width
        self.patch, self.route, self.tap, self.absolute, self.dtype = m.patch, m.route, c.align.block, m.absolute, dtype
        self.checkpointing, self.grid, self.held = c.train.checkpointing, None, None
        pixels = m.channels * m.patch ** 2
        own = c.text.encoder == "bpe"
        self.text = TextTransformer(c.text) if own else None
        self.img_in = Linear(pixels, width) if not m.bottleneck else nn.Sequential(
            Linear(pixels, m.bottleneck), Linear(m.bottleneck, width))
        self.txt_in = Linear(c.text.width if own else c.text.dim, width)
        self.time_in = MLPEmbedder(256, width)
        self.blocks = nn.ModuleList(Block(width, m.heads, m.mlp_ratio) for _ in range(m.depth))
        self.final = Final(width, pixels)
        for linear in (*(b.modulation for b in self.blocks), self.final.modulation, self.final.linear):
            nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)     # every block starts as the identity, the output as 0
        # The projector of REPA (Yu et al. 2024) or iREPA (arXiv 2512.10794): fp32, thrown away after training.
        self.align = None if not align_dim else nn.Conv2d(width, align_dim, 3, padding=1) if c.align.conv else nn.Sequential(
            nn.Linear(width, c.align.hidden), nn.SiLU(), nn.Linear(c.align.hidden, c.align.hidden), nn.SiLU(), nn.Linear(c.align.hidden, align_dim))

    def positions(self, rows, cols, device):
        """Of the grid, made once: RoPE angles (N, D / 2, 2) fp32, and what is added to the tokens, (N, C) or 0."""
        key = (rows, cols, device)
        if self.grid != key:
            added = sincos_table(rows, cols, self.txt_in.out_features, device) if self.absolute else 0
            self.grid, self.held = key, (rope_table(rows, cols, self.blocks[0].q_norm.shape[0], device=device), added)
        return self.held

    def read(self, text, mask):
        """Token ids (B, L) or a frozen encoder's states (B, L, .) -> what the blocks attend to, (B, L, C)."""
        return self.txt_in(self.text(text, mask, self.dtype) if self.text else text.to(self.dtype))

    def text_kv(self, text, mask):
        """`read`, and every block's keys and values of it: a sampler computes them once, not at every step."""
        text = self.read(text, mask)
        return [block.text_kv(text) for block in self.blocks]

    def project(self, x, keep_ids, rows, cols):
        """The REPA head on tokens x (B, N or K, C). For a convolution, kept tokens lie on their places in a grid of zeros."""
        x = x.float()
        if not isinstance(self.align, nn.Conv2d):
            return self.align(x)
        routed = x.shape[1] < rows * cols
        if routed:
            x = scatter_tokens(x.new_zeros(len(x), rows * cols, x.shape[2]), x, keep_ids)                 # (B, N, C)
        x = self.align(x.mT.unflatten(2, (rows, cols))).flatten(2).mT                                     # (B, N, D of the teacher)
        return gather_tokens(x, keep_ids) if routed else x

    def forward(self, z, t, text, mask, keep_ids=None):
        """z (B, c, H, W) noisy image, t (B,) in [0, 1], text: token ids (B, L), states (B, L, .) or what `text_kv` returned,
        mask (B, L) bool or None (no padding), keep_ids (B, K) ascending: route these tokens; None: dense.
        -> tokens of the prediction (B, N, c P P), or (B, K, c P P) under lazy masking, fp32 for a bf16 model; and the
        REPA head's reading of the tokens after block `tap`, (B, N or K, D of the teacher), None without a head."""
        rows, cols = z.shape[2] // self.patch, z.shape[3] // self.patch
        table, added = self.positions(rows, cols, z.device)
        x = (self.img_in(patchify(z, self.patch).to(self.dtype)) + added).to(self.dtype)                  # (B, N, C)
        vec = F.silu(self.time_in(timestep_embedding(t).to(self.dtype)))                                  # (B, C)
        kv = text if isinstance(text, list) else [self.read(text, mask)] * len(self.blocks)
        see = lambda tokens: None if mask is None else F.pad(mask, (0, tokens), value=True)               # (B, L + tokens)
        dense = (see(x.shape[1]), table)
        if keep_ids is not None:
            kept = (see(keep_ids.shape[1]), table[keep_ids].unsqueeze(1))                                 # (B, 1, K, D / 2, 2)
        now, tapped = dense, None
        for i, block in enumerate(self.blocks):
            if keep_ids is not None and i == self.route.start:
                full, now = x, kept
                x = gather_tokens(x, keep_ids)                                                            # (B, K, C)
            if self.checkpointing and self.training:
                x = checkpoint(block, x, vec, kv[i], *now, use_reentrant=False)
            else:
                x = block(x, vec, kv[i], *now)
            if i == self.tap and self.align:
                tapped = self.project(x, keep_ids, rows, cols)
            if keep_ids is not None and i == self.route.end:                                              # never, if end is None
                x, now = scatter_tokens(full, x, keep_ids), dense                                         # (B, N, C)
        return self.final(x, vec).to(torch.promote_types(x.dtype, torch.float32)), tapped


def count(model):
    """Parameters of the denoiser: without our own text transformer and the REPA projector."""
    return sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("text.", "align.")))


def flops(c: Config, text_tokens, routed=True):
    """FLOPs of one image's forward (twice the multiply-adds of the matrix products), `text_tokens` real ones; a training
    step costs three times that. Routed blocks count only the tokens they see."""
    m, width = c.model, c.model.width
    n, hidden, pixels = (m.size // m.patch) ** 2, int(width * m.mlp_ratio), m.channels * m.patch ** 2
    kept = max(1, round(m.route.keep * n)) if m.route and routed else n
    last = m.depth - 1 if m.route is None or m.route.end is None else m.route.end
    start = m.route.start if m.route else m.depth
    total = n * (pixels * m.bottleneck + m.bottleneck * width if m.bottleneck else pixels * width)
    total += 256 * width + width * width                                                                  # time
    own = c.text.encoder == "bpe"
    if own:
        w, h = c.text.width, 2 * c.text.width
        total += text_tokens * c.text.depth * (4 * w * w + 3 * w * h + 2 * w * text_tokens)
    total += text_tokens * (c.text.width if own else c.text.dim) * width
    for i in range(m.depth):
        k = kept if start <= i <= last else n
        total += k * (4 * width * width + 3 * width * hidden) + text_tokens * 2 * width * width + 6 * width * width
        total += 2 * k * (k + text_tokens) * width
    out = kept if m.route and routed and m.route.end is None else n
    return 2 * (total + out * width * pixels + 2 * width * width)

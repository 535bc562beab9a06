"""The denoiser: PRX (Photoroom), DiT or MMDiT (AMD Nitro-T), with token routing (TREAD, lazy masking), a tap for REPA, and a
small text transformer. One forward for all; they differ in their blocks and in how text and time come in.

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
from kernels import attention, gather_tokens, geglu, gelu, modulate_norm, norm_rope, on_tokens, rms_norm, rope_table, scatter_tokens, sincos_table


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


def beside(mask, tokens):
    """Mask of the text (B, L), or none -> of text and image (B, L + tokens): the image is always attended to."""
    return None if mask is None else F.pad(mask, (0, tokens), value=True)


# ------------------------------------------------------------------------------------------------------------------
# Blocks: block(x, vec, text, mask, table, slots) -> x, and the text too where it changes
#
#     x (B, K, C); vec: what conditions on time; text (B, L, C); mask (B, L) bool or none (no padding); table: RoPE angles of
#     the K tokens or none; slots (T,): which of the B L text tokens are real, for work that need not be done on padding

class Block(nn.Module):
    """PRX. Queries from the image; keys and values from text and image. The text itself is never updated."""

    def __init__(self, m, index):
        super().__init__()
        width, hidden, dim = m.width, int(m.width * m.mlp_ratio), m.width // m.heads
        self.heads = m.heads
        self.modulation = Linear(width, 6 * width, pieces=6)
        self.qkv = Linear(width, 3 * width, bias=False, pieces=3)
        self.txt_kv = Linear(width, 2 * width, bias=False, pieces=2)
        self.q_norm, self.k_norm, self.txt_k_norm = (nn.Parameter(torch.ones(dim)) for _ in range(3))
        self.attn_out = Linear(width, width, bias=False)
        self.mlp_in = Linear(width, 2 * hidden, bias=False, pieces=2)                   # rows: gate, then up
        self.mlp_out = Linear(hidden, width, bias=False)

    def zero(self):
        """What is zero at first, so that the block is the identity."""
        return [*self.modulation.parameters()]

    def text_kv(self, text, slots=None):
        """text (B, L, C) -> keys and values (B, H, L, D). They do not depend on t: a sampler computes them once."""
        k, v = split_heads(on_tokens(self.txt_kv, text, slots), 2, self.heads)
        return rms_norm(k, self.txt_k_norm).to(v.dtype), v

    def forward(self, x, vec, text, mask, table, slots=None):
        """vec = silu(time embedding) (B, C); `text` may be what `text_kv` made of it."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vec).chunk(6, -1)                  # (B, C) each
        q, k, v = split_heads(self.qkv(modulate_norm(x, shift1, scale1)), 3, self.heads)                  # (B, H, K, D)
        q, k = norm_rope(q, self.q_norm, table, v.dtype), norm_rope(k, self.k_norm, table, v.dtype)
        txt_k, txt_v = text if isinstance(text, tuple) else self.text_kv(text, slots)
        out = attention(q, torch.cat([txt_k, k], 2), torch.cat([txt_v, v], 2), beside(mask, x.shape[1]))  # (B, H, K, D)
        x = x + gate1[:, None] * self.attn_out(merge_heads(out))
        return x + gate2[:, None] * self.mlp_out(geglu(self.mlp_in(modulate_norm(x, shift2, scale2))))


class DiTBlock(nn.Module):
    """PixArt (Chen et al. 2023), as in Nitro-T-0.6B: self-attention; cross-attention to the text, without a norm or a gate; MLP.
    One modulation of time serves all blocks, each of which adds its own constants."""

    def __init__(self, m, index):
        super().__init__()
        width, hidden = m.width, int(m.width * m.mlp_ratio)
        self.heads = m.heads
        self.table = nn.Parameter(torch.randn(6 * width) / width ** 0.5)
        self.qkv, self.attn_out = Linear(width, 3 * width, pieces=3), Linear(width, width)
        self.cross_q, self.txt_kv, self.cross_out = Linear(width, width), Linear(width, 2 * width, pieces=2), Linear(width, width)
        self.mlp_in, self.mlp_out = Linear(width, hidden), Linear(hidden, width)

    def zero(self):
        return [self.table, *self.cross_out.parameters()]

    def text_kv(self, text, slots=None):
        return split_heads(on_tokens(self.txt_kv, text, slots), 2, self.heads)

    def forward(self, x, vec, text, mask, table=None, slots=None):
        """vec: the modulation of time (B, 6 C); `text` may be what `text_kv` made of it."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (vec + self.table.to(vec.dtype)).chunk(6, -1)      # (B, C) each
        q, k, v = split_heads(self.qkv(modulate_norm(x, shift1, scale1)), 3, self.heads)                  # (B, H, K, D)
        x = x + gate1[:, None] * self.attn_out(merge_heads(attention(q, k, v)))
        q, (k, v) = split_heads(self.cross_q(x), 1, self.heads)[0], text if isinstance(text, tuple) else self.text_kv(text, slots)
        x = x + self.cross_out(merge_heads(attention(q, k, v, mask)))
        return x + gate2[:, None] * self.mlp_out(gelu(self.mlp_in(modulate_norm(x, shift2, scale2))))


class MMDiTBlock(nn.Module):
    """SD3.5 (Esser et al. 2024), as in Nitro-T-1.2B: text and image each have their own weights and attend to both. The first
    `dual` blocks have a second attention, of the image to itself; the last needs no text afterwards."""

    def __init__(self, m, index):
        super().__init__()
        width, hidden, dim = m.width, int(m.width * m.mlp_ratio), m.width // m.heads
        self.heads, self.dual, self.last = m.heads, index < m.dual, index == m.depth - 1
        parts = 9 if self.dual else 6
        self.modulation = Linear(width, parts * width, pieces=parts)
        self.qkv, self.attn_out = Linear(width, 3 * width, pieces=3), Linear(width, width)
        self.q_norm, self.k_norm, self.txt_q_norm, self.txt_k_norm = (nn.Parameter(torch.ones(dim)) for _ in range(4))
        self.mlp_in, self.mlp_out = Linear(width, hidden), Linear(hidden, width)
        if self.dual:
            self.qkv2, self.attn2_out = Linear(width, 3 * width, pieces=3), Linear(width, width)
            self.q2_norm, self.k2_norm = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        parts = 2 if self.last else 6
        self.txt_modulation, self.txt_qkv = Linear(width, parts * width, pieces=parts), Linear(width, 3 * width, pieces=3)
        if not self.last:
            self.txt_out, self.txt_mlp_in, self.txt_mlp_out = Linear(width, width), Linear(width, hidden), Linear(hidden, width)

    def zero(self):
        return [*self.modulation.parameters(), *self.txt_modulation.parameters()]

    def heads_of(self, qkv, q_norm, k_norm):
        """(B, T, 3 C) -> queries, keys (both RMS-normed per head), values: (B, H, T, D) each."""
        q, k, v = split_heads(qkv, 3, self.heads)
        return rms_norm(q, q_norm).to(v.dtype), rms_norm(k, k_norm).to(v.dtype), v

    def forward(self, x, vec, text, mask, table=None, slots=None):
        """vec = silu(time embedding) (B, C). -> x, text. The tokens stand as [text, image]: for attention their order is one."""
        shift1, scale1, gate1, shift2, scale2, gate2, *second = self.modulation(vec).chunk(9 if self.dual else 6, -1)      # (B, C) each
        txt_shift1, txt_scale1, *txt = self.txt_modulation(vec).chunk(2 if self.last else 6, -1)
        q, k, v = self.heads_of(self.qkv(modulate_norm(x, shift1, scale1)), self.q_norm, self.k_norm)
        txt_qkv = on_tokens(self.txt_qkv, modulate_norm(text, txt_shift1, txt_scale1), slots)             # (B, L, 3 C)
        txt_q, txt_k, txt_v = self.heads_of(txt_qkv, self.txt_q_norm, self.txt_k_norm)
        length = 0 if self.last else text.shape[1]                                                        # the last text queries ask for nothing
        out = attention(torch.cat([txt_q[:, :, :length], q], 2), torch.cat([txt_k, k], 2), torch.cat([txt_v, v], 2), beside(mask, x.shape[1]))
        out = merge_heads(out)                                                                            # (B, L + K, C)
        if self.dual:
            own = attention(*self.heads_of(self.qkv2(modulate_norm(x, second[0], second[1])), self.q2_norm, self.k2_norm))
        x = x + gate1[:, None] * self.attn_out(out[:, length:])
        if self.dual:
            x = x + second[2][:, None] * self.attn2_out(merge_heads(own))
        x = x + gate2[:, None] * self.mlp_out(gelu(self.mlp_in(modulate_norm(x, shift2, scale2))))
        if self.last:
            return x, text
        txt_gate1, txt_shift2, txt_scale2, txt_gate2 = txt
        text = text + txt_gate1[:, None] * on_tokens(self.txt_out, out[:, :length], slots)
        mlp = lambda h: self.txt_mlp_out(gelu(self.txt_mlp_in(h)))
        return x, text + txt_gate2[:, None] * on_tokens(mlp, modulate_norm(text, txt_shift2, txt_scale2), slots)


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


# ------------------------------------------------------------------------------------------------------------------

class Final(nn.Module):
    """Modulated norm, then a linear map. DiT adds constants to the time embedding where the others have a linear map of it."""

    def __init__(self, width, out, table):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * width) / width ** 0.5) if table else None
        self.modulation = None if table else Linear(width, 2 * width)
        self.linear = Linear(width, out)

    def forward(self, x, time):
        both = self.modulation(F.silu(time)) if self.table is None else torch.cat([time, time], -1) + self.table.to(time.dtype)
        return self.linear(modulate_norm(x, *both.chunk(2, -1)))                                          # shift, scale


class Denoiser(nn.Module):
    """model.kind: prx, dit or mmdit, at any size. With text.encoder "bpe" our own text transformer is part of it; else it reads
    states of width text.dim. `align_dim`: width of the REPA teacher's tokens, 0 = no projector."""

    def __init__(self, c: Config, align_dim=0, dtype=torch.float32):
        super().__init__()
        m, width = c.model, c.model.width
        self.patch, self.route, self.tap, self.dtype, self.pad = m.patch, m.route, c.align.block, dtype, c.text.pad
        self.checkpointing, self.grid, self.held = c.train.checkpointing, None, None
        self.rope = width // m.heads if m.kind == "prx" else 0
        self.absolute, self.span = m.absolute or m.kind != "prx", m.span
        pixels = m.channels * m.patch ** 2
        own = c.text.encoder == "bpe"
        text_dim = c.text.width if own else c.text.dim
        self.text = TextTransformer(c.text) if own else None
        self.img_in = Linear(pixels, width) if not m.bottleneck else nn.Sequential(
            Linear(pixels, m.bottleneck), Linear(m.bottleneck, width))
        self.txt_in = Linear(text_dim, width) if m.kind != "dit" else nn.Sequential(
            Linear(text_dim, width), nn.GELU("tanh"), Linear(width, width))
        self.txt_norm = None if m.kind == "prx" else nn.Parameter(torch.full((width,), 0.01))             # Sana's: text comes in softly
        self.time_in = MLPEmbedder(256, width)
        self.modulation = Linear(width, 6 * width) if m.kind == "dit" else None                           # adaLN-single
        kind = {"prx": Block, "dit": DiTBlock, "mmdit": MMDiTBlock}[m.kind]
        self.blocks = nn.ModuleList(kind(m, i) for i in range(m.depth))
        self.final = Final(width, pixels, table=m.kind == "dit")
        if m.zero:                                                         # every block starts as the identity, the output as 0
            shared = self.modulation.parameters() if self.modulation else ()
            for p in (*(p for block in self.blocks for p in block.zero()), *shared, *self.final.parameters()):
                nn.init.zeros_(p)
        # The projector of REPA (Yu et al. 2024) or iREPA (arXiv 2512.10794): fp32, thrown away after training.
        self.align = None if not align_dim else nn.Conv2d(width, align_dim, 3, padding=1) if c.align.conv else nn.Sequential(
            nn.Linear(width, c.align.hidden), nn.SiLU(), nn.Linear(c.align.hidden, c.align.hidden), nn.SiLU(), nn.Linear(c.align.hidden, align_dim))

    def positions(self, rows, cols, device):
        """Of the grid, made once: RoPE angles (N, D / 2, 2) fp32 or none, and what is added to the tokens, (N, C) or 0.

        `span` stretches the added ones: a finer grid fills the same square (Nitro-T's "interpolation")."""
        key = (rows, cols, device)
        if self.grid != key:
            step = self.span / math.sqrt(rows * cols) if self.span else 1.0
            added = sincos_table(rows, cols, self.time_in.out_layer.out_features, step, device=device) if self.absolute else 0
            self.grid, self.held = key, (rope_table(rows, cols, self.rope, device=device) if self.rope else None, added)
        return self.held

    def read(self, text, mask, slots=None):
        """Token ids (B, L) or a frozen encoder's states (B, L, .) -> what the blocks attend to, (B, L, C)."""
        text = on_tokens(self.txt_in, self.text(text, mask, self.dtype) if self.text else text.to(self.dtype), slots)
        return text if self.txt_norm is None else rms_norm(text, self.txt_norm, eps=1e-5).to(self.dtype)

    def text_kv(self, text, mask):
        """What of the text does not depend on t, for a sampler to compute once: every block's keys and values of it; of an
        MMDiT, whose text changes from block to block, only `read`."""
        text = self.read(text, mask)
        return [text] if hasattr(self.blocks[0], "txt_qkv") else [block.text_kv(text) for block in self.blocks]

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

    def forward(self, z, t, text, mask, keep_ids=None, slots=None):
        """z (B, c, H, W) noisy image, t (B,) in [0, 1], text: token ids (B, L), states (B, L, .) or what `text_kv` returned,
        mask (B, L) bool or None (no padding), keep_ids (B, K) ascending: route these tokens; None: dense; slots (T,): see
        `kernels.on_tokens`.
        -> tokens of the prediction (B, N, c P P), or (B, K, c P P) under lazy masking, fp32 for a bf16 model; and the
        REPA head's reading of the tokens after block `tap`, (B, N or K, D of the teacher), None without a head."""
        rows, cols = z.shape[2] // self.patch, z.shape[3] // self.patch
        table, added = self.positions(rows, cols, z.device)
        x = (self.img_in(patchify(z, self.patch).to(self.dtype)) + added).to(self.dtype)                  # (B, N, C)
        time = self.time_in(timestep_embedding(t).to(self.dtype))                                         # (B, C)
        vec = F.silu(time) if self.modulation is None else self.modulation(F.silu(time))                  # (B, C) or (B, 6 C)
        known = text if isinstance(text, list) else [self.read(text, mask, slots)]
        mask = None if self.pad else mask
        now, tapped = table, None
        for i, block in enumerate(self.blocks):
            if keep_ids is not None and i == self.route.start:
                full, x = x, gather_tokens(x, keep_ids)                                                   # (B, K, C)
                now = table[keep_ids].unsqueeze(1) if self.rope else None                                 # (B, 1, K, D / 2, 2)
            text = known[i] if i < len(known) else text
            if self.checkpointing and self.training:
                x = checkpoint(block, x, vec, text, mask, now, slots, use_reentrant=False)
            else:
                x = block(x, vec, text, mask, now, slots)
            x, text = x if isinstance(x, tuple) else (x, text)
            if i == self.tap and self.align:
                tapped = self.project(x, keep_ids, rows, cols)
            if keep_ids is not None and i == self.route.end:                                              # never, if end is None
                x, now = scatter_tokens(full, x, keep_ids), table                                         # (B, N, C)
        return self.final(x, time).to(torch.promote_types(x.dtype, torch.float32)), tapped


def count(model):
    """Parameters of the denoiser: without our own text transformer and the REPA projector."""
    return sum(p.numel() for n, p in model.named_parameters() if not n.startswith(("text.", "align.")))


def flops(c: Config, text_tokens, routed=True):
    """FLOPs of one image's forward (twice the multiply-adds of the matrix products), `text_tokens` real ones; a training
    step costs three times that. Routed blocks count only the tokens they see."""
    m, w, l, own = c.model, c.model.width, text_tokens, c.text.encoder == "bpe"
    n, hidden, pixels, text_dim = c.side ** 2, int(w * m.mlp_ratio), m.channels * m.patch ** 2, c.text.width if own else c.text.dim
    kept = max(1, round(m.route.keep * n)) if m.route and routed else n
    last = m.depth - 1 if m.route is None or m.route.end is None else m.route.end
    start = m.route.start if m.route else m.depth
    total = n * (pixels * m.bottleneck + m.bottleneck * w if m.bottleneck else pixels * w)
    total += 256 * w + w * w + (6 * w * w if m.kind == "dit" else 0)                                      # time
    total += c.text.depth * l * (10 * text_dim ** 2 + 2 * text_dim * l) if own else 0
    total += l * (text_dim * w + (w * w if m.kind == "dit" else 0))
    for i in range(m.depth):
        k, end, dual = kept if start <= i <= last else n, i == m.depth - 1, i < m.dual
        if m.kind == "prx":
            total += 6 * w * w + k * (4 * w * w + 3 * w * hidden + 2 * (k + l) * w) + l * 2 * w * w
        elif m.kind == "dit":
            total += k * (6 * w * w + 2 * w * hidden + 2 * (k + l) * w) + l * 2 * w * w
        else:
            total += (9 if dual else 6) * w * w + k * (4 * w * w + 2 * w * hidden) + (k * (4 * w * w + 2 * k * w) if dual else 0)
            total += (2 if end else 6) * w * w + l * (3 * w * w if end else 4 * w * w + 2 * w * hidden)
            total += 2 * (k if end else k + l) * (k + l) * w
    out = kept if m.route and routed and m.route.end is None else n
    return 2 * (total + out * w * pixels + (0 if m.kind == "dit" else 2 * w * w))

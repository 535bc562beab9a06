"""A training step (forward, backward, AdamW) of our denoiser beside diffusers' transformer of the same shape, on the same data, in
turn in one process.

    python tests/bench_diffusers.py                       # --width=256 --depth=8 --heads=4 --batch=32 --tokens=64 --text=32 --repeats=5
    python tests/bench_diffusers.py --kind=dit            # beside PixArt; --kind=mmdit: beside SD3, half of the blocks dual
    python tests/bench_diffusers.py --width=1792 --depth=16 --heads=28 --tokens=256 --text=256                     # prx_512, on a GPU
    python tests/bench_diffusers.py --kind=dit --width=1152 --depth=28 --heads=16 --tokens=256 --text=256          # nitro_512
    python tests/bench_diffusers.py --kind=mmdit --width=1152 --depth=24 --heads=18 --tokens=256 --text=256        # nitro_1024

diffusers: dense, all text tokens real. Ours: dense on the same input; and routed (half of the tokens: prx by TREAD in all but the first
and last block, the others masked after two) with captions of real length (a fifth to a half of the tokens, padding masked and cut).
Both bf16 where the machine has it (diffusers under autocast, its usual way), both with compiled blocks. Medians, the ratio of each round.
"""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.path.insert(0, str(Path(__file__).parent.parent))

import argparse
import statistics
import time
from dataclasses import replace

import torch
from diffusers import PixArtTransformer2DModel, PRXTransformer2DModel, SD3Transformer2DModel

import configs
import kernels
import muon
from model import Denoiser, patchify, unpatchify
from pretrained import compute_dtype
from train import keep_memory, wait


def peer(a, m):
    """diffusers' model, and what to call it with: z, t, text, mask -> (B, c, H, W)."""
    common = dict(sample_size=m.size, patch_size=m.patch, in_channels=m.channels, out_channels=m.channels, num_layers=a.depth,
                  num_attention_heads=a.heads, attention_head_dim=a.width // a.heads)
    if a.kind == "prx":
        net = PRXTransformer2DModel(in_channels=m.channels, patch_size=m.patch, context_in_dim=a.width, hidden_size=a.width, mlp_ratio=m.mlp_ratio,
                                    num_heads=a.heads, depth=a.depth, axes_dim=[a.width // a.heads // 2] * 2)
        return net, net.blocks, lambda z, t, text, mask: net(z, t, text, attention_mask=mask, return_dict=False)[0]
    if a.kind == "dit":
        net = PixArtTransformer2DModel(cross_attention_dim=a.width, caption_channels=a.width, norm_type="ada_norm_single", norm_eps=1e-6,
                                       activation_fn="gelu-approximate", attention_bias=True, use_additional_conditions=False, **common)
        return net, net.transformer_blocks, lambda z, t, text, mask: net(
            z, encoder_hidden_states=text, timestep=1000 * t, encoder_attention_mask=mask, return_dict=False)[0]
    net = SD3Transformer2DModel(joint_attention_dim=a.width, caption_projection_dim=a.width, pooled_projection_dim=8, pos_embed_max_size=m.size // m.patch,
                                dual_attention_layers=tuple(range(m.dual)), qk_norm="rms_norm", **common)
    pooled = torch.zeros(a.batch, 8)
    return net, net.transformer_blocks, lambda z, t, text, mask: net(
        z, encoder_hidden_states=text, pooled_projections=pooled.to(z), timestep=1000 * t, return_dict=False)[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="prx", choices=("prx", "dit", "mmdit"))
    for name, default in dict(width=256, depth=8, heads=4, batch=32, tokens=64, text=32, repeats=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, pixels = int(a.tokens ** 0.5), a.kind == "prx"
    patch, size = (8, 8 * side) if pixels else (1, side)
    route = configs.Route(1, a.depth - 2, 0.5) if pixels else configs.Route(2, None, 0.5)
    c = replace(configs.emoji, text=configs.Text(encoder="frozen", dim=a.width), optim=configs.Optim(name="adamw", adam_lr=1e-4), model=configs.Model(
        kind=a.kind, size=size, patch=patch, channels=3 if pixels else 32, width=a.width, depth=a.depth, heads=a.heads, mlp_ratio=3.5 if pixels else 4.0,
        dual=a.depth // 2 * (a.kind == "mmdit"), span=0.0 if pixels else 16.0, route=route))
    dtype = compute_dtype(c, device)
    torch.manual_seed(0)
    theirs, blocks, call = peer(a, c.model)
    theirs, ours = theirs.to(device).train(), Denoiser(c, dtype=dtype).to(device).train()
    for p in (*theirs.parameters(), *ours.parameters()):                        # not zero: gradients must flow everywhere
        torch.nn.init.normal_(p, std=0.02)
    for block in [*blocks, *ours.blocks]:
        block.compile(dynamic=False)
    keep_memory(device)
    optimizers = {theirs: torch.optim.AdamW(theirs.parameters(), 1e-4, fused=True), ours: muon.build(ours, c.optim)}
    z, t = torch.randn(a.batch, c.model.channels, size, size, device=device), torch.rand(a.batch, device=device)
    text = torch.randn(a.batch, a.text, a.width, device=device)
    all_real = torch.ones(a.batch, a.text, dtype=torch.bool, device=device)
    lengths = torch.randint(a.text // 5, a.text // 2 + 1, (a.batch, 1))
    lengths[0] = a.text // 2
    longest = -(-int(lengths.max()) // 8) * 8
    real = torch.arange(longest) < lengths
    cut, slots, real = text[:, :longest], kernels.text_slots(real).to(device), real.to(device)
    target = torch.randn_like(z)
    tokens, generator = patchify(target, patch), torch.Generator(device).manual_seed(0)

    def diffusers_dense():
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            out = call(z, t, text, all_real)
        return (out.float() - target).square().mean()

    def ours_dense():
        return (unpatchify(ours(z, t, text, None)[0], patch, size, size) - target).square().mean()

    def ours_routed():
        keep_ids = kernels.keep_tokens(a.batch, a.tokens, 0.5, generator)
        out = ours(z, t, cut, real, keep_ids, slots)[0]
        return (out - (tokens if out.shape[1] == a.tokens else kernels.gather_tokens(tokens, keep_ids))).square().mean()

    def seconds(loss):
        wait(device)
        begin = time.perf_counter()
        loss().backward()
        model = theirs if loss is diffusers_dense else ours
        optimizers[model].step()
        wait(device)
        elapsed = time.perf_counter() - begin
        model.zero_grad()
        return elapsed

    cases = (diffusers_dense, ours_dense, ours_routed)
    for case in cases:                                                          # compile
        for _ in range(3):
            seconds(case)
    rounds = [[min(seconds(case) for _ in range(4)) for case in cases] for _ in range(a.repeats)]
    print(f"{a.kind}, width {a.width}, depth {a.depth}, {a.tokens} image tokens, {a.text} text tokens, batch {a.batch}, {str(dtype)[6:]}, {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {a.repeats} rounds, best of 4 in each; "
          f"parameters, theirs and ours: {', '.join(f'{sum(p.numel() for p in m.parameters()) / 1e6:.1f}M' for m in (theirs, ours))}")
    for i, case in enumerate(cases):
        ratios = [r[0] / r[i] for r in rounds]
        print(f"{case.__name__:16} {1000 * statistics.median(r[i] for r in rounds):8.1f} ms   {statistics.median(ratios):.2f} times as fast as diffusers "
              f"({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()

"""A training step (forward and backward) of our denoiser beside diffusers.PRXTransformer2DModel: same shapes, same data,
alternating in one process.

    python tests/bench_diffusers.py [--width=256 --depth=8 --batch=32 --text=32 --repeats=5]

diffusers: dense, all text tokens real. Ours: dense on the same input; and routed (half of the tokens in all but the first and
last block) with captions of real length (a fifth to a half of the tokens, padding masked and cut). Both bf16 where the machine
has it (diffusers under autocast, its usual way), both with compiled blocks. Prints medians and the ratio of each round.
"""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parent.parent))

import argparse
import statistics
import time
from dataclasses import replace

import torch
from diffusers import PRXTransformer2DModel

import configs
import kernels
from model import Denoiser, patchify
from pretrained import compute_dtype, from_released
from train import wait


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(width=256, depth=8, heads=4, batch=32, tokens=64, text=32, repeats=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side, patch = int(a.tokens ** 0.5), 8
    c = replace(configs.emoji, text=configs.Text(encoder="frozen", dim=a.width), model=configs.Model(
        size=side * patch, patch=patch, width=a.width, depth=a.depth, heads=a.heads, route=configs.Route(1, a.depth - 2, 0.5)))
    dtype = compute_dtype(c, device)
    theirs = PRXTransformer2DModel(in_channels=3, patch_size=patch, context_in_dim=a.width, hidden_size=a.width, mlp_ratio=3.5, num_heads=a.heads,
                                   depth=a.depth, axes_dim=[a.width // a.heads // 2] * 2).to(device).train()
    torch.manual_seed(0)
    for p in theirs.parameters():                                               # not zero: gradients must flow everywhere
        torch.nn.init.normal_(p, std=0.02)
    ours = Denoiser(c, dtype=dtype).to(device)
    ours.load_state_dict(from_released("prx", theirs.state_dict()))
    for block in [*theirs.blocks, *ours.blocks]:
        block.compile(dynamic=False)
    size = side * patch
    z, t = torch.randn(a.batch, 3, size, size, device=device), torch.rand(a.batch, device=device)
    text = torch.randn(a.batch, a.text, a.width, device=device)
    all_real = torch.ones(a.batch, a.text, dtype=torch.bool, device=device)
    lengths = torch.randint(a.text // 5, a.text // 2 + 1, (a.batch, 1), device=device)
    lengths[0] = a.text // 2
    longest = -(-int(lengths.max()) // 8) * 8
    cut, real = text[:, :longest], (torch.arange(longest, device=device) < lengths)
    target = torch.randn_like(z)
    tokens, generator = patchify(target, patch), torch.Generator(device).manual_seed(0)

    def diffusers_dense():
        with torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16):
            out = theirs(z, t, text, attention_mask=all_real, return_dict=False)[0]
        return (out.float() - target).square().mean()

    def ours_dense():
        return (ours(z, t, text, None)[0] - tokens).square().mean()

    def ours_routed():
        return (ours(z, t, cut, real, kernels.keep_tokens(a.batch, a.tokens, 0.5, generator))[0] - tokens).square().mean()

    def seconds(loss):
        wait(device)
        begin = time.perf_counter()
        loss().backward()
        wait(device)
        elapsed = time.perf_counter() - begin
        for model in (theirs, ours):
            model.zero_grad()
        return elapsed

    cases = (diffusers_dense, ours_dense, ours_routed)
    for case in cases:                                                          # compile
        for _ in range(3):
            seconds(case)
    rounds = [[min(seconds(case) for _ in range(4)) for case in cases] for _ in range(a.repeats)]
    print(f"width {a.width}, depth {a.depth}, {a.tokens} image tokens, {a.text} text tokens, batch {a.batch}, {str(dtype)[6:]}, {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {a.repeats} rounds, best of 4 in each")
    for i, case in enumerate(cases):
        ratios = [r[0] / r[i] for r in rounds]
        print(f"{case.__name__:16} {1000 * statistics.median(r[i] for r in rounds):8.1f} ms   {statistics.median(ratios):.2f} times as fast as diffusers "
              f"({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()

"""What lazy masking and real-length text are worth: a training step (forward and backward) of the DiT and the MMDiT, alternating
in one process between

    dense       all image tokens; text cut to the longest caption, and of it only the real tokens computed: as our batches are
    masked      the same, with half of the image tokens after the first eighth of the blocks
    padded      masked, but all 256 text tokens computed and attended to, as AMD's MMDiT does

    python tests/bench_nitro.py [--width=256 --depth=8 --batch=8 --tokens=256 --text=256 --mean=80 --repeats=5]

Captions are 0.5 to 1.5 times `mean` tokens long. Prints medians, ratios of each round, and FLOPs by PyTorch's counter.
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
from torch.utils.flop_counter import FlopCounterMode

import configs
import kernels
from model import Denoiser
from pretrained import compute_dtype
from train import wait


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(width=256, depth=8, heads=4, batch=8, tokens=256, text=256, mean=80, repeats=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator, side = torch.Generator().manual_seed(0), int(a.tokens ** 0.5)
    z, t = torch.randn(a.batch, 32, side, side, generator=generator).to(device), torch.rand(a.batch, generator=generator).to(device)
    text = torch.randn(a.batch, a.text, a.width, generator=generator).to(device)
    lengths = torch.linspace(0.5 * a.mean, 1.5 * a.mean, a.batch).round().long()[:, None]
    mask = torch.arange(-(-int(lengths.max()) // 8) * 8) < lengths
    slots, keep_ids = kernels.text_slots(mask).to(device), kernels.keep_tokens(a.batch, a.tokens, 0.5, generator).to(device)
    mask = mask.to(device)
    torch._dynamo.config.recompile_limit = 64                                   # three kinds of blocks by three shapes
    for kind in ("dit", "mmdit"):
        c = replace(configs.nitro_512, text=configs.Text(encoder="frozen", dim=a.width, length=a.text), model=replace(
            configs.nitro_512.model, kind=kind, size=32 * side, width=a.width, depth=a.depth, heads=a.heads, dual=a.depth // 2 if kind == "mmdit" else 0,
            route=configs.Route(max(1, a.depth // 8), None, 0.5)))
        dtype = compute_dtype(c, device)
        model = Denoiser(c, dtype=dtype).to(device)
        with torch.no_grad():                                                   # not zero: gradients must flow everywhere
            for p in model.parameters():
                p.normal_(std=0.02)
        cases = {"dense": (mask, None, slots), "masked": (mask, keep_ids, slots), "padded": (None, keep_ids, None)}

        def step(see, keep_ids, slots, model=model):
            model.zero_grad()
            wait(device)
            begin = time.perf_counter()
            model(z, t, text if see is None else text[:, :see.shape[1]], see, keep_ids, slots)[0].square().mean().backward()
            wait(device)
            return time.perf_counter() - begin

        flops = {}
        for name, case in cases.items():                                        # without storage: the counter misses a form of attention on CPU
            see, *rest = (None if x is None else x.to("meta") for x in case)
            with torch.device("meta"), FlopCounterMode(display=False) as counter:
                shadow = Denoiser(c, dtype=dtype)
                shadow(z.to("meta"), t.to("meta"), (text if see is None else text[:, :see.shape[1]]).to("meta"), see, *rest)[0].sum().backward()
            flops[name] = counter.get_total_flops() / a.batch / 1e9
        for block in model.blocks:
            block.compile(dynamic=False)
        for case in cases.values():
            for _ in range(3):
                step(*case)
        rounds = [{name: min(step(*case) for _ in range(3)) for name, case in cases.items()} for _ in range(a.repeats)]
        print(f"{kind}: width {a.width}, depth {a.depth}, {a.tokens} tokens, captions of {lengths.float().mean():.0f} of {a.text} tokens, batch {a.batch}, "
              f"{str(dtype)[6:]}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {a.repeats} rounds, best of 3 in each")
        for name in cases:
            ratios = [r["dense"] / r[name] for r in rounds]
            print(f"  {name:8} {1000 * statistics.median(r[name] for r in rounds):8.1f} ms   {flops[name]:7.2f} GFLOP an image   "
                  f"{statistics.median(ratios):.2f} times as fast as dense ({min(ratios):.2f} to {max(ratios):.2f})")
        ratios = [r["masked"] / r["padded"] for r in rounds]
        print(f"  masked costs {flops['masked'] / flops['padded']:.1%} of the FLOPs of padded, {statistics.median(ratios):.1%} of its time "
              f"({min(ratios):.1%} to {max(ratios):.1%})")


if __name__ == "__main__":
    main()

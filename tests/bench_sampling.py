"""Pictures per second of a recipe's sampler: random weights, text states made beforehand, no autoencoder; eager and compiled blocks in turn.

    python tests/bench_sampling.py                                                        # emoji, batch 32, its own steps and guidance
    python tests/bench_sampling.py --config=nitro_512 --steps=20 --guidance=4             # on a GPU
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
from tqdm import tqdm

import configs
import sample
import train
from cluster import blocks_of
from model import Denoiser
from pretrained import compute_dtype


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="emoji", choices=configs.recipes)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--repeats", type=int, default=5)
    a = parser.parse_args()
    c = configs.recipes[a.config]
    c = replace(c, sample=replace(c.sample, steps=a.steps or c.sample.steps, guidance=a.guidance or c.sample.guidance))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device(device):
        models = {"eager": Denoiser(c, dtype=compute_dtype(c, device)).eval(), "compiled": Denoiser(c, dtype=compute_dtype(c, device)).eval()}
    for block in blocks_of(models["compiled"]):
        block.compile(dynamic=None if device.type == "cuda" else False)
    train.keep_memory(device)
    length = c.text.length // 2                                                 # captions of ordinary length
    tokenize = lambda texts: (torch.zeros(len(texts), length, dtype=torch.int64), torch.ones(len(texts), length, dtype=torch.bool))
    states = torch.randn(a.batch + 1, length, c.text.dim, device=device)
    encode = None if c.text.encoder == "bpe" else lambda ids, mask: states[:len(ids)]
    prompts, seeds, side = [""] * a.batch, list(range(a.batch)), c.model.size // c.latent.factor
    found = {name: [] for name in models}
    for number in tqdm(range(a.repeats + 1), desc=c.name, leave=False):         # the first warms up
        for name, model in models.items():
            begin = time.perf_counter()
            sample.draw(model, c, tokenize, encode, prompts, seeds, None, side)
            train.wait(device)
            found[name] += [a.batch / (time.perf_counter() - begin)] * (number > 0)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{c.name}: {where}, torch {torch.__version__}, {str(models['eager'].dtype)[6:]}, batch {a.batch}, {c.sample.steps} steps of {c.sample.sampler}, "
          f"guidance {c.sample.guidance:g}, {c.model.size} pixels, {a.repeats} rounds")
    for name, rates in found.items():
        print(f"  {name:10} {statistics.median(rates):8.2f} pictures/s ({min(rates):.2f} to {max(rates):.2f})")


if __name__ == "__main__":
    main()

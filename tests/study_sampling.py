"""Quality against network evaluations: samplers, guidance, its interval, on a checkpoint of the built-in set. -> a table, a picture.

    python tests/study_sampling.py --checkpoint=runs/emoji                       # --n=109 --calls=4,6,8,12,20,30,50 --out=out/sampling

Held-out captions, the same noise for every row. Two distances, root mean square in grey levels: to the real picture (what a user
sees), and to where the same guidance ends with 200 steps of Heun (what the sampler loses). CFG doubles the rows of an evaluation; a row counts it as one.
"""
import json, sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from tqdm import tqdm

import data, sample

SAMPLERS = "euler", "heun", "multistep"


def guides(c):
    """{name: what it changes in the config's sampling}"""
    g = c.sample.guidance if c.sample.guidance != 1 else 1.5
    cfg = dict(guide="cfg", lo=0.0, hi=1.0)
    found = {"no guidance": cfg | dict(guidance=1.0), f"CFG {g:g}": cfg | dict(guidance=g), f"CFG {2 * g:g}": cfg | dict(guidance=2 * g),
             f"CFG {2 * g:g}, t from 0.3 to 0.9": cfg | dict(guidance=2 * g, lo=0.3, hi=0.9)}
    return found | ({f"self {g:g}": cfg | dict(guidance=g, guide="self")} if c.model.route and c.model.route.end is not None else {})


def draw(rows, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    main = next(r["guide"] for r in rows if r["guide"].startswith("CFG"))
    for ax, key, title, by, fixed in ((axes[0], "to the solution", f"lost by the sampler, {main}", "sampler", ("guide", main)),
                                      (axes[1], "to the real picture", "distance to the real picture, multistep", "guide", ("sampler", "multistep"))):
        for name in dict.fromkeys(r[by] for r in rows):
            which = [r for r in rows if r[by] == name and r[fixed[0]] == fixed[1]]
            ax.plot([r["calls"] for r in which], [r[key] for r in which], marker="o", markersize=3, label=name)
        ax.set(xscale="log", xlabel="network evaluations", ylabel="grey levels", title=title)
        ax.set_xticks(ticks := sorted({r["calls"] for r in rows if r["sampler"] == "multistep"}), ticks)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    axes[0].set_yscale("log")
    figure.savefig(path, dpi=100)


@torch.no_grad()
def main():
    parser = sample.options(__doc__)
    parser.add_argument("--n", type=int, default=109)
    parser.add_argument("--calls", default="4,6,8,12,20,30,50")
    parser.add_argument("--out", default="out/sampling", type=Path)
    args = parser.parse_args()
    path, model, c, tokenize, encode, vae = sample.open_checkpoint(args)
    val = data.load(c)[1].emoji
    pairs = val.pairs[:args.n]
    real = torch.from_numpy(np.stack([val.render(*pair) for pair in pairs])).float()
    seeds = list(range(len(pairs)))

    def pictures(**change):
        now = replace(c, sample=replace(c.sample, **change))
        return sample.generate(model, now, tokenize, encode, [val.caption(*pair) for pair in pairs], seeds, vae=vae).float()
    away = lambda a, b: (a - b).square().mean((1, 2, 3)).sqrt().mean().item()

    rows = []
    for guide, change in tqdm(guides(c).items()):
        solution = pictures(**change, sampler="heun", steps=200)
        for sampler in SAMPLERS:
            for calls in map(int, args.calls.split(",")):
                steps = (calls + 1) // 2 if sampler == "heun" else calls                       # Heun: two an step, one in the last
                x = pictures(**change, sampler=sampler, steps=steps)
                rows.append({"guide": guide, "sampler": sampler, "calls": 2 * steps - 1 if sampler == "heun" else steps, "to the real picture": away(x, real),
                             "to the solution": away(x, solution)})
                tqdm.write(json.dumps(rows[-1]))
        tqdm.write(json.dumps({"guide": guide, "the solution to the real picture": away(solution, real)}))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "sampling.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(rows, args.out / "sampling.png")
    print(f"{path}: {len(pairs)} held-out captions\n{args.out / 'sampling.png'}")


if __name__ == "__main__":
    main()

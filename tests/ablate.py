"""What each trick does to the `emoji` recipe: the same seconds for each, or the same images, several seeds. -> a line per run in OUT/runs.jsonl, a table.

    python tests/make_dinov2.py out/dinov2                       # a real teacher for REPA: see there what to install
    python tests/ablate.py --teacher=out/dinov2                  # --images=25600 --seeds=0,1,2 --only="TREAD,AdamW 1e-3" --out=out/ablation

Equal time is by images: the steps of all variants are timed in turn (`train.py --bench`, OUT/rates.json), and each sees as many images
as fit into the seconds that the recipe takes for --images. So other work on the machine, which slows a run, gives nobody fewer images;
the rates want a quiet one. --equal=images: all see --images. --jobs at once share the cores. What was run before is not run again.
The picture wants matplotlib.
"""
import argparse, collections, json, os, statistics, subprocess, sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
TEACHER = "--align.block=2 --align.layer=9 --align.hidden=512 --teacher="
ADAMW, PRX = "--optim.name=adamw --optim.adam_lr=1e-3", "--model.route=1,4,0.5 --perceptual.effnet=yes " + TEACHER
VARIANTS = {                                                                        # each a change of the recipe: x-prediction, Muon, dense
    "recipe": "",
    "v, AdamW 1e-3": "--flow.prediction=v " + ADAMW,                                # the plain baseline
    "v-prediction": "--flow.prediction=v",
    "AdamW 1e-3": ADAMW,
    "AdamW 2e-3": "--optim.name=adamw",
    "Muon for adaLN too": "--optim.modulation=muon",
    "Muon, fused matrices whole": "--optim.split=no",
    "Muon, spectral scale": "--optim.scale=spectral --optim.lr=5.5e-3",             # as large as the recipe's on a square matrix
    "TREAD": "--model.route=1,4,0.5",
    "TREAD, keep 0.75": "--model.route=1,4,0.75",
    "TREAD, v": "--flow.prediction=v --model.route=1,4,0.5",
    "masking, two mixer blocks": "--model.route=2,none,0.5",
    "masking, no mixer": "--model.route=0,none,0.5",
    "shift 3": "--flow.shift=3",
    "no EMA": "--optim.ema=0",
    "REPA": TEACHER,
    "iREPA": "--align.conv=yes --align.norm=0.8 " + TEACHER,
    "perceptual": "--perceptual.effnet=yes",
    "nitro: DiT, v, AdamW 1e-3, masking": "--model.kind=dit --flow.prediction=v --model.route=2,none,0.5 " + ADAMW,
    "nitro, dense": "--model.kind=dit --flow.prediction=v " + ADAMW,
    "nitro, Muon": "--model.kind=dit --flow.prediction=v --model.route=2,none,0.5",
    "prx: TREAD, REPA, perceptual": PRX,
    "prx, no TREAD": "--perceptual.effnet=yes " + TEACHER,
    "prx, no REPA": "--model.route=1,4,0.5 --perceptual.effnet=yes",
    "prx, no perceptual": "--model.route=1,4,0.5 " + TEACHER,
    "prx, AdamW 1e-3": ADAMW + " " + PRX,
    "prx, v": "--flow.prediction=v " + PRX,
}


def call(*command, **variables):
    done = subprocess.run([sys.executable, *command], cwd=HERE, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **variables})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def rates(options, path, rounds=2):
    """Images/s of every variant: the median of `rounds` timings in turn."""
    known = json.loads(path.read_text()) if path.exists() else {}
    if missing := [name for name in options if name not in known]:
        found = collections.defaultdict(list)
        for name in tqdm(["recipe", *missing] * rounds, desc="rates"):
            bench = call("train.py", "--bench=emoji", *options[name].split())
            found[name].append(json.loads(bench.splitlines()[-1])["img_s"])
        scale = known.get("recipe", found["recipe"])                                # a later timing counts against the first recipe's
        scale = statistics.median(scale) / statistics.median(found["recipe"])
        known |= {name: [scale * r for r in values] for name, values in found.items() if name not in known}
        path.write_text(json.dumps(known, indent=1))
    return {name: statistics.median(known[name]) for name in options}


def run(folder, options, images, seed, threads):
    threads = {"OMP_NUM_THREADS": str(threads)}
    call("train.py", "--config=emoji", *options.split(), f"--seed={seed}", f"--train.images={images}", f"--out={folder}", "--train.eval_every=0",
         "--train.save_every=0", **threads)
    call("evaluate.py", f"--checkpoint={folder}", "--n=109", "--steps=10", f"--out={folder}/evaluation.json", **threads)
    found = json.loads((folder / "evaluation.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    scores = {f"{key} {which}": found["retrieval"][which][key] for which in ("seen", "heldout") for key in ("emoji top-1", "emoji top-5")}
    return {"loss": found["loss"]["loss"], **scores, "minutes": max(line.get("minutes", 0) for line in log)}


SHOWN = {"validation loss": ("loss", 1, 4), "seen, top-1 %": ("emoji top-1 seen", 100, 0), "held out, top-1 %": ("emoji top-1 heldout", 100, 0)}


def groups(rows):
    """{(variant, equal): its rows}, in the order of VARIANTS, those of equal time first."""
    found = collections.defaultdict(list)
    for row in sorted(rows, key=lambda r: (r["equal"] != "time", r["equal"], list(VARIANTS).index(r["variant"]))):
        found[row["variant"], row["equal"]].append(row)
    return found


def table(rows):
    print(f"| | images | {' | '.join(SHOWN)} | n |\n{'|---' * (len(SHOWN) + 3)}|")
    for (name, equal), group in groups(rows).items():
        values = [[scale * row[key] for row in group] for key, scale, _ in SHOWN.values()]
        cells = [f"{statistics.mean(v):.{d}f} ({min(v):.{d}f} to {max(v):.{d}f})" for v, (*_, d) in zip(values, SHOWN.values())]
        print(f"| {name}{'' if equal == 'time' else f', {equal}'} | {group[0]['images']:,} | {' | '.join(cells)} | {len(group)} |")


def draw(rows, path):
    """A dot for each run, a bar for the mean of its variant."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = list(groups(rows).items())[::-1]
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(10, 0.4 * len(found) + 1), sharey=True, layout="constrained")
    for ax, (title, (key, scale, _)) in zip(axes, SHOWN.items()):
        values = [[scale * row[key] for row in group] for _, group in found]
        ax.barh(range(len(found)), [statistics.mean(v) for v in values], color=["#9db4c6" if equal == "time" else "#dddddd" for (_, equal), _ in found])
        ax.plot([x for v in values for x in v], [i for i, v in enumerate(values) for _ in v], "o", color="#c2261d", markersize=4)
        ax.set(title=title, yticks=range(len(found)), yticklabels=[name if equal == "time" else f"{name}, {equal}" for (name, equal), _ in found])
        ax.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=25_600)
    parser.add_argument("--equal", default="time", choices=("time", "images"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="variants, parted by semicolons")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--teacher", default="out/dinov2")
    parser.add_argument("--out", default="out/ablation", type=Path)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    options = {name: text + args.teacher * text.endswith("--teacher=") for name, text in VARIANTS.items()}
    if args.only:
        options = {name: text for name, text in options.items() if name in ("recipe", *args.only.split(";"))}
    speed = rates(options, out / "rates.json") if args.equal == "time" else dict.fromkeys(options, 1)
    fit = {name: int(args.images * speed[name] / speed["recipe"]) // 64 * 64 for name in options}
    equal = "time" if args.equal == "time" else f"{args.images:,} images"
    path = out / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    plan = [(name, equal, seed) for name in options for seed in map(int, args.seeds.split(","))]
    plan = [p for p in plan if not any((r["variant"], r["equal"], r["seed"]) == p for r in done)]

    def one(task):
        name, equal, seed = task
        folder = out / "".join(ch if ch.isalnum() or ch in ".-" else "_" for ch in f"{name}_{equal}_{seed}")
        return {"variant": name, "equal": equal, "seed": seed, "images": fit[name],
                **run(folder, options[name], fit[name], seed, max(1, os.cpu_count() // args.jobs))}
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in tqdm(as_completed(pool.submit(one, task) for task in plan), total=len(plan), desc="runs"):
            done.append(future.result())
            with path.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    table(done)
    draw(done, out / "ablation.png")


if __name__ == "__main__":
    main()

"""What each trick does to the `emoji` recipe, dense and on its 135 drawings of food, in the same seconds and per image, several seeds.
-> a line per run in OUT/runs.jsonl, a table, a picture.

    python tests/make_dinov2.py out/dinov2                       # a real teacher for REPA: see there what to install
    python tests/ablate.py --teacher=out/dinov2                  # --images=13440 --seeds=0,1,2 --only="TREAD;AdamW 1e-3" --out=out/ablation

Equal time is by images: the steps of all variants are timed in turn (`train.py --bench`, the quickest step, OUT/rates.json), and each
sees as many images as fit into the seconds that "dense" takes for --images. So other work on the machine, which slows a run, gives
nobody fewer images; the rates want a quiet one. Equal images: "dense" is run whole at several budgets, and beside each variant stands what
the line through those gives at its number of images. --jobs at once share the cores. What was run before is not run again.
The picture wants matplotlib.
"""
import argparse, collections, json, math, os, statistics, subprocess, sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent
TEACHER = "--align.block=2 --align.layer=9 --align.hidden=512 --teacher="
ADAMW, PRX = "--optim.name=adamw --optim.adam_lr=1e-3", "--model.route=1,4,0.5 --perceptual.effnet=yes " + TEACHER
BASE = "--data.subset=food --model.route=none --model.dense_end=0 "                 # 135 drawings: twice as far in the same time
VARIANTS = {                                                                        # each a change of BASE: x-prediction, Muon, dense
    "dense": "",
    "v, AdamW 1e-3": "--flow.prediction=v " + ADAMW,                                # the plain baseline
    "v-prediction": "--flow.prediction=v",
    "AdamW 1e-3": ADAMW,
    "Muon, fused matrices whole": "--optim.split=no",
    "Muon, spectral scale": "--optim.scale=spectral --optim.lr=6.6e-3",             # as large as the recipe's on a square matrix
    "TREAD": "--model.route=1,4,0.5",
    "TREAD, keep 0.75": "--model.route=1,4,0.75",
    "masking, two mixer blocks": "--model.route=2,none,0.5",
    "masking, no mixer": "--model.route=0,none,0.5",
    "shift 3": "--flow.shift=3",
    "no EMA": "--optim.ema=0",
    "REPA": TEACHER,
    "iREPA": "--align.conv=yes --align.norm=0.8 " + TEACHER,
    "perceptual": "--perceptual.effnet=yes",
    "nitro: DiT, v, AdamW 1e-3, masking": "--model.kind=dit --flow.prediction=v --model.route=2,none,0.5 " + ADAMW,
    "nitro, dense": "--model.kind=dit --flow.prediction=v " + ADAMW,
    "prx: TREAD, REPA, perceptual": PRX,
    "prx, no TREAD": "--perceptual.effnet=yes " + TEACHER,
    "prx, no REPA": "--model.route=1,4,0.5 --perceptual.effnet=yes",
    "prx, no perceptual": "--model.route=1,4,0.5 " + TEACHER,
    "prx, AdamW 1e-3": ADAMW + " " + PRX,
    "prx, v": "--flow.prediction=v " + PRX,
}
BUDGETS = 0.35, 0.6, 1, 1.65                                                       # of --images, for "dense"


def call(*command, **variables):
    done = subprocess.run([sys.executable, *command], cwd=HERE, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **variables})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def rates(options, path, rounds=2):
    """{variant: steps/s}, by the quickest step of `rounds` timings in turn: other work can only slow one."""
    known = json.loads(path.read_text()) if path.exists() else {}
    if missing := [name for name in options if name not in known]:
        found = collections.defaultdict(list)
        for name in tqdm(missing * rounds, desc="rates"):
            found[name].append(1000 / json.loads(call("train.py", "--bench=emoji", *options[name].split()).splitlines()[-1])["ms_min"])
        known |= found
        path.write_text(json.dumps(known, indent=1))
    return {name: max(known[name]) for name in options}


def run(folder, options, images, seed, threads):
    threads = {"OMP_NUM_THREADS": str(threads)}
    call("train.py", "--config=emoji", *options.split(), f"--seed={seed}", f"--train.images={images}", f"--out={folder}", "--train.eval_every=0",
         "--train.save_every=0", **threads)
    call("evaluate.py", f"--checkpoint={folder}", "--n=109", "--steps=10", f"--out={folder}/evaluation.json", **threads)
    found = json.loads((folder / "evaluation.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    scores = {f"{key} {which}": found["retrieval"][which][key] for which in ("seen", "heldout") for key in ("emoji top-1", "emoji top-5")}
    return {"loss": found["loss"]["loss"], **scores, "minutes": max(line.get("minutes", 0) for line in log)}


SHOWN = {"validation loss": ("loss", 1, 3), "seen, top-5 %": ("emoji top-5 seen", 100, 0), "held out, top-5 %": ("emoji top-5 heldout", 100, 0)}


def groups(rows):
    """[(variant, its rows)], one for each number of images, in the order of VARIANTS."""
    found = collections.defaultdict(list)
    for row in sorted(rows, key=lambda r: (list(VARIANTS).index(r["variant"]), r["images"])):
        found[row["variant"], row["images"]].append(row)
    return [(name, group) for (name, _), group in found.items()]


def at(rows, images, key):
    """What "dense" reaches with `images`: between its budgets, straight in log images. None outside of them."""
    means = sorted((group[0]["images"], statistics.mean(r[key] for r in group)) for name, group in groups(rows) if name == "dense")
    for (a, low), (b, high) in zip(means, means[1:]):
        if a <= images <= b:
            return low + (high - low) * math.log(images / a) / math.log(b / a)


def table(rows):
    titles = [t for title in SHOWN for t in (title, "dense, as many images")]
    print(f"| | images | {' | '.join(titles)} | n |\n{'|---' * (len(titles) + 3)}|")
    for name, group in groups(rows):
        cells = []
        for key, scale, d in SHOWN.values():
            values, same = [scale * row[key] for row in group], at(rows, group[0]["images"], key)
            cells += [f"{statistics.mean(values):.{d}f} ({min(values):.{d}f} to {max(values):.{d}f})",
                      "" if name == "dense" else "-" if same is None else f"{scale * same:.{d}f}"]
        print(f"| {name} | {group[0]['images']:,} | {' | '.join(cells)} | {len(group)} |")


def draw(rows, path, images):
    """A dot for each run, a bar for the mean of its variant; a tick for "dense" at as many images."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    found = [(name, group) for name, group in groups(rows) if name != "dense" or group[0]["images"] == images][::-1]
    figure, axes = plt.subplots(1, len(SHOWN), figsize=(10, 0.3 * len(found) + 1), sharey=True, layout="constrained")
    for ax, (title, (key, scale, _)) in zip(axes, SHOWN.items()):
        for i, (name, group) in enumerate(found):
            values, same = [scale * row[key] for row in group], at(rows, group[0]["images"], key)
            ax.barh(i, statistics.mean(values), color="#5b7c99" if name == "dense" else "#9db4c6")
            ax.plot(values, [i] * len(values), "o", color="#c2261d", markersize=4)
            if same is not None:
                ax.plot([scale * same] * 2, [i - 0.4, i + 0.4], color="black", linewidth=2)
        ax.set(title=title, yticks=range(len(found)), yticklabels=[name for name, _ in found], ylim=(-0.6, len(found) - 0.4))
        ax.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=13_440)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", help="variants, parted by semicolons")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--teacher", default="out/dinov2")
    parser.add_argument("--out", default="out/ablation", type=Path)
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    options = {name: BASE + text + args.teacher * text.endswith("--teacher=") for name, text in VARIANTS.items()}
    if args.only:
        options = {name: text for name, text in options.items() if name in ("dense", *args.only.split(";"))}
    speed = rates(options, out / "rates.json")
    whole = lambda images: int(images) // 96 * 96                                   # a step is 96
    plan = [(name, whole(args.images * speed[name] / speed["dense"])) for name in options]
    plan += [("dense", whole(args.images * b)) for b in BUDGETS if b != 1]
    path = out / "runs.jsonl"
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    ran = {(r["seed"], r["variant"], r["images"]) for r in done}
    plan = [(seed, *p) for seed in map(int, args.seeds.split(",")) for p in plan if (seed, *p) not in ran]

    def one(task):
        seed, name, images = task
        folder = out / "".join(ch if ch.isalnum() or ch in ".-" else "_" for ch in f"{name}_{images}_{seed}")
        return {"variant": name, "seed": seed, "images": images, **run(folder, options[name], images, seed, max(1, os.cpu_count() // args.jobs))}
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in tqdm(as_completed(pool.submit(one, task) for task in plan), total=len(plan), desc="runs"):
            done.append(future.result())
            with path.open("a") as file:
                file.write(json.dumps(done[-1]) + "\n")
    table(done)
    draw(done, out / "ablation.png", args.images)


if __name__ == "__main__":
    main()

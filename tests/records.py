"""A row of the records table (RESULTS.md has the rules): whole runs of a recipe, several seeds, one after the other on a quiet machine.

    python tests/records.py --seeds=0,1,2                                    # the `emoji` recipe as it is
    python tests/records.py --name="AdamW" --optim.name=adamw                # with a change; --config=emoji_gpu: the other track

-> a line per run in OUT/records.jsonl, the row. Minutes are those of training: the log leaves evaluation and saving out, and the first
log line, in which the blocks are compiled, counts as much as the median one. What was run before is not run again.
"""
import argparse, json, statistics
from pathlib import Path

from tqdm import tqdm

from ablate import call


def minutes(log):
    """Of log lines that end `images` images after each other at `img_s`."""
    steps = [line for line in log if "img_s" in line]
    seen = [b["images"] - a["images"] for a, b in zip([{"images": 0}, *steps], steps)]
    seconds = [n / line["img_s"] for n, line in zip(seen, steps)]
    return (sum(seconds[1:]) + min(seconds[0], seen[0] / statistics.median(line["img_s"] for line in steps))) / 60


def run(folder, options, seed):
    call("train.py", *options, f"--seed={seed}", f"--out={folder}")
    call("evaluate.py", f"--checkpoint={folder}", f"--out={folder}/evaluation.json")
    found = json.loads((folder / "evaluation.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {"git": log[0]["git"], "device": log[0]["device"], "torch": log[0]["torch"], "images": log[-1]["images"], "minutes": round(minutes(log), 2),
            "loss": found["loss"]["loss"], **{which: found["retrieval"][which]["emoji top-1"] for which in ("seen", "heldout")}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="emoji")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--name", help="of the row; default: the recipe's")
    parser.add_argument("--out", default="out/records", type=Path)
    args, options = parser.parse_known_args()
    name, out = args.name or args.config, args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    if others := [r["options"] for r in rows if r["name"] == name and r["options"] != options]:
        parser.error(f"the row {name!r} of {path} is of {' '.join(others[0]) or 'no options'}: give this one another --name, or another --out")
    for seed in tqdm(list(map(int, args.seeds.split(","))), desc=name):
        if not any((r["name"], r["seed"]) == (name, seed) for r in rows):
            folder = out / f"{name}_{seed}".replace(" ", "_")
            rows.append({"name": name, "seed": seed, "options": options, **run(folder, [f"--config={args.config}", *options], seed)})
            with path.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
    rows = [r for r in rows if r["name"] == name]
    cells = []
    for key, scale, digits in (("minutes", 1, 1), ("loss", 1, 4), ("seen", 100, 1), ("heldout", 100, 1)):
        values = [scale * r[key] for r in rows]
        cells.append(f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})")
    print(f"| change | commit | images | minutes | validation loss | seen, top-1 % | held out, top-1 % | n |\n{'|---' * 8}|")
    print(f"| {name} | {rows[-1]['git']} | {rows[-1]['images']:,} | {' | '.join(cells)} | {len(rows)} |")


if __name__ == "__main__":
    main()

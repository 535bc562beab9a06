"""The scripts behind RESULTS.md: what they count, and that they run to their table."""
import json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest

import ablate
import configs
import records

ROOT = Path(__file__).parent.parent


def test_minutes_count_compiling_as_a_line_like_the_others():
    line = lambda images, rate: {"images": images, "img_s": rate}
    log = [{"git": "x"}, line(640, 10), line(1280, 100), {"val_loss": 1.0, "images": 1280}, line(1920, 200), line(2560, 100)]
    assert records.minutes(log) == pytest.approx((640 / 100 + 640 / 100 + 640 / 200 + 640 / 100) / 60)
    assert records.minutes([line(640, 200), line(1280, 100), line(1920, 100)]) == pytest.approx((640 / 200 + 2 * 640 / 100) / 60)


def test_every_variant_is_a_config():
    seen = {}
    for name, options in ablate.VARIANTS.items():
        c = configs.parse(["--config=emoji", *(ablate.BASE + options + "x" * options.endswith("--teacher=")).split()])
        assert c not in seen.values(), f"{name} is the same as another"
        seen[name] = c
    food = replace(configs.emoji.data, subset="food")
    assert seen["dense"] == replace(configs.emoji, data=food, model=replace(configs.emoji.model, route=None, dense_end=0.0))


def test_equal_images_stand_on_the_line_between_budgets():
    rows = [{"variant": name, "images": n, "loss": x} for name, n, x in
            [("dense", 100, 3.0), ("dense", 100, 5.0), ("dense", 400, 2.0), ("dense", 1600, 0.0), ("TREAD", 200, 9.0)]]
    assert [ablate.at(rows, n, "loss") for n in (50, 100, 200, 400, 800, 1600, 2000)] == [None, 4, pytest.approx(3), 2, pytest.approx(1), 0, None]


def run(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_records_run_every_seed_once(tmp_path):
    command = ["tests/records.py", "--config=debug", "--seeds=0,1", f"--out={tmp_path}", "--name=a try", "--train.images=32", "--model.depth=3"]
    row = run(*command).splitlines()[-1]
    found = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert [(r["seed"], r["images"], r["name"]) for r in found] == [(0, 32, "a try"), (1, 32, "a try")] and found[0]["loss"] != found[1]["loss"]
    assert row.startswith("| a try | ") and row.endswith("| 2 |") and f"{sum(r['loss'] for r in found) / 2:.4f} (" in row
    assert json.loads((tmp_path / "a_try_0/log.jsonl").read_text().splitlines()[0])["config"]["model"]["depth"] == 3
    assert run(*command).splitlines()[-1] == row                                # nothing is run again
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 2
    other = subprocess.run([sys.executable, *command, "--optim.name=adamw"], cwd=ROOT, capture_output=True, text=True)
    assert other.returncode == 2 and "give this one another --name" in other.stderr           # nor taken for a run of something else

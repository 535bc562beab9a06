"""The prompts that a run draws, and those that it advises."""
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
from PIL import Image
from test_pretrained import one_line
from test_sample import DEBUG, command, randomise, write_checkpoint

import configs
import data
import sample
import train
from model import Denoiser

ROOT = Path(__file__).parent.parent
TINY = """--config=debug --train.images=32 --train.eval_every=0 --train.save_every=0 --train.val_images=4
    --model.size=16 --model.width=32 --train.micro_batch=8 --sample.steps=1""".split()


def run_train(out, *args, timeout=300):
    """What train.py says, as one would start it."""
    argv = [sys.executable, ROOT / "train.py", *TINY, f"--out={out}", *args]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def pictures(folder, captions):
    """A folder of pictures with these captions, in order."""
    folder.mkdir(parents=True)
    for i, caption in enumerate(captions):
        Image.new("RGB", (20, 20), (5 * i % 256, 100, 0)).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(caption, "utf-8")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The current folder, with a run whose grid draws these prompts."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "runs" / "tiny" / "step_00000020", randomise(Denoiser(DEBUG)))
    (tmp_path / "runs" / "tiny" / "prompts.txt").write_text("--it's a lake at dawn\nsecond\n", "utf-8")
    return tmp_path


# ------------------------------------------------------------------------------------------------------------
# Own pictures look like own pictures

@pytest.mark.parametrize("argv, whose", [
    ("--config=emoji", "recipe"),
    ("--config=emoji --train.images=9600 --data.workers=2", "recipe"),
    ("--config=nitro_debug --data=emoji", "recipe"),
    ("--config=emoji --data=path/to/images", ""),
    ("--config=emoji --source=path/to/images", ""),
    ("--config=emoji --data=emoji:0.5,path/to/images:0.5", ""),
    ("--config=nitro_debug --data=shards/emoji", ""),
    ("--config=emoji --data.subset=food", "recipe"),
    ("--config=debug", ""),
    ("--config=debug --data=images", ""),
    ("--config=emoji --sample.prompts=", ""),
    ("--config=emoji --data=images --sample.prompts=lake|hill", "lake|hill"),
    ("--prompts=lake --config=emoji --data=images", "lake"),
])
def test_a_recipes_prompts_are_for_its_own_data_and_given_ones_for_any(argv, whose):
    want = configs.emoji.sample.prompts if whose == "recipe" else whose
    assert configs.parse(argv.split()).sample.prompts == want
    typed = f"--sample.prompts={configs.emoji.sample.prompts}"
    assert configs.parse([*argv.split(), typed]).sample.prompts == configs.emoji.sample.prompts


class Captions:
    """In a data set's place."""

    def __init__(self, *captions):
        self.captions = [[caption, "another"] for caption in captions]

    def __len__(self):
        return len(self.captions)


@pytest.mark.parametrize("n, want", [
    (1, [0]), (3, [0, 1, 2]), (8, [*range(8)]), (9, [*range(8)]), (800, [*range(0, 800, 100)]),
])
def test_without_prompts_held_out_captions_are_drawn_from_all_over_the_set(n, want):
    held_out = Captions(*(f"held out {i}" for i in range(n)))
    assert train.grid_prompts(configs.debug, Captions("trained"), held_out) == [f"held out {i}" for i in want]


def test_a_set_without_held_out_captions_draws_its_own_and_given_prompts_win():
    assert train.grid_prompts(configs.debug, Captions("the only one"), Captions()) == ["the only one"]
    given = replace(configs.debug, sample=replace(configs.debug.sample, prompts=" a lake ||a hill| "))
    assert train.grid_prompts(given, Captions("x"), Captions("y")) == ["a lake", "a hill"]
    blank = replace(configs.debug, sample=replace(configs.debug.sample, prompts=" | "))
    assert train.grid_prompts(blank, Captions("x"), Captions("y")) == ["y"]


def test_a_run_on_own_pictures_draws_their_captions_and_says_how_to_draw_more(tmp_path):
    captions = [f"photo of lake number {i}, it's $HOME" for i in range(40)]
    root = pictures(tmp_path / "set", captions)
    small = ["--train.batch=16", "--model.heads=2", "--train.compile=no"]
    args = ["--config=emoji", *TINY[1:], *small, f"--data={root}"]
    said = run_train(tmp_path / "my run", *args)
    held_out = data.load(configs.parse(args))[1]
    drawn = (tmp_path / "my run" / "prompts.txt").read_text().splitlines()
    assert drawn and set(drawn) <= {text for texts in held_out.captions for text in texts}
    page = unescape((tmp_path / "my run" / "index.html").read_text())
    assert f"Samples for: {'; '.join(drawn)}" in page
    assert "yellow background" not in page.partition("Config</h2>")[0]
    words = shlex.split(re.search(r"then python sample.py (.*)", said)[1])
    assert words == [drawn[0], f"--checkpoint={tmp_path / 'my run'}"]
    argv = [sys.executable, ROOT / "sample.py", *words, "--n=1", f"--out={tmp_path / 'out'}"]
    assert subprocess.run(argv, check=False).returncode == 0 and (tmp_path / "out" / "grid.png").exists()
    again = run_train(tmp_path / "my run", *args)
    assert "is finished: " + shlex.join(["python", "sample.py", *words]) in again


def test_one_picture_is_trained_on_and_its_caption_drawn(tmp_path):
    root = pictures(tmp_path / "set", ["the only lake"])
    said = run_train(tmp_path / "run", f"--data={root}")
    assert (tmp_path / "run" / "prompts.txt").read_text() == "the only lake\n"
    assert "sample.py 'the only lake'" in said


def test_without_a_prompt_sampling_names_one_of_the_run(run, monkeypatch):
    words = "no prompt: python sample.py --checkpoint=runs/tiny -- '--it'\"'\"'s a lake at dawn', or --"
    one_line(lambda: command(monkeypatch), words)
    step = "--checkpoint=runs/tiny/step_00000020"
    one_line(lambda: command(monkeypatch, step), "a lake at dawn", step)
    (run / "runs" / "tiny" / "prompts.txt").unlink()
    one_line(lambda: command(monkeypatch), "python sample.py 'what to draw' --checkpoint=runs/tiny")


@pytest.mark.parametrize("text, want", [
    ("red apple", "red apple"), ("a\nb\0c\ud800", "a b c"), ("word " * 99, " ".join(["word"] * 16)),
    ("x" * 1_000_000, "x" * 80), ("", ""),
])
def test_an_excerpt_is_one_short_line(text, want):
    assert sample.excerpt(text) == want


def test_a_prompt_of_any_bytes_is_drawn(run, monkeypatch):
    command(monkeypatch, "\udcff apple", "--n=1", "--steps=1", "--device=cpu")
    assert (run / "out" / "apple-0.png").exists()

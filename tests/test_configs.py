"""The command line and the recipes: what is right is read as it was meant, what is wrong ends in one line."""
import dataclasses
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import configs
from configs import Route

ROOT = Path(__file__).parent.parent


def leaves(kind=configs.Config, prefix=""):
    """Dotted names of all fields, from the classes."""
    for f in dataclasses.fields(kind):
        if dataclasses.is_dataclass(f.type):
            yield from leaves(f.type, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def at(config, key):
    for name in key.split("."):
        config = getattr(config, name)
    return config


def error(*argv):
    """The message with which the program ends."""
    with pytest.raises(SystemExit) as end:
        configs.parse(argv)
    assert isinstance(end.value.code, str) and "\n" not in end.value.code and end.value.code.startswith("error: ")
    return end.value.code


# What is right

@pytest.mark.parametrize("argument, key, value", [
    ("--optim.lr=3e-4", "optim.lr", 3e-4),
    ("--train.images=50_000", "train.images", 50_000),
    ("--seed=7", "seed", 7),
    ("--data=some/folder", "data.source", "some/folder"),                   # a bare section: its first field
    ("--text=a/b", "text.encoder", "a/b"),
    ("--subset=all", "data.subset", "all"),                                 # a bare field that one section has
    ("--init=a=b", "init", "a=b"),
    ("--wandb", "wandb", True),
    ("--data.skin_tones=YES", "data.skin_tones", True),
    ("--optim.split=0", "optim.split", False),
    ("--model.route=none", "model.route", None),
    ("--route=None", "model.route", None),
    ("--model.route=1,3,0.25", "model.route", Route(1, 3, 0.25)),
    ("--model.route=1,none,0.5", "model.route", Route(1, None, 0.5)),
    ("--model.route.keep=0.75", "model.route", Route(1, 2, 0.75)),
    ("--model.route.end=none", "model.route", Route(1, None, 0.5)),
    ("--out=a b", "out", "a b"),
])
def test_an_argument_sets_its_field_and_no_other(argument, key, value):
    c = configs.parse(["--config=debug", argument])
    assert at(c, key) == value and type(at(c, key)) is type(value) and at(configs.debug, key) != value
    assert {k for k, _, _ in configs.difference(configs.debug, c)} <= {key, *(f"{key}.{f}" for f in ("start", "end", "keep"))}


def test_the_recipe_is_emoji_unless_named_wherever_the_name_stands():
    assert configs.parse([]) == configs.emoji
    assert configs.parse(["--seed=3", "--config=debug"]) == replace(configs.debug, seed=3)


@pytest.mark.parametrize("name", configs.recipes)
def test_recipes_are_consistent_and_survive_a_file(name, tmp_path):
    c = configs.recipes[name]
    assert configs.check(c) is c and c.name == name
    for changed in (c, replace(c, model=replace(c.model, route=Route(1, None, 0.25)))):
        configs.save(changed, tmp_path / "config.json")
        assert configs.load(tmp_path / "config.json") == changed
        assert not list(configs.difference(configs.load(tmp_path / "config.json"), changed))


def test_an_older_file_takes_defaults_and_a_newer_one_is_refused(tmp_path):
    path = tmp_path / "config.json"
    configs.save(configs.debug, path)
    values = json.loads(path.read_text())
    del values["optim"]["momentum"], values["seed"]
    path.write_text(json.dumps(values))
    assert configs.load(path) == configs.debug
    for where in (values, values["optim"], values["model"]["route"]):
        where["flux"] = 1
        path.write_text(json.dumps(values))
        with pytest.raises(SystemExit, match=r"config\.json.*flux"):
            configs.load(path)
        del where["flux"]
    for text in ("{", ""):
        path.write_text(text)
        with pytest.raises(SystemExit, match="cannot read the config"):
            configs.load(path)
    with pytest.raises(SystemExit, match="cannot read the config"):
        configs.load(tmp_path / "absent.json")


def test_difference_names_each_field_that_differs():
    other = configs.parse(["--config=debug", "--seed=5", "--optim.lr=0.5", "--model.route=none"])
    assert list(configs.difference(configs.debug, other)) == [
        ("seed", 0, 5), ("model.route", Route(1, 2, 0.5), None), ("optim.lr", configs.debug.optim.lr, 0.5)]


# What is wrong

@pytest.mark.parametrize("argument, words", [
    ("--optim.lrr=1", "--optim.lr"),                                        # unknown, with the nearest name
    ("--train.imagse=1", "--train.images"),
    ("--sede=1", "--seed"),
    ("--xyzzy=1", "unknown key --xyzzy"),
    ("--size=64", "--model.size or --align.size"),                          # more than one section has it
    ("--width=64", "--model.width or --text.width"),
    ("--config=emojy", "'emoji'"),
    ("--config=xyzzy", "prx_512"),
    ("optim.lr=1", "--key=value"),
    ("--optim.lr=fast", "optim.lr wants float"),
    ("--optim.lr", "optim.lr wants float"),
    ("--train.batch=1.5", "train.batch wants int"),
    ("--train.batch=", "train.batch wants int"),
    ("--wandb=perhaps", "wandb wants yes or no"),
    ("--model.route=1,2", "start,end,keep"),
    ("--model.route=1,2,half", "model.route.keep wants float"),
    ("--model.route=one,2,0.5", "model.route.start wants int"),
])
def test_what_cannot_be_read_is_one_line(argument, words):
    message = error("--config=debug", argument) if not argument.startswith("--config") else error(argument)
    assert words in message, message


@pytest.mark.parametrize("arguments, words", [
    ("--model.kind=unet", "model.kind is one of"),
    ("--optim.name=sgd", "optim.name is one of muon, adamw"),
    ("--optim.ns=cubic", "optim.ns"),
    ("--flow.prediction=eps", "flow.prediction"),
    ("--sample.sampler=ddim", "sample.sampler"),
    ("--sample.guide=both", "sample.guide"),
    ("--train.precision=fp8", "train.precision"),
    ("--train.compile=perhaps", "train.compile"),
    ("--model.size=33", "model.size 33 must be a multiple of model.patch 8"),
    ("--model.width=60", "model.width 60"),
    ("--train.batch=12", "train.batch 12 must be a multiple of train.micro_batch 8"),
    ("--train.images=8", "less than one batch"),
    ("--text.heads=3", "text.width"),
    ("--text.vocab=256", "text.vocab"),
    ("--model.route=-1,2,0.5", "model.route"),                               # a block before the first
    ("--model.route=1,4,0.5", "model.depth 4"),
    ("--model.route=3,2,0.5", "model.route"),
    ("--model.route=4,none,0.5", "model.route"),
    ("--model.route=1,2,0", "model.route.keep"),
    ("--model.route=1,2,1.5", "model.route.keep"),
    ("--align.teacher=x --align.block=4", "align.block 4"),
    ("--model.route=none --sample.guide=self", "sample.guide=self"),
    ("--model.route=1,none,0.5 --sample.guide=self", "sample.guide=self"),
    ("--sample.lo=0.8 --sample.hi=0.2", "sample.lo=0.8"),
    *((f"--{key}=0", f"{key} must be above zero") for key in (
        "train.batch", "train.micro_batch", "train.log_every", "train.val_images", "train.images", "model.heads", "model.patch", "model.width",
        "model.depth", "model.size", "model.mlp_ratio", "text.heads", "text.width", "text.length", "align.hidden", "sample.steps", "flow.shift")),
    *((f"--{key}=-1", f"{key} must not be below zero") for key in (
        "optim.lr", "optim.adam_lr", "optim.warmup", "optim.clip", "text.depth", "model.bottleneck", "data.workers", "train.save_every")),
    *((f"--{key}={value}", f"{key} lies between 0 and 1") for key in ("text.drop", "optim.ema", "flow.uniform") for value in ("-0.1", "1.1", "nan")),
    ("--optim.lr=nan", "optim.lr"),
    ("--seed=-1", "seed"),
    (f"--seed={2 ** 64}", "seed"),
])
def test_values_that_do_not_fit_are_one_line(arguments, words):
    assert words in error("--config=debug", *arguments.split())


def test_the_first_mistake_reaches_the_terminal_as_one_line(tmp_path):
    for argument, words in (("--train.imagse=1", "--train.images"), ("--model.route=1,9,0.5", "model.route 1..9"), ("--config=nope", "no recipe")):
        done = subprocess.run([sys.executable, "-c", f"import configs; configs.parse(['--config=debug', {argument!r}])"],
                              capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1 and done.stdout == "" and words in done.stderr and done.stderr.count("\n") == 1


# Help

def test_help_prints_every_field_with_comment_and_default():
    done = subprocess.run([sys.executable, ROOT / "train.py", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == ""
    lines = {m[1]: m for line in done.stdout.splitlines() if (m := re.match(r"  --([\w.]+)=(.*?)(?:  +(.*))?$", line))}
    assert set(lines) == set(leaves())
    for key in leaves():
        assert lines[key][2] in (str(at(configs.emoji, key)), "..."), key
    assert lines["train.micro_batch"][3].startswith("images per forward") and lines["sample.prompts"][3].startswith("of the training grid")
    assert sum(not m[3] for m in lines.values()) < 12                       # names that say it all, e.g. model.channels
    for name in configs.recipes:
        assert name in done.stdout


def test_train_imports_nothing_heavy():
    """Transformers and diffusers alone would take longer than all else."""
    code = "import sys, train; sys.exit(bool({'transformers', 'diffusers', 'onnx', 'wandb', 'tensorboard'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0


K = 1000
PUBLISHED = {                                                # what was published or shipped, by ours' names; images are steps x batch
    "prx_512": {
        "model": dict(size=512, patch=32, width=1792, depth=16, heads=28, mlp_ratio=3.5, bottleneck=256, absolute=False, zero=True),
        "flow": dict(prediction="x", shift=3.0, uniform=0.1, noise=1.0), "text": dict(encoder="google/t5gemma-2b-2b-ul2", length=256, drop=0.1),
        "align": dict(teacher="facebook/dinov3-vitl16-pretrain-lvd1689m", block=7, weight=0.5, hidden=1024, until=0, conv=False, norm=0.0),
        "perceptual": dict(lpips_weight=0.1, lpips_scale=0.5, dino="facebook/dinov2-with-registers-base", dino_weight=0.01, dino_size=224),
        "optim": dict(name="muon", lr=1e-4, adam_lr=1e-4, beta1=0.9, beta2=0.95, eps=1e-8, momentum=0.95, ns="quintic", scale="rms", modulation="muon",
                      decay=0.0, warmup=K * 1024, cooldown=0.0, clip=0.2, ema=0.999, ema_every=10, ema_ramp=False),
        "train": dict(images=100 * K * 1024, batch=1024), "data": dict(buckets=True), "sample": dict(steps=50, guidance=3.5, guide="self", sampler="euler")},
    "prx_1024": {"model": dict(size=1024, route=configs.Route(1, 14, 0.5)), "align": dict(teacher=""), "train": dict(images=20 * K * 512, batch=512),
                 "optim": dict(warmup=K * 512, ema=0.999, ema_every=10, ema_ramp=False), "perceptual": dict(lpips_scale=0.5)},
    "nitro_512": {
        "model": dict(kind="dit", size=512, channels=32, patch=1, width=1152, depth=28, heads=16, mlp_ratio=4.0, route=configs.Route(3, None, 0.5)),
        "latent": dict(vae="mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", factor=32), "flow": dict(prediction="v", shift=1.0, uniform=0.0, noise=1.0),
        "text": dict(encoder="meta-llama/Llama-3.2-1B", length=256, drop=0.1),
        "align": dict(teacher="facebook/dinov2-base", block=8, weight=0.5, size=224, hidden=2048),
        "optim": dict(name="adamw", adam_lr=3e-4, beta1=0.9, beta2=0.999, eps=1e-10, decay=0.03, decay_all=True, warmup=500 * 2048, cooldown=0.0, clip=0.5),
        "train": dict(images=100 * K * 2048, batch=2048), "sample": dict(steps=20, guidance=4.0, sampler="euler"), "perceptual": dict(lpips="", dino="")},
    "nitro_1024": {"model": dict(kind="mmdit", size=512, depth=24, heads=18, dual=13, route=configs.Route(3, None, 0.5)), "flow": dict(shift=1.0)},
    "nitro_1024_ft": {"model": dict(kind="mmdit", size=1024, span=16.0), "flow": dict(shift=3.0), "align": dict(teacher=""),
                      "optim": dict(adam_lr=8e-5, decay=0.1, decay_all=True, eps=1e-8, ema=0.99975, ema_every=1, ema_ramp=False),
                      "train": dict(images=20 * K * 2048, batch=2048), "sample": dict(guidance=4.5)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name):
    found = {room: {key: getattr(getattr(configs.recipes[name], room), key) for key in fields} for room, fields in PUBLISHED[name].items()}
    assert found == PUBLISHED[name]

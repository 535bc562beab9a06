"""Every command of the README that needs no GPU runs, in order, as a newcomer would type it, with sizes that take seconds."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import configs
from test_metrics import tiny_clip

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.split("  #")[0].strip() for line in re.findall(r"^    ((?:python|torchrun|pip) .*)$", README, re.M)]
LARGE = [c for c in COMMANDS if re.search("amd/|nitro_512|nitro_1024|prx_", c) and "--plan" not in c]       # wants 8 GPUs, or the hub
SMALL = ("--train.images=32 --train.batch=16 --train.micro_batch=8 --train.eval_every=0 --train.val_images=8 --train.compile=no --model.size=16 "
         "--model.patch=8 --model.width=32 --model.depth=5 --model.heads=2 --text.width=16 --text.depth=1 --text.heads=2 --sample.steps=2").split()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the flat files, as in a clone, and the folders that the README calls path/to/..."""
    from transformers import BertConfig, BertModel, BertTokenizerFast, Dinov2Config, Dinov2Model
    place = tmp_path_factory.mktemp("clone")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, place)
    shutil.copy(ROOT / "emoji.tsv", place)
    shutil.copytree(ROOT / "tools", place / "tools")
    (place / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "make_dcae.py", place / "tests")
    (place / "path/to/folder").mkdir(parents=True)
    for i in range(24):
        Image.new("RGB", (20, 20), (10 * i, 100, 0)).save(place / f"path/to/folder/{i}.png")
        (place / f"path/to/folder/{i}.txt").write_text(f"a square of colour {i}")
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(bert).save_pretrained(place / "path/to/encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{x}" for x in "abcdefghijklmnopqrstuvwxyz")]
    (place / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(place / "vocab.txt")).save_pretrained(place / "path/to/encoder")
    dino = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    Dinov2Model(dino).save_pretrained(place / "path/to/dinov2")
    tiny_clip(place / "path/to/clip")
    (place / "path/to/dpg/prompts").mkdir(parents=True)
    (place / "path/to/dpg/prompts/1.txt").write_text("a red apple beside a green pear")
    (place / "path/to/geneval/prompts").mkdir(parents=True)
    (place / "path/to/geneval/prompts/evaluation_metadata.jsonl").write_text('{"tag": "single_object", "prompt": "a photo of a bench"}\n')
    return place


def small(command):
    """The words of the command with sizes that take seconds; what the README itself gives comes last and wins, but for sizes."""
    words = shlex.split(command)
    script = next(i for i, w in enumerate(words) if w.endswith(".py") or w.startswith("tools."))
    given = [w for w in words[script + 1:] if not w.startswith("--train.images")]
    if words[script] == "tests/make_dcae.py":
        given.append("--minutes=0.05")
    if words[script] == "train.py" and not {"--help", "--plan"} & set(given):
        small = [w for w in SMALL if "--config=nitro_debug" not in given or not w.startswith(("--model.size", "--model.patch"))]
        given = small + [w.replace("micro_batch=48", "micro_batch=4") for w in given]
    if words[script] in ("sample.py", "evaluate.py"):
        given = [w for w in given if not w.startswith("--steps")] + ["--steps=2"]
    if words[script] == "evaluate.py":
        given.append("--n=4")
    launch = [sys.executable, "-m", "torch.distributed.run"] if words[0] == "torchrun" else [sys.executable]
    return [*launch, *words[1:script + 1], *given]


def test_the_readme_has_its_commands():
    assert COMMANDS[0] == "pip install -r requirements.txt && python train.py"
    assert len(COMMANDS) > 15 and any("torchrun" in c for c in COMMANDS)


SLOW = ("python tests/records.py", *(() if os.environ.get("NANOT2I_LONG") else ("python kernels.py",)))         # 25 minutes, 40 seconds


@pytest.mark.parametrize("command", [c.split("&& ")[-1] for c in COMMANDS if "pytest" not in c and "bench" not in c and c not in (*LARGE, *SLOW)])
def test_command(place, command):
    done = subprocess.run(small(command), cwd=place, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout[-2000:] + done.stderr[-3000:]


def test_config_names_and_files_of_the_readme_exist():
    assert set(re.findall(r"--config=(\w+)", README)) <= set(configs.recipes)
    assert all(f"`{name}`" in README for name in configs.recipes)
    rows = re.findall(r"^\| (`\w+\.py`.*?) \|", README, re.M)
    named = set(re.findall(r"`(.+?)`", " ".join(rows)))     # a row may name several
    assert all((ROOT / file).exists() for file in named)
    files = {file.name for file in ROOT.glob("*.py")} - {"prepare.py"}          # which says where it went
    assert files == {name for name in named if name.endswith(".py") and "/" not in name}
    assert all((ROOT / image).exists() for image in re.findall(r"!\[.*?\]\((.*?)\)", README))


def test_import_and_help_are_quick():
    for words in (["-c", "import train"], ["train.py", "--help"]):
        best = min(seconds([sys.executable, *words]) for _ in range(2))
        assert best < 6, f"{words}: {best:.1f} s"


def seconds(command):
    """The processor's, of this one: a busy machine costs none."""
    before = os.times()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system

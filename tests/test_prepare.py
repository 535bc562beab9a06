"""Prepared shards, buckets and mixtures, with real processes and the real classes of diffusers and transformers at tiny size."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import configs
import data
import pretrained
import shards as reader
import train as loop
from test_data import picture, run, tokenize
from test_pretrained import one_line
from tools import prepare as tool

ROOT = Path(data.__file__).parent
COMMAND = [sys.executable, "-m", "tools.prepare"]
WORDS = "<pad> </s> red green blue apple car dog house tree on a the of and with".split()
SIZES = [(64, 64), (128, 64), (64, 128), (96, 64), (64, 80), (70, 70)]


def config(*args):
    return configs.parse(["--config=debug", *map(str, args)])


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders of a tiny autoencoder, language model and vision model, as a user would have them."""
    import transformers as T
    from diffusers import AutoencoderDC
    from tokenizers import Tokenizer, models, pre_tokenizers
    home = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    AutoencoderDC(latent_channels=4, encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16), encoder_layers_per_block=(1, 1),
                  decoder_layers_per_block=(1, 1), encoder_block_types=("ResBlock",) * 2, decoder_block_types=("ResBlock",) * 2,
                  encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()), scaling_factor=0.7).save_pretrained(home / "vae")
    T.LlamaForCausalLM(T.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                     num_key_value_heads=1, head_dim=8)).save_pretrained(home / "llama")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    T.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(home / "llama")
    vision = T.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=7, mlp_ratio=2)
    T.Dinov2Model(vision).save_pretrained(home / "dino")
    return home


def latent(hub, *args, teacher=False):
    """Flags of a latent recipe: 32 pixels, latents 2 pixels apart, 4 x 4 tokens."""
    return ["--config=debug", f"--vae={hub / 'vae'}", "--latent.factor=2", "--model.channels=4", "--model.patch=4", f"--text={hub / 'llama'}",
            *([f"--teacher={hub / 'dino'}", "--align.block=2"] if teacher else []), "--train.precision=fp32", "--train.batch=8",
            "--train.micro_batch=4", *map(str, args)]


def pictures(root, n=24):
    """n images of noise, of six shapes, with one to three captions each."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        w, h = SIZES[k % 6]
        image = Image.fromarray(rng.integers(0, 255, (h // 8, w // 8, 3), np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
        image.save(root / f"{k:03}.{('png', 'jpg')[k % 2]}")
        (root / f"{k:03}.txt").write_text("\n".join(f"{WORDS[2 + k % 3]} {WORDS[5 + k // 3]}" + " and a dog" * j for j in range(1 + k % 3)))
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("images") / "source")


def prepare(*args):
    """Run the command in this process."""
    tool.main([str(arg) for arg in args])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepared_with(hub, source, out, *args, teacher=True):
    """Prepare a latent recipe, five samples a shard, and return the folder."""
    prepare(*latent(hub, f"--data={source}", f"--out={out}", "--shard=5", *args, teacher=teacher))
    return out


@pytest.fixture(scope="module")
def shards(hub, source, tmp_path_factory):
    """Shards of a latent recipe with text in bf16 and features."""
    return prepared_with(hub, source, tmp_path_factory.mktemp("shards") / "out")


def both(hub, source, shards, *args, teacher=True):
    """Return the same recipe on the pictures and on what was prepared of them."""
    return [configs.parse(latent(hub, f"--data={data_source}", *args, teacher=teacher)) for data_source in (source, shards)]


def by_captions(dataset):
    """Return {captions: item}; those of our pictures are all different."""
    found = {tuple(dataset.captions(item)): item for item in dataset.items()}
    assert len(found) == len(dataset)
    return found


# Prepared against online

def test_prepared_equals_online(hub, source, shards):
    """Each sample is what the networks make of the picture: the latent in fp16, text and features in bf16."""
    c, p = both(hub, source, shards)
    vae, teacher = pretrained.VAE(c, "cpu"), pretrained.teacher(c, "cpu")
    tokenizer, encode = pretrained.tokenizer(c), pretrained.text_encoder(c, "cpu")
    assert sum(map(len, data.load(c))) == 24
    for online, stored in zip(data.load(c), data.load(p)):
        wanted, found = by_captions(online), by_captions(stored)
        assert wanted.keys() == found.keys()                # held out is what is held out online
        for captions, item in found.items():
            pixels = torch.from_numpy(online.picture(wanted[captions]))[None].float() / 127.5 - 1
            latent_wanted, features_wanted = vae.encode(pixels)[0], teacher(pixels)[0]
            for choice, caption in enumerate(captions):
                sample, its_caption = stored.get(item, choice)
                assert its_caption == caption and sample.keys() == {"latent", "text", "length", "teacher"}
                ids, mask = tokenizer([caption])
                text = encode(ids, mask)[mask]
                assert sample["text"].dtype == torch.bfloat16 and sample["text"].shape == text.shape == (sample["length"], 16)
                assert (sample["text"].float() - text).abs().max() < 0.01 * text.abs().max()
            assert sample["latent"].dtype == torch.float32 and sample["latent"].shape == (4, 16, 16)
            assert latent_wanted.std() > 0.01
            assert (sample["latent"] - latent_wanted).abs().max() < 1e-3 * latent_wanted.abs().max()
            assert sample["teacher"].shape == features_wanted.shape == (16, 32)
            assert torch.cosine_similarity(sample["teacher"].float(), features_wanted, dim=-1).min() > 0.9999
    ids, mask = tokenizer([""])
    null = encode(ids, mask)[0][mask[0]]
    assert stored.prepared.null.dtype == torch.float32 and stored.prepared.null.shape == null.shape == (1, 16)
    assert (stored.prepared.null - null).abs().max() < 0.02


def test_batches_of_shards(hub, source, shards):
    """Text is padded with zeros to the longest of the batch, in steps of 8, and masked as the tokenizer does."""
    p = both(hub, source, shards)[1]
    train, val = data.load(p)
    tokenizer = pretrained.tokenizer(p)
    seen = set()
    for batch in run(train, p, 12):
        assert batch.keys() == {"latent", "text", "mask", "caption", "teacher"}
        assert batch["latent"].shape == (4, 4, 16, 16) and batch["teacher"].shape == (4, 16, 32)
        _, mask = tokenizer(batch["caption"])
        assert torch.equal(batch["mask"], mask) and batch["text"].shape == (4, mask.shape[1], 16)
        assert (batch["text"][~mask] == 0).all() and (batch["text"][mask] != 0).any(-1).all()
        seen.update(batch["caption"])
    assert len(seen) > 15                                   # second and third captions too
    assert sum(len(batch["caption"]) for batch in data.fixed_batches(val, tokenizer, 10, 4)) == min(10, len(val))


def test_what_a_shard_holds(hub, source, shards, tmp_path):
    """Format 2, as data.py states it: nothing else is stored."""
    tensors = load_file(shards / "train-32x32-00000.safetensors")
    assert {key: (x.dtype, tuple(x.shape[1:])) for key, x in tensors.items()} == {
        "latent": (torch.float16, (4, 16, 16)), "teacher": (torch.bfloat16, (16, 32)), "text": (torch.bfloat16, (16,)),
        "first": (torch.int64, ()), "token": (torch.int64, ()), "letter": (torch.int64, ()), "length": (torch.int64, ()),
        "caption": (torch.uint8, ())}
    captions = len(tensors["length"])
    assert len(tensors["latent"]) == len(tensors["teacher"]) == len(tensors["first"]) - 1 == 5
    assert len(tensors["token"]) == len(tensors["letter"]) == captions + 1 == tensors["first"][-1] + 1
    assert tensors["token"][-1] == len(tensors["text"]) and tensors["letter"][-1] == len(tensors["caption"])
    assert torch.equal(tensors["token"].diff(), tensors["length"])              # without text.pad no padding is stored
    index = json.loads((shards / "index.json").read_text())
    record = index["shards"][0]
    assert index.keys() == {"version", "fingerprint", "shards"} and index["version"] == 2
    assert record.keys() == {"name", "split", "shape", "count", "bytes", "sha256", "captions", "tokens"}
    blob = (shards / f"{record['name']}.safetensors").read_bytes()
    assert record["bytes"] == len(blob) and record["sha256"] == hashlib.sha256(blob).hexdigest()
    prepare("--config=debug", f"--data={source}", f"--out={tmp_path / 'pixels'}")
    tensors = load_file(tmp_path / "pixels" / "train-32x32-00000.safetensors")
    assert tensors.keys() == {"image", "first", "letter", "caption"}


def test_padding_is_stored_where_the_model_attends_to_it(hub, source, tmp_path):
    out = prepared_with(hub, source, tmp_path / "out", "--text.pad=yes", teacher=False)
    p = configs.parse(latent(hub, f"--data={out}", "--text.pad=yes"))
    tokenizer, encode = pretrained.tokenizer(p), pretrained.text_encoder(p, "cpu")
    train = data.load(p)[0]
    for item in train.items():
        sample, caption = train.get(item, 0)
        ids, mask = tokenizer([caption])
        text = encode(ids, mask)[0]
        assert sample["text"].shape == text.shape == (p.text.length, 16) and sample["length"] == mask.sum()
        assert (sample["text"].float() - text).abs().max() < 0.01 * text.abs().max()


def test_features_only_where_wanted(hub, source, shards, tmp_path):
    without = configs.parse(latent(hub, f"--data={shards}"))
    assert "teacher" not in run(data.load(without)[0], without, 1)[0]
    bare = prepared_with(hub, source, tmp_path / "bare", "--features=no")
    one_line(lambda: data.load(both(hub, source, bare)[1]), "align.teacher", "dino")
    assert len(data.load(both(hub, source, bare, teacher=False)[1])[0])


def test_float8(hub, source, shards, tmp_path):
    eight = prepared_with(hub, source, tmp_path / "eight", "--fp8")
    a, b = (data.load(both(hub, source, folder)[1])[0] for folder in (shards, eight))
    assert (a.items() == b.items()).all()
    for item in a.items():
        (x, caption), (y, same_caption) = a.get(item, 0), b.get(item, 0)
        assert caption == same_caption and torch.equal(x["latent"], y["latent"]) and x["length"] == y["length"]
        for key in ("text", "teacher"):
            exact, rounded = x[key].double(), y[key].double()
            error = (exact - rounded).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-9)
            assert y[key].dtype == torch.bfloat16
            assert 0 < error.max() < 0.045                  # three bits of mantissa: 2^-4 at worst, less in the mean
    tensors = load_file(eight / "train-32x32-00000.safetensors")
    assert tensors["text"].dtype == tensors["teacher"].dtype == torch.float8_e4m3fn
    assert tensors["text_scale"].shape == tensors["text"].shape[:1]
    assert tensors["teacher_scale"].shape == tensors["teacher"].shape[:2]


def test_float8_against_its_definition():
    """Nearest of all 256 values times the token's scale, in float64."""
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 7)[:, None]
    x[3] = 0
    q, scale = tool.to_float8(x)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    table = table[table.isfinite()]
    want = x.double() / scale.double()[:, None]
    gap = (want[..., None] - table).abs().amin(-1)
    got = q.double()
    assert got.isfinite().all() and ((got - want).abs() <= gap + 1e-4 * want.abs()).all() and (got[3] == 0).all()
    assert (got.abs().amax(1)[[0, 1, 2, 4, 5, 6]] == 448).all()


def test_pixels_and_own_text(source, tmp_path):
    """No autoencoder: the pictures' bytes; a text transformer of our own: captions only."""
    prepare("--config=debug", f"--data={source}", f"--out={tmp_path / 'out'}")
    p = config(f"--data={tmp_path / 'out'}")
    for online, stored in zip(data.load(config(f"--data={source}")), data.load(p)):
        wanted = by_captions(online)
        for captions, item in by_captions(stored).items():
            sample, caption = stored.get(item, 1)
            assert sample.keys() == {"image"} and caption == captions[1 % len(captions)]
            assert np.array_equal(sample["image"].numpy(), online.picture(wanted[captions]))
    batch = run(stored, p, 1)[0]
    assert batch.keys() == {"image", "ids", "mask", "caption"} and batch["image"].dtype == torch.uint8


def test_features_of_another_teacher_are_not_used(hub, source, tmp_path):
    """With pixels at hand features are a convenience: those of the same teacher, layer and grid are given, others are not."""
    flags = ["--config=debug", f"--teacher={hub / 'dino'}", "--align.block=2"]
    prepare(*flags, f"--data={source}", f"--out={tmp_path / 'out'}")

    def keys(*more):
        p = configs.parse([*flags, f"--data={tmp_path / 'out'}", *more])
        return run(data.load(p)[0], p, 1)[0].keys()
    assert keys() == {"image", "ids", "mask", "caption", "teacher"}
    for other in ("--align.layer=1", "--model.patch=16", "--teacher="):
        assert keys(other) == {"image", "ids", "mask", "caption"}


def test_emoji_can_be_prepared(hub, tmp_path):
    flags = latent(hub, "--data=emoji", "--data.subset=food", "--text=bpe")
    prepare(*flags, f"--out={tmp_path / 'out'}")
    c = configs.parse(flags)
    p = replace(c, data=replace(c.data, source=str(tmp_path / "out")))
    vae = pretrained.VAE(c, "cpu")
    for online, stored in zip(data.load(c), data.load(p)):
        wanted, found = by_captions(online), by_captions(stored)
        assert wanted.keys() == found.keys()
        for captions, item in list(found.items())[:10]:
            latent_wanted = vae.encode(torch.from_numpy(online.picture(wanted[captions]))[None].float() / 127.5 - 1)
            got = stored.get(item, 0)[0]["latent"]
            assert (got - latent_wanted[0]).abs().max() < 1e-3 * latent_wanted.abs().max()
    assert run(stored, p, 1)[0].keys() == {"latent", "ids", "mask", "caption"}


# Interruption

def test_killed_and_resumed(hub, source, tmp_path):
    """kill -9 as soon as two shards are there: the rest is made, these are not touched, and every byte is as undisturbed."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    flags = latent(hub, f"--data={source}", f"--out={out}", "--shard=1", teacher=True)
    prepare(*latent(hub, f"--data={source}", f"--out={undisturbed}", "--shard=1", teacher=True))
    child = subprocess.Popen([*COMMAND, *flags], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(list(out.glob("train-*.json"))) < 2:
        assert child.poll() is None
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "index.json").exists() and len(list(out.glob("*.json"))) < 25
    one_line(lambda: data.load(both(hub, source, out)[1]), "not finished", "python -m tools.prepare")
    there = {}
    for record in out.glob("train-*.json"):
        for path in (record, record.with_suffix(".safetensors")):
            there[path] = path.stat().st_mtime_ns
    (out / "train-32x32-00020.safetensors.part").write_bytes(b"torn")           # what a kill may leave
    prepare(*flags)
    assert len(there) >= 4 and all(path.stat().st_mtime_ns == written for path, written in there.items())
    assert contents(out) == contents(undisturbed)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    prepare(*flags)                                         # finished: nothing to do
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())


def test_two_ranks_make_the_same(hub, source, shards, tmp_path):
    flags = latent(hub, f"--data={source}", f"--out={tmp_path / 'out'}", "--shard=5", "--data.workers=1", teacher=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    done = subprocess.run([*torchrun, "-m", "tools.prepare", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(shards)
    assert "images/s on rank 0 of 2" in done.stdout and "24 images in" in done.stdout and "img/s" in done.stderr


def test_ranks_one_after_the_other(hub, source, shards, tmp_path, monkeypatch):
    """None waits for another: whoever finds all shards made writes the index."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        assert not (tmp_path / "out" / "index.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        prepared_with(hub, source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)


def test_interrupted_with_one_line(hub, source, tmp_path):
    flags = latent(hub, f"--data={source}", f"--out={tmp_path / 'out'}", "--shard=1", "--data.workers=1", teacher=True)
    child = subprocess.Popen([*COMMAND, *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/train-*.json")):
        assert child.poll() is None
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    stderr = child.communicate(timeout=60)[1]
    assert child.returncode == 1 and "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "error: stopped; the same command goes on from here"


# Mistakes

def test_other_settings_or_pictures_do_not_go_on(hub, source, shards, tmp_path):
    def again(source, *more):
        return lambda: prepared_with(hub, source, shards, *more)
    one_line(again(source, "--fp8"), "fp8 False (now True)", "another --out")
    one_line(again(source, "--model.size=64"), "model.size 32 (now 64)")
    one_line(again(source, "--shard=6"), "shard 5 (now 6)")
    one_line(again(source, "--features=no"), "align.teacher dino@", "(now )")
    one_line(again(pictures(tmp_path / "few", 9)), "items 24 (now 9)")
    other = pictures(tmp_path / "other")
    (other / "007.txt").write_text("a caption of somebody else")
    one_line(again(other), "source ")
    one_line(lambda: prepared_with(hub, shards, tmp_path / "twice"), "is prepared already")
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_no_folder_of_others_is_written_to(hub, source, tmp_path, monkeypatch, rank):
    """Each rank looks for itself: any may be the first."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = set(source.iterdir())
    with pytest.raises(SystemExit) as stop:
        prepared_with(hub, source, source)
    assert "not empty" in stop.value.message and set(source.iterdir()) == before
    with pytest.raises(SystemExit) as stop:
        prepared_with(hub, source, source / "000.png")
    assert "cannot be made" in stop.value.message


def test_mistakes_of_the_command_line(hub, source, tmp_path):
    one_line(lambda: prepare(*latent(hub, f"--data={source}")), "--out=<folder>")
    one_line(lambda: prepared_with(hub, source, tmp_path / "out", "--shard=x"), "shard wants int")
    one_line(lambda: prepared_with(hub, source, tmp_path / "out", "--shard=0"), "--shard must be above zero")
    one_line(lambda: prepared_with(hub, source, tmp_path / "out", "--fp8=maybe"), "fp8 wants yes or no")
    one_line(lambda: prepared_with(hub, source, tmp_path / "out", "--fp9"), "unknown key --fp9")
    one_line(lambda: prepared_with(hub, source, tmp_path / "out", "--vae=no/such/vae"), "no/such/vae")
    one_line(lambda: prepare("verify", "--data=nowhere"), "nowhere")


def test_bad_pictures_are_skipped_and_counted(hub, tmp_path, capsys):
    root = pictures(tmp_path / "images")
    for name in ("004.png", "007.jpg"):                     # their headers stay in order
        (root / name).write_bytes((root / name).read_bytes()[:700])
    flags = latent(hub, f"--data={root}", f"--out={tmp_path / 'out'}", "--shard=1")                 # two shards stay empty
    one_line(lambda: prepare(*flags), "of 24", "--data.max_bad")
    capsys.readouterr()
    prepare(*flags, "--data.max_bad=0.2")
    done = capsys.readouterr()
    assert "22 images in" in done.out and "2 skipped" in done.out
    for name in ("004.png", "007.jpg"):
        assert done.err.count(f"skipped {name}:") == 1
    prepare(*flags, "--data.max_bad=0.2")                   # what was skipped is known from the records
    one_line(lambda: prepare(*flags), "of 24", "--data.max_bad")
    train, val = data.load(configs.parse(latent(hub, f"--data={tmp_path / 'out'}")))
    assert len(train) + len(val) == 22
    prepare("verify", f"--data={tmp_path / 'out'}")


def test_bad_pictures_of_all_ranks_count(hub, tmp_path, monkeypatch, capsys):
    """Two of 24 are too many for 0.05, though each rank met one only: the one that would write the index stops."""
    root = pictures(tmp_path / "images")
    for name in ("004.png", "007.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:700])
    flags = latent(hub, f"--data={root}", f"--out={tmp_path / 'out'}", "--shard=1", "--data.max_bad=0.05")
    monkeypatch.setenv("WORLD_SIZE", "2")
    plan = [data.load(configs.parse(flags[:-2]))[side] for side in (0, 1)]
    names = [side.name(item) for side in plan for item in side.items()]
    assert names.index("004.png") % 2 != names.index("007.jpg") % 2
    monkeypatch.setenv("RANK", "0")
    prepare(*flags)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        prepare(*flags)
    assert "2 of 24" in capsys.readouterr().err and not (tmp_path / "out" / "index.json").exists()


def test_a_full_disk_is_one_line(hub, source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(tool, "save_file", full)
    one_line(lambda: prepare("--config=debug", f"--data={source}", f"--out={tmp_path / 'out'}"),
             "train-32x32-00000", "No space left", "goes on")
    assert not list(tmp_path.glob("out/*.safetensors")) and not list(tmp_path.glob("out/train*.json"))


def test_numbers_that_are_not_finite_are_not_stored(hub, source, tmp_path, monkeypatch, capsys):
    """On another rank than the first too: it says so itself."""
    monkeypatch.setattr(pretrained.VAE, "encode", lambda self, pixels: pixels / 0)
    one_line(lambda: prepared_with(hub, source, tmp_path / "out"), "latent is not finite")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        prepared_with(hub, source, tmp_path / "out")
    assert "latent is not finite" in capsys.readouterr().err


# What is wrong with shards

def copy(folder, to):
    to.mkdir()
    for name, blob in contents(folder).items():
        (to / name).write_bytes(blob)
    return to


def flip(path, at):
    blob = bytearray(path.read_bytes())
    blob[at] ^= 4
    path.write_bytes(blob)


@pytest.mark.parametrize("kind", ["cut", "gone"])
def test_damaged_shards(hub, source, shards, tmp_path, kind):
    """Training stops with one line; prepare makes the shard anew, and nothing else."""
    root = copy(shards, tmp_path / "copy")
    path = root / "train-32x32-00001.safetensors"
    blob = path.read_bytes()
    path.unlink()
    if kind == "cut":
        path.write_bytes(blob[:-1])
    one_line(lambda: data.load(both(hub, source, root)[1]), "1 of 6 shards", path.name, "python -m tools.prepare")
    one_line(lambda: prepare("verify", f"--data={root}"), "1 of 6 shards", path.name)
    others = {file: file.stat().st_mtime_ns for file in root.glob("*.safetensors") if file != path}
    prepared_with(hub, source, root)
    assert contents(root) == contents(shards)
    assert all(file.stat().st_mtime_ns == written for file, written in others.items())


@pytest.mark.parametrize("where", ["header", "middle", "end"])
def test_flipped_bits_are_found_by_verify(hub, source, shards, tmp_path, where):
    root = copy(shards, tmp_path / "copy")
    path = root / "train-32x32-00001.safetensors"
    flip(path, {"header": 20, "middle": path.stat().st_size // 2, "end": -3}[where])
    one_line(lambda: prepare("verify", f"--data={root}"), "1 of 6 shards", f"{path.name} does not match", "delete")
    path.unlink()                                           # as it says
    prepared_with(hub, source, root)
    assert contents(root) == contents(shards)


def test_verify(shards, capsys):
    prepare("verify", f"--data={shards}")
    assert "6 shards match" in capsys.readouterr().out


@pytest.mark.parametrize("change, words", [
    (["--model.size=64"], ["--model.size=32 (now 64)"]), (["--text.length=8"], ["--text.length=16 (now 8)"]),
    (["--text=bpe"], ["llama@", "bpe"]), (["--align.layer=1"], ["--align.layer=-1 (now 1)"]),
    (["--data.buckets=yes"], ["--data.buckets=False"]), (["--text.pad=yes"], ["text.pad"]),
    (["--text.dim=8"], ["--text.dim=16 (now 8)"]), (["--latent.vae=other/vae"], ["vae@", "other/vae"])])
def test_shards_of_another_recipe(hub, source, shards, change, words):
    one_line(lambda: data.load(both(hub, source, shards, *change)[1]), "was prepared with", *words)


def test_settings_that_do_not_matter_may_differ(hub, source, shards):
    """Features of another kind are in nobody's way where none are wanted, nor is what shards do not depend on."""
    for change in (["--align.layer=1"], ["--model.patch=2"], ["--align.size=28"], ["--model.width=128"]):
        assert len(data.load(both(hub, source, shards, *change, teacher=False)[1])[0])


def test_a_moved_encoder_still_fits(hub, source, shards, tmp_path):
    (tmp_path / "llama").symlink_to(hub / "llama")
    c = both(hub, source, shards)[1]
    assert data.load(replace(c, text=replace(c.text, encoder=str(tmp_path / "llama"))))
    changed = copy(hub / "llama", tmp_path / "changed")
    one_line(lambda: data.load(replace(c, text=replace(c.text, encoder=str(changed)))), "text.encoder")


def test_damaged_index(hub, source, shards, tmp_path):
    root = copy(shards, tmp_path / "copy")
    for name in ("index.json", "null.safetensors"):
        blob = (root / name).read_bytes()
        (root / name).write_bytes(blob[:100])
        one_line(lambda: data.load(both(hub, source, root)[1]), "index.json or null.safetensors", "damaged")
        (root / name).unlink()                              # as it says
        prepared_with(hub, source, root)
        assert contents(root) == contents(shards)


def test_shards_of_another_format(hub, source, shards, tmp_path):
    root = copy(shards, tmp_path / "copy")
    index = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps(index | {"version": 1}))
    one_line(lambda: data.load(both(hub, source, root)[1]), "version 1", "prepare it again")


def maps():
    """Return how many shards are mapped into this process."""
    return Path("/proc/self/maps").read_text().count("train-32x32")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at memory as Linux shows it")
def test_few_shards_stay_mapped(hub, source, shards, monkeypatch):
    """And none keeps a file open, of which there may often be 1,024 only."""
    import functools
    train = data.load(both(hub, source, shards)[1])[0]
    want = [train.get(item, 0) for item in train.items()]
    reader.mapped.cache_clear()
    monkeypatch.setattr(reader, "mapped", functools.lru_cache(maxsize=2)(reader.mapped.__wrapped__))
    mapped, opened = maps(), len(list(Path("/proc/self/fd").iterdir()))
    for number in np.random.default_rng(0).permutation(len(train)):
        (a, caption), (b, same_caption) = want[number], train.get(train.items()[number], 0)
        assert caption == same_caption and a.keys() == b.keys()
        assert all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a)
        assert maps() <= mapped + 2
    assert len(train.files) > 2 and maps() > mapped and len(list(Path("/proc/self/fd").iterdir())) <= opened + 1


def test_a_sample_can_be_written_to(hub, source, shards):
    """What get() returns is no view of the mapped file, where a write would last for the rest of the run."""
    train = data.load(both(hub, source, shards)[1])[0]
    item = train.items()[0]
    want = {key: torch.as_tensor(x).clone() for key, x in train.get(item, 0)[0].items()}
    for x in train.get(item, 0)[0].values():
        if torch.is_tensor(x):
            x.zero_()
    assert all(torch.equal(torch.as_tensor(x), want[key]) for key, x in train.get(item, 0)[0].items())



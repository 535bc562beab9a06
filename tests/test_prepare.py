"""Prepared shards, buckets, mixtures: real processes, real classes of diffusers and transformers, tiny."""
import hashlib
import json
import signal
import subprocess
import sys
import tarfile
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
    vae = AutoencoderDC(
        latent_channels=4, scaling_factor=0.7,
        encoder_block_out_channels=(8, 16), decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        encoder_block_types=("ResBlock",) * 2, decoder_block_types=("ResBlock",) * 2)
    vae.save_pretrained(home / "vae")
    llama = T.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                          num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    T.LlamaForCausalLM(llama).save_pretrained(home / "llama")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    T.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(home / "llama")
    vision = T.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                            patch_size=7, mlp_ratio=2)
    T.Dinov2Model(vision).save_pretrained(home / "dino")
    return home


def latent(hub, *args, teacher=False):
    """Flags of a latent recipe: 32 pixels, latents 2 pixels apart, 4 x 4 tokens."""
    flags = ["--config=debug", f"--vae={hub / 'vae'}", "--latent.factor=2", "--model.channels=4",
             "--model.patch=4", f"--text={hub / 'llama'}", "--train.precision=fp32", "--train.batch=8",
             "--train.micro_batch=4"]
    if teacher:
        flags += [f"--teacher={hub / 'dino'}", "--align.block=2"]
    return [*flags, *map(str, args)]


def pictures(root, n=24):
    """n images of noise, of six shapes, with one to three captions each."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for k in range(n):
        w, h = SIZES[k % 6]
        noise = Image.fromarray(rng.integers(0, 255, (h // 8, w // 8, 3), np.uint8))
        image = noise.resize((w, h), Image.Resampling.BICUBIC)
        image.save(root / f"{k:03}.{('png', 'jpg')[k % 2]}")
        first = f"{WORDS[2 + k % 3]} {WORDS[5 + k // 3]}"
        captions = [first + " and a dog" * j for j in range(1 + k % 3)]
        (root / f"{k:03}.txt").write_text("\n".join(captions))
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
    flags = [latent(hub, f"--data={folder}", *args, teacher=teacher) for folder in (source, shards)]
    return [configs.parse(of_recipe) for of_recipe in flags]


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
                assert sample["text"].dtype == torch.bfloat16
                assert sample["text"].shape == text.shape == (sample["length"], 16)
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
    """Text is padded with zeros to the longest, in steps of 8, and masked as the tokenizer does."""
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
    fixed = list(data.fixed_batches(val, tokenizer, 10, 4))
    assert sum(len(batch["caption"]) for batch in fixed) == min(10, len(val))


def test_what_a_shard_holds(hub, source, shards, tmp_path):
    """Format 2, as data.py states it: nothing else is stored."""
    tensors = load_file(shards / "train-32x32-00000.safetensors")
    assert {key: (x.dtype, tuple(x.shape[1:])) for key, x in tensors.items()} == {
        "latent": (torch.float16, (4, 16, 16)), "teacher": (torch.bfloat16, (16, 32)),
        "text": (torch.bfloat16, (16,)),
        "caption": (torch.uint8, ()), "first": (torch.int64, ()), "token": (torch.int64, ()),
        "letter": (torch.int64, ()), "length": (torch.int64, ())}
    captions = len(tensors["length"])
    assert len(tensors["latent"]) == len(tensors["teacher"]) == len(tensors["first"]) - 1 == 5
    assert len(tensors["token"]) == len(tensors["letter"]) == captions + 1 == tensors["first"][-1] + 1
    assert tensors["token"][-1] == len(tensors["text"]) and tensors["letter"][-1] == len(tensors["caption"])
    assert torch.equal(tensors["token"].diff(), tensors["length"])      # no padding is stored
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
        assert caption == same_caption and x["length"] == y["length"]
        assert torch.equal(x["latent"], y["latent"])
        for key in ("text", "teacher"):
            exact, rounded = x[key].double(), y[key].double()
            error = (exact - rounded).norm(dim=-1) / exact.norm(dim=-1).clamp(min=1e-9)
            assert y[key].dtype == torch.bfloat16
            assert 0 < error.max() < 0.045                  # three bits of mantissa: 2^-4 at worst
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
    assert got.isfinite().all() and (got[3] == 0).all()
    assert ((got - want).abs() <= gap + 1e-4 * want.abs()).all()
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


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_from_archives(source, tmp_path, kind):
    """As from the folder. A row of null captions is bad, which only reading it tells."""
    paths = sorted(path for path in source.iterdir() if path.suffix != ".txt")
    (tmp_path / "in").mkdir()
    if kind == "tar":
        with tarfile.open(tmp_path / "in" / "a.tar", "w") as tar:
            for path in sorted(source.iterdir()):
                tar.add(path, path.name)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        rows = []
        for path in paths:
            captions = path.with_suffix(".txt").read_text().splitlines()
            rows.append({"image": {"bytes": path.read_bytes(), "path": path.name}, "caption": captions})
        rows.append({**rows[0], "caption": [None]})
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in" / "a.parquet", row_group_size=5)
    prepare("--config=debug", f"--data={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--data.max_bad=0.1")
    folder, stored = data.load(config(f"--data={source}")), data.load(config(f"--data={tmp_path / 'out'}"))
    wanted, found = {}, {}
    for side in folder:
        wanted.update({captions: side.picture(item) for captions, item in by_captions(side).items()})
    for side in stored:
        for captions, item in by_captions(side).items():
            found[captions] = side.get(item, 0)[0]["image"]
    assert wanted.keys() == found.keys() and len(found) == 24
    assert all(np.array_equal(found[captions].numpy(), wanted[captions]) for captions in found)


def test_features_of_another_teacher_are_not_used(hub, source, tmp_path):
    """With pixels at hand features are a convenience: given if of the same teacher, layer and grid."""
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
            pixels = torch.from_numpy(online.picture(wanted[captions]))[None].float() / 127.5 - 1
            latent_wanted = vae.encode(pixels)[0]
            got = stored.get(item, 0)[0]["latent"]
            assert (got - latent_wanted).abs().max() < 1e-3 * latent_wanted.abs().max()
    assert run(stored, p, 1)[0].keys() == {"latent", "ids", "mask", "caption"}


# Interruption

def test_killed_and_resumed(hub, source, tmp_path):
    """kill -9 once two shards are there: the rest is made, these stay, every byte is as undisturbed."""
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
    flags = ["--shard=5", "--data.workers=1", f"--data={source}", f"--out={tmp_path / 'out'}"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    command = [*torchrun, "-m", "tools.prepare", *latent(hub, *flags, teacher=True)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(shards)
    assert "images/s on rank 0 of 2" in done.stdout and "24 images in" in done.stdout
    assert "img/s" in done.stderr


def test_ranks_one_after_the_other(hub, source, shards, tmp_path, monkeypatch):
    """None waits for another: whoever finds all shards made writes the index."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        assert not (tmp_path / "out" / "index.json").exists()
        monkeypatch.setenv("RANK", str(rank))
        prepared_with(hub, source, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(shards)


def test_interrupted_with_one_line(hub, source, tmp_path):
    flags = latent(hub, f"--data={source}", f"--out={tmp_path / 'out'}", "--shard=1", "--data.workers=1")
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
    one_line(again(source, "--data.caption=txt"), "data.caption  (now txt)")
    one_line(again(pictures(tmp_path / "few", 9)), "items 24 (now 9)")
    other = pictures(tmp_path / "other")
    (other / "007.txt").write_text("a caption of somebody else")
    one_line(again(other), "source ")
    one_line(lambda: prepared_with(hub, shards, tmp_path / "twice"), "is prepared already")
    assert not (tmp_path / "twice").exists()
    begun = copy(shards, tmp_path / "begun")                # by a version that wrote other shards
    before = {"version": 1, "fingerprint": {}, "fp8": False, "shard": 5}
    (begun / "prepare.json").write_text(json.dumps(before))
    one_line(lambda: prepared_with(hub, source, begun), "version 1 (now 2)")


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
    assert not (tmp_path / "out").exists()                  # the next attempt is not one with another --vae


def test_bad_pictures_are_skipped_and_counted(hub, tmp_path, capsys):
    root = pictures(tmp_path / "images")
    for name in ("004.png", "007.jpg"):                     # their headers stay in order
        (root / name).write_bytes((root / name).read_bytes()[:700])
    flags = latent(hub, f"--data={root}", f"--out={tmp_path / 'out'}", "--shard=1")
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
    """Two of 24 are too many for 0.05, though each rank met one: who would write the index stops."""
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
    p = both(hub, source, root)[1]
    one_line(lambda: data.load(p), "1 of 6 shards", path.name, "python -m tools.prepare")
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
    words = "1 of 6 shards", f"{path.name} does not match", "delete"
    one_line(lambda: prepare("verify", f"--data={root}"), *words)
    path.unlink()                                           # as it says
    prepared_with(hub, source, root)
    assert contents(root) == contents(shards)


def test_verify(shards, capsys):
    prepare("verify", f"--data={shards}")
    assert "6 shards match" in capsys.readouterr().out


def test_verify_without_an_index(shards, tmp_path):
    (tmp_path / "index.json").write_text("{")
    one_line(lambda: prepare("verify", f"--data={tmp_path}"), "index.json", "cannot be read")
    one_line(lambda: prepare("verify", "--data=nowhere"), "nowhere")


@pytest.mark.parametrize("change, words", [
    (["--model.size=64"], ["--model.size=32 (now 64)"]), (["--text.length=8"], ["--text.length=16 (now 8)"]),
    (["--text=bpe"], ["llama@", "bpe"]), (["--align.layer=1"], ["--align.layer=-1 (now 1)"]),
    (["--data.buckets=yes"], ["--data.buckets=False"]), (["--text.pad=yes"], ["text.pad"]),
    (["--text.dim=8"], ["--text.dim=16 (now 8)"]), (["--latent.vae=other/vae"], ["vae@", "other/vae"])])
def test_shards_of_another_recipe(hub, source, shards, change, words):
    one_line(lambda: data.load(both(hub, source, shards, *change)[1]), "was prepared with", *words)


def test_settings_that_do_not_matter_may_differ(hub, source, shards):
    """Other features are in nobody's way where none are wanted; nor is what shards do not depend on."""
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
    assert len(train.files) > 2 and maps() > mapped
    assert len(list(Path("/proc/self/fd").iterdir())) <= opened + 1


def test_a_sample_can_be_written_to(hub, source, shards):
    """What get() returns is no view of the mapped file, where a write would last for the rest of the run."""
    train = data.load(both(hub, source, shards)[1])[0]
    item = train.items()[0]
    want = {key: torch.as_tensor(x).clone() for key, x in train.get(item, 0)[0].items()}
    for x in train.get(item, 0)[0].values():
        if torch.is_tensor(x):
            x.zero_()
    assert all(torch.equal(torch.as_tensor(x), want[key]) for key, x in train.get(item, 0)[0].items())


# Buckets

def test_bucket_lists():
    """PRX's own: 13 shapes of 240 to 256 tokens at 512 pixels, 27 of 984 to 1024 at 1024."""
    small, large = data.shapes_of_area(512, 32), data.shapes_of_area(1024, 32)
    half = {(704, 352), (640, 384), (672, 384), (608, 416), (576, 448), (544, 480), (512, 512)}
    assert len(small) == 13 and set(small) == half | {(w, h) for h, w in half}
    assert len(large) == 27 and len(data.shapes_of_area(256, 16)) == 13
    for shapes, low, high in ((small, 240, 256), (large, 984, 1024)):
        tokens = [h * w // 1024 for h, w in shapes]
        assert min(tokens) == low and max(tokens) == high
        assert all(h % 32 == w % 32 == 0 and 0.48 < w / h < 2.05 for h, w in shapes)


def test_nearest_bucket():
    shapes = data.shapes_of_area(512, 32)
    sizes = np.random.default_rng(0).integers(20, 4000, (500, 2))
    distance = np.abs(np.log(sizes[:, :1] / sizes[:, 1:]) - np.log([[w / h for h, w in shapes]]))
    got = data.nearest_shape(sizes, shapes)
    assert np.allclose(distance[range(500), got], distance.min(1)) and len(set(got)) == 13
    square, wide = data.nearest_shape(np.array([[500, 500], [9000, 100]]), shapes)
    assert shapes[square] == (512, 512) and shapes[wide] == (352, 704)


def test_buckets_of_a_folder(source):
    """A micro-batch has one shape, a picture the one nearest to its own, a shape its share of the run."""
    flags = ["--data.buckets=yes", "--model.size=64", "--train.batch=6", "--train.micro_batch=2"]
    c = config(f"--data={source}", *flags)
    train, val = data.load(c)
    for side, plain in zip((train, val), data.load(replace(c, data=replace(c.data, buckets=False)))):
        assert by_captions(side).keys() == by_captions(plain).keys()
        assert sum(map(len, side.items_by_shape())) == len(side)
    shape_of = {}
    for shape, (height, width) in enumerate(train.shapes):
        for item in train.items_by_shape()[shape]:
            picture = train.picture(item)
            w, h = Image.open(source / train.name(item)).size
            assert picture.shape == (3, height, width) and abs(np.log(w / h) - np.log(width / height)) < 0.2
            shape_of.update(dict.fromkeys(train.captions(item), (height, width)))
    whole = run(train, c, 40)
    for batch in whole:
        assert {shape_of[caption] for caption in batch["caption"]} == {tuple(batch["image"].shape[2:])}
    drawn = Counter(tuple(batch["image"].shape[2:]) for batch in whole)
    assert len(drawn) > 3 and set(drawn) <= set(data.shapes_of_area(64, 8))
    for shape, number in Counter(shape_of.values()).items():
        share = sum(len(items) for items, of in zip(train.items_by_shape(), train.shapes) if of == shape) / len(train)
        assert number and abs(drawn[shape] - share * len(whole)) < 4 * np.sqrt(share * len(whole))
    again = run(train, replace(c, data=replace(c.data, workers=2)), 40, world=3)
    same_batches(whole, again)
    same_batches(whole[60:], run(train, c, 20, start=20))
    fixed = [list(data.fixed_batches(val, tokenize, 99, 2, rank, 2)) for rank in range(2)]
    assert sum(len(batch["caption"]) for part in fixed for batch in part) == len(val)


def same_batches(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        assert x["caption"] == y["caption"] and torch.equal(x["image"], y["image"])


def test_prepared_buckets_equal_online(hub, source, tmp_path):
    flags = ["--data.buckets=yes", "--model.size=64", "--data.workers=1"]
    out = prepared_with(hub, source, tmp_path / "out", "--shard=3", *flags)
    c, p = both(hub, source, out, *flags[:2])
    vae, teacher = pretrained.VAE(c, "cpu"), pretrained.teacher(c, "cpu")
    (online, _), (train, _) = data.load(c), data.load(p)
    wanted, found = by_captions(online), by_captions(train)
    assert wanted.keys() == found.keys() and len({file.shape for file in train.files}) > 3
    for captions, item in found.items():
        pixels = torch.from_numpy(online.picture(wanted[captions]))[None].float() / 127.5 - 1
        latent_wanted = vae.encode(pixels)[0]
        sample, _ = train.get(item, 0)
        assert sample["latent"].shape == latent_wanted.shape
        assert (sample["latent"] - latent_wanted).abs().max() < 1e-3 * latent_wanted.abs().max()
        features = teacher(pixels)[0]                       # on the bucket's own grid
        assert torch.cosine_similarity(sample["teacher"].float(), features, dim=-1).min() > 0.9999
    assert len({batch["latent"].shape for batch in run(train, p, 10)}) > 3
    null = train.prepared.null[None], torch.ones(1, len(train.prepared.null), dtype=torch.bool)
    known, encode = loop.recalled(train, null, data.first_items(train, 8))           # the first eight, of several shapes
    for item in data.first_items(train, 8):
        ids, mask = known([train.captions(item)[0], ""])
        want = train.get(item, 0)[0]
        assert torch.equal(encode(ids, mask)[0, :len(want["text"])], want["text"])
        assert mask.sum(1).tolist() == [want["length"], 1]


# Turns and mixtures

def test_turns_are_those_of_a_count():
    """Every turn once and in order for each stream; shares within a round's rounding; rare streams too."""
    weights = (0.5, 0.3, 0.1999, 0.0001)
    whose, had = np.array([data.turn(3, weights, n) for n in range(30_000)]).T
    for stream, weight in enumerate(weights):
        assert np.array_equal(np.sort(had[whose == stream]), np.arange((whose == stream).sum()))
        for n in (1, 2, 7, 20):
            assert abs((whose[:n * data.ROUND] == stream).sum() - weight * n * data.ROUND) <= 4
    assert (whose == 3).sum() == 3 and len(set(map(tuple, whose[:27_000].reshape(-1, 9).tolist()))) > 500
    for n in (29_999, 5, 17_000):
        assert data.turn(3, weights, n) == (whose[n], had[n])
    assert [data.turn(4, weights, n)[0] for n in range(100)] != whose[:100].tolist()


def test_mixtures(source, tmp_path):
    other = tmp_path / "other"
    for k in range(10):
        picture(other / f"{k}.png", caption=f"other {k}")
    c = config(f"--data={source}:0.75,{other}:0.25", "--train.batch=16", "--train.micro_batch=4")
    train, val = data.load(c)
    a, b = (data.load(replace(c, data=replace(c.data, source=str(folder)))) for folder in (source, other))
    for mixed, first, second in zip((train, val), a, b):
        assert by_captions(mixed).keys() == by_captions(first).keys() | by_captions(second).keys()
    whole = run(train, c, 64)
    captions = [caption for batch in whole for caption in batch["caption"]]
    assert sum(caption.startswith("other") for caption in captions) == 256
    seen = Counter(caption for caption in captions if caption.startswith("other"))
    assert len(seen) == len(b[0]) and max(seen.values()) - min(seen.values()) <= 1       # its own epochs
    two_workers = replace(c, data=replace(c.data, workers=2))
    same_batches(whole[44 * 4:], run(train, two_workers, 20, start=44, world=2))
    even = data.load(replace(c, data=replace(c.data, source=f"{source},{other}")))[0]
    sizes = [len(a[0]) / len(even), len(b[0]) / len(even)]
    assert [share for _, _, share in even.streams] == pytest.approx(sizes, abs=0.02)
    bucketed = replace(c, data=replace(c.data, buckets=True), model=replace(c.model, size=64))
    mixed = data.load(bucketed)[0]
    assert len(mixed.streams) > 4 and abs(sum(stream[2] for stream in mixed.streams) - 1) < 1e-9
    for batch in run(mixed, bucketed, 16):
        assert len({caption.startswith("other") for caption in batch["caption"]}) == 1


def test_mixture_mistakes(hub, source, shards, tmp_path):
    split = data.split_mixture
    assert split("a:0.7,b:.3") == [("a", 0.7), ("b", 0.3)] and split("a, b") == [("a", None), ("b", None)]
    assert split("emoji") == [("emoji", None)]
    (tmp_path / "a,b:1").mkdir()
    assert split(str(tmp_path / "a,b:1")) == [(str(tmp_path / "a,b:1"), None)]
    one_line(lambda: split("a:0.7,b"), "weight")
    one_line(lambda: split("a:0,b:1"), "weight")
    one_line(lambda: split("a,,b"), "a:0.7,b:0.3")
    one_line(lambda: data.load(both(hub, source, f"{shards}:1,{source}:1")[1]), "prepare")
    mixture = f"{source}:1,{source}:1"
    one_line(lambda: prepared_with(hub, mixture, tmp_path / "out"), "prepare reads one source")


def test_prepared_mixture(hub, source, shards, tmp_path):
    other = prepared_with(hub, source, tmp_path / "out", "--shard=4096")
    c = configs.parse(latent(hub, f"--data={shards}:3,{other}:1", teacher=True))
    train, _ = data.load(c)
    batch = run(train, c, 2)[3]
    assert batch.keys() == {"latent", "text", "mask", "caption", "teacher"}
    assert train.prepared.null.shape == (1, 16)


# The command

@pytest.mark.parametrize("command, words", [
    (["-m", "tools.prepare", "--help"], ["--fp8", "--features=no", "--shard=4096", "torchrun", "verify"]),
    (["data.py", "--help"], ["tools/prepare.py"])])
def test_help(command, words):
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(word in done.stdout for word in words)


@pytest.mark.parametrize("command", [["data.py", "prepare"], ["data.py", "verify"], ["prepare.py"]])
def test_where_the_command_went(command):
    done = subprocess.run([sys.executable, *command, "--out=x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "python -m tools.prepare" in done.stderr and done.stderr.count("\n") == 1


# Trained on

TRAIN = ["--train.images=16", "--train.val_images=4", "--train.eval_every=0", "--train.log_every=1",
         "--train.compile=no", "--train.precision=fp32", "--model.kind=dit", "--model.route=1,none,0.5",
         "--flow.prediction=v", "--optim.warmup=8", "--sample.steps=2"]


def losses_of(out):
    """Return the losses that a run has logged."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_training_on_shards_is_training_on_the_pictures(hub, source, shards):
    """A micro-batch's loss and REPA's part are those of online encoding, but for what is rounded."""
    c, p = both(hub, source, shards, "--text.dim=16", *TRAIN)
    tokenizer = pretrained.tokenizer(c)
    encode, teacher, vae = loop.frozen(c, torch.device("cpu"))
    model = loop.build(c, torch.device("cpu"), teacher.dim)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    (online, _), (stored, _) = data.load(c), data.load(p)
    wanted, found = by_captions(online), by_captions(stored)
    some = sorted(wanted)[:4]

    def padded(x):
        """Pad the tokens of x (b, L, ...) to text.length."""
        return torch.nn.functional.pad(x, (0, 0) * (x.ndim - 2) + (0, c.text.length - x.shape[1]))

    def parts(recipe, dataset, items, null, networks):
        batch = data.gather(dataset, [(items[captions], 0) for captions in some])
        batch = loop.to_device(recipe, data.finish(batch, dataset, tokenizer), null, torch.device("cpu"))
        encode, teacher, vae = networks
        generator = torch.Generator().manual_seed(0)
        return loop.losses(recipe, model, batch, null, encode, teacher, generator, vae)[1]
    null = stored.prepared.null[None]
    stored_null = padded(null), padded(torch.ones(null.shape[:2], dtype=torch.bool))
    online_null = tuple(padded(x) for x in tokenizer([""]))
    want = parts(c, online, wanted, online_null, (encode, teacher, vae))
    sample = stored.get(stored.items()[0], 0)[0]
    got = parts(p, stored, found, stored_null, loop.frozen(p, torch.device("cpu"), sample))
    for name in ("loss", "align"):
        assert abs(got[name] - want[name]) < 1e-4, name


def test_train_and_resume_on_shards_without_the_text_encoder(hub, source, shards, tmp_path, capsys):
    """As a user types it: no frozen encoder is loaded, the grid is of held-out captions, it resumes."""
    p = both(hub, source, shards, *TRAIN)[1]
    flags = [*latent(hub, f"--data={shards}", *TRAIN, teacher=True)]
    away = tmp_path / "away"
    away.mkdir()
    whole, part = tmp_path / "whole", tmp_path / "part"
    for name in ("llama", "dino"):                          # config.json stays, weights are gone
        for file in (hub / name).glob("*.safetensors"):
            file.rename(away / f"{name}-{file.name}")
    try:
        loop.main([*flags, f"--out={whole}"])
        loop.main([*flags, f"--out={part}", "--train.images=8"])
        loop.main([*flags, f"--out={part}"])
    finally:
        for file in away.iterdir():
            name, original = file.name.split("-", 1)
            file.rename(hub / name / original)
    assert len(losses_of(whole)) == 2 and losses_of(whole) == losses_of(part)
    assert list((whole / "samples").glob("*.png"))
    a, b = (load_file(max(out.glob("step_*")) / "model.safetensors") for out in (whole, part))
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(SystemExit, match="holds no features"):
        loop.frozen(p, torch.device("cpu"), {"latent": 0, "text": 0})


def test_training_on_buckets(source, tmp_path):
    """Pixels, five shapes, TREAD: the loss is finite, and two halves make the whole."""
    plain = [flag for flag in TRAIN if not flag.startswith(("--model", "--flow"))]
    flags = ["--config=debug", f"--data={source}", "--data.buckets=yes", "--model.size=64",
             "--model.route=1,2,0.5", "--train.batch=8", "--train.micro_batch=4", *plain]
    for out, images in (("whole", 32), ("part", 16), ("part", 32)):
        loop.main([*flags, f"--out={tmp_path / out}", f"--train.images={images}"])
    losses = losses_of(tmp_path / "whole")
    assert len(losses) == 4 and losses == losses_of(tmp_path / "part") and all(np.isfinite(losses))


@pytest.mark.parametrize("tokens, fp8, features, times", [
    (60, False, False, 4.0), (120, True, False, 4.0), (70, True, True, 4.0)])
def test_bytes_of_a_sample_at_nitro_sizes(tokens, fp8, features, times, tmp_path):
    """So many times smaller than AMD's: states 256 x 2048, their mask, the latent, features 256 x 768."""
    n, generator = 32, torch.Generator().manual_seed(0)
    batch = {"latent": torch.randn(n, 32, 16, 16, generator=generator).half(),
             "text": torch.randn(n * tokens, 2048, generator=generator).bfloat16(),
             "tokens": torch.full((n,), tokens), "length": torch.full((n,), tokens)}
    if features:
        batch["teacher"] = torch.randn(n, 256, 768, generator=generator).bfloat16()
    for key in ("text", "teacher"):
        if fp8 and key in batch:
            batch[key], batch[f"{key}_scale"] = tool.to_float8(batch[key])
    captions = [["a word or two " * (tokens // 3)]] * n
    save_file(tool.pack([batch], captions), tmp_path / "shard.safetensors")
    theirs = 256 * 2048 * 2 + 256 * 8 + 32 * 16 * 16 * 2 + (256 * 768 * 2 if features else 0)
    assert theirs / ((tmp_path / "shard.safetensors").stat().st_size / n) > times

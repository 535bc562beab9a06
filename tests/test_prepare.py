"""Tars, parquet, buckets, mixtures and prepared shards, with real processes and the real classes of diffusers and transformers at tiny size."""
import io, json, signal, subprocess, sys, tarfile, time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cluster, configs, data, pretrained
import prepare as writer
import train as loop
from test_data import picture, run, tokenize
from test_pretrained import one_line

SCRIPT = str(Path(data.__file__))
WORDS = "<pad> </s> red green blue apple car dog house tree on a the of and with".split()


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


SIZES = [(64, 64), (128, 64), (64, 128), (96, 64), (64, 80), (70, 70)]


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
    """In this process, as the command does."""
    writer.prepare([str(arg) for arg in args])


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def shards(hub, source, tmp_path_factory):
    """Prepared: with bf16 text and features."""
    out = tmp_path_factory.mktemp("shards") / "out"
    prepare(*latent(hub, f"--source={source}", f"--out={out}", "--shard=5", teacher=True))
    return out


def both(hub, source, shards, *args, teacher=True):
    """The same recipe on the images and on what was prepared of them."""
    return [configs.parse(latent(hub, f"--data={s}", *args, teacher=teacher)) for s in (source, shards)]


# Prepared against online

def test_prepared_equals_online(hub, source, shards):
    c, p = both(hub, source, shards)
    (online, online_val), (train, val) = data.load(c), data.load(p)
    assert len(train) == len(online) and len(val) == len(online_val) and len(train) + len(val) == 24
    assert [train.captions[i] for i in range(len(train))] == list(online.captions) and list(val.captions) == list(online_val.captions)
    vae, tok, encode, teacher = pretrained.VAE(c, "cpu"), pretrained.tokenizer(c), pretrained.text_encoder(c, "cpu"), pretrained.teacher(c, "cpu")
    seen = set()
    for a, b in zip(run(online, c, 12), run(train, p, 12)):
        assert a["caption"] == b["caption"] and b.keys() == {"latent", "text", "mask", "caption", "teacher"}
        x = a["image"].float() / 127.5 - 1
        want = vae.encode(x)
        assert b["latent"].dtype == torch.float32 and b["latent"].shape == (4, 4, 16, 16)
        assert (b["latent"] - want).abs().max() < 1e-3 * want.abs().max() and want.std() > 0.01
        ids, mask = tok(a["caption"])
        text = encode(ids, mask)
        assert b["text"].dtype == torch.bfloat16 and b["text"].shape == text.shape and torch.equal(b["mask"], mask) and b["text"].shape[1] % 8 == 0
        assert (b["text"].float() - text)[mask].abs().max() < 0.01 * text.abs().max() and (b["text"][~mask] == 0).all()
        features = teacher(x)
        assert b["teacher"].shape == features.shape == (4, 16, 32)
        assert torch.cosine_similarity(b["teacher"].float(), features, dim=-1).min() > 0.9999
        seen.update(a["caption"])
    assert len(seen) > 15                                                       # also second and third captions
    null = encode(*tok([""]))[0][tok([""])[1][0]]
    assert train.null.dtype == torch.float32 and train.null.shape == null.shape == (1, 16) and (train.null - null).abs().max() < 0.02
    fixed = [list(data.fixed_batches(d, tok, 10, 4)) for d in (online_val, val)]
    assert [b["caption"] for b in fixed[0]] == [b["caption"] for b in fixed[1]] and "text" in fixed[1][0]


def test_features_only_where_wanted(hub, source, shards, tmp_path):
    without = configs.parse(latent(hub, f"--data={shards}"))
    assert "teacher" not in run(data.load(without)[0], without, 1)[0]
    prepare(*latent(hub, f"--source={source}", f"--out={tmp_path / 'bare'}", "--features=no", teacher=True))
    one_line(lambda: data.load(both(hub, source, tmp_path / "bare")[1]), "align.teacher", "dino")
    assert len(data.load(both(hub, source, tmp_path / "bare", teacher=False)[1])[0])


def test_float8(hub, source, shards, tmp_path):
    out = tmp_path / "eight"
    prepare(*latent(hub, f"--source={source}", f"--out={out}", "--fp8", "--shard=5", teacher=True))
    (a, _), (b, _) = (data.load(both(hub, source, s)[1]) for s in (shards, out))
    p = both(hub, source, out)[1]
    for x, y in zip(run(a, p, 6), run(b, p, 6)):
        assert x["caption"] == y["caption"] and torch.equal(x["latent"], y["latent"]) and torch.equal(x["mask"], y["mask"])
        for key in ("text", "teacher"):
            one, two = x[key].double(), y[key].double()
            error = (one - two).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-9)
            assert y[key].dtype == torch.bfloat16 and 0 < error.max() < 0.045   # three bits of mantissa: 2^-4 at worst, less in the mean


def test_float8_against_its_definition():
    """Nearest of all 256 values times the token's scale, in float64."""
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 7)[:, None]
    x[3] = 0
    q, scale = writer.eighth(x)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    table = table[table.isfinite()]
    want = x.double() / scale.double()[:, None]
    gap = (want[..., None] - table).abs().amin(-1)
    got = q.view(torch.float8_e4m3fn).double()
    assert got.isfinite().all() and ((got - want).abs() <= gap + 1e-4 * want.abs()).all() and (got[3] == 0).all()
    assert torch.equal(got.abs().amax(1)[[0, 1, 2, 4, 5, 6]], torch.full((6,), 448.0, dtype=torch.float64))


def test_pixels_and_own_text(source, tmp_path):
    """No autoencoder: bytes; a text transformer of our own: captions only."""
    prepare("--config=debug", f"--source={source}", f"--out={tmp_path / 'out'}")
    c, p = config(f"--data={source}"), config(f"--data={tmp_path / 'out'}")
    for a, b in zip(run(data.load(c)[0], c, 4), run(data.load(p)[0], p, 4)):
        assert b.keys() == {"image", "ids", "mask", "caption"} and a["caption"] == b["caption"]
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["ids"], b["ids"]) and b["image"].dtype == torch.uint8


def test_features_of_another_teacher_are_not_used(hub, source, tmp_path):
    """With pixels at hand features are a convenience: those of the same teacher, layer and grid are given, others are not."""
    flags = ["--config=debug", f"--teacher={hub / 'dino'}", "--align.block=2"]
    prepare(*flags, f"--source={source}", f"--out={tmp_path / 'out'}")
    keys = lambda *more: run(data.load(c := configs.parse([*flags, f"--data={tmp_path / 'out'}", *more]))[0], c, 1)[0].keys()
    assert keys() == {"image", "ids", "mask", "caption", "teacher"}
    assert keys("--align.layer=1") == keys("--model.patch=16") == keys("--teacher=") == {"image", "ids", "mask", "caption"}


def test_emoji_can_be_prepared(hub, tmp_path):
    flags = latent(hub, "--data=emoji", "--data.subset=food", "--text=bpe")
    prepare(*flags, f"--out={tmp_path / 'out'}")
    c = configs.parse(flags)
    p = replace(c, data=replace(c.data, source=str(tmp_path / "out")))
    (a, a_val), (b, b_val) = data.load(c), data.load(p)
    assert list(b.captions) == a.captions and list(b_val.captions) == a_val.captions
    x, y = run(a, c, 1)[0], run(b, p, 1)[0]
    assert y.keys() == {"latent", "ids", "mask", "caption"} and x["caption"] == y["caption"] and torch.equal(x["ids"], y["ids"])


# Interruption

def test_killed_and_resumed(hub, source, tmp_path):
    """kill -9 as soon as two shards are there: the rest is made, they are not touched, and every byte is that of an undisturbed run."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    flags = latent(hub, f"--source={source}", f"--out={out}", "--shard=1", teacher=True)
    prepare(*latent(hub, f"--source={source}", f"--out={undisturbed}", "--shard=1", teacher=True))
    child = subprocess.Popen([sys.executable, SCRIPT, "prepare", *flags], stderr=subprocess.DEVNULL)
    while len(list(out.glob("train-*.json"))) < 2:
        assert child.poll() is None
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (out / "index.json").exists() and len(list(out.glob("*.json"))) < 25
    one_line(lambda: data.load(both(hub, source, out)[1]), "not finished", "prepare")
    there = {p: p.stat().st_mtime_ns for p in out.glob("train-*.json")}
    there |= {p.with_suffix(".safetensors"): p.with_suffix(".safetensors").stat().st_mtime_ns for p in there}
    (out / "train-32x32-00020.safetensors.part").write_bytes(b"torn")           # what a kill may leave
    prepare(*flags)
    assert all(p.stat().st_mtime_ns == t for p, t in there.items()) and len(there) >= 4
    assert contents(out) == contents(undisturbed)
    before = {p: p.stat().st_mtime_ns for p in out.glob("*.safetensors")}
    prepare(*flags)                                                             # finished: nothing to do
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())


def test_two_ranks_make_the_same(hub, source, shards, tmp_path):
    flags = latent(hub, f"--source={source}", f"--out={tmp_path / 'out'}", "--shard=5", "--data.workers=1", teacher=True)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", SCRIPT, "prepare", *flags],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == contents(shards)
    assert "images/s on rank 0 of 2" in done.stdout and "24 images in" in done.stdout and "img/s" in done.stderr


def test_other_flags_or_images_do_not_go_on(hub, source, shards, tmp_path):
    flags = latent(hub, f"--source={source}", f"--out={shards}", "--shard=5", teacher=True)
    one_line(lambda: writer.prepare([*flags, "--fp8"]), "fp8 False (now True)", "another --out")
    one_line(lambda: writer.prepare([*flags, "--model.size=64"]), "model.size 32 (now 64)")
    one_line(lambda: writer.prepare([f.replace(str(source), str(pictures(tmp_path / "few", 9))) for f in flags]), "items 24 (now 9)")
    for rank in (0, 1):                                                         # each looks for itself: one of them is first
        before = set(source.iterdir())
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank)), patch.setenv("WORLD_SIZE", "2")
            with pytest.raises(SystemExit) as stop:
                writer.prepare([f.replace(str(shards), str(source)) for f in flags])
        assert "not empty" in stop.value.message and set(source.iterdir()) == before
    one_line(lambda: writer.prepare([f.replace(f"--source={source}", f"--source={shards}") for f in flags]), "prepared")
    one_line(lambda: writer.prepare([f for f in flags if "out=" not in f]), "--out=<folder>")
    one_line(lambda: writer.prepare([*flags, "--shard=x"]), "--shard wants int")


def test_bad_images_are_skipped_and_counted(hub, tmp_path, capsys):
    root = pictures(tmp_path / "images")
    for name in ("004.png", "007.jpg"):                                         # the headers stay in order
        (root / name).write_bytes((root / name).read_bytes()[:700])
    flags = latent(hub, f"--source={root}", f"--out={tmp_path / 'out'}", "--shard=1")        # so that two shards stay empty
    one_line(lambda: prepare(*flags), "of 24 images", "--data.max_bad")
    capsys.readouterr()
    prepare(*flags, "--data.max_bad=0.2")
    done = capsys.readouterr()
    assert "22 images in" in done.out and "2 skipped" in done.out and all(done.err.count(f"skipped {name}:") == 1 for name in ("004.png", "007.jpg"))
    prepare(*flags, "--data.max_bad=0.2")                                       # what was skipped is known from the records
    one_line(lambda: prepare(*flags), "of 24 images", "--data.max_bad")
    c = configs.parse(latent(hub, f"--data={tmp_path / 'out'}"))
    train, val = data.load(c)
    assert len(train) + len(val) == 22 and not train.bad
    writer.verify([f"--source={tmp_path / 'out'}"])


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


@pytest.mark.parametrize("kind", ["cut", "gone", "header", "tail"])
def test_damaged_shards(hub, source, shards, tmp_path, kind, capsys):
    root = copy(shards, tmp_path / "copy")
    path = root / "train-32x32-00001.safetensors"
    {"cut": lambda: path.write_bytes(path.read_bytes()[:-1]), "gone": path.unlink, "header": lambda: flip(path, 20), "tail": lambda: flip(path, -3)}[kind]()
    c = both(hub, source, root)[1]
    one_line(lambda: data.load(c), "5 of 24 samples", "--data.max_bad=0.21")
    assert "skipped train-32x32-00001" in capsys.readouterr().err
    train, sound = data.load(replace(c, data=replace(c.data, max_bad=0.21)))[0], data.load(both(hub, source, shards)[1])[0]
    assert "train-32x32-00001" in capsys.readouterr().err and cluster.digest_of(train) == cluster.digest_of(sound)    # a run may go on
    for i in range(len(sound)):                                                 # all others in their places, in its own the next shard's
        a, b = train.item(i, 0), sound.item(i + 5 if 5 <= i < 10 else i, 0)
        assert a[1] == b[1] and torch.equal(a[0]["latent"], b[0]["latent"])
    assert len(train) == len(sound)
    one_line(lambda: writer.verify([f"--source={root}"]), "1 of", "train-32x32-00001")
    prepare(*latent(hub, f"--source={source}", f"--out={root}", "--shard=5", teacher=True))            # makes it anew, and nothing else
    assert contents(root) == contents(shards)


@pytest.mark.parametrize("workers", [0, 2])
def test_flipped_bits(hub, source, shards, tmp_path, workers, capsys):
    """In the middle of a shard, where only reading finds them: the sample is not trained on, and it is counted."""
    root = copy(shards, tmp_path / "out")
    path = root / "train-32x32-00001.safetensors"
    s, blob = data.mapped(path), path.read_bytes()
    at = {key: blob.index(s[key].tobytes()) for key in ("latent", "text", "caption", "first")}
    flip(path, at["latent"] + s["latent"][3].nbytes * 3 + 100)                  # sample 3
    t = int(s["first"][1])
    flip(path, at["text"] + int(s["token"][t]) * 32 + 5)                        # the first caption of sample 1
    index = json.loads((root / "index.json").read_text())
    record = next(record for record in index["shards"] if record["name"] == path.stem)
    record["edges"] = data.edges(path)                                          # as if the ends were far away
    (root / "index.json").write_text(json.dumps(index))
    c = configs.parse(latent(hub, f"--data={root}", "--data.max_bad=0.2", f"--data.workers={workers}"))
    clean, (train, _) = data.load(both(hub, source, shards)[1])[0], data.load(c)
    allowed = [clean.item(j, choice)[0] for j in range(len(clean)) if j != 5 + 3 for choice in range(3)]
    for batch in run(train, c, 20):
        for x, text, mask in zip(batch["latent"], batch["text"], batch["mask"]):
            assert any(torch.equal(x, a["latent"]) and torch.equal(text[mask], a["text"]) for a in allowed)
    assert set(train.bad) == {f"{path.stem}: sample {j}" for j in (1, 3)} and "checksum" in capsys.readouterr().err
    one_line(lambda: writer.verify([f"--source={root}"]), "1 of", path.stem)
    strict = replace(c, data=replace(c.data, max_bad=0.0))
    one_line(lambda: run(data.load(strict)[0], strict, 12), "--data.max_bad")


def test_verify(shards, capsys):
    writer.verify([f"--source={shards}"])
    assert "match" in capsys.readouterr().out
    one_line(lambda: writer.verify(["--source=nowhere"]), "nowhere")


@pytest.mark.parametrize("change, words", [
    (["--model.size=64"], ["--model.size=32 (now 64)"]), (["--text.length=8"], ["--text.length=16 (now 8)"]), (["--text=bpe"], ["llama@", "bpe"]),
    (["--align.layer=1"], ["--align.layer=-1 (now 1)"]), (["--data.buckets=yes"], ["--data.buckets=False"]), (["--text.pad=yes"], ["text.pad"]),
    (["--latent.vae=other/vae"], ["vae@", "other/vae"])])
def test_shards_of_another_recipe(hub, source, shards, change, words):
    one_line(lambda: data.load(both(hub, source, shards, *change)[1]), "was prepared with", *words)


def test_a_moved_encoder_still_fits(hub, source, shards, tmp_path):
    (tmp_path / "llama").symlink_to(hub / "llama")
    (tmp_path / "else").symlink_to(hub / "llama")
    c = both(hub, source, shards)[1]
    assert data.load(replace(c, text=replace(c.text, encoder=str(tmp_path / "llama"))))
    copy(hub / "llama", tmp_path / "changed")
    one_line(lambda: data.load(replace(c, text=replace(c.text, encoder=str(tmp_path / "changed")))), "text.encoder")


def test_damaged_index(hub, source, shards, tmp_path):
    root = copy(shards, tmp_path / "copy")
    (root / "index.json").write_text((root / "index.json").read_text()[:100])
    one_line(lambda: data.load(both(hub, source, root)[1]), "damaged index.json")


# Buckets

def test_bucket_lists():
    """PRX's own: 13 shapes of 240 to 256 tokens at 512 pixels, 27 of 984 to 1024 at 1024."""
    small, large = data.buckets(512, 32), data.buckets(1024, 32)
    half = {(704, 352), (640, 384), (672, 384), (608, 416), (576, 448), (544, 480), (512, 512)}
    assert len(small) == 13 and set(small) == half | {(w, h) for h, w in half}
    assert len(large) == 27 and len(data.buckets(256, 16)) == 13
    for shapes, low, high in ((small, 240, 256), (large, 984, 1024)):
        tokens = [h * w // 1024 for h, w in shapes]
        assert min(tokens) == low and max(tokens) == high and all(h % 32 == w % 32 == 0 and 0.48 < w / h < 2.05 for h, w in shapes)


def test_nearest_bucket():
    shapes = data.buckets(512, 32)
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 4000, (500, 2))
    distance = np.abs(np.log(sizes[:, :1] / sizes[:, 1:]) - np.log([[w / h for h, w in shapes]]))
    got = data.nearest(sizes, shapes)
    assert np.allclose(distance[range(500), got], distance.min(1)) and len(set(got)) == 13
    assert shapes[data.nearest(np.array([[500, 500]]), shapes)[0]] == (512, 512) and shapes[data.nearest(np.array([[9000, 100]]), shapes)[0]] == (352, 704)


def test_buckets_of_a_folder(source):
    c = config(f"--data={source}", "--data.buckets=yes", "--model.size=64", "--train.batch=6", "--train.micro_batch=2")
    train, val = data.load(c)
    plain = data.load(replace(c, data=replace(c.data, buckets=False)))
    assert sorted(train.names) == sorted(plain[0].names) and sorted(val.names) == sorted(plain[1].names)
    whole = run(train, c, 40)
    shapes = Counter(tuple(b["image"].shape[2:]) for b in whole)
    assert len(shapes) > 3 and {s[2:] for s in (b["image"].shape for b in whole)} <= set(data.buckets(64, 8))
    for batch in whole[:20]:
        for image, caption in zip(batch["image"], batch["caption"]):
            i = next(i for i, t in enumerate(train.captions) if caption in t and np.array_equal(train.image(i), image))
            w, h = Image.open(Path(train.root, train.names[i])).size
            assert abs(np.log(w / h) - np.log(image.shape[2] / image.shape[1])) < 0.2
    for (h, w), (_, n, share) in zip(train.shapes, train.streams):
        assert abs(shapes[h, w] - share * len(whole)) < 4 * np.sqrt(share * len(whole)) and share == n / len(train)
    again = run(train, replace(c, data=replace(c.data, workers=2)), 40, world=3)
    for a, b in zip(whole, again):
        assert a["caption"] == b["caption"] and torch.equal(a["image"], b["image"])
    for a, b in zip(whole[60:], run(train, c, 20, start=20)):
        assert a["caption"] == b["caption"] and torch.equal(a["image"], b["image"])
    fixed = [list(data.fixed_batches(val, tokenize, 99, 2, rank, 2)) for rank in range(2)]
    assert sum(len(b["caption"]) for part in fixed for b in part) == len(val)


def test_prepared_buckets_equal_online(hub, source, tmp_path):
    flags = ["--data.buckets=yes", "--model.size=64", "--data.workers=1"]
    prepare(*latent(hub, f"--source={source}", f"--out={tmp_path / 'out'}", "--shard=3", *flags, teacher=True))
    c, p = both(hub, source, tmp_path / "out", *flags[:2])
    vae, teacher = pretrained.VAE(c, "cpu"), pretrained.teacher(c, "cpu")
    online, train = data.load(c)[0], data.load(p)[0]
    assert train.shapes == online.shapes and train.streams == online.streams and len(train.shapes) > 3
    for a, b in zip(run(online, c, 10), run(train, p, 10)):
        x = a["image"].float() / 127.5 - 1
        want = vae.encode(x)
        assert a["caption"] == b["caption"] and b["latent"].shape == want.shape and (b["latent"] - want).abs().max() < 1e-3 * want.abs().max()
        assert torch.cosine_similarity(b["teacher"].float(), teacher(x), dim=-1).min() > 0.9999            # on the bucket's own grid
    assert len({b["latent"].shape for b in run(train, p, 10)}) > 3
    null = train.null[None], torch.ones(1, len(train.null), dtype=torch.bool)                             # the first eight, of several shapes
    tokenize, encode = loop.recalled(train, null, range(8))
    for i in (0, 7):
        ids, mask = tokenize([train.captions[i][0], ""])
        want = train.item(i, 0)[0]
        assert torch.equal(encode(ids, mask)[0, :len(want["text"])], want["text"]) and mask.sum(1).tolist() == [want["length"], 1]


def test_few_shards_stay_mapped(hub, source, shards, monkeypatch):
    train = data.load(both(hub, source, shards)[1])[0]
    want = [train.item(i, 0) for i in range(len(train))]
    monkeypatch.setattr(data, "MAPPED", 2)
    train.open.clear()
    before = len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0
    for i in np.random.default_rng(0).permutation(len(train)):
        (a, text), (b, same) = want[i], train.item(int(i), 0)
        assert text == same and all(torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for key in a) and len(train.open) <= 2
    assert len(train.shards) > 2 and (not before or len(list(Path("/proc/self/fd").iterdir())) <= before + 2)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux does")
def test_the_index_of_a_tar_holds_no_file_open(source, tmp_path):
    """There may be ten thousand, and only 1,024 files open."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for path in sorted(source.iterdir()):
            tar.add(path, path.name)
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = [data.kept(tmp_path / "a.tar", "index", data.scan)[0] for _ in range(3)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before and np.array_equal(held[0], held[2]) and len(held[0]) == 24


# Turns and mixtures

def test_turns_are_those_of_a_count():
    """Every turn once and in order for each stream; over any stretch, shares within a round's rounding; rare streams too."""
    weights = (0.5, 0.3, 0.1999, 0.0001)
    whose, had = np.array([data.turn(3, weights, n) for n in range(30_000)]).T
    for s, w in enumerate(weights):
        assert np.array_equal(np.sort(had[whose == s]), np.arange((whose == s).sum()))
        for n in (1, 2, 7, 20):
            assert abs((whose[:n * data.ROUND] == s).sum() - w * n * data.ROUND) <= 4
    assert (whose == 3).sum() == 3 and len(set(map(tuple, whose[:27_000].reshape(-1, 9).tolist()))) > 500
    assert [data.turn(3, weights, n) for n in (29_999, 5, 17_000)] == [(whose[n], had[n]) for n in (29_999, 5, 17_000)]
    assert [data.turn(4, weights, n)[0] for n in range(100)] != whose[:100].tolist()


def test_mixtures(source, tmp_path):
    other = tmp_path / "other"
    for k in range(10):
        picture(other / f"{k}.png", caption=f"other {k}")
    c = config(f"--data={source}:0.75,{other}:0.25", "--train.batch=16", "--train.micro_batch=4")
    train, val = data.load(c)
    a, b = (data.load(replace(c, data=replace(c.data, source=str(s)))) for s in (source, other))
    assert len(train) == len(a[0]) + len(b[0]) and len(val) == len(a[1]) + len(b[1])
    assert list(train.captions) == list(a[0].captions) + list(b[0].captions)
    whole = run(train, c, 64)
    captions = [t for batch in whole for t in batch["caption"]]
    assert sum(t.startswith("other") for t in captions) == 256
    seen = Counter(t for t in captions if t.startswith("other"))
    assert len(seen) == len(b[0]) and max(seen.values()) - min(seen.values()) <= 1                     # by epochs of its own
    again = run(train, replace(c, data=replace(c.data, workers=2)), 20, start=44, world=2)
    assert [x["caption"] for x in whole[44 * 4:]] == [x["caption"] for x in again]
    assert all(torch.equal(x["image"], y["image"]) for x, y in zip(whole[44 * 4:], again))
    even = data.load(replace(c, data=replace(c.data, source=f"{source},{other}")))[0]
    assert [s[2] for s in even.streams] == [len(a[0]) / len(even), len(b[0]) / len(even)]
    bucketed = replace(c, data=replace(c.data, buckets=True), model=replace(c.model, size=64))
    mixed = data.load(bucketed)[0]
    assert len(mixed.streams) > 4 and abs(sum(s[2] for s in mixed.streams) - 1) < 1e-9
    for batch in run(mixed, bucketed, 16):
        assert len({t.startswith("other") for t in batch["caption"]}) == 1


def test_mixture_mistakes(hub, source, shards, tmp_path):
    parse = lambda text: data.mixture(text)
    assert parse("a:0.7,b:.3") == [("a", 0.7), ("b", 0.3)] and parse("emoji") == [("emoji", None)] and parse("a, b") == [("a", None), ("b", None)]
    (tmp_path / "a,b:1").mkdir()
    assert parse(str(tmp_path / "a,b:1")) == [(str(tmp_path / "a,b:1"), None)]
    one_line(lambda: parse("a:0.7,b"), "weight")
    one_line(lambda: parse("a:0,b:1"), "weight")
    one_line(lambda: parse("a,,b"), "a:0.7,b:0.3")
    one_line(lambda: data.load(both(hub, source, f"{shards}:1,{source}:1")[1]), "prepared")


def test_prepared_mixture(hub, source, shards, tmp_path):
    other = tmp_path / "out"
    prepare(*latent(hub, f"--source={source}", f"--out={other}", teacher=True))
    c = configs.parse(latent(hub, f"--data={shards}:3,{other}:1", teacher=True))
    train, val = data.load(c)
    batch = run(train, c, 2)[3]
    assert batch.keys() == {"latent", "text", "mask", "caption", "teacher"} and train.null.shape == (1, 16)


# Tars

def add(tar, name, blob):
    info = tarfile.TarInfo(name)
    info.size = len(blob)
    tar.addfile(info, io.BytesIO(blob))


def tars(source, root, split=(0, 10, 24), form=tarfile.USTAR_FORMAT):
    """The folder's images as tars, captions as .txt or .json."""
    root.mkdir(parents=True, exist_ok=True)
    names = sorted(p for p in source.iterdir() if p.suffix != ".txt")
    for k, (a, b) in enumerate(zip(split, split[1:])):
        with tarfile.open(root / f"{k:05}.tar", "w", format=form) as tar:
            for i, path in enumerate(names[a:b]):
                text = path.with_suffix(".txt").read_text()
                lines = text.splitlines()
                meta = ("json", json.dumps({"caption": lines if len(lines) > 1 else text, "more": 1})) if i % 2 else ("txt", text)
                add(tar, f"images/{path.stem}.{meta[0]}", meta[1].encode())
                add(tar, f"images/{path.name}", path.read_bytes())
    return root


def test_tars_equal_the_folder(source, tmp_path):
    root = tars(source, tmp_path / "tars")
    c, folder = config(f"--data={root}"), config(f"--data={source}")
    train, val = data.load(c)
    plain = data.load(folder)
    want = {tuple(t): d.image(i).tobytes() for d in plain for i, t in enumerate(d.captions)}
    got = {tuple(t): d.image(i).tobytes() for d in (train, val) for i, t in enumerate(d.captions)}
    assert got == want and len(want) == 24 and len(train) + len(val) == 24
    assert train.names[0] == "00000.tar: images/000.png" or val.names[0] == "00000.tar: images/000.png"
    c = replace(c, train=replace(c.train, batch=8, micro_batch=4))
    whole = run(train, c, 8)
    for a, b in zip(whole, run(train, replace(c, data=replace(c.data, workers=2)), 8, world=2)):      # no position of a file is shared
        assert a["caption"] == b["caption"] and torch.equal(a["image"], b["image"])
    single = data.load(config(f"--data={root / '00000.tar'}"))
    assert len(single[0]) + len(single[1]) == 10


def test_the_index_of_a_tar_is_made_once(source, tmp_path, monkeypatch):
    root = tars(source, tmp_path / "tars")
    c = config(f"--data={root}")
    first = list(data.load(c)[0].names)
    monkeypatch.setattr(data, "scan", None)                                     # would raise if called
    assert list(data.load(c)[0].names) == first and len(list(root.glob("*.index.npy"))) == 2
    monkeypatch.undo()
    for index in root.glob("*.index.npy"):
        index.write_bytes(index.read_bytes()[:100])                             # damaged: made again
    assert list(data.load(c)[0].names) == first
    time.sleep(0.01)
    tars(source, root, (0, 12, 20))                                             # other tars of the same names
    assert sum(map(len, data.load(c))) == 20


def test_index_in_the_cache_where_the_folder_is_read_only(source, tmp_path, monkeypatch):
    root = tars(source, tmp_path / "tars")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = data.atomic
    def refuse(path, writer=""):
        if path.parent == root:
            raise PermissionError("read-only")
        return plain(path, writer)
    monkeypatch.setattr(data, "atomic", refuse)                                 # root may write anywhere: no permission to take away
    data.load(config(f"--data={root}"))
    assert not list(root.glob("*.npy")) and len(list((tmp_path / "cache").rglob("*.index.npy"))) == 2
    monkeypatch.setattr(data, "scan", None)
    assert sum(map(len, data.load(config(f"--data={root}")))) == 24


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_bad_members_of_tars(source, tmp_path, form, capsys):
    root = tars(source, tmp_path / "tars", form=form)
    with tarfile.open(root / "00002.tar", "w", format=form) as tar:
        add(tar, "text.png", b"I am no image"), add(tar, "text.txt", b"a caption")
        add(tar, "bare.png", (source / "000.png").read_bytes())
        add(tar, "blank.png", (source / "000.png").read_bytes()), add(tar, "blank.json", b'{"url": "x"}')
        add(tar, "good.seg.png", b"another thing"), add(tar, "good.txt", b"good"), add(tar, "good.png", (source / "000.png").read_bytes())
    train, val = data.load(config(f"--data={root}", "--data.max_bad=0.2"))
    assert set(train.bad) == {f"00002.tar: {n}.png" for n in ("text", "bare", "blank")} and len(train) + len(val) == 25
    assert "no caption" in train.bad["00002.tar: bare.png"]
    one_line(lambda: data.load(config(f"--data={root}")), "3 of 28 images", "--data.max_bad=0.11")


@pytest.mark.parametrize("where", [0.5, "end", "no tar"])
def test_cut_tars(source, tmp_path, where, capsys):
    root = tars(source, tmp_path / "tars")
    path = root / "00001.tar"
    blob = path.read_bytes()
    if where == "end":                                                          # between two members
        with tarfile.open(path) as tar:
            blob = blob[:tar.getmembers()[-2].offset]
    path.write_bytes(b"hello" * 500 if where == "no tar" else blob if where == "end" else blob[:int(len(blob) * where)])
    one_line(lambda: data.load(config(f"--data={root}")), "--data.max_bad")
    assert "skipped 00001.tar: the tar" in capsys.readouterr().err
    train, val = data.load(config(f"--data={root}", "--data.max_bad=0.99"))
    assert len(train) + len(val) == 10 and "00001.tar" in train.bad


def test_prepare_from_tars(hub, source, shards, tmp_path):
    root = tars(source, tmp_path / "tars")
    prepare(*latent(hub, f"--source={root}", f"--out={tmp_path / 'out'}", teacher=True))
    a, b = (data.load(both(hub, source, s)[1]) for s in (shards, tmp_path / "out"))
    found = [{tuple(t): d.item(i, 0)[0]["latent"] for d in sides for i, t in enumerate(d.captions)} for sides in (a, b)]
    assert found[0].keys() == found[1].keys() and len(found[0]) == 24
    assert all((found[0][t] - found[1][t]).abs().max() < 1e-3 for t in found[0])


# Parquet

def test_parquet(source, tmp_path, capsys):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    paths = sorted(p for p in source.iterdir() if p.suffix != ".txt")
    rows = [{"image": {"bytes": p.read_bytes(), "path": p.name}, "caption": p.with_suffix(".txt").read_text().splitlines(), "id": 3} for p in paths]
    for k in (0, 1):
        parquet.write_table(arrow.Table.from_pylist(rows[k * 12:k * 12 + 12]), tmp_path / f"{k}.parquet", row_group_size=5)
    want = {tuple(t): d.image(i).tobytes() for d in data.load(config(f"--data={source}")) for i, t in enumerate(d.captions)}
    for extra in ((), ("--data.buckets=yes",)):
        train, val = data.load(config(f"--data={tmp_path}", *extra))
        got = {tuple(t): d.image(i).tobytes() for d in (train, val) for i, t in enumerate(d.captions)}
        assert got.keys() == want.keys() and (extra or got == want) and len(train) + len(val) == 24
    prepare("--config=debug", f"--source={tmp_path}", f"--out={tmp_path / 'out'}")
    prepared = data.load(config(f"--data={tmp_path / 'out'}"))
    assert {tuple(t): d.item(i, 0)[0]["image"].numpy().tobytes() for d in prepared for i, t in enumerate(d.captions)} == want
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "row_group", lambda *args, read=writer.row_group: asked.append(args[2]) or read(*args))
        digest = cluster.digest_of(train)
    assert set(asked) == {1} and digest                                         # captions are read without the images beside them
    assert len(list(tmp_path.glob("*.sizes.npy"))) == 2                         # measured once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "measured", None)
        assert data.load(config(f"--data={tmp_path}", "--data.buckets=yes"))[0].shapes == train.shapes
    broken = tmp_path / "broken.parquet"                                        # a part that cannot be read is bad pictures, not the end
    blob, where = bytearray((tmp_path / "1.parquet").read_bytes()), parquet.ParquetFile(tmp_path / "1.parquet").metadata.row_group(1).column(0)
    at = where.dictionary_page_offset or where.data_page_offset
    blob[at:at + 40] = b"\xff" * 40
    broken.write_bytes(blob)
    sizes, why = writer.measured(broken)
    assert why and len(sizes) == 12 and (sizes[5:10] == 1).all() and (sizes[:5] > 1).all()
    broken.unlink()
    for mute in (None, "  "):                                                   # a row without a caption is a bad image, found when it is drawn
        parquet.write_table(arrow.Table.from_pylist([*rows[:3], {**rows[3], "caption": [mute]}, *rows[4:12]]), tmp_path / "0.parquet")
        writer.row_group.cache_clear()
        train, val = data.load(config(f"--data={tmp_path}", "--data.max_bad=0.1", *extra))
        assert cluster.digest_of(train) and len(train) + len(val) == 24
        for d in (train, val):
            assert all(d.get(i, 0)[1] for i in range(len(d)))
        assert [*train.bad.late.values()] == ["no caption"]                    # val has the same `bad`
    parquet.write_table(arrow.Table.from_pylist([{"text": "a", "id": 3}]), tmp_path / "2.parquet")
    one_line(lambda: data.load(config(f"--data={tmp_path}")), "max_bad")
    assert "skipped 2.parquet: " in capsys.readouterr().err


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    one_line(lambda: data.load(config(f"--data={tmp_path}")), "pip install pyarrow")


# The command

def test_help():
    for args, words in ((["--help"], ["prepare", "verify", "tars"]), (["prepare", "--help"], ["--fp8", "--features=no", "--shard=4096", "torchrun"])):
        out = subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True)
        assert out.returncode == 0 and all(word in out.stdout for word in words)


# Trained on

TRAIN = ["--train.images=16", "--train.val_images=4", "--train.eval_every=0", "--train.log_every=1", "--train.compile=no", "--train.precision=fp32",
         "--model.kind=dit", "--model.route=1,none,0.5", "--flow.prediction=v", "--optim.warmup=8", "--sample.steps=2"]


def test_training_on_shards_is_training_on_the_images(hub, source, shards):
    """One micro-batch, fp32: the loss and REPA's part are those of online encoding; text is stored in bf16 and latents in fp16."""
    import train
    c, p = both(hub, source, shards, "--text.dim=16", *TRAIN)
    tok = pretrained.tokenizer(c)
    encode, teacher, vae = train.frozen(c, torch.device("cpu"))
    model = train.build(c, torch.device("cpu"), teacher.dim)[0]
    with torch.no_grad():
        for q in model.parameters():
            q.normal_(std=0.1, generator=torch.Generator().manual_seed(0))

    def parts(c, dataset, tokenize, null, *networks):
        batch = train.to_device(c, next(data.batches(dataset, tokenize, c)), null, torch.device("cpu"))
        return train.losses(c, model, batch, null, networks[0], networks[1], torch.Generator().manual_seed(0), networks[2])[1]
    pad = lambda a: torch.nn.functional.pad(a, (0, 0) * (a.ndim - 2) + (0, c.text.length - a.shape[1]))
    (online, _), (stored, _) = data.load(c), data.load(p)
    ids = tuple(map(pad, tok([""])))
    null = pad(stored.null[None]), pad(torch.ones(1, len(stored.null), dtype=torch.bool))
    want = parts(c, online, tok, ids, encode, teacher, vae)
    got = parts(p, stored, None, null, *train.frozen(p, torch.device("cpu"), stored.get(0, 0)[0]))
    for name in ("loss", "align"):
        assert abs(got[name] - want[name]) < 1e-4, name


def test_train_and_resume_on_shards_without_the_text_encoder(hub, source, shards, tmp_path, capsys):
    """The command as a user types it: no text encoder or teacher is loaded, the grid is of held-out captions, and it resumes."""
    import train
    p = both(hub, source, shards, *TRAIN)[1]
    flags = [*latent(hub, f"--data={shards}", *TRAIN, teacher=True)]
    moved = hub.parent / "away"
    whole, part = tmp_path / "whole", tmp_path / "part"
    for name in ("llama", "dino"):                          # config.json stays, weights are gone
        for file in (hub / name).glob("*.safetensors"):
            moved.mkdir(exist_ok=True), file.rename(moved / f"{name}-{file.name}")
    try:
        train.main([*flags, f"--out={whole}"])
        train.main([*flags, f"--out={part}", "--train.images=8"])
        train.main([*flags, f"--out={part}"])
    finally:
        for file in moved.iterdir():
            name, original = file.name.split("-", 1)
            file.rename(hub / name / original)
    losses = [[row["loss"] for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in row] for out in (whole, part)]
    assert len(losses[0]) == 2 and losses[0] == losses[1] and list((whole / "samples").glob("*.png"))
    from safetensors.torch import load_file
    a, b = (load_file(next(iter(sorted(out.glob("step_*"), reverse=True))) / "model.safetensors") for out in (whole, part))
    assert all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(SystemExit, match="holds no features"):
        train.frozen(p, torch.device("cpu"), {"latent": 0, "text": 0})


def test_training_on_buckets(source, tmp_path):
    """Pixels, five shapes, TREAD: every micro-batch has one of them, the loss is finite, and two halves make the whole."""
    import train
    flags = ["--config=debug", f"--data={source}", "--data.buckets=yes", "--model.size=64", "--train.batch=8", "--train.micro_batch=4",
             *[flag for flag in TRAIN if not flag.startswith(("--model", "--flow"))], "--model.route=1,2,0.5"]
    for out, images in (("whole", 32), ("part", 16), ("part", 32)):
        train.main([*flags, f"--out={tmp_path / out}", f"--train.images={images}"])
    losses = [[row["loss"] for row in map(json.loads, (tmp_path / out / "log.jsonl").read_text().splitlines()) if "loss" in row] for out in ("whole", "part")]
    assert len(losses[0]) == 4 and losses[0] == losses[1] and all(np.isfinite(losses[0]))


@pytest.mark.parametrize("tokens, fp8, features, times", [(60, False, False, 4.0), (120, True, False, 4.0), (70, True, True, 4.0)])
def test_bytes_of_a_sample_at_nitro_sizes(tokens, fp8, features, times, tmp_path):
    """So many times smaller than AMD's: 256 x 2048 states and a mask of int64 always, the latent, and 256 x 768 features, in fp16."""
    n, generator = 32, torch.Generator().manual_seed(0)
    piece = {"captions": [["a word or two " * (tokens // 3)]] * n, "latent": torch.randn(n, 32, 16, 16, generator=generator).half(),
             "text": torch.randn(n * tokens, 2048, generator=generator).bfloat16(), "tokens": torch.full((n,), tokens), "length": torch.full((n,), tokens)}
    if features:
        piece["teacher"] = torch.randn(n, 256, 768, generator=generator).bfloat16()
    for key in ("text", "teacher") if fp8 else ():
        if key in piece:
            piece[key], piece[key + "_scale"] = writer.eighth(piece[key])
    writer.save_file(writer.pack([piece]), tmp_path / "shard.safetensors")
    theirs = 256 * 2048 * 2 + 256 * 8 + 32 * 16 * 16 * 2 + (256 * 768 * 2 if features else 0)
    assert theirs / ((tmp_path / "shard.safetensors").stat().st_size / n) > times

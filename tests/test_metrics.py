"""Distances between sets of pictures: against closed forms, plain loops, and the classes of transformers and torchmetrics."""
import json
import math
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")                # must stand before huggingface_hub is imported
import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image
from safetensors.torch import load_file

import data
import evaluate
import pretrained
import sample
from model import Denoiser
from test_sample import DEBUG, RANKS, randomise, run, tiny  # noqa: F401  (run and tiny are fixtures)

# ruff: noqa: F811  (pytest's fixtures are named by arguments)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x):
    return {"mean": x.mean(0), "cov": x.T.cov()}


def bytes_of(n, height=20, width=20, seed=0):
    """Smooth random pictures, brighter below than above and in red: neither upside down nor as a negative are they the same."""
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.3, 1, 5)[:, None]
    coarse[:, 1:] *= 0.6
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") * 255).byte()


def tiny_dinov2(folder):
    from transformers import Dinov2Config, Dinov2Model
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=112, patch_size=28)
    Dinov2Model(Dinov2Config(**size, layerscale_value=1.0, initializer_range=0.2)).save_pretrained(folder)


def tiny_clip(folder):
    """With its tokenizer, whose words are letters."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {word: i for i, word in enumerate([*letters, *(a + "</w>" for a in letters), "<|startoftext|>", "<|endoftext|>"])}
    size = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    text = dict(size, vocab_size=len(vocab), bos_token_id=52, eos_token_id=53, pad_token_id=53)
    CLIPModel(CLIPConfig(text_config=text, vision_config=dict(size, image_size=32, patch_size=8), projection_dim=24,
                         initializer_factor=5.0)).save_pretrained(folder)
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Folders of a tiny random DINOv2 and a tiny random CLIP with its tokenizer, as one would download them."""
    home = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    tiny_dinov2(home / "dinov2")
    tiny_clip(home / "clip")
    (home / "dinov2" / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.3], "image_std": [0.2, 0.3, 0.25]}')
    return home


# ------------------------------------------------------------------------------------------------------------------
# Distances

def test_frechet_of_commuting_gaussians_is_the_closed_form():
    turn = torch.linalg.qr(randn(6, 6))[0]
    a, b = randn(6, seed=1).square(), randn(6, seed=2).square()
    a[0] = b[1] = 0                                         # degenerate ones too
    m, k = randn(6, seed=3), randn(6, seed=4)
    side = lambda mean, variance: {"mean": mean, "cov": turn * variance @ turn.T}
    want = (m - k).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert evaluate.frechet(side(m, a), side(k, b)) == pytest.approx(want.item(), rel=1e-7)
    assert abs(evaluate.frechet(side(m, a), side(m, a))) < 1e-7


def test_frechet_equals_the_nuclear_norm_and_is_symmetric():
    """tr (C1 C2)^1/2 is the sum of the singular values of X Y', whatever the matrices: no square root in this definition."""
    for n, d in ((200, 12), (8, 12)):                       # of full rank, and singular
        x, y = randn(n, d) @ randn(d, d, seed=1), randn(n + 5, d, seed=2) + 0.3
        centred = lambda z: (z - z.mean(0)) / (len(z) - 1) ** 0.5
        cross = torch.linalg.svdvals(centred(x) @ centred(y).T).sum()
        want = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * cross
        assert evaluate.frechet(moments(x), moments(y)) == pytest.approx(want.item(), rel=1e-6)
        assert evaluate.frechet(moments(y), moments(x)) == pytest.approx(want.item(), rel=1e-6)


class Flat(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1).double()


@pytest.mark.filterwarnings("ignore:Metric")
def test_frechet_and_kid_equal_torchmetrics():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    x, y = bytes_of(60, 4, 4), bytes_of(50, 4, 4, seed=1)
    fid = FrechetInceptionDistance(Flat(), input_img_size=(3, 4, 4)).set_dtype(torch.float64)
    kid = KernelInceptionDistance(Flat(), subsets=1, subset_size=50)
    for metric in (fid, kid):
        metric.update(x[:50] if metric is kid else x, real=True)
        metric.update(y, real=False)
    flat = lambda z: z.flatten(1).double()
    assert evaluate.frechet(moments(flat(x)), moments(flat(y))) == pytest.approx(fid.compute().item(), rel=1e-5)
    assert evaluate.kid(flat(x[:50]), flat(y))["mean"] == pytest.approx(kid.compute()[0].item(), rel=1e-6)


def slow_mmd(kernel, x, y):
    """-> unbiased, biased, pair by pair."""
    k = lambda a, b, same=True: [kernel(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if same or i != j]
    mean = lambda values: sum(values) / len(values)
    cross = 2 * mean(k(x, y))
    return mean(k(x, x, False)) + mean(k(y, y, False)) - cross, mean(k(x, x)) + mean(k(y, y)) - cross


@pytest.mark.parametrize("chunk", [4, 100])
def test_mmd_equals_a_loop_over_pairs(chunk):
    x, y = randn(9, 3), randn(14, 3, seed=1) + 0.5
    dot = lambda p, q: sum(a * b for a, b in zip(p, q))
    kernels = {evaluate.cubic: lambda p, q: (dot(p, q) / 3 + 1) ** 3,
               evaluate.gaussian: lambda p, q: math.exp(-math.dist(p, q) ** 2 / 200)}
    for kernel, slow in kernels.items():
        got, want = evaluate.mmd(kernel, x, y, chunk), slow_mmd(slow, x.tolist(), y.tolist())
        assert got == pytest.approx(want, rel=1e-9, abs=1e-13) and got[0] < got[1]


def test_gaussian_mmd_of_gaussians_is_the_closed_form():
    """E k = (s / (s + 2 v))^(D / 2) exp(-|m|^2 / (2 (s + 2 v))) for the difference of two of variance v; s = sigma^2 = 100."""
    n, d, v = 1500, 2, 25.0
    x, y = v ** 0.5 * randn(n, d), v ** 0.5 * randn(n, d, seed=1) + torch.tensor([6.0, 0.0])
    flat = 100 / (100 + 2 * v)
    want = 2 * flat * (1 - math.exp(-36 / (2 * (100 + 2 * v))))
    unbiased, biased = evaluate.mmd(evaluate.gaussian, x, y)
    assert unbiased == pytest.approx(want, rel=0.05)
    assert biased - unbiased == pytest.approx(2 * (1 - flat) / n, rel=0.05)             # the diagonal's 1 among the rest
    null = evaluate.mmd(evaluate.gaussian, x, v ** 0.5 * randn(n, d, seed=2))[0]
    assert abs(null) < 0.01 * want


def test_kid_takes_subsets_only_where_they_differ():
    x, y = randn(40, 4), randn(40, 4, seed=1) + 1
    few = evaluate.kid(x, y)
    assert (few["subsets"], few["size"], few["std"]) == (1, 40, None) and few["mean"] == pytest.approx(evaluate.mmd(evaluate.cubic, x, y)[0])
    many = evaluate.kid(x, y, size=10, times=50)
    assert (many["subsets"], many["size"]) == (50, 10) and many == evaluate.kid(x, y, size=10, times=50)
    assert abs(many["mean"] - few["mean"]) < 4 * many["std"] / 50 ** 0.5 and many["std"] > 0


# ------------------------------------------------------------------------------------------------------------------
# Features

def by_pillow(image, size, mean, std):
    x = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC)
    return ((torch.from_numpy(np.array(x)).double() / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1).float()[None]


@pytest.mark.parametrize("height, width", [(20, 20), (300, 300), (48, 96)])
def test_networks_see_pillows_bicubic_of_the_right_side_up_bytes(networks, height, width):
    from transformers import CLIPModel, Dinov2Model
    images = bytes_of(3, height, width)
    rough = lambda image, size: np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size, size), Image.Resampling.BICUBIC))
    for image, mine in zip(images, evaluate.resized(images, 32, "cpu")):
        assert np.abs(rough(image, 32).astype(float) - mine.permute(1, 2, 0).numpy()).max() <= 1             # a rounded pass per axis
    dino, clip = Dinov2Model.from_pretrained(networks / "dinov2").eval(), CLIPModel.from_pretrained(networks / "clip").eval()
    with torch.no_grad():
        tokens = [dino(by_pillow(image, 224, [0.4, 0.5, 0.3], [0.2, 0.3, 0.25])).last_hidden_state[0, 0] for image in images]
        from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
        ids = torch.tensor([[52, 0, 53]])
        embeds = [clip(ids, by_pillow(image, 32, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)).image_embeds[0] for image in images]
    for name, want in (("dinov2", tokens), ("clip", embeds)):
        encode, want = getattr(evaluate, name)(str(networks / name), "cpu"), torch.stack(want)
        error = lambda pictures, encode=encode, want=want: ((encode(pictures) - want).norm() / want.norm()).item()
        assert error(images) < 0.01                         # of bytes that differ by one here and there
        assert min(error(255 - images), error(images.flip(2)), error(images.flip(1))) > 0.1
        assert encode(images).shape == (3, encode.dim) and torch.allclose(encode(list(images)), encode(images))


def test_clip_score_equals_the_class_and_long_text_keeps_its_end(networks):
    from transformers import AutoTokenizer, CLIPModel
    clip, own = CLIPModel.from_pretrained(networks / "clip").eval(), AutoTokenizer.from_pretrained(networks / "clip")
    encode, images = evaluate.clip(str(networks / "clip"), "cpu"), bytes_of(4, 32, 32)
    texts = ["a red apple", "", "An owl", "many words and more " * 30]
    rows = own(texts, truncation=True, max_length=77)["input_ids"]
    assert len(rows[3]) == 77 and rows[3][-1] == own.eos_token_id and len(rows[0]) == 11
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    with torch.no_grad():                                   # one by one, without padding
        each = [clip(torch.tensor([row]), by_pillow(image, 32, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)).logits_per_image.item() for row, image in zip(rows, images)]
    want = [100 * max(0, x / clip.logit_scale.exp().item()) for x in each]
    got = [evaluate.clip_score(encode(images[i:i + 1]), encode.read(texts)[i:i + 1]) for i in range(4)]
    assert got == pytest.approx(want, abs=1e-3) and max(want) > 1 and min(each) < 0
    assert evaluate.clip_score(encode(images), encode.read(texts)) == pytest.approx(sum(want) / 4, abs=1e-3)


class Channels:
    """In a network's place: nine numbers of each picture, exact in any order."""
    dim, mark = 9, "nine"

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        self.seen += [image.shape for image in images]
        return torch.stack([image[:, :3, 0].flatten() for image in images]).float() / 255

    def read(self, texts):
        return torch.tensor([[len(text)] * 9 for text in texts]).float()


def test_streamed_mean_and_covariance_are_numpys():
    images, network = bytes_of(30), Channels()
    batches = (([*range(i, min(i + 7, 30))], images[i:i + 7]) for i in range(0, 30, 7))
    got = evaluate.measure({"a": network, "b": Channels()}, {"b"}, batches, 30, "cpu")
    x = Channels()(images).double()
    for found in got.values():
        assert np.allclose(found["mean"], x.numpy().mean(0), rtol=1e-12) and np.allclose(found["cov"], np.cov(x.numpy().T), rtol=1e-9)
    assert "rows" not in got["a"] and torch.equal(got["b"]["rows"], x.float())


def test_a_latent_is_decoded_and_a_stored_picture_is_not():
    class Planted:
        def get(self, i, choice):
            return ({"latent": torch.full((4, 2, 2), -0.5)} if i else {"image": torch.full((3, 8, 8), 7, dtype=torch.uint8)}), "text"

    class Vae:
        decode = staticmethod(lambda z: z[:, :3].repeat_interleave(4, 2).repeat_interleave(4, 3))
    stored, decoded = (evaluate.picture_of(Planted(), i, Vae()) for i in range(2))
    assert (stored == 7).all() and (decoded == 64).all() and decoded.dtype == torch.uint8 and decoded.shape == (3, 8, 8)


# ------------------------------------------------------------------------------------------------------------------
# Samples against real pictures

def loaded(home):
    return {name: getattr(evaluate, name)(str(home / name), "cpu") for name in ("dinov2", "clip")}


def planted(monkeypatch, dataset, change=lambda x: x, first=0):
    """generate() gives the very pictures of the captions. -> a list of what was asked for"""
    asked, index = [], data.first_items(dataset, len(dataset))

    def perfect(model, c, tokenize, encode, prompts, seeds, progress, vae=None):
        asked.extend(zip(seeds, prompts))
        return change(torch.stack([torch.from_numpy(dataset.get(index[seed - first], 0)[0]) for seed in seeds]))
    monkeypatch.setattr(evaluate, "generate", perfect)
    return asked


def compare(tiny, dataset, networks, home, n=40, what=("fd", "kid", "cmmd", "clip"), seed=0):
    return evaluate.against_real(tiny[0], DEBUG, tiny[1], None, dataset, networks, what, n, seed, home)


def test_real_pictures_are_at_no_distance_and_worse_ones_farther(tiny, networks, tmp_path, monkeypatch):
    train = data.load(DEBUG)[0]
    noise = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    changes = {"same": lambda x: x, "shifted": lambda x: x.roll(2, 3), "negative": lambda x: 255 - x, "noise": lambda x: noise[:len(x)]}
    found = {}
    for name, change in changes.items():
        asked = planted(monkeypatch, train, change, first=5)
        found[name] = compare(tiny, train, loaded(networks), tmp_path, seed=5)
        order = data.first_items(train, 40)
        assert asked == [(5 + i, train.captions(j)[0]) for i, j in enumerate(order)]        # each seed once, each caption with its picture
    same, shifted, negative, noisy = found.values()
    assert abs(same["fd"]) < 1e-6 * shifted["fd"] and 2 * shifted["fd"] < min(negative["fd"], noisy["fd"])
    assert same["cmmd"]["biased"] == pytest.approx(0, abs=1e-9) and same["cmmd"]["unbiased"] < 0
    assert 0 < 2 * shifted["cmmd"]["biased"] < min(negative["cmmd"]["biased"], noisy["cmmd"]["biased"])
    assert same["kid"]["mean"] < shifted["kid"]["mean"] < min(negative["kid"]["mean"], noisy["kid"]["mean"])
    assert same["clip"]["samples"] == pytest.approx(same["clip"]["real"]) and noisy["clip"]["real"] == same["clip"]["real"]
    assert noisy["clip"]["samples"] != noisy["clip"]["real"] and same["pictures"] == 40


def test_real_pictures_are_measured_once_and_a_stale_or_damaged_file_is_made_again(tmp_path, capsys):
    train = data.load(DEBUG)[0]
    captions = [train.captions(item)[0] for item in train.items()[:10]]
    file = tmp_path / "features" / "net-10.safetensors"

    def look(index=slice(0, 10), keep=(), mark="nine"):
        network = Channels()
        network.mark = mark
        captured = evaluate.reference({"net": network}, keep, train, train.items()[index], captions, None, file.parent, "cpu")["net"]
        return captured, len(network.seen), capsys.readouterr().out
    first, seen, said = look()
    assert seen == 10 and said == "" and [x.name for x in file.parent.iterdir()] == ["net-10.safetensors"]
    again, seen, said = look()
    assert seen == 0 and said == "" and all(torch.equal(again[key], first[key]) for key in first) and "rows" not in again
    for change, reason in ((dict(keep=("net",)), "single features"), (dict(mark="other"), "another network"), (dict(index=slice(1, 11)), "other pictures")):
        _, seen, said = look(**change)
        assert seen == 10 and reason in said and said.count("\n") == 1
    flipped = lambda x: x[:-9] + bytes([x[-9] ^ 1]) + x[-8:]
    for damage, reason in ((flipped, "checksum"), (lambda x: x[:100], "cannot be read"), (lambda x: b"", "cannot be read")):
        look()
        file.write_bytes(damage(file.read_bytes()))
        capsys.readouterr()
        found, seen, said = look()
        assert seen == 10 and reason in said and said.count("\n") == 1 and torch.equal(found["cov"], first["cov"])
        assert look()[1:] == (0, "")
    shutil.rmtree(file.parent)
    file.parent.write_text("in the way")
    assert look()[1] == 10 and "cannot be" in look()[2]


def test_the_checksum_of_a_network_is_of_its_weights_and_what_it_sees(networks, tmp_path):
    from transformers import Dinov2Model
    mark = evaluate.dinov2(str(networks / "dinov2"), "cpu").mark
    assert mark == evaluate.dinov2(str(networks / "dinov2"), "cpu").mark != evaluate.dinov2(str(networks / "dinov2"), "cpu", size=112).mark
    model = Dinov2Model.from_pretrained(networks / "dinov2")
    about = (networks / "dinov2" / "preprocessor_config.json").read_text()
    for bias, text, same in ((0, about, True), (0, about.replace("0.3", "0.4"), False), (1e-6, about, False)):
        model.layernorm.bias.data[0] += bias
        model.save_pretrained(tmp_path)                     # another place, the same network
        (tmp_path / "preprocessor_config.json").write_text(text)
        assert (evaluate.dinov2(str(tmp_path), "cpu").mark == mark) == same


# ------------------------------------------------------------------------------------------------------------------
# Pictures for the scorers of others

PROMPTS = ["a red apple", "two dogs", "a dog left of a tree", "tiger face", "owl"]


@pytest.fixture
def asked(tmp_path):
    """GenEval's metadata and DPG-Bench's folder of prompts, in small."""
    lines = [json.dumps({"tag": "single_object", "include": [{"class": "x", "count": 1}], "prompt": prompt}) for prompt in PROMPTS]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "prompts").mkdir()
    for name, prompt in zip(("b7", "a1", "partiprompts0"), PROMPTS):
        (tmp_path / "prompts" / f"{name}.txt").write_text(prompt + "\n")
    return lines


def read(path):
    return torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--device=cpu", *argv])
    evaluate.main()


def test_geneval_folders_are_what_the_scorer_reads_and_resume(run, asked, tiny, monkeypatch, capsys):
    command(monkeypatch, "--geneval=metadata.jsonl", "--out=gen", "--seed=3")
    out = Path("gen")
    assert sorted(x.name for x in out.iterdir()) == [f"{i:05d}" for i in range(5)]
    want = sample.generate(tiny[0], DEBUG, tiny[1], None, [p for p in PROMPTS for _ in range(4)], [*range(3, 23)])
    for i, line in enumerate(asked):
        folder = out / f"{i:05d}"
        assert json.load(open(folder / "metadata.jsonl")) == json.loads(line)
        assert sorted(x.name for x in folder.rglob("*") if x.is_file()) == ["0000.png", "0001.png", "0002.png", "0003.png", "metadata.jsonl"]
        for j in range(4):
            assert (read(folder / "samples" / f"{j:04d}.png").int() - want[4 * i + j].int()).abs().max() <= 1
    assert len({x.read_bytes() for x in out.rglob("*.png")}) == 20

    times = {x: x.stat().st_mtime_ns for x in out.rglob("*.png")}
    before = (out / "00002/samples/0001.png").read_bytes()
    (out / "00002/samples/0001.png").unlink()                                           # as if killed in the middle of this prompt
    (out / "00002/samples/0001.png.part").write_bytes(b"half")
    capsys.readouterr()
    command(monkeypatch, "--geneval=metadata.jsonl", "--out=gen", "--seed=3")
    assert "1 of them drawn now, 4 before" in capsys.readouterr().out
    assert {x.parts[1] for x in times if x.stat().st_mtime_ns != times[x]} == {"00002"}
    assert (out / "00002/samples/0001.png").read_bytes() == before and not [*out.rglob("*.part")]
    with pytest.raises(SystemExit, match="another --out"):
        command(monkeypatch, "--geneval=metadata.jsonl", "--out=gen", "--seed=3", "--guidance=2")


def test_dpg_squares_are_what_the_scorer_cuts(run, asked, tiny, monkeypatch, capsys):
    command(monkeypatch, "--dpg=prompts")
    out = Path("out/dpg")
    assert sorted(x.name for x in out.iterdir()) == ["a1.png", "b7.png", "partiprompts0.png"]
    for i, (name, prompt) in enumerate((("a1", PROMPTS[1]), ("b7", PROMPTS[0]), ("partiprompts0", PROMPTS[2]))):
        whole = Image.open(out / f"{name}.png")
        want = sample.generate(tiny[0], DEBUG, tiny[1], None, [prompt] * 4, [*range(4 * i, 4 * i + 4)])
        for box, image in zip(((0, 0, 32, 32), (32, 0, 64, 32), (0, 32, 32, 64), (32, 32, 64, 64)), want):     # the scorer's crops
            cut = torch.from_numpy(np.asarray(whole.crop(box)).copy()).permute(2, 0, 1)
            assert (cut.int() - image.int()).abs().max() <= 1
        assert whole.size == (64, 64) and whole.info["prompt"] == prompt
    capsys.readouterr()
    command(monkeypatch, "--dpg=prompts")
    assert "0 of them drawn now, 3 before" in capsys.readouterr().out


def two_ranks(rank, path):
    torch.set_num_threads(1)
    os.chdir(path)
    torch.distributed.init_process_group("gloo", f"file://{path}/meet", rank=rank, world_size=2)
    tiny = randomise(Denoiser(DEBUG)), pretrained.tokenizer(DEBUG, RANKS)
    found = compare(tiny, data.load(DEBUG)[1], {"dinov2": Channels(), "clip": Channels()}, Path("features"), n=11)
    drawn = evaluate.benchmark(tiny[0], DEBUG, tiny[1], None, evaluate.geneval("metadata.jsonl"), Path("gen"), {})
    pictures = evaluate.retrieval(tiny[0], DEBUG, tiny[1], None, *(d.emoji for d in data.load(DEBUG)), n=5, sets=("heldout",))
    Path(f"{rank}.json").write_text(json.dumps([found, drawn, pictures]))
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_work_and_find_what_one_does(tiny, asked, tmp_path):
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path),), nprocs=2)
    (both, drawn, found), (_, drawn_too, found_too) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    one = compare(tiny, data.load(DEBUG)[1], {"dinov2": Channels(), "clip": Channels()}, tmp_path / "features of one", n=11)
    near = dict(rel=1e-3, abs=1e-5)                         # a byte may differ by one in another batch
    assert both["fd"] == pytest.approx(one["fd"], **near) and both["kid"]["mean"] == pytest.approx(one["kid"]["mean"], **near)
    assert both["cmmd"] == pytest.approx(one["cmmd"], **near) and both["clip"] == pytest.approx(one["clip"], **near)
    for name in ("dinov2", "clip"):
        a, b = (load_file(tmp_path / home / f"{name}-11.safetensors") for home in ("features", "features of one"))
        assert a.keys() == b.keys() == {"mean", "cov", "rows"} and torch.equal(a["rows"], b["rows"])
        assert torch.allclose(a["mean"], b["mean"], rtol=1e-12) and torch.allclose(a["cov"], b["cov"], rtol=1e-9, atol=1e-12)
    assert drawn == drawn_too == 5 and len([*(tmp_path / "gen").glob("*/samples/*.png")]) == 20
    assert found == found_too == evaluate.retrieval(tiny[0], DEBUG, tiny[1], None, *(d.emoji for d in data.load(DEBUG)), n=5, sets=("heldout",))


# ------------------------------------------------------------------------------------------------------------------
# The command

def test_command_on_a_folder_of_pictures(run, networks, monkeypatch, capsys):
    folder = Path("mine")
    folder.mkdir()
    for i, image in enumerate(bytes_of(30, 24, 30)):
        sample.picture(image).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"square {i}\n")
    argv = ("--what=loss,fd,kid,cmmd,clip", f"--dinov2={networks}/dinov2", f"--clip={networks}/clip", "--data=mine", "--set=both", "--steps=2")
    command(monkeypatch, *argv)
    said, found = capsys.readouterr().out, json.loads(Path("out/evaluation.json").read_text())
    assert found["pictures"] == found["of"] == 30 and found["data"] == "mine" and found["loss"]["loss"] > 0
    assert f"FD {found['fd']:.3f}" in said and f"CMMD {found['cmmd']['biased']:.3f}" in said and "30 pictures are few" in said
    assert sorted(x.name for x in Path("mine.features").iterdir()) == ["clip-30.safetensors", "dinov2-30.safetensors"]
    command(monkeypatch, *argv)
    assert json.loads(Path("out/evaluation.json").read_text()) == found
    command(monkeypatch, "--data=mine", "--steps=2")        # no retrieval of a folder, and no word about it
    assert "validation loss" in capsys.readouterr().out
    whole = (folder / "7.png").read_bytes()
    (folder / "7.png").write_bytes(whole[:len(whole) // 2])                             # its header is still good
    with pytest.raises(SystemExit, match="1 of 30 pictures in mine cannot be used"):
        command(monkeypatch, "--what=fd", *argv[1:])


def test_features_of_the_built_in_set_lie_in_out(run, networks, monkeypatch):
    command(monkeypatch, "--what=fd", f"--dinov2={networks}/dinov2", "--n=6", "--steps=2", "--out=here/numbers.json")
    assert [x.name for x in Path("here/features").iterdir()] == ["dinov2-6.safetensors"]
    assert json.loads(Path("here/numbers.json").read_text())["pictures"] == 6


@pytest.mark.parametrize("argv, says", [
    (["--what=fd", "--dinov2=nowhere/at/all"], "--dinov2=nowhere/at/all"),
    (["--what=clip", "--clip=nowhere/at/all"], "--clip=nowhere/at/all"),
    (["--what=fd", "--dinov2={networks}/clip"], "not a DINO"),
    (["--what=cmmd", "--clip={networks}/dinov2"], "not a CLIP"),
    (["--what=fd", "--n=1"], "two or more"),
    (["--what=fd,fid"], "fid"),
    (["--geneval=nowhere.jsonl"], "nowhere.jsonl"),
    (["--geneval=bad.jsonl"], "line 2"),
    (["--geneval=empty.jsonl"], "line 1"),
    (["--dpg=nowhere"], "nowhere"),
    (["--geneval=a", "--dpg=b"], "one of"),
    (["--geneval=a", "--what=loss"], "one of"),
    (["--what=loss", "--data=nowhere"], "nowhere"),
])
def test_mistakes_end_in_one_line(run, networks, monkeypatch, argv, says):
    Path("bad.jsonl").write_text('{"prompt": "a dog"}\n{"text": "a cat"}\n')
    Path("empty.jsonl").write_text("")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *(word.format(networks=networks) for word in argv))
    assert says in stop.value.code and stop.value.code.startswith("error: ") and "\n" not in stop.value.code


def test_one_picture_has_no_covariance(tiny, tmp_path):
    class One(list):
        captions = [["alone"]]
    with pytest.raises(SystemExit, match="two real pictures"):
        compare(tiny, One([0]), {"dinov2": Channels()}, tmp_path, what=("fd",))

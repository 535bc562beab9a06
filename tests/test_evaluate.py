"""The numbers against slow definitions and planted pictures."""
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing

import configs
import data
import evaluate
import pretrained
from model import Denoiser, unpatchify
from test_sample import DEBUG, RANKS, randomise, run, tiny, watch  # noqa: F401  (run and tiny are fixtures)

# ruff: noqa: F811  (pytest's fixtures are named by arguments)


@pytest.fixture(scope="module")
def sets():
    return data.load(DEBUG)


@pytest.fixture(scope="module")
def emoji(sets):
    return [dataset.emoji for dataset in sets]


def renderings(dataset, pairs):
    return torch.from_numpy(np.stack([dataset.render(e, b) for e, b in pairs]))


# ------------------------------------------------------------------------------------------------------------------
# Validation loss

def slow_losses(model, c, tokenize, dataset, n):
    """One item at a time, from the definition. -> [(t, loss)]"""
    found = []
    for i in range(n):
        image, caption = dataset.get(data.first_items(dataset, n)[i], 0)
        t = 0.05 + 0.95 * math.modf((i + 0.5) * (math.sqrt(5) - 1) / 2)[0]
        x = torch.from_numpy(image)[None].float() / 127.5 - 1
        eps = c.flow.noise * torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(i))[None]
        z = (1 - t) * x + t * eps
        with torch.no_grad():
            out = unpatchify(model(z, torch.tensor([t]), *tokenize([caption]))[0], 8, 32, 32)
        v = (z - out) / t if c.flow.prediction == "x" else out
        found.append((t, (v - (z - x) / t).square().mean().item()))                     # (z - x) / t = eps - x
    return found


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_validation_loss_equals_a_slow_definition(tiny, sets, prediction):
    model, tokenize = tiny
    c = replace(DEBUG, flow=replace(DEBUG.flow, prediction=prediction))
    slow = slow_losses(model, c, tokenize, sets[1], 30)
    seen = watch(model)
    got = evaluate.validation_loss(model, c, tokenize, None, sets[1], 30)
    assert [n for n, _ in seen] == [8, 8, 8, 6] and all(keep is None for _, keep in seen)
    assert got["images"] == 30
    assert got["loss"] == pytest.approx(sum(loss for _, loss in slow) / 30, rel=1e-5)
    for k, mean in enumerate(got["bins"]):
        mine = [loss for t, loss in slow if k == math.floor((t - 0.05) / 0.095)]
        assert 2 <= len(mine) <= 4 and mean == pytest.approx(sum(mine) / len(mine), rel=1e-5)
    assert max(got["bins"]) > 1.1 * min(got["bins"])        # else the bins could be mixed up


def test_validation_loss_of_few_images_and_other_micro_batches(tiny, sets):
    model, tokenize = tiny
    loss = lambda size, n=20: evaluate.validation_loss(
        model, replace(DEBUG, train=replace(DEBUG.train, micro_batch=size)), tokenize, None, sets[1], n)
    assert loss(3)["loss"] == pytest.approx(loss(20)["loss"], rel=1e-5)
    few = loss(8, 3)
    assert few["images"] == 3 and few["bins"].count(None) == 7
    json.dumps(few, allow_nan=False)


def two_ranks(rank, path, c):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}/meet", rank=rank, world_size=2)
    found = evaluate.validation_loss(randomise(Denoiser(c)), c, pretrained.tokenizer(c, RANKS), None, data.load(c)[1], 20, rank, 2)
    Path(path, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


def test_validation_loss_of_two_processes(tiny, sets, tmp_path):
    torch.multiprocessing.spawn(two_ranks, (str(tmp_path), DEBUG), nprocs=2)
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    one = evaluate.validation_loss(tiny[0], DEBUG, tiny[1], None, sets[1], 20)
    assert a == b and a["images"] == one["images"] == 20
    assert a["loss"] == pytest.approx(one["loss"], rel=1e-6) and a["bins"] == pytest.approx(one["bins"], rel=1e-6)


# ------------------------------------------------------------------------------------------------------------------
# Retrieval

def test_distance_is_the_sum_of_squared_differences(emoji):
    train, gallery = emoji[0], emoji[0].pairs[:9]
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    got = evaluate.distances(images, train, gallery, evaluate.pixels, chunk=4)
    want = [[(a.double() - b).square().sum() for b in renderings(train, gallery)] for a in images]
    assert torch.equal(got, torch.tensor(want))                                         # exact: pictures that are the same tie


def test_rank_counts_the_groups_that_are_nearer():
    g = torch.Generator().manual_seed(0)
    distance = torch.randint(0, 6, (50, 12), generator=g).double()                       # many ties
    group, right = torch.arange(12) % 5, torch.randint(0, 5, (50,), generator=g)
    got = evaluate.rank_of(right, group, distance)
    for row, r, rank in zip(distance.tolist(), right.tolist(), got.tolist()):
        nearest = [min(d for d, k in zip(row, group.tolist()) if k == i) for i in range(5)]
        assert rank == sum(d < nearest[r] for d in nearest)
    assert len(set(got.tolist())) == 5


def test_planted_pictures(emoji):
    train, val = emoji
    gallery = sorted(train.pairs + val.pairs)
    assert len(set(gallery)) == len(train.names) * len(train.colors)
    for pairs in (train.pairs[::40], val.pairs[:20]):
        exact = renderings(train, pairs)
        noisy = (exact.float() + 8 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 255).byte()
        for images in (exact, noisy):
            found = evaluate.score(images, pairs, train, gallery, evaluate.pixels)
            assert found.pop("captions") == len(pairs) >= 15 and set(found.values()) == {1.0}
        others = [((e + 1) % len(train.names), b) for e, b in pairs]
        found = evaluate.score(renderings(train, others), pairs, train, gallery, evaluate.pixels)
        assert found["emoji top-1"] == found["both top-1"] == 0 and found["background"] == 1 and found["emoji top-5"] < 0.5
        others = [(e, (b + 1) % len(train.colors)) for e, b in pairs]
        found = evaluate.score(renderings(train, others), pairs, train, gallery, evaluate.pixels)
        assert found["emoji top-1"] == 1 and found["background"] == found["both top-1"] == 0


def test_drawings_that_are_the_same_count_as_each_other():
    train = data.load(configs.parse(["--config=debug", "--data.subset=all"]))[0].emoji
    first, twins = {}, []
    for e in range(len(train.names)):
        twins += [(first.setdefault(train.render(e, 0).tobytes(), e), e)]
    twins = [pair for pair in twins if pair[0] != pair[1]]
    gallery = [(e, b) for pair in twins for e in pair for b in (0, 1)]
    found = evaluate.score(renderings(train, gallery), gallery, train, sorted(set(gallery)), evaluate.pixels)
    assert len(twins) > 5 and found["emoji top-1"] == found["both top-1"] == found["background"] == 1


def test_features_of_a_vision_model(emoji, tmp_path):
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    small = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7)
    Dinov2Model(small).save_pretrained(tmp_path)
    train, gallery = emoji[0], emoji[0].pairs[:60]
    feature = evaluate.vision(str(tmp_path), DEBUG, torch.device("cpu"))
    rows = feature(renderings(train, gallery[:3]))
    assert rows.shape == (3, 32) and torch.allclose(rows.norm(dim=1), torch.ones(3))
    distance = evaluate.distances(renderings(train, gallery[:3]), train, gallery[:5], feature)
    assert torch.allclose(distance[:, :3], 2 - 2 * rows @ rows.T, atol=1e-5)
    found = evaluate.score(renderings(train, gallery[::7]), gallery[::7], train, gallery, feature)
    assert found["emoji top-1"] == found["background"] == found["both top-1"] == 1


def test_retrieval_samples_each_caption_once_from_a_seed_of_its_own(emoji, tiny, monkeypatch):
    train, val = emoji
    asked = []

    def perfect(model, c, tokenize, encode, prompts, seeds, progress, vae=None):
        asked.extend(zip(prompts, seeds))
        pair_of = {train.caption(e, b): (e, b) for e, b in train.pairs + val.pairs}
        return renderings(train, [pair_of[p] for p in prompts])
    monkeypatch.setattr(evaluate, "generate", perfect)
    found = evaluate.retrieval(tiny[0], DEBUG, tiny[1], None, train, val, n=12, seed=100)
    prompts, seeds = zip(*asked)
    assert sorted(seeds) == [*range(100, 124)] and len(set(prompts)) == 24
    names = lambda dataset: {dataset.caption(e, b) for e, b in dataset.pairs}
    assert set(prompts[:12]) <= names(train) and set(prompts[12:]) <= names(val)
    assert all(found[s][key] == 1 for s in ("seen", "heldout") for key in found[s] if key != "captions")
    e, b = len(train.names), len(train.colors)
    chance = found["chance"]
    assert (chance["emoji top-5"], chance["both top-1"], chance["background"]) == (5 / e, 1 / (e * b), 1 / b)
    asked.clear()
    found = evaluate.retrieval(tiny[0], DEBUG, tiny[1], None, train, val, n=10 ** 6, sets=("heldout",))
    assert found["heldout"]["captions"] == len(val)


# ------------------------------------------------------------------------------------------------------------------

def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *argv])
    evaluate.main()


def test_command(run, monkeypatch, capsys, tiny, sets):
    command(monkeypatch, "--n=3", "--steps=2", "--device=cpu", "--guidance", "1.5")
    said = capsys.readouterr().out
    found = json.loads(Path("out/evaluation.json").read_text())
    assert found["steps"] == 2 and found["guidance"] == 1.5 and "step_00000020" in found["checkpoint"]
    assert found["loss"] == evaluate.validation_loss(tiny[0], DEBUG, tiny[1], None, sets[1], DEBUG.train.val_images)
    assert found["retrieval"]["seen"]["captions"] == found["retrieval"]["heldout"]["captions"] == 3
    assert f"{found['loss']['loss']:.4f}" in said and "heldout" in said and "chance" in said


@pytest.mark.parametrize("argv, says", [
    (["--what=fid"], "fid"),
    (["--n=0"], "--n"),
    (["--set=train"], "--set"),
    (["--checkpoint=nowhere"], "nowhere"),
    (["--features=nowhere/at/all", "--what=retrieval"], "nowhere/at/all"),
    (["--steps=0"], "steps"),
])
def test_mistakes_end_in_one_line(run, monkeypatch, argv, says):
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *argv)
    assert says in stop.value.code and stop.value.code.startswith("error: ") and "\n" not in stop.value.code


def test_retrieval_of_a_folder_is_refused(run, monkeypatch):
    configs.save(replace(DEBUG, data=replace(DEBUG.data, source="images")), run / "config.json")
    with pytest.raises(SystemExit, match="--what=loss"):
        command(monkeypatch, "--what=retrieval")

"""The loop with real processes: resume, kill, signals, ranks, bad gradients; and what one micro-batch computes."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import cluster
import configs
import data
import flow
import kernels
import muon
import pretrained
import train
from model import Denoiser, patchify

ROOT = Path(__file__).parent.parent
TINY = "--config=debug --train.precision=fp32 --optim.ns_dtype=fp32 --train.eval_every=0 --train.log_every=1 --train.val_images=8 --sample.steps=1".split()
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*args, ranks=1, **options):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.Popen([sys.executable, *launch, "train.py", *TINY, *map(str, args)], cwd=ROOT, env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(*args, code=0, **options):
    process = start(*args, **options)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, out[-1000:] + err[-3000:]
    return out, err


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def wait_for_images(process, folder, images):
    """Until the run has logged so many images."""
    deadline = time.time() + 60
    while time.time() < deadline and process.poll() is None:
        if (Path(folder) / "log.jsonl").exists() and f'"images": {images},' in (Path(folder) / "log.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"no image {images}: {process.communicate()[1][-2000:]}" if process.poll() is not None else "too slow")


def assert_same_run(a, b, step=20):
    """The checkpoints after `step` are the same to the bit: weights, average, optimizer."""
    a, b = Path(a) / f"step_{step:08d}", Path(b) / f"step_{step:08d}"
    for name in ("model.safetensors", "ema.safetensors"):
        x, y = load_file(a / name), load_file(b / name)
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name
    x, y = (load_file(p / "optimizer.safetensors") for p in (a, b))
    assert x.keys() == y.keys() and len(x) > 50 and all(torch.equal(x[k], y[k]) for k in x)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed: 20 steps."""
    folder = tmp_path_factory.mktemp("whole")
    run(f"--out={folder}")
    return folder


def test_a_run_leaves_what_it_should(whole):
    first, *rest = rows(whole)
    assert first["config"]["model"]["width"] == 64 and {"git", "torch", "device"} <= first.keys()
    assert [r["step"] for r in rest if "loss" in r] == list(range(1, 21))
    last = rest[-1]
    assert last["val_loss"] > 0 and len(last["val_bins"]) == 10
    assert sorted(p.name for p in whole.glob("step_*")) == ["step_00000010", "step_00000020"]
    assert not any(k.startswith("align") for k in load_file(whole / "step_00000020/ema.safetensors"))
    for picture in (whole / "loss.png", *(whole / "samples").glob("*.png")):
        assert np.asarray(Image.open(picture)).std() > 5
    out, err = run(f"--out={whole}")                                            # the same command again
    assert "is finished" in out + err and len(rows(whole)) == len(rest) + 1


def test_killed_at_random_it_ends_as_if_undisturbed(whole, tmp_path):
    generator = np.random.default_rng(0)
    for _ in range(3):
        process = start(f"--out={tmp_path}", "--train.save_every=48")
        seen = [r["images"] for r in rows(tmp_path) if "loss" in r] if (tmp_path / "log.jsonl").exists() else [0]
        wait_for_images(process, tmp_path, min(304, max(seen) + 16 * int(generator.integers(2, 5))))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    (tmp_path / "step_00000099.tmp").mkdir()                                    # what a kill in mid-write leaves
    run(f"--out={tmp_path}", "--train.save_every=48")
    assert_same_run(whole, tmp_path)
    steps = [r["step"] for r in rows(tmp_path) if "loss" in r]
    assert steps == sorted(set(steps)) and steps[-1] == 20


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(whole, tmp_path, number):
    process = start(f"--out={tmp_path}")
    wait_for_images(process, tmp_path, 16)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err and "saved at image" in out + err
    assert list(tmp_path.glob("step_*")) and not (tmp_path / "step_00000020").exists()
    run(f"--out={tmp_path}")
    assert_same_run(whole, tmp_path)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    for name, damage in (("model.safetensors", lambda b: b[:-100]), ("optimizer.safetensors", lambda b: b[:-200] + bytes([b[-200] ^ 1]) + b[-199:])):
        shutil.copytree(whole / "step_00000020", tmp_path / "run/step_00000020", dirs_exist_ok=True)
        file = tmp_path / "run/step_00000020" / name
        file.write_bytes(damage(file.read_bytes()))
        out, err = run(f"--out={tmp_path / 'run'}")
        assert "step_00000020 is damaged" in err and "resumed at image 160" in out + err
        assert_same_run(whole, tmp_path / "run")


def test_two_processes_follow_the_trajectory_of_one(whole, tmp_path):
    run(f"--out={tmp_path}", ranks=2)
    losses = [[r["loss"] for r in rows(f) if "loss" in r] for f in (whole, tmp_path)]
    assert len(losses[0]) == 20 and np.allclose(*losses, rtol=1e-5)
    a, b = (load_file(f / "step_00000020/model.safetensors") for f in (whole, tmp_path))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5
    assert abs(rows(whole)[-1]["val_loss"] - rows(tmp_path)[-1]["val_loss"]) < 1e-4
    process = start(f"--out={tmp_path / 'odd'}", "--train.micro_batch=16", ranks=2)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and err.count("cannot be shared by 2 ranks") == 1


@pytest.mark.skipif(not os.environ.get("NANOT2I_LONG"), reason="ten seconds: NANOT2I_LONG=1, as .ci/run says")
def test_the_optimizer_state_is_that_of_bf16_runs_too(tmp_path):
    """Resume to the bit with bf16 products, as the recipes run."""
    a, b = tmp_path / "a", tmp_path / "b"
    run(f"--out={a}", "--train.precision=bf16")
    process = start(f"--out={b}", "--train.precision=bf16", "--train.save_every=64")
    wait_for_images(process, b, 112)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run(f"--out={b}", "--train.precision=bf16")
    assert_same_run(a, b)


def test_mistakes_are_one_line(whole, tmp_path):
    for args, words in (([f"--out={whole}", "--model.width=32", "--optim.lr=1"], "model.width=64 (now 32), optim.lr=0.001 (now 1.0)"),
                        (["--data=nowhere", f"--out={tmp_path}"], "no folder nowhere"),
                        ([f"--out={whole / 'log.jsonl'}"], "is a file"),
                        (["--init=nowhere", f"--out={tmp_path}"], "no checkpoint"),
                        ([f"--init={whole}", "--model.width=32", f"--out={tmp_path}"], "is another model"),
                        (["--text=./nowhere", f"--out={tmp_path}"], "no such folder"),
                        (["--teacher=./nowhere", "--align.block=1", f"--out={tmp_path}"], "no such folder"),
                        (["--optim.lr=1e30", "--optim.clip=0", "--optim.warmup=1", "--optim.adam_lr=1e30", f"--out={tmp_path}"], "ten steps in a row")):
        with pytest.raises(SystemExit) as stop:
            train.main([*TINY, *args])
        message = str(stop.value)
        assert message.startswith("error: ") and words in message and "\n" not in message
    out, err = run("--train.micro_batch=5", code=1)
    assert err.strip() == "error: train.batch 16 must be a multiple of train.micro_batch 5"


def test_start_from_another_run_and_drop_the_repa_head(whole, tmp_path):
    from transformers import Dinov2Config, Dinov2Model
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)).save_pretrained(tmp_path / "dino")
    repa = [f"--teacher={tmp_path / 'dino'}", "--align.block=1", "--align.hidden=16", "--train.images=64", f"--out={tmp_path / 'repa'}"]
    run(*repa)
    saved = load_file(tmp_path / "repa/step_00000004/model.safetensors")
    assert any(k.startswith("align.") for k in saved) and not any(k.startswith("align.") for k in load_file(tmp_path / "repa/step_00000004/ema.safetensors"))
    assert rows(tmp_path / "repa")[-2]["align"] != 0
    run(*repa, "--train.images=96")                                             # and it resumes
    out, err = run(f"--init={tmp_path / 'repa'}", f"--out={tmp_path / 'next'}", "--train.images=16", "--optim.lr=0", "--optim.adam_lr=0")
    assert "dropped its REPA head (6 tensors)" in out + err
    before, after = load_file(tmp_path / "repa/step_00000006/model.safetensors"), load_file(tmp_path / "next/step_00000001/model.safetensors")
    assert set(before) - set(after) == {k for k in before if k.startswith("align.")} and all(torch.equal(after[k], before[k]) for k in after)


@pytest.mark.parametrize("every", [64, 50])                                    # whether saves fall on its multiples or not
def test_kept_checkpoints(tmp_path, every):
    c = replace(configs.debug, train=replace(configs.debug.train, batch=16, save_every=32, keep_every=every))
    model = Denoiser(c)
    for step in range(2, 13, 2):
        cluster.write(tmp_path, step, c, None, None, *cluster.snapshot(model, model, muon.build(model, c.optim)))
    assert sorted(int(p.name[5:]) for p in tmp_path.iterdir()) == [4, 8, 10, 12]


# ------------------------------------------------------------------------------------------------------------------
# One micro-batch

def micro(c, n=6):
    g = torch.Generator().manual_seed(5)
    return {"image": torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), "ids": torch.randint(0, 256, (n, c.text.length), generator=g),
            "mask": torch.arange(c.text.length)[None] < torch.randint(2, c.text.length, (n, 1), generator=g)}


def setting(route, **changes):
    c = replace(configs.debug, model=replace(configs.debug.model, route=route), **changes)
    torch.manual_seed(0)
    model = Denoiser(c, align_dim=4 if c.align.teacher else 0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    null = torch.zeros(1, c.text.length, dtype=torch.int64), torch.arange(c.text.length)[None] < 1
    return c, model, null


def loss_of(c, model, null, batch, seed=0, teacher=None):
    return train.losses(c, model, batch, null, None, teacher, torch.Generator().manual_seed(seed))


def test_the_loss_equals_a_plain_definition():
    c, model, null = setting(None)
    batch = micro(c)
    g = torch.Generator().manual_seed(0)
    x = batch["image"] / 127.5 - 1
    t = flow.draw_t(6, c.flow.shift, c.flow.uniform, g)
    eps = torch.randn(x.shape, generator=g)
    drop = torch.rand(6, 1, generator=g) < c.text.drop
    total = 0
    for i in range(6):
        z = (1 - t[i]) * x[i] + t[i] * eps[i]
        ids, mask = (null if drop[i] else (batch["ids"][i:i + 1], batch["mask"][i:i + 1]))
        out = model(z[None], t[i:i + 1], ids, mask)[0]
        total += ((out - patchify(x[i:i + 1], 8)).square().mean() / max(t[i].item(), 0.05) ** 2).item()
    assert loss_of(c, model, null, batch)[0].item() == pytest.approx(total / 6, rel=1e-5)


@pytest.mark.parametrize("end", [None, 2])
def test_a_masked_model_is_only_shown_and_judged_on_kept_tokens(end, monkeypatch):
    """Lazy masking: the target of a dropped token has no influence on the loss. TREAD: that of every token has."""
    c, model, null = setting(configs.Route(1, end, 0.5))
    kept = []
    keep_tokens = kernels.keep_tokens
    monkeypatch.setattr(kernels, "keep_tokens", lambda *args: kept.append(keep_tokens(*args)) or kept[-1])
    targets = []
    loss = flow.loss
    monkeypatch.setattr(flow, "loss", lambda kind, out, x, eps, t: targets.append((out, x, eps)) or loss(kind, out, x, eps, t))
    batch = micro(c)
    loss_of(c, model, null, batch)
    tokens = patchify(batch["image"].float() / 127.5 - 1, 8)
    out, x, _ = targets[0]
    if end is None:
        assert out.shape == x.shape == (6, 8, 192)
        assert all(torch.equal(x[b], tokens[b, kept[0][b]]) for b in range(6))
    else:
        assert torch.equal(x, tokens) and out.shape == tokens.shape
    loss_of(c, model, null, batch, seed=1)
    assert not torch.equal(kept[0], kept[1]) and len({tuple(r.tolist()) for r in kept[0]}) > 1


def test_repa_compares_the_same_positions():
    """A planted teacher whose token n says n; a head that answers what it is shown says whether both are gathered alike."""
    c, model, null = setting(configs.Route(1, 2, 0.5), align=configs.Align(teacher="planted", block=1, hidden=8))
    codes = torch.nn.functional.normalize(torch.randn(16, 4, generator=torch.Generator().manual_seed(3)), dim=-1)
    batch, g = micro(c), torch.Generator().manual_seed(0)
    flow.draw_t(6, c.flow.shift, c.flow.uniform, g), torch.randn(6, 3, 32, 32, generator=g), torch.rand(6, 1, generator=g)
    ids = kernels.keep_tokens(6, 16, 0.5, g)                                    # what `losses` will keep
    model.align = torch.nn.Module()
    model.align.forward = lambda x: codes[ids] + 0 * x[..., :4]
    assert loss_of(c, model, null, batch, teacher=lambda x: codes.expand(6, 16, 4))[1]["align"].item() == pytest.approx(-1, abs=1e-6)
    model.align.forward = lambda x: codes[ids.roll(1, 0)] + 0 * x[..., :4]
    assert loss_of(c, model, null, batch, teacher=lambda x: codes.expand(6, 16, 4))[1]["align"].item() > -0.8


def test_a_batch_is_the_mean_of_its_micro_batches():
    c, model, null = setting(None)
    gradients = []
    for seeds in ((0,), (1,), (0, 1)):
        model.zero_grad()
        for seed in seeds:
            (loss_of(c, model, null, micro(c), seed)[0] / len(seeds)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b, both in zip(*gradients):
        torch.testing.assert_close((a + b) / 2, both, rtol=1e-4, atol=1e-6)


def test_schedule_and_average():
    c = replace(configs.debug, optim=configs.Optim(warmup=100, cooldown=0.5, ema=0.9, ema_every=2), train=replace(configs.debug.train, images=1000, batch=10))
    assert [train.schedule(c, i) for i in (0, 40, 90, 400, 500, 750, 990)] == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.02])
    model = Denoiser(c)
    ema = Denoiser(c).requires_grad_(False)
    before = {n: p.double().clone() for n, p in ema.named_parameters()}
    train.update_ema(c, model, ema, 1000)                                        # every second step, with 0.9, as published: not 0.9 ** 2
    for name, p in model.named_parameters():
        torch.testing.assert_close(dict(ema.named_parameters())[name].double(), before[name] * 0.9 + 0.1 * p.double(), rtol=1e-6, atol=1e-7)


def test_seeds_differ_everywhere():
    assert len({train.seed_of(*p) for p in np.ndindex(20, 20, 20)}) == 8000 and train.seed_of(1, 2, 3) < 2 ** 63


def test_it_overfits_eight_images(tmp_path):
    """A folder of eight captioned drawings; then each caption brings back its own drawing."""
    c = replace(configs.debug, data=configs.Data(subset="food,animals"), model=replace(configs.debug.model, size=32))
    dataset = data.load(c)[0].emoji
    folder = tmp_path / "eight"
    folder.mkdir()
    chosen = [i for i, (e, b) in enumerate(dataset.pairs) if b == 0][::20][:10]    # on white; two of the ten are held out
    for k, i in enumerate(chosen):
        Image.fromarray(dataset.image(i).transpose(1, 2, 0)).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(dataset.captions(i)[0])
    out = tmp_path / "run"
    run(f"--data={folder}", f"--out={out}", "--train.images=4800", "--train.batch=8", "--train.log_every=25", "--model.route=none", "--model.absolute=yes",
        "--model.width=96", "--optim.lr=3e-3", "--optim.adam_lr=3e-3", "--optim.cooldown=0.3", "--text.drop=0", "--train.save_every=4800", "--optim.ema=0.98")
    losses = [r["loss"] for r in rows(out) if "loss" in r]
    assert losses[-1] < 0.05 * losses[0]
    from sample import generate
    model, c, tokenize, encode = pretrained.load(out)
    trained, _ = data.load(c)
    c = replace(c, sample=replace(c.sample, steps=8, guidance=1.0))
    real = torch.from_numpy(np.stack([trained.get(item, 0)[0] for item in trained.items()])).float().flatten(1)
    made = generate(model, c, tokenize, encode, [trained.captions(item)[0] for item in trained.items()], list(range(len(trained)))).float().flatten(1)
    nearest = torch.cdist(made, real)
    assert len(trained) == 8 and torch.equal(nearest.argmin(1), torch.arange(8))


def test_a_checkpoint_of_another_version_is_refused_and_a_stranger_pickle_never_opened(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/step_00000010")
    torch.save({"state": os.system}, tmp_path / "run/step_00000020/optimizer.pt")
    (tmp_path / "run/step_00000020/optimizer.safetensors").unlink()
    (tmp_path / "run/step_00000020/sums.json").unlink()
    out, err = run(f"--out={tmp_path / 'run'}", "--train.images=640", code=1)
    assert err.startswith("error: ") and "has no optimizer.safetensors" in err and err.count("\n") == 1


def test_a_checkpoint_lists_the_sums_of_all_its_files(whole):
    folder = whole / "step_00000020"
    sums = json.loads((folder / "sums.json").read_text())
    assert set(sums) == {p.name for p in folder.iterdir()} - {"sums.json"} and pretrained.damage(folder) == ""

"""More of the training loop, mostly in this process (test_train.py has the kills, signals and overfitting): bad gradients, what
a run accumulates, draws and averages, what it does with a torn log, with --init and with a frozen text encoder."""
import json
import math
import os
import platform
import re
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

import configs
import data
import flow
import kernels
import muon
import pretrained
import sample
import train
from configs import Route
from model import Denoiser, patchify

ROOT = Path(__file__).parent.parent
TINY = ["--config=debug", "--train.precision=fp32", "--model.size=16", "--model.patch=4", "--model.width=32", "--text.vocab=400",
        "--train.batch=8", "--train.micro_batch=4", "--train.images=160", "--train.eval_every=0", "--train.save_every=80", "--train.log_every=1",
        "--train.val_images=8", "--sample.steps=2", "--sample.prompts=red apple|slice of pizza on a blue background"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def handlers():
    """train() installs its own."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for s, handler in before.items():
        signal.signal(s, handler)


def run(out, *args):
    """Train in this process."""
    train.main([*TINY, f"--out={out}", *args])
    return out


def rows(out):
    """Log lines of steps, by step; none may appear twice."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [r for r in lines if "loss" in r]
    steps = [r["step"] for r in losses]
    assert steps == sorted(set(steps))
    return {r["step"]: r for r in losses}


def wait_for(out, step, process):
    """Until the log says that training has come to `step`."""
    for _ in range(30_000):                                                 # a minute, not counting time for which we are stopped
        if process.poll() is not None:
            break
        try:
            last = (out / "log.jsonl").read_text().rpartition("\n")[0].splitlines()[-1]
            if json.loads(last).get("step", -1) >= step:
                return
        except (OSError, IndexError, json.JSONDecodeError):
            pass
        time.sleep(0.002)
    process.terminate()
    pytest.fail(f"never came to step {step}: {process.communicate()[1][-2000:]}")


def newest(out):
    return sorted(p for p in out.glob("step_*") if p.suffix != ".tmp")[-1]


def steps_kept(out):
    return sorted(int(p.name[5:]) for p in out.glob("step_*"))


def state(checkpoint):
    """Everything that a checkpoint holds, flat: {name: tensor or number}. Copies: the files may be changed afterwards."""
    return {f"{part} {k}": v.clone() for part in ("model", "ema", "optimizer") for k, v in load_file(checkpoint / f"{part}.safetensors").items()}


def same(a, b, within=0.0):
    """Two checkpoints, or what `state` made of them."""
    a, b = (x if isinstance(x, dict) else state(x) for x in (a, b))
    assert a.keys() == b.keys() and sum(k.startswith("optimizer ") for k in a) > 50
    for key, value in a.items():
        if within:
            assert (value - b[key]).abs().max() <= within, key
        else:
            assert value.dtype == b[key].dtype and torch.equal(value, b[key]), key


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints and the log

def test_a_torn_newest_checkpoint_is_reported_and_the_one_before_used(tmp_path, capsys):
    """As a kill or power cut may leave things: a half-written folder, a checkpoint cut short, a log line cut short."""
    out = run(tmp_path / "run")
    reference = state(newest(out))
    assert steps_kept(out) == [10, 20]
    weights = newest(out) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (out / "step_00000017.tmp").mkdir()
    (out / "step_00000017.tmp" / "model.safetensors").write_bytes(b"half")
    with open(out / "log.jsonl", "a") as f:
        f.write('{"step": 2')
    capsys.readouterr()
    run(out)
    said = capsys.readouterr()
    assert re.search(r"step_00000020 is damaged \(model.safetensors is \d+ bytes", said.err) and "resumed at image 80 of 160" in said.out
    same(newest(out), reference)
    assert steps_kept(out.parent / "run") == [10, 20] and list(rows(out)) == list(range(1, 21))


def test_a_checkpoint_is_not_deleted_because_damaged_later_ones_exist(tmp_path):
    out = run(tmp_path / "run")
    for step in (90, 95):
        (out / f"step_{step:08d}").mkdir()                                  # empty: damaged
    run(out, "--train.images=320")
    assert steps_kept(out) == [30, 40, 90, 95]


def test_a_finished_run_says_so_and_another_config_is_refused(tmp_path, capsys):
    out = run(tmp_path / "run")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    capsys.readouterr()
    run(out)
    assert "is finished" in capsys.readouterr().out and before == {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(SystemExit) as end:
        run(out, "--optim.lr=0.5", "--model.depth=3", "--train.batch=16")
    message = str(end.value.code)
    assert "\n" not in message and all(key in message for key in ("optim.lr=0.001 (now 0.5)", "model.depth=4 (now 3)", "train.batch=8 (now 16)"))
    run(out, "--train.images=168", "--sample.steps=3", "--train.log_every=7", "--data.workers=0")         # these may change
    assert steps_kept(out) == [20, 21]
    bad = json.loads((newest(out) / "config.json").read_text()) | {"flux": 1}
    for checkpoint in out.glob("step_*"):
        (checkpoint / "config.json").write_text(json.dumps(bad))
        (checkpoint / "sums.json").unlink()
    with pytest.raises(SystemExit, match="fields that this version does not know: flux"):
        run(out, "--train.images=320")


def test_a_machine_without_git_trains(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert train.provenance(CPU)["git"] == "unknown"


# ------------------------------------------------------------------------------------------------------------------
# Ranks

def pid_of(rank, out):
    """The process that is this rank of the run."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if f"--out={out}".encode() in (path / "cmdline").read_bytes() and f"\0RANK={rank}\0".encode() in (path / "environ").read_bytes():
                return int(path.name)
        except OSError:                                                     # others' processes, and those that have just ended
            pass


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_two_ranks_agree_with_one_and_a_signal_to_either_stops_both(tmp_path):
    """AdamW, because Muon turns the last bit of a sum into noise in bf16: it orthogonalises directions in which the gradient
    is all but zero, and there weights are apart by 3e-4 after 27 steps, losses still by less than 1e-5. Updates travel as fp32."""
    two, args = tmp_path / "two", ["--train.images=8000", "--train.micro_batch=2", "--train.eval_every=160", "--optim.name=adamw", "--optim.ns_dtype=fp32"]
    process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *TINY,
                                f"--out={two}", *args], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        wait_for(two, 25, process)
        os.kill(pid_of(1, two), signal.SIGTERM)
        said, trouble = process.communicate(timeout=60)
    finally:
        process.terminate()                                                 # torchrun passes it on to its ranks
        process.wait()
    assert process.returncode == 0 and said.count("saved at image") == 1 and "Traceback" not in trouble
    at = int(newest(two).name[5:])
    assert 25 <= at < 1000
    one = run(tmp_path / "one", *args, f"--train.images={8 * at}")
    ours, theirs = rows(one), rows(two)
    assert list(ours)[:20] == list(theirs)[:20] == list(range(1, 21))
    for step in range(1, 21):
        assert abs(ours[step]["loss"] - theirs[step]["loss"]) <= 1e-5 * ours[step]["loss"] and \
            abs(ours[step]["norm"] - theirs[step]["norm"]) <= 1e-4 * ours[step]["norm"], step
    values = [next(json.loads(line)["val_loss"] for line in (o / "log.jsonl").read_text().splitlines() if '"val_loss"' in line) for o in (one, two)]
    assert abs(values[0] - values[1]) <= 1e-5 * values[0]
    same(newest(one), newest(two), within=1e-5)


# ------------------------------------------------------------------------------------------------------------------
# One micro-batch: losses against their definitions

def randomise(model, seed=0):
    """Weights in which every path carries signal (at initialisation gates and output are zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else 0.7 / p.shape[-1] ** 0.5))
    return model


def micro(c, n=4, seed=1):
    """Random images and ids. -> batch, null."""
    g = torch.Generator().manual_seed(seed)
    length = c.text.length
    mask = torch.arange(length) < torch.randint(1, length, (n, 1), generator=g)
    batch = {"image": torch.randint(0, 256, (n, 3, c.model.size, c.model.size), generator=g, dtype=torch.uint8),
             "ids": torch.randint(0, c.text.vocab, (n, length), generator=g), "mask": mask}
    return batch, (torch.full((1, length), 3), torch.arange(length)[None] < 1)


def spy(monkeypatch, module, name, record):
    """Calls of module.name also go to record(arguments, result)."""
    original = getattr(module, name)

    def called(*args, **kwargs):
        result = original(*args, **kwargs)
        record(args, result)
        return result
    monkeypatch.setattr(module, name, called)


def loss_and_gradient(c, model, batch, null, seed=5, teacher=None, encode=None):
    model.zero_grad()
    loss, parts = train.losses(c, model, batch, null, encode, teacher, torch.Generator().manual_seed(seed))
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("route, all_count", [(Route(1, None, 0.5), False), (Route(1, 2, 0.5), True)])
def test_lazy_masking_sees_the_targets_of_kept_tokens_only_and_tread_all(route, all_count, monkeypatch):
    c = configs.parse(TINY)
    c = replace(c, model=replace(c.model, route=route))
    model, (batch, null) = randomise(Denoiser(c)), micro(c)
    kept = []
    spy(monkeypatch, kernels, "keep_tokens", lambda _, ids: kept.append(ids))
    loss, gradient = loss_and_gradient(c, model, batch, null)
    ids = kept[0]                                                                                         # (4, 8) of 16 tokens
    assert ids.shape == (4, 8) and len(gradient) == len(list(model.parameters()))
    away = torch.ones(4, 16).scatter_(1, ids, 0)[..., None]                                               # 1 where dropped

    def changed(where):
        """Loss and gradient with other targets at `where`; what the model sees stays."""
        with monkeypatch.context() as m:
            m.setattr(train, "patchify", lambda image, patch: patchify(image, patch) + 10 * where)
            return loss_and_gradient(c, model, batch, null)
    other, its_gradient = changed(away)
    untouched = torch.equal(other, loss) and all(torch.equal(its_gradient[n], g) for n, g in gradient.items())
    assert untouched != all_count
    for n in range(4):                                                      # every single token that should count does
        for token in range(16):
            one = torch.zeros(4, 16, 1)
            one[n, token] = 1
            assert torch.equal(changed(one)[0], loss) == (not all_count and bool(away[n, token]))


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_the_loss_is_the_squared_error_of_the_velocity_and_captions_are_dropped(prediction):
    c = configs.parse([*TINY, "--model.route=none", f"--flow.prediction={prediction}", "--text.drop=0.5", "--flow.noise=2"])
    batch, null = micro(c, n=64)
    seen = {}

    def model(z, t, text, mask, keep_ids, slots):
        seen.update(z=z, t=t, text=text, mask=mask)
        seen["out"] = torch.randn(64, 16, 48, generator=torch.Generator().manual_seed(2))
        return seen["out"], None
    loss, parts = train.losses(c, model, batch, null, None, None, torch.Generator().manual_seed(0))
    x = batch["image"].double() / 127.5 - 1
    t = seen["t"].double().view(-1, 1, 1, 1)
    eps = (seen["z"].double() - (1 - t) * x) / t                                                          # z = (1 - t) x + t eps
    assert x.min() == -1 and x.max() == 1
    sure = t.flatten() > 0.1                                                                              # where that is exact enough
    assert abs(eps[sure].std() - 2) < 0.05 and abs(eps[sure].mean()) < 0.05
    tokens = lambda image: image.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(64, 16, 48)
    out, t = seen["out"].double(), t.flatten().view(-1, 1, 1)
    want = ((out - tokens(x)) / t.clamp(min=0.05) if prediction == "x" else out - tokens(eps - x)).square().mean()
    assert abs(loss - want) < 1e-4 * want and parts["loss"] == loss
    dropped = (seen["text"] == null[0]).all(1)
    assert 15 < dropped.sum() < 49 and torch.equal(seen["text"][~dropped], batch["ids"][~dropped])
    assert torch.equal(seen["mask"], torch.where(dropped[:, None], null[1], batch["mask"]))


def test_kept_tokens_differ_between_samples_micro_batches_and_steps(monkeypatch, tmp_path):
    drawn = []
    spy(monkeypatch, kernels, "keep_tokens", lambda _, ids: drawn.append(ids))
    run(tmp_path / "run", "--train.images=24")
    assert len(drawn) == 6 and all((ids.diff() > 0).all() for ids in drawn)                               # 3 steps of 2
    assert len({tuple(row.tolist()) for ids in drawn for row in ids}) == 24


def test_the_gradient_of_a_step_is_the_mean_over_its_micro_batches(monkeypatch, tmp_path):
    """Against one backward over all eight images, on what the run drew for them: noise, t, captions."""
    seen, grads, c = [], [], configs.parse([*TINY, "--model.route=none", "--optim.clip=0", "--train.images=8"])
    monkeypatch.setattr(train, "Denoiser", lambda *a: randomise(Denoiser(*a)))
    forward = Denoiser.forward

    def watched(self, *args):
        if torch.is_grad_enabled():
            seen.append(args)
        return forward(self, *args)
    monkeypatch.setattr(Denoiser, "forward", watched)
    spied = []
    spy(monkeypatch, flow, "interpolate", lambda args, z: spied.append((*args, z)))

    def stepped(self, closure=None, skip=None):
        grads.append([p.grad.clone() for group in self.param_groups for p in group["params"]])
        grads.append([p for group in self.param_groups for p in group["params"]])
    monkeypatch.setattr(muon.Muon, "step", stepped)
    run(tmp_path / "run", *"--model.route=none --optim.clip=0 --train.images=8".split())
    assert len(seen) == 2 and len(grads) == 2
    z, t, text, mask = (torch.cat(a) for a in zip(*(args[:4] for args in seen)))
    x, eps = (torch.cat([s[i] for s in spied[:2]]) for i in (0, 1))
    mean, params = grads
    model = randomise(Denoiser(c))
    out, _ = model(z, t, text, mask)
    loss = ((out - patchify(x, 4)) / t.view(-1, 1, 1).clamp(min=0.05)).square().mean()
    loss.backward()
    assert len(z) == 8 and len(params) == len(list(model.parameters()))
    whole = {tuple(p.flatten()[:3].tolist()) + tuple(p.shape): p.grad for p in model.parameters()}
    for p, g in zip(params, mean):
        want = whole[tuple(p.detach().flatten()[:3].tolist()) + tuple(p.shape)]
        assert (g - want).abs().max() <= 1e-5 * want.abs().max()


# ------------------------------------------------------------------------------------------------------------------
# Numbers that are not finite

def planted(monkeypatch, bad):
    """NaN in the loss of the second micro-batch of the steps `bad`. -> weights (one flat tensor) before each step."""
    weights, original = [], train.losses

    def losses(c, model, *args):
        number = len(weights) if not losses.second else len(weights) - 1
        if not losses.second:
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        loss, parts = original(c, model, *args)
        loss = loss * math.nan if losses.second and number in bad else loss
        losses.second = not losses.second
        return loss, parts
    losses.second = False
    monkeypatch.setattr(train, "losses", losses)
    return weights


def test_a_step_with_a_bad_gradient_changes_nothing_and_is_counted(monkeypatch, tmp_path, capsys):
    weights = planted(monkeypatch, {3, 4, 8})
    run(tmp_path / "run")
    changed = [not torch.equal(a, b) for a, b in zip(weights, weights[1:])]
    assert [i for i, moved in enumerate(changed) if not moved] == [3, 4, 8] and len(weights) == 20
    said = capsys.readouterr().out
    assert re.findall(r"step (\d+): the gradient is not finite; skipped \((\d+) in a row\)", said) == [("3", "1"), ("4", "2"), ("8", "1")]
    assert all(v.isfinite().all() for v in state(newest(tmp_path / "run")).values() if torch.is_tensor(v))
    assert max(r["bad"] for r in rows(tmp_path / "run").values()) == 2


def test_nine_bad_steps_in_a_row_are_survived_and_ten_stop_the_run(monkeypatch, tmp_path):
    with monkeypatch.context() as m:
        planted(m, {*range(1, 10), *range(11, 18)})
        run(tmp_path / "nine")
    assert steps_kept(tmp_path / "nine") == [10, 20]
    with monkeypatch.context() as m:
        planted(m, set(range(2, 12)))
        with pytest.raises(SystemExit) as end:
            run(tmp_path / "ten", "--train.save_every=16")
    assert re.fullmatch("error: ten steps in a row without a finite gradient: [^\n]*", end.value.code)
    with pytest.raises(SystemExit, match="ten steps in a row"):
        run(tmp_path / "wild", "--optim.lr=1e30", "--optim.adam_lr=1e30")


# ------------------------------------------------------------------------------------------------------------------
# Schedules

def test_the_learning_rate_follows_the_schedule(tmp_path):
    c = configs.parse([*TINY, "--train.images=1000", "--optim.warmup=80", "--optim.cooldown=0.2"])
    for images in range(0, 1000, 8):
        want = np.interp(images, [0, 72, 800, 1000], [0.1, 1, 1, 0])                                      # the first step is not lost
        assert abs(train.schedule(c, images) - want) < 1e-12
    flat = replace(c, optim=replace(c.optim, warmup=0, cooldown=0.0))
    assert {train.schedule(flat, images) for images in range(0, 1000, 8)} == {1.0}
    run(tmp_path / "run", "--optim.warmup=40", "--optim.cooldown=0.5", "--optim.lr=0.002")
    for step, row in rows(tmp_path / "run").items():
        want = 0.002 * np.interp(8 * (step - 1), [0, 32, 80, 160], [0.2, 1, 1, 0])
        assert abs(row["lr"] - want) < 1e-8


@pytest.mark.parametrize("every, ramp", [(1, True), (3, True), (3, False)])
def test_the_average_of_the_weights_follows_its_formula(every, ramp):
    c = configs.parse([*TINY, "--optim.ema=0.7", f"--optim.ema_every={every}", f"--optim.ema_ramp={ramp}"])
    model = Denoiser(c, 8)                                                                                     # with a REPA head
    ema = Denoiser(c)
    ema.load_state_dict(model.state_dict(), strict=False)
    want = {n: p.detach().double() for n, p in ema.named_parameters()}
    g = torch.Generator().manual_seed(0)
    for step in range(every, 40 * every, every):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape, generator=g))
        train.update_ema(c, model, ema, step)
        decay = min(0.7, (1 + step / every) / (10 + step / every)) if ramp else 0.7
        live = dict(model.named_parameters())
        want = {n: decay * w + (1 - decay) * live[n].detach().double() for n, w in want.items()}
    assert not any(n.startswith("align") for n in want)
    for n, p in ema.named_parameters():
        assert (p.double() - want[n]).abs().max() <= 1e-5 * want[n].abs().max(), n


def test_the_loop_averages_at_every_kth_step(monkeypatch, tmp_path):
    calls = []
    spy(monkeypatch, train, "update_ema", lambda args, _: calls.append(args[3]))
    run(tmp_path / "run", "--train.images=80", "--optim.ema_every=3")
    assert calls == [3, 6, 9]
    run(tmp_path / "off", "--train.images=80", "--optim.ema=0")
    assert calls == [3, 6, 9]


# ------------------------------------------------------------------------------------------------------------------
# Frozen networks, and starting from another run

@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    from transformers import BertConfig, BertModel, BertTokenizerFast
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "on", "an", "the", "background", "red", "apple", "pizza", "slice", "of", "blue", "green"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(words), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)).save_pretrained(folder)
    return folder


def test_repa_trains_resumes_and_leaves_no_head_in_the_average(vision, tmp_path, monkeypatch, capsys):
    args = [f"--teacher={vision}", "--align.block=1", "--align.hidden=16"]
    networks = []
    spy(monkeypatch, pretrained, "frozen", lambda _, network: networks.append((network, {k: v.clone() for k, v in network.state_dict().items()})))
    whole = run(tmp_path / "whole", *args, "--train.images=48")
    network, before = networks[0]
    assert all(p.grad is None and not p.requires_grad for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(-1 <= r["align"] <= 1 and r["align"] != 0 for r in rows(whole).values())
    assert sum(k.startswith("align.") for k in load_file(newest(whole) / "model.safetensors")) == 6
    assert not any(k.startswith("align.") for k in load_file(newest(whole) / "ema.safetensors"))
    part = run(tmp_path / "part", *args, "--train.images=24")
    run(part, *args, "--train.images=48")
    same(newest(part), newest(whole))
    model, c, tokenize, encode = pretrained.load(whole)                                                   # sampling needs no teacher
    assert sample.generate(model, c, tokenize, encode, ["red apple"], [0]).shape == (1, 3, 16, 16)
    # into a recipe without REPA: the head is dropped, and said; the rest arrives
    first, original = [], train.losses

    def watched(c, model, *args):
        first.append({k: v.clone() for k, v in model.state_dict().items()})
        return original(c, model, *args)
    monkeypatch.setattr(train, "losses", watched)
    capsys.readouterr()
    run(tmp_path / "next", f"--init={whole}", "--train.images=8")
    assert "dropped its REPA head (6 tensors)" in capsys.readouterr().out
    theirs = load_file(newest(whole) / "model.safetensors")
    assert set(theirs) - set(first[0]) == {k for k in theirs if k.startswith("align.")}
    assert all(torch.equal(v, theirs[k]) for k, v in first[0].items())


def test_a_frozen_text_encoder_in_a_folder_trains_and_samples(bert, tmp_path):
    out = run(tmp_path / "run", f"--text={bert}", "--text.length=8", "--train.images=48", "--train.save_every=24")
    assert steps_kept(out) == [3, 6] and not (newest(out) / "bpe.tiktoken").exists()
    names = load_file(newest(out) / "model.safetensors")
    assert not any(k.startswith("text.") for k in names) and names["txt_in.weight"].shape == (32, 24)
    model, c, tokenize, encode = pretrained.load(out)
    assert c.text.dim == 24
    images = sample.generate(model, c, tokenize, encode, ["red apple on a blue background", "a slice of pizza"], [0, 1])
    assert images.dtype == torch.uint8 and images.float().std() > 1
    run(out, f"--text={bert}", "--text.length=8", "--train.images=56")
    assert newest(out).name == "step_00000007"


def emoji_folder(path, names, size=32):
    """A folder of captioned PNGs of the built-in emoji. -> {caption: pixels (3, H, W)}"""
    path.mkdir()
    drawn = data.load(configs.parse(["--config=debug", f"--model.size={size}"]))[0].emoji
    made = {}
    for i, name in enumerate(names):
        e = drawn.names.index(name)
        made[name] = drawn.render(e, i % 4)
        Image.fromarray(made[name].transpose(1, 2, 0)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(name)
    return made


def test_init_reads_the_other_run_once_and_keeps_its_vocabulary(tmp_path):
    first = run(tmp_path / "first", "--train.images=80")
    emoji_folder(tmp_path / "images", ["red apple", "banana", "cherries", "pineapple", "watermelon"])
    args = [f"--init={first}", f"--data={tmp_path / 'images'}"]
    second = run(tmp_path / "second", *args, "--train.images=24")
    assert (newest(second) / "bpe.tiktoken").read_bytes() == (newest(first) / "bpe.tiktoken").read_bytes()
    own = run(tmp_path / "own", args[1], "--train.images=8")                                              # what it would have been
    assert (newest(own) / "bpe.tiktoken").read_bytes() != (newest(first) / "bpe.tiktoken").read_bytes()
    first.rename(tmp_path / "gone")
    run(second, *args, "--train.images=48")                                                               # resumes without it
    assert newest(second).name == "step_00000006"
    with pytest.raises(SystemExit, match="no checkpoint in"):
        run(tmp_path / "third", *args)
    for changed in (["--model.width=64"], ["--model.depth=3"], ["--model.patch=8"]):
        with pytest.raises(SystemExit) as end:
            run(tmp_path / "third", f"--init={second}", *changed)
        assert re.fullmatch("error: --init=.* is another model: [^\n]* do not fit", end.value.code)
    assert not (tmp_path / "third").exists()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_stays_with_the_process(kept):
    """A step's buffers, 4 of 8 MiB, are not cleared anew each time: the median of page faults, of which an untouched one has 8,192.

    The median: wherever small allocations split a freed buffer, the heap grows once more in some early step. Without, each buffer is
    mapped anew: glibc's own threshold, 128 KiB, which it would raise, and huge pages, which have few faults, are held off."""
    code = f"""
import ctypes, resource, statistics, torch, train
libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)                              # PR_SET_THP_DISABLE
libc.mallopt(-3, 2 ** 17)                               # M_MMAP_THRESHOLD
{kept} and train.keep_memory(torch.device("cpu"))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
steps = []
for _ in range(11):
    before = faults()
    [torch.empty(2 ** 21).fill_(1.0) for _ in range(4)]
    steps.append(faults() - before)
print(int(statistics.median(steps)))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (int(done.stdout) < 100) == kept

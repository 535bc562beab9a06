"""Prompts -> pictures: against plain loops that know no batches, no cached text and no chunks; files; the user's mistakes."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFont
from safetensors.torch import save_file

import configs
import kernels
import pretrained
import sample
from model import Denoiser, unpatchify

CAPTIONS = ["red apple on a yellow background", "tiger face", "a slice of pizza on a blue background", "owl"] * 3
DEBUG = replace(configs.debug, text=replace(configs.debug.text, vocab=300))
RANKS = pretrained.bpe_train(CAPTIONS, 300)


def setting(**changes):
    return replace(DEBUG, sample=replace(DEBUG.sample, **changes))


def randomise(model, seed=0):
    """Weights in which every path carries signal (at initialisation gates and output are zero)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else 0.7 / p.shape[-1] ** 0.5))
    return model.eval()


@pytest.fixture
def tiny():
    return randomise(Denoiser(DEBUG)), pretrained.tokenizer(DEBUG, RANKS)


@pytest.fixture
def run(tmp_path, monkeypatch, tiny):
    """A folder with a checkpoint in it, as the current one. -> the step folder"""
    monkeypatch.chdir(tmp_path)
    return write_checkpoint(tmp_path / "runs" / "tiny" / "step_00000020", tiny[0])


def write_checkpoint(folder, model, c=DEBUG):
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    save_file(model.state_dict(), folder / "ema.safetensors")
    pretrained.bpe_save(RANKS, folder / "bpe.tiktoken")
    configs.save(c, folder / "config.json")
    return folder


def watch(model):
    """A list that grows by (rows, keep_ids) with each forward."""
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append((len(args[0]), args[4] if len(args) > 4 else None)))
    return seen


def draw(model, c, tokenize, prompts, seeds, encode=None, size=32):
    return sample.draw(model, c, tokenize, encode, prompts, seeds, None, size)


# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("guide", ["cfg", "self"])
def test_a_picture_does_not_depend_on_its_batch(tiny, guide):
    model, tokenize = tiny
    c, prompts, seeds = setting(guide=guide), CAPTIONS[:8], [*range(3, 11)]
    together = draw(model, c, tokenize, prompts, seeds)
    assert together.shape == (8, 3, 32, 32) and together.std() > 0.1
    for i in (0, 6):
        alone = draw(model, c, tokenize, prompts[i:i + 1], seeds[i:i + 1])
        assert torch.allclose(together[i], alone[0], atol=1e-4, rtol=0)
    whole = sample.generate(model, c, tokenize, None, prompts, seeds)
    parts = sample.generate(model, c, tokenize, None, prompts, seeds, batch=3)
    assert whole.dtype == torch.uint8 and (whole.int() - parts.int()).abs().max() <= 1
    assert (whole.float() - ((together.clamp(-1, 1) + 1) * 127.5)).abs().max() <= 0.5 + 1e-3


def test_seeds_and_prompts_matter(tiny):
    model, tokenize = tiny
    a, b, d, e = draw(model, DEBUG, tokenize, [CAPTIONS[0]] * 3 + CAPTIONS[1:2], [0, 1, 0, 0])
    assert torch.allclose(a, d, atol=1e-5)
    assert (a - b).abs().mean() > 0.05 and (a - e).abs().mean() > 1e-3


@pytest.mark.parametrize("changes, rows", [
    (dict(guidance=1.0), [3, 3, 3, 3]),
    (dict(guidance=3.0), [6, 6, 6, 6]),
    (dict(guidance=3.0, hi=0.95), [3, 6, 6, 6]),                                         # t = 1, .9, .75, .5
    (dict(guidance=3.0, lo=0.6, hi=0.95), [3, 6, 6, 3]),
    (dict(guidance=3.0, sampler="heun"), [6] * 7),
    (dict(guidance=3.0, guide="self"), [3] * 8),
    (dict(guidance=1.0, guide="self"), [3] * 4),
])
def test_no_pass_that_is_not_needed(tiny, changes, rows):
    model, tokenize = tiny
    seen, reads, ticks = watch(model), [], []
    model.text.register_forward_pre_hook(lambda _, args: reads.append(len(args[0])))
    c = setting(**changes)
    sample.generate(model, c, tokenize, None, CAPTIONS[:3], [0, 1, 2], lambda: ticks.append(1))
    assert [n for n, _ in seen] == rows
    assert reads == [4 if max(rows) == 6 else 3]            # once, not once per step
    assert len(ticks) == sample.calls(c, 3) == 4
    assert sample.calls(c, 129) == 12


def euler(velocity, z, steps=4, shift=3.0):
    """z + (s - t) v from t = 1 to 0, written out."""
    for i in range(steps):
        t, s = (shift * u / (1 + (shift - 1) * u) for u in (1 - i / steps, 1 - (i + 1) / steps))
        z = z + (s - t) * velocity(z, t)
    return z


def noise(seed):
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed))[None]


@pytest.mark.parametrize("prediction", ["x", "v"])
@pytest.mark.parametrize("frozen", [False, True])
def test_guidance_equals_a_plain_loop_that_reads_the_text_at_every_step(tiny, prediction, frozen):
    model, tokenize = tiny
    encode = None
    c = replace(setting(sampler="euler"), flow=replace(DEBUG.flow, prediction=prediction, noise=1.5))
    if frozen:                                              # a frozen encoder, and a tokenizer that pads to the longest
        model = randomise(Denoiser(replace(c, text=replace(c.text, encoder="frozen", dim=24))))
        table = torch.randn(300, 24, generator=torch.Generator().manual_seed(5))
        encode = lambda ids, mask: table[ids] * (1 + mask.sum(1)[:, None, None])
        own = tokenize
        tokenize = lambda texts: [x[:, :max(int(m.sum()) for m in own(texts)[1])] for x in own(texts)]
    prompts, seeds = CAPTIONS[:3], [4, 5, 6]
    made = draw(model, c, tokenize, prompts, seeds, encode)

    def call(z, t, text):
        ids, mask = tokenize([text])
        out = model(z, torch.tensor([t]), ids if encode is None else encode(ids, mask), mask)[0]
        out = unpatchify(out, 8, 32, 32)
        return (z - out) / t if prediction == "x" else out

    with torch.no_grad():
        for image, prompt, seed in zip(made, prompts, seeds):
            guided = lambda z, t: call(z, t, "") + 3.0 * (call(z, t, prompt) - call(z, t, ""))
            assert torch.allclose(image, euler(guided, 1.5 * noise(seed))[0], atol=2e-4)
            assert not torch.allclose(image, euler(lambda z, t: call(z, t, prompt), 1.5 * noise(seed))[0], atol=1e-2)


def test_self_guidance_routes_other_tokens_at_each_step_and_leaves_nothing_on(tiny):
    model, tokenize = tiny
    c = setting(sampler="euler", guide="self", guidance=2.0)
    ids, mask = tokenize(CAPTIONS[:2])
    z, t = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        before = model(z, t, ids, mask)[0]
        seen = watch(model)
        made = draw(model, c, tokenize, CAPTIONS[:2], [7, 8])
        kept = [keep for _, keep in seen if keep is not None]
        assert [keep is None for _, keep in seen] == [True, False] * 4                  # dense, routed, dense, ...
        assert torch.equal(before, model(z, t, ids, mask)[0])
    assert all(keep.shape == (2, 8) and (keep.diff() > 0).all() for keep in kept)
    assert len({tuple(row.tolist()) for keep in kept for row in keep}) == 8             # 4 steps x 2 pictures
    for i, seed in enumerate((7, 8)):
        mine = iter([keep[i:i + 1] for keep in kept])

        @torch.no_grad()
        def guided(z, t, i=i, mine=mine):
            call = lambda keep: (z - unpatchify(model(z, torch.tensor([t]), ids[i:i + 1], mask[i:i + 1], keep)[0], 8, 32, 32)) / t
            dense, routed = call(None), call(next(mine))
            return routed + 2.0 * (dense - routed)
        assert torch.allclose(made[i], euler(guided, noise(seed))[0], atol=2e-4)


def test_a_bf16_model_draws_about_the_same(tiny):
    model, tokenize = tiny
    full = draw(model, setting(guidance=1.5), tokenize, CAPTIONS[:4], [0, 1, 2, 3])
    model.dtype = torch.bfloat16
    half = draw(model, setting(guidance=1.5), tokenize, CAPTIONS[:4], [0, 1, 2, 3])
    assert half.dtype == torch.float32 and 0 < (half - full).abs().mean() < 0.05 * full.std()


def test_a_model_can_be_trained_after_it_has_drawn(tiny):
    model, tokenize = tiny
    sample.generate(model, DEBUG, tokenize, None, CAPTIONS[:1], [0], size=48)           # makes the table of this grid
    out, _ = model(torch.randn(1, 3, 48, 48), torch.rand(1), *tokenize(CAPTIONS[:1]))
    out.square().mean().backward()
    assert model.blocks[0].qkv.weight.grad.norm() > 0


def test_another_size(tiny):
    model, tokenize = tiny
    assert sample.generate(model, DEBUG, tokenize, None, CAPTIONS[:2], [0, 1], size=48).shape == (2, 3, 48, 48)


# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", ["a red apple", "ein Käse", "りんご 🍎"])
def test_metadata_round_trip(tmp_path, prompt):
    image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    sample.save_png(image, tmp_path / "a.png", prompt, 12, {"steps": 30, "guide": "cfg"})
    with Image.open(tmp_path / "a.png") as read:
        assert read.text["prompt"] == prompt and read.text["seed"] == "12"
        assert json.loads(read.text["settings"]) == {"steps": 30, "guide": "cfg"}
        assert read.size == (24, 16) and read.getpixel((5, 3)) == tuple(image[:, 3, 5].tolist())


def test_grid_holds_every_picture_enlarged_and_text_below():
    images = torch.stack([torch.full((3, 32, 32), 10 * i, dtype=torch.uint8) for i in range(1, 6)])
    page = sample.grid(images, ["owl", "x" * 80, "word " * 60, "", "a red apple"], columns=2)
    m = 12                                                  # margin; pictures are 32 * 4 = 128 wide
    assert page.width == m + 2 * (128 + m)
    assert page.getpixel((0, 0)) == (255, 255, 255) == page.getpixel((page.width - 1, page.height - 1))
    ink = [page.getpixel((m, y)) != (255, 255, 255) for y in range(page.height)]
    tops = [y for y in range(1, page.height) if ink[y] and not ink[y - 1]]
    assert len([y for y in tops if page.getpixel((m, y + 100)) == page.getpixel((m, y))]) == 3
    colors = {page.getpixel((m + x, y))[0] for x in (64, 64 + 128 + m) for y in range(page.height)}
    assert {10, 20, 30, 40, 50} <= colors
    below = page.crop((m, m + 128, m + 128, m + 128 + 24)).convert("L")
    assert below.getextrema()[0] < 120                      # ink
    assert sample.grid(images[:4], ["a"] * 4).width == m + 2 * (128 + m)
    assert sample.grid(images[:1], ["a"], columns=5, scale=1).width == 12 + 32 + 12


def test_wrapped_lines_fit_and_lose_nothing():
    font = ImageFont.load_default(12)
    text = "a slice of pizza   on a " + "very" * 20 + " blue background"
    lines = sample.wrap(text, font, 100, most=20)
    assert all(0 < font.getlength(line) <= 100 for line in lines) and len(lines) > 3
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert lines[0] == "a slice of pizza on"
    assert len(sample.wrap("word " * 100, font, 100)) == 5 and sample.wrap("word " * 100, font, 100)[-1].endswith("...")


# ------------------------------------------------------------------------------------------------------------------

def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
    sample.main()


def test_command_writes_pictures_and_grid(run, monkeypatch, capsys, tiny):
    command(monkeypatch, "a red apple", "owl", "owl!", "--n", "2", "--seed=5", "--steps=2", "--device=cpu")
    said = capsys.readouterr().out
    names = sorted(path.name for path in Path("out").iterdir())
    assert names == ["a-red-apple-5.png", "a-red-apple-6.png", "grid.png", "owl-5-2.png", "owl-5.png", "owl-6-2.png", "owl-6.png"]
    assert "seconds each" in said and "seeds 5 to 6" in said and all(name in said for name in names) and "step_00000020" in said
    with Image.open("out/owl-6.png") as read:
        made = json.loads(read.text["settings"])
        assert (made["steps"], made["guidance"], made["weights"], read.text["seed"]) == (2, 3.0, "ema", "6")
        want = sample.generate(tiny[0], setting(steps=2), tiny[1], None, ["owl"], [6])[0]
        got = torch.tensor([*read.tobytes()]).view(32, 32, 3).permute(2, 0, 1)
        assert (got - want.int()).abs().max() <= 1


def test_command_takes_the_newest_run_and_a_file_of_prompts(run, monkeypatch, capsys, tiny):
    other = write_checkpoint(run.parents[1] / "other" / "step_00000010", tiny[0])
    os.utime(run, (1, 1))
    Path("p.txt").write_text("owl\n\n  tiger face \n")
    command(monkeypatch, "--prompts=p.txt", "--n=1", "--steps=1", "--guide=self", "--size=48", "--out=pictures")
    assert str(other.relative_to(Path.cwd())) in capsys.readouterr().out
    assert Image.open("pictures/tiger-face-0.png").size == (48, 48)


@pytest.mark.parametrize("argv, says", [
    ([], "no prompt"),
    (["--prompts=missing.txt"], "missing.txt"),
    (["--prompts=empty.txt"], "no prompt"),
    (["--prompts=bytes.txt"], "bytes.txt"),
    (["owl", "--checkpoint=nowhere"], "nowhere"),
    (["owl", "--steps=0"], "sample.steps"),
    (["owl", "--steps=many"], "steps wants int"),
    (["owl", "--n=0"], "--n"),
    (["owl", "--n=two"], "--n"),
    (["owl", "--seed=-1"], "--seed"),
    (["owl", "--size=33"], "multiple of model.patch"),
    (["owl", "--sampler=ddim"], "sampler"),
    (["owl", "--guide=none"], "guide"),
    (["owl", "--device=gpu9"], "--device=gpu9"),
    (["owl", "--device=cuda:99"], "--device=cuda:99"),
    (["owl", "--weights=best"], "--weights"),
    (["owl", "--stepz=3"], "--stepz"),
    (["owl", "--out=empty.txt"], "empty.txt"),
    (["owl", "--size=8000000"], "memory"),
])
def test_mistakes_end_in_one_line(run, monkeypatch, argv, says):
    Path("empty.txt").write_text("\n \n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *argv)
    assert says in stop.value.code and stop.value.code.startswith("error: ") and "\n" not in stop.value.code


@pytest.mark.parametrize("route, says", [(None, "needs a model.route with an end"), (configs.Route(1, None, 0.5), "needs a model.route with an end")])
def test_self_guidance_needs_a_route_that_ends(tmp_path, monkeypatch, tiny, route, says):
    monkeypatch.chdir(tmp_path)
    c = replace(DEBUG, model=replace(DEBUG.model, route=route))
    write_checkpoint(tmp_path / "runs" / "x" / "step_1", randomise(Denoiser(c)), c)
    with pytest.raises(SystemExit, match=says):
        command(monkeypatch, "owl", "--guide=self", "--steps=1")


def test_no_checkpoint_is_one_line_and_no_trace(tmp_path):
    command = [sys.executable, Path(sample.__file__).resolve(), "owl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: no checkpoint under runs/") and done.stderr.count("\n") == 1


def test_keep_ids_do_not_reuse_the_noise():
    tokens = lambda seed: kernels.keep_tokens(1, 64, 0.5, torch.Generator().manual_seed(seed))
    assert not torch.equal(tokens(3), tokens(~3))

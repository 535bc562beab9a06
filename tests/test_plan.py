"""train.py --plan against figures computed by hand and against models that do run."""
import re
from dataclasses import replace

import pytest
import torch

import configs
import plan
import train
from model import Denoiser

def printed(capsys, *flags):
    train.main(["--plan", *flags])
    return capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["emoji", "nitro_1024"])
def test_a_recipe_has_a_plan(recipe, capsys):
    out = printed(capsys, f"--config={recipe}")
    assert out.startswith(recipe) and "GPU-hours" in out and ("published" in out) == (recipe != "emoji")


def test_figures_of_prx_512(capsys):
    out = printed(capsys, "--config=prx_512", "--rate=150", "--price=3", "--tokens=100")
    assert "denoiser 1,177,215,744" in out and "Muon 1,156,055,040" in out                         # prx.md: the published split
    hours = 102_400_000 / 150 / 32 / 3600
    assert f"{hours:.1f} hours, {32 * hours:,.0f} GPU-hours, ${96 * hours:,.0f} at $3" in out
    tera = {name: float(cost) for name, cost in re.findall(r"^  (\w+) +([\d.]+) +[\d.]+%", out, re.M)}
    # DINOv3 ViT-L/16 at 256 pixels: 24 blocks of 12 w^2 multiply-adds a token, attention, 16 x 16 patches, CLS and 4 registers
    w, n = 1024, 16 * 16 + 5
    vit = 2 * (24 * (12 * w * w * n + 2 * n * n * w) + 256 * 3 * 16 * 16 * w)
    assert abs(tera["teacher"] - vit / 1e12) < 1e-3
    # VGG16's thirteen convolutions at 256 pixels, three times
    vgg = sum(9 * a * b * (256 // s) ** 2 for a, b, s in ((3, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 2), (128, 256, 4), (256, 256, 4), (256, 256, 4),
                                                          (256, 512, 8), (512, 512, 8), (512, 512, 8), *[(512, 512, 16)] * 3))
    assert abs(tera["lpips"] - 3 * 2 * vgg / 1e12) < 1e-3
    assert abs(tera["denoiser"] - 0.72) < 0.03 and abs(tera["text"] - 2 * 100 * 2.02e9 / 1e12) < 0.01   # T5Gemma-2B: 2.02G without embeddings


def test_efficiency_by_hand(capsys):
    """Nitro-T-1.2B, second stage, 32 GPUs: 4 bytes x 1.2578G, reduced at the slower of NVLink (7/8 at 450 GB/s) and network (3/4 / 8 at 50 GB/s)."""
    out = printed(capsys, "--config=nitro_1024_ft", "--rate=100")
    size, step = 4 * 1_257_779_872, 2048 / 32 / 100
    reduce, gather = (k * size * max(7 / 8 / 450e9, 3 / 4 / 8 / 50e9) for k in (2, 1))
    row = next(line for line in out.splitlines() if line.startswith("    32 GPUs"))
    assert f"reduce {1000 * reduce:5.1f} ms, gather {1000 * gather:5.1f} ms" in row and reduce < step * 2 / 3
    assert f"efficiency {step / (step + gather):.1%}" in row and "not possible" not in row


def test_activations_are_what_autograd_keeps():
    """The count on a model without storage equals that of one which runs."""
    c = replace(configs.debug, text=configs.Text(encoder="frozen", dim=24))

    def per_image(device):
        with torch.device(device):
            model = Denoiser(c, dtype=torch.bfloat16)
        total = {}
        for n in (1, 2):
            kept = {}

            def keep(x, kept=kept):
                kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes() if x.dtype == torch.bfloat16 else 0
                return x
            z, text = torch.zeros(n, 3, 32, 32, device=device), torch.zeros(n, 5, 24, device=device)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                held = model(z, torch.zeros(n, device=device), text, None, torch.arange(8, device=device).expand(n, 8))
            total[n] = sum(kept.values())
            del held
        return total[2] - total[1]
    with torch.device("meta"):
        meta = Denoiser(c, dtype=torch.bfloat16)
    assert plan.activations(c, meta, 5) == per_image("meta") > 0
    assert abs(per_image("cpu") / per_image("meta") - 1) < 0.3                 # attention has another form on CPU


@pytest.mark.parametrize("flag, words", [("--device=z80", "a100, h100"), ("--gpus=0", "above zero"), ("--gpus=x", "wants int"), ("--pirce=3", "unknown key")])
def test_mistakes_are_one_line(flag, words):
    with pytest.raises(SystemExit, match=words):
        train.main(["--plan", "--config=debug", flag])

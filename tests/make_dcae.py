"""A small DC-AE as a Hugging Face folder, trained in minutes on a CPU: latents without a hub.

    python tests/make_dcae.py out/dcae          # then: python train.py --config=nitro_debug
    python tests/make_dcae.py out/dcae --minutes=20 --data=path/to/folder

Trained on the data of `nitro_debug`, the built-in emoji, and on the photos of Debian's tuxpaint-stamps-default where installed.
It writes OUT/reconstructions.png: held-out pictures above what becomes of them.
"""
import os, sys, time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")         # before torch is imported: spinning threads stall a busy machine
sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import configs, data

STAMPS = Path("/usr/share/tuxpaint/stamps")
FAST = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
WIDTHS = (16, 32, 64, 128)                                  # at the full size, at a half, at a quarter and at an eighth of it
BATCH = 8                                                   # small: in minutes, steps are worth more than their precision
NOISE, PRIOR = 0.1, 0.01                                    # of the latents: added, so that the decoder forgives; weight of their square, so that
                                                            # noise is not outgrown: large ones would also drown the decoder's residual blocks


def autoencoder(channels):
    """As DC-AE's first stages, thinner: no block at the full size, residual blocks below."""
    from diffusers import AutoencoderDC
    both = dict(block_types="ResBlock", block_out_channels=WIDTHS, layers_per_block=(0, 1, 1, 1), qkv_multiscales=((),) * 4)
    return AutoencoderDC(latent_channels=channels, **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in both.items()})


def pictures(c, most=4000):
    """-> images to train on and held-out ones, uint8 (E, 3, H, W), at most so many of each."""
    train, val = (torch.from_numpy(np.stack([d.picture(item) for item in data.first_items(d, most)])) for d in data.load(c))
    stamps = [data.decode(path, c.model.size) for path in sorted(STAMPS.rglob("*.png"))[:most]]
    return torch.cat([train, torch.from_numpy(np.stack(stamps))]) if stamps else train, val


def varied(x):
    """Every other one in other colours, mirrored, shifted: few pictures must teach it many. x: float (B, 3, H, W) in [-1, 1]"""
    x, y = x[::2], x[1::2]
    gain = torch.empty(len(y), 1, 1, 1).uniform_(0.5, 1) * (1 if torch.rand(()) < 0.5 else -1)
    y = gain * y[:, torch.randperm(3)] + (1 - gain.abs()) * torch.empty(len(y), 3, 1, 1).uniform_(-1, 1)
    return torch.cat([x, y.flip(3).roll(torch.randint(x.shape[2], (2,)).tolist(), (2, 3))])


def main(out, minutes, c):
    torch.manual_seed(c.seed)
    train, val = pictures(c)
    model = autoencoder(c.model.channels).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    begin, seen, error = time.time(), 0, None
    with tqdm(total=round(60 * minutes), desc="autoencoder", unit="s", bar_format="{l_bar}{bar}| {n:.0f}/{total} s{postfix}") as bar:
        while (done := (time.time() - begin) / (60 * minutes)) < 1:
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1, seen / 1000, 2 * (1 - done))                   # the second half falls to zero
            x = varied(train[torch.randint(len(train), (BATCH,))] / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=FAST):
                latent = model.encode(x).latent
                y = model.decode(latent + NOISE * torch.randn_like(latent)).sample
            loss = F.mse_loss(y.float(), x) + 0.1 * F.l1_loss(y.float(), x) + PRIOR * latent.float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen += len(x)
            error = loss.detach() if error is None else torch.lerp(error, loss.detach(), 0.02)
            bar.n = min(bar.total, time.time() - begin)
            bar.set_postfix_str(f"{seen} images, loss {error:.4f}")
    finish(model.eval(), val / 127.5 - 1, Path(out))


def finish(model, val, out):
    """Scale to unit variance, save, measure, show."""
    with torch.no_grad():
        latent = torch.cat([model.encode(x).latent for x in val.split(32)])
        again = torch.cat([model.decode(z).sample for z in latent.split(32)]).clamp(-1, 1)
    model.register_to_config(scaling_factor=1 / latent.std().item())
    model.to(memory_format=torch.contiguous_format).save_pretrained(out)
    psnr = -10 * ((again - val) / 2).square().mean((1, 2, 3)).log10()
    show = (torch.stack([val, again])[:, :16] * 127.5 + 127.5).round().byte()               # (2, 16, 3, H, W)
    Image.fromarray(show.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2).numpy()).save(out / "reconstructions.png")
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {latent.shape[1]} channels, scale {model.config.scaling_factor:.4f}; "
          f"PSNR {psnr.mean():.2f} dB, of the worst {psnr.min():.2f}, on {len(val)} held-out pictures")


def run(words):
    folders, minutes = [w for w in words if not w.startswith("-")], [w for w in words if w.startswith("--minutes=")]
    if len(folders) != 1 or "--help" in words:
        raise SystemExit(__doc__)
    minutes = configs.cast(minutes[-1].split("=")[1] if minutes else "4", float, "minutes")
    if not minutes > 0:
        configs.fail("--minutes must be above zero")
    main(folders[0], minutes, configs.parse(["--config=nitro_debug", *(w for w in words if w.startswith("-") and not w.startswith("--minutes="))]))


if __name__ == "__main__":
    run(sys.argv[1:])

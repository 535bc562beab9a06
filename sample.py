"""Prompt -> PNG.

    python sample.py "a red apple" "tiger face on a blue background" --n=4
    python sample.py --prompts=prompts.txt --checkpoint=runs/emoji --steps=50 --guidance=4 --out=out

Takes the newest checkpoint under runs/. A setting that is not given is that of its config. A picture depends on its prompt,
its seed and the settings (all three are in the PNG's metadata), not on the pictures that are made with it.
"""
import argparse, contextlib, json, math, re, shlex, textwrap, time
from itertools import count
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

import configs, flow, pretrained
from kernels import keep_tokens
from model import unpatchify


# ------------------------------------------------------------------------------------------------------------------
# Prompts -> pictures

def generate(model, c, tokenize, encode, prompts, seeds, progress=None, size=None, batch=64, vae=None):
    """One picture for each (prompt, seed), by c.sample: uint8 (n, 3, size, size) on the CPU. At most `batch` at a time (twice
    as many rows with guidance); `progress()` is called at each of the `calls` steps. `vae` decodes the latents of a latent recipe."""
    images = []
    for i in range(0, len(prompts), batch):
        x = draw(model, c, tokenize, encode, prompts[i:i + batch], seeds[i:i + batch], progress, (size or c.model.size) // c.latent.factor)
        x = vae.decode(x) if vae else x
        images.append(((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(images)


def calls(c, n, batch=64):
    """How often `generate` calls `progress`."""
    return c.sample.steps * math.ceil(n / batch)


# Not inference_mode: the model keeps its table of angles, and one that is made there cannot be trained with afterwards.
@torch.no_grad()
def draw(model, c, tokenize, encode, prompts, seeds, progress, size):
    """-> float pictures (B, 3, size, size), about in [-1, 1], or latents (B, C, size, size)."""
    s, device, n = c.sample, next(model.parameters()).device, len(prompts)
    cfg = s.guide == "cfg" and s.guidance != 1
    ids, mask = tokenize([*prompts, ""] if cfg else list(prompts))
    longest = mask.shape[1] if c.text.pad else int(mask.sum(1).max())                   # padding is on the right
    ids, mask = ids[:, :longest].to(device), mask[:, :longest].to(device)               # (B or B + 1, L)
    kv = model.text_kv(ids if encode is None else encode(ids, mask), mask)              # once, not at every step
    pick = lambda a, which: tuple(pick(b, which) for b in a) if isinstance(a, tuple) else a[which]
    rows = lambda which: ([pick(a, which) for a in kv], mask[which])
    captions, both = rows(slice(n)), rows([*range(n), *[n] * n]) if cfg else None
    routers = [torch.Generator().manual_seed(~seed) for seed in seeds]                  # ~: other numbers than the noise's

    def call(z, t, branch):
        keep_ids = None
        if branch == "routed":
            tokens = (size // model.patch) ** 2
            keep_ids = torch.cat([keep_tokens(1, tokens, model.route.keep, g) for g in routers]).to(device)       # (B, K)
        out, _ = model(z, t, *(both if branch == "both" else captions), keep_ids)
        return unpatchify(out, model.patch, size, size)

    z = c.flow.noise * flow.noise(seeds, (c.model.channels, size, size)).to(device)
    denoise = flow.guided(call, c.flow.prediction, s.guide, s.guidance, s.lo, s.hi)
    return flow.sample(denoise, z, s.steps, c.flow.shift, s.sampler, progress)


# ------------------------------------------------------------------------------------------------------------------
# Pictures -> files

def picture(image, scale=1):
    """uint8 (3, H, W) -> PIL image, `scale` times as large."""
    image = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def wrap(text, font, width, most=5):
    """Lines of at most `width` pixels, `most` of them; a word longer than a line is cut."""
    lines = [""]
    for word in text[:most * width].split():
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
        while font.getlength(lines[-1]) > width and len(lines[-1]) > 1 and len(lines) <= most:
            end = next(i for i in range(2, len(lines[-1]) + 1) if font.getlength(lines[-1][:i]) > width) - 1
            lines[-1:] = lines[-1][:end], lines[-1][end:]
    return lines if len(lines) <= most else [*lines[:most - 1], lines[most - 1][:-3] + "..."]


def grid(images, captions, columns=None, scale=None):
    """A white page with the pictures (uint8 (n, 3, H, W)), small ones enlarged, and their captions under them."""
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    scale = scale or max(1, math.ceil(128 / images[0].shape[-1]))
    height, width = (scale * side for side in images[0].shape[1:])
    size = max(12, width // 18)
    margin, font, line = size, ImageFont.load_default(size), math.ceil(size * 1.3)
    texts = [wrap(caption, font, width) for caption in captions]
    rows = [range(i, min(i + columns, len(images))) for i in range(0, len(images), columns)]
    heights = [height + line // 2 + line * max(len(texts[i]) for i in row) + margin for row in rows]
    page = Image.new("RGB", (margin + columns * (width + margin), margin + sum(heights)), "white")
    pen, top = ImageDraw.Draw(page), margin
    for row, row_height in zip(rows, heights):
        for column, i in enumerate(row):
            left = margin + column * (width + margin)
            page.paste(picture(images[i], scale), (left, top))
            for k, text in enumerate(texts[i]):
                pen.text((left + width / 2, top + height + line // 2 + k * line), text, (60, 60, 60), font, anchor="ma")
        top += row_height
    return page


def save_png(image, path, prompt, seed, settings):
    """The picture, with what it was made from as text in the file."""
    info = PngImagePlugin.PngInfo()
    for key, text in (("prompt", prompt), ("seed", str(seed)), ("settings", json.dumps(settings))):
        info.add_text(key, text)
    picture(image).save(path, "PNG", pnginfo=info)


# ------------------------------------------------------------------------------------------------------------------
# The command line, part of which evaluate.py shares

def options(text):
    """A parser with the options of a checkpoint and of sampling."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.error = configs.fail                             # one line, without the usage before it
    add = parser.add_argument
    add("--checkpoint", help="run or checkpoint folder, or released weights by hub id or folder (default: the newest under runs/)")
    add("--text", help="hub id or folder of the text encoder (default: as trained)")
    add("--vae", help="hub id or folder of the autoencoder (default: as trained)")
    add("--weights", default="ema", choices=("ema", "model"), help="their moving average, or the last (default: ema)")
    add("--device", help="cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)")
    for name, note in (("steps", "sampling steps"), ("guidance", "1 = none"), ("guide", "cfg or self"),
                       ("sampler", "euler, heun or multistep"), ("lo", "guidance acts while lo <= t <= hi"), ("hi", "see --lo")):
        add(f"--{name}", help=note)
    return parser


def command(prompt, *flags):
    """What to type for pictures of the prompt; one that begins with a dash is no flag."""
    words = [*flags, "--", prompt] if prompt.startswith("-") else [prompt, *flags]
    return shlex.join(["python", "sample.py", *words])


def excerpt(text, most=80):
    """The first words of the text, in at most so many printable characters."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", text[:10 * most])
    return textwrap.shorten(line, most, placeholder="") or line.strip()[:most]


def example(path):
    """The first prompt that the run of this folder or checkpoint draws, in short; "" if it has drawn none."""
    for folder in (Path(path), Path(path).parent):
        try:
            return excerpt((folder / "prompts.txt").read_text("utf-8").partition("\n")[0])
        except (OSError, UnicodeDecodeError):
            pass
    return ""


def newest():
    """The run under runs/ that wrote a checkpoint last."""
    found = [path for path in Path("runs").glob("*/step_*") if re.fullmatch(r"step_\d+", path.name)]
    if not found:
        configs.fail("no checkpoint under runs/: train first (python train.py), or name one with --checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def open_checkpoint(args):
    """-> its folder, model, config with the settings of the command line, tokenize, encode, vae (none for pixels)."""
    try:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        device = torch.device(args.device or found)
        torch.zeros(1, device=device).item()
    except Exception as error:                              # RuntimeError, AssertionError, ...: each backend has its own
        configs.fail(f"--device={args.device} cannot be used: {str(error).splitlines()[0]}")
    path = Path(args.checkpoint) if args.checkpoint else newest()
    path = next(pretrained.newest_checkpoint(path), path)   # to say which it is
    model, c, tokenize, encode = pretrained.load(path, args.weights, device, {"text.encoder": args.text, "latent.vae": args.vae})
    for name in ("steps", "guidance", "guide", "sampler", "lo", "hi"):
        if (text := getattr(args, name)) is not None:
            c = configs.override(c, f"sample.{name}", text)
    if getattr(args, "size", None):
        c = configs.override(c, "model.size", args.size)
    return path, model, configs.check(c), tokenize, encode, pretrained.VAE(c, device) if c.latent.vae else None


def settings(c, path, args):
    """What a picture was made with, beside its prompt and seed."""
    s = c.sample
    return {"checkpoint": str(path), "weights": args.weights, "size": c.model.size, "shift": c.flow.shift, "steps": s.steps,
            "guidance": s.guidance, "guide": s.guide, "sampler": s.sampler, "lo": s.lo, "hi": s.hi}


@contextlib.contextmanager
def one_line(advice):
    """Out of memory, a full disk and Ctrl-C end the program with one line."""
    try:
        yield
    except KeyboardInterrupt:
        configs.fail("interrupted")
    except OSError as error:
        configs.fail(f"{error.filename or 'file'}: {error.strerror or error}")
    except (MemoryError, RuntimeError) as error:            # the CPU's allocator raises a plain RuntimeError
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        configs.fail(f"out of memory: {advice}")


def read_prompts(args):
    prompts = [prompt.encode("utf-8", "replace").decode() for prompt in args.prompt]    # may be any bytes
    if args.prompts:
        try:
            prompts += [line.strip() for line in Path(args.prompts).read_text("utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            configs.fail(f"cannot read --prompts={args.prompts}: {getattr(error, 'strerror', None) or error}")
    if not prompts:
        run = args.checkpoint or newest()
        words = command(example(run) or "what to draw", f"--checkpoint={run}")
        configs.fail(f"no prompt: {words}, or --prompts=<file with one a line>")
    return prompts


def main():
    parser = options(__doc__)
    add = parser.add_argument
    add("prompt", nargs="*")
    add("--prompts", help="file with one prompt a line")
    add("--seed", type=int, default=0, help="of the first picture of each prompt; the next has the next (default: 0)")
    add("--n", type=int, default=4, help="pictures of each prompt (default: 4)")
    add("--size", help="pixels along a side (default: as trained)")
    add("--batch", type=int, default=64, help="pictures at a time (default: 64)")
    add("--out", default="out", help="folder of the PNGs (default: out)")
    args = parser.parse_args()
    prompts = read_prompts(args)
    if args.n < 1 or args.batch < 1 or not 0 <= args.seed < 2 ** 62:
        configs.fail("--n and --batch must be above zero, --seed zero or more")
    with one_line("a smaller --batch or --size needs less"):
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        path, model, c, tokenize, encode, vae = open_checkpoint(args)
        made = settings(c, path, args)
        for prompt in prompts:
            if cut := tokenize.cut(prompt):
                print(f"{excerpt(prompt)!r} is cut: {cut}")
        captions = [prompt for prompt in prompts for _ in range(args.n)]
        seeds = [args.seed + i for _ in prompts for i in range(args.n)]
        print(", ".join(f"{key} {value}" for key, value in made.items()))
        start = time.perf_counter()
        with tqdm(total=calls(c, len(seeds), args.batch), unit="step", disable=None) as bar:
            images = generate(model, c, tokenize, encode, captions, seeds, bar.update, batch=args.batch, vae=vae)
        took = time.perf_counter() - start
        print(f"{len(seeds)} pictures, seeds {seeds[0]} to {seeds[-1]}, {took / len(seeds):.3g} seconds each")
        taken = set()
        for image, caption, seed in zip(images, captions, seeds):
            slug = re.sub(r"\W+", "-", caption.lower()).strip("-")[:50] or "image"
            names = (f"{slug}-{seed}{f'-{k}' * (k > 1)}.png" for k in count(1))          # prompts may differ in what a name cannot hold
            taken.add(name := next(name for name in names if name not in taken))
            save_png(image, out / name, caption, seed, made)
            print(out / name)
        grid(images, captions, args.n if 1 < args.n <= 12 else None).save(out / "grid.png")
        print(out / "grid.png")


if __name__ == "__main__":
    main()

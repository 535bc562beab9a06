"""Small sets of pictures in every layout that people have, and what a reader makes of them.

Picture k is of one colour, from which `number` tells k again, through JPEG and resizing: so a test can
say which caption must lie beside which picture. Names of columns, keys and files are those of the
public sets.
"""

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

import configs
import data

LEVELS = (20, 90, 160, 230)  # of red, green and blue: 64 colours
NAMES = "red green blue yellow purple cyan orange brown pink grey navy olive".split()


# Pictures and captions


def colour(k):
    return LEVELS[k % 4], LEVELS[k // 4 % 4], LEVELS[k // 16 % 4]


def number(picture):
    """The number of a picture that was read: uint8 (3, H, W)."""
    mean = np.asarray(picture, float).reshape(3, -1).mean(1)
    digits = [int(np.abs(np.array(LEVELS) - value).argmin()) for value in mean]
    return digits[0] + 4 * digits[1] + 16 * digits[2]


def encoded(k, kind="PNG", size=(40, 32), mode="RGB", **options):
    """The bytes of picture k in a file format of Pillow's."""
    file = io.BytesIO()
    Image.new("RGB", size, colour(k)).convert(mode).save(file, kind, **options)
    return file.getvalue()


def noise(k, side=48):
    """The bytes of a PNG of about 7 KB whose second half may be cut off without harm to its header."""
    pixels = np.random.default_rng(k).integers(0, 255, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def jpeg(k):
    return encoded(k, "JPEG", quality=95)


def say(k, words="a {} card, number {}"):
    return words.format(NAMES[k % len(NAMES)], k)


# Files


def write(path, content):
    """Text or bytes to a file, whose folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def text_of(value):
    return value if isinstance(value, bytes) else value.encode()


def write_tar(path, members, form=tarfile.USTAR_FORMAT, mode="w"):
    """members: [(name, text or bytes)]"""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(text_of(content))
            tar.addfile(info, io.BytesIO(text_of(content)))
    return path


def write_zip(path, members, mode="w", method=zipfile.ZIP_STORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, mode, method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def write_files(root, members):
    for name, content in members:
        write(root / name, content)
    return root


def write_parquet(path, group=5, **columns):
    import pyarrow as arrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(arrow.table(columns), path, row_group_size=group)
    return path


def struct_column(blobs):
    """Pictures as the library `datasets` writes them: struct<bytes, path>."""
    import pyarrow as arrow

    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    return arrow.array([{"bytes": blob, "path": None} for blob in blobs], kind)


def pairs(numbers, name="{:04}", image="jpg", caption="txt"):
    """[(name, content)]: a picture and a text for each number, as a folder or a tar holds them."""
    out = []
    for k in numbers:
        out.append((f"{name.format(k)}.{image}", jpeg(k) if image in ("jpg", "jpeg") else encoded(k)))
        out.append((f"{name.format(k)}.{caption}", say(k)))
    return out


# What was read


def config(source, *args):
    return configs.parse(
        ["--config=debug", f"--data={os.fsdecode(source)}", "--model.size=32", *map(str, args)]
    )


def load(source, *args):
    """-> (training set, validation set)"""
    return data.load(config(source, *args))


def items(side):
    return [tuple(int(part) for part in item) for item in side.items()]


def captions(side):
    """{number of the picture: its captions} of one side. No number may occur twice."""
    found = {}
    for item in items(side):
        k = number(side.picture(item))
        assert k not in found, f"picture {k} is there twice: {side.name(item)}"
        found[k] = [" ".join(caption.split()) for caption in side.captions(item)]
    return found


def read(source, *args):
    """{number: captions} of both sides; nothing is on both, and each has something."""
    train, val = map(captions, load(source, *args))
    assert train and val and not set(train) & set(val)
    return {**train, **val}


def expected(numbers, words="a {} card, number {}"):
    return {k: [say(k, words)] for k in numbers}


def tokenize(batch):
    """A tokenizer for `data.batches`: the bytes of a caption."""
    import torch

    ids = torch.zeros(len(batch), 200, dtype=torch.int64)
    for row, caption in zip(ids, batch):
        letters = list(caption.encode())[:200]
        row[: len(letters)] = torch.tensor(letters)
    return ids, ids > 0


def jsonl(rows):
    return "\n".join(json.dumps(row) for row in rows) + "\n"


def lines(done):
    """Everything that a command said, on both channels."""
    return f"{done.out}\n{done.err}"


def folder_size(root):
    return sum(path.stat().st_size for path in Path(root).rglob("*") if path.is_file())

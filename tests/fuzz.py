"""Damages small archives at random and reads every item of what is left: python tests/fuzz.py FIRST LAST

Archive number k is a tar, a zip or a parquet file, cut off, with bytes flipped, zeroed, moved or
doubled: a function of k. What may happen: it is read; or items are skipped, counted and said; or the
program ends with one line. Prints a line for each that did otherwise, and the counts.
"""

import contextlib
import io
import json
import os
import random
import re
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from sets import encoded, items, jpeg, load, noise, say, struct_column, write_parquet, write_tar, write_zip  # noqa: E402

N = 10


def members():
    """Pictures of three kinds, with captions in .txt and .json."""
    for k in range(N):
        yield f"folder/{k:03}.{('jpg', 'png', 'webp')[k % 3]}", (jpeg(k), noise(k), encoded(k, "WEBP"))[k % 3]
        if k % 2:
            yield f"folder/{k:03}.json", json.dumps({"prompt": say(k), "width": 40})
        else:
            yield f"folder/{k:03}.txt", say(k)


def whole(form, path):
    """An undamaged archive."""
    if form == "tar":
        write_tar(path, members())
    elif form == "zip":
        write_zip(path, members(), method=8)
    else:
        blobs = [noise(k) if k % 2 else jpeg(k) for k in range(N)]
        write_parquet(
            path, group=4, image=struct_column(blobs), caption=[say(k) for k in range(N)], width=[40] * N
        )
    return path.read_bytes()


def damage(blob, rng):
    """Some bytes of it are no longer what they were."""
    blob = bytearray(blob)
    kind = rng.choice(
        ["cut", "flip", "flip", "flip many", "zero", "double", "move", "head", "tail", "insert"]
    )
    at, size = rng.randrange(len(blob)), rng.randrange(1, 2000)
    if kind == "cut":
        del blob[at:]
    elif kind == "flip":
        blob[at] ^= 1 << rng.randrange(8)
    elif kind == "flip many":
        for _ in range(rng.randrange(2, 300)):
            blob[rng.randrange(len(blob))] = rng.randrange(256)
    elif kind == "zero":
        blob[at : at + size] = bytes(len(blob[at : at + size]))
    elif kind == "double":
        blob[at:at] = blob[at : at + size]
    elif kind == "move":
        del blob[at : at + size]
    elif kind == "insert":
        blob[at:at] = rng.randbytes(size)
    else:  # where headers and directories lie
        for _ in range(rng.randrange(1, 20)):
            place = rng.randrange(min(600, len(blob)))
            blob[place if kind == "head" else -1 - place] = rng.randrange(256)
    return bytes(blob), kind


def read_all(root, share):
    """Every item of both sides, by itself and in the way of a run. -> how many there are"""
    sides = load(root, f"--data.max_bad={share}")
    for side in sides:
        for item in items(side):
            assert side.name(item)
            picture, caption = side.get(item, 0)
            assert picture.shape == (3, 32, 32) and caption
    return len(sides[0]) + len(sides[1])


def attempt(number, wholes, folder):
    """-> what became of archive `number`: "read", "skipped" or "stopped"; raises what must not be."""
    rng = random.Random(number)
    form = ("tar", "zip", "parquet")[number % 3]
    blob, kind = damage(wholes[form], rng)
    root = Path(folder) / str(number)
    root.mkdir()
    (root / f"damaged.{form}").write_bytes(blob)
    if rng.random() < 0.5:  # beside a sound one
        (root / f"sound.{form}").write_bytes(wholes[form])
    there = N * len(list(root.iterdir()))
    share = rng.choice([1, 1, 0.5, 0.01])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            found = read_all(root, share)
    except SystemExit as stop:
        if not re.fullmatch(r"error: [^\n]+", str(stop)):
            raise AssertionError(f"{kind} {form}: not one line: {stop!r}") from stop
        return "stopped"
    except Exception as error:
        raise AssertionError(f"{kind} {form}: {type(error).__name__}: {error}") from error
    if found >= there:
        return "read"
    if not said.getvalue().strip():
        raise AssertionError(f"{kind} {form}: {there - found} of {there} items are gone without a word")
    return "skipped"


def main(first, last):
    counts = Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        wholes = {form: whole(form, Path(folder) / f"whole.{form}") for form in ("tar", "zip", "parquet")}
        for number in range(first, last):
            try:
                counts[attempt(number, wholes, folder)] += 1
            except AssertionError as error:
                counts["wrong"] += 1
                print(f"{number}: {error}")
                if error.__cause__ is not None and not isinstance(error.__cause__, SystemExit):
                    frames = traceback.extract_tb(error.__cause__.__traceback__)
                    print(
                        "    in",
                        ", ".join(
                            f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames
                        ),
                    )
    print(json.dumps(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))

"""A folder, or a file, of captioned pictures -> what lies where in it, found once and kept.

Four kinds of file hold pictures, and each is one class with the same methods: `Folder` (loose files), `Archive`
(tar and zip) and `Parquet` here, `Shard` (what tools/prepare.py wrote) in shards.py. A row is one picture and its
captions:

    len(file)                   how many rows can be used
    file.keys()                 uint64 (n,), a hash of each row's name: the rows with small ones are held out
    file.sizes()                int (n, 2), width and height in pixels, upright
    file.captions(row)          list of str: the captions of the chosen columns
    file.picture(row)           the encoded picture: bytes, or a path
    file.name(row)              for messages
    file.groups()               (n,), the row group of each row, if rows are read in groups; else None
    file.peek()                 records of some pictures, to choose the columns by
    file.index()                find the rows; before that only `peek` works
    file.lost, file.total       what cannot be used, [(name, why)], and how many rows there were
    file.left_out               what else lies there, {what: how many}

`find(root, config)` says which files of which kind a folder holds, which column or key the pictures and the captions come
from, and which files are the training and which the validation set. What is ambiguous ends with one line that names the
candidates. Layouts of real sets: README.md, "Your own pictures".
"""
import csv
import functools
import io
import json
import os
import re
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from configs import digest, fail

PICTURE_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff",
                    ".avif")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF")   # Pillow opens others, some by running programs
MAX_PIXELS = 100_000_000
MAX_CAPTION = 1_000_000         # bytes of a caption file that are read
BESIDE = "pictures beside the one meant, such as masks"
PEEK = 100                      # rows that are looked at to choose the columns

# Names of columns, keys and views that hold the picture itself, and words of names that hold something
# about it.
PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "output", "output_image", "picture")
NO_PICTURE = re.compile("thumb|mask|condition|control|depth|embed|segment|canny|edge")

# Names of columns and keys that hold captions, best first: long captions by vision models, then what people
# wrote, then
# the prompts that pictures were generated from. "txt" is a .txt or .caption beside the picture; "caption_*"
# any such name.
CAPTION_COLUMNS = ("caption_detail", "long_caption", "caption_llava", "qwen3", "gemini", "llava", "caption_*",
                   "synthetic_caption", "gpt4_turbo_caption", "txt", "enhanced_prompt", "caption", "captions", "text",
                   "blip_caption", "short_caption", "description", "input_prompt", "caption_original", "alt_text", "prompt",
                   "original_prompt")
LINK_COLUMNS = ("url", "image_url", "img_url", "urls", "image_link")
NAME_COLUMNS = ("file_name", "filename", "output_image", "image_path", "image", "img", "path", "file", "key", "id")


# ----------------------------------------------------------------------------------------------------
# Captions. A record is what is known of one picture: {"txt": lines of the .txt, key of the .json or column:
# value}

def caption_rank(name):
    """Return the place of a column among CAPTION_COLUMNS, or None where its name is not that of captions."""
    name = name.lower()
    if name in CAPTION_COLUMNS:
        return CAPTION_COLUMNS.index(name)
    if name.startswith("caption_") and not name.endswith(("_cn", "_status")):
        return CAPTION_COLUMNS.index("caption_*")
    return None


def is_text(value):
    """Tell whether a value is a caption or a list of captions."""
    if isinstance(value, list):
        return any(isinstance(line, str) for line in value)
    return isinstance(value, str)


def captions_in(record, columns):
    """Return the captions of a record in the given columns. Those that a status column calls failed do not
    count."""
    found = []
    for column in columns:
        value = record.get(column)
        status = str(record.get(f"{column}_status", record.get("status", ""))).lower()
        if not is_text(value) or status.startswith(("fail", "error")):
            continue
        for line in value if isinstance(value, list) else [value]:
            line = " ".join(line.split()) if isinstance(line, str) else ""
            is_unicode = line == line.encode("utf-8", "ignore").decode()        # half of a surrogate pair is JSON but no text
            if line and is_unicode and line not in found:
                found.append(line)
    return found


def choose_captions(records, asked, where):
    """Choose the columns of captions, from records of some pictures -> (columns, the other candidates).

    The first of CAPTION_COLUMNS that at least half of the records have, else the one that most have. Columns that are
    `asked` for by --data.caption=a,b are taken as they are, and all of their captions count.
    """
    filled, kinds = Counter(), {}
    for record in records:
        for column, value in record.items():
            kinds.setdefault(column, type(value).__name__)
            if value is not None and not is_text(value):
                kinds[column] = type(value).__name__
            filled[column] += bool(captions_in(record, [column]))
    texts = [column for column in kinds if filled[column]]
    if asked:
        columns = [column.strip() for column in asked.split(",")]
        for column in columns:
            if column not in kinds:
                fail(f"--data.caption={column}: {where} has no such column; of text there are: {', '.join(texts) or 'none'}")
            if not filled[column]:
                holds = "is empty" if kinds[column] in ("NoneType", "str") else f"holds {kinds[column]}, not text"
                fail(f"--data.caption={column}: the column {holds} in {where}; of text there are: {', '.join(texts) or 'none'}")
        return columns, [column for column in texts if column not in columns]
    ranked = sorted((c for c in texts if caption_rank(c) is not None), key=lambda c: (caption_rank(c), c))
    if not ranked:
        return [], texts
    half = [column for column in ranked if 2 * filled[column] >= len(records)]
    best = half[0] if half else max(ranked, key=lambda column: filled[column])
    return [best], [column for column in ranked if column != best]


def read_text(blob):
    """Decode the bytes of a caption file: UTF-8, with or without a mark, or UTF-16 with one. Else raises
    ValueError."""
    blob = blob[:MAX_CAPTION]
    try:
        if blob.startswith((b"\xff\xfe", b"\xfe\xff")) and not blob.startswith(b"\xff\xfe\0\0"):
            return blob.decode("utf-16")
        if b"\0" in blob:
            raise ValueError("the caption holds NUL bytes: it is not UTF-8")
        return blob.decode("utf-8-sig", "ignore" if len(blob) == MAX_CAPTION else "strict")
    except UnicodeDecodeError:
        raise ValueError("the caption is not UTF-8") from None


def make_record(txt, json_blob, table_row=None):
    """Build the record of a picture from the bytes of its .txt, of its .json, and its row of a table; each
    may be None."""
    record = dict(table_row or {})
    if json_blob is not None:
        entry = json.loads(read_text(json_blob))
        record.update(entry if isinstance(entry, dict) else {})
    if txt is not None:
        lines = [line.strip() for line in read_text(txt).splitlines()]
        record["txt"] = [line for line in lines if line]
    return record


# ----------------------------------------------------------------------------------------------------
# Pictures

def reason(error):
    """Say an error in one line, without the path."""
    text = getattr(error, "strerror", None) or re.sub(r" (\w*Path\()?'.*", "", str(error), flags=re.DOTALL)
    return " ".join(text.split())[:200] or type(error).__name__


def opened(file):
    """Open a picture (a path or a file) and read its header only: one that claims too many pixels raises
    ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)         # our limit stands below
        image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels are too many")
    return image


def size_of(file):
    """Return width and height of a picture, upright, from its header."""
    with opened(file) as image:
        turned = "exif" in image.info and image.getexif().get(0x0112, 1) > 4
        return image.size[::-1] if turned else image.size


def pair(names, asked, where):
    """Match pictures with the files beside them by name.

    Returns ({picture: (its .txt or .caption or None, its .json or None)}, [names left out]). "a.b.png" belongs to
    "a.b.txt", or else to "a.txt"; then it is a view of a, named b.png. `asked` (--data.image=b) decides between views.
    """
    beside, pictures, views, left_out = {}, {}, {}, []
    for name in names:
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if suffix in PICTURE_SUFFIXES:
            pictures.setdefault(stem, []).append(name)
        elif suffix in (".txt", ".caption", ".json"):
            beside.setdefault(stem, {})[suffix] = name
    for stem, found in pictures.items():
        folder, slash, base = stem.rpartition("/")
        key = folder + slash + base.partition(".")[0]
        is_view = key != stem and stem not in beside and key in beside
        for name in found:
            suffix = os.path.splitext(name)[1][1:]
            view = f"{stem[len(key) + 1:]}.{suffix}" if is_view else suffix
            views.setdefault(key if is_view else stem, {})[view] = name
    result, several = {}, Counter()
    for key, found in views.items():
        chosen = choose_view(found, asked)
        if len(chosen) > 1:
            several[tuple(sorted(chosen))] += 1
        for view, name in found.items():
            if view not in chosen:
                left_out.append(name)
                continue
            texts = beside.get(os.path.splitext(name)[0]) or beside.get(key, {})
            result[name] = texts.get(".txt") or texts.get(".caption"), texts.get(".json")
    if asked and pictures and not result:
        kinds = sorted({view for found in views.values() for view in found})
        fail(f"--data.image={asked}: {where} has no such pictures; there are: {', '.join(kinds[:8])}")
    if sum(several.values()) > len(views) / 2:
        fail(f"{where} holds several pictures of each name: {', '.join(several.most_common(1)[0][0])}; say which with --data.image=")
    return result, left_out


def choose_view(views, asked):
    """Choose among pictures of one name, {"png" or "depth.png": file}: what is asked for, else the plain one,
    else no mask."""
    if asked:
        return [view for view in views if asked in (view, view.rpartition(".")[0], view.rpartition(".")[2])]
    plain = [view for view in views if "." not in view]
    return plain or [view for view in views if not NO_PICTURE.search(view.lower())]


def choose_picture_column(columns, asked, where):
    """Choose the column of pictures, among [(name, "struct" or "bytes")] -> its name; None where there is
    none."""
    names = [name for name, _ in columns]
    if asked:
        if asked not in names:
            fail(f"--data.image={asked}: {where} has no such column of pictures; there are: {', '.join(names) or 'none'}")
        return asked
    allowed = [(name, kind) for name, kind in columns if not NO_PICTURE.search(name.lower())]
    candidates = [name for name, _ in allowed if name.lower() in PICTURE_COLUMNS]
    candidates = candidates or [name for name, kind in allowed if kind == "struct"] or [name for name, _ in allowed]
    if len(candidates) > 1:
        fail(f"{where} has several columns of pictures: {', '.join(candidates)}; say which with --data.image=")
    return candidates[0] if candidates else None


# ----------------------------------------------------------------------------------------------------
# An index is kept beside its file, or in the user's cache where that cannot be written

@contextmanager
def atomic(path, writer=""):
    """Yield another name to write to; flush it to disk, then rename it. `writer` tells apart those who write
    the same at once."""
    suffix = f".{writer}.part" if writer != "" else ".part"
    part = path.with_name(path.name + suffix)
    yield part
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def cache_folder():
    """Return the folder of what nanoT2I keeps for the user: $XDG_CACHE_HOME/nanot2i."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nanot2i"


def mark_of(path, choice):
    """Return what an index was made of: exact size and time, a checksum of both ends of the file, and what
    was chosen."""
    stat = path.stat()
    with open(path, "rb", buffering=0) as file:
        ends = zlib.crc32(file.read(65536))
        file.seek(max(0, stat.st_size - 65536))
        ends = zlib.crc32(file.read(65536), ends)
    return json.dumps([3, stat.st_size, stat.st_mtime_ns, ends, choice])


def kept(path, choice, make, fetch=None):
    """Return (place, {name: array}) for a file: as kept, if the file is still the same, else from make(),
    which is then kept.

    The place is the path of the kept arrays, None where nothing can be written. A file that comes through a cache need not
    be here for that: it is fetched, by fetch(path), to be indexed for the first time.
    """
    mark = json.dumps(choice) if fetch else mark_of(path, choice)
    name = f"{path.name}.{digest(*map(str, choice)) % 16 ** 6:06x}.index.npz"
    places = [cache_folder() / f"{digest(path.resolve()):016x}.{name}"]
    if not path.is_symlink():                           # a link's own folder says nothing of the file
        places.insert(0, path.parent / f".{name}")
    for place in places:
        try:
            with np.load(place) as file:
                arrays = {key: file[key] for key in file.files}         # as a whole: so its checksums are compared
            if arrays["mark"].tobytes().decode() == mark:
                return place, arrays
        except Exception:                               # there is none, or it is damaged in whatever way
            continue
    if fetch:
        fetch(path)
    arrays = make()
    arrays["mark"] = np.frombuffer(mark.encode(), np.uint8)
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic(place, os.getpid()) as part, open(part, "wb") as file:
                np.savez(file, **arrays)
            return place, arrays
        except OSError:
            continue
    return None, arrays


@functools.lru_cache(maxsize=64)
def handle(path, process):
    """Open a file in this process: loader processes that were forked must not share a position in it.

    Python's buffer is of the file system's block, on NFS and Lustre 1 to 4 MiB: without it a read fetches what it is for.
    """
    return open(path, "rb", buffering=0)


def read_piece(path, offset, size, packing=0, limit=4 * MAX_PIXELS):
    """Read `size` bytes of a file from `offset` on, and unpack at most `limit` bytes of what a zip has
    deflated (1)."""
    if packing == 2:
        raise ValueError("the zip holds it encrypted, or packed in a way that is not read")
    file = handle(path, os.getpid())
    file.seek(int(offset))
    blob = file.read(int(size))
    if len(blob) < size:
        raise ValueError("the file is cut off")
    if packing:
        blob = zlib.decompressobj(-15).decompress(blob, limit)
    return blob


def close_files():
    """Close all files: one that was dropped from a cache keeps its room on the disk as long as it is open."""
    handle.cache_clear()
    parquet_file.cache_clear()


# ----------------------------------------------------------------------------------------------------
# Loose files

class Folder:
    """Pictures that are files, each with its captions beside it or in a table that names it. Looked through
    at each start."""

    def __init__(self, root, names, chosen):
        self.path, self.root, self.chosen = root, root, chosen
        self.pairs, extra = pair(names, chosen.image, root)
        self.left_out = Counter({BESIDE: len(extra)})
        self.rows, self.lost, self.total = [], [], 0

    def peek(self):
        """Return the records of some pictures."""
        pictures = sorted(self.pairs)
        return records_of(pictures[::1 + len(pictures) // PEEK], self.record)

    def record(self, name):
        txt, json_name = self.pairs[name]
        blobs = [(self.root / beside).read_bytes() if beside else None for beside in (txt, json_name)]
        return make_record(*blobs, self.chosen.row_of(name))

    def index(self):
        """Look at each picture's header and captions; keep those that can be used."""
        names = sorted(self.pairs)
        bar = tqdm(names, desc="checking pictures", leave=False, disable=len(names) < 5000)
        self.total = len(names) + len(self.lost)
        sizes = []
        for name in bar:
            try:
                if not captions_in(self.record(name), self.chosen.columns):
                    raise ValueError(self.chosen.no_caption())
                sizes.append(size_of(self.root / name))
                self.rows.append(name)
            except Exception as error:                  # broken files raise anything
                self.lost.append((name, reason(error)))
        self._sizes = np.array(sizes, np.int64).reshape(-1, 2)

    def __len__(self):
        return len(self.rows)

    def keys(self):
        return np.array([digest(name) for name in self.rows], np.uint64)

    def sizes(self):
        return self._sizes

    def groups(self):
        return None

    def captions(self, row):
        return captions_in(self.record(self.rows[row]), self.chosen.columns)

    def picture(self, row):
        return self.root / self.rows[row]

    def name(self, row):
        return self.rows[row]


def records_of(names, read):
    """Return the records that can be read, of those named."""
    records = []
    for name in names:
        try:
            records.append(read(name))
        except Exception:                               # broken files raise anything; why is said when they are indexed
            continue
    return records


# ----------------------------------------------------------------------------------------------------
# Tar and zip

MEMBER = np.dtype([("offset", "u8"), ("size", "u4"), ("packing", "u1")])
ROW = np.dtype([("key", "u8"), ("picture", MEMBER), ("width", "u4"), ("height", "u4"), ("txt", MEMBER), ("json", MEMBER)])
NO_MEMBER = (0, 0, 0)


class Archive:
    """A tar or zip of pictures and their captions. Its index of offsets is kept: then any picture is one read
    away."""

    def __init__(self, path, chosen):
        self.path, self.chosen, self.lost, self.total, self.left_out = path, chosen, [], 0, Counter()

    def peek(self):
        """Return the records of the first pictures; where all pictures come before all captions, list it
        whole."""
        for limit in (4 * PEEK, None):
            members, _ = list_members(self.path, limit)
            pairs, _ = pair(members, self.chosen.image, self.path)
            if any(any(texts) for texts in pairs.values()):
                break

        def read(picture):
            blobs = [read_piece(self.path, *members[name], MAX_CAPTION) if name else None for name in pairs[picture]]
            return make_record(*blobs, self.chosen.row_of(picture))
        return records_of(list(pairs)[:PEEK], read)

    def index(self):
        """Make the index, or see that the kept one still holds. It stays on the disk: of many archives it is
        large."""
        chosen = self.chosen
        columns = None if chosen.table else chosen.columns             # None: captions come from a table
        self.place, self.rows, self.names = None, None, None
        try:
            make = functools.partial(scan, self.path, chosen.image, columns)
            self.place, arrays = kept(self.path, [chosen.image, *(columns or ["table"])], make, chosen.fetch)
        except OSError as error:                        # a link that leads nowhere, a file that may not be read
            arrays = pack_index([], [], [(self.path.name, reason(error))], {})
        about = json.loads(arrays["about"].tobytes())
        self.left_out, self.lost, self.count = Counter(about["left_out"]), about["lost"], len(arrays["rows"])
        self.total = self.count + len(self.lost)
        if chosen.table:                                # then names are needed at hand
            if chosen.fetch:
                chosen.fetch(self.path)
            rows, names = arrays["rows"], split_names(arrays)
            good = [k for k in range(self.count) if self.has_caption(rows[k], names[k])]
            self.rows, self.names, self.count = rows[good], [names[k] for k in good], len(good)
            self.lost += [(name, chosen.no_caption()) for name in sorted(set(names) - set(self.names))]
        elif not self.place:
            self.rows, self.names = arrays["rows"], split_names(arrays)

    def has_caption(self, row, name):
        return bool(attempt(lambda: captions_in(self.record(row, name), self.chosen.columns)))

    def record(self, row, name=None):
        """Return the record of a ROW; the name of its picture is needed where captions come from a table."""
        blobs = []
        for member in (row["txt"], row["json"]):
            blobs.append(read_piece(self.path, *member.item(), MAX_CAPTION) if member["size"] else None)
        return make_record(*blobs, self.chosen.row_of(name) if name else None)

    def table(self):
        """Return the ROWs that can be used."""
        return load_rows(self.place) if self.rows is None else self.rows

    def __len__(self):
        return self.count

    def keys(self):
        return self.table()["key"]

    def sizes(self):
        table = self.table()
        return np.stack([table["width"], table["height"]], 1).astype(np.int64)

    def groups(self):
        return None

    def captions(self, row):
        name = self.names[row] if self.chosen.table else None
        return captions_in(self.record(self.table()[row], name), self.chosen.columns)

    def picture(self, row):
        return read_piece(self.path, *self.table()[row]["picture"].item())

    def name(self, row):
        names = self.names or split_names(np.load(self.place))
        return f"{self.path.name}: {names[row]}"


@functools.lru_cache(maxsize=64)
def load_rows(place):
    """Read the ROWs of a kept index: those of a few archives stay in memory."""
    return np.load(place)["rows"]


def split_names(arrays):
    """Return the names of the rows of an index."""
    blob = arrays["names"].tobytes().decode("utf-8", "surrogateescape")
    return blob.split("\n") if blob else []


def attempt(function, *args):
    """Call a function; return None where it fails: why is told when somebody needs what is missing."""
    try:
        return function(*args)
    except Exception:                                   # broken files raise anything
        return None


def list_members(path, limit=None):
    """List the files in a tar or zip -> ({name: (offset, bytes, packing)}, what is wrong with it or "").

    Of two members of one name the last counts, as it does for tar itself.
    """
    members = {}
    try:
        if path.suffix.lower() == ".zip":
            list_zip(path, members)
            return members, ""
        if read_piece(path, 0, 2) == b"\x1f\x8b":
            return members, "it is compressed: unpack it (gunzip)"
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isfile():
                    members[name] = member.offset_data, member.size, 0
                elif member.islnk() and member.linkname.removeprefix("./") in members:
                    members[name] = members[member.linkname.removeprefix("./")]
                tar.members.clear()                     # else each header stays in memory
                if limit and len(members) >= limit:
                    return members, ""
            size = path.stat().st_size
            if any(read_piece(path, max(0, size - 512), min(512, size))):       # Python's reader does not mind
                return members, "the tar is cut off"
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError, zlib.error, EOFError, NotImplementedError) as error:
        return members, f"it cannot be read: {reason(error)}"
    return members, ""


def list_zip(path, members):
    """Add the files in a zip to `members`."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            packing = {zipfile.ZIP_STORED: 0, zipfile.ZIP_DEFLATED: 1}.get(entry.compress_type, 2)
            if entry.flag_bits & 1:
                packing = 2                             # encrypted
            header = read_piece(path, entry.header_offset, 30)
            skipped = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
            offset = entry.header_offset + 30 + skipped
            members[entry.filename.removeprefix("./")] = offset, entry.compress_size, packing


def scan(path, image, columns):
    """Make the index of an archive: the rows that can be used, their names, and what cannot be used and why.

    Where `columns` is None captions come from elsewhere and are not looked at.
    """
    members, wrong = list_members(path)
    visible = [name for name in members if not os.path.basename(name).startswith(".")]
    pairs, extra = pair(visible, image, path)
    left_out = Counter({BESIDE: len(extra)})
    for name in visible:
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in (*PICTURE_SUFFIXES, *TABLE_SUFFIXES, ".txt", ".caption"):
            left_out[f"{suffix or 'nameless'} files in archives"] += 1
    if wrong:                                           # what is left of it may be anything: all of it counts as lost
        return pack_index([], [], [(name, wrong) for name in pairs] or [(path.name, wrong)], left_out)
    rows, names, lost = [], [], []
    bar = tqdm(pairs.items(), desc=f"indexing {path.name}", leave=False, disable=len(pairs) < 20_000)
    for picture, (txt, json_name) in bar:
        places = [members[name] if name else NO_MEMBER for name in (picture, txt, json_name)]
        try:
            if columns is not None:
                blobs = [read_piece(path, *place, MAX_CAPTION) if place[1] else None for place in places[1:]]
                if not captions_in(make_record(*blobs), columns):
                    raise ValueError(f"no caption in {', '.join(columns)}")
            width, height = size_in_archive(path, places[0])
            rows.append((digest(path.stem, picture), places[0], width, height, *places[1:]))
            names.append(picture)
        except Exception as error:                      # broken files raise anything
            lost.append((picture, reason(error)))
    return pack_index(rows, names, lost, left_out)


def size_in_archive(path, place):
    """Return width and height of a picture in an archive, from its first 64 KB if they tell."""
    offset, size, packing = place
    head = attempt(lambda: size_of(io.BytesIO(read_piece(path, offset, min(size, 2 ** 16), packing, 2 ** 16))))
    return head or size_of(io.BytesIO(read_piece(path, *place)))


def pack_index(rows, names, lost, left_out):
    """Return the arrays of an index: fixed rows, and what has any length as bytes."""
    blob = "\n".join(name.replace("\n", " ") for name in names).encode("utf-8", "surrogateescape")
    return {"rows": np.array(rows, ROW), "names": np.frombuffer(blob, np.uint8),
            "about": pack_json({"lost": lost, "left_out": left_out})}


def pack_json(value):
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


# ----------------------------------------------------------------------------------------------------
# Parquet

GROUP_BYTES = 256 * 2 ** 20     # of row groups that a process holds, and among whose rows pictures are shuffled


class Parquet:
    """Rows with the encoded picture in a column, read in place, a row group at a time."""

    def __init__(self, path, chosen):
        self.path, self.chosen, self.lost, self.total, self.left_out = path, chosen, [], 0, Counter()

    def peek(self):
        """Return the records of some rows, of the first, the middle and the last row group."""
        file = parquet_file(self.path, os.getpid())
        texts = [field.name for field in file.schema_arrow if not picture_kind(field.type)]
        records = []
        for group in sorted({0, file.num_row_groups // 2, file.num_row_groups - 1}):
            if texts and file.num_row_groups:
                rows = file.read_row_group(group, columns=texts, use_threads=False).slice(0, PEEK // 3)
                records += records_of(range(len(rows)), lambda row, rows=rows: rows.slice(row, 1).to_pylist()[0])
        return records

    def index(self):
        """Read the footer, or what was kept of it; where aspect ratios matter (data.buckets) measure each
        picture once."""
        chosen = self.chosen
        try:
            _, arrays = kept(self.path, ["footer", chosen.image, *chosen.columns], self.read_footer, chosen.fetch)
        except OSError:                                 # a link that leads nowhere, a file that may not be read
            arrays = self.read_footer()
        about = json.loads(arrays["about"].tobytes())
        self.column, self.columns, self.lost = about["column"], about["columns"], about["lost"]
        self.counts, self.bytes = arrays["counts"], arrays["bytes"]
        self.total = len(self) + len(self.lost)
        if chosen.measure:
            self._sizes = kept(self.path, ["sizes", self.column], self.measure)[1]["sizes"]

    def picture_column(self):
        return picture_column(parquet_file(self.path, os.getpid()).schema_arrow, self.chosen.image, self.path)

    def read_footer(self):
        """Return the rows and bytes of each row group, the columns to read, and what is wrong with the
        file."""
        about, groups = {"column": None, "columns": [], "lost": []}, []
        try:
            file = parquet_file(self.path, os.getpid())
            names = file.schema_arrow.names
            about["column"] = self.picture_column()
            present = [column for column in self.chosen.columns if column in names]
            if not (about["column"] and present):
                raise ValueError(f"it has no column of pictures, or none of {', '.join(self.chosen.columns)}")
            status = ["status", *(f"{column}_status" for column in present)]
            about["columns"] = present + [column for column in status if column in names]
            groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        except Exception as error:                      # a broken file may raise anything
            about["lost"] = [(self.path.name, f"it cannot be read: {reason(error)}")]
        return {"counts": np.array([group.num_rows for group in groups], np.int64),
                "bytes": np.array([group.total_byte_size for group in groups], np.int64), "about": pack_json(about)}

    def measure(self):
        """Return the size of each picture; 1 x 1 where it cannot be told: that one is found to be bad when it
        is read."""
        sizes = []
        for row in range(len(self)):
            sizes.append(attempt(lambda row=row: size_of(io.BytesIO(self.picture(row)))) or (1, 1))
        return {"sizes": np.array(sizes, np.int64).reshape(-1, 2)}

    def __len__(self):
        return int(self.counts.sum())

    def keys(self):
        """Hash the numbers of the rows, by splitmix64."""
        x = np.arange(len(self), dtype=np.uint64) + np.uint64(digest(self.path.name))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x ^ (x >> np.uint64(31))

    def sizes(self):
        return self._sizes

    def groups(self):
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def value(self, row, columns):
        """Return the row's values of some columns, {column: value}."""
        ends = np.cumsum(self.counts)
        group = int(np.searchsorted(ends, row, "right"))
        rows = row_group(self.path, group, tuple(columns))
        return rows.slice(int(row - ends[group] + self.counts[group]), 1).to_pylist()[0]

    def captions(self, row):
        return captions_in(self.value(row, self.columns), self.chosen.columns)

    def picture(self, row):
        value = self.value(row, [self.column])[self.column]
        blob = value["bytes"] if isinstance(value, dict) else value
        if blob is None:
            raise ValueError("the row holds no picture")
        return blob

    def name(self, row):
        return f"{self.path.name}: row {row}"


def picture_kind(kind):
    """Return "struct" or "bytes" for a type of columns that may hold encoded pictures, else ""."""
    if str(kind) in ("binary", "large_binary", "binary_view"):
        return "bytes"
    return "struct" if str(kind).startswith("struct<") and "bytes: " in str(kind) else ""


def picture_column(schema, asked, where):
    """Choose the column of pictures of a parquet file; None where there is none."""
    columns = [(field.name, picture_kind(field.type)) for field in schema if picture_kind(field.type)]
    return choose_picture_column(columns, asked, where)


@functools.lru_cache(maxsize=64)
def parquet_file(path, process):
    """Open a parquet file in this process and read its footer."""
    return parquet_reader(path)


def parquet_reader(file):
    """Open a parquet file, a path or a file, and read its footer."""
    try:
        import pyarrow.parquet
    except ImportError:
        fail("parquet files need a package: pip install pyarrow")
    return pyarrow.parquet.ParquetFile(file)


GROUPS = OrderedDict()          # the row groups that this process holds, the last used last


def row_group(path, group, columns):
    """Read columns of a row group, or find them among those that were read last."""
    key = (path, group, columns, os.getpid())
    if key not in GROUPS:
        GROUPS[key] = parquet_file(path, os.getpid()).read_row_group(group, columns=list(columns), use_threads=False)
        held = sum(rows.nbytes for rows in GROUPS.values())
        while held > 2 * GROUP_BYTES and len(GROUPS) > 4:           # two groups at least, captions and pictures of each
            held -= GROUPS.popitem(last=False)[1].nbytes
    GROUPS.move_to_end(key)
    return GROUPS[key]


# ----------------------------------------------------------------------------------------------------
# Tables that name pictures: metadata.jsonl or .csv or .parquet, a json list, COCO's images and annotations

TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")


def read_table(name, blob):
    """Read the bytes of a table -> a list of records. Raises anything where it is none."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".jsonl":
        return [attempt(json.loads, line) for line in blob.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    if suffix == ".parquet":
        file = parquet_reader(io.BytesIO(blob))
        texts = [field.name for field in file.schema_arrow if not picture_kind(field.type)]
        return file.read(columns=texts).to_pylist()
    text = blob.decode("utf-8-sig")
    if suffix in (".csv", ".tsv"):
        rows = csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ",")
        return [None if None in row else row for row in rows]           # None: more values than there are columns
    table = json.loads(text)
    if isinstance(table, dict) and "images" in table and "annotations" in table:
        return join_annotations(table)
    return table if isinstance(table, list) else []


def head_of_table(path):
    """Read the first records of a table, which may be compressed, to see what it lists."""
    with open(path, "rb") as file:
        blob = file.read() if path.suffix == ".parquet" else file.read(2 ** 20)
    name = path.name
    if path.suffix == ".gz":
        name, blob = path.stem, zlib.decompressobj(31).decompress(blob, 2 ** 20)
    whole_lines = path.suffix in (".json", ".parquet") or len(blob) < 2 ** 20
    return read_table(name, blob if whole_lines else blob.rpartition(b"\n")[0])


def join_annotations(table):
    """Join COCO's captions with its images -> [{"file_name", "caption": [...]}]."""
    captions = {}
    for annotation in table["annotations"]:
        if isinstance(annotation.get("caption"), str):
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
    images = [image for image in table["images"] if image.get("id") in captions]
    return [{"file_name": image.get("file_name"), "caption": captions[image["id"]]} for image in images]


class Table:
    """Records by the name of their picture, without its suffix: by the whole path, else by its last part if
    only one has it.

    lost: rows of a metadata file that name no picture, [(name, why)]. Other tables may well name pictures that are not here.
    """

    def __init__(self):
        self.by_path, self.by_base, self.promised, self.lost = {}, {}, [], []

    def add(self, table, records):
        """Add the records of a table -> how many of them name a picture."""
        folder = table.rpartition("/")[0]
        is_metadata = os.path.basename(table).startswith("metadata.")
        lost, count = [], 0
        for number, record in enumerate(records, 1):
            name = self.picture_of(record)
            if not name:
                lost.append((f"{table}: row {number}", "it is no record that names a picture"))
            else:
                count += 1
                path = f"{folder}/{name}" if folder else name
                self.promised += [path] if is_metadata else []
                stem = stem_of(path)
                record = {column: value for column, value in record.items() if is_text(value)}
                if stem in self.by_path:                # several rows of a picture are several captions
                    record = merge(self.by_path[stem], record)
                base = stem.rpartition("/")[2]
                self.by_base[base] = None if self.by_base.get(base, stem) != stem else stem
                self.by_path[stem] = record
        self.lost += lost if is_metadata else []
        return count

    def picture_of(self, record):
        """Return the name of the picture of a record; None where there is none."""
        if not isinstance(record, dict):
            return None
        names = [record[column] for column in NAME_COLUMNS if isinstance(record.get(column), (str, int))]
        return str(names[0]).replace("\\", "/").removeprefix("./") if names else None

    def find(self, picture):
        """Return the record of a picture, or None."""
        stem = stem_of(picture)
        return self.by_path.get(stem) or self.by_path.get(self.by_base.get(stem.rpartition("/")[2]))

    def missing(self, pictures):
        """Return what cannot be used of the metadata files, given the pictures that are here: [(name,
        why)]."""
        here = {stem_of(picture) for picture in pictures}
        return self.lost + [(name, "there is no such picture") for name in self.promised if stem_of(name) not in here]


def merge(one, other):
    """Merge two records of a picture: the texts of a column become a list."""
    merged = dict(one)
    for column, value in other.items():
        if is_text(value) and is_text(one.get(column)):
            both = [x if isinstance(x, list) else [x] for x in (one[column], value)]
            merged[column] = both[0] + both[1]
    return merged


def stem_of(name):
    """Cut the suffix of pictures from a name."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PICTURE_SUFFIXES else name


# ----------------------------------------------------------------------------------------------------
# What a folder holds

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test", "eval": "test"}
SPLIT = re.compile(f"(?:^|[^a-z])({'|'.join(SPLITS)})(?=[^a-z]|$)")
WANTED = ": want pictures with captions beside them (a.png + a.txt, or metadata.jsonl), .tar, .zip or .parquet"
PACKED_SUFFIXES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


class Chosen:
    """What was chosen for files of one kind: the columns of captions, the flag --data.image, the table that
    names pictures.

    measure: whether aspect ratios matter. fetch(path) brings a file here that comes through a cache; None where files are here.
    """

    def __init__(self, image, measure, fetch):
        self.image, self.measure, self.fetch = image, measure, fetch
        self.columns, self.table = [], None

    def row_of(self, picture):
        return self.table.find(picture) if self.table else None

    def no_caption(self):
        return f"no caption in {', '.join(self.columns)}" if self.columns else "no caption"


class Source:
    """The files of one source: to train on and, where the source says so itself, to validate on (else
    None)."""

    def __init__(self, label):
        self.label, self.train, self.val, self.left_out, self.notes = label, [], None, Counter(), []

    def summary(self, size=""):
        """Say in one line what is read."""
        kinds = Counter(type(file).__name__ for file in [*self.train, *(self.val or [])])
        words = {"Folder": "folder", "Archive": "archive", "Parquet": "parquet file"}
        files = ", ".join(f"{count:,} {words[kind]}{'s' * (count > 1)}" for kind, count in kinds.items())
        left_out = ", ".join(f"{count:,} {what}" for what, count in self.left_out.items() if count)
        parts = [files + size, *dict.fromkeys(self.notes)]
        if left_out:
            parts.append(f"left out: {left_out}")
        return f"{self.label}: {'; '.join(parts)}"


def walk(root):
    """List the files below a folder -> (names, {what is left out: how many}). Links are followed, each folder
    once."""
    names, hidden, seen, closed = [], 0, set(), []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=closed.append):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        hidden += sum(name.startswith(".") for name in folders)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        names += [prefix + name for name in files if not name.startswith(".")]
    return names, Counter({"hidden folders": hidden, "folders that cannot be opened": len(closed)})


def find(root, names, config, fetch=None, label=None):
    """Find out what the named files below `root` are -> Source. `fetch(path)` brings a file here before it is
    looked at."""
    source = Source(label or root)
    folder = root.parent if root.is_file() else root
    kinds, tables, packed = sort_files(folder, names, config.data.image, fetch, source)
    if not kinds:
        nothing_found(root, folder, tables, packed, source)
    splits = {split_of(name, kind) for kind, members in kinds.items() for name in members}
    held_out = "val" if "val" in splits else "test"
    rest = {"train"} if Folder in kinds else {"train", ""}              # a folder of pictures may be named test by chance
    if splits & rest and held_out in splits:
        source.val = []
    for kind, members in kinds.items():
        for group in group_by_folder(kind, members, fetch):
            sides = {"train": [], "val": [], "test": []}
            for name in group:
                side = split_of(name, kind) if source.val is not None else "train"
                sides[side or "train"].append(name)
            chosen = Chosen(config.data.image, config.data.buckets, fetch)
            train = open_files(kind, folder, sides["train"], chosen)
            val = open_files(kind, folder, sides[held_out], chosen)
            if train or val:
                choose_columns(train or val, chosen, folder, tables, config.data.caption, source)
            if kind is Folder and chosen.table and train:
                train[0].lost += chosen.table.missing(members)
            source.train += train
            if source.val is not None:
                source.val += val
            source.left_out["files of the test split"] += len(sides["test"]) * (held_out == "val")
    return source


def group_by_folder(kind, names, fetch):
    """Group archives and parquet files by their folder: the sets of one hub id often differ in their columns.

    Behind a cache, where each look costs a download, and of loose files all are one group.
    """
    if kind is Folder or fetch:
        return [names]
    groups = {}
    for name in names:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    return list(groups.values())


def sort_files(folder, names, image, fetch, source):
    """Sort names -> ({class: names of its files}, tables that may name pictures, compressed files); the rest
    is left out."""
    kinds, tables, packed = {Folder: [], Archive: [], Parquet: []}, [], []
    pictures = {os.path.splitext(name)[0] for name in names if name.lower().endswith(PICTURE_SUFFIXES)}
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if suffix in (*PICTURE_SUFFIXES, ".txt", ".caption") or suffix == ".json" and stem in pictures:
            kinds[Folder].append(name)
        elif suffix in (".tar", ".zip"):
            kinds[Archive].append(name)
        elif suffix == ".parquet" and (fetch or holds_pictures(folder / name, image)):
            kinds[Parquet].append(name)
        elif suffix in TABLE_SUFFIXES:
            tables.append(name)
            if suffix == ".parquet":
                source.left_out[f".parquet files without pictures{binary_columns(folder / name)}"] += 1
        elif suffix in PACKED_SUFFIXES:
            packed.append(name)
            source.left_out[f"compressed {suffix} files: unpack them"] += 1
        else:
            source.left_out[f"{suffix or 'nameless'} files"] += 1
    if not pictures:
        source.left_out[".txt files without a picture"] += len(kinds[Folder])
        kinds[Folder] = []
    return {kind: members for kind, members in kinds.items() if members}, tables, packed


def holds_pictures(path, image):
    """Tell whether a parquet file has a column of pictures."""
    try:
        return picture_column(parquet_file(path, os.getpid()).schema_arrow, image, path) is not None
    except (OSError, ValueError):
        return True                                     # a damaged file: it will be counted as that


def binary_columns(path):
    """Name the columns of a parquet file that hold pictures but are not taken for the picture."""
    schema = parquet_file(path, os.getpid()).schema_arrow
    columns = [field.name for field in schema if picture_kind(field.type)]
    return f" but {', '.join(columns)} (--data.image={columns[0]} would take it)" if columns else ""


def split_of(name, kind):
    """Return "train", "val" or "test" where a folder, or the name of a tar, zip or parquet file, says so,
    else ""."""
    parts = name.lower().split("/")
    for part in reversed(parts[:-1] if kind is Folder else parts):
        match = SPLIT.search(part)
        if match:
            return SPLITS[match[1]]
    return ""


def open_files(kind, folder, names, chosen):
    if kind is Folder:
        return [Folder(folder, names, chosen)] if names else []
    return [kind(folder / name, chosen) for name in names]


def choose_columns(files, chosen, folder, tables, asked, source):
    """Choose the columns of captions by what the first, the middle and the last file hold; ask the tables if
    they hold too few."""
    looked_at = [files[k] for k in sorted({0, len(files) // 2, len(files) - 1})]
    if chosen.fetch:
        looked_at = files[:1]
        chosen.fetch(files[0].path)
    records = [record for file in looked_at for record in attempt(file.peek) or []]
    columns, _ = choose_captions(records, "", source.label)
    filled = sum(bool(captions_in(record, columns)) for record in records)
    known = {column for record in records for column in record}
    wanted = {column.strip() for column in asked.split(",")} - {""}
    if not isinstance(files[0], Parquet) and (2 * filled < len(records) or not wanted <= known):
        chosen.table = read_tables(folder, tables, files, source)
        records = [record for file in looked_at for record in attempt(file.peek) or []]
    chosen.columns, others = choose_captions(records, asked, source.label)
    if not chosen.columns and records:
        there = sorted({column for record in records for column in record} - {"txt"})
        why = f": which of {', '.join(there)} holds them? Say it with --data.caption=" if there else ""
        notes = "".join(f" ({note})" for note in source.notes)
        fail(f"{source.label} has no captions that are known by name{why}{notes}" + ("" if there else WANTED))
    columns = [attempt(file.picture_column) for file in looked_at if isinstance(file, Parquet)]
    source.notes += [f"pictures from {column}" for column in columns if column]
    note = f"captions from {', '.join(chosen.columns) or 'nothing'}"
    source.notes.append(f"{note} (others: {', '.join(others)})" if others else note)


def read_tables(folder, names, files, source):
    """Read the tables that may name pictures, those in archives too -> Table; None where there are none."""
    table = Table()
    fetch = files[0].chosen.fetch
    blobs = {}
    for name in names:
        blobs[name] = lambda path=folder / name: (fetch(path) if fetch else path).read_bytes()
    for file in files:
        if isinstance(file, Archive):
            members, _ = list_members(file.path)
            for name, place in members.items():
                if name.lower().endswith(TABLE_SUFFIXES) and stem_of(name) == name and "metadata" in name:
                    blobs[name] = lambda path=file.path, place=place: read_piece(path, *place)
    for name, read in blobs.items():
        try:
            if table.add(name, read_table(name, read())):
                source.notes.append(f"captions by name of picture in {name}")
        except Exception as error:                      # pyarrow, csv and json each have their own
            source.notes.append(f"{name} cannot be read: {reason(error)}")
    return table if table.by_path or table.lost else None


def nothing_found(root, folder, tables, packed, source):
    """Stop, and say what is here instead of pictures and what to do."""
    for name in [*tables, *packed]:
        records = [record for record in attempt(head_of_table, folder / name) or [] if isinstance(record, dict)]
        columns = [column for record in records[:1] for column in record if isinstance(column, str)]
        link = next((column for column in columns if column.lower() in LINK_COLUMNS), None)
        if link:
            columns, _ = choose_captions(records[:PEEK], "", root)
            kind = "".join(Path(name).suffixes[-2:] if name.endswith(".gz") else Path(name).suffixes[-1:])[1:]
            fail(f"{folder / name} lists addresses of pictures (column {link}) and holds none. Fetch them first: pip install "
                 f"img2dataset; img2dataset --url_list={folder / name} --input_format={kind} --url_col={link} "
                 f"--caption_col={columns[0] if columns else 'caption'} --output_format=webdataset --resize_mode=keep_ratio "
                 f"--image_size=512 --output_folder=pictures")
    if packed:
        fail(f"{root} holds compressed files such as {packed[0]}: unpack them (tar -xf, gunzip), then name the folder")
    held = ", ".join(f"{count} {what}" for what, count in source.left_out.items() if count) or "nothing"
    fail(f"no pictures in {root}{WANTED}; there is {held}, {len(tables)} tables")

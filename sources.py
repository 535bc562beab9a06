"""Find the captioned pictures in a folder or a file, and keep what was found.

Four kinds of file hold pictures, and each is one class with the same methods: `Folder` (loose files),
`Archive` (tar and zip) and `Parquet` here, `Shard` (what tools/prepare.py wrote) in shards.py. A row is one
picture and its captions:

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

`find(root, names, config)` says which files of which kind a folder holds, which column or key the pictures
and the captions come from, and which files are the training and which the validation set. What is ambiguous
ends with one line that names the candidates. Layouts of real sets: README.md, "Your own pictures".
"""
import csv
import functools
import io
import json
import os
import re
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter, OrderedDict, defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from configs import digest, fail

PICTURE_SUFFIXES = (".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".dib",
                    ".tif", ".tiff", ".avif")
TEXT_SUFFIXES = (".txt", ".caption")
TABLE_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF")       # others may run programs
MAX_PIXELS = 100_000_000
MAX_CAPTION = 1_000_000         # bytes of a caption file that are read
BESIDE = "pictures beside the one meant, such as masks"
PEEK = 100                      # rows that are looked at to choose the columns

# Names of columns, keys and views that hold the picture itself; words in those that hold something about it.
PICTURE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "output", "output_image", "picture")
NO_PICTURE = re.compile("thumb|mask|condition|control|depth|embed|segment|canny|edge")

# Names of columns and keys that hold captions, best first: long captions by vision models, then what people
# wrote, then the prompts that pictures were generated from. "txt" is a .txt or .caption beside the picture;
# "caption_*" any such name.
CAPTION_COLUMNS = ("caption_detail", "long_caption", "caption_llava", "qwen3", "gemini", "llava", "caption_*",
                   "synthetic_caption", "gpt4_turbo_caption", "txt", "enhanced_prompt", "caption", "captions",
                   "text", "blip_caption", "short_caption", "description", "input_prompt", "caption_original",
                   "alt_text", "prompt", "original_prompt")
LINK_COLUMNS = ("url", "image_url", "img_url", "urls", "image_link")
NAME_COLUMNS = ("file_name", "filename", "output_image", "image_path", "image", "img", "path", "file", "key",
                "id")


# ----------------------------------------------------------------------------------------------------
# Captions. A record is what is known of one picture: {"txt": lines of the .txt, key or column: its value}

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
    """Return the captions of a record in the given columns, but none that a status column calls failed."""
    found = []
    for column in columns:
        value = record.get(column)
        status = str(record.get(f"{column}_status", record.get("status", ""))).lower()
        if not is_text(value) or status.startswith(("fail", "error")):
            continue
        for line in as_list(value):
            line = " ".join(line.split()) if isinstance(line, str) else ""
            is_unicode = line == line.encode("utf-8", "ignore").decode()        # JSON may hold half a pair
            if line and is_unicode and line not in found:
                found.append(line)
    return found


def as_list(value):
    """Return a list of captions as it is, and a single caption as a list."""
    return value if isinstance(value, list) else [value]


def choose_captions(records, asked, where):
    """Choose the columns of captions, from records of some pictures -> (columns, the other candidates).

    The first of CAPTION_COLUMNS that at least half of the records have, else the one that most have. Columns
    that are `asked` for by --data.caption=a,b are taken as they are, and all of their captions count.
    """
    filled = Counter()                                  # {column: how many records have a caption in it}
    types = {}                                          # {column: type of a value, preferably no text}
    for record in records:
        for column, value in record.items():
            filled[column] += bool(captions_in(record, [column]))
            no_text = value is not None and not is_text(value)
            if no_text or column not in types:
                types[column] = type(value).__name__
    texts = [column for column in types if filled[column]]
    if asked:
        columns = [column.strip() for column in asked.split(",")]
        for column in columns:
            check_asked(column, texts, types.get(column), where)
        return columns, [column for column in texts if column not in columns]
    ranked = sorted(column for column in texts if caption_rank(column) is not None)
    ranked.sort(key=caption_rank)
    if not ranked:
        return [], texts
    common = [column for column in ranked if 2 * filled[column] >= len(records)]
    best = common[0] if common else max(ranked, key=filled.get)
    return [best], [column for column in ranked if column != best]


def check_asked(column, texts, type_name, where):
    """Stop if a column that --data.caption names is not one of `texts`; its type is None if there is none."""
    if column in texts:
        return
    why = f"the column holds {type_name}, not text in {where}"
    if type_name is None:
        why = f"{where} has no such column"
    elif type_name in ("NoneType", "str"):
        why = f"the column is empty in {where}"
    fail(f"--data.caption={column}: {why}; of text there are: {', '.join(texts) or 'none'}")


def no_caption(columns):
    """Say that none of the columns holds a caption."""
    return f"no caption in {', '.join(columns)}" if columns else "no caption"


def read_text(blob):
    """Decode the bytes of a caption file: UTF-8, or UTF-16 with a mark; anything else raises ValueError."""
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
    """Build the record of a picture from the bytes of its .txt and .json and its row of a table, or Nones."""
    record = dict(table_row or {})
    if json_blob is not None:
        entry = json.loads(read_text(json_blob))
        record.update(entry if isinstance(entry, dict) else {})
    if txt is not None:
        lines = map(str.strip, read_text(txt).splitlines())
        record["txt"] = [line for line in lines if line]
    return record


# ----------------------------------------------------------------------------------------------------
# Pictures

def reason(error):
    """Say an error in one line, without the path."""
    text = getattr(error, "strerror", None) or re.sub(r" (\w*Path\()?'.*", "", str(error), flags=re.DOTALL)
    return " ".join(text.split())[:200] or type(error).__name__


def attempt(function, *args):
    """Call a function; return None where it fails: why is told when somebody needs what is missing."""
    try:
        return function(*args)
    except Exception:                                   # broken files raise anything
        return None


def try_each(names, look):
    """Call look(name) on each name -> ({name: what it returned}, [(name, why it failed)])."""
    found, lost = {}, []
    for name in names:
        try:
            found[name] = look(name)
        except Exception as error:                      # broken files raise anything
            lost.append((name, reason(error)))
    return found, lost


def opened(file):
    """Open a picture (a path or a file) and read its header; too many pixels raise ValueError."""
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


def match_captions(names, asked, where):
    """Match pictures with the files beside them by name.

    Returns ({picture: (its .txt or .caption or None, its .json or None)}, [names left out]). `asked`
    (--data.image) decides between several pictures of one name.
    """
    pictures, beside = group_by_stem(names)
    views = group_views(pictures, beside)
    pairs, several, left_out = {}, Counter(), []
    for stem, views_of_stem in views.items():
        chosen = choose_view(views_of_stem, asked)
        if len(chosen) > 1:
            several[", ".join(sorted(chosen))] += 1
        for view, name in views_of_stem.items():
            if view not in chosen:
                left_out.append(name)
                continue
            texts = beside.get(os.path.splitext(name)[0]) or beside.get(stem, {})
            pairs[name] = texts.get(".txt") or texts.get(".caption"), texts.get(".json")
    if asked and pictures and not pairs:
        known = sorted(set().union(*views.values()))
        fail(f"--data.image={asked}: {where} has no such pictures; there are: {', '.join(known[:8])}")
    if several.total() > len(views) / 2:
        fail(f"{where} holds several pictures of each name: {several.most_common(1)[0][0]}; "
             "say which with --data.image=")
    return pairs, left_out


def group_by_stem(names):
    """Group names without their suffix -> ({stem: its pictures}, {stem: {suffix: file of captions}})."""
    pictures, beside = defaultdict(list), defaultdict(dict)
    for name in names:
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if suffix in PICTURE_SUFFIXES:
            pictures[stem].append(name)
        elif suffix in (*TEXT_SUFFIXES, ".json"):
            beside[stem][suffix] = name
    return pictures, beside


def group_views(pictures, beside):
    """Group the pictures that share captions -> {stem of these: {view: picture}}.

    "a.png" is the view "png" of a. "a.b.png" is the view "b.png" of a, unless it has captions of its own.
    """
    views = defaultdict(dict)
    for stem, names in pictures.items():
        folder, slash, base = stem.rpartition("/")
        shared = folder + slash + base.partition(".")[0]
        if stem in beside or shared not in beside:
            shared = stem
        for name in names:
            views[shared][name[len(shared) + 1:]] = name
    return views


def choose_view(views, asked):
    """Choose among pictures of one name, {view: file}: those asked for, else plain ones, else no masks."""
    if asked:
        return [view for view in views if asked in (view, view.rpartition(".")[0], view.rpartition(".")[2])]
    plain = [view for view in views if "." not in view]
    return plain or [view for view in views if not NO_PICTURE.search(view.lower())]


# ----------------------------------------------------------------------------------------------------
# An index is kept beside its file, or in the user's cache where that cannot be written

@contextmanager
def atomic(path, writer=""):
    """Yield another name to write to; then flush that to disk and rename it.

    `writer` tells apart those who write the same file at once.
    """
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
    """Return what an index was made of: exact size and time, a checksum of the file's ends, the choice."""
    stat = path.stat()
    with open(path, "rb", buffering=0) as file:
        ends = zlib.crc32(file.read(65536))
        file.seek(max(0, stat.st_size - 65536))
        ends = zlib.crc32(file.read(65536), ends)
    return json.dumps([3, stat.st_size, stat.st_mtime_ns, ends, choice])


def cached_index(path, choice, make, fetch=None):
    """Return (place, {name: array}) of a file's index: as kept, if the file is still the same, else made.

    choice: what was chosen, on which the index depends. make() returns the arrays, which are then kept.
    place: the path of the kept arrays, None where nothing can be written. A file that comes through a cache
    need not be here for that: fetch(path) brings it, to be indexed for the first time.
    """
    mark = json.dumps(choice) if fetch else mark_of(path, choice)
    name = f"{path.name}.{digest(*map(str, choice)) % 16 ** 6:06x}.index.npz"
    places = [cache_folder() / f"{digest(path.resolve()):016x}.{name}"]
    if not path.is_symlink():                           # a link's own folder says nothing of the file
        places.insert(0, path.parent / f".{name}")
    for place in places:
        arrays = attempt(load_index, place, mark)       # None: it is missing, or damaged in whatever way
        if arrays:
            return place, arrays
    if fetch:
        fetch(path)
    arrays = {**make(), "mark": np.frombuffer(mark.encode(), np.uint8)}
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with atomic(place, os.getpid()) as part, open(part, "wb") as file:
                np.savez(file, **arrays)
            return place, arrays
        except OSError:
            continue
    return None, arrays


def load_index(place, mark):
    """Read a kept index as a whole, so that its checksums are compared; None where its mark is another."""
    with np.load(place) as file:
        arrays = dict(file)
    return arrays if arrays["mark"].tobytes() == mark.encode() else None


@functools.lru_cache(maxsize=64)
def handle(path, process):
    """Open a file in this process: loader processes that were forked must not share a position in it.

    Python's buffer is of the file system's block, on NFS and Lustre 1 to 4 MiB: without it a read fetches
    what it is for.
    """
    return open(path, "rb", buffering=0)


def read_bytes_at(path, offset, size):
    """Read `size` bytes of a file from `offset` on; raise ValueError if there are fewer."""
    file = handle(path, os.getpid())
    file.seek(offset)
    blob = file.read(size)
    if len(blob) < size:
        raise ValueError("the file is cut off")
    return blob


def close_files():
    """Close all files: one that was dropped from a cache keeps its room on the disk as long as it is open."""
    handle.cache_clear()
    parquet_file.cache_clear()


# ----------------------------------------------------------------------------------------------------
# Loose files

class Folder:
    """Pictures that are files, with captions beside them or in a table. Looked through at each start."""

    def __init__(self, root, names, options):
        """Match the named pictures below a folder with their captions."""
        self.path, self.options = root, options
        self.lost, self.total = [], 0
        self.left_out = Counter()
        self.pairs, extra = match_captions(names, options.image, root)
        self.left_out[BESIDE] = len(extra)
        self.rows = []

    def peek(self):
        """Return the records of some pictures."""
        pictures = sorted(self.pairs)
        records, _ = try_each(pictures[::1 + len(pictures) // PEEK], self.record)
        return list(records.values())

    def record(self, name):
        """Return the record of a picture."""
        blobs = [(self.path / beside).read_bytes() if beside else None for beside in self.pairs[name]]
        return make_record(*blobs, self.options.table_row(name))

    def index(self):
        """Look at each picture's header and captions; keep those that can be used."""
        names = sorted(self.pairs)
        bar = tqdm(names, desc="checking pictures", leave=False, disable=len(names) < 5000)
        found, lost = try_each(bar, self.look_at)
        self.total = len(names) + len(self.lost)        # `find` noted what tables promise and is not here
        self.lost += lost
        self.rows = list(found)
        self.texts = [captions for captions, _ in found.values()]
        self._sizes = np.array([size for _, size in found.values()], np.int64).reshape(-1, 2)

    def look_at(self, name):
        """Return the captions, and the width and height, of a picture; raise ValueError if it has none."""
        captions = captions_in(self.record(name), self.options.columns)
        if not captions:
            raise ValueError(no_caption(self.options.columns))
        return captions, size_of(self.path / name)

    def __len__(self):
        """Count the pictures that can be used."""
        return len(self.rows)

    def keys(self):
        """Hash the names."""
        return np.array([digest(name) for name in self.rows], np.uint64)

    def sizes(self):
        """Return width and height of each picture, as `index` found them."""
        return self._sizes

    def groups(self):
        """Return None: each picture is read by itself."""
        return None

    def captions(self, row):
        """Return the captions of a picture, as `index` found them."""
        return self.texts[row]

    def picture(self, row):
        """Return the path of a picture."""
        return self.path / self.rows[row]

    def name(self, row):
        """Return the path below the folder."""
        return self.rows[row]


# ----------------------------------------------------------------------------------------------------
# Tar and zip

STORED, DEFLATED, UNREADABLE = 0, 1, 2                  # how a zip has packed a file; a tar has none packed


class Member(NamedTuple):
    """Where a file lies in an archive, in bytes; a size of 0 says that there is none."""
    offset: int = 0
    size: int = 0
    packing: int = STORED


MEMBER = np.dtype([("offset", "u8"), ("size", "u4"), ("packing", "u1")])
ROW = np.dtype([("key", "u8"), ("picture", MEMBER), ("width", "u4"), ("height", "u4"), ("txt", MEMBER),
                ("json", MEMBER)])


class Archive:
    """A tar or zip of pictures and their captions. With its kept index any picture is one read away."""

    def __init__(self, path, options):
        """Note where the file is and how to read it: nothing is read yet."""
        self.path, self.options = path, options
        self.lost, self.total = [], 0
        self.left_out = Counter()

    def peek(self):
        """Return the records of the first pictures; list all if no captions are among the first files."""
        for limit in (4 * PEEK, None):
            members, _ = list_members(self.path, limit)
            pairs, _ = match_captions(members, self.options.image, self.path)
            if any(map(any, pairs.values())):
                break

        def record(picture):
            """Read the record of a picture."""
            blobs = []
            for name in pairs[picture]:
                blobs.append(read_member(self.path, members[name], MAX_CAPTION) if name else None)
            return make_record(*blobs, self.options.table_row(picture))

        records, _ = try_each(list(pairs)[:PEEK], record)
        return list(records.values())

    def index(self):
        """Make the index, or see that the kept one still holds. It stays on the disk: many are large."""
        options = self.options
        columns = None if options.table else options.columns
        self.place, self.rows, self.names = None, None, None
        try:
            make = functools.partial(index_archive, self.path, options.image, columns)
            choice = [options.image, *(columns or ["table"])]
            self.place, arrays = cached_index(self.path, choice, make, options.fetch)
        except OSError as error:                        # a link that leads nowhere, a file that is closed
            arrays = pack_index({}, [(self.path.name, reason(error))], {})
        about = json.loads(arrays["about"].tobytes())
        self.left_out, self.lost = Counter(about["left_out"]), about["lost"]
        self.count = len(arrays["rows"])
        self.total = self.count + len(self.lost)
        if options.table or not self.place:
            self.rows, self.names = arrays["rows"], split_names(arrays)
        if options.table:
            self.drop_uncaptioned()

    def drop_uncaptioned(self):
        """Keep the rows for which the table, or a file beside the picture, has a caption."""
        if self.options.fetch:
            self.options.fetch(self.path)
        captioned = [row for row in range(self.count) if attempt(self.captions, row)]
        all_names = set(self.names)
        self.rows, self.names = self.rows[captioned], [self.names[row] for row in captioned]
        self.count = len(captioned)
        why = no_caption(self.options.columns)
        self.lost += [(name, why) for name in sorted(all_names - set(self.names))]

    def usable_rows(self):
        """Return the ROWs that can be used."""
        return load_rows(self.place) if self.rows is None else self.rows

    def __len__(self):
        """Count the pictures that can be used."""
        return self.count

    def keys(self):
        """Return the hashes of the names, which the index holds."""
        return self.usable_rows()["key"]

    def sizes(self):
        """Return width and height of each picture, which the index holds."""
        rows = self.usable_rows()
        return np.stack([rows["width"], rows["height"]], 1).astype(np.int64)

    def groups(self):
        """Return None: each picture is read by itself."""
        return None

    def captions(self, row):
        """Read the captions of a picture."""
        found = self.usable_rows()[row]
        blobs = read_texts(self.path, [Member(*found[key].item()) for key in ("txt", "json")])
        table_row = self.options.table_row(self.names[row]) if self.options.table else None
        return captions_in(make_record(*blobs, table_row), self.options.columns)

    def picture(self, row):
        """Read the encoded picture."""
        return read_member(self.path, Member(*self.usable_rows()[row]["picture"].item()))

    def name(self, row):
        """Return the names of the archive and of the picture."""
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


def read_member(path, member, limit=4 * MAX_PIXELS):
    """Read a file of an archive; of one that is deflated unpack at most `limit` bytes."""
    if member.packing == UNREADABLE:
        raise ValueError("the zip holds it encrypted, or packed in a way that is not read")
    blob = read_bytes_at(path, member.offset, member.size)
    if member.packing == DEFLATED:
        blob = zlib.decompressobj(-15).decompress(blob, limit)
    return blob


def read_texts(path, members):
    """Read the .txt and the .json of a picture -> their bytes; None for one that is not there."""
    return [read_member(path, member, MAX_CAPTION) if member.size else None for member in members]


def list_members(path, limit=None):
    """List the files in a tar or zip -> ({name: Member}, what is wrong with it or "").

    Of two members of one name the last counts, as it does for tar itself. Of a tar at most `limit`.
    """
    members = {}
    try:
        list_files = list_zip if path.suffix.lower() == ".zip" else list_tar
        return members, list_files(path, members, limit)
    except (OSError, tarfile.TarError, zipfile.BadZipFile, ValueError, zlib.error, EOFError,
            NotImplementedError) as error:
        return members, f"it cannot be read: {reason(error)}"


def list_tar(path, members, limit):
    """Add the files in a tar to `members` -> what is wrong with it or ""."""
    if read_bytes_at(path, 0, 2) == b"\x1f\x8b":
        return "it is compressed: unpack it (gunzip)"
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            name, target = member.name.removeprefix("./"), member.linkname.removeprefix("./")
            if member.isfile():
                members[name] = Member(member.offset_data, member.size)
            elif member.islnk() and target in members:
                members[name] = members[target]
            tar.members.clear()                         # else each header stays in memory
            if limit and len(members) >= limit:
                return ""
    size = path.stat().st_size
    is_ended = not any(read_bytes_at(path, max(0, size - 512), min(512, size)))     # by a block of zeros
    return "" if is_ended else "the tar is cut off"     # Python's reader does not mind


def list_zip(path, members, limit):
    """Add the files in a zip to `members` -> "". Its directory is read at once, whatever the `limit`."""
    packings = {zipfile.ZIP_STORED: STORED, zipfile.ZIP_DEFLATED: DEFLATED}
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.is_dir():
                continue
            packing = packings.get(entry.compress_type, UNREADABLE)
            if entry.flag_bits & 1:                     # encrypted
                packing = UNREADABLE
            header = read_bytes_at(path, entry.header_offset, 30)
            name_and_extra = struct.unpack("<26xHH", header)            # how long both are, which follow
            offset = entry.header_offset + 30 + sum(name_and_extra)
            members[entry.filename.removeprefix("./")] = Member(offset, entry.compress_size, packing)
    return ""


def index_archive(path, image, columns):
    """Make the index of an archive: the rows that can be used, their names, and what cannot be used and why.

    Where `columns` is None captions come from a table and are not looked at.
    """
    members, wrong = list_members(path)
    visible = [name for name in members if not os.path.basename(name).startswith(".")]
    pairs, extra = match_captions(visible, image, path)
    left_out = Counter({BESIDE: len(extra)})
    for name in visible:
        suffix = os.path.splitext(name)[1].lower()
        if suffix not in (*PICTURE_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES):
            left_out[f"{suffix or 'nameless'} files in archives"] += 1
    if wrong:                                           # what is left may be anything: all of it is lost
        return pack_index({}, [(name, wrong) for name in pairs] or [(path.name, wrong)], left_out)

    def make_row(picture):
        """Return the ROW of a picture; raise where it cannot be used."""
        texts = [members.get(name, Member()) for name in pairs[picture]]
        if columns is not None and not captions_in(make_record(*read_texts(path, texts)), columns):
            raise ValueError(no_caption(columns))
        width, height = size_in_archive(path, members[picture])
        return digest(path.stem, picture), members[picture], width, height, *texts

    bar = tqdm(pairs, desc=f"indexing {path.name}", leave=False, disable=len(pairs) < 20_000)
    return pack_index(*try_each(bar, make_row), left_out)


def size_in_archive(path, member):
    """Return width and height of a picture in an archive, from its first 64 KB if they tell."""
    def measure(member, *limit):
        """Return the size of a picture of which `limit` bytes are unpacked."""
        return size_of(io.BytesIO(read_member(path, member, *limit)))

    start = member._replace(size=min(member.size, 2 ** 16))
    return attempt(measure, start, 2 ** 16) or measure(member)


def pack_index(rows, lost, left_out):
    """Return the arrays of an index, given {name: ROW}: fixed rows, and what has any length as bytes."""
    names = "\n".join(name.replace("\n", " ") for name in rows).encode("utf-8", "surrogateescape")
    return {"rows": np.array(list(rows.values()), ROW), "names": np.frombuffer(names, np.uint8),
            "about": pack_json({"lost": lost, "left_out": left_out})}


def pack_json(value):
    """Return a value as the bytes of JSON, an array as the others of an index."""
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


# ----------------------------------------------------------------------------------------------------
# Parquet

GROUP_BYTES = 256 * 2 ** 20     # of row groups, among whose rows pictures are shuffled; a process holds two


class Parquet:
    """Rows with the encoded picture in a column, read in place, a row group at a time."""

    def __init__(self, path, options):
        """Note where the file is and how to read it: nothing is read yet."""
        self.path, self.options = path, options
        self.lost, self.total = [], 0
        self.left_out = Counter()

    def peek(self):
        """Return the records of some rows, of the first, the middle and the last row group."""
        file = parquet_file(self.path, os.getpid())
        texts = text_columns(file)
        last = file.num_row_groups - 1
        if not texts or last < 0:
            return []
        records = []
        for group in sorted({0, file.num_row_groups // 2, last}):
            rows = file.read_row_group(group, columns=texts, use_threads=False).slice(0, PEEK // 3)
            found, _ = try_each(range(len(rows)), functools.partial(row_as_dict, rows))
            records += found.values()
        return records

    def index(self):
        """Read the footer, or what was kept of it; where aspect ratios matter measure each picture once."""
        options = self.options
        choice = ["footer", options.image, *options.columns]
        try:
            _, arrays = cached_index(self.path, choice, self.read_footer, options.fetch)
        except OSError:                                 # a link that leads nowhere, a file that is closed
            arrays = self.read_footer()
        about = json.loads(arrays["about"].tobytes())
        self.column, self.columns = about["column"], about["columns"]
        self.lost = about["lost"]
        self.counts, self.bytes = arrays["counts"], arrays["bytes"]
        self.total = len(self) + len(self.lost)
        if options.measure:
            _, arrays = cached_index(self.path, ["sizes", self.column], self.measure)
            self._sizes = arrays["sizes"]

    def picture_column(self):
        """Choose the column of pictures; None where there is none."""
        return picture_column(parquet_file(self.path, os.getpid()), self.options.image, self.path)

    def read_footer(self):
        """Return the rows and bytes of each row group, the columns to read, and what is wrong, as arrays."""
        about, groups = {"column": None, "columns": [], "lost": []}, []
        try:
            file = parquet_file(self.path, os.getpid())
            names = file.schema_arrow.names
            about["column"] = self.picture_column()
            columns = self.options.columns
            present = [column for column in columns if column in names]
            if not (about["column"] and present):
                raise ValueError(f"it has no column of pictures, or none of {', '.join(columns)}")
            status = ["status", *(f"{column}_status" for column in present)]
            about["columns"] = present + [column for column in status if column in names]
            groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        except Exception as error:                      # a broken file may raise anything
            about["lost"] = [(self.path.name, f"it cannot be read: {reason(error)}")]
        return {"counts": np.array([group.num_rows for group in groups], np.int64),
                "bytes": np.array([group.total_byte_size for group in groups], np.int64),
                "about": pack_json(about)}

    def measure(self):
        """Return the size of each picture; 1 x 1 of one that is bad, which is found when it is read."""
        sizes = [attempt(self.size, row) or (1, 1) for row in range(len(self))]
        return {"sizes": np.array(sizes, np.int64).reshape(-1, 2)}

    def size(self, row):
        """Return width and height of a picture, from its header."""
        return size_of(io.BytesIO(self.picture(row)))

    def __len__(self):
        """Count the rows of all row groups."""
        return int(self.counts.sum())

    def keys(self):
        """Hash the numbers of the rows, by splitmix64."""
        x = np.arange(len(self), dtype=np.uint64) + np.uint64(digest(self.path.name))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        return x ^ (x >> np.uint64(31))

    def sizes(self):
        """Return width and height of each picture, as `index` measured them."""
        return self._sizes

    def groups(self):
        """Return the row group of each row."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def value(self, row, columns):
        """Return the row's values of some columns, {column: value}."""
        ends = np.cumsum(self.counts)
        group = int(np.searchsorted(ends, row, "right"))
        rows = row_group(self.path, group, tuple(columns))
        return row_as_dict(rows, int(row - ends[group] + self.counts[group]))

    def captions(self, row):
        """Read the captions of a row."""
        return captions_in(self.value(row, self.columns), self.options.columns)

    def picture(self, row):
        """Read the encoded picture of a row."""
        value = self.value(row, [self.column])[self.column]
        blob = value["bytes"] if isinstance(value, dict) else value
        if blob is None:
            raise ValueError("the row holds no picture")
        return blob

    def name(self, row):
        """Return the name of the file and the number of the row."""
        return f"{self.path.name}: row {row}"


def row_as_dict(rows, number):
    """Return a row of an Arrow table as {column: value}."""
    return rows.slice(number, 1).to_pylist()[0]


def text_columns(file):
    """Name the columns of a parquet file that do not hold pictures."""
    return [field.name for field in file.schema_arrow if not picture_kind(field.type)]


def picture_kind(kind):
    """Return "struct" or "bytes" for a type of columns that may hold encoded pictures, else ""."""
    if str(kind) in ("binary", "large_binary", "binary_view"):
        return "bytes"
    return "struct" if str(kind).startswith("struct<") and "bytes: " in str(kind) else ""


def picture_columns(file):
    """Return {column: "struct" or "bytes"} of the columns of a parquet file that may hold pictures."""
    kinds = {field.name: picture_kind(field.type) for field in file.schema_arrow}
    return {name: kind for name, kind in kinds.items() if kind}


def picture_column(file, asked, where):
    """Choose the column of pictures of a parquet file -> its name; None where there is none."""
    kinds = picture_columns(file)
    if asked:
        if asked not in kinds:
            known = ", ".join(kinds) or "none"
            fail(f"--data.image={asked}: {where} has no such column of pictures; there are: {known}")
        return asked
    allowed = [name for name in kinds if not NO_PICTURE.search(name.lower())]
    named = [name for name in allowed if name.lower() in PICTURE_COLUMNS]
    structs = [name for name in allowed if kinds[name] == "struct"]
    candidates = named or structs or allowed
    if len(candidates) > 1:
        fail(f"{where} has several columns of pictures: {', '.join(candidates)}; "
             "say which with --data.image=")
    return candidates[0] if candidates else None


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
        file = parquet_file(path, os.getpid())
        GROUPS[key] = file.read_row_group(group, columns=list(columns), use_threads=False)
        size = sum(rows.nbytes for rows in GROUPS.values())
        while size > 2 * GROUP_BYTES and len(GROUPS) > 4:       # two at least, captions and pictures of each
            _, dropped = GROUPS.popitem(last=False)
            size -= dropped.nbytes
    GROUPS.move_to_end(key)
    return GROUPS[key]


# ----------------------------------------------------------------------------------------------------
# Tables that name pictures: metadata.jsonl or .csv or .parquet, a json list, COCO's images and annotations


def read_table(name, blob):
    """Read the bytes of a table -> a list of records. Raises anything where it is none."""
    suffix = os.path.splitext(name)[1].lower()
    if suffix == ".jsonl":
        lines = blob.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        return [attempt(json.loads, line) for line in lines if line.strip()]
    if suffix == ".parquet":
        file = parquet_reader(io.BytesIO(blob))
        return file.read(columns=text_columns(file)).to_pylist()
    text = blob.decode("utf-8-sig")
    if suffix in (".csv", ".tsv"):
        rows = csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ",")
        return [None if None in row else row for row in rows]           # None: more values than columns
    table = json.loads(text)
    if isinstance(table, dict) and "images" in table and "annotations" in table:
        return join_annotations(table)
    return table if isinstance(table, list) else []


def head_of_table(path):
    """Read the first records of a table, which may be compressed, to see what it lists."""
    limit = 2 ** 20
    with open(path, "rb") as file:
        blob = file.read(-1 if path.suffix == ".parquet" else limit)
    name = path.name
    if path.suffix == ".gz":
        name, blob = path.stem, zlib.decompressobj(31).decompress(blob, limit)
    if len(blob) >= limit and path.suffix not in (".json", ".parquet"):
        blob = blob.rpartition(b"\n")[0]                # without the line that is cut off
    return read_table(name, blob)


def join_annotations(table):
    """Join COCO's captions with its images -> [{"file_name", "caption": [...]}]."""
    captions = {}
    for annotation in table["annotations"]:
        if isinstance(annotation.get("caption"), str):
            captions.setdefault(annotation.get("image_id"), []).append(annotation["caption"])
    images = [image for image in table["images"] if image.get("id") in captions]
    return [{"file_name": image.get("file_name"), "caption": captions[image["id"]]} for image in images]


class Table:
    """Records by the name of their picture without its suffix: by the whole path, else by its last part.

    by_name: {last part: the path, or None where several have it}.
    promised: pictures that metadata files name; other tables may well name pictures that are not here.
    lost: rows of metadata files that name none, [(name, why)].
    """

    def __init__(self):
        """Make a table without records."""
        self.by_path, self.by_name = {}, {}
        self.promised, self.lost = [], []

    def add(self, table, records):
        """Add the records of a table -> how many of them name a picture."""
        folder, slash, base = table.rpartition("/")
        paths, lost = [], []
        for number, record in enumerate(records, 1):
            name = self.picture_of(record)
            if name:
                paths.append(folder + slash + name)
                self.add_record(paths[-1], record)
            else:
                lost.append((f"{table}: row {number}", "it is no record that names a picture"))
        if base.startswith("metadata."):
            self.promised += paths
            self.lost += lost
        return len(paths)

    def add_record(self, path, record):
        """Add the texts of a record of a picture; several records of one are several captions."""
        stem = stem_of(path)
        name = stem.rpartition("/")[2]
        is_only = self.by_name.get(name, stem) == stem
        self.by_name[name] = stem if is_only else None
        texts = {column: value for column, value in record.items() if is_text(value)}
        if stem in self.by_path:
            texts = merge(self.by_path[stem], texts)
        self.by_path[stem] = texts

    def picture_of(self, record):
        """Return the name of the picture of a record; None where there is none."""
        if not isinstance(record, dict):
            return None
        names = [record[column] for column in NAME_COLUMNS if isinstance(record.get(column), (str, int))]
        return str(names[0]).replace("\\", "/").removeprefix("./") if names else None

    def find(self, picture):
        """Return the record of a picture, or None."""
        stem = stem_of(picture)
        return self.by_path.get(stem) or self.by_path.get(self.by_name.get(stem.rpartition("/")[2]))

    def missing(self, pictures):
        """Return what cannot be used of the metadata files, given the pictures here: [(name, why)]."""
        here = set(map(stem_of, pictures))
        absent = [name for name in self.promised if stem_of(name) not in here]
        return self.lost + [(name, "there is no such picture") for name in absent]


def merge(one, other):
    """Return the texts of one record, each with those that another has in the same column."""
    merged = dict(one)
    for column, value in other.items():
        merged[column] = as_list(one.get(column, [])) + as_list(value)
    return merged


def stem_of(name):
    """Cut the suffix of pictures from a name."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in PICTURE_SUFFIXES else name


# ----------------------------------------------------------------------------------------------------
# What a folder holds

SPLITS = {"train": "train", "training": "train",
          "val": "val", "valid": "val", "validation": "val", "dev": "val",
          "test": "test", "testing": "test", "eval": "test"}
SPLIT = re.compile(f"(?:^|[^a-z])({'|'.join(SPLITS)})(?=[^a-z]|$)")
WANTED = (": want pictures with captions beside them (a.png + a.txt, or metadata.jsonl), "
          ".tar, .zip or .parquet")
PACKED_SUFFIXES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")


class ReadOptions:
    """How the files of one kind are read.

    image           the flag --data.image
    measure         whether aspect ratios matter
    fetch(path)     brings a file here that comes through a cache; None where files are here
    columns         those of captions, and
    table           the `Table` that names pictures, or None: both set by `choose_columns`
    """

    def __init__(self, data_config, fetch):
        """Take what the flags say; columns and table are chosen later."""
        self.image, self.measure = data_config.image, data_config.buckets
        self.fetch = fetch
        self.columns, self.table = [], None

    def table_row(self, picture):
        """Return the record that the table has of a picture, or None."""
        return self.table and self.table.find(picture)


class Source:
    """The files of one source: to train on and, if the source says so itself, to validate on (else None)."""

    def __init__(self, label, left_out):
        """Make a source without files; `label` names it in messages."""
        self.label, self.left_out = label, left_out
        self.train, self.val = [], None
        self.notes = []

    def summary(self, size=""):
        """Say in one line what is read."""
        counts = Counter(type(file) for file in [*self.train, *(self.val or [])])
        words = {Folder: "folder", Archive: "archive", Parquet: "parquet file"}
        files = ", ".join(f"{count:,} {words[kind]}{'s' * (count > 1)}" for kind, count in counts.items())
        parts = [files + size, *dict.fromkeys(self.notes)]
        left_out = ", ".join(f"{count:,} {what}" for what, count in self.left_out.items() if count)
        if left_out:
            parts.append(f"left out: {left_out}")
        return f"{self.label}: {'; '.join(parts)}"


def walk(root):
    """List the files below a folder -> (names, {what is left out: how many}).

    Links are followed, each folder once.
    """
    names, hidden = [], 0
    seen, closed = set(), []
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
    """Find out what the named files below `root` are -> Source.

    `fetch(path)` brings a file here before it is looked at; `label` stands for the root in messages.
    """
    folder = root.parent if root.is_file() else root
    found = sort_files(folder, names, config.data.image, fetch)
    source = Source(label or root, found.left_out)
    if not found.kinds:
        fail_without_pictures(root, folder, found)
    val_split = choose_val_split(found.kinds)
    if val_split:
        source.val = []
    for kind, members in found.kinds.items():
        for group in group_by_folder(kind, members, fetch):
            options = ReadOptions(config.data, fetch)
            names_of = group_by_split(kind, group, val_split)
            train = open_files(kind, folder, names_of["train"], options)
            val = open_files(kind, folder, names_of[val_split], options)
            if train or val:
                choose_columns(train or val, options, folder, found.tables, config.data.caption, source)
            if kind is Folder and options.table and train:
                train[0].lost += options.table.missing(members)
            source.train += train
            if val_split:
                source.val += val
            if val_split == "val":
                source.left_out["files of the test split"] += len(names_of["test"])
    return source


class SortedFiles(NamedTuple):
    """The names of the files in a folder, by what they are."""
    kinds: dict                 # {Folder, Archive or Parquet: names}, those that occur
    tables: list                # that may name pictures
    packed: list                # compressed, so that nothing is known of them
    left_out: Counter           # {what else there is: how many}


def group_by_folder(kind, names, fetch):
    """Group archives and parquet files by their folder: the sets of one hub id often differ in their columns.

    Behind a cache, where each look costs a download, and of loose files all are one group.
    """
    if kind is Folder or fetch:
        return [names]
    groups = defaultdict(list)
    for name in names:
        groups[name.rpartition("/")[0]].append(name)
    return list(groups.values())


def sort_files(folder, names, image, fetch):
    """Sort the names of files in a folder by what they are -> SortedFiles."""
    found = SortedFiles({Folder: [], Archive: [], Parquet: []}, [], [], Counter())
    kinds, left_out = found.kinds, found.left_out
    pictures = {os.path.splitext(name)[0] for name in names if name.lower().endswith(PICTURE_SUFFIXES)}
    for name in sorted(names):
        stem, suffix = os.path.splitext(name)
        suffix = suffix.lower()
        if suffix in (*PICTURE_SUFFIXES, *TEXT_SUFFIXES) or suffix == ".json" and stem in pictures:
            kinds[Folder].append(name)
        elif suffix in (".tar", ".zip"):
            kinds[Archive].append(name)
        elif suffix == ".parquet" and (fetch or holds_pictures(folder / name, image)):
            kinds[Parquet].append(name)
        elif suffix in TABLE_SUFFIXES:
            found.tables.append(name)
            if suffix == ".parquet":
                left_out[f".parquet files without pictures{other_pictures(folder / name)}"] += 1
        elif suffix in PACKED_SUFFIXES:
            found.packed.append(name)
            left_out[f"compressed {suffix} files: unpack them"] += 1
        else:
            left_out[f"{suffix or 'nameless'} files"] += 1
    if not pictures:
        left_out[".txt files without a picture"] += len(kinds[Folder])
        kinds[Folder] = []
    return found._replace(kinds={kind: members for kind, members in kinds.items() if members})


def holds_pictures(path, image):
    """Tell whether a parquet file has a column of pictures."""
    try:
        return picture_column(parquet_file(path, os.getpid()), image, path) is not None
    except (OSError, ValueError):
        return True                                     # a damaged file: it will be counted as that


def other_pictures(path):
    """Name the columns of a parquet file that hold pictures but are not taken for the picture."""
    columns = list(picture_columns(parquet_file(path, os.getpid())))
    return f" but {', '.join(columns)} (--data.image={columns[0]} would take it)" if columns else ""


def choose_val_split(kinds):
    """Choose the split that validates: "val", else "test"; None where no other is left to train on."""
    splits = set()
    for kind, names in kinds.items():
        splits.update(split_of(name, kind) for name in names)
    to_train = {"train"} if Folder in kinds else {"train", ""}          # a folder may be named test by chance
    if splits.isdisjoint(to_train):
        return None
    return next((split for split in ("val", "test") if split in splits), None)


def group_by_split(kind, names, val_split):
    """Group names by their split; all are to train on where no split validates -> {split: names}."""
    names_of = defaultdict(list)
    for name in names:
        split = split_of(name, kind) if val_split else ""
        names_of[split or "train"].append(name)
    return names_of


def split_of(name, kind):
    """Return "train", "val" or "test" where a folder, or the name of a file of many, says so, else ""."""
    parts = name.lower().split("/")
    for part in reversed(parts[:-1] if kind is Folder else parts):
        match = SPLIT.search(part)
        if match:
            return SPLITS[match[1]]
    return ""


def open_files(kind, folder, names, options):
    """Make the objects of files of one kind; loose pictures are one object together."""
    if kind is Folder:
        return [Folder(folder, names, options)] if names else []
    return [kind(folder / name, options) for name in names]


def choose_columns(files, options, folder, tables, asked, source):
    """Choose the columns of captions by what the first, the middle and the last file hold.

    Where they hold too few captions the tables are read too. Notes in `source` what was chosen.
    """
    looked_at = [files[number] for number in sorted({0, len(files) // 2, len(files) - 1})]
    if options.fetch:                                   # each look costs a download
        looked_at = files[:1]
        options.fetch(files[0].path)
    records = peek_at(looked_at)
    if not isinstance(files[0], Parquet) and not are_captioned(records, asked, source):
        options.table = read_tables(folder, tables, files, source)
        records = peek_at(looked_at)
    options.columns, others = choose_captions(records, asked, source.label)
    if records and not options.columns:
        fail_without_captions(records, source)
    for file in looked_at:
        column = attempt(file.picture_column) if isinstance(file, Parquet) else None
        if column:
            rest = [name for name in picture_columns(parquet_file(file.path, os.getpid())) if name != column]
            source.notes.append(with_others(f"pictures from {column}", rest))
    source.notes.append(with_others(f"captions from {', '.join(options.columns) or 'nothing'}", others))


def with_others(note, others):
    """Add the candidates that were not chosen to a note."""
    return f"{note} (others: {', '.join(others)})" if others else note


def peek_at(files):
    """Return the records of some pictures of each file; none of a file that cannot be read."""
    records = []
    for file in files:
        records += attempt(file.peek) or []
    return records


def are_captioned(records, asked, source):
    """Tell whether half of the records have captions, and every column that is asked for is there."""
    columns, _ = choose_captions(records, "", source.label)
    filled = sum(bool(captions_in(record, columns)) for record in records)
    asked_columns = {column.strip() for column in asked.split(",")} - {""}
    return 2 * filled >= len(records) and asked_columns <= set().union(*records)


def read_tables(folder, names, files, source):
    """Read the tables that may name pictures, those in archives too -> Table; None where there are none."""
    fetch = files[0].options.fetch
    readers = {}                                        # {name: function that returns the bytes}
    for name in names:
        readers[name] = functools.partial(read_file, folder / name, fetch)
    for file in files:
        if not isinstance(file, Archive):
            continue
        members, _ = list_members(file.path)
        for name, member in members.items():
            if name.lower().endswith(TABLE_SUFFIXES) and stem_of(name) == name and "metadata" in name:
                readers[name] = functools.partial(read_member, file.path, member)
    table = Table()
    for name, read in readers.items():
        try:
            if table.add(name, read_table(name, read())):
                source.notes.append(f"captions by name of picture in {name}")
        except Exception as error:                      # pyarrow, csv and json each have their own
            source.notes.append(f"{name} cannot be read: {reason(error)}")
    return table if table.by_path or table.lost else None


def read_file(path, fetch):
    """Read a file, fetched before if it comes through a cache."""
    if fetch:
        path = fetch(path)
    return path.read_bytes()


def fail_without_captions(records, source):
    """Stop, and say which columns might hold the captions."""
    columns = sorted(set().union(*records) - {"txt"})
    notes = "".join(f" ({note})" for note in source.notes)
    message = f"{source.label} has no captions that are known by name"
    if columns:
        fail(f"{message}: which of {', '.join(columns)} holds them? Say it with --data.caption={notes}")
    fail(f"{source.label}: its pictures have no captions{notes}: want a.txt (a caption a line), a.caption or a.json "
         "beside a.png, or a table such as metadata.jsonl that names the pictures")


def fail_without_pictures(root, folder, found):
    """Stop, and say what is here instead of pictures and what to do."""
    for name in [*found.tables, *found.packed]:
        fail_on_links(folder / name, root)
    if found.packed:
        fail(f"{root} holds compressed files such as {found.packed[0]}: "
             "unpack them, then name the folder")
    there = ", ".join(f"{count} {what}" for what, count in found.left_out.items() if count) or "nothing"
    fail(f"no pictures in {root}{WANTED}; there is {there}, {len(found.tables)} tables")


def fail_on_links(path, root):
    """Stop if a table lists addresses of pictures, and say how to fetch them."""
    records = [record for record in attempt(head_of_table, path) or [] if isinstance(record, dict)]
    if not records:
        return
    links = [column for column in records[0] if isinstance(column, str) and column.lower() in LINK_COLUMNS]
    if not links:
        return
    columns, _ = choose_captions(records[:PEEK], "", root)
    caption = columns[0] if columns else "caption"
    depth = 2 if path.suffix == ".gz" else 1
    table_format = "".join(path.suffixes[-depth:])[1:]
    fail(f"{path} lists addresses of pictures (column {links[0]}) and holds none. Fetch them first: "
         f"pip install img2dataset; img2dataset --url_list={path} --input_format={table_format} "
         f"--url_col={links[0]} --caption_col={caption} --output_format=webdataset "
         "--resize_mode=keep_ratio --image_size=512 --output_folder=pictures")

"""Data that lies elsewhere -> files here: a set of the Hugging Face hub as a whole, or a bucket through a
cache of bounded size.

    hf:owner/name[/folder][@revision]       downloaded whole, once per machine, by huggingface_hub (HF_HOME, HF_TOKEN, ... as always)
    the same with --data.cache=200GB        read through the cache
    hf://datasets/owner/name, s3://bucket/folder, gs://..., https://host/{0000..0123}.tar       read through the cache

Through the cache every file is fetched whole, shortly before its items are due, and dropped when room is needed for others.
The processes of a machine share it.
"""
import glob
import json
import os
import re
import shutil
import threading
import time
from pathlib import Path

import fsspec
from filelock import FileLock, Timeout
from tqdm import tqdm

from configs import digest, fail
from sources import PICTURE_SUFFIXES, TABLE_SUFFIXES, atomic, attempt, cache_folder, reason

READ_SUFFIXES = (*PICTURE_SUFFIXES, *TABLE_SUFFIXES, ".txt", ".caption", ".tar", ".zip")
TRIES = 8                       # of a fetch, with growing pauses: a store that is out for two minutes costs no run


def gigabytes(count):
    """Write a number of bytes for people."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


# ----------------------------------------------------------------------------------------------------
# By name, whole

def parse_hub(name):
    """Split "hf:owner/name/folder@revision" -> (owner/name, folder, revision); None where it is not of that
    form."""
    match = re.fullmatch(r"hf:(?://datasets/)?([\w.-]+/[\w.-]+)((?:/[^@]+)?)(?:@(.+))?", name)
    match = match or re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)()(?:@(.+))?", name)        # without hf: only the plain name
    return match and (match[1], match[2].strip("/"), match[3])


def url_of_hub(repo, folder, revision):
    """Return the address under which fsspec knows a set of the hub."""
    at = f"@{revision}" if revision else ""
    return f"hf://datasets/{repo}{at}/{folder}".rstrip("/")


def fail_hub(error, name):
    """Stop with one line that says why the hub gave no data set, and what to do."""
    from huggingface_hub import errors
    repo = parse_hub(name)[0]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        why = f"it is gated: accept its terms on https://huggingface.co/datasets/{repo}, then: hf auth login (or set HF_TOKEN)"
    elif status == 401:
        why = "the hub wants to know who asks, or there is no such set: check the name; if it is private: hf auth login (or set HF_TOKEN)"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = "there is no such data set on the hub, or it is private: check the name, or: hf auth login"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = "there is no such revision"
    elif isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        why = "it is not in the cache, and the hub is switched off or cannot be reached (HF_HUB_OFFLINE, network)"
    elif isinstance(error, OSError) and error.errno == 28:
        why = "the disk is full: free some, set HF_HOME to another, or read it through a cache: --data.cache=50GB"
    elif isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith("http"):
        why = f"the hub cannot be reached ({reason(error)}); the same command goes on where the download stopped"
    else:
        why = f"{reason(error)}; the same command goes on where the download stopped"
    no_folder = "" if name.startswith("hf:") else f"there is no folder {name} here, and on the hub "
    fail(f"{no_folder}{name}: {why}")


def download(name):
    """Fetch the files of a hub data set that can be read -> its local folder. Other processes of the machine
    wait for the first."""
    from huggingface_hub import constants, snapshot_download
    repo, folder, revision = parse_hub(name)
    try:
        lock = cache_folder() / f"{digest(name):016x}.download.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            suffixes = READ_SUFFIXES
            if not constants.HF_HUB_OFFLINE and os.environ.get("LOCAL_RANK", "0") == "0":
                suffixes = look_at_hub(name)
            start = glob.escape(folder) + "/" if folder else ""
            patterns = [f"{start}*{ending}" for suffix in suffixes for ending in (suffix, suffix.upper())]
            root = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[*patterns, start[:-1]],
                                     ignore_patterns=[".*", "*/.*"])
        return Path(root, folder)
    except Exception as error:                          # httpx, huggingface_hub and the file system each have their own
        fail_hub(error, name)


def look_at_hub(name):
    """Say how large a set of the hub is, or stop where it holds nothing -> the suffixes of the files to
    fetch."""
    from huggingface_hub import HfApi
    repo, folder, revision = parse_hub(name)
    try:
        about = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    except Exception as error:
        if getattr(error, "response", None) is None:    # no answer at all
            tqdm.write(f"{name}: the hub cannot be reached ({reason(error)}): what is in the cache is used")
            return READ_SUFFIXES
        raise
    sizes = {file.rfilename: file.size or 0 for file in about.siblings}
    suffixes = READ_SUFFIXES
    if any(os.path.basename(file) == "prepare.json" for file in sizes):
        suffixes = (*suffixes, ".safetensors")
    wanted = [size for file, size in sizes.items() if is_read(file, folder, suffixes)]
    if not wanted:
        fail(f"{name} holds nothing that can be read; there is {', '.join(sorted(sizes)[:8]) or 'nothing'}")
    tqdm.write(f"{name}: {len(wanted):,} of {len(sizes):,} files, {gigabytes(sum(wanted))}")
    return suffixes


def is_read(file, folder, suffixes):
    """Tell whether a file of a set lies in the folder asked for and is of a kind that is read."""
    inside = not folder or file.startswith(f"{folder}/") or file == folder
    hidden = any(part.startswith(".") for part in file.split("/"))
    return inside and not hidden and file.lower().endswith(suffixes)


# ----------------------------------------------------------------------------------------------------
# Through a cache

class Store:
    """Files behind a URL, each fetched whole into a folder of bounded size that all processes of a machine
    share."""

    def __init__(self, url, limit):
        self.url, self.limit = url, limit
        self.folder = cache_folder() / "files" / f"{digest(url):016x}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sizes = self.list()
        self.held = {}                                  # {reader: names that are not dropped now}
        self.coming = set()                             # names that were fetched ahead
        self.pinned = set()                             # nor ever: those of the validation set
        self.wanted, self.thread = [], None             # files to fetch ahead, and the thread that does
        largest = sorted(self.sizes.values())[-2:]
        if sum(largest) > limit:
            fail(f"--data.cache={gigabytes(limit)} is too small for {url}: it must hold two files, {gigabytes(sum(largest))}")

    def filesystem(self):
        """Return (fsspec's file system, the root in it). fsspec keeps one for each process, as a fork must
        not share it."""
        try:
            return fsspec.core.url_to_fs(self.url.partition("{")[0])
        except ImportError as error:
            fail(f"{self.url} needs a package: {error}")
        except ValueError as error:
            fail(f"{self.url}: {reason(error)}")

    def __getstate__(self):
        return {**self.__dict__, "thread": None}

    def list(self):
        """Return {name: bytes} of the files, listed once and kept."""
        kept = self.folder / "listing.json"
        with FileLock(self.folder / "listing.lock"):
            if kept.is_file():
                return json.loads(kept.read_text())
            sizes = self.retry("listing", self.ask)
            if not sizes:
                fail(f"{self.url} holds no files that can be read")
            with atomic(kept) as part:
                part.write_text(json.dumps(sizes))
            return sizes

    def ask(self):
        """List the files of the store -> {name: bytes}. https cannot list: there {first..last} stands for
        numbers."""
        system, root = self.filesystem()
        if self.url.startswith("http"):
            urls = [self.url]
            match = re.search(r"\{(\d+)\.\.(\d+)\}", self.url)
            if match:
                numbers = range(int(match[1]), int(match[2]) + 1)
                urls = [self.url.replace(match[0], f"{number:0{len(match[1])}}") for number in numbers]
            sizes = {url[len(self.base()):]: system.info(url).get("size") for url in urls}
            if None in sizes.values():
                fail(f"{self.url}: the server does not tell how large its files are")
            return sizes
        found = system.find(root, detail=True) or {root: system.info(root)}
        top = root.rstrip("/")
        sizes = {}
        for path in sorted(found):
            name = path[len(top):].lstrip("/") or path.rpartition("/")[2]
            sizes[name] = found[path]["size"]
        suffixes = (*READ_SUFFIXES, ".safetensors") if "prepare.json" in sizes else READ_SUFFIXES
        return {name: size for name, size in sizes.items() if is_read(name, "", suffixes)}

    def base(self):
        """Return the part of a web address that all files share, up to a slash."""
        return self.url.partition("{")[0].rpartition("/")[0] + "/"

    def address(self, name):
        """Return where fsspec finds a file."""
        if self.url.startswith("http"):
            return self.base() + name
        root = self.filesystem()[1].rstrip("/")
        return root if root.endswith(f"/{name}") else f"{root}/{name}"

    def retry(self, what, action):
        """Call action() until it works; what fails is said, with pauses of 1, 2, 4, ... seconds."""
        for tried in range(TRIES):
            try:
                return action()
            except FileNotFoundError as error:
                fail(f"{self.url}: {what}: {reason(error)}")
            except Exception as error:                  # every store has its own
                if tried == TRIES - 1:
                    fail(f"{self.url}: {what} failed {TRIES} times: {reason(error)}")
                tqdm.write(f"{self.url}: {what}: {reason(error)}; trying again in {2 ** tried} s")
                time.sleep(2 ** tried)

    def path(self, name):
        return self.folder / name

    def fetch(self, name, wait=True):
        """Bring a file here, if it is not -> its path. Without `wait`, None where another process is at it or
        there is no room."""
        path = self.path(name)
        if path.is_file():
            os.utime(path)                              # used last
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{path}.lock", timeout=-1 if wait else 0):
                if path.is_file():
                    return path
                claim = path.with_name(path.name + ".claim")            # as large as the file will be: room that is taken
                if not self.make_room(claim, self.sizes[name], wait):
                    return None
                part = path.with_name(path.name + ".part")
                self.retry(name, lambda: self.copy(name, part))
                os.replace(part, path)
                claim.unlink(missing_ok=True)
        except Timeout:
            return None
        return path

    def fetch_path(self, path):
        return self.fetch(path.relative_to(self.folder).as_posix())

    def copy(self, name, part):
        self.filesystem()[0].get_file(self.address(name), str(part))
        size = part.stat().st_size
        if size != self.sizes[name]:
            listing = self.folder / "listing.json"
            raise OSError(f"{size} bytes came of {self.sizes[name]}: if the file was changed, delete {listing}")

    def make_room(self, claim, size, needed):
        """Claim room for a file; for that drop the files that were used longest ago -> whether there is room.

        Files that are held are not dropped, nor those that come, unless this one is `needed` now.
        """
        with FileLock(self.folder / "room.lock"):
            kept = self.pinned.union(*self.held.values(), () if needed else self.coming)
            kept = {self.path(name) for name in kept}
            stats = {}
            for path in self.folder.rglob("*"):
                ours = path.suffix not in (".lock", ".part") and path.name != "listing.json"
                stat = attempt(path.stat) if ours and not path.name.startswith(".") and path.is_file() else None
                if stat:                                # else it went meanwhile
                    stats[path] = stat
            used = sum(stat.st_size for stat in stats.values())
            free = shutil.disk_usage(self.folder).free
            for path in sorted(stats, key=lambda path: stats[path].st_mtime):
                if used + size <= self.limit and free >= size:
                    break
                abandoned = time.time() - stats[path].st_mtime > 3600   # the claim of a process that was killed
                if abandoned if path.suffix == ".claim" else path not in kept:
                    path.unlink(missing_ok=True)
                    used -= stats[path].st_size
                    free += stats[path].st_size
            if free < size:
                fail(f"the disk of {self.folder} is full: lower --data.cache, or set XDG_CACHE_HOME to another disk")
            if used + size > self.limit and not needed:
                return False
            with open(claim, "wb") as file:
                file.truncate(size)
            return True

    def hold(self, reader, names, coming):
        """Keep `names` here for a reader, and fetch them and those that are `coming` ahead, as far as there
        is room."""
        self.held[reader] = set(names)
        room = self.limit - sum(self.sizes[name] for name in self.pinned.union(*self.held.values()))
        ahead = list(names)
        for name in coming:
            room -= self.sizes[name]
            if room < 0:
                break
            ahead.append(name)
        self.coming = set(ahead)
        ahead = [name for name in ahead if not self.path(name).is_file()]
        first = int(os.environ.get("LOCAL_RANK", 0)) * len(ahead) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self.wanted += ahead[first:] + ahead[:first]    # each process begins with others
        if self.wanted and not (self.thread and self.thread.is_alive()):
            self.thread = threading.Thread(target=self.fetch_wanted, daemon=True)
            self.thread.start()

    def fetch_wanted(self):
        """Fetch what `hold` wants, until nothing is left; a file that another process fetches is left to
        it."""
        while self.wanted:
            try:
                self.fetch(self.wanted.pop(0), wait=False)
            except (SystemExit, IndexError):            # why is said when the file is due
                return

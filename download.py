"""Fetch data that lies elsewhere: a set of the Hugging Face hub as a whole, or a bucket through a cache.

    hf:owner/name[/folder][@revision]       downloaded whole, once per machine, by huggingface_hub, which
                                            heeds HF_HOME, HF_TOKEN, ... as always
    the same with --data.cache=200GB        read through the cache
    hf://datasets/owner/name                the same
    s3://bucket/folder, gs://...            the same
    https://host/{0000..0123}.tar           the same

Through the cache every file is fetched whole, shortly before its items are due, and dropped when room is
needed for others. The processes of a machine share the cache.
"""
import functools
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
from sources import PICTURE_SUFFIXES, TABLE_SUFFIXES, TEXT_SUFFIXES, atomic, attempt, cache_folder, reason

READ_SUFFIXES = (*PICTURE_SUFFIXES, *TEXT_SUFFIXES, *TABLE_SUFFIXES, ".tar", ".zip")
TRIES = 8                       # of a fetch, with growing pauses: a store may be out for two minutes
ABANDONED = 3600                # seconds after which a claim of room is taken for that of a killed process


def gigabytes(count):
    """Write a number of bytes for people."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


# ----------------------------------------------------------------------------------------------------
# By name, whole

def parse_hub(name):
    """Split "hf:owner/name/folder@revision" -> (owner/name, folder, revision); None of other names."""
    match = re.fullmatch(r"hf:(?://datasets/)?([\w.-]+/[\w.-]+)((?:/[^@]+)?)(?:@(.+))?", name)
    if not match:                                       # without "hf:" only the plain name
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)()(?:@(.+))?", name)
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
        why = (f"it is gated: accept its terms on https://huggingface.co/datasets/{repo}, "
               "then: hf auth login (or set HF_TOKEN)")
    elif status == 401:
        why = ("the hub wants to know who asks, or there is no such set: check the name; "
               "if it is private: hf auth login (or set HF_TOKEN)")
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = "there is no such data set on the hub, or it is private: check the name, or: hf auth login"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = "there is no such revision"
    elif isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        why = ("it is not in the cache, and the hub is switched off or cannot be reached "
               "(HF_HUB_OFFLINE, network)")
    elif isinstance(error, OSError) and error.errno == 28:
        why = ("the disk is full: free some, set HF_HOME to another, "
               "or read it through a cache: --data.cache=50GB")
    else:
        why = reason(error)
        if isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith("http"):
            why = f"the hub cannot be reached ({why})"
        why += "; the same command goes on where the download stopped"
    no_folder = "" if name.startswith("hf:") else f"there is no folder {name} here, and on the hub "
    fail(f"{no_folder}{name}: {why}")


def download(name):
    """Fetch the readable files of a hub data set -> its local folder. One process of the machine does it."""
    from huggingface_hub import constants, snapshot_download
    repo, folder, revision = parse_hub(name)
    try:
        lock = cache_folder() / f"{digest(name):016x}.download.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            suffixes = READ_SUFFIXES
            if not constants.HF_HUB_OFFLINE and os.environ.get("LOCAL_RANK", "0") == "0":
                suffixes = suffixes_on_hub(name)
            prefix = glob.escape(folder) + "/" if folder else ""
            patterns = [prefix[:-1]]                    # the folder may turn out to be a file
            for suffix in suffixes:
                patterns += [f"{prefix}*{suffix}", f"{prefix}*{suffix.upper()}"]
            root = snapshot_download(repo, repo_type="dataset", revision=revision,
                                     allow_patterns=patterns, ignore_patterns=[".*", "*/.*"])
        return Path(root, folder)
    except Exception as error:                          # httpx, huggingface_hub, the disk: each has its own
        fail_hub(error, name)


def suffixes_on_hub(name):
    """Return the suffixes of the files to fetch of a hub data set; say how large it is.

    Stops if it holds nothing that can be read.
    """
    from huggingface_hub import HfApi
    repo, folder, revision = parse_hub(name)
    try:
        about = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    except Exception as error:
        if getattr(error, "response", None) is not None:
            raise
        why = f"the hub cannot be reached ({reason(error)})"
        tqdm.write(f"{name}: {why}: what is in the cache is used")
        return READ_SUFFIXES
    sizes = {file.rfilename: file.size or 0 for file in about.siblings}
    suffixes = readable_suffixes(map(os.path.basename, sizes))
    to_fetch = [size for file, size in sizes.items() if is_read(file, folder, suffixes)]
    if not to_fetch:
        there = ", ".join(sorted(sizes)[:8]) or "nothing"
        fail(f"{name} holds nothing that can be read; there is {there}")
    tqdm.write(f"{name}: {len(to_fetch):,} of {len(sizes):,} files, {gigabytes(sum(to_fetch))}")
    return suffixes


def readable_suffixes(names):
    """Return the suffixes of files that are read: those of shards only where tools/prepare.py wrote some."""
    return (*READ_SUFFIXES, ".safetensors") if "prepare.json" in names else READ_SUFFIXES


def is_read(file, folder, suffixes):
    """Tell whether a file of a set lies in the folder asked for and is of a kind that is read."""
    inside = not folder or file.startswith(f"{folder}/") or file == folder
    hidden = any(part.startswith(".") for part in file.split("/"))
    return inside and not hidden and file.lower().endswith(suffixes)


# ----------------------------------------------------------------------------------------------------
# Through a cache

FILESYSTEMS = {}                # {(process, URL): (file system, root)}


class Store:
    """Files behind a URL, fetched whole into a folder of bounded size that the machine's processes share.

    sizes       {name: bytes} of all files
    pinned      names that are never dropped: the files of the validation set
    needed      {reader: names} that are not dropped now
    ahead       names that were fetched ahead and are dropped only for a file that is due
    queue       names that a thread in the background is to fetch
    """

    def __init__(self, url, limit):
        """List the files behind `url`; `limit` is the size of the cache in bytes."""
        self.url, self.limit = url, limit
        self.folder = cache_folder() / "files" / f"{digest(url):016x}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.listing_path = self.folder / "listing.json"
        self.sizes = self.listing()
        self.pinned = set()
        self.needed = {}
        self.ahead = set()
        self.queue = []
        self.thread = None
        two_largest = sum(sorted(self.sizes.values())[-2:])
        if two_largest > limit:
            fail(f"--data.cache={gigabytes(limit)} is too small for {url}: "
                 f"it must hold two files, {gigabytes(two_largest)}")

    def __getstate__(self):
        """Leave the thread behind when a loader process gets a copy."""
        return {**self.__dict__, "thread": None}

    # What lies in the store

    def filesystem(self):
        """Return (fsspec's file system, the root in it), one for each process.

        Those of the process that a loader was forked from stay in the loader, too: if they were collected
        there, they would close connections that both share.
        """
        key = os.getpid(), self.url
        if key not in FILESYSTEMS:
            try:
                FILESYSTEMS[key] = fsspec.core.url_to_fs(self.url.partition("{")[0])
            except ImportError as error:
                fail(f"{self.url} needs a package: {error}")
            except ValueError as error:
                fail(f"{self.url}: {reason(error)}")
        return FILESYSTEMS[key]

    def listing(self):
        """Return {name: bytes} of the files, listed once and kept."""
        with FileLock(self.folder / "listing.lock"):
            if self.listing_path.is_file():
                return json.loads(self.listing_path.read_text())
            list_files = self.list_web if self.url.startswith("http") else self.list_bucket
            sizes = self.retry("listing", list_files)
            if not sizes:
                fail(f"{self.url} holds no files that can be read")
            with atomic(self.listing_path) as part:
                part.write_text(json.dumps(sizes))
            return sizes

    def list_web(self):
        """Ask for the size of each file of a web address, in which {first..last} stands for numbers."""
        system, _ = self.filesystem()
        urls = [self.url]
        match = re.search(r"\{(\d+)\.\.(\d+)\}", self.url)
        if match:
            numbers = range(int(match[1]), int(match[2]) + 1)
            urls = [self.url.replace(match[0], f"{number:0{len(match[1])}}") for number in numbers]
        sizes = {url.removeprefix(self.base()): system.info(url).get("size") for url in urls}
        if None in sizes.values():
            fail(f"{self.url}: the server does not tell how large its files are")
        return sizes

    def list_bucket(self):
        """List the files of a bucket that are read -> {name: bytes}."""
        system, root = self.filesystem()
        found = system.find(root, detail=True) or {root: system.info(root)}
        top = root.rstrip("/")
        sizes = {}
        for path in sorted(found):
            name = path[len(top):].lstrip("/") or path.rpartition("/")[2]
            sizes[name] = found[path]["size"]
        suffixes = readable_suffixes(sizes)
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
                fail(f"{self.url}: {what}: it is not there, or its host does not answer ({reason(error)})")
            except Exception as error:                  # every store has its own
                if "Credential" in type(error).__name__:
                    fail(f"{self.url}: {reason(error)}: set those of your store (AWS_ACCESS_KEY_ID, ... for s3)")
                if tried == TRIES - 1:
                    fail(f"{self.url}: {what} failed {TRIES} times: {reason(error)}")
                tqdm.write(f"{self.url}: {what}: {reason(error)}; trying again in {2 ** tried} s")
                time.sleep(2 ** tried)

    # From there to here

    def path(self, name):
        """Return where a file lies once it is fetched."""
        return self.folder / name

    def fetch(self, name, wait=True):
        """Bring a file here, if it is not -> its path.

        Without `wait` return None where another process is at it or there is no room.
        """
        path = self.path(name)
        if path.is_file():
            os.utime(path)                              # used last
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(f"{path}.lock", timeout=-1 if wait else 0):
                if path.is_file():
                    return path
                claim = Path(f"{path}.claim")                   # takes the room of the file
                if not self.make_room(claim, self.sizes[name], urgent=wait):
                    return None
                part = Path(f"{path}.part")
                self.retry(name, functools.partial(self.copy, name, part))
                os.replace(part, path)
                claim.unlink(missing_ok=True)
        except Timeout:
            return None
        return path

    def fetch_path(self, path):
        """Bring a file here, by the path that it will have."""
        return self.fetch(path.relative_to(self.folder).as_posix())

    def copy(self, name, part):
        """Copy a file of the store to the path `part`; raise OSError if it is not as large as was listed."""
        system, _ = self.filesystem()
        system.get_file(self.address(name), str(part))
        size = part.stat().st_size
        if size != self.sizes[name]:
            raise OSError(f"{size} bytes came of {self.sizes[name]}: "
                          f"if the file was changed, delete {self.listing_path}")

    def make_room(self, claim, size, urgent):
        """Claim `size` bytes, dropping the files that were used longest ago -> whether there is room.

        What is pinned or needed is not dropped, nor what was fetched ahead, unless the claim is `urgent`.
        """
        with FileLock(self.folder / "room.lock"):
            stats = self.cached_files()
            used = sum(stat.st_size for stat in stats.values())
            free = shutil.disk_usage(self.folder).free
            for path in self.droppable(stats, urgent):
                if used + size <= self.limit and free >= size:
                    break
                path.unlink(missing_ok=True)
                used -= stats[path].st_size
                free += stats[path].st_size
            if free < size:
                fail(f"the disk of {self.folder} is full: "
                     "lower --data.cache, or set XDG_CACHE_HOME to another disk")
            if used + size > self.limit and not urgent:
                return False
            with open(claim, "wb") as file:
                file.truncate(size)
            return True

    def cached_files(self):
        """Return {path: its os.stat} of the files and claims in the cache's folder."""
        stats = {}
        for path in self.folder.rglob("*"):
            internal = path.suffix in (".lock", ".part") or path == self.listing_path
            if path.is_file() and not internal and not path.name.startswith("."):
                stats[path] = attempt(path.stat)
        return {path: stat for path, stat in stats.items() if stat}     # others were dropped meanwhile

    def droppable(self, stats, urgent):
        """Return the paths that may be dropped, the one used longest ago first."""
        names = self.pinned.union(*self.needed.values())
        if not urgent:
            names |= self.ahead
        in_use = {self.path(name) for name in names}
        paths = []
        for path in sorted(stats, key=lambda path: stats[path].st_mtime):
            if path.suffix == ".claim":
                may_go = time.time() - stats[path].st_mtime > ABANDONED
            else:
                may_go = path not in in_use
            if may_go:
                paths.append(path)
        return paths

    def prefetch(self, reader, needed, later):
        """Keep the files `needed` by a reader; fetch them, and of those for `later` as many as fit."""
        self.needed[reader] = set(needed)
        in_use = self.pinned.union(*self.needed.values())
        room = self.limit - sum(self.sizes[name] for name in in_use)
        ahead = list(needed)
        for name in later:
            room -= self.sizes[name]
            if room < 0:
                break
            ahead.append(name)
        self.ahead = set(ahead)
        missing = [name for name in ahead if not self.path(name).is_file()]
        rank = int(os.environ.get("LOCAL_RANK", 0))
        world = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        first = rank * len(missing) // world            # each process begins with others
        self.queue += missing[first:] + missing[:first]
        is_busy = self.thread and self.thread.is_alive()
        if self.queue and not is_busy:
            self.thread = threading.Thread(target=self.fetch_queue, daemon=True)
            self.thread.start()

    def fetch_queue(self):
        """Fetch what is queued; a file that another process fetches is left to it."""
        while self.queue:
            try:
                self.fetch(self.queue.pop(0), wait=False)
            except (SystemExit, IndexError):            # why is said when the file is due
                return

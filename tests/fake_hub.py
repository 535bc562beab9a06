"""A stand-in of the Hugging Face hub on loopback, for data sets and models, with the troubles that a
network has.

It serves the folders of `root`: datasets/<owner>/<name>, models/<owner>/<name>, and files/ as a plain
web server does (at /files/...). A folder <name>@<revision> beside <name> is that revision of it. What
huggingface_hub 1 and 2 ask for is answered: the information of a repository, its tree, paths-info, and
HEAD, GET and ranges of `resolve`. There is no LFS redirect and no xet.

    with Hub(folder) as hub:
        run(command, env={"HF_ENDPOINT": hub.url, "HF_HOME": ...})
        hub.fetched["train-0.tar"]                  # how often it was asked for
        hub.fail_every = 5                          # from now on each fifth request fails with 500

HF_ENDPOINT and HF_HOME are read when huggingface_hub is imported: commands under test run in processes
of their own.
"""

import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

BLOCK = 1 << 16  # bytes that are sent at a time


@dataclass(frozen=True)
class Request:
    """One request that was made. `name` is the file's path in its repository, "" if no file was asked for."""

    method: str
    path: str
    name: str
    span: str  # the Range header


class Hub:
    """The server. Its attributes may be set at any time."""

    def __init__(self, root):
        self.root = Path(root)
        self.token = ""  # if set, who does not bring it gets 401
        self.gated = set()  # "owner/name" of what is refused with 403: GatedRepo
        self.cut_after = 0  # bytes of a file after which the connection breaks ...
        self.cuts = 0  # ... for so many more requests of files
        self.fail_every = 0  # each so manieth request fails with 500
        self.rate = 0  # bytes a second for each request of a file; 0 = as fast as it goes
        self.lock = threading.Lock()
        self.forget()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Answer,), {"hub": self}))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def forget(self):
        """Counts from zero."""
        self.requests = []  # every `Request`
        self.fetched = Counter()  # name of a file -> requests of its content (GET), failed ones too
        self.sent = Counter()  # name of a file -> bytes of it that went out

    @property
    def listings(self):
        """Requests that were not of a file."""
        return [request for request in self.requests if not request.name]

    def close(self):
        """Nobody listens at `url` from now on."""
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def folder(self, kind, repo, revision):
        """The folder of a revision: "main", a name or a commit. None if there is none."""
        for path in self.root.glob(f"{kind}/{repo}*"):
            name, _, label = path.relative_to(self.root / kind).as_posix().partition("@")
            if name == repo and revision in (label or "main", commit(name, label or "main")):
                return path
        return None

    def knows(self, kind, repo):
        return (self.root / kind / repo).is_dir()


def commit(repo, revision):
    """The commit of a revision: 40 hex digits."""
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    return hashlib.sha1(f"{repo}@{revision}".encode()).hexdigest()


def blob_id(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


def files_of(folder):
    """{path in the repository: file}"""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def entry(name, path):
    """What the hub says of a file in a listing."""
    return {"type": "file", "oid": blob_id(path), "size": path.stat().st_size, "path": name}


def directory(name):
    return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}


def tree(files, under, recursive):
    """The listing of a folder of the repository: directories first. None if there is no such folder."""
    prefix = f"{under}/" if under else ""
    inside = {name: path for name, path in files.items() if name.startswith(prefix)}
    if not inside:
        return None
    directories, entries = set(), []
    for name, path in inside.items():
        parents = name.removeprefix(prefix).split("/")[:-1]
        for depth in range(1, len(parents) + 1 if recursive else min(2, len(parents) + 1)):
            directories.add(prefix + "/".join(parents[:depth]))
        if recursive or not parents:
            entries.append(entry(name, path))
    return [directory(name) for name in sorted(directories)] + entries


class Answer(BaseHTTPRequestHandler):
    """Answers one connection's requests."""

    protocol_version = "HTTP/1.1"
    hub = None

    def log_message(self, *args):
        pass

    def do_GET(self):
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        try:
            self.answer(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_GET
    do_POST = do_GET

    def answer(self, body):
        url = urlparse(self.path)
        words = [unquote(word) for word in url.path.strip("/").split("/")]
        name = self.name_of(words)
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, self.path, name, self.headers.get("Range") or ""))
            number = len(self.hub.requests)
            if name and self.command == "GET":
                self.hub.fetched[name] += 1
        if self.hub.fail_every and number % self.hub.fail_every == 0:
            return self.refuse(500, "", "the stand-in fails now and then")
        if words[0] == "files":
            return self.plain(name)
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.refuse(401, "", "Invalid username or password.")
        if words[0] == "api" and len(words) > 3 and words[1] in ("datasets", "models"):
            return self.api(words[1], "/".join(words[2:4]), words[4:], parse_qs(url.query), body)
        if "resolve" in words:
            return self.resolve(words)
        return self.refuse(404, "", "the stand-in knows no such address")

    @staticmethod
    def name_of(words):
        """The file that an address is of."""
        if words[0] == "files":
            return "/".join(words[1:])
        if "resolve" in words and words[0] != "api":
            return "/".join(words[words.index("resolve") + 2 :])
        return ""

    def refuse(self, status, code, message):
        headers = {"X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def send(self, status, body, headers=()):
        self.send_response(status)
        for key, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **dict(headers),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def api(self, kind, repo, rest, query, body):
        """What is known of a repository, and what is in it."""
        if not self.hub.knows(kind, repo):
            return self.refuse(404, "RepoNotFound", "Repository not found")
        revision = rest[1] if len(rest) > 1 else "main"
        folder = self.hub.folder(kind, repo, revision)
        if folder is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = files_of(folder)
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": name} for name in files]
            if query.get("blobs", [""])[0].lower() == "true":
                siblings = [
                    {"rfilename": name, "size": path.stat().st_size, "blobId": blob_id(path)}
                    for name, path in files.items()
                ]
            about = {
                "_id": "0",
                "id": repo,
                "sha": commit(repo, revision),
                "private": False,
                "disabled": False,
                "tags": [],
                "gated": "auto" if repo in self.hub.gated else False,
                "downloads": 0,
                "likes": 0,
                "cardData": {},
                "lastModified": "2026-01-01T00:00:00.000Z",
                "siblings": siblings,
            }
            return self.send(200, json.dumps(about).encode())
        if rest[0] == "tree":
            found = tree(
                files, "/".join(rest[2:]), query.get("recursive", ["false"])[0].lower() in ("true", "1")
            )
            if found is None:
                return self.refuse(404, "EntryNotFound", "no such folder")
            return self.send(200, json.dumps(found).encode())
        if rest[0] == "paths-info":
            asked = (
                json.loads(body)["paths"]
                if body.startswith(b"{")
                else parse_qs(body.decode()).get("paths", [])
            )
            found = [entry(name, files[name]) for name in asked if name in files]
            found += [directory(name) for name in asked if any(file.startswith(f"{name}/") for file in files)]
            return self.send(200, json.dumps(found).encode())
        return self.refuse(404, "", "the stand-in knows no such question")

    def resolve(self, words):
        """A file of a repository."""
        kind = "datasets" if words[0] == "datasets" else "models"
        at = words.index("resolve")
        repo, revision, name = "/".join(words[at - 2 : at]), words[at + 1], "/".join(words[at + 2 :])
        if not self.hub.knows(kind, repo):
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if repo in self.hub.gated:
            return self.refuse(
                403, "GatedRepo", f"Access to {repo} is restricted: visit its page to ask for access."
            )
        folder = self.hub.folder(kind, repo, revision)
        if folder is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        path = folder / name
        if not path.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        self.content(name, path, {"X-Repo-Commit": commit(repo, revision), "ETag": f'"{blob_id(path)}"'})

    def plain(self, name):
        path = self.hub.root / "files" / name
        if not path.is_file():
            return self.refuse(404, "", "File not found")
        self.content(name, path, {"ETag": f'"{blob_id(path)}"'})

    def content(self, name, path, headers):
        """Sends a file or the range of it that was asked for; breaks off, or takes its time, where the
        switches say so."""
        data = path.read_bytes()
        first, last, status = 0, len(data) - 1, 200
        if span := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            if span[1] and int(span[1]) >= len(data):
                return self.refuse(416, "", "Range Not Satisfiable")
            first = int(span[1]) if span[1] else max(0, len(data) - int(span[2]))
            last = min(int(span[2]), last) if span[1] and span[2] else last
            status = 206
            headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
        body = data[first : last + 1]
        self.send_response(status)
        headers = {
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "Content-Length": str(len(body)),
            **headers,
        }
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        with self.hub.lock:
            cut = self.hub.cuts > 0 and len(body) > self.hub.cut_after
            self.hub.cuts -= cut
        for start in range(0, self.hub.cut_after if cut else len(body), BLOCK):
            piece = body[start : min(start + BLOCK, self.hub.cut_after) if cut else start + BLOCK]
            self.wfile.write(piece)
            with self.hub.lock:
                self.hub.sent[name] += len(piece)
            if self.hub.rate:
                time.sleep(len(piece) / self.hub.rate)
        if cut:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

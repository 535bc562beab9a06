"""Through a cache of bounded size: tars, parquet and prepared shards from hf://, s3:// and http://,
against servers on loopback.

The hub and the web server are fake_hub.py, S3 is moto's. What is read must be what a local folder gives
with the same flags, in the same order; every byte that goes over the wire is counted. Readers run in
processes of their own (reader.py), each with its own XDG_CACHE_HOME, where the cache lies.
"""

import json
import re
import shutil
import threading
import time
from collections import Counter

import pytest

import data
import fresh
import sets
from fake_hub import Hub
from sets import config, noise, say, struct_column, write_parquet, write_tar
from test_pretrained import one_line

FILES, EACH = 8, 20
WINDOW = "--data.window=30"  # of two files
CACHE = "--data.cache=1.5MB"  # holds five of the eight
BATCH = [
    "--config=debug",
    "--model.size=32",
    "--train.batch=16",
    "--train.micro_batch=4",
    "--train.val_images=2",
]


def picture(k):
    """A file of 14 KB."""
    return noise(k, 68)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A folder of tars and one of parquet, 300 KB a file."""
    root = tmp_path_factory.mktemp("local")
    for file in range(FILES):
        numbers = range(EACH * file, EACH * file + EACH)
        members = [
            (f"{k:05}.{kind}", content)
            for k in numbers
            for kind, content in (("png", picture(k)), ("txt", say(k)))
        ]
        write_tar(root / f"tars/{file:05}.tar", members)
        write_parquet(
            root / f"parquet/{file:05}.parquet",
            group=10,
            image=struct_column(map(picture, numbers)),
            text=[say(k) for k in numbers],
        )
    return root


@pytest.fixture(scope="module")
def web(local, tmp_path_factory):
    """The stand-in of the hub and of a web server, with both sets: owner/tars, owner/parquet, /files/tars."""
    root = tmp_path_factory.mktemp("served")
    for name in ("tars", "parquet"):
        shutil.copytree(local / name, root / f"datasets/owner/{name}")
        shutil.copytree(local / name, root / f"files/{name}")
    with Hub(root) as server:
        yield server


class Bucket:
    """moto's S3 with the sets in bucket/sets, its requests counted; `fail_every` as that of the hub."""

    def __init__(self, local):
        from moto.server import ThreadedMotoServer

        self.fail_every, self.lock = 0, threading.Lock()
        self.forget()
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        self.url = "http://{}:{}".format(*self.server.get_host_and_port())
        self.app, self.server._server.app = self.server._server.app, self
        import boto3

        client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="x",
            aws_secret_access_key="x",
        )
        client.create_bucket(Bucket="bucket")
        for path in sorted(local.rglob("*.*")):
            client.put_object(
                Bucket="bucket", Key=f"sets/{path.relative_to(local).as_posix()}", Body=path.read_bytes()
            )

    def forget(self):
        self.requests, self.fetched, self.sent = [], Counter(), Counter()

    @property
    def listings(self):
        return [request for request in self.requests if "list-type" in request]

    def __call__(self, environ, start):
        """Counts a request and hands it on."""
        name = environ["PATH_INFO"].rpartition("/")[2]
        with self.lock:
            self.requests.append(
                f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}?{environ['QUERY_STRING']}"
            )
            number = len(self.requests)
        if self.fail_every and number % self.fail_every == 0:
            start("500 Internal Server Error", [("Content-Length", "0")])
            return []
        body = list(self.app(environ, start))
        if environ["REQUEST_METHOD"] == "GET" and "." in name:
            with self.lock:
                self.fetched[name] += 1
                self.sent[name] += sum(map(len, body))
        return body

    def close(self):
        self.server.stop()


@pytest.fixture(scope="module")
def s3(local):
    pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    bucket = Bucket(local)
    yield bucket
    bucket.close()


@pytest.fixture
def environment(request, tmp_path):
    """The environment of a reader: where the servers are, and a cache of its own."""
    base = {
        "XDG_CACHE_HOME": tmp_path / "cache",
        "HF_HOME": tmp_path / "hf",
        "HF_HUB_OFFLINE": None,
        "HF_TOKEN": None,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name, key in (("web", "HF_ENDPOINT"), ("s3", "AWS_ENDPOINT_URL")):
        if name in request.fixturenames or "store" in request.fixturenames:
            server = request.getfixturevalue(name)
            server.fail_every = 0
            server.forget()
            base[key] = server.url
    return base


class Store:
    """One way to the same files: its address, and the server that counts."""

    def __init__(self, kind, server, name):
        self.kind, self.server = kind, server
        suffix = "tar" if name == "tars" else "parquet"
        self.source = {
            "hf": f"hf:owner/{name}",
            "s3": f"s3://bucket/sets/{name}",
            "http": f"{server.url}/files/{name}/{{00000..0000{FILES - 1}}}.{suffix}",
        }[kind]


@pytest.fixture(params=["hf", "s3", "http"])
def store(request, web, s3):
    return Store(request.param, s3 if request.param == "s3" else web, "tars")


def reader(start, steps, source, *flags, **options):
    """Starts a reader of a source through the cache."""
    return fresh.start(
        "tests/reader.py", start, steps, *BATCH, f"--data={source}", WINDOW, CACHE, *flags, **options
    )


def rows(text):
    """The lines that a reader printed in full."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]


def read(*args, **options):
    """-> (captions of the run in order, captions of the validation set, what was said)"""
    done = reader(*args, **options).wait()
    assert done.code == 0, done.err[-3000:]
    found = rows(done.out)
    return (
        [caption for row in found for caption in row.get("captions", [])],
        found[-1]["val"],
        sets.lines(done),
    )


def reference(source, steps, *flags, start=0):
    """What the local folder gives."""
    c = config(source, WINDOW, *BATCH[1:], *flags)
    train, _ = data.load(c)
    loader = data.batches(train, sets.tokenize, c, start, 0, 1)
    return [caption for _ in range(4 * steps) for caption in next(loader)["caption"]]


def set_size(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".tar", ".parquet"))


def step_of_an_epoch(local):
    """So many steps are an epoch, rounded down."""
    return sum(len(side) for side in data.load(config(local / "tars", WINDOW))[:1]) // 16


# The same items in the same order


def test_as_from_a_folder(store, environment, local, tmp_path):
    """Two epochs through a cache that holds two thirds of the set: the order of a folder, all of its bytes
    once an epoch."""
    steps = 2 * step_of_an_epoch(local)
    captions, held_out, _ = read(0, steps, store.source, env=environment, cwd=tmp_path)
    assert captions == reference(local / "tars", steps)
    assert held_out and not set(held_out) & set(captions)
    size = set_size(local / "tars")
    file = size / FILES
    assert (
        size <= sum(store.server.sent.values()) <= 2 * size + 4 * file
    )  # and a window that was fetched ahead
    assert len(store.server.fetched) == FILES
    assert sets.folder_size(tmp_path / "cache") < 1_500_000 + 100_000


@pytest.mark.parametrize("kind", ["hf", "s3"])
def test_parquet_as_from_a_folder(kind, web, s3, environment, local, tmp_path):
    source = Store(kind, s3 if kind == "s3" else web, "parquet").source
    captions, _, said = read(0, 12, source, env=environment, cwd=tmp_path)
    assert captions == reference(local / "parquet", 12)
    assert "text" in said


def test_prepared_shards_as_from_a_folder(web, environment, local, tmp_path):
    flags = [
        "--config=debug",
        "--model.size=32",
        f"--data={local / 'tars'}",
        f"--out={web.root / 'files/prepared'}",
        "--shard=20",
    ]
    done = fresh.run("tools/prepare.py", *flags, env=environment, cwd=tmp_path)
    assert done.code == 0, done.err
    shutil.copytree(web.root / "files/prepared", web.root / "datasets/owner/prepared", dirs_exist_ok=True)
    web.forget()
    captions, _, _ = read(0, 12, "hf:owner/prepared", env=environment, cwd=tmp_path)
    assert captions == reference(web.root / "files/prepared", 12)
    size = sum(path.stat().st_size for path in (web.root / "files/prepared").iterdir())
    assert sum(web.sent.values()) < 2.3 * size


def test_a_cache_that_holds_all_fetches_all_once(store, environment, local, tmp_path):
    """Three epochs, and a second start: nothing is listed or fetched again."""
    steps = 3 * step_of_an_epoch(local)
    large = "--data.cache=1GB"
    first, *_ = read(0, steps, store.source, large, env=environment, cwd=tmp_path)
    assert sum(store.server.sent.values()) == set_size(local / "tars")
    store.server.forget()
    again, *_ = read(0, 5, store.source, large, env=environment, cwd=tmp_path)
    assert again == first[:80] and not store.server.sent and not store.server.listings


def test_one_spelling_and_another(web, environment, tmp_path):
    """hf:owner/name with a cache is hf://datasets/owner/name; folders and revisions as without one."""
    first = read(0, 3, "hf:owner/tars", env=environment, cwd=tmp_path)[0]
    assert read(0, 3, "hf://datasets/owner/tars", env=environment, cwd=tmp_path)[0] == first
    assert read(0, 3, "owner/tars", env=environment, cwd=tmp_path)[0] == first
    shutil.copytree(
        web.root / "datasets/owner/tars", web.root / "datasets/owner/deep@v2/some/tars", dirs_exist_ok=True
    )
    (web.root / "datasets/owner/deep").mkdir(exist_ok=True)
    assert read(0, 3, "hf:owner/deep/some/tars@v2", env=environment, cwd=tmp_path)[0] == first


@pytest.mark.parametrize("kind", ["s3", "http"])
def test_with_loader_processes(kind, web, s3, environment, local, tmp_path):
    """Processes forked from one that talks to a store, which throw away their copies of its connections:
    no hang, the same order."""
    source = Store(kind, s3 if kind == "s3" else web, "tars").source
    done = reader(0, 18, source, "--data.workers=2", env=environment, cwd=tmp_path).wait(40)
    assert done.code == 0, done.err
    captions = [caption for row in rows(done.out) for caption in row.get("captions", [])]
    assert captions == reference(local / "tars", 18)


def test_an_error_in_a_loader_process_ends_the_run(web, environment, tmp_path):
    """A window that does not fit into the cache is found there: one line, and no process waits for ever."""
    flags = ["--data.workers=2", "--data.cache=1MB", "--data.window=1000"]
    done = reader(0, 8, "hf:owner/tars", *flags, env=environment, cwd=tmp_path).wait(40)
    assert done.code == 1 and done.errors and "--data.window" in done.errors[0]
    said, _, _ = done.err.partition("Exception ignored in atexit callback")  # torch's, of a loader that ends meanwhile
    assert "Traceback" not in said, done.err


# Ranks, kills, starts


@pytest.mark.parametrize("kind", ["hf", "s3"])
def test_two_ranks_share_what_was_fetched(kind, web, s3, environment, local, tmp_path):
    """One epoch on two ranks of a node is the folder's, and its bytes come once."""
    store = Store(kind, s3 if kind == "s3" else web, "tars")
    steps = step_of_an_epoch(local)
    done = fresh.ranks(
        2,
        "tests/reader.py",
        0,
        steps,
        *BATCH,
        f"--data={store.source}",
        WINDOW,
        CACHE,
        env=environment,
        cwd=tmp_path,
    )
    assert [one.code for one in done] == [0, 0], done[0].err + done[1].err
    parts = [[row["captions"] for row in rows(one.out) if "captions" in row] for one in done]
    whole = [caption for m in range(4 * steps) for caption in parts[m % 2][m // 2]]
    assert whole == reference(local / "tars", steps)
    size = set_size(local / "tars")
    assert sum(store.server.sent.values()) <= 1.3 * size + 4 * size / FILES


def test_a_kill_in_mid_window_and_the_same_command_again(store, environment, local, tmp_path):
    """Exact from there, and no more is fetched than the window at hand and the one ahead; a file that was
    cut is fetched again."""
    running = reader(0, 40, store.source, env=environment, cwd=tmp_path)
    while len(rows(running.out)) < 1 + 4 * 4 and running.poll() is None:
        time.sleep(0.005)
    running.kill()
    running.wait()
    store.server.forget()
    captions, *_ = read(4, 3, store.source, env=environment, cwd=tmp_path)
    assert captions == reference(local / "tars", 3, start=4)
    assert sum(store.server.fetched.values()) <= 5
    if store.kind != "hf":  # whose client asks for the folder of a file before it fetches it
        assert not store.server.listings


@pytest.mark.parametrize("start", [4, 13])
def test_a_start_in_the_middle_on_another_machine(start, web, environment, local, tmp_path):
    """Nothing is here: neither files nor index. In a later epoch, too."""
    captions, *_ = read(start, 3, "hf:owner/tars", env=environment, cwd=tmp_path)
    assert captions == reference(local / "tars", 3, start=start)


def test_a_second_start_lists_and_fetches_nothing_that_it_has(web, environment, tmp_path):
    first, *_ = read(0, 2, "hf:owner/tars", env=environment, cwd=tmp_path)
    held = {path.name for path in (tmp_path / "cache").rglob("*.tar")}
    web.forget()
    assert read(0, 2, "hf:owner/tars", env=environment, cwd=tmp_path)[0] == first
    assert not web.listings and not held & set(web.sent)


def test_the_cache_stays_below_its_size(web, environment, tmp_path):
    """At every moment of two epochs, files that are on their way counted."""
    web.rate = 3_000_000
    running = reader(0, 18, "hf:owner/tars", env=environment, cwd=tmp_path)
    most = 0
    while running.poll() is None:
        used = [size_of_the_cache(tmp_path / "cache") for _ in range(3)]
        most = max(most, min(used))  # a file that is moved meanwhile is counted twice, once
    web.rate = 0
    assert running.wait().code == 0 and 600_000 < most <= 1_500_000


def size_of_the_cache(folder):
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and path.suffix not in (".npz", ".json", ".lock"):
                total += path.stat().st_size
        except FileNotFoundError:  # dropped meanwhile
            continue
    return total


def test_the_next_window_comes_while_this_one_is_read(web, environment, tmp_path):
    """After the first step, without another: more files than the first window's are fetched."""
    running = reader(0, 10**6, "hf:owner/tars", "--data.workers=0", env=environment, cwd=tmp_path)
    while len(rows(running.out)) < 1 + 4 * 2 and running.poll() is None:
        time.sleep(0.005)
    running.kill(19)  # SIGSTOP
    seen = len(rows(running.out)) - 1
    fetched = len(web.fetched)
    running.kill()
    running.wait()
    assert seen < 20 and fetched >= 3


# What fails


def test_a_store_that_fails_one_request_in_five(store, environment, local, tmp_path):
    """It is said, nothing is lost, the order is the same."""
    store.server.fail_every = 5
    steps = step_of_an_epoch(local)
    captions, _, said = read(0, steps, store.source, env=environment, cwd=tmp_path)
    store.server.fail_every = 0
    assert captions == reference(local / "tars", steps)
    if store.kind != "s3":  # whose client retries by itself
        assert re.search(r"(?i)again|retr|wait", said)


def test_a_connection_that_is_cut(web, environment, local, tmp_path):
    web.cut_after, web.cuts = 100_000, 3
    source = Store("http", web, "tars").source
    captions, *_ = read(0, 5, source, env=environment, cwd=tmp_path)
    assert captions == reference(local / "tars", 5) and web.cuts == 0


def test_a_cache_smaller_than_two_files(store, environment, tmp_path):
    """One line that names the flag, how much it would take, and nothing is fetched in vain."""
    done = reader(0, 2, store.source, "--data.cache=0.4MB", env=environment, cwd=tmp_path).wait()
    assert done.code == 1 and len(done.errors) == 1 and "Traceback" not in done.err, done.err
    assert "--data.cache" in done.errors[0] and re.search(r"0\.6\d* ?MB", done.errors[0])
    assert not store.server.sent


@pytest.mark.parametrize(
    "source, words",
    [
        ("s3://none/sets", "s3://none"),
        ("s3://bucket/none", "s3://bucket/none"),
        ("hf:owner/none", "owner/none"),
        ("hf://datasets/owner/tars/none", "none"),
        ("{web}/files/none/{00000..00003}.tar", "none"),
        ("{web}/files/tars/{00000..00009}.tar", "0000[89]"),
        ("gs://bucket/sets", "gcsfs"),
        ("ftp9://bucket/sets", "ftp9"),
    ],
)
def test_what_is_not_there_is_one_line(source, words, web, s3, environment, tmp_path):
    done = reader(0, 1, source.replace("{web}", web.url), env=environment, cwd=tmp_path).wait()
    assert done.code == 1 and len(done.errors) == 1 and "Traceback" not in done.err, done.err
    assert re.search(words, done.errors[0])


def test_a_bucket_without_a_cache_says_the_flag(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one_line(lambda: sets.load("s3://bucket/sets"), "--data.cache=")
    for size in ("lots", "-1GB", "0", "5 apples"):
        one_line(lambda size=size: sets.load("s3://bucket/sets", f"--data.cache={size}"), "data.cache")


def test_trains_through_a_cache_and_goes_on(s3, environment, tmp_path):
    """The whole command, stopped after half and resumed: the loss of an undisturbed run."""
    flags = [
        *BATCH,
        "--data=s3://bucket/sets/tars",
        WINDOW,
        CACHE,
        "--model.width=32",
        "--train.compile=no",
        "--train.precision=fp32",
        "--train.log_every=1",
        "--sample.steps=1",
        "--train.eval_every=0",
    ]
    for out, images in (("whole", 64), ("part", 32), ("part", 64)):
        out = f"--out={tmp_path / out}"
        done = fresh.run("train.py", *flags, out, f"--train.images={images}", env=environment, cwd=tmp_path)
        assert done.code == 0, done.err
    losses = [
        [row["loss"] for row in rows((tmp_path / out / "log.jsonl").read_text()) if "loss" in row]
        for out in ("whole", "part")
    ]
    assert len(losses[0]) == 4 and losses[0] == losses[1]

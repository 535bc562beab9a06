"""What a run reads, in which order: a pure function of (seed, images seen), whatever the source, the
ranks, the workers and the kills.

Pictures are known by their captions, of which each has one of its own. `order` gives the captions of a
whole run, as if one process had read all micro-batches.
"""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

import data
import fresh
import sets
from sets import (
    config,
    encoded,
    items,
    jpeg,
    load,
    say,
    struct_column,
    write_files,
    write_parquet,
    write_tar,
    write_zip,
)

FILES, EACH = 7, 9
N = FILES * EACH
WINDOW = "--data.window=12"  # of two files, of which each holds nine at most
BATCH = ["--train.batch=8", "--train.micro_batch=2"]
FORMS = ["folder", "tar", "zip", "parquet", "shards"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """{form: a set of seven files with nine pictures each} (a folder of seven folders)"""
    root = tmp_path_factory.mktemp("order")
    for file in range(FILES):
        numbers = range(EACH * file, EACH * file + EACH)
        members = sets.pairs(numbers)
        write_files(root / f"folder/{file}", members)
        write_tar(root / f"tar/{file}.tar", members)
        write_zip(root / f"zip/{file}.zip", members)
        texts = [say(k) for k in numbers]
        write_parquet(
            root / f"parquet/{file}.parquet", group=4, image=struct_column(map(jpeg, numbers)), text=texts
        )
    done = fresh.run(
        "tools/prepare.py",
        "--config=debug",
        f"--data={root / 'tar'}",
        f"--out={root / 'shards'}",
        "--shard=9",
        "--model.size=32",
        cwd=root,
        env={"XDG_CACHE_HOME": root / "cache"},
    )
    assert done.code == 0, done.err
    return {form: root / form for form in FORMS}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def order(source, steps, *args, start=0, world=1):
    """The captions of `steps` steps from `start` on, read by `world` ranks in turn."""
    c = config(source, WINDOW, *BATCH, *args)
    train = data.load(c)[0]
    loaders = [data.batches(train, sets.tokenize, c, start, rank, world) for rank in range(world)]
    micro_batches = c.train.batch // c.train.micro_batch
    out = []
    for m in range(steps * micro_batches):
        out += next(loaders[m % micro_batches % world])["caption"]
    return out


def number_of(caption):
    return int(caption.rsplit(" ", 1)[1])


@pytest.mark.parametrize("form", FORMS)
def test_each_item_once_an_epoch_in_another_order_each(form, made):
    train, val = load(made[form])
    n = len(train)
    assert n + len(val) == N
    read = order(made[form], -(-3 * n // 8))[: 3 * n]
    epochs = [read[k * n : k * n + n] for k in range(3)]
    whole = sorted(train.captions(item)[0] for item in items(train))
    for epoch in epochs:
        assert sorted(epoch) == whole
        assert epoch != sorted(epoch, key=number_of)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert order(made[form], 2) == read[:16] != order(made[form], 2, "--seed=1")


@pytest.mark.parametrize("form", FORMS)
def test_any_number_of_ranks_and_workers_and_any_start(form, made):
    """Through an epoch's end, with starts in the middle of a window and ranks that change."""
    whole = order(made[form], 12)
    for world in (1, 2, 4):
        for start in (0, 1, 5):
            assert order(made[form], 12 - start, start=start, world=world) == whole[start * 8 :], (
                world,
                start,
            )
    for world in (1, 2):
        assert order(made[form], 7, "--data.workers=2", start=5, world=world) == whole[40:]


@pytest.mark.parametrize("form", FORMS)
def test_pictures_stay_with_their_captions(form, made):
    """In batches as by `get`: the number in the caption is that of the picture."""
    c = config(made[form], WINDOW, *BATCH)
    train, val = data.load(c)
    batch = [next(data.batches(side, sets.tokenize, c, 3, 0, 1)) for side in (train, val)]
    for part in batch:
        assert [sets.number(picture) for picture in part["image"]] == list(map(number_of, part["caption"]))
    for item in items(train)[:5]:
        picture, caption = train.get(item, 0)
        picture = picture["image"] if isinstance(picture, dict) else picture
        assert sets.number(np.asarray(picture)) == number_of(caption)


def test_every_form_has_the_same_items_of_the_same_names(made):
    """A folder, its tars and its zips hold out the same pictures only if they name them alike; each holds
    out some and loses none."""
    for form in FORMS[:4]:
        train, val = load(made[form])
        assert set(sets.captions(train)) | set(sets.captions(val)) == set(range(N)), form


@pytest.mark.parametrize("form", ["tar", "zip", "parquet", "shards"])
@pytest.mark.parametrize("window", [1, 10, 20, 40, 1000])
def test_items_of_a_window_come_from_its_files_only(form, window, made):
    """Files are permuted; as many in a row as hold `window` items are mixed; all of them come before any of
    the next."""
    train, _ = load(made[form])
    n = len(train)
    captions = order(made[form], -(-2 * n // 8), f"--data.window={window}")
    of = file_of(made, form)
    turns = []
    for epoch in (captions[:n], captions[n : 2 * n]):
        files = [of[caption] for caption in epoch]
        groups = whole_files(files)
        for number, group in enumerate(groups):
            sizes = Counter(group).values()
            assert len(group) >= window or number == len(groups) - 1
            assert len(group) - max(sizes) < window  # without its last file it was no window yet
            if len(sizes) > 1:
                assert group != sorted(group, key=group.index)  # mixed
        turns.append(list(dict.fromkeys(files)))
    assert sorted(turns[0]) == sorted(turns[1]) and (turns[0] != turns[1] or turns[0] != sorted(turns[0]))


def whole_files(files):
    """Cuts an epoch, the file of each item, into the shortest parts that share no file."""
    last = {file: place for place, file in enumerate(files)}
    groups, start, end = [], 0, 0
    for place, file in enumerate(files):
        end = max(end, last[file])
        if place == end:
            groups.append(files[start : end + 1])
            start = place + 1
    return groups


def file_of(made, form):
    """{caption: the file that holds it}"""
    train, _ = load(made[form])
    if form == "shards":
        return {train.captions(item)[0]: item[0] for item in items(train)}
    return {say(k): k // EACH for k in range(N)}


@pytest.mark.parametrize("form", ["folder", "tar", "parquet"])
def test_buckets_have_one_shape_in_a_micro_batch_and_lose_nothing(form, tmp_path):
    """Three shapes: each item once an epoch of its shape, exact from any step, on any ranks."""
    sizes = [(64, 64), (96, 48), (48, 96)]
    blobs = [encoded(k, size=sizes[k % 3]) for k in range(48)]
    if form == "parquet":
        for part in range(4):
            numbers = range(12 * part, 12 * part + 12)
            write_parquet(
                tmp_path / f"set/{part}.parquet",
                image=[blobs[k] for k in numbers],
                text=[say(k) for k in numbers],
            )
    else:
        for part in range(4):
            members = [
                (f"{part}/{k:03}.{kind}", content)
                for k in range(12 * part, 12 * part + 12)
                for kind, content in (("png", blobs[k]), ("txt", say(k)))
            ]
            if form == "tar":
                write_tar(tmp_path / f"set/{part}.tar", members)
            else:
                write_files(tmp_path / "set", members)
    flags = ["--data.buckets=yes", "--model.size=64"]
    c = config(tmp_path / "set", WINDOW, *BATCH, *flags)
    train, _ = data.load(c)
    assert len({tuple(train.shape_of(item)) for item in items(train)}) == 3
    loader = data.batches(train, sets.tokenize, c, 0, 0, 1)
    drawn = set()
    for _ in range(80):
        batch = next(loader)
        assert len({number_of(caption) % 3 for caption in batch["caption"]}) == 1
        drawn |= set(batch["caption"])
    assert drawn == {train.captions(item)[0] for item in items(train)}
    whole = order(tmp_path / "set", 9, *flags)
    assert order(tmp_path / "set", 5, *flags, start=4, world=2) == whole[32:]


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_bad_item_moves_no_other(form, tmp_path):
    """The picture that stands in for a broken one is the only change."""
    blobs = [sets.noise(k) for k in range(40)]
    for name in ("good", "bad"):
        if name == "bad":
            blobs[11] = blobs[11][:2500]
        if form == "tar":
            members = [
                (f"{k:03}.{kind}", content)
                for k in range(40)
                for kind, content in (("png", blobs[k]), ("txt", say(k)))
            ]
            write_tar(tmp_path / name / "0.tar", members)
        else:
            write_parquet(tmp_path / name / "0.parquet", image=blobs, text=[say(k) for k in range(40)])
    good, bad = (order(tmp_path / name, 10, "--data.max_bad=0.2") for name in ("good", "bad"))
    moved = [(a, b) for a, b in zip(good, bad) if a != b]
    assert say(11) in good and moved and all(a == say(11) and b != a for a, b in moved)


def test_fixed_batches_are_the_same_of_every_rank(made):
    """The validation set: a fixed order that depends on nothing but the set."""
    for form in FORMS:
        c = config(made[form], WINDOW)
        val = data.load(c)[1]
        whole = [batch["caption"] for batch in data.fixed_batches(val, sets.tokenize, 100, 2, 0, 1)]
        parts = [
            [batch["caption"] for batch in data.fixed_batches(val, sets.tokenize, 100, 2, rank, 2)]
            for rank in (0, 1)
        ]
        assert whole == [parts[m % 2][m // 2] for m in range(len(whole))]
        assert sum(map(len, whole)) == len(val)
        first = [tuple(map(int, item)) for item in data.first_items(val, 3)]
        other = data.load(config(made[form], "--data.window=5", "--seed=9"))[1]
        assert first == [tuple(map(int, item)) for item in data.first_items(other, 3)]


def test_parquet_is_read_in_the_order_of_training_without_reading_it_again_and_again(tmp_path, monkeypatch):
    """An epoch reads about as many bytes as the files have, where a row group for each row would read 40
    times as many."""
    rng = np.random.default_rng(0)
    blob = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (100, 100, 3), np.uint8)).save(blob, "PNG")
    for part in range(4):
        write_parquet(
            tmp_path / f"set/{part}.parquet",
            group=40,
            image=[blob.getvalue()] * 80,
            text=[f"card {80 * part + k}" for k in range(80)],
            salt=[rng.bytes(100) for _ in range(80)],
        )
    size = sets.folder_size(tmp_path / "set")
    monkeypatch.setattr(data, "decode", lambda file, side: np.zeros((3, 32, 32), np.uint8))
    c = config(tmp_path / "set", WINDOW, "--train.batch=16", "--train.micro_batch=16")
    train = data.load(c)[0]
    loader = data.batches(train, sets.tokenize, c, 0, 0, 1)
    before = bytes_read()
    for _ in range(len(train) // 16):
        next(loader)
    assert bytes_read() - before < 4 * size


def bytes_read():
    """Of this process, from files, by read calls."""
    with open("/proc/self/io") as file:
        return int(file.readline().split()[1])

"""Nothing silently wrong: whole kinds of mistakes that a reader of pictures can make without a word, each
with its neighbours.

1 names twice in an archive, 2 stale indexes, 3 max_bad, 4 what is left out, 5 text that is cut, 6 bytes
that are not UTF-8, 7 empty columns, rows and status columns, 8 captions of a million letters; and last,
colours in every kind of picture file.
"""

import gzip
import json
import multiprocessing
import os
import re
import shutil
import struct
import tarfile
import time
import zlib
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
from PIL import Image

import data
import fresh
import sets
from sets import (
    captions,
    config,
    encoded,
    expected,
    items,
    jpeg,
    jsonl,
    load,
    noise,
    number,
    pairs,
    read,
    say,
    struct_column,
    write,
    write_files,
    write_parquet,
    write_tar,
    write_zip,
)

N = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def stopped(action):
    """The one line with which it ends the program."""
    with pytest.raises(SystemExit) as stop:
        action()
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message, message
    return message


def in_a_process(function, *args):
    """What a process of its own makes of it: a run holds open what it reads, the next run does not."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args).result(timeout=60)


# 1. Names that occur twice: the last counts, as for tar and zip themselves

SECOND = {k: [say((k + 6) % N)] for k in range(N)}


def newer(numbers, prefix="", text=True):
    """Pictures and captions that take the place of others: picture k + 6 under the name of k."""
    for k in numbers:
        yield f"{prefix}{k:04}.jpg", jpeg((k + 6) % N)
        if text:
            yield f"{prefix}{k:04}.txt", say((k + 6) % N)


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_an_archive_to_which_newer_pairs_were_appended(form, tmp_path):
    """The second picture with the second caption, each once."""
    archive(form)(tmp_path / f"set/0.{form}", [*pairs(range(N)), *newer(range(N))])
    assert read(tmp_path / "set") == expected(range(N))  # all numbers again: k's place is taken by k + 6
    train, val = load(tmp_path / "set")
    for side in (train, val):
        for item in items(side):
            named = int(re.findall(r"\d{4}", side.name(item))[-1])
            assert number(side.picture(item)) == (named + 6) % N and side.captions(item) == SECOND[named]


def archive(form):
    return write_tar if form == "tar" else write_zip


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_an_archive_whose_pictures_alone_were_updated(form, tmp_path):
    """The outdated pictures are not trained on; captions stay."""
    archive(form)(tmp_path / f"set/0.{form}", [*pairs(range(N)), *newer(range(N), text=False)])
    train, val = load(tmp_path / "set")
    for side in (train, val):
        for item in items(side):
            k = number(side.picture(item))
            assert side.captions(item) == [say((k + 6) % N)]
    assert len(train) + len(val) == N


def test_a_joined_export_with_and_without_a_leading_dot(tmp_path):
    """./0000.jpg is 0000.jpg: unpacked, one takes the other's place."""
    write_tar(tmp_path / "set/0.tar", [*pairs(range(N)), *newer(range(N), "./")])
    train, val = load(tmp_path / "set")
    assert len(train) + len(val) == N and read(tmp_path / "set") == expected(range(N))
    assert all(
        side.captions(item) == [say(number(side.picture(item)))]
        for side in (train, val)
        for item in items(side)
    )


def test_a_caption_that_was_corrected_in_a_later_json(tmp_path):
    """Last wins among captions of one kind, too; and a table in a zip that was written twice."""
    members = [(f"{k}.jpg", jpeg(k)) for k in range(N)]
    members += [
        (f"{k}.json", json.dumps({"prompt": words.format(k)}))
        for words in ("old {}", "new {}")
        for k in range(N)
    ]
    write_tar(tmp_path / "tar/0.tar", members)
    assert read(tmp_path / "tar") == {k: [f"new {k}"] for k in range(N)}


def test_the_same_name_in_two_tars_is_two_pictures(tmp_path):
    for part in (0, 1):
        write_tar(
            tmp_path / f"set/{part}.tar",
            [
                (name.replace(f"{k + 6 * part:04}", f"{k:04}"), content)
                for k in range(6)
                for name, content in pairs([k + 6 * part])
            ],
        )
    assert read(tmp_path / "set") == expected(range(N))


def test_a_last_picture_that_is_broken_is_not_the_first_again(tmp_path, capsys):
    """tar would unpack the broken one: it is counted, the outdated one is not trained on."""
    write_tar(tmp_path / "set/0.tar", [*pairs(range(N)), ("0003.jpg", b"no picture")])
    train, val = load(tmp_path / "set", "--data.max_bad=0.1")
    assert {**captions(train), **captions(val)} == expected(k for k in range(N) if k != 3)
    assert "0003" in train.summary + "".join(capsys.readouterr())


# 2. Stale indexes

WORDS = ("a {} card", "a {} card that lies on a wooden table, seen from above", "{}")


def say_short(k, words):
    return words.format(sets.NAMES[k])


def versions(folder, form):
    """Three files of one size (a tar's blocks; a parquet's, padded) with different captions; times of one
    second apart, old ones."""
    paths = []
    for version, words in enumerate(WORDS):
        path = folder / f"v{version}" / f"data.{form}"
        texts = [say_short(k, words) for k in range(9)]
        if form == "tar":
            write_tar(
                path, [member for k in range(9) for member in ((f"{k}.jpg", jpeg(k)), (f"{k}.txt", texts[k]))]
            )
        else:
            padding = ["x" * (900 - len("".join(texts)))] + ["y"] * 8
            write_parquet(path, image=[jpeg(k) for k in range(9)], text=texts, padding=padding)
        paths.append(path)
    return paths


HOW = {
    "cp -p": lambda source, target: (target.unlink(missing_ok=True), shutil.copy2(source, target)),
    "over it": lambda source, target: shutil.copy2(source, target),
    "mv": lambda source, target: os.replace(shutil.copy2(source, f"{source}.copy"), target),
    "link": lambda source, target: (target.unlink(missing_ok=True), target.symlink_to(source)),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("form", ["tar", "parquet"])
@pytest.mark.parametrize("times", ["older", "same"])
def test_another_file_of_the_same_name_and_size(form, how, times, tmp_path):
    """Each start reads the captions of the file that lies there, though size and time may be those of the
    one before."""
    paths = versions(tmp_path, form)
    if form == "tar":
        assert len({path.stat().st_size for path in paths}) == 1
    for age, path in enumerate(paths):
        stamp = 1_600_000_000 * 10**9 - (age * 10**9 if times == "older" else 0)
        os.utime(path, ns=(stamp, stamp))
    target = tmp_path / "set" / f"data.{form}"
    target.parent.mkdir()
    for version in (0, 1, 2, 0):
        HOW[how](paths[version], target)
        want = {k: [say_short(k, WORDS[version])] for k in range(9)}
        assert in_a_process(read, tmp_path / "set") == want, version


def test_a_folder_whose_captions_were_corrected(tmp_path):
    """Files and tables are read at each start, or known by more than their names."""
    write_files(tmp_path / "set", pairs(range(N)))
    assert read(tmp_path / "set") == expected(range(N))
    for k in range(N):
        before = (tmp_path / f"set/{k:04}.txt").stat()
        write(tmp_path / f"set/{k:04}.txt", say(k, "A {} CARD, NUMBER {}"))
        os.utime(tmp_path / f"set/{k:04}.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert read(tmp_path / "set") == expected(range(N), "A {} CARD, NUMBER {}")


def test_an_index_of_another_format_or_damaged_is_made_again(tmp_path):
    write_tar(tmp_path / "set/0.tar", pairs(range(N)))
    write_parquet(
        tmp_path / "other/0.parquet", image=[jpeg(k) for k in range(N)], text=[say(k) for k in range(N)]
    )
    for name in ("set", "other"):
        before = set(tmp_path.rglob("*"))
        source = tmp_path / name
        load(source)
        made = [path for path in set(tmp_path.rglob("*")) - before if path.is_file()]
        for damage in (
            lambda blob: blob[:-7],
            lambda blob: b"",
            lambda blob: b"\x93NUMPY junk" * 9,
            lambda blob: blob[:50] + b"\0" * 50 + blob[100:],
        ):
            for path in made:
                path.write_bytes(damage(path.read_bytes()))
            assert in_a_process(read, source) == expected(range(N))


# 3. max_bad


def bare(n, first=0):
    """Pictures without captions."""
    return [(f"bare {k:03}.jpg", jpeg(k % 64)) for k in range(first, first + n)]


def unreadable(n):
    return [
        member
        for k in range(n)
        for member in ((f"text {k:03}.jpg", b"I am no picture"), (f"text {k:03}.txt", b"a card"))
    ]


@pytest.mark.parametrize(
    "good, bad", [(71, 29), (1, 2), (2, 1), (6, 1), (3, 297), (97, 3), (199, 1), (12, 12)]
)
@pytest.mark.parametrize("form", ["folder", "tar"])
@pytest.mark.parametrize("what", [bare, unreadable], ids=["bare", "unreadable"])
def test_the_share_that_is_advised_works(form, what, good, bad, tmp_path):
    """And it counts what there is. Less than it does not."""
    members = [
        (f"{k:03}.{kind}", content)
        for k in range(good)
        for kind, content in (("jpg", jpeg(k % 64)), ("txt", b"a card"))
    ]
    members += what(bad)
    if form == "folder":
        write_files(tmp_path / "set", members)
    else:
        write_tar(tmp_path / "set/0.tar", members)
    exact = bad / (good + bad)
    if exact > 0.01:
        message = stopped(lambda: load(tmp_path / "set"))
        assert f"{bad} of {good + bad}" in message.replace(",", ""), message
    else:
        load(tmp_path / "set")
        message = stopped(lambda: load(tmp_path / "set", "--data.max_bad=0"))
    share = re.search(r"--data\.max_bad=([\d.]+)", message)[1].rstrip(".")
    assert exact <= float(share) <= exact + 0.011
    train, val = load(tmp_path / "set", f"--data.max_bad={share}")
    assert len(train) + len(val) == (good if good > 1 else 2)  # one picture is on both sides
    stopped(lambda: load(tmp_path / "set", f"--data.max_bad={exact * 0.9}"))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_bad_members_with_long_names_are_counted_one_by_one(form, tmp_path):
    """Names above the 100 bytes of a header, which have those 100 in common: ten of thirty."""
    deep = "/".join(["a-folder-with-a-rather-long-name"] * 4)
    members = [
        (f"{k:03}.{kind}", content)
        for k in range(20)
        for kind, content in (("jpg", jpeg(k)), ("txt", say(k)))
    ]
    members += [(f"{deep}/{k:03}.jpg", jpeg(k)) for k in range(10)]
    write_tar(tmp_path / "set/0.tar", members, form=form)
    assert "10 of 30" in stopped(lambda: load(tmp_path / "set"))
    train, val = load(tmp_path / "set", "--data.max_bad=0.34")
    assert {**captions(train), **captions(val)} == expected(range(20))


def test_members_with_long_names_are_read(tmp_path):
    deep = "/".join(["a-folder-with-a-rather-long-name"] * 4)
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT):
        write_tar(tmp_path / f"{form}/0.tar", pairs(range(N), deep + "/{:04}"), form=form)
        assert read(tmp_path / str(form)) == expected(range(N))


@pytest.mark.parametrize("form", ["folder", "tar", "zip", "parquet"])
def test_nothing_usable_advises_nothing_of_the_kind(form, tmp_path):
    members = [*bare(5), *unreadable(5)]
    if form == "folder":
        write_files(tmp_path / "set", members)
    elif form == "parquet":
        write_parquet(
            tmp_path / "set/0.parquet", image=[b"I am no picture"] * 5 + [None] * 5, text=["a card"] * 10
        )
    else:
        archive(form)(tmp_path / f"set/0.{form}", members)
    for flag in ("--data.max_bad=0.01", "--data.max_bad=1"):
        assert "max_bad=" not in stopped(lambda flag=flag: train_some(tmp_path / "set", flag))


def train_some(source, *args, images=64, start=0):
    """Batches as a run takes them. -> the numbers of the pictures, in their order"""
    c = config(source, "--train.batch=8", "--train.micro_batch=4", *args)
    train = data.load(c)[0]
    loader = data.batches(train, sets.tokenize, c, start, 0, 1)
    return train, [number(picture) for _ in range(images // 4) for picture in next(loader)["image"]]


def damaged(root, form, bad, n=40):
    """n pictures of noise, of which some are cut after their header: only decoding finds it."""
    blobs = [noise(k)[:2500] if k in bad else noise(k) for k in range(n)]
    members = [
        (f"{k:03}.{kind}", content)
        for k in range(n)
        for kind, content in (("png", blobs[k]), ("txt", say(k)))
    ]
    if form == "folder":
        write_files(root, members)
    elif form == "parquet":
        write_parquet(root / "0.parquet", image=blobs, text=[say(k) for k in range(n)])
    else:
        archive(form)(root / f"0.{form}", members)


@pytest.mark.parametrize("form", ["folder", "tar", "zip", "parquet"])
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_in_a_short_run(form, workers, tmp_path):
    """Half of forty pictures are broken: a run stops with a share that works, and one with it sees no broken
    picture."""
    damaged(tmp_path / "set", form, set(range(0, 40, 2)))
    share = "0.01"
    for _ in range(4):  # the advice need not be right at once: it knows what was met so far
        flags = [f"--data.workers={workers}", f"--data.max_bad={share}"]
        try:
            train_some(tmp_path / "set", *flags, images=160)
            break
        except SystemExit as stop:
            share = re.search(r"--data\.max_bad=([\d.]+)", str(stop))[1]
    else:
        pytest.fail(f"after four runs the advice is {share}")
    c = config(tmp_path / "set", "--train.batch=8", "--train.micro_batch=4", f"--data.max_bad={share}")
    loader = data.batches(data.load(c)[0], sets.tokenize, c, 0, 0, 1)
    drawn = {caption for _ in range(20) for caption in next(loader)["caption"]}
    assert drawn and drawn <= {say(k) for k in range(1, 40, 2)}


@pytest.mark.parametrize("form", ["folder", "tar", "parquet"])
def test_one_broken_picture_of_many_does_not_stop_a_run(form, tmp_path, capsys):
    """It is named once, however often its turn comes."""
    damaged(tmp_path / "set", form, {7}, n=200)
    train_some(tmp_path / "set", images=600)
    said = "".join(capsys.readouterr())
    assert len(re.findall(r"skipped", said)) == 1, said


# 4. Left out without a word


def used_or_named(source, used, kind, count, capsys, *args):
    """Either all of it is read, or the line names what is left out and how many."""
    train, val = load(source, *args)
    found = {**captions(train), **captions(val)}
    said = train.summary
    capsys.readouterr()
    if used - set(found):
        assert kind in said and str(len(used - set(found))) in said, said
    assert set(found) <= used
    return found


def test_dots_in_names(tmp_path):
    """In a tar as in a folder: all that follows the last dot is the suffix, unless a picture has several
    parts."""
    names = ["shot 2024.05.{:02}", "v1.0-{:02}", ".hidden.{:02}"[1:], "a.b.c.{:02}"]
    members = [
        member for part, name in enumerate(names) for member in pairs(range(3 * part, 3 * part + 3), name)
    ]
    write_files(tmp_path / "folder", members)
    write_tar(tmp_path / "tar/0.tar", members)
    write_zip(tmp_path / "zip/0.zip", members)
    assert read(tmp_path / "folder") == read(tmp_path / "tar") == read(tmp_path / "zip") == expected(range(N))


def test_parts_of_one_sample_in_a_tar(tmp_path):
    """WebDataset's key ends at the first dot: x.seg.png and x.depth.png are no pictures to train on beside
    x.jpg and x.txt."""
    members = []
    for k in range(N):
        members += [
            (f"{k}.seg.png", encoded(63)),
            (f"{k}.jpg", jpeg(k)),
            (f"{k}.depth.png", encoded(62)),
            (f"{k}.txt", say(k)),
        ]
    write_tar(tmp_path / "set/0.tar", members)
    train, val = load(tmp_path / "set", "--data.max_bad=0.7")
    assert {**captions(train), **captions(val)} == expected(range(N))


SUFFIXES = {
    "jfif": "JPEG",
    "jpe": "JPEG",
    "bmp": "BMP",
    "dib": "BMP",
    "gif": "GIF",
    "tif": "TIFF",
    "tiff": "TIFF",
    "avif": "AVIF",
    "jp2": "JPEG2000",
    "ppm": "PPM",
    "apng": "PNG",
    "JFIF": "JPEG",
    "JPG": "JPEG",
    "WebP": "WEBP",
    "tga": "TGA",
    "ico": "ICO",
}


@pytest.mark.parametrize("form", ["folder", "tar", "zip"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_other_suffixes_are_read_or_named(form, suffix, tmp_path, capsys):
    """What Pillow reads safely must be read: .jfif .gif .bmp .tif .tiff .avif."""
    other = encoded(20, SUFFIXES[suffix])
    members = [*pairs(range(3)), (f"x.{suffix}", other), ("x.txt", say(20))]
    if form == "folder":
        write_files(tmp_path / "set", members)
    else:
        archive(form)(tmp_path / f"set/0.{form}", members)
    found = used_or_named(tmp_path / "set", {0, 1, 2, 20}, suffix, 1, capsys)
    if suffix in ("jfif", "JFIF", "gif", "bmp", "tif", "tiff", "avif", "JPG", "WebP"):
        assert found == expected([0, 1, 2, 20])


@pytest.mark.parametrize("suffix", ["heic", "svg", "psd", "cr2"])
def test_pictures_that_nobody_here_can_read_are_named(suffix, tmp_path):
    write_files(
        tmp_path / "set", [*pairs(range(4)), *[(f"x{k}.{suffix}", b"what a camera writes") for k in range(3)]]
    )
    train, _ = load(tmp_path / "set")
    assert re.search(rf"\b3\b.*{suffix}|{suffix}.*\b3\b", train.summary), train.summary


def test_linked_folders_and_files(tmp_path, capsys):
    """Half of the set is in a folder that is a link; a link that leads back up ends nowhere, and must not
    hang."""
    write_files(tmp_path / "set/own", pairs(range(6)))
    write_files(tmp_path / "elsewhere", pairs(range(6, 12)))
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    used_or_named(tmp_path / "set", set(range(N)), "linked", 6, capsys)
    (tmp_path / "set/own/up").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set/own/gone").symlink_to(tmp_path / "nowhere")
    used_or_named(tmp_path / "set", set(range(N)), "linked", 6, capsys)


@pytest.mark.parametrize("form", ["folder", "tar", "zip"])
@pytest.mark.parametrize("name", [".hidden/{:03}", "own/.hidden/deep/{:03}"])
def test_hidden_folders_and_files(form, name, tmp_path):
    """Used, or counted (as files or as the folder that they are in) and named."""
    members = [*pairs(range(6), "own/{:03}"), *pairs(range(6, 12), name)]
    if form == "folder":
        write_files(tmp_path / "set", members)
    else:
        archive(form)(tmp_path / f"set/0.{form}", members)
    train, val = load(tmp_path / "set")
    found = set(captions(train)) | set(captions(val))
    assert (
        found == set(range(N)) or found == set(range(6)) and re.search(r"(1|6|12) hidden", train.summary)
    ), train.summary


def test_what_a_macintosh_leaves_in_an_archive_is_no_picture(tmp_path, capsys):
    """._a.jpg and __MACOSX/ are not bad pictures either: they count for nothing."""
    members = []
    for name, content in pairs(range(N), "set/{:03}"):
        members += [
            (name, content),
            (name.replace("set/", "set/._"), b"\0\5\x16\7 resource fork"),
            (f"__MACOSX/{name.replace('set/', 'set/._')}", b"\0\5\x16\7 resource fork"),
        ]
    write_tar(tmp_path / "tar/0.tar", members)
    write_zip(tmp_path / "zip/0.zip", members)
    write_files(tmp_path / "folder", members)
    for form in ("tar", "zip", "folder"):
        assert read(tmp_path / form, "--data.max_bad=0") == expected(range(N)), form


@pytest.mark.parametrize("stray", ["tar", "parquet", "zip", "table"])
def test_a_stray_archive_does_not_hide_the_pictures_beside_it(stray, tmp_path, capsys):
    """24 pictures and the archive of six others: all of it, or a line that says what is left out."""
    write_files(tmp_path / "set", pairs(range(24)))
    if stray == "parquet":
        write_parquet(
            tmp_path / "set/old.parquet",
            image=[jpeg(k) for k in range(40, 46)],
            text=[say(k) for k in range(40, 46)],
        )
    elif stray == "table":
        write_parquet(tmp_path / "set/old.parquet", url=["http://127.0.0.1/1"] * 6, caption=["a card"] * 6)
    else:
        archive(stray)(tmp_path / f"set/old.{stray}", pairs(range(40, 46)))
    train, val = load(tmp_path / "set")
    found = {**captions(train), **captions(val)}
    whole = set(range(24)) | (set() if stray == "table" else set(range(40, 46)))
    assert set(found) == whole or set(found) == set(range(24)) and "old." in train.summary, (
        sorted(found),
        train.summary,
    )


def test_an_archive_of_the_pictures_beside_it_gives_none_twice(tmp_path):
    """Or the line says that both are read."""
    write_files(tmp_path / "set", pairs(range(24)))
    write_tar(tmp_path / "set/old.tar", pairs(range(6)))
    train, val = load(tmp_path / "set")
    total = len(train) + len(val)
    assert (
        total == 24
        and "old.tar" in train.summary
        or total == 30
        and re.search(r"1 (tar|archive)", train.summary)
    ), train.summary


def test_tars_beside_parquet_with_pictures(tmp_path):
    write_tar(tmp_path / "set/0.tar", pairs(range(6)))
    write_parquet(
        tmp_path / "set/1.parquet", image=[jpeg(k) for k in range(6, 12)], text=[say(k) for k in range(6, 12)]
    )
    train, val = load(tmp_path / "set")
    found = {**captions(train), **captions(val)}
    assert found == expected(range(N)) or found == expected(range(6)) and "parquet" in train.summary


def test_rows_of_a_table_whose_pictures_are_not_here_are_counted(tmp_path, capsys):
    write_files(tmp_path / "set", [(f"{k}.jpg", jpeg(k)) for k in range(N)])
    write(
        tmp_path / "set/metadata.jsonl",
        jsonl({"file_name": f"{k}.jpg", "text": say(k)} for k in range(N + 3)),
    )
    try:
        said = load(tmp_path / "set")[0].summary.split(": ", 1)[1]
    except SystemExit as stop:
        said = str(stop)
    assert re.search(r"\b3\b", said), said
    train, val = load(tmp_path / "set", "--data.max_bad=0.3")
    assert {**captions(train), **captions(val)} == expected(range(N))


def test_pictures_that_a_table_does_not_name_are_counted(tmp_path, capsys):
    write_files(tmp_path / "set", [(f"{k}.jpg", jpeg(k)) for k in range(N)])
    write(tmp_path / "set/metadata.jsonl", jsonl({"file_name": f"{k}.jpg", "text": say(k)} for k in range(8)))
    try:
        train, val = load(tmp_path / "set")
        said = train.summary + "".join(capsys.readouterr())
    except SystemExit as stop:
        said = str(stop)
    assert re.search(r"\b4\b", said), said


# 5. Text that is cut

LIMIT = 9


def small_encoder(folder, limit=LIMIT, positions=64):
    """A random language model with a tokenizer of words. limit=None: the tokenizer knows none, the model's
    positions are the limit."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    words = {"<pad>": 0, "</s>": 1, "a": 2, "red": 3, "card": 4}
    inner = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {} if limit is None else {"model_max_length": limit}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", **options
    ).save_pretrained(folder)
    shape = transformers.GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=positions)
    transformers.GPT2Model(shape).save_pretrained(folder)
    return folder


SMALL = [
    "--config=debug",
    "--model.size=32",
    "--model.width=32",
    "--model.depth=4",
    "--train.batch=4",
    "--train.micro_batch=4",
    "--train.images=8",
    "--train.val_images=2",
    "--train.compile=no",
    "--train.precision=fp32",
    "--sample.steps=1",
]


def train_on_long_captions(tmp_path, words, *flags):
    """Trains a moment on pictures with captions of so many words. -> what the command said"""
    for k in range(6):
        write_files(tmp_path / "set", [(f"{k}.jpg", jpeg(k)), (f"{k}.txt", "a red card " * (words // 3))])
    run = [*SMALL, f"--data={tmp_path / 'set'}", f"--out={tmp_path / 'out'}", *flags]
    done = fresh.run("train.py", *run, cwd=tmp_path, env={"XDG_CACHE_HOME": tmp_path / "cache"})
    assert done.code == 0, done.err
    return sets.lines(done)


def draw(tmp_path, words):
    """Draws one picture of a prompt of so many words. -> what the command said"""
    prompt, flags = "a red card " * (words // 3), [f"--checkpoint={tmp_path / 'out'}", "--n=1", "--steps=1"]
    done = fresh.run("sample.py", prompt, *flags, f"--out={tmp_path / 'drawn'}", cwd=tmp_path)
    assert done.code == 0, done.err
    return sets.lines(done)


CUT = re.compile(r"(?i)\b(cut|longer than|reads? (only|at most|no more))\b")
LIMITS = {"tokenizer": (LIMIT, 64, 32), "positions": (None, LIMIT, 32)}


@pytest.mark.parametrize("kind", LIMITS)
def test_a_caption_longer_than_the_encoder_reads_is_said(kind, tmp_path):
    """With the number of tokens that are read: the tokenizer's limit or, if it has none, the model's
    positions. A prompt as a caption; and what fits is no news."""
    limit, positions, length = LIMITS[kind]
    encoder = small_encoder(tmp_path / "encoder", limit, positions)
    flags = [f"--text={encoder}", f"--text.length={length}", "--text.dim=0"]
    said = [train_on_long_captions(tmp_path, 30, *flags)]
    if kind == "tokenizer":
        said.append(draw(tmp_path, 30))
        assert not CUT.search(draw(tmp_path, 6))
    assert all(CUT.search(text) and re.search(rf"\b{LIMIT}\b", text) for text in said), said


def test_a_caption_longer_than_our_own_vocabulary_reads_is_said(tmp_path):
    small = ["--text.length=8", "--text.vocab=300", "--text.width=16", "--text.depth=1", "--text.heads=2"]
    for said in (train_on_long_captions(tmp_path, 60, *small), draw(tmp_path, 60)):
        assert CUT.search(said) and re.search(r"\b8\b", said), said
    assert not CUT.search(draw(tmp_path, 3))


# 6. Bytes that are not UTF-8

LATIN, JAPANESE = "café au lait", "赤い猫"


@pytest.mark.parametrize("form", ["folder", "tar", "zip"])
def test_captions_in_other_encodings_are_read_or_the_reason_is_said(form, tmp_path, capsys):
    odd = {
        0: LATIN.encode("cp1252"),
        1: JAPANESE.encode("shift_jis"),
        2: "a wide card".encode("utf-16"),
        3: "a wide card".encode("utf-16-le"),
        4: b"\xef\xbb\xbfwith a mark\r\n",
        5: b"",
        6: "a wide card".encode("utf-16-be"),
        7: "a wide card".encode("utf-32"),
    }
    right = {
        0: LATIN,
        1: JAPANESE,
        2: "a wide card",
        3: "a wide card",
        4: "with a mark",
        6: "a wide card",
        7: "a wide card",
    }
    members = [
        (f"{k:03}.{kind}", content)
        for k in range(16)
        for kind, content in (("jpg", jpeg(k)), ("txt", odd.get(k, say(k))))
    ]
    if form == "folder":
        write_files(tmp_path / "set", members)
    else:
        archive(form)(tmp_path / f"set/0.{form}", members)
    train, val = load(tmp_path / "set", "--data.max_bad=0.6")
    found = {**captions(train), **captions(val)}
    said = train.summary + "".join(capsys.readouterr())
    assert found.items() >= {**expected(range(8, 16)), 4: ["with a mark"]}.items() and 5 not in found
    for k, text in right.items():
        assert k not in found or found[k] == [text], found[k]
    if not set(found) >= {0, 1}:
        assert "UTF-8" in said, said


def test_tables_in_other_encodings(tmp_path, capsys):
    """One line of a .jsonl that is not UTF-8 costs one picture; a .csv in Latin-1 is read or named in one
    line."""
    write_files(tmp_path / "jsonl", [(f"{k}.jpg", jpeg(k)) for k in range(N)])
    rows = [json.dumps({"file_name": f"{k}.jpg", "text": say(k)}).encode() for k in range(N)]
    rows[3] = b'{"file_name": "3.jpg", "text": "caf\xe9"}'
    write(tmp_path / "jsonl/metadata.jsonl", b"\n".join(rows))
    train, val = load(tmp_path / "jsonl", "--data.max_bad=0.2")
    found = {**captions(train), **captions(val)}
    assert found.pop(3, ["café"]) == ["café"] and found == expected(k for k in range(N) if k != 3)
    write_files(tmp_path / "csv", [(f"{k}.jpg", jpeg(k)) for k in range(N)])
    write(
        tmp_path / "csv/metadata.csv",
        "\n".join(["file_name,text", *[f"{k}.jpg,caf\xe9 {k}" for k in range(N)]]).encode("latin-1"),
    )
    try:
        assert read(tmp_path / "csv") == {k: [f"café {k}"] for k in range(N)}
    except SystemExit as stop:
        assert str(stop).startswith("error: ") and "\n" not in str(stop)


def test_a_table_with_a_mark_other_line_ends_and_more_columns(tmp_path):
    write_files(tmp_path / "set", [(f"{k}.jpg", jpeg(k)) for k in range(N)])
    rows = [
        json.dumps(
            {"file_name": f"{k}.jpg", "text": say(k), "width": 48, "tags": ["x"], "é": None},
            ensure_ascii=False,
        )
        for k in range(N)
    ]
    write(tmp_path / "set/metadata.jsonl", b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n\r\n")
    assert read(tmp_path / "set") == expected(range(N))
    write_files(tmp_path / "csv", [(f"{k}.jpg", jpeg(k)) for k in range(N)])
    quoted = [f'{k}.jpg,"{say(k)}, ""so called"",\r\nand more",7' for k in range(N)]
    write(
        tmp_path / "csv/metadata.csv", b"\xef\xbb\xbf" + "\r\n".join(["file_name,text,id", *quoted]).encode()
    )
    assert read(tmp_path / "csv") == {k: [f'{say(k)}, "so called", and more'] for k in range(N)}


def test_text_in_parquet_that_is_not_utf8_costs_its_row(tmp_path, capsys):
    import pyarrow as arrow

    blobs = [b"caf\xe9" if k == 3 else say(k).encode() for k in range(N)]
    binary = arrow.array(blobs, arrow.binary())
    text = arrow.Array.from_buffers(arrow.string(), N, binary.buffers())
    write_parquet(tmp_path / "set/0.parquet", group=4, image=[jpeg(k) for k in range(N)], text=text)
    _, seen = train_some(tmp_path / "set", "--data.max_bad=0.2", images=48)
    assert set(seen) <= set(range(N)) and len(set(seen)) >= 10
    for side in load(tmp_path / "set", "--data.max_bad=0.2"):
        for item in items(side):
            k = number(side.picture(item))
            assert k == 3 or side.captions(item) == [say(k)]


ODD = "caf\xe9".encode("latin-1")


def odd_names(root):
    """A folder, files and a linked folder whose names are bytes that no UTF-8 is."""
    folder = os.path.join(os.fsencode(root), ODD)
    os.makedirs(folder)
    for k in range(N):
        for kind, content in (("jpg", jpeg(k)), ("txt", say(k).encode())):
            with open(os.path.join(folder, b"%b %03d.%b" % (ODD, k, kind.encode())), "wb") as file:
                file.write(content)
    with open(os.path.join(folder, b"bad " + ODD + b".jpg"), "wb") as file:
        file.write(b"I am no picture")
    return folder


def test_names_that_are_not_utf8(tmp_path):
    """Of the folder that is given, of one below it, of files: found, printed and trained on to the end."""
    folder = odd_names(tmp_path / "set")
    for source in (folder, os.fsencode(tmp_path / "set")):
        train, val = load(source, "--data.max_bad=0.1")
        assert {**captions(train), **captions(val)} == expected(range(N))
    flags = [
        *SMALL,
        f"--data={os.fsdecode(folder)}",
        "--data.max_bad=0.1",
        f"--out={tmp_path / 'out'}",
        "--text.vocab=300",
    ]
    environment = {"XDG_CACHE_HOME": tmp_path / "cache", "PYTHONIOENCODING": "utf-8:strict"}
    for script, more in (("train.py", flags), ("data.py", flags[:2] + flags[-4:-2])):
        done = fresh.run(script, *more, cwd=tmp_path, env=environment)
        assert done.code == 0 and "Traceback" not in done.err, done.err


@pytest.mark.parametrize("form", ["tar", "zip"])
def test_members_whose_names_are_not_utf8(form, tmp_path, capsys):
    """Each has a name of its own, though what can be shown of them may be the same; a bad one is printed."""
    (tmp_path / "set").mkdir()
    if form == "tar":
        members = [
            (f"caf\xe9 {k:03}{end}", content)
            for k in range(N)
            for end, content in ((".jpg", jpeg(k)), (".txt", say(k).encode()))
        ]
        with tarfile.open(tmp_path / "set/0.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
            for name, content in [*members, ("bad caf\xe9.jpg", b"I am no picture")]:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, sets.io.BytesIO(content))
    else:
        write_zip(
            tmp_path / "set/0.zip", [*pairs(range(N), "cafE {:03}"), ("bad cafE.jpg", b"I am no picture")]
        )
        blob = (tmp_path / "set/0.zip").read_bytes()
        (tmp_path / "set/0.zip").write_bytes(
            blob.replace(b"cafE", ODD)
        )  # in the entries and in the directory
    train, val = load(tmp_path / "set", "--data.max_bad=0.1")
    assert {**captions(train), **captions(val)} == expected(range(N))
    "".join(capsys.readouterr()).encode()


def test_names_in_a_table_that_are_not_ascii(tmp_path):
    """Composed and decomposed letters, spaces, percent signs, quotes and new lines in names."""
    names = ["é.jpg", "e\u0301.jpg", "a b.jpg", "100%25.jpg", "quo'te\".jpg", "#1.jpg", "日本.jpg", "a,b.jpg"]
    write_files(tmp_path / "set", [(name, jpeg(k)) for k, name in enumerate(names)])
    write(
        tmp_path / "set/metadata.jsonl",
        jsonl({"file_name": name, "text": say(k)} for k, name in enumerate(names)),
    )
    assert read(tmp_path / "set") == expected(range(len(names)))


# 7. Empty columns, null rows, status columns


def test_an_empty_caption_column_beside_a_full_one(tmp_path):
    """Null, empty or blank throughout: the next is taken, in parquet, tars and tables."""
    import pyarrow as arrow

    for name, empty in {
        "null": arrow.array([None] * N, arrow.string()),
        "no type": arrow.nulls(N),
        "blank": arrow.array(["", " "] * 6),
    }.items():
        write_parquet(
            tmp_path / name / "0.parquet",
            image=[jpeg(k) for k in range(N)],
            caption=empty,
            text=[say(k) for k in range(N)],
        )
        assert read(tmp_path / name) == expected(range(N)), name
    for name, empty in {"tar null": None, "tar blank": "  "}.items():
        members = [
            (f"{k}.{kind}", content)
            for k in range(N)
            for kind, content in (("jpg", jpeg(k)), ("json", json.dumps({"caption": empty, "text": say(k)})))
        ]
        write_tar(tmp_path / name / "0.tar", members)
        assert read(tmp_path / name) == expected(range(N)), name
    write_files(tmp_path / "table", [(f"{k}.jpg", jpeg(k)) for k in range(N)])
    write(
        tmp_path / "table/metadata.csv",
        "\n".join(["file_name,caption,text", *[f'{k}.jpg,,"{say(k)}"' for k in range(N)]]),
    )
    assert read(tmp_path / "table") == expected(range(N))


def test_an_empty_column_in_the_first_file_or_first_rows_only(tmp_path):
    """The choice is not made by the first rows alone: no picture is lost to it, or all are read from the
    other column."""
    empty = [None] * 60
    full = [say(k) for k in range(60)]
    late = [None if k < 40 else say(k, "late {} {}") for k in range(60)]
    for name, first in {"all of the first file": empty, "two thirds": late}.items():
        write_parquet(
            tmp_path / name / "0.parquet",
            group=20,
            image=[jpeg(k) for k in range(60)],
            caption=first,
            prompt=full,
        )
        write_parquet(
            tmp_path / name / "1.parquet",
            image=[jpeg(k) for k in range(60, 64)],
            caption=[say(k) for k in range(60, 64)],
            prompt=[say(k) for k in range(60, 64)],
        )
        _, seen = train_some(tmp_path / name, images=128)
        found = {}
        for side in load(tmp_path / name):
            found |= captions(side)
        assert len(set(seen)) >= 55 and set(found) == set(range(64)), name
        assert all(said[0] in (say(k), say(k, "late {} {}")) for k, said in found.items())


@pytest.mark.parametrize("column", ["caption", "image"])
def test_null_rows(column, tmp_path, capsys):
    """A row without a caption or a picture is a bad item: counted, never drawn, and another stands in."""
    import pyarrow as arrow

    images = [None if column == "image" and k in (3, 7) else jpeg(k) for k in range(N)]
    texts = [
        None if column == "caption" and k == 3 else "  " if column == "caption" and k == 7 else say(k)
        for k in range(N)
    ]
    write_parquet(
        tmp_path / "set/0.parquet", group=4, image=arrow.array(images, arrow.binary()), caption=texts
    )
    stopped(lambda: train_some(tmp_path / "set", images=96))
    _, seen = train_some(tmp_path / "set", "--data.max_bad=0.3", images=96)
    assert not {3, 7} & set(seen) and len(set(seen)) >= 8
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    structs = [None if blob is None else {"bytes": blob, "path": None} for blob in images]
    write_parquet(tmp_path / "struct/0.parquet", group=4, image=arrow.array(structs, kind), caption=texts)
    assert not {3, 7} & set(train_some(tmp_path / "struct", "--data.max_bad=0.3", images=96)[1])


def test_a_picture_by_its_path_in_a_struct(tmp_path):
    """struct<bytes, path> with a path and no bytes: the file beside it, or one line."""
    import pyarrow as arrow

    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    write_files(tmp_path / "set", [(f"images/{k}.jpg", jpeg(k)) for k in range(N)])
    column = arrow.array([{"bytes": None, "path": f"images/{k}.jpg"} for k in range(N)], kind)
    write_parquet(tmp_path / "set/0.parquet", image=column, text=[say(k) for k in range(N)])
    try:
        assert read(tmp_path / "set") == expected(range(N))
    except SystemExit as stop:
        assert str(stop).startswith("error: ") and "\n" not in str(stop)


def test_captions_whose_status_says_failed(tmp_path):
    """qwen3_status: what a model's failure left in its column is not a caption; the next column's is, or the
    row is counted."""
    status = ["failed" if k % 4 == 1 else "success" for k in range(N)]
    texts = ["Error: the request timed out" if k % 4 == 1 else say(k) for k in range(N)]
    write_parquet(
        tmp_path / "set/train_000.parquet",
        image=struct_column(jpeg(k) for k in range(N)),
        prompt=[say(k, "{} {} --v 6") for k in range(N)],
        llava=[say(k, "llava {} {}") for k in range(N)],
        llava_status=["success"] * N,
        qwen3=texts,
        qwen3_status=status,
    )
    c = config(tmp_path / "set", "--data.max_bad=0.5", "--train.batch=8", "--train.micro_batch=8")
    loader = data.batches(data.load(c)[0], sets.tokenize, c, 0, 0, 1)
    drawn = {caption for _ in range(8) for caption in next(loader)["caption"]}
    assert len(drawn) >= 5 and not any("Error" in caption for caption in drawn)


def test_rows_of_img2dataset_whose_status_says_failed(tmp_path):
    """Its parquet output keeps rows without a picture: counted as bad, or left out and named."""
    import pyarrow as arrow

    blobs = arrow.array([None if k % 6 == 5 else jpeg(k) for k in range(N)], arrow.binary())
    status = ["failed_to_download" if k % 6 == 5 else "success" for k in range(N)]
    write_parquet(
        tmp_path / "set/00000.parquet",
        jpg=blobs,
        caption=[say(k) for k in range(N)],
        key=[f"{k:09}" for k in range(N)],
        status=status,
        error_message=["HTTP 404" if k % 6 == 5 else None for k in range(N)],
        url=["http://127.0.0.1"] * N,
    )
    _, seen = train_some(tmp_path / "set", "--data.max_bad=0.3", images=96)
    assert not {5, 11} & set(seen) and len(set(seen)) >= 8


def test_several_captions_of_a_picture_in_a_table(tmp_path):
    """A list of captions: all of them; empty ones among them are none."""
    write_files(tmp_path / "set", [(f"{k}.jpg", jpeg(k)) for k in range(N)])
    write(
        tmp_path / "set/metadata.jsonl",
        jsonl({"file_name": f"{k}.jpg", "text": [say(k), "", "a card", None]} for k in range(N)),
    )
    assert read(tmp_path / "set") == {k: [say(k), "a card"] for k in range(N)}
    write_parquet(
        tmp_path / "parquet/0.parquet",
        image=[jpeg(k) for k in range(N)],
        captions=[[say(k), "", "a card", None] for k in range(N)],
    )
    assert read(tmp_path / "parquet") == {k: [say(k), "a card"] for k in range(N)}


def test_a_key_of_another_type_in_a_json(tmp_path, capsys):
    """A number, a list of numbers, an object where a caption should be: a bad picture, no crash."""
    members = []
    for k in range(N):
        value = {3: 7, 4: {"a": "b"}, 5: [1, 2], 6: True}.get(k, say(k))
        members += [(f"{k}.jpg", jpeg(k)), (f"{k}.json", json.dumps({"caption": value}))]
    members += [
        ("20.jpg", jpeg(20)),
        ("20.json", "[1, 2"),
        ("21.jpg", jpeg(21)),
        ("21.json", '"a text"'),
        ("22.jpg", jpeg(22)),
        ("22.json", "[]"),
    ]
    for form in ("tar", "folder"):
        write_tar(tmp_path / form / "0.tar", members) if form == "tar" else write_files(
            tmp_path / form, members
        )
        train, val = load(tmp_path / form, "--data.max_bad=0.6")
        found = {**captions(train), **captions(val)}
        assert found.items() >= expected(k for k in range(N) if k not in (3, 4, 5, 6)).items()
        assert not {4, 5, 6, 20, 22} & set(found)


# 8. A million letters

MILLION = 1_000_000
LONG = {
    "a word": "a" * MILLION,
    "spaces": "a" + " " * MILLION + "b",
    "letters": "".join(chr(97 + k * k % 23) for k in range(MILLION)),
    "lines": "a\n" * (MILLION // 2),
    "commas": "," * MILLION,
}


@pytest.mark.parametrize("kind", LONG)
def test_a_caption_of_a_million_letters(kind, tmp_path):
    """Read from a folder, a tar and a parquet in seconds."""
    text = LONG[kind]
    members = [
        (f"{k}.{end}", content)
        for k in range(6)
        for end, content in (("jpg", jpeg(k)), ("txt", text if k == 2 else say(k)))
    ]
    write_files(tmp_path / "folder", members)
    write_tar(tmp_path / "tar/0.tar", members)
    write_parquet(
        tmp_path / "parquet/0.parquet",
        image=[jpeg(k) for k in range(6)],
        text=[text if k == 2 else say(k) for k in range(6)],
    )
    begin = time.monotonic()
    for form in ("folder", "tar", "parquet"):
        train, val = load(tmp_path / form)
        assert len(train) + len(val) == 6
        assert all(side.captions(item) for side in (train, val) for item in items(side))
    assert time.monotonic() - begin < 15


@pytest.mark.parametrize("kind", ["a word", "spaces", "commas"])
def test_a_run_with_a_caption_of_a_million_letters(kind, tmp_path):
    """Our own vocabulary is trained on it, and a text of its length drawn from: no hang, and no screen full
    of it."""
    write_files(tmp_path / "set", [*pairs(range(6)), ("x.jpg", jpeg(9)), ("x.txt", LONG[kind])])
    flags = [*SMALL, f"--data={tmp_path / 'set'}", f"--out={tmp_path / 'out'}", "--text.vocab=300"]
    done = fresh.run("train.py", *flags, cwd=tmp_path, env={"XDG_CACHE_HOME": tmp_path / "cache"}, timeout=40)
    assert done.code == 0, done.err
    assert max(map(len, sets.lines(done).splitlines())) < 5000


# Colours: what a picture file says is what arrives

RED, BLUE, WHITE = (250, 10, 20), (5, 40, 240), (255,) * 3
TURNED = {
    1: None,
    2: 0,
    3: 3,
    4: 1,
    5: 5,
    6: 2,
    7: 6,
    8: 4,
}  # EXIF orientation -> Pillow's transposition that undoes it


def halves(mode, left, right, size=80):
    image = Image.new(mode, (size, size), left)
    image.paste(right, (size // 2, 0, size, size))
    return image


def saved(image, kind="PNG", **options):
    file = sets.io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def deep_png(colour_type, left, right):
    """A PNG of 16 bits a channel, which Pillow does not write."""
    pixel = [struct.pack(f">{len(side)}H", *(value * 257 for value in side)) for side in (left, right)]
    line = b"\0" + pixel[0] * 40 + pixel[1] * 40
    header = struct.pack(">IIBBBBB", 80, 80, 16, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(line * 80))
        + chunk(b"IEND", b"")
    )


def picture_files():
    """-> {name: (bytes, colour of the left half, of the right half)}"""
    rgb, black = halves("RGB", RED, BLUE), Image.new("RGB", (80, 80))
    fine = {"quality": 98, "subsampling": 0}
    sideways = rgb.transpose(2)
    out = {}
    for orientation, how in TURNED.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        out[f"exif{orientation}.jpg"] = (
            saved(rgb if how is None else rgb.transpose(how), "JPEG", exif=exif, **fine),
            RED,
            BLUE,
        )
    exif = Image.Exif()
    exif[0x0112] = 6
    out["exif.png"] = saved(sideways, exif=exif), RED, BLUE
    out["exif.webp"] = saved(sideways, "WEBP", exif=exif, lossless=True), RED, BLUE
    early = saved(sideways, exif=exif)
    at = early.index(b"eXIf") - 4
    piece = early[at : at + 12 + struct.unpack(">I", early[at : at + 4])[0]]
    rest = early.replace(piece, b"")
    out["exif_after_the_pixels.png"] = rest[:-12] + piece + rest[-12:], RED, BLUE
    xmp = (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        b'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description '
        b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    )
    out["xmp.webp"] = saved(sideways, "WEBP", xmp=xmp, lossless=True), RED, BLUE
    out["xmp.jpg"] = saved(sideways, "JPEG", xmp=xmp, **fine), RED, BLUE
    out["cmyk.jpg"] = (
        saved(halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "JPEG", quality=98),
        (255, 0, 0),
        (0, 0, 255),
    )
    grey = np.where(np.arange(80) < 40, 30 * 257, 220 * 257).astype(np.uint16)[None].repeat(80, 0)
    out["grey16.png"] = saved(Image.fromarray(grey)), (30,) * 3, (220,) * 3
    out["rgb16.png"] = deep_png(2, RED, BLUE), RED, BLUE
    out["rgba16.png"] = deep_png(6, (*RED, 255), (*BLUE, 0)), RED, WHITE
    out["grey_alpha16.png"] = deep_png(4, (30, 255), (99, 0)), (30,) * 3, WHITE
    palette = rgb.quantize(2)
    right = palette.getpixel((75, 40))
    out["palette.png"] = saved(palette, transparency=bytes([255, 255])), RED, BLUE
    half = bytes(128 if index == right else 255 for index in range(2))
    out["palette_half.png"] = (
        saved(palette, transparency=half),
        RED,
        tuple(round(x * 128 / 255 + 127) for x in BLUE),
    )
    out["rgba.png"] = saved(halves("RGBA", (*RED, 255), (0, 255, 0, 0))), RED, WHITE
    out["rgb_transparent.png"] = saved(rgb, transparency=BLUE), RED, WHITE
    out["grey_alpha.png"] = saved(halves("LA", (30, 255), (99, 0))), (30,) * 3, WHITE
    out["one_bit.png"] = saved(halves("1", 0, 1)), (0,) * 3, WHITE
    out["animated.webp"] = (
        saved(rgb, "WEBP", save_all=True, append_images=[black], lossless=True, duration=50),
        RED,
        BLUE,
    )
    out["animated.png"] = saved(rgb, save_all=True, append_images=[black]), RED, BLUE
    out["animated.gif"] = saved(rgb, "GIF", save_all=True, append_images=[black]), RED, BLUE
    out["is_gif.png"] = saved(rgb, "GIF", save_all=True, append_images=[black]), RED, BLUE
    out["is_jpeg.png"] = saved(rgb, "JPEG", **fine), RED, BLUE
    out["is_webp.jpg"] = saved(rgb, "WEBP", lossless=True), RED, BLUE
    out["is_mpo.jpg"] = saved(rgb, "MPO", save_all=True, append_images=[black], **fine), RED, BLUE
    out["more_after_the_end.jpg"] = saved(rgb, "JPEG", **fine) + b"\0" * 2000, RED, BLUE
    out["plain.bmp"] = saved(rgb, "BMP"), RED, BLUE
    out["plain.tif"] = saved(rgb, "TIFF"), RED, BLUE
    out["lzw.tiff"] = saved(rgb, "TIFF", compression="tiff_lzw"), RED, BLUE
    out["cmyk.tif"] = (
        saved(halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "TIFF"),
        (255, 0, 0),
        (0, 0, 255),
    )
    out["plain.avif"] = saved(rgb, "AVIF", quality=95), RED, BLUE
    return out


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_colours_of_every_kind_of_picture(form, tmp_path):
    files = picture_files()
    members = [
        member
        for k, (name, (blob, *_)) in enumerate(files.items())
        for member in ((f"{k}/{name}", blob), (f"{k}/{name.rsplit('.', 1)[0]}.txt", name))
    ]
    if form == "folder":
        write_files(tmp_path / "set", members)
    else:
        write_tar(tmp_path / "set/0.tar", members)
    wrong, seen = [], set()
    for side in load(tmp_path / "set", "--model.size=80"):
        for item in items(side):
            name = side.captions(item)[0]
            picture = side.picture(item).astype(int)
            seen.add(name)
            for half, want in (
                (picture[:, 8:72, 4:36], files[name][1]),
                (picture[:, 8:72, 44:76], files[name][2]),
            ):
                off = np.abs(half - np.array(want).reshape(3, 1, 1)).max()
                if off > 10:
                    wrong.append((name, int(off)))
    assert not wrong and seen == set(files)


def test_a_picture_that_would_fill_the_memory_is_not_opened(tmp_path):
    """60,000 pixels a side in a hundred bytes, in each kind of source."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )
    members = [
        *pairs(range(4)),
        ("bomb.png", bomb),
        ("bomb.txt", "a bomb"),
        ("zip.png", gzip.compress(b"x")),
        ("zip.txt", "none"),
    ]
    write_files(tmp_path / "folder", members)
    write_tar(tmp_path / "tar/0.tar", members)
    write_zip(tmp_path / "zip/0.zip", members)
    write_parquet(
        tmp_path / "parquet/0.parquet",
        image=[*[jpeg(k) for k in range(4)], bomb, b"x"],
        text=[say(k) for k in range(6)],
    )
    for form in ("folder", "tar", "zip", "parquet"):
        _, seen = train_some(tmp_path / form, "--data.max_bad=0.6", images=48)
        assert set(seen) <= set(range(4))


def test_the_smallest_and_the_longest_pictures(tmp_path):
    """One pixel, and 2,000 times as wide as high: cut to the square, not a crash."""
    write_files(
        tmp_path / "set",
        [
            *pairs(range(4)),
            ("one.png", encoded(5, size=(1, 1))),
            ("one.txt", say(5)),
            ("line.png", encoded(6, size=(2000, 1))),
            ("line.txt", say(6)),
        ],
    )
    for flag in ("--data.buckets=no", "--data.buckets=yes"):
        assert read(tmp_path / "set", flag) == expected([0, 1, 2, 3, 5, 6])

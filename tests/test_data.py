import itertools, json, struct, subprocess, sys, zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import configs, data


def config(*args):
    return configs.parse(["--config=debug", *args])


def tokenize(captions):
    ids = torch.zeros(len(captions), 80, dtype=torch.int64)
    for row, caption in zip(ids, captions):
        row[:len(caption)] = torch.tensor(list(caption.encode()))
    return ids, ids > 0


def names(dataset):
    return [dataset.name(item) for item in dataset.items()]


def captions(dataset):
    return [dataset.captions(item) for item in dataset.items()]


def bad(dataset):
    """{name: why} of what cannot be used."""
    return dict(dataset.bad.known.values())


@pytest.fixture(scope="module")
def food():
    return data.load(config("--data.subset=food", "--model.size=64"))


@pytest.mark.parametrize("args, words", [
    (["--data.source=no/such/folder"], "no/such/folder"), (["--data.source=a:0.5,b"], "weight")])
def test_mistakes_are_one_line(args, words):
    with pytest.raises(SystemExit) as error:
        data.load(config(*args))
    assert words in str(error.value) and "\n" not in str(error.value)


# Batches

def run(dataset, c, steps, start=0, world=1):
    """The micro-batches of `steps` steps in the order of the run, whatever the ranks."""
    loaders = [data.batches(dataset, tokenize, c, start, rank, world) for rank in range(world)]
    out = []
    for _ in range(steps):
        for m in range(c.train.batch // c.train.micro_batch):
            out.append(next(loaders[m % world]))
    return out


def same(a, b):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        assert x.keys() == y.keys() == {"image", "ids", "mask", "caption"} and x["caption"] == y["caption"]
        assert all(torch.equal(x[k], y[k]) for k in ("image", "ids", "mask"))


def test_batches_are_what_the_definition_says(food):
    train, n = food[0], len(food[0])
    c = config("--train.batch=12", "--train.micro_batch=4", "--seed=3")
    start = n // 12 - 1                                                         # crosses into the second epoch
    for m, batch in enumerate(run(train, c, 3, start)):
        assert batch["image"].shape == (4, 3, 64, 64) and batch["image"].dtype == torch.uint8
        assert batch["ids"].dtype == torch.int64 and batch["mask"].dtype == torch.bool
        for i, caption in enumerate(batch["caption"]):
            p = start * 12 + m * 4 + i
            item = train.items()[data.permutation(n, 3, p // n)[p % n]]
            texts = train.captions(item)
            assert caption == texts[data.digest(3, p) % len(texts)]
            assert np.array_equal(batch["image"][i].numpy(), train.emoji.render(*train.emoji.pairs[item[1]]))
            assert bytes(batch["ids"][i][batch["mask"][i]].tolist()).decode() == caption


@pytest.mark.parametrize("workers", [0, 2])
def test_any_number_of_ranks_and_workers(food, workers):
    c = config("--train.batch=32", "--train.micro_batch=8")
    whole = run(food[0], c, 6)
    c = replace(c, data=replace(c.data, workers=workers))
    for world in (1, 2, 4) if workers == 0 else (1, 2):
        same(whole, run(food[0], c, 6, world=world))
        same(whole[12:], run(food[0], c, 3, start=3, world=world))
    assert [b["caption"] for b in run(food[0], replace(c, seed=1), 1)] != [b["caption"] for b in whole[:4]]


def test_every_item_once_an_epoch_and_both_captions_in_time(food):
    val = food[1]
    n = len(val)
    c = config(f"--train.batch={n}", f"--train.micro_batch={n}")
    seen, found, every = [], set(), captions(val)
    for batch in itertools.islice(data.batches(val, tokenize, c), 12):
        found.update(batch["caption"])
        where = [next(i for i, t in enumerate(every) if caption in t) for caption in batch["caption"]]
        assert sorted(where) == list(range(n))
        seen.append(tuple(where))
    assert len(set(seen)) == 12                                                 # another order in each
    assert len(found) > 0.9 * sum(map(len, every))
    orders = np.array([data.permutation(n, 0, e) for e in range(400)])
    assert (np.sort(orders) == np.arange(n)).all() and np.abs(orders.mean(0) - (n - 1) / 2).max() < n * 0.08


def test_choices_are_even(food):
    n = 4000
    counts = np.bincount([data.digest(0, p) % 4 for p in range(n)], minlength=4)
    assert np.abs(counts - n / 4).max() < 5 * np.sqrt(n * 3 / 16)


def test_batches_leave_the_global_generator_alone(food):
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    run(food[0], config(), 1)
    assert torch.equal(torch.rand(3), want)


def test_fixed_batches(food):
    val = food[1]
    n = len(val)
    whole = list(data.fixed_batches(val, tokenize, 10_000, 8))
    found = [caption for batch in whole for caption in batch["caption"]]
    first = [t[0] for t in captions(val)]
    assert sorted(found) == sorted(first) and len(whole[-1]["caption"]) == (n % 8 or 8)
    assert found != first
    parts = [list(data.fixed_batches(val, tokenize, 10_000, 8, rank, 3)) for rank in range(3)]
    same(whole, [parts[m % 3][m // 3] for m in range(len(whole))])
    assert sum(len(part) for part in parts) == len(whole)
    assert [len(b["caption"]) for b in data.fixed_batches(val, tokenize, 11, 4)] == [4, 4, 3]


# Folders

def picture(path, color=(200, 30, 60), size=(40, 30), caption="a thing", **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **kwargs)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def load(root, *args):
    return data.load(config(f"--data.source={root}", *args))


def bomb(path, side):
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) +
                     chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))
    path.with_suffix(".txt").write_text("a bomb")


def test_folder(tmp_path):
    for k in range(30):
        name = f"{k}.{('png', 'jpg', 'jpeg', 'webp')[k % 4]}"
        picture(tmp_path / ("deep/er" if k % 2 else ".") / name, caption=f"one {k}\n\n two {k} \n")
    train, val = load(tmp_path)
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*") if p.suffix != ".txt")
    assert sorted(names(train) + names(val)) == files and len(val) >= 1
    item = train.items()[0]
    image, caption = train.get(item, 1)
    k = Path(train.name(item)).stem
    assert image.shape == (3, 32, 32) and image.dtype == np.uint8
    assert caption == f"two {k}" and train.captions(item) == [f"one {k}", f"two {k}"]
    c = config(f"--data.source={tmp_path}", "--train.batch=8", "--train.micro_batch=4")
    whole = run(train, c, 8)
    same(whole, run(train, replace(c, data=replace(c.data, workers=2)), 8, world=2))
    picture(tmp_path / "zzz.png")                                               # a new image moves no other to the other side
    more = load(tmp_path)[1]
    assert set(names(more)) - {"zzz.png"} == set(names(val)) or len(val) == 1


def test_validation_share_of_a_folder(tmp_path):
    rows = [{"file_name": f"{k}.png", "text": f"thing {k}"} for k in range(400)]
    picture(tmp_path / "0.png", caption=None)
    for k in range(1, 400):
        (tmp_path / f"{k}.png").symlink_to(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    train, val = load(tmp_path)
    assert len(train) + len(val) == 400 and not set(names(train)) & set(names(val)) and 8 <= len(val) <= 34
    assert names(load(tmp_path, "--seed=5")[1]) == names(val)


def test_bad_images_are_skipped_counted_and_named(tmp_path, capsys):
    for k in range(10):
        picture(tmp_path / f"good{k}.png", caption=f"good {k}")
    picture(tmp_path / "bare.png", caption=None)
    picture(tmp_path / "blank.png", caption=" \n\n")
    picture(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "text.png").write_text("I am no image")
    (tmp_path / "text.txt").write_text("a caption")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "empty.txt").write_text("a caption")
    bomb(tmp_path / "bomb.png", 60_000)
    bomb(tmp_path / "large.png", 10_500)                                        # of which Pillow alone would only warn
    train, val = load(tmp_path, "--data.max_bad=0.5")
    early = {"large.png", "bare.png", "blank.png", "latin.png", "text.png", "empty.jpg", "bomb.png"}
    why = bad(train)
    assert set(why) == early and "pixels" in why["bomb.png"] and "caption" in why["bare.png"]
    err = capsys.readouterr().err
    assert all(err.count(name) == 1 for name in early) and str(tmp_path) not in err and len(train) + len(val) == 10
    with pytest.raises(SystemExit, match=r"7 of 17 pictures .* --data.max_bad=0.42") as error:
        load(tmp_path, "--data.max_bad=0.41")
    assert "\n" not in str(error.value)
    load(tmp_path, "--data.max_bad=0.42")


def noise(path, caption):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)).save(path)
    path.with_suffix(".txt").write_text(caption)


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_found_while_decoding(tmp_path, capsys, workers):
    for k in range(12):
        noise(tmp_path / f"{k:02}.png", f"noise {k}")
    train, val = load(tmp_path)
    three, four, five = train.items()[3:6]
    broken = train.name(three), train.name(four)
    for name in broken:                                                         # the header stays in order
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
    c = config(f"--data.source={tmp_path}", "--data.max_bad=0.5", f"--data.workers={workers}", "--train.batch=4",
               "--train.micro_batch=4")
    train, _ = data.load(c)
    assert not bad(train)
    for batch in run(train, c, 9):                                              # three epochs
        assert not {*train.captions(three), *train.captions(four)} & set(batch["caption"])
    err = capsys.readouterr().err
    assert set(bad(train)) == set(broken) and all(err.count(name) == 1 for name in broken)
    assert train.get(three, 0)[1] == train.get(four, 0)[1] == train.captions(five)[0]     # the next one stands in
    one = data.Bad(replace(c, data=replace(c.data, max_bad=0.01)))              # one rank of many, which meets little of a large set
    one.total = 1_000_000
    one.note({f"neighbour {k}": ("x.png", "cut") for k in range(700)}, asked=32, hits=1)    # names of those that did not stand in, either
    for k in range(9):
        one.note({k: (f"{k}.png", "cut")}, asked=100, hits=1)
    with pytest.raises(SystemExit, match=r"11 of 1032 pictures .* --data.max_bad=0.02"):
        one.note({"x": ("x.png", "cut")}, asked=100, hits=1)
    strict = replace(c, data=replace(c.data, max_bad=0.1))
    with pytest.raises(SystemExit, match="--data.max_bad"):
        run(data.load(strict)[0], strict, 9)


def test_metadata(tmp_path):
    for k in range(6):
        picture(tmp_path / f"sub/{k}.png", caption=None)
    picture(tmp_path.parent / "outside.png", caption=None)
    row = lambda name, text: json.dumps({"file_name": name, "text": text, "more": 1})
    lines = [row(f"sub/{k}.png", f"number\n{k} \u2028") for k in range(6)] + [
        row("../outside.png", "x"), row(str(tmp_path.parent / "outside.png"), "x"), "{not json", json.dumps(["a"]),
        json.dumps({"file_name": "sub/0.png"}), row("sub/9.png", "gone"), row("sub/0.png", " "),
        row("sub/0.png", "\ud800"), '"\xff"', "", row(3, "x")]
    (tmp_path / "metadata.jsonl").write_bytes("\n".join(lines).encode("latin-1"))
    train, val = load(tmp_path, "--data.max_bad=1")
    assert sorted(names(train) + names(val)) == [f"sub/{k}.png" for k in range(6)]
    assert sorted(t[0] for t in captions(train) + captions(val)) == [f"number {k}" for k in range(6)]
    why = bad(train)
    assert set(why) == {"../outside.png", (tmp_path.parent / "outside.png").as_posix(), "sub/9.png", "3",
                        *(f"metadata.jsonl: row {k}" for k in (9, 10, 15))}
    assert "no such picture" in why["../outside.png"] and "no such picture" in why["sub/9.png"]


def test_empty_folder_and_nothing_usable(tmp_path):
    with pytest.raises(SystemExit, match="no pictures"):
        load(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match="no pictures"):
        load(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(SystemExit, match="no pictures"):
        load(tmp_path)


def test_one_image_is_both(tmp_path):
    picture(tmp_path / "a.png")
    train, val = load(tmp_path)
    assert names(train) == names(val) == ["a.png"]


def test_many_bad_names_become_a_count(tmp_path, capsys):
    for k in range(30):
        (tmp_path / f"bad{k:02}.png").write_text("no")
    picture(tmp_path / "good.png")
    load(tmp_path, "--data.max_bad=1")
    err = capsys.readouterr().err
    assert err.count("skipped bad") == 20 and "30 of 31" in err


def test_every_kind_of_pixel(tmp_path):
    """A left half and a right half of known colours, in every mode: they arrive as those, whatever the file."""
    def check(image, left, right, name="x.png", tolerance=0, **kwargs):
        image.save(tmp_path / name, **kwargs)
        got = data.decode(tmp_path / name, 16)
        assert got.shape == (3, 16, 16) and got.dtype == np.uint8
        for half, want in ((got[:, :, :5], left), (got[:, :, 11:], right)):
            assert np.abs(half.reshape(3, -1).T.astype(int) - want).max() <= tolerance, (image.mode, name)

    def halves(mode, a, b):
        image = Image.new(mode, (80, 40), a)
        image.paste(b, (40, 0, 80, 40))
        return image.resize((80, 80), Image.Resampling.NEAREST)

    red, blue = (250, 10, 20), (5, 40, 240)
    rgb = halves("RGB", red, blue)
    check(rgb, red, blue)
    check(rgb, red, blue, "x.jpg", 6, quality=98, subsampling=0)
    check(rgb, red, blue, "x.webp", 0, lossless=True)
    check(rgb.quantize(4), red, blue)
    check(halves("L", 30, 220), (30,) * 3, (220,) * 3)
    check(halves("1", 0, 1), (0,) * 3, (255,) * 3)
    check(halves("LA", (30, 255), (99, 0)), (30,) * 3, (255,) * 3)
    check(halves("RGBA", (*red, 255), (*blue, 128)), red, [round(x * 128 / 255 + 127) for x in blue], tolerance=1)
    two = rgb.quantize(2)
    check(two, red, (255,) * 3, transparency=two.getpixel((75, 40)))
    check(halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), (255, 0, 0), (0, 0, 255), "x.jpg", 8, quality=98)
    deep = np.full((80, 80), 30 * 257, np.uint16)
    deep[:, 40:] = 220 * 257
    check(Image.fromarray(deep), (30,) * 3, (220,) * 3)
    exif = Image.Exif()
    exif[0x0112] = 6                                                            # to be turned by 90 degrees clockwise
    check(rgb.rotate(90), red, blue, "turned.jpg", 6, quality=98, subsampling=0, exif=exif)


def test_resize_and_crop(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 300).astype(np.uint8)[None, :, None], (100, 1, 3))
    Image.fromarray(ramp).save(tmp_path / "wide.png")
    Image.fromarray(ramp.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    wide, tall = data.decode(tmp_path / "wide.png", 50), data.decode(tmp_path / "tall.png", 50)
    want = ramp[0, 100:200, 0].reshape(50, 2).mean(1)                           # the middle third, two pixels to one
    assert np.abs(wide[0].astype(float) - want[None]).max() < 1.5 and np.array_equal(tall, wide.transpose(0, 2, 1))
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255                                                       # finer than the small grid: must become grey
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert np.abs(data.decode(tmp_path / "stripes.png", 32)[:, :, 2:-2].astype(int) - 128).max() < 6


def test_summary_and_sheet(tmp_path):
    script = Path(data.__file__)
    done = subprocess.run([sys.executable, script, "--data.subset=food", "--model.size=32"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "135 drawings" in done.stdout and "held out" in done.stdout and Image.open(tmp_path / "out" / "emoji.png").width > 500

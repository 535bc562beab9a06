"""Pictures in: every layout of the open sets, which column is taken, which side a picture is on, and what
the commands say of it.

Black box: what `data.load` gives of small real files (layouts.py). Damage and everything that could be
silently wrong is in test_silent.py, order and resuming in test_order.py, the hub in test_hub.py, stores
in test_remote.py.
"""

import itertools
import json
import re

import pytest

import data
import fresh
import layouts
import sets
from layouts import ADDRESSES, LAYOUTS, LONG, N, RAW, coco_list, both, texts
from sets import (
    captions,
    config,
    encoded,
    expected,
    items,
    jpeg,
    jsonl,
    load,
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
from test_pretrained import one_line


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Indexes that do not fit beside the files go below the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# Layouts


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name, tmp_path):
    """Each picture has its captions, each is on one side, and the line says what was chosen."""
    layout = LAYOUTS[name]
    root = tmp_path / "set"
    layout.build(root)
    train, val = load(root)
    sides = captions(train), captions(val)
    assert {**sides[0], **sides[1]} == layout.captions
    assert not set(sides[0]) & set(sides[1]) and all(sides)
    if layout.train is not None:
        assert (set(sides[0]), set(sides[1])) == (layout.train, layout.val)
    assert len(train) == len(sides[0]) and len(val) == len(sides[1])
    assert "\n" not in train.summary
    for word in layout.words:
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", train.summary), (word, train.summary)


@pytest.mark.parametrize(
    "name, column", [("brivangl", "image"), ("img2dataset_parquet", "jpg"), ("tuxemon", "image")]
)
def test_the_column_of_pictures_is_said(name, column, tmp_path):
    LAYOUTS[name].build(tmp_path / "set")
    assert re.search(rf"(?<!\w){column}(?!\w)", load(tmp_path / "set")[0].summary.split(": ", 1)[1])


@pytest.mark.parametrize(
    "name",
    ["img2dataset_webdataset", "flux_reason", "sharegpt_4o_image", "imagefolder_csv_text_split", "coco_zip"],
)
def test_layout_again_from_its_index(name, tmp_path):
    """A second start, which may read what the first kept, finds the same."""
    LAYOUTS[name].build(tmp_path / "set")
    first = [captions(side) for side in load(tmp_path / "set")]
    assert [captions(side) for side in load(tmp_path / "set")] == first


@pytest.mark.parametrize("name", ["blip3o_60k", "midjourney_recap", "zip_of_pictures"])
def test_one_file_is_a_source(name, tmp_path):
    LAYOUTS[name].build(tmp_path / "set")
    file = sorted(path for path in (tmp_path / "set").iterdir())[0]
    found = read(file)
    assert found.items() <= LAYOUTS[name].captions.items() and len(found) in (3, 6, 12)


def test_a_folder_below_and_a_link_to_the_set(tmp_path):
    """A folder of a set is a set; a link to it is the same."""
    LAYOUTS["flux_reason"].build(tmp_path / "set")
    assert set(read(tmp_path / "set/Imaginative")) == {6, 7, 8}
    (tmp_path / "link").symlink_to(tmp_path / "set", target_is_directory=True)
    assert len(read(tmp_path / "link")) == N


@pytest.mark.parametrize("build", ADDRESSES, ids=lambda build: build.__name__)
def test_addresses_stop_with_the_command_that_fetches_them(build, tmp_path):
    url, caption = build(tmp_path / "set")
    one_line(lambda: load(tmp_path / "set"), "img2dataset", url, caption, "keep_ratio")


def test_captions_without_pictures_and_nothing_at_all(tmp_path):
    """zlab-princeton/i1-captions has captions by key; a folder may be empty, or hold what no picture is."""
    write_parquet(tmp_path / "captions/a.parquet", key=["1", "2"], caption=["a", "b"])
    one_line(lambda: load(tmp_path / "captions"), "captions")
    (tmp_path / "empty").mkdir()
    one_line(lambda: load(tmp_path / "empty"), "empty")
    write(tmp_path / "texts/readme.md", "hello")
    one_line(lambda: load(tmp_path / "texts"), "texts")
    one_line(lambda: load(tmp_path / "no/such/folder"), "no/such/folder")


@pytest.mark.parametrize(
    "suffix, mode", [(".tar.gz", "w:gz"), (".tgz", "w:gz"), (".tar.bz2", "w:bz2"), (".tar.xz", "w:xz")]
)
def test_compressed_tars_are_read_or_are_to_be_unpacked(suffix, mode, tmp_path):
    write_tar(tmp_path / f"set/a{suffix}", pairs(range(N)), mode=mode)
    try:
        found = read(tmp_path / "set")
    except SystemExit as stop:
        assert (
            str(stop).startswith("error: ")
            and "\n" not in str(stop)
            and "unpack" in str(stop)
            and f"a{suffix}" in str(stop)
        )
    else:
        assert found == expected(range(N))


def test_a_table_of_names_and_captions_as_simpletuner_has_it(tmp_path):
    """caption, width, height, filename in parquet, beside the pictures: read, or one line."""
    write_files(tmp_path / "set", [(f"{k}.jpg", jpeg(k)) for k in range(N)])
    write_parquet(
        tmp_path / "set/all.parquet",
        filename=[f"{k}.jpg" for k in range(N)],
        width=[40] * N,
        height=[32] * N,
        caption=texts("a {} card, number {}"),
    )
    try:
        found = read(tmp_path / "set")
    except SystemExit as stop:
        assert str(stop).startswith("error: ") and "\n" not in str(stop)
    else:
        assert found == expected(range(N))


# Neighbours of the layouts


def test_names_in_a_list_in_other_spellings(tmp_path):
    """Windows' separators, a leading ./, names without their folder, and a picture that the list does not
    name."""
    write_files(tmp_path / "set", [(f"images/{k}.png", encoded(k)) for k in range(N)])
    rows = [{"file_name": f"./images/{k}.png", "text": say(k)} for k in range(N - 1)]
    write(tmp_path / "set/metadata.jsonl", jsonl(rows))
    train, val = load(tmp_path / "set", "--data.max_bad=0.2")
    assert {**captions(train), **captions(val)} == expected(range(N - 1))


def test_one_list_with_keys_of_its_own(tmp_path):
    """A json list whose names of keys nobody agreed on: whatever names the files, and a caption by its usual
    name."""
    for kind, (name, text) in {
        "a": ("image", "caption"),
        "b": ("image_path", "prompt"),
        "c": ("file_name", "captions"),
    }.items():
        write_files(tmp_path / kind, [(f"images/{k}.jpg", jpeg(k)) for k in range(N)])
        rows = [
            {
                "id": k,
                name: f"images/{k}.jpg",
                text: [say(k), say(k, "{} {}")] if text == "captions" else say(k),
            }
            for k in range(N)
        ]
        write(tmp_path / kind / "all.json", json.dumps(rows))
        want = {k: [say(k), say(k, "{} {}")] for k in range(N)} if text == "captions" else expected(range(N))
        assert read(tmp_path / kind) == want


def test_two_lists_of_which_one_is_not_about_these_pictures(tmp_path):
    """ShareGPT-4o-Image has a second list, of editing, whose tars were not fetched."""
    LAYOUTS["sharegpt_4o_image"].build(tmp_path / "set")
    edits = [
        {
            "input_prompt": "make it blue",
            "input_image": ["image/900.png"],
            "output_image": f"image/{900 + k}.png",
        }
        for k in range(N)
    ]
    write(tmp_path / "set/text_and_image_to_image.json", json.dumps(edits))
    train, val = load(tmp_path / "set", "--data.max_bad=0.6")
    assert {**captions(train), **captions(val)} == expected(range(N))


def test_coco_captions_of_pictures_that_are_not_here(tmp_path):
    """The lists of both splits are one download, the pictures are two: 12 of 24 are named and not here."""
    write_files(tmp_path / "set/val2017", [(f"{k:012}.jpg", jpeg(k)) for k in range(N)])
    write(tmp_path / "set/annotations/captions_val2017.json", coco_list(range(N)))
    write(tmp_path / "set/annotations/captions_train2017.json", coco_list(range(N, 2 * N)))
    train, val = load(tmp_path / "set", "--data.max_bad=0.6")
    assert {**captions(train), **captions(val)} == layouts.COCO


def test_monets_sources_side_by_side(tmp_path):
    """One source has the alt-text only: its pictures take that, those of another the model's caption."""
    write_tar(tmp_path / "set/v1.1.0/cc12m/0.tar", layouts.monet_members(both(0)))
    write_tar(tmp_path / "set/v1.1.0/synthetic/0.tar", layouts.monet_members(both(1), ()))
    want = {**expected(both(0), "florence-2-large: a {} card {}"), **expected(both(1), layouts.WEB)}
    assert read(tmp_path / "set") == want


def test_monets_parquet_is_of_thumbnails(tmp_path):
    """A thumbnail is never taken for the picture, unless it is asked for."""
    thumbnails = [encoded(k, "WEBP", size=(8, 8), lossless=True) for k in range(N)]
    write_parquet(
        tmp_path / "set/0.parquet",
        id=[str(k) for k in range(N)],
        source=["cc12m"] * N,
        thumbnail=thumbnails,
        **{"caption_florence-2-large": texts(LONG), "caption_original": texts(layouts.WEB)},
    )
    one_line(lambda: load(tmp_path / "set"), "thumbnail", "--data.image")
    assert read(tmp_path / "set", "--data.image=thumbnail") == expected(range(N), LONG)


def test_a_picture_of_another_suffix_with_the_same_stem(tmp_path):
    """a.jpg and a.png beside one a.txt are two pictures, in a folder and in a tar, or one and a word about
    the other."""
    members = [("a.jpg", jpeg(1)), ("a.png", encoded(2)), ("a.txt", say(1)), *pairs(range(3, 9))]
    write_files(tmp_path / "folder", members)
    write_tar(tmp_path / "tar/0.tar", members)
    found = [read(tmp_path / kind) for kind in ("folder", "tar")]
    assert found[0] == found[1] and set(found[0]) >= set(range(3, 9))


def test_txt_comes_before_json_and_a_key_before_another(tmp_path):
    """In a tar as in a folder; and --data.caption asks for the key instead."""
    members = []
    for k in range(N):
        members += [
            (f"{k}.jpg", jpeg(k)),
            (f"{k}.txt", say(k)),
            (f"{k}.json", json.dumps({"key": str(k), "url": "http://x", "width": 4, "alt": say(k, WEIRD)})),
        ]
    write_tar(tmp_path / "tar/0.tar", members)
    write_files(tmp_path / "folder", members)
    for kind in ("tar", "folder"):
        assert read(tmp_path / kind) == expected(range(N))
        assert read(tmp_path / kind, "--data.caption=alt") == expected(range(N), WEIRD)


WEIRD = "alt text of {} {}"


# The right column

LONGS = [
    "caption_detail",
    "long_caption",
    "caption_llava",
    "qwen3",
    "gemini",
    "llava",
    "enhanced_prompt",
    "synthetic_caption",
    "gpt4_turbo_caption",
    "caption_florence-2-large",
    "caption_internvl-3-8b",
]
SHORTS = ["caption", "text", "input_prompt", "prompt", "caption_original", "original_prompt", "alt_text"]
BETTER = [
    *itertools.product(LONGS, SHORTS),
    *itertools.combinations(LONGS[:6], 2),
    ("caption", "prompt"),
    ("text", "prompt"),
    ("caption", "original_prompt"),
    ("text", "original_prompt"),
]


@pytest.mark.parametrize("form", ["parquet", "tar"])
def test_long_captions_before_raw_prompts(form, tmp_path):
    """Of two columns the one that comes first in the documented order is taken, wherever it stands in the
    file."""
    wrong = []
    for better, worse in BETTER:
        root = tmp_path / f"{better} {worse}"
        if form == "parquet":
            write_parquet(
                root / "0.parquet",
                **{
                    worse: texts(RAW, range(3)),
                    "image": list(map(jpeg, range(3))),
                    better: texts(LONG, range(3)),
                },
            )
        else:
            members = []
            for k in range(3):
                members += [
                    (f"{k}.jpg", jpeg(k)),
                    (f"{k}.json", json.dumps({worse: say(k, RAW), better: say(k, LONG)})),
                ]
            write_tar(root / "0.tar", members)
        train, val = load(root)
        if {**captions(train), **captions(val)} != expected(range(3), LONG):
            wrong.append((better, worse))
        assert better in train.summary and worse in train.summary
    assert not wrong


def test_chinese_captions_only_when_asked(tmp_path):
    write_parquet(
        tmp_path / "set/0.parquet",
        image=list(map(jpeg, range(3))),
        caption_detail_cn=texts("一张{}卡片 {}", range(3)),
        prompt=texts(RAW, range(3)),
    )
    assert read(tmp_path / "set") == expected(range(3), RAW)
    assert read(tmp_path / "set", "--data.caption=caption_detail_cn") == expected(range(3), "一张{}卡片 {}")


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("midjourney_recap", "prompt"),
        ("flux_reason", "caption_original"),
        ("progamergov", "short_caption"),
        ("monet_tars", "caption_original"),
        ("json_beside", "prompt"),
    ],
)
def test_the_caption_that_was_asked_for(name, wanted, tmp_path):
    LAYOUTS[name].build(tmp_path / "set")
    train, val = load(tmp_path / "set", f"--data.caption={wanted}", "--data.max_bad=0.6")
    found = {**captions(train), **captions(val)}
    words = {"prompt": RAW, "short_caption": "{} {}", "caption_original": layouts.WEB}[wanted]
    if name == "flux_reason":  # null in a third of the rows
        found = {k: said for k, said in found.items() if k % 3 != 1}
        words = "a {} card, original {}"
    assert found == expected(found, words) and len(found) >= 8
    assert wanted in train.summary


def test_several_captions_that_were_asked_for(tmp_path):
    """All of them belong to the picture, in the order of the flag; what is null in a row is left away; each
    is drawn in its time."""
    LAYOUTS["midjourney_recap"].build(tmp_path / "parquet")
    want = {k: [say(k, "llava: {} {}"), say(k, RAW)] for k in range(N)}
    assert read(tmp_path / "parquet", "--data.caption=llava,prompt") == want
    LAYOUTS["monet_tars"].build(tmp_path / "tars")
    flag = "--data.caption=caption_internvl-3-8b,caption_sharegpt4v-7b"
    want = {
        k: [say(k, f"{model}: a {{}} card {{}}") for model in ("internvl-3-8b", "sharegpt4v-7b")]
        for k in range(N)
    }
    assert read(tmp_path / "tars", flag) == want
    LAYOUTS["flux_reason"].build(tmp_path / "nulls")
    found = read(tmp_path / "nulls", "--data.caption=caption_text,caption_detail")
    assert all(
        found[k] == ([] if k % 3 == 1 else [say(k, "a {} card, text {}")]) + [say(k, LONG)] for k in range(N)
    )
    train, _ = load(tmp_path / "parquet", "--data.caption=llava,prompt")
    item = items(train)[0]
    assert {train.get(item, choice)[1] for choice in range(8)} == set(train.captions(item))


@pytest.mark.parametrize(
    "name", ["midjourney_recap", "progamergov", "json_beside", "imagefolder_csv_text", "sharegpt_4o_image"]
)
def test_a_caption_that_is_not_there_names_those_that_are(name, tmp_path):
    LAYOUTS[name].build(tmp_path / "set")
    one_line(lambda: load(tmp_path / "set", "--data.caption=captoin"), "captoin", *LAYOUTS[name].words[-1:])


@pytest.mark.parametrize("column", ["image", "jpg", "jpeg", "png", "webp", "img", "output", "picture"])
@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_pictures_go_by_the_name_of_their_column(column, kind, tmp_path):
    """Whatever else is binary, and stands before it."""
    blobs = [encoded(k) for k in range(3)]
    other = [encoded(60, size=(8, 8))] * 3
    made = {
        "thumbnail": other,
        "conditioning_image": struct_column(other),
        "image_mask": other,
        "depth_map": struct_column(other),
        "embedding": [b"\0" * 64] * 3,
    }
    write_parquet(
        tmp_path / "set/0.parquet",
        **made,
        **{column: struct_column(blobs) if kind == "struct" else blobs},
        text=texts(LONG, range(3)),
    )
    train, val = load(tmp_path / "set")
    assert {**captions(train), **captions(val)} == expected(range(3), LONG)


@pytest.mark.parametrize("form", ["bytes", "struct"])
def test_two_columns_of_pictures_stop_with_both_names(form, tmp_path):
    blobs = [[encoded(k + 20 * side) for k in range(3)] for side in (0, 1)]
    made = [struct_column(side) if form == "struct" else side for side in blobs]
    write_parquet(
        tmp_path / "set/0.parquet", first_view=made[0], second_view=made[1], text=texts(LONG, range(3))
    )
    one_line(lambda: load(tmp_path / "set"), "first_view", "second_view", "--data.image=")
    assert set(read(tmp_path / "set", "--data.image=second_view")) == {20, 21, 22}
    one_line(lambda: load(tmp_path / "set", "--data.image=third_view"), "third_view", "first_view")
    one_line(lambda: load(tmp_path / "set", "--data.image=text"), "text")


def test_one_column_of_pictures_by_another_name_is_taken(tmp_path):
    """Nothing else could be meant. The name is said."""
    write_parquet(
        tmp_path / "set/0.parquet", photo=struct_column(map(jpeg, range(3))), text=texts(LONG, range(3))
    )
    assert read(tmp_path / "set") == expected(range(3), LONG)
    assert "photo" in load(tmp_path / "set")[0].summary


@pytest.mark.parametrize(
    "values, kind", [([1, 2, 3], "int"), ([0.5, 1.0, 2.0], "float|double"), ([True, False, True], "bool")]
)
def test_a_caption_of_another_type_is_one_line(values, kind, tmp_path):
    """With its name and type; and where a text stands beside it, that is taken."""
    write_parquet(tmp_path / "set/0.parquet", image=list(map(jpeg, range(3))), caption=values)
    with pytest.raises(SystemExit, match=rf"^error: .*caption.*({kind})"):
        load(tmp_path / "set", "--data.caption=caption")
    one_line(lambda: load(tmp_path / "set"), "caption")
    write_parquet(
        tmp_path / "two/0.parquet",
        image=list(map(jpeg, range(3))),
        caption=values,
        text=texts(LONG, range(3)),
    )
    assert read(tmp_path / "two") == expected(range(3), LONG)


def test_text_columns_of_every_kind_of_text(tmp_path):
    """Large strings, dictionaries, views and lists of them are text."""
    import pyarrow as arrow

    plain = texts(LONG, range(3))
    kinds = {
        "large": arrow.array(plain, arrow.large_string()),
        "dictionary": arrow.array(plain).dictionary_encode(),
        "list": [[text] for text in plain],
        "large_list": arrow.array([[text] for text in plain], arrow.large_list(arrow.large_string())),
    }
    for name, column in kinds.items():
        write_parquet(tmp_path / name / "0.parquet", image=list(map(jpeg, range(3))), text=column)
        assert read(tmp_path / name) == expected(range(3), LONG), name
    large = arrow.array(list(map(jpeg, range(3))), arrow.large_binary())
    write_parquet(tmp_path / "binary/0.parquet", image=large, text=plain)
    assert read(tmp_path / "binary") == expected(range(3), LONG)


def test_no_caption_column_names_the_columns(tmp_path):
    write_parquet(
        tmp_path / "set/0.parquet", image=list(map(jpeg, range(3))), label=[1, 2, 3], width=[4, 4, 4]
    )
    one_line(lambda: load(tmp_path / "set"), "caption", "label")


def test_files_of_one_set_with_other_columns(tmp_path):
    """A column that the second file lacks is not looked for there in vain: its rows take the next best, or
    the file is counted."""
    write_parquet(
        tmp_path / "set/0.parquet",
        image=list(map(jpeg, range(6))),
        prompt=texts(RAW, range(6)),
        qwen3=texts(LONG, range(6)),
    )
    write_parquet(
        tmp_path / "set/1.parquet", image=list(map(jpeg, range(6, 12))), prompt=texts(RAW, range(6, 12))
    )
    try:
        found = read(tmp_path / "set")
    except SystemExit as stop:
        assert str(stop).startswith("error: ") and "\n" not in str(stop) and "1.parquet" in str(stop)
    else:
        assert found == {**expected(range(6), LONG), **expected(range(6, 12), RAW)}


# Which side a picture is on

SPLITS = {
    "folders": ("{}/0.tar", "validation"),
    "files": ("{}-00000-of-00001.tar", "test"),
    "data": ("data/{}-000.tar", "validation"),
    "short": ("{}/0.tar", "val"),
    "dev": ("{}-0.tar", "valid"),
}


@pytest.mark.parametrize("names", SPLITS)
def test_splits_by_name(names, tmp_path):
    form, other = SPLITS[names]
    for part, split in enumerate(["train", other]):
        write_tar(tmp_path / "set" / form.format(split), pairs(both(part)))
    train, val = load(tmp_path / "set")
    assert (set(captions(train)), set(captions(val))) == (set(both(0)), set(both(1)))


def test_three_splits_never_train_on_two_of_them(tmp_path):
    for part, split in enumerate(["train", "validation", "test"]):
        write_tar(tmp_path / f"set/{split}-0.tar", pairs(range(4 * part, 4 * part + 4)))
    train, val = load(tmp_path / "set")
    assert set(captions(train)) == set(range(4)) and set(range(4, 8)) <= set(captions(val)) <= set(
        range(4, 12)
    )


def test_names_of_the_way_there_are_no_splits(tmp_path):
    """Only what lies below the source counts; train-* alone is no split; nor is a part of a word."""
    write_tar(tmp_path / "validation/test/train/train-0.tar", pairs(range(N)))
    for source in ("validation/test/train", "validation/test/train/train-0.tar"):
        assert len(read(tmp_path / source)) == N
    for part, name in enumerate(["constrained", "latest", "testament", "trainer"]):
        write_tar(tmp_path / f"words/{name}.tar", pairs(range(3 * part, 3 * part + 3)))
    train, val = load(tmp_path / "words")
    assert len(train) + len(val) == N and len(val) < 6
    write_files(tmp_path / "pictures", [*pairs(both(0), "train-{:03}"), *pairs(both(1), "my test {:03}")])
    assert len(read(tmp_path / "pictures")) == N


@pytest.mark.parametrize("form", ["folder", "tar", "zip", "parquet"])
@pytest.mark.parametrize("n", [2, 3, 5])
def test_held_out_pictures_never_enter_training(form, n, tmp_path):
    """From two pictures up: one at least is held out, one at least trained on, and no batch of three epochs
    has one of the former."""
    few(tmp_path / "set", form, n)
    train, val = load(tmp_path / "set")
    kept = captions(train)
    assert (
        len(train) + len(val) == n
        and set(kept).isdisjoint(captions(val))
        and len(train) >= 1
        and len(val) >= 1
    )
    c = config(tmp_path / "set", "--train.batch=4", "--train.micro_batch=2", "--train.images=64")
    loader = data.batches(train, sets.tokenize, c, 0, 0, 1)
    seen = {number(picture) for _ in range(8) for picture in next(loader)["image"]}
    assert seen == set(kept)


@pytest.mark.parametrize("form", ["folder", "parquet"])
def test_of_one_picture_it_is_said(form, tmp_path):
    few(tmp_path / "set", form, 1)
    train, val = load(tmp_path / "set")
    assert captions(train) == captions(val) == expected([0])
    done = fresh.run(
        "data.py", f"--data={tmp_path / 'set'}", cwd=tmp_path, env={"XDG_CACHE_HOME": tmp_path / "cache"}
    )
    assert done.code == 0 and re.search(
        r"only one|(one|single|only) (picture|item|image)", sets.lines(done)
    ), done


def few(root, form, n):
    members = pairs(range(n))
    if form == "folder":
        write_files(root, members)
    elif form == "tar":
        write_tar(root / "0.tar", members)
    elif form == "zip":
        write_zip(root / "0.zip", members)
    else:
        write_parquet(
            root / "0.parquet", image=list(map(jpeg, range(n))), text=texts("a {} card, number {}", range(n))
        )


@pytest.mark.parametrize("form", ["folder", "tar", "parquet"])
def test_more_pictures_move_none_to_the_other_side(form, tmp_path):
    """What was held out in a run is not trained on when the set has grown. (In parquet a row is known by its
    file and place.)"""
    few(tmp_path / "set", form, 50)
    before = [set(captions(side)) for side in load(tmp_path / "set")]
    if form == "folder":
        write_files(tmp_path / "set", pairs(range(50, 60)))
    elif form == "tar":
        write_tar(tmp_path / "set/1.tar", pairs(range(50, 60)))
    else:
        write_parquet(
            tmp_path / "set/1.parquet",
            image=list(map(jpeg, range(50, 60))),
            text=texts("a {} card, number {}", range(50, 60)),
        )
    after = [set(captions(side)) for side in load(tmp_path / "set")]
    assert not before[1] & after[0] and sum(map(len, after)) == 60


def test_the_share_that_is_held_out(tmp_path):
    """About one in twenty; not another with another seed."""
    members = [
        (f"{k:05}.{kind}", jpeg(0) if kind == "jpg" else "a card")
        for k in range(1000)
        for kind in ("jpg", "txt")
    ]
    write_tar(tmp_path / "set/0.tar", members)
    train, val = load(tmp_path / "set")
    assert len(train) + len(val) == 1000 and 25 <= len(val) <= 80
    again = load(tmp_path / "set", "--seed=5")[1]
    assert [val.name(item) for item in items(val)] == [again.name(item) for item in items(again)]


# What the commands say and draw


def test_the_command_says_what_is_in_a_set(tmp_path):
    """Files, items, columns, captions, sizes, and a sheet of pictures."""
    LAYOUTS["midjourney_recap"].build(tmp_path / "set")
    done = fresh.run(
        "data.py", f"--data={tmp_path / 'set'}", cwd=tmp_path, env={"XDG_CACHE_HOME": tmp_path / "cache"}
    )
    assert done.code == 0 and not done.errors, done.err
    said = sets.lines(done)
    for words in ("image", "qwen3", "gemini", "llava", "prompt", r"\b1[012]\b", "2 parquet", r"\d+ x \d+"):
        assert re.search(words, said), (words, said)
    assert any(say(k, LONG)[:30] in said for k in range(N))
    assert list(tmp_path.glob("out/*.png"))


def test_mistakes_of_the_command_are_one_line(tmp_path):
    done = fresh.run("data.py", "--data=no/such/folder", cwd=tmp_path)
    assert (
        done.code == 1
        and len(done.errors) == 1
        and "Traceback" not in done.err
        and "no/such/folder" in done.err
    )


@pytest.mark.parametrize("recipe", ["debug", "emoji"])
def test_the_grid_shows_captions_of_the_pictures_that_were_held_out(recipe, tmp_path, monkeypatch):
    """Also of the recipe whose own prompts are of emoji: nothing of another set is drawn, nothing that was
    trained on."""
    import train

    write_files(tmp_path / "set", pairs(range(40)))
    flags = [
        f"--config={recipe}",
        f"--data={tmp_path / 'set'}",
        "--model.size=32",
        "--model.patch=8",
        "--model.width=32",
        "--model.depth=5",
        "--model.heads=2",
        "--model.route=1,2,0.5",
        "--text.width=16",
        "--text.depth=1",
        "--text.heads=2",
        "--text.vocab=300",
        "--train.batch=4",
        "--train.micro_batch=4",
        "--train.images=4",
        "--train.val_images=2",
        "--train.compile=no",
        "--train.precision=fp32",
        "--sample.steps=1",
        f"--out={tmp_path / 'out'}",
    ]
    drawn = []
    real = train.generate
    monkeypatch.setattr(
        train, "generate", lambda *args, **options: drawn.append(args) or real(*args, **options)
    )
    train.main(flags)
    prompts = {
        word
        for args in drawn
        for part in args
        if isinstance(part, (list, tuple))
        for word in part
        if isinstance(word, str)
    }
    held_out = {caption for side in captions(load(tmp_path / "set")[1]).values() for caption in side}
    assert prompts and prompts <= held_out
    shown = (
        (tmp_path / "out/index.html").read_text().partition("(recipe: ")[0]
    )  # where the config differs from the recipe's
    assert "red apple" not in shown


def test_prompts_of_ones_own_are_drawn(tmp_path, monkeypatch):
    """--sample.prompts on the command line wins over held-out captions."""
    import train

    write_files(tmp_path / "set", pairs(range(8)))
    drawn = []
    real = train.generate
    monkeypatch.setattr(
        train, "generate", lambda *args, **options: drawn.append(args) or real(*args, **options)
    )
    train.main(
        [
            "--config=debug",
            f"--data={tmp_path / 'set'}",
            "--train.images=64",
            "--train.val_images=2",
            "--train.compile=no",
            "--sample.steps=1",
            "--sample.prompts=a blue dog|a green cat",
            "--model.size=32",
            f"--out={tmp_path / 'out'}",
        ]
    )
    prompts = {
        word
        for args in drawn
        for part in args
        if isinstance(part, (list, tuple))
        for word in part
        if isinstance(word, str)
    }
    assert prompts == {"a blue dog", "a green cat"}

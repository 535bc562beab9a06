"""The layouts of the open sets that people train on, each as a small real file made here, with what a
reader should find in it.

`LAYOUTS[name]` has `build(root)`, the captions of every picture, the words that the summary must have
(the column that was chosen) and, where the files say so, which pictures are for training and which are
not. The names of files, columns and keys are the sets'.
"""

import gzip
import json
from dataclasses import dataclass

import sets
from sets import (
    expected,
    jpeg,
    jsonl,
    pairs,
    say,
    struct_column,
    write,
    write_files,
    write_parquet,
    write_tar,
    write_zip,
)

N = 12  # pictures in most of them
LONG = "a detailed photograph of a {} card that lies on a wooden table, number {}"
RAW = "{} card {} --ar 3:2 --v 6.0"
WEB = "IMG_{}_{}.JPG"  # what alt-text looks like


@dataclass(frozen=True)
class Layout:
    """What a set looks like. `train` and `val`: the numbers on each side, or None if any share may be held
    out."""

    name: str
    build: callable
    captions: dict
    words: tuple
    train: frozenset | None
    val: frozenset | None


LAYOUTS = {}


def layout(captions=None, words=(), train=None, val=None):
    """Registers a function that builds a set."""
    sides = [None if side is None else frozenset(side) for side in (train, val)]

    def register(build):
        LAYOUTS[build.__name__] = Layout(
            build.__name__, build, captions or expected(range(N)), tuple(words), *sides
        )
        return build

    return register


def texts(words, numbers=range(N)):
    return [say(k, words) for k in numbers]


def both(split):
    """The numbers of a set of two files: the first half, the second half."""
    return range(split * N // 2, (split + 1) * N // 2)


# img2dataset: pictures with a table of all that was tried beside them


def img2dataset_key(k):
    return f"{k // 6:05}{k % 6:04}"


def img2dataset_row(k):
    return {
        "url": f"http://127.0.0.1/{k}",
        "caption": say(k),
        "key": img2dataset_key(k),
        "status": "success",
        "error_message": None,
        "width": 40,
        "height": 32,
        "original_width": 80,
        "original_height": 64,
        "exif": "{}",
        "sha256": "0" * 64,
    }


def img2dataset_tables(root, with_pictures=False):
    """The parquet and the statistics of each shard: also of what could not be fetched."""
    for shard in (0, 1):
        rows = [img2dataset_row(k) for k in both(shard)]
        blobs = [jpeg(k) for k in both(shard)]
        if not with_pictures:
            rows.append(
                {
                    **rows[0],
                    "key": f"{shard:05}0006",
                    "status": "failed_to_download",
                    "error_message": "HTTP Error 404",
                }
            )
            blobs = None
        columns = {key: [row[key] for row in rows] for key in rows[0]}
        write_parquet(root / f"{shard:05}.parquet", **({"jpg": blobs} if blobs else {}), **columns)
        write(
            root / f"{shard:05}_stats.json",
            json.dumps({"count": len(rows), "successes": 6, "failed_to_download": len(rows) - 6}),
        )


def img2dataset_members(shard):
    for k in both(shard):
        yield f"{img2dataset_key(k)}.jpg", jpeg(k)
        yield f"{img2dataset_key(k)}.txt", say(k)
        yield f"{img2dataset_key(k)}.json", json.dumps(img2dataset_row(k))


@layout()
def img2dataset_webdataset(root):
    for shard in (0, 1):
        write_tar(root / f"{shard:05}.tar", img2dataset_members(shard))
    img2dataset_tables(root)


@layout()
def img2dataset_files(root):
    for shard in (0, 1):
        write_files(root / f"{shard:05}", img2dataset_members(shard))
    img2dataset_tables(root)


@layout(words=["caption"])
def img2dataset_parquet(root):
    img2dataset_tables(root, with_pictures=True)


# Parquet with pictures inside


@layout(captions=expected(range(N), LONG), words=["qwen3"])
def midjourney_recap(root):
    """Photoroom/midjourney-v6-recap: the user's prompt, and three models' captions with a status each."""
    for part in (0, 1):
        numbers = both(part)
        write_parquet(
            root / f"train_{part:03}.parquet",
            id=[str(k) for k in numbers],
            image=struct_column(map(jpeg, numbers)),
            prompt=texts(RAW, numbers),
            llava=texts("llava: {} {}", numbers),
            llava_status=["success"] * 6,
            gemini=texts("gemini: {} {}", numbers),
            gemini_status=["success"] * 6,
            qwen3=texts(LONG, numbers),
            qwen3_status=["success"] * 6,
        )


@layout(captions=expected(range(N), LONG), words=["llava"])
def brivangl(root):
    """brivangl/midjourney-v6-llava: pictures as plain bytes."""
    for part in (0, 1):
        numbers = both(part)
        write_parquet(
            root / f"data/train_{part:03}.parquet",
            id=[str(k) for k in numbers],
            prompt=texts(RAW, numbers),
            image=list(map(jpeg, numbers)),
            llava=texts(LONG, numbers),
            llava_status=["success"] * 6,
        )


FLUX = "composition entity text imaginative style abstract original detail".split()


@layout(captions=expected(range(N), LONG), words=["caption_detail"])
def flux_reason(root):
    """LucasFang/FLUX-Reason-6M: 36 columns in four folders; of the captions only caption_detail is never
    null."""
    for part, subset in enumerate(["Aesthetics-Part01", "Aesthetics-Part02", "Imaginative", "Text"]):
        numbers = range(3 * part, 3 * part + 3)
        columns = {"id": [str(k) for k in numbers], "image": struct_column(map(jpeg, numbers))}
        for kind in FLUX:
            columns[f"caption_{kind}"] = [
                None if k % 3 == 1 else say(k, "a {} card, " + kind + " {}") for k in numbers
            ]
            columns[f"caption_{kind}_cn"] = texts("一张{}卡片 {}", numbers)
            columns[f"bool_caption_{kind}"] = [k % 2 == 0 for k in numbers]
            columns[f"score_{kind}"] = [8] * 3
        columns["caption_detail"] = texts(LONG, numbers)
        columns |= {"score_image_clarity": [9] * 3, "score_image_structure": [9] * 3}
        assert len(columns) == 36
        name = f"fluxdb-{subset.lower()}-00000-of-00001.parquet"
        write_parquet(root / subset / name, group=2, **columns)


@layout(words=["caption"])
def flux_generated(root):
    """lehduong/flux_generated"""
    for part in (0, 1):
        name = f"data/train-{part:05}-of-00002.parquet"
        write_parquet(
            root / name,
            image=struct_column(map(jpeg, both(part))),
            caption=texts("a {} card, number {}", both(part)),
        )


@layout(captions=expected(range(N), LONG), words=["synthetic_caption"])
def dalle_3_dataset(root):
    """OpenDatasets/dalle-3-dataset"""
    write_parquet(
        root / "data/train-00000-of-00001.parquet",
        caption=texts(RAW),
        image=struct_column(map(jpeg, range(N))),
        link=["http://127.0.0.1"] * N,
        message_id=[str(k) for k in range(N)],
        image_hash=["0" * 16] * N,
        synthetic_caption=texts(LONG),
    )


@layout(words=["text"])
def naruto(root):
    """lambdalabs/naruto-blip-captions"""
    for part in (0, 1):
        name = f"data/train-{part:05}-of-00002-0123456789abcdef.parquet"
        write_parquet(
            root / name,
            image=struct_column(map(jpeg, both(part))),
            text=texts("a {} card, number {}", both(part)),
        )


@layout(captions=expected(range(N), LONG), words=["gpt4_turbo_caption"])
def tuxemon(root):
    """diffusers/tuxemon"""
    write_parquet(
        root / "data/train-00000-of-00001.parquet",
        image=struct_column(map(jpeg, range(N))),
        blip_caption=texts("a cartoon {} {}"),
        gpt4_turbo_caption=texts(LONG),
    )


@layout(words=["text"], train=both(0), val=both(1))
def parquet_train_and_test(root):
    """What push_to_hub writes of two splits."""
    for part, split in enumerate(["train", "test"]):
        name = f"data/{split}-00000-of-00001.parquet"
        write_parquet(
            root / name,
            image=struct_column(map(jpeg, both(part))),
            text=texts("a {} card, number {}", both(part)),
        )


# Tars: WebDataset


@layout(captions=expected(range(N), LONG))
def fine_t2i(root):
    """ma-xu/fine-t2i: tars of the same names in several folders; .txt is what the picture was drawn from."""
    for part, subset in enumerate(
        ["synthetic_enhanced_prompt_random_resolution", "synthetic_enhanced_prompt_square_resolution"]
    ):
        members = []
        for k in both(part):
            about = {
                "prompt": say(k, RAW),
                "enhanced_prompt": say(k, LONG),
                "image_generated_with_enhanced_prompt": True,
                "length": 5,
                "image_generator": "Z-Image-Turbo",
                "aesthetic_predictor_v_2_5_score": 5.5,
                "style": "photo",
                "task": "object",
            }
            members += [
                (f"{k:08}.jpg", jpeg(k)),
                (f"{k:08}.json", json.dumps(about)),
                (f"{k:08}.txt", say(k, LONG)),
            ]
        write_tar(root / subset / "train-000000.tar", members)


@layout(words=["prompt"])
def text_to_image_2m(root):
    """jackyhate/text-to-image-2M: one key in the json, and no text."""
    for folder, numbers in (("data_512_2M", both(0)), ("data_1024_10K", both(1))):
        members = []
        for k in numbers:
            members += [(f"{k:07}.jpg", jpeg(k)), (f"{k:07}.json", json.dumps({"prompt": say(k)}))]
        write_tar(root / folder / "data_000000.tar", members)


LATENT = "embedding_vae-dc-sana1p5-1p6b-1024px-tiling-128-resolution-512x512.pth"
MODELS = ("florence-2-large", "internvl-3-8b", "sharegpt4v-7b", "gemini-2.5-flash-lite")


def monet_members(numbers, models=MODELS):
    """A picture, its latents, a text's states and five captions, of which the first is alt-text."""
    for k in numbers:
        about = {
            "id": str(k),
            "caption_original": say(k, WEB),
            **{f"caption_{model}": say(k, model + ": a {} card {}") for model in models},
        }
        yield f"{k:09}.jpg", jpeg(k)
        yield f"{k:09}.{LATENT}", b"\x80\x02 latents" * 40
        yield f"{k:09}.qwen3-4b-instruct-2507_longest_caption.pth", b"\x80\x02 states" * 40
        yield f"{k:09}.json", json.dumps(about)


@layout(
    captions=expected(range(N), "florence-2-large: a {} card {}"),
    words=["caption_florence-2-large", "caption_original"],
)
def monet_tars(root):
    """jasperai/monet"""
    for part, source in enumerate(["cc12m", "laion"]):
        write_tar(root / f"v1.1.0/{source}/00/00000.tar", monet_members(both(part)))


@layout(captions=expected(range(N), WEB), words=["caption_original"])
def monet_synthetic(root):
    """Its folder `synthetic` has the original caption only."""
    write_tar(root / "v1.1.0/synthetic/00/00000.tar", monet_members(range(N), ()))


@layout()
def blip3o_60k(root):
    """BLIP3o/BLIP3o-60k: a tar for each kind of prompt; none is a split."""
    for part, name in enumerate(["dalle3", "geneval_train", "human_gestures", "text_1"]):
        write_tar(root / f"{name}.tar", pairs(range(3 * part, 3 * part + 3)))


@layout()
def cc12m_wds(root):
    """pixparse/cc12m-wds"""
    write(
        root / "_info.json",
        json.dumps({"splits": {"train": {"num_samples": N, "filenames": ["cc12m-train-0000.tar"]}}}),
    )
    for part in (0, 1):
        members = []
        for k in both(part):
            about = {
                "key": f"{k:09}",
                "url": "http://127.0.0.1",
                "caption": say(k),
                "status": "success",
                "width": 40,
                "height": 32,
            }
            members += [
                (f"{k:09}.jpg", jpeg(k)),
                (f"{k:09}.txt", say(k)),
                (f"{k:09}.json", json.dumps(about)),
            ]
        write_tar(root / f"cc12m-train-{part:04}.tar", members)


@layout(captions=expected(range(N), LONG), words=["long_caption"])
def progamergov(root):
    """ProGamerGov/synthetic-dataset-1m-dalle3-high-quality-captions: three kinds of pictures."""
    members = []
    for k in range(N):
        suffix = ("jpg", "jpeg", "png")[k % 3]
        about = {
            "short_caption": say(k, "{} {}"),
            "long_caption": say(k, LONG),
            "original_prompt": say(k, RAW),
            "resolution": "40x32",
        }
        members += [
            (f"{k:05}.{suffix}", sets.encoded(k) if suffix == "png" else jpeg(k)),
            (f"{k:05}.json", json.dumps(about)),
        ]
    write_tar(root / "data/00000.tar", members)


# One list for many pictures


@layout(words=["input_prompt"])
def sharegpt_4o_image(root):
    """FreedomIntelligence/ShareGPT-4o-Image: tars of pictures and one list, whose names may have another
    suffix than the pictures."""
    for part in (0, 1):
        write_tar(
            root / f"text_to_image_part_{part}.tar", [(f"image/{k}.png", sets.encoded(k)) for k in both(part)]
        )
    rows = [
        {"input_prompt": say(k), "output_image": f"image/{k}.{'jpg' if k == 3 else 'png'}"} for k in range(N)
    ]
    write(root / "text_to_image.json", json.dumps(rows))


def coco_list(numbers):
    """COCO's captions: pictures and captions apart, joined by a number; two captions of each."""
    images = [
        {"id": 500 + k, "file_name": f"{k:012}.jpg", "height": 32, "width": 40, "license": 1} for k in numbers
    ]
    annotations = []
    for words in ("a {} card, number {}", "there is a {} card with a {}"):
        annotations += [
            {"id": len(annotations) + k, "image_id": 500 + k, "caption": say(k, words)}
            for k in reversed(numbers)
        ]
    return json.dumps({"info": {"year": 2017}, "licenses": [], "images": images, "annotations": annotations})


COCO = {k: [say(k), say(k, "there is a {} card with a {}")] for k in range(N)}


def coco_objects(numbers):
    """Another list of the same pictures, without captions."""
    images = [{"id": 500 + k, "file_name": f"{k:012}.jpg", "height": 32, "width": 40} for k in numbers]
    boxes = [
        {"id": k, "image_id": 500 + k, "category_id": 1, "bbox": [0, 0, 9, 9], "area": 81} for k in numbers
    ]
    return json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "card"}]})


@layout(captions=COCO)
def coco_folder(root):
    write_files(root / "train2017", [(f"{k:012}.jpg", jpeg(k)) for k in range(N)])
    write(root / "annotations/captions_train2017.json", coco_list(range(N)))
    write(root / "annotations/instances_train2017.json", coco_objects(range(N)))


@layout(captions=COCO)
def coco_zip(root):
    write_zip(root / "train2017.zip", [(f"train2017/{k:012}.jpg", jpeg(k)) for k in range(N)])
    write(root / "annotations/captions_train2017.json", coco_list(range(N)))


@layout(captions=COCO, train=both(0), val=both(1))
def coco_two_splits(root):
    for part, split in enumerate(["train2017", "val2017"]):
        write_files(root / split, [(f"{k:012}.jpg", jpeg(k)) for k in both(part)])
        write(root / f"annotations/captions_{split}.json", coco_list(both(part)))


# Folders of pictures


@layout()
def txt_beside(root):
    write_files(root, pairs(range(N)))


@layout()
def caption_beside(root):
    write_files(root, pairs(range(N), caption="caption"))


@layout(captions=expected(range(N), LONG), words=["long_caption"])
def json_beside(root):
    for k in range(N):
        write(root / f"{k:03}.png", sets.encoded(k))
        write(
            root / f"{k:03}.json",
            json.dumps({"prompt": say(k, RAW), "long_caption": say(k, LONG), "width": 40}),
        )


@layout(captions={k: [say(k), say(k, "another of {} {}")] for k in range(N)})
def simpletuner_textfile(root):
    """One caption a line, at any depth."""
    for k in range(N):
        write(root / f"set {k % 3}/{k}.png", sets.encoded(k))
        write(root / f"set {k % 3}/{k}.txt", f"{say(k)}\n\n  {say(k, 'another of {} {}')}  \r\n")


@layout()
def zip_of_pictures(root):
    write_zip(root / "pictures.zip", pairs(range(N), "my pictures/{:03}"))


@layout()
def zip_with_a_table(root):
    rows = [{"file_name": f"{k}.jpg", "text": say(k)} for k in range(N)]
    write_zip(
        root / "pictures.zip",
        [*[(f"{k}.jpg", jpeg(k)) for k in range(N)], ("metadata.jsonl", jsonl(rows))],
        method=8,
    )


def table_file(path, names, key, numbers):
    """metadata.csv, .jsonl or .parquet, with a column that is no caption."""
    values = texts("a {} card, number {}", numbers)
    if path.suffix == ".jsonl":
        write(
            path, jsonl({"file_name": name, "score": 0.5, key: value} for name, value in zip(names, values))
        )
    elif path.suffix == ".csv":
        rows = [f'{name},0.5,"{value}"' for name, value in zip(names, values)]
        write(path, "\n".join([f"file_name,score,{key}", *rows]) + "\n")
    else:
        write_parquet(path, file_name=names, score=[0.5] * len(names), **{key: values})


def imagefolder(suffix, key, split):
    """The three tables of `datasets`' imagefolder, at the root or in split folders."""

    def build(root):
        for part, folder in enumerate(["train", "validation"] if split else [""]):
            numbers = both(part) if split else range(N)
            names = [f"{k:03}.jpg" for k in numbers]
            write_files(root / folder, [(name, jpeg(k)) for name, k in zip(names, numbers)])
            table_file(root / folder / f"metadata{suffix}", names, key, numbers)

    build.__name__ = f"imagefolder{suffix.replace('.', '_')}_{key}{'_split' if split else ''}"
    sides = {"train": both(0), "val": both(1)} if split else {}
    layout(words=[key], **sides)(build)


for suffix in (".csv", ".jsonl", ".parquet"):
    for key in ("text", "caption"):
        for split in (False, True):
            imagefolder(suffix, key, split)


# Lists of addresses, without pictures


def pd12m(root):
    """Spawning/PD12M. -> the column of addresses, that of captions"""
    for part in (0, 1):
        rows = [f"http://127.0.0.1/{k}.jpg" for k in both(part)]
        write_parquet(
            root / f"metadata/pd12m.{part:03}.parquet",
            id=[str(k) for k in both(part)],
            url=rows,
            caption=texts("a {} card, number {}", both(part)),
            width=[800] * 6,
            height=[600] * 6,
            mime_type=["image/jpeg"] * 6,
            hash=["0" * 32] * 6,
            license=["Public Domain"] * 6,
            source=["here"] * 6,
        )
    return "url", "caption"


def cc12m_llavanext(root):
    """CaptionEmporium/conceptual-captions-cc12m-llavanext"""
    rows = [
        {
            "url": f"http://127.0.0.1/{k}.jpg",
            "key": f"{k:09}",
            "status": "success",
            "caption": say(k, WEB),
            "caption_llava": say(k, LONG),
            "caption_llava_short": say(k),
        }
        for k in range(N)
    ]
    write(root / "train.jsonl.gz", gzip.compress(jsonl(rows).encode()))
    return "url", "caption_llava"


def urls_in_csv(root):
    """A table of addresses as megalith and the older sets of LAION come."""
    write(
        root / "urls.csv",
        "URL,TEXT\n" + "\n".join(f"http://127.0.0.1/{k}.jpg,{say(k).replace(',', ' ')}" for k in range(N)),
    )
    return "URL", "TEXT"


def urls_in_jsonl(root):
    write(
        root / "part-0.jsonl",
        jsonl({"url": f"http://127.0.0.1/{k}.jpg", "caption": say(k)} for k in range(N)),
    )
    return "url", "caption"


def recap_of_urls(root):
    """UCSC-VLAA's recaptions: parquet at the root, two captions."""
    write_parquet(
        root / "data/train-00000-of-00001.parquet",
        url=[f"http://127.0.0.1/{k}.jpg" for k in range(N)],
        re_caption=texts(LONG),
        org_caption=texts(WEB),
    )
    return "url", "caption"  # either of the two


ADDRESSES = [pd12m, cc12m_llavanext, urls_in_csv, urls_in_jsonl, recap_of_urls]

"""Prepared shards, as tools/prepare.py writes them -> samples: safetensors files, memory-mapped.

A shard holds n samples of one shape, with t captions in all:

    latent (n, C, h, w) f16, or image (n, 3, H, W) u8
    teacher (n, N, D) bf16
    first (n + 1)         where the captions of a sample begin
    letter (t + 1)        where a caption begins in `caption`, UTF-8

and of a frozen text encoder, the states of every caption at its real length, one after the other:

    text (all tokens, D) bf16
    token (t + 1)         where those of a caption begin
    length (t)            how many of them are not padding

With --fp8 `text` and `teacher` are f8, times the f32 of each token in `text_scale`, `teacher_scale`.
"""
import functools
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from configs import fail
from sources import reason

VERSION = 2                                                 # of this format
AGAIN = "run the same python -m tools.prepare again"
PICTURE_KEYS = ["latent.vae", "latent.factor", "model.channels", "model.size", "data.buckets"]
TEXT_KEYS = ["text.encoder", "text.length", "text.pad", "text.dim"]
FEATURE_KEYS = ["align.teacher", "align.layer", "align.size", "model.patch"]      # the patch sets their grid


# Few shards stay mapped, yet more than a window has: each takes one of the 65,530 mappings of a process and,
# for every page that was read, 8 bytes of page tables, which of 20 TB are 40 GB for each loader process.
@functools.lru_cache(maxsize=64)
def mapped(path):
    """Map a safetensors file into memory, {name: tensor}: a page is read from disk when it is touched."""
    return load_file(path)


class Shard:
    """One prepared file: `count` samples of `shape` (H, W) in pixels, each with its captions."""

    def __init__(self, root, record, features):
        self.path = root / f"{record['name']}.safetensors"
        self.shape = tuple(record["shape"])
        self.count = self.total = record["count"]
        self.sha256 = record["sha256"]
        self.lost = []
        self.features = features                            # are the teacher's features wanted?

    def index(self):
        """There is nothing to find out: index.json has it all."""

    def __len__(self):
        return self.count

    def groups(self):
        return None

    def name(self, row):
        return f"{self.path.stem}: sample {row}"

    def captions(self, row):
        """Return all captions of a sample."""
        tensors = mapped(self.path)
        first, last = tensors["first"][row:row + 2].tolist()
        return [caption_text(tensors, number) for number in range(first, last)]

    def sample(self, row, choice):
        """Return a sample and one of its captions.

        The sample is {"latent": float (C, h, w)} or {"image": uint8 (3, H, W)} and, where stored and wanted,
        "text": bf16 (L, D), "length": how many of the L are not padding, "teacher": bf16 (N, D).
        """
        tensors = mapped(self.path)
        first, last = tensors["first"][row:row + 2].tolist()
        number = first + choice % (last - first)
        if "latent" in tensors:
            sample = {"latent": tensors["latent"][row].float()}
        else:
            sample = {"image": tensors["image"][row].clone()}
        if "text" in tensors:
            start, end = tensors["token"][number:number + 2].tolist()
            sample["text"] = states(tensors, "text", slice(start, end))
            sample["length"] = int(tensors["length"][number])
        if self.features:
            sample["teacher"] = states(tensors, "teacher", row)
        return sample, caption_text(tensors, number)


def caption_text(tensors, number):
    start, end = tensors["letter"][number:number + 2].tolist()
    return tensors["caption"][start:end].numpy().tobytes().decode()


def states(tensors, key, rows):
    """Read `rows` of "text" or of "teacher" as bf16 (tokens, D)."""
    stored = tensors[key][rows]
    if stored.dtype == torch.bfloat16:
        return stored.clone()                               # or its user could write into the mapped pages
    scale = tensors[f"{key}_scale"][rows]
    return (stored.float() * scale[..., None]).bfloat16()


class Prepared:
    """The shards of one folder, `train` and `val`, and what their batches need to know.

    null: the empty caption's states, float (L, D); None without a frozen encoder. length, pad: text.length and text.pad.
    """

    def __init__(self, shards, null, config):
        self.null, self.length, self.pad = null, config.text.length, config.text.pad
        self.train, self.val = shards["train"], shards["val"]


def prepared(root, config, check_sizes=True):
    """Open prepared shards -> Prepared. Stops where they are not finished, are damaged, or were made for
    another recipe."""
    if not (root / "index.json").is_file():
        fail(f"{root} is not finished: {AGAIN}, it goes on where it was")
    try:
        index = json.loads((root / "index.json").read_text())
        version, records = index["version"], index["shards"]
        made_with = index["fingerprint"]
        null = None
        if made_with["text.encoder"] != "bpe":
            null = load_file(root / "null.safetensors")["text"].float()
    except Exception as error:                              # safetensors has its own
        why = reason(error)
        fail(f"index.json or null.safetensors in {root} is damaged ({why}): delete both and {AGAIN}")
    if version != VERSION:
        fail(f"{root} has version {version} of the format, this code has {VERSION}: prepare it again")

    wanted = fingerprint(config)
    differ = [key for key in wanted if made_with[key] != wanted[key]]
    wrong = [f"--{key}={made_with[key]} (now {wanted[key]})" for key in differ if key in must_agree(config)]
    if wrong:
        fail(f"{root} was prepared with {', '.join(wrong)}: give those, or prepare it anew")

    records = [record for record in records if record["count"]]
    damaged = [damage(root, record) for record in records] if check_sizes else []
    damaged = [why for why in damaged if why]
    if damaged:
        some = "; ".join(damaged[:3])
        fail(f"{len(damaged)} of {len(records)} shards in {root} are damaged ({some}): {AGAIN}")
    features = bool(config.align.teacher) and not set(differ) & set(FEATURE_KEYS)
    shards = {"train": [], "val": []}
    for record in records:
        shards[record["split"]].append(Shard(root, record, features))
    return Prepared(shards, null, config)


def damage(root, record):
    """Say what is wrong with a shard by its size alone, else "": `tools.prepare verify` reads every byte."""
    path = root / f"{record['name']}.safetensors"
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path.name}: {reason(error)}"
    return "" if size == record["bytes"] else f"{path.name} is {size} bytes and should be {record['bytes']}"


def fingerprint(config):
    """List all settings on which the contents of shards depend, {flag: value}.

    A model in a folder goes by the folder's last name and a hash of its config.json, so that it may be moved.
    """
    values = {}
    for key in [*PICTURE_KEYS, *TEXT_KEYS, *FEATURE_KEYS]:
        section, field = key.split(".")
        value = getattr(getattr(config, section), field)
        about = Path(str(value), "config.json")
        if key in ("latent.vae", "text.encoder", "align.teacher") and value and about.is_file():
            checksum = hashlib.sha256(about.read_bytes()).hexdigest()
            value = f"{about.parent.resolve().name}@{checksum[:12]}"
        values[key] = value
    return values


def must_agree(config):
    """List the flags in which a run with `config` must agree with what its shards were prepared with."""
    keys = [*PICTURE_KEYS, "text.encoder"]
    if config.text.encoder != "bpe":                        # our own encoder stores nothing
        keys += ["text.length", "text.pad"]
        if config.text.dim:                                 # 0: as wide as the encoder's states are
            keys.append("text.dim")
    if config.data.buckets:                                 # their sides are whole numbers of tokens
        keys.append("model.patch")
    if config.align.teacher and config.latent.vae:          # of pixels the teacher can be asked later
        keys += FEATURE_KEYS
    return keys

"""Encode pictures and captions once, into memory-mapped shards that train.py reads.

    python -m tools.prepare --config=nitro_512 --data=hf:owner/name --out=shards/mine
    torchrun --nproc_per_node=8 -m tools.prepare --config=nitro_512 --data=path/to/pictures --out=shards/mine
    python -m tools.prepare verify --data=shards/mine               # read every byte, against sha256

The same command goes on after an interruption; a finished shard is never made again. All other flags are of
the recipe (train.py --help): data.* say what is read; latent.vae, text.encoder, text.length, model.size,
data.buckets and align.teacher what is stored; data.workers how many processes decode; data.max_bad how many
pictures may be bad.

  --out=...          folder of the shards
  --fp8              text states and features in float8, with a scale for each token: half the bytes
  --features=no      leave away the features of align.teacher
  --shard=4096       samples of a shard; with fewer than 3,000 files are mapped anew all the time in training
"""
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm import tqdm

import cluster
import configs
import data
import pretrained
import shards
from sources import atomic, attempt, reason

BATCH = 64                                                  # pictures encoded at once
GO_ON = "the same command goes on from here"


@dataclass(frozen=True)
class Options:
    fp8: bool = False
    features: bool = True
    shard: int = 4096


class ShardPlan(NamedTuple):
    """What a shard is made of: items of one shape (H, W), of the training or of the validation set."""
    name: str
    split: str
    shape: tuple
    dataset: data.Dataset
    items: np.ndarray


def main(argv):
    configs.plain_output()
    if "-h" in argv or "--help" in argv:
        print(__doc__.strip())
    elif argv[:1] == ["verify"]:
        verify(argv[1:])
    else:
        prepare(*parse(argv))


def parse(argv):
    """Return the options of this command, and the recipe that all other flags make."""
    options, of_recipe = Options(), []
    own = [f"--{field.name}" for field in fields(Options)]
    for arg in argv:
        flag, _, text = arg.partition("=")
        if flag in own:
            options = configs.override(options, flag[2:], text or "yes")
        else:
            of_recipe.append(arg)
    config = configs.parse(of_recipe)
    if not config.out:
        configs.fail("where to? --out=<folder>")
    if options.shard < 1:
        configs.fail("--shard must be above zero")
    if not options.features or not config.align.teacher:
        config = replace(config, align=configs.Align())     # of no features no other setting matters
    if config.text.encoder != "bpe":
        config = replace(config, text=replace(config.text, dim=pretrained.text_dim(config)))
    return options, config


def prepare(options, config):
    """Make this rank's shards, and the index when those of all are there. No rank waits for another."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    root = Path(config.out)
    if len(data.split_mixture(config.data.source)) > 1:
        configs.fail("prepare reads one source: prepare each, then train on --data=shards/a:0.7,shards/b:0.3")
    train, val = data.load(config)
    if train.prepared:
        configs.fail(f"--data={config.data.source} is prepared already: prepare reads pictures")
    if rank == 0:
        print(data.describe(train, val))
    plan = [*plan_shards(train, "train", options.shard), *plan_shards(val, "val", options.shard)]
    encode = Encoder(config, options.fp8)                   # before the folder is made: it may fail
    begin(root, settings(options, config, train, val), rank)
    encode.write_null(root, rank)

    todo = []
    for shard in plan[rank::world]:
        record = finished_record(root, shard)
        if record is None:
            todo.append(shard)
        else:
            note_bad(train.bad, shard, record["bad"])
    count = sum(len(shard.items) for shard in plan[rank::world])
    count_todo = sum(len(shard.items) for shard in todo)
    start = time.perf_counter()
    with tqdm(total=count, initial=count - count_todo, unit="img", disable=rank > 0) as bar:
        for number, batches in itertools.groupby(decoded_batches(todo, config), key=itemgetter(0)):
            tensors, bad = encode_shard(batches, encode, bar)
            write_shard(root, todo[number], tensors, bad)
            note_bad(train.bad, todo[number], bad)
    seconds = time.perf_counter() - start
    if todo and rank == 0:
        speed = f"{count_todo / seconds:.1f} images/s"
        print(f"{count_todo} images in {seconds:.1f} s: {speed} on rank 0 of {world}")
    write_index(root, plan, config, train.bad, rank)


# ----------------------------------------------------------------------------------------------------
# The plan, and what is there of it

def plan_shards(dataset, split, size):
    """Cut the items of each shape into shards: what is where depends on the set and on `size` alone."""
    plan = []
    for (height, width), items in zip(dataset.shapes, dataset.items_by_shape()):
        for start in range(0, len(items), size):
            name = f"{split}-{height}x{width}-{start // size:05}"
            plan.append(ShardPlan(name, split, (height, width), dataset, items[start:start + size]))
    return plan


def settings(options, config, train, val):
    """Return everything on which the bytes of the shards depend, as {name: value}."""
    return {
        "version": shards.VERSION, **shards.fingerprint(config), "fp8": options.fp8, "shard": options.shard,
        "data.image": config.data.image, "data.caption": config.data.caption,
        "items": len(train) + len(val), "source": f"{train.digest} {val.digest}"}


def begin(root, settings, rank):
    """Make the folder, or see that it was begun with the same settings."""
    names = [path.name for path in root.glob("*")]
    if not (root / "prepare.json").is_file():               # asked last: another rank may begin meanwhile
        if any(not name.startswith("prepare.json") for name in names):
            configs.fail(f"--out={root} is not empty: give a new folder")
        try:
            root.mkdir(parents=True, exist_ok=True)
            with atomic(root / "prepare.json", rank) as part:
                part.write_text(json.dumps(settings, indent=1))
        except OSError as error:
            configs.fail(f"--out={root} cannot be made: {reason(error)}")
    before = json.loads((root / "prepare.json").read_text())
    differ = [key for key in settings if before.get(key) != settings[key]]
    if differ:
        some = ", ".join(f"{key} {before.get(key)} (now {settings[key]})" for key in differ[:3])
        configs.fail(f"{root} was begun with another {some}: give another --out or delete it")


def finished_record(root, shard):
    """Return what was written of a shard, or None where it is not there or not whole."""
    try:
        record = json.loads((root / f"{shard.name}.json").read_text())
    except (OSError, ValueError):
        return None
    if record["count"] and shards.damage(root, record):
        return None
    return record


# ----------------------------------------------------------------------------------------------------
# Pictures and captions -> tensors

class Decoder(torch.utils.data.Dataset):
    """Read and decode items of a shard, given as (its number, items).

    Returns the number, pictures as uint8 (b, 3, H, W), the captions of each, and [(name, why)] of the bad.
    """

    def __init__(self, plan):
        self.plan = plan

    def __getitem__(self, job):
        number, items = job
        dataset = self.plan[number].dataset
        pictures, captions, bad = [], [], []
        for item in items:
            try:
                captions_of_item = dataset.captions(item)
                if captions_of_item == [""]:
                    raise ValueError("no caption")
                pictures.append(torch.from_numpy(dataset.picture(item)))
                captions.append(captions_of_item)
            except Exception as error:                      # broken files raise anything
                bad.append((attempt(dataset.name, item) or str(item), reason(error)))
        return number, torch.stack(pictures) if pictures else None, captions, bad


def decoded_batches(plan, config):
    """Decode the items of planned shards in order, ahead of their use, in data.workers processes."""
    jobs = []
    for number, shard in enumerate(plan):
        for start in range(0, len(shard.items), BATCH):
            jobs.append((number, shard.items[start:start + BATCH]))
    fork = config.data.workers and sys.platform == "linux"  # the plan is shared, not copied
    return torch.utils.data.DataLoader(
        Decoder(plan), batch_size=None, sampler=jobs, num_workers=config.data.workers,
        worker_init_fn=ignore_interrupt, multiprocessing_context="fork" if fork else None)


def ignore_interrupt(_):
    """Leave Ctrl-C, which reaches loader processes too, to the main process, which ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Encoder:
    """The recipe's frozen networks: turn pictures and captions into what a shard stores of them."""

    def __init__(self, config, fp8):
        self.device = cluster.device()
        self.fp8 = fp8
        self.store_padding = config.text.pad                # for a model that attends to it
        self.vae = pretrained.VAE(config, self.device) if config.latent.vae else None
        self.teacher = pretrained.teacher(config, self.device) if config.align.teacher else None
        self.text_encoder = None
        if config.text.encoder != "bpe":
            self.tokenize = pretrained.tokenizer(config)
            self.text_encoder = pretrained.text_encoder(config, self.device)

    def __call__(self, pictures, captions):
        """Encode a batch: pictures uint8 (b, 3, H, W), a list of captions for each."""
        pixels = pictures.to(self.device).float() / 127.5 - 1
        tensors = {"latent": self.vae.encode(pixels).half()} if self.vae else {"image": pictures}
        if self.teacher:
            tensors["teacher"] = self.teacher(pixels).bfloat16()                  # (b, N, D)
        if self.text_encoder:
            tensors |= self.encode_text(list(itertools.chain(*captions)))
        for key in ("latent", "teacher", "text"):
            if key in tensors and not tensors[key].isfinite().all():
                fail_on_this_rank(f"{key} is not finite in the batch that begins with {captions[0][0]!r}")
        for key in ("teacher", "text"):
            if self.fp8 and key in tensors:
                tensors[key], tensors[f"{key}_scale"] = to_float8(tensors[key])
        return {key: tensor.cpu() for key, tensor in tensors.items()}

    def encode_text(self, captions):
        """Encode captions, keeping no more tokens than each has.

        Returns `text`, the states of one caption after the other (tokens, D); `tokens`, how many each has;
        `length`, how many of these are not padding.
        """
        ids, mask = self.tokenize(captions)
        stored, groups = mask, pretrained.buckets(mask)
        if self.store_padding:
            stored, groups = torch.ones_like(mask), None
        states = self.text_encoder(ids, mask, groups)       # (captions, L, D)
        text = states[stored.to(self.device)].bfloat16()
        return {"text": text, "tokens": stored.sum(1), "length": mask.sum(1)}

    def write_null(self, root, rank):
        """Write the states of the empty caption, which guidance needs."""
        path = root / "null.safetensors"
        if self.text_encoder and not path.exists():
            with atomic(path, rank) as part:
                save_file({"text": self.encode_text([""])["text"].cpu()}, part)


def to_float8(x):
    """Return x (..., D) as float8, and the scale (...) that makes a token's largest value float8's, 448."""
    scale = x.float().abs().amax(-1).clamp(min=1e-12) / 448
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn), scale


def encode_shard(batches, encode, bar):
    """Encode the decoded batches of a shard; return its tensors, or None if all is bad, and [(name, why)]."""
    encoded, captions, bad = [], [], []
    for _, pictures, batch_captions, batch_bad in batches:
        if batch_captions:
            encoded.append(encode(pictures, batch_captions))
        captions += batch_captions
        bad += batch_bad
        bar.update(len(batch_captions) + len(batch_bad))
    tensors = pack(encoded, captions) if captions else None
    return tensors, bad


def pack(encoded, captions):
    """Join encoded batches, and the captions of each sample, to the tensors of a shard (see shards.py)."""
    tensors = {}
    for key in list(encoded[0]):
        tensors[key] = torch.cat([batch.pop(key) for batch in encoded])        # popped: not twice in memory
    letters = [caption.encode() for caption in itertools.chain(*captions)]
    tensors["first"] = offsets([len(of_sample) for of_sample in captions])
    tensors["letter"] = offsets([len(caption) for caption in letters])
    tensors["caption"] = torch.frombuffer(bytearray(b"".join(letters)), dtype=torch.uint8)
    if "tokens" in tensors:
        tensors["token"] = offsets(tensors.pop("tokens"))
    return tensors


def offsets(counts):
    """Return where each of pieces that lie one after the other begins, and where the last one ends."""
    return torch.cat([torch.zeros(1, dtype=torch.int64), torch.as_tensor(counts).cumsum(0)])


# ----------------------------------------------------------------------------------------------------
# Tensors -> files

def write_shard(root, shard, tensors, bad):
    """Write the shard, then its record: each is complete or absent."""
    path = root / f"{shard.name}.safetensors"
    record = {"name": shard.name, "split": shard.split, "shape": shard.shape, "count": 0, "bad": bad}
    try:
        if tensors:
            with atomic(path) as part:
                save_file(tensors, part)
            record["count"] = len(tensors["first"]) - 1
            record["bytes"] = path.stat().st_size
            record["sha256"] = sha256(path)
            record["captions"] = len(tensors["letter"]) - 1
            record["tokens"] = int(tensors["length"].sum()) if "length" in tensors else 0
        with atomic(path.with_suffix(".json")) as part:
            part.write_text(json.dumps(record))
    except (OSError, SafetensorError) as error:
        fail_on_this_rank(f"{path} cannot be written ({reason(error)}): {GO_ON}")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


def note_bad(known, shard, bad):
    """Count what is bad in a shard, [(name, why)], once: too much of it stops the run."""
    known.note({(shard.name, number): tuple(found) for number, found in enumerate(bad)})


def write_index(root, plan, config, known_bad, rank):
    """Write index.json if all shards are there, as the last rank to finish finds them."""
    files = [root / f"{shard.name}.json" for shard in plan]
    if not all(file.is_file() for file in files):
        return
    records = [json.loads(file.read_text()) for file in files]
    for shard, record in zip(plan, records):
        note_bad(known_bad, shard, record.pop("bad"))
    made = [record for record in records if record["count"]]
    if not made:
        configs.fail(f"no picture of {config.data.source} could be prepared")
    index = {"version": shards.VERSION, "fingerprint": shards.fingerprint(config), "shards": records}
    with atomic(root / "index.json", rank) as part:
        part.write_text(json.dumps(index, indent=1))

    def total(key):
        return sum(record[key] for record in made)
    count, captions = total("count"), total("captions")
    tokens = f" of {total('tokens') / captions:.3g} tokens" if total("tokens") else ""
    print(f"{root}: {count} images in {len(made)} shards, {len(known_bad.known)} skipped; "
          f"{total('bytes') / count:,.0f} bytes and {captions / count:.3g} captions each{tokens}")


def verify(argv):
    """Read every byte of prepared shards and compare with the sha256 in their index."""
    root = Path(configs.parse(argv).data.source)
    try:
        records = json.loads((root / "index.json").read_text())["shards"]
    except (OSError, ValueError, KeyError) as error:
        why = reason(error)
        configs.fail(f"index.json of {root} cannot be read ({why}): --data=<folder of finished shards>")
    records = [record for record in records if record["count"]]
    damaged = []
    for record in tqdm(records, unit="shard"):
        path = root / f"{record['name']}.safetensors"
        problem = shards.damage(root, record)
        try:
            if not problem and sha256(path) != record["sha256"]:
                problem = f"{path.name} does not match its sha256"
        except OSError as error:
            problem = f"{path.name}: {reason(error)}"
        if problem:
            damaged.append(problem)
    if damaged:
        configs.fail(f"{len(damaged)} of {len(records)} shards are damaged: {'; '.join(damaged[:5])}; "
                     "delete them and run the same python -m tools.prepare again")
    print(f"{root}: {len(records)} shards match their sha256")


def fail_on_this_rank(message):
    """Stop with one line, said by this rank itself: others do other work and need not meet the same."""
    if os.environ.get("RANK", "0") != "0":
        print(f"error: {message}", file=sys.stderr)
    configs.fail(message)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        configs.fail(f"stopped; {GO_ON}")

"""Encode images and captions once, into memory-mapped shards that `train.py` reads.

    python data.py prepare --config=nitro_512 --source=path/to/images --out=shards/nitro_512
    torchrun --nproc_per_node=8 data.py prepare --config=nitro_512 --source=path/to/tars --out=shards/nitro_512

The same command goes on after an interruption; a finished shard is never made again. Every other flag is of the recipe (see
train.py --help): latent.vae, text.encoder, text.length, model.size, data.buckets, align.teacher decide what is stored, data.workers
how many processes decode, data.max_bad how many broken images are too many.

  --source=...       folder of images, of *.tar, of *.parquet; one .tar or .parquet; emoji
  --out=...          folder of the shards
  --fp8              text states and features in float8, with a scale for each token: half the bytes
  --features=no      leave away the features of align.teacher
  --shard=4096       samples of a shard
"""
import functools, hashlib, io, itertools, json, os, re, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

import cluster, configs, data, pretrained
from data import Folder, atomic, caption_crc, damage, digest, edges, fingerprint, reason, sample_crc, streams

BATCH = 64                                                  # samples encoded at once


def prepare(argv):
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip()), sys.exit(0)
    own = {m[1]: m[2] if m[2] is not None else "yes" for arg in argv if (m := re.fullmatch(r"--(fp8|features|shard)(?:=(.*))?", arg))}
    c = configs.parse([arg for arg in argv if arg.removeprefix("--").split("=")[0] not in own])
    fp8, features = (configs.cast(own.get(key, default), bool, f"--{key}") for key, default in (("fp8", "no"), ("features", "yes")))
    count = configs.cast(own.get("shard", "4096"), int, "--shard")
    if not c.out or count < 1:
        configs.fail("where to? --out=<folder>" if not c.out else "--shard must be above zero")
    if not features or not c.align.teacher:
        c = replace(c, align=configs.Align())
    if c.text.encoder != "bpe":
        c = replace(c, text=replace(c.text, dim=pretrained.text_dim(c)))
    rank, world, root = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), Path(c.out)
    train, val = data.load(c)
    if not isinstance(train, (Folder, data.Emoji)):
        configs.fail(f"--source={c.data.source}: prepare reads one source of images, not prepared shards, not a mixture")
    plan = [*shards(train, "train", count, c), *shards(val, "val", count, c)]
    about = {"version": data.VERSION, "fingerprint": fingerprint(c), "fp8": fp8, "shard": count, "items": len(train) + len(val),
             "source": f"{digest(*(keys(side) for side in (train, val))):016x}"}
    begin(root, about, rank)
    encode = encoder(c, fp8, root, rank)
    records = {shard["name"]: finished(root, shard) for shard in plan[rank::world]}
    bad = getattr(train, "bad", data.Bad(c))
    for record in filter(None, records.values()):
        bad.note(record["bad"])
    todo = [k for k in range(rank, len(plan), world) if not records[plan[k]["name"]]]
    jobs = [(k, plan[k]["items"][i:i + BATCH]) for k in todo for i in range(0, len(plan[k]["items"]), BATCH)]
    loader = torch.utils.data.DataLoader(
        Decoded(plan), batch_size=None, sampler=jobs, num_workers=c.data.workers, worker_init_fn=data.ignore_signals,
        multiprocessing_context="fork" if c.data.workers and sys.platform == "linux" else None)
    mine = sum(len(shard["items"]) for shard in plan[rank::world])
    there = f"{len(records) - len(todo)} of {len(records)} shards are there" if len(todo) < len(records) else None
    bar = tqdm(total=mine, initial=mine - sum(len(items) for _, items in jobs), desc=there, unit="img", disable=rank > 0, dynamic_ncols=True)
    since, made = time.perf_counter(), 0
    for k, group in itertools.groupby(loader, key=lambda job: job[0]):
        pieces, why = [], {}
        for _, images, captions, lost in group:
            if captions:
                pieces.append(encode(images, captions))
            bad.note(lost), why.update(lost)
            bar.update(len(captions) + len(lost))
            made += len(captions)
        write(root, plan[k], pack(pieces) if pieces else None, why)
    bar.close()
    seconds = time.perf_counter() - since
    if rank == 0 and made:
        print(f"{made} images in {seconds:.1f} s: {made / seconds:.1f} images/s" + (f" on rank 0 of {world}" if world > 1 else ""))
    conclude(root, plan, about, bad, rank)


def shards(dataset, split, count, c):
    """The plan: what is in which shard depends on nothing but the list of items, the shapes and `count`."""
    shapes = getattr(dataset, "shapes", [(c.model.size,) * 2])
    return [{"name": f"{split}-{h}x{w}-{k:05}", "split": split, "shape": [h, w], "dataset": dataset,
             "items": range(first + k * count, min(first + k * count + count, first + n))}
            for (h, w), (first, n, _) in zip(shapes, streams(dataset)) for k in range(-(-n // count))]


def keys(dataset):
    return hashlib.sha256(dataset.store.keys[dataset.index].tobytes() if isinstance(dataset, Folder) else repr(dataset.pairs).encode()).hexdigest()


def begin(root, about, rank):
    """Go on only with what was begun."""
    strange = root.exists() and (not root.is_dir() or any(not p.name.startswith("prepare.json") for p in root.iterdir()))
    if (root / "prepare.json").is_file():                                               # asked last: another rank may begin meanwhile
        was = json.loads((root / "prepare.json").read_text())
        flat = lambda x: {**x, **x["fingerprint"], "fingerprint": None}
        if differ := [f"{key} {flat(was).get(key)} (now {value})" for key, value in flat(about).items() if flat(was).get(key) != value]:
            configs.fail(f"{root} was begun with another " + ", ".join(differ) + ": give another --out or delete it")
    elif strange:
        configs.fail(f"--out={root} is not empty: give a new folder")
    else:
        root.mkdir(parents=True, exist_ok=True)
        with atomic(root / "prepare.json", rank) as part:
            part.write_text(json.dumps(about, indent=1))


def finished(root, shard):
    """Its record, if it is there and whole."""
    try:
        record = json.loads((root / (shard["name"] + ".json")).read_text())
        return record if not record["count"] or not damage(root, record) else None
    except (OSError, ValueError):
        return None


class Decoded(torch.utils.data.Dataset):
    """(shard, items) -> the shard, their images, their captions, {name: why} of those that cannot be read."""

    def __init__(self, plan):
        self.plan = plan

    def __getitem__(self, job):
        k, items = job
        dataset, images, captions, bad = self.plan[k]["dataset"], [], [], {}
        for i in items:
            try:
                texts, image = dataset.captions[i], dataset.image(i)
                captions.append(texts), images.append(image)
            except Exception as error:
                bad[dataset.names[i]] = reason(error)
        return k, torch.from_numpy(np.stack(images)) if images else None, captions, bad


def eighth(x):
    """(..., D) -> float8 (as bytes) and its scale (...): the largest value of a token becomes the largest that there is, 448."""
    scale = x.float().abs().amax(-1).clamp(min=1e-12) / 448
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8), scale


def encoder(c, fp8, root, rank):
    """-> function: images uint8 (b, 3, H, W), captions of each -> what is stored of them. Writes the empty caption's states too."""
    device = cluster.device()
    vae = pretrained.VAE(c, device) if c.latent.vae else None
    teacher = pretrained.teacher(c, device) if c.align.teacher else None
    tokenize, states = (None, None) if c.text.encoder == "bpe" else (pretrained.tokenizer(c), pretrained.text_encoder(c, device))

    def read(captions):
        """-> states of the tokens that count, one caption after the other, how many of each, and how many are not padding."""
        ids, mask = tokenize(captions)
        kept = torch.ones_like(mask) if c.text.pad else mask                            # a model that attends to padding needs its states too
        return states(ids, mask, None if c.text.pad else pretrained.buckets(mask))[kept.to(device)].bfloat16(), kept.sum(1), mask.sum(1)

    def encode(image, captions):
        out, x = {"captions": captions}, image.to(device).float() / 127.5 - 1
        out["latent" if vae else "image"] = vae.encode(x).half().cpu() if vae else image
        if tokenize:
            out["text"], out["tokens"], out["length"] = (a.cpu() for a in read([t for texts in captions for t in texts]))
        if teacher:
            out["teacher"] = teacher(x).bfloat16().cpu()                                # (b, N, D)
        for key in ("text", "teacher", "latent"):
            if key in out and not out[key].isfinite().all():
                configs.fail(f"the encoder of {key} gave numbers that are not finite; the first caption of that batch: {captions[0][0]!r}")
        for key in ("text", "teacher") if fp8 else ():
            if key in out:
                out[key], out[key + "_scale"] = eighth(out[key])
        return out

    if tokenize and rank == 0 and not (root / "null.safetensors").exists():
        with atomic(root / "null.safetensors") as part:
            save_file({"text": read([""])[0].cpu()}, part)
    return encode


def pack(pieces):
    """-> the tensors of a shard."""
    captions = [texts for piece in pieces for texts in piece["captions"]]
    blobs = [line.encode() for texts in captions for line in texts]
    starts = lambda counts: torch.tensor([0, *itertools.accumulate(counts)])
    out = {key: torch.cat([piece.pop(key) for piece in pieces]) for key in list(pieces[0]) if key != "captions"}
    out |= {"first": starts(map(len, captions)), "letter": starts(map(len, blobs)), "caption": torch.frombuffer(bytearray(b"".join(blobs)), dtype=torch.uint8),
            "token": starts(out.pop("tokens", torch.zeros(len(blobs))).long().tolist())}
    out.setdefault("length", torch.zeros(len(blobs), dtype=torch.int64))
    s = {key: (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy() for key, x in out.items()}
    out["crc"] = torch.tensor([sample_crc(s, j) for j in range(len(captions))])
    out["text_crc"] = torch.tensor([caption_crc(s, j, t) for j, texts in enumerate(captions) for t in range(s["first"][j], s["first"][j] + len(texts))])
    return {key: x.view(torch.float8_e4m3fn) if key + "_scale" in out else x for key, x in out.items()}


def write(root, shard, tensors, bad):
    """The shard, then its record, each complete or absent."""
    path = root / (shard["name"] + ".safetensors")
    record = {"name": shard["name"], "split": shard["split"], "shape": shard["shape"], "count": 0, "bytes": 0, "bad": bad}
    if tensors:
        with atomic(path) as part:
            save_file(tensors, part)
        record |= {"count": len(tensors["crc"]), "bytes": path.stat().st_size, "edges": edges(path), "sha256": sha256(path),
                   "captions": len(tensors["length"]), "tokens": int(tensors["length"].sum())}
    with atomic(path.with_suffix(".json")) as part:
        part.write_text(json.dumps(record))


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def conclude(root, plan, about, bad, rank):
    """Whoever finds all shards made writes the index. Ranks need not wait for each other, nor run at the same time."""
    files = [root / (shard["name"] + ".json") for shard in plan]
    if not all(file.is_file() for file in files):
        return
    records = [json.loads(file.read_text()) for file in files]
    for record in records:
        bad.note(record.pop("bad"))
    count, size, captions, tokens = (sum(record.get(key, 0) for record in records) for key in ("count", "bytes", "captions", "tokens"))
    if not count:
        configs.fail(f"no image of {bad.source} could be prepared")
    with atomic(root / "index.json", rank) as part:
        part.write_text(json.dumps({**about, "shards": records}, indent=1))
    print(f"{root}: {count} images in {len(records)} shards, {size / count:,.0f} bytes each, {captions / count:.3g} captions each" +
          (f" of {tokens / captions:.3g} tokens" if tokens else "") + (f", {len(bad)} skipped" if bad else ""))


def verify(argv):
    """Reads every byte of prepared shards."""
    root = Path(configs.parse(argv).data.source)
    if not (root / "index.json").is_file():
        configs.fail(f"no index.json in {root}: --source=<folder that data.py prepare has finished>")
    records = json.loads((root / "index.json").read_text())["shards"]
    wrong = []
    for record in tqdm([record for record in records if record["count"]], unit="shard"):
        name = record["name"]
        if why := damage(root, record) or sha256(root / f"{name}.safetensors") != record["sha256"] and "it does not match its sha256":
            wrong.append(f"{name} ({why})")
    if wrong:
        configs.fail(f"{len(wrong)} of {len(records)} shards are damaged: {', '.join(wrong[:5])}; delete them and run the same data.py prepare again")
    print(f"{root}: {len(records)} shards match their sha256")


# ------------------------------------------------------------------------------------------------------------------
# Parquet

class Parquet:
    """Rows of parquet files that hold images as bytes, as Hugging Face writes them. They are read a row group at a time, which
    is quick in order (`prepare`) and slow at random."""
    lazy = True

    def __init__(self, files, c, bad):
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            configs.fail("parquet files need a package: pip install pyarrow")
        self.files, self.groups = files, []                 # groups: (file, its number there, rows)
        for file in files:
            try:
                about = parquet.ParquetFile(file)
                counts = [about.metadata.row_group(g).num_rows for g in range(about.num_row_groups)]
                columns(about.schema_arrow, file)
                self.groups += [(file, g, n) for g, n in enumerate(counts)]
            except (OSError, ValueError) as error:          # pyarrow's own are kinds of these
                bad.late[file.name] = f"no parquet file of images and captions: {reason(error)}"
                bad.total += 1
        counts = np.array([n for _, _, n in self.groups], np.int64)
        self.ends = np.cumsum(counts)
        bad.total += int(counts.sum())
        self.keys = np.array([digest(f"{self.name(i)}") for i in range(int(counts.sum()))], np.uint64)
        self.sizes = None
        if c.data.buckets:
            sound = [file for file in files if file.name not in bad.late]
            sizes = data.tabled(sound, "sizes", measured, "measuring images")
            self.sizes = np.concatenate([np.empty((0, 2), np.int32), *(sizes[file][0] for file in sound)])

    def at(self, i):
        k = int(np.searchsorted(self.ends, i, "right"))
        file, group, n = self.groups[k]
        return file, group, int(i - self.ends[k] + n)

    def name(self, i):
        file, group, row = self.at(i)
        return f"{file.name}: group {group} row {row}"

    def texts(self, i):
        """Its captions; of a row that has none "": `open` refuses it."""
        file, group, row = self.at(i)
        found = row_group(file, group, 1, os.getpid())[row].as_py()
        return [" ".join(t.split()) for t in (found if isinstance(found, list) else [found]) if t and t.strip()] or [""]

    def open(self, i):
        if self.texts(i) == [""]:
            raise ValueError("no caption")
        file, group, row = self.at(i)
        return picture(row_group(file, group, 0, os.getpid())[row])


def measured(path):
    """-> (width and height of each image of the file, "" or why that is not to be kept). What cannot be measured, 1 x 1, is found bad later."""
    import pyarrow.parquet as parquet
    file, sizes, why = parquet.ParquetFile(path), [], ""
    for group in range(file.num_row_groups):
        images = data.attempt(row_group.__wrapped__, path, group, 0, 0)
        if images is None:
            why, images = "a part cannot be read", [None] * file.metadata.row_group(group).num_rows
        sizes += [data.attempt(lambda: data.extent(picture(value))) or (1, 1) for value in images]
    return np.array(sizes, np.int32).reshape(-1, 2), why


def picture(value):
    value = value.as_py()
    return io.BytesIO(value["bytes"] if isinstance(value, dict) else value)


def columns(schema, file):
    """-> the names of the columns of images (bytes, or a struct with bytes) and of captions (a text, or a list of them)."""
    binary = lambda kind: str(kind) in ("binary", "large_binary") or str(kind).startswith("struct<") and "bytes: " in str(kind)
    image = next((f.name for f in schema if binary(f.type)), None)
    caption = next((name for name in ("caption", "captions", "text", "prompt") if name in schema.names), None)
    if not (image and caption):
        raise ValueError("want a column of image bytes and one named caption, captions, text or prompt; there are " + ", ".join(schema.names))
    return image, caption


@functools.lru_cache(maxsize=4)
def row_group(path, group, which, process):
    """One column of it, 0: the images, 1: the captions, which are read alone where all of them are wanted."""
    import pyarrow.parquet as parquet
    file = parquet.ParquetFile(path)
    name = columns(file.schema_arrow, path)[which]
    return file.read_row_group(group, columns=[name])[name]

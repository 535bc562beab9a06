"""The numbers of a checkpoint, and the pictures that two benchmarks' own scorers want.

    python evaluate.py --checkpoint=runs/emoji
    python evaluate.py --what=retrieval --n=100 --set=heldout --guidance=4 --features=path/to/vision/model
    torchrun --nproc_per_node=8 -- evaluate.py --what=fd,kid,cmmd,clip --n=30000 --data=path/to/folder --set=both
    torchrun --nproc_per_node=8 evaluate.py --geneval=evaluation_metadata.jsonl --out=out/geneval
    torchrun --nproc_per_node=8 evaluate.py --dpg=path/to/prompts --out=out/dpg

loss        validation loss, over all and by noise level
retrieval   built-in set only: sample a caption, find the real pictures nearest to the sample
fd, kid     Frechet distance and kernel distance of DINOv2 features of samples to those of real pictures
cmmd        maximum mean discrepancy of CLIP embeddings: the same with another kernel, steady with fewer pictures
clip        CLIP score: 100 cos(picture, prompt)

fd to clip: the captions of n real pictures are the prompts, sample i has seed --seed + i. (The -- keeps torchrun from taking --n
for an option of its own.) The pictures that a scorer wants are spread over the ranks; the same command goes on where it was.
GenEval: OUT/00000/metadata.jsonl, OUT/00000/samples/0000.png to 0003.png; DPG-Bench: OUT/<prompt's file>.png, four in a square.
"""
import dataclasses, hashlib, json, math
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import cluster, configs, data, flow, pretrained, sources
from model import unpatchify
from sample import calls, generate, one_line, open_checkpoint, options, save_png, settings


def share():
    """(rank, world)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def summed(x, device):
    """The sum over the ranks, on the CPU."""
    if dist.is_initialized():
        dist.all_reduce(x := x.to(device))
    return x.cpu()


def say_cut(tokenize, texts, what="prompts"):
    """Says on the first rank how many of the texts are not read to their end, if any."""
    line = "" if share()[0] else pretrained.cut_line(tokenize, texts, what)
    if line:
        print(line)


def bar(**options):
    return tqdm(leave=False, disable=True if share()[0] else None, **options)


# ------------------------------------------------------------------------------------------------------------------
# Validation loss

BINS = 10
GOLDEN = (math.sqrt(5) - 1) / 2


@torch.no_grad()
def validation_loss(model, c, tokenize, encode, dataset, n, rank=0, world=1, device="cpu", vae=None):
    """-> {"loss", "bins": of ten equal ranges of t, "images"}, the same on every rank.

    The squared error of the velocity on the first n items of a fixed order, canonical captions, dense. Item i has noise
    from its own seed and its own t: evenly spread (multiples of the golden ratio) over [0.05, 1] and not drawn as in training,
    so that recipes with different laws of t, and x- and v-prediction, compare."""
    sums = torch.zeros(2, BINS, dtype=torch.float64)
    for m, batch in zip(count(rank, world), data.fixed_batches(dataset, tokenize, n, c.train.micro_batch, rank, world)):
        batch = {k: v.to(device) for k, v in batch.items() if torch.is_tensor(v)}
        x, text, mask = batch.get("latent"), batch.get("text"), batch["mask"]                            # prepared, or else:
        if x is None:
            x = batch["image"].float() / 127.5 - 1
            x = vae.encode(x) if vae else x
        if text is None:
            text = batch["ids"] if encode is None else encode(batch["ids"], mask)
        items = [m * c.train.micro_batch + i for i in range(len(x))]
        u = torch.tensor([(i + 0.5) * GOLDEN % 1 for i in items], dtype=torch.float64)
        t = (flow.T_MIN + (1 - flow.T_MIN) * u).float().to(device)
        x = x.float()
        eps = c.flow.noise * flow.noise(items, x.shape[1:]).to(device)
        z = flow.interpolate(x, eps, t)
        out, _ = model(z, t, text, mask)
        loss = flow.loss(c.flow.prediction, unpatchify(out, c.model.patch, *x.shape[2:]), x, eps, t)   # (B,)
        sums[0].index_add_(0, (u * BINS).long(), loss.cpu().double())
        sums[1].index_add_(0, (u * BINS).long(), torch.ones(len(items), dtype=torch.float64))
    total, images = summed(sums, device).tolist()
    bins = [a / b if b else None for a, b in zip(total, images)]
    return {"loss": sum(total) / sum(images), "bins": bins, "images": int(sum(images))}


# ------------------------------------------------------------------------------------------------------------------
# Samples

BATCH = 64


def samples(model, c, tokenize, encode, asked, desc, vae=None):
    """Yields the pictures of [(seed, prompt)], a part of them at a time: (part, uint8 (b, 3, H, W))."""
    with bar(total=calls(c, len(asked), BATCH), unit="step", desc=desc) as steps:
        for i in range(0, len(asked), BATCH):
            seeds, prompts = zip(*asked[i:i + BATCH])
            yield asked[i:i + BATCH], generate(model, c, tokenize, encode, list(prompts), list(seeds), steps.update, vae=vae)


# ------------------------------------------------------------------------------------------------------------------
# Retrieval

def pixels(images):
    """uint8 (B, 3, H, W) -> (B, 3 H W) in float64, in which squared distances of bytes are exact: equal pictures tie."""
    return images.flatten(1).cpu().double()


def vision(name, c, device):
    """The mean patch token of a transformers vision model, of length 1: squared distance is 2 - 2 cosine."""
    exact = dataclasses.replace(c.train, precision="fp32")
    encode = pretrained.teacher(dataclasses.replace(c, align=configs.Align(teacher=name), train=exact), device)
    return lambda images: torch.nn.functional.normalize(encode(images.float() / 127.5 - 1).mean(1), dim=-1)


def distances(images, dataset, gallery, feature, chunk=128):
    """Squared distances of pictures (n, 3, H, W) to the renderings of all (emoji, background) in `gallery`. -> (n, G)"""
    mine = torch.cat([feature(part) for part in images.split(chunk)])                                     # (n, D)
    parts = []
    for i in bar(iterable=range(0, len(gallery), chunk), desc="gallery"):
        real = feature(torch.from_numpy(np.stack([dataset.render(e, b) for e, b in gallery[i:i + chunk]])))
        parts.append(mine.square().sum(1, keepdim=True) + real.square().sum(1) - 2 * mine @ real.T)
    return torch.cat(parts, 1).cpu()


def rank_of(right, group, distance):
    """How many groups of gallery pictures are nearer than the right one; a group is as near as its nearest picture.
    right (n,), group (G,), distance (n, G) -> (n,)"""
    nearest = distance.new_full((len(distance), int(group.max()) + 1), torch.inf)
    nearest = nearest.scatter_reduce(1, group.expand_as(distance), distance, "amin")                      # (n, groups)
    return (nearest < nearest.gather(1, right[:, None])).sum(1)


def score(images, pairs, dataset, gallery, feature):
    """Shares of the pictures, made for `pairs`, that come back as what they should show."""
    distance = distances(images, dataset, gallery, feature)
    emoji, background = torch.tensor(gallery).T
    right_emoji, right_background = torch.tensor(pairs).T
    where = {pair: i for i, pair in enumerate(gallery)}
    emoji = rank_of(right_emoji, emoji, distance)
    background = rank_of(right_background, background, distance)
    pair = rank_of(torch.tensor([where[p] for p in pairs]), torch.arange(len(gallery)), distance)
    share = lambda hit: hit.double().mean().item()
    return {"emoji top-1": share(emoji < 1), "emoji top-5": share(emoji < 5), "background": share(background < 1),
            "both top-1": share(pair < 1), "both top-5": share(pair < 5), "captions": len(pairs)}


def retrieval(model, c, tokenize, encode, train, val, n=200, sets=("seen", "heldout"), seed=0, feature=pixels, vae=None):
    """Sample the captions of n pairs of each set once, every picture from a seed of its own, and look for the nearest ones
    among all (emoji, background) renderings, those of held-out pairs included.

    emoji top-k     the right emoji is among the k nearest emoji, on whatever backgrounds
    background      the nearest picture has the right background
    both top-k      the right pair is among the k nearest pictures
    A right answer that is as near as a wrong one wins (some drawings are byte for byte the same). `chance`: a random guess."""
    gallery = sorted(train.pairs + val.pairs)
    size = len(gallery)
    emoji, backgrounds = len({e for e, _ in gallery}), len({b for _, b in gallery})
    results, first = {}, seed
    for name in sets:
        pairs = {"seen": train, "heldout": val}[name].pairs
        pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:n]]
        asked = [(first + i, train.caption(e, b)) for i, (e, b) in enumerate(pairs)]
        rank, world = share()
        images = torch.zeros(len(pairs), 3, c.model.size, c.model.size, dtype=torch.uint8)
        for part, some in samples(model, c, tokenize, encode, asked[rank::world], name, vae):
            images[[seed - first for seed, _ in part]] = some
        images = summed(images, next(model.parameters()).device)
        first += len(pairs)
        results[name] = score(images, pairs, train, gallery, feature)
    results["chance"] = {"emoji top-1": 1 / emoji, "emoji top-5": min(1, 5 / emoji), "background": 1 / backgrounds,
                         "both top-1": 1 / size, "both top-5": min(1, 5 / size), "captions": 0}
    return results


# ------------------------------------------------------------------------------------------------------------------
# Features of pictures. Every network sees right-side-up bytes at its own size, with its own mean and deviation, in fp32.

def resized(images, size, device):
    """uint8 pictures (3, H, W), of whatever shapes -> (B, 3, size, size), numbers from 0 to 255: as Pillow's bicubic filter gives
    them. What is not square is squeezed, as the published FD-DINOv2 and CMMD do."""
    fit = lambda x: F.interpolate(x[None].to(device).float(), (size, size), mode="bicubic", antialias=True)
    return torch.cat([fit(x) for x in images]).clamp(0, 255).round()                    # bicubic overshoots


def dinov2(name, device, size=224):
    """-> callable: pictures -> (B, D), the CLS token after the last norm (Stein et al. 2023, "Exposing flaws of generative model
    evaluation metrics": DINOv2 ViT-L/14 at 224 pixels)."""
    config = pretrained.configuration(name, "--dinov2")
    if not config.model_type.startswith("dino") or not isinstance(patch := getattr(config, "patch_size", None), int) or size % patch:
        configs.fail(f"--dinov2={name} is a {config.model_type}, not a DINO that sees {size} pixels")
    model, options, mean, std = pretrained.looker(name, "--dinov2", config, device, dtype=torch.float32)

    @torch.no_grad()
    def encode(images):
        return model(pixel_values=(resized(images, size, device) / 255 - mean) / std, **options).last_hidden_state[:, 0].cpu()
    encode.dim, encode.mark = config.hidden_size, mark(model, config.to_json_string(), size, mean, std)
    return encode


def clip(name, device):
    """-> callable: pictures -> (B, D); its .read: texts -> (B, D). Both in the common space, of length 1."""
    from transformers import AutoTokenizer
    config = pretrained.configuration(name, "--clip")
    if config.model_type != "clip":
        configs.fail(f"--clip={name} is a {config.model_type}, not a CLIP of pictures and text")
    size, length = config.vision_config.image_size, config.text_config.max_position_embeddings            # 77
    model, _, mean, std = pretrained.looker(name, "--clip", config, device, dtype=torch.float32)
    own = pretrained.from_hub(AutoTokenizer, name, "--clip", padding_side="right")
    tokenize = pretrained.own_tokenizer(own, length)
    unit = lambda out: F.normalize(out.pooler_output, dim=-1).cpu()

    @torch.no_grad()
    def encode(images):
        return unit(model.get_image_features((resized(images, size, device) / 255 - mean) / std))

    @torch.no_grad()
    def read(texts):
        ids, mask = tokenize(texts)
        return unit(model.get_text_features(ids.to(device), mask.to(device).long()))
    encode.dim, encode.mark, encode.read = config.projection_dim, mark(model, config.to_json_string(), size, mean, std), read
    encode.tokenize = tokenize
    return encode


def mark(model, *about):
    """A checksum of a network and what it is shown: its kind; the name, shape and first numbers of every weight."""
    total = hashlib.sha256(repr((type(model).__name__, "bicubic", [x.tolist() if torch.is_tensor(x) else x for x in about])).encode())
    for key, value in model.state_dict().items():
        total.update(f"{key} {tuple(value.shape)} {value.flatten()[:16].tolist()}".encode())
    return total.hexdigest()


def measure(networks, keep, pictures, n, device):
    """{name: encode}; pictures of this rank as (their numbers, images) -> {name: {"mean": (D,), "cov": (D, D), "rows": (n, D)}} of
    the n pictures of all ranks: mean and covariance in float64 and without a matrix of features, which only `keep` keep."""
    found = {name: {"mean": torch.zeros(f.dim, dtype=torch.float64), "cov": torch.zeros(f.dim, f.dim, dtype=torch.float64),
                    **({"rows": torch.zeros(n, f.dim)} if name in keep else {})} for name, f in networks.items()}
    for numbers, images in pictures:
        for name, encode in networks.items():
            x, sums = encode(images).double(), found[name]
            sums["mean"] += x.sum(0)
            sums["cov"] += x.T @ x
            if name in keep:
                sums["rows"][numbers] = x.float()
    for sums in found.values():
        for key in sums:
            sums[key] = summed(sums[key], device)
        sums["mean"] /= n
        sums["cov"] = (sums["cov"] - n * torch.outer(sums["mean"], sums["mean"])) / (n - 1)
    return found


# ------------------------------------------------------------------------------------------------------------------
# The real pictures, whose features are kept beside the data

def real(dataset, index, vae):
    """Yields this rank's share of the items at `index`: (numbers, uint8 pictures). Latents are decoded."""
    rank, world = share()
    numbers = [*range(rank, len(index), world)]
    for i in bar(iterable=range(0, len(numbers), BATCH), desc="real pictures", unit="batch"):
        yield numbers[i:i + BATCH], [picture_of(dataset, index[j], vae) for j in numbers[i:i + BATCH]]
        dataset.bad.note()                                      # a broken picture gave way to its neighbour: say so, and stop if they are many


def stored(dataset, i):
    """The picture, or the latent that stands for it."""
    item, _ = dataset.get(i, 0)
    return item["latent" if "latent" in item else "image"] if isinstance(item, dict) else torch.from_numpy(item)


def picture_of(dataset, i, vae):
    x = stored(dataset, i)
    return x if x.dtype == torch.uint8 else ((vae.decode(x[None])[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()


def reference(networks, keep, dataset, index, captions, vae, home, device):
    """`measure` of the real pictures. What was measured before is read from `home`, on the first rank only. The files know their
    pictures by all captions and some sixteen of the pictures themselves."""
    rank, world = share()
    some = [stored(dataset, i).numpy().tobytes() for i in index[::1 + len(index) // 16]]
    items = hashlib.sha256(repr((captions, len(dataset), some, vae and mark(vae.model))).encode()).hexdigest()
    files = {name: home / f"{name}-{len(index)}.safetensors" for name in networks}
    marks = {name: f"{items} {encode.mark}" for name, encode in networks.items()}
    found = {name: read_features(files[name], marks[name], name in keep) if rank == 0 else None for name in networks}
    have = cluster.together(world, lambda: [name for name in networks if found[name]])[0]
    lacking = {name: encode for name, encode in networks.items() if name not in have}
    if lacking:
        made = measure(lacking, keep, real(dataset, index, vae), len(index), device)
        for name in lacking if rank == 0 else ():
            write_features(files[name], marks[name], made[name])
        found |= made
    return found


def read_features(path, mark, rows):
    """What `write_features` wrote; None where there is none, or where it is of others, damaged or without the rows."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            about, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}
        if about.get("mark") != mark:
            why = "is of other pictures or of another network"
        elif about.get("sha256") != content(tensors):
            why = "does not match its checksum"
        else:
            why = "lacks the single features" if rows and "rows" not in tensors else ""
    except (OSError, SafetensorError) as error:
        why = f"cannot be read ({' '.join(str(error).split())[:100]})"
    if why:
        print(f"{path} {why}: made again")
    return None if why else tensors


def write_features(path, mark, tensors):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with sources.atomic(path) as part:
            save_file(tensors, part, {"mark": mark, "sha256": content(tensors)})
    except (OSError, SafetensorError) as error:
        print(f"{path} cannot be written ({' '.join(str(error).split())[:100]}): the next evaluation measures the real pictures again")


def content(tensors):
    total = hashlib.sha256()
    for key in sorted(tensors):
        total.update(tensors[key].contiguous().numpy())
    return total.hexdigest()


# ------------------------------------------------------------------------------------------------------------------
# Distances of two sets of features, in float64

def frechet(a, b):
    """Of two Gaussians: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1^1/2 C2 C1^1/2)^1/2), by the roots of symmetric matrices only."""
    values, vectors = torch.linalg.eigh(a["cov"])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    middle = torch.linalg.eigvalsh(root @ b["cov"] @ root).clamp(min=0).sqrt().sum()
    return ((a["mean"] - b["mean"]).square().sum() + a["cov"].trace() + b["cov"].trace() - 2 * middle).item()


def cubic(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x, y, sigma=10):
    squares = x.square().sum(1, keepdim=True) + y.square().sum(1) - 2 * x @ y.T
    return torch.exp(-squares.clamp(min=0) / (2 * sigma ** 2))


def mmd(kernel, x, y, chunk=2048):
    """Squared maximum mean discrepancy of x (n, D) and y (m, D) -> (unbiased, biased: a picture's likeness to itself counts too).
    A block of the kernel's matrix at a time."""
    def total(x, y):
        return sum(kernel(a, b).sum().item() for a in x.split(chunk) for b in y.split(chunk))
    x, y, n, m = x.double(), y.double(), len(x), len(y)
    own = lambda x: sum(kernel(a, a).diagonal().sum().item() for a in x.split(chunk))
    xx, yy, xy = total(x, x), total(y, y), 2 * total(x, y) / (n * m)
    return (xx - own(x)) / (n * (n - 1)) + (yy - own(y)) / (m * (m - 1)) - xy, xx / n ** 2 + yy / m ** 2 - xy


def kid(x, y, size=1000, times=100):
    """Mean and standard deviation of the unbiased MMD^2 with the cubic kernel over random subsets (Binkowski et al. 2018); of too
    few pictures for two different subsets, of all of them."""
    g, times = torch.Generator().manual_seed(0), times if len(x) > size else 1
    some = lambda x: x[torch.randperm(len(x), generator=g)[:size]]
    found = [mmd(cubic, some(x), some(y))[0] for _ in bar(iterable=range(times), desc="kid")]
    return {"mean": float(np.mean(found)), "std": float(np.std(found)) if times > 1 else None, "subsets": times, "size": min(size, len(x))}


def clip_score(images, texts):
    return 100 * (images.double() * texts.double()).sum(1).clamp(min=0).mean().item()


# ------------------------------------------------------------------------------------------------------------------
# Samples against real pictures

NEEDS = {"fd": "dinov2", "kid": "dinov2", "cmmd": "clip", "clip": "clip"}
ENOUGH = {"fd": 10_000, "kid": 1_000, "cmmd": 1_000, "clip": 100}                       # fewer pictures, and the number says little


def against_real(model, c, tokenize, encode, dataset, networks, what, n, seed, home, vae=None):
    """The numbers among fd, kid, cmmd and clip that `what` asks for, on the first rank; the others help."""
    rank, world = share()
    device = next(model.parameters()).device
    if len(dataset) < 2:
        configs.fail("fd, kid, cmmd and clip need two real pictures at least: try --set=both")
    index = data.first_items(dataset, n)
    captions = [dataset.captions(item)[0] for item in index]
    n, keep = len(index), {NEEDS[key] for key in what if key in ("kid", "cmmd", "clip")}
    theirs = reference(networks, keep, dataset, index, captions, vae, home, device)
    asked = [(seed + i, captions[i]) for i in range(rank, n, world)]
    drawn = samples(model, c, tokenize, encode, asked, "samples", vae)
    ours = measure(networks, keep, (([s - seed for s, _ in part], images) for part, images in drawn), n, device)
    found = {"pictures": n, "of": len(dataset), "decoded": stored(dataset, index[0]).dtype != torch.uint8}
    if "clip" in what:
        texts = torch.zeros(n, networks["clip"].dim)
        for i in range(rank * BATCH, n, world * BATCH):
            texts[i:i + BATCH] = networks["clip"].read(captions[i:i + BATCH])
        texts = summed(texts, device)
    if rank:
        return found
    if "fd" in what:
        found["fd"] = frechet(ours["dinov2"], theirs["dinov2"])
    rows = lambda name: (side[name]["rows"].to(device if device.type == "cuda" else "cpu") for side in (ours, theirs))
    if "kid" in what:
        found["kid"] = kid(*rows("dinov2"))
    if "cmmd" in what:
        found["cmmd"] = dict(zip(("unbiased", "biased"), (1000 * value for value in mmd(gaussian, *rows("clip")))))
    if "clip" in what:
        found["clip"] = {"samples": clip_score(ours["clip"]["rows"], texts), "real": clip_score(theirs["clip"]["rows"], texts)}
    return found


# ------------------------------------------------------------------------------------------------------------------
# Pictures for the scorers of others: four of each prompt

def geneval(path):
    """The lines of evaluation_metadata.jsonl -> [(prompt, folder, line)]."""
    found = []
    for i, line in enumerate(read_text(path, "--geneval").strip().split("\n")):
        prompt = sources.attempt(lambda line: json.loads(line)["prompt"], line)
        if not isinstance(prompt, str):
            configs.fail(f"--geneval={path}: line {i + 1} is no JSON object with a prompt")
        found.append((prompt, f"{i:05d}", line))
    return found


def dpg(folder):
    """A folder of prompts, *.txt -> [(prompt, name, none)]."""
    files = sorted(Path(folder).glob("*.txt")) or configs.fail(f"--dpg={folder} has no *.txt: want DPG-Bench's folder dpg_bench/prompts")
    return [(read_text(file, "--dpg").strip(), file.stem, None) for file in files]


def read_text(path, flag):
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        configs.fail(f"{flag}: cannot read {path}: {getattr(error, 'strerror', None) or error}")


def there(path, prompt, seed, made):
    """Whether this very picture is there. Another one in its place ends the program: two models must not be mixed."""
    if not path.exists():
        return False
    with Image.open(path) as image:
        about = image.info
    if [about.get(key) for key in ("prompt", "seed", "settings")] != [prompt, str(seed), json.dumps(made)]:
        configs.fail(f"{path} is of another prompt, checkpoint or setting: name another --out")
    return True


def benchmark(model, c, tokenize, encode, jobs, out, made, seed=0, vae=None):
    """Picture j of prompt i has seed `seed` + 4 i + j. `jobs`: of `geneval` or `dpg`. -> how many prompts were drawn, by all ranks"""
    rank, world = share()
    files = {i: [out / name / "samples" / f"{j:04d}.png" for j in range(4)] if line else [out / f"{name}.png"] for i, (_, name, line) in enumerate(jobs)}
    done = lambda i: all([there(path, jobs[i][0], seed + 4 * i + j, made) for j, path in enumerate(files[i])])
    todo = sorted(sum(cluster.together(world, lambda: [i for i in range(rank, len(jobs), world) if not done(i)]), []))
    asked = [(seed + 4 * i + j, jobs[i][0]) for i in todo[rank::world] for j in range(4)]
    for part, images in samples(model, c, tokenize, encode, asked, f"{len(todo)} prompts", vae):
        for (first, prompt), four in zip(part[::4], images.split(4)):
            i = (first - seed) // 4
            _, name, line = jobs[i]
            square = [torch.cat([torch.cat([*four[:2]], 2), torch.cat([*four[2:]], 2)], 1)]                # as the scorer cuts it
            files[i][0].parent.mkdir(parents=True, exist_ok=True)
            if line:
                with sources.atomic(out / name / "metadata.jsonl") as whole:
                    whole.write_text(line + "\n", "utf-8")
            for j, (path, image) in enumerate(zip(files[i], four if line else square)):
                with sources.atomic(path) as whole:
                    save_png(image, whole, prompt, first + j, made)
    return len(todo)


# ------------------------------------------------------------------------------------------------------------------

def show_loss(found):
    print(f"validation loss {found['loss']:.4f} ({found['images']} pictures); by t:")
    edges = [flow.T_MIN + (1 - flow.T_MIN) * i / BINS for i in range(BINS)]
    print("  from t  " + " ".join(f"{t:8.2f}" for t in edges))
    print("  loss    " + " ".join("       -" if b is None else f"{b:8.4f}" for b in found["bins"]))


def show_retrieval(found, features):
    columns = [key for key in found["chance"] if key != "captions"]
    print(f"retrieval by {features}    " + "  ".join(columns))
    for name, row in found.items():
        print(f"  {name:9} {row['captions'] or '':>4}" + "  ".join(f"{100 * row[key]:{len(key) - 1}.1f}%" for key in columns))


def show_distances(found, networks, home):
    n = found["pictures"]
    decoded = ", decoded from their latents" if found["decoded"] else ""
    print(f"{n} samples against as many of {found['of']} real pictures{decoded}; features of these in {home}")
    for key in (key for key in ENOUGH if key in found):
        value, name = found[key], networks[NEEDS[key]]
        text = {"fd": lambda: f"FD {value:.3f}",
                "kid": lambda: f"KID {value['mean']:.5f}" + (f" +- {value['std']:.5f}" if value["std"] is not None else ""),
                "cmmd": lambda: f"CMMD {value['biased']:.3f} (unbiased {value['unbiased']:.3f})",
                "clip": lambda: f"CLIP score {value['samples']:.2f} (the real pictures: {value['real']:.2f})"}[key]()
        few = f"; {n} pictures are few for it, {ENOUGH[key]:,} usual: compare at equal numbers only" if n < ENOUGH[key] else ""
        print(f"  {text}, by {name}{few}")


WHAT = ("loss", "retrieval", *NEEDS)


def main():
    parser = options(__doc__)
    add = parser.add_argument
    add("--what", help="some of " + ",".join(WHAT) + " (default: loss, and retrieval of the built-in set)")
    add("--data", help="other pictures to compare with: a folder, tars, shards, ... (default: those of the training)")
    add("--n", type=int, help="captions of each set for retrieval (default: 200); pictures for fd to clip (default: 10000, or all there are)")
    add("--set", choices=("seen", "heldout", "both"), help="items trained on, or not (default: both for retrieval, held out for fd to clip)")
    add("--seed", type=int, default=0, help="of retrieval's choice of captions, and of the first picture (default: 0)")
    add("--features", default="pixels", help="for retrieval: or hub id or folder of a transformers vision model (default: pixels)")
    add("--dinov2", default="facebook/dinov2-large", help="for fd and kid: hub id or folder (default: facebook/dinov2-large)")
    add("--clip", default="openai/clip-vit-large-patch14-336", help="for cmmd and clip: hub id or folder (default: openai/clip-vit-large-patch14-336)")
    add("--geneval", help="evaluation_metadata.jsonl: draw four pictures of each of its prompts into the folder --out")
    add("--dpg", help="folder of DPG-Bench's prompts, *.txt: draw a square of four of each into the folder --out")
    add("--out", help="file for the numbers (default: out/evaluation.json), or folder for the pictures (out/geneval, out/dpg)")
    args = parser.parse_args()
    what = args.what.split(",") if args.what else []
    if unknown := set(what) - set(WHAT):
        configs.fail(f"--what is some of {','.join(WHAT)}; not {', '.join(sorted(unknown))!r}")
    if args.n is not None and args.n < (2 if set(what) & set(NEEDS) else 1) or not 0 <= args.seed < 2 ** 62:
        configs.fail("--n must be above zero (two or more for fd to clip), --seed zero or more")
    if args.geneval and args.dpg or (args.geneval or args.dpg) and what:
        configs.fail("give one of --what, --geneval and --dpg")
    rank, world, device = cluster.start()
    torch.set_float32_matmul_precision("highest")           # TF32 would move the distances of features
    torch.backends.cudnn.allow_tf32 = False
    if world > 1 and args.device and torch.device(args.device).type != device.type:
        configs.fail(f"--device={args.device}: under torchrun each rank has its own {device.type}")
    with one_line("try --device=cpu"):
        if args.geneval or args.dpg:
            draw(args, rank)
        else:
            numbers(args, what, rank, world)
    cluster.leave(world)


def draw(args, rank):
    jobs = geneval(args.geneval) if args.geneval else dpg(args.dpg)
    out = Path(args.out or ("out/geneval" if args.geneval else "out/dpg"))
    out.mkdir(parents=True, exist_ok=True)
    path, model, c, tokenize, encode, vae = open_checkpoint(args)
    say_cut(tokenize, [prompt for prompt, _, _ in jobs])
    drawn = benchmark(model, c, tokenize, encode, jobs, out, settings(c, path, args), args.seed, vae)
    if rank == 0:
        print(f"{path}\n{out}: {len(jobs)} prompts, {drawn} of them drawn now, {len(jobs) - drawn} before")


def numbers(args, what, rank, world):
    out = Path(args.out or "out/evaluation.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    path, model, c, tokenize, encode, vae = open_checkpoint(args)
    c = configs.override(c, "data.source", args.data) if args.data else c
    device = next(model.parameters()).device
    what = what or (["loss", "retrieval"] if c.data.source == "emoji" else ["loss"])
    if "retrieval" in what and c.data.source != "emoji":
        configs.fail("retrieval needs the built-in emoji set; --what=loss works on any")
    names = {NEEDS[key]: getattr(args, NEEDS[key]) for key in what if key in NEEDS}
    networks = {key: {"dinov2": dinov2, "clip": clip}[key](name, device) for key, name in names.items()}
    train, val = data.load(c)
    found = {**settings(c, path, args), "seed": args.seed, "data": c.data.source}
    if rank == 0:
        print(path)
    if "loss" in what or "retrieval" in what:
        say_cut(tokenize, data.some_captions(val, 2000), "captions")
    if "loss" in what:
        found["loss"] = validation_loss(model, c, tokenize, encode, val, c.train.val_images, rank, world, device, vae)
        if rank == 0:
            show_loss(found["loss"])
    if "retrieval" in what:
        feature = pixels if args.features == "pixels" else vision(args.features, c, device)
        sets = (args.set,) if args.set in ("seen", "heldout") else ("seen", "heldout")
        found["features"] = args.features
        found["retrieval"] = retrieval(model, c, tokenize, encode, train.emoji, val.emoji, args.n or 200, sets, args.seed, feature, vae)
        if rank == 0:
            show_retrieval(found["retrieval"], args.features)
    if networks:
        source = Path(c.data.source).expanduser().resolve()
        home = source.with_name(source.name + ".features") if source.exists() else out.parent / "features"
        dataset = {"seen": train, "both": train.both()}.get(args.set, val)
        captions = [dataset.captions(item)[0] for item in data.first_items(dataset, args.n or 10_000)]
        say_cut(tokenize, captions, "captions")
        if "clip" in what:
            say_cut(networks["clip"].tokenize, captions, "captions, as --clip reads them,")
        found |= against_real(model, c, tokenize, encode, dataset, networks, what, args.n or 10_000, args.seed, home, vae)
        found["networks"] = names
        if rank == 0:
            show_distances(found, names, home)
    if rank == 0:
        out.write_text(json.dumps(found, indent=2) + "\n")
        print(out)


if __name__ == "__main__":
    main()

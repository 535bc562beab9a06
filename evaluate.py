"""The numbers of a checkpoint: validation loss, and whether its pictures are of what was asked for.

    python evaluate.py --checkpoint=runs/emoji
    python evaluate.py --what=retrieval --n=100 --set=heldout --guidance=4 --features=path/to/vision/model

Retrieval (built-in set only): sample a caption, find the real pictures nearest to the sample. See `retrieval`.
"""
import dataclasses, json, math
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import configs, data, flow, pretrained
from model import unpatchify
from sample import calls, generate, one_line, open_checkpoint, options, settings


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
        sums[0].index_add_(0, (u * BINS).long(), loss.double().cpu())
        sums[1].index_add_(0, (u * BINS).long(), torch.ones(len(items), dtype=torch.float64))
    if dist.is_initialized():
        sums = sums.to(device)
        dist.all_reduce(sums)
    total, images = sums.tolist()
    bins = [a / b if b else None for a, b in zip(total, images)]
    return {"loss": sum(total) / sum(images), "bins": bins, "images": int(sum(images))}


# ------------------------------------------------------------------------------------------------------------------
# Retrieval

def pixels(images):
    """uint8 (B, 3, H, W) -> (B, 3 H W) in float64, in which squared distances of bytes are exact: equal pictures tie.
    Scaled so that they are mean squared differences, of values from 0 to 1."""
    return images.flatten(1).cpu().double() / (255 * math.sqrt(images[0].numel()))


def vision(name, c, device):
    """The mean patch token of a transformers vision model, of length 1: squared distance is 2 - 2 cosine."""
    encode = pretrained.teacher(dataclasses.replace(c, align=configs.Align(teacher=name)), device)
    return lambda images: torch.nn.functional.normalize(encode(images.float() / 127.5 - 1).mean(1), dim=-1)


def distances(images, dataset, gallery, feature, chunk=128):
    """Squared distances of pictures (n, 3, H, W) to the renderings of all (emoji, background) in `gallery`. -> (n, G)"""
    mine = torch.cat([feature(part) for part in images.split(chunk)])                                     # (n, D)
    parts = []
    for i in tqdm(range(0, len(gallery), chunk), desc="gallery", leave=False, disable=None):
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
        captions = [train.caption(e, b) for e, b in pairs]
        with tqdm(total=calls(c, len(pairs)), unit="step", desc=name, leave=False, disable=None) as bar:
            images = generate(model, c, tokenize, encode, captions, [*range(first, first + len(pairs))], bar.update, vae=vae)
        first += len(pairs)
        results[name] = score(images, pairs, train, gallery, feature)
    results["chance"] = {"emoji top-1": 1 / emoji, "emoji top-5": min(1, 5 / emoji), "background": 1 / backgrounds,
                         "both top-1": 1 / size, "both top-5": min(1, 5 / size), "captions": 0}
    return results


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


def main():
    parser = options(__doc__)
    add = parser.add_argument
    add("--what", default="loss,retrieval", help="which numbers (default: loss,retrieval)")
    add("--n", type=int, default=200, help="captions of each set for retrieval (default: 200)")
    add("--set", default="both", choices=("seen", "heldout", "both"), help="pairs trained on, or not (default: both)")
    add("--seed", type=int, default=0, help="of the choice of captions, and of the first picture (default: 0)")
    add("--features", default="pixels", help="or hub id or folder of a transformers vision model (default: pixels)")
    add("--out", default="out/evaluation.json")
    args = parser.parse_args()
    what = args.what.split(",")
    if unknown := set(what) - {"loss", "retrieval"}:
        configs.fail(f"--what is loss, retrieval or loss,retrieval; not {', '.join(sorted(unknown))!r}")
    if args.n < 1 or not 0 <= args.seed < 2 ** 62:
        configs.fail("--n must be above zero, --seed zero or more")
    with one_line("try --device=cpu"):
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        path, model, c, tokenize, encode, vae = open_checkpoint(args)
        device = next(model.parameters()).device
        if "retrieval" in what and c.data.source != "emoji":
            configs.fail("retrieval needs the built-in emoji set; --what=loss works on any")
        train, val = data.load(c)
        found = {**settings(c, path, args), "seed": args.seed}
        print(path)
        if "loss" in what:
            found["loss"] = validation_loss(model, c, tokenize, encode, val, c.train.val_images, device=device, vae=vae)
            show_loss(found["loss"])
        if "retrieval" in what:
            feature = pixels if args.features == "pixels" else vision(args.features, c, device)
            sets = ("seen", "heldout") if args.set == "both" else (args.set,)
            found["features"] = args.features
            found["retrieval"] = retrieval(model, c, tokenize, encode, train, val, args.n, sets, args.seed, feature, vae)
            show_retrieval(found["retrieval"], args.features)
        Path(args.out).write_text(json.dumps(found, indent=2) + "\n")
        print(args.out)


if __name__ == "__main__":
    main()

"""What a run will take, before it is launched: parameters, FLOPs, memory, traffic, hours and dollars. No GPU, no download.

    python train.py --config=prx_512 --plan                          # 32 GPUs, H200, 40% of their peak
    python train.py --config=nitro_1024 --plan --gpus=64 --device=mi300x --mfu=0.3 --price=2.5
    python train.py --config=prx_512 --plan --rate=150                # with a measured number of images/s on a GPU

Own flags: --gpus, --device (a100, h100, h200, b200, mi300x), --mfu (share of the peak that a step reaches), --rate (images/s a
GPU, in place of device and mfu), --price (dollars a GPU-hour), --tokens (real tokens of a mean caption), --gbps (network, a GPU).

FLOPs are twice the multiply-adds: of the denoiser by the formula of model.flops, of frozen networks by PyTorch's counter on
models without storage. A training step is three forwards of the denoiser, one of what is frozen, three of a perceptual network
(the prediction forward and back to the pixels, the image forward). All are matrix products; the rest of a step is memory traffic,
which is why no one reaches the peak: --mfu is an assumption, --rate a measurement.
"""
import math
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch.utils.flop_counter import FlopCounterMode

import configs, muon, pretrained
from model import Denoiser, flops

PEAK = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12, "mi300x": 1307e12}               # dense bf16, by the vendors
NODE = 8                                                                                                  # GPUs
NVLINK = 450e9                                                                                            # bytes a second and direction; MI300X: 448
PUBLISHED = {
    "nitro_512": "AMD: 440 GPU-hours of MI300X (129 images/s a GPU)",
    "nitro_1024": "AMD: 522 GPU-hours of MI300X with the second stage; 254 images/s a GPU in this one",
    "nitro_1024_ft": "AMD: within the 522 GPU-hours of both stages",
    "prx_512": "Photoroom: 24 hours on 32 H200 with the second stage, 768 GPU-hours, about $1,500",
    "prx_1024": "Photoroom: within the 24 hours of both stages",
}


def counted(call):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def parts(c, tokens):
    """{part: (FLOPs of one image's training step, frozen parameters)}"""
    meta = torch.device("meta")
    image = torch.zeros(1, 3, c.model.size, c.model.size, device=meta)
    found = {"denoiser": (3 * flops(c, c.text.length if c.text.pad else tokens), 0)}

    def add(name, model, call, times=1.0):
        found[name] = times * counted(call), sum(p.numel() for p in model.parameters())
    if not (c.latent.vae and c.data.source != "emoji"):                        # else all of it ran in tools/prepare.py
        if c.text.encoder != "bpe":
            model = pretrained.text_encoder(c, meta, weights=False).model                                 # some refuse to run without storage
            size = sum(p.numel() for p in model.parameters())
            found["text"] = 2.0 * tokens * (size - model.get_input_embeddings().weight.numel()), size     # attention itself is a few percent
        if c.align.teacher:
            teacher = pretrained.teacher(c, meta, weights=False)
            add("teacher", teacher.model, lambda: teacher(image))
        if c.latent.vae:
            vae = pretrained.VAE(c, meta, weights=False)
            add("autoencoder", vae.model, lambda: vae.encode(image))
    for made in (pretrained.lpips, pretrained.dino, pretrained.effnet):
        if getattr(c.perceptual, made.__name__):
            distance = made(c, meta, weights=False)
            add(made.__name__, distance.model, lambda: distance(image, image), 1.5)         # noqa: B023 (called at once)
    return found


def activations(c, model, tokens):
    """Bytes that one image's forward keeps for its backward in bf16. What eager code keeps in fp32 besides (norms, rotations),
    compiled blocks make again."""
    kept = {}

    def keep(x):
        if x.dtype == torch.bfloat16:
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x
    z = torch.zeros(1, c.model.channels, c.model.size // c.latent.factor, c.model.size // c.latent.factor, device="meta")
    ids = None
    if c.model.route:
        ids = torch.zeros(1, max(1, round(c.model.route.keep * c.side ** 2)), dtype=torch.int64, device="meta")
    text = torch.zeros(1, tokens, c.text.dim, device="meta") if c.text.encoder != "bpe" else torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    def total(n):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            held = model(*(None if a is None else a.expand(n, *a.shape[1:]) for a in (z, torch.zeros(1, device="meta"), text, None, ids)))
        return sum(kept.values()), held
    return total(2)[0] - total(1)[0]                        # without what does not depend on the batch: casts of weights


# ------------------------------------------------------------------------------------------------------------------
# Messages between ranks

def grid(replicas, shards):
    """What the optimizer asks of a mesh, of ranks that are not here."""
    return SimpleNamespace(shape=(replicas, shards))


def banks(optimizer):
    """{(rows, columns, fused pieces): number of such matrices} that Muon has."""
    params = [p for group in optimizer.param_groups if group["kind"] == "muon" for p in group["params"]]
    return {(*bank[0].shape, optimizer.pieces(bank[0])): len(bank) for bank in optimizer.banks(params)}


def width(c):
    """Bytes of a gradient on its way."""
    return 2 if c.train.reduce == "bf16" else 4


def traffic(c, model, optimizer, micros=1):
    """[(what, collective, bytes)] that the busiest rank sends in a step, laid out on the optimizer's grid of replicas x shards. A ring of
    n sends n - 1 shares of 1/n to gather or to scatter, twice that to reduce. Tested against the sockets of real ranks."""
    r, s, sent = optimizer.replicas, optimizer.shards, optimizer.ns_dtype.itemsize
    held = {p: -(-p.shape[0] // s) * p.shape[1:].numel() for p in model.parameters()}                     # by a shard: rows, padded
    exact = {*model.align.parameters()} if model.align else {}                                            # gathered as fp32
    size, gathered = sum(held.values()), sum(n * (4 if p in exact else model.dtype.itemsize) for p, n in held.items())
    swapped, updates = 0, 0                                                                               # numbers of Muon's banks: see muon.orthogonalise
    for (rows, cols, pieces), n in banks(optimizer).items():
        split = 1
        if pieces > 1 and n % (r * s):
            swapped += 2 * n * -(-rows // s) * -(-cols // s) * s                                          # rows for columns, and back
            n, rows, split = n * pieces, rows // pieces, 2
        mine = -(-n // r)                                                                                 # of a replica, then of a rank, padded
        across, along = (rows, cols) if split == 1 else (cols, rows)
        swapped += 2 * -(-mine // s) * s * -(-across // s) * along
        updates += mine * (-(-across // s) * along)
    return [("weights", "gather", 2 * micros * (s - 1) * gathered), ("gradients", "scatter", (s - 1) * size * width(c)),
            ("gradients", "reduce", 2 * (r - 1) / r * size * width(c)), ("momentum", "exchange", (s - 1) / s * swapped * sent),
            ("updates", "share", (r - 1) * updates * sent)]


def seconds(collective, size, replicas, shards, gbps):
    """Of one message of `size` bytes. The shards are neighbours, the replicas lie `shards` ranks apart."""
    ranks, apart = (replicas, shards) if collective in ("reduce", "share") else (shards, 1)
    here, card = ranks if ranks * apart <= NODE else max(1, NODE // apart), gbps / 8 * 1e9
    if here == ranks:
        return size / NVLINK
    return max(size / NVLINK, size * (ranks - here) / (ranks - 1) / card) if collective == "exchange" else size / min(NVLINK, here * card)


def scaling(c, model, optimizer, batch, rate, gbps):
    """A step on the optimizer's grid. -> micro-batches of a rank, its traffic, seconds: of computing, of messages, of those that nothing hides."""
    images = batch / optimizer.replicas / optimizer.shards
    m = max(1, math.ceil(images / c.train.micro_batch))
    sent, step = traffic(c, model, optimizer, m), images / rate
    spent = {collective: seconds(collective, size, optimizer.replicas, optimizer.shards, gbps) for _, collective, size in sent}
    gather, forward, backward = spent["gather"] / 2 / m, step / m / 3, step / m * 2 / 3
    lost = m * max(0, gather - forward) + (m - 1) * max(0, gather - backward) + max(0, gather + spent["scatter"] + spent["reduce"] - backward)
    return m, sent, step, sum(spent.values()), lost + spent["exchange"] + spent["share"]


def plan(c, gpus=32, device="h200", mfu=0.4, rate=0.0, price=2.0, tokens=80, gbps=400.0):
    meta = torch.device("meta")
    tokens = min(tokens, c.text.length)
    if c.text.encoder != "bpe":
        c = replace(c, text=replace(c.text, dim=pretrained.text_dim(c, weights=False)))
    with meta:
        model = Denoiser(c, pretrained.teacher_dim(c, weights=False) if c.align.teacher else 0, torch.bfloat16)
    optimizer = muon.build(model, c.optim)
    count = lambda some: sum(p.numel() for p in some)
    groups = {kind: count(p for g in optimizer.param_groups if g["kind"] == kind for p in g["params"]) for kind in ("muon", "adamw")}
    total, head, own = count(model.parameters()), count(model.align.parameters()) if model.align else 0, count(model.text.parameters()) if model.text else 0
    print(f"{c.name}: {c.train.images:,} images in {c.train.images // c.train.batch:,} steps of {c.train.batch}, on {gpus} GPUs")
    print(f"\nparameters   denoiser {total - head - own:,}" + (f", own text transformer {own:,}" if own else "") + (f", REPA head {head:,}" if head else "") +
          f"\n             by optimizer: Muon {groups['muon']:,}, AdamW {groups['adamw']:,}")

    found = parts(c, tokens)
    step = sum(cost for cost, _ in found.values())
    print(f"\nTFLOP an image, captions of {tokens} tokens")
    for name, (cost, frozen) in found.items():
        print(f"  {name:12} {cost / 1e12:8.3f} {cost / step:7.1%}" + (f"   frozen, {frozen / 1e6:,.0f}M parameters" if frozen else ""))

    # memory: fp32 masters, gradients and average; momentum (Muon) and two moments (AdamW)
    own_bytes, state = total * 4 * (3 if c.optim.ema else 2), groups["muon"] * 4 + groups["adamw"] * 8
    frozen = 2 * sum(n for _, n in found.values())
    micro = activations(c, model, tokens) * c.train.micro_batch
    print(f"\nGiB a GPU    weights, gradients, average {own_bytes / 2 ** 30:.1f}; optimizer {state / 2 ** 30:.1f} (ddp; else a shard's part); "
          f"frozen {frozen / 2 ** 30:.1f}; activations about {micro / 2 ** 30:.1f} (micro-batch {c.train.micro_batch}, compiled blocks; not measured)")

    # time
    if rate:
        print(f"\nat {rate:g} images/s a GPU")
    else:
        rate = PEAK[device] * mfu / step
        print(f"\nat {mfu:.0%} of {PEAK[device] / 1e12:.0f} TFLOP/s ({device}): {rate:.0f} images/s a GPU (assumed, not measured)")
    hours = c.train.images / rate / gpus / 3600
    print(f"  {hours:.1f} hours, {hours * gpus:,.0f} GPU-hours, ${hours * gpus * price:,.0f} at ${price:g} each")
    if c.name in PUBLISHED:
        print(f"  published: {PUBLISHED[c.name]}")

    # traffic
    updates, grads, shards = optimizer.ns_dtype.itemsize, width(c), c.train.shard or NODE
    print(f"""
traffic: what a GPU sends in a step of m micro-batches; n GPUs are r replicas of s shards: ddp r = n, fsdp s = n, hsdp s = {shards}
  weights    2 m (s-1)/s x {model.dtype.itemsize} bytes a parameter, gathered for each forward and backward and hidden by them (1/3 and 2/3 of the micro-batch)
  gradients  ((s-1)/s + 2 (r-1)/r/s) x {grads} bytes, scattered to the shards, then reduced over the replicas, hidden by the last backward
  momentum   of Muon's matrices, 2 (s-1)/s/s/r x {updates} bytes: out and back, all-to-all of the shards; 2 (s-1)/s/s more for fused matrices whose
             number is no multiple of n, which are taken apart first; padded; not hidden
  updates    of Muon's matrices, (r-1)/r/s x {updates} bytes, padded to whole matrices, gathered by the replicas; not hidden
Rings go at the speed of the slowest link: NVLink, {NVLINK / 1e9:.0f} GB/s a GPU, in a node of {NODE}; between nodes {gbps:g} Gb/s for each of a
node's GPUs in the ring; an all-to-all between nodes at {gbps:g} Gb/s a GPU. All at full speed and without latency: the more GPUs and
the smaller the messages, the less of this is reached. Efficiency: the share of a step that does not wait for messages.""")
    for mode in ("ddp", "fsdp", "hsdp"):
        print(f"  {mode:4}  GPUs   m   GB sent: weights gradients momentum updates   ms: step messages waiting   efficiency")
        for n in (1, 8, 32, 256):
            s = {"ddp": 1, "fsdp": n, "hsdp": shards}[mode]
            if c.train.batch % n:
                print(f"      {n:6}   not possible: a batch of {c.train.batch} images")
            elif mode != "hsdp" or n % s == 0 and 1 < s < n:
                laid = muon.build(model, c.optim, grid(n // s, s))
                find = lambda batch: scaling(c, model, laid, batch, rate, gbps)             # noqa: B023 (called at once)
                m, sent, step, messages, lost = find(c.train.batch)
                gigabytes = "".join(f"{sum(size for name, _, size in sent if name == what) / 1e9:{w}.2f}"
                                    for what, w in (("weights", 19), ("gradients", 10), ("momentum", 9), ("updates", 8)))
                note = f"  --train.micro_batch={c.train.batch // n}" if c.train.batch // n < c.train.micro_batch else ""
                if lost > 0.05 * (step + lost):
                    enough = next((k for k in (c.train.batch * 2 ** i for i in range(1, 11)) if (row := find(k))[4] <= 0.05 * (row[2] + row[4])), 0)
                    note += f"  below 95%: {f'a batch of {enough:,} would reach it' if enough else 'no batch reaches it'}"
                print(f"      {n:6} {m:3}{gigabytes}{1000 * step:11.1f} {1000 * messages:8.1f} {1000 * lost:7.1f} {step / (step + lost):12.1%}{note}")


def main(argv):
    own = {"gpus": 32, "device": "h200", "mfu": 0.4, "rate": 0.0, "price": 2.0, "tokens": 80, "gbps": 400.0}
    given, rest = dict(own), []
    for arg in argv:
        key, _, value = arg.removeprefix("--").partition("=")
        if key in own:
            given[key] = configs.cast(value, type(own[key]), f"--{key}")
        elif key != "plan":
            rest.append(arg)
    if given["device"] not in PEAK:
        configs.fail(f"--device is one of {', '.join(PEAK)}; not {given['device']!r}")
    if wrong := [key for key in ("gpus", "mfu", "tokens", "gbps") if given[key] <= 0]:
        configs.fail(f"--{wrong[0]} must be above zero")
    plan(configs.parse(rest), **given)

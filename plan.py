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
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

import configs, muon, pretrained
from model import Denoiser, flops

PEAK = {"a100": 312e12, "h100": 989e12, "h200": 989e12, "b200": 2250e12, "mi300x": 1307e12}               # dense bf16, by the vendors
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
    if not (c.latent.vae and c.data.source != "emoji"):                        # else all of it ran in data.py prepare
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

    # memory: fp32 masters and gradients and average everywhere; momentum (Muon) and two moments (AdamW) shared by the ranks
    own_bytes, state = total * 4 * (3 if c.optim.ema else 2), (groups["muon"] * 4 + groups["adamw"] * 8) / gpus
    frozen = 2 * sum(n for _, n in found.values())
    micro = activations(c, model, tokens) * c.train.micro_batch
    print(f"\nGiB a GPU    weights, gradients, average {own_bytes / 2 ** 30:.1f}; optimizer {state / 2 ** 30:.1f} (shared by {gpus}); "
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

    # Traffic. A ring of n sends (n - 1) / n of the data to gather it, twice that to reduce it; in a node of 8 over NVLink, between
    # nodes over one network card for each GPU, which carries an eighth. Both run at once: the slower counts.
    compute = c.train.batch / gpus / rate
    grads, updates = 2 * 4 * total, 2 * groups["muon"] + 4 * groups["adamw"]                              # bytes
    print(f"\ntraffic a step with replicas (ddp): gradients, {4 * total / 1e9:.1f} GB reduced in 2 (n-1)/n passes while the backward runs (2/3 of a step); new "
          f"weights,\n{updates / 1e9:.1f} GB gathered in (n-1)/n after it; n GPUs of a node at {NVLINK / 1e9:.0f} GB/s, then n nodes at {gbps:g} Gb/s a GPU")
    for n in (1, 8, 32, 256):
        inside, nodes, work = min(n, 8), -(-n // 8), compute * gpus / n
        seconds = [size * max((inside - 1) / inside / NVLINK, (nodes - 1) / nodes / inside / (gbps / 8 * 1e9)) for size in (grads, updates)]
        lost = max(0.0, seconds[0] - 2 / 3 * work) + seconds[1]
        note = f"   not possible: {c.train.batch // c.train.micro_batch} micro-batches" if n > c.train.batch // c.train.micro_batch else ""
        print(f"  {n:4} GPUs: step {1000 * work:8.1f} ms, reduce {1000 * seconds[0]:5.1f} ms, gather {1000 * seconds[1]:5.1f} ms: "
              f"efficiency {work / (work + lost):.1%}{note}")


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

"""Train a recipe. The same command resumes an interrupted run; Ctrl-C and SIGTERM save first.

    python train.py                                                 # the `emoji` recipe, on whatever the machine has
    python train.py --config=emoji --data=path/to/images --out=runs/mine
    torchrun --nproc_per_node=8 train.py --config=prx_512 --data=path/to/images
    python train.py --bench=emoji                                   # where the time of a step goes (or --bench=all)
    python train.py --config=prx_512 --plan                         # what it will take: FLOPs, memory, hours, dollars
    python train.py --help
"""
import os
import sys

# Read once, by import torch. Idle threads that spin halve a shared CPU; a few microseconds of it cost little there and save waking them.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if "-h" in sys.argv or "--help" in sys.argv:
    import configs
    configs.parse(sys.argv[1:])

import copy
import ctypes
import hashlib
import json
import math
import platform
import shutil
import signal
import subprocess
import sysconfig
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass, replace
from datetime import timedelta
from functools import reduce
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configs
import data
import evaluate
import flow
import kernels
import muon
import page
import pretrained
from cluster import (Saver, Watch, agree, bf16_reduce, blocks_of, clip, hold, leave, load_weights, mesh_of, resume, shard, slow, start,
                     together, whole)
from configs import fail
from model import Denoiser, count, flops, patchify, unpatchify
from sample import command, excerpt, generate, grid


# ------------------------------------------------------------------------------------------------------------------
# The machine

def keep_memory(device):
    """On CPU, with glibc: freed buffers stay with the process. Else each step hands them to the kernel, which clears them for the next."""
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-1, -1)                            # M_TRIM_THRESHOLD: none
        libc.mallopt(-3, 32 * 2 ** 20)                  # M_MMAP_THRESHOLD: the largest that it takes


def compile_blocks(c, model, device):
    """One compiled graph serves all blocks: seconds to compile, not minutes. Routing's gather and scatter stay outside.

    Texts and aspect buckets differ in length. On a GPU the graph takes any, after the first two; on CPU, where the compiler fails on
    an MMDiT of any length, each has its own: they are few, text is cut in steps of 8."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    able = device.type == "cuda" or headers and any(map(shutil.which, ("g++", "clang++")))
    if c.train.compile == "yes" or c.train.compile == "auto" and able:
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.optimize_ddp = False           # it would cut each block's graph at DDP's buckets, and fails on texts of any length
        for block in blocks_of(model):
            block.compile(dynamic=None if device.type == "cuda" else False)
        return True
    return False


def provenance(device):
    git = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True, text=True, cwd=Path(__file__).parent)  # git may be missing
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"git": git.stdout.strip() or "unknown", "torch": torch.__version__, "python": platform.python_version(), "device": name}


def setting(c, device):
    """What must be the same on every rank, apart from the data."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()[:12]
    values = {f"--{key}": reduce(getattr, key.split("."), c) for key in configs.keys(c)}
    return {"torch": torch.__version__, "code": code, "precision": str(pretrained.compute_dtype(c, device))[6:],
            **{key: value for key, value in values.items() if not is_dataclass(value)}}


# ------------------------------------------------------------------------------------------------------------------
# One micro-batch

PARTS = ("loss", "align", "lpips", "dino", "effnet")                                                      # what `losses` may return, as logged


def seed_of(*position):
    """A 63-bit seed that is a function of (seed, step, micro-batch number): no state, so resuming needs none."""
    return int.from_bytes(hashlib.blake2b(repr(position).encode(), digest_size=8).digest(), "big") >> 1


def losses(c, model, batch, null, encode, teacher, generator, vae=None, perceptual=None):
    """Noise the images, run the model, compare. -> total loss, {name: part, unweighted}, all on the device.

    A batch has "image" or "latent"; "ids" or a frozen encoder's states, "text"; and may have the teacher's tokens, "teacher"."""
    image = batch["image"].float() / 127.5 - 1 if "image" in batch else None                              # (B, 3, H, W)
    x = batch["latent"].float() if "latent" in batch else vae.encode(image) if vae else image             # (B, c, h, w)
    text, mask = batch.get("text", batch.get("ids")), batch["mask"]                                       # (B, L, D) or (B, L); (B, L)
    draw = dict(generator=generator, device=generator.device)
    t = flow.draw_t(len(x), c.flow.shift, c.flow.uniform, generator)                                      # (B,)
    eps = torch.randn(x.shape, **draw) * c.flow.noise
    drop = torch.rand(len(x), 1, **draw) < c.text.drop
    width = mask.shape[1]
    mask = torch.where(drop, null[1][:, :width], mask)
    text = torch.where(drop if text.ndim == 2 else drop[..., None], null[0][:, :width].to(text.dtype), text)
    text = encode(text, mask, batch.get("groups")) if encode else text
    keep_ids = None
    if c.model.route:
        keep_ids = kernels.keep_tokens(len(x), (x.shape[2] // c.model.patch) * (x.shape[3] // c.model.patch), c.model.route.keep, generator)

    z = flow.interpolate(x, eps, t)
    out, tapped = model(z, t, text, mask, keep_ids, batch.get("slots"))                                   # (B, N or K, c P P)
    tokens = [patchify(a, c.model.patch) for a in (x, eps)]
    if out.shape[1] < tokens[0].shape[1]:                                                                 # lazy masking: kept tokens only
        tokens = [kernels.gather_tokens(a, keep_ids) for a in tokens]
    loss = flow.loss(c.flow.prediction, out, *tokens, t).mean()
    parts = {"loss": loss.detach()}
    if tapped is not None and c.align.weight:
        target = batch["teacher"] if "teacher" in batch else teacher(image)                               # (B, N, D)
        if c.align.norm:                                                                                  # iREPA; before the gather: of all positions
            target = (target - c.align.norm * target.mean(1, keepdim=True)) / (target.std(1, keepdim=True) + 1e-6)
        if tapped.shape[1] < target.shape[1]:
            target = kernels.gather_tokens(target, keep_ids)
        align = -torch.cosine_similarity(tapped, target.float(), dim=-1).mean()
        loss, parts["align"] = loss + c.align.weight * align, align.detach()
    elif tapped is not None:                                                                              # after align.until
        loss = loss + 0 * tapped.mean()                                                                   # DDP waits for a gradient of every parameter
    if perceptual:
        x_hat = flow.to_x(c.flow.prediction, unpatchify(out, c.model.patch, *x.shape[2:]), z, t)          # (B, 3, H, W)
        for name, distance in perceptual(x_hat, x).items():
            loss, parts[name] = loss + getattr(c.perceptual, name + "_weight") * distance, distance.detach()
    return loss, parts


def schedule(c, images):
    """Factor on the learning rates: linear warm-up, constant, linear to zero over the last `cooldown` of the run."""
    warm = min(1.0, (images + c.train.batch) / max(1, c.optim.warmup))
    left = (c.train.images - images) / max(1, c.optim.cooldown * c.train.images)
    return warm * min(1.0, max(0.0, left))


# ------------------------------------------------------------------------------------------------------------------
# The run

class Late:
    """Hands a few numbers from the device to the host one step late, so that the host never waits for the step in flight."""

    def __init__(self, size):
        self.values, self.event = torch.zeros(size), None

    def read(self, new):
        if self.event:
            self.event.synchronize()
        old = self.values.tolist()
        self.values = torch.empty(new.shape, pin_memory=new.is_cuda).copy_(new, non_blocking=True)
        if new.is_cuda:
            self.event = torch.cuda.Event()
            self.event.record()
        return old


class Clock:
    """Seconds of training, also before a resume: evaluation and saving are not counted."""

    def __init__(self, seconds):
        self.seconds, self.since, self.marked = seconds, time.perf_counter(), seconds

    def total(self):
        return self.seconds + (time.perf_counter() - self.since if self.since else 0)

    def lap(self):
        now, before = self.total(), self.marked
        self.marked = now
        return max(now - before, 1e-9)

    @contextmanager
    def stopped(self):
        self.seconds, self.since = self.total(), None
        yield
        self.since = time.perf_counter()


class Log:
    """runs/<name>/log.jsonl: first what ran, then a line per `log_every` steps. On resume, lines of lost steps are cut off."""

    def __init__(self, folder, c, step, device, rank):
        self.path, self.batch, self.minutes = folder / "log.jsonl" if rank == 0 else None, c.train.batch, 0.0
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            whole = self.path.read_text().rpartition("\n")[0].splitlines() if step and self.path.exists() else []      # a kill may cut the last line
            old = [line for line in whole if json.loads(line).get("step", 0) <= step]
            self.minutes = max((json.loads(line).get("minutes", 0.0) for line in old), default=0.0)
            new = json.dumps({"resumed": step, **provenance(device)} if old else {**provenance(device), "config": asdict(c)})
            part = self.path.with_name("log.jsonl.part")
            part.write_text("\n".join([*old, new]) + "\n")
            part.replace(self.path)                                                                       # a kill now loses no line
        self.remote = None
        try:
            if rank == 0 and c.wandb:
                import wandb
                mark = folder / "wandb.id"                                                                # the same one after a restart
                if not old or not mark.exists():
                    mark.write_text(os.urandom(6).hex())
                run = wandb.init(project="nanot2i", name=c.name, id=mark.read_text(), resume="allow", dir=folder, config=asdict(c))
                run.define_metric("*", step_metric="images")
                self.remote = run.log
            if rank == 0 and c.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                writer = SummaryWriter(folder)
                self.remote = lambda row: [writer.add_scalar(k, v, row["images"]) for k, v in row.items() if isinstance(v, float)]
        except ImportError as error:
            fail(f"{error}: pip install {'wandb' if c.wandb else 'tensorboard'}, or leave the flag away")

    def write(self, step, **row):
        if not self.path:
            return
        row = {"step": step, "images": step * self.batch, **{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}}
        try:
            with open(self.path, "ab", buffering=0) as f:
                at, line = f.tell(), (json.dumps(row) + "\n").encode()
                if f.write(line) < len(line):
                    f.truncate(at)                                                                        # no half of a line
                    raise OSError("the disk is full")
        except OSError as error:                                                                          # a full disk ends no run
            tqdm.write(f"WARNING: no line in the log: {error}", file=sys.stderr)
        if self.remote:
            self.remote(row)

    def rows(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def plot(rows, path):
    """The loss against images seen, both on logarithmic axes: training in grey, validation in red."""
    curves = [([(r["images"], r[key]) for r in rows if r.get(key) and math.isfinite(r[key])], ink)
              for key, ink in (("loss", "#888888"), ("val_loss", "#d62728"))]
    points = [p for curve, _ in curves for p in curve]
    if len(points) < 2:
        return
    (left, right), (low, high) = ((math.log(min(a)), math.log(max(a))) for a in zip(*points))
    width, height, edge = 900, 500, 60
    x = lambda v: edge + (math.log(v) - left) / (right - left + 1e-9) * (width - 2 * edge)
    y = lambda v: height - edge - (math.log(v) - low) / (high - low + 1e-9) * (height - 2 * edge)
    page = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(14)
    pen.rectangle((edge, edge, width - edge, height - edge), outline="#cccccc")
    for k in range(5):
        v, n = math.exp(low + (high - low) * k / 4), math.exp(left + (right - left) * k / 4)
        pen.text((8, y(v) - 8), f"{v:.3g}", "black", font)
        pen.text((x(n) - 20, height - edge + 8), f"{n:,.0f}", "black", font)
    for curve, ink in curves:
        if len(curve) > 1:
            pen.line([(x(a), y(b)) for a, b in curve], fill=ink, width=2)
    pen.text((edge, 20), "loss (grey: training, red: validation) against images seen", "black", font)
    page.save(path)


def grid_prompts(c, dataset, held_out):
    """The prompts of the sample grid: those that are given, else captions that are never trained on."""
    given = c.sample.prompts.encode("utf-8", "replace").decode()        # a command line may hold any bytes
    if prompts := [prompt.strip() for prompt in given.split("|") if prompt.strip()]:
        return prompts
    some = held_out if len(held_out) else dataset           # of a single picture, its own
    return [some.captions(item)[0] for item in data.first_items(some, 8)]


def look(c, model, ema, tokenize, encode, vae, dataset, held_out, folder, step, log, rank, world, device):
    """Validation loss on a fixed set, and a grid of fixed prompts, both with the averaged weights."""
    prompts = grid_prompts(c, dataset, held_out)
    mine = range(rank, len(prompts), world)                                                               # every rank paints some
    with whole((ema if c.optim.ema else model).eval()) as net:
        result = evaluate.validation_loss(net, c, tokenize, encode, held_out, c.train.val_images, rank, world, device, vae)
        images = generate(net, c, tokenize, encode, [prompts[i] for i in mine], list(mine), vae=vae) if mine else None
    if world > 1:
        dist.gather_object(images, images := [None] * world if rank == 0 else None)
    if rank == 0:
        log.write(step, val_loss=result["loss"], val_bins=result["bins"])
        images = torch.stack([images[i % world][i // world] for i in range(len(prompts))]) if world > 1 else images
        try:
            (folder / "samples").mkdir(exist_ok=True)
            (folder / "prompts.txt").write_text("".join(" ".join(p.split()) + "\n" for p in prompts), "utf-8")
            grid(images, prompts).save(folder / "samples" / f"{step * c.train.batch:010d}.png")
            rows = log.rows()
            plot(rows, folder / "loss.png")
            page.write(folder, c, rows, prompts, page.nearest(images, prompts, dataset, folder))
        except OSError as error:
            tqdm.write(f"WARNING: no pictures of step {step}: {error}", file=sys.stderr)
    model.train()
    return result["loss"]


def peak_flops(device, dtype):
    """What a large matrix product reaches on this device: the measure of "model FLOPs utilisation"."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        wait(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n ** 3 / best


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """GiB: the allocator's on a GPU, the whole process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    try:
        import resource
    except ImportError:                                                                                   # Windows
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def frozen(c, device, has=(), weights=True):
    """The networks that make of images and captions what a step works on: encode, teacher, vae; none where not needed, or where
    batches `has` what they would make. The autoencoder is wanted even then, to look at pictures."""
    encode = None if c.text.encoder == "bpe" or "text" in has else pretrained.text_encoder(c, device, weights)
    if c.align.teacher and "latent" in has and "teacher" not in has:
        fail(f"{c.data.source} holds no features of --teacher={c.align.teacher}: python -m tools.prepare stores them; or train without, --teacher=")
    teacher = pretrained.teacher(c, device, weights) if c.align.teacher and "teacher" not in has else None
    return encode, teacher, pretrained.VAE(c, device, weights) if c.latent.vae else None


def build(c, device, align_dim, world=1):
    """The model, its moving average, the optimizer. Same weights on every rank, from the seed."""
    torch.manual_seed(c.seed)
    model = Denoiser(c, align_dim, pretrained.compute_dtype(c, device)).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    ema.align = None
    mesh = mesh_of(c, model, device, world)
    if mesh and mesh.shape[1] > 1:
        shard(c, model, mesh), shard(c, ema, mesh)
    return model, ema, muon.build(model, c.optim, mesh)


def recalled(dataset, null, items):
    """(tokenize, encode) of prepared data, without a text encoder: they know the items' captions, and ""."""
    alone = [data.gather(dataset, [(item, 0)]) for item in items]     # shapes may differ
    found = [data.finish(batch, dataset, None) for batch in alone]
    width = max(a["text"].shape[1] for a in ({"text": null[0]}, *found))
    states, masks = (torch.cat([F.pad(a, (0, 0) * (a.ndim - 2) + (0, width - a.shape[1])) for a in (first.to(rest[0].dtype), *rest)])
                     for first, rest in ((null[0], [a["text"] for a in found]), (null[1], [a["mask"] for a in found])))
    row = {caption: i for i, caption in enumerate(["", *(a["caption"][0] for a in found)])}
    tokenize = lambda texts: (torch.tensor([[row[text]] * width for text in texts]), masks[[row[text] for text in texts]])
    return tokenize, lambda ids, mask: states.to(ids.device)[ids[:, 0], :ids.shape[1]]


def to_device(c, batch, null, device):
    """A batch on the device; with a frozen text encoder, and where which tokens are real (or could be, by dropping the caption), and
    which captions are of about one length."""
    send = lambda a: (a.pin_memory() if device.type == "cuda" and not a.is_cuda else a).to(device, non_blocking=True)   # else the copy waits
    made = {}
    if c.text.encoder != "bpe" and not c.text.pad:
        real = batch["mask"] | null[1][:, :batch["mask"].shape[1]]
        batch["slots"] = kernels.text_slots(real)
        made["groups"] = [(send(rows), width) for rows, width in pretrained.buckets(real)] if "ids" in batch else None
    return {k: send(v) for k, v in batch.items() if torch.is_tensor(v)} | made


def caption_lengths(c, tokenize, dataset, held_out, prepared):
    """-> how many tokens are read of some captions, (n,); lines that say which texts are not read whole."""
    if prepared:
        lengths = next(data.fixed_batches(held_out, None, 256, 256))["mask"].sum(1)
        full = int((lengths >= c.text.length).sum())
        line = f"{full} of {len(lengths)} captions fill all {c.text.length} tokens that were prepared"
        lines = [f"{line}; longer ones were cut there"] if full else []
    else:
        texts = data.some_captions(dataset, 2000)
        lengths = tokenize(texts)[1].sum(1)
        what = "captions" if len(dataset) < 2000 else "captions looked at"
        cut = pretrained.cut_line(tokenize, texts, what)
        if tokenize.length < c.text.length:
            lines = [f"--text={c.text.encoder} reads {tokenize.length} tokens at most: "
                     f"text.length={c.text.length} is lowered to that", cut]
        else:
            lines = [f"{cut}; a larger --text.length reads more" if cut else ""]
    if c.sample.prompts:                                    # of captions in their place enough is said
        prompts = grid_prompts(c, dataset, held_out)
        lines.append(pretrained.cut_line(tokenize, prompts, "prompts of the sample grid"))
    return lengths, [line for line in lines if line]


def update_ema(c, model, ema, step):
    """ema <- decay ema + (1 - decay) weights; ramped up, so that a short run's is no average with the initialisation."""
    updates = step // c.optim.ema_every
    decay = min(c.optim.ema, (1 + updates) / (10 + updates)) if c.optim.ema_ramp else c.optim.ema
    live = dict(model.named_parameters())
    with torch.no_grad():
        torch._foreach_lerp_([muon.local(p) for p in ema.parameters()], [muon.local(live[name]) for name, _ in ema.named_parameters()], 1 - decay)


def train(c):
    rank, world, device = start(c.train.timeout)
    agree(world, setting(c, device))
    if c.text.encoder != "bpe":
        c = replace(c, text=replace(c.text, dim=together(world, lambda: pretrained.text_dim(c))[rank]))
    if (micros := c.train.batch // c.train.micro_batch) % world:
        fail(f"{micros} micro-batches cannot be shared by {world} ranks: choose --train.micro_batch so that batch / micro_batch is a multiple of {world}")
    folder = Path(c.out or f"runs/{c.name}")
    if folder.exists() and not folder.is_dir():
        fail(f"--out={folder} is a file: it must be a folder, or not be there yet")
    say = tqdm.write if rank == 0 else lambda *_: None
    patient = dist.new_group(backend="gloo", timeout=timedelta(hours=6)) if world > 1 else None            # for slow disks
    loaded = []
    together(world, lambda: loaded.extend(data.load(c)), patient)
    dataset, held_out = loaded
    say(data.describe(dataset, held_out))
    agree(world, {"the data set": (index := dataset.digest)})
    first = dataset.get(data.first_items(dataset, 1)[0], 0)[0]
    has = first if isinstance(first, dict) else {}                                                        # what tools/prepare.py made: see shards.py
    together(world, lambda: loaded.extend((*frozen(c, device, has), pretrained.perceptual(c, device))))     # a node may lack the files of one
    encode, teacher, vae, perceptual = loaded[2:]
    align_dim = teacher.dim if teacher else has["teacher"].shape[1] if "teacher" in has else 0
    model, ema, optimizer = build(c, device, align_dim, world)
    step, source = together(world, lambda: resume(folder, c, model, ema, optimizer, world, index))[rank]
    if c.init and not step:
        source = together(world, lambda: load_weights(c.init, model, ema, optimizer, say))[rank]
    bpe = None
    if c.text.encoder == "bpe":                                                                           # weights go with their vocabulary
        bpe = pretrained.bpe_load(source / "bpe.tiktoken") if source else \
            pretrained.bpe_train(data.some_captions(dataset, 1_000_000), c.text.vocab, c.text.length)
    if "text" in has:
        null = dataset.prepared.null[None], torch.ones(1, len(dataset.prepared.null), dtype=torch.bool)
        tokenize, encode_prompts = (pretrained.tokenizer(c), pretrained.text_encoder(c, device)) if c.sample.prompts else \
            recalled(held_out, null, data.first_items(held_out, 8))
    else:
        tokenize, encode_prompts = pretrained.tokenizer(c, bpe), encode
        null = tokenize([""])
    null = tuple(F.pad(a, (0, 0) * (a.ndim - 2) + (0, max(0, c.text.length - a.shape[1]))) for a in null)       # as wide as any batch
    here = tuple(a.to(device) for a in null)
    lengths, cut = caption_lengths(c, tokenize, dataset, held_out, "text" in has)
    for line in cut:
        say(line)
    steps = c.train.images // c.train.batch
    draw = command(excerpt(grid_prompts(c, dataset, held_out)[0]), f"--checkpoint={folder}")
    if step >= steps:
        say(f"{folder} is finished: {draw}; to train on, --train.images=...; to start afresh, another --out")
        return leave(world)
    compiled = compile_blocks(c, model, device)
    keep_memory(device)
    net = model
    if optimizer.shards == 1 and world > 1:
        net = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
        if c.train.reduce == "bf16":
            net.register_comm_hook(None, bf16_reduce)
    batches = data.batches(dataset, tokenize, c, step, rank, world)
    real = c.text.length if c.text.encoder == "bpe" or c.text.pad else lengths.float().mean().item()
    cost, peak = lambda c: flops(c, real), peak_flops(device, model.dtype)
    stop = []                                                                                             # the names of signals received
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, lambda number, frame: stop.append(signal.Signals(number).name))
    held = []
    together(world, lambda: held.append(hold(folder)) if rank == 0 else None)
    watch, rates = Watch(rank, world, c.train.timeout, device), deque(maxlen=50)                          # img/s of the last log lines
    log, saver = Log(folder, c, step, device, rank), Saver(folder, c, bpe, index, rank, world, patient, watch)
    if not step:                                            # else the log has them
        for line in cut:
            log.write(0, cut=line)
    say(f"{c.name}: {count(model) / 1e6:.1f}M parameters + {sum(p.numel() for p in model.parameters()) / 1e6 - count(model) / 1e6:.1f}M text and "
        f"heads, {len(dataset):,} images, {str(model.dtype)[6:]}, {'compiled blocks' if compiled else 'eager'}, "
        f"{'resumed at' if step else 'from'} image {step * c.train.batch:,} of {steps * c.train.batch:,}, in {folder}")
    bar = tqdm(total=steps * c.train.batch, initial=step * c.train.batch, unit="img", disable=rank > 0, smoothing=0.05, dynamic_ncols=True)
    total, since, bad, late, clock = torch.zeros(len(PARTS), device=device), step, 0, Late(2), Clock(60 * log.minutes)
    crossed = lambda every: every and step * c.train.batch // every > (step - 1) * c.train.batch // every
    model.train()
    while step < steps:
        # forward, backward
        now = replace(c, model=replace(c.model, route=None)) if step * c.train.batch >= (1 - c.model.dense_end) * c.train.images else c
        now = replace(now, align=replace(c.align, weight=0.0)) if 0 < c.align.until <= step * c.train.batch else now
        optimizer.zero_grad()
        mine = range(rank, micros, world)
        for micro in mine:
            watch.at(step, "the next batch")
            with watch.time(0):
                batch = to_device(c, next(batches), null, device)
            generator = torch.Generator(device).manual_seed(seed_of(c.seed, step, micro))
            watch.at(step, "forward and backward (gradients are reduced)")
            if optimizer.shards > 1:
                net.set_requires_gradient_sync(micro == mine[-1])                                         # reduce once a step
            with net.no_sync() if net is not model and micro != mine[-1] else nullcontext():              # the same under ddp
                with watch.time(1):
                    loss, parts = losses(now, net, batch, here, encode, teacher, generator, vae, perceptual)
                (loss / len(mine)).backward()
            total += torch.stack([parts.get(name, parts["loss"] * 0) for name in PARTS]) / len(mine)
        # update; a step whose gradient is not finite changes nothing, decided on the device
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(c, step * c.train.batch)
        watch.at(step, "the optimizer (updates are gathered)")
        norm = clip(model.parameters(), c.optim.clip, optimizer.mesh)
        skip = (~norm.isfinite()).float()
        optimizer.step(skip=skip)
        step += 1
        if c.optim.ema and step % c.optim.ema_every == 0:
            update_ema(c, model, ema, step)
        bar.update(c.train.batch)
        # what all ranks must agree on
        status = torch.stack([skip, torch.full((), float(len(stop)), device=device)])
        watch.at(step, "the status of all ranks (all-reduce)")
        if world > 1:
            dist.all_reduce(status, op=dist.ReduceOp.MAX)
        skipped, stopping = late.read(status)
        bad = bad + 1 if skipped else 0
        if skipped:
            say(f"step {step - 2}: the gradient is not finite; skipped ({bad} in a row)")
        if bad == 10:
            bar.close()
            fail(f"ten steps in a row without a finite gradient: lower --optim.lr or raise --optim.warmup (the last checkpoint in {folder} is from before)")
        # log, look, save
        if step % c.train.log_every == 0 or step == steps:
            watch.at(step, "the log (all-reduce)")
            wait(device)
            sums = torch.cat([total, watch.lap().flatten().to(device)])                                   # of all ranks
            if world > 1:
                dist.all_reduce(sums)
            sums, spent, seconds = sums[:len(PARTS)] / (step - since) / world, sums[len(PARTS):].view(world, 2), clock.lap()
            means, rate = dict(zip(PARTS, sums.tolist())), (step - since) * c.train.batch / seconds
            if why := slow(rates, rate, seconds, spent.cpu()):
                say(f"step {step}: slow: {why}")
                log.write(step, slow=why)
            rates.append(rate)
            log.write(step, **{k: v for k, v in means.items() if k in (*parts, "align")}, norm=norm.item(), lr=optimizer.param_groups[0]["lr"],
                      img_s=rate, minutes=clock.total() / 60, mfu=3 * cost(now) * rate / world / peak, gib=peak_memory(device), bad=bad)
            bar.set_postfix(loss=f"{means['loss']:.4f}", mfu=f"{3 * cost(now) * rate / world / peak:.0%}")
            since = step
            total.zero_()
        if crossed(c.train.eval_every) or step == steps:
            watch.at(step, "validation and samples")
            with clock.stopped():
                loss = look(c, model, ema, tokenize, encode_prompts, vae, dataset, held_out, folder, step, log, rank, world, device)
                say(f"image {step * c.train.batch:,}: validation loss {loss:.4f}")
        if crossed(c.train.save_every) or step == steps or stopping:
            watch.at(step, "the checkpoint")
            with clock.stopped():
                saver.save(step, model, ema, optimizer, log)
        if stopping:
            bar.close()
            saver.last()
            say(f"{stop[0] if stop else 'stopped'}: saved at image {step * c.train.batch:,}; the same command goes on from there")
            return leave(world, watch)
    bar.close()
    saver.last()
    minutes = clock.total() / 60
    say(f"finished after {minutes:.1f} minutes of training: look at {folder}/index.html, then {draw}")
    leave(world, watch)


# ------------------------------------------------------------------------------------------------------------------
# Where the time goes

def bench(c, repeats=20):
    """Time a training step by part on synthetic data, frozen networks with random weights, one micro-batch per step."""
    device = start()[2]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if c.text.encoder != "bpe":
        c = replace(c, text=replace(c.text, dim=pretrained.text_dim(c, weights=False)))
    size, length, spent = c.train.micro_batch, c.text.length, {}

    def timed(part, function):
        """`function`, with its seconds (the device's included) added to `spent`."""
        def run(*args, **kwargs):
            wait(device)
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            wait(device)
            spent.setdefault(part, []).append(time.perf_counter() - begin)
            return result
        return run

    prepared = c.latent.vae and c.data.source != "emoji"                                                  # latents and states come from shards
    encode, teacher, vae = (None, None, None) if prepared else frozen(c, device, (), weights=False)
    align_dim = pretrained.teacher_dim(c, weights=False) if c.align.teacher else 0
    perceptual = pretrained.perceptual(c, device, weights=False)
    model, ema, optimizer = build(c, device, align_dim)
    compiled = compile_blocks(c, model, device)
    keep_memory(device)
    model.train()
    real = torch.randint(length // 4, length // 2 + 1, (size, 1))                                         # captions of ordinary length
    host = {"image": torch.randint(0, 256, (size, 3, c.model.size, c.model.size), dtype=torch.uint8),
            "ids": torch.randint(0, 256, (size, length)), "mask": torch.arange(length) < real}
    null = torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None] < 1
    if prepared:
        side = c.model.size // c.latent.factor
        host = {"latent": torch.randn(size, c.model.channels, side, side), "text": torch.randn(size, length, c.text.dim).bfloat16(), "mask": host["mask"]}
        host |= {"teacher": torch.randn(size, c.side ** 2, align_dim).bfloat16()} if align_dim else {}
        null = host["text"][:1].clone(), null[1]
    if device.type == "cuda":
        host = {key: value.pin_memory() for key, value in host.items()}                                  # as the loader's thread does
    here = tuple(a.to(device) for a in null)

    def step(number, clock=lambda part, function: function):
        batch = clock("data", to_device)(c, dict(host), null, device)
        generator = torch.Generator(device).manual_seed(number)
        loss, _ = clock("forward", losses)(c, model, batch, here, encode and clock("text", encode), teacher and clock("teacher", teacher), generator, vae,
                                           perceptual and clock("perceptual", perceptual))
        clock("backward", loss.backward)()
        clock("optimizer", update)()

    def update():
        norm = clip(model.parameters(), c.optim.clip, None)
        optimizer.step(skip=(~norm.isfinite()).float())
        optimizer.zero_grad()

    for number in range(3):                                                                               # compile, allocate, warm up
        step(number)
        update_ema(c, model, ema, 1)
    wait(device)
    whole = []
    for number in tqdm(range(repeats), desc=c.name, leave=False):
        begin = time.perf_counter()
        step(number)
        if number % c.optim.ema_every == 0:
            update_ema(c, model, ema, 1)
        wait(device)
        whole.append(time.perf_counter() - begin)
        step(number, timed)
        timed("ema", update_ema)(c, model, ema, 1)
    seconds = sorted(whole)[len(whole) // 2]
    parts = {part: 1000 * sorted(values)[len(values) // 2] for part, values in spent.items()}
    parts["forward"] -= sum(parts.get(inner, 0) for inner in ("text", "teacher", "perceptual"))           # the last with its own backward
    parts["ema"] /= c.optim.ema_every
    rare, micros = (parts["optimizer"] + parts["ema"]) / 1000, c.train.batch // size                    # one GPU updates once in so many
    cost = 3 * flops(c, length if c.text.encoder == "bpe" or c.text.pad else real.float().mean().item())
    row = {"recipe": c.name, **provenance(device), "dtype": str(model.dtype)[6:], "compiled": compiled, "micro_batch": size, "repeats": repeats,
           "img_s": size / seconds, "ms": 1000 * seconds, "ms_min": 1000 * min(whole), "ms_max": 1000 * max(whole), **{f"ms_{k}": v for k, v in parts.items()},
           "img_s_batch": c.train.batch / (micros * (seconds - rare) + rare),
           "mfu": cost * size / seconds / peak_flops(device, model.dtype), "gib": peak_memory(device)}
    print(f"\n{c.name}: {row['device']}, torch {row['torch']}, {row['dtype']}, {'compiled' if compiled else 'eager'}, micro-batch {size}")
    for part in ("data", "text", "teacher", "perceptual", "forward", "backward", "optimizer", "ema"):
        if part in parts:
            print(f"  {part:10} {parts[part]:9.1f} ms {parts[part] / row['ms']:7.0%}")
    print(f"  {'step':10} {row['ms']:9.1f} ms (median of {repeats}; {row['ms_min']:.1f} to {row['ms_max']:.1f})   "
          f"{row['img_s']:.0f} images/s   MFU {row['mfu']:.0%}   peak memory {row['gib']:.1f} GiB")
    if micros > 1:
        print(f"  {'batch':10} of {c.train.batch:,} in {micros} micro-batches with one update, from the above: {row['img_s_batch']:.0f} images/s")
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))


LOADER, RANK = "a loader process has died (out of memory?)", "another rank has ended"                   # what an error then says, by its words
DEATHS = {**dict.fromkeys(("DataLoader worker", "EOFError", "BrokenPipeError", "ConnectionRefusedError", "ConnectionResetError", "listener-"), LOADER),
          **dict.fromkeys(("by peer", "Connection refused", "Broken pipe", "DistNetworkError", "DistStoreError"), RANK)}


def main(argv):
    if "--plan" in argv:
        import plan
        return plan.main(argv)
    wanted = next((a.split("=", 1)[1] for a in argv if a.startswith("--bench=")), None)
    if wanted is None:
        try:
            return train(configs.parse(argv))
        except KeyboardInterrupt:                                                                         # before there is anything to save
            sys.exit(130)
        except torch.OutOfMemoryError:
            fail("the device is out of memory: lower --train.micro_batch, or trade time for memory with --train.checkpointing=yes")
        except (RuntimeError, OSError, EOFError) as error:
            died = next((why for words, why in DEATHS.items() if words in f"{type(error).__name__} {error}"), None)
            if died is None:
                raise
            print(f"\nerror: rank {os.environ.get('RANK', 0)}: {died}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
            os._exit(1)                                                                                   # with no word to ranks that are gone
    rest = [a for a in argv if not a.startswith(("--bench=", "--config="))]
    for name in configs.recipes if wanted == "all" else wanted.split(","):
        c = configs.parse([f"--config={name}", *rest])
        if not torch.cuda.is_available() and c.model.width > 1024:
            print(f"{name}: too large to time without a GPU, skipped")
        else:
            try:
                bench(c)
            except torch.OutOfMemoryError:
                print(f"{name}: the device is out of memory: lower --train.micro_batch")
            except SystemExit as stop:                                                                        # what it needs is not here
                if wanted != "all":
                    raise
                print(f"{name}: {getattr(stop, 'message', stop)}, skipped")


if __name__ == "__main__":
    main(sys.argv[1:])

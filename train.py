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

os.environ.setdefault("OMP_WAIT_POLICY", "passive")     # read once, by import torch: idle threads that spin halve a shared CPU
if "-h" in sys.argv or "--help" in sys.argv:
    import configs
    configs.parse(sys.argv[1:])

import copy
import hashlib
import json
import math
import platform
import shutil
import signal
import subprocess
import sysconfig
import threading
import time
import warnings
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
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import configs
import data
import evaluate
import flow
import kernels
import muon
import pretrained
from configs import fail
from model import Denoiser, count, flops, patchify, unpatchify
from sample import generate, grid


# ------------------------------------------------------------------------------------------------------------------
# The machine

def start(timeout=600):
    """(rank, world, device). Under torchrun it joins the group: NCCL (RCCL on ROCm) on GPUs, gloo on CPU."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        fail(f"{local + 1} processes on this node, but {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout + 60))       # `Watch` is first, and says more
    return rank, world, device


def leave(world, watch=None):
    """After gloo, an ordinary exit sometimes aborts in tear-down, all work done: leave without it."""
    if watch:
        watch.over.set()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


def compute_dtype(c, device):
    fast = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if c.train.precision == "bf16" or c.train.precision == "auto" and fast else torch.float32


def mesh_of(c, model, device, world):
    """The grid of ranks, replicas x shards: ddp is (world, 1), fsdp (1, world). None for one process."""
    mode, size = c.train.parallel, c.train.shard or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if mode == "auto":
        mode = "ddp" if sum(p.numel() for p in model.parameters()) < 2e9 else "fsdp"
    if mode == "hsdp" and (world % size or not 1 < size < world):
        fail(f"hsdp shares the weights among --train.shard={size} ranks and repeats that: {world} ranks must be two or more times a --train.shard above 1")
    shards = {"ddp": 1, "fsdp": world, "hsdp": size}[mode]
    return init_device_mesh(device.type, (world // shards, shards), mesh_dim_names=("replica", "shard")) if world > 1 else None


def blocks_of(model):
    return [*model.blocks, *(model.text.blocks if model.text else [])]


def shard(c, model, mesh):
    """FSDP2: every rank keeps some rows of each weight, as fp32; a block's are gathered, as its products want them, while it runs."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard                                  # half a second
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")                                     # we change no output in place
    pieces = {name: p.pieces for name, p in model.named_parameters() if hasattr(p, "pieces")}
    policy = lambda dtype: MixedPrecisionPolicy(dtype, torch.bfloat16 if c.train.reduce == "bf16" else torch.float32, cast_forward_inputs=False)
    options = dict(mesh=mesh if mesh.shape[0] > 1 else mesh["shard"], reshard_after_forward=True)
    if model.align:                                                                                       # its products are fp32
        fully_shard(model.align, mp_policy=policy(None), **options)
    for part in (*blocks_of(model), model):
        fully_shard(part, mp_policy=policy(None if model.dtype == torch.float32 else model.dtype), **options)
    for name, p in model.named_parameters():
        if name in pieces:
            p.pieces = pieces[name]


@contextmanager
def whole(net):
    """All weights gathered for a while: then each rank may call the network as often as it likes, in whatever order."""
    parts = [m for m in net.modules() if hasattr(m, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    yield net
    for part in parts:
        part.reshard()
        part.set_reshard_after_forward(True, recurse=False)


def bf16_reduce(group, bucket):
    """DDP's hook for --train.reduce=bf16: the mean over the ranks, summed as bf16."""
    sent = bucket.buffer().div(dist.get_world_size(group)).bfloat16()
    return dist.all_reduce(sent, group=group, async_op=True).get_future().then(lambda done: bucket.buffer().copy_(done.value()[0]))


def clip(params, limit, mesh):
    """torch's clip_grad_norm_, by the norm over all shards in one message. -> the norm, 0-d"""
    grads = [muon.local(p.grad) for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if mesh and mesh.shape[1] > 1:
        square = norm.square()
        dist.all_reduce(square, group=mesh.get_group("shard"))
        norm = square.sqrt()
    if limit:
        torch._foreach_mul_(grads, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def compile_blocks(c, model, device):
    """One compiled graph serves all blocks: seconds to compile, not minutes. Routing's gather and scatter stay outside."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    able = device.type == "cuda" or headers and any(map(shutil.which, ("g++", "clang++")))
    if c.train.compile == "yes" or c.train.compile == "auto" and able:
        torch._dynamo.config.recompile_limit = 64                           # one graph per length of the text, in steps of 8
        for block in blocks_of(model):
            block.compile(dynamic=False)
        return True
    return False


def provenance(device):
    git = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True, text=True, cwd=Path(__file__).parent)  # git may be missing
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {"git": git.stdout.strip() or "unknown", "torch": torch.__version__, "python": platform.python_version(), "device": name}


# ------------------------------------------------------------------------------------------------------------------
# Ranks that agree, and ranks that hang

def together(world, action, group=None):
    """action() on every rank -> the results of all. If it fails on one rank, all stop, and the first says why."""
    try:
        mine = action(), None
    except (OSError, SystemExit) as error:
        mine = None, str(getattr(error, "message", error))
    told = [mine]
    if world > 1:
        dist.all_gather_object(told := [None] * world, mine, group=group)
    for rank, (_, wrong) in enumerate(told):
        if wrong:
            fail(f"rank {rank}: {wrong}" if rank else wrong)
    return [result for result, _ in told]


def agree(world, facts):
    """All ranks have the same facts, {name: value}, or stop and say which differ."""
    told = together(world, lambda: facts)
    for rank, theirs in enumerate(told):
        if differ := [f"{name} {str(theirs.get(name))[:60]} (rank 0: {str(value)[:60]})" for name, value in told[0].items() if theirs.get(name) != value]:
            fail(f"rank {rank} is not set up as rank 0: {', '.join(differ[:4])}")


def setting(c, device):
    """What must be the same on every rank, apart from the data."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()[:12]
    values = {f"--{key}": reduce(getattr, key.split("."), c) for key in configs.keys(c)}
    return {"torch": torch.__version__, "code": code, "precision": str(compute_dtype(c, device))[6:],
            **{key: value for key, value in values.items() if not is_dataclass(value)}}


def digest_of(dataset):
    """Of the number of items and of some ten thousand captions."""
    some = [dataset.captions[i] for i in range(0, len(dataset.captions), 1 + len(dataset.captions) // 10_000)]
    return hashlib.sha256(repr((len(dataset), some)).encode()).hexdigest()[:16]


def hold(folder):
    """Keep other runs out of the folder, as long as this process lives and the result is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)                                                  # not inherited by loader processes
    except ImportError:                                                                                   # Windows
        pass
    except OSError:
        fail(f"another run is writing into {folder}: wait for it, or give another --out")
    return file


class Watch:
    """Where every rank is, told to all by a thread. When this rank has not moved for `timeout` seconds, the run stops, and the
    first of those that wait says for whom. Also: the seconds that this rank spent on data and on its own computing."""

    def __init__(self, rank, world, timeout, device):
        self.rank, self.world, self.timeout, self.device = rank, world, timeout, device
        self.count, self.where, self.since, self.spent, self.events, self.over = 0, "the start", time.monotonic(), [0.0, 0.0], [], threading.Event()
        if world > 1:
            self.store = dist.PrefixStore("watch", dist.distributed_c10d._get_default_store().clone())
            threading.Thread(target=self.run, daemon=True).start()

    def at(self, step, what):
        self.count, self.where, self.since = self.count + 1, f"{what}, step {step}", time.monotonic()

    def run(self):
        try:
            while (still := time.monotonic() - self.since) < self.timeout:
                self.store.set(str(self.rank), json.dumps([self.count, self.where, time.time()]))
                if self.over.wait(min(1, self.timeout / 4)):
                    return
        except RuntimeError:                                                                              # the store has gone: so has the run
            return
        told = [json.loads(self.store.get(str(r))) if self.store.check([str(r)]) else [-1, "the start", 0] for r in range(self.world)]
        told[self.rank] = [self.count, self.where, time.time()]
        silent = [r for r in range(self.world) if time.time() - told[r][2] > max(5, self.timeout / 2)]
        behind = silent or [r for r in range(self.world) if told[r][0] == min(n for n, _, _ in told)]
        if self.rank == min({*range(self.world)} - {*behind} or {0}):
            named = ", ".join(f"rank {r} {f'(last heard of {time.time() - told[r][2]:.0f} s ago) ' if r in silent else ''}at {told[r][1]}" for r in behind)
            print(f"\nerror: no progress for {still:.0f} s: {named}; this rank, {self.rank}, waits at {self.where}", file=sys.stderr, flush=True)
        else:
            time.sleep(1)                                                                                 # let it speak
        os._exit(1)

    @contextmanager
    def time(self, part):
        """part 0: data, by the host's clock; 1: computing, by the device's."""
        if part and self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self.events.append((begin, end))
        else:
            begin = time.perf_counter()
            yield
            self.spent[part] += time.perf_counter() - begin

    def lap(self):
        """(world, 2): this rank's seconds on data and on computing since the last call, in its row; the device has caught up."""
        self.spent[1] += sum(begin.elapsed_time(end) for begin, end in self.events) / 1000
        found = torch.zeros(self.world, 2)
        found[self.rank] = torch.tensor(self.spent)
        self.spent, self.events = [0.0, 0.0], []
        return found


def slow(rates, rate, seconds, spent):
    """When throughput is below half of its running median: which rank, and what took it so long; "" when all is well."""
    usual = sorted(rates)[len(rates) // 2] if len(rates) >= 5 else 0
    if rate >= usual / 2:
        return ""
    part = 0 if spent[:, 0].max() > seconds * (1 - rate / usual) / 2 else 1                               # most of the loss is data's?
    rank = int(spent[:, part].argmax())
    return f"rank {rank} spent {spent[rank, part]:.1f} of {seconds:.1f} s {('waiting for data', 'computing')[part]}; {rate:.3g} images/s, usually {usual:.3g}"


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints: a folder of plain files, complete or absent. A file is the same whoever wrote it: all ranks write their parts
# of one safetensors file, each at its place, and read the parts that they need, on any number of ranks, sharded or not.

def contents(model, ema, optimizer):
    """{file: {name: (dtype, shape)}} of a checkpoint, the same on every rank."""
    names = {p: name for name, p in model.named_parameters()}
    files = {part: {name: (x.dtype, tuple(x.shape)) for name, x in net.state_dict().items()} for part, net in (("model", model), ("ema", ema))}
    files["optimizer"] = {f"{names[p]}.{key}": (torch.float32, () if key == "step" else tuple(p.shape)) for group in optimizer.param_groups
                          for p in group["params"] for key in (["momentum"] if group["kind"] == "muon" else ["step", "exp_avg", "exp_avg_sq"])}
    return files


def parts(model, ema, optimizer, reading=False):
    """What this rank writes of it, or reads: {file: [(name, start, flat tensor)]}."""
    names = {p: name for name, p in model.named_parameters()}
    files = {part: [(name, *optimizer.extent(x, reading)) for name, x in net.state_dict().items()] for part, net in (("model", model), ("ema", ema))}
    return {**files, "optimizer": [(f"{names[p]}.{key}", start, x) for p, key, start, x in optimizer.segments()]}


def place(tensors):
    """The beginning of a safetensors file of {name: (dtype, shape)}. -> bytes, {name: where its own begin}"""
    kinds, table, end = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL"}, {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + row["data_offsets"][0] for name, row in table.items()}


def snapshot(model, ema, optimizer):
    """What this rank writes, as it is now, on the host."""
    copy = lambda x: x.detach().to("cpu", copy=True)
    return contents(model, ema, optimizer), {file: [(n, at, copy(x)) for n, at, x in rows] for file, rows in parts(model, ema, optimizer).items()}


def write(folder, step, c, bpe, index, files, mine, rank=0, world=1, group=None):
    """Written under another name, flushed to disk, renamed: a crash at any moment leaves the older checkpoints whole."""
    final = folder / f"step_{step:08d}"
    part = folder / f"{final.name}.tmp"

    def prepare():
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)

    def fill():
        for file, tensors in files.items():
            head, begin = place(tensors)
            with os.fdopen(os.open(part / f"{file}.safetensors", os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b") as f:
                if rank == 0:
                    f.write(head)
                for name, start, x in mine[file]:
                    f.seek(begin[name] + start * x.itemsize)
                    f.write(x.view(torch.uint8).numpy())
                f.flush(), os.fsync(f.fileno())
        if rank == 0:
            configs.save(c, part / "config.json")
            (part / "state.json").write_text(json.dumps({"step": step, "images": step * c.train.batch, "data": index}))
            if bpe:
                pretrained.bpe_save(bpe, part / "bpe.tiktoken")

    def sums():
        found = {}
        for file in sorted(part.iterdir())[rank::world]:                                                  # all are whole by now
            with open(file, "rb+") as f:
                found[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
                os.fsync(f.fileno())
        return found

    def finish():
        if rank == 0:
            with open(part / "sums.json", "w") as f:
                json.dump({name: digest for part in found for name, digest in part.items()}, f)
                f.flush(), os.fsync(f.fileno())
            shutil.rmtree(final, ignore_errors=True)
            part.rename(final)
            if os.name == "posix":
                fd = os.open(folder, os.O_RDONLY)
                os.fsync(fd), os.close(fd)
            prune(folder, final, c)

    try:
        together(world, prepare, group)
        together(world, fill, group)
        found = together(world, sums, group)
        together(world, finish, group)
    except SystemExit:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)                                                       # a full disk: make room again
        raise


def prune(folder, newest, c):
    for torn in folder.glob("step_*.tmp"):
        shutil.rmtree(torn)
    keep = lambda path: c.train.keep_every and int(path.name[5:]) * c.train.batch % c.train.keep_every < c.train.batch
    for old in sorted(p for p in folder.glob("step_*") if p.name <= newest.name)[:-2]:                     # later ones are damaged
        if not keep(old):
            shutil.rmtree(old)


class Saver:
    """Checkpoints while the training goes on: it waits for a copy of this rank's part to memory, the rest is a thread's."""

    def __init__(self, folder, c, bpe, index, rank, world):
        self.folder, self.c, self.bpe, self.index, self.ranks, self.thread, self.failed = folder, c, bpe, index, (rank, world), None, ""
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=1)) if world > 1 else None    # its own: it talks while we do

    def save(self, step, model, ema, optimizer, log):
        self.wait()
        files = snapshot(model, ema, optimizer)

        def work():
            try:
                write(self.folder, step, self.c, self.bpe, self.index, *files, *self.ranks, self.group)
                self.failed = ""
            except (SystemExit, RuntimeError) as error:
                self.failed = f"the checkpoint of step {step} could not be written: {str(getattr(error, 'message', error))[:200]}"
                if self.ranks[0] == 0:
                    tqdm.write(f"WARNING: {self.failed}; the training goes on, the older ones are whole", file=sys.stderr)
                    log.write(step, failed=self.failed)
        self.thread = threading.Thread(target=work)
        self.thread.start()

    def wait(self):
        if self.thread:
            self.thread.join()

    def last(self, watch):
        self.wait()
        if self.failed:
            watch.over.set()
            fail(self.failed)


def read(path, tensors, mine):
    """Fill this rank's tensors from a file. Values that are not needed here are not read: the file is mapped."""
    with safe_open(path, "pt") as f:
        there = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
        wrong = [name for name in {*tensors, *there} if name not in tensors or there.get(name) != tensors[name][1]]
        if wrong:
            fail(f"{path} is of another model: {', '.join(sorted(wrong)[:4])} do not fit")
        for name, start, x in mine:
            x.copy_(f.get_tensor(name).view(-1)[start:start + len(x)])


def resume(folder, c, model, ema, optimizer, world, index):
    """Load the newest whole checkpoint of the run folder, if there is one. -> the step to go on from, the checkpoint."""
    find = lambda: next(pretrained.newest_checkpoint(folder), None) if int(os.environ.get("RANK", 0)) == 0 else None
    checkpoint = together(world, find)[0]
    if checkpoint is None:
        return 0, None
    state = json.loads((checkpoint / "state.json").read_text())
    if state.get("data", index) != index:
        fail(f"{folder} was trained on another data set than {c.data.source} is now: put that back, or go on in another --out with --init={folder}")
    free = ("train.", "sample.", "data.source", "data.workers", "out", "init", "wandb", "tensorboard")            # may change in mid-run
    changed = [d for d in configs.difference(configs.load(checkpoint / "config.json"), c)
               if not d[0].startswith(free) or d[0] in ("train.batch", "train.micro_batch", "train.precision")]
    if changed:
        fail(f"{folder} holds a run with " + ", ".join(f"{k}={a} (now {b})" for k, a, b in changed[:4]) + ": give another --out or delete it")
    if not (checkpoint / "optimizer.safetensors").exists():
        fail(f"{checkpoint} has no optimizer.safetensors (of an older version?): take its weights with --init={folder} and another --out")
    for (file, tensors), mine in zip(contents(model, ema, optimizer).items(), parts(model, ema, optimizer, True).values()):
        read(checkpoint / f"{file}.safetensors", tensors, mine)
    return state["step"], checkpoint


def load_weights(path, model, ema, optimizer, say):
    """--init: start from another run's weights, or from released ones. What does not fit the new recipe is dropped, and said.
    -> the checkpoint, none for released ones."""
    checkpoint = next(pretrained.newest_checkpoint(path), None)
    theirs, ours = load_file(checkpoint / "model.safetensors") if checkpoint else pretrained.released(path)[1], model.state_dict()
    fits = {k: v for k, v in theirs.items() if k in ours and v.shape == ours[k].shape}
    wrong = [k for k in (*ours, *theirs) if k not in fits and not k.startswith("align.")]
    if wrong:
        fail(f"--init={path} is another model: {', '.join(wrong[:4])} do not fit")
    for name, start, x in [row for file in ("model", "ema") for row in parts(model, ema, optimizer, True)[file] if row[0] in fits]:
        x.copy_(fits[name].view(-1)[start:start + len(x)])
    dropped, new = sorted(set(theirs) - set(fits)), sorted(set(ours) - set(fits))
    say(f"starting from {checkpoint or path}" + (f"; dropped its REPA head ({len(dropped)} tensors)" if dropped else "") +
        (f"; the REPA head is new ({len(new)} tensors)" if new else ""))
    return checkpoint


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
    text = encode(text, mask) if encode else text
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
            self.path.write_text("\n".join([*old, new]) + "\n")
        self.remote = None
        try:
            if rank == 0 and c.wandb:
                import wandb
                self.remote = wandb.init(project="nanot2i", name=c.name, dir=folder, config=asdict(c)).log
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
            with open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
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


def look(c, model, ema, tokenize, encode, vae, held_out, folder, step, log, rank, world, device):
    """Validation loss on a fixed set, and a grid of fixed prompts, both with the averaged weights."""
    prompts = c.sample.prompts.split("|") if c.sample.prompts else [held_out.captions[i][0] for i in range(min(8, len(held_out)))]
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
            grid(images, prompts).save(folder / "samples" / f"{step * c.train.batch:010d}.png")
            plot(log.rows(), folder / "loss.png")
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
        fail(f"{c.data.source} holds no features of --teacher={c.align.teacher}: prepare it with them, or train without, --teacher=")
    teacher = pretrained.teacher(c, device, weights) if c.align.teacher and "teacher" not in has else None
    return encode, teacher, pretrained.VAE(c, device, weights) if c.latent.vae else None


def build(c, device, align_dim, world=1):
    """The model, its moving average, the optimizer. Same weights on every rank, from the seed."""
    torch.manual_seed(c.seed)
    model = Denoiser(c, align_dim, compute_dtype(c, device)).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    ema.align = None
    mesh = mesh_of(c, model, device, world)
    if mesh and mesh.shape[1] > 1:
        shard(c, model, mesh), shard(c, ema, mesh)
    return model, ema, muon.build(model, c.optim, mesh)


def recalled(dataset, null, n):
    """(tokenize, encode) of prepared data, whose text encoder is not here: they know the first n captions of the set, and ""."""
    batch = data.finish(data.gather(dataset, [(i, 0) for i in range(n)]), dataset, None)
    width = max(batch["text"].shape[1], null[0].shape[1])
    states, masks = (torch.cat([F.pad(a, (0, 0) * (a.ndim - 2) + (0, width - a.shape[1])) for a in pair])
                     for pair in ((null[0].to(batch["text"].dtype), batch["text"]), (null[1], batch["mask"])))
    row = {caption: i for i, caption in enumerate(["", *batch["caption"]])}
    tokenize = lambda texts: (torch.tensor([[row[text]] * width for text in texts]), masks[[row[text] for text in texts]])
    return tokenize, lambda ids, mask: states.to(ids.device)[ids[:, 0], :ids.shape[1]]


def to_device(c, batch, null, device):
    """A batch on the device; with a frozen text encoder, and where which tokens are real (or could be, by dropping the caption)."""
    if c.text.encoder != "bpe" and not c.text.pad:
        batch["slots"] = kernels.text_slots(batch["mask"] | null[1][:, :batch["mask"].shape[1]])
    return {k: v.to(device, non_blocking=True) for k, v in batch.items() if torch.is_tensor(v)}


def update_ema(c, model, ema, step):
    """Ramped up, so that the first thousand steps are not an average with the initialisation."""
    decay = min(c.optim.ema, (1 + step) / (10 + step)) ** c.optim.ema_every
    live = dict(model.named_parameters())
    with torch.no_grad():
        torch._foreach_lerp_([muon.local(p) for p in ema.parameters()], [muon.local(live[name]) for name, _ in ema.named_parameters()], 1 - decay)


def train(c):
    rank, world, device = start(c.train.timeout)
    agree(world, setting(c, device))
    if c.text.encoder != "bpe":
        c = replace(c, text=replace(c.text, dim=pretrained.text_dim(c)))
    if (micros := c.train.batch // c.train.micro_batch) % world:
        fail(f"{micros} micro-batches cannot be shared by {world} ranks: choose --train.micro_batch so that batch / micro_batch is a multiple of {world}")
    folder = Path(c.out or f"runs/{c.name}")
    if folder.exists() and not folder.is_dir():
        fail(f"--out={folder} is a file: it must be a folder, or not be there yet")
    say = tqdm.write if rank == 0 else lambda *_: None
    loaded = []
    together(world, lambda: loaded.extend(data.load(c)))
    dataset, held_out = loaded
    agree(world, {"the data set": (index := digest_of(dataset))})
    first = dataset.get(0, 0)[0]
    has = first if isinstance(first, dict) else {}                                                        # what `data.py prepare` made: see data.py
    encode, teacher, vae = frozen(c, device, has)
    align_dim = teacher.dim if teacher else has["teacher"].shape[1] if "teacher" in has else 0
    perceptual = pretrained.perceptual(c, device)
    model, ema, optimizer = build(c, device, align_dim, world)
    step, source = resume(folder, c, model, ema, optimizer, world, index)
    if c.init and not step:
        source = load_weights(c.init, model, ema, optimizer, say)
    bpe = None
    if c.text.encoder == "bpe":                                                                           # weights go with their vocabulary
        bpe = pretrained.bpe_load(source / "bpe.tiktoken") if source else \
            pretrained.bpe_train([text for captions in dataset.captions for text in captions], c.text.vocab)
    if "text" in has:
        null = dataset.null[None], torch.ones(1, len(dataset.null), dtype=torch.bool)
        tokenize, encode_prompts = (pretrained.tokenizer(c), pretrained.text_encoder(c, device)) if c.sample.prompts else \
            recalled(held_out, null, min(8, len(held_out)))
    else:
        tokenize, encode_prompts = pretrained.tokenizer(c, bpe), encode
        null = tokenize([""])
    null = tuple(F.pad(a, (0, 0) * (a.ndim - 2) + (0, max(0, c.text.length - a.shape[1]))) for a in null)       # as wide as any batch
    here = tuple(a.to(device) for a in null)
    lengths = next(data.fixed_batches(held_out, tokenize, 256, 256))["mask"].sum(1) if "text" in has else \
        tokenize([dataset.captions[i][0] for i in range(min(2000, len(dataset)))])[1].sum(1)
    if cut := int((lengths == c.text.length).sum()):
        say(f"{cut} of {len(lengths)} captions fill all of text.length={c.text.length}; what does not fit is cut off: raise it for long captions")
    steps = c.train.images // c.train.batch
    if step >= steps:
        say(f"{folder} is finished: python sample.py \"...\" --checkpoint={folder}; to train on, --train.images=...; to start afresh, another --out")
        return leave(world)
    compiled = compile_blocks(c, model, device)
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
    log, saver = Log(folder, c, step, device, rank), Saver(folder, c, bpe, index, rank, world)
    watch, rates = Watch(rank, world, c.train.timeout, device), deque(maxlen=50)                          # img/s of the last log lines
    say(f"{c.name}: {count(model) / 1e6:.1f}M parameters + {sum(p.numel() for p in model.parameters()) / 1e6 - count(model) / 1e6:.1f}M text and "
        f"heads, {len(dataset):,} images, {str(model.dtype)[6:]}, {'compiled blocks' if compiled else 'eager'}, "
        f"{'resumed at' if step else 'from'} image {step * c.train.batch:,} of {steps * c.train.batch:,}, in {folder}")
    bar = tqdm(total=steps * c.train.batch, initial=step * c.train.batch, unit="img", disable=rank > 0, smoothing=0.05, dynamic_ncols=True)
    total, since, bad, late, clock = torch.zeros(len(PARTS), device=device), step, 0, Late(2), Clock(60 * log.minutes)
    over = lambda images: 0 < images <= step * c.train.batch
    crossed = lambda every: every and step * c.train.batch // every > (step - 1) * c.train.batch // every
    model.train()
    while step < steps:
        # forward, backward
        now = replace(c, model=replace(c.model, route=None)) if over(c.model.dense_after) else c
        now = replace(now, align=replace(c.align, weight=0.0)) if over(c.align.until) else now
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
                loss = look(c, model, ema, tokenize, encode_prompts, vae, held_out, folder, step, log, rank, world, device)
                say(f"image {step * c.train.batch:,}: validation loss {loss:.4f}")
        if crossed(c.train.save_every) or step == steps or stopping:
            watch.at(step, "the checkpoint")
            with clock.stopped():
                saver.save(step, model, ema, optimizer, log)
        if stopping:
            bar.close()
            saver.last(watch)
            say(f"{stop[0] if stop else 'stopped'}: saved at image {step * c.train.batch:,}; the same command goes on from there")
            return leave(world, watch)
    bar.close()
    saver.last(watch)
    say(f"finished after {clock.total() / 60:.1f} minutes of training: look into {folder}/samples, then python sample.py \"a red apple\"")
    leave(world, watch)


# ------------------------------------------------------------------------------------------------------------------
# Where the time goes

def bench(c, repeats=20):
    """Time a training step by part on synthetic data, frozen networks with random weights, one micro-batch per step."""
    device = start()[2]
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
    cost = 3 * flops(c, length if c.text.encoder == "bpe" or c.text.pad else real.float().mean().item())
    row = {"recipe": c.name, **provenance(device), "dtype": str(model.dtype)[6:], "compiled": compiled, "micro_batch": size, "repeats": repeats,
           "img_s": size / seconds, "ms": 1000 * seconds, "ms_min": 1000 * min(whole), "ms_max": 1000 * max(whole), **{f"ms_{k}": v for k, v in parts.items()},
           "mfu": cost * size / seconds / peak_flops(device, model.dtype), "gib": peak_memory(device)}
    print(f"\n{c.name}: {row['device']}, torch {row['torch']}, {row['dtype']}, {'compiled' if compiled else 'eager'}, micro-batch {size}")
    for part in ("data", "text", "teacher", "perceptual", "forward", "backward", "optimizer", "ema"):
        if part in parts:
            print(f"  {part:10} {parts[part]:9.1f} ms {parts[part] / row['ms']:7.0%}")
    print(f"  {'step':10} {row['ms']:9.1f} ms (median of {repeats}; {row['ms_min']:.1f} to {row['ms_max']:.1f})   "
          f"{row['img_s']:.0f} images/s   MFU {row['mfu']:.0%}   peak memory {row['gib']:.1f} GiB")
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))


LOADER, RANK = "a loader process has died (out of memory?)", "another rank has ended"                   # what an error then says, by its words
DEATHS = {**dict.fromkeys(("DataLoader worker", "EOFError", "BrokenPipeError", "ConnectionRefusedError", "ConnectionResetError", "listener-"), LOADER),
          **dict.fromkeys(("Connection closed by peer", "Connection reset by peer", "Broken pipe"), RANK)}


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
            bench(c)


if __name__ == "__main__":
    main(sys.argv[1:])

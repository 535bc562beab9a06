"""Many ranks as one: the group and its sharding, agreement, a watch for ranks that hang, checkpoints that all ranks write and read.

    mesh = mesh_of(c, model, device, world)     # (replicas, shards): ddp is (world, 1), fsdp (1, world), hsdp between
    together(world, action)                     # if it fails on one rank, all stop with one line
    saver.save(step, model, ema, optimizer, log)

Native torch.distributed: NCCL (RCCL on ROCm) on GPUs, gloo on CPU. One process needs none of it and goes through the same code.
"""
import errno, hashlib, json, math, os, shutil, sys, threading, time, warnings, zlib
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from tqdm import tqdm

import configs, muon, pretrained
from configs import fail

# ------------------------------------------------------------------------------------------------------------------
# The group, and how the weights lie on it

def device():
    """This process's: its own GPU of the node, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= gpus:                                                                                     # said by the first one too many: rank 0 is well
        sys.exit(f"error: {os.environ.get('LOCAL_WORLD_SIZE')} processes on this node, but {gpus} GPUs: lower --nproc_per_node" if local == gpus else 1)
    torch.cuda.set_device(local)
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)     # torch 2.13's, on an H100: NaN gradients under a mask of 64, 192, ... keys (pytorch issue 196678)
    return torch.device("cuda", local)


def start(timeout=600):
    """(rank, world, device). Under torchrun it joins the group: NCCL (RCCL on ROCm) on GPUs, gloo on CPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    here = device()
    if world > 1:
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout + 60))   # `Watch` is first, and says more
    return rank, world, here


def leave(world, watch=None):
    """After gloo, an ordinary exit sometimes aborts in tear-down, all work done: leave without it."""
    if watch:
        watch.over.set()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(0)


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
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method    # half a second
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")                                     # we change no output in place
    pieces = {name: p.pieces for name, p in model.named_parameters() if hasattr(p, "pieces")}
    policy = lambda dtype: MixedPrecisionPolicy(dtype, torch.bfloat16 if c.train.reduce == "bf16" else torch.float32, cast_forward_inputs=False)
    options = dict(mesh=mesh if mesh.shape[0] > 1 else mesh["shard"], reshard_after_forward=True)
    if model.align:                                                                                       # its products are fp32
        fully_shard(model.align, mp_policy=policy(None), **options)
    for part in (*blocks_of(model), model):
        fully_shard(part, mp_policy=policy(None if model.dtype == torch.float32 else model.dtype), **options)
    register_fsdp_forward_method(model, "text_kv")          # a sampler calls it first: else the text's blocks would become roots of their own
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


def hold(folder):
    """Keep other runs out of the folder, as long as this process lives and the result is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)                                                  # not inherited by loader processes
    except ImportError:                                                                                   # Windows
        pass
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):                                               # a file system without locks
            tqdm.write(f"{folder} cannot be locked ({error.strerror}): see that no other run writes into it", file=sys.stderr)
            return file
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


def extent(x, mesh, whole=False):
    """Return (start, flat view): this replica's share of the rows of x that this shard holds, or all of them, and where
    in the flattened x it starts. Together the ranks' shares are all of x, once."""
    replicas, shards = mesh.shape if mesh else (1, 1)
    replica, shard = mesh.get_coordinate() if mesh else (0, 0)
    part = muon.local(x).view(-1)
    start = 0
    if hasattr(x, "to_local"):
        start = shard * -(-x.shape[0] // shards) * x.shape[1:].numel()
    if whole or x.ndim == 0:
        return start, part
    size = -(-len(part) // replicas)
    first = replica * size
    return start + first, part[first:first + size]


def parts(model, ema, optimizer, reading=False):
    """What this rank writes of it, or reads: {file: [(name, start, flat tensor)]}."""
    files = {part: [(name, *extent(x, optimizer.mesh, reading)) for name, x in net.state_dict().items()] for part, net in (("model", model), ("ema", ema))}
    files["optimizer"] = [(f"{name}.{key}", *extent(x, optimizer.mesh, reading))
                          for name, p in model.named_parameters() for key, x in optimizer.state[p].items()]
    return files


def place(tensors):
    """The beginning of a safetensors file of {name: (dtype, shape)}. -> bytes, {name: where its own begin}"""
    kinds, table, end = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64", torch.bool: "BOOL"}, {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + row["data_offsets"][0] for name, row in table.items()}


def snapshot(model, ema, optimizer, old=None):
    """What this rank writes, as it is now, on the host: in the memory of an old snapshot, if given one. New memory costs more than the copy."""
    now = parts(model, ema, optimizer)
    files = old or {file: [(name, at, torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)) for name, at, x in rows] for file, rows in now.items()}
    for x, copy in ((x, copy) for file in now for (_, _, x), (_, _, copy) in zip(now[file], files[file], strict=True)):
        copy.copy_(x.detach(), non_blocking=True)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return contents(model, ema, optimizer), files


def write(folder, step, c, bpe, index, files, mine, rank=0, world=1, group=None):
    """Written under another name, flushed to disk, renamed: a crash at any moment leaves the older checkpoints whole."""
    final = folder / f"step_{step:08d}"
    part = folder / f"{final.name}.tmp"

    def prepare():
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            for file, tensors in files.items():
                with open(part / f"{file}.safetensors", "wb") as f:
                    f.truncate(len(place(tensors)[0]) + sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values()))

    def fill():
        """-> {file: {where: (bytes, their checksum)}} of what this rank wrote. Into files of full size that are not opened for reading:
        else an NFS client would write whole pages, old bytes or zeros over what another node wrote beside its own."""
        wrote = {}
        for file, tensors in files.items():
            head, begin = place(tensors)
            pieces = {begin[name] + start * x.itemsize: x.view(torch.uint8).numpy() for name, start, x in mine[file] if len(x)}
            pieces |= {0: head} if rank == 0 else {}
            with os.fdopen(os.open(part / f"{file}.safetensors", os.O_WRONLY | getattr(os, "O_BINARY", 0)), "wb") as f:
                for at, piece in pieces.items():
                    f.seek(at), f.write(piece)
                f.flush(), os.fsync(f.fileno())
            wrote[f"{file}.safetensors"] = {at: (len(piece), zlib.crc32(piece)) for at, piece in pieces.items()}
        if rank == 0:
            configs.save(c, part / "config.json")
            (part / "state.json").write_text(json.dumps({"step": step, "images": step * c.train.batch, "data": index}))
            if bpe:
                pretrained.bpe_save(bpe, part / "bpe.tiktoken")
        return wrote

    def sums():
        """Of whole files, once they are seen to hold what all ranks meant to write."""
        found = {}
        for file in sorted(part.iterdir())[rank::world]:
            with open(file, "rb+") as f:
                for at, (size, crc) in ((at, piece) for wrote in written for at, piece in wrote.get(file.name, {}).items()):
                    f.seek(at)
                    if zlib.crc32(f.read(size)) != crc:
                        raise OSError(f"{file} does not hold what was written at byte {at}: does the file system take writes of several nodes into one file?")
                f.seek(0)
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
        written = together(world, fill, group)
        found = together(world, sums, group)
        together(world, finish, group)
    except SystemExit:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)                                                       # a full disk: make room again
        raise


def prune(folder, newest, c):
    for torn in folder.glob("step_*.tmp"):
        shutil.rmtree(torn)
    keep = lambda path: c.train.keep_every and int(path.name[5:]) * c.train.batch % c.train.keep_every < max(c.train.batch, c.train.save_every)
    for old in sorted(p for p in folder.glob("step_*") if p.name <= newest.name)[:-2]:                     # later ones are damaged
        if not keep(old):
            shutil.rmtree(old)


class Saver:
    """Checkpoints while the training goes on: it waits for a copy of this rank's part to memory, the rest is a thread's."""

    def __init__(self, folder, c, bpe, index, rank, world, group, watch):
        self.folder, self.c, self.bpe, self.index, self.ranks, self.thread, self.failed, self.memory = folder, c, bpe, index, (rank, world), None, "", None
        self.group, self.watch = group, watch                                                             # not the default group: it talks while we do

    def save(self, step, model, ema, optimizer, log):
        self.wait()
        files, self.memory = snapshot(model, ema, optimizer, self.memory)

        def work():
            try:
                write(self.folder, step, self.c, self.bpe, self.index, files, self.memory, *self.ranks, self.group)
                self.failed = ""
            except (SystemExit, RuntimeError) as error:
                self.failed = f"the checkpoint of step {step} could not be written: {str(getattr(error, 'message', error))[:200]}"
                if self.ranks[0] == 0:
                    tqdm.write(f"WARNING: {self.failed}; the training goes on, the older ones are whole", file=sys.stderr)
                    log.write(step, failed=self.failed)
        self.thread = threading.Thread(target=work)
        self.thread.start()

    def wait(self):
        """For the one before, however slow the disk is: it has the timeout of its own group."""
        while self.thread and self.thread.is_alive():
            self.watch.since = time.monotonic()
            self.thread.join(min(1, self.watch.timeout / 4))

    def last(self):
        self.wait()
        if self.failed:
            self.watch.over.set()
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

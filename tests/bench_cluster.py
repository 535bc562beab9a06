"""What many ranks cost, on gloo and this machine: steps, bytes sent, the optimizer's share; and checkpoints beside torch.distributed.checkpoint.

    python tests/bench_cluster.py                           # [--steps=10] on 1, 2 and 4 processes of one thread: ddp, fsdp, hsdp
    python tests/bench_cluster.py --checkpoint              # [--width=1024 --depth=6] the same state by our files and by DCP; stalls of real runs

It runs `train.py` as it is, with the same micro-batch on every rank, and looks at the sockets of each process: the kernel counts what they
have sent. The formula is that of --plan, except that over gloo a rank scatters by reducing all of it, twice as much, and DTensor swaps rows for
matrices by gathering all of them, as many times as much as there are shards.
"""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parent.parent))

import argparse
import json
import socket
import stat
import statistics
import struct
import subprocess
import tempfile
import time

import torch
import torch.distributed as dist

import cluster
import configs
import muon
import plan
import train


def sent():
    """Bytes that the TCP sockets of this process have sent so far: Linux, tcp_info.tcpi_bytes_sent."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                with socket.socket(fileno=os.dup(int(name))) as s:
                    total += struct.unpack_from("Q", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 200)[0]
        except OSError:                                                                                   # not of TCP, or of the listing itself
            pass
    return total


# ------------------------------------------------------------------------------------------------------------------
# What a rank does

def training(flags):
    """A run of train.py. -> medians of a step, bytes sent in a step, the formula's, and how long each checkpoint held it up"""
    step, build, save, marks, found = muon.Muon.step, train.build, train.Saver.save, [], {"stalls": []}

    def timed_step(self, *args, **kwargs):
        begin = time.perf_counter()
        step(self, *args, **kwargs)
        marks.append((time.perf_counter(), time.perf_counter() - begin, sent()))

    def seen_build(c, device, align_dim, world=1):
        model, ema, optimizer = build(c, device, align_dim, world)
        rows = plan.traffic(c, model, optimizer, c.train.batch // c.train.micro_batch // world)
        found.update(formula=sum(size for *_, size in rows), gloo=sum(size * {"scatter": 2, "exchange": optimizer.shards}.get(how, 1) for _, how, size in rows),
                     parameters=sum(p.numel() for p in model.parameters()))
        return model, ema, optimizer

    def timed_save(self, *args):
        self.wait()                                                                                       # of the one before
        begin = time.perf_counter()
        save(self, *args)
        found["stalls"].append(time.perf_counter() - begin)
    muon.Muon.step, train.build, train.Saver.save = timed_step, seen_build, timed_save
    train.main(flags)
    muon.Muon.step, train.build, train.Saver.save = step, build, save
    marks = marks[3:]                                                                                     # warm by then; ddp has its buckets
    seconds = [b[0] - a[0] for a, b in zip(marks, marks[1:])]
    return {**found, "seconds": statistics.median(seconds), "optimizer": statistics.median(m[1] / s for m, s in zip(marks[1:], seconds)),
            "bytes": (marks[-1][2] - marks[0][2]) / len(seconds)}


def checkpoints(flags):
    """The same state written and read by us and by DCP. -> {who: {what: seconds, bytes: of the files}}"""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
    c = configs.parse(flags)
    mine, world, device = train.start()
    if world == 1:
        dist.init_process_group("gloo", rank=0, world_size=1)                                             # DCP wants one
    model, ema, optimizer = train.build(c, device, 0, world)
    kinds = {p: ("momentum",) if group["kind"] == "muon" else ("exp_avg", "exp_avg_sq") for group in optimizer.param_groups for p in group["params"]}
    state = {"model": model.state_dict(), "ema": ema.state_dict(),
             "optimizer": {f"{name}.{kind}": torch.ones_like(p.detach()) for name, p in model.named_parameters() for kind in kinds[p]}}
    folder, times = Path(c.out), {who: {k: [] for k in ("write", "held", "done", "read")} for who in ("ours", "DCP")}
    watch = cluster.Watch(mine, world, c.train.timeout, device)
    saver = train.Saver(folder / "async", c, None, "", mine, world, dist.new_group(backend="gloo"), watch)
    stager = DefaultStager(StagingOptions(False, False, False, False))

    def timed(who, what, action):
        dist.barrier()
        os.sync()                                                                                         # what others have left to write
        dist.barrier()
        begin = time.perf_counter()
        result = action()
        times[who][what].append(time.perf_counter() - begin)
        return result, begin

    def ours(k):
        timed("ours", "write", lambda: cluster.write(folder, k, c, None, "", *cluster.snapshot(model, ema, optimizer), mine, world))
        _, begin = timed("ours", "held", lambda: saver.save(k, model, ema, optimizer, None))
        saver.last()
        watch.at(k, "the next")
        times["ours"]["done"].append(time.perf_counter() - begin)
        timed("ours", "read", lambda: train.resume(folder, c, model, ema, optimizer, world, ""))

    def theirs(k):
        timed("DCP", "write", lambda: dcp.save(state, storage_writer=dcp.FileSystemWriter(folder / "dcp")))
        future, begin = timed("DCP", "held", lambda: dcp.async_save(state, storage_writer=dcp.FileSystemWriter(folder / "later"), async_stager=stager))
        future.result()
        times["DCP"]["done"].append(time.perf_counter() - begin)
        timed("DCP", "read", lambda: dcp.load(state, checkpoint_id=folder / "dcp"))
    for k in range(1, 5):
        for one in (ours, theirs)[::(-1) ** k]:                                                           # a shared disk is slow now and then
            one(k)
    stager.close()
    size = lambda path: sum(f.stat().st_size for f in path.iterdir())
    train.leave(max(world, 2))
    files = {"ours": folder / "step_00000004", "DCP": folder / "dcp"}
    found = {who: {**{k: min(v) for k, v in times[who].items()}, "bytes": size(path)} for who, path in files.items()}
    return {**found, "parameters": sum(p.numel() for p in model.parameters())}


def rank(folder, jobs):
    """All jobs, one after the other in the same processes: starting them takes longer."""
    mine, found = int(os.environ["RANK"]), []
    train.leave = lambda world, watch=None: (watch and watch.over.set(), world > 1 and (dist.barrier(), dist.destroy_process_group()))
    for k, (port, job, flags) in enumerate(jobs):
        os.environ["MASTER_PORT"] = str(port)
        found.append({"training": training, "checkpoints": checkpoints}[job]([*flags, f"--out={folder / str(k)}"]))
    (folder / f"{mine}.json").write_text(json.dumps(found))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


# ------------------------------------------------------------------------------------------------------------------
# And who starts them

def port():
    with socket.create_server(("localhost", 0)) as free:
        return free.getsockname()[1]


def run(world, jobs):
    """[(job, flags)] on `world` processes of one thread. -> for each job what each rank found"""
    with tempfile.TemporaryDirectory() as folder:
        jobs = json.dumps([(port(), *job) for job in jobs])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}
        ranks = [subprocess.Popen([sys.executable, __file__, "--rank", folder, jobs], env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for r in range(world)]
        said = [p.communicate()[0] for p in ranks]
        assert all(p.returncode == 0 for p in ranks), "\n".join(text[-2000:] for text in said)
        return list(zip(*(json.loads(Path(folder, f"{r}.json").read_text()) for r in range(world))))


def flags(world, mode, steps):
    """The same work for every rank of any world."""
    return ["--config=emoji", "--model.route=none", "--optim.modulation=muon", "--train.compile=no", "--train.eval_every=0", "--train.save_every=0",
            "--train.log_every=1000", "--train.val_images=8", "--sample.steps=1", f"--parallel={mode}", "--shard=2", "--train.micro_batch=8",
            f"--train.batch={8 * world}", f"--train.images={8 * world * steps}"]


def steps(count):
    print(f"The emoji recipe, dense and with Muon for adaLN too, bf16, micro-batch 8 on every rank, one thread each, {os.cpu_count()} cores, "
          f"torch {torch.__version__}; median of {count} steps\n")
    print("| ranks | mode | gradients | ms a step | of it optimizer | MB sent by a rank | formula, gloo | formula, ring |\n" + "|---" * 8 + "|")
    for world in (1, 2, 4):
        modes = [(mode, reduce) for mode in {1: ["ddp"], 2: ["ddp", "fsdp"], 4: ["ddp", "fsdp", "hsdp"]}[world] for reduce in ("fp32", "bf16")[:world]]
        found = run(world, [("training", [*flags(world, mode, count + 4), f"--train.reduce={reduce}"]) for mode, reduce in modes])
        for (mode, reduce), ranks in zip(modes, found):
            most = lambda key: max(r[key] for r in ranks)                                   # noqa: B023 (called at once)
            print(f"| {world} | {mode} | {reduce} | {1000 * most('seconds'):.0f} | {most('optimizer'):.0%} | {most('bytes') / 1e6:.2f} | "
                  f"{most('gloo') / 1e6:.2f} | {most('formula') / 1e6:.2f} |", flush=True)


def saving(width, depth):
    shape = [f"--model.width={width}", f"--model.depth={depth}", f"--model.heads={width // 64}"]
    print(f"Weights, average, optimizer in shards (fsdp), {os.cpu_count()} cores, torch {torch.__version__}; best of 4 in turn, slowest rank, files cached\n")
    print("| ranks | by | M parameters | GB | written in s | async: held up for s | until written, s | read in s |\n" + "|---" * 8 + "|")
    for world in (1, 2, 4):
        ranks = run(world, [("checkpoints", [*flags(world, "fsdp", 2), *shape])])[0]
        for who in ("ours", "DCP"):
            slowest = " | ".join(f"{max(r[who][k] for r in ranks):.2f}" for k in ("write", "held", "done", "read"))
            print(f"| {world} | {who} | {ranks[0]['parameters'] / 1e6:.0f} | {ranks[0][who]['bytes'] / 1e9:.2f} | {slowest} |", flush=True)
    print()
    for recipe in ("debug", "emoji"):
        for world, mode in ((1, "auto"), (2, "ddp"), (2, "fsdp")):
            ranks = run(world, [("training", [*flags(world, mode, 24), f"--config={recipe}", f"--train.save_every={8 * world * 4}"])])[0]
            held = [max(stalls) for stalls in zip(*(r["stalls"] for r in ranks))]
            print(f"{recipe}, {world} x {mode}: {len(held)} checkpoints held training up for {1000 * min(held):.0f} to {1000 * max(held):.0f} ms", flush=True)


def main():
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), json.loads(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", action="store_true")
    for name, default in dict(steps=10, width=1024, depth=6).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    saving(args.width, args.depth) if args.checkpoint else steps(args.steps)


if __name__ == "__main__":
    main()

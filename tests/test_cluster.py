"""Several ranks: the same trajectory on any number of them in every mode, checkpoints that fit all, and what goes wrong on clusters.

pytest starts processes of this very file: `python tests/test_cluster.py RANK FOLDER` runs the part of one rank in `ranks`,
one training after the other in the same processes, because starting them is what takes the time."""
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import cluster
import configs
import muon
import train
from tools import prepare

ROOT = Path(__file__).parent.parent
TINY = ("--config=debug --train.precision=fp32 --optim.ns_dtype=fp32 --model.size=16 --model.patch=4 --model.width=32 --model.depth=3 --text.vocab=400 "
        "--train.batch=12 --train.micro_batch=1 --train.eval_every=0 --train.save_every=0 --train.log_every=1 --train.val_images=5 --sample.steps=1 "
        "--optim.cooldown=0").split()
LONG = bool(os.environ.get("NANOT2I_LONG"))                  # all of it: some ten minutes
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def newest(folder):
    return sorted(p for p in Path(folder).glob("step_*") if p.suffix != ".tmp")[-1]


def sums(checkpoint):
    """sha256 by file: of what does not say how the run was started."""
    return {k: v for k, v in json.loads((checkpoint / "sums.json").read_text()).items() if k != "config.json"}


def damage(file, change):
    file.write_bytes(change(file.read_bytes()))


# ------------------------------------------------------------------------------------------------------------------
# What a rank does

def group(rank, world, port):
    """Environment of one training; false for a rank that has no part in it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    return rank < world


def ranks(rank, folder, which):
    train.leave = lambda world, watch=None: (watch and watch.over.set(), world > 1 and (dist.barrier(), dist.destroy_process_group()))  # lives on
    ports = iter(range(int(os.environ["PORTS"]), 65536))
    original = train.losses

    def run(out, world, *args):
        if group(rank, world, next(ports)):
            train.main([*TINY, f"--out={folder / out}", "--train.images=360", *args])

    def again(source, out, world, *args):
        """Load a checkpoint on other ranks, in another mode, and write it again."""
        if not group(rank, world, next(ports)):
            return
        c = configs.parse([*TINY, f"--out={folder / source}", "--train.images=360", *args])
        device = train.start()[2]
        model, ema, optimizer = train.build(c, device, 0, world)
        step, checkpoint = train.resume(folder / source, c, model, ema, optimizer, world, index := train.data.load(c)[0].digest)
        bpe = train.pretrained.bpe_load(checkpoint / "bpe.tiktoken")
        cluster.write(folder / out, step, c, bpe, index, *cluster.snapshot(model, ema, optimizer), rank, world)
        train.leave(world)

    def poisoned(bad, *args):
        """A run in which rank `bad` has a NaN in the last micro-batch of the second step."""
        calls = []

        def losses(*a):
            loss, parts = original(*a)
            calls.append(loss)
            return loss * (float("nan") if rank == bad and len(calls) == 12 else 1), parts
        train.losses = losses
        run(f"poisoned{bad}", 2, *args, "--train.images=72")
        train.losses = original

    def refused(name, world, *args, change=lambda: None):
        """A run that must not start; the line that it ends with is printed."""
        try:
            change()
            run(name, world, *args)
        except SystemExit as stop:
            print(f"{name}: {stop.code}", flush=True)
            assert stop.code and (rank == 0) == str(stop.code).startswith("error: ")
            if dist.is_initialized():
                dist.destroy_process_group()
        else:
            assert rank >= world, f"{name} was not refused"

    def trajectories():
        run("one", 1)
        for world, mode in ((2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"), (4, "hsdp")):
            run(f"{mode}{world}", world, f"--parallel={mode}", "--shard=2")

    def elastic():
        for k, (world, mode) in enumerate(((4, "fsdp"), (2, "ddp"), (1, "auto"), (3, "fsdp"), (4, "hsdp"), (3, "ddp"))):
            again(f"again{k - 1}" if k else "one", f"again{k}", world, f"--parallel={mode}", "--shard=2")
            run("elastic", world, f"--parallel={mode}", "--shard=2", f"--train.images={60 * k + 60}")

    def poison():
        poisoned(0, "--parallel=ddp")
        poisoned(1, "--parallel=ddp")

    def disk():
        """It is full for rank 1, from the second checkpoint on; then the newest is damaged."""
        args = ["--parallel=fsdp", "--train.save_every=24"]
        run("full", 2, *args, "--train.images=24")
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, -1))
        refused("full", 2, *args, "--train.images=72")
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
        print("kept", rank, [p.name for p in (folder / "full").glob("step_*") if p.suffix != ".tmp"], flush=True)
        run("full", 2, *args, "--train.images=96")
        if rank == 0:
            damage(newest(folder / "full") / "optimizer.safetensors", lambda b: b[:-999] + bytes([b[-999] ^ 4]) + b[-998:])
        run("full", 2, *args, "--train.images=120")
        if rank == 0:
            damage(newest(folder / "full") / "ema.safetensors", lambda b: b[:-5])
        run("full", 2, *args, "--train.images=360")

    def slowness():
        """Rank 1 computes for long in step 10, rank 0 waits for data in step 14."""
        batches, counter = train.data.batches, iter(range(10_000))
        train.losses = lambda *a: (time.sleep(2 * (rank == 1 and next(counter) == 60)), original(*a))[1]
        train.data.batches = lambda *a: (b for k, b in enumerate(batches(*a)) if not time.sleep(2 * (rank == 0 and k == 84)))
        run("slow", 2, "--parallel=ddp", "--train.images=192")
        train.losses, train.data.batches = original, batches

    def mistakes():
        refused("config", 2, f"--optim.lr={1 + rank}", f"--seed={rank}")
        setting, load = train.setting, train.data.load
        train.setting = lambda *a: {**setting(*a), "code": "abc" if rank else "abd"}
        refused("code", 2)
        train.setting = lambda *a: {**setting(*a), "torch": f"2.13.{rank}"}
        refused("torch", 2)
        train.setting = setting

        def other(c):
            dataset, held_out = load(c)
            dataset.digest = "other" if rank else dataset.digest
            return dataset, held_out
        train.data.load = other
        refused("index", 2)
        train.data.load = lambda c: train.fail("no folder elsewhere") if rank else load(c)
        refused("absent", 2)
        train.data.load = load
        refused("odd", 2, "--train.micro_batch=4")
        refused("hsdp", 2, "--parallel=hsdp")
        refused("hsdp3", 3, "--parallel=hsdp", "--shard=2")
        refused("one", 2, "--model.depth=4", "--train.images=720")
        refused("fsdp2", 2, "--data=nowhere", "--train.images=720")
        refused("ddp2", 2, "--data.subset=animals", "--train.images=720")
        refused("init", 2, f"--init={folder / 'one'}", "--model.depth=4")
        refused("busy", 2, "--train.images=24")
        away = lambda: os.chdir(folder / "busy" if rank else folder)                                      # another node, which sees other files
        refused("weights", 2, "--teacher=vision", "--align.block=1", change=away)
        refused("unseen", 2, "--out=one", "--train.images=720", change=away)
        os.chdir(ROOT)

    def early():
        """A rank that samples, and so calls blocks alone, before anyone has called the whole network."""
        if not group(rank, 2, next(ports)):
            return
        c = configs.parse([*TINY, "--parallel=fsdp"])
        device, ids, mask, outputs = train.start()[2], torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool), []
        z, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
        for world in (1, 2):
            model, _, optimizer = train.build(c, device, 0, world)
            for p in model.parameters():                                                                  # the last layer starts at zero
                muon.local(p).data.add_(0.05)
            with torch.no_grad(), cluster.whole(model) as net:
                if rank == 0:
                    net.text_kv(ids, mask)
            for _ in range(3):
                outputs.append(model(z, t, ids, mask)[0])
                outputs[-1].square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        train.leave(2)
        assert all((a - b).abs().max() <= 1e-4 * a.abs().max() for a, b in zip(outputs[:3], outputs[3:])) and (outputs[0] - outputs[1]).abs().max() > 0.01

    def half():
        for mode in ("ddp", "fsdp"):
            run(f"bf16{mode}", 2, f"--parallel={mode}", "--train.reduce=bf16", "--train.images=120")
        for world in (1, 2):
            run(f"half{world}", world, "--parallel=fsdp" if world > 1 else "--parallel=auto", "--train.images=120", "--train.precision=bf16",
                f"--teacher={folder / 'vision'}", "--align.block=1", "--align.hidden=16")

    for part in (trajectories, elastic, poison, disk, slowness, mistakes, early, half):
        if part.__name__ in which or not which:
            part()


if __name__ == "__main__":
    ranks(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


# ------------------------------------------------------------------------------------------------------------------
# What came of it

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All those trainings, by four processes. (The default suite has two ranks in test_loop.py and the grids of Muon in test_muon.py.)"""
    if not LONG:
        pytest.skip("minutes: NANOT2I_LONG=1, as .ci/run says")
    from transformers import Dinov2Config, Dinov2Model
    folder = tmp_path_factory.mktemp("ranks")
    vision = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2)
    Dinov2Model(vision).save_pretrained(folder / "vision")
    (folder / "busy").mkdir()
    lock = train.hold(folder / "busy")                                                                    # we are another run
    env = {**ENV, "PORTS": str(20_000 + os.getpid() % 12_000)}                                            # Linux gives out those above 32,767 to anyone
    files = [open(folder / f"rank{r}.txt", "w+") for r in range(4)]
    started = [subprocess.Popen([sys.executable, __file__, str(r), folder], cwd=ROOT, env=env, stdout=f, stderr=f) for r, f in enumerate(files)]
    deadline = time.time() + 400
    while time.time() < deadline and any(p.poll() is None for p in started) and not any(p.poll() for p in started):
        time.sleep(0.1)
    for p in started:
        p.kill()
    said = [(folder / f"rank{r}.txt").read_text() for r in range(4)]
    assert all(p.wait() == 0 for p in started), "\n".join(text[-2000:] for text in said)
    lock.close()
    return folder, said


def losses(folder):
    return [r["loss"] for r in rows(folder) if "loss" in r]


@pytest.mark.parametrize("name", ["ddp2", "fsdp2", "ddp4", "fsdp4", "hsdp4", "elastic"])
def test_the_trajectory_does_not_depend_on_the_ranks(done, name):
    folder, _ = done
    ours, theirs = losses(folder / "one"), losses(folder / name)
    assert len(ours) == len(theirs) == 30 and max(abs(a - b) / a for a, b in zip(ours, theirs)) <= 1e-5
    for file in ("model", "ema", "optimizer"):
        a, b = (load_file(newest(folder / f) / f"{file}.safetensors") for f in ("one", name))
        assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) <= 1e-4, file
    norms = [[r["norm"] for r in rows(folder / f) if "norm" in r] for f in ("one", name)]
    assert max(abs(a - b) / a for a, b in zip(*norms)) <= 1e-3
    values = [[r["val_loss"] for r in rows(folder / f) if "val_loss" in r] for f in ("one", name)]
    assert abs(values[0][-1] - values[1][-1]) <= 1e-5 * values[0][-1]
    pictures = [(folder / f / "samples" / f"{360:010d}.png").stat().st_size for f in ("one", name)]
    assert min(pictures) > 1000


def test_a_checkpoint_loaded_on_other_ranks_and_written_again_is_the_same_to_the_bit(done):
    folder, _ = done
    chain = [sums(newest(folder / "one"))] + [sums(newest(folder / f"again{k}")) for k in range(6)]
    assert {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "bpe.tiktoken"} == set(chain[0])
    assert all(s == chain[0] for s in chain)


def test_a_nan_on_one_rank_makes_all_ranks_skip_that_step(done):
    folder, _ = done
    assert sums(newest(folder / "poisoned0")) == sums(newest(folder / "poisoned1"))
    bad = [[r["bad"] for r in rows(folder / f) if "bad" in r] for f in ("poisoned0", "poisoned1", "one")]
    assert bad[0] == bad[1] == [0, 0, 1, 0, 0, 0] and max(bad[2]) == 0
    step = load_file(newest(folder / "poisoned0") / "optimizer.safetensors")["img_in.0.weight.step"]
    assert step == 5 and all(v.isfinite().all() for v in load_file(newest(folder / "poisoned1") / "model.safetensors").values())


def test_gradients_reduced_as_bf16_are_close_and_not_the_same(done):
    folder, _ = done
    exact = [r["norm"] for r in rows(folder / "one") if "norm" in r][:10]
    for mode in ("ddp", "fsdp"):
        norms = [r["norm"] for r in rows(folder / f"bf16{mode}") if "norm" in r]
        apart = [abs(a - b) / a for a, b in zip(exact, norms)]
        assert len(norms) == 10 and 1e-6 < apart[0] < 2e-3 and max(apart) < 0.05


def test_fsdp_in_bf16_with_a_repa_head(done):
    folder, _ = done
    one, two = losses(folder / "half1"), losses(folder / "half2")
    assert len(one) == 10 and 0 < max(abs(a - b) / a for a, b in zip(one, two)) < 5e-3
    head = [load_file(newest(folder / f) / "model.safetensors")["align.0.weight"] for f in ("half1", "half2")]
    assert head[0].dtype == torch.float32 and (head[0] - head[1]).abs().max() < 0.02


def test_a_full_disk_costs_a_checkpoint_and_damage_the_newest_and_neither_the_run(done):
    folder, said = done
    assert "WARNING: the checkpoint of step 4 could not be written: rank 1: [Errno 27] File too large" in said[0] and "the training goes on" in said[0]
    assert all(f"kept {r} ['step_00000002']" in said[r] for r in (0, 1))
    assert "full: error: the checkpoint of step 6 could not be written" in said[0] and [r["step"] for r in rows(folder / "full") if "failed" in r] == []
    assert "step_00000008 is damaged (optimizer.safetensors does not match its sha256)" in said[0]
    assert "step_00000010 is damaged (ema.safetensors is" in said[0] and not any("is damaged" in text for text in said[1:])
    assert sums(newest(folder / "full")) == sums(newest(folder / "fsdp2"))


def test_a_slow_rank_is_named_and_whether_it_waited_or_computed(done):
    folder, _ = done
    slow = {r["step"]: r["slow"] for r in rows(folder / "slow") if "slow" in r}
    assert slow[11].startswith("rank 1 spent 2.") and "computing" in slow[11]
    assert slow[15].startswith("rank 0 spent 2.") and "waiting for data" in slow[15]


@pytest.mark.parametrize("name, words", [
    ("config", r"rank 1 is not set up as rank 0: --seed 1 \(rank 0: 0\), --optim.lr 2.0 \(rank 0: 1.0\)"),
    ("code", r"rank 1 is not set up as rank 0: code abc \(rank 0: abd\)"), ("torch", r"torch 2.13.1 \(rank 0: 2.13.0\)"),
    ("index", "rank 1 is not set up as rank 0: the data set"), ("absent", "rank 1: no folder elsewhere"),
    ("odd", "3 micro-batches cannot be shared by 2 ranks"), ("hsdp", "2 ranks must be two or more times"), ("hsdp3", "3 ranks must be two or more"),
    ("one", r"model.depth=3 \(now 4\)"), ("fsdp2", "no folder nowhere"), ("ddp2", "another data set than emoji is now"),
    ("init", "one is another model"), ("busy", "another run is writing into"),
    ("weights", "rank 1: .*vision"), ("unseen", r"rank 1: .*No such file .*'one/step_00000030")])
def test_what_cannot_run_together_is_one_line_on_the_first_rank_and_stops_all(done, name, words):
    _, said = done
    lines = [line for line in said[0].splitlines() if line.startswith(f"{name}: error: ")]
    assert len(lines) == 1 and re.search(words, lines[0])
    assert f"{name}: 1" in said[1].splitlines() and not any("Traceback" in text for text in said)


@pytest.mark.skipif(os.name != "posix", reason="no such locks")
def test_a_file_system_without_locks_is_told_and_not_refused(tmp_path, monkeypatch, capsys):
    import errno
    import fcntl

    def lockf(file, how):
        raise OSError(wrong, os.strerror(wrong))
    monkeypatch.setattr(fcntl, "lockf", lockf)
    wrong = errno.ENOSYS
    cluster.hold(tmp_path).close()
    assert "cannot be locked (Function not implemented)" in capsys.readouterr().err
    wrong = errno.EAGAIN
    with pytest.raises(SystemExit, match="another run is writing into"):
        cluster.hold(tmp_path)


def test_a_slow_disk_is_no_hang(tmp_path, monkeypatch):
    """The watch would end the process: its own group's timeout is the writer's."""
    c = configs.parse(TINY)
    model, ema, optimizer = train.build(c, torch.device("cpu"), 0)
    watch = cluster.Watch(0, 1, 1.0, torch.device("cpu"))
    saver, write = cluster.Saver(tmp_path, c, None, None, 0, 1, None, watch), cluster.write
    monkeypatch.setattr(cluster, "write", lambda *args: (time.sleep(3), write(*args)))
    saver.save(1, model, ema, optimizer, None)
    watch.at(1, "the checkpoint")
    saver.wait()
    assert time.monotonic() - watch.since < watch.timeout and [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("where", [3, 5000, -1])
def test_a_file_system_that_loses_bytes_between_ranks_is_found_before_the_checkpoint_counts(tmp_path, monkeypatch, where):
    """As an NFS client may that writes whole pages over what another node wrote: after all have written, before the sums are taken."""
    c = configs.parse(TINY)
    model, ema, optimizer = train.build(c, torch.device("cpu"), 0)
    save = lambda step: cluster.write(tmp_path, step, c, None, None, *cluster.snapshot(model, ema, optimizer))
    save(1)
    together = cluster.together

    def losing(world, action, group=None):
        result = together(world, action, group)
        if action.__name__ == "fill":
            damage(tmp_path / "step_00000002.tmp/model.safetensors", lambda b: b[:where] + bytes([b[where] ^ 1]) + b[where:][1:])
        return result
    monkeypatch.setattr(cluster, "together", losing)
    with pytest.raises(SystemExit, match="model.safetensors does not hold what was written"):
        save(2)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]


def test_more_processes_than_gpus_is_said_by_the_first_one_too_many(monkeypatch):
    """Rank 0 has its GPU, and waits; torchrun stops all when one ends with an error."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for local, code in ((2, "error: 4 processes on this node, but 2 GPUs: lower --nproc_per_node"), (3, 1)):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, str(local))
        with pytest.raises(SystemExit) as stop:
            cluster.start()
        assert stop.value.code == code
        with pytest.raises(SystemExit) as stop:                                                           # tools/prepare.py asks the same
            prepare.Encoder(configs.debug, False)
        assert stop.value.code == code


# ------------------------------------------------------------------------------------------------------------------
# Processes that die, hang or are told to stop

linux = pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
drill = pytest.mark.skipif(not LONG, reason="minutes: NANOT2I_LONG=1, as .ci/run says")


def launch(out, *args):
    """Under torchrun, which restarts all ranks when one ends badly (not with its default of one store for all attempts)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3", "train.py"]
    return subprocess.Popen([*command, *TINY, f"--out={out}", "--train.images=360", *args], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env={**ENV, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


def pair(out, *args):
    """Two ranks without a launcher."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    env = {**ENV, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [subprocess.Popen([sys.executable, "train.py", *TINY, f"--out={out}", "--train.images=360", *args], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]


def last(out):
    """The last step in the log."""
    try:
        return max((r.get("step", 0) for r in rows(out)), default=0)
    except (OSError, json.JSONDecodeError):
        return 0


def until(condition, *processes, seconds=90):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline and all(p.poll() is None for p in processes), [p.kill() or p.communicate()[0][-3000:] for p in processes]
        time.sleep(0.002)


def session(pid):
    try:
        return os.getsid(pid)
    except OSError:
        return None


def pid_of(rank, out):
    for path in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"--out={out}".encode() in (path / "cmdline").read_bytes() and f"\0RANK={rank}\0".encode() in (path / "environ").read_bytes()
            if ours and Path("/proc", (path / "stat").read_text().split()[3], "environ").read_bytes().count(b"\0RANK=") == 0:
                return int(path.name)                                           # not one of its loader processes
        except OSError:                                                         # others' processes, and those that have just ended
            pass


@drill
@linux
def test_a_loader_and_a_rank_are_killed_and_the_launcher_restarts_to_the_same_end(done, tmp_path):
    process = launch(tmp_path, "--parallel=ddp", "--train.save_every=24", "--data.workers=1")
    until(lambda: last(tmp_path) >= 5, process)
    rank = pid_of(1, tmp_path)
    os.kill(int(Path(f"/proc/{rank}/task/{rank}/children").read_text().split()[-1]), signal.SIGKILL)
    until(lambda: any("resumed" in r for r in rows(tmp_path)) and last(tmp_path) >= 9, process)
    os.kill(pid_of(0, tmp_path), signal.SIGKILL)
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 0 and sum("resumed" in r for r in rows(tmp_path)) == 2, said[-3000:]
    assert "rank 1: a loader process has died" in said
    assert sums(newest(tmp_path)) == sums(newest(done[0] / "ddp2"))


@drill
@linux
def test_the_launcher_is_told_to_stop_then_all_die_in_mid_write_and_it_ends_the_same(done, tmp_path):
    process = launch(tmp_path, "--parallel=fsdp")
    until(lambda: last(tmp_path) >= 5, process)
    process.send_signal(signal.SIGTERM)
    begun = time.time()
    said = process.communicate(timeout=60)[0]
    assert time.time() - begun < 25 and said.count("saved at image") == 1
    at = int(newest(tmp_path).name[5:])
    assert 5 <= at < 30
    torn = lambda: list(tmp_path.glob("step_*.tmp"))
    for _ in range(5):                                                          # a busy machine may be late with the kill
        two = pair(tmp_path, "--parallel=fsdp", "--train.save_every=12")
        until(lambda: last(tmp_path) > at + 1 and torn(), *two)
        for p in two:
            p.kill()
        told = [p.communicate()[0] for p in two]
        if torn():
            break
    assert torn()
    two = pair(tmp_path, "--parallel=fsdp")
    told = [p.communicate(timeout=120)[0] for p in two]
    assert [p.returncode for p in two] == [0, 0] and not torn(), told
    assert sums(newest(tmp_path)) == sums(newest(done[0] / "fsdp2"))


@drill
@linux
def test_the_slurm_script_saves_ends_with_0_and_queues_again_when_told_to_stop(tmp_path):
    """The script itself, torchrun and the ranks; of Slurm's commands only what they are asked for here. As Slurm does, all processes of the step are told."""
    (tmp_path / "srun").write_text("#!/bin/bash\nexec setsid ${@:2}\n".replace("${@:2}", '"${@:2}"'))       # one node
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[ $1 = show ] && echo localhost || echo "$@" >> queue\n')
    (tmp_path / "torchrun").write_text(f'#!/bin/bash\nexec {sys.executable} -m torch.distributed.run "$@"\n')
    for tool in ("srun", "scontrol", "torchrun"):
        (tmp_path / tool).chmod(0o755)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    script = (ROOT / "launch.sbatch").read_text().replace(":29500", f":{port}")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "localhost"}
    env = {**ENV, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def submit(*args):
        command = ["bash", "-c", script, "launch.sbatch", *TINY, "--parallel=ddp", "--train.images=360", f"--out={tmp_path / 'run'}", *args]
        return subprocess.Popen(command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    process = submit()
    until(lambda: last(tmp_path / "run") >= 5, process)
    step = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    for pid in [p for p in map(int, filter(str.isdigit, os.listdir("/proc"))) if session(p) == int(step)]:
        os.kill(pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and said.count("saved at image") == 1 and "Traceback" not in said, said[-3000:]
    assert (tmp_path / "queue").read_text() == "requeue 7\n" and not list(tmp_path.glob("*.stopped"))
    assert 5 <= int(newest(tmp_path / "run").name[5:]) < 30
    process = submit()
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 0 and (tmp_path / "queue").read_text() == "requeue 7\n" and rows(tmp_path / "run")[-1]["step"] == 30, said[-3000:]
    process = submit("--optim.lr=2")
    said = process.communicate(timeout=90)[0]
    assert process.returncode == 1 and "holds a run with optim.lr=" in said and (tmp_path / "queue").read_text() == "requeue 7\n"


FULL = """
mount -t tmpfs -o size=16m none disk
"$@" --out=disk/run > said 2>&1 &
until [ -e disk/run/step_00000004 ]; do sleep 0.01; done
cat /dev/zero > disk/filler                             # until nothing is left
until grep -q 'could not be written' said; do sleep 0.01; done
ls disk/run > left
rm disk/filler
wait $!
echo $? > code
cp -r disk/run run
"""


@drill
@linux
@pytest.mark.skipif(subprocess.call("unshare -rm true", shell=True, stderr=subprocess.DEVNULL) != 0, reason="no mount namespaces here")
def test_a_disk_that_fills_up_and_empties_again_costs_nothing_but_some_checkpoints(tmp_path):
    """A real one, of 16 MiB, in a namespace of its own."""
    (tmp_path / "disk").mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py", *TINY, "--parallel=ddp",
               "--train.images=2400", "--train.save_every=24", "--train.eval_every=240"]
    tried = subprocess.run(["unshare", "-rm", "bash", "-c", FULL, "bash", *command], cwd=tmp_path, env=ENV, timeout=200, capture_output=True, text=True)
    said = (tmp_path / "said").read_text()
    assert tried.returncode == 0 and (tmp_path / "code").read_text() == "0\n" and "No space left on device" in tried.stderr, said[-3000:] + tried.stderr
    assert re.search(r"WARNING: the checkpoint of step \d+ could not be written: .*No space left on device", said) and "the training goes on" in said
    kept = [line for line in (tmp_path / "left").read_text().splitlines() if re.fullmatch(r"step_\d+", line)]
    assert len(kept) == 2 and "Traceback" not in said
    assert newest(tmp_path / "run").name == "step_00000200" and rows(tmp_path / "run")[-1]["step"] == 200
    two = pair(tmp_path / "alone", "--parallel=ddp", "--train.images=2400")
    assert all(p.communicate(timeout=200) and p.returncode == 0 for p in two)
    assert sums(newest(tmp_path / "run")) == sums(newest(tmp_path / "alone"))


@drill
@linux
def test_a_rank_that_hangs_is_named_and_the_run_ends(tmp_path):
    two = pair(tmp_path, "--parallel=ddp", "--train.timeout=8")
    until(lambda: last(tmp_path) >= 3, *two)
    two[1].send_signal(signal.SIGSTOP)
    try:
        said = two[0].communicate(timeout=60)[0]
    finally:
        two[1].kill(), two[1].communicate()
    assert two[0].returncode == 1
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert re.search(r"no progress for \d+ s: rank 1 \(last heard of \d+ s ago\) at .*; this rank, 0, waits at .*(all-reduce|gathered|reduced)", line)


@linux
@drill
def test_twenty_rounds_of_killing_a_random_rank_end_as_if_undisturbed(tmp_path):
    g = torch.Generator().manual_seed(0)
    draw = lambda n: int(torch.randint(n, (), generator=g))
    args = ["--parallel=ddp", "--train.save_every=24", "--train.images=2400"]
    (tmp_path / "run").mkdir()
    lock, log, rounds = tmp_path / "run" / "lock", tmp_path / "run" / "log.jsonl", []
    trains = lambda: lock.exists() and log.exists() and begun < lock.stat().st_mtime_ns < log.stat().st_mtime_ns and "step" in rows(tmp_path / "run")[-1]
    while len(rounds) < 20:
        begun, target = time.time_ns(), max([int(p.name[5:13]) for p in (tmp_path / "run").glob("step_*")], default=0) + draw(9)
        two = pair(tmp_path / "run", *args)
        until(lambda: trains() and last(tmp_path / "run") >= target, *two)
        time.sleep(draw(100) / 1000)
        victim = draw(2)
        two[victim].kill()
        told = [p.communicate(timeout=60)[0] for p in two]                      # the other one notices, in one line
        assert two[1 - victim].returncode == 1 and "Traceback" not in told[1 - victim], told
        rounds.append(last(tmp_path / "run"))
    assert len(set(rounds)) > 10 and rounds[-1] < 200
    for out in ("run", "undisturbed"):
        two = pair(tmp_path / out, *args)
        assert all(p.communicate(timeout=200) and p.returncode == 0 for p in two)
    assert sums(newest(tmp_path / "run")) == sums(newest(tmp_path / "undisturbed"))


@drill
def test_four_nodes_of_two_ranks_equal_one_process(tmp_path):
    """Four launchers on one machine, which meet by rendezvous as nodes do; hsdp shards within a node and repeats across nodes."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=4", "--nproc_per_node=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}",
               "train.py", *TINY, "--train.batch=24", "--train.images=240", "--parallel=hsdp", f"--out={tmp_path / 'nodes'}"]
    nodes = [subprocess.Popen(command, cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(4)]
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert all(node.returncode == 0 for node in nodes), "\n".join(text[-1500:] for text in said)
    alone = [sys.executable, "train.py", *TINY, "--train.batch=24", "--train.images=240", f"--out={tmp_path / 'alone'}"]
    subprocess.run(alone, cwd=ROOT, env=ENV, check=True, capture_output=True)
    ours, theirs = losses(tmp_path / "alone"), losses(tmp_path / "nodes")
    assert len(ours) == len(theirs) == 10 and max(abs(a - b) / a for a, b in zip(ours, theirs)) <= 1e-5

"""Several ranks: the same trajectory on any number of them in every mode, checkpoints that fit all, and what goes wrong on clusters.

pytest starts processes of this very file: `python tests/test_cluster.py RANK WORLD FOLDER` runs the part of one rank in `ranks`,
one training after the other in the same processes, because starting them is what takes the time."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import configs
import train

ROOT = Path(__file__).parent.parent
TINY = ("--config=debug --train.precision=fp32 --optim.ns_dtype=fp32 --model.size=16 --model.patch=4 --model.width=32 --model.depth=3 --text.vocab=400 "
        "--train.batch=12 --train.micro_batch=1 --train.eval_every=0 --train.save_every=0 --train.log_every=1 --train.val_images=5 --sample.steps=1 "
        "--optim.cooldown=0").split()
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def rows(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def newest(folder):
    return sorted(p for p in Path(folder).glob("step_*") if p.suffix != ".tmp")[-1]


def sums(checkpoint):
    """sha256 by file: of what does not say how the run was started."""
    return {k: v for k, v in json.loads((checkpoint / "sums.json").read_text()).items() if k != "config.json"}


# ------------------------------------------------------------------------------------------------------------------
# What a rank does

def group(rank, world, port):
    """Environment of one training; false for a rank that has no part in it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
    return rank < world


def ranks(rank, folder):
    train.leave = lambda world: (dist.barrier(), dist.destroy_process_group()) if world > 1 else None     # without ending the process
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
        model, ema, optimizer, _, _ = train.build(c, device, world=world)
        step, checkpoint = train.resume(folder / source, c, model, ema, optimizer, world, None)
        bpe = train.pretrained.bpe_load(checkpoint / "bpe.tiktoken")
        train.write(folder / out, step, c, bpe, None, *train.snapshot(model, ema, optimizer), rank, world)
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

    run("one", 1)
    for world, mode in ((2, "ddp"), (2, "fsdp"), (4, "ddp"), (4, "fsdp"), (4, "hsdp")):
        run(f"{mode}{world}", world, f"--parallel={mode}", "--shard=2")
    for k, (world, mode) in enumerate(((4, "fsdp"), (2, "ddp"), (1, "auto"), (3, "fsdp"), (4, "hsdp"), (3, "ddp"))):
        again(f"again{k - 1}" if k else "one", f"again{k}", world, f"--parallel={mode}", "--shard=2")
        run("elastic", world, f"--parallel={mode}", "--shard=2", f"--train.images={60 * k + 60}")
    poisoned(0, "--parallel=ddp")
    poisoned(1, "--parallel=ddp")
    for mode in ("ddp", "fsdp"):
        run(f"bf16{mode}", 2, f"--parallel={mode}", "--train.reduce=bf16", "--train.images=120")
    for world in (1, 2):
        run(f"half{world}", world, "--parallel=fsdp" if world > 1 else "--parallel=auto", "--train.images=120", "--train.precision=bf16",
            f"--teacher={folder / 'vision'}", "--align.block=1", "--align.hidden=16")


if __name__ == "__main__":
    ranks(int(sys.argv[1]), Path(sys.argv[2]))
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


# ------------------------------------------------------------------------------------------------------------------
# What came of it

@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """All those trainings, by four processes."""
    from transformers import Dinov2Config, Dinov2Model
    folder = tmp_path_factory.mktemp("ranks")
    vision = Dinov2Config(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2)
    Dinov2Model(vision).save_pretrained(folder / "vision")
    env = {**ENV, "PORTS": str(20_000 + os.getpid() % 20_000)}
    started = [subprocess.Popen([sys.executable, __file__, str(r), folder], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
               for r in range(4)]
    said = [p.communicate(timeout=400)[0] for p in started]
    assert all(p.returncode == 0 for p in started), "\n".join(text[-2000:] for text in said)
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

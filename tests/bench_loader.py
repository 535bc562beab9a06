"""How fast data comes, and in how much memory, on this machine.

    python tests/bench_loader.py                # --n=4000 pictures of 256 x 256, batches of 64 at 64 pixels, 100,000 samples for memory

Pictures are noise scaled up, as JPEG (about 10 kB), with captions of 60 words. The encoders are real classes of random weights and
small size (autoencoder of factor 8, language model of width 64, 2 layers): `prepare` is measured without what a real encoder costs.
"""
import argparse, contextlib, io, itertools, os, sys, tarfile, tempfile, time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))
import numpy as np
import torch
from PIL import Image

import configs, data, sources
from tools import prepare

WORDS = "red green blue apple car dog house tree on a the of and with".split()


def pictures(root, n):
    rng = np.random.default_rng(0)
    root.mkdir()
    for k in range(n):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).resize((256, 256), Image.Resampling.BICUBIC).save(root / f"{k:06}.jpg", quality=90)
        (root / f"{k:06}.txt").write_text(" ".join(rng.choice(WORDS, 60)))


def tars(source, root, each=1000):
    root.mkdir()
    for k, group in itertools.groupby(enumerate(sorted(source.iterdir())), lambda item: item[0] // (2 * each)):
        with tarfile.open(root / f"{k:05}.tar", "w") as tar:
            for _, path in group:
                tar.add(path, path.name)


def parquet(source, root, each=1000):
    """Files of 1,000 rows in row groups of 100, as `datasets` writes pictures."""
    import pyarrow as pa
    import pyarrow.parquet
    root.mkdir()
    names = sorted(source.glob("*.jpg"))
    for first in range(0, len(names), each):
        rows = []
        for path in names[first:first + each]:
            rows.append({"image": {"bytes": path.read_bytes(), "path": None}, "text": path.with_suffix(".txt").read_text()})
        pa.parquet.write_table(pa.Table.from_pylist(rows), root / f"{first:06}.parquet", row_group_size=100)


def many(source, root, files=1000, each=10_000):
    """Tars of ten million items, as far as an index is concerned: all rows of a file show its one picture."""
    root.mkdir()
    picture, text = (source / "000000.jpg").read_bytes(), (source / "000000.txt").read_bytes()
    for k in range(files):
        path = root / f"{k:05}.tar"
        with tarfile.open(path, "w") as tar:
            for name, blob in (("0.jpg", picture), ("0.txt", text)):
                member = tarfile.TarInfo(name)
                member.size = len(blob)
                tar.addfile(member, io.BytesIO(blob))
        arrays = sources.index_archive(path, "", ["txt"])
        rows = np.repeat(arrays["rows"], each)
        rows["key"] = np.random.default_rng(k).integers(0, 2 ** 64, each, dtype=np.uint64)
        names = "\n".join(f"{i}.jpg" for i in range(each)).encode()
        made = {**arrays, "rows": rows, "names": np.frombuffer(names, np.uint8)}
        sources.cached_index(path, ["", "txt"], lambda made=made: made)


def hub(root):
    import transformers as T
    from diffusers import AutoencoderDC
    from tokenizers import Tokenizer, models, pre_tokenizers
    torch.manual_seed(0)
    widths = (16, 32, 32, 32)
    AutoencoderDC(latent_channels=16, encoder_block_out_channels=widths, decoder_block_out_channels=widths, encoder_layers_per_block=(1,) * 4,
                  decoder_layers_per_block=(1,) * 4, encoder_block_types=("ResBlock",) * 4, decoder_block_types=("ResBlock",) * 4,
                  encoder_qkv_multiscales=((),) * 4, decoder_qkv_multiscales=((),) * 4).save_pretrained(root / "vae")
    T.LlamaForCausalLM(T.LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                     num_key_value_heads=4)).save_pretrained(root / "llama")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["</s>", *WORDS])}, unk_token="</s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    T.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>").save_pretrained(root / "llama")


def memory():
    """MiB of this process and its loader processes: their own, and pages of files, which the system may take back."""
    pids = [os.getpid(), *(int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split())]
    lines = [line.split() for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return [sum(int(line[1]) for line in lines if line[0] == key) / 1024 for key in ("RssAnon:", "RssFile:")]


def loaded(c, n, marks=()):
    """Seconds for n samples after a warm-up; memory at each of the marks."""
    ids = lambda captions: (torch.zeros(len(captions), 8, dtype=torch.int64), torch.ones(len(captions), 8, dtype=torch.bool))
    batches, size = data.batches(data.load(c)[0], ids, c), c.train.micro_batch
    for _ in range(8):
        next(batches)
    begin, found = time.perf_counter(), []
    for k in range(n // size):
        next(batches)
        if any(k * size < mark <= (k + 1) * size for mark in marks):
            found.append(memory())
    return time.perf_counter() - begin, found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4000, help="pictures")
    parser.add_argument("--samples", type=int, default=100_000, help="of the measurement of memory")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        home = Path(home)
        with contextlib.redirect_stderr(io.StringIO()):
            pictures(home / "folder", args.n), tars(home / "folder", home / "tars"), hub(home)
            parquet(home / "folder", home / "parquet")
        flags = ["--config=debug", "--model.size=64", f"--vae={home / 'vae'}", "--latent.factor=8", "--model.channels=16", "--model.patch=1",
                 f"--text={home / 'llama'}", "--text.length=128", "--train.batch=64", "--train.micro_batch=64"]
        for kind in ("folder", "tars"):
            begin = time.perf_counter()
            data.load(configs.parse([*flags, f"--data={home / kind}"]))
            print(f"{kind}: {args.n} pictures looked at in {time.perf_counter() - begin:.2f} s")
        begin = time.perf_counter()
        data.load(configs.parse([*flags, f"--data={home / 'tars'}"]))
        print(f"tars: {time.perf_counter() - begin:.2f} s with their index")
        for workers in (0, 1, 2):
            print(f"prepare, {workers} workers beside the process that encodes: ", end="", flush=True)
            prepare.main([*flags, f"--data={home / 'tars'}", f"--out={home / f'shards{workers}'}", f"--data.workers={workers}"])
        for kind, workers in itertools.product(("folder", "tars", "parquet", "shards0"), (1, 2, 4)):
            n = args.n * (10 if kind == "shards0" else 1)
            seconds, _ = loaded(configs.parse([*flags, f"--data={home / kind}", f"--data.workers={workers}"]), n)
            print(f"{kind:8} {workers} workers: {n / seconds:8.0f} images/s", flush=True)
        for kind in ("tars", "shards0"):
            marks = [args.samples * k // 5 // 64 * 64 for k in range(1, 6)]
            _, found = loaded(configs.parse([*flags, f"--data={home / kind}", "--data.workers=2"]), args.samples, marks)
            print(f"memory of {kind}, 2 workers:", "; ".join(f"{own:.1f} MiB + {files:.1f} of files after {n}" for (own, files), n in zip(found, marks)))
        undecoded(home)
        ten_million(home)


def undecoded(home):
    """How fast one process reads pictures and captions in training order, without decoding them: by its own seconds of CPU."""
    for kind in ("folder", "tars", "parquet"):
        train, _ = data.load(configs.parse(["--config=debug", f"--data={home / kind}"]))
        order, n = data.Order(train, 0, 1), 3 * len(train)
        begin = time.process_time()
        for position in range(n):
            number, row = order.at(position).tolist()
            train.file(number).captions(row)
            train.file(number).picture(row)
        print(f"{kind:8} undecoded: {n / (time.process_time() - begin):8.0f} images per second of CPU")


def ten_million(home):
    """Start and memory with an index of ten million items, over an epoch of which each 50,000th run of twenty is read."""
    many(home / "folder", home / "many")
    begin = time.perf_counter()
    train, _ = data.load(configs.parse(["--config=debug", f"--data={home / 'many'}", "--model.size=32"]))
    print(f"ten million items: {len(train):,} to train on after {time.perf_counter() - begin:.1f} s")
    order = data.Order(train, 0, 1)
    for place in range(0, len(train) - 20, len(train) // 200):
        for position in range(place, place + 20):
            train.get(order.at(position), position)
        if place // (len(train) // 200) % 40 == 0:
            own, files = memory()
            print(f"    {own:.0f} MiB + {files:.0f} of files at item {place:,}")


if __name__ == "__main__":
    main()

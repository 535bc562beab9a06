"""Sets and models by their name on the hub, against the stand-in of fake_hub.py: what is fetched, how
often, and what is said if not.

Each command is a process of its own with its own HF_HOME. Whatever fails is one line "error: ...",
without a traceback.
"""

import re
import time

import pytest

import fresh
import sets
from fake_hub import Hub
from layouts import LAYOUTS
from sets import expected, jpeg, pairs, say, struct_column, write, write_files, write_parquet, write_tar

TRAIN = [
    "--config=debug",
    "--model.size=32",
    "--model.width=32",
    "--train.batch=4",
    "--train.micro_batch=2",
    "--train.images=8",
    "--train.val_images=2",
    "--train.compile=no",
    "--train.precision=fp32",
    "--sample.steps=1",
]
SIZE = re.compile(r"\d[\d.,]* ?([kKMGT]i?B|bytes)\b")
TARS = {"a.tar", "b.tar", "c.tar"}


@pytest.fixture
def hub(tmp_path):
    """A hub with owner/cards: three tars and what no reader of pictures needs."""
    root = tmp_path / "hub"
    for part, name in enumerate("abc"):
        write_tar(root / f"datasets/owner/cards/{name}.tar", pairs(range(4 * part, 4 * part + 4)))
    write(root / "datasets/owner/cards/README.md", "---\nlicense: mit\n---\ncards")
    write(root / "datasets/owner/cards/.gitattributes", "*.tar filter=lfs")
    write(root / "datasets/owner/cards/extra/weights.bin", b"w" * 300_000)
    write(root / "datasets/owner/cards/extra/video.mp4", b"v" * 300_000)
    with Hub(root) as server:
        yield server


@pytest.fixture
def command(hub, tmp_path):
    """command(script, *args, **environment): runs it in an empty folder of its own, with its own HF_HOME."""
    (tmp_path / "work").mkdir()
    base = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": tmp_path / "hf",
        "XDG_CACHE_HOME": tmp_path / "cache",
        "HF_HUB_OFFLINE": None,
        "HF_TOKEN": None,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_ETAG_TIMEOUT": "5",
        "HF_HUB_DOWNLOAD_TIMEOUT": "5",
    }

    def run(script, *args, timeout=60, **environment):
        return fresh.run(script, *args, env={**base, **environment}, cwd=tmp_path / "work", timeout=timeout)

    run.environment, run.folder = base, tmp_path / "work"
    return run


def look(command, source, *args, **environment):
    """What is in a set, as the command says it."""
    return command("data.py", "--config=debug", f"--data={source}", *args, **environment)


def total(done):
    """Items on both sides."""
    assert done.code == 0 and not done.errors, done.err
    found = re.search(r"([\d,]+) items to train on, (?:the same|([\d,]+)) held out", done.out)
    assert found, done.out
    return sum(int(part.replace(",", "")) for part in found.groups() if part)


def stopped(done, *words):
    """It ended with one line that has these words."""
    assert done.code == 1 and "Traceback" not in sets.lines(done), sets.lines(done)
    assert len(done.errors) == 1, done.err
    for word in words:
        assert re.search(word, done.errors[0]), done.errors[0]


# By name


@pytest.mark.parametrize("source", ["hf:owner/cards", "owner/cards", "hf://datasets/owner/cards"])
def test_by_name(source, hub, command):
    """Only what is read is fetched, each file once, its size is said; a second start fetches nothing."""
    done = look(command, source)
    assert total(done) == 12 and SIZE.search(sets.lines(done))
    assert set(hub.fetched) == TARS and set(hub.fetched.values()) == {1}
    hub.forget()
    assert total(look(command, source)) == 12
    assert not hub.fetched and len(hub.requests) <= 4


def test_the_size_is_said_before_the_first_byte(hub, command):
    """A slow hub: the line is there while the files are on their way."""
    for name in "abc":
        write_tar(
            hub.root / f"datasets/owner/cards/{name}.tar", [*pairs(range(4)), ("noise.bin", b"x" * 400_000)]
        )
    hub.rate = 200_000
    running = fresh.start("data.py", "--data=hf:owner/cards", env=command.environment, cwd=command.folder)
    size = sum(path.stat().st_size for path in (hub.root / "datasets/owner/cards").glob("*.tar"))
    while (
        not (said := re.search(r"3 (of \d+ )?files.*", running.out + running.err)) and running.poll() is None
    ):
        time.sleep(0.02)
    sent = sum(hub.sent.values())
    hub.rate = 0
    assert running.wait().code == 0
    assert said and SIZE.search(said[0]) and "1.2" in said[0] and sent < size


def test_a_folder_and_a_revision(hub, command):
    """hf:owner/name/sub@revision, and each of both alone."""
    root = hub.root / "datasets/owner"
    write_tar(root / "cards/deep/er/d.tar", pairs(range(12, 18)))
    write_tar(root / "cards@v2/deep/er/e.tar", pairs(range(20, 25)))
    write_tar(root / "cards@v2/f.tar", pairs(range(30, 33)))
    for source, files, n in (
        ("hf:owner/cards/deep", {"deep/er/d.tar"}, 6),
        ("owner/cards@v2", {"deep/er/e.tar", "f.tar"}, 8),
        ("hf:owner/cards/deep/er@v2", {"deep/er/e.tar"}, 5),
    ):
        hub.forget()
        assert total(look(command, source)) == n
        assert set(hub.fetched) <= files
    assert {"deep/er/d.tar", "f.tar"} <= {
        path.name if path.name == "f.tar" else "deep/er/d.tar" for path in command_files(command)
    }


def command_files(command):
    return [path for path in command.environment["HF_HOME"].rglob("*") if path.is_file()]


def test_a_folder_of_that_name_here_comes_first(hub, command):
    write_files(command.folder / "owner/cards", pairs(range(5)))
    assert total(look(command, "owner/cards")) == 5
    assert not hub.requests


@pytest.mark.parametrize(
    "name", ["sharegpt_4o_image", "imagefolder_csv_caption_split", "simpletuner_textfile"]
)
def test_other_layouts_by_name(name, hub, command):
    """All that a layout is made of is fetched: lists, tables, texts, folders with spaces; and the pictures
    are its."""
    root = hub.root / f"datasets/owner/{name}"
    LAYOUTS[name].build(root)
    write(root / "README.md", "x")
    write(root / "model.safetensors", b"x" * 1000)
    done = look(command, f"hf:owner/{name}")
    assert total(done) == len(LAYOUTS[name].captions)
    assert "README.md" not in hub.fetched and "model.safetensors" not in hub.fetched
    assert all(word in done.out for word in LAYOUTS[name].words)


def test_addresses_stop_with_their_command(hub, command):
    import layouts

    layouts.pd12m(hub.root / "datasets/owner/urls")
    stopped(look(command, "hf:owner/urls"), "img2dataset", "url", "caption")


def test_a_set_whose_last_file_has_changed(hub, command):
    """Another commit: what is new is fetched, what is the same is not."""
    assert total(look(command, "hf:owner/cards")) == 12
    hub.forget()
    write_tar(hub.root / "datasets/owner/cards@v3/d.tar", pairs(range(20, 25)))
    for name in "ab":
        (hub.root / f"datasets/owner/cards@v3/{name}.tar").write_bytes(
            (hub.root / f"datasets/owner/cards/{name}.tar").read_bytes()
        )
    assert total(look(command, "hf:owner/cards@v3")) == 13
    assert set(hub.fetched) == {"d.tar"}


# What fails


def test_a_cut_connection_goes_on_where_it_was(hub, command):
    """Twice in mid-file: what came is not fetched again, and the pictures are whole."""
    write_tar(hub.root / "datasets/owner/cards/a.tar", [*pairs(range(4)), ("noise.bin", bytes(24_000_000))])
    hub.cut_after, hub.cuts = 11_000_000, 2  # huggingface_hub keeps what came in pieces of ten million bytes
    assert total(look(command, "hf:owner/cards")) == 12
    assert hub.fetched["a.tar"] == 3 and hub.sent["a.tar"] < 27_000_000


def test_a_connection_that_always_breaks_is_one_line_and_the_next_start_goes_on(hub, command):
    hub.cut_after, hub.cuts = 0, 10**6
    stopped(look(command, "hf:owner/cards"), "owner/cards")
    hub.cuts = 0
    assert total(look(command, "hf:owner/cards")) == 12


def test_a_hub_that_fails_now_and_then(hub, command):
    """One request in five: the set comes, or one line says so and the next start goes on."""
    hub.fail_every = 5
    for _ in range(4):
        done = look(command, "hf:owner/cards")
        if done.code == 0:
            break
        stopped(done, "owner/cards")
    assert total(done) == 12


def test_401(hub, command):
    """The line says how to bring a token; with one it works."""
    hub.token = "secret"
    stopped(look(command, "hf:owner/cards"), "owner/cards", "hf auth login|HF_TOKEN")
    stopped(look(command, "hf:owner/cards", HF_TOKEN="wrong"), "owner/cards")
    assert total(look(command, "hf:owner/cards", HF_TOKEN="secret")) == 12


def test_gated(hub, command):
    hub.gated.add("owner/cards")
    stopped(look(command, "hf:owner/cards"), "owner/cards", "gated", "accept|ask")


@pytest.mark.parametrize(
    "source, words",
    [
        ("hf:owner/none", "owner/none"),
        ("owner/none", "owner/none"),
        ("hf:owner/cards@none", "none"),
        ("hf:owner/cards/no/folder", "no/folder"),
        ("hf:owner/cards/extra", "owner/cards/extra"),
        ("hf:owner", "owner"),
        ("hf:", "hf:"),
        ("hf:owner/a b", "owner/a b"),
        ("owner/cards/none.tar", "none.tar"),
    ],
)
def test_404_and_what_cannot_be(source, words, hub, command):
    """No such set, revision, folder or file, nothing that is read in it, no name at all."""
    stopped(look(command, source), words)


def test_a_model_is_not_a_data_set(hub, command):
    write(hub.root / "models/owner/model/config.json", "{}")
    stopped(look(command, "hf:owner/model"), "owner/model")


def test_offline(hub, command):
    """Nobody listens, or HF_HUB_OFFLINE is set: one line; but what was fetched before is read."""
    stopped(look(command, "hf:owner/cards", HF_HUB_OFFLINE="1"), "owner/cards", "(?i)offline|network|reached")
    assert total(look(command, "hf:owner/cards")) == 12
    hub.close()
    assert total(look(command, "hf:owner/cards", HF_HUB_OFFLINE="1")) == 12
    assert total(look(command, "hf:owner/cards")) == 12
    stopped(look(command, "hf:owner/other"), "owner/other", "(?i)offline|network|reach|connect")


def test_a_full_disk(hub, command, tmp_path):
    """ENOSPC while a file is written: one line that says so."""
    script = write(
        tmp_path / "full.py",
        f"""
import errno, runpy, sys
import huggingface_hub.file_download as file_download

def full(*args, **options):
    raise OSError(errno.ENOSPC, "No space left on device")
file_download.http_get = full
sys.path[0] = {str(fresh.ROOT)!r}
runpy.run_path({str(fresh.ROOT / "data.py")!r}, run_name="__main__")
""",
    )
    stopped(
        look(lambda name, *args: command(script, *args), "hf:owner/cards"), "owner/cards", "(?i)full|space"
    )


# Ranks


def test_two_ranks_fetch_each_file_once(hub, command):
    """The others wait, then read the same; only the first says so."""
    done = fresh.ranks(
        2,
        "train.py",
        *TRAIN,
        "--data=hf:owner/cards",
        f"--out={command.folder / 'out'}",
        env=command.environment,
        cwd=command.folder,
    )
    assert [one.code for one in done] == [0, 0], done[0].err + done[1].err
    assert set(hub.fetched) == TARS and set(hub.fetched.values()) == {1}
    assert not SIZE.search(done[1].out)


def test_two_ranks_fail_with_one_line(hub, command):
    done = fresh.ranks(
        2,
        "train.py",
        *TRAIN,
        "--data=hf:owner/none",
        f"--out={command.folder / 'out'}",
        env=command.environment,
        cwd=command.folder,
    )
    assert all(one.code == 1 for one in done)
    assert sum(len(one.errors) for one in done) == 1 and not any(
        "Traceback" in sets.lines(one) for one in done
    ), done


# Training, and models


def test_trains_on_a_set_by_its_name(hub, command):
    """Parquet with two splits, to the end; the same command again has nothing left to do or to fetch."""
    for split, numbers in (("train", range(8)), ("test", range(8, 12))):
        write_parquet(
            hub.root / f"datasets/owner/splits/data/{split}-00000-of-00001.parquet",
            image=struct_column(map(jpeg, numbers)),
            text=[say(k) for k in numbers],
        )
    flags = [*TRAIN, "--data=hf:owner/splits", f"--out={command.folder / 'out'}"]
    done = command("train.py", *flags)
    assert done.code == 0, done.err
    assert "text" in done.out and any(
        caption in done.out
        for caption in [said for captions in expected(range(12)).values() for said in captions]
    )
    hub.forget()
    assert command("train.py", *flags).code == 0 and not hub.fetched


def test_a_text_encoder_by_its_name(hub, command):
    """A random language model with a tokenizer, as --text=owner/encoder: fetched once; one that is not there
    is one line."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    folder = hub.root / "models/owner/encoder"
    inner = Tokenizer(
        models.WordLevel({"<pad>": 0, "</s>": 1, "a": 2, "red": 3, "card": 4}, unk_token="</s>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    ).save_pretrained(folder)
    flags = [*TRAIN, "--data=hf:owner/cards", "--text.dim=0", "--text.length=16"]
    done = command("train.py", *flags, "--text=owner/encoder", f"--out={command.folder / 'out'}")
    assert done.code == 0, done.err
    assert hub.fetched["model.safetensors"] == 1
    stopped(
        command("train.py", *flags, "--text=owner/none", f"--out={command.folder / 'none'}"), "owner/none"
    )

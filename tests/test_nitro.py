"""Nitro-T: the DiT and the MMDiT against diffusers' PixArt and SD3 classes, extended by what AMD added to them (no pooled text, a
norm of the text, positions without SD3's cropping), and the released layout in and out.

Conventions that differ and are bridged here: diffusers' t runs from 0 to 1000, ours from 0 to 1; AdaLayerNormContinuous has its
scale before its shift; SD3 joins tokens as [image, text]; ours as [text, image], which attention cannot tell apart."""
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import configs
import kernels
import pretrained
from model import Denoiser, count, flops, unpatchify
from test_model import randomise

DIT = replace(configs.nitro_512, text=configs.Text(encoder="frozen", dim=24), align=configs.Align(), model=configs.Model(
    kind="dit", size=128, channels=6, patch=1, width=32, depth=4, heads=2, mlp_ratio=4.0, span=16.0, route=configs.Route(2, None, 0.5)))
MMDIT = replace(DIT, model=replace(DIT.model, kind="mmdit", dual=2))
BOTH = pytest.mark.parametrize("c", [DIT, MMDIT], ids=["dit", "mmdit"])


def inputs(dtype=torch.float32, length=5, side=4):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(3, 6, side, side, generator=g, dtype=dtype), torch.rand(3, generator=g, dtype=dtype),
            torch.randn(3, length, 24, generator=g, dtype=dtype), torch.arange(length)[None] < torch.tensor([[length], [2], [length - 1]]))


class TextNorm(nn.Module):
    """AMD's `text_embedding_norm` after diffusers' caption projection or context embedder."""

    def __init__(self, inner, width):
        super().__init__()
        self.inner, self.weight = inner, nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = self.inner(x)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight


def reference(c, dtype):
    """diffusers' class with AMD's changes, random weights -> (module, its state dict under AMD's names)."""
    from diffusers import PixArtTransformer2DModel, SD3Transformer2DModel
    from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, get_timestep_embedding
    m = c.model
    common = dict(num_attention_heads=m.heads, attention_head_dim=m.width // m.heads, in_channels=m.channels, out_channels=m.channels,
                  num_layers=m.depth, patch_size=1, sample_size=4)
    if m.kind == "dit":
        net = PixArtTransformer2DModel(cross_attention_dim=m.width, caption_channels=24, norm_type="ada_norm_single", norm_eps=1e-6,
                                       activation_fn="gelu-approximate", attention_bias=True, use_additional_conditions=False, **common)
        net.caption_projection = TextNorm(net.caption_projection, m.width)
    else:
        net = SD3Transformer2DModel(joint_attention_dim=24, caption_projection_dim=m.width, pooled_projection_dim=8, pos_embed_max_size=4,
                                    dual_attention_layers=tuple(range(m.dual)), qk_norm="rms_norm", **common)
        net.context_embedder = TextNorm(net.context_embedder, m.width)

        class Time(nn.Module):                                                  # SD3's, without the pooled text
            def __init__(self):
                super().__init__()
                self.timestep_embedder = TimestepEmbedding(256, m.width)

            def forward(self, t, pooled):
                return self.timestep_embedder(get_timestep_embedding(t, 256, flip_sin_to_cos=True, downscale_freq_shift=0).to(pooled.dtype))
        net.time_text_embed = Time()
    # Nitro-T's positions: 4 x 4 tokens that span what 16 x 16 do, i.e. neighbours 4 apart
    net.pos_embed = PatchEmbed(4, 4, 1, m.channels, m.width, interpolation_scale=0.25)
    net = randomise(net.to(dtype))
    rename = {"caption_projection.inner": "caption_projection", "caption_projection.weight": "text_embedding_norm.weight",
              "context_embedder.inner": "context_embedder", "context_embedder.weight": "text_embedding_norm.weight"}
    named = {}
    for key, value in net.named_parameters():
        old = next((a for a in rename if key.startswith(a) and (key == a or not a.endswith("weight"))), None)
        named[key.replace(old, rename[old]) if old else key] = value
    return net, named


def call(net, c, z, t, text, mask):
    if c.model.kind == "dit":
        return net(z, text, 1000 * t, encoder_attention_mask=mask, added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False)[0]
    return net(z, text, torch.zeros(len(z), 8, dtype=z.dtype), 1000 * t, return_dict=False)[0]


@BOTH
def test_output_and_all_gradients_equal_diffusers(c, monkeypatch, dtype=torch.float64, tolerance=1e-10):
    """As in test_model.py, fp32 inside diffusers and ours is lifted to float64 for the comparison. SD3 attends to all text,
    as the released MMDiT does: text.pad. That ours can also leave padding alone is tested below."""
    c = replace(c, text=replace(c.text, pad=c.model.kind == "mmdit"))
    theirs, named = reference(c, dtype)
    ours = Denoiser(c, dtype=dtype).to(dtype)
    ours.load_state_dict(pretrained.from_released(c.model.kind, {k: v.detach() for k, v in named.items()}))
    z, t, text, mask = inputs(dtype)
    table = kernels.sincos_table(4, 4, 32, 4.0, dtype=torch.float64)
    assert (theirs.pos_embed.pos_embed[0] - table).abs().max() < 1e-5           # theirs is made in fp32
    theirs.pos_embed.pos_embed = table[None]
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    ours.grid, ours.held = (4, 4, z.device), (None, table)
    out = unpatchify(ours(z, t, text, mask)[0], 1, 4, 4)
    expected = call(theirs, c, z, t, text, mask)
    scale = expected.abs().max()
    assert scale > 0.1 and (out - expected).abs().max() <= tolerance * scale
    weight = torch.randn(out.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    (out * weight).sum().backward(), (expected * weight).sum().backward()
    gradients = pretrained.from_released(c.model.kind, {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in named.items()})
    for name, p in ours.named_parameters():
        size = gradients[name].abs().max()
        if name == f"blocks.{c.model.depth - 1}.txt_q_norm":                    # the last block's text queries are asked for nothing
            assert size == 0 and p.grad.abs().max() == 0
        else:
            assert size > 0 and (p.grad - gradients[name]).abs().max() <= tolerance * size, name


def test_published_parameter_counts():
    with torch.device("meta"):
        assert count(Denoiser(configs.nitro_512, align_dim=768)) == 608_516_384
        assert count(Denoiser(configs.nitro_1024)) == count(Denoiser(configs.nitro_1024_ft)) == 1_257_779_872
        head = Denoiser(configs.nitro_512, align_dim=768).align
        assert abs(sum(p.numel() for p in head.parameters()) / 1e6 - 8.13) < 0.01


def test_published_flops():
    tera = lambda c, **kw: flops(c, 256, **kw) / 1e12
    assert abs(tera(configs.nitro_512, routed=False) - 0.323) < 5e-4 and abs(tera(configs.nitro_512) - 0.195) < 5e-4
    assert abs(tera(configs.nitro_1024, routed=False) - 0.46) < 5e-3 and abs(tera(configs.nitro_1024) - 0.34) < 5e-3
    assert abs(tera(configs.nitro_1024_ft, routed=False) - 1.36) < 5e-3 and abs(tera(configs.nitro_1024_ft) - 0.83) < 6e-3


@pytest.mark.parametrize("route", [None, configs.Route(1, 2, 0.5), configs.Route(2, None, 0.25)])
@BOTH
def test_flops_formula_equals_the_counter(c, route):
    c = replace(c, model=replace(c.model, route=route))
    z, t, text, _ = inputs()
    ids = route and kernels.keep_tokens(1, 16, route.keep, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        Denoiser(c)(z[:1], t[:1], text[:1], None, ids)
    assert counter.get_total_flops() == flops(c, 5)


@BOTH
def test_real_text_costs_what_it_is_long(c):
    """With `slots` the padding is not even computed: FLOPs by the counter, and the output that it leaves as it was."""
    c = replace(c, model=replace(c.model, route=None))
    model = randomise(Denoiser(c))
    z, t, text, _ = inputs(length=32)
    mask = torch.arange(32)[None] < torch.tensor([[3], [30], [9]])
    slots = kernels.text_slots(mask, multiple=2)
    assert len(slots) == 42 and len(set(slots.tolist())) == 42 and mask.flatten()[slots[:42]].all()
    assert len(kernels.text_slots(mask)) == 48 and len(kernels.text_slots(mask[:1])) == 8
    costs, outs = [], []
    for where in (None, slots):
        with FlopCounterMode(display=False) as counter:
            outs.append(model(z, t, text, mask, None, where)[0])
        costs.append(counter.get_total_flops())
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    a_token = 24 * 32 + (32 * 32 + 4 * 2 * 32 * 32 if c.model.kind == "dit" else 3 * 12 * 32 * 32 + 3 * 32 * 32)
    assert costs[0] - costs[1] == 2 * a_token * (3 * 32 - 42)
    weight = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(0))
    gradients = []
    for out in outs:
        model.zero_grad()
        (out * weight).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * a.abs().max().item())


@BOTH
def test_padding_is_never_attended_unless_asked(c):
    z, t, text, mask = inputs()
    model = randomise(Denoiser(c))
    out = model(z, t, text, mask)[0]
    noisy = torch.where(mask[..., None], text, torch.full_like(text, 9.0))
    assert torch.equal(out, model(z, t, noisy, mask)[0])
    alone = model(z[1:2], t[1:2], text[1:2, :2], None)[0]
    torch.testing.assert_close(out[1:2], alone, rtol=1e-4, atol=1e-4)
    padded = randomise(Denoiser(replace(c, text=replace(c.text, pad=True))))
    assert torch.equal(padded(z, t, text, mask)[0], model(z, t, text, None)[0]) and not torch.equal(padded(z, t, noisy, mask)[0], padded(z, t, text, mask)[0])


@BOTH
def test_masked_training_is_lazy(c):
    """Blocks 0..start-1 see all tokens, the others the kept ones; nothing comes back; keep = 1 equals dense."""
    z, t, text, mask = inputs()
    ids = kernels.keep_tokens(3, 16, 0.5, torch.Generator().manual_seed(0))
    model, seen = randomise(Denoiser(c)), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    assert model(z, t, text, mask, ids)[0].shape == (3, 8, 6) and seen == [16, 16, 8, 8]
    every = kernels.keep_tokens(3, 16, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(model(z, t, text, mask, every)[0], model(z, t, text, mask)[0])
    # each sample by itself, its kept tokens by plain indexing
    head, tail = model.blocks[:2], model.blocks[2:]
    out = model(z, t, text, mask, ids)[0]
    for b in range(3):
        from model import patchify, timestep_embedding
        x = model.img_in(patchify(z[b:b + 1], 1)) + model.positions(4, 4, z.device)[1]
        time = model.time_in(timestep_embedding(t[b:b + 1]))
        vec = nn.functional.silu(time)
        vec = vec if model.modulation is None else model.modulation(vec)
        y = model.read(text[b:b + 1, mask[b]], None)
        for blocks, where in ((head, slice(None)), (tail, ids[b])):
            x = x[:, where]
            for block in blocks:
                x = block(x, vec, y, None, None)
                x, y = x if isinstance(x, tuple) else (x, y)
        torch.testing.assert_close(out[b:b + 1], model.final(x, time), rtol=1e-3, atol=1e-3)


@BOTH
def test_starts_at_zero_or_as_amd_does(c):
    z, t, text, mask = inputs()
    assert Denoiser(c)(z, t, text, mask)[0].abs().max() == 0
    assert Denoiser(replace(c, model=replace(c.model, zero=False)))(z, t, text, mask)[0].abs().max() > 0.01
    model = Denoiser(c)
    entered = []
    model.final.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    model(z, t, text, mask)
    first = model.img_in(z.flatten(2).mT) + model.positions(4, 4, z.device)[1]
    assert torch.equal(entered[0], first)                                       # every block is the identity


@BOTH
def test_gradients_reach_every_parameter(c):
    c = replace(c, align=replace(c.align, block=2, hidden=16))
    model = randomise(Denoiser(c, align_dim=8))
    z, t, text, mask = inputs()
    out, tapped = model(z, t, text, mask, kernels.keep_tokens(3, 16, 0.5, torch.Generator().manual_seed(0)), kernels.text_slots(mask, 1))
    (out.square().mean() + tapped.square().mean()).backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert idle == ([f"blocks.{c.model.depth - 1}.txt_q_norm"] if c.model.kind == "mmdit" else [])


def test_positions_fill_the_same_square_at_any_resolution():
    """Nitro-T: 16 tokens a side at 512 pixels are 0..15, 32 at 1024 are 0..15.5."""
    with torch.device("meta"):
        model = Denoiser(configs.nitro_1024_ft)
    at = lambda n: model.positions(n, n, "cpu")[1]
    coarse, fine = at(16), at(32)
    assert torch.equal(coarse.view(16, 16, -1), fine.view(32, 32, -1)[::2, ::2])
    column = fine[1, :288]                                                      # the second token: column 0.5, row 0
    omega = 10_000.0 ** -(torch.arange(288, dtype=torch.float64) / 288)
    torch.testing.assert_close(column.double(), (0.5 * omega).sin(), rtol=0, atol=1e-6)


@BOTH
def test_text_can_be_read_once(c):
    model = randomise(Denoiser(c))
    z, t, text, mask = inputs()
    assert torch.equal(model(z, t, model.text_kv(text, mask), mask)[0], model(z, t, text, mask)[0])


@BOTH
def test_released_names_round_trip_and_account_for_every_key(c):
    _, named = reference(c, torch.float32)
    theirs = {k: v.detach() for k, v in named.items()}
    ours = pretrained.from_released(c.model.kind, theirs, "weights")
    assert ours.keys() == Denoiser(c).state_dict().keys()
    back = pretrained.to_released(c.model.kind, ours)
    assert back.keys() == theirs.keys() and all(torch.equal(back[k], theirs[k]) for k in theirs)
    for broken, name in (({**theirs, "extra.weight": torch.zeros(1)}, "extra.weight"),
                         ({k: v for k, v in theirs.items() if k != "transformer_blocks.1.attn2.to_k.weight"}, "blocks.1.")):
        with pytest.raises(SystemExit, match=name):
            pretrained.from_released(c.model.kind, broken, "weights")


# ------------------------------------------------------------------------------------------------------------------
# Whole: train on the latents of a tiny autoencoder, sample, export, start from what was exported

TINY = ["--data.subset=food", "--model.size=32", "--latent.factor=4", "--model.channels=4", "--model.patch=1", "--model.width=32", "--model.heads=2",
        "--text.encoder=bpe", "--text.vocab=400", "--text.length=12", "--text.dim=0", "--data.source=emoji", "--data.workers=0", "--align.teacher=",
        "--train.batch=8", "--train.micro_batch=4", "--train.images=32", "--train.eval_every=0", "--train.val_images=8", "--train.log_every=2",
        "--train.compile=no",
        "--train.precision=fp32", "--sample.steps=2", "--optim.warmup=16", "--sample.prompts=red apple|hamburger"]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    from diffusers import AutoencoderDC
    torch.manual_seed(0)
    kinds = dict(encoder_block_types=("ResBlock",) * 3, decoder_block_types=("ResBlock",) * 3, encoder_block_out_channels=(8, 8, 16),
                 decoder_block_out_channels=(8, 8, 16), encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1),
                 encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()))
    folder = tmp_path_factory.mktemp("dcae")
    AutoencoderDC(latent_channels=4, scaling_factor=0.7, **kinds).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("recipe, depth", [("nitro_512", 5), ("nitro_1024", 5)])
def test_a_latent_recipe_trains_samples_and_travels(recipe, depth, autoencoder, tmp_path, monkeypatch, capsys):
    import json

    import sample
    import train
    out = tmp_path / "run"
    shape = [f"--config={recipe}", f"--vae={autoencoder}", f"--model.depth={depth}", "--model.dual=2", *TINY]
    train.main([*shape, f"--out={out}"])
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["images"] == 32 and any("val_loss" in row for row in rows) and list((out / "samples").glob("*.png"))
    # pictures are the decoded latents: what sample.py writes is what generate and the autoencoder give by hand
    monkeypatch.setattr("sys.argv", ["sample.py", "red apple", f"--checkpoint={out}", f"--out={tmp_path / 'png'}", "--n=1"])
    sample.main()
    model, c, tokenize, encode = pretrained.load(out)
    latent = sample.draw(model, c, tokenize, encode, ["red apple"], [0], None, 8)
    assert latent.shape == (1, 4, 8, 8)
    image = pretrained.VAE(c, "cpu").decode(latent)
    from PIL import Image
    import numpy as np
    written = torch.from_numpy(np.array(Image.open(tmp_path / "png" / "red-apple-0.png")))
    assert torch.equal(written.permute(2, 0, 1), ((image[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    # the next stage starts from these weights, at another resolution
    train.main([*[a for a in shape if "size" not in a], "--model.size=64", f"--init={out}", f"--out={tmp_path / 'next'}", "--train.images=8"])
    assert "starting from" in capsys.readouterr().out


def test_released_weights_come_in_and_ours_go_out(autoencoder, tmp_path, capsys):
    """A folder in AMD's layout loads by path for sampling and for training; exporting gives the same file back, bit for bit."""
    import json

    from safetensors.torch import save_file
    for c, recipe in ((DIT, "nitro_512"), (MMDIT, "nitro_1024")):
        theirs = tmp_path / recipe
        (theirs / "transformer").mkdir(parents=True)
        state = {k: v.detach().clone() for k, v in reference(c, torch.float32)[1].items()}
        save_file({**state, "projectors.0.0.weight": torch.zeros(2, 2)}, theirs / "transformer" / "diffusion_pytorch_model.safetensors")
        (theirs / "transformer" / "config.json").write_text(json.dumps({"num_attention_heads": 2, "patch_size": 1, "sample_size": 4}))
        found, ours = pretrained.released(theirs)
        want = replace(c.model, route=None)
        assert found.model == want and found.text.dim == 24 and found.text.pad == (recipe == "nitro_1024")
        model = Denoiser(found)
        model.load_state_dict(ours)
        # training from it, in a recipe of its shape
        import train
        fresh, ema, optimizer = train.build(c, torch.device("cpu"), 8)
        said = []
        assert train.load_weights(theirs, fresh, ema, optimizer, said.append) is None and "REPA head is new (6 tensors)" in said[0]
        assert all(torch.equal(p, ours[n]) for net in (fresh, ema) for n, p in net.state_dict().items() if not n.startswith("align."))
        with pytest.raises(SystemExit, match="is another model"):
            train.load_weights(theirs, *train.build(replace(c, model=replace(c.model, depth=5)), torch.device("cpu"), 0), said.append)
        # out again: as a checkpoint of ours, then exported
        checkpoint = tmp_path / f"{recipe}_ours"
        checkpoint.mkdir()
        configs.save(replace(c, text=replace(c.text, encoder="bpe", width=24, heads=2, dim=0)), checkpoint / "config.json")
        own = Denoiser(configs.load(checkpoint / "config.json"))
        own.load_state_dict(ours, strict=False)
        save_file({k: v for k, v in own.state_dict().items()}, checkpoint / "model.safetensors")
        with pytest.raises(SystemExit, match="text"):                            # an own text transformer has no place there
            pretrained.to_released(c.model.kind, own.state_dict())
        assert pretrained.to_released(c.model.kind, ours).keys() == state.keys()
        assert all(torch.equal(v, state[k]) for k, v in pretrained.to_released(c.model.kind, ours).items())

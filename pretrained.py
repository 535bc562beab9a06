"""What others trained, and the tokenizers: text encoders, vision teachers, released PRX weights in and out; our checkpoints.

    tokenize = tokenizer(c, ranks)              # list[str] -> (ids (B, L), mask (B, L))
    encode = text_encoder(c, device)            # (ids, mask) -> states (B, L, encode.dim), frozen
    features = teacher(c, device)               # images in [-1, 1] -> patch tokens (B, N, features.dim), frozen
    model, c, tokenize, encode = load("runs/emoji")

A text encoder or teacher is a hub id or a folder as transformers writes it: safetensors only, and none of its code is run.
transformers and diffusers are imported where they are used: `python train.py --help` should not wait for them.

    B batch, N image tokens, L text tokens, D width of the pretrained model
"""
import base64, functools, hashlib, inspect, json, os, re, sys, zipfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import configs
from configs import fail


# ------------------------------------------------------------------------------------------------------------------
# Byte-level BPE: trained by `tokenizers`, run by `tiktoken`

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"      # GPT-2's word splitter


def bpe_train(captions, vocab):
    """-> list[bytes]: the 256 bytes, then up to vocab - 257 merges, best first. One id stays free for the start token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), byte_level])
    bpe.train_from_iterator(captions, trainers.BpeTrainer(
        vocab_size=vocab - 1, min_frequency=2, initial_alphabet=byte_level.alphabet(), show_progress=False))
    letter = byte_letters()
    words = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    merges = [bytes(letter[char] for char in word) for word, _ in words if len(word) > 1]
    return [bytes([i]) for i in range(256)] + merges


def byte_letters():
    """The printable character by which `tokenizers` (and GPT-2) write each byte, as {character: byte}."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


def bpe_save(ranks, path):
    """tiktoken's own text format: one token a line, base64 and rank."""
    Path(path).write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)))


def bpe_load(path):
    try:
        lines = [line.split() for line in Path(path).read_text().splitlines()]
        ranks = [base64.b64decode(token, validate=True) for token, _ in lines]
        if [int(rank) for _, rank in lines] != list(range(len(ranks))) or not {bytes([i]) for i in range(256)} <= set(ranks):
            raise ValueError("ranks or bytes are missing")
        return ranks
    except (OSError, ValueError) as error:
        fail(f"{path} is no tiktoken vocabulary: {error}")


def bpe_encoding(ranks):
    """The start token's id follows the last rank. `encode_ordinary` never produces it, whatever the text says."""
    import tiktoken
    return tiktoken.Encoding("nanot2i", pat_str=PATTERN, mergeable_ranks={token: i for i, token in enumerate(ranks)},
                             special_tokens={"<|start|>": len(ranks)})


# ------------------------------------------------------------------------------------------------------------------
# Text -> ids

def tokenizer(c, ranks=None):
    """-> callable: list[str] -> ids (B, L) int64 and mask (B, L) bool, right padded; every row has a true entry.

    bpe: the start token and the caption, L = c.text.length always. Else the encoder's own tokenizer, L = c.text.length with
    text.pad, without it the longest of the batch rounded up to a multiple of 8, at most c.text.length."""
    if c.text.encoder == "bpe":
        if len(ranks) >= c.text.vocab:
            fail(f"the vocabulary has {len(ranks)} entries and a start token, more than text.vocab {c.text.vocab}")
        return functools.partial(bpe_tokens, bpe_encoding(ranks), c.text.length)
    from transformers import AutoTokenizer
    own = from_hub(AutoTokenizer, c.text.encoder, "--text", padding_side="right")
    if len(own) <= len(own.all_special_tokens):             # transformers makes an empty one when the files are missing
        fail(f"--text={c.text.encoder} has no tokenizer beside its weights")
    return functools.partial(own_tokens, own, min(c.text.length, own.model_max_length), c.text.pad)


def bpe_tokens(encoding, length, texts):
    rows = [[encoding.n_vocab - 1, *encoding.encode_ordinary(text)][:length] for text in texts]
    return pad(rows, 0, length)


def own_tokens(own, length, full, texts):
    fill = next((i for i in (own.pad_token_id, own.eos_token_id, own.bos_token_id) if i is not None), 0)
    rows = [row or [fill] for row in own(list(texts), truncation=True, max_length=length)["input_ids"]]
    return pad(rows, fill, length if full else min(length, -(-max(map(len, rows)) // 8) * 8))


def pad(rows, fill, length):
    ids = torch.tensor([row + [fill] * (length - len(row)) for row in rows])                 # (B, L)
    return ids, torch.arange(length) < torch.tensor([[len(row)] for row in rows])


# ------------------------------------------------------------------------------------------------------------------
# Frozen models of others

def from_hub(kind, name, flag, **options):
    """kind.from_pretrained(name), where whatever goes wrong becomes one line that names the model and the way out."""
    from transformers.utils import logging
    logging.set_verbosity_error()                           # missing weights are an error of ours below, others a wanted cut
    logging.disable_progress_bar()
    folder = os.path.isdir(name)
    if not folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):            # cannot be a hub id
        fail(f"{flag}={name}: no such folder")
    try:
        return kind.from_pretrained(name, trust_remote_code=False, local_files_only=folder, **options)
    except Exception as error:                              # OSError, ValueError, KeyError, HTTP errors, safetensors' own, ...
        if gated(error):
            fail(f"{flag}={name} is gated: accept its licence at huggingface.co/{name} and run `hf auth login`, or use another with "
                 f"{flag}=<id or folder>" + (" (and --text.dim=0)" if flag == "--text" else ""))
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        fail(f"{flag}={name} cannot be loaded; give {flag}=<folder> with config.json and *.safetensors. The reason: {reason}")


def gated(error):
    """Did the hub refuse, here or in what this error was raised from? A model that does not exist is 401 too, to strangers."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
    while error is not None:
        if isinstance(error, HfHubHTTPError) and (isinstance(error, GatedRepoError) or not isinstance(error, RepositoryNotFoundError)
                                                  and getattr(error.response, "status_code", 0) in (401, 403)):
            return True
        error = error.__cause__ or error.__context__
    return False


# The published recipes' networks, so that train.py --bench can time them with random weights and no download.
KNOWN = {
    "meta-llama/Llama-3.2-1B": ("LlamaConfig", dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, rope_theta=500000.0, tie_word_embeddings=True)),
    "facebook/dinov2-base": ("Dinov2Config", dict(image_size=518, patch_size=14)),
    "google/t5gemma-2b-2b-ul2": ("T5GemmaConfig", {}),       # transformers' defaults are this model
    "facebook/dinov3-vitl16-pretrain-lvd1689m": ("DINOv3ViTConfig", dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, num_register_tokens=4)),
}


def configuration(name, flag, weights=True):
    """The model's config.json; of the KNOWN ones, if no weights are wanted, without asking the hub."""
    import transformers
    if not weights and name in KNOWN:
        kind, options = KNOWN[name]
        return getattr(transformers, kind)(**options)
    return from_hub(transformers.AutoConfig, name, flag)


def frozen(kind, name, flag, config, device, weights=True):
    """The model with the weights of `name`, every one of them found, in bf16 on GPU and fp32 on CPU. weights=False: random ones."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    if not weights:
        with torch.device(device):
            return kind.from_config(config, dtype=dtype).eval().requires_grad_(False)
    model, info = from_hub(kind, name, flag, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True)
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)             # poolers are not used here
    if missing:                                             # transformers would go on with random numbers in their place
        fail(f"{flag}={name} lacks {len(missing)} weights of {type(model).__name__}: {', '.join(missing[:3])}, ...")
    return model.to(device).eval().requires_grad_(False)


def text_config(c, weights=True):
    config = configuration(c.text.encoder, "--text", weights)
    return getattr(config, "text_config", config)           # the language part of CLIP and the like


def text_dim(c, weights=True):
    """Width of the text states, from the configuration alone."""
    if c.text.dim or c.text.encoder == "bpe":
        return c.text.dim or c.text.width
    config = text_config(c, weights)
    return getattr(config, "encoder", config).hidden_size   # T5Gemma: two configurations in one


def text_encoder(c, device, weights=True):
    """-> callable: ids, mask -> states (B, L, D), the last hidden states. Of T5 and T5Gemma only the encoder is loaded."""
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as encoders
    config, dim = text_config(c, weights), text_dim(replace(c, text=replace(c.text, dim=0)), weights)
    if c.text.dim not in (0, dim):
        fail(f"text.dim is {c.text.dim}, but the states of --text={c.text.encoder} are {dim} wide: set --text.dim={dim} or 0")
    config.is_encoder_decoder = config.use_cache = False
    kind = AutoModelForTextEncoding if config.model_type in encoders else AutoModel
    model = frozen(kind, c.text.encoder, "--text", config, device, weights)

    @torch.no_grad()
    def encode(ids, mask):
        return model(input_ids=ids.to(device), attention_mask=mask.to(device).long()).last_hidden_state
    encode.dim = dim
    return encode


def teacher_config(c, weights=True):
    config = configuration(c.align.teacher, "--teacher", weights)
    return getattr(config, "vision_config", config)         # the vision part of CLIP, SigLIP


def teacher_dim(c):
    return teacher_config(c).hidden_size


def pixel_statistics(name, model_type):
    """Mean and standard deviation of the pixels in [0, 1] that the teacher was trained with."""
    from transformers import image_utils
    from transformers.image_processing_base import ImageProcessingMixin
    try:
        saved = ImageProcessingMixin.get_image_processor_dict(name)[0]
        return saved["image_mean"], saved["image_std"]
    except (OSError, KeyError):                             # no preprocessor_config.json
        kind = {"siglip": "IMAGENET_STANDARD", "clip": "OPENAI_CLIP"}.get(re.match("[a-z]+", model_type)[0], "IMAGENET_DEFAULT")
        return getattr(image_utils, kind + "_MEAN"), getattr(image_utils, kind + "_STD")


def teacher(c, device, weights=True):
    """-> callable: images (B, 3, H, W) in [-1, 1] -> patch tokens (B, N, D), row by row on the denoiser's own grid.

    Layer -1 is the model's own last state, after its final norm where it has one for patches (CLIP has not)."""
    from transformers import AutoModel
    name, config, grid = c.align.teacher, teacher_config(c, weights), c.side
    patch, depth = getattr(config, "patch_size", None), getattr(config, "num_hidden_layers", 0)
    if not isinstance(patch, int) or not depth or hasattr(config, "num_patches"):           # convolutional; SigLIP 2 NaFlex
        fail(f"--teacher={name} is a {config.model_type}, not a vision transformer that takes a plain image")
    side, layer = c.align.size or grid * patch, c.align.layer
    if side % patch:
        fail(f"align.size {side} must be a multiple of the teacher's patch of {patch} pixels")
    if not (layer == -1 or 0 < layer <= depth):
        fail(f"align.layer {layer} must lie in 1..{depth} (the teacher's blocks) or be -1 (after the last and its norm)")
    if layer > 0:
        config.num_hidden_layers = layer                    # later blocks are not even loaded
    model = frozen(AutoModel, name, "--teacher", config, device, weights)
    option = "interpolate_pos_encoding"                     # the DINOs do it unasked
    options = {option: True} if option in inspect.signature(model.forward).parameters else {}
    mean, std = (torch.tensor(s, device=device).view(3, 1, 1) for s in pixel_statistics(name if weights else ".", config.model_type))
    patches = side // patch

    @torch.no_grad()
    def features(image):
        x = image.to(device).float() / 2 + 0.5
        if x.shape[-2:] != (side, side):
            x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)   # bicubic overshoots
        out = model(pixel_values=((x - mean) / std).to(model.dtype), output_hidden_states=layer > 0, **options)
        h = out.hidden_states[layer] if layer > 0 else out.last_hidden_state
        h = h[:, -patches ** 2:].float()                    # (B, patches^2, D): CLS and register tokens come first
        if patches != grid:
            h = h.mT.unflatten(2, (patches, patches))       # (B, D, rows, columns)
            h = F.interpolate(h, (grid, grid), mode="bilinear", antialias=True).flatten(2).mT
        return h                                            # (B, N, D)
    features.dim = config.hidden_size
    return features


DC_AE = dict(                                               # mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers', for --bench
    encoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3, decoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    encoder_layers_per_block=[2, 2, 2, 3, 3, 3], decoder_layers_per_block=[3] * 6, encoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
    decoder_qkv_multiscales=[[], [], [], [5], [5], [5]], upsample_block_type="interpolate", downsample_block_type="Conv", scaling_factor=0.41407)


class VAE:
    """DC-AE (Chen et al. 2024), frozen, bf16 on GPU and fp32 on CPU: images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H / f, W / f)
    of about unit variance. As many images go through it at a time as have `pixels` in all, which bounds its memory."""

    def __init__(self, c, device, weights=True, pixels=2 ** 21):
        from diffusers import AutoencoderDC
        from diffusers.utils import logging
        logging.set_verbosity_error()                       # it would recommend packages, and warn of the cast below
        name, flag, self.pixels = c.latent.vae, "--vae", pixels
        if weights:
            self.model, info = from_hub(AutoencoderDC, name, flag, use_safetensors=True, output_loading_info=True)
            if missing := sorted(info["missing_keys"]):     # diffusers would go on with random numbers in their place
                fail(f"{flag}={name} lacks {len(missing)} weights of AutoencoderDC: {', '.join(missing[:3])}, ...")
        else:
            config = AutoencoderDC.load_config(name) if os.path.isdir(name) else DC_AE
            with torch.device(device):
                self.model = AutoencoderDC.from_config(config)
        config = self.model.config
        self.scale, self.factor = config.scaling_factor, 2 ** (len(config.encoder_block_out_channels) - 1)
        if (self.factor, config.latent_channels) != (c.latent.factor, c.model.channels):
            fail(f"{flag}={name} makes {config.latent_channels} channels, {self.factor} pixels apart: "
                 f"set --model.channels={config.latent_channels} --latent.factor={self.factor}")
        self.model = self.model.to(device, torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, image):
        parts = image.to(self.model.device).split(max(1, self.pixels // image[0, 0].numel()))
        return torch.cat([self.model.encode(x.to(self.model.dtype)).latent.float() for x in parts]) * self.scale

    @torch.no_grad()
    def decode(self, latent):
        parts = latent.to(self.model.device).split(max(1, self.pixels // (latent[0, 0].numel() * self.factor ** 2)))
        return torch.cat([self.model.decode((z / self.scale).to(self.model.dtype)).sample.float() for z in parts])


# ------------------------------------------------------------------------------------------------------------------
# PRX weights <-> diffusers.PRXTransformer2DModel. Row order within each matrix is the same on both sides.

BLOCK_NAMES = {                                             # ours: theirs (two names: rows of the first, then of the second)
    "qkv.weight": "attention.img_qkv_proj.weight",
    "txt_kv.weight": "attention.txt_kv_proj.weight",
    "q_norm": "attention.norm_q.weight",
    "k_norm": "attention.norm_k.weight",
    "txt_k_norm": "attention.norm_added_k.weight",
    "attn_out.weight": "attention.to_out.0.weight",
    "mlp_in.weight": "gate_proj.weight up_proj.weight",
    "mlp_out.weight": "down_proj.weight",
    "modulation.weight": "modulation.lin.weight",
    "modulation.bias": "modulation.lin.bias",
}
OUTER_NAMES = {
    "time_in.in_layer": "time_in.in_layer",
    "time_in.out_layer": "time_in.out_layer",
    "txt_in": "txt_in",
    "final.modulation": "final_layer.adaLN_modulation.1",
    "final.linear": "final_layer.linear",
}


def prx_names(state):
    """{our name: [their names]} for a model with as many blocks and the kind of img_in that `state` (of either side) has."""
    blocks = sorted({int(m[1]) for key in state if (m := re.match(r"blocks\.(\d+)\.", key))})
    img_in = ["img_in.0", "img_in.1"] if "img_in.0.weight" in state else ["img_in"]          # with and without bottleneck
    names = {f"blocks.{i}.{a}": [f"blocks.{i}.{name}" for name in b.split()] for i in blocks for a, b in BLOCK_NAMES.items()}
    return names | {f"{a}.{kind}": [f"{b}.{kind}"] for a, b in {**OUTER_NAMES, **dict(zip(img_in, img_in))}.items()
                    for kind in ("weight", "bias")}


def prx_to_diffusers(state):
    names = prx_names(state)
    same_keys(state, names, "this is no PRX state dict (an own text transformer has no counterpart in diffusers)")
    return {b: piece.clone() for a, theirs in names.items() for b, piece in zip(theirs, state[a].chunk(len(theirs)))}


def diffusers_to_prx(state):
    names = prx_names(state)
    same_keys(state, sum(names.values(), []), "this is no state dict of diffusers.PRXTransformer2DModel that we know")
    return {a: torch.cat([state[b] for b in theirs]) for a, theirs in names.items()}


def same_keys(have, want, message):
    unknown, missing = sorted(set(have) - set(want)), sorted(set(want) - set(have))
    if unknown or missing:
        both = ("unknown", unknown), ("missing", missing)
        fail(message + "".join(f"; {len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in both if keys))


# ------------------------------------------------------------------------------------------------------------------
# Our own checkpoints

def damage(folder):
    """What is wrong with the checkpoint, in a few words; "" if nothing is. Truncated files are found without reading them
    whole; flipped bits only where `sums.json` has the files' sha256."""
    try:
        json.loads((folder / "config.json").read_text())
        for file in {folder / "model.safetensors", *folder.glob("*.safetensors")}:
            with open(file, "rb") as f:
                header = json.loads(f.read(min(int.from_bytes(f.read(8), "little"), 100_000_000)))        # the format's limit
                end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
                if f.tell() + end != file.stat().st_size:
                    return f"{file.name} is {file.stat().st_size} bytes and should be {f.tell() + end}"
        for file in folder.glob("*.pt"):
            if not zipfile.is_zipfile(file):                # the directory of a zip is at its end
                return f"{file.name} is cut off"
        sums = json.loads((folder / "sums.json").read_text()) if (folder / "sums.json").exists() else {}
        for name, sha256 in sums.items():
            with open(folder / name, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
                    return f"{name} does not match its sha256"
        return ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__


def newest_checkpoint(folder):
    """Yields the sound checkpoints of a run folder, newest first. Damaged ones are reported and passed over."""
    found = {int(m[1]): path for path in Path(folder).glob("step_*") if (m := re.fullmatch(r"step_(\d+)", path.name))}
    for step in sorted(found, reverse=True):
        if wrong := damage(found[step]):
            print(f"warning: the checkpoint {found[step]} is damaged ({wrong}); trying the one before", file=sys.stderr)
        else:
            yield found[step]


def load(path, which="ema", device="cpu"):
    """-> model in eval mode, its config, tokenize, encode (none with bpe). `path`: a run folder or one checkpoint of it."""
    from safetensors.torch import load_file

    from model import PRX
    folder = Path(path)
    if (folder / "model.safetensors").exists() or re.fullmatch(r"step_\d+", folder.name) and folder.is_dir():
        if wrong := damage(folder):
            fail(f"the checkpoint {folder} is damaged: {wrong}")
    else:
        folder = next(newest_checkpoint(folder), None) or fail(f"no checkpoint in {path}: train first with python train.py")
    c = configs.load(folder / "config.json")
    if not c.text.dim and c.text.encoder != "bpe":
        c = replace(c, text=replace(c.text, dim=text_dim(c)))
    tokenize = tokenizer(c, bpe_load(folder / "bpe.tiktoken") if c.text.encoder == "bpe" else None)
    if which == "ema" and not c.optim.ema:                  # then there never was one
        which = "model"
    file = folder / f"{which}.safetensors"
    if not file.exists():
        fail(f"{folder} has no {file.name}")

    fast = torch.device(device).type == "cuda" and c.train.precision != "fp32"
    model = PRX(c, dtype=torch.bfloat16 if fast else torch.float32)
    state = {key: value for key, value in load_file(file).items() if not key.startswith("align.")}      # REPA's projector
    want = {key: value for key, value in model.state_dict().items() if not key.startswith("align.")}
    same_keys(state, want, f"{file} does not fit this version of the model")
    if wrong := [key for key in want if state[key].shape != want[key].shape]:
        shapes = (f"{key} {tuple(state[key].shape)} for {tuple(want[key].shape)}" for key in wrong[:3])
        fail(f"{file} does not fit its config.json: {', '.join(shapes)}")
    model.load_state_dict(state, strict=False)
    encode = None if c.text.encoder == "bpe" else text_encoder(c, device)
    return model.to(device).eval(), c, tokenize, encode

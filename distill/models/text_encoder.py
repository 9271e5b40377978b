"""Another text encoder for a pipeline: BERT, CXR-BERT, MiniLM, T5 or any that transformers lists for text encoding.

The projection from the new encoder's width to the one that the U-Net expects is fitted on captions, and folded into the
U-Net's cross-attention, so that what is saved is a stock diffusers pipeline: no code of ours is needed to load it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from diffusers import StableDiffusionPipeline
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPTextModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)
from transformers.utils import cached_file

from distill.config import NO_LABEL
from distill.errors import UserError
from distill.models.family import Model
from distill.models.parts import refusing
from distill.tokens import BOS, EOS, PADDING

RIDGE = 1e-3
"""Of the mean square of the features: enough against collinear ones, too little to shrink the fit."""


def load_text_encoder(
    name: str, model_type: str | None = None, *, max_tokens: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(encoder in float32, tokenizer of `max_tokens` positions) of a folder or hub id.

    model_type: in place of the one in its config.json, for a checkpoint whose class lives outside transformers but
    whose weights are of a known kind: `bert` for CXR-BERT. Raises UserError for what cannot be loaded, lacks weights,
    or cannot tell which characters its tokens are of.
    """
    expected = (
        ". Expected a folder or hub id with config.json, model.safetensors and a tokenizer, of a kind that "
        "transformers lists for text encoding"
    )
    with refusing(f"text_encoder: cannot load {name}", expected):
        if model_type is None:
            config: PretrainedConfig = AutoConfig.from_pretrained(name)
            tokenizer = AutoTokenizer.from_pretrained(name)
        else:
            path = cached_file(name, "config.json")
            assert path is not None
            values = {k: v for k, v in PretrainedConfig.get_config_dict(path)[0].items() if k != "model_type"}
            config = AutoConfig.for_model(model_type, **values)
            tokenizer = AutoTokenizer.from_pretrained(name, config=config, tokenizer_type=model_type)
        encoder, found = AutoModelForTextEncoding.from_pretrained(
            name, config=config, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(
            f"text_encoder: {name} lacks {len(missing)} weights of a {type(encoder).__name__}: {missing[0]} …"
        )
    if not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
        raise UserError(
            f"text_encoder: the tokenizer of {name} must have offsets (a tokenizer.json) and a padding token"
        )
    # Where the files of a tokenizer are missing, transformers makes one of its special tokens.
    if not config.vocab_size / 2 < len(tokenizer) <= config.vocab_size:
        raise UserError(
            f"text_encoder: the tokenizer of {name} has {len(tokenizer):,} tokens and the encoder embeds "
            f"{config.vocab_size:,}; are its files (tokenizer.json or vocab.txt) there?"
        )
    if tokenizer("").input_ids == []:
        raise UserError(f"text_encoder: the tokenizer of {name} adds no end token, so an empty caption has no token")
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None:
        # RoBERTa counts its positions from behind the padding's id.
        tables = (m for name, m in encoder.named_modules() if name.endswith("position_embeddings"))
        limit -= max((m.padding_idx + 1 for m in tables if getattr(m, "padding_idx", None) is not None), default=0)
    if limit is not None and max_tokens > limit:
        raise UserError(f"max_tokens is {max_tokens}, and {name} has {limit} positions")
    tokenizer.model_max_length = max_tokens
    encoder.config.pad_token_id = tokenizer.pad_token_id
    # The stock pipeline and Model.encode then tell the encoder which tokens are padding. CLIP needs no mask: no token sees
    # a later one, and where its padding is the end token, the mask could not be told from the ids.
    encoder.config.use_attention_mask = not isinstance(encoder, CLIPTextModel)
    return encoder.eval(), tokenizer


MULTI_LABEL = "multi_label"
"""In place of an encoder's name: multi_label_encoder."""


def multi_label_encoder(
    labels: Sequence[str], *, width: int, max_tokens: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(encoder, tokenizer) of one token for each label, for captions that are lists of labels.

    The multi-label tokens of Dombrowski et al. (AAAI 2024): no word pieces, no positions, and no token sees another,
    which is a T5 encoder without a layer: a table of vectors (of the same norm, at random; `swap_text_encoder` fits the
    U-Net to them). Case, the length of white space, and commas or semicolons between labels do not count; anything else
    is one unknown token a word.
    Raises UserError for no label, and for more than `max_tokens` can hold.
    """
    names = sorted({" ".join(label.lower().split()) for label in labels} | {NO_LABEL})
    if len(names) == 1:
        raise UserError("text_encoder multi_label: no training image has a label")
    if len(names) + 1 > max_tokens:
        raise UserError(
            f"text_encoder multi_label: max_tokens is {max_tokens}, and {len(names) - 1} labels need 2 more"
        )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(special)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s,;]+"), "removed")
    core.add_tokens([AddedToken(name, single_word=True) for name in names])
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(piece, special.index(piece)) for piece in ("[CLS]", "[SEP]")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    tokenizer.model_max_length = max_tokens
    config = T5Config(
        vocab_size=len(special) + len(names),
        d_model=width,
        num_layers=0,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=3,
    )
    encoder = T5EncoderModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        encoder.shared.weight.copy_(torch.randn(encoder.shared.weight.shape, generator=generator))
    return encoder.eval(), tokenizer


def swap_text_encoder(
    model: Model,
    encoder: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    captions: Sequence[str],
    *,
    batch_size: int = 32,
) -> tuple[StableDiffusionPipeline, float]:
    """A stock pipeline with `encoder` in place of the text encoder, and how well it stands in: R^2 on held-out
    captions.

    A linear map from the new encoder's hidden states to the old one's is fitted by least squares on nine in ten of the
    different `captions`, word by word (mean of a word's tokens), with the start, end and mean padding token as words;
    R^2 is of the others, 1 for the same embeddings, 0 for their mean. With W that map, to_k and to_v become to_k W and
    to_v W: the U-Net then expects the new encoder's width. Everything else is as it was; VAE and scheduler are shared.
    Raises UserError for SDXL, for U-Nets that project text themselves, and for fewer than 10 captions.
    """
    config = model.denoiser.config
    width = config.get("cross_attention_dim")
    if (
        model.family.name != "stable_diffusion"
        or not isinstance(width, int)
        or config.get("encoder_hid_dim") is not None
    ):
        raise UserError(
            "the text encoder can be swapped in SD 1.x and 2.x; this base has two encoders, or projects text"
        )
    captions = list(dict.fromkeys(captions))  # a caption that is held out must not be fitted too
    if len(captions) < 10:
        raise UserError(f"{len(captions)} captions are too few to fit the projection; at least 10, better 1,000")
    other = replace(model, text_encoders=[encoder], tokenizers=[tokenizer])
    x, y, train = [], [], []
    for start in tqdm(range(0, len(captions), batch_size), desc="captions", unit="batch"):
        part = list(captions[start : start + batch_size])
        theirs, ours = _by_word(model, part), _by_word(other, part)
        for k, (old, new) in enumerate(zip(theirs, ours, strict=True)):
            shared = [key for key in old if key in new]
            x += [new[key] for key in shared]
            y += [old[key] for key in shared]
            train += [(start + k) % 10 != 0] * len(shared)
    features, targets, fitted = torch.stack(x).double(), torch.stack(y).double(), torch.tensor(train)
    a, b = features[fitted], targets[fitted]
    gram = a.T @ a
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    projection = torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * eye, a.T @ b).T
    held, wanted = features[~fitted], targets[~fitted]
    rest = (wanted - held @ projection.T).pow(2).sum() / (wanted - wanted.mean(dim=0)).pow(2).sum()
    denoiser = type(model.denoiser).from_config({**config, "cross_attention_dim": features.shape[1]})
    state = model.denoiser.state_dict()
    for key in state:
        if re.search(r"\.attn2\.to_[kv]\.weight$", key):
            state[key] = (state[key].double() @ projection).to(state[key].dtype)
    denoiser.load_state_dict(state)
    swapped = {model.family.denoiser_name: denoiser, "text_encoder": encoder, "tokenizer": tokenizer}
    parts = {**model.pipeline.components, **swapped}
    parts |= {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False), float(1 - rest)


@torch.no_grad()
def _by_word(model: Model, captions: list[str]) -> list[dict[tuple[str, int], torch.Tensor]]:
    """For each caption, (kind, place) -> mean hidden state (width) of the tokens of that word or group."""
    embeds, _ = model.encode(model.tokenize(captions))
    tokenizer, length = model.tokenizers[0], model.chunk_tokens
    out = []
    for caption, hidden in zip(captions, embeds, strict=True):
        groups = model.token_groups(caption)
        rows = {
            (str(code), 0): hidden[groups == code].mean(dim=0) for code in (BOS, EOS, PADDING) if (groups == code).any()
        }
        encoded = tokenizer(caption, truncation=True, max_length=length, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        for word in re.finditer(r"\w+|[^\w\s]", caption):
            tokens = [i for i, (start, end) in enumerate(offsets) if start < word.end() and word.start() < end]
            if tokens:
                rows[("word", word.start())] = hidden[tokens].mean(dim=0)
        out.append(rows)
    return out

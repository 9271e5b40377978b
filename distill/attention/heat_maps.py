"""From recorded probabilities to maps: token selection, heat maps of generated images, aggregation over layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from distill.attention.recording import ALWAYS, AttentionMaps, Reduce, attention_layers, record_attention
from distill.errors import UserError
from distill.models.family import denoiser_of, family_of_denoiser, unwrapped
from distill.tokens import BOS, EOS, PADDING, Tokenizers, find_words, token_groups, token_spans, words_of


@dataclass(frozen=True)
class TokenSelection:
    """Which tokens of each prompt are kept, and under what names.

    names: a tuple for each prompt; BOS, EOS and padding are "[BOS]", "[EOS]" and "[PAD]".
    matrix: (prompts, tokens, columns) float32 that maps token probabilities to the columns: the mean over the tokens of
    a word, the sum over the padding.
    """

    names: tuple[tuple[str, ...], ...]
    matrix: torch.Tensor

    def reduce(
        self, *, heads: Literal["mean", "each"] = "mean", images_per_prompt: Callable[[], int] = lambda: 1
    ) -> Reduce:
        """For `record_attention`: (batch, places, columns), or (batch, heads, places, columns) with heads "each".

        images_per_prompt: asked at each layer.
        """

        def reduce(probabilities: torch.Tensor) -> torch.Tensor:
            matrix = self.matrix.repeat_interleave(images_per_prompt(), dim=0)
            batch, tokens = probabilities.shape[0], probabilities.shape[-1]
            if (batch, tokens) != matrix.shape[:2]:
                raise ValueError(
                    f"{batch} texts of {tokens} tokens reach the denoiser, where {len(matrix)} of {matrix.shape[1]} "
                    "were selected from; give both the same prompts and chunks"
                )
            chosen = matrix.to(probabilities.device)
            return probabilities.mean(dim=1) @ chosen if heads == "mean" else probabilities @ chosen[:, None]

        return reduce


def select_tokens(
    tokenizers: PreTrainedTokenizerBase | Sequence[PreTrainedTokenizerBase],
    prompts: str | Sequence[str],
    words: str | Sequence[str] | None = None,
    max_length: int = 77,
    chunks: int = 1,
) -> TokenSelection:
    """BOS, each of `words` (by default every distinct word of the prompt), EOS and padding of each prompt.

    Words are found by the tokenizer's offsets, whole and without regard to case. A word's column is the mean over its
    tokens, and over all places where it occurs: "a red cat and a red dog" has one column "red". The column of the
    padding is the sum over its tokens, which may be dozens, so that its values are not comparable with a word's.
    With several tokenizers (SDXL) the mean of their selections, which agree unless one splits a word otherwise.
    chunks: of `max_length` tokens each, that a prompt has, see `distill.tokens`.
    Raises UserError if a word is in no prompt, or truncation cuts it off.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    words = [words] if isinstance(words, str) else words
    several = [tokenizers] if isinstance(tokenizers, PreTrainedTokenizerBase) else list(tokenizers)
    found: list[dict[str, torch.Tensor]] = []
    for prompt in prompts:
        asked = words_of(prompt) if words is None else list(words)
        columns: dict[str, torch.Tensor] = {}
        for tokenizer in several:
            groups = token_groups(tokenizer, prompt, max_length, chunks)
            mine = {"[BOS]": groups == BOS}
            for word in asked:
                mine[word] = torch.zeros_like(groups, dtype=torch.bool)
                mine[word][token_spans(tokenizer, prompt, find_words(prompt, [word]), max_length, chunks)] = True
            mine |= {"[EOS]": groups == EOS, "[PAD]": groups == PADDING}
            for name, tokens in mine.items():
                share = tokens.float() / (1 if name == "[PAD]" else max(int(tokens.sum()), 1))
                columns[name] = columns.get(name, 0) + share / len(several)
        found.append({name: c for name, c in columns.items() if c.any() or name == "[PAD]"})
    missing = [word for word in words or () if not any(word in columns for columns in found)]
    if missing:
        raise UserError(
            f"'{missing[0]}' is in none of the prompts, or behind their first {chunks * max_length} tokens: "
            f"{prompts[0]!r}"
        )
    matrix = torch.zeros(len(prompts), chunks * max_length, max(len(columns) for columns in found))
    for row, columns in zip(matrix, found, strict=True):
        row[:, : len(columns)] = torch.stack(list(columns.values()), dim=1)
    return TokenSelection(tuple(tuple(columns) for columns in found), matrix)


@dataclass
class PromptMaps:
    """Attention of generated images on the words of their prompts; of `record_pipeline`."""

    recorded: AttentionMaps
    names: tuple[tuple[str, ...], ...]
    images_per_prompt: int = 1
    """Of the pipeline call."""

    def heat_maps(self, size: tuple[int, int] | None = None) -> list[dict[str, torch.Tensor]]:
        """One dictionary an image: word -> (height, width) float32 on the CPU, the mean attention probability over
        layers, heads and steps; at the largest recorded size unless `size` is given. See `normalize` for display.

        The map of a word is the mean over its tokens and over all of its occurrences; "[PAD]" is the sum over the
        padding. With heads "each" the maps are (heads, height, width). Raises ValueError if nothing was recorded.
        """
        if not self.recorded.by_layer:
            raise ValueError("nothing was recorded: call the pipeline inside the context, at recorded timesteps")
        size = size or max(self.recorded.sizes.values())
        by_layer = {name: m / self.recorded.passes for name, m in self.recorded.by_layer.items()}
        heads = next(iter(by_layer.values())).shape[1:-2]
        flat = {name: m.flatten(0, -3) if heads else m for name, m in by_layer.items()}
        maps = aggregate(flat, self.recorded.sizes, size).cpu()
        maps = maps.unflatten(0, (-1, *heads)).movedim(2, 1) if heads else maps
        return [dict(zip(self.names[i // self.images_per_prompt], image, strict=False)) for i, image in enumerate(maps)]


@contextmanager
def record_pipeline(
    pipe: Any,
    prompts: str | Sequence[str],
    words: str | Sequence[str] | None = None,
    *,
    chunks: int = 1,
    layers: str | Sequence[str] = (),
    heads: Literal["mean", "each"] = "mean",
    timesteps: tuple[int, int] = ALWAYS,
) -> Iterator[PromptMaps]:
    """Record what a stock text-to-image pipeline (SD 1.x, 2.x, SDXL) attends to while it draws `prompts`.

    Call `pipe(prompts, ...)` once inside the context, with the same prompts; the mean of a second call's passes and the
    first's would be taken. Under classifier-free guidance the conditional half is kept: the pipeline says itself
    whether it guides. Memory does not grow with the number of steps. Image-to-image and inpainting pipelines do as
    well. chunks: with more than one, call `pipe(**prompt_embeddings(pipe, prompts, chunks), ...)` of `distill.models`.
    Other arguments as in `record_attention` and `select_tokens`.

    Raises UserError for a pipeline of another kind, and with heads "each" for layers of unequal numbers of heads. The
    pipeline call raises UserError for other prompts than these, and ValueError for text embeddings of another number.
    """
    tokenizers = [t for t in (getattr(pipe, name, None) for name in ("tokenizer", "tokenizer_2")) if t is not None]
    denoiser = denoiser_of(pipe)
    if not tokenizers or denoiser is None or not hasattr(type(pipe), "do_classifier_free_guidance"):
        raise UserError(f"{type(pipe).__name__} is not a text-to-image pipeline with a denoiser of a known family")
    inner = unwrapped(denoiser)
    counts = {name: inner.get_submodule(name).heads for name in attention_layers(inner, layers)}
    if heads == "each" and len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"with heads 'each', give layers that have equally many; they have: {listed}")
    chosen = select_tokens(tokenizers, prompts, words, Tokenizers(tokenizers).chunk_tokens, chunks)

    found = PromptMaps(AttentionMaps(family_of_denoiser(inner), lambda m: m), chosen.names)

    def conditional_rows() -> slice:
        count = len(chosen.names) * found.images_per_prompt
        return slice(count if pipe.do_classifier_free_guidance else 0, None)

    reduce = chosen.reduce(heads=heads, images_per_prompt=lambda: found.images_per_prompt)
    with (
        _watched(pipe, [prompts] if isinstance(prompts, str) else list(prompts), found),
        record_attention(denoiser, layers, reduce, accumulate=True, timesteps=timesteps, rows=conditional_rows) as maps,
    ):
        found.recorded = maps
        yield found


@contextmanager
def _watched(pipe: DiffusionPipeline, prompts: list[str], maps: PromptMaps) -> Iterator[None]:
    """Take the number of images from each call of a pipeline, and raise UserError for a call with other prompts."""
    original, drawn = pipe.encode_prompt, 0

    def encode_prompt(*args: object, **kwargs: object) -> object:
        nonlocal drawn
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        for name in ("prompt", "prompt_2"):
            given = call.get(name)
            if given is not None and ([given] if isinstance(given, str) else list(given)) != prompts:
                raise UserError(f"record_pipeline was given the prompts {prompts}, and the pipeline {name} {given!r}")
        images = int(call.get("num_images_per_prompt") or 1)
        if drawn not in (0, images):
            raise UserError(
                f"a call with num_images_per_prompt {images} follows one with {drawn}; record each by itself"
            )
        drawn = maps.images_per_prompt = images
        return original(*args, **kwargs)

    own = pipe.__dict__.get("encode_prompt")  # of another recorder, or of the user
    pipe.encode_prompt = encode_prompt
    try:
        yield
    finally:
        if own is None:
            del pipe.encode_prompt
        else:
            pipe.encode_prompt = own


def to_image(
    maps: torch.Tensor, places: tuple[int, int], size: tuple[int, int], mode: str = "bilinear"
) -> torch.Tensor:
    """(batch, places, columns) -> (batch, columns, *size), resized by `mode` ("bilinear" or "nearest")."""
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(maps.transpose(1, 2).unflatten(2, places), size=size, mode=mode, **corners)


def aggregate(
    maps: dict[str, torch.Tensor], sizes: dict[str, tuple[int, int]], size: tuple[int, int], mode: str = "bilinear"
) -> torch.Tensor:
    """Mean over layers of (batch, places, columns) maps, each resized to `size`: (batch, columns, *size)."""
    total = torch.zeros(())
    for name, m in maps.items():
        total = total.to(m.device) + to_image(m, sizes[name], size, mode)
    return total / len(maps)


def normalize(maps: torch.Tensor) -> torch.Tensor:
    """Min-max over the last two dimensions, to [0, 1]; a constant map becomes 0."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)

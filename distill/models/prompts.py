"""Prompts of several chunks, as stock pipelines take them: encoded, since they cut a prompt at one chunk."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer

from distill.errors import UserError, raise_all
from distill.models.family import Conditions, Model, family_of_pipeline

_log = logging.getLogger(__name__)


def chunk_faults(model: Model) -> list[str]:
    """Why captions of this model cannot have several chunks; empty where they can, or have one."""
    if model.caption_chunks == 1:
        return []
    return [
        f"{name} is a {type(tokenizer).__name__}, and chunks are of CLIP's tokens; set base.caption_chunks to 1, and "
        "give the text encoder more positions (swap_text_encoder.py, max_tokens)"
        for name, tokenizer in zip(model.family.tokenizer_names, model.tokenizers, strict=True)
        if not isinstance(tokenizer, CLIPTokenizer)
    ]


@torch.no_grad()
def embeddings_of(model: Model, prompts: Sequence[str], negative: str = "") -> dict[str, torch.Tensor]:
    """Arguments of the stock pipeline of a model that stand for `prompts` and a negative prompt."""

    def encoded(texts: Sequence[str]) -> Conditions:
        device = model.pipeline._execution_device  # where offloaded parts are when they compute
        return Conditions(*model.encode([ids.to(device) for ids in model.tokenize(texts)]))

    stated, other = encoded(prompts), encoded([negative] * len(prompts))
    if not negative:
        other = model.family.negative_conditions(model, other)
    found = {"prompt_embeds": stated.embeds, "negative_prompt_embeds": other.embeds}
    if stated.pooled is not None and other.pooled is not None:
        found |= {"pooled_prompt_embeds": stated.pooled, "negative_pooled_prompt_embeds": other.pooled}
    return found


def prompt_embeddings(
    pipe: DiffusionPipeline, prompts: str | Sequence[str], chunks: int, negative: str = ""
) -> dict[str, torch.Tensor]:
    """What a stock pipeline takes in place of a prompt of up to `chunks` x 75 tokens, and of a negative prompt:

        image = pipe(**prompt_embeddings(pipe, prompt, chunks=2)).images[0]

    For a model that was trained with base.caption_chunks, give as many; a short prompt has as many too.
    A longer prompt is cut, with a warning. Raises UserError for a pipeline of no known family, or without CLIP's
    tokens.
    """
    if chunks < 1:
        raise UserError(f"chunks is {chunks}; expected a whole number from 1 on")
    model = family_of_pipeline(pipe).model_of(pipe)
    model.caption_chunks = chunks
    raise_all("the prompt cannot be encoded", chunk_faults(model))
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if (longest := max(model.caption_lengths([*texts, negative]))) > model.longest_caption:
        _log.warning("a prompt of %d tokens is cut at %d; give more chunks", longest, model.longest_caption)
    return embeddings_of(model, texts, negative)

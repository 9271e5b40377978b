"""Causal maps: where the denoiser's prediction changes when a finding's words are taken out of the text.

The words' tokens are replaced by clean padding, either before the text encoder (`causal_encoder`) or in its output
(`causal_denoiser`), as the probes ITE and IDP of Toker et al. 2025 (Padding Tone, arXiv 2501.06751) do with padding.
With the first, what the words told other tokens is gone too; with the second it stays, so that a word whose meaning has
moved to other tokens changes little. The maps are scored as attention maps are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from distill.attention.recording import AttentionMaps
from distill.config import FullEvaluation
from distill.evaluation.protocols import Inputs, Query
from distill.models.family import Conditions, Model
from distill.tokens import BOS

CAUSAL = ("causal_encoder", "causal_denoiser")


@torch.no_grad()
def causal_maps(
    inputs: Inputs, batch: Sequence[Query], config: FullEvaluation, recorder: AttentionMaps
) -> list[torch.Tensor]:
    """For each query (pairs, 2, height, width) at latent size, in the order of CAUSAL, for the protocol `ours`.

    |prediction of the text - prediction of the text without the words|, mean over channels and config.timesteps, on the
    latents and noise of the attention maps. Costs three passes of the denoiser a pair and timestep. The three are of
    one batch composition, so that a word that changes nothing has a map that is exactly 0.
    """
    assert config.timesteps is not None
    model, family = inputs.model, inputs.model.family
    jobs = [(place, tokens) for place, query in enumerate(batch) for tokens in query.tokens]
    noise = inputs.noise(len(config.timesteps), config.seed)
    found: list[torch.Tensor] = []
    with recorder.paused():
        for start in range(0, len(jobs), config.batch_size):
            part = jobs[start : start + config.batch_size]
            places = [place for place, _ in part]
            texts = [batch[place].text for place in places]
            latents, sizes = inputs.latents[places], inputs.conditions.size_ids
            conditions = list(_conditions(model, texts, [tokens for _, tokens in part], inputs.latents.device))
            conditions = [Conditions(c.embeds, c.pooled, None if sizes is None else sizes[places]) for c in conditions]
            total = torch.zeros(len(part), len(CAUSAL), *inputs.size, device=latents.device)
            for step, timestep in enumerate(config.timesteps):
                steps = torch.full((len(part),), timestep, device=latents.device)
                noisy = family.add_noise(model, latents, noise[places, step], steps)
                whole, *without = (family.predict(model.denoiser, noisy, steps, c).float() for c in conditions)
                total += torch.stack([(whole - one).abs().mean(dim=1) for one in without], dim=1)
            found += list(total / len(config.timesteps))
    own = iter(found)
    return [torch.stack([next(own) for _ in query.tokens]) for query in batch]


def _conditions(
    model: Model, texts: Sequence[str], tokens: Sequence[Sequence[int]], device: torch.device
) -> Iterator[Conditions]:
    """Of the texts, of the texts encoded without the words, and of the texts whose words' states are those of
    padding."""
    ids = [x.to(device) for x in model.tokenize(texts)]
    embeds, pooled = model.encode(ids)
    yield Conditions(embeds, pooled)
    bos = (model.token_groups("") == BOS).to(device)
    without, padding = [x.clone() for x in ids], [x.clone() for x in ids]
    for tokenizer, changed, empty in zip(model.tokenizers, without, padding, strict=True):
        for row, own in enumerate(tokens):
            changed[row, list(own)] = tokenizer.pad_token_id
        empty[:, ~bos] = tokenizer.pad_token_id
    yield Conditions(*model.encode(without))
    clean, states = model.encode(padding)[0], embeds.clone()
    for row, own in enumerate(tokens):
        states[row, list(own)] = clean[row, list(own)]
    yield Conditions(states, pooled)

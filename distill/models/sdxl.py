"""SDXL: a U-Net with two text encoders that also reads the image's size (Podell et al. 2023, arXiv 2307.01952)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from distill.models.family import Conditions, Model, TextStates, register
from distill.models.stable_diffusion import UNetFamily


class StableDiffusionXL(UNetFamily):
    name = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    text_encoder_names = ("text_encoder", "text_encoder_2")
    reads_size = True

    def owns(self, denoiser: nn.Module) -> bool:
        return super().owns(denoiser) and denoiser.config.addition_embed_type == "text_time"  # type: ignore[union-attr]

    def encode_text(self, text_encoders: Sequence[nn.Module], input_ids: Sequence[torch.Tensor]) -> TextStates:
        """The last but one hidden state of each encoder, joined, and the projection of the second (section 2.1)."""
        pairs = zip(text_encoders, input_ids, strict=True)
        outputs: list[Any] = [encoder(ids, output_hidden_states=True) for encoder, ids in pairs]
        return torch.cat([out.hidden_states[-2] for out in outputs], dim=-1), outputs[1].text_embeds

    def negative_conditions(self, model: Model, empty: Conditions) -> Conditions:
        if not model.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        pooled = None if empty.pooled is None else torch.zeros_like(empty.pooled)
        return replace(empty, embeds=torch.zeros_like(empty.embeds), pooled=pooled)

    def added_conditions(self, conditions: Conditions, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        if conditions.pooled is None or conditions.size_ids is None:
            raise ValueError("SDXL reads a pooled text embedding and the image's size; one of them is missing")
        return {"text_embeds": conditions.pooled.to(dtype), "time_ids": conditions.size_ids.to(dtype)}

    def example_inputs(
        self, model: Model, batch: int, side: int, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
        latents, timesteps, conditions = super().example_inputs(model, batch, side, device)
        pooled = torch.zeros(batch, model.text_encoders[1].config.projection_dim, device=device)
        sizes = torch.full((batch, 6), 64.0, device=device)
        return latents, timesteps, replace(conditions, pooled=pooled, size_ids=sizes)


register(StableDiffusionXL())

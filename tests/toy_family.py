"""A third model family in one file: a tiny transformer trained by flow matching (Lipman et al. 2023, arXiv
2210.02747)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from diffusers.loaders.peft import PeftAdapterMixin
from tiny import tiny_sd
from torch import nn

from distill.models import Conditions, Family, Model, register
from distill.models.family import TextStates
from distill.models.loading import LORA_FILE


class ToyTransformer(PixArtTransformer2DModel, PeftAdapterMixin):
    """Stock, with the adapters that the stock class lacks."""


@dataclass
class ToyPipeline:
    transformer: ToyTransformer
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: FlowMatchEulerDiscreteScheduler


class ToyFamily(Family):
    """x_t = (1 - s) x + s n with s = (t + 1) / T; the network predicts n - x."""

    name = "toy"
    pipeline_class = ToyPipeline
    denoiser_class = ToyTransformer
    denoiser_name = "transformer"
    text_encoder_names = ("text_encoder",)
    latents_input = ("hidden_states", 0)
    timestep_input = ("timestep", 2)
    prediction_types = ("flow",)

    def model_of(self, pipeline: Any) -> Model:
        p = pipeline
        return Model(self, p.transformer, p.vae, [p.text_encoder], [p.tokenizer], p.scheduler, p)

    def encode_text(self, text_encoders: Sequence[nn.Module], input_ids: Sequence[torch.Tensor]) -> TextStates:
        return text_encoders[0](input_ids[0])[0], None

    def predict(
        self, denoiser: Any, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        latents, embeds = noisy_latents.to(denoiser.dtype), conditions.embeds.to(denoiser.dtype)
        return denoiser(latents, encoder_hidden_states=embeds, timestep=timesteps, return_dict=False)[0]

    def example_inputs(
        self, model: Model, batch: int, side: int, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
        config = model.denoiser.config
        latents = torch.zeros(batch, config.in_channels, side, side, device=device)
        embeds = torch.zeros(batch, model.max_tokens, config.caption_channels, device=device)
        return latents, torch.full((batch,), 500, device=device), Conditions(embeds)

    def prediction_type(self, model: Model) -> str:
        return "flow"

    def add_noise(
        self, model: Model, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        return torch.lerp(latents, noise, self._share(model, timesteps))

    def target(self, model: Model, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return noise - latents

    def clean_and_noise(
        self, model: Model, prediction: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        share = self._share(model, timesteps)
        return noisy_latents - share * prediction, noisy_latents + (1 - share) * prediction

    def same_schedule(self, one: Model, other: Model) -> bool:
        return self.num_timesteps(one) == self.num_timesteps(other)

    def _share(self, model: Model, timesteps: torch.Tensor) -> torch.Tensor:
        return ((timesteps + 1) / self.num_timesteps(model))[:, None, None, None]

    def grid(self, latent_size: tuple[int, int], places: int) -> tuple[int, int]:
        for patch in range(1, min(latent_size) + 1):
            height, width = (length // patch for length in latent_size)
            if height * width == places:
                return height, width
        raise ValueError(f"{places} places do not fit latents of {latent_size}")

    def block_outputs(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        blocks: Any = denoiser.transformer_blocks
        return {f"transformer_blocks.{i}": block for i, block in enumerate(blocks)}

    def save_adapters(
        self,
        pipeline: Any,
        folder: Path,
        states: Mapping[str, Mapping[str, torch.Tensor]],
        configs: Mapping[str, Mapping[str, Any]],
    ) -> None:
        assert set(states) == {"transformer"}
        pipeline.transformer.save_lora_adapter(folder, weight_name=LORA_FILE, adapter_name="default")

    def load_adapters(self, pipeline: Any, folder: Path) -> None:
        pipeline.transformer.load_lora_adapter(folder, weight_name=LORA_FILE, prefix=None, adapter_name="default")


def toy_pipeline(seed: int = 0, patch_size: int = 2) -> ToyPipeline:
    """8 x 8 latents of 64 px images, two blocks of two heads."""
    parts = tiny_sd(seed=seed)
    torch.manual_seed(seed)
    transformer = ToyTransformer(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=patch_size,
        caption_channels=16,
        norm_num_groups=4,
    )
    return ToyPipeline(transformer, parts.vae, parts.text_encoder, parts.tokenizer, FlowMatchEulerDiscreteScheduler())


def toy_model(seed: int = 0, patch_size: int = 2) -> Model:
    return FAMILY.model_of(toy_pipeline(seed, patch_size))


FAMILY = ToyFamily()
register(FAMILY)

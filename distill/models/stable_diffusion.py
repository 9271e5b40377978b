"""Stable Diffusion 1.x and 2.x: a U-Net with one text encoder (Rombach et al. 2022, arXiv 2112.10752)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from distill.models.blocks import name_in_teacher
from distill.models.family import Conditions, Family, Kind, Model, ModuleName, TextStates, register
from distill.models.kohya import kohya_layout

COMPARED = ("cross_attention_dim", "attention_head_dim", "block_out_channels", "down_block_types", "in_channels")
"""Entries of a U-Net's config that decide whether its attention maps can be compared with another's."""


class UNetFamily(Family):
    """What all families with diffusers' UNet2DConditionModel share."""

    denoiser_class = UNet2DConditionModel
    denoiser_name = "unet"
    latents_input = ("sample", 0)
    timestep_input = ("timestep", 1)

    def model_of(self, pipeline: StableDiffusionPipeline) -> Model:
        config = pipeline.scheduler.config
        # DDPMScheduler clips to [-1, 1] unless told: for pixels, not for latents.
        unclipped = {} if "clip_sample" in config else {"clip_sample": False}
        return Model(
            family=self,
            denoiser=pipeline.unet,
            vae=pipeline.vae,
            text_encoders=[getattr(pipeline, name) for name in self.text_encoder_names],
            tokenizers=[getattr(pipeline, name) for name in self.tokenizer_names],
            noise_scheduler=DDPMScheduler.from_config(config, **unclipped),
            pipeline=pipeline,
        )

    def part_faults(self, model: Model) -> list[str]:
        unet, vae, faults = model.denoiser.config, model.vae.config, []
        channels = vae.latent_channels
        if unet.in_channels != channels:
            kind = {9: " (an inpainting model)", 8: " (a model of image to image)"}.get(unet.in_channels, "")
            faults.append(
                f"unet: in_channels is {unet.in_channels}{kind}, and latent_channels of the vae is {channels}; give a "
                "text-to-image model"
            )
        if unet.out_channels != channels:
            faults.append(f"unet: out_channels is {unet.out_channels}, and latent_channels of the vae is {channels}")
        width = unet.cross_attention_dim
        widths = set(width) if isinstance(width, (list, tuple)) else {width}
        given = sum(encoder.config.hidden_size for encoder in model.text_encoders)
        if unet.encoder_hid_dim is None and widths != {given}:
            faults.append(f"unet: cross_attention_dim is {width}, and the hidden states of the text are {given} wide")
        scale = vae.scaling_factor
        if not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
            faults.append(f"vae: scaling_factor is {scale!r}; expected a number above 0, such as 0.18215")
        return faults + self._schedule_faults(model)

    def _schedule_faults(self, model: Model) -> list[str]:
        """The stock scheduler must add noise as DDPM does: less signal at every step."""
        if getattr(model.pipeline.scheduler, "alphas_cumprod", None) is None:
            name = type(model.pipeline.scheduler).__name__
            return [f"scheduler: {name} is of another kind than DDPM; expected one such as DDIMScheduler"]
        betas = model.noise_scheduler.betas
        if not (len(betas) > 1 and bool(((betas >= 0) & (betas <= 1)).all())):
            return ["scheduler: its betas must be in 0 .. 1; look at beta_start, beta_end and trained_betas"]
        return []

    def added_conditions(self, conditions: Conditions, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """What the U-Net reads besides the text's hidden states."""
        return None

    def predict(
        self,
        denoiser: UNet2DConditionModel,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Conditions,
    ) -> torch.Tensor:
        dtype = denoiser.dtype
        added = self.added_conditions(conditions, dtype)
        latents, embeds = noisy_latents.to(dtype), conditions.embeds.to(dtype)
        output: torch.Tensor = denoiser(latents, timesteps, embeds, added_cond_kwargs=added, return_dict=False)[0]
        return output

    def example_inputs(
        self, model: Model, batch: int, side: int, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
        config = model.denoiser.config
        width = config.cross_attention_dim
        width = int(width[0] if isinstance(width, (list, tuple)) else width)
        return (
            torch.zeros(batch, config.in_channels, side, side, device=device),
            torch.full((batch,), 500, device=device),
            Conditions(torch.zeros(batch, model.max_tokens, width, device=device)),
        )

    def attention_layers(self, denoiser: nn.Module, kind: Kind = "cross") -> list[str]:
        names = super().attention_layers(denoiser, kind)
        # named_modules lists the up blocks before the middle one.
        parts = ("down_blocks", "mid_block", "up_blocks")
        return [name for part in parts for name in names if name.startswith(part)]

    def grid(self, latent_size: tuple[int, int], places: int) -> tuple[int, int]:
        height, width = latent_size
        while height * width > places:
            height, width = (height + 1) // 2, (width + 1) // 2
        if height * width != places:
            raise ValueError(f"{places} places do not fit latents of {latent_size}")
        return height, width

    def nothing_smaller_follows(self, layer: str) -> bool:
        return layer.startswith("up_blocks")

    def block_outputs(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The middle block and every stage, as BK-SDM (Kim et al. 2023, arXiv 2305.15798) distills them."""
        return {
            name: module
            for name, module in denoiser.named_modules()
            if name == "mid_block" or re.fullmatch(r"(down|up)_blocks\.\d+", name)
        }

    def layout_of_other_tools(self, model: Model) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        layers = model.denoiser.config.layers_per_block
        counts = set(layers) if isinstance(layers, (list, tuple)) else {layers}
        modules = {
            self.denoiser_name: model.denoiser,
            **dict(zip(self.text_encoder_names, model.text_encoders, strict=True)),
        }
        tensors = kohya_layout(
            modules, sdxl=self.reads_size, layers_per_block=counts.pop() if len(counts) == 1 else None
        )
        second = model.denoiser.config.cross_attention_dim == 1024
        version = "sdxl_base_v1-0" if self.reads_size else "sd_v2" if second else "sd_v1"
        # A1111 lists an adapter only for the kind of base that these name.
        return tensors, {"format": "pt", "ss_base_model_version": version, "ss_v2": str(second and not self.reads_size)}

    def name_in_teacher(self, student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> ModuleName:
        return name_in_teacher(student.config, teacher.config)

    def shape_faults(self, student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> list[str]:
        """A student of fewer stages is compared with as many of the teacher's, the outermost."""
        faults, stages = [], len(student.config.block_out_channels)
        for name in COMPARED:
            theirs, ours = teacher.config[name], student.config[name]
            listed = isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple))
            if (list(theirs)[:stages] != list(ours)) if listed else (theirs != ours):
                faults.append(f"{name}: teacher {theirs}, student {ours}")
        return faults


class StableDiffusion(UNetFamily):
    name = "stable_diffusion"
    pipeline_class = StableDiffusionPipeline
    text_encoder_names = ("text_encoder",)

    def owns(self, denoiser: nn.Module) -> bool:
        return super().owns(denoiser) and denoiser.config.addition_embed_type != "text_time"  # type: ignore[union-attr]

    def encode_text(self, text_encoders: Sequence[nn.Module], input_ids: Sequence[torch.Tensor]) -> TextStates:
        """The last hidden state, with an attention mask if the encoder's config asks for one (use_attention_mask), as
        in the stock pipeline."""
        encoder: Any = text_encoders[0]
        masked = getattr(encoder.config, "use_attention_mask", False)
        mask = (input_ids[0] != encoder.config.pad_token_id).long() if masked else None
        return encoder(input_ids[0], attention_mask=mask)[0], None


register(StableDiffusion())

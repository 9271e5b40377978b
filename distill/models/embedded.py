"""The bundled base's architectures. recipes/pretrain_phantom.py trains them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

UNET_CHANNELS = (64, 96)
"""Of the two levels of the bundled U-Net."""


class ImageTower(nn.Module):
    """(batch, 3, height, width) -> (batch, projection_dim), at half the resolution."""

    def __init__(self, projection_dim: int) -> None:
        super().__init__()
        sizes = [32, 64, 128]
        self.body = ResNetModel(
            ResNetConfig(embedding_size=32, hidden_sizes=sizes, depths=[1, 1, 1], layer_type="basic", hidden_act="relu")
        )
        self.head = nn.Linear(sizes[-1] * 4, projection_dim)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.body(nn.functional.avg_pool2d(pixel_values, 2)).last_hidden_state
        returned: torch.Tensor = self.head(nn.functional.adaptive_avg_pool2d(features, 2).flatten(1))
        return returned


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def new_vae(resolution: int) -> AutoencoderKL:
    """Eight times down in each direction, to eight channels: four cannot hold a phantom at 30 dB."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=resolution,
        mid_block_add_attention=False,
    )


def new_unet(vae: AutoencoderKL, text_width: int, channels: tuple[int, int] = UNET_CHANNELS) -> UNet2DConditionModel:
    """Fresh weights, with cross-attention at 16 x 16 and 8 x 8 for 128 px. channels: of the two levels, multiples of
    8."""
    return UNet2DConditionModel(
        sample_size=vae.config.sample_size // 8,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def new_pipeline(
    tokenizer: CLIPTokenizer,
    with_projection: CLIPTextModelWithProjection,
    vae: AutoencoderKL,
    channels: tuple[int, int] = UNET_CHANNELS,
) -> StableDiffusionPipeline:
    """Stock pipeline of trained parts and a fresh U-Net."""
    text_encoder = CLIPTextModel(with_projection.config)
    flat = hasattr(text_encoder, "embeddings")  # transformers >= 5.6
    state = with_projection.text_model.state_dict()
    text_encoder.load_state_dict(state if flat else {f"text_model.{key}": value for key, value in state.items()})
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, text_encoder, tokenizer, new_unet(vae, text_encoder.config.hidden_size, channels), scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def new_classifier(findings: Sequence[str]) -> ResNetForImageClassification:
    """Multi-label; 64 pooled features."""
    names = dict(enumerate(findings))
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16, hidden_sizes=[32, 64, 96, 64], depths=[1, 1, 1, 1], layer_type="basic",
            problem_type="multi_label_classification", id2label=names, label2id={v: k for k, v in names.items()},
        )
    )  # fmt: skip

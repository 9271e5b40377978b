"""Stable Diffusion at full size from its published config.json files: on the meta device it costs no memory.

Sources: stable-diffusion-v1-5, stable-diffusion-2-1 and stable-diffusion-xl-base-1.0 on the Hugging Face hub. Values
that are the default of the class are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny import tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from distill.models.family import Model
from distill.models.loading import model_of

UNET_SD15: dict[str, Any] = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}
UNET_SD21: dict[str, Any] = UNET_SD15 | {
    "sample_size": 96,
    "attention_head_dim": (5, 10, 20, 20),
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
UNET_SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VAE_SDXL: dict[str, Any] = VAE | {"sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
CLIP_L: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}
OPENCLIP_H: dict[str, Any] = CLIP_L | {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
    "hidden_act": "gelu",
}
OPENCLIP_BIGG: dict[str, Any] = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}


@dataclass(frozen=True)
class Architecture:
    """Configs, and what is published or known of the architecture.

    layers: cross-attention layers. lora_unet, lora_text_encoders: parameters of rank-8 adapters on the default targets.
    Those of the U-Net are twice the 797,184, 829,952 and 5,806,080 that diffusers' training scripts report at rank 4.
    """

    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]
    prediction_type: str
    unet_parameters: int
    text_parameters: tuple[int, ...]
    layers: int
    lora_unet: int
    lora_text_encoders: tuple[int, ...]


ARCHITECTURES = {
    "sd15": Architecture(
        UNET_SD15, VAE, (CLIP_L,), "epsilon", 859_520_964, (123_060_480,), 16, 1_594_368, (589_824,)
    ),
    "sd21": Architecture(
        UNET_SD21, VAE, (OPENCLIP_H,), "v_prediction", 865_910_724, (340_387_840,), 16, 1_659_904, (1_507_328,)
    ),
    "sdxl": Architecture(
        UNET_SDXL, VAE_SDXL, (CLIP_L, OPENCLIP_BIGG), "epsilon", 2_567_463_684, (123_060_480, 694_659_840), 70,
        11_612_160, (589_824, 2_621_440),
    ),
}  # fmt: skip
VAE_PARAMETERS = 83_653_863


def full_size(name: str, device: str = "meta") -> Model:
    """Model with random weights (none on the meta device) and a tiny tokenizer, whose ids the vocabulary holds."""
    architecture = ARCHITECTURES[name]
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=architecture.prediction_type,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    special = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    with torch.device(device):
        unet, vae = UNet2DConditionModel(**architecture.unet), AutoencoderKL(**architecture.vae)
        text_encoder = CLIPTextModel(CLIPTextConfig(**architecture.text_encoders[0], **special))
        if len(architecture.text_encoders) == 1:
            return model_of(
                StableDiffusionPipeline(
                    vae, text_encoder, tokenizer, unet, scheduler,
                    safety_checker=None, feature_extractor=None, requires_safety_checker=False,
                )
            )  # fmt: skip
        text_encoder_2 = CLIPTextModelWithProjection(CLIPTextConfig(**architecture.text_encoders[1], **special))
        return model_of(
            StableDiffusionXLPipeline(
                vae, text_encoder, text_encoder_2, tokenizer, tiny_tokenizer(), unet, scheduler, add_watermarker=False
            )
        )

"""Tiny real pipelines for tests: stock classes, random weights, a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with a dozen merges: every text becomes tokens, common words few."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [
        ("p", "l"), ("pl", "e"), ("e", "f"), ("ef", "f"), ("u", "s"), ("i", "o"), ("io", "n</w>"),
        ("t", "h"), ("th", "e</w>"), ("l", "e"), ("a", "l</w>"), ("e", "d"),
    ]  # fmt: skip
    pieces = [
        *alphabet,
        *(a + "</w>" for a in alphabet),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, model_max_length=77)


def _text_config(tokenizer: CLIPTokenizer, **options: object) -> CLIPTextConfig:
    settings: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**(settings | options))  # type: ignore[arg-type]


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def _scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip


def tiny_sd(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """SD-shaped: 64 px images, 8 x 8 latents, cross-attention at 8 and 4."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        _vae(), CLIPTextModel(_text_config(tokenizer)), tokenizer, unet, _scheduler(prediction_type),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def tiny_sdxl(seed: int = 0, *, second_width: int = 16) -> StableDiffusionXLPipeline:
    """SDXL-shaped: two text encoders, pooled embedding, time ids. second_width: of the second one's hidden states."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=16 + second_width,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        _vae(),
        CLIPTextModel(_text_config(tokenizer)),
        CLIPTextModelWithProjection(_text_config(tokenizer, hidden_act="gelu", hidden_size=second_width)),
        tokenizer,
        tiny_tokenizer(),
        unet,
        _scheduler("epsilon"),
        add_watermarker=False,
    )


def save_tiny(folder: Path, kind: str = "sd") -> Path:
    """A pipeline folder on disk."""
    pipeline = tiny_sdxl() if kind == "sdxl" else tiny_sd("v_prediction" if kind == "v" else "epsilon")
    pipeline.save_pretrained(folder)
    return folder

"""What the value of each option must be, beyond its type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from distill.config import (
    AtlasConfig,
    AttentionDistillationConfig,
    BaseConfig,
    BenchmarkLocalizationConfig,
    BlocksConfig,
    CompareConfig,
    CompressConfig,
    ConsistencyConfig,
    DataConfig,
    DenoisingConfig,
    DistillAttentionConfig,
    DistillStepsConfig,
    EvaluateConfig,
    EvaluationConfig,
    FinetuneConfig,
    LoraConfig,
    PretrainConfig,
    RobustnessConfig,
    SwapTextEncoderConfig,
    TradeoffConfig,
    TrainerConfig,
)

Rule = tuple[Callable[[Any], bool], str]

_POSITIVE: Rule = (lambda value: value > 0, "a number above 0")
_COUNT: Rule = (lambda value: value >= 1, "at least 1")
_NOT_NEGATIVE: Rule = (lambda value: value >= 0, "at least 0")
_PROBABILITY: Rule = (lambda value: 0 <= value <= 1, "a number from 0 to 1")
_BELOW_ONE: Rule = (lambda value: 0 <= value < 1, "at least 0 and below 1")
_INSIDE: Rule = (lambda value: 0 < value < 1, "above 0 and below 1")
_NOT_EMPTY: Rule = (lambda value: len(value) > 0, "something, not an empty value")
_TIMESTEPS: Rule = (lambda value: len(value) > 0 and all(step >= 0 for step in value), "timesteps of at least 0")
_DISTINCT: Rule = (lambda value: 0 < len(value) == len(set(value)), "at least one, and each only once")
_SEEDS: Rule = (lambda value: len(value) == len(set(value)) and all(s >= 0 for s in value), "distinct, at least 0")
_ONCE: Rule = (lambda value: len(value) == len(set(value)), "each only once")

RULES: Mapping[type, Mapping[str, Rule]] = {
    BaseConfig: {"name": _NOT_EMPTY},
    DataConfig: {
        "phantom_companions": _PROBABILITY,
        "resolution": _COUNT,
        "seed": _NOT_NEGATIVE,
        "train_size": _COUNT,
        "validation_size": _NOT_NEGATIVE,
        "test_size": _COUNT,
        "metadata_file": _NOT_EMPTY,
        "image_column": _NOT_EMPTY,
        "caption_column": _NOT_EMPTY,
        "split_column": _NOT_EMPTY,
        "train_split": _NOT_EMPTY,
        "test_split": _NOT_EMPTY,
        "finding_column": _NOT_EMPTY,
        "phrase_column": _NOT_EMPTY,
        "box_column": _NOT_EMPTY,
        "mask_column": _NOT_EMPTY,
        "label_column": _NOT_EMPTY,
        "patient_column": _NOT_EMPTY,
        "mimic_file": _NOT_EMPTY,
        "captions_file": _NOT_EMPTY,
        "instances_file": _NOT_EMPTY,
    },
    LoraConfig: {"rank": _COUNT, "alpha": _POSITIVE, "dropout": _BELOW_ONE},
    DenoisingConfig: {
        "min_snr_gamma": _POSITIVE,
        "caption_dropout": _PROBABILITY,
        "arm_weight": _NOT_NEGATIVE,
        "tail_weight": _NOT_NEGATIVE,
        "region_images": _COUNT,
        "region_token_weight": _NOT_NEGATIVE,
        "region_pixel_weight": _NOT_NEGATIVE,
        "region_mask_weight": _NOT_NEGATIVE,
    },
    AttentionDistillationConfig: {
        "token_kl_weight": _NOT_NEGATIVE,
        "place_kl_weight": _NOT_NEGATIVE,
        "mass_weight": _NOT_NEGATIVE,
        "place_groups": _DISTINCT,
        "gate_images": _COUNT,
        "tail_weight": _NOT_NEGATIVE,
        "output_weight": _NOT_NEGATIVE,
        "feature_weight": _NOT_NEGATIVE,
        "self_attention_weight": _NOT_NEGATIVE,
        "batch_share": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
        "frozen_share": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
        "text_gradient": _PROBABILITY,
        "ema_decay": _PROBABILITY,
        "min_timestep": _NOT_NEGATIVE,
        "max_timestep": _NOT_NEGATIVE,
    },
    TrainerConfig: {
        "max_steps": _COUNT,
        "batch_size": _COUNT,
        "gradient_accumulation_steps": _COUNT,
        "learning_rate": _POSITIVE,
        "text_encoder_learning_rate": _POSITIVE,
        "weight_decay": _NOT_NEGATIVE,
        "adam_beta1": _BELOW_ONE,
        "adam_beta2": _BELOW_ONE,
        "max_grad_norm": _POSITIVE,
        "warmup_steps": _NOT_NEGATIVE,
        "ema_decay": _INSIDE,
        "num_workers": _NOT_NEGATIVE,
        "log_every_steps": _COUNT,
        "checkpoint_every_steps": _COUNT,
        "keep_checkpoints": _COUNT,
        "sample_every_steps": _COUNT,
        "localize_every_steps": _COUNT,
        "localize_images": _COUNT,
    },
    EvaluationConfig: {
        "localization_images": _COUNT,
        "timesteps": _TIMESTEPS,
        "self_attention_power": _NOT_NEGATIVE,
        "smoothing_sigma": _NOT_NEGATIVE,
        "orphan_share": _BELOW_ONE,
        "iou_threshold": _INSIDE,
        "generated_images": _COUNT,
        "diversity_captions": _COUNT,
        "diversity_samples": (lambda value: value >= 2, "at least 2"),
        "num_inference_steps": _COUNT,
        "guidance_scale": _NOT_NEGATIVE,
        "batch_size": _COUNT,
        "bootstrap_samples": _COUNT,
        "seed": _NOT_NEGATIVE,
        "examples": _COUNT,
    },
    FinetuneConfig: {"output_dir": _NOT_EMPTY, "seed": _NOT_NEGATIVE},
    DistillAttentionConfig: {"output_dir": _NOT_EMPTY, "seed": _NOT_NEGATIVE},
    BlocksConfig: {"layers_per_block": _COUNT, "remove_stages": _NOT_NEGATIVE, "transformer_layers": _COUNT},
    ConsistencyConfig: {
        "solver_steps": (lambda value: value > 0 and value % 50 == 0, "a multiple of 50"),
        "guidance_scale": (lambda value: value >= 1, "at least 1"),
        "huber_c": _POSITIVE,
    },
    DistillStepsConfig: {
        "student_steps": (lambda value: 1 <= value <= 50, "1 to 50, as LCMScheduler takes"),
        "output_dir": _NOT_EMPTY,
        "seed": _NOT_NEGATIVE,
    },
    CompressConfig: {"bits": _ONCE, "output_dir": _NOT_EMPTY, "seed": _NOT_NEGATIVE},
    TradeoffConfig: {
        "arms": _DISTINCT,
        "seeds": _SEEDS,
        "self_taught_batch_share": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
        "self_taught_frozen_share": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
        "rali_arm_weight": _POSITIVE,
        "tail_penalty_weight": _POSITIVE,
        "supervised_token_weight": _NOT_NEGATIVE,
        "supervised_pixel_weight": _NOT_NEGATIVE,
        "lora_learning_rate": _POSITIVE,
        "output_dir": _NOT_EMPTY,
        "seed": _NOT_NEGATIVE,
    },
    EvaluateConfig: {"output_dir": _NOT_EMPTY},
    AtlasConfig: {
        "runs": _ONCE,
        "timesteps": (
            lambda value: 0 < len(value) == len(set(value)) and min(value) >= 0,
            "timesteps of at least 0, each only once",
        ),
        "max_timesteps": _COUNT,
        "validation_images": _COUNT,
        "output_dir": _NOT_EMPTY,
    },
    RobustnessConfig: {"runs": _ONCE, "output_dir": _NOT_EMPTY},
    CompareConfig: {
        "seeds": _SEEDS,
        "references": _ONCE,
        "output_dir": _NOT_EMPTY,
    },
    SwapTextEncoderConfig: {
        "max_tokens": (lambda value: value >= 4, "at least 4"),
        "captions": (lambda value: value >= 10, "at least 10"),
        "output_dir": _NOT_EMPTY,
    },
    BenchmarkLocalizationConfig: {
        "parts": _DISTINCT,
        "repeats": _COUNT,
        "memory_budget_gb": _POSITIVE,
        "output_dir": _NOT_EMPTY,
    },
    PretrainConfig: {
        "stages": _DISTINCT,
        "pictures": _COUNT,
        "clear_pictures": _COUNT,
        "min_snr_gamma": _POSITIVE,
        "resolution": _COUNT,
        "vocabulary_size": (lambda value: value >= 514, "at least 514 (512 bytes and two special tokens)"),
        "classifier_images": _COUNT,
        "picture_classifier_images": _COUNT,
        "kl_weight": _NOT_NEGATIVE,
        "caption_dropout": _PROBABILITY,
        "work_dir": _NOT_EMPTY,
        "output_dir": _NOT_EMPTY,
        "classifier_dir": _NOT_EMPTY,
        "seed": _NOT_NEGATIVE,
    },
}
"""What a value of each field must be, beyond its type; a value of None is always legal."""


def value_faults(config: Any, prefix: str = "") -> dict[str, str]:
    """Dotted key -> what is wrong with its value, over all nested dataclasses of `config`."""
    faults: dict[str, str] = {}
    rules = RULES.get(type(config), {})
    for item in fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        if is_dataclass(value):
            faults |= value_faults(value, f"{key}.")
        elif value is not None and item.name in rules:
            is_legal, expected = rules[item.name]
            if (isinstance(value, float) and not math.isfinite(value)) or not is_legal(value):
                faults[key] = f"{key}: expected {expected}, got {value!r}"
    if isinstance(config, AttentionDistillationConfig) and config.min_timestep > config.max_timestep:
        faults.setdefault(
            f"{prefix}min_timestep",
            f"{prefix}min_timestep: expected at most {prefix}max_timestep ({config.max_timestep}), "
            f"got {config.min_timestep}",
        )
    if isinstance(config, AttentionDistillationConfig) and config.frozen_share:
        if config.teacher != "frozen_text_encoder":
            key = f"{prefix}frozen_share"
            faults.setdefault(key, f"{key}: only with {prefix}teacher frozen_text_encoder, got {config.teacher!r}")
        elif config.batch_share + config.frozen_share > 1:
            key = f"{prefix}frozen_share"
            faults.setdefault(key, f"{key}: expected at most 1 - {prefix}batch_share, got {config.frozen_share!r}")
    if isinstance(config, EvaluationConfig) and config.scheduler == "lcm" and config.num_inference_steps > 50:
        key = f"{prefix}num_inference_steps"
        faults.setdefault(
            key, f"{key}: expected at most 50 with {prefix}scheduler lcm, got {config.num_inference_steps}"
        )
    own_teacher = isinstance(config, AttentionDistillationConfig) and config.teacher in ("frozen_text_encoder", "ema")
    if own_teacher and config.start_from_teacher:
        key = f"{prefix}start_from_teacher"
        faults.setdefault(key, f"{key}: a teacher of weights of its own is needed, and teacher is {config.teacher}")
    if isinstance(config, TradeoffConfig) and config.self_taught_batch_share + config.self_taught_frozen_share > 1:
        key = "self_taught_frozen_share"
        faults.setdefault(
            key, f"{key}: expected at most 1 - self_taught_batch_share, got {config.self_taught_frozen_share!r}"
        )
    return faults

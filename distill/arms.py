"""An arm, one way to train the base; and which options a run of arms reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from distill.config import (
    AttentionDistillationConfig,
    CompressConfig,
    ConsistencyConfig,
    DenoisingConfig,
    DistillStepsConfig,
    EvaluateConfig,
    EvaluationConfig,
    FinetuneConfig,
    LoraConfig,
    TradeoffConfig,
)
from distill.objectives import EMA

FROZEN_TEXT_ENCODER = "frozen_text_encoder"
"""distillation.teacher: the student's own U-Net, fed by the text encoder as it was before the training."""
OWN_TEACHERS = (FROZEN_TEXT_ENCODER, EMA)
"""Values of distillation.teacher that name no model."""


@dataclass(frozen=True)
class Arm:
    """One way to train the base. folder: where its files go. distillation: with attention distillation from its teacher.
    denoising, lora, max_steps, evaluation: in place of the run's. consistency: few steps (objectives.ConsistencyObjective).
    lock_keys: distill/keylock.py. variant_of: the named arm that it is with other options."""

    name: str
    folder: Path
    method: Literal["lora", "full"]
    text_encoder: Literal["frozen", "lora", "full"]
    learning_rate: float
    text_encoder_learning_rate: float
    distillation: AttentionDistillationConfig | None = None
    denoising: DenoisingConfig | None = None
    lock_keys: bool = False
    lora: LoraConfig | None = None
    max_steps: int | None = None
    consistency: ConsistencyConfig | None = None
    evaluation: EvaluationConfig | None = None
    variant_of: str | None = None


def can_be_arm(name: str) -> bool:
    """Whether a run folder can hold a folder of this name besides what it holds anyway."""
    files = Path(name).suffix in (".json", ".yaml", ".html", ".md")
    return (
        Path(name).name == name
        and name not in ("", "..", "real", "figures")
        and not (files or name.startswith("seed-"))
    )


def settings_of(config: Any, arm: Arm) -> dict[str, Any]:
    """The run's configuration as nested dictionaries, with what this arm has in its place."""
    found = asdict(config) | {"method": arm.method, "text_encoder": arm.text_encoder, "lock_keys": arm.lock_keys}
    text_rate = None if arm.text_encoder == "frozen" else arm.text_encoder_learning_rate
    rates = {"learning_rate": arm.learning_rate, "text_encoder_learning_rate": text_rate}
    found.pop("lora_learning_rate", None)  # of an arm that is trained by LoRA it is trainer.learning_rate
    found["trainer"] |= rates | ({"max_steps": arm.max_steps} if arm.max_steps else {})
    own_parts = {
        "denoising": arm.denoising,
        "distillation": arm.distillation,
        "lora": arm.lora if "lora" in (arm.method, arm.text_encoder) else None,
        "evaluation": arm.evaluation,
    }
    for name, own in own_parts.items():
        if own is not None:
            found[name] = asdict(own)
    if arm.distillation is None and "distillation" in found:
        found["distillation"] = "none"
    return found


def label_readers(config: Any, arms: list[Arm]) -> dict[str, bool]:
    """Option -> whether a training would look for the labels of its images because of it."""
    denoising = [arm.denoising or config.denoising for arm in arms]
    return {
        "distillation.words labels": any(arm.distillation and arm.distillation.words == "labels" for arm in arms),
        "denoising.arm_weight": any(d.arm_weight > 0 for d in denoising),
        "denoising.training_text": any(d.training_text != "caption" for d in denoising),
        "denoising.insert_labels": any(d.insert_labels != "none" for d in denoising),
        "denoising.caption_dropout_label": any(d.caption_dropout_label is not None for d in denoising),
    }


def is_gated(arm: Arm) -> bool:
    c = arm.distillation
    return c is not None and c.teacher not in OWN_TEACHERS and c.gate_reference is not None


_FILE_OPTIONS = (
    "root", "train_split", "test_split", "findings", "query_words", "allow_empty_captions", "truncate_captions",
    "horizontal_flip",
)  # fmt: skip
DATA_OPTIONS: dict[str, tuple[str, ...]] = {
    "phantom": (
        "seed", "train_size", "validation_size", "test_size", "phantom_captions", "phantom_companions",
    ),
    "folder": (
        *_FILE_OPTIONS, "metadata_file", "image_column", "caption_column", "split_column", "finding_column",
        "phrase_column", "box_column", "mask_column", "label_column", "patient_column",
    ),
    "mimic": (*_FILE_OPTIONS, "metadata_file"),
    "mscxr": (*_FILE_OPTIONS, "metadata_file", "split_column", "mimic_file", "caption_source", "mentioned_only"),
    "coco": (*_FILE_OPTIONS, "captions_file", "instances_file", "image_dir"),
}  # fmt: skip
"""Options of `data` that each kind reads, besides those that all read."""


def unused_data_options(kind: str) -> dict[str, str]:
    """Dotted key -> why data of this kind has no use for it."""
    others = dict.fromkeys(name for options in DATA_OPTIONS.values() for name in options)
    return {f"data.{name}": f"data.kind is {kind}" for name in others if name not in DATA_OPTIONS[kind]}


def unused_options(config: Any, arms: list[Arm]) -> dict[str, str]:
    """Dotted key -> why this run never reads it, so that setting it is a mistake."""
    unused: dict[str, str] = {}

    def never(reason: str, *keys: str) -> None:
        unused.update(dict.fromkeys((key for key in keys if hasattr(config, key.split(".")[0])), reason))

    unused |= unused_data_options(config.data.kind)
    gated = any(is_gated(arm) for arm in arms)
    if isinstance(config, EvaluateConfig) or (config.trainer.localize_every_steps is None and not gated):
        never("no validation images are looked at", "data.validation_size")
    if config.evaluation.protocol != "ours":
        own = ("timesteps", "layers", "iou_threshold", "self_attention_power")
        never("evaluation.protocol has its own", *(f"evaluation.{name}" for name in own))
    if config.evaluation.map_threshold == "none":
        never("evaluation.map_threshold is none", "evaluation.orphan_share")
    if config.base.name == "phantom" or Path(config.base.name).is_dir():
        never("base.name is not a hub id", "base.revision")
    if isinstance(config, EvaluateConfig):
        never(
            "evaluate.py does not train",
            "data.train_size",
            "data.train_split",
            "data.horizontal_flip",
            "data.cache_dir",
        )
        never("evaluation runs in fp32", "base.frozen_dtype")
        return unused
    if not any("lora" in (arm.method, arm.text_encoder) for arm in arms):
        never("nothing is trained by LoRA", "lora.rank", "lora.alpha", "lora.dropout")
    if not any(arm.method == "lora" for arm in arms):
        never("the U-Net is not trained by LoRA", "lora.unet_targets")
    if not any(arm.text_encoder == "lora" for arm in arms):
        never("no text encoder is trained by LoRA", "lora.text_encoder_targets")
    if all(arm.text_encoder == "frozen" for arm in arms):
        never("the text encoder is frozen", "trainer.text_encoder_learning_rate")
        if isinstance(config, FinetuneConfig):
            never("the text encoder is frozen", "lock_keys")
    elif isinstance(config, TradeoffConfig) and not any(arm.text_encoder == "full" for arm in arms):
        never("the text encoder is trained by LoRA, at lora_learning_rate", "trainer.text_encoder_learning_rate")
    if isinstance(config, TradeoffConfig) and all(arm.text_encoder == "lora" for arm in arms):
        never("lora is the only arm", "method", "trainer.learning_rate")
    if isinstance(config, TradeoffConfig) and not any("lora" in (arm.method, arm.text_encoder) for arm in arms):
        never("nothing is trained by LoRA", "lora_learning_rate")
    if isinstance(config, TradeoffConfig) and not any(arm.distillation for arm in arms):
        never("no arm is distilled", *(f"distillation.{item.name}" for item in fields(config.distillation)))
    kinds = {arm.variant_of or arm.name for arm in arms}
    texts = [arm.denoising or config.denoising for arm in arms]
    if not any(denoising.training_text == "paraphrases" for denoising in texts):
        never("denoising.training_text is not paraphrases", "denoising.paraphrases")
    if config.trainer.checkpoint_every_steps is None:
        never("trainer.checkpoint_every_steps is not set", "trainer.keep_checkpoints")
    for name in ("arm_weight", "tail_weight", "region_token_weight", "region_pixel_weight", "region_mask_weight"):
        asked = getattr(config.denoising, name)
        undistilled = [denoising for arm, denoising in zip(arms, texts, strict=True) if not arm.distillation]
        if arms and not any(getattr(denoising, name) == asked for denoising in undistilled):
            never("each arm has its own, or is distilled, which has its own terms", f"denoising.{name}")
    if not any((arm.denoising or config.denoising).reads_regions for arm in arms if not arm.distillation):
        never("no regions are read", "denoising.region_images")
    if isinstance(config, (CompressConfig, DistillStepsConfig)):
        own = ("teacher", "start_from_teacher", "gate_reference", "gate_images")
        never("the teacher is base and run", *(f"distillation.{name}" for name in own))
    if isinstance(config, DistillStepsConfig):
        others = ("output_weight", "feature_weight", "self_attention_weight", "batch_share", "frozen_share")
        never("the consistency loss compares outputs, of the whole batch", *(f"distillation.{name}" for name in others))
        never("the loss is another", "denoising.min_snr_gamma")
        never("the teacher is sampled by the base's, the student by lcm", "evaluation.scheduler")
    if isinstance(config, TradeoffConfig) and "supervised" not in kinds:
        never("no arm is supervised", "supervised_token_weight", "supervised_pixel_weight")
    if isinstance(config, TradeoffConfig) and "tail_penalized" not in kinds:
        never("no arm is tail_penalized", "tail_penalty_weight")
    if isinstance(config, TradeoffConfig) and "rali_arm" not in kinds:
        never("no arm is rali_arm", "rali_arm_weight")
    distilled = [arm for arm in arms if arm.distillation]
    if distilled and all((arm.variant_of or arm.name) == "self_taught" for arm in distilled):
        never("only self_taught is distilled", "distillation.batch_share", "distillation.frozen_share")
    if distilled and not any(arm.distillation and arm.distillation.teacher == EMA for arm in distilled):
        never("distillation.teacher is not ema", "distillation.ema_decay")
    if distilled and all(arm.text_encoder == "frozen" for arm in distilled):
        never("no distilled text encoder is trained", "distillation.text_gradient")
    if not gated and not isinstance(config, FinetuneConfig):
        never("no gate is asked for", "distillation.gate_images")
    if config.trainer.localize_every_steps is None:
        never("trainer.localize_every_steps is not set", "trainer.localize_images")
    if isinstance(config, TradeoffConfig) and "self_taught" not in kinds:
        never("no arm is self_taught", "self_taught_batch_share", "self_taught_frozen_share")
    if not config.trainer.cache_latents and not config.trainer.cache_text_embeddings:
        never("nothing is cached", "data.cache_dir")
    if all(denoising.caption_dropout == 0 for denoising in texts):
        never("denoising.caption_dropout is 0", "denoising.caption_dropout_label")
    return unused

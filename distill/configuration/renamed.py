"""What to write in place of a key of an earlier version, for each group of options."""

from __future__ import annotations

from collections.abc import Mapping

Renamed = dict[str, str]


def _prefixed(prefix: str, notes: Mapping[str, str]) -> Renamed:
    return {f"{prefix}.{key}": note for key, note in notes.items()}


_GONE = "it is gone, since it lost in every comparison; leave it out"
_NEVER = "it is gone, since nothing was ever measured with it; leave it out"
_SUPERVISED = "it is an option of the method supervised_attention now"
_EVALUATE_ONLY = "only recipes/evaluate.py and the recipes that compare maps have it"

DATA = {
    "phantom_captions": "it is data.captions now",
    "phantom_companions": _NEVER,
    "companions": _NEVER,
}
LORA = {"unet_targets": "it is denoiser_targets now, in the same group"}
TRAINER = {
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_betas"), f"0.9 and 0.999 are used; {_NEVER}"),
    "keep_checkpoints": "leave it out: the newest two stay",
    "localize_images": "leave it out: 100 images are looked at",
    "localize_every_steps": "it is validate_every_steps now, in the same group",
}
DENOISING = {
    "arm_weight": f"{_SUPERVISED}, arm_weight",
    "region_token_weight": f"{_SUPERVISED}, region_token_weight",
    "region_pixel_weight": f"{_SUPERVISED}, region_pixel_weight",
    "region_images": f"{_SUPERVISED}, images",
    "region_mask_weight": _GONE,
    "tail_weight": "it is the option weight of the method tail_penalty now",
}
EVALUATION = dict.fromkeys(
    (
        "protocol", "ground_truth", "iou_threshold", "self_attention_power", "smoothing_sigma", "map_threshold",
        "orphan_share", "quantization", "scheduler",
    ),
    _EVALUATE_ONLY,
)  # fmt: skip

_LOST = {"ema_decay": _GONE, "frozen_share": _GONE, "text_gradient": _GONE}
_MATCH = (
    "token_kl_weight", "place_kl_weight", "mass_weight", "tail_weight", "place_groups", "words", "layers", "min_timestep",
    "max_timestep",
)  # fmt: skip
_DISTILLATION = (
    "teacher", "start_from_teacher", "batch_share", *_MATCH, "output_weight", "feature_weight", "self_attention_weight",
    "gate_reference", "gate_images",
)  # fmt: skip


def _distillation(place: str, names: tuple[str, ...] = _DISTILLATION) -> Renamed:
    """distillation.* -> the options of the method at `place`."""
    moved = {name: f"it is {place}.{name} now" for name in names}
    return {"distillation": f"its options are those of {place} now"} | _prefixed("distillation", moved | _LOST)


FINETUNE = {
    "method": "how the U-Net is trained is denoiser now; method.kind says what is minimized",
    "lock_keys": "set method.kind to key_lock",
}
DISTILL_ATTENTION = {"method": "how the U-Net is trained is denoiser now"} | _distillation("method")
COMPRESS = _distillation("method")
DISTILL_STEPS = (
    {"method": "how the U-Net is trained is denoiser now", "consistency": "its options are those of method now"}
    | _distillation("method", _MATCH)
    | {f"consistency.{name}": f"it is method.{name} now" for name in ("solver_steps", "guidance_scale", "huber_c")}
)
_ARM = "arms.NAME"
_IN_ARMS = {
    "lora": ("rank", "alpha", "dropout", "text_encoder_targets"),
    "denoising": (
        "min_snr_gamma", "caption_dropout", "caption_dropout_label", "training_text", "paraphrases", "insert_labels",
    ),
}  # fmt: skip
TRADEOFF = (
    {
        "arms": "arms is a mapping now, such as arms.frozen.text_encoder frozen; see recipes/configs/phantom/tradeoff.yaml",
        "variants": "each is an arm now: arms.NAME.like names the arm that it varies",
        "method": f"it is {_ARM}.denoiser now",
        "lora_learning_rate": f"it is {_ARM}.learning_rate and {_ARM}.text_encoder_learning_rate now",
        "tail_penalty_weight": f"it is {_ARM}.method.weight now, with method.kind tail_penalty",
        "rali_arm_weight": f"it is {_ARM}.method.arm_weight now, with method.kind supervised_attention",
        "supervised_token_weight": f"it is {_ARM}.method.region_token_weight now, with method.kind supervised_attention",
        "supervised_pixel_weight": f"it is {_ARM}.method.region_pixel_weight now, with method.kind supervised_attention",
        "self_taught_batch_share": _GONE,
        "self_taught_frozen_share": _GONE,
        "seed": "it is seeds now, a list of one",
        "lora.unet_targets": f"it is {_ARM}.lora.denoiser_targets now",
    }
    | {group: f"it is {_ARM}.{group} now" for group in _IN_ARMS}
    | {f"{group}.{name}": f"it is {_ARM}.{group}.{name} now" for group, names in _IN_ARMS.items() for name in names}
    | _prefixed("denoising", DENOISING)
    | _distillation(f"{_ARM}.method")
)
COMPARE = {"references": "it is compare_to now"}

"""The documented form of metrics.json, and the check that holds it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

Check = Callable[[Any, str], None]

# Float sums of probabilities may pass 1 by a rounding error.
_TOLERANCE = 1e-6


def _fail(path: str, reason: str) -> NoReturn:
    raise ValueError(f"{path}: {reason}")


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _number(low: float = -math.inf, high: float = math.inf) -> Check:
    def check(value: Any, path: str) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            _fail(path, f"must be a number, is {_kind(value)}")
        if not math.isfinite(value):
            _fail(path, f"must be finite or null, is {value}")
        if not low - _TOLERANCE <= value <= high + _TOLERANCE:
            _fail(path, f"must be within [{low:g}, {high:g}], is {value:g}")

    return check


def _count(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        _fail(path, f"must be a whole number of at least 0, is {value!r}")


def _text(value: Any, path: str) -> None:
    if not isinstance(value, str):
        _fail(path, f"must be a string, is {_kind(value)}")


def _interval(value: Any, path: str) -> None:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        _fail(path, f"must be [low, high], is {value!r}")
    for index, end in enumerate(value):
        _number()(end, f"{path}[{index}]")
    if value[0] > value[1]:
        _fail(path, f"low end {value[0]:g} is above high end {value[1]:g}")


def _nullable(check: Check) -> Check:
    def check_or_null(value: Any, path: str) -> None:
        if value is not None:
            check(value, path)

    return check_or_null


def _mapping(value: Any, path: str) -> None:
    if not isinstance(value, Mapping):
        _fail(path, f"must be an object, is {_kind(value)}")
    for key in value:
        if not isinstance(key, str):
            _fail(path, f"key {key!r} must be a string")


def _object(fields: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """All of `fields`, any of `optional`, and further keys whose numbers are finite.

    Further keys are let through because every documented one is required: a misspelt name shows up as a missing one.
    """

    def check(value: Any, path: str) -> None:
        _mapping(value, path)
        for name in fields:
            if name not in value:
                _fail(f"{path}.{name}", "is missing")
        known = {**fields, **(optional or {})}
        for name, item in value.items():
            known.get(name, _json)(item, f"{path}.{name}")
            if name.endswith("_ci") and item is not None and value.get(name[: -len("_ci")]) is None:
                _fail(f"{path}.{name}", f"is an interval, but {name[: -len('_ci')]} is null")

    return check


def _each(check: Check) -> Check:
    def check_each(value: Any, path: str) -> None:
        _mapping(value, path)
        for name, item in value.items():
            check(item, f"{path}.{name}")

    return check_each


def _json(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
        _each(_json)(value, path)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _json(item, f"{path}[{index}]")
    elif isinstance(value, float):
        _number()(value, path)
    elif value is not None and not isinstance(value, (str, bool, int)):
        _fail(path, f"is no JSON value: {_kind(value)}")


_UNIT = _nullable(_number(0, 1))
_ANY = _nullable(_number())
_POSITIVE = _nullable(_number(0))
_CI = _nullable(_interval)
_COUNT = _nullable(_count)

_FINDING = _object({"auc": _UNIT, "cnr": _ANY, "top1": _UNIT, "iou": _UNIT, "pairs": _count})
_TOKENS = _object(
    {
        "auc": _UNIT,
        "auc_ci": _CI,
        "cnr": _ANY,
        "cnr_ci": _CI,
        "top1": _UNIT,
        "top1_ci": _CI,
        "iou": _UNIT,
        "iou_ci": _CI,
        "images": _count,
        "pairs": _count,
        "per_finding": _each(_FINDING),
    }
)
_MASS = _object({"bos": _UNIT, "words": _UNIT, "eos": _UNIT, "padding": _UNIT})
_LOCALIZATION = _object(
    {"word": _nullable(_TOKENS), "eos": _nullable(_TOKENS), "padding": _nullable(_TOKENS), "mass": _nullable(_MASS)}
)
_QUALITY = _object(
    {
        "fid": _ANY,
        "fid_ci": _CI,
        "finding_auc": _UNIT,
        "finding_auc_ci": _CI,
        "diversity": _ANY,
        "images": _count,
        "features": _nullable(_text),
    }
)
_COST = _object(
    {
        "train_seconds": _POSITIVE,
        "steps": _COUNT,
        "peak_memory_gb": _POSITIVE,
        "evaluation_seconds": _POSITIVE,
        "trainable_parameters": _COUNT,
    }
)
_SIZE = _object(
    {
        "denoiser_parameters": _count,
        "text_encoder_parameters": _count,
        "denoiser_gflops": _number(0),
        "denoiser_passes_an_image": _count,
        "megabytes": _number(0),
    }
)
_ARM = _object(
    {"localization": _nullable(_LOCALIZATION), "quality": _nullable(_QUALITY), "cost": _COST}, optional={"size": _SIZE}
)
_METRICS = _object(
    {
        "arms": _each(_ARM),
        "provenance": _object({}, optional={"seconds": _each(_POSITIVE), "peak_memory_gb": _POSITIVE}),
    },
    optional={"real": _nullable(_object({"quality": _nullable(_QUALITY)}))},
)


def validate_metrics(metrics: Mapping[str, Any]) -> None:
    """Check the content of metrics.json.

    `{"arms": {arm: {"localization", "quality", "cost"}}, "provenance": {...}, "real": {"quality"} (optional)}` with

    - localization: `word`, `eos`, `padding`, each `auc, cnr, top1, iou` with `<name>_ci = [low, high]`, the counts
      `images` and `pairs`, and `per_finding: {finding: {auc, cnr, top1, iou, pairs}}`; and `mass: {bos, words, eos,
      padding}`, parts of 1. Optional: `protocol`, `layers`, `timesteps`; per token map `average` ("macro" or "micro",
      which of the two the values are), `macro` and `micro` values, and the protocol's further metrics.
    - quality: `fid, fid_ci, finding_auc, finding_auc_ci, diversity, images, features`.
    - cost: `train_seconds, steps, peak_memory_gb, evaluation_seconds, trainable_parameters`; optional
      `localization_seconds`.
    - size (optional): `denoiser_parameters, text_encoder_parameters, denoiser_gflops` (of one pass of one image),
      `denoiser_passes_an_image` (guidance doubles the denoising steps), `megabytes` (U-Net and text encoders, in 16 bits where
      they are not quantized).
    - provenance: any JSON object; `provenance.seconds = {stage: seconds}` is shown as a table.

    Every key is required; what cannot be computed is null; further keys are allowed; no number is NaN or infinite.

    Raises:
        ValueError: names the path of the first wrong key.
    """
    _METRICS(metrics, "metrics")
    if not metrics["arms"]:
        _fail("metrics.arms", "is empty")

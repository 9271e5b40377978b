"""metrics.json as typed values. An error names the path of the wrong key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

# Float sums of probabilities may pass 1 by a rounding error.
_TOLERANCE = 1e-6
TOKENS = ("word", "eos", "padding")
MASS = ("bos", "words", "eos", "padding")


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; each is None where it is unknown."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TokenMap:
    """Scores of one token map. estimates: by metric name. findings: name -> (AUC, pairs)."""

    estimates: Mapping[str, Estimate]
    images: int
    pairs: int
    findings: Mapping[str, tuple[float | None, int]]


@dataclass(frozen=True)
class Localization:
    """maps: of `TOKENS`. mass: of `MASS`, parts of 1. priors: word AUC of maps that do not look at the image."""

    maps: Mapping[str, TokenMap]
    mass: Mapping[str, float | None]
    priors: Mapping[str, Estimate]
    protocol: str | None


@dataclass(frozen=True)
class Quality:
    estimates: Mapping[str, Estimate]
    images: int
    features: str | None


@dataclass(frozen=True)
class Cost:
    train_seconds: float | None = None
    steps: int | None = None
    peak_memory_gb: float | None = None
    evaluation_seconds: float | None = None
    trainable_parameters: int | None = None
    denoiser_passes: int | None = None


@dataclass(frozen=True)
class Size:
    """denoiser_gflops: of one pass of one image. megabytes: denoiser and text encoders, 16 bits where not quantized."""

    denoiser_parameters: int
    text_encoder_parameters: int
    denoiser_gflops: float
    denoiser_passes_an_image: int
    megabytes: float


@dataclass(frozen=True)
class Arm:
    """One model. Without training cost it was not trained in this run."""

    name: str
    localization: Localization | None = None
    quality: Quality | None = None
    cost: Cost = Cost()
    size: Size | None = None

    def estimate(self, key: str) -> Estimate:
        """`key` as in `paired`: "word.auc", "quality.fid"."""
        part, name = key.split(".")
        if part == "quality":
            return (self.quality.estimates if self.quality else {}).get(name, Estimate())
        found = self.localization.maps.get(part) if self.localization else None
        return found.estimates.get(name, Estimate()) if found else Estimate()


@dataclass(frozen=True)
class Results:
    """compare_to: baseline arms. paired: (arm, other) -> key -> difference on the same images and seeds."""

    arms: Mapping[str, Arm]
    real: Quality | None
    paired: Mapping[tuple[str, str], Mapping[str, Estimate]]
    compare_to: tuple[str, ...]
    provenance: Mapping[str, Any]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class _Object:
    content: Mapping[str, Any]
    path: str

    def fail(self, key: str, reason: str) -> NoReturn:
        raise ValueError(f"{self.path}.{key}: {reason}")

    def take(self, key: str, optional: bool = False) -> Any:
        if key not in self.content and not optional:
            self.fail(key, "is missing")
        return self.content.get(key)

    def number(self, key: str, low: float = -math.inf, high: float = math.inf, optional: bool = False) -> Any:
        """A finite number of [low, high], or None for null."""
        value = self.take(key, optional)
        if value is not None:
            self.check(key, value, low, high)
        return value

    def check(self, key: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(key, f"must be a number or null, is {type(value).__name__}")
        if not math.isfinite(value):
            self.fail(key, f"must be finite or null, is {value}")
        if not low - _TOLERANCE <= value <= high + _TOLERANCE:
            self.fail(key, f"must be within [{low:g}, {high:g}], is {value:g}")

    def count(self, key: str, null: bool = False, optional: bool = False) -> Any:
        value = self.take(key, optional)
        if value is None and (null or optional):
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            self.fail(key, f"must be a whole number of at least 0, is {value!r}")
        return value

    def text(self, key: str, optional: bool = False) -> str | None:
        value = self.take(key, optional)
        if value is not None and not isinstance(value, str):
            self.fail(key, f"must be a string or null, is {type(value).__name__}")
        return value

    def estimate(self, key: str, low: float = -math.inf, high: float = math.inf, optional: bool = False) -> Estimate:
        return Estimate(self.number(key, low, high, optional), *self.interval(f"{key}_ci", key, optional))

    def interval(self, key: str, of: str, optional: bool = False) -> tuple[float | None, float | None]:
        ends = self.take(key, optional)
        if ends is None:
            return None, None
        if not isinstance(ends, (list, tuple)) or len(ends) != 2:
            self.fail(key, f"must be [low, high] or null, is {ends!r}")
        for place, end in enumerate(ends):
            self.check(f"{key}[{place}]", end)
        if ends[0] > ends[1]:
            self.fail(key, f"low end {ends[0]:g} is above high end {ends[1]:g}")
        if self.take(of, optional) is None:
            self.fail(key, f"is an interval, but {of} is null")
        return ends[0], ends[1]

    def object(self, key: str, optional: bool = False) -> _Object | None:
        value = self.take(key, optional)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.fail(key, f"must be an object, is {type(value).__name__}")
        return _Object(value, f"{self.path}.{key}")

    def required(self, key: str) -> _Object:
        return self.object(key) or self.fail(key, "must be an object, is null")

    def each(self, key: str, optional: bool = False) -> dict[str, _Object]:
        found = self.object(key, optional)
        return {name: found.required(name) for name in found.content} if found else {}


def _token_map(o: _Object) -> TokenMap:
    estimates = {"auc": o.estimate("auc", 0, 1), "cnr": o.estimate("cnr")}
    estimates |= {name: o.estimate(name, 0, 1) for name in ("top1", "iou")}
    estimates |= {"image_adds": o.estimate("image_adds", -1, 1, optional=True)}
    estimates |= {"other_image_auc": Estimate(o.number("other_image_auc", 0, 1, optional=True))}
    findings = {
        name: (found.number("auc", 0, 1), found.count("pairs")) for name, found in o.each("per_finding").items()
    }
    return TokenMap(estimates, o.count("images"), o.count("pairs"), findings)


def _localization(o: _Object) -> Localization:
    maps = {token: _token_map(found) for token in TOKENS if (found := o.object(token))}
    mass = o.object("mass")
    priors = {name: found.estimate("auc", 0, 1) for name, found in o.each("priors", optional=True).items()}
    parts = {name: mass.number(name, 0, 1) for name in MASS} if mass else {}
    return Localization(maps, parts, priors, o.text("protocol", optional=True))


def _quality(o: _Object) -> Quality:
    estimates = {"fid": o.estimate("fid"), "finding_auc": o.estimate("finding_auc", 0, 1)}
    estimates["diversity"] = Estimate(o.number("diversity"))
    return Quality(estimates, o.count("images"), o.text("features"))


def _arm(name: str, o: _Object) -> Arm:
    located, quality, cost, size = (
        o.object("localization"),
        o.object("quality"),
        o.required("cost"),
        o.object("size", True),
    )
    costs: dict[str, Any] = {key: cost.count(key, null=True) for key in ("steps", "trainable_parameters")}
    costs |= {key: cost.number(key, 0) for key in ("train_seconds", "peak_memory_gb", "evaluation_seconds")}
    sizes: dict[str, Any] = {}
    if size:
        counts = ("denoiser_parameters", "text_encoder_parameters", "denoiser_passes_an_image")
        sizes |= {key: size.count(key) for key in counts}
        sizes |= {key: size.number(key, 0) for key in ("denoiser_gflops", "megabytes")}
    return Arm(
        name,
        _localization(located) if located else None,
        _quality(quality) if quality else None,
        Cost(**costs, denoiser_passes=cost.count("denoiser_passes", optional=True)),
        Size(**sizes) if sizes else None,
    )


def _check_json(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_json(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            _check_json(item, f"{path}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path}: must be finite or null, is {value}")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        raise ValueError(f"{path}: is no JSON value: {type(value).__name__}")


def _paired(metrics: _Object, arms: Mapping[str, Arm]) -> dict[tuple[str, str], dict[str, Estimate]]:
    found: dict[tuple[str, str], dict[str, Estimate]] = {}
    for name, keys in metrics.each("paired", optional=True).items():
        pair = next(((a, b) for a in arms for b in arms if f"{a} - {b}" == name), None)
        if pair is None:
            metrics.fail(f"paired.{name}", f"is no difference 'a - b' of two arms; the arms are {', '.join(arms)}")
        values = {key: keys.required(key) for key in keys.content}
        found[pair] = {key: Estimate(o.number("value"), *o.interval("ci", "value")) for key, o in values.items()}
    return found


def parse_metrics(content: Mapping[str, Any]) -> Results:
    """The content of metrics.json, checked and typed.

    `{"arms": {name: {"localization", "quality", "cost", optional "size"}}, "provenance": {...}}`, and optional `real`,
    `paired` and `compare_to`. The fields are those of the dataclasses above. Every field is required, except
    `image_adds`, `other_image_auc`, `priors`, `protocol` and `denoiser_passes`. What cannot be computed is null. Each
    value has its interval beside it as `<name>_ci`. Further keys are allowed. No number is NaN or infinite.

    Raises:
        ValueError: names the path of the first wrong key.
    """
    metrics = _Object(content, "metrics")
    arms = {name: _arm(name, o) for name, o in metrics.each("arms").items()}
    if not arms:
        metrics.fail("arms", "is empty")
    provenance = metrics.required("provenance")
    _check_json(content, "metrics")
    if seconds := provenance.object("seconds", optional=True):
        for name in seconds.content:
            seconds.number(name, 0)
    compare_to = metrics.take("compare_to", optional=True) or []
    for name in compare_to:
        if name not in arms:
            metrics.fail("compare_to", f"names {name!r}, which is no arm; the arms are {', '.join(arms)}")
    real = metrics.object("real", optional=True)
    real_quality = real.object("quality") if real else None
    drawn = provenance.object("seeds", optional=True)
    seeds = drawn.take("training", optional=True) if drawn else None
    return Results(
        arms,
        _quality(real_quality) if real_quality else None,
        _paired(metrics, arms),
        tuple(compare_to) or tuple(arms)[:1],
        provenance.content,
        tuple(seeds) if isinstance(seeds, list) else () if seeds is None else (seeds,),
    )


def validate_metrics(metrics: Mapping[str, Any]) -> None:
    """Check the content of metrics.json. Raises ValueError with the path of the first wrong key, see `parse_metrics`."""
    parse_metrics(metrics)

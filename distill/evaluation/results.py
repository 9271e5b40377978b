"""metrics.json as typed values. An error names the path of the wrong key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from types import UnionType
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

from distill.data.balance import shares_text

# Float sums of probabilities may pass 1 by a rounding error.
_TOLERANCE = 1e-6
SIGNIFICANT = 0.05
"""Memorization is found where p is below."""
FEWEST_IMAGES = 20
"""Images of a finding, generated and real, below which its quality is not measured."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; each is None where it is unknown."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


Unit = Annotated[float, 0.0, 1.0]
Positive = Annotated[float, 0.0, math.inf]
UnitEstimate = Annotated[Estimate, 0.0, 1.0]
AnyEstimate = Annotated[Estimate, -math.inf, math.inf]


@dataclass(frozen=True)
class Finding:
    auc: UnitEstimate
    pairs: int


@dataclass(frozen=True)
class TokenMap:
    """Scores of one token map. image_adds: AUC minus other_image_auc, that of other images' maps on this image.
    within_prior: see evaluation/within_prior.py."""

    auc: UnitEstimate
    cnr: AnyEstimate
    top1: UnitEstimate
    iou: UnitEstimate
    images: int
    pairs: int
    per_finding: Mapping[str, Finding]
    image_adds: Annotated[Estimate, -1.0, 1.0] = Estimate()
    other_image_auc: UnitEstimate = Estimate()
    within_prior: UnitEstimate = Estimate()


@dataclass(frozen=True)
class Prior:
    """A map that does not look at the image."""

    auc: UnitEstimate
    within_prior: UnitEstimate = Estimate()


@dataclass(frozen=True)
class Localization:
    """mass: parts of all cross-attention, of bos, words, eos and padding. layers, timesteps: that the maps are of."""

    word: TokenMap | None
    eos: TokenMap | None
    padding: TokenMap | None
    mass: Mapping[str, Unit | None] | None
    priors: Mapping[str, Prior | None] | None = None
    causal_encoder: TokenMap | None = None
    causal_denoiser: TokenMap | None = None
    layers: Sequence[str] | None = None
    timesteps: Sequence[int] | None = None


@dataclass(frozen=True)
class Extractor:
    """What made the features that FID and the others compare. weights: their hash. resize: of an image, before them."""

    name: str
    weights: str
    resize: str
    dimensions: int
    real_images: int

    def __str__(self) -> str:
        return f"{self.name} ({self.dimensions} dimensions, resize: {self.resize}, weights {self.weights[:12]})"


@dataclass(frozen=True)
class FindingQuality:
    """Of the images whose captions state one finding."""

    images: int
    real_images: int
    kid: AnyEstimate
    density: Annotated[Estimate, 0.0, math.inf] = Estimate()
    coverage: UnitEstimate = Estimate()
    finding_auc: UnitEstimate = Estimate()


@dataclass(frozen=True)
class Quality:
    fid: AnyEstimate
    finding_auc: UnitEstimate
    diversity: AnyEstimate
    images: int
    features: str | None
    kid: AnyEstimate = Estimate()
    precision: UnitEstimate = Estimate()
    recall: UnitEstimate = Estimate()
    density: Annotated[Estimate, 0.0, math.inf] = Estimate()
    coverage: UnitEstimate = Estimate()
    finding_auc_negated: UnitEstimate = Estimate()
    finding_auc_unmentioned: UnitEstimate = Estimate()
    finding_auc_of: Sequence[str] | None = None
    """The findings that finding_auc is the mean over."""
    extractor: Extractor | None = None
    per_finding: Mapping[str, FindingQuality] | None = None
    too_few: Mapping[str, int] | None = None

    @property
    def features_text(self) -> str:
        return str(self.extractor or self.features or "none")


@dataclass(frozen=True)
class Memorization:
    """Whether generated images are copies of training images; see `distill.metrics.memorization.Copies` and
    `Verdict`."""

    copies: UnitEstimate
    share: Unit
    chance: Unit
    p: Unit
    least_p: Unit
    space: str
    images: int
    training_images: int
    held_out_images: int
    seed: int | None = None
    """Of several training seeds, whose p is the smallest."""
    training_patients: int | None = None
    held_out_patients: int | None = None
    """Where patients have several images."""
    near: int = 0
    near_held_out: int = 0
    near_tested: int = 0
    near_p: Unit = 1.0
    """See `distill.metrics.memorization.NearCopies`."""

    @property
    def compared(self) -> str:
        """How many images, and of how many patients."""
        real = f"{self.training_images:,} training and {self.held_out_images:,} held-out images"
        if self.training_patients is not None:
            real += f" of {self.training_patients:,} and {self.held_out_patients:,} patients"
        return f"{self.images:,} generated, {real}"

    @property
    def exceeds_chance(self) -> bool:
        return self.p < SIGNIFICANT

    @property
    def has_near(self) -> bool:
        """Whether some generated images are near copies, and real images are not as often."""
        return self.near > 0 and (self.near_held_out == 0 or self.near_p < SIGNIFICANT)

    @property
    def near_text(self) -> str:
        """What is said of near copies; empty where they show nothing."""
        told = f"{self.near:,} of {self.images:,} generated images are near copies of training images"
        return (
            f"{told} (of {self.near_tested:,} held-out real images: {self.near_held_out:,}). " if self.has_near else ""
        )

    @property
    def is_found(self) -> bool:
        return self.exceeds_chance or self.has_near

    @property
    def found_share(self) -> float:
        """Share of the generated images that are copies, by the test that finds more; 0 where none does."""
        by_chance = (self.copies.value or 0.0) if self.exceeds_chance else 0.0
        return max(by_chance, self.near / self.images if self.has_near else 0.0)

    @property
    def can_be_found(self) -> bool:
        """Whether so few images can show anything at all."""
        return self.least_p < SIGNIFICANT


@dataclass(frozen=True)
class Utility:
    """AUC on real images of classifiers that are trained on generated images, on real ones, and on both; see
    evaluation/utility.py."""

    generated: UnitEstimate
    real: UnitEstimate
    both: UnitEstimate
    generated_minus_real: Annotated[Estimate, -1.0, 1.0]
    both_minus_real: Annotated[Estimate, -1.0, 1.0]
    images: int
    real_images: int
    held_out_images: int


@dataclass(frozen=True)
class Similarity:
    """How near a model finds images to their captions; see `distill.metrics.image_text.similarity`. real: of the real
    images of these captions, or of others where the images are another tool's."""

    own: AnyEstimate
    adds: AnyEstimate
    real: AnyEstimate
    real_adds: AnyEstimate
    images: int
    model: str


@dataclass(frozen=True)
class Explanation:
    """How well a detector of named features tells generated from real images, and real ones from other real ones (the
    control); see evaluation/explanation.py. told_by: the features that it surely uses, at most three."""

    auc: UnitEstimate
    real: UnitEstimate
    images: int
    told_by: Sequence[str]

    @property
    def is_told(self) -> bool:
        """Whether generated images are surely told from real ones, and real ones from one another are not."""
        return self.auc.low is not None and self.auc.low > 0.5 and (self.real.low or 0.0) <= 0.5

    def __str__(self) -> str:
        return ", by ".join([f"AUC {self.auc.value:.2f}".replace("0.", "."), *filter(None, [", ".join(self.told_by)])])


@dataclass(frozen=True)
class Kept:
    """The look whose weights are exported, by the rule of the option keep. value: of what the rule names."""

    step: int
    rule: str
    value: float

    def __str__(self) -> str:
        what = {"loss": "lowest validation loss"}.get(self.rule, f"highest {self.rule} on validation images")
        return (
            f"the weights of step {self.step:,} are exported, which had the {what}, {self.value:.4g} (keep {self.rule})"
        )


@dataclass(frozen=True)
class Drawn:
    """Share of the training images that have a finding, and of those that were drawn."""

    before: Unit
    after: Unit


@dataclass(frozen=True)
class Cost:
    train_seconds: Positive | None
    steps: int | None
    peak_memory_gb: Positive | None
    evaluation_seconds: Positive | None
    trainable_parameters: int | None
    image_passes: int | None = None
    image_passes_with_teachers: int | None = None
    kept: Kept | None = None
    drawn: Mapping[str, Drawn] | None = None


@dataclass(frozen=True)
class Size:
    """denoiser_gflops: of one pass of one image. megabytes: denoiser and text encoders, 16 bits where not quantized."""

    denoiser_parameters: int
    text_encoder_parameters: int
    denoiser_gflops: Positive
    denoiser_passes_an_image: int
    megabytes: Positive


@dataclass(frozen=True)
class Arm:
    """One model. An arm without training seconds was not trained in this run."""

    localization: Localization | None
    quality: Quality | None
    cost: Cost
    size: Size | None = None
    per_seed: Mapping[str, Mapping[str, float | None]] | None = None
    memorization: Memorization | None = None
    utility: Utility | None = None
    similarity: Similarity | None = None
    explanation: Explanation | None = None

    @property
    def notes(self) -> list[str]:
        """Which weights are exported, where they are not those after the last step, and how images were drawn, where
        not alike."""
        shares = {name: (one.before, one.after) for name, one in (self.cost.drawn or {}).items()}
        drawn = [f"images of rare findings were drawn more often: {shares_text(shares)}"] if shares else []
        return [str(self.cost.kept), *drawn] if self.cost.kept else drawn

    def estimate(self, key: str) -> Estimate:
        """`key` as in `paired`: "word.auc", "mass.eos", "quality.fid"."""
        part, name = key.split(".")
        found = getattr(
            self if part in ("quality", "utility", "similarity", "explanation") else self.localization, part, None
        )
        if isinstance(found, Mapping):
            return Estimate(found.get(name))
        estimate: Estimate = getattr(found, name, Estimate())
        return estimate

    def each_finding(self, key: str) -> dict[str, tuple[int, Estimate]]:
        """Finding -> its pairs or images, and `key` of it."""
        part, name = key.split(".")
        if part == "quality":
            quality = self.quality or Quality(Estimate(), Estimate(), Estimate(), 0, None)
            few = {finding: (count, Estimate()) for finding, count in (quality.too_few or {}).items()}
            return {f: (one.images, getattr(one, name)) for f, one in (quality.per_finding or {}).items()} | few
        located: TokenMap | None = getattr(self.localization, part, None)
        return {f: (one.pairs, one.auc) for f, one in located.per_finding.items()} if located else {}


@dataclass(frozen=True)
class Difference:
    """a - b on the same images and seeds; of FID relative to b."""

    value: float
    ci: tuple[float, float] | None


@dataclass(frozen=True)
class Results:
    """compare_to: baseline arms, by default the first. paired: "a - b" -> key -> difference."""

    arms: Mapping[str, Arm]
    provenance: Mapping[str, Any]
    real: Mapping[str, Quality | None] | None = None
    paired: Mapping[str, Mapping[str, Difference]] | None = None
    compare_to: Sequence[str] = ()

    @property
    def notes(self) -> list[str]:
        """`Arm.notes` of each arm."""
        return [f"{name}: {sentence}." for name, arm in self.arms.items() for sentence in arm.notes]

    @property
    def with_other_maps(self) -> list[str]:
        """Arms whose maps are of other layers or timesteps than those of the first that has maps."""
        found = {name: one for name, arm in self.arms.items() if (one := arm.localization) is not None}
        used = {name: (one.layers, one.timesteps) for name, one in found.items()}
        return [name for name, of in used.items() if of != next(iter(used.values()))]

    def difference(self, arm: str, other: str, key: str) -> Difference | None:
        """The paired difference arm - other (of FID relative to other), in whichever order it was measured."""
        paired = self.paired or {}
        if f"{arm} - {other}" in paired:
            return paired[f"{arm} - {other}"].get(key)
        found = paired.get(f"{other} - {arm}", {}).get(key)
        if found is None:
            return None
        ends = (found.value, *(found.ci or (0, 0))[::-1])
        value, low, high = (1 / (1 + v) - 1 if key == "quality.fid" else -v for v in ends)
        return Difference(value, (low, high) if found.ci else None)

    def is_worse_than_real(self, arm: str, key: str, direction: int) -> bool:
        """Whether the intervals of an arm and of real images do not overlap, on the worse side. direction: 1 where
        higher is better, else -1. False for finding AUCs of other findings."""
        sides = (self.arms[arm].quality, (self.real or {}).get("quality"))
        named = {tuple(side.finding_auc_of) for side in sides if side and side.finding_auc_of is not None}
        if "finding_auc" in key and len(named) > 1:
            return False
        ours, real = self.arms[arm].estimate(key), self.with_real.get("real images", self.arms[arm]).estimate(key)
        better, worse = (real.low, ours.high) if direction > 0 else (ours.low, real.high)
        return worse is not None and better is not None and worse < better

    @property
    def with_copies(self) -> list[str]:
        """Arms in whose images copies of training images were found."""
        return [name for name, arm in self.arms.items() if arm.memorization and arm.memorization.is_found]

    @property
    def seeds(self) -> tuple[int, ...]:
        """All training seeds of the run, which may be of one arm each."""
        seeds = (self.provenance.get("seeds") or {}).get("training")
        return tuple(seeds) if isinstance(seeds, list) else () if seeds is None else (seeds,)

    @property
    def with_real(self) -> dict[str, Arm]:
        """All arms, and the real images as if they were one."""
        real = Arm(None, (self.real or {}).get("quality"), Cost(*[None] * 5))
        return dict(self.arms) | ({"real images": real} if self.real else {})

    @property
    def seeds_an_arm(self) -> int:
        return max(1, *(len(arm.per_seed or ()) for arm in self.arms.values()))


def _fail(path: str, reason: str) -> NoReturn:
    raise ValueError(f"{path}: {reason}")


def _number(value: object, path: str, low: float = -math.inf, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        _fail(path, f"must be a number, is {type(value).__name__}")
    if not math.isfinite(value):
        _fail(path, f"must be finite or null, is {value}")
    if not low - _TOLERANCE <= value <= high + _TOLERANCE:
        _fail(path, f"must be within [{low:g}, {high:g}], is {value:g}")
    return value


def _interval(value: object, path: str) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        _fail(path, f"must be [low, high], is {value!r}")
    low, high = (_number(end, f"{path}[{place}]") for place, end in enumerate(value))
    return (low, high) if low <= high else _fail(path, f"low end {low:g} is above high end {high:g}")


def _read(kind: Any, value: Any, path: str) -> Any:
    """`value` as `kind`: a dataclass, a mapping, a sequence, a bounded number, or one of these or None."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _read(arguments[0], value, path)
    if kind is float or origin is Annotated:
        return _number(value, path, *arguments[1:])
    if kind is int and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        _fail(path, f"must be a whole number of at least 0, is {value!r}")
    if origin is tuple:
        return _interval(value, path)
    expected: Any = {int: int, str: str, Any: object, Sequence: list}.get(origin or kind, Mapping)
    if not isinstance(value, expected):
        names = {str: "a string", list: "a list"}
        _fail(path, f"must be {names.get(expected, 'an object')}, is {type(value).__name__}")
    if origin is Mapping:
        return {name: _read(arguments[1], item, f"{path}.{name}") for name, item in value.items()}
    return _record(kind, value, path) if is_dataclass(kind) else value


def _record(kind: Any, value: Mapping[str, Any], path: str) -> Any:
    found = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        name, hint = field.name, hints[field.name]
        if name not in value:
            if field.default is MISSING:
                _fail(f"{path}.{name}", "is missing")
        elif get_args(hint)[:1] == (Estimate,):
            ends, inner = value.get(f"{name}_ci"), value[name]
            if ends is not None and inner is None:
                _fail(f"{path}.{name}_ci", f"is an interval, but {name} is null")
            inner = None if inner is None else _number(inner, f"{path}.{name}", *get_args(hint)[1:])
            found[name] = Estimate(inner, *(_interval(ends, f"{path}.{name}_ci") if ends is not None else ()))
        else:
            found[name] = _read(hint, value[name], f"{path}.{name}")
    return kind(**found)


def parse_metrics(content: Mapping[str, object]) -> Results:
    """The content of metrics.json, checked and typed; its keys are the fields of `Results`.

    A key without a default is required. What cannot be computed is null. An estimate has its interval beside it as
    `<name>_ci`. Further keys are allowed.
    No number of these fields is NaN or infinite.

    Raises:
        ValueError: names the path of the first wrong key.
    """
    results: Results = _read(Results, content, "metrics")
    arms = results.arms or _fail("metrics.arms", "is empty")
    pairs = {f"{a} - {b}" for a in arms for b in arms}
    for key, names in (
        ("paired", set(results.paired or ()) - pairs),
        ("compare_to", set(results.compare_to) - set(arms)),
    ):
        if names:
            _fail(f"metrics.{key}", f"names {', '.join(sorted(names))}; the arms are {', '.join(arms)}")
    return Results(arms, results.provenance, results.real, results.paired, results.compare_to or list(arms)[:1])


def validate_metrics(metrics: Mapping[str, object]) -> None:
    """Check the content of metrics.json. Raises ValueError with the path of the first wrong key, see
    `parse_metrics`."""
    parse_metrics(metrics)

"""Which model to take, and why: sentences from values and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from distill.report.document import UNKNOWN, Cell, Table
from distill.report.results import Estimate, Results
from distill.report.tables import (
    FID,
    FINDING_AUC,
    IMAGE_ADDS,
    WORD_AUC,
    Metric,
    format_count,
    format_difference,
    format_estimate,
    format_seconds,
)

Answer = Literal["better", "worse", "not separated", "not measured"]
RULE = (
    "The rule: a model is ruled out if another model is better on one measure and worse on none. Among the models that are "
    "left, the first choice has the best mean rank over localization and quality. “Better” means that the 95 % interval of "
    "the paired difference excludes 0. Where there is no paired difference, it means that the two intervals do not overlap. "
    "The intervals are not corrected for the number of comparisons."
)


@dataclass(frozen=True)
class Summary:
    """arm: the first choice, None where nothing was measured. shown: the arms that `why` compares it with."""

    arm: str | None
    title: str
    reasons: tuple[str, ...]
    why: Table | None
    shown: tuple[str, ...]


def difference(results: Results, arm: str, other: str, metric: Metric) -> Estimate:
    """The paired difference arm - other (of FID relative to other), in whichever order it was measured."""
    if (arm, other) in results.paired:
        return results.paired[arm, other].get(metric.key, Estimate())
    found = results.paired.get((other, arm), {}).get(metric.key, Estimate())
    ends = [
        None if v is None else 1 / (1 + v) - 1 if metric is FID else -v for v in (found.value, found.high, found.low)
    ]
    return Estimate(*ends)


def compare(results: Results, arm: str, other: str, metric: Metric) -> Answer:
    """Whether `arm` is better than `other`, by the paired difference, else by whether the intervals overlap."""
    paired = difference(results, arm, other, metric)
    low, high = paired.low, paired.high
    if low is None or high is None:
        ours, theirs = results.arms[arm].estimate(metric.key), results.arms[other].estimate(metric.key)
        if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
            return "not measured"
        low, high = ours.low - theirs.high, ours.high - theirs.low
    if low <= 0 <= high:
        return "not separated"
    return "better" if (low > 0) == (metric.direction > 0) else "worse"


def summarize(results: Results) -> Summary:
    """The first choice by `RULE`, and what the intervals do not tell."""
    arms = results.arms
    located = [arm for arm in arms.values() if arm.estimate(WORD_AUC.key).value is not None]
    adds = bool(located) and all(arm.estimate(IMAGE_ADDS.key).value is not None for arm in located)
    metrics = [IMAGE_ADDS if adds else WORD_AUC, FID, FINDING_AUC]
    metrics = [m for m in metrics if any(arm.estimate(m.key).value is not None for arm in arms.values())]
    whole = [a for a in arms if all(arms[a].estimate(m.key).value is not None for m in metrics)] if metrics else []
    if not whole:
        text = "No model has both a localization and a quality measure, so none can be recommended."
        return Summary(None, "No model can be recommended", (text,), None, ())
    answers = {(a, b): [compare(results, a, b, m) for m in metrics] for a in whole for b in whole if a != b}
    beats = {pair for pair, found in answers.items() if "better" in found and "worse" not in found}
    left = [a for a in whole if not any((b, a) in beats for b in whole)] or whole
    first = min(left, key=lambda a: _rank(results, a, left, metrics))
    rivals = [a for a in left if a != first]
    tied = [a for a in rivals if set(answers[first, a]) <= {"not separated", "not measured"}]
    reasons = []
    if len(whole) == 1:
        reasons.append("There is no other fully measured model to compare it with.")
    if ruled_out := [a for a in whole if a not in left]:
        reasons.append(f"Ruled out, because another model beats it: {', '.join(ruled_out)}.")
    if tied:
        text = f"The numbers do not separate {first} from {_and(tied)}; more seeds or images are needed."
        reasons.append(text)
    for a in rivals:
        if a not in tied:
            sides = [
                f"{answer} in {_and([m.name for m, x in zip(metrics, answers[a, first], strict=True) if x == answer])}"
                for answer in ("better", "worse")
            ]
            reasons.append(f"{a} is {' and '.join(sides)} than {first}: choose by what you need.")
    if partly := [a for a in arms if a not in whole]:
        reasons.append(f"Not compared, because a measure is missing: {', '.join(partly)}.")
    others = tuple(a for a in results.compare_to if a != first) or tuple(a for a in arms if a != first)[:1]
    title = f"Take {first}" + (
        f"; {_and(rivals)} {'is' if len(rivals) == 1 else 'are'} not ruled out" if rivals else ""
    )
    if tied and tied == rivals:
        title = (
            f"First choice: {first}. The numbers do not separate it from {len(tied)} other model{'s' * (len(tied) > 1)}"
        )
    if arms[first].cost.train_seconds is None:
        title += " (not trained here)"
    reasons += [*_blind(results, first), *compute(results)]
    return Summary(first, title, tuple(reasons), _why(results, first, others, metrics), others)


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _rank(results: Results, arm: str, among: Sequence[str], metrics: Sequence[Metric]) -> float:
    """Mean of the rank in localization and the mean rank in quality; 0 is best on all."""

    def rank(metric: Metric) -> int:
        value = {a: metric.direction * (results.arms[a].estimate(metric.key).value or 0.0) for a in among}
        return sum(value[a] > value[arm] for a in among)

    sides = [[rank(m) for m in metrics if m.key.startswith("quality.") == quality] for quality in (False, True)]
    return sum(sum(side) / len(side) for side in sides if side)


def _why(results: Results, first: str, others: Sequence[str], metrics: Sequence[Metric]) -> Table:
    shown = list(
        dict.fromkeys([WORD_AUC, *metrics] if WORD_AUC not in metrics and metrics[0] is IMAGE_ADDS else metrics)
    )
    rows: list[list[str | Cell]] = []
    for m in shown:
        row: list[str | Cell] = [m.label, Cell(*format_estimate(results.arms[first].estimate(m.key), m.unit))]
        for other in others:
            answer = compare(results, first, other, m)
            theirs = " ".join(format_estimate(results.arms[other].estimate(m.key), m.unit))
            paired = format_difference(difference(results, first, other, m), m is FID)
            note = theirs if paired == UNKNOWN else f"{theirs}; difference {paired}"
            mark = {"better": "▲ ", "worse": "▼ ", "not separated": "≈ "}.get(answer, "")
            tones = {"better": "good", "worse": "bad", "not separated": "even"}
            row.append(Cell(mark + answer, note, tones.get(answer, "")))  # type: ignore[arg-type]
        rows.append(row)
    return Table(
        ["", first, *(f"against {other}" for other in others)], rows, "text", "the first choice and the baselines"
    )


def _blind(results: Results, arm: str) -> list[str]:
    """Whether the maps of `arm` say more than maps that do not look at the image."""
    found, located = [], results.arms[arm].localization
    word, adds = results.arms[arm].estimate(WORD_AUC.key), results.arms[arm].estimate(IMAGE_ADDS.key)
    for name, prior in (located.priors if located else {}).items():
        ours, theirs = (word.low, prior.high) if None not in (word.low, prior.high) else (word.value, prior.value)
        if ours is not None and theirs is not None and ours <= theirs:
            name = name.replace("_", " ")
            found.append(f"By word AUC, {arm} is not shown to be better than the blind map “{name}”.")
    if adds.value is not None and (adds.low is None or adds.low <= 0):
        found.append(f"The maps of {arm} are not shown to depend on the image.")
    return found


def compute(results: Results) -> list[str]:
    """A sentence where the trained arms did not cost the same."""
    costs = [arm.cost for arm in results.arms.values() if arm.cost.train_seconds is not None]
    spans = []
    for name, values in (("steps", [c.steps for c in costs]), ("denoiser passes", [c.denoiser_passes for c in costs])):
        known = [v for v in values if v is not None]
        if known and min(known) != max(known):
            spans.append(f"from {format_count(min(known))} to {format_count(max(known))} {name}")
    seconds = [c.train_seconds for c in costs if c.train_seconds is not None]
    if seconds and max(seconds) > 1.1 * min(seconds):
        spans.append(f"from {format_seconds(min(seconds))} to {format_seconds(max(seconds))}")
    return [f"Compute differs between the trained models: {_and(spans)}."] if spans else []


def sample(results: Results) -> str:
    """How many images, pairs and seeds the numbers rest on."""
    maps = [
        a.localization.maps["word"] for a in results.arms.values() if a.localization and "word" in a.localization.maps
    ]
    drawn = [arm.quality for arm in results.arms.values() if arm.quality]
    parts = [f"{len(results.seeds)} training seeds." if len(results.seeds) > 1 else "One training seed."]
    if maps:
        parts.append(f"Localization: {maps[0].images:,} held-out images, {maps[0].pairs:,} image-finding pairs.")
    if drawn:
        features = f", features of {drawn[0].features}" if drawn[0].features else ""
        parts.append(f"Quality: {drawn[0].images:,} generated images{features}.")
    if len(results.seeds) <= 1:
        parts.append("The intervals do not cover the choice of the training seed.")
    return " ".join(parts)

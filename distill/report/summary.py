"""Which model to take, and why: sentences from values and their intervals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from distill.evaluation.results import Results
from distill.report import tables
from distill.report.document import UNKNOWN, Cell, Table
from distill.report.tables import FID, FINDING_AUC, IMAGE_ADDS, KID, WORD_AUC, Metric

RULE = (
    "The rule: a model is ruled out if another model is better on one measure and worse on none. Among the models that "
    "are left, the first choice has the best mean rank over localization and quality. “Better” means that the 95 % interval "
    "of the paired difference excludes 0, or, without a paired difference, that the two intervals do not overlap. The "
    "intervals are not corrected for the number of comparisons. Models with copies of training images come last."
)
_COPIES = "There are copies of training images in {}: see Memorization."
_TONES = {"better": ("▲ ", "good"), "worse": ("▼ ", "bad"), "not separated": ("≈ ", "even"), "not measured": ("", "")}


@dataclass(frozen=True)
class Summary:
    """arm: the first choice, None where nothing was measured. others: the arms that the table `why` compares it
    with."""

    arm: str | None
    title: str
    reasons: Sequence[str]
    why: Sequence[Table] = ()
    others: Sequence[str] = ()


def compare(results: Results, arm: str, other: str, metric: Metric) -> str:
    """Whether `arm` is "better", "worse", "not separated" or "not measured" against `other`."""
    paired = results.difference(arm, other, metric.key)
    if paired and paired.ci:
        low, high = paired.ci
    else:
        ours, theirs = (results.arms[name].estimate(metric.key) for name in (arm, other))
        if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
            return "not measured"
        low, high = ours.low - theirs.high, ours.high - theirs.low
    return "not separated" if low <= 0 <= high else "better" if (low > 0) == (metric.direction > 0) else "worse"


def summarize(results: Results) -> Summary:
    """The first choice by `RULE`, and what the intervals do not tell."""
    arms, measures = results.arms, (WORD_AUC, IMAGE_ADDS, FID, FINDING_AUC)
    spent = [passes for arm in arms.values() if (passes := arm.cost.image_passes_with_teachers)]
    known = {m: [a for a in arms if arms[a].estimate(m.key).value is not None] for m in measures}
    place = IMAGE_ADDS if known[IMAGE_ADDS] and known[IMAGE_ADDS] == known[WORD_AUC] else WORD_AUC
    metrics = [m for m in (place, FID, FINDING_AUC) if known[m]]
    whole = [a for a in arms if metrics and all(a in known[m] for m in metrics)]
    if not whole:
        none = "No model has all measures that any has." if metrics else "Word AUC, FID and finding AUC are missing."
        copied, found = results.with_copies, dict.fromkeys(said for a in arms for said in faults(results, a))
        title = f"Do not publish {_and(copied)} yet" if copied else "No model can be recommended"
        return Summary(None, title, [none, *found])
    clean = [a for a in whole if a not in results.with_copies] or whole
    answers = {(a, b): [compare(results, a, b, m) for m in metrics] for a in clean for b in clean if a != b}
    beaten = {b for (_, b), found in answers.items() if "better" in found and "worse" not in found}
    left = [a for a in clean if a not in beaten] or clean
    first = min(left, key=lambda a: _rank(results, a, left, metrics))
    rivals = [a for a in left if a != first]
    tied = [a for a in rivals if not {"better", "worse"} & set(answers[first, a])]
    said = {
        f"The numbers do not separate {first} from {_and(tied)}; more seeds or images are needed.": tied,
        f"Ruled out, because another model beats it: {_and([a for a in clean if a not in left])}.": left != clean,
        _COPIES.format(_and([a for a in results.with_copies if a != first])): {*results.with_copies} - {first},
        f"Not compared, because a measure is missing: {_and([a for a in arms if a not in whole])}.": whole != [*arms],
        "There is no other fully measured model to compare it with.": len(whole) == 1,
        f"The maps of {_and(results.with_other_maps)} are of other layers or timesteps than those of the first model: "
        "by localization, these models differ in more than their training.": results.with_other_maps,
        "Localization was not measured: the choice is by quality alone.": place not in metrics,
        "Quality was not measured: the choice is by localization alone.": metrics == [place],
        "Compute differs between the trained models, see Cost and size.": spent and max(spent) > 1.1 * min(spent),
    }
    for a in (a for a in rivals if a not in tied):
        better, worse = (
            _and([m.name for m, found in zip(metrics, answers[a, first], strict=True) if found == answer]) or "nothing"
            for answer in ("better", "worse")
        )
        said[f"{a} is better than {first} in {better} and worse in {worse}: choose by what you need."] = True
    others = [a for a in results.compare_to if a != first] or [a for a in arms if a != first][:1]
    name = first + (" (not trained in this run)" if arms[first].cost.train_seconds is None else "")
    title = f"First choice: {name}. {len(rivals)} other model{'s are' if len(rivals) > 1 else ' is'} not ruled out"
    title = title if rivals else f"Take {name}" if len(arms) > 1 else f"Only {name} was measured"
    title = f"Do not publish {name} yet" if first in results.with_copies else title
    why = _why(results, first, others, [WORD_AUC, *metrics] if place is IMAGE_ADDS else metrics)
    told = [fault for a in (arms if len(arms) == 2 else [first]) for fault in faults(results, a)]
    reasons = dict.fromkeys([*(text for text, holds in said.items() if holds), *told])
    return Summary(first, title, [*reasons], [why], others)


def _differences(results: Results, wanted: Sequence[Metric]) -> dict[str, dict[Metric, Cell]]:
    """Pair of arms -> its differences on the same images and seeds, each over what it says."""
    cells: dict[str, dict[Metric, Cell]] = {}
    for arm, other in itertools.product(results.arms, repeat=2):
        found = (results.paired or {}).get(pair := f"{arm} - {other}", {})
        for m in (m for m in wanted if m.key in found):
            answer = compare(results, arm, other, m) if m.direction else ""
            tone = {"better": "good", "worse": "bad"}.get(answer, "")
            cells.setdefault(pair, {})[m] = Cell(tables.format_difference(found[m.key], m), answer, tone)
    return cells


def difference_table(results: Results, wanted: Sequence[Metric] = tables.MAIN) -> Table:
    """One row a pair of arms."""
    cells = _differences(results, wanted)
    shown = [m for m in wanted if any(m in own for own in cells.values())]
    rows = [[pair, *(own.get(m, UNKNOWN) for m in shown)] for pair, own in cells.items()]
    return Table(["", *(m.label for m in shown)], rows, "numbers", "paired differences")


def terminal_summary(results: Results) -> str:
    """The first choice, its reasons, and how each arm differs from each baseline, as lines of text."""
    found = summarize(results)
    lines = [found.title, *(f"- {reason}" for reason in found.reasons)]
    for pair, own in _differences(results, (WORD_AUC, IMAGE_ADDS, FID, FINDING_AUC)).items():
        said = ", ".join(f"{m.label} {cell.note} ({cell.text})" for m, cell in own.items())
        lines.append(f"{pair.replace(' - ', ' against ')}: {said}")
    return "\n".join(lines)


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _rank(results: Results, arm: str, among: Sequence[str], metrics: Sequence[Metric]) -> float:
    """The mean rank in localization plus that in quality; 0 is best on all."""
    ranks: dict[bool, list[int]] = {}
    for m in metrics:
        value = {a: m.direction * (results.arms[a].estimate(m.key).value or 0.0) for a in among}
        ranks.setdefault(m in (FID, FINDING_AUC), []).append(sum(v > value[arm] for v in value.values()))
    return sum(sum(side) / len(side) for side in ranks.values())


def _why(results: Results, first: str, others: Sequence[str], metrics: Sequence[Metric]) -> Table:
    rows: list[list[str | Cell]] = []
    for m in metrics:
        row: list[str | Cell] = [m.label, Cell(*tables.format_estimate(results.arms[first].estimate(m.key), m))]
        for other in others:
            answer, paired = compare(results, first, other, m), results.difference(first, other, m.key)
            theirs = " ".join(tables.format_estimate(results.arms[other].estimate(m.key), m))
            note = f"{theirs}; difference {tables.format_difference(paired, m)}" if paired else theirs
            row.append(Cell(_TONES[answer][0] + answer, note, _TONES[answer][1]))
        rows.append(row)
    return Table(["", first, *(f"against {other}" for other in others)], rows, name="first choice and baselines")


def faults(results: Results, arm: str) -> list[str]:
    """Where `arm` is worse than real images, and where its maps say no more than maps that do not look at the image."""
    below = [m.name for m in (FID, KID, FINDING_AUC) if results.is_worse_than_real(arm, m.key, m.direction)]
    found = [_COPIES.format(arm)] * (arm in results.with_copies)
    found += [f"The images of {arm} are worse than real ones in {_and(below)}."] if below else []
    word, adds = (results.arms[arm].estimate(m.key) for m in (WORD_AUC, IMAGE_ADDS))
    ours, better = word.value if word.low is None else word.low, []
    for name, prior in (getattr(results.arms[arm].localization, "priors", None) or {}).items():
        theirs = (prior.auc.value if prior.auc.high is None else prior.auc.high) if prior else None
        better += [name.replace("_", " ")] if ours is not None and theirs is not None and ours <= theirs else []
    if better:
        found.append(f"By word AUC, {arm} is not shown to be better than blind maps ({_and(better)}).")
    highest = {name: one.estimate(WORD_AUC.key).high for name, one in results.arms.items()}
    if under := [name for name, high in highest.items() if high is not None and high < 0.5]:
        found.append(f"The word AUC of {_and(under)} is below .5: the maps are higher outside findings than inside.")
    if (told := results.arms[arm].explanation) and told.is_told:
        found.append(f"A detector tells the images of {arm} from real ones ({told}).")
    if adds.value is not None and (adds.low is None or adds.low <= 0):
        found.append(f"The maps of {arm} are not shown to depend on the image.")
    return found


def sample(results: Results) -> str:
    """How many images, pairs and seeds the numbers rest on."""
    one, count = "One training seed a model, whose choice no interval covers.", results.seeds_an_arm
    parts = [one if count == 1 else f"{count} training seeds a model; the intervals are over seeds and images."]
    parts += ["Those of single findings, negations, utility and similarity are over seeds alone."] * (count > 1)
    if word := next((a.localization.word for a in results.arms.values() if a.localization), None):
        parts.append(f"Localization: {word.images:,} held-out images, {word.pairs:,} image-finding pairs.")
    if drawn := next((arm.quality for arm in results.arms.values() if arm.quality), None):
        parts.append(f"Quality: {drawn.images:,} generated images, features: {drawn.features_text}.")
    return " ".join(parts)

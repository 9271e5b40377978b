"""Do looks at validation images tell which weights are good on held-out images? Rank correlations within trainings.

The unit is the training: each has one Spearman correlation between its looks and what the same weights score on
held-out images. Their mean has a 95 % interval of Student's t over trainings, as in claims.py, cut off at -1 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from distill.evaluation.claims import LOWER_IS_BETTER, student_interval
from distill.evaluation.validation import SCORES
from distill.files import JsonObject

QUALITIES = ("word.image_adds", "word.auc", "quality.finding_auc", "quality.fid")
"""Metrics of held-out images that are compared with the looks."""


Looked = Mapping[int, Mapping[int, JsonObject]]
"""Training seed -> step -> row of validation_log.jsonl."""
Measured = Mapping[int, Mapping[int, Mapping[str, float | None]]]
"""Training seed -> step -> metric of held-out images -> value."""


@dataclass(frozen=True)
class Agreement:
    """How well a rule of `keep` ranks the weights of a training as a metric of held-out images does.

    per_seed: training seed -> Spearman's rank correlation; 1 if the looks rank them alike, the better first. interval:
    of the mean; None of a single training. weights: how many are ranked in each training.
    """

    rule: str
    metric: str
    per_seed: Mapping[int, float]
    mean: float
    interval: tuple[float, float] | None
    weights: int


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Spearman's: Pearson's correlation of the ranks, ties at their mean rank. None of fewer than three pairs, and
    where all values of a side are equal."""
    if len(a) < 3 or min(len(set(a)), len(set(b))) < 2:
        return None
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def agreements(looks: Looked, held_out: Measured) -> list[Agreement]:
    """Every rule with every metric that there is, over the steps that were both looked at and measured."""
    found = []
    for rule, score in SCORES.items():
        for metric in QUALITIES:
            sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
            per_seed: dict[int, float] = {}
            counts = []
            for seed in sorted(looks.keys() & held_out.keys()):
                pairs = [
                    (told, sign * value)
                    for step in sorted(looks[seed].keys() & held_out[seed].keys())
                    if (told := score(looks[seed][step])) is not None
                    and (value := held_out[seed][step].get(metric)) is not None
                ]
                correlation = rank_correlation(*zip(*pairs, strict=True)) if pairs else None
                if correlation is not None:
                    per_seed[seed] = correlation
                    counts.append(len(pairs))
            if per_seed:
                values = list(per_seed.values())
                ends = student_interval(values)
                interval = None if ends is None else (max(-1.0, ends[0]), min(1.0, ends[1]))
                found.append(Agreement(rule, metric, per_seed, float(np.mean(values)), interval, min(counts)))
    return found

"""Is an arm at least as good as its parents at equal cost? Paired over training seeds, with margins that are set
beforehand.

The unit is the training seed: each arm has one value of a metric a seed, and two arms are compared by the difference
within each seed. d = mean of the differences, s = their standard deviation, n = seeds; the interval is d +- t(n - 1) s
/ sqrt(n) (Student 1908). An arm is not worse than a parent if the one-sided 95 % bound of the difference is inside the
margin; it is not worse than several parents in several metrics if all bounds are (Berger 1982: no correction is
needed). The exact sign-flip test (Fisher 1935) assumes no normal distribution: under the null hypothesis each
difference, measured from the margin, is as likely to have the other sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy import stats

LOWER_IS_BETTER = ("quality.fid", "quality.kid")
"""Metrics of which less is better; of all others more is."""
IN_LOGARITHMS = ("quality.fid",)
"""Metrics whose differences are those of natural logarithms."""
MAX_EXACT = 16
"""Seeds up to which all 2^n sign flips are counted; of more, a sample of 2^16."""


@dataclass(frozen=True)
class Comparison:
    """Arm minus parent in one metric, at one budget.

    per_seed: differences by training seed. interval: two-sided, 95 %. bound: one-sided, 95 %, on the side of the
    margin. p_value: of the one-sided sign-flip test against a difference as bad as the margin.
    """

    arm: str
    parent: str
    budget: int
    metric: str
    per_seed: Mapping[int, float]
    difference: float
    interval: tuple[float, float] | None
    bound: float | None
    p_value: float
    margin: float

    @property
    def met(self) -> bool:
        """Whether the bound is inside the margin; not with a single seed, which has no bound."""
        if self.bound is None:
            return False
        return self.bound <= self.margin if self.metric in LOWER_IS_BETTER else self.bound >= self.margin


def differences(metric: str, arm: Mapping[int, float], parent: Mapping[int, float]) -> dict[int, float]:
    """Arm minus parent, of the seeds that both have."""
    found = {}
    for seed in sorted(arm.keys() & parent.keys()):
        ours, theirs = arm[seed], parent[seed]
        found[seed] = math.log(ours / theirs) if metric in IN_LOGARITHMS else ours - theirs
    return found


def compare(
    arm: str, parent: str, budget: int, metric: str, per_seed: Mapping[int, float], margin: float
) -> Comparison:
    """per_seed: see `differences`. margin: the difference that is just not worse, in the units of the differences."""
    values = list(per_seed.values())
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    bound = one_sided_bound([sign * v for v in values])
    return Comparison(
        arm, parent, budget, metric, dict(per_seed), float(np.mean(values)), student_interval(values),
        None if bound is None else sign * bound, sign_flip_p([sign * (v - margin) for v in values]), margin,
    )  # fmt: skip


def student_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Two-sided interval of the mean; None of a single value."""
    half = _half_width(values, (1 + level) / 2)
    mean = float(np.mean(values))
    return None if half is None else (mean - half, mean + half)


def one_sided_bound(values: Sequence[float], level: float = 0.95) -> float | None:
    """What the mean is above, with this confidence; None of a single value."""
    half = _half_width(values, level)
    return None if half is None else float(np.mean(values)) - half


def _half_width(values: Sequence[float], quantile: float) -> float | None:
    n = len(values)
    if n < 2:
        return None
    return float(stats.t.ppf(quantile, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def sign_flip_p(values: Sequence[float]) -> float:
    """Share of all 2^n sign flips whose mean is at least that of `values`: the exact one-sided p-value of a mean of 0.

    Of more than MAX_EXACT values, the share of 2^16 random flips, the values themselves counted as one (Phipson, Smyth
    2010).
    """
    array = np.asarray(values, dtype=np.float64)
    if len(array) <= MAX_EXACT:
        flips = np.array(list(product((1.0, -1.0), repeat=len(array))))
    else:
        flips = np.random.default_rng(0).choice((1.0, -1.0), size=(2**MAX_EXACT, len(array)))
        flips[0] = 1.0
    sums = flips @ array
    return float(np.mean(sums >= array.sum() - 1e-12 * np.abs(array).sum()))

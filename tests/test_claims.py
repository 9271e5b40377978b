"""Student's t and the sign-flip test against brute force, and the sides of margins."""

from __future__ import annotations

import math
import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from distill.evaluation.claims import (
    compare,
    differences,
    one_sided_bound,
    sign_flip_p,
    student_interval,
)

VALUES = st.lists(st.floats(-10, 10).map(lambda v: round(v, 3)), min_size=2, max_size=8)


@given(VALUES)
@settings(max_examples=50)
def test_the_interval_is_that_of_scipy(values):
    if len(set(values)) == 1:
        assert student_interval(values) == pytest.approx((values[0], values[0]))
        return
    expected = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert student_interval(values) == pytest.approx((expected.low, expected.high))
    one_sided = stats.ttest_1samp(values, 0.0, alternative="greater").confidence_interval(0.95)
    assert one_sided_bound(values) == pytest.approx(one_sided.low)


def test_a_single_seed_has_no_interval_and_meets_no_margin():
    one = compare("a", "b", 100, "word.auc", {0: 0.5}, -0.01)
    assert one.interval is None and one.bound is None and not one.met


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(1.0, 2.0, size=(2000, 4))
    inside = [low <= 1.0 <= high for low, high in (student_interval(row) for row in draws)]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.02)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=7))
@settings(max_examples=50)
def test_the_sign_flip_test_counts_all_flips(values):
    total, as_large = sum(values), 0
    for code in range(2 ** len(values)):
        flipped = sum(-v if code >> i & 1 else v for i, v in enumerate(values))
        as_large += flipped >= total
    assert sign_flip_p(values) == as_large / 2 ** len(values)


def test_five_positive_differences_are_the_least_that_resolve_5_percent():
    assert sign_flip_p([1.0] * 5) == 1 / 32 < 0.05 < sign_flip_p([1.0] * 4)


def test_of_many_values_a_sample_of_the_flips_is_counted():
    many = list(np.random.default_rng(1).normal(0.2, 1, 17))
    flips = np.array(list(product((1, -1), repeat=17)))
    assert sign_flip_p(many) == pytest.approx(np.mean(flips @ many >= sum(many) - 1e-12), abs=0.005)
    assert sign_flip_p([1.0] * 40) == 2.0**-16, "never 0"


@pytest.mark.parametrize(
    ("metric", "values", "margin", "met"),
    [
        ("word.auc", [0.000, 0.001, -0.001], -0.01, True),
        ("word.auc", [0.000, 0.030, -0.030], -0.01, False),  # the mean is inside, the bound is not
        ("word.auc", [-0.020, -0.021, -0.019], -0.01, False),
        ("quality.fid", [0.00, 0.01, -0.01], 0.05, True),
        ("quality.fid", [0.08, 0.09, 0.10], 0.05, False),
        ("quality.fid", [-0.50, -0.51, -0.49], 0.05, True),  # far better is not worse
    ],
)
def test_a_margin_is_met_by_the_bound_on_its_own_side(metric, values, margin, met):
    found = compare("a", "b", 100, metric, dict(enumerate(values)), margin)
    assert found.met is met
    worse = max if metric == "quality.fid" else min
    assert found.bound == worse(found.bound, found.difference)
    mean = float(np.mean(values))
    assert (found.p_value < 0.5) is (mean < margin if metric == "quality.fid" else mean > margin)


def test_a_bound_at_the_margin_meets_it():
    same = {0: -0.01, 1: -0.01}
    assert compare("a", "b", 1, "word.auc", same, -0.01).met
    assert not compare("a", "b", 1, "word.auc", same, -0.0099).met


def test_differences_are_paired_by_seed_and_of_logarithms_for_fid():
    seeds = list(range(5))
    random.Random(0).shuffle(seeds)
    arm, parent = {s: 10.0 + s for s in seeds}, {s: 20.0 + s for s in (0, 1, 2, 9)}
    assert differences("word.auc", arm, parent) == {0: -10.0, 1: -10.0, 2: -10.0}
    assert differences("quality.fid", arm, parent)[2] == pytest.approx(math.log(12 / 22))

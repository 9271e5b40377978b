"""The gate's rule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.methods.gate import GROUPS, TIMESTEPS, Taught, decide, localizing
from distill.methods.options import AttentionDistillationOptions

AUC = st.floats(0, 1)
EXACT = st.sampled_from((0.25, 0.5, 0.75, 1.0))
"""Whose sums have no rounding, so that equal means are equal."""
TABLE = st.fixed_dictionaries({name: st.fixed_dictionaries({g: EXACT for g in GROUPS}) for name in ("a", "b", "c")})


@given(TABLE, TABLE)
def test_what_is_as_good_as_the_reference_and_better_than_chance_passes(teacher: dict, reference: dict) -> None:
    table = {"teacher": teacher, "reference": reference}
    better = tuple(name for name in teacher if teacher[name]["words"] >= reference[name]["words"])

    def total(model: dict, group: str) -> float:
        return sum(model[name][group] for name in better)

    good = [g for g in GROUPS if total(teacher, g) >= total(reference, g) and total(teacher, g) > len(better) / 2]
    if not good:
        with pytest.raises(UserError, match="no token group" if better else "nothing to teach"):
            decide(table, list(teacher))
    else:
        assert decide(table, list(teacher)) == (better, tuple(good))


def test_only_the_layers_that_are_asked_for_are_looked_at() -> None:
    good, bad = dict.fromkeys(GROUPS, 0.8), dict.fromkeys(GROUPS, 0.6)
    table = {"teacher": {"a": good, "b": good}, "reference": {"a": bad, "b": bad}}
    assert decide(table, ["b"]) == (("b",), GROUPS)
    chance = {"a": {"words": 0.8, "eos": 0.4, "padding": 0.3}}
    assert decide({"teacher": chance, "reference": {"a": dict.fromkeys(GROUPS, 0.2)}}, ["a"])[1] == ("words",)


@given(st.lists(AUC, min_size=1, max_size=len(TIMESTEPS)))
def test_timesteps_around_the_best_keep_two_thirds_of_its_lead(auc: list[float]) -> None:
    if max(auc) <= 0.5:
        assert localizing(np.array(auc)) == (0, len(auc) - 1)
        return
    first, last = localizing(np.array(auc))
    needed = 0.5 + 2 / 3 * (max(auc) - 0.5)
    assert max(auc) in auc[first : last + 1]
    assert all(value >= needed - 1e-9 for value in auc[first : last + 1])
    assert all(auc[k] < needed + 1e-9 for k in (first - 1, last + 1) if 0 <= k < len(auc))


def test_the_gate_narrows_what_is_asked_for() -> None:
    taught = Taught(("a",), ("words",), (0, 699), {}, ())
    narrowed = taught.narrow(AttentionDistillationOptions(min_timestep=100))
    assert (narrowed.min_timestep, narrowed.max_timestep, narrowed.layers) == (100, 699, ("a",))
    with pytest.raises(UserError, match="timesteps 0 to 699, and .* ask for 800 to 999"):
        taught.narrow(AttentionDistillationOptions(min_timestep=800))

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
TABLE = st.fixed_dictionaries({name: st.fixed_dictionaries({g: AUC for g in GROUPS}) for name in ("a", "b", "c")})


@given(TABLE, TABLE)
def test_nothing_passes_that_localizes_worse_than_the_reference(teacher: dict, reference: dict) -> None:
    table = {"teacher": teacher, "reference": reference}
    better = [name for name in teacher if teacher[name]["words"] >= reference[name]["words"]]
    if not better:
        with pytest.raises(UserError, match="nothing to teach"):
            decide(table, list(teacher))
        return
    if not any(sum(teacher[n][g] for n in better) > len(better) / 2 for g in GROUPS):
        with pytest.raises(UserError):
            decide(table, list(teacher))
        return
    try:
        layers, groups = decide(table, list(teacher))
    except UserError:
        return  # better than chance, and worse than the reference
    assert list(layers) == better and groups
    for group in groups:
        gain = sum(teacher[name][group] - reference[name][group] for name in better)
        assert gain >= -1e-9


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

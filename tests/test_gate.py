"""The gate's rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.gate import GROUPS, decide

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
        taught = decide(table, list(teacher))
    except UserError:
        return  # better than chance, and worse than the reference
    assert list(taught.layers) == better and taught.groups
    for group in taught.groups:
        gain = sum(teacher[name][group] - reference[name][group] for name in better)
        assert gain >= -1e-9


def test_only_the_layers_that_are_asked_for_are_looked_at() -> None:
    good, bad = dict.fromkeys(GROUPS, 0.8), dict.fromkeys(GROUPS, 0.6)
    table = {"teacher": {"a": good, "b": good}, "reference": {"a": bad, "b": bad}}
    assert decide(table, ["b"]).layers == ("b",)
    assert decide(table, ["b"]).groups == GROUPS
    chance = {"a": {"words": 0.8, "eos": 0.4, "padding": 0.3}}
    assert decide({"teacher": chance, "reference": {"a": dict.fromkeys(GROUPS, 0.2)}}, ["a"]).groups == ("words",)

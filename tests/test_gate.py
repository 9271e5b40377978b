"""The gate's rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.errors import UserError
from distill.methods.gate import GROUPS, TIMESTEPS, Taught, choose_taught, decide, localizing
from distill.methods.options import AttentionDistillationOptions

SCORE = st.floats(-1, 1)
EXACT = st.sampled_from((-0.25, 0.0, 0.25, 0.5))
"""Whose sums have no rounding, so that equal means are equal."""
TABLE = st.fixed_dictionaries({name: st.fixed_dictionaries({g: EXACT for g in GROUPS}) for name in ("a", "b", "c")})


@given(TABLE, TABLE)
def test_what_is_as_good_as_the_reference_and_sees_the_image_passes(teacher: dict, reference: dict) -> None:
    table = {"teacher": teacher, "reference": reference}
    better = tuple(name for name in teacher if teacher[name]["words"] >= reference[name]["words"])

    def total(model: dict, group: str) -> float:
        return sum(model[name][group] for name in better)

    good = [g for g in GROUPS if total(teacher, g) >= total(reference, g) and total(teacher, g) > 0]
    if not good:
        with pytest.raises(UserError, match="of any token group" if better else "nothing to teach"):
            decide(table, list(teacher))
    else:
        assert decide(table, list(teacher)) == (better, tuple(good))


def test_only_the_layers_that_are_asked_for_are_looked_at() -> None:
    good, bad = dict.fromkeys(GROUPS, 0.8), dict.fromkeys(GROUPS, 0.6)
    table = {"teacher": {"a": good, "b": good}, "reference": {"a": bad, "b": bad}}
    assert decide(table, ["b"]) == (("b",), GROUPS)
    blind = {"a": {"words": 0.3, "eos": -0.1, "padding": 0.0}}
    assert decide({"teacher": blind, "reference": {"a": dict.fromkeys(GROUPS, -0.2)}}, ["a"])[1] == ("words",)


@given(st.lists(SCORE, min_size=1, max_size=len(TIMESTEPS)))
def test_timesteps_around_the_best_keep_two_thirds_of_its_score(scores: list[float]) -> None:
    if max(scores) <= 0:
        assert localizing(np.array(scores)) == (0, len(scores) - 1)
        return
    first, last = localizing(np.array(scores))
    needed = 2 / 3 * max(scores)
    assert max(scores) in scores[first : last + 1]
    assert all(value >= needed - 1e-9 for value in scores[first : last + 1])
    assert all(scores[k] < needed + 1e-9 for k in (first - 1, last + 1) if 0 <= k < len(scores))


@pytest.mark.parametrize("layers", [("b", "a"), ("b",)])
def test_the_gate_looks_at_the_timesteps_at_which_the_teacher_localizes(layers: tuple[str, ...]) -> None:
    """Two layers; the teacher localizes at timesteps 2 to 4 in `b` and never in `a`, the reference nowhere."""
    rng = np.random.default_rng(0)
    tables = {name: rng.uniform(-0.1, 0.0, (3, 2, len(TIMESTEPS))) for name in ("teacher", "reference")}
    tables["teacher"][:, 1, 2:5] = 0.4
    tables["teacher"][2, 1, 2:5] = -0.2
    looked = []

    def layer_scores(model: Any, images: int, timesteps: Sequence[int], label: str) -> tuple[Any, Sequence[str]]:
        looked.append((model, images, tuple(timesteps)))
        return tables[model], ("a", "b")

    teacher, reference = cast(Any, "teacher"), cast(Any, "reference")
    found = choose_taught(teacher, reference, layer_scores, images=7, layers=layers)
    assert looked == [("teacher", 7, TIMESTEPS), ("reference", 7, TIMESTEPS)]
    assert (found.timesteps, found.groups) == ((200, 499), ("words", "eos"))
    expected = {
        model: {name: {g: table[k, place, 2:5].mean() for k, g in enumerate(GROUPS)} for place, name in enumerate("ab")}
        for model, table in tables.items()
    }
    for model, by_layer in expected.items():
        assert found.image_adds[model] == {name: pytest.approx(by_layer[name]) for name in layers}
    assert found.layers == tuple(
        n for n in layers if expected["teacher"][n]["words"] >= expected["reference"][n]["words"]
    )
    places = ["ab".index(name) for name in layers]
    assert found.image_adds_of_timesteps == pytest.approx(tables["teacher"][0, places].mean(axis=0))


def test_each_model_is_read_by_its_own_names() -> None:
    """A teacher with more layers, in another order, and a reference that has the student's."""
    tables = {"teacher": (("x", "B", "y", "A"), (0.5, 0.9, 0.5, 0.6)), "reference": (("a", "b"), (0.7, 0.7))}

    def layer_scores(model: Any, *_: Any) -> tuple[Any, Sequence[str]]:
        names, values = tables[model]
        return np.tile(np.array(values)[None, :, None], (3, 1, len(TIMESTEPS))), names

    models = cast(Any, "teacher"), cast(Any, "reference")
    found = choose_taught(*models, layer_scores, images=7, layers=["a", "b"], in_teacher=str.upper)
    assert found.layers == ("b",)
    assert {name: found.image_adds["teacher"][name]["words"] for name in "ab"} == pytest.approx({"a": 0.6, "b": 0.9})


def test_the_gate_narrows_what_is_asked_for() -> None:
    taught = Taught(("a",), ("words",), (0, 699), {}, ())
    narrowed = taught.narrow(AttentionDistillationOptions(min_timestep=100))
    assert (narrowed.min_timestep, narrowed.max_timestep, narrowed.layers) == (100, 699, ("a",))
    with pytest.raises(UserError, match="timesteps 0 to 699, and .* ask for 800 to 999"):
        taught.narrow(AttentionDistillationOptions(min_timestep=800))


def test_the_gate_teaches_no_token_group_that_is_not_asked_for() -> None:
    """The default stands for all that pass, also where a configuration spells it out, as those of arms do."""
    taught = Taught(("a",), ("words", "eos"), (100, 699), {}, ())
    assert taught.narrow(AttentionDistillationOptions()).place_groups == ("words", "eos")
    both: list[tuple[tuple[Any, ...], tuple[str, ...]]] = [
        (("words",), ("words", "eos")),
        (("eos", "padding"), ("eos",)),
        (("padding", "words"), ("words",)),
    ]
    for asked, expected in both:
        options = AttentionDistillationOptions(place_groups=asked).model_copy(update={"teacher": "frozen"})
        assert taught.narrow(options).place_groups == expected
    with pytest.raises(UserError, match=r"teacher localizes words, eos, and method.place_groups asks for padding"):
        taught.narrow(AttentionDistillationOptions(place_groups=("padding",)))

"""Image-passes: what a method says that it costs is what its denoisers are passed, and teachers are counted once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel
from fitting import settings_of
from tiny import tiny_sd
from torch import nn
from training import EXAMPLES, batch_of, context_of, distilling, example, prepared, set_up

from distill.data.batch import Batch
from distill.draws import shared_generator
from distill.experiment.arms import Arm
from distill.experiment.cost import ForwardPasses, training_passes, with_teachers
from distill.experiment.run import Run
from distill.methods.base import Method
from distill.methods.options import TailPenaltyOptions


@contextmanager
def passed() -> Iterator[list[int]]:
    """Image-passes of all U-Nets, if every pass with a gradient gets its backward pass too."""
    found = [0]

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        if isinstance(module, UNet2DConditionModel):
            found[0] += len(args[0]) * (3 if torch.is_grad_enabled() else 1)

    handle = nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield found
    finally:
        handle.remove()


def cost_of_a_step(method: Method, batch: Batch, step: int = 1) -> int:
    with passed() as found:
        method.train()(batch, shared_generator(0, 0, 0, 1, step=step))["loss"].backward()
    return found[0]


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_method_of_any_kind_costs_what_it_says(name: str) -> None:
    method, rows = example(name)
    batch = Batch.stack([rows[i] for i in range(4)])
    assert [cost_of_a_step(method, batch, step) for step in (1, 2)] == [method.passes(step, 4) for step in (1, 2)]
    method.finish()


@pytest.mark.parametrize(("share", "passes"), [(1.0, 16), (0.5, 14), (0.01, 13)])
def test_a_teacher_costs_what_it_sees(share: float, passes: int) -> None:
    student = prepared(gradient_checkpointing=True)
    with distilling(student, prepared(lambda: tiny_sd(seed=1)), batch_share=share) as method:
        assert method.passes(1, 4) == passes
        assert cost_of_a_step(method, batch_of(student)) == passes, (
            "what is computed again inside backward is not counted"
        )


def test_a_training_costs_the_batches_of_all_processes() -> None:
    class Late(Method):
        def passes(self, step: int, images: int) -> int:
            return images * (3 + (step > 2))

    config = settings_of(max_steps=5, batch_size=2, gradient_accumulation_steps=3)
    method = Late(TailPenaltyOptions(), cast(Any, None))
    assert training_passes(method, config, 1) == 3 * 2 * (5 * 3 + 3)
    assert training_passes(method, config, 2) == 2 * training_passes(method, config, 1)


def test_set_up_costs_what_it_passes_through_models_that_it_was_given() -> None:
    student, other, before = prepared(), prepared(), ForwardPasses()
    assert before.watch(student) is student
    batch = batch_of(student)
    method = set_up(TailPenaltyOptions(), student, context_of(batches=lambda images: iter([batch, batch.first(1)])))
    assert before.stop() == 4 + 1
    cost_of_a_step(method, batch)
    assert before.images == 5, "stopped"
    set_up(TailPenaltyOptions(), other, context_of(batches=lambda images: iter([batch])))
    assert before.images == 5
    method.finish()


def run_of(folder: Path, needs: dict[str, tuple[str, ...]], costs: dict[str, Any]) -> tuple[Run, dict[str, Arm]]:
    for name, cost in costs.items():
        (folder / name).mkdir()
        (folder / name / "cost.json").write_text(json.dumps(cost))
    arms = {
        name: SimpleNamespace(
            folder=folder / name,
            needs=tuple(n for n in names if n in needs),
            training=SimpleNamespace(method=SimpleNamespace(references=names)),
        )
        for name, names in needs.items()
    }
    return cast(Run, SimpleNamespace(arms=arms)), cast(dict[str, Arm], arms)


def test_teachers_of_teachers_count_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = str(tmp_path / "outside")
    needs = {
        "a": (),
        "b": ("a", outside),
        "c": ("b", "a", "some/hub-id"),
        "old": (),
        "d": ("c", "old"),
        "e": (outside,),
    }
    costs: dict[str, Any] = {"a": {"image_passes": 100}, "b": {"image_passes": 40, "image_passes_with_teachers": 9999}}
    costs |= {"c": {"image_passes": 7}, "old": {"steps": 3}, "outside": {"image_passes_with_teachers": 1000}}
    run, arms = run_of(tmp_path, needs, costs)
    assert with_teachers(run, arms["a"], 100) == 100
    assert with_teachers(run, arms["c"], 7) == 7 + 40 + 100 + 1000
    assert with_teachers(run, arms["e"], 5) == 1005
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("b").mkdir()
    Path("b/cost.json").write_text(json.dumps({"image_passes_with_teachers": 5555}))
    assert with_teachers(run, arms["c"], 7) == 7 + 40 + 100 + 1000, "b is an arm, and not the folder of that name"
    assert with_teachers(run, arms["d"], 5) is None, "one is of an earlier version, which counted nothing"

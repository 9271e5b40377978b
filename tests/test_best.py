"""The weights of the best look are what is left: whatever is killed, damaged or made longer, and kept once on the
disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import Killed, LeastSquares, kill_at, log_of, same, state_of, train, without_time

from distill import checkpoints
from distill.errors import UserError

STEPS: dict[str, Any] = {"max_steps": 8, "validate_every_steps": 1}
SCORES = (0.1, 0.4, 0.3, 0.7, 0.7, 0.2, 0.6, 0.5)
"""Of the steps 1 to 8; step 4 is the best, and step 5 as good."""


def score(step: int) -> float:
    return SCORES[step - 1]


def of_step(step: int, folder: Path, **options: Any) -> list[torch.Tensor]:
    """Weights of a training that ends there."""
    objective = LeastSquares()
    train(objective, folder / f"alone-{step}", max_steps=step, **options)
    return state_of(objective)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state").iterdir())


@pytest.mark.parametrize("ema", [{}, {"ema_decay": 0.5}])
def test_the_weights_of_the_best_look_are_left_and_of_equal_ones_the_first(tmp_path: Path, ema: dict[str, Any]) -> None:
    objective = LeastSquares()
    result = train(objective, tmp_path, score=score, **STEPS, **ema)
    assert same(state_of(objective), of_step(4, tmp_path, **ema))
    assert result.best is not None and (result.best.step, result.best.score) == (4, 0.7) and result.steps == 8
    assert files(tmp_path) == ["best-00000004.safetensors", "step-00000008"]


@pytest.mark.parametrize("none", [None, math.nan, -math.inf])
def test_a_look_without_a_value_is_not_kept_and_without_any_the_last_weights_are_left(
    tmp_path: Path, none: float | None
) -> None:
    objective = LeastSquares()
    assert train(objective, tmp_path, score=lambda step: none, **STEPS).best is None
    assert same(state_of(objective), of_step(8, tmp_path))
    some = train(LeastSquares(), tmp_path / "some", score=lambda step: 0.5 if step == 3 else none, **STEPS)
    assert some.best is not None and some.best.step == 3


class WithState(LeastSquares):
    """An objective that counts its steps, and says so to a checkpoint."""

    count = 0

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        self.count += 1
        return super().forward(batch, generator)

    def state(self) -> dict[str, torch.Tensor]:
        return {"count": torch.tensor(self.count)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.count = int(state["count"])


def test_what_a_method_keeps_is_that_of_the_best_look_too(tmp_path: Path) -> None:
    objective = WithState()
    train(objective, tmp_path, score=score, **STEPS)
    assert objective.count == 4


def test_the_training_itself_does_not_change(tmp_path: Path) -> None:
    train(LeastSquares(), tmp_path / "a", score=score, **STEPS)
    train(LeastSquares(), tmp_path / "b", max_steps=8)
    assert without_time(log_of(tmp_path / "a")) == without_time(log_of(tmp_path / "b"))


def killed(folder: Path, step: int, during: str, **options: Any) -> None:
    """A training that is killed at a step, before or after its look was kept."""

    def dying(now: int) -> float:
        if now == step and during == "before":
            raise Killed
        return score(now)

    with pytest.raises(Killed):
        if during == "before":
            train(LeastSquares(), folder, score=dying, **STEPS, **options)
        else:
            after = {"sample_every_steps": 1}
            train(LeastSquares(), folder, on=kill_at(step), score=score, **STEPS, **after, **options)


@pytest.mark.parametrize("every", [3, None])
@pytest.mark.parametrize("during", ["before", "after"])
def test_a_training_that_is_killed_leaves_the_same(tmp_path: Path, every: int | None, during: str) -> None:
    expected = of_step(4, tmp_path)
    at_most = 1 if every is None else 3
    for step in (1, 4, 5, 7):
        folder, resumed = tmp_path / str(step), LeastSquares()
        killed(folder, step, during, checkpoint_every_steps=every)
        assert len(list((folder / "state").glob("best-*"))) <= at_most
        result = train(resumed, folder, score=score, checkpoint_every_steps=every, **STEPS)
        assert result.best is not None and result.best.step == 4
        assert same(state_of(resumed), expected)


def test_a_better_look_of_a_training_that_went_back_does_not_count(tmp_path: Path) -> None:
    """Killed after step 4, it goes on from step 3 on a device that gives other numbers, and step 4 is not the best
    now."""
    killed(tmp_path, 5, "after", checkpoint_every_steps=3)
    assert (tmp_path / "state" / "best-00000004.safetensors").exists()
    resumed = LeastSquares()
    result = train(
        resumed, tmp_path, score=lambda step: 0.0 if step > 3 else score(step), checkpoint_every_steps=3, **STEPS
    )
    assert result.best is not None and result.best.step == 2
    assert same(state_of(resumed), of_step(2, tmp_path))


def test_a_training_from_the_beginning_forgets_looks_of_one_before(tmp_path: Path) -> None:
    killed(tmp_path, 5, "after")
    result = train(LeastSquares(), tmp_path, score=lambda step: 0.01 * step, **STEPS)
    assert result.best is not None and result.best.step == 8


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_checkpoint_whose_best_look_is_damaged_is_not_used(
    tmp_path: Path, damage: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    killed(tmp_path, 7, "before", checkpoint_every_steps=2)
    damage(tmp_path / "state" / "best-00000004.safetensors")
    resumed, looked = LeastSquares(), list[int]()

    def seen(step: int) -> float:
        looked.append(step)
        return score(step)

    result = train(resumed, tmp_path, score=seen, checkpoint_every_steps=2, **STEPS)
    assert "step-00000006 is damaged and is not used: best-00000004.safetensors" in capsys.readouterr().out
    assert looked[0] == 4, "the checkpoint before names step 2, which is whole"
    assert result.best is not None and result.best.step == 4 and same(state_of(resumed), of_step(4, tmp_path))


def test_a_best_look_that_is_damaged_before_the_export_is_no_export(tmp_path: Path) -> None:
    def damaging(step: int) -> float:
        if step == 8:
            flip(tmp_path / "state" / "best-00000004.safetensors")
        return score(step)

    with pytest.raises(UserError, match=r"best-00000004.safetensors is not as it was written; the same command"):
        train(LeastSquares(), tmp_path, score=damaging, **STEPS)


@pytest.mark.parametrize("longer", [8, 10])
def test_a_longer_training_compares_new_looks_with_those_before(tmp_path: Path, longer: int) -> None:
    scores = (*SCORES, 0.9, 0.1)
    first = STEPS | {"max_steps": 6}
    train(LeastSquares(), tmp_path, score=score, **first)
    checkpoints.keep_only(tmp_path / "state", 6)
    assert files(tmp_path) == ["best-00000004.safetensors", "step-00000006"]
    objective = LeastSquares()
    result = train(objective, tmp_path, score=lambda step: scores[step - 1], **STEPS | {"max_steps": longer})
    best = 9 if longer == 10 else 4
    assert result.best is not None and result.best.step == best
    assert same(state_of(objective), of_step(best, tmp_path))
    checkpoints.keep_only(tmp_path / "state", longer)
    # The last checkpoint was written before the last look.
    assert files(tmp_path) == [f"best-{best:08d}.safetensors", f"step-{longer:08d}"]


def test_nothing_is_left_where_the_last_state_is_not_kept(tmp_path: Path) -> None:
    train(LeastSquares(), tmp_path, score=score, keep_last_state_gb=0.0, **STEPS)
    assert files(tmp_path) == ["best-00000004.safetensors"]
    checkpoints.keep_only(tmp_path / "state", 8)
    assert not (tmp_path / "state").exists()

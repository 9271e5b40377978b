"""Arms at equal cost: the steps that a budget of image-passes allows each, and the folders of several budgets.

A budget is given in optimizer steps of plain fine-tuning, which cost 3 image-passes an image: forward 1, backward 2. An
arm with a teacher gets fewer steps, because the teacher's passes and its training count (distill/experiment/cost.py).
So does one whose method measures models before its first step.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from accelerate import Accelerator

from distill.config import INTERVALS, TrainerConfig
from distill.errors import UserError
from distill.experiment.arms import Arm
from distill.experiment.cost import passes_in, training_passes
from distill.files import whole_folder
from distill.methods import method_of

PLAIN = 3
"""Image-passes of an image in a step of plain fine-tuning."""


def budget_folder(folder: Path, budget: int) -> Path:
    """Where the run folders of the seeds of this budget are."""
    return folder / f"budget-{budget}"


def spend(arms: Mapping[str, Arm], budget: int, processes: int) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms with the steps that the budget allows; and those that it does not allow a single step, with the reason.

    arms: those with `fixed_steps` keep them. Raises UserError for a teacher that has none.
    """
    found: dict[str, Arm] = {}
    left_out: dict[str, str] = {}
    for name, arm in arms.items():
        if arm.fixed_steps:
            found[name] = arm
            continue
        needed = _needed(arms, arm)
        if free := [other for other in needed if not arms[other].fixed_steps]:
            raise UserError(
                f"arms.{name}: under budgets, {free[0]}, which it is taught by, needs a length of its own: add an arm that is "
                f"like {free[0]} with max_steps, and let {name} be taught by it; its training counts as a part of the cost"
            )
        before = sum(passes_of(arms[other], processes) for other in needed) + _setup_passes(arm, processes)
        before += sum(_trained_before([arm, *(arms[other] for other in needed)], arms))
        allowed = budget * PLAIN * _images(arm, processes)
        steps = _steps_within(arm, allowed - before, processes)
        if steps < 1:
            left_out[name] = f"its teachers and its set-up cost {before:,} image-passes, and the budget is {allowed:,}"
        else:
            found[name] = replace(arm, trainer=of_length(arm.trainer, steps))
    if left_out and all(arm.fixed_steps for arm in found.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"budgets: {budget} allows no arm a single step ({reasons}); leave it out")
    return {name: arm for name, arm in found.items() if not set(arm.needs) & left_out.keys()}, left_out


def of_length(trainer: TrainerConfig, steps: int) -> TrainerConfig:
    """The options of a training of so many steps, with intervals of at most that."""
    every = {name: getattr(trainer, name) for name in INTERVALS}
    shorter = {name: min(interval, steps) for name, interval in every.items() if interval is not None}
    return trainer.model_copy(update={"max_steps": steps} | shorter)


def passes_of(arm: Arm, processes: int) -> int:
    """Image-passes of an arm's steps and, at most, of its set-up, without its teachers' training."""
    method = method_of(arm.training.method, arm.training.denoising)
    return training_passes(method, arm.trainer, processes) + _setup_passes(arm, processes)


def _setup_passes(arm: Arm, processes: int) -> int:
    method = method_of(arm.training.method, arm.training.denoising)
    return method.setup_passes(arm.trainer.batch_size, processes)


def inherit(accelerator: Accelerator, shorter: Path, arm: Arm) -> None:
    """Give an arm that has not begun what it left at a shorter budget, so that its training goes on from there.

    shorter: run folder of the same seed. An arm of the same steps takes its weights and results too.
    """
    source = shorter / arm.name

    def left(folder: str, names: list[str]) -> set[str]:
        return set(names) - set(_OF_THE_WAY) if Path(folder) == source and not arm.fixed_steps else set()

    if accelerator.is_main_process and not arm.folder.exists() and (source / "cost.json").is_file():
        with whole_folder(arm.folder) as partial:
            shutil.copytree(source, partial, ignore=left, dirs_exist_ok=True)
    accelerator.wait_for_everyone()


_OF_THE_WAY = ("state", "train_log.jsonl", "validation_log.jsonl", "gate.json", "gate_looks.json", "progress")
"""What a training that goes on needs of one that ended. All else is made anew."""


def _needed(arms: Mapping[str, Arm], arm: Arm) -> list[str]:
    """Names of all arms that must be trained before this one."""
    found: list[str] = []
    waiting = list(arm.needs)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.append(name)
            waiting += arms[name].needs
    return found


def _trained_before(needed: Sequence[Arm], arms: Mapping[str, Arm]) -> list[int]:
    """Image-passes of the run folders that teach some arms, their own teachers included. Other models cost nothing.

    Raises UserError for a folder that does not say what it cost.
    """
    found: dict[Path, int] = {}
    for one in needed:
        for folder in (Path(name) for name in one.training.method.references if name not in arms):
            if (folder / "cost.json").is_file():
                passes = passes_in(folder, "image_passes_with_teachers")
                if passes is None:
                    raise UserError(
                        f"arms.{one.name}: under budgets its teacher's training counts, and {folder / 'cost.json'} does "
                        "not say image_passes_with_teachers; train it again, or name an arm"
                    )
                found[folder.resolve()] = passes
    return list(found.values())


def _images(arm: Arm, processes: int) -> int:
    """Images of an optimizer step."""
    return arm.trainer.batch_size * arm.trainer.gradient_accumulation_steps * processes


def _steps_within(arm: Arm, allowed: int, processes: int) -> int:
    """The most steps whose image-passes are at most `allowed`."""
    method, spent = method_of(arm.training.method, arm.training.denoising), 0
    batches = processes * arm.trainer.gradient_accumulation_steps
    for step in count(1):
        spent += batches * method.passes(step, arm.trainer.batch_size)  # each batch rounds what it teaches
        if spent > allowed:
            return step - 1
    raise AssertionError("every step costs")

"""Whether trained arms can go on to the length that is asked for: told before a run folder is written to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from distill import checkpoints
from distill.errors import UserError, raise_all
from distill.experiment.arms import Arm
from distill.files import read_json
from distill.trainer import schedule_fault


def check_lengths(arms: Mapping[str, Arm], folder: Path) -> None:
    """Raise UserError with every arm that cannot be trained to its max_steps from what the run folder holds of it."""
    faults = []
    for arm in arms.values():
        state = folder / arm.name / "state"
        steps, planned = _trained_steps(arm), checkpoints.planned_steps(state)
        fault = length_fault(arms, arm, steps, state) if steps is not None else None
        if fault is None and planned is not None and steps != arm.trainer.max_steps:
            fault = schedule_fault(arm.trainer, planned, state)
        faults += [f"{arm.name}: {fault}"] if fault else []
    raise_all("arms that cannot go on", faults)


def steps_faults(arm: Arm) -> list[str]:
    """Options that count steps, and never take effect in so short a training."""
    method, steps = arm.training.method, arm.trainer.max_steps
    latest = {
        "trainer.warmup_steps": (arm.trainer.warmup_steps, steps),
        "method.begin_after_steps": (getattr(method, "begin_after_steps", None), steps - 1),
        "method.release_after_steps": (getattr(method, "release_after_steps", None), steps - 1),
        "text_encoder_steps": (arm.training.text_encoder_steps, steps),
    }
    return [
        f"{name} is {value}, and it trains for {steps} steps, so that this never ends or begins; at most {most} is right"
        for name, (value, most) in latest.items()
        if value is not None and value > most
    ]


def length_fault(arms: Mapping[str, Arm], arm: Arm, steps: int, state: Path) -> str | None:
    """Why an arm that was trained for `steps` cannot be trained to its max_steps; None where it can. state: the folder
    of its checkpoints."""
    wanted = arm.trainer.max_steps
    option = f"arms.{arm.name}.max_steps" if arm.fixed_steps else "trainer.max_steps"
    again = (
        f"give {option} {steps}, or delete {arm.folder} to train {wanted} steps from the beginning (with budgets, "
        "delete it or choose another --output_dir)"
    )
    if wanted < steps:
        return f"trained for {steps} steps, and {option} is {wanted}; {again}"
    # A later one where a training that went on was killed.
    if wanted > steps and not any(step >= steps for step in checkpoints.steps_in(state)):
        return (
            f"trained for {steps} steps, and {option} is {wanted}. Its last state was not kept "
            f"(trainer.keep_last_state_gb), so it cannot go on: {again}"
        )
    taught = [other for other in arms.values() if arm.name in other.needs and (other.folder / "cost.json").exists()]
    if wanted > steps and taught:
        return (
            f"it would be trained further, and {taught[0].name} was trained with it as it was; delete "
            f"{taught[0].folder} to train that again afterwards"
        )
    return None


def has_gone_on(arm: Arm, folder: Path) -> bool:
    """Whether a launch has trained an arm beyond what its last training ended with, or has only begun it. folder: of
    the run."""
    steps = _trained_steps(arm)
    if steps is None or steps == arm.trainer.max_steps:
        return True
    return any(step > steps for step in checkpoints.steps_in(folder / arm.name / "state"))


def _trained_steps(arm: Arm) -> int | None:
    """Steps of a finished training; None where there is none, or its cost.json cannot be read."""
    try:
        return int(read_json(arm.folder / "cost.json")["steps"])
    except (OSError, UserError, KeyError, TypeError, ValueError):
        return None

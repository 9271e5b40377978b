"""Arms: the ways to train the base that a run compares, from the mapping in its configuration."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from distill.config import FullEvaluation, Keep, TrainerConfig
from distill.errors import raise_all
from distill.files import JsonObject
from distill.methods.training import ArmConfig, Training

BASE = "base"
"""Name of the untrained base among the arms."""


@dataclass(frozen=True)
class Arm:
    """One way to train the base, with all its options.

    folder: where its export goes. needs: arms to train before it. fixed_steps: it has max_steps of its own. keep: which
    weights are exported, see `FinetuningRunConfig`.
    """

    name: str
    folder: Path
    training: Training
    trainer: TrainerConfig
    evaluation: FullEvaluation
    needs: tuple[str, ...] = ()
    fixed_steps: bool = False
    keep: Keep = "last"


def can_be_arm(name: str) -> bool:
    """Whether a run folder can hold a folder of this name beside what it holds anyway."""
    files = Path(name).suffix in (".json", ".yaml", ".html", ".md")
    reserved = name in ("real", "whole") or name.startswith("seed-")
    return bool(re.fullmatch(r"\w[\w.-]*", name)) and not files and not reserved


def arms_of(
    configs: Mapping[str, ArmConfig], trainer: TrainerConfig, evaluation: FullEvaluation, folder: Path
) -> dict[str, Arm]:
    """The arms of a configuration, each in `folder`/<name>. Raises UserError with the faults of all arms."""
    faults, found = [], {}
    if not configs:
        faults.append("arms is empty; name at least one, as recipes/configs/phantom/tradeoff.yaml does")
    for name in configs:
        if name == BASE or not can_be_arm(name):
            faults.append(f"arms.{name}: another name is needed, of letters, digits, '_', '-' and '.', that no other entry "
                          "of a run folder has")  # fmt: skip
            continue
        try:
            config = resolved(configs, name)
            own_trainer = with_overrides(trainer, config)
        except (ValidationError, ValueError) as error:
            faults += [f"arms.{name}: {message}" for message in _messages(error)]
            continue
        references = config.method.references
        for reference in references:
            if fault := _reference_fault(reference, configs, name):
                faults.append(f"arms.{name}: {fault}")
        found[name] = Arm(
            name,
            folder / name,
            Training.model_validate(config.model_dump(include=set(Training.model_fields))),
            own_trainer,
            evaluation,
            tuple(reference for reference in references if reference in configs),
            configs[name].max_steps is not None,  # not that of an arm that it is like
        )
    raise_all("arms that cannot be trained", faults)
    raise_all("arms that wait for each other", _cycles(found))
    return found


def with_overrides(trainer: TrainerConfig, arm: ArmConfig) -> TrainerConfig:
    """The trainer's options with the arm's own in their place."""
    names = ("learning_rate", "text_encoder_learning_rate", "max_steps")
    own = {name: getattr(arm, name) for name in names if getattr(arm, name) is not None}
    return TrainerConfig.model_validate(trainer.model_dump() | own)


def resolved(configs: Mapping[str, ArmConfig], name: str, seen: tuple[str, ...] = ()) -> ArmConfig:
    """The arm with the options of the arm that it is like. Raises ValueError, also for arms that are like each
    other."""
    config = configs[name]
    if config.like is None:
        return config
    if config.like not in configs:
        close = difflib.get_close_matches(config.like, configs, n=1)
        raise ValueError(f"like: there is no arm {config.like!r}{f'; did you mean {close[0]!r}?' if close else ''}")
    if config.like in (*seen, name):
        raise ValueError(f"like: {' and '.join((*seen, name))} are like each other")
    parent = resolved(configs, config.like, (*seen, name)).model_dump(mode="json", exclude_unset=True, exclude={"like"})
    own = config.model_dump(mode="json", exclude_unset=True, exclude={"like"})
    for group in ("method", "lora", "denoising"):
        theirs, ours = parent.get(group), own.get(group)
        if theirs and ours and ours.get("kind", theirs.get("kind")) == theirs.get("kind"):
            own[group] = theirs | ours
    return ArmConfig.model_validate_json(json.dumps(parent | own), strict=True)


def _reference_fault(reference: str, configs: Mapping[str, ArmConfig], name: str) -> str | None:
    """Why a method's reference can be neither an arm nor a model."""
    if reference == name:
        return f"it refers to itself as {reference!r}"
    if reference in configs or reference == BASE or "/" in reference or Path(reference).exists():
        return None
    close = difflib.get_close_matches(reference, [*configs, BASE], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; the arms are {', '.join(configs)}"
    return f"method: {reference!r} is no arm, no folder, and no hub id{hint}"


def _messages(error: Exception) -> list[str]:
    if isinstance(error, ValidationError):
        said = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        return [f"{place}: {message}".lstrip(": ") for place, message in said]
    return [str(error)]


def _cycles(arms: Mapping[str, Arm]) -> list[str]:
    done: set[str] = set()
    while ready := [name for name, arm in arms.items() if name not in done and set(arm.needs) <= done]:
        done.update(ready)
    waiting = [name for name in arms if name not in done]
    return [f"{name} needs {', '.join(arms[name].needs)}" for name in waiting]


def settings_of_run(config: BaseModel) -> JsonObject:
    """All options of a run, as nested dictionaries; an arm has those that it takes from the one that it is like."""
    found: JsonObject = config.model_dump(mode="json")
    arms: Mapping[str, ArmConfig] = getattr(config, "arms", {})
    for name in arms:
        found["arms"][name] = resolved(arms, name).model_dump(mode="json") | {"like": arms[name].like}
    return found


def settings_of(config: Any, arm: Arm) -> JsonObject:
    """All options that decide how this arm was trained and evaluated, as nested dictionaries."""
    shared = config.model_dump(mode="json", exclude={"arms", "compare_to", "seeds", *Training.model_fields})
    returned: JsonObject = shared | {
        "trainer": arm.trainer.model_dump(mode="json"),
        "evaluation": arm.evaluation.model_dump(mode="json"),
        **_training_settings(arm.training),
    }
    return returned


def _training_settings(training: Training) -> JsonObject:
    found = training.model_dump(mode="json")
    if "lora" not in (training.denoiser, training.text_encoder):
        del found["lora"]
    return found

"""A run of one trained model beside its base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.experiment.arms import Arm
from distill.experiment.folder import held
from distill.experiment.results import evaluate_arm, finish
from distill.experiment.run import open_run
from distill.experiment.train import dry_run, train_arm
from distill.methods.training import Training


def train_one(config: Any, *, compared_with: Mapping[str, Path] | None = None) -> None:
    """Train one model; evaluate the base, the run folders of `compared_with`, and the model; write the report.

    config: a FinetuningRunConfig that is a Training too.
    """
    folder, others = Path(config.output_dir), dict(compared_with or {})
    training = Training.model_validate(config.model_dump(include=set(Training.model_fields)))
    arm = Arm("model", folder, training, config.trainer, config.evaluation.full(), keep=config.keep)
    with held(folder, write=not config.dry_run):
        run = open_run(config, {"model": arm}, compare_to=("base", *others))
        if config.dry_run:
            return dry_run(run)
        cost = train_arm(run, arm)
        results = {"base": evaluate_arm(run, "base", None)}
        results |= {name: evaluate_arm(run, name, path) for name, path in others.items()}
        results["model"] = evaluate_arm(run, "model", folder, cost)
        finish(run, results, f"load it in diffusers as {folder / 'README.md'} shows")

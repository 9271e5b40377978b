"""Fine-tune a text-to-image model on captioned images; export it, evaluate it, report it.

    accelerate launch recipes/finetune.py --config recipes/configs/phantom/finetune.yaml

The loss is `DenoisingObjective` in distill/objectives.py; the loop is `fit` in distill/trainer.py.
"""

from __future__ import annotations

from pathlib import Path

from distill.arms import Arm
from distill.cli import main
from distill.config import FinetuneConfig
from distill.runs import dry_run, evaluate_arm, finish, open_run, train_arm


def finetune(config: FinetuneConfig) -> None:
    trainer = config.trainer
    arm = Arm(
        name="model",
        folder=Path(config.output_dir),
        method=config.method,
        text_encoder=config.text_encoder,
        learning_rate=trainer.learning_rate,
        text_encoder_learning_rate=trainer.text_encoder_learning_rate or trainer.learning_rate,
        lock_keys=config.lock_keys,
    )
    run = open_run(config, arms=[arm])
    if config.dry_run:
        return dry_run(run, [arm])
    cost = train_arm(run, arm)
    results = {"base": evaluate_arm(run, "base", None), "model": evaluate_arm(run, "model", arm.folder, cost, arm)}
    finish(run, results, next_command=f"load it in diffusers as {arm.folder / 'README.md'} shows")


if __name__ == "__main__":
    main(finetune, FinetuneConfig)

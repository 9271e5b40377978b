"""Fine-tune with the text encoder trained, while the cross-attention is held to a frozen-encoder teacher's.

    accelerate launch recipes/distill_attention.py --config recipes/configs/phantom/distill_attention.yaml \\
        --distillation.teacher checkpoints/finetune

The loss is `AttentionDistillationObjective` in distill/objectives.py; the loop is `fit` in distill/trainer.py.
"""

from __future__ import annotations

from pathlib import Path

from distill.arms import Arm
from distill.cli import main
from distill.config import DistillAttentionConfig
from distill.errors import UserError
from distill.runs import dry_run, evaluate_arm, finish, open_run, train_arm


def distill_attention(config: DistillAttentionConfig) -> None:
    trainer, teacher = config.trainer, config.distillation.teacher
    if teacher is None:
        raise UserError("distillation.teacher is missing: a run folder of finetune.py, a pipeline folder or a hub id")
    arm = Arm(
        name="model",
        folder=Path(config.output_dir),
        method=config.method,
        text_encoder=config.text_encoder,
        learning_rate=trainer.learning_rate,
        text_encoder_learning_rate=trainer.text_encoder_learning_rate or trainer.learning_rate,
        distillation=config.distillation,
    )
    run = open_run(config, arms=[arm])
    if config.dry_run:
        return dry_run(run, [arm])
    cost = train_arm(run, arm)
    results = {"base": evaluate_arm(run, "base", None)}
    if Path(teacher).is_dir() and not (Path(teacher) / "model_index.json").exists():
        results["teacher"] = evaluate_arm(run, "teacher", Path(teacher))
    results["model"] = evaluate_arm(run, "model", arm.folder, cost, arm)
    finish(run, results, next_command=f"load it in diffusers as {arm.folder / 'README.md'} shows")


if __name__ == "__main__":
    main(distill_attention, DistillAttentionConfig)

"""Draw in a few steps and without guidance: consistency distillation, with the attention held to the teacher's.

    accelerate launch recipes/distill_steps.py --config recipes/configs/phantom/distill_steps.yaml --run checkpoints/finetune

The loss is `ConsistencyObjective` in distill/objectives.py; the loop is `fit` in distill/trainer.py. With method lora the
result is an adapter as LCM-LoRA's, for stock diffusers with LCMScheduler.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.arms import Arm
from distill.cli import main
from distill.config import DistillStepsConfig
from distill.derive import derived_base
from distill.runs import dry_run, evaluate_arm, finish, open_run, train_arm

WHOLE = "whole_base"


def distill_steps(config: DistillStepsConfig) -> None:
    hurried = f"teacher_{config.student_steps}_steps"
    few = replace(config.evaluation, num_inference_steps=config.student_steps)
    arm = Arm(
        name="model",
        folder=Path(config.output_dir),
        method=config.method,
        text_encoder="frozen",
        learning_rate=config.trainer.learning_rate,
        text_encoder_learning_rate=config.trainer.learning_rate,
        distillation=replace(config.distillation, teacher=config.run or config.base.name),
        consistency=config.consistency,
        evaluation=replace(few, scheduler="lcm", guidance_scale=1.0),
    )
    with derived_base(config, arm, WHOLE) if config.run else nullcontext(config.base) as base:
        run = open_run(config, arms=[arm], base=base)
        if config.dry_run:
            return dry_run(run, [arm])
        cost = train_arm(run, arm)
        results: dict[str, Any] = {
            "teacher": evaluate_arm(run, "teacher", None),
            hurried: evaluate_arm(run, hurried, None, evaluation=few),
            "model": evaluate_arm(run, "model", arm.folder, cost, arm),
        }
        finish(run, results, next_command=f"load it in diffusers as {arm.folder / 'README.md'} shows")


if __name__ == "__main__":
    main(distill_steps, DistillStepsConfig)

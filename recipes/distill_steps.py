"""Draw in a few steps and without guidance: consistency distillation, with the attention held to the teacher's.

    accelerate launch recipes/distill_steps.py --config recipes/configs/phantom/distill_steps.yaml --run checkpoints/finetune

The loss is in distill/methods/consistency.py; the loop is `fit` in distill/trainer.py. With denoiser lora the result is
an adapter for stock diffusers with LCMScheduler, as LCM-LoRA is.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from distill.cli import main
from distill.config import DenoisingConfig, LoraConfig, TrainingRunConfig
from distill.configuration import renamed as old
from distill.methods.options import ConsistencyOptions
from distill.settings import HARMLESS, Text

if TYPE_CHECKING:
    from distill.files import JsonObject

WHOLE = "whole"


class DistillStepsConfig(TrainingRunConfig):
    """Train a student that draws in a few steps and without guidance, for stock LCMScheduler.

    accelerate launch recipes/distill_steps.py --config recipes/configs/phantom/distill_steps.yaml --run checkpoints/finetune
    """

    common: ClassVar[tuple[str, ...]] = (
        "base.name", "run", "data.kind", "data.root", "denoiser", "student_steps", "trainer.max_steps", "output_dir",
    )  # fmt: skip
    renamed: ClassVar[dict[str, str]] = old.DISTILL_STEPS
    run: Text | None = None
    """The teacher, and what the student starts from: a run folder on the base. None takes the base itself."""
    denoiser: Literal["lora", "full"] = "lora"
    """How the denoiser is trained; the text encoder stays the teacher's."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters, with denoiser lora."""
    denoising: DenoisingConfig = DenoisingConfig(caption_dropout=0.0)
    """The text that the student is conditioned on."""
    method: ConsistencyOptions = ConsistencyOptions()
    """Consistency distillation."""
    student_steps: Annotated[int, Field(ge=1, le=50), HARMLESS] = 4
    """Denoising steps of the student's images; the teacher's are evaluation.num_inference_steps."""
    output_dir: Text = "checkpoints/distill_steps"
    """Run folder. With a run, whole_base in it is the teacher as one pipeline, which the run folder is loaded on."""

    @model_validator(mode="after")
    def _check_lora(self) -> DistillStepsConfig:
        if self.denoiser != "lora" and self.lora != LoraConfig():
            raise ValueError("lora options are set, and denoiser is full; set denoiser to lora, or leave them out")
        if self.lora.text_encoder_targets:
            raise ValueError("lora.text_encoder_targets is set, and the text encoder is not trained; leave it out")
        return self


def distill_steps(config: DistillStepsConfig) -> None:
    from distill.errors import UserError
    from distill.experiment.arms import Arm
    from distill.experiment.derive import derived_base
    from distill.experiment.folder import held
    from distill.experiment.results import evaluate_arm, finish
    from distill.experiment.run import open_run
    from distill.experiment.train import dry_run, train_arm
    from distill.methods.training import Training
    from distill.models import load_model
    from distill.models.stock import WHOLE_BASE

    if config.method.teacher != WHOLE:
        raise UserError("distill_steps.py: the teacher is the whole model, base and run; leave method.teacher out")
    folder, hurried = Path(config.output_dir), f"teacher_{config.student_steps}_steps"
    few = config.evaluation.full(num_inference_steps=config.student_steps)
    drawn = config.evaluation.full(num_inference_steps=config.student_steps, scheduler="lcm", guidance_scale=1.0)
    training = Training(denoiser=config.denoiser, method=config.method, lora=config.lora, denoising=config.denoising)
    arm = Arm("model", folder, training, config.trainer, drawn)
    whole = derived_base(config, config.run, WHOLE_BASE) if config.run else nullcontext(config.base)
    with held(folder, write=not config.dry_run), whole as base:
        references = {WHOLE: lambda: load_model(config.base, config.run)}
        run = open_run(config, {"model": arm}, base=base, references=references, compare_to=("teacher", hurried))
        if config.dry_run:
            return dry_run(run)
        cost = train_arm(run, arm)
        results: JsonObject = {
            "teacher": evaluate_arm(run, "teacher", None),
            hurried: evaluate_arm(run, hurried, None, evaluation=few),
            "model": evaluate_arm(run, "model", folder, cost),
        }
        finish(run, results, f"load it in diffusers as {folder / 'README.md'} shows")


if __name__ == "__main__":
    main(distill_steps, DistillStepsConfig)

"""Attention held to a teacher that is trained beside the student: the same model with a frozen text encoder.

L = L_denoising(student) + the attention terms of attention_distillation.py + L_denoising(teacher),
on the same noisy latents and timesteps. The teacher starts where the student starts, and its maps carry no gradient. Its own
training pass gives the maps, so that an image costs two training passes. It is not exported.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from distill.data.batch import Batch
from distill.methods.attention_distillation import AttentionDistillation
from distill.methods.base import Context, ParameterGroups, Terms
from distill.methods.options import LockstepOptions

if TYPE_CHECKING:
    from distill.methods.training import Training
    from distill.models import Model


class Lockstep(AttentionDistillation):
    """Fine-tune, and train a teacher with a frozen text encoder on the same batches."""

    options: LockstepOptions  # type: ignore[assignment]

    def faults(self, student: Model, training: Training) -> list[str]:
        from distill.attention import attention_layers

        attention_layers(student.denoiser, self.options.layers)
        faults = []
        if training.text_encoder == "frozen":
            faults.append("method lockstep has a teacher with a frozen text encoder; set text_encoder to full or lora")
        if training.denoiser == "frozen":
            faults.append("method lockstep trains the teacher's denoiser too; set denoiser to full or lora")
        return faults

    def setup(self, student: Model, context: Context) -> None:
        super(AttentionDistillation, self).setup(student, context)
        self.match = self.options
        encoders = [copy.deepcopy(encoder).requires_grad_(False).eval() for encoder in student.text_encoders]
        teacher = replace(
            student,
            denoiser=copy.deepcopy(student.denoiser),
            text_encoders=[encoder.to(context.frozen_dtype) for encoder in encoders],
        )
        self.teacher_denoiser = teacher.denoiser  # a part of the module: it trains, and checkpoints hold it
        self.compare_with(teacher)

    def parameter_groups(
        self, learning_rate: float, text_encoder_learning_rate: float, text_encoder_steps: int | None = None
    ) -> ParameterGroups:
        own = [p for p in self.teacher_denoiser.parameters() if p.requires_grad]
        groups = super().parameter_groups(learning_rate, text_encoder_learning_rate, text_encoder_steps)
        return [*groups, {"params": own, "lr": learning_rate}]

    def passes(self, step: int, images: int) -> int:
        return 2 * 3 * images

    def forward(self, batch: Batch, generator: torch.Generator) -> Terms:
        x = self.noised(batch, generator)
        self._student_maps.start()
        denoising = self.denoising_loss(self.predict_student(x), x)
        mine = self._student_maps.take()
        with torch.no_grad():
            text = self.embeddings(self.teacher, self.teacher.text_encoders, x)
        self._teacher_maps.start()
        teachers_own = self.denoising_loss(self.predict(self.teacher, (), replace(x, text=text)), x)
        theirs = {name: maps.detach() for name, maps in self._teacher_maps.take().items()}
        terms = self.attention_terms(mine, theirs, x)
        terms |= {"denoising": denoising, "teacher_denoising": teachers_own}
        return terms | {"loss": terms["loss"] + denoising + teachers_own}

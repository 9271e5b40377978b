"""Few denoising steps: latent consistency distillation, with the attention held to the teacher's.

L = mean sqrt(|f(z_t) - f(z'_s)|^2 + c^2) - c + the attention terms of attention_distillation.py, where f(z_t) =
c_skip(t) z_t + c_out(t) x0(z_t), z'_s is one DDIM step of the teacher from t to s, the timestep before on a grid of
solver_steps, under classifier-free guidance, and f(z'_s) has no gradient. The student then needs no guidance. Source:
latent consistency models, Luo et al. 2023 (arXiv 2310.04378, equations 9 and 16), without an embedding of the guidance
scale, as LCM-LoRA (arXiv 2311.05556); the target's weights are the student's own (Song and Dhariwal 2023).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from distill.data.batch import Batch
from distill.errors import UserError
from distill.methods.attention_distillation import AttentionDistillation, Maps
from distill.methods.base import Context, Noised, Terms
from distill.methods.options import ConsistencyOptions

if TYPE_CHECKING:
    from distill.attention import AttentionMaps
    from distill.methods.training import Training
    from distill.models import Model

SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
"""Constants of the boundary condition of a consistency model, as in diffusers' LCMScheduler."""


class Consistency(AttentionDistillation):
    """Train a student whose guess of the clean image is the same along the teacher's guided path."""

    options: ConsistencyOptions  # type: ignore[assignment]

    def faults(self, student: Model, training: Training) -> list[str]:
        faults = super().faults(student, training)
        steps = student.family.num_timesteps(student)
        if steps % self.options.solver_steps:
            faults.append(
                f"method.solver_steps is {self.options.solver_steps}; the base's {steps} timesteps must be a multiple "
                "of it"
            )
        if self.denoising.min_snr_gamma is not None:
            faults.append(
                "denoising.min_snr_gamma weighs the diffusion loss, and consistency has another; leave it out"
            )
        if training.text_encoder != "frozen" or training.denoiser == "frozen":
            faults.append(
                f"method consistency trains the denoiser alone, and denoiser is {training.denoiser}, text_encoder "
                f"{training.text_encoder}; set them to lora or full, and frozen"
            )
        return faults

    def setup(self, student: Model, context: Context) -> None:
        super(AttentionDistillation, self).setup(student, context)
        self.match = self.options
        self._stride = student.family.num_timesteps(student) // self.options.solver_steps
        teacher = self.load_teacher(context)
        # The teacher reads the student's text: it may be cached, without tokens.
        ours, theirs = (_read(model) for model in (student, teacher))
        exact = context.frozen_dtype == torch.float32
        if not (ours - theirs).abs().max() <= (1e-3 if exact else 5e-2) * ours.abs().max():
            raise UserError(
                f"method consistency: the text encoder of the teacher, {self.options.teacher}, was trained, and the "
                "student has the base's; start from the teacher by distill_steps.py --run"
            )
        self.compare_with(teacher)

    def passes(self, step: int, images: int) -> int:
        return (3 + 1 + 2) * images  # the student, its target, and the teacher with the caption and without

    def setup_passes(self, batch_size: int, processes: int) -> int:
        return 0

    def leaves_parameters_unused(self) -> bool:
        return self.trains_text  # its states are no part of the graph

    def draw_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(1, self.options.solver_steps + 1, (count,), generator=generator) * self._stride - 1

    def forward(self, batch: Batch, generator: torch.Generator) -> Terms:
        x = self.noised(batch, generator)
        encoders = list(self.text_encoders)
        with torch.no_grad():  # the teacher's text encoder too, as it is not trained
            x = replace(x, text=self.embeddings(self.student, encoders, x))
        self._student_maps.start()
        ours = self._clean(self.predict_student(x), x)
        mine = self._student_maps.take()
        with torch.no_grad():
            self._teacher_maps.start()
            before, theirs = self._step_of_teacher(x, self._teacher_maps)
            trains = self.denoiser.training
            self.denoiser.eval()  # no dropout in the target
            target = self._clean(self.predict_student(before), before)
            self.denoiser.train(trains)
        c = self.options.huber_c
        consistency = (((ours - target).pow(2) + c**2).sqrt() - c).mean()
        terms = self.attention_terms(mine, {name: theirs[self._layer_there(name)] for name in mine}, x)
        return terms | {"consistency": consistency, "loss": terms["loss"] + consistency}

    def _step_of_teacher(self, x: Noised, recorder: AttentionMaps) -> tuple[Noised, Maps]:
        """The batch one step nearer to the clean image, and the teacher's attention where the student's is compared."""
        from distill.models import Conditions

        teacher = self.teacher
        stated = self.predict(teacher, teacher.text_encoders, x)
        maps = recorder.take()
        text = self.embeddings(teacher, teacher.text_encoders, x)
        everything = torch.ones(len(x.timesteps), dtype=torch.bool, device=x.timesteps.device)
        embeds, pooled = self.with_empty(text.embeds, text.pooled, everything)
        unguided = teacher.family.negative_conditions(teacher, Conditions(embeds, pooled, x.size_ids))
        empty = self.predict(teacher, teacher.text_encoders, x.on(unguided.embeds, unguided.pooled))
        prediction = empty.float() + self.options.guidance_scale * (stated.float() - empty.float())
        clean, noise = teacher.family.clean_and_noise(teacher, prediction, x.noisy_latents, x.timesteps)
        timesteps = (x.timesteps - self._stride).clamp(min=0)
        earlier = self.student.family.add_noise(self.student, clean, noise, timesteps)
        return replace(x, noisy_latents=earlier, timesteps=timesteps), maps

    def _clean(self, prediction: torch.Tensor, x: Noised) -> torch.Tensor:
        """f: the identity at timestep 0. (batch, channels, height, width) float32."""
        student = self.student
        clean, _ = student.family.clean_and_noise(student, prediction.float(), x.noisy_latents, x.timesteps)
        scaled = (x.timesteps * TIMESTEP_SCALING)[:, None, None, None].float()
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        return skip * x.noisy_latents + scaled / (scaled**2 + SIGMA_DATA**2).sqrt() * clean


@torch.no_grad()
def _read(model: Model) -> torch.Tensor:
    """What the text encoders make of a text, float32 on the CPU."""
    for encoder in model.text_encoders:
        encoder.eval()
    device = next(model.text_encoders[0].parameters()).device
    return model.encode([ids.to(device) for ids in model.tokenize(("pleural effusion, a b",))])[0].float().cpu()

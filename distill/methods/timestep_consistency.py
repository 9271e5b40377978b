"""Attention at a small timestep teaches that at a large one, within the student.

L = L_denoising + weight * mean over layers and words of w(t) KL(map at s || map at t over places),
w(t) = max(0, t - s) / (T - s), s the teaching timestep, T the number of timesteps. The map at s is of the same image, noise and
caption, by the student itself, without a gradient. Source: CTCal (arXiv 2603.20741), which teaches nouns alone; its teacher
is a model apart.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from distill.data.batch import Batch
from distill.files import JsonObject
from distill.losses import place_attention_kl
from distill.methods.base import Context, Method, Noised, Terms
from distill.methods.options import TimestepConsistencyOptions
from distill.tokens import WORD

if TYPE_CHECKING:
    from distill.methods.training import Training
    from distill.models import Model


class TimestepConsistency(Method):
    """Fine-tune, and hold where words look in much noise to where they look in little."""

    options: TimestepConsistencyOptions

    def faults(self, student: Model, training: Training) -> list[str]:
        from distill.attention import attention_layers

        attention_layers(student.denoiser, self.options.layers)
        last, asked = student.family.num_timesteps(student) - 1, self.options.teaching_timestep
        return [f"method.teaching_timestep is {asked}; it must be below {last}"] if asked >= last else []

    def setup(self, student: Model, context: Context) -> None:
        from distill.attention import record_attention

        super().setup(student, context)
        self._open = ExitStack()
        self._maps = self._open.enter_context(record_attention(student.denoiser, self.options.layers))

    def passes(self, step: int, images: int) -> int:
        return (3 + 1) * images

    def forward(self, batch: Batch, generator: torch.Generator) -> Terms:
        x = self.noised(batch, generator)
        self._maps.start()
        denoising = self.denoising_loss(self.predict_student(x), x)
        taught = self._maps.take()
        teaching = self.maps_at_the_teaching_timestep(x)
        words = x.groups == WORD
        if self.options.words == "labels":
            assert x.label_tokens is not None
            words = x.label_tokens
        first = self.options.teaching_timestep
        weights = (x.timesteps - first).clamp(min=0) / (self.student.family.num_timesteps(self.student) - first)
        place_kl = torch.stack(
            [place_attention_kl(teaching[n], taught[n], words, weights=weights) for n in taught]
        ).mean()
        return {"loss": denoising + self.options.weight * place_kl, "denoising": denoising, "place_kl": place_kl}

    @torch.no_grad()
    def maps_at_the_teaching_timestep(self, x: Noised) -> dict[str, torch.Tensor]:
        """Layer -> (batch, places, tokens) of the student, without dropout, on less noise of the same draw."""
        student, family = self.student, self.student.family
        clean, noise = family.clean_and_noise(student, x.target, x.noisy_latents, x.timesteps)
        timesteps = torch.full_like(x.timesteps, self.options.teaching_timestep)
        earlier = replace(x, noisy_latents=family.add_noise(student, clean, noise, timesteps), timesteps=timesteps)
        trains = self.training
        self.eval()
        self._maps.start()
        self.predict_student(earlier)
        self.train(trains)
        return self._maps.take()

    def finish(self) -> JsonObject:
        self._open.close()
        return {}

"""A penalty on attention that leaks to EOS and padding, without labels and without a teacher.

L = L_denoising + weight * mean over layers of max(0, mass of EOS and padding - that of the model before the training).
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch

from distill.data.batch import Batch
from distill.files import JsonObject
from distill.losses import tail_leak, tail_mass
from distill.methods.base import Context, Method, Noised, Terms
from distill.methods.options import TailPenaltyOptions
from distill.tokens import WORD

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distill.models import Model

BINS = 10
"""Noise levels at which the mass before the training is measured."""
IMAGES = 512
"""Training images that it is measured on."""


class TailPenalty(Method):
    """Fine-tune, and keep attention from moving to EOS and padding."""

    options: TailPenaltyOptions

    def setup(self, student: Model, context: Context) -> None:
        from distill.attention import record_attention

        super().setup(student, context)
        self._open = ExitStack()
        self._maps = self._open.enter_context(record_attention(student.denoiser))
        self._allowed: dict[str, torch.Tensor] = {}
        self.measure(context.batches(IMAGES), context.generator)

    def setup_passes(self, batch_size: int, processes: int) -> int:
        return processes * math.ceil(IMAGES / batch_size) * batch_size  # each process measures all of them

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch], generator: torch.Generator) -> None:
        """Allow what the model has now: for each layer the mean mass of EOS and padding by noise level, and apart for
        captions without a word. A bin without an image is not limited."""
        sums: dict[str, torch.Tensor] = {}
        count = torch.zeros(2 * BINS)
        for batch in batches:
            x = self.noised(batch, generator)
            self._maps.start()
            self.predict_student(x)
            bins = self._bins(x).cpu()
            count += torch.bincount(bins, minlength=len(count))
            for name, maps in self._maps.take().items():
                mass = tail_mass(maps, x.groups).float().cpu()
                sums[name] = sums.get(name, torch.zeros(len(count))).index_add(0, bins, mass)
        self._allowed = {n: torch.where(count > 0, total / count.clamp(min=1), 1.0) for n, total in sums.items()}

    def _bins(self, x: Noised) -> torch.Tensor:
        """(batch,): which entry of the allowed mass an image has."""
        level = x.timesteps * BINS // self.student.family.num_timesteps(self.student)
        return level + BINS * (x.groups != WORD).all(dim=1)

    def forward(self, batch: Batch, generator: torch.Generator) -> Terms:
        x = self.noised(batch, generator)
        self._maps.start()
        denoising = self.denoising_loss(self.predict_student(x), x)
        maps, bins = self._maps.take(), self._bins(x)
        if (
            next(iter(self._allowed.values())).device != bins.device
        ):  # once: a copy at every step would wait for the device
            self._allowed = {n: values.to(bins.device) for n, values in self._allowed.items()}
        allowed = {n: self._allowed[n][bins] for n in maps}
        tail = torch.stack([tail_leak(allowed[n], maps[n], x.groups) for n in maps]).mean()
        return {"loss": denoising + self.options.weight * tail, "denoising": denoising, "tail": tail}

    def state(self) -> dict[str, torch.Tensor]:
        return {f"allowed.{name}": values for name, values in self._allowed.items()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self._allowed = {name.removeprefix("allowed."): values for name, values in state.items()}

    def finish(self) -> JsonObject:
        self._open.close()
        return {}

"""The diffusion loss alone.

L = mean w(t) (target - prediction)^2, target epsilon or v. Source: Ho et al. 2020, equation 14.
"""

from __future__ import annotations

import torch

from distill.data.batch import Batch
from distill.methods.base import Method, Terms


class Denoising(Method):
    """Fine-tune with the diffusion loss."""

    def forward(self, batch: Batch, generator: torch.Generator) -> Terms:
        x = self.noised(batch, generator)
        loss = self.denoising_loss(self.predict_student(x), x)
        return {"loss": loss, "denoising": loss}

"""Attention that labels and regions tell about: ARM (Dombrowski et al. 2024) and TokenCompose's losses.

L = L_denoising + arm_weight * ARM on the words that name a label
  + mean over layers, on the words whose label has boxes or a mask, of
    region_token_weight * token loss + region_pixel_weight * pixel loss.
Source: Dombrowski et al., AAAI 2024; TokenCompose, Wang et al. 2024 (arXiv 2312.03626).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from distill.data.batch import Batch
from distill.files import JsonObject
from distill.losses import attention_regularization, region_pixel_loss, region_token_loss
from distill.methods.base import Context, Method, Terms
from distill.methods.options import SupervisedAttentionOptions

if TYPE_CHECKING:
    from distill.models import Model


class SupervisedAttention(Method):
    """Fine-tune, and draw the attention of a label's words to the label."""

    options: SupervisedAttentionOptions

    def setup(self, student: Model, context: Context) -> None:
        from distill.attention import record_attention

        super().setup(student, context)
        self._open = ExitStack()
        self._maps = self._open.enter_context(record_attention(student.denoiser))

    def forward(self, batch: Batch, generator: torch.Generator) -> Terms:
        x, options = self.noised(batch, generator), self.options
        self._maps.start()
        denoising = self.denoising_loss(self.predict_student(x), x)
        maps, sizes = self._maps.take(), self._maps.sizes
        terms = {"loss": denoising, "denoising": denoising}
        if options.arm_weight:
            assert x.label_tokens is not None
            terms["arm"] = attention_regularization(maps, x.label_tokens)
            terms["loss"] = terms["loss"] + options.arm_weight * terms["arm"]
        for name, weight, loss in (
            ("region_token", options.region_token_weight, region_token_loss),
            ("region_pixel", options.region_pixel_weight, region_pixel_loss),
        ):
            if weight:
                assert x.regions is not None
                parts = [loss(maps[n], resize_regions(x.regions, sizes[n])) for n in maps]
                terms[name] = torch.stack(parts).mean()
                terms["loss"] = terms["loss"] + weight * terms[name]
        return terms

    def finish(self) -> JsonObject:
        self._open.close()
        return {}


def resize_regions(regions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(batch, tokens, height, width) -> (batch, places, tokens) of 0 and 1: a place that a region touches is in it."""
    return (F.adaptive_max_pool2d(regions.float(), size) > 0).flatten(2).transpose(1, 2).float()

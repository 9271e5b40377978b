"""Attention that labels and regions tell about: ARM (Dombrowski et al. 2024) and TokenCompose's losses.

L = L_denoising + arm_weight * ARM on the words that name a label
  + mean over layers, on the words whose label has boxes or a mask, of
    region_token_weight * token loss + region_pixel_weight * pixel loss.
Source: Dombrowski et al., AAAI 2024; TokenCompose, Wang et al. 2024 (arXiv 2312.03626).
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import model_validator

from distill.data.batch import Batch
from distill.losses import attention_regularization, region_pixel_loss, region_token_loss
from distill.methods.base import Context, Method, Options, Terms
from distill.settings import Count, Weight

if TYPE_CHECKING:
    from distill.models import Model


class SupervisedAttentionOptions(Options):
    """Attention of the words that name a label, taught by labels (ARM) or regions (TokenCompose)."""

    kind: Literal["supervised_attention"] = "supervised_attention"
    """What is minimized."""
    arm_weight: Weight = 0.0
    """ARM: rewards attention on the words that name a label. The paper uses 0.12."""
    region_token_weight: Weight = 0.0
    """TokenCompose's token loss: attention of a label's words belongs in its boxes or mask. 0.01 works on phantoms."""
    region_pixel_weight: Weight = 0.0
    """TokenCompose's pixel loss: cross-entropy of that attention and the region. The paper uses 5e-5."""
    images: Count | None = None
    """Use the regions of the first this many training images. None uses all."""

    @model_validator(mode="after")
    def _check(self) -> SupervisedAttentionOptions:
        if max(self.arm_weight, self.region_token_weight, self.region_pixel_weight) == 0:
            raise ValueError("all weights are 0; set arm_weight, region_token_weight or region_pixel_weight")
        if self.images is not None and not self.reads_regions:
            raise ValueError("images limits the regions, and no region weight is set")
        return self

    @property
    def reads_labels(self) -> bool:
        return self.arm_weight > 0

    @property
    def reads_regions(self) -> bool:
        return max(self.region_token_weight, self.region_pixel_weight) > 0

    @property
    def region_images(self) -> int | None:
        return self.images


class SupervisedAttention(Method):
    """Fine-tune, and draw the attention of a label's words to the label."""

    Options = SupervisedAttentionOptions
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

    def finish(self) -> dict[str, Any]:
        self._open.close()
        return {}


def resize_regions(regions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(batch, tokens, height, width) -> (batch, places, tokens) of 0 and 1: a place that a region touches is in it."""
    return (F.adaptive_max_pool2d(regions.float(), size) > 0).flatten(2).transpose(1, 2).float()

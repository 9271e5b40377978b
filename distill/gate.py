"""What a teacher may teach: the layers and token groups whose maps localize at least as well as the student's own would.

A student must never be pulled to maps worse than its own. Both models are looked at on validation images, layer by layer
(distill/atlas.py); the reference stands for the student: the same training without a teacher, or the base. The token
groups take the place of `place_groups`; the KL over tokens and the mass are of all tokens, in the layers that pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator

from distill.atlas import compute_cells, gather_pairs, macro_mean
from distill.components import Components
from distill.config import AttentionDistillationConfig, EvaluationConfig
from distill.data.sample import ImageCaptionDataset
from distill.errors import UserError
from distill.localization import DEFAULT_TIMESTEPS

Group = Literal["words", "eos", "padding"]
GROUPS: tuple[Group, ...] = ("words", "eos", "padding")
"""Token groups in the order of localization.TOKEN_MAPS."""


@dataclass(frozen=True)
class Taught:
    """layers, groups: what passes. auc: model -> layer -> group -> AUC on validation images, what it was decided by."""

    layers: tuple[str, ...]
    groups: tuple[Group, ...]
    auc: dict[str, dict[str, dict[str, float]]]

    def narrow(self, config: AttentionDistillationConfig) -> AttentionDistillationConfig:
        return replace(config, layers=self.layers, place_groups=self.groups)


def choose_taught(
    teacher: Components,
    reference: Components,
    dataset: ImageCaptionDataset,
    config: EvaluationConfig,
    *,
    images: int,
    layers: Sequence[str],
    accelerator: Accelerator,
) -> Taught:
    """Of `layers`, those whose word maps have at least the reference's AUC (macro over findings, mean over the timesteps of
    config, or the default ones); then the groups whose maps have it in these layers, and are better than chance.

    Raises UserError if the teacher has nothing to teach.
    """
    few = replace(config, localization_images=images)
    table = {}
    for name, model in (("teacher", teacher), ("reference", reference)):
        model.to(accelerator.device)
        cells = compute_cells(
            model, dataset, few, config.timesteps or DEFAULT_TIMESTEPS, accelerator=accelerator, label=f"gate: {name}"
        )
        values, findings = gather_pairs(cells, cells.auc.mean(axis=3))
        by_layer = macro_mean(values, findings)  # (groups, layers)
        table[name] = {
            layer: {group: float(by_layer[g, k]) for g, group in enumerate(GROUPS)}
            for k, layer in enumerate(cells.layers)
        }
    return decide(table, layers)


def decide(table: dict[str, Any], layers: Sequence[str]) -> Taught:
    """The rule of `choose_taught`, on its table."""
    teacher, reference = table["teacher"], table["reference"]
    kept = tuple(name for name in layers if teacher[name]["words"] >= reference[name]["words"])
    if not kept:
        raise UserError(
            "distillation.gate: the teacher's word maps localize worse than the reference's in every layer on validation "
            "images; it has nothing to teach. Train it longer, or train without distillation"
        )
    mean = {m: {g: float(np.mean([table[m][name][g] for name in kept])) for g in GROUPS} for m in table}
    groups = tuple(g for g in GROUPS if mean["teacher"][g] >= mean["reference"][g] and mean["teacher"][g] > 0.5)
    if not groups:
        raise UserError(
            "distillation.gate: no token group of the teacher localizes better than chance on validation images"
        )
    return Taught(kept, groups, table)

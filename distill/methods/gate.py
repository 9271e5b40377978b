"""What a teacher may teach: the timesteps, layers and token groups in which it localizes at least as well as the
student would.

A student must never be pulled to maps worse than its own. Teacher and reference are compared on validation images,
layer by layer, by what the image adds to its map (see `distill.evaluation.image_adds`): a map that only knows where a
finding usually is teaches nothing. The reference stands for the student: the same training without a teacher, or the
base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from distill.errors import UserError
from distill.files import JsonObject
from distill.methods.base import LayerScores
from distill.methods.options import AttentionMatch, Group

if TYPE_CHECKING:
    from distill.methods.attention_distillation import AttentionMatch
    from distill.models import Model
    from distill.models.family import ModuleName

GROUPS: tuple[Group, ...] = ("words", "eos", "padding")
"""Token groups in the order of localization.TOKEN_MAPS."""

WIDTH = 100
"""Timesteps for which one looked at stands: those from WIDTH / 2 before it to WIDTH / 2 - 1 after it."""
TIMESTEPS = tuple(range(WIDTH // 2, 1000, WIDTH))
LEAD = 2 / 3
"""Share of the best timestep's score that a timestep must have."""


@dataclass(frozen=True)
class Taught:
    """layers, groups, timesteps (first, last): what passes. What it was decided by, on validation images: image_adds,
    model -> layer -> group, at these timesteps; image_adds_of_timesteps, of the teacher's words in all layers, at
    TIMESTEPS."""

    layers: tuple[str, ...]
    groups: tuple[Group, ...]
    timesteps: tuple[int, int]
    image_adds: dict[str, dict[str, dict[str, float]]]
    image_adds_of_timesteps: tuple[float, ...]

    def narrow(self, config: AttentionMatch) -> AttentionMatch:
        """Its part of what `config` asks for; all of its token groups where `config` has the default."""
        first, last = max(self.timesteps[0], config.min_timestep), min(self.timesteps[1], config.max_timestep)
        if first > last:
            raise UserError(
                f"method.gate_reference: the teacher localizes at timesteps {self.timesteps[0]} to "
                f"{self.timesteps[1]}, and method.min_timestep and max_timestep ask for {config.min_timestep} to "
                f"{config.max_timestep}"
            )
        every = config.place_groups == type(config).model_fields["place_groups"].default
        groups = tuple(group for group in self.groups if every or group in config.place_groups)
        if not groups:
            raise UserError(
                f"method.gate_reference: of the token groups, the teacher localizes {', '.join(self.groups)}, and "
                f"method.place_groups asks for {', '.join(config.place_groups)}"
            )
        change = {"layers": self.layers, "place_groups": groups, "min_timestep": first, "max_timestep": last}
        return config.model_copy(update=change)


def choose_taught(
    teacher: Model,
    reference: Model,
    layer_scores: LayerScores,
    *,
    images: int,
    layers: Sequence[str],
    in_teacher: ModuleName = str,
    in_reference: ModuleName = str,
) -> Taught:
    """What the teacher may teach. First the timesteps at which it localizes (`localizing`); then those of `layers`
    where the image adds at least as much to the teacher's word maps as to the reference's (macro over findings, mean
    over timesteps); then the token groups for which the same holds in these layers, and to whose maps of the teacher the
    image adds more than 0.

    in_teacher, in_reference: name of one of `layers` -> that in the other model, which may have more layers.
    Raises UserError if the teacher has nothing to teach.
    """
    by_cell: dict[str, NDArray[np.float64]] = {}
    for name, model, there in (("teacher", teacher, in_teacher), ("reference", reference, in_reference)):
        found, names = layer_scores(model, images, TIMESTEPS, f"gate: {name}")  # (groups, layers, timesteps)
        by_cell[name] = found[:, [list(names).index(there(layer)) for layer in layers]]
    words = by_cell["teacher"][0].mean(axis=0)
    first, last = localizing(words)
    table: dict[str, dict[str, dict[str, float]]] = {
        name: {
            layer: {group: float(own[g, k, first : last + 1].mean()) for g, group in enumerate(GROUPS)}
            for k, layer in enumerate(layers)
        }
        for name, own in by_cell.items()
    }
    kept, groups = decide(table, layers)
    half = WIDTH // 2
    return Taught(kept, groups, (TIMESTEPS[first] - half, TIMESTEPS[last] + half - 1), table, tuple(map(float, words)))


def looks_passes(images: int) -> int:
    """The most image-passes that `choose_taught` takes: of teacher and reference, at TIMESTEPS."""
    return 2 * images * len(TIMESTEPS)


def localizing(scores: NDArray[np.float64]) -> tuple[int, int]:
    """First and last index of the timesteps around the best that have at least LEAD of its score; all where no score is
    above 0, of which `decide` then keeps the layers and groups that have one. scores: (timesteps,)."""
    best = int(scores.argmax())
    if scores[best] <= 0:
        return 0, len(scores) - 1
    enough = scores >= LEAD * scores[best]
    first = last = best
    while first > 0 and enough[first - 1]:
        first -= 1
    while last < len(scores) - 1 and enough[last + 1]:
        last += 1
    return first, last


def decide(table: JsonObject, layers: Sequence[str]) -> tuple[tuple[str, ...], tuple[Group, ...]]:
    """Layers and groups by the rule of `choose_taught`, on its table."""
    teacher, reference = table["teacher"], table["reference"]
    kept = tuple(name for name in layers if teacher[name]["words"] >= reference[name]["words"])
    if not kept:
        raise UserError(
            "method.gate_reference: on validation images, the image adds less to the teacher's word maps than to the "
            "reference's in every layer; it has nothing to teach. Train it longer, or train without distillation"
        )
    mean = {m: {g: float(np.mean([table[m][name][g] for name in kept])) for g in GROUPS} for m in table}
    groups = tuple(g for g in GROUPS if mean["teacher"][g] >= mean["reference"][g] and mean["teacher"][g] > 0)
    if not groups:
        raise UserError(
            "method.gate_reference: on validation images, the image adds nothing to the teacher's maps of any token group, "
            "or less than to the reference's; it has nothing to teach. Train it longer, or train without distillation"
        )
    return kept, groups

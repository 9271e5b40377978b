"""What a gate looks at on validation images, kept beside its decision: a run that goes on does not look again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray

from distill.errors import UserError
from distill.experiment.cost import ForwardPasses
from distill.files import JsonObject, read_json, write_json

Look = tuple[NDArray[np.float64], Sequence[str]]
"""(token groups, layers, timesteps) scores, and the names of the layers."""
FILE = "gate_looks.json"


class GateLooks:
    """Looks by their label in log_dir/gate_looks.json, each with a hash of all that it depends on."""

    def __init__(self, log_dir: Path, accelerator: Accelerator, passes: ForwardPasses) -> None:
        self.path, self.accelerator, self.passes = log_dir / FILE, accelerator, passes

    def get(self, label: str, inputs: str, look: Callable[[], Look]) -> Look:
        """The kept look of these inputs, else what `look` finds. Its image-passes count in both cases."""
        kept = self._kept(label, inputs)
        if kept is not None:
            self.passes.images += kept["image_passes"] if self.accelerator.is_main_process else 0
            return np.array(kept["image_adds"]), kept["layers"]
        before = self.passes.images
        values, layers = look()
        found = {"inputs": inputs, "image_adds": values.tolist(), "layers": list(layers)}
        found["image_passes"] = sum(gather_object([self.passes.images - before]))
        if self.accelerator.is_main_process:
            write_json(self.path, self._all() | {label: found})
        return values, layers

    def _kept(self, label: str, inputs: str) -> JsonObject | None:
        """As the main process reads it, so that all processes do the same. None for a look that measured something else,
        as those of version 0.1.0 did."""
        entry = self._all().get(label) if self.accelerator.is_main_process else None
        fits = isinstance(entry, dict) and entry.get("inputs") == inputs and "image_adds" in entry
        found = [entry if fits else None]
        return cast("JsonObject | None", broadcast_object_list(found)[0])

    def _all(self) -> JsonObject:
        try:
            found = read_json(self.path)
        except (OSError, UserError):
            return {}
        return found if isinstance(found, dict) else {}

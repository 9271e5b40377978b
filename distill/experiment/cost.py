"""What a training costs in image-passes: one image through a denoiser, forward 1 and backward 2.

Teachers and models that are trained beside the student count as the student does. Not counted: what gradient
checkpointing computes again inside backward, the text encoders and the VAE, and samples and looks at validation images
while it trains.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from distill.config import TrainerConfig
from distill.errors import UserError
from distill.experiment.arms import Arm
from distill.experiment.run import Run
from distill.files import read_json
from distill.methods.base import Method

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.hooks import RemovableHandle

    from distill.models import Model


class ForwardPasses:
    """Counts the images that pass through the denoisers of watched models."""

    def __init__(self) -> None:
        self.images = 0
        self._handles: list[RemovableHandle] = []

    def watch(self, model: Model) -> Model:
        """The model itself; from now on its passes count."""
        name, place = model.family.latents_input

        def count(module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
            self.images += len(args[place] if len(args) > place else kwargs[name])

        self._handles.append(model.denoiser.register_forward_pre_hook(count, with_kwargs=True))
        return model

    def stop(self) -> int:
        """Count no more. Returns the passes of all processes."""
        for handle in self._handles:
            handle.remove()
        return sum(gather_object([self.images]))


def training_passes(method: Method, trainer: TrainerConfig, processes: int) -> int:
    """Image-passes of all steps of a training, also of those before it was continued."""
    batches = processes * trainer.gradient_accumulation_steps
    return batches * sum(method.passes(step, trainer.batch_size) for step in range(1, trainer.max_steps + 1))


def with_teachers(run: Run, arm: Arm, own: int) -> int | None:
    """Image-passes of an arm and of all that it needs: other arms, each once, and run folders. None where one is
    unknown, as earlier versions counted none. Other models count nothing."""
    needed, waiting, folders = set[str](), list(arm.needs), set[Path]()
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += run.arms[name].needs
    known = [passes_in(run.arms[name].folder, "image_passes") for name in needed]
    for one in (arm, *(run.arms[name] for name in needed)):
        folders |= {Path(name) for name in one.training.method.references if name not in run.arms}
    known += [passes_in(folder, "image_passes_with_teachers") for folder in folders if (folder / "cost.json").is_file()]
    return None if None in known else own + sum(passes for passes in known if passes is not None)


def passes_in(folder: Path, key: str) -> int | None:
    """Image-passes that cost.json of a run folder names; None where it names none."""
    try:
        passes = read_json(folder / "cost.json").get(key)
    except (UserError, AttributeError):
        return None
    return passes if isinstance(passes, int) else None

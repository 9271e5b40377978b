"""Features of vision models of torchvision and timm, with weights from a local file. Nothing is fetched."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distill.errors import UserError
from distill.metrics.features import Features, InceptionFeatures, Preprocessing, XrvFeatures, first_line, mismatch

LIBRARIES = ("torchvision", "timm")
WRITTEN = "inception:FILE, xrv:FILE, torchvision:MODEL:FILE, timm:MODEL:FILE"


class StateFeatures(Features):
    """Penultimate-layer features of a vision model. `model` has no classification head; its weights come from `state`.

    ignored: beginnings of the names of weights that `state` may have and the model has not, those of its classifier.
    Raises UserError where `state` has not the model's weights, or the model gives no row of features.
    """

    def __init__(
        self, name: str, model: nn.Module, prepare: Preprocessing, state: Mapping[str, Tensor], ignored: Collection[str]
    ) -> None:
        super().__init__()
        self.name, self.resize, self.prepare = name, prepare.said, prepare
        kept = {key: value for key, value in state.items() if not key.startswith(tuple(ignored))}
        try:
            model.load_state_dict(kept)
        except RuntimeError as error:
            raise _refused(name, f"its file has other weights: {mismatch(error)}") from error
        self.model = model.float().eval()
        side = int(prepare.side_px)
        with torch.no_grad():
            found = self(torch.zeros(2, 3, side, side))[0]
        if found.ndim != 2:
            raise _refused(name, f"it gives {tuple(found.shape)} for two images, and not a row of features for each")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.model(self.prepare(images)), None


def load_with_weights(chosen: str) -> Features:
    """The extractor for a value of evaluation.features such as `timm:MODEL:FILE`. Raises UserError if the library or
    the file is missing or does not fit."""
    library, _, rest = chosen.partition(":")
    if library in ("inception", "xrv"):
        state = _read_state(chosen, Path(rest))
        return InceptionFeatures(Path(rest)) if library == "inception" else XrvFeatures(state)
    name, _, file = rest.partition(":")
    if library not in LIBRARIES or not name or not file:
        raise UserError(f"evaluation.features {chosen}: features with a file of weights are written {WRITTEN}")
    state = _read_state(chosen, Path(file))
    try:
        model, prepare, ignored = (_torchvision if library == "torchvision" else _timm)(name)
    except Exception as error:  # a name that the library lacks can make it raise anything
        reason = f"{library} makes no classifier of images of this name that can be used"
        if isinstance(error, ImportError) or "torchvision::" in str(error):
            reason = f"it needs {library}, and a torchvision that fits torch"
        raise _refused(chosen, f"{reason}: {first_line(error)}") from error
    return StateFeatures(f"{library}:{name}", model, prepare, state, ignored)


def _refused(chosen: str, reason: str) -> UserError:
    return UserError(f"evaluation.features {chosen}: {reason}")


def _read_state(chosen: str, file: Path) -> dict[str, Tensor]:
    """The weights of a file of safetensors, or of torch.save; as DataParallel and trainers' checkpoints hold them too."""
    if not file.is_file():
        raise _refused(chosen, f"there is no file {file}")
    try:
        found: Any = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        for key in ("state_dict", "model"):
            found = found[key] if isinstance(found.get(key), dict) else found
        if not found or not all(isinstance(value, Tensor) for value in found.values()):
            raise ValueError("it holds more than weights by their names")
    except Exception as error:  # a damaged or hostile file can make it raise anything
        raise _refused(chosen, f"{file} is no state dict that can be read safely: {first_line(error)}") from error
    return {key.removeprefix("module."): value for key, value in found.items()}


def _torchvision(name: str) -> tuple[nn.Module, Preprocessing, Collection[str]]:
    """The model without its last linear layer, and resized and normalized as for the weights of the library."""
    from torchvision.models import get_model, get_model_weights  # type: ignore[import-not-found, import-untyped, unused-ignore]

    preset = get_model_weights(name).DEFAULT.transforms()
    model = get_model(name, weights=None)
    if hasattr(model, "transform_input"):  # GoogLeNet and Inception v3: whether they do is not in the file
        raise ValueError("it may normalize its images once more")
    last = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    model.set_submodule(last, nn.Identity())
    return model, Preprocessing(preset.crop_size[0], preset.mean, preset.std), [f"{last}."]


def _timm(name: str) -> tuple[nn.Module, Preprocessing, Collection[str]]:
    import timm  # type: ignore[import-not-found, import-untyped, unused-ignore]

    model = timm.create_model(name, pretrained=False, num_classes=0)
    said = timm.data.resolve_model_data_config(model)
    heads = model.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else heads
    return model, Preprocessing(said["input_size"][-1], said["mean"], said["std"]), [f"{head}." for head in heads]

"""Feature extractors for FID and finding classification, by name or from a local folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel, ResNetForImageClassification

from distill.errors import UserError

PHANTOM_CLASSIFIER = Path(__file__).parents[2] / "checkpoints" / "phantom-classifier"
logger = logging.getLogger(__name__)


class Features(nn.Module):
    """forward: (batch, 3, height, width) in [-1, 1] -> (features (batch, d), scores (batch, findings) or None).

    findings: names of the columns of scores, lower case; empty without a classifier. resize: what is done to an image
    first.
    """

    name: str
    findings: Sequence[str] = ()
    resize: str = "none"

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        raise TypeError(f"{type(self).__name__} must define forward")


class PhantomFeatures(Features):
    """The embedded classifier, trained on real phantoms: pooled features of 64 dimensions and logits of the
    findings."""

    name = "phantom"

    def __init__(self, folder: Path = PHANTOM_CLASSIFIER) -> None:
        super().__init__()
        if not folder.is_dir():
            raise UserError(f"the phantom classifier is not at {folder}; recipes/pretrain_phantom.py makes it")
        self.model = ResNetForImageClassification.from_pretrained(folder).float().eval()
        self.findings = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.model.resnet(images).pooler_output
        return features.flatten(1), self.model.classifier(features)


class InceptionFeatures(Features):
    """Inception v3 of torch-fidelity, 2048 dimensions (Heusel et al. 2017); it fetches its weights once, or reads them
    from a file."""

    name = "inception"
    resize = "299 px, bilinear, as TensorFlow 1 does"

    def __init__(self, weights: Path | None = None) -> None:
        super().__init__()
        file = None if weights is None else str(weights)
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.model = NoTrainInceptionV3(
                name="inception-v3-compat", features_list=["2048"], feature_extractor_weights_path=file
            )
        except ModuleNotFoundError as error:
            raise UserError(
                "evaluation.features inception needs torch-fidelity: pip install 'attention-distill[inception]'"
            ) from error
        except OSError as error:
            raise UserError(f"evaluation.features inception: the weights cannot be fetched ({error})") from error
        except RuntimeError as error:
            raise UserError(f"evaluation.features inception: {file} has other weights: {first_line(error)}") from error

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.model(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)).flatten(1), None


class XrvFeatures(Features):
    """DenseNet-121 of torchxrayvision on chest X-rays (Cohen et al. 2022): 1024 features and its pathologies' scores.

    It fetches the weights densenet121-res224-all once. state: its state_dict instead.
    """

    name = "xrv"
    resize = "224 px, bilinear with antialiasing"

    def __init__(self, state: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        try:
            import torchxrayvision
        except (ImportError, RuntimeError) as error:  # torchvision of another torch raises RuntimeError
            raise UserError(
                f"evaluation.features xrv needs torchxrayvision and a torchvision that fits torch "
                f"(pip install 'attention-distill[xrv]'): {error}"
            ) from error
        try:
            fetched = "densenet121-res224-all" if state is None else None
            self.model: Any = torchxrayvision.models.DenseNet(weights=fetched).eval()
        except Exception as error:
            raise UserError(f"evaluation.features xrv: the weights cannot be fetched ({error})") from error
        if state is not None:
            self.model.op_threshs = state.get("op_threshs")  # a buffer that is None has no place in a state
            try:
                self.model.load_state_dict(state)
            except RuntimeError as error:
                raise UserError(f"evaluation.features xrv: the file has other weights: {mismatch(error)}") from error
        known = torchxrayvision.datasets.default_pathologies if state is not None else self.model.pathologies
        self.findings = [name.replace("_", " ").lower().replace("effusion", "pleural effusion") for name in known]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        gray = F.interpolate(images.mean(dim=1, keepdim=True), size=(224, 224), mode="bilinear", antialias=True) * 1024
        return self.model.features2(gray), self.model(gray)


Refusal = Callable[[Path, str], UserError]
"""(folder, reason) -> the error that says what would be right."""


def _unusable(folder: Path, reason: str) -> UserError:
    return UserError(
        f"evaluation.features {folder}: {reason}; give a folder with config.json, preprocessor_config.json and "
        "*.safetensors of a vision model of transformers, such as a DINOv2"
    )


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def mismatch(error: RuntimeError) -> str:
    """The first two reasons of load_state_dict."""
    return " ".join(str(error).split("\n")[1:3]).strip()


class Preprocessing(nn.Module):
    """(batch, 3, height, width) in [-1, 1] -> the pixels that a vision model reads: resized to a square of `side` px,
    and normalized by the mean and standard deviation of each channel, in [0, 1]."""

    mean: Tensor
    std: Tensor
    side_px: Tensor

    def __init__(self, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Buffers, so that they are part of the hash of the extractor.
        for name, value in (("mean", mean), ("std", std), ("side_px", side)):
            self.register_buffer(name, torch.tensor(value))

    @property
    def said(self) -> str:
        return f"{int(self.side_px)} px, bicubic with antialiasing"

    def forward(self, images: Tensor) -> Tensor:
        shape = (int(self.side_px),) * 2
        pixels = F.interpolate((images.clamp(-1, 1) + 1) / 2, size=shape, mode="bicubic", antialias=True).clamp(0, 1)
        return (pixels - self.mean.view(1, 3, 1, 1)) / self.std.view(1, 3, 1, 1)


def load_folder(
    folder: Path, refuse: Refusal, kind: type[AutoModel | AutoModelForImageClassification] = AutoModel
) -> tuple[PreTrainedModel, set[str]]:
    """A model of transformers, in float32, and the names of weights that the folder lacks. Nothing is fetched, and no
    code of the folder is run."""
    try:
        model, loaded = kind.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32,
            output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # a config.json can make it raise anything
        raise refuse(folder, f"transformers cannot load it: {first_line(error)}") from error
    return model, set(loaded["missing_keys"])


def read_preprocessing(folder: Path, refuse: Refusal) -> Preprocessing:
    """As the folder of a model of transformers says. Raises what `refuse` gives where it does not say."""
    if not folder.is_dir():
        raise refuse(folder, "it is a file" if folder.exists() else "there is no such folder")
    path = folder / "preprocessor_config.json"
    # An adapter would name another model, anywhere.
    missing = [name for name in ("config.json", path.name) if not (folder / name).is_file()]
    if missing or not list(folder.glob("*.safetensors")) or (folder / "adapter_config.json").exists():
        raise refuse(folder, f"it has no {' and no '.join(missing) or 'whole model as *.safetensors'}")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        size = said.get("crop_size") if said.get("do_center_crop") else None
        size = size or said["size"]
        side = size if isinstance(size, int) else int(size.get("height") or size["shortest_edge"])
        normalizes = said.get("do_normalize", True)
        mean, std = ([float(v) for v in said[key]] if normalizes else [plain] * 3
                     for key, plain in (("image_mean", 0.0), ("image_std", 1.0)))  # fmt: skip
        if not (8 <= side <= 4096 and len(mean) == len(std) == 3 and min(std) > 0):
            raise ValueError(f"size {side}, image_mean {mean}, image_std {std}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise refuse(folder, f"{path.name} does not say size, image_mean and image_std ({error!r})") from error
    return Preprocessing(side, mean, std)


class FolderFeatures(Features):
    """The pooled output, else the class token, of a vision model of transformers in a local folder, such as RadDINO.
    A classifier gives the scores of its classes too.

    Images are resized and normalized as preprocessor_config.json says. Nothing is fetched, and no code of the folder is
    run. Raises UserError for a folder that does not hold all of a vision model.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.name = folder.resolve().name
        self.prepare = read_preprocessing(folder, _unusable)
        side, self.resize = int(self.prepare.side_px), self.prepare.said
        model, missing = load_folder(folder, _unusable)
        if model.main_input_name != "pixel_values":
            raise _unusable(folder, f"{type(model).__name__} reads {model.main_input_name}, and not images alone")
        without_pooler = {key for key in missing if not key.startswith("pooler.")}
        if without_pooler:
            raise _unusable(folder, f"its weights lack {min(without_pooler)}")
        self.model, self.config, self.has_pooler = model.eval(), model.config, not missing
        self.classifier: PreTrainedModel | None = None
        if any(name.endswith("ForImageClassification") for name in self.config.architectures or []):
            self.classifier, missing = load_folder(folder, _unusable, AutoModelForImageClassification)
            if missing:
                raise _unusable(folder, f"its weights lack {min(missing)}")
            names = (self.config.id2label[i] for i in range(self.config.num_labels))
            self.findings = [str(name).replace("_", " ").lower() for name in names]
        try:
            with torch.no_grad():
                self(torch.zeros(1, 3, side, side))
        except (ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise _unusable(folder, f"it takes no image of {side} px: {first_line(error)}") from error

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found = self.model(pixel_values=self.prepare(images))
        pooled = getattr(found, "pooler_output", None) if self.has_pooler else None
        if pooled is None and found.last_hidden_state.ndim != 3:
            raise ValueError(
                f"its output is {tuple(found.last_hidden_state.shape)}, and no sequence with a class token"
            )
        scores = None if self.classifier is None else self.classifier(pixel_values=self.prepare(images)).logits
        return (found.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1), scores


EXTRACTORS: dict[str, type[Features]] = {
    "phantom": PhantomFeatures,
    "inception": InceptionFeatures,
    "xrv": XrvFeatures,
}


def load_features(name: str, *, phantom_data: bool) -> Features | None:
    """The extractor of evaluation.features; `auto` is the phantom's own on phantom data, else none.

    Raises UserError if it cannot be had.
    """
    if name == "auto":
        name = "phantom" if phantom_data else "none"
        if name == "none":
            logger.warning(
                "no FID and no finding AUC: evaluation.features is auto and the data are not phantoms; "
                "choose inception or xrv, whose weights are fetched once, or the folder of a vision model of "
                "transformers"
            )
    if name == "none":
        return None
    if name in EXTRACTORS:
        found = EXTRACTORS[name]()
    elif Path(name).exists():
        found = FolderFeatures(Path(name))
    elif ":" in name:
        from distill.metrics.library_features import load_with_weights

        found = load_with_weights(name)
    else:
        raise UserError(
            f"evaluation.features: no extractor {name!r}; available: auto, none, {', '.join(EXTRACTORS)}, a file of "
            "weights (inception:FILE, xrv:FILE, torchvision:MODEL:FILE, timm:MODEL:FILE), or the folder of a vision model of "
            "transformers, and there is no such folder"
        )
    return found.eval().requires_grad_(False)

"""Named feature extractors for FID and finding classification."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetForImageClassification

from distill.errors import UserError

PHANTOM_CLASSIFIER = Path(__file__).parents[2] / "checkpoints" / "phantom-classifier"
logger = logging.getLogger(__name__)


class Features(nn.Module):
    """forward: (batch, 3, height, width) in [-1, 1] -> (features (batch, d), scores (batch, findings) or None).

    findings: names of the columns of scores, lower case; empty without a classifier.
    """

    name: str
    findings: Sequence[str] = ()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        raise TypeError(f"{type(self).__name__} must define forward")


class PhantomFeatures(Features):
    """The embedded classifier, trained on real phantoms: pooled features of 64 dimensions and logits of the findings."""

    name = "phantom"

    def __init__(self, folder: Path = PHANTOM_CLASSIFIER) -> None:
        super().__init__()
        if not folder.is_dir():
            raise UserError(f"the phantom classifier is not at {folder}; recipes/pretrain_phantom.py makes it")
        self.model = ResNetForImageClassification.from_pretrained(folder).float().eval()
        self.findings = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = self.model.resnet(images).pooler_output
        return features.flatten(1), self.model.classifier(features)


class InceptionFeatures(Features):
    """Inception v3 of torch-fidelity, 2048 dimensions (Heusel et al. 2017); it fetches its weights once."""

    name = "inception"

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.model = NoTrainInceptionV3(name="inception-v3-compat", features_list=["2048"])
        except ModuleNotFoundError as error:
            raise UserError(
                "evaluation.features inception needs torch-fidelity: pip install 'attention-distill[inception]'"
            ) from error
        except OSError as error:
            raise UserError(f"evaluation.features inception: the weights cannot be fetched ({error})") from error

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.model(((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)).flatten(1), None


class XrvFeatures(Features):
    """DenseNet-121 of torchxrayvision on chest X-rays (Cohen et al. 2022): 1024 features and its pathologies' scores."""

    name = "xrv"

    def __init__(self) -> None:
        super().__init__()
        try:
            import torchxrayvision
        except (ImportError, RuntimeError) as error:  # torchvision of another torch raises RuntimeError
            raise UserError(
                f"evaluation.features xrv needs torchxrayvision and a torchvision that fits torch "
                f"(pip install 'attention-distill[xrv]'): {error}"
            ) from error
        try:
            self.model: Any = torchxrayvision.models.DenseNet(weights="densenet121-res224-all").eval()
        except Exception as error:
            raise UserError(f"evaluation.features xrv: the weights cannot be fetched ({error})") from error
        self.findings = [
            p.replace("_", " ").lower().replace("effusion", "pleural effusion") for p in self.model.pathologies
        ]

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        gray = F.interpolate(images.mean(dim=1, keepdim=True), size=(224, 224), mode="bilinear", antialias=True) * 1024
        return self.model.features2(gray), self.model(gray)


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
                "choose inception or xrv, whose weights are fetched once"
            )
    if name == "none":
        return None
    if name not in EXTRACTORS:
        raise UserError(f"evaluation.features: no extractor {name!r}; available: auto, none, {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name]().eval().requires_grad_(False)

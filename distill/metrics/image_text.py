"""Do images fit their captions, by a model that reads both, such as CLIP?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distill.errors import UserError
from distill.metrics.bootstrap import image_counts, percentile_interval
from distill.metrics.features import first_line, load_folder, read_preprocessing

_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")


def _unusable(folder: Path, reason: str) -> UserError:
    return UserError(
        f"evaluation.image_text_model {folder}: {reason}; give a folder with config.json, preprocessor_config.json, a "
        "tokenizer and *.safetensors of a CLIP or SigLIP model of transformers"
    )


class ImageText(nn.Module):
    """forward: (batch, 3, height, width) in [-1, 1] and their captions -> embeddings of images and texts, (batch, d)
    each, of length 1.

    Images are resized and normalized as preprocessor_config.json says; captions are cut at the length that the model
    reads. Nothing is fetched, and no code of the folder is run. Raises UserError for a folder that does not hold all of
    such a model.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.name = folder.resolve().name
        self.prepare = read_preprocessing(folder, _unusable)
        self.model, missing = load_folder(folder, _unusable)
        self.config = self.model.config
        if missing:
            raise _unusable(folder, f"its weights lack {min(missing)}")
        if not (hasattr(self.model, "get_image_features") and hasattr(self.model, "get_text_features")):
            raise _unusable(folder, f"{type(self.model).__name__} does not compare images with texts")
        # Without one of them transformers makes a tokenizer that knows no word.
        if not any((folder / name).is_file() for name in _VOCABULARIES):
            raise _unusable(folder, f"it has none of {', '.join(_VOCABULARIES)}")
        self.eval().requires_grad_(False)
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
            side = int(self.prepare.side_px)
            self(torch.zeros(1, 3, side, side), ["a"])
        except Exception as error:  # a damaged tokenizer can make it raise anything
            raise _unusable(folder, f"it takes no image with a text: {first_line(error)}") from error

    @torch.no_grad()
    def forward(self, images: Tensor, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        # Of all to one length, as SigLIP was trained.
        longest = self.config.text_config.max_position_embeddings
        read = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        tokens = {name: read[name].to(images.device) for name in ("input_ids", "attention_mask") if name in read}
        found = self.model.get_image_features(self.prepare(images)), self.model.get_text_features(**tokens)
        # Tensors before transformers 5.
        first, second = (one if isinstance(one, Tensor) else one.pooler_output for one in found)
        return F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1)


class Similarity(TypedDict):
    """Values that do not exist are None."""

    own: float
    own_ci: tuple[float, float] | None
    adds: float | None
    adds_ci: tuple[float, float] | None


def _mean(
    values: NDArray[np.float64], groups: NDArray[np.int64], samples: int, seed: int
) -> tuple[float, tuple[float, float] | None]:
    means = [rows @ values / rows.sum(axis=1) for rows in image_counts(groups, samples, seed)]
    interval = percentile_interval(np.concatenate([np.empty(0), *means]), 0.95) if groups.max() else None
    return float(values.mean()), interval


def similarity(
    images: Tensor,
    texts: Tensor,
    captions: Sequence[str],
    samples: int = 1000,
    seed: int = 0,
    *,
    groups: NDArray[np.int64] | None = None,
) -> Similarity:
    """How near images are to their captions, and how much nearer than to other captions.

    images, texts: (N, d), of length 1; row k is of captions[k].
    own: mean of 100 cos(image, its caption), as CLIPScore of torchmetrics without its cut at 0 (after Hessel et al.
    2021). adds: the same, minus its mean over the captions of `captions` that differ from the image's own: 0 for images
    that do not depend on their captions. Intervals are percentile bootstraps over images, or over groups: (N,), see
    `bootstrap.numbered`.
    Raises ValueError on other shapes, NaN and inf.
    """
    if images.ndim != 2 or images.shape != texts.shape or len(captions) != len(images) or not len(images):
        raise ValueError(
            f"images and texts must be (N, d) of N captions; got {tuple(images.shape)}, {tuple(texts.shape)}, "
            f"{len(captions)}"
        )
    if not (images.isfinite().all() and texts.isfinite().all()):
        raise ValueError("an embedding is NaN or inf")
    images, texts = images.double().cpu(), texts.double().cpu()
    own = 100 * (images * texts).sum(dim=1).numpy()
    _, place, counts = np.unique(np.array(captions, dtype=object).astype(str), return_inverse=True, return_counts=True)
    alike = counts[place]
    others = len(own) - alike
    to_all = 100 * (images @ texts.sum(dim=0)).numpy()
    groups = np.arange(len(own)) if groups is None else groups
    value, interval = _mean(own, groups, samples, seed)
    if not others.all():
        return {"own": value, "own_ci": interval, "adds": None, "adds_ci": None}
    adds, adds_interval = _mean(own - (to_all - alike * own) / others, groups, samples, seed)
    return {"own": value, "own_ci": interval, "adds": adds, "adds_ci": adds_interval}

"""How near a model of images and texts finds images to their captions: the entry `similarity` of metrics.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset
from distill.files import JsonObject
from distill.metrics.image_text import ImageText, Similarity, similarity


def image_text_similarity(
    model: ImageText,
    image: Callable[[int], Tensor],
    captions: Sequence[str],
    dataset: ImageCaptionDataset,
    rows: Sequence[int],
    config: FullEvaluation,
) -> JsonObject:
    """Of images and their captions, beside the real images `rows` of `dataset` and theirs.

    image: place in `captions` -> (3, height, width) in [-1, 1].
    """

    def of(images: Callable[[int], Tensor], texts: Sequence[str]) -> Similarity:
        parts = []
        for start in range(0, len(texts), config.batch_size):
            places = range(start, min(start + config.batch_size, len(texts)))
            pixels = torch.stack([images(k) for k in places]).to(model.prepare.mean.device)
            parts.append(model(pixels, [texts[k] for k in places]))
        both = [torch.cat(side) for side in zip(*parts, strict=True)]
        return similarity(both[0], both[1], texts, config.bootstrap_samples, config.seed)

    made = of(image, captions)
    real = of(lambda k: dataset[rows[k]].pixel_values, [dataset.caption(row) for row in rows])
    reals = {"real": real["own"], "real_ci": real["own_ci"], "real_adds": real["adds"], "real_adds_ci": real["adds_ci"]}
    return {**made, **reals, "images": len(captions), "model": model.name}

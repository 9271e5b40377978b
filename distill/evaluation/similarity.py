"""How near a model of images and texts finds images to their captions: the entry `similarity` of metrics.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset, group_key
from distill.files import JsonObject
from distill.metrics.bootstrap import numbered
from distill.metrics.image_text import ImageText, Similarity, similarity


def image_text_similarity(
    model: ImageText,
    image: Callable[[int], Tensor],
    captions: Sequence[str],
    groups: Sequence[str],
    dataset: ImageCaptionDataset,
    rows: Sequence[int],
    config: FullEvaluation,
) -> JsonObject:
    """Of images and their captions, beside the real images `rows` of `dataset` and theirs.

    image: place in `captions` -> (3, height, width) in [-1, 1]. groups: see `group_key`, of the captions.
    """

    def of(images: Callable[[int], Tensor], texts: Sequence[str], groups: Sequence[str]) -> Similarity:
        parts = []
        for start in range(0, len(texts), config.batch_size):
            places = range(start, min(start + config.batch_size, len(texts)))
            pixels = torch.stack([images(k) for k in places]).to(model.prepare.mean.device)
            parts.append(model(pixels, [texts[k] for k in places]))
        both = [torch.cat(side) for side in zip(*parts, strict=True)]
        samples = config.bootstrap_samples
        return similarity(both[0], both[1], texts, samples, config.seed, groups=numbered(groups))

    made = of(image, captions, groups)
    patients = [group_key(dataset, row) for row in rows]
    real = of(lambda k: dataset[rows[k]].pixel_values, [dataset.caption(row) for row in rows], patients)
    reals = {"real": real["own"], "real_ci": real["own_ci"], "real_adds": real["adds"], "real_adds_ci": real["adds_ci"]}
    return {**made, **reals, "images": len(captions), "model": model.name}

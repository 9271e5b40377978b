"""What rows of the generated data sets show, in a few numbers each; `python tests/goldens/generators.py` writes them
anew.

Checkpoints were trained on these rows and results measured on them, so that a row that changes is another data set:
raise GENERATOR_VERSION with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from distill.data.phantom.dataset import PhantomDataset
from distill.data.pictures import PicturesDataset
from distill.data.sample import ImageCaptionDataset

FILE = Path(__file__).with_suffix(".json")
ROWS = 40


def data_sets() -> dict[str, ImageCaptionDataset]:
    return {
        "phantom": PhantomDataset("test", ROWS, 0, 64),
        "phantom, balanced": PhantomDataset("train", ROWS, 1, 64, captions="stated", placement="balanced"),
        "phantom, affirmed": PhantomDataset("validation", ROWS, 0, 64, captions="affirmed"),
        "pictures": PicturesDataset("train", ROWS, 0, 64),
        "pictures, clear": PicturesDataset("validation", ROWS, 1, 64, True),
    }


def shown(dataset: ImageCaptionDataset, index: int) -> dict[str, Any]:
    """Caption, labels, mean of 4 x 4 parts of the picture, and of each region its area, width and height in pixels."""
    sample = dataset[index]
    parts = F.adaptive_avg_pool2d(sample.pixel_values.mean(dim=0, keepdim=True), 4).flatten()
    regions = {r.finding: [int(r.mask.sum()), *(int(r.mask.any(dim=d).sum()) for d in (0, 1))] for r in sample.regions}
    spread = [float(sample.pixel_values.std()), float(sample.pixel_values.std(dim=0).mean())]
    return {
        "caption": sample.caption,
        "labels": list(sample.labels),
        "pixels": [round(value, 3) for value in [*parts.tolist(), *spread]],
        "regions": regions,
    }


def main() -> None:
    found = {name: [shown(dataset, i) for i in range(ROWS)] for name, dataset in data_sets().items()}
    lines = [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in found.items()]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

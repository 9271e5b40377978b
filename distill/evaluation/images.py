"""Generated images as files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distill.files import write_atomic


def read_png(path: Path) -> torch.Tensor:
    """What `save_png` wrote, (3, height, width) float32 in [0, 1]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def save_png(image: torch.Tensor, path: Path) -> None:
    """image: (3, height, width) in [0, 1]."""
    array = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    write_atomic(path, content.getvalue())

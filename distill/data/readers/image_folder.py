"""A folder of images without metadata, such as another tool draws."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from distill.data.readers.pixels import ONE_COLOUR, eight_bits, is_one_colour, open_image
from distill.data.readers.records import square_pixels
from distill.data_config import Fit
from distill.errors import UserError, raise_all

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".dcm")


class ImageFolder:
    """`count` images of a folder, those with the first hashes of their names, since names are often sorted by source or
    finding; made squares of `resolution` by `fit`, as the images of a data set are.

    names: of the files. left_out: how many more there are. Raises UserError that lists all damaged files, and those
    that hold the same bytes.
    """

    def __init__(self, folder: Path, resolution: int, count: int, fit: Fit = "crop") -> None:
        if not folder.is_dir():
            raise UserError(f"images: '{folder}' is not a folder")
        paths = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
        self.left_out = max(0, len(paths) - count)
        digests = {path: hashlib.sha256(os.fsencode(path.name)).digest() for path in paths}
        paths = sorted(paths, key=digests.__getitem__)[:count]
        if not paths:
            raise UserError(f"images: '{folder}' holds no image; files must end in {', '.join(SUFFIXES)}")
        self.folder, self.paths, self.resolution, self.fit, faults = folder, paths, resolution, fit, []
        seen: dict[str, str] = {}
        for path in paths:
            try:
                data = path.read_bytes()
                picture = eight_bits(open_image(data))
            except UserError as error:
                raise UserError(f"'{path}': {error}") from None
            except Exception as error:  # Pillow and pydicom raise many types
                faults.append(f"'{path.name}' cannot be read as an image: {error}")
                continue
            if is_one_colour(picture):
                faults.append(f"'{path.name}' {ONE_COLOUR}")
            first = seen.setdefault(hashlib.sha256(data).hexdigest(), path.name)
            if first != path.name:
                faults.append(f"'{path.name}' holds the same bytes as '{first}'")
        raise_all(f"the images in '{folder}' have faults", faults)

    @property
    def names(self) -> list[str]:
        return [path.name for path in self.paths]

    def __call__(self, places: Sequence[int]) -> torch.Tensor:
        """(N, 3, resolution, resolution) in [-1, 1]."""
        images = (eight_bits(open_image(self.paths[place].read_bytes())) for place in places)
        return torch.stack([square_pixels(image, self.resolution, self.fit) for image in images])

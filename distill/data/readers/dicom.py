"""DICOM files as gray images, as a viewer first shows them."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from distill.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

_NEEDED = ("Rows", "Columns", "PhotometricInterpretation", "BitsAllocated", "PixelData")
_PERCENTILES = (0.5, 99.5)
"""Black and white of a file without a window, among its pixels; markers and dead pixels lie beyond."""
_DEFLATED = b"1.2.840.10008.1.2.1.99"
"""Transfer syntax of files of which a small one may unpack to any size."""


def is_dicom(data: bytes) -> bool:
    return data[128:132] == b"DICM"


def dicom_image(data: bytes, largest_px: int) -> Image.Image:
    """16-bit gray: black is 0 and white 65535, also for MONOCHROME1, whose values rise from white to black.

    Values are rescaled, and shown through the file's VOI LUT, else its first window. Without either, black and white
    are percentiles of the pixels (_PERCENTILES), padding left out.

    Raises ValueError for what is no single gray picture, UserError without pydicom, and what pydicom raises.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_modality_lut
    except ImportError as error:
        raise UserError("DICOM files need pydicom: pip install 'attention-distill[dicom]'") from error
    if _DEFLATED in data[:4096]:
        raise ValueError("it is packed (deflated); save it with another transfer syntax")
    dataset = dcmread(io.BytesIO(data))
    _check(dataset, largest_px)
    stored = dataset.pixel_array
    least = int(stored.min())
    # Of each value once, not of each pixel: a large picture would take gigabytes.
    values = apply_modality_lut(np.arange(least, int(stored.max()) + 1), dataset)
    shown = _windowed(values, stored, least, dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    table = np.rint(shown * 65535).astype(np.uint16)
    image = Image.fromarray(table[stored.astype(np.int32) - least])
    image.format = "DICOM"
    return image


def _check(dataset: Dataset, largest_px: int) -> None:
    """Raise ValueError for what is no single gray picture that can be decoded here."""
    from pydicom.pixels import get_decoder

    missing = [name for name in _NEEDED if dataset.get(name) is None]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    empty = [name for name in ("RescaleSlope", "RescaleIntercept") if name in dataset and dataset.get(name) is None]
    if empty:
        raise ValueError(f"it has an empty {' and '.join(empty)}; fill it in, or take it out")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise ValueError(f"it holds {frames} frames; save the one that is meant as a file of its own")
    kind = dataset.PhotometricInterpretation
    if kind not in ("MONOCHROME1", "MONOCHROME2"):
        raise ValueError(f"its colours are {kind}; right are MONOCHROME1 and MONOCHROME2")
    if dataset.BitsAllocated > 16:
        raise ValueError(f"a pixel has {dataset.BitsAllocated} bits; right are at most 16")
    if dataset.Rows * dataset.Columns > largest_px:
        raise ValueError(f"{dataset.Columns} x {dataset.Rows} px are more than {largest_px}; shrink it")
    syntax = dataset.file_meta.TransferSyntaxUID
    if not get_decoder(syntax).is_available:
        raise ValueError(f"compressed; install a decoder for pydicom, or save it uncompressed: {syntax.name}")


def _windowed(
    values: NDArray[np.generic], stored: NDArray[np.integer], least: int, dataset: Dataset
) -> NDArray[np.float64]:
    """`values` from 0, black, to 1, white. values: what the stored values from `least` on mean."""
    from pydicom.pixels import apply_voi_lut

    if not np.isfinite(values).all():
        raise ValueError("RescaleSlope or RescaleIntercept is not finite")
    black: float
    white: float
    if dataset.get("VOILUTSequence"):
        entries, first, bits = dataset.VOILUTSequence[0].LUTDescriptor
        entries = entries or 2**16
        if bits == 8 and entries > 256:  # pydicom 3.0 counts the entries in 8 bits too
            raise ValueError(f"its VOI LUT has {entries} entries of 8 bits; right are at most 256")
        values = np.clip(np.rint(values), first, first + entries - 1).astype(np.int64)
        shown, black, white = apply_voi_lut(values, dataset), 0, 2**bits - 1
    else:
        shown = apply_voi_lut(values, dataset)
        if shown is values:
            black, white = _spread(values, stored, least, dataset)
        else:  # what the function makes of the least and the largest value; a negative slope turns them round
            with np.errstate(over="ignore"):
                black, white = apply_voi_lut(np.array([-1e30, 1e30]), dataset)
    if black == white:
        raise ValueError("all its pixels have one value")
    returned: NDArray[np.float64] = np.clip((shown.astype(np.float64) - black) / (white - black), 0, 1)
    return returned


def _spread(
    values: NDArray[np.generic], stored: NDArray[np.integer], least: int, dataset: Dataset
) -> tuple[float, float]:
    """Values that are black and white where the file does not say."""
    padding = dataset.get("PixelPaddingValue")
    pixels = stored if padding is None or (stored == padding).all() else stored[stored != padding]
    found = values[np.percentile(pixels, _PERCENTILES, method="nearest").astype(np.int64) - least].astype(np.float64)
    black, white = float(found.min()), float(found.max())
    return (black, white) if black < white else (float(np.min(values)), float(np.max(values)))

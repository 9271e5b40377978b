"""DICOM files as data: their pixels against the definition, one by one, and what is refused."""

from __future__ import annotations

import io
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import torch
from data_options import data_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate

from distill.data.readers.dicom import dicom_image
from distill.data.readers.folder import FolderDataset
from distill.data.readers.image_folder import ImageFolder
from distill.errors import UserError

SIDE, WIDE = 10, 1024
STORED = np.arange(SIDE * SIDE, dtype=np.uint16).reshape(SIDE, SIDE) * 37 + 100
SIGNED = (STORED.astype(np.int32) - 2000).astype(np.int16)
LUT = [(k * k) // 16 for k in range(256)]


def dicom(pixels: np.ndarray, syntax: str = pydicom.uid.ExplicitVRLittleEndian, **tags: Any) -> bytes:
    """A file with these stored values, of 12 bits where they have no sign."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.Rows, dataset.Columns = pixels.shape[:2]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    content = io.BytesIO()
    if meta.TransferSyntaxUID.is_encapsulated:
        dataset["PixelData"].is_undefined_length = True
    dataset.save_as(content, enforce_file_format=True)
    return content.getvalue()


def voi_lut(first: int, bits: int = 12, data: list[int] = LUT) -> list[Dataset]:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(data), first, bits])
    item.add_new("LUTData", "US", data)
    return [item]


def read(content: bytes) -> np.ndarray:
    return np.asarray(dicom_image(content, 2**26)).astype(int)


def line(x: float, center: float, width: float) -> float:
    """LINEAR of the standard, PS3.3 C.11.2.1.2.1, from 0 to 1."""
    if x <= center - 0.5 - (width - 1) / 2:
        return 0
    return 1 if x > center - 0.5 + (width - 1) / 2 else (x - (center - 0.5)) / (width - 1) + 0.5


def clamped(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def ranked(values: list[int], black: float = 0.005, white: float = 0.995) -> tuple[int, int]:
    ordered = sorted(values)
    return tuple(ordered[round(share * (len(ordered) - 1))] for share in (black, white))  # type: ignore[return-value]


LOW, HIGH = ranked(STORED.flatten().tolist())
WINDOW = {"WindowCenter": 1500, "WindowWidth": 800}
RESCALED = {"RescaleSlope": 2.5, "RescaleIntercept": -1000}
CASES: dict[str, tuple[np.ndarray, dict[str, Any], Any]] = {
    "window": (STORED, WINDOW, lambda v: line(v, 1500, 800)),
    "window beyond the pixels": (STORED, {"WindowCenter": 5000, "WindowWidth": 9000}, lambda v: line(v, 5000, 9000)),
    "first of several windows": (
        STORED, {"WindowCenter": [1500, 9], "WindowWidth": [800, 3]}, lambda v: line(v, 1500, 800),
    ),
    "exact": (STORED, WINDOW | {"VOILUTFunction": "LINEAR_EXACT"}, lambda v: clamped((v - 1500) / 800 + 0.5)),
    "sigmoid": (
        STORED, WINDOW | {"VOILUTFunction": "SIGMOID"}, lambda v: 1 / (1 + math.exp(-4 * (v - 1500) / 800)),
    ),
    "rescaled": (STORED, WINDOW | RESCALED, lambda v: line(2.5 * v - 1000, 1500, 800)),
    "negative slope": (
        STORED, WINDOW | {"RescaleSlope": -1, "RescaleIntercept": 4095}, lambda v: line(4095 - v, 1500, 800),
    ),
    "signed": (SIGNED, {"WindowCenter": -200, "WindowWidth": 600}, lambda v: line(v, -200, 600)),
    "inverted": (STORED, WINDOW | {"PhotometricInterpretation": "MONOCHROME1"}, lambda v: 1 - line(v, 1500, 800)),
    "no window": (STORED, {}, lambda v: clamped((v - LOW) / (HIGH - LOW))),
    "no window, rescaled": (STORED, RESCALED, lambda v: clamped((v - LOW) / (HIGH - LOW))),
    "no window, negative slope": (
        STORED, {"RescaleSlope": -1, "RescaleIntercept": 0}, lambda v: 1 - clamped((v - LOW) / (HIGH - LOW)),
    ),
    "no window, inverted": (
        STORED, {"PhotometricInterpretation": "MONOCHROME1"}, lambda v: 1 - clamped((v - LOW) / (HIGH - LOW)),
    ),
    "empty window": (STORED, {"WindowCenter": None, "WindowWidth": None}, lambda v: clamped((v - LOW) / (HIGH - LOW))),
    "lut": (
        STORED, WINDOW | {"VOILUTSequence": voi_lut(1000)}, lambda v: LUT[min(max(v - 1000, 0), 255)] / 4095,
    ),
    "lut of rescaled values": (
        STORED, {"RescaleSlope": 0.5, "RescaleIntercept": -100, "VOILUTSequence": voi_lut(500)},
        lambda v: LUT[min(max(round(0.5 * v - 100) - 500, 0), 255)] / 4095,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_pixel_is_what_the_standard_says(name: str) -> None:
    stored, tags, expected = CASES[name]
    empty = {tag: "" for tag, value in tags.items() if value is None}
    found = read(dicom(stored, **{**tags, **empty}))
    for i in range(SIDE):
        for j in range(SIDE):
            assert abs(found[i, j] - 65535 * expected(int(stored[i, j]))) <= 0.5001, (i, j)
    assert len(np.unique(found)) > 6


def test_values_beyond_all_whole_numbers_are_the_last_of_the_lut() -> None:
    found = read(dicom(STORED, RescaleSlope="1e17", RescaleIntercept="0", VOILUTSequence=voi_lut(500)))
    assert (found[STORED > 0] == round(65535 * LUT[-1] / 4095)).all()


def test_packed_pixels_are_the_same() -> None:
    dataset = pydicom.dcmread(io.BytesIO(dicom(STORED, **WINDOW)))
    dataset.compress(pydicom.uid.RLELossless)
    content = io.BytesIO()
    dataset.save_as(content)
    assert (read(content.getvalue()) == read(dicom(STORED, **WINDOW))).all()


def test_padding_does_not_count_for_black_and_white() -> None:
    stored = STORED.copy()
    stored[:2] = 0
    low, high = ranked(STORED[2:].flatten().tolist())
    for tags, least in (({"PixelPaddingValue": 0}, low), ({}, 0)):
        found = read(dicom(stored, **tags))
        middle = int(stored[5, 5])
        assert found[5, 5] == round(65535 * (middle - least) / (high - least)) and (found[:2] == 0).all()


def test_a_few_extreme_pixels_do_not_darken_a_picture_without_a_window() -> None:
    stored = np.tile(np.linspace(1000, 1400, 40).astype(np.uint16), (40, 1))
    stored[0, :4] = 4095
    assert read(dicom(stored))[20, -1] > 65000
    stored[:, :] = 7
    stored[0, 0] = 9
    assert sorted(np.unique(read(dicom(stored)))) == [0, 65535], "one pixel differs"


def load(root: Path, name: str = "a.dcm", **columns: str) -> FolderDataset:
    header, values = ",".join(["file_name", "text", *columns]), ",".join([name, "small effusion", *columns.values()])
    (root / "metadata.csv").write_text(f"{header}\n{values}\n")
    options: dict[str, Any] = {"kind": "folder", "root": str(root), "resolution": SIDE, "test_split": "all"}
    return FolderDataset(data_options(**options), "test")


def test_a_folder_and_a_set_of_images_hold_dicom_files(tmp_path: Path) -> None:
    (tmp_path / "a.dcm").write_bytes(dicom(STORED, **WINDOW))
    dataset = load(tmp_path, finding="effusion", bbox='"0,0,5,10"')
    pixels = dataset[0].pixel_values
    assert dataset[0].regions[0].boxes == ((0, 0, 5, 10),) and dataset[0].original_size == (SIDE, SIDE)
    for i in range(SIDE):
        for j in range(SIDE):
            gray = math.floor(round(65535 * line(int(STORED[i, j]), 1500, 800)) / 257 + 0.5)
            assert pixels[:, i, j].tolist() == pytest.approx([gray / 127.5 - 1] * 3, abs=1e-6)
    assert (ImageFolder(tmp_path, SIDE, 3)([0])[0] == pixels).all()


REFUSED: dict[str, tuple[bytes, str]] = {
    "frames": (dicom(STORED, NumberOfFrames=2, PixelData=STORED.tobytes() * 2), "it holds 2 frames"),
    "colours": (dicom(STORED, PhotometricInterpretation="RGB"), "its colours are RGB; right are MONOCHROME1"),
    "bits": (dicom(STORED.astype(np.uint32), BitsAllocated=32), "a pixel has 32 bits; right are at most 16"),
    "no pixels": (dicom(STORED, PixelData=None), "it has no PixelData"),
    "no size": (dicom(STORED, Rows=None, Columns=None), "it has no Rows, Columns"),
    "large": (dicom(STORED, Rows=60000, Columns=60000), "60000 x 60000 px are more than"),
    "short": (dicom(STORED, PixelData=STORED.tobytes()[:50]), "bytes of pixel data is less"),
    "cut off": (dicom(STORED)[:-60], "bytes of pixel data is less"),
    "only a head": (dicom(STORED)[:140], "it has no Rows"),
    "noise": (b"\0" * 128 + b"DICM" + bytes(range(256)), "it has no Rows"),
    "packed": (dicom(STORED, pydicom.uid.DeflatedExplicitVRLittleEndian), "it is packed (deflated)"),
    "compressed": (
        dicom(STORED, pydicom.uid.JPEGLosslessSV1, PixelData=encapsulate([b"packed"])),
        "compressed; install a decoder for pydicom, or save it uncompressed: JPEG",
    ),
    "one value": (dicom(np.full((SIDE, SIDE), 7, np.uint16)), "all its pixels have one value"),
    "slope that is no number": (
        dicom(STORED, RescaleSlope="1.5", RescaleIntercept=0).replace(b"1.5 ", b"nan "), "RescaleSlope or",
    ),
    "empty slope": (
        dicom(STORED, RescaleSlope="", RescaleIntercept=0), "it has an empty RescaleSlope; fill it in, or take it out",
    ),
    "slope of 0": (dicom(STORED, RescaleSlope=0, RescaleIntercept=1, **WINDOW), "all its pixels have one value"),
    "narrow window": (dicom(STORED, WindowCenter=9, WindowWidth=0), "Window Width must be greater than"),
    "long lut": (
        dicom(STORED, VOILUTSequence=voi_lut(0, 8, [k // 2 for k in range(512)])), "512 entries of 8 bits",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_cannot_be_read_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.dcm").write_bytes(REFUSED[name][0])
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert "metadata.csv row 2: image 'a.dcm' " in str(caught.value) and REFUSED[name][1] in str(caught.value)
    with pytest.raises(UserError, match=r"'a\.dcm' cannot be read"):
        ImageFolder(tmp_path, SIDE, 3)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(132, 900), st.binary(min_size=1, max_size=8))
def test_damaged_files_are_read_or_refused(tmp_path: Path, place: int, damage: bytes) -> None:
    whole = bytearray(dicom(STORED, **WINDOW, **RESCALED))
    whole[place : place + len(damage)] = damage
    (tmp_path / "a.dcm").write_bytes(whole)
    try:
        dataset = load(tmp_path)
    except UserError as error:
        assert "image 'a.dcm' " in str(error)
    else:
        assert torch.isfinite(dataset[0].pixel_values).all()


def test_without_pydicom_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.dcm").write_bytes(dicom(STORED))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    for read_it in (lambda: load(tmp_path), lambda: ImageFolder(tmp_path, SIDE, 3)):
        with pytest.raises(
            UserError, match=r"a\.dcm': DICOM files need pydicom: pip install 'attention-distill\[dicom"
        ):
            read_it()


def test_a_mask_is_no_dicom_file(tmp_path: Path) -> None:
    Image.new("L", (SIDE, SIDE), 9).save(tmp_path / "a.png")
    (tmp_path / "m.dcm").write_bytes(dicom(STORED))
    with pytest.raises(UserError, match=r"mask 'm\.dcm' is a DICOM file, whose values are windowed"):
        load(tmp_path, "a.png", finding="effusion", mask="m.dcm")


def test_every_value_of_sixteen_bits_is_rounded_to_the_nearest_gray(tmp_path: Path) -> None:
    """PNG files: 65535 is white, nothing is cut off at 255 or 4095."""
    values = np.arange(65536).reshape(256, 256)
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "a.png")
    grays = (ImageFolder(tmp_path, 256, 1)([0])[0, 0].numpy() + 1) * 127.5
    assert np.abs(grays - values / 257).max() <= 0.5 + 1e-3 and len(np.unique(grays.round())) == 256

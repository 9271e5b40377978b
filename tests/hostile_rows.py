"""A table of hostile rows for every reader of data: field x value, and what must come of it."""

from __future__ import annotations

import csv
import io
import json
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

SIZE = (40, 30)
TALL = "x" * 5000


@dataclass(frozen=True)
class Refused:
    """One UserError that has all of these parts; {place} is the file and row of the layout."""

    parts: tuple[str, ...]


@dataclass(frozen=True)
class Accepted:
    """The values that the first sample must have, of: id, caption, labels, findings, boxes, inside (pixels of the
    mask)."""

    values: dict[str, Any] = field(default_factory=dict)


Expected = Refused | Accepted


@dataclass(frozen=True)
class HostileRow:
    """change: of the layout's entries. files: written besides. data: of the layout's file, in place of its own
    bytes."""

    layout: str
    name: str
    expected: Expected
    change: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    data: Callable[[bytes], bytes] | None = None

    @property
    def id(self) -> str:
        return f"{self.layout}-{self.name}"


@dataclass(frozen=True)
class Layout:
    """One format of files. options: of the configuration. fields: what is asked of a format -> entry that holds it."""

    options: dict[str, Any]
    file: str
    place: str
    fields: dict[str, str]
    text_only: bool = True


FOLDER = {"kind": "folder"}
MSCXR = {"kind": "mscxr", "caption_source": "phrase"}
COCO = {"kind": "coco", "image_dir": ".", "instances_file": "instances.json"}
LAYOUTS = {
    "folder.csv": Layout(
        FOLDER | {"metadata_file": "metadata.csv"}, "metadata.csv", "metadata.csv row 2",
        {"path": "file_name", "caption": "text", "split": "split", "finding": "finding", "box": "bbox", "mask": "mask",
         "labels": "labels", "patient": "patient", "phrase": "phrase"},
    ),
    "folder.jsonl": Layout(
        FOLDER | {"metadata_file": "metadata.jsonl"}, "metadata.jsonl", "metadata.jsonl row 1",
        {"path": "file_name", "caption": "text", "split": "split", "finding": "finding", "box": "bbox", "mask": "mask",
         "labels": "labels", "patient": "patient", "phrase": "phrase"},
        text_only=False,
    ),
    "mimic": Layout(
        {"kind": "mimic", "metadata_file": "mimic.csv"}, "mimic.csv", "mimic.csv row 2",
        {"path": "path", "caption": "impression", "split": "split", "labels": "Finding Labels", "patient": "subject_id"},
    ),
    "mscxr.csv": Layout(
        MSCXR | {"metadata_file": "boxes.csv"}, "boxes.csv", "boxes.csv row 2",
        {"path": "path", "caption": "label_text", "finding": "category_name", "width": "image_width",
         "height": "image_height", "x": "x", "w": "w"},
    ),
    "mscxr.joined": Layout(
        MSCXR | {"metadata_file": "joined.csv", "caption_source": "impression"}, "joined.csv", "joined.csv row 2",
        {"path": "paths", "caption": "label_text", "finding": "category_name", "width": "image_width", "box": "bboxxywh"},
    ),
    "mscxr.json": Layout(
        MSCXR | {"metadata_file": "boxes.json"}, "boxes.json", "boxes.json",
        {"path": "images.path", "caption": "annotations.label_text", "finding": "categories.name", "width": "images.width",
         "box": "annotations.bbox", "id": "images.id", "image_id": "annotations.image_id",
         "category_id": "annotations.category_id"},
        text_only=False,
    ),
    "coco.captions": Layout(
        COCO | {"captions_file": "captions.json"}, "captions.json", "captions.json",
        {"caption": "annotations.caption", "path": "images.file_name", "id": "images.id",
         "image_id": "annotations.image_id"},
        text_only=False,
    ),
    "coco.instances": Layout(
        COCO | {"captions_file": "captions.json"}, "instances.json", "instances.json",
        {"finding": "categories.name", "width": "images.width", "height": "images.height", "box": "annotations.bbox",
         "id": "annotations.id", "image_id": "annotations.image_id", "category_id": "annotations.category_id",
         "segmentation": "annotations.segmentation", "path": "images.file_name"},
        text_only=False,
    ),
    "coco.csv": Layout(
        COCO | {"captions_file": "captions.csv"}, "captions.csv", "captions.csv row 2",
        {"path": "path", "caption": "captions", "split": "split"},
    ),
}  # fmt: skip


def entries_of(layout: str) -> Any:
    """Rows of a table, or a document of JSON. The first is the one that is changed; all are test rows but the last."""
    if layout.startswith("folder"):
        usual = {"phrase": "", "labels": "", "mask": ""}
        return [
            usual | {"file_name": "a.png", "text": "An effusion.", "split": "test", "patient": "p1", "finding": "effusion",
                     "bbox": "5,5,9,9"},
            usual | {"file_name": "b.png", "text": "Edema.", "split": "test", "patient": "p2", "finding": "", "bbox": ""},
            usual | {"file_name": "c.png", "text": "Clear.", "split": "train", "patient": "p3", "finding": "", "bbox": ""},
        ]  # fmt: skip
    if layout == "mimic":
        return [
            {"dicom_id": n, "subject_id": f"p{n}", "path": f"{n}.png", "split": "1" if n == "c" else "0",
             "impression": "An effusion.", "Finding Labels": "Pleural Effusion"}
            for n in "abc"
        ]  # fmt: skip
    box = {"x": "5", "y": "5", "w": "9", "h": "9"}
    frame = {"image_width": "40", "image_height": "30"}
    if layout == "mscxr.csv":
        return [
            {
                "dicom_id": n,
                "category_name": "Effusion",
                "label_text": "an effusion",
                **box,
                **frame,
                "path": f"{n}.png",
            }
            for n in "ab"
        ]
    if layout == "mscxr.joined":
        return [
            {"dicom_id": n, "paths": f"{n}.png", "category_name": "Effusion", "label_text": "An effusion.", **frame,
             "bboxxywh": "5-5-9-9"}
            for n in "ab"
        ]  # fmt: skip
    if layout == "coco.csv":
        return [
            {"path": f"{n}.png", "captions": "A dog.", "split": "1" if n == "c" else "0", "segmentation_path": ""}
            for n in "abc"
        ]
    images = [{"id": i, "file_name": f"{n}.png", "width": 40, "height": 30} for i, n in ((1, "a"), (2, "b"))]
    if layout == "coco.captions":
        captions = [{"id": i + 10, "image_id": i, "caption": "A dog."} for i in (1, 2)]
        return {"images": images, "annotations": captions}
    if layout == "coco.instances":
        square = [[5, 5, 14, 5, 14, 14, 5, 14]]
        boxes = [
            {"id": 20 + i, "image_id": i, "category_id": 7, "bbox": [5, 5, 9, 9], "segmentation": square}
            for i in (1, 2)
        ]
        return {"images": images, "annotations": boxes, "categories": [{"id": 7, "name": "dog"}]}
    assert layout == "mscxr.json"
    texts = [
        {"id": 20 + i, "image_id": i, "category_id": 7, "bbox": [5, 5, 9, 9], "label_text": "an effusion"}
        for i in (1, 2)
    ]
    return {
        "images": [image | {"path": image["file_name"]} for image in images],
        "annotations": texts,
        "categories": [{"id": 7, "name": "effusion"}],
    }


def place_of(layout: str, where: str) -> str:
    """File and row of the entry that is changed, as messages say it."""
    places = {
        ("mscxr.json", "annotations"): "annotation 21", ("mscxr.json", "images"): "image 1",
        ("mscxr.json", "categories"): "category 7", ("coco.captions", "annotations"): "annotation 11",
        ("coco.captions", "images"): "image 1", ("coco.instances", "annotations"): "annotation 21",
        ("coco.instances", "images"): "image 1", ("coco.instances", "categories"): "category 7",
    }  # fmt: skip
    found = places.get((layout, where.split(".")[0]))
    return LAYOUTS[layout].place + (f" {found}" if found else "")


# --- values of fields ---------------------------------------------------------------------------------------------

NOT_TEXT = {
    "true": True,
    "5": 5,
    "nan": float("nan"),
    "inf": float("inf"),
    "list": ["a"],
    "object": {"a": 1},
    "deep": [[[[[]]]]],
}
"""Values of JSON that a CSV cannot hold."""
MISSING = ("NaN", "nan", "None", "NULL", "<NA>", "N/A")
INVISIBLE = {
    "zero-width": "\u200b\u200b",
    "bom": "\ufeff",
    "soft hyphen": "\u00ad",
    "spaces": " \u3000\u2009",
    "hangul": "\u3164",
}


def captions(layout: Layout, where: str) -> Iterator[tuple[str, Any, Expected]]:
    for text in ("", *MISSING, "true", "FALSE"):
        yield text or "empty", text, Refused(("{place}", where, f"'{text}'" if text else "is empty"))
    for name, text in INVISIBLE.items():
        yield name, text, Refused(("{place}", f"{where} is empty"))
    for text in ("A dog, an effusion " + TALL, "=cmd('dog')", "dog \U0001fac1 é", "dog; DROP TABLE", "1 dog"):
        yield text[:12], text, Accepted({"caption": text})
    if layout.text_only:
        return
    for name, value in NOT_TEXT.items():
        yield f"json {name}", value, Refused(("{place}", f"{where} must be text"))
    yield "null", None, Refused(("{place}", f"{where} is empty"))
    for letter in ("\0", "\ud800"):
        yield (
            ascii(letter),
            letter + "effusion",
            Refused(("{place}", "a character that is no text", ascii(letter)[1:-1])),
        )


def paths(layout: Layout, where: str) -> Iterator[tuple[str, Any, Expected]]:
    leaves = "leaves the data folder"
    for name in ("/etc/passwd", "../outside.png", "/dev/zero", "../../a.png", "b/../../outside.png"):
        yield name, name, Refused(("{place}", f"'{name}'", leaves))
    # The images of COCO's captions must be among those of its instances, so that no file is opened for a wrong name.
    unlisted = "is none of the images of instances.json" if layout.options["kind"] == "coco" else ""
    for name in ("missing.png", "A.PNG", "*.png", "http://x/a.png", "C:\\a.png", "~/a.png", "$HOME/a.png", "%61.png"):
        yield name, name, Refused((layout.file, unlisted or "cannot be opened", name.split("/")[-1]))
    for name, part in {
        "link.png": "link", "loop.png": "", "folder": "is not a file", "fifo.png": "is not a file", "zero.png": "0 bytes",
        "text.png": "is no image that can be read", "device.png": "",
    }.items():  # fmt: skip
        yield name, name, Refused((layout.file, name, unlisted or part))
    yield "long", TALL + ".png", Refused(("xxx…",))
    if where != "path" or layout.text_only:  # MS-CXR's JSON has file_name besides
        yield "empty", "", Refused(("{place}", f"{where} is empty"))
    yield "control", "a\x1b[31m.png", Refused(("\\x1b[31m",))
    yield "dots", "./b/../a.png", Accepted({"name": "a.png"})
    yield "spaces around", " a.png ", Accepted({"name": "a.png"})
    if not layout.text_only:
        for name, value in NOT_TEXT.items():
            if name != "5":
                yield f"json {name}", value, Refused(("{place}", f"{where} must be text"))
        yield "nul", "a.png\0", Refused(("{place}", "a character that is no text", "\\x00"))
        yield "number", 5, Refused(("'5'", unlisted or "cannot be opened"))


NUMBERS = {
    "nan": "nan", "inf": "inf", "-inf": "-inf", "1e400": "1e400", "1_0": "1_0", "arabic": "\u0661\u0662", "true": "true",
    "none": "None", "hex": "0x10", "words": "five", "minus": "-9", "huge": "9" * 400, "far": "1e9", "fullwidth": "\uff15",
}  # fmt: skip
"""Texts that are no x of a box within the image."""


def boxes(layout: Layout, where: str) -> Iterator[tuple[str, Any, Expected]]:
    joined = where == "bboxxywh"
    dash = "-" if joined else ","
    for name, text in NUMBERS.items():
        yield f"x {name}", dash.join((text, "5", "9", "9")), Refused(("{place}", "box"))
    for name, text in {
        "three": "5,5,9", "five": "5,5,9,9,9", "swapped corners": "30,20,-9,-9", "no width": "5,5,0,9", "no height": "5,5,9,0",
        "outside": "35,25,9,9", "spaces": "5 5 9 9", "json text": "[5,5,9,9]", "no numbers": "a,b,c,d", "commas": ",,,",
    }.items():  # fmt: skip
        yield name, text.replace(",", dash), Refused(("{place}", "box"))
    yield "decimals", "5.0,5,9.0,9".replace(",", dash), Accepted({"inside": 81})
    yield "a pixel outside", "31,5,10,9".replace(",", dash), Accepted({"boxes": 1})


def json_boxes(layout: Layout, where: str) -> Iterator[tuple[str, Any, Expected]]:
    for name, x in (
        NOT_TEXT | {"text": "five", "1_0": "1_0", "arabic": "\u0661", "null": None, "huge": 10**400}
    ).items():
        if name != "5":
            yield f"x {name}", [x, 5, 9, 9], Refused(("{place}", "box"))
    for name, value in {
        "three": [5, 5, 9], "five": [5, 5, 9, 9, 9], "swapped corners": [30, 20, -9, -9], "outside": [35, 25, 9, 9],
        "object": {"x": 5}, "number": 5, "true": True, "words": "five", "nested": [[[5, 5, 9, 9]]],
    }.items():  # fmt: skip
        yield name, value, Refused(("{place}", "box"))
    yield "decimals", [5.0, 5, 9.0, 9], Accepted({"inside": 81})


def sides(layout: Layout, where: str) -> Iterator[tuple[str, Any, Expected]]:
    for text in ("", "0", "-40", "nan", "inf", "1e400", "4_0", "40.5", "\u0664\u0660", "forty", "None", "9" * 400):
        yield text[:9] or "empty", text, Refused(("{place}", where))
    yield "another", "80", Refused(("image 'a.png'", "another aspect"))
    yield "enormous", "40000000000", Refused(("{place}", where))
    yield "a float", "30.0" if "height" in where else "40.0", Accepted({"boxes": 1})
    if not layout.text_only:
        for name, value in NOT_TEXT.items():
            if name != "5":
                yield f"json {name}", value, Refused(("{place}", where))


def ids(layout: Layout, where: str) -> Iterator[tuple[str, Any, Expected]]:
    for name, value in (NOT_TEXT | {"text": "1", "null": None, "float": 1.0, "huge": 10**30, "minus": -1}).items():
        if name in ("5", "huge", "minus") and where == "id" and layout.fields["id"].startswith("annotations"):
            yield name, value, Accepted({"boxes": 1})  # any whole number is an id
        else:
            yield name, value, Refused((layout.file, "1" if name in ("5", "huge", "minus") else where))


def findings(layout: Layout, where: str) -> Iterator[tuple[str, Any, Expected]]:
    for text in ("", *MISSING, *INVISIBLE.values()):
        yield ascii(text), text, Refused(("{place}", where))
    if not layout.text_only:
        for name, value in NOT_TEXT.items():
            if name == "5" or (name == "list" and where == "finding"):
                continue
            yield f"json {name}", value, Refused(("{place}", where))


def splits(layout: Layout, where: str) -> Iterator[tuple[str, Any, Expected]]:
    for text in ("Test", "TEST", "nan", "None", "true"):
        yield text, text, Refused(("{place}", where, f"'{text}'"))
    for text in ("tests", "5", "-1", "\u0660", "0.5", "all"):
        # A folder may have further splits, of which the first line of output tells.
        other = (
            Accepted({"name": "b.png"})
            if layout.file.startswith("metadata")
            else Refused(("{place}", where, f"'{text}'"))
        )
        yield text, text, other
    yield "spaces", " test ", Accepted({"name": "a.png"})


def labels(layout: Layout, where: str) -> Iterator[tuple[str, Any, Expected]]:
    for text in (
        "['effusion', 'edema']",
        "[effusion]",
        "{'effusion': 1}",
        "nan",
        "None",
        '["effusion"]',
        "effusion|nan",
    ):
        yield text, text, Refused(("{place}", where))
    for text, value in {
        "effusion||edema": ("effusion", "edema"),
        "|": (),
        " edema | edema ": ("edema",),
        "a, b": ("a, b",),
    }.items():
        boxed = ("effusion",) if "box" in layout.fields and "effusion" not in value else ()  # the row has a box of it
        yield text, text, Accepted({"labels": (*value, *boxed)})
    if not layout.text_only:
        for name, value in NOT_TEXT.items():
            if name not in ("5", "list"):
                yield f"json {name}", value, Refused(("{place}", where))
        for name, value in {"numbers": [True], "nested": [["effusion"]], "nan": [float("nan")], "object": [{}]}.items():
            yield f"list of {name}", value, Refused(("{place}", where))
        yield "list", ["effusion", "edema"], Accepted({"labels": ("effusion", "edema")})


def patients(layout: Layout, where: str) -> Iterator[tuple[str, Any, Expected]]:
    # Patient of the image of the other split. In mimic it is not read that images without a patient are alike.
    other = "p3" if where == "patient" else "pc"
    for text in (other, f" {other} ", f"{other}.0"):
        yield text, text, Refused((f"patient '{other}'", "split test", "split train"))
    for text in MISSING:
        yield text, text, Refused(("{place}", where, f"'{text}'"))
    yield "empty", "", Accepted({"name": "a.png"})
    yield "long", TALL, Accepted({"name": "a.png"})


def segmentations(layout: Layout, where: str) -> Iterator[tuple[str, Any, Expected]]:
    square = [5, 5, 14, 5, 14, 14, 5, 14]
    for name, value in {
        "text": "polygon", "number": 5, "true": True, "flat": square, "two points": [[5, 5, 9, 9]], "odd": [square[:7]],
        "texts": [["5"] * 6], "outside": [[5, 5, 95, 5, 9, 9]], "negative": [[-5, 5, 9, 5, 9, 9]], "nan": [[float("nan")] * 6],
        "inf": [[float("inf")] * 6], "huge": [[10**400] * 6], "nested": [[[5, 5]] * 3], "null point": [[None] * 6],
        "run lengths too few": {"size": [30, 40], "counts": [5, 5]}, "of another size": {"size": [40, 30], "counts": [1200]},
        "negative run": {"size": [30, 40], "counts": [1210, -10]}, "float runs": {"size": [30, 40], "counts": [1200.0]},
        "no size": {"counts": [1200]}, "no counts": {"size": [30, 40]}, "text cut off": {"size": [30, 40], "counts": "`"},
        "text of other letters": {"size": [30, 40], "counts": "\u0661~"}, "true runs": {"size": [30, 40], "counts": [True]},
        "huge run": {"size": [30, 40], "counts": [10**400]}, "empty object": {},
    }.items():  # fmt: skip
        yield name, value, Refused(("{place}", "segmentation"))
    for name, value in {"null": None, "empty": []}.items():
        yield name, value, Accepted({"inside": 81})  # its box counts
    yield "no area", [[5, 5, 9, 5, 7, 5]], Accepted({"findings": ()})
    yield "many polygons", [[0, 0, 40, 0, 40, 30, 0, 30]] * 100_000, Accepted({"inside": 900})
    yield "many points", [[5, 5, 14, 5, 14, 14, 5, 14] * 25_001], Accepted({"boxes": 1})
    yield "many runs", {"size": [30, 40], "counts": [0, 1] * 600}, Refused(("{place}", "add up to"))


FIELDS: dict[str, Callable[[Layout, str], Iterator[tuple[str, Any, Expected]]]] = {
    "caption": captions, "path": paths, "width": sides, "height": sides, "id": ids, "image_id": ids, "category_id": ids,
    "finding": findings, "split": splits, "labels": labels, "patient": patients, "segmentation": segmentations,
}  # fmt: skip


def field_rows() -> Iterator[HostileRow]:
    for name, layout in LAYOUTS.items():
        for what, where in layout.fields.items():
            makers = [FIELDS[what]] if what in FIELDS else []
            if what == "box":
                makers = ([boxes] if layout.text_only or where == "bbox" else []) + (
                    [] if layout.text_only else [json_boxes]
                )
            if what == "path" and name == "coco.instances":
                continue  # compared with the captions' paths, and not read
            place = place_of(name, where)
            for make in makers:
                for value_name, value, expected in make(layout, where.split(".")[-1]):
                    kind = " of JSON" if make is json_boxes else ""
                    yield HostileRow(name, f"{where}{kind} {value_name}"[:60], at(expected, place), {where: value})
            if what in ("x", "w"):
                for value_name, text in NUMBERS.items():
                    yield HostileRow(name, f"{where} {value_name}", Refused((place, "box")), {where: text})


def at(expected: Expected, place: str) -> Expected:
    if isinstance(expected, Accepted):
        return expected
    return Refused(tuple(part.replace("{place}", place) for part in expected.parts))


# --- pictures and masks -------------------------------------------------------------------------------------------


def picture(
    mode: str = "L", size: tuple[int, int] = SIZE, file_type: str = "PNG", value: int | None = None, **save: Any
) -> bytes:
    ramp = np.linspace(1, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    image = Image.fromarray(ramp if value is None else np.full_like(ramp, value))
    image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    return saved(image, file_type, **save)


def saved(image: Image.Image, file_type: str, **save: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_type, **save)
    return file.getvalue()


def claims(width: int, height: int) -> bytes:
    """A PNG that says how large it is, and holds one byte."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(size=(30, 40), file_type="JPEG", exif=exif)


PICTURES: dict[str, tuple[bytes, str | None]] = {
    "empty": (b"", "0 bytes"),
    "text": (b"no picture", "is no image"),
    "html": (b"<html>", "is no image"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is no image"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n", "is no image"),
    "pdf": (b"%PDF-1.4\n", "is no image"),
    "dicom": (b"\0" * 128 + b"DICM" + b"\0" * 64, "it has no Rows"),
    "gzip": (b"\x1f\x8b\x08" + b"\0" * 20, "is no image"),
    "numpy": (b"\x93NUMPY\x01\0" + b" " * 60, "is no image"),
    "icon": (picture(file_type="ICO", sizes=[(32, 24)]), "is no image"),
    "signature": (picture()[:8], "is no image"),
    "truncated png": (picture()[:120], "cannot be decoded"),
    "truncated jpeg": (picture(file_type="JPEG")[:380], "cannot be decoded"),
    "truncated gif": (picture(file_type="GIF")[:1200], "cannot be decoded"),
    "truncated tiff": (picture(file_type="TIFF")[:300], ""),
    "damaged png": (picture()[:60] + b"\0" * 30 + picture()[90:], "cannot be decoded"),
    "png without pixels": (claims(40, 30), "cannot be decoded"),
    "bomb": (claims(10_000, 9_999), "10000 x 9999 px are more than"),
    "larger bomb": (claims(60_000, 60_000), "cannot be decoded"),
    "largest bomb": (claims(2**31 - 1, 2**31 - 1), ""),
    "no width": (claims(0, 30), ""),
    "animated gif": (
        picture(file_type="GIF", save_all=True, append_images=[Image.new("L", SIZE, 9)]), "it holds 2 pictures",
    ),
    "animated png": (
        picture(file_type="PNG", save_all=True, append_images=[Image.new("L", SIZE, 9)]), "it holds 2 pictures",
    ),
    "pages of tiff": (
        picture(file_type="TIFF", save_all=True, append_images=[Image.new("L", SIZE, 9)]), "it holds 2 pictures",
    ),
    "floats": (picture("F", file_type="TIFF"), "floating point"),
    "32 bits": (saved(Image.fromarray(np.full((30, 40), 70_000, np.int32)), "TIFF"), "do not fit 16 bits"),
    "a pixel": (picture(size=(1, 1)), "1 x 1 px"),
    "a line": (picture(size=(1, 10_000)), "1 x 10000 px"),
    **{mode: (picture(mode), None) for mode in ("1", "P", "LA", "RGB", "RGBA", "I;16")},
    "cmyk": (picture("CMYK", file_type="JPEG"), None),
    "progressive": (picture("RGB", file_type="JPEG", progressive=True), None),
    "gif": (picture(file_type="GIF"), None),
    "bmp": (picture("RGB", file_type="BMP"), None),
    "webp": (picture("RGB", file_type="WEBP"), None),
    "tiff": (picture("RGB", file_type="TIFF"), None),
    "jpeg 2000": (picture("RGB", file_type="JPEG2000"), None),
    "turned by exif": (turned(), None),
    "bytes after the end": (picture() + b"\0" * 100, None),
}  # fmt: skip


def picture_rows() -> Iterator[HostileRow]:
    for layout in ("folder.csv", "folder.jsonl", "mimic", "mscxr.csv", "mscxr.json", "coco.captions", "coco.csv"):
        for name, (data, part) in PICTURES.items():
            expected = Accepted({"size": SIZE[::-1]}) if part is None else Refused(("image 'a.png'", part))
            yield HostileRow(layout, f"picture {name}", expected, files={"a.png": data})


MASKS: dict[str, tuple[str, bytes, Expected]] = {
    **{mode: ("m.png", picture(mode, value=255), Accepted({"inside": 900})) for mode in ("1", "L", "P", "RGB", "I;16")},
    "transparent": ("m.png", picture("RGBA", value=255), Accepted({"inside": 900})),
    "nothing": ("m.png", picture(value=0), Accepted({"inside": 81})),
    "smaller": (
        "m.png",
        picture(size=(20, 15)),
        Refused(("{place}", "'m.png'", "has 20 x 15 px and its image 40 x 30")),
    ),
    "turned": ("m.png", picture(size=(30, 40)), Refused(("{place}", "'m.png'", "has 30 x 40 px"))),
    "jpeg": ("m.jpg", picture(file_type="JPEG"), Refused(("{place}", "'m.jpg'", "is a JPEG"))),
    "jpeg named png": ("m.png", picture(file_type="JPEG"), Refused(("{place}", "'m.png'", "is a JPEG"))),
    "text": ("m.png", b"no mask", Refused(("{place}", "'m.png'", "is no image"))),
    "empty": ("m.png", b"", Refused(("{place}", "'m.png'", "0 bytes"))),
    "truncated": ("m.png", picture()[:120], Refused(("{place}", "'m.png'", "cannot be decoded"))),
    "bomb": ("m.png", claims(10_000, 9_999), Refused(("{place}", "'m.png'", "10000 x 9999"))),
    "floats": ("m.tiff", picture("F", file_type="TIFF"), Refused(("{place}", "'m.tiff'", "floating point"))),
    "missing": ("other.png", picture(), Refused(("{place}", "'m.png'", "cannot be opened"))),
    "animated": ("m.gif", PICTURES["animated gif"][0], Refused(("{place}", "'m.gif'", "it holds 2 pictures"))),
}


def mask_rows() -> Iterator[HostileRow]:
    for layout in ("folder.csv", "folder.jsonl"):
        for name, (file, data, expected) in MASKS.items():
            change = {"mask": "m.png" if name == "missing" else file}
            yield HostileRow(layout, f"mask {name}", at(expected, LAYOUTS[layout].place), change, {file: data})
        for name in ("/etc/passwd", "../outside.png", "/dev/zero"):
            refused = Refused((LAYOUTS[layout].place, f"mask '{name}' leaves the data folder"))
            yield HostileRow(layout, f"mask at {name}", refused, {"mask": name})


# --- bytes of the files -------------------------------------------------------------------------------------------


def without_a_comma(data: bytes) -> bytes:
    header, body = data.split(b"\n", 1)
    return header + b"\n" + body.replace(b",", b"", 1)


OF_ANY_FILE: dict[str, tuple[Callable[[bytes], bytes], str | None]] = {
    "byte order mark": (lambda data: b"\xef\xbb\xbf" + data, None),
    "utf-16": (lambda data: data.decode().encode("utf-16"), "UTF-16"),
    "utf-16 without a mark": (lambda data: data.decode().encode("utf-16-le"), "UTF-16"),
    "utf-32": (lambda data: data.decode().encode("utf-32"), "UTF-16"),
    "latin-1": (lambda data: data.replace(b"n", b"\xf1"), "is not UTF-8: byte 0xf1"),
    "surrogates": (lambda data: data.replace(b"n", b"\xed\xa0\x80"), "is not UTF-8"),
    "nul": (lambda data: data.replace(b"n", b"\0"), "NUL at byte"),
    "nothing": (lambda data: b"", ""),
    "spaces": (lambda data: b" \n\n ", ""),
    "gzip": (lambda data: b"\x1f\x8b\x08\0\0" + data, ""),
    "random": (lambda data: np.random.default_rng(0).bytes(500), ""),
    "windows line ends": (lambda data: data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"), None),
}
OF_CSV: dict[str, tuple[Callable[[bytes], bytes], str | None]] = {
    "old line ends": (lambda data: data.replace(b"\r\n", b"\r"), None),
    "header alone": (lambda data: data.split(b"\r\n")[0], "row"),
    "no header": (lambda data: data.split(b"\r\n", 1)[1], "column"),
    "semicolons": (lambda data: data.replace(b",", b";"), "column"),
    "tabs": (lambda data: data.replace(b",", b"\t"), "column"),
    "header twice": (lambda data: data.split(b"\r\n")[0] + b"," + data.replace(b"\r\n", b",\r\n"), "times"),
    "a field more": (
        lambda data: data.replace(b"\r\n", b",\r\n").replace(b",\r\n", b"\r\n", 1),
        "fields and the header",
    ),
    "a field less": (without_a_comma, "fields and the header"),
    "open quote": (lambda data: data + b'"a', "quote"),
    "quote inside": (lambda data: data.replace(b"\r\n", b'\r\n"a"b,', 1), "line 2"),
    "spaces in the header": (lambda data: data.replace(b"\r\n", b" \r\n", 1), None),
    "empty lines": (lambda data: data.replace(b"\r\n", b"\r\n\r\n"), None),
    "enormous field": (lambda data: data + b"x" * 200_000, "field"),
}
OF_JSON: dict[str, tuple[Callable[[bytes], bytes], str | None]] = {
    "cut off": (lambda data: data[: len(data) // 2], "JSON"),
    "a list": (lambda data: b"[1]", "JSON"),
    "a number": (lambda data: b"5", "JSON"),
    "null": (lambda data: b"null", "JSON"),
    "nested": (lambda data: b"[" * 100_000, "JSON"),
    "objects nested": (lambda data: b'{"a":' * 100_000, "JSON"),
    "single quotes": (lambda data: data.replace(b'"', b"'"), "JSON"),
    "comment": (lambda data: b"// data\n" + data, "JSON"),
    "huge number": (lambda data: b'{"images": ' + b"9" * 10_000 + b"}", "JSON"),
    "keys twice": (lambda data: data.replace(b"{", b'{"more": 1, "more": 2, ', 1), "key 'more' is given 2 times"),
}  # fmt: skip


def file_rows() -> Iterator[HostileRow]:
    for name, layout in LAYOUTS.items():
        table = name not in ("folder.jsonl", "mscxr.json", "coco.captions", "coco.instances")
        for case, (change, part) in (OF_ANY_FILE | (OF_CSV if table else OF_JSON)).items():
            expected = Accepted() if part is None else Refused((layout.file, part))
            yield HostileRow(name, f"file of {case}", expected, data=change)
        if table:
            for where in layout.fields.values():
                if where not in ("patient", "subject_id", "phrase", "labels", "mask", "finding", "bbox", "split"):
                    refused = Refused((layout.file, "column", where))
                    old = where.encode()
                    yield HostileRow(
                        name,
                        f"file without {where}",
                        refused,
                        data=lambda data, old=old: data.replace(old, b"other", 1),
                    )


ROWS = [*field_rows(), *picture_rows(), *mask_rows(), *file_rows()]


def written(row: HostileRow) -> bytes:
    """The bytes of the layout's file, with the row's change."""
    entries = entries_of(row.layout)
    for where, value in row.change.items():
        if isinstance(entries, dict):
            part, name = where.split(".")
            entries[part][0][name] = value
        else:
            entries[0][where] = value
    if isinstance(entries, dict):
        data = json.dumps(entries).encode()
    elif row.layout == "folder.jsonl":
        data = "\n".join(json.dumps(entry) for entry in entries).encode()
    else:
        data = csv_bytes(entries)
    return data if row.data is None else row.data(data)


def csv_bytes(entries: list[dict[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(entries[0]))
    writer.writeheader()
    writer.writerows(entries)
    return file.getvalue().encode()

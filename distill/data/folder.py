"""Images in a folder with metadata.csv or metadata.jsonl (the Hugging Face imagefolder layout), with boxes and masks.

One row an image, or one row a box; rows of one image are brought together. A row may also hold lists: JSON lists in
metadata.jsonl, values joined by `|` in metadata.csv. The rows are read here and not by `load_dataset("imagefolder")`,
which cannot express a row a box, guesses types ("None" becomes a missing caption) and does not say which row is wrong;
they are kept in a `datasets.Dataset`, in Arrow memory that data loader processes share. Nothing is written.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset, Features, Value
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from distill.config import DataConfig
from distill.data.captions import find_words, query_words_for
from distill.data.sample import Region, Sample
from distill.errors import UserError, raise_all

Box = tuple[float, float, float, float]

CROP_RULE = "centre square of the short side, Lanczos, v1"
"""Part of every fingerprint: change it whenever the pixels of a row change."""

BOX_SLACK_PX = 1.0
"""Annotation tools round; a box may leave its image by this much and is clipped."""

_VALIDATION_SPLITS = ("validation", "val", "valid")
_QUOTED_CHARACTERS = 80

_FEATURES = Features(
    {
        "image": Value("string"),
        "caption": Value("string"),
        "labels": [Value("string")],
        "findings": [Value("string")],
        "boxes": [[Value("float64")]],
        "masks": [Value("string")],
        "phrases": [Value("string")],
        "width": Value("int64"),
        "height": Value("int64"),
        "sha256": Value("string"),
    }
)

logger = logging.getLogger(__name__)


@dataclass
class _Annotation:
    """One box and/or mask; `row` is where the metadata file says so."""

    row: int
    finding: str
    box: Box | None
    mask: Path | None
    phrase: str | None


@dataclass
class _Record:
    """All rows of one image; row is the first of them."""

    row: int
    name: str
    path: Path
    caption: str
    split: str
    labels: list[str] = field(default_factory=list)
    annotations: list[_Annotation] = field(default_factory=list)


class FolderDataset:
    """ImageCaptionDataset of one split of a folder. All rows of all splits are checked when it is made.

    split: `train` and `test` mean the values in `config`; `validation` means validation, val or valid. Without
    config.split_column every row is in every split.

    Boxes and masks are those of the image as displayed, that is with its EXIF orientation applied. The centre square is
    cut out and resized to config.resolution; a box that the cut goes through is clipped, a region of which nothing is
    left is dropped.

    findings: config.findings, or all that the metadata names, sorted.
    query_words: the words that name each finding in a caption.
    dropped_regions: regions of this split of which the cut or the resize left no pixel.

    Raises UserError that lists all faults of the folder at once.
    """

    findings: tuple[str, ...]
    query_words: dict[str, tuple[str, ...]]
    dropped_regions: int

    def __init__(self, config: DataConfig, split: Literal["train", "test", "validation"]) -> None:
        if config.root is None:
            raise UserError("data.root is missing; data.kind folder needs the folder that holds the metadata file")
        self.config = config
        self.root = Path(config.root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"data.root '{config.root}' is not a folder")
        columns, rows = _read_metadata(self.root, config.metadata_file)
        raise_all(
            f"columns of {config.metadata_file} do not fit the config; it has {', '.join(columns)}",
            _column_faults(config, columns),
        )
        wanted = _VALIDATION_SPLITS if split == "validation" else (getattr(config, f"{split}_split"),)
        self.findings, general = _findings(config, rows)
        self.query_words = {name: query_words_for(name, config.query_words) for name in self.findings}
        general += _split_faults(config, wanted, rows)
        faults: list[tuple[int, str]] = []
        records = _records(config, self.root, rows, faults)
        inspected = _inspect_all(self.root.resolve(), records, faults)
        listed = [f"{config.metadata_file} row {row}: {message}" for row, message in sorted(faults, key=lambda f: f[0])]
        raise_all(f"the data in '{config.root}' has faults", general + listed)
        _warn_of_dark_images(inspected)

        canonical = {_key(name): name for name in self.findings}
        entries: list[dict[str, Any]] = []
        for record in records:
            if config.split_column is not None and record.split not in wanted:
                continue
            image = inspected[record.path]
            kept = [(canonical[_key(a.finding)], a) for a in record.annotations if _key(a.finding) in canonical]
            shapes = [(name, a) for name, a in kept if a.box is not None or a.mask is not None]
            labels = record.labels if config.label_column else [name for name, _ in kept]
            entries.append(
                {
                    "image": record.name,
                    "caption": record.caption,
                    "labels": list(dict.fromkeys(labels)),
                    "findings": [name for name, _ in shapes],
                    "boxes": [_clip_box(a.box, image.width, image.height) if a.box else [] for _, a in shapes],
                    "masks": [str(a.mask) if a.mask else None for _, a in shapes],
                    "phrases": [a.phrase for _, a in shapes],
                    "width": image.width,
                    "height": image.height,
                    "sha256": image.sha256,
                }
            )
        self._rows = Dataset.from_list(entries, features=_FEATURES)
        self._regions_of: Counter[str] = Counter(name for entry in entries for name in set(entry["findings"]))
        with ThreadPoolExecutor() as pool:
            self.dropped_regions = sum(pool.map(self._count_dropped, entries))
        if self.dropped_regions:
            logger.warning(
                "%d of %d regions lie outside the centre square or are smaller than a pixel at %d px, and are dropped",
                self.dropped_regions,
                sum(self._regions_of.values()),
                config.resolution,
            )

    def __len__(self) -> int:
        return len(self._rows)

    def caption(self, index: int) -> str:
        return self._rows[index]["caption"]

    def labels(self, index: int) -> tuple[str, ...]:
        return tuple(self._rows[index]["labels"])

    def fingerprint(self, index: int) -> str:
        """Hash of the file's bytes as they were at the check, of the resolution and of the crop rule."""
        parts = (self._rows[index]["sha256"], str(self.config.resolution), CROP_RULE)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __getitem__(self, index: int) -> Sample:
        row = self._rows[index]
        resolution = self.config.resolution
        path = self.root / row["image"]
        try:
            image = _eight_bits(_open(path.read_bytes()))
        except Exception as error:  # Pillow raises many types
            raise UserError(f"'{path}' could be read when the data was checked, and no longer: {error}") from error
        left, top, side = _centre_square(*image.size)
        square = image.resize(
            (resolution, resolution), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
        pixels = torch.from_numpy(np.array(square, dtype=np.float32) / 127.5 - 1.0)
        pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.expand(3, -1, -1)
        scale = resolution / side
        return Sample(
            id=row["image"],
            pixel_values=pixels.contiguous(),
            caption=row["caption"],
            regions=tuple(region for region in self._regions(row) if region.mask.any()),
            labels=tuple(row["labels"]),
            original_size=(row["height"], row["width"]),
            crop_top_left=(round(top * scale), round(left * scale)),
        )

    def _regions(self, row: dict[str, Any]) -> list[Region]:
        """One region a finding, in the order of `findings`; an annotation counts by its mask, else by its box."""
        resolution = self.config.resolution
        left, top, side = _centre_square(row["width"], row["height"])
        scale = resolution / side
        regions = []
        for finding in (name for name in self.findings if name in row["findings"]):
            mask = np.zeros((resolution, resolution), dtype=bool)
            boxes: list[Box] = []
            phrases: dict[str, None] = {}
            drawn: set[str] = set()
            for name, box, mask_name, phrase in zip(
                row["findings"], row["boxes"], row["masks"], row["phrases"], strict=True
            ):
                if name != finding:
                    continue
                if phrase:
                    phrases[phrase] = None
                inside = np.zeros_like(mask)
                if box:
                    x, y, width, height = box
                    corners = ((x - left), (y - top), (x + width - left), (y + height - top))
                    x0, y0, x1, y1 = (min(max(value * scale, 0.0), float(resolution)) for value in corners)
                    # A pixel is inside if its centre is.
                    inside[math.ceil(y0 - 0.5) : math.ceil(y1 - 0.5), math.ceil(x0 - 0.5) : math.ceil(x1 - 0.5)] = True
                    if inside.any():
                        boxes.append((x0, y0, x1 - x0, y1 - y0))
                if mask_name is None:
                    mask |= inside
                elif mask_name not in drawn:
                    drawn.add(mask_name)
                    whole = Image.fromarray(_mask_array(Path(mask_name)).astype(np.uint8) * 255)
                    square = whole.resize(
                        (resolution, resolution), Image.Resampling.BOX, box=(left, top, left + side, top + side)
                    )
                    mask |= np.asarray(square) >= 128
            regions.append(Region(finding, torch.from_numpy(mask), tuple(boxes), ". ".join(phrases) or None))
        return regions

    def _count_dropped(self, row: dict[str, Any]) -> int:
        return sum(not region.mask.any() for region in self._regions(row))

    def check_captions(self, tokenizers: Sequence[PreTrainedTokenizerBase], max_length: int) -> None:
        """Raise UserError if a caption of this split has more than max_length tokens (BOS and EOS included) by any of
        `tokenizers`, unless config.truncate_captions."""
        captions = list(dict.fromkeys(self._rows["caption"]))
        if self.config.truncate_captions or not captions:
            return
        lengths = [0] * len(captions)
        for tokenizer in tokenizers:
            encoded = tokenizer(captions, verbose=False)["input_ids"]
            lengths = [max(length, len(ids)) for length, ids in zip(lengths, encoded, strict=True)]
        too_long = sum(length > max_length for length in lengths)
        if too_long:
            longest = max(range(len(captions)), key=lengths.__getitem__)
            raise UserError(
                f"{too_long} of {len(captions)} captions in '{self.config.root}' have more tokens than the text "
                f"encoder takes, {max_length}; the longest has {lengths[longest]}:\n  {captions[longest]}\n"
                "Shorten them, or set data.truncate_captions true to cut them"
            )

    def check_queries(self) -> None:
        """Raise UserError if a finding that has regions in this split is named by no caption of it: its word map would
        be of nothing."""
        captions = list(dict.fromkeys(self._rows["caption"]))
        faults = []
        for finding in (name for name in self.findings if self._regions_of[name]):
            words = self.query_words[finding]
            if not any(find_words(caption, words) for caption in captions):
                faults.append(
                    f"'{finding}' ({self._regions_of[finding]} images): no caption has any of {', '.join(words)}; "
                    f"a caption is '{_quote(captions[0])}'"
                )
        raise_all(
            "findings that no caption names; set data.query_words to the words that do, or leave them out of "
            "data.findings",
            faults,
        )


# --- metadata -----------------------------------------------------------------------------------------------------


def _read_metadata(root: Path, name: str) -> tuple[list[str], list[tuple[int, dict[str, Any]]]]:
    """Columns, and (row number, values) of each row. Row 1 of a CSV file is its header, as in a spreadsheet."""
    path = root / name
    if path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"data.metadata_file '{name}' must end in .csv or .jsonl")
    if not path.is_file():
        there = sorted(p.name for pattern in ("*.csv", "*.jsonl") for p in root.glob(pattern))
        raise UserError(f"there is no '{name}' in '{root}'; data.metadata_file could be: {', '.join(there) or 'none'}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    if b"\0" in data:
        at = data.index(b"\0")
        raise UserError(f"'{path}' has a NUL at byte {at} (line {_line(data, at)}): is it UTF-16? Save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not UTF-8: byte 0x{data[error.start]:02x} at {error.start} "
            f"(line {_line(data, error.start)}); it may be Latin-1 or Windows-1252: save it as UTF-8"
        ) from error
    columns, rows, faults = (_read_csv if path.suffix == ".csv" else _read_jsonl)(text)
    raise_all(f"'{path}' cannot be read", faults)
    if not rows:
        raise UserError(f"'{path}' has no rows")
    return columns, rows


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _read_csv(text: str) -> tuple[list[str], list[tuple[int, dict[str, Any]]], list[str]]:
    faults: list[str] = []
    rows: list[tuple[int, dict[str, Any]]] = []
    header: list[str] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        # The published MIMIC metadata has a space after a column's name.
        header = [name.strip() for name in next(reader, [])]
        faults += [f"the header has column '{name}' {n} times" for name, n in Counter(header).items() if n > 1 and name]
        for number, values in enumerate(reader, start=2):
            if len(values) == len(header):
                rows.append((number, dict(zip(header, values, strict=True))))
            elif values:
                faults.append(f"row {number} has {len(values)} fields and the header {len(header)}: {_quote(values)}")
    except csv.Error as error:
        faults.append(f"line {reader.line_num}: {error} (is a quote left open?)")
    return header, rows, faults


def _read_jsonl(text: str) -> tuple[list[str], list[tuple[int, dict[str, Any]]], list[str]]:
    faults: list[str] = []
    rows: list[tuple[int, dict[str, Any]]] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.append(f"row {number} is not JSON: {error}")
            continue
        if not isinstance(value, dict):
            faults.append(f"row {number} is not a JSON object: {_quote(value)}")
            continue
        row = {name.strip(): entry for name, entry in value.items()}
        columns.update(dict.fromkeys(row))
        rows.append((number, row))
    return list(columns), rows, faults


def _column_faults(config: DataConfig, columns: list[str]) -> list[str]:
    faults = []
    optional = ("split_column", "finding_column", "phrase_column", "box_column", "mask_column", "label_column")
    for option in ("image_column", "caption_column", *optional):
        name = getattr(config, option)
        if name is not None and name not in columns:
            faults.append(f"data.{option} '{name}' is not a column{_did_you_mean(name, columns)}")
    for option in ("phrase_column", "box_column", "mask_column"):
        if getattr(config, option) is not None and config.finding_column is None:
            faults.append(f"data.{option} needs data.finding_column, which says what is there")
    if config.findings and config.finding_column is None and config.label_column is None:
        faults.append("data.findings needs data.finding_column or data.label_column")
    return faults


def _records(
    config: DataConfig, root: Path, rows: list[tuple[int, dict[str, Any]]], faults: list[tuple[int, str]]
) -> list[_Record]:
    """Rows brought together by image. Faults of text go to `faults`; files are not opened here."""
    records: dict[Path, _Record] = {}
    conflicts: set[tuple[Path, str]] = set()
    real_root = root.resolve()
    for number, row in rows:
        try:
            name = _text(row, config.image_column)
            path = _path_in(real_root, name, config.image_column)
            caption = _text(row, config.caption_column, empty=True)
            if not caption and not config.allow_empty_captions:
                raise ValueError(f"{config.caption_column} is empty; set data.allow_empty_captions true to accept it")
            split = _text(row, config.split_column, empty=True) if config.split_column else ""
            labels = [label for label in _texts(row, config.label_column) if label]
            annotations = _annotations(config, real_root, number, row)
        except ValueError as error:
            faults.append((number, str(error)))
            continue
        record = records.setdefault(path, _Record(number, path.relative_to(real_root).as_posix(), path, caption, split))
        for what, first, value in (("caption", record.caption, caption), ("split", record.split, split)):
            if first != value and (path, what) not in conflicts:
                conflicts.add((path, what))
                both = f"'{_quote(value)}' and '{_quote(first)}' (row {record.row})"
                faults.append((number, f"'{name}' has two values of {what}: {both}; right is one an image"))
        record.labels += labels
        record.annotations += annotations
    return list(records.values())


def _annotations(config: DataConfig, root: Path, number: int, row: dict[str, Any]) -> list[_Annotation]:
    boxes = _boxes(row[config.box_column], config.box_column) if config.box_column and config.box_column in row else []
    lists: dict[str, list[Any]] = {
        "box": boxes,
        "mask": [_path_in(root, m, config.mask_column) if m else None for m in _texts(row, config.mask_column)],
        "finding": _texts(row, config.finding_column),
        "phrase": _texts(row, config.phrase_column),
    }
    shapes = max(len(lists["box"]), len(lists["mask"]))
    count = shapes or len(lists["finding"])
    for what, values in lists.items():
        if what == "phrase" and not shapes:
            values = lists[what] = values[:1]
        if len(values) not in (0, 1, count):
            raise ValueError(f"there are {len(values)} values of {what} for {count} boxes or masks")
        lists[what] = values * count if len(values) == 1 else values or [None] * count
    annotations = []
    for box, mask, finding, phrase in zip(*lists.values(), strict=True):
        if (box or mask) and not finding:
            raise ValueError(f"there is a box or mask and {config.finding_column} is empty")
        if finding:
            annotations.append(_Annotation(number, finding, box, mask, phrase or None))
    return annotations


def _text(row: dict[str, Any], column: str, empty: bool = False) -> str:
    value = row.get(column)
    if isinstance(value, (int, float)):
        value = str(value)
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise ValueError(f"{column} must be text: {_quote(value)}")
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{column} has a character that is no text: {_quote(ascii(value))}")
    value = value.strip()
    if not value and not empty:
        raise ValueError(f"{column} is empty")
    return value


def _texts(row: dict[str, Any], column: str | None) -> list[str]:
    """A list of texts: JSON list, or one text whose parts are joined by `|`; empty parts in the middle are kept."""
    if column is None:
        return []
    value = row.get(column)
    if isinstance(value, list):
        return [_text({column: part}, column, empty=True) for part in value]
    text = _text(row, column, empty=True)
    return [part.strip() for part in text.split("|")] if text else []


def _boxes(value: Any, column: str) -> list[Box]:
    """Boxes of a text `x,y,w,h|x,y,w,h`, of a list of four numbers, or of a list of boxes."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str):
        value = value.split("|")
    elif not isinstance(value, list) or not all(isinstance(part, list) or "," in str(part) for part in value):
        value = [value]
    return [_box(part.split(",") if isinstance(part, str) else part, column) for part in value]


def _box(parts: Any, column: str) -> Box:
    shown = ",".join(map(str, parts)) if isinstance(parts, list) else parts
    try:
        if isinstance(parts, list) and not any(isinstance(part, bool) for part in parts):
            x, y, width, height = (float(part) for part in parts)
        else:
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{column} '{_quote(shown)}' is not a box; right is x,y,width,height in pixels") from None
    if not all(map(math.isfinite, (x, y, width, height))):
        raise ValueError(f"{column} '{_quote(shown)}' has a number that is not finite")
    if width <= 0 or height <= 0:
        raise ValueError(f"{column} '{_quote(shown)}': width and height must be above 0")
    return x, y, width, height


def _path_in(root: Path, name: str, column: str | None) -> Path:
    """The file `name` under `root`, links followed. Raises ValueError if it is elsewhere."""
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{column} '{_quote(name)}' is no path: {error}") from error
    if Path(name).is_absolute() or not path.is_relative_to(root):
        raise ValueError(f"{column} '{_quote(name)}' leaves the data folder; right is a path relative to it")
    return path


def _findings(config: DataConfig, rows: list[tuple[int, dict[str, Any]]]) -> tuple[tuple[str, ...], list[str]]:
    """Findings of the data set, and faults of the config's findings and query words."""
    of_boxes: dict[str, str] = {}
    of_images: dict[str, str] = {}
    for _, row in rows:
        for names, column in ((of_boxes, config.finding_column), (of_images, config.label_column)):
            try:
                for name in filter(None, _texts(row, column)):
                    names.setdefault(_key(name), name)
            except ValueError:
                continue  # listed with its row
    there = sorted({**of_images, **of_boxes}.values())
    faults = [
        f"data.findings '{name}' is in no row{_did_you_mean(name, there)}; there are: {', '.join(there) or 'none'}"
        for name in config.findings
        if _key(name) not in of_boxes and _key(name) not in of_images
    ]
    findings = config.findings or tuple(sorted(of_boxes.values()))
    known = {_key(name) for name in findings}
    for name, words in config.query_words.items():
        if _key(name) not in known:
            faults.append(f"data.query_words '{name}' is not a finding{_did_you_mean(name, findings)}")
        elif not any(word.strip() for word in words):
            faults.append(f"data.query_words '{name}' has no words")
    return findings, faults


def _split_faults(config: DataConfig, wanted: tuple[str, ...], rows: list[tuple[int, dict[str, Any]]]) -> list[str]:
    if config.split_column is None:
        return []
    seen = Counter(str(row.get(config.split_column, "")).strip() for _, row in rows)
    if any(value in seen for value in wanted):
        return []
    values = ", ".join(f"'{_quote(value)}' ({count} rows)" for value, count in seen.most_common(20))
    return [f"no row has {config.split_column} = {' or '.join(wanted)}; there are {values}"]


def _key(name: str) -> str:
    return " ".join(name.split()).casefold()


def _quote(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _QUOTED_CHARACTERS else text[: _QUOTED_CHARACTERS - 1] + "…"


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


# --- files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inspection:
    """What is known of an image file once it was decoded; width and height as displayed."""

    width: int = 0
    height: int = 0
    sha256: str = ""
    low_range: bool = False
    fault: str | None = None


def _inspect_all(root: Path, records: list[_Record], faults: list[tuple[int, str]]) -> dict[Path, _Inspection]:
    """Decode every image and mask, and compare boxes and masks with their images."""
    masks = (annotation.mask for record in records for annotation in record.annotations if annotation.mask)
    paths = list(dict.fromkeys([*(record.path for record in records), *masks]))
    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(_inspect_file, paths), total=len(paths), desc="checking images", unit="file", delay=1.0,
            dynamic_ncols=True, disable=os.environ.get("LOCAL_RANK", "0") != "0",
        )  # fmt: skip
        inspected = dict(zip(paths, bar, strict=True))
    for record in records:
        image = inspected[record.path]
        if image.fault:
            faults.append((record.row, f"image '{record.name}' {image.fault}"))
        told: set[Path] = set()
        for annotation in record.annotations:
            if annotation.box and not image.fault:
                x, y, width, height = annotation.box
                right, bottom = image.width + BOX_SLACK_PX, image.height + BOX_SLACK_PX
                if x < -BOX_SLACK_PX or y < -BOX_SLACK_PX or x + width > right or y + height > bottom:
                    box = ",".join(f"{value:g}" for value in annotation.box)
                    faults.append(
                        (
                            annotation.row,
                            f"box {box} is outside the image '{record.name}' of {image.width} x {image.height} px "
                            "(as displayed); right is x,y,width,height within it",
                        )
                    )
            if annotation.mask and annotation.mask not in told:
                told.add(annotation.mask)
                fault = _mask_fault(annotation.mask, inspected[annotation.mask], image)
                if fault:
                    faults.append((annotation.row, f"mask '{annotation.mask.relative_to(root).as_posix()}' {fault}"))
    return inspected


def _mask_fault(path: Path, mask: _Inspection, image: _Inspection) -> str | None:
    if mask.fault:
        return mask.fault
    if path.suffix.lower() in (".jpg", ".jpeg"):
        return "is a JPEG, whose noise is non-zero outside the region; save it as PNG"
    if not image.fault and (mask.width, mask.height) != (image.width, image.height):
        return f"has {mask.width} x {mask.height} px and its image {image.width} x {image.height}"
    return None


def _inspect_file(path: Path) -> _Inspection:
    try:
        status = path.stat()
        if not path.is_file():
            return _Inspection(fault="is not a file")
        return _inspect(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        return _Inspection(fault=f"cannot be opened: {error.strerror}")


@cache
def _inspect(path: Path, size_bytes: int, mtime_ns: int) -> _Inspection:
    """Decode the whole file. Kept by size and time of change, so that several splits decode each file once."""
    data = path.read_bytes()
    try:
        image = _open(data)
        low_range = image.mode.startswith("I") and int(np.asarray(image).max()) < 4096
        _eight_bits(image)
    except UnidentifiedImageError:
        return _Inspection(fault=f"is no image that can be read ({size_bytes} bytes)")
    except Exception as error:  # Pillow raises many types on broken files
        return _Inspection(fault=f"cannot be decoded: {error}")
    return _Inspection(image.width, image.height, hashlib.sha256(data).hexdigest(), low_range)


def _warn_of_dark_images(inspected: dict[Path, _Inspection]) -> None:
    dark = [path.name for path, image in inspected.items() if image.low_range]
    if dark:
        logger.warning(
            "%d 16-bit images have no value above 4095 of 65535 and will be almost black (such as '%s'): "
            "stretch them to 16 bits",
            len(dark),
            dark[0],
        )


def _open(data: bytes) -> Image.Image:
    """The image decoded to the end, turned as its EXIF orientation says. Raises what Pillow raises."""
    image = Image.open(io.BytesIO(data))
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise ValueError(f"{image.width} x {image.height} px are more than {limit}; shrink it")
    image.load()
    return ImageOps.exif_transpose(image)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Mode L or RGB. 16-bit gray is divided by 257, so that 65535 becomes 255; transparent pixels lie on white."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("its integers do not fit 16 bits; save it as 8 or 16 bit")
        return Image.fromarray((values.astype(np.float32) / 257.0 + 0.5).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating point; save it as 8 or 16 bit")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _mask_array(path: Path) -> NDArray[np.bool_]:
    """(height, width): where a pixel, or its index in the palette, is not zero; transparency does not count."""
    image = _open(path.read_bytes())
    if image.mode in ("LA", "RGBA"):
        image = image.convert(image.mode[:-1])
    values = np.asarray(image)
    return np.asarray(values.any(axis=2) if values.ndim == 3 else values != 0)


def _centre_square(width: int, height: int) -> tuple[float, float, int]:
    """Left, top and side of the square that is kept, in pixels of the image."""
    side = min(width, height)
    return (width - side) / 2, (height - side) / 2, side


def _clip_box(box: Box, width: int, height: int) -> Box:
    x, y, w, h = box
    x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    return x0, y0, x1 - x0, y1 - y0

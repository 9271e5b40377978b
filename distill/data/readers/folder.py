"""Images in a folder with metadata.csv or metadata.jsonl (the Hugging Face imagefolder layout), with boxes and masks.

One row an image, or one row a box; rows of one image are brought together. A row may also hold lists: JSON lists in
metadata.jsonl, values joined by `|` in metadata.csv. The rows are read here and not by `load_dataset("imagefolder")`,
which cannot express a row a box, guesses types ("None" becomes a missing caption) and does not say which row is wrong.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.data.captions import query_words_for
from distill.data.readers.records import (
    VALIDATION_SPLITS,
    Annotation,
    ImageRecord,
    RecordDataset,
    SampleRecord,
    choose_findings,
    data_root,
)
from distill.data.readers.tables import (
    Box,
    Faults,
    Place,
    Row,
    box_of,
    caption_of,
    csv_rows,
    did_you_mean,
    jsonl_rows,
    key,
    quote,
    read_text,
    text_of,
    texts_of,
)
from distill.data_config import FolderData
from distill.errors import UserError, raise_all


@dataclass
class _Entry:
    """What all rows of one image say."""

    image: ImageRecord
    caption: str
    split: str
    labels: list[str] = field(default_factory=list)


class FolderDataset(RecordDataset):
    """One split of a folder. All rows and files of all splits are checked when it is made.

    split: `train` and `test` mean the values in `config`; `validation` means validation, val or valid. Without
    config.split_column every row is in every split.

    findings: config.findings, or all that the metadata names, sorted.

    Raises UserError that lists all faults of the folder at once.
    """

    def __init__(self, config: FolderData, split: Literal["train", "test", "validation"]) -> None:
        root = data_root(config)
        columns, rows = _read_metadata(root, config.metadata_file)
        raise_all(
            f"columns of {config.metadata_file} do not fit the config; it has {', '.join(columns)}",
            _column_faults(config, columns),
        )
        wanted = VALIDATION_SPLITS if split == "validation" else (getattr(config, f"{split}_split"),)
        findings, general = _findings(config, rows)
        general += _split_faults(config, wanted, rows)
        faults: Faults = []
        entries = _entries(config, root, rows, faults)
        canonical = {key(name): name for name in findings}
        samples = []
        for entry in entries:
            if config.split_column is not None and entry.split not in wanted:
                continue
            annotations = entry.image.annotations
            kept = [n for n, a in enumerate(annotations) if key(a.finding) in canonical]
            samples.append(
                SampleRecord(
                    id=entry.image.name,
                    image=entry.image,
                    caption=entry.caption,
                    labels=entry.labels
                    if config.label_column
                    else [canonical[key(annotations[n].finding)] for n in kept],
                    regions=[n for n in kept if annotations[n].box or annotations[n].mask],
                )
            )
        super().__init__(
            config,
            findings=findings,
            query_words={name: query_words_for(name, config.query_words) for name in findings},
            images=[entry.image for entry in entries],
            samples=samples,
            general=general,
            faults=faults,
        )


def _read_metadata(root: Path, name: str) -> tuple[list[str], list[Row]]:
    """Columns, and (row number, values) of each row. Row 1 of a CSV file is its header, as in a spreadsheet."""
    suffix = Path(name).suffix
    if suffix not in (".csv", ".jsonl"):
        raise UserError(f"data.metadata_file '{name}' must end in .csv or .jsonl")
    text = read_text(root, name, "data.metadata_file")
    columns, rows, faults = csv_rows(text) if suffix == ".csv" else jsonl_rows(text)
    raise_all(f"'{root / name}' cannot be read", faults)
    if not rows:
        raise UserError(f"'{root / name}' has no rows")
    return columns, rows


def _column_faults(config: FolderData, columns: list[str]) -> list[str]:
    faults = []
    optional = ("split_column", "finding_column", "phrase_column", "box_column", "mask_column", "label_column")
    for option in ("image_column", "caption_column", *optional):
        name = getattr(config, option)
        if name is not None and name not in columns:
            faults.append(f"data.{option} '{name}' is not a column{did_you_mean(name, columns)}")
    for option in ("phrase_column", "box_column", "mask_column"):
        if getattr(config, option) is not None and config.finding_column is None:
            faults.append(f"data.{option} needs data.finding_column, which says what is there")
    if config.findings and config.finding_column is None and config.label_column is None:
        faults.append("data.findings needs data.finding_column or data.label_column")
    return faults


def _entries(config: FolderData, root: Path, rows: list[Row], faults: Faults) -> list[_Entry]:
    """Rows brought together by image. Faults of text go to `faults`; files are not opened here."""
    entries: dict[Path, _Entry] = {}
    conflicts: set[tuple[Path, str]] = set()
    real_root = root.resolve()
    for number, row in rows:
        place = Place(config.metadata_file, "row", number)
        try:
            name = text_of(row, config.image_column)
            path = _path_in(real_root, name, config.image_column)
            caption = caption_of(row, config.caption_column, config.allow_empty_captions)
            split = text_of(row, config.split_column, empty=True) if config.split_column else ""
            labels = [label for label in texts_of(row, config.label_column) if label]
            annotations = _annotations(config, real_root, place, row)
        except ValueError as error:
            faults.append((place, str(error)))
            continue
        image = ImageRecord(place, path.relative_to(real_root).as_posix(), path)
        entry = entries.setdefault(path, _Entry(image, caption, split))
        for what, first, value in (("caption", entry.caption, caption), ("split", entry.split, split)):
            if first != value and (path, what) not in conflicts:
                conflicts.add((path, what))
                both = f"'{quote(value)}' and '{quote(first)}' (row {entry.image.place.number})"
                faults.append((place, f"'{name}' has two values of {what}: {both}; right is one an image"))
        entry.labels += labels
        entry.image.annotations += annotations
    return list(entries.values())


def _annotations(config: FolderData, root: Path, place: Place, row: dict[str, Any]) -> list[Annotation]:
    boxes = _boxes(row[config.box_column], config.box_column) if config.box_column and config.box_column in row else []
    lists: dict[str, list[Any]] = {
        "box": boxes,
        "mask": [_path_in(root, m, config.mask_column) if m else None for m in texts_of(row, config.mask_column)],
        "finding": texts_of(row, config.finding_column),
        "phrase": texts_of(row, config.phrase_column),
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
            annotations.append(Annotation(place, finding, box, mask, phrase=phrase or None))
    return annotations


def _boxes(value: Any, column: str) -> list[Box]:
    """Boxes of a text `x,y,w,h|x,y,w,h`, of a list of four numbers, or of a list of boxes."""
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        return []
    if isinstance(value, str):
        value = value.split("|")
    elif not isinstance(value, list) or not all(isinstance(part, list) or "," in str(part) for part in value):
        value = [value]
    return [box_of(part.split(",") if isinstance(part, str) else part, column) for part in value]


def _path_in(root: Path, name: str, column: str | None) -> Path:
    """The file `name` under `root`, links followed. Raises ValueError if it is elsewhere."""
    try:
        path = (root / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{column} '{quote(name)}' is no path: {error}") from error
    if Path(name).is_absolute() or not path.is_relative_to(root):
        raise ValueError(f"{column} '{quote(name)}' leaves the data folder; right is a path relative to it")
    return path


def _findings(config: FolderData, rows: list[Row]) -> tuple[tuple[str, ...], list[str]]:
    """Findings of the data set, and faults of the config's findings and query words."""
    of_boxes: dict[str, str] = {}
    of_images: dict[str, str] = {}
    for _, row in rows:
        for names, column in ((of_boxes, config.finding_column), (of_images, config.label_column)):
            try:
                for name in filter(None, texts_of(row, column)):
                    names.setdefault(key(name), name)
            except ValueError:
                continue  # listed with its row
    return choose_findings(config, sorted(of_boxes.values()), {**of_images, **of_boxes}.values(), "row")


def _split_faults(config: FolderData, wanted: tuple[str, ...], rows: list[Row]) -> list[str]:
    if config.split_column is None:
        return []
    seen = Counter(str(row.get(config.split_column, "")).strip() for _, row in rows)
    if any(value in seen for value in wanted):
        return []
    values = ", ".join(f"'{quote(value)}' ({count} rows)" for value, count in seen.most_common(20))
    return [f"no row has {config.split_column} = {' or '.join(wanted)}; there are {values}"]

"""Images in a folder with metadata.csv or metadata.jsonl (the Hugging Face imagefolder layout), with boxes and masks.

One row an image, or one row a box; rows of one image are brought together. A row may also hold lists: JSON lists in
metadata.jsonl, values joined by `|` in metadata.csv. The rows are read here and not by `load_dataset("imagefolder")`,
which cannot express a row a box, guesses types ("None" becomes a missing caption) and does not say which row is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from distill.config import NO_LABEL
from distill.data.captions import query_words_for
from distill.data.readers.inspection import Annotation, ImageRecord, file_hashes
from distill.data.readers.records import (
    RecordDataset,
    SampleRecord,
    choose_findings,
    data_root,
)
from distill.data.readers.splits import EVERY_IMAGE, Member, Split, refuse_shared, split_by_rule
from distill.data.readers.tables import (
    VALIDATION_SPLITS,
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


@dataclass(frozen=True)
class _Columns:
    """Name of the column that holds each value, None where it is not read."""

    image: str
    caption: str
    split: str | None
    finding: str | None
    phrase: str | None
    box: str | None
    mask: str | None
    label: str | None
    patient: str | None

    def read(self) -> list[str]:
        return [name for item in fields(self) if (name := getattr(self, item.name))]


AUTO, NONE = "auto", "none"
DOCUMENTED = {
    "split": "split", "finding": "finding", "phrase": "phrase", "box": "bbox", "mask": "mask", "label": "labels",
    "patient": "patient",
}  # fmt: skip
"""Value -> the column that `auto` takes for it, where the file has one."""


@dataclass
class _Entry:
    """What all rows of one image say."""

    image: ImageRecord
    caption: str
    split: str
    patient: str
    labels: list[str] = field(default_factory=list)


class FolderDataset(RecordDataset):
    """One split of a folder. All rows and files of all splits are checked when it is made.

    Columns are those of the documented names (`DOCUMENTED`), unless the config names others or none.
    split: `train` and `test` mean the values in `config`; `validation` means validation, val or valid. Without a column
    for it, `split_by_rule` gives each image its split. config.test_split `all` is every image, for evaluation only.

    findings: config.findings, or all that the metadata names, sorted.

    Raises UserError that lists all faults of the folder at once, and then one that lists patients and pictures which
    are in two splits.
    """

    def __init__(self, config: FolderData, split: Split) -> None:
        root = data_root(config)
        every_image = config.test_split == EVERY_IMAGE
        if every_image and split != "test":
            raise UserError(
                f"data.test_split is {EVERY_IMAGE}, which evaluates every image, and this recipe also reads {split} "
                "images, which a test must not see; leave data.test_split at the name of a split"
            )
        names, rows = _read_metadata(root, config.metadata_file)
        columns, problems = _choose_columns(config, names)
        raise_all(
            f"columns of {config.metadata_file} do not fit the config; it has {', '.join(map(quote, names[:50]))}",
            problems,
        )
        wanted = VALIDATION_SPLITS if split == "validation" else (getattr(config, f"{split}_split"),)
        findings, general = _findings(config, columns, rows)
        faults: Faults = []
        entries = _entries(config, columns, root, rows, faults)
        hashes = file_hashes(root.resolve(), [entry.image.path for entry in entries])
        members = [
            Member(entry.image.place, entry.image.name, entry.split, entry.patient, hashes[entry.image.path])
            for entry in entries
        ]
        splits: Sequence[str]
        if columns.split is None:
            splits, groups = split_by_rule(members)
            chosen = [every_image or name == split for name in splits]
            if not any(chosen) and not faults:
                general.append(_too_few_groups(split, groups))
        else:
            splits = [_role(config, entry.split) for entry in entries]
            chosen = [every_image or entry.split in wanted for entry in entries]
            general += [] if every_image else _split_faults(columns.split, wanted, rows)
        canonical = {key(name): name for name in findings}
        samples = [
            _sample(entry, canonical, columns) for entry, is_chosen in zip(entries, chosen, strict=True) if is_chosen
        ]
        super().__init__(
            config,
            findings=findings,
            query_words={name: query_words_for(name, config.query_words) for name in findings},
            images=[entry.image for entry in entries],
            samples=samples,
            general=general,
            faults=faults,
            about=_about(config, columns, splits),
            split=split,
            no_regions=_no_regions(config, columns),
        )
        if columns.split is not None and not every_image:
            _refuse_shared(config, columns, members, splits)


def _sample(entry: _Entry, canonical: Mapping[str, str], columns: _Columns) -> SampleRecord:
    """canonical: key -> name of the findings that count. Without a column of labels, the findings are the labels; with
    one, the findings that the image has boxes or masks of are labels too."""
    annotations = entry.image.annotations
    kept = [n for n, a in enumerate(annotations) if key(a.finding) in canonical]
    shown = [n for n in kept if annotations[n].box or annotations[n].mask]
    labels = {key(label) for label in entry.labels}
    drawn = dict.fromkeys(canonical[key(annotations[n].finding)] for n in shown)
    return SampleRecord(
        id=entry.image.name,
        image=entry.image,
        caption=entry.caption,
        labels=[*entry.labels, *(name for name in drawn if key(name) not in labels)]
        if columns.label
        else [canonical[key(annotations[n].finding)] for n in kept],
        regions=shown,
    )


def _refuse_shared(config: FolderData, columns: _Columns, members: Sequence[Member], splits: Sequence[str]) -> None:
    """UserError if a patient or a picture is in two splits of the split column."""
    advice = (
        f"Give all rows of a patient or a picture one value of {columns.split}, or set data.split_column {NONE} to "
        "have the images split by patient and file"
    )
    if columns.patient:
        advice += f"; if {columns.patient} names no patients, set data.patient_column {NONE}"
    refuse_shared(
        [
            Member(member.place, member.name, role, member.patient, member.sha256)
            for member, role in zip(members, splits, strict=True)
            if role
        ],
        f"the data in '{config.root}' has a patient or a picture in two splits: a test would see what was trained on",
        advice,
    )


def _role(config: FolderData, value: str) -> str:
    """The split that a value of the split column stands for, empty if it is read as none."""
    if value in (config.train_split, config.test_split):
        return value
    return "validation" if value in VALIDATION_SPLITS else ""


def _no_regions(config: FolderData, columns: _Columns) -> str:
    shapes = [name for name in (columns.box, columns.mask) if name]
    if not shapes:
        return f"no column of {config.metadata_file} is read as boxes or masks: name one by data.box_column or data.mask_column"
    return f"column {' and '.join(shapes)} of {config.metadata_file} holds none for the findings of these rows"


def _about(config: FolderData, columns: _Columns, splits: Sequence[str]) -> str:
    counts = Counter(splits)
    order = dict.fromkeys(["train", "validation", "test"])
    if columns.split is not None:
        order = dict.fromkeys([config.train_split, "validation", config.test_split])
    parts = [f"{counts[name]} {name}" for name in order if name != EVERY_IMAGE]
    parts += [f"{counts['']} of other splits"] if counts[""] else []
    shown = ", ".join(parts)
    if columns.split is None:
        by = f"{columns.patient}, else file" if columns.patient else "file"
        shown += f" (no column of splits: split by the hash of {by})"
    if config.test_split == EVERY_IMAGE:
        shown = "all are evaluated, whatever their split"
    return f"{config.metadata_file}: {len(splits):,} images, {shown}; columns {', '.join(columns.read())}"


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


def _choose_columns(config: FolderData, names: list[str]) -> tuple[_Columns, list[str]]:
    """The columns that are read, and the faults of the options that name them."""
    faults = []
    chosen: dict[str, str | None] = {}
    for value in ("image", "caption", *DOCUMENTED):
        option = f"{value}_column"
        name: str = getattr(config, option)
        if value in DOCUMENTED and name == NONE:
            chosen[value] = None
        elif value in DOCUMENTED and name == AUTO:
            documented = DOCUMENTED[value]
            chosen[value] = documented if documented in names else None
            alike = [other for other in names if key(other) == documented and other != documented]
            if alike and not chosen[value]:
                faults.append(
                    f"column '{alike[0]}' would be read as '{documented}' if it were written so: rename it, or set "
                    f"data.{option} to it, or to {NONE}"
                )
        else:
            chosen[value] = name
            if name not in names:
                faults.append(f"data.{option} '{name}' is not a column{did_you_mean(name, names)}")
    columns = _Columns(**chosen)  # type: ignore[arg-type]
    for value in ("phrase", "box", "mask"):
        if chosen[value] and columns.finding is None:
            faults.append(
                f"data.{value}_column needs data.finding_column, which says what is there, and no column of findings "
                f"is read; name one, or set data.{value}_column {NONE} to leave column '{chosen[value]}' unread"
            )
    if config.findings and columns.finding is None and columns.label is None:
        faults.append("data.findings needs data.finding_column or data.label_column")
    if columns.split is None:
        defaults = FolderData()
        for option in ("train_split", "test_split"):
            name = getattr(config, option)
            if name not in (getattr(defaults, option), EVERY_IMAGE):
                faults.append(f"data.{option} '{name}' needs data.split_column, and no column of splits is read")
    elif config.train_split == EVERY_IMAGE:
        faults.append(f"data.train_split cannot be {EVERY_IMAGE}: a test would see what was trained on")
    return columns, faults


def _entries(config: FolderData, columns: _Columns, root: Path, rows: list[Row], faults: Faults) -> list[_Entry]:
    """Rows brought together by image. Faults of text go to `faults`; files are not opened here."""
    entries: dict[Path, _Entry] = {}
    conflicts: set[tuple[Path, str]] = set()
    real_root = root.resolve()
    for number, row in rows:
        place = Place(config.metadata_file, "row", number)
        try:
            name = text_of(row, columns.image)
            path = _path_in(real_root, name, columns.image)
            caption = caption_of(row, columns.caption, config.allow_empty_captions)
            split = _split_of(config, row, columns.split)
            patient = text_of(row, columns.patient, empty=True).removesuffix(".0") if columns.patient else ""
            labels = [label for label in texts_of(row, columns.label) if label]
            annotations = _annotations(columns, real_root, place, row)
        except ValueError as error:
            faults.append((place, str(error)))
            continue
        image = ImageRecord(place, path.relative_to(real_root).as_posix(), path, patient=patient)
        entry = entries.setdefault(path, _Entry(image, caption, split, patient))
        for what, first, value in (
            ("caption", entry.caption, caption),
            ("split", entry.split, split),
            ("patient", entry.patient, patient),
        ):
            if first != value and (path, what) not in conflicts:
                conflicts.add((path, what))
                both = f"'{quote(value)}' and '{quote(first)}' (row {entry.image.place.number})"
                faults.append((place, f"'{quote(name)}' has two values of {what}: {both}; right is one an image"))
        entry.labels += labels
        entry.image.annotations += annotations
    return list(entries.values())


def _split_of(config: FolderData, row: dict[str, object], column: str | None) -> str:
    value = text_of(row, column, empty=True) if column else ""
    for name in (config.train_split, config.test_split, *VALIDATION_SPLITS):
        if key(value) == key(name) and value != name and value not in VALIDATION_SPLITS:
            raise ValueError(f"{column} is '{quote(value)}'; right is '{name}'")
    return value


def _annotations(columns: _Columns, root: Path, place: Place, row: dict[str, object]) -> list[Annotation]:
    boxes = _boxes(row[columns.box], columns.box) if columns.box and columns.box in row else []
    lists: dict[str, list[Any]] = {
        "box": boxes,
        "mask": [_path_in(root, m, columns.mask) if m else None for m in texts_of(row, columns.mask)],
        "finding": texts_of(row, columns.finding),
        "phrase": texts_of(row, columns.phrase),
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
            raise ValueError(f"there is a box or mask and {columns.finding} is empty")
        if finding:
            annotations.append(Annotation(place, finding, box, mask, phrase=phrase or None))
    return annotations


def _boxes(value: object, column: str) -> list[Box]:
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


def _findings(config: FolderData, columns: _Columns, rows: list[Row]) -> tuple[tuple[str, ...], list[str]]:
    """Findings of the data set, by default those of boxes, else the labels; and faults of the config's findings and query
    words."""
    of_boxes: dict[str, str] = {}
    of_images: dict[str, str] = {}
    for _, row in rows:
        for names, column in ((of_boxes, columns.finding), (of_images, columns.label)):
            try:
                for name in filter(None, texts_of(row, column)):
                    names.setdefault(key(name), name)
            except ValueError:
                continue  # listed with its row
    labels = {name: label for name, label in of_images.items() if name != NO_LABEL}
    return choose_findings(config, sorted((of_boxes or labels).values()), {**of_images, **of_boxes}.values(), "row")


def _split_faults(column: str, wanted: tuple[str, ...], rows: list[Row]) -> list[str]:
    seen = Counter(str(row.get(column, "")).strip() for _, row in rows)
    if any(value in seen for value in wanted):
        return []
    values = ", ".join(f"'{quote(value)}' ({count} rows)" for value, count in seen.most_common(20))
    option = "" if wanted == VALIDATION_SPLITS else "name one of these by data.train_split or data.test_split, "
    return [
        f"no row has {column} = {' or '.join(wanted)}; there are {values}; {option}write the value into some rows, or "
        f"set data.split_column {NONE} to have the images split by patient and file"
    ]


def _too_few_groups(split: str, groups: int) -> str:
    needed, remedy = 2, f"evaluate only, with data.test_split {EVERY_IMAGE}"
    if split == "validation":
        needed, remedy = 3, "write validation, val or valid into a column of splits"
    return (
        f"the {split} split is empty: without a column of splits it needs at least {needed} images that share no "
        f"patient and no file, and there are {groups}; the first is the test split. Add images, or {remedy}"
    )

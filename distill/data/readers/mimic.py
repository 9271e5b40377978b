"""MIMIC-CXR-JPG with the metadata CSV of Dombrowski et al. 2024 (arXiv 2303.17908), and the boxes of MS-CXR."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from distill.data.captions import query_words_for
from distill.data.readers.coco import read_coco
from distill.data.readers.inspection import Annotation, ImageRecord, check_inside
from distill.data.readers.records import (
    RecordDataset,
    SampleRecord,
    choose_findings,
    data_root,
    logger,
    path_under,
)
from distill.data.readers.splits import Member, Split, refuse_shared
from distill.data.readers.tables import (
    SPLIT_CODES,
    VALIDATION_SPLITS,
    Box,
    Faults,
    Place,
    box_of,
    caption_of,
    csv_rows,
    did_you_mean,
    frame_of,
    key,
    quote,
    read_text,
    split_name,
    split_of,
    text_of,
    texts_of,
)
from distill.data_config import MimicData, MsCxrData
from distill.errors import UserError, raise_all
from distill.tokens import find_words

NO_FINDING = "No Finding"

CHEXPERT_LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    NO_FINDING,
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)
"""Columns of labels in MIMIC-CXR-JPG (Irvin et al. 2019): 1 named, 0 negated, -1 uncertain, empty not mentioned."""

_COLUMNS = ("dicom_id", "path", "split", "impression")
_LABELS = "Finding Labels"
_PATIENT = "subject_id"


# --- MIMIC-CXR-JPG ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Study:
    """A row of the metadata CSV."""

    place: Place
    dicom_id: str
    patient: str
    path: str
    split: str
    impression: str
    labels: list[str]


def _without_patients(
    chosen: list[_Study], studies: Sequence[_Study], held_out: Collection[str], held_out_patients: Collection[str]
) -> list[_Study]:
    """`chosen` without the images `held_out`, and without those of their patients and of `held_out_patients`."""
    patients = {study.patient for study in studies if study.dicom_id in held_out and study.patient}
    patients |= set(held_out_patients)
    kept = [s for s in chosen if s.dicom_id not in held_out and not {s.patient, _patient(s.path)} & patients]
    if len(kept) < len(chosen):
        logger.warning(
            "%d of %d training images are left out, because images of their patients are evaluated on",
            len(chosen) - len(kept),
            len(chosen),
        )
    return kept


class MimicDataset(RecordDataset):
    """Images and impressions of one split of the metadata CSV, without boxes.

    All rows are checked when it is made, and the images of this split. A path that ends in .dcm is read as .jpg, as the
    published metadata means it. Labels are those of the column `Finding Labels`, joined by `|`, or of one column a
    finding, of which 1 counts.

    held_out, held_out_patients: for training, dicom_ids of images that are evaluated on, and their patients as far as
    known: all images of these patients (column subject_id, or of the path), and these images, are left out.
    findings: config.findings, or all labels but `No Finding`, sorted.

    Raises UserError that lists all faults at once.
    """

    def __init__(
        self,
        config: MimicData | MsCxrData,
        split: Split,
        *,
        held_out: Collection[str] = (),
        held_out_patients: Collection[str] = (),
    ) -> None:
        root = data_root(config)
        option = "metadata_file" if config.kind == "mimic" else "mimic_file"
        faults: Faults = []
        studies = _read_studies(config, root, option, faults)
        values = VALIDATION_SPLITS if split == "validation" else (getattr(config, f"{split}_split"),)
        wanted = [SPLIT_CODES.get(value, value) for value in values]
        chosen = [study for study in studies if study.split in map(split_name, values)]
        general = []
        if not chosen and not faults:
            there = ", ".join(f"{name} ({n} rows)" for name, n in Counter(s.split for s in studies).items())
            general.append(
                f"no row of {getattr(config, option)} has split {' or '.join(wanted)}; there are {there or 'no rows'}"
            )
        if held_out:
            chosen = _without_patients(chosen, studies, held_out, held_out_patients)
        labels = {key(label): label for study in studies for label in study.labels}
        named = sorted(label for label in labels.values() if key(label) != key(NO_FINDING))
        findings, problems = choose_findings(config, named, [*labels.values(), *CHEXPERT_LABELS], "row")
        real_root = root.resolve()
        samples = [
            SampleRecord(
                study.path,
                ImageRecord(study.place, study.path, real_root / study.path, patient=study.patient),
                study.impression,
                study.labels,
                regions=(),
            )
            for study in chosen
        ]
        super().__init__(
            config,
            findings=findings,
            query_words={name: query_words_for(name, config.query_words) for name in findings},
            images=[sample.image for sample in samples],
            samples=samples,
            general=general + problems,
            faults=faults,
            about=_about(getattr(config, option), studies),
            split=split,
            no_regions="this file has none; data.kind mscxr reads those of MS-CXR",
        )
        if config.kind == "mimic":
            # In training for MS-CXR, patients that are evaluated on are left out above.
            named = [split_name(name) for name in (config.train_split, config.test_split)]
            refuse_shared(
                [
                    Member(study.place, study.path, study.split, study.patient)
                    for study in studies
                    if study.split in (*named, *VALIDATION_SPLITS)
                ],
                f"{getattr(config, option)} has a patient in two splits: a test would see what was trained on",
                "Give all rows of a patient one value of split",
            )


def _about(name: str, studies: list[_Study]) -> str:
    splits = ", ".join(f"{count:,} {split}" for split, count in Counter(study.split for study in studies).items())
    known = sum(bool(study.patient) for study in studies)
    return (
        f"{name}: {len(studies):,} images, {splits}; columns {', '.join(_COLUMNS)} and labels; patient known of "
        f"{known:,} (subject_id, else path)"
    )


def _read_studies(
    config: MimicData | MsCxrData, root: Path, option: str, faults: Faults, only: Collection[str] | None = None
) -> list[_Study]:
    """Rows of the metadata CSV that `option` names; of those with a dicom_id of `only`, if it is given."""
    name = getattr(config, option)
    text = read_text(root, name, f"data.{option}")
    columns, rows, broken = csv_rows(text, {*_COLUMNS, _LABELS, _PATIENT, *CHEXPERT_LABELS})
    broken += [f"there is no column '{c}'{did_you_mean(c, columns)}" for c in _COLUMNS if c not in columns]
    label_columns = [column for column in CHEXPERT_LABELS if column in columns]
    if _LABELS not in columns and not label_columns:
        broken.append(f"there is no column '{_LABELS}', nor one a finding, such as '{CHEXPERT_LABELS[0]}'")
    raise_all(f"'{root / name}' cannot be read as MIMIC metadata", broken)
    studies = []
    seen: dict[tuple[str, str], int] = {}
    for number, row in rows:
        place = Place(name, "row", number)
        if only is not None and row["dicom_id"].strip() not in only:
            continue
        try:
            study = _Study(
                place=place,
                dicom_id=text_of(row, "dicom_id"),
                patient=text_of(row, _PATIENT, empty=True).removesuffix(".0") or _patient(row["path"]),
                path=_image_path(row, "path"),
                split=split_of(row, "split"),
                impression=caption_of(row, "impression", config.allow_empty_captions),
                labels=_labels(row, label_columns),
            )
            for column, value in (("dicom_id", study.dicom_id), ("path", study.path)):
                first = seen.setdefault((column, value), number)
                if first != number:
                    raise ValueError(
                        f"{column} '{quote(value)}' is also that of row {first}; right is one row an image"
                    )
        except ValueError as error:
            faults.append((place, str(error)))
            continue
        studies.append(study)
    return studies


def _labels(row: dict[str, object], label_columns: list[str]) -> list[str]:
    if _LABELS in row:
        return [label for label in texts_of(row, _LABELS) if label]
    labels = []
    for column in label_columns:
        value = text_of(row, column, empty=True).removesuffix(".0")
        if value not in ("", "1", "0", "-1"):
            raise ValueError(f"{column} '{quote(value)}' is none of 1, 0, -1 and empty")
        if value == "1":
            labels.append(column)
    return labels


def _patient(path: str) -> str:
    """subject_id of a path of MIMIC-CXR, such as files/p10/p10000032/s50414267/x.jpg; empty for another path."""
    found = re.search(r"(?:^|/)p(\d{8})/", path)
    return found[1] if found else ""


def _image_path(row: dict[str, object], column: str) -> str:
    path = path_under(text_of(row, column), column)
    return path.removesuffix(".dcm") + ".jpg" if path.endswith(".dcm") else path


# --- MS-CXR -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Row:
    """One box. text: label_text, the phrase of the box, or the report's impression."""

    place: Place
    dicom_id: str
    path: str
    frame: tuple[int, int]
    finding: str
    box: Box
    text: str
    split: str


_COMMON = ("dicom_id", "category_name", "label_text", "image_width", "image_height")
_BOX_A_ROW = (*_COMMON, "path", "x", "y", "w", "h")
_JOINED = (*_COMMON, "paths", "bboxxywh")


class MsCxrDataset(RecordDataset):
    """The images of MS-CXR and their boxes. All rows are checked when it is made, and the images of this split.

    config.metadata_file has one of three shapes, which its content tells: COCO's JSON with label_text in its
    annotations, a CSV of one box a row, or the CSV of Dombrowski et al. 2024, whose bboxxywh is `x-y-w-h|x-y-w-h`.
    Boxes are of image_width x image_height; they are resized with the image if the file has another size of the same
    aspect.

    Captions, by config.caption_source:
    impression: of config.mimic_file by dicom_id, else label_text of the CSV with bboxxywh; a sample an image.
    phrase: label_text; a sample for each phrase of an image. As many phrases joined by `|` as boxes are one each.

    With config.mentioned_only, regions of findings that the caption has no word of are left out. A sample without
    regions is left out. split: by config.split_column, where it names a column; else every row is a test row.

    findings: config.findings, or the categories of the file. labels: the findings of the caption's boxes.

    Raises UserError that lists all faults at once.
    """

    def __init__(self, config: MsCxrData, split: Literal["test", "validation"]) -> None:
        root = data_root(config)
        faults: Faults = []
        rows, categories = _read_boxes(config, root, faults)
        findings, general = choose_findings(config, categories, categories, f"category of {config.metadata_file}")
        query_words = {name: query_words_for(name, config.query_words) for name in findings}
        wanted = VALIDATION_SPLITS if split == "validation" else (config.test_split,)
        column = _split_column(config)
        if split == "validation" and column is None:
            raise UserError(
                "MS-CXR has no validation split, and what is chosen on its test images must not be tested on them: set "
                "data.split_column to a column with `validation`, `val` or `valid` in some rows"
            )
        if column and not faults and not any(row.split in wanted for row in rows):
            there = ", ".join(f"'{quote(value)}' ({n} boxes)" for value, n in Counter(r.split for r in rows).items())
            general.append(f"no row has {column} = {' or '.join(wanted)}; there are {there or 'no rows'}")
        by_all = by_image = _by_image(rows, faults)
        captions = _captions(config, root, by_image, faults)
        if column:
            by_image = {path: group for path, group in by_image.items() if group[0].split in wanted}
        samples, unnamed = _samples(config, root.resolve(), by_image, captions, query_words)
        if not samples and not faults and not general:
            general.append("no caption names a finding of its image; set data.query_words to the words that do")
        if unnamed:
            logger.warning("data.mentioned_only: %d findings that their captions do not name are left out", unnamed)
        super().__init__(
            config,
            findings=findings,
            query_words=query_words,
            images={id(sample.image): sample.image for sample in samples}.values(),
            samples=samples,
            general=general,
            faults=faults,
            about=_about_boxes(config, by_all),
            split=split,
            no_regions=f"{config.metadata_file} has none for the findings that are kept",
        )
        if column:
            refuse_shared(
                [
                    Member(
                        row.place,
                        row.path,
                        "validation" if row.split in VALIDATION_SPLITS else row.split,
                        _patient(row.path),
                    )
                    for row in {row.path: row for row in rows}.values()
                    if row.split in (config.test_split, *VALIDATION_SPLITS)
                ],
                f"{config.metadata_file} has a patient in two splits",
                f"Give all images of a patient one value of {column}",
            )


def _about_boxes(config: MsCxrData, by_image: Mapping[str, list[_Row]]) -> str:
    boxes = sum(map(len, by_image.values()))
    column = _split_column(config)
    splits = f"split by {column}" if column else "all in the test split"
    captions = "label_text" if config.caption_source == "phrase" or config.mimic_file is None else config.mimic_file
    return f"{config.metadata_file}: {len(by_image):,} images with {boxes:,} boxes, {splits}; captions of {captions}"


def mscxr_training(config: MsCxrData) -> MimicDataset:
    """The training rows of config.mimic_file, without the patients of MS-CXR. Raises UserError if there is none."""
    if config.mimic_file is None:
        raise UserError("data.mimic_file is missing: MS-CXR is for evaluation; training needs the MIMIC metadata CSV")
    rows, _ = _read_boxes(config, data_root(config), [])
    # The metadata CSV need not have rows of the images of MS-CXR.
    patients = {_patient(row.path) for row in rows} - {""}
    return MimicDataset(config, "train", held_out={row.dicom_id for row in rows}, held_out_patients=patients)


def _read_boxes(config: MsCxrData, root: Path, faults: Faults) -> tuple[list[_Row], list[str]]:
    """All boxes, and the names of the categories."""
    name = config.metadata_file
    text = read_text(root, name, "data.metadata_file")
    if text.lstrip()[:1] in ("{", "["):
        return _read_json(config, text, faults)
    split_column = _split_column(config)
    keep = {*_BOX_A_ROW, *_JOINED, *([split_column] if split_column else [])}
    columns, rows, broken = csv_rows(text, keep)
    joined = "bboxxywh" in columns
    missing = [column for column in (_JOINED if joined else _BOX_A_ROW) if column not in columns]
    if missing:
        broken.append(
            f"there is no column {', '.join(missing)}; right are COCO's JSON, a CSV with {', '.join(_BOX_A_ROW)}, or "
            f"one with {', '.join(_JOINED)}"
        )
    if split_column and split_column not in columns:
        broken.append(f"data.split_column '{split_column}' is not a column")
    raise_all(f"'{root / name}' cannot be read as MS-CXR", broken)
    if not joined and config.caption_source == "impression" and config.mimic_file is None:
        raise UserError(_NO_IMPRESSIONS)
    found: list[_Row] = []
    seen: dict[tuple[str, ...], int] = {}
    for number, row in rows:
        place = Place(name, "row", number)
        try:
            if joined:
                boxes = [_dashed(part) for part in text_of(row, "bboxxywh").split("|")]
                texts = _texts(config, row, len(boxes))
                identity = tuple(row[column].strip() for column in ("dicom_id", "category_name", "label_text"))
                if seen.setdefault(identity, number) != number:
                    raise ValueError(
                        f"dicom_id, category_name and label_text are those of row {seen[identity]}; right is one row "
                        "for each, with boxes joined by |"
                    )
            else:
                boxes = [box_of([row[column] for column in ("x", "y", "w", "h")], "box")]
                texts = [caption_of(row, "label_text", True)]
            shared: dict[str, Any] = {
                "place": place,
                "dicom_id": text_of(row, "dicom_id"),
                "path": _image_path(row, "paths" if joined else "path"),
                "frame": frame_of(row, "image_width", "image_height"),
                "finding": text_of(row, "category_name"),
                "split": text_of(row, split_column, empty=True) if split_column else "",
            }
            for box in boxes:
                check_inside(box, shared["path"], shared["frame"], "as annotated")
        except ValueError as error:
            faults.append((place, str(error)))
            continue
        found += [_Row(box=box, text=text, **shared) for box, text in zip(boxes, texts, strict=True)]
    return found, sorted({key(row.finding): row.finding for row in found}.values())


def _split_column(config: MsCxrData) -> str | None:
    # MS-CXR is for evaluation: a column counts only where it is named.
    return None if config.split_column == "none" else config.split_column


_NO_IMPRESSIONS = (
    "data.caption_source impression: this file of MS-CXR has phrases only; set data.mimic_file to the MIMIC metadata "
    "CSV, or data.caption_source phrase"
)


def _read_json(config: MsCxrData, text: str, faults: Faults) -> tuple[list[_Row], list[str]]:
    if config.caption_source == "impression" and config.mimic_file is None:
        raise UserError(_NO_IMPRESSIONS)
    name = config.metadata_file
    file = read_coco(text, name, faults, categories=True)
    images: dict[int, dict[str, Any]] = {}
    for identity, image in file.images.items():
        try:
            path = _image_path(image, "path" if image.get("path") else "file_name")
            file_name = text_of(image, "file_name", empty=True)
            frame = frame_of(image, "width", "height")
        except ValueError as error:
            faults.append((Place(name, "image", identity), str(error)))
            continue
        images[identity] = {"dicom_id": PurePosixPath(file_name or path).stem, "path": path, "frame": frame}
    found = []
    for place, annotation in file.annotations:
        shared = images.get(annotation["image_id"])
        if shared is None:
            continue  # listed with the image
        try:
            for column, side in zip(("width", "height"), shared["frame"], strict=True):
                if annotation.get(column, side) != side:
                    raise ValueError(f"{column} is {quote(annotation[column])} and its image's {side}")
            split = ""
            if split_column := _split_column(config):
                entry = {**file.images[annotation["image_id"]], **annotation}
                if split_column not in entry:
                    raise ValueError(f"neither it nor its image has data.split_column '{split_column}'")
                split = text_of(entry, split_column, empty=True)
            row = _Row(
                place=place,
                finding=file.categories[annotation["category_id"]],
                box=box_of(annotation.get("bbox"), "bbox"),
                text=caption_of(annotation, "label_text", True),
                split=split,
                **shared,
            )
            check_inside(row.box, row.path, row.frame, "as annotated")
        except ValueError as error:
            faults.append((place, str(error)))
            continue
        found.append(row)
    return found, list(dict.fromkeys(file.categories.values()))


def _dashed(part: str) -> Box:
    pieces = part.strip().split("-")
    if len(pieces) != 4 or not all(re.fullmatch(r"\d+(\.\d+)?", piece) for piece in pieces):
        raise ValueError(f"bboxxywh '{quote(part)}' is not a box; right is x-y-w-h in pixels, boxes joined by |")
    return box_of(pieces, "bboxxywh")


def _texts(config: MsCxrData, row: dict[str, object], boxes: int) -> list[str]:
    """The text of each box of a row of joined boxes: the impression, or a phrase."""
    text = caption_of(row, "label_text", True)
    if config.caption_source == "impression" and config.mimic_file is None:
        return [text] * boxes
    phrases = [phrase.strip() for phrase in text.split("|")]
    if len(phrases) not in (1, boxes):
        raise ValueError(
            f"label_text has {len(phrases)} phrases joined by | for {boxes} boxes; right is one, or one each"
        )
    return phrases * boxes if len(phrases) == 1 else phrases


def _by_image(rows: list[_Row], faults: Faults) -> dict[str, list[_Row]]:
    """Boxes by the path of their image, and faults of images that are told about in two ways."""
    groups: dict[str, list[_Row]] = {}
    paths: dict[str, _Row] = {}
    for row in rows:
        first = groups.setdefault(row.path, [row])[0]
        if row is not first:
            groups[row.path].append(row)
        other = paths.setdefault(row.dicom_id, row)
        for what, value, before in (
            ("dicom_id", row.dicom_id, first),
            ("frame", row.frame, first),
            ("split", row.split, first),
            ("path", row.path, other),
        ):
            known = getattr(before, what)
            if value != known:
                image = f"dicom_id '{row.dicom_id}'" if what == "path" else f"image '{quote(row.path)}'"
                name = "image_width, image_height" if what == "frame" else what
                faults.append(
                    (row.place, f"{image} has two values of {name}: {value} and {known} ({before.place}); right is one")
                )
    return groups


def _captions(
    config: MsCxrData, root: Path, by_image: Mapping[str, list[_Row]], faults: Faults
) -> dict[str, str] | None:
    """The impression of each image by path; None where phrases are captions. Faults of captions go to `faults`."""
    if config.caption_source == "phrase" or config.mimic_file is None:
        for row in (row for group in by_image.values() for row in group):
            if not row.text and not config.allow_empty_captions:
                faults.append((row.place, "label_text is empty; set data.allow_empty_captions true to accept it"))
    if config.caption_source == "phrase":
        return None
    if config.mimic_file is None:
        for path, group in by_image.items():
            for row in group:
                if row.text != group[0].text:
                    both = f"'{quote(row.text)}' and '{quote(group[0].text)}' ({group[0].place})"
                    faults.append(
                        (
                            row.place,
                            f"image '{path}' has two values of label_text: {both}; right is its impression, or set "
                            "data.caption_source phrase",
                        )
                    )
                    break
        return {path: group[0].text for path, group in by_image.items()}
    firsts = {group[0].dicom_id: group[0] for group in by_image.values()}
    before = len(faults)
    studies = {study.dicom_id: study for study in _read_studies(config, root, "mimic_file", faults, firsts)}
    if len(faults) == before:
        faults += [
            (row.place, f"dicom_id '{quote(dicom_id)}' is in no row of data.mimic_file, '{config.mimic_file}'")
            for dicom_id, row in firsts.items()
            if dicom_id not in studies
        ]
    return {
        path: studies[group[0].dicom_id].impression if group[0].dicom_id in studies else ""
        for path, group in by_image.items()
    }


def _samples(
    config: MsCxrData,
    root: Path,
    by_image: Mapping[str, list[_Row]],
    captions: Mapping[str, str] | None,
    query_words: Mapping[str, tuple[str, ...]],
) -> tuple[list[SampleRecord], int]:
    """Samples that have regions, and how many findings config.mentioned_only left out."""
    canonical = {key(name): name for name in query_words}
    samples = []
    unnamed = 0
    # label_text is a phrase unless it is taken for the impression.
    has_phrases = captions is None or config.mimic_file is not None
    for path, rows in by_image.items():
        rows = [row for row in rows if key(row.finding) in canonical]
        annotations = [
            Annotation(row.place, canonical[key(row.finding)], row.box, phrase=row.text if has_phrases else None)
            for row in rows
        ]
        if not rows:
            continue
        image = ImageRecord(rows[0].place, path, root / path, rows[0].frame, annotations, _patient(path))
        texts: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            texts.setdefault("" if captions is not None else key(row.text), []).append(number)
        for place, numbers in enumerate(texts.values()):
            caption = captions[path] if captions is not None else rows[numbers[0]].text
            labels = dict.fromkeys(annotations[number].finding for number in numbers)
            named = {name for name in labels if not config.mentioned_only or find_words(caption, query_words[name])}
            unnamed += len(labels) - len(named)
            regions = [number for number in numbers if annotations[number].finding in named]
            if regions:
                name = path if captions is not None else f"{path}#{place}"
                samples.append(SampleRecord(name, image, caption, tuple(labels), regions))
    return samples, unnamed

"""COCO: captions and instances in JSON, or the captions CSV of Dombrowski et al. 2024 (path, captions, split).

A sample is one caption of one image; its regions are the classes that the caption names, each the union of the class's
instances. These are the (image, caption, class) triples of the paper, with the classes of a caption in one sample.
Crowd regions (`iscrowd`) belong to the union, as in the paper's code: a pixel of a crowd is a pixel of the class.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.data.captions import query_words_for
from distill.data.readers.inspection import Annotation, ImageRecord, check_inside
from distill.data.readers.pixels import check_segmentation
from distill.data.readers.records import (
    RecordDataset,
    SampleRecord,
    choose_findings,
    data_root,
    path_under,
)
from distill.data.readers.splits import Split
from distill.data.readers.tables import (
    SPLIT_CODES,
    VALIDATION_SPLITS,
    Box,
    Faults,
    GivenTwice,
    Place,
    caption_of,
    csv_rows,
    did_you_mean,
    frame_of,
    key,
    numbers_of,
    quote,
    read_json,
    read_text,
    split_name,
    split_of,
    text_of,
    texts_of,
)
from distill.data_config import CocoData
from distill.errors import UserError, raise_all
from distill.tokens import find_words


@dataclass
class CocoFile:
    """A file of COCO's JSON whose ids are unique and known. annotations: with their place."""

    images: dict[int, dict[str, Any]]
    annotations: list[tuple[Place, dict[str, Any]]]
    categories: dict[int, str]


class CocoDataset(RecordDataset):
    """One split of COCO. All rows of the split's files are checked when it is made, and all images that it uses.

    split: `{split}` in the names of files is config.train_split, config.test_split, or `val` for validation; a CSV is
    also filtered by its column `split`. For training every caption is a sample; for evaluation those that name a class
    of their image, if there are instances.

    findings: config.findings, or the categories in the file's order. labels: all classes of the image.

    Raises UserError that lists all faults at once.
    """

    def __init__(self, config: CocoData, split: Split) -> None:
        root = data_root(config)
        name = {"train": config.train_split, "test": config.test_split, "validation": "val"}[split]
        captions_file = config.captions_file.replace("{split}", name)
        image_dir = config.image_dir.replace("{split}", name)
        faults: Faults = []
        captions = _read_captions(config, root, captions_file, image_dir, split, faults)
        truth: dict[str, ImageRecord] = {}
        classes: Sequence[str] = ()
        instances_file = config.instances_file
        if instances_file is not None:
            instances_file = instances_file.replace("{split}", name)
            truth, classes = _read_instances(root, instances_file, image_dir, faults)
        findings, general = choose_findings(config, dict.fromkeys(classes), classes, "category of data.instances_file")
        query_words = {finding: class_words(finding, config.query_words) for finding in findings}
        everything = split == "train" or not classes
        samples = _samples(root.resolve(), captions, truth, query_words, everything=everything)
        if not everything and samples:
            faults += [
                (
                    place,
                    f"image '{quote(path)}' is none of the images of {instances_file}; right is the same file in both",
                )
                for path, place, _ in captions
                if path not in truth
            ]
        if not samples and not faults:
            paths = {path for path, _, _ in captions}
            general.append(
                f"no caption of {captions_file} names a class of its image; {len(paths & truth.keys())} of "
                f"{len(paths)} images are in {instances_file} (paths under root are compared, see data.image_dir)"
            )
        super().__init__(
            config,
            findings=findings,
            query_words=query_words,
            images={id(sample.image): sample.image for sample in samples}.values(),
            samples=samples,
            general=general,
            faults=faults,
            about=f"captions of {captions_file}, {f'instances of {instances_file}' if instances_file else 'no instances'}",
            split=split,
            no_regions=f"{instances_file} has none for these captions"
            if instances_file
            else "captions alone: data.instances_file is none; it names the JSON with COCO's boxes and masks",
        )


def class_words(name: str, overrides: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The override, else the whole name in singular and plural: "baseball" in a caption names no baseball glove."""
    if any(key(other) == key(name) for other in overrides):
        return query_words_for(name, overrides)
    *first, last = name.split()
    return tuple(" ".join([*first, form]) for form in query_words_for(last, {}) or (last,))


Caption = tuple[str, Place, str]
"""Path of the image under root, place, text."""


def _samples(
    root: Path,
    captions: list[Caption],
    truth: Mapping[str, ImageRecord],
    query_words: Mapping[str, tuple[str, ...]],
    *,
    everything: bool,
) -> list[SampleRecord]:
    """everything: also captions that name no class of their image."""
    canonical = {key(name): name for name in query_words}
    images: dict[str, ImageRecord] = {}
    counts: Counter[str] = Counter()
    samples = []
    for path, place, caption in captions:
        image = images.get(path)
        if image is None:
            image = images[path] = truth.get(path) or ImageRecord(place, path, root / path)
        number = counts[path]
        counts[path] += 1
        labels = dict.fromkeys(canonical[key(a.finding)] for a in image.annotations if key(a.finding) in canonical)
        named = {name for name in labels if find_words(caption, query_words[name])}
        if named or everything:
            regions = [n for n, a in enumerate(image.annotations) if canonical.get(key(a.finding)) in named]
            samples.append(SampleRecord(f"{path}#{number}", image, caption, tuple(labels), regions))
    return samples


# --- files --------------------------------------------------------------------------------------------------------


def _read_captions(
    config: CocoData, root: Path, name: str, image_dir: str, split: str, faults: Faults
) -> list[Caption]:
    text = read_text(root, name, "data.captions_file")
    found: list[Caption] = []
    if not name.endswith(".csv"):
        file = read_coco(text, name, faults)
        paths = _paths(file, name, image_dir, faults)
        for place, annotation in file.annotations:
            try:
                caption = caption_of(annotation, "caption", config.allow_empty_captions)
            except ValueError as error:
                faults.append((place, str(error)))
                continue
            if annotation["image_id"] in paths:
                found.append((paths[annotation["image_id"]], place, caption))
        return found
    columns, rows, broken = csv_rows(text, ("path", "captions", "split"))
    missing = [column for column in ("path", "captions", "split") if column not in columns]
    broken += [f"there is no column '{column}'{did_you_mean(column, columns)}" for column in missing]
    raise_all(
        f"'{root / name}' cannot be read as captions; right are columns path, captions (joined by |), split", broken
    )
    values = VALIDATION_SPLITS if split == "validation" else (getattr(config, f"{split}_split"),)
    wanted = [SPLIT_CODES.get(value, value) for value in values]
    seen: dict[str, int] = {}
    splits: Counter[str] = Counter()
    for number, row in rows:
        place = Place(name, "row", number)
        try:
            path = path_under(text_of(row, "path"), "path")
            if path in seen:
                raise ValueError(f"path '{quote(path)}' is also that of row {seen[path]}; right is one row an image")
            seen[path] = number
            captions = [
                caption_of({"captions": part}, "captions", config.allow_empty_captions)
                for part in texts_of(row, "captions") or [""]
            ]
            own_split = split_of(row, "split")
        except ValueError as error:
            faults.append((place, str(error)))
            continue
        splits[own_split] += 1
        if own_split in map(split_name, values):
            found += [(path, place, caption) for caption in captions]
    if not found and not faults:
        there = ", ".join(f"{value} ({count} rows)" for value, count in splits.items())
        raise UserError(f"'{root / name}' has no row of split {' or '.join(wanted)}; there are {there or 'no rows'}")
    return found


def _read_instances(root: Path, name: str, image_dir: str, faults: Faults) -> tuple[dict[str, ImageRecord], list[str]]:
    """Images with their instances by path under root, and the names of the categories."""
    file = read_coco(read_text(root, name, "data.instances_file"), name, faults, categories=True)
    images: dict[int, ImageRecord] = {}
    real_root = root.resolve()
    for identity, path in _paths(file, name, image_dir, faults).items():
        place = Place(name, "image", identity)
        try:
            frame = frame_of(file.images[identity], "width", "height")
        except ValueError as error:
            faults.append((place, str(error)))
            continue
        images[identity] = ImageRecord(place, path, real_root / path, frame)
    for place, annotation in file.annotations:
        image = images.get(annotation["image_id"])
        if image is None or image.frame is None:
            continue  # listed with the image
        try:
            box = _box(annotation.get("bbox"))
            if box:
                check_inside(box, image.name, image.frame, "as annotated")
            segmentation = check_segmentation(annotation.get("segmentation"), *image.frame)
        except ValueError as error:
            faults.append((place, str(error)))
            continue
        finding = file.categories[annotation["category_id"]]
        image.annotations.append(Annotation(place, finding, box, segmentation=segmentation))
    return {image.name: image for image in images.values()}, list(file.categories.values())


def _box(value: object) -> Box | None:
    """A box, None if it has no area: published instances have boxes of height 0."""
    box = numbers_of(value, "bbox")
    if box[2] < 0 or box[3] < 0:
        raise ValueError(f"bbox '{quote(value)}' has a negative width or height")
    return box if box[2] > 0 and box[3] > 0 else None


def _paths(file: CocoFile, name: str, image_dir: str, faults: Faults) -> dict[int, str]:
    """Image id -> path under root of `image_dir`/file_name."""
    paths: dict[int, str] = {}
    seen: dict[str, int] = {}
    for identity, image in file.images.items():
        try:
            path = path_under(text_of(image, "file_name"), "file_name", folder=image_dir)
            if path in seen:
                raise ValueError(f"file_name '{quote(path)}' is also that of image {seen[path]}")
        except ValueError as error:
            faults.append((Place(name, "image", identity), str(error)))
            continue
        paths[identity] = path
        seen[path] = identity
    return paths


def read_coco(text: str, name: str, faults: Faults, *, categories: bool = False) -> CocoFile:
    """COCO's JSON. Faults of ids go to `faults`, and what they belong to is left out.

    Raises UserError if it is no JSON or has not the lists `images`, `annotations` and, if asked for, `categories`.
    """
    try:
        document = read_json(text)
    except GivenTwice as error:
        raise UserError(f"'{name}': {error}") from error
    except ValueError as error:
        raise UserError(f"'{name}' is not JSON: {error} (is the file cut off?)") from error
    parts = ("images", "annotations", "categories") if categories else ("images", "annotations")
    missing = [p for p in parts if not isinstance(document, dict) or not isinstance(document.get(p), list)]
    if missing:
        has = ", ".join(map(quote, document)) if isinstance(document, dict) else type(document).__name__
        raise UserError(f"'{name}' is not COCO's JSON: it has no list {', '.join(missing)}; it has {has or 'nothing'}")
    images = dict(_by_id(document["images"], "image", name, faults))
    classes: dict[int, str] = {}
    for identity, category in _by_id(document["categories"], "category", name, faults) if categories else ():
        try:
            classes[identity] = text_of(category, "name")
        except ValueError as error:
            faults.append((Place(name, "category", identity), str(error)))
    annotations = []
    for identity, annotation in _by_id(document["annotations"], "annotation", name, faults):
        place = Place(name, "annotation", identity)
        image_id, category_id = annotation.get("image_id"), annotation.get("category_id")
        if type(image_id) is not int or image_id not in images:
            faults.append((place, f"image_id {quote(image_id)} is the id of no image in the file"))
        elif categories and (type(category_id) is not int or category_id not in classes):
            known = ", ".join(f"{number} {category}" for number, category in list(classes.items())[:20])
            faults.append((place, f"category_id {quote(category_id)} is the id of no category; there are {known}"))
        else:
            annotations.append((place, annotation))
    return CocoFile(images, annotations, classes)


def _by_id(entries: list[Any], what: str, name: str, faults: Faults) -> list[tuple[int, dict[str, Any]]]:
    found: dict[int, dict[str, Any]] = {}
    for number, entry in enumerate(entries, start=1):
        identity = entry.get("id") if isinstance(entry, dict) else None
        if type(identity) is not int:
            place = Place(name, f"{what} in place", number)
            faults.append((place, f"'{quote(entry)}' has no id that is a whole number"))
        elif identity in found:
            faults.append((Place(name, what, identity), "this id is there twice; right is one each"))
        else:
            found[identity] = entry
    return list(found.items())

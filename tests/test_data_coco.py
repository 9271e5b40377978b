"""COCO's captions and instances: segmentations against independent computation, samples, and files nobody should
write."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_options import data_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from matplotlib.path import Path as Outline
from PIL import Image

from distill.data.loading import load_dataset, refuse_shared_pictures
from distill.data.readers.coco import CocoDataset, class_words
from distill.data.readers.folder import FolderDataset
from distill.data.readers.pixels import check_segmentation, decode_counts, polygon_mask, rle_mask, segmentation_mask
from distill.data.sample import image_key
from distill.errors import UserError

# --- segmentations ------------------------------------------------------------------------------------------------


def runs_of(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask, column by column, the first of pixels outside."""
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat.astype(int))) + 1
    lengths = np.diff([0, *changes, len(flat)]).tolist()
    return [0, *lengths] if flat[0] else lengths


def compressed(runs: list[int]) -> str:
    """COCO's text of run lengths, written from the description of the format (cocoapi, maskApi.c, rleToString)."""
    text = ""
    for place, run in enumerate(runs):
        value = run - runs[place - 2] if place > 2 else run
        while True:
            five, value = value & 31, value >> 5
            last = value == (-1 if five & 16 else 0)
            text += chr(48 + five + (0 if last else 32))
            if last:
                break
    return text


MASKS = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(lambda shape: arrays(bool, shape))


@given(MASKS)
def test_run_lengths_come_back(mask: np.ndarray) -> None:
    height, width = mask.shape
    runs = runs_of(mask)
    assert decode_counts(compressed(runs)) == runs
    for counts in (runs, compressed(runs)):
        text = check_segmentation({"size": [height, width], "counts": counts}, width, height)
        assert text is not None and (segmentation_mask(text, width, height) == mask).all()


@given(st.lists(st.integers(0, 2**31), max_size=30))
def test_run_lengths_of_any_size_come_back(runs: list[int]) -> None:
    assert decode_counts(compressed(runs)) == runs


def test_run_lengths_that_pycocotools_wrote() -> None:
    corner = np.zeros((6, 8), bool)
    corner[1:4, 2:5] = corner[5, 7] = True
    y, x = np.mgrid[:40, :60]
    disc = (x - 30) ** 2 + (y - 18) ** 2 < 15**2
    written = {
        "=33000`0N": corner,
        "0<": np.ones((3, 4), bool),
        "<": np.zeros((3, 4), bool),
        "]d0;k04M2M4M2O0O2N2O0O2O00000000000000000001N101N2N101N3L3N3L]b0": disc,
    }
    for text, mask in written.items():
        assert (rle_mask(decode_counts(text), mask.shape[1], mask.shape[0]) == mask).all()
        assert compressed(runs_of(mask)) == text


@given(st.text(max_size=12))
def test_any_text_is_run_lengths_or_a_fault(text: str) -> None:
    try:
        runs = decode_counts(text)
    except ValueError as error:
        assert "segmentation.counts" in str(error)
    else:
        assert all(type(run) is int for run in runs)


def test_rectangles_on_pixel_edges_are_exact() -> None:
    mask = np.zeros((30, 40), bool)
    mask[10:20, 10:30] = mask[0:5, 35:40] = True
    polygons = [[10, 10, 30, 10, 30, 20, 10, 20], [35, 0, 40, 0, 40, 5, 35, 5]]
    assert (polygon_mask(polygons, 40, 30) == mask).all()
    assert (polygon_mask([[-1, -1, 41, -1, 41, 31, -1, 31]], 40, 30)).all()
    assert not polygon_mask([[5, 5, 9, 5, 7, 5]], 40, 30).any(), "no area"


@settings(max_examples=60)
@given(data=st.data(), corners=st.integers(3, 12), x=st.floats(12, 38), y=st.floats(12, 28), radius=st.floats(3, 11))
def test_polygons_cover_the_pixels_that_are_mostly_inside(
    data: Any, corners: int, x: float, y: float, radius: float
) -> None:
    """A star polygon, against the share of a fine grid of points that matplotlib finds inside."""
    angles = np.arange(corners) * 2 * np.pi / corners
    radii = radius * np.array(data.draw(st.lists(st.floats(0.4, 1), min_size=corners, max_size=corners)))
    points = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=1)
    fine = (np.arange(50 * 16) + 0.5) / 16
    grid = np.stack(np.meshgrid(fine, fine[: 40 * 16]), axis=-1).reshape(-1, 2)
    share = Outline(points).contains_points(grid).reshape(40, 16, 50, 16).mean(axis=(1, 3))
    mask = polygon_mask([points.reshape(-1).tolist()], 50, 40)
    assert mask[share > 0.7].all() and not mask[share < 0.3].any()
    assert abs(mask.sum() - share.sum()) <= 0.08 * share.sum() + 3, "no larger or smaller on the whole"


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"size": [20, 40], "counts": [1200]}, "segmentation.size is [20, 40]; right is [30, 40]"),
        ({"size": [30, 40], "counts": [600, 599]}, "add up to 1199 px; right is 30 x 40"),
        ({"size": [30, 40], "counts": [1300, -100]}, "are not numbers of pixels"),
        ({"size": [30, 40], "counts": [1200.0]}, "are not numbers of pixels"),
        ({"size": [30, 40], "counts": "`"}, "is cut off"),
        ({"size": [30, 40], "counts": "~"}, "which no run-length code has"),
        ({"size": [30, 40], "counts": "o" * 40}, "which no run-length code has"),
        ({"size": [30, 40], "counts": "O"}, "are not numbers of pixels of at least 0"),
        ({"size": [30, 40], "counts": None}, "are not numbers of pixels"),
        ({"counts": [1200]}, "segmentation.size is None"),
        ("polygon", "is neither polygons nor a run-length code"),
        ([1, 2, 3, 4, 5, 6], "'1' is not a polygon"),
        ([["1", 2, 3, 4, 5, 6]], "is not a polygon"),
        ([[1, 2, 3, 4]], "a polygon of 4 numbers; right are pairs, at least three"),
        ([[1, 2, 3, 4, 5, 6, 7]], "a polygon of 7 numbers"),
        ([[1, 2, 3, 4, 45, 6]], "a polygon with x = 45; right is 0 to 40 px"),
        ([[1, 2, 3, -4, 5, 6]], "a polygon with y = -4; right is 0 to 30 px"),
        ([[1, 2, 3, float("nan"), 5, 6]], "a polygon with y = nan"),
        ([[1, 2, float("inf"), 4, 5, 6]], "a polygon with x = inf"),
        ([[10**400, 2, 3, 4, 5, 6]], "a polygon with x = 1000"),
    ],
)
def test_segmentations_that_are_refused(value: Any, part: str) -> None:
    with pytest.raises(ValueError, match="segmentation") as caught:
        check_segmentation(value, 40, 30)
    assert part in str(caught.value)


def test_an_empty_segmentation_is_none() -> None:
    assert check_segmentation(None, 40, 30) is None and check_segmentation([], 40, 30) is None


# --- samples ------------------------------------------------------------------------------------------------------

CATEGORIES = {1: "person", 18: "dog", 40: "baseball glove", 58: "hot dog"}
A, B, C = 11, 12, 13
"""Images a.jpg, b.jpg and c.jpg."""


def captions_json() -> dict[str, Any]:
    return {
        "info": {},
        "images": [
            {"id": i, "file_name": f"{n}.jpg", "width": 40, "height": 30} for i, n in ((A, "a"), (B, "b"), (C, "c"))
        ],
        "annotations": [
            {"id": 1, "image_id": A, "caption": "A dog and a person.\n"},
            {"id": 2, "image_id": B, "caption": "Two persons play baseball."},
            {"id": 3, "image_id": A, "caption": "An animal."},
            {"id": 4, "image_id": A, "caption": "Dogs"},
            {"id": 5, "image_id": C, "caption": "An empty street."},
        ],
    }


def instances_json() -> dict[str, Any]:
    def instance(number: int, image: int, category: int, box: list[float], segmentation: Any, crowd: int = 0) -> dict:
        return {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "segmentation": segmentation,
            "iscrowd": crowd,
            "area": 1.0,
        }

    crowd = np.zeros((30, 40), bool)
    crowd[20:26, 5:15] = True
    return {
        "images": captions_json()["images"],
        "categories": [{"id": i, "name": name, "supercategory": "x"} for i, name in CATEGORIES.items()],
        "annotations": [
            instance(100, A, 18, [10, 5, 10, 10], [[10, 5, 20, 5, 20, 15, 10, 15]]),
            instance(101, A, 18, [20, 5, 5, 10], [[20, 5, 25, 5, 25, 15, 20, 15]]),
            instance(102, A, 1, [25, 20, 5, 5], []),
            instance(103, B, 1, [5, 20, 10, 6], {"size": [30, 40], "counts": runs_of(crowd)}, crowd=1),
            instance(104, B, 1, [30, 2, 4, 4], [[30, 2, 34, 2, 34, 6, 30, 6]]),
            instance(105, B, 40, [8, 8, 4, 4], [[8, 8, 12, 8, 12, 12, 8, 12]]),
            instance(106, B, 58, [8, 8, 4, 0], [[8, 8, 12, 8, 12, 8, 8, 8]]),
        ],
    }


def write_image(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    Image.fromarray(ramp).save(path)


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The layout that COCO is published in, of one small split."""
    folder = tmp_path / "coco"
    for name in "abc":
        write_image(folder / f"val2017/{name}.jpg")
    write_json(folder / "annotations/captions_val2017.json", captions_json())
    write_json(folder / "annotations/instances_val2017.json", instances_json())
    return folder


def coco(root: Path, split: str = "test", **options: Any) -> CocoDataset:
    given = {"root": str(root), "kind": "coco", "resolution": 30, "train_split": "val", "test_split": "val", **options}
    dataset = load_dataset(data_options(**given), split)
    assert isinstance(dataset, CocoDataset)
    return dataset


def refusal(root: Path, split: str = "test", **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        coco(root, split, **options)
    return str(caught.value)


def ids(dataset: CocoDataset) -> list[str]:
    return [dataset[index].id for index in range(len(dataset))]


def test_a_sample_is_a_caption_with_the_classes_that_it_names(root: Path) -> None:
    dataset = coco(root)
    assert ids(dataset) == ["val2017/a.jpg#0", "val2017/b.jpg#0", "val2017/a.jpg#2"]
    assert [image_key(dataset, i) for i in range(3)] == ["val2017/a.jpg", "val2017/b.jpg", "val2017/a.jpg"]
    assert dataset.fingerprint(0) == dataset.fingerprint(2)
    assert dataset.findings == tuple(CATEGORIES.values())
    assert [dataset.caption(i) for i in range(3)] == ["A dog and a person.", "Two persons play baseball.", "Dogs"]
    assert [[r.finding for r in dataset[i].regions] for i in range(3)] == [["person", "dog"], ["person"], ["dog"]]
    assert dataset.labels(1) == ("person", "baseball glove", "hot dog"), "all that the image has"
    dataset.check_queries()


def test_the_ground_truth_is_the_union_of_instances_crowds_included(root: Path) -> None:
    """40 x 30 is cut to its middle 30 x 30, five columns less on each side."""
    dataset = coco(root)
    person, dog = dataset[0].regions
    expected = torch.zeros(30, 30, dtype=torch.bool)
    expected[5:15, 5:20] = True
    assert torch.equal(dog.mask, expected) and dog.boxes == ((5, 5, 10, 10), (15, 5, 5, 10))
    assert person.boxes == ((20, 20, 5, 5),) and person.mask.sum() == 25, "a box where there is no segmentation"
    (people,) = dataset[1].regions
    expected = torch.zeros(30, 30, dtype=torch.bool)
    expected[20:26, 0:10] = expected[2:6, 25:29] = True
    assert torch.equal(people.mask, expected)


def test_a_class_is_named_by_its_whole_name(root: Path) -> None:
    assert class_words("baseball glove", {}) == ("baseball glove", "baseball gloves")
    assert class_words("Person", {"person": ["people"]}) == ("people",)
    document = captions_json()
    document["annotations"][1]["caption"] = "Kids with Baseball-Gloves."
    write_json(root / "annotations/captions_val2017.json", document)
    named = {"person": ["kids", "kid"]}
    assert [r.finding for r in coco(root)[1].regions] == ["baseball glove"]
    assert [r.finding for r in coco(root, query_words=named)[1].regions] == ["person", "baseball glove"]
    assert "'persn' is not a finding; did you mean 'person'?" in refusal(root, query_words={"persn": ["kid"]})


def test_findings_that_are_not_asked_for_are_left_out(root: Path) -> None:
    dataset = coco(root, findings=("Dog",), query_words={"person": ["people"]})
    assert dataset.findings == ("Dog",) and [dataset.labels(i) for i in range(2)] == [("Dog",)] * 2
    assert "'cat' is in no category of data.instances_file" in refusal(root, findings=("cat",))


def test_training_keeps_every_caption(root: Path) -> None:
    dataset = coco(root, "train", test_split="test")
    assert len(dataset) == 5 and dataset[2].regions == () and dataset.labels(2) == ("dog", "person")
    assert ids(dataset)[2:] == ["val2017/a.jpg#1", "val2017/a.jpg#2", "val2017/c.jpg#0"]


def test_captions_alone(root: Path) -> None:
    dataset = coco(root, instances_file=None)
    assert len(dataset) == 5 and dataset.findings == () and dataset[0].labels == ()
    assert "'dog' is in no category" in refusal(root, instances_file=None, findings=("dog",))


def test_splits_are_files(root: Path) -> None:
    (root / "annotations/captions_train2017.json").write_text((root / "annotations/captions_val2017.json").read_text())
    (root / "annotations/instances_train2017.json").write_text(
        (root / "annotations/instances_val2017.json").read_text()
    )
    (root / "train2017").symlink_to(root / "val2017")
    assert ids(coco(root, "train", train_split="train"))[0] == "train2017/a.jpg#0"
    assert ids(coco(root, "validation", test_split="train"))[0] == "val2017/a.jpg#0"
    assert "data.test_split is val, which is also the validation split" in refusal(root, "validation")
    message = refusal(root, test_split="test")
    assert "there is no 'annotations/captions_test2017.json'" in message
    assert (
        "data.captions_file could be: annotations/captions_train2017.json, annotations/captions_val2017.json" in message
    )
    assert ids(coco(root, captions_file="annotations/captions_val2017.json", image_dir="val2017"))


def test_a_picture_in_two_splits_is_refused(root: Path) -> None:
    for kind in ("captions", "instances"):
        shutil.copy(root / f"annotations/{kind}_val2017.json", root / f"annotations/{kind}_train2017.json")
    shutil.copytree(root / "val2017", root / "train2017")
    splits = coco(root, "train", train_split="train"), coco(root, "test")
    with pytest.raises(UserError, match="picture in two splits") as caught:
        refuse_shared_pictures(*splits)
    first = "split train, 'train2017/a.jpg' (annotations/instances_train2017.json image 11)"
    assert first in str(caught.value) and "split test, 'val2017/a.jpg'" in str(caught.value)
    for place, name in enumerate("abc"):
        write_image(root / f"train2017/{name}.jpg", (80, 60 + place % 2))
    refuse_shared_pictures(coco(root, "train", train_split="train"), splits[1], None)


def test_masks_follow_an_image_that_was_made_smaller(root: Path) -> None:
    document = instances_json()
    for entry in document["images"]:
        entry.update(width=80, height=60)
    big = np.zeros((60, 80), bool)
    big[10:30, 20:50] = True
    counts = {"size": [60, 80], "counts": compressed(runs_of(big))}
    document["annotations"] = [
        {"id": 1, "image_id": A, "category_id": 18, "bbox": [20, 10, 30, 20], "segmentation": counts}
    ]
    write_json(root / "annotations/instances_val2017.json", document)
    (dog,) = coco(root)[0].regions
    assert dog.boxes == ((5, 5, 15, 10),) and dog.mask[5:15, 5:20].all() and dog.mask.sum() == 150
    document["images"][0]["height"], document["annotations"][0]["segmentation"] = 80, []
    write_json(root / "annotations/instances_val2017.json", document)
    assert "image 11: image 'val2017/a.jpg' has 40 x 30 px and its boxes and masks are of 80 x 80" in refusal(root)


# --- the CSV of captions ------------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[tuple[Any, ...]], header: str = ",path,segmentation_path,captions,split") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header.split(","), *rows])


CSV_ROWS = [
    (0, "val2017/a.jpg", "", "A dog and a person.|An animal.|Dogs", 0),
    (1, "val2017/b.jpg", "", " Two persons play baseball.", "0.0"),
    (2, "val2017/c.jpg", "", "An empty street.", 1),
    (3, "val2017/none.jpg", "", "Missing.", 2),
]


def test_captions_in_a_csv(root: Path) -> None:
    write_csv(root / "meta.csv", CSV_ROWS)
    options = {
        "captions_file": "meta.csv",
        "instances_file": "annotations/instances_val2017.json",
        "image_dir": "val2017",
    }
    by_csv, by_json = coco(root, test_split="test", **options), coco(root)
    assert sorted(ids(by_csv)) == sorted(ids(by_json))
    assert {by_csv.caption(i) for i in range(3)} == {by_json.caption(i) for i in range(3)}
    assert ids(coco(root, "train", train_split="1", **options)) == ["val2017/c.jpg#0"]
    assert "has no row of split mscxr; there are test (2 rows), train (1 rows), val (1 rows)" in refusal(
        root, test_split="mscxr", **options
    )
    assert "0 of 2 images are in annotations/instances_val2017.json" in refusal(
        root, test_split="test", **{**options, "image_dir": "val"}
    )


@pytest.mark.parametrize(
    ("row", "part"),
    [
        (("", "val2017/a.jpg", "", "A dog||Dogs", 0), "row 3: captions is empty"),
        (("", "val2017/a.jpg", "", "", 0), "row 3: captions is empty"),
        (("", "val2017/a.jpg", "", "A dog.", 9), "row 3: split '9' is none of 0 test"),
        (("", "val2017/b.jpg", "", "A dog.", 0), "row 3: path 'val2017/b.jpg' is also that of row 2"),
        (("", "../a.jpg", "", "A dog.", 0), "row 3: path '../a.jpg' leaves the data folder"),
        (("", "", "", "A dog.", 0), "row 3: path is empty"),
        (("", "val2017/x.jpg", "", "A dog.", 0), "row 3: image 'val2017/x.jpg' cannot be opened"),
    ],
)
def test_rows_that_are_refused(root: Path, row: tuple[Any, ...], part: str) -> None:
    write_csv(root / "meta.csv", [CSV_ROWS[1], row])
    options: dict[str, Any] = {"captions_file": "meta.csv", "instances_file": None, "test_split": "test"}
    assert part in refusal(root, **options)
    write_csv(root / "meta.csv", [CSV_ROWS[1]], ",path,seg,caption,split")
    assert "there is no column 'captions'; did you mean 'caption'?" in refusal(root, **options)


# --- hostile files ------------------------------------------------------------------------------------------------


def test_all_faults_of_both_files_are_listed_at_once(root: Path) -> None:
    outside = root.parent / "secret.jpg"
    write_image(outside)
    (root / "val2017/c.jpg").unlink()
    (root / "val2017/c.jpg").symlink_to(outside)
    (root / "val2017/b.jpg").write_bytes(b"no image")
    captions, instances = captions_json(), instances_json()
    captions["annotations"][4]["caption"] = "Persons and dogs."
    captions["annotations"] += [
        {"id": 6, "image_id": 99, "caption": "A dog."},
        {"id": 7, "image_id": A, "caption": " "},
        {"id": 8, "image_id": A},
        {"id": 1, "image_id": A, "caption": "A dog."},
    ]
    captions["images"].append({"id": 14, "file_name": "../../secret.jpg"})
    instances["annotations"] += [
        {"id": 107, "image_id": A, "category_id": 77, "bbox": [1, 1, 5, 5]},
        {"id": 108, "image_id": 99, "category_id": 1, "bbox": [1, 1, 5, 5]},
        {"id": 109, "image_id": A, "category_id": 1, "bbox": [1, 1, -5, 5]},
        {"id": 110, "image_id": A, "category_id": 1, "bbox": [1, 1, float("nan"), 5]},
        {"id": 111, "image_id": A, "category_id": 1, "bbox": [30, 1, 15, 5]},
        {"id": 112, "image_id": C, "category_id": 1, "bbox": [1, 1, 5, 5]},
    ]
    write_json(root / "annotations/captions_val2017.json", captions)
    write_json(root / "annotations/instances_val2017.json", instances)
    message = refusal(root)
    c, i = "annotations/captions_val2017.json", "annotations/instances_val2017.json"
    for part in (
        "(12)",
        f"{c} annotation 6: image_id 99 is the id of no image",
        f"{c} annotation 7: caption is empty",
        f"{c} annotation 8: caption is empty",
        f"{c} annotation 1: this id is there twice",
        f"{c} image 14: file_name '../../secret.jpg' leaves the data folder",
        f"{i} annotation 107: category_id 77 is the id of no category; there are 1 person, 18 dog",
        f"{i} annotation 108: image_id 99 is the id of no image",
        f"{i} annotation 109: bbox '[1, 1, -5, 5]' has a negative width or height",
        f"{i} annotation 110: bbox '1,1,nan,5' has a number that is not finite",
        f"{i} annotation 111: box 30,1,15,5 is outside the image 'val2017/a.jpg' of 40 x 30 px (as annotated)",
        f"{i} image 12: image 'val2017/b.jpg' is no image that can be read",
        f"{i} image 13: image 'val2017/c.jpg' is a link that leaves the data folder",
    ):
        assert part in message, part


@pytest.mark.parametrize("file", ["captions", "instances"])
@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda text: text[:-30], "is not JSON: "),
        (lambda text: "null", "is not COCO's JSON: it has no list images, annotations"),
        (lambda text: '{"images": [], "annotations": 3}', "it has no list annotations"),
        (lambda text: text.replace('"id": 12', '"id": 11'), "image 11: this id is there twice"),
        (lambda text: text.replace('"id": 12', '"id": "12"'), "image in place 2: "),
        (lambda text: text.replace("b.jpg", "a.jpg"), "image 12: file_name 'val2017/a.jpg' is also that of image 11"),
        (lambda text: text.replace('"b.jpg"', '["b.jpg"]'), "image 12: file_name must be text"),
        (lambda text: text.replace("b.jpg", "\\ud800"), "image 12: file_name has a character that is no text"),
    ],
)
def test_json_that_is_refused(root: Path, file: str, change: Callable[[str], str], part: str) -> None:
    path = root / f"annotations/{file}_val2017.json"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    message = refusal(root)
    assert part in message and f"annotations/{file}_val2017.json" in message


def test_bytes_that_are_no_text(root: Path) -> None:
    path = root / "annotations/captions_val2017.json"
    path.write_bytes(path.read_bytes().replace(b"dog", b"d\xe9g"))
    assert "is not UTF-8: byte 0xe9" in refusal(root)


def test_no_caption_names_a_class(root: Path) -> None:
    document = captions_json()
    for annotation in document["annotations"]:
        annotation["caption"] = "Something."
    write_json(root / "annotations/captions_val2017.json", document)
    message = refusal(root)
    assert "no caption of annotations/captions_val2017.json names a class of its image; 3 of 3 images are in" in message


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 60)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["..", "a.jpg"]),
    lambda inner: (
        st.lists(inner, max_size=7) | st.dictionaries(st.sampled_from(["size", "counts", "x"]), inner, max_size=2)
    ),
    max_leaves=8,
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_is_read_or_refused(root: Path, data: Any) -> None:
    documents = {"captions": captions_json(), "instances": instances_json()}
    for _ in range(data.draw(st.integers(1, 3))):
        document = documents[data.draw(st.sampled_from(list(documents)))]
        entry = data.draw(st.sampled_from(document[data.draw(st.sampled_from(["images", "annotations"]))]))
        name = data.draw(st.sampled_from(list(entry)))
        entry[name] = data.draw(ANY)
    for name, document in documents.items():
        write_json(root / f"annotations/{name}_val2017.json", document)
    try:
        dataset = coco(root)
    except UserError:
        return
    for index in range(len(dataset)):
        for region in dataset[index].regions:
            assert region.mask.any() and np.isfinite(region.boxes).all()


# --- real data ----------------------------------------------------------------------------------------------------


def test_real_photographs_as_coco_json(shared_data: Path, tmp_path: Path) -> None:
    """Masks of the same images by the reader of folders are the same, for run lengths in lists and in text."""
    source = shared_data / "natural"
    with (source / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["mask_file"]]
    for name in {row[column] for row in rows for column in ("file_name", "mask_file")}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, tmp_path / name)
    images = {row["file_name"]: row for row in rows}
    categories = {name: number for number, name in enumerate(sorted({row["bbox_label"] for row in rows}), start=1)}
    listed = [
        {
            "id": int(r["coco_id"]),
            "file_name": Path(n).name,
            "width": int(r["image_width"]),
            "height": int(r["image_height"]),
        }
        for n, r in images.items()
    ]
    captions = [
        {"image_id": int(row["coco_id"]), "caption": caption}
        for row in images.values()
        for caption in row["captions"].split("|")
    ]
    annotations = []
    for number, row in enumerate(rows):
        mask = np.asarray(Image.open(source / row["mask_file"]).convert("L")) > 0
        counts: Any = compressed(runs_of(mask)) if number % 2 else runs_of(mask)
        annotations.append(
            {
                "id": number,
                "image_id": int(row["coco_id"]),
                "category_id": categories[row["bbox_label"]],
                "bbox": [float(value) for value in row["bbox_xywh"].split(",")],
                "segmentation": {"size": list(mask.shape), "counts": counts},
            }
        )
    named = [{"id": number, "name": name} for name, number in categories.items()]
    write_json(tmp_path / "instances.json", {"images": listed, "annotations": annotations, "categories": named})
    numbered = [{"id": number, **caption} for number, caption in enumerate(captions)]
    write_json(tmp_path / "captions.json", {"images": listed, "annotations": numbered})
    dataset = coco(
        tmp_path, captions_file="captions.json", instances_file="instances.json", image_dir="images", resolution=64
    )
    with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    folder = data_options(
        kind="folder", root=str(tmp_path), resolution=64, caption_column="captions", finding_column="bbox_label",
        box_column="bbox_xywh", mask_column="mask_file", test_split="all",
    )  # fmt: skip
    by_folder = FolderDataset(folder, "test")
    theirs = {by_folder.image_key(i): {r.finding: r for r in by_folder.regions(i)} for i in range(len(by_folder))}
    for index in range(len(dataset)):
        for region in dataset.regions(index):
            same = theirs[dataset.image_key(index)][region.finding]
            assert torch.equal(region.mask, same.mask) and sorted(region.boxes) == sorted(same.boxes)
            assert region.finding in dataset.caption(index).lower()
    assert len(dataset) > 100 and dataset[0].pixel_values.std(0).max() > 0.1


@pytest.mark.parametrize(("split", "images"), [("train", 32), ("validation", 22), ("test", 15)])
def test_real_captions_in_the_papers_csv(shared_data: Path, split: str, images: int) -> None:
    file = {"captions_file": "paper_format/train2017_meta.csv", "instances_file": None}
    dataset = coco(shared_data / "natural", split, train_split="train", test_split="test", **file)
    assert len({dataset.image_key(i) for i in range(len(dataset))}) == images and len(dataset) >= 5 * images

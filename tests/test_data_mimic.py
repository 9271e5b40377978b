"""MIMIC-CXR-JPG's metadata and the three shapes of MS-CXR, as made here, as published, and as nobody should write
them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_options import data_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from distill.data.loading import load_dataset
from distill.data.readers.folder import FolderDataset
from distill.data.readers.inspection import same_aspect
from distill.data.readers.mimic import CHEXPERT_LABELS, MimicDataset, MsCxrDataset
from distill.data.readers.records import RecordDataset
from distill.data_config import MsCxrData
from distill.errors import UserError

SIZE = (40, 30)


@dataclass
class Box:
    """One box of MS-CXR, before it is written in any shape."""

    dicom: str = "d1"
    category: str = "Pleural Effusion"
    text: str = "small left effusion"
    box: tuple[Any, ...] = (8, 5, 10, 12)
    frame: tuple[Any, Any] = SIZE

    @property
    def path(self) -> str:
        return f"files/p1/{self.dicom}.jpg"


BOXES = [
    Box(),
    Box(box=(25, 5, 6, 6)),
    Box("d1", "Edema", "mild edema", (10, 2, 20, 20)),
    Box("d1", "Pneumonia", "mild edema", (12, 4, 8, 8)),
    Box("d2", "Pneumothorax", "right apical pneumothorax", (20, 1, 10, 9)),
]
IMPRESSIONS = {"d1": "Small effusion, mild edema.", "d2": "Normal.", "t1": "Clear lungs.", "t2": "Cardiomegaly."}


def study(dicom: str, split: str = "1", labels: str = "No Finding", patient: str = "", **other: str) -> dict[str, str]:
    """A row of the published layout, with the space that its last column's name ends in."""
    row = {
        "dicom_id": dicom,
        "subject_id": patient,
        "Rows": "3056.0",
        "path": f"files/p1/{dicom}.dcm",
        "split": split,
        "impression": IMPRESSIONS.get(dicom, "Clear."),
        "Finding Label": "",
        "Finding Labels ": labels,
    }
    return {**row, **other}


STUDIES = [
    study("d1", "4", "Pleural Effusion|Edema"),
    study("d2", "4.0", "Pneumothorax"),
    study("t1", "1.0"),
    study("t2", "0", "Cardiomegaly"),
]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def write_box_a_row(path: Path, boxes: list[Box]) -> None:
    rows = [
        {
            "dicom_id": b.dicom, "category_name": b.category, "label_text": b.text, "x": b.box[0], "y": b.box[1],
            "w": b.box[2], "h": b.box[3], "image_width": b.frame[0], "image_height": b.frame[1], "split": "test",
            "path": b.path,
        }
        for b in boxes
    ]  # fmt: skip
    write_csv(path, rows)


def write_joined(path: Path, boxes: list[Box]) -> None:
    """One row for each image, category and phrase."""
    groups: dict[tuple[str, str, str], list[Box]] = {}
    for box in boxes:
        groups.setdefault((box.dicom, box.category, box.text), []).append(box)
    rows = [
        {
            "dicom_id": dicom,
            "paths": group[0].path.replace(".jpg", ".dcm"),
            "category_name": category,
            "label_text": text,
            "image_width": group[0].frame[0],
            "image_height": group[0].frame[1],
            "bboxxywh": "|".join("-".join(map(str, b.box)) for b in group),
        }
        for (dicom, category, text), group in groups.items()
    ]
    write_csv(path, rows)


def as_json(boxes: list[Box]) -> dict[str, Any]:
    """As MS-CXR is published: ids from 1, the side of the image in images and annotations."""
    frames = {b.dicom: b for b in boxes}
    categories = list(dict.fromkeys(b.category for b in boxes))
    ids = {dicom: number for number, dicom in enumerate(frames, start=1)}
    return {
        "info": {"version": "1"},
        "categories": [{"id": n, "name": name} for n, name in enumerate(categories, start=1)],
        "images": [
            {
                "id": ids[b.dicom],
                "file_name": f"{b.dicom}.jpg",
                "path": b.path,
                "width": b.frame[0],
                "height": b.frame[1],
            }
            for b in frames.values()
        ],
        "annotations": [
            {
                "id": number,
                "image_id": ids[b.dicom],
                "category_id": categories.index(b.category) + 1,
                "label_text": b.text,
                "bbox": list(b.box),
                "width": b.frame[0],
                "height": b.frame[1],
            }
            for number, b in enumerate(boxes, start=1)
        ],
    }


def write_json(path: Path, boxes: list[Box]) -> None:
    path.write_text(json.dumps(as_json(boxes)), encoding="utf-8")


SHAPES: dict[str, Callable[[Path, list[Box]], None]] = {
    "boxes.json": write_json,
    "boxes.csv": write_box_a_row,
    "joined.csv": write_joined,
}


def write_image(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    Image.fromarray(ramp).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for number, dicom in enumerate(IMPRESSIONS):
        write_image(folder / f"files/p1/{dicom}.jpg", (40, 30 + (number > 1)))
    write_csv(folder / "mimic.csv", STUDIES)
    for name, write in SHAPES.items():
        write(folder / name, BOXES)
    return folder


def config(root: Path, **options: Any) -> MsCxrData:
    return data_options(**{"root": str(root), "resolution": 30, "kind": "mscxr", **options})


def mimic(root: Path, split: str = "train", rows: list[dict[str, str]] | None = None, **options: Any) -> MimicDataset:
    if rows is not None:
        write_csv(root / "mimic.csv", rows)
    dataset = load_dataset(config(root, kind="mimic", metadata_file="mimic.csv", **options), split)
    assert isinstance(dataset, MimicDataset)
    return dataset


def mscxr(root: Path, shape: str, boxes: list[Box] | None = None, split: str = "test", **options: Any) -> MsCxrDataset:
    if boxes is not None:
        SHAPES[shape](root / shape, boxes)
    dataset = load_dataset(config(root, metadata_file=shape, **options), split)
    assert isinstance(dataset, MsCxrDataset)
    return dataset


def refusal(read: Callable[..., RecordDataset], *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(*args, **options)
    return str(caught.value)


def ids(dataset: RecordDataset) -> list[str]:
    return [dataset[index].id for index in range(len(dataset))]


# --- MIMIC metadata -----------------------------------------------------------------------------------------------


def test_the_published_layout(root: Path) -> None:
    """A column name that ends in a space, paths of DICOM files, splits written as floats."""
    dataset = mimic(root)
    sample = dataset[0]
    assert len(dataset) == 1 and sample.id == dataset.image_key(0) == "files/p1/t1.jpg"
    assert sample.caption == dataset.caption(0) == "Clear lungs."
    assert sample.labels == ("No Finding",) and sample.regions == ()
    assert sample.pixel_values.shape == (3, 30, 30) and sample.original_size == (31, 40)
    assert dataset.findings == ("Cardiomegaly", "Edema", "Pleural Effusion", "Pneumothorax")
    assert dataset.query_words["Pleural Effusion"] == ("pleural", "effusion", "effusions")
    dataset.check_queries()


@pytest.mark.parametrize(
    ("split", "options", "expected"),
    [
        ("test", {}, ["t2"]),
        ("test", {"test_split": "mscxr"}, ["d1", "d2"]),
        ("test", {"test_split": "4"}, ["d1", "d2"]),
        ("train", {"train_split": "0", "test_split": "mscxr"}, ["t2"]),
        ("train", {}, ["t1"]),
    ],
)
def test_a_split_is_a_name_or_a_number(root: Path, split: str, options: dict[str, str], expected: list[str]) -> None:
    assert ids(mimic(root, split, **options)) == [f"files/p1/{dicom}.jpg" for dicom in expected]


def test_a_split_that_no_row_has(root: Path) -> None:
    message = refusal(mimic, root, "validation")
    assert (
        "no row of mimic.csv has split validation or val or valid or validate; there are mscxr (2 rows), train (1 "
        "rows), test (1 rows)" in message
    )
    for name in ("2", "val", "validate"):  # the last as in the split file of MIMIC-CXR-JPG
        assert ids(mimic(root, "validation", [study("t1", name)])) == ["files/p1/t1.jpg"]
        assert ids(mimic(root, "test", [study("t1", name)], test_split="validate")) == ["files/p1/t1.jpg"]


def test_images_of_other_splits_need_not_be_there_but_their_rows_are_checked(root: Path) -> None:
    rows = [study("t1"), study("elsewhere", "3")]
    assert len(mimic(root, rows=rows)) == 1
    assert "row 3: split '7' is none of 0 test, 1 train" in refusal(mimic, root, rows=[rows[0], study("e", "7")])


def test_labels_of_one_column_a_finding(root: Path) -> None:
    rows = [
        study("t1", Edema="1.0", Fracture="0", Pneumonia="-1.0"),
        study("t2", "2", Edema="", Fracture="1", Pneumonia=""),
    ]
    for row in rows:
        del row["Finding Labels "]
    dataset = mimic(root, rows=rows)
    assert dataset.labels(0) == ("Edema",) and dataset.findings == ("Edema", "Fracture")
    assert "Edema 'yes' is none of 1, 0, -1 and empty" in refusal(mimic, root, rows=[{**rows[0], "Edema": "yes"}])
    for row in rows:
        for column in ("Edema", "Fracture", "Pneumonia"):
            del row[column]
    assert "no column 'Finding Labels', nor one a finding" in refusal(mimic, root, rows=rows)
    assert "Edema" in CHEXPERT_LABELS and len(CHEXPERT_LABELS) == 14


def test_findings_and_query_words_of_the_config(root: Path) -> None:
    dataset = mimic(root, findings=("edema", "Pneumonia"), query_words={"Edema": ["oedema"]})
    assert dataset.findings == ("edema", "Pneumonia") and dataset.query_words["edema"] == ("oedema",)
    assert "'Edem' is in no row; did you mean 'Edema'?" in refusal(mimic, root, findings=("Edem",))


def test_all_faults_of_the_metadata_are_listed_at_once(root: Path) -> None:
    (root.parent / "secret.jpg").write_bytes((root / "files/p1/t1.jpg").read_bytes())
    (root / "link.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "folder.jpg").mkdir()
    (root / "broken.jpg").write_bytes((root / "files/p1/t1.jpg").read_bytes()[:150])
    rows = [
        study("t1"),
        study("t1", path="files/p1/t2.jpg"),
        study("a", path="files/p1/t1.jpg"),
        study("b", impression=" "),
        study("c", path="../secret.jpg"),
        study("d", path=str(root / "files/p1/t1.jpg")),
        study("e", path="files/../../secret.jpg"),
        study("f", path="link.jpg"),
        study("g", path="missing.dcm"),
        study("h", path="broken.jpg"),
        study("", path="x.jpg"),
        study("i", path="folder.jpg"),
        study("j", split=""),
    ]
    message = refusal(mimic, root, rows=rows)
    for part in (
        "(12)",
        "row 3: dicom_id 't1' is also that of row 2",
        "row 4: path 'files/p1/t1.jpg' is also that of row 2",
        "row 5: impression is empty; set data.allow_empty_captions",
        "row 6: path '../secret.jpg' leaves the data folder",
        "row 7: path '",
        "row 8: path 'files/../../secret.jpg' leaves the data folder",
        "row 9: image 'link.jpg' is a link that leaves the data folder",
        "row 10: image 'missing.jpg' cannot be opened",
        "row 11: image 'broken.jpg' ",
        "row 12: dicom_id is empty",
        "row 13: image 'folder.jpg' is not a file",
        "row 14: split is empty",
    ):
        assert part in message, part
    assert "row 5: impression" not in refusal(mimic, root, allow_empty_captions=True)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            b"dicom_id,path,split,impresion,Finding Labels\na,b,1,c,d\n",
            "no column 'impression'; did you mean 'impresion'?",
        ),
        (b"dicom_id,path,split,impression,Finding Labels\na,b,1,\xe9,d\n", "not UTF-8: byte 0xe9"),
        (b"dicom_id,path,split,impression,Finding Labels\na,b,1\n", "row 2 has 3 fields and the header 5"),
        (b"dicom_id,path,split,impression,Finding Labels\n", "it has no rows"),
        (b"dicom_id,split,split,impression,Finding Labels\n", "column 'split' 2 times"),
    ],
)
def test_metadata_that_cannot_be_read(root: Path, text: bytes, part: str) -> None:
    (root / "mimic.csv").write_bytes(text)
    assert part in refusal(mimic, root)


def test_a_metadata_file_that_is_missing_names_the_others(root: Path) -> None:
    message = refusal(load_dataset, config(root, kind="mimic"), "train")
    assert "there is no 'metadata.csv'" in message and "boxes.csv, boxes.json, joined.csv, mimic.csv" in message


# --- MS-CXR -------------------------------------------------------------------------------------------------------


def content(dataset: RecordDataset) -> list[tuple[Any, ...]]:
    found = []
    for index in range(len(dataset)):
        sample = dataset[index]
        regions = [(r.finding, r.mask.numpy().tobytes(), r.boxes, r.phrase) for r in sample.regions]
        found.append((sample.id, sample.caption, sample.labels, sorted(regions)))
    return found


@pytest.mark.parametrize(
    "options", [{"caption_source": "phrase"}, {"mimic_file": "mimic.csv"}], ids=["phrase", "impression"]
)
def test_the_three_shapes_hold_the_same(root: Path, options: dict[str, str]) -> None:
    as_json, box_a_row, joined = (content(mscxr(root, shape, **options)) for shape in SHAPES)
    assert as_json == box_a_row == joined and len(as_json) > 1


def test_impressions_give_a_sample_an_image(root: Path) -> None:
    dataset = mscxr(root, "boxes.json", mimic_file="mimic.csv")
    assert ids(dataset) == ["files/p1/d1.jpg", "files/p1/d2.jpg"] == [dataset.image_key(0), dataset.image_key(1)]
    assert dataset.findings == ("Pleural Effusion", "Edema", "Pneumonia", "Pneumothorax")
    sample = dataset[0]
    assert sample.caption == "Small effusion, mild edema." and sample.labels == (
        "Pleural Effusion",
        "Edema",
        "Pneumonia",
    )
    assert [(r.finding, r.phrase) for r in sample.regions] == [
        ("Pleural Effusion", "small left effusion"),
        ("Edema", "mild edema"),
        ("Pneumonia", "mild edema"),
    ]
    # 40 x 30 is cut to its middle 30 x 30.
    assert sample.regions[0].boxes == ((3, 5, 10, 12), (20, 5, 6, 6)) and sample.regions[0].mask.sum() == 156
    assert dataset.regions(0)[0].boxes == sample.regions[0].boxes


def test_the_joined_file_may_hold_the_impressions(root: Path) -> None:
    boxes = [Box(b.dicom, b.category, IMPRESSIONS[b.dicom], b.box) for b in BOXES]
    dataset = mscxr(root, "joined.csv", boxes)
    assert [(s.caption, {r.phrase for r in s.regions}) for s in (dataset[0], dataset[1])] == [
        ("Small effusion, mild edema.", {None}),
        ("Normal.", {None}),
    ]
    message = refusal(mscxr, root, "joined.csv", BOXES)
    assert "image 'files/p1/d1.jpg' has two values of label_text: 'mild edema' and 'small left effusion'" in message


@pytest.mark.parametrize("shape", ["boxes.json", "boxes.csv"])
def test_phrases_are_not_taken_for_impressions(root: Path, shape: str) -> None:
    assert "has phrases only; set data.mimic_file" in refusal(mscxr, root, shape)


def test_phrases_give_several_samples_an_image(root: Path) -> None:
    dataset = mscxr(root, "boxes.csv", caption_source="phrase")
    assert ids(dataset) == ["files/p1/d1.jpg#0", "files/p1/d1.jpg#1", "files/p1/d2.jpg#0"]
    assert [dataset.image_key(i) for i in range(3)] == ["files/p1/d1.jpg"] * 2 + ["files/p1/d2.jpg"]
    assert dataset.fingerprint(0) == dataset.fingerprint(1)
    assert [(dataset.caption(i), dataset.labels(i)) for i in range(3)] == [
        ("small left effusion", ("Pleural Effusion",)),
        ("mild edema", ("Edema", "Pneumonia")),
        ("right apical pneumothorax", ("Pneumothorax",)),
    ]
    assert [r.finding for r in dataset[1].regions] == ["Edema", "Pneumonia"]


def test_a_phrase_a_box_in_the_joined_file(root: Path) -> None:
    dataset = mscxr(root, "joined.csv", [Box(text="left effusion|right effusion"), Box(
        text="left effusion|right effusion", box=(25, 5, 6, 6)
    )], caption_source="phrase")  # fmt: skip
    assert [(dataset.caption(i), dataset[i].regions[0].boxes) for i in range(2)] == [
        ("left effusion", ((3, 5, 10, 12),)),
        ("right effusion", ((20, 5, 6, 6),)),
    ]
    message = refusal(mscxr, root, "joined.csv", [Box(text="a|b|c")], caption_source="phrase")
    assert "row 2: label_text has 3 phrases joined by | for 1 boxes" in message


def test_only_findings_that_the_caption_names(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = mscxr(root, "boxes.json", mimic_file="mimic.csv", mentioned_only=True)
    assert ids(dataset) == ["files/p1/d1.jpg"], "the impression of d2 names no pneumothorax"
    assert [r.finding for r in dataset[0].regions] == ["Pleural Effusion", "Edema"]
    assert dataset.labels(0) == ("Pleural Effusion", "Edema", "Pneumonia")
    assert "2 findings that their captions do not name are left out" in caplog.text
    phrases = mscxr(root, "boxes.json", caption_source="phrase", mentioned_only=True)
    assert [[r.finding for r in phrases[i].regions] for i in range(3)] == [
        ["Pleural Effusion"],
        ["Edema"],
        ["Pneumothorax"],
    ]
    by_word = mscxr(
        root, "boxes.json", mimic_file="mimic.csv", mentioned_only=True, query_words={"Pneumothorax": ["normal"]}
    )
    assert ids(by_word) == ["files/p1/d1.jpg", "files/p1/d2.jpg"]
    nothing = {"mimic_file": "mimic.csv", "mentioned_only": True, "findings": ("Pneumothorax",)}
    assert "no caption names a finding of its image" in refusal(mscxr, root, "boxes.json", **nothing)


def test_findings_that_are_not_asked_for_are_left_out(root: Path) -> None:
    dataset = mscxr(root, "boxes.csv", caption_source="phrase", findings=("PNEUMONIA",))
    assert len(dataset) == 1 and dataset.findings == ("PNEUMONIA",) and dataset.labels(0) == ("PNEUMONIA",)
    assert [r.finding for r in dataset[0].regions] == ["PNEUMONIA"]
    assert "'Pneumona' is in no category of boxes.csv; did you mean 'Pneumonia'?" in refusal(
        mscxr, root, "boxes.csv", caption_source="phrase", findings=("Pneumona",)
    )


def test_splits_of_mscxr(root: Path) -> None:
    write_box_a_row(root / "boxes.csv", BOXES)
    text = (root / "boxes.csv").read_text().replace("test,files/p1/d2", "val,files/p1/d2")
    (root / "boxes.csv").write_text(text)
    options = {"caption_source": "phrase", "split_column": "split"}
    assert ids(mscxr(root, "boxes.csv", **options)) == ["files/p1/d1.jpg#0", "files/p1/d1.jpg#1"]
    assert ids(mscxr(root, "boxes.csv", split="validation", **options)) == ["files/p1/d2.jpg#0"]
    assert len(mscxr(root, "boxes.csv", caption_source="phrase")) == 3
    assert "no row has split = p; there are 'test' (4 boxes), 'val' (1 boxes)" in refusal(
        mscxr, root, "boxes.csv", test_split="p", **options
    )
    assert "data.split_column 'fold' is not a column" in refusal(
        mscxr, root, "boxes.csv", caption_source="phrase", split_column="fold"
    )
    assert "neither it nor its image has data.split_column" in refusal(mscxr, root, "boxes.json", **options)
    document = as_json(BOXES)
    for image in document["images"]:
        image["split"] = "test" if image["id"] == 1 else "val"
    (root / "boxes.json").write_text(json.dumps(document))
    assert len(mscxr(root, "boxes.json", **options)) == 2


def test_validation_of_mscxr_needs_a_split_column(root: Path) -> None:
    message = refusal(mscxr, root, "boxes.csv", split="validation", caption_source="phrase")
    assert "set data.split_column to a column with `validation`, `val` or `valid`" in message


def move(root: Path, patient: str, *dicoms: str) -> None:
    """To the folder that MIMIC-CXR has for a patient."""
    for dicom in dicoms:
        path = root / f"files/p10/{patient}/s1/{dicom}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        (root / f"files/p1/{dicom}.jpg").rename(path)


def test_a_patient_in_two_splits_is_refused(root: Path) -> None:
    rows = [study("t1", "1", patient="7"), study("t2", "0", patient="7.0"), study("d1", "4", patient="7")]
    for split in ("train", "test"):
        message = refusal(mimic, root, split, rows=rows)
        assert "mimic.csv has a patient in two splits" in message
        assert "patient '7': split train, 'files/p1/t1.jpg' (mimic.csv row 2); split test, 'files/p1/t2.jpg'" in message
    assert len(mimic(root, rows=[rows[0], study("t2", "0", patient="8"), rows[2]])) == 1, "mscxr is read by neither"
    move(root, "p10000032", "t1", "t2")
    by_path = [
        study(name, split, path=f"files/p10/p10000032/s1/{name}.dcm") for name, split in (("t1", "1"), ("t2", "0"))
    ]
    assert "patient '10000032'" in refusal(mimic, root, rows=by_path)


def test_a_patient_in_two_splits_of_mscxr_is_refused(root: Path) -> None:
    move(root, "p10000032", "d1", "d2")
    write_box_a_row(root / "boxes.csv", BOXES)
    text = (root / "boxes.csv").read_text().replace("test,files/p1/d2", "val,files/p1/d2")
    (root / "boxes.csv").write_text(text.replace("files/p1/", "files/p10/p10000032/s1/"))
    read = {"caption_source": "phrase", "split_column": "split"}
    message = refusal(mscxr, root, "boxes.csv", **read)
    shown = "split test, 'files/p10/p10000032/s1/d1.jpg' (boxes.csv row "
    assert "boxes.csv has a patient in two splits" in message and f"patient '10000032': {shown}" in message
    (root / "boxes.csv").write_text((root / "boxes.csv").read_text().replace("val,", "test,"))
    assert {name.partition("#")[0][-6:] for name in ids(mscxr(root, "boxes.csv", **read))} == {"d1.jpg", "d2.jpg"}


def test_training_leaves_out_the_patients_of_mscxr(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [study("d1", "1", patient="A"), study("t1", "1", patient="A"), study("t2", "1", patient="B"), STUDIES[1]]
    write_csv(root / "mimic.csv", rows)
    given = config(root, metadata_file="boxes.json", mimic_file="mimic.csv")
    assert ids(load_dataset(given, "train")) == ["files/p1/t2.jpg"]
    assert "2 of 3 training images are left out" in caplog.text
    for row in rows:
        row["subject_id"] = ""
    write_csv(root / "mimic.csv", rows)
    assert ids(load_dataset(given, "train")) == ["files/p1/t1.jpg", "files/p1/t2.jpg"]
    assert "data.mimic_file is missing" in refusal(load_dataset, config(root, metadata_file="boxes.json"), "train")


def test_patients_of_mscxr_are_left_out_where_the_metadata_lack_their_rows(root: Path) -> None:
    """A CSV of training rows alone, with or without subject_id."""
    for name, patient in (("d1", "p10000001"), ("t1", "p10000001"), ("t2", "p10000002")):
        move(root, patient, name)
    write_box_a_row(root / "boxes.csv", [Box()])
    text = (root / "boxes.csv").read_text()
    (root / "boxes.csv").write_text(text.replace("files/p1/", "files/p10/p10000001/s1/"))
    for named in (False, True):
        rows = [
            study(f"t{n}", "1", path=f"files/p10/p1000000{n}/s1/t{n}.dcm", patient=f"1000000{n}" if named else "")
            for n in (1, 2)
        ]
        write_csv(root / "mimic.csv", rows)
        given = config(root, metadata_file="boxes.csv", mimic_file="mimic.csv", caption_source="phrase")
        assert ids(load_dataset(given, "train")) == ["files/p10/p10000002/s1/t2.jpg"]


# --- geometry -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), width=st.integers(60, 400), height=st.integers(60, 400), short=st.integers(48, 90))
def test_boxes_follow_an_image_that_was_made_smaller(
    root: Path, data: Any, width: int, height: int, short: int
) -> None:
    """The file's short side is `short` px, its other side is rounded as any tool does; boxes stay those of the
    original."""
    factor = short / min(width, height)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    write_image(root / "files/p1/d1.jpg", size)
    x, y = data.draw(st.integers(0, width - 5)), data.draw(st.integers(0, height - 5))
    w, h = data.draw(st.integers(5, width - x)), data.draw(st.integers(5, height - y))
    dataset = mscxr(root, "boxes.csv", [Box(box=(x, y, w, h), frame=(width, height))], caption_source="phrase")
    assert len(dataset[0].regions) + dataset.dropped_regions == 1
    side, resolution = min(width, height), 30
    left, top = (width - side) / 2, (height - side) / 2
    for region in dataset[0].regions:
        (found,) = region.boxes
        corners = (x - left, y - top, x + w - left, y + h - top)
        exact = [min(max(corner * resolution / side, 0), resolution) for corner in corners]
        got = (found[0], found[1], found[0] + found[2], found[1] + found[3])
        # Half a pixel of the file, by which rounding moved its edge.
        assert np.allclose(got, exact, atol=resolution / short)
        inside = torch.zeros(resolution, resolution, dtype=torch.bool)
        inside[round(got[1]) : round(got[3]), round(got[0]) : round(got[2])] = True
        assert (inside ^ region.mask).sum() <= 4 * resolution


@given(st.integers(1, 4000), st.integers(1, 4000), st.floats(0.01, 2), st.sampled_from([np.floor, np.round, np.ceil]))
def test_any_resize_to_whole_pixels_keeps_the_aspect(width: int, height: int, factor: float, to_whole: Any) -> None:
    size = (int(to_whole(width * factor)), int(to_whole(height * factor)))
    assert same_aspect((width, height), size)


@given(st.integers(200, 4000), st.integers(200, 4000), st.floats(0.2, 2), st.floats(1.05, 3), st.booleans())
def test_another_aspect_is_seen(width: int, height: int, factor: float, stretch: float, wider: bool) -> None:
    size = (round(width * factor * (stretch if wider else 1)), round(height * factor * (1 if wider else stretch)))
    assert not same_aspect((width, height), size)


def test_a_cropped_or_turned_image_is_refused(root: Path) -> None:
    for size in ((30, 30), (30, 40)):
        write_image(root / "files/p1/d1.jpg", size)
        message = refusal(mscxr, root, "boxes.csv", caption_source="phrase")
        assert f"has {size[0]} x {size[1]} px and its boxes and masks are of 40 x 30, another aspect" in message


# --- hostile files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("box", "part"),
    [
        (Box(box=("nan", 1, 5, 5)), "box"),
        (Box(box=(-3, 1, 5, 5)), "box"),
        (Box(box=(1, 1, 5, 0)), "width and height must be above 0"),
        (Box(box=(36, 1, 9, 9)), "box 36,1,9,9 is outside the image 'files/p1/d1.jpg' of 40 x 30 px (as annotated)"),
        (Box(box=(1, 1, "x", 5)), "is not a box"),
        (Box(frame=(40, 0)), "is not a whole number of pixels above 0"),
        (Box(frame=("40.5", 30)), "'40.5' is not a whole number of pixels"),
        (Box(frame=(10**9, 10**9)), "more than any image has"),
        (Box(frame=(40, 40)), "another aspect"),
        (Box(text=" "), "label_text is empty"),
        (Box(dicom="../../../secret"), "leaves the data folder"),
        (Box(dicom="nowhere"), "image 'files/p1/nowhere.jpg' cannot be opened"),
    ],
)
def test_boxes_that_are_refused(root: Path, shape: str, box: Box, part: str) -> None:
    (root.parent / "secret.jpg").write_bytes((root / "files/p1/t1.jpg").read_bytes())
    message = refusal(mscxr, root, shape, [BOXES[-1], box], caption_source="phrase")
    assert "has faults (1)" in message and f"- {shape} " in message and part in message


def document_with(change: Callable[[dict[str, Any]], None]) -> str:
    document = as_json(BOXES)
    change(document)
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (json.dumps(as_json(BOXES))[:-40], "is not JSON: "),
        ("[1, 2]", "is not COCO's JSON: it has no list images, annotations, categories"),
        ("{}", "it has no list images, annotations, categories"),
        ('{"images": {}, "annotations": [], "categories": []}', "it has no list images"),
        ("{" * 50_000, "is not JSON"),
        (document_with(lambda d: d["annotations"][2].update(id=2)), "annotation 2: this id is there twice"),
        (document_with(lambda d: d["images"][1].update(id=1)), "image 1: this id is there twice"),
        (document_with(lambda d: d["annotations"][2].update(id=True)), "annotation in place 3: "),
        (document_with(lambda d: d["annotations"].append(7)), "annotation in place 6: '7' has no id"),
        (
            document_with(lambda d: d["annotations"][0].update(image_id=9)),
            "annotation 1: image_id 9 is the id of no image",
        ),
        (document_with(lambda d: d["annotations"][0].update(image_id=[1])), "image_id [1] is the id of no image"),
        (
            document_with(lambda d: d["annotations"][0].update(category_id=9)),
            "category_id 9 is the id of no category; there",
        ),
        (document_with(lambda d: d["categories"][0].update(name=" ")), "category 1: name is empty"),
        (document_with(lambda d: d["annotations"][0].update(width=41)), "annotation 1: width is 41 and its image's 40"),
        (document_with(lambda d: d["annotations"][0].pop("bbox")), "annotation 1: bbox 'None' is not a box"),
        (document_with(lambda d: d["annotations"][0].update(bbox=[1, 1, float("nan"), 4])), "not finite"),
        (document_with(lambda d: d["annotations"][0].update(bbox=[1, 1, 10**400, 4])), "is not a box"),
        (document_with(lambda d: d["annotations"][0].update(label_text={"a": 1})), "label_text must be text"),
        (document_with(lambda d: d["annotations"][0].update(label_text="\ud800")), "has a character that is no text"),
        (
            document_with(lambda d: [d["images"][0].pop(k) for k in ("path", "file_name")]),
            "image 1: file_name is empty",
        ),
        (document_with(lambda d: d["images"][0].pop("height")), "image 1: height is empty"),
        (document_with(lambda d: d["images"][1].update(path=d["images"][0]["path"])), "has two values of dicom_id"),
    ],
)
def test_json_that_is_refused(root: Path, text: str, part: str) -> None:
    (root / "boxes.json").write_text(text)
    assert part in refusal(mscxr, root, "boxes.json", caption_source="phrase")


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (("image_width", "width"), "there is no column image_width; right are COCO's JSON, a CSV with"),
        (("8-5-10-12", "8-5-10"), "row 2: bboxxywh '8-5-10' is not a box"),
        (("8-5-10-12", "8--5-10-12"), "bboxxywh '8--5-10-12' is not a box"),
        (("8-5-10-12", "1e3-5-10-12"), "is not a box; right is x-y-w-h"),
        (("8-5-10-12|25-5-6-6", ""), "bboxxywh is empty"),
        (("d1,files/p1/d1.dcm,Edema", "d1,files/p1/d2.dcm,Edema"), "has two values of"),
        (
            ("mild edema,40,30,10", "mild edema,41,30,10"),
            "two values of image_width, image_height: (41, 30) and (40, 30)",
        ),
        (("Pneumonia,", "Edema,"), "dicom_id, category_name and label_text are those of row 3"),
        (("Pneumonia,", " ,"), "category_name is empty"),
    ],
)
def test_joined_rows_that_are_refused(root: Path, edit: tuple[str, str], part: str) -> None:
    text = (root / "joined.csv").read_text()
    assert edit[0] in text
    (root / "joined.csv").write_text(text.replace(*edit, 1))
    assert part in refusal(mscxr, root, "joined.csv", caption_source="phrase")


def test_an_image_that_the_metadata_does_not_have(root: Path) -> None:
    write_csv(root / "mimic.csv", STUDIES[1:])
    message = refusal(mscxr, root, "boxes.csv", mimic_file="mimic.csv")
    assert "boxes.csv row 2: dicom_id 'd1' is in no row of data.mimic_file, 'mimic.csv'" in message
    write_csv(root / "mimic.csv", [{**STUDIES[0], "impression": ""}, STUDIES[1], {**STUDIES[2], "impression": ""}])
    message = refusal(mscxr, root, "boxes.csv", mimic_file="mimic.csv")
    assert "has faults (1)" in message and "mimic.csv row 2: impression is empty" in message, "t1 is not asked for"


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 50) | st.floats() | st.text(max_size=5) | st.sampled_from(["..", "d1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)
HOSTILE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read_or_refuse(root: Path, shape: str) -> None:
    try:
        dataset = mscxr(root, shape, caption_source="phrase")
    except UserError:
        return
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.caption
        for region in sample.regions:
            assert region.mask.any() and np.isfinite(region.boxes).all()


@HOSTILE
@given(data=st.data())
def test_any_json_value_is_read_or_refused(root: Path, data: Any) -> None:
    document = as_json(BOXES)
    for _ in range(data.draw(st.integers(1, 3))):
        entries = document[data.draw(st.sampled_from(["images", "annotations", "categories"]))]
        entry = data.draw(st.sampled_from(entries))
        entry[data.draw(st.sampled_from([*entry, "path", "extra"]))] = data.draw(ANY)
    (root / "boxes.json").write_text(json.dumps(document))
    read_or_refuse(root, "boxes.json")


@HOSTILE
@given(data=st.data(), shape=st.sampled_from(["boxes.csv", "joined.csv"]))
def test_any_csv_cell_is_read_or_refused(root: Path, data: Any, shape: str) -> None:
    SHAPES[shape](root / shape, BOXES)
    with (root / shape).open(newline="") as file:
        rows = list(csv.DictReader(file))
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.sampled_from(rows))
        name = data.draw(st.sampled_from(list(row)))
        row[name] = data.draw(
            st.sampled_from(["", "-1", "nan", "1e9", "1-1-5-5", "..", "|", "5"]) | st.text(max_size=6)
        )
    with (root / shape).open("wb") as file:
        lines = [",".join(rows[0])] + [",".join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in rows]
        file.write("\n".join(lines).encode("utf-8", "surrogatepass"))
    read_or_refuse(root, shape)


# --- real data, and the options -----------------------------------------------------------------------------------


def test_real_radiographs_in_the_papers_layout(shared_data: Path) -> None:
    root = shared_data / "cxr"
    files = {
        "metadata_file": "paper_format/mcxr_with_impressions.csv",
        "mimic_file": "paper_format/mimic_metadata_preprocessed.csv",
    }
    joined = load_dataset(config(root, resolution=64, metadata_file=files["metadata_file"]), "test")
    with_impressions = load_dataset(config(root, resolution=64, **files), "test")
    assert len(joined) == len(with_impressions) == 18
    assert [joined.caption(i) for i in range(18)] == [with_impressions.caption(i) for i in range(18)]
    train = load_dataset(config(root, resolution=64, **files), "train")
    assert not {joined.image_key(i) for i in range(18)} & {train.image_key(i) for i in range(len(train))}
    # The same boxes, one a row, by the reader of folders.
    folder = data_options(
        kind="folder", root=str(root), resolution=64, caption_column="caption", finding_column="bbox_label",
        box_column="bbox_xywh", findings=("consolidation",), test_split="all",
    )  # fmt: skip
    by_folder = FolderDataset(folder, "test")
    theirs = {by_folder.image_key(i): by_folder.regions(i) for i in range(len(by_folder))}
    compared = 0
    for index in range(18):
        for region in joined[index].regions:
            if region.finding == "Consolidation":
                (same,) = theirs[joined.image_key(index)]
                assert torch.equal(region.mask, same.mask) and sorted(region.boxes) == sorted(same.boxes)
                compared += 1
    assert compared == 8

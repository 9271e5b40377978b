from __future__ import annotations

import csv
import hashlib
import io
import json
import pickle
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_options import data_options
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch.utils.data import DataLoader
from transformers import CLIPTokenizer

from distill.data.captions import negated_findings
from distill.data.loading import load_dataset
from distill.data.readers.folder import FolderDataset, _boxes
from distill.errors import UserError
from distill.tokens import Tokenizers

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
COLUMNS = {"caption_column": "text", "finding_column": "finding", "box_column": "box", "mask_column": "mask"}
ORIENTATION_TAG = 0x0112


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def write_image(path: Path, size: tuple[int, int] = (40, 30), mode: str = "L", **save: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0]).astype(np.uint8)
    Image.fromarray(ramp).convert(mode).save(path, **save)


def row(name: str = "a.png", text: str = "small effusion", finding: str = "", box: str = "", mask: str = "") -> dict:
    return {"file_name": name, "text": text, "finding": finding, "box": box, "mask": mask}


def load(root: Path, rows: list[dict[str, str]] | None = None, split: str = "test", **options: object) -> FolderDataset:
    """All images of the folder, unless `split` or `options` name some."""
    if rows is not None:
        write_csv(root / "metadata.csv", rows)
    settings: dict = {"root": str(root), "kind": "folder", "resolution": 32, "test_split": "all", **COLUMNS, **options}
    return FolderDataset(data_options(**settings), split)


def fault(root: Path, rows: list[dict[str, str]] | None = None, split: str = "test", **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load(root, rows, split, **options)
    return str(caught.value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    write_image(folder / "a.png")
    write_image(folder / "b.png")
    return folder


# --- what a row becomes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("file_type", ["jpg", "png"])
def test_a_box_lands_on_what_it_surrounds_whatever_the_exif_orientation(
    root: Path, orientation: int, file_type: str
) -> None:
    shown = np.zeros((90, 140), np.uint8)
    x, y, width, height = 50, 20, 30, 45
    shown[y : y + height, x : x + width] = 255
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transpositions that lead back to the stored pixels
    stored = Image.fromarray(shown)
    if orientation in undo:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    stored.save(root / f"a.{file_type}", exif=exif)

    sample = load(root, [row(f"a.{file_type}", finding="effusion", box=f"{x},{y},{width},{height}")], resolution=60)[0]
    bright = sample.pixel_values[0] > 0
    (region,) = sample.regions
    assert sample.original_size == (90, 140)
    assert sample.pixel_values.shape == (3, 60, 60)
    assert (bright ^ region.mask).sum() <= 2 * (20 + 30), "they differ by a pixel of the edge at most"
    scale = 60 / 90
    assert region.boxes[0] == pytest.approx(((x - 25) * scale, y * scale, width * scale, height * scale))


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(), width=st.integers(8, 90), height=st.integers(8, 90), resolution=st.sampled_from([16, 32, 61]),
    fit=st.sampled_from(["crop", "letterbox"]),
)  # fmt: skip
def test_boxes_and_masks_follow_the_pixels(
    root: Path, data, width: int, height: int, resolution: int, fit: str
) -> None:
    x, y = data.draw(st.integers(0, width - 4)), data.draw(st.integers(0, height - 4))
    w, h = data.draw(st.integers(4, width - x)), data.draw(st.integers(4, height - y))
    drawn = np.zeros((height, width), np.uint8)
    drawn[y : y + h, x : x + w] = 255
    Image.fromarray(drawn).save(root / "a.png")
    Image.fromarray(drawn).save(root / "mask.png")
    by_box = load(root, [row(finding="f", box=f"{x},{y},{w},{h}")], resolution=resolution, fit=fit)
    by_mask = load(root, [row(finding="f", mask="mask.png")], resolution=resolution, fit=fit)
    for dataset in (by_box, by_mask):
        sample = dataset[0]
        assert sample.pixel_values.min() >= -1 and sample.pixel_values.max() <= 1
        assert len(sample.regions) + dataset.dropped_regions == 1
        bright = sample.pixel_values[0] > 0
        mask = sample.regions[0].mask if sample.regions else torch.zeros(resolution, resolution, dtype=torch.bool)
        assert mask.shape == (resolution, resolution)
        assert (bright ^ mask).sum() <= 4 * resolution
        # What is well inside or outside agrees; a pixel that is half covered may go either way.
        lit = sample.pixel_values[0] > -0.5
        eroded = -torch.nn.functional.max_pool2d(-bright.float()[None, None], 3, 1, 1)[0, 0] > 0
        dilated = torch.nn.functional.max_pool2d(lit.float()[None, None], 3, 1, 1)[0, 0] > 0
        assert (mask[eroded]).all() and not mask[~dilated].any()
    for box_x, box_y, box_w, box_h in (box for region in by_box[0].regions for box in region.boxes):
        assert box_x >= 0 and box_y >= 0 and box_w > 0 and box_h > 0
        assert box_x + box_w <= resolution and box_y + box_h <= resolution


def test_rows_of_an_image_are_brought_together(root: Path) -> None:
    write_image(root / "m.png")
    rows = [
        row(finding="effusion", box="5,0,10,10"),
        row("b.png", text="normal"),
        row(finding="Effusion", box="25,20,10,10"),
        row(finding="edema", mask="m.png"),
        row("./a.png", finding="nodule"),
    ]
    dataset = load(root, rows, resolution=30)
    assert len(dataset) == 2
    assert dataset.findings == ("edema", "effusion", "nodule")
    sample = dataset[0]
    assert sample.id == "a.png"
    assert [region.finding for region in sample.regions] == ["edema", "effusion"]
    assert sample.regions[1].boxes == ((0, 0, 10, 10), (20, 20, 10, 10))
    assert sample.regions[1].mask.sum() == 200
    assert sample.labels == dataset.labels(0) == ("effusion", "edema", "nodule")
    assert dataset[1].regions == () and dataset.caption(1) == "normal"
    assert pickle.loads(pickle.dumps(dataset))[0].regions[1].boxes == sample.regions[1].boxes


def test_lists_in_csv_and_jsonl_are_the_same(root: Path) -> None:
    listed = [
        row(finding="effusion|edema|effusion", box="5,0,10,10|5,5,10,10|25,20,10,10"),
        row("b.png", finding="edema", box="5,0,10,10|25,20,10,10"),
    ]
    expected = load(root, [{**r, "phrase": "small" if r["file_name"] == "a.png" else ""} for r in listed])
    lines = [
        {
            " file_name ": "a.png",
            "text": "small effusion",
            "finding": ["effusion", "edema", "effusion"],
            "box": [[5, 0, 10, 10], [5, 5, 10, 10], ["25", 20.0, 10, 10]],
        },
        {"file_name": "b.png", "text": "small effusion", "finding": "edema", "box": ["5,0,10,10", "25,20,10,10"]},
    ]
    (root / "metadata.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    dataset = load(root, metadata_file="metadata.jsonl", mask_column="none")
    for index in range(2):
        for ours, theirs in zip(dataset[index].regions, expected[index].regions, strict=True):
            assert ours.finding == theirs.finding and ours.boxes == theirs.boxes
            assert torch.equal(ours.mask, theirs.mask)


def test_a_mask_goes_before_its_box_and_phrases_are_kept(root: Path) -> None:
    Image.new("1", (40, 30), 0).save(root / "none.png")
    corner = Image.new("P", (40, 30), 0)
    corner.paste(3, (5, 0, 15, 10))
    corner.save(root / "corner.png")
    rows = [
        {**row(finding="effusion", box="0,0,40,30", mask="corner.png"), "phrase": "small one"},
        {**row(finding="effusion", box="0,0,40,30", mask="corner.png"), "phrase": "another"},
        {**row(finding="edema", box="5,0,10,10", mask="none.png"), "phrase": ""},
    ]
    dataset = load(root, rows, resolution=30, phrase_column="phrase")
    boxed, region = dataset[0].regions
    assert region.mask.sum() == 100 and region.mask[:10, :10].all()
    assert region.boxes == ((0, 0, 30, 30), (0, 0, 30, 30))
    assert region.phrase == "small one. another"
    assert boxed.finding == "edema" and boxed.mask[:10, :10].all() and boxed.mask.sum() == 100, "its box, not the mask"
    assert dataset.dropped_regions == 0


@pytest.mark.parametrize(("box", "left"), [("5,5,10,10", "its box counts"), ("", "its region is left out")])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_a_mask_of_nothing_is_said_by_name(
    root: Path, mode: str, box: str, left: str, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new(mode, (40, 30), (0, 0, 0, 255) if mode == "RGBA" else 0).save(root / "none.png")
    dataset = load(root, [row(finding="edema", box=box, mask="none.png")])
    assert f"1 masks hold nothing, all their pixels are 0: 'none.png' (metadata.csv row 2, {left})" in caplog.text
    assert len(dataset[0].regions) == bool(box) and dataset.dropped_regions == 0
    assert (
        "1 boxes" if box else "no boxes or masks (column box and mask of metadata.csv holds none"
    ) in dataset.summary


@pytest.mark.parametrize("make", ["quantize", "adaptive", "gray", "indices", "indices of colours", "two blacks"])
def test_black_is_outside_a_mask_however_its_palette_is_ordered(root: Path, make: str) -> None:
    """quantize() may give white index 0. Without black, or where index 0 is black, the index counts, as in VOC."""
    gray = Image.new("L", (40, 30), 0)
    gray.paste(255, (5, 0, 15, 10))
    mask = {
        "quantize": lambda: gray.convert("RGB").quantize(2),
        "gray": lambda: gray.quantize(2),
        "two blacks": lambda: gray.point(lambda value: 3 if value else 0).convert("P"),
        "adaptive": lambda: gray.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE, colors=2),
        "indices": lambda: gray.point(lambda value: value // 255).convert("P"),
        "indices of colours": lambda: gray.point(lambda value: value // 255).convert("P"),
    }[make]()
    if make == "two blacks":
        mask.putpalette([0, 0, 0, 200, 0, 0, 0, 200, 0, 0, 0, 0])
    if make.startswith("indices"):
        mask.putpalette([0, 0, 0, 0, 0, 0] if make == "indices" else [200, 0, 0, 0, 200, 0])
    mask.save(root / "mask.png")
    dataset = load(root, [row(finding="edema", mask="mask.png")], resolution=30)
    (region,) = dataset[0].regions
    assert int(region.mask.sum()) == 100 and bool(region.mask[:10, :10].all()), "columns 5 to 34 are kept"


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_0_is_white_is_not_a_negative(root: Path, bits: int) -> None:
    ramp = np.linspace(0, 255, 40 * 30).reshape(30, 40)
    pixels = ramp.astype(np.uint8) if bits == 8 else (ramp * 257).astype(np.uint16)
    Image.fromarray(pixels).save(root / "a.tif")
    data, entry = (root / "a.tif").read_bytes(), struct.pack("<HHIHH", 262, 3, 1, 1, 0)
    assert data.count(entry) == 1, "photometric interpretation, one short: 1, where 0 is black"
    (root / "white.tif").write_bytes(data.replace(entry, struct.pack("<HHIHH", 262, 3, 1, 0, 0)))
    black, white = (load(root, [row(name)], resolution=30)[0].pixel_values for name in ("a.tif", "white.tif"))
    torch.testing.assert_close(white, -black, atol=0.01, rtol=0)
    assert float(black.max() - black.min()) > 1


def test_without_a_column_of_findings_the_labels_are_the_findings(root: Path) -> None:
    """Else they would have no finding AUC, and data.query_words nothing to be of."""
    rows = many(root, 4, split="test", labels=lambda i: ["Edema|No Finding", "edema", "Nodule", ""][i])
    dataset = plain(root, rows, query_words={"nodule": ["edema"]})
    assert dataset.findings == ("Edema", "Nodule") and dataset.query_words["Nodule"] == ("edema",)
    assert {dataset.labels(i) for i in range(4)} == {("Edema", "No Finding"), ("Edema",), ("Nodule",), ()}
    boxed = plain(root, many(root, 2, split="test", labels="nodule", finding="edema", bbox="5,5,9,9"))
    assert boxed.findings == ("edema",)


def test_regions_outside_the_centre_square_are_dropped_and_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_image(root / "wide.png", (200, 20))
    rows = [row("wide.png", finding="edema", box="0,0,20,20"), row("wide.png", finding="effusion", box="80,0,20,20")]
    dataset = load(root, rows, resolution=20)
    assert dataset.dropped_regions == 1 and "are dropped: 'edema' in 'wide.png'" in caplog.text
    (region,) = dataset[0].regions
    assert region.finding == "effusion" and region.boxes == ((0, 0, 10, 20),)
    assert dataset[0].crop_top_left == (0, 90) and dataset.size_ids(0) == dataset[0].size_ids


def test_a_letterbox_keeps_all_of_an_image_between_black_bars(root: Path) -> None:
    for name, picture in (
        ("wide", Image.new("L", (200, 100), 255)),
        ("high", Image.new("RGB", (50, 100), (255, 0, 255))),
    ):
        picture.putpixel((0, 0), 254 if name == "wide" else (254, 0, 255))  # an image of one colour is refused
        picture.save(root / f"{name}.png")
    Image.new("L", (200, 100), 1).save(root / "mask.png")
    rows = [
        row("wide.png", finding="edema", box="0,0,200,100"),
        row("high.png"),
        row("wide.png", finding="mass", mask="mask.png"),
    ]
    dataset = load(root, rows, resolution=20, fit="letterbox")
    wide, high = dataset[0], dataset[1]
    shown = torch.zeros(20, 20, dtype=torch.bool)
    shown[5:15] = True
    assert torch.allclose(wide.pixel_values, torch.where(shown, 1.0, -1.0).expand(3, 20, 20), atol=0.01)
    assert [region.boxes for region in wide.regions] == [((0, 5, 20, 10),), ()]
    assert all(torch.equal(region.mask, shown) for region in wide.regions), "the bars are outside"
    assert torch.allclose(high.pixel_values[0], torch.where(shown.T, 1.0, -1.0), atol=0.01)
    assert (high.pixel_values[1] == -1).all()
    assert wide.size_ids == dataset.size_ids(0) == (100, 200, 0, 0, 20, 20) and wide.square_px == 200
    assert high.size_ids == dataset.size_ids(1) == (100, 50, 0, 0, 20, 20) and high.square_px == 100
    cropped = load(root, rows, resolution=20)
    assert cropped[0].size_ids == (100, 200, 0, 10, 20, 20) and cropped[0].square_px == 100
    for of in ("fingerprint", "region_fingerprint"):
        assert getattr(cropped, of)(0) != getattr(dataset, of)(0)


def test_the_thinnest_image_is_read(root: Path) -> None:
    write_image(root / "a.png", (8, 2000))
    sample = load(root, [row(finding="f", box="0,0,8,1000")], resolution=32, fit="letterbox")[0]
    assert (sample.pixel_values > -1).any(dim=(0, 1)).nonzero().flatten().tolist() == [15]
    assert sample.regions[0].mask.nonzero().tolist() == [[i, 15] for i in range(16)]


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_boxes_and_masks_that_the_crop_cuts_are_counted(root: Path, caplog: pytest.LogCaptureFixture, fit: str) -> None:
    """A cut of at most a pixel of the square does not count."""
    write_image(root / "wide.png", (200, 20))
    mask = np.zeros((20, 200), np.uint8)
    mask[:, 85:] = 1
    Image.fromarray(mask).save(root / "mask.png")
    boxes = ["0,0,20,20", "80,0,31,20", "89,0,20,20", "90,0,21,20", "100,0,12,20"]
    rows = [row("wide.png", finding=f"f{n}", box=box) for n, box in enumerate(boxes)]
    rows += [row("wide.png", finding="m", box="95,0,5,5", mask="mask.png"), row("b.png")]
    dataset = load(root, rows, resolution=20, fit=fit)
    said = "test: the centre crop cuts off 4 of 6 boxes and masks, in part or whole; data.fit letterbox keeps them"
    assert (said in caplog.messages) == (fit == "crop"), "the first two, the last, and the mask"
    assert dataset.counts == "test: 2 captions of 2 images, 6 boxes, 1 masks"


def test_findings_are_kept_and_named_as_the_config_says(root: Path) -> None:
    rows = [row(finding="left lung", box="5,0,10,10"), row(finding="EDEMA", box="5,0,10,10")]
    dataset = load(root, rows, findings=("edema",), query_words={"Edema": ["oedema"]})
    assert dataset.findings == ("edema",) and dataset.query_words == {"edema": ("oedema",)}
    assert [region.finding for region in dataset[0].regions] == ["edema"] and dataset[0].labels == ("edema",)


def test_labels_are_spelled_as_the_findings_are(root: Path) -> None:
    """Else a finding that its image has counts as negated by the caption, and its words are no label's."""
    rows = [
        {**row(text="Edema. No nodule.", finding="Edema", box="5,0,10,10"), "labels": "edema|EDEMA|Support Devices"}
    ]
    dataset = load(root, rows)
    assert dataset.findings == ("Edema",) and dataset.labels(0) == dataset[0].labels == ("Edema", "Support Devices")
    assert negated_findings(dataset, 0) == ()
    assert load(root, rows, findings=("edema",)).labels(0) == ("edema", "Support Devices")


def test_a_finding_with_a_box_is_a_label_also_where_the_column_of_labels_lacks_it(root: Path) -> None:
    """Else an image that shows it counts as one without it."""
    text = "Edema and an effusion."
    rows = [{**row(text=text, finding="Edema", box="5,0,10,10"), "label": "effusion"}]
    rows += [{**row(text=text, finding="edema", box="9,9,5,5"), "label": "effusion"}]
    rows += [{**row("b.png", finding="edema"), "label": "effusion"}]
    dataset = load(root, rows, label_column="label")
    assert [dataset.labels(k) for k in (0, 1)] == [("effusion", "Edema"), ("effusion",)]
    assert negated_findings(dataset, 0) == ()


def test_labels_of_the_image_go_before_findings_of_boxes(root: Path) -> None:
    rows = [{**row(finding="edema", box="5,0,10,10"), "label": "No Finding| edema |"}, {**row("b.png"), "label": ""}]
    dataset = load(root, rows, label_column="label")
    assert dataset.labels(0) == ("No Finding", "edema") and dataset.labels(1) == ()


def test_splits(root: Path) -> None:
    write_image(root / "b.png", (41, 30))
    write_image(root / "c.png", (42, 30))
    rows = [
        {**row(name), "split": split} for name, split in (("a.png", "train"), ("b.png", " validate"), ("c.png", "3"))
    ]
    for split, name in (("train", "a.png"), ("validation", "b.png"), ("test", "c.png")):
        dataset = load(root, rows, split, split_column="split", test_split="3")
        assert [sample.id for sample in (dataset[0],)] == [name] and len(dataset) == 1
    assert len(load(root, rows)) == 3
    message = fault(root, rows, test_split="test")
    assert "no row has split = test" in message and "'train' (1 rows)" in message and "'3' (1 rows)" in message


# --- columns and splits -------------------------------------------------------------------------------------------


def plain(root: Path, rows: list[dict[str, str]], split: str = "test", **options: object) -> FolderDataset:
    """With no option but those that a test names."""
    write_csv(root / "metadata.csv", rows)
    return load_dataset(data_options(**{"kind": "folder", "root": str(root), "resolution": 32, **options}), split)


def plain_fault(root: Path, rows: list[dict[str, str]], split: str = "test", **options: object) -> str:
    with pytest.raises(UserError) as caught:
        plain(root, rows, split, **options)
    return str(caught.value)


def names(dataset: FolderDataset) -> set[str]:
    return {dataset.image_key(index) for index in range(len(dataset))}


def many(root: Path, count: int, **values: object) -> list[dict[str, str]]:
    """Rows of `count` different images; a value may be a function of the number."""
    for number in range(count):
        write_image(root / f"{number}.png", (40 + number, 30))
    return [
        {"file_name": f"{number}.png", "text": "edema"}
        | {k: v(number) if callable(v) else v for k, v in values.items()}
        for number in range(count)
    ]


def test_the_documented_columns_are_read_without_an_option(root: Path) -> None:
    rows = many(root, 3, split=lambda i: ["train", "val", "test"][i], finding="edema", bbox="5,5,9,9")
    for split, name in (("train", "0.png"), ("validation", "1.png"), ("test", "2.png")):
        dataset = plain(root, rows, split)
        assert names(dataset) == {name} and [region.finding for region in dataset[0].regions] == ["edema"]
    assert dataset.summary == (
        "metadata.csv: 3 images, 1 train, 1 validation, 1 test; columns file_name, text, split, finding, bbox; "
        "findings: edema; test: 1 captions of 1 images, 1 boxes"
    )
    write_image(root / "m.png", (42, 30))
    extra = {"phrase": "small", "mask": "m.png", "labels": "edema|nodule", "patient": ""}
    dataset = plain(
        root, [row | (extra if number == 2 else dict.fromkeys(extra, "")) for number, row in enumerate(rows)]
    )
    assert dataset[0].regions[0].mask.float().mean() > 0.9 and dataset[0].regions[0].phrase == "small"
    assert dataset.labels(0) == ("edema", "nodule")


def test_none_leaves_a_column_unread_and_a_name_must_be_there(root: Path) -> None:
    rows = many(root, 3, split="test", finding="edema", bbox="5,5,9,9")
    assert plain(root, rows, box_column="none")[0].regions == ()
    message = plain_fault(root, rows, split_column="fold", patient_column="subject", box_column="box")
    for option, name in (("split_column", "fold"), ("patient_column", "subject"), ("box_column", "box")):
        assert f"data.{option} '{name}' is not a column" in message
    assert "data.box_column needs data.finding_column" in plain_fault(root, rows, finding_column="none")
    assert "data.test_split 'val' needs data.split_column" in plain_fault(
        root, rows, split_column="none", test_split="val"
    )
    renamed = [{"Split": row.pop("split"), **row} for row in rows]
    assert "column 'Split' would be read as 'split'" in plain_fault(root, renamed)


@pytest.mark.parametrize("option", [{}, {"split_column": "none"}])
@pytest.mark.parametrize(("count", "test", "validation"), [(2, 1, 0), (3, 1, 1), (19, 1, 1), (40, 4, 4)])
def test_without_a_split_column_no_image_is_in_two_splits(
    root: Path, count: int, test: int, validation: int, option: dict[str, str]
) -> None:
    rows = many(root, count, **({"split": "test"} if option else {}))
    found = {split: names(plain(root, rows, split, **option)) for split in ("train", "test")}
    if validation:
        found["validation"] = names(plain(root, rows, "validation", **option))
    assert set().union(*found.values()) == {row["file_name"] for row in rows}
    assert [len(found[split]) for split in ("train", "test")] == [count - test - validation, test]
    assert sum(map(len, found.values())) == count
    assert names(plain(root, rows[::-1], "test", **option)) == found["test"], "the order of the rows does not count"
    by_hash = sorted((hashlib.sha256(row["file_name"].encode()).hexdigest(), row["file_name"]) for row in rows)
    assert found["test"] == {name for _, name in by_hash[:test]}
    if validation:
        assert found["validation"] == {name for _, name in by_hash[test : test + validation]}


def test_a_patient_and_a_copy_stay_together_without_a_split_column(root: Path) -> None:
    rows = many(root, 12, patient=lambda i: f"p{i // 3}" if i < 9 else "")
    rows.append(rows[0] | {"file_name": "copy.png", "patient": ""})
    shutil.copy(root / "0.png", root / "copy.png")
    found = {split: names(plain(root, rows, split)) for split in ("train", "validation", "test")}
    assert sorted(len(found[split]) for split in found) and sum(map(len, found.values())) == 13
    for together in ({"0.png", "1.png", "2.png", "copy.png"}, {"3.png", "4.png", "5.png"}, {"6.png", "7.png", "8.png"}):
        assert sum(bool(together & some) for some in found.values()) == 1
    summary = plain(root, rows).summary
    assert "no column of splits: split by the hash of patient, else file" in summary


def test_images_of_other_splits_are_counted(root: Path) -> None:
    rows = many(root, 7, split=lambda i: ("train", "train", "test", "old", "old", "old", "validation")[i])
    assert "7 images, 2 train, 1 validation, 1 test, 3 of other splits; columns" in plain(root, rows).summary
    assert "other splits" not in plain(root, rows[:3]).summary


def test_one_image_cannot_be_trained_on(root: Path) -> None:
    shutil.copy(root / "a.png", root / "b.png")
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "b.png")]
    message = plain_fault(root, rows, "train")
    assert "the train split is empty" in message and "there are 1" in message and "data.test_split all" in message
    assert len(plain(root, rows)) == 2
    assert "at least 3 images" in plain_fault(root, many(root, 2), "validation")


def test_all_evaluates_a_folder_as_a_whole_and_no_training_takes_it(root: Path) -> None:
    for rows in (many(root, 5), many(root, 5, split=lambda i: "train" if i else "test")):
        dataset = plain(root, rows, test_split="all")
        assert len(dataset) == 5 and "all are evaluated" in dataset.summary
        for split in ("train", "validation"):
            assert f"this recipe also reads {split} images" in plain_fault(root, rows, split, test_split="all")
    assert "data.train_split and data.test_split are both" in plain_fault(root, rows, "train", train_split="test")
    assert "data.train_split cannot be all" in plain_fault(root, rows, "train", train_split="all")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_patient_or_a_picture_in_two_splits_is_refused(root: Path, split: str) -> None:
    rows = many(root, 6, split=lambda i: ["train", "val", "test"][i % 3], patient=lambda i: f"p{i}")
    plain(root, rows, split)
    rows[4]["patient"] = "p0"
    shutil.copy(root / "2.png", root / "3.png")
    message = plain_fault(root, rows, split)
    for part in (
        "has a patient or a picture in two splits: a test would see what was trained on (2)",
        "patient 'p0': split train, '0.png' (metadata.csv row 2); split validation, '4.png' (metadata.csv row 6)",
        "the same picture: split test, '2.png' (metadata.csv row 4); split train, '3.png' (metadata.csv row 5)",
        "set data.split_column none",
        "set data.patient_column none",
    ):
        assert part in message
    assert "patient 'p0'" not in plain_fault(root, rows, split, patient_column="none")
    plain(root, rows, split, split_column="none")
    plain(root, rows, test_split="all")
    rows[3]["split"] = rows[4]["split"] = "unused"
    plain(root, rows, split)


def test_only_the_first_20_of_shared_pictures_are_listed(root: Path) -> None:
    rows = many(root, 50, split=lambda i: "train" if i % 2 else "test")
    for number in range(0, 50, 2):
        shutil.copy(root / f"{number}.png", root / f"{number + 1}.png")
    message = plain_fault(root, rows)
    assert message.count("the same picture") == 20 and "... and 5 more" in message


def test_no_validation_images_says_how_they_are_called(root: Path) -> None:
    rows = many(root, 3, split=lambda i: "train" if i else "test")
    message = plain_fault(root, rows, "validation")
    assert (
        "no row has split = validation or val or valid or validate; there are 'train' (2 rows), 'test' (1 rows)"
        in message
    )


def test_normalized_boxes_are_one_fault(root: Path) -> None:
    rows = many(root, 4, split="test", finding="edema", bbox="0.1,0.2,0.5,0.25")
    message = plain_fault(root, rows)
    assert "(1):" in message and "boxes look normalized: all values of all 4 boxes are from 0 to 1" in message
    assert "0.1,0.2,0.5,0.25 (metadata.csv row 2); right is x,y,width,height in pixels" in message
    rows[0]["bbox"] = "5,5,9,9"
    plain(root, rows)


def test_fingerprint_follows_bytes_and_resolution(root: Path) -> None:
    rows = [row(), row("b.png")]
    before = load(root, rows)
    assert before.fingerprint(0) == before.fingerprint(1), "the same bytes"
    assert load(root, resolution=16).fingerprint(0) != before.fingerprint(0)
    write_image(root / "a.png", (41, 30))
    after = load(root)
    ours, theirs = ({data.image_key(i): data.fingerprint(i) for i in range(2)} for data in (after, before))
    assert ours["a.png"] != theirs["a.png"] and ours["b.png"] == theirs["b.png"]


def test_the_first_held_out_images_do_not_depend_on_how_the_file_is_sorted(root: Path) -> None:
    """Training rows keep the order of the file."""

    def order(dataset: FolderDataset) -> list[str]:
        return [dataset.image_key(index) for index in range(len(dataset))]

    rows = many(root, 40, split="test", labels=lambda i: "edema" if i < 20 else "nodule")
    dataset, listed = plain(root, rows), [row["file_name"] for row in rows]
    first = order(dataset)
    assert sorted(first) == sorted(listed) and first != listed
    assert {dataset.labels(i) for i in range(10)} == {("edema",), ("nodule",)}
    assert order(plain(root, rows[::-1])) == first
    assert order(plain(root, rows[5:])) == [name for name in first if name not in listed[:5]]
    trained = [row | {"split": "train" if i < 35 else "test"} for i, row in enumerate(rows)]
    assert order(plain(root, trained, "train")) == listed[:35]


def test_nothing_is_written_to_the_data_folder(root: Path) -> None:
    write_csv(root / "metadata.csv", [row(finding="edema", box="1,1,9,9")])
    before = sorted(root.rglob("*"))
    load(root)[0]
    assert sorted(root.rglob("*")) == before


# --- image types --------------------------------------------------------------------------------------------------


def gray_16_bit(path: Path, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint16)).save(path)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_is_read(root: Path, mode: str) -> None:
    name = "a.tif" if mode == "CMYK" else "a.png"
    write_image(root / name, mode=mode)
    pixels = load(root, [row(name)])[0].pixel_values
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32 and torch.isfinite(pixels).all()
    assert pixels[0, 0, 0] < -0.8 and pixels[0, -1, -1] > 0.8, "the ramp runs from black to white"


def test_sixteen_bits_are_scaled_and_not_clipped(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    gray_16_bit(root / "a.png", np.tile(np.linspace(0, 65535, 32), (32, 1)))
    pixels = load(root, [row()])[0].pixel_values
    assert torch.allclose(pixels[0, 0], torch.linspace(-1, 1, 32), atol=0.01)
    assert "16-bit" not in caplog.text
    gray_16_bit(root / "a.png", np.tile(np.linspace(0, 4095, 32), (32, 1)))
    load(root, [row()])
    assert "1 16-bit images have no value above 4095" in caplog.text


def test_transparent_pixels_are_white(root: Path) -> None:
    picture = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    picture.putpixel((0, 0), (9, 0, 0, 0))
    picture.save(root / "a.png")
    assert (load(root, [row()])[0].pixel_values == 1).all()


@pytest.mark.parametrize(("mode", "colour"), [("L", 0), ("L", 255), ("RGB", (9, 8, 7)), ("I;16", 700), ("1", 1)])
def test_an_image_of_one_colour_is_refused_and_a_mask_is_not(root: Path, mode: str, colour: object) -> None:
    """Of a generated folder it would be scored as if it were drawn; of a held-out one as if it were real."""
    Image.new(mode, (40, 30), colour).save(root / "c.png")  # type: ignore[arg-type]
    said = fault(root, [row(), row("c.png"), row("b.png", finding="edema", mask="c.png")], fit="letterbox")
    assert (
        "row 3: image 'c.png' is of one colour, as a failed save or a safety checker leaves it" in said
        and "(1)" in said
    )


def test_floating_point_pixels_are_refused(root: Path) -> None:
    Image.fromarray(np.zeros((30, 40), np.float32)).save(root / "a.tif")
    assert "floating point" in fault(root, [row("a.tif")])
    Image.fromarray(np.full((30, 40), 70000, np.int32)).save(root / "b.tif")
    assert "do not fit 16 bits" in fault(root, [row("b.tif")])


# --- faults -------------------------------------------------------------------------------------------------------


def test_all_faults_are_listed_at_once(root: Path) -> None:
    rows = [
        row("missing.png"),
        row("b.png", text="  "),
        row(finding="edema", box="30,0,12,10"),
        row(finding="edema", box="1,2,3"),
        row("../a.png"),
    ]
    message = fault(root, rows, findings=("effusoin", "edema"))
    for part in (
        "(6)",
        "row 2: image 'missing.png' cannot be opened: No such file",
        "row 3: text is empty",
        "row 4: box 30,0,12,10 is outside the image 'a.png' of 40 x 30 px",
        "row 5: box '1,2,3' is not a box; right is x,y,width,height",
        "row 6: file_name '../a.png' leaves the data folder",
        "'effusoin' is in no row",
    ):
        assert part in message
    assert "row 3" not in fault(root, rows, allow_empty_captions=True)


@pytest.mark.parametrize(
    "box",
    [
        "a,b,c,d",
        "1,2,3,4,5",
        "nan,0,1,1",
        "0,0,inf,1",
        "0,0,1e999,1",
        "0,0,0,5",
        "0,0,5,-1",
        "-3,0,5,5",
        "1_0,1,5,5",
        "\u0661,1,5,5",
        "0,0,5,40",
        ";",
    ],
)
def test_boxes_that_are_refused(root: Path, box: str) -> None:
    assert "row 2: " in fault(root, [row(finding="edema", box=box)])


@pytest.mark.parametrize("caption", ["nan", "NaN", "None", "null", "<NA>", "\u200b\u200b", "\ufeff \u200b"])
def test_captions_that_no_one_wrote_are_refused(root: Path, caption: str) -> None:
    message = fault(root, [row(text=caption)])
    assert "row 2: text is " in message
    assert len(load(root, [row(text="none of the above")])) == 1
    if caption.isprintable():
        assert "as programs write a missing value" in fault(root, allow_empty_captions=True, rows=[row(text=caption)])
    else:
        assert load(root, [row(text=caption)], allow_empty_captions=True).caption(0) == ""


def test_a_box_may_leave_the_image_by_a_pixel(root: Path) -> None:
    (region,) = load(root, [row(finding="edema", box="-0.5,-1,41.4,32")], resolution=30)[0].regions
    assert region.boxes == ((0, 0, 30, 30),)


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        ([row(), row(text="other")], "two values of caption"),
        ([row(finding="", box="1,1,2,2")], "there is a box or mask and finding is empty"),
        ([row(finding="a|b|c", box="1,1,2,2|1,1,2,2")], "3 values of finding for 2 boxes"),
        ([row(finding="edema", mask="none.png")], "mask 'none.png' cannot be opened"),
        ([row(finding="edema", mask="small.png")], "mask 'small.png' has 10 x 10 px and its image 40 x 30"),
        ([row(finding="edema", mask="m.jpg")], "is a JPEG"),
        ([row("folder")], "is not a file"),
        ([row("a" * 5000)], "cannot be opened"),
        ([row("")], "file_name is empty"),
        ([row("/a.png")], "leaves the data folder"),
        ([row("link.png")], "leaves the data folder"),
        ([row("broken.png")], "cannot be decoded"),
        ([row("text.png")], "is no image that can be read"),
        ([row("cut.jpg")], "cannot be decoded"),
        ([row("bomb.png")], "px are more than"),
    ],
)
def test_faults_of_rows_and_files(root: Path, rows: list[dict[str, str]], part: str) -> None:
    write_image(root / "small.png", (10, 10))
    write_image(root / "m.jpg")
    (root / "folder").mkdir()
    write_image(root.parent / "outside.png")
    (root / "link.png").symlink_to(root.parent / "outside.png")
    png = (root / "a.png").read_bytes()
    (root / "broken.png").write_bytes(png[:60] + b"\x00" * 40 + png[100:])
    (root / "text.png").write_text("not a picture")
    write_image(root / "whole.jpg", (400, 300))
    (root / "cut.jpg").write_bytes((root / "whole.jpg").read_bytes()[:900])
    (root / "bomb.png").write_bytes(png_header(10_000, 9_999))
    assert part in fault(root, rows)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be large, without the pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_splits_of_one_image_must_agree(root: Path) -> None:
    rows = [{**row(), "split": "train"}, {**row(), "split": "test"}]
    assert "two values of split: 'test' and 'train' (row 2)" in fault(root, rows, split_column="split")


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (b"file_name,text\na.png,\xe9panchement\n", "not UTF-8: byte 0xe9 at 21 (line 2)"),
        ("file_name,text\na.png,x\n".encode("utf-16"), "UTF-16"),
        (b"file_name,text\na.png,x\0y\n", "NUL at byte 22 (line 2)"),
        (b"", "has no rows"),
        (b"file_name,text\n", "has no rows"),
        (b"file_name,text\na.png,x,y\n", "row 2 has 3 fields and the header 2"),
        (b'file_name,text\na.png,"x\nb.png,y\n', "is a quote left open?"),
        (b"file_name,text,text\na.png,x,y\n", "column 'text' 2 times"),
        (b"file;text\na.png;x\n", "data.image_column 'file_name' is not a column"),
    ],
)
def test_metadata_that_cannot_be_read(root: Path, data: bytes, part: str) -> None:
    (root / "metadata.csv").write_bytes(data)
    assert part in fault(root, finding_column="none", box_column="none", mask_column="none")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "row 1 is not JSON"),
        ("[" * 100_000, "row 1 is not JSON"),
        ("[1]", "row 1 is not a JSON object"),
        ('{"file_name": ["a.png"], "text": "x"}', "file_name must be text"),
        ('{"file_name": "a.png\\u0000", "text": "x"}', "has a character that is no text"),
        ('{"file_name": "a.png", "text": "\\ud800"}', "has a character that is no text"),
        ('{"file_name": "a.png", "text": null}', "text is empty"),
        ('{"file_name": "a.png", "text": NaN}', "row 1: text must be text: nan"),
        ('{"file_name": "a.png", "text": true}', "row 1: text must be text: True"),
        ('{"file_name": "a.png", "text": 5}', "row 1: text must be text: 5"),
        ('{"file_name": "a.png", "text": "x", "finding": true}', "row 1: finding must be text: True"),
        ('{"file_name": "a.png", "text": "x", "finding": NaN}', "row 1: finding must be text: nan"),
        ('{"file_name": "a.png", "text": "x", "text": "y"}', "row 1: key 'text' is given 2 times"),
        ('{"file_name": "a.png", "text": "x", " text": "y"}', "row 1: key 'text' is given 2 times"),
        ('{"file_name": "a.png", "text": "x", "finding": "f", "box": [NaN, 0, 1, 1]}', "is not finite"),
        ('{"file_name": "a.png", "text": "x", "finding": "f", "box": [true, 0, 1, 1]}', "is not a box"),
        ('{"file_name": "a.png", "text": "x", "finding": "f", "box": {"x": 1}}', "is not a box"),
        ('{"file_name": "a.png", "text": "x", "finding": "f", "box": 5}', "is not a box"),
    ],
)
def test_json_that_cannot_be_used(root: Path, line: str, part: str) -> None:
    other = {"file_name": "b.png", "text": "x", "finding": "f", "box": [0, 0, 5, 5]}
    (root / "metadata.jsonl").write_text(line + "\n" + json.dumps(other) + "\n")
    assert part in fault(root, metadata_file="metadata.jsonl", mask_column="none")


def test_what_the_config_gets_wrong(root: Path) -> None:
    message = fault(root, [row()], caption_column="txt", box_column="bbox")
    assert "data.caption_column 'txt' is not a column; did you mean 'text'?" in message
    assert "data.box_column 'bbox' is not a column; did you mean 'box'?" in message and "file_name, text" in message
    assert "needs data.finding_column" in fault(root, finding_column="none")
    assert "'edem' is not a finding; did you mean 'edema'" in fault(
        root, [row(finding="edema", box="1,1,9,9")], query_words={"edem": ["oedema"]}
    )
    assert "data.metadata_file could be: metadata.csv" in fault(root, metadata_file="meta.csv")
    assert "must end in .csv or .jsonl" in fault(root, metadata_file="metadata.parquet")
    assert "is not a folder" in fault(root / "elsewhere")
    with pytest.raises(UserError, match=r"data\.root is missing"):
        FolderDataset(data_options(kind="folder"), "train")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_later_is_said_without_a_traceback(root: Path, workers: int) -> None:
    dataset = load(root, [row()])
    (root / "a.png").unlink()
    with pytest.raises(UserError) as caught:
        next(iter(DataLoader(dataset, num_workers=workers, collate_fn=list)))
    message = str(caught.value)
    assert message.startswith(f"'{root / 'a.png'}' could be read when the data was checked, and no longer: ")
    assert "Traceback" not in message and "\n" not in message


JSON_LIKE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("1,2,3,4"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=8,
)


@settings(max_examples=300)
@given(JSON_LIKE)
def test_any_box_value_is_finite_boxes_or_a_fault(value: object) -> None:
    try:
        boxes = _boxes(value, "box")
    except ValueError as error:
        assert "box" in str(error)
    else:
        assert all(np.isfinite(box).all() and box[2] > 0 and box[3] > 0 for box in boxes)


HOSTILE = settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
CELL = st.sampled_from(["a.png", "b.png", "edema", "1,1,5,5", "", "|", ".", "..", "~", "text"]) | st.text(max_size=6)


@HOSTILE
@given(rows=st.lists(st.lists(CELL, min_size=5, max_size=5), min_size=1, max_size=4), quote=st.booleans())
def test_hostile_rows_are_read_or_refused(root: Path, rows: list[list[str]], quote: bool) -> None:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL if quote else csv.QUOTE_MINIMAL, escapechar="\\")
    writer.writerow(["file_name", "text", "finding", "box", "mask"])
    writer.writerows(rows)
    (root / "metadata.csv").write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
    read_or_refuse(root, "metadata.csv")


@HOSTILE
@given(data=st.binary(max_size=60), with_header=st.booleans(), json_lines=st.booleans())
def test_hostile_bytes_are_read_or_refused(root: Path, data: bytes, with_header: bool, json_lines: bool) -> None:
    name = "metadata.jsonl" if json_lines else "metadata.csv"
    head = (
        b"" if not with_header else b'{"file_name": "a.png", ' if json_lines else b"file_name,text,finding,box,mask\n"
    )
    (root / name).write_bytes(head + data)
    read_or_refuse(root, name)


@HOSTILE
@given(
    lines=st.lists(
        st.dictionaries(st.sampled_from(["file_name", "text", "finding", "box", "mask"]), JSON_LIKE), max_size=3
    )
)
def test_hostile_json_is_read_or_refused(root: Path, lines: list[dict[str, object]]) -> None:
    usual = {"file_name": "a.png", "text": "x", "finding": "edema", "box": "1,1,9,9", "mask": ""}
    (root / "metadata.jsonl").write_text("\n".join(json.dumps({**usual, **line}) for line in [{}, *lines]))
    read_or_refuse(root, "metadata.jsonl")


def read_or_refuse(root: Path, name: str) -> None:
    try:
        dataset = load(root, metadata_file=name)
    except UserError:
        return
    for index in range(len(dataset)):
        assert dataset[index].caption


@HOSTILE
@given(data=st.data(), file_type=st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"]))
def test_damaged_images_are_read_or_refused(root: Path, data, file_type: str) -> None:
    file = io.BytesIO()
    Image.open(root / "b.png").save(file, file_type)
    damaged = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (root / "a.png").write_bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    write_csv(root / "metadata.csv", [row()])
    read_or_refuse(root, "metadata.csv")


# --- captions -----------------------------------------------------------------------------------------------------


def byte_tokenizer(positions: int) -> CLIPTokenizer:
    """A CLIP tokenizer without merges: each letter is a token."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=positions
    )


def test_captions_that_are_too_long_are_counted(root: Path) -> None:
    rows = [row("b.png", text="a" * 19), row(text="a" * 18)]
    shorter, longer = (Tokenizers([byte_tokenizer(positions)]) for positions in (20, 21))
    dataset = load(root, rows)
    dataset.check_captions(longer)
    dataset.check_captions(replace(shorter, caption_chunks=2))
    with pytest.raises(UserError) as caught:
        dataset.check_captions(replace(longer, tokenizers=[*longer.tokenizers, *shorter.tokenizers]))
    message = str(caught.value)
    assert message.startswith("1 of 2 captions") and "the longest has 21" in message and "a" * 19 in message
    dataset = load(root, [*rows, rows[0] | {"file_name": "./b.png"}], truncate_captions=True)
    dataset.check_captions(shorter)
    cut = (
        "1 of 2 captions are cut at the 20 tokens that the text encoder reads (the longest has 21; base.caption_chunks"
    )
    assert cut in dataset.summary and cut in dataset.counts


def test_a_finding_that_no_caption_names_is_refused(root: Path) -> None:
    rows = [row(text="Pleural fluid", finding="pleural effusion", box="5,5,9,9"), row("b.png", finding="edema")]
    load(root, rows).check_queries()
    rows[1]["box"] = "5,5,9,9"
    with pytest.raises(UserError, match=r"'edema' \(1 images\): no caption has any of edema; a caption is 'Pleural"):
        load(root, rows).check_queries()
    load(root, rows, query_words={"edema": ["fluid"]}).check_queries()
    load(root, rows, findings=("pleural effusion",)).check_queries()


# --- real data ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real samples of ../shared/data are not here")
def test_real_chest_radiographs() -> None:
    findings = ("ground glass opacity", "consolidation")
    options = {"caption_column": "caption", "finding_column": "bbox_label", "box_column": "bbox_xywh"}
    options["test_split"] = "test"
    for split, images in (("train", 141), ("test", 8), ("validation", 14)):
        dataset = load(
            SHARED / "cxr", split=split, mask_column="mask_file", split_column="split", findings=findings, **options
        )
        assert len(dataset) == images and dataset.dropped_regions == 0
    dataset = load(
        SHARED / "cxr", split="test", mask_column="mask_file", split_column="split", findings=findings, **options
    )
    dataset.check_queries()
    by_mask, by_box = (
        dataset,
        load(SHARED / "cxr", split="test", split_column="split", findings=findings, mask_column="none", **options),
    )
    for index in range(len(dataset)):
        for ours, theirs in zip(by_mask[index].regions, by_box[index].regions, strict=True):
            assert ours.finding == theirs.finding
            inside = (ours.mask & theirs.mask).sum() / ours.mask.sum()
            assert inside > 0.85, "masks lie in their boxes, but for small parts that have none"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real samples of ../shared/data are not here")
def test_real_photographs() -> None:
    options = {"finding_column": "bbox_label", "box_column": "bbox_xywh", "mask_column": "mask_file"}
    dataset = load(SHARED / "natural", split="train", caption_column="captions", test_split="test", **options)
    assert len(dataset) == 32 and {"person", "dining table"} <= set(dataset.findings)
    assert dataset[0].pixel_values.std(0).max() > 0.1, "in colour"
    assert "two values of caption" in fault(SHARED / "natural", caption_column="caption", **options)

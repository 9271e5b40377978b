"""Every hostile row of the table is accepted with the stated meaning, or refused by file, row and value; in bounds."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

import pytest
from data_options import data_options
from hostile_rows import LAYOUTS, ROWS, Accepted, HostileRow, Refused, entries_of, picture, saved, written
from PIL import Image

from distill.data.loading import load_dataset
from distill.errors import UserError

SECONDS, GIGABYTE = 10.0, 2**30
SAMPLE = ROWS[::8]
"""The fast set tries these, the slow set all."""


def prepare(row: HostileRow, folder: Path) -> None:
    """The data folder of a row, with what its path may name."""
    root = folder / "data"
    (root / "folder").mkdir(parents=True)
    for place, name in enumerate("abc"):
        (root / f"{name}.png").write_bytes(picture() + bytes(place))  # three files
    (folder / "outside.png").write_bytes(picture())
    (root / "link.png").symlink_to(folder / "outside.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    (root / "device.png").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo.png")
    (root / "zero.png").touch()
    (root / "text.png").write_text("no picture")
    if row.layout.startswith("coco"):
        for layout in ("coco.captions", "coco.instances"):
            (root / LAYOUTS[layout].file).write_bytes(written(HostileRow(layout, "", Accepted())))
    for name, data in row.files.items():
        (root / name).write_bytes(data)
    (root / LAYOUTS[row.layout].file).write_bytes(written(row))


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        found[str(path)] = (status.st_size, status.st_mtime_ns)
    return found


def check(row: HostileRow, folder: Path) -> None:
    prepare(row, folder)
    before = tree(folder)
    config = data_options(root=str(folder / "data"), resolution=30, **LAYOUTS[row.layout].options)
    used = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    began = time.process_time()
    try:
        dataset = load_dataset(config, "test")
        samples = [dataset[index] for index in range(len(dataset))]
    except UserError as error:
        message = str(error)
        assert isinstance(row.expected, Refused), message
        for part in row.expected.parts:
            assert part in message
        assert message.isprintable() or not set(message) - {"\n"} & {c for c in message if not c.isprintable()}
        assert len(message) < 10_000
    else:
        assert isinstance(row.expected, Accepted), (dataset.summary, dataset.caption(0), samples[0].regions)
        keys = [dataset.image_key(index) for index in range(len(dataset))]
        place = keys.index("a.png") if "a.png" in keys else 0
        compare(row.expected.values, samples[place], keys[place])
    assert time.process_time() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used < GIGABYTE
    assert tree(folder) == before, "nothing is written"


def compare(values: dict[str, Any], sample: Any, name: str) -> None:
    seen = {
        "name": name, "caption": sample.caption, "labels": sample.labels, "size": sample.original_size,
        "findings": tuple(region.finding for region in sample.regions),
        "boxes": sum(len(region.boxes) for region in sample.regions),
        "inside": sum(int(region.mask.sum()) for region in sample.regions),
    }  # fmt: skip
    assert {name: seen[name] for name in values} == values
    assert sample.pixel_values.std() > 0, "no blank image"


@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for row in SAMPLE])
def test_a_sample_of_the_hostile_rows(row: HostileRow, tmp_path: Path) -> None:
    check(row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(row, id=row.id) for place, row in enumerate(ROWS) if place % 8])
def test_the_other_hostile_rows(row: HostileRow, tmp_path: Path) -> None:
    check(row, tmp_path)


def large(mode: str) -> HostileRow:
    """As many pixels as a picture may have."""
    data = saved(Image.effect_noise((64, 64), 50).resize((8192, 8192), Image.Resampling.NEAREST).convert(mode), "PNG")
    return HostileRow("folder.csv", f"large {mode}", Accepted({"size": (8192, 8192)}), {"bbox": ""}, {"a.png": data})


def of_a_larger_frame(layout: str) -> HostileRow:
    """A picture of 64 x 80 px that is said to have been annotated at 12,800 x 16,000."""
    part = "has 64 x 80 px and its boxes and masks are of 12800 x 16000, more than 64 times as large"
    change: dict[str, Any] = {"images.width": 12_800, "images.height": 16_000}
    if layout == "mscxr.csv":
        change = {"image_width": "12800", "image_height": "16000"}
    return HostileRow(
        layout, "enormous frame", Refused(("image 'a.png'", part)), change, {"a.png": picture(size=(64, 80))}
    )


def many_boxes() -> HostileRow:
    change = {"bbox": [[5, 5, 9, 9]] * 100_000}
    return HostileRow("folder.jsonl", "many boxes", Accepted({"inside": 81, "boxes": 100_000}), change)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_the_largest_picture_is_read_in_bounds(mode: str, tmp_path: Path) -> None:
    check(large(mode), tmp_path)


@pytest.mark.parametrize("layout", ["mscxr.csv", "mscxr.json", "coco.instances"])
def test_a_frame_that_no_picture_has_is_refused(layout: str, tmp_path: Path) -> None:
    check(of_a_larger_frame(layout), tmp_path)


@pytest.mark.slow
def test_many_boxes_are_read_in_bounds(tmp_path: Path) -> None:
    check(many_boxes(), tmp_path)


def test_the_table_is_large_and_every_reader_is_in_it() -> None:
    assert len(ROWS) >= 500 and len({row.id for row in ROWS}) == len(ROWS)
    assert {row.layout for row in ROWS} == set(LAYOUTS)
    assert all(entries_of(layout) for layout in LAYOUTS)

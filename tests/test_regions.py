"""Boxes of a file as pixels of the training square, against the definition."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.data.readers.regions import clip_box, regions_of
from distill.data_config import Fit

SIDE = 8
PLACE = st.integers(-4, 40)
BOX = st.tuples(PLACE, PLACE, st.integers(1, 40), st.integers(1, 40))


def row_of(
    size: tuple[int, int], frame: tuple[int, int], boxes: list[tuple[float, ...]], **more: Any
) -> dict[str, Any]:
    nothing = [None] * len(boxes)
    row = {"width": size[0], "height": size[1], "frame": frame, "boxes": boxes, "findings": ["edema"] * len(boxes)}
    return row | {"masks": nothing, "segmentations": nothing, "phrases": nothing} | more


def kept_of(width: int, height: int, fit: Fit) -> tuple[float, float, float, float, int, int, int, int]:
    """The part of the file that is shown (left, top, right, bottom), and where (left, top, width, height)."""
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side, 0, 0, SIDE, SIDE
    across, down = (max(1, round(SIDE * side / max(width, height))) for side in (width, height))
    return 0, 0, width, height, (SIDE - across) // 2, (SIDE - down) // 2, across, down


@given(
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
    st.integers(1, 3),
    st.lists(BOX, min_size=1, max_size=2),
    st.sampled_from(["crop", "letterbox"]),
)
def test_a_pixel_is_inside_if_its_centre_lies_in_a_box_of_the_file(
    frame: tuple[int, int], scale: int, boxes: list[tuple[int, int, int, int]], fit: Fit
) -> None:
    """The file has `scale` times the pixels of the frame that boxes are given in. Bars of a letterbox are outside."""
    width, height = frame[0] * scale, frame[1] * scale
    x0, y0, x1, y1, left, top, across, down = kept_of(width, height, fit)
    found = regions_of(row_of((width, height), frame, list(boxes)), range(len(boxes)), ["other", "edema"], SIDE, fit)
    inside, ambiguous = set(), set()
    for i in range(top, top + down):
        for j in range(left, left + across):
            y, x = y0 + (i - top + 0.5) * (y1 - y0) / down, x0 + (j - left + 0.5) * (x1 - x0) / across
            for bx, by, bw, bh in boxes:
                a0, b0, a1, b1 = bx * scale, by * scale, (bx + bw) * scale, (by + bh) * scale
                if a0 - 1e-9 <= x <= a1 + 1e-9 and b0 - 1e-9 <= y <= b1 + 1e-9:
                    (inside if a0 + 1e-9 < x < a1 - 1e-9 and b0 + 1e-9 < y < b1 - 1e-9 else ambiguous).add((i, j))
    pixels = {tuple(place) for region in found for place in region.mask.nonzero().tolist()}
    assert inside <= pixels <= inside | ambiguous, "a centre on an edge may be either"
    assert len(found) == bool(pixels)
    for region in found:
        assert region.finding == "edema" and 0 < len(region.boxes) <= len(boxes)
        for x, y, w, h in region.boxes:
            assert left <= x < x + w <= left + across + 1e-9 and top <= y < y + h <= top + down + 1e-9


def test_boxes_of_a_region_are_in_pixels_of_the_square_and_its_phrases_are_named_once() -> None:
    row = row_of((32, 16), (16, 8), [(4, 2, 4, 2), (6, 0, 20, 3), (0, 0, 4, 8), (4, 2, 4, 2)])
    row |= {"phrases": ["hazy", "wet", "outside", "hazy"], "findings": ["edema", "edema", "edema", "effusion"]}
    edema, effusion = regions_of(row, range(4), ["edema", "effusion", "mass"], SIDE, "crop")
    assert edema.boxes == ((0, 2, 4, 2), (2, 0, 6, 3)) and edema.phrase == "hazy. wet. outside"
    assert effusion.boxes == ((0, 2, 4, 2),) and effusion.phrase == "hazy"
    assert int(edema.mask.sum()) == 8 + 18 - 2 and int(effusion.mask.sum()) == 8
    (alone,) = regions_of(row, [1, 2], ["edema", "effusion"], SIDE, "crop")
    assert alone.boxes == ((2, 0, 6, 3),), "of the chosen annotations; the other lies outside of the square"


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        ((-1, -2, 3, 4), (0, 0, 2, 2)),
        ((8, 9, 5, 6), (8, 9, 2, 3)),
        ((0, 0, 10, 12), (0, 0, 10, 12)),
    ],
)
def test_a_box_is_clipped_to_its_image(box: tuple[float, ...], expected: tuple[float, ...]) -> None:
    assert clip_box(box, 10, 12) == expected  # type: ignore[arg-type]

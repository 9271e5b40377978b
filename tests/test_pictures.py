"""The generic captioned pictures that the bundled base is made of."""

from __future__ import annotations

import re

import pytest
import torch

from distill.data.pictures import WORDS, PicturesDataset


@pytest.mark.parametrize("clear", [False, True])
def test_a_picture_is_a_function_of_its_place(clear: bool) -> None:
    one, again = (PicturesDataset("train", size, 0, 64, clear) for size in (10, 20))
    assert torch.equal(one[7].pixel_values, again[7].pixel_values) and one.caption(7) == again[7].caption
    assert one.labels(7) == again[7].labels and one.fingerprint(7) == again.fingerprint(7)
    others = [PicturesDataset("test", 10, 0, 64, clear), PicturesDataset("train", 10, 1, 64, clear)]
    for other in [*others, PicturesDataset("train", 10, 0, 64, not clear)]:
        assert other.fingerprint(7) != one.fingerprint(7) and not torch.equal(
            other[7].pixel_values, one[7].pixel_values
        )
    assert one[7].id == again[7].id != others[0][7].id and one[7].id != one[6].id
    for index in (10, -1):
        with pytest.raises(IndexError):
            one[index]


@pytest.mark.parametrize("clear", [False, True])
def test_a_caption_names_every_object_that_is_drawn(clear: bool) -> None:
    pictures = PicturesDataset("validation", 60, 0, 64, clear)
    for i in range(60):
        sample = pictures[i]
        assert sample.labels and len(set(sample.labels)) == len(sample.labels)
        for kind in sample.labels:
            assert any(re.search(rf"\b{word}\b", sample.caption.lower()) for word in WORDS[kind]), sample.caption
        assert sample.pixel_values.shape == (3, 64, 64) and sample.pixel_values.abs().max() <= 1


def test_clear_pictures_show_fewer_and_larger_objects_upright() -> None:
    def of(clear: bool) -> tuple[float, float, float]:
        samples = [PicturesDataset("test", 300, 0, 64, clear)[i] for i in range(300)]
        areas = [float(region.mask.float().mean()) for sample in samples for region in sample.regions]
        tilts = []  # of bars, by the principal axis of their masks
        for region in (region for sample in samples for region in sample.regions if region.finding == "bar"):
            y, x = region.mask.nonzero().double().T
            (_, towards) = torch.linalg.eigh(torch.cov(torch.stack([x, y])))[1].unbind(dim=1)
            tilts.append(float(towards[1].abs()))
        return sum(len(s.labels) for s in samples) / 300, sum(areas) / len(areas), sum(tilts) / len(tilts)

    (clear_count, clear_area, clear_tilt), (count, area, tilt) = of(True), of(False)
    assert clear_count < 0.9 * count and clear_area > 1.3 * area and clear_tilt < 0.3 < tilt

"""The generic captioned pictures that the embedded base is made of."""

from __future__ import annotations

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
        assert other[7].id != one[7].id or other.seed != one.seed
    with pytest.raises(IndexError):
        one[10]


@pytest.mark.parametrize("clear", [False, True])
def test_a_caption_names_every_object_that_is_drawn(clear: bool) -> None:
    pictures = PicturesDataset("validation", 60, 0, 64, clear)
    for i in range(60):
        sample = pictures[i]
        assert sample.labels and len(set(sample.labels)) == len(sample.labels)
        assert {region.finding for region in sample.regions} <= set(sample.labels)
        for kind in sample.labels:
            assert any(word in sample.caption.lower() for word in WORDS[kind]), sample.caption
        assert sample.pixel_values.shape == (3, 64, 64) and sample.pixel_values.abs().max() <= 1


def test_clear_pictures_show_fewer_and_larger_objects() -> None:
    def objects_and_area(clear: bool) -> tuple[float, float]:
        samples = [PicturesDataset("test", 200, 0, 64, clear)[i] for i in range(200)]
        areas = [float(region.mask.float().mean()) for sample in samples for region in sample.regions]
        return sum(len(s.labels) for s in samples) / 200, sum(areas) / len(areas)

    (clear_count, clear_area), (count, area) = objects_and_area(True), objects_and_area(False)
    assert clear_count < 0.9 * count and clear_area > 1.3 * area

from __future__ import annotations

import math
import sys
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score
from torchmetrics import MetricCollection

from distill.metrics import (
    AbsoluteCNR,
    AttentionMass,
    BoxIoU,
    CentreDistance,
    IoUAtThreshold,
    LocalizationMetric,
    MeanIoU,
    MixtureIoU,
    MixtureMetric,
    MixtureTwoClassIoU,
    PixelAUROC,
    PointingGame,
    SignedCNR,
    ThresholdAUROC,
    min_max,
    mixture_masks,
    mixture_threshold,
    otsu_threshold,
)

MIXTURE = [MixtureIoU, MixtureTwoClassIoU, BoxIoU, CentreDistance]
ALL = [PixelAUROC, ThresholdAUROC, SignedCNR, AbsoluteCNR, PointingGame, IoUAtThreshold, MeanIoU, *MIXTURE]
SHAPE = (3, 4, 5)

Box = tuple[float, float, float, float]

# Multiples of 1/8 have ties and stay exact under the scale and shift below.
tied_maps = arrays(np.float32, SHAPE, elements=st.integers(-4, 4).map(lambda k: k / 8))
usable_masks = arrays(np.bool_, SHAPE).filter(
    lambda masks: all(2 <= mask.sum() <= mask.size - 2 for mask in masks.reshape(SHAPE[0], -1))
)


# Quarters of pixels: borders of boxes meet the pixels' centres, which they then hold (left, top) or not (right,
# bottom).
boxes_of_a_pair = st.lists(
    st.tuples(st.integers(-4, 19), st.integers(-4, 15), st.integers(1, 16), st.integers(1, 16))
    .map(lambda box: tuple(value / 4 for value in box))
    .filter(lambda box: box[0] + box[2] > 0 and box[1] + box[3] > 0),
    max_size=3,
)


def first_pixels(masks: torch.Tensor) -> list[list[Box]]:
    """One box around the first pixel of each mask and its right neighbour, none for an empty one."""
    first = [mask.nonzero()[:1].tolist() for mask in masks]
    return [[(float(column), float(row), 2.0, 1.0) for row, column in place] for place in first]


def bounding_boxes(masks: torch.Tensor) -> list[list[Box]]:
    """One box around each mask, none for an empty one."""
    result: list[list[Box]] = []
    for mask in masks.numpy():
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        result.append([])
        if rows.size:
            x, y = float(columns[0]), float(rows[0])
            result[-1].append((x, y, float(columns[-1]) + 1 - x, float(rows[-1]) + 1 - y))
    return result


def pair_values(
    metric: LocalizationMetric, maps: torch.Tensor, masks: torch.Tensor, boxes: list[list[Box]] | None = None
) -> list[float]:
    """Value of each pair, NaN where there is none, through the public way; `boxes` are those of the masks if not
    given."""
    boxes = bounding_boxes(masks) if boxes is None else boxes
    result = []
    for row in range(len(maps)):
        metric.reset()
        metric.update(maps[row : row + 1], masks[row : row + 1], [0], [0], boxes[row : row + 1])
        values, _, _ = metric.values()
        result.append(float(values[0]) if values.size else math.nan)
    return result


def brute_force_cnr(map_: np.ndarray, mask: np.ndarray) -> float:
    inside, outside = map_[mask], map_[~mask]
    if map_.min() == map_.max():
        return 0.0
    variance = inside.var(ddof=1) + outside.var(ddof=1)
    return float((inside.mean() - outside.mean()) / math.sqrt(variance)) if variance else math.nan


def brute_force_top1(map_: np.ndarray, mask: np.ndarray) -> float:
    best = [index for index in np.ndindex(map_.shape) if map_[index] == map_.max()]
    return sum(bool(mask[index]) for index in best) / len(best)


def scale(map_: np.ndarray) -> np.ndarray:
    span = map_.max() - map_.min()
    return (map_ - map_.min()) / (span or 1.0)


def iou(predicted: np.ndarray, mask: np.ndarray) -> float:
    return float((predicted & mask).sum() / (predicted | mask).sum())


def brute_force_mean_iou(map_: np.ndarray, mask: np.ndarray) -> float:
    return sum(iou(scale(map_) > t, mask) for t in (0.1, 0.2, 0.3, 0.4, 0.5)) / 5


def brute_force_threshold_auroc(map_: np.ndarray, mask: np.ndarray) -> float:
    """Five thresholds and trapezoids are the exact area of the map in steps of a quarter."""
    scaled = torch.from_numpy(scale(map_))
    masked = scaled * (scaled > otsu_threshold(scaled[None])[0])
    return roc_auc_score(mask.ravel(), np.floor(4 * masked.numpy()).ravel())


def mixture_mask(map_: np.ndarray) -> np.ndarray:
    return map_ > float(mixture_threshold(torch.from_numpy(map_)[None])[0])


def brute_force_two_class_iou(map_: np.ndarray, mask: np.ndarray) -> float:
    return (iou(mixture_mask(map_), mask) + iou(~mixture_mask(map_), ~mask)) / 2


def brute_force_near_hit(map_: np.ndarray, mask: np.ndarray, tolerance: float) -> float:
    best = [index for index in np.ndindex(map_.shape) if map_[index] == map_.max()]
    hits = [min(math.dist(index, place) for place in np.argwhere(mask)) <= tolerance for index in best]
    return sum(hits) / len(best)


def brute_force_absolute_cnr(map_: np.ndarray, boxes: list[Box]) -> float:
    ratios = []
    for x, y, width, height in boxes:
        inside = np.zeros(map_.shape, dtype=bool)
        for row, column in np.ndindex(map_.shape):
            inside[row, column] = x <= column + 0.5 < x + width and y <= row + 0.5 < y + height
        if inside.any() and not inside.all():
            difference = abs(map_[inside].mean() - map_[~inside].mean())
            noise = math.sqrt(map_[inside].var() + map_[~inside].var())
            if noise or not difference:
                ratios.append(difference / noise if noise else 0.0)
    return float(np.mean(ratios)) if ratios else math.nan


def filled_rectangle(mask: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    filled = np.zeros_like(mask)
    if rows.size:
        filled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    return filled


def rectangles(map_: np.ndarray, mask: np.ndarray, boxes: list[Box]) -> tuple[np.ndarray, np.ndarray]:
    """What BoxIoU compares, in quarters of a pixel."""
    found = filled_rectangle(mixture_mask(map_)).repeat(4, 0).repeat(4, 1)
    true = np.zeros_like(found)
    for x, y, width, height in boxes:
        left, top = max(0, int(4 * x)), max(0, int(4 * y))
        true[top : int(4 * (y + height)), left : int(4 * (x + width))] = True
    return found, filled_rectangle(true if boxes else mask.repeat(4, 0).repeat(4, 1))


def brute_force_distance(map_: np.ndarray, mask: np.ndarray, boxes: list[Box]) -> float:
    found, true = rectangles(map_, mask, boxes)
    if len(boxes) > 1 or not found.any():
        return math.nan
    return math.dist(np.argwhere(found).mean(0), np.argwhere(true).mean(0)) / 4


def brute_force_iou(map_: np.ndarray, mask: np.ndarray) -> float:
    return iou(scale(map_) > 0.5, mask)


@settings(max_examples=20)
@given(maps=tied_maps, masks=usable_masks)
def test_values_equal_brute_force_with_ties(maps: np.ndarray, masks: np.ndarray) -> None:
    references = [
        (PixelAUROC(), lambda map_, mask: roc_auc_score(mask.ravel(), map_.ravel())),
        (SignedCNR(), brute_force_cnr),
        (PointingGame(), brute_force_top1),
        (IoUAtThreshold(0.5), brute_force_iou),
        (MeanIoU(), brute_force_mean_iou),
        (ThresholdAUROC(), brute_force_threshold_auroc),
        (MixtureIoU(), lambda map_, mask: iou(mixture_mask(map_), mask)),
        (MixtureTwoClassIoU(), brute_force_two_class_iou),
        *(
            (PointingGame(tolerance=tolerance), partial(brute_force_near_hit, tolerance=tolerance))
            for tolerance in (1.0, 1.5, 2.0)
        ),
    ]
    for metric, reference in references:
        expected = [reference(map_.astype(np.float64), mask) for map_, mask in zip(maps, masks, strict=True)]
        metric.update(torch.from_numpy(maps), torch.from_numpy(masks), [0, 0, 0], [0, 1, 2])
        values, _, images = metric.values()
        result = np.full(SHAPE[0], np.nan)
        result[images] = values
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)
        assert metric.skipped == np.isnan(expected).sum()


@settings(max_examples=25)
@given(maps=tied_maps, masks=usable_masks, boxes=st.tuples(*[boxes_of_a_pair] * 3))
def test_metrics_of_boxes_equal_brute_force(maps: np.ndarray, masks: np.ndarray, boxes: tuple[list[Box], ...]) -> None:
    rows = list(zip(maps.astype(np.float64), masks, boxes, strict=True))
    references = [
        (AbsoluteCNR(), [brute_force_absolute_cnr(map_, own) for map_, _, own in rows]),
        (BoxIoU(), [iou(*rectangles(*row)) for row in rows]),
        (CentreDistance(), [brute_force_distance(*row) for row in rows]),
    ]
    for metric, expected in references:
        scores = metric.pair_scores(torch.from_numpy(maps), torch.from_numpy(masks), boxes)
        np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_without_boxes_the_mask_is_the_box() -> None:
    maps, masks, _, _ = seeded_pairs()
    for kind in (BoxIoU, CentreDistance):
        expected = kind().pair_scores(maps, masks, bounding_boxes(masks))
        assert torch.equal(kind().pair_scores(maps, masks).nan_to_num(-1.0), expected.nan_to_num(-1.0))


@settings(max_examples=30)
@given(
    maps=arrays(
        np.float64, SHAPE, elements=st.sampled_from([-1e30, -2.5, -0.1, -0.0, 0.0, 1e-30, 0.1, 0.1 + 1e-12, 3.0])
    ),
    masks=usable_masks,
    precision=st.sampled_from([np.float32, np.float64]),
)
def test_auroc_of_signed_and_of_unrepresentable_values(maps: np.ndarray, masks: np.ndarray, precision: type) -> None:
    """The two values near 0.1 are one in float32; signs differ, -0.0 equals 0.0."""
    maps = maps.astype(precision)
    expected = [roc_auc_score(mask.ravel(), map_.ravel()) for map_, mask in zip(maps, masks, strict=True)]
    scores = PixelAUROC().pair_scores(torch.from_numpy(maps), torch.from_numpy(masks))
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-12)


def test_a_masked_map_has_the_same_threshold_auroc() -> None:
    """Protocol "vilouras" hands in maps that were masked by Otsu; to mask them again must change nothing."""
    generator = torch.Generator().manual_seed(0)
    for power in (0.3, 1.0, 4.0):
        maps = min_max(torch.rand(20, 24, 24, generator=generator) ** power)
        masks = torch.rand(20, 24, 24, generator=generator) < 0.3 * maps
        masked = maps * (maps > otsu_threshold(maps)[:, None, None])
        assert not torch.equal(masked, maps)
        metric = ThresholdAUROC()
        assert torch.equal(metric.pair_scores(masked, masks), metric.pair_scores(maps, masks))
        enlarged = [m.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2) for m in (masked, masks)]
        torch.testing.assert_close(metric.pair_scores(*enlarged), metric.pair_scores(maps, masks))


def test_what_is_predicted_can_be_handed_in() -> None:
    maps, masks, _, _ = seeded_pairs()
    boxes = first_pixels(masks)
    for kind in ALL:
        own = kind().pair_scores(maps, masks, boxes).nan_to_num(-1.0)
        given_masks = kind().pair_scores(maps, masks, boxes, mixture_masks(maps)).nan_to_num(-1.0)
        assert torch.equal(own, given_masks)
        other = kind().pair_scores(maps, masks, boxes, ~mixture_masks(maps)).nan_to_num(-1.0)
        assert torch.equal(own, other) != issubclass(kind, MixtureMetric)
    true = MixtureIoU().pair_scores(maps, masks, predicted=masks)
    assert true[~true.isnan()].tolist() == [1.0] * 8


def test_a_killed_evaluation_goes_on() -> None:
    maps, masks, findings, images = seeded_pairs()
    for kind in ALL:
        whole, resumed = kind(), kind()
        boxes = first_pixels(masks)
        whole.update(maps, masks, findings, images, boxes)
        scores = kind().pair_scores(maps, masks, boxes)
        assert scores.dtype == torch.float64 and scores.isnan()[4]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            resumed.restore(scores[:5].numpy(), findings[:5].numpy(), images[:5].tolist())
            assert resumed.skipped == scores[:5].isnan().sum() >= 1
            resumed.compute()
        resumed.update(maps[5:7], masks[5:7], findings[5:7], images[5:7], boxes[5:7])
        assert len(resumed.values()[0]) < len(whole.values()[0])
        resumed.compute()  # must not be what the next compute returns
        resumed.restore(scores[7:].tolist(), findings[7:], images[7:])
        assert torch.equal(resumed.compute(), whole.compute())
        assert all(np.array_equal(a, b) for a, b in zip(resumed.values(), whole.values(), strict=True))
        assert resumed.skipped == whole.skipped
    with pytest.raises(ValueError, match=r"finite or NaN; got \(2,\) \[0.5, inf\]"):
        resumed.restore([0.5, math.inf], [0, 0], [0, 0])
    with pytest.raises(ValueError, match=r"images must have shape \(2,\).*got \(1,\)"):
        resumed.restore([0.5, math.nan], [0, 0], [0])
    assert len(resumed.values()[0]) == 8


@settings(max_examples=10)
@given(maps=tied_maps, masks=usable_masks, factor=st.sampled_from([0.25, 2.0, 1024.0]), shift=st.integers(-8, 8))
def test_scale_and_shift_change_nothing(maps: np.ndarray, masks: np.ndarray, factor: float, shift: int) -> None:
    original, mask = torch.from_numpy(maps), torch.from_numpy(masks)
    boxes = first_pixels(mask)
    for kind in ALL:
        scores = kind().pair_scores(original, mask, boxes)
        np.testing.assert_allclose(kind().pair_scores(factor * (original + shift), mask, boxes), scores, atol=1e-12)


@settings(max_examples=10)
@given(maps=tied_maps, masks=usable_masks)
def test_mirroring_image_and_boxes_changes_nothing(maps: np.ndarray, masks: np.ndarray) -> None:
    original, mask = torch.from_numpy(maps), torch.from_numpy(masks)
    for kind in ALL:
        boxes = first_pixels(mask)
        scores = kind().pair_scores(original, mask, boxes)
        mirrored = [t.flip(2).transpose(1, 2) for t in (original, mask)]
        other = kind().pair_scores(*mirrored, [[(y, SHAPE[2] - x - w, h, w) for x, y, w, h in own] for own in boxes])
        np.testing.assert_allclose(other, scores, atol=1e-12)


@settings(max_examples=15)
@given(maps=tied_maps, masks=usable_masks)
def test_exchange_of_inside_and_outside(maps: np.ndarray, masks: np.ndarray) -> None:
    map_, mask = torch.from_numpy(maps), torch.from_numpy(masks)
    auroc, cnr = np.array(pair_values(PixelAUROC(), map_, mask)), np.array(pair_values(SignedCNR(), map_, mask))
    np.testing.assert_allclose(pair_values(PixelAUROC(), map_, ~mask), 1 - auroc, atol=1e-12)
    np.testing.assert_allclose(pair_values(SignedCNR(), map_, ~mask), -cnr, atol=1e-12)
    np.testing.assert_allclose(pair_values(SignedCNR(), -map_, mask), -cnr, atol=1e-12)
    two_class = pair_values(MixtureTwoClassIoU(), map_, mask)
    opposite = MixtureTwoClassIoU().pair_scores(map_, ~mask, predicted=~mixture_masks(map_))
    np.testing.assert_allclose(opposite, two_class, atol=1e-12)


def test_auroc_of_a_large_map_equals_sklearn() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = (torch.rand(2, 128, 128, generator=generator) * 50).round() / 50
    masks = torch.rand(2, 128, 128, generator=generator) < 0.1 + 0.5 * maps
    expected = [roc_auc_score(masks[i].flatten(), maps[i].flatten()) for i in range(2)]
    assert pair_values(PixelAUROC(), maps, masks) == pytest.approx(expected, abs=1e-12)


def test_perfect_map() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[:, 2:5, 3:6] = True
    maps = masks.float() + 0.01 * torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert pair_values(PixelAUROC(), maps, masks) == [1.0]
    assert pair_values(PointingGame(), maps, masks) == [1.0]
    assert pair_values(IoUAtThreshold(0.5), maps, masks) == [1.0]
    assert pair_values(SignedCNR(), maps, masks)[0] > 100
    assert pair_values(AbsoluteCNR(), maps, masks)[0] > pair_values(SignedCNR(), maps, masks)[0]
    for kind in (ThresholdAUROC, MeanIoU, MixtureIoU, MixtureTwoClassIoU, BoxIoU):
        assert pair_values(kind(), maps, masks) == [pytest.approx(1.0, abs=1e-12)]
    assert pair_values(CentreDistance(), maps, masks) == [0.0]
    assert not CentreDistance.higher_is_better and BoxIoU.higher_is_better


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e-30, -7.3])
def test_constant_map(constant: float) -> None:
    """0.1 cannot be written in binary: the means inside and outside differ by rounding, the CNR must not."""
    maps = torch.full((1, 7, 7), constant, dtype=torch.float64)
    masks = torch.zeros(1, 7, 7, dtype=torch.bool)
    masks[0, :3, :4] = True
    assert pair_values(PixelAUROC(), maps, masks) == [0.5]
    assert pair_values(SignedCNR(), maps, masks) == [0.0]
    assert pair_values(PointingGame(), maps, masks) == [pytest.approx(12 / 49)]
    for kind in (IoUAtThreshold, MeanIoU, MixtureIoU, BoxIoU, AbsoluteCNR):
        assert pair_values(kind(), maps, masks) == [0.0]
    assert pair_values(ThresholdAUROC(), maps, masks) == [0.5]
    assert pair_values(MixtureTwoClassIoU(), maps, masks) == [pytest.approx(37 / 49 / 2)]
    assert np.isnan(pair_values(CentreDistance(), maps, masks)).all()
    for box in ((0.0, 0.0, 7.0, 7.0), (0.0, 0.6, 3.0, 0.8)):  # nothing outside, no centre of a pixel inside
        assert np.isnan(pair_values(AbsoluteCNR(), maps, masks, [[box]])).all()


def test_cnr_without_a_finite_value_is_left_out() -> None:
    one_pixel = torch.zeros(6, 6, dtype=torch.bool)
    one_pixel[2, 2] = True
    half = torch.zeros(6, 6, dtype=torch.bool)
    half[:3] = True
    metric = SignedCNR()
    noise = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
    metric.update(torch.stack([noise, half * 0.3]), torch.stack([one_pixel, half]), [0, 0], [0, 1])
    assert metric.skipped == 2
    assert metric.compute().isnan()
    infinite, finite = (0.0, 0.0, 6.0, 3.0), (0.0, 2.0, 6.0, 2.0)
    maps, masks = (half * 0.3)[None], half[None]
    assert np.isnan(pair_values(AbsoluteCNR(), maps, masks, [[infinite]])).all()
    expected = pair_values(AbsoluteCNR(), maps, masks, [[finite]])
    assert pair_values(AbsoluteCNR(), maps, masks, [[infinite, finite]]) == expected != [math.nan]


@pytest.mark.parametrize("kind", ALL)
def test_empty_and_full_masks_are_left_out_and_counted(kind: type[LocalizationMetric]) -> None:
    maps = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(4, 6, 6, dtype=torch.bool)
    masks[1] = True
    masks[2:, :3, :2] = True
    metric = kind()
    metric.update(maps, masks, [0, 1, 0, 2], [5, 6, 7, 7], first_pixels(masks))
    values, findings, images = metric.values()
    assert metric.skipped == 2
    assert findings.tolist() == [0, 2] and images.tolist() == [7, 7]
    assert values.dtype == np.float64
    assert float(metric.compute()) == pytest.approx(values.mean())
    per_finding = metric.per_finding(["a", "b", "c"])
    assert per_finding["a"] == {"value": pytest.approx(values[0]), "pairs": 1}
    assert per_finding["b"] == {"value": None, "pairs": 0}
    with pytest.raises(ValueError, match="finding index 2 has no name"):
        metric.per_finding(["a", "b"])


def test_macro_and_micro() -> None:
    masks = torch.zeros(4, 4, 4, dtype=torch.bool)
    masks[:, 0] = True
    maps = masks.float()
    maps[3] = 1 - maps[3]  # three hits of finding 2, one miss of finding 9
    macro, micro = PointingGame(), PointingGame(average="micro")
    for metric in (macro, micro):
        metric.update(maps, masks, torch.tensor([2, 2, 2, 9]), torch.tensor([0, 1, 2, 3]))
    assert float(macro.compute()) == 0.5
    assert float(micro.compute()) == 0.75


def test_batches_change_nothing_and_reset_forgets() -> None:
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(7, 8, 8, generator=generator), torch.rand(7, 8, 8, generator=generator) < 0.3
    findings, images, boxes = [0, 1, 2, 0, 1, 2, 0], [0, 0, 1, 1, 2, 3, 4], first_pixels(masks)
    for kind in ALL:
        whole, parts = kind(), kind()
        whole.update(maps, masks, findings, images, boxes)
        parts.update(maps[:1], masks[:1], [1], [9], boxes[:1])
        parts.reset()
        for start in (0, 3, 6):
            rows = slice(start, start + 3)
            parts.update(maps[rows], masks[rows], findings[rows], images[rows], boxes[rows])
        parts.update(maps[:0], masks[:0], [], [], [])
        assert torch.equal(whole.compute(), parts.compute())
        half = kind()
        half.update(maps[:3].half(), masks[:3], findings[:3], images[:3], boxes[:3])
        np.testing.assert_allclose(half.values()[0], whole.values()[0][:3], atol=0.02)


def test_a_collection_does_not_merge_metrics_that_agree_on_its_first_batch() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 2:5, 2:5] = True
    perfect = masks.float()
    other = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1))
    collection = MetricCollection(
        {
            "auc": PixelAUROC(),
            "top1": PointingGame(),
            "near": PointingGame(tolerance=3),
            "low": IoUAtThreshold(0.1),
            "high": IoUAtThreshold(0.9),
            "mixture": MixtureIoU(),
        }
    )
    for maps in (perfect, other):
        collection.update(maps=maps, masks=masks, findings=[0], images=[0])
    result = collection.compute()
    for name, metric in (
        ("near", PointingGame(tolerance=3)),
        ("mixture", MixtureIoU()),
        ("auc", PixelAUROC()),
        ("top1", PointingGame()),
        ("low", IoUAtThreshold(0.1)),
        ("high", IoUAtThreshold(0.9)),
    ):
        expected = (1.0 + pair_values(metric, other, masks)[0]) / 2
        assert float(result[name]) == pytest.approx(expected)


def test_errors_name_what_is_wrong() -> None:
    maps, masks = torch.rand(3, 4, 4), torch.ones(3, 4, 4, dtype=torch.bool)
    metric = PixelAUROC()
    with pytest.raises(ValueError, match=r"\(3, 4, 4\) and \(3, 4, 5\)"):
        metric.update(maps, torch.ones(3, 4, 5, dtype=torch.bool), [0, 0, 0], [0, 1, 2])
    with pytest.raises(ValueError, match=r"\(3, 16\)"):
        metric.update(maps.flatten(1), masks.flatten(1), [0, 0, 0], [0, 1, 2])
    with pytest.raises(ValueError, match=r"masks bool; got torch\.float32 and torch\.int64"):
        metric.update(maps, masks.long(), [0, 0, 0], [0, 1, 2])
    with pytest.raises(ValueError, match=r"findings must have shape \(3,\).*got \(2,\)"):
        metric.update(maps, masks, [0, 0], [0, 1, 2])
    with pytest.raises(ValueError, match="images must be integers of at least 0"):
        metric.update(maps, masks, [0, 0, 0], [0, -1, 2])
    maps[1, 0, 0], maps[2, 3, 3] = math.nan, math.inf
    with pytest.raises(ValueError, match=r"2 of 3 maps contain NaN or inf \(the first is number 1\)"):
        metric.update(maps, masks, [0, 0, 0], [0, 1, 2])
    with pytest.raises(ValueError, match="average"):
        PixelAUROC(average="weighted")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threshold must be in"):
        IoUAtThreshold(1.5)
    with pytest.raises(ValueError, match="tolerance must be at least 0 pixels; got -1"):
        PointingGame(tolerance=-1)
    assert len(metric.values()[0]) == 0


def test_errors_of_boxes_and_predictions_name_what_is_wrong() -> None:
    maps, masks = torch.rand(2, 4, 6), torch.eye(6, dtype=torch.bool)[:4].repeat(2, 1, 1)
    metric = AbsoluteCNR()
    with pytest.raises(ValueError, match=r"AbsoluteCNR needs boxes: for each map a list of \(x, y, width, height\)"):
        metric.update(maps, masks, [0, 0], [0, 1])
    with pytest.raises(ValueError, match="got 1 lists for 2 maps"):
        metric.update(maps, masks, [0, 0], [0, 1], [[(0, 0, 1, 1)]])
    with pytest.raises(ValueError, match=r"a box is \(x, y, width, height\); got \[\(0, 0, 1\)\] for map number 1"):
        metric.update(maps, masks, [0, 0], [0, 1], [[], [(0, 0, 1)]])
    for box in ((6, 0, 1, 1), (0, 4, 1, 1), (0, 0, 0, 1), (0, 0, -1, 1), (-2, 0, 2, 1), (0, 0, math.nan, 1)):
        with pytest.raises(ValueError, match="boxes of map number 1 have no area in its 6 x 4 pixels"):
            metric.update(maps, masks, [0, 0], [0, 1], [[(5, 3, 4, 4)], [(0, 0, 1, 1), box]])
    with pytest.raises(ValueError, match=r"predicted must be \(2, 4, 6\) bool; got \(2, 4, 6\) torch\.float32"):
        MixtureIoU().update(maps, masks, [0, 0], [0, 1], predicted=maps)
    with pytest.raises(ValueError, match=r"predicted must be \(2, 4, 6\) bool; got \(1, 4, 6\)"):
        MixtureIoU().update(maps, masks, [0, 0], [0, 1], predicted=masks[:1])
    assert len(metric.values()[0]) == 0


def test_attention_mass() -> None:
    metric = AttentionMass()
    metric.update(torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]]))
    metric.update(torch.tensor([[0.0, 1.0, 0.0, 0.0]]))
    mass = {group: float(value) for group, value in metric.compute().items()}
    assert mass == pytest.approx({"bos": 0.25, "words": 0.5, "eos": 0.125, "padding": 0.125})
    with pytest.raises(ValueError, match=r"\(N, 4\); got \(2, 3\)"):
        metric.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="1 of 2 masses contain NaN"):
        metric.update(torch.tensor([[0.25] * 4, [math.nan] * 4]))
    with pytest.raises(ValueError, match="1 of 2 masses are negative or do not sum to 1"):
        metric.update(torch.tensor([[0.25] * 4, [0.3] * 4]))


def seeded_pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(9, 6, 6, generator=generator)
    masks = torch.rand(9, 6, 6, generator=generator) < 0.3
    masks[4] = False
    return maps, masks, torch.arange(9) % 3, torch.arange(9) // 2


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    maps, masks, findings, images = seeded_pairs()
    split, all_in_one, mass = PixelAUROC(), SignedCNR(), AttentionMass()
    boxed, restored = AbsoluteCNR(average="micro"), MixtureIoU()
    rows = slice(0, 6) if rank == 0 else slice(6, 9)
    split.update(maps[rows], masks[rows], findings[rows], images[rows])
    mass.update(torch.eye(4)[: rank + 1])
    boxed.update(maps[rows], masks[rows], findings[rows], images[rows], first_pixels(masks[rows]))
    scores = restored.pair_scores(maps[rows], masks[rows])
    restored.restore(scores, findings[rows], images[rows])
    if rank == 0:
        all_in_one.update(maps, masks, findings, images)
    values, found, seen = split.values()
    torch.save(
        {
            "auc": split.compute(),
            "cnr": all_in_one.compute(),
            "boxed": boxed.compute(),
            "restored": restored.compute(),
            "values": torch.tensor(np.stack([values, found, seen])),
            "skipped": split.skipped,
            "names": split.per_finding(["a", "b", "c"]),
            "local_pairs": len(split.finding_indices[0]),
            "mass": mass.compute(),
        },
        f"{folder}/{rank}.pt",
    )
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Uneven shares, a process without any pair, and local states that survive the gathering."""
    # A spawned process imports everything again, for many seconds; a forked one must not meet the parent's threads.
    start_method = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(run_process, args=(str(tmp_path),), nprocs=2, start_method=start_method)
    auc, cnr, boxed, mixture = PixelAUROC(), SignedCNR(), AbsoluteCNR(average="micro"), MixtureIoU()
    for metric in (auc, cnr, boxed, mixture):
        metric.update(*seeded_pairs(), first_pixels(seeded_pairs()[1]))
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert float(result["auc"]) == pytest.approx(float(auc.compute()), abs=1e-15)
        assert float(result["cnr"]) == pytest.approx(float(cnr.compute()), abs=1e-15)
        assert float(result["boxed"]) == pytest.approx(float(boxed.compute()), abs=1e-15)
        assert float(result["restored"]) == pytest.approx(float(mixture.compute()), abs=1e-15)
        assert torch.equal(result["values"], torch.tensor(np.stack(auc.values())))
        assert result["skipped"] == 1
        assert result["names"] == auc.per_finding(["a", "b", "c"])
        assert result["local_pairs"] == (6 if rank == 0 else 3)
        assert float(result["mass"]["bos"]) == pytest.approx(2 / 3)


def test_merged_states_equal_one() -> None:
    maps, masks, findings, images = seeded_pairs()
    whole, first, second = PixelAUROC(), PixelAUROC(), PixelAUROC()
    whole.update(maps, masks, findings, images)
    first.update(maps[:6], masks[:6], findings[:6], images[:6])
    second.update(maps[6:], masks[6:], findings[6:], images[6:])
    first.merge_state(second)
    assert float(first.compute()) == pytest.approx(float(whole.compute()), abs=1e-15)

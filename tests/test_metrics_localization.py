from __future__ import annotations

import math
import sys
from datetime import timedelta
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
    AttentionMass,
    IoUAtThreshold,
    LocalizationMetric,
    PixelAUROC,
    PointingGame,
    SignedCNR,
)

ALL = [PixelAUROC, SignedCNR, PointingGame, IoUAtThreshold]
SHAPE = (3, 4, 5)

# Multiples of 1/8 have ties and stay exact under the scale and shift below.
tied_maps = arrays(np.float32, SHAPE, elements=st.integers(-4, 4).map(lambda k: k / 8))
usable_masks = arrays(np.bool_, SHAPE).filter(
    lambda masks: all(2 <= mask.sum() <= mask.size - 2 for mask in masks.reshape(SHAPE[0], -1))
)


def pair_values(metric: LocalizationMetric, maps: torch.Tensor, masks: torch.Tensor) -> list[float]:
    """Value of each pair, NaN where there is none, through the public way."""
    result = []
    for row in range(len(maps)):
        metric.reset()
        metric.update(maps[row : row + 1], masks[row : row + 1], [0], [0])
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


def brute_force_iou(map_: np.ndarray, mask: np.ndarray) -> float:
    span = map_.max() - map_.min()
    predicted = (map_ - map_.min()) / span > 0.5 if span else np.zeros_like(mask)
    return float((predicted & mask).sum() / (predicted | mask).sum())


@settings(deadline=None, max_examples=60)
@given(maps=tied_maps, masks=usable_masks)
def test_values_equal_brute_force_with_ties(maps: np.ndarray, masks: np.ndarray) -> None:
    references = [
        (PixelAUROC(), lambda map_, mask: roc_auc_score(mask.ravel(), map_.ravel())),
        (SignedCNR(), brute_force_cnr),
        (PointingGame(), brute_force_top1),
        (IoUAtThreshold(0.5), brute_force_iou),
    ]
    for metric, reference in references:
        expected = [reference(map_.astype(np.float64), mask) for map_, mask in zip(maps, masks, strict=True)]
        metric.update(torch.from_numpy(maps), torch.from_numpy(masks), [0, 0, 0], [0, 1, 2])
        values, _, images = metric.values()
        result = np.full(SHAPE[0], np.nan)
        result[images] = values
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)
        assert metric.skipped == np.isnan(expected).sum()


@settings(deadline=None, max_examples=30)
@given(maps=tied_maps, masks=usable_masks, scale=st.sampled_from([0.25, 2.0, 1024.0]), shift=st.integers(-8, 8))
def test_scale_and_shift_change_nothing(maps: np.ndarray, masks: np.ndarray, scale: float, shift: int) -> None:
    original, mask = torch.from_numpy(maps), torch.from_numpy(masks)
    for kind in ALL:
        np.testing.assert_allclose(
            pair_values(kind(), scale * (original + shift), mask), pair_values(kind(), original, mask), atol=1e-12
        )


@settings(deadline=None, max_examples=30)
@given(maps=tied_maps, masks=usable_masks)
def test_exchange_of_inside_and_outside(maps: np.ndarray, masks: np.ndarray) -> None:
    map_, mask = torch.from_numpy(maps), torch.from_numpy(masks)
    auroc, cnr = np.array(pair_values(PixelAUROC(), map_, mask)), np.array(pair_values(SignedCNR(), map_, mask))
    np.testing.assert_allclose(pair_values(PixelAUROC(), map_, ~mask), 1 - auroc, atol=1e-12)
    np.testing.assert_allclose(pair_values(SignedCNR(), map_, ~mask), -cnr, atol=1e-12)
    np.testing.assert_allclose(pair_values(SignedCNR(), -map_, mask), -cnr, atol=1e-12)


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


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e-30, -7.3])
def test_constant_map(constant: float) -> None:
    """0.1 cannot be written in binary: the means inside and outside differ by rounding, the CNR must not."""
    maps = torch.full((1, 7, 7), constant, dtype=torch.float64)
    masks = torch.zeros(1, 7, 7, dtype=torch.bool)
    masks[0, :3, :4] = True
    assert pair_values(PixelAUROC(), maps, masks) == [0.5]
    assert pair_values(SignedCNR(), maps, masks) == [0.0]
    assert pair_values(PointingGame(), maps, masks) == [pytest.approx(12 / 49)]
    assert pair_values(IoUAtThreshold(0.5), maps, masks) == [0.0]


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


@pytest.mark.parametrize("kind", ALL)
def test_empty_and_full_masks_are_left_out_and_counted(kind: type[LocalizationMetric]) -> None:
    maps = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(4, 6, 6, dtype=torch.bool)
    masks[1] = True
    masks[2:, :3, :2] = True
    metric = kind()
    metric.update(maps, masks, [0, 1, 0, 2], [5, 6, 7, 7])
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
    findings, images = [0, 1, 2, 0, 1, 2, 0], [0, 0, 1, 1, 2, 3, 4]
    for kind in ALL:
        whole, parts = kind(), kind()
        whole.update(maps, masks, findings, images)
        parts.update(maps[:1], masks[:1], [1], [9])
        parts.reset()
        for start in (0, 3, 6):
            rows = slice(start, start + 3)
            parts.update(maps[rows], masks[rows], findings[rows], images[rows])
        parts.update(maps[:0], masks[:0], [], [])
        assert torch.equal(whole.compute(), parts.compute())
        half = kind()
        half.update(maps[:3].half(), masks[:3], findings[:3], images[:3])
        np.testing.assert_allclose(half.values()[0], whole.values()[0][:3], atol=0.02)


def test_a_collection_does_not_merge_metrics_that_agree_on_its_first_batch() -> None:
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 2:5, 2:5] = True
    perfect = masks.float()
    other = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(1))
    collection = MetricCollection(
        {"auc": PixelAUROC(), "top1": PointingGame(), "low": IoUAtThreshold(0.1), "high": IoUAtThreshold(0.9)}
    )
    for maps in (perfect, other):
        collection.update(maps=maps, masks=masks, findings=[0], images=[0])
    result = collection.compute()
    for name, metric in (
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
    rows = slice(0, 6) if rank == 0 else slice(6, 9)
    split.update(maps[rows], masks[rows], findings[rows], images[rows])
    mass.update(torch.eye(4)[: rank + 1])
    if rank == 0:
        all_in_one.update(maps, masks, findings, images)
    values, found, seen = split.values()
    torch.save(
        {
            "auc": split.compute(),
            "cnr": all_in_one.compute(),
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
    auc, cnr = PixelAUROC(), SignedCNR()
    for metric in (auc, cnr):
        metric.update(*seeded_pairs())
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert float(result["auc"]) == pytest.approx(float(auc.compute()), abs=1e-15)
        assert float(result["cnr"]) == pytest.approx(float(cnr.compute()), abs=1e-15)
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

"""The detector names what was done to images, finds nothing where nothing was done, and its explanations add up."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import factorial

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score

from distill.data.phantom import pixels
from distill.data.phantom.scene import draw_scene
from distill.errors import UserError
from distill.evaluation import detection
from distill.evaluation.detection import (
    NAMES,
    Pair,
    Rows,
    counterfactual,
    eight_bit,
    group_faults,
    halves,
    over_folds,
)
from distill.evaluation.tree_shap import tree_shap
from distill.models.family import Model

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


def table(count: int, seed: int, **shifts: float) -> Rows:
    """Normal noise, moved by feature number, such as f3=2; row i is of group i."""
    values = np.random.default_rng(seed).standard_normal((count, len(NAMES)))
    for name, shift in shifts.items():
        values[:, int(name[1:])] += shift
    return Rows(values, np.array([f"patient {i}" for i in range(count)]))


# --- TreeSHAP -----------------------------------------------------------------------------------------------------


def expectation(nodes: np.ndarray, row: Floats, known: tuple[int, ...], place: int = 0) -> float:
    """Of one tree, by its definition: follow known features, and take the mean of both ways at the others."""
    node = nodes[place]
    if node["is_leaf"]:
        return float(node["value"])
    ways = [int(node["left"]), int(node["right"])]
    value = row[node["feature_idx"]]
    if node["feature_idx"] in known:
        left = bool(node["missing_go_to_left"]) if np.isnan(value) else value <= node["num_threshold"]
        return expectation(nodes, row, known, ways[0] if left else ways[1])
    return sum(nodes[w]["count"] / node["count"] * expectation(nodes, row, known, w) for w in ways)


def test_tree_shap_is_the_shapley_value_by_its_definition_and_adds_up_to_the_logit() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((120, 4))
    rows[rng.random(rows.shape) < 0.1] = np.nan
    truth = np.nan_to_num(rows[:, 0] * rows[:, 1]) + np.nan_to_num(rows[:, 2]) + np.isnan(rows[:, 3]) > 0
    model = HistGradientBoostingClassifier(max_iter=6, max_depth=3, min_samples_leaf=5, random_state=0).fit(rows, truth)
    expected, found = tree_shap(model, rows[:5])
    assert np.allclose(expected + found.sum(axis=1), model.decision_function(rows[:5]))
    for row, values in zip(rows[:5], found, strict=True):
        for feature in range(4):
            others, right = [f for f in range(4) if f != feature], 0.0
            for known in (k for size in range(4) for k in combinations(others, size)):
                weight = factorial(len(known)) * factorial(3 - len(known)) / factorial(4)
                for (tree,) in model._predictors:
                    gain = expectation(tree.nodes, row, (*known, feature)) - expectation(tree.nodes, row, known)
                    right += weight * gain
            assert values[feature] == pytest.approx(right, abs=1e-9)


# --- the detector -------------------------------------------------------------------------------------------------


def test_area_under_curve_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(1)
    truth, scores = rng.random(50) < 0.4, rng.integers(8, size=50).astype(float)
    assert detection.area_under_curve(truth, scores) == pytest.approx(roc_auc_score(truth, scores))


def test_a_group_is_never_trained_on_and_tested() -> None:
    """Rows that only their patient tells: two of each, far from all others."""
    rng = np.random.default_rng(2)
    centres = 10 * rng.standard_normal((40, len(NAMES)))
    groups = np.array([f"patient {i // 2}" for i in range(40)])
    real, other = (Rows(np.repeat(side, 2, 0), groups) for side in (centres[:20], centres[20:]))
    folds = detection.train_detectors([Pair(real, other)], 0)
    assert len(folds) == 10
    everyone = np.concatenate([groups, groups])
    for fold in folds:
        unseen = set(everyone[fold.rows])
        assert not unseen & set(np.delete(everyone, fold.rows))
    low, high = detection.auc(folds).interval
    assert low < 0.5 < high


def test_what_differs_is_first_in_importance_alone_and_with_its_kind() -> None:
    pair = Pair(table(60, 0), table(60, 1, f3=2.0))
    folds = detection.train_detectors([pair], 0)
    assert detection.auc(folds).interval[0] > 0.7
    found = detection.importance(folds, [[i] for i in range(len(NAMES))], 0)
    values = [estimate.value for estimate in found]
    assert int(np.argmax(values)) == 3 and found[3].interval[0] > 0
    assert max(value for i, value in enumerate(values) if i != 3) < values[3] / 4
    both, none = detection.importance(folds, [[3, 4], []], 0)
    assert both.value == pytest.approx(values[3], abs=0.05) and none.value == 0
    grid, curve = detection.partial_dependence(folds, 3)
    assert grid[0] < 0 < 2 < grid[-1] and curve[0] < 0.4 and curve[-1] > 0.6
    flat = detection.partial_dependence(folds, 10)[1]
    assert np.ptp(flat) < np.ptp(curve) / 4


def test_each_image_is_explained_once_by_a_detector_that_did_not_see_it() -> None:
    pair = Pair(table(50, 0), table(40, 1, f3=3.0))
    folds = detection.train_detectors([pair], 0)
    found = list(detection.explain_images([pair], folds))
    assert sorted(image.row for image in found) == list(range(40))
    first = [int(np.argmax(image.added)) for image in found if image.score > 0.5]
    assert first.count(3) > 0.9 * len(first)
    for image in found:
        assert (image.change is None) or (image.score >= 0.5 and image.change.after in np.r_[-5:5, image.change.after])
        if image.change is not None and image.change.column == 3:
            assert image.change.after < image.change.before
            fold = next(f for f in folds[:5] if image.row + 50 in f.rows)
            changed = pair.other.values[image.row].copy()
            assert fold.scores(changed[None])[0] == image.score
            changed[3] = image.change.after
            assert fold.scores(changed[None])[0] < 0.5


def test_a_counterfactual_is_the_smallest_change_that_is_enough() -> None:
    real = np.random.default_rng(0).uniform(-1, 1, (200, 3))
    row, spread = np.array([2.0, 2.0, np.nan]), real.std(axis=0)

    def score(rows: Floats) -> Floats:
        return (rows[:, 0] + 4 * rows[:, 1] > 8).astype(float)

    found = counterfactual(score, row, real, spread)
    assert found is not None and (found.column, found.before) == (1, 2.0)
    assert 0.9 < found.after <= 1
    assert counterfactual(lambda rows: np.ones(len(rows)), row, real, spread) is None


def test_halves_share_no_group_and_hold_every_row() -> None:
    rows = Rows(np.zeros((40, len(NAMES))), np.array([f"patient {i // 2}" for i in range(40)]))
    for first, second in halves(rows, 3, 0):
        assert len(first) == len(second) == 20 and not set(first.groups) & set(second.groups)


def test_the_interval_is_that_of_nadeau_and_bengio() -> None:
    value, (low, high) = over_folds([0.4, 0.6] * 5)
    half = 2.7764451 * (np.var([0.4, 0.6] * 5, ddof=1) * (0.1 + 0.25)) ** 0.5
    assert (value, high - value, value - low) == pytest.approx((0.5, half, half))


def test_too_few_images_are_refused() -> None:
    with pytest.raises(UserError, match="at least 10 different patients.*got 9"):
        detection.train_detectors([Pair(table(20, 0), table(9, 1))], 0)


def test_both_sides_are_rounded_to_eight_bits(sd: Model) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = eight_bit(images)
    assert torch.equal(found, eight_bit(found)) and (found - images).abs().max() <= 1 / 255 + 1e-6
    assert torch.allclose((found + 1) * 127.5, ((found + 1) * 127.5).round(), atol=1e-3)
    assert np.array_equal(Rows.of(images, "ab").values, Rows.of(found, "ab").values)
    drawn = detection.through_vae(sd, images)
    assert drawn.shape == images.shape and drawn.abs().max() <= 1


# --- known faults, planted into copies of real images -------------------------------------------------------------

SIDE, COUNT = 64, 120
NAMED_BY = {
    "blur": {"edge sharpness", "strongest edges", "Laplacian variance", "noise", "fine detail", "finest detail",
             "spectrum slope"},
    "low contrast": {"contrast", "brightness range"},
    "no heart": {"bright width between dark areas", "dark area in the centre", "lower middle brightness"},
}  # fmt: skip
"""Stated before the first run: the features that count as naming a fault."""
KIND_OF = {"blur": {"sharpness", "detail"}, "low contrast": {"contrast"}, "no heart": {"layout"}}


def phantoms(start: int) -> torch.Tensor:
    """(COUNT, 3, SIDE, SIDE) of as many scenes."""
    drawn = [pixels.draw(draw_scene(0, "test", start + i), SIDE).image for i in range(COUNT)]
    return torch.from_numpy(np.stack(drawn))[:, None].expand(-1, 3, -1, -1) * 2 - 1


def blurred(images: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(ndimage.gaussian_filter(images.numpy(), (0, 0, 0.6, 0.6), mode="nearest"))


def low_contrast(images: torch.Tensor) -> torch.Tensor:
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return mean + 0.75 * (images - mean)


def control_and_fault(other: torch.Tensor, name: str) -> None:
    real = Rows.of(phantoms(0), [f"patient {i}" for i in range(COUNT)])
    planted = Rows.of(other, [f"patient {COUNT + i}" for i in range(COUNT)])
    folds = detection.train_detectors([Pair(real, planted)], 0)
    assert detection.auc(folds).interval[0] > 0.5
    found = detection.importance(folds, [[i] for i in range(len(NAMES))], 0)
    ranked = sorted(zip(found, NAMES, strict=True), reverse=True)
    print(name, detection.auc(folds), *(f"{n} {e.value:.3f}" for e, n in ranked[:4]))
    assert ranked[0][1] in NAMED_BY[name] and ranked[0][0].interval[0] > 0
    columns = [[i for i, f in enumerate(detection.FEATURES) if f.kind == kind] for kind in detection.KINDS]
    kinds = sorted(zip(detection.importance(folds, columns, 0), detection.KINDS, strict=True), reverse=True)
    print(*(f"{n} {e.value:.3f}" for e, n in kinds[:3]))
    assert kinds[0][1] in KIND_OF[name]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fault"), [("blur", blurred), ("low contrast", low_contrast)])
def test_a_planted_fault_is_named_first(name: str, fault: Callable[[torch.Tensor], torch.Tensor]) -> None:
    control_and_fault(fault(phantoms(COUNT)), name)


@pytest.mark.slow
def test_a_missing_structure_is_named_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scenes, drawn without a heart: lung lies where it was."""
    real = phantoms(COUNT)
    monkeypatch.setattr(pixels, "_heart", lambda x, y, scene, enlargement: np.full_like(x + y, -1.0))
    other = phantoms(COUNT)
    monkeypatch.undo()
    assert not torch.equal(real, other)
    control_and_fault(other, "no heart")


@pytest.mark.slow
def test_real_images_are_not_told_from_real_ones() -> None:
    rows = Rows.of(torch.cat([phantoms(0), phantoms(COUNT)]), [f"patient {i}" for i in range(2 * COUNT)])
    found = detection.auc(detection.train_detectors(halves(rows, 3, 0), 0))
    print(found)
    assert found.interval[0] < 0.5 < found.interval[1]


def test_groups_and_not_images_are_counted() -> None:
    patients = [f"patient {k // 3}" for k in range(60)]
    assert group_faults(patients, 30, [patients[:30]]) == []
    (fault,) = group_faults(patients, 27, [patients[:30]])
    assert fault == "the 27 images that are compared are of 9 patients or images; a detector needs 10"
    (fault,) = group_faults(patients[:57], 30, [patients[:30]])
    assert "of 19 patients or images; the control, real against real images, needs 20" in fault
    assert len(group_faults(patients[:27], 27, [patients[:30], patients[:27]])) == 3


def test_pixels_outside_the_range_are_cut_as_in_a_file() -> None:
    found = eight_bit(torch.tensor([-3.0, -1.0, 0.0, 1.0, 2.0]))
    assert found.tolist() == [-1.0, -1.0, pytest.approx(0, abs=0.004), 1.0, 1.0]


@pytest.mark.parametrize("others", [20, 100])
def test_a_side_with_more_images_is_not_taken_for_granted(others: int) -> None:
    """Where the detector knows nothing, it says one half, however many images are on either side."""
    folds = detection.train_detectors([Pair(table(20, 0), table(others, 1))], 0)
    said = np.concatenate([fold.scores(fold.values) for fold in folds])
    assert abs(float(said.mean()) - 0.5) < 0.15

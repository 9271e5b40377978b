"""Copies are found by distance 0 and by the tests, images of the same distribution are not, and blocks change
nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, fisher_exact, mannwhitneyu
from torch import Tensor

from distill.metrics.memorization import (
    Nearest,
    closeness,
    closeness_in_crowd,
    copies,
    near_copies,
    nearer,
    nearest,
    suspicion,
    thumbnails,
)


def cloud(count: int, seed: int, width: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


# --- the nearest image ----------------------------------------------------------------------------------------------


def brute_force(images: Tensor, others: Tensor, leave_out: list[int]) -> tuple[list[float], list[int]]:
    distances, rows = [], []
    for image, out in zip(images.double(), leave_out, strict=True):
        each = [(float((image - other).norm()), row) for row, other in enumerate(others.double()) if row != out]
        distance, row = min(each)
        distances.append(distance)
        rows.append(row)
    return distances, rows


@pytest.mark.parametrize("block", [1, 7, 30, 100])
def test_the_nearest_image_is_that_of_a_loop_for_any_block(block: int) -> None:
    images, others = cloud(20, 0), cloud(30, 1)
    others[25] = others[3] = images[5]
    others[9] = images[6]
    out = [-1] * 20
    out[6], out[0] = 9, int(nearest(images, [others]).row[0])
    found = nearest(images, others.split(block), np.array(out))
    distances, rows = brute_force(images, others, out)
    assert found.row.tolist() == rows and found.row[5] == 3, "of two copies the first"
    np.testing.assert_allclose(found.distance, distances, rtol=1e-12)
    assert found.distance[5] == 0 and found.row[6] != 9


def test_a_copy_far_from_the_origin_has_distance_0() -> None:
    """A difference of squares in float32 would give it about 100."""
    others = cloud(50, 0, 64) * 1e-2 + 1e4
    found = nearest(others[[7, 40]], others.split(16))
    assert found.distance.tolist() == [0, 0] and found.row.tolist() == [7, 40]


def test_a_copy_in_a_later_block_than_a_near_copy_is_found() -> None:
    """The distances in float32 by which a block is passed over are far less exact than the near copies are near."""
    copied = cloud(20, 0, 256) * 100
    found = nearest(copied, [copied + 1e-3, cloud(20, 1, 256) * 100, copied])
    assert found.distance.tolist() == [0] * 20 and found.row.tolist() == list(range(40, 60))


@pytest.mark.parametrize("scales", [(1e4, 1.0), (1.0, 1e4)])
def test_of_blocks_about_equally_far_away_the_nearer_is_found(scales: tuple[float, float]) -> None:
    """Farther away, from images or to others, float32 tells distances less well apart."""
    for seed in range(0, 60, 3):
        images, others = (cloud(20, seed + k, 64).double() * scale for k, scale in enumerate(scales))
        images[10:] = -images[:10]  # their mean is 0, so that the lengths are those of the scales
        blocks = [others[:1], others[:1] + cloud(1, seed + 2, 64) * 1e-5]
        distances, rows = brute_force(images, torch.cat(blocks), [-1] * 20)
        found = nearest(images, blocks)
        assert found.row.tolist() == rows
        np.testing.assert_allclose(found.distance, distances, rtol=1e-12)


def test_long_vectors_in_float64_lose_nothing() -> None:
    image = torch.full((1, 2), 1e8, dtype=torch.float64)
    found = nearest(image, [image + 3.9, image + torch.tensor([4.1, 0.0])])
    assert found.row.tolist() == [1] and found.distance[0] == pytest.approx(4.1)


def test_only_blocks_with_nearer_rows_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    norm = Tensor.norm
    monkeypatch.setattr(Tensor, "norm", lambda self, **kwargs: counts.append(len(self)) or norm(self, **kwargs))
    nearest(cloud(10, 0), [cloud(20, 1), cloud(20, 2) + 50])
    assert set(counts) == {10, 0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_vectors_of_any_precision_are_compared(dtype: torch.dtype) -> None:
    images, others = cloud(5, 0).to(dtype), cloud(9, 1).to(dtype)
    distances, rows = brute_force(images, others, [-1] * 5)
    found = nearest(images, others.split(4))
    assert found.row.tolist() == rows
    np.testing.assert_allclose(found.distance, distances, rtol=1e-12)


def test_an_image_without_any_other_is_infinitely_far() -> None:
    found = nearest(cloud(1, 0), [cloud(1, 1)], np.array([0]))
    assert found.distance.tolist() == [np.inf] and found.row.tolist() == [-1]


def test_of_two_neighbours_the_nearer_counts_and_of_equal_ones_the_first() -> None:
    one = Nearest(np.array([1.0, 2.0, 3.0]), np.array([10, 11, 12]))
    other = Nearest(np.array([2.0, 1.0, 3.0]), np.array([20, 21, 22]))
    found = nearer(one, other)
    assert found.distance.tolist() == [1, 1, 3] and found.row.tolist() == [10, 21, 12]


def test_a_thumbnail_does_not_know_brightness_and_contrast() -> None:
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    small = thumbnails(images)
    assert small.shape == (3, 32 * 32)
    torch.testing.assert_close(thumbnails(images * 0.4 + 0.3), small, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(small[0], small[1], atol=0.5)
    assert thumbnails(torch.full((1, 3, 64, 64), 0.5)).abs().max() == 0, "a blank image divides by no 0"


# --- nearer than held-out images are --------------------------------------------------------------------------------


def test_closeness_is_the_mann_whitney_test_with_ties() -> None:
    rng = np.random.default_rng(0)
    generated, held_out = rng.integers(0, 9, 40).astype(float), rng.integers(2, 11, 25).astype(float)
    found = closeness(generated, held_out, samples=200)
    expected = mannwhitneyu(held_out, generated, alternative="greater", use_continuity=False, method="asymptotic")
    assert found["auc"] == pytest.approx(expected.statistic / (40 * 25)) and found["p"] == pytest.approx(
        expected.pvalue
    )
    assert found["z"] > 0 and found["auc_ci"][0] < found["auc"] < found["auc_ci"][1]  # type: ignore[index]
    in_pairs = closeness(
        generated, held_out[np.repeat(np.arange(12), 2)], samples=200, groups=np.repeat(np.arange(12), 2)
    )
    alone = closeness(generated, held_out[np.repeat(np.arange(12), 2)], samples=200)
    width = [found["auc_ci"][1] - found["auc_ci"][0] for found in (in_pairs, alone)]  # type: ignore[index]
    assert in_pairs["auc"] == alone["auc"] and width[0] > 1.1 * width[1], "two images of a patient are one observation"
    turned = closeness(held_out, generated, samples=10)
    assert turned["auc"] == pytest.approx(1 - found["auc"]) and turned["z"] == pytest.approx(-found["z"])


def test_closeness_of_equal_distances_is_none() -> None:
    found = closeness(np.ones(4), np.ones(3), samples=10)
    assert (found["auc"], found["z"], found["p"], found["auc_ci"]) == (0.5, 0, 0.5, (0.5, 0.5))


# --- more than chance -----------------------------------------------------------------------------------------------


def found_copies(generated: Tensor, training: Tensor, held_out: Tensor, samples: int = 200):  # type: ignore[no-untyped-def]
    sides = nearest(generated, [training]), nearest(generated, [held_out])
    return copies(*sides, len(training), len(held_out), samples), suspicion(*sides)


def test_copies_are_found_and_come_first() -> None:
    training, held_out = cloud(60, 0), cloud(40, 1)
    generated = torch.cat([cloud(40, 2), training[:40]])
    found, ratio = found_copies(generated, training, held_out)
    assert set(np.argsort(ratio, kind="stable")[:40]) == set(range(40, 80)) and (ratio[40:] == 0).all()
    assert found["chance"] == 0.6 and found["share"] > 0.75 and found["p"] < 1e-4
    assert found["copies_ci"][0] < 0.5 < found["copies_ci"][1]  # type: ignore[index]  # one half are copies
    turned, ratio = found_copies(generated, held_out, training)
    assert turned["copies"] == 0 and turned["p"] > 0.99 and np.isinf(ratio[40:]).all()
    assert turned["share"] == pytest.approx(1 - found["share"])


def test_without_copies_the_share_is_chance_and_p_is_fair() -> None:
    """Of 300 simulations with 20 training and 50 held-out images, about 5 % have p below .05, and not more."""
    shares, values = [], []
    for seed in range(300):
        found, _ = found_copies(cloud(25, 3 * seed), cloud(20, 3 * seed + 1), cloud(50, 3 * seed + 2), samples=1)
        shares.append(found["share"])
        values.append(found["p"])
    assert np.mean(shares) == pytest.approx(20 / 70, abs=0.02)
    assert 0.01 < np.mean(np.array(values) < 0.05) <= 0.075


def of_patients(count: int, images: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Images of one patient are alike."""
    own = cloud(count, seed).repeat_interleave(images, dim=0)
    return own + 0.6 * cloud(count * images, seed + 5000), np.repeat(np.arange(count), images)


@pytest.mark.parametrize("images", [(4, 4), (8, 1), (3, 1), (1, 3)])
def test_p_is_fair_where_patients_have_several_images(images: tuple[int, int]) -> None:
    """Also where those of one split have more; copies are found all the same."""
    values, shares = [], []
    for seed in range(60):
        (training, ours), (held_out, theirs) = (
            of_patients(60, k, 200 * seed + place) for place, k in enumerate(images)
        )
        for generated in (cloud(40, 200 * seed + 7), training[:: images[0]][:40]):
            near = nearest(generated, [training]), nearest(generated, [held_out])
            found = copies(*near, len(training), len(held_out), samples=0, patients=(ours, theirs))
            values.append(found["p"])
            shares.append(found["share"])
    assert np.mean(np.array(values[::2]) < 0.05) <= 0.1, "without copies"
    assert max(values[1::2]) < 0.01 and min(shares[1::2]) == 1, "copies"


def test_p_is_a_number_where_every_patient_is_the_nearest_of_some_image() -> None:
    training = Nearest(np.array([0.0, 0, 0, 2, 2]), np.array([0, 1, 2, 0, 0]))
    held_out = Nearest(np.array([1.0, 1, 1, 1, 1]), np.array([0, 0, 0, 0, 1]))
    assert 0 <= copies(training, held_out, 3, 1)["p"] <= 1


def test_a_model_that_draws_one_image_again_and_again_is_one_observation() -> None:
    """A binomial test over its images would be wrong as often as the training image is the nearest: here in one
    half."""
    training, held_out = cloud(30, 0), cloud(30, 1)
    one = next(image for image in cloud(50, 2) if found_copies(image[None], training, held_out)[0]["share"] == 1)
    found, _ = found_copies(one.expand(40, -1), training, held_out)
    assert (found["share"], found["neighbours"], found["copies_ci"]) == (1, 1, None) and found["p"] == pytest.approx(
        0.5
    )
    assert binomtest(40, 40, 0.5, alternative="greater").pvalue < 1e-9


def test_all_training_images_show_copies_that_an_equal_number_of_them_hides() -> None:
    training, held_out = cloud(2000, 0), cloud(100, 1)
    generated = training[torch.randperm(2000, generator=torch.Generator().manual_seed(3))[:100]]
    assert found_copies(generated, training, held_out)[0]["p"] < 0.01
    subset = training[torch.randperm(2000, generator=torch.Generator().manual_seed(4))[:100]]
    assert found_copies(generated, subset, held_out)[0]["p"] > 0.05


def test_an_image_as_near_to_both_counts_one_half_and_is_not_suspicious() -> None:
    both = Nearest(np.zeros(2), np.arange(2))
    found = copies(both, both, 5, 5, 10)
    assert (found["share"], found["copies"], found["p"]) == (0.5, 0, 1) and suspicion(both, both).tolist() == [1, 1]


# --- near copies ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 90])
def test_closeness_in_the_crowd_is_that_of_a_loop(block: int) -> None:
    images, others = cloud(20, 0), cloud(90, 1)
    others[25] = images[5]
    blocks = others.split(block)
    found = closeness_in_crowd(images, blocks, nearest(images, blocks))
    for image, value in zip(images.double(), found, strict=True):
        apart = sorted(float((image - other).norm()) for other in others.double())
        assert value == pytest.approx(apart[0] / np.mean(apart[:50]), rel=1e-5)
    assert found[5] == 0 and np.array_equal(closeness_in_crowd(images, blocks, nearest(images, blocks)), found)
    few = nearest(images, [others[:3]])
    assert closeness_in_crowd(images, [others[:3]], few).max() <= 1, "fewer than 50 are the crowd"


def test_near_copies_are_counted_by_a_third_and_tested_exactly() -> None:
    generated, held_out = np.array([0.0, 0.33, 0.34, 1.0, 0.2]), np.array([0.3, 0.9, 0.5])
    found = near_copies(generated, held_out)
    assert (found["near"], found["near_held_out"], found["near_tested"]) == (3, 1, 3)
    assert found["near_p"] == pytest.approx(fisher_exact([[3, 2], [1, 2]], alternative="greater").pvalue)
    assert near_copies(held_out + 1, held_out + 1)["near_p"] == 1


@pytest.mark.parametrize("copied", [range(20), [3] * 20], ids=["twenty images", "one image"])
def test_copies_that_chance_hides_are_near_copies(copied: list[int]) -> None:
    """800 training and 100 held-out images, as of 80, 10 and 10 %: nearly every image is nearest to a training image."""
    training, held_out = cloud(800, 0, 40), cloud(100, 1, 40)
    images = torch.cat([training[list(copied)] + 0.01, cloud(180, 2, 40)])
    near = nearest(images, [training]), nearest(images, [held_out])
    assert copies(*near, 800, 100)["p"] > 0.05
    apart = nearest(held_out, [training])
    found = near_copies(
        closeness_in_crowd(images, [training], near[0]), closeness_in_crowd(held_out, [training], apart)
    )
    assert found["near"] == 20 and found["near_held_out"] == 0 and found["near_p"] < 0.001

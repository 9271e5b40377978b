"""KID, precision, recall, density and coverage: against loops over images, torchmetrics, and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from distill.metrics.bootstrap import resample_counts
from distill.metrics.fidelity import FIDELITY, MANIFOLD, Manifolds, fidelity_resamples, kernel_distance
from distill.metrics.quality import _GivenFeatures, frechet_distance


def points(seed: int, rows: int, width: int = 6, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) * scale + shift


def copies(x: torch.Tensor, counts: np.ndarray) -> torch.Tensor:
    return x[torch.from_numpy(np.repeat(np.arange(len(x)), counts.astype(int)))]


def draws(rows: int, seed: int, samples: int = 3) -> np.ndarray:
    return next(resample_counts(rows, samples, seed))


# --- KID ------------------------------------------------------------------------------------------------------------


def test_kid_is_that_of_torchmetrics_with_all_images_in_one_subset() -> None:
    real, generated = points(0, 50), points(1, 50, shift=0.5)
    metric = KernelInceptionDistance(feature=_GivenFeatures(6), subsets=1, subset_size=50).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(generated, real=False)
    assert kernel_distance(real, generated)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-9)
    assert kernel_distance(generated, real)[0] == pytest.approx(kernel_distance(real, generated)[0], rel=1e-12)


@pytest.mark.parametrize(("rows", "width"), [(60, 6), (40, 64)])
def test_fid_and_kid_are_those_of_torch_fidelity(rows: int, width: int) -> None:
    """On the same features, also with fewer images than dimensions, where covariances are singular."""
    fid = pytest.importorskip("torch_fidelity.metric_fid", exc_type=ImportError)
    kid = pytest.importorskip("torch_fidelity.metric_kid", exc_type=ImportError)
    real, generated = points(0, rows, width) + 3, points(1, rows, width, shift=3.3, scale=1.2)
    sides = [fid.fid_features_to_statistics(side) for side in (real, generated)]
    expected = fid.fid_statistics_to_metric(*sides, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-3)
    found = kid.kid_features_to_metric(
        real, generated, kid_subsets=1, kid_subset_size=rows, verbose=False, rng_seed=0, kid_kernel="poly",
        kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0,
    )["kernel_inception_distance_mean"]  # fmt: skip
    assert kernel_distance(real, generated)[0] == pytest.approx(found, rel=1e-3)


def test_kid_of_a_resample_is_over_pairs_of_different_images() -> None:
    real, generated = points(0, 7), points(1, 9, shift=0.5)
    w, v = draws(7, 0), draws(9, 1)
    found = kernel_distance(real, generated, w, v)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x @ y / 6 + 1) ** 3)

    def within(x: torch.Tensor, counts: np.ndarray) -> float:
        drawn = np.repeat(np.arange(len(x)), counts.astype(int))
        return float(np.mean([kernel(x[i], x[j]) for i in drawn for j in drawn if i != j]))

    for sample in range(3):
        pairs = [kernel(a, b) for a in copies(real, w[sample]) for b in copies(generated, v[sample])]
        expected = within(real, w[sample]) + within(generated, v[sample]) - 2 * np.mean(pairs)
        assert found[sample] == pytest.approx(expected, rel=1e-9)


def test_kid_has_no_bias_at_few_images() -> None:
    """Of equal distributions its mean is 0 at 5 images, where the biased estimate is far above."""
    values = np.array([kernel_distance(points(2 * s, 5), points(2 * s + 1, 5))[0] for s in range(400)])
    assert abs(values.mean()) < 3 * values.std() / 20 and (values < 0).any()
    resampled = kernel_distance(points(0, 30), points(1, 30), draws(30, 0, 2000), draws(30, 1, 2000))
    assert resampled.mean() == pytest.approx(kernel_distance(points(0, 30), points(1, 30))[0], abs=0.05)


# --- precision, recall, density, coverage ------------------------------------------------------------------------------


def slow_manifold(
    real: torch.Tensor, generated: torch.Tensor, k: int, w: np.ndarray, v: np.ndarray
) -> tuple[float, float, float, float]:
    """Loops over the drawn images, as the papers define it; the copies of an image are no neighbours of it."""

    def distance(x: torch.Tensor, y: torch.Tensor) -> float:
        return float((x - y).norm())

    def radius(points: torch.Tensor, rows: list[int], i: int) -> float:
        return sorted(distance(points[i], points[j]) for j in rows if j != i)[k - 1]

    rows, columns = (np.repeat(np.arange(len(c)), c.astype(int)).tolist() for c in (w, v))
    of_real = {i: radius(real, rows, i) for i in rows}
    of_generated = {j: radius(generated, columns, j) for j in columns}
    apart = {(i, j): distance(real[i], generated[j]) for i in rows for j in columns}
    balls = [sum(apart[i, j] <= of_real[i] for i in rows) for j in columns]
    return (
        float(np.mean([n > 0 for n in balls])),
        float(np.mean([any(apart[i, j] <= of_generated[j] for j in columns) for i in rows])),
        float(np.mean(balls)) / k,
        float(np.mean([any(apart[i, j] <= of_real[i] for j in columns) for i in rows])),
    )


@pytest.mark.parametrize("k", [1, 3])
def test_manifolds_are_those_of_loops_over_images(k: int) -> None:
    real, generated = points(0, 20, width=3), points(1, 14, width=3, shift=1.5, scale=0.8)
    manifolds = Manifolds(real, generated, k)
    ones = np.ones(20), np.ones(14)
    assert manifolds.values() == pytest.approx(slow_manifold(real, generated, k, *ones), abs=1e-9)
    assert len({0.0, 1.0, *manifolds.values().round(6)}) == 6, "the example must not be a trivial one"
    for w, v in zip(draws(20, 0), draws(14, 1), strict=True):
        assert manifolds.values(w, v) == pytest.approx(slow_manifold(real, generated, k, w, v), abs=1e-9)


def test_manifolds_of_known_sets() -> None:
    real = points(0, 200)
    assert Manifolds(real, real, 5).values()[[0, 1, 3]].tolist() == [1, 1, 1]
    # Each image lies in its own ball, and in those of about k others.
    assert Manifolds(real, real, 5).values()[2] == pytest.approx(6 / 5, abs=1e-6)
    assert Manifolds(real, points(1, 200), 5).values()[2] == pytest.approx(1, abs=0.1)
    assert Manifolds(real, points(1, 200, shift=50), 5).values().tolist() == [0, 0, 0, 0]
    one_mode = Manifolds(torch.cat([real[:100], real[100:] + 50]), points(1, 100, scale=0.5), 5).values()
    assert one_mode[0] == 1 and one_mode[3] <= 0.5 and one_mode[1] <= 0.5, "a mode is missing"
    swapped = Manifolds(points(1, 60, scale=0.5), real, 5).values()
    assert Manifolds(real, points(1, 60, scale=0.5), 5).values()[:2].tolist() == swapped[[1, 0]].tolist()


def test_copies_of_one_image_are_at_distance_zero() -> None:
    real = (points(0, 4, width=2048) + 100).float().repeat(8, 1)
    assert Manifolds(real, real.flip(0), 5).values()[[0, 1, 3]].tolist() == [1, 1, 1]


def test_an_outlier_of_the_real_images_does_not_raise_density() -> None:
    """Naeem et al. 2020: precision is fooled by the ball around an outlier, density is not."""
    real, far = points(0, 50), torch.cat([points(0, 49), points(3, 1, shift=40)])
    fakes = points(2, 30, shift=30, scale=0.1)
    assert Manifolds(real, fakes, 5).values()[0] == 0 and Manifolds(far, fakes, 5).values()[0] == 1
    assert Manifolds(far, fakes, 5).values()[2] < 0.25


# --- intervals --------------------------------------------------------------------------------------------------------


def test_resamples_lie_around_the_value_and_within_the_range() -> None:
    real, generated = points(0, 60), points(1, 60, shift=0.2)
    counts = np.concatenate(list(resample_counts(60, 200, 0)))
    found = fidelity_resamples(real, generated, 5, counts, counts[::-1])
    assert ("fid", *found) == FIDELITY
    for name, (value, resampled) in found.items():
        low, high = np.quantile(resampled, [0.025, 0.975])
        assert low < value <= high and len(resampled) == 200
        assert high <= 1 or name in ("kid", "density")
    assert list(fidelity_resamples(real[:5], generated, 5, counts[:, :5], counts)) == ["kid"], "no fifth neighbour"
    with pytest.raises(ValueError, match="more than 5 images a side are needed; got 5 real"):
        Manifolds(real[:5], generated, 5)


@pytest.mark.slow
def test_intervals_are_at_least_as_wide_as_the_spread_of_new_images() -> None:
    drawn = [fidelity_resamples(points(2 * s, 80), points(2 * s + 1, 80, shift=0.3), 5, *[draws(80, 0, 2)] * 2)
             for s in range(60)]  # fmt: skip
    counts, others = (np.concatenate(list(resample_counts(80, 200, seed))) for seed in (3, 4))
    one = [fidelity_resamples(points(2 * s, 80), points(2 * s + 1, 80, shift=0.3), 5, counts, others)
           for s in range(8)]  # fmt: skip
    for name in ("kid", *MANIFOLD):
        spread = np.std([found[name][0] for found in drawn])
        claimed = np.mean([found[name][1].std() for found in one])
        assert 0.9 < claimed / spread < 2, name

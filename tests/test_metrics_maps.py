from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy.ndimage import gaussian_filter
from sklearn.mixture import GaussianMixture

from distill.metrics import (
    gaussian_smooth,
    majority_filter,
    min_max,
    mixture_masks,
    mixture_threshold,
    otsu_threshold,
    refine_by_self_attention,
    remove_orphans,
)

some_maps = arrays(
    np.float64, array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.integers(-40, 40).map(lambda k: k / 10)
)
# Multiples of 1/256 have ties, fall on the edges of bins, and stay exact under the scale and shift below.
tied_maps = arrays(np.float64, (3, 4, 5), elements=st.integers(0, 256).map(lambda k: k / 256))
some_masks = arrays(np.bool_, array_shapes(min_dims=3, max_dims=3, max_side=7))


def blobs(count: int, size: int, noise: float) -> torch.Tensor:
    """(count, size, size) float32: a bright blob over smooth and fine noise, as attention maps look."""
    generator = torch.Generator().manual_seed(0)
    place = torch.linspace(0, 1, size)
    result = []
    for _ in range(count):
        x, y, wide, high = torch.rand(4, generator=generator).tolist()
        blob = torch.exp(-(((place - x) / (0.1 + 0.2 * wide)) ** 2)) * torch.exp(
            -(((place[:, None] - y) / (0.1 + 0.2 * high)) ** 2)
        )
        coarse = torch.randn(1, 1, 8, 8, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")[0, 0]
        result.append(0.02 * blob + noise * (smooth + 0.1 * torch.randn(size, size, generator=generator)))
    return torch.stack(result)


@settings(max_examples=30)
@given(maps=some_maps)
def test_min_max(maps: np.ndarray) -> None:
    scaled = min_max(torch.from_numpy(maps)).numpy()
    for map_, own in zip(maps, scaled, strict=True):
        if map_.min() == map_.max():
            assert (own == 0).all()
        else:
            np.testing.assert_allclose(own, (map_ - map_.min()) / (map_.max() - map_.min()), rtol=1e-12)
            assert own.min() == 0 and own.max() == 1


@settings(max_examples=40)
@given(maps=some_maps, sigma=st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0, 2.5, 4.0]))
def test_gaussian_smooth_equals_scipy(maps: np.ndarray, sigma: float) -> None:
    """Sides of 1 to 7 pixels, so that the mirrored border is met more than once."""
    expected = np.stack([gaussian_filter(map_, sigma, truncate=4.0) for map_ in maps])
    np.testing.assert_allclose(gaussian_smooth(torch.from_numpy(maps), sigma).numpy(), expected, atol=1e-11)
    single = torch.from_numpy(maps).float()
    assert gaussian_smooth(single, sigma).dtype == torch.float32
    np.testing.assert_allclose(gaussian_smooth(single, sigma).numpy(), expected, atol=1e-4)


def brute_force_otsu(map_: np.ndarray) -> float:
    low, high = map_.min(), map_.max()
    if low == high:
        return float(low)
    bins = np.minimum((map_.ravel() - low) / (high - low) * 256, 255).astype(int)
    best, best_variance = 0, -1.0
    for split in range(255):
        lower, upper = bins[bins <= split], bins[bins > split]
        if len(lower) and len(upper):
            variance = len(lower) * len(upper) * (lower.mean() - upper.mean()) ** 2
            if variance > best_variance * (1 + 1e-9):
                best, best_variance = split, variance
    return float(low + (high - low) * (best + 0.5) / 256)


@settings(max_examples=12)
@given(maps=tied_maps, scale=st.sampled_from([0.25, 1.0, 512.0]), shift=st.integers(-4, 4))
def test_otsu_equals_the_best_of_all_splits(maps: np.ndarray, scale: float, shift: int) -> None:
    maps = scale * (maps + shift)
    expected = [brute_force_otsu(map_) for map_ in maps]
    np.testing.assert_allclose(otsu_threshold(torch.from_numpy(maps)).numpy(), expected, rtol=1e-9)


def test_otsu_of_a_large_map() -> None:
    """The histogram of np.histogram, split by the variance within the classes instead of between them."""
    maps = blobs(4, 96, noise=0.003).double()
    for map_, threshold in zip(maps.numpy(), otsu_threshold(maps).tolist(), strict=True):
        counts, edges = np.histogram(map_, bins=256)
        centres = (edges[:-1] + edges[1:]) / 2
        within = []
        for split in range(1, 256):
            parts = ((counts[:split], centres[:split]), (counts[split:], centres[split:]))
            means = [np.average(value, weights=count) for count, value in parts]
            within.append(sum((c * (v - m) ** 2).sum() for (c, v), m in zip(parts, means, strict=True)))
        assert threshold == pytest.approx(centres[int(np.argmin(within))])


def best_split(pixels: np.ndarray) -> float:
    """The optimum of k-means with two centres."""
    ascending = np.sort(pixels)
    lower, sums = np.arange(1, len(pixels)), np.cumsum(ascending)
    upper = len(pixels) - lower
    between = lower * upper * (sums[:-1] / lower - (sums[-1] - sums[:-1]) / upper) ** 2
    return float(ascending[between.argmax() : between.argmax() + 2].mean())


@pytest.mark.parametrize("noise", [0.0005, 0.003, 0.02])
def test_mixture_equals_sklearn(noise: float) -> None:
    """Closely from the same start; from its own random starts, at least one of three comes near."""
    maps = min_max(blobs(4, 64, noise).double())
    for pixels, found in zip(maps.flatten(1).numpy(), mixture_threshold(maps).tolist(), strict=True):
        split = best_split(pixels)
        parts = pixels[pixels <= split], pixels[pixels > split]
        same = GaussianMixture(
            2,
            weights_init=[len(part) / len(pixels) for part in parts],
            means_init=[[part.mean()] for part in parts],
            precisions_init=[[[1 / (part.var() + 1e-6)]] for part in parts],
        )
        assert found == pytest.approx(same.fit(pixels[:, None]).means_.mean(), abs=1e-3)
        own = [GaussianMixture(2, random_state=seed).fit(pixels[:, None]).means_.mean() for seed in range(3)]
        assert min(abs(found - threshold) for threshold in own) < 1e-2


def test_mixture_of_two_clear_classes_lies_between_their_means() -> None:
    generator = torch.Generator().manual_seed(0)
    bright = torch.rand(3, 40, 40, generator=generator) < torch.tensor([0.05, 0.3, 0.7])[:, None, None]
    maps = 3.0 + 5.0 * bright + 0.1 * torch.randn(3, 40, 40, generator=generator)
    np.testing.assert_allclose(mixture_threshold(maps).numpy(), 5.5, atol=0.02)
    assert torch.equal(mixture_masks(maps), bright)


def test_mixture_depends_on_nothing_but_the_map() -> None:
    maps = torch.cat([blobs(3, 32, 0.003), blobs(1, 32, 0.02), torch.full((1, 32, 32), 0.1)])
    together = mixture_threshold(maps)
    assert together.dtype == torch.float64
    assert torch.equal(together, torch.cat([mixture_threshold(map_[None]) for map_ in maps]))
    np.testing.assert_allclose(mixture_threshold(4 * maps).numpy(), 4 * together.numpy(), rtol=1e-12)
    np.testing.assert_allclose(mixture_threshold(-maps[:4]).numpy(), -together[:4].numpy(), atol=2e-4)
    assert float(together[4]) == pytest.approx(0.1) and not mixture_masks(maps)[4].any()


@pytest.mark.parametrize("threshold", [otsu_threshold, mixture_threshold])
def test_thresholds_of_constant_and_of_unusable_maps(threshold: type) -> None:
    assert threshold(torch.tensor([[[0.3, 0.3]], [[0.0, 0.0]]], dtype=torch.float64)).tolist() == [0.3, 0.0]
    assert threshold(torch.zeros(0, 4, 4)).shape == (0,)
    with pytest.raises(ValueError, match=r"1 of 2 maps contain NaN or inf \(the first is number 1\)"):
        threshold(torch.tensor([[[0.0, 1.0]], [[0.0, float("nan")]]]))
    with pytest.raises(ValueError, match=r"\(N, H, W\) float; got \(4, 4\) torch\.float32"):
        threshold(torch.zeros(4, 4))


@settings(max_examples=50)
@given(masks=some_masks)
def test_majority_filter_equals_brute_force(masks: np.ndarray) -> None:
    expected = masks.copy()
    for index in np.ndindex(masks.shape):
        number, row, column = index
        if 0 < row < masks.shape[1] - 1 and 0 < column < masks.shape[2] - 1:
            expected[index] = masks[number, row - 1 : row + 2, column - 1 : column + 2].sum() >= 5
    given_masks = torch.from_numpy(masks.copy())
    np.testing.assert_array_equal(majority_filter(given_masks).numpy(), expected)
    assert (given_masks.numpy() == masks).all()


def model(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    found = []
    while left:
        component, border = set(), [left.pop()]
        while border:
            row, column = border.pop()
            component.add((row, column))
            near = {(row + i, column + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= near
            border += near
        found.append(component)
    return found


@settings(max_examples=60)
@given(masks=some_masks, min_share=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_remove_orphans_equals_brute_force(masks: np.ndarray, min_share: float) -> None:
    expected = np.zeros_like(masks)
    for number, mask in enumerate(masks):
        found = model(mask)
        largest = max(map(len, found), default=0)
        for component in found:
            if len(component) >= min_share * largest:
                for place in component:
                    expected[(number, *place)] = True
    result = remove_orphans(torch.from_numpy(masks), min_share)
    assert result.dtype == torch.bool
    np.testing.assert_array_equal(result.numpy(), expected)


def test_self_attention_averages_over_the_places_that_a_place_attends_to() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 6, generator=generator, dtype=torch.float64)
    attention = torch.rand(2, 6, 6, generator=generator, dtype=torch.float64).softmax(dim=2)
    once = torch.empty_like(maps)
    for image, channel, place in np.ndindex(2, 3, 6):
        once[image, channel, place] = sum(attention[image, place, k] * maps[image, channel, k] for k in range(6))
    torch.testing.assert_close(refine_by_self_attention(maps, attention), once)
    torch.testing.assert_close(
        refine_by_self_attention(maps, attention, power=3),
        (torch.linalg.matrix_power(attention, 3) @ maps.transpose(1, 2)).transpose(1, 2),
    )
    assert torch.equal(refine_by_self_attention(maps, attention, power=0), maps)
    constant = torch.full((2, 1, 6), 0.3, dtype=torch.float64)
    torch.testing.assert_close(refine_by_self_attention(constant, attention, power=4), constant)
    half = refine_by_self_attention(maps.float(), attention.half())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, once.float(), atol=2e-3, rtol=0)


def test_errors_name_what_is_wrong() -> None:
    maps, attention = torch.rand(2, 1, 4), torch.full((2, 4, 4), 0.25)
    with pytest.raises(ValueError, match=r"\(2, 1, 4\) and \(1, 4, 4\)"):
        refine_by_self_attention(maps, attention[:1])
    with pytest.raises(ValueError, match="must sum to 1; got sums from 2 to 2"):
        refine_by_self_attention(maps, 2 * attention)
    with pytest.raises(ValueError, match="power must be at least 0; got -1"):
        refine_by_self_attention(maps, attention, power=-1)
    with pytest.raises(ValueError, match="sigma must be at least 0 pixels; got -1"):
        gaussian_smooth(maps, -1)
    with pytest.raises(ValueError, match="min_share must be in"):
        remove_orphans(torch.ones(1, 2, 2, dtype=torch.bool), 1.5)

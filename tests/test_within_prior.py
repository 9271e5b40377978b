"""AUC within the finding's prior: against loops over pixels, and .5 for every map that does not look at the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.config import FullEvaluation
from distill.evaluation.image_adds import MAP_TOKENS, packed_pairs
from distill.evaluation.protocols import Query
from distill.evaluation.within_prior import STRATA, areas_within, strata_of, within_priors
from distill.metrics import PixelAUROC


def slow(values: torch.Tensor, mask: torch.Tensor, strata: torch.Tensor) -> float:
    """A loop over pairs of pixels, one inside and one outside."""
    won = pairs = 0.0
    for stratum in strata.unique().tolist():
        own = strata == stratum
        inside, outside = values[own & mask].tolist(), values[own & ~mask].tolist()
        weight = 1 / (int(own.sum()) + 1)
        won += weight * sum((a > b) + (a == b) / 2 for a in inside for b in outside)
        pairs += weight * len(inside) * len(outside)
    return won / pairs if pairs else float("nan")


@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 5))
def test_areas_are_those_of_loops_over_pixels(seed: int, values: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.cat(
        [torch.randint(values, (2, 60), generator=generator).float(), torch.rand(2, 60, generator=generator)]
    )
    mask, strata = torch.rand(60, generator=generator) < 0.3, torch.randint(count, (60,), generator=generator)
    expected = [slow(one, mask, strata) for one in maps]
    assert areas_within(maps, mask, strata).numpy() == pytest.approx(np.array(expected), abs=1e-12, nan_ok=True)


def test_with_one_stratum_it_is_the_area() -> None:
    maps, mask = torch.rand(3, 8, 8), torch.rand(8, 8) < 0.4
    found = areas_within(maps.flatten(1), mask.flatten(), torch.zeros(64, dtype=torch.int64))
    assert found.numpy() == pytest.approx(PixelAUROC().pair_scores(maps, mask.expand(3, -1, -1)).numpy(), abs=1e-9)


@given(st.integers(0, 10**6), st.integers(2, 300))
def test_a_map_that_is_any_function_of_the_stratum_has_one_half(seed: int, levels: int) -> None:
    """Increasing, decreasing or neither; and of a prior with fewer levels than strata, any function of the prior."""
    generator = torch.Generator().manual_seed(seed)
    prior = torch.randint(levels, (40 * STRATA,), generator=generator) / levels
    mask = torch.rand(len(prior), generator=generator) < 0.1 + 0.8 * prior
    strata = strata_of(prior)
    table = torch.rand(STRATA, generator=generator)
    assert areas_within(table[strata][None], mask, strata).tolist() == pytest.approx([0.5], abs=1e-12)
    if levels <= 20:
        assert len(strata.unique()) == len(prior.unique()), "each level has a stratum of its own"
        monotone = torch.stack([prior, prior**3, -prior, (prior - 0.5).abs()])
        assert areas_within(monotone, mask, strata).tolist() == pytest.approx([0.5] * 4, abs=1e-12)
        assert PixelAUROC().pair_scores(prior[None, None], mask[None, None])[0] > 0.6, "it is no trivial prior"


def test_strata_are_of_about_equally_many_pixels_and_keep_equal_priors_together() -> None:
    prior = torch.rand(128 * 128, generator=torch.Generator().manual_seed(0))
    assert torch.bincount(strata_of(prior)).tolist() == [64] * STRATA
    order = prior.argsort()
    assert (strata_of(prior)[order].diff() >= 0).all(), "in the order of the prior"
    half = torch.where(prior < 0.5, 0.0, prior)
    assert len(strata_of(half)[half == 0].unique()) == 1
    assert torch.equal(strata_of(prior**2), strata_of(prior)), "only the order of priors matters"
    assert int(strata_of(prior[:256]).max()) == 15, "small images have fewer"
    assert strata_of(prior[:3]).tolist() == [0, 0, 0] and strata_of(torch.zeros(99)).unique().numel() == 1


def blobs(count: int, seed: int, side: int = 32) -> torch.Tensor:
    """(count, P) masks: discs near the upper left."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    centres = 10 + 4 * torch.randn(count, 2, generator=generator)
    near = (y - centres[:, :1, None]) ** 2 + (x - centres[:, 1:, None]) ** 2 < 25
    return near.flatten(1)


def test_blind_maps_have_one_half_and_maps_of_the_image_much_more() -> None:
    masks, training = blobs(200, 1), blobs(600, 2).float()
    prior = training.mean(dim=0)
    strata, kept = strata_of(prior), masks.any(dim=1)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    corner = -torch.hypot(y - 8, x - 12).flatten()
    noise = torch.rand(1024, generator=torch.Generator().manual_seed(3))
    blind = torch.stack([prior, corner, noise, blobs(300, 4).float().mean(dim=0), prior + 0.2 * noise])
    found = torch.stack([areas_within(blind, mask, strata) for mask in masks[kept]]).nanmean(dim=0)
    plain = PixelAUROC().pair_scores(blind[0].expand(200, 1, -1), masks[:, None]).nanmean()
    assert plain > 0.85, "the prior alone scores high"
    assert (found - 0.5).abs().max() < 0.05
    seeing = masks.float() + 0.5 * torch.randn(masks.shape, generator=torch.Generator().manual_seed(5))
    scores = [areas_within(one[None], mask, strata)[0] for one, mask in zip(seeing[kept], masks[kept], strict=True)]
    assert torch.stack(scores).nanmean() > 0.9
    assert areas_within(masks[:1].float(), masks[0], strata).tolist() == [1.0]


def test_what_has_no_area_within_the_prior_is_none() -> None:
    config = FullEvaluation()
    query = Query(0, "", (0, 1), ((1,), (1,)), torch.zeros(1))
    masks = blobs(2, 0).unflatten(1, (32, 32))
    rows = [
        {"finding": finding} | packed
        for finding, packed in enumerate(packed_pairs(query, torch.rand(6, 8, 8), masks, config))
    ]
    priors = {"edema": blobs(50, 1).float().mean(dim=0).unflatten(0, (32, 32))}
    found = within_priors(rows, ["edema", "mass"], priors, config, torch.device("cpu"))
    assert all(0 <= (value or -1) <= 1 for value in found[0].values()), "maps are resized to the mask"
    assert found[1] == dict.fromkeys(MAP_TOKENS), "no training image has the finding"
    assert within_priors([{"finding": 0, "maps": None}], ["edema"], priors, config, torch.device("cpu")) == [
        dict.fromkeys(MAP_TOKENS)
    ]
    everywhere = torch.zeros(1024, dtype=torch.bool)
    assert areas_within(torch.rand(1, 1024), everywhere, strata_of(torch.rand(1024))).isnan().all()

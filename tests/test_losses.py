"""Losses: what is zero, what is invariant, and agreement with torch.distributions and diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence

from distill import losses
from distill.losses import (
    GROUPS,
    attention_mass,
    attention_mass_loss,
    attention_regularization,
    denoising_loss,
    feature_loss,
    min_snr_weights,
    place_attention_kl,
    region_pixel_loss,
    region_token_loss,
    tail_leak,
    tail_mass,
    token_attention_kl,
)

BATCH, PLACES, TOKENS = 3, 6, 7
SEEDS = st.integers(0, 2**32 - 1)
few = settings(max_examples=25)


def maps(seed: int, sharpness: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """(batch, places, tokens) probabilities; at a sharpness of 100 most of them underflow to 0 in float32."""
    scores = sharpness * torch.randn(BATCH, PLACES, TOKENS, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return scores.softmax(dim=-1)


def words() -> torch.Tensor:
    return (torch.arange(TOKENS) % 3 != 0).expand(BATCH, TOKENS)


def groups() -> torch.Tensor:
    """BOS, words, EOS, padding, of another length in each row."""
    codes = torch.full((BATCH, TOKENS), 3)
    for row, eos in enumerate((2, 4, 6)):
        codes[row, :eos], codes[row, eos], codes[row, 0] = 1, 2, 0
    return codes


@given(SEEDS, st.sampled_from([0.0, 1.0, 10.0, 100.0]))
@few
def test_equal_maps_cost_nothing(seed: int, sharpness: float) -> None:
    p = maps(seed, sharpness, torch.float32)
    assert token_attention_kl(p, p.clone()) == 0
    assert place_attention_kl(p, p.clone(), words()) == 0
    assert attention_mass_loss(p, p.clone(), groups()) == 0


@given(SEEDS, st.sampled_from([0.1, 1.0, 10.0]))
@few
def test_different_maps_cost_something(seed: int, sharpness: float) -> None:
    p, q = maps(seed, sharpness), maps(seed + 1, sharpness)
    assert token_attention_kl(p, q) > 0
    assert place_attention_kl(p, q, words()) > 0
    assert attention_mass_loss(p, q, groups()) > 0


@given(SEEDS, st.sampled_from([0.5, 2.0]))
@few
def test_kl_terms_are_those_of_torch_distributions(seed: int, sharpness: float) -> None:
    p, q = maps(seed, sharpness), maps(seed + 1, sharpness)
    token = kl_divergence(Categorical(p), Categorical(q))  # (batch, places)
    torch.testing.assert_close(token_attention_kl(p, q), token.mean())
    place = kl_divergence(Categorical(p.transpose(1, 2)), Categorical(q.transpose(1, 2)))  # (batch, tokens)
    torch.testing.assert_close(place_attention_kl(p, q, words()), place[words()].mean())


@given(SEEDS)
@few
def test_token_kl_of_chosen_words_takes_the_rest_as_one_token(seed: int) -> None:
    p, q = maps(seed), maps(seed + 1)
    expected = []
    for k, chosen in enumerate(words()):
        merged = [torch.cat([m[k][:, chosen], m[k][:, ~chosen].sum(dim=1, keepdim=True)], dim=1) for m in (p, q)]
        expected.append(kl_divergence(*(Categorical(m) for m in merged)).mean())
    found = token_attention_kl(p, q, None, words())
    torch.testing.assert_close(found, torch.stack(expected).mean())
    assert found <= token_attention_kl(p, q) + 1e-12, "merging tokens loses information"
    moved = p[:, :, [3, 1, 2, 6, 4, 5, 0]]  # words() are 1, 2, 4 and 5
    assert token_attention_kl(p, moved, None, words()).abs() < 1e-9, "how the others share their part is free"
    assert token_attention_kl(p, q, None, torch.zeros_like(words())).abs() < 1e-9


@given(SEEDS)
@few
def test_place_kl_does_not_see_the_scale_of_a_token(seed: int) -> None:
    p, q = maps(seed), maps(seed + 1)
    scale = torch.rand(BATCH, 1, TOKENS, generator=torch.Generator().manual_seed(seed)).double() + 0.01
    torch.testing.assert_close(place_attention_kl(p, q * scale, words()), place_attention_kl(p, q, words()))
    assert place_attention_kl(p, p * scale, words()).abs() < 1e-12
    assert token_attention_kl(p, p * scale / (p * scale).sum(dim=2, keepdim=True)) > 0


@given(SEEDS, st.sampled_from([1.0, 100.0]))
@few
def test_attention_mass_is_a_share(seed: int, sharpness: float) -> None:
    p = maps(seed, sharpness)
    mass = attention_mass(p, groups())
    assert mass.shape == (BATCH, len(GROUPS))
    torch.testing.assert_close(mass.sum(dim=1), torch.ones(BATCH, dtype=torch.float64))
    for code in range(len(GROUPS)):
        expected = torch.stack(
            [row[:, codes == code].sum(dim=1).mean() for row, codes in zip(p, groups(), strict=True)]
        )
        torch.testing.assert_close(mass[:, code], expected)


def test_attention_mass_loss_by_hand() -> None:
    teacher = torch.tensor([[[0.1, 0.5, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]]])
    student = torch.tensor([[[0.5, 0.1, 0.2, 0.2], [0.3, 0.3, 0.2, 0.2]]])
    codes = torch.tensor([[0, 1, 2, 3]])
    torch.testing.assert_close(attention_mass_loss(teacher, student, codes), torch.tensor(0.2**2 + 0.2**2))


@given(SEEDS, st.lists(st.booleans(), min_size=BATCH, max_size=BATCH))
@few
def test_rows_select_images(seed: int, selected: list[bool]) -> None:
    p, q = maps(seed), maps(seed + 1)
    q.requires_grad_()
    rows = torch.tensor(selected)
    terms = (
        (token_attention_kl(p, q, rows), lambda: token_attention_kl(p[rows], q[rows])),
        (place_attention_kl(p, q, words(), rows), lambda: place_attention_kl(p[rows], q[rows], words()[rows])),
        (attention_mass_loss(p, q, groups(), rows), lambda: attention_mass_loss(p[rows], q[rows], groups()[rows])),
    )
    for value, alone in terms:
        (gradient,) = torch.autograd.grad(value, q)
        assert torch.all(gradient[~rows] == 0)
        if rows.any():
            torch.testing.assert_close(value, alone())
        else:
            assert value == 0


def test_no_word_token_costs_nothing() -> None:
    p, q = maps(0), maps(1).requires_grad_()
    loss = place_attention_kl(p, q, torch.zeros(BATCH, TOKENS, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert q.grad is not None and torch.all(q.grad == 0)


def test_probabilities_of_zero_give_finite_losses_and_gradients() -> None:
    p, q = maps(0, 100.0, torch.float32), maps(1, 100.0, torch.float32)
    assert (p == 0).any() and (q == 0).any()
    q.requires_grad_()
    loss = token_attention_kl(p, q) + place_attention_kl(p, q, words()) + attention_mass_loss(p, q, groups())
    loss.backward()
    assert torch.isfinite(loss)
    assert q.grad is not None and torch.isfinite(q.grad).all()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_follow_the_formula(prediction_type: str, gamma: float) -> None:
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = torch.tensor([0, 10, 250, 600, 999])
    snr = compute_snr(scheduler, timesteps)
    assert (snr > gamma).any() and (snr < gamma).any()
    expected = torch.minimum(snr, torch.full_like(snr, gamma)) / (snr + 1 if prediction_type == "v_prediction" else snr)
    weights = min_snr_weights(scheduler.alphas_cumprod, timesteps, gamma, prediction_type)
    torch.testing.assert_close(weights, expected)
    # In the noise-dominated range epsilon is weighed by 1; v then counts as the same loss on epsilon: SNR / (SNR + 1).
    low = snr < gamma
    torch.testing.assert_close(
        weights[low], torch.ones(5)[low] if prediction_type == "epsilon" else (snr / (snr + 1))[low]
    )


def test_min_snr_weights_are_finite_at_a_signal_of_zero() -> None:
    scheduler = DDPMScheduler(rescale_betas_zero_snr=True)
    weights = min_snr_weights(scheduler.alphas_cumprod, torch.tensor([500, 999]), 5.0, "v_prediction")
    assert torch.isfinite(weights).all() and weights[1] < 1e-6


def test_denoising_loss_is_the_weighted_mean_square() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(3, 4, 2, 5, generator=generator) for _ in range(2))
    torch.testing.assert_close(denoising_loss(prediction, target), torch.nn.functional.mse_loss(prediction, target))
    weights = torch.tensor([0.0, 1.0, 2.0])
    images = [torch.nn.functional.mse_loss(a, b) for a, b in zip(prediction, target, strict=True)]
    torch.testing.assert_close(denoising_loss(prediction, target, weights), (images[1] + 2 * images[2]) / 3)


def test_denoising_loss_is_computed_in_float32() -> None:
    """The square of 300 overflows float16."""
    prediction = torch.full((1, 4, 2, 2), 300.0, dtype=torch.float16)
    assert denoising_loss(prediction, torch.zeros_like(prediction)) == 90000


def regions(seed: int) -> torch.Tensor:
    """Of tokens 1 and 2 of each row; the first place is always in and the last always out."""
    inside = torch.rand(BATCH, PLACES, TOKENS, generator=torch.Generator().manual_seed(seed)).double() < 0.5
    inside[:, 0], inside[:, -1] = True, False
    inside[:, :, [0, 3, 4, 5, 6]] = False
    return inside.double()


@given(SEEDS)
@few
def test_region_losses_are_their_formulas(seed: int) -> None:
    p, where = maps(seed), regions(seed + 1)
    token, pixel = [], []
    for k in range(BATCH):
        for t in (1, 2):
            a, b = p[k, :, t], where[k, :, t]
            token.append((1 - float((a * b).sum() / a.sum())) ** 2)
            pixel.append(float(torch.nn.functional.binary_cross_entropy(a, b)))
    for loss, expected in ((region_token_loss, token), (region_pixel_loss, pixel)):
        torch.testing.assert_close(float(loss(p, where)), sum(expected) / len(expected), rtol=1e-5, atol=1e-7)
        assert float(loss(p, torch.zeros_like(where))) == 0, "no token has a region"


def test_region_losses_are_least_where_attention_is_in_the_region() -> None:
    where = torch.zeros(1, 4, 2)
    where[0, :2, 1] = 1
    inside = torch.tensor([[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0]]])
    for loss in (region_token_loss, region_pixel_loss):
        assert float(loss(inside, where)) == pytest.approx(0, abs=1e-6)
        assert float(loss(inside.flip(1), where)) > 0.4
    weaker = torch.tensor([[[0.9, 0.1], [0.9, 0.1], [1.0, 0.0], [1.0, 0.0]]])
    assert float(region_token_loss(weaker, where)) == 0, "place, not mass"
    assert float(region_pixel_loss(weaker, where)) > 1, "mass too"


MAP_LOSSES = {
    "token_kl": lambda p, q: token_attention_kl(p, q),
    "token_kl of words": lambda p, q: token_attention_kl(p, q, None, words()),
    "place_kl": lambda p, q: place_attention_kl(p, q, words()),
    "mass": lambda p, q: attention_mass(q, groups()),
    "mass_loss": lambda p, q: attention_mass_loss(p, q, groups()),
    "tail_mass": lambda p, q: tail_mass(q, groups()),
    "tail_leak": lambda p, q: tail_leak(torch.full((BATCH,), 0.3), q, groups()),
    "arm": lambda p, q: attention_regularization({"a": q, "b": p}, words()),
    "region_token": lambda p, q: region_token_loss(q, regions(0).float()),
    "region_pixel": lambda p, q: region_pixel_loss(q, regions(0).float()),
    "feature": lambda p, q: feature_loss({"a": p}, {"a": q}, torch.ones(BATCH, dtype=torch.bool)),
    "denoising": lambda p, q: denoising_loss(q, p),
}


def test_every_loss_of_this_module_is_looked_at_under_autocast() -> None:
    """Each function of losses.py that reads tensors of a model; the weights of Min-SNR read the schedule alone."""
    used = {name for loss in MAP_LOSSES.values() for name in loss.__code__.co_names}
    there = {
        name
        for name, value in vars(losses).items()
        if callable(value) and getattr(value, "__module__", "") == losses.__name__ and not name.startswith("_")
    }
    assert there - used == {"min_snr_weights", "in_float32"}


@pytest.mark.parametrize("name", MAP_LOSSES)
def test_autocast_changes_no_loss_and_hides_no_difference(name: str) -> None:
    loss = MAP_LOSSES[name]
    p, q = maps(0, dtype=torch.float32), maps(1, dtype=torch.float32)
    moved = q.clone()
    moved[:, :, 1] += 1e-3  # a word; bfloat16 has steps of 4e-3 below 1
    moved[:, :, 6] -= 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        found, other = loss(p, q), loss(p, moved)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss(p, q), rtol=1e-6, atol=1e-6 * float(loss(p, q).abs().max()))
    torch.testing.assert_close(other - found, loss(p, moved) - loss(p, q), rtol=1e-3, atol=0)
    assert not torch.equal(other, found)


@pytest.mark.parametrize("name", MAP_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_reduced_in_float32(name: str, dtype: torch.dtype) -> None:
    p, q = maps(0, dtype=torch.float32).to(dtype), maps(1, dtype=torch.float32).to(dtype)
    found = MAP_LOSSES[name](p, q)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, MAP_LOSSES[name](p.float(), q.float()), rtol=0, atol=0)


def test_the_feature_loss_is_each_modules_squared_difference_over_the_teachers_mean_square() -> None:
    torch.manual_seed(0)
    teacher = {"a": torch.randn(3, 4, 5), "b": 10 * torch.randn(3, 2)}
    student = {
        name: value + scale * torch.randn(value.shape)
        for (name, value), scale in zip(teacher.items(), (0.1, 3), strict=True)
    }
    rows = torch.tensor([True, False, True])
    expected = [
        sum(float((student[n][i] - teacher[n][i]).square().mean()) for i in (0, 2))
        / 2
        / float(teacher[n].square().mean())
        for n in teacher
    ]
    assert float(feature_loss(teacher, student, rows)) == pytest.approx(sum(expected) / 2, rel=1e-5)

"""Losses: tensors in, scalar out. Attention maps are (batch, places, tokens) probabilities, 1 in sum over tokens.

Losses of probabilities are computed in float32 at least, also under autocast: bfloat16 cannot tell 0.500 from 0.501.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch

GROUPS = ("bos", "words", "eos", "padding")
"""Token groups, in the order of their codes 0..3."""

P = ParamSpec("P")
TINY = 1e-8  # attention probabilities below this count as this; keeps logarithms finite in fp32


def in_float32(loss: Callable[P, torch.Tensor]) -> Callable[P, torch.Tensor]:
    """The same loss without autocast, and with half-precision tensors as float32."""

    @functools.wraps(loss)
    def computed(*args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        values = [_widened(value) for value in args]
        named = {name: _widened(value) for name, value in kwargs.items()}
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return loss(*values, **named)  # type: ignore[arg-type]

    return computed


def _widened(value: object) -> object:
    if isinstance(value, dict):
        return {key: _widened(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def min_snr_weights(
    alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, gamma: float, prediction_type: str
) -> torch.Tensor:
    """Weights of the loss at `timesteps`, (batch,). min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v-prediction.

    Source: Hang et al. 2023, "Efficient diffusion training via Min-SNR weighting strategy", section 3.4.
    """
    alpha = alphas_cumprod.to(timesteps.device)[timesteps]
    snr = alpha / (1 - alpha)
    return snr.clamp(max=gamma) / (snr + (prediction_type == "v_prediction"))


@in_float32
def denoising_loss(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared error, each image weighted by `weights` (batch,) if given. Source: Ho et al. 2020, equation 14."""
    per_image = (prediction.float() - target.float()).pow(2).flatten(1).mean(dim=1)
    return (per_image if weights is None else weights * per_image).mean()


@in_float32
def token_attention_kl(
    teacher: torch.Tensor,
    student: torch.Tensor,
    rows: torch.Tensor | None = None,
    words: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(teacher || student) over tokens, averaged over places and over the images of `rows` (batch,) bool.

    teacher, student: (batch, places, tokens), sum to 1 over tokens. With `words` (batch, tokens) bool, all other tokens
    count as one: how attention is shared among them is free. 0 on equal maps. In nats.
    """
    p, q = teacher.clamp(min=TINY), student.clamp(min=TINY)
    per_token = p * (p.log() - q.log())
    if words is None:
        return _masked_mean(per_token.sum(dim=2).mean(dim=1), rows)
    named = words[:, None, :]
    p, q = ((maps * ~named).sum(dim=2).clamp(min=TINY) for maps in (teacher, student))
    return _masked_mean(((per_token * named).sum(dim=2) + p * (p.log() - q.log())).mean(dim=1), rows)


@in_float32
def place_attention_kl(
    teacher: torch.Tensor,
    student: torch.Tensor,
    words: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL over places of each word token's map, averaged over the tokens of `words` in the images of `rows`.

    teacher, student: (batch, places, tokens); each token's column is normalized to sum to 1 over places.
    words: (batch, tokens) bool. 0 on maps that are equal up to a factor for each token. In nats.
    """
    p, q = teacher.clamp(min=TINY), student.clamp(min=TINY)
    p, q = p / p.sum(dim=1, keepdim=True), q / q.sum(dim=1, keepdim=True)
    per_token = (p * (p.log() - q.log())).sum(dim=1)
    return _masked_mean(per_token, words if rows is None else words & rows[:, None])


@in_float32
def attention_mass(maps: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(batch, 4): share of the attention on BOS, words, EOS and padding, averaged over places; sums to 1.

    maps: (batch, places, tokens); groups: (batch, tokens) codes 0..3 in the order of GROUPS.
    """
    members = torch.nn.functional.one_hot(groups, len(GROUPS)).to(maps.dtype)
    return torch.einsum("bt,btg->bg", maps.mean(dim=1), members)


@in_float32
def attention_mass_loss(
    teacher: torch.Tensor, student: torch.Tensor, groups: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Squared difference of the attention mass of the four token groups, summed over groups, averaged over images."""
    difference = attention_mass(student, groups) - attention_mass(teacher, groups)
    return _masked_mean(difference.pow(2).sum(dim=1), rows)


@in_float32
def tail_leak(
    allowed: torch.Tensor, student: torch.Tensor, groups: torch.Tensor, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention mass of EOS and padding of the student beyond what is allowed, 0 where it is less; averaged over
    images.

    allowed: (batch,), such as `tail_mass` of a teacher. The leak that Dombrowski et al. (AAAI 2024) find in trained
    encoders. Maps and groups as in `attention_mass`.
    """
    return _masked_mean((tail_mass(student, groups) - allowed).clamp(min=0), rows)


@in_float32
def tail_mass(maps: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """(batch,): share of the attention on EOS and padding, 0 to 1. Maps and groups as in `attention_mass`."""
    return attention_mass(maps, groups)[:, 2:].sum(dim=1)


ARM_EPSILON = 2.0**-10
"""Machine epsilon of fp16."""


@in_float32
def attention_regularization(maps: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """ARM: eps * mean over label tokens of (1 / (a + eps) - 1), a a token's attention, mean over places and layers.

    maps: layer -> (batch, places, tokens). labels: (batch, tokens) bool. It rewards mass and not place. 0 without label
    tokens. Source: Dombrowski et al., AAAI 2024 (arXiv 2303.17908).
    """
    attention = torch.stack([layer.mean(dim=1) for layer in maps.values()]).mean(dim=0)
    return ARM_EPSILON * _masked_mean(1 / (attention + ARM_EPSILON) - 1, labels)


@in_float32
def region_token_loss(maps: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Squared share of a token's attention outside its region, averaged over the tokens that have one; 0 without any.

    maps: (batch, places, tokens). regions: (batch, places, tokens) of 0 and 1, all 0 for a token without a region. It
    rewards place and not mass. Source: TokenCompose (Wang et al. 2024, arXiv 2312.03626), token loss.
    """
    inside = (maps * regions).sum(dim=1) / maps.sum(dim=1).clamp(min=TINY)
    return _masked_mean((1 - inside).pow(2), regions.any(dim=1))


@in_float32
def region_pixel_loss(maps: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of a token's attention against its region, averaged over places and over the tokens that
    have one.

    Maps and regions as in `region_token_loss`. It rewards mass in the region. Source: TokenCompose, pixel loss.
    """
    p = maps.clamp(TINY, 1 - 1e-6)
    entropy = -(regions * p.log() + (1 - regions) * (1 - p).log()).mean(dim=1)
    return _masked_mean(entropy, regions.any(dim=1))


@in_float32
def feature_loss(
    teacher: dict[str, torch.Tensor], student: dict[str, torch.Tensor], rows: torch.Tensor
) -> torch.Tensor:
    """Squared difference of the outputs of modules, (batch, ...), each over the teacher's mean square; mean of modules.

    rows: (batch,) bool. The modules are those of the student. BK-SDM (Kim et al. 2023, arXiv 2305.15798, equation 3)
    sums the squared differences of blocks, and KOALA (Lee et al. 2024, arXiv 2312.04005) of self-attention; the ratio
    lets one weight serve modules of any scale.
    """
    parts = []
    for name, output in student.items():
        target = teacher[name]
        gap = (output.float() - target.float()).pow(2).flatten(1).mean(dim=1)
        parts.append(_masked_mean(gap, rows) / target.float().pow(2).mean().clamp(min=TINY))
    return torch.stack(parts).mean()


def _masked_mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Mean of `values` where `mask`; 0 (with a gradient of 0) where nothing is selected."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum().clamp(min=1)

"""Maps at a small timestep teach those at large ones: by the stated formula, without a gradient of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_sd
from training import batch_of, generator, has_gradient, prepared, ready

from distill.attention import attention_layers, record_attention
from distill.methods.base import Noised
from distill.methods.options import TimestepConsistencyOptions
from distill.tokens import WORD


def at(method: Any, x: Noised, timestep: int) -> Noised:
    """The same images, noise and captions at another timestep. Noise of the batch by its formula, in double precision."""
    alphas = method.student.noise_scheduler.alphas_cumprod.double()
    now, then = alphas[x.timesteps][:, None, None, None], alphas[timestep]
    noise = x.target.double()
    clean = (x.noisy_latents.double() - (1 - now).sqrt() * noise) / now.sqrt()
    noisy = (then.sqrt() * clean + (1 - then).sqrt() * noise).float()
    return replace(x, noisy_latents=noisy, timesteps=torch.full_like(x.timesteps, timestep))


def maps_of(method: Any, x: Noised) -> dict[str, torch.Tensor]:
    with record_attention(method.student.denoiser, method.options.layers) as maps, torch.no_grad():
        method.predict_student(x)
        return maps.take()


@pytest.mark.parametrize("words", ["all", "labels"])
def test_the_loss_is_the_stated_formula(words: Any) -> None:
    student = prepared()
    batch = batch_of(student, range(6), label_tokens=True)
    options = TimestepConsistencyOptions(words=words, teaching_timestep=600, weight=0.5)
    with ready(options, student) as method:
        terms, x = method(batch, generator()), method.noised(batch, generator())
        assert (x.timesteps > 600).any() and (x.timesteps < 600).any()
        teaching, taught = maps_of(method, at(method, x, 600)), maps_of(method, x)
    chosen = x.groups == WORD if words == "all" else x.label_tokens
    assert chosen is not None and chosen.any()
    total = 0.0
    for name in taught:
        for row, token in chosen.nonzero().tolist():
            p, q = (maps[name][row, :, token] / maps[name][row, :, token].sum() for maps in (teaching, taught))
            total += max(0, int(x.timesteps[row]) - 600) / 400 * float((p * (p / q).log()).sum())
    expected = total / len(taught) / int(chosen.sum())
    assert expected > 0 and float(terms["place_kl"].detach()) == pytest.approx(expected, rel=1e-2)
    torch.testing.assert_close(terms["loss"], terms["denoising"] + 0.5 * terms["place_kl"])


def test_the_small_timestep_teaches_and_is_not_taught() -> None:
    """The gradient is that of teaching maps which are constants; images in less noise than theirs have none."""
    student = prepared()
    batch = batch_of(student)
    gradients = []
    for constant in (False, True):
        with ready(TimestepConsistencyOptions(teaching_timestep=100), student) as method:
            if constant:
                kept = {
                    n: m.clone()
                    for n, m in method.maps_at_the_teaching_timestep(method.noised(batch, generator())).items()
                }
                method.maps_at_the_teaching_timestep = lambda x, kept=kept: kept
            method.zero_grad()
            method(batch, generator())["place_kl"].backward()
        assert has_gradient(student.denoiser) and has_gradient(student.text_encoders[0])
        gradients.append(torch.cat([p.grad.flatten() for p in student.denoiser.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients)
    with ready(TimestepConsistencyOptions(teaching_timestep=998), student) as method:
        assert float(method(batch, generator())["place_kl"].detach()) < 1e-4


def test_teaching_maps_are_made_without_dropout_and_the_method_trains_on() -> None:
    student = prepared()
    seen: list[bool] = []
    with ready(TimestepConsistencyOptions(), student) as method:
        method.train()
        student.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
        method(batch_of(student), generator())
        assert seen == [True, False] and method.training and method.denoiser.training and method.text_encoders.training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradient_checkpointing_and_layers(checkpointing: bool) -> None:
    student = prepared(gradient_checkpointing=checkpointing)
    layers = attention_layers(student.denoiser, "up_blocks")
    with ready(TimestepConsistencyOptions(layers=("up_blocks",)), student) as method:
        terms = method.train()(batch_of(student), generator())
        terms["loss"].backward()
        assert list(method._maps.sizes) == layers
    assert has_gradient(student.denoiser) and has_gradient(student.text_encoders[0])


def test_v_prediction_gives_the_same_maps() -> None:
    """The image and its noise are taken from the target, whatever is predicted."""
    found = []
    for kind in ("epsilon", "v_prediction"):
        student = prepared(lambda kind=kind: tiny_sd(kind))
        with ready(TimestepConsistencyOptions(), student) as method:
            found.append(method.maps_at_the_teaching_timestep(method.noised(batch_of(student), generator())))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)

"""Consistency distillation: its formulas against diffusers' own schedulers, and its maps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler
from tiny import tiny_sd, tiny_sdxl
from training import LORA, batch_of, generator, has_gradient, ready

from distill.config import DenoisingConfig
from distill.data.batch import Batch, TextEmbeddings
from distill.errors import UserError
from distill.methods.base import Noised
from distill.methods.consistency import Consistency
from distill.methods.options import ConsistencyOptions
from distill.models import Model, model_of
from distill.models.adapters import prepare_training

BUILDS = [tiny_sd, lambda: tiny_sd("v_prediction"), tiny_sdxl]
IDS = ["epsilon", "v", "sdxl"]


@contextmanager
def method_of(
    build: Callable[[], Any], *, denoiser: Any = "full", other: bool = False, **options: Any
) -> Iterator[tuple[Consistency, Model]]:
    """A method and its teacher, equal to the student unless `other`."""
    student, teacher = model_of(build()), model_of(build())
    prepare_training(student, denoiser=denoiser, text_encoder="frozen", lora=LORA)
    if other:
        with torch.no_grad():
            for parameter in student.denoiser.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator()))
    with ready(ConsistencyOptions(**options), student, {"whole": teacher}) as method:
        yield method, teacher


def test_a_teacher_with_a_text_encoder_of_its_own_is_refused() -> None:
    """The student's text would be given to its denoiser."""
    student, teacher = model_of(tiny_sd()), model_of(tiny_sd())
    prepare_training(student, denoiser="full", text_encoder="frozen", lora=LORA)
    with torch.no_grad():
        for parameter in teacher.text_encoders[0].parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator()))
    with (
        pytest.raises(UserError, match="the text encoder of the teacher, whole, was trained"),
        ready(ConsistencyOptions(), student, {"whole": teacher}),
    ):
        pass


def embedded(method: Consistency, batch: Batch) -> Noised:
    x = method.noised(batch, generator())
    return replace(x, text=method.embeddings(method.student, list(method.text_encoders), x))


def student_predicts(method: Consistency, x: Noised) -> torch.Tensor:
    return method.predict(method.student, [], x)


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_the_clean_guess_is_the_one_that_the_stock_sampler_makes(build: Callable[[], Any]) -> None:
    with method_of(build) as (method, teacher), torch.no_grad():
        x = embedded(method, batch_of(teacher))
        prediction = student_predicts(method, x)
        ours = method._clean(prediction, x)
        scheduler = LCMScheduler.from_config(teacher.pipeline.scheduler.config)
        for i, timestep in enumerate(x.timesteps):
            scheduler.set_timesteps(timesteps=[int(timestep)])
            theirs = scheduler.step(prediction[i], int(timestep), x.noisy_latents[i]).denoised
            torch.testing.assert_close(ours[i], theirs)


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_teachers_step_is_the_stock_samplers_under_guidance(build: Callable[[], Any], scale: float) -> None:
    with method_of(build, guidance_scale=scale) as (method, teacher), torch.no_grad():
        x = embedded(method, batch_of(teacher))
        before, _ = method._step_of_teacher(x, method._teacher_maps)
        stock = teacher.pipeline.encode_prompt(
            "x", device="cpu", num_images_per_prompt=len(x.timesteps), do_classifier_free_guidance=True
        )
        empty = TextEmbeddings(stock[1], stock[3] if len(stock) == 4 else None)
        stated, without = (method.predict(teacher, [], replace(x, text=text)) for text in (x.text, empty))
        scheduler = DDIMScheduler.from_config(teacher.pipeline.scheduler.config)
        scheduler.set_timesteps(50)
        for i, timestep in enumerate(x.timesteps):
            guided = without[i] + scale * (stated[i] - without[i])
            theirs = scheduler.step(guided, int(timestep), x.noisy_latents[i]).prev_sample
            torch.testing.assert_close(before.noisy_latents[i], theirs, rtol=1e-4, atol=1e-4)
            assert before.timesteps[i] == max(0, timestep - 20)


def test_timesteps_are_those_that_the_stock_sampler_uses() -> None:
    with method_of(tiny_sd) as (method, teacher):
        drawn = set(method.draw_timesteps(4000, generator()).tolist())
        scheduler = LCMScheduler.from_config(teacher.pipeline.scheduler.config)
        scheduler.set_timesteps(50)
        assert drawn == set(scheduler.timesteps.tolist())
        for steps in (1, 2, 4, 8):
            scheduler.set_timesteps(steps)
            assert set(scheduler.timesteps.tolist()) <= drawn


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_the_loss_is_the_papers_and_maps_of_the_teacher_itself_cost_nothing(build: Callable[[], Any]) -> None:
    with method_of(build) as (method, teacher):
        batch = batch_of(teacher)
        terms = method(batch, generator())
        for name in ("token_kl", "place_kl", "mass"):
            assert float(terms[name].detach()) == pytest.approx(0, abs=1e-6)
        with torch.no_grad():
            x = embedded(method, batch)
            before, _ = method._step_of_teacher(x, method._teacher_maps)
            ours = method._clean(student_predicts(method, x), x)
            target = method._clean(student_predicts(method, before), before)
        expected = (np.sqrt((ours - target).numpy().astype(float) ** 2 + 1e-6) - 1e-3).mean()
        assert float(terms["consistency"].detach()) == pytest.approx(expected, rel=1e-3)
        assert float(terms["loss"].detach()) == pytest.approx(float(terms["consistency"].detach()), abs=1e-6)


def test_at_the_last_timestep_the_target_is_the_teachers_own_image() -> None:
    with method_of(tiny_sd) as (method, teacher), torch.no_grad():
        x = replace(embedded(method, batch_of(teacher)), timesteps=torch.full((4,), 19))
        before, _ = method._step_of_teacher(x, method._teacher_maps)
        target = method._clean(student_predicts(method, before), before)
        torch.testing.assert_close(target, before.noisy_latents)


@pytest.mark.parametrize("denoiser", ["full", "lora"])
def test_gradients_reach_the_student_and_not_the_teacher(denoiser: str) -> None:
    with method_of(tiny_sd, denoiser=denoiser, other=True) as (method, teacher):
        terms = method(batch_of(teacher), generator())
        assert all(float(terms[name].detach()) > 0 for name in ("consistency", "token_kl", "place_kl", "mass"))
        total = terms["consistency"] + 0.1 * (terms["token_kl"] + terms["place_kl"] + terms["mass"])
        assert float(terms["loss"].detach()) == pytest.approx(float(total.detach()), rel=1e-5)
        terms["loss"].backward()
        assert has_gradient(method.denoiser) and not has_gradient(teacher.denoiser)
        assert not any(has_gradient(encoder) for encoder in [*method.text_encoders, *teacher.text_encoders])


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_the_gradient_is_that_of_a_target_which_is_a_constant(build: Callable[[], Any]) -> None:
    with method_of(build, other=True) as (method, teacher):
        batch = batch_of(teacher)
        method(batch, generator())["consistency"].backward()
        found = {name: p.grad.clone() for name, p in method.denoiser.named_parameters() if p.grad is not None}
        method.zero_grad()
        x = embedded(method, batch)
        with torch.no_grad():
            before, _ = method._step_of_teacher(x, method._teacher_maps)
            target = method._clean(student_predicts(method, before), before)
        gap = method._clean(student_predicts(method, x), x) - target
        ((gap**2 + 1e-6).sqrt() - 1e-3).mean().backward()
        for name, parameter in method.denoiser.named_parameters():
            if name in found:
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_neither_the_teacher_nor_the_target_keeps_activations() -> None:
    with method_of(tiny_sd) as (method, teacher):
        passes: list[tuple[str, bool]] = []
        for name, module in (("student", method.denoiser), ("teacher", teacher.denoiser)):
            module.register_forward_pre_hook(lambda *_, name=name: passes.append((name, torch.is_grad_enabled())))
        method(batch_of(teacher), generator())
        assert passes == [("student", True), ("teacher", False), ("teacher", False), ("student", False)]


def test_dropout_changes_the_students_guess_and_not_the_target() -> None:
    with method_of(tiny_sd) as (method, teacher):
        for module in method.denoiser.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        method.train()
        outputs: list[torch.Tensor] = []
        method.denoiser.register_forward_hook(lambda module, args, output: outputs.append(output[0].detach()))
        for seed in (0, 1):
            torch.manual_seed(seed)
            method(batch_of(teacher), generator())
        guess, target, guess_again, target_again = outputs
        assert not torch.equal(guess, guess_again) and torch.equal(target, target_again)


def test_the_target_is_made_without_dropout_and_the_student_trains_on() -> None:
    with method_of(tiny_sd) as (method, teacher):
        method.train()
        modes: list[bool] = []
        handle = method.denoiser.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
        method(batch_of(teacher), generator())
        handle.remove()
        assert modes == [True, False] and method.denoiser.training


def test_consistency_can_be_learned() -> None:
    """On one batch the loss falls by more than half, and without guidance the guess moves to the guided target."""
    torch.manual_seed(0)
    with method_of(tiny_sd) as (method, teacher):
        batch = batch_of(teacher)
        before = copy.deepcopy(method.denoiser.state_dict())
        optimizer = torch.optim.Adam(method.denoiser.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            terms = method(batch, generator(3))
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            losses.append(float(terms["consistency"].detach()))
        assert losses[-1] < 0.5 * losses[0], losses
        assert any(not torch.equal(v, before[k]) for k, v in method.denoiser.state_dict().items())


@pytest.mark.parametrize(("denoiser", "text_encoder"), [("frozen", "lora"), ("lora", "lora"), ("full", "full")])
def test_what_consistency_would_not_train_is_refused(denoiser: Any, text_encoder: Any) -> None:
    student = model_of(tiny_sd())
    method = Consistency(ConsistencyOptions(), DenoisingConfig())

    def faults(denoiser: Any, text_encoder: Any) -> list[str]:
        training = SimpleNamespace(denoiser=denoiser, text_encoder=text_encoder, lora=LORA)
        return method.faults(student, cast(Any, training))

    assert not faults("lora", "frozen")
    (fault,) = faults(denoiser, text_encoder)
    assert f"denoiser is {denoiser}, text_encoder {text_encoder}" in fault

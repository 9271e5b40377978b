"""Consistency distillation: its formulas against diffusers' own schedulers, its maps, and the recipe."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline
from distill.methods.objectives import ConsistencyObjective, Noised
from distill.rules import value_faults
from PIL import Image
from recipe import recipe_module, refusal_of
from test_objectives import LORA, NO_DROPOUT, batch_of, generator, has_gradient
from test_recipes import TRAINING, files_of, log_rows, read_metrics
from tiny import save_tiny, tiny_sd, tiny_sdxl

from distill.attention.recording import record_attention
from distill.cli import parse
from distill.config import AttentionDistillationConfig, ConsistencyConfig, DistillStepsConfig, EvaluationConfig
from distill.models.adapters import prepare_training
from distill.models.family import Model
from distill.models.loading import LORA_FILE, model_of

BUILDS = [tiny_sd, lambda: tiny_sd("v_prediction"), tiny_sdxl]
IDS = ["epsilon", "v", "sdxl"]


def objective_of(
    stack: ExitStack, build: Callable[[], Any], *, method: Any = "full", other: bool = False, **options: Any
) -> tuple[ConsistencyObjective, Model]:
    """An objective and its teacher, equal to the student unless `other`."""
    student, teacher = model_of(build()), model_of(build())
    prepare_training(student, method=method, text_encoder="frozen", lora=LORA)
    if other:
        with torch.no_grad():
            for parameter in student.denoiser.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator()))
    maps = [stack.enter_context(record_attention(c.denoiser)) for c in (student, teacher)]
    return ConsistencyObjective(
        student, NO_DROPOUT, AttentionDistillationConfig(), teacher, *maps, ConsistencyConfig(**options)
    ), teacher


def embedded(objective: ConsistencyObjective, batch: dict[str, Any]) -> Noised:
    x = objective.noised(batch, generator())
    return replace(x, prompt_embeds=objective.family.encode_text(list(objective.text_encoders), x.input_ids))


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_the_clean_guess_is_the_one_that_the_stock_sampler_makes(build: Callable[[], Any]) -> None:
    with ExitStack() as stack, torch.no_grad():
        objective, teacher = objective_of(stack, build)
        x = embedded(objective, batch_of(teacher))
        prediction = objective.predict(objective.denoiser, [], x)
        ours = objective._clean(prediction, x)
        scheduler = LCMScheduler.from_config(teacher.pipeline.scheduler.config)
        for i, timestep in enumerate(x.timesteps):
            scheduler.set_timesteps(timesteps=[int(timestep)])
            theirs = scheduler.step(prediction[i], int(timestep), x.noisy_latents[i]).denoised
            torch.testing.assert_close(ours[i], theirs)


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_teachers_step_is_the_stock_samplers_under_guidance(build: Callable[[], Any], scale: float) -> None:
    with ExitStack() as stack, torch.no_grad():
        objective, teacher = objective_of(stack, build, guidance_scale=scale)
        x = embedded(objective, batch_of(teacher))
        before, _ = objective._step_of_teacher(x, objective._maps[1])
        stock = teacher.pipeline.encode_prompt(
            "x", device="cpu", num_images_per_prompt=len(x.timesteps), do_classifier_free_guidance=True
        )
        empty = (stock[1], stock[3] if len(stock) == 4 else None)
        stated, without = (
            objective.predict(teacher.denoiser, [], replace(x, prompt_embeds=e)) for e in (x.prompt_embeds, empty)
        )
        scheduler = DDIMScheduler.from_config(teacher.pipeline.scheduler.config)
        scheduler.set_timesteps(50)
        for i, timestep in enumerate(x.timesteps):
            guided = without[i] + scale * (stated[i] - without[i])
            theirs = scheduler.step(guided, int(timestep), x.noisy_latents[i]).prev_sample
            torch.testing.assert_close(before.noisy_latents[i], theirs, rtol=1e-4, atol=1e-4)
            assert before.timesteps[i] == max(0, timestep - 20)


def test_timesteps_are_those_that_the_stock_sampler_uses() -> None:
    with ExitStack() as stack:
        objective, teacher = objective_of(stack, tiny_sd)
        drawn = set(objective.draw_timesteps(4000, generator()).tolist())
        scheduler = LCMScheduler.from_config(teacher.pipeline.scheduler.config)
        scheduler.set_timesteps(50)
        assert drawn == set(scheduler.timesteps.tolist())
        for steps in (1, 2, 4, 8):
            scheduler.set_timesteps(steps)
            assert set(scheduler.timesteps.tolist()) <= drawn


@pytest.mark.parametrize("build", BUILDS, ids=IDS)
def test_the_loss_is_the_papers_and_maps_of_the_teacher_itself_cost_nothing(build: Callable[[], Any]) -> None:
    with ExitStack() as stack:
        objective, teacher = objective_of(stack, build)
        batch = batch_of(teacher)
        terms = objective(batch, generator())
        for name in ("token_kl", "place_kl", "mass"):
            assert float(terms[name].detach()) == pytest.approx(0, abs=1e-6)
        with torch.no_grad():
            x = embedded(objective, batch)
            before, _ = objective._step_of_teacher(x, objective._maps[1])
            ours = objective._clean(objective.predict(objective.denoiser, [], x), x)
            target = objective._clean(objective.predict(objective.denoiser, [], before), before)
        expected = (np.sqrt((ours - target).numpy().astype(float) ** 2 + 1e-6) - 1e-3).mean()
        assert float(terms["consistency"].detach()) == pytest.approx(expected, rel=1e-3)
        assert float(terms["loss"].detach()) == pytest.approx(float(terms["consistency"].detach()), abs=1e-6)


def test_at_the_last_timestep_the_target_is_the_teachers_own_image() -> None:
    with ExitStack() as stack, torch.no_grad():
        objective, teacher = objective_of(stack, tiny_sd)
        x = replace(embedded(objective, batch_of(teacher)), timesteps=torch.full((4,), 19))
        before, _ = objective._step_of_teacher(x, objective._maps[1])
        target = objective._clean(objective.predict(objective.denoiser, [], before), before)
        torch.testing.assert_close(target, before.noisy_latents)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradients_reach_the_student_and_not_the_teacher(method: str) -> None:
    with ExitStack() as stack:
        objective, teacher = objective_of(stack, tiny_sd, method=method, other=True)
        terms = objective(batch_of(teacher), generator())
        assert all(float(terms[name].detach()) > 0 for name in ("consistency", "token_kl", "place_kl", "mass"))
        total = terms["consistency"] + 0.1 * (terms["token_kl"] + terms["place_kl"] + terms["mass"])
        assert float(terms["loss"].detach()) == pytest.approx(float(total.detach()), rel=1e-5)
        terms["loss"].backward()
        assert has_gradient(objective.denoiser) and not has_gradient(teacher.denoiser)
        assert not any(has_gradient(encoder) for encoder in [*objective.text_encoders, *teacher.text_encoders])


def test_consistency_can_be_learned() -> None:
    """On one batch the loss falls by more than half, and without guidance the guess moves to the guided target."""
    torch.manual_seed(0)
    with ExitStack() as stack:
        objective, teacher = objective_of(stack, tiny_sd)
        batch = batch_of(teacher)
        before = copy.deepcopy(objective.denoiser.state_dict())
        optimizer = torch.optim.Adam(objective.denoiser.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            terms = objective(batch, generator(3))
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            losses.append(float(terms["consistency"].detach()))
        assert losses[-1] < 0.5 * losses[0], losses
        assert any(not torch.equal(v, before[k]) for k, v in objective.denoiser.state_dict().items())


# --- the recipe -----------------------------------------------------------------------------------------------------


def distill_steps(argv: list[str]) -> None:
    recipe_module("distill_steps").distill_steps(parse(DistillStepsConfig, argv))


def test_a_full_run_becomes_an_adapter_that_stock_diffusers_samples_in_few_steps(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base")
    teacher_run, out = tmp_path / "teacher", tmp_path / "out"
    tiny_sd(seed=5).unet.save_pretrained(teacher_run / "unet")
    argv = ["--base.name", str(tmp_path / "base"), "--run", str(teacher_run), "--output_dir", str(out), *TRAINING]
    argv += ["--data.cache_dir", str(tmp_path / "cache"), "--lora.rank", "2", "--student_steps", "3"]
    distill_steps([*argv, "--dry_run", "true"])
    assert not out.exists()
    distill_steps([*argv, "--trainer.sample_every_steps", "2"])
    arms = read_metrics(out)["arms"]
    assert list(arms) == ["teacher", "teacher_3_steps", "model"]
    assert [entry["size"]["denoiser_passes_an_image"] for entry in arms.values()] == [4, 6, 3]
    assert arms["teacher"]["localization"] == arms["teacher_3_steps"]["localization"]
    row = log_rows(out / "model/train_log.jsonl")[-1]
    attention = row["token_kl"] + row["place_kl"] + row["mass"]
    assert row["loss"] == pytest.approx(row["consistency"] + 0.1 * attention, rel=1e-4)

    pipe = StableDiffusionPipeline.from_pretrained(out / "whole_base", safety_checker=None)
    pipe.load_lora_weights(out / LORA_FILE)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    example = next(iter(log_rows(out / "real/examples.jsonl")))
    seed = 1234 + int(example["id"].rsplit("-", 1)[-1])
    image = pipe(
        example["caption"], height=64, width=64, num_inference_steps=3, guidance_scale=1.0, output_type="np",
        generator=[torch.Generator().manual_seed(seed)],
    ).images[0]  # fmt: skip
    drawn = np.asarray(Image.open(out / "model/samples/0000.png"), dtype=float) / 255
    assert np.abs(image - drawn).max() < 0.02
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)" in card
    assert "num_inference_steps=3, guidance_scale=1.0" in card
    files = files_of(out)
    distill_steps([*argv, "--trainer.sample_every_steps", "2"])
    assert files_of(out) == files


def test_more_steps_than_the_few_step_sampler_has_are_refused() -> None:
    config = replace(EvaluationConfig(), scheduler="lcm", num_inference_steps=51)
    assert value_faults(config) == {
        "num_inference_steps": "num_inference_steps: expected at most 50 with scheduler lcm, got 51"
    }
    assert not value_faults(replace(config, num_inference_steps=50))


def test_options_that_few_steps_do_not_read_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "base")
    argv = ["--base.name", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out"), *TRAINING]
    argv += ["--distillation.teacher", "x", "--distillation.output_weight", "1", "--evaluation.scheduler", "lcm"]
    message = refusal_of(recipe_module("distill_steps").distill_steps, DistillStepsConfig, argv, capsys)
    for expected in ("distillation.teacher", "distillation.output_weight", "evaluation.scheduler"):
        assert expected in message
    argv = ["--consistency.guidance_scale", "0.5", "--student_steps", "51", "--consistency.solver_steps", "30"]
    message = refusal_of(recipe_module("distill_steps").distill_steps, DistillStepsConfig, argv, capsys)
    for expected in (
        "guidance_scale: expected at least 1",
        "student_steps: expected 1 to 50",
        "solver_steps: expected a multiple of 50",
    ):
        assert expected in message
    argv = ["--base.name", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out"), *TRAINING]
    run = ["--run", str(tmp_path / "base/unet"), "--distillation.teacher", "x"]
    for extra, expected in (
        (["--consistency.solver_steps", "150"], "timesteps must be a multiple of it"),
        (run, "distillation.teacher"),
    ):
        message = refusal_of(recipe_module("distill_steps").distill_steps, DistillStepsConfig, [*argv, *extra], capsys)
        assert expected in message
        assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out").exists()

"""The recipe of few denoising steps: an adapter for the stock few-step sampler, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from PIL import Image
from pydantic import ValidationError
from recipe import recipe_module, refusal_of
from test_recipes import TRAINING, files_of, log_rows, read_metrics
from tiny import save_tiny, tiny_sd

from distill.cli import parse
from distill.config import BaseConfig, FullEvaluation
from distill.errors import UserError
from distill.models.loading import LORA_FILE, load_model

RECIPE = recipe_module("distill_steps")


def distill_steps(argv: list[str]) -> None:
    RECIPE.distill_steps(parse(RECIPE.DistillStepsConfig, argv))


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
    with pytest.raises(
        UserError, match=rf"was trained on {out / 'whole_base'}, and base.name is .*base; give --base.name"
    ):
        load_model(BaseConfig(name=str(tmp_path / "base")), out)
    load_model(BaseConfig(name=str(out / "whole_base")), out)
    files = files_of(out)
    distill_steps([*argv, "--trainer.sample_every_steps", "2"])
    assert files_of(out) == files


def test_more_steps_than_the_few_step_sampler_has_are_refused() -> None:
    with pytest.raises(ValidationError, match="num_inference_steps is 51; scheduler lcm takes at most 50"):
        FullEvaluation(scheduler="lcm", num_inference_steps=51)
    assert FullEvaluation(scheduler="lcm", num_inference_steps=50).num_inference_steps == 50


def test_options_that_few_steps_do_not_have_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refusal(*words: str) -> str:
        return refusal_of(RECIPE.distill_steps, RECIPE.DistillStepsConfig, [*argv, *words], capsys)

    save_tiny(tmp_path / "base")
    argv = ["--base.name", str(tmp_path / "base"), "--output_dir", str(tmp_path / "out"), *TRAINING]
    message = refusal("--method.output_weight", "1", "--evaluation.scheduler", "lcm", "--text_encoder", "full")
    for expected in (
        "unknown key method.output_weight",
        "unknown key evaluation.scheduler",
        "unknown key text_encoder",
    ):
        assert expected in message
    message = refusal("--method.guidance_scale", "0.5", "--student_steps", "51", "--method.solver_steps", "75")
    for expected in (
        "method.guidance_scale: expected a number from 1 to 1000",
        "student_steps: expected a whole number from 1 to 50, got 51",
        "method.solver_steps: a multiple of 50",
    ):
        assert expected in message
    for words, expected in (
        (["--method.solver_steps", "150"], "timesteps must be a multiple of it"),
        (["--denoising.min_snr_gamma", "5"], "denoising.min_snr_gamma weighs the diffusion loss"),
        (["--method.teacher", "x"], "the teacher is the whole model, base and run"),
    ):
        assert expected in refusal(*words)
    assert not (tmp_path / "out").exists()

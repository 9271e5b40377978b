"""Make a smaller model of a fine-tuned one: take out blocks of its U-Net, and let the whole one teach the rest.

    accelerate launch recipes/compress.py --config recipes/configs/phantom/compress.yaml --run checkpoints/finetune

What is taken out: distill/compress.py. The loss is `AttentionDistillationObjective` in distill/objectives.py, by default of
outputs and features (BK-SDM), and on request of the attention of each layer that stays; the loop is `fit` in
distill/trainer.py.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from distill.arms import Arm
from distill.attention.recording import attention_layers
from distill.cli import main
from distill.config import BlocksConfig, CompressConfig, LoraConfig
from distill.derive import derived_base, whole
from distill.files import write_json
from distill.models.blocks import model_size, name_in_teacher, pruned_subset, pruned_unet
from distill.models.family import Model
from distill.models.loading import load_model
from distill.runs import dry_run, evaluate_arm, finish, open_run, train_arm

PRUNED = "pruned_base"
TIMED_PASSES = 20


def prune(model: Model, blocks: BlocksConfig) -> Model:
    """The same pipeline with fewer blocks in its U-Net."""
    teacher = model.denoiser
    student = pruned_unet(teacher, blocks)
    model.pipeline.register_modules(**{model.family.denoiser_name: student})
    subset = pruned_subset(model.subset, student, name_in_teacher(student.config, teacher.config))
    return replace(model, denoiser=student, subset=subset)


@torch.no_grad()
def seconds_a_pass(models: dict[str, Model], resolution: int, batch: int) -> dict[str, float]:
    """Median seconds of a denoiser's forward pass, the models in turn, on the device that they are on."""
    taken: dict[str, list[float]] = {name: [] for name in models}
    for step in range(TIMED_PASSES + 2):
        for name, model in models.items():
            device = next(model.denoiser.parameters()).device
            inputs = model.family.example_inputs(model, batch, resolution // model.vae_factor, device)
            began = time.perf_counter()
            out = model.family.predict(model.denoiser, *inputs)
            float(out.sum())  # waits for the device
            if step >= 2:
                taken[name].append(time.perf_counter() - began)
    return {name: median(times) for name, times in taken.items()}


def compress(config: CompressConfig) -> None:
    arm = Arm(
        name="model",
        folder=Path(config.output_dir),
        method="full",
        text_encoder=config.text_encoder,
        learning_rate=config.trainer.learning_rate,
        text_encoder_learning_rate=config.trainer.text_encoder_learning_rate or config.trainer.learning_rate,
        distillation=replace(config.distillation, teacher=config.run or config.base.name),
        lora=LoraConfig(),
    )
    with derived_base(config, arm, PRUNED, partial(prune, blocks=config.blocks)) as base:
        run = open_run(config, arms=[arm], base=base)
        if config.dry_run:
            return dry_run(run, [arm])
        cost = train_arm(run, arm)
        teacher = Path(config.run) if config.run else None
        results: dict[str, Any] = {
            "teacher": evaluate_arm(run, "teacher", teacher, base=config.base),
            "pruned": evaluate_arm(run, "pruned", None),
            "model": evaluate_arm(run, "model", arm.folder, cost, arm),
        }
        for bits in config.bits:
            fewer = replace(config.evaluation, quantization=bits)
            results[f"model_{bits}"] = evaluate_arm(run, f"model_{bits}", arm.folder, evaluation=fewer)
        if run.accelerator.is_main_process and not (run.folder / "speed.json").exists():
            device, batch = run.accelerator.device, config.evaluation.batch_size
            models = {
                "teacher": whole(config).to(device).freeze(),
                "model": load_model(base, arm.folder).to(device).freeze(),
            }
            seconds = seconds_a_pass(models, config.data.resolution, batch)
            write_json(run.folder / "speed.json", {"batch_size": batch, "denoiser_seconds_a_pass": seconds})
            size = {name: model_size(model, config.data.resolution) for name, model in models.items()}
            parts = [
                f"{label} {size['model'][key] / size['teacher'][key]:.2f}"
                for key, label in (("denoiser_parameters", "parameters"), ("denoiser_gflops", "operations"))
            ]
            layers = {name: len(attention_layers(model.denoiser)) for name, model in models.items()}
            run.say(
                f"U-Net against the teacher's: {', '.join(parts)}, time of a pass {seconds['model'] / seconds['teacher']:.2f}; "
                f"cross-attention layers {layers['model']} of {layers['teacher']}, and so are the maps of each"
            )
        finish(run, results, next_command=f"load it in diffusers as {arm.folder / 'README.md'} shows")


if __name__ == "__main__":
    main(compress, CompressConfig)

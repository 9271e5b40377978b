"""What a training step costs, beside the loops of diffusers' example scripts.

    accelerate launch recipes/benchmark_training.py --config recipes/configs/phantom/benchmark_training.yaml
    accelerate launch recipes/benchmark_training.py --config recipes/configs/sd/benchmark_training.yaml  # on a GPU, 8 minutes

Our steps and theirs take turns in one process, at equal model, batch, precision and data. Theirs encode images and
captions at each step, as those scripts do; ours read them from the caches, as our recipes do. The last line is one JSON
object. The measurements are in distill/experiment/benchmark_training.py, diffusers' loops in
distill/experiment/peers.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from distill.cli import main
from distill.config import EvaluationConfig, LoraConfig, RunConfig, TrainerConfig
from distill.methods.options import AttentionDistillationOptions, KeyLockOptions
from distill.methods.training import Training
from distill.settings import Count, Positive, Text, Texts, once

if TYPE_CHECKING:
    from distill.experiment.benchmark_training import Results

Part = Literal["speed", "shares", "memory", "start"]


class BenchmarkTrainingConfig(RunConfig):
    """Time our training steps beside those of diffusers' example scripts.

    accelerate launch recipes/benchmark_training.py --config recipes/configs/phantom/benchmark_training.yaml
    """

    common: ClassVar[tuple[str, ...]] = ("base.name", "architecture", "data.kind", "data.root", "parts", "turns")
    architecture: Literal["base", "sd15"] = "base"
    """base: the model of base.name. sd15: Stable Diffusion 1.5 with random weights, where its weights cannot be had."""
    parts: Annotated[tuple[Part, ...], Field(min_length=1), AfterValidator(once)] = get_args(Part)
    """speed: seconds a step. shares: where a step's time goes. memory: peak of each kind in a process of its own.
    start: seconds from the command to the first step."""
    kinds: Texts = ()
    """Kinds of step to measure: lora, lora_both, distilled, full, full_both, key_locked, pruned, compressed. Empty:
    all."""
    limit_minutes: Positive = 480.0
    """Stop after this time. What was measured by then is in benchmark.json."""
    turns: Count = 3
    """Turns of each kind of step."""
    steps: Count = 10
    """Timed steps of a turn."""
    warm_up_steps: Count = 3
    """Steps of a turn before the timed ones."""
    lora: LoraConfig = LoraConfig()
    """The adapters; diffusers' script gets the same rank."""
    trainer: TrainerConfig = TrainerConfig(tracker="none")
    evaluation: EvaluationConfig = EvaluationConfig(
        features="none",
        generated_images=1,
        localization_images=1,
        diversity_captions=1,
        diversity_samples=2,
        examples=1,
    )
    output_dir: Text = "checkpoints/benchmark_training"
    """Where benchmark.json is written."""

    @model_validator(mode="after")
    def _check_kinds(self) -> BenchmarkTrainingConfig:
        if self.base.caption_chunks > 1:
            raise ValueError(
                f"base.caption_chunks is {self.base.caption_chunks}, and diffusers' scripts read one; leave it out"
            )
        if self.trainer.gradient_accumulation_steps > 1:
            raise ValueError(
                f"trainer.gradient_accumulation_steps is {self.trainer.gradient_accumulation_steps}, and a step of "
                "diffusers' loop here is one batch; leave it out"
            )
        if self.trainer.ema_decay is not None:
            raise ValueError(
                f"trainer.ema_decay is {self.trainer.ema_decay}, and diffusers' loop here keeps no average; leave it out"
            )
        known = [*kinds(self.lora), *kinds_of_smaller()]
        if unknown := [name for name in self.kinds if name not in known]:
            raise ValueError(f"kinds: {', '.join(unknown)} is none; there are {', '.join(known)}")
        return self


def kinds(lora: LoraConfig) -> dict[str, Training]:
    """Our kinds of step, by name."""
    teach = AttentionDistillationOptions(teacher="base")
    return {
        "lora": Training(denoiser="lora", text_encoder="frozen", lora=lora),
        "lora_both": Training(denoiser="lora", text_encoder="lora", lora=lora),
        "distilled": Training(denoiser="lora", text_encoder="lora", lora=lora, method=teach),
        "full": Training(denoiser="full", text_encoder="frozen"),
        "full_both": Training(denoiser="full", text_encoder="full"),
        "key_locked": Training(denoiser="full", text_encoder="full", method=KeyLockOptions()),
    }


def kinds_of_smaller() -> dict[str, Training]:
    """Kinds of step of a U-Net without its middle block: alone, and taught by the whole one's outputs and features."""
    teach = AttentionDistillationOptions(
        teacher="whole", token_kl_weight=0.0, place_kl_weight=0.0, mass_weight=0.0, output_weight=1.0, feature_weight=1.0
    )  # fmt: skip
    return {
        "pruned": Training(denoiser="full", text_encoder="frozen"),
        "compressed": Training(denoiser="full", text_encoder="frozen", method=teach),
    }


RATIOS = {
    "lora_ratio": ("diffusers_lora", "lora"),
    "full_ratio": ("diffusers_full", "full"),
    "distill_step_ratio": ("distilled", "lora_both"),
    "key_lock_step_ratio": ("key_locked", "full_both"),
    "compress_step_ratio": ("compressed", "pruned"),
}
"""Name -> the two kinds of step whose seconds are divided."""


def summary(results: Results, device: str) -> dict[str, float | str | None]:
    """The last line; null for what was not measured."""
    seconds = {name: entry.get("seconds_a_step") for name, entry in results["kinds"].items()}
    found: dict[str, float | str | None] = {}
    for name, (one, other) in RATIOS.items():
        both = seconds.get(one), seconds.get(other)
        found[name] = both[0] / both[1] if both[0] and both[1] else None
    peaks = [results["kinds"].get(name, {}).get("peak_memory_gb") for name in RATIOS["distill_step_ratio"]]
    found["distill_memory_ratio"] = peaks[0] / peaks[1] if peaks[0] and peaks[1] else None
    return found | {"first_step_seconds": results.get("first_step_seconds"), "device": device}


def benchmark(config: BenchmarkTrainingConfig) -> None:
    from distill.experiment.benchmark_training import Measurement
    from distill.files import provenance, write_json

    path, origin = Path(config.output_dir) / "benchmark.json", provenance()

    def write(found: Results) -> None:
        write_json(path, {**found, "config": config.model_dump(mode="json"), "provenance": origin})

    own, smaller = (
        {name: training for name, training in every.items() if not config.kinds or name in config.kinds}
        for every in (kinds(config.lora), kinds_of_smaller())
    )
    results = Measurement(config, write).run(own, smaller)
    for kind, entry in results["kinds"].items():
        print(f"{kind}: " + ", ".join(f"{key} {value:.4g}" for key, value in entry.items() if isinstance(value, float)))
    print(f"all numbers: {path}")
    print(json.dumps(summary(results, str(origin["device"]))))


if __name__ == "__main__":
    main(benchmark, BenchmarkTrainingConfig)

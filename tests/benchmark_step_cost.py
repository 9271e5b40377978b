"""What a training step costs beside a plain one of the same student: python tests/benchmark_step_cost.py [--steps 20]

The embedded base, full U-Net and text encoder, 16 phantoms, AdamW; the kinds of step take turns, so that other work on the
machine slows them alike. Prints one JSON object: kind -> median over turns of its time over the plain step's of that turn,
with the quartiles. The teacher is the base.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch
from distill.methods.objectives import AttentionDistillationObjective, DenoisingObjective, SupervisedAttentionObjective
from torch.utils.data import default_collate

from distill.attention.recording import record_attention
from distill.config import AttentionDistillationConfig, BaseConfig, DenoisingConfig, LoraConfig
from distill.data.phantom.dataset import PhantomDataset
from distill.data.rows import TrainingRows
from distill.methods.key_lock import lock_keys
from distill.models.adapters import prepare_training
from distill.models.family import Model
from distill.models.loading import load_model

LOCKED = "key_locked"
Kind = AttentionDistillationConfig | DenoisingConfig | str | None
KINDS: dict[str, Kind] = {
    "key_locked": LOCKED,
    "supervised": DenoisingConfig(region_token_weight=0.01),
    "tail_penalized": DenoisingConfig(tail_weight=0.1),
    "gated, 4 of 7 layers": AttentionDistillationConfig(
        teacher="run", layers=("down_blocks", "up_blocks.0"), max_timestep=699
    ),
    "distilled": AttentionDistillationConfig(teacher="run"),
    "distilled, text_gradient .1": AttentionDistillationConfig(teacher="run", text_gradient=0.1),
    "distilled, batch_share .5": AttentionDistillationConfig(teacher="run", batch_share=0.5),
    "self_taught .5": AttentionDistillationConfig(teacher="frozen_text_encoder", batch_share=0.5),
    "self_taught .5, frozen_share .5": AttentionDistillationConfig(
        teacher="frozen_text_encoder", batch_share=0.5, frozen_share=0.5
    ),
    "self_taught .25, frozen_share .5": AttentionDistillationConfig(
        teacher="frozen_text_encoder", batch_share=0.25, frozen_share=0.5
    ),
}


def student() -> Model:
    model = load_model(BaseConfig(name="phantom"))
    prepare_training(model, method="full", text_encoder="full", lora=LoraConfig())
    return model


def stepper(
    stack: ExitStack, config: Kind, batch: dict[str, torch.Tensor]
) -> Callable[[dict[str, torch.Tensor], int], None]:
    """A function that trains one step of a student of its own."""
    own = student()
    if config == LOCKED:
        lock_keys(own)
    objective = DenoisingObjective(own, DenoisingConfig())
    if isinstance(config, DenoisingConfig):
        objective = SupervisedAttentionObjective(own, config, stack.enter_context(record_attention(own.denoiser)))
        if config.tail_weight:
            objective.measure_tail([batch], torch.Generator().manual_seed(0))
    elif isinstance(config, AttentionDistillationConfig):
        teacher = load_model(BaseConfig(name="phantom"))
        if config.teacher == "frozen_text_encoder":
            teacher = replace(own, text_encoders=[copy.deepcopy(e).requires_grad_(False) for e in own.text_encoders])
        maps = [stack.enter_context(record_attention(own.denoiser, config.layers, text_gradient=config.text_gradient))]
        shared = teacher.denoiser is own.denoiser
        maps += maps if shared else [stack.enter_context(record_attention(teacher.denoiser, config.layers))]
        objective = AttentionDistillationObjective(own, DenoisingConfig(), config, teacher, *maps)
    objective.train()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-5)

    def step(batch: dict[str, torch.Tensor], seed: int) -> None:
        objective(batch, torch.Generator().manual_seed(seed))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    own = student()
    rows = TrainingRows(PhantomDataset("train", 16, 0, 128), own, label_tokens=True, regions=True)
    batch = default_collate([rows[i] for i in range(16)])
    with torch.no_grad():
        posterior = own.vae.encode(batch.pop("pixel_values")).latent_dist
    batch |= {"latents_mean": posterior.mean, "latents_std": posterior.std}
    times: dict[str, list[float]] = {}
    with ExitStack() as stack:
        kinds = {"plain": stepper(stack, None, batch)}
        kinds |= {name: stepper(stack, config, batch) for name, config in KINDS.items()}
        for turn in range(steps + 2):
            for name, step in kinds.items():
                began = time.perf_counter()
                step(batch, turn)
                if turn >= 2:  # the first ones allocate
                    times.setdefault(name, []).append(time.perf_counter() - began)
    plain = np.array(times["plain"])
    ratios = {name: np.quantile(np.array(values) / plain, [0.25, 0.5, 0.75]) for name, values in times.items()}
    print(
        json.dumps(
            {"plain_seconds": float(np.median(plain)), "threads": torch.get_num_threads(), "steps": steps}
            | {name: [round(float(v), 3) for v in low_mid_high] for name, low_mid_high in ratios.items()}
        )
    )


if __name__ == "__main__":
    main()

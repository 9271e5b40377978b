"""What a training step costs beside a plain one of the same student: python tests/benchmark_step_cost.py [--steps 20]

The bundled base, full U-Net and text encoder, 16 phantoms, AdamW. The kinds of step take turns, so that other work on
the machine slows them alike. Prints one JSON object: kind -> quartiles over turns of its time over the plain step's of
that turn. The teacher is the base.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from distill.config import BaseConfig, DenoisingConfig, LoraConfig
from distill.data.batch import Batch, Posterior
from distill.data.phantom.dataset import PhantomDataset
from distill.data.rows import TrainingRows
from distill.methods import method_of
from distill.methods.base import Context
from distill.methods.options import (
    AttentionDistillationOptions,
    DenoisingOptions,
    KeyLockOptions,
    Options,
    SupervisedAttentionOptions,
    TailPenaltyOptions,
)
from distill.models import Model, load_model
from distill.models.adapters import prepare_training

BASE = BaseConfig(name="phantom")
KINDS: dict[str, Options] = {
    "plain": DenoisingOptions(),
    "key_locked": KeyLockOptions(),
    "supervised": SupervisedAttentionOptions(region_token_weight=0.01),
    "tail_penalized": TailPenaltyOptions(),
    "gated, 4 of 7 layers": AttentionDistillationOptions(
        teacher="base", layers=("down_blocks", "up_blocks.0"), max_timestep=699
    ),
    "distilled": AttentionDistillationOptions(teacher="base"),
    "distilled, batch_share .5": AttentionDistillationOptions(teacher="base", batch_share=0.5),
}


def student() -> Model:
    model = load_model(BASE)
    prepare_training(model, denoiser="full", text_encoder="full", lora=LoraConfig())
    return model


def stepper(options: Options, batch: Batch, captions: list[str], folder: Path) -> Callable[[int], None]:
    """A function that trains one step of a student of its own, with this seed."""
    method = method_of(options, DenoisingConfig())
    context = Context(
        generator=torch.Generator().manual_seed(0),
        device=torch.device("cpu"),
        is_main=True,
        log_dir=folder,
        frozen_dtype=torch.float32,
        dry_run=False,
        load=lambda name: load_model(BASE),
        batches=lambda images: iter([batch]),
        captions=lambda count: captions,
        layer_scores=None,
        say=lambda message: None,
    )
    method.setup(student(), context)
    method.train()
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-5)

    def step(seed: int) -> None:
        method(batch, torch.Generator().manual_seed(seed))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def encoded(batch: Batch, model: Model) -> Batch:
    """The batch with the VAE's posterior in place of pixels, as the cache of latents gives it."""
    with torch.no_grad():
        posterior = model.vae.encode(batch.image.pixel_values).latent_dist
    others = {name: getattr(batch, name) for name in batch.__dataclass_fields__ if name != "image"}
    return Batch(image=Posterior(posterior.mean, posterior.std), **others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    own = student()
    rows = TrainingRows(PhantomDataset("train", 16, 0, 128), own, label_tokens=True, regions=True)
    batch, captions = encoded(Batch.stack([rows[i] for i in range(16)]), own), [rows.caption(i) for i in range(16)]
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        kinds = {name: stepper(options, batch, captions, Path(scratch)) for name, options in KINDS.items()}
        for turn in range(steps + 2):
            for name, step in kinds.items():
                began = time.perf_counter()
                step(turn)
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

"""Memory of recorded denoising, each measurement in a process of its own, since a peak never falls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel

from distill.attention.heat_maps import record_pipeline
from distill.attention.recording import record_attention
from distill.config import BaseConfig
from distill.experiment.fresh_process import in_fresh_process
from distill.experiment.run import quiet_libraries
from distill.memory import peak_memory_gb
from distill.models import load_model

Row = dict[str, Any]


def seconds_of(call: Callable[[], object], device: torch.device) -> tuple[Any, float]:
    """What `call` returns, and its wall-clock time."""
    began = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def forward_inputs(unet: Any, batch: int, size: int, device: torch.device) -> Row:
    """Random arguments of a forward pass with 77 tokens; `size` is the side of the latents."""
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn((batch, unet.config.in_channels, size, size), generator=generator)
    embeds = torch.randn((batch, 77, unet.config.cross_attention_dim), generator=generator)
    return {
        "sample": sample.to(device),
        "timestep": torch.tensor(500, device=device),
        "encoder_hidden_states": embeds.to(device),
    }


@torch.no_grad()
def memory_of_steps(base: BaseConfig, run: str | None, steps: int) -> Row:
    """Peak memory, and bytes that the recorder holds, after drawing images in `steps` steps with all words recorded."""
    quiet_libraries()
    model = load_model(base, run).to(Accelerator().device).freeze()
    pipe, prompts = model.pipeline, ["a small pleural effusion on the left"] * 4
    side = int(model.denoiser.config.sample_size) * model.vae_factor
    with record_pipeline(pipe, prompts) as maps:
        pipe(prompts, num_inference_steps=steps, guidance_scale=4.0, height=side, width=side, output_type="latent")
    held = sum(m.numel() * m.element_size() for m in maps.recorded.by_layer.values())
    return {"peak_gb": peak_memory_gb(), "held_bytes": held, "passes": maps.recorded.passes}


@torch.no_grad()
def full_size_pass(batch: int, records: bool, dtype: torch.dtype) -> Row:
    """SD 1.5's U-Net from its configuration, random weights, 512 x 512, one forward pass with two tokens recorded."""
    device = Accelerator().device
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval().to(dtype)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # of the weights in fp32
    loaded = peak_memory_gb()
    inputs = forward_inputs(unet, batch, 64, device)
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}
    chosen = torch.zeros(batch, 77, 2, device=device)
    chosen[:, 5, 0] = chosen[:, 9, 1] = 1.0
    recording: AbstractContextManager[Any] = nullcontext()
    if records:
        recording = record_attention(unet, reduce=lambda probabilities: probabilities.mean(dim=1) @ chosen)
    with recording:
        if device.type == "cuda":
            seconds_of(lambda: unet(**inputs), device)  # loads the kernels
        seconds = seconds_of(lambda: unet(**inputs), device)[1]
    parameters = sum(p.numel() for p in unet.parameters())
    return {"seconds": seconds, "peak_gb": peak_memory_gb(), "loaded_gb": loaded, "parameters": parameters}


def full_size(budget_gb: float, dtype: torch.dtype) -> Row:
    """Seconds and memory of one image, and the largest batch within `budget_gb`, by the memory that each further image
    took.

    A GPU is fast enough to run that batch.
    """

    def run(batch: int, records: bool = True) -> Row:
        measured: Row = in_fresh_process(full_size_pass, batch, records, dtype)
        return measured

    plain, one, three = run(1, records=False), run(1), run(3)
    per_image = (three["peak_gb"] - one["peak_gb"]) / 2
    largest = 1 + math.floor((budget_gb - one["peak_gb"]) / per_image)
    result = {
        "parameters": one["parameters"],
        "seconds_plain": plain["seconds"],
        "seconds_recorded": one["seconds"],
        "peak_gb_plain": plain["peak_gb"],
        "peak_gb_recorded": one["peak_gb"],
        "gb_per_further_image": per_image,
        f"largest_batch_at_{budget_gb:g}_gb": max(0, largest),
    }
    if torch.cuda.is_available() and largest > 0:
        whole, plain = run(largest), run(largest, records=False)
        result |= {"peak_gb_of_largest": whole["peak_gb"], "seconds_of_largest": whole["seconds"]}
        result |= {"seconds_of_largest_plain": plain["seconds"]}
    return result

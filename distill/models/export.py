"""Write what was trained to files that stock diffusers and transformers load, and prove that they give the same outputs."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from torch import nn

from distill.errors import UserError
from distill.models.family import Model
from distill.models.loading import LORA_FILE

PARITY_TOLERANCE = 1e-5


def export(model: Model, run: Path) -> dict[str, str]:
    """Write what is trainable: adapters to pytorch_lora_weights.safetensors (with alpha), full weights to diffusers folders.

    Returns {"lora": file} and, for each part with full weights, {stock name: folder}, both relative to `run`. All is written
    to a temporary folder first, so that a kill or a full disk leaves no half-written file.
    """
    run.mkdir(parents=True, exist_ok=True)
    partial = run / "export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    written: dict[str, str] = {}
    states: dict[str, dict[str, torch.Tensor]] = {}
    configs: dict[str, dict[str, Any]] = {}
    names = (model.family.denoiser_name, *model.family.text_encoder_names)
    for name, module in zip(names, [model.denoiser, *model.text_encoders], strict=True):
        if _adapter(module) is not None:
            states[name] = {k: v.detach().cpu().contiguous() for k, v in adapter_state(name, module).items()}
            configs[name] = _adapter(module).to_dict()
        elif any(p.requires_grad for p in module.parameters()):
            module.save_pretrained(partial / name)
            written[name] = name
    if states:
        model.family.save_adapters(model.pipeline, partial, states, configs)
        written["lora"] = LORA_FILE
    if not written:
        raise ValueError("nothing is trainable, so there is nothing to export")
    for entry in partial.iterdir():
        target = run / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(entry, target)
    partial.rmdir()
    return written


def _adapter(module: nn.Module) -> Any:
    return getattr(module, "peft_config", {}).get("default")


def adapter_state(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter of a module, given its stock name, under the keys that other tools read."""
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
    if name.startswith("text_encoder") and not any(key.startswith("text_model.") for key in state):
        # transformers >= 5.6 dropped this level from CLIPTextModel; every other tool and the files in the wild have it.
        state = {f"text_model.{key}": value for key, value in state.items()}
    returned: dict[str, torch.Tensor] = state
    return returned


@torch.no_grad()
def prove_parity(trained: Model, loaded: Model, device: torch.device | str) -> float:
    """Largest difference of the denoiser's output on fixed inputs between what was trained and what the files give.

    Both run in float32 on `device`, and stay there in float32. Weights of the base that were rounded to 16 bits for training
    are rounded in `loaded` too, so that only the files are tested. Raises UserError for a difference above 1e-5 times the
    output's largest value.
    """
    ours, theirs = ([model.denoiser, *model.text_encoders] for model in (trained, loaded))
    for mine, read in zip(ours, theirs, strict=True):
        dtypes = {name: parameter.dtype for name, parameter in mine.named_parameters()}
        for name, parameter in read.named_parameters():
            parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    outputs = []
    for model, modules in ((trained, ours), (loaded, theirs)):
        for module in modules:
            module.float().eval().to(device)
        generator = torch.Generator().manual_seed(0)
        zeros, _, conditions = model.family.example_inputs(model, 2, int(model.denoiser.config.sample_size), device)
        latents = torch.randn(zeros.shape, generator=generator).to(device)
        ids = [x.to(device) for x in model.tokenize(["pleural effusion in the left lower zone", ""])]
        embeds, pooled = model.encode(ids)
        conditions = replace(conditions, embeds=embeds, pooled=pooled)
        timesteps = torch.tensor([10, 700], device=device)
        outputs.append(model.family.predict(model.denoiser, latents, timesteps, conditions))
    difference = float((outputs[0] - outputs[1]).abs().max())
    if not difference <= PARITY_TOLERANCE * max(1.0, float(outputs[0].abs().max())):
        raise UserError(f"the exported files do not give the trained model's outputs (difference {difference:.2e})")
    return difference

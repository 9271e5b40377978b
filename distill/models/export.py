"""What was trained -> files that stock diffusers and transformers load; and the proof that they give the same outputs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from torch import nn

from distill.errors import UserError
from distill.models.components import LORA_FILE, Components, encode_text

PARITY_TOLERANCE = 1e-5


def export(components: Components, run: Path) -> dict[str, str]:
    """Write what is trainable: adapters to pytorch_lora_weights.safetensors (with alpha), full weights to diffusers folders.

    Returns {"lora": file} and/or {"unet": folder}, {"text_encoder": folder}, {"text_encoder_2": folder}, relative to `run`.
    Everything is written to a temporary folder first, so that a kill or a full disk leaves no half-written file.
    """
    run.mkdir(parents=True, exist_ok=True)
    partial = run / "export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    written: dict[str, str] = {}
    adapters: dict[str, Any] = {}
    names = ["unet", "text_encoder", "text_encoder_2"][: 1 + len(components.text_encoders)]
    for name, module in zip(names, [components.unet, *components.text_encoders], strict=True):
        if _adapter(module) is not None:
            adapters |= _adapter_arguments(name, module)
        elif any(p.requires_grad for p in module.parameters()):
            module.save_pretrained(partial / name)
            written[name] = name
    if adapters:
        type(components.pipeline).save_lora_weights(partial, **adapters)
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
    """The adapter of a module (`unet`, `text_encoder` or `text_encoder_2`) under the keys that other tools read."""
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
    if name != "unet" and not any(key.startswith("text_model.") for key in state):
        # transformers >= 5.6 dropped this level from CLIPTextModel; every other tool and the files in the wild have it.
        state = {f"text_model.{key}": value for key, value in state.items()}
    return state


def _adapter_arguments(name: str, module: nn.Module) -> dict[str, Any]:
    """Arguments of save_lora_weights for one module. Without the metadata, diffusers forgets alpha (and assumes rank)."""
    state = {key: value.detach().cpu().contiguous() for key, value in adapter_state(name, module).items()}
    return {f"{name}_lora_layers": state, f"{name}_lora_adapter_metadata": _adapter(module).to_dict()}


@torch.no_grad()
def prove_parity(trained: Components, loaded: Components, device: torch.device | str) -> float:
    """Largest difference of the U-Net's output on fixed inputs between what was trained and what the files give.

    Both run in float32 on `device` and stay so. Weights of the base that were rounded to 16 bits for training are rounded
    in `loaded` too: what is proved is the files. Raises UserError above 1e-5 times the output's largest value.
    """
    pairs = zip([trained.unet, *trained.text_encoders], [loaded.unet, *loaded.text_encoders], strict=True)
    for ours, theirs in pairs:
        dtypes = {name: parameter.dtype for name, parameter in ours.named_parameters()}
        for name, parameter in theirs.named_parameters():
            parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
    outputs = []
    for components in (trained, loaded):
        modules = [components.unet, *components.text_encoders]
        for module in modules:
            module.float().eval().to(device)
        generator = torch.Generator().manual_seed(0)
        size = int(components.unet.config.sample_size)
        latents = torch.randn(2, components.unet.config.in_channels, size, size, generator=generator).to(device)
        ids = [x.to(device) for x in components.tokenize(["pleural effusion in the left lower zone", ""])]
        embeds, pooled = encode_text(components.text_encoders, ids)
        added = (
            {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0, device=device)} if components.is_sdxl else None
        )
        timesteps = torch.tensor([10, 700], device=device)
        outputs.append(components.unet(latents, timesteps, embeds, added_cond_kwargs=added).sample)
    difference = float((outputs[0] - outputs[1]).abs().max())
    if not difference <= PARITY_TOLERANCE * max(1.0, float(outputs[0].abs().max())):
        raise UserError(f"the exported files do not give the trained model's outputs (difference {difference:.2e})")
    return difference

"""Write what was trained to files that stock diffusers and transformers load, and prove that they give the same
outputs."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from distill.errors import UserError
from distill.files import read_json, write_tensors
from distill.models.family import Model
from distill.models.kohya import KOHYA_FILE
from distill.models.loading import LORA_FILE
from distill.models.stock import plain_name

PARITY_TOLERANCE = 1e-5


def export(model: Model, run: Path) -> dict[str, str]:
    """Write what is trainable: adapters to pytorch_lora_weights.safetensors (with alpha), full weights to diffusers
    folders.

    The same adapters are written once more for ComfyUI, A1111 and kohya's scripts. No file has a path of this machine.
    Returns {"lora": file} and, for each part with full weights, {stock name: folder}, both relative to `run`. All is
    written to a temporary folder first, so that a kill or a full disk leaves no half-written file.
    """
    run.mkdir(parents=True, exist_ok=True)
    partial = run / "export.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    written: dict[str, str] = {}
    states: dict[str, dict[str, torch.Tensor]] = {}
    configs: dict[str, dict[str, object]] = {}
    names = (model.family.denoiser_name, *model.family.text_encoder_names)
    for name, module in zip(names, [model.denoiser, *model.text_encoders], strict=True):
        if _adapter(module) is not None:
            states[name] = {k: v.detach().cpu().contiguous() for k, v in adapter_state(name, module).items()}
            configs[name] = _portable(_adapter(module).to_dict(), base_of(model))
        elif any(p.requires_grad for p in module.parameters()):
            module.save_pretrained(partial / name)
            written[name] = name
    name_base(partial, base_of(model))
    if states:
        model.family.save_adapters(model.pipeline, partial, states, configs)
        with safe_open(partial / LORA_FILE, "pt") as file:
            metadata = file.metadata()
        write_tensors(partial / LORA_FILE, load_file(partial / LORA_FILE), metadata)
        written["lora"] = LORA_FILE
        other = model.family.layout_of_other_tools(model)
        if other is not None:
            write_tensors(partial / KOHYA_FILE, *other)
    if not written:
        raise ValueError("nothing is trainable, so there is nothing to export")
    for entry in partial.iterdir():
        target = run / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(entry, target)
    partial.rmdir()
    return written


def base_of(model: Model) -> str:
    """The base of a model without a path of this machine; empty if it was never loaded from anywhere."""
    return plain_name(str(getattr(model.pipeline, "config", {}).get("_name_or_path") or ""))


def name_base(folder: Path, base: str) -> None:
    """Write `base` in place of the path that stock tools leave in each config below `folder`."""
    for path in [*folder.rglob("config.json"), *folder.rglob("model_index.json")]:
        config = read_json(path)
        if config.get("_name_or_path", base) != base:
            path.write_text(
                json.dumps(config | {"_name_or_path": base}, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )


def _portable(config: dict[str, object], base: str) -> dict[str, object]:
    """The configuration of an adapter in a fixed order, on `base`."""
    ordered = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in config.items()}
    return ordered | {"base_model_name_or_path": base}


def _adapter(module: nn.Module) -> Any:
    return getattr(module, "peft_config", {}).get("default")


def adapter_state(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter of a module, given its stock name, under the keys that other tools read."""
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
    # Only projections of attention were renamed, and a loader takes the names of the first key for those of all.
    kind = "lora_linear_layer" if name.startswith("text_encoder") else "lora"
    for old, new in ((".lora_A.", f".{kind}.down."), (".lora_B.", f".{kind}.up.")):
        state = {key.replace(old, new): value for key, value in state.items()}
    if name.startswith("text_encoder") and not any(key.startswith("text_model.") for key in state):
        # transformers >= 5.6 dropped this level from CLIPTextModel; every other tool and the files in the wild have it.
        state = {f"text_model.{key}": value for key, value in state.items()}
    returned: dict[str, torch.Tensor] = state
    return returned


@torch.no_grad()
def fixed_output(model: Model, device: torch.device | str) -> torch.Tensor:
    """The denoiser's output on two latents, timesteps and texts that are always the same."""
    generator = torch.Generator().manual_seed(0)
    zeros, _, conditions = model.family.example_inputs(model, 2, int(model.denoiser.config.sample_size), device)
    latents = torch.randn(zeros.shape, generator=generator).to(device)
    ids = [x.to(device) for x in model.tokenize(["pleural effusion in the left lower zone", ""])]
    embeds, pooled = model.encode(ids)
    conditions = replace(conditions, embeds=embeds, pooled=pooled)
    return model.family.predict(model.denoiser, latents, torch.tensor([10, 700], device=device), conditions)


@torch.no_grad()
def prove_parity(trained: Model, loaded: Model, device: torch.device | str) -> float:
    """Largest difference of the denoiser's output on fixed inputs between what was trained and what the files give.

    Both run in float32 on `device`, and stay there in float32. Weights of the base that were rounded to 16 bits for
    training are rounded in `loaded` too, so that only the files are tested. Raises UserError for a difference above
    1e-5 times the output's largest value.
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
        outputs.append(fixed_output(model, device))
    difference = float((outputs[0] - outputs[1]).abs().max())
    if not difference <= PARITY_TOLERANCE * max(1.0, float(outputs[0].abs().max())):
        raise UserError(f"the exported files do not give the trained model's outputs (difference {difference:.2e})")
    return difference

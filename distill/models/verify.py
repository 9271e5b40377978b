"""What an adapter file changes in a base: read tensor by tensor, without the stock loaders, which pass over what they
do not know."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from distill.errors import UserError
from distill.files import read_json
from distill.models.export import fixed_output
from distill.models.family import Model
from distill.models.kohya import PREFIXES, kohya_name
from distill.models.loading import LORA_FILE
from distill.models.parts import check_adapter
from distill.models.single_file import is_adapter

DOWN = ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down")
UP = ("lora_up", "lora_B", "lora.up", "lora_linear_layer.up")
Layer = tuple[str, str]
"""Stock name of a part of the pipeline, and a layer in it."""


@dataclass(frozen=True)
class Verified:
    """What a base takes from an adapter file.

    loaded: tensors that a layer of the base takes. ignored: name of a tensor -> why no layer takes it. layers: changed
    layers by group. change: norm of the change of a group over the norm of its changed weights. output_change: the same
    of the denoiser's output on fixed inputs.
    """

    file: str
    layout: str
    loaded: int
    ignored: dict[str, str]
    layers: dict[str, int]
    change: dict[str, float]
    output_change: float


@dataclass
class LowRank:
    """What a file holds of one layer."""

    keys: list[str] = field(default_factory=list)
    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    alpha: float | None = None


def layers_of(model: Model) -> dict[Layer, nn.Module]:
    """The layers that an adapter can change."""
    parts = zip(
        (model.family.denoiser_name, *model.family.text_encoder_names),
        (model.denoiser, *model.text_encoders),
        strict=True,
    )
    return {
        (part, name): layer
        for part, module in parts
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }


def file_names(model: Model, layers: Mapping[Layer, nn.Module]) -> dict[str, Layer]:
    """Name of a layer in any layout of adapter files -> the layer."""
    found: dict[str, Layer] = {}
    per_block = model.denoiser.config.get("layers_per_block")
    for part, name in layers:
        plain = name.removeprefix("text_model.")
        names = [name] if part == model.family.denoiser_name else [plain, f"text_model.{plain}"]
        for each in names:
            found[f"{part}.{each}"] = part, name
            found.setdefault(f"base_model.model.{each}", (part, name))
        if part not in PREFIXES:
            continue
        for blocks in (None, per_block if isinstance(per_block, int) else None):
            found[kohya_name(part, name, sdxl=model.family.reads_size, layers_per_block=blocks)] = part, name
        if part == "text_encoder":  # both are in use for a single text encoder
            found[kohya_name(part, name, sdxl=not model.family.reads_size, layers_per_block=None)] = part, name
    return found


def split(key: str) -> tuple[str, str]:
    """(name of the layer, what the tensor is of it: down, up, alpha, or other text)."""
    # As old files of diffusers name attention: ...attn1.processor.to_q_lora.down.weight
    key = re.sub(r"\.to_(q|k|v|out)_lora\.", r".to_\1.lora.", key.replace(".processor.", "."))
    key = re.sub(r"\.to_out\.(?!0)", ".to_out.0.", key)
    for kind, ends in (("down", DOWN), ("up", UP)):
        for end in ends:
            name = re.sub(rf"\.{re.escape(end)}(\.default)?\.weight$", "", key)
            if name != key:
                return name, kind
    name, _, rest = key.rpartition(".")
    return name, rest


def layout_of(keys: list[str]) -> str:
    if any(key.startswith("lora_") for key in keys):
        return "kohya"
    return "peft" if any(key.startswith("base_model.") for key in keys) else "diffusers"


def said_alpha(config: Mapping[str, object], prefix: str, layer: str) -> float | None:
    """The alpha that an adapter's configuration gives a layer."""
    pattern = config.get(f"{prefix}alpha_pattern") or {}
    if not isinstance(pattern, dict) or not all(isinstance(value, (int, float)) for value in pattern.values()):
        raise UserError(f"{prefix}alpha_pattern of its configuration is no mapping of layers to numbers")
    for end, value in pattern.items():
        if layer == end or layer.endswith(f".{end}"):
            return float(value)
    alpha = config.get(f"{prefix}lora_alpha")
    return float(alpha) if isinstance(alpha, (int, float)) else None


def configuration(path: Path) -> dict[str, object]:
    """The configuration that diffusers writes into the file, or peft beside it; empty without one."""
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get("lora_adapter_metadata")
    beside = path.parent / "adapter_config.json"
    found = json.loads(text) if text else read_json(beside) if beside.is_file() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: its configuration is no JSON object")
    return found


def read_adapter(path: Path, model: Model) -> tuple[dict[Layer, LowRank], dict[str, str]]:
    """What the layers of a base take of a file, and why the other tensors are ignored."""
    layers = layers_of(model)
    names = file_names(model, layers)
    found: dict[str, LowRank] = defaultdict(LowRank)
    ignored: dict[str, str] = {}
    tensors = load_file(path)
    for key, value in sorted(tensors.items()):
        name, kind = split(key)
        if name not in names:
            ignored[key] = "the base has no such layer"
        elif kind not in ("down", "up", "alpha"):
            ignored[key] = f"{kind} is nothing that low-rank adapters have"
        else:
            found[name].keys.append(key)
            setattr(found[name], kind, float(value) if kind == "alpha" else value.float())
    config = configuration(path)
    taken: dict[Layer, LowRank] = {}
    for name, one in found.items():
        part, layer = names[name]
        fault = misfit(one, layers[part, layer])
        if fault:
            ignored |= dict.fromkeys(one.keys, fault)
            continue
        if one.alpha is None:
            prefix = "" if name.startswith("base_model.") else f"{part}."
            one.alpha = said_alpha(config, prefix, layer)
            if config.get(f"{prefix}use_rslora") is True:  # alpha / sqrt(rank), which is alpha sqrt(rank) / rank
                assert one.down is not None
                rank = len(one.down)
                one.alpha = (rank if one.alpha is None else one.alpha) * rank**0.5
        taken[part, layer] = one
    return taken, ignored


def misfit(one: LowRank, layer: nn.Module) -> str:
    """Why a layer cannot take its tensors; empty if it can."""
    if one.down is None or one.up is None:
        return "the other factor is missing"
    if min(one.down.ndim, one.up.ndim) < 2 or 0 in (*one.down.shape, *one.up.shape):
        return f"its factors are {tuple(one.up.shape)} and {tuple(one.down.shape)}, which are no matrices"
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    ours = (one.up.shape[0], *one.down.shape[1:])
    if ours != shape or one.up.shape[1] != one.down.shape[0]:
        return f"it is for a layer of shape {ours}, and the base's is {shape}"
    return ""


def change_of(one: LowRank) -> torch.Tensor:
    """alpha / rank * up down, in the shape of the layer's weight."""
    assert one.down is not None and one.up is not None
    rank = one.down.shape[0]
    scale = (rank if one.alpha is None else one.alpha) / rank
    return scale * (one.up.flatten(1) @ one.down.flatten(1)).view(one.up.shape[0], *one.down.shape[1:])


def group_of(layer: Layer) -> str:
    """A stage of the denoiser, or a text encoder."""
    part, name = layer
    return part if part.startswith("text_encoder") else f"{part}.{name.split('.')[0]}"


@torch.no_grad()
def verify(model: Model, path: Path) -> Verified:
    """Merge the adapter of a file, or of a folder, into the model, and say what that changed.

    Raises UserError for what is no adapter file.
    """
    if path.is_dir():
        found = next((path / name for name in (LORA_FILE, "adapter_model.safetensors") if (path / name).exists()), None)
        if found is None:
            raise UserError(f"{path} holds neither {LORA_FILE} nor adapter_model.safetensors")
        path = found
    if not is_adapter(path):
        raise UserError(f"{path} is no adapter file: no tensor is of a low-rank adapter")
    check_adapter(path)
    before, (taken, ignored) = fixed_output(model, "cpu"), read_adapter(path, model)
    layers = layers_of(model)
    squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for layer, one in taken.items():
        weight, delta = layers[layer].weight, change_of(one)
        assert isinstance(weight, torch.Tensor)
        sums = squares[group_of(layer)]
        for place, value in enumerate((1.0, float(delta.double().pow(2).sum()), float(weight.double().pow(2).sum()))):
            sums[place] += value
        weight += delta
    after = fixed_output(model, "cpu")
    keys = [key for one in taken.values() for key in one.keys] + list(ignored)
    return Verified(
        file=path.name,
        layout=layout_of(keys),
        loaded=sum(len(one.keys) for one in taken.values()),
        ignored=dict(sorted(ignored.items())),
        layers={group: int(sums[0]) for group, sums in sorted(squares.items())},
        change={group: (sums[1] / max(sums[2], 1e-30)) ** 0.5 for group, sums in sorted(squares.items())},
        output_change=float((after - before).norm() / before.norm()),
    )

"""Fewer blocks: a stock U-Net made of some of a teacher's blocks, and which of the teacher's each one is.

As BK-SDM (Kim et al. 2023, arXiv 2305.15798, section 3) compresses Stable Diffusion: of each stage's pairs of a
residual and an attention block, the first stay, and in the up stages the last one too, which joins the stage's output
to the skip of the stage before; the middle block and the innermost stages may go. All of it is what a config of
UNet2DConditionModel can say, so the student needs no code of this project.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distill.config import BlocksConfig
from distill.errors import UserError, raise_all
from distill.models.family import AttentionSubset, Model, ModuleName, unwrapped

PER_STAGE = (
    "down_block_types", "block_out_channels", "attention_head_dim", "num_attention_heads", "cross_attention_dim",
    "layers_per_block", "transformer_layers_per_block", "only_cross_attention",
)  # fmt: skip
"""Entries of a U-Net's config that may be lists of one value a stage, outermost first."""

TIMED_PASSES = 20
Counts = int | list["Counts"]
"""A number of blocks, or one for each stage, which may be lists in their turn."""


def pruned_config(config: Mapping[str, Any], blocks: BlocksConfig) -> dict[str, Any]:
    """The config of a U-Net with fewer blocks. Raises UserError, with all faults, for what cannot be removed."""
    stages, new, faults = len(config["block_out_channels"]), dict(config), []
    new.pop("_use_default_values", None)  # from_config would ignore what is set here to another value than the default
    kept = stages - blocks.remove_stages
    if kept < 1:
        raise UserError(
            f"blocks.remove_stages is {blocks.remove_stages}, and the U-Net has {stages} stages; one must stay"
        )
    for name in PER_STAGE:
        if isinstance(config[name], (list, tuple)):
            new[name] = list(config[name])[:kept]
    new["up_block_types"] = list(config["up_block_types"])[blocks.remove_stages :]
    for option, name in (
        ("layers_per_block", "layers_per_block"),
        ("transformer_layers", "transformer_layers_per_block"),
    ):
        wanted = getattr(blocks, option)
        if wanted is None:
            continue
        if wanted >= _largest(config[name]):
            faults.append(f"blocks.{option} is {wanted}, and the U-Net has {config[name]}; give a smaller number")
        new[name] = _at_most(new[name], wanted)
    if blocks.transformer_layers is not None and config.get("reverse_transformer_layers_per_block"):
        faults.append("blocks.transformer_layers: a U-Net with reverse_transformer_layers_per_block is not supported")
    if blocks.remove_mid_block:
        if config["mid_block_type"] is None:
            faults.append("blocks.remove_mid_block is true, and the U-Net has no middle block")
        new["mid_block_type"] = None
    if blocks.remove_stages and new["mid_block_type"] is not None:
        faults.append(
            "blocks.remove_stages takes the middle block's place away; set blocks.remove_mid_block true as well"
        )
    if blocks == BlocksConfig():
        faults.append(
            "blocks: nothing is removed; set blocks.layers_per_block, blocks.remove_mid_block, blocks.remove_stages or "
            "blocks.transformer_layers"
        )
    raise_all("the U-Net cannot be made smaller so", faults)
    return new


def _largest(value: Counts) -> int:
    return max(map(_largest, value)) if isinstance(value, (list, tuple)) else int(value)


def _at_most(value: Counts, most: int) -> Counts:
    return [_at_most(v, most) for v in value] if isinstance(value, (list, tuple)) else min(int(value), most)


def name_in_teacher(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> ModuleName:
    """Name of a module or parameter of the student -> its name in the teacher, from the configs of the two U-Nets, of
    which the student's has at most as many stages."""
    removed = len(teacher["block_out_channels"]) - len(student["block_out_channels"])
    ours, theirs = (_per_stage(config["layers_per_block"], config) for config in (student, teacher))

    def name_there(name: str) -> str:
        found = re.match(r"up_blocks\.(\d+)(?:\.(resnets|attentions)\.(\d+))?(?=\.|$)", name)
        if found is None:
            return name
        block, part, place = int(found[1]), found[2], found[3]
        there = f"up_blocks.{block + removed}"
        if part is not None:
            stage = len(ours) - 1 - block  # the up stages come from the inside out, and have one pair more
            last = int(place) == ours[stage]
            there += f".{part}.{theirs[stage] if last else place}"
        return there + name[found.end() :]

    return name_there


def _per_stage(value: int | list[int], config: Mapping[str, Any]) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [int(value)] * len(config["block_out_channels"])


def pruned_unet(teacher: UNet2DConditionModel, blocks: BlocksConfig) -> UNet2DConditionModel:
    """A U-Net of some of the teacher's blocks, with their weights.

    Raises UserError where a block that stays does not fit: the innermost stages can go only where the next one has as
    many channels, as in Stable Diffusion.
    """
    if not isinstance(teacher, UNet2DConditionModel):
        raise UserError(f"blocks can be taken out of a UNet2DConditionModel; this base has a {type(teacher).__name__}")
    student = UNet2DConditionModel.from_config(pruned_config(teacher.config, blocks))
    name_there, theirs = name_in_teacher(student.config, teacher.config), teacher.state_dict()
    state, faults = {}, []
    for name, tensor in student.state_dict().items():
        there = theirs.get(name_there(name))
        if there is None or there.shape != tensor.shape:
            shape = None if there is None else tuple(there.shape)
            faults.append(f"{name} {tuple(tensor.shape)} would be of {name_there(name)} {shape}")
        else:
            state[name] = there
    raise_all("the blocks that stay do not fit each other", faults[:5])
    student.load_state_dict(state)
    return student


def pruned_subset(subset: AttentionSubset | None, student: nn.Module, name_there: ModuleName) -> AttentionSubset | None:
    """Those of the teacher's chosen layers that the student has too; None if there are none."""
    if subset is None:
        return None
    layers = tuple(n for n, _ in student.named_modules() if n.endswith(".attn2") and name_there(n) in subset.layers)
    return AttentionSubset(layers, subset.timesteps) if layers else None


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


@torch.no_grad()
def model_size(model: Model, resolution: int) -> dict[str, float | int]:
    """{"denoiser_parameters", "text_encoder_parameters", "denoiser_gflops"}.

    The last is for one pass of one image, as torch counts matrix products and convolutions: two operations for each
    multiplication and addition.
    """
    return {
        "denoiser_parameters": _parameters(unwrapped(model.denoiser)),
        "text_encoder_parameters": sum(map(_parameters, model.text_encoders)),
        "denoiser_gflops": _flops(model, resolution // model.vae_factor) / 1e9,
    }


_COUNTED: dict[tuple[object, ...], int] = {}
"""Of this process: the arms of a run are of one architecture, and counting takes seconds."""


def _flops(model: Model, side: int) -> int:
    inner = unwrapped(model.denoiser)
    inputs = model.family.example_inputs(model, 1, side, "meta")
    latents, _, conditions = inputs
    config = sorted((key, repr(value)) for key, value in inner.config.items() if not key.startswith("_"))
    pooled = conditions.pooled.shape if conditions.pooled is not None else None
    of = (type(inner), *config, latents.shape, conditions.embeds.shape, pooled)
    if of not in _COUNTED:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model.family.predict(type(inner).from_config(inner.config), *inputs)
        _COUNTED[of] = counter.get_total_flops()
    return _COUNTED[of]


def _parameters(module: nn.Module) -> int:
    """Numbers, however they are stored: a layer in 4 bits holds two in a byte."""
    states = ((p, getattr(p, "quant_state", None)) for p in module.parameters())
    return sum(p.numel() if state is None else math.prod(state.shape) for p, state in states)

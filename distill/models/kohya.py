"""Adapters in the layout of kohya's scripts, which ComfyUI, A1111 and those scripts read.

A layer `down_blocks.0.attentions.0...attn1.to_q` of the U-Net of Stable Diffusion 1 and 2 is three tensors:
`lora_unet_down_blocks_0_attentions_0_..._attn1_to_q.lora_down.weight`, `.lora_up.weight` and the scalar `.alpha`. For
SDXL the scripts name the U-Net's blocks as the original checkpoint does: `lora_unet_input_blocks_4_1_...`. Text
encoders are `lora_te_...`; the two of SDXL are `lora_te1_...` and `lora_te2_...`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

KOHYA_FILE = "lora_for_comfyui_and_a1111.safetensors"
"""Beside pytorch_lora_weights.safetensors, with the same adapters."""

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}
INSIDE_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip


def original_name(name: str, layers_per_block: int) -> str:
    """A module of diffusers' U-Net as the original checkpoint names it: down_blocks.1.attentions.0 is
    input_blocks.4.1."""
    if name in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[name]
    found = re.fullmatch(
        r"(down|mid|up)_block(?:s\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name
    )
    if found is None:
        raise ValueError(f"no layer of a U-Net of Stable Diffusion: {name}")
    where, kind, rest = found[1], found[3], found[5]
    stage, place = int(found[2] or 0), int(found[4])
    if kind == "resnets":
        rest = INSIDE_RESNET[rest]
    if where == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * place}.{rest}"
    first = stage * (layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers_per_block}.2.conv"
    block = f"input_blocks.{1 + first + place}" if where == "down" else f"output_blocks.{first + place}"
    return f"{block}.{1 if kind == 'attentions' else 0}.{rest}"


def kohya_name(part: str, layer: str, *, sdxl: bool, layers_per_block: int | None) -> str:
    """Name of a layer, up to `.lora_down.weight`. part: unet, text_encoder or text_encoder_2. layers_per_block: None
    where the stages of the U-Net have unequal numbers, which the original names cannot tell."""
    if part == "unet":
        if sdxl and layers_per_block is not None:
            layer = original_name(layer, layers_per_block)
    elif layer != "text_projection" and not layer.startswith("text_model."):
        layer = f"text_model.{layer}"  # transformers >= 5.6 dropped this level from CLIPTextModel
    prefix = "lora_te1" if sdxl and part == "text_encoder" else PREFIXES[part]
    return f"{prefix}_{layer.replace('.', '_')}"


def kohya_layout(
    modules: Mapping[str, nn.Module], *, sdxl: bool, layers_per_block: int | None
) -> dict[str, torch.Tensor]:
    """The adapters `default` of modules, by their stock names, with the alpha of each layer."""
    tensors: dict[str, torch.Tensor] = {}
    for part, module in modules.items():
        for layer, adapted in module.named_modules():
            if "default" not in getattr(adapted, "lora_A", {}):
                continue
            name = kohya_name(part, layer, sdxl=sdxl, layers_per_block=layers_per_block)
            down, up = (getattr(adapted, side)["default"].weight for side in ("lora_A", "lora_B"))
            alpha = float(adapted.scaling["default"]) * len(down)
            tensors |= {
                f"{name}.lora_down.weight": down.detach().cpu().contiguous(),
                f"{name}.lora_up.weight": up.detach().cpu().contiguous(),
                f"{name}.alpha": torch.tensor(alpha),
            }
    return tensors

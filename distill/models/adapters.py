"""Which parameters train: low-rank adapters, full weights, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import peft
import torch
import transformers
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from distill.config import LoraConfig
from distill.errors import UserError
from distill.models.family import Model

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def lora_targets(model: Model, lora: LoraConfig, part: str) -> tuple[str, ...]:
    """Layers that get an adapter, by the end of their names: the configuration's, or the family's. part: denoiser or
    text_encoder."""
    own = lora.denoiser_targets if part == "denoiser" else lora.text_encoder_targets
    return own or model.family.adapter_targets("denoiser" if part == "denoiser" else "text_encoder")


def check_lora_targets(module: nn.Module, targets: Sequence[str], part: str) -> None:
    """Raise UserError if a target matches no layer of `module`, with the names that would, or if transformers refuses
    the installed peft, which it would say only when an adapter is attached."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        raise UserError(
            f"transformers {transformers.__version__} does not work with the installed peft {peft.__version__}: "
            f"{error}. Where no such peft is released, install an earlier transformers"
        ) from None
    if part == "text_encoder" and not isinstance(module, (CLIPTextModel, CLIPTextModelWithProjection)):
        raise UserError(
            f"text_encoder lora: the base's text encoder is a {type(module).__name__}, and stock diffusers loads "
            "adapters of CLIP text encoders only; train it in full, or freeze it"
        )
    layers = [n for n, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    unmatched = [t for t in targets if not any(n == t or n.endswith("." + t) for n in layers)]
    if unmatched:
        ends = sorted({n.split(".")[-1] if not n[-1].isdigit() else ".".join(n.split(".")[-2:]) for n in layers})
        raise UserError(f"lora.{part}_targets: {', '.join(unmatched)} match no layer; layers end in: {', '.join(ends)}")


def add_lora(module: nn.Module, lora: LoraConfig, targets: Sequence[str], part: str) -> None:
    """Attach a fresh adapter named `default` to `module`, or go on with the one that it has; its parameters are float32
    and the only trainable ones.

    Raises UserError if a target matches no layer, or if the adapter that is there is of another rank, scale or targets.
    """
    there = getattr(module, "peft_config", {}).get("default")
    if there is not None:
        if there.use_dora or there.use_rslora:
            raise UserError(
                f"the {part} has an adapter of {'DoRA' if there.use_dora else 'rsLoRA'}, which cannot be trained further; "
                "fuse it into a base, and train a fresh adapter on that"
            )
        layers = {n for n, m in module.named_modules() if isinstance(m, LoraLayer)}
        plain = {n for n, m in module.named_modules() if type(m) in (nn.Linear, nn.Conv2d)}
        plain -= {f"{n}.{end}" for n in layers for end in ("base_layer", "lora_A.default", "lora_B.default")}
        wanted = {n for n in layers | plain if any(n == t or n.endswith("." + t) for t in targets)}
        if (there.r, float(there.lora_alpha)) != (lora.rank, float(lora.alpha)) or layers != wanted:
            ends = sorted({".".join(n.split(".")[-1 - n.split(".")[-1].isdigit() :]) for n in layers})
            raise UserError(
                f"the {part} has an adapter of rank {there.r}, alpha {there.lora_alpha} on {len(layers)} layers, which end "
                f"in {', '.join(ends)}; the configuration asks for rank {lora.rank}, alpha {lora.alpha} on {len(wanted)} "
                f"layers. To go on with the adapter, set lora.rank, lora.alpha and lora.{part}_targets to its own"
            )
        for layer in module.modules():
            if isinstance(layer, LoraLayer):  # the file's own dropout, or none, is not what is asked for
                layer.lora_dropout["default"] = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
        there.lora_dropout = lora.dropout
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()
        return
    check_lora_targets(module, targets, part)
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        init_lora_weights="gaussian",
    )
    module.add_adapter(config)  # type: ignore[operator]
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def prepare_training(
    model: Model,
    *,
    denoiser: Literal["lora", "full", "frozen"],
    text_encoder: Literal["frozen", "lora", "full"],
    lora: LoraConfig,
    frozen_dtype: str = "fp32",
    gradient_checkpointing: bool = False,
) -> None:
    """Freeze everything, cast all that is not trained in full, but the VAE, to `frozen_dtype`, and make trainable (float32)
    what is trained."""
    model.freeze()
    for module, how, part in (
        (model.denoiser, denoiser, "denoiser"),
        *((encoder, text_encoder, "text_encoder") for encoder in model.text_encoders),
    ):
        # What is trained, in full or as an adapter that is there already, must not be rounded to 16 bits first.
        exact = {name: p.data for name, p in module.named_parameters() if how == "lora" and ".lora_" in name}
        module.to(torch.float32 if how == "full" else DTYPES[frozen_dtype])
        for name, values in exact.items():
            module.get_parameter(name).data = values
        if how == "full":
            module.requires_grad_(True)
            if getattr(module, "pooler", None) is not None:  # of BERT and its kin; no denoiser reads it
                module.pooler.requires_grad_(False)
        elif how == "lora":
            add_lora(module, lora, lora_targets(model, lora, part), part)
        # A gradient for a text encoder passes through a frozen denoiser, whose activations are the most.
        if gradient_checkpointing and (how != "frozen" or part == "denoiser"):
            enable = getattr(module, "enable_gradient_checkpointing", None) or module.gradient_checkpointing_enable
            enable()


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """Numbers of parameters: (total, trainable)."""
    return (
        sum(p.numel() for p in module.parameters()),
        sum(p.numel() for p in module.parameters() if p.requires_grad),
    )

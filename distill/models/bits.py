"""Fewer bits: the denoiser in 16 bits, and the linear layers of denoiser and text encoders in 8 or 4 bits, by
bitsandbytes.

int8 is LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339) with its threshold of 6, nf4 the 4-bit NormalFloat of QLoRA
(Dettmers et al. 2023, arXiv 2305.14314) in blocks of 64: what stock loading does with a BitsAndBytesConfig of
load_in_8bit, or of load_in_4bit and bnb_4bit_quant_type nf4, which needs a GPU. Here each layer is replaced by hand, so
that it works on a CPU too. Convolutions stay as they are.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from distill.errors import UserError
from distill.models.adapters import DTYPES
from distill.models.family import Model

Bits = Literal["int8", "nf4"]
OUTLIER_THRESHOLD = 6.0
BLOCK = 64


class RoundedLinear(nn.Linear):
    """A layer with the values that nf4 holds, in the type that it computes in: it saves no memory where it runs.

    bitsandbytes (0.50) on a CPU takes wrong scales where rows are no multiple of a block, and says nothing.
    """


def fewer_bits(
    model: Model, dtype: Literal["fp32", "bf16", "fp16"], quantization: Literal["none", "int8", "nf4"]
) -> None:
    """Evaluate in `dtype`, with linear layers of `quantization`; changes the model in place."""
    if dtype != "fp32":
        denoise_in(model, DTYPES[dtype])
    if quantization != "none":
        quantize(model, quantization)


def denoise_in(model: Model, dtype: torch.dtype) -> None:
    """Hold the denoiser in a type of 16 bits and compute in it, in place; what it reads and gives stays float32.

    So text, noise, sampler and VAE are those of float32, and an image or a map differs by the denoiser's rounding
    alone.
    """
    name, place = model.family.timestep_input

    def cast(value: object) -> object:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def inputs(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, object]:
        return (
            tuple(value if i == place else cast(value) for i, value in enumerate(args)),
            {key: value if key == name else cast(value) for key, value in kwargs.items()},
        )

    def outputs(_: nn.Module, args: object, output: object) -> object:
        # Families and pipelines ask for a tuple.
        return tuple(value.float() for value in output) if isinstance(output, tuple) else output

    model.denoiser.to(dtype)
    model.denoiser.register_forward_pre_hook(inputs, with_kwargs=True)
    model.denoiser.register_forward_hook(outputs)


def check_finite(values: torch.Tensor, dtype: str, what: str) -> None:
    """Raise UserError if the denoiser's type of 16 bits gave numbers that are none. fp16 ends at 65,504."""
    if dtype != "fp32" and not bool(values.isfinite().all()):
        other = "bf16 or fp32" if dtype == "fp16" else "fp32"
        raise UserError(f"evaluation.dtype is {dtype}, and {what} are not finite; set it to {other}")


def quantize(model: Model, bits: Bits) -> None:
    """Replace the linear layers of denoiser and text encoders in place; their adapters stay as they are."""
    for module in (model.denoiser, *model.text_encoders):
        # T5 casts what it reads to the type of such a layer's weights, which would be that of packed bits.
        whole = set(getattr(module, "_keep_in_fp32_modules", None) or ())
        linear = [
            (name, layer)
            for name, layer in module.named_modules()
            if type(layer) is nn.Linear and ".lora_" not in f".{name}" and not whole & set(name.split("."))
        ]
        for name, layer in linear:
            parent, _, child = name.rpartition(".")
            new = _int8(layer) if bits == "int8" else _nf4(layer)
            new.train(layer.training)
            nn.Module.requires_grad_(new, False)
            setattr(module.get_submodule(parent), child, new)


def _int8(layer: nn.Linear) -> nn.Module:
    import bitsandbytes  # only on request: its import probes the GPU driver

    new: Any = bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, has_fp16_weights=False, threshold=OUTLIER_THRESHOLD, device="meta"
    )
    # From the CPU: what is on a GPU already, bitsandbytes would quantize only in the first forward pass.
    new.weight = bitsandbytes.nn.Int8Params(layer.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    returned: nn.Module = new.to(layer.weight.device)
    return returned


def _nf4(layer: nn.Linear) -> nn.Module:
    import bitsandbytes

    new: Any
    weight = layer.weight.data
    options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
    if weight.device.type == "cpu" and layer.in_features % BLOCK:
        numbers = nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
        packed, state = bitsandbytes.functional.quantize_4bit(numbers, blocksize=BLOCK, **options)
        rounded = bitsandbytes.functional.dequantize_4bit(packed, state).flatten()[: weight.numel()]
        new = RoundedLinear(layer.in_features, layer.out_features, device="meta")
        new.weight = nn.Parameter(rounded.view_as(weight).to(weight.dtype))
    else:
        new = bitsandbytes.nn.Linear4bit(
            layer.in_features, layer.out_features, compute_dtype=weight.dtype, device="meta", **options
        )
        new.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, blocksize=BLOCK, **options)
        new.support_avx512bf16_for_cpu = False  # it would compute in bf16
    new.bias = layer.bias
    returned: nn.Module = new.to(weight.device)
    return returned


def megabytes(model: Model) -> float:
    """Size of denoiser and text encoders in units of 1e6 bytes.

    A number takes 2 bytes. Quantized layers take the bytes of their numbers and of their scales.
    """
    total = 0
    for module in (model.denoiser, *model.text_encoders):
        rounded = {id(layer.weight) for layer in module.modules() if isinstance(layer, RoundedLinear)}
        for parameter in module.parameters():
            state = getattr(parameter, "quant_state", None)
            scales = state.absmax if state is not None else getattr(parameter, "SCB", None)
            if id(parameter) in rounded:
                total += -(-parameter.numel() // 2) + 4 * -(-parameter.numel() // BLOCK)
            elif scales is None:
                total += 2 * parameter.numel()
            else:
                total += parameter.numel() * parameter.element_size() + scales.numel() * scales.element_size()
    return total / 1e6

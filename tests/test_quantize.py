"""Linear layers in fewer bits: values against the papers' definitions, what is left alone, and how much it saves."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import bitsandbytes
import pytest
import torch
from tiny import tiny_sd, tiny_sdxl
from torch import nn
from transformers import T5Config, T5EncoderModel

from distill.attention.recording import record_attention
from distill.config import LoraConfig
from distill.models.adapters import parameter_counts, prepare_training
from distill.models.bits import RoundedLinear, megabytes, quantize
from distill.models.blocks import model_size
from distill.models.family import Model
from distill.models.loading import model_of

# QLoRA (Dettmers et al. 2023), appendix E.
NORMAL_FLOAT = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def linear_layers(model: Model) -> dict[str, nn.Module]:
    return {
        f"{i}.{name}": layer
        for i, module in enumerate((model.denoiser, *model.text_encoders))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    }


@torch.no_grad()
def output_of(model: Model) -> torch.Tensor:
    unet, added = model.denoiser, None
    embeds, pooled = model.encode(model.tokenize(["a small effusion", "no edema"]))
    if pooled is not None:
        added = {"text_embeds": pooled, "time_ids": torch.zeros(2, 6)}
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return unet(latents, torch.tensor([10, 700]), embeds, added_cond_kwargs=added).sample


def nearest_normal_float(weight: torch.Tensor) -> torch.Tensor:
    """By the definition: in blocks of 64, the nearest of 16 levels times the largest size."""
    levels, flat = torch.tensor(NORMAL_FLOAT), weight.flatten()
    out = torch.empty_like(flat)
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        scale = block.abs().max()
        out[start : start + 64] = levels[(block[:, None] / scale - levels).abs().argmin(dim=1)] * scale
    return out.view_as(weight)


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_nf4_is_the_nearest_of_its_levels_in_every_linear_layer(build: Callable[[], Any]) -> None:
    model = model_of(build()).freeze()
    before = {name: layer.weight.clone() for name, layer in linear_layers(model).items()}
    quantize(model, "nf4")
    after = linear_layers(model)
    assert before.keys() == after.keys()
    for name, layer in after.items():
        assert isinstance(layer, (bitsandbytes.nn.Linear4bit, RoundedLinear)) and not layer.weight.requires_grad
        columns = torch.eye(layer.in_features)
        values = layer(columns).T - (0 if layer.bias is None else layer.bias[:, None])
        torch.testing.assert_close(values, nearest_normal_float(before[name]), atol=1e-5, rtol=1e-4)


def test_the_model_computes_with_the_rounded_weights() -> None:
    """The quantized model gives what a plain one gives whose weights are the nearest levels."""
    rounded, quantized = model_of(tiny_sd()).freeze(), model_of(tiny_sd()).freeze()
    exact = output_of(rounded)
    for layer in linear_layers(rounded).values():
        layer.weight.data = nearest_normal_float(layer.weight.data)
    quantize(quantized, "nf4")
    torch.testing.assert_close(output_of(quantized), output_of(rounded), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(output_of(quantized), exact, atol=1e-3)


@pytest.mark.parametrize(("bits", "most"), [("int8", 0.02), ("nf4", 0.3)])
@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_outputs_and_maps_stay_near(build: Callable[[], Any], bits: Any, most: float) -> None:
    model = model_of(build()).freeze()
    with record_attention(model.denoiser) as recorded:
        exact = output_of(model)
    maps = dict(recorded.by_layer)
    quantize(model, bits)
    with record_attention(model.denoiser) as recorded:
        near = output_of(model)
    assert 0 < float((near - exact).norm() / exact.norm()) < most
    for name, found in recorded.by_layer.items():
        assert 0 < float((found - maps[name]).norm() / maps[name].norm()) < most


@pytest.mark.parametrize("shape", [(64, 8), (128, 33), (96, 96), (96, 3), (8, 5), (320, 64)])
@pytest.mark.parametrize("bits", ["int8", "nf4"])
def test_layers_of_any_shape(shape: tuple[int, int], bits: Any) -> None:
    """Width 96 is in the bundled base, where bitsandbytes on a CPU would take another block's scale."""
    torch.manual_seed(0)
    model = model_of(tiny_sd()).freeze()
    layer = model.text_encoders[0].extra = nn.Linear(*shape)
    nn.init.normal_(layer.weight, std=0.02)
    layer.weight.data *= torch.linspace(1, 9, shape[1])[:, None]  # rows, and so blocks, of other scales
    x = torch.randn(4, shape[0])
    rows = layer.weight.abs().amax(dim=1, keepdim=True)
    rounded = (layer.weight / rows * 127).round() * rows / 127 if bits == "int8" else nearest_normal_float(layer.weight)
    expected = nn.functional.linear(x, rounded, layer.bias)
    quantize(model, bits)
    found = model.text_encoders[0].extra(x)
    # int8 rounds the input too, to 1/127 of its largest
    tolerance = 0.02 * float(expected.detach().abs().max()) if bits == "int8" else 1e-5
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-4)


def test_adapters_stay_whole() -> None:
    model = model_of(tiny_sd())
    prepare_training(model, denoiser="lora", text_encoder="lora", lora=LoraConfig(rank=2))
    model.freeze()
    adapters = {k: v.clone() for k, v in model.denoiser.state_dict().items() if ".lora_" in k}
    quantize(model, "nf4")
    left = {k: v for k, v in model.denoiser.state_dict().items() if ".lora_" in k}
    assert left.keys() == adapters.keys() and all(torch.equal(left[k], v) for k, v in adapters.items())
    target = model.denoiser.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k")
    assert isinstance(target.base_layer, (bitsandbytes.nn.Linear4bit, RoundedLinear))
    assert output_of(model).isfinite().all()


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_stored_size(build: Callable[[], Any]) -> None:
    """2 bytes a number; of a quantized layer 1 and 4 a row, or a half (whole bytes) and 4 for each 64 numbers."""
    model = model_of(build()).freeze()
    modules = [model.denoiser, *model.text_encoders]
    numbers = sum(parameter_counts(module)[0] for module in modules)
    size = model_size(model, 64)
    shapes = [tuple(layer.weight.shape) for layer in linear_layers(model).values()]
    assert megabytes(model) == pytest.approx(2 * numbers / 1e6)
    for bits, cost in (
        ("int8", lambda rows, columns: rows * columns + 4 * rows),
        ("nf4", lambda rows, columns: -(-rows * columns // 2) + 4 * -(-rows * columns // 64)),
    ):
        fewer = model_of(build()).freeze()
        quantize(fewer, bits)
        expected = 2 * numbers + sum(cost(*shape) - 2 * shape[0] * shape[1] for shape in shapes)
        assert megabytes(fewer) == pytest.approx(expected / 1e6)
        assert model_size(fewer, 64) == size, "parameters are counted as numbers, not as bytes"


@pytest.mark.parametrize("kind", ["relu", "gated-gelu"])
def test_t5_keeps_the_layer_whose_type_it_reads(kind: str) -> None:
    """It casts what that layer reads to the type of its weights: of packed bits, the text would be noise."""
    torch.manual_seed(0)
    encoder = T5EncoderModel(
        T5Config(vocab_size=100, d_model=64, d_kv=32, num_heads=2, d_ff=128, num_layers=4, feed_forward_proj=kind)
    ).eval()
    ids = torch.randint(3, 100, (2, 12))
    exact = encoder(ids)[0].detach()
    model = cast(Any, SimpleNamespace(denoiser=torch.nn.Module(), text_encoders=[encoder]))
    quantize(model, "nf4")
    kinds = {name.split(".")[-1]: type(layer).__name__ for name, layer in encoder.named_modules() if "." in name}
    assert kinds["wo"] == "Linear" and kinds["q"] == kinds["o"] == "Linear4bit"
    assert float((encoder(ids)[0].detach() - exact).norm() / exact.norm()) < 0.3

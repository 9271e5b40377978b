"""What only a GPU can show: half precision, quantized layers, compiled kernels, and a whole comparison on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BitsAndBytesConfig, UNet2DConditionModel
from recipe import ROOT, recipe_module
from test_attention import attach_lora, inputs, int8, nf4, nothing
from tiny import save_tiny
from torch import nn

from distill.attention.recording import attention_layers, record_attention
from distill.cli import parse
from distill.config import BaseConfig, EvaluationConfig
from distill.evaluation.drawing import generate
from distill.models.bits import megabytes, quantize
from distill.models.loading import load_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
Change = Callable[[nn.Module], None]
QUANTIZED = os.environ.get("DISTILL_TEST_QUANTIZED") == "1"
"""Whether this is the process of the quantized layers: a fault in one of their kernels ends every later call of its
process."""


def test_quantized_layers_in_a_process_of_their_own() -> None:
    if QUANTIZED:
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "nf4 or int8", __file__]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"DISTILL_TEST_QUANTIZED": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.fixture
def unet(tmp_path: Path) -> nn.Module:
    return load_model(BaseConfig(name=str(save_tiny(tmp_path / "sd", "sd")))).freeze().denoiser


def on_gpu(unet: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """Inputs of a forward pass; timesteps are whole numbers, and move without a change of type."""
    return {
        key: value.to("cuda", dtype if value.is_floating_point() else value.dtype)
        for key, value in inputs(unet).items()  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("change", [nothing, attach_lora, nf4, int8])
@torch.no_grad()
def test_recording_leaves_the_output_and_gives_the_softmax(unet: Any, change: Change, dtype: torch.dtype) -> None:
    if change in (nf4, int8) and not QUANTIZED:
        pytest.skip("runs in a process of its own")
    change(unet)
    unet.to("cuda", dtype) if change in (nothing, attach_lora) else unet.to("cuda")
    call = on_gpu(unet, torch.float32 if change in (nf4, int8) else dtype)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        plain = unet(**call).sample
        with record_attention(unet) as maps:
            recorded = unet(**call).sample
    half = dtype != torch.float32 or change in (nf4, int8)
    torch.testing.assert_close(recorded, plain, atol=2e-2 if half else 1e-5, rtol=2e-2 if half else 1e-5)
    assert list(maps.by_layer) == attention_layers(unet)
    for probabilities in maps.by_layer.values():
        assert probabilities.dtype == torch.float32 and probabilities.is_cuda
        torch.testing.assert_close(probabilities.sum(-1), torch.ones_like(probabilities.sum(-1)), atol=1e-3, rtol=0)


@torch.no_grad()
def test_maps_are_those_of_the_cpu(unet: Any) -> None:
    with record_attention(unet) as here:
        unet(**inputs(unet))
    unet.to("cuda")
    with record_attention(unet) as there:
        unet(**on_gpu(unet, torch.float32))
    for name, maps in here.by_layer.items():
        torch.testing.assert_close(there.by_layer[name].cpu(), maps, atol=2e-3, rtol=0)  # convolutions in TF32


@pytest.mark.skipif(not QUANTIZED, reason="runs in a process of its own")
@pytest.mark.parametrize("bits", ["int8", "nf4"])
@torch.no_grad()
def test_fewer_bits_are_those_of_stock_loading_and_of_the_cpu(tmp_path: Path, bits: Any) -> None:
    folder = save_tiny(tmp_path / "sd", "sd")
    here, there = (load_model(BaseConfig(name=str(folder))).freeze() for _ in range(2))
    quantize(here, bits)
    there.to("cuda")
    quantize(there, bits)
    assert megabytes(there) == pytest.approx(megabytes(here))
    options = {"load_in_8bit": True} if bits == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    stock = UNet2DConditionModel.from_pretrained(
        folder / "unet", quantization_config=BitsAndBytesConfig(**options), torch_dtype=torch.float32
    )
    call = on_gpu(there.denoiser, torch.float32)
    expected = there.denoiser(**call).sample
    torch.testing.assert_close(stock(**call).sample.float(), expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(here.denoiser(**inputs(here.denoiser)).sample, expected.cpu(), atol=5e-2, rtol=5e-2)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_u_net_gives_the_same_maps(unet: Any) -> None:
    unet.to("cuda")
    call = on_gpu(unet, torch.float32)
    with record_attention(unet) as eager:
        unet(**call)
    compiled = torch.compile(unet)
    with record_attention(compiled) as maps:
        compiled(**call)
    assert list(maps.by_layer) == list(eager.by_layer)
    for name in maps.by_layer:
        torch.testing.assert_close(maps.by_layer[name], eager.by_layer[name], atol=2e-3, rtol=0)


def test_batch_size_does_not_change_an_image(tmp_path: Path) -> None:
    model = load_model(BaseConfig(name=str(save_tiny(tmp_path / "sd", "sd")))).to("cuda").freeze()
    captions = [f"a small pleural effusion, view {i}" for i in range(5)]
    config = EvaluationConfig(num_inference_steps=3).full()
    one, five = (
        generate(model, captions, list(range(5)), 64, config.model_copy(update={"batch_size": n})) for n in (1, 5)
    )
    torch.testing.assert_close(one.cpu(), five.cpu(), atol=1e-2, rtol=0)


def test_a_whole_comparison_runs_on_the_gpu(tmp_path: Path) -> None:
    """With what large models need: bf16, 8-bit AdamW, gradient checkpointing, loader processes."""
    taught = {"kind": "attention_distillation", "teacher": "frozen"}
    arms: dict[str, Any] = {
        "frozen": {},
        "learnable": {"text_encoder": "full"},
        "key_locked": {"text_encoder": "full", "method": {"kind": "key_lock"}},
        "distilled": {"text_encoder": "full", "method": taught},
        "gated": {"like": "distilled", "method": taught | {"gate_reference": "learnable", "gate_images": 4}},
        "lora": {"like": "distilled", "denoiser": "lora", "text_encoder": "lora"},
    }
    argv = [
        "--base.name", str(save_tiny(tmp_path / "sd", "sd")), "--output_dir", str(tmp_path / "run"),
        "--arms", json.dumps(arms), "--data.resolution", "64",
        "--data.train_size", "12", "--data.test_size", "8", "--data.validation_size", "4",
        "--data.cache_dir", str(tmp_path / "cache"),
        "--trainer.max_steps", "3", "--trainer.batch_size", "4", "--trainer.mixed_precision", "bf16",
        "--trainer.optimizer", "adamw8bit", "--trainer.gradient_checkpointing", "true", "--trainer.num_workers", "2",
        "--trainer.tracker", "none", "--evaluation.localization_images", "4", "--evaluation.generated_images", "4",
        "--evaluation.num_inference_steps", "2", "--evaluation.diversity_captions", "1",
        "--evaluation.diversity_samples", "2", "--evaluation.bootstrap_samples", "20",
    ]  # fmt: skip
    recipe = recipe_module("tradeoff")
    recipe.tradeoff(parse(recipe.TradeoffConfig, argv))
    metrics = json.loads((tmp_path / "run/metrics.json").read_text(encoding="utf-8"))
    assert metrics["provenance"]["device"] == torch.cuda.get_device_name()
    for name in arms:
        arm = metrics["arms"][name]
        assert arm["cost"]["steps"] == 3 and 0 < arm["cost"]["peak_memory_gb"] < 4
        assert arm["localization"]["word"]["auc"] is not None

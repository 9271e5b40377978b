"""The adapter file for ComfyUI, A1111 and kohya's scripts: its keys against lists made by hand, and stock diffusers."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_sd, tiny_sdxl
from torch import nn
from training import NO_DROPOUT, batch_of, context_of, generator, prepared
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from distill.config import BaseConfig
from distill.errors import UserError
from distill.methods import method_of
from distill.methods.key_lock import KeyLockOptions
from distill.models.export import export
from distill.models.kohya import KOHYA_FILE, kohya_name, original_name
from distill.models.loading import LORA_FILE, load_model
from distill.models.parts import check_weights_file

PROJECTIONS = [f"attn{n}_to_{part}" for n in (1, 2) for part in ("q", "k", "v", "out_0")]
SD_BLOCKS = [
    *(f"down_blocks_{stage}_attentions_{place}" for stage in (0, 1, 2) for place in (0, 1)),
    "mid_block_attentions_0",
    *(f"up_blocks_{stage}_attentions_{place}" for stage in (1, 2, 3) for place in (0, 1, 2)),
]
"""Of Stable Diffusion 1 and 2, as kohya's scripts, ComfyUI and A1111 name them."""
SDXL_BLOCKS = {
    **dict.fromkeys(("input_blocks_4_1", "input_blocks_5_1"), 2),
    **dict.fromkeys(("input_blocks_7_1", "input_blocks_8_1", "middle_block_1"), 10),
    **dict.fromkeys(("output_blocks_0_1", "output_blocks_1_1", "output_blocks_2_1"), 10),
    **dict.fromkeys(("output_blocks_3_1", "output_blocks_4_1", "output_blocks_5_1"), 2),
}
"""Of SDXL -> transformer layers."""
SD_ORIGINAL = {"middle_block.1", *(f"input_blocks.{n}.1" for n in (1, 2, 4, 5, 7, 8))} | {
    f"output_blocks.{n}.1" for n in range(3, 12)
}
"""The attention blocks of an original checkpoint of Stable Diffusion 1, to which ComfyUI and A1111 map diffusers'
names."""


@functools.cache
def sd15() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


@functools.cache
def sdxl() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), transformer_layers_per_block=(1, 2, 10),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2048, attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip


def layers_of(module: nn.Module, end: str = "") -> list[str]:
    kinds = (nn.Linear, nn.Conv2d)
    return [n for n, m in module.named_modules() if isinstance(m, kinds) and re.search(end, n)]


def names_of(part: str, layers: list[str], **options: Any) -> list[str]:
    return [kohya_name(part, layer, **options) for layer in layers]


def test_names_of_stable_diffusion_are_those_that_other_tools_know() -> None:
    attention = layers_of(sd15(), r"attn\d\.to_")
    expected = {f"lora_unet_{block}_transformer_blocks_0_{name}" for block in SD_BLOCKS for name in PROJECTIONS}
    assert len(expected) == 128
    names = names_of("unet", attention, sdxl=False, layers_per_block=2)
    assert set(names) == expected and len(names) == 128
    assert {original_name(layer, 2).split(".transformer")[0] for layer in attention} == SD_ORIGINAL


def test_names_of_sdxl_are_those_of_the_original_checkpoint() -> None:
    attention = layers_of(sdxl(), r"attn\d\.to_")
    expected = {
        f"lora_unet_{block}_transformer_blocks_{layer}_{name}"
        for block, layers in SDXL_BLOCKS.items()
        for layer in range(layers)
        for name in PROJECTIONS
    }
    names = names_of("unet", attention, sdxl=True, layers_per_block=2)
    assert set(names) == expected and len(names) == len(expected) == 560


@pytest.mark.parametrize(
    ("part", "is_sdxl", "prefix", "layers", "width", "kind"),
    [
        ("text_encoder", False, "lora_te_", 12, 768, CLIPTextModel),
        ("text_encoder", False, "lora_te_", 23, 1024, CLIPTextModel),
        ("text_encoder", True, "lora_te1_", 12, 768, CLIPTextModel),
        ("text_encoder_2", True, "lora_te2_", 32, 1280, CLIPTextModelWithProjection),
    ],
)
def test_names_of_text_encoders(part: str, is_sdxl: bool, prefix: str, layers: int, width: int, kind: Any) -> None:
    with torch.device("meta"):
        encoder = kind(CLIPTextConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64))
    found = layers_of(encoder, "self_attn")
    names = names_of(part, found, sdxl=is_sdxl, layers_per_block=2)
    start, ends = f"{prefix}text_model_encoder_layers", ("q", "k", "v", "out")
    assert set(names) == {f"{start}_{n}_self_attn_{end}_proj" for n in range(layers) for end in ends}


@pytest.mark.parametrize(
    ("unet", "pipeline", "is_sdxl"),
    [(sd15, StableDiffusionPipeline, False), (sdxl, StableDiffusionXLPipeline, True)],
    ids=["sd15", "sdxl"],
)
def test_stock_diffusers_finds_every_layer_of_the_real_u_nets(unet: Any, pipeline: Any, is_sdxl: bool) -> None:
    """Not of attention alone: lora.denoiser_targets may name any layer."""
    layers = layers_of(unet())
    state: dict[str, torch.Tensor] = {}
    for number, name in enumerate(names_of("unet", layers, sdxl=is_sdxl, layers_per_block=2)):
        ends = {"lora_down.weight": 0, "lora_up.weight": 1, "alpha": 2}
        state |= {f"{name}.{end}": torch.tensor(3.0 * number + place) for end, place in ends.items()}
    assert len(state) == 3 * len(layers)
    read, alphas = pipeline.lora_state_dict(state, unet_config=unet().config)
    found = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in read.items()})
    expected = {f"{name}.lora_{side}.weight" for name in layers for side in "AB"}
    assert found.keys() == expected and len(alphas) == len(layers)
    for number, name in enumerate(layers):
        assert (float(found[f"{name}.lora_A.weight"]), float(found[f"{name}.lora_B.weight"])) == (
            3 * number,
            3 * number + 1,
        )


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_the_file_has_alpha_beside_each_layer_and_says_its_kind_of_base(build: Any, tmp_path: Path) -> None:
    model = prepared(build, "lora", "lora")  # rank 2, alpha 4
    export(model, tmp_path)
    tensors = load_file(tmp_path / KOHYA_FILE)
    layers = {key.partition(".")[0] for key in tensors}
    assert tensors.keys() == {f"{n}.{end}" for n in layers for end in ("lora_down.weight", "lora_up.weight", "alpha")}
    assert 2 * len(layers) == len(load_file(tmp_path / LORA_FILE))
    for name in layers:
        assert tensors[f"{name}.alpha"].shape == () and float(tensors[f"{name}.alpha"]) == 4
        assert len(tensors[f"{name}.lora_down.weight"]) == 2
    with safe_open(tmp_path / KOHYA_FILE, "pt") as file:
        version = file.metadata()["ss_base_model_version"]
    assert version == ("sdxl_base_v1-0" if build is tiny_sdxl else "sd_v1")


def test_a_whole_alpha_is_read_as_a_number(tmp_path: Path) -> None:
    """kohya's scripts write one where no --network_alpha is given."""
    model = prepared(tiny_sd, "lora", "lora")
    export(model, tmp_path)
    tensors = load_file(tmp_path / KOHYA_FILE)
    whole = {name: value.to(torch.int64) if name.endswith(".alpha") else value for name, value in tensors.items()}
    save_file(whole, tmp_path / "whole.safetensors")
    base = BaseConfig(name=str(save_tiny(tmp_path / "base")))
    found, expected = (load_model(base, tmp_path / name) for name in ("whole.safetensors", KOHYA_FILE))
    own = dict(expected.denoiser.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in found.denoiser.named_parameters())
    check_weights_file(tmp_path / "whole.safetensors")
    save_file({"weight": torch.ones(2, dtype=torch.int64)}, tmp_path / "quantized.safetensors")
    with pytest.raises(UserError, match="is of type I64"):
        check_weights_file(tmp_path / "quantized.safetensors")


def test_adapters_of_locked_keys_have_their_own_rank_and_alpha(tmp_path: Path) -> None:
    """key_lock widens the adapters of to_k by a merge whose scale is 1."""
    torch.manual_seed(0)
    student = prepared(tiny_sd, "lora", "lora")
    method = method_of(KeyLockOptions(locked_tokens="all"), NO_DROPOUT)
    method.setup(student, context_of(log_dir=tmp_path))
    for name, parameter in method.named_parameters():
        if "lora_" in name and "frozen" not in name:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    method(batch_of(student), generator())
    method.finish()
    export(student, tmp_path)
    latents, states = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 16)
    found = [student.denoiser.eval()(latents, 500, states).sample]
    for name in (LORA_FILE, KOHYA_FILE):
        pipe = tiny_sd()
        pipe.load_lora_weights(tmp_path, weight_name=name)
        found.append(pipe.unet(latents, 500, states).sample)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=1e-5)
    alphas = {
        float(value) for key, value in load_file(tmp_path / KOHYA_FILE).items() if key.endswith("attn2_to_k.alpha")
    }
    assert alphas == {4.0}  # rank 2 + 2, scale 1

"""Whole checkpoints and adapters in one file, as ComfyUI and A1111 keep them, in place of folders."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_sd, tiny_sdxl
from torch import nn
from training import prepared

from distill.config import BaseConfig, FullEvaluation
from distill.errors import UserError
from distill.evaluation.drawing import generate
from distill.models.export import export
from distill.models.family import Model
from distill.models.kohya import KOHYA_FILE, original_name
from distill.models.loading import LORA_FILE, load_model

VAE = [
    (r"coder\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"coder.{m[1]}.{_level(m)}.block.{m[3]}"),
    (r"coder\.down_blocks\.(\d+)\.downsamplers\.0", lambda m: f"coder.down.{m[1]}.downsample"),
    (r"coder\.up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"coder.up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", lambda m: "mid.attn_1"),
    (r"attn_1\.to_(q|k|v)\b", lambda m: f"attn_1.{m[1]}"),
    (r"attn_1\.to_out\.0", lambda m: "attn_1.proj_out"),
    ("group_norm", lambda m: "norm"), ("conv_norm_out", lambda m: "norm_out"), ("conv_shortcut", lambda m: "nin_shortcut"),
]  # fmt: skip
"""Names of diffusers' VAE, of four stages -> those of the original checkpoint."""


def _level(found: re.Match[str]) -> int:
    return int(found[2]) if found[1] == "down" else 3 - int(found[2])


def clip_of(encoder: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """As the first text encoder is named, whose layers have the names of transformers."""
    return {
        f"{prefix}text_model.{key.removeprefix('text_model.')}": value for key, value in encoder.state_dict().items()
    }


OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding", "embeddings.token_embedding": "token_embedding",
    "encoder.layers": "transformer.resblocks", "final_layer_norm": "ln_final", "layer_norm": "ln_", "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def open_clip_of(encoder: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    """As SDXL's second text encoder is named: q, k and v are one matrix, and the projection is turned around."""
    tensors: dict[str, torch.Tensor] = {"logit_scale": torch.tensor(4.6)}  # which only training with images uses
    for key, value in encoder.state_dict().items():
        name = key.removeprefix("text_model.")
        for ours, theirs in OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        if found := re.fullmatch(r"(.+)\.([qkv])_proj\.(weight|bias)", name):
            whole = f"{found[1]}.in_proj_{found[3]}"
            tensors.setdefault(whole, torch.cat([torch.zeros_like(value)] * 3))
            tensors[whole].chunk(3)["qkv".index(found[2])].copy_(value)
        else:
            tensors[name.removesuffix(".weight") if name == "text_projection.weight" else name] = (
                value.T if name == "text_projection.weight" else value
            )
    return {prefix + key: value for key, value in tensors.items()}


def checkpoint_of(pipe: Any) -> dict[str, torch.Tensor]:
    """The pipeline of Stable Diffusion 1 or SDXL as one file, under the names of the original code."""
    tensors = {}
    for key, value in pipe.unet.state_dict().items():
        layer, _, end = key.rpartition(".")
        tensors[f"model.diffusion_model.{original_name(layer, pipe.unet.config.layers_per_block)}.{end}"] = value
    for key, value in pipe.vae.state_dict().items():
        for pattern, change in VAE:
            key = re.sub(pattern, change, key)
        linear = "attn_1" in key and value.ndim == 2
        tensors[f"first_stage_model.{key}"] = value[:, :, None, None] if linear else value
    if hasattr(pipe, "text_encoder_2"):
        tensors |= clip_of(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= open_clip_of(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        tensors |= clip_of(pipe.text_encoder, "cond_stage_model.transformer.")
    return {key: value.contiguous() for key, value in tensors.items()}


def made_in(folder: Path, pipe: Any) -> Path:
    """sd, a pipeline folder; sd.safetensors, the same as one file; configs, the folder without weights; run,
    adapters."""
    pipe.save_pretrained(folder / "sd")
    pipe = load_model(BaseConfig(name=str(folder / "sd"))).pipeline
    save_file(checkpoint_of(pipe), folder / "sd.safetensors")
    shutil.copytree(folder / "sd", folder / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    trained = prepared(lambda: pipe, "lora", "lora")
    for module in (trained.denoiser, *trained.text_encoders):
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data += 0.3 * torch.randn(parameter.shape)
    export(trained, folder / "run")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_in(tmp_path_factory.mktemp("single"), tiny_sd())


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """diffusers tells SDXL's text encoders in one file apart by their width: as in the original, they have two."""
    return made_in(tmp_path_factory.mktemp("sdxl"), tiny_sdxl(second_width=24))


@pytest.fixture(params=["sd", "sdxl"])
def either(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue("folder" if request.param == "sd" else "sdxl_folder")
    return found


def load(folder: Path, name: str, run: Path | None = None, config: str | None = None) -> Model:
    return load_model(BaseConfig(name=str(folder / name), single_file_config=config), run)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_whole_checkpoint_is_the_pipeline_that_it_was_made_of(either: Path) -> None:
    found, expected = load(either, "sd.safetensors", config=str(either / "configs")), load(either, "sd")
    assert found.family is expected.family and found.tokenize(["a b"])[0].equal(expected.tokenize(["a b"])[0])
    for one, other in zip(found.modules(), expected.modules(), strict=True):
        assert same_weights(one, other)
        assert {parameter.dtype for parameter in one.parameters()} == {torch.float32}
    config = FullEvaluation(num_inference_steps=2)
    ours, theirs = (generate(model, ["the pleural effusion"], [3], 64, config) for model in (found, expected))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("base", ["sd", "sd.safetensors"])
@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE])
def test_an_adapter_file_is_as_good_as_its_run_folder(either: Path, base: str, name: str) -> None:
    config = str(either / "configs") if base != "sd" else None
    expected, found = load(either, "sd", either / "run"), load(either, base, either / "run" / name, config)
    for one, other in zip(
        (found.denoiser, *found.text_encoders), (expected.denoiser, *expected.text_encoders), strict=True
    ):
        assert same_weights(one, other)
        scales = [
            {n: m.scaling["default"] for n, m in module.named_modules() if hasattr(m, "lora_A")}
            for module in (one, other)
        ]
        assert scales[0] == scales[1] and set(scales[0].values()) == {2.0}


@pytest.mark.parametrize(
    ("extra", "said", "expected"),
    [
        ((), None, ("epsilon", False)),
        (("v_pred",), None, ("v_prediction", False)),
        (("v_pred", "ztsnr"), None, ("v_prediction", True)),
        ((), "v", ("v_prediction", False)),
        ((), "epsilon", ("epsilon", False)),
    ],
)
@pytest.mark.parametrize("is_short", [False, True])
def test_a_file_that_predicts_v_is_trained_and_drawn_so(
    extra: tuple[str, ...], said: str | None, expected: tuple[str, bool], is_short: bool, folder: Path, tmp_path: Path
) -> None:
    """Its configs are those of any model of its shape. is_short: they do not name what the file changes, as those on the
    hub."""
    tensors = load_file(folder / "sd.safetensors") | {name: torch.tensor([]) for name in extra}
    metadata = None if said is None else {"modelspec.prediction_type": said}
    save_file(tensors, tmp_path / "v.safetensors", metadata)
    configs = shutil.copytree(folder / "configs", tmp_path / "configs")
    if is_short:
        path = configs / "scheduler/scheduler_config.json"
        unnamed = {"prediction_type", "rescale_betas_zero_snr"}
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k not in unnamed}))
    model = load_model(BaseConfig(name=str(tmp_path / "v.safetensors"), single_file_config=str(configs)))
    for scheduler in (model.noise_scheduler, model.pipeline.scheduler):
        assert (scheduler.config.prediction_type, scheduler.config.rescale_betas_zero_snr) == expected
    assert model.prediction_type == expected[0]
    assert (float(model.noise_scheduler.alphas_cumprod[-1]) == 0) == expected[1]


def test_an_edm_schedule_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "sd.safetensors") | {"edm_vpred.sigma_max": torch.tensor(120.0)}
    save_file(tensors, tmp_path / "edm.safetensors")
    assert "EDM schedule" in refusal(tmp_path, "edm.safetensors", config=str(folder / "configs"))


def refusal(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "MODEL.PT"])
def test_pickles_are_refused_with_the_reason(folder: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n")
    assert "is a pickle, which can run any code" in refusal(tmp_path, name)
    assert "is a pickle, which can run any code" in refusal(folder, "sd", tmp_path / name)


def test_without_configs_and_hub_one_message_says_what_to_give(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "give base.single_file_config, the folder of a diffusers pipeline" in refusal(folder, "sd.safetensors")
    assert "no folder ./nowhere" in refusal(folder, "sd.safetensors", config="./nowhere")


def test_files_of_another_kind_are_named(folder: Path, tmp_path: Path) -> None:
    assert "is an adapter, and no whole model" in refusal(folder / "run", KOHYA_FILE)
    assert "is no adapter file" in refusal(folder, "sd", folder / "sd.safetensors")
    save_file({"a.weight": torch.ones(2)}, tmp_path / "other.safetensors")
    assert "no whole checkpoint of Stable Diffusion or SDXL" in refusal(tmp_path, "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"abc")
    assert "damaged, or no safetensors file" in refusal(tmp_path, "damaged.safetensors")
    tensors = load_file(folder / "sd.safetensors")
    tensors.pop("model.diffusion_model.input_blocks.0.0.weight")
    save_file(tensors, tmp_path / "part.safetensors")
    assert "part.safetensors" in refusal(tmp_path, "part.safetensors", config=str(folder / "configs"))


def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(sdxl_folder: Path, tmp_path: Path) -> None:
    tensors = load_file(sdxl_folder / "sd.safetensors")
    del tensors["conditioner.embedders.1.model.text_projection"]
    save_file(tensors, tmp_path / "part.safetensors")
    said = refusal(tmp_path, "part.safetensors", config=str(sdxl_folder / "configs"))
    assert "lacks 1 weights of the text_encoder_2: text_projection.weight" in said


def test_an_adapter_with_an_alpha_of_0_or_of_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "run" / KOHYA_FILE)
    name = next(key for key in sorted(tensors) if key.endswith(".alpha"))
    save_file(tensors | {name: torch.tensor(0.0)}, tmp_path / "zero.safetensors")
    assert f"{name} is 0.0; expected a number above 0" in refusal(folder, "sd", tmp_path / "zero.safetensors")
    strange = {re.sub("down_blocks_0", "down_blocks_7", key): value for key, value in tensors.items()}
    save_file(strange, tmp_path / "strange.safetensors")
    assert "it is for another base" in refusal(folder, "sd", tmp_path / "strange.safetensors")

"""verify.py: what a base takes from adapter files of three layouts, and how much that changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import get_peft_model_state_dict
from recipe import recipe_module, refusal_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from training import prepared

from distill.cli import main
from distill.config import BaseConfig
from distill.errors import UserError
from distill.models import Model, load_model
from distill.models.export import export, fixed_output
from distill.models.kohya import KOHYA_FILE
from distill.models.loading import LORA_FILE
from distill.models.verify import configuration, verify


def base(folder: Path, kind: str, run: Path | None = None) -> Model:
    return load_model(BaseConfig(name=str(folder / kind)), run).freeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases sd and sdxl, a run on each of rank 2 and alpha 4, and peft, the denoiser's adapter of sd as peft writes
    it."""
    folder = tmp_path_factory.mktemp("verify")
    torch.manual_seed(0)
    for kind in ("sd", "sdxl"):
        save_tiny(folder / kind, kind)
        trained = prepared(lambda kind=kind: base(folder, kind).pipeline, "lora", "lora")
        for module in (trained.denoiser, *trained.text_encoders):
            for name, parameter in module.named_parameters():
                if "lora_" in name:
                    parameter.data += 0.3 * torch.randn(parameter.shape)
        export(trained, folder / f"{kind}-run")
        if kind == "sd":
            (folder / "peft").mkdir()
            state = get_peft_model_state_dict(trained.denoiser)
            state = {f"base_model.model.{key}": value.contiguous() for key, value in state.items()}
            save_file(state, folder / "peft" / "adapter_model.safetensors")
            (folder / "peft" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4.0}))
    return folder


def stock_change(folder: Path, kind: str) -> float:
    before, after = (fixed_output(base(folder, kind, run), "cpu") for run in (None, folder / f"{kind}-run"))
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("name", [LORA_FILE, KOHYA_FILE])
def test_each_layout_is_taken_whole_and_changes_the_output_as_stock_loading_does(
    folder: Path, kind: str, name: str
) -> None:
    path = folder / f"{kind}-run" / name
    found = verify(base(folder, kind), path)
    assert found.ignored == {} and found.loaded == len(load_file(path))
    assert found.layout == ("kohya" if name == KOHYA_FILE else "diffusers")
    assert found.output_change == pytest.approx(stock_change(folder, kind), rel=1e-4) and found.output_change > 0.01
    encoders = {"text_encoder", "text_encoder_2"} if kind == "sdxl" else {"text_encoder"}
    assert found.layers.keys() == encoders | {"unet.down_blocks", "unet.mid_block", "unet.up_blocks"}
    assert all(found.layers[name] == 8 for name in encoders)
    assert all(value > 0.01 for value in found.change.values())


def test_a_peft_folder_gives_the_denoisers_change(folder: Path) -> None:
    found, whole = verify(base(folder, "sd"), folder / "peft"), verify(base(folder, "sd"), folder / "sd-run")
    assert found.layout == "peft" and found.ignored == {}
    assert found.change == pytest.approx({k: v for k, v in whole.change.items() if k.startswith("unet")})


def test_the_change_of_a_rank_stabilized_adapter_has_its_own_scale(folder: Path) -> None:
    """alpha / sqrt(rank), Kalajdzievski 2023; the adapter has rank 2."""
    plain = verify(base(folder, "sd"), folder / "peft").change
    (folder / "rslora").mkdir()
    shutil.copy(folder / "peft" / "adapter_model.safetensors", folder / "rslora")
    said = json.dumps({"r": 2, "lora_alpha": 4.0, "use_rslora": True})
    (folder / "rslora" / "adapter_config.json").write_text(said)
    found = verify(base(folder, "sd"), folder / "rslora").change
    assert found == pytest.approx({name: value * 2**0.5 for name, value in plain.items()})


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.replace("down_blocks_0", "down_blocks_9"): value for key, value in tensors.items()}


def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.cat([v, v], dim=1) if "mid_block" in k and "down.weight" in k else v for k, v in tensors.items()}


def halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if not ("mid_block" in key and "up.weight" in key)}


def scaled(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return tensors | {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (renamed, "the base has no such layer"),
        (wider, "it is for a layer of shape"),
        (halved, "the other factor is missing"),
        (scaled, "dora_scale is nothing that low-rank adapters have"),
    ],
)
def test_what_is_ignored_is_named_with_the_reason(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], why: str
) -> None:
    tensors = change(load_file(folder / "sd-run" / KOHYA_FILE))
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    found = verify(base(folder, "sd"), tmp_path / "a.safetensors")
    assert found.ignored and all(why in reason for reason in found.ignored.values())
    assert found.loaded + len(found.ignored) == len(tensors)


def test_the_recipe_prints_text_or_json_and_refuses_what_nothing_is_taken_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe: Any = recipe_module("verify")
    argv = ["--base.name", str(folder / "sd"), "--adapter"]
    main(recipe.verify_adapter, recipe.VerifyConfig, [*argv, str(folder / "sd-run" / KOHYA_FILE)])
    text = capsys.readouterr().out
    total = len(load_file(folder / "sd-run" / KOHYA_FILE))
    assert f"layout of kohya: the base takes {total} of {total} tensors" in text and "text_encoder: 8 layers" in text
    main(recipe.verify_adapter, recipe.VerifyConfig, [*argv, str(folder / "sd-run"), "--as_json", "true"])
    assert json.loads(capsys.readouterr().out)["ignored"] == {}
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    asked = [*argv, str(tmp_path / "other.safetensors")]
    assert "takes nothing of" in refusal_of(recipe.verify_adapter, recipe.VerifyConfig, asked, capsys)
    missing = refusal_of(recipe.verify_adapter, recipe.VerifyConfig, argv[:2], capsys)
    assert "adapter is missing" in missing
    weights = str(folder / "sd" / "unet" / "diffusion_pytorch_model.safetensors")
    no_adapter = refusal_of(recipe.verify_adapter, recipe.VerifyConfig, [*argv, weights], capsys)
    assert "is no adapter file" in no_adapter


def read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return file.metadata(), load_file(path)


DAMAGED: dict[str, Any] = {
    "nan": lambda m, t: (m, {k: v * float("nan") for k, v in t.items()}),
    "json": lambda m, t: (m | {"lora_adapter_metadata": "{"}, t),
    "list": lambda m, t: (m | {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": [1]})}, t),
    "text": lambda m, t: (m | {"lora_adapter_metadata": json.dumps({"unet.alpha_pattern": {"to_q": "a"}})}, t),
    "alpha": lambda m, t: (m, t | {next(iter(t)).split(".lora")[0] + ".alpha": torch.ones(3)}),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_adapter_is_one_error(folder: Path, tmp_path: Path, damage: str) -> None:
    metadata, tensors = read(folder / "sd-run" / LORA_FILE)
    metadata, tensors = DAMAGED[damage](metadata, tensors)
    save_file(tensors, tmp_path / LORA_FILE, metadata)
    with pytest.raises(UserError):
        verify(base(folder, "sd"), tmp_path / LORA_FILE)


def test_factors_that_are_no_matrices_are_ignored_with_the_reason(folder: Path, tmp_path: Path) -> None:
    metadata, tensors = read(folder / "sd-run" / LORA_FILE)
    ups = [key for key in tensors if ".lora_B." in key or ".lora.up." in key]
    tensors[ups[0]] = tensors[ups[0]][:, 0].clone()
    save_file(tensors, tmp_path / LORA_FILE, metadata)
    found = verify(base(folder, "sd"), tmp_path / LORA_FILE)
    assert sum("which are no matrices" in reason for reason in found.ignored.values()) == 2


def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path) -> None:
    for content in ('["r"]', "3"):
        save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors", {"lora_adapter_metadata": content})
        with pytest.raises(UserError, match="its configuration is no JSON object"):
            configuration(tmp_path / "a.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors", {"lora_adapter_metadata": '{"r": 2}'})
    assert configuration(tmp_path / "a.safetensors") == {"r": 2}

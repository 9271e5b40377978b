"""What export writes gives, in a fresh process and by stock loaders only, the outputs of what was trained."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from recipe import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from distill.config import BaseConfig, LoraConfig
from distill.errors import UserError
from distill.models.adapters import prepare_training
from distill.models.export import export, prove_parity
from distill.models.family import Model
from distill.models.kohya import KOHYA_FILE
from distill.models.loading import LORA_FILE, load_model

CASES = ("sd-lora", "sd-text-only", "sd-full", "sd-mixed", "sd-wide", "sdxl-lora", "sdxl-full", "sdxl-wide")
WIDE = LoraConfig(
    denoiser_targets=("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "net.2", "time_emb_proj"),
    text_encoder_targets=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
)
"""Adapters on other layers than the projections of attention, as configs/sd/distill_steps.yaml has them."""
RANK, ALPHA = 4, 10.0

STOCK_SCRIPT = """
import sys
from pathlib import Path
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

folder = Path(sys.argv[1])
inputs = load_file(folder / "inputs.safetensors")

def outputs(pipe, sdxl):
    ids = inputs["ids"]
    with torch.no_grad():
        if not sdxl:
            embeds = pipe.text_encoder(ids)[0]
            sample = pipe.unet(inputs["latents"], inputs["timesteps"], embeds).sample
            return {"embeds": embeds, "sample": sample}
        first = pipe.text_encoder(ids, output_hidden_states=True)
        second = pipe.text_encoder_2(ids, output_hidden_states=True)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        added = {"text_embeds": second.text_embeds, "time_ids": inputs["time_ids"]}
        sample = pipe.unet(inputs["latents"], inputs["timesteps"], embeds, added_cond_kwargs=added).sample
        return {"embeds": embeds, "pooled": second.text_embeds, "sample": sample}

for case in sys.argv[2:]:
    sdxl, run = case.startswith("sdxl"), folder / case
    base = folder / ("sdxl" if sdxl else "sd")
    parts = {}
    for name, kind in (
        ("unet", UNet2DConditionModel),
        ("text_encoder", CLIPTextModel),
        ("text_encoder_2", CLIPTextModelWithProjection),
    ):
        if (run / name).is_dir():
            parts[name] = kind.from_pretrained(run / name)
    pipe = (StableDiffusionXLPipeline if sdxl else StableDiffusionPipeline).from_pretrained(base, **parts)
    if (run / "pytorch_lora_weights.safetensors").exists():
        pipe.load_lora_weights(run)
    found = outputs(pipe, sdxl)
    save_file({k: v.contiguous() for k, v in found.items()}, folder / (case + "-actual.safetensors"))
    if (run / "lora_for_comfyui_and_a1111.safetensors").exists():
        pipe.unload_lora_weights()
        pipe.load_lora_weights(run, weight_name="lora_for_comfyui_and_a1111.safetensors")
        found = outputs(pipe, sdxl)
        save_file({k: v.contiguous() for k, v in found.items()}, folder / (case + "-kohya.safetensors"))
"""


def load(folder: Path, kind: str, run: Path | None = None) -> Model:
    return load_model(BaseConfig(name=str(folder / kind)), run=run)


def make_trained(folder: Path, case: str) -> Model:
    """As after a training: every trainable parameter is random, so that nothing is a no-op."""
    kind, how = case.split("-", 1)
    method, text = {
        "lora": ("lora", "lora"),
        "wide": ("lora", "lora"),
        "text-only": ("frozen", "lora"),
        "full": ("full", "full"),
        "mixed": ("full", "lora"),
    }[how]
    model = load(folder, kind)
    lora = (WIDE if how == "wide" else LoraConfig()).model_copy(update={"rank": RANK, "alpha": ALPHA})
    torch.manual_seed(1)
    prepare_training(model, denoiser=method, text_encoder=text, lora=lora)  # type: ignore[arg-type]
    for module in (model.denoiser, *model.text_encoders):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                scale = 0.3 if "lora_" in name else 0.05
                parameter.data += scale * torch.randn(parameter.shape)
        module.eval()
    return model


@torch.no_grad()
def outputs(model: Model, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = inputs["ids"]
    if not model.family.reads_size:
        embeds = model.text_encoders[0](ids)[0]
        sample = model.denoiser(inputs["latents"], inputs["timesteps"], embeds).sample
        return {"embeds": embeds, "sample": sample}
    first, second = (encoder(ids, output_hidden_states=True) for encoder in model.text_encoders)
    embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    added = {"text_embeds": second.text_embeds, "time_ids": inputs["time_ids"]}
    sample = model.denoiser(inputs["latents"], inputs["timesteps"], embeds, added_cond_kwargs=added).sample
    return {"embeds": embeds, "pooled": second.text_embeds, "sample": sample}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the bases sd and sdxl, a run of each case, and what was trained gave: <case>-expected.safetensors."""
    folder = tmp_path_factory.mktemp("export")
    for kind in ("sd", "sdxl"):
        save_tiny(folder / kind, kind)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "latents": torch.randn(2, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([20, 800]),
        "ids": load(folder, "sd").tokenize(["large pleural effusion on the left", "no edema"])[0],
        "time_ids": torch.full((2, 6), 64.0),
    }
    save_file(inputs, folder / "inputs.safetensors")
    for kind in ("sd", "sdxl"):
        save_file(outputs(load(folder, kind), inputs), folder / f"{kind}-base.safetensors")
    for case in CASES:
        trained = make_trained(folder, case)
        save_file(outputs(trained, inputs), folder / f"{case}-expected.safetensors")
        export(trained, folder / case)
    return folder


@pytest.fixture(scope="module")
def fresh_process(folder: Path) -> Path:
    """The folder, after another process without this library has written <case>-actual.safetensors by stock loaders."""
    done = subprocess.run(
        [sys.executable, "-c", STOCK_SCRIPT, str(folder), *CASES],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_stock_loaders_in_a_fresh_process_give_the_trained_outputs(fresh_process: Path, case: str) -> None:
    expected = load_file(fresh_process / f"{case}-expected.safetensors")
    actual = load_file(fresh_process / f"{case}-actual.safetensors")
    base = load_file(fresh_process / f"{case.split('-')[0]}-base.safetensors")
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5)
        assert (value - base[name]).abs().max() > 0.02, "the training changed nothing, so that parity proves nothing"


@pytest.mark.parametrize("case", [case for case in CASES if "full" not in case])
def test_stock_diffusers_reads_the_file_for_other_tools_alike(fresh_process: Path, case: str) -> None:
    expected = load_file(fresh_process / f"{case}-expected.safetensors")
    actual = load_file(fresh_process / f"{case}-kohya.safetensors")
    assert expected.keys() == actual.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_our_own_loader_gives_the_trained_outputs(folder: Path, case: str) -> None:
    loaded = load(folder, case.split("-")[0], folder / case)
    actual = outputs(loaded, load_file(folder / "inputs.safetensors"))
    for name, value in load_file(folder / f"{case}-expected.safetensors").items():
        torch.testing.assert_close(actual[name], value, rtol=0, atol=1e-5)
    assert prove_parity(make_trained(folder, case), loaded, "cpu") <= 1e-5


FILES = {
    "sd-lora": {LORA_FILE, KOHYA_FILE},
    "sd-text-only": {LORA_FILE, KOHYA_FILE},
    "sd-full": {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
    },
    "sd-mixed": {"unet/config.json", "unet/diffusion_pytorch_model.safetensors", LORA_FILE, KOHYA_FILE},
    "sd-wide": {LORA_FILE, KOHYA_FILE},
    "sdxl-lora": {LORA_FILE, KOHYA_FILE},
    "sdxl-wide": {LORA_FILE, KOHYA_FILE},
    "sdxl-full": {
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/config.json",
        "text_encoder_2/model.safetensors",
    },
}


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_a_run_holds_exactly_these_files(folder: Path, case: str) -> None:
    assert files_in(folder / case) == FILES[case]
    assert not (folder / case / "export.partial").exists()


def read(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata()), {key: file.get_tensor(key) for key in list(file.keys())}


@pytest.mark.parametrize("case", ["sd-lora", "sdxl-lora"])
def test_the_file_has_canonical_keys_float32_tensors_and_alpha(folder: Path, case: str) -> None:
    metadata, tensors = read(folder / case / LORA_FILE)
    parts = ["unet", "text_encoder", *(["text_encoder_2"] if case.startswith("sdxl") else [])]
    assert {key.split(".")[0] for key in tensors} == set(parts)
    for part in parts[1:]:
        own = [key for key in tensors if key.startswith(f"{part}.")]
        assert all(key.startswith(f"{part}.text_model.encoder.layers.") for key in own)
        assert len(own) == 2 * 4 * 2  # layers, projections, sides
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    adapters = json.loads(metadata["lora_adapter_metadata"])
    for part in parts:
        assert (adapters[f"{part}.r"], adapters[f"{part}.lora_alpha"]) == (RANK, ALPHA)


@pytest.mark.parametrize("case", CASES)
def test_no_file_names_a_folder_of_this_machine(folder: Path, case: str) -> None:
    for name in files_in(folder / case):
        assert str(folder).encode() not in (folder / case / name).read_bytes(), name
    if (folder / case / LORA_FILE).exists():
        adapters = json.loads(read(folder / case / LORA_FILE)[0]["lora_adapter_metadata"])
        assert {v for k, v in adapters.items() if k.endswith("base_model_name_or_path")} == {case.split("-")[0]}
    if (folder / case / "unet").is_dir():
        config = json.loads((folder / case / "unet" / "config.json").read_text())
        assert config["_name_or_path"] == case.split("-")[0]
        assert config["cross_attention_dim"] == load(folder, case.split("-")[0]).denoiser.config.cross_attention_dim


@pytest.mark.parametrize("case", ["sd-lora", "sdxl-lora"])
def test_equal_runs_give_equal_bytes(folder: Path, tmp_path: Path, case: str) -> None:
    """The library orders the entries of metadata anew in each file; four files are alike by chance once in eight
    times."""
    for place in range(4):
        export(make_trained(folder, case), tmp_path / str(place))
    for name in FILES[case]:
        assert len({(tmp_path / str(place) / name).read_bytes() for place in range(4)}) == 1, name
    metadata, _ = read(tmp_path / "0" / LORA_FILE)
    adapters = json.loads(metadata["lora_adapter_metadata"])
    for part in ("unet", "text_encoder"):  # a set, whose order is another in each process
        assert adapters[f"{part}.target_modules"] == sorted(adapters[f"{part}.target_modules"])


@pytest.mark.parametrize(
    ("part", "case"), [("unet", "sd-lora"), ("text_encoder", "sd-lora"), ("text_encoder_2", "sdxl-lora")]
)
def test_another_alpha_in_the_file_makes_the_proof_fail(folder: Path, tmp_path: Path, part: str, case: str) -> None:
    metadata, tensors = read(folder / case / LORA_FILE)
    adapters = json.loads(metadata["lora_adapter_metadata"])
    adapters[f"{part}.lora_alpha"] = float(RANK)
    save_file(tensors, tmp_path / LORA_FILE, metadata | {"lora_adapter_metadata": json.dumps(adapters)})
    mutated = load(folder, case.split("-")[0], tmp_path)
    with pytest.raises(UserError, match="do not give the trained model's outputs"):
        prove_parity(make_trained(folder, case), mutated, "cpu")


def test_the_proof_allows_a_small_output_the_rounding_of_numbers_near_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder, "sd", None)
    outputs = iter([torch.full((2,), 0.01), torch.full((2,), 0.01 + 9e-6)])
    monkeypatch.setattr("distill.models.export.fixed_output", lambda model, device: next(outputs))
    assert prove_parity(model, model, "cpu") == pytest.approx(9e-6, rel=1e-3)
    outputs = iter([torch.full((2,), 0.01), torch.full((2,), 0.01 + 1.1e-5)])
    with pytest.raises(UserError, match="do not give the trained model's outputs"):
        prove_parity(model, model, "cpu")


def test_a_base_that_was_rounded_for_training_is_proved_as_strictly(folder: Path, tmp_path: Path) -> None:
    trained = make_trained(folder, "sd-lora")
    for module in (trained.denoiser, *trained.text_encoders):
        for name, parameter in module.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.bfloat16()
    export(trained, tmp_path)
    assert prove_parity(trained, load(folder, "sd", tmp_path), "cpu") <= 1e-5
    assert {value.dtype for value in read(tmp_path / LORA_FILE)[1].values()} == {torch.float32}


def full_disk(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def fail_at_adapters(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model.pipeline), "save_lora_weights", full_disk)


def fail_at_the_second_folder(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model.text_encoders[0], "save_pretrained", full_disk)


@pytest.mark.parametrize(
    ("case", "fail"),
    [("sd-lora", fail_at_adapters), ("sd-full", fail_at_the_second_folder), ("sd-mixed", fail_at_adapters)],
)
def test_an_export_that_fails_leaves_the_one_before_it_whole(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    fail: Callable[[Model, pytest.MonkeyPatch], None],
) -> None:
    trained = make_trained(folder, case)
    export(trained, tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in files_in(tmp_path)}
    assert before.keys() == FILES[case]
    for module in (trained.denoiser, *trained.text_encoders):
        for parameter in module.parameters():
            parameter.data += 1.0
    with monkeypatch.context() as context:
        fail(trained, context)
        with pytest.raises(OSError, match="No space left"):
            export(trained, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before

    export(trained, tmp_path)
    assert files_in(tmp_path) == FILES[case]
    assert all((tmp_path / name).read_bytes() != data for name, data in before.items() if name.endswith(".safetensors"))


def test_nothing_trainable_is_a_defect_of_the_caller(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing is trainable"):
        export(load(folder, "sd").freeze(), tmp_path)


def shipped_targets() -> list[tuple[str, tuple[str, ...]]]:
    """Configurations with layers of their own that get adapters."""
    found = []
    for path in sorted((ROOT / "recipes/configs").rglob("*.yaml")):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        for part in (config, *(config.get("arms") or {}).values()):
            if isinstance(part, str):  # a run folder, of compare.py
                continue
            if targets := (part.get("lora") or {}).get("denoiser_targets"):
                found.append((path.relative_to(ROOT / "recipes/configs").as_posix(), tuple(targets)))
    return found


@pytest.mark.parametrize(("name", "targets"), shipped_targets())
def test_adapters_of_shipped_configurations_load_back(
    name: str, targets: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    model = load(folder, "sdxl" if "sdxl" in name else "sd")
    lora = LoraConfig(rank=2, denoiser_targets=targets)
    prepare_training(model, denoiser="lora", text_encoder="frozen", lora=lora)
    for key, parameter in model.denoiser.named_parameters():
        if "lora_" in key:
            parameter.data += 0.2 * torch.randn(parameter.shape)
    export(model, tmp_path)
    assert prove_parity(model, load(folder, "sdxl" if "sdxl" in name else "sd", tmp_path), "cpu") < 1e-5

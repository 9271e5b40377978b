"""Loading, freezing, adapters and text encoding, on tiny pipelines and on full-size ones without weights."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from full_size import ARCHITECTURES, VAE_PARAMETERS, Architecture, full_size
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import save_tiny
from torch import nn
from training import context_of

from distill.attention.recording import attention_layers
from distill.config import BaseConfig, DenoisingConfig, LoraConfig, TrainerConfig
from distill.data.batch import Batch
from distill.data.phantom.dataset import PhantomDataset
from distill.data.rows import TrainingRows
from distill.errors import UserError
from distill.methods import method_of
from distill.methods.attention_distillation import check_same_shape
from distill.methods.options import DenoisingOptions
from distill.models.adapters import add_lora, check_lora_targets, lora_targets, parameter_counts, prepare_training
from distill.models.export import adapter_state, export
from distill.models.family import Model, text_faults
from distill.models.kohya import KOHYA_FILE
from distill.models.loading import LORA_FILE, load_model, model_of
from distill.trainer import fit, make_accelerator

CAPTIONS = ["Small pleural effusion in the left lower zone.", ""]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: save_tiny(folder / kind, kind) for kind in ("sd", "v", "sdxl")}


def load(path: Path, run: Path | None = None) -> Model:
    return load_model(BaseConfig(name=str(path)), run=run)


def refusal(path: str | Path, run: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_model(BaseConfig(name=str(path)), run=run)
    return str(caught.value)


@pytest.mark.parametrize(
    ("betas", "is_legal"),
    [([0.0, 1.0], True), ([0.1, 0.2], True), ([0.5], False), ([0.1, 1.01], False), ([-0.01, 0.1], False)],
)
def test_a_noise_schedule_has_steps_with_shares_of_noise(sd: Model, betas: list[float], is_legal: bool) -> None:
    schedule = DDPMScheduler(num_train_timesteps=len(betas), trained_betas=betas)
    faults = sd.family.part_faults(replace(sd, noise_scheduler=schedule))
    assert faults == ([] if is_legal else [
        "scheduler: its betas must be in 0 .. 1; look at beta_start, beta_end and trained_betas"
    ])  # fmt: skip


def test_a_tokenizer_makes_no_more_tokens_than_the_text_encoder_has_positions(
    sd: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    positions = sd.text_encoders[0].config.max_position_embeddings
    assert not text_faults(sd)
    monkeypatch.setattr(sd.tokenizers[0], "model_max_length", positions + 1)
    (fault,) = text_faults(sd)
    assert (
        f"model_max_length is {positions + 1}; expected a whole number of 3 to {positions}, the positions of" in fault
    )


def test_a_scheduler_without_a_share_of_signal_is_refused(sd: Model) -> None:
    faults = sd.family.part_faults(replace(sd, pipeline=SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler())))
    assert faults == [
        "scheduler: FlowMatchEulerDiscreteScheduler is of another kind than DDPM; expected one such as DDIMScheduler"
    ]


@dataclass(frozen=True)
class FullSize:
    """One architecture on the meta device, with default adapters attached after its parameters were counted."""

    published: Architecture
    model: Model
    counts: tuple[int, int, tuple[int, ...]]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def large(request: pytest.FixtureRequest) -> Iterator[FullSize]:
    model = full_size(request.param)
    counts = (
        parameter_counts(model.denoiser)[0],
        parameter_counts(model.vae)[0],
        tuple(parameter_counts(encoder)[0] for encoder in model.text_encoders),
    )
    prepare_training(model, denoiser="lora", text_encoder="lora", lora=LoraConfig(rank=8))
    yield FullSize(ARCHITECTURES[request.param], model, counts)


def test_full_size_has_the_published_number_of_parameters(large: FullSize) -> None:
    assert large.counts == (large.published.unet_parameters, VAE_PARAMETERS, large.published.text_parameters)
    assert large.model.prediction_type == large.published.prediction_type
    assert large.model.family.reads_size == (len(large.published.text_parameters) == 2)
    assert large.model.vae_factor == 8


def test_full_size_attention_layers_are_the_attn2_of_each_block_in_forward_order(large: FullSize) -> None:
    names = attention_layers(large.model.denoiser)
    blocks = [n for n, m in large.model.denoiser.named_modules() if type(m).__name__ == "BasicTransformerBlock"]
    assert len(names) == large.published.layers
    assert sorted(names) == sorted(f"{block}.attn2" for block in blocks)
    order = [("down_blocks", "mid_block", "up_blocks").index(name.split(".")[0]) for name in names]
    assert order == sorted(order)
    first = large.model.denoiser.get_submodule(names[0])
    assert first.to_k.in_features == large.published.unet["cross_attention_dim"]


def test_full_size_adapters_train_the_known_number_of_parameters(large: FullSize) -> None:
    trainable = parameter_counts(large.model.denoiser)[1]
    texts = tuple(parameter_counts(encoder)[1] for encoder in large.model.text_encoders)
    assert (trainable, texts) == (large.published.lora_unet, large.published.lora_text_encoders)
    assert parameter_counts(large.model.vae)[1] == 0


def test_full_size_adapter_keys_are_those_that_other_tools_read(large: FullSize) -> None:
    unet = set(adapter_state("unet", large.model.denoiser))
    blocks = [name.removesuffix(".attn2") for name in attention_layers(large.model.denoiser)]
    assert unet == {
        f"{block}.{attention}.{layer}.lora.{side}.weight"
        for block in blocks
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
        for side in ("down", "up")
    }
    for name, encoder, config in zip(
        ("text_encoder", "text_encoder_2"), large.model.text_encoders, large.published.text_encoders, strict=False
    ):
        assert set(adapter_state(name, encoder)) == {
            f"text_model.encoder.layers.{layer}.self_attn.{projection}.lora_linear_layer.{side}.weight"
            for layer in range(config["num_hidden_layers"])
            for projection in ("q_proj", "k_proj", "v_proj", "out_proj")
            for side in ("down", "up")
        }


def test_adapter_parameters_follow_from_the_layers_they_sit_on(large: FullSize) -> None:
    for module in (large.model.denoiser, *large.model.text_encoders):
        state = get_peft_model_state_dict(module)
        for name, tensor in state.items():
            if name.endswith("lora_A.weight"):
                layer = module.get_submodule(name.removesuffix(".lora_A.weight")).base_layer
                other = state[name.replace("lora_A", "lora_B")]
                assert tensor.shape == (8, layer.in_features) and other.shape == (layer.out_features, 8)


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_a_pipeline_folder_loads_in_float32(bases: dict[str, Path], kind: str) -> None:
    model = load(bases[kind])
    assert model.family.reads_size == (kind == "sdxl")
    assert model.prediction_type == ("v_prediction" if kind == "v" else "epsilon")
    assert model.max_tokens == 77 and model.vae_factor == 8
    assert {p.dtype for m in model.modules() for p in m.parameters()} == {torch.float32}
    assert [ids.shape for ids in model.tokenize(CAPTIONS)] == [(2, 77)] * (2 if kind == "sdxl" else 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_text_embeddings_are_those_of_the_stock_pipeline(bases: dict[str, Path], kind: str) -> None:
    model = load(bases[kind])
    captions = [CAPTIONS[0], "no pneumothorax", "words " * 100]
    embeds, pooled = model.encode(model.tokenize(captions))
    if kind == "sdxl":
        expected, _, expected_pooled, _ = model.pipeline.encode_prompt(
            captions, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        assert torch.equal(pooled, expected_pooled)
    else:
        expected, _ = model.pipeline.encode_prompt(captions, "cpu", 1, False)
        assert pooled is None
    assert torch.equal(embeds, expected)
    assert not torch.equal(embeds[0], embeds[1])


def test_freeze_leaves_nothing_trainable_and_nothing_in_training_mode(bases: dict[str, Path]) -> None:
    model = load(bases["sdxl"])
    for module in model.modules():
        module.requires_grad_(True).train()
    assert model.freeze() is model
    assert not any(p.requires_grad for m in model.modules() for p in m.parameters())
    assert not any(part.training for m in model.modules() for part in m.modules())


@pytest.mark.parametrize("method", ["lora", "full", "frozen"])
@pytest.mark.parametrize("text_encoder", ["lora", "full", "frozen"])
def test_only_what_was_asked_for_is_trainable_and_it_is_float32(
    bases: dict[str, Path], method: str, text_encoder: str
) -> None:
    model = load(bases["sdxl"])
    prepare_training(
        model,
        denoiser=method,  # type: ignore[arg-type]
        text_encoder=text_encoder,  # type: ignore[arg-type]
        lora=LoraConfig(rank=2),
        frozen_dtype="bf16",
    )
    assert not any(p.requires_grad for p in model.vae.parameters()) and model.vae.dtype == torch.float32
    hows = [method] + [text_encoder] * 2
    for module, how in zip([model.denoiser, *model.text_encoders], hows, strict=True):
        for name, parameter in module.named_parameters():
            assert parameter.requires_grad == (how == "full" or (how == "lora" and "lora_" in name)), name
            assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
        assert any("lora_" in name for name, _ in module.named_parameters()) == (how == "lora")


@pytest.mark.parametrize("how", ["lora", "frozen"])
def test_an_adapter_that_trains_on_is_not_rounded(bases: dict[str, Path], how: str) -> None:
    """One that stays frozen is in 16 bits, as all frozen weights."""
    model, lora = load(bases["sd"]), LoraConfig(rank=2)
    prepare_training(model, denoiser="lora", text_encoder="lora", lora=lora)
    parts = [model.denoiser, *model.text_encoders]
    torch.manual_seed(0)
    for module in parts:
        for _, parameter in trainable(module):
            parameter.data.normal_()
    before = [{n: p.detach().clone() for n, p in trainable(module)} for module in parts]
    prepare_training(model, denoiser=how, text_encoder=how, lora=lora, frozen_dtype="bf16")  # type: ignore[arg-type]
    for module, values in zip(parts, before, strict=True):
        for name, parameter in module.named_parameters():
            exact = how == "lora" and name in values
            assert parameter.dtype == (torch.float32 if exact else torch.bfloat16) and parameter.requires_grad == exact
            assert not exact or torch.equal(parameter, values[name])


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DDIMScheduler])
def test_latents_are_not_clipped_unless_the_base_says_so(bases: dict[str, Path], kind: Any) -> None:
    """DDPMScheduler's own default is to clip, as for pixels; Euler's configuration has no such option."""
    pipeline = load(bases["sd"]).pipeline
    pipeline.scheduler = kind(beta_schedule="scaled_linear")
    assert model_of(pipeline).noise_scheduler.config.clip_sample == (kind is DDIMScheduler)


def test_a_fresh_adapter_changes_nothing_until_it_is_trained(bases: dict[str, Path]) -> None:
    model, base = load(bases["sd"]), load(bases["sd"])
    prepare_training(model, denoiser="lora", text_encoder="lora", lora=LoraConfig())
    ids = base.tokenize(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(model.encode(ids)[0], base.encode(ids)[0])


def test_a_lora_target_that_matches_nothing_is_answered_with_those_that_would(bases: dict[str, Path]) -> None:
    model = load(bases["sd"])
    with pytest.raises(UserError) as caught:
        add_lora(model.denoiser, LoraConfig(), ("to_q", "to_querry", "o_q"), "denoiser")
    message = str(caught.value)
    assert message.startswith("lora.denoiser_targets: to_querry, o_q match no layer") and "\n" not in message
    assert {"to_q", "to_k", "to_v", "to_out.0"} <= set(re.split(r"[ ,]+", message))
    assert not any("lora_" in name for name, _ in model.denoiser.named_parameters())
    with pytest.raises(UserError, match="lora.text_encoder_targets: to_q match no layer.*q_proj"):
        add_lora(model.text_encoders[0], LoraConfig(), ("to_q",), "text_encoder")


def test_a_peft_that_transformers_refuses_is_said_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.models.adapters.MIN_PEFT_VERSION", "999.0.0")
    with pytest.raises(UserError, match=r"transformers .* does not work with the installed peft .*999\.0\.0"):
        check_lora_targets(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["0"], "denoiser")


def test_a_missing_folder_and_a_folder_of_something_else_are_named(tmp_path: Path) -> None:
    assert f"no folder {tmp_path / 'nowhere'}" in refusal(tmp_path / "nowhere")
    assert "no folder ./nowhere" in refusal("./nowhere")
    (tmp_path / "notes.txt").write_text("no model")
    assert "not a diffusers pipeline folder (it has no model_index.json)" in refusal(tmp_path)


def test_an_unreachable_hub_is_said_to_be_unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("someone/some-model")
    assert "cannot load someone/some-model" in message and "hub reachable" in message
    assert "cannot load not a name" in refusal("not a name")


def test_another_kind_of_pipeline_is_named(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4, layers_per_block=1,
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    known = "StableDiffusionPipeline, StableDiffusionXLPipeline"
    assert f"DDPMPipeline is of no known model family; supported: {known}" in refusal(tmp_path)


def trained_run(base: Path, folder: Path, *, denoiser: str, text_encoder: str) -> Path:
    model = load(base)
    prepare_training(model, denoiser=denoiser, text_encoder=text_encoder, lora=LoraConfig(rank=2))  # type: ignore[arg-type]
    export(model, folder)
    return folder


@pytest.mark.parametrize(("base", "other"), [("sd", "sdxl"), ("sdxl", "sd")])
def test_a_run_of_another_base_is_refused(bases: dict[str, Path], tmp_path: Path, base: str, other: str) -> None:
    full = trained_run(bases[base], tmp_path / "full", denoiser="full", text_encoder="frozen")
    message = refusal(bases[other], full)
    assert f"{full / 'unet'} does not fit the base" in message and "\n" not in message
    lora = trained_run(bases[base], tmp_path / "lora", denoiser="lora", text_encoder="lora")
    message = refusal(bases[other], lora)
    assert str(lora / LORA_FILE) in message and "base" in message and "\n" not in message


def test_a_run_folder_that_is_missing_empty_or_damaged_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    assert refusal(bases["sd"], tmp_path / "run") == f"no run folder {tmp_path / 'run'}"
    assert "holds neither pytorch_lora_weights.safetensors nor a folder unet" in refusal(bases["sd"], tmp_path)
    lora = trained_run(bases["sd"], tmp_path / "lora", denoiser="lora", text_encoder="frozen") / LORA_FILE
    lora.write_bytes(lora.read_bytes()[:-100])
    assert str(lora) in refusal(bases["sd"], lora.parent)
    full = trained_run(bases["sd"], tmp_path / "full", denoiser="full", text_encoder="frozen")
    weights = full / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(full / "unet") in refusal(bases["sd"], full)


def test_an_adapter_file_that_lacks_tensors_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    """Stock loading leaves what is missing at its random start, and only logs a warning."""
    lora = trained_run(bases["sd"], tmp_path, denoiser="lora", text_encoder="lora") / LORA_FILE
    with safe_open(lora, "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in list(file.keys())}
    kept = {key: value for key, value in tensors.items() if not key.endswith("attn2.to_k.lora.up.weight")}
    assert len(kept) < len(tensors)
    save_file(kept, lora, metadata)
    assert f"{len(kept)} tensors in the file, {len(tensors)} found a place" in refusal(bases["sd"], tmp_path)


def test_teacher_and_student_of_other_shape_are_refused_with_the_values(bases: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="the teacher is a sdxl model, and the student a stable_diffusion model"):
        check_same_shape(load(bases["sdxl"]), load(bases["sd"]))
    wider = load(bases["sd"])
    wider.denoiser.register_to_config(cross_attention_dim=32)
    with pytest.raises(
        UserError, match="teacher and student are of different shape: cross_attention_dim: teacher 32, student 16"
    ):
        check_same_shape(wider, load(bases["sd"]))
    check_same_shape(load(bases["v"]), load(bases["sd"]))
    other = load(bases["sd"])
    other.noise_scheduler = DDPMScheduler(beta_start=0.001, beta_end=0.02)
    with pytest.raises(UserError, match="their noise schedules differ"):
        check_same_shape(other, load(bases["sd"]))


def test_a_run_folder_puts_back_what_was_trained(bases: dict[str, Path], tmp_path: Path) -> None:
    trained = load(bases["sdxl"])
    prepare_training(trained, denoiser="full", text_encoder="full", lora=LoraConfig())
    untouched = copy.deepcopy(trained.vae.state_dict())
    with torch.no_grad():
        for module in (trained.denoiser, *trained.text_encoders):
            for parameter in module.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
    export(trained, tmp_path)
    loaded = load(bases["sdxl"], tmp_path)
    for ours, theirs in zip(
        [trained.denoiser, *trained.text_encoders], [loaded.denoiser, *loaded.text_encoders], strict=True
    ):
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    assert all(torch.equal(value, untouched[key]) for key, value in loaded.vae.state_dict().items())
    assert loaded.pipeline.unet is loaded.denoiser and loaded.pipeline.text_encoder_2 is loaded.text_encoders[1]


@pytest.mark.slow
def test_sd15_at_full_size_takes_a_real_lora_step_on_the_cpu(tmp_path: Path) -> None:
    """About 6 GB of memory: 4.3 GB of float32 weights, and the activations of one 64 px image."""
    torch.manual_seed(0)
    model = full_size("sd15", device="cpu")
    prepare_training(model, denoiser="lora", text_encoder="lora", lora=LoraConfig(rank=4, alpha=8.0))
    before = {n: p.detach().clone() for m in (model.denoiser, *model.text_encoders) for n, p in trainable(m)}
    frozen = {name: p.detach().clone() for name, p in list(model.denoiser.named_parameters())[:4]}
    config = TrainerConfig(max_steps=1, batch_size=1, tracker="none", log_every_steps=1)
    rows = TrainingRows(PhantomDataset("train", 2, 0, 64), model)
    method = method_of(DenoisingOptions(), DenoisingConfig(caption_dropout=0.0))
    method.setup(model, context_of())
    shared = {"accelerator": make_accelerator(config, tmp_path), "output_dir": tmp_path, "seed": 0}
    result = fit(method, rows, config, collate=Batch.stack, **shared)
    row = json.loads((tmp_path / "train_log.jsonl").read_text())
    assert 0 < row["loss"] < 10 and row["grad_norm"] > 0
    assert result.trainable_parameters == 797_184 + 294_912
    after = {n: p for m in (model.denoiser, *model.text_encoders) for n, p in trainable(m)}
    # The first gradient of lora_A is exactly 0, since lora_B starts at 0.
    assert all(not torch.equal(after[n], before[n]) for n in before if "lora_B" in n)
    assert all(torch.equal(model.denoiser.get_parameter(name), value) for name, value in frozen.items())


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]


def test_an_adapter_that_is_there_is_gone_on_with(bases: dict[str, Path]) -> None:
    lora = LoraConfig(rank=2, alpha=4.0)
    model = load(bases["sd"]).freeze()
    add_lora(model.denoiser, lora, lora_targets(model, lora, "denoiser"), "denoiser")
    before = {name: p.detach().clone() for name, p in model.denoiser.named_parameters()}
    model.freeze()
    add_lora(model.denoiser, lora, lora_targets(model, lora, "denoiser"), "denoiser")
    assert all(torch.equal(p, before[name]) for name, p in model.denoiser.named_parameters())
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.denoiser.named_parameters())
    model.denoiser.half()
    add_lora(model.denoiser, lora, lora_targets(model, lora, "denoiser"), "denoiser")
    assert {p.dtype for _, p in trainable(model.denoiser)} == {torch.float32}, "half-precision weights train badly"
    with pytest.raises(
        UserError, match=r"an adapter of rank 2, alpha 4.* set lora.rank, lora.alpha and lora.denoiser_targets"
    ):
        add_lora(model.denoiser, lora.model_copy(update={"rank": 3}), lora_targets(model, lora, "denoiser"), "denoiser")


def test_the_pooler_of_a_text_encoder_is_not_trained(sd: Model) -> None:
    """BERT and its kin have one, and no denoiser reads it: its weights would only decay."""
    encoder = nn.ModuleDict({"layer": nn.Linear(2, 2), "pooler": nn.Linear(2, 2)})
    encoder.pooler = encoder["pooler"]
    model = replace(sd, text_encoders=[encoder])  # type: ignore[list-item]
    prepare_training(model, denoiser="frozen", text_encoder="full", lora=LoraConfig())
    assert {name for name, p in encoder.named_parameters() if p.requires_grad} == {"layer.weight", "layer.bias"}


def test_an_adapter_file_of_another_tool_is_gone_on_with(bases: dict[str, Path], tmp_path: Path) -> None:
    """It names each layer in full; those of SDXL's two text encoders have other names."""
    lora = LoraConfig(rank=2, alpha=4.0)
    model = load(bases["sdxl"])
    prepare_training(model, denoiser="lora", text_encoder="lora", lora=lora)
    export(model, tmp_path / "run")
    for file in (tmp_path / "run", tmp_path / "run" / KOHYA_FILE):
        again = load_model(BaseConfig(name=str(bases["sdxl"])), file)
        prepare_training(again, denoiser="lora", text_encoder="lora", lora=lora)
        assert all(trainable(module) for module in (again.denoiser, *again.text_encoders))
    again = load_model(BaseConfig(name=str(bases["sdxl"])), tmp_path / "run" / KOHYA_FILE)
    fewer = lora.model_copy(update={"denoiser_targets": ("to_q",)})
    with pytest.raises(UserError, match=r"which end in to_k, to_out.0, to_q, to_v; .*alpha 4.0 on"):
        prepare_training(again, denoiser="lora", text_encoder="lora", lora=fewer)


@pytest.mark.parametrize("kind", ["use_dora", "use_rslora"])
def test_adapters_that_would_be_exported_wrongly_are_not_trained_on(kind: str, bases: dict[str, Path]) -> None:
    model = load(bases["sd"]).freeze()
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    model.denoiser.add_adapter(PeftLoraConfig(r=2, lora_alpha=4, target_modules=targets, **{kind: True}))
    with pytest.raises(UserError, match=r"an adapter of (DoRA|rsLoRA), which cannot be trained further"):
        add_lora(model.denoiser, LoraConfig(rank=2, alpha=4.0), targets, "denoiser")


def test_a_frozen_denoiser_keeps_few_activations_for_a_text_encoder(bases: dict[str, Path]) -> None:
    for asked in (True, False):
        model = load(bases["sd"])
        prepare_training(
            model, denoiser="frozen", text_encoder="lora", lora=LoraConfig(rank=2), gradient_checkpointing=asked
        )
        assert model.denoiser.is_gradient_checkpointing == asked
        assert model.text_encoders[0].is_gradient_checkpointing == asked


def test_epsilon_at_no_signal_is_refused(sd: Model) -> None:
    config = dict(sd.noise_scheduler.config)
    config.pop("_use_default_values", None)
    for kind, is_legal in (("epsilon", False), ("v_prediction", True)):
        scheduler = type(sd.noise_scheduler).from_config(
            config | {"rescale_betas_zero_snr": True, "prediction_type": kind}
        )
        model = replace(sd, noise_scheduler=scheduler)
        if is_legal:
            model.family.check_loaded(model)
            continue
        with pytest.raises(UserError, match="predicts epsilon, and its schedule ends without signal"):
            model.family.check_loaded(model)

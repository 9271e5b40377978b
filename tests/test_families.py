"""What every model family must do, on Stable Diffusion, SDXL and a toy third family of one file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from tiny import tiny_sd, tiny_sdxl
from torch import nn
from toy_family import FAMILY, ToyPipeline, toy_model

from distill.attention.recording import attention_layers, record_attention
from distill.config import FullEvaluation, LoraConfig
from distill.data.phantom.dataset import PhantomDataset
from distill.errors import UserError
from distill.evaluation.localization import localization
from distill.models import Conditions, Model, denoiser_of, families, family_of_denoiser, family_of_pipeline, model_of
from distill.models.adapters import parameter_counts, prepare_training
from distill.models.bits import quantize
from distill.models.blocks import model_size, pruned_unet
from distill.models.export import export, prove_parity
from distill.models.loading import LORA_FILE, load_run

ROOT = Path(__file__).parents[1]


def sdxl_v() -> Model:
    model = model_of(tiny_sdxl())
    model.noise_scheduler = DDPMScheduler.from_config(model.noise_scheduler.config, prediction_type="v_prediction")
    return model


MODELS: dict[str, Callable[[], Model]] = {
    "sd epsilon": lambda: model_of(tiny_sd()),
    "sd v": lambda: model_of(tiny_sd("v_prediction")),
    "sdxl epsilon": lambda: model_of(tiny_sdxl()),
    "sdxl v": sdxl_v,
    "toy flow": toy_model,
}
THREE = ("sd epsilon", "sdxl epsilon", "toy flow")


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]().freeze()


@pytest.fixture(params=THREE)
def one_of_three(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]().freeze()


def example(model: Model, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
    """Example inputs, with random values for latents and text."""
    latents, timesteps, conditions = model.family.example_inputs(model, batch, 8)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(conditions.embeds.shape, generator=generator)
    return torch.randn(latents.shape, generator=generator), timesteps, replace(conditions, embeds=embeds)


# --- schedule -----------------------------------------------------------------------------------------------------


def test_clean_and_noise_invert_add_noise_at_every_timestep(model: Model) -> None:
    family, generator = model.family, torch.Generator().manual_seed(0)
    timesteps = torch.arange(family.num_timesteps(model))
    latents, noise = (torch.randn(len(timesteps), 4, 2, 2, generator=generator) for _ in range(2))
    noisy = family.add_noise(model, latents, noise, timesteps)
    target = family.target(model, latents, noise, timesteps)
    found = family.clean_and_noise(model, target, noisy, timesteps)
    torch.testing.assert_close(found[0], latents, rtol=0, atol=2e-5)
    torch.testing.assert_close(found[1], noise, rtol=0, atol=2e-5)
    moved = (noisy - latents).pow(2).mean(dim=(1, 2, 3))
    assert moved[:10].mean() < 0.02 and moved[-10:].mean() > 1, "the last timesteps have the most noise"


def test_timesteps_are_drawn_from_all_of_the_schedule(model: Model) -> None:
    drawn = model.family.draw_timesteps(model, 20_000, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64 and drawn.shape == (20_000,)
    assert (int(drawn.min()), int(drawn.max())) == (0, model.family.num_timesteps(model) - 1)


def test_a_prediction_that_a_family_cannot_train_is_refused() -> None:
    for make in MODELS.values():
        made = make()
        made.family.check(made)
    other = model_of(tiny_sd("sample"))
    with pytest.raises(UserError, match="the base predicts 'sample'; epsilon and v_prediction are supported"):
        other.family.check(other)


def test_schedules_are_the_same_only_if_every_noise_level_is(model: Model) -> None:
    other = replace(model, noise_scheduler=type(model.noise_scheduler)(num_train_timesteps=500))
    assert model.family.same_schedule(model, model) and not model.family.same_schedule(model, other)


# --- text and forward pass ----------------------------------------------------------------------------------------


def test_the_denoiser_reads_latents_time_and_text(one_of_three: Model) -> None:
    model, family = one_of_three, one_of_three.family
    latents, timesteps, conditions = example(model)
    embeds, pooled = model.encode(model.tokenize(["a small effusion", ""]))
    assert embeds.shape == conditions.embeds.shape
    assert (pooled is None) == (conditions.pooled is None) == (conditions.size_ids is None) == (not family.reads_size)
    assert pooled is None or (conditions.pooled is not None and pooled.shape == conditions.pooled.shape)

    def predict(*inputs: Any) -> torch.Tensor:
        with torch.no_grad():
            return family.predict(model.denoiser, *inputs)

    base = predict(latents, timesteps, conditions)
    assert base.shape == latents.shape
    for changed in (
        (latents + 0.1, timesteps, conditions),
        (latents, timesteps - 100, conditions),
        (latents, timesteps, replace(conditions, embeds=conditions.embeds + torch.randn(conditions.embeds.shape))),
    ):
        assert not torch.allclose(predict(*changed), base)
    model.denoiser.to(torch.bfloat16)
    assert predict(latents, timesteps, conditions).dtype == torch.bfloat16


def test_sdxl_reads_the_size_and_says_what_is_missing() -> None:
    model = model_of(tiny_sdxl()).freeze()
    latents, timesteps, conditions = example(model)
    assert conditions.size_ids is not None
    with torch.no_grad():
        base, larger = (
            model.family.predict(model.denoiser, latents, timesteps, replace(conditions, size_ids=ids))
            for ids in (conditions.size_ids, 2 * conditions.size_ids)
        )
    assert not torch.allclose(base, larger)
    with pytest.raises(ValueError, match="one of them is missing"):
        model.family.predict(model.denoiser, latents, timesteps, replace(conditions, size_ids=None))


def test_guidance_starts_from_what_the_stock_pipeline_takes_for_an_empty_prompt(one_of_three: Model) -> None:
    """The stock pipelines' own encode_prompt is the reference."""
    model = one_of_three
    _, _, conditions = example(model, batch=1)
    embeds, pooled = model.encode(model.tokenize([""]))
    negative = model.family.negative_conditions(model, replace(conditions, embeds=embeds, pooled=pooled))
    if isinstance(model.pipeline, ToyPipeline):
        assert torch.equal(negative.embeds, embeds)
        return
    stock = model.pipeline.encode_prompt("a", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    torch.testing.assert_close(negative.embeds, stock[1])
    assert torch.equal(negative.embeds, torch.zeros_like(embeds)) == (model.family.name == "sdxl")
    if negative.pooled is not None:
        torch.testing.assert_close(negative.pooled, stock[3])
        model.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
        assert model.family.negative_conditions(model, negative) is negative


# --- registry -----------------------------------------------------------------------------------------------------


def test_pipelines_and_denoisers_find_their_family(one_of_three: Model) -> None:
    model = one_of_three
    assert family_of_pipeline(model.pipeline) is family_of_denoiser(model.denoiser) is model.family
    assert family_of_denoiser(torch.compile(model.denoiser)) is model.family
    assert denoiser_of(model.pipeline) is model.denoiser
    assert [family.name for family in families()].count(model.family.name) == 1


def test_what_belongs_to_no_family_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UserError, match="Linear is the denoiser of no known model family; supported: .*UNet2D"):
        family_of_denoiser(nn.Linear(2, 2))
    with pytest.raises(UserError, match="str is of no known model family; supported: StableDiffusionPipeline, .*Toy"):
        family_of_pipeline("pipeline")
    assert denoiser_of("pipeline") is None
    with pytest.raises(UserError, match="this base has a ToyTransformer"):
        pruned_unet(toy_model().denoiser, None)  # type: ignore[arg-type]


# --- the toy family, all the way ----------------------------------------------------------------------------------


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("kind", ["cross", "self"])
def test_toy_attention_is_recorded_on_its_own_grid(patch_size: int, kind: Any) -> None:
    model = toy_model(patch_size=patch_size).freeze()
    latents, timesteps, conditions = example(model)
    latents = torch.cat([latents, latents], dim=-1)  # 8 x 16
    layer = {"cross": "attn2", "self": "attn1"}[kind]
    assert attention_layers(model.denoiser, kind=kind) == [f"transformer_blocks.{i}.{layer}" for i in range(2)]
    with torch.no_grad():
        plain = FAMILY.predict(model.denoiser, latents, timesteps, conditions)
        with record_attention(model.denoiser, kind=kind) as maps:
            recorded = FAMILY.predict(model.denoiser, latents, timesteps, conditions)
    torch.testing.assert_close(recorded, plain)
    size = (8 // patch_size, 16 // patch_size)
    places = size[0] * size[1]
    assert set(maps.sizes.values()) == {size}
    for probabilities in maps.by_layer.values():
        assert probabilities.shape == (2, places, model.max_tokens if kind == "cross" else places)
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, places))
    with pytest.raises(ValueError, match=r"5 places do not fit latents of \(8, 16\)"):
        FAMILY.grid((8, 16), 5)


def test_toy_recording_ends_early_and_at_the_asked_timesteps() -> None:
    model = toy_model().freeze()
    inputs = example(model)
    ran: list[int] = []
    model.denoiser.transformer_blocks[1].register_forward_hook(lambda *_: ran.append(1))
    with record_attention(model.denoiser, "transformer_blocks.0", timesteps=(400, 600)) as maps:
        maps.run(FAMILY.predict, model.denoiser, *inputs)
        assert list(maps.by_layer) == ["transformer_blocks.0.attn2"] and not ran
        maps.start()
        FAMILY.predict(model.denoiser, inputs[0], inputs[1] + 200, inputs[2])
        assert maps.by_layer == {} and ran
    ran.clear()
    with record_attention(model.denoiser, kind="self", max_places=1) as maps:
        maps.run(FAMILY.predict, model.denoiser, *inputs)  # no later layer is smaller
        assert maps.by_layer == {} and not ran


def test_toy_adapters_train_and_come_back_from_their_file(tmp_path: Path) -> None:
    model = toy_model()
    lora = LoraConfig(rank=2, alpha=4.0)
    prepare_training(model, denoiser="lora", text_encoder="frozen", lora=lora)
    assert parameter_counts(model.denoiser)[1] == 2 * 2 * 4 * 2 * (16 + 16)  # layers, kinds, targets, rank, widths
    latents, timesteps, conditions = example(model)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    noisy, target = (f(model, latents, noise, timesteps) for f in (FAMILY.add_noise, FAMILY.target))
    optimizer = torch.optim.SGD([p for p in model.denoiser.parameters() if p.requires_grad], lr=10.0)
    losses = []
    for _ in range(3):
        loss = (FAMILY.predict(model.denoiser, noisy, timesteps, conditions) - target).pow(2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[0]
    assert export(model, tmp_path) == {"lora": LORA_FILE}
    loaded = toy_model()
    with pytest.raises(UserError, match="do not give the trained model's outputs"):
        prove_parity(model, toy_model(), "cpu")
    load_run(loaded, tmp_path)
    assert prove_parity(model, loaded, "cpu") == 0


def test_toy_weights_come_back_from_their_folder(tmp_path: Path) -> None:
    model = toy_model()
    prepare_training(model, denoiser="full", text_encoder="full", lora=LoraConfig())
    with torch.no_grad():
        model.denoiser.proj_out.weight += 0.1
    assert export(model, tmp_path) == {"transformer": "transformer", "text_encoder": "text_encoder"}
    loaded = toy_model()
    load_run(loaded, tmp_path)
    assert prove_parity(model, loaded, "cpu") == 0


def test_an_empty_list_of_targets_means_the_family_s() -> None:
    empty, default = toy_model(), toy_model()
    lora = LoraConfig(rank=2)
    prepare_training(default, denoiser="lora", text_encoder="lora", lora=lora)
    prepare_training(empty, denoiser="lora", text_encoder="lora", lora=lora)
    for ours, theirs in zip(empty.modules(), default.modules(), strict=True):
        assert parameter_counts(ours) == parameter_counts(theirs)


def test_the_toy_is_localized_counted_and_quantized_as_any_other(tmp_path: Path) -> None:
    model = toy_model().freeze()
    size = model_size(model, 64)
    assert size["denoiser_parameters"] == parameter_counts(model.denoiser)[0] and size["denoiser_gflops"] > 0
    config = FullEvaluation(localization_images=2, batch_size=2, self_attention_power=1)
    data, shared = PhantomDataset("test", 4, 0, 64), {"accelerator": Accelerator(cpu=True), "label": "toy"}
    found = localization(model, data, config, arm_dir=tmp_path, **shared)  # type: ignore[arg-type]
    assert found is not None and 0 <= found["word"]["auc"] <= 1
    inputs = example(model)
    with torch.no_grad():
        exact = model.family.predict(model.denoiser, *inputs)
        quantize(model, "int8")
        near = model.family.predict(model.denoiser, *inputs)
    assert 0 < float((near - exact).abs().max()) < 0.1


# --- nobody else says unet ----------------------------------------------------------------------------------------

UNET_FILES = {
    *(f"distill/models/{name}.py" for name in ("stable_diffusion", "sdxl", "blocks", "embedded", "kohya")),
    "distill/models/stock.py",  # names of stock diffusers
    "distill/configuration/renamed.py",  # old names
    *(
        f"distill/experiment/{name}.py"
        for name in ("benchmark_localization", "benchmark_memory", "benchmark_training", "peers")
    ),
    *(f"distill/experiment/{name}.py" for name in ("pretraining", "pretraining_record")),  # of the embedded U-Net
}
ALLOWED: dict[str, str] = {}


def unet_lines(root: Path) -> list[str]:
    """Lines that name a U-Net in code that any denoiser passes through, as file:line: text."""
    found = []
    for path in sorted((root / "distill").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if name in UNET_FILES:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            rest = re.sub(ALLOWED[name], "", line) if name in ALLOWED else line
            if re.search("unet", rest, re.IGNORECASE):
                found.append(f"{name}:{number}: {line.strip()}")
    return found


def test_only_the_families_that_have_a_unet_name_it(tmp_path: Path) -> None:
    assert unet_lines(ROOT) == []
    (tmp_path / "distill").mkdir()
    (tmp_path / "distill/new.py").write_text("import torch\nout = model.unet(x)\n")
    assert unet_lines(tmp_path) == ["distill/new.py:2: out = model.unet(x)"]

"""Methods on tiny real models: what is drawn from the generator, where gradients go, and each loss by its formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from pydantic import TypeAdapter, ValidationError
from tiny import tiny_sd, tiny_sdxl
from torch import nn
from training import (
    KINDS,
    LORA,
    NEEDED,
    NO_DROPOUT,
    TEACHER,
    batch_of,
    generator,
    has_gradient,
    phantoms,
    prepared,
    ready,
    set_up,
    tokens_of,
)  # fmt: skip

from distill.attention import record_attention
from distill.config import NO_LABEL, DenoisingConfig, LoraConfig
from distill.data.batch import Batch, Pixels, Posterior, TextEmbeddings, Tokens
from distill.data.cache import cache_latents, cache_text_embeddings
from distill.data.captions import names_side
from distill.errors import UserError
from distill.losses import tail_leak, tail_mass
from distill.methods import METHODS, AnyOptions, method_of
from distill.methods.base import Method, Noised
from distill.methods.denoising import Denoising
from distill.methods.options import (
    AttentionDistillationOptions,
    ConsistencyOptions,
    DenoisingOptions,
    KeyLockOptions,
    SupervisedAttentionOptions,
    TailPenaltyOptions,
)
from distill.methods.pretraining import AutoencoderObjective, ContrastiveObjective
from distill.methods.supervised_attention import resize_regions
from distill.methods.training import Training
from distill.models import Model, model_of
from distill.models.adapters import prepare_training
from distill.tokens import EOS, WORD

LABEL = "pleural effusion"
DROPOUT = DenoisingConfig(caption_dropout=0.5)


def denoising_of(model: Model, denoising: DenoisingConfig = NO_DROPOUT) -> Method:
    return set_up(DenoisingOptions(), model, denoising=denoising)


def assert_equal(a: Noised, b: Noised, exactly: bool = True) -> None:
    tolerance = {"atol": 0.0, "rtol": 0.0} if exactly else {"atol": 1e-5, "rtol": 1e-5}
    for name in ("noisy_latents", "timesteps", "target", "groups"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)
    assert torch.equal(tokens_of(a), tokens_of(b))


# --- what is drawn --------------------------------------------------------------------------------------------------


def test_noise_is_a_function_of_the_generator_only() -> None:
    model = prepared()
    method = denoising_of(model, DROPOUT)
    batch = batch_of(model, flip=True)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = method.noised(batch, generator(7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_equal(method.noised(batch, generator(7)), first)
    assert not torch.equal(method.noised(batch, generator(8)).noisy_latents, first.noisy_latents)


def test_cached_latents_and_pixels_give_the_same_batch(tmp_path: Path) -> None:
    """Flips included: a row is mirrored only where its caption names no side."""
    model = prepared()
    cache = cache_latents(phantoms(), model.vae, tmp_path, batch_size=4, flip=True, device="cpu")
    rows = range(12)
    from_cache, from_pixels = (
        batch_of(model, rows, latents=cache, flip=True),
        batch_of(model, rows, flip=True),
    )
    assert from_cache.flippable is not None and 0 < int(from_cache.flippable.sum()) < len(rows)
    assert isinstance(from_cache.image, Posterior) and isinstance(from_pixels.image, Pixels)
    method = denoising_of(model)
    for seed in range(3):
        assert_equal(method.noised(from_cache, generator(seed)), method.noised(from_pixels, generator(seed)), False)


def test_only_flippable_rows_are_mirrored_and_those_about_half_of_the_time(tmp_path: Path) -> None:
    model = prepared()
    data = phantoms()
    cache = cache_latents(data, model.vae, tmp_path, batch_size=4, flip=True, device="cpu")
    batch = batch_of(model, range(12), latents=cache, flip=True)
    image, flippable = batch.image, batch.flippable
    assert isinstance(image, Posterior) and image.mean_flipped is not None and flippable is not None
    assert flippable.tolist() == [not names_side(data.caption(i)) for i in range(12)]
    nothing = torch.zeros_like(image.std)  # then the latents are the mean, and noise can be taken off again
    regions = torch.zeros(12, 1, 2, 4, dtype=torch.uint8)
    regions[..., 0] = 1
    batch = replace(batch, image=replace(image, std=nothing, std_flipped=nothing), regions=regions)
    method = denoising_of(model)
    scale = model.vae.config.scaling_factor
    mirrored = torch.zeros(12)
    for seed in range(40):
        x = method.noised(batch, generator(seed))
        alpha = model.noise_scheduler.alphas_cumprod[x.timesteps][:, None, None, None]
        latents = (x.noisy_latents - (1 - alpha).sqrt() * x.target) / alpha.sqrt() / scale
        distance = [(latents - mean).flatten(1).abs().amax(dim=1) for mean in (image.mean, image.mean_flipped)]
        assert torch.minimum(*distance).max() < 1e-3
        flips = distance[1] < distance[0]
        mirrored += flips.float()
        assert x.regions is not None and x.dropped is not None and not x.dropped.any()
        expected = torch.where(flips[:, None, None, None], regions.flip(-1), regions)
        assert torch.equal(x.regions, expected), "regions lie where the image shows them"
    assert torch.all(mirrored[~flippable] == 0)
    assert torch.all((mirrored[flippable] > 8) & (mirrored[flippable] < 32))


@pytest.mark.parametrize("label", [None, LABEL, NO_LABEL])
def test_only_captions_with_the_label_are_dropped(label: str | None) -> None:
    model = prepared()
    data = phantoms()
    rows = range(12)
    batch = batch_of(model, rows, denoising=DenoisingConfig(caption_dropout_label=label), label_tokens=True)
    dropped = torch.tensor([label is None or label in (data.labels(i) or (NO_LABEL,)) for i in rows])
    assert dropped.any() and (label is None or not dropped.all())
    x = denoising_of(model, DenoisingConfig(caption_dropout=1.0)).noised(batch, generator())
    (empty,) = model.tokenize([""])
    assert torch.equal(tokens_of(x)[dropped], empty.expand(int(dropped.sum()), -1))
    assert not (x.groups[dropped] == WORD).any()
    assert torch.equal(tokens_of(x)[~dropped], tokens_of(batch)[~dropped])
    assert torch.equal(x.groups[~dropped], batch.groups[~dropped])
    assert x.label_tokens is not None and batch.label_tokens is not None
    assert not x.label_tokens[dropped].any() and torch.equal(x.label_tokens[~dropped], batch.label_tokens[~dropped])

    kept = denoising_of(model).noised(batch, generator())
    assert torch.equal(tokens_of(kept), tokens_of(batch))
    assert torch.equal(kept.noisy_latents, x.noisy_latents)


@pytest.mark.parametrize(
    ("build", "kind", "text_encoder", "unused"),
    [
        (tiny_sd, "denoising", "full", False),
        (tiny_sd, "denoising", "lora", False),
        (tiny_sd, "key_lock", "full", False),
        (tiny_sd, "consistency", "lora", True),
        (tiny_sdxl, "denoising", "full", True),
        (tiny_sdxl, "denoising", "frozen", False),
    ],
)
def test_a_method_knows_whether_it_leaves_parameters_unused(
    build: Callable[[], Any], kind: str, text_encoder: str, unused: bool
) -> None:
    """As a step shows, in which every caption is dropped."""
    student, denoising = prepared(build, "full", text_encoder), DenoisingConfig(caption_dropout=1.0)
    options = KINDS[kind](**NEEDED.get(kind, {}))  # type: ignore[arg-type]
    with ready(options, student, {TEACHER: model_of(build())}, denoising, dry_run=True) as method:
        assert method.leaves_parameters_unused() is unused
        method(batch_of(student), generator())["loss"].backward()
        trained = [p for p in method.parameters() if p.requires_grad]
        assert any(p.grad is None for p in trained) is unused


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_cached_text_embeddings_give_the_loss_of_the_tokens(build: Callable[[], Any], tmp_path: Path) -> None:
    model = prepared(build, text_encoder="frozen")
    data = phantoms()

    def encode(captions: list[str]) -> Any:
        embeds, pooled = model.encode(model.tokenize(captions))
        return embeds if pooled is None else (embeds, pooled)

    cache = cache_text_embeddings([data.caption(i) for i in range(12)], encode, tmp_path, "hash", 4)
    method = denoising_of(model, DROPOUT)
    cached, tokens = batch_of(model, text=cache), batch_of(model)
    assert isinstance(cached.text, TextEmbeddings) and isinstance(tokens.text, Tokens)
    torch.testing.assert_close(method(cached, generator())["loss"], method(tokens, generator())["loss"])


def test_half_precision_does_not_reach_the_vae() -> None:
    """Stock VAEs overflow in float16; latents made on the way are those of the cache."""
    model = prepared()
    method = denoising_of(model)
    batch = batch_of(model)
    full = method.noised(batch, generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(method.noised(batch, generator()), full)


def test_targets_mix_back_to_latents_and_noise() -> None:
    epsilon, v = (prepared(lambda kind=kind: tiny_sd(kind)) for kind in ("epsilon", "v_prediction"))
    batch = batch_of(epsilon)
    noise, velocity = (denoising_of(model).noised(batch, generator()) for model in (epsilon, v))
    assert torch.equal(noise.noisy_latents, velocity.noisy_latents)
    alpha = epsilon.noise_scheduler.alphas_cumprod[noise.timesteps][:, None, None, None]
    # Salimans & Ho 2022, appendix D: epsilon = sigma x_t + alpha v
    expected = (1 - alpha).sqrt() * velocity.noisy_latents + alpha.sqrt() * velocity.target
    torch.testing.assert_close(expected, noise.target, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_each_image(kind: str) -> None:
    model = prepared(lambda: tiny_sd(kind))
    batch = batch_of(model)
    method = denoising_of(model, DenoisingConfig(min_snr_gamma=5.0, caption_dropout=0.0))
    x = method.noised(batch, generator())
    prediction = method.predict_student(x)
    snr = 1 / (1 / model.noise_scheduler.alphas_cumprod[x.timesteps] - 1)
    weights = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    expected = (weights * (prediction - x.target).square().mean(dim=(1, 2, 3))).mean()
    terms = method(batch, generator())
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-4, atol=1e-6)
    assert terms["denoising"] is terms["loss"]


# --- what trains ----------------------------------------------------------------------------------------------------


def test_sdxl_predicts_what_the_stock_pipeline_would() -> None:
    pipeline = tiny_sdxl()
    model = model_of(pipeline)
    method = denoising_of(model.freeze())
    rows = [0, 1, 2]
    batch = batch_of(model, rows)
    assert batch.size_ids is not None
    assert torch.equal(batch.size_ids, torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(3, 6))
    x = method.noised(batch, generator())
    captions = [phantoms().caption(i) for i in rows]
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": batch.size_ids}
    expected = pipeline.unet(x.noisy_latents, x.timesteps, embeds, added_cond_kwargs=added).sample
    torch.testing.assert_close(method.predict_student(x), expected)


@pytest.mark.parametrize("build", [tiny_sd, lambda: tiny_sd("v_prediction"), tiny_sdxl], ids=["sd", "v", "sdxl"])
def test_gradients_reach_all_that_trains(build: Callable[[], Any]) -> None:
    model = prepared(build)
    denoising_of(model)(batch_of(model), generator())["loss"].backward()
    for module in (model.denoiser, *model.text_encoders):
        assert has_gradient(module)
    assert not has_gradient(model.vae)


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.3), (0.3, 0.0), (0.3, 0.1)])
def test_an_adapter_that_goes_on_has_the_dropout_that_is_asked_for(before: float, after: float) -> None:
    model = model_of(tiny_sd())
    for dropout in (before, after):
        prepare_training(model, denoiser="lora", text_encoder="lora", lora=LoraConfig(rank=2, dropout=dropout))
        for module in (model.denoiser, *model.text_encoders):
            layers = [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
            assert layers and {getattr(layer.lora_dropout["default"], "p", 0.0) for layer in layers} == {dropout}
            assert module.peft_config["default"].lora_dropout == dropout


@pytest.mark.parametrize(("denoiser", "text_encoder"), [("full", "frozen"), ("lora", "full"), ("full", "full")])
def test_what_is_trained_in_full_is_not_rounded_first(denoiser: str, text_encoder: str) -> None:
    """With the other parts in 16 bits."""
    whole, model = prepared(tiny_sd), prepared(tiny_sd, denoiser, text_encoder, frozen_dtype="bf16")
    for how, ours, theirs in (
        (denoiser, model.denoiser, whole.denoiser),
        (text_encoder, model.text_encoders[0], whole.text_encoders[0]),
    ):
        frozen = [p for name, p in ours.named_parameters() if "lora" not in name]
        assert {p.dtype for p in frozen} == {torch.float32 if how == "full" else torch.bfloat16}
        same = [torch.equal(a, b) for a, b in zip(frozen, theirs.parameters(), strict=True)]
        assert all(same) == (how == "full")


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("frozen_dtype", ["fp32", "bf16"])
def test_lora_trains_adapters_only(build: Callable[[], Any], frozen_dtype: str) -> None:
    model = prepared(build, "lora", "lora", frozen_dtype=frozen_dtype)
    method = denoising_of(model)
    trainable = {n: p for n, p in method.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    for i in range(len(model.text_encoders)):
        assert any(name.startswith(f"text_encoders.{i}.") for name in trainable)
    assert any(name.startswith("denoiser.") for name in trainable)
    loss = method(batch_of(model), generator())["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None for n, p in method.named_parameters() if n not in trainable)
    assert has_gradient(model.denoiser)
    for encoder in model.text_encoders:
        assert has_gradient(encoder)


def test_vae_stays_outside_and_a_frozen_text_encoder_stays_in_eval_mode() -> None:
    model = prepared(text_encoder="frozen")
    method = denoising_of(model).train()
    assert method.denoiser.training and not method.text_encoders.training
    assert not any(module is model.vae for module in method.modules())
    assert denoising_of(prepared(text_encoder="lora")).train().text_encoders.training


@pytest.mark.parametrize("text_encoder", ["frozen", "lora", "full"])
def test_denoiser_and_text_encoder_have_learning_rates_of_their_own(text_encoder: str) -> None:
    model = prepared(denoiser="lora", text_encoder=text_encoder)
    method = denoising_of(model)
    groups = method.parameter_groups(1e-3, 1e-5)
    assert [group["lr"] for group in groups] == [1e-3, 1e-5][: 1 if text_encoder == "frozen" else 2]
    assert all(group["until"] is None for group in groups)
    ends = [group["until"] for group in method.parameter_groups(1e-3, 1e-5, 7)]
    assert ends == [None, 7][: len(groups)]
    modules = [method.denoiser, method.text_encoders]
    for group, module in zip(groups, modules, strict=False):
        assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters() if p.requires_grad]
    assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in method.parameters())


def test_one_batch_overfits() -> None:
    model = prepared()
    method = denoising_of(model).train()
    batch = batch_of(model)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(40):
        loss = method(batch, generator(3))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.25 * losses[0]


# --- options --------------------------------------------------------------------------------------------------------


def options_of(**values: Any) -> Any:
    return TypeAdapter(AnyOptions).validate_python(values)


def test_a_kind_is_one_method_and_has_only_its_own_options() -> None:
    kinds = [options.model_fields["kind"].default for options in METHODS]
    assert len(set(kinds)) == len(kinds)
    for (options, place), kind in zip(METHODS.items(), kinds, strict=True):
        extra = {"arm_weight": 0.1} if kind == "supervised_attention" else {}
        found = options_of(kind=kind, **extra)
        method = method_of(found, NO_DROPOUT)
        assert type(found) is options and method.options is found
        assert f"{type(method).__module__}:{type(method).__name__}" == f"distill.methods.{place}"
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        options_of(kind="denoising", teacher="x")
    with pytest.raises(ValidationError, match="'denoising', 'attention_distillation'"):
        options_of(kind="contrastive")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"kind": "attention_distillation", "min_timestep": 5, "max_timestep": 4}, "min_timestep is 5, above max_timestep"),
        ({"kind": "attention_distillation", "place_groups": ("words", "words")}, "each group only once"),
        ({"kind": "attention_distillation", "place_groups": ()}, "at least 1 item"),
        ({"kind": "attention_distillation", "gate_images": 5}, "gate_images is set, and gate_reference is not"),
        ({"kind": "attention_distillation", "batch_share": 0.0}, "greater than 0"),
        ({"kind": "supervised_attention"}, "all weights are 0; set arm_weight"),
        ({"kind": "supervised_attention", "arm_weight": 0.1, "images": 5}, "no region weight is set"),
        ({"kind": "tail_penalty", "weight": 0.0}, "greater than 0"),
        ({"kind": "key_lock", "release_over_steps": 5}, "release_over_steps is set, and release_after_steps is not"),
        ({"kind": "consistency", "solver_steps": 75}, "a multiple of 50"),
        ({"kind": "consistency", "guidance_scale": 0.5}, "greater than or equal to 1"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_each_other_are_refused(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        options_of(**values)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (DenoisingOptions(), {}),
        (KeyLockOptions(), {}),
        (TailPenaltyOptions(), {}),
        (SupervisedAttentionOptions(arm_weight=0.1), {"reads_labels": True}),
        (SupervisedAttentionOptions(region_token_weight=0.1, images=9), {"reads_regions": True, "region_images": 9}),
        (SupervisedAttentionOptions(region_pixel_weight=0.1), {"reads_regions": True}),
        (AttentionDistillationOptions(teacher="a"), {"references": ("a",), "needs_tokens": True}),
        (
            AttentionDistillationOptions(teacher="a", start_from_teacher=True, gate_reference="b", words="labels"),
            {"references": ("a", "b"), "needs_tokens": True, "starts_from": "a", "needs_validation": True,
             "reads_labels": True},
        ),
        (ConsistencyOptions(teacher="a", words="labels"), {"references": ("a",), "reads_labels": True}),
    ],
)  # fmt: skip
def test_what_a_method_needs_follows_from_its_options(options: Any, expected: dict[str, Any]) -> None:
    nothing = {
        "references": (), "needs_tokens": False, "starts_from": None, "needs_validation": False, "reads_labels": False,
        "reads_regions": False, "region_images": None,
    }  # fmt: skip
    assert {name: getattr(options, name) for name in nothing} == nothing | expected


@pytest.mark.parametrize(
    ("options", "training", "expected"),
    [
        (DenoisingOptions(), {}, []),
        (AttentionDistillationOptions(teacher="x"), {}, []),
        (AttentionDistillationOptions(), {}, ["method.teacher is missing"]),
        (KeyLockOptions(), {"text_encoder": "full"}, []),
        (KeyLockOptions(), {"text_encoder": "frozen"}, ["set text_encoder to full or lora"]),
        (KeyLockOptions(), {"text_encoder": "full", "denoiser": "frozen"}, ["set denoiser to full or lora"]),
        (
            KeyLockOptions(),
            {"text_encoder": "full", "denoiser": "lora", "lora": LORA.model_copy(update={"denoiser_targets": ("to_q",)})},
            ["lora.denoiser_targets must hold to_k"],
        ),
        (ConsistencyOptions(solver_steps=150), {}, ["method.solver_steps is 150; the base's 1000 timesteps"]),
        (
            ConsistencyOptions(), {"denoising": DenoisingConfig(min_snr_gamma=5.0)},
            ["denoising.min_snr_gamma weighs the diffusion loss"],
        ),
    ],
)  # fmt: skip
def test_what_a_method_cannot_train_is_said_before_the_training(
    options: Any, training: dict[str, Any], expected: list[str]
) -> None:
    asked = Training(method=options, **training)
    found = method_of(options, asked.denoising).faults(model_of(tiny_sd()), asked)
    assert len(found) == len(expected) and all(part in text for part, text in zip(expected, found, strict=True))


def test_a_layer_that_is_not_there_is_named_before_the_training() -> None:
    options = AttentionDistillationOptions(teacher="x", layers=("up_blocks.9",))
    with pytest.raises(UserError, match="no cross-attention layer starts with 'up_blocks.9'; available: down_blocks.0"):
        method_of(options, NO_DROPOUT).faults(model_of(tiny_sd()), Training(method=options))


def test_a_method_of_the_base_class_has_no_state_and_finishes_with_nothing() -> None:
    method = Denoising(DenoisingOptions(), NO_DROPOUT)
    assert method.state() == {} and method.finish() == {}


# --- supervised attention -------------------------------------------------------------------------------------------


def test_resized_regions_are_in_the_order_of_places() -> None:
    regions = torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    regions[0, 1, 0, 3] = 1
    assert resize_regions(regions, (2, 2))[0].T.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert resize_regions(regions, (8, 8))[0, :, 1].reshape(8, 8).nonzero().tolist() == [[0, 6], [0, 7], [1, 6], [1, 7]]


def test_supervision_by_regions_trains_denoiser_and_text_encoder() -> None:
    student = prepared()
    batch = batch_of(student, label_tokens=True, regions=True)
    options = SupervisedAttentionOptions(region_token_weight=0.5, region_pixel_weight=0.25)
    with ready(options, student) as method:
        terms = method(batch, generator())
    assert "arm" not in terms
    expected = terms["denoising"] + 0.5 * terms["region_token"] + 0.25 * terms["region_pixel"]
    torch.testing.assert_close(terms["loss"], expected)
    (terms["loss"] - terms["denoising"]).backward()
    assert has_gradient(student.denoiser) and has_gradient(student.text_encoders[0])
    with ready(options, student, denoising=DenoisingConfig(caption_dropout=1.0)) as method:
        dropped = method(batch, generator())
    assert float(dropped["region_token"].detach()) == 0, "a dropped caption names nothing"


def test_attention_regularization_is_the_papers_formula_and_reaches_the_text_encoder() -> None:
    student = prepared()
    batch = batch_of(student, label_tokens=True)
    labels = batch.label_tokens
    assert labels is not None and labels.any() and not (labels & (batch.groups != WORD)).any()
    with ready(SupervisedAttentionOptions(arm_weight=0.5), student) as method:
        terms = method(batch, generator())
    assert "region_token" not in terms and "region_pixel" not in terms
    with record_attention(student.denoiser) as maps, torch.no_grad():
        method.predict_student(method.noised(batch, generator()))
        attention = torch.stack([m.mean(dim=1) for m in maps.take().values()]).mean(dim=0)
    eps = 2.0**-10
    expected = sum(1 / (float(a) + eps) - 1 for a in attention[labels]) / int(labels.sum()) * eps
    assert float(terms["arm"].detach()) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(terms["loss"], terms["denoising"] + 0.5 * terms["arm"])
    terms["arm"].backward()
    assert has_gradient(student.text_encoders[0])


# --- tail penalty ---------------------------------------------------------------------------------------------------


def test_tail_leak_counts_only_what_is_beyond_the_teacher() -> None:
    groups = torch.tensor([[0, 1, 2, 3]])
    teacher = tail_mass(torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]), groups)
    assert teacher.tolist() == pytest.approx([0.3])
    assert float(tail_leak(teacher, torch.tensor([[[0.2, 0.3, 0.3, 0.2]]]), groups)) == pytest.approx(0.2)
    assert float(tail_leak(teacher, torch.tensor([[[0.6, 0.3, 0.1, 0.0]]]), groups)) == 0


def tail_now(
    method: Method, student: Model, batch: Batch, draws: torch.Generator
) -> tuple[Noised, dict[str, torch.Tensor]]:
    x = method.noised(batch, draws)
    with record_attention(student.denoiser) as maps:
        method.predict_student(x)
    return x, {n: (m.mean(dim=1) * (x.groups >= EOS)).sum(dim=1) for n, m in maps.by_layer.items()}


def bins_of(x: Noised) -> torch.Tensor:
    return x.timesteps * 10 // 1000 + 10 * (x.groups != WORD).all(dim=1)


def test_the_tail_penalty_is_the_mass_of_eos_and_padding_beyond_that_before_the_training() -> None:
    student = prepared()
    batch = batch_of(student)
    denoising, asked = DenoisingConfig(caption_dropout=0.3), []

    def batches(images: int) -> Any:
        asked.append(images)
        return iter([batch] * 4)

    options = TailPenaltyOptions(weight=0.5)
    x, now = tail_now(denoising_of(student, denoising), student, batch, generator())
    with ready(options, student, denoising=denoising, batches=batches) as method:
        assert asked == [512]
        assert set(method._allowed) == set(now)
        allowed = {n: method._allowed[n][bins_of(x)] for n in now}
        expected = torch.stack([(now[n] - allowed[n]).clamp(min=0).mean() for n in now]).mean()
        terms = method(batch, generator())
        torch.testing.assert_close(terms["tail"], expected)
        torch.testing.assert_close(terms["loss"], terms["denoising"] + 0.5 * terms["tail"])
        method._allowed = {name: torch.zeros(20) for name in now}
        terms = method(batch, generator())
        torch.testing.assert_close(terms["tail"], torch.stack([m.mean() for m in now.values()]).mean())
        terms["tail"].backward()
        assert has_gradient(student.text_encoders[0]) and has_gradient(student.denoiser)
        method._allowed = dict.fromkeys(now, torch.ones(20))
        assert float(method(batch, generator())["tail"].detach()) == 0


def test_the_tail_before_the_training_is_a_mean_by_noise_level_and_unseen_levels_are_free() -> None:
    student = prepared()
    batch = batch_of(student)
    plain, draws, seen = denoising_of(student, DROPOUT), generator(), []
    for _ in range(2):
        x, now = tail_now(plain, student, batch, draws)
        name = next(iter(now))
        seen += list(zip(bins_of(x).tolist(), now[name].tolist(), strict=True))
    with ready(TailPenaltyOptions(), student, denoising=DROPOUT, batches=lambda images: iter([batch, batch])) as method:
        for index, value in enumerate(method._allowed[name].tolist()):
            here = [mass for level, mass in seen if level == index]
            assert value == pytest.approx(sum(here) / len(here) if here else 1.0, abs=1e-6)
    assert len({level for level, _ in seen}) > 2


def test_a_checkpoint_of_the_tail_penalty_holds_what_was_measured() -> None:
    student = prepared()
    batch = batch_of(student)
    with ready(TailPenaltyOptions(), student, batches=lambda images: iter([batch])) as method:
        state, terms = method.state(), method(batch, generator())
        method._allowed = {name: torch.zeros(20) for name in method._allowed}
        assert float(method(batch, generator())["tail"].detach()) != float(terms["tail"].detach())
        method.load_state(state)
        torch.testing.assert_close(method(batch, generator())["tail"], terms["tail"], rtol=0, atol=0)
        assert state and all(tensor.shape == (20,) for tensor in state.values())


# --- objectives of the bundled base --------------------------------------------------------------------------------


def test_contrastive_loss_is_smallest_for_the_right_pairs() -> None:
    pipeline = tiny_sdxl()
    captions = ["left effusion", "right effusion", "the plus"]
    ids = pipeline.tokenizer_2(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = pipeline.text_encoder_2(ids).text_embeds
    losses = []
    for order in ([0, 1, 2], [1, 2, 0]):
        objective = ContrastiveObjective(pipeline.text_encoder_2, nn.Flatten())
        terms = objective({"input_ids": ids, "pixel_values": embeds[order]}, generator())
        losses.append(float(terms["loss"].detach()))
        assert float(terms["accuracy"]) == (1.0 if order == [0, 1, 2] else 0.0)
    assert losses[0] < math.log(3) < losses[1]


def test_autoencoder_loss_falls_and_crops_come_from_the_generator() -> None:
    vae = tiny_sd().vae
    objective = AutoencoderObjective(vae, 1e-6, crop_px=32)
    batch = {"pixel_values": torch.stack([phantoms()[i].pixel_values for i in range(2)])}
    first = objective(batch, generator(0))
    torch.testing.assert_close(first["psnr_db"], 10 * torch.log10(4 / first["mse"]))
    assert float(objective(batch, generator(0))["loss"].detach()) == float(first["loss"].detach())
    assert float(objective(batch, generator(1))["loss"].detach()) != float(first["loss"].detach())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        objective(batch, generator(0))["loss"].backward()
        optimizer.step()
    assert float(objective(batch, generator(0))["loss"].detach()) < 0.8 * float(first["loss"].detach())


@pytest.mark.parametrize("cached", [False, True], ids=["tokens", "embeddings"])
@pytest.mark.parametrize("zeros", [None, True, False], ids=["sd", "sdxl with zeros", "sdxl with the empty caption"])
def test_a_dropped_caption_is_what_the_stock_pipeline_guides_away_from(zeros: bool | None, cached: bool) -> None:
    model = prepared(tiny_sd if zeros is None else tiny_sdxl, text_encoder="frozen")
    if zeros is not None:
        model.pipeline.register_to_config(force_zeros_for_empty_prompt=zeros)
    stock = model.pipeline.encode_prompt("a", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    stated, expected = stock[:2]
    batch = batch_of(model)
    if cached:
        encoded = model.encode(model.tokenize([phantoms().caption(i) for i in range(4)]))
        batch = replace(batch, text=TextEmbeddings(*encoded))
    method = denoising_of(model, DenoisingConfig(caption_dropout=0.5))
    x = method.noised(batch, generator(1))
    assert x.dropped is not None and 0 < int(x.dropped.sum()) < 4
    found = method.embeddings(model, list(method.text_encoders), x)
    given = method.embeddings(
        model,
        list(method.text_encoders),
        method.noised(batch, generator(1)).on(*model.encode(model.tokenize([phantoms().caption(i) for i in range(4)]))),
    )
    for i, dropped in enumerate(x.dropped.tolist()):
        torch.testing.assert_close(found.embeds[i], expected[0] if dropped else given.embeds[i])
        if zeros is not None:
            assert found.pooled is not None and given.pooled is not None
            torch.testing.assert_close(found.pooled[i], stock[3][0] if dropped else given.pooled[i])
    assert bool((expected == 0).all()) == bool(zeros) and not (stated == 0).all()

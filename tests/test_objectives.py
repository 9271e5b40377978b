"""Objectives on tiny real models: what is drawn from the generator, where gradients go, and what must be zero."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_sd, tiny_sdxl
from torch import nn
from torch.utils.data import default_collate

from distill.attention.recording import attention_layers, record_attention
from distill.config import AttentionDistillationConfig, DenoisingConfig, LoraConfig
from distill.data.cache import cache_latents, cache_text_embeddings
from distill.data.captions import NO_LABEL, names_side
from distill.data.phantom.dataset import PhantomDataset
from distill.data.rows import TrainingRows
from distill.errors import UserError
from distill.losses import tail_leak, tail_mass
from distill.methods.objectives import (
    AttentionDistillationObjective,
    AutoencoderObjective,
    ContrastiveObjective,
    DenoisingObjective,
    Noised,
    SupervisedAttentionObjective,
    resize_regions,
)
from distill.models.adapters import prepare_training
from distill.models.family import Model
from distill.models.loading import model_of
from distill.tokens import EOS, WORD

LABEL = "pleural effusion"
TERMS = ("token_kl", "place_kl", "mass")
LORA = LoraConfig(rank=2, alpha=4.0)
NO_DROPOUT = DenoisingConfig(caption_dropout=0.0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def phantoms() -> PhantomDataset:
    return PhantomDataset("train", 12, resolution=64)


def batch_of(model: Model, rows: Sequence[int] = range(4), **options: Any) -> dict[str, Any]:
    dataset = TrainingRows(phantoms(), model, **options)
    return default_collate([dataset[i] for i in rows])


def prepared(
    build: Callable[[], Any] = tiny_sd, method: Any = "full", text_encoder: Any = "full", **options: Any
) -> Model:
    model = model_of(build())
    prepare_training(model, method=method, text_encoder=text_encoder, lora=LORA, **options)
    return model


def distilling(stack: ExitStack, student: Model, teacher: Model, **options: Any) -> AttentionDistillationObjective:
    layers = options.get("layers", ())
    maps = [stack.enter_context(record_attention(c.denoiser, layers)) for c in (student, teacher)]
    return AttentionDistillationObjective(student, NO_DROPOUT, AttentionDistillationConfig(**options), teacher, *maps)


def has_gradient(module: nn.Module) -> bool:
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())


def assert_equal(a: Noised, b: Noised, exactly: bool = True) -> None:
    tolerance = {"atol": 0.0, "rtol": 0.0} if exactly else {"atol": 1e-5, "rtol": 1e-5}
    for name in ("noisy_latents", "timesteps", "target", "groups", "input_ids"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), **tolerance)


# What is drawn


def test_noise_is_a_function_of_the_generator_only() -> None:
    model = prepared()
    objective = DenoisingObjective(model, DenoisingConfig(caption_dropout=0.5))
    batch = batch_of(model, flip=True)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = objective.noised(batch, generator(7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_equal(objective.noised(batch, generator(7)), first)
    assert not torch.equal(objective.noised(batch, generator(8)).noisy_latents, first.noisy_latents)


def test_cached_latents_and_pixels_give_the_same_batch(tmp_path: Path) -> None:
    """Flips included: a row is mirrored only where its caption names no side."""
    model = prepared()
    cache = cache_latents(phantoms(), model.vae, tmp_path, batch_size=4, flip=True, device="cpu")
    rows = range(12)
    from_cache, from_pixels = (
        batch_of(model, rows, latents=cache, flip=True),
        batch_of(model, rows, flip=True),
    )
    assert 0 < int(from_cache["flippable"].sum()) < len(rows)
    assert "pixel_values" not in from_cache and "latents_mean" not in from_pixels
    objective = DenoisingObjective(model, NO_DROPOUT)
    for seed in range(3):
        assert_equal(
            objective.noised(from_cache, generator(seed)), objective.noised(from_pixels, generator(seed)), False
        )


def test_only_flippable_rows_are_mirrored_and_those_about_half_of_the_time(tmp_path: Path) -> None:
    model = prepared()
    data = phantoms()
    cache = cache_latents(data, model.vae, tmp_path, batch_size=4, flip=True, device="cpu")
    batch = batch_of(model, range(12), latents=cache, flip=True)
    assert batch["flippable"].tolist() == [not names_side(data.caption(i)) for i in range(12)]
    for name in ("latents_std", "latents_std_flipped"):
        batch[name] = torch.zeros_like(batch[name])  # then the latents are the mean, and noise can be taken off again
    objective = DenoisingObjective(model, NO_DROPOUT)
    scale = model.vae.config.scaling_factor
    mirrored = torch.zeros(12)
    for seed in range(40):
        x = objective.noised(batch, generator(seed))
        alpha = model.noise_scheduler.alphas_cumprod[x.timesteps][:, None, None, None]
        latents = (x.noisy_latents - (1 - alpha).sqrt() * x.target) / alpha.sqrt() / scale
        distance = [
            (latents - batch[name]).flatten(1).abs().amax(dim=1) for name in ("latents_mean", "latents_mean_flipped")
        ]
        assert torch.minimum(*distance).max() < 1e-3
        mirrored += (distance[1] < distance[0]).float()
    assert torch.all(mirrored[~batch["flippable"]] == 0)
    assert torch.all((mirrored[batch["flippable"]] > 8) & (mirrored[batch["flippable"]] < 32))


@pytest.mark.parametrize("label", [None, LABEL, NO_LABEL])
def test_only_captions_with_the_label_are_dropped(label: str | None) -> None:
    model = prepared()
    data = phantoms()
    rows = range(12)
    batch = batch_of(model, rows, drop_only_label=label)
    dropped = torch.tensor([label is None or label in (data.labels(i) or (NO_LABEL,)) for i in rows])
    assert dropped.any() and (label is None or not dropped.all())
    x = DenoisingObjective(model, DenoisingConfig(caption_dropout=1.0)).noised(batch, generator())
    (empty,) = model.tokenize([""])
    assert torch.equal(x.input_ids[0][dropped], empty.expand(int(dropped.sum()), -1))
    assert not (x.groups[dropped] == WORD).any()
    assert torch.equal(x.input_ids[0][~dropped], batch["input_ids_0"][~dropped])
    assert torch.equal(x.groups[~dropped], batch["groups"][~dropped])

    kept = DenoisingObjective(model, NO_DROPOUT).noised(batch, generator())
    assert torch.equal(kept.input_ids[0], batch["input_ids_0"])
    assert torch.equal(kept.noisy_latents, x.noisy_latents)


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_cached_text_embeddings_give_the_loss_of_the_tokens(build: Callable[[], Any], tmp_path: Path) -> None:
    model = prepared(build, text_encoder="frozen")
    data = phantoms()

    def encode(captions: list[str]) -> Any:
        embeds, pooled = model.encode(model.tokenize(captions))
        return embeds if pooled is None else (embeds, pooled)

    cache = cache_text_embeddings([data.caption(i) for i in range(12)], encode, tmp_path, "hash", 4)
    objective = DenoisingObjective(model, DenoisingConfig(caption_dropout=0.5))
    cached, tokens = batch_of(model, text=cache), batch_of(model)
    assert "input_ids_0" not in cached
    torch.testing.assert_close(objective(cached, generator())["loss"], objective(tokens, generator())["loss"])


def test_half_precision_does_not_reach_the_vae() -> None:
    """Stock VAEs overflow in float16; latents made on the way are those of the cache."""
    model = prepared()
    objective = DenoisingObjective(model, NO_DROPOUT)
    batch = batch_of(model)
    full = objective.noised(batch, generator())
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(objective.noised(batch, generator()), full)


def test_targets_mix_back_to_latents_and_noise() -> None:
    epsilon, v = (prepared(lambda kind=kind: tiny_sd(kind)) for kind in ("epsilon", "v_prediction"))
    batch = batch_of(epsilon)
    noise, velocity = (DenoisingObjective(c, NO_DROPOUT).noised(batch, generator()) for c in (epsilon, v))
    assert torch.equal(noise.noisy_latents, velocity.noisy_latents)
    alpha = epsilon.noise_scheduler.alphas_cumprod[noise.timesteps][:, None, None, None]
    # Salimans & Ho 2022, appendix D: epsilon = sigma x_t + alpha v
    expected = (1 - alpha).sqrt() * velocity.noisy_latents + alpha.sqrt() * velocity.target
    torch.testing.assert_close(expected, noise.target, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_min_snr_weighs_each_image(kind: str) -> None:
    model = prepared(lambda: tiny_sd(kind))
    batch = batch_of(model)
    objective = DenoisingObjective(model, DenoisingConfig(min_snr_gamma=5.0, caption_dropout=0.0))
    x = objective.noised(batch, generator())
    prediction = objective.predict(model.denoiser, model.text_encoders, x)
    snr = 1 / (1 / model.noise_scheduler.alphas_cumprod[x.timesteps] - 1)
    weights = snr.clamp(max=5) / (snr if kind == "epsilon" else snr + 1)
    expected = (weights * (prediction - x.target).square().mean(dim=(1, 2, 3))).mean()
    terms = objective(batch, generator())
    torch.testing.assert_close(terms["loss"], expected, rtol=1e-4, atol=1e-6)
    assert terms["denoising"] is terms["loss"]


def test_another_prediction_type_is_refused() -> None:
    with pytest.raises(UserError, match="'sample'; epsilon and v_prediction"):
        DenoisingObjective(model_of(tiny_sd("sample")), DenoisingConfig())


# What trains


def test_sdxl_predicts_what_the_stock_pipeline_would() -> None:
    pipeline = tiny_sdxl()
    model = model_of(pipeline)
    objective = DenoisingObjective(model.freeze(), NO_DROPOUT)
    rows = [0, 1, 2]
    batch = batch_of(model, rows)
    assert torch.equal(batch["size_ids"], torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(3, 6))
    x = objective.noised(batch, generator())
    captions = [phantoms().caption(i) for i in rows]
    embeds, _, pooled, _ = pipeline.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    added = {"text_embeds": pooled, "time_ids": batch["size_ids"]}
    expected = pipeline.unet(x.noisy_latents, x.timesteps, embeds, added_cond_kwargs=added).sample
    torch.testing.assert_close(objective.predict(model.denoiser, model.text_encoders, x), expected)


@pytest.mark.parametrize("build", [tiny_sd, lambda: tiny_sd("v_prediction"), tiny_sdxl], ids=["sd", "v", "sdxl"])
def test_gradients_reach_all_that_trains(build: Callable[[], Any]) -> None:
    model = prepared(build)
    objective = DenoisingObjective(model, NO_DROPOUT)
    objective(batch_of(model), generator())["loss"].backward()
    for module in (model.denoiser, *model.text_encoders):
        assert has_gradient(module)
    assert not has_gradient(model.vae)


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
@pytest.mark.parametrize("frozen_dtype", ["fp32", "bf16"])
def test_lora_trains_adapters_only(build: Callable[[], Any], frozen_dtype: str) -> None:
    model = prepared(build, "lora", "lora", frozen_dtype=frozen_dtype)
    objective = DenoisingObjective(model, NO_DROPOUT)
    trainable = {n: p for n, p in objective.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in name and p.dtype == torch.float32 for name, p in trainable.items())
    for i in range(len(model.text_encoders)):
        assert any(name.startswith(f"text_encoders.{i}.") for name in trainable)
    assert any(name.startswith("denoiser.") for name in trainable)
    loss = objective(batch_of(model), generator())["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None for n, p in objective.named_parameters() if n not in trainable)
    assert has_gradient(model.denoiser)
    for encoder in model.text_encoders:
        assert has_gradient(encoder)


def test_vae_stays_outside_and_a_frozen_text_encoder_stays_in_eval_mode() -> None:
    model = prepared(text_encoder="frozen")
    objective = DenoisingObjective(model, NO_DROPOUT).train()
    assert objective.denoiser.training and not objective.text_encoders.training
    assert not any(module is model.vae for module in objective.modules())
    model = prepared(text_encoder="lora")
    assert DenoisingObjective(model, NO_DROPOUT).train().text_encoders.training


def test_one_batch_overfits() -> None:
    model = prepared()
    objective = DenoisingObjective(model, NO_DROPOUT).train()
    batch = batch_of(model)
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(100):
        loss = objective(batch, generator(3))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.25 * losses[0]


# Distillation


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(build: Callable[[], Any]) -> None:
    student = prepared(build)
    teacher = copy.deepcopy(student)
    with ExitStack() as stack:
        objective = distilling(stack, student, teacher)
        batch = batch_of(student)
        terms = objective(batch, generator())
        assert all(abs(float(terms[name])) < 1e-9 for name in TERMS)
        torch.testing.assert_close(terms["loss"], terms["denoising"], rtol=0, atol=1e-8)
        plain = DenoisingObjective(student, NO_DROPOUT)(batch, generator())["loss"]
        torch.testing.assert_close(terms["denoising"], plain, rtol=0, atol=1e-6)


def test_loss_is_the_weighted_sum_of_its_terms() -> None:
    weights = {"token_kl_weight": 0.5, "place_kl_weight": 2.0, "mass_weight": 3.0}
    student, teacher = prepared(), prepared(lambda: tiny_sd(seed=1))
    with ExitStack() as stack:
        terms = distilling(stack, student, teacher, **weights)(batch_of(student), generator())
    assert all(float(terms[name]) > 0 for name in TERMS)
    expected = terms["denoising"] + sum(weights[f"{name}_weight"] * terms[name] for name in TERMS)
    torch.testing.assert_close(terms["loss"], expected)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_term_reaches_the_student_and_never_the_teacher(method: str) -> None:
    student, teacher = prepared(tiny_sd, method, method), prepared(lambda: tiny_sd(seed=1))
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in teacher.modules()]
    with ExitStack() as stack:
        objective = distilling(stack, student, teacher).train()
        assert not any(module in teacher.modules() for module in objective.modules())
        assert not any(module.training for module in teacher.modules())
        batch = batch_of(student)
        for name in TERMS:
            objective.zero_grad()
            objective(batch, generator())[name].backward()
            assert has_gradient(student.denoiser) and has_gradient(student.text_encoders[0]), name
    for module, state in zip(teacher.modules(), before, strict=True):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_only_timesteps_in_range_count() -> None:
    student, teacher = prepared(), prepared(lambda: tiny_sd(seed=1))
    batch = batch_of(student)
    with ExitStack() as stack:
        timesteps = DenoisingObjective(student, NO_DROPOUT).noised(batch, generator()).timesteps
        assert timesteps.max() > timesteps.min() + 1
        top = int(timesteps.max())
        one = distilling(stack, student, teacher, min_timestep=top, max_timestep=top)(batch, generator())
        none = distilling(stack, student, teacher, min_timestep=top + 1, max_timestep=top + 1)(batch, generator())
        all_rows = distilling(stack, student, teacher)(batch, generator())
    for name in TERMS:
        assert float(none[name]) == 0
        assert float(one[name]) > 0 and not math.isclose(float(one[name]), float(all_rows[name]), rel_tol=1e-6)
    assert float(none["loss"]) == float(none["denoising"])


def test_only_the_asked_layers_count() -> None:
    student, teacher = prepared(), prepared(lambda: tiny_sd(seed=1))
    found = {}
    for layers in ((), ("down_blocks",), ("mid_block",), ("up_blocks",)):
        with ExitStack() as stack:
            objective = distilling(stack, student, teacher, layers=layers)
            found[layers] = objective(batch_of(student), generator())["token_kl"]
    # The tiny U-Net has 1, 1 and 2 cross-attention layers there; the term is the mean over layers.
    parts = found["down_blocks",] + found["mid_block",] + 2 * found["up_blocks",]
    torch.testing.assert_close(found[()], parts / 4, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_gradient_checkpointing_gives_equal_gradients_of_the_distillation(method: str) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = prepared(tiny_sd, method, method, gradient_checkpointing=checkpointing)
        with ExitStack() as stack:
            objective = distilling(stack, student, prepared(lambda: tiny_sd(seed=1))).train()
            terms = objective(batch_of(student), generator())
            terms["loss"].backward()
        gradients = {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}
        found.append((terms, gradients))
    (terms, gradients), (terms_again, gradients_again) = found
    for name in terms:
        torch.testing.assert_close(terms_again[name], terms[name], rtol=1e-5, atol=1e-7)
    assert gradients.keys() == gradients_again.keys()
    for part in ("denoiser.", "text_encoders."):
        assert any(name.startswith(part) for name in gradients)
    for name in gradients:
        torch.testing.assert_close(gradients_again[name], gradients[name], rtol=1e-3, atol=1e-6)


def more_layers() -> Any:
    pipeline = tiny_sd()
    pipeline.unet = type(pipeline.unet).from_config({**pipeline.unet.config, "layers_per_block": 2})
    return pipeline


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (tiny_sd, tiny_sdxl, "cross_attention_dim: teacher 32, student 16"),
        (more_layers, tiny_sd, "the teacher lacks .*down_blocks.0.attentions.1"),
    ],
    ids=["width", "layers"],
)
def test_a_teacher_of_another_shape_is_refused(
    student: Callable[[], Any], teacher: Callable[[], Any], expected: str
) -> None:
    with pytest.raises(UserError, match=f"different shape: .*{expected}"), ExitStack() as stack:
        distilling(stack, prepared(student), prepared(teacher))


# Objectives of the embedded base


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


EXTRA = {
    "tail": "tail_weight",
    "output": "output_weight",
    "feature": "feature_weight",
    "self_attention": "self_attention_weight",
}


@pytest.mark.parametrize("term", EXTRA)
@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_further_terms_vanish_on_the_teacher_itself_and_reach_the_student(build: Callable[[], Any], term: str) -> None:
    student = prepared(build)
    weights = {"token_kl_weight": 0.0, "place_kl_weight": 0.0, "mass_weight": 0.0, EXTRA[term]: 2.0}
    batch = batch_of(student)

    def terms_of(teacher: Model) -> Any:
        with ExitStack() as stack:
            terms = distilling(stack, student, teacher, **weights)(batch, generator())
        torch.testing.assert_close(terms["loss"], terms["denoising"] + 2.0 * terms[term])
        assert "feature" not in terms or term == "feature"
        return terms

    assert float(terms_of(copy.deepcopy(student))[term].detach()) == pytest.approx(0, abs=1e-9)
    for seed in range(8):  # the leak is 0 for a teacher with more mass in the tail, so look for one with less
        other = copy.deepcopy(student)
        with torch.no_grad():
            for p in [*other.denoiser.parameters(), *(p for e in other.text_encoders for p in e.parameters())]:
                p += 0.05 * torch.randn(p.shape, generator=generator(int(p.numel()) + seed))
        terms = terms_of(other)
        if float(terms[term].detach()) > 0:
            break
    assert float(terms[term].detach()) > 0
    terms[term].backward()
    assert has_gradient(student.denoiser) and has_gradient(student.text_encoders[0])
    assert not any(module._forward_hooks for module in student.denoiser.modules()), "hooks are removed"


def test_tail_leak_counts_only_what_is_beyond_the_teacher() -> None:
    groups = torch.tensor([[0, 1, 2, 3]])
    teacher = tail_mass(torch.tensor([[[0.4, 0.3, 0.2, 0.1]]]), groups)
    assert teacher.tolist() == pytest.approx([0.3])
    assert float(tail_leak(teacher, torch.tensor([[[0.2, 0.3, 0.3, 0.2]]]), groups)) == pytest.approx(0.2)
    assert float(tail_leak(teacher, torch.tensor([[[0.6, 0.3, 0.1, 0.0]]]), groups)) == 0


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_a_share_of_the_batch_is_distilled(share: float) -> None:
    student, teacher = prepared(), prepared(lambda: tiny_sd(seed=1))
    batch = batch_of(student)
    count = max(1, round(share * len(batch["input_ids_0"])))
    seen = []
    handle = teacher.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    with ExitStack() as stack:
        part = distilling(stack, student, teacher, batch_share=share)(batch, generator())
        whole = distilling(stack, student, teacher)(batch, generator())
    handle.remove()
    assert seen == [count, len(batch["input_ids_0"])]
    torch.testing.assert_close(part["denoising"], whole["denoising"])
    assert (count == len(batch["input_ids_0"])) == torch.equal(part["token_kl"], whole["token_kl"])


def test_a_student_under_the_text_encoder_of_the_base_is_its_own_teacher() -> None:
    """One recorder and one U-Net; equal encoders teach nothing, a changed one is taught, and only the student trains."""
    student = prepared()
    teacher = replace(student, text_encoders=[copy.deepcopy(e).requires_grad_(False) for e in student.text_encoders])
    batch = batch_of(student)
    with ExitStack() as stack:
        maps = stack.enter_context(record_attention(student.denoiser))
        objective = AttentionDistillationObjective(
            student, NO_DROPOUT, AttentionDistillationConfig(), teacher, maps, maps
        ).train()
        assert all(p.requires_grad for p in student.denoiser.parameters()), "the shared U-Net still trains"
        assert all(abs(float(objective(batch, generator())[name].detach())) < 1e-9 for name in TERMS)
        with torch.no_grad():
            for p in student.text_encoders[0].parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator(p.numel()))
        terms = objective(batch, generator())
        assert all(float(terms[name].detach()) > 0 for name in TERMS)
        (terms["loss"] - terms["denoising"]).backward()
    assert has_gradient(student.denoiser) and has_gradient(student.text_encoders[0])
    assert not has_gradient(teacher.text_encoders[0])


def test_distillation_of_labels_leaves_every_other_token_free() -> None:
    student, config = prepared(), AttentionDistillationConfig(words="labels", mass_weight=0.0)
    teacher = copy.deepcopy(student).freeze()
    batch = batch_of(student, label_tokens=True)
    with ExitStack() as stack:
        maps = [stack.enter_context(record_attention(c.denoiser)) for c in (student, teacher)]
        objective = AttentionDistillationObjective(student, NO_DROPOUT, config, teacher, *maps).train()
        with torch.no_grad():
            for p in student.text_encoders[0].parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator(p.numel()))
        terms = objective(batch, generator())
        assert float(terms["token_kl"].detach()) > 0 and float(terms["place_kl"].detach()) > 0
        nothing = objective(batch | {"label_tokens": torch.zeros_like(batch["label_tokens"])}, generator())
    assert float(nothing["place_kl"].detach()) == 0
    assert abs(float(nothing["token_kl"].detach())) < 1e-6


def test_part_of_the_batch_is_seen_through_the_frozen_text_encoder() -> None:
    """Its rows are those of a student whose text encoder is the teacher's, the other rows are the student's own."""
    student = prepared()
    teacher = replace(student, text_encoders=[copy.deepcopy(e).requires_grad_(False) for e in student.text_encoders])
    with torch.no_grad():
        for p in student.text_encoders[0].parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator(p.numel()))
    batch, seen = batch_of(student), []
    count = len(batch["input_ids_0"])
    handle = student.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2].detach()))
    with ExitStack() as stack:
        maps = stack.enter_context(record_attention(student.denoiser))
        config = AttentionDistillationConfig(teacher="frozen_text_encoder", batch_share=0.5, frozen_share=0.5)
        objective = AttentionDistillationObjective(student, NO_DROPOUT, config, teacher, maps, maps).train()
        objective(batch, generator())["loss"].backward()
    handle.remove()
    own, _ = student.encode([batch["input_ids_0"]])
    frozen, _ = teacher.encode([batch["input_ids_0"]])
    torch.testing.assert_close(seen[0], torch.cat([own[: count // 2], frozen[count // 2 :]]))
    torch.testing.assert_close(seen[1], frozen[: count // 2])
    assert has_gradient(student.text_encoders[0]) and not has_gradient(teacher.text_encoders[0])


def test_text_gradient_scales_what_the_maps_tell_the_text_encoder_alone() -> None:
    """Through the keys of the only layer; the losses, and the gradients of the U-Net, stay what they are."""
    student, teacher = prepared(), prepared(lambda: tiny_sd(seed=1))
    layer = attention_layers(student.denoiser)[0]
    batch = batch_of(student)
    values, of_text, of_unet = [], [], []
    for share in (1.0, 0.25, 0.0):
        student.denoiser.zero_grad()
        student.text_encoders[0].zero_grad()
        with ExitStack() as stack:
            mine = stack.enter_context(record_attention(student.denoiser, layer, text_gradient=share))
            theirs = stack.enter_context(record_attention(teacher.denoiser, layer))
            config = AttentionDistillationConfig()
            objective = AttentionDistillationObjective(student, NO_DROPOUT, config, teacher, mine, theirs).train()
            terms = objective(batch, generator())
        values.append({name: float(value.detach()) for name, value in terms.items()})
        terms["place_kl"].backward()
        of_text.append([p.grad.clone() for p in student.text_encoders[0].parameters() if p.grad is not None])
        of_unet.append([p.grad.clone() for p in student.denoiser.parameters() if p.grad is not None])
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    assert values[2] == pytest.approx(values[0], rel=1e-5)
    assert any(g.any() for g in of_text[0]) and any(g.any() for g in of_unet[0])
    for share, text, unet in zip((0.25, 0.0), of_text[1:], of_unet[1:], strict=True):
        torch.testing.assert_close(text, [share * g for g in of_text[0]], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(unet, of_unet[0], rtol=1e-3, atol=1e-6)


def test_regions_stand_at_the_words_of_their_finding() -> None:
    rows = TrainingRows(PhantomDataset("train", 6, 0, 64), prepared(), label_tokens=True, regions=True)
    for i in range(6):
        row, sample = rows[i], rows.dataset[i]
        some = row["regions"].flatten(1).any(dim=1)
        assert torch.equal(some, row["label_tokens"]), "every named finding of a phantom has a mask"
        union = torch.stack([region.mask for region in sample.regions]).any(dim=0) if sample.regions else None
        if union is not None and some.any():
            coarse = torch.nn.functional.adaptive_max_pool2d(union[None].float(), 32)[0] > 0
            assert not (row["regions"].any(dim=0) & ~coarse).any()


def test_resized_regions_are_in_the_order_of_places() -> None:
    regions = torch.zeros(1, 2, 4, 4, dtype=torch.uint8)
    regions[0, 1, 0, 3] = 1
    assert resize_regions(regions, (2, 2))[0].T.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert resize_regions(regions, (8, 8))[0, :, 1].reshape(8, 8).nonzero().tolist() == [[0, 6], [0, 7], [1, 6], [1, 7]]


def test_supervision_by_regions_trains_unet_and_text_encoder() -> None:
    student = prepared()
    batch = batch_of(student, label_tokens=True, regions=True)
    config = DenoisingConfig(
        caption_dropout=0.0, region_token_weight=0.5, region_pixel_weight=0.25, region_mask_weight=2.0
    )
    with record_attention(student.denoiser) as maps:
        terms = SupervisedAttentionObjective(student, config, maps)(batch, generator())
    assert "arm" not in terms
    expected = (
        terms["denoising"] + 0.5 * terms["region_token"] + 0.25 * terms["region_pixel"] + 2 * terms["region_mask"]
    )
    torch.testing.assert_close(terms["loss"], expected)
    (terms["loss"] - terms["denoising"]).backward()
    assert has_gradient(student.denoiser) and has_gradient(student.text_encoders[0])
    with record_attention(student.denoiser) as maps:
        dropped = SupervisedAttentionObjective(student, replace(config, caption_dropout=1.0), maps)(batch, generator())
    assert float(dropped["region_token"].detach()) == 0, "a dropped caption names nothing"


def test_a_mean_teacher_follows_the_student_and_is_in_its_checkpoint() -> None:
    student = prepared()
    teacher = replace(
        student,
        denoiser=copy.deepcopy(student.denoiser),
        text_encoders=[copy.deepcopy(e) for e in student.text_encoders],
    )
    config = AttentionDistillationConfig(teacher="ema", ema_decay=0.75)
    batch = batch_of(student)
    with ExitStack() as stack:
        maps = [stack.enter_context(record_attention(c.denoiser)) for c in (student, teacher)]
        objective = AttentionDistillationObjective(student, NO_DROPOUT, config, teacher, *maps).train()
        assert not objective.average.training and not any(p.requires_grad for p in objective.average.parameters())
        terms = objective(batch, generator())
        assert all(abs(float(terms[name].detach())) < 1e-7 for name in TERMS), "it starts as the student"
        encoder = student.text_encoders[0]
        before = [p.detach().clone() for p in encoder.parameters()]
        with torch.no_grad():
            for p in encoder.parameters():
                p += 1
            objective(batch, generator())
            for old, mean in zip(before, teacher.text_encoders[0].parameters(), strict=True):
                torch.testing.assert_close(mean, old, atol=1e-6, rtol=0)
        terms = objective(batch, generator())
        for old, mean in zip(before, teacher.text_encoders[0].parameters(), strict=True):
            torch.testing.assert_close(mean, old + 0.25, atol=1e-5, rtol=1e-5)
        terms["loss"].backward()
    assert has_gradient(encoder) and not has_gradient(teacher.text_encoders[0])
    assert any(name.startswith("average.") for name in objective.state_dict())


def test_attention_regularization_is_the_papers_formula_and_reaches_the_text_encoder() -> None:
    student = prepared()
    batch = batch_of(student, label_tokens=True)
    labels = batch["label_tokens"]
    assert labels.any() and not (labels & (batch["groups"] != WORD)).any()
    with ExitStack() as stack:
        maps = stack.enter_context(record_attention(student.denoiser))
        config = DenoisingConfig(caption_dropout=0.0, arm_weight=0.5)
        objective = SupervisedAttentionObjective(student, config, maps)
        terms = objective(batch, generator())
        maps.start()
        objective.predict(student.denoiser, student.text_encoders, objective.noised(batch, generator()))
        attention = torch.stack([m.mean(dim=1) for m in maps.take().values()]).mean(dim=0)
    eps = 2.0**-10
    expected = sum(1 / (float(a) + eps) - 1 for a in attention[labels]) / int(labels.sum()) * eps
    assert float(terms["arm"].detach()) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(terms["loss"], terms["denoising"] + 0.5 * terms["arm"])
    terms["arm"].backward()
    assert has_gradient(student.text_encoders[0])
    config = DenoisingConfig(caption_dropout=1.0, arm_weight=0.5)
    x = DenoisingObjective(student, config).noised(batch, generator())
    assert x.label_tokens is not None and not x.label_tokens.any(), "a dropped caption has no label"


def test_outputs_of_other_predictions_are_not_compared() -> None:
    teacher, student = prepared(lambda: tiny_sd("v_prediction")), prepared()
    with ExitStack() as stack:
        distilling(stack, student, teacher, feature_weight=1.0)
        with pytest.raises(UserError, match="output_weight: the teacher predicts v_prediction, the student epsilon"):
            distilling(stack, student, teacher, output_weight=1.0)


def test_the_tail_penalty_is_the_mass_of_eos_and_padding_beyond_that_before_the_training() -> None:
    student = prepared()
    batch = batch_of(student)
    with ExitStack() as stack:
        maps = stack.enter_context(record_attention(student.denoiser))
        objective = SupervisedAttentionObjective(student, DenoisingConfig(caption_dropout=0.3, tail_weight=0.5), maps)
        objective.measure_tail([batch] * 4, generator())
        level = objective.noised(batch, generator()).timesteps * 10 // 1000
        x = objective.noised(batch, generator())
        maps.start()
        objective.predict(student.denoiser, student.text_encoders, x)
        now = {n: (m.mean(dim=1) * (x.groups >= EOS)).sum(dim=1) for n, m in maps.take().items()}
        assert set(objective._tail) == set(now)
        bins = level + 10 * (x.groups != WORD).all(dim=1)
        allowed = {n: objective._tail[n][bins] for n in now}
        expected = torch.stack([(now[n] - allowed[n]).clamp(min=0).mean() for n in now]).mean()
        terms = objective(batch, generator())
        torch.testing.assert_close(terms["tail"], expected)
        torch.testing.assert_close(terms["loss"], terms["denoising"] + 0.5 * terms["tail"])
        objective._tail = {name: torch.zeros(20) for name in now}
        terms = objective(batch, generator())
        torch.testing.assert_close(terms["tail"], torch.stack([m.mean() for m in now.values()]).mean())
        terms["tail"].backward()
        assert has_gradient(student.text_encoders[0]) and has_gradient(student.denoiser)
        objective._tail = dict.fromkeys(now, torch.ones(20))
        assert float(objective(batch, generator())["tail"].detach()) == 0


def test_the_tail_before_the_training_is_a_mean_by_noise_level_and_unseen_levels_are_free() -> None:
    student = prepared()
    batch = batch_of(student)
    with ExitStack() as stack:
        maps = stack.enter_context(record_attention(student.denoiser))
        objective = SupervisedAttentionObjective(student, DenoisingConfig(caption_dropout=0.5, tail_weight=0.1), maps)
        draws = generator()
        objective.measure_tail([batch, batch], draws)
        draws, seen = generator(), []
        for _ in range(2):
            x = objective.noised(batch, draws)
            maps.start()
            objective.predict(student.denoiser, student.text_encoders, x)
            found = maps.take()
            name = next(iter(found))
            mass = (found[name].mean(dim=1) * (x.groups >= EOS)).sum(dim=1).detach()
            level = x.timesteps * 10 // 1000 + 10 * (x.groups != WORD).all(dim=1)
            seen += list(zip(level.tolist(), mass.tolist(), strict=True))
    for index, value in enumerate(objective._tail[name].tolist()):
        here = [mass for level, mass in seen if level == index]
        assert value == pytest.approx(sum(here) / len(here) if here else 1.0, abs=1e-6)
    assert len({level for level, _ in seen}) > 2

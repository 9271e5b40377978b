"""Attention distillation: terms that vanish on the teacher, gradients in the student alone, and what is not
compared."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_sd, tiny_sdxl
from toy_family import toy_model
from training import LORA, TEACHER, batch_of, distilling, generator, has_gradient, prepared, ready, set_up

from distill.attention import AttentionMaps, attention_layers
from distill.draws import shared_generator
from distill.errors import UserError
from distill.methods.gate import TIMESTEPS
from distill.methods.options import AttentionDistillationOptions, DenoisingOptions
from distill.models import Model, model_of
from distill.models.adapters import prepare_training

TERMS = ("token_kl", "place_kl", "mass")


def other(seed: int = 1) -> Model:
    return prepared(lambda: tiny_sd(seed=seed))


def moved(model: Model) -> None:
    """Other weights for the text encoder, as a training would give."""
    with torch.no_grad():
        for p in model.text_encoders[0].parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator(p.numel()))


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(build: Callable[[], Any]) -> None:
    student = prepared(build)
    batch = batch_of(student)
    with distilling(student, copy.deepcopy(student)) as method:
        terms = method(batch, generator())
    assert all(abs(float(terms[name])) < 1e-9 for name in TERMS)
    torch.testing.assert_close(terms["loss"], terms["denoising"], rtol=0, atol=1e-8)
    plain = set_up(DenoisingOptions(), student)(batch, generator())["loss"]
    torch.testing.assert_close(terms["denoising"], plain, rtol=0, atol=1e-6)


def test_loss_is_the_weighted_sum_of_its_terms() -> None:
    weights = {"token_kl_weight": 0.5, "place_kl_weight": 2.0, "mass_weight": 3.0}
    student = prepared()
    with distilling(student, other(), **weights) as method:
        terms = method(batch_of(student), generator())
    assert all(float(terms[name]) > 0 for name in TERMS)
    expected = terms["denoising"] + sum(weights[f"{name}_weight"] * terms[name] for name in TERMS)
    torch.testing.assert_close(terms["loss"], expected)


def test_a_term_without_a_weight_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> torch.Tensor:
        raise AssertionError("computed")

    student = prepared()
    batch = batch_of(student)
    with distilling(student, other()) as method:
        every = method(batch, generator())
    monkeypatch.setattr("distill.methods.attention_distillation.attention_mass_loss", never)
    with distilling(student, other(), mass_weight=0.0) as method:
        terms = method(batch, generator())
    assert set(every) == {"loss", "denoising", *TERMS} and set(terms) == set(every) - {"mass"}
    assert all(torch.equal(terms[name], every[name]) for name in ("denoising", "token_kl", "place_kl"))
    torch.testing.assert_close(terms["loss"], terms["denoising"] + 0.1 * (terms["token_kl"] + terms["place_kl"]))


NO_ATTENTION = {"token_kl_weight": 0.0, "place_kl_weight": 0.0, "mass_weight": 0.0}


def calls_of(model: Model) -> list[str]:
    """A list to which every call of a module of the denoiser without parts will be added."""
    called: list[str] = []
    for name, module in model.denoiser.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    return called


@pytest.mark.parametrize("terms", [("output_weight",), ("feature_weight", "self_attention_weight"), ()])
def test_without_a_term_of_the_attention_no_layer_is_recorded(terms: tuple[str, ...]) -> None:
    student, teacher = prepared(), other()
    batch, weights = batch_of(student), dict.fromkeys(terms, 1.0)
    fused = [dict(model.denoiser.attn_processors) for model in (student, teacher)]
    called = calls_of(teacher)
    with distilling(student, teacher, **NO_ATTENTION, **weights) as method:
        assert [model.denoiser.attn_processors for model in (student, teacher)] == fused
        found = method(batch, generator())
        assert set(found) == {"loss", "denoising", *(term.removesuffix("_weight") for term in terms)}
        assert bool(called) == bool(terms), "nobody asks for what the teacher says"
    with distilling(student, teacher, **NO_ATTENTION | {"mass_weight": 1e-9}, **weights) as method:
        recorded = method(batch, generator())
    torch.testing.assert_close(found["loss"], recorded["loss"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [(), ("down_blocks",), ("up_blocks",)])
def test_a_teacher_whose_maps_alone_are_asked_for_stops_after_the_last_of_them(
    layers: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = prepared(), other()
    batch, arguments = batch_of(student), teacher.family.example_inputs(teacher, 2, 8)
    before = teacher.family.predict(teacher.denoiser, *arguments)
    called = calls_of(teacher)
    with distilling(student, teacher, layers=layers) as method:
        terms = method(batch, generator())
        last = attention_layers(student.denoiser, layers)[-1]
        assert called[-1] == f"{last}.to_v"
        again = method(batch, generator())
        monkeypatch.setattr(AttentionMaps, "run", lambda maps, forward, *arguments: forward(*arguments))
        called.clear()
        whole = method(batch, generator())
        assert called[-1] == "conv_out"
    for name, value in whole.items():
        assert torch.equal(terms[name], value) and torch.equal(again[name], value), name
    assert torch.equal(teacher.family.predict(teacher.denoiser, *arguments), before)


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_each_term_reaches_the_student_and_never_the_teacher(trained: str) -> None:
    student, teacher = prepared(tiny_sd, trained, trained), other()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in teacher.modules()]
    with distilling(student, teacher) as method:
        method.train()
        assert not any(module in teacher.modules() for module in method.modules())
        assert not any(module.training for module in teacher.modules())
        batch = batch_of(student)
        for name in TERMS:
            method.zero_grad()
            method(batch, generator())[name].backward()
            assert has_gradient(student.denoiser) and has_gradient(student.text_encoders[0]), name
    for module, state in zip(teacher.modules(), before, strict=True):
        assert all(p.grad is None and not p.requires_grad for p in module.parameters())
        assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


@pytest.mark.parametrize("term", ["output_weight", "feature_weight", "self_attention_weight"])
def test_a_teacher_that_shares_weights_with_the_student_is_a_constant(term: str) -> None:
    """The gradient is that of a copy of the teacher; without no_grad the shared text encoder would have one through
    it."""
    gradients = []
    for shared in (False, True):
        student, teacher = prepared(), other()
        with distilling(
            student, teacher, token_kl_weight=0.0, place_kl_weight=0.0, mass_weight=0.0, **{term: 1.0}
        ) as m:
            moved(student)
            encoder = student.text_encoders[0]
            teacher.text_encoders[0] = encoder if shared else copy.deepcopy(encoder).requires_grad_(False)
            seen: list[bool] = []
            teacher.denoiser.register_forward_pre_hook(lambda *_, seen=seen: seen.append(torch.is_grad_enabled()))
            m(batch_of(student), generator())["loss"].backward()
        assert seen == [False]
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_a_teacher_rests_in_the_frozen_type() -> None:
    student, teacher = prepared(), other()
    options = AttentionDistillationOptions(teacher=TEACHER)
    with ready(options, student, {TEACHER: teacher}, frozen_dtype=torch.bfloat16) as method:
        terms = method(batch_of(student), generator())
        assert method.teacher is teacher
    assert {p.dtype for m in (teacher.denoiser, *teacher.text_encoders) for p in m.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in student.denoiser.parameters()} == {torch.float32}
    assert all(torch.isfinite(value) for value in terms.values())


def test_only_timesteps_in_range_count() -> None:
    student, teacher = prepared(), other()
    batch = batch_of(student)
    timesteps = set_up(DenoisingOptions(), student).noised(batch, generator()).timesteps
    assert timesteps.max() > timesteps.min() + 1
    top, found = int(timesteps.max()), []
    for limits in ((top, top), (top + 1, top + 1), (0, 999)):
        with distilling(student, teacher, min_timestep=limits[0], max_timestep=limits[1], output_weight=1.0) as method:
            found.append(method(batch, generator()))
    one, none, all_rows = found
    for name in (*TERMS, "output"):
        assert float(none[name]) == 0
        assert float(one[name]) > 0 and not math.isclose(float(one[name]), float(all_rows[name]), rel_tol=1e-6)
    assert float(none["loss"]) == float(none["denoising"])


def test_only_the_asked_layers_count() -> None:
    student, teacher = prepared(), other()
    found = {}
    for layers in ((), ("down_blocks",), ("mid_block",), ("up_blocks",)):
        with distilling(student, teacher, layers=layers) as method:
            found[layers] = method(batch_of(student), generator())["token_kl"]
    # The tiny U-Net has 1, 1 and 2 cross-attention layers there; the term is the mean over layers.
    parts = found["down_blocks",] + found["mid_block",] + 2 * found["up_blocks",]
    torch.testing.assert_close(found[()], parts / 4, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_gradient_checkpointing_gives_equal_gradients_of_the_distillation(trained: str) -> None:
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = prepared(tiny_sd, trained, trained, gradient_checkpointing=checkpointing)
        with distilling(student, other()) as method:
            terms = method.train()(batch_of(student), generator())
            terms["loss"].backward()
        gradients = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
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


def wider_text() -> Any:
    pipeline = tiny_sd()
    pipeline.unet = type(pipeline.unet).from_config({**pipeline.unet.config, "cross_attention_dim": 32})
    return pipeline


def shorter_schedule() -> Any:
    pipeline = tiny_sd()
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, beta_end=0.02)
    return pipeline


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (tiny_sd, tiny_sdxl, "the teacher is a sdxl model, and the student a "),
        (tiny_sd, wider_text, "different shape: .*cross_attention_dim: teacher 32, student 16"),
        (more_layers, tiny_sd, "different shape: .*the teacher lacks .*down_blocks.0.attentions.1"),
        (tiny_sd, shorter_schedule, "different shape: .*noise schedules differ"),
    ],
    ids=["family", "width", "layers", "schedule"],
)
def test_a_teacher_of_another_shape_is_refused(
    student: Callable[[], Any], teacher: Callable[[], Any], expected: str
) -> None:
    with pytest.raises(UserError, match=expected), distilling(prepared(student), prepared(teacher)):
        pass


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
        with distilling(student, teacher, **weights) as method:
            terms = method(batch, generator())
        torch.testing.assert_close(terms["loss"], terms["denoising"] + 2.0 * terms[term])
        assert "feature" not in terms or term == "feature"
        return terms

    assert float(terms_of(copy.deepcopy(student))[term].detach()) == pytest.approx(0, abs=1e-9)
    for seed in range(8):  # the leak is 0 for a teacher with more mass in the tail, so look for one with less
        teacher = copy.deepcopy(student)
        with torch.no_grad():
            for p in [*teacher.denoiser.parameters(), *(p for e in teacher.text_encoders for p in e.parameters())]:
                p += 0.05 * torch.randn(p.shape, generator=generator(int(p.numel()) + seed))
        terms = terms_of(teacher)
        if float(terms[term].detach()) > 0:
            break
    assert float(terms[term].detach()) > 0
    terms[term].backward()
    assert has_gradient(student.denoiser) and has_gradient(student.text_encoders[0])
    assert not any(module._forward_hooks for module in student.denoiser.modules()), "hooks are removed"


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_a_share_of_the_batch_is_distilled(share: float) -> None:
    student, teacher = prepared(), other()
    batch = batch_of(student)
    size = len(batch.groups)
    count = max(1, round(share * size))
    seen: list[int] = []
    handle = teacher.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    terms = []
    for part in (share, 1.0):
        with distilling(student, teacher, batch_share=part, output_weight=1.0) as method:
            terms.append(method(batch, generator()))
    handle.remove()
    assert seen == [count, size]
    torch.testing.assert_close(terms[0]["denoising"], terms[1]["denoising"])
    for name in (*TERMS, "output"):
        assert (count == size) == torch.equal(terms[0][name], terms[1][name])


def test_distillation_of_labels_leaves_every_other_token_free() -> None:
    student = prepared()
    teacher, batch = copy.deepcopy(student), batch_of(student, label_tokens=True)
    assert batch.label_tokens is not None
    with distilling(student, teacher, words="labels", mass_weight=0.0) as method:
        moved(student)
        terms = method(batch, generator())
        assert float(terms["token_kl"].detach()) > 0 and float(terms["place_kl"].detach()) > 0
        unlabeled = type(batch)(**{**vars(batch), "label_tokens": torch.zeros_like(batch.label_tokens)})
        nothing = method(unlabeled, generator())
    assert float(nothing["place_kl"].detach()) == 0
    assert abs(float(nothing["token_kl"].detach())) < 1e-6


def test_outputs_of_other_predictions_are_not_compared() -> None:
    teacher, student = prepared(lambda: tiny_sd("v_prediction")), prepared()
    with distilling(student, teacher, feature_weight=1.0):
        pass
    with (
        pytest.raises(UserError, match="output_weight: the teacher predicts v_prediction, the student epsilon"),
        distilling(student, teacher, output_weight=1.0),
    ):
        pass


def test_a_distillation_that_begins_later_trains_freely_and_without_the_teacher_until_then() -> None:
    student, teacher = prepared(), other()
    batch, seen = batch_of(student), []
    handle = teacher.denoiser.register_forward_pre_hook(lambda *_: seen.append(1))
    processor = type(student.denoiser.get_submodule(attention_layers(student.denoiser)[0]).processor)
    with distilling(student, teacher, begin_after_steps=2) as method:
        before = [method(batch, shared_generator(0, step, 0, 1, step=step)) for step in (1, 2)]
        assert type(student.denoiser.get_submodule(attention_layers(student.denoiser)[0]).processor) is processor
        assert not seen, "a pass of the teacher costs time"
        after = method(batch, shared_generator(0, 3, 0, 1, step=3))
        assert [method.passes(step, 4) for step in (1, 2, 3)] == [12, 12, 16]
    with distilling(student, teacher) as method:
        always = [method(batch, shared_generator(0, step, 0, 1, step=step)) for step in (1, 2, 3)]
    handle.remove()
    for terms, wanted in zip(before, always, strict=False):
        assert terms.keys() == {"loss", "denoising"} and terms["loss"] is terms["denoising"]
        torch.testing.assert_close(terms["loss"], wanted["denoising"])
    assert after.keys() == always[2].keys()
    torch.testing.assert_close(after, always[2], rtol=0, atol=0)


# --- a family that is none of the stock ones ------------------------------------------------------------------------


def test_a_toy_third_family_takes_one_step_of_distillation() -> None:
    student, teacher = toy_model(0), toy_model(1)
    prepare_training(student, denoiser="full", text_encoder="full", lora=LORA)
    batch = batch_of(student)
    weights = {"output_weight": 1.0, "feature_weight": 1.0, "self_attention_weight": 1.0}
    with distilling(student, teacher, **weights) as method:
        terms = method.train()(batch, generator())
        terms["loss"].backward()
    assert {"loss", "denoising", *TERMS, "output", "feature", "self_attention"} == set(terms)
    assert all(torch.isfinite(value) and float(value.detach()) > 0 for value in terms.values())
    assert has_gradient(student.denoiser) and has_gradient(student.text_encoders[0])
    assert not any(has_gradient(module) for module in [*teacher.modules(), student.vae])
    before = copy.deepcopy(student.denoiser.state_dict())
    torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1).step()
    assert any(not torch.equal(value, before[name]) for name, value in student.denoiser.state_dict().items())

    equal = toy_model(0)
    prepare_training(equal, denoiser="full", text_encoder="full", lora=LORA)
    with distilling(equal, toy_model(0)) as method:
        terms = method(batch, generator())
    assert all(abs(float(terms[name].detach())) < 1e-9 for name in TERMS)
    with (
        pytest.raises(UserError, match="the teacher is a .* model, and the student a toy model"),
        distilling(equal, model_of(tiny_sd())),
    ):
        pass


# --- the gate -------------------------------------------------------------------------------------------------------


def test_the_gate_teaches_what_passes_and_says_by_which_numbers(tmp_path: Path) -> None:
    """The teacher is better in two of three layers, in words and EOS, and localizes at timesteps 300 to 599."""
    student, teacher, reference = prepared(), other(1), other(2)
    layers = attention_layers(student.denoiser)
    asked, said = [], []

    def layer_scores(model: Model, images: int, timesteps: Sequence[int], label: str) -> tuple[Any, Sequence[str]]:
        asked.append((model is teacher, model is reference, images, tuple(timesteps), label))
        scores = np.full((3, len(layers), len(timesteps)), 0.1)
        if model is teacher:
            scores[:, :, 3:6] = 0.4  # words, EOS and padding
            scores[2] = -0.1
            scores[0, 0] = 0.05  # its first layer is worse than the reference's
        return scores, layers

    options = AttentionDistillationOptions(teacher=TEACHER, gate_reference="base", gate_images=7, max_timestep=549)
    models = {TEACHER: teacher, "base": reference}
    with ready(options, student, models, layer_scores=layer_scores, log_dir=tmp_path, say=said.append) as method:
        assert method.match.layers == tuple(layers[1:]) and method.match.place_groups == ("words", "eos")
        assert (method.match.min_timestep, method.match.max_timestep) == (300, 549)
        terms = method(batch_of(student), generator())
        assert list(method._student_maps.sizes) == layers[1:]
    assert asked == [(True, False, 7, TIMESTEPS, "gate: teacher"), (False, True, 7, TIMESTEPS, "gate: reference")]
    assert set(TERMS) <= set(terms)
    written = json.loads((tmp_path / "gate.json").read_text(encoding="utf-8"))
    assert written["layers"] == layers[1:] and written["image_adds"]["teacher"][layers[1]]["words"] == pytest.approx(
        0.4
    )
    assert said[0].startswith(f"gate: {len(layers) - 1} of {len(layers)} layers and the maps of words, eos")


def test_a_dry_run_has_no_gate(tmp_path: Path) -> None:
    """It has no validation images to look at: layer_scores is None."""
    options = AttentionDistillationOptions(teacher=TEACHER, gate_reference="base")
    with ready(options, prepared(), {TEACHER: other()}, log_dir=tmp_path) as method:
        assert method.match is options
    assert list(tmp_path.iterdir()) == []

"""A teacher that is trained beside the student: it is the frozen arm, it pulls the student alone, and it is not exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import same, state_of, train
from tiny import save_tiny
from training import LORA, NO_DROPOUT, batch_of, generator, has_gradient, phantoms, prepared, ready

from distill.config import BaseConfig
from distill.data.rows import TrainingRows
from distill.errors import UserError
from distill.methods import method_of
from distill.methods.options import DenoisingOptions, LockstepOptions
from distill.methods.training import Training
from distill.models.adapters import prepare_training
from distill.models.export import export, prove_parity
from distill.models.loading import load_model


def test_at_first_the_teacher_is_the_student_and_has_nothing_to_teach() -> None:
    student = prepared()
    with ready(LockstepOptions(), student) as method:
        terms = method(batch_of(student), generator())
    assert all(abs(float(terms[name].detach())) < 1e-9 for name in ("token_kl", "place_kl", "mass"))
    torch.testing.assert_close(terms["teacher_denoising"], terms["denoising"])
    torch.testing.assert_close(terms["loss"], 2 * terms["denoising"])


def test_layers_that_the_student_does_not_have_are_refused() -> None:
    with pytest.raises(UserError, match="no cross-attention layer starts with 'up_blocks.9'"):
        method_of(LockstepOptions(layers=("up_blocks.9",)), NO_DROPOUT).faults(prepared(), Training())


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_each_loss_has_a_gradient_where_it_should(trained: str) -> None:
    student = prepared(denoiser=trained, text_encoder=trained)
    with ready(LockstepOptions(), student) as method:
        with torch.no_grad():
            for p in student.text_encoders[0].parameters():
                p += 0.1 * torch.randn(p.shape, generator=generator(p.numel()))
        encoders = method.teacher.text_encoders
        assert not any(module in encoders for module in method.modules())
        for name, ours, theirs in (
            ("place_kl", True, False),
            ("denoising", True, False),
            ("teacher_denoising", False, True),
        ):
            method.zero_grad()
            method.train()(batch_of(student), generator())[name].backward()
            assert has_gradient(student.denoiser) == has_gradient(student.text_encoders[0]) == ours, name
            assert has_gradient(method.teacher_denoiser) == theirs, name
        assert not has_gradient(encoders[0]) and not encoders[0].training and method.teacher_denoiser.training
        groups = method.parameter_groups(1e-3, 1e-5)
        assert [group["lr"] for group in groups] == [1e-3, 1e-5, 1e-3]
        assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in method.parameters())


def test_the_teacher_is_the_arm_with_a_frozen_text_encoder(tmp_path: Path) -> None:
    """Without clipping, which looks at all gradients together."""
    alone = prepared(text_encoder="frozen")
    beside = prepared(text_encoder="full")
    options: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "max_grad_norm": 1e6}
    with ready(DenoisingOptions(), alone) as method:
        train(method, tmp_path / "alone", TrainingRows(phantoms(), alone, NO_DROPOUT), **options)
    with ready(LockstepOptions(), beside) as method:
        train(method, tmp_path / "beside", TrainingRows(phantoms(), beside, NO_DROPOUT), **options)
        teacher = method.teacher_denoiser
    pairs = zip(alone.denoiser.parameters(), teacher.parameters(), strict=True)
    gaps = torch.cat([(one - other).detach().abs().flatten() for one, other in pairs])
    # Recorded attention rounds otherwise, and Adam divides a gradient that is only rounding by its own size.
    assert (gaps > 1e-5).double().mean() < 1e-3 and gaps.max() < 2e-4, "two steps of 1e-3"
    assert not same(state_of(teacher), state_of(beside.denoiser))


@pytest.mark.parametrize("trained", ["full", "lora"])
def test_the_student_alone_is_exported_as_stock_files(trained: Any, tmp_path: Path) -> None:
    base = BaseConfig(name=str(save_tiny(tmp_path / "base")))
    student = load_model(base)
    prepare_training(student, denoiser=trained, text_encoder=trained, lora=LORA)
    with ready(LockstepOptions(), student) as method:
        train(method, tmp_path / "run", TrainingRows(phantoms(), student, NO_DROPOUT), max_steps=1, learning_rate=1e-2)
    assert set(export(student, tmp_path / "run")) == ({"lora"} if trained == "lora" else {"unet", "text_encoder"})
    assert prove_parity(student, load_model(base, run=tmp_path / "run"), "cpu") < 1e-5


@pytest.mark.parametrize("part", ["text_encoder", "denoiser"])
def test_a_part_that_would_be_frozen_in_both_is_refused(part: str) -> None:
    asked = Training(**{"denoiser": "full", "text_encoder": "full"} | {part: "frozen"}, method=LockstepOptions())
    (fault,) = method_of(LockstepOptions(), NO_DROPOUT).faults(prepared(), asked)
    assert f"set {part} to full or lora" in fault

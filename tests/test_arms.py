"""Options that a run of these arms would not read are named, and those that it reads are not."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from distill.arms import FROZEN_TEXT_ENCODER, Arm, is_gated, label_readers, unused_options
from distill.methods.objectives import EMA

from distill.config import AttentionDistillationConfig, DenoisingConfig, TradeoffConfig


def arm(name: str, **options: object) -> Arm:
    values: dict[str, object] = {"method": "full", "text_encoder": "full", **options}
    return Arm(name, None, values.pop("method"), values.pop("text_encoder"), 1e-4, 1e-4, **values)  # type: ignore[arg-type]


FROZEN = arm("frozen", text_encoder="frozen")
LEARNABLE = arm("learnable")
DISTILLED = arm("distilled", distillation=AttentionDistillationConfig(teacher="frozen"))
LORA = arm("lora", method="lora", text_encoder="lora", distillation=AttentionDistillationConfig(teacher="frozen"))
SHARED_SELF = arm(
    "half",
    variant_of="self_taught",
    distillation=AttentionDistillationConfig(teacher=FROZEN_TEXT_ENCODER, batch_share=0.25),
)
PARAPHRASED = arm("texts", variant_of="learnable", denoising=DenoisingConfig(training_text="paraphrases"))
PENALIZED = arm("more", variant_of="tail_penalized", denoising=DenoisingConfig(tail_weight=0.3))
RALI = arm("rali", denoising=DenoisingConfig(insert_labels="first"))
EMA_TAUGHT = arm("mean", variant_of="distilled", distillation=AttentionDistillationConfig(teacher=EMA))
SELF = arm("self_taught", distillation=AttentionDistillationConfig(teacher=FROZEN_TEXT_ENCODER))


@pytest.mark.parametrize(
    ("arms", "unread", "read"),
    [
        ([FROZEN], "trainer.text_encoder_learning_rate", "trainer.learning_rate"),
        ([FROZEN, LORA], "trainer.text_encoder_learning_rate", "lora.rank"),
        ([LORA], "trainer.learning_rate", "lora_learning_rate"),
        ([LORA], "method", "distillation.token_kl_weight"),
        ([FROZEN, LEARNABLE], "distillation.token_kl_weight", "trainer.text_encoder_learning_rate"),
        ([FROZEN, DISTILLED], "distillation.ema_decay", "distillation.batch_share"),
        ([SELF], "distillation.batch_share", "distillation.token_kl_weight"),
        ([DISTILLED], "denoising.arm_weight", "denoising.caption_dropout"),
        ([DISTILLED], "denoising.tail_weight", "distillation.tail_weight"),
        ([FROZEN, LEARNABLE], "tail_penalty_weight", "denoising.tail_weight"),
        ([FROZEN, DISTILLED], "denoising.paraphrases", "denoising.arm_weight"),
        ([FROZEN, PARAPHRASED], "tail_penalty_weight", "denoising.paraphrases"),
        ([FROZEN, PENALIZED], "rali_arm_weight", "tail_penalty_weight"),
        ([PENALIZED], "denoising.tail_weight", "denoising.region_mask_weight"),
        ([SHARED_SELF], "distillation.batch_share", "self_taught_batch_share"),
        ([RALI], "rali_arm_weight", "denoising.tail_weight"),
        ([EMA_TAUGHT], "self_taught_batch_share", "distillation.ema_decay"),
    ],
)
def test_options_that_no_arm_reads(arms: list[Arm], unread: str, read: str) -> None:
    unused = unused_options(replace(TradeoffConfig(), arms=tuple(a.name for a in arms)), arms)
    assert unread in unused and read not in unused


def test_every_named_option_exists() -> None:
    config = TradeoffConfig()
    for key in unused_options(config, [FROZEN, LEARNABLE]):
        part = config
        for name in key.split("."):
            assert name in {item.name for item in fields(part)}, key
            part = getattr(part, name)


def test_a_teacher_without_weights_of_its_own_has_no_gate() -> None:
    gate = AttentionDistillationConfig(teacher="run", gate_reference="base")
    assert is_gated(arm("a", distillation=gate)) and not is_gated(LEARNABLE) and not is_gated(DISTILLED)
    assert not is_gated(arm("a", distillation=replace(gate, teacher=FROZEN_TEXT_ENCODER)))


def test_who_looks_for_labels() -> None:
    config = TradeoffConfig()
    assert not any(label_readers(config, [FROZEN, DISTILLED]).values())
    labels = arm("a", distillation=AttentionDistillationConfig(teacher="run", words="labels"))
    assert label_readers(config, [labels])["distillation.words labels"]
    rali = arm("rali", denoising=DenoisingConfig(insert_labels="first"))
    assert label_readers(config, [FROZEN, rali])["denoising.insert_labels"]

"""Models, batches and methods set up on them, for tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_sd, tiny_sdxl
from torch import nn

from distill.config import DenoisingConfig, LoraConfig
from distill.data.batch import Batch, Tokens
from distill.data.phantom.dataset import PhantomDataset
from distill.data.rows import TrainingRows
from distill.methods import METHODS, method_of
from distill.methods.attention_distillation import AttentionDistillation
from distill.methods.base import Context, Method, Noised
from distill.methods.options import AttentionDistillationOptions, ConsistencyOptions, Options
from distill.models import Model, model_of
from distill.models.adapters import prepare_training

LORA = LoraConfig(rank=2, alpha=4.0)
NO_DROPOUT = DenoisingConfig(caption_dropout=0.0)
TEACHER = "the teacher"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def phantoms() -> PhantomDataset:
    return PhantomDataset("train", 12, resolution=64)


def batch_of(model: Model, rows: Sequence[int] = range(4), **options: Any) -> Batch:
    dataset = TrainingRows(phantoms(), model, **options)
    return Batch.stack([dataset[i] for i in rows])


def tokens_of(x: Batch | Noised) -> torch.Tensor:
    """(batch, tokens) of the first tokenizer."""
    assert isinstance(x.text, Tokens)
    return x.text.input_ids[0]


def prepared(
    build: Callable[[], Any] = tiny_sd,
    denoiser: Any = "full",
    text_encoder: Any = "full",
    chunks: int = 1,
    **options: Any,
) -> Model:
    model = model_of(build())
    model.caption_chunks = chunks
    prepare_training(model, denoiser=denoiser, text_encoder=text_encoder, lora=LORA, **options)
    return model


def context_of(models: Mapping[str, Model] | None = None, **options: Any) -> Context:
    """What an experiment hands a method. models: what `load` gives, by name."""
    values: dict[str, Any] = {
        "generator": generator(),
        "device": torch.device("cpu"),
        "is_main": True,
        "log_dir": Path("nowhere"),
        "frozen_dtype": torch.float32,
        "dry_run": False,
        "load": dict(models or {}).__getitem__,
        "batches": lambda images: iter(()),
        "captions": lambda count: [phantoms().caption(i) for i in range(12)],
        "layer_scores": None,
        "say": lambda message: None,
    }
    return Context(**(values | options))


def set_up(
    options: Options, student: Model, context: Context | None = None, denoising: DenoisingConfig = NO_DROPOUT
) -> Method:
    method = method_of(options, denoising)
    method.setup(student, context or context_of())
    return method


@contextmanager
def ready(
    options: Options,
    student: Model,
    models: Mapping[str, Model] | None = None,
    denoising: DenoisingConfig = NO_DROPOUT,
    **context: Any,
) -> Iterator[Any]:
    """A method set up on a student; its recorders are closed at the end."""
    method = set_up(options, student, context_of(models, **context), denoising)
    try:
        yield method
    finally:
        method.finish()


@contextmanager
def distilling(student: Model, teacher: Model, **options: Any) -> Iterator[AttentionDistillation]:
    with ready(AttentionDistillationOptions(teacher=TEACHER, **options), student, {TEACHER: teacher}) as method:
        yield method


KINDS: dict[str, type[Options]] = {options.model_fields["kind"].default: options for options in METHODS}
NEEDED: dict[str, dict[str, Any]] = {
    "attention_distillation": {"teacher": TEACHER},
    "supervised_attention": {"arm_weight": 0.1, "region_token_weight": 0.1},
    "tail_penalty": {"weight": 5.0},
    "consistency": {"teacher": TEACHER},
}
"""Options without which a method of this kind cannot be set up, or does nothing."""
VARIANTS: dict[str, dict[str, Any]] = {
    "attention_distillation-later": {"teacher": TEACHER, "begin_after_steps": 1},
    "key_lock-released": {"release_after_steps": 1, "release_over_steps": 2},
    "key_lock-words": {"locked_layers": ("up_blocks",), "locked_tokens": "words"},
}
"""Kind, a dash, and a word -> options that make another method of it."""
EXAMPLES = (*KINDS, *VARIANTS)


def example(name: str, denoising: DenoisingConfig = NO_DROPOUT, chunks: int = 1) -> tuple[Method, TrainingRows]:
    """One of EXAMPLES, set up on a tiny student whose denoiser trains in full and whose text encoder by LoRA; its rows.
    A name that ends in -sdxl has a student of SDXL's shape. chunks: of captions."""
    options = KINDS[name.partition("-")[0]](**VARIANTS.get(name, NEEDED.get(name, {})))  # type: ignore[arg-type]
    torch.manual_seed(0)
    student = prepared(tiny_sdxl if name.endswith("-sdxl") else tiny_sd, text_encoder="lora", chunks=chunks)
    batches = [batch_of(student), batch_of(student, range(4, 8))]
    teachers = {TEACHER: replace(model_of(tiny_sd(seed=1)), caption_chunks=chunks)}
    if isinstance(options, ConsistencyOptions):  # its teacher reads the student's text
        for own, theirs in zip(student.text_encoders, teachers[TEACHER].text_encoders, strict=True):
            theirs.load_state_dict(
                {n.replace(".base_layer.", "."): v for n, v in own.state_dict().items() if "lora_" not in n}
            )
    context = context_of(teachers, batches=lambda images: iter(batches), is_main=False)  # writes no file
    reads = {"label_tokens": options.reads_labels, "regions": options.reads_regions}
    return set_up(options, student, context, denoising), TrainingRows(phantoms(), student, denoising, **reads)


def has_gradient(module: nn.Module) -> bool:
    return any(p.grad is not None and bool((p.grad != 0).any()) for p in module.parameters())

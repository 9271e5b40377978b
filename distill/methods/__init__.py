"""Methods: what a training minimizes. One file each, with its options; to add one, add its file and its class to METHODS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import Field

from distill.methods.attention_distillation import AttentionDistillation
from distill.methods.base import Context, Method, Options, Terms
from distill.methods.consistency import Consistency
from distill.methods.denoising import Denoising
from distill.methods.key_lock import KeyLocked
from distill.methods.supervised_attention import SupervisedAttention
from distill.methods.tail_penalty import TailPenalty

METHODS: tuple[type[Method], ...] = (
    Denoising,
    AttentionDistillation,
    KeyLocked,
    SupervisedAttention,
    TailPenalty,
    Consistency,
)
"""Every method that a configuration can name, by the `kind` of its options."""

if TYPE_CHECKING:
    AnyOptions = Options
else:
    AnyOptions = Annotated[Union[tuple(method.Options for method in METHODS)], Field(discriminator="kind")]  # noqa: UP007
"""The options of any method: a tagged union by `kind`."""


def method_of(options: Options, denoising: Any) -> Method:
    """The method that these options describe, not set up yet."""
    classes = {method.Options: method for method in METHODS}
    return classes[type(options)](options, denoising)


__all__ = ["METHODS", "AnyOptions", "Context", "Method", "Options", "Terms", "method_of"]

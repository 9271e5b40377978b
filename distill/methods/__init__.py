"""Methods: what a training minimizes. To add one, add its file, and its options with their class to METHODS."""

from __future__ import annotations

import pkgutil
from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from distill.methods.options import (
    AttentionDistillationOptions,
    ConsistencyOptions,
    DenoisingOptions,
    KeyLockOptions,
    Options,
    SupervisedAttentionOptions,
    TailPenaltyOptions,
)

if TYPE_CHECKING:
    from distill.config import DenoisingConfig
    from distill.methods.base import Method

METHODS: dict[type[Options], str] = {
    DenoisingOptions: "denoising:Denoising",
    AttentionDistillationOptions: "attention_distillation:AttentionDistillation",
    KeyLockOptions: "key_lock:KeyLocked",
    SupervisedAttentionOptions: "supervised_attention:SupervisedAttention",
    TailPenaltyOptions: "tail_penalty:TailPenalty",
    ConsistencyOptions: "consistency:Consistency",
}
"""Options of every method that a configuration can name -> its file in this folder, and its class there."""

if TYPE_CHECKING:
    AnyOptions = Options
else:
    AnyOptions = Annotated[Union[tuple(METHODS)], Field(discriminator="kind")]  # noqa: UP007
"""The options of any method: a tagged union by `kind`."""


def method_of(options: Options, denoising: DenoisingConfig) -> Method:
    """The method that these options describe, not set up yet."""
    method: type[Method] = pkgutil.resolve_name(f"distill.methods.{METHODS[type(options)]}")
    return method(options, denoising)

"""The base of every configuration class: frozen, strict, and with its docstrings as help."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Many = TypeVar("Many", bound="tuple[object, ...]")


class Settings(BaseModel):
    """A group of options. The docstring under a field is its help; unknown keys and wrong types are refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, validate_default=True
    )
    common: ClassVar[tuple[str, ...]] = ()
    """Dotted keys that `--help` shows first."""
    renamed: ClassVar[dict[str, str]] = {}
    """Old dotted key -> a sentence that says what to write now, such as "lora.rank is now denoiser.rank"."""


ON_RESUME = "on_resume"
HARMLESS = Field(json_schema_extra={ON_RESUME: "harmless"})
"""Of an option that may differ when a run folder is continued: it changes no trained weight. Results that it changes
are made anew. An option without such a mark must stay as it was."""
MAY_GROW = Field(json_schema_extra={ON_RESUME: "may_grow"})
"""Of an option that may be larger when a run folder is continued."""
MAY_GAIN = Field(json_schema_extra={ON_RESUME: "may_gain"})
"""Of a mapping that may have further entries when a run folder is continued."""


def once(values: Many) -> Many:
    """Raise ValueError, with the value, if one is there twice."""
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"expected each only once, got {twice[0]!r} several times")
    return values


def without_nul(text: str) -> str:
    """Raise ValueError for NUL, which no file's name can have."""
    if "\0" in text:
        raise ValueError(f"expected text without NUL, got {text[:60]!r}")
    return text


# Bounds that nobody crosses on purpose, so that a slip of the keyboard is answered at once.
Count = Annotated[int, Field(ge=1, le=10**8)]
Number = Annotated[int, Field(ge=0, le=10**8)]
Batch = Annotated[int, Field(ge=1, le=65536)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""NumPy takes no larger one."""
Timestep = Annotated[int, Field(ge=0, lt=10**5)]
Rate = Annotated[float, Field(ge=1e-12, le=1)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Probability = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Inside = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"\S"), AfterValidator(without_nul)]
Texts = Annotated[tuple[Text, ...], AfterValidator(once)]
Timesteps = Annotated[tuple[Timestep, ...], Field(min_length=1), AfterValidator(once)]

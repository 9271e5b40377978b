"""The base of every configuration class: frozen, strict, and with its docstrings as help."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field


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
"""Of an option that may differ when a run folder is continued: it changes no trained weight. Results that it changes are
made anew. An option without such a mark must stay as it was."""
MAY_GROW = Field(json_schema_extra={ON_RESUME: "may_grow"})
"""Of an option that may be larger when a run folder is continued."""

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Number = Annotated[int, Field(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]
Weight = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Probability = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Inside = Annotated[float, Field(gt=0, lt=1)]
Text = Annotated[str, Field(min_length=1, pattern=r"\S")]

"""Options of a kind of data, as a configuration file gives them."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from distill.data_config import AnyData, DataConfig


def data_options(**options: Any) -> DataConfig:
    """The checked options of `kind`."""
    found: DataConfig = TypeAdapter(AnyData).validate_python({"kind": "phantom", **options})
    return found

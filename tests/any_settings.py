"""Legal values of any Settings class, for tests of what holds for all of them."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args, get_origin

from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from distill.configuration.options import KIND, entry_type, field_types, is_optional, models_of, without_none
from distill.settings import Settings

TRICKY = """no|1e-4|null|None|none|true|3|0x1f|2024-01-01|{a: 1}|[]|~|<<|=|- a|a: b|\x85|a\u2028b|\u2029 c\n|'|"|#| a |a, b|*a
|&a|!!int 3|\ufeff|\x00|\x1b[31m|a.b|1_000|.inf|0o7|@|`|%|?|:|---|...""".split("|")
TEXTS = st.sampled_from(TRICKY) | st.text(max_size=12)


def _limit(metadata: list[Any], *names: str, default: Any) -> Any:
    parts = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
    return next((getattr(part, name) for part in parts for name in names if hasattr(part, name)), default)


def values_of(hint: Any, metadata: list[Any] | None = None) -> st.SearchStrategy[Any]:
    """Values as JSON has them; most of them are legal."""
    metadata = metadata or []
    if get_origin(hint) is Annotated and not models_of(hint):
        return values_of(get_args(hint)[0], [*metadata, *get_args(hint)[1:]])
    if is_optional(hint):
        parts = without_none(hint)
        inner = (
            [part for part in get_args(hint) if part is not type(None)] if get_origin(hint) is not Annotated else parts
        )
        return st.none() | st.one_of(*(values_of(part, metadata) for part in inner))
    if models := models_of(hint):
        return st.one_of(*(mappings_of(model, kind) for kind, model in models.items()))
    if entry_type(hint) is not None:
        return st.dictionaries(TEXTS, values_of(entry_type(hint)), max_size=2)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return st.tuples(*map(values_of, arguments)).map(list)
    if origin in (tuple, list):
        return st.lists(values_of(arguments[0]), min_size=_limit(metadata, "min_length", default=0), max_size=3)
    if origin is not None:
        return st.one_of(*map(values_of, arguments))
    low, high = _limit(metadata, "ge", "gt", default=-(10**6)), _limit(metadata, "le", "lt", default=10**6)
    return {
        bool: st.booleans(),
        str: TEXTS,
        int: st.integers(math.ceil(low), math.floor(high)),
        float: st.floats(low, high, allow_nan=False),
    }[hint]


@st.composite
def mappings_of(draw: st.DrawFn, model: type[Settings], kind: str = "") -> dict[str, Any]:
    fields = {name: hint for name, hint in field_types(model).items() if name != KIND}
    names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True))
    return ({KIND: kind} if kind else {}) | {name: draw(values_of(fields[name])) for name in names}


def configs_of(model: type[Settings]) -> st.SearchStrategy[Any]:
    """Configurations with some legal changes."""

    def built(values: dict[str, Any]) -> Any:
        try:
            return model.model_validate(values)
        except ValidationError:
            return None  # options that do not fit together, or a limit that is itself not legal

    return mappings_of(model).map(built).filter(lambda config: config is not None)

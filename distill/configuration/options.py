"""What a configuration class says of its options: groups, kinds, types and ranges, and the range in plain English."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from distill.configuration.yaml_text import KIND
from distill.settings import Settings

LIKE = "like"
"""The key by which an entry of a mapping names another, whose options it has."""
HUGE = 10**6
"""A limit from here on is named only where a value is above it."""


@functools.cache
def field_types(model: type[Settings]) -> dict[str, object]:
    """Type of each field, with its range as `Annotated`."""
    return {name: _annotated(field.annotation, field.metadata) for name, field in model.model_fields.items()}


def _annotated(hint: object, metadata: list[object]) -> object:
    return Annotated.__class_getitem__((hint, *metadata)) if metadata else hint  # type: ignore[attr-defined]


def members(hint: object) -> list[object]:
    """Members of a union, or the type alone, without `Annotated`."""
    if get_origin(hint) is Annotated:
        return members(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [member for argument in get_args(hint) for member in members(argument)]
    return [hint]


def is_optional(hint: object) -> bool:
    return type(None) in members(hint)


def without_none(hint: object) -> list[object]:
    return [member for member in members(hint) if member is not type(None)]


def models_of(hint: object) -> dict[str, type[Settings]]:
    """Settings classes that a field may hold, by kind; a class that stands alone has kind ''. Empty for a value."""
    members = without_none(hint)
    found = [member for member in members if isinstance(member, type) and issubclass(member, Settings)]
    if not found or len(found) < len(members):
        return {}
    if len(found) == 1:
        return {"": found[0]}
    return {kind: member for member in found for kind in get_args(member.model_fields[KIND].annotation)}


def entry_type(hint: object) -> object:
    """Type of the entries of a mapping; None for any other type."""
    return next((get_args(member)[1] for member in members(hint) if get_origin(member) is dict), None)


def item_type(hint: object, index: int) -> object:
    """Type of one item of a list; None for any other type."""
    found = without_none(hint)
    if len(found) != 1 or get_origin(found[0]) not in (list, tuple):
        return None
    arguments = get_args(found[0])
    is_fixed = get_origin(found[0]) is tuple and arguments[-1] is not Ellipsis
    return arguments[min(index, len(arguments) - 1)] if is_fixed else arguments[0]


def children(hint: object, name: str, kind: object = None) -> list[object]:
    """Types that a key may have in a group or a mapping: of the chosen kind, else of every kind that has it."""
    entry = entry_type(hint)
    models = models_of(hint)
    if isinstance(kind, str) and kind in models:
        models = {kind: models[kind]}
    found = [field_types(model)[name] for model in models.values() if name in model.model_fields]
    return found if models else [] if entry is None else [entry]


def keys_of(hint: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and kind of every option and group below a type; entries of a mapping are called NAME."""
    for kind, model in models_of(hint).items():
        for name, field in field_types(model).items():
            yield f"{prefix}{name}", "" if name == KIND else kind
            yield from keys_of(field, f"{prefix}{name}.")
    entry = entry_type(hint)
    if entry is not None:
        yield from keys_of(entry, f"{prefix}NAME.")


def renamed(config_class: type[Settings], path: tuple[str | int, ...]) -> str | None:
    """What to write in place of an old key, by the innermost class on the path that knows it."""
    found = None
    hints: list[object] = [config_class]
    for index, part in enumerate(path):
        rest = ".".join(map(str, path[index:]))
        models = [model for hint in hints for model in models_of(hint).values()]
        found = next((model.renamed[rest] for model in models if rest in model.renamed), found)
        hints = [child for hint in hints for child in children(hint, str(part))]
    return found


_PLAIN = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    bool: ("true or false", "true or false"),
}


def expected(hint: object, *, plural: bool = False, is_above: bool = False) -> str:
    """A type in plain English, such as "a whole number of at least 1, or none".

    is_above: the value is above the limit, so that the limit is named however large it is.
    """
    if models_of(hint):
        groups = "groups of options" if plural else "a mapping of its options"
        return f"{groups}, or none" if is_optional(hint) else groups
    if get_origin(hint) is Annotated:
        base, *metadata = get_args(hint)
        inner = without_none(base)
        text = " or ".join(expected(member, plural=plural) for member in inner)
        return f"{text}{_range(inner, metadata, plural=plural, is_above=is_above)}{', or none' if is_optional(base) else ''}"
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        found = [expected(part, plural=plural, is_above=is_above) for part in arguments if part is not type(None)]
        return " or ".join(found) + (", or none" if type(None) in arguments else "")
    if origin is Literal:
        shown = [part if isinstance(part, str) and part else repr(part) for part in arguments]
        return " or ".join(shown) if len(shown) < 3 else f"one of {', '.join(shown)}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"{'lists' if plural else 'a list'} of {len(arguments)}: {', '.join(map(expected, arguments))}"
    if origin in (tuple, list):
        return f"{'lists' if plural else 'a list'} of {expected(arguments[0], plural=True)}"
    if origin is dict:
        return f"{'mappings' if plural else 'a mapping'} of names to {expected(arguments[1], plural=True)}"
    return _PLAIN[hint][plural] if hint in _PLAIN else getattr(hint, "__name__", str(hint))


def _range(inner: list[object], metadata: list[object], *, plural: bool, is_above: bool) -> str:
    """Limits of a value, of a text or of a list, with a leading space."""
    parts = [part for item in metadata for part in (item.metadata if isinstance(item, FieldInfo) else [item])]

    limits = {
        name: value
        for part in reversed(parts)
        for name in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")
        if (value := getattr(part, name, None)) is not None
    }
    limit = limits.get

    least, above = limit("ge"), limit("gt")
    most, below = (
        value if value is not None and (is_above or value < HUGE) else None for value in (limit("le"), limit("lt"))
    )
    words = [f"above {above}"] if above is not None else []
    if least is not None:
        words.append(f"from {least} to {most}" if most is not None else f"of at least {least}")
    elif most is not None:
        words.append(f"at most {most}" if words else f"of at most {most}")
    words += [f"below {below}"] if below is not None else []
    shortest, longest, pattern, is_text = limit("min_length"), limit("max_length"), limit("pattern"), inner == [str]
    if is_text and pattern == r"\S":
        length = f", of at most {longest} characters" if is_above and longest else ""
        return f" that {'are' if plural else 'is'} not blank{length}"
    counts = [f"at least {shortest}"] if shortest is not None else []
    counts += [f"at most {longest}"] if longest is not None else []
    texts = [" and ".join(words)] if words else []
    texts += [f"with {' and '.join(counts)} {'characters' if is_text else 'items'}"] if counts else []
    texts += [f"that {'match' if plural else 'matches'} {pattern}"] if pattern is not None else []
    return "".join(f" {text}" for text in texts)

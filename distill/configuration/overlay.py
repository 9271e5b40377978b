"""Values of several sources laid over each other and over the defaults, as the types of the options ask for."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from distill.configuration.options import (
    LIKE,
    children,
    entry_type,
    field_types,
    is_optional,
    models_of,
    without_none,
)
from distill.configuration.yaml_text import KIND, Given, read_text
from distill.settings import Settings

_OF_RANGE = re.compile(r"(greater|less)_than\w*|\w*too_(short|long)|string_pattern_mismatch|multiple_of|value_error")


class RawText(str):
    """A text of the command line, which the type of its option interprets."""


def is_none(text: str) -> bool:
    return text.lower() in ("none", "null")


def merged(old: Given | None, new: Given, hint: object) -> Given | None:
    """`new` over `old`: groups are merged key by key, values are replaced.

    A later kind drops the options that an earlier source gave together with another kind. Mappings of groups are
    merged by name; a mapping of values is replaced, except that dotted keys add to it. None where nothing is given.
    """
    models, entry = models_of(hint), entry_type(hint)
    is_group = bool(models or models_of(entry))
    if not isinstance(new.value, dict):
        return old if is_group and new.value is None and not is_optional(hint) else new
    if not is_group and not (new.partial and (entry is not None or hint is object)):
        return new
    if old is not None and not isinstance(old.value, dict | None):
        return old  # no mapping: a fault, which nothing later hides
    before = {} if old is None else old.keys
    kinds = [side[KIND] for side in (before, new.value) if len(models) > 1 and KIND in side]
    if len(kinds) == 2 and kinds[0].value != kinds[1].value and kinds[0].origin != kinds[1].origin:
        before = {}
    value = dict(before)
    for name, child in new.value.items():
        found = children(hint, name, new.kind or (old.kind if old else None))
        result = merged(value.get(name), child, found[0] if found else object)
        if result is not None:
            value[name] = result
    return Given(value, new.origin, new.partial and (old is None or old.value is None or old.partial))


def filled(given: Given, hint: object, default: object = None) -> object:
    """The value as JSON has it: texts of the command line interpreted, parts of a default group kept.

    default: what the recipe has where the user gives nothing. A group of which a part is given keeps the other parts
    of its default, also where they differ from the defaults of its class.
    """
    models, entry = models_of(hint), entry_type(hint)
    if isinstance(given.value, dict) and models:
        kind = "" if len(models) == 1 else given.kind if KIND in given.value else getattr(default, KIND, None)
        return _group(given.value, models[kind], kind, default) if kind in models else given.plain()
    if isinstance(given.value, dict) and entry is not None:
        given = Given(_with_kinds(given.value, entry), given.origin, given.partial)
        base = default if given.partial and isinstance(default, dict) else {}
        entries: dict[str, object] = TypeAdapter(dict[str, entry]).dump_python(base, mode="json")  # type: ignore[valid-type]
        return entries | {name: filled(child, entry, base.get(name)) for name, child in given.keys.items()}
    return _interpreted(given.value, hint) if isinstance(given.value, RawText) else given.plain()


def _with_kinds(entries: dict[str, Given], entry: object) -> dict[str, Given]:
    """Entries that are like another and set a part of a group without its kind have the kind of the other's group."""
    model = models_of(entry).get("")
    if model is None or LIKE not in model.model_fields:
        return entries
    unions = [name for name, hint in field_types(model).items() if len(models_of(hint)) > 1]
    return {name: _with_kinds_of_like(entries, name, unions) for name in entries}


def _with_kinds_of_like(entries: dict[str, Given], name: str, unions: list[str]) -> Given:
    own = entries[name]
    value = dict(own.keys)
    for union in unions:
        group = value.get(union)
        if group is None or not isinstance(group.value, dict) or KIND in group.value:
            continue
        if (kind := _kind_of(entries, value.get(LIKE), union)) is not None:
            value[union] = Given({KIND: kind} | group.value, group.origin, group.partial)
    return Given(value, own.origin, own.partial) if value else own


def _kind_of(entries: dict[str, Given], like: Given | None, union: str) -> Given | None:
    """The kind that an entry gives to a group, or the next of those that it is like."""
    seen: set[str] = set()
    while like is not None and isinstance(like.value, str) and like.value in entries and like.value not in seen:
        seen.add(like.value)
        other = entries[like.value].keys
        if union in other and KIND in other[union].keys:
            return other[union].keys[KIND]
        like = other.get(LIKE)
    return None


def _group(given: dict[str, Given], model: type[Settings], kind: str, default: object) -> dict[str, object]:
    base: Settings | None = default if type(default) is model else None
    values: dict[str, object] = {KIND: str(kind)} if kind else {}
    for name, child in given.items():
        own = getattr(base, name, None)
        if base is None and name in model.model_fields:
            own = model.model_fields[name].get_default(call_default_factory=True)
        values[name] = filled(child, field_types(model).get(name, object), own)
    others = set() if base is None else base.model_fields_set - set(values)
    return values | (base.model_dump(mode="json", include=others) if base is not None and others else {})


def yaml_value(text: str, origin: str) -> Given:
    """A text read as YAML; the text itself where it is no YAML."""
    try:
        return read_text(text, origin)
    except ValueError:
        return Given(text, origin)


def _interpreted(text: str, hint: object) -> object:
    """Value of a command-line text: strings need no quotes, `a,b` is a list, `none` is null where that is legal.

    The first reading that is legal is taken, else the first of the right type, so that its fault speaks of the range.
    """
    text = str(text)
    read = yaml_value(text, "").plain()
    if hint is object:
        return read
    if is_none(text) and is_optional(hint):
        words = [word for part in without_none(hint) if get_origin(part) is Literal for word in get_args(part)]
        return text if text in words else None
    inner = text.strip().removeprefix("[").removesuffix("]")
    plain = [] if isinstance(read, str) or read is None else [read]
    as_list = yaml_value(f"[{text}]", "").plain()
    readings = [*plain, text, *([as_list] if isinstance(as_list, list) else [])]
    if not (isinstance(read, list) and all(isinstance(item, str) for item in read)):
        readings.append([item.strip() for item in inner.split(",") if item.strip()])
    errors = [_errors(hint, reading) for reading in readings]
    legal = [index for index, names in enumerate(errors) if not names]
    of_type = [index for index, names in enumerate(errors) if all(map(_OF_RANGE.fullmatch, names))]
    return readings[[*legal, *of_type, 0][0]]


def _errors(hint: Any, value: object) -> list[str]:
    try:
        TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return [item["type"] for item in error.errors(include_url=False, include_context=False, include_input=False)]
    return []

"""Faults of a configuration in plain English, each with its key, its value, its origin and what would be right."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from typing import Literal, get_args, get_origin

from pydantic_core import ErrorDetails

from distill.configuration.options import children, expected, item_type, keys_of, models_of, renamed, without_none
from distill.configuration.yaml_text import KIND, Given, printable
from distill.settings import Settings

_OF_VALIDATORS = ("value_error", "assertion_error")
_OF_TYPE_OR_RANGE = re.compile(
    r"\w+_type|\w+_parsing\w*|literal_error|(greater|less)_than\w*|too_(short|long)|string_\w+|finite_number|multiple_of"
    r"|int_from_float|missing|dict_\w+"
)
"""Errors of pydantic that are answered with what the option takes. Any other error keeps its own text."""


def shown(value: object) -> str:
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclasses.dataclass
class _Place:
    """Where an error of pydantic stands: its path in the user's mapping, without the tags that pydantic adds."""

    path: tuple[str | int, ...] = ()
    hint: object = None
    """Type of the value; None where the key is unknown."""
    parent: object = None
    """Type of the group that holds the value."""
    kind: str = ""
    """Chosen kind of that group."""
    is_key: bool = False

    @property
    def key(self) -> str:
        return dotted(self.path)


def dotted(path: Iterable[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return printable(text.removeprefix("."))


def _place(location: tuple[str | int, ...], config_class: type[Settings]) -> _Place:
    place = _Place(hint=config_class)
    kind: str | None = None
    for part in location:
        models = models_of(place.hint)
        if len(models) > 1 and kind is None:
            kind = str(part)
            continue
        if part == "[key]":
            place.is_key = True
            break
        if isinstance(part, int):
            inner = item_type(place.hint, part)
        else:
            found = children(place.hint, part, kind)
            inner = found[0] if found else None
        if inner is None and not models:
            break  # the name of a member of a union, such as `int`
        place.parent, place.kind, kind = place.hint, kind or "", None
        place.path, place.hint = (*place.path, part), inner
    return place


def _nearest(given: Given, path: tuple[str | int, ...]) -> tuple[Given | None, int]:
    """The innermost value on a path that the user gave, and how many parts of the path lead to it."""
    depth = 0
    for part in path:
        inner = given.keys.get(str(part))
        if isinstance(given.value, list) and isinstance(part, int):
            inner = given.value[part]
        if inner is None:
            break
        given, depth = inner, depth + 1
    return (given, depth) if depth else (None, 0)


def _guess(value: object, names: Iterable[object]) -> str:
    """The nearest of the legal names, as the end of a sentence."""
    texts = [name for name in names if isinstance(name, str)]
    close = difflib.get_close_matches(value, texts, n=1) if isinstance(value, str) else []
    return f"; did you mean {close[0]}?" if close else ""


def _literals(hint: object) -> list[object]:
    return [value for member in without_none(hint) if get_origin(member) is Literal for value in get_args(member)]


class Faults:
    """Turns errors of pydantic into sentences."""

    def __init__(self, config_class: type[Settings], given: Given) -> None:
        self._config_class, self._given = config_class, given

    def of(self, errors: Iterable[ErrorDetails], *, is_complete: bool) -> dict[tuple[str | int, ...], list[str]]:
        """Path -> sentences. Without all files, nothing is said of values that are missing or do not fit together."""
        found: dict[tuple[str | int, ...], list[str]] = {}
        for error in errors:
            place = _place(error["loc"], self._config_class)
            is_joint = error["type"] in _OF_VALIDATORS and models_of(place.hint)
            if not is_complete and (is_joint or error["type"] in ("missing", "union_tag_not_found")):
                continue
            texts = found.setdefault(place.path, [])
            texts += [text for text in self._texts(error, place) if text not in texts]
        return found

    def origin(self, path: tuple[str | int, ...]) -> str:
        given, _ = _nearest(self._given, path)
        return f" (from {given.origin})" if given is not None else ""

    def _texts(self, error: ErrorDetails, place: _Place) -> list[str]:
        name, value = error["type"], error.get("input")
        if name == "extra_forbidden":
            return self._unknown(place)
        if name.startswith("union_tag"):
            return [self._bad_kind(place, value)]
        text = str(error.get("ctx", {}).get("error", "")) or error["msg"]
        if name in _OF_VALIDATORS and (models_of(place.hint) or not place.path):
            return [f"{f'{place.key}: ' if place.path else ''}{text}{self._origins_named(place.path, text)}"]
        if not _OF_TYPE_OR_RANGE.fullmatch(name):
            return [f"{place.key}: {text}{self.origin(place.path)}"]
        is_above = name.startswith("less_than") or name == "too_long"
        wanted = "text as a key" if place.is_key else expected(place.hint, is_above=is_above)
        if name == "missing":
            if place.path and isinstance(place.path[-1], int):
                path = place.path[:-1]
                return [f"{dotted(path)}: expected {expected(place.parent)}, got {shown(value)}{self.origin(path)}"]
            return [f"{place.key} is needed: {wanted}"]
        quotes = "; put it in quotes" if name == "string_type" and isinstance(value, (int, float)) else ""
        text = f"{place.key}: expected {wanted}, got {shown(value)}{_guess(value, _literals(place.hint))}{quotes}"
        return [f"{text}{self.origin(place.path)}{self._note(place.path)}"]

    def _bad_kind(self, place: _Place, value: object) -> str:
        kinds = list(models_of(place.hint))
        path = (*place.path, KIND)
        if not isinstance(value, dict) or KIND not in value:
            return f"{dotted(path)} is needed: one of {', '.join(kinds)}"
        guess = _guess(value[KIND], kinds)
        text = f"{dotted(path)}: expected one of {', '.join(kinds)}, got {shown(value[KIND])}{guess}{self.origin(path)}"
        return f"{text}{self._note(path) or self._note(place.path)}"

    def _note(self, path: tuple[str | int, ...]) -> str:
        note = renamed(self._config_class, path)
        return f"; {note}" if note else ""

    def _origins_named(self, path: tuple[str | int, ...], text: str) -> str:
        """Origins of the given options of a group that a sentence names."""
        given, depth = _nearest(self._given, path)
        given = given if depth == len(path) and path else self._given if not path else None
        found: dict[str, None] = {}

        def visit(node: Given, names: tuple[str, ...]) -> None:
            if isinstance(node.value, dict) and len(names) < 8:
                for name, child in node.value.items():
                    visit(child, (*names, name))
            if names and re.search(rf"(?<![\w.]){re.escape(dotted(names))}(?!\w|\.\w)", text):
                found.setdefault(node.origin)

        if given is not None:
            visit(given, ())
        return f" (from {' and '.join(found)})" if found else ""

    def _unknown(self, place: _Place) -> list[str]:
        """Sentences for an unknown key, or for the old keys below it."""
        path = place.path
        given, depth = _nearest(self._given, path)
        inner: list[tuple[str | int, ...]] = []
        if given is not None and depth == len(path) and isinstance(given.value, dict):
            below = [(*path, name) for name in given.value]
            inner = [item for item in below if self._note(item)]
        if not inner and not self._note(path):
            return self._moved(place) or [self._alternatives(place)]
        return [f"unknown key {dotted(item)}{self._note(item)}{self.origin(item)}" for item in inner or [path]]

    def _moved(self, place: _Place) -> list[str]:
        """Sentences for options in an unknown group of an entry, such as arms.a.trainer: the entry's own, else all
        entries'."""
        (*group, name), (given, depth) = place.path, _nearest(self._given, place.path)
        value = given.value if given is not None and depth == len(place.path) else None
        if not group or not isinstance(value, dict):
            return []
        own, known = models_of(place.parent).get(place.kind), list(dict(keys_of(self._config_class)))
        found = []
        for key in value:
            is_own = own is not None and key in own.model_fields
            close = [dotted((*group, key))] if is_own else difflib.get_close_matches(f"{name}.{key}", known, 1, 0.8)
            if close:
                item = (*place.path, key)
                found.append(f"unknown key {dotted(item)}; did you mean {close[0]}?{self.origin(item)}")
        return found

    def _alternatives(self, place: _Place) -> str:
        *group, name = place.path
        kind, key = place.kind, place.key
        prefix = f"{dotted(group)}." if group else ""
        models = models_of(place.parent)
        others = {other for other, model in models.items() if name in model.model_fields and other != kind}
        if others:
            chooser = (*group, KIND)
            source = self.origin(chooser) if _nearest(self._given, chooser)[1] == len(chooser) else " (the default)"
            kinds = " or ".join(sorted(others))
            chosen = f"{prefix}{KIND} is {kind}{source}"
            return f"{key}{self.origin(place.path)}: an option of {prefix}{KIND} {kinds}; {chosen}"
        siblings = list(models[kind].model_fields) if kind in models else []
        close = [f"{prefix}{match}" for match in difflib.get_close_matches(str(name), siblings, n=1)]
        if not close:
            for other, model in models.items():
                match = difflib.get_close_matches(str(name), list(model.model_fields), n=1)
                close += [f"{prefix}{match[0]}, an option of {prefix}{KIND} {other}"] if match and other != kind else []
        known = list(dict(keys_of(self._config_class)))
        if not close:
            same_name = [other for other in known if other.rpartition(".")[2] == name]
            close = difflib.get_close_matches(key, same_name, n=1, cutoff=0.0)
        if not close and not group:
            close = difflib.get_close_matches(key, known, n=1)
        origin = self.origin(place.path)
        if key in known:
            nested = f"{key.replace('.', ': {')}: ...{'}' * key.count('.')}"
            return f"unknown key {name!r}; nest it, such as {nested}{origin}"
        if close:
            return f"unknown key {key}; did you mean {close[0]}?{origin}"
        has = f"{dotted(group)}{f' of {KIND} {kind}' if kind else ''} has" if group else "there are"
        return f"unknown key {key}; {has} {', '.join(sorted(siblings))}{origin}"

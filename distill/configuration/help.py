"""The text of `--help`: one line an option, in groups, with defaults."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic_core import PydanticUndefined

from distill.configuration.options import entry_type, field_types, is_optional, models_of, without_none
from distill.configuration.yaml_text import KIND, Given
from distill.settings import Settings

_COLUMN = 36
_LONGEST_DEFAULT = 40
_METAVARS = {int: "INT", float: "NUMBER", str: "TEXT", bool: "true|false"}


@dataclasses.dataclass
class _Option:
    key: str
    metavar: str
    help: str
    default: str


@dataclasses.dataclass
class _Group:
    heading: str
    options: list[_Option] = dataclasses.field(default_factory=list)
    note: str = ""


def _metavar(hint: object, default: object = None) -> str:
    found = without_none(hint)
    origins = {get_origin(member) for member in found}
    if origins == {Literal}:
        return f"{{{','.join(str(value) for member in found for value in get_args(member))}}}"
    if origins & {tuple, list}:
        return f"{_metavar(get_args(found[0])[0])},..." if len(found) == 1 else "TEXT"
    if origins == {dict}:
        return "{NAME: ...}"
    if found == [bool]:
        return "" if default is False else "true|false"
    return next((name for member, name in _METAVARS.items() if found == [member]), "VALUE")


def _default_text(value: object) -> str:
    if value is PydanticUndefined:
        return "needed"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    items = value if isinstance(value, (tuple, list, dict)) else [value]
    text = " ".join(", ".join(map(str, items)).split()) or "empty"
    return text if len(text) <= _LONGEST_DEFAULT else f"{text[: _LONGEST_DEFAULT - 3]}..."


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _sentence(model: type[Settings]) -> str:
    return (model.__doc__ or "").strip().partition("\n")[0]


def _groups(config_class: type[Settings], given: Given) -> list[_Group]:
    """Groups in the order of the help: common options, then one group for each group of the class."""
    common = _Group("common")
    groups = [common, *_of_model(config_class, given, None, "", common)]
    named = {option.key: option for group in groups for option in group.options if option.key in config_class.common}
    for group in groups:
        group.options = [option for option in group.options if option.key not in named]
    common.options[:0] = [named[key] for key in config_class.common if key in named]
    return [group for group in groups if group.options or group.note]


def _of_model(
    model: type[Settings], given: Given | None, base: Settings | None, prefix: str, group: _Group
) -> Iterator[_Group]:
    """Add a class's own options to `group`, and give its groups."""
    inner: list[_Group] = []
    for name, hint in field_types(model).items():
        field = model.model_fields[name]
        default = getattr(base, name) if base is not None else field.get_default(call_default_factory=True)
        key, text = f"{prefix}{name}", _first_paragraph(field.description)
        node = given.keys.get(name) if given is not None else None
        models, entries = models_of(hint), models_of(entry_type(hint))
        if models:
            inner += _of_group(hint, node, default, key, text)
        elif entries:
            group.options.append(_Option(f"{key}.NAME.OPTION", "VALUE", text, _default_text(default)))
        elif not (name == KIND and len(get_args(hint)) == 1 and get_origin(hint) is Literal):
            group.options.append(_Option(key, _metavar(hint, default), text, _default_text(default)))
    yield from inner


def _of_group(hint: object, given: Given | None, default: object, key: str, text: str) -> Iterator[_Group]:
    models = models_of(hint)
    base = default if isinstance(default, Settings) else None
    if len(models) == 1:
        (model,) = models.values()
        empty = " (none by default)" if is_optional(hint) and default is None else ""
        group = _Group(f"{key}: {_sentence(model)}{empty}")
        yield group
        yield from _of_model(model, given, base if type(base) is model else None, f"{key}.", group)
        return
    value, own = given.kind if given is not None else None, getattr(base, KIND, None)
    kind = value if value in models else own
    others = [other for other in models if other != kind]
    text = text or _first_paragraph(next(iter(models.values())).model_fields[KIND].description)
    option = _Option(f"{key}.{KIND}", f"{{{','.join(models)}}}", text, _default_text(own if own else default))
    note = f"other kinds: {', '.join(others)}: --{key}.{KIND} {others[0]} --help"
    if kind is None:
        yield _Group(key, [option], note.removeprefix("other "))
        return
    model = models[kind]
    group = _Group(f"{key} ({KIND} {kind}): {_sentence(model)}", [option], note)
    yield group
    yield from _of_model(model, given, base if type(base) is model else None, f"{key}.", group)


def _lines(option: _Option, width: int) -> list[str]:
    start = f"  --{option.key} {option.metavar}".rstrip()
    indent = f"{start}  " if len(start) > _COLUMN - 2 else start.ljust(_COLUMN)
    body = f"{option.help} [{option.default}]".strip()
    if len(indent) > width - 20:  # the help begins on a line of its own
        return [start, *textwrap.wrap(body, width, initial_indent=" " * _COLUMN, subsequent_indent=" " * _COLUMN)]
    return textwrap.wrap(
        body,
        width,
        initial_indent=indent,
        subsequent_indent=" " * _COLUMN,
        break_on_hyphens=False,
        break_long_words=False,
    )


def help_text(config_class: type[Settings], given: Given) -> str:
    """given: what the command line and its files say; it decides which kind of a group is shown."""
    width = max(80, shutil.get_terminal_size().columns)
    name = Path(sys.argv[0]).name
    examples = [
        line.strip() for line in (config_class.__doc__ or "").splitlines() if line.strip().startswith("python ")
    ]
    lines = [f"usage: {name} [--config FILE.yaml ...] [--KEY VALUE ...] [--print_config] [--help]", ""]
    lines += textwrap.wrap(_sentence(config_class), width)
    lines += ["", *(f"example: {example}" for example in examples)] if examples else []
    fixed = [
        _Option("config", "FILE.yaml", "YAML file of the options below. It may be repeated; later files win.", "none"),
        _Option("print_config", "", "Print the resolved configuration and stop.", "false"),
    ]
    for group in [_Group("files", fixed), *_groups(config_class, given)]:
        lines += ["", *textwrap.wrap(group.heading, width)]
        for option in group.options:
            lines += _lines(option, width)
        lines += textwrap.wrap(group.note, width, initial_indent="  ", subsequent_indent="    ")
    lines += ["", "Options on the command line win over those of files. The value in brackets is the default."]
    return "\n".join(lines) + "\n"


def listed_options(config_class: type[Settings], given: Given) -> list[str]:
    return [f"--{option.key}" for group in _groups(config_class, given) for option in group.options]

"""Command line of every recipe: YAML files plus dotted overrides, strict, with all faults in one message."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import functools
import logging
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml

from distill.errors import UserError, raise_all
from distill.rules import value_faults

T = TypeVar("T")

# At import these tell of optional packages (torchvision, GPU kernels) that nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

COMMAND_LINE = "the command line"
USAGE_STATUS = 2
INTERRUPTED_STATUS = 130
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


class _Loader(yaml.SafeLoader):
    """YAML without the surprises of 1.1: `1e-4` is a number, `no` is a string, and no key is given twice."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own attribute, typed as it is there

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep=deep)
        if len(mapping) < len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` would read as something else."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Unicode's own line ends are escaped: in any other style they are read back as spaces."""
    style = '"' if set("\x85\u2028\u2029") & set(value) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


_FLOAT = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", rf"{_FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+0123456789.")),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


@dataclasses.dataclass(frozen=True)
class _Assignment:
    """One value given by the user: dotted key, value as YAML gives it, and where it stands."""

    key: str
    value: Any
    origin: str


class _Schema:
    """Dotted keys of a tree of dataclasses: `groups` (nested dataclasses) and `leaves` (key -> type)."""

    def __init__(self, config_class: type) -> None:
        self.groups: set[str] = set()
        self.leaves: dict[str, Any] = {}
        self._add(config_class, "")

    def _add(self, config_class: Any, prefix: str) -> None:
        hints = typing.get_type_hints(config_class)
        for item in dataclasses.fields(config_class):
            key, hint = f"{prefix}{item.name}", hints[item.name]
            if dataclasses.is_dataclass(hint):
                self.groups.add(key)
                self._add(hint, f"{key}.")
            else:
                self.leaves[key] = hint

    def find(self, key: str) -> tuple[tuple[str, ...], Any] | None:
        """Path in the nested mapping and type of a value, also of one entry of a dictionary field; None if unknown."""
        if key in self.leaves:
            return tuple(key.split(".")), self.leaves[key]
        for leaf, hint in self.leaves.items():
            if get_origin(hint) is dict and key.startswith(f"{leaf}.") and len(key) > len(leaf) + 1:
                return (*leaf.split("."), key[len(leaf) + 1 :]), get_args(hint)[1]
        return None

    def unknown(self, key: str) -> str:
        """Message for an unknown key, with the nearest known one: of the same group, of the same name, or of any."""
        group, _, name = key.rpartition(".")
        known = [*self.leaves, *self.groups]
        siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == group}
        close = [siblings[match] for match in difflib.get_close_matches(name, siblings, n=1)]
        if not close:
            same_name = [other for other in known if other.rpartition(".")[2] == name]
            close = difflib.get_close_matches(key, same_name, n=1, cutoff=0.0)
        if not close and group not in self.groups:
            close = difflib.get_close_matches(key, known, n=1)
        if close:
            return f"unknown key {key}; did you mean {close[0]}?"
        alternatives = sorted(siblings) or sorted(other for other in known if "." not in other)
        return f"unknown key {key}; {f'{group} has' if siblings and group else 'there are'} {', '.join(alternatives)}"


def _expected(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(map(repr, arguments)) if len(arguments) < 3 else f"one of {', '.join(map(repr, arguments))}"
    if origin is tuple or origin is list:
        return f"list of {_expected(arguments[0])}"
    if origin is dict:
        return f"mapping of {_expected(arguments[0])} to {_expected(arguments[1])}"
    return {type(None): "null", bool: "true or false"}.get(hint, hint.__name__)


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value as YAML gives it is of the type; lists stand for tuples."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_matches(value, argument) for argument in arguments)
    if origin is Literal:
        return any(type(value) is type(argument) and value == argument for argument in arguments)
    if origin is tuple or origin is list:
        return isinstance(value, list) and all(_matches(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _matches(key, arguments[0]) and _matches(item, arguments[1]) for key, item in value.items()
        )
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (bool, int, str, type(None)):
        return type(value) is hint
    raise TypeError(f"a config field of type {hint} is not supported")


def _from_text(text: str, hint: Any) -> Any:
    """Value of a command-line text: strings need no quotes, `a,b` is a list, `none` is null where that is legal."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and text.lower() in ("null", "none"):
            return None
        return _from_text(text, next(argument for argument in arguments if argument is not type(None)))
    if hint is str or (origin is Literal and all(isinstance(argument, str) for argument in arguments)):
        return text
    if (origin is tuple or origin is list) and not text.lstrip().startswith("["):
        return [_from_text(item.strip(), arguments[0]) for item in text.split(",") if item.strip()]
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError):
        return text
    return text if value is None else value


def _arguments(
    argv: Sequence[str], schema: _Schema, faults: list[str]
) -> tuple[list[str], list[_Assignment], set[str]]:
    """Config files, overrides and flags (`help`, `print_config`) of a command line."""
    files: list[str] = []
    overrides: list[_Assignment] = []
    flags: set[str] = set()
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help", "--print_config"):
            flags.add("print_config" if word == "--print_config" else "help")
            continue
        if not word.startswith("--") or word == "--":
            faults.append(f"unexpected argument {word!r}: options are written --key value")
            continue
        key, equals, text = word[2:].partition("=")
        found = schema.find(key)
        has_next = bool(words) and not words[0].startswith("--")
        is_switch = found is not None and found[1] is bool and not (has_next and words[0].lower() in ("true", "false"))
        if not equals:
            if is_switch:
                text = "true"
            elif has_next:
                text = words.pop(0)
            elif found is not None or key in (*schema.groups, "config"):
                faults.append(f"--{key} needs a value")
                continue
        if key == "config":
            files.append(text)
        elif found is not None:
            overrides.append(_Assignment(key, _from_text(text, found[1]), COMMAND_LINE))
        elif key in schema.groups:
            example = next(leaf for leaf in schema.leaves if leaf.startswith(f"{key}."))
            faults.append(f"{key} is a group of options: set them one by one, such as --{example}")
        else:
            faults.append(schema.unknown(key))
    return files, overrides, flags


def _read_yaml(path: str, schema: _Schema, faults: list[str]) -> list[_Assignment]:
    """Assignments of a config file, in its order; what cannot be read is added to `faults` with its line."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        others = sorted(other.name for other in Path(path).parent.glob("*.yaml"))
        beside = f"; {Path(path).parent} has {', '.join(others[:10])}" if others else ""
        faults.append(f"config file {path} does not exist{beside}")
        return []
    except (OSError, ValueError) as error:
        faults.append(f"config file {path} cannot be read: {getattr(error, 'strerror', None) or error}")
        return []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        faults.append(f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x})")
        return []
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            line = root.start_mark.line + 1
            faults.append(f"{path}, line {line}: expected a mapping of keys to values, such as `seed: 0`")
            return []
        assignments = []
        lines: dict[str, int] = {}
        for key, value, line in _entries(loader, root, schema):
            if key in lines:
                faults.append(f"{key} is given twice (in {path}, lines {lines[key]} and {line})")
            lines[key] = line
            assignments.append(_Assignment(key, value, f"{path}, line {line}"))
        return assignments
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        position = getattr(error, "position", 0)
        line = mark.line + 1 if mark else text.count("\n", 0, position) + 1
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        faults.append(f"{path}, line {line}: not valid YAML: {problem}")
    except (RecursionError, ValueError) as error:
        faults.append(f"{path}: not valid YAML: {'nested too deeply' if isinstance(error, RecursionError) else error}")
    return []


def _entries(
    loader: _Loader, node: yaml.MappingNode, schema: _Schema, prefix: str = ""
) -> Iterator[tuple[str, Any, int]]:
    """(dotted key, value, line) of a mapping; nested dataclasses are walked, an empty one gives nothing."""
    for key_node, value_node in node.value:
        key = f"{prefix}{loader.construct_object(key_node, deep=True)}"
        if key in schema.groups and isinstance(value_node, yaml.MappingNode):
            yield from _entries(loader, value_node, schema, f"{key}.")
            continue
        value = loader.construct_object(value_node, deep=True)
        if key not in schema.groups or value is not None:
            yield key, value, key_node.start_mark.line + 1


def _merge(assignments: Iterable[_Assignment], schema: _Schema, faults: list[str]) -> dict[str, Any]:
    """Nested mapping of the legal assignments, later over earlier; what is wrong with the others goes to `faults`."""
    merged: dict[str, Any] = {}
    for assignment in assignments:
        key, value, origin = assignment.key, assignment.value, f"(from {assignment.origin})"
        found = schema.find(key)
        if key in schema.groups:
            faults.append(f"{key}: expected a mapping of its keys, got {_shown(value)} {origin}")
        elif found is None:
            faults.append(f"{schema.unknown(key)} {origin}")
        elif not _matches(value, found[1]):
            hint = "; put it in quotes" if found[1] is str and type(value) in (int, float, bool) else ""
            faults.append(f"{key}: expected {_expected(found[1])}, got {_shown(value)}{hint} {origin}")
        else:
            *parents, name = found[0]
            functools.reduce(lambda mapping, parent: mapping.setdefault(parent, {}), parents, merged)[name] = value
    return merged


def _filled(merged: dict[str, Any], default: Any) -> dict[str, Any]:
    """`merged`, and what the groups that it sets a part of have by default otherwise than their class."""
    filled, plain = dict(merged), type(default)()
    for item in dataclasses.fields(default):
        value = getattr(default, item.name)
        if not dataclasses.is_dataclass(value):
            if item.name not in merged and value != getattr(plain, item.name):
                filled[item.name] = value
        elif item.name in merged:
            filled[item.name] = _filled(merged[item.name], value)
    return filled


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _built(value: Any, hint: Any) -> Any:
    """Value of the config for a legal value as YAML gives it: dataclasses from mappings, tuples from lists."""
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return hint(**{name: _built(item, hints[name]) for name, item in value.items()})  # type: ignore[operator]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _built(value, next(argument for argument in arguments if _matches(value, argument)))
    if origin is tuple:
        return tuple(_built(item, arguments[0]) for item in value)
    return float(value) if hint is float else value


def _print_help(config_class: type, schema: _Schema) -> None:
    """Help of every key, from the docstrings under the fields."""
    # Imported here: only the help needs it, and each run would wait for it.
    from jsonargparse import SUPPRESS, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        print_config=None,
        description=config_class.__doc__,
        usage="%(prog)s [--config FILE.yaml ...] [--KEY VALUE ...] [--print_config] [--help]",
        epilog="Values on the command line go before those of the files, and later files before earlier ones.",
    )
    parser.add_argument(
        "--config", default=SUPPRESS, metavar="FILE.yaml", help="YAML file of the keys below; may be repeated."
    )
    parser.add_argument(
        "--print_config", action="store_true", default=SUPPRESS, help="Print the resolved configuration and stop."
    )
    parser.add_class_arguments(config_class)
    for action in parser._actions:
        if action.dest in schema.groups:
            action.help = SUPPRESS
    parser.print_help()


def _differs(config: Any, key: str) -> tuple[Any, Any] | None:
    """(value, default) of a dotted key where they differ."""
    value, default = (functools.reduce(getattr, key.split("."), root) for root in (config, type(config)()))
    return None if value == default else (value, default)


def _unused_faults(config: Any, unused: Mapping[str, str]) -> list[str]:
    faults = []
    for key, reason in unused.items():
        if differing := _differs(config, key):
            value, default = differing
            faults.append(f"{key} is set to {_shown(value)} (default {_shown(default)}), without effect: {reason}")
    return faults


def refuse_unused(config: Any, unused: Mapping[str, str]) -> None:
    """Refuse options that a recipe does not honour with this configuration.

    unused: dotted key -> reason. Raises one UserError that names every such key whose value is not the default.
    """
    raise_all("options that this recipe would not use", _unused_faults(config, unused))


def parse(
    config_class: type[T], argv: Sequence[str] | None = None, *, ignored: Mapping[str, str] = types.MappingProxyType({})
) -> T:
    """Configuration from `--config FILE.yaml` (repeatable, later files win) and `--dotted.key value` (always wins).

    argv: words after the program's name; None takes the process's own.
    ignored: dotted key -> why this recipe never uses it; setting such a key is a fault (see `refuse_unused` for keys
    whose use depends on others).
    `--help` and `--print_config` print and raise SystemExit(0). Raises one UserError that lists all faults: files that
    are missing or not valid, unknown keys, wrong types, values out of range.
    """
    schema = _Schema(config_class)
    faults: list[str] = []
    files, overrides, flags = _arguments(sys.argv[1:] if argv is None else argv, schema, faults)
    if "help" in flags:
        _print_help(config_class, schema)
        raise SystemExit(0)
    assignments = [assignment for file in files for assignment in _read_yaml(file, schema, faults)] + overrides
    config: T = _built(_filled(_merge(assignments, schema, faults), config_class()), config_class)
    origins = {assignment.key: assignment.origin for assignment in assignments}
    faults += [
        f"{fault} (from {origins[key]})" if key in origins else fault for key, fault in value_faults(config).items()
    ]
    raise_all("the configuration is not valid", faults + _unused_faults(config, ignored))
    if "print_config" in flags:
        sys.stdout.write(to_yaml(config))
        raise SystemExit(0)
    return config


def override(config: T, words: Sequence[str]) -> tuple[T, list[str]]:
    """`config` with `--dotted.key value` words applied, and their keys. Raises one UserError that lists all faults."""
    schema = _Schema(type(config))
    faults: list[str] = []
    files, overrides, flags = _arguments(words, schema, faults)
    faults += [f"--{name} is not an override" for name in sorted(flags | ({"config"} if files else set()))]
    merged = _merge(overrides, schema, faults)
    raise_all("overrides that are not valid", faults)

    def replaced(node: Any, changes: dict[str, Any], place: str = "") -> Any:
        hints, values = typing.get_type_hints(type(node)), {}
        for name, value in changes.items():
            now, key = getattr(node, name), f"{place}{name}."
            if dataclasses.is_dataclass(now):
                values[name] = replaced(now, value, key)
            elif any(assignment.key.startswith(key) for assignment in overrides):  # one entry of a mapping
                values[name] = now | _built(value, hints[name])
            else:
                values[name] = _built(value, hints[name])
        return dataclasses.replace(node, **values)

    changed: T = replaced(config, merged)
    raise_all("overrides that are not valid", list(value_faults(changed).values()))
    return changed, [assignment.key for assignment in overrides]


def to_yaml(config: Any) -> str:
    """YAML of every key of a configuration; `parse` of it gives an equal configuration."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value

    return yaml.dump(plain(dataclasses.asdict(config)), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def main(
    recipe: Callable[[T], None],
    config_class: type[T],
    argv: Sequence[str] | None = None,
    *,
    ignored: Mapping[str, str] = types.MappingProxyType({}),
) -> None:
    """Parse, run the recipe, and turn what a user can cause into one line of stderr without a traceback.

    Exits with 2 on a UserError, on memory or disk that ran out, and with 130 on an interrupt; any other exception is a
    defect of the program and keeps its traceback.
    """
    config: T | None = None
    try:
        config = parse(config_class, argv, ignored=ignored)
        recipe(config)
    except UserError as error:
        _leave(f"error: {error}", USAGE_STATUS)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED_STATUS)
    except Exception as error:
        message = _exhausted(error, config)
        if message is None:
            raise
        # Memory or disk may run out on any one process, so each of them speaks for itself.
        _leave(f"error: {message}", USAGE_STATUS, every_process=True)


def _leave(message: str, status: int, *, every_process: bool = False) -> NoReturn:
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    if rank == "0" or every_process:
        print(message if rank == "0" else f"[process {rank}] {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def _exhausted(error: Exception, config: Any) -> str | None:
    """Message for memory or disk that ran out, with what to lower; None for anything else."""
    text = str(error).lower()
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT) or "no space left on device" in text:
        name = getattr(error, "filename", None) or f"under {getattr(config, 'output_dir', '.')}"
        return f"disk full: could not write {name}; free some space, or choose another output_dir or data.cache_dir"
    is_memory = isinstance(error, MemoryError) or code == errno.ENOMEM
    if is_memory or (isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)):
        first_line = str(error).strip().split("\n")[0]
        return f"out of memory{f' ({_shown(first_line)})' if first_line else ''}; {_memory_advice(config)}"
    return None


def _memory_advice(config: Any) -> str:
    """What of this configuration to lower or switch on, with the present values."""

    def value(key: str) -> Any:
        return functools.reduce(lambda node, name: getattr(node, name, None), key.split("."), config)

    lower = [
        f"{key} (now {value(key)})"
        for key in ("trainer.batch_size", "data.resolution", "evaluation.batch_size")
        if value(key)
    ]
    switch = []
    if value("trainer.gradient_checkpointing") is False:
        switch.append("--trainer.gradient_checkpointing true")
    if value("trainer.mixed_precision") == "no":
        switch.append("--trainer.mixed_precision bf16")
    if value("base.frozen_dtype") == "fp32":
        switch.append("--base.frozen_dtype bf16")
    if value("method") == "full":
        switch.append("--method lora")
    advice = [f"lower {', '.join(lower)}"] if lower else []
    if switch:
        advice.append(f"set {', '.join(switch)}")
    if value("trainer.batch_size"):
        advice.append("trainer.gradient_accumulation_steps keeps the effective batch")
    return "; ".join(advice) or "lower the batch size"

"""YAML without surprises: each value with its file and line, and text that reads back as the value that was written."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TypeAlias

import yaml

KIND = "kind"
"""The key that chooses a member of a tagged union."""
MAX_DEPTH = 50
MAX_VALUES = 100_000
_TAG = "tag:yaml.org,2002:"


def printable(text: str) -> str:
    """The text, or its Python form where it holds characters that a terminal would obey."""
    return text if text.isprintable() else repr(text)


Value: TypeAlias = "dict[str, Given] | list[Given] | str | int | float | None"


@dataclasses.dataclass(frozen=True)
class Given:
    """A value that a user gave and where; mappings and lists hold further values that were given."""

    value: Value
    origin: str
    partial: bool = False
    """Whether this mapping was made from dotted keys, which add to a mapping where a file replaces it."""

    @property
    def keys(self) -> dict[str, Given]:
        """What a mapping holds; empty for any other value."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def kind(self) -> str | None:
        """The kind that a group of options chooses."""
        value = self.keys[KIND].value if KIND in self.keys else None
        return value if isinstance(value, str) else None

    def plain(self) -> object:
        if isinstance(self.value, dict):
            return {name: child.plain() for name, child in self.value.items()}
        return [child.plain() for child in self.value] if isinstance(self.value, list) else self.value


class _Loader(yaml.SafeLoader):
    """YAML without the surprises of 1.1: `1e-4` is a number, and `no` is a string."""

    yaml_implicit_resolvers: dict[str, object] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` would read as something else."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Unicode's own line ends are escaped: in any other style they are read back as spaces."""
    style = '"' if set("\x85\u2028\u2029") & set(value) else None
    return dumper.represent_scalar(f"{_TAG}str", value, style=style)


_Dumper.add_representer(str, _text)

_FLOAT = r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)"
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", rf"{_FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+0123456789.")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


class _Reader:
    """Values of a document, with lines; what is wrong with a key goes to `faults`."""

    def __init__(self, text: str, path: str, faults: list[str], *, has_lines: bool = True) -> None:
        self._loader, self._path, self._faults, self._has_lines = _Loader(text), path, faults, has_lines
        self._count = 0

    def read(self) -> Given | None:
        root = self._loader.get_single_node()
        return None if root is None else self._given(root, "", root.start_mark.line, 0)

    def _given(self, node: yaml.Node, place: str, line: int, depth: int) -> Given:
        self._count += 1
        if depth > MAX_DEPTH or self._count > MAX_VALUES:
            problem = "nested too deeply" if depth > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        value: Value
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            value = self._mapping(node, place, depth)
        elif isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            value = [self._given(item, place, item.start_mark.line, depth + 1) for item in node.value]
        else:
            value = self._loader.construct_object(node, deep=True)
            if value is not None and type(value) not in (str, int, float, bool):
                problem = f"{node.tag.replace(_TAG, '!!')} is not supported"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return Given(value, self._origin(line))

    def _mapping(self, node: yaml.MappingNode, place: str, depth: int) -> dict[str, Given]:
        """Own keys win over merged ones (`<<: *anchor`), and the first of several merged mappings over the others."""
        own: dict[str, Given] = {}
        lines: dict[str, int] = {}
        merged: list[dict[str, Given]] = []
        for key_node, value_node in node.value:
            line = key_node.start_mark.line
            if key_node.tag == f"{_TAG}merge":
                parts = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                if not all(isinstance(part, yaml.MappingNode) for part in parts):
                    raise yaml.constructor.ConstructorError(None, None, "<< needs a mapping", value_node.start_mark)
                merged += [self._given(part, place, line, depth + 1).keys for part in parts]
                continue
            key = self._loader.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                quotes = "; put it in quotes" if isinstance(key_node, yaml.ScalarNode) else ""
                self._faults.append(
                    f"{printable(place)}{key!r}: expected text as a key{quotes} (from {self._origin(line)})"
                )
                continue
            if key in lines:
                lines_of_both = f"lines {lines[key] + 1} and {line + 1}"
                self._faults.append(f"{printable(place + key)} is given twice (from {self._path}, {lines_of_both})")
            lines[key] = line
            own[key] = self._given(value_node, f"{place}{key}.", line, depth + 1)
        for mapping in merged:
            own = own | {key: value for key, value in mapping.items() if key not in own}
        return own

    def _origin(self, line: int) -> str:
        return f"{self._path}, line {line + 1}" if self._has_lines else self._path


def read_file(path: str, faults: list[str]) -> Given | None:
    """The mapping of a config file; what cannot be read is added to `faults` with its line."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        others = sorted(other.name for other in Path(path).parent.glob("*.yaml"))
        beside = f"; {Path(path).parent} has {', '.join(others[:10])}" if others else ""
        faults.append(f"config file {path} does not exist{beside}")
        return None
    except (OSError, ValueError) as error:
        faults.append(f"config file {path} cannot be read: {getattr(error, 'strerror', None) or error}")
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        faults.append(f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x})")
        return None
    try:
        given = _Reader(text, path, faults).read()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else text.count("\n", 0, getattr(error, "position", 0)) + 1
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        faults.append(f"{path}, line {line}: not valid YAML: {problem}")
        return None
    except (RecursionError, ValueError) as error:
        faults.append(f"{path}: not valid YAML: {'nested too deeply' if isinstance(error, RecursionError) else error}")
        return None
    if given is not None and not isinstance(given.value, dict):
        faults.append(f"{given.origin}: expected a mapping of keys to values, such as `seed: 0`")
        return None
    return given or Given({}, path)


def read_text(text: str, origin: str) -> Given:
    """Value of a text that stands in no file. Raises ValueError where it is no YAML."""
    faults: list[str] = []
    try:
        given = _Reader(text, origin, faults, has_lines=False).read()
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if faults:
        raise ValueError("; ".join(faults))
    return given or Given(None, origin)


def write(value: object) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

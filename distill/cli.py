"""Command line of every recipe: YAML files plus dotted overrides, strict, with all faults in one message."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from distill.errors import UserError, raise_all
from distill.faults import Faults, dotted, shown
from distill.help import help_text, listed_options
from distill.options import KIND, children, entry_type, field_types, is_optional, models_of, without_none
from distill.settings import Settings
from distill.yaml_text import Given, read_file, read_text, write

T = TypeVar("T", bound=Settings)

# At import these tell of optional packages (torchvision, GPU kernels) that nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

COMMAND_LINE = "the command line"
USAGE_STATUS = 2
INTERRUPTED_STATUS = 130
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


class _Text(str):
    """A text of the command line, which the type of its option interprets."""


def _find(config_class: type[Settings], key: str) -> tuple[tuple[str, ...], list[Any]]:
    """Path of a dotted key, and the types that it may have (one for each kind); no types if it is unknown."""
    hints: list[Any] = [config_class]
    path: list[str] = []
    parts = key.split(".")
    while parts:
        entries = [entry for hint in hints if (entry := entry_type(hint)) is not None]
        if entries and not any(models_of(entry) for entry in entries):
            parts = [".".join(parts)]  # a name may have dots, such as v1.5
        name = parts.pop(0)
        path.append(name)
        hints = [child for hint in hints for child in children(hint, name)]
    return tuple(path), hints


def _insert(tree: dict[str, Given], path: Sequence[str], given: Given) -> None:
    for name in path[:-1]:
        if name not in tree or not isinstance(tree[name].value, dict):
            tree[name] = Given({}, COMMAND_LINE, partial=True)
        tree = tree[name].value
    tree[path[-1]] = given


def _arguments(
    argv: Sequence[str], config_class: type[Settings], faults: list[str]
) -> tuple[list[str], Given, set[str]]:
    """Config files, overrides and flags (`help`, `print_config`) of a command line."""
    files: list[str] = []
    overrides: dict[str, Given] = {}
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
        path, hints = _find(config_class, key)
        has_next = bool(words) and not words[0].startswith("--")
        if not equals:
            is_switch = bool(hints) and all(without_none(hint) == [bool] for hint in hints)
            if is_switch and not (has_next and words[0].lower() in ("true", "false", "none", "null")):
                text = "true"
            elif has_next:
                text = words.pop(0)
            elif words and "help" not in flags and words[0] in ("-h", "--help"):
                continue
            elif key == "config" or not any(models_of(hint) for hint in hints):
                faults.append(f"--{key} needs a value")
                continue
        if key == "config":
            files.append(text)
        elif not _is_text(text) or not _is_text(key):
            faults.append(f"--{key!r}: not UTF-8 text ({text!r})")
        else:
            _add(overrides, path, hints, text, faults)
    return files, Given(overrides, COMMAND_LINE, partial=True), flags


def _is_text(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _add(overrides: dict[str, Given], path: tuple[str, ...], hints: list[Any], text: str, faults: list[str]) -> None:
    """Add one override; a mapping of groups is read at once, because the entries of several sources are merged."""
    given = Given(_Text(text), COMMAND_LINE)
    is_none = text.lower() in ("none", "null") and any(is_optional(hint) for hint in hints)
    groups = [models_of(hint) for hint in hints if models_of(hint)]
    if is_none and (groups or any(models_of(entry_type(hint)) for hint in hints)):
        given = Given(None, COMMAND_LINE)
    elif groups:
        models = groups[0]
        example = KIND if len(models) > 1 else next(iter(next(iter(models.values())).model_fields))
        value = f" {text}" if text in models and len(models) > 1 else ""
        faults.append(
            f"{dotted(path)} is a group of options: set them one by one, such as --{dotted(path)}.{example}{value}"
        )
        return
    elif any(models_of(entry_type(hint)) for hint in hints):
        given = _yaml(text)
    _insert(overrides, path, given)


def _yaml(text: str) -> Given:
    try:
        return read_text(text)
    except ValueError:
        return Given(text, COMMAND_LINE)


def _merged(old: Given | None, new: Given, hint: Any, key: str, faults: list[str]) -> Given | None:
    """`new` over `old`: groups are merged key by key, values are replaced.

    A later kind drops the options that an earlier source gave for another kind.
    """
    models, entry = models_of(hint), entry_type(hint)
    if not isinstance(new.value, dict):
        if models and new.value is not None:
            notes = [model.renamed[key] for model in models.values() if key in model.renamed]
            faults.append(f"{key}: expected a mapping of its options, got {shown(new.plain())} (from {new.origin})")
            faults[-1] += "".join(f"; {note}" for note in notes)
        return old if models and not (new.value is None and is_optional(hint)) else new
    if not models and not (entry is not None and (new.partial or models_of(entry))):
        return new
    before = old.value if old is not None and isinstance(old.value, dict) else {}
    kinds = [side[KIND].value for side in (before, new.value) if len(models) > 1 and KIND in side]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        before = {}
    kind = kinds[-1] if kinds and isinstance(kinds[-1], str) else None
    value = dict(before)
    for name, child in new.value.items():
        found = children(hint, name, kind)
        merged = _merged(value.get(name), child, found[0] if found else Any, f"{key}.{name}".lstrip("."), faults)
        if merged is not None:
            value[name] = merged
    return Given(value, new.origin, new.partial and (old is None or old.partial))


def _filled(given: Given, hint: Any, default: Any) -> Any:
    """Value as JSON has it: texts of the command line interpreted, and what the default of a group has otherwise.

    default: what the recipe has where the user gives nothing; a part of a group leaves the other parts as they are there.
    """
    models, entry = models_of(hint), entry_type(hint)
    if isinstance(given.value, dict) and models:
        kind = given.value[KIND].value if KIND in given.value else getattr(default, KIND, "")
        model = models.get(kind if isinstance(kind, str) else "") if len(models) > 1 else models[""]
        if model is None:
            return given.plain()
        base = default if type(default) is model else None
        filled = {KIND: str(kind)} if len(models) > 1 else {}
        filled |= {
            name: _filled(child, field_types(model).get(name, Any), _default(model, base, name))
            for name, child in given.value.items()
        }
        others = {name for name in base.model_fields_set if name not in filled} if base is not None else set()
        return filled | (base.model_dump(mode="json", include=others) if base is not None and others else {})
    if isinstance(given.value, dict) and entry is not None:
        others = default if given.partial and isinstance(default, dict) else {}
        filled = {name: TypeAdapter(entry).dump_python(value, mode="json") for name, value in others.items()}
        return filled | {name: _filled(child, entry, others.get(name)) for name, child in given.value.items()}
    return _interpreted(given.value, hint) if isinstance(given.value, _Text) else given.plain()


def _default(model: type[Settings], base: Settings | None, name: str) -> Any:
    if name not in model.model_fields:
        return None
    return getattr(base, name) if base is not None else model.model_fields[name].get_default(call_default_factory=True)


def _interpreted(text: str, hint: Any) -> Any:
    """Value of a command-line text: strings need no quotes, `a,b` is a list, `none` is null where that is legal."""
    read = _yaml(text).plain()
    inner = text.strip()[1:-1] if text.strip().startswith("[") and text.strip().endswith("]") else text
    items = [item.strip() for item in inner.split(",") if item.strip()]
    if hint is Any:
        return read
    candidates = [None] if text.lower() in ("none", "null") and is_optional(hint) else []
    candidates += [] if isinstance(read, str) or read is None else [read]
    candidates += [str(text), _yaml(f"[{text}]").plain(), items]
    adapter: TypeAdapter[Any] = TypeAdapter(hint)
    if candidates[0] is None and not _errors(adapter, str(text)) and _has_literal(hint, str(text)):
        return str(text)
    in_range = [value for value in candidates if not _errors(adapter, value)]
    of_type = [
        value
        for value in candidates
        if all(
            "_than" in name or "_short" in name or "_long" in name or name == "string_pattern_mismatch"
            for name in _errors(adapter, value)
        )
    ]
    return [*in_range, *of_type, read if not isinstance(read, str) and read is not None else str(text)][0]


def _errors(adapter: TypeAdapter[Any], value: Any) -> list[str]:
    try:
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        return [item["type"] for item in error.errors(include_url=False)]
    return []


def _has_literal(hint: Any, text: str) -> bool:
    return any(text in getattr(member, "__args__", ()) for member in without_none(hint))


def _validated(
    config_class: type[T], raw: dict[str, Any], given: Given, faults: list[str], *, is_complete: bool
) -> T | None:
    """The configuration, or None where its faults were added to `faults`.

    Values with faults are taken out for a second look, so that a check of the whole configuration speaks up as well;
    a sentence that names one of these values is left out, because the value it speaks of is not the user's.
    """
    try:
        return config_class.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        describe = Faults(config_class, given)
        found = describe.of(error.errors(include_url=False), is_complete=is_complete)
    faults += [text for texts in found.values() for text in texts]
    for path in found:
        _remove(raw, path)
    try:
        config_class.model_validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        known = "|".join(re.escape(str(path[-1])) for path in found if path)
        checks = [item for item in error.errors(include_url=False) if item["type"] == "value_error"]
        for texts in describe.of(checks, is_complete=is_complete).values():
            faults += [
                text for text in texts if text not in faults and not (known and re.search(rf"\b({known})\b", text))
            ]
    return None


def _remove(raw: dict[str, Any], path: tuple[str | int, ...]) -> None:
    names = [part for part in path if isinstance(part, str)]
    node: Any = raw
    for name in names[:-1]:
        node = node.get(name) if isinstance(node, dict) else None
    if names and isinstance(node, dict):
        node.pop(names[-1], None)


def _read(config_class: type[Settings], argv: Sequence[str] | None, faults: list[str]) -> tuple[Given, set[str], bool]:
    """What the user gave, the flags, and whether all files could be read."""
    files, overrides, flags = _arguments(sys.argv[1:] if argv is None else argv, config_class, faults)
    sources = [read_file(file, faults) for file in files]
    given = Given({}, COMMAND_LINE)
    for source in [*sources, overrides]:
        if source is not None:
            given = _merged(given, source, config_class, "", faults) or given
    return given, flags, None not in sources


def parse(config_class: type[T], argv: Sequence[str] | None = None) -> T:
    """Configuration from `--config FILE.yaml` (repeatable, later files win) and `--dotted.key value` (always wins).

    argv: words after the program's name; None takes the process's own.
    `--help` and `--print_config` print and raise SystemExit(0). Raises one UserError that lists all faults: files that
    are missing or not valid, unknown keys, wrong types, values out of range, checks of the configuration class.
    """
    faults: list[str] = []
    given, flags, is_complete = _read(config_class, argv, faults)
    if "help" in flags:
        sys.stdout.write(help_text(config_class, given))
        raise SystemExit(0)
    raw = _filled(given, config_class, PydanticUndefined)
    config = _validated(config_class, raw, given, faults, is_complete=is_complete)
    raise_all("the configuration is not valid", list(dict.fromkeys(faults)))
    if config is None:
        raise AssertionError("a configuration that is not valid has faults")
    if "print_config" in flags:
        sys.stdout.write(to_yaml(config))
        raise SystemExit(0)
    return config


def options(config_class: type[Settings], argv: Sequence[str] = ()) -> list[str]:
    """Options that `--help` lists after these words, such as "--trainer.max_steps"."""
    return listed_options(config_class, _read(config_class, argv, [])[0])


def to_yaml(config: BaseModel) -> str:
    """YAML of every key of a configuration; `parse` of it gives an equal configuration."""
    return write(config.model_dump(mode="json"))


def main(recipe: Callable[[T], None], config_class: type[T], argv: Sequence[str] | None = None) -> None:
    """Parse, run the recipe, and turn what a user can cause into one line of stderr without a traceback.

    Exits with 2 on a UserError, on memory or disk that ran out, and with 130 on an interrupt; any other exception is a
    defect of the program and keeps its traceback.
    """
    config: T | None = None
    try:
        config = parse(config_class, argv)
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
        return f"out of memory{f' ({shown(first_line)})' if first_line else ''}; {_memory_advice(config)}"
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

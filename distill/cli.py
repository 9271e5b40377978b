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
from typing import NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from distill.configuration.faults import Faults, dotted, shown
from distill.configuration.help import help_text, listed_options
from distill.configuration.options import children, entry_type, is_optional, models_of, renamed, without_none
from distill.configuration.overlay import RawText, filled, is_none, merged, yaml_value
from distill.configuration.yaml_text import KIND, Given, printable, read_file, write
from distill.errors import Interrupted, UserError, raise_all
from distill.interrupts import terminable
from distill.processes import is_first_to_say
from distill.settings import Settings

T = TypeVar("T", bound=Settings)

# At import these tell of optional packages (torchvision, GPU kernels) that nothing here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

COMMAND_LINE = "the command line"
USAGE_STATUS = 2
INTERRUPTED_STATUS = 130
INTERRUPTED = "interrupted; the same command goes on with what is not done"
NOT_USABLE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
"""A file or folder that cannot be written, a folder where a file should be and the reverse, a name that no file can
have."""
DISK_FULL = ("no space left on device", "disk quota exceeded", "file too large", "pytorchstreamwriter failed writing")
"""In messages of libraries that write files by themselves, such as safetensors."""
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed")


def _find(config_class: type[Settings], key: str) -> tuple[tuple[str, ...], list[object]]:
    """Path of a dotted key, and the types that it may have (one for each kind); no types if it is unknown."""
    hints: list[object] = [config_class]
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


def _arguments(
    argv: Sequence[str], config_class: type[Settings], faults: list[str]
) -> tuple[list[str], Given, set[str]]:
    """Config files, overrides and flags (`help`, `print_config`) of a command line."""
    files: list[str] = []
    overrides = Given({}, COMMAND_LINE, partial=True)
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
            elif key == "config" or not any(models_of(hint) for hint in hints):
                faults.append(f"--{key} needs a value")
                continue
        if key == "config":
            files.append(text)
        elif not _is_text(word + text):
            faults.append(f"--{printable(key)}: expected UTF-8 text, got {shown(text)} (from the command line)")
        elif (
            any(models_of(hint) for hint in hints)
            and not (is_none(text) and any(map(is_optional, hints)))
            and not isinstance(yaml_value(text, COMMAND_LINE).value, dict)
        ):
            example = _group_example(hints, key, text)
            note = f"; {old}" if (old := renamed(config_class, path)) else ""
            faults.append(f"{dotted(path)} is a group of options: set them one by one, such as {example}{note}")
        else:
            given = _given(text, hints)
            for name in reversed(path):
                given = Given({name: given}, COMMAND_LINE, partial=True)
            overrides = merged(overrides, given, config_class) or overrides
    return files, overrides, flags


def _is_text(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _given(text: str, hints: list[object]) -> Given:
    """A text of the command line; one that holds groups is read at once, because groups of all sources are merged."""
    if not hints or any(models_of(hint) or models_of(entry_type(hint)) for hint in hints):
        is_null = is_none(text) and any(map(is_optional, hints))
        return Given(None, COMMAND_LINE) if is_null else yaml_value(text, COMMAND_LINE)
    return Given(RawText(text), COMMAND_LINE)


def _group_example(hints: list[object], key: str, text: str) -> str:
    """An option of a group, to be set instead of the group."""
    models = next(models for hint in hints if (models := models_of(hint)))
    if len(models) > 1:
        return f"--{key}.{KIND} {text if text in models else next(iter(models))}"
    return f"--{key}.{next(iter(next(iter(models.values())).model_fields))}"


def _validated(config_class: type[T], raw: object, given: Given, faults: list[str], *, is_complete: bool) -> T | None:
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
        names = [str(path[-1]) for path in found if path]
        names += re.findall(r"did you mean [\w.]*?(\w+)[?,]", " ".join(faults))
        known = "|".join(map(re.escape, names))
        checks = [item for item in error.errors(include_url=False) if item["type"] == "value_error"]
        for texts in describe.of(checks, is_complete=is_complete).values():
            faults += [
                text for text in texts if text not in faults and not (known and re.search(rf"\b({known})\b", text))
            ]
    return None


def _remove(raw: object, path: tuple[str | int, ...]) -> None:
    names = [part for part in path if isinstance(part, str)]
    node: object = raw
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
            given = merged(given, source, config_class) or given
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
    raw = filled(given, config_class)
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

    Exits with 2 on a UserError, on memory or disk that ran out, with 130 on Ctrl-C and with 143 on SIGTERM; any other
    exception is a defect of the program and keeps its traceback.
    """
    config: T | None = None
    try:
        with terminable():
            config = parse(config_class, argv)
            recipe(config)
    except UserError as error:
        _leave(f"error: {error}", USAGE_STATUS)
    except Interrupted as stop:
        _leave(str(stop) or INTERRUPTED, stop.status)
    except KeyboardInterrupt:
        _leave(INTERRUPTED, INTERRUPTED_STATUS)
    except Exception as error:
        message = _exhausted(error, config)
        if message is None:
            raise
        _leave(f"error: {message}", USAGE_STATUS)


def _leave(message: str, status: int) -> NoReturn:
    """An error is said by the first process that meets it, whichever that is; that all are interrupted by the main
    one."""
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    if is_first_to_say(message) if status == USAGE_STATUS else rank == "0":
        print(message if rank == "0" else f"[process {rank}] {message}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def _exhausted(error: Exception, config: object) -> str | None:
    """Message for memory or disk that ran out or cannot be used, with what to do; None for anything else."""
    text = str(error).lower()
    code = error.errno if isinstance(error, OSError) else None
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(sign in text for sign in DISK_FULL):
        name = getattr(error, "filename", None) or f"under {getattr(config, 'output_dir', '.')}"
        return f"disk full: could not write {name}; free some space, or choose another output_dir or data.cache_dir"
    if isinstance(error, OSError) and code in NOT_USABLE and error.filename:
        # os.replace names the temporary file first, and the file that it could not write second.
        name = error.filename2 or error.filename
        return f"cannot read or write {name}: {error.strerror}; mend or remove it, or choose another output_dir"
    is_memory = isinstance(error, MemoryError) or code == errno.ENOMEM
    if is_memory or (isinstance(error, RuntimeError) and any(sign in text for sign in OUT_OF_MEMORY)):
        first_line = str(error).strip().split("\n")[0]
        return f"out of memory{f' ({shown(first_line)})' if first_line else ''}; {_memory_advice(config)}"
    return None


def _memory_advice(config: object) -> str:
    """What of this configuration to lower or switch on, with the present values."""

    def value(key: str) -> object:
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
    if value("denoiser") == "full":
        switch.append("--denoiser lora")
    advice = [f"lower {', '.join(lower)}"] if lower else []
    if switch:
        advice.append(f"set {', '.join(switch)}")
    if value("trainer.batch_size"):
        advice.append("trainer.gradient_accumulation_steps keeps the effective batch")
    return "; ".join(advice) or "lower the batch size"

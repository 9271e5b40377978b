"""Files of annotations as text: CSV, JSON lines and JSON read strictly, and the values in them.

A value that cannot be used raises ValueError with a message that quotes it; readers collect these with their place.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from distill.errors import UserError

Box = tuple[float, float, float, float]

Row = tuple[int, dict[str, Any]]
"""Row number, and value of each column."""

SPLIT_CODES = {"0": "test", "1": "train", "2": "val", "3": "p19", "4": "mscxr"}
"""Values of the column `split`. Source: metadata files of Dombrowski et al. 2024 (arXiv 2303.17908)."""

VALIDATION_SPLITS = ("validation", "val", "valid", "validate")
"""Names of the validation split; the last is that of MIMIC-CXR-JPG."""

_QUOTED_CHARACTERS = 80
_LARGEST_FRAME_PX = 2**28
_INVISIBLE = ("Cc", "Cf", "Zs", "Zl", "Zp")
_STAND_INS = ("nan", "none", "null", "<na>", "n/a", "#n/a", "true", "false")
"""What programs write for a missing value, or for an answer, and no one for a caption or a name."""
_BLANK_LETTERS = "\u115f\u1160\u2800\u3164\uffa0"
_NO_TEXT = re.compile("[\0\ud800-\udfff]")


class Place(NamedTuple):
    """Where a fault lies, such as `metadata.csv row 3` or `instances.json annotation 17`."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file} {self.unit} {self.number}"


Faults = list[tuple[Place, str]]


# --- files --------------------------------------------------------------------------------------------------------


def read_text(root: Path, name: str, option: str) -> str:
    """The UTF-8 text of file `name` under `root` (or absolute), which `option` of the config names.

    Raises UserError if it is missing, cannot be read or is not UTF-8.
    """
    path = root / name
    if not path.is_file():
        files = (p for pattern in ("*.csv", "*.jsonl", "*.json") for p in path.parent.glob(pattern))
        there = sorted(str(p.relative_to(root) if p.is_relative_to(root) else p) for p in files)
        raise UserError(f"there is no '{name}' in '{root}'; {option} could be: {', '.join(there[:20]) or 'none'}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}") from error
    if b"\0" in data:
        at = data.index(b"\0")
        raise UserError(f"'{path}' has a NUL at byte {at} (line {_line(data, at)}): is it UTF-16? Save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"'{path}' is not UTF-8: byte 0x{data[error.start]:02x} at {error.start} "
            f"(line {_line(data, error.start)}); it may be Latin-1 or Windows-1252: save it as UTF-8"
        ) from error


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def csv_rows(text: str, keep: Collection[str] | None = None) -> tuple[list[str], list[Row], list[str]]:
    """Columns, rows and faults. Row 1 is the header, as in a spreadsheet. keep: columns that rows hold, default all."""
    faults: list[str] = []
    rows: list[Row] = []
    header: list[str] = []
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        # The published MIMIC metadata has a space after a column's name.
        header = [name.strip() for name in next(reader, [])]
        faults += [f"the header has column '{name}' {n} times" for name, n in Counter(header).items() if n > 1 and name]
        kept = [(place, name) for place, name in enumerate(header) if keep is None or name in keep]
        for number, values in enumerate(reader, start=2):
            if len(values) == len(header):
                rows.append((number, {name: values[place] for place, name in kept}))
            elif values:
                faults.append(f"row {number} has {len(values)} fields and the header {len(header)}: {quote(values)}")
    except csv.Error as error:
        faults.append(f"line {reader.line_num}: {error} (is a quote left open?)")
    if not rows and not faults:
        faults.append("it has no rows")
    return header, rows, faults


def read_json(text: str) -> Any:
    """Raises ValueError for what is no JSON, or has a key twice in one object."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(f"is nested too deeply: {error}") from error


def jsonl_rows(text: str) -> tuple[list[str], list[Row], list[str]]:
    """Columns, rows and faults of one JSON object a line; row 1 is the first line."""
    faults: list[str] = []
    rows: list[Row] = []
    columns: dict[str, None] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = read_json(line)
        except GivenTwice as error:
            faults.append(f"row {number}: {error}")
            continue
        except ValueError as error:
            faults.append(f"row {number} is not JSON: {error}")
            continue
        if not isinstance(value, dict):
            faults.append(f"row {number} is not a JSON object: {quote(value)}")
            continue
        columns.update(dict.fromkeys(value))
        rows.append((number, value))
    return list(columns), rows, faults


class GivenTwice(ValueError):
    """A key twice in one object."""


def _once(pairs: list[tuple[str, object]]) -> dict[str, Any]:
    """A JSON object, its keys without spaces around. Python's own reader keeps the last value of a key that is given
    twice."""
    found = {name.strip(): value for name, value in pairs}
    if len(found) < len(pairs):
        name, count = Counter(name.strip() for name, _ in pairs).most_common(1)[0]
        raise GivenTwice(f"key '{quote(name)}' is given {count} times; right is once")
    return found


# --- values -------------------------------------------------------------------------------------------------------


def text_of(row: dict[str, object], column: str, empty: bool = False) -> str:
    """The text in a column, without white space around it; numbers become text, a missing value is empty.

    A text of nothing but invisible characters, such as zero-width spaces, is empty too.
    """
    value = row.get(column)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise ValueError(f"{column} must be text: {quote(value)}")
    if _NO_TEXT.search(value):
        raise ValueError(f"{column} has a character that is no text: {quote(ascii(value))}")
    value = value.strip()
    if all(letter in _BLANK_LETTERS or unicodedata.category(letter) in _INVISIBLE for letter in value):
        value = ""
    if value.casefold() in _STAND_INS:
        raise ValueError(
            f"{column} is '{value}', as programs write a missing value or an answer; write a text, or leave it empty"
        )
    if not value and not empty:
        raise ValueError(f"{column} is empty")
    return value


def texts_of(row: dict[str, object], column: str | None) -> list[str]:
    """A list of texts: JSON list, or one text whose parts are joined by `|`; empty parts in the middle are kept."""
    if column is None:
        return []
    value = row.get(column)
    if isinstance(value, list):
        return [text_of({column: part}, column, empty=True) for part in value]
    text = text_of(row, column, empty=True)
    if text[:1] in ("[", "{"):
        raise ValueError(f"{column} '{quote(text)}' is a list as a program prints it; right are names joined by |")
    return [text_of({column: part}, column, empty=True) for part in text.split("|")] if text else []


def caption_of(row: dict[str, object], column: str, allow_empty: bool) -> str:
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{column} must be text: {quote(value)}")
    caption = text_of(row, column, empty=True)
    if not caption and not allow_empty:
        raise ValueError(f"{column} is empty; set data.allow_empty_captions true to accept it")
    return caption


def numbers_of(parts: object, column: str) -> Box:
    """Four finite numbers of a list of numbers or texts."""
    shown = ",".join(map(str, parts)) if isinstance(parts, list) else parts
    try:
        if isinstance(parts, list) and all(map(_is_plain_number, parts)):
            x, y, width, height = (float(part) for part in parts)
        else:
            raise TypeError
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{column} '{quote(shown)}' is not a box; right is x,y,width,height in pixels") from None
    if not all(map(math.isfinite, (x, y, width, height))):
        raise ValueError(f"{column} '{quote(shown)}' has a number that is not finite")
    return x, y, width, height


def _is_plain_number(part: object) -> bool:
    """Python's float() also takes true, 1_0 and digits of other scripts."""
    return not isinstance(part, bool) and not (isinstance(part, str) and ("_" in part or not part.isascii()))


def box_of(parts: Any, column: str) -> Box:
    """A box (x, y, width, height) of positive size."""
    box = numbers_of(parts, column)
    if box[2] <= 0 or box[3] <= 0:
        shown = ",".join(map(str, parts))
        raise ValueError(f"{column} '{quote(shown)}': width and height must be above 0")
    return box


def frame_of(row: dict[str, object], width_column: str, height_column: str) -> tuple[int, int]:
    """(width, height) in pixels of the image that boxes and masks were drawn on."""
    sides = []
    for column in (width_column, height_column):
        text = text_of(row, column)
        try:
            side = float(text) if _is_plain_number(text) else math.nan
        except ValueError:
            side = math.nan
        if not (side.is_integer() and side > 0):
            raise ValueError(f"{column} '{quote(text)}' is not a whole number of pixels above 0")
        sides.append(int(side))
    if sides[0] * sides[1] > _LARGEST_FRAME_PX:
        raise ValueError(f"{width_column} x {height_column} is {sides[0]} x {sides[1]} px, more than any image has")
    return sides[0], sides[1]


def split_name(value: str) -> str:
    """The name that rows have, of a code or of any name of the validation split."""
    return SPLIT_CODES.get(value, "val" if value in VALIDATION_SPLITS else value)


def split_of(row: dict[str, object], column: str) -> str:
    """The name of a split code; a number may have been written as a float."""
    text = text_of(row, column)
    name = split_name(text.removesuffix(".0"))
    if name not in SPLIT_CODES.values():
        known = ", ".join(f"{code} {name}" for code, name in SPLIT_CODES.items())
        raise ValueError(f"{column} '{quote(text)}' is none of {known}")
    return name


def key(name: str) -> str:
    """What names are compared by: case and white space do not count."""
    return " ".join(name.split()).casefold()


def quote(value: object) -> str:
    """Its first characters on one line; those that a terminal would obey or hide are escaped."""
    text = " ".join(str(value).split())
    text = text if len(text) <= _QUOTED_CHARACTERS else text[: _QUOTED_CHARACTERS - 1] + "…"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""

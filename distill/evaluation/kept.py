"""What results were made of, and entries on disk that later evaluations use again.

An entry is used again only if all that decides it is the same: the weights, the options, and the image with its text.
So an evaluation of more images makes those that are missing, and one of other weights makes all.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from distill.data.cache import model_fingerprint
from distill.files import JsonObject, write_atomic
from distill.metrics.features import Features
from distill.models.family import Model

Entry = JsonObject


def digest(*parts: object) -> str:
    """Hash of values that JSON can hold."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def weights_of(model: Model) -> str:
    """Hash of all weights, of the scales of adapters, of the noise schedule, and of how texts become tokens."""
    modules = model.modules()
    scales = [f"{name} {part.scaling}" for m in modules for name, part in m.named_modules() if hasattr(part, "scaling")]
    schedules = [
        {key: value for key, value in dict(scheduler.config).items() if not key.startswith("_")}
        for scheduler in (model.noise_scheduler, model.pipeline.scheduler)
    ]
    ids = [tokens.tolist() for tokens in model.tokenize(["Left effusion, no pneumothorax; 3 cm."])]
    return digest([model_fingerprint(module) for module in modules], scales, schedules, ids)


def packed(array: NDArray[Any] | None) -> list[Any] | None:
    """An array as JSON can hold it, without loss."""
    if array is None:
        return None
    return [array.dtype.str, list(array.shape), base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()]


def unpacked(value: Sequence[Any] | None) -> NDArray[Any] | None:
    if value is None:
        return None
    kind, shape, text = value
    array: NDArray[Any] = np.frombuffer(base64.b64decode(text), dtype=np.dtype(kind)).reshape(shape).copy()
    return array


def features_key(features: Features | None) -> list[str]:
    return [] if features is None else [features.name, model_fingerprint(features)]


class Kept:
    """What earlier calls made for one key, by the hash of what each entry was made of (entry["made_of"]).

    NAME.jsonl holds entries of calls that ended. NAME.RANK.jsonl holds those of a call that goes on: an entry is on
    disk as soon as it is added, so that a killed call loses at most one batch. Lines that are torn or changed are left
    out. Every process must have read before one of them adds.
    """

    def __init__(self, folder: Path, name: str, key: str, rank: int) -> None:
        self._folder, self._name, self._key, self._rank = folder, name, key, rank
        self._file: TextIO | None = None
        self.entries = self.read()

    @property
    def _whole(self) -> Path:
        return self._folder / f"{self._name}.jsonl"

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._name}.*.jsonl"))

    def read(self) -> dict[str, Entry]:
        """Entries on disk; of two with one hash the later."""
        return {entry["made_of"]: entry for path in [self._whole, *self._parts()] for entry in self._entries_of(path)}

    def _entries_of(self, path: Path) -> Iterable[Entry]:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return
        if lines and lines[0] == self._head:
            for line in lines[1:]:
                checksum, _, text = line.partition(" ")
                if checksum == _checksum(text):
                    yield json.loads(text)

    @property
    def _head(self) -> str:
        return json.dumps({"key": self._key})

    def add(self, *entries: Entry) -> None:
        """Write entries to this process's file."""
        if self._file is None:
            self._file = self._open()
        self._file.write("".join(f"{_line(entry)}\n" for entry in entries))
        self._file.flush()

    def _open(self) -> TextIO:
        path = self._folder / f"{self._name}.{self._rank}.jsonl"
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                goes_on = file.readline() == f"{self._head}\n"
        except FileNotFoundError:
            goes_on = False
        opened = path.open("a" if goes_on else "w", encoding="utf-8")
        # The empty line ends one that a kill cut off.
        opened.write("\n" if goes_on else f"{self._head}\n")
        return opened

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def merge(self) -> None:
        """One file of all, in the place of those of the processes; of the main process, when all have closed theirs."""
        parts = self._parts()
        if parts:
            write_atomic(self._whole, "\n".join([self._head, *map(_line, self.read().values())]) + "\n")
        for path in parts:
            path.unlink()


def _line(entry: Entry) -> str:
    text = json.dumps(entry)
    return f"{_checksum(text)} {text}"


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode('utf-8', 'replace')):08x}"


class Batches:
    """Items in batches, each of which is made anew as a whole, or not at all.

    The composition of a batch can change the last bits of a result. So an entry is used again where its batch was full,
    and a batch that was cut short, by the end of an earlier and smaller evaluation, is made anew.
    """

    def __init__(self, hashes: Sequence[str], batch_size: int, *, rank: int = 0, world: int = 1) -> None:
        self._hashes, self._size = hashes, batch_size
        shares = [range(first, len(hashes), world) for first in range(world)]
        self._all = [[own[start : start + batch_size] for start in range(0, len(own), batch_size)] for own in shares]
        self._own = self._all[rank]

    def mark(self, places: Sequence[int], *, end: int | None = None) -> JsonObject:
        """What an entry says of its batch. end: items from here on are of another kind and do not fill a batch."""
        is_full = len(places) == self._size and (end is None or max(places) < end)
        return {"batch": self._name(places), "full": is_full}

    def names_with(self, places: range) -> list[str]:
        """Names of the batches of all processes that hold any of these items."""
        return [self._name(batch) for own in self._all for batch in own if max(batch) in places]

    def _name(self, places: Sequence[int]) -> str:
        return digest([self._hashes[place] for place in places])

    def missing(self, usable: Mapping[int, Entry]) -> list[Sequence[int]]:
        """Batches of this process that have to be made. usable: place -> an entry that was made of the same."""
        return [batch for batch in self._own if not self._is_there(batch, usable)]

    def _is_there(self, batch: Sequence[int], usable: Mapping[int, Entry]) -> bool:
        entries, name = [usable.get(place) for place in batch], self._name(batch)
        return all(entry is not None and (entry["full"] or entry["batch"] == name) for entry in entries)

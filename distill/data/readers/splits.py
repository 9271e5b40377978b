"""Splits of images: a rule where the files name none, and a check that no patient and no picture is in two of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from distill.data.readers.tables import Place, quote
from distill.errors import UserError, raise_all

EVERY_IMAGE = "all"
"""Value of data.test_split that evaluates a folder as a whole."""

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Member:
    """An image as splits see it. An empty patient or sha256 is unknown, and is like no other."""

    place: Place | str
    name: str
    split: str
    patient: str = ""
    sha256: str = ""


def split_by_rule(members: Sequence[Member]) -> tuple[list[Split], int]:
    """The split of each image, and the number of groups that stay together.

    Images of one patient, and files of the same bytes, are a group. Groups are ordered by the SHA-256 of their patient,
    else of their first name. The first tenth (at least one group) is the test split, the next tenth (at least one, if
    there are three groups) validation, the rest train. The order of the rows does not count.
    """
    groups = _groups(members)
    keys = []
    for group in groups:
        patients = {members[i].patient for i in group} - {""}
        name = min(members[i].name for i in group)
        key = min(patients) if patients else name
        keys.append((hashlib.sha256(key.encode()).hexdigest(), name))
    tenth = max(1, len(groups) // 10)
    validation = tenth if len(groups) >= 3 else 0
    splits: list[Split] = ["train"] * len(members)
    for rank, place in enumerate(sorted(range(len(groups)), key=keys.__getitem__)):
        split: Split = "test" if rank < tenth else "validation" if rank < tenth + validation else "train"
        for i in groups[place]:
            splits[i] = split
    return splits, len(groups)


def _groups(members: Sequence[Member]) -> list[list[int]]:
    """Positions of images that share a patient or a file's bytes, also by way of others."""
    parent = list(range(len(members)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, member in enumerate(members):
        for shared in (("patient", member.patient), ("sha256", member.sha256)):
            if shared[1]:
                parent[root(i)] = root(first.setdefault(shared, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(members)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def refuse_shared(members: Sequence[Member], title: str, remedy: str) -> None:
    """Raise UserError if a patient or a picture is in two splits. title: where they are; remedy: what to do."""
    faults = []
    for what, value_of in (("patient", attrgetter("patient")), ("picture", attrgetter("sha256"))):
        found: dict[str, dict[str, list[Member]]] = {}
        for member in members:
            if value := value_of(member):
                found.setdefault(value, {}).setdefault(member.split, []).append(member)
        for value, by_split in found.items():
            if len(by_split) > 1:
                name = f"patient '{quote(value)}'" if what == "patient" else "the same picture"
                faults.append(f"{name}: {'; '.join(_shown(split, some) for split, some in by_split.items())}")
    try:
        raise_all(title, faults)
    except UserError as error:
        raise UserError(f"{error}\n{remedy}") from None


def _shown(split: str, members: list[Member]) -> str:
    more = f" and {len(members) - 1} more" if len(members) > 1 else ""
    return f"split {split}, '{members[0].name}' ({members[0].place}){more}"

"""Do the looks of trainings at several budgets tell held-out quality? looks.json and looks.md beside proof.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from distill.evaluation.validation import LOG, read_looks
from distill.evaluation.validation_signal import QUALITIES, Agreement, agreements
from distill.files import write_atomic, write_json
from distill.report.document import UNKNOWN, Section, Table, markdown_section
from distill.report.proof import Point, read_curves

TITLE = "Do looks at validation images tell held-out quality?"
HOW = (
    "Rank correlation of the looks (trainer.validate_every_steps) with metrics of held-out images, over the lengths of "
    "a training: 1 if both rank the weights alike, the better first, and 0 by chance. Mean over training seeds, and "
    "its 95 % "
    "interval of Student's t."
)


def write_signals(folder: Path, folders: Mapping[int, Path]) -> Path | None:
    """Write looks.json and looks.md into `folder`; returns looks.md. None where no training was looked at.

    folders: budget -> folder with seed-N and their metrics.json.
    """
    found = {arm: _of_arm(arm, points, folders) for arm, points in read_curves(folders).items()}
    if not any(found.values()):
        return None
    write_json(folder / "looks.json", {arm: [asdict(one) for one in each] for arm, each in found.items()})
    rows = [row for arm, each in found.items() for row in _rows(arm, each)]
    head = ["arm", "rule of keep", "lengths", *(metric.split(".", 1)[1] for metric in QUALITIES)]
    section = Section(TITLE, [HOW], [], [Table(head, rows, "numbers", "looks and held-out images")])
    return write_atomic(folder / "looks.md", markdown_section(section) + "\n")


def _of_arm(arm: str, points: Mapping[int, Point], folders: Mapping[int, Path]) -> list[Agreement]:
    """The longest training of each seed has the looks of all shorter ones."""
    longest, seeds = folders[max(points)], {seed for point in points.values() for seed in point.values}
    looked = {seed: read_looks(longest / f"seed-{seed}" / arm / LOG) for seed in seeds}
    held_out = {
        seed: {point.steps: point.values[seed] for point in points.values() if seed in point.values} for seed in seeds
    }
    return agreements(looked, held_out)


def _rows(arm: str, found: Sequence[Agreement]) -> list[list[str]]:
    rows = []
    for rule in dict.fromkeys(one.rule for one in found):
        own = {one.metric: one for one in found if one.rule == rule}
        lengths = str(min(one.weights for one in own.values()))
        rows.append([arm, rule, lengths, *(_text(own.get(metric)) for metric in QUALITIES)])
    return rows


def _text(one: Agreement | None) -> str:
    if one is None:
        return UNKNOWN
    ends = f" [{one.interval[0]:+.2f}, {one.interval[1]:+.2f}]" if one.interval else ""
    return f"{one.mean:+.2f}{ends}"

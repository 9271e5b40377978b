"""Arms at equal cost, over several budgets: proof.json, proof.md with its tables, and a picture of the fronts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from distill.errors import UserError
from distill.evaluation.claims import IN_LOGARITHMS, Comparison, compare, differences, student_interval
from distill.files import JsonObject, provenance, read_json, write_atomic, write_json
from distill.report import tables
from distill.report.document import UNKNOWN, Picture, Section, Table, markdown_section
from distill.report.figures import COLOURS, chart, marker, quality_axis, with_bars

Values = Mapping[int, Mapping[str, float | None]]
"""Training seed -> metric, such as "word.auc" -> value."""


@dataclass(frozen=True)
class Point:
    """An arm at a budget. cost: image-passes, teachers included."""

    steps: int
    cost: int
    values: Values

    def of(self, metric: str) -> dict[int, float]:
        """Seed -> value, of the seeds where there is one."""
        return {seed: value for seed, one in self.values.items() if (value := one.get(metric)) is not None}


Curves = Mapping[str, Mapping[int, Point]]
"""Arm -> budget -> its point."""


def read_curves(folders: Mapping[int, Path]) -> dict[str, dict[int, Point]]:
    """folders: budget -> folder of its seeds. The base is left out: it is not trained."""
    found: dict[str, dict[int, Point]] = {}
    for budget, folder in folders.items():
        for name, arm in read_json(folder / "metrics.json")["arms"].items():
            cost = arm["cost"]
            if cost["steps"] is None:
                continue
            values = {int(seed): each for seed, each in arm["per_seed"].items()}
            passes = cost.get("image_passes_with_teachers")
            if passes is None:
                raise UserError(f"{folder}: the cost of {name} in image-passes is unknown; train it again")
            found.setdefault(name, {})[budget] = Point(int(cost["steps"]), int(passes), values)
    return found


def compare_all(
    curves: Curves, arms: Sequence[str], compare_to: Sequence[str], margins: Mapping[str, float]
) -> list[Comparison]:
    """Every one of `arms` with every arm of compare_to, at every budget that both have, in every metric with a
    margin."""
    found = []
    for arm in arms:
        for parent in (name for name in compare_to if name != arm):
            for budget in sorted(curves[arm].keys() & curves[parent].keys()):
                for metric, margin in margins.items():
                    per_seed = differences(metric, curves[arm][budget].of(metric), curves[parent][budget].of(metric))
                    if per_seed:
                        found.append(compare(arm, parent, budget, metric, per_seed, margin))
    return found


def write_proof(
    folder: Path,
    folders: Mapping[int, Path],
    *,
    arms: Sequence[str],
    compare_to: Sequence[str],
    margins: Mapping[str, float],
) -> Path:
    """Write proof.json, proof.md and, if both sides were measured, fronts.png into `folder`; returns proof.md.

    folders: budget -> folder with seed-N and their metrics.json. arms: those that are compared with `compare_to`;
    further ones, such as teachers, are only listed.
    """
    curves = read_curves(folders)
    arms = [name for name in arms if name in curves]
    comparisons = compare_all(curves, arms, [name for name in compare_to if name in curves], margins)
    write_json(folder / "proof.json", _document(curves, comparisons, margins, folders))
    shown = [name for name in dict.fromkeys((*compare_to, *arms)) if name in curves]
    picture = _front(curves, shown)
    if picture:
        write_atomic(folder / "fronts.png", picture.png)
    sections = [_verdicts(comparisons, margins), *(_budget(curves, shown, budget) for budget in folders)]
    parts = ["# Arms at equal cost", _HOW, *(["![quality against localization](fronts.png)"] if picture else [])]
    return write_atomic(folder / "proof.md", "\n\n".join([*parts, *map(markdown_section, sections)]) + "\n")


_HOW = (
    "A budget is in steps of plain fine-tuning; every arm got the steps that its image-passes allow, teachers "
    "included. Intervals are 95 % intervals of Student's t over training seeds. An arm is at least as good as a parent "
    "in a metric if "
    "the one-sided 95 % bound of the difference, paired by seed, is inside the margin that was set beforehand."
)


def _document(
    curves: Curves, comparisons: Sequence[Comparison], margins: Mapping[str, float], folders: Mapping[int, Path]
) -> JsonObject:
    last = read_json(next(reversed(list(folders.values()))) / "metrics.json")["provenance"]
    seeds = sorted({seed for points in curves.values() for point in points.values() for seed in point.values})
    arms = {
        name: {
            "cost": max(point.cost for point in points.values()),
            "lengths": {str(budget): _length(point) for budget, point in points.items()},
            "per_seed": {
                str(seed): {str(budget): point.values[seed] for budget, point in points.items() if seed in point.values}
                for seed in seeds
            },
        }
        for name, points in curves.items()
    }
    listed = [_entry(one) for one in comparisons]
    origin = provenance() | {key: last[key] for key in ("config", "commits", "counts") if key in last}
    return {"seeds": seeds, "margins": dict(margins), "arms": arms, "comparisons": listed, "provenance": origin}


def _length(point: Point) -> JsonObject:
    names = dict.fromkeys(name for one in point.values.values() for name in one)
    found: JsonObject = {"steps": point.steps, "cost": point.cost}
    for name in names:
        values = list(point.of(name).values())
        if values:
            found[name] = {"mean": float(np.mean(values)), "t_interval": student_interval(values)}
    return found


def _entry(one: Comparison) -> JsonObject:
    found: JsonObject = asdict(one) | {"met": one.met}
    found["t_interval"] = found.pop("interval")
    found["per_seed"] = {str(seed): value for seed, value in one.per_seed.items()}
    return found


def _all_met(found: Sequence[Comparison | None]) -> str:
    """Of one arm and parent: a metric for each margin, None where it was not measured."""
    tested = [one for one in found if one is not None and one.bound is not None]
    if any(not one.met for one in tested):
        return "no"
    return "yes" if len(tested) == len(found) else "not tested"


def _verdicts(comparisons: Sequence[Comparison], margins: Mapping[str, float]) -> Section:
    """One row an arm, parent and budget: the difference in each metric, and whether all margins are met."""
    rows: list[list[str]] = []
    names = {metric.key: metric.name for metric in tables.METRICS}
    groups: dict[tuple[str, str, int], dict[str, Comparison]] = {}
    for one in comparisons:
        groups.setdefault((one.arm, one.parent, one.budget), {})[one.metric] = one
    for (arm, parent, budget), found in groups.items():
        cells = [_difference(found.get(metric)) for metric in margins]
        rows.append([arm, parent, f"{budget:,}", *cells, _all_met([found.get(metric) for metric in margins])])
    heads = [f"{names.get(metric, metric)} ({_signed(margin, metric)})" for metric, margin in margins.items()]
    table = Table(["arm", "minus", "budget", *heads, "all met"], rows, "numbers", "differences at equal cost")
    said = (
        "In parentheses the margin. ✓: the bound of the difference is inside it. Differences of FID are relative. A "
        "single seed has no bound, so that nothing is tested."
    )
    return Section("Is an arm at least as good as its parents?", [said], [], [table])


def _difference(one: Comparison | None) -> str:
    if one is None:
        return UNKNOWN
    ends = "" if one.interval is None else f" [{', '.join(_signed(end, one.metric) for end in one.interval)}]"
    return f"{_signed(one.difference, one.metric)}{ends}{' ✓' if one.met else ''}"


def _signed(value: float, metric: str) -> str:
    if metric in IN_LOGARITHMS:
        return f"{100 * np.expm1(value):+.0f} %"
    said = f"{value:+.3f}"
    return said.replace("0.", ".", 1) if abs(value) < 1 else said


def _budget(curves: Curves, arms: Sequence[str], budget: int) -> Section:
    """All arms at one budget."""
    here = [curves[arm][budget] for arm in arms if budget in curves[arm]]
    shown = [metric for metric in tables.MAIN if any(point.of(metric.key) for point in here)]
    rows: list[list[str]] = []
    for name in arms:
        point = curves[name].get(budget)
        if point is None:
            continue
        cells = [" ".join(tables.format_estimate(_mean(point, metric), metric)).strip() for metric in shown]
        rows.append([name, f"{point.steps:,}", f"{point.cost:,}", *cells])
    table = Table(["arm", "steps", "image-passes", *(m.label for m in shown)], rows, "numbers", f"budget {budget}")
    return Section(f"Budget {budget:,}", [], [], [table])


def _front(curves: Curves, arms: Sequence[str]) -> Picture | None:
    """What the image adds against finding AUC and FID, through the budgets; None where one side was not measured."""
    lines: dict[tables.Metric, dict[str, list[_FrontPoint]]] = {}
    for metric in (tables.FINDING_AUC, tables.FID):
        for arm in arms:
            points = [
                (budget, _mean(point, tables.IMAGE_ADDS), _mean(point, metric)) for budget, point in curves[arm].items()
            ]
            if known := [point for point in points if None not in (point[1].value, point[2].value)]:
                lines.setdefault(metric, {})[arm] = known
    return _front_chart(lines) if lines else None


def _mean(point: Point, metric: tables.Metric) -> tables.Estimate:
    """Over seeds."""
    values = list(point.of(metric.key).values())
    return tables.Estimate(float(np.mean(values)), *(student_interval(values) or ())) if values else tables.Estimate()


_FrontPoint = tuple[int, tables.Estimate, tables.Estimate]
"""Budget, what the image adds, quality."""


def _front_chart(lines: Mapping[tables.Metric, Mapping[str, Sequence[_FrontPoint]]]) -> Picture:
    """One panel a metric of quality, and in it one line an arm, its points in their order."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(lines), squeeze=False)[0]
        for axes, (metric, arms) in zip(panels, lines.items(), strict=True):
            for place, (arm, points) in enumerate(arms.items()):
                colour = COLOURS[place % len(COLOURS)]
                places = [(x, y) for _, x, y in points]
                with_bars(axes, places, marker(place) | {"color": colour, "label": arm, "lw": 1})
                for budget, x, y in points:
                    axes.annotate(
                        f"{budget:,}", (x.value, y.value), (4, 3), textcoords="offset points", fontsize=6, color=colour
                    )
            axes.set_xlabel("image adds (localization, right is better)")
            quality_axis(axes, metric, [y.value for points in arms.values() for _, _, y in points])
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)

    return chart(
        "fronts",
        "quality against what the image adds, one line an arm; numbers beside points are budgets",
        9.0,
        4.4,
        draw,
    )

"""Metrics, formats, and the tables of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table as RichTable
from rich.text import Text as RichText

from distill.report.document import UNKNOWN, Cell, Table
from distill.report.results import MASS, Arm, Estimate, Results, parse_metrics


@dataclass(frozen=True)
class Metric:
    """key: see `Arm.estimate`. direction: +1 higher is better, -1 lower is better, 0 neither. unit: of order 1."""

    key: str
    name: str
    direction: int
    unit: bool
    meaning: str

    @property
    def label(self) -> str:
        return f"{self.name} {'↓ ↑'[self.direction + 1]}".strip()


WORD_AUC = Metric(
    "word.auc", "word AUC", 1, True,
    "The chance that the attention map of a finding's words is higher at a pixel inside the finding's region than at one "
    "outside. .5 is chance, 1 is perfect. Mean over findings.",
)  # fmt: skip
IMAGE_ADDS = Metric(
    "word.image_adds", "image adds", 1, True,
    "Word AUC of an image's own map, minus the word AUC of other images' maps of the same finding on this image. 0 means "
    "that the map does not depend on the image.",
)  # fmt: skip
OTHER_IMAGE = Metric(
    "word.other_image_auc", "other image's AUC", 0, True, "Word AUC of other images' maps of the same finding."
)
CNR = Metric(
    "word.cnr", "CNR", 1, False, "Contrast of the same map between inside and outside, in standard deviations."
)
TOP1 = Metric("word.top1", "Top-1", 1, True, "How often the highest pixel of the map lies inside the region.")
IOU = Metric("word.iou", "IoU", 1, True, "Overlap of the region and the map above a fixed threshold.")
EOS_AUC = Metric("eos.auc", "EOS AUC", 0, True, "The same AUC for the map of the end-of-text token.")
PADDING_AUC = Metric("padding.auc", "padding AUC", 0, True, "The same AUC for the map of the padding tokens.")
FID = Metric(
    "quality.fid", "FID", -1, False,
    "Distance between the features of generated and real held-out images. It depends on the number of images and on the "
    "features. Compare only values of one table.",
)  # fmt: skip
FINDING_AUC = Metric(
    "quality.finding_auc", "finding AUC", 1, True,
    "A classifier of real images looks for the caption's findings in each generated image.",
)  # fmt: skip
DIVERSITY = Metric(
    "quality.diversity", "diversity", 0, True, "How much several images of one caption differ, 1 - MS-SSIM."
)
METRICS = (WORD_AUC, IMAGE_ADDS, OTHER_IMAGE, CNR, TOP1, IOU, EOS_AUC, PADDING_AUC, FID, FINDING_AUC, DIVERSITY)


def format_number(value: float, decimals: int) -> str:
    """Fixed decimals without a zero before the point: `.842`, `-.23`, `12.3`."""
    text = f"{value:.{decimals}f}"
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    return sign + (digits[1:] if digits.startswith("0.") else digits)


def format_estimate(estimate: Estimate, unit: bool) -> tuple[str, str]:
    """(value, interval) such as (`.842`, `[.830, .853]`); a dash and an empty string where unknown."""
    if estimate.value is None:
        return UNKNOWN, ""
    size = abs(estimate.value)
    decimals = 3 if unit else 0 if size >= 1000 else 1 if size >= 10 else 2
    ends = [format_number(end, decimals) for end in (estimate.low, estimate.high) if end is not None]
    return format_number(estimate.value, decimals), f"[{', '.join(ends)}]" if len(ends) == 2 else ""


def format_difference(estimate: Estimate, relative: bool) -> str:
    """`+.013 [+.001, +.020]`, or `-7.3 % [-17.3 %, +5.0 %]` of a relative difference."""
    values = [value for value in (estimate.value, estimate.low, estimate.high) if value is not None]
    shown = [format_number(100 * value, 1) + " %" if relative else format_number(value, 3) for value in values]
    signed = [text if text.startswith("-") else f"+{text}" for text in shown]
    return UNKNOWN if not signed else signed[0] if len(signed) < 3 else f"{signed[0]} [{signed[1]}, {signed[2]}]"


def format_seconds(seconds: float | None) -> str:
    """`8.2s`, `4m12s`, `1h03m`; a dash where unknown."""
    if seconds is None:
        return UNKNOWN
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 10 else f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_count(count: float | None, unit: str = "", decimals: int = 0) -> str:
    """`1,234 MB`; a dash where unknown."""
    return UNKNOWN if count is None else f"{count:,.{decimals}f} {unit}".strip()


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf of nested objects; lists of plain values are one leaf."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple)) and any(isinstance(item, (Mapping, list, tuple)) for item in value):
        for index, item in enumerate(value):
            yield from flatten(item, f"{prefix}[{index}]")
    elif isinstance(value, (list, tuple)):
        yield prefix, ", ".join(map(str, value)) or "(none)"
    elif isinstance(value, Mapping):
        yield prefix, "(none)"
    else:
        yield prefix, UNKNOWN if value is None else str(value)


def measured(results: Results) -> list[Metric]:
    """The metrics that some arm has."""
    return [m for m in METRICS if any(arm.estimate(m.key).value is not None for arm in results.arms.values())]


def _rows(results: Results) -> list[Arm]:
    """All arms, and the real images as one that has quality only."""
    return [*results.arms.values(), *([Arm("real images", None, results.real)] if results.real else [])]


def results_table(results: Results) -> Table:
    """One row an arm, the real images, and each map that does not look at the image."""
    metrics = measured(results)
    rows: list[list[str | Cell]] = [
        [arm.name, *(Cell(*format_estimate(arm.estimate(m.key), m.unit)) for m in metrics)] for arm in _rows(results)
    ]
    priors = next((arm.localization.priors for arm in results.arms.values() if arm.localization), {})
    for name, prior in priors.items():
        shown = [Cell(*format_estimate(prior if m is WORD_AUC else Estimate(), True)) for m in metrics]
        rows.append([f"blind map: {name.replace('_', ' ')}", *shown])
    return Table(["model", *(m.label for m in metrics)], rows, "numbers", "results of all models")


def terminal_table(metrics: Mapping[str, Any]) -> RichTable:
    """The main metrics for a terminal, `-` where a value is unknown. An interval stands under its value."""
    results = parse_metrics(metrics)
    caption = "95 % intervals under the values; ↑ higher is better, ↓ lower is better"
    table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")
    table.add_column("model", no_wrap=True, max_width=20)
    shown = [m for m in (WORD_AUC, IMAGE_ADDS, FID, FINDING_AUC, DIVERSITY) if m in measured(results)]
    for name in (*(m.label for m in shown), "steps", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in _rows(results):
        cells = [" ".join(format_estimate(arm.estimate(m.key), m.unit)).strip().replace(" [", "\n[") for m in shown]
        cells += [format_count(arm.cost.steps), format_seconds(arm.cost.train_seconds)]
        # Text, not str: rich would read [brackets] in a name as markup.
        table.add_row(RichText(arm.name), *(RichText("-" if cell == UNKNOWN else cell) for cell in cells))
    return table


def difference_table(results: Results) -> Table | None:
    """Differences of pairs of arms on the same images and seeds; None where there are none."""
    metrics = [m for m in METRICS if any(m.key in found for found in results.paired.values())]
    rows: list[list[str | Cell]] = []
    for (arm, other), found in results.paired.items():
        row: list[str | Cell] = [f"{arm} - {other}"]
        for m in metrics:
            difference = found.get(m.key, Estimate())
            low, high = difference.low, difference.high
            apart = low is not None and high is not None and (low > 0 or high < 0) and m.direction != 0
            good = (difference.value or 0) * m.direction > 0
            tone = "even" if not apart else "good" if good else "bad"
            row.append(Cell(format_difference(difference, m is FID), tone=tone))  # type: ignore[arg-type]
        rows.append(row)
    heads = ["", *(f"{m.label}{', relative' if m is FID else ''}" for m in metrics)]
    return Table(heads, rows, "numbers", "paired differences") if rows else None


def finding_table(results: Results) -> Table | None:
    """Word AUC of every finding (rows) in every arm (columns); None where no arm has any."""
    maps = {name: arm.localization.maps.get("word") if arm.localization else None for name, arm in results.arms.items()}
    findings = {name: found.findings if found else {} for name, found in maps.items()}
    rows: list[list[str | Cell]] = []
    for finding in dict.fromkeys(name for found in findings.values() for name in found):
        cells = [found.get(finding, (None, 0)) for found in findings.values()]
        pairs = format_count(max(pairs for _, pairs in cells))
        rows.append([finding, pairs, *(UNKNOWN if auc is None else format_number(auc, 3) for auc, _ in cells)])
    return Table(["finding", "pairs", *findings], rows, "numbers", "word AUC of each finding") if rows else None


def mass_table(results: Results) -> Table | None:
    """Where the attention of each arm goes; None where no arm has any."""
    masses = {name: arm.localization.mass for name, arm in results.arms.items() if arm.localization}
    found = {name: [mass.get(part) for part in MASS] for name, mass in masses.items() if mass}
    rows = [[name, *(UNKNOWN if v is None else format_number(v, 3) for v in mass)] for name, mass in found.items()]
    return Table(["model", "BOS", "words", "EOS", "padding"], rows, "numbers", "attention mass") if rows else None


def cost_table(results: Results) -> Table:
    """Training, time, memory and size of each arm; columns that no arm has are left out."""
    names = ["trained parameters", "steps", "training", "denoiser passes", "evaluation", "peak memory"]
    names += ["denoiser parameters", "text encoder parameters", "GFLOP a pass", "passes an image", "stored"]
    rows = []
    for arm in results.arms.values():
        cost, size = arm.cost, arm.size
        cells = [format_count(cost.trainable_parameters), format_count(cost.steps), format_seconds(cost.train_seconds)]
        cells += [format_count(cost.denoiser_passes), format_seconds(cost.evaluation_seconds)]
        cells += [format_count(cost.peak_memory_gb, "GB", 2)]
        cells += [format_count(size and size.denoiser_parameters), format_count(size and size.text_encoder_parameters)]
        cells += [
            format_count(size and size.denoiser_gflops, "", 2),
            format_count(size and size.denoiser_passes_an_image),
        ]
        rows.append([arm.name, *cells, format_count(size and size.megabytes, "MB", 1)])
    kept = [0, *(place for place in range(1, len(names) + 1) if any(row[place] != UNKNOWN for row in rows))]
    heads = ["model", *names]
    return Table([heads[k] for k in kept], [[row[k] for k in kept] for row in rows], "numbers", "cost")

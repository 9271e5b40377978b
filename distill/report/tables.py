"""Numbers of metrics.json as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rich import box
from rich.table import Table as RichTable
from rich.text import Text as RichText

from distill.report.document import UNKNOWN, Cell, Table

Comparison = Literal["better", "worse", "overlap"]
Tone = Literal["good", "bad", "even", "muted"]


@dataclass(frozen=True)
class Metric:
    """One column of the headline table.

    path: keys from an arm's entry to the value; its interval is at the same place with `_ci` added.
    direction: +1 when higher is better, -1 when lower is better, 0 when neither.
    unit: the value lies in [0, 1] (or is of order 1), and is shown with three decimals.
    """

    path: tuple[str, ...]
    name: str
    short: str
    direction: int
    unit: bool
    meaning: str

    @property
    def arrow(self) -> str:
        return {1: "↑", -1: "↓", 0: ""}[self.direction]

    @property
    def label(self) -> str:
        return f"{self.name} {self.arrow}".strip()


PROTOCOL_NOTES = {
    "dombrowski": " (regions by their boxes, IoU above a Gaussian-mixture threshold, means over all pairs)",
    "vilouras": " (regions by their boxes, the map of all words, AUC by 5 thresholds above Otsu's, absolute CNR)",
}
"""How the columns differ from what is said below where a published protocol was asked for."""

WORD_AUC = Metric(
    ("localization", "word", "auc"),
    "word AUC",
    "word\nAUC",
    1,
    True,
    "Area under the ROC curve of the attention map of a finding's words, pixel by pixel, against the finding's region: "
    "the chance that a pixel inside gets more attention than one outside. .5 is chance, 1 is perfect. Mean over the "
    "findings of the mean over the images of each, as for the next three.",
)
CNR = Metric(
    ("localization", "word", "cnr"),
    "CNR",
    "CNR",
    1,
    False,
    "Contrast-to-noise ratio of the same map, (mean inside - mean outside) / √(variance inside + variance outside); "
    "signed: below 0 the attention avoids the region.",
)
TOP1 = Metric(
    ("localization", "word", "top1"),
    "Top-1",
    "Top-1\n",
    1,
    True,
    "Pointing game: how often the map's highest pixel lies inside the region.",
)
IOU = Metric(
    ("localization", "word", "iou"),
    "IoU",
    "IoU",
    1,
    True,
    "Intersection over union of the region and the map above a fixed threshold.",
)
EOS_AUC = Metric(
    ("localization", "eos", "auc"),
    "EOS AUC",
    "EOS\nAUC",
    0,
    True,
    "The same AUC for the map of the end-of-text token. Above the word AUC it says that localization has leaked from "
    "the words into this token. Neither high nor low is better in itself.",
)
PADDING_AUC = Metric(
    ("localization", "padding", "auc"),
    "padding AUC",
    "pad\nAUC",
    0,
    True,
    "The same AUC for the map of the padding tokens after the end-of-text token: a second place to leak to.",
)
FID = Metric(
    ("quality", "fid"),
    "FID",
    "FID",
    -1,
    False,
    "Fréchet distance between the features of generated and of real held-out images. It depends on the number of "
    "images and on the feature extractor: compare only rows of one table. The row of real images is the distance "
    "between them and as many other real images: what it is at this number when nothing is wrong.",
)
FINDING_AUC = Metric(
    ("quality", "finding_auc"),
    "finding AUC",
    "find\nAUC",
    1,
    True,
    "A classifier of real images looks at each generated image: AUC of its answers against the findings in the "
    "caption. It says whether the image shows what the caption asks for.",
)
DIVERSITY = Metric(
    ("quality", "diversity"),
    "diversity",
    "diver-\nsity",
    1,
    True,
    "1 - MS-SSIM between several images of one caption, mean over captions: how much they differ. Random pictures "
    "differ most, so read it together with FID.",
)
METRICS = (WORD_AUC, CNR, TOP1, IOU, EOS_AUC, PADDING_AUC, FID, FINDING_AUC, DIVERSITY)
# Those in which one arm can be better than another.
COMPARED = (WORD_AUC, CNR, TOP1, IOU, FID, FINDING_AUC)
REFERENCES = ("base", "frozen", "learnable")


class Estimate(NamedTuple):
    """A value and its 95 % bootstrap interval, either of which may be unknown."""

    value: float | None
    low: float | None
    high: float | None


def lookup(entry: Any, *path: str) -> Any:
    """Value at `path`, or None where any part of the way is missing or null."""
    for key in path:
        if not isinstance(entry, Mapping):
            return None
        entry = entry.get(key)
    return entry


def estimate(entry: Mapping[str, Any], metric: Metric) -> Estimate:
    """`metric` of one arm's entry in metrics.json."""
    interval = lookup(entry, *metric.path[:-1], f"{metric.path[-1]}_ci") or (None, None)
    return Estimate(lookup(entry, *metric.path), *interval)


def ordered_arms(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Entries of all arms, the base first, else in the order of metrics.json."""
    arms = metrics["arms"]
    return {name: arms[name] for name in sorted(arms, key=lambda name: name != "base")}


# -------------------------------------------------------------------------------------------------------------- format


def _decimals(value: float, unit: bool) -> int:
    if unit:
        return 3
    size = abs(value)
    return 0 if size >= 1000 else 1 if size >= 10 else 2


def format_number(value: float, decimals: int) -> str:
    """Fixed decimals without a zero before the point: `.842`, `-.23`, `12.3`."""
    text = f"{value:.{decimals}f}"
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    return sign + (digits[1:] if digits.startswith("0.") else digits)


def format_estimate(estimated: Estimate, unit: bool) -> tuple[str, str]:
    """(value, interval) such as (`.842`, `[.830, .853]`); a dash and an empty string where unknown."""
    if estimated.value is None:
        return UNKNOWN, ""
    decimals = _decimals(estimated.value, unit)
    value = format_number(estimated.value, decimals)
    if estimated.low is None or estimated.high is None:
        return value, ""
    return value, f"[{format_number(estimated.low, decimals)}, {format_number(estimated.high, decimals)}]"


def format_seconds(seconds: float | None) -> str:
    """`8.2s`, `4m12s`, `1h03m`; a dash where unknown."""
    if seconds is None:
        return UNKNOWN
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def format_count(count: int | None) -> str:
    """`1,234`; a dash where unknown."""
    return UNKNOWN if count is None else f"{count:,}"


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


# -------------------------------------------------------------------------------------------------------------- tables


def _rows(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    rows = ordered_arms(metrics)
    return {**rows, "real": metrics["real"]} if metrics.get("real") else rows


def _best(metrics: Mapping[str, Any], metric: Metric) -> float | None:
    values = [estimate(entry, metric).value for name, entry in metrics["arms"].items() if name != "base"]
    known = [value for value in values if value is not None]
    if len(known) < 2 or metric not in COMPARED:
        return None
    return max(known, key=lambda value: metric.direction * value)


def headline_table(metrics: Mapping[str, Any]) -> Table:
    """One row for the base, each arm and the real images; the best value of the trained arms is strong."""
    best = {metric: _best(metrics, metric) for metric in METRICS}
    rows: list[list[str | Cell]] = []
    for name, entry in _rows(metrics).items():
        row: list[str | Cell] = [name]
        for metric in METRICS:
            estimated = estimate(entry, metric)
            value, interval = format_estimate(estimated, metric.unit)
            strong = name not in ("base", "real") and value != UNKNOWN and estimated.value == best[metric]
            row.append(Cell(value, interval, strong=strong))
        row.append(format_count(lookup(entry, "cost", "steps")))
        row.append(format_seconds(lookup(entry, "cost", "train_seconds")))
        rows.append(row)
    return Table(["arm", *(metric.label for metric in METRICS), "steps", "train time"], rows, "numbers")


def _terminal_estimate(estimated: Estimate, unit: bool) -> str:
    if estimated.value is None:
        return "-"
    decimals = _decimals(estimated.value, unit)
    value = format_number(estimated.value, decimals)
    if estimated.low is None or estimated.high is None:
        return value
    # The longer side, so that value ± half holds the whole interval however lopsided it is.
    half = max(estimated.high - estimated.value, estimated.value - estimated.low, 0.0)
    return f"{value} ±{format_number(half, decimals)}"


def terminal_table(metrics: Mapping[str, Any]) -> RichTable:
    """The headline table for a terminal; `-` where a value is unknown.

    A row takes one line in about 118 columns; in fewer, down to 80, the interval goes under its value.
    """
    table = RichTable(
        box=box.SIMPLE_HEAD,
        padding=0,
        caption="± is the longer side of the 95 % bootstrap interval; ↑ higher is better, ↓ lower is better",
        caption_justify="left",
    )
    table.add_column("arm", no_wrap=True, max_width=20)
    for metric in METRICS:
        head = f"{metric.short} {metric.arrow}".strip().replace("\n ", "\n")
        table.add_column(head, justify="right", overflow="fold")
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("train\ntime", justify="right", no_wrap=True)
    for name, entry in _rows(metrics).items():
        cells = [_terminal_estimate(estimate(entry, metric), metric.unit) for metric in METRICS]
        cells += [
            format_count(lookup(entry, "cost", "steps")),
            format_seconds(lookup(entry, "cost", "train_seconds")),
        ]
        # Text, not str: rich would read [brackets] in a name as markup.
        table.add_row(RichText(name), *("-" if cell == UNKNOWN else cell for cell in cells))
    return table


def finding_table(metrics: Mapping[str, Any]) -> Table | None:
    """Word AUC of every finding (rows) in every arm (columns); None where no arm has any."""
    per_arm = {
        name: lookup(entry, "localization", "word", "per_finding") or {}
        for name, entry in ordered_arms(metrics).items()
    }
    findings = list(dict.fromkeys(finding for per_finding in per_arm.values() for finding in per_finding))
    if not findings:
        return None
    rows: list[list[str | Cell]] = []
    for finding in findings:
        pairs = [lookup(per_finding, finding, "pairs") for per_finding in per_arm.values()]
        most = max((count for count in pairs if count is not None), default=None)
        row: list[str | Cell] = [finding, format_count(most)]
        for per_finding in per_arm.values():
            auc = lookup(per_finding, finding, "auc")
            # Tint from chance (.5, none) to perfect (1, half of the accent colour).
            row.append(UNKNOWN if auc is None else Cell(format_number(auc, 3), shade=max(0.0, auc - 0.5)))
        rows.append(row)
    return Table(["finding", "pairs", *per_arm], rows, "numbers")


def cost_table(metrics: Mapping[str, Any]) -> Table:
    """Time and memory of each arm's training and evaluation, and where it is known how large the model is."""
    rows = []
    arms = ordered_arms(metrics)
    sized = any("size" in entry for entry in arms.values())
    for name, entry in arms.items():
        unet, text, gflops = (
            lookup(entry, "size", key) for key in ("denoiser_parameters", "text_encoder_parameters", "denoiser_gflops")
        )
        seconds, steps = lookup(entry, "cost", "train_seconds"), lookup(entry, "cost", "steps")
        memory = lookup(entry, "cost", "peak_memory_gb")
        rows.append(
            [
                name,
                format_count(lookup(entry, "cost", "trainable_parameters")),
                format_count(steps),
                format_seconds(seconds),
                f"{1000 * seconds / steps:,.0f} ms" if seconds is not None and steps else UNKNOWN,
                format_seconds(lookup(entry, "cost", "evaluation_seconds")),
                UNKNOWN if memory is None else f"{memory:.2f} GB",
            ]
        )
        if sized:
            rows[-1] += [format_count(unet), format_count(text), UNKNOWN if gflops is None else f"{gflops:,.2f}"]
            stored = lookup(entry, "size", "megabytes")
            rows[-1] += [
                format_count(lookup(entry, "size", "denoiser_passes_an_image")),
                UNKNOWN if stored is None else f"{stored:,.1f} MB",
            ]
    head = ["arm", "trained parameters", "steps", "training", "a step", "evaluation", "peak memory"]
    head += (
        ["U-Net parameters", "text encoder parameters", "GFLOP a pass of the U-Net", "passes an image", "stored"]
        if sized
        else []
    )
    return Table(head, rows, "numbers")


def stage_table(metrics: Mapping[str, Any]) -> Table | None:
    """Time of every stage in provenance.seconds, and the peak memory of all; None where they are not recorded."""
    stages = lookup(metrics, "provenance", "seconds")
    if not isinstance(stages, Mapping) or not stages:
        return None
    rows = [[name, format_seconds(seconds)] for name, seconds in stages.items()]
    memory = lookup(metrics, "provenance", "peak_memory_gb")
    if memory is not None:
        rows.append(["peak memory of all stages", f"{memory:.2f} GB"])
    return Table(["stage", "time"], rows, "numbers")


def meaning_table(metrics: Mapping[str, Any]) -> Table:
    """One line a metric, with the direction that is better."""
    directions = {1: "↑ higher is better", -1: "↓ lower is better", 0: "neither"}
    threshold = next(
        (text for key, text in flatten(metrics["provenance"]) if key.split(".")[-1] == "iou_threshold"), None
    )
    rows = []
    for metric in METRICS:
        meaning = metric.meaning
        if metric is IOU and threshold is not None:
            meaning += f" Threshold here: {threshold} of the map's range."
        rows.append([metric.name, directions[metric.direction], meaning])
    rows += [
        [
            "attention mass",
            "neither",
            "Part of all cross-attention that goes to the begin-of-text token (BOS), the caption's words, the "
            "end-of-text token (EOS) and the padding after it; the four add up to 1.",
        ],
        [
            "[low, high]",
            "narrower is surer",
            "95 % bootstrap interval over held-out images (localization) or generated images (quality). It covers the "
            "choice of images, not the choice of training seed.",
        ],
        ["steps, train time", "", "Optimizer steps, and the seconds they took, without evaluation."],
    ]
    return Table(["number", "better", "what it is"], rows)


# --------------------------------------------------------------------------------------------------------- comparisons


def compare(entry: Mapping[str, Any], other: Mapping[str, Any], metric: Metric) -> Comparison | None:
    """Whether `entry` is better than `other`, by intervals: None where one of the intervals is unknown."""
    ours, theirs = estimate(entry, metric), estimate(other, metric)
    if ours.low is None or ours.high is None or theirs.low is None or theirs.high is None:
        return None
    if ours.low <= theirs.high and theirs.low <= ours.high:
        return "overlap"
    return "better" if (ours.low > theirs.high) == (metric.direction >= 0) else "worse"


def comparison_table(metrics: Mapping[str, Any]) -> Table | None:
    """Every arm against base, frozen and learnable, metric by metric; None where there is no pair."""
    arms = ordered_arms(metrics)
    rows: list[list[str | Cell]] = []
    for position, reference in enumerate(REFERENCES):
        if reference not in arms:
            continue
        for name, entry in arms.items():
            if name in REFERENCES[: position + 1]:
                continue
            row: list[str | Cell] = [f"{name} against {reference}"]
            for metric in COMPARED:
                row.append(
                    {
                        "better": Cell("▲ better", tone="good"),
                        "worse": Cell("▼ worse", tone="bad"),
                        "overlap": Cell("≈ overlap", tone="even"),
                        None: Cell(UNKNOWN),
                    }[compare(entry, arms[reference], metric)]
                )
            rows.append(row)
    return Table(["", *(metric.label for metric in COMPARED)], rows, "numbers") if rows else None


PAIRED = {
    "word.auc": ("word AUC", 1),
    "word.cnr": ("CNR", 1),
    "word.top1": ("Top-1", 1),
    "eos.auc": ("EOS AUC", 0),
    "padding.auc": ("pad AUC", 0),
    "quality.fid": ("FID, relative", -1),
    "quality.finding_auc": ("finding AUC", 1),
}
"""Keys of `paired` that the table shows -> name, and which sign is better (0: neither)."""


def paired_table(metrics: Mapping[str, Any]) -> Table | None:
    """Differences between arms on the same images and seeds, with their interval; None without several seeds."""
    rows: list[list[str | Cell]] = []
    for name, found in (metrics.get("paired") or {}).items():
        row: list[str | Cell] = [name]
        for key, (_, direction) in PAIRED.items():
            entry = found.get(key)
            if entry is None:
                row.append(Cell(UNKNOWN))
                continue
            percent = key == "quality.fid"
            shown = [
                _signed(100 * v, 1) + " %" if percent else _signed(v, 3) for v in (entry["value"], *(entry["ci"] or ()))
            ]
            text = f"{shown[0]} [{shown[1]}, {shown[2]}]" if entry["ci"] else shown[0]
            apart = entry["ci"] is not None and not entry["ci"][0] <= 0 <= entry["ci"][1]
            tone: Tone = "even"
            if apart and direction:
                tone = "good" if entry["value"] * direction > 0 else "bad"
            row.append(Cell(text, tone=tone))
        rows.append(row)
    return Table(["", *(name for name, _ in PAIRED.values())], rows, "numbers") if rows else None


def _signed(value: float, decimals: int) -> str:
    return ("+" if value >= 0 else "") + format_number(value, decimals)

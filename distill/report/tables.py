"""Metrics, formats, and the tables of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from rich import box
from rich.table import Table as RichTable
from rich.text import Text as RichText

from distill.evaluation.results import FEWEST_IMAGES, Difference, Estimate, Results, parse_metrics
from distill.report.document import UNKNOWN, Cell, Table


@dataclass(frozen=True)
class Metric:
    """key: see `Arm.estimate`. direction: +1 higher is better, -1 lower is better, 0 neither. unit: of order 1."""

    key: str
    name: str
    direction: int
    meaning: str
    unit: bool = True

    @property
    def label(self) -> str:
        return f"{self.name} {'↓ ↑'[self.direction + 1]}".strip()


_WORD = "The chance that a finding's word map is higher inside the finding's region than outside. .5 is chance, 1 is perfect."
_ADDS = "Word AUC of an image's own map minus that of other images' maps. 0 means that the map ignores the image."
_WITHIN = "Word AUC among pixels where training images have the finding equally often. A blind map has .5."
_ENCODER = "Where the prediction changes if the finding's words are padding in the text. The AUC of that map."
_DENOISER = "The same with padding only after the text encoder, so that other tokens keep what they took over."
_FID = "Distance between features of generated and real images. Compare only values of one table."
_FINDING = "A classifier of real images looks for the caption's findings in each generated image."
WORD_AUC = Metric("word.auc", "word AUC", 1, _WORD)
IMAGE_ADDS = Metric("word.image_adds", "image adds", 1, _ADDS)
WITHIN_PRIOR = Metric("word.within_prior", "AUC within prior", 1, _WITHIN)
CAUSAL = (Metric("causal_encoder.auc", "causal AUC, encoder", 1, _ENCODER),
          Metric("causal_encoder.image_adds", "image adds, encoder", 1, "Image adds of that map."),
          Metric("causal_denoiser.auc", "causal AUC, denoiser", 1, _DENOISER),
          Metric("causal_denoiser.image_adds", "image adds, denoiser", 1, "Image adds of that map."))  # fmt: skip
OTHER = Metric("word.other_image_auc", "other image's AUC", 0, "Word AUC of other images' maps of the same finding.")
CNR = Metric("word.cnr", "CNR", 1, "Contrast of the map inside and outside, in standard deviations.", unit=False)
TOP1 = Metric("word.top1", "Top-1", 1, "How often the highest pixel of the map lies inside the region.")
IOU = Metric("word.iou", "IoU", 1, "Overlap of the region and the map above a fixed threshold.")
EOS_AUC = Metric("eos.auc", "EOS AUC", 0, "The same AUC for the map of the end-of-text token.")
PADDING_AUC = Metric("padding.auc", "padding AUC", 0, "The same AUC for the map of the padding tokens.")
FID = Metric("quality.fid", "FID", -1, _FID, unit=False)
KID = Metric("quality.kid", "KID", -1, "As FID, but without its bias at few images. 0 is ideal; it can be negative.")
PRECISION = Metric("quality.precision", "precision", 1, "Share of generated images that lie among real ones.")
RECALL = Metric("quality.recall", "recall", 1, "Share of real images that lie among generated ones.")
DENSITY = Metric("quality.density", "density", 1, "How many real images lie around generated ones. 1 is ideal.")
COVERAGE = Metric("quality.coverage", "coverage", 1, "Share of real images that have a generated one near them.")
FINDING_AUC = Metric("quality.finding_auc", "finding AUC", 1, _FINDING)
NEGATED = Metric("quality.finding_auc_negated", "finding AUC, negated", 1, "The same against captions that negate it.")
UNNAMED = Metric("quality.finding_auc_unmentioned", "finding AUC, unnamed", 1, "The same against captions without it.")
UTILITY = Metric("utility.generated", "utility", 1, "AUC on real images of a classifier trained on generated ones.")
FURTHER = (Metric("utility.generated_minus_real", "utility, over real", 1, "Utility minus that of real images."),
           Metric("utility.both_minus_real", "utility, both over real", 1, "The same of real and generated images."),
           Metric("similarity.own", "image-text similarity", 1, "100 cos of an image and its caption.", unit=False),
           Metric("similarity.adds", "caption adds", 1, "The same, minus that of other captions.", unit=False),
           Metric("explanation.auc", "detector AUC", -1, "How well a detector tells generated from real images."))  # fmt: skip
MASS = tuple(Metric(f"mass.{part}", f"attention to {part}", 0, "Its part of all cross-attention.")
             for part in ("bos", "words", "eos", "padding"))  # fmt: skip
DIVERSITY = Metric("quality.diversity", "diversity", 0, "How much images of one caption differ, 1 - MS-SSIM.")
EACH_FINDING = (WORD_AUC, KID, DENSITY, COVERAGE, FINDING_AUC)
OF_FINDINGS = f"Few images give a wide margin. Quality needs {FEWEST_IMAGES} generated and real images of a finding."
COST = "Images through a denoiser, forward 1 and backward 2, teachers and their training included, over the baseline's."
MAIN = (WORD_AUC, IMAGE_ADDS, OTHER, CNR, TOP1, IOU, EOS_AUC, PADDING_AUC, FID, KID, FINDING_AUC, UTILITY, DIVERSITY)
DETAILS = (WITHIN_PRIOR, *CAUSAL, PRECISION, RECALL, DENSITY, COVERAGE, NEGATED, UNNAMED, *FURTHER, *MASS)
"""Shown in tables of their own."""
METRICS = (*MAIN, *DETAILS)


def format_number(value: float, decimals: int) -> str:
    """Fixed decimals without a zero before the point: `.842`, `-.23`, `12.3`."""
    return f"{value:.{decimals}f}".replace("0.", ".", 1) if abs(value) < 1 and decimals else f"{value:.{decimals}f}"


def format_estimate(estimate: Estimate, metric: Metric) -> tuple[str, str]:
    """(value, interval) such as (`.842`, `[.830, .853]`); a dash and an empty string where unknown."""
    if estimate.value is None:
        return UNKNOWN, ""
    decimals = 3 if metric.unit else 1 if abs(estimate.value) >= 10 else 2
    ends = [format_number(end, decimals) for end in (estimate.low, estimate.high) if end is not None]
    return format_number(estimate.value, decimals), f"[{', '.join(ends)}]" if ends else ""


def format_difference(difference: Difference, metric: Metric) -> str:
    """`+.013 [+.001, +.020]`; of FID, which is relative, `-7.3 [-17.3, +5.0] %`."""
    values = (difference.value, *(difference.ci or ()))
    shown = [format_number(100 * value, 1) if metric is FID else format_number(value, 3) for value in values]
    first, *ends = [text if text.startswith("-") else f"+{text}" for text in shown]
    return first + (f" [{', '.join(ends)}]" if ends else "") + (" %" if metric is FID else "")


def format_seconds(seconds: float | None) -> str:
    """`0:04:12`; a dash where unknown."""
    return UNKNOWN if seconds is None else str(timedelta(seconds=round(seconds)))


def format_count(count: float | None, decimals: int = 0) -> str:
    """`1,234`; a dash where unknown."""
    return UNKNOWN if count is None else f"{count:,.{decimals}f}"


def flatten(value: object, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf of nested objects; a list is one leaf."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, (list, tuple, Mapping)):
        yield prefix, ", ".join(map(str, value)) or "(none)"
    else:
        yield prefix, UNKNOWN if value is None else str(value)


def results_table(results: Results, wanted: Sequence[Metric] = MAIN) -> Table:
    """One row an arm, real images and blind maps: the `wanted` metrics that are measured, and the cost where known."""
    shown = [m for m in wanted if any(arm.estimate(m.key).value is not None for arm in results.arms.values())]
    each = {name: {m: arm.estimate(m.key) for m in shown} for name, arm in results.with_real.items()}
    if WORD_AUC in shown or WITHIN_PRIOR in shown:
        priors = next(arm.localization.priors for arm in results.arms.values() if arm.localization) or {}
        blind = {name: {WORD_AUC: p.auc, WITHIN_PRIOR: p.within_prior} for name, p in priors.items() if p}
        each |= {f"blind map: {name.replace('_', ' ')}": of for name, of in blind.items()}
    rows: list[list[str | Cell]] = []
    for name, found in each.items():
        rows.append([name, *(Cell(*format_estimate(found.get(m, Estimate()), m)) for m in shown)])
    head, costs = ["model", *(m.label for m in shown)], relative_costs(results)
    if costs and wanted is not DETAILS:
        head.append("cost")
        rows = [[*row, costs.get(str(row[0]), UNKNOWN)] for row in rows]
    return Table(head, rows if len(head) > 1 else [], "numbers", "results of all models")


def relative_costs(results: Results) -> dict[str, str]:
    """Arm -> its image-passes, teachers included, over those of the first baseline, where known, such as `1.33`."""
    passes = {name: arm.cost.image_passes_with_teachers for name, arm in results.arms.items()}
    unit = passes[results.compare_to[0]]
    return {name: f"{value / unit:.2f}" for name, value in passes.items() if value} if unit else {}


def terminal_table(metrics: Mapping[str, object]) -> RichTable:
    """The main metrics, for a terminal of 80 columns, each over its interval; `-` where a value is unknown."""
    found = results_table(parse_metrics(metrics), (WORD_AUC, IMAGE_ADDS, FID, FINDING_AUC))
    caption = "95 % intervals under the values; ↑ higher is better, ↓ lower is better"
    table = RichTable(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption=caption, caption_justify="left")
    for place, name in enumerate(found.head):
        # Where 80 columns are too few, names are folded, and numbers stay whole.
        table.add_column(name, justify="right" if place else "left", no_wrap=bool(place), overflow="fold")
    for row in found.rows:
        cells = [f"{cell.text}\n{cell.note}".strip() if isinstance(cell, Cell) else cell for cell in row]
        # Text, not str: rich would read [brackets] in a name as markup.
        table.add_row(*(RichText("-" if cell == UNKNOWN else cell) for cell in cells))
    return table


def finding_table(results: Results, metric: Metric = WORD_AUC) -> Table:
    """Every finding (rows) in every arm and in real images (columns) that have any."""
    found = {name: own for name, arm in results.with_real.items() if (own := arm.each_finding(metric.key))}
    rows: list[list[str]] = []
    for finding in dict.fromkeys(name for own in found.values() for name in own):
        each = [own.get(finding, (0, Estimate())) for own in found.values()]
        cells = (" ".join(format_estimate(estimate, metric)).strip() for _, estimate in each)
        rows.append([finding, format_count(max(count for count, _ in each)), *cells])
    what = "pairs" if metric is WORD_AUC else "images"
    return Table([metric.label, what, *found], rows, "numbers", f"{metric.name} of each finding")


def cost_table(results: Results) -> Table:
    """Training, time, memory and size of each arm; columns that no arm has are left out."""
    each = [vars(arm.cost) | (vars(arm.size) if arm.size else {}) for arm in results.arms.values()]
    columns = {"model": list(results.arms)}
    for key in dict.fromkeys(key for one in each for key in one):
        values = [one.get(key) for one in each]
        if any(isinstance(value, (int, float)) for value in values):
            shown = format_seconds if key.endswith("seconds") else lambda v: format_count(v, 2 * isinstance(v, float))
            columns[key.replace("_", " ")] = [*map(shown, values)]
    return Table(list(columns), list(zip(*columns.values(), strict=True)), "numbers", "cost and size")

"""Charts (matplotlib, as PNG and as SVG in the page's text colour), and images and maps for the page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image
from scipy.ndimage import uniform_filter1d

from distill.evaluation.results import Estimate, Results
from distill.evaluation.word_maps import WordMaps
from distill.report.document import Picture
from distill.report.tables import FID, FINDING_AUC, WORD_AUC, Metric

# Dark text and lines; in the SVG this very colour is replaced by `currentColor`, so that charts follow a dark page.
_INK = "#24303f"
# Middle tones, after Okabe and Ito: told apart by colour-blind readers, on white and on black.
COLOURS = ("#8a8f98", "#3f86d9", "#e0862b", "#2fa36b", "#b069c4", "#d1495b", "#2aa5b0", "#b59a1d", "#7a6ff0")
_MARKERS = "osD^vPX<>"
Curves = dict[str, dict[str, list[tuple[int, float]]]]  # {arm: {term: [(step, value)]}}
_STYLE: Any = {
    "font.family": "sans-serif", "font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True, "axes.edgecolor": _INK,
    "axes.labelcolor": _INK, "text.color": _INK, "xtick.color": _INK, "ytick.color": _INK, "grid.color": _INK,
    "grid.alpha": 0.12, "legend.frameon": False, "svg.fonttype": "none", "svg.hashsalt": "distill",
    "text.parse_math": False,  # a `$` in a name is a dollar sign
}  # fmt: skip


def chart(name: str, alt: str, width: float, height: float, draw: Callable[[Figure], None]) -> Picture:
    """Draw on a figure of width x height inches and keep it as PNG (on white) and SVG (transparent)."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150, facecolor="white")
        figure.set_layout_engine("none")  # the places stay, and are not computed again
        figure.savefig(svg, format="svg", transparent=True, metadata=dict.fromkeys("Date Creator Format Type".split()))
    text = re.sub(r"^.*?(?=<svg)", "", svg.getvalue(), flags=re.DOTALL)
    # Identifiers are shared by the whole page, so they carry the chart's name.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Picture(name, alt, text.replace(_INK, "currentColor"), png.getvalue())


def _panel(name: str, alt: str, draw: Callable[[Axes], None]) -> Picture:
    """One set of axes with its legend below, narrow enough for a phone."""

    def whole(figure: Figure) -> None:
        draw(figure.subplots())
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, handletextpad=0.4, columnspacing=1.2)

    return chart(name, alt, 4.9, 3.9, whole)


def _colour(arms: Sequence[str], arm: str) -> str:
    return COLOURS[list(arms).index(arm) % len(COLOURS)]


def tradeoff_charts(results: Results, chosen: str | None) -> list[Picture]:
    """Quality against localization, one chart for FID and one for the finding AUC. A ring marks the chosen arm."""
    charts = []
    for metric in (FID, FINDING_AUC):
        ends = {a: [arm.estimate(m.key) for m in (WORD_AUC, metric)] for a, arm in results.arms.items()}
        points = {a: pair for a, pair in ends.items() if pair[0].value is not None and pair[1].value is not None}

        def draw(axes: Axes, points: Any = points, metric: Any = metric) -> None:
            for place, (arm, pair) in enumerate(points.items()):
                with_bars(axes, [pair], marker(place) | {"color": _colour(list(results.arms), arm), "label": arm})
                if arm == chosen:
                    axes.plot(*(e.value for e in pair), "o", ms=17, mfc="none", mec=_INK, mew=1.6)
            axes.set_xlabel("word AUC (localization, right is better)")
            quality_axis(axes, metric, [pair[1].value for pair in points.values()])

        alt = f"{metric.name} against word AUC of {', '.join(points)}; the values and intervals are in the table"
        charts += [_panel(f"tradeoff_{metric.key.split('.')[1]}", alt, draw)] if points else []
    return charts


def marker(place: int) -> dict[str, object]:
    return {"marker": _MARKERS[place % len(_MARKERS)], "ms": 8}


def with_bars(axes: Axes, points: Sequence[Sequence[Estimate]], style: Mapping[str, object]) -> None:
    """Points (x, y) in one line, with the intervals of those that have one."""
    axes.plot(*([pair[axis].value for pair in points] for axis in (0, 1)), **style)  # type: ignore[arg-type]
    for pair in points:
        bars = [[[max(0, e.value - e.low)], [max(0, e.high - e.value)]] if e.low is not None else None for e in pair]  # type: ignore[operator]
        x, y = (e.value for e in pair)
        axes.errorbar(x, y, xerr=bars[0], yerr=bars[1], fmt="none", ecolor=style["color"])  # type: ignore[arg-type]


def quality_axis(axes: Axes, metric: Metric, values: Sequence[float | None]) -> None:
    """Better is up."""
    axes.margins(0.12)
    axes.set_ylabel(f"{metric.name} ({'axis turned, ' if metric.direction < 0 else ''}up is better)")
    _log_if_wide(axes, [value for value in values if value is not None] if metric is FID else [])
    if metric.direction < 0:
        axes.invert_yaxis()


def _log_if_wide(axes: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) > 5 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def curve_charts(logs: Curves, arms: Sequence[str], stem: str) -> list[Picture]:
    """One chart a term, one line an arm with its running mean."""
    charts = []
    for number, term in enumerate(dict.fromkeys(term for log in logs.values() for term in log)):
        found = {arm: np.array(log[term], dtype=float).T for arm, log in logs.items() if term in log}

        def draw(axes: Axes, term: str = term, found: Mapping[str, np.ndarray] = found) -> None:
            for arm, (steps, values) in found.items():
                width = max(1, len(values) // 20)
                smooth = uniform_filter1d(values, width, mode="nearest", origin=(width - 1) // 2)
                axes.plot(steps, values, color=_colour(arms, arm), alpha=0.25)
                axes.plot(steps, smooth, ".-", markevery=[-1], color=_colour(arms, arm), label=arm)
            _log_if_wide(axes, [value for _, values in found.values() for value in values])
            axes.set_title(term, loc="left")
            axes.set_xlabel("step")

        charts.append(_panel(f"{stem}_{number}", f"{term} over the training steps", draw))
    return charts


def read_image(run_dir: Path, name: str, notes: list[str]) -> Image.Image | None:
    """An image of the run folder; None, and a note, where it cannot be read."""
    path = (run_dir / name).resolve()
    try:
        if not path.is_relative_to(run_dir.resolve()):
            raise ValueError("outside the run folder")
        with Image.open(path) as image:
            returned: Image.Image | None = image.convert("RGB")
            return returned
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        notes.append(f"{name} cannot be read as an image: {type(error).__name__}.")
        return None


def data_uri(image: Image.Image, side: int = 256) -> str:
    """`image` as a data URI, its longer side at most `side`."""
    small, content = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(content, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def sprite(maps: WordMaps, words: Sequence[str]) -> tuple[int, str]:
    """Height of a map, and the maps of `words` below each other as a data URI. Each has its edge rows repeated."""
    padded, content = [np.pad(maps.maps[word], ((1, 1), (0, 0)), mode="edge") for word in words], io.BytesIO()
    image = Image.fromarray(np.concatenate(padded), mode="P")
    image.putpalette((colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8).tobytes())
    # Low attention darkens what is under it, and high attention glows.
    image.save(content, "PNG", optimize=True, transparency=bytes(64 + value // 2 for value in range(256)))
    return len(padded[0]) - 2, "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")

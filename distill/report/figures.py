"""Charts (matplotlib, as PNG and as SVG in the page's text colour) and pictures of maps."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image, ImageDraw

from distill.report.document import Picture
from distill.report.results import Results
from distill.report.tables import FID, FINDING_AUC, WORD_AUC

# Dark text and lines; in the SVG this very colour is replaced by `currentColor`, so that charts follow a dark page.
_INK = "#24303f"
# Middle tones, after Okabe and Ito: told apart by colour-blind readers, on white and on black.
_COLOURS = ("#8a8f98", "#3f86d9", "#e0862b", "#2fa36b", "#b069c4", "#d1495b", "#2aa5b0", "#b59a1d", "#7a6ff0")
_MARKERS = "osD^vPX<>"
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
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
    text = re.sub(r"^.*?(?=<svg)", "", svg.getvalue(), flags=re.DOTALL)
    # Identifiers are shared by the whole page, so they carry the chart's name.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Picture(name, alt, png.getvalue(), text.replace(_INK, "currentColor"))


def _panel(name: str, alt: str, draw: Callable[[Axes], None], arms: int) -> Picture:
    """One set of axes with its legend below, narrow enough for a phone."""

    def whole(figure: Figure) -> None:
        axes = figure.subplots()
        draw(axes)
        figure.legend(loc="outside lower center", ncols=3, fontsize=9, handletextpad=0.4, columnspacing=1.2)

    return chart(name, alt, 4.9, 3.4 + 0.2 * ((arms + 2) // 3), whole)


def _style(arms: Sequence[str], arm: str) -> dict[str, Any]:
    place = list(arms).index(arm)
    return {"color": _COLOURS[place % len(_COLOURS)], "label": arm}


def tradeoff_charts(results: Results, chosen: str | None) -> list[Picture]:
    """Quality against localization, one chart for FID and one for the finding AUC. A ring marks the chosen arm."""
    charts = []
    for metric in (FID, FINDING_AUC):
        found = {a: (arm.estimate(WORD_AUC.key), arm.estimate(metric.key)) for a, arm in results.arms.items()}
        points = {a: (x, y) for a, (x, y) in found.items() if x.value is not None and y.value is not None}

        def draw(axes: Axes, points: Any = points, metric: Any = metric) -> None:
            for place, (arm, ends) in enumerate(points.items()):
                bars = [
                    [
                        [0 if e.low is None else max(0, e.value - e.low)],
                        [0 if e.high is None else max(0, e.high - e.value)],
                    ]
                    for e in ends
                ]
                style = _style(list(results.arms), arm) | {"fmt": _MARKERS[place % len(_MARKERS)], "ms": 8}
                axes.errorbar(ends[0].value, ends[1].value, xerr=bars[0], yerr=bars[1], elinewidth=1.6, **style)
                if arm == chosen:
                    ring = {"ms": 17, "mfc": "none", "mec": _INK, "mew": 1.6}
                    axes.plot(ends[0].value, ends[1].value, "o", **ring)
            values = [y.value for _, y in points.values()]
            if metric is FID and min(values) > 0 and max(values) > 4 * min(values):
                _log(axes)
            if metric.direction < 0:
                axes.invert_yaxis()
            axes.margins(0.12)
            axes.set_xlabel("word AUC (localization, right is better)")
            axes.set_ylabel(f"{metric.name} ({'axis turned, ' if metric.direction < 0 else ''}up is better)")

        if points:
            alt = f"{metric.name} against word AUC of {', '.join(points)}, with 95 % intervals; the values are in the table"
            charts.append(_panel(f"tradeoff_{metric.key.split('.')[1]}", alt, draw, len(points)))
    return charts


def _log(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


Curves = Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]


def curve_charts(logs: Curves, arms: Sequence[str], stem: str, smooth: bool = False) -> list[Picture]:
    """One chart a term, one line an arm, from {arm: {term: [(step, value)]}}. smooth: the values' running mean on top."""
    charts = []
    for number, term in enumerate(dict.fromkeys(term for log in logs.values() for term in log)):

        def draw(axes: Axes, term: str = term) -> None:
            low, high = np.inf, 0.0
            for arm, log in logs.items():
                steps, values = np.array(log.get(term) or np.empty((0, 2)), dtype=float).T
                if len(steps):
                    low, high = min(low, values.min()), max(high, values.max())
                    style = _style(arms, arm) | {"marker": "o" if len(steps) == 1 else None}
                    axes.plot(steps, values, **(style | {"label": None, "alpha": 0.25} if smooth else style))
                    if smooth:
                        width = np.minimum(np.arange(len(values)) + 1, max(1, len(values) // 20))
                        sums = np.concatenate([[0.0], np.cumsum(values)])
                        last = np.arange(1, len(values) + 1)
                        axes.plot(steps, (sums[last] - sums[last - width]) / width, **style)
            if 0 < low and high > 15 * low:
                _log(axes)
            axes.set_title(term, loc="left")
            axes.set_xlabel("step")

        charts.append(_panel(f"{stem}_{number}", f"{term} over the training steps", draw, len(logs)))
    return charts


def data_uri(image: Image.Image, side: int = 256) -> str:
    """`image` as a data URI, its longer side at most `side`."""
    small, content = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.save(content, format="JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def _heat(attention: np.ndarray) -> Image.Image:
    """(height, width) in 0 to 255 -> palette image. Low attention darkens what is under it, and high attention glows."""
    image = Image.fromarray(np.ascontiguousarray(attention, dtype=np.uint8), mode="P")
    image.putpalette((colormaps["inferno"](np.arange(256))[:, :3] * 255).astype(np.uint8).tobytes())
    image.info["transparency"] = bytes(64 + value // 2 for value in range(256))
    return image


def sprite(maps: Sequence[np.ndarray]) -> str:
    """Maps of one size below each other, each with its first and last row repeated, as the data URI of one PNG."""
    content = io.BytesIO()
    _heat(np.concatenate([np.pad(m, ((1, 1), (0, 0)), mode="edge") for m in maps])).save(content, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def example_grid(
    name: str, alt: str, columns: Mapping[str, Sequence[tuple[Image.Image, np.ndarray | None]]]
) -> Picture:
    """A column a title; its pictures below each other, each under its map where one is given."""
    side, content = 160, io.BytesIO()
    grid = Image.new("RGB", (side * len(columns), 20 + side * max(map(len, columns.values()))), "white")
    for place, (title, column) in enumerate(columns.items()):
        ImageDraw.Draw(grid).text((side * place + 4, 3), title, fill=_INK, font_size=13)
        for row, (image, attention) in enumerate(column):
            shown = image.convert("RGBA").resize((side - 4, side - 4), Image.Resampling.LANCZOS)
            if attention is not None:
                heat = _heat(attention).convert("RGBA")
                shown.alpha_composite(heat.resize(shown.size, Image.Resampling.BILINEAR))
            grid.paste(shown.convert("RGB"), (side * place, 20 + side * row))
    grid.save(content, "PNG", optimize=True)
    return Picture(name, alt, content.getvalue())

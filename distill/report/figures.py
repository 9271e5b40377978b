"""Charts (matplotlib, as PNG and as SVG that takes the page's text colour) and picture tiles."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageDraw

from distill.report.document import Picture
from distill.report.tables import (
    FID,
    FINDING_AUC,
    WORD_AUC,
    Metric,
    estimate,
    format_number,
    lookup,
    ordered_arms,
)

# Dark text and lines; in the SVG this very colour is replaced by `currentColor`, so that charts follow a dark page.
_INK = "#24303f"
# Middle tones, after Okabe and Ito: told apart by colour-blind readers, on white and on black.
_ARM_COLOURS = {
    "base": "#8a8f98",
    "frozen": "#3f86d9",
    "learnable": "#e0862b",
    "distilled": "#2fa36b",
    "lora": "#b069c4",
}
_MORE_COLOURS = ("#d1495b", "#2aa5b0", "#b59a1d", "#7a6ff0")
_MASS_COLOURS = {"bos": "#8a8f98", "words": "#2fa36b", "eos": "#e0862b", "padding": "#b069c4"}
_MASS_NAMES = {"bos": "BOS", "words": "words", "eos": "EOS", "padding": "padding"}
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "legend.frameon": False,
    # A `$` in the name of an arm or a loss is a dollar sign.
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "distill",
}
TILE_PX = 256


def arm_colours(arms: Sequence[str]) -> dict[str, str]:
    """One colour an arm, the same in every chart."""
    others = [arm for arm in arms if arm not in _ARM_COLOURS]
    more = {arm: _MORE_COLOURS[index % len(_MORE_COLOURS)] for index, arm in enumerate(others)}
    return {arm: _ARM_COLOURS.get(arm) or more[arm] for arm in arms}


def _chart(name: str, alt: str, width: float, height: float, draw: Callable[[Figure], None]) -> Picture:
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


# -------------------------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class _Point:
    """x and y, each (value, low, high); the ends are the value itself where there is no interval."""

    x: tuple[float, float, float]
    y: tuple[float, float, float]


# (left, low, right, high) in pixels.
_Box = tuple[float, float, float, float]


def _spread(entry: Mapping[str, Any], metric: Metric) -> tuple[float, float, float] | None:
    value, low, high = estimate(entry, metric)
    if value is None:
        return None
    return value, value if low is None else min(low, value), value if high is None else max(high, value)


def _points(arms: Mapping[str, Mapping[str, Any]], metric: Metric) -> dict[str, _Point]:
    points = {}
    for name, entry in arms.items():
        x, y = _spread(entry, WORD_AUC), _spread(entry, metric)
        if x is not None and y is not None:
            points[name] = _Point(x, y)
    return points


def _overlap(box: _Box, other: _Box) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _label_points(axes: Axes, points: Mapping[str, _Point], colours: Mapping[str, str]) -> None:
    """Write each name beside its point, where it covers no other name and the fewest points and bars; near rather than far."""
    axes.autoscale_view()  # transData is of the limits before, until someone asks for them
    unit = axes.figure.dpi / 72
    reach, gap, height = 3 * unit, 5 * unit, 13 * unit
    pixels = {name: axes.transData.transform(np.array([point.x, point.y]).T) for name, point in points.items()}
    taken: list[_Box] = []
    names: list[_Box] = []
    for ends in pixels.values():
        (x, y), (left, low), (right, high) = ends[0], ends.min(axis=0), ends.max(axis=0)
        taken += [(left, y - reach, right, y + reach), (x - reach, low, x + reach, high)]
    for name, ends in pixels.items():
        width = 6.4 * len(name) * unit
        boxes = [
            (ends[0, 0] + dx, ends[0, 1] + dy, ends[0, 0] + dx + width, ends[0, 1] + dy + height)
            for away in range(4)
            for dy in (gap + away * height, -gap - height - away * height)
            for dx in (gap, -gap - width)
        ]

        def cost(k: int, boxes: Sequence[_Box] = boxes) -> float:
            lines = sum(_overlap(boxes[k], other) for other in taken)
            return 10 * sum(_overlap(boxes[k], other) for other in names) + lines + 0.4 * (k // 4)

        box = boxes[min(range(len(boxes)), key=cost)]
        names.append(box)
        right_of = box[0] > ends[0, 0]
        axes.annotate(
            name,
            (points[name].x[0], points[name].y[0]),
            xytext=((gap if right_of else -gap) / unit, (box[1] - ends[0, 1]) / unit),
            textcoords="offset points",
            ha="left" if right_of else "right",
            va="bottom",
            color=colours[name],
            fontweight="bold",
        )


def _draw_scatter(axes: Axes, points: Mapping[str, _Point], metric: Metric, colours: Mapping[str, str]) -> None:
    for name, point in points.items():
        (x, left, right), (y, low, high) = point.x, point.y
        xerr, yerr = [[x - left], [right - x]], [[y - low], [high - y]]
        axes.errorbar([x], [y], yerr=yerr, xerr=xerr, fmt="o", color=colours[name], ms=8, elinewidth=1.8)
    lowest = min(point.y[1] for point in points.values())
    values = [point.y[0] for point in points.values()]
    if metric is FID and lowest > 0 and max(values) > 4 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    if metric.direction < 0:
        axes.invert_yaxis()
    axes.margins(0.16)
    axes.set_xlabel("word AUC  (localization, higher is better →)")
    towards = "higher is better →" if metric.direction > 0 else "axis turned: up is better →"
    axes.set_ylabel(f"{metric.name}  ({towards})")


def tradeoff_chart(metrics: Mapping[str, Any]) -> Picture | None:
    """Quality against localization, one panel for FID and one for the finding AUC; None where no arm has both."""
    arms = ordered_arms(metrics)
    panels = {metric: points for metric in (FID, FINDING_AUC) if (points := _points(arms, metric))}
    if not panels:
        return None

    colours = arm_colours(list(arms))

    def draw(figure: Figure) -> None:
        row = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (metric, points) in zip(row, panels.items(), strict=True):
            _draw_scatter(axes, points, metric, colours)
        # Places in pixels are known only when the whole figure has its layout.
        figure.canvas.draw()
        for axes, points in zip(row, panels.values(), strict=True):
            _label_points(axes, points, colours)

    width = 10.6 if len(panels) == 2 else 6.4
    return _chart("tradeoff", "Quality against localization of each arm, with 95 % intervals", width, 4.3, draw)


def mass_chart(metrics: Mapping[str, Any]) -> Picture | None:
    """Stacked bar of attention mass per arm; None where no arm has any."""
    masses = {}
    for name, entry in ordered_arms(metrics).items():
        mass = [lookup(entry, "localization", "mass", group) for group in _MASS_NAMES]
        if all(part is not None for part in mass):
            masses[name] = mass
    if not masses:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        left = np.zeros(len(masses))
        for index, (group, label) in enumerate(_MASS_NAMES.items()):
            widths = np.array([mass[index] for mass in masses.values()])
            bars = axes.barh(list(masses), widths, left=left, height=0.66, color=_MASS_COLOURS[group], label=label)
            texts = [format_number(width, 2) if width >= 0.035 else "" for width in widths]
            axes.bar_label(bars, texts, label_type="center", color="white", fontsize=9, fontweight="bold")
            left += widths
        axes.set_xlim(0, max(1.0, float(left.max())))
        axes.set_ylim(len(masses) - 0.5, -0.5)
        axes.grid(False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("part of all cross-attention")
        figure.legend(loc="outside upper center", ncols=4)

    height = 1.25 + 0.42 * len(masses)
    return _chart("attention_mass", "Attention mass of BOS, words, EOS and padding in each arm", 9.0, height, draw)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential mean over about a twentieth of the curve, without the bias of its start."""
    weight = 1 - min(1.0, 20 / max(len(values), 1))
    total, norm, smoothed = 0.0, 0.0, []
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        smoothed.append(total / norm)
    return np.array(smoothed)


def loss_chart(logs: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> Picture | None:
    """One panel a loss term, one line an arm, from {arm: {term: [(step, value)]}}; None where there is no curve."""
    terms = list(dict.fromkeys(term for log in logs.values() for term in log))
    if not terms:
        return None
    columns = min(3, len(terms))
    rows = math.ceil(len(terms) / columns)
    colours = arm_colours(list(logs))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        lines: dict[str, Any] = {}
        for axes, term in zip(panels, terms, strict=False):
            positive: list[float] = []
            for arm, log in logs.items():
                if not log.get(term):
                    continue
                steps, values = np.array(log[term], dtype=float).T
                axes.plot(steps, values, color=colours[arm], alpha=0.22, linewidth=0.9)
                marker = "o" if len(steps) == 1 else None
                (lines[arm],) = axes.plot(steps, _smooth(values), color=colours[arm], linewidth=1.7, marker=marker)
                positive += [float(values.min()), float(values.max())]
            if min(positive) > 0 and max(positive) > 15 * min(positive):
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(term, loc="left")
            axes.set_xlabel("step")
        for axes in panels[len(terms) :]:
            axes.set_visible(False)
        figure.legend(lines.values(), lines, loc="outside upper center", ncols=min(6, len(lines)))

    return _chart("losses", "Loss terms of each arm over the training steps", 10.6, 0.5 + 2.6 * rows, draw)


def localization_chart(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Picture | None:
    """AUC of words, EOS and padding, and their attention mass, over the steps of each arm; None without a log.

    logs: arm -> rows of localization_log.jsonl.
    """
    logs = {arm: rows for arm, rows in logs.items() if rows}
    if not logs:
        return None
    colours = arm_colours(list(logs))
    groups = (("word", "words", "word"), ("eos", "eos", "EOS"), ("padding", "padding", "padding"))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, 3, sharex=True)
        for column, (token, mass, title) in enumerate(groups):
            for arm, rows in logs.items():
                steps = [row["step"] for row in rows]
                panels[0, column].plot(steps, [row[token]["auc"] for row in rows], color=colours[arm], label=arm)
                panels[1, column].plot(steps, [row["mass"][mass] for row in rows], color=colours[arm])
            panels[0, column].set_title(title)
            panels[1, column].set_xlabel("step")
        panels[0, 0].set_ylabel("AUC")
        panels[1, 0].set_ylabel("attention mass")
        panels[0, 0].legend()

    return _chart("localization", "AUC and attention mass of words, EOS and padding over training", 10.6, 5.2, draw)


def atlas_chart(
    tables: Mapping[str, np.ndarray],
    layers: Sequence[str],
    timesteps: Sequence[int],
    chosen: tuple[Sequence[int], Sequence[int]],
) -> Picture:
    """A heat map a token map: AUC of each layer (rows) at each timestep (columns), .5 in white.

    tables: name -> (layers, timesteps) in [0, 1]. chosen: rows and columns whose common cells get a frame.
    """
    count = len(layers) * len(timesteps)
    far = max(0.05, *(float(np.abs(table - 0.5).max()) for table in tables.values()))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
        for axes, (name, table) in zip(panels, tables.items(), strict=True):
            image = axes.imshow(table, cmap="RdBu_r", vmin=0.5 - far, vmax=0.5 + far, aspect="auto")
            axes.set_title(f"{name}, best {format_number(float(table.max()), 3)}", loc="left")
            axes.set_xticks(range(len(timesteps)), [str(t) for t in timesteps], rotation=60, fontsize=8)
            axes.set_yticks(range(len(layers)), layers, fontsize=8)
            axes.set_xlabel("timestep")
            axes.grid(False)
            for row, column in np.ndindex(table.shape) if count <= 400 else ():
                value = float(table[row, column])
                colour = "white" if abs(value - 0.5) > 0.7 * far else "black"
                text = format_number(value, 2)
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
            for row in chosen[0]:
                for column in chosen[1]:
                    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2)
                    axes.add_patch(frame)
        figure.colorbar(image, ax=panels, label="AUC", fraction=0.02, pad=0.01)

    width = 2.2 + len(tables) * (0.4 + 0.33 * len(timesteps))
    alt = "AUC of attention maps by layer and timestep on validation images; the chosen cells have a frame"
    return _chart("atlas", alt, width, 1.5 + 0.28 * len(layers), draw)


# --------------------------------------------------------------------------------------------------------------- tiles


def _png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="PNG", optimize=True)
    return content.getvalue()


def image_tile(name: str, alt: str, image: Image.Image) -> Picture:
    """`image`, at most TILE_PX on its longer side."""
    tile = image.convert("RGB")
    tile.thumbnail((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
    return Picture(name, alt, _png(tile))


def region_tile(
    name: str,
    alt: str,
    image: Image.Image,
    boxes: Sequence[Sequence[float]],
    attention: np.ndarray | None = None,
) -> Picture:
    """`image` with its true boxes, under the attention map as heat where one is given.

    boxes: (x, y, width, height) in pixels of `image`. attention: (height, width) in [0, 1], any size.
    The tile's longer side is TILE_PX.
    """
    scale = TILE_PX / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    tile = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    if attention is not None:
        field = Image.fromarray(np.ascontiguousarray(attention, dtype=np.float32))
        heat = np.clip(np.asarray(field.resize(size, Image.Resampling.BILINEAR)), 0.0, 1.0)[..., None]
        # A gray picture under it would take part in the colour, so low attention darkens and high attention glows.
        colour = colormaps["inferno"](heat[..., 0])[..., :3] * 255
        opacity = 0.25 + 0.5 * heat
        tile = Image.fromarray(np.uint8((1 - opacity) * np.asarray(tile) + opacity * colour))
    draw = ImageDraw.Draw(tile)
    for x, y, width, height in boxes:
        left, top = x * scale, y * scale
        right, bottom = max(left, (x + width) * scale - 1), max(top, (y + height) * scale - 1)
        draw.rectangle((left, top, right, bottom), outline=(64, 240, 208), width=2)
    # 256 colours are enough for a thumbnail, and keep the page small.
    return Picture(name, alt, _png(tile.quantize(256, method=Image.Quantize.MEDIANCUT)))

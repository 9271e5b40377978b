"""What is drawn: points, intervals, lines, labels and axes of the figures, read from matplotlib."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation
from PIL import Image

from distill.evaluation.results import Estimate
from distill.experiment import atlas
from distill.report import explanation, figures, proof
from distill.report.document import Picture
from distill.report.tables import FID, FINDING_AUC, IMAGE_ADDS, WORD_AUC

Drawn = list[tuple[Figure, Any]]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Drawn:
    """(figure, name, alternative text, width, height) of each chart, not written out."""
    found: Drawn = []

    def chart(name: str, alt: str, width: float, height: float, draw: Callable[[Figure], None]) -> Picture:
        figure = Figure()
        draw(figure)
        found.append((figure, SimpleNamespace(name=name, alt=alt, width=width, height=height)))
        return Picture(name, alt, "")

    for module in (figures, explanation, proof, atlas):
        monkeypatch.setattr(module, "chart", chart)
    return found


def lines_of(axes: Axes) -> dict[str, list[list[float]]]:
    """Label of each line that has one -> x and y."""
    return {
        str(line.get_label()): [list(line.get_xdata()), list(line.get_ydata())]  # type: ignore[arg-type]
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }


def bars_of(axes: Axes) -> set[tuple[float, ...]]:
    """Ends of the intervals: x, y, x, y."""
    return {
        tuple(round(float(v), 6) for v in segment.ravel())
        for collection in axes.collections
        for segment in collection.get_segments()  # type: ignore[attr-defined]
    }


def results_of(**arms: tuple[Estimate, Estimate, Estimate]) -> Any:
    """word AUC, FID and finding AUC of each arm."""
    keys = [WORD_AUC.key, FID.key, FINDING_AUC.key]
    entries = {
        name: SimpleNamespace(estimate=dict(zip(keys, values, strict=True)).__getitem__)
        for name, values in arms.items()
    }
    return SimpleNamespace(arms=entries)


def test_quality_is_drawn_against_localization_with_a_ring_around_the_choice(drawn: Drawn) -> None:
    unknown = Estimate()
    results = results_of(
        a=(Estimate(0.6, 0.5, 0.8), Estimate(60.0, 50.0, 90.0), Estimate(0.9)),
        b=(Estimate(0.7), Estimate(10.0, 10.5, 12.0), unknown),
        c=(unknown, Estimate(30.0), Estimate(0.7)),
        d=(Estimate(0.65), unknown, Estimate(0.8)),
    )
    charts = figures.tradeoff_charts(results, "b")
    assert [picture.name for picture in charts] == ["tradeoff_fid", "tradeoff_finding_auc"]
    assert charts[0].alt == "FID against word AUC of a, b; the values and intervals are in the table"
    (fid, _about), (finding, _) = drawn
    (axes,), (other,) = fid.axes, finding.axes
    assert lines_of(axes) == {"a": [[0.6], [60.0]], "b": [[0.7], [10.0]]}
    assert lines_of(other) == {"a": [[0.6], [0.9]], "d": [[0.65], [0.8]]}
    # An end on the wrong side of its value, as a bootstrap may give, has no length.
    assert bars_of(axes) == {(0.5, 60.0, 0.8, 60.0), (0.6, 50.0, 0.6, 90.0), (0.7, 10.0, 0.7, 12.0)}
    assert not bars_of(other) - {(0.5, 0.9, 0.8, 0.9)}
    rings = [line for line in axes.lines if line.get_markerfacecolor() == "none"]
    assert [(list(r.get_xdata()), list(r.get_ydata()), r.get_marker()) for r in rings] == [([0.7], [10.0], "o")]  # type: ignore[arg-type]
    assert not [line for line in other.lines if line.get_markerfacecolor() == "none"], "the choice has no point there"
    colours = {str(line.get_label()): to_hex(line.get_color()) for ax in (axes, other) for line in ax.lines}
    assert [colours[name] for name in "abd"] == [figures.COLOURS[k] for k in (0, 1, 3)], "an arm has one colour in all"
    markers = [[line.get_marker() for line in ax.lines if line.get_label() in "abcd"] for ax in (axes, other)]
    assert markers == [["o", "s"]] * 2
    assert axes.get_xlabel() == other.get_xlabel() == "word AUC (localization, right is better)"
    assert axes.get_ylabel() == "FID (axis turned, up is better)" and other.get_ylabel() == "finding AUC (up is better)"
    assert axes.yaxis_inverted() and not other.yaxis_inverted()
    assert axes.get_yscale() == "log" and other.get_yscale() == "linear"
    assert axes.margins() == (0.12, 0.12) and axes.yaxis.get_major_formatter()(20.0) == "20"  # type: ignore[operator]
    assert axes.yaxis.get_minor_formatter()(20.0) == ""  # type: ignore[operator]
    (legend,) = fid.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert figures.tradeoff_charts(results_of(a=(unknown, Estimate(1.0), unknown)), None) == []


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 5.0], "linear"), ([1.0, 5.01], "log"), ([0.0, 9.0], "linear"), ([None, 3.0], "linear"), ([], "linear"),
    ],
)  # fmt: skip
def test_only_a_wide_axis_of_fid_is_logarithmic(values: list[float | None], scale: str) -> None:
    axes = Figure().subplots()
    figures.quality_axis(axes, FID, values)
    assert axes.get_yscale() == scale
    other = Figure().subplots()
    figures.quality_axis(other, FINDING_AUC, [0.01, 0.9])
    assert other.get_yscale() == "linear"


def test_colours_and_markers_begin_anew_after_the_last() -> None:
    names = [str(i) for i in range(11)]
    assert [figures._colour(names, name) for name in ("0", "8", "9", "10")] == [
        figures.COLOURS[k] for k in (0, 8, 0, 1)
    ]
    assert [figures.marker(place)["marker"] for place in range(10)] == [*"osD^vPX<>", "o"]


def test_curves_have_a_running_mean_over_a_twentieth_of_the_points(drawn: Drawn) -> None:
    steps, values = list(range(10, 610, 10)), [float(1 + i % 7) for i in range(60)]
    logs = {
        "b": {"loss": list(zip(steps, values, strict=True)), "extra": [(5, 2.0)]},
        "a": {"loss": [(1, 4.0), (2, 6.0)]},
    }
    charts = figures.curve_charts(logs, ["a", "b"], "loss")
    assert [(c.name, c.alt) for c in charts] == [
        ("loss_0", "loss over the training steps"), ("loss_1", "extra over the training steps"),
    ]  # fmt: skip
    (axes,), (extra,) = (figure.axes for figure, _ in drawn)
    assert (axes.get_title(loc="left"), axes.get_xlabel(), extra.get_title(loc="left")) == ("loss", "step", "extra")
    padded = [1.0, 1.0, *values]  # three points wide
    means = [sum(padded[i : i + 3]) / 3 for i in range(60)]
    assert lines_of(axes) == {"b": [steps, pytest.approx(means)], "a": [[1, 2], [4.0, 6.0]]}
    thin = [line for line in axes.lines if str(line.get_label()).startswith("_")]
    assert [list(line.get_ydata()) for line in thin] == [values, [4.0, 6.0]]  # type: ignore[arg-type]
    assert [to_hex(line.get_color()) for line in thin] == [figures.COLOURS[1], figures.COLOURS[0]]
    assert [line.get_alpha() for line in thin] == [0.25, 0.25] and axes.get_yscale() == "log"
    bold = [line for line in axes.lines if line not in thin]
    assert [(line.get_markevery(), line.get_marker()) for line in bold] == [([-1], ".")] * 2
    assert extra.get_yscale() == "linear" and lines_of(extra) == {"b": [[5], [2.0]]}


def test_a_chart_is_a_picture_of_its_size_and_a_drawing_in_the_colour_of_the_page() -> None:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], label="costs $5")
        axes.legend()
        axes.set_clip_on(True)

    one, again = (figures.chart("the-name", "what it shows", 3.0, 2.0, draw) for _ in range(2))
    image = Image.open(io.BytesIO(one.png))
    assert image.size == (450, 300) and image.convert("RGB").getpixel((1, 1)) == (255, 255, 255)
    assert one.name == "the-name" and one.alt == "what it shows" and one.svg == again.svg and one.svg.startswith("<svg")
    assert "#24303f" not in one.svg and "currentColor" in one.svg and "costs $5" in one.svg, "text stays text"
    named = re.findall(r'\bid="([^"]+)"', one.svg)
    assert named and all(name.startswith("the-name-") for name in named)
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', one.svg)
    assert used and {a or b for a, b in used} <= set(named)
    assert not re.search(r"<dc:(date|creator|format|type)\b", one.svg, re.I) and "<?xml" not in one.svg
    assert "fill: #ffffff" not in one.svg.split("<g", 4)[2], "no ground of its own"


def test_a_map_glows_where_attention_is_high_and_darkens_elsewhere() -> None:
    maps: Any = SimpleNamespace(
        maps={"a": np.arange(12, dtype=np.uint8).reshape(3, 4) * 20, "b": np.full((3, 4), 7, np.uint8)}
    )
    height, uri = figures.sprite(maps, ["b", "a"])
    assert height == 3
    image = Image.open(io.BytesIO(_data(uri, "png")))
    places = np.asarray(image)
    expected = [np.pad(maps.maps[word], ((1, 1), (0, 0)), mode="edge") for word in ("b", "a")]
    assert image.mode == "P" and np.array_equal(places, np.concatenate(expected))
    colours = np.asarray(image.convert("RGBA"))
    for value in (0, 20, 220):
        shown = colours[places == value][0]
        warm = (np.array(colormaps["inferno"](value)[:3]) * 255).astype(np.uint8)
        assert list(shown[:3]) == list(warm) and shown[3] == 64 + value // 2


def test_pictures_on_the_page_are_small(tmp_path: Any) -> None:
    image = Image.fromarray(np.full((100, 400), 90, np.uint8))
    assert Image.open(io.BytesIO(_data(figures.data_uri(image, 200), "jpeg"))).size == (200, 50)
    small = Image.open(io.BytesIO(_data(figures.data_uri(image.resize((20, 30))), "jpeg")))
    assert small.size == (20, 30) and small.mode == "RGB"


def _data(uri: str, kind: str) -> bytes:
    import base64

    start = f"data:image/{kind};base64,"
    assert uri.startswith(start)
    return base64.b64decode(uri.removeprefix(start))


# ------------------------------------------------------------------------------------------------------ explain.py


def feature(name: str, importance: float, low: float, high: float) -> dict[str, Any]:
    return {"name": name, "importance": importance, "importance_ci": [low, high]}


def test_the_first_twelve_features_with_an_importance_are_bars(drawn: Drawn) -> None:
    many = [feature(f"f{i}", 1.0 / (i + 1), 0.5 / (i + 1), 3.0 / (i + 1)) for i in range(14)]
    explanation.importance_chart({"features": many})
    explanation.importance_chart(
        {"features": [feature("a", 0.5, 0.25, 1.0), feature("b", 0.0, -1, 1), feature("c", -0.1, -1, 0)]}
    )
    explanation.importance_chart({"features": [feature("b", 0.0, -1.0, 1.0), feature("c", -0.1, -1, 0)]})
    (axes,), (few,), (none,) = (figure.axes for figure, _ in drawn)
    assert [t.get_text() for t in axes.get_yticklabels()] == [f"f{i}" for i in reversed(range(12))]
    assert [p.get_width() for p in axes.patches] == pytest.approx([1 / (i + 1) for i in reversed(range(12))])  # type: ignore[attr-defined]
    ends = {(x0, x1) for x0, _, x1, _ in bars_of(axes)}
    assert ends == {(round(0.5 / (i + 1), 6), round(3.0 / (i + 1), 6)) for i in range(12)}
    assert [t.get_text() for t in few.get_yticklabels()] == ["a"] and [
        t.get_text() for t in none.get_yticklabels()
    ] == ["b"]
    assert axes.get_xlabel().startswith("AUC that unseen images lose")


def test_dependence_has_a_panel_a_feature(drawn: Drawn) -> None:
    curves = [
        {"name": n, "values": [0, 1, k], "probability": [0.1, 0.2, 0.9]} for k, n in enumerate(("noise", "contrast"), 2)
    ]
    picture = explanation.dependence_chart({"dependence": curves})
    ((figure, _),) = drawn
    assert picture.alt == "how the probability of generated changes with noise, contrast"
    assert [axes.get_title() for axes in figure.axes] == ["noise", "contrast"]
    for place, axes in enumerate(figure.axes, 2):
        curve, half = axes.lines
        assert [list(curve.get_xdata()), list(curve.get_ydata())] == [[0, 1, place], [0.1, 0.2, 0.9]]  # type: ignore[arg-type]
        assert list(half.get_ydata()) == [0.5, 0.5]  # type: ignore[arg-type]
    assert figure.axes[0].get_ylabel() == "probability of generated" and figure.axes[1].get_ylabel() == ""
    assert figure.axes[0].get_shared_y_axes().joined(*figure.axes)
    three = [*curves, {"name": "skewness", "values": [0, 1], "probability": [0.5, 0.5]}]
    picture = explanation.dependence_chart({"dependence": three}, "dependence-1", "base: ", rows=2)
    figure = drawn[1][0]
    assert [axes.get_title() for axes in figure.axes] == ["noise", "contrast", "skewness", ""]
    assert [axes.axison for axes in figure.axes] == [True, True, True, False] and picture.alt.startswith("base: how")


def test_an_example_stands_above_what_speaks_for_and_against_it(drawn: Drawn) -> None:
    parts = [{"name": "noise", "logit": 2.0}, {"name": "contrast", "logit": -1.0}, {"name": "rest", "logit": 0.0}]
    examples = [{"image": 4, "score": 0.984, "parts": parts}, {"image": 7, "score": 0.5, "parts": parts[:1]}]
    images = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200)]
    explanation.examples_chart({"examples": examples}, images)
    ((figure, about),) = drawn
    above, below = figure.axes[:2], figure.axes[2:]
    assert [axes.get_title() for axes in above] == ["image 4: 98% generated", "image 7: 50% generated"]
    assert [int(np.asarray(axes.images[0].get_array()).max()) for axes in above] == [10, 200]
    assert not any(axes.axison for axes in above) and about.width == pytest.approx(6.8)
    assert [t.get_text() for t in below[0].get_yticklabels()] == ["rest", "contrast", "noise"]
    assert [p.get_width() for p in below[0].patches] == [0.0, -1.0, 2.0]  # type: ignore[attr-defined]
    assert [to_hex(p.get_facecolor()) for p in below[0].patches] == ["#3f86d9", "#3f86d9", "#d1495b"]
    assert [t.get_text() for t in below[1].get_yticklabels()] == ["noise"] and "real < 0 < generated" in below[
        0
    ].get_xlabel()
    heights = figure.axes[0].get_gridspec().get_height_ratios()  # type: ignore[union-attr]
    assert list(heights) == [1.3, 1]


# ------------------------------------------------------------------------------------------------------- proof.md


def test_the_fronts_go_through_the_budgets_of_each_arm(drawn: Drawn) -> None:
    def point(adds: float | None, fid: float, finding: float | None = None) -> proof.Point:
        one = {IMAGE_ADDS.key: adds, FID.key: fid, FINDING_AUC.key: finding}
        other = {IMAGE_ADDS.key: adds and adds + 0.02, FID.key: fid + 2, FINDING_AUC.key: None}
        return proof.Point(1, 3, {0: one, 1: other})

    curves = {
        "unseen": {2: point(0.5, 1.0)},
        "a": {2: point(0.1, 40.0, 0.6), 4: point(0.2, 30.0, 0.7)},
        "b": {2: point(None, 20.0, 0.5), 4: point(0.3, 25.0)},
    }
    picture = proof._front(curves, ["a", "b"])
    ((figure, _),) = drawn
    assert picture is not None and picture.name == "fronts"
    finding, fid = figure.axes
    assert lines_of(fid) == {"a": [pytest.approx([0.11, 0.21]), [41.0, 31.0]], "b": [pytest.approx([0.31]), [26.0]]}
    assert lines_of(finding) == {"a": [pytest.approx([0.11, 0.21]), [0.6, 0.7]]}
    assert [axes.get_xlabel() for axes in figure.axes] == ["image adds (localization, right is better)"] * 2
    named = [(text.get_text(), *text.xy) for text in fid.texts if isinstance(text, Annotation)]
    assert named == [
        ("2", pytest.approx(0.11), 41.0),
        ("4", pytest.approx(0.21), 31.0),
        ("4", pytest.approx(0.31), 26.0),
    ]
    assert fid.get_ylabel().startswith("FID") and finding.get_ylabel().startswith("finding AUC")
    first, *_ = fid.lines
    assert (to_hex(first.get_color()), first.get_marker(), first.get_linewidth()) == (figures.COLOURS[0], "o", 1)
    half = proof.student_interval([0.1, 0.12])
    assert half is not None and (round(half[0], 6), 41.0, round(half[1], 6), 41.0) in bars_of(fid)
    assert len(figure.legends) == 1
    assert proof._front({"a": {2: point(None, 40.0)}}, ["a"]) is None


# -------------------------------------------------------------------------------------------------------- atlas.md


def test_the_atlas_is_a_panel_a_map_with_a_frame_around_the_choice(drawn: Drawn) -> None:
    tables = {"word": np.array([[0.5, 0.7], [0.6, 0.9]]), "eos": np.array([[0.4, 0.5], [0.5, 0.5]])}
    picture = atlas.atlas_chart(tables, ["down", "up"], [100, 400], ([1], [0, 1]), "auc")
    ((figure, about),) = drawn
    word, eos, _ = figure.axes
    assert picture.name == "atlas" and [word.get_title(loc="left"), eos.get_title(loc="left")] == [
        "word, best .900",
        "eos, best .500",
    ]
    for axes, table in ((word, tables["word"]), (eos, tables["eos"])):
        (image,) = axes.images
        assert np.array_equal(np.asarray(image.get_array()), table) and image.get_clim() == (
            pytest.approx(0.1),
            pytest.approx(0.9),
        )
        assert [t.get_text() for t in axes.get_xticklabels()] == ["100", "400"] and axes.get_xlabel() == "timestep"
        frames = [p for p in axes.patches if isinstance(p, Rectangle)]
        assert sorted((f.get_xy(), f.get_width(), f.get_height(), f.get_fill()) for f in frames) == [
            ((-0.5, 0.5), 1, 1, False), ((0.5, 0.5), 1, 1, False),
        ]  # fmt: skip
    assert [t.get_text() for t in word.get_yticklabels()] == ["down", "up"] and word.get_shared_y_axes().joined(
        word, eos
    )
    texts = {t.get_text(): (t.get_position(), t.get_color()) for t in word.texts}
    assert texts == {
        ".50": ((0, 0), "black"), ".70": ((1, 0), "black"), ".60": ((0, 1), "black"), ".90": ((1, 1), "white"),
    }  # fmt: skip
    assert not any(line.get_visible() for line in word.get_xgridlines())
    assert (about.width, about.height) == (pytest.approx(2.2 + 2 * 1.06), pytest.approx(2.06))
    drawn.clear()
    atlas.atlas_chart({"word": np.full((21, 20), 0.51)}, ["l"] * 21, list(range(20)), ([], []), "auc")
    atlas.atlas_chart({"word": np.full((20, 20), 0.51)}, ["l"] * 20, list(range(20)), ([], []), "auc")
    (many, _), (fits, _) = drawn
    assert not many.axes[0].texts and len(fits.axes[0].texts) == 400
    assert many.axes[0].images[0].get_clim() == (pytest.approx(0.45), pytest.approx(0.55)), "noise is not made to glow"

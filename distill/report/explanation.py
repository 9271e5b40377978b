"""explain.json in plain English: what tells generated from real images, in tables and three figures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from distill.errors import UserError
from distill.evaluation.explanation import BEYOND, CONTROL, EXPLAINED, GENERATED, VAE, needed
from distill.evaluation.results import Results
from distill.files import JsonObject, read_json, write_atomic
from distill.metrics.image_features import FEATURES
from distill.report.document import Picture, Section, Table, markdown_section
from distill.report.figures import chart, data_uri, read_image
from distill.report.tables import format_number

_DETECTOR = (
    "A detector learns to tell generated from real held-out images by 32 named features, such as sharpness, and is tested "
    "on images that it did not see. An AUC of .5 is chance. The pictures show the image that is easiest to recognize as "
    "generated, one in the middle, and the hardest one."
)
_FOLDS = (
    "Intervals are 95 %, over the folds of a cross-validation. Images of one patient are never on both sides of a fold. "
    "Where no patient is known, that holds for a real image and those drawn of its caption, and each file of --images "
    "counts as a patient."
)
_IMPORTANCE = (
    "Importance is the AUC that is lost when a feature is shuffled among unseen images. The AUC of a feature alone needs "
    "no training and is of all images, so that it can be higher than the detector's. Where several features say the "
    "same, one may stand for all."
)
_HEAD = ["feature", "importance", "AUC alone", "real", "generated", "unit"]
_SHOWN = 8
"""Features in the table of the report; explain.json has all."""
_BARS, _ALONE = 12, 3
_COLOURED = 1.0
"""Levels of 8 bits by which channels differ where an image has some colour."""
_OF_THE_VAE = " So it is the VAE that tells the images apart, and training the denoiser does not mend it."


def interval(entry: JsonObject, key: str) -> str:
    """`.731 [.702, .760]`."""
    low, high = entry[f"{key}_ci"]
    return f"{format_number(entry[key], 2)} [{format_number(low, 2)}, {format_number(high, 2)}]"


def is_chance(entry: JsonObject) -> bool:
    """Whether the interval of the AUC holds .5."""
    low, high = entry["auc_ci"]
    return bool(low <= 0.5 <= high)


def _said(feature: JsonObject) -> str:
    if feature["real"] is None:  # and the other too
        return f"“{feature['name']}” (unknown in all images of one side)"
    if feature["other"] == feature["real"]:
        return f"“{feature['name']}” (the same median, {feature['real']:.3g}, but other values)"
    way = "lower" if feature["other"] < feature["real"] else "higher"
    return f"“{feature['name']}” ({way}: {feature['other']:.3g}, and {feature['real']:.3g} in real images)"


def change_sentence(change: JsonObject | None) -> str:
    """What would have to change for the detector to say real of one image."""
    if change is None:
        return "No other value of a single feature would make it say real."
    name, before, after = change["name"], change["before"], change["after"]
    ratio = after / before - 1 if before > 0 and after > 0 else float("inf")  # of no meaning below 0
    if abs(ratio) <= 1:
        return f"It would say real if “{name}” were {abs(ratio):.0%} {'higher' if ratio > 0 else 'lower'}."
    return f"It would say real if “{name}” were {after:.3g} instead of {before:.3g}."


def sentences(comparisons: Mapping[str, JsonObject]) -> list[str]:
    """The result, in a few sentences."""
    main = comparisons[GENERATED]
    if is_chance(main):
        found = [f"The detector cannot tell generated from real images: AUC {interval(main, 'auc')}."]
    else:
        found = [f"A detector tells generated from real images with AUC {interval(main, 'auc')}."]
        named = needed(main)
        none = "It uses many features, none of which it needs by itself."
        found.append(f"The features that it needs most: {'; '.join(map(_said, named))}." if named else none)
        alone = sorted(main["features"], key=lambda feature: -feature["auc_alone"])[:_ALONE]
        each = ", ".join(f"“{f['name']}” ({format_number(f['auc_alone'], 2)})" for f in alone)
        found.append(f"The features that differ most, each with its own AUC on all images: {each}.")
    if VAE in comparisons:
        found += _of_the_vae(main, comparisons[VAE], comparisons[BEYOND])
    changes = main["changes"]
    if changes["detected"] and changes["features"]:
        name, share = next(iter(changes["features"].items()))
        found.append(
            f"For {changes['one_change_is_enough']:.0%} of the images that it recognizes, another value of one feature "
            f"would make this detector say real, most often of “{name}” ({share:.0%})."
        )
    if main.get("gray"):
        found.append("All images were compared in gray.")
        if main["spread"] >= _COLOURED:
            found[-1] += (
                " Left out are the colours of the generated ones, whose channels differ by "
                f"{main['spread']:.0f} of 255 levels (median)."
            )
    control = comparisons[CONTROL]
    fine = "holds .5" if is_chance(control) else "does not hold .5: the other numbers cannot be trusted"
    sides = control["images"]["real"], main["images"]["real"]
    fewer = f" Each half has {sides[0]} images, and the comparison {sides[1]}, so that this check is weaker."
    checked = "Check: two halves of the real images should not be told apart. The interval of their AUC,"
    ended = fewer if sides[0] < sides[1] else ""
    return [*found, f"{checked} {interval(control, 'auc')}, {fine}.{ended}"]


def _of_the_vae(main: JsonObject, vae: JsonObject, beyond: JsonObject) -> list[str]:
    """Whose fault it is: the VAE's or the denoiser's."""
    if is_chance(vae):
        found = [
            f"Real images that went through the VAE cannot be told from untouched ones: AUC {interval(vae, 'auc')}."
        ]
    else:
        by = _told_by(vae, "many features together")
        found = [
            f"Real images that only went through the VAE are told from untouched ones with AUC {interval(vae, 'auc')}, by {by}."
        ]
    told = f"AUC {interval(beyond, 'auc')}"
    if is_chance(beyond):
        passes = f"Generated images cannot be told from real ones that went through the VAE: {told}."
        return [*found, passes + ("" if is_chance(main) or is_chance(vae) else _OF_THE_VAE)]
    by = _told_by(beyond, "many features together")
    return [
        *found,
        f"Generated images are told from real ones that went through the VAE with {told}, by {by}: the denoiser's part.",
    ]


def importance_chart(entry: JsonObject, name: str = "importance", of: str = "the features") -> Picture:
    """The first features with their intervals."""
    rows = [row for row in entry["features"][:_BARS] if row["importance"] > 0][::-1] or entry["features"][:1]

    def draw(figure: Figure) -> None:
        axes, values = figure.subplots(), [row["importance"] for row in rows]
        ends = [[value - row["importance_ci"][0] for value, row in zip(values, rows, strict=True)],
                [row["importance_ci"][1] - value for value, row in zip(values, rows, strict=True)]]  # fmt: skip
        axes.barh([row["name"] for row in rows], values, xerr=ends, color="#3f86d9", ecolor="#24303f")
        axes.set_xlabel("AUC that unseen images lose when the feature is shuffled")

        axes.set_title(f"importance of {of}")

    return chart(name, f"importance of {of}; the values and intervals are in the table", 6.4, 4.2, draw)


def dependence_chart(entry: JsonObject, name: str = "dependence", of: str = "", rows: int = 1) -> Picture:
    """One panel a feature. of: whose images they are, before the text."""
    columns = -(-len(entry["dependence"]) // rows)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
        for axes in panels[len(entry["dependence"]) :]:
            axes.set_axis_off()
        for axes, curve in zip(panels, entry["dependence"], strict=False):
            axes.plot(curve["values"], curve["probability"], ".-", color="#3f86d9")
            axes.axhline(0.5, color="#24303f", lw=0.8)
            axes.set_title(curve["name"], fontsize=8)
        panels[0].set_ylabel("probability of generated")

    names = ", ".join(curve["name"] for curve in entry["dependence"])
    width, height = (11, 2.8) if rows == 1 else (6.4, 4.2)
    return chart(name, f"{of}how the probability of generated changes with {names}", width, height, draw)


def examples_chart(entry: JsonObject, images: Sequence[Image.Image]) -> Picture:
    """Single images with what speaks for and against them."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, len(images), squeeze=False, height_ratios=(1.3, 1))
        for (above, below), example, image in zip(panels.T, entry["examples"], images, strict=True):
            above.imshow(image)
            above.set_axis_off()
            above.set_title(f"image {example['image']}: {example['score']:.0%} generated", fontsize=9)
            _parts(below, example["parts"][::-1])

    alt = (
        "the easiest, a middling and the hardest image to recognize, with the features that speak for generated or real"
    )
    return chart("examples", alt, 3.4 * len(images), 5.2, draw)


def _parts(axes: Axes, parts: Sequence[JsonObject]) -> None:
    values = [part["logit"] for part in parts]
    axes.barh([part["name"] for part in parts], values, color=["#d1495b" if v > 0 else "#3f86d9" for v in values])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("logit: real < 0 < generated", fontsize=8)


def sections(comparisons: Mapping[str, JsonObject], images: Sequence[Image.Image]) -> list[Section]:
    """The parts of explain.md. images: those of the examples."""
    main = comparisons[GENERATED]
    rows = [
        [name, interval(entry, "auc"), ", ".join(format_number(v, 2) for v in entry["per_set"]), _told_by(entry)]
        for name, entry in comparisons.items()
    ]
    areas = Table(["", "AUC", "each set", "told by"], rows)
    kinds = Table(["kind", "importance"], [[k["name"], interval(k, "importance")] for k in main["kinds"]], "numbers")
    features = Table(_HEAD, [_row(f) for f in main["features"]])
    single = [single_sentence(example) for example in main["examples"] if example["score"] >= 0.5]
    meaning = Table(["feature", "unit or range", "meaning"], [[f.name, f.unit, f.meaning] for f in FEATURES])
    return [
        Section("What tells generated from real images", sentences(comparisons), [importance_chart(main)], [areas]),
        Section("How the detector uses a feature", ["The other features stay as they are."], [dependence_chart(main)]),
        Section("Single images", single, [examples_chart(main, images)] if images else []),
        Section(
            "All features",
            [_FOLDS, f"{_IMPORTANCE} Look at the kinds, and at the AUC of a feature alone."],
            [],
            [kinds, features],
        ),
        Section("What the features mean", [], [], [meaning]),
    ]


def single_sentence(example: JsonObject) -> str:
    """What the detector says of one image, and why."""
    name = shorten(example.get("name", f"number {example['image']}"), 90, placeholder=" …")
    found = f"Image “{name}”: the detector says generated with a probability of {example['score']:.1%}."
    for_it = [part["name"] for part in example["parts"] if part["logit"] > 0]
    found += f" For it speak: {', '.join(for_it)}." if for_it else ""
    return f"{found} {change_sentence(example['change'])}" if example["score"] >= 0.5 else found


def _single(said: str, image: Image.Image) -> Picture:
    text = html.escape(said)
    return Picture("example", said, f'<img alt="" src="{data_uri(image)}"><figcaption>{text}</figcaption>')


def explanation_section(run_dir: Path, results: Results, notes: list[str]) -> Section:
    """What tells the images of each arm from real ones, where that was measured."""
    rows, charts, features, named = [], list[Picture](), list[Table](), list[str]()
    for place, (arm, found) in enumerate(results.arms.items()):
        if found.explanation is None:
            continue
        try:
            comparisons = read_json(run_dir / arm / EXPLAINED)["comparisons"]
            main = comparisons[GENERATED]
            rows.append([arm, " ".join(sentences(comparisons))])
            charts.append(importance_chart(main, f"importance-{place}", f"the features of {arm}"))
            charts.append(dependence_chart(main, f"dependence-{place}", f"{arm}: ", rows=2))
            head = [f"{arm}: feature", *_HEAD[1:]]
            features.append(Table(head, [_row(f) for f in main["features"][:_SHOWN]], name=f"features of {arm}"))
            for number, example in enumerate(main["examples"]):
                if image := read_image(run_dir, f"{arm}/explained/{number}.png", notes):
                    charts.append(_single(f"{arm}: {single_sentence(example)}", image))
            alone = sorted(main["features"], key=lambda feature: -feature["auc_alone"])[:_ALONE]
            named += [f["name"] for f in (*main["features"][:_BARS], *alone)]
        except (UserError, KeyError, TypeError) as error:
            notes.append(f"{arm}/{EXPLAINED} cannot be read: {error!r}.")
    meaning = [[f.name, f.unit, f.meaning] for f in FEATURES if f.name in named]
    tables = [
        Table(["model", "what was found"], rows, name="what tells the images from real ones"),
        *features,
        Table(["feature", "unit or range", "meaning"], meaning, name="meaning of the features"),
    ]
    return Section("What tells the images from real ones", [_DETECTOR, _FOLDS, _IMPORTANCE], charts, tables)


def _told_by(entry: JsonObject, none: str = "–") -> str:
    return ", ".join(f"“{feature['name']}”" for feature in needed(entry)) or none


def _row(feature: JsonObject) -> list[str]:
    real, other = ("–" if v is None else f"{v:.3g}" for v in (feature["real"], feature["other"]))
    unit = next(f.unit for f in FEATURES if f.name == feature["name"])
    alone = format_number(feature["auc_alone"], 2)
    return [feature["name"], interval(feature, "importance"), alone, real, other, unit]


def write_explanation(folder: Path, comparisons: Mapping[str, JsonObject], images: Sequence[np.ndarray]) -> str:
    """Write explain.md and figures/*.png; returns the text. images: (height, width, 3) uint8 of the examples."""
    parts = sections(comparisons, [Image.fromarray(image) for image in images])
    for picture in (picture for section in parts for picture in section.charts):
        write_atomic(folder / "figures" / f"{picture.name}.png", picture.png)
    text = "\n\n".join(["# What is wrong with the images", *map(markdown_section, parts)]) + "\n"
    write_atomic(folder / "explain.md", text)
    return text

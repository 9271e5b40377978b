"""report.html and report.md of a run folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from distill.errors import UserError
from distill.files import write_atomic
from distill.report import figures, tables, verdicts
from distill.report.document import (
    UNKNOWN,
    Block,
    Document,
    Fold,
    Picture,
    Section,
    Table,
    Text,
    pictures,
    render_html,
    render_markdown,
)
from distill.report.schema import validate_metrics

# Columns of train_log.jsonl that are no loss.
_NO_LOSS = ("step", "grad_norm", "lr", "seconds", "epoch")


@dataclass(frozen=True)
class Example:
    """One held-out image; `image` is None where its file cannot be read."""

    id: str
    caption: str
    image: Image.Image | None
    regions: tuple[tuple[str, tuple[tuple[float, float, float, float], ...]], ...]


# ------------------------------------------------------------------------------------------------------------- reading


def _inside(run_dir: Path, *parts: str) -> Path | None:
    """run_dir/parts, or None where that leads out of the run folder."""
    path = run_dir.joinpath(*parts).resolve()
    return path if path.is_relative_to(run_dir.resolve()) else None


def _read_image(path: Path | None) -> Image.Image | None:
    if path is None or not path.is_file():
        return None
    try:
        with Image.open(path) as image:
            converted: Image.Image = image.convert("RGB")
            return converted
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _read_jsonl(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Objects of a JSON Lines file, without the lines that are none (the last line of a stopped run is often half)."""
    rows, broken = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += 1
    if broken:
        missing.append(f"{broken} line(s) of {path.parent.name}/{path.name} are no JSON object and are left out.")
    return rows


def _read_metrics(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "metrics.json"
    try:
        metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {path}: evaluate the run first, the report is made from this file") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    validate_metrics(metrics)
    return metrics


def _read_boxes(region: Mapping[str, Any]) -> tuple[tuple[float, float, float, float], ...]:
    boxes = []
    for box in region.get("boxes") or ():
        x, y, width, height = (float(side) for side in box)
        if not all(map(math.isfinite, (x, y, width, height))):
            raise ValueError(f"box {box} is not finite")
        boxes.append((x, y, width, height))
    return tuple(boxes)


def _read_examples(run_dir: Path, missing: list[str]) -> list[Example]:
    path = run_dir / "real" / "examples.jsonl"
    if not path.is_file():
        missing.append("real/examples.jsonl is missing: there are no held-out images to show.")
        return []
    examples = []
    for row in _read_jsonl(path, missing):
        try:
            regions = tuple((str(region["finding"]), _read_boxes(region)) for region in row.get("regions") or ())
            name, example_id, caption = str(row["image"]), str(row["id"]), str(row["caption"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            missing.append(f"An entry of real/examples.jsonl is not as documented and is left out: {error!r}.")
            continue
        image = _read_image(_inside(run_dir, name))
        if image is None:
            missing.append(f"{name} cannot be read as an image of this run folder.")
        examples.append(Example(example_id, caption, image, regions))
    return examples


def _read_maps(run_dir: Path, arm: str, missing: list[str]) -> dict[str, np.ndarray]:
    """{"<id>/<finding>": (height, width) in [0, 1]} of one arm; empty where it has none."""
    path = _inside(run_dir, arm, "maps.safetensors")
    if path is None or not path.is_file():
        missing.append(f"{arm} has no attention maps (maps.safetensors).")
        return {}
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        missing.append(f"The attention maps of {arm} cannot be read: {error}.")
        return {}
    maps = {key: value for key, value in stored.items() if value.ndim == 2 and value.size and np.isfinite(value).all()}
    if len(maps) < len(stored):
        missing.append(f"{len(stored) - len(maps)} map(s) of {arm} are not (height, width) of finite numbers.")
    return maps


def _read_losses(run_dir: Path, arm: str, missing: list[str]) -> dict[str, list[tuple[int, float]]]:
    """{term: [(step, value)]} of one arm's train_log.jsonl; empty where it has none."""
    path = _inside(run_dir, arm, "train_log.jsonl")
    if path is None or not path.is_file():
        return {}
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in _read_jsonl(path, missing):
        step = row.get("step")
        if isinstance(step, bool) or not isinstance(step, int):
            continue
        for term, value in row.items():
            if term in _NO_LOSS or term.startswith("lr") or isinstance(value, bool):
                continue
            if isinstance(value, (int, float)) and math.isfinite(value):
                curves.setdefault(term, []).append((step, float(value)))
    return curves


# ------------------------------------------------------------------------------------------------------------ sections


def _missing(messages: Sequence[str]) -> list[Block]:
    return [Text(message, "missing") for message in dict.fromkeys(messages)]


def _counts(metrics: Mapping[str, Any]) -> str:
    """How many images the numbers rest on; where arms differ, the range."""

    def spread(*path: str) -> str | None:
        counts = [tables.lookup(entry, *path) for entry in metrics["arms"].values()]
        known = sorted({count for count in counts if count})
        return UNKNOWN.join(f"{count:,}" for count in dict.fromkeys((known[0], known[-1]))) if known else None

    parts = []
    if images := spread("localization", "word", "images"):
        pairs = spread("localization", "word", "pairs")
        protocols = dict.fromkeys(
            tables.lookup(entry, "localization", "protocol") for entry in metrics["arms"].values()
        )
        named = ", ".join(f"protocol {name}{tables.PROTOCOL_NOTES.get(name, '')}" for name in protocols if name)
        parts.append(
            f"Localization: {images} held-out images, {pairs} pairs of image and finding{named and f'; {named}'}."
        )
    if images := spread("quality", "images"):
        names = dict.fromkeys(tables.lookup(entry, "quality", "features") for entry in metrics["arms"].values())
        features = ", ".join(name for name in names if name)
        parts.append(f"Quality: {images} generated images" + (f", features of {features}." if features else "."))
    return " ".join(parts)


def _headline(metrics: Mapping[str, Any]) -> Section:
    arms = metrics["arms"].values()
    several = sum(name != "base" for name in metrics["arms"]) > 1
    bold = "Bold is the best value of the trained arms; the intervals say whether it is so clearly. " if several else ""
    blocks: list[Block] = [tables.headline_table(metrics)]
    blocks.append(
        Text(
            "Under each value its 95 % bootstrap interval. ↑ higher is better, ↓ lower is better. "
            f"{bold}{_counts(metrics)}"
        )
    )
    for metric in (tables.WORD_AUC, tables.FID, tables.FINDING_AUC):
        if all(tables.estimate(entry, metric).value is None for entry in arms):
            blocks.append(Text(f"{metric.name} was not computed in this run.", "missing"))
    return Section("table", "Table", "Results", blocks)


_ONE = "One training seed an arm: what another seed would give is not in the intervals."
_SEVERAL = "Intervals are of resamples of seeds and images; a few seeds show their own spread only."


def _verdict(metrics: Mapping[str, Any]) -> Section:
    several = any(len(entry.get("per_seed", ())) > 1 for entry in metrics["arms"].values())
    found = verdicts.verdicts(metrics)
    said = verdicts.outcomes(metrics, found)
    blocks: list[Block] = [verdicts.outcome_table(said)] if said else []
    comparison, paired = tables.comparison_table(metrics), tables.paired_table(metrics)
    if comparison is not None:
        blocks.append(comparison)
        blocks.append(
            Text(
                "“Better” and “worse” are said only where the two 95 % intervals do not overlap. All arms are measured "
                "on the same held-out images, so this is a careful rule: overlap does not prove that two arms are "
                f"equal.{'' if paired else f' {_ONE}'}"
            )
        )
    if paired is not None:
        blocks.append(paired)
        blocks.append(
            Text(
                "Differences of the first arm from the second, on the same images, captions, noise and seeds, with 95 % "
                f"intervals; coloured where the interval does not hold 0. {_SEVERAL if several else _ONE}"
            )
        )
    if found:
        blocks.append(Fold("Every question, its answer and its numbers", [verdicts.verdict_table(found)]))
    return Section("verdict", "Verdict", "What the numbers say", blocks)


def _tradeoff(metrics: Mapping[str, Any]) -> Section:
    chart = figures.tradeoff_chart(metrics)
    blocks: list[Block] = []
    if chart is None:
        blocks = _missing(["No arm has both a word AUC and a quality number: there is nothing to plot."])
    else:
        blocks = [chart, Text("Upper right is what one wants. Bars are 95 % bootstrap intervals.")]
    return Section("tradeoff", "Trade-off", "Quality against localization", blocks)


def _maps(run_dir: Path, arms: Sequence[str], examples: Sequence[Example], notes: Sequence[str]) -> Section:
    missing = list(notes)
    maps = {arm: _read_maps(run_dir, arm, missing) for arm in arms}
    blocks: list[Block] = []
    for number, example in enumerate(examples):
        if example.image is None:
            continue
        rows = []
        for place, (finding, boxes) in enumerate(example.regions):
            stem = f"map_{number:04d}_{place}"
            row: list[str | Picture] = [finding]
            row.append(figures.region_tile(f"{stem}_real", f"real image, {finding}", example.image, boxes))
            for position, arm in enumerate(arms):
                attention = maps[arm].get(f"{example.id}/{finding}")
                if attention is None:
                    row.append(UNKNOWN)
                    continue
                alt = f"attention of {arm}, {finding}"
                row.append(figures.region_tile(f"{stem}_arm{position}", alt, example.image, boxes, attention))
            rows.append(row)
        if rows:
            blocks.append(Text(example.caption, "caption"))
            blocks.append(Table(["", "real, true box", *arms], rows, "pictures"))
    if not blocks and examples:
        missing.append("No example has a region and a readable image: there are no maps to show.")
    if blocks:
        intro = (
            "Where each model looks for the finding's words in a real held-out image; bright is much attention, each "
            f"map scaled from 0 to 1. The frame is the true box. “{UNKNOWN}”: no map of this finding."
        )
        blocks.insert(0, Text(intro))
    return Section("maps", "Attention maps", "Attention maps of the finding words", [*blocks, *_missing(missing)])


def _samples(run_dir: Path, arms: Sequence[str], examples: Sequence[Example], notes: Sequence[str]) -> Section:
    missing = list(notes)
    rows: list[list[str | Picture]] = [["real"]]
    for number, example in enumerate(examples):
        image = example.image
        rows[0].append(UNKNOWN if image is None else figures.image_tile(f"real_{number:04d}", "real image", image))
    for position, arm in enumerate(arms):
        row: list[str | Picture] = [arm]
        for number in range(len(examples)):
            image = _read_image(_inside(run_dir, arm, "samples", f"{number:04d}.png"))
            alt = f"generated by {arm}"
            name = f"sample_{number:04d}_arm{position}"
            row.append(UNKNOWN if image is None else figures.image_tile(name, alt, image))
        if all(cell == UNKNOWN for cell in row[1:]) and examples:
            missing.append(f"{arm} has no generated images (samples/).")
        else:
            rows.append(row)
    blocks: list[Block] = []
    if examples:
        rows.append(["caption", *(example.caption for example in examples)])
        head = ["", *(f"example {number + 1}" for number in range(len(examples)))]
        blocks = [
            Text("Held-out images, and what each model draws from their captions, which stand below."),
            Table(head, rows, "pictures"),
        ]
    return Section("samples", "Images", "Real and generated images of the same captions", [*blocks, *_missing(missing)])


def _mass(metrics: Mapping[str, Any]) -> Section:
    chart = figures.mass_chart(metrics)
    if chart is None:
        return Section("mass", "Attention mass", "Attention mass", _missing(["No arm has an attention mass."]))
    text = "A text encoder that is free to train can move what it knows from the words to EOS and padding."
    return Section("mass", "Attention mass", "Where the attention goes", [chart, Text(text)])


def _findings(metrics: Mapping[str, Any]) -> Section:
    table = tables.finding_table(metrics)
    blocks: list[Block]
    if table is None:
        blocks = _missing(["No arm has localization numbers of single findings."])
    else:
        blocks = [table, Text("Pairs: images with a region of the finding; few pairs, little certainty.")]
    return Section("findings", "Findings", "Word AUC of each finding", blocks)


def _losses(run_dir: Path, arms: Sequence[str]) -> Section:
    missing: list[str] = []
    logs = {arm: log for arm in arms if (log := _read_losses(run_dir, arm, missing))}
    absent = [arm for arm in arms if arm not in logs and arm != "base"]
    if absent:
        missing.append(f"No training log (train_log.jsonl) with losses: {', '.join(absent)}.")
    chart = figures.loss_chart(logs)
    blocks: list[Block] = []
    if chart is not None:
        blocks = [chart, Text("Thin: as logged. Thick: smoothed. Terms of one arm only have one line.")]
    elif not missing:
        missing.append("Nothing was trained in this run.")
    return Section("losses", "Losses", "Loss curves", [*blocks, *_missing(missing)])


def _localization_over_training(run_dir: Path, arms: Sequence[str]) -> list[Section]:
    missing: list[str] = []
    logs = {
        arm: _read_jsonl(path, missing)
        for arm in arms
        if (path := _inside(run_dir, arm, "localization_log.jsonl")) is not None and path.exists()
    }
    chart = figures.localization_chart(logs)
    if chart is None:
        return []
    rows = next(iter(logs.values()))
    text = Text(
        f"On {rows[0]['images']} validation images ({rows[0]['pairs']} image-finding pairs), in each step's state."
    )
    return [Section("over-training", "Over training", "Localization over training", [chart, text, *_missing(missing)])]


def _cost(metrics: Mapping[str, Any]) -> Section:
    blocks: list[Block] = [tables.cost_table(metrics)]
    stages = tables.stage_table(metrics)
    if stages is not None:
        blocks.append(stages)
    return Section("cost", "Cost", "Time and memory", blocks)


def _provenance(metrics: Mapping[str, Any]) -> Section:
    provenance = metrics["provenance"]
    plain = {key: value for key, value in provenance.items() if not isinstance(value, Mapping)}
    nested = {key: value for key, value in provenance.items() if isinstance(value, Mapping)}
    blocks: list[Block] = []
    if plain:
        blocks.append(Table(["", "value"], list(tables.flatten(plain))))
    for key, value in nested.items():
        blocks.append(Fold(key, [Table(["", "value"], list(tables.flatten(value)))]))
    if not blocks:
        blocks = _missing(["No provenance was recorded."])
    return Section("provenance", "Provenance", "Provenance", blocks)


def _document(run_dir: Path, metrics: Mapping[str, Any]) -> Document:
    arms = list(tables.ordered_arms(metrics))
    name = run_dir.resolve().name
    notes: list[str] = []
    if "paired" in metrics:  # of several seeds the pictures are those of the first
        run_dir = run_dir / f"seed-{metrics['provenance']['seeds']['training'][0]}"
    examples = _read_examples(run_dir, notes)
    return Document(
        title=f"Accuracy and interpretability: {name}",
        subtitle=f"{len(arms)} model{'s' if len(arms) > 1 else ''}: {', '.join(arms)}",
        sections=[
            _headline(metrics),
            _verdict(metrics),
            _tradeoff(metrics),
            _maps(run_dir, arms, examples, notes),
            _samples(run_dir, arms, examples, notes),
            _mass(metrics),
            _findings(metrics),
            _losses(run_dir, arms),
            *_localization_over_training(run_dir, arms),
            _cost(metrics),
            Section("meaning", "Meaning", "What the numbers mean", [tables.meaning_table(metrics)]),
            _provenance(metrics),
        ],
    )


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write report.html (one self-contained file) and report.md (with figures/*.png) from the files of a run folder.

    Reads metrics.json, and where they exist real/examples.jsonl with its images and each arm's maps.safetensors,
    samples/ and train_log.jsonl; what is missing is said in the report. All text from files is escaped.

    Returns:
        Paths of report.html and report.md.

    Raises:
        UserError: metrics.json is missing or no JSON.
        ValueError: metrics.json is not of the documented form (see `validate_metrics`).
    """
    document = _document(run_dir, _read_metrics(run_dir))
    for picture in pictures(document):
        write_atomic(run_dir / "figures" / f"{picture.name}.png", picture.png)
    return (
        write_atomic(run_dir / "report.html", render_html(document)),
        write_atomic(run_dir / "report.md", render_markdown(document)),
    )

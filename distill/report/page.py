"""report.html of a run folder."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from distill.evaluation.results import Results, parse_metrics
from distill.evaluation.word_maps import WORD_MAPS_FILE, WordMaps, read_word_maps
from distill.files import JsonObject, read_json, write_atomic
from distill.models.stock import code_of_arm
from distill.report import figures, tables
from distill.report.document import Picture, Section, Table
from distill.report.explanation import explanation_section
from distill.report.memorization import memorization_section
from distill.report.summary import RULE, difference_table, sample, summarize

_NO_CURVE = ("step", "grad_norm", "lr", "seconds", "epoch", "images", "pairs")  # columns of the logs
_OF_MAPS = (("auc", "AUC"), ("image_adds", "image adds"))


@dataclass(frozen=True)
class Example:
    """One held-out image.

    boxes: (finding, left, top, width, height) in percent. arms: drawn image and maps of each. words: those that every
    arm with maps has a map of. first: the one to show first, a finding's. pieces: see `WordMaps.pieces`.
    """

    caption: str
    image: Image.Image
    boxes: Sequence[tuple[Any, ...]]
    arms: Mapping[str, tuple[Image.Image | None, WordMaps | None]]
    words: Sequence[str]
    first: str
    pieces: Sequence[tuple[str, str | None]]


def _read_jsonl(path: Path, notes: list[str]) -> list[JsonObject]:
    """Objects of a JSON Lines file, without the lines that are none (the last line of a stopped run is often half)."""
    rows = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines() if path.is_file() else (), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (TypeError, ValueError):
            notes.append(f"Line {number} of {path.parent.name}/{path.name} is no JSON object and is left out.")
    return rows


def _read_examples(run_dir: Path, arms: Sequence[str], notes: list[str]) -> list[Example]:
    examples = []
    for number, row in enumerate(_read_jsonl(run_dir / "real" / "examples.jsonl", notes)):
        image, caption = figures.read_image(run_dir, str(row.get("image")), notes), str(row.get("caption"))
        if image is None:
            continue
        shown: dict[str, tuple[Image.Image | None, WordMaps | None]] = {}
        for arm in arms:
            has_samples, maps = (run_dir / arm / "samples").is_dir(), None
            drawn = figures.read_image(run_dir, f"{arm}/samples/{number:04d}.png", notes) if has_samples else None
            try:
                maps = read_word_maps(run_dir / arm, number)
            except (OSError, ValueError) as error:
                notes.append(f"{arm}/{WORD_MAPS_FILE} cannot be read: {error}.")
            shown[arm] = drawn, maps
        scale = [100 / image.width, 100 / image.height] * 2
        found = [(region["finding"], box) for region in row.get("regions") or () for box in region["boxes"] or ()]
        boxes = [(name, *(s * float(side) for s, side in zip(scale, box, strict=True))) for name, box in found]
        located = [maps for _, maps in shown.values() if maps]
        words = [word for word in located[0].maps if all(word in maps.maps for maps in located)] if located else []
        wanted = [word for maps in located for word in maps.findings.values()]
        first = next((word for word in [*wanted, *words] if word in words), "")
        pieces = located[0].pieces(caption) if located else [(caption, None)]
        pieces = [(text, word if word in words else None) for text, word in pieces]
        examples.append(Example(caption, image, boxes, shown, words, first, pieces))
    return examples


def _curves(run_dir: Path, arms: Sequence[str], name: str, notes: list[str]) -> figures.Curves:
    """What the log of each arm says."""
    curves: figures.Curves = {}
    for arm in arms:
        for row in _read_jsonl(run_dir / arm / name, notes):
            maps = [(key, value) for key, value in row.items() if isinstance(value, dict)]
            flat = row | {f"{key} {shown}": value.get(k) for key, value in maps for k, shown in _OF_MAPS}
            for term, value in flat.items():
                usable = type(value) in (int, float) and math.isfinite(value) and type(row.get("step")) is int
                if usable and term not in _NO_CURVE and not term.startswith("lr"):
                    curves.setdefault(arm, {}).setdefault(term, []).append((row["step"], value))
    return curves


def _sections(run_dir: Path, results: Results, charts: Sequence[Picture], notes: list[str]) -> list[Section]:
    arms = list(results.arms)
    losses = figures.curve_charts(_curves(run_dir, arms, "train_log.jsonl", notes), arms, "loss")
    looks = figures.curve_charts(_curves(run_dir, arms, "validation_log.jsonl", notes), arms, "validation")
    said = "Under each value stands its 95 % interval. Every model is measured on the same held-out images."
    differs = "The difference of two models on the same images, and what the rule of the first choice says of it."
    findings = [tables.finding_table(results, metric) for metric in tables.EACH_FINDING]
    more = [tables.results_table(results, tables.DETAILS), difference_table(results, tables.DETAILS)]
    meaning = Table(["metric", "meaning"], [*([m.label, m.meaning] for m in tables.METRICS), ["cost ↓", tables.COST]])
    sections = [
        Section("All models", [said], charts, [tables.results_table(results)]),
        memorization_section(run_dir, results, notes),
        explanation_section(run_dir, results, notes),
        Section("Differences", [differs], [], [difference_table(results)]),
        Section("Each finding", [tables.OF_FINDINGS], [], findings),
        Section("More measures", [], [], more, folded=True),
        Section("Training", results.notes, [*losses, *looks]),
        Section("Cost and size", [], [], [tables.cost_table(results)]),
        Section("What the numbers mean", ["↑ higher is better, ↓ lower is better."], [], [meaning]),
    ]
    missing = [Section("What is missing", list(dict.fromkeys(notes)))] if notes else []
    origin = Table(["key", "value"], list(tables.flatten(results.provenance)), name="provenance")
    shown = [section for section in sections if section.charts or any(table.rows for table in section.tables)]
    return [*shown, *missing, Section("Provenance", [], [], [origin], folded=True)]


def write_report(run_dir: Path) -> Path:
    """Write report.html, which is one self-contained file, from the files of a run folder.

    Reads metrics.json, and where they exist real/examples.jsonl with its images and each arm's word_maps.safetensors,
    samples/, train_log.jsonl and validation_log.jsonl. What cannot be read is said in the report. Raises UserError
    where metrics.json cannot be read, and ValueError where it is not of the documented form (see `parse_metrics`).
    """
    results, notes = parse_metrics(read_json(run_dir / "metrics.json")), list[str]()
    # Of several seeds the pictures are those of the first.
    files = next((f for seed in results.seeds[:1] if (f := run_dir / f"seed-{seed}").is_dir()), run_dir)
    summary = summarize(results)
    examples = _read_examples(files, list(results.arms), notes)
    charts = figures.tradeoff_charts(results, summary.arm)
    sections, code = _sections(files, results, charts[1:], notes), ""
    if summary.arm is not None:
        trained = results.arms[summary.arm].cost.train_seconds is not None
        code = code_of_arm(files, summary.arm, results.provenance.get("config") or {}, trained=trained)
    loader = jinja2.PackageLoader("distill.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    script = Path(__file__).with_name("page.js").read_text(encoding="utf-8")
    html = environment.get_template("page.html.j2").render(
        name=run_dir.resolve().name, summary=summary, sample=sample(results), rule=RULE, charts=charts[:1], code=code,
        examples=examples, sections=sections, figures=figures, script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    return write_atomic(run_dir / "report.html", html)

"""report.html of a run folder."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from distill.evaluation.results import Results, parse_metrics
from distill.evaluation.word_maps import WORD_MAPS_FILE, WordMaps, read_word_maps
from distill.files import JsonObject, read_json, write_atomic
from distill.models.stock import code_of_arm
from distill.report import figures, tables
from distill.report.document import Picture, Section, Table
from distill.report.memorization import memorization_section
from distill.report.summary import RULE, sample, summarize

_NO_CURVE = ("step", "grad_norm", "lr", "seconds", "epoch", "images", "pairs")  # columns of the logs
_OF_MAPS = (("auc", "AUC"), ("image_adds", "image adds"))


@dataclass(frozen=True)
class Example:
    """One held-out image. boxes: (finding, left, top, width, height) in percent. arms: image and maps of each."""

    number: int
    caption: str
    image: Image.Image
    boxes: list[tuple[Any, ...]]
    arms: dict[str, tuple[Image.Image | None, WordMaps | None]]

    @property
    def names(self) -> list[str]:
        """The words that every arm with maps has a map of."""
        each = [list(maps.maps) for _, maps in self.arms.values() if maps]
        return [name for name in each[0] if all(name in other for other in each)] if each else []

    @property
    def first(self) -> str:
        """The word to show first: a finding's."""
        wanted = [word for _, maps in self.arms.values() if maps for word in maps.findings.values()]
        return next((word for word in [*wanted, *self.names] if word in self.names), "")

    def pieces(self) -> list[tuple[str, str | None]]:
        """The caption in pieces with the word of each, see `WordMaps.pieces`."""
        found = next((maps.pieces(self.caption) for _, maps in self.arms.values() if maps), [(self.caption, None)])
        return [(text, word if word in self.names else None) for text, word in found]


def _read_image(run_dir: Path, name: str, notes: list[str]) -> Image.Image | None:
    path = (run_dir / name).resolve()
    try:
        if not path.is_relative_to(run_dir.resolve()):
            raise ValueError("outside the run folder")
        with Image.open(path) as image:
            returned: Image.Image | None = image.convert("RGB")
            return returned
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        notes.append(f"{name} cannot be read as an image: {type(error).__name__}.")
        return None


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
        image = _read_image(run_dir, str(row.get("image")), notes)
        shown: dict[str, tuple[Image.Image | None, WordMaps | None]] = {}
        for arm in arms if image else ():
            has_samples, maps = (run_dir / arm / "samples").is_dir(), None
            drawn = _read_image(run_dir, f"{arm}/samples/{number:04d}.png", notes) if has_samples else None
            try:
                maps = read_word_maps(run_dir / arm, number)
            except (OSError, ValueError) as error:
                notes.append(f"{arm}/{WORD_MAPS_FILE} cannot be read: {error}.")
            shown[arm] = drawn, maps
        if image:
            scale = [100 / image.width, 100 / image.height] * 2
            found = [(region["finding"], box) for region in row.get("regions") or () for box in region["boxes"] or ()]
            boxes = [(name, *(s * float(side) for s, side in zip(scale, box, strict=True))) for name, box in found]
            examples.append(Example(number, str(row.get("caption")), image, boxes, shown))
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
    found = (tables.difference_table(results), tables.mass_table(results))
    paired, mass = ([table] if table else [] for table in found)
    findings = [table for metric in tables.EACH_FINDING if (table := tables.finding_table(results, metric))]
    better = {1: "↑ higher", -1: "↓ lower", 0: "neither"}
    rows = [[m.name, better[m.direction], m.meaning] for m in tables.METRICS]
    meaning = Table(["metric", "better", "meaning"], [*rows, ["cost", better[-1], tables.COST]])
    more = [tables.results_table(results, tables.DETAILS), tables.difference_table(results, tables.DETAILS)]
    details = [table for table in more if table and len(table.head) > 1]
    said = "Under each value stands its 95 % interval. Every model is measured on the same held-out images."
    shares = "Attention mass is the part of all cross-attention that a group of tokens receives."
    differs = "The difference of two models on the same images. It is green or red where its interval excludes 0."
    sections = [
        Section("All models", [said, shares] if mass else [said], charts, [tables.results_table(results), *mass]),
        *memorization_section(run_dir, results),
        Section("Differences", [differs], [], paired),
        Section("Each finding", [tables.OF_FINDINGS], [], findings),
        Section("More measures", [], [], details, folded=True),
        Section("Training", results.notes, [*losses, *looks]),
        Section("Cost and size", [], [], [tables.cost_table(results)]),
        Section("What the numbers mean", [], [], [meaning]),
    ]
    missing = [Section("What is missing", list(dict.fromkeys(notes)))] if notes else []
    origin = Table(["key", "value"], list(tables.flatten(results.provenance)), name="provenance")
    shown = [section for section in sections if section.charts or section.tables]
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
    head = Section(summary.title, [*summary.reasons, sample(results)], charts[:1], summary.why)
    sections, code = _sections(files, results, charts[1:], notes), ""
    if summary.arm is not None:
        trained = results.arms[summary.arm].cost.train_seconds is not None
        code = code_of_arm(files, summary.arm, results.provenance.get("config") or {}, trained=trained)
    loader = jinja2.PackageLoader("distill.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    style, script = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    html = environment.get_template("page.html.j2").render(
        name=run_dir.resolve().name, head=head, summary=summary, rule=RULE, code=code, examples=examples,
        sections=sections, figures=figures, Markup=Markup, style=Markup(style), script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    return write_atomic(run_dir / "report.html", html)

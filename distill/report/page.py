"""report.html and report.md of a run folder."""

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
import numpy as np
from markupsafe import Markup
from PIL import Image
from safetensors import SafetensorError, safe_open

from distill.errors import UserError
from distill.files import write_atomic
from distill.report import card, figures, tables
from distill.report.document import Picture, Section, Table, escape_markdown, markdown_picture, markdown_section
from distill.report.document import markdown_table as md_table
from distill.report.results import Results, parse_metrics
from distill.report.summary import RULE, Summary, sample, summarize

# Columns of train_log.jsonl that are no loss.
_NO_LOSS = ("step", "grad_norm", "lr", "seconds", "epoch")


@dataclass(frozen=True)
class Maps:
    """Heat maps of one image in one arm. maps: name -> (height, width) uint8."""

    maps: Mapping[str, np.ndarray]
    spans: Mapping[str, Sequence[tuple[int, int]]]
    findings: Mapping[str, str]

    def strip(self, names: Sequence[str]) -> tuple[int, str]:
        """Height of a map, and all maps of `names` below each other as a data URI."""
        return len(self.maps[names[0]]), figures.sprite([self.maps[name] for name in names])


@dataclass(frozen=True)
class Example:
    """One held-out image. boxes: (finding, left, top, width, height) in percent. words: (text, name of its map or None)."""

    caption: str
    image: Image.Image
    boxes: tuple[tuple[str, float, float, float, float], ...]
    arms: Mapping[str, tuple[Image.Image | None, Maps]]

    @property
    def real(self) -> str:
        """The image as a data URI."""
        return figures.data_uri(self.image)

    @property
    def names(self) -> list[str]:
        """Names of the maps that every arm has."""
        each = [list(maps.maps) for _, maps in self.arms.values() if maps.maps]
        return [name for name in each[0] if all(name in other for other in each)] if each else []

    @property
    def first(self) -> str | None:
        """The map to show first: of a finding's word."""
        wanted = [name for _, maps in self.arms.values() for name in maps.findings.values() if name in self.names]
        return wanted[0] if wanted else self.names[0] if self.names else None

    def words(self) -> list[tuple[str, str | None]]:
        """The caption in pieces, and the maps that belong to no piece of it."""
        spans = next((maps.spans for _, maps in self.arms.values() if maps.maps), {})
        marked = sorted((start, end, name) for name in self.names for start, end in spans.get(name, ()))
        pieces: list[tuple[str, str | None]] = []
        at = 0
        for start, end, name in marked:
            if start >= at:
                pieces += [(self.caption[at:start], None), (self.caption[start:end], name)]
                at = end
        pieces.append((self.caption[at:], None))
        for name in self.names:
            pieces += [(" ", None), (name, name)] if not spans.get(name) else []
        return pieces


def _inside(run_dir: Path, *parts: str) -> Path:
    """run_dir/parts; UserError where that leads out of the run folder."""
    path = run_dir.joinpath(*parts).resolve()
    if not path.is_relative_to(run_dir.resolve()):
        raise UserError(f"{'/'.join(parts)} is outside the run folder {run_dir.name}")
    return path


def _read_image(run_dir: Path, notes: list[str], *parts: str) -> Image.Image | None:
    try:
        with Image.open(_inside(run_dir, *parts)) as image:
            converted: Image.Image = image.convert("RGB")
            return converted
    except (UserError, OSError, ValueError, Image.DecompressionBombError):
        notes.append(f"{'/'.join(parts)} cannot be read as an image of this run folder.")
        return None


def _read_jsonl(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Objects of a JSON Lines file, without the lines that are none (the last line of a stopped run is often half)."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
        except ValueError:
            notes.append(f"Line {number} of {path.parent.name}/{path.name} is no JSON and is left out.")
    return rows


def _read_maps(run_dir: Path, arm: str, number: int, row: Mapping[str, Any], notes: list[str]) -> Maps:
    """Of word_maps.safetensors, else the findings' maps of maps.safetensors."""
    for name, key in (("word_maps", str(number)), ("maps", row["id"])):
        path = _inside(run_dir, arm, f"{name}.safetensors")
        try:
            with safe_open(path, "np") as file:
                about = json.loads((file.metadata() or {}).get(key, "{}"))
                keys = [k for k in file.keys() if k.startswith(f"{key}/")]  # noqa: SIM118
                found = {k[len(key) + 1 :]: file.get_tensor(k) for k in keys}
        except FileNotFoundError:
            continue
        except (SafetensorError, OSError, ValueError) as error:
            notes.append(f"{arm}/{path.name} cannot be read: {error}.")
            continue
        order = [word for word in about.get("words", found) if word in found]
        scaled = {w: found[w] if name == "word_maps" else np.nan_to_num(255 * found[w]).astype(np.uint8) for w in order}
        return Maps(scaled, about.get("words", {}), about.get("findings", {w: w for w in order}))
    return Maps({}, {}, {})


def _read_examples(run_dir: Path, arms: Sequence[str], notes: list[str]) -> list[Example]:
    path, examples = run_dir / "real" / "examples.jsonl", []
    for number, row in enumerate(_read_jsonl(path, notes) if path.is_file() else ()):
        if (image := _read_image(run_dir, notes, str(row.get("image")))) is None:
            continue
        (width, height), boxes = image.size, []
        for region in row.get("regions") or ():
            for left, top, across, down in region.get("boxes") or ():
                sides = (left / width, top / height, across / width, down / height)
                if all(map(math.isfinite, sides)):
                    boxes.append((str(region["finding"]), *(100.0 * side for side in sides)))
        shown = {}
        for arm in arms:
            drawn = _read_image(run_dir, notes, arm, "samples", f"{number:04d}.png")
            shown[arm] = (drawn, _read_maps(run_dir, arm, number, row, notes))
        examples.append(Example(str(row.get("caption")), image, tuple(boxes), shown))  # type: ignore[arg-type]
    return examples


def _curves(
    run_dir: Path, arms: Sequence[str], name: str, notes: list[str]
) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """{arm: {term: [(step, value)]}} of each arm's log."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for arm in arms:
        path = _inside(run_dir, arm, name)
        for row in _read_jsonl(path, notes) if path.is_file() else ():
            flat = {term: value for term, value in row.items() if term not in _NO_LOSS and not term.startswith("lr")}
            flat |= {
                f"{token} AUC": row[token].get("auc") for token in ("word", "eos") if isinstance(row.get(token), dict)
            }
            for term, value in flat.items():
                number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
                if number and term not in ("images", "pairs") and isinstance(row.get("step"), int):
                    found.setdefault(arm, {}).setdefault(term, []).append((row["step"], float(value)))
    return found


def _sections(run_dir: Path, results: Results, charts: Sequence[Picture], notes: list[str]) -> list[Section]:
    arms = list(results.arms)
    losses = figures.curve_charts(_curves(run_dir, arms, "train_log.jsonl", notes), arms, "loss", smooth=True)
    localized = figures.curve_charts(_curves(run_dir, arms, "localization_log.jsonl", notes), arms, "localization")
    optional = [t for t in (tables.difference_table(results), tables.mass_table(results)) if t]
    findings = [t for t in (tables.finding_table(results),) if t]
    directions = {1: "↑ higher", -1: "↓ lower", 0: "neither"}
    meaning = Table(
        ["metric", "better", "meaning"], [[m.name, directions[m.direction], m.meaning] for m in tables.METRICS]
    )
    origin = Table(["key", "value"], list(tables.flatten(results.provenance)), name="provenance")
    said = ["Under each value stands its 95 % interval. Every model is measured on the same held-out images."]
    paired = ["A difference is green or red where its interval excludes 0. Attention mass adds up to 1."]
    sections = [Section("numbers", "All models", said, charts[1:], [tables.results_table(results)])]
    sections += [Section("differences", "Differences and attention mass", paired, tables=optional)] if optional else []
    sections += (
        [Section("findings", "Word AUC of each finding", ["Few pairs, wide margins."], tables=findings)]
        if findings
        else []
    )
    sections += [Section("training", "Training", (), [*losses, *localized])] if losses or localized else []
    sections.append(Section("cost", "Cost and size", tables=[tables.cost_table(results)]))
    sections.append(Section("meaning", "What the numbers mean", tables=[meaning]))
    sections += [Section("missing", "What is missing", list(dict.fromkeys(notes)))] if notes else []
    return [*sections, Section("provenance", "Provenance", tables=[origin], folded=True)]


def _loading(run_dir: Path, results: Results, arm: str | None, notes: list[str]) -> str | None:
    """The code that loads `arm`, None where the run folder does not hold its weights."""
    config = results.provenance.get("config")
    base = dict(tables.flatten(config)).get("base.name") if isinstance(config, Mapping) else None
    if arm is None or base is None:
        return None
    folder = next((f for f in (run_dir / arm, run_dir) if card.exported(f)), run_dir / arm)
    parts = card.exported(folder)
    if not parts and results.arms[arm].cost.train_seconds is not None:
        return None
    return card.loading_code(base, folder, parts, card.example_prompt(run_dir), config)


def _grid(number: int, example: Example) -> Picture:
    columns: dict[str, Any] = {"real": [(example.image, None)]}
    for arm, (drawn, maps) in example.arms.items():
        columns[arm] = [*([(drawn, None)] if drawn else []), (example.image, maps.maps.get(example.first or ""))]
    alt = f"Real image, generated images, and the map of “{example.first}” in each model"
    return figures.example_grid(f"example_{number}", alt, columns)


def _markdown(
    summary: Summary, facts: str, code: str | None, charts: Sequence[Picture], grids: Any, sections: Any
) -> str:
    parts = [f"# {escape_markdown(summary.title)}", *map(escape_markdown, summary.reasons)]
    parts += [md_table(summary.why)] if summary.why else []
    parts += [escape_markdown(f"{facts} {RULE}"), *map(markdown_picture, charts)]
    parts += [f"```python\n{code}\n```"] if code else []
    for caption, picture in grids:
        parts += [f"> {escape_markdown(caption)}", markdown_picture(picture)]
    return "\n\n".join([*parts, *map(markdown_section, sections)]) + "\n"


def write_report(run_dir: Path) -> tuple[Path, Path]:
    """Write report.html (one self-contained file) and report.md (with figures/*.png) from the files of a run folder.

    Reads metrics.json, and where they exist real/examples.jsonl with its images and each arm's word_maps.safetensors or
    maps.safetensors, samples/, train_log.jsonl and localization_log.jsonl. What cannot be read is said in the report.

    Raises:
        UserError: metrics.json is missing or no JSON.
        ValueError: metrics.json is not of the documented form (see `parse_metrics`).
    """
    path = run_dir / "metrics.json"
    try:
        results = parse_metrics(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"no {path}: evaluate the run first, the report is made from this file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON: {error}") from None
    seed_dir = run_dir / f"seed-{results.seeds[0]}" if results.seeds else run_dir
    files = seed_dir if seed_dir.is_dir() else run_dir
    notes: list[str] = []
    summary, facts = summarize(results), sample(results)
    examples = _read_examples(files, list(results.arms), notes)
    charts = figures.tradeoff_charts(results, summary.arm)
    sections = _sections(files, results, charts, notes)
    code = _loading(files, results, summary.arm, notes)
    grids = [(example.caption, _grid(number, example)) for number, example in enumerate(examples)]
    for picture in (
        *charts[:1],
        *(c for section in sections for c in section.charts),
        *(picture for _, picture in grids),
    ):
        write_atomic(run_dir / "figures" / f"{picture.name}.png", picture.png)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("distill.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    style, script = ((Path(__file__).parent / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    html = environment.get_template("page.html.j2").render(
        summary=summary, facts=facts, rule=RULE, code=code, charts=charts, examples=examples, sections=sections,
        name=run_dir.resolve().name, style=Markup(style), script=Markup(script), Markup=Markup, figures=figures,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    markdown = _markdown(summary, facts, code, charts[:1], grids, sections)
    return write_atomic(run_dir / "report.html", html), write_atomic(run_dir / "report.md", markdown)

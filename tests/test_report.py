"""The report says what the files of a run folder say, whatever they hold and whatever they lack."""

from __future__ import annotations

import copy
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file
from tiny import save_tiny, tiny_sd

from distill.errors import UserError
from distill.report import terminal_table, validate_metrics, write_model_card, write_report
from distill.report.card import loading_code
from distill.report.document import UNKNOWN, escape_markdown
from distill.report.tables import (
    FID,
    METRICS,
    WORD_AUC,
    Estimate,
    compare,
    comparison_table,
    cost_table,
    finding_table,
    format_estimate,
    format_seconds,
    headline_table,
)
from distill.report.verdicts import outcomes, verdicts

FINDINGS = ("edema", "pleural effusion", "pneumothorax")
# name: (word AUC, EOS AUC, FID, finding AUC, mass of words and EOS)
ARMS = {
    "frozen": (0.86, 0.71, 31.0, 0.81, 0.52, 0.14),
    "learnable": (0.66, 0.79, 18.4, 0.90, 0.21, 0.33),
    "distilled": (0.85, 0.70, 19.1, 0.90, 0.50, 0.15),
    "lora": (0.83, 0.72, 24.6, 0.86, 0.47, 0.17),
    "base": (0.58, 0.57, 142.0, 0.55, 0.40, 0.20),
}
HOSTILE = "<script>alert('x')</script> | `code` ![p](http://evil.example/x) <img src=http://evil.example/y> **b** $a$"


def _tokens(auc: float) -> dict[str, Any]:
    values = {"auc": auc, "cnr": 4 * (auc - 0.5), "top1": auc - 0.3, "iou": auc - 0.5}
    per_finding = {name: {**values, "auc": auc + 0.02 * k - 0.02, "pairs": 40 + k} for k, name in enumerate(FINDINGS)}
    intervals = {f"{name}_ci": [value - 0.02, value + 0.025] for name, value in values.items()}
    return {**values, **intervals, "images": 100, "pairs": 123, "per_finding": per_finding}


def _quality(fid: float, finding_auc: float) -> dict[str, Any]:
    return {
        "fid": fid,
        "fid_ci": [0.93 * fid, 1.08 * fid],
        "finding_auc": finding_auc,
        "finding_auc_ci": [finding_auc - 0.02, finding_auc + 0.02],
        "diversity": 0.431,
        "images": 200,
        "features": "phantom",
    }


def make_metrics(arms: tuple[str, ...] = tuple(ARMS)) -> dict[str, Any]:
    """Plausible numbers in which the trade-off shows and distillation mends it."""
    entries = {}
    for name in arms:
        auc, eos, fid, finding_auc, words, end = ARMS.get(name, ARMS["lora"])
        mass = {"bos": 0.22, "words": words, "eos": end, "padding": 1 - 0.22 - words - end}
        trained = name != "base"
        entries[name] = {
            "localization": {"word": _tokens(auc), "eos": _tokens(eos), "padding": _tokens(eos - 0.05), "mass": mass},
            "quality": _quality(fid, finding_auc),
            "cost": {
                "train_seconds": 84.3 if trained else None,
                "steps": 500 if trained else None,
                "peak_memory_gb": 2.31,
                "evaluation_seconds": 41.0,
                "trainable_parameters": 2_345_678 if trained else None,
            },
        }
    real = {"quality": {**_quality(4.2, 0.97), "diversity": None}}
    provenance = {
        "commit": "0123abc",
        "device": "cpu",
        "seed": 0,
        "started": "2025-01-02T03:04:05Z",
        "versions": {"python": "3.11", "torch": "2.13"},
        "config": {"evaluation": {"iou_threshold": 0.5, "timesteps": [100, 400]}, "trainer": {"max_steps": 500}},
        "seconds": {"cache latents": 12.0, "frozen: training": 84.3},
        "peak_memory_gb": 2.31,
    }
    return {"arms": entries, "real": real, "provenance": provenance}


def _picture(rng: np.random.Generator, size: int) -> Image.Image:
    """Two dark lungs in a bright body, so that a person who looks at the page sees what is where."""
    y, x = np.mgrid[:size, :size] / size
    lungs = sum(np.exp(-(((x - c) / 0.13) ** 2) - (((y - 0.5) / 0.27) ** 2)) for c in (0.3, 0.7))
    gray = 60 + 120 * np.exp(-(((x - 0.5) / 0.4) ** 4) - (((y - 0.55) / 0.5) ** 4)) - 90 * lungs
    return Image.fromarray(np.uint8(np.clip(gray + rng.normal(0, 6, (size, size)), 0, 255)))


def make_run(
    run_dir: Path, arms: tuple[str, ...] = tuple(ARMS), captions: tuple[str, ...] | None = None, size: int = 64
) -> Path:
    """A whole run folder as the recipes leave it."""
    rng = np.random.default_rng(0)
    captions = captions or ("Small left pleural effusion. No pneumothorax.", "Mild edema in both lungs.")
    (run_dir / "real").mkdir(parents=True)
    lines = []
    for number, caption in enumerate(captions):
        _picture(rng, size).save(run_dir / "real" / f"{number:04d}.png")
        regions = [
            {"finding": FINDINGS[(number + k) % 3], "boxes": [[size * (0.15 + 0.4 * k), size / 3, size / 4, size / 3]]}
            for k in range(1 + number % 2)
        ]
        line = {"id": f"test-{number}", "image": f"real/{number:04d}.png", "caption": caption, "regions": regions}
        lines.append(json.dumps(line))
    (run_dir / "real" / "examples.jsonl").write_text("\n".join(lines) + "\n")
    for arm in arms:
        (run_dir / arm / "samples").mkdir(parents=True)
        maps = {}
        for number, line in enumerate(lines):
            _picture(rng, size).save(run_dir / arm / "samples" / f"{number:04d}.png")
            for region in json.loads(line)["regions"]:
                x, y, width, height = (side / size for side in region["boxes"][0])
                rows, columns = np.mgrid[:16, :16] / 16
                blob = np.exp(-((rows - y - height / 2) ** 2 + (columns - x - width / 2) ** 2) / 0.03)
                noisy = blob + rng.random((16, 16)) * (1.5 if arm in ("learnable", "base") else 0.3)
                maps[f"test-{number}/{region['finding']}"] = (noisy / noisy.max()).astype(np.float32)
        save_file(maps, run_dir / arm / "maps.safetensors")
        if arm == "base":
            continue
        with open(run_dir / arm / "train_log.jsonl", "w") as file:
            for step in range(10, 501, 10):
                row = {"step": step, "loss": 0.3 + 2 / step + 0.02 * rng.random(), "grad_norm": 1.0, "lr": 1e-4}
                row["denoising"] = row["loss"]
                if arm in ("distilled", "lora"):
                    row |= {"token_kl": 3 / step * (1 + 0.3 * rng.random()), "attention_mass": 1 / step}
                file.write(json.dumps({**row, "seconds": 0.2 * step}) + "\n")
    (run_dir / "metrics.json").write_text(json.dumps(make_metrics(arms)))
    return run_dir


class Page(HTMLParser):
    """Tags, attributes, text, and the rows of each table of an HTML page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: dict[str, int] = {}
        self.pictures: dict[str, int] = {}
        self._section = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        counted = {"tr": self.rows, "img": self.pictures, "svg": self.pictures}.get(tag)
        if counted is not None:
            counted[self._section] = counted.get(self._section, 0) + 1

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("run") / "tradeoff")
    write_report(run_dir)
    return run_dir


# -------------------------------------------------------------------------------------------------------------- report


def test_full_report_holds_every_row_and_picture(full_run: Path) -> None:
    page = Page(full_run / "report.html")
    # header + five arms + real; header + three findings; two examples with one and two regions, a header each
    assert page.rows["table"] == 1 + 5 + 1
    assert page.rows["findings"] == 1 + 3
    assert page.rows["maps"] == 2 + 3
    assert page.pictures["maps"] == 3 * (1 + 5)
    assert page.rows["samples"] == 1 + 1 + 5 + 1
    assert page.pictures["samples"] == 2 * (1 + 5)
    assert page.pictures["tradeoff"] == page.pictures["mass"] == page.pictures["losses"] == 1
    assert page.rows["cost"] == (1 + 5) + (1 + 2 + 1)
    assert page.rows["meaning"] == 1 + len(METRICS) + 3
    for shown in ("0123abc", "evaluation.timesteps", "100, 400", "cache latents", "Threshold here: 0.5"):
        assert shown in page.text
    assert "missing" not in page.source.split("<main>")[1].split("<section")[0]
    assert 'class="missing"' not in page.source


def test_markdown_links_exactly_the_pictures_that_were_written(full_run: Path) -> None:
    linked = set(re.findall(r"\]\((.*?)\)", (full_run / "report.md").read_text(encoding="utf-8")))
    written = {f"figures/{path.name}" for path in (full_run / "figures").iterdir()}
    assert linked == written
    for name in written:
        with Image.open(full_run / name) as image:
            assert max(image.size) >= 64


def test_nothing_temporary_is_left(full_run: Path) -> None:
    assert not [path for path in full_run.rglob("*") if path.name.endswith(".tmp")]
    assert {path.name for path in full_run.iterdir()} == {
        *ARMS, "real", "figures", "metrics.json", "report.html", "report.md"
    }  # fmt: skip


def test_page_loads_nothing_and_runs_nothing(full_run: Path) -> None:
    page = Page(full_run / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert (value or "").startswith(("#", "data:image/png;base64,")), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)", page.source)
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', page.source))
    assert references <= set(identifiers)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    arm, finding = "<b>arm</b> $x|", "<script>f</script> | `"
    run_dir = make_run(tmp_path / "run <i>", arms=("base",), captions=(HOSTILE, "plain"))
    metrics = make_metrics(("base", arm))
    metrics["arms"]["base"]["localization"]["word"]["per_finding"][finding] = _tokens(0.7)
    metrics["provenance"][HOSTILE] = {"nested": HOSTILE}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    html_path, markdown_path = write_report(run_dir)

    page = Page(html_path)
    assert not {tag for tag, _ in page.tags} & {"script", "i", "b"}
    assert HOSTILE in page.text and arm in page.text and finding in page.text
    assert not [source for tag, attributes in page.tags if (source := attributes.get("src") or "").startswith("http")]

    markdown = markdown_path.read_text(encoding="utf-8")
    assert "<script" not in markdown and "<img" not in markdown and "<b>" not in markdown
    assert not re.search(r"(?<!\\)`", markdown)
    assert not re.search(r"!\[[^]]*\]\(http", markdown)
    tables = [line for line in markdown.splitlines() if line.startswith("| ")]
    columns = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    starts = [index for index, line in enumerate(tables) if index and re.fullmatch(r"\|( -+:? \|)+", line)]
    assert starts
    expected = 0
    for index, count in enumerate(columns):
        expected = count if index + 1 in starts else expected
        assert count == expected, tables[index]


@given(st.text())
def test_escaped_markdown_is_one_line_without_markup(text: str) -> None:
    escaped = escape_markdown(text)
    assert len(escaped.splitlines()) <= 1
    assert "<" not in escaped and ">" not in escaped
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*\[\]]", re.sub(r"\\[|`*\[\]]", "", escaped))


def test_pictures_outside_the_run_folder_are_not_read(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", arms=("base",))
    Image.new("L", (64, 64)).save(tmp_path / "secret.png")
    lines = (run_dir / "real" / "examples.jsonl").read_text().replace("real/0000.png", "../secret.png")
    (run_dir / "real" / "examples.jsonl").write_text(lines)
    page = Page(write_report(run_dir)[0])
    assert "../secret.png cannot be read as an image of this run folder." in page.text


@pytest.mark.parametrize("arms", [("model",), ("base",), ("base", "model")])
def test_a_run_of_one_model(tmp_path: Path, arms: tuple[str, ...]) -> None:
    run_dir = make_run(tmp_path / "one", arms=arms)
    metrics = make_metrics(arms)
    del metrics["real"]
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    html_path, markdown_path = write_report(run_dir)
    page = Page(html_path)
    assert page.rows["table"] == 1 + len(arms)
    assert ("no other to compare" in page.text) == (len(arms) == 1)
    assert ("Nothing was trained" in page.text) == (arms == ("base",))
    assert markdown_path.is_file()


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    metrics = make_metrics()
    for entry in metrics["arms"].values():
        entry["quality"] = None
        entry["localization"] = {"word": None, "eos": None, "padding": None, "mass": None}
    run_dir = tmp_path / "bare"
    run_dir.mkdir()
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    page = Page(write_report(run_dir)[0])
    for said in (
        "FID was not computed",
        "word AUC was not computed",
        "real/examples.jsonl is missing",
        "distilled has no attention maps",
        "No arm has an attention mass",
        "there is nothing to plot",
        "No arm has localization numbers of single findings",
        "No training log",
        "cannot be told",
    ):
        assert said in page.text, said
    assert not re.search(r"\bnan\b", page.text.lower()) and "None" not in page.text


def test_damaged_files_are_said_and_do_not_stop_the_report(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "damaged", arms=("frozen", "learnable"))
    with open(run_dir / "frozen" / "train_log.jsonl", "a") as file:
        file.write('{"step": 510, "loss": NaN}\n{"step": 520, "lo')
    (run_dir / "learnable" / "maps.safetensors").write_bytes(b"no safetensors")
    save_file({"test-0/edema": np.full((4, 4), np.nan, np.float32)}, run_dir / "frozen" / "maps.safetensors")
    (run_dir / "real" / "0001.png").write_bytes(b"no picture")
    (run_dir / "frozen" / "samples" / "0000.png").write_bytes(b"no picture")
    with open(run_dir / "real" / "examples.jsonl", "a") as file:
        file.write(
            '{"id": "x"}\n{"id": "y", "image": "i", "caption": "c", "regions": [{"finding": "f", "boxes": [1]}]}\n'
        )
    page = Page(write_report(run_dir)[0])
    for said in (
        "1 line(s) of frozen/train_log.jsonl",
        "attention maps of learnable cannot be read",
        "1 map(s) of frozen are not",
        "real/0001.png cannot be read",
        "An entry of real/examples.jsonl is not as documented",
    ):
        assert said in page.text, said


def test_metrics_file_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="evaluate the run first"):
        write_report(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        write_report(tmp_path)
    metrics = make_metrics(("base",))
    metrics["arms"]["base"]["quality"]["fid"] = float("nan")
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match=re.escape("metrics.arms.base.quality.fid: must be finite")):
        write_report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.json"}


# -------------------------------------------------------------------------------------------------------------- tables


def _render(metrics: dict[str, Any], width: int) -> list[str]:
    console = Console(width=width, color_system=None, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(terminal_table(metrics))
    return console.export_text().splitlines()


def test_terminal_table_is_one_line_a_row_in_120_columns() -> None:
    lines = _render(make_metrics(), 120)
    assert max(map(len, lines)) <= 120
    row = next(line for line in lines if line.startswith(" frozen"))
    assert ".860 ±.025" in row and "31.0 ±2.5" in row and row.rstrip().endswith("1m24s")
    # In a narrow one the interval goes under its value, and nothing is cut.
    narrow = "\n".join(_render(make_metrics(), 80))
    assert "learnable" in narrow and "±11.4" in narrow and "…" not in narrow


def test_terminal_table_shows_nulls_as_a_dash_and_names_as_they_are() -> None:
    metrics = make_metrics(("[red]x[/red]",))
    metrics["arms"]["[red]x[/red]"]["quality"] = None
    del metrics["real"]
    row = next(line for line in _render(metrics, 140) if line.startswith(" [red]x[/red]"))
    assert row.split()[-5:] == ["-", "-", "-", "500", "1m24s"]


def test_headline_rows_and_best() -> None:
    table = headline_table(make_metrics())
    assert [row[0] for row in table.rows] == ["base", "frozen", "learnable", "distilled", "lora", "real"]
    assert {len(row) for row in table.rows} == {len(table.head)}
    fid = [name for name in table.head].index("FID ↓")
    assert [row[0] for row in table.rows if row[fid].strong] == ["learnable"]  # type: ignore[union-attr]


def test_findings_of_any_arm_have_a_row() -> None:
    metrics = make_metrics(("base", "frozen"))
    metrics["arms"]["base"]["localization"]["word"] = None
    metrics["arms"]["frozen"]["localization"]["word"]["per_finding"]["edema"]["auc"] = None
    table = finding_table(metrics)
    assert table is not None
    assert [row[0] for row in table.rows] == list(FINDINGS)
    assert table.rows[0][2:] == [UNKNOWN, UNKNOWN]


def test_format() -> None:
    assert format_estimate(Estimate(0.842, 0.83, 0.853), unit=True) == (".842", "[.830, .853]")
    assert format_estimate(Estimate(-0.234, -0.3, 0.1), unit=False) == ("-.23", "[-.30, .10]")
    assert format_estimate(Estimate(118.94, 100, 130), unit=False) == ("118.9", "[100.0, 130.0]")
    assert format_estimate(Estimate(1.0, None, None), unit=True) == ("1.000", "")
    assert format_estimate(Estimate(None, None, None), unit=True) == (UNKNOWN, "")
    assert [format_seconds(s) for s in (None, 8.23, 59.7, 252, 3780)] == [UNKNOWN, "8.2s", "1m00s", "4m12s", "1h03m"]


# ------------------------------------------------------------------------------------------------------------ verdicts


def test_comparison_follows_the_intervals_and_the_direction() -> None:
    arms = make_metrics()["arms"]
    assert compare(arms["learnable"], arms["frozen"], FID) == "better"
    assert compare(arms["frozen"], arms["learnable"], FID) == "worse"
    assert compare(arms["learnable"], arms["frozen"], WORD_AUC) == "worse"
    assert compare(arms["distilled"], arms["frozen"], WORD_AUC) == "overlap"
    arms["frozen"]["quality"]["fid_ci"] = None
    assert compare(arms["learnable"], arms["frozen"], FID) is None


def test_every_pair_is_compared_once() -> None:
    table = comparison_table(make_metrics())
    assert table is not None
    names = [str(row[0]) for row in table.rows]
    assert len(names) == len(set(names)) == 4 + 3 + 2
    assert "learnable against frozen" in names and "frozen against learnable" not in names
    assert comparison_table(make_metrics(("model",))) is None


def _said(metrics: dict[str, Any]) -> dict[str, str]:
    said: dict[str, str] = {}
    for outcome in outcomes(metrics, verdicts(metrics)):
        said[outcome.subject] = f"{said.get(outcome.subject, '')} {outcome.answer}: {outcome.sentence}".strip()
    return said


def test_sentences_follow_from_the_numbers() -> None:
    metrics = make_metrics()
    said = _said(metrics)
    assert said["trade-off"].startswith("shows:") and "learnable 18.4 [17.1, 19.9], frozen 31.0" in said["trade-off"]
    assert said["distilled"].startswith("5 of 5 hopes hold: It shows all that one hopes for. In 3 of them")
    # Its FID is worse than that of learnable.
    assert said["lora"].startswith("4 of 5 hopes hold: It does not show all that one hopes for.")
    assert said["learnable"].count("leaks: ") == 2 and "EOS AUC .790" in said["learnable"]

    turned = copy.deepcopy(metrics)
    turned["arms"]["distilled"]["localization"]["word"] = _tokens(0.6)
    said = _said(turned)
    assert "Does distilled keep the localization (word AUC) of frozen? No (" in said["distilled"]
    assert "Is localization (word AUC) of distilled better than of learnable? No, it is worse" in said["distilled"]

    equal = copy.deepcopy(metrics)
    equal["arms"]["learnable"] = copy.deepcopy(equal["arms"]["frozen"])
    said = _said(equal)
    assert said["trade-off"].startswith("does not show:") and "FID not clearly different" in said["trade-off"]
    assert "learnable" not in said


def test_one_trained_arm_is_asked_about_its_base() -> None:
    metrics = make_metrics(("base", "model"))
    assert _said(metrics) == {"model": "3 of 3 hopes hold: It shows all that one hopes for."}
    metrics["arms"]["model"]["quality"] = None
    assert _said(metrics)["model"].endswith("2 more could not be told.")


# -------------------------------------------------------------------------------------------------------------- schema


def test_schema_accepts_what_recipes_write() -> None:
    validate_metrics(make_metrics())
    validate_metrics(make_metrics(("model",)))
    metrics = make_metrics()
    metrics["arms"]["frozen"]["quality"] |= {"fid": None, "fid_ci": None, "inception_fid": 3.2}
    metrics["arms"]["frozen"]["localization"] = None
    del metrics["real"]
    validate_metrics(metrics)


def test_sizes_stand_beside_costs_where_they_are_known() -> None:
    metrics = make_metrics(("frozen", "model"))
    assert "stored" not in cost_table(metrics).head
    metrics["arms"]["model"]["size"] = {
        "denoiser_parameters": 482_346_884,
        "text_encoder_parameters": 123_060_480,
        "denoiser_gflops": 421.06,
        "denoiser_passes_an_image": 4,
        "megabytes": 1210.8,
    }
    validate_metrics(metrics)
    table = cost_table(metrics)
    frozen, model = table.rows
    assert model[-5:] == ["482,346,884", "123,060,480", "421.06", "4", "1,210.8 MB"]
    assert frozen[-5:] == [UNKNOWN] * 5 and len(frozen) == len(model) == len(table.head)
    metrics["arms"]["model"]["size"]["megabytes"] = -1
    with pytest.raises(ValueError, match="megabytes: must be within"):
        validate_metrics(metrics)


DELETE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("arms", DELETE, "metrics.arms: is missing"),
        ("arms", {}, "metrics.arms: is empty"),
        ("provenance", None, "metrics.provenance: must be an object"),
        ("arms.frozen.localization.word.auc", DELETE, "metrics.arms.frozen.localization.word.auc: is missing"),
        ("arms.frozen.localization.word.auc", 84.2, r"word.auc: must be within \[0, 1\], is 84.2"),
        ("arms.frozen.localization.word.auc", "0.8", "word.auc: must be a number, is str"),
        ("arms.frozen.localization.word.auc", True, "word.auc: must be a number, is bool"),
        ("arms.frozen.localization.word.auc", None, "word.auc_ci: is an interval, but auc is null"),
        ("arms.frozen.localization.word.cnr", float("nan"), "word.cnr: must be finite or null, is nan"),
        ("arms.frozen.localization.word.cnr_ci", [1.0, 0.5], "word.cnr_ci: low end 1 is above high end 0.5"),
        ("arms.frozen.localization.word.cnr_ci", [1.0], r"word.cnr_ci: must be \[low, high\]"),
        ("arms.frozen.localization.word.cnr_ci", [0.0, float("inf")], r"word.cnr_ci\[1\]: must be finite"),
        ("arms.frozen.localization.word.images", 1.5, "word.images: must be a whole number"),
        ("arms.frozen.localization.word.per_finding.edema.pairs", -1, "edema.pairs: must be a whole number"),
        ("arms.frozen.localization.mass.eos", DELETE, "mass.eos: is missing"),
        ("arms.frozen.cost", None, "metrics.arms.frozen.cost: must be an object, is null"),
        ("arms.frozen.cost.train_seconds", -1.0, "train_seconds: must be within"),
        ("arms.frozen.quality.features", 3, "quality.features: must be a string, is int"),
        ("arms.frozen.quality.extra", {"deep": [float("inf")]}, r"quality.extra.deep\[0\]: must be finite"),
        ("real.quality.fid", [1], "metrics.real.quality.fid: must be a number, is list"),
        ("provenance.seed", float("inf"), "metrics.provenance.seed: must be finite"),
        ("provenance.seconds", {"training": "long"}, "metrics.provenance.seconds.training: must be a number, is str"),
        ("provenance.device", Path("x"), "metrics.provenance.device: is no JSON value"),
    ],
)
def test_schema_names_the_first_wrong_key(path: str, value: Any, message: str) -> None:
    metrics = make_metrics()
    *parents, last = path.split(".")
    entry = metrics
    for key in parents:
        entry = entry[key]
    if value is DELETE:
        del entry[last]
    else:
        entry[last] = value
    with pytest.raises(ValueError, match=message):
        validate_metrics(metrics)


# ---------------------------------------------------------------------------------------------------------------- card


def _card(arm_dir: Path, export: dict[str, str], base_name: str = "phantom") -> str:
    metrics = make_metrics()
    config = {"method": "lora", "text_encoder": "lora", "lora": {"rank": 8, "alpha": 16.0}, "seed": 0}
    path = write_model_card(
        arm_dir, metrics["arms"]["lora"], config, metrics["provenance"], base_name=base_name, export=export
    )
    return path.read_text(encoding="utf-8")


def test_card_front_matter_is_yaml_for_any_base_name(tmp_path: Path) -> None:
    for base_name in ("stabilityai/stable-diffusion-2-1", 'a "b": {c}\n---\nd: e'):
        card = _card(tmp_path / "lora", {"lora": "pytorch_lora_weights.safetensors"}, base_name)
        matter = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])  # type: ignore[index]
        assert matter["base_model"] == base_name
        assert matter["library_name"] == "diffusers" and "lora" in matter["tags"]


def test_card_holds_numbers_limits_and_seeds(tmp_path: Path) -> None:
    card = _card(tmp_path / "lora", {"lora": "/somewhere/else/pytorch_lora_weights.safetensors"})
    for shown in (
        ".830",
        "\\[.810, .855\\]",
        "pytorch\\_lora\\_weights.safetensors",
        "Not for clinical use",
        "2,345,678",
        "0123abc",
        "lora.alpha",
        "16.0",
        "100 held-out images, 123 pairs",
        "200 generated images",
    ):
        assert shown in card, shown
    assert "/somewhere" not in card and str(tmp_path) not in card
    assert (tmp_path / "lora" / "README.md").is_file()
    assert "the base's own" in _card(tmp_path / "base", {})
    with pytest.raises(ValueError, match="unknown exported part"):
        _card(tmp_path / "lora", {"vae": "vae"})


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        (("lora",), ["pipe.load_lora_weights(folder)"]),
        (("unet",), ['unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")', "unet=unet"]),
        (
            ("lora", "text_encoder"),
            ['CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")', "pipe.load_lora_weights(folder)"],
        ),
        (("unet", "text_encoder", "text_encoder_2"), ["CLIPTextModelWithProjection", "text_encoder_2=text_encoder_2"]),
    ],
)
def test_loading_code_compiles_and_loads_each_part(parts: tuple[str, ...], lines: list[str]) -> None:
    code = loading_code("some/base's name", "checkpoints/it's", {part: part for part in parts})
    compile(code, "card", "exec")
    for line in lines:
        assert line in code
    assert ("load_lora_weights" in code) == ("lora" in parts)


def test_loading_code_gives_the_trained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "base")
    trained = {"unet": tiny_sd(seed=1).unet, "text_encoder": tiny_sd(seed=1).text_encoder}
    for part, module in trained.items():
        module.save_pretrained(tmp_path / "run" / part)

    monkeypatch.chdir(tmp_path)
    card = _card(tmp_path / "run", {part: part for part in trained}, "base")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    *loading, drawing = code[1].strip().splitlines()
    assert drawing.startswith("image = pipe(")
    scope: dict[str, Any] = {}
    exec("\n".join(loading), scope)
    for part, module in trained.items():
        loaded = getattr(scope["pipe"], part).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in module.state_dict().items())

"""The report says what the files of a run folder say, and no more than the intervals show."""

from __future__ import annotations

import ast
import base64
import copy
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from browser import CHROMIUM, Browser, browser
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file
from tiny import save_tiny, tiny_sd

import distill.report
from distill.errors import UserError
from distill.evaluation.results import Estimate, parse_metrics
from distill.models.stock import code_of_arm, exported, loading_code, plain_name, public_base
from distill.report import terminal_table, validate_metrics, write_model_card, write_report
from distill.report.document import UNKNOWN, escape_markdown
from distill.report.summary import compare, difference_table, faults, sample, summarize, terminal_summary
from distill.report.tables import (
    DETAILS,
    FID,
    KID,
    MASS,
    METRICS,
    WORD_AUC,
    cost_table,
    finding_table,
    flatten,
    format_estimate,
    format_seconds,
    relative_costs,
    results_table,
)

FINDINGS = ("edema", "pleural effusion", "pneumothorax")
# name: (word AUC, FID, finding AUC)
ARMS = {
    "alpha": (0.86, 31.0, 0.81),
    "beta": (0.66, 18.4, 0.90),
    "gamma": (0.85, 19.1, 0.905),
    "start": (0.58, 142.0, 0.55),
}
HOSTILE = "<script>alert('x')</script> | `code` ![p](http://evil.example/x) <img src=http://evil.example/y> **b** $a$"
ATTENTION = [f"attention to {token}" for token in ("bos", "words", "eos", "padding")]
CAPTIONS = ("Small left pleural effusion. No pneumothorax.", "Mild edema in both lungs, effusion absent.")


def _tokens(auc: float, wide: float = 0.02) -> dict[str, Any]:
    values = {"auc": auc, "cnr": 4 * (auc - 0.5), "top1": auc - 0.3, "iou": auc - 0.5}
    per_finding = {name: {**values, "auc": auc + 0.02 * k - 0.02, "pairs": 40 + k} for k, name in enumerate(FINDINGS)}
    intervals = {f"{name}_ci": [value - wide, value + wide] for name, value in values.items()}
    return {**values, **intervals, "images": 100, "pairs": 123, "per_finding": per_finding}


def _quality(fid: float, finding_auc: float) -> dict[str, Any]:
    return {
        "fid": fid, "fid_ci": [0.93 * fid, 1.08 * fid], "finding_auc": finding_auc,
        "finding_auc_ci": [finding_auc - 0.02, finding_auc + 0.02], "diversity": 0.431, "images": 200, "features": "phantom",
    }  # fmt: skip


def arm(auc: float, fid: float, finding_auc: float, trained: bool = True) -> dict[str, Any]:
    mass = {"bos": 0.22, "words": 0.5, "eos": 0.1, "padding": 0.18}
    cost = {"train_seconds": 84.3, "steps": 500, "trainable_parameters": 2_345_678} if trained else {}
    empty = dict.fromkeys(("train_seconds", "steps", "trainable_parameters"))
    return {
        "localization": {"word": _tokens(auc), "eos": _tokens(0.7), "padding": _tokens(0.65), "mass": mass},
        "quality": _quality(fid, finding_auc),
        "cost": empty | cost | {"peak_memory_gb": 2.31, "evaluation_seconds": 41.0},
    }


def make_metrics(arms: tuple[str, ...] = tuple(ARMS), **more: Any) -> dict[str, Any]:
    entries = {name: arm(*ARMS.get(name, ARMS["gamma"]), trained=name != "start") for name in arms}
    if "gamma" in entries:
        entries["gamma"]["cost"]["kept"] = {"step": 200, "rule": "loss", "value": 0.12345}
    provenance = {
        "commit": "0123abc", "device": "cpu", "seeds": {"training": 0},
        "config": {"base": {"name": "phantom"}, "evaluation": {"timesteps": [100, 400]}}, "seconds": {"cache": 12.0},
    }  # fmt: skip
    real = {"quality": {**_quality(4.2, 0.97), "diversity": None}}
    return {"arms": entries, "real": real, "provenance": provenance, **more}


def _picture(rng: np.random.Generator, size: int) -> Image.Image:
    """Two dark lungs in a bright body, so that a person who looks at the page sees what is where."""
    y, x = np.mgrid[:size, :size] / size
    lungs = sum(np.exp(-(((x - c) / 0.13) ** 2) - (((y - 0.5) / 0.27) ** 2)) for c in (0.3, 0.7))
    gray = 60 + 120 * np.exp(-(((x - 0.5) / 0.4) ** 4) - (((y - 0.55) / 0.5) ** 4)) - 90 * lungs
    return Image.fromarray(np.uint8(np.clip(gray + rng.normal(0, 6, (size, size)), 0, 255)))


def _write_maps(path: Path, captions: tuple[str, ...]) -> None:
    """A bright row in each map, whose place is the word's number, so that a test sees which map is shown."""
    tensors: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {}
    for number, caption in enumerate(captions):
        spans = {"[BOS]": [], **{m[0].lower(): [m.span()] for m in re.finditer(r"\w+", caption)}, "[EOS]": []}
        for place, word in enumerate(spans):
            tensors[f"{number}/{word}"] = np.zeros((16, 16), np.uint8)
            tensors[f"{number}/{word}"][place % 16] = 255
        finding = next(word for word in ("effusion", "edema", "[BOS]") if word in spans)
        about[str(number)] = {"words": spans, "findings": {"the finding": finding}}
    save_file(
        tensors,
        path / "word_maps.safetensors",
        metadata={"examples": json.dumps(about)},
    )


def make_run(
    run_dir: Path, arms: tuple[str, ...] = tuple(ARMS), captions: tuple[str, ...] = CAPTIONS, size: int = 64
) -> Path:
    """A whole run folder as the recipes leave it."""
    rng = np.random.default_rng(0)
    (run_dir / "real").mkdir(parents=True)
    lines = []
    for number, caption in enumerate(captions):
        _picture(rng, size).save(run_dir / "real" / f"{number:04d}.png")
        regions = [{"finding": "edema", "boxes": [[size * 0.15, size / 3, size / 4, size / 3]]}]
        row = {"id": f"test-{number}", "image": f"real/{number:04d}.png", "caption": caption, "regions": regions}
        lines.append(json.dumps(row))
    (run_dir / "real" / "examples.jsonl").write_text("\n".join(lines) + "\n")
    for name in arms:
        (run_dir / name / "samples").mkdir(parents=True)
        for number in range(len(captions)):
            _picture(rng, size).save(run_dir / name / "samples" / f"{number:04d}.png")
        _write_maps(run_dir / name, captions)
        rows = [{"step": s, "loss": 0.3 + 2 / s, "lr": 1e-4, "extra": 0.1} for s in range(10, 501, 10)]
        (run_dir / name / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        located = [
            {"step": s, "images": 10, "word": {"auc": 0.6 + s / 2000, "image_adds": s / 9999}} for s in (100, 200, 300)
        ]
        (run_dir / name / "validation_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in located))
    (run_dir / "metrics.json").write_text(json.dumps(make_metrics(arms)))
    return run_dir


class Page(HTMLParser):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, **attributes: str) -> int:
        return sum(t == tag and attributes.items() <= a.items() for t, a in self.tags)


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = make_run(tmp_path_factory.mktemp("run") / "tradeoff")
    write_report(run_dir)
    return run_dir


# ---------------------------------------------------------------------------------------------------------- the choice


def choose(arms: dict[str, Any], **more: Any) -> Any:
    return summarize(parse_metrics({"arms": arms, "provenance": {}, **more}))


def test_a_model_that_is_better_in_everything_is_taken() -> None:
    found = choose({"a": arm(0.6, 40, 0.6), "b": arm(0.8, 20, 0.8)})
    assert found.arm == "b" and found.title == "Take b" and found.others == ["a"]
    assert "Ruled out, because another model beats it: a." in found.reasons
    assert [row[2].text for row in found.why[0].rows] == ["▲ better"] * 3


def test_a_trade_is_said_and_not_decided() -> None:
    found = choose({"a": arm(0.8, 40, 0.7), "b": arm(0.6, 20, 0.7)})
    assert "1 other model is not ruled out" in found.title
    other = {"a": "b", "b": "a"}[found.arm]
    better, worse = ("FID", "word AUC") if other == "b" else ("word AUC", "FID")
    assert (
        f"{other} is better than {found.arm} in {better} and worse in {worse}: choose by what you need."
        in found.reasons
    )


def test_a_beaten_model_is_ruled_out_beside_two_that_trade() -> None:
    found = choose({"a": arm(0.8, 40, 0.7), "b": arm(0.6, 20, 0.7), "c": arm(0.6, 40, 0.7)})
    assert "Ruled out, because another model beats it: c." in found.reasons and found.arm != "c"


@pytest.mark.parametrize(
    ("metric", "better"), [("auc", (0.705, 30, 0.7)), ("fid", (0.7, 29.8, 0.7)), ("f", (0.7, 30, 0.71))]
)
def test_of_models_that_are_not_separated_the_best_on_average_is_first(metric: str, better: Any) -> None:
    for arms in ({"a": arm(0.7, 30, 0.7), "b": arm(*better)}, {"b": arm(*better), "a": arm(0.7, 30, 0.7)}):
        assert choose(arms).arm == "b" and "not ruled out" in choose(arms).title


def test_overlapping_intervals_separate_nothing_and_paired_differences_do() -> None:
    arms = {"a": arm(0.70, 30, 0.70), "b": arm(0.71, 30, 0.71)}
    found = choose(arms)
    assert found.arm == "b"
    assert "The numbers do not separate b from a; more seeds or images are needed." in found.reasons
    assert not any("Ruled out" in text for text in found.reasons)
    paired = {"a - b": {"word.auc": {"value": -0.01, "ci": [-0.02, -0.005], "per_seed": {}}}}
    found = choose(arms, paired=paired)
    assert found.title == "Take b" and "difference +.010 [+.005, +.020]" in found.why[0].rows[0][2].note
    undecided = {"a - b": {"word.auc": {"value": -0.01, "ci": [-0.02, 0.0]}}}
    assert "not ruled out" in choose(arms, paired=undecided).title
    results = parse_metrics({"arms": arms, "provenance": {}, "paired": undecided})
    assert [compare(results, *pair, WORD_AUC) for pair in (("a", "b"), ("b", "a"))] == ["not separated"] * 2


def test_a_paired_difference_is_turned_around() -> None:
    paired = {"b - a": {"quality.fid": {"value": 1.0, "ci": [0.25, 3.0]}, "word.auc": {"value": 0.1, "ci": None}}}
    results = parse_metrics(
        {"arms": {"a": arm(0.7, 20, 0.7), "b": arm(0.7, 20, 0.7)}, "provenance": {}, "paired": paired}
    )
    turned = results.difference("a", "b", FID.key)
    assert turned is not None and turned.value == pytest.approx(-0.5) and turned.ci == pytest.approx((-0.75, -0.2))
    assert compare(results, "a", "b", FID) == "better" and compare(results, "b", "a", FID) == "worse"
    assert (
        results.difference("a", "b", WORD_AUC.key) is not None
        and compare(results, "a", "b", WORD_AUC) == "not separated"
    )


@pytest.mark.parametrize(
    ("key", "interval", "answer"),
    [
        ("word.auc", [0.01, 0.1], "better"), ("word.auc", [-0.1, -0.01], "worse"),
        ("quality.fid", [0.01, 0.1], "worse"), ("quality.fid", [-0.1, -0.01], "better"),
        ("quality.finding_auc", [0.01, 0.1], "better"), ("quality.kid", [-0.1, -0.01], "better"),
        *((key, ends, "not separated") for key in ("word.auc", "quality.fid") for ends in ([0.0, 0.1], [-0.1, 0.0])),
    ],
)  # fmt: skip
def test_a_verdict_has_the_direction_of_its_measure_and_so_has_its_colour(
    key: str, interval: list[float], answer: str
) -> None:
    value, metric = sum(interval) / 2, next(m for m in METRICS if m.key == key)
    arms, paired = {"a": arm(0.7, 20, 0.7), "b": arm(0.7, 20, 0.7)}, {"b - a": {key: {"value": value, "ci": interval}}}
    results = parse_metrics({"arms": arms, "provenance": {}, "paired": paired})
    opposite = {"better": "worse", "worse": "better", "not separated": "not separated"}[answer]
    assert (compare(results, "b", "a", metric), compare(results, "a", "b", metric)) == (answer, opposite)
    (cell,) = difference_table(results).rows[0][1:]
    assert (cell.note, cell.tone) == (answer, {"better": "good", "worse": "bad"}.get(answer, ""))  # type: ignore[union-attr]
    if metric in (WORD_AUC, FID):
        row = next(row for row in choose(arms, paired=paired).why[0].rows if row[0] == metric.label)
        ours = compare(results, choose(arms, paired=paired).arm, choose(arms, paired=paired).others[0], metric)
        signs = {
            "better": ("▲ better", "good"),
            "worse": ("▼ worse", "bad"),
            "not separated": ("≈ not separated", "even"),
        }
        assert (row[2].text, row[2].tone) == signs[ours]


def test_without_a_paired_difference_intervals_that_touch_separate_nothing() -> None:
    def verdicts(ours: list[float], theirs: list[float], key: str) -> list[str]:
        arms = {"a": arm(0.7, 20, 0.7), "b": arm(0.7, 20, 0.7)}
        group, name = key.split(".")
        for entry, ends in zip(arms.values(), (ours, theirs), strict=True):
            part = entry["quality"] if group == "quality" else entry["localization"]["word"]
            part |= {name: sum(ends) / 2, f"{name}_ci": ends}
        results, metric = parse_metrics({"arms": arms, "provenance": {}}), next(m for m in METRICS if m.key == key)
        return [compare(results, *pair, metric) for pair in (("a", "b"), ("b", "a"))]

    assert verdicts([0.5, 0.625], [0.625, 0.75], "word.auc") == ["not separated"] * 2
    assert verdicts([0.5, 0.625], [0.6875, 0.75], "word.auc") == ["worse", "better"]
    assert verdicts([10, 20], [20, 30], "quality.fid") == ["not separated"] * 2
    assert verdicts([10, 20], [21, 30], "quality.fid") == ["better", "worse"]


def test_every_metric_has_its_direction() -> None:
    lower = {"FID", "KID", "detector AUC"}
    neither = {"other image's AUC", "EOS AUC", "padding AUC", "diversity", *ATTENTION}
    for metric in METRICS:
        assert metric.direction == (-1 if metric.name in lower else 0 if metric.name in neither else 1), metric.name
        assert metric.label.removeprefix(metric.name) == {-1: " ↓", 0: "", 1: " ↑"}[metric.direction]
    assert {metric.name for metric in METRICS} > lower | neither


@pytest.mark.parametrize("ends", [[0.001, 0.1], [0.0, 0.1], None])
def test_maps_depend_on_the_image_where_the_interval_is_above_0(ends: list[float] | None) -> None:
    one = arm(0.7, 30, 0.7)
    one["localization"]["word"] |= {"image_adds": 0.05, "image_adds_ci": ends}
    one["localization"]["word"] |= {"auc_ci": [0.68, 0.72]}
    one["localization"]["priors"] = {"centre": {"auc": 0.6, "auc_ci": [0.6, 0.68]}}
    reasons = choose({"a": one}).reasons
    assert ("The maps of a are not shown to depend on the image." in reasons) is (ends != [0.001, 0.1])
    assert any("blind maps (centre)" in text for text in reasons)


def test_the_rank_of_equal_values_is_the_best_of_them_and_quality_counts_once() -> None:
    """`a` shares the first place in localization and is third in quality; `c` is first in quality, behind three
    others."""
    places = {"c": (0.699, 30.0, 0.704), "d": (0.698, 30.1, 0.703), "a": (0.7, 30.2, 0.702), "b": (0.7, 30.3, 0.701)}
    found = choose({name: arm(*values) for name, values in (places | {"e": (0.7, 30.4, 0.7)}).items()})
    assert found.title == "First choice: a. 4 other models are not ruled out"
    assert found.reasons[0] == "The numbers do not separate a from c, d, b and e; more seeds or images are needed."


def copied(entry: dict[str, Any], p: float) -> dict[str, Any]:
    found = {"copies": 0.3, "copies_ci": [0.1, 0.5], "share": 0.65, "chance": 0.5, "p": p, "least_p": 1e-6}
    counts = {"space": "latents", "images": 40, "training_images": 50, "held_out_images": 50}
    return entry | {"memorization": found | counts}


def test_a_model_with_copies_is_not_taken_while_another_has_none() -> None:
    better, worse = arm(0.8, 20, 0.8), arm(0.6, 40, 0.6)
    assert choose({"a": copied(better, 0.5), "b": worse}).title == "Take a"
    found = choose({"a": copied(better, 0.001), "b": worse, "c": arm(0.65, 35, 0.65)})
    assert found.arm == "c" and "There are copies of training images in a: see Memorization." in found.reasons
    assert "Ruled out, because another model beats it: b." in found.reasons
    both = choose({"a": copied(better, 0.001), "b": copied(worse, 0.001)})
    assert both.title == "Do not publish a yet"
    for name in "ab":
        assert both.reasons.count(f"There are copies of training images in {name}: see Memorization.") == 1
    assert choose({"a": copied(better, 0.001)}).title == "Do not publish a yet"
    assert choose({"a": better}).title == "Only a was measured"


def test_copies_are_said_where_no_measure_decides() -> None:
    """As of radiographs that another tool made, without features: the default there."""
    nothing = {"localization": None, "quality": None}
    found = choose({"a": copied(arm(0.8, 20, 0.8), 0.001) | nothing})
    copies = "There are copies of training images in a: see Memorization."
    assert found.title == "Do not publish a yet" and found.arm is None
    assert found.reasons == ["Word AUC, FID and finding AUC are missing.", copies]
    results = parse_metrics({"arms": {"a": copied(arm(0.8, 20, 0.8), 0.001)}, "provenance": {}})
    assert faults(results, "a")[0] == copies, "also on the card"
    clean = choose({"a": arm(0.8, 20, 0.8) | nothing})
    assert clean.title == "No model can be recommended" and len(clean.reasons) == 1
    unequal = {"a": arm(0.8, 20, 0.8) | {"quality": None}, "b": arm(0.3, 20, 0.8) | {"localization": None}}
    unequal["c"] = unequal["a"]
    found = choose(unequal)
    assert found.reasons[0] == "No model has all measures that any has."


def test_a_finding_auc_of_other_findings_is_not_compared_with_that_of_real_images() -> None:
    entry, real = arm(0.8, 20, 0.6), arm(0.5, 20, 0.9)["quality"]
    worse = ["The images of a are worse than real ones in finding AUC."]
    for ours, theirs, said in (
        (["x"], ["x"], worse),
        (["x"], ["x", "y"], []),
        (None, None, worse),
        (None, ["x"], worse),
    ):
        sides = [entry["quality"] | {"finding_auc_of": ours}, real | {"finding_auc_of": theirs}]
        sides = [{key: value for key, value in side.items() if value is not None} for side in sides]
        results = parse_metrics(
            {"arms": {"a": entry | {"quality": sides[0]}}, "provenance": {}, "real": {"quality": sides[1]}}
        )
        assert [text for text in faults(results, "a") if "real ones" in text] == said


@pytest.mark.parametrize(
    ("real", "said"),
    [
        ((20, 0.8), []),
        ((10, 0.7), ["The images of a are worse than real ones in FID."]),
        ((20, 0.9), ["The images of a are worse than real ones in finding AUC."]),
        ((10, 0.9), ["The images of a are worse than real ones in FID and finding AUC."]),
        ((40, 0.6), []),
    ],
)
def test_images_that_are_worse_than_real_ones_are_named(real: tuple[float, float], said: list[str]) -> None:
    arms = {"a": arm(0.8, 20, 0.8), "b": arm(0.6, 40, 0.6)}
    found = choose(arms, real={"quality": arm(0.5, *real)["quality"]})
    assert [reason for reason in found.reasons if "images of a are worse" in reason] == said
    other = any("images of b are worse than real ones in" in reason for reason in found.reasons)
    assert other == (real != (40, 0.6)), "of two models both are said"
    three = choose(arms | {"c": arms["b"]}, real={"quality": arm(0.5, *real)["quality"]})
    assert [reason for reason in three.reasons if "are worse" in reason] == said, "of more the first choice"


def test_what_was_not_compared_is_said_only_where_it_was_not() -> None:
    alone = "There is no other fully measured model to compare it with."
    quality, place = (f"{name} was not measured" for name in ("Quality", "Localization"))
    for arms, expected in (
        ({"a": arm(0.7, 30, 0.7)}, [alone]),
        ({"a": arm(0.7, 30, 0.7), "b": arm(0.7, 30, 0.7)}, []),
        ({"a": arm(0.7, 30, 0.7) | {"quality": None}}, [alone, quality]),
        ({"a": arm(0.7, 30, 0.7) | {"localization": None}}, [alone, place]),
    ):
        reasons = choose(arms).reasons
        said = [text for text in (alone, quality, place) if any(reason.startswith(text) for reason in reasons)]
        assert said == expected


@pytest.mark.parametrize(("fewer", "more", "is_said"), [(10, 11, False), (1000, 1099, False), (1000, 1101, True)])
def test_compute_differs_above_a_tenth(fewer: int, more: int, is_said: bool) -> None:
    arms = {"a": arm(0.7, 30, 0.7), "b": arm(0.7, 30, 0.7)}
    for entry, passes in zip(arms.values(), (fewer, more), strict=True):
        entry["cost"]["image_passes_with_teachers"] = passes
    assert any("Compute differs" in text for text in choose(arms).reasons) is is_said


def test_what_the_image_adds_goes_before_the_word_auc() -> None:
    arms = {"a": arm(0.8, 30, 0.7), "b": arm(0.8, 30, 0.7)}
    for name, adds in (("a", 0.01), ("b", 0.10)):
        arms[name]["localization"]["word"] |= {"image_adds": adds, "image_adds_ci": [adds - 0.02, adds + 0.02]}
    found = choose(arms)
    assert found.title == "Take b" and [row[0] for row in found.why[0].rows][:2] == ["word AUC ↑", "image adds ↑"]
    arms["b"]["localization"]["word"] |= {"image_adds": None, "image_adds_ci": None}
    assert "not ruled out" in choose(arms).title  # not known of all, so the word AUC decides


def test_the_terminal_says_how_each_pair_differs() -> None:
    arms = {"a": arm(0.8, 30, 0.7), "b": arm(0.7, 33, 0.7)}
    paired = {
        "b - a": {
            "word.auc": {"value": -0.1, "ci": [-0.15, -0.05], "per_seed": {"0": -0.1}},
            "quality.fid": {"value": 0.1, "ci": [-0.02, 0.2], "per_seed": {"0": 0.1}},
        }
    }
    text = terminal_summary(parse_metrics({"arms": arms, "paired": paired, "compare_to": ["a"], "provenance": {}}))
    title, *rest = text.splitlines()
    assert title == summarize(parse_metrics({"arms": arms, "paired": paired, "provenance": {}})).title
    assert rest[-1] == (
        "b against a: word AUC ↑ worse (-.100 [-.150, -.050]), FID ↓ not separated (+10.0 [-2.0, +20.0] %)"
    )
    assert all(line.startswith("- ") for line in rest[:-1])


def test_maps_no_better_than_blind_ones_are_called_so() -> None:
    one = arm(0.7, 30, 0.7)
    one["localization"]["priors"] = {
        "centre": {"auc": 0.6, "auc_ci": [0.59, 0.61]}, "mean_mask": {"auc": 0.71, "auc_ci": [0.7, 0.72]}
    }  # fmt: skip
    one["localization"]["word"] |= {"image_adds": 0.01, "image_adds_ci": [-0.01, 0.03]}
    found = choose({"a": one})
    assert "By word AUC, a is not shown to be better than blind maps (mean mask)." in found.reasons
    assert "The maps of a are not shown to depend on the image." in found.reasons
    assert not any("centre" in text or "below .5" in text for text in found.reasons)
    under = arm(0.6, 20, 0.9)
    under["localization"]["word"] |= {"auc": 0.46, "auc_ci": [0.44, 0.48]}
    found = choose({"a": one, "b": under})
    assert "The word AUC of b is below .5: the maps are higher outside findings than inside." in found.reasons
    under["localization"]["word"]["auc_ci"] = [0.4, 0.5]
    assert not any("below .5" in text for text in choose({"a": one, "b": under}).reasons)
    one["localization"]["priors"]["centre"] |= {"within_prior": 0.49, "within_prior_ci": [0.48, 0.5]}
    one["localization"]["word"]["within_prior"] = 0.61
    results = parse_metrics({"arms": {"a": one}, "provenance": {}})
    details = results_table(results, DETAILS)
    assert details.head == ["model", "AUC within prior ↑", *ATTENTION]
    assert [row[1].text for row in details.rows] == [".610", ".490", UNKNOWN]  # type: ignore[union-attr]
    table = results_table(results)
    assert [row[0] for row in table.rows] == ["a", "blind map: centre", "blind map: mean mask"]
    assert table.rows[2][1].text == ".710" and "image adds ↑" in table.head  # type: ignore[union-attr]
    one["localization"]["word"] |= {"auc": 0.7, "auc_ci": [0.68, 0.72]}
    for blind, is_said in (([0.6, 0.69], True), ([0.6, 0.67], False), (None, False)):
        one["localization"]["priors"] = {"centre": {"auc": 0.65, "auc_ci": blind}}
        assert any("(centre)" in text for text in choose({"a": one}).reasons) is is_said


def test_what_was_not_measured_is_not_claimed() -> None:
    nothing = arm(0.7, 30, 0.7) | {"quality": None, "localization": None}
    assert choose({"a": nothing}).arm is None
    found = choose({"a": arm(0.7, 30, 0.7), "b": nothing})
    assert found.arm == "a" and "Not compared, because a measure is missing: b." in found.reasons
    half = arm(0.7, 30, 0.7) | {"localization": None}
    assert "Localization was not measured: the choice is by quality alone." in choose({"a": half}).reasons
    bare = {name: arm(0.7, fid, 0.7) for name, fid in (("a", 30), ("b", 3))}
    for entry in bare.values():
        entry["quality"] |= {"fid_ci": None}
    assert "not ruled out" in choose(bare).title


def test_the_baselines_are_those_of_compare_to() -> None:
    arms = {name: arm(auc, 30, 0.7) for name, auc in (("a", 0.6), ("b", 0.9), ("c", 0.7))}
    assert choose(arms).others == ["a"] and choose(arms, compare_to=["c", "b"]).others == ["c"]
    assert choose(arms, compare_to=["b"]).others == ["a"]


def test_maps_of_other_layers_or_timesteps_are_said() -> None:
    """Else the gain of a chosen subset would pass for one of training."""
    arms = {name: arm(0.7, 30, 0.7) for name in "abc"}
    for name, timesteps in (("a", [1, 2]), ("b", [1, 2]), ("c", [3])):
        assert not any("other layers" in text for text in choose(arms).reasons)
        for one in arms.values():
            one["localization"] |= {"timesteps": [1, 2], "layers": ["x"]}
        arms[name]["localization"]["timesteps"] = timesteps
    (said,) = [text for text in choose(arms).reasons if "other layers" in text]
    assert said.startswith(
        "The maps of c are of other layers or timesteps than those of the first model: by localization"
    )
    arms["b"]["localization"]["layers"] = ["y"]
    assert any(text.startswith("The maps of b and c are") for text in choose(arms).reasons)


def test_unequal_compute_and_sample_sizes_are_said() -> None:
    arms = {"a": arm(0.7, 30, 0.7), "b": arm(0.7, 30, 0.7), "c": arm(0.5, 300, 0.5, trained=False)}
    assert not any("Compute" in text for text in choose(arms).reasons)
    arms["b"]["cost"]["image_passes_with_teachers"] = 3000
    assert not any("Compute" in text for text in choose(arms).reasons)
    arms["a"]["cost"]["image_passes_with_teachers"] = 1000
    assert "Compute differs between the trained models, see Cost and size." in choose(arms).reasons
    arms["c"] = arm(0.95, 3, 0.95, trained=False)
    assert choose(arms).title == "Take c (not trained in this run)"
    arms["c"] = arm(0.95, 300, 0.95, trained=False)
    assert choose(arms).title.startswith("First choice: c (not trained in this run). ")
    several = {"arms": arms, "provenance": {"seeds": {"training": [0, 1, 2]}}}
    one = "One training seed a model, whose choice no interval covers."
    assert one in sample(parse_metrics(several))  # each of another arm
    arms["a"]["per_seed"] = {seed: {"word.auc": 0.7, "quality.fid": None} for seed in "012"}
    said = sample(parse_metrics(several))
    assert said.startswith(
        "3 training seeds a model; the intervals are over seeds and images. Those of single findings"
    )
    assert "Localization: 100 held-out images, 123 image-finding pairs." in said
    assert one in sample(parse_metrics(make_metrics()))


# ------------------------------------------------------------------------------------------------------------- parsing

DELETE = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("arms", DELETE, "metrics.arms: is missing"),
        ("arms", {}, "metrics.arms: is empty"),
        ("provenance", None, "metrics.provenance: must be an object"),
        ("arms.alpha.localization.word.auc", DELETE, "metrics.arms.alpha.localization.word.auc: is missing"),
        ("arms.alpha.localization.word.auc", 84.2, r"word.auc: must be within \[0, 1\], is 84.2"),
        ("arms.alpha.localization.word.auc", "0.8", "word.auc: must be a number, is str"),
        ("arms.alpha.localization.word.auc", True, "word.auc: must be a number, is bool"),
        ("arms.alpha.localization.word.auc", None, "word.auc_ci: is an interval, but auc is null"),
        ("arms.alpha.localization.word.cnr", float("nan"), "word.cnr: must be finite or null, is nan"),
        ("arms.alpha.localization.word.cnr_ci", [1.0, 0.5], "word.cnr_ci: low end 1 is above high end 0.5"),
        ("arms.alpha.localization.word.cnr_ci", [1.0], r"word.cnr_ci: must be \[low, high\]"),
        ("arms.alpha.localization.word.cnr_ci", [0.0, float("inf")], r"word.cnr_ci\[1\]: must be finite"),
        ("arms.alpha.localization.word.images", 1.5, "word.images: must be a whole number"),
        ("arms.alpha.localization.word.per_finding.edema.pairs", -1, "edema.pairs: must be a whole number"),
        ("arms.alpha.localization.mass.eos", 1.5, r"mass.eos: must be within \[0, 1\]"),
        ("arms.alpha.localization.priors", {"centre": 3}, "priors.centre: must be an object, is int"),
        ("arms.alpha.localization.priors", {"centre": {}}, "priors.centre.auc: is missing"),
        ("arms.alpha.localization.word.image_adds", 2.0, r"image_adds: must be within \[-1, 1\]"),
        ("arms.alpha.cost", None, "metrics.arms.alpha.cost: must be an object, is NoneType"),
        ("arms.alpha.cost.train_seconds", -1.0, "train_seconds: must be within"),
        ("arms.alpha.size", {"megabytes": 1.0}, "size.denoiser_parameters: is missing"),
        ("arms.alpha.quality.features", 3, "quality.features: must be a string, is int"),
        ("real.quality.fid", [1], "metrics.real.quality.fid: must be a number, is list"),
        ("compare_to", ["nobody"], "metrics.compare_to: names nobody; the arms are alpha, beta"),
        ("compare_to", "alpha", "metrics.compare_to: must be a list, is str"),
        ("paired", {"alpha - nobody": {}}, "metrics.paired: names alpha - nobody"),
        ("paired", {"alpha - beta": {"word.auc": {"ci": None}}}, "alpha - beta.word.auc.value: is missing"),
    ],
)
def test_an_error_names_the_first_wrong_key(path: str, value: Any, message: str) -> None:
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


def test_what_is_optional_may_be_absent_and_what_is_unknown_null() -> None:
    metrics = make_metrics(("alpha",))
    metrics["arms"]["alpha"]["quality"] |= {"fid": None, "fid_ci": None, "inception_fid": 3.2}
    metrics["arms"]["alpha"]["localization"] = None
    del metrics["real"]
    results = parse_metrics(metrics)
    assert results.compare_to == ["alpha"] and results.seeds == (0,)
    assert results.arms["alpha"].estimate("quality.fid") == results.arms["alpha"].estimate("word.auc") == Estimate()
    assert parse_metrics(make_metrics()).arms["alpha"].estimate("word.auc") == Estimate(0.86, 0.84, 0.88)


# -------------------------------------------------------------------------------------------------------------- tables


def test_formats() -> None:
    assert format_estimate(Estimate(0.8421, 0.83, 0.853), WORD_AUC) == (".842", "[.830, .853]")
    assert format_estimate(Estimate(-0.2), WORD_AUC) == ("-.200", "")
    assert format_estimate(Estimate(), WORD_AUC) == (UNKNOWN, "")
    assert format_estimate(Estimate(55.46, 50.9, 60.3), FID) == ("55.5", "[50.9, 60.3]")
    assert format_estimate(Estimate(1.0), WORD_AUC) == ("1.000", "")
    assert format_estimate(Estimate(10.0), FID) == ("10.0", "") and format_estimate(Estimate(9.96), FID) == ("9.96", "")
    shown = [format_seconds(s) for s in (None, 8.21, 59.4, 60, 252, 3780, 90000)]
    assert shown == [UNKNOWN, "0:00:08", "0:00:59", "0:01:00", "0:04:12", "1:03:00", "1 day, 1:00:00"]


def test_tables_hold_every_arm_and_the_colour_of_a_clear_difference() -> None:
    values = {"word.auc": -0.2, "quality.fid": -0.5, "eos.auc": 0.3, "word.cnr": 0.01}
    paired = {key: {"value": v, "ci": [v - 0.05, v + 0.05]} for key, v in values.items()}
    results = parse_metrics(make_metrics(paired={"beta - alpha": paired}))
    assert [row[0] for row in results_table(results).rows] == [*ARMS, "real images"]
    table = difference_table(results)
    assert table.head == ["", "word AUC ↑", "CNR ↑", "EOS AUC", "FID ↓"]
    assert [cell.tone for cell in table.rows[0][1:]] == ["bad", "", "", "good"]  # type: ignore[union-attr]
    assert table.rows[0][4].text == "-50.0 [-55.0, -45.0] %"  # type: ignore[union-attr]
    found = finding_table(results)
    assert [row[0] for row in found.rows] == list(FINDINGS)
    assert not difference_table(results, DETAILS).rows and results_table(results, DETAILS).head == ["model", *ATTENTION]
    assert found.rows[0][1:3] == ["40", ".840"]
    cost = cost_table(results)
    assert cost.rows[3][cost.head.index("evaluation seconds")] == "0:00:41" and "image passes" not in cost.head


def test_the_cost_of_an_arm_is_relative_to_the_first_baseline() -> None:
    metrics = make_metrics(("a", "b", "start"), compare_to=["b", "a"])
    assert relative_costs(parse_metrics(metrics)) == {} and "cost" not in results_table(parse_metrics(metrics)).head
    metrics["arms"]["a"]["cost"] |= {"image_passes": 50, "image_passes_with_teachers": 350}
    assert relative_costs(parse_metrics(metrics)) == {}
    metrics["arms"]["b"]["cost"] |= {"image_passes": 150, "image_passes_with_teachers": 150}
    results = parse_metrics(metrics)
    table, cost = results_table(results), cost_table(results)
    assert table.head[-1] == "cost" and [row[-1] for row in table.rows] == ["2.33", "1.00", UNKNOWN, UNKNOWN]
    columns = dict(zip(cost.head, zip(*cost.rows, strict=True), strict=True))
    assert columns["image passes"] == ("50", "150", UNKNOWN)
    assert columns["image passes with teachers"] == ("350", "150", UNKNOWN)


def test_further_measures_of_quality_have_tables_of_their_own(tmp_path: Path) -> None:
    run = make_run(tmp_path, arms=("alpha", "beta"))
    metrics = make_metrics(("alpha", "beta"))
    for entry in metrics["arms"].values():
        entry["localization"]["mass"] = None
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert "More measures" not in Page(write_report(run)).text, "an older run has none"
    metrics = make_metrics(("alpha", "beta"))
    for entry in metrics["arms"].values():
        entry["quality"] |= {"kid": 8.7, "kid_ci": [-0.25, 12.8], "density": 1.25, "density_ci": None, "recall": 0.5}
    metrics["real"]["quality"] |= {"kid": -0.01, "recall": 0.97}
    metrics["paired"] = {"beta - alpha": {"quality.recall": {"value": -0.1, "ci": [-0.2, -0.05]}}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    results = parse_metrics(metrics)
    assert results_table(results).head[-3:] == ["KID ↓", "finding AUC ↑", "diversity"]
    details = results_table(results, DETAILS)
    assert details.head == ["model", "recall ↑", "density ↑", *ATTENTION]
    assert [row[0] for row in details.rows][-1] == "real images"
    assert [cell.text for cell in details.rows[0][1:3]] == [".500", "1.250"]  # type: ignore[union-attr]
    assert results_table(results).rows[0][-3].note == "[-.250, 12.800]"  # type: ignore[union-attr]
    text = Page(write_report(run)).text
    assert text.index("All models") < text.index("More measures") < text.index("recall ↑")
    assert "-.100 [-.200, -.050]" in text


def test_the_quality_of_each_finding_stands_beside_that_of_real_images(tmp_path: Path) -> None:
    run, metrics = make_run(tmp_path, arms=("alpha",)), make_metrics(("alpha",))
    one = {"images": 40, "real_images": 40, "kid": 0.5, "kid_ci": [-0.1, 0.75], "coverage": 0.25}
    metrics["arms"]["alpha"]["quality"] |= {"per_finding": {"edema": one}, "too_few": {"pneumothorax": 3}}
    metrics["real"]["quality"] |= {"per_finding": {"edema": one | {"images": 31, "kid": -0.01, "kid_ci": None}}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    found = finding_table(parse_metrics(metrics), KID)
    assert found.head == ["KID ↓", "images", "alpha", "real images"]
    assert found.rows == [
        ["edema", "40", ".500 [-.100, .750]", "-.010"], ["pneumothorax", "3", UNKNOWN, UNKNOWN]
    ]  # fmt: skip
    page = Page(write_report(run))
    assert "Each finding" in page.text and "Quality needs 20 generated and real images of a finding." in page.text
    head = "".join(f'<th scope="col">{name}</th>' for name in ("coverage ↑", "images", "alpha", "real images"))
    assert head in page.source


def test_tables_of_findings_mass_and_cost_have_an_arm_a_line_or_a_column() -> None:
    metrics = make_metrics(("a", "b"))
    for entry, auc, pairs, bos in zip(metrics["arms"].values(), (0.6, None), (5, 1234), (0.25, None), strict=True):
        one = {"auc": auc, "top1": None, "iou": None, "cnr": None, "pairs": pairs}
        entry["localization"]["word"]["per_finding"] = {"edema": one} | ({"mass": one} if auc else {})
        entry["localization"]["mass"] = {"bos": bos, "words": 0.125}
        entry["cost"] = dict.fromkeys(entry["cost"]) | {"train_seconds": 3720.0, "peak_memory_gb": 1.256, "steps": 5000}
    metrics["arms"]["b"]["cost"]["steps"] = None
    results = parse_metrics(metrics)
    found, mass, cost = finding_table(results), results_table(results, MASS), cost_table(results)
    assert found.head == ["word AUC ↑", "pairs", "a", "b"]
    assert found.rows == [["edema", "1,234", ".600", UNKNOWN], ["mass", "5", ".600", UNKNOWN]]
    assert mass.head == ["model", "attention to bos", "attention to words"]
    shown = {name: [cell.text for cell in cells] for name, *cells in mass.rows}  # type: ignore[union-attr]
    assert shown == {"a": [".250", ".125"], "b": [UNKNOWN, ".125"], "real images": [UNKNOWN] * 2}
    columns = dict(zip(cost.head, zip(*cost.rows, strict=True), strict=True))
    assert columns["model"] == ("a", "b") and columns["train seconds"] == ("1:02:00", "1:02:00")
    assert columns["steps"] == ("5,000", UNKNOWN) and columns["peak memory gb"] == ("1.26", "1.26")
    assert "trainable parameters" not in columns and "evaluation seconds" not in columns, "no arm has them"


def test_nested_settings_are_lines_of_dotted_keys() -> None:
    value = {"a": {"b": 1, "c": [], "d": None, "e": {}}, "f": [1, 2], "g": [{"h": 3}, [4]], "i": (True,)}
    assert dict(flatten(value)) == {
        "a.b": "1", "a.c": "(none)", "a.d": UNKNOWN, "a.e": "(none)", "f": "1, 2", "g": "{'h': 3}, [4]", "i": "True",
    }  # fmt: skip


def test_terminal_table_fits_eighty_columns_and_shows_brackets() -> None:
    console = Console(width=80, record=True, color_system=None)
    console.print(terminal_table(make_metrics(("[bold]alpha[/bold]", "start"))))
    text = console.export_text()
    assert "[bold]alpha[/bold]" in text and "[.830, .870]" in text and "real images" in text
    assert "95 % intervals under the values; ↑ higher is better" in text


def test_terminal_table_shows_every_number_whole() -> None:
    """In 80 columns, with all that a comparison of arms measures."""
    metrics = make_metrics(("start", "key_locked_labelled"))
    for one in metrics["arms"].values():
        one["localization"]["word"] |= {"image_adds": -0.012, "image_adds_ci": [-0.103, 0.105]}
        one["localization"]["priors"] = {"centre": {"auc": 0.6, "auc_ci": [0.6, 0.68]}, "mean_mask": {"auc": 0.934}}
        one["cost"]["image_passes_with_teachers"] = 1000 if one["cost"]["steps"] is None else 12345
    console = Console(width=80, record=True, color_system=None)
    console.print(terminal_table(metrics | {"compare_to": ["start"]}))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    for shown in ("key_locked_label", "blind map: mean", "[-.103, .105]", "[132.1, 153.4]", "12.35", "[.885, .925]"):
        assert shown in text


# ---------------------------------------------------------------------------------------------------------- the report


def test_the_regions_of_an_example_are_boxes_on_its_picture(full_run: Path) -> None:
    boxes = [a for tag, a in Page(full_run / "report.html").tags if a.get("class") == "box"]
    assert boxes and {box["title"] for box in boxes} == {"edema"}
    style = dict(part.split(":") for part in str(boxes[0]["style"]).split(";"))
    percent = {name: float(value.removesuffix("%")) for name, value in style.items()}
    assert percent == pytest.approx({"left": 15, "top": 100 / 3, "width": 25, "height": 100 / 3}, abs=0.01)


def test_the_page_leads_with_the_choice(full_run: Path) -> None:
    page = Page(full_run / "report.html")
    text = page.text
    assert text.index("Take gamma") < text.index("against alpha") < text.index("Examples") < text.index("All models")
    assert "hope" not in text and "0123abc" in text and "evaluation.timesteps" in text and "What is missing" not in text
    examples = len(CAPTIONS)
    assert (
        page.count("span", **{"class": "heat"}) == examples * len(ARMS) + 2
    )  # and the first choice beside its baseline
    words = [attributes for tag, attributes in page.tags if tag == "button"]
    assert len(words) == sum(len(re.findall(r"\w+", c)) + 2 for c in CAPTIONS)
    assert "Shown: map of “effusion”" in text
    assert all(m.meaning in text for m in METRICS)


def test_the_page_draws_each_curve_and_says_which_weights_are_exported(full_run: Path) -> None:
    page = Page(full_run / "report.html")
    drawn = [a["aria-label"] or "" for tag, a in page.tags if tag == "figure" and a.get("role") == "img"]
    assert len(drawn) == page.count("svg") == 6
    assert "word image adds over the training steps" in drawn
    kept = "the weights of step 200 are exported, which had the lowest validation loss, 0.1235 (keep loss)"
    assert f"gamma: {kept}." in page.text


def test_an_arm_of_any_name_shows_the_pictures_that_it_has(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run" / "seed-3", arms=("alpha (a) b",))
    (run / "alpha (a) b/samples/0001.png").unlink()
    metrics = make_metrics(("alpha (a) b",))
    metrics["provenance"]["seeds"]["training"] = [3, 4]
    (run.parent / "metrics.json").write_text(json.dumps(metrics))
    page = Page(write_report(run.parent))
    assert page.count("img", alt=f"generated by alpha (a) b: {CAPTIONS[0]}") == 2  # on the first screen too
    assert page.count("img", alt=f"generated by alpha (a) b: {CAPTIONS[1]}") == 0 and "No generated image." in page.text


def test_exactly_these_files_are_left(full_run: Path) -> None:
    assert {path.name for path in full_run.iterdir()} == {
        *ARMS, "real", "metrics.json", "report.html"
    }  # fmt: skip


def test_page_refers_to_nothing_outside(full_run: Path) -> None:
    page = Page(full_run / "report.html")
    assert not {tag for tag, _ in page.tags} & {"link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                assert (value or "").startswith(("#", "data:image/")), (tag, name, value)
    assert set(re.findall(r"url\((.{5})", page.source)) <= {"data:"} | set(re.findall(r"url\((#.{4})", page.source))
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    assert full_run.joinpath("report.html").stat().st_size < 2_000_000


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    name, finding = "<script>alert(1)</script> $x|", "<script>f</script> | `"
    run_dir = make_run(tmp_path / "run <i>", arms=("start",), captions=(HOSTILE, "plain"))
    metrics = make_metrics(("start", name, "a - b"))
    metrics["paired"] = {"a - b - start": {"word.auc": {"value": 0.1, "ci": [0.05, 0.2]}}}
    metrics["arms"]["start"]["localization"]["word"]["per_finding"][finding] = {"auc": 0.5, "pairs": 3}
    metrics["provenance"][HOSTILE] = {"nested": HOSTILE}
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    page = Page(write_report(run_dir))
    assert (
        page.count("script") == 1
        and page.count("img") == 3
        and page.count("b") == len(re.findall("<b class", page.source))
    )
    assert "a - b - start" in page.text and HOSTILE in page.text and name in page.text and finding in page.text
    assert not [value for _, a in page.tags if (value := a.get("src") or "").startswith("http")]


@given(st.text())
def test_escaped_markdown_is_one_line_without_markup(text: str) -> None:
    escaped = escape_markdown(text)
    assert len(escaped.splitlines()) <= 1
    assert "<" not in escaped and ">" not in escaped
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*\[\]]", re.sub(r"\\[|`*\[\]]", "", escaped))


def test_damaged_and_missing_files_are_said_and_do_not_stop_the_report(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "damaged", arms=("alpha", "beta"))
    with open(run_dir / "alpha" / "train_log.jsonl", "a") as file:
        file.write('{"step": 510, "loss": NaN}\n{"step": 520, "lo')
    (run_dir / "beta" / "word_maps.safetensors").write_bytes(b"no safetensors")
    (run_dir / "alpha" / "samples" / "0000.png").write_bytes(b"no picture")
    Image.new("L", (64, 64)).save(tmp_path / "secret.png")
    lines = (run_dir / "real" / "examples.jsonl").read_text().replace("real/0001.png", "../secret.png")
    (run_dir / "real" / "examples.jsonl").write_text(lines)
    page = Page(write_report(run_dir))
    for said in (
        "Line 52 of alpha/train_log.jsonl is no JSON object",
        "beta/word_maps.safetensors cannot be read",
        "alpha/samples/0000.png cannot be read as an image",
        "../secret.png cannot be read as an image",
        "No generated image.",
        "No map.",
    ):
        assert said in page.text, said
    assert not re.search(r"\bnan\b", page.text.lower())


def test_a_bare_metrics_file_makes_a_report(tmp_path: Path) -> None:
    for number, metrics in enumerate((make_metrics(), make_metrics(("one",)))):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        for entry in metrics["arms"].values():
            entry |= {"quality": None} if number else {"quality": None, "localization": None}
        (run_dir / "metrics.json").write_text(json.dumps(metrics))
        page = Page(write_report(run_dir))
        assert ("No model can be recommended" in page.text) == (number == 0) and "None" not in page.text
    with pytest.raises(UserError, match="cannot read"):
        write_report(tmp_path / "nowhere")


def test_pairs_of_several_seeds_are_those_of_the_verdict(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run" / "seed-3", arms=("alpha",))
    for seed in (3, 4):
        (run.parent / f"seed-{seed}" / "alpha" / "memorization").mkdir(parents=True)
        Image.new("RGB", (6, 2), (seed, 0, 0)).save(run.parent / f"seed-{seed}" / "alpha" / "memorization" / "00.png")
    metrics = make_metrics(("alpha",))
    metrics["provenance"]["seeds"]["training"] = [3, 4]
    counts = {"images": 20, "training_images": 50, "held_out_images": 50, "neighbours": 9}
    found = {"share": 0.9, "chance": 0.5, "copies": 0.8, "copies_ci": [0.7, 0.9], "p": 0.001, "least_p": 0.0001}
    metrics["arms"]["alpha"]["memorization"] = counts | found | {"space": "pixels", "seed": 4}
    (run.parent / "metrics.json").write_text(json.dumps(metrics))
    text = write_report(run.parent).read_text()
    assert "alpha, training seed 4, pair 1: generated image" in text
    shown = re.search(r'<img alt="alpha, training seed 4[^>]*base64,([^"]+)"', text)
    assert shown and Image.open(io.BytesIO(base64.b64decode(shown[1]))).convert("RGB").getpixel((0, 0))[0] == 4


def test_several_seeds_show_the_pictures_of_the_first(tmp_path: Path) -> None:
    make_run(tmp_path / "run" / "seed-3", arms=("alpha", "beta"))
    metrics = make_metrics(("alpha", "beta"))
    metrics["provenance"]["seeds"]["training"] = [3, 4]
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(metrics))
    assert Page(write_report(tmp_path / "run")).count("span", **{"class": "heat"}) > 4


PAGES_OF_OTHERS = {"proof.py", "explanation.py"}
"""What tradeoff.py --budgets and explain.py write beside the report."""


def test_the_report_is_small_and_knows_no_arm() -> None:
    folder = Path(distill.report.__file__).parent
    files = [path for path in folder.rglob("*") if path.suffix in (".py", ".j2", ".css", ".js")]
    report = [path for path in files if path.name not in PAGES_OF_OTHERS]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in report) <= 1039
    names = re.compile(
        r"\b(frozen(?!=True)|learnable|distilled|key_locked|continued|gated|self_taught|rali)\b|[\"']base[\"'] in"
    )
    for path in files:
        assert not (found := names.findall(path.read_text(encoding="utf-8"))), (path.name, found)


# ------------------------------------------------------------------------------------------------------------- colours


def _luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    parts = [int(digits[k : k + 2], 16) / 255 for k in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_contrast_in_both_colour_schemes() -> None:
    style = (Path(distill.report.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = (
        dict(re.findall(r"--([a-z-]+): #(\w+);", part)) for part in re.findall(r":root \{(.*?)\}", style, re.S)
    )
    pairs = [("ink", "page"), ("ink", "panel"), ("soft", "page"), ("soft", "panel"), ("accent", "panel")]
    for scheme in (light, dark):
        for text, ground in [*pairs, *((tone, f"{tone}-bg") for tone in ("good", "bad", "even"))]:
            high, low = sorted((_luminance(scheme[text]), _luminance(scheme[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


# ------------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; on Debian: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def longest_blank(image: Image.Image) -> int:
    """The most rows in succession that look alike, without the margin."""
    rows = np.asarray(image, dtype=np.int16)[:, 16:-16]
    alike = (np.abs(rows - rows[:, :1]).max(axis=(1, 2)) <= 6) & (
        np.abs(np.diff(rows[:, 0], axis=0, prepend=0)).max(1) <= 6
    )
    ends = np.flatnonzero(~alike)
    return int(np.diff(np.concatenate([[-1], ends, [len(alike)]])).max() - 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_without_blank_blocks(tab: Browser, full_run: Path, width: int, scheme: str) -> None:
    tab.open(full_run / "report.html", width, 844, scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    page = tab.screenshot()
    assert longest_blank(page) <= 400 and page.height > 1500
    ground = np.asarray(page)[2, 2].mean()
    assert ground < 60 if scheme == "dark" else ground > 200
    outside = "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg, .map') && " \
        "e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 90))"  # fmt: skip
    assert tab.evaluate(outside) == []


def test_the_first_screen_answers(tab: Browser, full_run: Path) -> None:
    (full_run / "gamma" / "unet").mkdir(exist_ok=True)
    write_report(full_run)
    (full_run / "gamma" / "unet").rmdir()
    tab.open(full_run / "report.html", 1280, 800)
    for selector in ("h1", ".why table", ".look .chart", ".look .heat", ".load pre"):
        bottom = tab.evaluate(f"document.querySelector({selector!r}).getBoundingClientRect().bottom")
        assert 0 < bottom <= 800, selector


def _bright_row(tab: Browser) -> int:
    """Number of the word whose map the first model shows; its bright row is at this place of 16."""
    tab.evaluate("document.querySelectorAll('.box').forEach(box => box.remove())")
    heat = np.asarray(tab.screenshot(selector=".example .heat"), dtype=float)
    warmth = heat[:, :, 0] - heat[:, :, 2]
    return int(warmth.mean(axis=1).argmax() * 16 / len(warmth))


def test_a_word_shows_its_map_by_keyboard_pointer_and_tap(tab: Browser, full_run: Path) -> None:
    tab.open(full_run / "report.html", 390, 844)
    assert _bright_row(tab) == 4  # [BOS] small left pleural effusion
    tab.evaluate("document.querySelector('.example summary').focus()")
    for _ in range(2):
        tab.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "left"
    assert _bright_row(tab) == 2 and tab.evaluate("document.querySelector('.shown').textContent") == "left"
    assert tab.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    tab.click(".example button[data-map='5']", "hover")
    assert _bright_row(tab) == 5
    tab.click(".example button[data-map='6']")
    assert _bright_row(tab) == 6
    pressed = "[...document.querySelectorAll('.example[open] [aria-pressed=true]')].map(b => b.textContent)"
    assert tab.evaluate(pressed) == ["pneumothorax"]


def test_without_javascript_the_map_of_the_finding_is_shown(tab: Browser, full_run: Path) -> None:
    tab.open(full_run / "report.html", 390, 844, script=False)
    heat = tab.screenshot(selector=".look .heat")
    tab.open(full_run / "report.html", 390, 844)
    assert np.abs(np.asarray(heat, float) - np.asarray(tab.screenshot(selector=".look .heat"), float)).max() <= 2
    assert np.asarray(heat, float).std() > 5


def test_nothing_is_loaded_from_anywhere(tab: Browser, full_run: Path) -> None:
    tab.requests.clear()
    tab.open(full_run / "report.html")
    loaded = [address for address in tab.requests if not address.startswith("data:")]
    assert loaded == [(full_run / "report.html").resolve().as_uri()]


# ---------------------------------------------------------------------------------------------------------------- card


def _card(arm_dir: Path, export: dict[str, str], base_name: str = "phantom", **config: Any) -> str:
    settings = {"lora": {"rank": 8, "alpha": 16.0}, "seed": 0, "data": {"kind": "phantom", "train_size": 4000}} | config
    provenance = make_metrics()["provenance"]
    path = write_model_card(
        arm_dir, make_metrics()["arms"]["gamma"], settings, provenance, base_name=base_name, export=export
    )
    return path.read_text(encoding="utf-8")


def test_card_is_one_screen_with_the_loading_code_first(tmp_path: Path) -> None:
    card = _card(tmp_path / "lora", {"lora": "pytorch_lora_weights.safetensors"})
    assert len(card.splitlines()) < 60
    assert card.index("```python") < card.index("lora.rank 8") < card.index("| word AUC ↑ | .850 |")
    for shown in (
        "\\[.830, .870\\]",
        "2,345,678",
        "the weights of step 200 are exported, which had the lowest validation loss, 0.1235 (keep loss)",
        "0123abc",
        "100 held-out images",
        "200 generated images",
        "not for clinical",
    ):
        assert shown in card, shown
    assert str(tmp_path) not in card and "data.train" not in card
    assert "the base's own" in _card(tmp_path / "base", {})
    with pytest.raises(ValueError, match="unknown exported part"):
        _card(tmp_path / "lora", {"vae": "vae"})


def test_card_of_users_data_has_their_caption_and_no_word_of_the_phantom(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    row = {"id": "1", "image": "real/0000.png", "caption": 'Two dogs on a "red" sofa.'}
    (tmp_path / "real" / "examples.jsonl").write_text(json.dumps(row) + "\n")
    data = {"kind": "coco", "train_size": 4000, "phantom_captions": "reports", "resolution": 512}
    card = _card(tmp_path / "arm", {"unet": "unet"}, str(tmp_path / "my-base"), data=data)
    assert "Two dogs on a" in card and "phantom-" not in card and "4000" not in card and "effusion" not in card
    assert "base = 'BASE'" in card and "my-base" not in card and "base_model" not in card and "lora" not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    compile(code[1], "card", "exec")


@pytest.mark.parametrize(
    "caption", ["a cat", 'it\'s "quoted"', "```\n# Title\n<script>", "\u202e dlrow", "\\", "{x} %s", "a " * 300]
)
def test_the_prompt_is_the_shortest_caption_and_any_text_stays_a_string(tmp_path: Path, caption: str) -> None:
    (tmp_path / "real").mkdir()
    rows = [
        {"id": "1", "caption": "a " * 400 + "long one"},
        {"id": "2", "caption": caption},
        {"id": "3", "caption": ""},
    ]
    (tmp_path / "real" / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    card = _card(tmp_path / "arm", {"unet": "unet"})
    fences = [line for line in card.splitlines() if line.lstrip().startswith("```")]
    assert fences == ["```python", "```"] and "\u202e" not in card
    code = re.search(r"```python\n(.*?)\n```\n", card, re.DOTALL)
    assert code is not None
    drawing = ast.parse(code[1]).body[-1]
    prompt = next(
        node.value for node in ast.walk(drawing) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    assert prompt == " ".join(caption.split())[:200]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("stabilityai/sdxl", "stabilityai/sdxl"), ("phantom", "phantom"), ("/home/me/my base", "my base"),
        ("runs/mine/", "mine"), (r"C:\Users\me\base", "base"), ("", ""), ("./base.safetensors", "base.safetensors"),
        ("/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123abc", "org/name"),
        ("/c/models--org--a--b.c/snapshots/0123abc/unet", "org/a--b.c"),
    ],
)  # fmt: skip
def test_a_base_is_named_without_a_path_of_this_machine(name: str, plain: str) -> None:
    assert plain_name(name) == plain


def test_front_matter_is_yaml_for_any_base(tmp_path: Path) -> None:
    for base in ("stabilityai/stable-diffusion-2-1", "phantom", 'a "b": {c}\n---\nd: e'):
        matter = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", _card(tmp_path / "a", {"lora": "x"}, base), re.S)[1])  # type: ignore[index]
        assert matter.get("base_model") == public_base(base)
        assert matter["library_name"] == "diffusers" and "lora" in matter["tags"]


def test_only_a_base_that_anyone_has_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    local = ("/home/me/base", "runs/mine", "./base", "~/base", "base", "a/b/c", r"C:\base", "../x")
    assert [public_base(name) for name in local] == [None] * len(local)
    for name in ("phantom", "checkpoints/phantom-base", "/anywhere/checkpoints/phantom-base"):
        assert public_base(name) == "checkpoints/phantom-base"
    assert public_base("stable-diffusion-v1-5/stable-diffusion-v1-5") == "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.parametrize(
    ("parts", "lines"),
    [
        (("lora",), ["pipe.load_lora_weights(folder)"]),
        (("unet",), ['unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")', "unet=unet"]),
        (
            ("lora", "text_encoder"),
            ['CLIPTextModel.from_pretrained(folder, subfolder="text_encoder")', "load_lora_weights"],
        ),
        (("unet", "text_encoder", "text_encoder_2"), ["CLIPTextModelWithProjection", "text_encoder_2=text_encoder_2"]),
        ((), ["pipe = DiffusionPipeline.from_pretrained(base, revision='r1', torch_dtype=torch.float32)"]),
    ],
)
def test_loading_code_compiles_and_loads_each_part(parts: tuple[str, ...], lines: list[str]) -> None:
    code = loading_code("some/base", Path("checkpoints/it's"), dict.fromkeys(parts, ""), 'it\'s "x"', revision="r1")
    compile(code, "card", "exec")
    assert all(line in code for line in lines)
    assert ("load_lora_weights" in code) == ("lora" in parts) and ("folder = " in code) == bool(parts)
    few = loading_code("some/base", Path("x"), {}, None, few_steps=4)
    assert "num_inference_steps=4, guidance_scale=1.0" in few and "LCMScheduler.from_config" in few


def test_loading_code_gives_the_trained_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    save_tiny(tmp_path / "checkpoints" / "phantom-base")
    trained = {"unet": tiny_sd(seed=1).unet, "text_encoder": tiny_sd(seed=1).text_encoder}
    for part, module in trained.items():
        module.save_pretrained(tmp_path / "run" / part)
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", _card(tmp_path / "run", exported(tmp_path / "run")), re.DOTALL)
    assert code is not None
    *loading, drawing = code[1].strip().splitlines()
    assert drawing.startswith("image = pipe(")
    scope: dict[str, Any] = {}
    exec("\n".join(loading), scope)
    for part, module in trained.items():
        loaded = getattr(scope["pipe"], part).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in module.state_dict().items())


def test_the_report_shows_the_loading_code_of_the_choice(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", arms=("alpha", "gamma"))
    metrics = copy.deepcopy(make_metrics(("alpha", "gamma")))
    metrics["arms"]["gamma"] = arm(0.95, 3, 0.95)
    (run_dir / "metrics.json").write_text(json.dumps(metrics))
    assert "does not hold the weights of gamma" in Page(write_report(run_dir)).text
    (run_dir / "gamma" / "pytorch_lora_weights.safetensors").touch()
    page = Page(write_report(run_dir))
    assert "How to load gamma" in page.text
    code = re.search(r"How to load gamma\n?(.*?)How the choice is made", page.text, re.DOTALL)
    assert code is not None and "load_lora_weights" in code[1] and min(CAPTIONS, key=len) in code[1]
    compile(code[1], "report", "exec")


def test_the_loading_code_is_that_of_the_model_and_of_no_other(tmp_path: Path) -> None:
    """Where no folder holds its weights there is none. The plain base has no weights of its own."""
    run_dir, other = tmp_path / "out", tmp_path / "trained"
    for folder in (run_dir, other):
        (folder / "unet").mkdir(parents=True)

    def code(name: str, trained: bool = False, **config: Any) -> str:
        return code_of_arm(run_dir, name, {"base": {"name": "phantom"}} | config, trained=trained)

    plain = code("base")
    assert "checkpoints/phantom-base" in plain and "folder = " not in plain, "not the model that the same run trained"
    assert "folder = 'out'" in code("model", trained=True)
    assert "folder = 'trained'" in code("model", run=str(other))
    assert code("images") == code("teacher", run=str(other)) == code("model") == ""
    assert code("model", run=str(tmp_path / "gone")) == "" == code("base", base=None)
    (run_dir / "alpha" / "unet").mkdir(parents=True)
    assert "folder = 'alpha'" in code("alpha", trained=True)
    hub = {"name": "some/hub", "revision": "r1", "caption_chunks": 2}
    assert "revision='r1'" in code("model", trained=True, base=hub)
    few = {"settings": {"evaluation": {"scheduler": "lcm", "num_inference_steps": 3}}}
    (run_dir / "alpha" / "metrics.json").write_text(json.dumps(few))
    drawn = code("alpha", trained=True, evaluation={"num_inference_steps": 20})
    assert "LCMScheduler" in drawn and "num_inference_steps=3" in drawn, (
        "as the student was measured, and not its teacher"
    )
    for damage in ("{", "[1]", '{"settings": 3}'):
        (run_dir / "alpha" / "metrics.json").write_text(damage)
        assert "LCMScheduler" not in code("alpha", trained=True)
    (run_dir / "pruned_base").mkdir()
    student = code("model", trained=True, base=hub)
    assert "pruned_base" in student and "some/hub" not in student and "r1" not in student
    assert "folder = 'out'" in student and "chunks=2" in student

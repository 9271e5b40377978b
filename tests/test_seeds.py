"""Comparison of several seeds: against brute force, and on real run folders of the tiny comparison."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score

from distill.errors import UserError
from distill.evaluation.seeds import auc_resamples, combine, fid_resamples, of_pairs, of_resamples, run_folders
from distill.metrics.quality import frechet_distance


@given(st.integers(1, 4), st.integers(2, 30), st.integers(0, 1000))
def test_means_are_over_pairs_then_findings_then_seeds(seeds: int, pairs: int, key: int) -> None:
    rng = np.random.default_rng(key)
    table, findings, images = rng.normal(size=(seeds, pairs)), rng.integers(3, size=pairs), rng.integers(9, size=pairs)
    value, interval, each = of_pairs(table, findings, images, 50)
    expected = [np.mean([row[findings == f].mean() for f in set(findings.tolist())]) for row in table]
    np.testing.assert_allclose(each, expected)
    assert value == pytest.approx(np.mean(expected))
    assert interval is None or interval[0] <= interval[1]


def test_the_interval_holds_the_spread_of_seeds() -> None:
    findings, images = np.zeros(400, dtype=int), np.arange(400)
    same = of_pairs(np.zeros((3, 400)), findings, images, 500)
    assert same[0] == 0 and same[1] == [0, 0]
    apart = of_pairs(np.stack([np.full(400, v) for v in (-1.0, 0.0, 1.0)]), findings, images, 500)
    assert apart[1] is not None and apart[1][0] < -0.6 and apart[1][1] > 0.6, "pairs agree and seeds do not"


def test_a_paired_difference_is_narrower_than_that_of_unpaired_values() -> None:
    rng = np.random.default_rng(0)
    images = np.arange(300)
    hard = rng.normal(size=300)  # the same images are hard for both
    first, second = hard + 0.1 + 0.01 * rng.normal(size=(3, 300)), np.tile(hard, (3, 1))
    _, paired, _ = of_pairs(first - second, np.zeros(300), images, 500)
    _, alone, _ = of_pairs(first, np.zeros(300), images, 500)
    assert paired is not None and alone is not None
    assert paired[0] > 0.09 and paired[1] < 0.11 and alone[1] - alone[0] > 0.15


def test_finding_auc_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random((80, 3)) < 0.4
    sides = [[rng.normal(size=(80, 3)) + shift * labels for _ in range(2)] for shift in (1.0, 0.0)]
    first, second = (auc_resamples(side, labels, 200) for side in sides)
    value, _, each = of_resamples([first])
    np.testing.assert_allclose(each, [roc_auc_score(labels, scores, average="macro") for scores in sides[0]])
    gap, gap_interval, _ = of_resamples([first, second])
    assert gap == pytest.approx(value - of_resamples([second])[0])
    assert gap_interval is not None and gap_interval[0] > 0, "the first side follows the labels"
    assert of_resamples([first, first])[:2] == (0, [0, 0])


def test_fid_is_the_distance_of_each_seed_and_its_difference_is_relative() -> None:
    generator = torch.Generator().manual_seed(0)
    real, near, far = (torch.randn((120, 4), generator=generator) + shift for shift in (0.0, 0.3, 1.0))
    value, interval, each = of_resamples([fid_resamples([near.numpy(), far.numpy()], real.numpy(), 50)])
    expected = [frechet_distance(real, near), frechet_distance(real, far)]
    np.testing.assert_allclose(each, expected, rtol=1e-4)
    assert value == pytest.approx(np.mean(expected), rel=1e-4) and interval is not None
    one, two = (fid_resamples([side.numpy()], real.numpy(), 50) for side in (far, near))
    ratio, _, _ = of_resamples([one, two], relative=True)
    assert ratio == pytest.approx(expected[1] / expected[0] - 1, rel=1e-3)
    assert of_resamples([two, two], relative=True)[:2] == (0, [0, 0])


# Run folders


def write_run(folder: Path, seed: int, shift: dict[str, float], images: int = 6, **config: Any) -> None:
    """A run folder with two arms, whose scores are `shift` above those of the images."""
    rng = np.random.default_rng(seed)
    run = folder / f"seed-{seed}"
    token = {f"{k}{end}": v for k in ("auc", "cnr", "top1", "iou") for end, v in (("", 0.5), ("_ci", [0.4, 0.6]))}
    located = {t: token | {"images": images, "pairs": images, "per_finding": {}} for t in ("word", "eos", "padding")}
    mass = {"bos": 0.25, "words": 0.25, "eos": 0.25, "padding": 0.25}
    drawn = {"fid": 1.0, "fid_ci": [0.5, 2.0], "finding_auc": 0.5, "finding_auc_ci": [0.4, 0.6], "diversity": 0.5}
    cost = {
        "train_seconds": 1.0,
        "steps": 2,
        "peak_memory_gb": 1.0,
        "evaluation_seconds": 1.0,
        "trainable_parameters": 3,
    }
    entry = {
        "localization": located | {"mass": mass},
        "quality": drawn | {"images": images, "features": "phantom"},
        "cost": cost,
    }
    origin = {"commit": "c", "seeds": {"training": seed}, "seconds": {"a": 1.0}, "config": {"seed": seed} | config}
    labels = torch.arange(images)[:, None] % 2 == 0
    for arm, above in shift.items():
        rows = [
            {
                "query": i,
                "image": i,
                "finding": 0,
                "scores": {
                    t: {k: i / 10 + above for k in ("auc", "cnr", "top1", "iou")} for t in ("word", "eos", "padding")
                },
            }
            for i in range(images)
        ]
        (run / arm).mkdir(parents=True)
        (run / arm / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in [{"key": "k"}, *rows]))
        features = {"indices": torch.arange(images), "features": torch.from_numpy(rng.normal(size=(images, 2)))}
        save_file(features | {"scores": labels.float(), "labels": labels}, run / arm / "features.safetensors")
    (run / "real").mkdir()
    save_file(
        {
            "indices": torch.arange(images),
            "features": torch.randn(images, 2),
            "scores": labels.float(),
            "labels": labels,
        },
        run / "real" / "features.safetensors",
    )
    metrics = {"arms": dict.fromkeys(shift, entry), "real": {"quality": entry["quality"]}, "provenance": origin}
    (run / "metrics.json").write_text(json.dumps(metrics))


def test_seeds_are_combined_with_paired_differences(tmp_path: Path) -> None:
    for seed, gain in ((3, 0.1), (4, 0.3)):
        write_run(tmp_path, seed, {"frozen": 0.0, "distilled": gain})
    (tmp_path / "seed-9").mkdir()  # not complete
    assert list(run_folders(tmp_path)) == [3, 4]
    metrics = combine(tmp_path, samples=200)
    found = metrics["paired"]["distilled - frozen"]["word.auc"]
    assert found["value"] == pytest.approx(0.2) and found["per_seed"] == pytest.approx({"3": 0.1, "4": 0.3})
    assert found["ci"] == pytest.approx([0.1, 0.3]), "all images agree, so that only the seeds differ"
    assert metrics["paired"]["distilled - frozen"]["quality.finding_auc"]["value"] == 0
    assert metrics["provenance"]["seeds"]["training"] == [3, 4]
    assert set(metrics["arms"]["distilled"]["per_seed"]) == {"3", "4"}


def test_seeds_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, 0, {"frozen": 0.0, "distilled": 0.0}, steps=5)
    write_run(tmp_path, 1, {"frozen": 0.0}, steps=6)
    with pytest.raises(UserError) as error:
        combine(tmp_path)
    assert "seed-1 has the arms ['frozen']" in str(error.value) and "another configuration" in str(error.value)
    with pytest.raises(UserError, match="no complete seed-N"):
        combine(tmp_path / "seed-0")
    write_run(tmp_path / "other", 0, {"frozen": 0.0})
    write_run(
        tmp_path / "other",
        1,
        {
            "frozen": 0.0,
        },
        images=5,
    )
    with pytest.raises(UserError, match="drew other captions"):
        combine(tmp_path / "other")

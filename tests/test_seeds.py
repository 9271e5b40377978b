"""Comparison of several seeds: against brute force, and on real run folders of the tiny comparison."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from distill.errors import UserError
from distill.evaluation.results import Quality, parse_metrics
from distill.evaluation.seeds import (
    QUALITY,
    Resampled,
    auc_resamples,
    combine,
    feature_resamples,
    fid_resamples,
    of_pairs,
    of_resamples,
    run_folders,
)
from distill.experiment.sharing import share_base
from distill.metrics import FIDELITY, bootstrap, fidelity_resamples, kernel_distance
from distill.metrics.bootstrap import resample_counts
from distill.metrics.quality import frechet_by_factors, frechet_distance


def draws(clusters: int, samples: int, seeds: int) -> Iterator[tuple[list[int], list[int]]]:
    """Seeds and clusters of each resample, as often as each is drawn."""
    of_seeds, of_clusters = (next(resample_counts(n, samples, key)) for n, key in ((seeds, 1), (clusters, 0)))
    for some, others in zip(of_seeds, of_clusters, strict=True):
        yield (
            np.repeat(np.arange(seeds), some.astype(int)).tolist(),
            np.repeat(np.arange(clusters), others.astype(int)).tolist(),
        )


def central(statistics: list[float]) -> list[float]:
    return np.nanquantile(statistics, [0.025, 0.975]).tolist()


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(2, 30), st.integers(0, 1000))
def test_means_and_intervals_are_those_of_a_loop_over_seeds_images_and_findings(
    seeds: int, pairs: int, key: int
) -> None:
    rng = np.random.default_rng(key)
    table, findings, images = rng.normal(size=(seeds, pairs)), rng.integers(3, size=pairs), rng.integers(9, size=pairs)
    value, interval, each = of_pairs(table, findings, images, 50)

    def mean(row: Any, chosen: list[int]) -> float:
        return float(np.mean([row[some].mean() for f in range(3) if (some := [i for i in chosen if findings[i] == f])]))

    expected = [mean(row, [*range(pairs)]) for row in table]
    np.testing.assert_allclose(each, expected)
    assert value == pytest.approx(np.mean(expected))
    ids = sorted(set(images.tolist()))
    if len(ids) == 1:
        assert interval is None
        return
    statistics = []
    for some_seeds, some_images in draws(len(ids), 50, seeds):
        chosen = [i for place in some_images for i in range(pairs) if images[i] == ids[place]]
        statistics.append(float(np.mean([mean(table[s], chosen) for s in some_seeds])))
    np.testing.assert_allclose(interval, central(statistics))


def test_finding_auc_and_its_interval_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = np.stack([rng.random(40) < share for share in (0.4, 0.4, 0.0)], axis=1)  # the last finding has no area
    sides = [[rng.normal(size=(40, 3)) + shift * labels for _ in range(2)] for shift in (1.0, 0.0)]
    first, second = (auc_resamples(side, labels, 60, np.arange(40)) for side in sides)

    def area(scores: Any, images: list[int]) -> float:
        return float(np.mean([roc_auc_score(labels[images, f], scores[images, f]) for f in range(2)]))

    exact = [[area(scores, [*range(40)]) for scores in side] for side in sides]
    resampled = [
        [np.mean([area(side[s], images) for s in some]) for some, images in draws(40, 60, 2)] for side in sides
    ]
    value, interval, each = of_resamples([first])
    np.testing.assert_allclose(each, exact[0])
    assert value == pytest.approx(np.mean(exact[0])) and interval == pytest.approx(central(resampled[0]))
    value, interval, each = of_resamples([first, second])
    np.testing.assert_allclose(each, np.subtract(*exact))
    assert value == pytest.approx(np.subtract(*exact).mean())
    assert interval == pytest.approx(central(np.subtract(*resampled).tolist())), "both sides draw the same images"


def test_fid_and_its_interval_are_of_pairs_drawn_together_less_their_excess() -> None:
    generator = torch.Generator().manual_seed(0)
    real, near, far = (torch.randn((60, 4), generator=generator) + shift for shift in (0.0, 0.3, 1.0))
    sides = [[far, far + 0.2], [near, near + 0.1]]
    found = [fid_resamples([seed.numpy() for seed in side], real.numpy(), 30, np.arange(60)) for side in sides]

    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(60, (60,), generator=generator) for _ in range(30)]
    exact = np.array([[frechet_distance(real, seed) for seed in side] for side in sides])
    resampled = np.array([[[frechet_distance(real[r], seed[r]) for seed in side] for r in drawn] for side in sides])
    resampled += (exact - resampled.mean(axis=1))[:, None]
    means = (resampled * next(resample_counts(2, 30, 1)) / 2).sum(axis=2)

    value, interval, each = of_resamples([found[0]])
    np.testing.assert_allclose(each, exact[0], rtol=1e-4)
    assert value == pytest.approx(exact[0].mean(), rel=1e-4) and interval == pytest.approx(central(means[0]), rel=1e-4)
    value, interval, each = of_resamples(found, relative=True)
    np.testing.assert_allclose(each, exact[0] / exact[1] - 1, rtol=1e-4)
    assert value == pytest.approx(exact[0].mean() / exact[1].mean() - 1, rel=1e-4)
    assert interval == pytest.approx(central(means[0] / means[1] - 1), rel=1e-4)
    assert len(fid_resamples([near.numpy()], real.numpy(), 300, np.arange(60))[1]) == 200, (
        "more change nothing and take minutes"
    )


def test_kid_and_manifolds_of_resamples_of_seeds_are_those_of_each_seed() -> None:
    real = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    seeds = [real + torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    found = feature_resamples([seed.numpy() for seed in seeds], real.numpy(), 30, 3, np.arange(40))
    assert tuple(found) == FIDELITY
    counts = next(resample_counts(40, 30, 0))
    for place, seed in enumerate(seeds):
        expected = fidelity_resamples(real, seed, 3, counts, counts)
        for name, (value, resampled) in expected.items():
            assert found[name][0][place] == value
            np.testing.assert_array_equal(found[name][1][:, place], resampled)
    for name, each in found.items():
        same = of_resamples([each, each], relative=name == "fid")
        assert same[:2] == (0, [0, 0]), "paired: an arm does not differ from itself in any resample"


NO_METRIC = {"images", "features", "extractor", "per_finding", "too_few", "finding_auc_of"}


def test_every_metric_of_quality_is_read_from_metrics_json() -> None:
    assert {field.name for field in fields(Quality)} - {
        *NO_METRIC,
        "finding_auc_negated",
        "finding_auc_unmentioned",
    } == set(QUALITY)


# Run folders


def write_run(folder: Path, seed: int, shift: dict[str, float], images: int = 6, **config: Any) -> None:
    """A run folder with two arms, whose scores are `shift` above those of the images."""
    rng = np.random.default_rng(seed)
    run = folder / f"seed-{seed}"
    token = {f"{k}{end}": v for k in ("auc", "cnr", "top1", "iou") for end, v in (("", 0.5), ("_ci", [0.4, 0.6]))}
    located = {t: token | {"images": images, "pairs": images, "per_finding": {}} for t in ("word", "eos", "padding")}
    mass = {"bos": 0.25, "words": 0.25, "eos": 0.25, "padding": 0.25}
    drawn = {"fid": 1.0, "fid_ci": [0.5, 2.0], "finding_auc": 0.5, "finding_auc_ci": [0.4, 0.6], "diversity": 0.5}
    drawn |= {"kid": 9.0, "kid_ci": [8.0, 10.0]}
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


def rewrite(arm_dir: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the rows of pairs of an arm."""
    key, *rows = [json.loads(line) for line in (arm_dir / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    (arm_dir / "pairs.jsonl").write_text("\n".join(map(json.dumps, [key, *rows])))


def word_auc(folder: Path) -> dict[str, Any]:
    return combine(folder, samples=200)["paired"]["distilled - frozen"]["word.auc"]


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
    kid = metrics["paired"]["distilled - frozen"]["quality.kid"]
    assert kid["value"] == pytest.approx(np.mean(list(kid["per_seed"].values()))) and kid["ci"] is not None
    real = load_file(tmp_path / "seed-3/real/features.safetensors")["features"]
    assert metrics["arms"]["frozen"]["quality"]["kid"] == pytest.approx(9.0), "that of metrics.json"
    assert metrics["arms"]["frozen"]["per_seed"]["3"]["quality.kid"] == 9.0
    assert "quality.recall" in metrics["paired"]["distilled - frozen"], "6 images have a fifth neighbour"
    frozen, distilled = (
        kernel_distance(real, load_file(tmp_path / f"seed-3/{name}/features.safetensors")["features"])[0]
        for name in ("frozen", "distilled")
    )
    assert kid["per_seed"]["3"] == pytest.approx(distilled - frozen)
    assert metrics["provenance"]["seeds"]["training"] == [3, 4]
    assert set(metrics["arms"]["distilled"]["per_seed"]) == {"3", "4"}


def test_without_baselines_the_first_arm_that_was_trained_is_one(tmp_path: Path) -> None:
    write_run(tmp_path, 3, {"base": 0.0, "frozen": 0.1, "distilled": 0.2})
    for named in ((), ("gone",)):  # left out by a budget
        found = combine(tmp_path, samples=50, compare_to=named)
        assert found["compare_to"] == ["frozen"] and list(found["paired"]) == ["distilled - frozen"]
        parse_metrics(found)
    assert combine(tmp_path, samples=50, compare_to=("gone", "distilled"))["compare_to"] == ["distilled"]
    write_run(tmp_path / "alone", 3, {"base": 0.0})
    assert combine(tmp_path / "alone", samples=50)["compare_to"] == ["base"]


def test_features_of_an_earlier_evaluation_count_nothing(tmp_path: Path) -> None:
    """The file is there, and the numbers are of an evaluation without features."""
    write_run(tmp_path, 3, {"frozen": 0.0, "distilled": 0.1})
    path = tmp_path / "seed-3/metrics.json"
    metrics = json.loads(path.read_text())
    assert "quality.fid" in combine(tmp_path, samples=50)["paired"]["distilled - frozen"]
    metrics["arms"]["distilled"]["quality"] |= {"features": None, "fid": None, "fid_ci": None}
    path.write_text(json.dumps(metrics))
    found = combine(tmp_path, samples=50)["paired"]["distilled - frozen"]
    assert "word.auc" in found and not any(key.startswith("quality.") for key in found)


def test_what_is_not_resampled_has_an_interval_over_seeds(tmp_path: Path) -> None:
    """Student's t of two values: their mean -+ 12.706 of half their distance. Blind maps, which are the same in every
    seed, keep theirs."""
    for seed in (3, 4):
        write_run(tmp_path, seed, {"frozen": 0.0})
        metrics = json.loads((tmp_path / f"seed-{seed}/metrics.json").read_text())
        found, own = metrics["arms"]["frozen"], [0.1 * seed, 0.2 * seed]
        found["quality"] |= {"finding_auc_negated": 0.1 * seed, "finding_auc_negated_ci": own}
        found["quality"]["per_finding"] = {"edema": {"kid": float(seed), "kid_ci": own, "images": 20}}
        found["quality"]["per_finding"]["one"] = {"precision": 1.0, "precision_ci": [0.1 * seed, 1.0]}
        found["quality"]["per_finding"]["no"] = {"kid": None if seed == 3 else 1.0, "kid_ci": own[: seed - 3] or None}
        found["localization"]["priors"] = {"centre": {"auc": 0.6, "auc_ci": [0.5, 0.7]}}
        (tmp_path / f"seed-{seed}/metrics.json").write_text(json.dumps(metrics))
    both = combine(tmp_path, samples=50)["arms"]["frozen"]
    assert both["quality"]["finding_auc_negated"] == pytest.approx(0.35)
    half = 12.7062 * 0.5
    assert both["quality"]["per_finding"]["edema"] == {
        "kid": 3.5, "kid_ci": pytest.approx([3.5 - half, 3.5 + half], abs=1e-3), "images": 20,
    }  # fmt: skip
    assert both["quality"]["per_finding"]["one"] == {"precision": 1.0, "precision_ci": None}, "equal in all seeds"
    assert both["quality"]["per_finding"]["no"] == {"kid": None, "kid_ci": None}
    assert both["quality"]["finding_auc_negated_ci"] == [0.0, pytest.approx(0.35 + half / 10, abs=1e-4)], "in 0 .. 1"
    assert both["quality"]["kid_ci"] is not None
    assert both["localization"]["priors"]["centre"] == {"auc": 0.6, "auc_ci": [0.5, 0.7]}
    shutil.rmtree(tmp_path / "seed-4")
    alone = combine(tmp_path, samples=50)["arms"]["frozen"]["quality"]
    assert alone["finding_auc_negated_ci"] == pytest.approx([0.3, 0.6]) == alone["per_finding"]["edema"]["kid_ci"]


def test_the_verdict_on_copies_is_that_of_the_worst_seed(tmp_path: Path) -> None:
    """And the look whose weights were kept is said only where it is that of all seeds."""
    for seed, p in ((3, 0.4), (4, 1e-9), (5, 0.2)):
        write_run(tmp_path, seed, {"frozen": 0.0})
        metrics = json.loads((tmp_path / f"seed-{seed}/metrics.json").read_text())
        verdict = {"copies": 1 - p, "p": p, "least_p": 0.4, "space": f"of seed {seed}", "images": 20}
        metrics["arms"]["frozen"] |= {"memorization": verdict}
        metrics["arms"]["frozen"]["cost"]["kept"] = {"step": 100 if seed == 3 else 300, "rule": "loss", "value": 0.1}
        (tmp_path / f"seed-{seed}/metrics.json").write_text(json.dumps(metrics))
    found = combine(tmp_path, samples=50)["arms"]["frozen"]
    of_three = {"p": pytest.approx(3e-9), "least_p": 1.0}  # Bonferroni: of many seeds without copies, one has a small p
    assert found["memorization"] == {"copies": 1 - 1e-9, "space": "of seed 4", "images": 20, "seed": 4} | of_three
    assert "kept" not in found["cost"] and found["cost"]["train_seconds"] == 1.0
    shutil.rmtree(tmp_path / "seed-3")
    assert combine(tmp_path, samples=50)["arms"]["frozen"]["cost"]["kept"]["step"] == 300
    near = {"near": 2, "near_held_out": 0, "near_tested": 50, "near_p": 0.4}
    for seed, more in ((4, near | {"near_held_out": 2}), (5, near)):
        path = tmp_path / f"seed-{seed}/metrics.json"
        metrics = json.loads(path.read_text())
        metrics["arms"]["frozen"]["memorization"] |= more
        path.write_text(json.dumps(metrics))
    worst = combine(tmp_path, samples=50)["arms"]["frozen"]["memorization"]
    assert (worst["seed"], worst["near"], worst["near_p"]) == (5, 2, 0.8), "near copies, where no real image is one"
    shutil.rmtree(tmp_path / "seed-5")
    assert "seed" not in combine(tmp_path, samples=50)["arms"]["frozen"]["memorization"]


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


def test_the_images_of_one_cluster_are_drawn_together(tmp_path: Path) -> None:
    write_run(tmp_path, 0, {"frozen": 0.0, "distilled": 0.0})
    rewrite(tmp_path / "seed-0/distilled", lambda row: row["scores"]["word"].update(auc=row["image"] % 3))
    alone = word_auc(tmp_path)["ci"]
    for arm in ("frozen", "distilled"):
        rewrite(tmp_path / "seed-0" / arm, lambda row: row.update(cluster=str(row["image"] % 2)))
    together = word_auc(tmp_path)["ci"]
    assert together[1] - together[0] > 0 and together != alone
    for arm in ("frozen", "distilled"):
        rewrite(tmp_path / "seed-0" / arm, lambda row: row.update(cluster="the same"))
    assert word_auc(tmp_path)["ci"] is None, "of one cluster there is no interval"


@pytest.mark.parametrize("arm", ["frozen", "distilled"])
def test_a_pair_without_a_score_in_any_seed_or_arm_is_left_out_of_all(tmp_path: Path, arm: str) -> None:
    for seed in (0, 1):
        write_run(tmp_path, seed, {"frozen": 0.0, "distilled": 0.0})
        rewrite(tmp_path / f"seed-{seed}/distilled", lambda row: row["scores"]["word"].update(auc=row["image"]))
        rewrite(tmp_path / f"seed-{seed}/frozen", lambda row: row["scores"]["word"].update(auc=0.0))
    rewrite(
        tmp_path / "seed-1" / arm, lambda row: row["scores"]["word"].update(auc=None) if row["image"] == 5 else None
    )
    found = word_auc(tmp_path)
    assert found["value"] == pytest.approx(2.0) and found["per_seed"] == pytest.approx({"0": 2.0, "1": 2.0})


@pytest.mark.parametrize(("average", "expected"), [("macro", 0.5), ("micro", 1 / 6)])
def test_means_are_over_findings_or_over_pairs(tmp_path: Path, average: str, expected: float) -> None:
    write_run(tmp_path, 0, {"frozen": 0.0, "distilled": 0.0})
    for arm, gain in (("frozen", 0.0), ("distilled", 1.0)):
        rewrite(
            tmp_path / "seed-0" / arm,
            lambda row, gain=gain: (
                row.update(finding=int(row["image"] == 0))
                or row["scores"]["word"].update(auc=gain * (row["image"] == 0))
            ),
        )
    metrics = json.loads((tmp_path / "seed-0/metrics.json").read_text())
    for entry in metrics["arms"].values():
        entry["localization"]["word"]["average"] = average
    (tmp_path / "seed-0/metrics.json").write_text(json.dumps(metrics))
    assert word_auc(tmp_path)["value"] == pytest.approx(expected)


def test_other_images_are_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, seed, {"frozen": 0.0, "distilled": 0.0})
    rewrite(tmp_path / "seed-1/distilled", lambda row: row.update(image=row["image"] + 1))
    with pytest.raises(UserError, match="scored on different images"):
        combine(tmp_path)


def test_what_one_seed_lacks_has_no_mean(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, seed, {"frozen": 0.0})
    path = tmp_path / "seed-1/metrics.json"
    metrics = json.loads(path.read_text())
    metrics["arms"]["frozen"]["quality"] |= {"finding_auc": None, "fid": 2.0, "fid_ci": [1.0, 4.0]}
    path.write_text(json.dumps(metrics))
    found = combine(tmp_path, samples=2)["arms"]["frozen"]
    assert found["quality"]["finding_auc"] is None and found["quality"]["fid"] == 1.5
    assert found["per_seed"]["0"]["quality.finding_auc"] == 0.5 and found["per_seed"]["1"]["quality.fid"] == 2.0


def test_the_evaluation_of_the_base_is_that_of_another_seed(tmp_path: Path) -> None:
    (tmp_path / "seed-0" / "base" / "samples").mkdir(parents=True)
    (tmp_path / "seed-0" / "base" / "samples" / "0000.png").write_bytes(b"drawn")
    target = tmp_path / "seed-1" / "base"
    share_base([tmp_path], target)
    assert not target.exists(), "seed 0 is not complete"
    (tmp_path / "seed-0" / "metrics.json").write_text("{}")
    share_base([tmp_path], target)
    assert (target / "samples" / "0000.png").read_bytes() == b"drawn"
    (tmp_path / "seed-0" / "base" / "samples" / "0000.png").write_bytes(b"another")
    share_base([tmp_path], target)
    assert (target / "samples" / "0000.png").read_bytes() == b"drawn", "what is there stays"


def test_patients_are_drawn_and_not_their_images() -> None:
    """Three images of each of four patients: as if the images of a patient were drawn one after another."""
    groups = np.repeat([0, 1, 2, 3], 3)
    rng = np.random.default_rng(0)
    real, labels = rng.normal(size=(12, 2)), (np.arange(12) % 2 == 0)[:, None]
    generated = real + rng.normal(size=(12, 2))
    rows = [[3 * p + k for p in patients for k in range(3)] for _, patients in draws(4, 40, 1)]
    _, areas = auc_resamples([generated[:, :1]], labels, 40, groups)
    np.testing.assert_allclose(areas[:, 0], [roc_auc_score(labels[r, 0], generated[r, 0]) for r in rows])
    found = feature_resamples([generated], real, 40, 3, groups)
    sides = torch.from_numpy(real), torch.from_numpy(generated)
    counts = np.array([np.bincount(r, minlength=12) for r in rows])
    resampled = kernel_distance(*sides, counts, counts)
    np.testing.assert_allclose(found["kid"][1][:, 0], resampled + found["kid"][0][0] - resampled.mean())
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(4, (4,), generator=generator) for _ in range(40)]
    rows_of = [torch.cat([torch.arange(3 * p, 3 * p + 3) for p in patients.tolist()]) for patients in drawn]
    distances = np.array([frechet_by_factors(sides[0][r], sides[1][r]) for r in rows_of])
    expected = distances + frechet_by_factors(*sides) - distances.mean()
    np.testing.assert_allclose(found["fid"][1][:, 0], expected)


def test_the_patients_of_a_run_decide_its_intervals(tmp_path: Path) -> None:
    write_run(tmp_path, 1, {"frozen": 0.0, "other": 0.3})
    files = sorted(tmp_path.glob("seed-1/*/features.safetensors"))
    before = combine(tmp_path, samples=50)["paired"]["other - frozen"]
    for file in files:
        tensors = load_file(file)
        count = len(tensors["indices"])
        save_file(tensors | {"groups": torch.zeros(count, dtype=torch.int64)}, file)
    rows_of = sorted(tmp_path.glob("seed-1/*/pairs.jsonl"))
    for path in rows_of:
        head, *lines = path.read_text().splitlines()
        lines = [json.dumps(json.loads(line) | {"group": "patient a"}) for line in lines]
        path.write_text("\n".join([head, *lines]) + "\n")
    after = combine(tmp_path, samples=50)["paired"]["other - frozen"]
    assert before["word.auc"]["ci"] is not None and before["quality.fid"]["ci"] is not None
    assert after["word.auc"]["ci"] is None, "one patient has no interval"
    assert after["word.auc"]["value"] == before["word.auc"]["value"]
    assert "quality.fid" not in after and "quality.finding_auc" not in after


def test_an_arm_without_maps_leaves_the_other_measures(tmp_path: Path) -> None:
    """As where a run was continued with evaluation.parts quality, and only the base keeps its maps."""
    write_run(tmp_path, 1, {"frozen": 0.0, "other": 0.3})
    path = tmp_path / "seed-1/metrics.json"
    metrics = json.loads(path.read_text())
    metrics["arms"]["other"]["localization"] = None
    arms = metrics["arms"]
    found = Resampled({1: tmp_path / "seed-1"}, arms, 50).paired(list(arms), ["frozen"])["other - frozen"]
    assert "quality.fid" in found and not any(key.startswith("word.") for key in found)


def test_seeds_are_drawn_as_often_as_images_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "COUNTS_AT_ONCE", 20)  # blocks of two
    value = of_pairs(np.random.default_rng(0).normal(size=(8, 9)), np.zeros(9, dtype=int), np.arange(9) // 2, 50)
    assert value[1] is not None

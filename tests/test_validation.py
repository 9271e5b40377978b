"""Looks at validation images: the loss by hand, what decides it, its log; and whether looks tell held-out quality."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from scipy import stats
from tiny import tiny_sd
from toy_family import toy_model

from distill.config import FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.evaluation import validation
from distill.evaluation.claims import student_interval
from distill.evaluation.validation import read_looks, validation_loss, write_look
from distill.evaluation.validation_signal import agreements, rank_correlation
from distill.experiment.signals import write_signals
from distill.models import Model, model_of

CONFIG = FullEvaluation(batch_size=2, seed=3)


def images() -> PhantomDataset:
    return PhantomDataset("validation", 3, resolution=64)


def loss_of(model: Model, dataset: PhantomDataset | None = None, **options: Any) -> float:
    return validation_loss(model, dataset or images(), CONFIG.model_copy(update=options), Accelerator())


def test_the_loss_is_the_mean_error_of_the_prediction_with_the_noise_of_each_image() -> None:
    model, dataset, found = model_of(tiny_sd()), images(), []
    schedule = model.noise_scheduler.alphas_cumprod
    for i in range(3):
        with torch.no_grad():
            latents = model.vae.encode(dataset[i].pixel_values[None]).latent_dist.mean * model.vae.config.scaling_factor
            embeds, _ = model.encode(model.tokenize([dataset.caption(i)]))
            noise = torch.randn((5, *latents.shape[1:]), generator=torch.Generator().manual_seed(3 + i))
            for place, t in enumerate((100, 300, 500, 700, 900)):
                noisy = schedule[t] ** 0.5 * latents + (1 - schedule[t]) ** 0.5 * noise[place]
                predicted = model.denoiser(noisy, t, embeds).sample
                found.append(float((predicted - noise[place]).square().mean()))
    assert loss_of(model) == pytest.approx(sum(found) / len(found), rel=1e-5)


def test_the_loss_depends_on_weights_seed_and_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(tiny_sd())
    loss = loss_of(model)
    torch.manual_seed(7)
    assert loss_of(model) == loss and loss_of(model, batch_size=3) == pytest.approx(loss, rel=1e-6)
    assert loss_of(model, seed=4) != loss != loss_of(model_of(tiny_sd(seed=1)))
    monkeypatch.setattr(validation, "IMAGES", 2)
    first = loss_of(model)
    assert first != loss and first == loss_of(model, PhantomDataset("validation", 2, resolution=64))


def test_another_family_and_another_prediction_have_a_loss_too() -> None:
    assert all(0 < loss_of(model) < 10 for model in (toy_model(), model_of(tiny_sd("v_prediction"))))


def test_a_look_takes_the_place_of_later_ones_and_torn_lines_are_left_out(tmp_path: Path) -> None:
    log = tmp_path / "arm" / "validation_log.jsonl"
    assert read_looks(log) == {}
    for step in (10, 20, 30):
        write_look(log, {"step": step, "validation_loss": step / 7})
    with log.open("a") as file:
        file.write('{"step": 40, "valid')
    write_look(log, {"step": 20, "validation_loss": 0.5})
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {"step": 10, "validation_loss": 10 / 7},
        {"step": 20, "validation_loss": 0.5},
    ]


# Do looks tell held-out quality?


def brute_force(a: list[int], b: list[int]) -> float:
    """Pearson's correlation of mean ranks, counted pair by pair."""

    def ranks(values: list[int]) -> list[float]:
        return [sum(other < value for other in values) + (values.count(value) + 1) / 2 for value in values]

    x, y = ranks(a), ranks(b)
    middle = (len(a) + 1) / 2
    both = sum((p - middle) * (q - middle) for p, q in zip(x, y, strict=True))
    return float(both / (sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y)) ** 0.5)


def test_the_rank_correlation_is_the_one_that_is_counted_and_that_of_scipy() -> None:
    draw = random.Random(0)
    for _ in range(50):
        a, b = ([draw.randint(0, 5) for _ in range(7)] for _ in range(2))
        if min(len(set(a)), len(set(b))) > 1:
            assert rank_correlation(a, b) == pytest.approx(brute_force(a, b))
            assert rank_correlation(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert rank_correlation([1, 2], [1, 2]) is None and rank_correlation([1, 2, 3], [4, 4, 4]) is None


def look(step: int, loss: float, adds: float) -> dict[str, Any]:
    return {"step": step, "validation_loss": loss, "finding_auc": None, "word": {"auc": 0.5, "image_adds": adds}}


def test_a_low_loss_agrees_with_a_low_fid_and_the_interval_is_over_seeds() -> None:
    looks = {seed: {step: look(step, 1 / step, step) for step in (1, 2, 3)} for seed in (0, 1)}
    fid = {0: (9.0, 8.0, 7.0), 1: (9.0, 7.0, 8.0)}
    held_out = {
        seed: {step: {"quality.fid": fid[seed][step - 1], "word.auc": -float(step)} for step in (1, 2, 3)}
        for seed in (0, 1)
    }
    held_out[0][4] = {"quality.fid": 1.0}  # no look there
    found = {(one.rule, one.metric): one for one in agreements(looks, held_out)}
    assert set(found) == {(rule, metric) for rule in ("loss", "image_adds") for metric in ("quality.fid", "word.auc")}
    one = found["loss", "quality.fid"]
    assert one.per_seed == pytest.approx({0: 1.0, 1: 0.5}) and one.weights == 3
    assert one.mean == pytest.approx(0.75) and one.interval == (-1, 1), "Student's t reaches further"
    third = {2: {step: look(step, 1 / step, step) for step in (1, 2, 3, 4)}}
    ranks = {2: {step: {"quality.fid": (9.0, 8.0, 6.0, 7.0)[step - 1]} for step in (1, 2, 3, 4)}}
    (one,) = (a for a in agreements({**third, 3: third[2]}, {**ranks, 3: ranks[2]}) if a.rule == "loss")
    assert one.interval == pytest.approx(student_interval([0.8, 0.8])) and one.mean == pytest.approx(0.8)
    assert found["image_adds", "word.auc"].mean == pytest.approx(-1)


def test_budgets_with_looks_say_whether_these_tell_held_out_quality(tmp_path: Path) -> None:
    folders = {budget: tmp_path / f"budget-{budget}" for budget in (10, 20, 30)}
    for budget, folder in folders.items():
        per_seed = {str(seed): {"word.image_adds": budget / 100, "quality.fid": 50.0 - budget} for seed in (0, 1)}
        trained = {"cost": {"steps": budget, "image_passes_with_teachers": 3}, "per_seed": per_seed}
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"arms": {"a": trained}}))
    assert write_signals(tmp_path, folders) is None and not (tmp_path / "looks.md").exists()
    for seed in (0, 1):
        for step in (10, 20, 30, 40):
            write_look(tmp_path / f"budget-30/seed-{seed}/a/validation_log.jsonl", look(step, 1 / step, -step))
    assert write_signals(tmp_path, folders) == tmp_path / "looks.md"
    (loss, adds) = (line for line in (tmp_path / "looks.md").read_text().splitlines() if line.startswith("| a |"))
    assert (
        loss.split(" | ")[1:4] == ["loss", "3", "\\+1.00 \\[+1.00, +1.00\\]"] and "image\\_adds | 3 | \\-1.00" in adds
    )
    assert {one["metric"] for one in json.loads((tmp_path / "looks.json").read_text())["a"]} == {
        "word.image_adds",
        "quality.fid",
    }

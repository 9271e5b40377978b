"""A classifier tells what training images are worth, on real images that it did not see."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recipe import recipe_module, refusal_of
from scipy.stats import t as student_t
from sklearn.metrics import roc_auc_score
from test_memorization import drawing, evaluate_argv, image_folder
from test_reuse import never

from distill.cli import parse
from distill.config import EvaluationConfig
from distill.data.phantom.dataset import PhantomDataset
from distill.errors import UserError
from distill.evaluation import drawing as module
from distill.evaluation import utility as utility_module
from distill.evaluation.claims import student_interval
from distill.evaluation.utility import FEWEST, Labelled, Task, interval, mean_auc, train_classifier, utility
from distill.metrics.bootstrap import image_counts


def with_squares(count: int, seed: int) -> Labelled:
    """Finding 0 is a bright square on the left, finding 1 on the right, in noise."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.2 * torch.randn(count, 3, 64, 64, generator=generator)
    labels = torch.rand(count, 2, generator=generator) < 0.5
    for image, (left, right) in zip(images, labels, strict=True):
        image[:, 24:40, 8:24] += 0.5 * left
        image[:, 24:40, 40:56] += 0.5 * right
    return Labelled.of(images.clamp(-1, 1), labels)


def wrong(data: Labelled) -> Labelled:
    """Every image with the labels of another."""
    return Labelled(data.images, data.labels[torch.randperm(len(data), generator=torch.Generator().manual_seed(9))])


def test_good_images_are_worth_as_much_as_real_ones_and_wrong_labels_nothing() -> None:
    real, held_out = with_squares(64, 0), with_squares(64, 1)
    good = utility(real, with_squares(64, 2), held_out, steps=25, seeds=(0, 1))
    assert good["real"] > 0.9 and good["generated"] > 0.9
    assert good["generated_minus_real_per_seed"] == pytest.approx(
        np.subtract(good["generated_per_seed"], good["real_per_seed"])
    )
    assert (good["images"], good["real_images"], good["held_out_images"]) == (64, 64, 64)
    assert good["real_ci"][0] <= good["real"] <= good["real_ci"][1]
    bad = float(mean_auc(train_classifier(wrong(with_squares(64, 2)), 25, 0), held_out)[0])
    assert abs(bad - 0.5) < 0.2 < good["generated"] - bad


def test_the_area_of_a_resample_is_that_of_its_images() -> None:
    data, model = with_squares(40, 3), train_classifier(with_squares(40, 0), 5, 0)
    counts = np.concatenate([*image_counts(np.arange(40) // 2, 6, 0)])
    found = mean_auc(model, data, counts)
    with torch.no_grad():
        scores = model(data.images).numpy()
    for row, value in zip([np.ones(40), *counts], found, strict=True):
        images = np.repeat(np.arange(40), row.astype(int))
        each = [roc_auc_score(data.labels[images, k], scores[images, k]) for k in range(2)]
        assert value == pytest.approx(np.mean(each))


def test_an_interval_covers_seeds_and_tested_images() -> None:
    values, resampled = [0.6, 0.62, 0.7], np.array([0.5, 0.7, 0.6, 0.8])
    low, high = interval(values, resampled, 0.0) or (0, 0)
    seeds = student_t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert high - low == pytest.approx(2 * np.sqrt(seeds**2 + (1.95996 * resampled.std()) ** 2), rel=1e-4)
    assert interval(values, np.full(4, 0.6), 0.0) == pytest.approx(student_interval(values))
    low, high = interval([0.99, 0.999], np.array([0.9, 1.0]), 0.0) or (0, 0)
    assert high == 1 and low == pytest.approx(0.9945 - np.hypot(12.7062 * 0.0045, 1.95996 * 0.05), rel=1e-4)
    assert (interval([0.01, 0.2], resampled, 0.0) or [9])[0] == 0 > (interval([0.01, 0.2], resampled, -1.0) or [9])[0]
    assert interval([0.5], resampled, 0.0) is None


def test_the_same_images_differ_by_nothing() -> None:
    real, held_out = with_squares(40, 0), with_squares(40, 1)
    found = utility(real, real, held_out, steps=3, seeds=(0, 1), patients=np.arange(40) // 4)
    assert found["generated_minus_real_ci"] == [0, 0] and found["generated_ci"] == found["real_ci"]
    alone = utility(real, real, held_out, steps=3, seeds=(0, 1))
    assert alone["real_per_seed"] == found["real_per_seed"] and alone["real_ci"] != found["real_ci"], "whole patients"


def test_a_classifier_is_decided_by_its_data_and_seed() -> None:
    data = with_squares(40, 0)
    first, again, other = (train_classifier(data, 3, seed)(data.images) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- the recipe -----------------------------------------------------------------------------------------------------


def phantoms(count: int = 60) -> PhantomDataset:
    return PhantomDataset("test", count, 0, 64)


def test_no_patient_is_on_both_sides_and_findings_are_mixed_on_both() -> None:
    class OfPatients(PhantomDataset):
        def patient(self, index: int) -> str:
            return f"p{index // 4}"

    dataset = OfPatients("test", 60, 0, 64)
    task = Task.of(dataset, range(0, 22))
    assert list(task.tested) == list(range(24, 60)), "rows 22 and 23 are of the patient of row 21"
    stated = {name: sum(name in dataset.labels(row) for row in task.tested) for name in task.findings}
    assert stated and all(FEWEST <= count <= 36 - FEWEST for count in stated.values())
    with pytest.raises(
        UserError, match="trained on 58 images .*tested on the 2 other held-out ones.*leave utility out"
    ):
        Task.of(phantoms(), range(58))


def test_images_are_asked_for_findings_that_their_labels_name() -> None:
    """A classifier trained on images whose labels name nothing would look useless, by noise."""
    task = Task(phantoms(), range(30), range(30, 60), ("edema", "pleural effusion"))
    edema = [("Edema",)] * FEWEST + [()] * FEWEST
    assert task.named_in(edema).findings == ["edema"] and task.named_in(edema).tested == task.tested
    for labels in ([()] * 20, [("edema",)] * 20, [("effusion",)] * 10 + [()] * 10):
        with pytest.raises(
            UserError, match=r"held-out images \(edema, pleural effusion\) none is in the labels of 5 of"
        ):
            task.named_in(labels)


@pytest.mark.parametrize("processes", [1, 2])
def test_each_image_keeps_its_own_labels(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever process reads it."""
    dataset, rows, shares = phantoms(), [*range(3, 40)], list[Any]()
    task = Task(dataset, rows, range(40, 60), ("pleural effusion", "edema"))
    monkeypatch.setattr(utility_module, "gather_object", lambda own: shares.extend(own) or shares)
    for rank in reversed(range(processes)):
        state = SimpleNamespace(process_index=rank, num_processes=processes)
        monkeypatch.setattr(utility_module, "process_state", partial(lambda state: state, state))
        found = task._labelled(rows, lambda row: dataset[row].pixel_values, dataset.labels)
    assert found.labels.tolist() == [[name in dataset.labels(row) for name in task.findings] for row in rows]
    alone = Labelled.of(dataset[rows[-1]].pixel_values[None], found.labels[-1:])
    assert len(found) == 37 and torch.equal(found.images[-1:], alone.images)


def argv_of(tmp_path: Path, *more: str) -> list[str]:
    argv = evaluate_argv(tmp_path, "--evaluation.utility_steps", "3", "--evaluation.utility_seeds", "2", *more)
    argv[argv.index("--data.test_size") + 1], argv[argv.index("--evaluation.generated_images") + 1] = "60", "30"
    argv[argv.index("quality,memorization")] = "utility"
    return argv


def test_the_recipe_measures_utility_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "generate", drawing(phantoms()))
    recipe = recipe_module("evaluate")
    recipe.evaluate(parse(recipe.EvaluateConfig, argv_of(tmp_path)))
    found = json.loads((tmp_path / "out/metrics.json").read_text())["arms"]["base"]
    assert found["quality"] is None and "memorization" not in found
    utility = found["utility"]
    assert (utility["images"], utility["real_images"], utility["held_out_images"]) == (30, 30, 30)
    # The drawn images are the real ones.
    assert utility["generated_per_seed"] == utility["real_per_seed"] and utility["generated_minus_real"] == 0
    assert ">utility, over real ↑</th>" in (tmp_path / "out/report.html").read_text()
    monkeypatch.setattr(module, "generate", never)
    recipe.evaluate(parse(recipe.EvaluateConfig, argv_of(tmp_path)))
    assert "base: utility is already evaluated" in capsys.readouterr().out
    recipe.evaluate(parse(recipe.EvaluateConfig, argv_of(tmp_path, "--evaluation.utility_steps", "2")))
    printed = capsys.readouterr().out
    assert "base: utility is measured anew: evaluation.utility_steps was 3 and is 2" in printed
    argv = argv_of(tmp_path)
    argv[argv.index("--evaluation.generated_images") + 1] = "59"
    assert "tested on the 1 other held-out ones" in refusal_of(recipe.evaluate, recipe.EvaluateConfig, argv, capsys)


def test_images_of_another_tool_have_a_utility(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "generate", never)
    images = image_folder(tmp_path / "images", PhantomDataset("train", 40, 0, 64), 40)
    recipe = recipe_module("evaluate")
    recipe.evaluate(parse(recipe.EvaluateConfig, argv_of(tmp_path, "--images", str(images))))
    utility = json.loads((tmp_path / "out/metrics.json").read_text())["arms"]["images"]["utility"]
    assert (utility["images"], utility["real_images"], utility["held_out_images"]) == (30, 30, 30)
    assert len(utility["both_per_seed"]) == 2 and utility["findings"]


def test_some_images_of_another_tool_keep_their_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "generate", never)
    pictures = PhantomDataset("train", 40, 0, 64)
    seen: list[tuple[torch.Tensor, tuple[str, ...]]] = []

    def measure(self: Task, count: int, image: Any, labels: Any, **_: Any) -> dict[str, Any]:
        seen.extend((image(k), tuple(labels(k))) for k in range(count))
        raise UserError("seen")

    monkeypatch.setattr(Task, "measure", measure)
    images = image_folder(tmp_path / "images", pictures, 40)
    recipe = recipe_module("evaluate")
    with pytest.raises(UserError, match="seen"):
        recipe.evaluate(parse(recipe.EvaluateConfig, argv_of(tmp_path, "--images", str(images))))
    known = [(pictures[k].pixel_values, pictures.labels(k)) for k in range(40)]
    places = [
        next(k for k, (other, _) in enumerate(known) if (pixels - other).abs().max() < 0.02) for pixels, _ in seen
    ]
    assert len(set(places)) == 30 and max(places) >= 30, "not the first ones"
    assert [{name.lower() for name in labels} for _, labels in seen] == [
        {n.lower() for n in known[k][1]} for k in places
    ]


def test_an_arm_of_tradeoff_has_no_utility() -> None:
    with pytest.raises(ValueError, match="utility"):
        EvaluationConfig(parts=("utility",))  # type: ignore[arg-type]

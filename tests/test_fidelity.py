"""Quality of the images of each finding, and the finding AUC against captions that negate it and that do not name
it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from listed import WORDS, Listed, sample
from safetensors.torch import load_file
from test_evaluate import CONFIG, Means, pictures

from distill.data.captions import negated_findings
from distill.evaluation.drawing import save_features
from distill.evaluation.evaluate import held_out
from distill.evaluation.fidelity import Generated, compare, of_each_finding, unknown_findings
from distill.metrics import MANIFOLD, Manifolds, kernel_distance
from distill.metrics.bootstrap import resample_counts
from distill.models.family import Model


def drawn(seed: int, count: int, shift: float = 0.0, labels: tuple[str, ...] = ("edema", "mass")) -> Generated:
    """Every image has the first label, every third the second as well, and every fifth none."""
    features = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    names = [() if i % 5 == 4 else labels if i % 3 == 0 else labels[:1] for i in range(count)]
    return Generated(list(range(count)), features, None, names)


def rows_with(images: Generated, name: str) -> torch.Tensor:
    assert images.features is not None
    return images.features[[place for place, labels in enumerate(images.labels) if name in labels]]


def test_quality_of_a_finding_is_that_of_its_images_alone() -> None:
    real, generated = drawn(0, 90), drawn(1, 90, 0.5)
    found = of_each_finding(real, generated, CONFIG)
    assert list(found["per_finding"]) == ["edema", "mass"] and found["too_few"] == {"no finding": 18}
    mass = found["per_finding"]["mass"]
    sides = rows_with(real, "mass"), rows_with(generated, "mass")
    assert (mass["images"], mass["real_images"]) == (24, 24) == (len(sides[0]), len(sides[1]))
    assert (
        mass["kid"] == pytest.approx(kernel_distance(*sides)[0])
        and mass["kid_ci"][0] <= mass["kid"] <= mass["kid_ci"][1]
    )
    expected = dict(zip(MANIFOLD, Manifolds(*sides, 5).values(), strict=True))
    assert {name: mass[name] for name in MANIFOLD} == pytest.approx(expected)
    assert "fid" not in mass, "it is biased at few images"


def test_names_of_both_sides_meet_in_lower_case_and_a_finding_of_one_side_is_too_few() -> None:
    found = of_each_finding(drawn(0, 60), drawn(1, 60, labels=("Edema", "Nodule")), CONFIG)
    assert list(found["per_finding"]) == ["edema"]
    assert found["too_few"] == {"mass": 0, "no finding": 12, "nodule": 0}
    unlabelled = Generated([0, 1], torch.zeros(2, 6), None, [(), ()])
    assert of_each_finding(drawn(0, 60), unlabelled, CONFIG) == {"per_finding": None, "too_few": None}


def test_the_floor_takes_as_many_images_of_both_sides() -> None:
    real, others = drawn(0, 100), drawn(1, 60)
    floor = of_each_finding(real, others, CONFIG, alike=True)["per_finding"]["edema"]
    assert floor["images"] == floor["real_images"] == 48
    sides = rows_with(real, "edema")[:48], rows_with(others, "edema")
    assert floor["kid"] == pytest.approx(kernel_distance(*sides)[0])


def test_real_images_have_the_floor_of_each_finding(sd: Model, accelerator: Accelerator, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"generated_images": 40, "parts": ("quality",)})
    against = held_out(pictures(80), sd, config, Means(), accelerator=accelerator, run_dir=tmp_path)
    floor = against.quality["per_finding"]
    assert {name: one["images"] for name, one in floor.items()} == {"edema": 20, "pleural effusion": 20}
    assert all(len(one["kid_ci"]) == 2 for one in floor.values())
    assert floor["edema"]["finding_auc"] == 1 and "finding_auc" not in floor["pleural effusion"]


def test_the_floor_has_each_image_once_or_is_missing_with_a_reason(
    sd: Model, accelerator: Accelerator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two captions an image."""
    config = CONFIG.model_copy(update={"generated_images": 20, "parts": ("quality",)})
    for images, has_floor in ((40, True), (30, False)):
        single = pictures(images)
        twice = Listed([single[k // 2] for k in range(2 * images)], WORDS)
        twice.image_key = lambda index: str(index // 2)  # type: ignore[attr-defined]
        caplog.clear()
        against = held_out(twice, sd, config, Means(), accelerator=accelerator, run_dir=tmp_path)
        assert (against.quality["fid"] is not None) == has_floor
        said = "no row of real images: it takes as many other held-out images, 20, and there are 1"
        assert (said in caplog.text) != has_floor


def test_the_floor_is_between_images_of_other_patients(
    sd: Model, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"generated_images": 40, "parts": ("quality",)})
    dataset = pictures(80)
    for patients, has_floor in ((80, True), (1, False)):
        monkeypatch.setattr(dataset, "patient", lambda index, n=patients: str(index % n), raising=False)
        against = held_out(dataset, sd, config, Means(), accelerator=accelerator, run_dir=tmp_path)
        assert (against.quality["fid"] is not None) == has_floor


# --- negations ----------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "Edema.": ("edema",), "No edema.": (), "A picture.": (), "Edema, no effusion.": ("edema",),
    "Effusion.": ("pleural effusion",), "No effusion.": (),
}  # fmt: skip


def test_a_caption_negates_what_it_names_and_its_labels_lack() -> None:
    dataset = Listed([sample("a", text, *((name, None) for name in names)) for text, names in CAPTIONS.items()], WORDS)
    found = [negated_findings(dataset, index) for index in range(len(dataset))]
    assert found == [(), ("edema",), (), ("pleural effusion",), (), ("pleural effusion",)]
    shared = {"pleural effusion": ("pleural", "effusion"), "pleural thickening": ("pleural", "thickening")}
    both = Listed([sample("a", "Pleural effusion.", ("pleural effusion", None))], shared)
    assert negated_findings(both, 0) == (), "the word belongs to the finding that is stated"


def test_negated_and_unnamed_findings_are_apart() -> None:
    """The model draws edema also where the caption negates it, and not where it does not name it."""
    texts = [text for text in CAPTIONS for _ in range(4)]
    dataset = Listed(
        [sample(f"{k}", text, *((name, None) for name in CAPTIONS[text])) for k, text in enumerate(texts)], WORDS
    )
    scores = torch.tensor([[1.0 if "edema" in text.lower() else 0.0] for text in texts])
    images = Generated([*range(len(texts))], torch.rand(len(texts), 4), scores)
    found = compare(images, images, dataset, CONFIG, Means())
    assert found["finding_auc_negated"] == 0.5 and found["finding_auc_unmentioned"] == 1
    assert 0.5 < found["finding_auc"] < 1 and len(found["finding_auc_unmentioned_ci"]) == 2


def test_findings_that_the_classifier_lacks_are_named() -> None:
    dataset = Listed([sample("a", "Clear.")], {"Edema": ("edema",), "effusion": ("effusion",)})
    features = Means()
    assert unknown_findings(dataset, features) == ["effusion"] and unknown_findings(dataset, None) == []
    features.findings = ()
    assert unknown_findings(dataset, features) == [], "there is no classifier"


def test_intervals_are_of_whole_patients(tmp_path: Path) -> None:
    """Against the distances of resamples whose counts are those of the patients; one patient has no interval."""
    real, generated = drawn(0, 60), drawn(1, 60, 0.5)
    patients = [f"patient {i // 6}" for i in range(60)]
    sides = [replace(side, groups=patients) for side in (real, generated)]
    dataset = Listed([sample(f"{i}", "Edema.") for i in range(60)], WORDS)
    found = compare(sides[1], sides[0], dataset, CONFIG, None)
    assert real.features is not None and generated.features is not None
    blocks = [
        next(resample_counts(10, CONFIG.bootstrap_samples, CONFIG.seed + k))[:, np.arange(60) // 6] for k in (0, 1)
    ]
    distances = kernel_distance(real.features, generated.features, *blocks)
    expected = np.quantile(distances + found["kid"] - distances.mean(), [0.025, 0.975])
    assert found["kid_ci"] == pytest.approx(expected)
    near = torch.randn(20, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).repeat_interleave(
        3, dim=0
    )
    alike = [
        replace(side, features=near + 0.1 * side.features + shift, groups=[f"{i // 3}" for i in range(60)])
        for side, shift in ((sides[0], 0.0), (sides[1], 0.3))
        if side.features is not None
    ]
    kid = compare(alike[1], alike[0], dataset, CONFIG, None)
    assert kid["kid_ci"][0] < kid["kid"] < kid["kid_ci"][1], (
        "a resample holds more pairs of one patient, which are alike"
    )
    by_image = compare(generated, real, dataset, CONFIG, None)
    assert found["fid_ci"] != by_image["fid_ci"] and found["fid"] == by_image["fid"]
    alone = compare(replace(generated, groups=["p"] * 60), sides[0], dataset, CONFIG, None)
    assert alone["fid_ci"] is alone["kid_ci"] is alone["per_finding"]["edema"]["kid_ci"] is None
    assert alone["kid"] == found["kid"]
    save_features(sides[0], dataset, Means(), tmp_path / "a")
    assert load_file(tmp_path / "a")["groups"].tolist() == [i // 6 for i in range(60)]
    save_features(real, dataset, Means(), tmp_path / "b")
    assert "groups" not in load_file(tmp_path / "b")

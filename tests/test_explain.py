"""The recipe says in plain English what betrays images, of a model or of a folder, and whose fault it is."""

from __future__ import annotations

import html
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from listed import Listed, sample
from PIL import Image, ImageFilter
from recipe import config_class_of, recipe_module, refusal_of
from test_memorization import drawing, evaluate_argv, image_folder
from test_reuse import never
from tiny import save_tiny

from distill.cli import parse
from distill.data.phantom.dataset import PhantomDataset
from distill.data.readers.image_folder import ImageFolder
from distill.data.sample import group_key
from distill.errors import UserError
from distill.evaluation import detection
from distill.evaluation import drawing as drawing_module
from distill.evaluation import evaluate as evaluation
from distill.evaluation import explanation as module
from distill.evaluation.detection import Change, Explained
from distill.evaluation.evaluate import explained_rows
from distill.evaluation.explanation import BEYOND, CONTROL, GENERATED, VAE, Pictures, needed, one_of_each_image
from distill.evaluation.results import Arm, Cost, Estimate, Explanation, Results
from distill.metrics.image_features import FEATURES
from distill.report import explanation, faults
from distill.report.explanation import change_sentence, sentences, single_sentence
from distill.report.tables import format_number

DATA = ["--data.resolution", "64", "--data.test_size", "40", "--drawing.count", "20", "--drawing.batch_size", "10"]


@pytest.fixture(autouse=True)
def one_round_of_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the detectors."""
    monkeypatch.setattr(detection, "REPEATS", 1)


def run(tmp_path: Path, *argv: str) -> tuple[dict[str, Any], str]:
    recipe = recipe_module("explain")
    recipe.explain(parse(config_class_of(recipe), [*DATA, *argv, "--output_dir", str(tmp_path / "out")]))
    found = json.loads((tmp_path / "out/explain.json").read_text(encoding="utf-8"))
    return found["comparisons"], (tmp_path / "out/explain.md").read_text(encoding="utf-8")


def folder_of_phantoms(folder: Path, count: int, blur: float) -> Path:
    """Phantoms that are no test image, as files."""
    folder.mkdir()
    phantoms = PhantomDataset("train", count, 0, 64)
    for i in range(count):
        array = ((phantoms[i].pixel_values + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        array[..., 0] |= 4  # a slight cast
        Image.fromarray(array).filter(ImageFilter.GaussianBlur(blur)).save(folder / f"{i:03d}.png")
    return folder


def test_a_model_is_explained_beside_its_vae_and_the_control(tmp_path: Path) -> None:
    save_tiny(tmp_path / "sd", "sd")
    found, text = run(
        tmp_path, "--base.name", str(tmp_path / "sd"), "--drawing.num_inference_steps", "1", "--drawing.sets", "1"
    )
    assert list(found) == [GENERATED, VAE, BEYOND, CONTROL]
    main = found[GENERATED]
    held_out = PhantomDataset("test", 40, 0, 64)
    assert [e["name"] for e in main["examples"]] == [held_out.caption(e["image"]) for e in main["examples"]]
    assert (
        main["auc"] > 0.95
        and main["per_set"] == [main["auc"]]
        and main["images"] == {"real": 20, "other": 20, "sets": 1}
    )
    assert found[CONTROL]["auc_ci"][0] < 0.5 < found[CONTROL]["auc_ci"][1]
    assert 1 <= len(main["dependence"]) <= 5 and len(main["examples"]) == 3
    assert main["examples"][0]["score"] >= main["examples"][1]["score"] >= main["examples"][2]["score"]
    assert {path.name for path in (tmp_path / "out/figures").iterdir()} == {
        "importance.png", "dependence.png", "examples.png",
    }  # fmt: skip
    assert "A detector tells generated from real images with AUC 1.00" in text
    assert "only went through the VAE are told from untouched ones with AUC" in text


def test_a_folder_of_blurred_images_is_told_by_its_sharpness(tmp_path: Path) -> None:
    folder = folder_of_phantoms(tmp_path / "images", 20, 1.0)
    found, text = run(tmp_path, "--images", str(folder))
    assert list(found) == [GENERATED, CONTROL]
    assert found[GENERATED]["kinds"][0]["name"] in ("detail", "sharpness")
    features = {feature["name"]: feature for feature in found[GENERATED]["features"]}
    assert features["colour saturation"]["other"] == 0, "real images are gray, so all are"
    assert found[GENERATED]["gray"] is True and 1 < found[GENERATED]["spread"] < 4, "of the cast, before the gray"
    assert "All images were compared in gray. Left out are the colours of the generated ones" in text
    assert all((folder / example["name"]).is_file() for example in found[GENERATED]["examples"])
    sharpness = features["edge sharpness"]
    assert sharpness["auc_alone"] > 0.9 and sharpness["other"] < sharpness["real"]
    assert "What the features mean" in text


def test_too_few_images_are_refused_before_any_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also by --dry_run; the control, which comes last, needs the most."""
    recipe = recipe_module("explain")
    config_class, folder = config_class_of(recipe), folder_of_phantoms(tmp_path / "images", 9, 0)
    words = ["--output_dir", str(tmp_path / "out"), "--dry_run", "true"]
    few = ["--data.resolution", "64", "--data.test_size", "18", "--drawing.count", "10", "--images", str(folder)]
    message = refusal_of(recipe.explain, config_class, [*few, *words], capsys)
    assert "are of 18 patients or images; the control, real against real images, needs 20" in message
    assert "a set of generated images has 9; a detector needs 10" in message
    enough = folder_of_phantoms(tmp_path / "enough", 10, 0)
    least = ["--data.resolution", "64", "--data.test_size", "20", "--drawing.count", "10", "--images", str(enough)]
    recipe.explain(parse(config_class, [*least, *words]))
    assert not (tmp_path / "out").exists()


def test_damaged_and_equal_files_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of_phantoms(tmp_path / "images", 3, 0)
    (folder / "001.png").write_bytes((folder / "000.png").read_bytes())
    (folder / "002.png").write_bytes(b"no image")
    Image.new("RGB", (64, 64), (0, 0, 0)).save(folder / "003.png")
    recipe = recipe_module("explain")
    argv = [*DATA, "--images", str(folder), "--output_dir", str(tmp_path / "out")]
    message = refusal_of(recipe.explain, config_class_of(recipe), argv, capsys)
    assert "'000.png' holds the same bytes as '001.png'" in message and "'002.png' cannot be read" in message
    assert "'003.png' is of one colour" in message
    assert not (tmp_path / "out/explain.json").exists()
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="holds no image"):
        ImageFolder(folder, 64, 5)


def test_images_of_a_folder_are_cut_and_resized_as_data_are(tmp_path: Path) -> None:
    array = np.zeros((40, 80, 3), dtype=np.uint8)
    array[:, 10:70] = 255
    Image.fromarray(array).save(tmp_path / "wide.png")
    images = ImageFolder(tmp_path, 32, 5)
    assert images.names == ["wide.png"] and torch.equal(images([0]), torch.ones(1, 3, 32, 32))
    recipe = recipe_module("explain")
    data = {"kind": "folder", "resolution": 32, "fit": "letterbox"}
    config = recipe.ExplainConfig(images=(str(tmp_path),), data=data)
    (found,) = recipe.sets_of(config, None, [], None)
    whole = found.image([0])
    assert found.names == ["wide.png"]
    assert (whole[:, :, :8] == -1).all() and (whole[:, :, 24:] == -1).all() and (whole[..., 8:24, 10:22] == 1).all()


def test_some_images_of_a_folder_are_not_the_first_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of_phantoms(tmp_path / "images", 12, 0)
    every = ImageFolder(folder, 64, 20)
    assert sorted(every.names) != every.names and len(every.names) == 12 and every.left_out == 0
    some = ImageFolder(folder, 64, 5)
    assert some.names == every.names[:5] and some.left_out == 7
    recipe = recipe_module("explain")
    few = ["--data.resolution", "64", "--data.test_size", "20", "--drawing.count", "10", "--images", str(folder)]
    recipe.explain(parse(config_class_of(recipe), [*few, "--output_dir", str(tmp_path / "out"), "--dry_run", "true"]))
    assert f"{folder}: 10 of 12 images, at random" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("held_out", "said"), [(40, ""), (30, "has 15 a side, and the comparison 20: it would show less")]
)
def test_a_control_of_fewer_images_is_said(
    held_out: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of_phantoms(tmp_path / "images", 20, 0)
    argv = [*DATA, "--data.test_size", str(held_out), "--images", str(folder), "--output_dir", str(tmp_path / "out")]
    recipe = recipe_module("explain")
    recipe.explain(parse(config_class_of(recipe), [*argv, "--dry_run", "true"]))
    printed = capsys.readouterr().out
    assert said in printed and ("the control" in printed) == bool(said)


def test_images_of_one_patient_are_one_group() -> None:
    class OfPatients(Listed):
        def image_key(self, index: int) -> str:
            return self.samples[index].id

        def patient(self, index: int) -> str:
            return "p1" if index < 2 else ""

    names = ["a", "b", "c", "c", "d"]
    dataset = OfPatients([sample(name, "edema") for name in names], {})
    assert [group_key(dataset, i) for i in range(5)] == ["patient p1", "patient p1", "c", "c", "d"]
    assert one_of_each_image(dataset, range(5), 10) == [0, 1, 2, 4]
    assert one_of_each_image(dataset, [4, 3, 2, 1], 2) == [4, 3]


def entry(auc: float, half: float, *features: tuple[str, float]) -> dict[str, Any]:
    named = [
        {
            "name": name,
            "importance": low + 0.1,
            "importance_ci": [low, low + 0.2],
            "real": 0.2,
            "other": 0.1,
            "auc_alone": 0.8,
        }
        for name, low in features
    ]
    changes = {"detected": 8, "one_change_is_enough": 0.5, "features": {"noise": 0.25, "contrast": 0.25}}
    return {
        "auc": auc,
        "auc_ci": [auc - half, auc + half],
        "features": named,
        "changes": changes,
        "images": {"real": 20, "other": 20, "sets": 1},
    }


def test_the_sentences_say_whose_fault_it_is_and_whether_the_control_holds() -> None:
    fine, found = entry(0.52, 0.1), entry(0.9, 0.05, ("edge sharpness", 0.2), ("noise", -0.1))
    text = " ".join(sentences({GENERATED: found, VAE: fine, BEYOND: found, CONTROL: fine}))
    assert (
        "with AUC .90 [.85, .95]. The features that it needs most: “edge sharpness” (lower: 0.1, and 0.2 in real images)."
        in text
    )
    assert (
        "The features that differ most, each with its own AUC on all images: “edge sharpness” (.80), “noise” (.80)."
        in text
    )
    assert "through the VAE cannot be told from untouched ones: AUC .52" in text
    assert (
        "from real ones that went through the VAE with AUC .90 [.85, .95], by “edge sharpness”: the denoiser's" in text
    )
    assert "For 50% of the images that it recognizes, another value of one feature would make this detector say real, "
    assert "most often of “noise” (25%)." in text
    assert text.endswith("The interval of their AUC, .52 [.42, .62], holds .5.")
    text = " ".join(sentences({GENERATED: found, VAE: found, BEYOND: fine, CONTROL: found}))
    assert (
        "only went through the VAE are told from untouched ones with AUC .90 [.85, .95], by “edge sharpness”." in text
    )
    assert "training the denoiser does not mend it" in text and text.endswith("cannot be trusted.")
    assert "cannot tell generated from real" in sentences({GENERATED: fine, CONTROL: fine})[0]
    text = " ".join(sentences({GENERATED: found, VAE: fine, BEYOND: fine, CONTROL: fine}))
    assert "through the VAE cannot be told from untouched ones" in text and "So it is the VAE" not in text
    found["features"][0]["real"] = 0.1
    assert (
        "“edge sharpness” (the same median, 0.1, but other values)." in sentences({GENERATED: found, CONTROL: fine})[1]
    )


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (0.25, 0.28, "if “edge sharpness” were 12% higher."),
        (-0.5, -0.25, "if “edge sharpness” were -0.25 instead of -0.5."),
        (0.01, 0.25, "if “edge sharpness” were 0.25 instead of 0.01."),
        (-0.1, 0.1, "if “edge sharpness” were 0.1 instead of -0.1."),
        (0.0, 0.1, "if “edge sharpness” were 0.1 instead of 0."),
    ],
)
def test_a_counterfactual_is_said_in_percent_where_that_has_a_meaning(before: float, after: float, said: str) -> None:
    assert change_sentence({"name": "edge sharpness", "before": before, "after": after}).endswith(said)
    assert explanation.change_sentence(None).startswith("No other value of a single feature")


def test_an_image_that_no_single_change_would_pass_counts_as_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = np.zeros(len(FEATURES))
    images = [
        Explained(0, 0, 0.9, nothing, Change(1, 2.0, 3.0)), Explained(1, 0, 0.8, nothing, None),
        Explained(2, 0, 0.3, nothing, None),
    ]  # fmt: skip
    monkeypatch.setattr(detection, "explain_images", lambda pairs, folds: iter(images))
    found = module._explained([], [], [])
    name = FEATURES[1].name
    assert found["changes"] == {"detected": 2, "one_change_is_enough": 0.5, "features": {name: 0.5}}
    assert [example["change"] for example in found["examples"]] == [
        {"name": name, "before": 2.0, "after": 3.0}, None, None,
    ]  # fmt: skip


def test_a_smaller_control_and_colours_that_were_left_out_are_said() -> None:
    fine, found = entry(0.52, 0.1), entry(0.9, 0.05, ("noise", 0.2))
    fewer = fine | {"images": {"real": 12, "other": 12, "sets": 3}}
    said = sentences({GENERATED: found, CONTROL: fewer})[-1]
    assert said.endswith("holds .5. Each half has 12 images, and the comparison 20, so that this check is weaker.")
    assert not any("gray" in text for text in sentences({GENERATED: found, CONTROL: fine}))
    gray = "All images were compared in gray."
    assert gray in sentences({GENERATED: found | {"gray": True, "spread": 0.9}, CONTROL: fine})
    coloured = sentences({GENERATED: found | {"gray": True, "spread": 12.4}, CONTROL: fine})
    left = "Left out are the colours of the generated ones, whose channels differ by 12 of 255 levels (median)."
    assert f"{gray} {left}" in coloured


def test_the_spread_of_channels_is_that_before_the_gray() -> None:
    images = torch.zeros(3, 3, 64, 64)
    images[0, 0, :32] = 0.2  # half of the pixels by 25.5 levels
    images[2, 1] = -0.4
    pictures = Pictures(lambda places: images[list(places)], ["a", "b", "c"])
    options = {"batch_size": 2, "accelerator": Accelerator(), "label": ""}
    for gray in (True, False):
        rows = module.measure(pictures, gray=gray, **options)  # type: ignore[arg-type]
        assert rows.spread == pytest.approx(12.75, abs=1e-3) and len(rows) == 3


def test_a_single_image_is_said_with_what_speaks_for_generated() -> None:
    parts = [{"name": "noise", "logit": 2.0}, {"name": "contrast", "logit": -1.0}, {"name": "skewness", "logit": 0.5}]
    example = {"image": 4, "score": 0.9, "parts": parts, "change": None}
    said = single_sentence(example)
    assert said.startswith(
        "Image “number 4”: the detector says generated with a probability of 90.0%. For it speak: noise, skewness. No"
    )
    assert single_sentence(example | {"score": 0.4}) == said.replace("90.0%", "40.0%").partition(" No other")[0]
    assert (
        single_sentence(example | {"score": 0.4, "parts": parts[1:2]})
        == "Image “number 4”: the detector says generated with a probability of 40.0%."
    )


def test_the_page_has_all_numbers_in_tables(tmp_path: Path) -> None:
    names = [FEATURES[k].name for k in range(6)]
    found = entry(0.9, 0.05, (names[0], 0.25), (names[1], 0.0), *((name, 0.1) for name in names[2:]))
    found["features"][2] |= {"real": None, "other": None}
    for place, feature in enumerate(found["features"]):
        feature["auc_alone"] = 0.5 + place / 100
    dependence = [{"name": names[0], "values": [0.0, 1.0], "probability": [0.0, 1.0]}]
    kinds = [{"name": "detail", "importance": 0.3, "importance_ci": [0.2, 0.4]}]
    parts = [{"name": names[0], "logit": 1.0}]
    changes = [{"name": names[1], "before": 0.25, "after": 0.5}, None, {"name": names[1], "before": 0.25, "after": 0.5}]
    examples = [
        {"image": i, "score": score, "parts": parts, "change": change}
        for i, score, change in zip((3, 8, 9), (0.96, 0.5, 0.49), changes, strict=True)
    ]
    found |= {"per_set": [0.9, 0.912], "dependence": dependence, "kinds": kinds, "examples": examples}
    fine = entry(0.52, 0.1) | {"per_set": [0.52]}
    pages = explanation.sections({GENERATED: found, CONTROL: fine}, [])
    assert [page.title for page in pages] == [
        "What tells generated from real images", "How the detector uses a feature", "Single images", "All features",
        "What the features mean",
    ]  # fmt: skip
    first, how, single, every, meaning = pages
    assert first.text == sentences({GENERATED: found, CONTROL: fine})
    assert first.tables[0].rows == [
        [GENERATED, ".90 [.85, .95]", ".90, .91", f"“{names[0]}”, “{names[2]}”, “{names[3]}”"],
        [CONTROL, ".52 [.42, .62]", ".52", "–"],
    ]
    assert f"; “{names[2]}” (unknown in all images of one side); " in first.text[1]
    alone = f"each with its own AUC on all images: “{names[5]}” (.55), “{names[4]}” (.54), “{names[3]}” (.53)."
    assert any(alone in text for text in first.text)
    assert [c.name for c in (*first.charts, *how.charts)] == ["importance", "dependence"] and not single.charts
    assert single.text == [
        f"Image “number 3”: the detector says generated with a probability of 96.0%. For it speak: {names[0]}. "
        f"It would say real if “{names[1]}” were 100% higher.",
        f"Image “number 8”: the detector says generated with a probability of 50.0%. For it speak: {names[0]}. "
        "No other value of a single feature would make it say real.",
    ]
    kinds_table, features_table = every.tables
    assert kinds_table.rows == [["detail", ".30 [.20, .40]"]]
    units = [feature.unit for feature in FEATURES]
    assert features_table.rows[0] == [names[0], ".35 [.25, .45]", ".50", "0.2", "0.1", units[0]]
    assert features_table.rows[2][3:] == ["–", "–", units[2]] and len(features_table.rows) == 6
    assert meaning.tables[0].rows == [[f.name, f.unit, f.meaning] for f in FEATURES]
    images = [np.full((4, 4, 3), 9, np.uint8)] * 3
    text = explanation.write_explanation(tmp_path, {GENERATED: found, CONTROL: fine}, images)
    assert text == (tmp_path / "explain.md").read_text(encoding="utf-8") and text.endswith("|\n")
    assert text.startswith("# What is wrong with the images\n\n## What tells generated from real images\n\n")
    shown = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert shown == {"importance", "dependence", "examples"} and text.count("](figures/") == 3


@pytest.mark.parametrize(
    ("ends", "chance"), [([0.5, 0.6], True), ([0.4, 0.5], True), ([0.51, 0.6], False), ([0.3, 0.49], False)]
)
def test_chance_is_where_the_interval_holds_a_half(ends: list[float], chance: bool) -> None:
    assert explanation.is_chance({"auc_ci": ends}) is chance


def test_without_a_feature_that_is_needed_many_betray_together() -> None:
    fine, found = entry(0.52, 0.1), entry(0.9, 0.05, ("noise", -0.1))
    said = sentences({GENERATED: found, VAE: found, BEYOND: found, CONTROL: fine})
    assert said[1] == "It uses many features, none of which it needs by itself."
    assert any("told from untouched ones with AUC .90 [.85, .95], by many features together." in text for text in said)
    assert any(
        "through the VAE with AUC .90 [.85, .95], by many features together: the denoiser" in text for text in said
    )
    assert any("higher" in text for text in sentences({GENERATED: higher(), CONTROL: fine}))
    for missing in ({"detected": 0}, {"features": {}}):
        nothing = found | {"changes": found["changes"] | missing}
        assert not any("make this detector say real" in text for text in sentences({GENERATED: nothing, CONTROL: fine}))
    only_chance = sentences({GENERATED: fine, VAE: found, BEYOND: fine, CONTROL: fine})
    assert any(text.endswith("that went through the VAE: AUC .52 [.42, .62].") for text in only_chance), (
        "nothing betrays them"
    )


def higher() -> dict[str, Any]:
    found = entry(0.9, 0.05, ("noise", 0.2))
    found["features"][0] |= {"other": 0.4}
    return found


# --- the part `explanation` of evaluate.py -----------------------------------------------------------------------------


def argv_of(tmp_path: Path, *more: str) -> list[str]:
    argv = evaluate_argv(tmp_path, *more)
    argv[argv.index("--data.test_size") + 1], argv[argv.index("--evaluation.generated_images") + 1] = "40", "20"
    argv[argv.index("quality,memorization")] = "explanation"
    return argv


def blurred(count: int) -> PhantomDataset:
    """Phantoms that are no test image, without their detail."""

    class Blurred(PhantomDataset):
        def __getitem__(self, index: int) -> Any:
            sample = super().__getitem__(index)
            small = torch.nn.functional.avg_pool2d(sample.pixel_values, 3, stride=1, padding=1)
            return replace(sample, pixel_values=small)

    return Blurred("validation", count, 0, 64)


def test_evaluate_explains_and_keeps_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drawing_module, "generate", drawing(blurred(40)))
    recipe, out = recipe_module("evaluate"), tmp_path / "out"
    recipe.evaluate(parse(recipe.EvaluateConfig, argv_of(tmp_path)))
    printed = capsys.readouterr().out
    found = json.loads((out / "metrics.json").read_text())["arms"]["base"]["explanation"]
    comparisons = json.loads((out / "base/explain.json").read_text())["comparisons"]
    assert found == {
        "auc": comparisons[GENERATED]["auc"], "auc_ci": comparisons[GENERATED]["auc_ci"],
        "real": comparisons[CONTROL]["auc"], "real_ci": comparisons[CONTROL]["auc_ci"], "images": 20,
        "told_by": [feature["name"] for feature in needed(comparisons[GENERATED])],
    }  # fmt: skip
    assert list(comparisons) == [GENERATED, VAE, BEYOND, CONTROL] and found["auc"] > 0.95
    assert comparisons[CONTROL]["images"] == {"real": 20, "other": 20, "sets": 3}, "all 40 held-out images"
    assert comparisons[VAE]["images"] == {"real": 20, "other": 20, "sets": 1}
    assert (
        found["told_by"]
        and f"A detector tells the images of base from real ones (AUC {format_number(found['auc'], 2)}" in printed
    )
    page = (out / "report.html").read_text()
    assert (
        "<h2>What tells the images from real ones</h2>" in page and f"with AUC {format_number(found['auc'], 2)}" in page
    )
    assert page.count('aria-label="importance of the features of base') == 1
    assert page.count('aria-label="base: how the probability of generated changes with') == 1
    first = comparisons[GENERATED]["features"][0]
    assert f'<th scope="row">{first["name"]}</th>' in page and ">base: feature</th>" in page
    captions = {PhantomDataset("test", 40, 0, 64).caption(k) for k in range(40)}
    assert all(example["name"] in captions for example in comparisons[GENERATED]["examples"])
    for example in comparisons[GENERATED]["examples"]:
        said = html.escape(f"base: {single_sentence(example)}")
        assert f"<figcaption>{said}</figcaption>" in page and f"a probability of {example['score']:.1%}" in said
    assert ">detector AUC ↓</th>" in page
    shown = sorted((out / "base/explained").iterdir())
    assert [path.name for path in shown] == ["0.png", "1.png", "2.png"]
    drawn = {path.read_bytes() for path in (out / "base/drawn").iterdir()}
    assert len(drawn) == 20 and all(path.read_bytes() in drawn for path in shown)

    monkeypatch.setattr(drawing_module, "generate", never)
    monkeypatch.setattr(evaluation, "explain", never)
    recipe.evaluate(parse(recipe.EvaluateConfig, argv_of(tmp_path)))
    assert "base: explanation is already evaluated" in capsys.readouterr().out
    monkeypatch.setattr(evaluation, "explain", module.explain)
    (out / "base/explain.json").write_text("{}")
    recipe.evaluate(parse(recipe.EvaluateConfig, argv_of(tmp_path)))
    assert "base: explanation is measured anew: files in" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text())["arms"]["base"]["explanation"] == found


def test_each_generated_image_stands_beside_the_real_one_of_its_caption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a caption could be on both sides of a split."""
    held_out = PhantomDataset("test", 40, 0, 64)
    monkeypatch.setattr(drawing_module, "generate", drawing(held_out))
    seen: list[Any] = []

    def explain(real: Pictures, count: int, sets: list[Pictures], **options: Any) -> None:
        seen.append((real, count, sets[0]))
        raise UserError("seen")

    monkeypatch.setattr(evaluation, "explain", explain)
    recipe = recipe_module("evaluate")
    with pytest.raises(UserError, match="seen"):
        recipe.evaluate(parse(recipe.EvaluateConfig, argv_of(tmp_path)))
    real, count, generated = seen[0]
    assert len(real.groups) == len(set(real.groups)) == 40 and count == 20
    assert generated.groups == real.groups[:20]
    places = [3, 17, 0]
    assert (generated.image(places) - real.image(places)).abs().max() < 0.01


def test_rows_of_the_explanation_are_of_different_images() -> None:
    class OfImages(Listed):
        def image_key(self, index: int) -> str:
            return self.samples[index].id

        def fingerprint(self, index: int) -> str:
            return self.samples[index].id

    dataset = OfImages([sample(name, "edema") for name in "aabbcddefg"], {})
    assert explained_rows(dataset, [2], 3) == ([2, 0, 4, 5, 7, 8, 9], 3)
    assert explained_rows(dataset, [2, 3], 4) == ([2, 0, 4, 5, 7, 8, 9], 4), "two captions of one image count once"
    many = OfImages([sample(f"{k}", "edema") for k in range(1100)], {})
    assert explained_rows(many, [], 600) == ([*range(1000)], 500)
    assert explained_rows(many, [], 3) == ([*range(20)], 3) and explained_rows(many, [], 11) == ([*range(22)], 11)


def test_too_few_held_out_images_are_refused_before_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drawing_module, "generate", never)
    recipe = recipe_module("evaluate")
    argv = argv_of(tmp_path)
    argv[argv.index("--data.test_size") + 1] = "19"
    message = refusal_of(recipe.evaluate, recipe.EvaluateConfig, argv, capsys)
    assert (
        "the held-out images are of 19 patients or images; the control, real against real images, needs 20" in message
    )
    assert not (tmp_path / "out/metrics.json").exists()


def test_images_of_another_tool_are_explained_without_a_vae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(drawing_module, "generate", never)
    recipe = recipe_module("evaluate")
    images = image_folder(tmp_path / "images", blurred(30), 30)
    recipe.evaluate(parse(recipe.EvaluateConfig, argv_of(tmp_path, "--images", str(images))))
    found = json.loads((tmp_path / "out/metrics.json").read_text())["arms"]["images"]["explanation"]
    comparisons = json.loads((tmp_path / "out/images/explain.json").read_text())["comparisons"]
    assert list(comparisons) == [GENERATED, CONTROL] and found["images"] == 20 and found["auc"] > 0.95
    for number, example in enumerate(comparisons[GENERATED]["examples"]):
        shown = (tmp_path / f"out/images/explained/{number}.png").read_bytes()
        with Image.open(io.BytesIO(shown)) as one, Image.open(images / example["name"]) as file:
            assert np.array_equal(np.asarray(one), np.asarray(file.convert("RGB"))), "the file that it is called by"
    few = image_folder(tmp_path / "few", blurred(9), 9)
    argv = argv_of(tmp_path, "--images", str(few))
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "other")
    message = refusal_of(recipe.evaluate, recipe.EvaluateConfig, argv, capsys)
    assert "the 9 images that are compared are of 9 patients or images; a detector needs 10" in message
    assert "control" not in message


def test_an_explanation_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    told = Explanation(Estimate(0.9, 0.8, 1.0), Estimate(0.5, 0.4, 0.6), 20, ["contrast"])
    arms = {name: Arm(None, None, Cost(*[None] * 5), explanation=told) for name in ("a", "b")}
    (tmp_path / "b").mkdir()
    (tmp_path / "b/explain.json").write_text('{"comparisons": {}}')
    notes: list[str] = []
    section = explanation.explanation_section(tmp_path, Results(arms, {}), notes)
    assert not section.charts and not section.tables[0].rows and len(notes) == 2
    assert "a/explain.json cannot be read" in notes[0] and "b/explain.json cannot be read" in notes[1]
    assert all(not table.rows for table in section.tables)


@pytest.mark.parametrize(
    ("low", "control", "told"), [(0.51, 0.4, True), (0.5, 0.4, False), (0.51, 0.5, True), (0.9, 0.51, False)]
)
def test_a_detector_that_tells_real_from_real_images_is_not_believed(low: float, control: float, told: bool) -> None:
    found = Explanation(Estimate(0.95, low, 1.0), Estimate(0.6, control, 0.7), 20, ["contrast", "noise"])
    said = faults(Results({"a": Arm(None, None, Cost(*[None] * 5), explanation=found)}, {}), "a")
    assert said == ["A detector tells the images of a from real ones (AUC .95, by contrast, noise)."] * told
    assert str(replace(found, told_by=[])) == "AUC .95"

"""recipes/compare.py: on run folders as recipes leave them; what cannot be compared is refused in one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe import ROOT, config_class_of, recipe_module, refusal_of
from test_seeds import rewrite, write_run

from distill.cli import parse, to_yaml
from distill.report import validate_metrics

EACH = "{frozen: 'RUN/seed-{seed}/frozen', longer: 'RUN/seed-{seed}/longer'}"


def run_recipe(argv: list[str]) -> None:
    recipe = recipe_module("compare")
    recipe.compare(parse(config_class_of(recipe), argv))


def finished(folder: Path, seed: int, shift: dict[str, float], **options: Any) -> Path:
    """A run folder with what its recipe writes besides: config.yaml, and metrics.json of each arm."""
    write_run(folder, seed, shift)
    run = folder / f"seed-{seed}"
    (run / "config.yaml").write_text(
        to_yaml(parse(config_class_of(recipe_module("finetune")), ["--seed", str(seed)])), encoding="utf-8"
    )
    change(run, **options)
    whole = json.loads((run / "metrics.json").read_text())
    for arm in shift:
        found = {"arms": {arm: whole["arms"][arm]}, "provenance": {"commit": f"of {arm}"}}
        (run / arm / "metrics.json").write_text(json.dumps(found))
    return run


def change(run: Path, **options: Any) -> None:
    """Set `group__key` in the run's config.yaml; a value of None takes the key out, as in a run of an older version."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in options.items():
        group, name = key.split("__")
        config[group][name] = value
        if value is None:
            del config[group][name]
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    recipe = recipe_module("compare")
    return refusal_of(recipe.compare, config_class_of(recipe), argv, capsys)


def test_arms_of_several_commands_are_compared_pair_by_pair(tmp_path: Path) -> None:
    for seed, gain in ((1, 0.1), (2, 0.3)):
        finished(tmp_path / "a", seed, {"frozen": 0.0, "other": 0.0})
        finished(tmp_path / "b", seed, {"longer": gain}, trainer__max_steps=800, data__placement=None)
    arms = "{frozen: 'A/seed-{seed}/frozen', longer: 'B/seed-{seed}/longer'}"
    arms = arms.replace("A/", f"{tmp_path}/a/").replace("B/", f"{tmp_path}/b/")
    argv = ["--arms", arms, "--seeds", "[1,2]", "--output_dir", str(tmp_path / "out")]
    for _ in range(2):  # the same command again
        run_recipe(argv)
        metrics = json.loads((tmp_path / "out/metrics.json").read_text())
        validate_metrics(metrics)
        assert list(metrics["arms"]) == ["frozen", "longer"] and list(metrics["paired"]) == ["longer - frozen"]
        found = metrics["paired"]["longer - frozen"]["word.auc"]
        assert found["value"] == pytest.approx(0.2) and found["per_seed"] == pytest.approx({"1": 0.1, "2": 0.3})
    origin = metrics["provenance"]
    assert origin["arms"]["longer"]["differs"] == {"trainer.max_steps": "800"}
    assert origin["arms"]["longer"]["commit"] == "of longer" and origin["seeds"]["training"] == [1, 2]
    assert origin["seconds"]["longer: training"] == 2.0, "of both seeds"
    assert "longer - frozen" in (tmp_path / "out/report.html").read_text()


def test_a_folder_of_trained_seeds_is_never_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        finished(tmp_path / "a", seed, {"frozen": 0.0, "other": 0.0})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    arms = "{frozen: 'A/seed-{seed}/frozen', other: 'A/seed-{seed}/other'}".replace("A/", f"{tmp_path}/a/")
    message = refusal(["--arms", arms, "--seeds", "[1,2]", "--output_dir", str(tmp_path / "a")], capsys)
    assert "seed-N folders that are not of a comparison" in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_single_runs_are_compared_with_intervals_of_images_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = finished(tmp_path / "a", 0, {"base": 0.0, "model": 0.1}, evaluation__batch_size=2)
    two = finished(tmp_path / "b", 5, {"model": 0.4}, data__train_size=7)
    arms = f"{{plain: '{one}', better: '{two}/model', base: '{one}/base'}}"
    argv = ["--arms", arms, "--compare_to", "plain", "--output_dir", str(tmp_path / "out")]
    run_recipe([*argv, "--dry_run"])
    assert not (tmp_path / "out").exists() and "nothing was written" in capsys.readouterr().out
    run_recipe(argv)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    found = {name: entry["word.auc"]["value"] for name, entry in metrics["paired"].items()}
    assert found == {"better - plain": pytest.approx(0.3), "base - plain": pytest.approx(-0.1)}
    assert metrics["provenance"]["seeds"]["training"] == [0, 5]
    text = (tmp_path / "out/report.html").read_text()
    assert "One training seed a model" in text and "over seeds" not in text


def test_the_settings_of_arms_of_one_run_and_its_seed_are_told(tmp_path: Path) -> None:
    run = finished(tmp_path / "a", 7, {"frozen": 0.0, "longer": 0.1})
    for arm, steps in (("frozen", 400), ("longer", 800)):
        found = json.loads((run / arm / "metrics.json").read_text())
        settings = yaml.safe_load((run / "config.yaml").read_text())
        settings["trainer"]["max_steps"] = steps
        (run / arm / "metrics.json").write_text(json.dumps(found | {"settings": settings}))
    argv = ["--arms", f"{{a: '{run}/frozen', b: '{run}/longer'}}", "--output_dir", str(tmp_path / "out")]
    run_recipe(argv)
    origin = json.loads((tmp_path / "out/metrics.json").read_text())["provenance"]
    assert origin["arms"]["b"]["differs"] == {"trainer.max_steps": "800"} and origin["seeds"]["training"] == [7]


def test_arms_are_judged_by_what_they_were_measured_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And not by the config.yaml of their run, which a second launch with other options has written."""
    run = finished(tmp_path, 0, {"frozen": 0.0, "longer": 0.1})

    def measured_with(arm: str, part: str, steps: int, extractor: str | None, data: str = "d") -> None:
        found = json.loads((run / arm / "metrics.json").read_text())
        options = {"num_inference_steps": steps, "timesteps": [steps], "layers": []}
        found["made_of"] = {part: {"options": options, "features": extractor, "data": data, "pairs": data}}
        (run / arm / "metrics.json").write_text(json.dumps(found))

    argv = ["--arms", f"{{a: '{run}/frozen', b: '{run}/longer'}}", "--output_dir", str(tmp_path / "out")]
    measured_with("frozen", "quality", 10, "one")
    measured_with("longer", "quality", 20, "two")  # 20: what config.yaml says
    message = refusal(argv, capsys)
    assert "b: " in message and "evaluation.num_inference_steps is 20, and 10" in message
    assert "the hash of the feature extractor is 'two', and 'one'" in message
    for part, what in (
        ("quality", "held-out images and captions"),
        ("localization", "images and regions of localization"),
    ):
        for arm, data in (("frozen", "d"), ("longer", "e")):
            measured_with(arm, part, 10, "one", data)
        assert f"b: {run}/longer: the hash of the {what} is 'e', and 'd'" in refusal(argv, capsys)
    measured_with("frozen", "quality", 10, "one")
    measured_with("longer", "localization", 10, None)
    run_recipe(argv)


def test_an_auc_within_different_priors_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path, 0, {"frozen": 0.0, "longer": 0.1})
    for arm, images in (("frozen", 10), ("longer", 10)):
        found = json.loads((run / arm / "metrics.json").read_text())
        located = found["arms"][arm]["localization"]
        located["word"] |= {"within_prior": 0.6, "within_prior_ci": [0.5, 0.7]}
        located["priors"] = {"centre": {"auc": 0.7}, "mean_mask": {"auc": 0.9, "training_images": images}}
        (run / arm / "metrics.json").write_text(json.dumps(found))
        rewrite(run / arm, lambda row: row.update(within_prior={"word": 0.1 * row["image"]}))
    argv = ["--arms", f"{{a: '{run}/frozen', b: '{run}/longer'}}", "--output_dir", str(tmp_path / "out")]
    run_recipe(argv)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "word.within_prior" in metrics["paired"]["b - a"]
    text = (run / "longer/metrics.json").read_text()
    (run / "longer/metrics.json").write_text(text.replace('"training_images": 10', '"training_images": 7'))
    capsys.readouterr()
    run_recipe([*argv[:-1], str(tmp_path / "other")])
    assert "the mean training masks of the runs differ" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "other/metrics.json").read_text())
    validate_metrics(metrics)
    assert "word.within_prior" not in metrics["paired"]["b - a"] and "word.auc" in metrics["paired"]["b - a"]
    for entry in metrics["arms"].values():
        assert entry["localization"]["word"]["within_prior"] is None
        assert entry["localization"]["priors"] == {"centre": {"auc": 0.7}, "mean_mask": None}


def test_names_of_shipped_comparisons_are_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    paths = list((ROOT / "recipes/configs").rglob("compare*.yaml"))
    assert paths
    for path in paths:
        message = refusal(
            ["--config", str(path), "--arms.nowhere", "nowhere/{seed}", "--arms.real", "a/{seed}"], capsys
        )
        (fault,) = [line for line in message.splitlines() if "folder's name" in line]
        assert "real" in fault, "the names of the file are no faults"


def test_a_kill_leaves_the_earlier_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path, 0, {"frozen": 0.0, "longer": 0.1})
    argv = ["--arms", EACH.replace("RUN", str(tmp_path)), "--seeds", "[0]", "--output_dir", str(tmp_path / "out")]
    run_recipe(argv)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("distill.files.write_json", killed)
        run_recipe(argv)
    assert {path: path.read_bytes() for path in before} == before
    run_recipe(argv)
    assert not (tmp_path / "out/.partial").exists()


def test_a_refusal_leaves_the_earlier_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path, 0, {"frozen": 0.0, "longer": 0.1})
    argv = ["--arms", EACH.replace("RUN", str(tmp_path)), "--seeds", "[0]", "--output_dir", str(tmp_path / "out")]
    run_recipe(argv)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    rewrite(run / "longer", lambda row: row.update(image=row["image"] + 1))
    assert "scored on different images" in refusal(argv, capsys)
    assert {path: path.read_bytes() for path in before} == before


def test_what_cannot_be_compared_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished(tmp_path, 0, {"frozen": 0.0, "longer": 0.1})
    other = finished(tmp_path / "other", 0, {"longer": 0.1}, evaluation__guidance_scale=2.0, data__captions="affirmed")
    out = ["--output_dir", str(tmp_path / "out")]
    each = EACH.replace("RUN", str(tmp_path))
    message = refusal(["--arms", f"{{a: '{run}/frozen', b: '{other}/longer'}}", *out], capsys)
    assert "evaluation.guidance_scale is 2.0, and 4.0" in message and "data.captions is 'affirmed'" in message
    message = refusal(["--arms", each, "--seeds", "[0,3]", *out], capsys)
    assert "frozen: " in message and "longer: " in message and "seed-3" in message
    assert "has {seed}, and seeds is empty" in refusal(["--arms", each, *out], capsys)
    message = refusal(["--arms", f"{{'../a': '{run}', b: '{run}'}}", "--compare_to", "c", *out], capsys)
    assert "arms: '../a' cannot be a folder's name" in message and "compare_to: 'c' is no arm" in message
    message = refusal(["--arms", f"{{a: '{run}', b: '{run}/longer'}}", *out], capsys)
    assert "is a run folder of frozen, longer; give the folder of one arm" in message
    assert "arms: expected" in refusal(["--arms", f"{{a: '{run}/longer'}}", *out], capsys)
    assert not (tmp_path / "out").exists()
    run_recipe(["--arms", each, "--seeds", "[0]", *out])
    (run / "longer").rename(run / "renamed")
    message = refusal(["--arms", each.replace("/longer", "/renamed"), "--seeds", "[0]", *out], capsys)
    assert "was renamed: its metrics.json is of longer" in message
    (run / "renamed").rename(run / "longer")
    found = json.loads((run / "longer/metrics.json").read_text())
    found["arms"]["longer"]["localization"]["timesteps"] = [1]
    whole = (run / "longer/metrics.json").read_bytes()
    (run / "longer/metrics.json").write_text(json.dumps(found))
    assert "localization.timesteps is [1]" in refusal(["--arms", each, "--seeds", "[0]", *out], capsys)
    (run / "longer/metrics.json").write_bytes(whole)
    message = refusal(["--arms", each.replace("longer:", "l:"), "--seeds", "[0]", *out], capsys)
    assert "holds a run with other options" in message

"""Results of a run folder are used again where all that made them is the same, and made anew where it is not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from listed import WORDS, Listed, sample
from PIL import Image
from recipe import config_class_of, recipe_module, refusal_of
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from distill.cli import parse
from distill.config import FullEvaluation
from distill.evaluation.evaluate import HeldOut
from distill.evaluation.fidelity import Generated
from distill.evaluation.kept import Kept
from distill.evaluation.protocols import queries
from distill.experiment import results, train
from distill.experiment import run as run_module
from distill.models.family import Model
from distill.models.loading import LORA_FILE

EVALUATION = [
    "--data.resolution", "64", "--data.train_size", "4", "--data.test_size", "6", "--evaluation.localization_images", "2",
    "--evaluation.generated_images", "2", "--evaluation.features", "phantom", "--evaluation.num_inference_steps", "1",
    "--evaluation.diversity_captions", "1", "--evaluation.diversity_samples", "2", "--evaluation.timesteps", "300",
    "--evaluation.examples", "1", "--evaluation.bootstrap_samples", "10",
]  # fmt: skip
TRAINER = [
    "--trainer.max_steps",
    "1",
    "--trainer.batch_size",
    "2",
    "--trainer.tracker",
    "none",
]


def run(name: str, argv: list[str]) -> None:
    recipe = recipe_module(name)
    getattr(recipe, name)(parse(config_class_of(recipe), argv))


def arms_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["arms"]
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a run of finetune.py on it, and an evaluation of that run."""
    folder = tmp_path_factory.mktemp("reuse")
    save_tiny(folder / "base", "sd")
    base = ["--base.name", str(folder / "base"), "--data.cache_dir", str(folder / "cache")]
    run("finetune", [*base, *EVALUATION, *TRAINER, "--lora.rank", "2", "--output_dir", str(folder / "run")])
    run("evaluate", evaluate_argv(folder, folder / "evaluated"))
    return folder


def evaluate_argv(work: Path, out: Path, *more: str, trained: Path | None = None) -> list[str]:
    argv = ["--base.name", str(work / "base"), "--run", str(trained or work / "run"), "--output_dir", str(out)]
    return [*argv, *EVALUATION, *more]


def copied(work: Path, tmp_path: Path, name: str = "evaluated") -> Path:
    return Path(shutil.copytree(work / name, tmp_path / name))


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("must not be called")


def test_a_run_whose_adapter_is_another_is_measured_anew_and_its_base_is_not(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(work / "run", trained)
    argv = evaluate_argv(work, out, trained=trained)
    run("evaluate", argv)
    before = arms_of(out)
    tensors = {name: tensor + 0.3 for name, tensor in load_file(trained / LORA_FILE).items()}
    save_file(tensors, trained / LORA_FILE, {"format": "pt"})
    capsys.readouterr()
    run("evaluate", argv)
    printed, after = capsys.readouterr().out, arms_of(out)
    assert "model: localization is measured anew: the weights are others\n" in printed
    assert "model: quality is measured anew: the weights are others\n" in printed
    assert "base: quality is already evaluated" in printed and "base: localization is already evaluated" in printed
    assert after["base"] == before["base"]
    assert after["model"]["localization"]["word"] != before["model"]["localization"]["word"]
    assert after["model"]["quality"]["fid"] != before["model"]["quality"]["fid"]


def test_either_part_alone_and_more_images(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Maps only, then more maps, then quality: the end is that of one evaluation."""
    out, more = tmp_path / "out", ["--evaluation.localization_images", "4"]
    only = ["--evaluation.parts", "localization"]
    run("evaluate", evaluate_argv(work, out, *only))
    first = arms_of(out)
    assert first["model"]["quality"] is None and first["model"]["localization"]["word"]["images"] == 2
    assert not (out / "model" / "samples").exists() and (out / "report.html").exists()
    run("evaluate", evaluate_argv(work, out, *only, *more))
    assert "localization is measured anew: evaluation.localization_images was 2 and is 4" in capsys.readouterr().out
    with monkeypatch.context() as context:
        context.setattr("distill.evaluation.evaluate.localization", never)
        run("evaluate", evaluate_argv(work, out, "--evaluation.parts", "quality", *more))
    whole = copied(work, tmp_path)
    run("evaluate", evaluate_argv(work, whole, *more))
    for arm in ("base", "model"):
        for part in ("localization", "quality"):
            assert arms_of(out)[arm][part] == arms_of(whole)[arm][part], (arm, part)
    assert "localization_images: 4" in (out / "config.yaml").read_text(encoding="utf-8")
    monkeypatch.setattr(results, "evaluate", never)
    run("evaluate", evaluate_argv(work, out, *only, *more))
    assert arms_of(out)["model"]["quality"] == arms_of(whole)["model"]["quality"], "what was measured stays"


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def other_number(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"0.5", b"0.4").replace(b"0.6", b"0.3"))


READ_AGAIN = (
    "pairs.jsonl", "scored.jsonl", "drawn.jsonl", "features.safetensors", "maps.safetensors", "word_maps.safetensors",
    "samples/0000.png",
)  # fmt: skip


@pytest.mark.parametrize("names", [[f"model/{name}" for name in READ_AGAIN], ["model/metrics.json"]])
def test_torn_files_are_made_anew(work: Path, tmp_path: Path, names: list[str]) -> None:
    out = copied(work, tmp_path)
    before = arms_of(out)
    for name in [*names, "metrics.json", "real/priors.json"]:
        torn(out / name)
    run("evaluate", evaluate_argv(work, out))
    after = arms_of(out)
    for arm in ("base", "model"):
        assert after[arm]["localization"] == before[arm]["localization"]
        assert after[arm]["quality"] == before[arm]["quality"]
    # The names of several tensors come in no fixed order.
    for name in ("pairs.jsonl", "scored.jsonl", "drawn.jsonl", "samples/0000.png"):
        assert (out / "model" / name).read_bytes() == (work / "evaluated" / "model" / name).read_bytes()


def test_scores_that_were_changed_by_hand_are_measured_anew(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(work, tmp_path)
    other_number(out / "model" / "pairs.jsonl")
    run("evaluate", evaluate_argv(work, out))
    assert (
        f"localization is measured anew: files in {out / 'model'} were changed or are missing"
        in capsys.readouterr().out
    )
    assert (out / "model/pairs.jsonl").read_bytes() == (work / "evaluated/model/pairs.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "damage"),
    [("config.yaml", torn), ("config.yaml", a_folder), ("metrics.json", a_folder), ("model/metrics.json", a_folder)],
)
def test_no_state_of_a_folder_ends_in_a_traceback(
    work: Path, tmp_path: Path, name: str, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    out = copied(work, tmp_path)
    damage(out / name)
    recipe = recipe_module("evaluate")
    message = refusal_of(recipe.evaluate, config_class_of(recipe), evaluate_argv(work, out), capsys)
    assert str(out / name) in message or "of an earlier version, or of another recipe" in message
    assert message.startswith("error: ")


def test_a_model_card_that_a_kill_left_out_is_written(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(work, tmp_path, "run")
    (out / "README.md").unlink()
    (out / ".README.md.77.tmp").write_text("half")
    monkeypatch.setattr(train, "fit", never)
    monkeypatch.setattr(results, "evaluate", never)
    base = ["--base.name", str(work / "base"), "--data.cache_dir", str(work / "cache")]
    argv = [*base, *EVALUATION, *TRAINER, "--lora.rank", "2", "--output_dir", str(out)]
    run("finetune", [*argv, "--trainer.num_workers", "1", "--trainer.log_every_steps", "7"])
    there = re.sub(r"\n\n\*\*What is wrong\.\*\*.*", "", (work / "run" / "README.md").read_text(encoding="utf-8"))
    assert (out / "README.md").read_text(encoding="utf-8") == there, "but for what evaluate.py found in other tests"
    assert not list(out.rglob("*.tmp"))
    assert "num_workers: 1" in (out / "config.yaml").read_text(encoding="utf-8")


def test_a_run_whose_data_changed_says_so_and_counts_what_it_was_trained_on(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phantoms with other sizes, under the same configuration: as when files were added."""
    out = copied(work, tmp_path, "run")
    load = run_module.load_dataset

    def more(data: Any, split: Any) -> Any:
        return load(data.model_copy(update={"train_size": 7, "test_size": 9, "seed": 1}), split)

    monkeypatch.setattr(run_module, "load_dataset", more)
    monkeypatch.setattr(train, "fit", never)
    base = ["--base.name", str(work / "base"), "--data.cache_dir", str(work / "cache")]
    run("finetune", [*base, *EVALUATION, *TRAINER, "--lora.rank", "2", "--output_dir", str(out)])
    printed = capsys.readouterr().out
    assert "model: it was trained on other data, 4 images; there are 7 now. It stays as it is" in printed
    assert "model: quality is measured anew: the held-out images, their captions or regions, or the training" in printed
    counts = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["provenance"]["counts"]
    assert counts["training_images"] == 4 and counts["held_out_images"] == 9


def test_a_torn_cost_is_trained_again(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = copied(work, tmp_path, "run")
    torn(out / "cost.json")
    base = ["--base.name", str(work / "base"), "--data.cache_dir", str(work / "cache")]
    run("finetune", [*base, *EVALUATION, *TRAINER, "--lora.rank", "2", "--output_dir", str(out)])
    assert f"model: trained again, because {out / 'cost.json'} cannot be used" in capsys.readouterr().out
    assert json.loads((out / "cost.json").read_text(encoding="utf-8"))["steps"] == 1
    assert arms_of(out)["model"]["localization"] == arms_of(work / "run")["model"]["localization"]


def test_an_image_of_another_evaluation_is_drawn_again(work: Path, tmp_path: Path) -> None:
    """Its name says caption and seed, and not the options it was drawn with."""
    out = copied(work, tmp_path)
    drawn = out / "model/samples/0000.png"
    before = drawn.read_bytes()
    with Image.open(drawn) as image:
        image.transpose(Image.Transpose.ROTATE_180).save(drawn)
    run("evaluate", evaluate_argv(work, out))
    assert drawn.read_bytes() == before


def test_a_run_that_keeps_the_maps_of_some_models_ends_with_a_report(work: Path, tmp_path: Path) -> None:
    """Continued with quality alone: the base keeps its maps, and those of the longer model would be of old weights."""
    base = [
        "--base.name",
        str(work / "base"),
        "--data.cache_dir",
        str(work / "cache"),
        "--output_dir",
        str(tmp_path / "a"),
    ]
    arms = "{a: {denoiser: lora, lora: {rank: 2}}}", "{a: {denoiser: lora, lora: {rank: 2}}, b: {denoiser: lora}}"
    run("tradeoff", [*base, *EVALUATION, *TRAINER, "--arms", arms[0]])
    argv = [*base, *EVALUATION, *TRAINER, "--arms", arms[1], "--evaluation.parts", "quality"]
    run("tradeoff", argv)
    found = arms_of(tmp_path / "a")
    assert found["a"]["localization"] is not None and found["b"]["localization"] is None
    assert found["b"]["quality"] is not None


def test_hashes_hold_what_decides_each_part(sd: Model) -> None:
    """Captions of examples also where localization reads phrases: word maps are of them."""

    def hashes(
        caption: str,
        *parts: str,
        training: int = 0,
        patient: str = "p",
        shift: int = 3,
        trained: str = "t",
        last: str = "p",
    ) -> dict[str, Any]:
        found = [sample("a", caption, ("edema", "the edema")), sample("b", "No edema."), sample("c", "Edema.")]
        data = Listed(found, WORDS)
        copied_from = Listed([sample(f"t{training}", "Edema.")], WORDS)
        data.patient = lambda index: last if index == 2 and last != "p" else patient  # type: ignore[attr-defined]
        copied_from.patient = lambda index: trained  # type: ignore[attr-defined]
        config = FullEvaluation(parts=parts or ("quality",), localization_text="phrase")
        asked = [replace(query, tokens=((shift,),)) for query in queries(data, sd, config)]
        against = HeldOut(data, [0], None, Generated([], None, None), {}, copied_from=copied_from, asked=asked)
        return against.made_of(sd, "weights", config, 64)

    before, after = hashes("Edema."), hashes("An edema.")
    assert all(before[part]["data"] != after[part]["data"] for part in before)
    assert before["localization"]["pairs"] == after["localization"]["pairs"], "the phrase is the same"
    measured = hashes("Edema.", "quality", "memorization", "utility")
    regrouped = hashes("Edema.", "quality", "memorization", "utility", trained="q")
    changed = {part for part in measured if measured[part] != regrouped[part]}
    assert changed == {"memorization"}, "copies are counted by patient"
    regrouped = hashes("Edema.", "quality", "memorization", "utility", last="q")
    assert {"memorization", "utility", "explanation"} <= {
        part for part in measured if measured[part] != regrouped[part]
    }
    other = hashes("Edema.", patient="q")
    assert all(before[part]["data"] != other[part]["data"] for part in before), "its intervals are others"
    tokens = hashes("Edema.", shift=4)["localization"]
    assert tokens["data"] != before["localization"]["data"], "maps of other tokens"
    assert tokens["pairs"] == before["localization"]["pairs"], "models with other tokenizers are compared"
    assert before["memorization"]["compared"] is None
    one, two = (hashes("Edema.", "quality", "memorization", training=k)["memorization"] for k in (0, 1))
    assert one["compared"] != two["compared"] and one["data"] == two["data"] == before["memorization"]["data"]


def test_an_entry_is_on_disk_as_soon_as_it_is_added(tmp_path: Path) -> None:
    """A killed process does not close its files."""
    kept = Kept(tmp_path, "maps", "key", 0)
    kept.add({"made_of": "a", "value": 1})
    assert Kept(tmp_path, "maps", "key", 1).entries == {"a": {"made_of": "a", "value": 1}}
    kept.close()

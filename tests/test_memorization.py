"""Copies of training images are found in what a model drew, the pairs are shown, and what was made is used again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from recipe import recipe_module, refusal_of
from scipy.stats import hypergeom
from test_evaluate import CONFIG, cost
from test_reuse import never
from tiny import save_tiny

from distill.cli import parse
from distill.config import FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.errors import UserError
from distill.evaluation import drawing as module
from distill.evaluation import memorization as memorization_module
from distill.evaluation.evaluate import evaluate, held_out
from distill.evaluation.images import read_png, save_png
from distill.evaluation.memorization import Pool
from distill.evaluation.results import parse_metrics
from distill.experiment.images import read_images
from distill.experiment.results import judge_memorization
from distill.models.family import Model
from distill.report import mark_model_card, memorization_sentence, write_model_card

PARTS = CONFIG.model_copy(update={"parts": ("memorization",), "generated_images": 12, "bootstrap_samples": 50})
TRAINING, HELD_OUT = PhantomDataset("train", 16, 0, 64), PhantomDataset("test", 14, 0, 64)


def measured(model: Model, folder: Path, config: Any = PARTS, held: Any = HELD_OUT) -> Any:
    accelerator = Accelerator()
    against = held_out(held, model, config, None, accelerator=accelerator, run_dir=folder, copied_from=TRAINING)
    return evaluate(model, against, config, resolution=64, accelerator=accelerator, arm_dir=folder / "model", label="m")


def drawing(pictures: PhantomDataset, mirrored: bool = False) -> Callable[..., torch.Tensor]:
    """In place of generate(): image k of a data set for the caption of row k."""

    def generated(model: Any, captions: Any, seeds: Sequence[int], *rest: Any) -> torch.Tensor:
        rows = [(seed - PARTS.seed) % 1_000_003 for seed in seeds]
        images = torch.stack([(pictures[row].pixel_values + 1) / 2 for row in rows])
        return images.flip(-1) if mirrored else images

    return generated


@pytest.mark.parametrize("mirrored", [False, True])
def test_copies_are_found_and_shown(mirrored: bool, sd: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also mirrored ones, as a training that mirrors its images leaves them."""
    monkeypatch.setattr(module, "generate", drawing(TRAINING, mirrored))
    result = measured(sd, tmp_path)
    found = result["memorization"]
    assert result["quality"] is None and result["localization"] is None
    assert (found["images"], found["training_images"], found["held_out_images"]) == (12, 16, 14)
    assert (
        found["share"] == 1
        and found["copies"] == 1
        and found["p"] == pytest.approx(found["least_p"])
        and found["p"] < 1e-3
    )
    assert set(found["spaces"]) == {"latents", "pixels"} and found["space"] in found["spaces"]
    assert (found["near"], found["near_held_out"], found["near_tested"]) == (12, 0, 14) and found["near_p"] < 1e-6
    assert mirrored or all(space["closeness"]["auc"] == 1 for space in found["spaces"].values())
    rows = [json.loads(line) for line in (tmp_path / "model/memorization.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and max(row["ratio"] for row in rows) < 0.05, "8-bit rounding is all that differs"
    pictures = sorted((tmp_path / "model/memorization").iterdir())
    assert [path.name for path in pictures] == [f"{k:02d}.png" for k in range(10)]
    generated, training, other = read_png(pictures[0]).chunk(3, dim=-1)
    generated = generated.flip(-1) if mirrored else generated
    assert (generated - training).abs().max() < 0.01 < (generated - other).abs().max()
    number = int(rows[0]["training"])
    assert (training - (TRAINING[number].pixel_values + 1) / 2).abs().max() < 0.01


def test_a_near_copy_in_one_space_is_one(sd: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pixels alone: the latents are those of other images."""
    monkeypatch.setattr(module, "generate", drawing(TRAINING))
    vectors, noise = memorization_module._vectors, torch.Generator().manual_seed(0)

    def others(model: Any, features: Any, device: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        found = vectors(model, features, device, images)
        return found | {"latents": torch.randn(found["latents"].shape, generator=noise)}

    monkeypatch.setattr(memorization_module, "_vectors", others)
    assert measured(sd, tmp_path)["memorization"]["near"] == 12


class OfPatients(PhantomDataset):
    """Patients of two images each."""

    def patient(self, index: int) -> str:
        return f"{self.split} {index // 2}"


def test_images_of_one_patient_are_one_observation(sd: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "generate", drawing(TRAINING))
    monkeypatch.setitem(globals(), "TRAINING", OfPatients("train", 16, 0, 64))
    found = measured(sd, tmp_path, held=OfPatients("test", 14, 0, 64))["memorization"]
    # 12 copies of 6 patients, of 8 and 7; of 16 and 13 images, each being compared with all but one.
    assert (found["training_images"], found["neighbours"], found["chance"]) == (16, 6, 16 / 29)
    assert (found["training_patients"], found["held_out_patients"]) == (8, 7)
    assert found["p"] == pytest.approx(2 * hypergeom.sf(5, 15, 9, 6)), "9 of 15: 16 / 29, rounded up"


def test_an_image_is_not_compared_with_the_held_out_image_of_its_own_caption(
    sd: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "generate", drawing(HELD_OUT))
    found = measured(sd, tmp_path)["memorization"]
    assert found["chance"] == 16 / 29 and found["p"] > 0.05
    rows = [json.loads(line) for line in (tmp_path / "model/memorization.jsonl").read_text().splitlines()]
    assert all(min(row["distances"]["pixels"]) > 1 for row in rows), "no image is a copy of another"


def test_what_was_made_is_used_again(sd: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "generate", drawing(PhantomDataset("validation", 14, 0, 64)))
    first = measured(sd, tmp_path)["memorization"]
    kept = sorted((tmp_path / "real/compared").iterdir())
    assert len(kept) == 2
    times = [path.stat().st_mtime_ns for path in kept]
    drawn = sorted((tmp_path / "model/drawn").iterdir())
    assert len(drawn) == 12
    drawn[3].write_bytes(drawn[3].read_bytes()[:100])
    calls: list[int] = []

    def counted(model: Any, captions: Any, seeds: Sequence[int], *rest: Any) -> torch.Tensor:
        calls.extend(seeds)
        return drawing(PhantomDataset("validation", 14, 0, 64))(model, captions, seeds)

    monkeypatch.setattr(module, "generate", counted)
    assert measured(sd, tmp_path)["memorization"] == first
    assert len(calls) == PARTS.batch_size, "only the batch whose image was damaged"
    assert [path.stat().st_mtime_ns for path in sorted((tmp_path / "real/compared").iterdir())] == times
    assert Image.open(drawn[3]).size == (64, 64)


def test_vectors_by_several_processes_are_those_of_one_in_the_order_of_the_images(tmp_path: Path) -> None:
    """3 batches on 4 processes: one of them has nothing to do."""
    paths = [tmp_path / f"{k}.png" for k in range(5)]
    for k, path in enumerate(paths):
        save_png(torch.linspace(0, 1, 12).roll(k).reshape(3, 2, 2), path)

    def vectors(world: int) -> dict[str, tuple[torch.Tensor, ...]]:
        for rank in range(world):
            files = memorization_module._write_vectors(
                paths, lambda pixels: {"pixels": pixels.flatten(1)}, tmp_path / "vectors", 2, rank=rank, world=world
            )
        return memorization_module._read_and_remove(files)

    shared, alone = vectors(4)["pixels"], vectors(1)["pixels"]
    images = torch.stack([read_png(path) for path in paths]) * 2 - 1
    assert torch.equal(alone[0], images.flatten(1)) and torch.equal(alone[1], images.flip(-1).flatten(1))
    assert all(map(torch.equal, shared, alone))
    with pytest.raises(UserError, match=f"{tmp_path}: a vector of an image is not finite"):
        make_nan = lambda pixels: {"pixels": pixels.flatten(1) * torch.nan}  # noqa: E731
        memorization_module._write_vectors(paths, make_nan, tmp_path / "vectors", 2, rank=0, world=1)


def test_a_pool_holds_each_picture_once() -> None:
    class Twice:
        def __len__(self) -> int:
            return 2 * len(TRAINING)

        def __getitem__(self, index: int) -> Any:
            return TRAINING[index // 2]

        def fingerprint(self, index: int) -> str:
            return TRAINING.fingerprint(index // 2)

    pool = Pool(Twice())  # type: ignore[arg-type]
    assert len(pool) == 16 and pool.rows == [*range(0, 32, 2)]
    assert torch.equal(pool[3].pixel_values, TRAINING[3].pixel_values) and pool.place[pool.fingerprint(5)] == 5


# --- the recipe: report, card, limit --------------------------------------------------------------------------------


def evaluate_argv(tmp_path: Path, *more: str) -> list[str]:
    return [
        "--base.name", str(save_tiny(tmp_path / "base")), "--output_dir", str(tmp_path / "out"), "--data.resolution", "64",
        "--data.train_size", "16", "--data.test_size", "14", "--data.cache_dir", str(tmp_path / "cache"),
        "--evaluation.generated_images", "12", "--evaluation.diversity_captions", "1", "--evaluation.diversity_samples", "2",
        "--evaluation.features", "none", "--evaluation.bootstrap_samples", "20", "--evaluation.parts", "quality,memorization",
        *more,
    ]  # fmt: skip


def test_copies_above_the_limit_end_the_recipe_with_an_error_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "generate", drawing(TRAINING))
    recipe = recipe_module("evaluate")
    argv = evaluate_argv(tmp_path, "--evaluation.memorization_limit", "0.2")
    message = refusal_of(recipe.evaluate, recipe.EvaluateConfig, argv, capsys)
    assert "the share of copies is 1.000, and evaluation.memorization_limit is 0.2" in message
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["arms"]["base"]["memorization"]["copies"] == 1
    page = (tmp_path / "out/report.html").read_text()
    said = r"12 of 12 generated images are near copies of training images \(of 14 held-out real images: 0\)\. About 100\.0 %"
    assert re.search(rf'<th scope="row">base</th>\s*<td>{said}', page) and page.count('<img alt="base, pair') == 10
    assert '<img alt="base, pair 1: generated image' in page

    monkeypatch.setattr(module, "generate", never)
    recipe.evaluate(
        parse(recipe.EvaluateConfig, evaluate_argv(tmp_path))
    )  # nothing is drawn again, and there is no limit
    printed = capsys.readouterr().out
    assert "base: memorization is already evaluated" in printed
    argv = [*evaluate_argv(tmp_path)[:-1], "quality"]
    recipe.evaluate(parse(recipe.EvaluateConfig, argv))
    kept = json.loads((tmp_path / "out/metrics.json").read_text())
    assert kept["arms"]["base"]["memorization"] == metrics["arms"]["base"]["memorization"], "what was measured stays"


def test_a_limit_without_the_measurement_is_refused() -> None:
    with pytest.raises(ValueError, match=r"memorization_limit is 0\.1, and parts lacks memorization"):
        FullEvaluation(memorization_limit=0.1)


def entry(**changed: Any) -> dict[str, Any]:
    found = {"copies": 0.3, "copies_ci": [0.1, 0.5], "share": 0.65, "chance": 0.5, "p": 0.001, "least_p": 1e-6}
    counts = {"space": "latents", "images": 40, "training_images": 50, "held_out_images": 50}
    return {"localization": None, "quality": None, "cost": cost(), "memorization": found | counts | changed}


def test_the_card_says_what_was_found_once(tmp_path: Path) -> None:
    card = write_model_card(tmp_path, entry(), {}, {}, base_name="phantom", export={})
    text = card.read_text()
    assert "**Memorization.** About 30.0 % of the generated images are copies" in text
    with pytest.raises(UserError, match=r"the share of copies is 0\.300, and evaluation.memorization_limit is 0\.25"):
        judge_memorization(entry(), tmp_path, 0.25)
    marked = card.read_text()
    assert "**Memorization.** Not to be published: copies are above the limit of 0.25. About 30.0 %" in marked
    judge_memorization(entry(), tmp_path, 0.3)
    assert card.read_text() == text
    with pytest.raises(UserError):
        judge_memorization(entry(), tmp_path, 0.25)
    unmeasured = {key: value for key, value in entry().items() if key != "memorization"}
    write_model_card(tmp_path, unmeasured, {}, {}, base_name="phantom", export={})
    assert card.read_text() == marked, "what evaluate.py has found stays, as the weights do"
    write_model_card(tmp_path, entry(), {}, {}, base_name="phantom", export={})
    assert card.read_text() == text, "unless it is measured again"
    for heading, said in (
        ("What is wrong", "Its maps."),
        ("What tells its images from real ones", "Fine_ detail."),
        ("What is wrong", "FID."),
    ):
        mark_model_card(tmp_path, heading, said)
    both = card.read_text()
    assert both.count("**What is wrong.**") == 1 and "**What is wrong.** FID.\n\nLimits" in both.replace(
        "**What tells its images from real ones.** Fine\\_ detail.\n\n", ""
    )
    judge_memorization(entry(), tmp_path, None)
    assert sorted(card.read_text().split("\n\n")) == sorted(both.split("\n\n")), "each replaces its own"
    write_model_card(tmp_path, entry(), {}, {}, base_name="phantom", export={})
    assert sorted(card.read_text().split("\n\n")) == sorted(both.split("\n\n"))
    for heading in ("What is wrong", "What tells its images from real ones"):
        mark_model_card(tmp_path, heading, "")
    assert card.read_text() == text
    card.write_text("# My own card\n")
    judge_memorization(entry(), tmp_path, None)
    assert card.read_text() == "# My own card\n"
    judge_memorization(entry(p=0.06), tmp_path, 0.0)  # that may be chance
    near = {"p": 0.06, "near": 2, "near_held_out": 0, "near_tested": 50, "near_p": 0.2}
    with pytest.raises(UserError, match=r"the share of copies is 0\.050, and evaluation.memorization_limit is 0\.01"):
        judge_memorization(entry(**near), tmp_path, 0.01)
    judge_memorization(entry(**near), tmp_path, 0.05)
    judge_memorization(
        entry(**near | {"near_held_out": 2, "near_p": 0.6}), tmp_path, 0.01
    )  # real images are it as often
    with pytest.raises(UserError, match=r"the share of copies is 0\.050"):
        judge_memorization(entry(**near | {"near_held_out": 2, "near_p": 0.04}), tmp_path, 0.01)
    judge_memorization(unmeasured, tmp_path, 0.0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"near": 3, "near_tested": 50, "near_p": 0.1},
            "3 of 40 generated images are near copies of training images (of 50 held-out real images: 0). About 30.0 % of",
        ),
        (
            {"near": 3, "near_tested": 50, "near_p": 0.1, "p": 1.0, "least_p": 0.5},
            "3 of 40 generated images are near copies of training images (of 50 held-out real images: 0). Look at the pairs",
        ),
        ({"near": 3, "near_held_out": 2, "near_tested": 50, "near_p": 0.5, "p": 0.05}, "No sign of copies: 65.0 %"),
        ({}, "About 30.0 % of the generated images are copies"),
        (
            {"p": 0.05},
            "No sign of copies: 65.0 % of the generated images are nearer to a training than to a held-out image",
        ),
        (
            {"p": 1.0, "least_p": 0.05},
            "Memorization cannot be tested with 40 generated, 50 training and 50 held-out images: even copies alone would not "
            "differ from chance. Use more.",
        ),
        (
            {"p": 1.0, "least_p": 0.05, "training_patients": 3, "held_out_patients": 2},
            "Memorization cannot be tested with 40 generated, 50 training and 50 held-out images of 3 and 2 patients: even "
            "copies alone would not differ from chance. Use more patients.",
        ),
    ],
)
def test_the_sentence_says_no_more_than_the_test(changed: dict[str, float], said: str) -> None:
    found = parse_metrics({"arms": {"m": entry(**changed)}, "provenance": {}}).arms["m"].memorization
    assert found is not None and memorization_sentence(found).startswith(said)


# --- images of other tools ------------------------------------------------------------------------------------------


def image_folder(folder: Path, pictures: PhantomDataset, count: int = 12, size: int = 64) -> Path:
    folder.mkdir()
    rows = ["file_name,text,labels"]
    for k in range(count):
        save_png((pictures[k].pixel_values + 1) / 2, folder / f"{k}.png")
        with Image.open(folder / f"{k}.png") as image:
            image.resize((size, size)).save(folder / f"{k}.png")
        rows.append(f'{k}.png,"{pictures.caption(k)}",{"|".join(pictures.labels(k))}')
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_images_that_the_metadata_do_not_list_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = image_folder(tmp_path / "images", TRAINING, 4)
    assert len(read_images(folder, 64)) == 4 and not caplog.text
    lines = (folder / "metadata.csv").read_text().splitlines()
    (folder / "metadata.csv").write_text("\n".join(lines[:3]) + "\n")
    assert len(read_images(folder, 64)) == 2
    assert "2 images, such as 2.png, are not in metadata.csv, and are left out" in caplog.text


def test_blank_and_equal_images_and_missing_captions_are_named(tmp_path: Path) -> None:
    """A blank image, as a safety checker leaves it, would be scored as if it were drawn."""
    folder = image_folder(tmp_path / "images", TRAINING, 4)
    for name in ("1.png", "3.png"):
        Image.new("RGB", (64, 64), (0, 0, 0)).save(folder / name)
    for fit in ("crop", "letterbox"):
        with pytest.raises(
            UserError, match=r"row 3: image '1\.png' is of one colour.*\n.*row 5: image '3\.png' is of one"
        ):
            read_images(folder, 64, fit)  # type: ignore[arg-type]
    for name, row in (("1.png", 1), ("3.png", 2)):
        save_png((TRAINING[row].pixel_values + 1) / 2, folder / name)
    with Image.open(folder / "2.png") as image:
        image.save(folder / "3.png", compress_level=0)
    assert (folder / "2.png").read_bytes() != (folder / "3.png").read_bytes()
    with pytest.raises(UserError, match=r"images: 3\.png and 2\.png are the same picture; keep one"):
        read_images(folder, 64)
    text = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(text.replace(f'2.png,"{TRAINING.caption(2)}"', "2.png,"))
    with pytest.raises(UserError, match="text is empty; write the caption of the image") as refused:
        read_images(folder, 64)
    assert "allow_empty_captions" not in str(refused.value)


def test_images_of_another_tool_are_evaluated_and_no_denoiser_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "generate", never)
    recipe = recipe_module("evaluate")
    images = image_folder(tmp_path / "images", TRAINING, size=96)
    argv = [*evaluate_argv(tmp_path)[:-1], "localization,quality,memorization", "--images", str(images)]
    argv[argv.index("--evaluation.features") + 1] = "phantom"
    recipe.evaluate(parse(recipe.EvaluateConfig, argv))
    printed = capsys.readouterr().out
    assert "images: 12 of 12 are made squares of 64 px as the data are" in printed
    assert "Localization was not measured: the choice is by quality alone." in printed
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert set(metrics["arms"]) == {"images"}
    found = metrics["arms"]["images"]
    assert found["localization"] is None and found["quality"]["images"] == 12 and found["quality"]["fid"] >= 0
    assert found["quality"]["finding_auc"] is not None
    assert found["memorization"]["share"] == 1 and found["memorization"]["held_out_images"] == 14
    text = (tmp_path / "out/report.html").read_text()
    said = r"12 of 12 generated images are near copies of training images \(of 14 held-out real images: 0\)"
    assert re.search(rf'<th scope="row">images</th>\s*<td>{said}', text) and "cannot be read" not in text


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "metadata.csv").unlink(), "has neither metadata.csv nor metadata.jsonl"),
        (lambda folder: (folder / "metadata.csv").write_text("file_name\n0.png\n"), "'text' is not a column"),
        (lambda folder: (folder / "metadata.csv").write_text("file_name,text\n0.png,\n1.png,A.\n"), "row 2"),
        (lambda folder: (folder / "metadata.csv").write_text("file_name,text\n0.png,A.\n"), "needs at least 2"),
        (lambda folder: (folder / "1.png").write_bytes(b"no image"), "1.png"),
        (
            lambda folder: (folder / "1.png").write_bytes((folder / "0.png").read_bytes()),
            "1.png and 0.png are the same",
        ),
    ],
)
def test_a_folder_that_cannot_be_evaluated_is_one_error(
    tmp_path: Path, damage: Callable[[Path], Any], said: str
) -> None:
    folder = image_folder(tmp_path / "images", TRAINING, 3)
    damage(folder)
    with pytest.raises(UserError, match="--images") as caught:
        read_images(folder, 64)
    assert said in str(caught.value)


def test_more_images_than_real_ones_are_compared_at_one_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FID depends on the number of images, and the row of real images is at that number."""
    recipe = recipe_module("evaluate")
    images = image_folder(tmp_path / "images", TRAINING)
    argv = [*evaluate_argv(tmp_path)[:-1], "quality,memorization", "--images", str(images)]
    argv[argv.index("--evaluation.features") + 1] = "phantom"
    argv[argv.index("--evaluation.generated_images") + 1] = "7"
    recipe.evaluate(parse(recipe.EvaluateConfig, argv))
    said = "images: quality is that of 7 of 12, against as many held-out ones"
    assert f"{said}; --evaluation.generated_images takes more" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    found = metrics["arms"]["images"]
    assert (found["quality"]["images"], found["memorization"]["images"]) == (7, 12)
    assert metrics["real"]["quality"]["extractor"]["real_images"] == 7 and metrics["real"]["quality"]["fid"] is not None
    argv[argv.index("--evaluation.generated_images") + 1] = "200"
    recipe.evaluate(parse(recipe.EvaluateConfig, argv))
    found = json.loads((tmp_path / "out/metrics.json").read_text())["arms"]["images"]["quality"]
    assert found["images"] == found["extractor"]["real_images"] == 12
    argv[argv.index("--data.test_size") + 1] = "7"
    argv[argv.index("--output_dir") + 1] = str(tmp_path / "few")
    capsys.readouterr()
    recipe.evaluate(parse(recipe.EvaluateConfig, argv))
    assert f"{said}, and there are no more of these" in capsys.readouterr().out


def test_findings_of_the_images_that_are_not_those_of_real_ones_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = image_folder(tmp_path / "images", TRAINING)
    lines = (images / "metadata.csv").read_text().splitlines()
    labels = ["labels" if k == 0 else "edema" if k % 2 else "no such finding" for k in range(len(lines))]
    lines = [f"{line.rpartition(',')[0]},{label}" for line, label in zip(lines, labels, strict=True)]
    (images / "metadata.csv").write_text("\n".join(lines) + "\n")
    argv = evaluate_argv(tmp_path, "--images", str(images))
    argv[argv.index("--evaluation.features") + 1] = "phantom"
    argv[argv.index("quality,memorization")] = "quality"
    recipe = recipe_module("evaluate")
    recipe.evaluate(parse(recipe.EvaluateConfig, argv))
    printed = " ".join(capsys.readouterr().out.split())
    assert "finding AUC leaves out no such finding, labels of the images: the classifier has no such class" in printed
    assert "finding AUC of the images is the mean over edema, and that of real images over" in printed
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["arms"]["images"]["quality"]["finding_auc_of"] == ["edema"]
    assert len(metrics["real"]["quality"]["finding_auc_of"]) > 1


@pytest.mark.parametrize("fit", ["crop", "letterbox"])
def test_images_of_another_tool_become_squares_as_the_data_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fit: str
) -> None:
    images = image_folder(tmp_path / "images", TRAINING, 2)
    for k in range(2):
        picture = Image.new("L", (80, 40), 100 + k)
        picture.paste(200, (35, 10, 45, 20))  # an image of one colour is refused
        picture.save(images / f"{k}.png")
    read = []

    def stop(*arguments: Any) -> None:
        read.append(read_images(*arguments))
        raise UserError("enough")

    monkeypatch.setattr("distill.experiment.images.read_images", stop)
    recipe = recipe_module("evaluate")
    config = recipe.EvaluateConfig(
        images=str(images), output_dir=str(tmp_path / "out"),
        data={"kind": "folder", "resolution": 32, "fit": fit, "query_words": {name: ["x"] for name in TRAINING.labels(0)}},
    )  # fmt: skip
    with pytest.raises(UserError, match="enough"):
        recipe.evaluate(config)
    assert TRAINING.labels(0) and all(read[0].query_words[name] == ("x",) for name in TRAINING.labels(0))
    pixels = read[0][0].pixel_values
    assert (pixels[:, :8] == -1).all() == (fit == "letterbox") and (pixels[:, 8:24] > -0.3).all()


def test_images_have_no_run_and_no_maps() -> None:
    recipe = recipe_module("evaluate")
    with pytest.raises(ValueError, match="give one of them"):
        recipe.EvaluateConfig(images="a", run="b")
    with pytest.raises(ValueError, match="add quality"):
        recipe.EvaluateConfig(images="a", evaluation=FullEvaluation(parts=("localization",)))

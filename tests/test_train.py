"""What the options of an arm reach, and that no export passes without its proof."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from listed import WORDS, Listed, sample
from recipe import recipe_module
from tiny import save_tiny

from distill.cli import parse
from distill.errors import UserError
from distill.experiment import train
from distill.experiment.arms import Arm
from distill.experiment.run import Run, open_run
from distill.methods.training import Training
from distill.models.family import Model

SMALL = """--data.resolution 64 --data.test_size 4 --data.train_size 4 --trainer.max_steps 1 --trainer.batch_size 2
    --trainer.warmup_steps 0 --trainer.tracker none --evaluation.features none --evaluation.localization_images 2
    --trainer.cache_latents false""".split()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("base") / "sd"))


def opened(base: str, folder: Path, *words: str) -> tuple[Run, Arm]:
    argv = ["--base.name", base, "--output_dir", str(folder), *SMALL, *words]
    config = parse(recipe_module("finetune").FinetuneConfig, argv)
    training = Training.model_validate(config.model_dump(include=set(Training.model_fields)))
    arm = Arm("model", folder, training, config.trainer, config.evaluation.full())
    return open_run(config, {"model": arm}, compare_to=("base",)), arm


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("text_rate", "expected"), [("0.25", 0.25), ("null", 0.5)])
def test_denoiser_and_text_encoder_get_their_own_learning_rates(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text_rate: str, expected: float
) -> None:
    given: dict[str, Any] = {}

    def fit(method: Any, rows: Any, trainer: Any, **options: Any) -> None:
        given.update(options, method=method)
        raise Stopped

    monkeypatch.setattr(train, "fit", fit)
    rates = ["--trainer.learning_rate", "0.5", "--trainer.text_encoder_learning_rate", text_rate]
    run, arm = opened(base, tmp_path, "--denoiser", "full", "--text_encoder", "full", "--seed", "3", *rates)
    with pytest.raises(Stopped):
        train.train_arm(run, arm)
    model = given["method"].student
    found = [({id(p) for p in group["params"]}, group["lr"]) for group in given["parameter_groups"]]
    parts = [(model.denoiser, 0.5), (model.text_encoders[0], expected)]
    assert found == [({id(p) for p in part.parameters()}, rate) for part, rate in parts]
    assert (given["seed"], given["label"], given["output_dir"]) == (3, "model", tmp_path / "model")


def test_an_export_that_gives_another_model_is_no_result(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = train.export

    def export(model: Model, folder: Path) -> dict[str, str]:
        written = write(model, folder)
        next(model.denoiser.parameters()).data += 0.1
        return written

    monkeypatch.setattr(train, "export", export)
    run, arm = opened(base, tmp_path, "--denoiser", "full")
    with pytest.raises(UserError, match="difference|differ"):
        train.train_arm(run, arm)
    assert not (tmp_path / "cost.json").exists(), "the same command must not take it for trained"


def test_the_data_of_an_arm_are_hashed_once_for_its_cost_and_its_checkpoints(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, given, fingerprints, fit = [], {}, train.row_fingerprints, train.fit

    def counted(data: Any, *options: Any, **more: Any) -> dict[str, str]:
        hashed.append(data)
        return fingerprints(data, *options, **more)

    def seen(*arguments: Any, **options: Any) -> Any:
        given.update(options["fingerprints"])
        return fit(*arguments, **options)

    monkeypatch.setattr(train, "row_fingerprints", counted)
    monkeypatch.setattr(train, "fit", seen)
    run, arm = opened(base, tmp_path, "--denoiser", "lora", "--trainer.max_steps", "1")
    data = train.train_arm(run, arm)["training_data"]
    assert len(hashed) == 1 and set(data) == {"training images", "training captions"} and data.items() <= given.items()


@pytest.mark.parametrize("flip", [False, True])
def test_rows_have_what_data_method_and_denoising_ask_for(sd: Model, tmp_path: Path, flip: bool) -> None:
    argv = """--denoiser full --text_encoder full --denoising.caption_dropout_label edema --method.images 5
        --method.kind supervised_attention --method.region_token_weight 0.1""".split()
    config = parse(recipe_module("finetune").FinetuneConfig, argv)
    training = Training.model_validate(config.model_dump(include=set(Training.model_fields)))
    arm = Arm("model", tmp_path, training, config.trainer, config.evaluation.full())
    data = SimpleNamespace(cache_dir=str(tmp_path), horizontal_flip=flip)
    accelerator = SimpleNamespace(device="cpu", main_process_first=nullcontext)
    dataset = Listed([sample("a", "Edema.", ("edema", None))], WORDS)
    run = SimpleNamespace(config=SimpleNamespace(data=data), train=dataset, accelerator=accelerator)
    rows = train.training_rows(cast(Run, run), arm, sd, cached=False)
    assert (rows.flip, rows.latents, rows.text, rows.region_images) == (flip, None, None, 5)
    assert rows.denoising is training.denoising and rows.denoising.caption_dropout_label == "edema"
    assert (rows.label_tokens, rows.regions) == (training.method.reads_labels, training.method.reads_regions)

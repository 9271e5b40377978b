"""What the options of an arm reach, and that no export passes without its proof."""

from __future__ import annotations

import json
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from listed import WORDS, Listed, sample
from PIL import Image
from recipe import recipe_module
from safetensors.torch import load_file
from tiny import save_tiny

from distill.cli import parse
from distill.data.phantom.dataset import PhantomDataset
from distill.errors import UserError
from distill.evaluation.validation import SCORES, Looks, read_looks
from distill.experiment import train
from distill.experiment.arms import Arm
from distill.experiment.run import Run, open_run
from distill.methods.training import Training
from distill.models import load_model
from distill.models.family import Model
from distill.trainer import FitResult

ANY_DATA = """--data.resolution 64 --trainer.max_steps 1 --trainer.batch_size 2
    --trainer.warmup_steps 0 --trainer.tracker none --evaluation.features none --evaluation.localization_images 2
    --trainer.cache_latents false""".split()
SMALL = [*ANY_DATA, "--data.test_size", "4", "--data.train_size", "4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("base") / "sd"))


def opened(base: str, folder: Path, *words: str, phantoms: bool = True) -> tuple[Run, Arm]:
    argv = ["--base.name", base, "--output_dir", str(folder), *(SMALL if phantoms else ANY_DATA), *words]
    config = parse(recipe_module("finetune").FinetuneConfig, argv)
    training = Training.model_validate(config.model_dump(include=set(Training.model_fields)))
    arm = Arm("model", folder, training, config.trainer, config.evaluation.full(), keep=config.keep)
    return open_run(config, {"model": arm}, compare_to=("base",)), arm


def test_what_is_exported_is_the_best_look_and_the_cost_says_which(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a training of as many steps exports, also after a kill; other options of the looks are then refused."""
    monkeypatch.setitem(SCORES, "loss", lambda row: -abs(row["step"] - 2.25))  # step 2 of 3 is the best
    looks = ["--trainer.validate_every_steps", "1", "--keep", "loss", "--data.validation_size", "2"]
    looks += ["--trainer.max_steps", "3", "--trainer.checkpoint_every_steps", "1"]

    def trained(folder: Path, *words: str) -> tuple[Any, dict[str, Any]]:
        cost = train.train_arm(*opened(base, folder, "--denoiser", "full", *words))
        return cost, load_file(folder / "unet/diffusion_pytorch_model.safetensors")

    expected = trained(tmp_path / "shorter", "--trainer.max_steps", "2")[1]
    look = Looks.look

    def dying(self: Looks, model: Model, step: int) -> Any:
        if step == 3:
            raise Stopped
        return look(self, model, step)

    with monkeypatch.context() as killed, pytest.raises(Stopped):
        killed.setattr(Looks, "look", dying)
        trained(tmp_path / "kept", *looks)
    with pytest.raises(UserError, match=r"options of evaluation.* changed"):
        trained(tmp_path / "kept", *looks, "--evaluation.guidance_scale", "2")
    cost, found = trained(tmp_path / "kept", *looks)
    assert cost["kept"] == {"step": 2, "rule": "loss", "value": 0.25} and cost["steps"] == 3
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    rows = read_looks(tmp_path / "kept/model/validation_log.jsonl")
    assert list(rows) == [1, 2, 3] and rows[1]["finding_auc"] is None and rows[1]["word"]["auc"] is not None


class Stopped(Exception):
    pass


def test_the_card_of_other_weights_goes_with_them(base: str, tmp_path: Path) -> None:
    """What it says of copies was found in the weights of before."""
    for steps, stays in ((1, None), (1, True), (2, False)):
        train.train_arm(*opened(base, tmp_path, "--trainer.max_steps", str(steps)))
        assert stays is None or (tmp_path / "README.md").exists() == stays
        (tmp_path / "README.md").write_text("card")


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trainer.lr_schedule", "cosine"], "whose cosine schedule ends there"),
        (["--trainer.keep_last_state_gb", "0"], "Its last state was not kept"),
    ],
)
def test_a_length_that_cannot_be_leaves_the_run_folder_as_it_was(
    ended: bool, words: list[str], expected: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the command that it was begun with works again, also after a kill."""
    words = [*words, "--trainer.checkpoint_every_steps", "1"]

    def killed(*parts: Any) -> Any:
        raise Stopped

    with monkeypatch.context() as patched, nullcontext() if ended else pytest.raises(Stopped):
        if not ended:
            patched.setattr(train, "export", killed)
        train.train_arm(*opened(base, tmp_path, *words, "--trainer.max_steps", "2"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    if ended or "cosine" in words:
        with pytest.raises(UserError, match=f"arms that cannot go on.*\n.*model: .*{expected}"):
            opened(base, tmp_path, *words, "--trainer.max_steps", "3")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert train.train_arm(*opened(base, tmp_path, *words, "--trainer.max_steps", "2"))["steps"] == 2


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
    rates += ["--text_encoder_steps", "1"]
    run, arm = opened(base, tmp_path, "--denoiser", "full", "--text_encoder", "full", "--seed", "3", *rates)
    with pytest.raises(Stopped):
        train.train_arm(run, arm)
    model = given["method"].student
    found = [({id(p) for p in group["params"]}, group["lr"], group["until"]) for group in given["parameter_groups"]]
    parts = [(model.denoiser, 0.5, None), (model.text_encoders[0], expected, 1)]
    assert found == [({id(p) for p in part.parameters()}, rate, until) for part, rate, until in parts]
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


def test_images_are_mirrored_by_the_texts_that_are_trained_on(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(train, "cache_latents", lambda *parts, **options: given.append(options))
    words = ["--trainer.cache_latents", "true", "--denoising.training_text", "labels"]
    run, arm = opened(base, tmp_path, *words)
    rows = train.training_rows(run, arm, load_model(run.base), cached=True)
    assert given[0]["captions"] == [rows.caption(i) for i in range(4)] != [run.train.caption(i) for i in range(4)]


GATED = [
    "--data.validation_size", "4", "--data.resolution", "64", "--text_encoder", "full",
    "--method", '{"kind": "attention_distillation", "teacher": "base", "gate_reference": "base", "gate_images": 3}',
]  # fmt: skip


def test_a_gate_that_was_decided_is_read_and_its_passes_count_again(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    seen: list[Any] = []
    compute = train.compute_cells

    def counted(*arguments: Any, **options: Any) -> Any:
        looked.append(options["label"])
        seen.append(compute(*arguments, **options))
        return seen[-1]

    def decided(*words: str) -> tuple[Any, int]:
        given: dict[str, Any] = {}

        def fit(method: Any, rows: Any, trainer: Any, **options: Any) -> FitResult:
            given.update(match=method.match)
            return FitResult(0, 0.0, 0.0, 0)

        monkeypatch.setattr(train, "fit", fit)
        run, arm = opened(base, tmp_path / f"run{words}", *GATED, *words)
        return given, train.fit_arm(run, arm, tmp_path / "model")[3]

    monkeypatch.setattr(train, "compute_cells", counted)
    first = decided()
    assert looked == ["gate: teacher", "gate: reference"]
    kept = json.loads((tmp_path / "model/gate_looks.json").read_text(encoding="utf-8"))
    assert [kept[label]["image_adds"] for label in looked] == [cells.mean("image_adds").tolist() for cells in seen]
    gate = (tmp_path / "model/gate.json").read_text(encoding="utf-8")
    assert decided() == first and len(looked) == 2, "the same command again looks at nothing"
    assert (tmp_path / "model/gate.json").read_text(encoding="utf-8") == gate
    for changed in (["--data.seed", "3"],):
        looked.clear()
        with suppress(UserError):  # other weights or images may have nothing to teach
            decided(*changed)
        assert looked == ["gate: teacher", "gate: reference"], changed
    (tmp_path / "model/gate_looks.json").write_text("{torn", encoding="utf-8")
    assert decided() == first and len(looked) == 4, "a file that cannot be read is none"
    looks = (tmp_path / "model/gate_looks.json").read_text(encoding="utf-8")
    (tmp_path / "model/gate_looks.json").write_text(looks.replace('"image_adds"', '"auc"'), encoding="utf-8")
    assert decided() == first and len(looked) == 6, "looks that measured something else are none"


def test_the_weights_of_a_model_are_hashed_once_a_run(
    base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed, given, fingerprint = [], {}, train.weights_fingerprint

    def counted(modules: Any) -> str:
        hashed.append(modules)
        return fingerprint(modules)

    def fit(method: Any, rows: Any, trainer: Any, **options: Any) -> FitResult:
        given.update(options["fingerprints"])
        return FitResult(0, 0.0, 0.0, 0)

    monkeypatch.setattr(train, "weights_fingerprint", counted)
    monkeypatch.setattr(train, "fit", fit)
    taught = '{"kind": "attention_distillation", "teacher": "base"}'
    run, arm = opened(base, tmp_path, "--text_encoder", "full", "--method", taught)
    for _ in range(2):
        train.fit_arm(run, arm, tmp_path / "model")
    assert len(hashed) == 2, "the student's base, and the model that the teacher's name stands for"
    found = train.hash_of([fingerprint(load_model(run.base).modules()), schedule_of(run)])
    assert given["weights of base"] == found


def schedule_of(run: Run) -> str:
    return json.dumps(dict(load_model(run.base).noise_scheduler.config), sort_keys=True, default=str)


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


def test_before_a_training_no_image_is_drawn(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = PhantomDataset.__getitem__
    monkeypatch.setattr(PhantomDataset, "__getitem__", lambda self, index: drawn.append(index) or draw(self, index))
    few = ["--data.test_size", "40", "--evaluation.localization_images", "20", "--evaluation.examples", "2"]
    run, _ = opened(base, tmp_path, *few, "--evaluation.generated_images", "10")
    shown = list(run.examples)
    assert len(shown) == 2 and drawn == [], "regions are known without the pictures"
    assert not (tmp_path / "real").exists()
    assert run.against.examples == shown and len({query.image for query in run.against.asked}) == 20
    assert (tmp_path / "real" / "examples.jsonl").is_file() and run.against is run.against
    assert {"checks", "real images"} <= run.seconds.keys()


def test_a_held_out_file_that_cannot_be_read_is_found_before_the_training(base: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{i}.png")
    content = (data / "3.png").read_bytes()
    (data / "3.png").write_bytes(content[:99] + bytes(99) + content[198:])  # the length and the header stay
    rows = [f"{i}.png,an effusion,{'test' if i > 1 else 'train'}" for i in range(4)]
    (data / "metadata.csv").write_text("\n".join(["file_name,text,split", *rows]) + "\n", encoding="utf-8")
    words = [
        "--data.kind",
        "folder",
        "--data.root",
        str(data),
        "--data.resolution",
        "64",
        "--evaluation.features",
        "none",
    ]
    argv = ["--base.name", base, "--output_dir", str(tmp_path / "out"), *words]
    config = parse(recipe_module("finetune").FinetuneConfig, argv)
    arm = Arm("model", tmp_path / "out", Training(), config.trainer, config.evaluation.full())
    with pytest.raises(UserError, match="3.png"):
        open_run(config, {"model": arm})
    assert not (tmp_path / "out").exists() or not (tmp_path / "out" / "config.yaml").exists()

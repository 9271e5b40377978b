"""Trained arms: what an earlier launch left, what of it is used again, and what is said; no model is trained here."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from listed import WORDS, Listed, sample
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from distill import checkpoints
from distill.attention import attention_layers
from distill.config import BaseConfig, EvaluationConfig, FullEvaluation, LoraConfig, TrainerConfig
from distill.data.phantom.dataset import PhantomDataset
from distill.data_config import FolderData, MimicData, PhantomData
from distill.errors import UserError
from distill.experiment import derive, results, sharing, train
from distill.experiment import run as run_module
from distill.experiment.arms import Arm
from distill.experiment.lengths import has_gone_on, length_fault
from distill.experiment.run import Run
from distill.methods.options import AttentionDistillationOptions, DenoisingOptions
from distill.methods.training import Training
from distill.models.adapters import prepare_training
from distill.models.loading import PHANTOM_BASE, SUBSET_FILE, load_model
from distill.trainer import FitResult, begin_again


def arm_of(folder: Path, name: str = "model", **options: Any) -> Arm:
    trainer = TrainerConfig(**{"max_steps": 10, "tracker": "none", **options.pop("trainer", {})})
    training = options.pop("training", Training())
    return Arm(name, folder / name, training, trainer, FullEvaluation(seed=50), **options)


def run_of(folder: Path, *arms: Arm, **options: Any) -> tuple[Any, list[str]]:
    """A run with nothing but what is given, and what it says."""
    said: list[str] = []
    values = {
        "folder": folder, "arms": {arm.name: arm for arm in arms}, "accelerator": Accelerator(), "say": said.append,
        "seconds": {}, "data_hashes": {}, "weight_hashes": {}, "seed": 3, "balance": None,
    }  # fmt: skip
    return SimpleNamespace(**(values | options)), said


# ---------------------------------------------------------------------------------------------- trained before


def test_a_finished_arm_goes_on_where_it_can(tmp_path: Path) -> None:
    arm = arm_of(tmp_path)
    student = arm_of(tmp_path, "student", needs=("model",))
    other = arm_of(tmp_path, "other")
    run, said = run_of(tmp_path, arm, student, other)
    log_dir, state = tmp_path / "logs", tmp_path / "logs" / "state"
    assert train._is_longer(run, arm, 10, log_dir) is False and not said
    with pytest.raises(UserError, match=r"model: trained for 11 steps, and trainer.max_steps is 10; give trainer.max_steps 11, "
                                        r"or delete \S+model to train 10 steps from the beginning"):  # fmt: skip
        train._is_longer(run, arm, 11, log_dir)
    with pytest.raises(
        UserError, match=r"for 9 steps, .* is 10. Its last state was not kept .*: give trainer.max_steps 9"
    ):
        train._is_longer(run, arm, 9, log_dir)
    checkpoints.folder_of(state, 8).mkdir(parents=True)
    with pytest.raises(UserError, match="Its last state was not kept"):
        train._is_longer(run, arm, 9, log_dir)
    checkpoints.folder_of(state, 9).mkdir(parents=True)
    other.folder.mkdir()
    (other.folder / "cost.json").touch()
    student.folder.mkdir()
    assert train._is_longer(run, arm, 9, log_dir) is True, "the student is not trained yet"
    assert said == ["model: trained for 9 steps; goes on to 10"]
    checkpoints.folder_of(state, 9).rename(checkpoints.folder_of(state, 10))
    assert train._is_longer(run, arm, 9, log_dir) is True, "it was killed while it went on"
    (student.folder / "cost.json").touch()
    with pytest.raises(
        UserError, match=r"model: it would be trained further, and student was trained with it .* \S+student to"
    ):
        train._is_longer(run, arm, 9, log_dir)


def test_a_training_that_cannot_go_on_leaves_the_options_as_they_were(tmp_path: Path) -> None:
    arm = replace(arm_of(tmp_path, trainer={"max_steps": 4}), fixed_steps=True)
    run, _ = run_of(tmp_path, arm, former_config="before")
    (tmp_path / "config.yaml").write_text("after")
    arm.folder.mkdir()

    def refused() -> str:
        with pytest.raises(UserError, match="captions changed"), train.restored(run):
            raise UserError("captions changed")
        return (tmp_path / "config.yaml").read_text()

    assert refused() == "after", "it was begun by this launch"
    (arm.folder / "cost.json").write_text('{"steps": 2}')
    checkpoints.folder_of(arm.folder / "state", 3).mkdir(parents=True)
    assert refused() == "after", "it has gone on"
    checkpoints.folder_of(arm.folder / "state", 3).rename(checkpoints.folder_of(arm.folder / "state", 2))
    assert refused() == "before"
    fault = length_fault(
        {}, replace(arm, trainer=arm.trainer.model_copy(update={"max_steps": 1})), 2, arm.folder / "state"
    )
    said = "trained for 2 steps, and arms.model.max_steps is 1; give arms.model.max_steps 2, or delete"
    assert fault is not None and fault.startswith(said)
    assert begin_again(arm.folder / "state").endswith(f"delete {arm.folder} to train from the beginning")
    single = replace(arm, folder=tmp_path)  # the layout of finetune.py: the model beside its folder of checkpoints
    (arm.folder / "cost.json").rename(tmp_path / "cost.json")
    assert begin_again(arm.folder / "state").endswith(f"delete {tmp_path} to train from the beginning")
    assert not has_gone_on(single, tmp_path)
    checkpoints.folder_of(arm.folder / "state", 3).mkdir()
    assert has_gone_on(single, tmp_path)
    (tmp_path / "cost.json").unlink()
    assert begin_again(arm.folder / "state").endswith(f"delete {arm.folder / 'state'} to train from the beginning")


def test_a_teacher_is_not_loaded_by_the_options_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BaseConfig] = []

    def load(base: BaseConfig, run: Any = None) -> None:
        asked.append(base)
        raise UserError(f"base.name: {base.name} is damaged")

    monkeypatch.setattr(run_module, "load_model", load)
    (tmp_path / "b.safetensors").touch()
    for name, configs in (
        ("phantom", str(PHANTOM_BASE)),
        (str(tmp_path / "b.safetensors"), None),
        ("some/hub", "some/hub"),
    ):
        config = SimpleNamespace(base=BaseConfig(name=name, variant="fp16", revision="r"))
        run, _ = run_of(tmp_path, config=config, references={})
        with pytest.raises(UserError, match="^the model teacher.safetensors: teacher.safetensors is damaged$"):
            Run.load(run, "teacher.safetensors")
        found = asked.pop()
        assert (found.single_file_config, found.variant, found.revision) == (configs, None, None)


def test_a_cost_that_cannot_be_read_is_none_and_one_that_can_is_used(tmp_path: Path) -> None:
    run, said = run_of(tmp_path)
    path = tmp_path / "cost.json"
    assert train._cost_of(run, "model", path) is None and not said
    for content in (
        "{",
        "[1]",
        '{"steps": 3}',
        '{"steps": "3", "train_seconds": 1}',
        '{"steps": 3, "train_seconds": null}',
    ):
        path.write_text(content)
        assert train._cost_of(run, "model", path) is None, content
    assert len(said) == 5 and all(
        text.startswith(f"model: trained again, because {path} cannot be used: ") for text in said
    )
    assert said[-1].endswith("steps and train_seconds must be numbers")
    path.write_text('{"steps": 3, "train_seconds": 1.5, "more": 1}')
    assert train._cost_of(run, "model", path) == {"steps": 3, "train_seconds": 1.5, "more": 1} and len(said) == 5


def test_what_was_trained_is_kept_without_its_older_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = arm_of(tmp_path)
    dataset = Listed([sample("a", "Edema.", ("edema", None))] * 2, WORDS)
    run, said = run_of(tmp_path, arm, train=dataset)
    hashes = {"training images": "1"}
    monkeypatch.setattr(train, "row_fingerprints", lambda data, denoising, **reads: hashes)
    state = tmp_path / "model" / "state"
    for step in (5, 10):
        checkpoints.folder_of(state, step).mkdir(parents=True)
    cost = {"steps": 10, "train_seconds": 1.5, "training_images": 1234, "training_data": {"training images": "0"}}
    (arm.folder / "cost.json").write_text(json.dumps(cost))
    assert train.train_arm(run, arm) == cost
    assert [path.name for path in state.iterdir()] == ["step-00000010"]
    assert said[0] == f"model: already trained, {arm.folder}; to train longer, raise max_steps"
    assert said[1].startswith("model: it was trained on other data, 1,234 images; there are 2 now.") and len(said) == 2
    for same in ({"training images": "1"}, "a hash of an earlier version"):
        said.clear()
        (arm.folder / "cost.json").write_text(json.dumps(cost | {"training_data": same}))
        train.train_arm(run, arm)
        assert len(said) == 1, same


def test_an_arm_is_trained_exported_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(
        denoiser="lora", text_encoder="full", method=AttentionDistillationOptions(teacher="base", gate_reference="a/b")
    )
    arm = arm_of(tmp_path / "exports", training=training)
    dataset = Listed([sample("a", "Edema.", ("edema", None))] * 2, WORDS)
    run, said = run_of(tmp_path, arm, train=dataset, base="the base")
    fitted: list[Any] = []

    def fit_arm(*given: Any) -> Any:
        fitted.append(given)
        return "the model", FitResult(10, 30.0, 1.25, 77), 2.5, 600

    monkeypatch.setattr(train, "fit_arm", fit_arm)
    monkeypatch.setattr(train, "row_fingerprints", lambda *_, **__: {"training images": "1"})
    monkeypatch.setattr(train, "with_teachers", lambda run, arm, passes: passes + 1)
    monkeypatch.setattr(train, "export", lambda model, folder: {"unet": "unet", "lora": "a.safetensors"})
    monkeypatch.setattr(train, "load_model", lambda base, run: (base, run))
    proved: list[Any] = []
    monkeypatch.setattr(train, "prove_parity", lambda *given: proved.append(given) or 1.5e-7)
    arm.folder.mkdir(parents=True)
    cost = train.train_arm(run, arm)
    assert cost == {
        "train_seconds": 32.5, "steps": 10, "image_passes": 600, "image_passes_with_teachers": 601, "peak_memory_gb": 1.25,
        "trainable_parameters": 77, "training_images": 2, "training_data": {"training images": "1"},
    }  # fmt: skip
    assert json.loads((arm.folder / "cost.json").read_text()) == cost
    assert fitted == [(run, arm, tmp_path / "model")], "logs lie in the run folder, wherever the export goes"
    assert proved == [("the model", ("the base", arm.folder), torch.device("cpu"))]
    assert said == [
        "model: attention_distillation, base, a/b; denoiser lora, text encoder full",
        f"model: exported unet, a.safetensors to {arm.folder}; loaded back, difference 1.5e-07",
    ]


@pytest.mark.parametrize("adapted", [True, False])
@pytest.mark.parametrize(
    ("part", "denoiser", "text_encoder"),
    [
        ("denoiser", "lora", "full"),
        ("denoiser", "full", "lora"),
        ("text_encoder", "full", "lora"),
        ("text_encoder", "lora", "full"),
        ("text_encoder", "lora", "frozen"),
    ],
)
def test_a_student_of_adapters_goes_on_with_them(
    adapted: bool, part: str, denoiser: Any, text_encoder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the denoiser, and in any of the text encoders; else its export would lack them."""

    def module(holder: str) -> torch.nn.Module:
        return torch.nn.ModuleDict({"lora_A" if adapted and holder == part else "plain": torch.nn.Linear(1, 1)})

    student: Any = SimpleNamespace(
        denoiser=module("denoiser"), text_encoders=[module("neither"), module("text_encoder")]
    )
    checked: list[Any] = []
    prepared: list[Any] = []
    monkeypatch.setattr(train, "load_model", lambda base: f"model of {base}")
    monkeypatch.setattr(train, "check_untrained", lambda *given: checked.append(given))
    monkeypatch.setattr(train, "prepare_training", lambda model, **options: prepared.append((model, options)))
    monkeypatch.setattr(train, "_weights_hash", lambda run, key, model: f"hash of {key}")
    method = AttentionDistillationOptions(teacher="a/run", start_from_teacher=True)
    training = Training(denoiser=denoiser, text_encoder=text_encoder, method=method)
    arm = arm_of(tmp_path, training=training, trainer={"gradient_checkpointing": True})
    config = SimpleNamespace(base=SimpleNamespace(frozen_dtype="bf16"))
    run, _ = run_of(tmp_path, arm, base="the base", config=config, load=lambda name: student)
    hashes: dict[str, str] = {}
    how = {"denoiser": denoiser, "text_encoder": text_encoder}
    if adapted and how[part] != "lora":
        expected = f"model: a/run has an adapter on its {part}, and this arm has {part} {how[part]}; set it to lora"
        with pytest.raises(UserError, match=expected):
            train._student(run, arm, hashes)
        return
    assert train._student(run, arm, hashes) is student and hashes == {"weights of a/run": "hash of a/run"}
    assert checked == [(student, "model of the base", arm)]
    assert prepared == [
        (student, how | {"lora": training.lora, "frozen_dtype": "bf16", "gradient_checkpointing": True})
    ]


@pytest.mark.parametrize("changed", [False, True])
def test_adapters_on_the_base_s_own_weights_are_no_difference(changed: bool, tmp_path: Path) -> None:
    """In the denoiser and in the text encoder; weights under an adapter that differ would be lacking in the export."""
    base = BaseConfig(name=str(save_tiny(tmp_path / "base")))
    student = load_model(base)
    prepare_training(student, denoiser="lora", text_encoder="lora", lora=LoraConfig(rank=2))
    arm = arm_of(tmp_path, training=Training(denoiser="lora", text_encoder="lora"))
    if changed:
        next(p for n, p in student.text_encoders[0].named_parameters() if "lora_" not in n).data += 0.1
    with pytest.raises(UserError, match="whose text encoder is not the base's") if changed else nullcontext():
        train.check_untrained(student, load_model(base), arm)


def test_captions_are_spread_over_all_rows() -> None:
    rows: Any = SimpleNamespace(__len__=None)

    class Rows:
        def __len__(self) -> int:
            return 11

        def caption(self, index: int) -> str:
            return str(index)

    rows = Rows()
    assert train._spread_captions(rows, 3) == ["0", "5", "10"] and train._spread_captions(rows, 2) == ["0", "10"]
    assert train._spread_captions(rows, 100) == [str(i) for i in range(11)]


def test_measurements_before_a_training_take_about_as_many_images_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows:
        def __len__(self) -> int:
            return 7

        def __getitem__(self, index: int) -> int:
            return index

    monkeypatch.setattr(train.Batch, "stack", lambda rows: SimpleNamespace(to=lambda device: (sorted(rows), device)))
    run, _ = run_of(Path())

    def seen(images: int) -> list[list[int]]:
        found = list(train._first_batches(run, Rows(), 3, images))  # type: ignore[arg-type]
        assert all(device == torch.device("cpu") for _, device in found)
        return [rows for rows, _ in found]

    assert [len(seen(images)) for images in (1, 3, 4, 6, 7)] == [1, 1, 2, 2, 3]
    order = np.random.default_rng([3, 0]).permutation(7)
    assert seen(6) == [sorted(order[:3]), sorted(order[3:6])], "the first of the training"


@pytest.mark.parametrize("frozen", ["fp32", "bf16"])
def test_samples_are_a_strip_of_four_held_out_captions(
    frozen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def generate(model: Any, captions: list[str], seeds: list[int], resolution: int, evaluation: Any) -> torch.Tensor:
        asked.append((model, captions, seeds, resolution, evaluation, torch.is_autocast_enabled("cpu")))
        return torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2) / 4

    saved: list[Any] = []
    monkeypatch.setattr(train, "generate", generate)
    monkeypatch.setattr(train, "save_png", lambda image, path: saved.append((image, path, path.parent.is_dir())))
    arm = arm_of(tmp_path)
    config = SimpleNamespace(
        dry_run=False, base=SimpleNamespace(frozen_dtype=frozen), data=SimpleNamespace(resolution=64)
    )
    test = SimpleNamespace(caption=lambda i: f"caption {i}")
    run, _ = run_of(tmp_path, arm, config=config, test=test, examples=[7, 2, 9, 4, 5])
    path = tmp_path / "progress" / "step-000002.png"
    train._sample(run, arm, "the model", path)  # type: ignore[arg-type]
    captions = [f"caption {i}" for i in (7, 2, 9, 4)]
    assert asked == [("the model", captions, [57, 52, 59, 54], 64, arm.evaluation, frozen == "bf16")]
    ((image, written, is_folder),) = saved
    assert image.shape == (3, 2, 8) and image[0, 0].tolist() == [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert written == path and is_folder
    config.dry_run = True
    train._sample(run, arm, "the model", path)  # type: ignore[arg-type]
    config.dry_run = False
    run.accelerator = SimpleNamespace(is_main_process=False)
    train._sample(run, arm, "the model", path)  # type: ignore[arg-type]
    assert len(asked) == 1


# ------------------------------------------------------------------------------------------- measured before


HASHES: dict[str, Any] = {"weights": "w", "options": {"seed": 1, "protocol": "ours"}, "data": "d", "features": "f"}


def test_what_differs_from_an_earlier_measurement_is_said(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("1")
    files = results._files(tmp_path, "localization")
    assert list(files) == ["pairs.jsonl"]

    def reason(now: dict[str, Any] | None = None, **then: Any) -> str:
        return results._difference(HASHES | (now or {}), HASHES | {"files": files} | then, tmp_path, "localization")

    assert reason() == ""
    assert results._difference(HASHES, None, tmp_path, "quality") == "its metrics.json does not say what it was made of"
    assert reason(weights="x", data="y") == "the weights are others"
    assert reason(options={"seed": 2, "old": 5}, data="y") == (
        "evaluation.seed was 2 and is 1; evaluation.protocol was None and is 'ours'"
    )
    assert reason(options=HASHES["options"] | {"gone": 3}) == "", "an option that is gone changes nothing"
    assert reason(data="y").startswith("the held-out images, their captions or regions")
    assert reason({"compared": "x"}, compared="y").startswith("the held-out images, their captions or regions")
    unknown = reason({"compared": None}, compared="y"), reason({"compared": "x"}, compared=None)
    assert unknown == ("", ""), "what is not known cannot differ"
    assert reason({"compared": "x"}, compared="x") == ""
    assert reason(features="g") == "the extractor of features is another"
    assert reason({"features": None}, features="g") == reason(features=None) == ""
    copies = HASHES | {"files": {}}  # without features copies are looked for in fewer spaces
    assert results._difference(copies, copies | {"features": None}, tmp_path, "memorization").startswith(
        "the extractor"
    )
    assert results._difference(copies | {"features": None}, copies, tmp_path, "memorization") == ""
    (tmp_path / "maps.safetensors").write_text("2")
    assert reason() == f"files in {tmp_path} were changed or are missing"


def test_an_entry_takes_each_part_from_where_it_was_measured() -> None:
    cost = {"evaluation_seconds": 10.0, "localization_seconds": 7.0, "steps": 5}
    before = {"localization": {"a": 1}, "quality": None, "cost": cost, "size": 1}
    result = {
        "localization": {"a": 2}, "quality": {"b": 2}, "utility": {"c": 2}, "size": 2,
        "seconds": {"evaluation_seconds": 4.0, "localization_seconds": 3.0},
    }  # fmt: skip
    assert results._merged(before, result, ["quality", "utility"]) == {
        "localization": {"a": 1}, "quality": {"b": 2}, "utility": {"c": 2}, "size": 2,
        "cost": {"evaluation_seconds": 14.0, "localization_seconds": 7.0, "steps": 5},
    }  # fmt: skip
    assert results._merged(before, result, ["localization"]) == {
        "localization": {"a": 2}, "quality": None, "size": 2,
        "cost": {"evaluation_seconds": 14.0, "localization_seconds": 3.0, "steps": 5},
    }  # fmt: skip
    fresh = before | {"localization": None, "cost": {"steps": None}}
    assert results._merged(fresh, result, ["quality"])["cost"]["evaluation_seconds"] == 4.0
    without = before | {"cost": {"evaluation_seconds": None}}
    found = results._merged(without, result, ["quality"])["cost"]
    assert found == {"evaluation_seconds": 4.0, "localization_seconds": None}


def test_real_quality_is_that_of_an_earlier_launch_where_maps_alone_are_measured(tmp_path: Path) -> None:
    against = SimpleNamespace(quality="measured now")
    run, _ = run_of(tmp_path, evaluation=SimpleNamespace(parts=("localization",)), against=against)
    assert results._real_quality(run, is_kept=True) == "measured now"
    (tmp_path / "metrics.json").write_text('{"real": {"quality": {"fid": 1}}}')
    assert results._real_quality(run, is_kept=True) == {"fid": 1}
    assert results._real_quality(run, is_kept=False) == "measured now", "no arm has numbers that it goes with"
    run.evaluation.parts = ("localization", "quality")
    assert results._real_quality(run, is_kept=True) == "measured now"
    run.evaluation.parts = ("localization",)
    for torn in ("{", "{}", '{"real": 3}'):
        (tmp_path / "metrics.json").write_text(torn)
        assert results._real_quality(run, is_kept=True) == "measured now", torn


def test_the_metrics_of_a_run_say_what_they_rest_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(trained: float | None, evaluated: float, images: int, maps: int, drawn: int) -> dict[str, Any]:
        cost = {"train_seconds": trained, "evaluation_seconds": evaluated} | (
            {"training_images": images} if images else {}
        )
        located = {"word": {"images": maps}} if maps else None
        return {"localization": located, "quality": {"images": drawn} if drawn else None, "cost": cost}

    arms = {"base": entry(None, 4.04, 0, 9, 0), "a": entry(20.06, 5.0, 30, 7, 12), "b": entry(1.0, 6.0, 31, 0, 14)}

    class Paired:
        def __init__(self, *given: Any) -> None:
            asked.append(given)

        def paired(self, names: list[str], baselines: list[str]) -> Any:
            return {"names": names, "baselines": baselines}

    asked: list[Any] = []
    shown: list[str] = []
    monkeypatch.setattr(results, "provenance", lambda: {"commit": "abc"})
    monkeypatch.setattr(results, "settings_of_run", lambda config: {"all of": config.data.seed})
    monkeypatch.setattr(results, "peak_of_process_gb", lambda: 1.23456)
    monkeypatch.setattr(results, "Resampled", Paired)
    monkeypatch.setattr(results, "parse_metrics", lambda metrics: "parsed")
    monkeypatch.setattr(results, "write_report", lambda folder: folder / "report.html")
    monkeypatch.setattr(results, "terminal_table", lambda metrics: "the table")
    monkeypatch.setattr(results, "terminal_summary", lambda parsed: f"of {parsed}")
    monkeypatch.setattr(results, "_real_quality", lambda run, is_kept: {"fid": 1} if is_kept else None)
    config = SimpleNamespace(data=SimpleNamespace(seed=8))
    run, said = run_of(
        tmp_path, config=config, test=range(40), evaluation=FullEvaluation(bootstrap_samples=77, seed=9), compare_to=("a", "z"),
        seconds={"checks": 2.34}, console=SimpleNamespace(print=shown.append),
    )  # fmt: skip
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "cost.json").touch()
    results.finish(run, arms, "look")
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["arms"] == arms and found["real"] == {"quality": {"fid": 1}} and found["compare_to"] == ["a"]
    assert asked == [({3: tmp_path}, arms, 77)]
    assert found["paired"] == {"names": ["base", "a", "b"], "baselines": ["a"]}
    counts = {"training_images": 31, "held_out_images": 40, "localization_images": 9, "generated_images": 14}
    seconds = {"checks": 2.3, "base: evaluation": 4.0, "a: training": 20.1, "a: evaluation": 5.0, "b: training": 1.0}
    assert found["provenance"] == {
        "commit": "abc", "seeds": {"training": 3, "evaluation": 9, "data": 8}, "counts": counts | {"bootstrap_samples": 77},
        "seconds": seconds | {"b: evaluation": 6.0}, "peak_memory_gb": 1.235, "processes": 1, "config": {"all of": 8},
    }  # fmt: skip
    assert shown == ["the table"] and said[:2] == ["of parsed", f"a: {tmp_path / 'a'}"] and len(said) == 3
    assert said[2].startswith("report: ") and said[2].endswith("next: look")
    (tmp_path / "cost.json").touch()
    said.clear()
    results.finish(run, {"b": entry(1.0, 6.0, 0, 0, 0)}, "look")
    found = json.loads((tmp_path / "metrics.json").read_text())["provenance"]["counts"]
    assert (found["training_images"], found["localization_images"], found["generated_images"]) == (None, 0, 0)
    assert said[1] == f"b: {tmp_path}", "a single model is exported to the run folder itself"
    run.accelerator = SimpleNamespace(is_main_process=False)
    said.clear()
    results.finish(run, arms, "look")
    assert not said


def test_a_dry_run_of_an_evaluation_estimates_its_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 s of maps of 4 images, and 30 s of 6 images (2 of which are of one caption): 2 s and 5 s an image."""
    clock, asked = [0.0], {}
    model = SimpleNamespace(
        denoiser=torch.nn.Linear(9, 10), text_encoders=[torch.nn.Linear(1, 1), torch.nn.Linear(2, 2)]
    )

    def localization(model: Any, test: Any, few: Any, **shared: Any) -> None:
        asked["maps"] = few
        clock[0] += 8.0

    def quality(model: Any, test: Any, few: Any, **shared: Any) -> None:
        asked["images"] = (shared["resolution"], shared["features"], shared["real"], shared["arm_dir"].is_dir())
        clock[0] += 30.0

    monkeypatch.setattr(results, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(results, "load_model", lambda base, folder: asked.update(model=(base, folder)) or _Moves(model))
    monkeypatch.setattr(results, "fewer_bits", lambda *given: asked.update(bits=given[1:]))
    monkeypatch.setattr(
        results, "held_out", lambda *given, **more: asked.update(few=given[2]) or SimpleNamespace(real="r")
    )
    monkeypatch.setattr(results, "localization", localization)
    monkeypatch.setattr(results, "quality", quality)
    monkeypatch.setattr(results, "peak_memory_gb", lambda: 1.239)
    monkeypatch.setattr(results, "to_yaml", lambda config: "the options")
    evaluation = FullEvaluation(
        batch_size=4,
        localization_images=90,
        generated_images=20,
        diversity_captions=3,
        diversity_samples=2,
        dtype="bf16",
    )
    config = SimpleNamespace(base="the base", data=SimpleNamespace(resolution=64))
    run, said = run_of(tmp_path, config=config, evaluation=evaluation, test=range(50))
    results.dry_run_evaluation(run, "a run")
    few = {"localization_images": 4, "generated_images": 4, "diversity_captions": 1, "examples": 1}
    assert asked["few"] == asked["maps"] == evaluation.model_copy(update=few)
    assert asked["model"] == ("the base", "a run") and asked["bits"] == ("bf16", evaluation.quantization)
    assert asked["images"] == (64, None, "r", True)
    assert said[0] == "the options" and said[1] == (
        "denoiser 100 parameters, text encoder 8, none trainable; maps 2.00 s an image, generation 5.00 s an image, so "
        f"about {(2 * 50 + 5 * (20 + 6)) / 60:.1f} min a model; peak memory 1.24 GB\n"
        "dry run: the data and the base are fine; nothing was written"
    )
    run.test = range(2)
    clock[0] = 0.0
    results.dry_run_evaluation(run, None)
    assert "maps 4.00 s an image, generation 7.50 s an image" in said[-1], "of a split of two images"


class _Moves:
    def __init__(self, model: Any) -> None:
        self.model = model

    def to(self, device: torch.device) -> _Moves:
        return self

    def freeze(self) -> Any:
        return self.model


# --------------------------------------------------------------------------------------------------- at start


def test_a_keep_by_findings_needs_a_classifier_and_captions_that_differ(tmp_path: Path) -> None:
    validation = Listed([sample(f"{i}", "Edema.", ("edema", None)) for i in range(3)], WORDS)
    features = SimpleNamespace(findings=["edema"], name="a classifier")
    arms = [arm_of(tmp_path), arm_of(tmp_path, "other", keep="finding_auc")]
    evaluation = FullEvaluation(features="none")
    run, _ = run_of(tmp_path, *arms, validation=validation, features=None, evaluation=evaluation)
    with pytest.raises(
        UserError, match="keep is finding_auc, evaluation.features none, and evaluation.parts localization, "
    ):
        run_module._check_keep(run)
    run.features = SimpleNamespace(findings=[])
    with pytest.raises(UserError, match="no classifier of findings is loaded"):
        run_module._check_keep(run)
    run.features = features
    with pytest.raises(
        UserError, match=r"no finding of the classifier \(edema\) is in some and not in all of the first 3 val"
    ):
        run_module._check_keep(run)
    run.validation = Listed([sample("a", "Clear.")] * 2, WORDS)
    with pytest.raises(UserError, match="all of the first 2 validation captions; set keep to loss"):
        run_module._check_keep(run)
    run.validation = Listed([sample("a", "Edema.", ("edema", None)), sample("b", "Clear.")], WORDS)
    run_module._check_keep(run)
    run.arms.pop("other")
    run.features = None
    run_module._check_keep(run)


def test_priors_are_of_training_images_that_are_quick_to_open(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []

    def load(data: Any, split: str) -> str:
        opened.append((data, split))
        if data.root == "missing":
            raise UserError("the training split is empty\nmore")
        return "the images"

    monkeypatch.setattr(run_module, "load_dataset", load)
    folder = FolderData(root="there")
    assert run_module._prior_images(folder) == ("the images", "") and opened == [(folder, "train")]
    assert run_module._prior_images(FolderData(root="missing")) == (
        None, "there are no training images (the training split is empty)",
    )  # fmt: skip
    found, why = run_module._prior_images(MimicData(root="there"))
    assert found is None and why.startswith("with data.kind mimic evaluate.py opens no") and len(opened) == 2
    monkeypatch.setattr(run_module, "load_dataset", lambda data, split: (data.kind, split))
    assert run_module._prior_images(PhantomData()) == (("phantom", "train"), "")


def validation_of(arms: list[Arm], **options: Any) -> Any:
    trainer = TrainerConfig(tracker="none", **options.pop("trainer", {}))
    data = PhantomData(resolution=64, **{"validation_size": 2, **options})
    config: Any = SimpleNamespace(trainer_options=trainer, data=data)
    return run_module._load_validation(config, {arm.name: arm for arm in arms})


def test_validation_images_are_opened_where_something_looks_at_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = arm_of(tmp_path)
    gate = AttentionDistillationOptions(teacher="base", gate_reference="base")
    gated = arm_of(tmp_path, "gated", training=Training(text_encoder="full", method=gate))
    kept = arm_of(tmp_path, "kept", keep="word_auc")
    looks = {"validate_every_steps": 5}
    assert validation_of([plain]) is None and validation_of([], trainer=looks) is None
    assert len(validation_of([plain], trainer=looks)) == 2 and len(validation_of([gated], validation_size=8)) == 8
    for arms, who in (
        ([plain], "trainer.validate_every_steps"),
        ([plain, gated], "the gate of gated"),
        ([kept], "keep word_auc"),
    ):
        with pytest.raises(UserError, match=f"data.validation_size is 0, and {who} looks at validation images"):
            validation_of(arms, trainer=looks, validation_size=0)
    monkeypatch.setattr(run_module, "load_dataset", lambda data, split: Listed([sample("a", "Clear.")] * 1234, WORDS))
    assert len(validation_of([plain], trainer=looks)) == 1234, "the loss needs no region"
    with pytest.raises(UserError, match="the gate of gated needs validation images .* none of the 1,234 has one"):
        validation_of([kept, gated], trainer=looks)
    with pytest.raises(UserError, match="keep word_auc needs validation images"):
        validation_of([kept], trainer=looks)
    apart = [sample("a", "Edema.", ("edema", None)), sample("b", "Small effusion.", ("pleural effusion", None))]
    monkeypatch.setattr(run_module, "load_dataset", lambda data, split: Listed(apart, WORDS))
    with pytest.raises(UserError, match="the gate of gated compares .* no finding has a box or mask in two of the 2"):
        validation_of([kept, gated], trainer=looks)
    assert len(validation_of([kept], trainer=looks)) == 2
    twice = [*apart, sample("c", "Edema.", ("edema", None))]
    monkeypatch.setattr(run_module, "load_dataset", lambda data, split: Listed(twice, WORDS))
    assert len(validation_of([gated])) == 3


def test_references_that_are_no_arm_are_compared_with_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[Any] = []
    monkeypatch.setattr(run_module, "check_same_shape", lambda *given: compared.append(given))
    methods = [AttentionDistillationOptions(teacher=name) for name in ("base", "first", "a/b", "a/b")]
    arms = [arm_of(tmp_path, "first")]
    arms += [
        arm_of(tmp_path, f"arm{k}", training=Training(text_encoder="full", method=m)) for k, m in enumerate(methods)
    ]
    config = SimpleNamespace(base="the base")
    run, _ = run_of(tmp_path, *arms, config=config, base="the base", load=lambda name: f"model {name}")
    run_module._check_references(run, "the model")  # type: ignore[arg-type]
    assert compared == [("model a/b", "the model")]
    run.base = "a smaller one"
    run_module._check_references(run, "the model")  # type: ignore[arg-type]
    assert compared[1:] == [("model base", "the model"), ("model a/b", "the model")]


# ------------------------------------------------------------------------------------------------- shared work


def test_jobs_are_done_in_the_order_of_their_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    needs = {"c": ("b",), "a": (), "b": ("a", "elsewhere")}
    jobs = {name: sharing.Job(lambda name=name: done.append(name), wanted) for name, wanted in needs.items()}  # type: ignore[misc]
    run, said = run_of(tmp_path)
    sharing.share_out(run, jobs)
    assert done == ["a", "b", "c"] and not said
    run.accelerator = SimpleNamespace(num_processes=2)
    done.clear()
    sharing.share_out(run, jobs)
    assert done == ["c", "a", "b"], "all processes do the same, in order"


def test_a_job_that_another_process_is_at_is_waited_for_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    run, said = run_of(tmp_path)
    (tmp_path / sharing.LOCKS).mkdir()
    other = sharing.FileLock(tmp_path / sharing.LOCKS / "a", blocking=False)
    other.acquire()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            other.release()

    monkeypatch.setattr(sharing.time, "sleep", sleep)
    jobs = {"a": sharing.Job(lambda: done.append("a")), "b": sharing.Job(lambda: done.append("b"))}
    sharing.share_out(run, jobs)
    assert done == ["b", "a"] and said == ["waiting for a, which another process is at"] and waits == [2, 2]


def test_the_base_of_another_seed_is_copied_once(tmp_path: Path) -> None:
    for seed, has_base in ((1, False), (2, True), (3, True)):
        folder = tmp_path / "run" / f"seed-{seed}"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")
        if has_base:
            (folder / "base").mkdir()
            (folder / "base" / "metrics.json").write_text(str(seed))
    target = tmp_path / "run" / "seed-4" / "base"
    target.parent.mkdir()
    sharing.share_base([tmp_path / "run"], target)
    assert (target / "metrics.json").read_text() == "2" and not list(target.parent.glob(".*"))
    (target / "metrics.json").write_text("own")
    sharing.share_base([tmp_path / "run"], target)
    assert (target / "metrics.json").read_text() == "own"


def test_a_model_is_found_by_every_name_it_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "load_model", lambda *given: given)
    monkeypatch.setattr(run_module, "is_adapter", lambda path: path.name == "adapter.safetensors")
    for name in ("adapter.safetensors", "whole.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").touch()
    base, own = BaseConfig(name="org/base", revision="r1"), BaseConfig(name="smaller")
    config: Any = SimpleNamespace(base=base, dry_run=False)
    arm = arm_of(tmp_path)
    run = Run(
        config, tmp_path, Accelerator(), own, {"model": arm}, FullEvaluation(), None, PhantomDataset("test", 1, 0, 64),
        references={"whole": lambda: "the whole"},  # type: ignore[dict-item, return-value]
    )  # fmt: skip
    found: Any = run.load
    assert found("whole") == "the whole" and found("model") == (own, arm.folder)
    assert found("base") == found("org/base") == (base,)
    assert found(str(tmp_path / "run")) == (base, tmp_path / "run")
    assert found(str(tmp_path / "adapter.safetensors")) == (base, tmp_path / "adapter.safetensors")
    for name in ("org/other", str(tmp_path / "pipeline"), str(tmp_path / "whole.safetensors")):
        changed = {"name": name, "revision": None, "single_file_config": "org/base"}
        assert found(name) == (base.model_copy(update=changed),)
    config.base = base.model_copy(update={"single_file_config": "org/configs"})
    assert found("org/other")[0].single_file_config == "org/configs"
    config.dry_run = True
    assert found("model") == (own, None), "a dry run trains no teacher"


def test_a_derived_base_is_made_anew_or_refused_when_its_source_has_changed(tmp_path: Path) -> None:
    def derived() -> float:
        config: Any = SimpleNamespace(base=BaseConfig(name=str(base)), output_dir=str(out), dry_run=False)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(derive, "claim", lambda folder, config: None)
            with derive.derived_base(config, None, "smaller") as found:
                weight = next(iter(load_model(found).denoiser.parameters())).detach().double().norm()
        return float(weight)

    def scale(by: float) -> None:
        path = base / "unet/diffusion_pytorch_model.safetensors"
        save_file({name: by * value for name, value in load_file(path).items()}, path)

    base, out = save_tiny(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").touch()
    first = derived()
    written = (out / "smaller/model_index.json").stat().st_mtime_ns
    assert derived() == first and (out / "smaller/model_index.json").stat().st_mtime_ns == written
    scale(2.0)
    assert derived() == pytest.approx(2 * first), "no student was begun from it"
    (out / "model/state/step-00000001").mkdir(parents=True)
    assert derived() == pytest.approx(2 * first)
    scale(0.5)
    with pytest.raises(UserError, match=r"base has other weights than when \S+smaller was made from it"):
        derived()
    shutil.rmtree(out / "model")
    (out / "student").mkdir()
    (out / "student/cost.json").touch()
    with pytest.raises(UserError, match="has other weights"):
        derived()
    (out / "smaller" / derive.SOURCE).unlink()
    assert derived() == pytest.approx(2 * first), "of an earlier version, which did not say what it was made of"


def test_a_derived_base_keeps_the_layers_that_were_chosen(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    (layer, *_) = attention_layers(load_model(BaseConfig(name=str(base))).denoiser)
    chosen = {"layers": [layer], "timesteps": [100, 400]}
    (base / SUBSET_FILE).write_text(json.dumps(chosen))
    derive._write(BaseConfig(name=str(base)), None, tmp_path / "derived", lambda model: model)
    assert json.loads((tmp_path / "derived" / SUBSET_FILE).read_text()) == chosen
    (base / SUBSET_FILE).unlink()
    derive._write(BaseConfig(name=str(base)), None, tmp_path / "other", lambda model: model)
    assert not (tmp_path / "other" / SUBSET_FILE).exists() and (tmp_path / "other" / "model_index.json").exists()


def test_options_of_looks_are_without_those_that_change_none() -> None:
    names = set(EvaluationConfig.model_fields) | set(FullEvaluation.model_fields)
    assert set(train._NOT_OF_LOOKS) - names <= set(), "each is an option"
    assert DenoisingOptions().kind == "denoising"

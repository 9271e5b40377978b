"""Each recipe from the command line's words to its files, on tiny pipelines; and what a user is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from fitting import CHECKPOINT_FILES
from pair import in_two_processes
from PIL import Image
from recipe import recipe_module, refusal_of
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_sd

from distill import checkpoints
from distill.cli import parse
from distill.config import BaseConfig
from distill.data_config import CocoData
from distill.errors import UserError
from distill.evaluation import validation
from distill.experiment import results, sharing, train
from distill.experiment.folder import held
from distill.experiment.run import Run, _prior_images
from distill.methods import key_lock
from distill.methods.key_lock import Merged
from distill.models.adapters import parameter_counts
from distill.models.kohya import KOHYA_FILE
from distill.models.loading import LORA_FILE, load_model
from distill.report import figures, validate_metrics
from distill.report.document import escape_markdown
from distill.report.explanation import sentences

ROOT = Path(__file__).parents[1]
CLASSES = {
    "finetune": "FinetuneConfig",
    "distill_attention": "DistillAttentionConfig",
    "evaluate": "EvaluateConfig",
    "tradeoff": "TradeoffConfig",
}
TAUGHT = {"kind": "attention_distillation", "teacher": "frozen"}
LORA = {"denoiser": "lora", "lora": {"rank": 2}}
ARMS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "learnable": {"text_encoder": "full"},
    "key_locked": {"text_encoder": "full", "method": {"kind": "key_lock"}},
    "distilled": {"text_encoder": "full", "method": TAUGHT},
    "continued": {"text_encoder": "full", "method": TAUGHT | {"start_from_teacher": True}},
    "gated": {"text_encoder": "full", "method": TAUGHT | {"gate_reference": "learnable"}},
    "penalized": {"text_encoder": "full", "method": {"kind": "tail_penalty"}},
    "lora": {"denoiser": "lora", "text_encoder": "lora", "method": TAUGHT},
    "rali": {"text_encoder": "full", "denoising": {"insert_labels": "first"}},
    "rali_arm": {"like": "rali", "method": {"kind": "supervised_attention", "arm_weight": 0.12}},
    "supervised": {"text_encoder": "full", "method": {"kind": "supervised_attention", "region_token_weight": 0.01}},
}
PHANTOM = ["--data.resolution", "64", "--data.test_size", "6"]
EVALUATION = [
    "--evaluation.localization_images", "3", "--evaluation.generated_images", "3", "--evaluation.features", "none",
    "--evaluation.num_inference_steps", "2", "--evaluation.diversity_captions", "1", "--evaluation.timesteps", "300",
    "--evaluation.diversity_samples", "2", "--evaluation.examples", "1", "--evaluation.bootstrap_samples", "10",
]  # fmt: skip
TRAINER = [
    "--trainer.max_steps", "2", "--trainer.batch_size", "2", "--trainer.tracker", "none",
    "--trainer.log_every_steps", "1",
]  # fmt: skip
TRAINING = [*PHANTOM, "--data.train_size", "6", *TRAINER, *EVALUATION]
MAPS_ONLY = ["--evaluation.parts", "localization"]
"""For tests that look at no generated image."""
ARM_FILES = {
    "drawn.jsonl", "maps.safetensors", "metrics.json", "pairs.jsonl", "samples/0000.png", "scored.jsonl",
    "word_maps.safetensors",
}  # fmt: skip
RUN_FILES = {
    "config.yaml", "metrics.json", "report.html", "real/0000.png", "real/examples.jsonl", "real/priors.json",
    "real/mean_masks.safetensors",
}  # fmt: skip


SPLITS = ("train", "train", "test", "test")


TRAINED = ("train_log.jsonl", *(f"state/step-00000002/{name}" for name in CHECKPOINT_FILES))
"""Files of an arm that was trained for two steps."""


def arms_argv(*names: str, **more: dict[str, Any]) -> list[str]:
    """--arms of these names out of ARMS, and of more."""
    return ["--arms", json.dumps({name: ARMS[name] for name in names} | more)]


UNET_FILE = "diffusion_pytorch_model.safetensors"


def run(name: str, argv: list[str]) -> None:
    recipe = recipe_module(name)
    getattr(recipe, name)(parse(getattr(recipe, CLASSES[name]), argv))


def names_of_trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gets the name of each arm that is trained from now on."""
    names, fit = [], train.fit

    def counted(*args: Any, **kwargs: Any) -> Any:
        names.append(kwargs["label"])
        return fit(*args, **kwargs)

    monkeypatch.setattr(train, "fit", counted)
    return names


def refusal(name: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    recipe = recipe_module(name)
    return refusal_of(getattr(recipe, name), getattr(recipe, CLASSES[name]), argv, capsys)


def files_of(folder: Path) -> set[str]:
    """All but the locks and the features."""
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if not name.startswith(".locks/") and not name.endswith("features.safetensors")}


def arm_files(arm: str, *more: str) -> set[str]:
    return {f"{arm}/{name}" for name in (*ARM_FILES, *more)}


def read_metrics(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    validate_metrics(metrics)
    return metrics


def log_rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the bases sd, v and sdxl."""
    folder = tmp_path_factory.mktemp("recipes")
    for kind in ("sd", "v", "sdxl"):
        save_tiny(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def finetuned(work: Path) -> tuple[Path, list[str]]:
    """A finished run of finetune.py, and its command line: LoRA on the v-prediction U-Net and its text encoder."""
    argv = [
        "--base.name", str(work / "v"), "--text_encoder", "lora", "--lora.rank", "2", "--lora.alpha", "6",
        "--trainer.learning_rate", "1e-2", "--output_dir", str(work / "finetuned"),
        "--data.cache_dir", str(work / "cache"), *TRAINING,
    ]  # fmt: skip
    run("finetune", argv)
    return work / "finetuned", argv


@pytest.fixture(scope="module")
def captions_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("captions") / "data", "file_name,text", lambda i: f"Picture {i}.")


def make_folder(folder: Path, header: str, row: Callable[[int], str], count: int = 4) -> Path:
    folder.mkdir()
    lines = [header]
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (80, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{row(i)}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


# --- each recipe, end to end ----------------------------------------------------------------------------------------


def test_finetune_leaves_exactly_these_files(finetuned: tuple[Path, list[str]]) -> None:
    folder, _ = finetuned
    assert files_of(folder) == (
        RUN_FILES | {"README.md", "cost.json", LORA_FILE, KOHYA_FILE} | arm_files("base") | arm_files("model", *TRAINED)
    )
    metrics = read_metrics(folder)
    assert list(metrics["arms"]) == ["base", "model"]
    assert metrics["arms"]["base"]["cost"]["steps"] is None and metrics["arms"]["model"]["cost"]["steps"] == 2
    assert metrics["arms"]["base"]["localization"]["word"] != metrics["arms"]["model"]["localization"]["word"]
    origin = metrics["provenance"]
    assert origin["seeds"] == {"training": 0, "evaluation": 1234, "data": 0}
    assert origin["counts"]["training_images"] == origin["counts"]["held_out_images"] == 6
    assert origin["config"]["lora"]["alpha"] == 6 and origin["versions"]["diffusers"]
    rows = log_rows(folder / "model" / "train_log.jsonl")
    assert [row["step"] for row in rows] == [1, 2] and all(row["loss"] == row["denoising"] > 0 for row in rows)
    with safe_open(folder / LORA_FILE, "pt") as file:
        parts = {key.split(".")[0] for key in list(file.keys())}
    assert parts == {"unet", "text_encoder"}


def test_the_same_command_again_neither_trains_nor_evaluates(
    finetuned: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, argv = finetuned
    kept = [LORA_FILE, "cost.json", "model/train_log.jsonl", "model/metrics.json", "base/metrics.json", "config.yaml"]
    before = {name: ((folder / name).read_bytes(), (folder / name).stat().st_mtime_ns) for name in kept[:-1]}
    arms, config = read_metrics(folder)["arms"], (folder / "config.yaml").read_bytes()

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("must not run again")

    monkeypatch.setattr(train, "fit", never)
    monkeypatch.setattr(results, "evaluate", never)
    run("finetune", argv)
    assert {name: ((folder / name).read_bytes(), (folder / name).stat().st_mtime_ns) for name in before} == before
    assert read_metrics(folder)["arms"] == arms and (folder / "config.yaml").read_bytes() == config
    said = capsys.readouterr().out
    assert "model: already trained" in said and f"\nmodel: {folder}\n" in said and "\nbase: /" not in said


def test_another_configuration_in_the_same_folder_is_refused(
    finetuned: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, argv = finetuned
    before = {name: (folder / name).read_bytes() for name in files_of(folder)}
    message = refusal("finetune", [*argv, "--trainer.max_steps", "1", "--lora.rank", "4"], capsys)
    assert f"{folder} holds a run with other options" in message
    assert "  - lora.rank: 2 there, 4 now\n  - trainer.max_steps: 2 there, 1 now\n" in message
    assert {name: (folder / name).read_bytes() for name in files_of(folder)} == before


def test_evaluate_gives_the_numbers_that_the_training_run_gave(finetuned: tuple[Path, list[str]], work: Path) -> None:
    folder, _ = finetuned
    out = work / "evaluated"
    argv = ["--base.name", str(work / "v"), "--run", str(folder), "--output_dir", str(out), "--data.train_size", "6"]
    run("evaluate", [*argv, *PHANTOM, *EVALUATION])
    assert files_of(out) == RUN_FILES | arm_files("base") | arm_files("model")
    assert (folder / "README.md").read_text().count("**What is wrong.** ") == 1
    there, here = read_metrics(folder)["arms"], read_metrics(out)["arms"]
    for arm in ("base", "model"):
        assert here[arm]["quality"] == there[arm]["quality"]
        assert here[arm]["localization"] == there[arm]["localization"]
        assert here[arm]["localization"]["priors"]["mean_mask"]["training_images"] > 0, "of the training split's masks"
        assert here[arm]["cost"]["train_seconds"] is None
    for name in ("base/samples/0000.png", "model/samples/0000.png", "real/0000.png", "real/examples.jsonl"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_the_card_of_an_evaluated_run_says_what_betrays_its_images(
    finetuned: tuple[Path, list[str]], work: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(finetuned[0], tmp_path / "run")
    argv = ["--base.name", str(work / "v"), "--run", str(folder), "--output_dir", str(tmp_path / "out"), *PHANTOM]
    argv += [*EVALUATION, "--evaluation.parts", "explanation", "--data.train_size", "6"]
    argv += ["--data.test_size", "20", "--evaluation.generated_images", "10"]
    run("evaluate", argv)
    said = [json.loads((tmp_path / f"out/{arm}/explain.json").read_text())["comparisons"] for arm in ("base", "model")]
    betrays = [escape_markdown(" ".join(sentences(comparisons))) for comparisons in said]
    assert betrays[0] != betrays[1]
    assert f"**What tells its images from real ones.** {betrays[1]}\n\nLimits" in (folder / "README.md").read_text()


def test_evaluate_without_training_images_says_what_it_does_not_measure(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(tmp_path / "data", "file_name,text,finding,box", lambda i: f'Edema {i}.,edema,"8,8,20,20"')
    argv = ["--base.name", str(work / "v"), "--output_dir", str(tmp_path / "out"), "--evaluation.parts", "localization"]
    argv += ["--data.kind", "folder", "--data.root", str(data), "--data.resolution", "64", *FOLDER_COLUMNS, *EVALUATION]
    run("evaluate", [*argv, "--data.test_split", "all"])
    said = capsys.readouterr().out
    assert "the mean training mask and the AUC within the prior are not measured: there are no training images" in said
    assert read_metrics(tmp_path / "out")["arms"]["base"]["localization"]["priors"]["mean_mask"] is None
    found, why = _prior_images(CocoData(root=str(data)))
    assert found is None and "with data.kind coco evaluate.py opens no training images" in why


def test_distill_attention_learns_from_a_run_folder(finetuned: tuple[Path, list[str]], work: Path) -> None:
    teacher, out = finetuned[0], work / "distilled"
    argv = [
        "--base.name", str(work / "v"), "--method.teacher", str(teacher), "--output_dir", str(out),
        "--data.cache_dir", str(work / "cache"), *TRAINING,
    ]  # fmt: skip
    run("distill_attention", argv)
    assert files_of(out) == (
        RUN_FILES
        | {"README.md", "cost.json", LORA_FILE, KOHYA_FILE}
        | arm_files("base")
        | arm_files("teacher")
        | arm_files("model", *TRAINED)
    )
    arms = read_metrics(out)["arms"]
    assert list(arms) == ["base", "teacher", "model"]
    assert arms["teacher"]["localization"] == read_metrics(teacher)["arms"]["model"]["localization"]
    for row in log_rows(out / "model" / "train_log.jsonl"):
        terms = [row[name] for name in ("denoising", "token_kl", "place_kl", "mass")]
        assert row["loss"] == pytest.approx(terms[0] + 0.1 * sum(terms[1:]), rel=1e-5) and min(terms) > 0


@pytest.fixture(scope="module")
def traded(work: Path) -> tuple[Path, list[str], str]:
    """A finished run of tradeoff.py under accelerate launch, its command line, and what it printed."""
    argv = [
        "--base.name", str(work / "sd"), *arms_argv("frozen", "lora"), "--output_dir", str(work / "traded"),
        "--data.cache_dir", str(work / "cache"), *TRAINING,
    ]  # fmt: skip
    launch = ["--quiet", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launch, str(ROOT / "recipes" / "tradeoff.py"), *argv],
        cwd=work,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return work / "traded", argv, done.stdout


def test_tradeoff_under_accelerate_launch_ends_with_the_table_the_paths_and_the_next_command(
    traded: tuple[Path, list[str], str],
) -> None:
    folder, _, printed = traded
    text_encoder_frozen = {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    assert files_of(folder) == (
        RUN_FILES
        | arm_files("base")
        | arm_files("frozen", *TRAINED, "cost.json", "README.md", *text_encoder_frozen)
        | arm_files("lora", *TRAINED, "cost.json", "README.md", LORA_FILE, KOHYA_FILE)
    )
    metrics = read_metrics(folder)
    assert list(metrics["arms"]) == ["base", "frozen", "lora"] and metrics["real"]["quality"]["images"] == 3
    assert "token_kl" in log_rows(folder / "lora/train_log.jsonl")[0]
    assert "token_kl" not in log_rows(folder / "frozen/train_log.jsonl")[0]
    for expected in ("lora: " + str(folder / "lora"), "report: ", "next: open ", "frozen"):
        assert expected in printed
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert 'src="http' not in html and "<link" not in html


def test_tradeoff_continues_with_the_arm_that_is_missing(
    traded: tuple[Path, list[str], str], work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, argv, _ = traded
    before = {name: (folder / name).read_bytes() for name in files_of(folder) if name.startswith("frozen/")}
    log = [{k: v for k, v in row.items() if k != "seconds"} for row in log_rows(folder / "lora/train_log.jsonl")]
    words = read_metrics(folder)["arms"]["lora"]["localization"]["word"]
    shutil.rmtree(folder / "lora")
    trained = names_of_trained(monkeypatch)
    run("tradeoff", argv)
    assert trained == ["lora"]
    assert {name: (folder / name).read_bytes() for name in before} == before
    # Same seed, other process: the same training and the same numbers.
    again = [{k: v for k, v in row.items() if k != "seconds"} for row in log_rows(folder / "lora/train_log.jsonl")]
    assert [row.keys() for row in again] == [row.keys() for row in log]
    for ours, theirs in zip(again, log, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7)  # a KL this small is fp32 rounding
    word = read_metrics(folder)["arms"]["lora"]["localization"]["word"]
    assert word["auc"] == pytest.approx(words["auc"], abs=1e-4), "two pixels that change places are about 1e-6"
    assert (word["images"], word["pairs"]) == (words["images"], words["pairs"])


def test_arms_like_others_have_options_of_their_own(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("distill.methods.tail_penalty.IMAGES", 8)
    base = {"like": "frozen", "text_encoder": "full"}
    variants: dict[str, dict[str, Any]] = {
        "lora": ARMS["lora"] | LORA,
        "mass": base | {"method": TAUGHT | {"token_kl_weight": 0, "place_kl_weight": 0}},
        "rank_3": {"like": "lora", "lora": {"rank": 3, "alpha": 6.0}, "max_steps": 1},
        "tail.2": base | {"method": {"kind": "tail_penalty", "weight": 2.0}},
        "fast": {"like": "frozen", "learning_rate": 1e-2},
    }
    argv = ["--base.name", str(work / "sd"), "--output_dir", str(out), *arms_argv("frozen", **variants), *TRAINING]
    run("tradeoff", [*argv, *MAPS_ONLY, "--data.cache_dir", str(work / "cache")])
    assert list(read_metrics(out)["arms"]) == ["base", "frozen", *variants]
    terms = {name: log_rows(out / name / "train_log.jsonl")[-1] for name in variants}
    taught = {name: row["loss"] - row["denoising"] for name, row in terms.items()}
    assert taught["mass"] == pytest.approx(0.1 * terms["mass"]["mass"], abs=1e-6)
    everything = sum(terms["lora"][name] for name in ("mass", "token_kl", "place_kl"))
    assert taught["lora"] == pytest.approx(0.1 * everything, abs=1e-6)
    assert taught["tail.2"] == pytest.approx(2 * terms["tail.2"]["tail"], abs=1e-6)
    assert terms["fast"]["lr"] == 1e-2
    passes = {
        name: json.loads((out / name / "cost.json").read_text()) for name in ("frozen", "lora", "rank_3", "tail.2")
    }
    own, whole = ({n: c[f"image_passes{k}"] for n, c in passes.items()} for k in ("", "_with_teachers"))
    assert own == {"frozen": 12, "lora": 16, "rank_3": 8, "tail.2": 12 + 8}, "two steps of two images, or one"
    assert whole == own | {"lora": 16 + 12, "rank_3": 8 + 12}
    assert read_metrics(out)["arms"]["lora"]["cost"]["image_passes_with_teachers"] == 28
    costs = {name: json.loads((out / name / "cost.json").read_text()) for name in ("lora", "rank_3", "mass")}
    assert [costs[name]["steps"] for name in costs] == [2, 1, 2]
    assert costs["rank_3"]["trainable_parameters"] == costs["lora"]["trainable_parameters"] * 3 // 2
    settings = json.loads((out / "rank_3" / "metrics.json").read_text(encoding="utf-8"))["settings"]
    assert settings["lora"]["rank"] == 3 and settings["trainer"]["max_steps"] == 1
    assert settings["method"]["teacher"] == "frozen"
    loaded = load_model(BaseConfig(name=str(work / "sd")), run=out / "rank_3")
    scales = {m.scaling["default"] for m in loaded.denoiser.modules() if hasattr(m, "scaling")}
    assert scales == {2.0}, "alpha / rank of the arm"


def test_what_an_arm_needs_is_looked_for_at_start(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--base.name", str(work / "sd"), "--output_dir", str(tmp_path / "run"), *TRAINING]
    frozen_lora = LORA | {"lora": {"rank": 4}}
    gated = {"text_encoder": "full", "method": TAUGHT | {"gate_reference": str(tmp_path / "nowhere")}}
    dropped = {"denoising": {"caption_dropout": 0.5, "caption_dropout_label": "nodule"}}
    for arms, expected in (
        ({"a": gated}, "nowhere"),
        ({"a": dropped}, "no training image has that label"),
        ({"a": dropped}, "'no finding' for images"),
        ({"a": ARMS["continued"] | LORA, "frozen": frozen_lora}, "a: it starts from the adapters of frozen"),
        ({"a": ARMS["continued"] | LORA}, "a: it trains adapters of the base, and can start only from adapters"),
        (
            {"a": ARMS["continued"] | {"text_encoder": "frozen"}, "frozen": {"text_encoder": "full"}},
            "a: it starts from frozen, whose text_encoder is full, and its own is frozen; set text_encoder to full",
        ),
        ({"a": ARMS["continued"], "frozen": frozen_lora}, "whose denoiser is lora, and its own is full"),
        (
            {"a": {"text_encoder": "full", "method": TAUGHT | {"begin_after_steps": 2}}},
            "a: method.begin_after_steps is 2, and it trains for 2 steps, so that this never ends or begins; at most 1",
        ),
        (
            {"a": {"text_encoder": "full", "text_encoder_steps": 3}},
            "a: text_encoder_steps is 3, and it trains for 2 steps",
        ),
        (
            {"a": {"text_encoder": "full", "method": {"kind": "key_lock", "release_after_steps": 2}}},
            "a: method.release_after_steps is 2, and it trains for 2",
        ),
        (
            {"a": ARMS["lora"] | {"lora": {"denoiser_targets": ["to_nothing"]}}},
            "lora.denoiser_targets: to_nothing match",
        ),
        ({"a": {"text_encoder": "frozen", "method": {"kind": "key_lock"}}}, "a: method key_lock locks keys"),
        ({"a": {"text_encoder": "full", "method": {"kind": "attention_distillation"}}}, "a: method.teacher is missing"),
        ({"a": ARMS["lora"] | {"method": TAUGHT | {"teacher": "frozn"}}}, "did you mean 'frozen'?"),
    ):
        assert expected in refusal("tradeoff", [*argv, *arms_argv(**({"frozen": ARMS["frozen"]} | arms))], capsys)
        assert not (tmp_path / "run").exists()
    looked_into = {"text_encoder": "full", "method": TAUGHT | {"self_attention_weight": 1.0}}
    compiled = [*arms_argv(frozen=ARMS["frozen"], a=looked_into), "--trainer.compile", "true"]
    assert "a: trainer.compile: method.self_attention_weight looks into" in refusal(
        "tradeoff", [*argv, *compiled], capsys
    )
    none = ["--data.validation_size", "0", *arms_argv("frozen", "learnable", "gated")]
    assert "data.validation_size is 0, and the gate of gated looks" in refusal("tradeoff", [*argv, *none], capsys)
    assert "arms is empty; name at least one" in refusal("tradeoff", argv, capsys)
    assert not (tmp_path / "run").exists()


def test_arms_that_cannot_be_read_are_refused_in_one_message(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms: dict[str, Any] = {
        "a": {"trainer": {"batch_size": 3}},
        "b": {"method": {"kind": "denoising", "mass_weight": 1}},
        "c": {"method": {"kind": "tail_penalty", "wait": 1}},
        "d": {"method": {"kind": "tail_penalty", "weight": -1}},
        "e": {"lora": {"rank": 2}},
        "f": {"method": {"kind": "distillation"}},
        "g": {"denoising": {"paraphrases": {"edema": ["x"]}}},
        "h": {"text_encoder": "frozen", "text_encoder_steps": 2},
        "i": {"denoiser": "frozen", "text_encoder": "full", "text_encoder_steps": 2},
    }
    argv = ["--base.name", str(work / "sd"), "--output_dir", str(tmp_path / "run"), *TRAINING, *arms_argv(**arms)]
    message = refusal("tradeoff", argv, capsys)
    for expected in (
        "arms.a.trainer",
        "arms.b.method.mass_weight (from the command line): an option of arms.b.method.kind attention_distillation",
        "arms.c.method.wait; did you mean arms.c.method.weight?",
        "arms.d.method.weight: expected a number above 0, got -1",
        "arms.e: lora options are set, and nothing is trained by LoRA",
        "arms.f.method.kind: expected one of denoising, attention_distillation",
        "arms.g.denoising: paraphrases are given, and training_text is not paraphrases",
        "arms.h: text_encoder_steps is set, and text_encoder is frozen; train both parts",
        "arms.i: text_encoder_steps is set, and denoiser is frozen; train both parts",
    ):
        assert expected in message, expected
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "names",
    [
        ("frozen", "learnable", "gated"),
        pytest.param(
            ("frozen", "learnable", "distilled", "penalized", "gated", "lora", "rali", "rali_arm", "supervised"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["few", "all"],
)
def test_seeds_are_trained_evaluated_and_compared_in_one_report(
    names: tuple[str, ...], work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arms with the denoiser by LoRA: a seed of a command of its own, and one or two more into the same folder, which
    train only their own."""
    monkeypatch.setattr(validation, "IMAGES", 2)
    monkeypatch.setattr(validation, "DRAWN", 2)
    monkeypatch.setattr(figures, "curve_charts", lambda *_: [])  # sixty of them take as long as all else
    gated = ARMS["gated"] | {"method": ARMS["gated"]["method"] | {"gate_images": 4}}
    own = ARMS | {"gated": gated, "rali_arm": {k: v for k, v in ARMS["rali_arm"].items() if k != "like"} | ARMS["rali"]}
    arms = {name: own[name] | LORA for name in names}
    training = list(TRAINING)
    training[training.index("--evaluation.features") + 1] = "phantom"
    argv = [
        "--base.name", str(work / "sd"), *arms_argv(**arms), "--compare_to", "[frozen,learnable]",
        "--trainer.validate_every_steps", "1", "--data.validation_size", "4",
        "--data.cache_dir", str(work / "cache"), "--output_dir", str(tmp_path / "run"), *training,
    ]  # fmt: skip
    folder, seeds = tmp_path / "run", (7, 0) if len(names) == 3 else (7, 0, 1)
    trained = names_of_trained(monkeypatch)
    run("tradeoff", [*argv, "--seeds", "[7]", "--output_dir", str(folder / "seed-7")])
    assert trained == list(names)
    run("tradeoff", [*argv, "--seeds", json.dumps(seeds)])
    assert trained == list(names) * len(seeds), "a seed that is there is read"
    metrics = read_metrics(folder)
    assert list(metrics["arms"]) == ["base", *names] and metrics["compare_to"] == ["frozen", "learnable"]
    assert {"learnable - frozen", *(f"{n} - {o}" for n in names[2:] for o in names[:2])} == set(metrics["paired"])
    assert metrics["provenance"]["seeds"]["training"] == sorted(seeds)
    each = [read_metrics(folder / f"seed-{seed}")["arms"] for seed in seeds]
    for name in names:
        values = [found[name]["localization"]["word"]["auc"] for found in each]
        assert metrics["arms"][name]["localization"]["word"]["auc"] == pytest.approx(np.mean(values))
        gap = [
            found[name]["localization"]["word"]["auc"] - found["frozen"]["localization"]["word"]["auc"]
            for found in each
        ]
        if name != "frozen":
            assert metrics["paired"][f"{name} - frozen"]["word.auc"]["value"] == pytest.approx(np.mean(gap))
    for terms, name in (
        ({"token_kl", "place_kl", "mass"}, "distilled"),
        ({"arm"}, "rali_arm"),
        ({"tail"}, "penalized"),
        ({"region_token"}, "supervised"),
    ):
        if name not in names:
            continue
        assert terms <= set(log_rows(folder / f"seed-0/{name}/train_log.jsonl")[0])
    gate = json.loads((folder / "seed-0/gated/gate.json").read_text(encoding="utf-8"))
    better = [
        n
        for n, groups in gate["image_adds"]["teacher"].items()
        if groups["words"] >= gate["image_adds"]["reference"][n]["words"]
    ]
    assert gate["layers"] == better and set(gate["groups"]) <= {"words", "eos", "padding"}
    looks = log_rows(folder / "seed-0/gated/validation_log.jsonl")
    assert [row["step"] for row in looks] == [1, 2]
    assert (folder / "report.html").exists() and (folder / "seed-0/report.html").exists()


def test_locked_keys_are_merged_into_stock_weights(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--base.name", str(work / "sd"), "--data.cache_dir", str(work / "cache"), *TRAINING]
    out = tmp_path / "run"
    run("tradeoff", [*argv, *arms_argv("frozen", "key_locked"), "--output_dir", str(out)])
    r2 = json.loads((out / "key_locked/key_lock.json").read_text(encoding="utf-8"))["r2"]
    assert min(r2.values()) > 0.9  # two steps change little
    assert set(read_metrics(out)["arms"]) == {"base", "frozen", "key_locked"}
    base = load_model(BaseConfig(name=str(work / "sd")))
    trained = load_model(BaseConfig(name=str(work / "sd")), run=out / "key_locked")
    for ours, theirs in ((trained.denoiser, base.denoiser), (trained.text_encoders[0], base.text_encoders[0])):
        assert parameter_counts(ours)[0] == parameter_counts(theirs)[0]
        assert any(not torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    locked = ["--text_encoder", "lora", "--method.kind", "key_lock", "--lora.rank", "2", *argv]
    no_keys = [*locked, "--lora.denoiser_targets", "[to_q,to_v]", "--output_dir", str(tmp_path / "refused")]
    assert "lora.denoiser_targets must hold to_k" in refusal("finetune", no_keys, capsys)
    frozen = ["--denoiser", "full", "--method.kind", "key_lock", *argv, "--output_dir", str(tmp_path / "refused")]
    assert "set text_encoder to full or lora" in refusal("finetune", frozen, capsys)
    assert not (tmp_path / "refused").exists()
    run("finetune", [*locked, "--dry_run", "true", "--output_dir", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()
    run("finetune", [*locked, "--output_dir", str(tmp_path / "lora")])
    assert "model: the locked keys are merged into the weights" in capsys.readouterr().out
    weights = load_file(tmp_path / "lora" / LORA_FILE)
    down = {key: len(weight) for key, weight in weights.items() if "attn2" in key and key.endswith("lora.down.weight")}
    ranks = {key.split(".attn2.")[1].removesuffix(".lora.down.weight"): rank for key, rank in down.items()}
    assert ranks == {"to_q": 2, "to_k": 4, "to_v": 2, "to_out.0": 2}


def test_locked_keys_in_half_precision_and_a_merge_that_is_worse_than_none(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that keys see in bf16, beside a trained encoder in fp32, under autocast; and what a failed merge says."""
    merge = key_lock.merge_keys

    def worse_than_none(*arguments: Any, **options: Any) -> Merged:
        merged = merge(*arguments, **options)
        assert min(merged.r2.values()) > 0.9
        return Merged(merged.r2 | {"eos": 0.2}, merged.r2_unmerged | {"eos": 0.3})

    monkeypatch.setattr(key_lock, "merge_keys", worse_than_none)
    argv = ["--base.name", str(work / "sd"), "--data.cache_dir", str(work / "cache"), *TRAINING, "--denoiser", "full"]
    argv += [
        "--text_encoder",
        "full",
        "--method.kind",
        "key_lock",
        "--method.locked_tokens",
        "all",
        "--base.frozen_dtype",
        "bf16",
        "--seed",
        "3",
    ]
    run("finetune", [*argv, "--trainer.mixed_precision", "bf16", "--output_dir", str(tmp_path / "half")])
    assert "for eos the merge is worse than none" in capsys.readouterr().out
    assert json.loads((tmp_path / "half/model/key_lock.json").read_text(encoding="utf-8"))["r2"]["eos"] == 0.2
    encoder = load_model(BaseConfig(name=str(work / "sd")), run=tmp_path / "half").text_encoders[0]
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())


def test_a_student_continues_from_its_teacher(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At its first step it is its teacher, so that the maps differ by nothing; at its second they differ."""
    argv = ["--base.name", str(work / "sd"), "--data.cache_dir", str(work / "cache"), *TRAINING, *MAPS_ONLY]
    run("tradeoff", [*argv, *arms_argv("frozen", "continued"), "--output_dir", str(tmp_path / "run")])
    first, second = log_rows(tmp_path / "run/continued/train_log.jsonl")
    assert max(first[name] for name in ("token_kl", "place_kl", "mass")) < 1e-6 < second["place_kl"]
    trained, teacher = (load_file(tmp_path / f"run/{arm}/unet/{UNET_FILE}") for arm in ("continued", "frozen"))
    base = load_file(work / "sd/unet" / UNET_FILE)
    gap = [sum(float((a[k] - b[k]).abs().sum()) for k in a) for a, b in ((trained, teacher), (trained, base))]
    assert 0 < gap[0] < gap[1]
    tiny_sd(seed=1).save_pretrained(tmp_path / "teacher")
    other = ["--base.name", str(work / "sd"), "--method.teacher", str(tmp_path / "teacher")]
    other += ["--method.start_from_teacher", "true", "--denoiser", "full", "--text_encoder", "frozen"]
    message = refusal("distill_attention", [*other, *TRAINING, "--output_dir", str(tmp_path / "other")], capsys)
    assert "is not the base's, and does not train it in full" in message
    tiny_sd("v_prediction").save_pretrained(tmp_path / "v")
    other[3] = str(tmp_path / "v")
    message = refusal("distill_attention", [*other, *TRAINING, "--output_dir", str(tmp_path / "v-other")], capsys)
    assert "predicts v_prediction, and the base predicts epsilon" in message
    out = tmp_path / "adapters"
    arms = arms_argv(frozen=LORA, continued=ARMS["continued"] | LORA)
    run("tradeoff", [*argv, *arms, "--output_dir", str(out)])
    first, second = log_rows(out / "continued/train_log.jsonl")
    assert max(first[name] for name in ("token_kl", "place_kl", "mass")) < 1e-6 < second["place_kl"]
    assert (out / "continued" / LORA_FILE).exists() and not (out / "continued" / "unet").exists()
    full = ["--base.name", str(work / "sd"), "--method.teacher", str(out / "frozen"), "--denoiser", "full", *TRAINING]
    full += ["--method.start_from_teacher", "true", "--text_encoder", "frozen", "--output_dir", str(tmp_path / "full")]
    assert "has an adapter on its denoiser, and this arm has denoiser full" in refusal(
        "distill_attention", full, capsys
    )


def test_processes_that_share_a_folder_share_its_arms(tmp_path: Path) -> None:
    """A job that another process is at is left to it, one whose needs are not met waits, and each is done or read
    once."""
    script = (
        "import sys, time; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]):\n    print('held', flush=True); time.sleep(3)"
    )
    (tmp_path / ".locks").mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / ".locks" / "frozen")], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    done: list[str] = []
    nothing: Any = None
    with held(tmp_path / "alone"):  # an arm may have any name, `run` too
        alone = Run(nothing, tmp_path / "alone", Accelerator(), BaseConfig(), {}, nothing, None, nothing)
        sharing.share_out(alone, {"run": sharing.Job(partial(done.append, "run"))})
    assert done.pop() == "run"
    here = Run(nothing, tmp_path, Accelerator(), BaseConfig(), {}, nothing, None, nothing, console=Console(quiet=True))
    jobs = {name: partial(done.append, name) for name in ("frozen", "learnable", "distilled")}
    sharing.share_out(
        here, {name: sharing.Job(call, ["frozen"] if name == "distilled" else []) for name, call in jobs.items()}
    )
    assert done == ["learnable", "frozen", "distilled"] and other.wait() == 0


def test_every_trainer_option_at_once_on_sdxl(work: Path) -> None:
    out = work / "options"
    argv = [
        "--base.name", str(work / "sdxl"), "--base.frozen_dtype", "bf16", "--denoiser", "full",
        "--trainer.sample_every_steps", "2", "--trainer.checkpoint_every_steps", "1", "--trainer.ema_decay", "0.9",
        "--trainer.gradient_accumulation_steps", "2", "--trainer.gradient_checkpointing", "true",
        "--trainer.cache_text_embeddings", "true", "--trainer.warmup_steps", "1", "--trainer.lr_schedule", "cosine",
        "--denoising.min_snr_gamma", "5", "--output_dir", str(out), "--data.cache_dir", str(work / "cache"), *TRAINING,
    ]  # fmt: skip
    run("finetune", argv)
    assert files_of(out) == (
        RUN_FILES
        | {"README.md", "cost.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
        | arm_files("base")
        | arm_files("model", *TRAINED, "progress/step-000002.png")
    )
    assert Image.open(out / "model/progress/step-000002.png").size == (64, 64)


def test_sample_images_of_a_half_precision_base_with_adapters(work: Path) -> None:
    out = work / "half"
    argv = [
        "--base.name", str(work / "sd"), "--base.frozen_dtype", "bf16", "--text_encoder", "lora",
        "--trainer.sample_every_steps", "2", "--output_dir", str(out), "--data.cache_dir", str(work / "cache"),
        *TRAINING,
    ]  # fmt: skip
    run("finetune", argv)
    assert (out / "model/progress/step-000002.png").exists()


def test_a_folder_of_captioned_images_without_boxes_is_enough(
    captions_only: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = work / "captions_only"
    argv = [
        "--base.name", str(work / "sd"), "--data.kind", "folder", "--data.root", str(captions_only),
        "--data.resolution", "64", "--output_dir", str(out), "--data.cache_dir", str(work / "cache"), *TRAINER,
        *EVALUATION,
    ]  # fmt: skip
    run("finetune", argv)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "metadata.csv: 4 images, 2 train, 1 validation, 1 test (no column of splits: split by the hash of file); "
        "columns file_name, text; findings: none; train: 2 captions of 2 images, "
        "no boxes or masks (no column of metadata.csv is read as boxes or masks: name one by data.box_column or "
        "data.mask_column)"
    )
    metrics = read_metrics(out)
    assert metrics["arms"]["model"]["localization"] is None
    assert 0 < metrics["arms"]["model"]["quality"]["diversity"] <= 1
    assert "model/samples/0000.png" in files_of(out) and "model/maps.safetensors" not in files_of(out)
    assert (out / "report.html").exists()


def test_the_first_line_says_how_many_captions_are_cut(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_folder(tmp_path / "data", "file_name,text,split", lambda i: f"{'w ' * 80 * (i != 1)}{i},{SPLITS[i]}")
    argv = ["--base.name", str(work / "sd"), *folder_argv(data), "--output_dir", str(tmp_path / "run"), "--dry_run"]
    run("finetune", [*argv, "--data.truncate_captions", "true"])
    first, second = capsys.readouterr().out.splitlines()[:2]
    cut = "captions are cut at the 77 tokens that the text encoder reads (the longest has 83; base.caption_chunks reads more)"
    assert first.startswith("metadata.csv: 4 images, 2 train, 0 validation, 2 test;")
    assert first.endswith(f", 1 of 2 {cut}") and second.endswith(f", 2 of 2 {cut}") and second.startswith("test: 2 ")


# --- dry runs -------------------------------------------------------------------------------------------------------


def _dry_run(rank: int, name: str, argv: list[str], folder: str) -> None:
    os.chdir(folder)
    run(name, argv)


@pytest.mark.parametrize("name", ["evaluate", "finetune"])
def test_two_processes_end_a_dry_run_together(
    name: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, scratch = tmp_path / "here", tmp_path / "scratch"
    here.mkdir()
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    argv = ["--base.name", str(work / "sd"), "--output_dir", "run", "--dry_run", "true", *PHANTOM, *EVALUATION]
    argv += [] if name == "evaluate" else ["--data.train_size", "6", "--trainer.batch_size", "2"]
    in_two_processes(_dry_run, name, argv, str(here))
    assert [*here.iterdir(), *scratch.iterdir()] == []


@pytest.mark.parametrize("name", CLASSES)
def test_a_dry_run_prints_counts_and_estimates_and_writes_nothing(
    name: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the default tracker, which would write, and with the default cache folder, which is relative."""
    monkeypatch.chdir(tmp_path)
    argv = ["--base.name", str(work / "sd"), "--output_dir", "run", "--dry_run", "true", *PHANTOM, *EVALUATION]
    if name != "evaluate":
        argv += ["--data.train_size", "6", "--trainer.max_steps", "300", "--trainer.batch_size", "2"]
    if name == "distill_attention":
        argv += ["--method.teacher", str(work / "v")]
    if name == "tradeoff":
        argv += arms_argv("frozen", "distilled", "lora")
    run(name, argv)
    assert list(tmp_path.iterdir()) == []
    printed = capsys.readouterr().out
    model = load_model(BaseConfig(name=str(work / "sd")))
    unet, text = (parameter_counts(m)[0] for m in (model.denoiser, model.text_encoders[0]))
    assert f"num_inference_steps: {2}" in printed and "dry run: the data and the base are fine" in printed
    assert "peak memory" in printed and " min" in printed
    if name == "evaluate":
        assert f"denoiser {unet:,} parameters, text encoder {text:,}, none trainable" in printed
        assert "without what is computed for" not in printed and "maps 0.00 s" not in printed
        argv = [*argv, "--evaluation.parts", "quality,memorization", "--data.train_size", "6"]
        run(name, argv)
        printed = capsys.readouterr().out
        assert "maps 0.00 s an image" in printed and "generation 0.00 s" not in printed
        assert "min a model, without what is computed for memorization; peak" in printed
        return
    assert "300 steps take about" in printed
    if name == "tradeoff":
        assert (
            f"frozen: denoiser {unet:,} parameters ({unet:,} trainable), text encoder {text:,} (0 trainable)" in printed
        )
        assert (
            f"distilled: denoiser {unet:,} parameters ({unet:,} trainable), text encoder {text:,} ({text:,}" in printed
        )
    arm = "lora" if name == "tradeoff" else "model"
    # Rank 8. A transformer block of width w has six projections from w to w and two from the text's 16 to w; each of
    # the two layers of the text encoder has four from 16 to 16.
    blocks = [m for m in model.denoiser.modules() if type(m).__name__ == "BasicTransformerBlock"]
    lora_unet = sum(8 * (6 * 2 * w + 2 * (16 + w)) for w in (block.attn1.to_q.in_features for block in blocks))
    lora_text = 0 if name == "finetune" else 2 * 4 * 8 * (16 + 16)
    assert f"{arm}: denoiser {unet + lora_unet:,} parameters ({lora_unet:,} trainable)" in printed
    assert f"text encoder {text + lora_text:,} ({lora_text:,} trainable)" in printed


# --- what a user is told --------------------------------------------------------------------------------------------

FOLDER_COLUMNS = ["--data.finding_column", "finding", "--data.box_column", "box"]


def no_such_base(work: Path, tmp: Path) -> list[str]:
    return ["--base.name", str(tmp / "nowhere"), *TRAINING]


def no_data_folder(work: Path, tmp: Path) -> list[str]:
    return ["--data.kind", "folder", "--data.root", str(tmp / "nowhere"), "--data.resolution", "64", *TRAINER]


def odd_resolution(work: Path, tmp: Path) -> list[str]:
    return [*TRAINING, "--data.resolution", "100", "--evaluation.timesteps", "100,1000"]


def lora_target(work: Path, tmp: Path) -> list[str]:
    return [*TRAINING, "--lora.denoiser_targets", "to_q,to_nothing"]


def text_lora_target(work: Path, tmp: Path) -> list[str]:
    return [*TRAINING, "--text_encoder", "lora", "--lora.text_encoder_targets", "to_q"]


def cached_text(work: Path, tmp: Path) -> list[str]:
    return [*TRAINING, "--text_encoder", "full", "--trainer.cache_text_embeddings", "true"]


def unknown_key(work: Path, tmp: Path) -> list[str]:
    return [*TRAINING, "--trainer.max_stesp", "3", "--trainer.learning_rate", "fast"]


def unknown_layer(work: Path, tmp: Path) -> list[str]:
    return [*TRAINING, "--evaluation.layers", "up_blocks.9"]


def unknown_features(work: Path, tmp: Path) -> list[str]:
    return [*TRAINING, "--evaluation.features", "resnet"]


def folder_argv(data: Path) -> list[str]:
    return ["--data.kind", "folder", "--data.root", str(data), "--data.resolution", "64", *TRAINER, *EVALUATION]


def unnamed_finding(work: Path, tmp: Path) -> list[str]:
    data = make_folder(tmp / "data", "file_name,text,finding,box", lambda i: 'Wet lungs.,edema,"8,8,20,20"')
    return [*folder_argv(data), *FOLDER_COLUMNS]


def long_captions(work: Path, tmp: Path) -> list[str]:
    data = make_folder(tmp / "data", "file_name,text", lambda i: "long " * (60 if i == 1 else 5))
    return folder_argv(data)


def missing_image(work: Path, tmp: Path) -> list[str]:
    data = make_folder(tmp / "data", "file_name,text", lambda i: "Lungs.")
    (data / "1.png").unlink()
    (data / "2.png").write_bytes(b"no image")
    return folder_argv(data)


def empty_caption_and_box_outside(work: Path, tmp: Path) -> list[str]:
    data = make_folder(
        tmp / "data", "file_name,text,finding,box",
        lambda i: f'{"Edema." if i else ""},edema,"{8 + 100 * (i == 3)},8,20,20"',
    )  # fmt: skip
    return [*folder_argv(data), *FOLDER_COLUMNS]


def same_picture(work: Path, tmp: Path) -> list[str]:
    """The same bytes under two names, of two patients, in two splits."""
    header = "path,dicom_id,subject_id,split,impression,Finding Labels"
    data = make_folder(tmp / "data", header, lambda i: f"d{i},{i},{int(i < 3)},Clear lungs.,No Finding")
    shutil.copy(data / "0.png", data / "3.png")
    return [*folder_argv(data), "--data.kind", "mimic"]


def validation_without_boxes(work: Path, tmp: Path) -> list[str]:
    """Boxes of all images but the one that the gate looks at."""
    rows = ['train,edema,"8,8,20,20"', "val,,", 'test,edema,"8,8,20,20"', 'train,edema,"8,8,20,20"']
    data = make_folder(tmp / "data", "file_name,text,split,finding,bbox", lambda i: f"Edema.,{rows[i]}")
    return [*folder_argv(data), "--trainer.validate_every_steps", "1", "--keep", "word_auc"]


def no_classifier(work: Path, tmp: Path) -> list[str]:
    looks = ["--trainer.validate_every_steps", "1", "--data.validation_size", "2"]
    return [*TRAINING, *looks, "--keep", "finding_auc"]


def one_caption(work: Path, tmp: Path) -> list[str]:
    argv = no_classifier(work, tmp)
    argv[argv.index("--evaluation.features") + 1] = "phantom"
    argv[argv.index("--data.validation_size") + 1] = "1"
    return argv


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (same_picture, ["picture in two splits", "split train, '0.png' (metadata.csv row 2); split test, '3.png'"]),
        (
            validation_without_boxes,
            [
                "keep word_auc needs validation images with a box or mask of a finding, and none of the 1 has one: "
                "column bbox of metadata.csv holds none for the findings of these rows",
                "the validation split is called validation, val, valid",
            ],
        ),
        (no_classifier, ["keep is finding_auc, evaluation.features none, and evaluation.parts localization, quality"]),
        (one_caption, ["keep is finding_auc, and no finding of the classifier", "all of the first 1 validation captions"]),
        (no_such_base, ["base.name: no folder", "nowhere"]),
        (no_data_folder, ["data.root", "nowhere", "is not a folder"]),
        (odd_resolution, ["data.resolution is 100", "multiple of 8", "evaluation.timesteps must be in 0 .. 999"]),
        (lora_target, ["lora.denoiser_targets: to_nothing match no layer", "to_k", "to_out.0"]),
        (text_lora_target, ["lora.text_encoder_targets: to_q match no layer", "q_proj"]),
        (cached_text, ["model: trainer.cache_text_embeddings needs a frozen text encoder; set it to false"]),
        (unknown_key, ["unknown key trainer.max_stesp; did you mean trainer.max_steps?", "trainer.learning_rate"]),
        (unknown_layer, ["no cross-attention layer starts with 'up_blocks.9'; available: down_blocks.0"]),
        (unknown_features, ["no extractor 'resnet'; available: auto, none, phantom, inception, xrv"]),
        (unnamed_finding, ["evaluation.localization_text phrase", "'edema' (1 images): no caption has any of edema"]),
        (long_captions, ["1 of 2 captions", "have more tokens than the text encoder takes, 77", "raise base.caption_chunks"]),
        (missing_image, ["metadata.csv row 3: image '1.png' cannot be opened", "row 4: image '2.png' is no image"]),
        (empty_caption_and_box_outside, ["row 2: text is empty", "row 5: box 108,8,20,20 is outside the image"]),
    ],
)  # fmt: skip
def test_what_a_user_can_cause_ends_in_one_message_and_writes_nothing(
    case: Callable[[Path, Path], list[str]],
    expected: list[str],
    work: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "run"
    argv = ["--base.name", str(work / "sd"), "--output_dir", str(out), *case(work, tmp_path)]
    message = refusal("finetune", argv, capsys)
    for part in expected:
        assert part in message
    assert not out.exists()


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        (None, "method.teacher is missing: another arm, a run folder, a pipeline folder, or a hub id"),
        ("/no/such/teacher", "no folder /no/such/teacher"),
        ("sdxl", "the teacher is a sdxl model, and the student a "),
        (".", "holds neither pytorch_lora_weights.safetensors nor a folder unet"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused_before_the_first_step(
    teacher: str | None, expected: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--base.name", str(work / "sd"), "--output_dir", str(tmp_path / "run"), *TRAINING]
    if teacher is not None:
        argv += ["--method.teacher", teacher if teacher.startswith("/") else str(work / teacher)]
    assert expected in refusal("distill_attention", argv, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_evaluate_refuses_a_run_that_is_missing_or_of_another_base(
    base: str, finetuned: tuple[Path, list[str]], work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "nowhere" if base == "sd" else finetuned[0]
    expected = f"no run folder {source}" if base == "sd" else f"{source / LORA_FILE}"
    argv = ["--base.name", str(work / base), "--run", str(source), "--output_dir", str(tmp_path / "run")]
    assert expected in refusal("evaluate", [*argv, *PHANTOM, *EVALUATION], capsys)
    assert not (tmp_path / "run").exists()


def test_copies_are_looked_for_among_the_images_that_a_run_was_trained_on(
    finetuned: tuple[Path, list[str]], work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [
        "--base.name", str(work / "v"), "--run", str(finetuned[0]), "--output_dir", str(tmp_path / "run"), *PHANTOM,
        "--data.train_size", "6", *EVALUATION, "--evaluation.parts", "memorization", "--data.cache_dir", str(work / "cache"),
    ]  # fmt: skip
    expected = f"the 6 training images of data.* are not those that {finetuned[0]} was trained on"
    assert expected in refusal("evaluate", [*argv, "--data.seed", "5"], capsys)
    assert not (tmp_path / "run").exists()
    run("evaluate", [*argv, "--dry_run", "true"])


def test_a_mistake_found_late_does_not_claim_the_folder(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One held-out image has a box, and its own caption does not name the finding, though another caption does."""
    rows = ['Wet lungs.,test,edema,"8,8,20,20"', "Edema.,test,,", "Clear.,train,,"]
    data = make_folder(tmp_path / "data", "file_name,text,split,finding,box", lambda i: rows[i], count=3)
    out = tmp_path / "run"
    argv = ["--base.name", str(work / "sd"), "--output_dir", str(out), *folder_argv(data), *FOLDER_COLUMNS]
    assert "no held-out image has a region of a finding that its text names" in refusal("finetune", argv, capsys)
    assert not out.exists()


@pytest.mark.slow
def test_a_terminated_training_says_how_to_go_on(work: Path, tmp_path: Path) -> None:
    argv = [
        "--base.name",
        str(work / "sd"),
        "--data.cache_dir",
        str(work / "cache"),
        "--output_dir",
        str(tmp_path / "run"),
    ]
    command = [sys.executable, str(ROOT / "recipes/finetune.py"), *argv, *TRAINING, "--trainer.max_steps", "100000"]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run/model/train_log.jsonl"
    while not log.exists() and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "Traceback" not in errors
    (step,) = checkpoints.steps_in(tmp_path / "run/model/state")
    assert errors.splitlines()[-1].startswith(
        f"model: stopped after step {step} of 100000; the same command goes on from "
    )


@pytest.mark.slow
def test_a_finished_run_that_is_made_longer_is_the_longer_run(work: Path, tmp_path: Path) -> None:
    """Weights bit for bit; results and log are those of the longer run. A changed base is refused by name."""
    folders = {name: tmp_path / name for name in ("grown", "straight")}
    base = shutil.copytree(work / "sd", tmp_path / "base")
    argv = [
        "--base.name",
        str(base),
        "--data.cache_dir",
        str(work / "cache"),
        *TRAINING,
        "--trainer.learning_rate",
        "1e-2",
    ]
    longer = ["--trainer.max_steps", "5"]
    run("finetune", [*argv, "--output_dir", str(folders["grown"]), "--trainer.max_steps", "3"])
    run("finetune", [*argv, "--output_dir", str(folders["grown"]), *longer])
    run("finetune", [*argv, "--output_dir", str(folders["straight"]), *longer])
    adapters, logs, measured = (
        {name: read(folder) for name, folder in folders.items()}
        for read in (
            lambda folder: load_file(folder / LORA_FILE),
            lambda folder: [row | {"seconds": 0} for row in log_rows(folder / "model/train_log.jsonl")],
            lambda folder: read_metrics(folder)["arms"]["model"],
        )
    )
    assert all(torch.equal(value, adapters["grown"][name]) for name, value in adapters["straight"].items())
    assert logs["grown"] == logs["straight"] and [row["step"] for row in logs["grown"]] == [1, 2, 3, 4, 5]
    for part in ("localization", "quality"):
        assert measured["grown"][part] == measured["straight"][part]
    assert measured["grown"]["cost"]["steps"] == 5
    assert files_of(folders["grown"]) == files_of(folders["straight"])

    unet = base / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    save_file({name: value * 1.01 for name, value in tensors.items()}, unet)
    with pytest.raises(UserError, match="step-00000005 was written with other files .*: weights of base changed"):
        run("finetune", [*argv, "--output_dir", str(folders["grown"]), "--trainer.max_steps", "6"])


def test_a_disk_that_is_full_at_export_ends_in_one_message_and_the_run_continues(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    argv = ["--base.name", str(work / "sd"), "--output_dir", str(tmp_path / "run"), *TRAINING]
    argv += ["--data.cache_dir", str(work / "cache"), "--trainer.checkpoint_every_steps", "1"]
    with monkeypatch.context() as context:
        context.setattr(train, "export", full_disk)
        assert "disk full" in refusal("finetune", argv, capsys)
    assert not (tmp_path / "run" / "cost.json").exists()
    run("finetune", argv)
    assert [row["step"] for row in log_rows(tmp_path / "run/model/train_log.jsonl")] == [1, 2]
    assert checkpoints.steps_in(tmp_path / "run/model/state") == [2] and (tmp_path / "run" / LORA_FILE).exists()

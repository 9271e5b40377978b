"""Every recipe that accelerate can launch with several processes ends with them, and leaves its numbers."""

from __future__ import annotations

import faulthandler
import json
import os
from pathlib import Path

import pytest
from pair import in_two_processes
from recipe import config_class_of, recipe_module
from test_memorization import image_folder
from test_recipes import EVALUATION, PHANTOM, TRAINING, arms_argv
from tiny import save_tiny

from distill.cli import parse
from distill.data.phantom.dataset import PhantomDataset

pytestmark = pytest.mark.slow

LOOKS = [
    "--trainer.validate_every_steps", "1", "--data.validation_size", "4", "--trainer.sample_every_steps", "1",
    "--trainer.checkpoint_every_steps", "1",
]  # fmt: skip
ALL_PARTS = ["--evaluation.utility_steps", "2", "--evaluation.utility_seeds", "2", "--data.train_size", "6"]
LABELLED = ["--data.resolution", "64", "--data.test_size", "60", "--evaluation.features", "phantom", *ALL_PARTS]
BUDGETS = ["--budgets", "[1,2]", "--margins", '{"word.auc": -0.1}']
WITHOUT_STEPS = [
    word for k, word in enumerate(TRAINING) if "--trainer.max_steps" not in TRAINING[max(0, k - 1) : k + 1]
]
# Recipe, what it leaves, and its options. RUN is a trained run, IMAGES a folder of images.
COMMANDS = {
    "finetune": ("finetune", "metrics.json", [*TRAINING, "--text_encoder", "full", *LOOKS, "--keep", "loss"]),
    "distill_attention": (
        "distill_attention", "metrics.json",
        [*TRAINING, "--method.teacher", "RUN", "--method.gate_reference", "base", "--method.gate_images", "4", *LOOKS],
    ),
    "tradeoff": (
        "tradeoff", "metrics.json",
        [*TRAINING, *arms_argv("frozen", "learnable", "gated", "key_locked", "lora"), "--seeds", "[0,1]", *LOOKS],
    ),
    "budgets": (
        "tradeoff", "proof.json",
        [*WITHOUT_STEPS, *arms_argv("frozen", "learnable", "key_locked"), "--seeds", "[0,1]", *BUDGETS],
    ),
    "compress": (
        "compress", "metrics.json", [*TRAINING, "--run", "RUN", "--blocks.remove_mid_block", "true", "--bits", "[int8]"],
    ),
    "distill_steps": ("distill_steps", "metrics.json", [*TRAINING, "--run", "RUN", "--lora.rank", "2"]),
    "evaluate": (
        "evaluate", "metrics.json", [*PHANTOM, *EVALUATION, "--run", "RUN", "--evaluation.causal", "true"],
    ),
    "utility": (
        "evaluate", "metrics.json",
        [*LABELLED, "--evaluation.generated_images", "30", "--evaluation.num_inference_steps", "2",
         "--evaluation.diversity_captions", "1", "--evaluation.parts", "utility,memorization,explanation"],
    ),
    "images": (
        "evaluate", "metrics.json",
        [*LABELLED, "--evaluation.generated_images", "30", "--evaluation.parts", "quality,utility,memorization,explanation",
         "--images", "IMAGES"],
    ),
    "atlas": (
        "atlas", "atlas.json",
        ["--runs", "RUN", "--timesteps", "600", "--validation_images", "3", *PHANTOM, "--data.validation_size", "6",
         "--evaluation.localization_images", "4", "--evaluation.bootstrap_samples", "10"],
    ),
    "robustness": (
        "robustness", "robustness.json",
        ["--data.resolution", "64", "--data.test_size", "30", "--evaluation.localization_images", "12",
         "--evaluation.timesteps", "[300]", "--evaluation.bootstrap_samples", "20"],
    ),
    "explain": (
        "explain", "explain.json",
        ["--data.resolution", "64", "--data.test_size", "40", "--drawing.count", "20", "--drawing.batch_size", "10",
         "--drawing.num_inference_steps", "2"],
    ),
}  # fmt: skip


def _run(rank: int, name: str, argv: list[str], folder: str) -> None:
    os.chdir(folder)
    faulthandler.dump_traceback_later(180, exit=True)  # processes that wait for each other say where
    recipe = recipe_module(name)
    getattr(recipe, name)(parse(config_class_of(recipe), argv))
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a run on it, and images."""
    folder = tmp_path_factory.mktemp("trained")
    save_tiny(folder / "base")
    image_folder(folder / "images", PhantomDataset("train", 40, 0, 64), 40)
    argv = ["--base.name", str(folder / "base"), "--output_dir", str(folder / "run"), *TRAINING]
    in_two_processes(_run, "finetune", [*argv, "--evaluation.parts", "localization"], str(folder))
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_recipe_ends_with_two_processes(name: str, trained: Path, tmp_path: Path) -> None:
    recipe, left, options = COMMANDS[name]
    places = {"RUN": str(trained / "run"), "IMAGES": str(trained / "images")}
    argv = ["--base.name", str(trained / "base"), "--output_dir", str(tmp_path / "out")]
    in_two_processes(_run, recipe, [*argv, *(places.get(word, word) for word in options)], str(tmp_path))
    assert json.loads((tmp_path / "out" / left).read_text(encoding="utf-8"))

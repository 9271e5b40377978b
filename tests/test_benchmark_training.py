"""The benchmark of training: its ratios, its clock, and a whole run of it on a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recipe import config_class_of, recipe_module
from tiny import save_tiny

from distill.cli import main

FEW = [
    "--data.resolution", "64", "--data.train_size", "4", "--data.validation_size", "1", "--data.test_size", "4",
    "--trainer.batch_size", "2", "--turns", "1", "--steps", "1", "--warm_up_steps", "1", "--lora.rank", "2",
    "--lora.alpha", "2",
]  # fmt: skip


def test_ratios_say_how_many_times_faster_ours_is_and_how_much_dearer_a_method_is() -> None:
    seconds = {
        "lora": 2.0,
        "diffusers_lora": 5.0,
        "lora_both": 2.0,
        "distilled": 2.9,
        "full_both": 4.0,
        "key_locked": 4.2,
    }
    entries = {name: {"seconds_a_step": value} for name, value in seconds.items()}
    found = recipe_module("benchmark_training").summary({"kinds": entries}, "CPU")
    assert found["lora_ratio"] == 2.5 and found["full_ratio"] is None
    assert found["distill_step_ratio"] == pytest.approx(1.45) and found["key_lock_step_ratio"] == pytest.approx(1.05)


@pytest.mark.slow
def test_every_kind_is_timed_beside_the_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe, base, folder = recipe_module("benchmark_training"), save_tiny(tmp_path / "sd", "sd"), tmp_path / "out"
    options = ["--base.name", str(base), "--data.cache_dir", str(tmp_path / "cache"), "--output_dir", str(folder)]
    main(recipe.benchmark, config_class_of(recipe), [*FEW, *options, "--parts", "speed,shares"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    results = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    kinds = results["kinds"]
    assert set(kinds) == {
        "lora", "lora_both", "distilled", "full", "full_both", "key_locked", "pruned", "compressed", "diffusers_lora",
        "diffusers_full",
    }  # fmt: skip
    assert last["lora_ratio"] == kinds["diffusers_lora"]["seconds_a_step"] / kinds["lora"]["seconds_a_step"]
    assert all(entry["seconds_a_step"] > 0 for entry in kinds.values())
    # A teacher adds operations; a smaller U-Net has fewer.
    flops = {name: entry["flops_a_step"] for name, entry in kinds.items() if "flops_a_step" in entry}
    assert flops["distilled"] > flops["lora_both"] and flops["pruned"] < flops["full"]
    assert flops["key_locked"] > flops["full_both"] > flops["full"] > flops["lora"]
    for name in flops:
        shares = kinds[name]["shares"]
        assert sum(shares.values()) == pytest.approx(1.0) and min(shares["forward"], shares["backward"]) > 0
    assert kinds["full"]["shares"]["text"] == 0.0 < kinds["full_both"]["shares"]["text"]  # cached; encoded at each step

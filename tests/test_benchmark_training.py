"""The benchmark of training: its ratios, its clock, and a whole run of it on a tiny base."""

from __future__ import annotations

import copy
import json
import math
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recipe import ROOT, recipe_module
from tiny import save_tiny

from distill.errors import UserError
from distill.experiment import benchmark_training, fresh_process
from distill.experiment.fresh_process import in_fresh_process
from distill.files import write_json
from distill.methods.training import Training

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


def test_a_process_of_its_own_answers_fails_dies_or_is_stopped(tmp_path: Path) -> None:
    assert in_fresh_process(math.sqrt, 4.0, limit_s=60) == 2.0
    with pytest.raises(UserError, match="ValueError: .*"):
        in_fresh_process(math.sqrt, -1.0)
    with pytest.raises(UserError, match="its process ended with status 3"):
        in_fresh_process(os._exit, 3)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="stopped after 1 s"):
        in_fresh_process(time.sleep, 600, limit_s=1.0)
    assert time.monotonic() - began < 60


def test_what_a_process_has_started_ends_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_process, "GRACE_S", 0.5)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reads = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert in_fresh_process(os.system, f"sleep 600 > {pipe} &") == 0
    assert select.select([reads], [], [], 60)[0] and os.read(reads, 1) == b"", "nobody writes to it any more"
    os.close(reads)


def test_what_was_measured_is_written_though_a_part_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, written = {"lora": {"seconds_a_step": 2.0}}, []
    config: Any = SimpleNamespace(
        architecture="base", base=None, parts=("speed", "memory"), limit_minutes=1.0, trainer=None
    )

    def fresh(function: Any, *arguments: Any, limit_s: float) -> Any:
        assert 0 < limit_s <= 60
        if function is benchmark_training.environment:
            return {"device": "a chip"}
        if function is benchmark_training.speed_part:
            write_json(arguments[-1], partial)
            raise TimeoutError("it was stopped after 60 s")
        if arguments[2] == "diffusers_lora":
            raise UserError("CUDA error: an illegal memory access was encountered")
        return 1.5

    monkeypatch.setattr(fresh_process, "in_fresh_process", fresh)
    kinds = {"lora": Training(), "lora_both": Training()}
    results = benchmark_training.Measurement(config, lambda found: written.append(copy.deepcopy(found))).run(kinds, {})
    assert results["kinds"] == {
        "lora": {"seconds_a_step": 2.0, "peak_memory_gb": 1.5},
        "lora_both": {"peak_memory_gb": 1.5},
    }
    assert set(results["failed"]) == {"speed", "memory of diffusers_lora"}
    assert written[0] == {"kinds": {}, "failed": {}, "environment": {"device": "a chip"}} and written[-1] == results
    monkeypatch.setattr(fresh_process, "in_fresh_process", lambda *_, **__: (_ for _ in ()).throw(UserError("no GPU")))
    assert benchmark_training.Measurement(config, written.append).run(kinds, {}) == {
        "kinds": {}, "failed": {"environment": "no GPU"},
    }  # fmt: skip


@pytest.mark.slow
def test_every_kind_is_timed_beside_the_peers(tmp_path: Path) -> None:
    base, folder = save_tiny(tmp_path / "sd", "sd"), tmp_path / "out"
    options = ["--base.name", str(base), "--data.cache_dir", str(tmp_path / "cache"), "--output_dir", str(folder)]
    command = [sys.executable, "recipes/benchmark_training.py", *FEW, *options]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    results = json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
    assert results["failed"] == {} and results["environment"]["torch"] == torch.__version__
    assert min(last["first_step_seconds"], last["distill_memory_ratio"]) > 0
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

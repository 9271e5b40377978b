"""Two processes do what one with the whole batch does, and stop together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import fresh_accelerator, log_of, settings_of
from pair import free_port
from recipe import ROOT
from safetensors.torch import load_file
from training import EXAMPLES
from two_processes import evaluated, looked, run

STOPS = ("not finite", "signal", "full disk", "damage")


def launch(folder: Path, *scenarios: str) -> None:
    """Run scenarios of two_processes.py on two processes, as `accelerate launch --cpu --num_processes 2` does."""
    shared = {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "tests/two_processes.py"), str(folder), *scenarios]
    started = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in started:
            process.kill()


def assert_equal_to_one_process(folder: Path, alone: Path, kind: str) -> None:
    """Losses to 1e-5, and weights, which moved by about 3e-4, to 1e-5 but for the rounding of gradients that are 0."""
    assert all("error" not in process for process in found(folder, kind))
    (alone / kind).mkdir(parents=True)
    run(kind, alone / kind, fresh_accelerator(settings_of(), alone / kind))
    ours, theirs = (log_of(path / kind) for path in (folder, alone))
    assert len(ours) == len(theirs) == 3
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-5), (kind, name)
    two, one = (load_file(path / kind / "weights.safetensors") for path in (folder, alone))
    gaps = torch.cat([(two[name] - weights).abs().flatten() for name, weights in one.items()])
    # Adam divides a gradient that is only rounding by its own size: a few weights in ten thousand may move anywhere.
    assert (gaps > 1e-5).double().mean() < 1e-3 and gaps.max() < 1e-4, kind


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left of trainings that one of them stops, and of a method."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder, "said", *STOPS, "look", "evaluate", "denoising", "denoising-sdxl")
    return folder


def found(folder: Path, scenario: str) -> list[dict[str, Any]]:
    return [json.loads((folder / scenario / f"{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_are_one_with_the_whole_batch(two: Path, tmp_path: Path) -> None:
    assert_equal_to_one_process(two, tmp_path, "denoising")


def test_unused_parameters_are_searched_for_only_where_there_are_some(two: Path, tmp_path: Path) -> None:
    """The last layer of SDXL's first text encoder; an objective that knows nothing of its own is searched."""
    names = ("denoising", "denoising-sdxl", "signal")
    assert [found(two, name)[0]["searches"] for name in names] == [False, True, True]
    assert_equal_to_one_process(two, tmp_path, "denoising-sdxl")


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch_by_every_method(tmp_path: Path) -> None:
    kinds = [name for name in EXAMPLES if name != "denoising"]
    launch(tmp_path / "two", *kinds)
    for kind in kinds:
        assert_equal_to_one_process(tmp_path / "two", tmp_path / "one", kind)


def test_a_loss_that_is_not_finite_on_one_process_stops_all(two: Path) -> None:
    for process in found(two, "not finite"):
        assert "UserError: train: the loss is nan at step 3" in process["error"]
        assert process["steps"] == [2]


def test_a_signal_to_one_process_stops_all_at_the_same_step(two: Path) -> None:
    for process in found(two, "signal"):
        assert "Interrupted: train: stopped after step 3 of 8" in process["error"]
        assert process["steps"] == [3, 2]


def test_a_disk_that_is_full_for_one_process_stops_all(two: Path) -> None:
    for process in found(two, "full disk"):
        assert "UserError: the checkpoint" in process["error"] and "No space left on device" in process["error"]
        assert process["steps"] == [2]


def test_both_processes_skip_a_damaged_checkpoint(two: Path) -> None:
    for process in found(two, "damage"):
        assert "error" not in process and process["steps"] == [8, 6]


def test_two_processes_look_as_one_does(two: Path, tmp_path: Path) -> None:
    first, second = found(two, "look")
    assert first == second
    alone = looked(tmp_path, fresh_accelerator(settings_of(), tmp_path))
    assert first.keys() == alone.keys() >= {"validation_loss", "finding_auc", "word", "mass"}
    for name in ("validation_loss", "finding_auc", "pairs"):
        assert first[name] == pytest.approx(alone[name], rel=1e-5), name
    assert first["word"] == pytest.approx(alone["word"], rel=1e-4)
    assert not (two / "look" / "look.partial").exists()


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Path -> value, of everything in dictionaries and lists."""
    if not isinstance(value, (dict, list)):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, inner in items for key, leaf in leaves(inner, f"{path}.{name}").items()}


def test_two_processes_evaluate_as_one_does(two: Path, tmp_path: Path) -> None:
    first, second = found(two, "evaluate")
    assert first == second
    alone = leaves(json.loads(json.dumps(evaluated(tmp_path, fresh_accelerator(settings_of(), tmp_path)))))
    assert (
        leaves(first).keys()
        == alone.keys()
        >= {".quality.fid", ".floor.fid", ".utility.generated", ".localization.mass.eos"}
    )
    for name, value in leaves(first).items():
        assert value == (pytest.approx(alone[name], rel=1e-4, abs=1e-6) if isinstance(value, float) else alone[name]), (
            name
        )


def assert_each_error_is_said_once(by: list[dict[str, str]]) -> None:
    assert sorted(said["both"] for said in by) in (["", "error: no data\n"], ["", "[process 1] error: no data\n"])
    assert [said["other"] for said in by] == ["", "[process 1] error: no image\n"]
    assert [said["different"] for said in by] == ["error: row 0\n", "[process 1] error: row 1\n"]


def test_an_error_is_said_once_by_whichever_process_meets_it(two: Path) -> None:
    assert_each_error_is_said_once(found(two, "said"))


@pytest.mark.slow
def test_an_error_is_said_once_under_a_launcher_of_torch(tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*torchrun, str(ROOT / "tests/two_processes.py"), str(tmp_path), "said"],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "ACCELERATE_USE_CPU": "true"},
        check=True,
        timeout=120,
    )
    assert_each_error_is_said_once(found(tmp_path, "said"))

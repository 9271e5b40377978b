"""Threads: a start with more of them than cores are free is told so."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from recipe import ROOT
from torch.distributed import TCPStore

from distill import processes
from distill.config import TrainerConfig


@pytest.mark.parametrize(
    ("free", "threads", "count", "told"),
    [
        (2, 2, 1, None),
        (1, 1, 2, None),
        (1, 2, 1, "--num_cpu_threads_per_process 1 is faster"),
        (3, 4, 1, "--num_cpu_threads_per_process 3 is faster"),
        (4, 2, 2, None),
        (4, 4, 2, "--num_cpu_threads_per_process 2 is faster"),
    ],
)
def test_advice_names_the_threads_that_are_free(
    free: int, threads: int, count: int, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "free_cores", lambda: free)
    said = processes.thread_advice(threads, count)
    assert said is None if told is None else said is not None and said.endswith(told)


@pytest.mark.parametrize(("idle", "free"), [((100, 100), 2), ((100, 0), 1), ((0, 0), 1), ((60, 100), 2)])
def test_free_cores_are_the_idle_ones(idle: tuple[int, int], free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # (user, idle) of each core before and after 100 more ticks
    readings = iter([[(50, 10), (50, 10)], [(150 - n, 10 + n) for n in idle]])

    def reading() -> dict[int, tuple[int, int]]:
        return {core: (idle_ticks, user + idle_ticks) for core, (user, idle_ticks) in enumerate(next(readings))}

    monkeypatch.setattr(processes, "_idle_ticks", reading)
    monkeypatch.setattr(processes, "cores", lambda: {0, 1})
    assert processes.free_cores(0) == free


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="only Linux counts the ticks of each core")
def test_ticks_are_read_for_every_core() -> None:
    ticks = processes._idle_ticks()
    assert processes.cores() <= set(ticks) and all(0 <= idle <= total for idle, total in ticks.values())


def test_the_makefile_reads_a_number_of_threads() -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "distill" / "processes.py"], capture_output=True, text=True, check=True
    )
    assert 1 <= int(printed.stdout) <= len(processes.cores())


@pytest.mark.parametrize(
    ("launched", "trainer", "told"),
    [
        ({}, {}, []),
        ({"MIXED_PRECISION": "no", "GRADIENT_ACCUMULATION_STEPS": "1"}, {"mixed_precision": "bf16"}, []),
        ({"MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}, []),
        ({"MIXED_PRECISION": "bf16"}, {}, ["mixed_precision bf16; it is not used: trainer.mixed_precision is no"]),
        (
            {"MIXED_PRECISION": "FP16", "GRADIENT_ACCUMULATION_STEPS": "4"},
            {"mixed_precision": "bf16", "gradient_accumulation_steps": 2},
            [
                "mixed_precision fp16; it is not used: trainer.mixed_precision is bf16",
                "gradient_accumulation_steps 4; it is not used: trainer.gradient_accumulation_steps is 2",
            ],
        ),
    ],
)
def test_settings_of_the_launch_that_the_configuration_decides_are_told(
    launched: dict[str, str], trainer: dict[str, object], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("MIXED_PRECISION", "GRADIENT_ACCUMULATION_STEPS"):
        monkeypatch.delenv(f"ACCELERATE_{key}", raising=False)
    for key, value in launched.items():
        monkeypatch.setenv(f"ACCELERATE_{key}", value)
    options = TrainerConfig.model_validate(trainer)
    said = processes.ignored_by_launch(options.mixed_precision, options.gradient_accumulation_steps)
    assert said == [f"accelerate launch names {sentence}" for sentence in told]


def test_idle_ticks_are_those_without_work_and_of_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    content = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 3 4 5 6 7 8 90 91\ncpu12 10 0 0 30 5 0 0 0 0 0\nintr 5 6\n"
    monkeypatch.setattr(Path, "read_text", lambda self: {"/proc/stat": content}[str(self)])
    assert processes._idle_ticks() == {0: (9, 36), 12: (35, 45)}


def test_all_cores_are_free_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setattr(processes, "cores", lambda: {0, 1, 5})
    processes.free_cores()
    assert waited == [0.5]

    def missing() -> None:
        raise OSError

    monkeypatch.setattr(processes, "_idle_ticks", missing)
    assert processes.free_cores() == 3


def test_cores_are_all_where_the_system_knows_no_other_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    for count, expected in ((3, {0, 1, 2}), (None, {0})):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert processes.cores() == expected


def test_one_process_of_a_launch_is_the_first_to_say_something(monkeypatch: pytest.MonkeyPatch) -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    said = [processes.is_first_to_say(message) for message in ("a", "a", "b", "a", "b")]
    assert said == [True, False, True, False, False]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert processes.is_first_to_say("a"), "there is no other"
    monkeypatch.delenv("WORLD_SIZE")
    assert processes.is_first_to_say("a")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR")
    assert processes.is_first_to_say("a"), "twice is better than never"


def test_processes_wait_for_long_work_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading data and encoding images take hours; the default of a launch on several GPUs is 10 minutes."""
    given: dict[str, object] = {}
    monkeypatch.setattr("accelerate.PartialState", lambda **options: given.update(options))
    processes.process_state()
    assert given == {"cpu": False, "timeout": processes.PATIENCE} and timedelta(hours=12) <= processes.PATIENCE

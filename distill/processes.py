"""The processes of `accelerate launch`, for what comes before an Accelerator, and the cores that are free for their
threads."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from accelerate import PartialState

STORE_SECONDS = 5
PATIENCE = timedelta(days=1)
"""How long processes wait for the first one, which reads the data and encodes images alone: with the default of 10
minutes a launch on several GPUs would end there."""


def process_state() -> PartialState:
    """PartialState of all processes: on a CPU its default takes each for the only one, and an Accelerator keeps to
    that."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


def is_first_to_say(message: str) -> bool:
    """Whether no other process of this launch has said `message` yet.

    The processes ask the store that torch.distributed keeps for them. True where there is none: twice is better than
    never.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True
    from torch.distributed import TCPStore

    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection((host, port), timeout=STORE_SECONDS).close()  # TCPStore would try for long
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))
        return store.add(f"said/{hashlib.sha256(message.encode()).hexdigest()}", 1) == 1
    except (KeyError, ValueError, OSError, RuntimeError):
        return True


def cores() -> set[int]:
    """Numbers of the cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def free_cores(seconds: float = 0.5) -> int:
    """How many of them are idle, watched for this long; at least 1. All where the system does not say (Linux does)."""
    try:
        before = _idle_ticks()
        time.sleep(seconds)
        after = _idle_ticks()
    except (OSError, ValueError):
        return len(cores())
    shares = [
        (after[core][0] - before[core][0]) / max(1, after[core][1] - before[core][1]) for core in cores() & set(after)
    ]
    return max(1, round(sum(shares)))


def _idle_ticks() -> dict[int, tuple[int, int]]:
    """Core -> its idle and all of its clock ticks since the start of the machine."""
    found = {}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name != "cpu":
            values = [int(tick) for tick in ticks]
            found[int(name[3:])] = (values[3] + values[4], sum(values[:8]))
    return found


def thread_advice(threads: int, processes: int) -> str | None:
    """A sentence for a start with more threads than free cores, else None. Call it before the work begins."""
    if threads == 1:
        return None
    free = free_cores()
    if threads * processes <= free:
        return None
    return (
        f"{processes} process(es) of {threads} threads, and {free} of {len(cores())} cores free: threads that wait "
        f"make steps several times slower; --num_cpu_threads_per_process {max(1, free // processes)} is faster"
    )


def ignored_by_launch(mixed_precision: str, gradient_accumulation_steps: int) -> list[str]:
    """A sentence for each setting of `accelerate launch` that is not used, because these of the trainer say
    otherwise."""
    found = []
    for key, ours in (
        ("mixed_precision", mixed_precision),
        ("gradient_accumulation_steps", gradient_accumulation_steps),
    ):
        launched = os.environ.get(f"ACCELERATE_{key.upper()}", "").lower()
        if launched not in ("", "no", "1", str(ours)):
            found.append(f"accelerate launch names {key} {launched}; it is not used: trainer.{key} is {ours}")
    return found


if __name__ == "__main__":
    print(free_cores())

"""A test's function in two processes that know each other, as `accelerate launch` starts them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """Call function(rank, *arguments) in each."""
    # A spawned process imports everything again, for many seconds; a forked one must not meet the parent's threads.
    start_method = "fork" if sys.platform == "linux" else "spawn"
    torch.multiprocessing.start_processes(
        _start, args=(free_port(), function, arguments), nprocs=2, start_method=start_method
    )


def _start(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # a forked process has the parent's
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # fmt: skip
    torch.set_num_threads(1)
    function(rank, *arguments)

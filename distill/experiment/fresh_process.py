"""Measurements in processes of their own: nothing before them counts, and one that fails or hangs spoils no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TypeVar

from distill.errors import UserError

T = TypeVar("T")
GRACE_S = 5.0
"""Time that a process has to end by itself, and a launcher to end those that it has started."""


def in_fresh_process(function: Callable[..., T], *arguments: object, limit_s: float | None = None) -> T:
    """`function(*arguments)` in a process that has done nothing before.

    Raises TimeoutError after limit_s seconds, and UserError if the function fails or its process dies. The process then
    ends, with all that it has started.
    """
    context = multiprocessing.get_context("spawn")
    answer, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        if not answer.poll(limit_s):
            raise TimeoutError(f"it was stopped after {limit_s:.0f} s")
        fault, value = answer.recv()
    except EOFError:
        process.join()
        raise UserError(f"its process ended with status {process.exitcode}") from None
    else:
        process.join(GRACE_S)
    finally:
        _end(process)
    if fault:
        raise UserError(fault)
    returned: T = value
    return returned


def _answer(sender: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    os.setsid()  # what it starts is of its group
    try:
        answer = ("", function(*arguments))
    except Exception:
        answer = (traceback.format_exc(), None)
    sender.send(answer)


def _end(process: SpawnProcess) -> None:
    """End a process and its group. SIGTERM first: `accelerate launch` then ends its processes, which are of other
    groups."""
    assert process.pid
    for name in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, name)
        process.join(GRACE_S)
    process.kill()
    process.join()


class Parts:
    """Measurements that share a limit of time, each in a process of its own.

    failed: part -> why it has no result; `write` is called when it gets another.
    """

    def __init__(self, limit_minutes: float, failed: dict[str, str], write: Callable[[], object]) -> None:
        self.failed, self.write = failed, write
        self.ends = time.monotonic() + 60 * limit_minutes

    @property
    def left_s(self) -> float:
        return max(0.0, self.ends - time.monotonic())

    def fresh(self, part: str, function: Callable[..., T], *arguments: object, share: float = 1.0) -> T | None:
        """What the function gives; None if that fails, or takes more than this share of the time left."""
        limit = self.left_s * share
        print(f"{part}: at most {limit:.0f} s", flush=True)
        try:
            if limit <= 0:
                raise TimeoutError("no time was left")
            return in_fresh_process(function, *arguments, limit_s=limit)
        except (TimeoutError, UserError) as error:
            print(f"{part} failed: {error}", flush=True)
            self.failed[part] = str(error)
            self.write()
            return None

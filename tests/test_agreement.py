"""What the processes of a launch agree on; the collective calls are replaced, tests/test_two_processes.py makes
them."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from distill.agreement import Control, Finite
from distill.errors import Interrupted, UserError
from distill.interrupts import handling, leave_signals_to_parent, noted, terminable


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Another process has 9, and the main one the fault `there`."""
    found: list[Any] = []
    parallel = torch.distributed

    def all_reduce(tensor: torch.Tensor, op: Any, group: Any) -> None:
        found.append((op, group))
        tensor.fill_(max(int(tensor), 9))

    def broadcast(faults: list[str | None], src: int, group: Any) -> None:
        found.append((list(faults), src, group))
        faults[0] = faults[0] or "there"

    monkeypatch.setattr(parallel, "new_group", lambda backend, timeout: f"a group of {backend}", raising=False)
    monkeypatch.setattr(parallel, "all_reduce", all_reduce, raising=False)
    monkeypatch.setattr(parallel, "broadcast_object_list", broadcast, raising=False)
    monkeypatch.setattr(parallel, "destroy_process_group", found.append, raising=False)
    return found


def control(processes: int, is_main: bool = True) -> Control:
    accelerator: Any = SimpleNamespace(is_main_process=is_main, num_processes=processes)
    return Control(accelerator, Path("the folder"))


def test_processes_agree_in_a_group_of_their_cpus(calls: list[Any]) -> None:
    group = "a group of gloo"
    several = control(2)
    assert several.largest(3) == 9 and several.largest(12) == 12
    assert calls == [(torch.distributed.ReduceOp.MAX, group)] * 2
    calls.clear()
    with pytest.raises(UserError, match="^there$"):
        control(2, is_main=False).on_main(lambda: pytest.fail("it is for the main process"))
    assert calls == [([None], 0, group)]
    several.close()
    assert calls[-1] == group


def test_one_process_asks_nobody(calls: list[Any]) -> None:
    alone, done = control(1), []
    assert alone.largest(3) == 3
    alone.on_main(lambda: done.append(1))
    alone.close()
    assert done == [1] and not calls
    other = control(1, is_main=False)
    other.on_main(lambda: done.append(2))
    assert done == [1]


def test_a_fault_of_the_main_process_is_one_message() -> None:
    def fails(error: Exception) -> Any:
        def call() -> None:
            raise error

        return call

    with pytest.raises(UserError, match="^a row is wrong$"):
        control(1).on_main(fails(UserError("a row is wrong")))
    with pytest.raises(UserError, match="^a/b cannot be written: No space left; free some space"):
        control(1).on_main(fails(OSError(28, "No space left", "a/b")))
    with pytest.raises(UserError, match="^the folder cannot be written: No space left"):
        control(1).on_main(fails(OSError(28, "No space left")))


def fault(name: str, value: float, step: int) -> UserError:
    return UserError(f"{name} {value} {step}")


def test_the_first_value_that_is_not_finite_is_named_with_its_step() -> None:
    finite = Finite(Accelerator())
    finite.check(fault)
    for step, (loss, norm) in enumerate(
        [(1.0, 2.0), (3.0, math.inf), (math.nan, 4.0), (math.inf, math.nan), (1.0, 1.0)], 7
    ):
        finite.see("loss", torch.tensor(loss, requires_grad=True), step)
        finite.see("norm", torch.tensor(norm, dtype=torch.float64), step)
        if step == 7:
            finite.check(fault)
    with pytest.raises(UserError, match="^norm inf 8$"):
        finite.check(fault)
    both = Finite(Accelerator())
    both.see("loss", torch.tensor(math.nan), 4)
    both.see("norm", torch.tensor(math.inf), 4)
    with pytest.raises(UserError, match="^loss nan 4$"):
        both.check(fault)
    assert not any(value.requires_grad for value in finite.first.values())


def test_the_step_of_a_value_in_half_precision_is_exact() -> None:
    """bf16 has no 1,001."""
    finite = Finite(Accelerator())
    finite.see("loss", torch.tensor(math.nan, dtype=torch.bfloat16), 1001)
    with pytest.raises(UserError, match="^loss nan 1001$"):
        finite.check(fault)


def test_the_earliest_step_of_all_processes_is_named() -> None:
    rows = torch.tensor([[[math.nan, 6.0], [1.0, 7.0]], [[1.0, 7.0], [-math.inf, 5.0]]])
    finite = Finite(SimpleNamespace(gather=lambda mine: rows))  # type: ignore[arg-type]
    finite.see("loss", torch.tensor(1.0), 7)
    finite.see("norm", torch.tensor(1.0), 7)
    with pytest.raises(UserError, match="^norm -inf 5$"):
        finite.check(fault)


# --------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals as a process in the foreground has them; one in the background may be told to ignore them."""
    before = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in before.items()}  # type: ignore[arg-type]
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_signal_is_noted_and_a_second_interrupt_stops(heard: None) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with noted() as stop:
        assert stop.signal == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_termination_is_an_exception_with_its_status(heard: None) -> None:
    with pytest.raises(Interrupted) as caught, terminable():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.status == 143 and str(caught.value) == ""


def test_a_signal_that_was_to_be_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with handling(lambda *_: pytest.fail("it is ignored"), signal.SIGTERM):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_loader_processes_leave_an_interrupt_to_their_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[Any] = []
    monkeypatch.setattr(signal, "signal", lambda *given: set_to.append(given))
    leave_signals_to_parent(0)
    assert set_to == [(signal.SIGINT, signal.SIG_IGN), (signal.SIGTERM, signal.SIG_DFL)]

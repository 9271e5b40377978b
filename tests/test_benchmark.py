"""The cost of recording is that of passes after the first, compared turn by turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distill.experiment import benchmark_localization as benchmark
from distill.models.family import Model


def test_overheads_are_medians_over_neighbours_without_the_first_two_turns(
    sd: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([(900.0, 1.0), (800.0, 1.0), (1.0, 1.5), (20.0, 22.0), (3.0, 9.0)])
    turn: list[float] = []

    def seconds_of(call: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
        if not turn:
            turn.extend(next(times))
        return call(), turn.pop(0)

    monkeypatch.setattr(benchmark, "seconds_of", seconds_of)
    monkeypatch.setattr(benchmark, "_has_peer", lambda: False)
    processors = dict(sd.denoiser.attn_processors)
    found = benchmark.overheads(sd, 2, 3, torch.device("cpu"))
    assert (found["batch_size"], found["repeats"], found["seconds_plain"]) == (2, 3, 3.0)
    assert found["record_overhead"] == pytest.approx(0.5), "the median of .5, .1 and 2"
    assert found["peer_overhead"] is None and "map_difference" not in found
    assert sd.denoiser.attn_processors == processors and next(times, None) is None

"""The cost of recording is that of passes after the first, compared turn by turn."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.attention.heat_maps import aggregate
from distill.attention.recording import record_attention
from distill.config import BaseConfig, FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.data_config import PhantomData
from distill.evaluation.protocols import ddim_timesteps, prepare_inputs, queries
from distill.experiment import benchmark_localization as benchmark
from distill.experiment import benchmark_memory, fresh_process
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


@torch.no_grad()
def test_the_papers_way_is_the_mean_of_heads_layers_and_the_last_40_steps(sd: Model, phantoms: PhantomDataset) -> None:
    config = FullEvaluation()
    batch = queries(phantoms, sd, config)[:2]
    inputs = prepare_inputs(sd, [phantoms[query.image] for query in batch], batch, torch.device("cpu"))
    noise, expected = inputs.noise(50, config.seed), torch.zeros(())
    with record_attention(sd.denoiser, reduce=inputs.reduce) as maps:
        for place, timestep in list(enumerate(ddim_timesteps(sd, 50)))[10:]:
            noisy = sd.family.add_noise(sd, inputs.latents, noise[:, place], inputs.steps(timestep))
            sd.family.predict(sd.denoiser, noisy, inputs.steps(timestep), inputs.conditions)
            expected = expected + aggregate(maps.by_layer, maps.sizes, (64, 64), mode="nearest") / 40
    torch.testing.assert_close(benchmark.paper_way(inputs, config), expected, atol=1e-6, rtol=0)


def test_every_part_has_its_share_of_the_time_and_is_written_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    limits, written, row = [], [], {"peak_gb": 2.0, "held_bytes": 5}

    def fresh(function: Any, *arguments: Any, limit_s: float) -> Any:
        limits.append(limit_s)
        if arguments[-1:] == ("vilouras",):
            raise TimeoutError("it was stopped after 9 s")
        steps = arguments[-1] if function is benchmark.memory_of_steps else 1
        return {key: value * steps for key, value in row.items()} | {"nothing": math.nan}

    monkeypatch.setattr(fresh_process, "in_fresh_process", fresh)
    subject = benchmark.Subject(BaseConfig(), None, PhantomData(), FullEvaluation(), Path())
    parts = ("overhead", "paper", "memory", "protocols", "scale", "full_size")
    jobs = benchmark.jobs_of(subject, parts, repeats=2, budget_gb=3.0, recipe=Path("evaluate.py"), options=())
    results = benchmark.measure(jobs, 1.5, lambda found: written.append(copy.deepcopy(found)))
    assert set(results) == {*parts, "failed"} and results["failed"] == {
        "protocols.vilouras": "it was stopped after 9 s"
    }
    assert set(results["protocols"]) == {"ours", "dombrowski"} and results["paper"] == row | {"nothing": None}
    assert results["memory"]["memory_50_over_1"] == 50
    assert limits == pytest.approx([90 / (len(jobs) - done) for done in range(len(jobs))], abs=1)
    assert [len(found) for found in written] == [2, 3, 4, 4, 5, 5, 5, 6, 7] and written[-1] == results


def test_the_pass_at_full_size_records_two_tokens_of_each_image(sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded, sizes = [], []

    def spied(unet: Any, *, reduce: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        recorded.append(reduce)
        return record_attention(unet, reduce=reduce)

    def small(**options: Any) -> Any:
        sizes.append(options)
        return sd.denoiser

    monkeypatch.setattr(benchmark_memory, "UNet2DConditionModel", small)
    monkeypatch.setattr(benchmark_memory, "record_attention", spied)
    found = [benchmark_memory.full_size_pass(2, records, torch.float32) for records in (True, False)]
    assert len(recorded) == 1, "only where it is asked for"
    probabilities = torch.rand(2, 3, 5, 77)
    torch.testing.assert_close(recorded[0](probabilities), probabilities[..., [5, 9]].mean(dim=1))
    assert sizes == [{"sample_size": 64, "cross_attention_dim": 768}] * 2, "SD 1.5; all else is the class's default"
    count = sum(p.numel() for p in sd.denoiser.parameters())
    assert all(row["parameters"] == count and row["peak_gb"] >= row["loaded_gb"] > 0 for row in found)


def test_the_largest_batch_is_by_what_each_further_image_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(function: Any, batch: int, records: bool, dtype: torch.dtype) -> dict[str, float]:
        assert function is benchmark_memory.full_size_pass and dtype is torch.bfloat16
        return {"parameters": 7, "seconds": batch + records / 2, "peak_gb": 3 + 2 * batch + records}

    monkeypatch.setattr(benchmark_memory, "in_fresh_process", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark_memory.full_size(13.5, torch.bfloat16) == {
        "parameters": 7, "seconds_plain": 1, "seconds_recorded": 1.5, "peak_gb_plain": 5, "peak_gb_recorded": 6,
        "gb_per_further_image": 2, "largest_batch_at_13.5_gb": 4,
    }  # fmt: skip
    assert benchmark_memory.full_size(2, torch.bfloat16)["largest_batch_at_2_gb"] == 0

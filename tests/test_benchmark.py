"""The cost of recording is that of passes after the first, compared turn by turn."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from recipe import recipe_module
from sklearn.metrics import roc_auc_score
from tiny import save_tiny

from distill.attention.heat_maps import aggregate
from distill.attention.recording import attention_layers, record_attention
from distill.cli import parse
from distill.config import BaseConfig, FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.data_config import PhantomData
from distill.errors import UserError
from distill.evaluation.protocols import ddim_timesteps, prepare_inputs, queries
from distill.experiment import benchmark_localization as benchmark
from distill.experiment import benchmark_memory, fresh_process
from distill.experiment.benchmark_memory import forward_inputs
from distill.metrics import macro_mean_interval
from distill.models.family import Model
from distill.tokens import find_words, token_spans

PEER = "attention_map_diffusers"


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


def test_ours_and_the_papers_way_are_judged_on_the_same_pairs(sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of known numbers, at two sizes; the AUC of each is computed again by scikit-learn."""
    dataset = PhantomDataset("test", 8, 0, 64)
    config = FullEvaluation(localization_images=3, batch_size=2, seed=4, bootstrap_samples=50, timesteps=(100, 250))
    asked, seen = queries(dataset, sd, config), []
    assert len(asked) == 3 and sum(len(query.findings) for query in asked) > 3
    drawn = {
        name: [torch.rand(8, side, side, generator=torch.Generator().manual_seed(side + i)) for i in range(8)]
        for name, side in (("ours", 8), ("paper", 64))
    }

    def maps_of(name: str, inputs: Any) -> torch.Tensor:
        seen.append((name, inputs.images))
        return torch.stack([drawn[name][image] for image in inputs.images])

    def ours(inputs: Any, given: FullEvaluation, recorder: Any) -> tuple[torch.Tensor, None]:
        assert given.timesteps == (100, 250) and recorder.cross.reduce == inputs.reduce
        return maps_of("ours", inputs), None

    times = iter([8.0, 40.0, 3.0, 60.0])  # of two images and of one
    monkeypatch.setattr(benchmark, "ours", ours)
    monkeypatch.setattr(benchmark, "paper_way", lambda inputs, given: maps_of("paper", inputs))
    monkeypatch.setattr(benchmark, "seconds_of", lambda call, device: (call(), next(times)))
    found = benchmark.against_paper(sd, dataset, config, torch.device("cpu"))
    first, last = tuple(q.image for q in asked[:2]), (asked[2].image,)
    assert seen == [("ours", first), ("ours", first), ("paper", first), ("ours", last), ("paper", last)], "one warm-up"

    areas: dict[str, list[float]] = {"ours": [], "paper": []}
    pairs = [(query, place, finding) for query in asked for place, finding in enumerate(query.findings)]
    for query, place, finding in pairs:
        (mask,) = [r.mask for r in dataset[query.image].regions if r.finding == dataset.findings[finding]]
        for name, values in areas.items():
            own = drawn[name][query.image][None, None, 4 + place]
            large = torch.nn.functional.interpolate(own, (64, 64), mode="bilinear", align_corners=False)
            values.append(roc_auc_score(mask.flatten(), large.flatten()))
    findings, images = [finding for *_, finding in pairs], [query.image for query, *_ in pairs]
    assert (found["images"], found["pairs"], found["batch_size"]) == (3, len(pairs), 2)
    assert found["timesteps"] == [100, 250] and found["layers"] == attention_layers(sd.denoiser)
    for name, values in areas.items():
        means = [np.mean([v for v, f in zip(values, findings, strict=True) if f == g]) for g in set(findings)]
        assert found[f"auc_{name}"] == pytest.approx(np.mean(means), abs=1e-6), name
        interval = macro_mean_interval(values, findings, images, 50, 4)
        assert found[f"auc_{name}_ci"] == pytest.approx(list(interval or ()), abs=1e-6)
    gap = [a - b for a, b in zip(areas["ours"], areas["paper"], strict=True)]
    interval = macro_mean_interval(gap, findings, images, 50, 4)
    assert found["auc_difference_ci"] == pytest.approx(list(interval or ()), abs=1e-6)
    assert (found["seconds_ours"], found["seconds_paper"], found["speedup_vs_paper"]) == (3.5, 40.0, 40 / 3.5)


def test_one_image_gives_no_interval_and_only_the_chosen_layers_are_recorded(
    sd: Model, phantoms: PhantomDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FullEvaluation(localization_images=1, layers=("up_blocks",), timesteps=(100,))
    recorded, real = [], benchmark.ours

    def ours(inputs: Any, given: FullEvaluation, recorder: Any) -> Any:
        found = real(inputs, given, recorder)
        recorded.append(set(recorder.cross.sizes))
        return found

    monkeypatch.setattr(benchmark, "ours", ours)
    monkeypatch.setattr(benchmark, "paper_way", lambda inputs, given: torch.rand(1, 8, 64, 64))
    found = benchmark.against_paper(sd, phantoms, config, torch.device("cpu"))
    layers = attention_layers(sd.denoiser, "up_blocks")
    assert found["layers"] == layers != attention_layers(sd.denoiser) and found["images"] == 1
    assert recorded == [set(layers)] * 2
    assert all(found[f"auc_{key}_ci"] is None for key in ("ours", "paper", "difference"))


def test_the_peer_is_asked_for_the_same_words_in_turns(sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that gives our own maps, one layer's with an error of .25."""
    asked: list[Any] = []

    class Capture:
        def __init__(self, pipeline: Any, *, relations: str, tokens: list[int], **options: Any) -> None:
            asked.append((pipeline is sd.pipeline, relations, tuple(tokens), options))

        def __enter__(self) -> Capture:
            return self

        def __exit__(self, *_: object) -> None: ...

        def compute(self) -> list[Any]:
            apart = {name: 0.25 * (place == 1) for place, name in enumerate(ours)}
            return [
                SimpleNamespace(layer_id=f"unet.{name}", data=(m + apart[name]).double()[..., None])
                for name, m in ours.items()
            ]

    ours: dict[str, torch.Tensor] = {}
    real = benchmark.record_attention

    @contextmanager
    def recorded(denoiser: Any, *, reduce: Any) -> Any:
        with real(denoiser, reduce=reduce) as maps:
            yield maps
        ours.update(maps.by_layer)

    batches = []
    times = iter([9.0, 9.0, 9.0, 9.0] * 2 + [2.0, 3.0, 5.0, 4.0, 4.0, 6.0, 10.0, 7.0])
    monkeypatch.setattr(benchmark, "record_attention", recorded)
    monkeypatch.setattr(benchmark, "seconds_of", lambda call, device: (call(), next(times)))
    monkeypatch.setattr(benchmark, "_has_peer", lambda: True)
    module = SimpleNamespace(AttentionCapture=Capture, __version__="1.2")
    monkeypatch.setattr(benchmark, "importlib", SimpleNamespace(import_module=lambda name: {PEER: module}[name]))
    monkeypatch.setattr(benchmark, "forward_inputs", lambda *given: batches.append(given[1:]) or forward_inputs(*given))
    found = benchmark.overheads(sd, 2, 2, torch.device("cpu"))
    prompt = "There is a small pleural effusion and an edema, view 0."
    spans = [token_spans(sd.tokenizers[0], prompt, find_words(prompt, [w]), 77) for w in ("effusion", "edema")]
    tokens = tuple(int(span[0]) for span in spans)
    assert asked == [(True, "image->text", tokens, {}), (True, "image->text", tokens, {"mode": "exact"})] * 4
    assert batches == [(2, 8, torch.device("cpu"))]
    assert {m.shape[::2] for m in ours.values()} == {(2, 2)}, "two images, two words"
    assert found["seconds_plain"] == 3.0 and found["record_overhead"] == 0.5
    assert found["peer_overhead_by_mode"] == {"peer": 1.5, "peer exact": 0.875} and found["peer_overhead"] == 0.875
    assert found["peer_version"] == "1.2" and found["map_difference"] == pytest.approx(0.25, abs=1e-6)


def test_maps_of_two_words_are_recorded_without_the_peer(sd: Model) -> None:
    """The mean over heads of a word's tokens, whose probabilities a second recording gives in full."""
    with record_attention(sd.denoiser, reduce=lambda p: p) as full:
        sd.denoiser(**forward_inputs(sd.denoiser, 3, 8, torch.device("cpu")))
    assert {p.shape[0] for p in full.by_layer.values()} == {3}
    assert not benchmark._has_peer(), "the tests would run the peer's code"
    found = benchmark.overheads(sd, 3, 1, torch.device("cpu"))
    assert found["peer_version"] is None and found["batch_size"] == 3 and found["seconds_plain"] > 0


@pytest.mark.parametrize("gpu", [False, True])
def test_one_process_and_two_are_compared(gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    word = {1: {"auc": 0.75, "auc_ci": [0.5, 0.9]}, 2: {"auc": 0.7, "auc_ci": [0.5, 1.2]}}
    processes = {1: 1, 2: 2}

    def launched(command: list[str], *, env: Any, capture_output: bool, text: bool) -> Any:
        assert capture_output and text
        count = int(command[command.index("--num_processes") + 1])
        folder = Path(command[-1].removeprefix("--output_dir="))
        calls.append((command, env, folder))
        folder.mkdir()
        arm = {"localization": {"word": word[count], "images": 3}, "cost": {"localization_seconds": 12.0 / count**2}}
        (folder / "metrics.json").write_text(
            json.dumps({"provenance": {"processes": processes[count]}, "arms": {"base": arm}})
        )
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(benchmark.subprocess, "run", launched)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    found = benchmark.scale(Path("evaluate.py"), ["--some=option"], tmp_path)
    assert found == {
        "seconds_1": 12.0, "seconds_2": 3.0, "time_2_over_1": 0.25, "largest_difference": pytest.approx(0.3),
    }  # fmt: skip
    for count, (command, env, folder) in enumerate(calls, 1):
        assert folder == tmp_path / f"processes-{count}"
        assert command == [
            sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count), "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1",
            *(["--multi_gpu"] if count == 2 else []), "evaluate.py", "--some=option", f"--output_dir={folder}",
        ]  # fmt: skip
        assert env["OMP_NUM_THREADS"] == "1" and env["PYTHONPATH"].split(os.pathsep) == sys.path
        assert env.get("ACCELERATE_USE_CPU") == (None if gpu else "true") and env["PATH"] == os.environ["PATH"]
    processes[2] = 1
    (tmp_path / "again").mkdir()
    with pytest.raises(RuntimeError, match="1 processes ran, and 2 were asked for"):
        benchmark.scale(Path("evaluate.py"), [], tmp_path / "again")
    failed = SimpleNamespace(returncode=1, stderr="x" * 3000 + "the end")
    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(UserError, match=r"--output_dir=\S+ failed:\nx{1993}the end$"):
        benchmark.scale(Path("evaluate.py"), [], tmp_path)


def test_each_part_is_measured_on_the_model_and_the_data_of_the_subject(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, base = PhantomData(resolution=64, test_size=5), BaseConfig(name=str(save_tiny(tmp_path / "sd", "sd")))
    evaluation, seen = FullEvaluation(batch_size=3), []
    clock = iter([1.0, 8.5])

    def localized(model: Model, dataset: Any, config: FullEvaluation, **options: Any) -> dict[str, Any] | None:
        seen.append((model, len(dataset), config, options))
        return {"word": 1} if config.protocol == "ours" else None

    monkeypatch.setattr(benchmark, "overheads", lambda *given: given)
    monkeypatch.setattr(benchmark, "against_paper", lambda *given: given)
    monkeypatch.setattr(benchmark, "localization", localized)
    subject = benchmark.Subject(base, None, data, evaluation, tmp_path / "out")
    opened, *rest = subject.overhead(7)  # type: ignore[misc]
    assert rest == [3, 7, torch.device("cpu")] and not opened.denoiser.training
    assert not any(p.requires_grad for module in opened.modules() for p in module.parameters())
    monkeypatch.setattr(benchmark.Subject, "open", lambda self: (opened, Accelerator()))
    _, dataset, config, device = subject.paper()  # type: ignore[misc]
    assert (dataset.split, len(dataset), config, device) == ("test", 5, evaluation, torch.device("cpu"))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    assert subject.protocol("ours") == {"word": 1, "seconds": 7.5}
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: 0.0)
    assert subject.protocol("dombrowski") is None
    for name, (model, count, config, options) in zip(("ours", "dombrowski"), seen, strict=True):
        assert config == evaluation.model_copy(update={"protocol": name}) and count == 5
        assert options.pop("accelerator").device == torch.device("cpu") and model is opened
        assert options == {"arm_dir": tmp_path / "out" / name, "label": name}


def test_jobs_are_the_parts_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = benchmark.Subject(BaseConfig(), "a run", PhantomData(), FullEvaluation(), Path("out"))
    options: dict[str, Any] = {"repeats": 2, "budget_gb": 3.0, "recipe": Path("evaluate.py"), "options": ("--a=1",)}
    every = {
        "overhead": {"overhead": (subject.overhead, (2,))},
        "paper": {"paper": (subject.paper, ())},
        "memory": {
            f"memory.steps_{n}": (benchmark_memory.memory_of_steps, (BaseConfig(), "a run", n)) for n in (1, 50)
        },
        "protocols": {f"protocols.{name}": (subject.protocol, (name,)) for name in benchmark.PROTOCOLS},
        "scale": {"scale": (benchmark.scale, (Path("evaluate.py"), ("--a=1",), Path("out")))},
        "full_size": {"full_size": (benchmark_memory.full_size, (3.0, torch.float32))},
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for part, jobs in every.items():
        assert benchmark.jobs_of(subject, [part], **options) == jobs, part
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert benchmark.jobs_of(subject, ["full_size"], **options) == every["full_size"] | {
        "full_size_bf16": (benchmark_memory.full_size, (3.0, torch.bfloat16))
    }


def test_a_pass_is_timed_when_the_gpu_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [5.0]

    def waits(seconds: float) -> str:
        clock[0] += seconds
        return "its result"

    monkeypatch.setattr(benchmark_memory.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waits(30.0))
    assert benchmark_memory.seconds_of(lambda: waits(2.0), torch.device("cpu")) == ("its result", 2.0)
    assert benchmark_memory.seconds_of(lambda: waits(2.0), torch.device("cuda")) == ("its result", 32.0)


def test_inputs_of_a_pass_are_the_same_every_time(sd: Model) -> None:
    one, other = (forward_inputs(sd.denoiser, 3, 6, torch.device("cpu")) for _ in range(2))
    shapes = {key: tuple(value.shape) for key, value in one.items()}
    assert shapes == {"sample": (3, 4, 6, 6), "timestep": (), "encoder_hidden_states": (3, 77, 16)}
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert int(one["timestep"]) == 500 and torch.equal(
        one["sample"], torch.randn((3, 4, 6, 6), generator=torch.Generator().manual_seed(0))
    )


def test_memory_is_that_of_four_guided_images_with_all_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = BaseConfig(name=str(save_tiny(tmp_path / "sd", "sd")))
    guided, real = [], benchmark_memory.record_pipeline

    @contextmanager
    def recorded(pipe: Any, prompts: list[str]) -> Any:
        with real(pipe, prompts) as maps:
            yield maps
        guided.append((pipe.guidance_scale, len(prompts), len(maps.names[0])))

    monkeypatch.setattr(benchmark_memory, "record_pipeline", recorded)
    monkeypatch.setattr(benchmark_memory, "peak_memory_gb", lambda: 1.25)
    found = benchmark_memory.memory_of_steps(base, None, 3)
    assert (found["passes"], found["peak_gb"]) == (3, 1.25)
    ((scale, images, columns),) = guided
    assert (scale, images) == (4.0, 4)
    # In fp32, three layers at 8 x 8 and one at 4 x 4, without the rows of the empty prompt; however many the steps.
    assert found["held_bytes"] == 4 * (3 * 8 * 8 + 4 * 4) * images * columns


def test_a_gpu_runs_the_largest_batch_after_a_warm_pass(sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(function: Any, batch: int, records: bool, dtype: torch.dtype) -> dict[str, float]:
        return {"parameters": 7, "seconds": batch + records / 2, "peak_gb": 3 + 2 * batch + records}

    monkeypatch.setattr(benchmark_memory, "in_fresh_process", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = benchmark_memory.full_size(13.5, torch.bfloat16)
    assert {key: value for key, value in found.items() if "largest" in key} == {
        "largest_batch_at_13.5_gb": 4, "peak_gb_of_largest": 12, "seconds_of_largest": 4.5, "seconds_of_largest_plain": 4,
    }  # fmt: skip
    assert "seconds_of_largest" not in benchmark_memory.full_size(2, torch.bfloat16), "not one image fits"
    assert "seconds_of_largest" in benchmark_memory.full_size(6, torch.bfloat16), "one does"


def test_the_part_scale_measures_the_same_base_data_and_maps(tmp_path: Path) -> None:
    recipe, evaluate = recipe_module("benchmark_localization"), recipe_module("evaluate")
    argv = ["--data.resolution", "64", "--data.seed", "7", "--data.test_size", "9", "--evaluation.timesteps", "[20,30]"]
    argv += [
        "--evaluation.layers",
        "[up_blocks]",
        "--evaluation.localization_images",
        "5",
        "--base.caption_chunks",
        "2",
    ]
    config = parse(recipe.BenchmarkLocalizationConfig, [*argv, "--output_dir", str(tmp_path / "out")])
    given = parse(evaluate.EvaluateConfig, recipe.scale_options(config))
    assert given.base == config.base and given.data == config.data
    assert config.evaluation.model_dump().items() <= given.evaluation.model_dump().items()
    assert (given.evaluation.generated_images, given.evaluation.num_inference_steps) == (1, 1)

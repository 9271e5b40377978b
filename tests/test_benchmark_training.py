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
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from full_size import full_size
from recipe import ROOT, config_class_of, recipe_module
from tiny import save_tiny, tiny_tokenizer
from torch.profiler import ProfilerActivity

from distill.cli import parse
from distill.errors import UserError
from distill.experiment import benchmark_training, fresh_process
from distill.experiment.arms import Arm
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


def plan_of(base: Path, folder: Path, **options: Any) -> Any:
    """The recipe's configuration on tiny phantoms."""
    few = {
        "base": {"name": str(base)},
        "data": {
            "kind": "phantom",
            "resolution": 64,
            "train_size": 40,
            "validation_size": 1,
            "test_size": 4,
            "cache_dir": str(folder),
        },
        "trainer": {"batch_size": 2, "tracker": "none", "learning_rate": 3e-4, "log_every_steps": 50},
        "lora": {"rank": 2, "alpha": 2},
        "turns": 2,
        "steps": 4,
        "warm_up_steps": 3,
        "output_dir": str(folder / "out"),
    }
    return recipe_module("benchmark_training").BenchmarkTrainingConfig(**(few | options))


def test_accumulated_steps_are_refused_as_the_peers_take_one_batch_a_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps is 2, and a step of .* is one batch"):
        plan_of(tmp_path, tmp_path, trainer={"batch_size": 2, "gradient_accumulation_steps": 2})


def test_an_average_of_the_weights_is_refused_as_the_peers_keep_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ema_decay is 0.5, and diffusers' loop here keeps no average"):
        plan_of(tmp_path, tmp_path, trainer={"batch_size": 2, "ema_decay": 0.5})


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("plan")
    return plan_of(save_tiny(folder / "sd", "sd"), folder)


@pytest.fixture
def bench(plan: Any, tmp_path: Path) -> benchmark_training.Bench:
    return benchmark_training.Bench(plan, plan.base, tmp_path)


def test_a_turn_is_trained_as_the_recipes_train(bench: benchmark_training.Bench) -> None:
    kinds = recipe_module("benchmark_training").kinds(bench.config.lora)
    found = {name: bench.trainer(training) for name, training in kinds.items()}
    changed = {"max_steps": 7, "log_every_steps": 3, "keep_last_state_gb": 0.0}
    for name, trainer in found.items():
        cached = {"cache_text_embeddings": name in ("lora", "full")}
        assert trainer.model_dump() == bench.config.trainer.model_dump() | changed | cached, name
    needs_tokens = kinds["distilled"].model_copy(update={"text_encoder": "frozen"})
    assert needs_tokens.method.needs_tokens and not bench.trainer(needs_tokens).cache_text_embeddings


def test_the_peers_get_the_same_images_and_a_model_of_their_own(
    bench: benchmark_training.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    class Peer:
        def __init__(self, model: Any, rows: Any, trainer: Any, accelerator: Any, rank: int | None) -> None:
            made.append((model, rows, trainer, accelerator, rank))

        def turn(self, *arguments: Any) -> Any:
            return arguments

    monkeypatch.setattr(benchmark_training, "DiffusersTraining", Peer)
    kinds = recipe_module("benchmark_training").kinds(bench.config.lora)
    bench.open({"lora": kinds["lora"]})
    bench.open({"full": kinds["full"]}, base=bench.config.base)
    assert list(bench.arms) == ["lora", "full"]
    run, arm = bench.arms["full"]
    assert arm.folder == bench.scratch / "run" / "full" and arm.training == kinds["full"]
    assert arm.trainer == bench.trainer(kinds["full"]) and arm.name == "full"
    assert arm.evaluation == bench.own.evaluation.full() and run.config.output_dir == str(bench.scratch / "run")
    bench.open_peers()
    assert list(bench.peers) == ["diffusers_lora", "diffusers_full"]
    first = bench.arms["lora"][0]
    assert first.train is not None
    for model, rows, trainer, accelerator, _ in made:
        assert trainer == bench.config.trainer and accelerator is first.accelerator
        assert len(rows) == 16, "eight batches are enough"
        for place, (pixels, caption) in enumerate(rows):
            assert torch.equal(pixels, first.train[place].pixel_values) and caption == first.train.caption(place)
        assert list(model.denoiser.config.block_out_channels) == [8, 16]
    assert made[0][0] is not made[1][0] and [entry[-1] for entry in made] == [2, None]
    assert bench.turn("diffusers_lora") == (3, 4, "diffusers_lora")
    bench.config = bench.config.model_copy(
        update={"trainer": bench.config.trainer.model_copy(update={"batch_size": 6})}
    )
    del bench.arms["lora"], bench.peers["diffusers_lora"]
    bench.open_peers()
    assert len(made) == 3 and len(made[2][1]) == 40 and list(bench.peers) == ["diffusers_full"], "all there are"


def test_a_smaller_denoiser_lacks_the_middle_block_and_knows_the_whole(bench: benchmark_training.Bench) -> None:
    smaller = recipe_module("benchmark_training").kinds_of_smaller()
    benchmark_training.open_smaller(bench, smaller)
    run, arm = bench.arms["compressed"]
    assert set(bench.arms) == set(smaller) and arm.training.method.references == ("whole",)
    assert run.load("whole").denoiser.mid_block is not None
    assert benchmark_training.load_model(run.base).denoiser.mid_block is None
    assert (run.base.frozen_dtype, run.base.name) == (bench.own.base.frozen_dtype, str(bench.scratch / "smaller"))


def test_the_seconds_of_a_turn_are_those_after_the_warm_up(
    bench: benchmark_training.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def fit(run: Any, arm: Any, folder: Path) -> None:
        assert (run, arm) == ("the run", "the arm")
        folders.append(folder)
        rows = [{"step": 3, "seconds": 100.0}, {"step": 6, "seconds": 109.0}, {"step": 7, "seconds": 110.0}]
        (folder / "train_log.jsonl").write_text("\n".join(map(json.dumps, rows)))

    monkeypatch.setattr(benchmark_training, "fit_arm", fit)
    bench.arms["lora"] = ("the run", "the arm")  # type: ignore[assignment]
    assert bench.turn("lora") == 2.5
    assert folders[0].parent == bench.scratch and not folders[0].exists()


def test_all_kinds_and_peers_take_turns(bench: benchmark_training.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"lora": [4.0, 2.0], "diffusers_lora": [8.0, 10.0]}
    left, order, known = copy.deepcopy(seconds), [], []
    monkeypatch.setattr(bench, "open_peers", lambda: bench.peers.update(diffusers_lora=None))
    monkeypatch.setattr(bench, "turn", lambda name: order.append(name) or left[name].pop(0))
    monkeypatch.setattr(
        benchmark_training, "write_json", lambda path, found: known.append((path, copy.deepcopy(found)))
    )
    bench.arms["lora"] = None  # type: ignore[assignment]
    found = benchmark_training.speed(bench, bench.scratch / "partial.json")
    assert order == ["lora", "diffusers_lora"] * 2
    assert found == {
        "lora": {"seconds_a_step": 3.0, "images_a_second": 2 / 3.0, "turns": seconds["lora"]},
        "diffusers_lora": {"seconds_a_step": 9.0, "images_a_second": 2 / 9.0, "turns": seconds["diffusers_lora"]},
    }
    assert [len(entry) for _, entry in known] == [1, 2, 2, 2] and known[-1] == (bench.scratch / "partial.json", found)
    assert known[0][1]["lora"]["turns"] == [4.0]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shares_are_of_the_labelled_time_without_the_text_in_forward(
    device: str, bench: benchmark_training.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a part that several events have, such as its own and that of the GPU, the longest counts."""
    other, chosen, fitted = ("device", "cpu")[:: 1 if device == "cpu" else -1], [], []
    times = {"data": 10.0, "forward": 50.0, "text": 20.0, "backward": 15.0, "optimizer": 5.0, "aten::mm": 900.0}
    events = [SimpleNamespace(key=key, cpu_time_total=value, device_time_total=value) for key, value in times.items()]
    events += [SimpleNamespace(key="backward", **{f"{device_}_time_total": value for device_, value in
                                                  zip(other, (1e6, 7.0), strict=True)})]  # fmt: skip

    @contextmanager
    def profiled(activities: Any) -> Any:
        chosen.extend(activities)
        yield SimpleNamespace(key_averages=lambda: events)

    monkeypatch.setattr(benchmark_training, "profile", profiled)
    monkeypatch.setattr(benchmark_training, "fit_arm", lambda *arguments: fitted.append(arguments))
    run: Any = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device(device)))
    bench.arms["lora"] = (run, "the arm")  # type: ignore[assignment]
    found = benchmark_training.shares(bench, "lora")
    assert found == pytest.approx(
        {"data": 0.125, "text": 0.25, "forward": 0.375, "backward": 0.1875, "optimizer": 0.0625, "log": 0.0}
    )
    both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    assert chosen == both[: 1 + (device == "cuda")] and fitted[0][:2] == (run, "the arm")
    assert fitted[0][2].parent == bench.scratch
    events.clear()
    assert set(benchmark_training.shares(bench, "lora").values()) == {0.0}


def test_operations_of_a_step_are_those_that_a_second_step_adds(
    bench: benchmark_training.Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def fit(run: Any, arm: Any, folder: Path) -> None:
        assert run == "the run" and folder.parent == bench.scratch
        trained.append(arm.trainer)
        for _ in range(5 + arm.trainer.max_steps):  # five of the set-up
            torch.zeros(2, 3) @ torch.zeros(3, 4)

    monkeypatch.setattr(benchmark_training, "fit_arm", fit)
    warm = bench.config.trainer.model_copy(update={"warmup_steps": 9})
    bench.arms["lora"] = ("the run", Arm("lora", bench.scratch, Training(), warm, bench.own.evaluation.full()))  # type: ignore[assignment]
    assert benchmark_training.flops_a_step(bench, "lora") == 2 * 2 * 3 * 4
    assert [(t.max_steps, t.warmup_steps, t.log_every_steps) for t in trained] == [(1, 0, 1), (2, 0, 1)]


@pytest.mark.parametrize(
    ("device", "mixed_precision", "size"), [("cpu", "no", 1024), ("cuda", "bf16", 8192), ("cuda", "fp16", 8192)]
)
def test_the_speed_of_a_product_is_that_of_ten_after_three(
    device: str, mixed_precision: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product here takes 2 s, but each of the first three 50 s; a GPU's clock is read when it has done all of
    them."""
    clock, products, made, waited = [0.0], [0], [], []

    class Matrix:
        def __matmul__(self, other: Any) -> None:
            products[0] += 1
            clock[0] += 50 if products[0] <= 3 else 2

    monkeypatch.setattr(torch, "randn", lambda *shape, **options: made.append((shape, options)) or Matrix())
    monkeypatch.setattr(benchmark_training, "synchronize", lambda on: waited.append((on, products[0])))
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed_precision]
    on = torch.device(device)
    assert benchmark_training.peak_flops(on, mixed_precision) == 10 * 2 * size**3 / 20
    assert made == [((size, size), {"device": on, "dtype": dtype})] * 2 and waited == [(on, 3), (on, 13)]


def a_launcher(path: Path, then: str) -> str:
    """In place of python: writes its options and PYTHONPATH beside itself, and does something with $folder."""
    path.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" "$PYTHONPATH" $$ > {path}.said\n'
        f'for last; do :; done\nfolder="${{last#--output_dir=}}"\n{then}\n'
    )
    path.chmod(0o755)
    return str(path)


def test_the_first_step_is_timed_from_the_command_which_ends_then(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = 'mkdir -p "$folder/model"; : > "$folder/model/train_log.jsonl"; sleep .3; echo 1 > "$folder/model/train_log.jsonl"'
    monkeypatch.setattr(sys, "executable", a_launcher(tmp_path / "launcher", f"{log}; sleep 600"))
    began = time.perf_counter()
    seconds = benchmark_training.first_step_seconds(plan, plan.base, tmp_path, 60.0)
    assert 0.3 <= seconds <= time.perf_counter() - began
    again = benchmark_training.first_step_seconds(plan, plan.base, tmp_path, 60.0)
    assert again >= 0.3, "the log of an earlier launch does not count"
    *command, path, pid = (tmp_path / "launcher.said").read_text().splitlines()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert path == os.pathsep.join(sys.path)
    assert command[:6] == ["-m", "accelerate.commands.accelerate_cli", "launch", "--quiet", "--num_processes", "1"]
    assert command[6] == str(ROOT / "recipes" / "finetune.py")
    config = parse(config_class_of(recipe_module("finetune")), command[7:])
    assert (config.base.name, config.output_dir) == (plan.base.name, str(tmp_path / "first"))
    assert (config.trainer.max_steps, config.trainer.log_every_steps, config.trainer.batch_size) == (2, 1, 2)
    assert (config.evaluation.generated_images, config.evaluation.localization_images) == (1, 1)


def test_a_command_that_does_not_come_to_its_first_step_is_told(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "a" * 990 + " cannot open it"
    monkeypatch.setattr(sys, "executable", a_launcher(tmp_path / "fails", f'echo "{long}" >&2; exit 3'))
    with pytest.raises(UserError, match=f"has not come to its first step: {long[-999:]}\n$"):
        benchmark_training.first_step_seconds(plan, plan.base, tmp_path, 60.0)
    monkeypatch.setattr(sys, "executable", a_launcher(tmp_path / "hangs", "sleep 600"))
    with pytest.raises(UserError, match="first step: $"):
        benchmark_training.first_step_seconds(plan, plan.base, tmp_path, 0.2)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "hangs.said").read_text().split()[-1]), 0)


def test_the_memory_of_a_kind_is_that_of_a_turn(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(benchmark_training.Bench, "open", lambda self, trainings: done.append(trainings))
    monkeypatch.setattr(benchmark_training.Bench, "open_peers", lambda self: done.append("peers"))
    monkeypatch.setattr(benchmark_training.Bench, "turn", lambda self, name: done.append((name, self.scratch.is_dir())))
    monkeypatch.setattr(benchmark_training, "peak_memory_gb", lambda: done.append("read") or 1.5)
    training = Training()
    assert benchmark_training.peak_of(plan, plan.base, "lora", training) == 1.5
    assert benchmark_training.peak_of(plan, plan.base, "diffusers_full", training) == 1.5
    assert done == [
        {"lora": training}, ("lora", True), "read",
        {"full": training}, "peers", ("diffusers_full", True), "read",
    ]  # fmt: skip


def test_the_environment_names_a_gpu_with_its_memory(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(benchmark_training, "provenance", lambda: {"device": "a chip"})
    monkeypatch.setattr(benchmark_training, "peak_flops", lambda *arguments: asked.append(arguments) or 1.2345e12)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    expected = {"device": "a chip", "torch": torch.__version__, "flops_a_second_of_a_product": "1.23e+12"}
    assert benchmark_training.environment(plan) == expected
    monkeypatch.setattr(benchmark_training, "Accelerator", lambda: SimpleNamespace(device=gpu))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80.4e9))
    assert benchmark_training.environment(plan) == expected | {"device": "a chip, 80 GB"}
    assert asked == [(cpu, "no"), (gpu, "no")]


def test_shares_of_all_open_kinds_are_written_as_they_come(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, written = [], []
    run = SimpleNamespace(accelerator=SimpleNamespace(device=torch.device("cpu")))
    monkeypatch.setattr(
        benchmark_training.Bench, "open", lambda self, kinds: self.arms.update({k: (run, k) for k in kinds})
    )
    monkeypatch.setattr(
        benchmark_training,
        "open_smaller",
        lambda bench, kinds: opened.append(kinds) or bench.arms.update(pruned=(run, "")),
    )
    monkeypatch.setattr(benchmark_training, "shares", lambda bench, name: {"forward": len(name)})
    monkeypatch.setattr(benchmark_training, "flops_a_step", lambda bench, name: -len(name))
    monkeypatch.setattr(benchmark_training, "peak_flops", lambda device, precision: (device.type, precision))
    monkeypatch.setattr(benchmark_training, "speed", lambda bench, partial: (set(bench.arms), partial))
    monkeypatch.setattr(benchmark_training, "write_json", lambda path, found: written.append((path, set(found))))
    kinds, smaller, partial = {"lora": Training()}, {"pruned": Training()}, tmp_path / "partial.json"
    found = benchmark_training.shares_part(plan, plan.base, kinds, smaller, partial)
    entry = {name: {"shares": {"forward": len(name)}, "flops_a_step": -len(name)} for name in ("lora", "pruned")}
    assert found == {"kinds": entry, "flops_a_second_of_a_product": ("cpu", "no")}
    assert written == [(partial, {"lora"}), (partial, {"lora", "pruned"})] and opened == [smaller]
    assert benchmark_training.speed_part(plan, plan.base, kinds, {}, partial) == {"kinds": ({"lora"}, partial)}
    assert opened == [smaller]


def test_a_whole_measurement_adds_shares_and_the_first_step(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, written = [], []

    def fresh(function: Any, *arguments: Any, limit_s: float) -> Any:
        name = function.__name__
        asked.append(name if name != "peak_of" else arguments[2:])
        if name == "peak_of":
            return 2.0 + len(arguments[2])
        if name == "speed_part":
            return {"kinds": {"lora": {"seconds_a_step": 4.0}, "diffusers_lora": {"seconds_a_step": 8.0}}}
        if name == "shares_part":
            kinds = {"lora": {"flops_a_step": 200.0}, "full": {"flops_a_step": 10.0}}
            return {"kinds": kinds, "flops_a_second_of_a_product": 100.0}
        return {"device": "a chip"}

    def first(config: Any, base: Any, scratch: Path, limit_s: float) -> float:
        asked.append(("first", config is plan, base, scratch.is_dir(), 0 < limit_s <= 60 * plan.limit_minutes))
        return 7.5

    monkeypatch.setattr(fresh_process, "in_fresh_process", fresh)
    monkeypatch.setattr(benchmark_training, "first_step_seconds", first)
    kinds = {"lora": Training(), "full": Training(text_encoder="full")}
    measurement = benchmark_training.Measurement(plan, lambda found: written.append(copy.deepcopy(found)))
    results = measurement.run(kinds, {})
    assert asked == [
        "environment", "speed_part", *[("first", True, plan.base, True, True)] * 2,
        ("lora", kinds["lora"]), ("full", kinds["full"]),
        ("diffusers_lora", kinds["lora"]), ("diffusers_full", kinds["full"]), "shares_part",
    ]  # fmt: skip
    assert results == {
        "kinds": {
            "lora": {"seconds_a_step": 4.0, "peak_memory_gb": 6.0, "flops_a_step": 200.0, "flops_share": 0.5},
            "diffusers_lora": {"seconds_a_step": 8.0, "peak_memory_gb": 16.0},
            "full": {"peak_memory_gb": 6.0, "flops_a_step": 10.0},
            "diffusers_full": {"peak_memory_gb": 16.0},
        },
        "failed": {}, "environment": {"device": "a chip"}, "first_step_seconds": 7.5, "flops_a_second_of_a_product": 100.0,
    }  # fmt: skip
    assert len(written) == 8 and written[-1] == results and written[2]["first_step_seconds"] == 7.5
    asked.clear()

    def fails(*arguments: Any) -> float:
        raise UserError("finetune.py has not come to its first step")

    monkeypatch.setattr(benchmark_training, "first_step_seconds", fails)
    few = benchmark_training.Measurement(plan.model_copy(update={"parts": ("start",)}), written.append).run(kinds, {})
    assert few["failed"] == {"start": "finetune.py has not come to its first step"} and asked == ["environment"]
    assert written[-1] is few


def test_what_a_failed_part_had_written_is_taken_once(plan: Any, tmp_path: Path) -> None:
    measurement, partial = benchmark_training.Measurement(plan, lambda found: None), tmp_path / "partial.json"
    write_json(partial, {"lora": {"seconds_a_step": 2.0}})
    measurement._add(None, partial)
    assert measurement.results["kinds"] == {"lora": {"seconds_a_step": 2.0}} and not partial.exists()


def test_a_random_base_is_stable_diffusion_at_full_size(
    plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(benchmark_training, "load_model", lambda base: SimpleNamespace(tokenizers=[tokenizer]))
    with torch.device("meta"):
        made = benchmark_training.random_sd15()
        known = full_size("sd15").pipeline
    assert made.tokenizer is tokenizer and made.safety_checker is None
    for part in ("unet", "vae", "scheduler"):
        ours, theirs = (dict(getattr(p, part).config) for p in (made, known))
        assert ours | {"_use_default_values": None} == theirs | {"_use_default_values": None}, part
    ours, theirs = (p.text_encoder.config.to_dict() for p in (made, known))
    size = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"}
    assert {key: ours[key] for key in size} == {key: theirs[key] for key in size}
    assert [ours[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [49406, 49407, 49407]
    saved = []
    stand_in = SimpleNamespace(save_pretrained=saved.append)
    monkeypatch.setattr(benchmark_training, "random_sd15", lambda: stand_in)
    with benchmark_training.base_of(plan, tmp_path) as base:
        assert base is plan.base and not saved
    with benchmark_training.base_of(plan.model_copy(update={"architecture": "sd15"}), tmp_path) as base:
        assert saved == [tmp_path / "sd15"] and base == plan.base.model_copy(update={"name": str(tmp_path / "sd15")})


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

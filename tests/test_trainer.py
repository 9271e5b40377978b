"""The training loop: what it visits, what it changes, what it leaves behind, and that it continues bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from fitting import (
    CHECKPOINT_FILES,
    Killed,
    LeastSquares,
    edit_facts,
    fresh_accelerator,
    kill_at,
    log_of,
    points,
    same,
    settings_of,
    state_of,
    train,
    without_time,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_sd
from torch import nn
from training import EXAMPLES, batch_of, context_of, distilling, example, prepared, set_up

from distill.config import DenoisingConfig, TrainerConfig
from distill.data.phantom.dataset import PhantomDataset
from distill.data.rows import TrainingRows
from distill.draws import generator_at
from distill.errors import UserError
from distill.methods.options import DenoisingOptions, TailPenaltyOptions
from distill.models import Model
from distill.trainer import StepSampler, _optimizer, fit, make_accelerator


def tiny(denoiser: Any = "full", text_encoder: Any = "full", seed: int = 0) -> Model:
    torch.manual_seed(0)
    return prepared(lambda: tiny_sd(seed=seed), denoiser, text_encoder)


def rows_of(model: Model) -> TrainingRows:
    return TrainingRows(PhantomDataset("train", 8, resolution=64), model)


# Order of data and noise


@given(length=st.integers(1, 40), batch=st.integers(1, 7), world=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_each_epoch_visits_each_index_once_whatever_the_number_of_ranks(
    length: int, batch: int, world: int, seed: int
) -> None:
    steps = math.ceil(3 * length / (batch * world))
    ranks = [list(StepSampler(length, batch, seed, rank, world, 0, steps)) for rank in range(world)]
    assert all(len(one) == batch for rank in ranks for one in rank)
    stream = [index for step in range(steps) for rank in ranks for index in rank[step]]
    for epoch in range(3):
        assert sorted(stream[epoch * length : (epoch + 1) * length]) == list(range(length))
    # One process with the global batch, or with any other batch size, sees the same stream.
    alone = [i for one in StepSampler(length, batch * world, seed, 0, 1, 0, steps) for i in one]
    assert stream == alone
    single = [i for one in StepSampler(length, 1, seed, 0, 1, 0, 3 * length) for i in one]
    assert stream[: 3 * length] == single


@given(first=st.integers(0, 30), seed=st.integers(0, 1000))
@settings(max_examples=25)
def test_a_sampler_that_starts_later_gives_the_rest(first: int, seed: int) -> None:
    whole = StepSampler(11, 3, seed, 1, 2, 0, 31)
    assert len(whole) == len(list(whole)) == 31
    assert list(StepSampler(11, 3, seed, 1, 2, first, 31)) == list(whole)[first:]


def test_order_differs_between_epochs_and_seeds() -> None:
    one, other = (list(StepSampler(32, 32, seed, 0, 1, 0, 2)) for seed in (0, 1))
    assert one[0] != one[1] and one[0] != other[0]


def test_noise_depends_on_seed_step_and_rank() -> None:
    places = [(seed, step, rank) for seed in (0, 1) for step in (0, 1) for rank in (0, 1)]
    draws = [tuple(torch.randn(4, generator=generator_at(*place)).tolist()) for place in places]
    assert len(set(draws)) == len(draws)
    assert draws == [tuple(torch.randn(4, generator=generator_at(*place)).tolist()) for place in places]


# What changes


@pytest.mark.parametrize("distilled", [False, True])
def test_frozen_means_frozen(tmp_path: Path, distilled: bool) -> None:
    """Bit for bit, after real optimizer steps with weight decay: text encoder, VAE, and all of the teacher."""
    model, teacher = tiny(text_encoder="frozen"), tiny(seed=1)
    frozen = [model.vae, *model.text_encoders, *teacher.modules()]
    before, denoiser = state_of(*frozen), state_of(model.denoiser)
    if distilled:
        with distilling(model, teacher) as method:
            result = train(method, tmp_path, rows_of(model), weight_decay=0.1)
    else:
        result = train(set_up(DenoisingOptions(), model), tmp_path, rows_of(model), weight_decay=0.1)
    assert same(state_of(*frozen), before)
    assert all(p.grad is None for module in frozen for p in module.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(state_of(model.denoiser), denoiser, strict=True))
    assert result.trainable_parameters == sum(p.numel() for p in model.denoiser.parameters())


def test_lora_changes_adapters_only(tmp_path: Path) -> None:
    model = tiny("lora", "lora")
    modules = nn.ModuleList([model.denoiser, *model.text_encoders, model.vae])
    before = {k: v.clone() for k, v in modules.state_dict().items()}
    with distilling(model, tiny(seed=1)) as method:
        train(method, tmp_path, rows_of(model), weight_decay=0.1)
    changed = {k for k, v in modules.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if ".lora_" in k}
    row = log_of(tmp_path)[-1]
    assert row.keys() == {"step", "loss", "denoising", "token_kl", "place_kl", "mass", "grad_norm", "lr", "seconds"}
    assert all(math.isfinite(value) for value in row.values())


def test_mixed_precision_keeps_trained_weights_in_float32(tmp_path: Path) -> None:
    model = tiny()
    objective = set_up(DenoisingOptions(), model)
    before = state_of(model.denoiser)
    train(objective, tmp_path, rows_of(model), max_steps=2, mixed_precision="bf16")
    assert all(p.dtype == torch.float32 for p in objective.parameters())
    assert not same(state_of(model.denoiser), before)


def test_accumulated_batches_give_the_step_of_one_large_batch(tmp_path: Path) -> None:
    small, large = LeastSquares(noise=0), LeastSquares(noise=0)
    train(small, tmp_path / "small", batch_size=2, gradient_accumulation_steps=2, max_steps=5)
    train(large, tmp_path / "large", batch_size=4, max_steps=5)
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(log_of(tmp_path / "small"), log_of(tmp_path / "large"), strict=True):
        assert (a["step"], a["lr"]) == (b["step"], b["lr"])
        assert math.isclose(a["loss"], b["loss"], rel_tol=1e-5)
        assert math.isclose(a["grad_norm"], b["grad_norm"], rel_tol=1e-5)


def test_each_parameter_group_has_its_learning_rate(tmp_path: Path) -> None:
    objective = LeastSquares()
    weight, bias = objective.linear.weight.clone(), objective.linear.bias.clone()
    groups = [{"params": [objective.linear.weight], "lr": 1e-2}, {"params": [objective.linear.bias], "lr": 1e-5}]
    config = settings_of(max_steps=1, weight_decay=0.0)
    accelerator = fresh_accelerator(config, tmp_path)
    arguments: dict[str, Any] = {"accelerator": accelerator, "output_dir": tmp_path, "seed": 0}
    fit(objective, points(), config, parameter_groups=groups, **arguments)
    # The first step of Adam is the learning rate, in the direction of the sign.
    torch.testing.assert_close(
        (objective.linear.weight - weight).abs(), torch.full_like(weight, 1e-2), rtol=1e-3, atol=0
    )
    torch.testing.assert_close((objective.linear.bias - bias).abs(), torch.full_like(bias, 1e-5), rtol=1e-2, atol=1e-7)
    with pytest.raises(ValueError, match="cover every trainable parameter"):
        fit(objective, points(), config, parameter_groups=groups[:1], **arguments)


def test_a_group_stays_as_it_is_after_its_last_step(tmp_path: Path) -> None:
    def trained(steps: int, until: int | None, folder: str, first: int | None = None) -> LeastSquares:
        objective = LeastSquares()
        for length in [*([first] if first else []), steps]:
            objective = LeastSquares()  # goes on from the checkpoint of the length before
            config = settings_of(max_steps=length, weight_decay=0.1, warmup_steps=0, lr_schedule="constant")
            linear = objective.linear
            groups = [{"params": [linear.weight], "lr": 1e-2}, {"params": [linear.bias], "lr": 1e-2, "until": until}]
            fit(
                objective, points(), config, parameter_groups=groups, seed=0, output_dir=tmp_path / folder,
                accelerator=fresh_accelerator(config, tmp_path / folder),
            )  # fmt: skip
        return objective

    two, six = trained(2, None, "two"), trained(6, None, "six")
    stopped, resumed = trained(6, 2, "stopped"), trained(6, 2, "resumed", first=4)
    assert torch.equal(stopped.linear.bias, two.linear.bias) and not torch.equal(two.linear.bias, six.linear.bias)
    assert not torch.equal(stopped.linear.weight, two.linear.weight)
    for a, b in zip(stopped.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    norms = [row["grad_norm"] for row in log_of(tmp_path / "stopped")]
    assert norms[:2] == [row["grad_norm"] for row in log_of(tmp_path / "six")][:2]
    assert log_of(tmp_path / "stopped")[2]["loss"] == log_of(tmp_path / "six")[2]["loss"]
    assert norms[2] < log_of(tmp_path / "six")[2]["grad_norm"]  # the gradient of the bias is no part of it


def test_the_optimizer_has_the_options_that_are_given() -> None:
    config = settings_of(learning_rate=0.25, weight_decay=0.125)
    optimizer = _optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], config, torch.device("cpu"))
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.25, (0.9, 0.999), 0.125)


def test_clipping_bounds_the_update_and_the_norm_before_it_is_logged(tmp_path: Path) -> None:
    """Adam divides by the gradient's size plus 1e-8, so that a norm of at most 1e-12 moves a weight by lr * 1e-4."""
    objective = LeastSquares()
    norms: list[float] = []
    objective.linear.weight.register_hook(lambda gradient: norms.append(float(gradient.norm())))
    before = state_of(objective)
    train(objective, tmp_path, max_grad_norm=1e-12, weight_decay=0.0)
    for a, b in zip(state_of(objective), before, strict=True):
        assert (a - b).abs().max() <= 4 * 1e-2 * 1.1e-4 + 1e-7
    for row, weight_norm in zip(log_of(tmp_path), norms, strict=True):
        assert math.isfinite(row["grad_norm"]) and row["grad_norm"] >= weight_norm > 0.1

    free = LeastSquares()
    train(free, tmp_path / "free", max_grad_norm=1e6, weight_decay=0.0)
    assert min((a - b).abs().max() for a, b in zip(state_of(free), before, strict=True)) > 1e-2


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.5, 1, 1, 1]), ("linear", [0.5, 1, 0.5, 0]), ("cosine", [0.5, 1, 0.5, 0])],
)
def test_learning_rate_warms_up_and_follows_the_schedule(tmp_path: Path, schedule: str, expected: list[float]) -> None:
    """The log has the rate of the next step; the first step has rate 0 with a warm-up."""
    train(LeastSquares(), tmp_path, lr_schedule=schedule, warmup_steps=2, gradient_accumulation_steps=2)
    assert [row["lr"] / 1e-2 for row in log_of(tmp_path)] == pytest.approx(expected)


def test_averaged_weights_are_what_is_left(tmp_path: Path) -> None:
    objective = LeastSquares()
    seen: list[list[torch.Tensor]] = []
    plain = LeastSquares()
    train(plain, tmp_path / "plain", on=lambda step: seen.append(state_of(plain)), max_steps=6, sample_every_steps=1)
    train(objective, tmp_path, max_steps=6, ema_decay=0.5)
    average = seen[0]
    for step, weights in enumerate(seen[1:], start=1):
        decay = min(0.5, 1 - (1 + step) ** -0.75)
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights, strict=True)]
    for parameter, expected, last in zip(objective.parameters(), average, seen[-1], strict=True):
        torch.testing.assert_close(parameter.detach(), expected)
        assert not torch.allclose(parameter, last)


def test_looks_see_the_averaged_weights_that_are_exported_and_the_training_does_not(tmp_path: Path) -> None:
    looking, plain = LeastSquares(dropout=0.5), LeastSquares(dropout=0.5)
    seen: list[list[torch.Tensor]] = []
    options = {"max_steps": 5, "ema_decay": 0.5}
    train(looking, tmp_path / "a", on=lambda step: seen.append(state_of(looking)), sample_every_steps=1, **options)
    train(plain, tmp_path / "b", **options)
    assert same(seen[-1], state_of(looking)) and same(state_of(looking), state_of(plain))
    for step, weights in enumerate(seen[:-1], start=1):
        exported = LeastSquares(dropout=0.5)
        train(exported, tmp_path / str(step), max_steps=step, ema_decay=0.5)
        assert same(weights, state_of(exported))


def scaler() -> torch.amp.GradScaler:
    """The first gradients overflow float16; afterwards the scale doubles after every second step."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**18, growth_interval=2)


def test_the_environment_does_not_change_the_accumulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    for steps in (1, 3):
        config = TrainerConfig(gradient_accumulation_steps=steps, tracker="none")
        assert make_accelerator(config, tmp_path).gradient_accumulation_steps == steps


def test_a_step_that_fp16_skips_does_not_move_the_schedule(tmp_path: Path) -> None:
    train(LeastSquares(), tmp_path, scaler=scaler(), lr_schedule="linear", warmup_steps=4, max_steps=12, ema_decay=0.5)
    rows = log_of(tmp_path)
    skipped = [row["grad_norm"] is None for row in rows]
    assert skipped[0] and not all(skipped)
    taken = 0
    for row, was_skipped in zip(rows, skipped, strict=True):
        taken += not was_skipped
        expected = taken / 4 if taken < 4 else (12 - taken) / 8
        assert row["lr"] == pytest.approx(1e-2 * expected)


def test_the_scale_of_fp16_outlives_a_kill(tmp_path: Path) -> None:
    options = {"checkpoint_every_steps": 3, "sample_every_steps": 1, "max_steps": 12}
    straight, resumed = LeastSquares(), LeastSquares()
    train(straight, tmp_path / "straight", scaler=scaler(), **options)
    with pytest.raises(Killed):
        train(LeastSquares(), tmp_path / "killed", scaler=scaler(), on=kill_at(8), **options)
    train(resumed, tmp_path / "killed", scaler=scaler(), **options)
    assert same(state_of(resumed), state_of(straight))
    assert without_time(log_of(tmp_path / "killed")) == without_time(log_of(tmp_path / "straight"))


def test_adamw8bit_trains_on_the_cpu(tmp_path: Path) -> None:
    objective = LeastSquares(noise=0, width=64)  # bitsandbytes keeps tensors below 4,096 numbers in 32 bits
    train(objective, tmp_path, points(4, width=64), optimizer="adamw8bit", max_steps=20, batch_size=4)
    losses = [row["loss"] for row in log_of(tmp_path)]
    assert losses[-1] < 0.5 * losses[0]


def test_samples_are_drawn_in_eval_mode_and_do_not_change_the_training(tmp_path: Path) -> None:
    drawing, plain = LeastSquares(dropout=0.5), LeastSquares(dropout=0.5)
    modes: list[tuple[int, bool]] = []

    def on_sample(step: int) -> None:
        modes.append((step, drawing.training))
        torch.randn(7)

    during: list[bool] = []
    drawing.register_forward_pre_hook(lambda module, args: during.append(module.training))
    train(drawing, tmp_path / "a", on=on_sample, sample_every_steps=2)
    train(plain, tmp_path / "b")
    assert modes == [(2, False), (4, False)]
    assert during == [True] * 4
    assert same(state_of(drawing), state_of(plain))


# What stops it


def test_a_loss_that_is_not_finite_stops_with_step_and_log(tmp_path: Path) -> None:
    objective = LeastSquares()

    def poison(step: int) -> None:
        if step == 2:
            objective.linear.bias.data[0] = float("nan")

    with pytest.raises(UserError, match="the loss is nan at step 3") as error:
        train(objective, tmp_path, on=poison, sample_every_steps=1)
    assert str(tmp_path / "train_log.jsonl") in str(error.value)
    assert [row["step"] for row in log_of(tmp_path)] == [1, 2]


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no parameter is trainable"):
        train(LeastSquares().requires_grad_(False), tmp_path)
    with pytest.raises(UserError, match="the training split is empty"):
        train(LeastSquares(), tmp_path, [])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"])
def test_a_launch_that_splits_the_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType(kind))
    with pytest.raises(UserError, match=f"accelerate is set to {kind}.*plain data parallelism"):
        train(LeastSquares(), tmp_path)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_such_a_launch_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(UserError, match=f"accelerate is set to {kind}.*plain data parallelism"):
        make_accelerator(settings_of(), tmp_path)


# Checkpoints


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema_decay": 0.5, "lr_schedule": "cosine", "warmup_steps": 1},
        {"gradient_accumulation_steps": 3, "batch_size": 3},
        {"optimizer": "adamw8bit"},
    ],
    ids=["plain", "ema and schedule", "accumulation over epochs", "adamw8bit"],
)
def test_four_steps_equal_two_and_two_after_a_kill(tmp_path: Path, options: dict[str, Any]) -> None:
    """Killed after step 3, whose row in the log is of no checkpoint and must not stay."""
    options = {"checkpoint_every_steps": 2, "sample_every_steps": 1} | options
    straight, killed, resumed = (LeastSquares(width=64, dropout=0.5) for _ in range(3))
    data = points(7, width=64)
    train(straight, tmp_path / "straight", data, **options)
    with pytest.raises(Killed):
        train(killed, tmp_path / "killed", data, on=kill_at(3), **options)
    assert [row["step"] for row in log_of(tmp_path / "killed")] == [1, 2, 3]
    steps: list[int] = []
    train(resumed, tmp_path / "killed", data, on=steps.append, **options)
    assert steps == [2, 3, 4]  # 2 again: it may have been stopped between the checkpoint and what looks at it
    assert same(state_of(resumed), state_of(straight))
    rows = log_of(tmp_path / "killed")
    assert without_time(rows) == without_time(log_of(tmp_path / "straight"))
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_method_of_any_kind_continues_bit_for_bit(tmp_path: Path, name: str) -> None:
    """Set up anew each time, as a new process does; stopped in the middle of a step, by an exception."""

    def run(folder: Path, on: Any = None) -> list[torch.Tensor]:
        method, rows = example(name, DenoisingConfig(caption_dropout=0.5))
        train(method, folder, rows, on=on, max_steps=3, checkpoint_every_steps=1, sample_every_steps=1)
        found = state_of(method)
        method.finish()
        return found

    straight = run(tmp_path / "straight")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at(2))
    (tmp_path / "killed/state/step-00000002").rename(tmp_path / "later")  # written before the look that was killed
    assert same(run(tmp_path / "killed"), straight)
    assert without_time(log_of(tmp_path / "killed")) == without_time(log_of(tmp_path / "straight"))


class Moving(LeastSquares):
    """Its target moves at every step, and no parameter says where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.target = torch.zeros(4)

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        self.target = self.target + 1
        loss = (super().forward(batch, generator)["loss"] - self.target).square().mean()
        return {"loss": loss}

    def state(self) -> dict[str, torch.Tensor]:
        return {"target": self.target}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        self.target = state["target"]


def test_the_state_of_an_objective_is_in_its_checkpoint(tmp_path: Path) -> None:
    options = {"checkpoint_every_steps": 2, "sample_every_steps": 1}
    straight, killed, resumed = Moving(), Moving(), Moving()
    train(straight, tmp_path / "straight", **options)
    with pytest.raises(Killed):
        train(killed, tmp_path / "killed", on=kill_at(3), **options)
    written = {p.name for p in (tmp_path / "killed/state/step-00000002").iterdir()}
    assert written == CHECKPOINT_FILES | {"method.safetensors"}
    train(resumed, tmp_path / "killed", **options)
    assert resumed.target.tolist() == straight.target.tolist() == [4.0] * 4
    assert same(state_of(resumed), state_of(straight))
    assert without_time(log_of(tmp_path / "killed")) == without_time(log_of(tmp_path / "straight"))


def test_what_a_method_measured_before_the_training_outlives_a_kill(tmp_path: Path) -> None:
    """The tail penalty measures the model that it is given, which after a kill is that of the checkpoint: it must not
    count."""

    def run(folder: Path, on: Any = None, *, trained: bool = False) -> Any:
        model = tiny()
        batch = batch_of(model)
        if trained:
            with torch.no_grad():
                model.text_encoders[0].get_submodule("final_layer_norm").weight.mul_(3)
        denoising = DenoisingConfig(caption_dropout=0.0)
        context = context_of(batches=lambda images: iter([batch] * 4))
        method: Any = set_up(TailPenaltyOptions(weight=5.0), model, context, denoising)
        measured = method.state()
        train(method, folder, rows_of(model), on=on, checkpoint_every_steps=2, sample_every_steps=1)
        method.finish()
        return measured, method.state(), state_of(method)

    measured, after, straight = run(tmp_path / "straight")
    assert all(torch.equal(measured[name], after[name]) for name in measured)
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at(3))
    other, restored, resumed = run(tmp_path / "killed", trained=True)
    assert any(not torch.equal(other[name], measured[name]) for name in measured)
    assert all(torch.equal(restored[name], measured[name]) for name in measured)
    assert same(resumed, straight)


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    train(LeastSquares(), tmp_path, max_steps=7, checkpoint_every_steps=1, keep_last_state_gb=0.0)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["step-00000005", "step-00000006"]
    assert {p.name for p in (tmp_path / "state" / "step-00000006").iterdir()} == CHECKPOINT_FILES


def test_a_half_written_checkpoint_and_a_torn_row_of_the_log_do_not_matter(tmp_path: Path) -> None:
    options = {"checkpoint_every_steps": 2, "sample_every_steps": 1}
    with pytest.raises(Killed):
        train(LeastSquares(), tmp_path / "killed", on=kill_at(3), **options)
    partial = tmp_path / "killed" / "state" / "step-00000004.partial"
    partial.mkdir()
    (partial / "trainable.safetensors").write_bytes(b"half")
    with (tmp_path / "killed" / "train_log.jsonl").open("a") as log:
        log.write('{"step": 4, "lo')
    straight, resumed = LeastSquares(), LeastSquares()
    train(straight, tmp_path / "straight", **options)
    train(resumed, tmp_path / "killed", **options)
    assert same(state_of(resumed), state_of(straight))
    assert [row["step"] for row in log_of(tmp_path / "killed")] == [1, 2, 3, 4]


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    train(LeastSquares(), tmp_path, checkpoint_every_steps=2)
    edit_facts(tmp_path / "state" / "step-00000004", processes=4)
    with pytest.raises(UserError, match="a launch of 4 processes, and this one has 1"):
        train(LeastSquares(), tmp_path, checkpoint_every_steps=2)


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    train(LeastSquares(), tmp_path, checkpoint_every_steps=2)
    only_bias = LeastSquares()
    only_bias.linear.weight.requires_grad_(False)
    with pytest.raises(UserError, match="written by a run with other settings"):
        train(only_bias, tmp_path, checkpoint_every_steps=2)
    config = settings_of()
    with pytest.raises(UserError, match="step-00000004 was written by a run with other settings"):
        fit(
            LeastSquares(),
            points(),
            config,
            accelerator=fresh_accelerator(config, tmp_path),
            output_dir=tmp_path,
            seed=6,
        )


def test_a_run_without_a_checkpoint_starts_its_log_again(tmp_path: Path) -> None:
    for _ in range(2):
        train(LeastSquares(), tmp_path, keep_last_state_gb=0.0)
    assert [row["step"] for row in log_of(tmp_path)] == [1, 2, 3, 4]


def test_each_fit_logs_to_a_tracker_of_its_own(tmp_path: Path) -> None:
    config = TrainerConfig(max_steps=2, batch_size=1, tracker="tensorboard", log_every_steps=1)
    accelerator = make_accelerator(config, tmp_path)
    for label in ("one", "two"):
        objective = torch.nn.ModuleDict({"line": torch.nn.Linear(1, 1)})
        objective.forward = lambda batch, generator, line=objective["line"]: {"loss": line(batch["x"]).square().mean()}
        rows = [{"x": torch.ones(1)}] * 4
        fit(objective, rows, config, accelerator=accelerator, output_dir=tmp_path / label, seed=0, label=label)
    assert accelerator.trackers == []
    assert len(list((tmp_path / "one").glob("events.out.*"))) == 1


def test_a_parameter_without_a_gradient_in_a_step_stays_where_it_is(tmp_path: Path) -> None:
    """Zeros in place of no gradient would let the optimizer's momentum and decay move it on."""

    class Early(LeastSquares):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.seen = nn.Parameter(torch.ones(1)), []

        def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
            terms = super().forward(batch, generator)
            if not self.seen:
                terms["loss"] = terms["loss"] + self.early.sum()
            self.seen.append(float(self.early.detach()))
            return terms

    objective = Early()
    train(objective, tmp_path, max_steps=4)
    first, *later = [*objective.seen, float(objective.early)]
    assert first == 1 > later[0] and later == [later[0]] * 4
    assert [row["constant"] for row in log_of(tmp_path)] == [2.0] * 4, "the log has the mean over steps"

"""Checkpoints: damage of every kind, disks that fill up, signals, longer trainings; and what is never written to
one."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
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

from distill import checkpoints
from distill.draws import step_of
from distill.errors import Interrupted, UserError
from distill.trainer import fit

EVERY_TWO: dict[str, Any] = {"max_steps": 8, "checkpoint_every_steps": 2, "sample_every_steps": 1}
STEPS = (4, 6)
"""Checkpoints that a training of EVERY_TWO leaves which is killed at step 7."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[torch.Tensor], list[dict[str, float]]]:
    """Weights and log of a training that nothing stops."""
    folder, objective = tmp_path_factory.mktemp("unbroken"), LeastSquares()
    train(objective, folder, **EVERY_TWO)
    return state_of(objective), without_time(log_of(folder))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same training, killed at step 7."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        train(LeastSquares(), folder, on=kill_at(7), **EVERY_TWO)
    assert checkpoints.steps_in(folder / "state") == [6, 4]
    return folder


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[str] = set()

    def fsync(descriptor: int) -> None:
        flushed.add(os.path.realpath(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "fsync", fsync)
    train(LeastSquares(), tmp_path, max_steps=2, checkpoint_every_steps=2)
    (folder,) = (tmp_path / "state").iterdir()
    assert {Path(name).name for name in flushed} >= {path.name for path in folder.iterdir()}


# Damage


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros_at_the_end(path: Path) -> None:
    """What a power loss leaves of a file whose length was written and whose last blocks were not."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def only_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    """The same file of a training with other numbers, valid in itself."""
    shutil.copy(path.parent.parent / "step-00000004" / path.name, path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def no_files(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def as_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def torn_row(path: Path) -> None:
    path.write_text(path.read_text()[:-20])


def text(content: str) -> Callable[[Path], Any]:
    return lambda path: path.write_text(content)


def of_another_step(folder: Path) -> None:
    edit_facts(folder, step=5)


def step_is_no_number(folder: Path) -> None:
    edit_facts(folder, step="six")


WEIGHTS, OPTIMIZER, FACTS = "trainable.safetensors", "optimizer.pt", "state.json"
LOG, MANIFEST = "train_log.jsonl", "manifest.json"
DAMAGE: list[tuple[str, Callable[[Path], Any]]] = [
    (WEIGHTS, truncate), (WEIGHTS, empty), (WEIGHTS, Path.unlink), (WEIGHTS, foreign), (WEIGHTS, flip_one_bit),
    (WEIGHTS, zeros_at_the_end), (WEIGHTS, as_folder),
    (OPTIMIZER, truncate), (OPTIMIZER, empty), (OPTIMIZER, Path.unlink), (OPTIMIZER, foreign), (OPTIMIZER, only_zeros),
    (FACTS, text("{")), (FACTS, text("[]")), (FACTS, Path.unlink), (FACTS, only_zeros), (FACTS, foreign),
    (LOG, torn_row), (LOG, zeros_at_the_end), (LOG, Path.unlink),
    (MANIFEST, Path.unlink), (MANIFEST, text("{")), (MANIFEST, text("[]")), (MANIFEST, text('{"sha256": {}}')),
    (MANIFEST, text('{"sha256": []}')), (MANIFEST, only_zeros),
    ("", no_files), ("", as_file), ("", of_another_step), ("", step_is_no_number),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "damage"), DAMAGE, ids=[f"{name} {d.__name__} {k}" for k, (name, d) in enumerate(DAMAGE)]
)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(
    tmp_path: Path,
    killed: Path,
    unbroken: Any,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], Any],
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "state" / "step-00000006"
    damage(folder / name if name else folder)
    objective, steps = LeastSquares(), []
    train(objective, tmp_path, on=steps.append, **EVERY_TWO)
    assert steps == [4, 5, 6, 7, 8]
    assert same(state_of(objective), unbroken[0]) and without_time(log_of(tmp_path)) == unbroken[1]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "damaged" in line]
    assert str(folder) in line
    assert checkpoints.steps_in(tmp_path / "state") == [8, 6]
    checkpoints.check(folder)  # written again, whole


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, FACTS, LOG])
def test_where_no_checkpoint_is_whole_the_training_starts_again(
    tmp_path: Path, killed: Path, unbroken: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    for step in STEPS:
        truncate(tmp_path / "state" / f"step-{step:08d}" / name)
    objective, steps = LeastSquares(), []
    train(objective, tmp_path, on=steps.append, **EVERY_TWO)
    assert steps == list(range(1, 9))
    assert same(state_of(objective), unbroken[0]) and without_time(log_of(tmp_path)) == unbroken[1]
    assert "no checkpoint in" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [truncate, empty, only_zeros, zeros_at_the_end, Path.unlink, torn_row])
def test_the_log_is_that_of_the_checkpoint_whatever_became_of_the_file(
    tmp_path: Path, killed: Path, unbroken: Any, damage: Callable[[Path], Any]
) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "train_log.jsonl")
    train(LeastSquares(), tmp_path, **EVERY_TWO)
    assert without_time(log_of(tmp_path)) == unbroken[1]


def test_other_entries_of_the_folder_of_checkpoints_do_not_matter(tmp_path: Path, killed: Path, unbroken: Any) -> None:
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    (tmp_path / "state" / "step-00000008.partial").mkdir()
    (tmp_path / "state" / "step-00000008.partial" / WEIGHTS).write_bytes(b"half")
    (tmp_path / "state" / "step-best1").mkdir()
    objective = LeastSquares()
    train(objective, tmp_path, **EVERY_TWO)
    assert same(state_of(objective), unbroken[0])
    assert {p.name for p in (tmp_path / "state").iterdir()} == {"step-00000006", "step-00000008", "step-best1"}


# What must be the same


def test_a_changed_file_is_named_before_a_training_goes_on(tmp_path: Path) -> None:
    config = settings_of(checkpoint_every_steps=2)

    def run(**fingerprints: str) -> None:
        accelerator = fresh_accelerator(config, tmp_path)
        shared: dict[str, Any] = {"accelerator": accelerator, "output_dir": tmp_path, "seed": 5}
        fit(LeastSquares(), points(), config, fingerprints=fingerprints, **shared)

    run(captions="a", base="b", teacher="c")
    run(captions="a", base="b", teacher="c")
    for given, changed in (
        ({"captions": "a", "base": "other", "teacher": "c"}, "base changed"),
        ({"captions": "x", "base": "b", "teacher": "y"}, "captions, teacher changed"),
        ({"captions": "a", "base": "b"}, "teacher changed"),
        ({"captions": "a", "base": "b", "teacher": "c", "reference": "d"}, "reference changed"),
    ):
        with pytest.raises(UserError, match=changed) as error:
            run(**given)
        assert "Put back what was there, or choose another output_dir, or delete" in str(error.value)


def test_weights_of_another_shape_are_refused_and_not_spread(tmp_path: Path) -> None:
    """Copying one number into a vector of four would work, and be wrong."""
    train(LeastSquares(width=1), tmp_path, points(width=1))
    with pytest.raises(UserError, match="written by a run with other settings"):
        train(LeastSquares(), tmp_path)


# Longer


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"log_every_steps": 3, "checkpoint_every_steps": 2},
        {"log_every_steps": 2, "ema_decay": 0.5, "gradient_accumulation_steps": 2, "warmup_steps": 5},
    ],
    ids=["plain", "log between checkpoints", "averages, accumulation and warm-up"],
)
def test_a_training_made_longer_is_the_longer_training(tmp_path: Path, options: dict[str, Any]) -> None:
    straight, grown = LeastSquares(dropout=0.5), LeastSquares(dropout=0.5)
    train(straight, tmp_path / "straight", max_steps=9, **options)
    for steps in (5, 5, 7, 9):
        grown = LeastSquares(dropout=0.5)
        result = train(grown, tmp_path / "grown", max_steps=steps, **options)
        rows = log_of(tmp_path / "grown")
        assert rows[-1]["step"] == result.steps == steps
    assert same(state_of(grown), state_of(straight))
    assert without_time(rows) == without_time(log_of(tmp_path / "straight"))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_that_ends_cannot_be_made_longer(tmp_path: Path, schedule: str) -> None:
    train(LeastSquares(), tmp_path, lr_schedule=schedule)
    train(LeastSquares(), tmp_path, lr_schedule=schedule)
    with pytest.raises(UserError, match=f"max_steps is 6, and .*state is of a training of 4 steps, whose {schedule}"):
        train(LeastSquares(), tmp_path, lr_schedule=schedule, max_steps=6)


def test_a_training_cannot_be_made_shorter(tmp_path: Path) -> None:
    train(LeastSquares(), tmp_path)
    with pytest.raises(UserError, match="max_steps is 3, and .*step-00000004 is after more steps"):
        train(LeastSquares(), tmp_path, max_steps=3)


def test_a_large_last_state_is_not_kept(tmp_path: Path) -> None:
    """20 parameters of 4 bytes, three times."""
    train(LeastSquares(), tmp_path / "small", keep_last_state_gb=241e-9)
    train(LeastSquares(), tmp_path / "large", keep_last_state_gb=239e-9)
    train(LeastSquares(), tmp_path / "averaged", keep_last_state_gb=241e-9, ema_decay=0.5)
    kept = {name: checkpoints.steps_in(tmp_path / name / "state") for name in ("small", "large", "averaged")}
    assert kept == {"small": [4], "large": [], "averaged": []}


# Logs


def test_means_after_a_kill_are_those_of_an_unbroken_training(tmp_path: Path) -> None:
    """A checkpoint at step 4, between the rows at 3 and 6."""
    options = EVERY_TWO | {"log_every_steps": 3, "checkpoint_every_steps": 4}
    train(LeastSquares(), tmp_path / "straight", **options)
    with pytest.raises(Killed):
        train(LeastSquares(), tmp_path / "killed", on=kill_at(5), **options)
    train(LeastSquares(), tmp_path / "killed", **options)
    assert [row["step"] for row in log_of(tmp_path / "killed")] == [3, 6, 8]
    assert without_time(log_of(tmp_path / "killed")) == without_time(log_of(tmp_path / "straight"))


class Late(LeastSquares):
    """With a term that begins at step 3, as that of a distillation that begins later."""

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        late = {"late": torch.tensor(3.0)} if step_of(generator) > 2 else {}
        return super().forward(batch, generator) | late


def test_a_term_that_begins_later_is_a_mean_over_the_batches_that_have_it(tmp_path: Path) -> None:
    """Its first row is at step 4; the checkpoint, at step 3, has one batch with it and three with the others."""
    options = EVERY_TWO | {"log_every_steps": 4, "checkpoint_every_steps": 3}
    with pytest.raises(Killed):
        train(Late(), tmp_path, on=kill_at(3), **options)
    train(Late(), tmp_path, **options)
    first, second = log_of(tmp_path)
    assert first["late"] == second["late"] == 3.0 and first["constant"] == 2.0


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    """Which had one count for all terms."""
    options = EVERY_TWO | {"log_every_steps": 3, "checkpoint_every_steps": 4}
    train(LeastSquares(), tmp_path / "straight", **options)
    with pytest.raises(Killed):
        train(LeastSquares(), tmp_path / "killed", on=kill_at(5), **options)
    folder = checkpoints.folder_of(tmp_path / "killed/state", 4)
    checkpoint = checkpoints.read(folder)
    counts = checkpoint.loop["means"].pop("counts")
    checkpoint.loop["means"] |= {"names": list(counts), "count": counts["loss"]}
    shutil.rmtree(folder)
    checkpoints.write(tmp_path / "killed/state", checkpoint)
    train(LeastSquares(), tmp_path / "killed", **options)
    assert without_time(log_of(tmp_path / "killed")) == without_time(log_of(tmp_path / "straight"))


# Full disks


def no_space(*arguments: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def failing(name: str, real: Any) -> Any:
    """A function that fails for files of this name, as on a full disk, after it has written half of them."""

    def call(*arguments: Any, **options: Any) -> Any:
        if any(name in str(argument) for argument in arguments):
            for argument in arguments:
                if isinstance(argument, Path) and argument.name == name and not name.startswith("step-"):
                    with open(argument, "ab") as file:
                        file.write(b"half")
            no_space()
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("where", "what", "name"),
    [
        (checkpoints, "save_file", WEIGHTS),
        (torch, "save", OPTIMIZER),
        (Path, "write_text", LOG),
        (Path, "write_text", FACTS),
        (Path, "write_text", MANIFEST),
        (os, "replace", "step-00000006"),
        (os, "fsync", ""),
        (Path, "mkdir", "step-00000006"),
    ],
)
def test_a_full_disk_leaves_the_checkpoint_before_and_one_line(
    tmp_path: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch, where: Any, what: str, name: str
) -> None:
    def fill(step: int) -> None:
        if step == 5:
            monkeypatch.setattr(where, what, failing(name, getattr(where, what)))

    with pytest.raises(UserError, match="step-00000006 cannot be written: No space left on device") as error:
        train(LeastSquares(), tmp_path, on=fill, **EVERY_TWO)
    assert "goes on from step-00000004" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.undo()
    assert {p.name for p in (tmp_path / "state").iterdir()} == {"step-00000002", "step-00000004"}
    checkpoints.check(tmp_path / "state" / "step-00000004")
    resumed, steps = LeastSquares(), []
    train(resumed, tmp_path, on=steps.append, **EVERY_TWO)
    assert steps[0] == 4 and same(state_of(resumed), unbroken[0])


def test_a_log_on_a_full_disk_is_one_line_too(tmp_path: Path, unbroken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(step: int) -> None:
        if step == 5:
            monkeypatch.setattr(Path, "open", failing("train_log.jsonl", Path.open))

    with pytest.raises(UserError, match=r"cannot be written: No space left on device; free some space"):
        train(LeastSquares(), tmp_path, on=fill, **EVERY_TWO)
    monkeypatch.undo()
    resumed = LeastSquares()
    train(resumed, tmp_path, **EVERY_TWO)
    assert same(state_of(resumed), unbroken[0]) and without_time(log_of(tmp_path)) == unbroken[1]


def test_a_limit_of_the_system_on_the_size_of_files_is_one_line_too(tmp_path: Path) -> None:
    """A real failure of the writers, in the middle of a file: 400 kB of weights, and files of at most 100 kB."""
    options: dict[str, Any] = {"checkpoint_every_steps": 2}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(UserError, match=r"step-00000002 cannot be written: .*File too large"):
            train(LeastSquares(width=316), tmp_path, points(width=316), **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "state").iterdir()) == []
    train(LeastSquares(width=316), tmp_path, points(width=316), **options)


# Signals


def signal_at(step: int, *numbers: int) -> Callable[[int], None]:
    """Sends signals in the middle of the step after this one's looks."""

    def on_sample(now: int) -> None:
        for number in numbers if now == step else ():
            os.kill(os.getpid(), number)

    return on_sample


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals as a terminal's process gets them; a shell has its background processes ignore SIGINT."""
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, kept)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(
    tmp_path: Path, unbroken: Any, number: int, status: int
) -> None:
    options = EVERY_TWO | {"checkpoint_every_steps": None}
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stopped:
        train(LeastSquares(), tmp_path, on=signal_at(2, number), **options)
    assert stopped.value.status == status
    assert "stopped after step 3 of 8; the same command goes on from" in str(stopped.value)
    assert signal.getsignal(number) is before
    assert checkpoints.steps_in(tmp_path / "state") == [3]
    assert {p.name for p in (tmp_path / "state" / "step-00000003").iterdir()} == CHECKPOINT_FILES
    resumed = LeastSquares()
    train(resumed, tmp_path, **options)
    assert same(state_of(resumed), unbroken[0]) and without_time(log_of(tmp_path)) == unbroken[1]


def test_a_signal_during_the_last_look_is_not_lost(tmp_path: Path, unbroken: Any) -> None:
    options = EVERY_TWO | {"keep_last_state_gb": 0.0}
    with pytest.raises(Interrupted, match="stopped after step 8 of 8"):
        train(LeastSquares(), tmp_path, on=signal_at(8, signal.SIGTERM), **options)
    resumed = LeastSquares()
    train(resumed, tmp_path, **options)
    assert same(state_of(resumed), unbroken[0]) and without_time(log_of(tmp_path)) == unbroken[1]


@pytest.mark.usefixtures("heard")
def test_a_second_interrupt_stops_at_once(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(LeastSquares(), tmp_path, on=signal_at(3, signal.SIGINT, signal.SIGINT), **EVERY_TWO)
    assert not isinstance(stopped.value, Interrupted)
    assert checkpoints.steps_in(tmp_path / "state") == [2]


def test_a_second_sigterm_does_not_stop_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(LeastSquares(), tmp_path, on=signal_at(3, signal.SIGTERM, signal.SIGTERM), **EVERY_TWO)
    assert checkpoints.steps_in(tmp_path / "state") == [4, 2]


# Numbers that are not finite


class Poisoned(LeastSquares):
    """Its loss, or only the gradient of it, is not a number at one step."""

    def __init__(self, at: int, gradient: bool = False) -> None:
        super().__init__()
        self.at, self.gradient, self.calls = at, gradient, 0

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, torch.Tensor]:
        self.calls += 1
        terms = super().forward(batch, generator)
        if self.calls == self.at:
            zero = self.linear.bias.sum() * 0
            terms["loss"] = terms["loss"] + (zero.sqrt() if self.gradient else zero / 0)
        return terms


@pytest.mark.parametrize(("gradient", "name"), [(False, "loss"), (True, "norm of the gradient")])
def test_the_first_step_that_is_not_finite_is_named_and_no_checkpoint_is_after_it(
    tmp_path: Path, gradient: bool, name: str
) -> None:
    """Looked at when a row or a checkpoint is written, so that no other step waits for the device."""
    options: dict[str, Any] = {"max_steps": 20, "checkpoint_every_steps": 4, "log_every_steps": 10}
    objective = Poisoned(6, gradient)
    with pytest.raises(UserError, match=f"the {name} is nan at step 6"):
        train(objective, tmp_path, **options)
    assert objective.calls == 8
    assert checkpoints.steps_in(tmp_path / "state") == [4]
    with pytest.raises(UserError, match=f"the {name} is nan at step 4"):
        train(Poisoned(4, gradient), tmp_path / "last", max_steps=4, log_every_steps=100)
    assert not (tmp_path / "last" / "state").exists()


def test_a_signal_after_a_loss_that_is_not_finite_writes_no_checkpoint(tmp_path: Path) -> None:
    options = EVERY_TWO | {"checkpoint_every_steps": None, "log_every_steps": 100, "sample_every_steps": 2}
    with pytest.raises(UserError, match="the loss is nan at step 3"):
        train(Poisoned(3), tmp_path, on=signal_at(2, signal.SIGTERM), **options)
    assert not (tmp_path / "state").exists()

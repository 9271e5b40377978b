"""A run folder: what may change in it, who is at it, and what a killed launch leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from filelock import FileLock, Timeout
from recipe import ROOT, config_class_of, recipe_module, refusal_of
from rich.console import Console

from distill.cli import parse, to_yaml
from distill.config import BaseConfig
from distill.configuration.changes import changes
from distill.errors import UserError
from distill.experiment import folder as folder_module
from distill.experiment import sharing
from distill.experiment.folder import held, remove_leftovers
from distill.experiment.run import Run, claim
from distill.experiment.train import _cost_of

# --- options that may differ ----------------------------------------------------------------------------------------


def test_those_of_a_group_may_share_a_run_folder(tmp_path: Path) -> None:
    mask = os.umask(0)
    try:
        with held(tmp_path / "run"):
            modes = [path.stat().st_mode & 0o666 for path in (tmp_path / "run").rglob("*") if path.is_file()]
    finally:
        os.umask(mask)
    assert modes and set(modes) == {0o666}


def config_of(name: str, *words: str) -> Any:
    return parse(config_class_of(recipe_module(name)), words)


def claimed(folder: Path, name: str, old: list[str], new: list[str]) -> None:
    """Claim a folder that holds a run with the options `old`, for a launch with `new`."""
    (folder / "config.yaml").write_text(to_yaml(config_of(name, *old)), encoding="utf-8")
    claim(folder, config_of(name, *new))


HARMLESS = [
    "--trainer.num_workers", "2", "--trainer.log_every_steps", "3", "--trainer.tracker", "none", "--output_dir", "x",
    "--trainer.checkpoint_every_steps", "5", "--trainer.sample_every_steps", "5", "--data.cache_dir", "elsewhere",
    "--trainer.validate_every_steps", "7", "--evaluation.generated_images", "3", "--evaluation.features", "none",
]  # fmt: skip


@pytest.mark.parametrize("name", ["finetune", "tradeoff", "compress", "distill_steps", "distill_attention"])
def test_options_that_change_no_weight_may_differ(name: str, tmp_path: Path) -> None:
    more = {
        "tradeoff": ["--compare_to", "base"],
        "compress": ["--bits", "int8"],
        "distill_steps": ["--student_steps", "2"],
    }
    claimed(tmp_path, name, [], [*HARMLESS, *more.get(name, [])])


def test_every_option_that_may_not_differ_is_named_with_both_values(tmp_path: Path) -> None:
    new = ["--trainer.batch_size", "8", "--data.kind", "folder", "--data.root", "x", "--lora.rank", "2"]
    new += ["--evaluation.timesteps", "5", *HARMLESS]
    with pytest.raises(UserError) as caught:
        claimed(tmp_path, "finetune", [], new)
    title, *lines = str(caught.value).splitlines()
    assert "choose another --output_dir" in title and "raise only max_steps" in title
    assert "To train on" in title and "more images" in title
    assert sorted(lines) == [
        "  - data.kind: 'phantom' there, 'folder' now",
        "  - evaluation.timesteps: none there, [5] now",
        "  - lora.rank: 8 there, 2 now",
        "  - trainer.batch_size: 16 there, 8 now",
    ]


def test_options_of_one_arm_are_named_and_an_arm_that_is_gone(tmp_path: Path) -> None:
    old = ["--arms", "{a: {max_steps: 5}, b: {denoiser: lora, lora: {rank: 2}}, c: {}, d: {}}"]
    new = ["--arms", "{a: {max_steps: 6}, b: {denoiser: lora, lora: {rank: 4}}, d: {max_steps: 4}}"]
    with pytest.raises(UserError) as caught:
        claimed(tmp_path, "tradeoff", old, new)
    first, gone, last = str(caught.value).splitlines()[1:]
    assert first == "  - arms.b.lora.rank: 2 there, 4 now" and last == "  - arms.d.max_steps: none there, 4 now"
    assert gone.startswith("  - arms.c: {") and gone.endswith(" there, none now")


def test_a_comparison_may_get_further_arms(tmp_path: Path) -> None:
    new = "{a: {max_steps: 5}, b: {denoiser: lora, lora: {rank: 2}}}"
    claimed(tmp_path, "tradeoff", ["--arms", "{a: {max_steps: 5}}"], ["--arms", new])


@pytest.mark.parametrize(("old", "new", "passes"), [("5", "6", True), ("6", "5", False)])
def test_max_steps_may_grow_and_not_shrink(tmp_path: Path, old: str, new: str, passes: bool) -> None:
    try:
        claimed(tmp_path, "finetune", ["--trainer.max_steps", old], ["--trainer.max_steps", new])
    except UserError as error:
        assert not passes and f"trainer.max_steps: {old} there, {new} now" in str(error)
    else:
        assert passes


def test_a_key_that_an_older_run_lacks_has_its_default(tmp_path: Path) -> None:
    text = to_yaml(config_of("finetune")).replace("  num_workers: null\n", "").replace("  optimizer: adamw\n", "")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    claim(tmp_path, config_of("finetune"))
    with pytest.raises(UserError, match=r"trainer\.optimizer: 'adamw' there, 'adamw8bit' now"):
        claim(tmp_path, config_of("finetune", "--trainer.optimizer", "adamw8bit"))


def test_an_option_in_the_place_of_one_of_a_base_class_keeps_its_rule() -> None:
    old = config_of("finetune")
    (change,) = changes(old, old.model_copy(update={"output_dir": "x"}))
    assert change.key == "output_dir" and change.is_allowed


# --- one launch at a time -------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from distill.experiment.folder import held
with held(Path(sys.argv[1]), shared=sys.argv[2] == "shared"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def other_launch(folder: Path, kind: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=60)
    assert process.returncode == 0


def test_a_second_launch_is_refused_while_one_is_at_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "SHARED_WAIT", 0.2)
    folder = tmp_path / "run"
    other = other_launch(folder, "alone")
    (folder / ".export.1.tmp").write_text("of the other launch")
    for shared in (False, True):
        message = "another launch is at .*run; wait until it ends"
        with pytest.raises(UserError, match=message) as caught, held(folder, shared=shared):
            pass
        assert "\n" not in str(caught.value)
    assert (folder / ".locks" / ".launch").exists() and (folder / ".export.1.tmp").exists()
    end(other)
    with held(folder):
        assert not (folder / ".export.1.tmp").exists()


def test_all_ranks_of_a_launch_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the main process asks for the folder, so that the other ranks are not refused."""
    other = other_launch(tmp_path, "alone")
    monkeypatch.setattr(folder_module, "process_state", lambda: SimpleNamespace(is_main_process=False))
    with held(tmp_path):
        pass
    end(other)


def test_launches_that_share_a_folder_refuse_one_that_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: it need not wait for one that tidies."""
    other = other_launch(tmp_path, "shared")
    with held(tmp_path, shared=True):
        pass
    waits: list[float] = []
    monkeypatch.setattr(folder_module, "time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))
    with pytest.raises(UserError, match="another launch"), held(tmp_path):
        pass
    assert not waits
    end(other)


def test_of_launches_that_share_a_folder_the_second_waits_while_the_first_tidies(tmp_path: Path) -> None:
    """Two commands in the same second: the first holds the folder alone until leftovers are removed."""
    other = other_launch(tmp_path, "alone")
    timer = threading.Timer(0.3, end, [other])
    timer.start()
    with held(tmp_path, shared=True):
        pass
    timer.join()
    assert other.returncode == 0


def test_a_launch_that_is_refused_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="refused"), held(tmp_path / "a" / "b"):
        raise UserError("refused")
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "a"):
        (tmp_path / "a" / "config.yaml").touch()
    assert (tmp_path / "a" / "config.yaml").exists()
    with held(tmp_path / "dry", write=False):
        assert not (tmp_path / "dry").exists()


def test_recipes_hold_their_folder_while_they_run(tmp_path: Path) -> None:
    other = other_launch(tmp_path, "alone")
    for name in ("finetune", "tradeoff", "evaluate", "compress", "distill_steps", "atlas", "robustness", "explain"):
        words = ["--output_dir", str(tmp_path), *(["--arms", "{a: {}}"] if name == "tradeoff" else [])]
        with pytest.raises(UserError, match="another launch is at"):
            getattr(recipe_module(name), name)(config_of(name, *words))
    end(other)
    assert not (tmp_path / "config.yaml").exists()


def test_what_a_killed_launch_left_half_written_is_removed(tmp_path: Path) -> None:
    kept = ["cost.json", "notes.tmp", "mine.partial", "model/state/step-00000003/x"]
    left = [".cost.json.77.tmp", "model/.maps.safetensors.7.8.tmp", "export.partial/x", "model/state/step-4.partial/x"]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == set(kept)


# --- shared jobs ----------------------------------------------------------------------------------------------------


def run_in(folder: Path) -> Run:
    nothing: Any = None
    quiet = Console(quiet=True)
    return Run(nothing, folder, Accelerator(), BaseConfig(), {}, nothing, None, nothing, console=quiet)


def test_a_timeout_inside_a_job_is_no_other_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def waits(seconds: float) -> None:
        raise AssertionError("it waits for another process")

    monkeypatch.setattr(sharing.time, "sleep", waits)

    def call() -> None:
        with FileLock(tmp_path / "other"), FileLock(tmp_path / "other", blocking=False, is_singleton=False):
            pass

    with pytest.raises(Timeout):
        sharing.share_out(run_in(tmp_path), {"a": sharing.Job(call)})


# --- folders in a strange state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("below", [False, True])
def test_an_output_folder_that_is_a_file_or_below_one_is_refused(tmp_path: Path, below: bool, write: bool) -> None:
    path = tmp_path / "file"
    path.touch()
    message = "output_dir: .*file is a file; choose another --output_dir"
    with pytest.raises(UserError, match=message), held(path / "run" if below else path, write=write):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write to .*Permission denied"), held(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied", "run/a.json"),
        IsADirectoryError(21, "Is a directory", "run/.a.json.7.tmp", None, "run/a.json"),
        FileExistsError(17, "File exists", "run/a.json"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_message(error: OSError, capsys: pytest.CaptureFixture[str]) -> None:
    def recipe(config: Any) -> None:
        raise error

    message = refusal_of(recipe, config_class_of(recipe_module("finetune")), [], capsys)
    assert message == (
        f"error: cannot read or write run/a.json: {error.strerror}; mend or remove it, or choose another output_dir\n"
    )


def test_a_folder_in_the_place_of_cost_json_is_refused_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "cost.json").mkdir()
    with pytest.raises(UserError, match=r"cost\.json is a folder, and a file is to be written there; remove it"):
        _cost_of(run_in(tmp_path), "model", tmp_path / "cost.json")

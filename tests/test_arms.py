"""Arms as data: what one has of another, what it waits for, and every fault of all of them in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distill.cli import parse
from distill.config import EvaluationConfig, FullEvaluation, LoraConfig, TrainerConfig
from distill.errors import UserError
from distill.experiment.arms import Arm, arms_of, can_be_arm, settings_of, settings_of_run
from distill.methods.options import AttentionDistillationOptions, DenoisingOptions, KeyLockOptions, TailPenaltyOptions
from distill.methods.training import ArmConfig

TRAINER = TrainerConfig(max_steps=9, learning_rate=1e-3, text_encoder_learning_rate=1e-5, warmup_steps=2)
FROZEN: dict[str, Any] = {"text_encoder": "frozen"}
LEARNABLE: dict[str, Any] = {"text_encoder": "full"}


def distilled(teacher: str = "frozen", **options: Any) -> dict[str, Any]:
    return {"text_encoder": "full", "method": {"kind": "attention_distillation", "teacher": teacher, **options}}


def arms(**configs: dict[str, Any]) -> dict[str, Arm]:
    parsed = {name: ArmConfig.model_validate(config) for name, config in configs.items()}
    return arms_of(parsed, TRAINER, EvaluationConfig().full(), Path("run"))


def faults(**configs: dict[str, Any]) -> list[str]:
    with pytest.raises(UserError) as caught:
        arms(**configs)
    return str(caught.value).splitlines()


def test_an_arm_has_its_options_and_a_folder_of_its_own() -> None:
    found = arms(frozen=FROZEN, key_locked=LEARNABLE | {"method": {"kind": "key_lock"}})
    assert list(found) == ["frozen", "key_locked"]
    arm = found["key_locked"]
    assert (arm.name, arm.folder, arm.needs) == ("key_locked", Path("run/key_locked"), ())
    assert arm.training.method == KeyLockOptions() and arm.training.text_encoder == "full"
    assert found["frozen"].training.method == DenoisingOptions() and found["frozen"].training.denoiser == "full"
    assert arm.trainer == TRAINER and isinstance(arm.evaluation, FullEvaluation)


def test_an_arm_waits_for_the_arms_that_its_method_names() -> None:
    found = arms(
        gated=distilled("frozen", gate_reference="learnable"),
        frozen=FROZEN,
        learnable=LEARNABLE,
        based=distilled("base"),
        gated_by_base=distilled("base", gate_reference="base"),
        own_gate={"like": "gated", "method": {"kind": "attention_distillation", "gate_reference": "base"}},
        far=distilled("some/model"),
    )
    assert {name: arm.needs for name, arm in found.items() if arm.needs} == {
        "gated": ("frozen", "learnable"),
        "own_gate": ("frozen",),
    }


def test_a_teacher_may_be_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "teacher").mkdir()
    monkeypatch.chdir(tmp_path)
    assert arms(one=distilled("teacher"))["one"].needs == ()


def test_an_arm_has_learning_rates_and_steps_of_its_own() -> None:
    own = {"learning_rate": 0.5, "text_encoder_learning_rate": 0.25, "max_steps": 4}
    found = arms(frozen=FROZEN, quick=LEARNABLE | own, half=LEARNABLE | {"learning_rate": 0.5})
    assert found["quick"].trainer == TRAINER.model_copy(update=own)
    assert found["half"].trainer == TRAINER.model_copy(update={"learning_rate": 0.5})
    (message,) = faults(quick=LEARNABLE | {"max_steps": 1})[1:]
    assert "arms.quick: warmup_steps is 2, above max_steps, 1" in message


def test_an_arm_like_another_has_its_options_unless_it_sets_its_own() -> None:
    found = arms(
        frozen=FROZEN,
        distilled=distilled(mass_weight=0.5, words="labels") | {"learning_rate": 0.5, "lora": {}},
        light={"like": "distilled", "method": {"kind": "attention_distillation", "mass_weight": 0.0}, "max_steps": 3},
        lora={"like": "light", "denoiser": "lora", "text_encoder": "lora", "lora": {"rank": 4}},
        wide={"like": "lora", "lora": {"alpha": 2.0}},
        penalized={"like": "distilled", "method": {"kind": "tail_penalty"}},
    )
    light = found["light"].training
    assert light.method == AttentionDistillationOptions(teacher="frozen", mass_weight=0.0, words="labels")
    assert light.text_encoder == "full"
    assert (found["light"].trainer.learning_rate, found["light"].trainer.max_steps) == (0.5, 3)
    assert found["light"].needs == ("frozen",) == found["lora"].needs
    assert found["lora"].training.method == light.method and found["lora"].training.lora == LoraConfig(rank=4)
    assert found["wide"].training.lora == LoraConfig(rank=4, alpha=2.0)
    # Another kind has none of the parent's options of the method, and all else.
    assert found["penalized"].training.method == TailPenaltyOptions()
    assert found["penalized"].training.text_encoder == "full" and found["penalized"].trainer.learning_rate == 0.5


def test_a_default_that_is_given_overrides_what_another_arm_has() -> None:
    found = arms(
        frozen=FROZEN,
        one=distilled(mass_weight=0.5),
        two={"like": "one", "method": {"kind": "attention_distillation", "mass_weight": 0.1}},
    )
    method = found["two"].training.method
    assert isinstance(method, AttentionDistillationOptions) and method.mass_weight == 0.1


def test_every_fault_of_all_arms_is_in_one_message() -> None:
    title, *lines = faults(
        base=FROZEN,
        seed_of=FROZEN | {"like": "nothing"},
        frozen=FROZEN,
        taught=distilled("frozn"),
        lost=distilled("nowhere"),
        own=distilled("own"),
        odd={"like": "learnabel", "max_steps": 3},
        learnable=LEARNABLE,
        **{"a/b": FROZEN, "metrics.json": FROZEN, "real": FROZEN, "seed-1": FROZEN, "-x": FROZEN},
    )
    assert title == f"arms that cannot be trained ({len(lines)}):"
    expected = [
        "arms.base: another name is needed",
        "arms.seed_of: like: there is no arm 'nothing'",
        "arms.taught: method: 'frozn' is no arm, no folder, and no hub id; did you mean 'frozen'?",
        "arms.lost: method: 'nowhere' is no arm, no folder, and no hub id; the arms are base, seed_of, frozen",
        "arms.own: it refers to itself as 'own'",
        "arms.odd: like: there is no arm 'learnabel'; did you mean 'learnable'?",
        *(f"arms.{name}: another name is needed" for name in ("a/b", "metrics.json", "real", "seed-1", "-x")),
    ]
    assert len(lines) == len(expected)
    assert all(line.startswith(f"  - {text}") for line, text in zip(lines, expected, strict=True))


def test_options_that_only_fit_apart_are_refused() -> None:
    (message,) = faults(lora={"denoiser": "lora", "lora": {"rank": 4}}, plain={"like": "lora", "denoiser": "full"})[1:]
    assert "arms.plain: " in message and "nothing is trained by LoRA" in message
    with pytest.raises(ValidationError, match="denoiser and text_encoder are both frozen"):
        ArmConfig.model_validate({"denoiser": "frozen"})


def test_arms_that_wait_for_each_other_are_refused() -> None:
    title, *lines = faults(frozen=FROZEN, a=distilled("b"), b=distilled("c"), c=distilled("a"), d=distilled("a"))
    assert title == "arms that wait for each other (4):"
    assert [line.strip(" -") for line in lines] == ["a needs b", "b needs c", "c needs a", "d needs a"]


@pytest.mark.parametrize("like", [{"a": "b", "b": "a"}, {"a": "a"}, {"a": "b", "b": "c", "c": "b"}])
def test_arms_that_are_like_each_other_are_refused(like: dict[str, str]) -> None:
    lines = faults(**{name: {"like": other} for name, other in like.items()})[1:]
    assert len(lines) == len(like) and all("are like each other" in line for line in lines)


def test_no_arm_at_all_is_refused() -> None:
    assert "arms is empty; name at least one" in faults()[1]


@pytest.mark.parametrize(
    ("name", "can"),
    [("frozen", True), ("tail.2", True), ("lora_4", True), ("a-b", True), ("v1.5", True), ("", False), ("..", False),
     (".hidden", False), ("a b", False), ("report.html", False), ("config.yaml", False),
     ("whole", False), ("seed-0", False)],
)  # fmt: skip
def test_names_that_a_run_folder_can_hold(name: str, can: bool) -> None:
    assert can_be_arm(name) is can


def parsed(*words: str) -> dict[str, Any]:
    """What the arms of a command line of tradeoff.py set."""
    from recipe import recipe_module

    found = parse(recipe_module("tradeoff").TradeoffConfig, words).arms
    return {name: arm.model_dump(exclude_unset=True, exclude={"text_encoder"}) for name, arm in found.items()}


def test_the_method_of_an_arm_like_another_need_not_repeat_its_kind() -> None:
    chain = "{far: {like: near, method: {words: labels}}, near: {like: first, method: {mass_weight: 0.5}}, plain: {},"
    chain += " first: {method: {kind: attention_distillation, teacher: plain}}, loop: {like: loop, method: {}}}"
    found = parsed("--arms", chain)
    kind = {"kind": "attention_distillation"}
    assert found["near"] == {"like": "first", "method": kind | {"mass_weight": 0.5}}
    assert found["far"] == {"like": "near", "method": kind | {"words": "labels"}}
    assert found["loop"] == {"like": "loop", "method": {"kind": "denoising"}}
    found = parsed("--arms", chain, "--arms.far.method.mass_weight", "0.25")
    assert found["far"]["method"] == kind | {"words": "labels", "mass_weight": 0.25}


def test_one_arm_can_be_given_as_a_mapping_on_the_command_line() -> None:
    arms = ["--arms", "{a: {denoiser: lora, lora: {rank: 2}}, b: {}}"]
    assert parsed(*arms, "--arms.c", "{denoiser: lora}", "--arms.a", "{max_steps: 3}") == {
        "a": {"denoiser": "lora", "lora": {"rank": 2}, "max_steps": 3},
        "b": {},
        "c": {"denoiser": "lora"},
    }


@pytest.mark.parametrize(
    ("words", "right"),
    [
        (["--arms.a.trainer.max_steps", "3"], "arms.a.trainer.max_steps; did you mean arms.a.max_steps?"),
        (["--arms.a.trainer", "{max_steps: 3}"], "arms.a.trainer.max_steps; did you mean arms.a.max_steps?"),
        (["--arms", "{a: {trainer: {max_steps: 3}}}"], "arms.a.trainer.max_steps; did you mean arms.a.max_steps?"),
        (["--arms.a.trainer.batch_size", "3"], "arms.a.trainer.batch_size; did you mean trainer.batch_size?"),
        (["--arms.a.trainer.batch_sise", "3"], "arms.a.trainer.batch_sise; did you mean trainer.batch_size?"),
    ],
)
def test_an_option_of_the_trainer_inside_an_arm_is_answered_with_its_right_place(words: list[str], right: str) -> None:
    with pytest.raises(UserError) as caught:
        parsed(*words)
    assert f"unknown key {right}" in str(caught.value)


def test_settings_of_an_arm_are_all_that_decided_it() -> None:
    from recipe import recipe_module

    config = recipe_module("tradeoff").TradeoffConfig(
        arms={"frozen": ArmConfig(max_steps=4), "lora": ArmConfig(denoiser="lora", lora=LoraConfig(rank=4))},
        trainer=TRAINER, compare_to=("frozen",), seeds=(3,),
    )  # fmt: skip
    found = arms_of(config.arms, config.trainer, config.evaluation.full(), Path("run"))
    frozen, lora = (settings_of(config, found[name]) for name in ("frozen", "lora"))
    assert frozen["trainer"]["max_steps"] == 4 and lora["trainer"]["max_steps"] == 9
    assert "lora" not in frozen and lora["lora"]["rank"] == 4
    assert frozen["method"] == {"kind": "denoising"} and frozen["evaluation"]["scheduler"] == "base"
    assert not {"arms", "compare_to", "seeds"} & set(frozen) and frozen["base"]["name"] == "phantom"


def test_settings_of_a_run_hold_what_an_arm_takes_from_another() -> None:
    """Else a record says of an arm that trains the text encoder that it froze it."""
    from recipe import recipe_module

    config = recipe_module("tradeoff").TradeoffConfig(
        arms={
            "trained": ArmConfig(text_encoder="full", max_steps=4),
            "labels": ArmConfig(like="trained", learning_rate=0.5),
        }
    )
    found = settings_of_run(config)
    assert found["base"]["name"] == "phantom" and found["arms"]["trained"]["like"] is None
    labels = found["arms"]["labels"]
    assert (labels["like"], labels["text_encoder"], labels["max_steps"], labels["learning_rate"]) == (
        "trained",
        "full",
        4,
        0.5,
    )


@pytest.mark.parametrize(
    ("names", "message"), [(("frozn",), "compare_to: frozn is no arm; there are frozen"), (("base", "frozen"), None)]
)
def test_baselines_are_arms_or_the_base(names: tuple[str, ...], message: str | None) -> None:
    from recipe import recipe_module

    make = recipe_module("tradeoff").TradeoffConfig
    if message is None:
        assert make(arms={"frozen": ArmConfig()}, compare_to=names).compare_to == names
        return
    with pytest.raises(ValidationError, match=message):
        make(arms={"frozen": ArmConfig()}, compare_to=names)

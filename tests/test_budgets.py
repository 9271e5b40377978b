"""Arms at equal cost: the steps that a budget allows, and tradeoff.py with budgets from its command line to
proof.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from recipe import recipe_module, refusal_of
from test_recipes import TRAINING, arms_argv, run, work  # noqa: F401

from distill import checkpoints
from distill.cli import parse
from distill.config import FullEvaluation, TrainerConfig
from distill.errors import UserError
from distill.evaluation.claims import LOWER_IS_BETTER, Comparison, compare, student_interval
from distill.experiment import train
from distill.experiment.arms import Arm, arms_of
from distill.experiment.budgets import inherit, of_length, passes_of, spend
from distill.experiment.cost import training_passes
from distill.experiment.lengths import steps_faults
from distill.files import read_json, write_json
from distill.methods import method_of
from distill.methods.training import ArmConfig, Training
from distill.report import proof
from distill.report.proof import write_proof
from distill.report.tables import METRICS, format_number

TAUGHT = {"kind": "attention_distillation", "teacher": "teacher"}
ARMS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "learnable": {"text_encoder": "full"},
    "teacher": {"max_steps": 2},
    "distilled": {"text_encoder": "full", "method": TAUGHT},
}


def spent(arms: dict[str, dict[str, Any]], budget: int, processes: int = 1, **trainer: Any) -> Any:
    configs = {name: ArmConfig.model_validate(arm) for name, arm in arms.items()}
    options = TrainerConfig(**{"batch_size": 4} | trainer)
    return spend(arms_of(configs, options, FullEvaluation(), Path("run")), budget, processes)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_every_arm_gets_the_steps_that_its_passes_allow(processes: int, accumulated: int) -> None:
    """A student's step costs 4 passes an image, a plain step 3; its teacher's 2 steps are paid first."""
    arms, left_out = spent(ARMS, 30, processes, gradient_accumulation_steps=accumulated)
    assert not left_out
    assert {n: arm.trainer.max_steps for n, arm in arms.items()} == {
        "frozen": 30, "learnable": 30, "teacher": 2, "distilled": (30 * 3 - 2 * 3) // 4,
    }  # fmt: skip
    images = 4 * processes * accumulated
    total = passes_of(arms["distilled"], processes) + passes_of(arms["teacher"], processes)
    allowed = 30 * 3 * images
    assert allowed - 4 * images < total <= allowed == passes_of(arms["learnable"], processes)


def test_part_of_a_batch_costs_part_of_a_pass() -> None:
    half = {"like": "distilled", "method": {"kind": "attention_distillation", "batch_share": 0.5}}
    arms, _ = spent(ARMS | {"half": half}, 30)
    assert arms["half"].trainer.max_steps == int((30 * 3 - 6) / 3.5)


def test_each_batch_rounds_what_it_teaches() -> None:
    """A step of 8 batches of 2 images teaches 8 of them at least, not a fifth of 16."""
    few = {"like": "distilled", "method": {"kind": "attention_distillation", "batch_share": 0.2}}
    arms, _ = spent(ARMS | {"few": few}, 100, gradient_accumulation_steps=8, batch_size=2)
    arm, teacher = arms["few"], passes_of(arms["teacher"], 1)
    run = training_passes(method_of(arm.training.method, arm.training.denoising), arm.trainer, 1)
    assert run + teacher <= 100 * 3 * 16 < run + teacher + run // arm.trainer.max_steps
    assert passes_of(arm, 1) == run == arm.trainer.max_steps * 8 * (3 * 2 + 1)


def test_a_run_folder_that_teaches_counts_with_its_own_teachers(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    taught = {"text_encoder": "full", "method": {"kind": "attention_distillation", "teacher": str(folder)}}
    arms, _ = spent(ARMS | {"taught": taught}, 30)
    free = arms["taught"].trainer.max_steps
    write_json(folder / "cost.json", {"image_passes": 1, "image_passes_with_teachers": 200})
    arms, _ = spent(ARMS | {"taught": taught}, 30)
    own = passes_of(arms["taught"], 1)
    assert arms["taught"].trainer.max_steps < free and own + 200 <= 30 * 12 < own + 200 + own // free + 16
    write_json(folder / "cost.json", {"steps": 3})
    with pytest.raises(UserError, match=r"arms.taught: .*cost.json does not say image_passes_with_teachers"):
        spent(ARMS | {"taught": taught}, 30)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_method_measures_before_its_first_step_counts(processes: int) -> None:
    """A gate's looks once, however many processes share them; the tail penalty's measurement in each process."""
    gated = {"like": "distilled", "method": TAUGHT | {"gate_reference": "base", "gate_images": 3}}
    tail = {"method": {"kind": "tail_penalty"}}
    arms, _ = spent(ARMS | {"gated": gated, "tail": tail, "after": gated | {"max_steps": 4}}, 500, processes)
    images = 4 * processes
    assert arms["gated"].trainer.max_steps == (500 * 3 * images - 2 * 3 * images - 3 * 10 * 2) // (4 * images)
    assert arms["tail"].trainer.max_steps == (500 * 3 * images - processes * 512) // (3 * images)
    assert passes_of(arms["after"], processes) == 4 * 4 * images + 3 * 10 * 2
    three, _ = spent({"tail": tail}, 500, processes, batch_size=3)
    assert three["tail"].trainer.max_steps == (500 * 9 * processes - processes * 513) // (9 * processes)


def test_a_student_whose_teacher_costs_all_is_left_out_with_those_that_it_teaches() -> None:
    second = {
        "text_encoder": "full",
        "max_steps": 1,
        "method": {"kind": "attention_distillation", "teacher": "distilled"},
    }
    arms, left_out = spent(ARMS, 2)
    assert list(arms) == ["frozen", "learnable", "teacher"]
    assert left_out == {"distilled": "its teachers and its set-up cost 24 image-passes, and the budget is 24"}
    arms, left_out = spent(ARMS | {"second": second}, 2)
    assert "second" not in arms


def test_a_budget_without_an_arm_is_refused() -> None:
    arms = {"teacher": {"max_steps": 2}, "distilled": ARMS["distilled"]}
    with pytest.raises(UserError, match=r"budgets: 2 allows no arm a single step \(distilled: its teachers"):
        spent(arms, 2)  # a teacher alone is no comparison
    assert list(spent(arms, 4)[0]) == ["teacher", "distilled"]
    with pytest.raises(UserError, match=r"budgets: 1 allows no arm a single step \(tail: its teachers and its set-up"):
        spent({"tail": {"method": {"kind": "tail_penalty"}}}, 1)


def test_the_length_of_a_teacher_is_not_that_of_an_arm_that_is_like_it() -> None:
    """Else the arm would train the same number of steps at every budget, and be compared at equal cost."""
    arms, _ = spent(ARMS | {"alike": {"like": "teacher", "text_encoder": "full"}}, 30)
    assert (arms["teacher"].trainer.max_steps, arms["alike"].trainer.max_steps) == (2, 30)


def test_intervals_are_at_most_the_budget(tmp_path: Path) -> None:
    recipe = recipe_module("tradeoff")
    every = ["--trainer.checkpoint_every_steps", "1500", "--trainer.validate_every_steps", "30"]
    every += ["--trainer.max_steps", "2000"]  # the largest budget, which the intervals are compared with
    config = parse(recipe.TradeoffConfig, [*arms_argv("frozen"), "--budgets", "[20,2000]", *every])
    tail = {"method": {"kind": "tail_penalty"}}
    short = parse(recipe.TradeoffConfig, [*arms_argv(tail=tail), "--budgets", "[20,2000]", *every])
    trainer = recipe.at_budget(short, 3, tmp_path, 20)[1]["tail"].trainer
    assert trainer.max_steps == trainer.validate_every_steps == (20 * 3 * 16 - 512) // (3 * 16)
    for budget, expected in ((20, (20, 20, 20)), (2000, (2000, 1500, 30))):
        own, arms, _ = recipe.at_budget(config, 3, tmp_path, budget)
        trainer = arms["frozen"].trainer
        assert (trainer.max_steps, trainer.checkpoint_every_steps, trainer.validate_every_steps) == expected
        assert own.seeds == (3,) and own.budgets == () and own.trainer == trainer and own.output_dir == str(tmp_path)


def test_a_teacher_without_a_length_of_its_own_is_refused() -> None:
    with pytest.raises(UserError, match=r"arms.distilled: .* like teacher with max_steps"):
        spent(ARMS | {"teacher": {}}, 30)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--budgets", "[4,2]"], "budgets: expected from small to large, got [4, 2]"),
        (["--budgets", "[2,2]"], "expected each only once, got 2 several times"),
        (["--budgets", "[2]", "--trainer.max_steps", "3"], "trainer.max_steps and budgets are both given"),
        (["--budgets", "[2]", "--trainer.lr_schedule", "cosine"], "which ends at one length"),
        (["--margins", "{word.auc: -0.01}"], "margins are given, and budgets is empty"),
        (["--budgets", "[2]", "--compare_to", "[teacher]"], "compare_to: teacher has a max_steps of its own"),
        (
            ["--budgets", "[2]", "--margins", "{word.auc: -0.01}", "--compare_to", "[base]"],
            "compare_to: base is not trained",
        ),
        (
            ["--budgets", "[2]", "--margins", "{word.acc: -0.01}"],
            "margins: there is no word.acc; did you mean word.auc?",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_module("tradeoff")
    argv = [*arms_argv(**ARMS), "--output_dir", str(tmp_path / "run"), *options]
    assert expected in refusal_of(recipe.tradeoff, recipe.TradeoffConfig, argv, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fixed", [False, True])
def test_an_arm_goes_on_from_its_state_and_one_of_the_same_length_keeps_its_weights(
    fixed: bool, tmp_path: Path
) -> None:
    files = {"state/step-00000002/model.safetensors", "train_log.jsonl", "validation_log.jsonl", "gate_looks.json"}
    ends = {"cost.json", "metrics.json", "README.md", "lora.safetensors", "unet/config.json", "samples/0000.png"}
    for name in files | ends:
        path = tmp_path / "shorter/a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    (arm,) = spent({"a": {"max_steps": 2} if fixed else {}}, 2)[0].values()
    arm = replace(arm, folder=tmp_path / "longer/a")
    (tmp_path / "longer").mkdir()

    inherit(Accelerator(), tmp_path / "longer", arm)
    assert not arm.folder.exists(), "there is no shorter training"
    inherit(Accelerator(), tmp_path / "shorter", arm)
    found = {path.relative_to(arm.folder).as_posix() for path in arm.folder.rglob("*") if path.is_file()}
    assert found == (files | ends if fixed else files)
    for name in found:
        assert (arm.folder / name).read_text(encoding="utf-8") == name

    (arm.folder / "train_log.jsonl").write_text("own", encoding="utf-8")
    inherit(Accelerator(), tmp_path / "shorter", arm)
    assert (arm.folder / "train_log.jsonl").read_text(encoding="utf-8") == "own", "it has begun"


def test_metrics_with_a_margin_have_a_better_side() -> None:
    directions = {metric.key: metric.direction for metric in METRICS}
    measured = recipe_module("tradeoff").MEASURED
    assert {key for key, direction in directions.items() if direction and key in measured} == set(measured)
    assert {key for key in measured if directions[key] < 0} == set(LOWER_IS_BETTER)


@pytest.mark.parametrize("has_maps", [True, False])
def test_the_proof_says_of_each_arm_whether_it_is_as_good_as_its_parents(tmp_path: Path, has_maps: bool) -> None:
    values = {  # arm -> budget -> word AUC and FID of three seeds
        "plain": {2: ([0.70, 0.72, 0.71], [40, 42, 41]), 4: ([0.74, 0.75, 0.76], [30, 31, 32])},
        "better": {2: ([0.71, 0.73, 0.72], [38, 40, 39]), 4: ([0.75, 0.76, 0.77], [29, 30, 31])},
        "worse": {4: ([0.60, 0.66, 0.63], [30, 31, 32])},
    }
    folders = {budget: tmp_path / f"budget-{budget}" for budget in (2, 4)}
    for budget, folder in folders.items():
        arms = {
            name: {
                "cost": {"steps": budget, "image_passes_with_teachers": 3 * budget},
                "per_seed": {
                    str(seed): {"word.auc": auc, "quality.fid": fid} | ({"word.image_adds": 0.1} if has_maps else {})
                    for seed, auc, fid in zip((5, 6, 7), *found[budget], strict=True)
                },
            }
            for name, found in values.items()
            if budget in found
        }
        write_json(folder / "metrics.json", {"arms": arms, "provenance": {}})
    margins = {"word.auc": -0.01, "quality.fid": 0.05}
    path = write_proof(tmp_path, folders, arms=["plain", "better", "worse"], compare_to=["plain"], margins=margins)
    lines = path.read_text(encoding="utf-8").replace("\\", "").splitlines()
    rows = [line for line in lines if line.startswith(("| better | plain", "| worse | plain"))]
    assert [row.split(" | ")[2] for row in rows] == ["2", "4", "4"] and not any(
        "| plain | plain" in line for line in lines
    )
    assert ["✓" in row.split(" | ")[3] for row in rows] == [True, True, False]
    assert "+.010 [+.010, +.010] ✓ | -5 % [-5 %, -5 %] ✓ | yes |" in rows[0] and rows[2].endswith("| no |")
    assert "+0 % [+0 %, +0 %] ✓" in rows[2] and any("word AUC (-.010) | FID (+5 %) | all met" in line for line in lines)
    written = read_json(tmp_path / "proof.json")
    assert written["seeds"] == [5, 6, 7] and written["arms"]["better"]["lengths"]["4"]["word.auc"][
        "mean"
    ] == pytest.approx(0.76)
    assert (tmp_path / "fronts.png").is_file() == any("fronts.png" in line for line in lines) == has_maps


def test_a_signed_number_keeps_its_digits() -> None:
    numbers = (0.0314, -0.5, 10.0, -20.25, 1.0, -0.9999)
    said = [proof._signed(value, "quality.kid") for value in numbers]
    assert said == ["+.031", "-.500", "+10.000", "-20.250", "+1.000", "-1.000"]


def test_a_margin_is_met_only_where_it_was_tested() -> None:
    def one(*differences: float) -> Comparison:
        return compare("a", "b", 4, "word.auc", dict(enumerate(differences)), -0.01)

    good, bad, single = one(0.1, 0.1, 0.1), one(-0.1, -0.1, -0.1), one(0.1)
    assert proof._all_met([good, good]) == "yes"
    for found in ([good, single], [good, None], [None], [single]):
        assert proof._all_met(found) == "not tested"
    for found in ([good, bad], [bad, None], [single, bad]):
        assert proof._all_met(found) == "no"


def test_the_tables_of_the_proof_hold_what_was_measured(tmp_path: Path) -> None:
    """One seed has no interval and proves nothing; an arm without a metric gets a dash; the base is not trained."""

    def arm_of(steps: int | None, cost: int | None, *seeds: tuple[float | None, float | None]) -> dict[str, Any]:
        each = {str(k): {"word.auc": auc, "quality.fid": fid} for k, (auc, fid) in enumerate(seeds, 3)}
        return {"cost": {"steps": steps, "image_passes_with_teachers": cost}, "per_seed": each}

    both = {2: {"a": arm_of(1000, 3500, (0.6, 20.0), (0.64, 30.0)), "base": arm_of(None, None, (0.5, 9.0))},
            4: {"a": arm_of(2000, 7000, (0.7, 20.0)), "b": arm_of(900, 6999, (0.75, None), (0.5, 10.0)),
                "taught": arm_of(1, 3, (0.1, 1.0))}}  # fmt: skip
    folders = {budget: tmp_path / f"budget-{budget}" for budget in both}
    origin = {"config": {"x": 1}, "commits": ["abc"], "counts": {"n": 2}, "seconds": 3}
    for budget, arms in both.items():
        write_json(folders[budget] / "metrics.json", {"arms": arms, "provenance": origin | {"counts": {"n": budget}}})
    margins = {"word.auc": -0.01, "quality.fid": 0.05}
    path = write_proof(tmp_path, folders, arms=["b", "gone"], compare_to=["a", "gone"], margins=margins)
    text = path.read_text(encoding="utf-8").replace("\\", "")
    assert text.startswith("# Arms at equal cost\n\nA budget is in steps") and text.endswith("|\n")
    assert "taught" not in text and "fronts.png" not in text and "| base" not in text
    tables = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("## ")[1:]]
    assert tables[0] == [
        "| arm | minus | budget | word AUC (-.010) | FID (+5 %) | all met |", "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| b | a | 4 | +.050 | – | not tested |",
    ]  # fmt: skip
    assert tables[1][0] == "| arm | steps | image-passes | word AUC ↑ | FID ↓ |"
    assert [row.split(" | ")[0] for row in tables[1][2:]] == ["| a"]
    half = student_interval([0.6, 0.64])
    assert half is not None
    ends = ", ".join(format_number(end, 3) for end in half)
    assert tables[1][2].startswith(f"| a | 1,000 | 3,500 | .620 [{ends}] | 25.0 [")
    assert tables[2][2:] == [
        "| a | 2,000 | 7,000 | .700 | 20.0 |", tables[2][3],
    ] and tables[2][3].startswith("| b | 900 | 6,999 | .625 [") and tables[2][3].endswith(" | 10.0 |")  # fmt: skip
    document = read_json(tmp_path / "proof.json")
    assert (
        document["seeds"] == [3, 4] and document["margins"] == margins and set(document["arms"]) == {"a", "b", "taught"}
    )
    assert document["arms"]["a"]["cost"] == 7000
    lengths = document["arms"]["a"]["lengths"]
    assert (
        lengths["2"]["steps"] == 1000
        and lengths["2"]["cost"] == 3500
        and lengths["4"]["word.auc"]["t_interval"] is None
    )
    assert lengths["2"]["quality.fid"]["mean"] == 25.0
    assert document["arms"]["a"]["per_seed"] == {
        "3": {"2": {"word.auc": 0.6, "quality.fid": 20.0}, "4": {"word.auc": 0.7, "quality.fid": 20.0}},
        "4": {"2": {"word.auc": 0.64, "quality.fid": 30.0}},
    }
    (one,) = document["comparisons"]
    assert one["per_seed"] == {"3": pytest.approx(0.05)} and one["t_interval"] is None and one["met"] is False
    assert "interval" not in one and document["provenance"]["counts"] == {"n": 4}
    assert document["provenance"]["config"] == {"x": 1} and document["provenance"]["commits"] == ["abc"]
    assert "seconds" not in document["provenance"]
    write_json(folders[2] / "metrics.json", {"arms": {"a": arm_of(5, None)}, "provenance": origin})
    with pytest.raises(UserError, match="budget-2: the cost of a in image-passes is unknown"):
        write_proof(tmp_path, folders, arms=["a"], compare_to=["a"], margins=margins)


@pytest.mark.slow
def test_two_budgets_and_two_seeds_give_a_proof(
    work: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Budget 4 goes on from budget 2 and equals a training of 4 steps; the numbers of proof.json are those of the
    runs."""
    lora = {"denoiser": "lora", "lora": {"rank": 2}}
    arms = {name: {**arm, **lora} for name, arm in ARMS.items()}
    arms["distilled"] = arms["distilled"] | {"method": TAUGHT | {"batch_share": 0.5}}
    arms["teacher"]["max_steps"] = 1
    given = [*TRAINING]
    at = given.index("--trainer.max_steps")
    del given[at : at + 2]
    given[given.index("--evaluation.features") + 1] = "phantom"
    argv = ["--base.name", str(work / "sd"), *arms_argv(**arms), "--compare_to", "[frozen,learnable]",
            "--data.cache_dir", str(work / "cache"), *given]  # fmt: skip
    trained: list[tuple[str, int]] = []
    states: list[bool] = []
    fit = train.fit

    def counted(*args: Any, **kwargs: Any) -> Any:
        trained.append((kwargs["label"], args[2].max_steps))
        states.append(checkpoints.newest(kwargs["output_dir"] / "state", pytest.fail) is not None)
        return fit(*args, **kwargs)

    monkeypatch.setattr(train, "fit", counted)
    folder = tmp_path / "run"
    margins = ["--margins", "{word.auc: -0.01, quality.fid: 0.05}"]
    command = [*argv, "--seeds", "[0,1]", "--budgets", "[2,4]", *margins, "--output_dir", str(folder)]
    run("tradeoff", command)
    # In batches of 2 a plain step costs 6 and a step of the student 7: none fits into 2 x 6 - 6, and two into 4 x 6 -
    # 6.
    steps = {}
    for budget in (2, 4):
        for seed in (0, 1):
            found = json.loads((folder / f"budget-{budget}/seed-{seed}/metrics.json").read_text(encoding="utf-8"))
            steps[budget, seed] = {n: a["cost"]["steps"] for n, a in found["arms"].items() if n != "base"}
    assert steps[2, 0] == steps[2, 1] == {"frozen": 2, "learnable": 2, "teacher": 1}
    assert steps[4, 0] == steps[4, 1] == {"frozen": 4, "learnable": 4, "teacher": 1, "distilled": 2}
    assert trained.count(("teacher", 1)) == 2, "a teacher is trained once a seed"
    begun = {one: state for one, state in zip(trained, states, strict=True)}
    assert not begun["learnable", 2] and begun["learnable", 4]

    proof = json.loads((folder / "proof.json").read_text(encoding="utf-8"))
    assert proof["seeds"] == [0, 1] and proof["margins"] == {"word.auc": -0.01, "quality.fid": 0.05}
    assert set(proof["arms"]) == {"frozen", "learnable", "teacher", "distilled"}
    images = 2
    assert proof["arms"]["learnable"]["lengths"]["4"]["cost"] == 4 * 3 * images
    assert proof["arms"]["distilled"]["lengths"]["4"]["cost"] == 1 * 3 * images + 2 * (3 * images + 1)
    values = [proof["arms"]["distilled"]["per_seed"][s]["4"]["word.auc"] for s in ("0", "1")]
    length = proof["arms"]["distilled"]["lengths"]["4"]["word.auc"]
    assert length["mean"] == pytest.approx(np.mean(values))
    assert length["t_interval"] == pytest.approx(student_interval(values))
    kinds = [(c["arm"], c["parent"], c["budget"], c["metric"]) for c in proof["comparisons"]]
    assert ("distilled", "learnable", 4, "word.auc") in kinds and ("learnable", "frozen", 2, "quality.fid") in kinds
    assert not any("teacher" in (arm, parent) for arm, parent, *_ in kinds)
    one = next(
        c for c in proof["comparisons"] if (c["arm"], c["parent"], c["metric"]) == ("distilled", "frozen", "word.auc")
    )
    theirs = [proof["arms"]["frozen"]["per_seed"][s]["4"]["word.auc"] for s in ("0", "1")]
    assert one["difference"] == pytest.approx(np.mean(values) - np.mean(theirs))
    text = (folder / "proof.md").read_text(encoding="utf-8")
    assert "| distilled | frozen | 4 |" in text and "fronts.png" in text and (folder / "fronts.png").is_file()

    straight = tmp_path / "straight"
    run(
        "tradeoff",
        [*argv, "--trainer.max_steps", "4", "--arms.distilled.max_steps", "2", "--output_dir", str(straight)],
    )
    for name in ("learnable", "distilled"):
        ours = (folder / f"budget-4/seed-0/{name}/train_log.jsonl").read_text(encoding="utf-8").splitlines()
        alone = (straight / name / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [
            [{k: v for k, v in json.loads(row).items() if k != "seconds"} for row in log] for log in (ours, alone)
        ]
        assert losses[0] == losses[1]

    before = len(trained)
    run("tradeoff", command)
    assert len(trained) == before, "a finished comparison is read"


def test_without_compare_to_the_first_arm_of_no_length_of_its_own_is_the_baseline() -> None:
    recipe = recipe_module("tradeoff")
    arms = {"teacher": ARMS["teacher"], **ARMS}
    for options, expected in ((["--budgets", "[2]"], ("frozen",)), ([], ("teacher",))):
        assert parse(recipe.TradeoffConfig, [*arms_argv(**arms), *options]).baselines == expected
    assert parse(recipe.TradeoffConfig, [*arms_argv(**arms), "--compare_to", "[learnable]"]).baselines == ("learnable",)


def test_a_warm_up_longer_than_a_budget_is_refused() -> None:
    """Its length is that of the budget, which `trainer.max_steps` does not know."""
    trainer = of_length(TrainerConfig(max_steps=1000, warmup_steps=8), 7)
    arm = Arm("a", Path("a"), Training(), trainer, FullEvaluation())
    assert steps_faults(arm) == [
        "trainer.warmup_steps is 8, and it trains for 7 steps, so that this never ends or begins; at most 7 is right"
    ]
    assert steps_faults(replace(arm, trainer=of_length(trainer, 8))) == []


def test_a_value_of_one_seed_stands_without_an_interval() -> None:
    point = proof.Point(2, 12, {0: {"word.auc": 0.75, "quality.fid": 50.0}})
    (table,) = proof._budget({"frozen": {2: point}}, ["frozen"], 2).tables
    assert table.rows == [["frozen", "2", "12", ".750", "50.0"]]

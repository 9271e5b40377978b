"""Arms from one base, evaluated alike, in one report: what training the text encoder gains, and what it costs.

    accelerate launch recipes/tradeoff.py --config recipes/configs/phantom/tradeoff_quick.yaml

`arms` names the arms and says how each is trained; an arm whose method names another arm is trained after it. The same
command again continues. Started several times at once on one folder, each process takes the arms that no other is at,
and the last to end reports them all; with several seeds, give each process another order of them.

With `budgets`, all arms get the same image-passes, teachers included, and are compared at each budget:
OUTPUT/budget-N/seed-M are run folders as without, and proof.json and proof.md say which arm is as good as its parents.
With trainer.validate_every_steps too, looks.md says whether looks at validation images rank the budgets as held-out
images do.

The losses are in distill/methods/; the loop is `fit` in distill/trainer.py.
"""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import AfterValidator, Field, model_validator

from distill.cli import main
from distill.config import RunConfig, TrainerConfig
from distill.configuration import renamed as old
from distill.methods.training import ArmConfig
from distill.settings import HARMLESS, MAY_GAIN, Count, Seed, Text, Texts, once

if TYPE_CHECKING:
    from distill.experiment.arms import Arm
    from distill.files import JsonObject


MEASURED = (
    "word.image_adds", "word.auc", "word.top1", "word.cnr", "word.iou", "quality.fid", "quality.kid", "quality.finding_auc",
    "quality.precision", "quality.recall", "quality.density", "quality.coverage",
)  # fmt: skip
"""Metrics that can have a margin."""


class TradeoffConfig(RunConfig):
    """Train several arms from one base, evaluate them alike, and write one report.

    accelerate launch recipes/tradeoff.py --config recipes/configs/phantom/tradeoff_quick.yaml
    """

    common: ClassVar[tuple[str, ...]] = (
        "base.name", "data.kind", "data.root", "arms", "compare_to", "seeds", "trainer.max_steps", "trainer.batch_size",
        "trainer.learning_rate", "output_dir",
    )  # fmt: skip
    renamed: ClassVar[dict[str, str]] = old.TRADEOFF
    arms: Annotated[dict[str, ArmConfig], MAY_GAIN] = Field(default_factory=dict)
    """Name -> how the arm is trained: the options of finetune.py's model, `like` and learning rates of its own."""
    compare_to: Annotated[Texts, HARMLESS] = ()
    """Arms that all others are compared with. Empty takes the first."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Training seeds. Several get a folder seed-N each, and one report of all."""
    budgets: Annotated[tuple[Count, ...], AfterValidator(once)] = ()
    """Compare at equal cost: each arm gets the steps that cost as many image-passes as this many steps of plain
    fine-tuning, teachers included. It is evaluated at each budget and trained on to the next. In place of
    trainer.max_steps."""
    margins: Annotated[dict[Text, Annotated[float, Field(ge=-1e3, le=1e3)]], HARMLESS] = Field(default_factory=dict)
    """With budgets: metric -> the difference from a parent (compare_to) that is just not worse, such as
    word.image_adds: -0.01. Of quality.fid the difference of logarithms, such as 0.05."""
    trainer: TrainerConfig = TrainerConfig()
    output_dir: Text = "checkpoints/tradeoff"
    """Run folder. Each arm gets a folder of its own in it."""

    @property
    def training_seed(self) -> int:
        return self.seeds[0]

    @property
    def baselines(self) -> tuple[str, ...]:
        """Without compare_to the first arm; under budgets, the first whose length is not its own."""
        equal = [name for name, arm in self.arms.items() if not self.budgets or arm.max_steps is None]
        return self.compare_to or tuple(equal)[:1]

    @model_validator(mode="after")
    def _check(self) -> TradeoffConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each only once")
        if unknown := [name for name in self.compare_to if name not in self.arms and name != "base"]:
            raise ValueError(f"compare_to: {', '.join(unknown)} is no arm; there are {', '.join(self.arms)}")
        if self.margins and not self.budgets:
            raise ValueError("margins are given, and budgets is empty; set budgets, or leave margins out")
        if unknown := [key for key in self.margins if key not in MEASURED]:
            close = difflib.get_close_matches(unknown[0], MEASURED, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(MEASURED)}"
            raise ValueError(f"margins: there is no {unknown[0]}; {hint}")
        if self.budgets and list(self.budgets) != sorted(self.budgets):
            raise ValueError(f"budgets: expected from small to large, got {list(self.budgets)}")
        if self.budgets and "max_steps" in self.trainer.model_fields_set and self.trainer.max_steps != self.budgets[-1]:
            raise ValueError(
                f"trainer.max_steps and budgets are both given; leave trainer.max_steps out, or set it to the largest "
                f"budget, {self.budgets[-1]}"
            )
        own = [name for name in self.compare_to if name != "base" and self.arms[name].max_steps is not None]
        if self.budgets and own:
            raise ValueError(
                f"compare_to: {own[0]} has a max_steps of its own, and budgets compare at equal cost; leave it out of "
                "compare_to"
            )
        if self.margins and "base" in self.compare_to:
            raise ValueError("compare_to: base is not trained, and margins compare at equal cost; leave it out")
        if self.budgets and self.trainer.lr_schedule != "constant":
            raise ValueError(
                f"budgets: trainer.lr_schedule is {self.trainer.lr_schedule}, which ends at one length; set it to "
                "constant"
            )
        return self


def tradeoff(config: TradeoffConfig) -> None:
    from distill.experiment.folder import held
    from distill.experiment.sharing import finish_seeds, share_base
    from distill.processes import process_state

    folder = Path(config.output_dir)
    for budget in config.budgets:
        at_budget(config, config.seeds[0], folder, budget)  # what a budget cannot have is told at the start
    # The ranks of one launch train each arm together, and share with no other launch.
    with held(folder, shared=process_state().num_processes == 1, write=not config.dry_run):
        if config.budgets and not config.dry_run:
            return at_equal_cost(config, folder)
        if config.dry_run or len(config.seeds) == 1:
            return one_seed(config, config.seeds[0], folder, max(config.budgets, default=None))
        for seed in config.seeds:
            own = folder / f"seed-{seed}"
            share_base([folder], own / "base")
            one_seed(config, seed, own)
        finish_seeds(folder, config.baselines)


def at_equal_cost(config: TradeoffConfig, folder: Path) -> None:
    """All arms at every budget, with every seed."""
    from distill.experiment.budgets import budget_folder
    from distill.experiment.sharing import finish_seeds, share_base
    from distill.experiment.signals import write_signals
    from distill.processes import process_state
    from distill.report.proof import write_proof

    folders = {budget: budget_folder(folder, budget) for budget in config.budgets}
    for seed in config.seeds:
        shorter: Path | None = None
        for budget, of_seeds in folders.items():
            own = of_seeds / f"seed-{seed}"
            share_base(list(folders.values()), own / "base")
            one_seed(config, seed, own, budget, shorter)
            shorter = own
    for of_seeds in folders.values():
        finish_seeds(of_seeds, config.baselines)
    if process_state().is_main_process:
        compared = [name for name, arm in config.arms.items() if arm.max_steps is None]
        proof = write_proof(folder, folders, arms=compared, compare_to=config.baselines, margins=config.margins)
        print(f"at equal cost: {proof}\n        {folder / 'proof.json'}")
        if looks := write_signals(folder, folders):
            print(f"looks at validation images and held-out quality: {looks}")
        print(f"next: open {proof}")


def at_budget(
    config: TradeoffConfig, seed: int, folder: Path, budget: int | None
) -> tuple[TradeoffConfig, dict[str, Arm], dict[str, str]]:
    """The configuration of one run folder, its arms, and those that the budget leaves out, with the reason."""
    from distill.experiment.arms import arms_of
    from distill.experiment.budgets import of_length, spend
    from distill.processes import process_state

    changed: dict[str, object] = {"seeds": (seed,), "output_dir": str(folder)}
    if budget is not None:
        changed |= {"trainer": of_length(config.trainer, budget), "budgets": (), "margins": {}}
    own = config.model_copy(update=changed)
    arms = arms_of(own.arms, own.trainer, own.evaluation.full(), folder)
    return own, *(spend(arms, budget, process_state().num_processes) if budget is not None else (arms, {}))


def one_seed(
    config: TradeoffConfig, seed: int, folder: Path, budget: int | None = None, shorter: Path | None = None
) -> None:
    """Train and evaluate all arms with one seed.

    budget: see `TradeoffConfig.budgets`. shorter: run folder of this seed at the budget before.
    """
    from distill.experiment.budgets import inherit
    from distill.experiment.results import evaluate_arm, finish
    from distill.experiment.run import open_run
    from distill.experiment.sharing import Job, share_out
    from distill.experiment.train import dry_run, train_arm

    own, arms, left_out = at_budget(config, seed, folder, budget)
    run = open_run(own, arms, compare_to=config.baselines)
    if config.dry_run:
        return dry_run(run)
    for name, reason in left_out.items():
        run.say(f"{name}: not at budget {budget:,}: {reason}")
    steps = ", ".join(f"{arm.name} ({arm.trainer.max_steps:,} steps)" for arm in arms.values())
    run.say(f"plan: evaluate the base; train and evaluate {steps}; then write {folder / 'report.html'}")
    results: JsonObject = {}

    def base() -> None:
        results["base"] = evaluate_arm(run, "base", None)

    def make(arm: Arm) -> None:
        if shorter is not None:
            inherit(run.accelerator, shorter, arm)
        results[arm.name] = evaluate_arm(run, arm.name, arm.folder, train_arm(run, arm))

    jobs = {"base": Job(base)} | {arm.name: Job(partial(make, arm), arm.needs) for arm in arms.values()}
    share_out(run, jobs)
    finish(run, {name: results[name] for name in jobs}, f"open {folder / 'report.html'}")


if __name__ == "__main__":
    main(tradeoff, TradeoffConfig)

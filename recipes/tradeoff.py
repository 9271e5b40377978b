"""Arms from one base, evaluated alike, in one report: what training the text encoder gains, and what it costs.

    accelerate launch recipes/tradeoff.py --config recipes/configs/phantom/tradeoff_quick.yaml

`arms` names the arms and says how each is trained; an arm whose method names another arm is trained after it. The same
command again continues. Started several times at once on one folder, each process takes the arms that no other is at, and
the last to end reports them all; with several seeds, give each process another order of them.

The losses are in distill/methods/; the loop is `fit` in distill/trainer.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, model_validator

from distill.cli import main
from distill.config import RunConfig, TrainerConfig
from distill.configuration import renamed as old
from distill.methods.training import ArmConfig
from distill.settings import HARMLESS, Seed, Text, Texts

if TYPE_CHECKING:
    from distill.experiment.arms import Arm
    from distill.files import JsonObject


class TradeoffConfig(RunConfig):
    """Train several arms from one base, evaluate them alike, and write one report.

    accelerate launch recipes/tradeoff.py --config recipes/configs/phantom/tradeoff_quick.yaml
    """

    common: ClassVar[tuple[str, ...]] = (
        "base.name", "data.kind", "data.root", "arms", "compare_to", "seeds", "trainer.max_steps", "trainer.batch_size",
        "trainer.learning_rate", "output_dir",
    )  # fmt: skip
    renamed: ClassVar[dict[str, str]] = old.TRADEOFF
    arms: dict[str, ArmConfig] = Field(default_factory=dict)
    """Name -> how the arm is trained: the options of finetune.py's model, `like` and learning rates of its own."""
    compare_to: Annotated[Texts, HARMLESS] = ()
    """Arms that all others are compared with. Empty takes the first."""
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    """Training seeds. Several get a folder seed-N each, and one report of all."""
    trainer: TrainerConfig = TrainerConfig()
    output_dir: Text = "checkpoints/tradeoff"
    """Run folder. Each arm gets a folder of its own in it."""

    @property
    def training_seed(self) -> int:
        return self.seeds[0]

    @model_validator(mode="after")
    def _check(self) -> TradeoffConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: each only once")
        if unknown := [name for name in self.compare_to if name not in self.arms and name != "base"]:
            raise ValueError(f"compare_to: {', '.join(unknown)} is no arm; there are {', '.join(self.arms)}")
        return self


def tradeoff(config: TradeoffConfig) -> None:
    from distill.experiment.folder import held
    from distill.experiment.sharing import finish_seeds, share_base
    from distill.processes import process_state

    folder = Path(config.output_dir)
    # The ranks of one launch train each arm together, and share with no other launch.
    with held(folder, shared=process_state().num_processes == 1, write=not config.dry_run):
        if config.dry_run or len(config.seeds) == 1:
            return one_seed(config, config.seeds[0], folder)
        for seed in config.seeds:
            own = folder / f"seed-{seed}"
            share_base(folder, own / "base")
            one_seed(config, seed, own)
        finish_seeds(folder, config.compare_to)


def one_seed(config: TradeoffConfig, seed: int, folder: Path) -> None:
    """Train and evaluate all arms with one seed."""
    from distill.experiment.arms import arms_of
    from distill.experiment.results import evaluate_arm, finish
    from distill.experiment.run import open_run
    from distill.experiment.sharing import Job, share_out
    from distill.experiment.train import dry_run, train_arm

    own = config.model_copy(update={"seeds": (seed,), "output_dir": str(folder)})
    arms = arms_of(config.arms, config.trainer, config.evaluation.full(), folder)
    run = open_run(own, arms, compare_to=config.compare_to or (next(iter(arms)),))
    if config.dry_run:
        return dry_run(run)
    steps = ", ".join(f"{arm.name} ({arm.trainer.max_steps:,} steps)" for arm in arms.values())
    run.say(f"plan: evaluate the base; train and evaluate {steps}; then write {folder / 'report.html'}")
    results: JsonObject = {}

    def base() -> None:
        results["base"] = evaluate_arm(run, "base", None)

    def make(arm: Arm) -> None:
        results[arm.name] = evaluate_arm(run, arm.name, arm.folder, train_arm(run, arm))

    jobs = {"base": Job(base)} | {arm.name: Job(partial(make, arm), arm.needs) for arm in arms.values()}
    share_out(run, jobs)
    finish(run, {name: results[name] for name in jobs}, f"open {folder / 'report.html'}")


if __name__ == "__main__":
    main(tradeoff, TradeoffConfig)

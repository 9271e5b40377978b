"""Quality and localization of a base, or of a trained run on it; writes metrics.json and the report.

accelerate launch recipes/evaluate.py --config recipes/configs/phantom/evaluate.yaml --run checkpoints/finetune
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from distill.cli import main
from distill.config import FullEvaluation, RunConfig
from distill.settings import Text


class EvaluateConfig(RunConfig):
    """Measure quality and localization of a base, or of a trained run on it.

    accelerate launch recipes/evaluate.py --config recipes/configs/phantom/evaluate.yaml --run checkpoints/finetune
    """

    common: ClassVar[tuple[str, ...]] = ("base.name", "run", "data.kind", "data.root", "output_dir")
    run: Text | None = None
    """Run folder whose adapters or full weights are put on the base. None evaluates the base itself."""
    evaluation: FullEvaluation = FullEvaluation()
    """Quality and localization, measured on held-out images."""
    output_dir: Text = "checkpoints/evaluate"
    """Where metrics.json, samples, maps and the report are written."""


def evaluate(config: EvaluateConfig) -> None:
    from distill.experiment.folder import held
    from distill.experiment.results import dry_run_evaluation, evaluate_arm, finish, judge_memorization
    from distill.experiment.run import open_run

    with held(Path(config.output_dir), write=not config.dry_run):
        run = open_run(config, {}, evaluation=config.evaluation, run=config.run, compare_to=("base",))
        if config.dry_run:
            return dry_run_evaluation(run, config.run)
        results = {"base": evaluate_arm(run, "base", None)}
        if config.run is not None:
            results["model"] = evaluate_arm(run, "model", Path(config.run))
        finish(run, results, f"open {Path(config.output_dir) / 'report.html'}")
        judge_memorization(
            results[list(results)[-1]],
            Path(config.run) if config.run else None,
            config.evaluation.memorization_limit,
        )


if __name__ == "__main__":
    main(evaluate, EvaluateConfig)

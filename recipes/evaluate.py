"""Quality and localization of a base, or of a trained run on it; writes metrics.json and the report.

accelerate launch recipes/evaluate.py --config recipes/configs/phantom/evaluate.yaml --run checkpoints/finetune
"""

from __future__ import annotations

from pathlib import Path

from distill.cli import main
from distill.config import EvaluateConfig
from distill.runs import dry_run_evaluation, evaluate_arm, finish, open_run


def evaluate(config: EvaluateConfig) -> None:
    run = open_run(config, arms=[])
    if config.dry_run:
        return dry_run_evaluation(run)
    results = {"base": evaluate_arm(run, "base", None)}
    if config.run is not None:
        results["model"] = evaluate_arm(run, "model", Path(config.run))
    finish(run, results, next_command=f"open {Path(config.output_dir) / 'report.html'}")


if __name__ == "__main__":
    main(evaluate, EvaluateConfig)

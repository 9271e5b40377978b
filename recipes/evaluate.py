"""Quality, localization, memorization and utility of a base, of a trained run on it, or of a folder of images, and the
report.

accelerate launch recipes/evaluate.py --config recipes/configs/phantom/evaluate.yaml --run checkpoints/finetune
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import model_validator

from distill.cli import main
from distill.config import FullEvaluation, RunConfig
from distill.data_config import fit_of
from distill.settings import Text


class EvaluateConfig(RunConfig):
    """Measure quality and localization of a base, or of a trained run on it.

    accelerate launch recipes/evaluate.py --config recipes/configs/phantom/evaluate.yaml --run checkpoints/finetune
    """

    common: ClassVar[tuple[str, ...]] = ("base.name", "run", "data.kind", "data.root", "output_dir")
    run: Text | None = None
    """Run folder whose adapters or full weights are put on the base. None evaluates the base itself."""
    images: Text | None = None
    """Folder of images that another tool made, with metadata.csv or metadata.jsonl (file_name, text, and labels if
    known). They are evaluated in place of a model's; localization is not measured."""
    evaluation: FullEvaluation = FullEvaluation()
    """Quality and localization, measured on held-out images."""
    output_dir: Text = "checkpoints/evaluate"
    """Where metrics.json, samples, maps and the report are written."""

    @model_validator(mode="after")
    def _check_images(self) -> EvaluateConfig:
        if self.images is not None and self.run is not None:
            raise ValueError(f"images is {self.images}, and run is {self.run}; give one of them")
        if self.images is not None and set(self.evaluation.parts) == {"localization"}:
            raise ValueError("images have no attention maps, and evaluation.parts is localization; add quality")
        return self


def evaluate(config: EvaluateConfig) -> None:
    from distill.experiment.folder import held
    from distill.experiment.images import evaluate_images, read_images
    from distill.experiment.results import dry_run_evaluation, evaluate_arm, finish, judge_memorization
    from distill.experiment.run import open_run

    with held(Path(config.output_dir), write=not config.dry_run):
        size, fit, words = config.data.resolution, fit_of(config.data), getattr(config.data, "query_words", None)
        images = read_images(Path(config.images), size, fit, words) if config.images else None
        measured = config.evaluation
        if images:  # FID and its kin depend on the number of images of both sides
            count = min(len(images), measured.generated_images)
            parts = tuple(part for part in measured.parts if part != "localization")
            measured = measured.model_copy(update={"generated_images": count, "parts": parts})
        run = open_run(config, {}, evaluation=measured, run=config.run, compare_to=("base",))
        if config.dry_run and images:
            return run.say(f"dry run: {len(images):,} images, the data and the base are fine; nothing was written")
        if config.dry_run:
            return dry_run_evaluation(run, config.run)
        results = {"images": evaluate_images(run, images)} if images else {"base": evaluate_arm(run, "base", None)}
        if config.run is not None:
            results["model"] = evaluate_arm(run, "model", Path(config.run))
        card = Path(config.run) if config.run else None
        finish(run, results, f"open {Path(config.output_dir) / 'report.html'}", card)
        judge_memorization(results[list(results)[-1]], card, config.evaluation.memorization_limit)


if __name__ == "__main__":
    main(evaluate, EvaluateConfig)

"""Evaluate what an arm exported, as a user would load it, and write the results of a run."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from distill.cli import to_yaml
from distill.config import BaseConfig, FullEvaluation
from distill.evaluation.evaluate import evaluate, held_out, quality
from distill.evaluation.localization import localization
from distill.evaluation.results import parse_metrics
from distill.evaluation.seeds import Resampled
from distill.experiment.arms import settings_of
from distill.experiment.run import Run
from distill.files import provenance, read_json, write_json
from distill.models import load_model
from distill.models.adapters import parameter_counts
from distill.models.bits import quantize
from distill.models.stock import exported
from distill.report import (
    terminal_summary,
    terminal_table,
    write_model_card,
    write_report,
)
from distill.trainer import peak_memory_gb


def evaluate_arm(
    run: Run,
    name: str,
    folder: Path | None,
    cost: dict[str, Any] | None = None,
    *,
    base: BaseConfig | None = None,
    evaluation: FullEvaluation | None = None,
) -> dict[str, Any]:
    """Load base and run folder as a user would, evaluate, and write <run>/<arm>/metrics.json; returns its entry.

    base: the base of `folder`, where it is not the one that the arms are trained from. evaluation: in place of the run's or
    the arm's. cost: of what this run has trained; its metrics.json then has the settings of its training, and it gets a card.
    """
    assert run.against is not None
    path = run.folder / name / "metrics.json"
    if path.exists():
        run.say(f"{name}: already evaluated, {path}")
        return cast(dict[str, Any], read_json(path)["arms"][name])
    arm = run.arms.get(name)
    result = evaluate(
        load_model(base or run.base, run=folder),
        run.against,
        evaluation or (arm.evaluation if arm else run.evaluation),
        resolution=run.config.data.resolution,
        accelerator=run.accelerator,
        arm_dir=run.folder / name,
        label=name,
    )
    seconds = result.pop("seconds")
    empty = {"train_seconds": None, "steps": None, "peak_memory_gb": peak_memory_gb(), "trainable_parameters": None}
    entry = result | {"cost": (cost or empty) | seconds}
    if run.accelerator.is_main_process:
        settings = settings_of(run.config, arm) if arm else None
        written = {"arms": {name: entry}, "provenance": provenance()}
        write_json(path, written | ({"settings": settings} if settings else {}))
        if folder is not None and cost is not None and settings is not None:
            write_model_card(folder, entry, settings, provenance(), base_name=run.base.name, export=exported(folder))
    run.accelerator.wait_for_everyone()
    return entry


def finish(run: Run, arms: Mapping[str, dict[str, Any]], next_command: str) -> None:
    """metrics.json of all arms, the report, the table in the terminal, paths, and the next command."""
    assert run.against is not None
    if not run.accelerator.is_main_process:
        return
    config = run.config
    for name, entry in arms.items():
        if entry["cost"]["train_seconds"] is not None:
            run.seconds[f"{name}: training"] = entry["cost"]["train_seconds"]
        run.seconds[f"{name}: evaluation"] = entry["cost"]["evaluation_seconds"]
    counts = {
        "training_images": len(run.train) if run.train is not None else None,
        "held_out_images": len(run.test),
        "localization_images": max(
            (e["localization"]["word"]["images"] for e in arms.values() if e["localization"]), default=0
        ),
        "generated_images": min(run.evaluation.generated_images, len(run.test)),
        "bootstrap_samples": run.evaluation.bootstrap_samples,
    }
    seeds = {"training": run.seed, "evaluation": run.evaluation.seed, "data": getattr(config.data, "seed", None)}
    origin = provenance() | {
        "seeds": seeds,
        "counts": counts,
        "seconds": {k: round(v, 1) for k, v in run.seconds.items()},
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "processes": run.accelerator.num_processes,
        "config": config.model_dump(mode="json"),
    }
    baselines = [name for name in run.compare_to if name in arms]
    resampled = Resampled({run.seed: run.folder}, arms, run.evaluation.bootstrap_samples)
    metrics = {
        "arms": dict(arms),
        "real": {"quality": run.against.quality},
        "paired": resampled.paired(list(arms), baselines),
        "compare_to": baselines,
        "provenance": origin,
    }
    results = parse_metrics(metrics)
    write_json(run.folder / "metrics.json", metrics)
    html, markdown = write_report(run.folder)
    run.console.print(terminal_table(metrics))
    run.say(terminal_summary(results))
    for name in (name for name, entry in arms.items() if entry["cost"]["train_seconds"] is not None):
        exported = [p for p in (run.folder / name, run.folder) if (p / "cost.json").exists()]
        if exported:
            run.say(f"{name}: {exported[0]}")
    run.say(f"report: {html}\n        {markdown}\nnumbers: {run.folder / 'metrics.json'}\nnext: {next_command}")


def dry_run_evaluation(run: Run, folder: str | None) -> None:
    """Resolved configuration, and estimates from one batch of maps and one of images. Writes nothing that stays."""
    config, accelerator, c = run.config, run.accelerator, run.evaluation
    run.say(to_yaml(config))
    change = {
        "localization_images": c.batch_size,
        "generated_images": c.batch_size,
        "diversity_captions": 1,
        "examples": 1,
    }
    few = c.model_copy(update=change)
    model = load_model(config.base, folder).to(accelerator.device).freeze()
    if c.quantization != "none":
        quantize(model, c.quantization)
    with tempfile.TemporaryDirectory() as scratch:
        against = held_out(run.test, model, few, None, accelerator=accelerator, run_dir=Path(scratch))
        shared: dict[str, Any] = {"accelerator": accelerator, "arm_dir": Path(scratch), "label": "dry run"}
        began = time.perf_counter()
        localization(model, run.test, few, **shared)
        maps = (time.perf_counter() - began) / min(c.batch_size, len(run.test))
        began = time.perf_counter()
        quality(model, run.test, few, resolution=config.data.resolution, features=None, real=against.real, **shared)
        drawn = min(c.batch_size, len(run.test)) + c.diversity_samples
        images = (time.perf_counter() - began) / drawn
    count = min(c.generated_images, len(run.test)) + c.diversity_captions * c.diversity_samples
    total = maps * min(c.localization_images, len(run.test)) + images * count
    denoiser, text = parameter_counts(model.denoiser)[0], sum(parameter_counts(e)[0] for e in model.text_encoders)
    run.say(
        f"denoiser {denoiser:,} parameters, text encoder {text:,}, none trainable; maps {maps:.2f} s an image, generation "
        f"{images:.2f} s an image, so about {total / 60:.1f} min a model; peak memory {peak_memory_gb():.2f} GB\n"
        "dry run: the data and the base are fine; nothing was written"
    )

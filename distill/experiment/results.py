"""Evaluate what an arm exported, as a user would load it, and write the results of a run."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from distill.cli import to_yaml
from distill.config import BaseConfig, FullEvaluation
from distill.errors import UserError
from distill.evaluation.drawing import quality
from distill.evaluation.evaluate import OF_DRAWN, evaluate, held_out
from distill.evaluation.explanation import EXPLAINED
from distill.evaluation.kept import weights_of
from distill.evaluation.localization import localization
from distill.evaluation.results import parse_metrics
from distill.evaluation.seeds import Resampled
from distill.experiment.arms import settings_of, settings_of_run
from distill.experiment.folder import scratch_folder
from distill.experiment.run import Run
from distill.files import JsonObject, provenance, read_json, write_json
from distill.memory import peak_memory_gb, peak_of_process_gb, reset_peak_memory
from distill.models import load_model
from distill.models.adapters import parameter_counts
from distill.models.bits import fewer_bits
from distill.models.stock import exported
from distill.processes import process_state
from distill.report import (
    faults,
    mark_model_card,
    memorization_sentence,
    terminal_summary,
    terminal_table,
    write_model_card,
    write_report,
)
from distill.report.explanation import sentences

PARTS = ("localization", "quality", *OF_DRAWN)
"""Parts of an evaluation, as entries of metrics.json."""
FILES = {
    "localization": ("pairs.jsonl", "maps.safetensors", "word_maps.safetensors"),
    "quality": ("features.safetensors", "samples/*.png"),
    "memorization": ("memorization.jsonl", "memorization/*.png"),
    "utility": (),
    "similarity": (),
    "explanation": (EXPLAINED, "explained/*.png"),
}
"""Part -> what it leaves in the arm's folder, from which numbers and report are made."""


def evaluate_arm(
    run: Run,
    name: str,
    folder: Path | None,
    cost: dict[str, object] | None = None,
    *,
    base: BaseConfig | None = None,
    evaluation: FullEvaluation | None = None,
) -> JsonObject:
    """Load base and run folder as a user would, evaluate, and write <run>/<arm>/metrics.json; returns its entry.

    A part that was measured before is kept if its weights, data, options and files are still the same.
    base: the base of `folder`, where it is not the one that the arms are trained from. evaluation: in place of the
    run's or the arm's. cost: of what this run has trained; its metrics.json then has the settings of its training, and
    it gets a card.
    """
    arm_dir, arm, resolution = run.folder / name, run.arms.get(name), run.config.data.resolution
    config = evaluation or (arm.evaluation if arm else run.evaluation)
    against, model = run.against, load_model(base or run.base, run=folder)
    plan: list[Any] = [None]
    if run.accelerator.is_main_process:
        weights = weights_of(model)
        made_of = against.made_of(model, weights, config, resolution)
        plan = [(weights, made_of, _measured_before(run, name, made_of, config.parts))]
    broadcast_object_list(plan)
    weights, made_of, before = plan[0]
    missing = [part for part in config.parts if part not in before["made_of"]]
    reset_peak_memory()
    entry: JsonObject = before["entry"]
    if missing:
        result = evaluate(
            model, against, config, resolution=resolution, accelerator=run.accelerator, arm_dir=arm_dir, label=name,
            parts=missing, weights=weights,
        )  # fmt: skip
        entry = _merged(entry, result, missing)
    measured = {"peak_memory_gb": peak_memory_gb()} if missing else {}
    entry = entry | {"cost": entry["cost"] | (cost or measured)}
    if run.accelerator.is_main_process:
        known = {
            part: before["made_of"].get(part) or made_of[part] for part in PARTS if entry.get(part) or part in missing
        }
        settings = settings_of(run.config, arm) if arm else None
        written = {
            "arms": {name: entry},
            "provenance": provenance() if missing else before["provenance"],
            # The files of a part that was kept are those that it was measured with.
            "made_of": {part: {"files": _files(arm_dir, part)} | hashes for part, hashes in known.items()},
        } | ({"settings": settings} if settings else {})
        # The card first: after a kill between the two, the numbers are not there yet, and both are written again.
        if folder and cost and settings and (missing or not (folder / "README.md").is_file()):
            origin = written["provenance"]
            write_model_card(folder, entry, settings, origin, base_name=run.base.name, export=exported(folder))
        if written != before["written"]:
            write_json(arm_dir / "metrics.json", written)
    run.accelerator.wait_for_everyone()
    return entry


def _measured_before(run: Run, name: str, made_of: Mapping[str, Any], parts: Sequence[str]) -> JsonObject:
    """What an earlier launch measured and still holds: {"entry", "made_of", "provenance", "written"}. Says what does
    not."""
    path = run.folder / name / "metrics.json"
    empty = {"train_seconds": None, "steps": None, "peak_memory_gb": peak_memory_gb(), "trainable_parameters": None}
    nothing: JsonObject = {"localization": None, "quality": None, "cost": empty}
    found: JsonObject = {"entry": nothing, "made_of": {}, "provenance": None, "written": None}
    if not path.exists():
        return found
    try:
        written = read_json(path)
        entry, known = written["arms"][name], written.get("made_of", {})
        parse_metrics({"arms": {name: entry}, "provenance": written["provenance"]})
        reasons = {part: _difference(made_of[part], known.get(part), path.parent, part) for part in PARTS}
    except (UserError, ValueError, KeyError, TypeError, AttributeError) as error:
        run.say(f"{name}: evaluated anew, because {path} cannot be used: {error!r}")
        return found
    kept = {part: known[part] for part in PARTS if not reasons[part]}
    for part in PARTS:
        if entry.get(part) is not None and part not in kept:
            then = "measured anew" if part in parts else "left out"
            run.say(f"{name}: {part} is {then}: {reasons[part]}")
        elif part in kept:
            run.say(f"{name}: {part} is already evaluated, {path}")
    if not kept:
        return found
    entry = entry | {part: entry[part] if part in kept else None for part in PARTS if part in entry}
    return {"entry": entry, "made_of": kept, "provenance": written["provenance"], "written": written}


def _difference(now: Mapping[str, Any], then: Mapping[str, Any] | None, arm_dir: Path, part: str) -> str:
    """Why the numbers of a part are not those that would be measured now; empty if they are."""
    if then is None:
        return "its metrics.json does not say what it was made of"
    if then["weights"] != now["weights"]:
        return "the weights are others"
    changed = [
        f"evaluation.{key} was {then['options'].get(key)!r} and is {value!r}"
        for key, value in now["options"].items()
        if then["options"].get(key) != value
    ]
    if changed:
        return "; ".join(changed)
    if then["data"] != now["data"] or _differ("compared", now, then):
        return "the held-out images, their captions or regions, or the training images are others"
    # Without features memorization is measured too, but in fewer spaces.
    if _differ("features", now, then) or (part == "memorization" and now["features"] and not then.get("features")):
        return "the extractor of features is another"
    return "" if then["files"] == _files(arm_dir, part) else f"files in {arm_dir} were changed or are missing"


def _differ(key: str, now: Mapping[str, object], then: Mapping[str, object]) -> bool:
    """Whether both know the hash, which is None where this evaluation does not ask for it, and it is another."""
    return None not in (then.get(key), now.get(key)) and then[key] != now[key]


def _files(arm_dir: Path, part: str) -> dict[str, str]:
    """Name -> hash of the files of a part."""
    found = (path for pattern in FILES[part] for path in sorted(arm_dir.glob(pattern)) if path.is_file())
    return {str(path.relative_to(arm_dir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def _merged(before: Mapping[str, Any], result: Mapping[str, Any], missing: Sequence[str]) -> JsonObject:
    """An entry of metrics.json: the parts that were missing, and what was kept. Seconds are those of all that is in
    it."""
    parts = {part: (result if part in missing else before)[part] for part in PARTS if part in missing or part in before}
    seconds = dict(result["seconds"])
    if any(before.get(part) is not None for part in PARTS):
        seconds["evaluation_seconds"] += before["cost"].get("evaluation_seconds") or 0.0
        if "localization" not in missing:
            seconds["localization_seconds"] = before["cost"].get("localization_seconds")
    return parts | {"size": result["size"], "cost": before["cost"] | seconds}


def finish(run: Run, arms: Mapping[str, JsonObject], next_command: str, card: Path | None = None) -> None:
    """metrics.json of all arms, the report, the table in the terminal, paths, and the next command.

    card: the folder of the last arm, whose model card then says what is wrong with it.
    """
    if not run.accelerator.is_main_process:
        return
    config = run.config
    for name, entry in arms.items():
        if entry["cost"]["train_seconds"] is not None:
            run.seconds[f"{name}: training"] = entry["cost"]["train_seconds"]
        run.seconds[f"{name}: evaluation"] = entry["cost"]["evaluation_seconds"]
    counts = {
        "training_images": max((e["cost"].get("training_images") or 0 for e in arms.values()), default=0) or None,
        "held_out_images": len(run.test),
        "localization_images": max(
            (e["localization"]["word"]["images"] for e in arms.values() if e["localization"]), default=0
        ),
        "generated_images": max((e["quality"]["images"] for e in arms.values() if e["quality"]), default=0),
        "bootstrap_samples": run.evaluation.bootstrap_samples,
    }
    seeds = {"training": run.seed, "evaluation": run.evaluation.seed, "data": getattr(config.data, "seed", None)}
    origin = provenance() | {
        "seeds": seeds,
        "counts": counts,
        "seconds": {k: round(v, 1) for k, v in run.seconds.items()},
        "peak_memory_gb": round(peak_of_process_gb(), 3),
        "processes": run.accelerator.num_processes,
        "config": settings_of_run(config),
    }
    baselines = [name for name in run.compare_to if name in arms]
    resampled = Resampled({run.seed: run.folder}, arms, run.evaluation.bootstrap_samples)
    metrics = {
        "arms": dict(arms),
        "real": {"quality": _real_quality(run, is_kept=any(entry["quality"] for entry in arms.values()))},
        "paired": resampled.paired(list(arms), baselines),
        "compare_to": baselines,
        "provenance": origin,
    }
    results = parse_metrics(metrics)
    write_json(run.folder / "metrics.json", metrics)
    report = write_report(run.folder)
    if card is not None:
        alone = {"arms": {"this model": arms[list(arms)[-1]]}, "real": metrics["real"], "provenance": {}}
        said = " ".join(faults(parse_metrics(alone), "this model"))
        mark_model_card(card, "What is wrong", said or "No fault was found in what was measured.")
        explained = run.folder / list(arms)[-1] / EXPLAINED
        if arms[list(arms)[-1]].get("explanation"):
            told = sentences(read_json(explained)["comparisons"])
            mark_model_card(card, "What tells its images from real ones", " ".join(told))
    run.console.print(terminal_table(metrics))
    run.say(terminal_summary(results))
    for name in (name for name, entry in arms.items() if entry["cost"]["train_seconds"] is not None):
        exported = [p for p in (run.folder / name, run.folder) if (p / "cost.json").exists()]
        if exported:
            run.say(f"{name}: {exported[0]}")
    run.say(f"report: {report}\nnumbers: {run.folder / 'metrics.json'}\nnext: {next_command}")


def judge_memorization(entry: JsonObject, folder: Path | None, limit: float | None) -> None:
    """Write what was found to the model card in `folder`. Raises UserError if the share of copies is above `limit`, and
    no chance."""
    found = parse_metrics({"arms": {"model": entry}, "provenance": {}}).arms["model"].memorization
    if found is None:
        return
    share, said = found.found_share, memorization_sentence(found)
    is_too_much = limit is not None and found.is_found and share > limit
    marked = f"Not to be published: copies are above the limit of {limit:g}. {said}" if is_too_much else said
    if folder is not None and process_state().is_main_process:
        mark_model_card(folder, "Memorization", marked)
    if is_too_much:
        raise UserError(f"the share of copies is {share:.3f}, and evaluation.memorization_limit is {limit:g}. {said}")


def _real_quality(run: Run, *, is_kept: bool) -> JsonObject | None:
    """Quality of the real images: measured now, or by an earlier launch where this one measures maps only and keeps
    (is_kept) that of its arms."""
    path = run.folder / "metrics.json"
    if "quality" in run.evaluation.parts or not path.is_file() or not is_kept:
        return run.against.quality
    try:
        found: JsonObject | None = read_json(path)["real"]["quality"]
    except (UserError, KeyError, TypeError):
        return run.against.quality
    return found


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
    fewer_bits(model, c.dtype, c.quantization)
    with scratch_folder() as scratch:
        against = held_out(run.test, model, few, None, accelerator=accelerator, run_dir=scratch)
        shared: dict[str, Any] = {"accelerator": accelerator, "arm_dir": scratch, "label": "dry run"}
        maps = images = 0.0
        if "localization" in c.parts:
            began = time.perf_counter()
            localization(model, run.test, few, **shared)
            maps = (time.perf_counter() - began) / min(c.batch_size, len(run.test))
        if {"quality", *OF_DRAWN} & set(c.parts):
            began = time.perf_counter()
            quality(model, run.test, few, resolution=config.data.resolution, features=None, real=against.real, **shared)
            images = (time.perf_counter() - began) / (min(c.batch_size, len(run.test)) + c.diversity_samples)
    count = min(c.generated_images, len(run.test)) + c.diversity_captions * c.diversity_samples
    total = maps * min(c.localization_images, len(run.test)) + images * count
    more = (
        f", without what is computed for {', '.join(found)}" if (found := [p for p in OF_DRAWN if p in c.parts]) else ""
    )
    denoiser, text = parameter_counts(model.denoiser)[0], sum(parameter_counts(e)[0] for e in model.text_encoders)
    run.say(
        f"denoiser {denoiser:,} parameters, text encoder {text:,}, none trainable; maps {maps:.2f} s an image, "
        f"generation {images:.2f} s an image, so about {total / 60:.1f} min a model"
        f"{more}; peak memory {peak_memory_gb():.2f} GB\ndry run: the data and the base are fine; nothing was written"
    )

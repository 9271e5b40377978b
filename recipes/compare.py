"""Runs of several commands in one report: what differs between them, paired by image, caption, noise and seed.

    accelerate launch recipes/compare.py --output_dir checkpoints/compare --seeds "[0, 1, 2]" \
        --arms "{frozen: 'checkpoints/tradeoff/seed-{seed}/frozen', longer: 'checkpoints/longer/seed-{seed}/key_locked'}"

Nothing is trained or drawn. The runs must have been evaluated alike: their evaluation, and what names the held-out images,
have to be the same; how they were trained may differ. Estimates and intervals: distill/seeds.py.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import yaml
from tqdm.auto import tqdm

from distill.arms import can_be_arm, unused_data_options
from distill.cli import main, to_yaml
from distill.components import read_json
from distill.config import CompareConfig, DataConfig, EvaluationConfig
from distill.errors import UserError, raise_all
from distill.processes import process_state
from distill.provenance import provenance
from distill.report.document import write_atomic
from distill.report.tables import flatten
from distill.runs import claim, write_json
from distill.seeds import REFERENCES, combine
from distill.sharing import finish_seeds

TRAINING_DATA = {"train_size", "validation_size", "train_split", "horizontal_flip", "cache_dir"}
"""Of data: what says nothing of the held-out images."""
SPEED = {"batch_size"}
"""Of evaluation: what changes no number."""
KEPT = (
    "pairs.jsonl",
    "features.safetensors",
    "maps.safetensors",
    "train_log.jsonl",
    "localization_log.jsonl",
    "samples",
)
"""Of an arm's folder: what numbers and report are made from."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluated model: its folder, its entry in metrics.json, the code's commit, the configuration of its run, and the
    settings of its own training."""

    folder: Path
    entry: dict[str, Any]
    commit: str | None
    config: dict[str, Any]
    settings: dict[str, Any]


def read_evaluated(path: Path) -> Evaluated:
    """Of `<run>/<arm>`, or of a run folder with one trained arm. Raises UserError for anything else."""
    if (path / "config.yaml").exists():
        inside = [p.parent.name for p in sorted(path.glob("*/metrics.json")) if p.parent.name not in ("base", "real")]
        if len(inside) != 1:
            raise UserError(f"{path} is a run folder of {inside or 'no evaluated arm'}; give the folder of one arm")
        path = path / inside[0]
    run = path.parent / "config.yaml"
    if not (path / "metrics.json").exists() or not run.exists():
        raise UserError(f"{path}: no evaluated arm; expected {path / 'metrics.json'} and {run}, as recipes write them")
    found = read_json(path / "metrics.json")
    config = cast(dict[str, Any], yaml.safe_load(run.read_text(encoding="utf-8")))
    if path.name not in found["arms"]:
        raise UserError(f"{path} was renamed: its metrics.json is of {', '.join(found['arms'])}; name it so again")
    return Evaluated(
        path, found["arms"][path.name], found["provenance"]["commit"], config, found.get("settings", config)
    )


def measured_on(found: Evaluated) -> dict[str, Any]:
    """Dotted key -> value of all that decides what an evaluation measures; keys that an older run lacks, by default."""
    result = {}
    for group, default, besides in (
        ("data", DataConfig(), TRAINING_DATA),
        ("evaluation", EvaluationConfig(), SPEED),
    ):
        known = cast(dict[str, Any], yaml.safe_load(to_yaml(default))) | found.config[group]
        result |= {f"{group}.{key}": value for key, value in known.items() if key not in besides}
    for key in unused_data_options(found.config["data"]["kind"]):
        result.pop(key, None)
    # Not configured, but chosen with the model: recipes/atlas.py.
    located = found.entry["localization"] or {}
    return result | {f"localization.{key}": located.get(key) for key in ("protocol", "layers", "timesteps")}


def differing(one: Evaluated, first: Evaluated) -> dict[str, Any]:
    """Dotted key -> value in `one`, of what is configured otherwise in `first`."""
    ours, theirs = dict(flatten(one.settings)), dict(flatten(first.settings))
    unread = {"output_dir", *unused_data_options(one.config["data"]["kind"])}
    return {k: v for k, v in ours.items() if k not in unread and theirs.get(k) != v}


def gather(config: CompareConfig) -> dict[int, dict[str, Evaluated]]:
    """Seed -> name -> what was evaluated. Raises a UserError that lists all that is missing or not comparable."""
    faults, found = [], {}
    if len(config.arms) < 2:
        raise UserError("arms: give at least two, as {name: folder}")
    for name, path in config.arms.items():
        if not can_be_arm(name):
            faults.append(f"arms: {name!r} cannot be a folder's name, or is another entry of a run folder")
        if ("{seed}" in path) != bool(config.seeds):
            faults.append(f"arms: {name}: {path!r} {'lacks' if config.seeds else 'needs seeds for'} {{seed}}")
    faults += [f"references: {name!r} is no arm" for name in config.references if name not in config.arms]
    raise_all("the comparison is not valid", faults)
    for seed in config.seeds or (0,):
        for name, path in config.arms.items():
            try:
                found[seed, name] = read_evaluated(Path(path.replace("{seed}", str(seed))))
            except UserError as error:
                faults.append(f"{name}: {error}")
    raise_all("runs that cannot be read", faults)
    (_, first), *_ = found.items()
    wanted = measured_on(first)
    for (_, name), one in found.items():
        have = measured_on(one)
        faults += [
            f"{name}: {one.folder}: {key} is {have.get(key)!r}, and {wanted.get(key)!r} in {first.folder}"
            for key in wanted
            if have.get(key) != wanted[key]
        ]
    raise_all("the runs were not evaluated alike", faults)
    if not config.seeds:
        return {int(first.config.get("seed") or 0): {name: one for (_, name), one in found.items()}}
    return {seed: {name: found[seed, name] for name in config.arms} for seed in config.seeds}


def compare(config: CompareConfig) -> None:
    if not process_state().is_main_process:
        return
    runs, folder = gather(config), Path(config.output_dir)
    references = config.references or [name for name in REFERENCES if name in config.arms] or [next(iter(config.arms))]
    print(f"{len(config.arms)} arms of {len(runs)} run(s) each, against {' and '.join(references)}")
    if config.dry_run:
        print(to_yaml(config) + "dry run: the runs can be compared; nothing was written")
        return
    claim(folder, config)
    if not (folder / "config.yaml").exists() and any(folder.glob("seed-*")):
        # As of tradeoff.py with several seeds: its trained arms would be deleted below.
        raise UserError(f"{folder} holds seed-N folders that are not of a comparison; choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", to_yaml(config))
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    for seed, arms in tqdm(runs.items(), desc="runs", unit="run"):
        run, first = partial / f"seed-{seed}", next(iter(arms.values()))
        for name, one in arms.items():
            (run / name).mkdir(parents=True)
            for part in KEPT:
                source = one.folder / part
                if source.is_dir():
                    shutil.copytree(source, run / name / part)
                elif source.exists():
                    shutil.copy2(source, run / name / part)
        shutil.copytree(first.folder.parent / "real", run / "real")
        entries = {name: one.entry for name, one in arms.items()}
        whole = first.folder.parent / "metrics.json"  # not there while its run goes on
        real = read_json(whole)["real"] if whole.exists() else {"quality": None}
        seconds = {
            f"{name}: {stage}": entry["cost"][f"{key}_seconds"]
            for name, entry in entries.items()
            for stage, key in (("training", "train"), ("evaluation", "evaluation"))
            if entry["cost"][f"{key}_seconds"] is not None
        }
        trained = sorted({int(one.config.get("seed") or 0) for one in arms.values()}) if not config.seeds else seed
        origin = provenance() | {"seeds": {"training": trained}, "seconds": seconds, "config": asdict(config)}
        origin["arms"] = {
            name: {"folder": str(one.folder), "commit": one.commit, "differs": differing(one, first)}
            for name, one in arms.items()
        }
        write_json(run / "metrics.json", {"arms": entries, "real": real, "provenance": origin})
    combine(partial, samples=2, references=references)  # refuses what cannot be compared
    # Only now, so that a kill before leaves the earlier comparison whole.
    for old in folder.glob("seed-*"):
        shutil.rmtree(old)
    for new in partial.iterdir():
        new.rename(folder / new.name)
    partial.rmdir()
    finish_seeds(folder, references)
    print(f"next: open {folder / 'report.html'}")


if __name__ == "__main__":
    main(compare, CompareConfig)

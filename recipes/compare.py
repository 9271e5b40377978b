"""Runs of several commands in one report: what differs between them, paired by image, caption, noise and seed.

    accelerate launch recipes/compare.py --output_dir checkpoints/compare --seeds 0,1,2 \
        --arms "{frozen: 'checkpoints/tradeoff/seed-{seed}/frozen', longer: 'checkpoints/longer/seed-{seed}/key_locked'}"

Nothing is trained or drawn. The runs must have been evaluated alike: their evaluation, and what names the held-out
images, have to be the same; how they were trained may differ. Estimates and intervals: distill/evaluation/seeds.py.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, cast

from pydantic import AfterValidator, Field

from distill.cli import main, to_yaml
from distill.configuration import renamed as old
from distill.settings import HARMLESS, Seed, Settings, Text, Texts, once

if TYPE_CHECKING:
    from distill.files import JsonObject

TRAINING_DATA = {
    "train_size", "validation_size", "train_split", "allow_empty_captions", "truncate_captions", "horizontal_flip",
    "cache_dir",
}  # fmt: skip
"""Of data: what says nothing of the held-out images."""
BESIDES = {"batch_size", "parts", "protocol", "layers", "timesteps"}
"""Of evaluation: what changes no number, and what is compared as it was used (`localization.*` below)."""
KEPT = (
    "pairs.jsonl", "features.safetensors", "maps.safetensors", "train_log.jsonl", "validation_log.jsonl", "samples",
)  # fmt: skip
"""Of an arm's folder: what numbers and report are made from."""


class CompareConfig(Settings):
    """Put runs of several commands in one report, with paired differences.

    accelerate launch recipes/compare.py --config recipes/configs/phantom/compare_longer.yaml
    """

    common: ClassVar[tuple[str, ...]] = ("arms", "seeds", "compare_to", "output_dir")
    renamed: ClassVar[dict[str, str]] = old.COMPARE
    arms: Annotated[dict[str, Text], Field(min_length=2)]
    """Name in the report -> an evaluated folder, RUN/ARM, or a run folder that holds one trained arm."""
    seeds: Annotated[tuple[Seed, ...], AfterValidator(once)] = ()
    """Training seeds, which {seed} in the folders of arms stands for. Empty where each arm is one run."""
    compare_to: Annotated[Texts, HARMLESS] = ()
    """Arms that all others are compared with. Empty takes the first."""
    output_dir: Annotated[Text, HARMLESS] = "checkpoints/compare"
    """Where metrics.json and the report are written, with a copy of what they are made from, without weights."""
    dry_run: Annotated[bool, HARMLESS] = False
    """Check that the runs can be compared, and stop."""


@dataclass(frozen=True)
class Evaluated:
    """One evaluated model.

    entry: its part of metrics.json. made_of: part of the evaluation -> what its numbers were made of. commit: of the
    code that evaluated it. config: of its run. settings: of its training.
    """

    folder: Path
    entry: JsonObject
    made_of: JsonObject
    commit: str | None
    config: JsonObject
    settings: JsonObject

    @property
    def seed(self) -> int:
        """Its training seed."""
        seeds = self.config.get("seeds") or [self.config.get("seed", 0)]
        return int(seeds[0])


def read_evaluated(path: Path) -> Evaluated:
    """Read RUN/ARM, or a run folder with one trained arm. Raises UserError for anything else."""
    import yaml

    from distill.errors import UserError
    from distill.evaluation.results import parse_metrics
    from distill.files import read_json

    if (path / "config.yaml").exists():
        inside = [p.parent.name for p in sorted(path.glob("*/metrics.json")) if p.parent.name not in ("base", "real")]
        if len(inside) != 1:
            raise UserError(
                f"{path} is a run folder of {', '.join(inside) or 'no evaluated arm'}; give the folder of one arm"
            )
        path = path / inside[0]
    run = path.parent / "config.yaml"
    if not (path / "metrics.json").exists() or not run.exists():
        raise UserError(f"{path}: no evaluated arm; expected {path / 'metrics.json'} and {run}, as recipes write them")
    found = read_json(path / "metrics.json")
    try:
        config = cast("JsonObject", yaml.safe_load(run.read_text(encoding="utf-8")))
        parse_metrics(found)
        if config["data"]["kind"] is None or config["evaluation"] is None:
            raise ValueError("it is of no evaluation")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: {path / 'metrics.json'} or {run} is damaged ({error!r}); start its recipe again"
        ) from None
    if path.name not in found["arms"]:
        raise UserError(f"{path} was renamed: its metrics.json is of {', '.join(found['arms'])}; name it so again")
    settings = found.get("settings", config)
    entry, origin = found["arms"][path.name], found["provenance"]
    return Evaluated(path, entry, found.get("made_of", {}), origin.get("commit"), config, settings)


def measured_on(found: Evaluated) -> JsonObject:
    """Dotted key -> value of all that decides what an evaluation measures; keys that an older run lacks, by default.

    The options of evaluation are those that the numbers were made with: an arm may have its own, and a run that was
    started again with others may have measured only some of its arms anew.
    """
    from pydantic import TypeAdapter

    from distill.config import FullEvaluation
    from distill.data_config import AnyData, DataConfig

    kind: TypeAdapter[DataConfig] = TypeAdapter(AnyData)
    defaults = {
        "data": kind.validate_python({"kind": found.config["data"]["kind"]}).model_dump(mode="json"),
        "evaluation": FullEvaluation().model_dump(mode="json"),
    }
    used: dict[str, JsonObject] = {"data": {}, "evaluation": {}}
    for hashes in found.made_of.values():
        used["evaluation"] |= hashes["options"]
    result: JsonObject = {}
    for group, besides in (("data", TRAINING_DATA), ("evaluation", BESIDES)):
        known = defaults[group] | found.config[group] | used[group]
        result |= {f"{group}.{key}": value for key, value in known.items() if key not in besides}
    # Not configured, but chosen with the model: recipes/atlas.py.
    located = found.entry["localization"] or {}
    result |= {f"localization.{key}": located.get(key) for key in ("protocol", "layers", "timesteps")}
    hashes = {
        "the hash of the feature extractor": found.made_of.get("quality", {}).get("features"),
        "the hash of the held-out images and captions": found.made_of.get("quality", {}).get("data"),
        "the hash of the images and regions of localization": found.made_of.get("localization", {}).get("pairs"),
    }
    return result | {what: value for what, value in hashes.items() if value}


def differing(one: Evaluated, first: Evaluated) -> JsonObject:
    """Dotted key -> value in `one`, where `first` is configured otherwise."""
    from distill.report.tables import flatten

    ours, theirs = dict(flatten(one.settings)), dict(flatten(first.settings))
    return {k: v for k, v in ours.items() if k != "output_dir" and theirs.get(k) != v}


def check(config: CompareConfig) -> None:
    """Raise a UserError that lists what is wrong with the names of arms."""
    from distill.errors import raise_all
    from distill.experiment.arms import can_be_arm

    faults = []
    for name, path in config.arms.items():
        if not can_be_arm(name):
            faults.append(f"arms: {name!r} cannot be a folder's name, or is another entry of a run folder")
        if ("{seed}" in path) and not config.seeds:
            faults.append(f"arms: {name}: {path!r} has {{seed}}, and seeds is empty; set seeds")
        if config.seeds and "{seed}" not in path:
            faults.append(f"arms: {name}: {path!r} lacks {{seed}}; put it where the folders of the seeds differ")
    faults += [
        f"compare_to: {name!r} is no arm; there are {', '.join(config.arms)}"
        for name in config.compare_to
        if name not in config.arms
    ]
    raise_all("the comparison is not valid", faults)


def gather(config: CompareConfig) -> dict[int, dict[str, Evaluated]]:
    """Seed -> name -> what was evaluated. Raises a UserError that lists all that is missing or not comparable."""
    from distill.errors import UserError, raise_all

    faults: list[str] = []
    found: dict[tuple[int, str], Evaluated] = {}
    for seed in config.seeds or (0,):
        for name, path in config.arms.items():
            try:
                found[seed, name] = read_evaluated(Path(path.replace("{seed}", str(seed))))
            except UserError as error:
                faults.append(f"{name}: {error}")
    raise_all("runs that cannot be read", faults)
    first = next(iter(found.values()))
    wanted = measured_on(first)
    for (_, name), one in found.items():
        have = measured_on(one)
        faults += [
            f"{name}: {one.folder}: {key} is {have[key]!r}, and {wanted[key]!r} in {first.folder}"
            for key in wanted
            if key in have and have[key] != wanted[key]
        ]
    raise_all("the runs were not evaluated alike", faults)
    if not config.seeds:
        return {first.seed: {name: one for (_, name), one in found.items()}}
    return {seed: {name: found[seed, name] for name in config.arms} for seed in config.seeds}


def is_same(mask: JsonObject | None, other: JsonObject | None) -> bool:
    """Whether two mean training masks score alike; a GPU and a CPU differ in the last digits."""
    if mask is None or other is None:
        return mask is other
    apart = abs((mask["auc"] or 0.0) - (other["auc"] or 0.0))
    return apart < 1e-5 and mask.get("training_images") == other.get("training_images")


def drop_prior(entries: dict[str, JsonObject], run: Path) -> None:
    """Take out what rests on the training masks, where the runs were trained on different ones: each run's AUC within
    the prior is then of another prior."""
    from distill.files import write_atomic

    located = [entry["localization"] or {} for entry in entries.values()]
    masks = [(one.get("priors") or {}).get("mean_mask") for one in located]
    if all(is_same(mask, masks[0]) for mask in masks):
        return
    print(
        "the mean training masks of the runs differ, or are not known: AUC within the prior is left out, and they too"
    )
    for one in located:
        for part in (part for part in one.values() if isinstance(part, dict) and "within_prior" in part):
            part |= {"within_prior": None, "within_prior_ci": None}
        if one.get("priors"):
            one["priors"]["mean_mask"] = None
    for path in (run / name / "pairs.jsonl" for name in entries):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
        for row in rows:
            row.pop("within_prior", None)
        if rows:
            write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def copy_run(config: CompareConfig, seed: int, arms: dict[str, Evaluated], run: Path) -> None:
    """A run folder of the arms, as a recipe that trained them together would leave, without weights."""
    from distill.files import provenance, read_json, write_json

    first = next(iter(arms.values()))
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
    drop_prior(entries, run)
    whole = first.folder.parent / "metrics.json"  # not there while its run goes on
    real = read_json(whole)["real"] if whole.exists() else {"quality": None}
    seconds = {
        f"{name}: {stage}": entry["cost"][f"{key}_seconds"]
        for name, entry in entries.items()
        for stage, key in (("training", "train"), ("evaluation", "evaluation"))
        if entry["cost"][f"{key}_seconds"] is not None
    }
    # The first is that of the folder, which the report takes its pictures from.
    trained = seed if config.seeds else list(dict.fromkeys(one.seed for one in arms.values()))
    origin = provenance() | {"seeds": {"training": trained}, "seconds": seconds}
    origin |= {"config": config.model_dump(mode="json")}
    origin["arms"] = {
        name: {"folder": str(one.folder), "commit": one.commit, "differs": differing(one, first)}
        for name, one in arms.items()
    }
    compare_to = list(config.compare_to or tuple(config.arms)[:1])
    write_json(run / "metrics.json", {"arms": entries, "real": real, "compare_to": compare_to, "provenance": origin})


def compare(config: CompareConfig) -> None:
    from tqdm.auto import tqdm

    from distill.errors import UserError
    from distill.evaluation.seeds import combine
    from distill.experiment.folder import held
    from distill.experiment.run import claim
    from distill.experiment.sharing import finish_seeds
    from distill.files import write_atomic
    from distill.processes import process_state

    if not process_state().is_main_process:
        return
    check(config)
    runs, folder = gather(config), Path(config.output_dir)
    compare_to = config.compare_to or tuple(config.arms)[:1]
    print(f"{len(config.arms)} arms of {len(runs)} run(s) each, compared with {' and '.join(compare_to)}")
    if config.dry_run:
        print(to_yaml(config) + "dry run: the runs can be compared; nothing was written")
        return
    with held(folder):
        claim(folder, config)
        if not (folder / "config.yaml").exists() and any(folder.glob("seed-*")):
            # As of tradeoff.py with several seeds: its trained arms would be deleted below.
            raise UserError(f"{folder} holds seed-N folders that are not of a comparison; choose another --output_dir")
        write_atomic(folder / "config.yaml", to_yaml(config))
        partial = folder / ".partial"
        for seed, arms in tqdm(runs.items(), desc="runs", unit="run"):
            copy_run(config, seed, arms, partial / f"seed-{seed}")
        combine(partial, samples=2, compare_to=compare_to)  # refuses what cannot be compared
        # Only now, so that a kill before leaves the earlier comparison whole.
        for before in folder.glob("seed-*"):
            shutil.rmtree(before)
        for new in partial.iterdir():
            new.rename(folder / new.name)
        partial.rmdir()
        finish_seeds(folder, compare_to)
        print(f"next: open {folder / 'report.html'}")


if __name__ == "__main__":
    main(compare, CompareConfig)

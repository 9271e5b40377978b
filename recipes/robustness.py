"""Localization of a base and its runs under what training never showed: synonyms, swapped sides, other images,
negations, and two findings of one kind.

    accelerate launch recipes/robustness.py --config recipes/configs/phantom/robustness.yaml \
        --runs checkpoints/tradeoff_quick/frozen,checkpoints/tradeoff_quick/distilled

The shifts are in distill/evaluation/robustness.py. Writes robustness.json and robustness.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from distill.cli import main, to_yaml
from distill.config import BaseConfig, LayerEvaluation
from distill.data_config import AnyData, PhantomData
from distill.settings import Settings, Text, Texts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator

    from distill.config import FullEvaluation
    from distill.data.sample import ImageCaptionDataset
    from distill.evaluation.robustness import ShiftedDataset
    from distill.files import JsonObject
    from distill.models import Model


class RobustnessConfig(Settings):
    """Measure localization under other words, swapped sides, other images, and negations.

    accelerate launch recipes/robustness.py --config recipes/configs/phantom/robustness.yaml --runs RUN,RUN
    """

    common: ClassVar[tuple[str, ...]] = ("base.name", "runs", "data.kind", "data.root", "output_dir")
    base: BaseConfig = BaseConfig()
    runs: Texts = ()
    """Run folders on the base that are looked at in addition to the base."""
    data: AnyData = PhantomData()
    evaluation: LayerEvaluation = LayerEvaluation()
    output_dir: Text = "checkpoints/robustness"
    """Where robustness.json and robustness.md are written."""
    dry_run: bool = False
    """Check everything, print what would be measured, and stop."""


def interval(value: float | None, ends: Any, decimals: int = 3) -> str:
    """`.731 [.702, .760]`; a dash where unknown."""
    from distill.report.tables import format_number

    if value is None:
        return "–"
    shown = format_number(value, decimals)
    return f"{shown} [{format_number(ends[0], decimals)}, {format_number(ends[1], decimals)}]" if ends else shown


def tables(models: JsonObject) -> str:
    """robustness.md: AUC of the words by shift, and negations."""
    from distill.evaluation.robustness import FOR_SYNONYMS, SYNONYMS
    from distill.report.document import Table, markdown_table

    rows = [
        [
            shift,
            *(interval(entry["shifts"][shift]["auc"], entry["shifts"][shift]["auc_ci"]) for entry in models.values()),
        ]
        for shift in next(iter(models.values()))["shifts"]
    ]
    for part, key, name in (
        ("two_places", "auc", "two places"),
        ("two_places", "lesser_auc", "lesser of two places"),
        ("negations", "peak_ratio", "negated over stated"),
        ("negations", "stated_wins", "stated above negated"),
    ):
        cells = [entry[part] or {} for entry in models.values()]
        rows.append([name, *(interval(cell.get(key), cell.get(f"{key}_ci")) for cell in cells)])
    table = markdown_table(Table(["", *models], rows, "numbers"))
    shifts = next(iter(models.values()))["shifts"]
    plain, synonyms = shifts["none"], shifts[SYNONYMS]
    said = (
        f"The first rows are the word AUC under each shift, of {plain.get('pairs', 0):,} image-finding pairs in "
        f"{plain.get('images', 0):,} test images. "
    )
    if synonyms["auc"] is None:
        said += f"`{SYNONYMS}` is empty: no text names a finding that has one. "
    elif FOR_SYNONYMS in shifts:
        said += (
            f"`{SYNONYMS}` and `{FOR_SYNONYMS}` are of the {synonyms['pairs']:,} pairs whose finding has a synonym. "
        )
    return (
        f"# Localization under shift\n\n{said}"
        "`two places` is the AUC of findings that lie in two places of an image. `lesser of two places` is the AUC of "
        "the place that the map shows least. `negated over stated` is the attention peak on a negated finding's word, "
        "divided by the peak on a stated one's in the same caption; 1 means no difference. `stated above negated` is "
        "the share of images where the stated finding's peak is larger. Intervals are 95 % bootstrap intervals over "
        f"images.\n\n{table}\n"
    )


def measure(
    model: Model,
    test: ImageCaptionDataset,
    sets: Mapping[str, ShiftedDataset | None],
    evaluation: FullEvaluation,
    folder: Path,
    *,
    accelerator: Accelerator,
    label: str,
) -> JsonObject:
    """A model's entry of robustness.json. sets: row -> what it is measured on."""
    from distill.evaluation.localization import localization
    from distill.evaluation.robustness import negations, two_places

    shifts: JsonObject = {}
    for shift, shifted in sets.items():
        result = shifted and localization(
            model,
            shifted,
            evaluation,
            accelerator=accelerator,
            arm_dir=folder / shift.replace(" ", "_"),
            label=f"{label}, {shift}",
        )
        shifts[shift] = result["word"] if result else {"auc": None, "auc_ci": None}
    return {
        "shifts": shifts,
        "negations": negations(model, test, evaluation, accelerator=accelerator, label=label),
        "two_places": two_places(model, test, evaluation, accelerator=accelerator, label=label),
    }


def robustness(config: RobustnessConfig) -> None:
    from distill.experiment.folder import held
    from distill.experiment.run import quiet_libraries

    quiet_libraries()
    with held(Path(config.output_dir), write=not config.dry_run):
        measure_all(config)


def measure_all(config: RobustnessConfig) -> None:
    from accelerate import Accelerator
    from rich.console import Console

    from distill.data.loading import load_dataset
    from distill.data.readers.records import RecordDataset
    from distill.errors import UserError
    from distill.evaluation.evaluate import finite
    from distill.evaluation.protocols import queries
    from distill.evaluation.robustness import comparable_sets
    from distill.files import provenance, write_atomic, write_json
    from distill.models import load_model

    accelerator = Accelerator()
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True, highlight=False, markup=False)
    models = {"base": None, **{"/".join(Path(run).parts[-2:]): run for run in config.runs}}
    if len(models) <= len(config.runs):
        raise UserError("runs: the last two parts of the folders' paths must tell them apart")
    test, evaluation, folder = load_dataset(config.data, "test"), config.evaluation.full(), Path(config.output_dir)
    for run in models.values():  # each, so that a fault in the last does not come after minutes
        model = load_model(config.base, run)
    if isinstance(test, RecordDataset):
        test.check_captions(model)
    sets = comparable_sets(test, model, evaluation, accelerator)
    asked = queries(sets["none"] or test, model, evaluation, accelerator)
    if not asked:
        raise UserError(
            "no test image has a region of a finding that its text names under every shift: there is nothing to localize"
        )
    console.print(f"{len(models)} models, {len({q.image for q in asked})} images, {len(sets)} shifts and negations")
    if config.dry_run:
        console.print(to_yaml(config) + "dry run: the data and the models are fine; nothing was written")
        return
    found: JsonObject = {}
    for name, run in models.items():
        model = load_model(config.base, run).to(accelerator.device).freeze()
        entry = measure(model, test, sets, evaluation, folder / name, accelerator=accelerator, label=name)
        found[name] = {"model": str(run or config.base.name)} | entry
    if not accelerator.is_main_process:
        return
    origin = provenance() | {"config": config.model_dump(mode="json")}
    write_json(folder / "robustness.json", finite({"models": found, "provenance": origin}))
    text = tables(found)
    write_atomic(folder / "robustness.md", text)
    console.print(text)
    console.print(f"numbers: {folder / 'robustness.json'}\nnext: open {folder / 'robustness.md'}")


if __name__ == "__main__":
    main(robustness, RobustnessConfig)

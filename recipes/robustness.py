"""Localization of a base and its runs under what training never showed: synonyms, swapped sides, other images, negations,
and two findings of one kind.

    accelerate launch recipes/robustness.py --config recipes/configs/phantom/robustness.yaml \
        --runs "[checkpoints/tradeoff_quick/frozen, checkpoints/tradeoff_quick/distilled]"

The shifts are in distill/robustness.py. Writes robustness.json and robustness.md.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from rich.console import Console

from distill.arms import unused_data_options
from distill.cli import main, refuse_unused, to_yaml
from distill.config import RobustnessConfig
from distill.data.loading import load_dataset
from distill.data.readers.records import RecordDataset
from distill.errors import UserError
from distill.evaluation.evaluate import finite
from distill.evaluation.localization import localization
from distill.evaluation.protocols import queries
from distill.evaluation.robustness import SHIFTS, ShiftedDataset, negations, two_places
from distill.files import provenance, write_atomic, write_json
from distill.models.loading import load_model
from distill.report.document import Table, markdown_table
from distill.report.tables import format_number
from distill.runs import quiet_libraries

IGNORED = {
    "evaluation.quantization": "robustness.py looks at the models as they are",
    **dict.fromkeys(
        [
            f"evaluation.{name}"
            for name in (
                "generated_images", "diversity_captions", "diversity_samples", "num_inference_steps", "guidance_scale",
                "scheduler", "features", "examples", "protocol",
            )
        ],
        "robustness.py scores maps of protocol ours alone",
    ),
    **dict.fromkeys(
        [f"data.{name}" for name in ("train_size", "validation_size", "train_split", "horizontal_flip", "cache_dir")],
        "robustness.py looks at test images",
    ),
    "base.frozen_dtype": "evaluation runs in fp32",
}  # fmt: skip


def unused_options(config: RobustnessConfig) -> dict[str, str]:
    unused = unused_data_options(config.data.kind)
    if config.evaluation.map_threshold == "none":
        unused["evaluation.orphan_share"] = "evaluation.map_threshold is none"
    return unused


def interval(value: float | None, ends: Any, decimals: int = 3) -> str:
    if value is None:
        return "–"
    shown = format_number(value, decimals)
    return f"{shown} [{format_number(ends[0], decimals)}, {format_number(ends[1], decimals)}]" if ends else shown


def tables(models: dict[str, Any]) -> str:
    """robustness.md: AUC of the words by shift, and negations."""
    rows = [
        [
            shift,
            *(interval(entry["shifts"][shift]["auc"], entry["shifts"][shift]["auc_ci"]) for entry in models.values()),
        ]
        for shift in next(iter(models.values()))["shifts"]
    ]
    for part, key, name in (
        ("two_places", "auc", "in two places"),
        ("two_places", "lesser_auc", "the lesser of two places"),
        ("negations", "peak_ratio", "negated over stated"),
        ("negations", "stated_wins", "stated above negated"),
    ):
        cells = [entry[part] or {} for entry in models.values()]
        rows.append([name, *(interval(cell.get(key), cell.get(f"{key}_ci")) for cell in cells)])
    table = markdown_table(Table(["", *models], rows, "numbers"))
    return (
        "# Localization under shift\n\nWord AUC on test images. In two places: of findings that lie in two places of an image, "
        "and of the place of theirs that the map shows least. The last two rows: the peak of attention on a negated "
        "finding's word over that on a stated one's in the same caption (1 is as much), and the share of images where the "
        f"stated one's is larger. 95 % bootstrap intervals over images.\n\n{table}\n"
    )


def robustness(config: RobustnessConfig) -> None:
    quiet_libraries()
    refuse_unused(config, unused_options(config))
    accelerator = Accelerator()
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True, highlight=False, markup=False)
    models = {"base": None, **{"/".join(Path(run).parts[-2:]): run for run in config.runs}}
    if len(models) <= len(config.runs):
        raise UserError("runs: the last two parts of the folders' paths must tell them apart")
    test = load_dataset(config.data, "test")
    for run in models.values():  # each, so that a fault in the last does not come after minutes
        model = load_model(config.base, run)
    if isinstance(test, RecordDataset):
        test.check_captions(model.tokenizers, model.max_tokens)
    asked = queries(test, model, config.evaluation, accelerator)
    if not asked:
        raise UserError("no test image has a region of a finding: there is nothing to localize")
    console.print(f"{len(models)} models, {len({q.image for q in asked})} images, {len(SHIFTS)} shifts and negations")
    if config.dry_run:
        console.print(to_yaml(config) + "dry run: the data and the models are fine; nothing was written")
        return
    folder = Path(config.output_dir)
    found: dict[str, Any] = {}
    for name, run in models.items():
        model = load_model(config.base, run).to(accelerator.device).freeze()
        shifts = {}
        for shift in SHIFTS:
            result = localization(
                model,
                ShiftedDataset(test, shift),
                config.evaluation,
                accelerator=accelerator,
                arm_dir=folder / name / shift.replace(" ", "_"),
                label=f"{name}, {shift}",
            )
            shifts[shift] = result["word"] if result else {"auc": None, "auc_ci": None}
        found[name] = {"model": str(run or config.base.name), "shifts": shifts}
        for part, look in (("negations", negations), ("two_places", two_places)):
            found[name][part] = look(model, test, config.evaluation, accelerator=accelerator, label=name)
    if accelerator.is_main_process:
        write_json(
            folder / "robustness.json",
            finite({"models": found, "provenance": provenance() | {"config": asdict(config)}}),
        )
        text = tables(found)
        write_atomic(folder / "robustness.md", text)
        console.print(text)
        console.print(f"numbers: {folder / 'robustness.json'}\nnext: open {folder / 'robustness.md'}")


if __name__ == "__main__":
    main(robustness, RobustnessConfig, ignored=IGNORED)

"""Where the attention localizes, by layer and timestep; a subset chosen on validation images, tested, and stored.

    accelerate launch recipes/atlas.py --config recipes/configs/phantom/atlas.yaml \
        --runs "[checkpoints/tradeoff_quick/frozen, checkpoints/tradeoff_quick/learnable]"

Writes atlas.json, atlas.md and each model's heat maps, and localization.json into each run folder, from where
evaluation takes the run's layers and timesteps. The search is `choose_subset` in distill/atlas.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console

from distill.arms import unused_data_options
from distill.cli import main, refuse_unused, to_yaml
from distill.config import AtlasConfig
from distill.data import RecordDataset, load_dataset
from distill.errors import UserError, raise_all
from distill.evaluation.atlas import (
    analyse,
    answer,
    compute_cells,
    markdown,
    short_layer,
    subset_file,
    terminal_table,
)
from distill.evaluation.protocols import DEFAULT_TIMESTEPS, queries
from distill.files import provenance, write_json
from distill.models.components import PHANTOM_BASE, SUBSET_FILE, Components, load_components
from distill.report.document import Picture
from distill.report.figures import chart
from distill.report.tables import format_number
from distill.runs import quiet_libraries
from distill.trainer import peak_memory_gb

IGNORED = {
    **dict.fromkeys(("evaluation.layers", "evaluation.timesteps"), "the atlas is of all layers, at `timesteps`"),
    "evaluation.quantization": "the atlas is of the model as it is",
    "evaluation.protocol": "a subset is of protocol ours",
    "evaluation.self_attention_power": "the atlas is of cross-attention alone",
    **dict.fromkeys(
        [
            f"evaluation.{name}"
            for name in (
                "generated_images", "diversity_captions", "diversity_samples", "num_inference_steps", "guidance_scale",
                "scheduler", "features", "examples",
            )
        ],
        "atlas.py generates no image",
    ),
    **dict.fromkeys(
        [f"data.{name}" for name in ("train_size", "train_split", "horizontal_flip", "cache_dir")],
        "atlas.py does not train",
    ),
    "base.frozen_dtype": "evaluation runs in fp32",
}  # fmt: skip


def unused_options(config: AtlasConfig) -> dict[str, str]:
    unused = unused_data_options(config.data.kind)
    if config.evaluation.map_threshold == "none":
        unused["evaluation.orphan_share"] = "evaluation.map_threshold is none"
    if config.base.name == "phantom" or Path(config.base.name).is_dir():
        unused["base.revision"] = "base.name is not a hub id"
    if not config.runs:
        unused["store"] = "runs is empty"
    return unused


def models_of(config: AtlasConfig) -> dict[str, Path | None]:
    """`base` -> None, and the shortest end of each run folder's path that tells it from the others -> the folder."""
    folders = [Path(run) for run in config.runs]
    parts = [folder.resolve().parts[1:] for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError(f"runs: a folder is given twice: {', '.join(config.runs)}")
    length = 1
    while len({"base", *("-".join(own[-length:]) for own in parts)}) <= len(parts):
        length += 1
    return {"base": None, **{"-".join(own[-length:]): folder for own, folder in zip(parts, folders, strict=True)}}


def base_folder(config: AtlasConfig) -> Path:
    return PHANTOM_BASE if config.base.name == "phantom" else Path(config.base.name)


def load_splits(config: AtlasConfig) -> tuple[Any, Any]:
    """Validation and test images. Raises UserError unless they are different images."""
    if config.data.kind == "phantom" and config.data.validation_size == 0:
        raise UserError("data.validation_size is 0: the subset is chosen on validation images; give at least 1")
    validation, test = load_dataset(config.data, "validation"), load_dataset(config.data, "test")
    chosen_on, tested = ({dataset.fingerprint(i) for i in range(len(dataset))} for dataset in (validation, test))
    if shared := len(chosen_on & tested):
        raise UserError(
            f"{shared} of {len(tested)} test images are also validation images, and the subset must be chosen on other "
            "images than those that test it: set data.split_column to a column with `validation` (or `val`, `valid`) in "
            "some rows, and data.test_split in others"
        )
    return validation, test


def check(config: AtlasConfig, components: Components, validation: Any, test: Any) -> None:
    """Raise UserError, before anything is computed, for what does not fit the base or the data."""
    faults = []
    steps = int(components.noise_scheduler.config.num_train_timesteps)
    if max(config.timesteps) >= steps:
        faults.append(f"timesteps must be in 0 .. {steps - 1}; got {config.timesteps}")
    factor, resolution = components.vae_factor, config.data.resolution
    if resolution % factor or resolution < 4 * factor:
        faults.append(
            f"data.resolution is {resolution}; the VAE needs a multiple of {factor}, of at least {4 * factor}"
        )
    if config.store_base and not base_folder(config).is_dir():
        faults.append("store_base is true, but base.name is a hub id: there is no folder to write into")
    raise_all("the configuration does not fit the base", faults)
    for which, dataset in (("validation", validation), ("test", test)):
        if isinstance(dataset, RecordDataset):
            dataset.check_captions(components.tokenizers, components.max_tokens)
            if config.evaluation.localization_text == "caption":
                dataset.check_queries()
        if not queries(dataset, components, replace(config.evaluation, localization_images=1)):
            raise UserError(
                f"no {which} image has a region of a finding: set data.finding_column, and data.box_column or "
                "data.mask_column, and give regions to the images of that split"
            )


def dry_run(
    config: AtlasConfig, components: Components, validation: Any, accelerator: Accelerator, console: Console
) -> None:
    console.print(to_yaml(config))
    few = replace(config.evaluation, localization_images=config.evaluation.batch_size)
    components.to(accelerator.device).freeze()
    began = time.perf_counter()
    cells = compute_cells(components, validation, few, config.timesteps[:1], accelerator=accelerator, label="dry run")
    images = len(np.unique(cells.images))
    count = len({*config.timesteps, *DEFAULT_TIMESTEPS})
    passes = config.validation_images * count
    passes += config.evaluation.localization_images * (len(DEFAULT_TIMESTEPS) + config.max_timesteps)
    seconds = (time.perf_counter() - began) / max(images, 1) * passes / accelerator.num_processes
    size = (
        cells.maps.element_size() * cells.maps[0].numel() * count * len(cells.maps) / images * config.validation_images
    )
    console.print(
        f"{len(cells.layers)} layers at {count} timesteps; about {seconds / 60:.1f} min and {size / 1e9:.2f} GB of maps a "
        f"model; peak memory so far {peak_memory_gb():.2f} GB\n"
        "dry run: the data and the models are fine; nothing was written"
    )


def atlas(config: AtlasConfig) -> None:
    quiet_libraries()
    refuse_unused(config, unused_options(config))
    accelerator = Accelerator()
    main_process = accelerator.is_main_process
    console = Console(quiet=not main_process, soft_wrap=True, highlight=False, markup=False)
    models = models_of(config)
    with accelerator.main_process_first():
        validation, test = load_splits(config)
    for run in models.values():  # each of them, so that a fault in the last does not come after minutes
        components = load_components(config.base, run)
    check(config, components, validation, test)
    if config.dry_run:
        return dry_run(config, components, validation, accelerator, console)
    folder = Path(config.output_dir)
    entries: dict[str, Any] = {}
    stored = []
    for name, run in models.items():
        components = load_components(config.base, run).to(accelerator.device).freeze()
        entry = analyse(components, validation, test, config, accelerator=accelerator, folder=folder / name, label=name)
        entries[name] = {"model": str(run or config.base.name)} | entry
        if not main_process:
            continue
        chosen = entry["chosen"]
        frame = tuple([entry[key].index(value) for value in chosen[key]] for key in ("layers", "timesteps"))
        tables = {token: np.array(table) for token, table in entry["validation"]["auc"].items()}
        picture = atlas_chart(tables, [short_layer(layer) for layer in entry["layers"]], entry["timesteps"], frame)
        (folder / name / "atlas.png").write_bytes(picture.png)
        write_json(folder / name / SUBSET_FILE, subset_file(entry, config))
        target = run if config.store else None
        if run is None and config.store_base:
            target = base_folder(config)
        if target is not None and chosen["is_better"]:
            write_json(target / SUBSET_FILE, subset_file(entry, config))
            stored.append(target / SUBSET_FILE)
    if not main_process:
        return
    origin = provenance() | {
        "seeds": {"evaluation": config.evaluation.seed, "data": config.data.seed},
        "processes": accelerator.num_processes,
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "config": asdict(config),
    }
    write_json(folder / "atlas.json", {"models": entries, "provenance": origin})
    (folder / "atlas.md").write_text(markdown(entries, config), encoding="utf-8")
    console.print(terminal_table(entries))
    for name, entry in entries.items():
        console.print(answer(name, entry))
    for path in stored:
        console.print(f"stored: {path}")
    following = f"open {folder / 'atlas.md'}"
    if config.data.kind == "phantom" and stored and config.runs:
        command = "accelerate launch recipes/evaluate.py --config recipes/configs/phantom/evaluate.yaml"
        following = f"{command} --run {config.runs[0]} --evaluation.timesteps null"
    console.print(f"numbers: {folder / 'atlas.json'}\ntables and heat maps: {folder / 'atlas.md'}\nnext: {following}")


def atlas_chart(
    tables: Mapping[str, np.ndarray],
    layers: Sequence[str],
    timesteps: Sequence[int],
    chosen: tuple[Sequence[int], Sequence[int]],
) -> Picture:
    """A heat map a token map: AUC of each layer (rows) at each timestep (columns), .5 in white.

    tables: name -> (layers, timesteps) in [0, 1]. chosen: rows and columns whose common cells get a frame.
    """
    count = len(layers) * len(timesteps)
    far = max(0.05, *(float(np.abs(table - 0.5).max()) for table in tables.values()))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
        for axes, (name, table) in zip(panels, tables.items(), strict=True):
            image = axes.imshow(table, cmap="RdBu_r", vmin=0.5 - far, vmax=0.5 + far, aspect="auto")
            axes.set_title(f"{name}, best {format_number(float(table.max()), 3)}", loc="left")
            axes.set_xticks(range(len(timesteps)), [str(t) for t in timesteps], rotation=60, fontsize=8)
            axes.set_yticks(range(len(layers)), layers, fontsize=8)
            axes.set_xlabel("timestep")
            axes.grid(False)
            for row, column in np.ndindex(table.shape) if count <= 400 else ():
                value = float(table[row, column])
                colour = "white" if abs(value - 0.5) > 0.7 * far else "black"
                text = format_number(value, 2)
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
            for row in chosen[0]:
                for column in chosen[1]:
                    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2)
                    axes.add_patch(frame)
        figure.colorbar(image, ax=panels, label="AUC", fraction=0.02, pad=0.01)

    width = 2.2 + len(tables) * (0.4 + 0.33 * len(timesteps))
    alt = "AUC of attention maps by layer and timestep on validation images; the chosen cells have a frame"
    return chart("atlas", alt, width, 1.5 + 0.28 * len(layers), draw)


if __name__ == "__main__":
    main(atlas, AtlasConfig, ignored=IGNORED)

"""Where the attention localizes, by layer and timestep; a subset chosen on validation images, tested, and stored.

    accelerate launch recipes/atlas.py --config recipes/configs/phantom/atlas.yaml \
        --runs checkpoints/tradeoff_quick/frozen,checkpoints/tradeoff_quick/learnable

Writes atlas.json, atlas.md and each model's heat maps, and localization.json into each run folder, from where
evaluation takes the run's layers and timesteps. The search is `choose_subset` in distill/evaluation/atlas.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from distill.cli import main, to_yaml
from distill.config import BaseConfig, MapEvaluation
from distill.data_config import AnyData, PhantomData
from distill.settings import Count, Settings, Text, Texts, Timesteps

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

    from distill.data.sample import ImageCaptionDataset
    from distill.files import JsonObject
    from distill.models import Model


class AtlasConfig(Settings):
    """Find the layers and timesteps that localize, on validation images, and store them with the model.

    accelerate launch recipes/atlas.py --config recipes/configs/phantom/atlas.yaml --runs RUN,RUN
    """

    common: ClassVar[tuple[str, ...]] = (
        "base.name", "runs", "data.kind", "data.root", "timesteps", "validation_images", "choose_by", "store",
        "output_dir",
    )  # fmt: skip
    base: BaseConfig = BaseConfig()
    runs: Texts = ()
    """Run folders on the base that are looked at in addition to the base."""
    data: AnyData = PhantomData()
    evaluation: MapEvaluation = MapEvaluation()
    timesteps: Timesteps = (
        25, 100, 175, 250, 325, 400, 475, 550, 625, 700, 775, 850, 925,
    )  # fmt: skip
    """Timesteps of the atlas; 100, 250, 400, 550 and 700 are added."""
    max_timesteps: Annotated[int, Field(ge=1, le=1000)] = 3
    """Most timesteps of the subset: the forward passes that it costs an image."""
    validation_images: Count = 100
    """Validation images that the subset is chosen on. evaluation.localization_images test images check it."""
    choose_by: Literal["image_adds", "auc"] = "image_adds"
    """Measure that chooses the subset. image_adds: AUC of an image's own map minus that of maps of other images with the
    same finding, both against the image's own mask; 0 for a map that ignores the image. Subsets with a lower AUC than all
    layers at 100, 250, 400, 550 and 700 are taken only if the search finds no other. auc: the AUC alone."""
    store: bool = True
    """Write the subset as localization.json into each run folder, where evaluation finds it."""
    store_base: bool = False
    """Write the base's subset into the base's own folder. Runs without a subset then use it."""
    output_dir: Text = "checkpoints/atlas"
    """Where atlas.json, atlas.md and each model's heat maps are written."""
    dry_run: bool = False
    """Check everything, measure one batch, print estimates, and stop."""


def models_of(runs: tuple[str, ...]) -> dict[str, Path | None]:
    """`base` -> None, and the shortest end of each run folder's path that tells it from the others -> the folder."""
    from distill.errors import UserError

    folders = [Path(run) for run in runs]
    parts = [folder.resolve().parts[1:] for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError(f"runs: a folder is given twice: {', '.join(runs)}")
    length = 1
    while len({"base", *("-".join(own[-length:]) for own in parts)}) <= len(parts):
        length += 1
    return {"base": None, **{"-".join(own[-length:]): folder for own, folder in zip(parts, folders, strict=True)}}


def base_folder(config: AtlasConfig) -> Path:
    from distill.models.loading import PHANTOM_BASE

    return PHANTOM_BASE if config.base.name == "phantom" else Path(config.base.name)


def load_splits(config: AtlasConfig) -> tuple[ImageCaptionDataset, ImageCaptionDataset]:
    """Validation and test images. Raises UserError unless they are different images."""
    from distill.data.loading import load_dataset
    from distill.errors import UserError

    if isinstance(config.data, PhantomData) and config.data.validation_size == 0:
        raise UserError("data.validation_size is 0: the subset is chosen on validation images; give at least 1")
    validation, test = load_dataset(config.data, "validation"), load_dataset(config.data, "test")
    chosen_on, tested = ({dataset.fingerprint(i) for i in range(len(dataset))} for dataset in (validation, test))
    if shared := len(chosen_on & tested):
        raise UserError(
            f"{shared} of {len(tested)} test images are also validation images, and the subset must be tested on other "
            "images than it is chosen on: set data.split_column to a column with `validation` (or `val`, `valid`) in "
            "some rows, and data.test_split in others"
        )
    return validation, test


def check(config: AtlasConfig, model: Model, validation: ImageCaptionDataset, test: ImageCaptionDataset) -> None:
    """Raise UserError, before anything is computed, for what does not fit the base or the data."""
    from distill.data.readers.records import RecordDataset
    from distill.data.sample import has_finding_twice
    from distill.errors import UserError, raise_all
    from distill.evaluation.protocols import queries

    faults = []
    steps = model.family.num_timesteps(model)
    if max(config.timesteps) >= steps:
        faults.append(f"timesteps must be in 0 .. {steps - 1}; got {config.timesteps}")
    factor, resolution = model.vae_factor, config.data.resolution
    if resolution % factor or resolution < 4 * factor:
        faults.append(
            f"data.resolution is {resolution}; the VAE needs a multiple of {factor}, of at least {4 * factor}"
        )
    if config.store_base and not base_folder(config).is_dir():
        faults.append("store_base is true, but base.name is a hub id: there is no folder to write into")
    raise_all("the configuration does not fit the base", faults)
    for which, dataset in (("validation", validation), ("test", test)):
        if isinstance(dataset, RecordDataset):
            dataset.check_captions(model)
            if config.evaluation.localization_text == "caption":
                dataset.check_queries()
        if not queries(dataset, model, config.evaluation.full(localization_images=1)):
            why = f": {dataset.no_regions}; see data.findings" if isinstance(dataset, RecordDataset) else ""
            raise UserError(f"none of the {len(dataset):,} {which} images has a box or mask of a finding{why}")
    if config.choose_by == "image_adds" and not has_finding_twice(validation):
        raise UserError(
            "choose_by is image_adds, which compares the maps of images with the same finding, and no finding has a box "
            f"or mask in two of the {len(validation):,} validation images; set choose_by to auc"
        )


def dry_run(
    config: AtlasConfig, model: Model, validation: ImageCaptionDataset, accelerator: Accelerator, console: Console
) -> None:
    """Resolved configuration, and estimates from one batch. Writes nothing."""
    import time

    import numpy as np

    from distill.evaluation.cells import compute_cells
    from distill.evaluation.protocols import DEFAULT_TIMESTEPS
    from distill.memory import peak_memory_gb

    console.print(to_yaml(config))
    few = config.evaluation.full(localization_images=config.evaluation.batch_size)
    model.to(accelerator.device).freeze()
    began = time.perf_counter()
    cells = compute_cells(
        model, validation, few, config.timesteps[:1], accelerator=accelerator, by="auc", label="dry run"
    )
    images = len(np.unique(cells.pairs.images[list(cells.mine)]))
    count = len({*config.timesteps, *DEFAULT_TIMESTEPS})
    passes = config.validation_images * count
    passes += config.evaluation.localization_images * (len(DEFAULT_TIMESTEPS) + config.max_timesteps)
    seconds = (time.perf_counter() - began) / max(images, 1) * passes / accelerator.num_processes
    size = cells.maps.element_size() * cells.maps.numel() * count / max(images, 1)
    console.print(
        f"{len(cells.layers)} layers at {count} timesteps; about {seconds / 60:.1f} min and "
        f"{size * config.validation_images / 1e9:.2f} GB of maps a model; peak memory so far {peak_memory_gb():.2f} "
        "GB\ndry run: the data and the models are fine; nothing was written"
    )


def write_model(config: AtlasConfig, name: str, run: Path | None, entry: JsonObject) -> Path | None:
    """The heat map and the subset of one model; where the subset was stored for evaluation to find."""
    import numpy as np

    from distill.evaluation.atlas import subset_file
    from distill.experiment.atlas import atlas_chart, short_layer
    from distill.files import write_atomic, write_json
    from distill.models.loading import SUBSET_FILE

    folder, chosen = Path(config.output_dir) / name, entry["chosen"]
    rows, columns = ([entry[key].index(value) for value in chosen[key]] for key in ("layers", "timesteps"))
    tables = {token: np.array(table) for token, table in entry["validation"][chosen["by"]].items()}
    names = [short_layer(layer) for layer in entry["layers"]]
    chart = atlas_chart(tables, names, entry["timesteps"], (rows, columns), chosen["by"])
    write_atomic(folder / "atlas.png", chart.png)
    content = subset_file(entry, config.model_dump(mode="json"))
    write_json(folder / SUBSET_FILE, content)
    target = run if config.store else None
    if run is None and config.store_base:
        target = base_folder(config)
    if target is None:
        return None
    if not chosen["is_better"]:
        (target / SUBSET_FILE).unlink(missing_ok=True)  # of an earlier atlas, whose subset evaluation would still use
        return None
    return write_json(target / SUBSET_FILE, content)


def write_tables(
    config: AtlasConfig, entries: JsonObject, stored: list[Path], processes: int, console: Console
) -> None:
    """atlas.json, atlas.md, the table in the terminal, paths, and the next command."""
    from distill.experiment.atlas import answer, markdown, terminal_table
    from distill.files import provenance, write_atomic, write_json
    from distill.memory import peak_memory_gb

    folder = Path(config.output_dir)
    origin = provenance() | {
        "seeds": {"evaluation": config.evaluation.seed, "data": getattr(config.data, "seed", None)},
        "processes": processes,
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "config": config.model_dump(mode="json"),
    }
    write_json(folder / "atlas.json", {"models": entries, "provenance": origin})
    write_atomic(folder / "atlas.md", markdown(entries, config.evaluation.full()))
    console.print(terminal_table(entries))
    for name, entry in entries.items():
        console.print(answer(name, entry))
    for path in stored:
        console.print(f"stored: {path}")
    following = f"open {folder / 'atlas.md'}"
    if isinstance(config.data, PhantomData) and stored and config.runs:
        command = "accelerate launch recipes/evaluate.py --config recipes/configs/phantom/evaluate.yaml"
        following = f"{command} --run {config.runs[0]} --evaluation.timesteps null"
    console.print(f"numbers: {folder / 'atlas.json'}\ntables and heat maps: {folder / 'atlas.md'}\nnext: {following}")


def atlas(config: AtlasConfig) -> None:
    from distill.experiment.folder import held
    from distill.experiment.run import quiet_libraries

    quiet_libraries()
    with held(Path(config.output_dir), write=not config.dry_run):
        measure_all(config)


def measure_all(config: AtlasConfig) -> None:
    from accelerate import Accelerator
    from rich.console import Console

    from distill.evaluation.atlas import analyse
    from distill.models import load_model

    accelerator = Accelerator()
    console = Console(quiet=not accelerator.is_main_process, soft_wrap=True, highlight=False, markup=False)
    models = models_of(config.runs)
    with accelerator.main_process_first():
        validation, test = load_splits(config)
    for run in models.values():  # each of them, so that a fault in the last does not come after minutes
        model = load_model(config.base, run)
    check(config, model, validation, test)
    if config.dry_run:
        return dry_run(config, model, validation, accelerator, console)
    entries: JsonObject = {}
    stored = []
    for name, run in models.items():
        model = load_model(config.base, run).to(accelerator.device).freeze()
        entry = analyse(
            model,
            validation,
            test,
            config.evaluation.full(),
            timesteps=config.timesteps,
            max_timesteps=config.max_timesteps,
            validation_images=config.validation_images,
            by=config.choose_by,
            accelerator=accelerator,
            folder=Path(config.output_dir) / name,
            label=name,
        )
        entries[name] = {"model": str(run or config.base.name)} | entry
        if accelerator.is_main_process and (path := write_model(config, name, run, entry)):
            stored.append(path)
    if accelerator.is_main_process:
        write_tables(config, entries, stored, accelerator.num_processes, console)


if __name__ == "__main__":
    main(atlas, AtlasConfig)

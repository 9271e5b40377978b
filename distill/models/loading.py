"""Load a model: a base, and the weights or adapters of a run folder on it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from torch import nn

from distill.config import BaseConfig
from distill.errors import UserError, raise_all
from distill.files import read_json
from distill.models.family import AttentionSubset, Model, family_of_pipeline
from distill.models.parts import check_adapter, load_module, load_pipeline, refusing
from distill.models.prompts import chunk_faults
from distill.models.single_file import PICKLES, is_adapter, keys_of, load_single_file, refuse_pickle

PHANTOM_BASE = Path(__file__).parents[2] / "checkpoints" / "phantom-base"
SUBSET_FILE = "localization.json"
LORA_FILE = "pytorch_lora_weights.safetensors"


def read_subset(folder: Path, denoiser: nn.Module) -> AttentionSubset | None:
    """The localization.json of a pipeline or run folder, None if it has none. Raises UserError if it does not fit."""
    path = folder / SUBSET_FILE
    if not path.exists():
        return None
    content = read_json(path)
    try:
        subset = AttentionSubset(tuple(map(str, content["layers"])), tuple(map(int, content["timesteps"])))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} must have lists `layers` and `timesteps`: {error!r}") from error
    known = {name for name, _ in denoiser.named_modules()}
    strange = [name for name in subset.layers if name not in known]
    if strange or not subset.layers or not subset.timesteps:
        raise UserError(
            f"{path} is for another denoiser, or empty: {', '.join(strange[:3]) or 'no layers or timesteps'}"
        )
    return subset


def load_model(base: BaseConfig, run: str | Path | None = None) -> Model:
    """Load a base by hub id, folder, file or the word `phantom`, and put a trained run folder's weights or adapters on
    it.

    All in float32. Raises UserError for what is missing, of another kind, or does not fit.
    """
    if run is not None:
        _check_run(base, Path(run))
    name = str(PHANTOM_BASE) if base.name == "phantom" else base.name
    if base.name == "phantom" and not PHANTOM_BASE.is_dir():
        raise UserError(
            f"the bundled base is not at {PHANTOM_BASE}; install the project from its repository (pip install -e .) "
            "or make the base with recipes/pretrain_phantom.py"
        )
    path = Path(name) if os.path.exists(name) else _downloaded(name, base)
    try:
        refuse_pickle(path)
        one = path.is_file()
        pipeline = load_single_file(path, base.single_file_config) if one else load_pipeline(path, base.variant)
        model = model_of(pipeline)
        model.caption_chunks = base.caption_chunks
        model.family.check_loaded(model)
        raise_all("base.caption_chunks does not fit the base", chunk_faults(model))
    except UserError as error:
        raise UserError(f"base.name: {error if name in str(error) else f'{name}: {error}'}") from error.__cause__
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if run is not None:
        load_run(model, Path(run))
    for folder in (run, name):
        if folder is not None and model.subset is None and os.path.isdir(folder):
            model.subset = read_subset(Path(folder), model.denoiser)
    return model


DERIVED = ("whole_base", "pruned_base")
"""In a run folder, the base that distill_steps.py and compress.py made for its students."""


def _check_run(base: BaseConfig, run: Path) -> None:
    """Raise UserError if a run was trained on a base that was made for it, and the base is another; or on captions of
    more chunks than are read now. One on fewer may be trained on."""
    path = next((path for path in (run / "config.yaml", run.parent / "config.yaml") if path.is_file()), None)
    made = [path.parent / name for name in DERIVED if path and (path.parent / name).is_dir()]
    if made and Path(base.name).resolve() not in (folder.resolve() for folder in made):
        raise UserError(f"{run} was trained on {made[0]}, and base.name is {base.name}; give --base.name {made[0]}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) if path else {}
        chunks = int(content["base"]["caption_chunks"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return  # of another tool, or of an earlier version
    if chunks > base.caption_chunks:
        raise UserError(
            f"{run} was trained with base.caption_chunks {chunks}, and base.caption_chunks is {base.caption_chunks}; "
            f"give --base.caption_chunks {chunks}"
        )


def _downloaded(name: str, base: BaseConfig) -> Path:
    """The folder of a hub id in the local cache, downloaded where it is not there."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or name.lower().endswith((".safetensors", *PICKLES)):
        raise UserError(f"base.name: no folder {name}; give a diffusers pipeline folder, a hub id, or `phantom`")
    options: dict[str, object] = {"use_safetensors": True, "safety_checker": None, "revision": base.revision}
    if base.variant:
        options["variant"] = base.variant
    advice = (
        ". Is the name right, and the hub reachable (or the model in the local cache)? A folder saved by "
        "pipeline.save_pretrained works without a hub"
    )
    with refusing(f"base.name: cannot load {name}", advice):
        return Path(DiffusionPipeline.download(name, **options))


def model_of(pipeline: DiffusionPipeline) -> Model:
    """The parts of a stock pipeline. Raises UserError for a pipeline of no known family."""
    return family_of_pipeline(pipeline).model_of(pipeline)


def load_run(model: Model, run: Path) -> None:
    """Put a run folder on its base as a user would: stock loaders of diffusers and transformers, and a count of keys.

    run: a folder, or an adapter file in the layout of diffusers or kohya's scripts.
    Raises UserError for a folder that holds nothing, is damaged, or was trained on another base.
    """
    folders = (model.family.denoiser_name, *model.family.text_encoder_names)
    if os.path.isfile(run):
        refuse_pickle(run)
        if run.suffix.lower() != ".safetensors":
            raise UserError(f"{run} is a file; expected a run folder, or an adapter in a .safetensors file")
        if not is_adapter(run):
            raise UserError(f"{run} is no adapter file; give a run folder, or give a whole checkpoint as base.name")
        return _load_adapter(model, run, run)
    if not os.path.isdir(run):
        raise UserError(f"no run folder {run}")
    if (run / "model_index.json").exists():
        raise UserError(f"{run} is a whole pipeline, not a run folder; give it as base.name, without run")
    found = False
    for name in folders:
        if not os.path.lexists(run / name):
            continue
        found = True
        old = getattr(model.pipeline, name)
        new = load_module(type(old), run / name)
        shapes = {k: tuple(v.shape) for k, v in new.state_dict().items()}
        if shapes != {k: tuple(v.shape) for k, v in old.state_dict().items()}:
            raise UserError(
                f"{run / name} does not fit the base: it has other layers or shapes; give the base it was trained on"
            )
        old.load_state_dict(new.state_dict())
    if os.path.lexists(run / LORA_FILE):
        found = True
        _load_adapter(model, run, run / LORA_FILE)
    if not found:
        raise UserError(f"{run} holds neither {LORA_FILE} nor a folder {' or '.join(folders)}")


def _load_adapter(model: Model, place: Path, path: Path) -> None:
    """Attach the adapter of a file. place: the file, or the folder that holds it.

    Stock loading only warns about keys that match nothing; the file is refused then.
    """
    check_adapter(path)
    with refusing(f"{path} does not fit the base, or is damaged"):
        model.family.load_adapters(model.pipeline, place)
    wanted = sum(not key.endswith(".alpha") for key in keys_of(path))
    loaded = sum("lora_" in name for module in model.modules() for name in module.state_dict())
    if loaded != wanted:
        raise UserError(
            f"{path}: {wanted} tensors in the file, {loaded} found a place in the base; it is for another base"
        )

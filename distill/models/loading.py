"""Load a model: a base, and the weights or adapters of a run folder on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from distill.config import BaseConfig
from distill.errors import UserError
from distill.files import read_json
from distill.models.family import AttentionSubset, Model, family_of_pipeline

PHANTOM_BASE = Path(__file__).parents[2] / "checkpoints" / "phantom-base"
UNREADABLE = (OSError, ValueError, AttributeError, SafetensorError)
"""What stock loaders raise for files that are missing, damaged or of no class that they know."""
SUBSET_FILE = "localization.json"
LORA_FILE = "pytorch_lora_weights.safetensors"


def read_subset(folder: Path, denoiser: nn.Module) -> AttentionSubset | None:
    """The localization.json of a pipeline or run folder, None if it has none. Raises UserError if it does not fit."""
    path = folder / SUBSET_FILE
    if not path.exists():
        return None
    content = read_json(path)
    try:
        subset = AttentionSubset(tuple(content["layers"]), tuple(int(t) for t in content["timesteps"]))
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
    """Load a base by hub id, folder or the word `phantom`, and put a trained run folder's weights or adapters on it.

    All in float32. Raises UserError for what is missing, of another kind, or does not fit.
    """
    name = str(PHANTOM_BASE) if base.name == "phantom" else base.name
    if base.name == "phantom" and not PHANTOM_BASE.is_dir():
        raise UserError(
            f"the embedded base is not at {PHANTOM_BASE}; install the project from its repository (pip install -e .) "
            "or make the base with recipes/pretrain_phantom.py"
        )
    options: dict[str, Any] = {"use_safetensors": True}
    if not Path(name).is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"base.name: no folder {name}; give a diffusers pipeline folder, a hub id, or `phantom`")
        options |= {"revision": base.revision}
    elif not (Path(name) / "model_index.json").exists():
        raise UserError(f"base.name: {name} is not a diffusers pipeline folder (it has no model_index.json)")
    if base.variant:
        options["variant"] = base.variant
    try:
        index = DiffusionPipeline.load_config(name, **({"revision": base.revision} if base.revision else {}))
        if "safety_checker" in index:
            options |= {"safety_checker": None, "requires_safety_checker": False}
        pipeline = DiffusionPipeline.from_pretrained(name, **options)
    except (*UNREADABLE, HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"base.name: cannot load {name}: {first_line(error)}. Is the name right, and the hub reachable (or the model "
            "in the local cache)? A folder saved by pipeline.save_pretrained works without a hub"
        ) from error
    try:
        family = family_of_pipeline(pipeline)
    except UserError as error:
        raise UserError(f"base.name: {name}: {error}") from None
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    model = family.model_of(pipeline)
    if run is not None:
        load_run(model, Path(run))
    for folder in (run, name):
        if folder is not None and model.subset is None and Path(folder).is_dir():
            model.subset = read_subset(Path(folder), model.denoiser)
    return model


def first_line(error: Exception) -> str:
    """The first line of an error's message; its type if that is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def model_of(pipeline: Any) -> Model:
    """The parts of a stock pipeline. Raises UserError for a pipeline of no known family."""
    return family_of_pipeline(pipeline).model_of(pipeline)


def load_run(model: Model, run: Path) -> None:
    """Put a run folder on its base as a user would: stock loaders of diffusers and transformers, and a count of keys.

    Raises UserError for a folder that holds nothing, is damaged, or was trained on another base.
    """
    folders = (model.family.denoiser_name, *model.family.text_encoder_names)
    if not run.is_dir():
        raise UserError(f"no run folder {run}")
    found = False
    for name in folders:
        if not (run / name / "config.json").exists():
            continue
        found = True
        old = getattr(model.pipeline, name)
        try:
            new = type(old).from_pretrained(run / name)
        except UNREADABLE as error:
            raise UserError(f"cannot load {run / name}: {first_line(error)}") from error
        shapes = {k: tuple(v.shape) for k, v in new.state_dict().items()}
        if shapes != {k: tuple(v.shape) for k, v in old.state_dict().items()}:
            raise UserError(
                f"{run / name} does not fit the base: it has other layers or shapes; give the base it was trained on"
            )
        old.load_state_dict(new.state_dict())
    if (run / LORA_FILE).exists():
        found = True
        try:
            model.family.load_adapters(model.pipeline, run)
        except (*UNREADABLE, RuntimeError, KeyError) as error:
            raise UserError(f"{run / LORA_FILE} does not fit the base, or is damaged: {first_line(error)}") from error
        _check_adapter_keys(model, run / LORA_FILE)
    if not found:
        raise UserError(f"{run} holds neither {LORA_FILE} nor a folder {' or '.join(folders)}")


def _check_adapter_keys(model: Model, path: Path) -> None:
    """Stock loading only warns about keys that match nothing; refuse the file then."""
    with safe_open(path, "pt") as file:
        wanted = len(file.keys())
    loaded = sum("lora_" in name for module in model.modules() for name in module.state_dict())
    if loaded != wanted:
        raise UserError(
            f"{path}: {wanted} tensors in the file, {loaded} found a place in the base; it is for another base"
        )

"""Read a pipeline folder part by part, so that a part that is damaged, foreign or unsafe is named by its file.

Stock loaders run no code of the folder here: every class comes from diffusers or transformers by its name, and weights
are read from safetensors only.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import UserError
from distill.models.family import Family, families

Part: TypeAlias = "ModelMixin | PreTrainedModel | PreTrainedTokenizerBase | SchedulerMixin"
INDEX = "model_index.json"
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
CONFIGS = {SchedulerMixin: "scheduler_config.json", ModelMixin: "config.json", PreTrainedModel: "config.json"}
"""The file that must be there for a part of a class. A tokenizer has several, of several names."""
NOT_WEIGHTS = ("position_ids", "num_batches_tracked")
"""Ends of the names of whole numbers that stock models keep beside their weights."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if that is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def refusing(what: str, advice: str = "") -> Iterator[None]:
    """Raise UserError, `what` first, for anything that a stock loader raises; they raise nearly all there is."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"{what}: {first_line(error)}{advice}") from error


def read_object(path: Path) -> dict[str, object]:
    """The JSON object of a file of a model. Raises UserError for anything else."""
    check_file(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, expected a JSON object: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {str(content)[:40]}")
    return content


def check_file(path: Path) -> None:
    """Raise UserError unless a file can be read: a pipe is waited for forever, and loaders skip a broken link in
    silence."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            path.open("rb").close()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: expected a file, got {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}")


def check_weights_file(path: Path) -> None:
    """Raise UserError unless a safetensors file has a sound header, and weights that are floating-point numbers."""
    check_file(path)
    try:
        with safe_open(path, "pt") as file:
            dtypes = {key: str(file.get_slice(key).get_dtype()) for key in list(file.keys())}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} is damaged, or no safetensors file: {first_line(error)}") from error
    if not dtypes:
        raise UserError(f"{path} holds no weights")
    for key, dtype in dtypes.items():
        if "F" not in dtype and not key.endswith((*NOT_WEIGHTS, ".alpha")):  # kohya's alpha may be whole
            raise UserError(
                f"{path}: {key} is of type {dtype}; expected floating-point numbers, such as F32 or F16. Quantized "
                "weights are not read"
            )


def check_weights(module: nn.Module, where: Path | str) -> None:
    """Raise UserError for a weight that is not finite, and for a module whose weights are all 0."""
    largest = 0.0
    for name, parameter in module.named_parameters():
        if parameter.is_meta or not parameter.numel():
            continue
        low, high = (float(end) for end in torch.aminmax(parameter.detach()))
        if not (math.isfinite(low) and math.isfinite(high)):
            weight = name.replace("/", ".")
            raise UserError(
                f"{where}: the weight {weight} is not finite (NaN or infinite); give a sound copy of the model"
            )
        largest = max(largest, -low, high)
    if largest == 0:
        raise UserError(f"{where}: all weights are 0; give a sound copy of the model")


def check_adapter(path: Path) -> None:
    """Raise UserError for an adapter file that is damaged, not finite, or changes nothing (all 0, or an alpha of 0)."""
    check_weights_file(path)
    with safe_open(path, "pt") as file:
        metadata = (file.metadata() or {}).get("lora_adapter_metadata", "{}")
        weights = nn.ParameterDict({key.replace(".", "/"): file.get_tensor(key).float() for key in list(file.keys())})
    check_weights(weights, path)
    for key, value in weights.items():
        if key.endswith("/alpha") and not (value.numel() == 1 and float(value.detach()) > 0):
            raise UserError(f"{path}: {key.replace('/', '.')} is {value.tolist()}; expected a number above 0")
    try:
        alphas = {key: value for key, value in json.loads(metadata).items() if key.endswith("lora_alpha")}
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: its lora_adapter_metadata is damaged: {first_line(error)}") from error
    for key, alpha in alphas.items():
        if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            raise UserError(f"{path}: {key} is {alpha!r} in its lora_adapter_metadata; expected a number above 0")


def read_index(folder: Path) -> tuple[Family, dict[str, object]]:
    """The family of a pipeline folder, and its index. Raises UserError for no known family, or a part of no known
    library."""
    path = folder / INDEX
    if not path.exists() and not path.is_symlink():
        raise UserError(f"{folder} is not a diffusers pipeline folder (it has no {INDEX})")
    index = read_object(path)
    name = index.get("_class_name")
    known = {family.pipeline_class.__name__: family for family in reversed(families())}
    if not isinstance(name, str) or name not in known:
        shown = name if isinstance(name, str) and name.isprintable() and name else repr(name)
        raise UserError(
            f"{path}: _class_name {shown} is of no known model family; supported: {', '.join(sorted(known))}"
        )
    for part, entry in index.items():
        if part.startswith("_") or part == "safety_checker" or not isinstance(entry, list):
            continue
        sound = len(entry) == 2 and all(value is None or isinstance(value, str) for value in entry)
        if not sound or (entry[0] is not None and entry[0] not in LIBRARIES):
            raise UserError(
                f"{path}: {part} is {json.dumps(entry)}; expected a library, {' or '.join(LIBRARIES)}, and a class in "
                "it"
            )
    return known[name], index


def _class_of(part: str, family: Family, index: dict[str, object], path: Path) -> type[Part]:
    """The stock class of a part. Raises UserError unless it is one that can be this part."""
    base: type[Part] = ModelMixin
    if part == family.denoiser_name:
        base = family.denoiser_class
    elif part in family.text_encoder_names:
        base = PreTrainedModel
    elif part in family.tokenizer_names:
        base = PreTrainedTokenizerBase
    elif part == "scheduler":
        base = SchedulerMixin
    entry = index.get(part)
    library, name = entry if isinstance(entry, list) else (None, None)
    found = getattr(LIBRARIES[library], name, None) if library is not None and name is not None else None
    if not (isinstance(found, type) and issubclass(found, base)):
        raise UserError(
            f"{path}: {part} is {json.dumps(entry)}; expected the library and name of a class of a {base.__name__}, "
            f"such as pipeline.save_pretrained writes"
        )
    return found


def load_module(cls: type[Part], folder: Path, variant: str | None = None) -> ModelMixin | PreTrainedModel:
    """A model of a folder, in float32. Raises UserError, with the file, for one that is damaged or lacks weights."""
    check_folder(folder, "config.json")
    read_object(folder / "config.json")
    options: dict[str, object] = {"use_safetensors": True, "output_loading_info": True}
    options["torch_dtype" if issubclass(cls, ModelMixin) else "dtype"] = torch.float32
    if variant and any(folder.glob(f"*.{variant}*.safetensors*")):
        options["variant"] = variant
    for path in sorted(folder.glob("*.safetensors")):
        check_weights_file(path)
    with refusing(f"cannot load {folder}"):
        module, found = cls.from_pretrained(folder, **options)
    missing = sorted(key for key in found["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} weights of a {cls.__name__}: {missing[0]} …")
    check_weights(module, folder)
    return module


def check_folder(folder: Path, config: str) -> None:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: expected a folder with {config}; {'it is a file' if folder.exists() else 'it is missing'}"
        )


def _load_tokenizer(cls: type[Part], folder: Path) -> PreTrainedTokenizerBase:
    check_folder(folder, "the files of a tokenizer")
    for path in folder.iterdir():
        check_file(path) if not path.is_dir() else None
        if path.suffix == ".json":
            read_object(path)
    with refusing(f"cannot load {folder}"):
        return cls.from_pretrained(folder)


def _load_scheduler(cls: type[Part], folder: Path) -> SchedulerMixin:
    check_folder(folder, "scheduler_config.json")
    path = folder / "scheduler_config.json"
    if "_class_name" not in read_object(path):
        raise UserError(f"{path}: expected the configuration of a scheduler, with _class_name")
    with refusing(f"cannot load {folder}"):
        return cls.from_pretrained(folder)


def load_pipeline(folder: Path, variant: str | None = None) -> DiffusionPipeline:
    """The stock pipeline of a folder, in float32, without a safety checker.

    Raises UserError, with the file, for what is missing, damaged, of no known class, or not finite.
    """
    family, index = read_index(folder)
    path, parts = folder / INDEX, {}
    classes = {
        part: _class_of(part, family, index, path)
        for part in (*family.tokenizer_names, "scheduler", *family.text_encoder_names, "vae", family.denoiser_name)
    }
    if variant and not any(folder.glob(f"*/*.{variant}*.safetensors*")):
        raise UserError(f"{folder} has no weights of the variant {variant}; leave base.variant out")
    for part, cls in classes.items():
        if issubclass(cls, PreTrainedTokenizerBase):
            parts[part] = _load_tokenizer(cls, folder / part)
        elif issubclass(cls, SchedulerMixin):
            parts[part] = _load_scheduler(cls, folder / part)
        else:
            parts[part] = load_module(cls, folder / part, variant)
    if "safety_checker" in index:
        parts |= {"safety_checker": None, "requires_safety_checker": False}
    with refusing(f"cannot load {folder}"):
        return family.pipeline_class.from_pretrained(folder, **parts)  # type: ignore[attr-defined]

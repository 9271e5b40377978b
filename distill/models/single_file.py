"""Models in one file, as ComfyUI and A1111 keep them: whole checkpoints of Stable Diffusion or SDXL, and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from torch import nn

from distill.errors import UserError
from distill.models.parts import check_file, check_weights, refusing

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")
SDXL_KEY = "conditioner.embedders.1.model.ln_final.weight"
"""Of the second text encoder, which only checkpoints of SDXL have."""


def refuse_pickle(path: str | Path) -> None:
    """Raise UserError for a file that runs the code in it when it is read."""
    if str(path).lower().endswith(PICKLES):
        raise UserError(
            f"{path} is a pickle, which can run any code when it is read, so that it is refused; convert it to "
            ".safetensors on a machine that you can lose, or take the .safetensors file of the same model"
        )


V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
"""Empty tensors by which a single file says that it predicts v, with a schedule that ends without signal."""
PREDICTION_TYPES = {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon", "eps": "epsilon"}


def keys_of(path: Path) -> list[str]:
    """Names of the tensors of a safetensors file. Raises UserError for anything else."""
    refuse_pickle(path)
    check_file(path)
    with refusing(f"{path} is damaged, or no safetensors file"), safe_open(path, "pt") as file:
        return list(file.keys())


def is_adapter(path: Path) -> bool:
    """Whether a safetensors file holds an adapter. Raises UserError for what is no such file."""
    return any(".lora_" in key or ".lora." in key or key.startswith("lora_") for key in keys_of(path))


def load_single_file(path: Path, config: str | None) -> DiffusionPipeline:
    """The stock pipeline of a whole checkpoint, in float32, without a safety checker.

    config: folder or hub id of the pipeline whose configs and tokenizer belong to it; None lets diffusers choose those
    of the original model, on the hub or in the local cache. Raises UserError for what is no checkpoint, or lacks its
    configs, and for an SDXL whose two text encoders are equally wide, by which diffusers tells them apart (the
    original's are not).
    """
    keys = keys_of(path)
    if is_adapter(path):
        raise UserError(
            f"{path} is an adapter, and no whole model; give the base as base.name, and this file as the run"
        )
    if not any(key.startswith("model.diffusion_model.") for key in keys):
        raise UserError(
            f"{path} is no whole checkpoint of Stable Diffusion or SDXL: no tensor starts with model.diffusion_model; "
            "the "
            "first is " + (sorted(keys) or ["none"])[0]
        )
    if config is not None and config.startswith((".", "/", "~")) and not Path(config).is_dir():
        raise UserError(f"base.single_file_config: no folder {config}")
    options: dict[str, None] = {"safety_checker": None, "feature_extractor": None}
    cls = StableDiffusionXLPipeline if SDXL_KEY in keys else StableDiffusionPipeline
    advice = (
        ". The file has no configs and no tokenizer: where the hub is out of reach, give base.single_file_config, the "
        "folder of a diffusers pipeline of the same architecture (its weights are not read)"
    )
    with refusing(f"cannot load {path}", advice):
        pipeline: DiffusionPipeline = cls.from_single_file(
            str(path), config=config, torch_dtype=torch.float32, **(options if SDXL_KEY not in keys else {})
        )
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            missing = [key for key, parameter in part.named_parameters() if parameter.is_meta]
            if missing:
                raise UserError(f"{path} lacks {len(missing)} weights of the {name}: {missing[0]} …")
            check_weights(part, path)
    _set_prediction_type(pipeline, path, keys)
    pipeline.register_to_config(_name_or_path=path.name)
    return pipeline


def _set_prediction_type(pipeline: DiffusionPipeline, path: Path, keys: Sequence[str]) -> None:
    """Give the scheduler what the file says of itself, where its configs say otherwise: empty tensors `v_pred` and
    `ztsnr` (zero terminal SNR), which ComfyUI reads, or the metadata modelspec.prediction_type. Raises UserError for
    EDM."""
    if edm := [key for key in keys if key.startswith("edm_")]:
        raise UserError(f"{path} is a model with an EDM schedule ({edm[0]}), which is not supported; give another base")
    with safe_open(path, "pt") as file:
        said = (file.metadata() or {}).get("modelspec.prediction_type", "").lower()
    kind = "v_prediction" if V_PREDICTION in keys else PREDICTION_TYPES.get(said)
    change = ({"prediction_type": kind} if kind else {}) | (
        {"rescale_betas_zero_snr": True} if ZERO_SNR in keys else {}
    )
    if change:
        config = {**pipeline.scheduler.config, **change}
        config.pop("_use_default_values", None)  # from_config would ignore what the file's own config does not name
        pipeline.scheduler = type(pipeline.scheduler).from_config(config)

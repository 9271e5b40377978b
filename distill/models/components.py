"""The parts of a text-to-image diffusion model: loading, freezing, adapters, text encoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig as PeftLoraConfig
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

from distill.config import BaseConfig, LoraConfig
from distill.errors import UserError
from distill.files import read_json

PHANTOM_BASE = Path(__file__).parents[2] / "checkpoints" / "phantom-base"
UNREADABLE = (OSError, ValueError, AttributeError, SafetensorError)
"""What stock loaders raise for files that are missing, damaged or of no class that they know."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


SUBSET_FILE = "localization.json"


@dataclass(frozen=True)
class AttentionSubset:
    """The cross-attention layers (names) and timesteps whose mean localizes best on validation images."""

    layers: tuple[str, ...]
    timesteps: tuple[int, ...]


def read_subset(folder: Path, unet: nn.Module) -> AttentionSubset | None:
    """localization.json of a pipeline or run folder, None if it has none. Raises UserError if it does not fit `unet`."""
    path = folder / SUBSET_FILE
    if not path.exists():
        return None
    content = read_json(path)
    try:
        subset = AttentionSubset(tuple(content["layers"]), tuple(int(t) for t in content["timesteps"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} must have lists `layers` and `timesteps`: {error!r}") from error
    known = {name for name, _ in unet.named_modules()}
    strange = [name for name in subset.layers if name not in known]
    if strange or not subset.layers or not subset.timesteps:
        raise UserError(f"{path} is of another U-Net, or empty: {', '.join(strange[:3]) or 'no layers or timesteps'}")
    return subset


@dataclass
class Components:
    """A base model, whatever its architecture. SDXL has two text encoders and tokenizers, SD 1.x and 2.x have one."""

    unet: Any
    vae: Any
    text_encoders: list[Any]
    tokenizers: list[Any]
    noise_scheduler: Any
    pipeline: Any
    """Stock pipeline around the same modules."""
    subset: AttentionSubset | None = None
    """Of the run folder, else of the base."""

    @property
    def is_sdxl(self) -> bool:
        return len(self.text_encoders) == 2

    @property
    def max_tokens(self) -> int:
        return min(int(t.model_max_length) for t in self.tokenizers)

    @property
    def vae_factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def prediction_type(self) -> str:
        return str(self.noise_scheduler.config.prediction_type)

    def modules(self) -> list[nn.Module]:
        return [self.unet, self.vae, *self.text_encoders]

    def to(self, device: torch.device | str) -> Components:
        for module in self.modules():
            module.to(device)
        return self

    def freeze(self) -> Components:
        for module in self.modules():
            module.requires_grad_(False)
            module.eval()
        return self

    def tokenize(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """One (batch, max_tokens) int64 tensor a tokenizer, padded and truncated."""
        return [
            tokenizer(
                list(captions), padding="max_length", truncation=True, max_length=self.max_tokens, return_tensors="pt"
            ).input_ids
            for tokenizer in self.tokenizers
        ]


def encode_text(
    text_encoders: Sequence[nn.Module], input_ids: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(batch, tokens, dim) hidden states for the U-Net, and SDXL's (batch, dim) pooled embedding or None.

    One encoder: its last hidden state, as in SD 1.x and 2.x; with an attention mask if its config asks for one
    (use_attention_mask, as the stock pipeline does). Two: the last but one of each, joined, and the projection of
    the second (Podell et al. 2023, section 2.1).
    """
    if len(text_encoders) == 1:
        encoder: Any = text_encoders[0]
        masked = getattr(encoder.config, "use_attention_mask", False)
        return encoder(input_ids[0], attention_mask=_mask(encoder, input_ids[0]) if masked else None)[0], None
    outputs = [enc(ids, output_hidden_states=True) for enc, ids in zip(text_encoders, input_ids, strict=True)]
    return torch.cat([out.hidden_states[-2] for out in outputs], dim=-1), outputs[1].text_embeds


def _mask(encoder: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """(batch, tokens) int64, 0 on the padding token's id."""
    return (input_ids != encoder.config.pad_token_id).long()


def load_components(base: BaseConfig, run: str | Path | None = None) -> Components:
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
    if not isinstance(pipeline, (StableDiffusionPipeline, StableDiffusionXLPipeline)):
        raise UserError(f"base.name: {name} is a {type(pipeline).__name__}; SD 1.x, SD 2.x and SDXL are supported")
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    components = components_of(pipeline)
    if run is not None:
        load_run(components, Path(run))
    for folder in (run, name):
        if folder is not None and components.subset is None and Path(folder).is_dir():
            components.subset = read_subset(Path(folder), components.unet)
    return components


def first_line(error: Exception) -> str:
    """Of its message; its type if that is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def components_of(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> Components:
    """The parts of a stock pipeline."""
    text_encoders, tokenizers = [pipeline.text_encoder], [pipeline.tokenizer]
    if isinstance(pipeline, StableDiffusionXLPipeline):
        text_encoders.append(pipeline.text_encoder_2)
        tokenizers.append(pipeline.tokenizer_2)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    return Components(pipeline.unet, pipeline.vae, text_encoders, tokenizers, scheduler, pipeline)


LORA_FILE = "pytorch_lora_weights.safetensors"


def load_run(components: Components, run: Path) -> None:
    """Put a run folder on its base as a user would: stock loaders of diffusers and transformers, and a count of keys."""
    if not run.is_dir():
        raise UserError(f"no run folder {run}")
    found = False
    for name in ("unet", "text_encoder", "text_encoder_2"):
        if not (run / name / "config.json").exists():
            continue
        found = True
        old = getattr(components.pipeline, name)
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
            components.pipeline.load_lora_weights(run, adapter_name="default")
        except (*UNREADABLE, RuntimeError, KeyError) as error:
            raise UserError(f"{run / LORA_FILE} does not fit the base, or is damaged: {first_line(error)}") from error
        _check_adapter_keys(components, run / LORA_FILE)
    if not found:
        raise UserError(f"{run} holds neither {LORA_FILE} nor a folder unet, text_encoder or text_encoder_2")


def _check_adapter_keys(components: Components, path: Path) -> None:
    """Stock loading only warns about keys that match nothing; refuse the file then."""
    with safe_open(path, "pt") as file:
        wanted = len(file.keys())
    loaded = sum("lora_" in name for module in components.modules() for name in module.state_dict())
    if loaded != wanted:
        raise UserError(
            f"{path}: {wanted} tensors in the file, {loaded} found a place in the base; it is for another base"
        )


def check_lora_targets(module: nn.Module, targets: Sequence[str], which: str) -> None:
    """Raise UserError if a target matches no layer of `module`, with the names that would, or if transformers refuses the
    installed peft, which it would say only when an adapter is attached."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        raise UserError(
            f"transformers {transformers.__version__} does not work with the installed peft {peft.__version__}: {error}. "
            "Where no such peft is released, install an earlier transformers"
        ) from None
    if which == "text_encoder" and not isinstance(module, (CLIPTextModel, CLIPTextModelWithProjection)):
        raise UserError(
            f"text_encoder lora: the base's text encoder is a {type(module).__name__}, and stock diffusers loads adapters "
            "of CLIP text encoders only; train it in full, or freeze it"
        )
    layers = [n for n, m in module.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    unmatched = [t for t in targets if not any(n == t or n.endswith("." + t) for n in layers)]
    if unmatched:
        ends = sorted({n.split(".")[-1] if not n[-1].isdigit() else ".".join(n.split(".")[-2:]) for n in layers})
        raise UserError(
            f"lora.{which}_targets: {', '.join(unmatched)} match no layer; layers end in: {', '.join(ends)}"
        )


def add_lora(module: nn.Module, lora: LoraConfig, targets: Sequence[str], which: str) -> None:
    """Attach a fresh adapter named `default` to `module`, or go on with the one that it has; its parameters are float32 and
    the only trainable ones.

    Raises UserError if a target matches no layer, or if the adapter that is there is of another rank, scale or targets.
    """
    there = getattr(module, "peft_config", {}).get("default")
    if there is not None:
        theirs = (there.r, float(there.lora_alpha), set(there.target_modules))
        if theirs != (lora.rank, float(lora.alpha), set(targets)):
            raise UserError(
                f"the {which} has an adapter of rank {there.r}, alpha {there.lora_alpha} on {', '.join(sorted(theirs[2]))}; to "
                f"go on with it, set lora.rank, lora.alpha and lora.{which}_targets to these"
            )
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()
        return
    check_lora_targets(module, targets, which)
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        init_lora_weights="gaussian",
    )
    module.add_adapter(config)  # type: ignore[operator]
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def prepare_training(
    components: Components,
    *,
    method: Literal["lora", "full", "frozen"],
    text_encoder: Literal["frozen", "lora", "full"],
    lora: LoraConfig,
    frozen_dtype: str = "fp32",
    gradient_checkpointing: bool = False,
) -> None:
    """Freeze everything, cast all but the VAE to `frozen_dtype`, then make trainable (float32) what the method asks for."""
    components.freeze()
    for module in (components.unet, *components.text_encoders):
        module.to(DTYPES[frozen_dtype])
    for module, how, targets, which in (
        (components.unet, method, lora.unet_targets, "unet"),
        *((encoder, text_encoder, lora.text_encoder_targets, "text_encoder") for encoder in components.text_encoders),
    ):
        if how == "full":
            module.to(torch.float32)
            module.requires_grad_(True)
            if getattr(module, "pooler", None) is not None:  # of BERT and its kin; no U-Net reads it
                module.pooler.requires_grad_(False)
        elif how == "lora":
            add_lora(module, lora, targets, which)
        if how != "frozen" and gradient_checkpointing:
            enable = getattr(module, "enable_gradient_checkpointing", None) or module.gradient_checkpointing_enable
            enable()


def parameter_counts(module: nn.Module) -> tuple[int, int]:
    """(total, trainable)."""
    return (
        sum(p.numel() for p in module.parameters()),
        sum(p.numel() for p in module.parameters() if p.requires_grad),
    )

"""A model and its family: everything that differs between Stable Diffusion, SDXL and whatever comes next.

A family is one stateless object in one file of this folder. It says how the denoiser is called, which attention layers
it has and how they map to the image, how noise is added and what the denoiser predicts, which layers get adapters, and
how they are saved. `register` makes it known; a model is then loaded, trained and evaluated as any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.models.attention_processor import Attention
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill.errors import UserError, raise_all
from distill.tokens import ReadsText

MAX_TOKENS = 100_000
"""Positions of a caption, for a text encoder that names no limit; a tokenizer that names none has 10**30."""
Kind = Literal["cross", "self"]
ModuleName = Callable[[str], str]
TextStates = tuple[torch.Tensor, torch.Tensor | None]
"""(batch, tokens, dim) hidden states, and the (batch, dim) pooled embedding or None."""


@dataclass(frozen=True)
class AttentionSubset:
    """The cross-attention layers (names) and timesteps whose mean localizes best on validation images."""

    layers: tuple[str, ...]
    timesteps: tuple[int, ...]


@dataclass(frozen=True)
class Conditions:
    """What the denoiser reads besides latents and timesteps."""

    embeds: torch.Tensor
    """(batch, tokens, dim)."""
    pooled: torch.Tensor | None = None
    """(batch, dim), SDXL."""
    size_ids: torch.Tensor | None = None
    """(batch, 6), SDXL: original size, top left corner of the crop, and target size, in pixels."""


@dataclass
class Model(ReadsText):
    """A text-to-image diffusion model of any family."""

    family: Family
    denoiser: ModelMixin
    """The network that predicts from noisy latents: a U-Net or a transformer."""
    vae: AutoencoderKL
    text_encoders: list[PreTrainedModel]
    tokenizers: list[PreTrainedTokenizerBase]
    noise_scheduler: SchedulerMixin
    pipeline: DiffusionPipeline
    """Stock pipeline around the same modules."""
    subset: AttentionSubset | None = None
    """Of the run folder, else of the base."""
    caption_chunks: int = 1

    @property
    def vae_factor(self) -> int:
        returned: int = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return returned

    @property
    def prediction_type(self) -> str:
        return self.family.prediction_type(self)

    def modules(self) -> list[nn.Module]:
        return [self.denoiser, self.vae, *self.text_encoders]

    def to(self, device: torch.device | str) -> Model:
        for module in self.modules():
            module.to(device)
        return self

    def freeze(self) -> Model:
        for module in self.modules():
            module.requires_grad_(False)
            module.eval()
        return self

    def encode(self, input_ids: Sequence[torch.Tensor], text_encoders: Sequence[nn.Module] | None = None) -> TextStates:
        """Hidden states of all chunks, and the pooled embedding of the first, as A1111 and ComfyUI take it. By the
        model's own text encoders unless others are given; `input_ids` as `tokenize` gives them."""
        chunks = [ids.unflatten(1, (self.caption_chunks, -1)).flatten(0, 1) for ids in input_ids]
        encoders = self.text_encoders if text_encoders is None else text_encoders
        embeds, pooled = self.family.encode_text(encoders, chunks)
        embeds = embeds.unflatten(0, (-1, self.caption_chunks)).flatten(1, 2)
        return embeds, None if pooled is None else pooled[:: self.caption_chunks]


class Family(ABC):
    """How to use the models of one architecture. Stateless: every method takes the model or its denoiser.

    The schedule methods are those of a DDPM schedule with a prediction of epsilon or v. A family with another schedule,
    such as flow matching, overrides all of them.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[type]
    denoiser_class: ClassVar[type[nn.Module]]
    denoiser_name: ClassVar[str]
    """Attribute of the denoiser in the stock pipeline, and its folder in exports."""
    text_encoder_names: ClassVar[tuple[str, ...]]
    """Attributes of the text encoders in the stock pipeline, and their folders in exports."""
    reads_size: ClassVar[bool] = False
    """Whether the denoiser reads Conditions.size_ids."""
    latents_input: ClassVar[tuple[str, int]]
    timestep_input: ClassVar[tuple[str, int]]
    """Name and position of an argument of the denoiser's forward pass."""
    prediction_types: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")
    """What the denoiser may predict."""

    # --- parts -----------------------------------------------------------------------------------------------------

    @property
    def tokenizer_names(self) -> tuple[str, ...]:
        """Attributes of the tokenizers in the stock pipeline."""
        return tuple(name.replace("text_encoder", "tokenizer") for name in self.text_encoder_names)

    @abstractmethod
    def model_of(self, pipeline: DiffusionPipeline) -> Model:
        """The parts of a stock pipeline."""

    def owns(self, denoiser: nn.Module) -> bool:
        """Whether a denoiser is of this family."""
        return isinstance(denoiser, self.denoiser_class)

    def check(self, model: Model) -> None:
        """Raise UserError if the model predicts something that this family cannot train."""
        if model.prediction_type not in self.prediction_types:
            raise UserError(
                f"the base predicts {model.prediction_type!r}; {' and '.join(self.prediction_types)} are supported"
            )
        alphas = getattr(model.noise_scheduler, "alphas_cumprod", None)
        if model.prediction_type == "epsilon" and alphas is not None and float(alphas[-1]) == 0:
            raise UserError(
                "the base predicts epsilon, and its schedule ends without signal (zero terminal SNR), where epsilon says "
                "nothing of the image; one of the two in its scheduler_config.json is wrong"
            )

    def check_loaded(self, model: Model) -> None:
        """The same for a base as its files give it, and if its parts do not fit each other."""
        if not self.owns(unwrapped(model.denoiser)):
            raise UserError(f"the denoiser is not one of {self.name}, and the pipeline is")
        self.check(model)
        raise_all("the parts of the base do not fit", [*text_faults(model), *self.part_faults(model)])

    def part_faults(self, model: Model) -> list[str]:
        """Why the parts of a model cannot work together; empty if they can."""
        return []

    # --- text, and the forward pass --------------------------------------------------------------------------------

    @abstractmethod
    def encode_text(self, text_encoders: Sequence[nn.Module], input_ids: Sequence[torch.Tensor]) -> TextStates:
        """(batch, tokens, dim) hidden states for the denoiser, and the (batch, dim) pooled embedding or None, of texts
        of one chunk."""

    def negative_conditions(self, model: Model, empty: Conditions) -> Conditions:
        """What the stock pipeline guides away from when no negative prompt is given. empty: of the empty caption."""
        return empty

    @abstractmethod
    def predict(
        self, denoiser: ModelMixin, noisy_latents: torch.Tensor, timesteps: torch.Tensor, conditions: Conditions
    ) -> torch.Tensor:
        """The denoiser's output, (batch, channels, height, width), in the denoiser's dtype; inputs are cast to it."""

    @abstractmethod
    def example_inputs(
        self, model: Model, batch: int, side: int, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, Conditions]:
        """Latents of `side` x `side` cells, timesteps and conditions of the right shapes, for sizes and timing."""

    # --- schedule and prediction -----------------------------------------------------------------------------------

    def prediction_type(self, model: Model) -> str:
        return str(model.noise_scheduler.config.prediction_type)

    def num_timesteps(self, model: Model) -> int:
        return int(model.noise_scheduler.config.num_train_timesteps)

    def draw_timesteps(self, model: Model, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count,) int64, uniform."""
        return torch.randint(self.num_timesteps(model), (count,), generator=generator)

    def add_noise(
        self, model: Model, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """x_t = sqrt(a_t) x + sqrt(1 - a_t) n (Ho et al. 2020, equation 4)."""
        noisy: torch.Tensor = model.noise_scheduler.add_noise(latents, noise, timesteps)
        return noisy

    def target(self, model: Model, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """What the denoiser should predict: n, or v = sqrt(a_t) n - sqrt(1 - a_t) x (Salimans and Ho 2022)."""
        if model.prediction_type == "v_prediction":
            velocity: torch.Tensor = model.noise_scheduler.get_velocity(latents, noise, timesteps)
            return velocity
        return noise

    def clean_and_noise(
        self, model: Model, prediction: torch.Tensor, noisy_latents: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clean latents and the noise that a prediction implies."""
        alphas = model.noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps][:, None, None, None].float()
        signal, noise = alphas.sqrt(), (1 - alphas).sqrt()
        if model.prediction_type == "v_prediction":
            return signal * noisy_latents - noise * prediction, noise * noisy_latents + signal * prediction
        return (noisy_latents - noise * prediction) / signal, prediction

    def same_schedule(self, one: Model, other: Model) -> bool:
        """Whether one timestep is one noise level in two models of this family."""
        ours, theirs = (model.noise_scheduler.alphas_cumprod for model in (one, other))
        return ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-4)

    # --- attention -------------------------------------------------------------------------------------------------

    def attention_layers(self, denoiser: nn.Module, kind: Kind = "cross") -> list[str]:
        """Names of the attention modules of a kind, in the order of the forward pass; here, that of `named_modules`."""
        return [
            name
            for name, module in denoiser.named_modules()
            if isinstance(module, Attention) and module.is_cross_attention == (kind == "cross")
        ]

    @abstractmethod
    def grid(self, latent_size: tuple[int, int], places: int) -> tuple[int, int]:
        """(height, width) of a layer's places, row by row. Raises ValueError for a number that does not fit."""

    def nothing_smaller_follows(self, layer: str) -> bool:
        """Whether no layer after this one has fewer places; true where all layers have equally many."""
        return True

    def block_outputs(self, denoiser: nn.Module) -> dict[str, nn.Module]:
        """The blocks whose outputs are features to distill, by name."""
        raise UserError(f"no feature blocks are listed for the family {self.name}; set feature_weight to 0")

    # --- teacher and student ---------------------------------------------------------------------------------------

    def name_in_teacher(self, student: ModelMixin, teacher: ModelMixin) -> ModuleName:
        """Name of a module of a student denoiser -> its name in the teacher's."""
        return lambda name: name

    def shape_faults(self, student: ModelMixin, teacher: ModelMixin) -> list[str]:
        """Why the attention of two denoisers of this class cannot be compared; empty if it can."""
        return []

    # --- adapters --------------------------------------------------------------------------------------------------

    def adapter_targets(self, part: Literal["denoiser", "text_encoder"]) -> tuple[str, ...]:
        """Ends of the names of the layers that get an adapter when the configuration names none."""
        if part == "denoiser":
            return ("to_q", "to_k", "to_v", "to_out.0")
        return ("q_proj", "k_proj", "v_proj", "out_proj")

    def save_adapters(
        self,
        pipeline: DiffusionPipeline,
        folder: Path,
        states: Mapping[str, Mapping[str, torch.Tensor]],
        configs: Mapping[str, Mapping[str, object]],
    ) -> None:
        """Write the adapters to a file that stock tools load.

        states, configs: of each adapted module by its stock name. Without the configs as metadata, diffusers forgets
        alpha.
        """
        arguments: dict[str, Mapping[str, object]] = {f"{name}_lora_layers": state for name, state in states.items()}
        arguments |= {f"{name}_lora_adapter_metadata": config for name, config in configs.items()}
        type(pipeline).save_lora_weights(folder, **arguments)

    def layout_of_other_tools(self, model: Model) -> tuple[dict[str, torch.Tensor], dict[str, str]] | None:
        """The adapters as ComfyUI and A1111 read them, tensors and metadata; None where they know no such model."""
        return None

    def load_adapters(self, pipeline: DiffusionPipeline, place: Path) -> None:
        """Attach the adapters of a folder or file under the name `default`, as a user would."""
        pipeline.load_lora_weights(place, adapter_name="default", use_safetensors=True)


def text_faults(model: Model) -> list[str]:
    """Tokenizers whose tokens the text encoders cannot embed."""
    faults = []
    names = zip(model.family.tokenizer_names, model.family.text_encoder_names, strict=True)
    parts = zip(model.tokenizers, model.text_encoders, strict=True)
    for (tokenizer_name, encoder_name), (tokenizer, encoder) in zip(names, parts, strict=True):
        if not hasattr(encoder, "get_input_embeddings"):
            continue  # a method has wrapped it, after the base was checked
        rows = int(encoder.get_input_embeddings().num_embeddings)
        # Where the files of a tokenizer are missing, transformers makes one of its special tokens.
        if not rows / 2 < len(tokenizer) <= rows:
            faults.append(
                f"{tokenizer_name} has {len(tokenizer):,} tokens, and {encoder_name} embeds {rows:,}; are the files of "
                "the tokenizer all there, and of this model?"
            )
        most, length = getattr(encoder.config, "max_position_embeddings", None), tokenizer.model_max_length
        if not isinstance(length, int) or not 2 < length <= (most or MAX_TOKENS):
            faults.append(
                f"{tokenizer_name}: model_max_length is {length}; expected a whole number of 3 to "
                f"{most or MAX_TOKENS:,}, the positions of {encoder_name}"
            )
    return faults


_families: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make a family known, in place of one of the same name. Of several that fit, the last registered is used."""
    _families.pop(family.name, None)
    _families[family.name] = family


def families() -> tuple[Family, ...]:
    """All registered families, the last registered first."""
    return tuple(reversed(_families.values()))


def family_of_pipeline(pipeline: DiffusionPipeline) -> Family:
    """Raises UserError for a pipeline of no registered family."""
    for family in families():
        if isinstance(pipeline, family.pipeline_class):
            return family
    known = ", ".join(sorted(family.pipeline_class.__name__ for family in families()))
    raise UserError(f"{type(pipeline).__name__} is of no known model family; supported: {known}")


def unwrapped(module: Any) -> Any:
    """The module inside torch.compile's wrapper."""
    return getattr(module, "_orig_mod", module)


def family_of_denoiser(denoiser: nn.Module) -> Family:
    """Raises UserError for a module that is the denoiser of no registered family."""
    inner = unwrapped(denoiser)
    for family in families():
        if family.owns(inner):
            return family
    known = ", ".join(sorted({family.denoiser_class.__name__ for family in families()}))
    raise UserError(f"{type(inner).__name__} is the denoiser of no known model family; supported: {known}")


def denoiser_of(pipeline: DiffusionPipeline) -> ModelMixin | None:
    """The denoiser of any pipeline that has one of a known family, such as an image-to-image pipeline; else None."""
    for family in families():
        denoiser = getattr(pipeline, family.denoiser_name, None)
        if denoiser is not None and family.owns(unwrapped(denoiser)):
            return denoiser
    return None

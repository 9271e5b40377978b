"""Options of every method. They import no torch, so that `--help` and a fault of a configuration come at once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from distill.settings import Count, Number, Positive, Settings, Text, Texts, Timestep, Weight

Group = Literal["words", "eos", "padding"]
"""A group of tokens."""
LockedTokens = Literal["all", "words", "tail"]
"""Tokens whose keys are locked."""


class Options(Settings):
    """Options of a method."""

    kind: str

    @property
    def references(self) -> tuple[str, ...]:
        """Other models that the method loads: names of arms, `base`, run folders, pipeline folders, hub ids."""
        return ()

    @property
    def starts_from(self) -> str | None:
        """The model whose weights the student starts from; None for the base."""
        return None

    @property
    def needs_tokens(self) -> bool:
        """Whether training rows must have token ids, so that text embeddings cannot be cached."""
        return False

    @property
    def needs_validation(self) -> bool:
        """Whether set-up looks at validation images with regions."""
        return False

    @property
    def reads_labels(self) -> bool:
        """Whether training rows must say which words name a label of the image."""
        return False

    @property
    def reads_regions(self) -> bool:
        """Whether training rows must say where the labels are."""
        return False

    @property
    def region_images(self) -> int | None:
        """Use the regions of the first this many training images; None uses all."""
        return None


class DenoisingOptions(Options):
    """The diffusion loss alone."""

    kind: Literal["denoising"] = "denoising"
    """What is minimized."""


class AttentionMatch(Options):
    """How the student's cross-attention is compared with a teacher's."""

    token_kl_weight: Weight = 0.1
    """Weight of the KL over tokens at each place."""
    place_kl_weight: Weight = 0.1
    """Weight of the KL over places for each word."""
    mass_weight: Weight = 0.1
    """Weight of the squared difference of the attention mass of BOS, words, EOS and padding."""
    tail_weight: Weight = 0.0
    """Weight of the attention mass of EOS and padding beyond the teacher's."""
    place_groups: Annotated[tuple[Group, ...], Field(min_length=1)] = ("words",)
    """Tokens whose maps the KL over places compares. With a gate: those of them that pass it; the default, words,
    then stands for all that pass."""
    words: Literal["all", "labels"] = "all"
    """labels compares only the words that name a label of the image; all other tokens count as one."""
    layers: Texts = ()
    """Prefixes of the cross-attention layers to compare. Empty compares all."""
    min_timestep: Timestep = 0
    """Compare student and teacher only at timesteps of at least this."""
    max_timestep: Timestep = 999
    """Compare student and teacher only at timesteps of at most this."""

    @model_validator(mode="after")
    def _check_match(self) -> AttentionMatch:
        if self.min_timestep > self.max_timestep:
            raise ValueError(f"min_timestep is {self.min_timestep}, above max_timestep, {self.max_timestep}")
        if len(set(self.place_groups)) < len(self.place_groups):
            raise ValueError("place_groups: each group only once")
        return self

    @property
    def reads_labels(self) -> bool:
        return self.words == "labels"


class AttentionDistillationOptions(AttentionMatch):
    """The diffusion loss, and a match of the student's attention to a teacher's."""

    kind: Literal["attention_distillation"] = "attention_distillation"
    """What is minimized."""
    teacher: Text | None = None
    """The teacher: another arm, `base`, a run folder, a pipeline folder, or a hub id."""
    start_from_teacher: bool = False
    """Start from the teacher's weights instead of the base's."""
    batch_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of each batch that is distilled, at least one image. A smaller share costs less time."""
    output_weight: Weight = 0.0
    """Weight of the squared difference of the denoisers' outputs (BK-SDM)."""
    feature_weight: Weight = 0.0
    """Weight of the squared difference of the outputs of their blocks (BK-SDM)."""
    self_attention_weight: Weight = 0.0
    """Weight of the squared difference of the outputs of their self-attention layers (KOALA)."""
    begin_after_steps: Number = 0
    """Train by the diffusion loss alone for this many steps, without a teacher's pass. Then the distillation begins."""
    gate_reference: Text | None = None
    """Teach only timesteps, layers and token groups in which the teacher localizes at least as well as this model does,
    by what the image adds to its map, on validation images: another arm, `base`, or a run folder. None teaches all."""
    gate_images: Count = 100
    """Validation images that the gate looks at."""

    @property
    def references(self) -> tuple[str, ...]:
        return tuple(name for name in (self.teacher, self.gate_reference) if name is not None)

    @property
    def starts_from(self) -> str | None:
        return self.teacher if self.start_from_teacher else None

    @property
    def needs_tokens(self) -> bool:
        return True

    @property
    def needs_validation(self) -> bool:
        return self.gate_reference is not None

    @model_validator(mode="after")
    def _check(self) -> AttentionDistillationOptions:
        if self.gate_reference is None and self.gate_images != 100:
            raise ValueError("gate_images is set, and gate_reference is not; set it, or leave gate_images out")
        return self


class KeyLockOptions(Options):
    """The diffusion loss, with the keys of cross-attention locked to the text encoder as it was."""

    kind: Literal["key_lock"] = "key_lock"
    """What is minimized."""
    locked_layers: Texts = ()
    """Prefixes of the cross-attention layers whose keys are locked. Empty locks all."""
    locked_tokens: LockedTokens = "words"
    """Tokens whose keys are locked: words (BOS included), tail (EOS and padding), or all."""
    train_keys: bool = True
    """Train the projections of the locked layers that make keys (to_k) too. With false, the keys of locked tokens stay
    those of the base until the merge."""
    readable_weight: Weight = 0.0
    """Weight of a loss that keeps the locked keys readable from the trained text encoder by a linear map, as the merge
    needs: 1 - R^2 of the best map so far."""
    release_after_steps: Count | None = None
    """Let the keys pass over to the trained encoder after this many steps. None keeps them locked."""
    release_over_steps: Count = 100
    """Steps in which they pass over."""

    @model_validator(mode="after")
    def _check(self) -> KeyLockOptions:
        if self.release_after_steps is None and self.release_over_steps != 100:
            raise ValueError(
                "release_over_steps is set, and release_after_steps is not; set it, or leave the other out"
            )
        return self


class SupervisedAttentionOptions(Options):
    """Attention of the words that name a label, taught by labels (ARM) or regions (TokenCompose)."""

    kind: Literal["supervised_attention"] = "supervised_attention"
    """What is minimized."""
    arm_weight: Weight = 0.0
    """ARM: rewards attention on the words that name a label. The paper uses 0.12."""
    region_token_weight: Weight = 0.0
    """TokenCompose's token loss: attention of a label's words belongs in its boxes or mask. 0.01 works on phantoms."""
    region_pixel_weight: Weight = 0.0
    """TokenCompose's pixel loss: cross-entropy of that attention and the region. The paper uses 5e-5."""
    images: Count | None = None
    """Use the regions of the first this many training images. None uses all."""

    @model_validator(mode="after")
    def _check(self) -> SupervisedAttentionOptions:
        if max(self.arm_weight, self.region_token_weight, self.region_pixel_weight) == 0:
            raise ValueError("all weights are 0; set arm_weight, region_token_weight or region_pixel_weight")
        if self.images is not None and not self.reads_regions:
            raise ValueError("images limits the regions, and no region weight is set")
        return self

    @property
    def reads_labels(self) -> bool:
        return self.arm_weight > 0

    @property
    def reads_regions(self) -> bool:
        return max(self.region_token_weight, self.region_pixel_weight) > 0

    @property
    def region_images(self) -> int | None:
        return self.images


class TailPenaltyOptions(Options):
    """A penalty on the attention mass of EOS and padding beyond that of the model before the training."""

    kind: Literal["tail_penalty"] = "tail_penalty"
    """What is minimized."""
    weight: Positive = 0.1
    """Weight of the penalty."""


class ConsistencyOptions(AttentionMatch):
    """Latent consistency distillation (Luo et al. 2023), and a match of attention."""

    kind: Literal["consistency"] = "consistency"
    """What is minimized."""
    teacher: Text = "whole"
    """`whole` (base and run), a run folder, or a pipeline. In distill_steps.py the student starts from it too."""
    solver_steps: Annotated[int, Field(ge=50, le=1000)] = 50
    """Timesteps of the teacher's DDIM path that the student is trained at: a multiple of 50, as LCMScheduler needs."""
    guidance_scale: Annotated[float, Field(ge=1, le=1000)] = 4.0
    """Classifier-free guidance of the teacher, which the student learns to do without."""
    huber_c: Positive = 0.001
    """Differences of latents below about this count by their square, larger ones by their size."""

    @field_validator("solver_steps")
    @classmethod
    def _multiple(cls, value: int) -> int:
        if value % 50:
            raise ValueError("a multiple of 50")
        return value

    @property
    def references(self) -> tuple[str, ...]:
        return (self.teacher,)

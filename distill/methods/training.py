"""How one model is trained: which parts, by which method, and on which text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import model_validator

from distill.config import DenoisingConfig, LoraConfig
from distill.methods import AnyOptions
from distill.methods.options import DenoisingOptions
from distill.settings import MAY_GROW, Count, Rate, Settings, Text

Trained = Literal["frozen", "lora", "full"]


class Training(Settings):
    """How one model is trained."""

    denoiser: Trained = "full"
    """How the denoiser, such as the U-Net, is trained."""
    text_encoder: Trained = "frozen"
    """How the text encoders are trained."""
    text_encoder_steps: Count | None = None
    """Train the text encoders for this many steps; then they stay as they are. None trains them to the end."""
    method: AnyOptions = DenoisingOptions()
    """denoising: the diffusion loss. The others add a teacher's maps, locked keys, labels, masks, or a penalty."""
    lora: LoraConfig = LoraConfig()
    """Low-rank adapters, where a part is trained by LoRA."""
    denoising: DenoisingConfig = DenoisingConfig()
    """The diffusion loss, and the text that it is conditioned on."""

    @model_validator(mode="after")
    def _check_training(self) -> Training:
        if "lora" not in (self.denoiser, self.text_encoder) and self.lora != LoraConfig():
            raise ValueError(
                "lora options are set, and nothing is trained by LoRA; set denoiser or text_encoder to lora"
            )
        for part, how in (("denoiser", self.denoiser), ("text_encoder", self.text_encoder)):
            if getattr(self.lora, f"{part}_targets") and how != "lora":
                raise ValueError(
                    f"lora.{part}_targets is set, and {part} is {how}; set it to lora, or leave the targets out"
                )
        if self.text_encoder_steps is not None and "frozen" in (self.denoiser, self.text_encoder):
            part = "text_encoder" if self.text_encoder == "frozen" else "denoiser"
            raise ValueError(f"text_encoder_steps is set, and {part} is frozen; train both parts, or leave it out")
        if self.denoiser == self.text_encoder == "frozen":
            raise ValueError("nothing is trained: denoiser and text_encoder are both frozen")
        return self


class ArmConfig(Training):
    """One way to train the base, beside others."""

    like: Text | None = None
    """Another arm, whose options this one has unless it sets its own."""
    learning_rate: Rate | None = None
    """In place of trainer.learning_rate."""
    text_encoder_learning_rate: Rate | None = None
    """In place of trainer.text_encoder_learning_rate."""
    max_steps: Annotated[Count | None, MAY_GROW] = None
    """In place of trainer.max_steps."""

    @model_validator(mode="after")
    def _check_training(self) -> ArmConfig:
        # The options of an arm that is like another are checked together with that arm's, where arms are resolved.
        return self if self.like is not None else super()._check_training()  # type: ignore[operator]

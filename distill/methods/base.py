"""What every method has: a student, the noised batch, the diffusion loss; and what it is handed at set-up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.profiler import record_function

from distill import draws
from distill.config import DenoisingConfig
from distill.data.batch import Batch, Pixels, Tensors, TextEmbeddings, Tokens
from distill.devices import sent
from distill.errors import UserError
from distill.files import JsonObject
from distill.losses import denoising_loss, min_snr_weights
from distill.methods.options import Options

if TYPE_CHECKING:
    from distill.methods.training import Training
    from distill.models import Model

Terms = dict[str, torch.Tensor]
"""`loss`, which is minimized, and every other term by name, for the log."""

ParameterGroups = list[dict[str, Any]]
"""Trainable parameters as `params`, with their learning rate as `lr`."""


class LayerScores(Protocol):
    """What images add to a model's maps (see `distill.evaluation.image_adds`), on validation images, for each token
    group, layer and timestep."""

    def __call__(
        self, model: Model, images: int, timesteps: Sequence[int], label: str
    ) -> tuple[NDArray[np.float64], Sequence[str]]: ...


@dataclass(frozen=True)
class Context:
    """What a method is handed at set-up.

    generator: for draws before the first step. load: a model by a name of Options.references, on the CPU. batches:
    about this many training images, in batches on the device. captions: this many training texts, spread over the data
    set. layer_scores: see LayerScores; None in a dry run. say: a message for the user.
    """

    generator: torch.Generator
    device: torch.device
    is_main: bool
    log_dir: Path
    frozen_dtype: torch.dtype
    dry_run: bool
    load: Callable[[str], Model]
    batches: Callable[[int], Iterator[Batch]]
    captions: Callable[[int], list[str]]
    layer_scores: LayerScores | None
    say: Callable[[str], None]


@dataclass(frozen=True)
class Noised(Tensors):
    """One noised batch, the same for student and teacher.

    noisy_latents, target: (batch, channels, height, width). timesteps: (batch,). text, groups, size_ids, label_tokens
    and regions as in Batch, those of a dropped caption emptied. dropped: (batch,) bool, whose caption was dropped.
    """

    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    text: Tokens | TextEmbeddings
    groups: torch.Tensor
    size_ids: torch.Tensor | None = None
    label_tokens: torch.Tensor | None = None
    regions: torch.Tensor | None = None
    dropped: torch.Tensor | None = None

    def on(self, embeds: torch.Tensor, pooled: torch.Tensor | None) -> Noised:
        """The same images on other text embeddings."""
        return replace(self, text=TextEmbeddings(embeds, pooled))


class Method(nn.Module):
    """One way to train a student. `forward(batch, generator)` gives the terms of the loss.

    The student's denoiser and text encoders are part of the module; which of their parameters train was decided before
    (models.prepare_training). Everything that a method owns besides them (teacher, recorders) stays outside the
    module's parameters; what a checkpoint must hold of it is given by `state`.
    """

    def __init__(self, options: Options, denoising: DenoisingConfig) -> None:
        super().__init__()
        self.options: Options = options
        self.denoising = denoising

    def faults(self, student: Model, training: Training) -> list[str]:
        """Why this method cannot train this student; empty where it can. Nothing has been trained yet."""
        return []

    def setup(self, student: Model, context: Context) -> None:
        """Take the student, and prepare all that is needed before the first step."""
        self._student = (student,)
        self.denoiser = student.denoiser
        self.text_encoders = nn.ModuleList(student.text_encoders)
        self.trains_text = any(p.requires_grad for p in self.text_encoders.parameters())
        device = context.device
        self._empty_ids = [ids.to(device) for ids in student.tokenize([""])]
        self._empty_groups = student.token_groups("").to(device)
        self._empty_embeds: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def forward(self, batch: Batch, generator: torch.Generator) -> Terms:
        raise NotImplementedError

    def passes(self, step: int, images: int) -> int:
        """Image-passes through denoisers, forward 1 and backward 2, of `images` images in optimizer step `step`, the
        first being 1. A method that runs more than the student's own training pass says so."""
        return 3 * images

    def setup_passes(self, batch_size: int, processes: int) -> int:
        """The most image-passes that `setup` runs, on all processes together."""
        return 0

    def finish(self) -> JsonObject:
        """After the last step: give the student back as stock modules, close recorders; returns what is worth
        logging."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold besides the trained parameters."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""

    @property
    def student(self) -> Model:
        return self._student[0]

    def train(self, mode: bool = True) -> Method:
        """A text encoder without a trainable parameter stays in eval mode."""
        super().train(mode)
        if hasattr(self, "text_encoders"):
            self.text_encoders.train(mode and self.trains_text)
        return self

    def denoisers(self) -> list[nn.Module]:
        """The denoisers that run in each step."""
        return [self.denoiser]

    def leaves_parameters_unused(self) -> bool:
        """Whether some of the trained parameters have no part in the loss. As one pass of the text encoders tells: SDXL
        reads the last layer of its first encoder nowhere."""
        trained = [p for p in self.text_encoders.parameters() if p.requires_grad]
        if not trained:
            return False
        states = self.student.encode(self._empty_ids, list(self.text_encoders))
        read = torch.stack([part.float().sum() for part in states if part is not None]).sum()
        return any(gradient is None for gradient in torch.autograd.grad(read, trained, allow_unused=True))

    def parameter_groups(
        self, learning_rate: float, text_encoder_learning_rate: float, text_encoder_steps: int | None = None
    ) -> ParameterGroups:
        """The trainable parameters, with their learning rates, and "until": the step after which they stay as they
        are."""
        parts = (
            (self.denoiser, learning_rate, None),
            (self.text_encoders, text_encoder_learning_rate, text_encoder_steps),
        )
        groups = [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": rate, "until": until}
            for module, rate, until in parts
        ]
        return [group for group in groups if group["params"]]

    def noised(self, batch: Batch, generator: torch.Generator) -> Noised:
        """Flips, latents of the posterior, noise, timesteps and caption dropout, all drawn from the CPU `generator`."""
        student = self.student
        flip = self._flips(batch, generator)
        mean, std = self._posterior(batch, flip)
        device, count = mean.device, len(mean)
        vae_noise = sent(draws.normal(mean.shape, generator), device)
        noise = sent(draws.normal(mean.shape, generator), device)
        timesteps = sent(draws.rows(lambda n: self.draw_timesteps(n, generator), count, generator), device)
        dropped = draws.uniform(count, generator) < self.denoising.caption_dropout
        drop = sent(dropped, device) & batch.droppable
        latents = (mean + std * vae_noise) * student.vae.config.scaling_factor
        target = student.family.target(student, latents, noise, timesteps)
        regions = batch.regions
        if regions is not None:
            regions = torch.where(flip, regions.flip(-1), regions) * ~drop[:, None, None, None]
        return Noised(
            student.family.add_noise(student, latents, noise, timesteps),
            timesteps,
            target,
            self._dropped_text(batch.text, drop),
            torch.where(drop[:, None], self._empty_groups, batch.groups),
            batch.size_ids,
            None if batch.label_tokens is None else batch.label_tokens & ~drop[:, None],
            regions,
            drop,
        )

    def _flips(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        """(batch, 1, 1, 1) bool: which images are mirrored in this step."""
        flip = torch.zeros_like(batch.droppable)
        if batch.flippable is not None:
            coin = draws.uniform(len(flip), generator) < 0.5
            flip = sent(coin, flip.device) & batch.flippable
        return flip[:, None, None, None]

    def _posterior(self, batch: Batch, flip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the VAE's posterior, of the image or of its mirror image."""
        image = batch.image
        if isinstance(image, Pixels):
            pixels = torch.where(flip, image.pixel_values.flip(-1), image.pixel_values)
            # Not in half precision: the cached latents are not, and stock VAEs overflow in it.
            with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
                vae = self.student.vae
                posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
            return posterior.mean.float(), posterior.std.float()
        mean, std = image.mean, image.std
        if image.mean_flipped is not None and image.std_flipped is not None:
            mean = torch.where(flip, image.mean_flipped, mean)
            std = torch.where(flip, image.std_flipped, std)
        return mean.float(), std.float()

    def draw_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count,) int64."""
        return self.student.family.draw_timesteps(self.student, count, generator)

    def _dropped_text(self, text: Tokens | TextEmbeddings, drop: torch.Tensor) -> Tokens | TextEmbeddings:
        if isinstance(text, Tokens):
            pairs = zip(self._empty_ids, text.input_ids, strict=True)
            return Tokens(tuple(torch.where(drop[:, None], empty, ids) for empty, ids in pairs))
        return TextEmbeddings(*self.with_empty(text.embeds.float(), text.pooled, drop))

    def with_empty(
        self, embeds: torch.Tensor, pooled: torch.Tensor | None, drop: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The embeddings, where `drop` is true those that the stock pipeline guides away from."""
        from distill.models import Conditions

        if self._empty_embeds is None:
            with torch.no_grad():
                empty = Conditions(*self.student.encode(self._empty_ids, list(self.text_encoders)))
                empty = self.student.family.negative_conditions(self.student, empty)
                self._empty_embeds = empty.embeds, empty.pooled
        empty_embeds, empty_pooled = self._empty_embeds
        embeds = torch.where(drop[:, None, None], empty_embeds.float(), embeds)
        if pooled is not None and empty_pooled is not None:
            pooled = torch.where(drop[:, None], empty_pooled.float(), pooled.float())
        return embeds, pooled

    def embeddings(self, model: Model, text_encoders: Sequence[nn.Module], x: Noised) -> TextEmbeddings:
        """What the denoiser of `model` reads of the text."""
        if isinstance(x.text, TextEmbeddings):
            return x.text
        from distill.models import Conditions

        with record_function("text"):
            encoded = Conditions(*model.encode(x.text.input_ids, text_encoders))
        # SDXL's pipeline guides away from zeros, and not from the empty caption, whose tokens a dropped caption has
        # here.
        negative = model.family.negative_conditions(model, encoded)
        if x.dropped is None or negative is encoded:
            return TextEmbeddings(encoded.embeds, encoded.pooled)
        embeds = torch.where(x.dropped[:, None, None], negative.embeds, encoded.embeds)
        if encoded.pooled is None or negative.pooled is None:
            return TextEmbeddings(embeds, encoded.pooled)
        return TextEmbeddings(embeds, torch.where(x.dropped[:, None], negative.pooled, encoded.pooled))

    def predict(self, model: Model, text_encoders: Sequence[nn.Module], x: Noised) -> torch.Tensor:
        """The denoiser's output, (batch, channels, height, width)."""
        from distill.models import Conditions

        text = self.embeddings(model, text_encoders, x)
        conditions = Conditions(text.embeds, text.pooled, x.size_ids)
        return model.family.predict(model.denoiser, x.noisy_latents, x.timesteps, conditions)

    def predict_student(self, x: Noised) -> torch.Tensor:
        """The student's output."""
        return self.predict(self.student, list(self.text_encoders), x)

    def denoising_loss(self, prediction: torch.Tensor, x: Noised) -> torch.Tensor:
        """L = mean w(t) (target - prediction)^2. Source: Ho et al. 2020, equation 14; w: Hang et al. 2023."""
        weights = None
        if self.denoising.min_snr_gamma is not None:
            alphas = getattr(self.student.noise_scheduler, "alphas_cumprod", None)
            if alphas is None:
                raise UserError("denoising.min_snr_gamma needs a base with a diffusion schedule; leave it out")
            gamma, kind = self.denoising.min_snr_gamma, self.student.prediction_type
            weights = min_snr_weights(alphas, x.timesteps, gamma, kind)
        return denoising_loss(prediction, x.target, weights)

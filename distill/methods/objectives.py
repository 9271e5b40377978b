"""Objectives: nn.Modules that map (batch, generator) to {"loss": ..., every other term by name}."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from distill.attention.recording import AttentionMaps, attention_layers
from distill.config import AttentionDistillationConfig, ConsistencyConfig, DenoisingConfig
from distill.errors import UserError
from distill.losses import (
    attention_mass_loss,
    attention_regularization,
    denoising_loss,
    feature_loss,
    min_snr_weights,
    place_attention_kl,
    region_mask_loss,
    region_pixel_loss,
    region_token_loss,
    tail_leak,
    tail_mass,
    token_attention_kl,
)
from distill.models.family import Conditions, Model, family_of_denoiser
from distill.tokens import EOS, PADDING, WORD, token_groups

Terms = dict[str, torch.Tensor]
Maps = dict[str, torch.Tensor]
"""Cross-attention layer -> (batch, places, tokens)."""

EMA = "ema"
"""distillation.teacher: an average of the student's own weights."""
SIGMA_DATA, TIMESTEP_SCALING = 0.5, 10.0
"""Of the boundary condition of a consistency model, as in diffusers' LCMScheduler."""
TAIL_BINS = 10
"""Noise levels at which SupervisedAttentionObjective measures the untrained model's tail."""
CODES = {"words": WORD, "eos": EOS, "padding": PADDING}


@dataclass(frozen=True)
class Noised:
    """One noised batch, the same for student and teacher. groups: (batch, tokens) codes of the token groups. label_tokens:
    (batch, tokens) bool, words that name a label of the image, none of a dropped caption. regions: (batch, tokens, height,
    width) uint8 0 or 1, where that label is, all 0 where that is not known."""

    noisy_latents: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    input_ids: list[torch.Tensor]
    prompt_embeds: tuple[torch.Tensor, torch.Tensor | None] | None
    groups: torch.Tensor
    size_ids: torch.Tensor | None
    label_tokens: torch.Tensor | None = None
    regions: torch.Tensor | None = None


class DenoisingObjective(nn.Module):
    """The diffusion loss: L = mean w(t) (target - prediction)^2, target epsilon or v. Source: Ho et al. 2020, eq. 14.

    The U-Net and the text encoders are part of the module; which of them train was decided before
    (model.prepare_training). The VAE is not: it is frozen and never in a checkpoint. `batch` is of
    data.training.TrainingRows: latents (or pixels), input_ids (or text embeddings), groups, droppable, SDXL's size_ids.
    """

    def __init__(self, model: Model, config: DenoisingConfig) -> None:
        super().__init__()
        self.denoiser = model.denoiser
        self.text_encoders = nn.ModuleList(model.text_encoders)
        self.trains_text = any(p.requires_grad for p in self.text_encoders.parameters())
        self.config, self.family = config, model.family
        self.noise_scheduler, self.prediction_type = model.noise_scheduler, model.prediction_type
        model.family.check(model)
        self._model = (model,)  # in a tuple, since its VAE is no part of this module
        self._vae = (model.vae,)
        self._empty_ids = model.tokenize([""])
        self._empty_groups = token_groups(model.tokenizers[0], "", model.max_tokens)
        self._empty_embeds: tuple[torch.Tensor, torch.Tensor | None] | None = None

    def train(self, mode: bool = True) -> DenoisingObjective:
        """A text encoder without a trainable parameter stays in eval mode."""
        super().train(mode)
        self.text_encoders.train(mode and self.trains_text)
        return self

    def noised(self, batch: dict[str, Any], generator: torch.Generator) -> Noised:
        """Flips, latents of the posterior, noise, timesteps and caption dropout, all drawn from the CPU `generator`."""
        flip = torch.zeros_like(batch["droppable"])
        if "flippable" in batch:
            coin = torch.rand(len(flip), generator=generator) < 0.5
            flip = coin.to(flip.device) & batch["flippable"]
        flip = flip[:, None, None, None]
        if "latents_mean" in batch:
            mean = torch.where(flip, batch.get("latents_mean_flipped", batch["latents_mean"]), batch["latents_mean"])
            std = torch.where(flip, batch.get("latents_std_flipped", batch["latents_std"]), batch["latents_std"])
        else:
            pixels = torch.where(flip, batch["pixel_values"].flip(-1), batch["pixel_values"])
            # Not in half precision: the cached latents are not, and stock VAEs overflow in it.
            with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
                vae = self._vae[0]
                posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
            mean, std = posterior.mean, posterior.std
        mean, std = mean.float(), std.float()
        device, count = mean.device, len(mean)
        vae_noise = torch.randn(mean.shape, generator=generator).to(device)
        noise = torch.randn(mean.shape, generator=generator).to(device)
        timesteps = self.draw_timesteps(count, generator).to(device)
        drop = (torch.rand(count, generator=generator) < self.config.caption_dropout).to(device) & batch["droppable"]
        latents = (mean + std * vae_noise) * self._vae[0].config.scaling_factor
        target = self.family.target(self._model[0], latents, noise, timesteps)
        input_ids = [
            torch.where(drop[:, None], empty.to(device), batch[f"input_ids_{i}"])
            for i, empty in enumerate(self._empty_ids)
            if f"input_ids_{i}" in batch
        ]
        embeds = None
        if "prompt_embeds" in batch:
            embeds = self._with_empty(batch["prompt_embeds"].float(), batch.get("pooled"), drop)
        return Noised(
            self.family.add_noise(self._model[0], latents, noise, timesteps),
            timesteps,
            target,
            input_ids,
            embeds,
            torch.where(drop[:, None], self._empty_groups.to(device), batch["groups"]),
            batch.get("size_ids"),
            batch["label_tokens"] & ~drop[:, None] if "label_tokens" in batch else None,
            batch["regions"] * ~drop[:, None, None, None] if "regions" in batch else None,
        )

    def draw_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count,) int64."""
        return self.family.draw_timesteps(self._model[0], count, generator)

    def _with_empty(
        self, embeds: torch.Tensor, pooled: torch.Tensor | None, drop: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self._empty_embeds is None:
            with torch.no_grad():
                empty_ids = [ids.to(embeds.device) for ids in self._empty_ids]
                self._empty_embeds = self.family.encode_text(list(self.text_encoders), empty_ids)
        empty, empty_pooled = self._empty_embeds
        embeds = torch.where(drop[:, None, None], empty.float(), embeds)
        if pooled is not None and empty_pooled is not None:
            pooled = torch.where(drop[:, None], empty_pooled.float(), pooled.float())
        return embeds, pooled

    def predict(self, denoiser: Any, text_encoders: list[nn.Module], x: Noised) -> torch.Tensor:
        """The denoiser's output, (batch, channels, height, width)."""
        embeds, pooled = x.prompt_embeds or self.family.encode_text(text_encoders, x.input_ids)
        conditions = Conditions(embeds, pooled, x.size_ids)
        return self.family.predict(denoiser, x.noisy_latents, x.timesteps, conditions)

    def loss_of(self, prediction: torch.Tensor, x: Noised) -> torch.Tensor:
        weights = None
        if self.config.min_snr_gamma is not None:
            weights = min_snr_weights(
                self.noise_scheduler.alphas_cumprod, x.timesteps, self.config.min_snr_gamma, self.prediction_type
            )
        return denoising_loss(prediction, x.target, weights)

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Terms:
        x = self.noised(batch, generator)
        loss = self.loss_of(self.predict(self.denoiser, list(self.text_encoders), x), x)
        return {"loss": loss, "denoising": loss}


class SupervisedAttentionObjective(DenoisingObjective):
    """What labels, regions and token groups tell about attention, without a teacher: the baselines of distillation.

    L = L_denoising + arm_weight * ARM on the words that name a label (losses.attention_regularization, the paper's remedy)
      + tail_weight * mean over layers of the mass of EOS and padding beyond the untrained model's (losses.tail_leak)
      + mean over layers, on the words whose label has boxes or a mask, of
        region_token_weight * region_token_loss + region_pixel_weight * region_pixel_loss              (TokenCompose)
      + region_mask_weight * region_mask_loss                                                          (Break-A-Scene).
    student_maps: a recorder of the U-Net that stays open for as long as the objective is used. With tail_weight,
    `measure_tail` goes before the first step.
    """

    def __init__(self, model: Model, config: DenoisingConfig, student_maps: AttentionMaps) -> None:
        super().__init__(model, config)
        self._student_maps = student_maps
        self._tail: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def measure_tail(self, batches: Iterable[dict[str, Any]], generator: torch.Generator) -> None:
        """Allow what the model has now: for each layer the mean mass of EOS and padding, by noise level (TAIL_BINS equal
        parts of the timesteps), and apart for captions without a word; a bin without an image is not limited."""
        sums: dict[str, torch.Tensor] = {}
        count = torch.zeros(2 * TAIL_BINS)
        for batch in batches:
            x = self.noised(batch, generator)
            self._student_maps.start()
            self.predict(self.denoiser, list(self.text_encoders), x)
            bins = self._bins(x).cpu()
            count += torch.bincount(bins, minlength=len(count))
            for name, maps in self._student_maps.take().items():
                mass = tail_mass(maps, x.groups).float().cpu()
                sums[name] = sums.get(name, torch.zeros(len(count))).index_add(0, bins, mass)
        self._tail = {n: torch.where(count > 0, total / count.clamp(min=1), 1.0) for n, total in sums.items()}

    def _bins(self, x: Noised) -> torch.Tensor:
        """(batch,): which entry of the measured tail an image is of."""
        level = x.timesteps * TAIL_BINS // self.family.num_timesteps(self._model[0])
        return level + TAIL_BINS * (x.groups != WORD).all(dim=1)

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Terms:
        x = self.noised(batch, generator)
        c = self.config
        self._student_maps.start()
        denoising = self.loss_of(self.predict(self.denoiser, list(self.text_encoders), x), x)
        maps, sizes = self._student_maps.take(), self._student_maps.sizes
        terms = {"loss": denoising, "denoising": denoising}
        if c.arm_weight:
            assert x.label_tokens is not None
            terms["arm"] = attention_regularization(maps, x.label_tokens)
            terms["loss"] = terms["loss"] + c.arm_weight * terms["arm"]
        if c.tail_weight:
            bins = self._bins(x)
            allowed = {n: self._tail[n].to(bins.device)[bins] for n in maps}
            terms["tail"] = torch.stack([tail_leak(allowed[n], maps[n], x.groups) for n in maps]).mean()
            terms["loss"] = terms["loss"] + c.tail_weight * terms["tail"]
        for name, weight, loss in (
            ("region_token", c.region_token_weight, region_token_loss),
            ("region_pixel", c.region_pixel_weight, region_pixel_loss),
            ("region_mask", c.region_mask_weight, region_mask_loss),
        ):
            if weight:
                assert x.regions is not None
                parts = [loss(maps[n], resize_regions(x.regions, sizes[n])) for n in maps]
                terms[name] = torch.stack(parts).mean()
                terms["loss"] = terms["loss"] + weight * terms[name]
        return terms


def resize_regions(regions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(batch, tokens, height, width) -> (batch, places, tokens) of 0 and 1: a place that a region touches is in it."""
    return (F.adaptive_max_pool2d(regions.float(), size) > 0).flatten(2).transpose(1, 2).float()


class AttentionDistillationObjective(DenoisingObjective):
    """Denoising plus a match of the student's cross-attention to a teacher's, on the same noisy latents and timesteps.

    L = L_denoising + mean over layers of
        token_kl_weight * KL over tokens at each place                                   (which token a place looks at)
      + place_kl_weight * KL over places for each token of place_groups                  (where a word looks)
      + mass_weight * squared difference of the mass of the BOS, word, EOS and padding groups
      + tail_weight * mass of EOS and padding beyond the teacher's
      + output_weight, feature_weight, self_attention_weight * difference of outputs, of the U-Net, its blocks (BK-SDM) and
        its self-attention (KOALA).
    Only at timesteps within [min_timestep, max_timestep], and on the first `batch_share` of the batch. The finding that a
    trained encoder moves localization from the words to EOS and padding: Dombrowski et al., AAAI 2024 (arXiv 2303.17908).

    A student of fewer blocks is compared with those of the teacher's that it was made of (compress.name_in_teacher).
    teacher: its U-Net may be the student's own, then with a text encoder of its own (distillation.teacher
    frozen_text_encoder). student_maps, teacher_maps: recorders of both U-Nets (attention.record_attention), one and the
    same if the U-Net is; they stay open for as long as the objective is used.
    Raises UserError if teacher and student differ in cross-attention layers, heads or tokens.
    """

    def __init__(
        self,
        model: Model,
        config: DenoisingConfig,
        distillation: AttentionDistillationConfig,
        teacher: Model,
        student_maps: AttentionMaps,
        teacher_maps: AttentionMaps,
    ) -> None:
        super().__init__(model, config)
        check_same_shape(teacher, model)
        if distillation.output_weight and teacher.prediction_type != model.prediction_type:
            raise UserError(
                f"distillation.output_weight: the teacher predicts {teacher.prediction_type}, the student "
                f"{model.prediction_type}; only their attention and features can be compared"
            )
        self.distillation = distillation
        self._teacher = (teacher if teacher.denoiser is model.denoiser else teacher.freeze(),)
        if distillation.teacher == EMA:  # a part of the module, so that it is in checkpoints
            self.average = nn.ModuleList([teacher.denoiser, *teacher.text_encoders])
        self._maps = (student_maps, teacher_maps)
        self._name_there = model.family.name_in_teacher(model.denoiser, teacher.denoiser)
        self._outputs = tuple(ModuleOutputs(denoiser, distillation) for denoiser in (model.denoiser, teacher.denoiser))

    def train(self, mode: bool = True) -> AttentionDistillationObjective:
        super().train(mode)
        if hasattr(self, "average"):
            self.average.eval()
        return self

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Terms:
        x, c = self.noised(batch, generator), self.distillation
        if c.teacher == EMA and torch.is_grad_enabled():
            self._follow()
        student_maps, teacher_maps = self._maps
        student_maps.start()
        with self._outputs[0] as outputs:
            prediction = self.predict(self.denoiser, list(self.text_encoders), self._partly_frozen(x))
        denoising = self.loss_of(prediction, x)
        count = max(1, round(c.batch_share * len(x.timesteps)))
        student = {name: maps[:count] for name, maps in student_maps.take().items()}

        part = first_rows(x, count)
        teacher_maps.start()
        with torch.no_grad(), self._outputs[1] as targets:
            target = self.predict(self._teacher[0].denoiser, self._teacher[0].text_encoders, part)
        taken = teacher_maps.take()
        teacher = {name: taken[self._name_there(name)] for name in student}

        terms = self._attention_terms(student, teacher, part)
        terms["denoising"], terms["loss"] = denoising, terms["loss"] + denoising
        rows = self._rows(part)
        if c.output_weight:
            gap = (prediction[:count].float() - target.float()).pow(2).flatten(1).mean(dim=1)
            terms["output"] = (gap * rows).sum() / rows.sum().clamp(min=1)
            terms["loss"] = terms["loss"] + c.output_weight * terms["output"]
        for name, weight in (("feature", c.feature_weight), ("self_attention", c.self_attention_weight)):
            if weight:
                mine = {key: value[:count] for key, value in outputs[name].items()}
                theirs = {key: targets[name][self._name_there(key)] for key in mine}
                # The innermost stage of a student of fewer stages makes no smaller map, as its teacher's does.
                same = {key: value for key, value in mine.items() if value.shape == theirs[key].shape}
                terms[name] = feature_loss(theirs, same, rows)
                terms["loss"] = terms["loss"] + weight * terms[name]
        return terms

    def _rows(self, x: Noised) -> torch.Tensor:
        """(batch,) bool: the images that are taught."""
        return (x.timesteps >= self.distillation.min_timestep) & (x.timesteps <= self.distillation.max_timestep)

    def _attention_terms(self, student: Maps, teacher: Maps, x: Noised) -> Terms:
        """(a) to (c) and the leak penalty, and as `loss` their weighted sum; maps by the student's names."""
        c, rows = self.distillation, self._rows(x)
        groups = {group: x.groups == CODES[group] for group in c.place_groups}
        named = None
        if c.words == "labels":
            assert x.label_tokens is not None
            named = x.label_tokens
            groups |= {"words": named} if "words" in groups else {}
        words = torch.stack(list(groups.values())).any(dim=0)
        losses: dict[str, tuple[float, Callable[[str], torch.Tensor]]] = {
            "token_kl": (c.token_kl_weight, lambda n: token_attention_kl(teacher[n], student[n], rows, named)),
            "place_kl": (c.place_kl_weight, lambda n: place_attention_kl(teacher[n], student[n], words, rows)),
            "mass": (c.mass_weight, lambda n: attention_mass_loss(teacher[n], student[n], x.groups, rows)),
        }
        if c.tail_weight:
            allowed = {name: tail_mass(maps, x.groups) for name, maps in teacher.items()}
            losses["tail"] = (c.tail_weight, lambda n: tail_leak(allowed[n], student[n], x.groups, rows))
        terms = {"loss": torch.zeros((), device=x.timesteps.device)}
        for name, (weight, of_layer) in losses.items():
            with torch.set_grad_enabled(weight > 0 and torch.is_grad_enabled()):
                terms[name] = torch.stack([of_layer(layer) for layer in student]).mean()
            terms["loss"] = terms["loss"] + weight * terms[name]
        return terms

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the averaged weights towards the student's."""
        for ours, mean in zip([self.denoiser, *self.text_encoders], self.average, strict=True):
            pairs = [(p, q) for p, q in zip(ours.parameters(), mean.parameters(), strict=True) if p.requires_grad]
            for parameter, average in pairs:
                average.lerp_(parameter.to(average.dtype), 1 - self.distillation.ema_decay)

    def _partly_frozen(self, x: Noised) -> Noised:
        """The last `frozen_share` of the batch with the teacher's text embeddings, which the U-Net so learns to read."""
        kept = len(x.timesteps) - round(self.distillation.frozen_share * len(x.timesteps))
        if kept == len(x.timesteps):
            return x
        embeds, pooled = self.family.encode_text(list(self.text_encoders), [ids[:kept] for ids in x.input_ids])
        with torch.no_grad():
            rest, rest_pooled = self.family.encode_text(
                self._teacher[0].text_encoders, [ids[kept:] for ids in x.input_ids]
            )
        if pooled is not None and rest_pooled is not None:
            pooled = torch.cat([pooled, rest_pooled.to(pooled.dtype)])
        return replace(x, prompt_embeds=(torch.cat([embeds, rest.to(embeds.dtype)]), pooled))


def first_rows(x: Noised, count: int) -> Noised:
    """The first `count` images of a noised batch."""
    embeds = x.prompt_embeds
    if embeds is not None:
        embeds = (embeds[0][:count], None if embeds[1] is None else embeds[1][:count])
    return Noised(
        x.noisy_latents[:count],
        x.timesteps[:count],
        x.target[:count],
        [ids[:count] for ids in x.input_ids],
        embeds,
        x.groups[:count],
        None if x.size_ids is None else x.size_ids[:count],
        None if x.label_tokens is None else x.label_tokens[:count],
    )


class ConsistencyObjective(AttentionDistillationObjective):
    """Few steps: the student's guess of the clean latents is the same along the teacher's guided path. And its attention.

    L = mean sqrt(|f(z_t) - f(z'_s)|^2 + c^2) - c + the terms (a) to (c) and tail of AttentionDistillationObjective,
    where f(z_t) = c_skip(t) z_t + c_out(t) x0(z_t), z'_s is one DDIM step of the teacher from t to s, the timestep before on
    a grid of solver_steps, under classifier-free guidance, and f(z'_s) has no gradient. The student so needs no guidance.
    Source: latent consistency models, Luo et al. 2023 (arXiv 2310.04378, equations 9 and 16), without an embedding of the
    guidance scale, as LCM-LoRA (arXiv 2311.05556); the target's weights are the student's own (Song and Dhariwal 2023).
    """

    def __init__(
        self,
        model: Model,
        config: DenoisingConfig,
        distillation: AttentionDistillationConfig,
        teacher: Model,
        student_maps: AttentionMaps,
        teacher_maps: AttentionMaps,
        consistency: ConsistencyConfig,
    ) -> None:
        super().__init__(model, config, distillation, teacher, student_maps, teacher_maps)
        self.consistency = consistency
        self._stride = int(self.noise_scheduler.config.num_train_timesteps) // consistency.solver_steps

    def draw_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(1, self.consistency.solver_steps + 1, (count,), generator=generator) * self._stride - 1

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Terms:
        x = self.noised(batch, generator)
        student_maps, teacher_maps = self._maps
        encoders = list(self.text_encoders)
        with torch.no_grad():  # the teacher's too, as it is not trained
            x = replace(x, prompt_embeds=x.prompt_embeds or self.family.encode_text(encoders, x.input_ids))
        student_maps.start()
        ours = self._clean(self.predict(self.denoiser, encoders, x), x)
        mine = student_maps.take()
        with torch.no_grad():
            teacher_maps.start()
            before, theirs = self._step_of_teacher(x, teacher_maps)
            trains = self.denoiser.training
            self.denoiser.eval()  # no dropout in the target
            target = self._clean(self.predict(self.denoiser, encoders, before), before)
            self.denoiser.train(trains)
        gap = (ours - target).pow(2) + self.consistency.huber_c**2
        consistency = (gap.sqrt() - self.consistency.huber_c).mean()
        terms = self._attention_terms(mine, {name: theirs[self._name_there(name)] for name in mine}, x)
        return terms | {"consistency": consistency, "loss": terms["loss"] + consistency}

    def _step_of_teacher(self, x: Noised, teacher_maps: AttentionMaps) -> tuple[Noised, Maps]:
        """The batch one step nearer to the clean image, and the teacher's attention where the student's is compared."""
        teacher = self._teacher[0]
        stated = self.predict(teacher.denoiser, teacher.text_encoders, x)
        maps = teacher_maps.take()
        assert x.prompt_embeds is not None
        everything = torch.ones(len(x.timesteps), dtype=torch.bool, device=x.timesteps.device)
        embeds = self._with_empty(*x.prompt_embeds, everything)
        negative = teacher.family.negative_conditions(teacher, Conditions(*embeds, x.size_ids))
        embeds = negative.embeds, negative.pooled
        empty = self.predict(teacher.denoiser, teacher.text_encoders, replace(x, prompt_embeds=embeds))
        prediction = empty.float() + self.consistency.guidance_scale * (stated.float() - empty.float())
        clean, noise = teacher.family.clean_and_noise(teacher, prediction, x.noisy_latents, x.timesteps)
        timesteps = (x.timesteps - self._stride).clamp(min=0)
        nearer = self.family.add_noise(self._model[0], clean, noise, timesteps)
        return replace(x, noisy_latents=nearer, timesteps=timesteps), maps

    def _clean(self, prediction: torch.Tensor, x: Noised) -> torch.Tensor:
        """f: the identity at timestep 0. (batch, channels, height, width) float32."""
        clean, _ = self.family.clean_and_noise(self._model[0], prediction.float(), x.noisy_latents, x.timesteps)
        scaled = (x.timesteps * TIMESTEP_SCALING)[:, None, None, None].float()
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        return skip * x.noisy_latents + scaled / (scaled**2 + SIGMA_DATA**2).sqrt() * clean


class ModuleOutputs:
    """Context manager that gives {"feature": {block: output}, "self_attention": {layer: output}} of a denoiser's passes, as
    far as the configuration weighs them."""

    def __init__(self, denoiser: nn.Module, config: AttentionDistillationConfig) -> None:
        self._modules: dict[str, dict[str, nn.Module]] = {"feature": {}, "self_attention": {}}
        if config.feature_weight:
            self._modules["feature"] = family_of_denoiser(denoiser).block_outputs(denoiser)
        if config.self_attention_weight:
            layers = attention_layers(denoiser, kind="self")
            self._modules["self_attention"] = {n: denoiser.get_submodule(n) for n in layers}

    def __enter__(self) -> dict[str, dict[str, torch.Tensor]]:
        kept: dict[str, dict[str, torch.Tensor]] = {kind: {} for kind in self._modules}

        def keep(kind: str, name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                kept[kind][name] = output[0] if isinstance(output, tuple) else output

            return hook

        self._handles = [
            module.register_forward_hook(keep(kind, name))
            for kind, modules in self._modules.items()
            for name, module in modules.items()
        ]
        return kept

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def check_same_shape(teacher: Model, student: Model) -> None:
    """UserError where the attention maps of the two cannot be compared."""
    faults = []
    if teacher.family.denoiser_class is not student.family.denoiser_class:
        raise UserError(f"the teacher is of the family {teacher.family.name}, the student of {student.family.name}")
    faults += student.family.shape_faults(student.denoiser, teacher.denoiser)
    name_there = student.family.name_in_teacher(student.denoiser, teacher.denoiser)
    missing = {name_there(name) for name in attention_layers(student.denoiser)} - set(
        attention_layers(teacher.denoiser)
    )
    if missing:
        faults.append(f"the teacher lacks the student's cross-attention layers {', '.join(sorted(missing))}")
    if not student.family.same_schedule(student, teacher):
        faults.append("their noise schedules differ, so that one timestep is not one noise level")
    texts = ("a b", "pleural effusion")
    if any(not torch.equal(a, b) for a, b in zip(teacher.tokenize(texts), student.tokenize(texts), strict=False)):
        faults.append("the tokenizers give other tokens")
    if faults:
        raise UserError(f"teacher and student are of different shape: {'; '.join(faults)}")


class ContrastiveObjective(nn.Module):
    """Match of captions and pictures, as CLIP: symmetric cross-entropy of the cosine similarities of a batch.

    Source: Radford et al. 2021, figure 3. `text_encoder` is a CLIPTextModelWithProjection, `image_encoder` maps
    (batch, 3, height, width) to (batch, projection_dim).
    """

    def __init__(self, text_encoder: nn.Module, image_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder, self.image_encoder = text_encoder, image_encoder
        self.logit_scale = nn.Parameter(torch.tensor(2.66))

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Terms:
        text = F.normalize(self.text_encoder(batch["input_ids"]).text_embeds, dim=-1)
        image = F.normalize(self.image_encoder(batch["pixel_values"]), dim=-1)
        logits = self.logit_scale.clamp(max=4.6).exp() * text @ image.T
        target = torch.arange(len(text), device=text.device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        accuracy = (logits.argmax(dim=1) == target).float().mean()
        return {"loss": loss, "accuracy": accuracy}


class AutoencoderObjective(nn.Module):
    """Reconstruction of pictures with a small KL to the unit Gaussian, as in latent diffusion (Rombach et al. 2022).

    L = mean |x - y| + mean (x - y)^2 + kl_weight * KL(q(z|x) || N(0, 1)) / number of pixels, on random square crops.
    """

    def __init__(self, vae: Any, kl_weight: float, crop_px: int) -> None:
        super().__init__()
        self.vae, self.kl_weight, self.crop_px = vae, kl_weight, crop_px

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Terms:
        pixels = batch["pixel_values"]
        span = pixels.shape[-1] - self.crop_px + 1
        top, left = (int(v) for v in torch.randint(span, (2,), generator=generator))
        pixels = pixels[..., top : top + self.crop_px, left : left + self.crop_px]
        posterior = self.vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
        reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample
        l1, mse = F.l1_loss(reconstruction, pixels), F.mse_loss(reconstruction, pixels)
        kl = posterior.kl().sum() / pixels.numel()
        psnr = 10 * torch.log10(4 / mse)
        return {"loss": l1 + mse + self.kl_weight * kl, "mse": mse, "kl": kl, "psnr_db": psnr}


class ClassificationObjective(nn.Module):
    """Binary cross-entropy of each finding. `classifier`: (batch, 3, height, width) -> .logits (batch, findings)."""

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, batch: dict[str, Any], generator: torch.Generator) -> Terms:
        logits = self.classifier(batch["pixel_values"]).logits
        loss = F.binary_cross_entropy_with_logits(logits, batch["labels"])
        return {"loss": loss, "accuracy": ((logits > 0) == batch["labels"].bool()).float().mean()}

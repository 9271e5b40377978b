"""Distill the cross-attention of a teacher, such as a model with a frozen text encoder, into the student.

L = L_denoising + mean over layers of
    token_kl_weight * KL over tokens at each place                       (which token a place looks at)
  + place_kl_weight * KL over places for each token of place_groups      (where a word looks)
  + mass_weight     * squared difference of the mass of the BOS, word, EOS and padding groups
  + tail_weight     * mass of EOS and padding beyond the teacher's
  + output_weight, feature_weight * difference of the outputs of the denoiser and of its blocks (BK-SDM, Kim et al. 2023)
  + self_attention_weight         * difference of the outputs of its self-attention layers (KOALA, Lee et al. 2023)
on the same noisy latents and timesteps. Terms of weight 0 are not computed. That a trained text encoder moves localization
from the words to EOS and padding: Dombrowski et al., AAAI 2024 (arXiv 2303.17908).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distill import draws
from distill.data.batch import Batch
from distill.errors import UserError
from distill.files import JsonObject
from distill.losses import (
    attention_mass_loss,
    feature_loss,
    place_attention_kl,
    tail_leak,
    tail_mass,
    token_attention_kl,
)
from distill.methods.base import Context, Method, Noised, Terms
from distill.methods.options import AttentionDistillationOptions, AttentionMatch, Group
from distill.tokens import EOS, PADDING, WORD

if TYPE_CHECKING:
    from distill.methods.training import Training
    from distill.models import Model

Maps = dict[str, torch.Tensor]
"""Cross-attention layer -> (batch, places, tokens)."""
CODES: dict[Group, int] = {"words": WORD, "eos": EOS, "padding": PADDING}


class AttentionDistillation(Method):
    """Fine-tune, and hold the student's cross-attention to a teacher's.

    A student with fewer blocks is compared layer by layer with those that it was made of.
    """

    options: AttentionDistillationOptions

    def faults(self, student: Model, training: Training) -> list[str]:
        from distill.attention import attention_layers

        if self.options.teacher is None:
            return ["method.teacher is missing: another arm, a run folder, a pipeline folder, or a hub id"]
        attention_layers(student.denoiser, self.options.layers)
        return []

    def setup(self, student: Model, context: Context) -> None:
        super().setup(student, context)
        teacher = self.load_teacher(context)
        self.match: AttentionMatch = self.options
        if self.options.gate_reference is not None and context.layer_scores is not None:
            self.match = self._gated(student, teacher, context)
        self._teacher, self._open = (teacher,), ExitStack()
        if not self.options.begin_after_steps:
            self.compare_with(teacher)

    def load_teacher(self, context: Context) -> Model:
        """The teacher, frozen and on the device. Raises UserError if its attention cannot be compared."""
        assert self.options.teacher is not None
        teacher = context.load(self.options.teacher).freeze()
        for module in (teacher.denoiser, *teacher.text_encoders):
            module.to(context.frozen_dtype)
        teacher.to(context.device)
        check_same_shape(teacher, self.student)
        if getattr(self.options, "output_weight", 0) and teacher.prediction_type != self.student.prediction_type:
            raise UserError(
                f"method.output_weight: the teacher predicts {teacher.prediction_type}, the student "
                f"{self.student.prediction_type}; only their attention and features can be compared"
            )
        return teacher

    def compare_with(self, teacher: Model) -> None:
        """Open recorders of student and teacher; they stay open until `finish`."""
        from distill.attention import AttentionMaps, attention_layers, mean_over_heads, record_attention

        student = self.student
        self._teacher, self._open = (teacher,), ExitStack()
        self._layer_there = student.family.name_in_teacher(student.denoiser, teacher.denoiser)
        # Recorders that are not opened record nothing, and all layers keep their fused attention.
        self._student_maps, self._teacher_maps = (AttentionMaps(m.family, mean_over_heads) for m in (student, teacher))
        if self._compares_attention:
            self._student_maps = self._open.enter_context(record_attention(student.denoiser, self.match.layers))
            layers = [self._layer_there(name) for name in attention_layers(student.denoiser, self.match.layers)]
            self._teacher_maps = self._open.enter_context(record_attention(teacher.denoiser, layers))
        self._outputs = tuple(ModuleOutputs(model, self.options) for model in (student, teacher))

    @property
    def teacher(self) -> Model:
        return self._teacher[0]

    def denoisers(self) -> list[nn.Module]:
        return [self.denoiser, self.teacher.denoiser]

    @property
    def _compares_attention(self) -> bool:
        match = self.match
        return max(match.token_kl_weight, match.place_kl_weight, match.mass_weight, match.tail_weight) > 0

    def _ask_teacher(self, x: Noised) -> tuple[Maps, torch.Tensor | None]:
        """The teacher's maps by its layer names, and its output where a term reads that or the output of a module."""
        teacher, options, target = self.teacher, self.options, None
        self._teacher_maps.start()
        if max(options.output_weight, options.feature_weight, options.self_attention_weight) > 0:
            target = self.predict(teacher, teacher.text_encoders, x)
        elif self._compares_attention:
            self._teacher_maps.run(self.predict, teacher, teacher.text_encoders, x)
        return self._teacher_maps.take(), target

    def _gated(self, student: Model, teacher: Model, context: Context) -> AttentionMatch:
        """The options, narrowed to what passes the gate; gate.json says by which numbers."""
        from distill.attention import attention_layers
        from distill.files import write_json
        from distill.methods.gate import choose_taught

        assert context.layer_scores is not None and self.options.gate_reference is not None
        layers = attention_layers(student.denoiser, self.options.layers)
        reference = context.load(self.options.gate_reference)
        check_same_shape(reference, student)
        names = [student.family.name_in_teacher(student.denoiser, other.denoiser) for other in (teacher, reference)]
        taught = choose_taught(
            teacher, reference, context.layer_scores, images=self.options.gate_images, layers=layers,
            in_teacher=names[0], in_reference=names[1],
        )  # fmt: skip
        if context.is_main:
            write_json(context.log_dir / "gate.json", asdict(taught))
        context.say(
            f"gate: {len(taught.layers)} of {len(layers)} layers and the maps of {', '.join(taught.groups)} are "
            f"taught, at timesteps {taught.timesteps[0]} to {taught.timesteps[1]}; {context.log_dir / 'gate.json'}"
        )
        return taught.narrow(self.options)

    def passes(self, step: int, images: int) -> int:
        return 3 * images + (self.taught(images) if step > self.options.begin_after_steps else 0)

    def setup_passes(self, batch_size: int, processes: int) -> int:
        from distill.methods.gate import looks_passes

        return 0 if self.options.gate_reference is None else looks_passes(self.options.gate_images)

    def taught(self, images: int) -> int:
        """How many of a batch of this size the teacher sees."""
        return max(1, round(self.options.batch_share * images))

    def forward(self, batch: Batch, generator: torch.Generator) -> Terms:
        x, options = self.noised(batch, generator), self.options
        if draws.step_of(generator) <= options.begin_after_steps:
            alone = self.denoising_loss(self.predict_student(x), x)
            return {"loss": alone, "denoising": alone}
        if not hasattr(self, "_student_maps"):  # recording costs time, so not before it is needed
            self.compare_with(self.teacher)
        self._student_maps.start()
        with self._outputs[0] as outputs:
            prediction = self.predict_student(x)
        denoising = self.denoising_loss(prediction, x)
        count = self.taught(len(x.timesteps))
        student = {name: maps[:count] for name, maps in self._student_maps.take().items()}

        part = x.first(count)
        with torch.no_grad(), self._outputs[1] as targets:
            taken, target = self._ask_teacher(part)
        teacher = {name: taken[self._layer_there(name)] for name in student}

        terms = self.attention_terms(student, teacher, part)
        terms["denoising"], terms["loss"] = denoising, terms["loss"] + denoising
        rows = self.compared_rows(part)
        if options.output_weight:
            assert target is not None
            gap = (prediction[:count].float() - target.float()).pow(2).flatten(1).mean(dim=1)
            terms["output"] = (gap * rows).sum() / rows.sum().clamp(min=1)
            terms["loss"] = terms["loss"] + options.output_weight * terms["output"]
        for name, weight in (("feature", options.feature_weight), ("self_attention", options.self_attention_weight)):
            if weight:
                mine = {key: value[:count] for key, value in outputs[name].items()}
                theirs = {key: targets[name][self._layer_there(key)] for key in mine}
                # The innermost stage of a student with fewer stages makes no smaller map, as its teacher's does.
                same = {key: value for key, value in mine.items() if value.shape == theirs[key].shape}
                terms[name] = feature_loss(theirs, same, rows)
                terms["loss"] = terms["loss"] + weight * terms[name]
        return terms

    def compared_rows(self, x: Noised) -> torch.Tensor:
        """(batch,): whether the attention at this timestep is compared."""
        return (x.timesteps >= self.match.min_timestep) & (x.timesteps <= self.match.max_timestep)

    def attention_terms(self, student: Maps, teacher: Maps, x: Noised) -> Terms:
        """Each attention term that has a weight, and as `loss` their weighted sum. Maps by the student's layer
        names."""
        match, rows = self.match, self.compared_rows(x)
        groups = {group: x.groups == CODES[group] for group in match.place_groups}
        named = None
        if match.words == "labels":
            assert x.label_tokens is not None
            named = x.label_tokens
            groups |= {"words": named} if "words" in groups else {}
        words = torch.stack(list(groups.values())).any(dim=0)
        losses: dict[str, tuple[float, Callable[[str], torch.Tensor]]] = {
            "token_kl": (match.token_kl_weight, lambda n: token_attention_kl(teacher[n], student[n], rows, named)),
            "place_kl": (match.place_kl_weight, lambda n: place_attention_kl(teacher[n], student[n], words, rows)),
            "mass": (match.mass_weight, lambda n: attention_mass_loss(teacher[n], student[n], x.groups, rows)),
            "tail": (
                match.tail_weight,
                lambda n: tail_leak(tail_mass(teacher[n], x.groups), student[n], x.groups, rows),
            ),
        }
        terms = {"loss": torch.zeros((), device=x.timesteps.device)}
        for name, (weight, of_layer) in losses.items():
            if weight:
                terms[name] = torch.stack([of_layer(layer) for layer in student]).mean()
                terms["loss"] = terms["loss"] + weight * terms[name]
        return terms

    def finish(self) -> JsonObject:
        self._open.close()
        return {}


class ModuleOutputs:
    """Context manager that gives {"feature": {block: output}, "self_attention": {layer: output}} of a denoiser's
    forward passes, as far as the options weigh them."""

    def __init__(self, model: Model, options: AttentionMatch) -> None:
        from distill.attention import attention_layers

        self._modules: dict[str, dict[str, nn.Module]] = {"feature": {}, "self_attention": {}}
        if getattr(options, "feature_weight", 0):
            self._modules["feature"] = model.family.block_outputs(model.denoiser)
        if getattr(options, "self_attention_weight", 0):
            layers = attention_layers(model.denoiser, kind="self")
            self._modules["self_attention"] = {n: model.denoiser.get_submodule(n) for n in layers}

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
    from distill.attention import attention_layers

    if student.family.name != teacher.family.name:
        raise UserError(f"the teacher is a {teacher.family.name} model, and the student a {student.family.name} model")
    faults = student.family.shape_faults(student.denoiser, teacher.denoiser)
    missing: set[str] = set()
    if not faults:
        name_there = student.family.name_in_teacher(student.denoiser, teacher.denoiser)
        ours = attention_layers(student.denoiser)
        missing = {name_there(name) for name in ours} - set(attention_layers(teacher.denoiser))
    if missing:
        faults.append(f"the teacher lacks the student's cross-attention layers {', '.join(sorted(missing))}")
    if not student.family.same_schedule(teacher, student):
        faults.append("their noise schedules differ, so that one timestep is not one noise level")
    texts = ("a b", "pleural effusion")
    if any(not torch.equal(a, b) for a, b in zip(teacher.tokenize(texts), student.tokenize(texts), strict=False)):
        faults.append("the tokenizers give other tokens")
    if faults:
        raise UserError(f"teacher and student are of different shape: {'; '.join(faults)}")

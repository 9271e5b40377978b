"""Capture of the attention probabilities of a denoiser of any registered family.

SDPA never forms the probabilities, so the layers asked for get a processor that does, with scores and softmax in
float32; the others keep theirs. Of generated images, one heat map a word (as DAAM, Tang et al. 2023, arXiv 2210.04885):

    with record_pipeline(pipe, "a cat and a dog") as maps:
        image = pipe("a cat and a dog").images[0]
    heat = maps.heat_maps()[0]  # {"[BOS]": (height, width), "cat": ..., "dog": ..., "[EOS]": ..., "[PAD]": ...}
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from distill.errors import UserError
from distill.models.compilation import IN_COMPILED_BLOCK
from distill.models.family import Family, Kind, family_of_denoiser, unwrapped

Reduce = Callable[[torch.Tensor], torch.Tensor]

ALWAYS = (0, 2**31)
"""Timesteps of any forward pass."""
NEVER = (-1, -1)

PLAIN = ("AttnProcessor", "AttnProcessor2_0", "AttnProcessorNPU", "FusedAttnProcessor2_0", "RecordingAttnProcessor",
         "SlicedAttnProcessor", "XFormersAttnProcessor", "XLAFlashAttnProcessor2_0")  # fmt: skip
"""Processors that compute the same attention in different ways. Others (IP-Adapter, PAG) compute another."""


def attention_layers(denoiser: nn.Module, prefixes: str | Sequence[str] = (), kind: Kind = "cross") -> list[str]:
    """Names of the attention modules of a kind that start with any of `prefixes` (all for none), in forward order.

    Raises UserError, with the available names, for a prefix that matches nothing, and if there is no such layer.
    """
    prefixes = [prefixes] if isinstance(prefixes, str) else prefixes
    inner = unwrapped(denoiser)
    names = family_of_denoiser(inner).attention_layers(inner, kind)
    if not names:
        raise UserError(f"this {type(inner).__name__} has no {kind}-attention layer")
    for prefix in prefixes:
        if not any(n.startswith(prefix) for n in names):
            listed = ", ".join(n.removesuffix(".attn2").removesuffix(".attn1") for n in names)
            raise UserError(f"no {kind}-attention layer starts with {prefix!r}; available: {listed}")
    return [n for n in names if not prefixes or n.startswith(tuple(prefixes))]


def is_plain(attention: Attention) -> bool:
    """Whether the module computes softmax(scale q k^T) v of its inputs, and nothing around it."""
    norms = (attention.group_norm, attention.spatial_norm, attention.norm_q, attention.norm_k)
    plain = type(attention.processor).__name__ in PLAIN and not attention.residual_connection
    return plain and all(norm is None for norm in norms)


def mean_over_heads(probabilities: torch.Tensor) -> torch.Tensor:
    """(batch, heads, places, tokens) -> (batch, places, tokens)."""
    return probabilities.mean(dim=1)


class Enough(Exception):
    """Ends a forward pass whose remaining layers nobody asked for."""


class AttentionMaps:
    """What a recorder holds after a forward pass, or the sum over the passes since `start`.

    by_layer: layer name -> what `reduce` made of (batch, heads, places, tokens) probabilities in float32; with
    `accumulate` its sum over the recorded passes, so that memory does not grow with them.
    sizes: layer name -> (height, width) of its places, row by row.
    passes: recorded forward passes since `start`.
    in_range: whether the forward pass under way is at a timestep that is asked for.
    """

    def __init__(
        self,
        family: Family,
        reduce: Reduce,
        *,
        accumulate: bool = False,
        timesteps: tuple[int, int] = ALWAYS,
        rows: Callable[[], slice] | None = None,
        layers: Sequence[str] = (),
    ) -> None:
        self.family, self.reduce = family, reduce
        self.accumulate, self.timesteps, self.rows = accumulate, timesteps, rows
        self.active = True
        self.by_layer: dict[str, torch.Tensor] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self.passes = 0
        self._latent_size = (0, 0)
        self.in_range = True
        self._layers = frozenset(layers)
        self._stop_early = False
        self._stored: set[str] = set()  # in the pass under way
        self._skipped: set[str] = set()

    def take(self) -> dict[str, torch.Tensor]:
        """The maps since `start`; recording pauses until the next one."""
        maps, self.by_layer, self.active, self.passes = self.by_layer, {}, False, 0
        return maps

    def start(self) -> None:
        self.by_layer, self.active, self.passes = {}, True, 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Forward passes run as without a recorder while this is open."""
        before = self.timesteps, self.in_range
        self.timesteps = NEVER
        try:
            yield
        finally:
            self.timesteps, self.in_range = before

    def run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Call `forward`, which runs the denoiser, and end once every recorded layer has run: maps without an
        output."""
        self._stop_early = True
        try:
            forward(*args, **kwargs)
        except Enough:
            pass
        finally:
            self._stop_early = False

    def reduced(self, probabilities: torch.Tensor) -> torch.Tensor:
        """What is kept of a layer's probabilities."""
        chosen = probabilities if self.rows is None else probabilities[self.rows()]
        # Autocast would multiply in half precision.
        with torch.autocast(probabilities.device.type, enabled=False):
            return self.reduce(chosen)

    @torch.compiler.disable
    def store(self, layer: str, reduced: torch.Tensor, places: int) -> None:
        # Gradient checkpointing computes a layer again inside backward: it must save the same tensors, hence the
        # reduction before, and record nothing.
        if not self.active or layer in self._stored:
            return
        self.passes += not self._stored
        self._stored.add(layer)
        if self.accumulate and layer in self.by_layer:
            self.by_layer[layer] = self.by_layer[layer] + reduced
        else:
            self.by_layer[layer] = reduced
        self.sizes[layer] = self.family.grid(self._latent_size, places)
        self._end_if_complete()

    def _end_if_complete(self) -> None:
        if self._stop_early and self._layers <= self._stored | self._skipped:
            raise Enough

    @torch.compiler.disable
    def skip(self, layer: str) -> None:
        """For a layer of too many places: ends the pass if no later layer has fewer."""
        self._skipped.add(layer)
        if self._stop_early and self.family.nothing_smaller_follows(layer):
            raise Enough
        self._end_if_complete()

    @torch.compiler.disable
    def see_inputs(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        places = (self.family.latents_input, self.family.timestep_input)
        latents, timestep = (args[place] if len(args) > place else kwargs[name] for name, place in places)
        self._latent_size = (latents.shape[-2], latents.shape[-1])
        self._stored, self._skipped = set(), set()
        low, high = self.timesteps
        if (low, high) != ALWAYS:  # looking at it waits for the device
            steps = torch.as_tensor(timestep)
            self.in_range = bool(((steps >= low) & (steps <= high)).all())


class RecordingAttnProcessor:
    """Attention with explicit probabilities, equal to diffusers' AttnProcessor with scores and softmax in float32.

    Forward passes at timesteps that are not asked for, and layers of more than `max_places` places, run the module's
    own processor.
    """

    def __init__(self, maps: AttentionMaps, layer: str, original: Any, max_places: int | None) -> None:
        self.maps, self.layer, self.original, self.max_places = maps, layer, original, max_places
        self.kept: torch.Tensor | None = None  # of a compiled pass, until `hand_over`
        self.places = 0

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        too_large = self.max_places is not None and hidden_states.shape[1] > self.max_places
        if too_large:
            self.maps.skip(self.layer)
        if too_large or not self.maps.in_range:
            unchanged: torch.Tensor = self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
            return unchanged
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, tokens, _ = context.shape
        if attn.norm_cross and encoder_hidden_states is not None:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = (
            states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for states in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        mask = None
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, tokens, batch).unflatten(0, (batch, attn.heads))
        # In bfloat16 a score of 10 is off by up to 0.03, and its probability by 3 %.
        with torch.autocast(query.device.type, enabled=False):
            scores = (query.float() * attn.scale) @ key.float().transpose(-1, -2)
            probabilities = (scores if mask is None else scores + mask.float()).softmax(dim=-1)
        reduced = self.maps.reduced(probabilities)
        if getattr(attn, IN_COMPILED_BLOCK, False):
            # An attribute leaves the compiled block with its output, where a call would break the graph. The layer's
            # name is not read, so that all blocks of a size share a graph.
            self.kept, self.places = reduced, probabilities.shape[2]
        else:
            self.maps.store(self.layer, reduced, probabilities.shape[2])
        attended = probabilities.to(value.dtype) @ value
        hidden_states = attended.transpose(1, 2).flatten(2)
        returned: torch.Tensor = attn.to_out[1](attn.to_out[0](hidden_states)) / attn.rescale_output_factor
        return returned

    def hand_over(self, *hook: Any) -> None:
        """Give what a compiled block kept to the recorder; a forward hook of that block."""
        if self.kept is not None:
            reduced, self.kept = self.kept, None
            self.maps.store(self.layer, reduced, self.places)


@contextmanager
def record_attention(
    denoiser: nn.Module,
    layers: str | Sequence[str] = (),
    reduce: Reduce = mean_over_heads,
    *,
    kind: Kind = "cross",
    accumulate: bool = False,
    timesteps: tuple[int, int] = ALWAYS,
    rows: Callable[[], slice] | None = None,
    max_places: int | None = None,
) -> Iterator[AttentionMaps]:
    """Record the attention of `layers` (prefixes of names; all for none) while the context is open.

    kind: "cross" (places to tokens) or "self" (places to places; by default all heads' mean of every pair of places, so
    give max_places: layers of more are not recorded).
    reduce: what is kept of the (batch, heads, places, tokens) probabilities; `select_tokens` keeps token groups only.
    accumulate: keep the sum over forward passes, not the last. timesteps: record passes at these timesteps only, both
    ends included, all of the batch. rows: called at each layer, the part of the batch to keep (the conditional half
    under guidance).

    Works with LoRA attached, quantized layers, gradients, gradient checkpointing, whose second pass inside backward is
    not recorded, and torch.compile: blocks that trainer.compile has compiled stay whole, and elsewhere each recorded
    layer breaks the graph, so not with fullgraph=True. The output of the denoiser stays what it was, to rounding.
    Processors are restored at the end, also after an error. Of several recorders of a layer, the last opened records.
    Raises UserError for other attention, such as an IP-Adapter's.
    """
    inner = unwrapped(denoiser)
    names = attention_layers(inner, layers, kind)
    maps = AttentionMaps(
        family_of_denoiser(inner),
        reduce,
        accumulate=accumulate,
        timesteps=timesteps,
        rows=rows,
        layers=names,
    )
    modules: dict[str, Any] = {name: inner.get_submodule(name) for name in names}
    originals = {name: module.processor for name, module in modules.items()}
    for name, module in modules.items():
        if not is_plain(module):
            raise UserError(f"{name} is not plain attention and cannot be recorded: {type(module.processor).__name__}")
    handles = [inner.register_forward_pre_hook(maps.see_inputs, with_kwargs=True)]
    try:
        for name, module in modules.items():
            module.processor = RecordingAttnProcessor(maps, name, originals[name], max_places)
            block = inner.get_submodule(name.rpartition(".")[0])
            handles.append(block.register_forward_hook(module.processor.hand_over))
        yield maps
    finally:
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            module.processor = originals[name]

"""Capture of cross-attention probabilities of a diffusers U-Net, and their aggregation to maps.

SDPA never forms the probabilities, so the layers asked for get a processor that does, with the softmax in float32; the
others keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from distill.errors import UserError

Reduce = Callable[[torch.Tensor], torch.Tensor]


def cross_attention_layers(unet: nn.Module, prefixes: Sequence[str] = ()) -> list[str]:
    """Names of the cross-attention modules that start with any of `prefixes` (all for none), in forward order.

    Raises UserError, with the available names, for a prefix that matches nothing.
    """
    names = [n for n, m in unet.named_modules() if isinstance(m, Attention) and m.is_cross_attention]
    # named_modules lists the up blocks before the middle one; maps are stored in the order of the forward pass.
    names.sort(key=lambda n: ("down_blocks", "mid_block", "up_blocks").index(n.split(".")[0]))
    for prefix in prefixes:
        if not any(n.startswith(prefix) for n in names):
            listed = ", ".join(n.removesuffix(".attn2") for n in names)
            raise UserError(f"no cross-attention layer starts with {prefix!r}; available: {listed}")
    return [n for n in names if not prefixes or n.startswith(tuple(prefixes))]


def mean_over_heads(probabilities: torch.Tensor) -> torch.Tensor:
    """(batch, heads, places, tokens) -> (batch, places, tokens)."""
    return probabilities.mean(dim=1)


class AttentionMaps:
    """What a recorder holds after a forward pass.

    by_layer: layer name -> what `reduce` made of (batch, heads, places, tokens) probabilities in float32.
    sizes: layer name -> (height, width) of its places, row by row.
    """

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce
        self.active = True
        self.by_layer: dict[str, torch.Tensor] = {}
        self.sizes: dict[str, tuple[int, int]] = {}
        self._latent_size = (0, 0)

    def take(self) -> dict[str, torch.Tensor]:
        """The maps of the last forward pass; recording pauses until `start`.

        Gradient checkpointing runs the forward pass again inside backward, where nothing must be recorded.
        """
        maps, self.by_layer, self.active = self.by_layer, {}, False
        return maps

    def start(self) -> None:
        self.by_layer, self.active = {}, True

    def store(self, layer: str, probabilities: torch.Tensor) -> None:
        # Reduced also while recording pauses: a checkpointed block, computed again, must save the same tensors.
        reduced = self.reduce(probabilities)
        if not self.active:
            return
        self.by_layer[layer] = reduced
        self.sizes[layer] = self._places(probabilities.shape[2])

    def _places(self, count: int) -> tuple[int, int]:
        height, width = self._latent_size
        while height * width > count:
            height, width = (height + 1) // 2, (width + 1) // 2
        if height * width != count:
            raise ValueError(f"{count} places do not fit latents of {self._latent_size}")
        return height, width

    def see_latents(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        self._latent_size = (sample.shape[-2], sample.shape[-1])


class RecordingAttnProcessor:
    """Attention with explicit probabilities, equal to diffusers' AttnProcessor with the softmax in float32."""

    def __init__(self, maps: AttentionMaps, layer: str) -> None:
        self.maps, self.layer = maps, layer

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, tokens, _ = context.shape
        if attn.norm_cross and encoder_hidden_states is not None:
            context = attn.norm_encoder_hidden_states(context)
        query, key, value = (
            states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for states in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        if attn.upcast_attention:
            query, key = query.float(), key.float()
        scores = (query * attn.scale) @ key.transpose(-1, -2)
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
            scores = scores + mask.unflatten(0, (batch, attn.heads))
        probabilities = scores.float().softmax(dim=-1)
        self.maps.store(self.layer, probabilities)
        hidden_states = (probabilities.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](hidden_states)) / attn.rescale_output_factor


@contextmanager
def record_attention(
    unet: nn.Module, layers: Sequence[str] = (), reduce: Reduce = mean_over_heads
) -> Iterator[AttentionMaps]:
    """Record the cross-attention of `layers` (prefixes of names; all for none) while the context is open.

    Works with LoRA attached, gradients and gradient checkpointing (see AttentionMaps.take). The output of the U-Net
    stays what it was, to rounding. Processors are restored at the end, also after an error.
    """
    maps = AttentionMaps(reduce)
    names = cross_attention_layers(unet, layers)
    modules: dict[str, Any] = {name: unet.get_submodule(name) for name in names}
    originals = {name: module.processor for name, module in modules.items()}
    handle = unet.register_forward_pre_hook(maps.see_latents, with_kwargs=True)
    try:
        for name, module in modules.items():
            module.processor = RecordingAttnProcessor(maps, name)
        yield maps
    finally:
        handle.remove()
        for name, module in modules.items():
            module.processor = originals[name]


def aggregate(maps: dict[str, torch.Tensor], sizes: dict[str, tuple[int, int]], size: tuple[int, int]) -> torch.Tensor:
    """Mean over layers of (batch, places, columns) maps, each resized (bilinear) to `size`: (batch, columns, *size)."""
    resized = [
        F.interpolate(m.transpose(1, 2).unflatten(2, sizes[name]), size=size, mode="bilinear", align_corners=False)
        for name, m in maps.items()
    ]
    return torch.stack(resized).mean(dim=0)


def normalize(maps: torch.Tensor) -> torch.Tensor:
    """Min-max over the last two dimensions, to [0, 1]; a constant map becomes 0."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)

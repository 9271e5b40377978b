"""Recording attention changes nothing, leaves nothing behind, and records what the U-Net computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_sd, tiny_sdxl

from distill.attention import aggregate, attention_layers, mean_over_heads, normalize, record_attention
from distill.components import add_lora
from distill.config import LoraConfig
from distill.errors import UserError

TOKENS = 9


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return tiny_sd().unet


def inputs(unet: UNet2DConditionModel, size: tuple[int, int] = (8, 8), batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    arguments: dict[str, Any] = {
        "sample": torch.randn(batch, 4, *size, generator=generator),
        "timestep": torch.linspace(10, 900, batch).long(),
        "encoder_hidden_states": torch.randn(batch, TOKENS, unet.config.cross_attention_dim, generator=generator),
    }
    if unet.config.addition_embed_type == "text_time":
        pooled = torch.randn(batch, 16, generator=generator)
        arguments["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.full((batch, 6), 64.0)}
    return arguments


def attach_lora(unet: UNet2DConditionModel) -> None:
    """An adapter that changes the output: its second factor, 0 when fresh, is drawn at random."""
    add_lora(unet, LoraConfig(rank=2, alpha=4.0), LoraConfig().unet_targets, "unet")
    generator = torch.Generator().manual_seed(2)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def checkpointing(unet: UNet2DConditionModel) -> None:
    unet.enable_gradient_checkpointing()
    unet.train()


def lora_with_checkpointing(unet: UNet2DConditionModel) -> None:
    attach_lora(unet)
    checkpointing(unet)


def nothing(unet: UNet2DConditionModel) -> None:
    pass


@pytest.mark.parametrize("build", [lambda: tiny_sd().unet, lambda: tiny_sdxl().unet], ids=["sd", "sdxl"])
@pytest.mark.parametrize("change", [nothing, attach_lora, checkpointing, lora_with_checkpointing])
def test_output_is_the_same_with_and_without(
    build: Callable[[], UNet2DConditionModel], change: Callable[[UNet2DConditionModel], None]
) -> None:
    unet = build()
    base = unet(**inputs(unet)).sample
    change(unet)
    has_adapter = change in (attach_lora, lora_with_checkpointing)
    assert ((unet(**inputs(unet)).sample - base).abs().max() > 1e-3) == has_adapter
    for size, batch in (((8, 8), 1), ((4, 12), 3)):
        arguments = inputs(unet, size, batch)
        without = unet(**arguments).sample
        with record_attention(unet) as maps:
            recorded = unet(**arguments).sample
        assert len(maps.by_layer) == len(attention_layers(unet))
        assert (recorded - without).abs().max() <= 1e-6


def test_output_is_the_same_with_masked_tokens(unet: UNet2DConditionModel) -> None:
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    mask[0, 4:] = False
    arguments = inputs(unet) | {"encoder_attention_mask": mask}
    without = unet(**arguments).sample
    with record_attention(unet) as maps:
        recorded = unet(**arguments).sample
    assert (recorded - without).abs().max() <= 1e-6
    for probabilities in maps.by_layer.values():
        assert torch.all(probabilities[0, :, 4:] == 0) and torch.all(probabilities[1] > 0)


@pytest.mark.parametrize("upcast", [False, True])
def test_output_is_the_same_in_bf16_and_maps_are_float32(unet: UNet2DConditionModel, upcast: bool) -> None:
    for name in attention_layers(unet):
        unet.get_submodule(name).upcast_attention = upcast
    unet.to(torch.bfloat16)
    arguments = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs(unet).items()}
    without = unet(**arguments).sample.float()
    with record_attention(unet) as maps:
        recorded = unet(**arguments).sample
    assert recorded.dtype == torch.bfloat16
    assert (recorded.float() - without).abs().max() <= 0.03 * without.abs().max()
    for probabilities in maps.by_layer.values():
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(probabilities.shape[:2]))


@pytest.mark.parametrize("build", [lambda: tiny_sd().unet, lambda: tiny_sdxl().unet], ids=["sd", "sdxl"])
@pytest.mark.parametrize("change", [nothing, attach_lora])
@torch.no_grad()
def test_maps_are_the_softmax_of_queries_and_keys(
    build: Callable[[], UNet2DConditionModel], change: Callable[[UNet2DConditionModel], None]
) -> None:
    unet = build()
    change(unet)
    names = attention_layers(unet)
    seen: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    handles = [
        getattr(unet.get_submodule(name), part).register_forward_hook(
            lambda module, args, output, name=name, part=part: seen[name].update({part: output})
        )
        for name in names
        for part in ("to_q", "to_k")
    ]
    unet(**inputs(unet))  # the stock processors; the hooks see what they compute from
    stock = {name: dict(parts) for name, parts in seen.items()}
    for handle in handles:
        handle.remove()
    with record_attention(unet, reduce=lambda p: p) as heads:
        unet(**inputs(unet))
    with record_attention(unet) as means:
        unet(**inputs(unet))
    for name in names:
        attention = unet.get_submodule(name)
        per_head = stock[name]["to_q"].shape[-1] // attention.heads
        for head in range(attention.heads):
            part = slice(head * per_head, (head + 1) * per_head)
            scores = torch.einsum("bpc,btc->bpt", stock[name]["to_q"][..., part], stock[name]["to_k"][..., part])
            expected = (scores / per_head**0.5).softmax(dim=-1)
            torch.testing.assert_close(heads.by_layer[name][:, head], expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(means.by_layer[name], heads.by_layer[name].mean(dim=1))
        sums = means.by_layer[name].sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(8, 8), (4, 12), (7, 9), (2, 16)])
@torch.no_grad()
def test_layers_come_in_forward_order_with_their_sizes(unet: UNet2DConditionModel, size: tuple[int, int]) -> None:
    order: list[str] = []
    names = {module: name for name, module in unet.named_modules()}
    for name in attention_layers(unet):
        unet.get_submodule(name).register_forward_pre_hook(lambda module, args: order.append(names[module]))
    with record_attention(unet) as maps:
        unet(**inputs(unet, size))
    assert list(maps.by_layer) == order == attention_layers(unet)
    half = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    for name, probabilities in maps.by_layer.items():
        assert maps.sizes[name] == (half if name.startswith("mid_block") else size)
        assert probabilities.shape == (2, maps.sizes[name][0] * maps.sizes[name][1], TOKENS)


@torch.no_grad()
def test_only_the_asked_layers_are_recorded(unet: UNet2DConditionModel) -> None:
    originals = unet.attn_processors
    with record_attention(unet, ("up_blocks", "mid_block")) as maps:
        unet(**inputs(unet))
        changed = {name for name, processor in unet.attn_processors.items() if processor is not originals[name]}
    assert {name.split(".")[0] for name in maps.by_layer} == {"mid_block", "up_blocks"}
    assert changed == {f"{name}.processor" for name in maps.by_layer}


def test_a_prefix_that_matches_nothing_is_answered_with_the_names(unet: UNet2DConditionModel) -> None:
    originals = unet.attn_processors
    with (
        pytest.raises(UserError, match="'up_blocks.9'; available: down_blocks.0"),
        record_attention(unet, ["up_blocks.9"]),
    ):
        pass
    assert unet.attn_processors == originals


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored_at_the_end_also_after_an_error(unet: UNet2DConditionModel, fails: bool) -> None:
    originals, hooks = unet.attn_processors, dict(unet._forward_pre_hooks)
    try:
        with record_attention(unet) as maps:
            unet(**inputs(unet))
            assert unet.attn_processors != originals
            if fails:
                unet(**inputs(unet) | {"encoder_hidden_states": torch.zeros(2, TOKENS, 5)})
    except RuntimeError:
        assert fails
    assert all(unet.attn_processors[name] is processor for name, processor in originals.items())
    assert unet._forward_pre_hooks == hooks
    before = {name: m.clone() for name, m in maps.by_layer.items()}
    unet(**inputs(unet, batch=1))
    assert all(torch.equal(maps.by_layer[name], m) for name, m in before.items())


def test_nothing_is_recorded_between_take_and_start(unet: UNet2DConditionModel) -> None:
    with record_attention(unet) as maps, torch.no_grad():
        unet(**inputs(unet))
        first = maps.take()
        unet(**inputs(unet, batch=1))
        assert maps.by_layer == {}
        maps.start()
        unet(**inputs(unet))
        second = maps.take()
    assert all(torch.equal(first[name], second[name]) for name in first)


# A reduction whose backward pass needs its input must be computed again, like all else in a checkpointed block.
@pytest.mark.parametrize("reduce", [mean_over_heads, lambda p: p.square().mean(dim=1)], ids=["mean", "squares"])
@pytest.mark.parametrize("change", [nothing, attach_lora])
def test_gradient_checkpointing_gives_equal_maps_and_gradients_and_records_once(
    unet: UNet2DConditionModel, change: Callable[[UNet2DConditionModel], None], reduce: Any
) -> None:
    change(unet)
    unet.train()
    found = []
    for _ in range(2):
        unet.zero_grad()
        arguments = inputs(unet)
        arguments["encoder_hidden_states"].requires_grad_()
        with record_attention(unet, reduce=reduce) as maps:
            output = unet(**arguments).sample
            taken = maps.take()
            loss = output.square().mean() + sum(m[..., 1].square().mean() for m in taken.values())
            loss.backward()
            assert maps.by_layer == {}
        gradients = {n: p.grad.clone() for n, p in unet.named_parameters() if p.grad is not None}
        found.append((taken, gradients | {"text": arguments["encoder_hidden_states"].grad}))
        unet.enable_gradient_checkpointing()
    (plain_maps, plain), (again_maps, again) = found
    assert plain.keys() == again.keys() and len(plain) > 10
    for name in plain_maps:
        torch.testing.assert_close(again_maps[name], plain_maps[name], atol=1e-6, rtol=0)
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_aggregated_maps_still_sum_to_one_over_tokens(unet: UNet2DConditionModel) -> None:
    with record_attention(unet) as maps:
        unet(**inputs(unet, (4, 12)))
    found = aggregate(maps.by_layer, maps.sizes, (16, 24))
    assert found.shape == (2, TOKENS, 16, 24)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(2, 16, 24))


def test_aggregation_keeps_places_and_averages_layers() -> None:
    corner = torch.zeros(1, 6, 1)
    corner[0, 4] = 1.0  # row 1, column 1 of 2 x 3
    maps = {"a": corner, "b": torch.full((1, 24, 1), 3.0)}
    found = aggregate(maps, {"a": (2, 3), "b": (4, 6)}, (2, 3))[0, 0]
    expected = torch.full((2, 3), 1.5)
    expected[1, 1] = 2.0
    torch.testing.assert_close(found, expected)


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 1e3), st.floats(-1e2, 1e2))
@settings(max_examples=25, deadline=None)
def test_normalized_maps_go_from_0_to_1_whatever_scale_and_offset(seed: int, scale: float, offset: float) -> None:
    maps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)).double()
    found = normalize(maps * scale + offset)
    assert torch.all(found.amin(dim=(-2, -1)) == 0) and torch.all(found.amax(dim=(-2, -1)) == 1)
    torch.testing.assert_close(found, normalize(maps))


def test_a_constant_map_becomes_0() -> None:
    assert torch.all(normalize(torch.full((1, 2, 3, 3), 0.7)) == 0)

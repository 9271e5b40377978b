"""Recording attention changes nothing, leaves nothing behind, and records what the U-Net computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor, PAGIdentitySelfAttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_sd, tiny_sdxl, tiny_tokenizer
from torch import nn
from transformers import CLIPTokenizer

from distill.attention.heat_maps import aggregate, normalize, record_pipeline, select_tokens
from distill.attention.recording import attention_layers, mean_over_heads, record_attention
from distill.config import LoraConfig
from distill.errors import UserError
from distill.models.adapters import add_lora
from distill.tokens import BOS, EOS, PADDING, WORD, token_groups, words_of

TOKENS = 9


def sd2_unet() -> UNet2DConditionModel:
    """SD 2.x-shaped: more heads at the coarser level, linear projections."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=(2, 4),
        norm_num_groups=4,
        use_linear_projection=True,
    )


def one_level_unet() -> UNet2DConditionModel:
    """The smallest with cross-attention on the way down and up, as compilation takes seconds."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


UNETS: dict[str, Callable[[], UNet2DConditionModel]] = {
    "sd": lambda: tiny_sd().unet,
    "sd2": sd2_unet,
    "sdxl": lambda: tiny_sdxl().unet,
}


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return UNETS["sd"]()


@pytest.fixture(params=UNETS)
def any_unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    return UNETS[request.param]()


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
    add_lora(unet, LoraConfig(rank=2, alpha=4.0), ("to_q", "to_k", "to_v", "to_out.0"), "denoiser")
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


@pytest.mark.parametrize("change", [nothing, attach_lora, checkpointing, lora_with_checkpointing])
def test_output_is_the_same_with_and_without(
    any_unet: UNet2DConditionModel, change: Callable[[UNet2DConditionModel], None]
) -> None:
    unet = any_unet
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("upcast", [False, True])
def test_output_is_the_same_in_half_precision_and_maps_are_float32(
    unet: UNet2DConditionModel, upcast: bool, dtype: torch.dtype
) -> None:
    for name in attention_layers(unet):
        unet.get_submodule(name).upcast_attention = upcast
    unet.to(dtype)
    arguments = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(unet).items()}
    without = unet(**arguments).sample.float()
    with record_attention(unet) as maps:
        recorded = unet(**arguments).sample
    assert recorded.dtype == dtype
    assert (recorded.float() - without).abs().max() <= 0.03 * without.abs().max()
    for probabilities in maps.by_layer.values():
        assert probabilities.dtype == torch.float32
        torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(probabilities.shape[:2]))


@torch.no_grad()
def test_maps_are_reduced_in_float32_also_under_autocast(unet: UNet2DConditionModel) -> None:
    chosen = select_tokens(tiny_tokenizer(), ["a plea", "pleural effusion"], max_length=TOKENS)
    found = []
    for reduce in (chosen.reduce(), lambda p: p):
        with record_attention(unet, reduce=reduce) as maps, torch.autocast("cpu", torch.bfloat16):
            unet(**inputs(unet))
        found.append(maps.by_layer)
    columns, full = found
    for name in full:
        torch.testing.assert_close(columns[name], full[name].mean(dim=1) @ chosen.matrix)


@pytest.mark.parametrize("upcast", [False, True])
@torch.no_grad()
def test_scores_are_computed_in_float32_also_under_autocast(unet: UNet2DConditionModel, upcast: bool) -> None:
    name = attention_layers(unet)[0]
    attention: Any = unet.get_submodule(name)
    attention.upcast_attention = upcast
    seen: dict[str, torch.Tensor] = {}
    for part in ("to_q", "to_k"):
        layer = getattr(attention, part)
        layer.weight *= 8  # attention that looks at something: scores of about 10
        layer.register_forward_hook(lambda module, args, output, part=part: seen.update({part: output}))
    with record_attention(unet, name, reduce=lambda p: p) as maps, torch.autocast("cpu", torch.bfloat16):
        unet(**inputs(unet))
    query, key = (seen[part].unflatten(-1, (attention.heads, -1)).transpose(1, 2) for part in ("to_q", "to_k"))
    assert query.dtype == torch.bfloat16
    scores = (query.double() * attention.scale) @ key.double().transpose(-1, -2)
    assert scores.abs().max() > 5
    torch.testing.assert_close(maps.by_layer[name].double(), scores.softmax(dim=-1), rtol=1e-5, atol=1e-6)


def quantize(unet: UNet2DConditionModel, quantized: Callable[[nn.Linear], nn.Module]) -> None:
    """By hand, as diffusers' own loading asks for a GPU."""
    for name, module in list(unet.named_modules()):
        if type(module) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            new = quantized(module)
            new.bias = module.bias
            setattr(unet.get_submodule(parent), leaf, new.to("cpu"))


def nf4(unet: UNet2DConditionModel) -> None:
    def quantized(linear: nn.Linear) -> nn.Module:
        new = bitsandbytes.nn.Linear4bit(
            linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4"
        )
        new.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return new

    quantize(unet, quantized)


def int8(unet: UNet2DConditionModel) -> None:
    def quantized(linear: nn.Linear) -> nn.Module:
        new = bitsandbytes.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False)
        new.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        return new

    quantize(unet, quantized)


@pytest.mark.parametrize("change", [nothing, attach_lora, nf4, int8])
@torch.no_grad()
def test_maps_are_the_softmax_of_queries_and_keys(
    any_unet: UNet2DConditionModel, change: Callable[[UNet2DConditionModel], None]
) -> None:
    unet = any_unet
    base = unet(**inputs(unet)).sample
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
    output = unet(**inputs(unet)).sample  # the stock processors; the hooks see what they compute from
    assert (change is nothing) == torch.equal(output, base)
    stock = {name: dict(parts) for name, parts in seen.items()}
    for handle in handles:
        handle.remove()
    with record_attention(unet, reduce=lambda p: p) as heads:
        unet(**inputs(unet))
    with record_attention(unet) as means:
        unet(**inputs(unet))
    # A rounding error can move an activation by one of int8's 255 steps.
    tolerance = 1e-3 if change is int8 else 1e-6
    for name in names:
        attention = unet.get_submodule(name)
        per_head = stock[name]["to_q"].shape[-1] // attention.heads
        for head in range(attention.heads):
            part = slice(head * per_head, (head + 1) * per_head)
            scores = torch.einsum("bpc,btc->bpt", stock[name]["to_q"][..., part], stock[name]["to_k"][..., part])
            expected = (scores / per_head**0.5).softmax(dim=-1)
            torch.testing.assert_close(heads.by_layer[name][:, head], expected, atol=tolerance, rtol=1e-5)
        torch.testing.assert_close(means.by_layer[name], heads.by_layer[name].mean(dim=1), atol=tolerance, rtol=1e-5)
        sums = means.by_layer[name].sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=1e-6, rtol=0)


@contextmanager
def stock_probabilities(unet: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What diffusers' own explicit processor computes: name -> (batch, heads, places, tokens) of each forward pass."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    processors = unet.attn_processors
    unet.set_attn_processor(AttnProcessor())
    for name in names:
        attention = unet.get_submodule(name)

        def scores(*args: Any, name: str = name, attention: Any = attention) -> torch.Tensor:
            found = type(attention).get_attention_scores(attention, *args)
            seen[name].append(found.detach().unflatten(0, (-1, attention.heads)))
            return found

        attention.get_attention_scores = scores
    yield seen
    for name in names:
        del unet.get_submodule(name).get_attention_scores
    unet.set_attn_processor(processors)


@pytest.mark.parametrize("kind", ["cross", "self"])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_maps_are_those_of_the_stock_explicit_processor(
    any_unet: UNet2DConditionModel, kind: Any, masked: bool
) -> None:
    arguments = inputs(any_unet, (4, 12), batch=3)
    if masked:
        arguments["encoder_attention_mask"] = torch.arange(TOKENS) < torch.tensor([[2], [5], [9]])
    names = attention_layers(any_unet, kind=kind)
    assert all(name.endswith("attn2" if kind == "cross" else "attn1") for name in names)
    with stock_probabilities(any_unet, names) as stock:
        without = any_unet(**arguments).sample
    with record_attention(any_unet, reduce=lambda p: p, kind=kind) as maps:
        recorded = any_unet(**arguments).sample
    assert list(maps.by_layer) == names
    assert (recorded - without).abs().max() <= 1e-6
    for name in names:
        torch.testing.assert_close(maps.by_layer[name], stock[name][0], atol=1e-6, rtol=1e-5)


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


@pytest.mark.parametrize("layers", [("up_blocks", "mid_block"), "up_blocks"])
@torch.no_grad()
def test_only_the_asked_layers_are_recorded(unet: UNet2DConditionModel, layers: str | Sequence[str]) -> None:
    originals = unet.attn_processors
    with record_attention(unet, layers) as maps:
        unet(**inputs(unet))
        changed = {name for name, processor in unet.attn_processors.items() if processor is not originals[name]}
    assert {name.split(".")[0] for name in maps.by_layer} == ({layers} if isinstance(layers, str) else set(layers))
    assert changed == {f"{name}.processor" for name in maps.by_layer}


def test_a_prefix_that_matches_nothing_is_answered_with_the_names(unet: UNet2DConditionModel) -> None:
    originals = unet.attn_processors
    with (
        pytest.raises(UserError, match="'up_blocks.9'; available: down_blocks.0"),
        record_attention(unet, ["up_blocks.9"]),
    ):
        pass
    assert unet.attn_processors == originals


def test_attention_that_is_not_plain_is_refused(unet: UNet2DConditionModel) -> None:
    name = attention_layers(unet, kind="self")[-1]
    originals = unet.attn_processors
    unet.get_submodule(name).processor = PAGIdentitySelfAttnProcessor2_0()
    with pytest.raises(UserError, match=f"{name} .*PAGIdentity"), record_attention(unet, kind="self"):
        pass
    assert all(unet.attn_processors[n] is p for n, p in originals.items() if not n.startswith(name))
    with (
        pytest.raises(UserError, match="Linear is the denoiser of no known model family"),
        record_attention(nn.Linear(1, 1)),
    ):
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_restored_at_the_end_also_after_an_error(unet: UNet2DConditionModel, fails: bool) -> None:
    originals, hooks = unet.attn_processors, dict(unet._forward_pre_hooks)
    with pytest.raises(RuntimeError) if fails else nullcontext(), record_attention(unet) as maps:
        unet(**inputs(unet))
        changed = {name for name, one in unet.attn_processors.items() if one is not originals[name]}
        assert changed == {f"{name}.processor" for name in attention_layers(unet)}
        assert unet._forward_pre_hooks != hooks
        if fails:
            unet(**inputs(unet) | {"encoder_hidden_states": torch.zeros(2, TOKENS, 5)})
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
def test_of_several_recorders_the_last_opened_records(unet: UNet2DConditionModel) -> None:
    with record_attention(unet) as outer, record_attention(unet, kind="self") as self_attention:
        with record_attention(unet, "mid_block") as inner:
            unet(**inputs(unet))
        assert {n.split(".")[0] for n in outer.by_layer} == {"down_blocks", "up_blocks"}
        assert list(inner.by_layer) == attention_layers(unet, "mid_block")
        assert list(self_attention.by_layer) == attention_layers(unet, kind="self")
        unet(**inputs(unet))
        assert torch.equal(*(maps.by_layer[name] for maps in (outer, inner) for name in inner.by_layer))
        assert (outer.passes, inner.passes, self_attention.passes) == (2, 1, 2)


def test_a_running_sum_does_not_count_what_checkpointing_computes_again(unet: UNet2DConditionModel) -> None:
    checkpointing(unet)
    with record_attention(unet, accumulate=True) as maps:
        for passes in (1, 2):
            output = unet(**inputs(unet)).sample
            before = {name: m.detach().clone() for name, m in maps.by_layer.items()}
            output.square().mean().backward()
            assert maps.passes == passes
            assert all(torch.equal(maps.by_layer[name], m) for name, m in before.items())


def at(unet: UNet2DConditionModel, timestep: Any, seed: int = 1) -> dict[str, Any]:
    arguments = inputs(unet)
    arguments["sample"] = torch.randn(arguments["sample"].shape, generator=torch.Generator().manual_seed(seed))
    return arguments | {"timestep": timestep}


@pytest.mark.parametrize("layers", [(), ("mid_block",), ("down_blocks", "mid_block")])
@torch.no_grad()
def test_a_running_sum_is_the_sum_of_the_passes_in_range_and_does_not_grow(
    unet: UNet2DConditionModel, layers: Sequence[str]
) -> None:
    passes = [
        at(unet, t, seed)
        for seed, t in enumerate((99, 100, torch.tensor([250, 400]), 400.0, torch.tensor([400, 401]), 100))
    ]
    inside = [1, 2, 3, 5]
    singles = []
    for n in inside:
        with record_attention(unet, layers) as single:
            unet(**passes[n])
        singles.append(single.by_layer)
    with record_attention(unet, layers, accumulate=True, timesteps=(100, 400)) as maps:
        held = []
        for n, arguments in enumerate(passes):
            unet(**arguments)
            assert maps.passes == sum(i <= n for i in inside)
            held.append(sum(m.untyped_storage().nbytes() for m in maps.by_layer.values()))
        assert held[0] == 0 and len(set(held[1:])) == 1
        assert held[1] == sum(m.nbytes for m in singles[0].values())
        assert maps.by_layer.keys() == singles[0].keys()
        for name, m in maps.by_layer.items():
            torch.testing.assert_close(m, sum(single[name] for single in singles), atol=1e-6, rtol=1e-6)
        maps.start()
        unet(**passes[2])
        assert maps.passes == 1
        assert all(torch.equal(m, singles[1][name]) for name, m in maps.by_layer.items())


@pytest.mark.parametrize(
    ("kind", "layers", "max_places"),
    [
        ("cross", (), None),
        ("cross", ("down_blocks",), None),
        ("cross", ("down_blocks", "mid_block"), None),
        ("self", (), None),
        ("self", ("up_blocks.0",), None),
        ("self", (), 16),
        ("self", ("up_blocks",), 16),
    ],
)
@torch.no_grad()
def test_run_ends_after_the_last_recorded_layer(kind: Any, layers: Sequence[str], max_places: int | None) -> None:
    unet = sd2_unet()
    arguments = inputs(unet)
    calls: list[str] = []
    for name, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
    without = unet(**arguments).sample
    with record_attention(unet, layers, kind=kind, max_places=max_places, accumulate=True) as full:
        calls.clear()
        unet(**arguments)
        every = list(calls)
    with record_attention(unet, layers, kind=kind, max_places=max_places, accumulate=True) as maps:
        for passes in (1, 2):
            calls.clear()
            assert maps.run(unet, **arguments) is None
            assert maps.passes == passes
            assert calls == every[: len(calls)]
            if passes == 1:
                assert maps.by_layer.keys() == full.by_layer.keys()
                assert all(torch.equal(m, full.by_layer[name]) for name, m in maps.by_layer.items())
    if max_places is None:
        assert calls[-1] == f"{list(maps.by_layer)[-1]}.to_v"
    else:
        # Up to the first layer on the way up that has too many places: nothing is recorded behind it.
        first = next(n for n in attention_layers(unet, ["up_blocks"], "self") if n not in maps.by_layer)
        assert calls[-1] == first.removesuffix("transformer_blocks.0.attn1") + "proj_in"
    assert full.passes == 1 and calls != every
    assert torch.equal(unet(**arguments).sample, without)


@torch.no_grad()
def test_run_ends_with_the_layer_that_runs_last_in_whatever_order_they_are_listed(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with record_attention(unet) as expected:
        unet(**inputs(unet))
    in_order = list(expected.by_layer)
    monkeypatch.setattr(
        "distill.models.stable_diffusion.UNetFamily.attention_layers", lambda *_: list(reversed(in_order))
    )
    ran: list[str] = []
    unet.conv_out.register_forward_pre_hook(lambda *_: ran.append("conv_out"))
    with record_attention(unet) as maps:
        maps.run(unet, **inputs(unet))
    assert list(maps.by_layer) == in_order and not ran
    assert all(torch.equal(maps.by_layer[name], m) for name, m in expected.by_layer.items())


@torch.no_grad()
def test_self_attention_is_recorded_up_to_a_number_of_places(any_unet: UNet2DConditionModel) -> None:
    with record_attention(any_unet, kind="self", max_places=16, accumulate=True) as maps:
        any_unet(**inputs(any_unet))
        any_unet(**inputs(any_unet))
    assert set(maps.sizes.values()) == {(4, 4)} and maps.sizes.keys() == maps.by_layer.keys()
    assert maps.passes == 2
    for m in maps.by_layer.values():
        assert m.shape == (2, 16, 16)
        torch.testing.assert_close(m.sum(dim=-1), torch.full((2, 16), 2.0))


@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("aot_eager", marks=pytest.mark.slow), pytest.param("inductor", marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_compiled_u_nets_give_the_same_maps(backend: str) -> None:
    torch.compiler.reset()
    unet = one_level_unet()
    steps = (torch.tensor([0, 10]), torch.tensor([500, 900]))
    calls = [at(unet, step, seed) for seed, step in enumerate(steps)]
    expected = []
    for arguments in calls:
        with record_attention(unet) as maps:
            output = unet(**arguments).sample
        expected.append((output, maps.by_layer))

    def output_is_right(compiled: Any, number: int) -> None:
        torch.testing.assert_close(compiled(**calls[number]).sample, expected[number][0], atol=1e-5, rtol=0)

    def maps_are_right(maps: Any, number: int, layers: str = "") -> None:
        stored = {name: m for name, m in expected[number][1].items() if name.startswith(layers)}
        assert maps.by_layer.keys() == stored.keys()
        for name, m in maps.by_layer.items():
            torch.testing.assert_close(m, stored[name], atol=1e-6, rtol=0)

    def in_place(unet: UNet2DConditionModel) -> UNet2DConditionModel:
        unet.compile(backend=backend)
        return unet

    # The second reuses what was compiled for the first, so that maps of one must not reach the other's recorder.
    for compiled in (torch.compile(unet, backend=backend), in_place(one_level_unet())):
        output_is_right(compiled, 0)
        for _ in range(2):
            with record_attention(compiled) as maps:
                for number in (0, 1):
                    output_is_right(compiled, number)
                    maps_are_right(maps, number)
                assert maps.passes == 2
            output_is_right(compiled, 0)
            assert maps.passes == 2
        with record_attention(compiled, timesteps=(400, 1000)) as maps:
            output_is_right(compiled, 0)
            assert maps.by_layer == {}
            output_is_right(compiled, 1)
            maps_are_right(maps, 1)
            maps.timesteps = (0, 20)
            maps.start()
            output_is_right(compiled, 1)
            assert maps.by_layer == {}
            output_is_right(compiled, 0)
            maps_are_right(maps, 0)
        reached: list[Any] = []
        handle = compiled.up_blocks[0].register_forward_pre_hook(lambda module, args: reached.append(module))  # noqa: B023
        with record_attention(compiled, "down_blocks") as maps:
            maps.run(compiled, **calls[1])
        maps_are_right(maps, 1, "down_blocks")
        handle.remove()
        assert reached == []
        output_is_right(compiled, 0)


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
@settings(max_examples=25)
def test_normalized_maps_go_from_0_to_1_whatever_scale_and_offset(seed: int, scale: float, offset: float) -> None:
    maps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed)).double()
    found = normalize(maps * scale + offset)
    assert torch.all(found.amin(dim=(-2, -1)) == 0) and torch.all(found.amax(dim=(-2, -1)) == 1)
    torch.testing.assert_close(found, normalize(maps))


def test_a_constant_map_becomes_0() -> None:
    assert torch.all(normalize(torch.full((1, 2, 3, 3), 0.7)) == 0)


# --- words --------------------------------------------------------------------------------------------------------


def positions(tokenizer: CLIPTokenizer, prompt: str, word: str) -> list[int]:
    """Of the tokens of each occurrence of `word`, found by the ends of CLIP's pieces, without offsets."""
    ids = tokenizer(prompt, truncation=True, max_length=77)["input_ids"]
    pieces: list[tuple[str, list[int]]] = [("", [])]
    for place, token in list(enumerate(tokenizer.convert_ids_to_tokens(ids)))[1:-1]:
        text, places = pieces[-1]
        pieces[-1] = (text + token.removesuffix("</w>"), [*places, place])
        if token.endswith("</w>"):
            pieces.append(("", []))
    asked = word.lower().replace("-", " - ").split()
    found = [
        pieces[i : i + len(asked)] for i in range(len(pieces)) if [p[0] for p in pieces[i : i + len(asked)]] == asked
    ]
    return [place for match in found for _, places in match for place in places]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a cat and a dog", None),
        ("Pleural effusion; NO effusion-like, (PLEURAL) apple.", None),
        ("Pleural effusion; NO effusion-like, (PLEURAL) apple.", ["EFFUSION", "effusion-like", "Apple"]),
        ("left/right:the,heart", ["right", "the"]),
        ("the " * 80, None),
        ("", None),
    ],
)
def test_words_are_means_over_all_their_tokens(prompt: str, words: list[str] | None) -> None:
    tokenizer = tiny_tokenizer()
    chosen = select_tokens(tokenizer, prompt, words)
    length = len(tokenizer(prompt, truncation=True, max_length=77)["input_ids"])
    asked = words_of(prompt) if words is None else words
    assert chosen.names == (("[BOS]", *asked, "[EOS]", "[PAD]"),)
    expected = {"[BOS]": [0], "[EOS]": [length - 1], "[PAD]": list(range(length, 77))}
    expected |= {word: positions(tokenizer, prompt, word) for word in asked}
    for column, name in enumerate(chosen.names[0]):
        row = torch.zeros(77)
        row[expected[name]] = 1.0 if name == "[PAD]" else 1 / len(expected[name])
        torch.testing.assert_close(chosen.matrix[0, :, column], row)


def test_of_a_word_that_truncation_cuts_the_kept_tokens_count() -> None:
    chosen = select_tokens(tiny_tokenizer(), "the " * 74 + "pleural", "pleural")
    assert chosen.names == (("[BOS]", "pleural", "[EOS]", "[PAD]"),)
    assert torch.equal(chosen.matrix[0].argmax(dim=0)[:3], torch.tensor([0, 75, 76]))
    assert torch.equal(chosen.matrix[0].sum(dim=0), torch.tensor([1.0, 1.0, 1.0, 0.0]))


def test_a_word_in_none_of_the_prompts_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    assert select_tokens(tokenizer, ["a cat", "a dog"], "cat").names == (
        ("[BOS]", "cat", "[EOS]", "[PAD]"),
        ("[BOS]", "[EOS]", "[PAD]"),
    )
    for prompt, word in (("a catalogue", "cat"), ("xyz " * 40 + "cat", "cat"), ("", "cat"), ("a cat", "")):
        with pytest.raises(UserError, match=f"'{word}' is in none"):
            select_tokens(tokenizer, prompt, [word])
    assert "cat" not in select_tokens(tokenizer, "xyz " * 40 + "cat").names[0]


def test_two_tokenizers_count_equally() -> None:
    letters = CLIPTokenizer(vocab=tiny_tokenizer().get_vocab(), merges=[], model_max_length=77)
    prompt = "pleural effusion"
    mine, theirs = (select_tokens(t, prompt) for t in (tiny_tokenizer(), letters))
    both = select_tokens([tiny_tokenizer(), letters], prompt)
    assert both.names == mine.names and not torch.equal(mine.matrix, theirs.matrix)
    torch.testing.assert_close(both.matrix, (mine.matrix + theirs.matrix) / 2)


PIECES = [
    "Pleural",
    "effusion",
    "ground-glass",
    "don't",
    "x_y",
    "1.5",
    "é",
    "Σας",
    "ß",
    "ﬁn",
    "😀",
    "👩‍⚕️",
    "<|endoftext|>",
]
# Neither marks that combine with a letter, nor the only capital whose small letter is two characters.
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs", "M"], exclude_characters="İ"), max_size=90)


@given(ANY_TEXT | st.lists(st.sampled_from(PIECES), max_size=30).map(" ".join))
@settings(max_examples=60)
def test_every_token_is_bos_word_eos_or_padding_of_any_text(prompt: str) -> None:
    tokenizer = tiny_tokenizer()
    groups = token_groups(tokenizer, prompt, 77)
    length = len(tokenizer(prompt, truncation=True, max_length=77)["input_ids"])
    assert groups.tolist() == [BOS] + [WORD] * (length - 2) + [EOS] + [PADDING] * (77 - length)
    chosen = select_tokens(tokenizer, prompt)
    names, matrix = chosen.names[0], chosen.matrix[0]
    bos, *words, eos, padding = names
    assert (bos, eos, padding) == ("[BOS]", "[EOS]", "[PAD]")
    assert set(words) <= set(words_of(prompt)) and len(words) == len(set(words))
    if length < 77:
        assert words == words_of(prompt)
    assert matrix.shape == (77, len(names)) and torch.all(matrix >= 0)
    torch.testing.assert_close(matrix.sum(dim=0), torch.tensor([*[1.0] * (len(names) - 1), 77.0 - length]))
    for column, group in ((0, BOS), (-2, EOS), (-1, PADDING)):
        assert torch.equal(matrix[:, column], (groups == group).float())
    for column in range(1, len(names) - 2):
        shares = matrix[:, column][matrix[:, column] > 0]
        assert torch.all(groups[matrix[:, column] > 0] == WORD) and torch.all(shares == shares[0])


# --- generated images ---------------------------------------------------------------------------------------------

LONG = "Pleural effusion, small; the LEFT effusion is no apple pleural"
PROMPTS = ["a cat", LONG, "the dog and a dog"]
PIPELINES: dict[str, Callable[[], Any]] = {"sd": tiny_sd, "sdxl": tiny_sdxl}


TENSORS = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


def end_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """As diffusers' documentation does it, after the first step."""
    if step == 0:
        pipe._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
    return tensors


def img2img(**call: Any) -> Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]:
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))

    def change(pipe: Any, arguments: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        kind = StableDiffusionInpaintPipeline if call.get("mask_image") is not None else StableDiffusionImg2ImgPipeline
        parts = pipe.components | {"requires_safety_checker": False}
        return kind(**parts), arguments | {"image": image, "strength": 0.7} | call

    return change


# name: pipelines, arguments of the pipeline call, of the recorder, whether each pass has two halves
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool | list[bool]]] = {
    "guided": ("sd sdxl", {"prompt": LONG}, {}, True),
    "not guided": ("sd sdxl", {"prompt": LONG, "guidance_scale": 1.0}, {}, False),
    "several": ("sd sdxl", {"prompt": PROMPTS, "num_images_per_prompt": 2}, {}, True),
    "several not guided": ("sd", {"prompt": PROMPTS, "guidance_scale": 1.0}, {"words": ["effusion", "dog"]}, False),
    "heads": ("sd sdxl", {"prompt": PROMPTS}, {"heads": "each", "layers": ["down_blocks", "up_blocks"]}, True),
    "steps": ("sd sdxl", {"prompt": LONG}, {"timesteps": (200, 700)}, True),
    "negative": ("sd sdxl", {"prompt": LONG, "negative_prompt": "dog", "height": 32}, {"layers": "mid_block"}, True),
    "callback": ("sd", {"prompt": LONG, "callback_on_step_end": end_guidance, **TENSORS}, {}, [True, False, False]),
    "image to image": ("sd", {"prompt": LONG, "from": img2img()}, {}, True),
    "inpainting": ("sd", {"prompt": LONG, "from": img2img(mask_image=torch.ones(1, 1, 64, 64))}, {}, True),
}


def draw(pipe: Any, **call: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    images: torch.Tensor = pipe(**{"num_inference_steps": 3, "output_type": "pt", "generator": generator} | call).images
    return images


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for case in CASES for kind in CASES[case][0].split()])
def test_heat_maps_of_generated_images_are_those_of_the_stock_processor(kind: str, case: str) -> None:
    _, call, recording, halves = CASES[case]
    pipe = PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 7.5, "width": 64} | call
    if "from" in call:
        pipe, call = call["from"](pipe, {k: v for k, v in call.items() if k not in ("from", "width")})
    prompts = [call["prompt"]] if isinstance(call["prompt"], str) else call["prompt"]
    names = attention_layers(pipe.unet, recording.get("layers", ()))
    with stock_probabilities(pipe.unet, names) as stock:
        without = draw(pipe, **call)
    passes = len(stock[names[0]])
    timesteps = pipe.scheduler.timesteps[-passes:].tolist()
    low, high = recording.get("timesteps", (0, 1000))
    kept = [n for n in range(passes) if low <= timesteps[n] <= high]
    assert len(kept) > 0 and (len(kept) < passes) == ("timesteps" in recording)
    with record_pipeline(pipe, call["prompt"], **recording) as maps:
        recorded = draw(pipe, **call)
    torch.testing.assert_close(recorded, without, atol=1e-5, rtol=0)
    assert maps.recorded.passes == len(kept)

    height, width = (side // 8 for side in without.shape[-2:])
    sizes = {name: round((height * width / stock[name][0].shape[2]) ** 0.5) for name in names}
    sizes = {name: (height // down, width // down) for name, down in sizes.items()}
    found = maps.heat_maps()
    assert len(found) == len(without)
    for image, heat in enumerate(found):
        prompt = prompts[image // call.get("num_images_per_prompt", 1)]
        length = len(pipe.tokenizer(prompt)["input_ids"])
        places = {"[BOS]": [0], "[EOS]": [length - 1], "[PAD]": list(range(length, 77))}
        asked = [w for w in recording.get("words", words_of(prompt)) if w in words_of(prompt)]
        places |= {word: positions(pipe.tokenizer, prompt, word) for word in asked}
        assert heat.keys() == places.keys()
        for word, tokens in places.items():
            resized = []
            for name in names:
                for n in kept:
                    probabilities = stock[name][n]
                    if halves if isinstance(halves, bool) else halves[n]:
                        probabilities = probabilities.chunk(2)[1]
                    m = probabilities[image][..., tokens].sum(dim=-1) / (1 if word == "[PAD]" else len(tokens))
                    m = m.unflatten(1, sizes[name])
                    resized.append(F.interpolate(m[None], max(sizes.values()), mode="bilinear")[0])
            expected = torch.stack(resized).mean(dim=0)
            expected = expected if "heads" in recording else expected.mean(dim=0)
            torch.testing.assert_close(heat[word], expected, atol=2e-6, rtol=1e-4)
    larger = maps.heat_maps((32, 40))[0]["[BOS]"]
    assert larger.shape[-2:] == (32, 40)


def test_a_second_call_adds_to_the_mean() -> None:
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    calls = [{"prompt": "a cat", "guidance_scale": scale} for scale in (1.0, 7.5)]
    found = []
    for some in ([calls[0]], [calls[1]], calls):
        with record_pipeline(pipe, "a cat") as maps:
            for call in some:
                draw(pipe, **call)
        found.append(maps.heat_maps()[0]["cat"])
    torch.testing.assert_close(found[2], (found[0] + found[1]) / 2)


EMBEDDINGS = {"prompt_embeds": torch.zeros(3, 77, 16), "negative_prompt_embeds": torch.ones(3, 77, 16)}
LONGER = {"prompt_embeds": torch.zeros(1, 80, 16), "negative_prompt_embeds": torch.ones(1, 80, 16)}


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize(
    ("kind", "other", "message"),
    [
        ("sd", {"prompt": "a dog"}, r"given the prompts \['a cat'\], and the pipeline prompt 'a dog'"),
        ("sd", {"prompt": ["a cat", "a dog"]}, r"and the pipeline prompt \['a cat', 'a dog'\]"),
        ("sdxl", {"prompt": "a cat", "prompt_2": "a dog"}, "and the pipeline prompt_2 'a dog'"),
        ("sd", EMBEDDINGS, "texts of 77 tokens reach the denoiser"),
        ("sd", LONGER, "texts of 80 tokens reach the denoiser"),
    ],
)
def test_a_call_with_other_texts_is_refused(kind: str, other: dict[str, Any], message: str, scale: float) -> None:
    pipe = PIPELINES[kind]()
    pipe.set_progress_bar_config(disable=True)
    originals = pipe.unet.attn_processors
    with pytest.raises((UserError, ValueError), match=message), record_pipeline(pipe, "a cat"):
        draw(pipe, guidance_scale=scale, **other)
    assert pipe.unet.attn_processors == originals and "encode_prompt" not in vars(pipe)
    draw(pipe, guidance_scale=scale, **other)


def test_calls_with_other_numbers_of_images_are_not_added_up() -> None:
    pipe = tiny_sd()
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match="num_images_per_prompt 2 follows one with 1"), record_pipeline(pipe, "a cat"):
        draw(pipe, prompt="a cat")
        draw(pipe, prompt="a cat", num_images_per_prompt=2)


def test_what_a_pipeline_cannot_give_is_said() -> None:
    pipe = tiny_sd()
    with record_pipeline(pipe, "a cat", timesteps=(0, 3)) as maps:
        pass
    with pytest.raises(ValueError, match="nothing was recorded"):
        maps.heat_maps()
    with (
        pytest.raises(UserError, match="DDIMPipeline is not"),
        record_pipeline(DDIMPipeline(pipe.unet, pipe.scheduler), "a"),
    ):
        pass
    with pytest.raises(UserError, match="'dog' is in none"), record_pipeline(pipe, "a cat", "dog"):
        pass
    pipe.unet = sd2_unet()
    with (
        pytest.raises(UserError, match="equally many.*down_blocks.0.* 2, .*mid_block.* 4"),
        record_pipeline(pipe, "a cat", heads="each"),
    ):
        pass


def test_recorders_of_one_pipeline_leave_it_as_it_was() -> None:
    """Also what a user had put in the place of its method."""
    pipe = tiny_sd()
    with record_pipeline(pipe, "a cat"), record_pipeline(pipe, "a cat") as second:
        pipe("a cat", num_inference_steps=1, output_type="latent")
    assert "encode_prompt" not in vars(pipe) and second.heat_maps()
    own = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **kwargs: own(*args, **kwargs)
    patched = pipe.encode_prompt
    with record_pipeline(pipe, "a cat"):
        assert pipe.encode_prompt is not patched
    assert pipe.encode_prompt is patched

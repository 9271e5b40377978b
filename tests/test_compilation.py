"""Compiled blocks: one graph each, also with a recorder; equal losses and maps; and nothing that stays behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fitting import log_of, train
from test_attention import at, inputs, one_level_unet
from torch import nn
from training import example

from distill.attention import attention_layers, record_attention
from distill.errors import UserError
from distill.models.compilation import CompiledBlocks, blocks

COMPILE = torch.compile


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every graph that is made, in place of compiling it. A block of several would raise an error."""
    made: list[str] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        made.append(str(graph.graph))
        return graph.forward

    def compile_(forward: Any, *, dynamic: bool, fullgraph: bool) -> Any:
        return COMPILE(forward, dynamic=dynamic, fullgraph=True, backend=backend)

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", compile_)
    yield made
    torch.compiler.reset()


@torch.no_grad()
def test_compiled_blocks_are_whole_and_give_the_same_maps_to_every_recorder(graphs: list[str]) -> None:
    unet, last = one_level_unet(), attention_layers(one_level_unet())[0]
    calls = [at(unet, torch.tensor([0, 10]), 0), at(unet, torch.tensor([500, 900]), 1)]
    expected = []
    for arguments in calls:
        with record_attention(unet) as maps:
            output = unet(**arguments).sample
        expected.append((output, maps.by_layer, dict(maps.sizes)))
    with record_attention(unet) as before:
        compiled = CompiledBlocks([unet])
        for n, arguments in enumerate(calls):
            torch.testing.assert_close(unet(**arguments).sample, expected[n][0], atol=1e-5, rtol=0)
            assert list(before.by_layer) == list(expected[n][1]) and before.sizes == expected[n][2]
            assert all(torch.equal(before.by_layer[name], m) for name, m in expected[n][1].items())
        recorded = len(graphs)
        assert recorded < len(blocks(unet)), "blocks of a size share a graph"
    with record_attention(unet) as after:
        unet(**calls[0])
        assert all(torch.equal(after.by_layer[name], m) for name, m in expected[0][1].items())
        with compiled.paused():
            unet(**calls[1])
            assert all(torch.equal(after.by_layer[name], m) for name, m in expected[1][1].items())
    assert len(graphs) == recorded, "another recorder, and passes while it is paused, compile nothing"
    reached: list[nn.Module] = []
    unet.up_blocks[0].register_forward_pre_hook(lambda module, args: reached.append(module))
    with record_attention(unet, "down_blocks") as maps:
        maps.run(unet, **calls[0])
    assert list(maps.by_layer) == [last] and not reached
    compiled.close()
    assert not any("forward" in vars(part) or "_in_compiled_block" in vars(part) for part in unet.modules())
    torch.testing.assert_close(unet(**calls[0]).sample, expected[0][0])


def test_a_compiled_block_keeps_nothing_that_checkpointing_computes_again(graphs: list[str]) -> None:
    compare_with_checkpointing()
    assert graphs


@pytest.mark.slow
def test_kernels_of_torch_compile_give_equal_maps_and_gradients() -> None:
    torch.compiler.reset()
    compare_with_checkpointing()


def compare_with_checkpointing() -> None:
    unet = one_level_unet()
    unet.enable_gradient_checkpointing()
    unet.train()
    found = []
    for compiled in (None, CompiledBlocks([unet])):
        unet.zero_grad()
        with record_attention(unet) as maps:
            output = unet(**inputs(unet)).sample
            taken = maps.take()
            (output.square().mean() + sum(m[..., 1].square().mean() for m in taken.values())).backward()
            processors = [unet.get_submodule(name).processor for name in taken]
            assert maps.by_layer == {} and [processor.kept for processor in processors] == [None] * len(taken)
        found.append([p.grad for p in unet.parameters() if p.grad is not None])
        if compiled is not None:
            compiled.close()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_a_machine_without_a_compiler_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    CompiledBlocks([])
    with pytest.raises(UserError, match=r"trainer\.compile needs a C\+\+ compiler"):
        CompiledBlocks([one_level_unet()])


def logged(folder: Path, name: str, **options: Any) -> Any:
    method, rows = example(name)
    looked: list[bool] = []

    def look(step: int) -> None:
        looked.append(any("forward" in vars(part) for part in method.modules()))

    train(method, folder, rows, on=look, sample_every_steps=1, max_steps=2, learning_rate=1e-3, **options)
    method.finish()
    assert looked == [False, False] and not any("forward" in vars(part) for part in method.modules())
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log_of(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["denoising", "attention_distillation", "attention_distillation-later", "key_lock"])
def test_a_compiled_training_has_the_losses_of_a_plain_one(name: str, tmp_path: Path, graphs: list[str]) -> None:
    """Each block in one graph, of the student and of its teacher; graphs run as they are."""
    plain = logged(tmp_path / "plain", name)
    assert not graphs
    assert logged(tmp_path / "compiled", name, compile=True) == [pytest.approx(row, rel=1e-5) for row in plain]
    assert graphs

"""Records of tensors: stacked, moved, pinned and cut as one, whatever they hold; and importable without any model
library."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recipe import ROOT
from torch.utils.data import DataLoader

from distill.data.batch import Batch, Pixels, Posterior, Tensors, TextEmbeddings, Tokens


def tensor(*shape: int) -> torch.Tensor:
    return torch.rand(shape)


def row(image: str, encoders: int, text: str, optional: frozenset[str]) -> Batch:
    images = {
        "pixels": lambda: Pixels(tensor(3, 4, 4)),
        "posterior": lambda: Posterior(tensor(4, 2, 2), tensor(4, 2, 2)),
        "flipped": lambda: Posterior(*(tensor(4, 2, 2) for _ in range(4))),
    }
    texts = {
        "tokens": lambda: Tokens(tuple(torch.randint(9, (5,)) for _ in range(encoders))),
        "embeddings": lambda: TextEmbeddings(tensor(5, 6), tensor(6) if encoders > 1 else None),
    }
    values = {
        "flippable": torch.rand(()) > 0.5,
        "size_ids": tensor(6),
        "label_tokens": torch.rand(5) > 0.5,
        "regions": torch.randint(2, (5, 3, 3), dtype=torch.uint8),
    }
    return Batch(
        images[image](), texts[text](), torch.randint(4, (5,)), torch.rand(()) > 0.5,
        **{name: values[name] for name in optional},
    )  # fmt: skip


KIND = st.tuples(
    st.sampled_from(["pixels", "posterior", "flipped"]),
    st.integers(1, 2),
    st.sampled_from(["tokens", "embeddings"]),
    st.frozensets(st.sampled_from(["flippable", "size_ids", "label_tokens", "regions"])),
)


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Tensors):
        return [leaf for item in fields(value) for leaf in leaves(getattr(value, item.name))]
    return [leaf for item in value for leaf in leaves(item)] if isinstance(value, tuple) else []


def same(a: Tensors, b: Tensors) -> bool:
    """Equal tensors of equal types, and None where the other has None."""
    ours, theirs = leaves(a), leaves(b)
    empty = [[item.name for item in fields(x) if getattr(x, item.name) is None] for x in (a, b)]
    return type(a) is type(b) and empty[0] == empty[1] and len(ours) == len(theirs) and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(ours, theirs, strict=True)
    )  # fmt: skip


@given(KIND, st.integers(1, 4), st.integers(0, 99))
def test_a_stack_holds_its_rows_and_is_cut_to_the_first(kind: Any, count: int, seed: int) -> None:
    torch.manual_seed(seed)
    rows = [row(*kind) for _ in range(count)]
    batch = Batch.stack(rows)
    assert all(leaf.shape[0] == count for leaf in leaves(batch))
    for i, one in enumerate(rows):
        assert same(batch.apply(lambda t, i=i: t[i]), one)
    for part in range(1, count + 1):
        assert same(batch.first(part), Batch.stack(rows[:part]))


@given(KIND, st.integers(0, 99))
def test_moving_reaches_every_tensor_and_keeps_the_rest(kind: Any, seed: int) -> None:
    torch.manual_seed(seed)
    batch = Batch.stack([row(*kind)])
    assert same(batch.to(torch.device("cpu")), batch)
    moved = batch.to(torch.device("meta"))
    assert type(moved) is Batch and type(moved.image) is type(batch.image) and type(moved.text) is type(batch.text)
    assert [leaf.device.type for leaf in leaves(moved)] == ["meta"] * len(leaves(batch))


def test_pinning_reaches_every_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU there is nothing to pin, so that the call is counted."""
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(id(self)) or self)
    batch = Batch.stack([row("flipped", 2, "tokens", frozenset(["regions"]))])
    assert same(batch.pin_memory(), batch)
    assert pinned == [id(leaf) for leaf in leaves(batch)]


def test_a_data_loader_stacks_rows() -> None:
    rows: Any = [row("pixels", 2, "tokens", frozenset(["flippable"])) for _ in range(4)]
    first, second = DataLoader(rows, batch_size=2, collate_fn=Batch.stack)
    assert same(first, Batch.stack(rows[:2])) and same(second, Batch.stack(rows[2:]))


def test_rows_of_other_numbers_of_tokenizers_are_no_batch() -> None:
    rows = [row("pixels", encoders, "tokens", frozenset()) for encoders in (1, 2)]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        Batch.stack(rows)


@dataclass(frozen=True)
class Named(Tensors):
    name: str
    values: torch.Tensor


def test_what_is_no_tensor_stays_as_it_is() -> None:
    one = Named("a", torch.zeros(2))
    assert Named.stack([one, replace(one, values=torch.ones(2))]).name == "a"
    assert one.first(1).name == "a" and one.first(1).values.shape == (1,)


def test_a_batch_needs_no_model_library() -> None:
    modules = "distill.data.batch, distill.tokens"
    script = f"import sys, {modules}; print(*sorted({{'diffusers', 'transformers', 'accelerate', 'peft'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

"""What a device allows: TF32 while a training runs on a GPU, the layout of weights on a CPU, and loader processes
that suit it."""

from __future__ import annotations

import pytest
import torch
from fitting import settings_of
from torch import nn

from distill.devices import channels_last, loader_processes, sent, tf32
from distill.trainer import _optimizer

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_tf32_is_allowed_on_a_gpu_but_where_measurements_are_made() -> None:
    matmul = torch.backends.cuda.matmul
    before, seen = matmul.allow_tf32, []
    with tf32(GPU):
        seen.append(matmul.allow_tf32)
        with tf32(GPU, allowed=False):
            seen.append(matmul.allow_tf32)
        seen.append(matmul.allow_tf32)
    assert seen == [True, False, True] and matmul.allow_tf32 is before
    with pytest.raises(KeyError), tf32(GPU):
        raise KeyError
    assert matmul.allow_tf32 is before
    with tf32(CPU, allowed=not before):
        assert matmul.allow_tf32 is before


def test_convolutions_have_channels_last_on_a_cpu_and_their_own_layout_again() -> None:
    """Weights that are not contiguous cannot be saved."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    weight, linear = model[0].weight, model[1].weight
    before, place = weight.detach().clone(), linear.data_ptr()
    with channels_last([model], GPU):
        assert weight.is_contiguous()
    with pytest.raises(KeyError), channels_last([nn.ReLU(), model], CPU):
        assert weight.is_contiguous(memory_format=torch.channels_last) and torch.equal(weight, before)
        raise KeyError
    assert weight is model[0].weight and weight.is_contiguous() and torch.equal(weight, before)
    assert linear.data_ptr() == place


@pytest.mark.parametrize(
    ("asked", "device", "cores", "processes", "expected"),
    [
        (None, CPU, 8, 1, 0), (None, GPU, 16, 1, 4), (None, GPU, 16, 8, 2), (None, GPU, 2, 1, 2), (0, GPU, 8, 1, 0),
        (3, CPU, 1, 1, 3),
    ],
)  # fmt: skip
def test_loader_processes_suit_the_device_and_the_cores(
    asked: int | None, device: torch.device, cores: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.devices.cores", lambda: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert loader_processes(asked, device) == expected


def test_the_optimizer_is_one_kernel_on_a_gpu_alone() -> None:
    """On a CPU it rounds otherwise, which the recorded numbers would show."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))]}]
    assert [_optimizer(list(groups), settings_of(), device).defaults["fused"] for device in (CPU, GPU)] == [None, True]


def test_what_is_sent_to_a_gpu_is_pinned_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def to(tensor: torch.Tensor, device: torch.device, non_blocking: bool = False) -> torch.Tensor:
        asked.append((device.type, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: asked.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", to)
    for device in (CPU, GPU):
        sent(torch.zeros(2), device)
    assert asked == [("cpu", False), "pinned", ("cuda", True)]

"""The base class of metrics that keep values of every update and gather those of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class GatheredMetric(Metric):
    """lists: name of a state that is a list of 1-dimensional tensors -> their type. Every process must call `compute`;
    one may have no update."""

    full_state_update = False
    is_differentiable = False
    lists: dict[str, torch.dtype]

    def __init__(self, lists: dict[str, torch.dtype], **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.lists = lists
        for name in lists:
            self.add_state(name, [], dist_reduce_fx="cat")

    def sync(self, *args: Any, **kwargs: Any) -> None:
        # torchmetrics lets a process without an update join the gathering with float32, whatever the others hold.
        for name, dtype in self.lists.items():
            held: list[Tensor] = getattr(self, name)
            if not len(held):
                held.append(torch.zeros(0, dtype=dtype, device=self.device))
        super().sync(*args, **kwargs)

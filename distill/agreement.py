"""What the processes of a launch must agree on, so that none of them waits for one that has stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from distill.errors import UserError
from distill.processes import PATIENCE


class Control:
    """Agreement between the processes of a launch, in a group of their CPUs so that no device is waited for."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.is_main, self.folder = accelerator.is_main_process, folder
        self.group = None
        if accelerator.num_processes > 1:
            self.group = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)

    def largest(self, value: int) -> int:
        """The largest value that a process gives."""
        if self.group is None:
            return value
        tensor = torch.tensor(value)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, group=self.group)
        return int(tensor)

    def on_main(self, call: Callable[[], None]) -> None:
        """Call on the main process; what goes wrong there is raised on every process, as a UserError."""
        faults: list[str | None] = [None]
        if self.is_main:
            try:
                call()
            except UserError as error:
                faults[0] = str(error)
            except OSError as error:
                faults[0] = (
                    f"{error.filename or self.folder} cannot be written: {error.strerror}; free some space, or make "
                    "the folder writable. The same command then goes on from the newest checkpoint, or starts again "
                    "where there is none"
                )
        if self.group is not None:
            torch.distributed.broadcast_object_list(faults, src=0, group=self.group)
        if faults[0] is not None:
            raise UserError(faults[0])

    def close(self) -> None:
        if self.group is not None:
            torch.distributed.destroy_process_group(self.group)


class Finite:
    """The first value that was not finite, kept on the device so that no step waits for it."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.first: dict[str, torch.Tensor] = {}

    def see(self, name: str, value: torch.Tensor, step: int) -> None:
        value = value.detach().float()
        now = torch.stack([value, torch.full_like(value, step)])
        before = self.first.get(name)
        self.first[name] = now if before is None else torch.where(before[0].isfinite(), now, before)

    def check(self, fault: Callable[[str, float, int], UserError]) -> None:
        """Raise the same fault on every process if one of them saw a value that is not finite."""
        if not self.first:
            return
        found = self.accelerator.gather(torch.stack(list(self.first.values()))[None]).cpu()
        bad = [
            (int(step), place, float(value))
            for process in found
            for place, (value, step) in enumerate(process)
            if not value.isfinite()
        ]
        if bad:
            step, place, value = min(bad, key=lambda entry: entry[:2])
            raise fault(list(self.first)[place], value, step)

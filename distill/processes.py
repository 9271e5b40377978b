"""The processes of `accelerate launch`, for what comes before an Accelerator."""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """PartialState of all processes: on a CPU its default takes each for the only one, and an Accelerator keeps to that."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))

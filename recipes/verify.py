"""What a base takes from an adapter file, what it ignores, and how much that changes.

    accelerate launch recipes/verify.py --adapter checkpoints/finetune --base.name BASE

The file may be in the layout of diffusers, of peft, or of kohya's scripts. Nothing is trained or written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from distill.cli import main
from distill.config import BaseConfig
from distill.settings import Settings, Text

if TYPE_CHECKING:
    from distill.models.verify import Verified

SHOWN = 5
"""Ignored tensors that are listed."""


class VerifyConfig(Settings):
    """Say what a base takes from an adapter file, and how much that changes.

    accelerate launch recipes/verify.py --adapter FILE --base.name BASE
    """

    common: ClassVar[tuple[str, ...]] = ("adapter", "base.name", "as_json")
    adapter: Text | None = None
    """Adapter: a .safetensors file of diffusers, peft or kohya's scripts, or the folder that holds it. Required."""
    base: BaseConfig = BaseConfig()
    as_json: bool = False
    """Print JSON, with every ignored tensor."""


def text_of(found: Verified) -> str:
    """The lines for a reader."""
    total = found.loaded + len(found.ignored)
    lines = [f"{found.file}, layout of {found.layout}: the base takes {found.loaded} of {total} tensors"]
    lines += [f"  ignored: {name}: {why}" for name, why in list(found.ignored.items())[:SHOWN]]
    if len(found.ignored) > SHOWN:
        lines.append(f"  and {len(found.ignored) - SHOWN} more; --as_json true lists them")
    for group, count in found.layers.items():
        lines.append(f"{group}: {count} layers, change {found.change[group]:.2%} of their weights' norm")
    return "\n".join([*lines, f"output of the denoiser on fixed inputs: change {found.output_change:.2%} of its norm"])


def verify_adapter(config: VerifyConfig) -> None:
    import json
    from dataclasses import asdict
    from pathlib import Path

    from distill.errors import UserError
    from distill.experiment.run import quiet_libraries
    from distill.models import load_model
    from distill.models.verify import verify
    from distill.processes import process_state

    quiet_libraries()
    if not process_state().is_main_process:
        return
    if config.adapter is None:
        raise UserError("adapter is missing: a .safetensors file, or the folder that holds it")
    found = verify(load_model(config.base).freeze(), Path(config.adapter))
    print(json.dumps(asdict(found), indent=1) if config.as_json else text_of(found))
    if not found.loaded:
        raise UserError(f"{config.base.name} takes nothing of {config.adapter}; it is for another base")


if __name__ == "__main__":
    main(verify_adapter, VerifyConfig)

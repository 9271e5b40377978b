"""A base made of a base and a run folder on it: one stock pipeline, that a student is trained from."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from distill.components import SUBSET_FILE, Components, load_components
from distill.config import BaseConfig, CompressConfig, DistillStepsConfig
from distill.runs import claim, quiet_libraries

Change = Callable[[Components], Components]


@contextmanager
def derived_base(
    config: CompressConfig | DistillStepsConfig, name: str, change: Change = lambda components: components
) -> Iterator[BaseConfig]:
    """Write base and run, after `change`, to <output_dir>/<name> unless it is there, and give it as a base.

    Of a dry run nothing stays. Raises UserError if output_dir holds a run with another configuration.
    """
    quiet_libraries()
    folder = Path(config.output_dir)
    with tempfile.TemporaryDirectory() as scratch:
        path = (Path(scratch) if config.dry_run else folder) / name
        if config.dry_run:
            _write(config, path, change)
        else:
            claim(folder, config)
            with PartialState().main_process_first():
                if PartialState().is_main_process and not (folder / "config.yaml").exists():
                    # Of a command that was refused after it, perhaps with other options.
                    shutil.rmtree(path, ignore_errors=True)
                if not path.exists():
                    _write(config, path, change)
        yield BaseConfig(name=str(path), frozen_dtype=config.base.frozen_dtype)


def _write(config: CompressConfig | DistillStepsConfig, folder: Path, change: Change) -> None:
    """At `folder` only when it is whole."""
    components = load_components(config.base, config.run)
    if any("lora_" in name for module in components.modules() for name, _ in module.named_parameters()):
        components.pipeline.fuse_lora()
        components.pipeline.unload_lora_weights()
    components = change(components)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        components.pipeline.save_pretrained(partial, safe_serialization=True)
        if components.subset:
            content = {"layers": components.subset.layers, "timesteps": components.subset.timesteps}
            (partial / SUBSET_FILE).write_text(json.dumps(content), encoding="utf-8")
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)

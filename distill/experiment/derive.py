"""A base made of a base and a run folder on it: one stock pipeline, which a student is trained from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from distill.config import BaseConfig, RunConfig
from distill.data.cache import weights_fingerprint
from distill.errors import UserError
from distill.experiment.folder import scratch_folder
from distill.experiment.run import claim, quiet_libraries
from distill.files import read_json, whole_folder, write_json
from distill.models import Model, load_model
from distill.models.export import base_of, name_base
from distill.models.loading import SUBSET_FILE
from distill.processes import process_state

Change = Callable[[Model], Model]
SOURCE = "made_of.json"
"""Hash of the weights of base and run, before the change."""


@contextmanager
def derived_base(
    config: RunConfig, run: str | None, name: str, change: Change = lambda model: model
) -> Iterator[BaseConfig]:
    """Write base and run, after `change`, to <output_dir>/<name> unless it is there, and give it as a base.

    Nothing stays of a dry run, nor of a configuration that is refused. Raises UserError if output_dir holds a run with
    another configuration, and for a run that is a pipeline of its own.
    """
    quiet_libraries()
    if run is not None and (Path(run) / "model_index.json").exists():
        raise UserError(f"run: {run} is a whole pipeline, not a run folder; give it as base.name, without run")
    state, folder = process_state(), Path(config.output_dir)
    if not config.dry_run:
        claim(folder, config)
    started = (folder / "config.yaml").exists()
    with scratch_folder() if config.dry_run else nullcontext(folder) as parent:
        path = parent / name
        state.wait_for_everyone()
        try:
            with state.main_process_first():
                if state.is_main_process and not started:
                    shutil.rmtree(path, ignore_errors=True)  # of a command that was killed, perhaps with other options
                elif state.is_main_process and path.exists():
                    _forget_other(config.base, run, path)
                if not path.exists():
                    _write(config.base, run, path, change)
            own = {"name": str(path), "single_file_config": None, "revision": None, "variant": None}
            yield config.base.model_copy(update=own)
            state.wait_for_everyone()
        finally:
            if state.is_main_process and not (folder / "config.yaml").exists():
                shutil.rmtree(path, ignore_errors=True)


def fused(model: Model) -> Model:
    """With plain weights: adapters are fused, so that they cost no time and no parameters of their own."""
    if any("lora_" in name for module in model.modules() for name, _ in module.named_parameters()):
        model.pipeline.fuse_lora()
        model.pipeline.unload_lora_weights()
    return model


def whole(base: BaseConfig, run: str | None) -> Model:
    """Base and run as plain weights."""
    return fused(load_model(base, run))


def _forget_other(base: BaseConfig, run: str | None, path: Path) -> None:
    """Remove the folder if base and run have other weights now. Raises UserError if a student was begun from it."""
    try:
        known = read_json(path / SOURCE)["weights"]
    except (OSError, UserError, KeyError, TypeError):
        return
    if known == weights_fingerprint(load_model(base, run).modules()):
        return
    if any(path.parent.glob("**/cost.json")) or any(path.parent.glob("*/state/step-*")):
        raise UserError(
            f"{run or base.name} has other weights than when {path} was made from it, and a student was begun from "
            "that. Put back what was there, or choose another --output_dir"
        )
    shutil.rmtree(path)


def _write(base: BaseConfig, run: str | None, folder: Path, change: Change) -> None:
    """At `folder` only when it is whole."""
    model = load_model(base, run)
    # Before adapters are fused: the last bits of that product depend on the processor.
    source = weights_fingerprint(model.modules())
    model = change(fused(model))
    with whole_folder(folder) as partial:
        write_json(partial / SOURCE, {"weights": source})
        model.pipeline.save_pretrained(partial, safe_serialization=True)
        name_base(partial, base_of(model))
        if model.subset:
            write_json(partial / SUBSET_FILE, {"layers": model.subset.layers, "timesteps": model.subset.timesteps})

"""What a folder holds for stock loaders, and the code that loads it into a stock diffusers pipeline."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.errors import UserError
from distill.files import JsonObject, read_json

LORA_FILE = "pytorch_lora_weights.safetensors"
PHANTOM = "checkpoints/phantom-base"
# Folder of a part -> library and class, where its config.json does not name one.
PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "transformer": ("diffusers", "AutoModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
PLAIN_BASE, EVALUATED = "base", "model"
"""Names that recipes give the base itself, and the run that evaluate.py measures."""
WHOLE_BASE, PRUNED_BASE = DERIVED_BASES = "whole_base", "pruned_base"
"""Folders in a run folder: the base and run, in one or made smaller, that distill_steps.py and compress.py train on."""


def exported(folder: Path) -> dict[str, str]:
    """Part -> file or folder name of what `folder` holds; empty where it holds no part."""
    found = {part: part for part in PARTS if (folder / part).is_dir()}
    return found | ({"lora": LORA_FILE} if (folder / LORA_FILE).exists() else {})


def public_base(name: str) -> str | None:
    """The base as anyone may load it: the embedded one or a hub id. None for a folder of this machine."""
    if name == "phantom" or f"/{Path(name).as_posix()}".endswith(f"/{PHANTOM}"):
        return PHANTOM
    return name if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).exists() else None


def plain_name(name: str) -> str:
    """A base without a path of this machine: a hub id stays, also that of a folder of the hub's cache; of any other
    folder or file its last name."""
    cached = re.search(r"(?:^|[\\/])models--([\w.-]+?)--([\w.-]+)[\\/]snapshots(?:[\\/]|$)", name)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if name == "" or public_base(name) == name:
        return name
    return re.split(r"[\\/]", name.rstrip("\\/"))[-1] if name.strip("./\\") else Path(name).resolve().name


def _class_of(folder: Path, part: str) -> tuple[str, str]:
    path = folder / part / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name := config.get("_class_name"):
        return "diffusers", name
    return ("transformers", config["architectures"][0]) if config.get("architectures") else PARTS[part]


def loading_code(
    base: str,
    folder: Path,
    parts: Mapping[str, str],
    prompt: str | None,
    *,
    few_steps: int | None = None,
    revision: str | None = None,
    variant: str | None = None,
    caption_chunks: int = 1,
) -> str:
    """Python that loads `parts` (see `exported`) of `folder` on `base` and draws `prompt`.

    few_steps: of a model that draws in so many steps of LCMScheduler, without guidance. revision, variant: of the base.
    caption_chunks: that it was trained with.
    """
    modules = {part: _class_of(folder, part) for part in PARTS if part in parts}
    imports = {"diffusers": ["DiffusionPipeline", *(["LCMScheduler"] if few_steps else [])]}
    for package, name in modules.values():
        imports[package] = [*imports.get(package, []), name]
    lines = ["import torch"]
    lines += [f"from {package} import {', '.join(dict.fromkeys(names))}" for package, names in imports.items()]
    if caption_chunks > 1:
        lines.append("from distill.models import prompt_embeddings")
    # Relative to where the run was started; no path of this machine.
    place = folder.resolve()
    shown = place.relative_to(Path.cwd()).as_posix() if place.is_relative_to(Path.cwd()) else place.name
    known = public_base(base)
    if known is None and Path(base).is_dir() and place in Path(base).resolve().parents:
        # A base that the run made, such as one with fewer blocks, lies in the run folder.
        known = f"{shown}/{Path(base).resolve().relative_to(place).as_posix()}"
    note = "" if known else "  # put the hub id or folder of the base that this model was trained from"
    lines += ["", f"base = {known or 'BASE'!r}{note}"]
    if parts:
        lines.append(f"folder = {shown!r}  # the folder of this model")
    lines += [f'{part} = {name}.from_pretrained(folder, subfolder="{part}")' for part, (_, name) in modules.items()]
    given = {"revision": revision, "variant": variant} if known else {}
    keywords = [f"{part}={part}" for part in modules] + [f"{key}={value!r}" for key, value in given.items() if value]
    # A base saved in 16 bits would otherwise give parts of different types.
    keywords.append("torch_dtype=torch.float32")
    lines.append(f"pipe = DiffusionPipeline.from_pretrained({', '.join(['base', *keywords])})")
    if "lora" in parts:
        lines.append("pipe.load_lora_weights(folder)")
    sampling = "num_inference_steps=20"
    if few_steps:
        lines.append("pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)")
        sampling = f"num_inference_steps={few_steps}, guidance_scale=1.0"
    text = repr(prompt or "a caption")
    if caption_chunks > 1:
        text = f"**prompt_embeddings(pipe, {text}, chunks={caption_chunks})"
    return "\n".join([*lines, f"image = pipe({text}, {sampling}).images[0]"])


def example_prompt(*run_folders: Path) -> str | None:
    """The shortest caption of the held-out examples of a run, on one line of at most 200 characters."""
    for path in (folder / "real" / "examples.jsonl" for folder in run_folders):
        if path.is_file():
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
            captions = [" ".join(str(row["caption"]).split())[:200] for row in rows]
            if any(captions):
                return min(filter(None, captions), key=len)
    return None


def code_of(base: str, folder: Path, parts: Mapping[str, str], config: Mapping[str, Any], prompt: str | None) -> str:
    """Code that loads `parts` of `folder`, with the sampler and the base's revision of the run's configuration."""
    evaluation, origin = config.get("evaluation") or {}, config.get("base") or {}
    few_steps = evaluation.get("num_inference_steps") if evaluation.get("scheduler") == "lcm" else None
    options = {key: origin.get(key) for key in ("revision", "variant")}
    chunks = origin.get("caption_chunks") or 1
    return loading_code(base, folder, parts, prompt, few_steps=few_steps, caption_chunks=chunks, **options)


def code_of_arm(run_dir: Path, arm: str, config: JsonObject, *, trained: bool) -> str:
    """The code that loads a model of a run; empty where no folder is known to hold its weights, as those of the images
    of another tool. config: the run's; an arm that was measured in another way, such as a few-step student, has its
    own evaluation in its metrics.json. trained: whether the run trained it."""
    origin, measured = dict(config.get("base") or {}), run_dir / arm / "metrics.json"
    with contextlib.suppress(UserError, AttributeError, KeyError, TypeError):  # a base has none, and it may be damaged
        config = config | {"evaluation": read_json(measured)["settings"]["evaluation"]}
    folders = [run_dir / arm]
    if trained:  # by a recipe that trains one model
        folders.append(run_dir)
    elif arm == EVALUATED and config.get("run"):
        folders.append(Path(config["run"]))
    folder = next((f for f in folders if exported(f)), None)
    if "name" not in origin or (folder is None and arm != PLAIN_BASE):
        return ""
    derived = [run_dir / name for name in DERIVED_BASES if (run_dir / name).is_dir()]
    if derived:  # what the student was trained on, and not the base that both were made of
        origin = {"name": str(derived[0]), "caption_chunks": origin.get("caption_chunks")}
    parts = exported(folder) if folder else {}
    return code_of(origin["name"], folder or run_dir, parts, {**config, "base": origin}, example_prompt(run_dir))

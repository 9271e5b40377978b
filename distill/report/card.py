"""README.md of a trained run folder (a Hugging Face model card), and the code that loads what a folder holds."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.files import write_atomic
from distill.report.document import UNKNOWN, Table, escape_markdown, markdown_table
from distill.report.results import parse_metrics
from distill.report.tables import METRICS, flatten, format_count, format_estimate, format_seconds

LORA_FILE = "pytorch_lora_weights.safetensors"
PHANTOM = "checkpoints/phantom-base"
# Folder of a part -> library and class, where its config.json does not name one.
_PARTS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "transformer": ("diffusers", "ModelMixin"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
_SETTINGS = ("data.kind", "data.resolution", "trainer.max_steps", "trainer.batch_size", "trainer.learning_rate", "seed")


def exported(folder: Path) -> dict[str, str]:
    """Part -> file or folder name of what `folder` holds for stock loaders."""
    found = {part: part for part in _PARTS if (folder / part).is_dir()}
    return found | ({"lora": LORA_FILE} if (folder / LORA_FILE).exists() else {})


def public_base(name: str) -> str | None:
    """The base as anyone may load it: the embedded one or a hub id. None for a path of this machine."""
    if name == "phantom" or Path(name).as_posix().endswith(PHANTOM):
        return PHANTOM
    return name if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).exists() else None


def example_prompt(*run_folders: Path) -> str | None:
    """The first held-out caption of a run."""
    for path in (folder / "real" / "examples.jsonl" for folder in run_folders):
        if path.is_file() and (line := path.read_text(encoding="utf-8").partition("\n")[0]):
            return str(json.loads(line)["caption"])
    return None


def _class_of(folder: Path, part: str) -> tuple[str, str]:
    path = folder / part / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if name := config.get("_class_name"):
        return "diffusers", name
    return ("transformers", config["architectures"][0]) if config.get("architectures") else _PARTS[part]


def loading_code(
    base: str, folder: Path, parts: Mapping[str, str], prompt: str | None, config: Mapping[str, Any]
) -> str:
    """Python that loads `parts` of `folder` into a stock diffusers pipeline and draws `prompt`."""
    flat = dict(flatten(config))
    few_steps = flat.get("evaluation.num_inference_steps") if flat.get("evaluation.scheduler") == "lcm" else None
    modules = {part: _class_of(folder, part) for part in _PARTS if part in parts}
    imports = {"diffusers": ["DiffusionPipeline", *(["LCMScheduler"] if few_steps else [])]}
    for package, name in modules.values():
        imports[package] = [*imports.get(package, []), name]
    location, known = folder.resolve(), public_base(base)
    inside = location.is_relative_to(Path.cwd())
    shown = location.relative_to(Path.cwd()).as_posix() if inside else location.name
    note = "" if known else "  # put here the hub id or folder of the base that this model was trained from"
    lines = [f"from {package} import {', '.join(dict.fromkeys(names))}" for package, names in imports.items()]
    lines += ["", f"base = {known or 'BASE'!r}{note}", *([f"folder = {shown!r}"] if parts else [])]
    lines += [f'{part} = {name}.from_pretrained(folder, subfolder="{part}")' for part, (_, name) in modules.items()]
    lines.append(f"pipe = DiffusionPipeline.from_pretrained(base{''.join(f', {part}={part}' for part in modules)})")
    lines += ["pipe.load_lora_weights(folder)"] if "lora" in parts else []
    lines += ["pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)"] if few_steps else []
    sampling = f"num_inference_steps={few_steps}, guidance_scale=1.0" if few_steps else "num_inference_steps=20"
    return "\n".join([*lines, f"image = pipe({prompt or 'a caption'!r}, {sampling}).images[0]"])


def write_model_card(
    arm_dir: Path,
    metrics_for_arm: Mapping[str, Any],
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    *,
    base_name: str,
    export: Mapping[str, str],
) -> Path:
    """Write README.md of one trained model.

    Args:
        arm_dir: folder of the exported files. The example prompt is from real/ in it or beside it.
        metrics_for_arm: the arm's entry in metrics.json.
        config: resolved configuration of the run, as nested dictionaries.
        provenance: `provenance` of metrics.json.
        base_name: hub id or folder of the base, or `phantom`. The card does not show a folder of this machine.
        export: file or folder name of each exported part: `lora`, `unet`, `text_encoder`, `text_encoder_2`.

    Raises:
        ValueError: `export` names an unknown part.
    """
    if unknown := [part for part in export if part not in (*_PARTS, "lora")]:
        raise ValueError(f"unknown exported part(s) {', '.join(unknown)}; known: lora, {', '.join(_PARTS)}")
    arm = parse_metrics({"arms": {"arm": metrics_for_arm}, "provenance": {}}).arms["arm"]
    base, flat = public_base(base_name), dict(flatten(config))
    front = [f"base_model: {json.dumps(base)}"] if base else []  # a JSON string is a YAML string
    front += ["tags:", *(f"- {tag}" for tag in ("text-to-image", "diffusers", *(["lora"] if "lora" in export else [])))]
    code = loading_code(base_name, arm_dir, export, example_prompt(arm_dir, arm_dir.parent), config)
    rows = [[m.label, *format_estimate(arm.estimate(m.key), m.unit), m.meaning] for m in METRICS]
    keys = [*_SETTINGS, *(("lora.rank", "lora.alpha") if "lora" in export else ())]
    keys += [] if flat.get("data.kind") != "phantom" else ["data.train_size"]
    settings = ", ".join(f"{key} {flat[key]}" for key in keys if flat.get(key, UNKNOWN) != UNKNOWN)
    word, quality = arm.localization and arm.localization.maps.get("word"), arm.quality
    sizes = [f"{word.images} held-out images with {word.pairs} image-finding pairs"] if word else []
    sizes += [f"{quality.images} generated images with features {quality.features or UNKNOWN}"] if quality else []
    made = (
        f"Trained parts: {', '.join(export)}. {format_count(arm.cost.trainable_parameters)} trained parameters, "
        f"{format_count(arm.cost.steps)} steps, {format_seconds(arm.cost.train_seconds)}."
        if export
        else "Nothing was trained: the numbers are the base's own."
    )
    origin = {key: provenance[key] for key in ("commit", "date", "device") if provenance.get(key)}
    parts = [
        "\n".join(["---", "library_name: diffusers", "pipeline_tag: text-to-image", *front, "---"]),
        f"# {escape_markdown(arm_dir.resolve().name)}",
        f"A text-to-image diffusion model, fine-tuned from {escape_markdown(base or 'a base of your own')}.",
        f"```python\n{code}\n```",
        escape_markdown(f"{made} Settings: {settings}." if settings else made),
        markdown_table(Table(["metric", "value", "95 % interval", "meaning"], [r for r in rows if r[1] != UNKNOWN])),
        escape_markdown(f"Measured on {' and '.join(sizes)}." if sizes else "Not measured."),
        "Limits: Not for clinical use. Generated images show no real patient. The numbers hold for these held-out images and "
        "one training seed. The licences of the base and of the training data apply.",
        escape_markdown(", ".join(f"{key} {value}" for key, value in origin.items())),
    ]
    return write_atomic(arm_dir / "README.md", "\n\n".join(part for part in parts if part) + "\n")

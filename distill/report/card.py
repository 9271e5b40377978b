"""README.md of a trained run folder: a Hugging Face model card."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill.files import write_atomic
from distill.report.document import UNKNOWN, Cell, Table, escape_markdown, markdown_table
from distill.report.tables import METRICS, estimate, flatten, format_count, format_estimate, format_seconds, lookup

_PARTS = {
    "lora": "LoRA adapter",
    "unet": "U-Net, all weights",
    "text_encoder": "text encoder, all weights",
    "text_encoder_2": "second text encoder, all weights",
}
_CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
}
# What a reader wants to know of the training; the whole configuration is in config.yaml.
_SETTINGS = (
    "method",
    "text_encoder",
    "lora.rank",
    "lora.alpha",
    "data.kind",
    "data.resolution",
    "data.train_size",
    "trainer.max_steps",
    "trainer.batch_size",
    "trainer.gradient_accumulation_steps",
    "trainer.learning_rate",
    "trainer.text_encoder_learning_rate",
    "lora_learning_rate",
    "trainer.mixed_precision",
    "trainer.ema_decay",
    "denoising.caption_dropout",
    "denoising.min_snr_gamma",
    "distillation.teacher",
    "distillation.token_kl_weight",
    "distillation.place_kl_weight",
    "distillation.mass_weight",
    "blocks.layers_per_block",
    "blocks.remove_mid_block",
    "blocks.remove_stages",
    "blocks.transformer_layers",
    "consistency.guidance_scale",
    "consistency.solver_steps",
    "seed",
    "data.seed",
    "evaluation.seed",
)


def _base_location(base_name: str) -> str:
    # The word is this project's own; a stock pipeline wants the folder.
    return "checkpoints/phantom-base" if base_name == "phantom" else base_name


def _folder_location(arm_dir: Path) -> str:
    # As the run was started: relative to the same place as the base's folder, and nothing of the machine in the card.
    path = arm_dir.resolve()
    return path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else path.name


def _class_names(arm_dir: Path, export: Mapping[str, str]) -> dict[str, str]:
    """Class of each exported text encoder, as its config.json names it: a base may have another encoder than CLIP's."""
    names: dict[str, str] = {}
    for part in ("text_encoder", "text_encoder_2"):
        path = arm_dir / part / "config.json"
        if part in export and path.is_file():
            architectures = json.loads(path.read_text(encoding="utf-8")).get("architectures")
            names |= {part: architectures[0]} if architectures else {}
    return names


def loading_code(
    base_name: str,
    folder: str,
    export: Mapping[str, str],
    few_steps: int | None = None,
    class_names: Mapping[str, str] = types.MappingProxyType({}),
) -> str:
    """Python that loads the parts exported to `folder` into a stock diffusers pipeline.

    few_steps: of a model that draws in so many steps of LCMScheduler, without guidance.
    class_names: part -> class, where it is not that of Stable Diffusion.
    """
    classes = {part: (package, class_names.get(part, name)) for part, (package, name) in _CLASSES.items()}
    folders = [part for part in classes if part in export]
    imports = {"diffusers": ["DiffusionPipeline"] + (["LCMScheduler"] if few_steps is not None else [])}
    for part in folders:
        package, name = classes[part]
        imports.setdefault(package, []).append(name)
    lines = ["import torch", *(f"from {package} import {', '.join(names)}" for package, names in imports.items())]
    lines += ["", f"base = {_base_location(base_name)!r}"]
    if export:
        lines.append(f"folder = {folder!r}  # the folder of this card")
    for part in folders:
        lines.append(f'{part} = {classes[part][1]}.from_pretrained(folder, subfolder="{part}")')
    parts = "".join(f", {part}={part}" for part in folders)
    # A base saved in 16 bits would otherwise give parts of different types.
    lines.append(f"pipe = DiffusionPipeline.from_pretrained(base{parts}, torch_dtype=torch.float32)")
    if "lora" in export:
        lines.append("pipe.load_lora_weights(folder)")
    sampling = "num_inference_steps=20"
    if few_steps is not None:
        lines.append("pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)")
        sampling = f"num_inference_steps={few_steps}, guidance_scale=1.0"
    lines.append(f'image = pipe("Small left pleural effusion.", {sampling}).images[0]')
    return "\n".join(lines)


def _front_matter(base_name: str, export: Mapping[str, str]) -> str:
    tags = ["text-to-image", "stable-diffusion", "diffusers", *(["lora"] if "lora" in export else [])]
    # A JSON string is a YAML string, whatever it holds.
    base = json.dumps(_base_location(base_name))
    listed = "\n".join(f"- {tag}" for tag in tags)
    return f"---\nlibrary_name: diffusers\npipeline_tag: text-to-image\nbase_model: {base}\ntags:\n{listed}\n---"


def _metrics_table(metrics_for_arm: Mapping[str, Any]) -> Table:
    rows = []
    for metric in METRICS:
        value, interval = format_estimate(estimate(metrics_for_arm, metric), metric.unit)
        rows.append([metric.label, value, interval, metric.meaning])
    return Table(["metric", "value", "95 % interval", "what it is"], rows)


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
        arm_dir: folder that holds the exported files.
        metrics_for_arm: the arm's entry in metrics.json.
        config: resolved configuration of the run, as nested dictionaries.
        provenance: `provenance` of metrics.json.
        base_name: hub id or folder of the base, or `phantom`.
        export: file or folder name of each exported part; parts are `lora`, `unet`, `text_encoder`, `text_encoder_2`.

    Raises:
        ValueError: `export` names an unknown part.
    """
    unknown = [part for part in export if part not in _PARTS]
    if unknown:
        raise ValueError(f"unknown exported part(s) {', '.join(unknown)}; known: {', '.join(_PARTS)}")
    cost = lookup(metrics_for_arm, "cost") or {}
    name = arm_dir.resolve().name
    base = escape_markdown(_base_location(base_name))
    files = [[Path(export[part]).name, text] for part, text in _PARTS.items() if part in export]
    trained = ", ".join(text for part, text in _PARTS.items() if part in export)
    parts = [
        _front_matter(base_name, export),
        f"# {escape_markdown(name)}",
        f"A text-to-image diffusion model, fine-tuned from {base}.",
        "## What was trained",
    ]
    if export:
        steps, count = format_count(cost.get("steps")), format_count(cost.get("trainable_parameters"))
        parts.append(
            f"{trained}: {count} trained parameters, {steps} steps, {format_seconds(cost.get('train_seconds'))}. "
            "Everything else is the base's."
        )
        parts.append(markdown_table(Table(["file", "what it is"], files)))
    else:
        parts.append("Nothing: the numbers below are the base's own.")
    flat = dict(flatten(config))
    few_steps = int(flat["evaluation.num_inference_steps"]) if flat.get("evaluation.scheduler") == "lcm" else None
    settings = [[key, flat[key]] for key in _SETTINGS if key in flat]
    if settings:
        parts.append("Main settings (all of them: `settings` in the `metrics.json` of this model):")
        parts.append(markdown_table(Table(["setting", "value"], settings)))
    code = loading_code(base_name, _folder_location(arm_dir), export, few_steps, _class_names(arm_dir, export))
    parts += ["## How to load it", f"```python\n{code}\n```"]
    parts += ["## How it was measured", markdown_table(_metrics_table(metrics_for_arm))]
    word = lookup(metrics_for_arm, "localization", "word") or {}
    quality = lookup(metrics_for_arm, "quality") or {}
    parts.append(
        f"Localization: {format_count(word.get('images'))} held-out images, "
        f"{format_count(word.get('pairs'))} pairs of image and finding. "
        f"Quality: {format_count(quality.get('images'))} generated images, "
        f"features: {escape_markdown(quality.get('features') or UNKNOWN)}. "
        "Intervals are by bootstrap over images; they do not cover the choice of training seed. FID depends on the "
        "number of images and on the features: compare it only with numbers made in the same way."
    )
    parts += [
        "## Limits",
        "- Not for clinical use: no diagnosis, no treatment, no triage. Generated images show no real patient and must "
        "not be passed off as real.\n"
        "- The numbers hold for the held-out images of this run; other data, scanners or caption styles may give "
        "others.\n"
        "- An attention map says where the model looks, not why; a good map is no proof that a finding is drawn "
        "correctly.\n"
        "- The licence and the limits of the base and of the training data hold for this model too.",
        "## Provenance",
    ]
    # The configuration is in config.yaml; it would bury the rest here.
    rows = list(flatten({key: value for key, value in provenance.items() if key != "config"}))
    parts.append(markdown_table(Table(["", "value"], [[key, Cell(text)] for key, text in rows])))
    return write_atomic(arm_dir / "README.md", "\n\n".join(parts) + "\n")

"""README.md of a trained run folder: a Hugging Face model card of one screen."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from distill.evaluation.results import parse_metrics
from distill.files import write_atomic
from distill.models.kohya import KOHYA_FILE
from distill.models.stock import PARTS, code_of, example_prompt, public_base
from distill.report.document import UNKNOWN, Table, escape_markdown, markdown_table
from distill.report.memorization import sentence
from distill.report.summary import sample
from distill.report.tables import METRICS, flatten, format_count, format_estimate, format_seconds

_SETTINGS = (
    "data.kind", "data.resolution", "trainer.max_steps", "trainer.batch_size", "trainer.learning_rate", "seed",
    "blocks.layers_per_block", "blocks.remove_mid_block", "blocks.remove_stages", "blocks.transformer_layers",
)  # fmt: skip
_LIMITS = (
    "Limits: not for clinical use. Generated images are not meant to show a real patient. The numbers hold for these "
    "held-out images. The licences of the base and of the training data apply."
)
_FOUND = ("Memorization", "What is wrong", "What tells its images from real ones")
_PARAGRAPH = r"\n\n\*\*{}\.\*\*.*"


def mark_model_card(arm_dir: Path, heading: str, said: str) -> None:
    """Say in a card what an evaluation found, in place of what stood under `heading`, one of _FOUND; "" removes it."""
    text = re.sub(_PARAGRAPH.format(re.escape(heading)), "", _card_of(arm_dir))
    if (limits := f"\n\n{_LIMITS[:7]}") in text:
        marked = f"\n\n**{heading}.** {escape_markdown(said)}{limits}" if said else limits
        write_atomic(arm_dir / "README.md", text.replace(limits, marked, 1))


def _card_of(arm_dir: Path) -> str:
    return path.read_text(encoding="utf-8") if (path := arm_dir / "README.md").is_file() else ""


def write_model_card(
    arm_dir: Path,
    metrics_for_arm: Mapping[str, object],
    config: Mapping[str, object],
    provenance: Mapping[str, object],
    *,
    base_name: str,
    export: Mapping[str, str],
) -> Path:
    """Write README.md of one trained model to `arm_dir`, which holds its exported files.

    metrics_for_arm: the arm's entry in metrics.json. config: resolved configuration of the run. base_name: hub id,
    folder or `phantom`; the card shows no folder of this machine. export: see `distill.models.stock.exported`. The
    example prompt is from real/ in `arm_dir` or beside it. Raises ValueError if `export` names an unknown part.
    """
    if unknown := [part for part in export if part not in (*PARTS, "lora")]:
        raise ValueError(f"unknown exported part(s) {', '.join(unknown)}; known: lora, {', '.join(PARTS)}")
    results = parse_metrics({"arms": {"arm": metrics_for_arm}, "provenance": {}})
    arm = results.arms["arm"]
    said_before = {name: "".join(re.findall(_PARAGRAPH.format(name), _card_of(arm_dir))[:1]).strip() for name in _FOUND}
    said_before |= {_FOUND[0]: f"**{_FOUND[0]}.** {escape_markdown(sentence(m))}"} if (m := arm.memorization) else {}
    base, flat, adapter = public_base(base_name), dict(flatten(config)), "lora" in export
    front = ["library_name: diffusers", "pipeline_tag: text-to-image"]
    front += [f"base_model: {json.dumps(base)}"] if base else []  # a JSON string is a YAML string
    front += ["tags:", "- text-to-image", "- diffusers", *(["- lora"] if adapter else [])]
    code = code_of(base_name, arm_dir, export, config, example_prompt(arm_dir, arm_dir.parent))
    keys = [*_SETTINGS, *(["lora.rank", "lora.alpha"] if adapter else [])]
    settings = "; ".join(f"{key} {flat[key]}" for key in keys if flat.get(key, UNKNOWN) != UNKNOWN)
    made = [f"Trained parts: {', '.join(export)}", f"{format_count(arm.cost.trainable_parameters)} trained parameters"]
    made += [f"{format_count(arm.cost.steps)} steps in {format_seconds(arm.cost.train_seconds)}", *arm.notes, settings]
    rows = [[m.label, *format_estimate(arm.estimate(m.key), m), m.meaning] for m in METRICS]
    measured = Table(["metric", "value", "95 % interval", "meaning"], [row for row in rows if row[1] != UNKNOWN])
    origin = ", ".join(f"{key} {provenance[key]}" for key in ("commit", "date", "device") if provenance.get(key))
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {escape_markdown(arm_dir.resolve().name)}",
        f"A text-to-image diffusion model, fine-tuned from {escape_markdown(base or 'a base of its owner')}.",
        f"```python\n{code}\n```",
        f"ComfyUI, A1111 and kohya's scripts read `{KOHYA_FILE}`." if (arm_dir / KOHYA_FILE).exists() else "",
        escape_markdown("; ".join(made) + "." if export else "Nothing was trained: the numbers are the base's own."),
        markdown_table(measured) if measured.rows else "Not measured.",
        escape_markdown(sample(results)),
        *said_before.values(),
        _LIMITS,
        escape_markdown(f"Made with {origin}." if origin else ""),
    ]
    return write_atomic(arm_dir / "README.md", "\n\n".join(part for part in parts if part) + "\n")

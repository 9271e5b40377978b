"""Draws earlier_base/map.png: what training the text encoder changes, regime by regime, from the committed numbers.

python recipes/results/map_figure.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

FOLDER = Path(__file__).parent / "earlier_base"
PANELS = (
    ("word AUC", "localization", "word", "auc"),
    ("EOS AUC", "localization", "eos", "auc"),
    ("FID (lower is better)", "quality", "fid", None),
    ("finding AUC", "quality", "finding_auc", None),
)
FROZEN, LEARNABLE = "#3f86d9", "#e0862b"


def regimes() -> dict[str, dict[str, Any]]:
    """Regime -> its arms frozen and learnable; mean over seeds where there are several."""
    benchmark = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))["arms"]
    found = {"benchmark (3 seeds)": benchmark}
    longer = json.loads((FOLDER / "equal_length.json").read_text(encoding="utf-8"))["arms"]
    found["benchmark, 800 steps (3 seeds)"] = longer
    found["all-MiniLM-L6-v2 as encoder"] = json.loads((FOLDER / "minilm.json").read_text(encoding="utf-8"))["arms"]
    for name, regime in json.loads((FOLDER / "map.json").read_text(encoding="utf-8")).items():
        if {"frozen", "learnable"} <= set(regime["arms"]):
            found[name] = regime["arms"]
    texts = json.loads((FOLDER / "baselines.json").read_text(encoding="utf-8"))["arms"]
    found["shuffled labels for captions"] = {"frozen": texts["frozen_labels"], "learnable": texts["labels"]}
    return found


def value(arm: dict[str, Any], part: str, name: str, key: str | None) -> tuple[float, tuple[float, float] | None]:
    """A value and its 95 % interval."""
    if key is None:
        return arm[part][name], arm[part].get(f"{name}_ci")
    return arm[part][name][key], arm[part][name].get(f"{key}_ci")


def main() -> None:
    rows = regimes()
    figure = Figure(figsize=(12, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for panel, (title, *where) in zip(axes, PANELS, strict=True):
        for y, arms in enumerate(rows.values()):
            pair = [value(arms[name], *where) for name in ("frozen", "learnable")]
            panel.plot([pair[0][0], pair[1][0]], [y, y], color="#8a8f98", linewidth=1)
            for (middle, interval), colour, shift in zip(pair, (FROZEN, LEARNABLE), (-0.13, 0.13), strict=True):
                if interval:
                    panel.plot(interval, [y + shift] * 2, color=colour, alpha=0.45, linewidth=2)
                panel.plot(middle, y, "o", color=colour, markersize=6)
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes[0].invert_yaxis()
    for name, colour in (("frozen", FROZEN), ("learnable", LEARNABLE)):
        axes[-1].plot([], [], "o", color=colour, label=f"{name} encoder")
    figure.legend(loc="outside lower right", ncols=2, fontsize=9, frameon=False)
    figure.savefig(FOLDER / "map.png", dpi=110)


if __name__ == "__main__":
    main()

"""The atlas in words, tables and heat maps: scores of each layer at each timestep, and the subset that was chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich import box
from rich.table import Table as RichTable
from rich.text import Text as RichText

from distill.evaluation.localization import TOKEN_MAPS
from distill.evaluation.protocols import DEFAULT_TIMESTEPS
from distill.report.document import UNKNOWN, Picture
from distill.report.figures import chart
from distill.report.tables import format_number

if TYPE_CHECKING:
    from distill.config import FullEvaluation


def short_layer(name: str) -> str:
    """`up_blocks.1.attentions.0.transformer_blocks.0.attn2` -> `up 1.0.0`."""
    block, *rest = name.split(".")
    return f"{block.partition('_')[0]} {'.'.join(part for part in rest if part.isdigit())}"


Entry = Mapping[str, Any]
"""A model's entry of atlas.json (see `distill.evaluation.atlas.analyse`)."""
Entries = Mapping[str, Entry]
NAMES = {"image_adds": "image adds", "auc": "AUC"}
RULES = {
    "image_adds": "The subset is chosen by *image adds*; one whose AUC on validation images is below that of the default "
    "is taken only if the search finds no other.",
    "auc": "The subset is chosen by *AUC* alone.",
}
CHANCE = {"image_adds": 0.0, "auc": 0.5}
"""Score of a map that does not look at the image (image adds), or that is noise (AUC)."""


def _signed(value: float) -> str:
    text = format_number(value, 3)
    return text if text.startswith("-") else f"+{text}"


def _difference(entry: Entry, key: str) -> str:
    """`+.031 [+.010, +.052]`; a dash where unknown."""
    found = entry["test"]["difference"][key]
    if found["value"] is None:
        return UNKNOWN
    return _signed(found["value"]) + (f" [{', '.join(map(_signed, found['ci']))}]" if found["ci"] else "")


def answer(name: str, entry: Entry) -> str:
    """Does the subset chosen on validation images raise the measure that chose it on test images? One or two
    sentences, from the numbers."""
    chosen, test, by = entry["chosen"], entry["test"], entry["chosen"]["by"]
    found, name_of_measure = test["difference"][by], f"the {NAMES[by]} of the words"
    start = (
        f"{name}: {len(chosen['layers'])} of {len(entry['layers'])} layers at "
        f"{', '.join(map(str, chosen['timesteps']))}, "
        f"chosen on {entry['validation']['images']} validation images,"
    )
    worse = " On validation it is not better than the default, or has a lower AUC, so the model does not get it."
    end = "" if chosen["is_better"] else worse
    if found["value"] is None:
        return f"{start} could not be tested: no pair of a test image has {name_of_measure}.{end}"
    values = [format_number(test[which]["word"][by], 3) for which in ("default", "chosen")]
    numbers = f"from {values[0]} to {values[1]}, difference {_difference(entry, by)}"
    if found["ci"] is None:
        return f"{start} changes {name_of_measure} on test images {numbers}; one image gives no interval.{end}"
    low, high = found["ci"]
    if low <= 0 <= high:
        verb, numbers = "does not clearly change", f"{numbers}: the 95 % interval holds 0"
    else:
        verb = "raises" if low > 0 else "lowers"
    return f"{start} {verb} {name_of_measure} on test images ({numbers}).{end}"


def summary_head(by: str) -> tuple[str, ...]:
    """Names of the columns of `summary_rows`."""
    other = next(name for measure, name in NAMES.items() if measure != by)
    return (
        "model", "layers", "timesteps", f"validation {NAMES[by]}, default", "chosen", f"test {NAMES[by]}, default",
        "chosen", "difference", f"{other} difference", "CNR difference", "Top-1 difference",
    )  # fmt: skip


def summary_rows(entries: Entries, by: str) -> list[tuple[str, ...]]:
    """One row a model, in the columns of `summary_head`; all of the word maps."""
    keys = (by, *(measure for measure in NAMES if measure != by), "cnr", "top1")
    rows = []
    for name, entry in entries.items():
        chosen, test = entry["chosen"], entry["test"]
        default = (chosen["default"] or {}).get(by)
        numbers = (default, chosen[by], test["default"]["word"][by], test["chosen"]["word"][by])
        rows.append(
            (
                name,
                f"{len(chosen['layers'])} of {len(entry['layers'])}",
                ", ".join(map(str, chosen["timesteps"])),
                *(UNKNOWN if value is None else format_number(value, 3) for value in numbers),
                *(_difference(entry, key) for key in keys),
            )
        )
    return rows


def chosen_by(entries: Entries) -> str:
    """The measure that chose the subsets; one for all models."""
    by: str = next(iter(entries.values()))["chosen"]["by"]
    return by


def terminal_table(entries: Entries) -> RichTable:
    by = chosen_by(entries)
    table = RichTable(
        box=box.SIMPLE_HEAD,
        padding=0,
        caption=f"{NAMES[by]} of the words; difference on test images, 95 % bootstrap interval over images",
        caption_justify="left",
    )
    for place, name in enumerate(summary_head(by)[:-2]):
        table.add_column(name.replace(f" {NAMES[by]}, ", "\n"), justify="right" if place else "left")
    for row in summary_rows(entries, by):
        table.add_row(*(RichText(cell) for cell in row[:-2]))  # rich would read [brackets] as markup
    return table


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown(entries: Entries, evaluation: FullEvaluation) -> str:
    """atlas.md: the answer, the comparison, and the scores of each cell of each model."""
    first, by = next(iter(entries.values())), chosen_by(entries)
    word = first["test"]["chosen"]["word"]
    parts = [
        "# Where the attention localizes",
        f"Does choosing layers and timesteps on validation images raise *{NAMES[by]}* on test images?",
        "\n".join(f"- {answer(name, entry)}" for name, entry in entries.items()),
        _markdown_table(summary_head(by), summary_rows(entries, by)),
        f"The default is all layers at the timesteps {', '.join(map(str, DEFAULT_TIMESTEPS))}. Validation: "
        f"{first['validation']['images']} images, {first['validation']['pairs']} image-finding pairs; the chosen "
        f"subset's value there is the best of many and so too high. Test: {word['images']} other images, "
        f"{word['pairs']} pairs; 95 % intervals of {evaluation.bootstrap_samples:,} resamples of images; noise seed "
        f"{evaluation.seed}. The other measures are of the same maps. {RULES[by]} What an image adds is the AUC of its own "
        "map minus the AUC of the maps of other images with the same finding, against its mask.",
    ]
    for name, entry in entries.items():
        chosen = entry["chosen"]
        parts += [
            f"## {name}",
            f"![{NAMES[by]} of {name} by layer and timestep]({name}/atlas.png)",
            f"Chosen layers: {', '.join(f'`{layer}`' for layer in chosen['layers'])}",
        ]
        for token in TOKEN_MAPS:
            rows = []
            for layer, values in zip(entry["layers"], entry["validation"][by][token], strict=True):
                cells = [format_number(value, 3) for value in values]
                if token == "word" and layer in chosen["layers"]:
                    cells = [
                        f"**{cell}**" if timestep in chosen["timesteps"] else cell
                        for cell, timestep in zip(cells, entry["timesteps"], strict=True)
                    ]
                rows.append([short_layer(layer), *cells])
            parts.append(f"*{NAMES[by]}* of the {token} maps on validation images, by layer and timestep:")
            parts.append(_markdown_table(["layer", *map(str, entry["timesteps"])], rows))
    return "\n\n".join(parts) + "\n"


def atlas_chart(
    tables: Mapping[str, np.ndarray],
    layers: Sequence[str],
    timesteps: Sequence[int],
    chosen: tuple[Sequence[int], Sequence[int]],
    by: str,
) -> Picture:
    """A heat map a token map: the measure of each layer (rows) at each timestep (columns), CHANCE in white.

    tables: name -> (layers, timesteps). chosen: rows and columns whose common cells get a frame.
    """
    count, white = len(layers) * len(timesteps), CHANCE[by]
    far = max(0.05, *(float(np.abs(table - white).max()) for table in tables.values()))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
        for axes, (name, table) in zip(panels, tables.items(), strict=True):
            image = axes.imshow(table, cmap="RdBu_r", vmin=white - far, vmax=white + far, aspect="auto")
            axes.set_title(f"{name}, best {format_number(float(table.max()), 3)}", loc="left")
            axes.set_xticks(range(len(timesteps)), [str(t) for t in timesteps], rotation=60, fontsize=8)
            axes.set_yticks(range(len(layers)), layers, fontsize=8)
            axes.set_xlabel("timestep")
            axes.grid(False)
            for row, column in np.ndindex(table.shape) if count <= 400 else ():
                value = float(table[row, column])
                colour = "white" if abs(value - white) > 0.7 * far else "black"
                text = format_number(value, 2)
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=colour)
            for row in chosen[0]:
                for column in chosen[1]:
                    frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=2)
                    axes.add_patch(frame)
        figure.colorbar(image, ax=panels, label=NAMES[by], fraction=0.02, pad=0.01)

    width = 2.2 + len(tables) * (0.4 + 0.33 * len(timesteps))
    alt = f"{NAMES[by]} of attention maps by layer and timestep on validation images; the chosen cells have a frame"
    return chart("atlas", alt, width, 1.5 + 0.28 * len(layers), draw)

"""What the report and the model card say of memorization."""

from __future__ import annotations

import html
from pathlib import Path

from PIL import Image

from distill.evaluation.results import Memorization, Results
from distill.report.document import UNKNOWN, Picture, Section, Table
from distill.report.figures import data_uri
from distill.report.tables import format_number

EXPLAINED = (
    "Each generated image, and its mirror image, is compared with its nearest training and held-out image. Without copies, "
    "a training image is the nearer one as often as chance says. The row names the comparison (features, latents or "
    "pixels) with the smallest p, which is corrected for their number and that of the training seeds."
)
PAIRS = "Each picture shows a generated image, its nearest training image and its nearest held-out image, from left to right."


def format_share(share: float | None) -> str:
    """`12.3 %`; a dash where unknown."""
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def format_p(p: float) -> str:
    return "below .001" if p < 0.001 else format_number(p, 3)


def sentence(found: Memorization) -> str:
    """One sentence that says what the test says."""
    counts = (
        f"{found.images:,} generated, {found.training_images:,} training and {found.held_out_images:,} held-out images"
    )
    counts += "" if found.seed is None else f", training seed {found.seed}, whose p is the smallest"
    if found.is_found:
        return (
            f"About {format_share(found.copies.value)} of the generated images are copies of training images, or close "
            f"to it ({found.space}, p {format_p(found.p)}; {counts}): look at the pairs in the report before you "
            "publish the model."
        )
    if not found.can_be_found:
        return f"Memorization cannot be tested with {counts}: even copies alone would not differ from chance. Use more."
    return (
        f"No sign of copies: {format_share(found.share)} of the generated images are nearer to a training than to a "
        f"held-out image, and chance is {format_share(found.chance)} ({found.space}, p {format_p(found.p)}; {counts})."
    )


def memorization_section(run_dir: Path, results: Results) -> list[Section]:
    """The verdict on each arm, a table, and the most suspicious pairs; empty where it was not measured."""
    measured = {name: arm.memorization for name, arm in results.arms.items() if arm.memorization}
    if not measured:
        return []
    head = ["model", "nearer to training", "by chance", "copies", "95 % interval", "p", "compared"]
    rows = [[
        name, *map(format_share, (m.share, m.chance, m.copies.value)),
        f"{format_share(m.copies.low)} to {format_share(m.copies.high)}", format_p(m.p), m.space,
    ] for name, m in measured.items()]  # fmt: skip
    said = [f"{name}: {sentence(found)}" for name, found in measured.items()]
    found = [(name, path) for name in measured for path in sorted((run_dir / name / "memorization").glob("*.png"))]
    pictures = [picture for pair in found if (picture := _picture(*pair))]
    text = [*said, EXPLAINED, *([PAIRS] if pictures else [])]
    return [Section("Memorization", text, pictures, [Table(head, rows, "numbers", "memorization")])]


def _picture(arm: str, path: Path) -> Picture | None:
    """A picture of a pair; None where the file cannot be read."""
    try:
        with Image.open(path) as image:
            uri, content = data_uri(image, 480), path.read_bytes()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    said = f"{arm}, pair {int(path.stem) + 1}: generated image, nearest training image, nearest held-out image"
    return Picture(f"memorization-{arm}-{path.stem}", said, content, f'<img alt="{html.escape(said)}" src="{uri}">')

"""What the report and the model card say of memorization."""

from __future__ import annotations

import html
from pathlib import Path

from distill.evaluation.results import Memorization, Results
from distill.report.document import UNKNOWN, Picture, Section, Table
from distill.report.figures import data_uri, read_image
from distill.report.tables import format_number

EXPLAINED = (
    "Each generated image, and its mirror image, is compared with its nearest training and held-out image. Without copies, "
    "a training image is the nearer one as often as chance says. The verdict names the comparison (features, latents or "
    "pixels) with the smallest p, which is corrected for their number and that of the training seeds. A picture shows a "
    "generated image, its nearest training image and its nearest held-out image, from left to right."
)


def format_share(share: float | None) -> str:
    """`12.3 %`; a dash where unknown."""
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def sentence(found: Memorization) -> str:
    """One sentence that says what the test says."""
    counts = (
        f"{found.images:,} generated, {found.training_images:,} training and {found.held_out_images:,} held-out images"
    )
    counts += "" if found.seed is None else f", training seed {found.seed}, whose p is the smallest"
    tested = f"{found.space}, p {'below .001' if found.p < 0.001 else format_number(found.p, 3)}; {counts}"
    if found.is_found:
        ends = f"95 % interval {format_share(found.copies.low)} to {format_share(found.copies.high)}"
        return (
            f"About {format_share(found.copies.value)} of the generated images are copies of training images, or close "
            f"to it ({ends}; {tested}): look at the pairs in the report before you publish the model."
        )
    if not found.can_be_found:
        return f"Memorization cannot be tested with {counts}: even copies alone would not differ from chance. Use more."
    return (
        f"No sign of copies: {format_share(found.share)} of the generated images are nearer to a training than to a "
        f"held-out image, and chance is {format_share(found.chance)} ({tested})."
    )


def memorization_section(run_dir: Path, results: Results, notes: list[str]) -> Section:
    """The verdict on each arm where it was measured, and the most suspicious pairs."""
    verdicts = [[name, sentence(arm.memorization)] for name, arm in results.arms.items() if arm.memorization]
    pictures = []
    for name, _ in verdicts:
        for path in sorted((run_dir / name / "memorization").glob("*.png")):
            said = f"{name}, pair {int(path.stem) + 1}: generated image, nearest training image, nearest held-out image"
            if image := read_image(run_dir, str(path.relative_to(run_dir)), notes):
                shown = f'<img alt="{html.escape(said)}" src="{data_uri(image, 480)}">'
                pictures.append(Picture(path.stem, said, shown))
    return Section("Memorization", [EXPLAINED], pictures, [Table(["model", "verdict"], verdicts, name="memorization")])

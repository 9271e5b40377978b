"""What the report and the model card say of memorization."""

from __future__ import annotations

import html
from pathlib import Path

from distill.evaluation.results import Memorization, Results
from distill.report.document import UNKNOWN, Picture, Section, Table
from distill.report.figures import data_uri, read_image
from distill.report.tables import format_number

EXPLAINED = (
    "Each generated image, and its mirror image, is compared with its nearest training and held-out image. Without "
    "copies, a training image is the nearer one as often as chance says: the share of training images or patients, "
    "whichever is larger. The verdict is that of the smallest p, corrected for all comparisons and training seeds. A "
    "near copy is nearer to a training image, in latents or small gray pixels, than a third of the mean distance to its "
    "50 nearest ones. A picture shows a generated image and its two nearest."
)


def format_share(share: float | None) -> str:
    """`12.3 %`; a dash where unknown."""
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def sentence(found: Memorization) -> str:
    """One sentence that says what the test says."""
    counts = found.compared + ("" if found.seed is None else f", training seed {found.seed}, whose p is the smallest")
    tested = f"{found.space}, p {'below .001' if found.p < 0.001 else format_number(found.p, 3)}; {counts}"
    if found.exceeds_chance:
        ends = f"95 % interval {format_share(found.copies.low)} to {format_share(found.copies.high)}"
        return (
            f"{found.near_text}About {format_share(found.copies.value)} of the generated images are copies of training "
            f"images, or close to it ({ends}; {tested}): look at the pairs in the report before you publish the model."
        )
    if found.has_near:
        return f"{found.near_text}Look at the pairs in the report before you publish the model ({counts})."
    if not found.can_be_found:
        more = "" if found.training_patients is None else " patients"
        return f"Memorization cannot be tested with {counts}: even copies alone would not differ from chance. Use more{more}."
    nearer = f"{format_share(found.share)} of the generated images are nearer to a training than to a held-out image"
    return f"No sign of copies: {nearer}, and chance is {format_share(found.chance)} ({tested})."


def memorization_section(run_dir: Path, results: Results, notes: list[str]) -> Section:
    """The verdict on each arm where it was measured, and the most suspicious pairs: of several seeds the verdict's."""
    found = {name: arm.memorization for name, arm in results.arms.items() if arm.memorization}
    pictures = []
    for name, one in found.items():
        seed = "" if one.seed is None else f", training seed {one.seed}"
        own = run_dir.parent / f"seed-{one.seed}" if seed else run_dir
        for path in sorted((own / name / "memorization").glob("*.png")):
            said = f"{name}{seed}, pair {int(path.stem) + 1}: generated image, nearest training image, nearest held-out image"
            if image := read_image(own, str(path.relative_to(own)), notes):
                shown = f'<img alt="{html.escape(said)}" src="{data_uri(image, 480)}">'
                pictures.append(Picture(path.stem, said, shown))
    table = Table(["model", "verdict"], [[name, sentence(one)] for name, one in found.items()], name="memorization")
    return Section("Memorization", [EXPLAINED], pictures, [table])

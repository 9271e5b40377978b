"""A phantom's scene -> its caption, as a radiologist would word it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from distill.data.captions import text_of_labels
from distill.data.phantom.scene import FINDINGS, CaptionStyle, Finding, Scene, Size

# Phrases that name a finding. A leading "a" is an article, left out or kept as the sentence needs.
_PHRASES: dict[str, tuple[str, ...]] = {
    "atelectasis": (
        "plate-like atelectasis in the {place}",
        "linear atelectasis in the {place}",
        "atelectatic bands in the {place}",
        "{place} atelectasis",
        "{extent} atelectasis of the {place}",
    ),
    "cardiomegaly": (
        "{degree} cardiomegaly",
        "cardiomegaly",
        "cardiomegaly of {degree} degree",
        "a enlarged cardiac silhouette",
        "{degree} enlargement of the cardiac silhouette",
    ),
    "consolidation": (
        "a {size} consolidation in the {place}",
        "dense consolidation of the {place}",
        "{place} consolidation",
        "consolidative change in the {place}",
        "a {size} area of consolidation in the {place}",
    ),
    "edema": (
        "{degree} pulmonary edema",
        "{degree} perihilar edema",
        "{degree} bilateral edema",
        "interstitial edema in both lungs",
        "vascular congestion with {degree} edema",
    ),
    "lung opacity": (
        "a {size} hazy opacity in the {place}",
        "a {place} opacity",
        "a focal lung opacity in the {place}",
        "hazy opacification of the {place}",
        "a {size} opacity projecting over the {place}",
    ),
    "pleural effusion": (
        "a {size} {side} pleural effusion",
        "a {side}-sided pleural effusion of {size} size",
        "a {size} effusion at the {side} lung base",
        "a {size} {side} effusion",
        "{extent} pleural fluid at the {side} base",
    ),
    "pneumonia": (
        "patchy pneumonia in the {place}",
        "{place} pneumonia",
        "a {size} area of pneumonia in the {place}",
        "pneumonia with air bronchograms in the {place}",
        "{extent} pneumonia of the {place}",
    ),
    "pneumothorax": (
        "a {size} {side} pneumothorax",
        "a {size} {side}-sided pneumothorax",
        "a {side} apical pneumothorax",
        "a {size} pneumothorax at the {side} apex",
        "a pneumothorax on the {side}",
    ),
}
_BILATERAL_PHRASES: dict[str, tuple[str, ...]] = {
    "lung opacity": (
        "hazy opacities in both {zone} zones",
        "bilateral {zone} zone opacities",
        "{size} bilateral lung opacities",
        "opacification of both {zone} zones",
    ),
    "pleural effusion": (
        "{size} bilateral pleural effusions",
        "bilateral effusions of {size} size",
        "{size} effusions at both lung bases",
        "pleural effusions on both sides",
    ),
}
_PLURAL = re.compile(r"\b(bands|opacities|effusions)\b")
_DEGREES: dict[Size, tuple[str, ...]] = {
    "small": ("mild", "slight"),
    "moderate": ("moderate",),
    "large": ("severe", "marked"),
}
_EXTENTS: dict[Size, tuple[str, ...]] = {
    "small": ("limited", "minor"),
    "moderate": ("moderate",),
    "large": ("extensive",),
}
# {0} has its article, {bare} has none; {are} agrees with the first phrase.
_POSITIVE = (
    "{bare}.",
    "There {are} {0}.",
    "{0} {are} seen.",
    "{0} {are} present.",
    "{0} {are} noted on this view.",
    "The radiograph shows {0}.",
    "The image demonstrates {0}.",
    "On this view there {are} {0}.",
    "In this patient {0} {are} found.",
    "Appearances suggest {0}.",
)
_POSITIVE_PAIR = (
    "{bare} and {1}.",
    "{bare} with {1}.",
    "There {are} {0} and {1}.",
    "{0} and {1} are seen.",
    "The radiograph shows {0} as well as {1}.",
    "On this view {0} and {1} are present.",
)
_NEGATIVE = (
    "No {0}.",
    "There is no {0}.",
    "No evidence of {0}.",
    "No {0} is seen.",
    "Negative for {0}.",
    "The radiograph shows no {0}.",
    "On this view there is no {0}.",
)
_NEGATIVE_NOUNS: dict[str, tuple[str, ...]] = {
    "atelectasis": ("atelectasis",),
    "cardiomegaly": ("cardiomegaly",),
    "consolidation": ("consolidation", "focal consolidation"),
    "edema": ("edema", "pulmonary edema"),
    "lung opacity": ("opacity", "lung opacity", "focal opacity"),
    "pleural effusion": ("effusion", "pleural effusion"),
    "pneumonia": ("pneumonia",),
    "pneumothorax": ("pneumothorax",),
}
_NORMAL = (
    ("The mediastinal contours are normal.", "Mediastinum is unremarkable.", "Normal mediastinum."),
    ("No acute bony abnormality.", "The bones are intact.", "The visualized ribs are unremarkable."),
    ("The trachea is midline.", "Midline trachea."),
    ("Frontal chest radiograph.", "Single frontal view of the chest.", "Portable chest radiograph."),
)
_NORMAL_HEART = (
    "Heart size is normal.",
    "The heart is normal in size.",
    "Normal heart size.",
    "The heart is not enlarged.",
)
_MAX_WORDS = 44


def write_caption(
    scene: Scene, rng: np.random.Generator, style: CaptionStyle = "reports"
) -> tuple[str, dict[str, str]]:
    """A caption of 1-4 sentences and at most 44 words, and the phrase that names each finding in it.

    Findings are named in positive sentences only; negated ones name findings that the scene does not have. Unnamed
    findings are neither. Sentences come in any order, so that the place of a word does not tell the finding.
    style: see `PhantomDataset`.
    """

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    present = [scene.findings[k] for k in rng.permutation(len(scene.findings))]
    names = {finding.name for finding in present}
    if style == "labels":
        return text_of_labels(sorted(names), None, int(rng.integers(2**32))), {name: name for name in names}
    phrases = {finding.name: _phrase(finding, pick) for finding in present}
    queue = list(phrases.values())
    stated = []
    while queue:
        if len(queue) > 1 and rng.random() < 0.35:
            first, second = queue.pop(), queue.pop()
            stated.append(_render(pick(_POSITIVE_PAIR), first, second))
        else:
            stated.append(_render(pick(_POSITIVE), queue.pop()))

    hidden = {finding.name for finding in scene.unnamed}
    absent = [name for name in rng.permutation(FINDINGS) if name not in names | hidden]
    negated = []
    for _ in range(2):
        count = int(rng.integers(1, 4))
        nouns = [pick(_NEGATIVE_NOUNS[name]) for name in absent[:count]]
        absent = absent[count:]
        listed = nouns[0] if count == 1 else f"{', '.join(nouns[:-1])} or {nouns[-1]}"
        negated.append(_render(pick(_NEGATIVE), listed))
    optional = (negated if style == "reports" else []) + [pick(options) for options in _NORMAL]
    if "cardiomegaly" not in names:
        optional.append(pick(_NORMAL_HEART))
    in_lungs = [finding for finding in present if finding.name != "cardiomegaly"]
    sides = {finding.side for finding in in_lungs}
    if scene.unnamed:
        pass  # a sentence of clear lungs would deny it
    elif not in_lungs:
        optional.append(pick(("The lungs are clear.", "Clear lungs.", "Both lungs are well aerated.")))
    elif len(sides) == 1 and "bilateral" not in sides:
        other = "right" if sides == {"left"} else "left"
        optional.append(pick((f"The {other} lung is clear.", f"Clear {other} lung.")))
    if "pleural effusion" not in names:
        optional.append(pick(("The costophrenic angles are sharp.", "Sharp costophrenic angles.")))

    extra = int(rng.integers(0, 5 - len(stated))) if stated else int(rng.integers(1, 5))
    if style == "stated":
        extra = 0 if stated else 1
    # Negated findings are as frequent in reports as stated ones, hence the greater weight.
    weights = np.array([3.0 if sentence in negated else 1.0 for sentence in optional])
    chosen = rng.choice(len(optional), size=extra, replace=False, p=weights / weights.sum())
    added = [optional[k] for k in chosen]
    while sum(len(sentence.split()) for sentence in stated + added) > _MAX_WORDS:
        added.pop()
    sentences = stated + added
    may_add = style != "stated" and in_lungs and not scene.unnamed and "edema" not in names and len(sentences) < 4
    if may_add and rng.random() < 0.2:
        order = [sentences[k] for k in rng.permutation(len(sentences))]
        return " ".join([*order, "The lungs are otherwise clear."]), phrases
    return " ".join(sentences[k] for k in rng.permutation(len(sentences))), phrases


def _phrase(finding: Finding, pick: Callable[[Sequence[str]], str]) -> str:
    options = _BILATERAL_PHRASES if finding.side == "bilateral" and finding.name in _BILATERAL_PHRASES else _PHRASES
    places = ["{side} {zone} zone", "{side} {zone} lung", "{side} {zone} lung zone", "{side} lung"]
    if finding.zone != "mid":
        places.append("{side} {zone} lobe")
    if finding.zone == "lower":
        places.append("{side} lung base")
    words = {"side": finding.side, "zone": finding.zone, "size": finding.size}
    return pick(options[finding.name]).format(
        **words,
        place=pick(places).format(**words),
        degree=pick(_DEGREES[finding.size]),
        extent=pick(_EXTENTS[finding.size]),
    )


def _render(template: str, *phrases: str) -> str:
    def with_article(phrase: str) -> str:
        return f"an {phrase[2:]}" if re.match(r"a [aeiou]", phrase) else phrase

    bare = phrases[0].removeprefix("a ")
    verb = "are" if _PLURAL.search(phrases[0]) else "is"
    text = template.format(*(with_article(phrase) for phrase in phrases), bare=bare, are=verb)
    return text[0].upper() + text[1:]

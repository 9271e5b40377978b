"""Captions: the words that name a finding, whether a side is named, and training texts made of labels."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from distill.config import NO_LABEL
from distill.data.sample import ImageCaptionDataset
from distill.tokens import GAP, WORD_END, WORD_START, find_words

MS_CXR_QUERY_WORDS: dict[str, tuple[str, ...]] = {
    "atelectasis": ("atelectasis", "atelectatic"),
    "cardiomegaly": ("cardiomegaly", "cardiac"),
    "consolidation": ("consolidation", "consolidations", "consolidative"),
    "edema": ("edema",),
    "lung opacity": ("opacity", "opacities", "opacification"),
    "pleural effusion": ("pleural", "effusion", "effusions"),
    "pneumonia": ("pneumonia",),
    "pneumothorax": ("pneumothorax", "pneumothoraces"),
}
"""Words that name a finding in a report. Source: Dombrowski et al. 2024 (arXiv 2303.17908), MS-CXR evaluation."""

_FUNCTION_WORDS = {"a", "an", "and", "at", "by", "for", "from", "in", "no", "of", "on", "or", "the", "to", "with"}
# Sides in words, in radiology's short forms (R lung, LLL, L>R), in structures that lie on one side only, and in
# other common languages. A word too many here only costs a flip; one too few teaches a wrong side.
_SIDES = re.compile(
    rf"""{WORD_START} (?:
        (?: left | right) (?: s | most | wards? | ish)?
      | lt | rt | lhs | rhs | (?-i: [LR]) | [lr][ul]l | rml | [lr][uml]z
      | lingulas? | lingular | middle {GAP} lobes? | azygos | situs
      | (?: dextr | sinistr | levo | laevo) [^\W\d_]*
      | links | rechts | linke[rnms]? | rechte[rnms]? | gauches? | droite?s? | destr[oaie]
      | izquierd[oa]s? | derech[oa]s? | esquerd[oa]s? | direit[oa]s?
    ) {WORD_END}""",
    re.IGNORECASE | re.VERBOSE,
)


def query_words_for(finding: str, overrides: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Words that name `finding` in a caption, lower case, names compared without regard to case.

    The override, else the MS-CXR list, else the words of the name with a simple plural each (opacity, opacities);
    function words such as "of" are left out, as they would be found in any caption.
    """
    name = " ".join(finding.split()).casefold()
    for key, words in overrides.items():
        if " ".join(key.split()).casefold() == name:
            return tuple(words)
    if name in MS_CXR_QUERY_WORDS:
        return MS_CXR_QUERY_WORDS[name]
    own = [word for word in re.findall(r"[^\W_]+", unicodedata.normalize("NFC", name)) if word not in _FUNCTION_WORDS]
    return tuple(dict.fromkeys(form for word in own for form in _forms(word)))


def negated_findings(dataset: ImageCaptionDataset, index: int) -> tuple[str, ...]:
    """Findings that the caption of a row names and its labels lack: it negates or doubts them.

    Words that also name a finding of the labels ("pleural") say nothing about another.
    """
    caption, labels = dataset.caption(index), set(dataset.labels(index))
    spans = {finding: find_words(caption, dataset.query_words[finding]) for finding in dataset.findings}
    taken = [span for finding in labels for span in spans.get(finding, ())]
    return tuple(
        finding
        for finding, own in spans.items()
        if own and finding not in labels and not any(a < end and start < b for a, b in own for start, end in taken)
    )


def _forms(word: str) -> Iterable[str]:
    yield word
    if re.search(r"[^aeiou]y$", word):
        yield word[:-1] + "ies"
    elif word.isalpha() and not word.endswith("s"):
        yield word + "s"


def has_label(labels: Sequence[str], name: str) -> bool:
    """Whether an image has this label, in any case. One without labels has NO_LABEL."""
    return name.casefold() in ({label.casefold() for label in labels} or {NO_LABEL})


def names_side(caption: str) -> bool:
    """Whether mirroring the image could make the caption wrong: it names left or right in any of the listed ways.

    "bilateral" and "both" name no side.
    """
    return _SIDES.search(caption) is not None


def insert_labels(caption: str, labels: Sequence[str], where: Literal["first", "random"], key: int) -> str:
    """RaLI of Dombrowski et al. (AAAI 2024): the labels in random order before word 0 ("first"), or before one of the
    words 0 to 5 ("random"). The draw depends on `key` only. Unchanged without labels."""
    if not labels:
        return caption
    rng = np.random.default_rng(key)
    words = caption.split()
    place = 0 if where == "first" else int(rng.integers(min(5, len(words)) + 1))
    shuffled = [labels[i] for i in rng.permutation(len(labels))]
    return " ".join([*words[:place], *shuffled, *words[place:]])


def text_of_labels(labels: Sequence[str], paraphrases: Mapping[str, Sequence[str]] | None, key: int) -> str:
    """The labels in random order, joined by commas; or of each one of its paraphrases, as sentences. `no finding`
    without labels. The draw depends on `key` only. Caption sources of Dombrowski et al. (AAAI 2024)."""
    if not labels:
        return NO_LABEL
    rng = np.random.default_rng(key)
    shuffled = [labels[i] for i in rng.permutation(len(labels))]
    if paraphrases is None:
        return ", ".join(shuffled)
    return " ".join(paraphrases[label][int(rng.integers(len(paraphrases[label])))] for label in shuffled)

"""Token groups and word spans: where the words of a caption are, in characters and in tokens.

The only place that names the groups: BOS, the words, EOS (the token that ends the caption) and padding.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS, WORD, EOS, PADDING = 0, 1, 2, 3
"""Token groups of `token_groups`."""

# A word is bounded by anything but letters, digits and combining accents.
WORD_START, WORD_END = r"(?<![^\W_])", r"(?![^\W_]|[\u0300-\u036f])"

GAP = r"[\s\-\u2010-\u2015]+"


@dataclass(frozen=True)
class Tokenizers:
    """What of a model turns texts into tokens."""

    tokenizers: Sequence[PreTrainedTokenizerBase]
    max_tokens: int


def find_words(caption: str, words: Iterable[str]) -> list[tuple[int, int]]:
    """Spans (start, end) in characters of whole words of `words` in `caption`, without regard to case, in order.

    A word ends where letters and digits end, so "ground-glass" holds "ground" and "glass". A query of several words
    matches them with any white space or hyphens between. Composed and decomposed accents are alike.
    """
    patterns = set()
    for word in words:
        for form in ("NFC", "NFD"):
            parts = re.split(GAP, unicodedata.normalize(form, word))
            patterns.add(GAP.join(re.escape(part) for part in parts if part))
    patterns.discard("")
    if not patterns:
        return []
    longest_first = sorted(patterns, key=lambda pattern: (-len(pattern), pattern))
    whole = re.compile(WORD_START + "(?:" + "|".join(longest_first) + ")" + WORD_END, re.IGNORECASE)
    return [match.span() for match in whole.finditer(caption)]


def words_of(caption: str) -> list[str]:
    """The distinct words (letters, digits, combining accents, inner hyphens and apostrophes) of `caption`, in order, in
    lower case."""
    part = r"[^\W_](?:[^\W_]|[\u0300-\u036f])*"
    return list(dict.fromkeys(re.findall(rf"{part}(?:[-'\u2019]{part})*", caption.lower())))


def token_spans(
    tokenizer: PreTrainedTokenizerBase, caption: str, char_spans: Iterable[tuple[int, int]], max_length: int
) -> list[int]:
    """Positions, in the sequence of `max_length` tokens with BOS at 0, of the tokens that overlap any of `char_spans`.

    Taken from the tokenizer's offsets, which refer to the caption as written, whatever its normalizer does to case,
    accents or white space. Tokens that truncation cuts off are left out.
    """
    encoded = tokenizer(caption, truncation=True, max_length=max_length, return_offsets_mapping=True)
    spans = list(char_spans)
    return [
        position
        for position, (start, end) in enumerate(encoded["offset_mapping"])
        if any(start < span_end and span_start < end for span_start, span_end in spans)
    ]


def token_groups(tokenizer: PreTrainedTokenizerBase, caption: str, max_length: int) -> torch.Tensor:
    """(max_length,) int64: BOS, WORD, EOS (the one that ends the caption) or PADDING of each position.

    Found by length: SD 1.x pads with the EOS token and SD 2.x with the token "!", so that ids do not tell. T5 has no BOS.
    """
    encoded = tokenizer(caption, truncation=True, max_length=max_length, return_special_tokens_mask=True)
    special = encoded["special_tokens_mask"]
    groups = torch.full((max_length,), PADDING, dtype=torch.int64)
    groups[: len(special)] = WORD
    if special[0]:
        groups[0] = BOS
    groups[len(special) - 1] = EOS
    return groups

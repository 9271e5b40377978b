"""Tokens of a caption, and where its words are, in characters and in tokens.

The only place that tokenizes for a model, and that names the groups: BOS, the words, EOS (the token that ends a chunk)
and padding. A text encoder of 77 positions reads 75 tokens of a caption. A longer caption is cut into chunks of 75,
each with a BOS, an EOS and padding of its own, which are encoded one by one and joined: N chunks give N x 77 hidden
states. A1111 and ComfyUI lay out a long prompt in the same way, and so does compel.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

BOS, WORD, EOS, PADDING = 0, 1, 2, 3
"""Token groups of `token_groups`."""

# A word is bounded by anything but letters, digits and combining accents.
WORD_START, WORD_END = r"(?<![^\W_])", r"(?![^\W_]|[\u0300-\u036f])"

GAP = r"[\s\-\u2010-\u2015]+"


class ReadsText:
    """What turns captions into tokens: a model, or `Tokenizers`, which hold no weights."""

    tokenizers: Sequence[PreTrainedTokenizerBase]
    caption_chunks: int
    """Chunks of every text, also of a short one."""

    @property
    def chunk_tokens(self) -> int:
        """Positions of a chunk."""
        return min(int(tokenizer.model_max_length) for tokenizer in self.tokenizers)

    @property
    def max_tokens(self) -> int:
        """Positions of a text, those of BOS, EOS and padding included."""
        return self.caption_chunks * self.chunk_tokens

    @property
    def longest_caption(self) -> int:
        """Tokens of the longest caption that is not cut, one BOS and one EOS included."""
        return min(_longest(tokenizer, self.chunk_tokens, self.caption_chunks) for tokenizer in self.tokenizers)

    def caption_lengths(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, not cut, one BOS and one EOS included: by the tokenizer that gives most."""
        found = [tokenizer(list(captions), verbose=False).input_ids for tokenizer in self.tokenizers]
        return [max(map(len, ids)) for ids in zip(*found, strict=True)]

    def tokenize(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """One (batch, max_tokens) int64 tensor a tokenizer, padded and truncated."""
        return [
            torch.tensor([_ids(tokenizer, text, self.chunk_tokens, self.caption_chunks) for text in captions])
            for tokenizer in self.tokenizers
        ]

    def token_groups(self, caption: str) -> torch.Tensor:
        """(max_tokens,) int64 of the first tokenizer, see `token_groups`."""
        return token_groups(self.tokenizers[0], caption, self.chunk_tokens, self.caption_chunks)

    def token_spans(self, caption: str, char_spans: Iterable[tuple[int, int]]) -> list[int]:
        """Positions in the tokens of the first tokenizer, see `token_spans`."""
        return token_spans(self.tokenizers[0], caption, char_spans, self.chunk_tokens, self.caption_chunks)


@dataclass(frozen=True)
class Tokenizers(ReadsText):
    """What of a model turns texts into tokens."""

    tokenizers: Sequence[PreTrainedTokenizerBase]
    caption_chunks: int = 1


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


def _longest(tokenizer: PreTrainedTokenizerBase, max_length: int, chunks: int) -> int:
    """Tokens of the longest caption that `chunks` of `max_length` positions hold, one BOS and one EOS included."""
    special: int = tokenizer.num_special_tokens_to_add()
    return max_length + (chunks - 1) * (max_length - special)


def _encoded(tokenizer: PreTrainedTokenizerBase, caption: str, max_length: int, chunks: int) -> BatchEncoding:
    """The caption as one sequence (BOS, words, EOS), cut to what the chunks hold."""
    longest = _longest(tokenizer, max_length, chunks)
    return tokenizer(
        caption, truncation=True, max_length=longest, return_offsets_mapping=True, return_special_tokens_mask=True
    )


def _places(special_tokens_mask: Sequence[int], max_length: int, chunks: int) -> list[int]:
    """For each position of the chunks, the index of its token in the sequence of `_encoded`; -1 for padding."""
    last = len(special_tokens_mask) - 1
    first = int(last > 0 and special_tokens_mask[0])  # T5 has no BOS
    words, room = range(first, last), max_length - first - 1
    places: list[int] = []
    for start in range(0, chunks * room, room):
        chunk = [*range(first), *words[start : start + room], last]
        places += chunk + [-1] * (max_length - len(chunk))
    return places


def _ids(tokenizer: PreTrainedTokenizerBase, caption: str, max_length: int, chunks: int) -> list[int]:
    encoded = _encoded(tokenizer, caption, max_length, chunks)
    # The last element, at -1, is that of padding.
    ids = [*encoded["input_ids"], tokenizer.pad_token_id]
    return [ids[place] for place in _places(encoded["special_tokens_mask"], max_length, chunks)]


def token_spans(
    tokenizer: PreTrainedTokenizerBase,
    caption: str,
    char_spans: Iterable[tuple[int, int]],
    max_length: int,
    chunks: int = 1,
) -> list[int]:
    """Positions, in `chunks` of `max_length` tokens that each begin with BOS, of the tokens that overlap any of
    `char_spans`.

    Taken from the tokenizer's offsets, which refer to the caption as written, whatever its normalizer does to case,
    accents or white space. Tokens that truncation cuts off are left out.
    """
    encoded = _encoded(tokenizer, caption, max_length, chunks)
    spans = list(char_spans)
    offsets = [*encoded["offset_mapping"], (0, 0)]
    chosen = [any(start < span_end and span_start < end for span_start, span_end in spans) for start, end in offsets]
    places = _places(encoded["special_tokens_mask"], max_length, chunks)
    return [position for position, place in enumerate(places) if chosen[place]]


def token_groups(tokenizer: PreTrainedTokenizerBase, caption: str, max_length: int, chunks: int = 1) -> torch.Tensor:
    """(chunks * max_length,) int64: BOS, WORD, EOS (the one that ends a chunk's words) or PADDING of each position.

    Found by length: SD 1.x pads with the EOS token and SD 2.x with the token "!", so that ids do not tell. T5 has no
    BOS.
    """
    special = _encoded(tokenizer, caption, max_length, chunks)["special_tokens_mask"]
    codes = [BOS if special[0] else WORD, *[WORD] * (len(special) - 2), EOS][-len(special) :]
    return torch.tensor([*codes, PADDING])[_places(special, max_length, chunks)]

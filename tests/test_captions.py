from __future__ import annotations

import unicodedata

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from distill.data.captions import MS_CXR_QUERY_WORDS, insert_labels, names_side, query_words_for, text_of_labels
from distill.tokens import BOS, EOS, PADDING, WORD, find_words, token_groups, token_spans, words_of

WHOLE_WORDS = ("effusion", "small", "lung")


def build_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """A real CLIP byte-level BPE: three words are one token, all other text falls into bytes."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    merges = []
    for word in WHOLE_WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = ["".join(pieces[:2])]
            tokens.append(pieces[0])
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(tokens))},
        merges=merges,
        pad_token=pad_token,
        model_max_length=77,
    )


TOKENIZER = build_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def spans_of(caption: str, words: tuple[str, ...]) -> list[str]:
    return [caption[start:end] for start, end in find_words(caption, words)]


def test_query_words_come_from_the_override_then_the_paper_then_the_name() -> None:
    assert query_words_for("Lung  Opacity", {}) == MS_CXR_QUERY_WORDS["lung opacity"]
    assert query_words_for("Edema", {"edema": ["oedema"]}) == ("oedema",)
    assert query_words_for("ground glass opacity", {}) == (
        "ground",
        "grounds",
        "glass",
        "opacity",
        "opacities",
    )
    assert query_words_for("Enlargement of the heart", {}) == ("enlargement", "enlargements", "heart", "hearts")
    assert query_words_for("COVID-19", {}) == ("covid", "covids", "19")
    assert query_words_for("potted plant", {"chair": ["seat"]}) == ("potted", "potteds", "plant", "plants")


def test_whole_words_in_any_case_with_hyphens_between() -> None:
    caption = "Ground-glass OPACITIES, opacity; preopacity opacity1 (opacity)."
    assert spans_of(caption, ("ground", "glass", "opacity", "opacities")) == [
        "Ground",
        "glass",
        "OPACITIES",
        "opacity",
        "opacity",
    ]
    assert spans_of("pleural effusion, pleural-effusion, pleural", ("pleural effusion",)) == [
        "pleural effusion",
        "pleural-effusion",
    ]
    assert spans_of("pleural effusion", ("pleural", "pleural effusion")) == ["pleural effusion"], "the longest"
    assert find_words("anything", ()) == find_words("anything", ("", " ")) == find_words("", ("edema",)) == []


def test_accents_match_composed_and_decomposed() -> None:
    for form in ("NFC", "NFD"):
        caption = unicodedata.normalize(form, "un épanchement")
        assert spans_of(caption, ("épanchement",)) == [caption[3:]]
    assert find_words("re\u0301sume\u0301", ("resume", "re")) == []


@given(TEXT, st.lists(TEXT, max_size=4))
def test_find_words_takes_any_text(caption: str, words: list[str]) -> None:
    spans = find_words(caption, words)
    assert spans == sorted(spans)
    assert all(0 <= start < end <= len(caption) for start, end in spans)


@pytest.mark.parametrize(
    "caption",
    [
        "Left lower lobe consolidation",
        "RIGHT-sided effusion",
        "bilateral, R>L",
        "bilateral (left > right)",
        "LLL infiltrate",
        "rt base",
        "dextrocardia",
        "levoscoliosis",
        "the lingula is clear",
        "middle lobe collapse",
        "shift leftwards",
        "épanchement pleural gauche",
    ],
)
def test_a_named_side_forbids_a_flip(caption: str) -> None:
    assert names_side(caption)


@pytest.mark.parametrize(
    "caption",
    ["", "Bilateral effusions", "both lungs are clear", "upright chest film", "leftover birthright", "L1 fracture"],
)
def test_no_side_allows_a_flip(caption: str) -> None:
    assert not names_side(caption)


def test_words_become_their_tokens() -> None:
    caption = "Small EFFUSION; no second effusion. Opacity"
    tokens = ["<bos>", *TOKENIZER.tokenize(caption)]
    words = token_spans(TOKENIZER, caption, find_words(caption, ["effusion"]), 77)
    assert [tokens[position] for position in words] == ["effusion</w>", "effusion</w>"]
    pieces = token_spans(TOKENIZER, caption, find_words(caption, ["opacity"]), 77)
    assert [tokens[position] for position in pieces] == ["o", "p", "a", "c", "i", "t", "y</w>"]
    assert token_spans(TOKENIZER, caption, [], 77) == []


def test_truncated_words_have_no_tokens() -> None:
    caption = "effusion small small effusion"
    assert token_spans(TOKENIZER, caption, find_words(caption, ["effusion"]), 77) == [1, 4]
    assert token_spans(TOKENIZER, caption, find_words(caption, ["effusion"]), 5) == [1]


@settings(max_examples=300)
@given(TEXT, TEXT, st.sampled_from(["effusion", "EFFUSION", "Épanchement", "E\u0301panchement", "中文", "ﬁssure", "ß"]))
def test_token_offsets_refer_to_the_caption_as_written(before: str, after: str, word: str) -> None:
    caption = f"{before} {word} {after}"
    start = len(before) + 1
    positions = token_spans(TOKENIZER, caption, [(start, start + len(word))], 512)
    ids = TOKENIZER(caption)["input_ids"]
    assert [ids[position] for position in positions] == TOKENIZER(word)["input_ids"][1:-1]


@settings(max_examples=200)
@given(TEXT, st.integers(3, 40), st.sampled_from(["<|endoftext|>", "!"]))
def test_groups_agree_with_the_padded_sequence(caption: str, max_length: int, pad_token: str) -> None:
    tokenizer = TOKENIZER if pad_token == TOKENIZER.pad_token else SD2_TOKENIZER
    groups = token_groups(tokenizer, caption, max_length)
    padded = tokenizer(caption, truncation=True, max_length=max_length, padding="max_length")
    assert groups.shape == (max_length,) and groups.dtype == torch.int64
    assert ((groups == PADDING) == (torch.tensor(padded["attention_mask"]) == 0)).all()
    assert groups[0] == BOS and (groups == BOS).sum() == (groups == EOS).sum() == 1
    assert padded["input_ids"][int((groups == EOS).nonzero())] == tokenizer.eos_token_id
    words = token_spans(tokenizer, caption, [(0, len(caption))], max_length)
    assert words == (groups == WORD).nonzero().flatten().tolist()


SD2_TOKENIZER = build_tokenizer(pad_token="!")


def test_empty_caption_has_no_words() -> None:
    assert token_groups(TOKENIZER, "", 5).tolist() == [BOS, EOS, PADDING, PADDING, PADDING]


def test_words_of_a_caption_keep_hyphens_apostrophes_and_accents() -> None:
    text = "Heart's size: X-ray, cafe\u0301 caf\u00e9 -- 2nd_look. X-RAY"
    assert words_of(text) == ["heart's", "size", "x-ray", "cafe\u0301", "caf\u00e9", "2nd", "look"]


@given(
    st.text(max_size=60),
    st.lists(st.sampled_from(["edema", "pleural effusion", "pneumonia"]), unique=True),
    st.integers(0, 99),
)
def test_inserted_labels_are_all_there_and_the_words_stay(caption: str, labels: list[str], key: int) -> None:
    for where in ("first", "random"):
        got = insert_labels(caption, labels, where, key)
        assert got == insert_labels(caption, labels, where, key)
        if not labels:
            assert got == caption
            continue
        words, rest = caption.split(), got.split()
        joined = " ".join(sorted(label for label in labels))
        assert len(rest) == len(words) + len(joined.split())
        start = next(p for p in range(6) if rest[:p] == words[:p] and rest[len(rest) - len(words) + p :] == words[p:])
        inside = " ".join(rest[start : len(rest) - len(words) + start])
        assert start == 0 or where == "random"
        assert all(label in inside for label in labels)


@given(st.lists(st.sampled_from(["edema", "pleural effusion", "pneumonia"]), unique=True), st.integers(0, 2**32 - 1))
def test_texts_of_labels_name_each_label_once(labels: list[str], key: int) -> None:
    text = text_of_labels(labels, None, key)
    assert text == text_of_labels(labels, None, key)
    assert sorted(text.split(", ")) == (sorted(labels) or ["no finding"])
    bank = {label: [f"There is {label}.", f"{label} is seen."] for label in labels}
    said = text_of_labels(labels, bank, key)
    assert [any(sentence in said for sentence in bank[label]) for label in labels] == [True] * len(labels)
    assert said.count(".") == len(labels)


def test_labels_come_in_every_order() -> None:
    assert len({text_of_labels(["a", "b", "c"], None, key) for key in range(100)}) == 6

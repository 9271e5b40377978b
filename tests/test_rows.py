"""Rows of training: their text, the words and regions of their labels, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training import tokens_of

from distill.config import NO_LABEL, DenoisingConfig
from distill.data.batch import Batch
from distill.data.cache import cache_latents
from distill.data.captions import has_label, names_side
from distill.data.phantom.dataset import PhantomDataset
from distill.data.rows import TrainingRows, check_training_text, training_caption
from distill.data.sample import Region, Sample
from distill.errors import UserError
from distill.experiment.run import _check_data as check_data
from distill.methods.options import SupervisedAttentionOptions
from distill.models import Model
from distill.tokens import token_groups

ROWS = PhantomDataset("train", 40, 0, 64)
BANK = {label: [f"There is {label}."] for label in ROWS.findings}


def test_rows_are_of_the_text_that_is_asked_for(sd: Model) -> None:
    config = DenoisingConfig(training_text="labels")
    rows = TrainingRows(ROWS, sd, denoising=config, label_tokens=True)
    for i in range(8):
        text = training_caption(ROWS, i, config)
        assert sorted(text.split(", ")) == (sorted(ROWS.labels(i)) or [NO_LABEL]) and rows.caption(i) == text
        row = rows[i]
        assert tokens_of(row).tolist() == sd.tokenize([text])[0][0].tolist()
        assert torch.equal(row.groups, token_groups(sd.tokenizers[0], text, 77))
        assert row.label_tokens is not None and bool(row.label_tokens.any()) == bool(ROWS.labels(i))
        assert row.flippable is None, "no row is mirrored unasked"
    assert training_caption(ROWS, 0, DenoisingConfig()) == ROWS.caption(0)


def test_rows_have_only_what_is_asked_for(sd: Model, loaded: dict[str, Model]) -> None:
    plain, sdxl = TrainingRows(ROWS, sd)[0], TrainingRows(ROWS, loaded["sdxl"])[0]
    assert (plain.flippable, plain.size_ids, plain.label_tokens, plain.regions) == (None,) * 4
    assert sdxl.size_ids is not None and sdxl.size_ids.tolist() == [64, 64, 0, 0, 64, 64]


class Counted(PhantomDataset):
    """Phantoms that count how often they are drawn and described."""

    drawn = described = 0

    def __getitem__(self, index: int) -> Sample:
        self.drawn += 1
        return super().__getitem__(index)

    def caption(self, index: int) -> str:
        self.described += 1
        return super().caption(index)


def test_the_text_of_a_row_is_made_once_and_no_image_is_decoded_for_its_size(
    loaded: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = loaded["sdxl"], Counted("train", 6, 0, 64)
    latents = cache_latents(data, model.vae, tmp_path, batch_size=4, flip=True, device="cpu")
    rows = TrainingRows(data, model, latents=latents, flip=True, label_tokens=True)
    data.drawn = data.described = 0
    first = Batch.stack([rows[i] for i in range(6)])
    assert (data.drawn, data.described) == (0, 6)
    monkeypatch.setattr(type(model), "tokenize", None)
    again = Batch.stack([rows[i] for i in range(6)])
    assert (data.drawn, data.described) == (0, 6)
    found, expected = (tensors_of(batch) for batch in (again, first))
    assert len(found) == 11 and all(map(torch.equal, found, expected))
    monkeypatch.undo()
    fresh = Batch.stack([TrainingRows(data, model, latents=latents, flip=True, label_tokens=True)[i] for i in range(6)])
    assert all(map(torch.equal, tensors_of(fresh), expected))


def test_memory_for_texts_is_bounded(sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill.data.rows.KEPT_ROWS", 2)
    data = Counted("train", 6, 0, 64)
    rows = TrainingRows(data, sd)
    for _ in range(2):
        for i in range(3):
            assert torch.equal(tokens_of(rows[i]), sd.tokenize([ROWS.caption(i)])[0][0])
    assert data.described == 2 + 2, "rows 0 and 1 once, row 2 at each reading"


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    batch.apply(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def test_a_row_is_mirrored_if_its_training_text_names_no_side(sd: Model, tmp_path: Path) -> None:
    """Not its caption; and where the cache lacks the mirrored image, its regions stay too."""
    config = DenoisingConfig(training_text="labels")
    texts = [training_caption(ROWS, i, config) for i in range(len(ROWS))]
    every = range(len(ROWS))
    of_texts, of_captions = (
        cache_latents(ROWS, sd.vae, tmp_path, batch_size=8, flip=True, device="cpu", captions=captions)
        for captions in (texts, None)
    )
    named = [names_side(ROWS.caption(i)) for i in every]
    assert any(named) and not any(map(names_side, texts))
    for latents, expected in ((of_texts, [True] * len(ROWS)), (of_captions, [not side for side in named])):
        rows = TrainingRows(ROWS, sd, config, latents=latents, flip=True)
        assert [bool(rows[i].flippable) for i in every] == expected
        assert [latents.may_flip(i) for i in every] == [latents.flipped(i) is not None for i in every] == expected
    assert all(TrainingRows(ROWS, sd, config, flip=True)[i].flippable for i in every)


def test_labels_that_limit_caption_dropout_are_compared_in_any_case() -> None:
    assert has_label(("Edema",), "edema") and not has_label(("Edema",), "ede")
    for labels in ((), ("No Finding",), (NO_LABEL,)):
        assert has_label(labels, NO_LABEL) and has_label(labels, "No Finding") and not has_label(labels, "edema")
    assert not has_label(("Edema",), "No Finding")


def test_a_caption_that_may_be_dropped_is_of_an_image_with_the_label(sd: Model) -> None:
    for label in (None, "edema", NO_LABEL):
        rows = TrainingRows(ROWS, sd, DenoisingConfig(caption_dropout_label=label))
        expected = [label is None or label in (ROWS.labels(i) or (NO_LABEL,)) for i in range(12)]
        assert [bool(rows[i].droppable) for i in range(12)] == expected
        assert any(expected) and (label is None or not all(expected))


def test_a_label_without_a_paraphrase_is_refused(sd: Model) -> None:
    config = DenoisingConfig(training_text="paraphrases", paraphrases=BANK)
    check_training_text(ROWS, sd, config, truncate=False)
    some = {label: BANK[label] for label in BANK if label != "edema"}
    with pytest.raises(UserError, match=r"no sentence for edema;"):
        check_training_text(ROWS, sd, DenoisingConfig(training_text="paraphrases", paraphrases=some), truncate=True)


def test_texts_that_the_encoder_would_cut_are_refused(sd: Model) -> None:
    long = DenoisingConfig(training_text="paraphrases", paraphrases={k: ["word " * 80] for k in BANK})
    with pytest.raises(UserError, match=r"77 tokens .* of row \d+: 'word"):
        check_training_text(ROWS, sd, long, truncate=False)
    check_training_text(ROWS, sd, long, truncate=True)


def test_regions_stand_at_the_words_of_their_finding(sd: Model) -> None:
    rows = TrainingRows(PhantomDataset("train", 6, 0, 64), sd, label_tokens=True, regions=True)
    for i in range(6):
        row, sample = rows[i], rows.dataset[i]
        assert row.regions is not None and row.label_tokens is not None
        some = row.regions.flatten(1).any(dim=1)
        assert torch.equal(some, row.label_tokens), "every named finding of a phantom has a mask"
        union = torch.stack([region.mask for region in sample.regions]).any(dim=0) if sample.regions else None
        if union is not None and some.any():
            coarse = torch.nn.functional.adaptive_max_pool2d(union[None].float(), 32)[0] > 0
            assert not (row.regions.any(dim=0) & ~coarse).any()


def test_regions_of_the_first_images_alone(sd: Model) -> None:
    def drawn(images: int | None) -> list[int]:
        rows = TrainingRows(ROWS, sd, regions=True, region_images=images)
        return [i for i in range(len(rows)) if (found := rows[i].regions) is not None and found.any()]

    everywhere = drawn(None)
    fourth = everywhere[3]  # the limit falls on an image that has regions
    assert drawn(fourth) == everywhere[:3] and drawn(fourth + 1) == everywhere[:4] != everywhere


class SomeRegions(PhantomDataset):
    where: tuple[int, ...] = ()

    def regions(self, index: int) -> tuple[Region, ...]:
        return super().regions(0) if index in self.where else ()


@pytest.mark.parametrize(
    ("images", "where", "refused"),
    [(5, (5,), 5), (6, (5,), None), (None, (5,), None), (50, (5,), None), (50, (), 8), (None, (), 8)],
)
def test_a_region_must_be_among_the_images_whose_regions_are_used(
    sd: Model, images: int | None, where: tuple[int, ...], refused: int | None
) -> None:
    train = SomeRegions("train", 8, 0, 64)
    train.where = where
    assert PhantomDataset("train", 8, 0, 64)[0].regions, "the first image has a region to lend"
    method = SupervisedAttentionOptions(region_token_weight=0.1, images=images)
    training = SimpleNamespace(method=method, denoising=DenoisingConfig())
    opened: Any = SimpleNamespace(
        train=train, test=None, config=SimpleNamespace(data=None),
        evaluation=SimpleNamespace(protocol="paper", localization_text="caption"),
        arms={"arm": SimpleNamespace(name="arm", training=training)},
    )  # fmt: skip
    if refused is None:
        check_data(opened, sd)
    else:
        with pytest.raises(UserError, match=f"and none of the first {refused} has one"):
            check_data(opened, sd)

"""Training texts made of labels, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.config import DenoisingConfig
from distill.data.phantom.dataset import PhantomDataset
from distill.data.rows import TrainingRows, check_training_text, training_caption
from distill.errors import UserError
from distill.models.family import Model

ROWS = PhantomDataset("train", 40, 0, 64)
BANK = {label: [f"There is {label}."] for label in ROWS.findings}


def test_rows_are_of_the_text_that_is_asked_for(sd: Model) -> None:
    config = DenoisingConfig(training_text="labels")
    rows = TrainingRows(ROWS, sd, denoising=config, label_tokens=True)
    for i in range(8):
        text = training_caption(ROWS, i, config)
        assert sorted(text.split(", ")) == (sorted(ROWS.labels(i)) or ["no finding"])
        assert rows[i]["input_ids_0"].tolist() == sd.tokenize([text])[0][0].tolist()
        assert bool(rows[i]["label_tokens"].any()) == bool(ROWS.labels(i))
    assert training_caption(ROWS, 0, DenoisingConfig()) == ROWS.caption(0)


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


def test_regions_of_the_first_images_alone(sd: Model) -> None:
    config = DenoisingConfig(region_token_weight=0.01, region_images=10)
    few, every = (
        TrainingRows(ROWS, sd, denoising=denoising, regions=True)
        for denoising in (config, replace(config, region_images=None))
    )
    drawn = [index for index in range(len(ROWS)) if every[index]["regions"].any()]
    assert (
        [index for index in drawn if few[index]["regions"].any()] == [index for index in drawn if index < 10] != drawn
    )

"""A classifier tells what training images are worth, on real images that it did not see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distill.evaluation.utility import Labelled, mean_auc, train_classifier, utility


def with_squares(count: int, seed: int) -> Labelled:
    """Finding 0 is a bright square on the left, finding 1 on the right, in noise."""
    generator = torch.Generator().manual_seed(seed)
    images = 0.2 * torch.randn(count, 3, 64, 64, generator=generator)
    labels = torch.rand(count, 2, generator=generator) < 0.5
    for image, (left, right) in zip(images, labels, strict=True):
        image[:, 24:40, 8:24] += 0.5 * left
        image[:, 24:40, 40:56] += 0.5 * right
    return Labelled.of(images.clamp(-1, 1), labels)


def wrong(data: Labelled) -> Labelled:
    """Every image with the labels of another."""
    return Labelled(data.images, data.labels[torch.randperm(len(data), generator=torch.Generator().manual_seed(9))])


def test_good_images_are_worth_as_much_as_real_ones_and_wrong_labels_nothing() -> None:
    real, held_out = with_squares(64, 0), with_squares(64, 1)
    good = utility(real, with_squares(64, 2), held_out, steps=40, seeds=(0, 1))
    assert good["real"]["auc"] > 0.9 and good["generated"]["auc"] > 0.9
    assert good["generated_minus_real"]["per_seed"] == pytest.approx(
        np.subtract(good["generated"]["per_seed"], good["real"]["per_seed"])
    )
    assert good["images"] == {"real": 64, "generated": 64, "both": 128} and good["held_out"] == 64
    assert good["real"]["auc_ci"][0] <= good["real"]["auc"] <= good["real"]["auc_ci"][1]
    bad = mean_auc(train_classifier(wrong(with_squares(64, 2)), 40, 0), held_out)
    assert abs(bad - 0.5) < 0.2 < good["generated"]["auc"] - bad


def test_a_classifier_is_decided_by_its_data_and_seed() -> None:
    data = with_squares(40, 0)
    first, again, other = (train_classifier(data, 3, seed)(data.images) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)

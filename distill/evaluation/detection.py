"""Can a detector tell generated from real images by features that have a name, and which of them give a generated one
away?

A row is an image (distill/metrics/image_features.py). Boosted trees learn real against generated on some images and are
scored on others; images of one group (patient, else real image and what is drawn of its caption) are never on both
sides. Every explanation is of images that the detector did not see. Source: Kapar et al. 2025, who do this for tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from distill.errors import UserError
from distill.evaluation.tree_shap import BoostedTrees, tree_shap
from distill.metrics.image_features import FEATURES, image_features
from distill.models.family import Model

Floats = NDArray[np.float64]
FOLDS, REPEATS = 5, 2
LEAST_IMAGES = 2 * FOLDS
"""Images of either kind that a detector needs."""
NAMES = tuple(feature.name for feature in FEATURES)
KINDS = tuple(dict.fromkeys(feature.kind for feature in FEATURES))


def eight_bit(images: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1] as a file of 8 bits holds them, so that no detector learns the number format."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


@torch.no_grad()
def through_vae(model: Model, images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1], encoded (mean of the posterior) and decoded by the model's VAE; on the CPU."""
    pixels = images.to(model.vae.device, model.vae.dtype)
    latents = model.vae.encode(pixels).latent_dist.mode()
    returned: torch.Tensor = model.vae.decode(latents).sample.float().cpu().clamp(-1, 1)
    return returned


@dataclass(frozen=True)
class Rows:
    """values: (N, features). groups: (N,) names; images of one name are trained on together, or tested on together."""

    values: Floats
    groups: NDArray[np.str_]
    spread: float = 0.0
    """Median over the images of the mean difference of the largest and the smallest channel, in levels of 8 bits; where
    the images were made gray, before that."""

    @classmethod
    def of(cls, images: torch.Tensor, groups: Sequence[str]) -> Rows:
        """Of images in [-1, 1], rounded to 8 bits."""
        measured = [image_features(eight_bit(images[start : start + 16])) for start in range(0, len(images), 16)]
        return cls(torch.cat(measured).numpy(), np.asarray(groups, dtype=str))

    def __len__(self) -> int:
        return len(self.values)

    def first(self, count: int) -> Rows:
        return Rows(self.values[:count], self.groups[:count])

    def where(self, chosen: NDArray[np.bool_]) -> Rows:
        return Rows(self.values[chosen], self.groups[chosen])


class Pair(NamedTuple):
    """Real rows, and those that are to be told from them."""

    real: Rows
    other: Rows


@dataclass(frozen=True)
class Fold:
    """A detector and what it did not see. of: number of the pair. rows: places in [*real, *other]."""

    model: BoostedTrees
    of: int
    rows: NDArray[np.int64]
    values: Floats
    is_other: NDArray[np.bool_]
    auc: float

    def scores(self, values: Floats) -> Floats:
        """Probability of not being real."""
        return np.asarray(self.model.predict_proba(values)[:, 1], dtype=np.float64)


class Estimate(NamedTuple):
    value: float
    interval: tuple[float, float]


def group_faults(groups: Sequence[str], count: int, sets: Sequence[Sequence[str]]) -> list[str]:
    """Why real images of these groups, of which the first `count` are compared with `sets`, are too few to train
    detectors on: at least LEAST_IMAGES groups on each side, and in each half of the control."""
    least, all_groups, first = LEAST_IMAGES, len(set(groups)), len(set(groups[:count]))
    faults = []
    if all_groups < 2 * least:
        faults.append(
            f"the held-out images are of {all_groups} patients or images; the control, real against real images, needs "
            f"{2 * least}"
        )
    if first < least:
        faults.append(
            f"the {count} images that are compared are of {first} patients or images; a detector needs {least}"
        )
    fewest = min((len(set(names)) for names in sets), default=least)
    if fewest < least:
        faults.append(f"a set of generated images has {fewest}; a detector needs {least}")
    return faults


def halves(rows: Rows, count: int, seed: int) -> list[Pair]:
    """`count` ways to split real images in two by group: the control, whose AUC is .5."""
    rng, names = np.random.default_rng(seed), np.unique(rows.groups)
    found = []
    for _ in range(count):
        first = np.isin(rows.groups, rng.permutation(names)[: len(names) // 2])
        found.append(Pair(rows.where(first), rows.where(~first)))
    return found


def area_under_curve(is_other: NDArray[np.bool_], scores: Floats) -> float:
    """The probability that another image has a higher score than a real one; ties count half."""
    ranks, positive = stats.rankdata(scores), int(is_other.sum())
    above = float(ranks[is_other].sum()) - positive * (positive + 1) / 2
    return above / (positive * (len(scores) - positive))


def check_installed() -> None:
    """Raise UserError without scikit-learn."""
    try:
        import sklearn.ensemble  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("the detector needs scikit-learn: pip install 'attention-distill[explain]'") from error


def train_detectors(pairs: Sequence[Pair], seed: int) -> list[Fold]:
    """Cross-validated detectors of every pair. Raises UserError with too few images of either kind, or of groups."""
    check_installed()
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedGroupKFold

    found = []
    for number, (real, other) in enumerate(pairs):
        for side in (real, other):
            if (count := len(np.unique(side.groups))) < LEAST_IMAGES:
                raise UserError(
                    f"a detector needs at least {LEAST_IMAGES} different patients, or images where none is known, real "
                    f"as well as generated; got {count}"
                )
        values, groups = np.concatenate([real.values, other.values]), np.concatenate([real.groups, other.groups])
        is_other = np.arange(len(values)) >= len(real)
        for repeat in range(REPEATS):
            splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed + repeat)
            for whole, unseen in splitter.split(values, is_other, groups):
                seen = _as_many_of_either(whole, is_other, seed + repeat)
                model = HistGradientBoostingClassifier(
                    max_iter=40, max_depth=3, min_samples_leaf=5, early_stopping=False, random_state=seed,
                ).fit(values[seen], is_other[seen])  # fmt: skip
                truth, tested = is_other[unseen], values[unseen]
                area = area_under_curve(truth, model.predict_proba(tested)[:, 1])
                found.append(Fold(model, number, unseen, tested, truth, area))
    return found


def _as_many_of_either(rows: NDArray[np.int64], is_other: NDArray[np.bool_], seed: int) -> NDArray[np.int64]:
    """Of `rows` all of the smaller side, and as many of the larger, at random: else a detector that knows nothing would
    say what is more frequent. Weights instead of this make a fit ten times slower."""
    sides, rng = [rows[is_other[rows] == side] for side in (False, True)], np.random.default_rng(seed)
    count = min(map(len, sides))
    return np.sort(np.concatenate([rng.permutation(side)[:count] for side in sides]))


def over_folds(values: Sequence[float]) -> Estimate:
    """Mean and 95 % interval. Detectors share training images, so that the variance of their mean is s^2 (1/J + 1/(K -
    1)) for J detectors and K folds (Nadeau, Bengio 2003); Student's t has K - 1 degrees of freedom, as of one round of
    folds."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stats.t.ppf(0.975, FOLDS - 1)) * spread * (1 / len(values) + 1 / (FOLDS - 1)) ** 0.5
    return Estimate(mean, (mean - half, mean + half))


def auc(folds: Sequence[Fold]) -> Estimate:
    """Area under the ROC curve; .5 is chance."""
    value, (low, high) = over_folds([fold.auc for fold in folds])
    return Estimate(value, (max(0.0, low), min(1.0, high)))


def importance(folds: Sequence[Fold], columns: Sequence[Sequence[int]], seed: int, shuffles: int = 5) -> list[Estimate]:
    """Of each group of columns: the AUC that unseen images lose where its values are shuffled together."""
    rng = np.random.default_rng(seed)
    lost = np.zeros((len(folds), len(columns)))
    for place, fold in enumerate(folds):
        orders = [rng.permutation(len(fold.values)) for _ in range(shuffles)]
        for group, chosen in enumerate(map(list, columns)):
            shuffled = np.tile(fold.values, (shuffles, 1, 1))
            for row, order in zip(shuffled, orders, strict=True):
                row[:, chosen] = fold.values[order][:, chosen]
            scores = fold.scores(shuffled.reshape(-1, fold.values.shape[1])).reshape(shuffles, -1)
            lost[place, group] = fold.auc - np.mean([area_under_curve(fold.is_other, s) for s in scores])
    return [over_folds(column) for column in lost.T]


def partial_dependence(folds: Sequence[Fold], column: int, points: int = 15) -> tuple[Floats, Floats]:
    """Values of a feature, and the mean probability of not being real if all unseen images had that value."""
    values = np.concatenate([fold.values[:, column] for fold in folds])
    values = values[~np.isnan(values)]
    grid = np.unique(np.quantile(values, np.linspace(0.02, 0.98, points))) if len(values) else np.zeros(0)
    curve = [np.mean([fold.scores(_with(fold.values, column, value)).mean() for fold in folds]) for value in grid]
    return grid, np.asarray(curve)


def _with(values: Floats, column: int, value: float) -> Floats:
    changed: Floats = values.copy()
    changed[:, column] = value
    return changed


@dataclass(frozen=True)
class Change:
    """A feature that would have to go `before` -> `after` for the image to pass as real."""

    column: int
    before: float
    after: float


@dataclass(frozen=True)
class Explained:
    """One image that is not real. row: its place among the others of its pair. added: (features,) logits by
    TreeSHAP."""

    row: int
    of: int
    score: float
    added: Floats
    change: Change | None


def counterfactual(
    score: Callable[[Floats], Floats], row: Floats, legal: Floats, spread: Floats, points: int = 40
) -> Change | None:
    """The smallest change of one feature to a value that real images have, which makes the score less than .5.

    score: (N, features) -> (N,). legal: (N, features) of real images. spread: (features,), the unit of each feature's
    changes. None if no single feature is enough.
    """
    trials = []
    for column in np.flatnonzero(~np.isnan(row) & (spread > 0)):
        values = legal[:, column][~np.isnan(legal[:, column])]
        trials += [(column, value) for value in np.unique(np.quantile(values, np.linspace(0, 1, points)))]
    rows = np.tile(row, (len(trials), 1))
    for changed, (column, value) in zip(rows, trials, strict=True):
        changed[column] = value
    passing = [trial for trial, found in zip(trials, score(rows) < 0.5, strict=True) if found]
    if not passing:
        return None
    column, value = min(passing, key=lambda trial: abs(trial[1] - row[trial[0]]) / spread[trial[0]])
    return Change(int(column), float(row[column]), float(value))


def explain_images(pairs: Sequence[Pair], folds: Sequence[Fold], number: int = 0) -> Iterator[Explained]:
    """Every image of pair `number` that is not real, by the detector of the first round that did not see it."""
    real = pairs[number].real
    spread = np.ma.masked_invalid(real.values).std(axis=0).filled(0)
    for fold in [fold for fold in folds if fold.of == number][:FOLDS]:
        rows, values = fold.rows[fold.is_other] - len(real), fold.values[fold.is_other]
        _, added = tree_shap(fold.model, values)
        for row, value, parts, score in zip(rows, values, added, fold.scores(values), strict=True):
            change = counterfactual(fold.scores, value, real.values, spread) if score >= 0.5 else None
            yield Explained(int(row), number, float(score), parts, change)

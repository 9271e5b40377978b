from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.linalg import sqrtm
from sklearn.metrics import roc_auc_score
from torch import nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from distill.errors import UserError
from distill.metrics import (
    Diversity,
    bootstrap_interval,
    finding_auroc,
    frechet_distance,
    frechet_interval,
    macro_mean_interval,
    ms_ssim_betas,
)
from distill.metrics.bootstrap import percentile_interval, resample_counts
from distill.metrics.features import load_features


def features(seed: int, rows: int, width: int = 8, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64) @ mix + shift


def reference_frechet(real: torch.Tensor, generated: torch.Tensor) -> float:
    x, y = real.numpy(), generated.numpy()
    s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real))


def test_frechet_distance_of_a_set_to_itself_is_zero() -> None:
    real = features(0, 100)
    assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-6)
    assert frechet_distance(real, real.flip(0)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("rows", "other_rows"), [(200, 150), (200, 5), (5, 6)])
@pytest.mark.parametrize("origin", [0.0, 1e4])
def test_frechet_distance_equals_scipy(rows: int, other_rows: int, origin: float) -> None:
    """Also with fewer images than features, and far from the origin."""
    real, generated = features(0, rows), 1.3 * features(1, other_rows, shift=0.5)
    expected = reference_frechet(real, generated)
    assert frechet_distance(real + origin, generated + origin) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_of_a_shift_is_its_square() -> None:
    real = features(0, 50)
    assert frechet_distance(real.float(), (real + 2.0).float()) == pytest.approx(8 * 2.0**2, rel=1e-5)


@pytest.mark.parametrize("rows", [300, 6])
def test_frechet_interval_holds_the_distance_and_is_deterministic(rows: int) -> None:
    real, generated = features(0, rows), features(1, rows, shift=0.3)
    interval = frechet_interval(real, generated, seed=3)
    assert interval is not None
    low, high = interval
    assert 0 <= low < frechet_distance(real, generated) < high
    assert frechet_interval(real, generated, seed=3) == (low, high)
    assert frechet_interval(real, generated, samples=0) is None


def test_frechet_interval_is_of_resamples_less_their_mean_excess() -> None:
    real, generated = features(0, 30), features(1, 20, shift=0.3)
    generator = torch.Generator().manual_seed(5)
    drawn = []
    for _ in range(40):
        sides = [side[torch.randint(len(side), (len(side),), generator=generator)] for side in (real, generated)]
        drawn.append(frechet_distance(*sides))
    excess = np.mean(drawn) - frechet_distance(real, generated)
    assert excess > 0
    expected = np.quantile(drawn - excess, [0.05, 0.95])
    assert frechet_interval(real, generated, samples=40, seed=5, level=0.9) == pytest.approx(expected, rel=1e-4)
    near = frechet_interval(real, real[:20], samples=40)
    assert near is not None and near[0] >= 0


def test_frechet_interval_is_as_wide_as_the_spread_of_new_draws() -> None:
    draws = [frechet_distance(features(2 * k, 200), features(2 * k + 1, 200, shift=0.7)) for k in range(60)]
    interval = frechet_interval(features(0, 200), features(1, 200, shift=0.7), samples=200)
    assert interval is not None
    spread = np.subtract(*np.quantile(draws, [0.975, 0.025]))
    assert 0.6 < (interval[1] - interval[0]) / spread < 1.6


def test_frechet_errors() -> None:
    with pytest.raises(ValueError, match=r"\(10, 8\) and \(10, 4\)"):
        frechet_distance(features(0, 10), features(0, 10, width=4))
    with pytest.raises(ValueError, match="1 generated"):
        frechet_distance(features(0, 10), features(0, 1))
    broken = features(0, 10)
    broken[0, 0] = float("nan")
    with pytest.raises(ValueError, match="1 real features"):
        frechet_interval(broken, features(0, 10))


def pictures(captions: int, samples: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(captions, samples, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_diversity_of_equal_images_is_zero() -> None:
    metric = Diversity()
    metric.update(pictures(2, 1, 48).expand(-1, 3, -1, -1, -1))
    assert float(metric.compute()) == pytest.approx(0.0, abs=1e-6)


def test_diversity_never_compares_captions() -> None:
    """Images are equal within each caption and different between captions, in one update or in two."""
    together, apart = Diversity(), Diversity()
    images = torch.cat([pictures(1, 1, 48, seed).expand(-1, 4, -1, -1, -1) for seed in range(3)])
    together.update(images)
    for image in images:
        apart.update(image[None])
    assert float(together.compute()) == pytest.approx(0.0, abs=1e-6)
    assert float(apart.compute()) == pytest.approx(0.0, abs=1e-6)


def test_diversity_equals_a_loop_and_rises_with_noise() -> None:
    base, noise = pictures(2, 1, 64) * 0.5, pictures(2, 3, 64, seed=1)
    results = []
    for strength in (0.05, 0.5):
        images = base + strength * noise
        loop = [
            1
            - multiscale_structural_similarity_index_measure(
                caption[i : i + 1], caption[j : j + 1], data_range=1.0, betas=ms_ssim_betas(64, 64)
            )
            for caption in images
            for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        metric, parts = Diversity(), Diversity()
        metric.update(images)
        parts.update(images[:1])
        second = Diversity()
        second.update(images[1:])
        parts.merge_state(second)
        results.append(float(metric.compute()))
        assert results[-1] == pytest.approx(float(torch.stack(loop).mean()), abs=1e-6)
        assert float(parts.compute()) == pytest.approx(results[-1], abs=1e-12)
    assert 0 <= results[0] < results[1] <= 1


@pytest.mark.parametrize("side", [11, 12, 43, 44, 98, 99, 128, 175, 176])
def test_every_side_that_has_scales_is_taken_by_torchmetrics(side: int) -> None:
    scales = 1 + sum(side >= bound for bound in (12, 44, 99, 176))
    betas = ms_ssim_betas(side, side + 3)
    assert len(betas) == scales
    assert sum(betas) == pytest.approx(1.0, abs=2e-4)
    metric = Diversity()
    metric.update(pictures(1, 2, side))
    assert 0 < float(metric.compute()) <= 1


def test_diversity_errors() -> None:
    metric = Diversity()
    with pytest.raises(ValueError, match=r"two samples or more; got \(2, 1, 3, 48, 48\)"):
        metric.update(pictures(2, 1, 48))
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        metric.update(2 * pictures(1, 2, 48) - 1)
    with pytest.raises(ValueError, match="got 10 x 10"):
        metric.update(pictures(1, 2, 10))


@settings(max_examples=50)
@given(
    scores=arrays(np.float32, (12, 3), elements=st.integers(-3, 3).map(float)),
    labels=arrays(np.bool_, (12, 3)),
)
def test_finding_auroc_equals_sklearn_with_ties(scores: np.ndarray, labels: np.ndarray) -> None:
    result = finding_auroc(torch.from_numpy(scores), torch.from_numpy(labels), samples=20)
    defined = []
    for finding in range(3):
        column = labels[:, finding]
        value = result["per_finding"][finding]
        if column.all() or not column.any():
            assert value is None
        else:
            defined.append(roc_auc_score(column, scores[:, finding]))
            assert value == pytest.approx(defined[-1], abs=1e-6)
    if defined:
        assert result["auc"] == pytest.approx(np.mean(defined), abs=1e-6)
    else:
        assert result["auc"] is None and result["auc_ci"] is None


def test_finding_auroc_interval_equals_a_loop_over_sklearn() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(40, 2, generator=generator) < 0.3
    scores = (labels + torch.randn(40, 2, generator=generator)).round()
    means = []
    for counts in next(resample_counts(40, 30, seed=5)):
        rows = np.repeat(np.arange(40), counts.astype(int))
        means.append(np.mean([roc_auc_score(labels[rows, k], scores[rows, k]) for k in range(2)]))
    result = finding_auroc(scores, labels, samples=30, seed=5)
    assert result["auc_ci"] == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)


def test_finding_auroc_keeps_the_order_of_large_logits() -> None:
    """A sigmoid of these scores is 1.0 for all of them in float32."""
    scores = torch.arange(100.0, 110.0)[:, None]
    assert finding_auroc(scores, scores > 104.5)["auc"] == 1.0
    assert finding_auroc(-scores, scores > 104.5)["auc"] == 0.0


def test_finding_auroc_errors() -> None:
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(4, 3\)"):
        finding_auroc(torch.zeros(4, 2), torch.zeros(4, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="labels must be bool"):
        finding_auroc(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="8 of 8 scores"):
        finding_auroc(torch.full((4, 2), torch.nan), torch.zeros(4, 2, dtype=torch.bool))


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        clusters = np.repeat(np.arange(40), 3)
        values = rng.normal(2.0, 1.0, 40)[clusters] + rng.normal(0.0, 0.3, 120)
        interval = macro_mean_interval(values, np.zeros(120, int), clusters, samples=200, seed=seed)
        assert interval is not None
        hits += interval[0] <= 2.0 <= interval[1]
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize("level", [0.0, 1.0, 1.5, 95])
def test_the_level_of_an_interval_is_a_share(level: float) -> None:
    with pytest.raises(ValueError, match=f"level must be in .* got {level}"):
        percentile_interval(np.array([1.0, 2.0]), level)


def test_bootstrap_draws_clusters_and_not_rows() -> None:
    """Copies of the rows of a cluster are no new evidence: the interval must not shrink."""
    values = np.random.default_rng(0).normal(size=50)
    single = bootstrap_interval(values, np.arange(50), np.mean, samples=300)
    copied = bootstrap_interval(np.repeat(values, 20), np.repeat(np.arange(50), 20), np.mean, samples=300)
    assert copied == pytest.approx(single, abs=1e-12)


def test_macro_interval_agrees_with_the_general_one() -> None:
    rng = np.random.default_rng(0)
    images, findings = rng.integers(60, size=200), rng.integers(4, size=200)
    values = rng.normal(size=200) + findings

    def macro(rows: np.ndarray) -> float:
        return float(np.mean([rows[rows[:, 1] == finding, 0].mean() for finding in np.unique(rows[:, 1])]))

    slow = bootstrap_interval(np.stack([values, findings], axis=1), images, macro, samples=3000)
    fast = macro_mean_interval(values, findings, images, samples=3000)
    assert fast == pytest.approx(slow, abs=0.03)


def test_macro_interval_leaves_absent_findings_out() -> None:
    """The second finding is in one image of three, so that many resamples lack it."""
    interval = macro_mean_interval([0.0, 0.0, 0.0, 1.0], [0, 0, 0, 1], [0, 1, 2, 2])
    assert interval == (0.0, 0.5)


def test_intervals_do_not_depend_on_the_order_of_pairs() -> None:
    rng = np.random.default_rng(0)
    images, findings, values = rng.integers(60, size=200), rng.integers(4, size=200), rng.normal(size=200)
    order = rng.permutation(200)
    assert macro_mean_interval(values[order], findings[order], images[order]) == pytest.approx(
        macro_mean_interval(values, findings, images), abs=1e-12
    )


def test_no_interval_without_two_clusters() -> None:
    assert bootstrap_interval([1.0, 2.0], [3, 3], np.mean) is None
    assert macro_mean_interval([1.0, 2.0], [0, 1], [3, 3]) is None
    assert macro_mean_interval([], [], []) is None
    assert macro_mean_interval([1.0, 2.0], [0, 1], [3, 4], samples=0) is None


def test_bootstrap_errors() -> None:
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        macro_mean_interval([1.0, np.nan], [0, 0], [0, 1])
    with pytest.raises(ValueError, match="one label a value"):
        bootstrap_interval([1.0, 2.0], [0, 1, 2], np.mean)
    for level in (0.0, 1.0, 1.5, 95):
        with pytest.raises(ValueError, match="level"):
            macro_mean_interval([1.0, 2.0], [0, 0], [0, 1], level=level)


def test_a_thousand_resamples_are_quick() -> None:
    """Half a second and two seconds on an idle core; the bounds leave room for a busy machine."""
    rng = np.random.default_rng(0)
    start = time.process_time()
    macro_mean_interval(rng.normal(size=2000), rng.integers(8, size=2000), rng.integers(1000, size=2000))
    assert time.process_time() - start < 2
    start = time.process_time()
    finding_auroc(torch.from_numpy(rng.normal(size=(500, 8))), torch.from_numpy(rng.random((500, 8)) < 0.3))
    assert time.process_time() - start < 6


def test_images_that_do_not_count_for_a_finding_are_as_if_they_were_not_there() -> None:
    rng = np.random.default_rng(0)
    scores, labels = torch.from_numpy(rng.normal(size=(60, 2))), torch.from_numpy(rng.random((60, 2)) < 0.4)
    counted = torch.from_numpy(rng.random((60, 2)) < 0.6)
    found = finding_auroc(scores, labels, samples=50, counted=counted)
    alone = [finding_auroc(scores[own, k : k + 1], labels[own, k : k + 1])["auc"] for k, own in enumerate(counted.T)]
    assert found["per_finding"] == pytest.approx(alone) and found["auc"] == pytest.approx(np.mean(alone))
    assert found["auc"] != pytest.approx(finding_auroc(scores, labels)["auc"], abs=1e-3)
    assert found["auc_ci"] is not None and found["auc_ci"][0] < found["auc"] < found["auc_ci"][1]
    changed = torch.where(counted, scores, scores + 100)
    assert finding_auroc(changed, labels, samples=50, counted=counted) == found
    assert finding_auroc(scores, labels, counted=labels)["auc"] is None, "no image without the finding is left"


# Feature extractors whose packages and weights are not here: a stand-in says what they are given.


class StandIn(nn.Module):
    pathologies = ("Effusion", "Lung_Opacity")

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images

    def features2(self, images: torch.Tensor) -> torch.Tensor:
        return -images


def failing(error: Exception) -> Any:
    def fail(**options: Any) -> Any:
        raise error

    return fail


def test_inception_sees_pixels_of_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", StandIn)
    found: Any = load_features("inception", phantom_data=True)
    assert found.model.options == {
        "name": "inception-v3-compat", "features_list": ["2048"], "feature_extractor_weights_path": None,
    }  # fmt: skip
    values, scores = found(torch.tensor([-3.0, -1.0, -0.991, 0.0, 0.5, 1.0, 3.0]).view(1, 1, 1, 7).expand(2, 3, 1, 7))
    assert values.dtype == torch.uint8 and scores is None and values.shape == (2, 21)
    assert values[0].tolist() == [0, 0, 1, 128, 191, 255, 255] * 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("x"), "needs torch-fidelity: pip install 'attention-distill"),
        (OSError("no route"), r"cannot be fetched \(no route\)"),
    ],
)
def test_inception_that_cannot_be_had_is_one_clear_error(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", failing(error))
    with pytest.raises(UserError, match=f"evaluation.features inception.*{said}"):
        load_features("inception", phantom_data=False)


def test_xrv_sees_gray_images_of_224_pixels_from_minus_to_plus_1024(monkeypatch: pytest.MonkeyPatch) -> None:
    models = SimpleNamespace(DenseNet=StandIn)
    monkeypatch.setitem(sys.modules, "torchxrayvision", SimpleNamespace(models=models))
    found: Any = load_features("xrv", phantom_data=False)
    assert found.model.options == {"weights": "densenet121-res224-all"} and not found.training
    assert found.findings == ["pleural effusion", "lung opacity"], "as the data call them"
    images = torch.zeros(2, 3, 448, 448)
    images[0] = torch.tensor([-1.0, 0.5, 1.0]).view(3, 1, 1)
    images[1] = 1.0
    values, scores = found(images)
    assert scores.shape == (2, 1, 224, 224) and torch.equal(values, -scores)
    assert scores[1].min() == scores[1].max() == 1024 and scores[0].mean() == pytest.approx(1024 / 6)
    monkeypatch.setattr(models, "DenseNet", failing(OSError("no route")))
    with pytest.raises(UserError, match=r"xrv: the weights cannot be fetched \(no route\)"):
        load_features("xrv", phantom_data=False)
    monkeypatch.setitem(sys.modules, "torchxrayvision", None)
    with pytest.raises(UserError, match="xrv needs torchxrayvision and a torchvision"):
        load_features("xrv", phantom_data=False)


def test_features_are_chosen_by_the_data_alone_where_they_are_auto() -> None:
    assert load_features("none", phantom_data=True) is None and load_features("auto", phantom_data=False) is None
    phantom = load_features("auto", phantom_data=True)
    assert phantom is not None and phantom.name == "phantom"
    assert not any(parameter.requires_grad for parameter in phantom.parameters())


def test_the_distance_asks_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the main process measures: one that waited for the others would wait for ever.
    def waits(*_: object, **__: object) -> None:
        raise AssertionError("it waits for other processes")

    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    monkeypatch.setattr("torchmetrics.Metric._sync_dist", waits)
    features = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(features, features) < 1e-6

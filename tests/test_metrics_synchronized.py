"""Metrics of generated images as torchmetrics classes: uneven shares of two processes, one of them empty, give the
values of the functions on all rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pair import in_two_processes

from distill.metrics import (
    CopiedShare,
    FindingAUC,
    FrechetDistance,
    ImageTextSimilarity,
    KernelDistance,
    Manifolds,
    NearCopyCount,
    NearerThanHeldOut,
    PrecisionRecallDensityCoverage,
    finding_auroc,
    frechet_distance,
    kernel_distance,
)
from distill.metrics.image_text import similarity
from distill.metrics.memorization import closeness, copies, near_copies, nearest

pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method")


def data() -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    real, generated = torch.randn(13, 3, generator=draw) + 40, torch.randn(11, 3, generator=draw) + 40.5
    texts = torch.nn.functional.normalize(torch.randn(4, 3, generator=draw), dim=1)[torch.arange(11) % 4]
    return {
        "real": real,
        "generated": generated,
        "labels": torch.rand(11, 3, generator=draw) < 0.5,
        "texts": texts,
        "images": torch.nn.functional.normalize(generated - 40.5 + texts, dim=1),
        "near": (nearest(generated, [real]), nearest(generated, [real.flip(0) + 0.1])),
        "apart": torch.rand(9, dtype=torch.float64, generator=draw),
    }


def metrics() -> dict[str, Any]:
    return {
        "fid": FrechetDistance(),
        "kid": KernelDistance(),
        "manifold": PrecisionRecallDensityCoverage(neighbours=2),
        "auc": FindingAUC(),
        "similarity": ImageTextSimilarity(),
        "copies": CopiedShare(13, 13),
        "near": NearCopyCount(),
        "closeness": NearerThanHeldOut(),
    }


def add(found: dict[str, Any], of: dict[str, Any], real: slice, generated: slice) -> None:
    """A batch of each; nothing is added for an empty slice of real images."""
    if of["real"][real].numel():
        for name in ("fid", "kid", "manifold"):
            found[name].update(of["real"][real], real=True)
    if of["generated"][generated].numel():
        for name in ("fid", "kid", "manifold"):
            found[name].update(of["generated"][generated], real=False)
        found["auc"].update(of["generated"][generated], of["labels"][generated])
        found["similarity"].update(of["images"][generated], of["texts"][generated])
        found["copies"].update(*(type(n)(n.distance[generated], n.row[generated]) for n in of["near"]))
        found["closeness"].update(torch.from_numpy(of["near"][0].distance[generated]), generated=True)
        found["near"].update(of["images"][generated, 0].double().abs(), generated=True)
        found["near"].update(of["apart"][generated], generated=False)
        found["closeness"].update(of["apart"][generated], generated=False)


def expected() -> dict[str, Any]:
    of = data()
    manifold = Manifolds(of["real"], of["generated"], 2).values()
    captions = [str(k % 4) for k in range(11)]
    alike = similarity(of["images"], of["texts"], captions, samples=0)
    copied = copies(*of["near"], 13, 13, samples=0)
    return {
        "fid": frechet_distance(of["real"], of["generated"]),
        "kid": kernel_distance(of["real"], of["generated"])[0],
        "manifold": dict(zip(("precision", "recall", "density", "coverage"), manifold, strict=True)),
        "auc": finding_auroc(of["generated"], of["labels"], samples=0)["auc"],
        "similarity": {name: alike[name] for name in ("own", "adds")},  # type: ignore[literal-required]
        "copies": {name: copied[name] for name in ("share", "chance", "copies", "p")},  # type: ignore[literal-required]
        "near": near_copies(of["images"][:, 0].abs().numpy(), of["apart"].numpy()),
        "closeness": closeness(of["near"][0].distance, of["apart"].numpy(), samples=0)["auc"],
    }


def agree(found: dict[str, Any]) -> None:
    for name, value in expected().items():
        values, wanted = (one if isinstance(one, dict) else {"": one} for one in (found[name], value))
        assert values.keys() == wanted.keys()
        assert {k: float(v) for k, v in values.items()} == pytest.approx(wanted, rel=1e-9, abs=1e-12), name


def _process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    shares = {"uneven": (slice(0, 9), slice(0, 4)) if rank == 0 else (slice(9, None), slice(4, None))}
    shares["empty"] = (slice(None), slice(None)) if rank == 0 else (slice(0, 0), slice(0, 0))
    for name, slices in shares.items():
        found = metrics()
        add(found, data(), *slices)
        torch.save({key: metric.compute() for key, metric in found.items()}, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_equal_the_functions_on_all_rows(tmp_path: Path) -> None:
    in_two_processes(_process, str(tmp_path))
    for name in ("uneven-0", "uneven-1", "empty-0", "empty-1"):
        agree(torch.load(tmp_path / f"{name}.pt", weights_only=True))


def test_batches_equal_the_functions_and_a_reset_forgets_them() -> None:
    found = metrics()
    for _ in range(2):
        add(found, data(), slice(0, 9), slice(0, 4))
        add(found, data(), slice(9, None), slice(4, None))
        agree({name: metric.compute() for name, metric in found.items()})
        for metric in found.values():
            metric.reset()


def test_no_finding_with_both_classes_has_no_area_and_one_caption_adds_nothing() -> None:
    auc, alike = FindingAUC(), ImageTextSimilarity()
    auc.update(torch.rand(3, 2), torch.ones(3, 2, dtype=torch.bool))
    alike.update(torch.eye(3), torch.eye(3)[[0, 0, 0]])
    assert auc.compute().isnan() and alike.compute()["adds"].isnan()
    assert float(alike.compute()["own"]) == pytest.approx(100 / 3)


def test_labels_are_bool_and_features_are_finite() -> None:
    with pytest.raises(ValueError, match="labels must be bool; got torch.int64"):
        FindingAUC().update(torch.rand(2, 1), torch.tensor([[1], [-1]]))
    for metric in (FrechetDistance(), KernelDistance(), PrecisionRecallDensityCoverage(neighbours=2)):
        metric.update(torch.rand(5, 3), real=True)
        metric.update(torch.tensor([[1.0, 2, 3], [4, float("nan"), 6], [7, 8, 9]]), real=False)
        with pytest.raises(ValueError, match="1 generated features are NaN or inf"):
            metric.compute()


def test_features_of_another_width_are_refused() -> None:
    metric = FrechetDistance()
    metric.update(torch.rand(3, 4), real=True)
    with pytest.raises(ValueError, match=r"generated must be \(N, 4\); got \(3, 5\)"):
        metric.update(torch.rand(3, 5), real=False)
    with pytest.raises(ValueError, match=r"real must be \(N, columns\); got \(3,\)"):
        KernelDistance().update(torch.rand(3), real=True)
    with pytest.raises(ValueError, match="two images a side are needed"):
        metric.compute()

"""Images of rare findings drawn more often: chances, the order of draws, and what a run says of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fitting import Killed, LeastSquares, kill_at, log_of, same, state_of, without_time
from fitting import train as train_small
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from recipe import recipe_module
from test_train import opened
from tiny import save_tiny

from distill.cli import parse
from distill.data.balance import balance_findings, shares_text
from distill.errors import UserError
from distill.evaluation.results import parse_metrics
from distill.experiment import train
from distill.trainer import StepSampler

NAMES = st.lists(st.sampled_from(["edema", "mass", "nodule"]), max_size=3)


@given(st.lists(NAMES, min_size=1, max_size=20).filter(any), st.floats(0, 1))
def test_a_row_weighs_as_its_rarest_finding(labels: list[list[str]], power: float) -> None:
    rows = [set(found) or {"no finding"} for found in labels]
    counts = Counter(name for row in rows for name in row)
    weights = [max((1 / counts[name]) ** power for name in row) for row in rows]
    balance = balance_findings(labels, power)
    assert balance.chances == pytest.approx([weight / sum(weights) for weight in weights]) and len(
        balance.chances
    ) == len(rows)
    assert set(balance.shares) == set(counts)
    for name, (before, after) in balance.shares.items():
        assert before == pytest.approx(counts[name] / len(rows))
        assert after == pytest.approx(
            sum(w for w, row in zip(weights, rows, strict=True) if name in row) / sum(weights)
        )
    assert [counts[name] for name in balance.shares] == sorted(counts.values())


def test_a_power_of_one_draws_single_findings_equally_often() -> None:
    balance = balance_findings([["edema"]] * 6 + [["Mass"], ["mass"], [], [], [], []], 1)
    assert {name: after for name, (_, after) in balance.shares.items()} == pytest.approx(
        {"edema": 1 / 3, "Mass": 1 / 3, "no finding": 1 / 3}
    )
    assert shares_text(balance.shares).startswith(
        "Mass 33.3% (unbalanced 16.7%), no finding 33.3% (unbalanced 33.3%), edema"
    )
    only = balance_findings([["edema"]] * 6 + [["edema", "mass"], ["mass"]], 1, ["Edema"])
    assert set(only.shares) == {"edema", "no finding"} and only.chances[6] == only.chances[0] < only.chances[7]
    many = {f"f{n}": (0.1, 0.2) for n in range(10)}
    assert shares_text(many).endswith("f7 20.0% (unbalanced 10.0%) and 2 more")


@pytest.mark.parametrize(("labels", "only"), [([[], []], ()), ([["mass"], []], ["edema"])])
def test_data_without_findings_is_refused(labels: list[list[str]], only: list[str]) -> None:
    with pytest.raises(UserError, match=r"data.balance_findings is 0\.5, and no training image has a finding"):
        balance_findings(labels, 0.5, only)


CHANCES = np.array([0.4, 0.05, 0.3, 0.05, 0.2])


def draws(
    chances: np.ndarray | None, seed: int = 3, rank: int = 0, world: int = 1, first: int = 0, size: int = 5
) -> list:
    return list(StepSampler(5, size, seed, rank, world, first, first + 40, chances))


def test_each_epoch_draws_each_row_as_often_as_its_chance_says() -> None:
    total = np.zeros(5)
    for epoch in (epochs := draws(CHANCES, size=5)):
        times = np.bincount(epoch, minlength=5)
        assert (np.abs(times - 5 * CHANCES) < 1).all() and times.sum() == 5
        total += times
    assert np.abs(total / len(epochs) - 5 * CHANCES).max() < 0.25
    assert len({tuple(epoch) for epoch in epochs}) > 20, "orders differ"
    assert draws(CHANCES) == epochs and draws(CHANCES, seed=4) != epochs


def test_no_row_is_left_out_for_good() -> None:
    """A row is drawn less than once an epoch here, in a data set so small that its place in the order decides
    little."""
    times = sum(rows.count(1) for rows in StepSampler(2, 2, 3, 0, 1, 0, 500, np.array([0.9, 0.1])))
    assert times / 500 == pytest.approx(0.2, abs=0.06)


@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
@settings(max_examples=50)
def test_an_epoch_is_as_long_as_the_data_whatever_the_rounding(length: int, seed: int) -> None:
    weights = np.random.default_rng(seed).random(length) ** 4 + 1e-9
    chances = weights / weights.sum()
    for (*rows,) in StepSampler(length, length, seed, 0, 1, 0, 3, chances):
        times = np.bincount(rows, minlength=length)
        assert len(rows) == length and (np.abs(times - length * chances) < 1 + 1e-6).all()


@pytest.mark.parametrize("chances", [[0.1] * 10, [0.5, 0.5 + 2**-52, 1e-20]])
@pytest.mark.parametrize("drawn", [0.0, 1 - 2**-53])
def test_a_sum_of_chances_that_is_rounded_loses_and_adds_no_draw(
    monkeypatch: pytest.MonkeyPatch, drawn: float, chances: list[float]
) -> None:
    """Their sums are a little below and above 1; this and the smallest or largest random number meet once in 2**53
    epochs."""
    stub = SimpleNamespace(permutation=lambda x: np.arange(x) if isinstance(x, int) else x, random=lambda: drawn)
    monkeypatch.setattr("distill.trainer.np.random.default_rng", lambda seed: stub)
    size = len(chances)
    (rows,) = StepSampler(size, size, 0, 0, 1, 0, 1, np.array(chances))
    assert len(rows) == size and (np.bincount(rows, minlength=size) <= np.ceil(size * np.array(chances)) + 1).all()


def test_equal_chances_and_none_draw_each_row_once() -> None:
    for epoch, rows in enumerate(draws(None)):
        assert rows == np.random.default_rng([3, epoch]).permutation(5).tolist(), "as every earlier version did"
    assert all(sorted(rows) == list(range(5)) for rows in draws(np.full(5, 0.2)))


def test_processes_share_the_draws_and_a_later_start_goes_on() -> None:
    whole = [i for rows in draws(CHANCES, size=4) for i in rows]
    ranks = [draws(CHANCES, rank=rank, world=2, size=2) for rank in range(2)]
    assert [i for step in range(40) for rank in ranks for i in rank[step]] == whole
    assert draws(CHANCES, first=17, size=4)[:23] == draws(CHANCES, size=4)[17:]


def test_a_killed_training_goes_on_with_the_same_draws(tmp_path: Path) -> None:
    chances = np.array([0.5, *[0.5 / 7] * 7])
    steps: dict[str, Any] = {"max_steps": 8, "checkpoint_every_steps": 3, "sample_every_steps": 1}
    straight, killed, plain = (LeastSquares() for _ in range(3))
    train_small(straight, tmp_path / "a", chances=chances, **steps)
    with pytest.raises(Killed):
        train_small(LeastSquares(), tmp_path / "b", chances=chances, on=kill_at(5), **steps)
    train_small(killed, tmp_path / "b", chances=chances, **steps)
    train_small(plain, tmp_path / "c", **steps)
    assert same(state_of(straight), state_of(killed)) and not same(state_of(straight), state_of(plain))
    assert without_time(log_of(tmp_path / "a")) == without_time(log_of(tmp_path / "b"))


def folder_of(root: Path, labels: list[str]) -> list[str]:
    """Options of a folder of gray squares with a white corner, with these labels, the last two of which are the test split."""
    root.mkdir()
    rows = ["file_name,text,labels,split"]
    for n, label in enumerate(labels):
        picture = Image.new("L", (64, 64), 20 * n)
        picture.putpixel((0, 0), 255)
        picture.save(root / f"{n}.png")
        rows.append(f"{n}.png,a picture,{label},{'test' if n >= len(labels) - 2 else 'train'}")
    (root / "metadata.csv").write_text("\n".join(rows) + "\n")
    return ["--data.kind", "folder", "--data.root", str(root), "--data.balance_findings", "1"]


def folder_run(base: str, folder: Path, labels: list[str]) -> Any:
    """A run folder and its arm; the options of phantoms that `opened` gives are left out."""
    words = folder_of(folder / "data", labels)
    return opened(base, folder / "out", *words, phantoms=False)


def test_a_run_says_and_records_how_images_were_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given_to: list[Any] = []
    fit = train.fit
    monkeypatch.setattr(train, "fit", lambda *a, **k: given_to.append(k["chances"]) or fit(*a, **k))
    base = str(save_tiny(tmp_path / "sd"))
    (tmp_path / "run").mkdir()
    run, arm = folder_run(base, tmp_path / "run", ["edema", "edema", "edema", "mass", "edema", "mass"])
    said = "mass 50.0% (unbalanced 25.0%), edema 50.0% (unbalanced 75.0%)"
    assert f"data.balance_findings 1: of the drawn images have {said}" in capsys.readouterr().out
    cost = train.train_arm(run, arm)
    assert given_to[0] == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])
    assert cost["drawn"]["mass"] == pytest.approx({"before": 0.25, "after": 0.5})
    assert "training labels" in cost["training_data"], "a run whose labels changed must not go on"
    entry = {"localization": None, "quality": None, "cost": cost | {"evaluation_seconds": None}}
    (note,) = parse_metrics({"arms": {"m": entry}, "provenance": {}}).notes
    assert note == f"m: images of rare findings were drawn more often: {said}."


def test_a_run_without_findings_is_refused(tmp_path: Path) -> None:
    base = str(save_tiny(tmp_path / "sd"))
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"no training image has a finding; name a column by data\.label_column"):
        folder_run(base, tmp_path / "run", [""] * 6)


def test_drawn_data_have_no_such_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="balance_findings"):
        parse(recipe_module("finetune").FinetuneConfig, ["--data.balance_findings", "0.5"])

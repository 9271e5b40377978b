"""The atlas: cells are what the protocol scores, the search finds a known answer, and a run is used by its subset."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from listed import WORDS, Listed, sample
from matplotlib.figure import Figure
from pair import in_two_processes
from PIL import Image
from recipe import config_class_of, recipe_module, refusal_of
from sklearn.metrics import roc_auc_score
from tiny import save_tiny, tiny_sd

from distill.cli import parse
from distill.config import BaseConfig, FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.data.sample import has_finding_twice
from distill.errors import UserError
from distill.evaluation import atlas as library
from distill.evaluation import image_adds
from distill.evaluation.atlas import (
    MIN_GAIN,
    Search,
    choose_subset,
    is_worth_it,
    paired_difference,
)
from distill.evaluation.cells import MEASURES, Cells, Measure, Pairs, compute_cells, macro_mean
from distill.evaluation.image_adds import areas_of_maps, choose_others
from distill.evaluation.localization import TOKEN_MAPS, localization
from distill.evaluation.protocols import DEFAULT_TIMESTEPS, with_subset
from distill.experiment import atlas as words_of_atlas
from distill.experiment.atlas import NAMES, answer, chosen_by, short_layer, summary_head, summary_rows, terminal_table
from distill.metrics import macro_mean_interval
from distill.models.family import AttentionSubset, Model
from distill.models.loading import load_model, read_subset

CONFIG = FullEvaluation(localization_images=4, batch_size=3, bootstrap_samples=20)


def config_with(**options: Any) -> FullEvaluation:
    """CONFIG with other options."""
    return CONFIG.model_copy(update=options)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "sd", "sd")


@pytest.fixture(scope="module")
def sd(base: Path) -> Model:
    return load_model(BaseConfig(name=str(base))).freeze()


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator()


@pytest.fixture(scope="module")
def phantoms() -> PhantomDataset:
    return PhantomDataset("validation", 8, 0, 64)


# --- the search -----------------------------------------------------------------------------------------------------


def cells_of(maps: torch.Tensor, masks: torch.Tensor, findings: list[int], timesteps: tuple[int, ...]) -> Cells:
    """Cells of one image a pair, whose scores are computed by scikit-learn; EOS and padding are chance."""
    count, layers, steps = maps.shape[:3]
    numbers = np.arange(count)
    pairs = Pairs(
        queries=numbers,
        places=np.zeros(count, dtype=np.int64),
        findings=np.array(findings),
        images=numbers,
        masks=[np.packbits(mask.numpy()) for mask in masks],
        shape=(masks.shape[1], masks.shape[2]),
        others=choose_others([str(f) for f in findings], [str(n) for n in numbers], numbers.tolist()),
    )
    scores: dict[Measure, np.ndarray] = {
        "auc": np.full((count, len(TOKEN_MAPS), layers, steps), 0.5),
        "image_adds": np.zeros((count, len(TOKEN_MAPS), layers, steps)),
    }
    for place, layer, step in np.ndindex(count, layers, steps):
        own = true_pair_scores(masks, maps[:, layer, step], pairs.others, place)
        for measure in MEASURES:
            scores[measure][place, 0, layer, step] = own[measure]
    names = tuple(f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn2" for i in range(layers))
    return Cells(names, timesteps, pairs, tuple(range(count)), maps, scores)


def true_pair_scores(
    masks: torch.Tensor, maps: torch.Tensor, others: Sequence[tuple[int, ...]], place: int
) -> dict[str, float]:
    """AUC of a pair's map, and that minus the mean AUC of its others' maps against its mask; masks as large as maps."""
    truth = masks[place].flatten()

    def auc(source: int) -> float:
        return float(roc_auc_score(truth, maps[source].double().flatten()))

    gains = [auc(place) - auc(other) for other in others[place]]
    return {"auc": auc(place), "image_adds": float(np.mean(gains)) if gains else float("nan")}


def known_cells() -> Cells:
    """Layers 0 and 2 each show one half of the mask, at timestep 20 alone; all else is noise, or the mask's
    opposite."""
    noise = torch.rand(6, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(6, 8, 8, dtype=torch.bool)
    for pair in range(6):
        masks[pair, pair % 4 * 2 : pair % 4 * 2 + 2, 2:6] = True
    left = torch.arange(8) < 4
    maps = noise * 5
    maps[:, 0, 1], maps[:, 2, 1] = (masks & left).float(), (masks & ~left).float()
    maps[:, 1, 1] = 9 * (~masks).float()
    return cells_of(maps, masks, [0, 0, 0, 1, 1, 1], (10, 20, 30))


@pytest.mark.parametrize("by", MEASURES)
def test_the_search_finds_the_two_halves_of_the_mask(by: Measure) -> None:
    cells = known_cells()
    choice = choose_subset(cells, CONFIG, 3, by)
    assert choice.subset == AttentionSubset((cells.layers[0], cells.layers[2]), (20,))
    assert choice.scores["auc"] == 1 and choice.is_better and choice.by == by
    assert [scores["auc"] for _, scores in choice.steps] == [pytest.approx(0.75), 1]
    assert choice.default is None, "the default's timesteps are not among the cells"


def test_a_map_that_does_not_look_at_the_image_is_chosen_by_its_auc_alone() -> None:
    """Layer 0 shows the same place in each image, where most of every mask is; layer 1 shows half of each mask."""
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[:, 2:6, 2:5] = True
    for pair in range(3):
        masks[pair, 2 * pair, 6] = True
    maps = torch.rand(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 0.1
    maps[:, 0, 0, 2:6, 2:5] += 1
    for pair in range(3):
        maps[pair, 1, 0, 2 * pair, 6] += 1
    cells = cells_of(maps, masks, [0, 0, 0], (20,))
    best = [name.split(".")[1] for name in choose_subset(cells, CONFIG, 1, "auc").steps[0][0].layers]
    chosen = choose_subset(cells, CONFIG, 1).subset.layers
    assert best == ["0"] and cells.layers[1] in chosen
    assert choose_subset(cells, CONFIG, 1).steps[0][0].layers == (cells.layers[1],)


def test_a_choice_by_auc_needs_no_other_image() -> None:
    maps = torch.rand(2, 2, 1, 8, 8, generator=torch.Generator().manual_seed(4))
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[:, 2:4] = True
    choice = choose_subset(cells_of(maps, masks, [0, 1], (20,)), CONFIG, 1, "auc")
    assert set(choice.scores) == {"auc"}


@pytest.mark.parametrize("by", MEASURES)
def test_the_default_is_compared_where_its_timesteps_are_known(by: Measure) -> None:
    maps = torch.rand(3, 2, 6, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 3:7] = masks[1, 1:4, 3:5] = masks[2, 5:7, 0:4] = True
    maps[:, 0, 0] = (~masks).float() * 100
    cells = cells_of(maps, masks, [0, 1, 1], (25, *DEFAULT_TIMESTEPS))
    choice = choose_subset(cells, CONFIG, 2, by)
    found = choice.default
    assert found is not None
    expected = true_score(cells, AttentionSubset(cells.layers, DEFAULT_TIMESTEPS), by)
    assert found[by] == pytest.approx(expected, abs=1e-9)
    auc, adds = found["auc"], found["image_adds"]
    better: list[tuple[float, float]] = [(auc, adds + 0.1)] if by == "image_adds" else [(auc + 0.1, adds - 0.1)]
    worse = [(auc, adds), (auc - 0.1, adds + 0.1)]
    for judged, pairs in ((True, better), (False, worse)):
        for own in pairs:
            assert replace(choice, scores=dict(zip(("auc", "image_adds"), own, strict=True))).is_better == judged


def test_the_search_by_image_adds_also_begins_at_the_subset_with_the_best_auc() -> None:
    """Here it ends higher than from the best cell."""
    generator = torch.Generator().manual_seed(26)
    masks = torch.rand(6, 5, 5, generator=generator) < 0.3
    masks[:, 0, 0], masks[:, 1, 1] = True, False
    maps = torch.rand(6, 4, 2, 5, 5, generator=generator)
    maps += torch.rand(1, 4, 2, 1, 1, generator=generator) * masks[:, None, None]
    cells = cells_of(maps, masks, [0, 0, 0, 1, 1, 1], (10, 20))
    choice, by_auc = choose_subset(cells, CONFIG, 2), choose_subset(cells, CONFIG, 2, "auc")
    assert choice.steps[0][0] == by_auc.subset and len(by_auc.subset.layers) > 1
    assert choice.scores["image_adds"] > by_auc.scores["image_adds"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.0, 0.1), (0.0, 0.1 + 2 * MIN_GAIN), True),
        ((0.0, 0.1), (0.0, 0.1 + MIN_GAIN / 2), False),
        ((-0.1, 0.5), (-0.05, 0.1), True),
        ((-0.1, 0.1), (-0.1 + MIN_GAIN / 2, 0.5), False),
        ((-MIN_GAIN / 2, 0.5), (0.0, 0.1), True),
    ],
)
def test_a_change_must_gain_more_than_noise(
    before: tuple[float, float], after: tuple[float, float], expected: bool
) -> None:
    """The last reaches the floor, which is worth any gain."""
    assert is_worth_it(before, after) == expected


def test_no_subset_is_chosen_whose_auc_is_below_the_default() -> None:
    """The layer to which the image adds most finds less than all three layers together."""
    generator = torch.Generator().manual_seed(71)
    masks = torch.rand(6, 6, 6, generator=generator) < 0.15
    masks[:, 1:3, 1:4] = True
    place = masks.float().mean(dim=0)
    strength = torch.rand(3, 2, generator=generator)
    maps = torch.rand(6, 3, 1, 6, 6, generator=generator)
    for layer, (own, blind) in enumerate(strength.tolist()):
        maps[:, layer, 0] += own * (masks.float() - place) + (2 * blind - 1) * place
    steps = len(DEFAULT_TIMESTEPS)
    cells = cells_of(maps.expand(6, 3, steps, 6, 6).clone(), masks, [0, 0, 0, 1, 1, 1], DEFAULT_TIMESTEPS)
    free = choose_subset(replace(cells, timesteps=tuple(range(steps))), CONFIG, 1)
    choice = choose_subset(cells, CONFIG, 1)
    assert free.default is None and choice.default is not None and choice.is_better
    assert choice.steps[0][1] == free.steps[0][1] and free.scores["auc"] < choice.default["auc"] - 0.01
    assert choice.scores["auc"] >= choice.default["auc"]
    assert choice.default["image_adds"] < choice.scores["image_adds"] < free.scores["image_adds"] - 0.01
    search, start = Search(cells, CONFIG, 1), ((0,), (0,))
    own = search.scores(start)
    assert search.worth(start, "auc") == (0, own["auc"]), "the AUC alone chooses as if there were no default"
    assert search.worth(start, "image_adds") == (min(0, own["auc"] - choice.default["auc"]), own["image_adds"])


@st.composite
def random_cells(draw: st.DrawFn) -> Cells:
    pairs, layers, steps = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    side = draw(st.integers(3, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    masks = torch.rand(pairs, side, side, generator=generator) < 0.3
    masks[:, 0, 0], masks[:, 1, 1] = True, False
    strength = torch.rand(1, layers, steps, 1, 1, generator=generator)
    maps = torch.rand(pairs, layers, steps, side, side, generator=generator) + strength * masks[:, None, None]
    findings = draw(st.lists(st.integers(0, 2), min_size=pairs, max_size=pairs))
    return cells_of(maps, masks, findings, tuple(range(0, 10 * steps, 10)))


def true_score(cells: Cells, subset: AttentionSubset, by: Measure) -> float:
    layers = [cells.layers.index(name) for name in subset.layers]
    steps = [cells.timesteps.index(t) for t in subset.timesteps]
    means = cells.maps[:, layers][:, :, steps].mean(dim=(1, 2))
    shape = cells.pairs.shape
    masks = torch.from_numpy(np.unpackbits(np.stack(cells.pairs.masks), axis=1, count=shape[0] * shape[1])).bool()
    groups: dict[int, list[float]] = {}
    for place, finding in enumerate(cells.pairs.findings.tolist()):
        value = true_pair_scores(masks.view(-1, *shape), means, cells.pairs.others, place)[by]
        if np.isfinite(value):
            groups.setdefault(finding, []).append(value)
    return float(np.mean([np.mean(values) for values in groups.values()]))


@given(cells=random_cells(), most=st.integers(1, 4), by=st.sampled_from(MEASURES))
@settings(max_examples=40)
def test_the_subset_is_never_worse_than_the_best_cell_and_no_change_improves_it(
    cells: Cells, most: int, by: Measure
) -> None:
    assume(by == "auc" or any(cells.pairs.others))
    choice = choose_subset(cells, CONFIG, most, by)
    subset, final = choice.subset, choice.scores[by]
    assert 0 < len(subset.timesteps) <= most and subset.layers
    assert list(subset.timesteps) == sorted(set(subset.timesteps))
    assert list(subset.layers) == [name for name in cells.layers if name in subset.layers]
    for own, scores in choice.steps:
        for measure, value in scores.items():
            assert value == pytest.approx(true_score(cells, own, measure), abs=1e-3)
    values = [scores[by] for _, scores in choice.steps]
    means = cells.mean(by)
    assert means is not None and final >= means[0].max() - 1e-6
    assert by != "auc" or values[0] == pytest.approx(means[0].max(), abs=1e-6)
    if by == "image_adds":
        by_auc = choose_subset(cells, CONFIG, most, "auc").scores
        assert final >= by_auc["image_adds"] - 1e-6, "the search also begins at the subset with the best AUC"
    assert all(later > earlier + MIN_GAIN for earlier, later in itertools.pairwise(values))
    assert (choice.subset, choice.scores) == choice.steps[-1]
    for name in cells.layers:
        layers = tuple(n for n in cells.layers if (n in subset.layers) != (n == name))
        assert not layers or true_score(cells, replace(subset, layers=layers), by) <= final + MIN_GAIN + 1e-3
    for step in cells.timesteps:
        steps = tuple(t for t in cells.timesteps if (t in subset.timesteps) != (t == step))
        if 0 < len(steps) <= most:
            assert true_score(cells, replace(subset, timesteps=steps), by) <= final + MIN_GAIN + 1e-3


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1)), min_size=1, max_size=20))
@settings(max_examples=30)
def test_macro_mean_weighs_findings_alike(rows: list[tuple[int, float]]) -> None:
    findings, values = np.array([f for f, _ in rows]), np.array([v for _, v in rows])
    groups: dict[int, list[float]] = {}
    for finding, value in rows:
        groups.setdefault(finding, []).append(value)
    expected = sum(sum(own) / len(own) for own in groups.values()) / len(groups)
    assert macro_mean(values, findings) == pytest.approx(expected)
    both = macro_mean(np.stack([values, 1 - values], axis=1), findings)
    assert both.tolist() == pytest.approx([expected, 1 - expected])


def test_maps_are_ranked_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    maps, masks = torch.rand(7, 5, 5, generator=generator), torch.rand(3, 8, 8, generator=generator) < 0.3
    bits = [np.packbits(mask.numpy()) for mask in masks]
    whole = areas_of_maps(maps, bits, (8, 8), CONFIG)
    monkeypatch.setattr(image_adds, "PIXELS_AT_ONCE", 128)
    assert whole.shape == (3, 7) and torch.equal(areas_of_maps(maps, bits, (8, 8), CONFIG), whole)


@pytest.mark.parametrize(
    ("findings", "keys", "expected"),
    [(("a", "b"), "xy", False), (("a", "a"), "xy", True), (("a", "a"), "xx", False), ((), "", False)],
)
def test_a_finding_must_be_in_two_images(findings: tuple[str, ...], keys: str, expected: bool) -> None:
    data = Listed([sample(str(k), "Text.", (name, None)) for k, name in enumerate(findings)], {})
    data.image_key = lambda index: keys[index]  # type: ignore[attr-defined]
    assert has_finding_twice(data) == expected


# --- cells of a model -----------------------------------------------------------------------------------------------


def pair_scores(folder: Path, token: str) -> dict[Measure, list[float]]:
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    return {
        "auc": [row["scores"][token]["auc"] for row in rows],
        "image_adds": [np.nan if (v := row["image_adds"][token]) is None else v for row in rows],
    }


def test_a_cell_has_the_scores_that_the_protocol_gives_its_layer_and_timestep(
    sd: Model, accelerator: Accelerator, tmp_path: Path
) -> None:
    """One timestep at a time, since the noise depends on the number of timesteps."""
    phantoms, own = PhantomDataset("validation", 12, 0, 64), config_with(localization_images=10)
    cells = compute_cells(sd, phantoms, own, [600], accelerator=accelerator)
    assert cells.maps.shape == (len(cells.pairs), len(cells.layers), 1, 8, 8) and len(cells.layers) > 3
    assert any(cells.pairs.others) and not all(cells.pairs.others)
    for place in (0, len(cells.layers) - 1):
        config = own.model_copy(update={"layers": (cells.layers[place],), "timesteps": (600,)})
        localization(sd, phantoms, config, accelerator=accelerator, arm_dir=tmp_path / str(place))
        for token, name in enumerate(TOKEN_MAPS):
            expected = pair_scores(tmp_path / str(place), name)
            for measure in MEASURES:
                found = cells.scores[measure][:, token, place, 0]
                assert found == pytest.approx(expected[measure], abs=1e-4, nan_ok=True)


@pytest.mark.parametrize("truth", ["mask", "boxes"])
def test_the_mean_of_cells_is_the_map_of_the_protocol(
    sd: Model, accelerator: Accelerator, tmp_path: Path, truth: Any
) -> None:
    config = config_with(localization_images=6, ground_truth=truth, smoothing_sigma=1.0, timesteps=DEFAULT_TIMESTEPS)
    dataset = PhantomDataset("validation", 8, 0, 64)
    cells = compute_cells(sd, dataset, config, DEFAULT_TIMESTEPS, accelerator=accelerator)
    result = localization(sd, dataset, config, accelerator=accelerator, arm_dir=tmp_path)
    found = choose_subset(cells, config, 1).default
    assert result is not None and found is not None
    assert found == {m: pytest.approx(result["word"][m], abs=1e-4) for m in MEASURES}
    for (own, place), layer, step in itertools.product(enumerate(cells.mine), range(2), range(len(DEFAULT_TIMESTEPS))):
        scored = dict(cells.pairs.against_masks(cells.maps[own, layer, step][None], place, config))
        assert cells.scores["auc"][place, 0, layer, step] == pytest.approx(scored[place, place].item(), abs=1e-6)


def test_a_region_that_fills_the_image_is_left_out(sd: Model, accelerator: Accelerator) -> None:
    whole = sample("b", "Edema.", ("edema", None))
    whole = replace(whole, regions=(replace(whole.regions[0], mask=torch.ones(64, 64, dtype=torch.bool)),))
    dataset = Listed([whole, sample("a", "Small effusion.", ("pleural effusion", None))], WORDS)
    cells = compute_cells(sd, dataset, config_with(batch_size=1), [600], accelerator=accelerator, by="auc")
    pairs = cells.pairs
    assert pairs.images.tolist() == [1] and pairs.findings.tolist() == [1] and pairs.queries.tolist() == [1]
    assert cells.mine == (0,) and len(cells.maps) == len(pairs.masks) == 1 and cells.mean("image_adds") is None
    assert all(len(values) == 1 for values in cells.scores.values()) and np.isfinite(cells.scores["auc"]).all()
    with pytest.raises(UserError, match="no finding has a region in two of the 1 validation images that were looked"):
        compute_cells(sd, dataset, config_with(batch_size=1), [600], accelerator=accelerator)
    twice = Listed([sample(name, "Small effusion.", ("pleural effusion", None)) for name in "ab"], WORDS)
    twice.image_key = lambda index: "one"  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="in two of the 1 validation images"):
        compute_cells(sd, twice, CONFIG, [600], accelerator=accelerator)
    with pytest.raises(UserError, match="no validation image has a region that can be scored"):
        compute_cells(sd, Listed([whole], WORDS), CONFIG, [600], accelerator=accelerator)


def _rank(rank: int, base: str, folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    model = load_model(BaseConfig(name=base)).freeze()
    found = [few_choice(model, accelerator, images) for images in (1, 6)]
    (Path(folder) / f"{rank}.json").write_text(json.dumps([accelerator.num_processes, *found]))


def few_choice(model: Model, accelerator: Accelerator, images: int) -> tuple[list[Any], tuple[str, ...], Any]:
    """Number of maps that this process has, all pairs, and what is chosen; of one image by AUC."""
    config = config_with(localization_images=images)
    dataset = PhantomDataset("validation", 8, 0, 64)
    by: Measure = "auc" if images == 1 else "image_adds"
    cells = compute_cells(model, dataset, config, [100, 600], accelerator=accelerator, by=by)
    choice = choose_subset(cells, config, 2, by)
    return [len(cells.mine), cells.pairs.queries.tolist()], choice.subset.layers, choice.scores


def test_two_processes_choose_what_one_chooses(base: Path, sd: Model, accelerator: Accelerator, tmp_path: Path) -> None:
    """Also of one image, where a process has no pair."""
    in_two_processes(_rank, str(base), str(tmp_path))
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert one[0] == two[0] == 2
    for place, images in enumerate((1, 6), start=1):
        (maps, pairs), layers, scores = few_choice(sd, accelerator, images)
        counts = [own[place][0][0] for own in (one, two)]
        assert sum(counts) == maps and (counts[1] == 0) == (images == 1)
        assert one[place][0][1] == two[place][0][1] == pairs, "in the same order whatever the number of processes"
        for own in (one[place], two[place]):
            assert tuple(own[1]) == layers and own[2] == pytest.approx(scores, abs=1e-6)


# --- the test on other images, and its words ------------------------------------------------------------------------


def rows_of(values: list[float | None], images: list[int]) -> list[dict[str, Any]]:
    return [
        {"query": image, "image": image, "finding": place % 2, "scores": {"word": {"auc": value}}}
        for place, (value, image) in enumerate(zip(values, images, strict=True))
    ]


def test_the_difference_is_of_pairs_that_both_have_by_image() -> None:
    images = [0, 0, 1, 1, 2, 2]
    default = rows_of([0.5, 0.5, None, 0.6, 0.4, 0.3], images)
    chosen = rows_of([0.7, 0.4, 0.9, 0.8, None, 0.2], images)
    found = paired_difference(default, list(reversed(chosen)), "auc", str, CONFIG)
    expected = {0: [0.2], 1: [-0.1, 0.2, -0.1]}
    assert found["pairs"] == 4
    assert found["value"] == pytest.approx(np.mean([np.mean(v) for v in expected.values()]))
    interval = macro_mean_interval([0.2, -0.1, 0.2, -0.1], [0, 1, 1, 1], ["0", "0", "1", "2"], 20, CONFIG.seed)
    assert found["ci"] == pytest.approx(list(interval or ()))
    one_image = paired_difference(default, chosen, "auc", lambda image: "same", CONFIG)
    assert one_image["ci"] is None and one_image["value"] == found["value"]
    assert paired_difference(default, [], "auc", str, CONFIG) == {"value": None, "ci": None, "pairs": 0}
    for row, value in zip(
        [*default, *chosen], [0.1, 0.3, None, 0.2, 0.0, 0.0, 0.2, 0.2, 0.5, 0.6, 0.0, 0.3], strict=True
    ):
        row["image_adds"] = {"word": value}
    added = paired_difference(default, chosen, "image_adds", str, CONFIG)
    assert added["pairs"] == 5 and added["value"] == pytest.approx(
        np.mean([np.mean([0.1, 0.0]), np.mean([-0.1, 0.4, 0.3])])
    )


@pytest.mark.parametrize(
    ("value", "interval", "words"),
    [
        (0.03, [0.01, 0.05], "raises {} on test images (from .700 to .730, difference +.030 [+.010, +.050])"),
        (-0.03, [-0.05, -0.01], "lowers {} on test images (from .700 to .670, difference -.030 [-.050, -.010])"),
        (0.03, [-0.01, 0.05], "does not clearly change {} on test images"),
        (0.03, [0.0, 0.05], "does not clearly change"),
        (0.03, None, "one image gives no interval"),
        (None, None, "could not be tested"),
    ],
)
@pytest.mark.parametrize(
    ("by", "name"), [("auc", "the AUC of the words"), ("image_adds", "the image adds of the words")]
)
def test_the_answer_follows_from_the_interval(
    value: float | None, interval: list[float] | None, words: str, by: str, name: str
) -> None:
    entry: dict[str, Any] = {
        "layers": ["a", "b", "c"],
        "validation": {"images": 12},
        "chosen": {"layers": ["b"], "timesteps": [250], "by": by, "is_better": value != -0.03},
        "test": {
            "default": {"word": {by: 0.7}},
            "chosen": {"word": {by: 0.7 + (value or 0)}},
            "difference": {by: {"value": value, "ci": interval}},
        },
    }
    sentence = answer("frozen", entry)
    assert sentence.startswith("frozen: 1 of 3 layers at 250, chosen on 12 validation images,")
    assert words.format(name) in sentence
    assert ("holds 0" in sentence) == ("not clearly" in words)
    assert ("so the model does not get it" in sentence) == (value == -0.03)


@pytest.mark.parametrize(("by", "other"), [("auc", "image_adds"), ("image_adds", "auc")])
def test_the_table_begins_with_the_measure_that_chose(by: str, other: str) -> None:
    def entry_of(default: dict[str, float] | None) -> dict[str, Any]:
        differences = {by: 0.1, other: 0.3, "cnr": 0.4, "top1": 0.5}
        return {
            "layers": ["a", "b"],
            "chosen": {"layers": ["b"], "timesteps": [250], "by": by, by: 0.2, other: 0.9, "default": default},
            "test": {
                "default": {"word": {by: 0.11, other: 0.8}},
                "chosen": {"word": {by: 0.21, other: 0.7}},
                "difference": {key: {"value": value, "ci": None} for key, value in differences.items()},
            },
        }

    entries = {"first": entry_of({by: 0.15, other: 0.6}), "second": entry_of(None)}
    rows = summary_rows(entries, chosen_by(entries))
    assert rows[0][3:] == (".150", ".200", ".110", ".210", "+.100", "+.300", "+.400", "+.500")
    assert rows[1][3] == "–" and rows[1][4:] == rows[0][4:]
    names = summary_head(by)
    assert names[3] == f"validation {NAMES[by]}, default" and names[8] == f"{NAMES[other]} difference"
    assert [column.header for column in terminal_table(entries).columns][3] == "validation\ndefault"


@pytest.mark.parametrize(("by", "white"), [("auc", 0.5), ("image_adds", 0.0)])
def test_the_heat_map_is_white_where_a_map_knows_nothing(
    by: str, white: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Callable[[Figure], None]] = []
    monkeypatch.setattr(words_of_atlas, "chart", lambda name, alt, width, height, draw: drawn.append(draw))
    words_of_atlas.atlas_chart({"word": np.array([[white, white + 0.2]])}, ["a"], [1, 2], ([0], [1]), by)
    figure = Figure()
    drawn[0](figure)
    low, high = figure.axes[0].images[0].get_clim()
    assert (low, high) == pytest.approx((white - 0.2, white + 0.2))
    assert figure.axes[-1].get_ylabel() == NAMES[by]


def test_short_names_of_layers_differ() -> None:
    assert short_layer("up_blocks.1.attentions.0.transformer_blocks.2.attn2") == "up 1.0.2"
    assert short_layer("mid_block.attentions.0.transformer_blocks.1.attn2") == "mid 0.1"


# --- the recipe -----------------------------------------------------------------------------------------------------


@pytest.fixture
def work(base: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A folder with a base and a trained run, and the command line for both."""
    shutil.copytree(base, tmp_path / "base")
    tiny_sd(seed=3).unet.save_pretrained(tmp_path / "runs" / "frozen" / "unet")
    argv = [
        "--base.name", str(tmp_path / "base"), "--runs", str(tmp_path / "runs" / "frozen"),
        "--output_dir", str(tmp_path / "out"), "--timesteps", "600", "--validation_images", "5",
        "--data.resolution", "64", "--data.validation_size", "6", "--data.test_size", "6",
        "--evaluation.localization_images", "4", "--evaluation.bootstrap_samples", "10",
    ]  # fmt: skip
    return tmp_path, argv


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def run(argv: list[str]) -> None:
    recipe = recipe_module("atlas")
    recipe.atlas(parse(config_class_of(recipe), argv))


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    recipe = recipe_module("atlas")
    return refusal_of(recipe.atlas, config_class_of(recipe), argv, capsys)


def test_the_recipe_writes_what_it_says_and_the_run_is_evaluated_by_its_subset(
    work: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, argv = work
    before = files_of(folder / "base")
    real = library.choose_subset

    def better(*args: Any, **kwargs: Any) -> Any:  # random weights may choose what is no better than the default
        return replace(real(*args, **kwargs), default={"auc": 0.0, "image_adds": -1.0})

    monkeypatch.setattr(library, "choose_subset", better)
    run(argv)
    model = {"atlas.png", "localization.json", "default/pairs.jsonl", "chosen/pairs.jsonl",
             "default/scored.jsonl", "chosen/scored.jsonl"}  # fmt: skip
    expected = {f"{name}/{file}" for name in ("base", "frozen") for file in model} | {
        "atlas.json",
        "atlas.md",
        ".locks/.launch",
    }
    assert files_of(folder / "out") == expected
    assert files_of(folder / "base") == before, "the base's folder is left alone"

    content = json.loads((folder / "out" / "atlas.json").read_text(encoding="utf-8"))
    assert list(content["models"]) == ["base", "frozen"] and content["provenance"]["config"]["max_timesteps"] == 3
    for entry in content["models"].values():
        shape = (len(entry["layers"]), len(entry["timesteps"]))
        assert entry["timesteps"] == [100, 250, 400, 550, 600, 700]
        for measure, token in itertools.product(MEASURES, TOKEN_MAPS):
            assert np.array(entry["validation"][measure][token]).shape == shape
        assert entry["chosen"]["by"] == "image_adds"
        assert entry["test"]["default"]["layers"] == entry["layers"]
        assert entry["test"]["default"]["timesteps"] == list(DEFAULT_TIMESTEPS)
        for key in ("layers", "timesteps"):
            assert entry["test"]["chosen"][key] == entry["chosen"][key]
        for measure in MEASURES:
            gain = entry["test"]["chosen"]["word"][measure] - entry["test"]["default"]["word"][measure]
            assert entry["test"]["difference"][measure]["value"] == pytest.approx(gain, abs=1e-9)
        assert entry["validation"]["images"] == 5 and entry["test"]["chosen"]["word"]["images"] == 4

    chosen = content["models"]["frozen"]["chosen"]
    model = load_model(BaseConfig(name=str(folder / "base")), run=folder / "runs" / "frozen")
    assert model.subset == AttentionSubset(tuple(chosen["layers"]), tuple(chosen["timesteps"]))
    used = with_subset(FullEvaluation(), model)
    assert (used.layers, used.timesteps) == (tuple(chosen["layers"]), tuple(chosen["timesteps"]))

    text = (folder / "out" / "atlas.md").read_text(encoding="utf-8")
    printed = capsys.readouterr().out
    for name, entry in content["models"].items():
        assert f"- {answer(name, entry)}\n" in text and answer(name, entry) in printed
        assert f"({name}/atlas.png)" in text
    assert words_of_atlas.RULES["image_adds"] in text and words_of_atlas.RULES["auc"] not in text
    assert "next: accelerate launch" in printed and str(folder / "runs" / "frozen" / "localization.json") in printed
    with Image.open(folder / "out" / "frozen" / "atlas.png") as image:
        assert image.width > 600 and image.height > 100

    run([*argv, "--store", "false", "--store_base", "true", "--output_dir", str(folder / "again")])
    stored = read_subset(folder / "base", model.denoiser)
    own = content["models"]["base"]["chosen"]
    assert stored == AttentionSubset(tuple(own["layers"]), tuple(own["timesteps"])), (
        "the stored subset is not its own rival"
    )


def test_a_subset_that_is_no_better_on_validation_is_not_stored(
    work: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, argv = work
    real = library.choose_subset

    def worse(*args: Any, **kwargs: Any) -> Any:
        return replace(real(*args, **kwargs), default={"auc": 1.0, "image_adds": 1.0})

    monkeypatch.setattr(library, "choose_subset", worse)
    earlier = folder / "runs" / "frozen" / "localization.json"
    model = load_model(BaseConfig(name=str(folder / "base")))
    layers = model.family.attention_layers(model.denoiser)
    earlier.write_text(json.dumps({"layers": layers[:1], "timesteps": [300]}))
    run(argv)
    assert not (folder / "runs" / "frozen" / "localization.json").exists()
    assert "the model does not get it" in (folder / "out" / "atlas.md").read_text(encoding="utf-8")


def test_dry_run_writes_nothing(work: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, argv = work
    before = files_of(folder)
    run([*argv, "--dry_run", "true", "--evaluation.batch_size", "1"])
    assert files_of(folder) == before
    printed = capsys.readouterr().out
    assert "layers at 6 timesteps" in printed and "nothing was written" in printed


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data.validation_size", "0"], "data.validation_size is 0: the subset is chosen on validation images"),
        (["--timesteps", "[600, 1000]"], "timesteps must be in 0 .. 999"),
        (["--evaluation.protocol", "dombrowski"], "evaluation.protocol"),
        (["--evaluation.timesteps", "300"], "evaluation.timesteps"),
        (["--data.root", "x"], "data.root"),
        (["--runs", "/nowhere/run"], "no run folder /nowhere/run"),
        (["--max_timesteps", "0"], "max_timesteps: expected a whole number from 1 to 1000, got 0"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    work: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    folder, argv = work
    assert words in refusal([*argv, *more], capsys)
    assert not (folder / "out").exists()


def make_folder(
    folder: Path, row: Callable[[int], str], header: str = "file_name,text,split,finding,bbox"
) -> list[str]:
    folder.mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    lines = [header, *(f"{i}.png,{row(i)}" for i in range(4))]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return ["--data.kind", "folder", "--data.root", str(folder), "--data.resolution", "64"]


def test_data_without_a_validation_split_or_regions_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--base.name", str(base), "--output_dir", str(tmp_path / "out")]
    splits = ["train", "validation", "test", "test"]
    boxed = make_folder(tmp_path / "boxed", lambda i: f'Edema.,{splits[i]},edema,"8,8,20,20"')
    columns = ["--data.finding_column", "finding", "--data.box_column", "bbox"]
    message = refusal([*argv, *boxed, *columns, "--data.test_split", "validation"], capsys)
    assert "data.test_split is validation, which is also the validation split" in message
    no_validation = ["--data.split_column", "split", "--data.test_split", "train"]
    plain = make_folder(tmp_path / "plain", lambda i: f"Edema.,{splits[i]}", "file_name,text,split")
    message = refusal([*argv, *plain, "--data.split_column", "split"], capsys)
    assert (
        "none of the 1 validation images has a box or mask of a finding: no column of metadata.csv is read" in message
    )
    none = make_folder(tmp_path / "none", lambda i: 'Edema.,test,edema,"8,8,20,20"')
    message = refusal([*argv, *none, *columns, *no_validation[:2]], capsys)
    assert "validation or val or valid" in message
    last = [*argv, *boxed, *columns, *no_validation[:2], "--timesteps", "600", "--evaluation.bootstrap_samples", "10"]
    message = refusal(last, capsys)
    assert "no finding has a box or mask in two of the 1 validation images; set choose_by to auc" in message
    run([*last, "--choose_by", "auc"])
    entry = json.loads((tmp_path / "out" / "atlas.json").read_text(encoding="utf-8"))["models"]["base"]
    assert (entry["validation"]["images"], entry["test"]["chosen"]["word"]["images"]) == (1, 2)
    assert entry["chosen"]["by"] == "auc" and "image_adds" not in entry["validation"]
    own = json.loads((tmp_path / "out" / "base" / "localization.json").read_text(encoding="utf-8"))
    assert own["validation"]["chosen"] == {"auc": entry["chosen"]["auc"], "image_adds": None}


def test_run_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    names = recipe_module("atlas").models_of
    runs = (str(tmp_path / "a" / "frozen"), str(tmp_path / "b" / "frozen"))
    assert names(runs) == {"base": None, "a-frozen": Path(runs[0]), "b-frozen": Path(runs[1])}
    assert list(names(("x/frozen", "x/learnable"))) == ["base", "frozen", "learnable"]
    assert list(names(("x/base",))) == ["base", "x-base"]
    assert names(()) == {"base": None}
    with pytest.raises(UserError, match="a folder is given twice"):
        names(("x/frozen", "x/../x/frozen"))


def test_the_difference_on_test_images_draws_patients(sd: Model, tmp_path: Path) -> None:
    found = []
    for patient in ("", "one"):
        data = PhantomDataset("test", 6, 0, 64)
        data.patient = lambda index, name=patient: name  # type: ignore[attr-defined]
        layers = tuple(sd.family.attention_layers(sd.denoiser)[:1])
        options = {"localization_images": 4, "bootstrap_samples": 20}
        config = FullEvaluation.model_validate(options)
        subset = AttentionSubset(layers, (300,))
        shared = {"accelerator": Accelerator(), "folder": tmp_path / f"of {patient}"}
        result = library.compare_on_test(sd, data, config, subset, **shared)  # type: ignore[arg-type]
        assert result is not None
        found.append(result["difference"]["auc"])
    by_image, of_one = found
    assert by_image["value"] == of_one["value"] and by_image["ci"] is not None
    assert of_one["ci"] is None, "one patient has no interval"

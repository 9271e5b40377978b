"""What the image adds to its map, and the maps that never look at it: against brute force, in any order, after a
kill."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from listed import WORDS, Listed, sample
from pair import in_two_processes
from sklearn.metrics import roc_auc_score
from test_seeds import write_run

from distill.attention.heat_maps import normalize
from distill.config import FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.data.sample import Region
from distill.evaluation import priors as priors_module
from distill.evaluation.image_adds import (
    MAP_TOKENS,
    OTHER_IMAGES,
    PAIR_MEASURES,
    areas,
    choose_others,
    differences,
    finish_rows,
    packed_pairs,
    summary,
    twice_midranks,
)
from distill.evaluation.localization import localization
from distill.evaluation.priors import centre_map, mean_masks, priors, training_rows
from distill.evaluation.protocols import PROTOCOLS, Query, ours, queries
from distill.evaluation.seeds import combine
from distill.metrics import PixelAUROC
from distill.metrics.bootstrap import resample_counts
from distill.models.family import Model

CONFIG = FullEvaluation(localization_images=8, timesteps=(300,), batch_size=4, bootstrap_samples=50)
NAMES = list(WORDS)
CAPTIONS = ("Edema.", "Edema with small effusions.", "Effusion.", "Fluid and edema, effusion.")


class Images(Listed):
    """A list whose every row is an image of its own, and which says which rows were read."""

    read: list[str]

    def __init__(self, *rest: Any) -> None:
        super().__init__(*rest)
        self.read = []

    def __getitem__(self, index: int) -> Any:
        self.read.append(self.samples[index].id)
        return super().__getitem__(index)

    def image_key(self, index: int) -> str:
        return self.samples[index].id.partition("#")[0]


def rectangles(prefix: str, count: int, seed: int = 0) -> Images:
    """Images with one or two findings, each region a rectangle somewhere."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        caption = CAPTIONS[number % len(CAPTIONS)]
        regions = []
        for finding in (f for f in NAMES if any(word in caption.lower() for word in WORDS[f])):
            mask = torch.zeros(64, 64, dtype=torch.bool)
            (x, y), (width, height) = rng.integers(0, 40, 2).tolist(), rng.integers(8, 24, 2).tolist()
            mask[y : y + height, x : x + width] = True
            regions.append(Region(finding, mask, ((x, y, width, height),)))
        one = replace(sample(f"{prefix}{number}", caption), regions=tuple(regions))
        found.append(replace(one, labels=tuple(r.finding for r in regions)))
    return Images(found, WORDS)


def truths(dataset: Images, asked: Sequence[Query]) -> list[tuple[int, str, torch.Tensor]]:
    """(finding, image, mask) of each pair, in the order of the queries."""
    return [
        (f, dataset.image_key(q.image), next(r.mask for r in dataset.samples[q.image].regions if r.finding == NAMES[f]))
        for q in asked
        for f in q.findings
    ]


def roc(mask: torch.Tensor, map_: torch.Tensor) -> float:
    return float(roc_auc_score(mask.flatten().numpy(), map_.flatten().numpy()))


def mean_of_findings(values: Sequence[float], findings: Sequence[int]) -> float:
    return float(
        np.mean([np.mean([v for v, f in zip(values, findings, strict=True) if f == one]) for one in {*findings}])
    )


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[1:]]


# --- areas and differences ------------------------------------------------------------------------------------------


@settings(max_examples=30)  # each of 20 areas
@given(st.integers(0, 1000), st.integers(1, 6))
def test_areas_are_exact_with_and_without_ties(seed: int, values: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ties = torch.randint(values, (3, 7, 9), generator=generator).float()
    maps = torch.cat([ties, torch.rand(2, 7, 9, generator=generator) - 0.5])
    masks = torch.rand(4, 7, 9, generator=generator) < 0.3
    masks[:, 0, 0], masks[:, 0, 1] = True, False
    found = areas(twice_midranks(maps.flatten(1)), masks.flatten(1))
    assert found.numpy() == pytest.approx(np.array([[roc(mask, one) for mask in masks] for one in maps]), abs=1e-12)
    for column, mask in enumerate(masks):
        assert torch.equal(found[:, column], PixelAUROC().pair_scores(maps, mask.expand(5, -1, -1)))


def test_a_mask_that_is_empty_or_full_has_no_area() -> None:
    masks = torch.stack([torch.zeros(16), torch.ones(16)]).bool()
    assert areas(twice_midranks(torch.rand(1, 16)), masks).isnan().all()


def of_maps(maps: torch.Tensor, masks: torch.Tensor, others: Sequence[tuple[int, ...]]) -> np.ndarray:
    bits = [np.packbits(mask.numpy()) for mask in masks]
    shape = (masks.shape[1], masks.shape[2])
    return differences(list(maps), bits, shape, others, CONFIG, torch.device("cpu"))


def test_differences_are_own_minus_the_mean_of_others() -> None:
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(5, 2, 9, 9, generator=generator), torch.rand(5, 9, 9, generator=generator) < 0.4
    masks[3] = False
    others = [(1, 2), (0,), (), (0, 1), (3, 0, 1)]
    found = of_maps(maps, masks, others)
    for own in (0, 1, 4):
        for token in range(2):
            rest = [roc(masks[own], maps[other, token]) for other in others[own]]
            assert found[own, token] == pytest.approx(roc(masks[own], maps[own, token]) - np.mean(rest), abs=1e-12)
    assert np.isnan(found[2]).all(), "no other image"
    assert np.isnan(found[3]).all(), "an empty mask"


def test_a_map_that_ignores_the_image_adds_exactly_nothing_and_a_perfect_one_much() -> None:
    generator = torch.Generator().manual_seed(0)
    dataset = rectangles("a", 8)
    masks = torch.stack([region.mask for one in dataset.samples for region in one.regions])
    others = choose_others(["x"] * len(masks), [str(i) for i in range(len(masks))], range(len(masks)))
    assert all(len(chosen) == OTHER_IMAGES for chosen in others)
    same = torch.rand(1, 8, 8, generator=generator).expand(len(masks), 1, -1, -1)
    assert (of_maps(same, masks, others) == 0).all()
    assert of_maps(masks[:, None].float(), masks, others).mean() > 0.3


# --- the choice of other images ---------------------------------------------------------------------------------------

PAIRS = st.lists(st.tuples(st.sampled_from("fg"), st.integers(0, 12)), max_size=30, unique=True)


@given(PAIRS, st.randoms())
def test_the_choice_of_others_depends_on_names_alone(pairs: list[tuple[str, int]], random: Any) -> None:
    def named(pairs: list[tuple[str, int]], order: list[int]) -> dict[Any, list[Any]]:
        chosen = choose_others([f for f, _ in pairs], [str(i) for _, i in pairs], order)
        return {pair: [pairs[other] for other in own] for pair, own in zip(pairs, chosen, strict=True)}

    found = named(pairs, list(range(len(pairs))))
    sizes = Counter(f for f, _ in pairs)
    for pair, own in found.items():
        assert len(own) == len({*own}) == min(OTHER_IMAGES, sizes[pair[0]] - 1)
        assert pair not in own and all(f == pair[0] for f, _ in own)
    used = Counter(other for own in found.values() for other in own)
    assert all(used[pair] == len(found[pair]) for pair in pairs), "every map is used equally often"
    shuffled = pairs.copy()
    random.shuffle(shuffled)
    assert named(shuffled, list(range(len(pairs)))) == found


def test_an_image_is_never_its_own_other_and_its_first_pair_stands_for_it() -> None:
    images = ["a", "b", "a", "c"]
    assert [{*own} for own in choose_others(["f"] * 4, images, [0, 1, 2, 3])] == [{1, 3}, {0, 3}, {1, 3}, {0, 1}]
    assert [{*own} for own in choose_others(["f"] * 4, images, [2, 1, 0, 3])] == [{1, 3}, {2, 3}, {1, 3}, {2, 1}]


def test_the_images_differ_from_finding_to_finding() -> None:
    """A circle that is the same for every finding would compare the same images again and again."""
    images = [str(i) for i in range(20)]
    first, second = (choose_others([finding] * 20, images, range(20)) for finding in "fg")
    assert first != second


# --- through the whole path -------------------------------------------------------------------------------------------


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The maps of each query, as protocol `ours` makes them from here on."""
    kept: list[torch.Tensor] = []

    def records(inputs: Any, *rest: Any) -> Any:
        maps, mass = ours(inputs, *rest)
        kept.extend(maps)
        return maps, mass

    monkeypatch.setitem(PROTOCOLS, "ours", replace(PROTOCOLS["ours"], maps=records))
    return kept


@pytest.mark.parametrize("text", ["caption", "phrase"])
def test_metrics_are_those_of_brute_force(
    sd: Model, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Any
) -> None:
    """With at most six images a finding, each image's others are all others. Resizing rounds by 1e-7, which moves
    ties."""
    dataset, config = rectangles("a", 6), CONFIG.model_copy(update=dict(localization_text=text))
    maps = recorded(monkeypatch)
    result = localization(sd, dataset, config, accelerator=accelerator, arm_dir=tmp_path)
    asked = queries(dataset, sd, config)
    pairs = truths(dataset, asked)
    findings = [f for f, _, _ in pairs]
    assert max(Counter(findings).values()) <= 6 and max(len(q.findings) for q in asked) == (
        2 if text == "caption" else 1
    )
    stored = {
        token: {(row["query"], row["finding"]): row["image_adds"][token] for row in rows_of(tmp_path)}
        for token in MAP_TOKENS
    }
    numbers = [(n, f) for n, q in enumerate(asked) for f in q.findings]
    for token, column in (("word", None), ("eos", 2), ("padding", 3)):
        own = [
            maps[n][4 + place if column is None else column]
            for n, query in enumerate(asked)
            for place in range(len(query.findings))
        ]
        full = F.interpolate(normalize(torch.stack(own))[None], (64, 64), mode="bilinear", align_corners=False)[0]
        added, of_others = [], []
        for place, (finding, image, mask) in enumerate(pairs):
            rest = [roc(mask, full[k]) for k, (f, i, _) in enumerate(pairs) if f == finding and i != image]
            added.append(roc(mask, full[place]) - float(np.mean(rest)))
            of_others.append(float(np.mean(rest)))
        assert [stored[token][number] for number in numbers] == pytest.approx(added, abs=1e-5)
        assert result[token]["image_adds"] == pytest.approx(mean_of_findings(added, findings), abs=1e-5)
        assert result[token]["other_image_auc"] == pytest.approx(mean_of_findings(of_others, findings), abs=1e-5)
        assert result[token]["image_adds_pairs"] == len(pairs)
        gap = result[token]["auc"] - result[token]["other_image_auc"]
        assert gap == pytest.approx(result[token]["image_adds"], abs=1e-12)
        # Whole images are drawn: the findings of an image together.
        images = sorted({image for _, image, _ in pairs})
        statistics = []
        for counts in np.concatenate(list(resample_counts(len(images), CONFIG.bootstrap_samples, CONFIG.seed))):
            drawn = [
                (value, finding)
                for count, image in zip(counts, images, strict=True)
                for value, (finding, where, _) in zip(added, pairs, strict=True)
                if where == image
                for _ in range(int(count))
            ]
            statistics.append(mean_of_findings([v for v, _ in drawn], [f for _, f in drawn]))
        assert result[token]["image_adds_ci"] == pytest.approx(np.quantile(statistics, [0.025, 0.975]), abs=1e-5)


def test_pairs_without_another_image_are_left_out(sd: Model, accelerator: Accelerator, tmp_path: Path) -> None:
    dataset = rectangles("a", 2)  # edema twice, effusion once
    result = localization(sd, dataset, CONFIG, accelerator=accelerator, arm_dir=tmp_path)
    assert result["word"]["pairs"] == 3 and result["word"]["image_adds_pairs"] == 2
    assert [row["image_adds"]["word"] is None for row in rows_of(tmp_path)] == [False, False, True]
    alone = localization(sd, rectangles("b", 1), CONFIG, accelerator=accelerator, arm_dir=tmp_path / "alone")
    assert alone["word"]["pairs"] == 1
    assert {key: value for key, value in alone["word"].items() if "adds" in key or "other" in key} == {
        "image_adds": None, "image_adds_ci": None, "other_image_auc": None, "image_adds_pairs": 0,
    }  # fmt: skip


def test_samples_of_one_image_are_not_each_others_others(sd: Model, accelerator: Accelerator, tmp_path: Path) -> None:
    dataset = rectangles("a", 1)
    dataset.samples.append(replace(dataset.samples[0], id="a0#again"))
    result = localization(sd, dataset, CONFIG, accelerator=accelerator, arm_dir=tmp_path)
    assert result["word"]["pairs"] == 2 and result["word"]["image_adds_pairs"] == 0


def test_the_published_protocols(sd: Model, accelerator: Accelerator, tmp_path: Path) -> None:
    dataset, shared = rectangles("a", 3), {"accelerator": accelerator, "priors_dir": tmp_path / "real"}
    training = rectangles("t", 4, seed=1)
    averages = {}
    for protocol in ("dombrowski", "vilouras"):
        config = CONFIG.model_copy(update=dict(protocol=protocol, timesteps=None, batch_size=8))
        result = localization(sd, dataset, config, arm_dir=tmp_path / protocol, training=training, **shared)
        averages[protocol] = result["word"]["image_adds"]
        assert 0 <= result["priors"]["centre"]["auc"] <= 1 and 0 <= result["priors"]["mean_mask"]["auc"] <= 1
        assert result["word"]["image_adds_pairs"] == (4 if protocol == "dombrowski" else 0)
    added = [row["image_adds"]["word"] for row in rows_of(tmp_path / "dombrowski")]
    assert averages == {"dombrowski": pytest.approx(np.mean(added), abs=1e-12), "vilouras": None}, "micro, and not kept"


def test_a_kill_changes_nothing(
    sd: Model, phantoms: PhantomDataset, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update=dict(batch_size=1))
    whole = localization(sd, phantoms, config, accelerator=accelerator, arm_dir=tmp_path / "whole")
    assert whole["word"]["image_adds_pairs"] > 2
    calls = 0

    def dies(inputs: Any, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return ours(inputs, *rest)

    monkeypatch.setitem(PROTOCOLS, "ours", replace(PROTOCOLS["ours"], maps=dies))
    shared: dict[str, Any] = {"accelerator": accelerator, "arm_dir": tmp_path / "cut"}
    with pytest.raises(KeyboardInterrupt):
        localization(sd, phantoms, config, **shared)
    assert localization(sd, phantoms, config, **shared) == whole
    assert calls == 1 + len(queries(phantoms, sd, config)), "no map is computed twice"
    files = [(tmp_path / name / "pairs.jsonl").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1] and b'"maps"' not in files[0], "the maps are not kept once they are compared"
    assert localization(sd, phantoms, config, **shared) == whole, "from the finished file, without any map"
    few = {"examples": [queries(phantoms, sd, config)[0].image]}
    again = localization(sd, phantoms, config, **shared, **few)
    for token in MAP_TOKENS:
        for key in ("image_adds", "image_adds_ci", "other_image_auc", "image_adds_pairs"):
            assert again[token][key] == whole[token][key], "some maps are computed again to be shown"


def test_the_batch_size_does_not_matter(sd: Model, accelerator: Accelerator, tmp_path: Path) -> None:
    dataset, found = rectangles("a", 8), []
    for size in (1, 3):
        folder = tmp_path / str(size)
        localization(
            sd, dataset, CONFIG.model_copy(update=dict(batch_size=size)), accelerator=accelerator, arm_dir=folder
        )
        found.append([row["image_adds"]["word"] for row in rows_of(folder)])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def packed_rows(count: int, config: FullEvaluation) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        maps, mask = torch.rand(5, 8, 8, generator=generator), torch.rand(1, 15, 15, generator=generator) < 0.4
        query = Query(number, "", (0,), ((1,),), torch.zeros(1))
        scores = {token: {"auc": 0.5} for token in MAP_TOKENS}
        base = {"query": number, "cluster": str(number), "finding": 0, "scores": scores}
        rows.append(base | packed_pairs(query, maps, mask, config)[0])
    return rows


def test_post_processing_is_that_of_the_scored_map() -> None:
    """A threshold changes the ranks; the mask's side, 15, is no multiple of 8."""
    device = torch.device("cpu")
    config = CONFIG.model_copy(update=dict(map_threshold="otsu"))
    plain, cut = (finish_rows(packed_rows(4, c), NAMES, c, device) for c in (CONFIG, config))
    assert all(a["image_adds"]["word"] != b["image_adds"]["word"] for a, b in zip(plain, cut, strict=True))
    assert summary(plain, CONFIG)["word"]["image_adds_pairs"] == 4


# --- priors -----------------------------------------------------------------------------------------------------------


def asked_of(dataset: Images) -> list[Query]:
    return [
        Query(i, "", tuple(NAMES.index(r.finding) for r in s.regions), ((1,),) * len(s.regions), torch.zeros(1), s.id)
        for i, s in enumerate(dataset.samples)
    ]


def test_priors_are_those_of_brute_force(accelerator: Accelerator) -> None:
    held_out, training = rectangles("a", 6), rectangles("t", 12, seed=1)
    found = priors(held_out, training, asked_of(held_out), CONFIG, accelerator=accelerator)
    y, x = np.mgrid[:64, :64] + 0.5
    centre = torch.from_numpy(-np.round(((x - 32) ** 2 + (y - 32) ** 2), 6))
    regions = [r for s in training.samples for r in s.regions]
    means = {f: torch.stack([r.mask.double() for r in regions if r.finding == f]).mean(dim=0) for f in NAMES}
    pairs = truths(held_out, asked_of(held_out))
    findings = [f for f, _, _ in pairs]
    of_centre = mean_of_findings([roc(mask, centre) for _, _, mask in pairs], findings)
    of_means = mean_of_findings([roc(mask, means[NAMES[f]]) for f, _, mask in pairs], findings)
    assert found["centre"]["auc"] == pytest.approx(of_centre, abs=1e-9)
    assert found["mean_mask"]["auc"] == pytest.approx(of_means, abs=1e-9)
    assert found["mean_mask"]["training_images"] == 12
    assert found.keys() == {"centre", "mean_mask"} and found["centre"].keys() == {
        "auc", "auc_ci", "within_prior", "within_prior_ci",
    }  # fmt: skip
    for entry in found.values():
        assert entry["auc_ci"][0] <= entry["auc"] <= entry["auc_ci"][1]


def test_the_centre_is_highest_in_the_middle() -> None:
    found = centre_map(5)
    assert found.argmax() == 12 and found[2, 2] == 0 and found[0, 2] == found[2, 4] == -2
    assert found.min() == found[0, 0] == found[4, 4] == pytest.approx(-(8**0.5))


def test_the_mean_mask_is_of_training_images_only(accelerator: Accelerator) -> None:
    """A held-out image that is also in the training list is not read there, and no held-out mask is."""
    held_out, training = rectangles("a", 8), rectangles("t", 12, seed=1)
    asked = asked_of(held_out)
    clean = priors(held_out, training, asked, CONFIG, accelerator=accelerator)
    mixed = Images([*training.samples, *held_out.samples], WORDS)
    assert priors(held_out, mixed, asked, CONFIG, accelerator=accelerator) == clean
    assert mixed.read and not [name for name in mixed.read if name.startswith("a")]
    only = priors(held_out, rectangles("a", 8), asked, CONFIG, accelerator=accelerator)
    assert only["mean_mask"] is None and only["centre"]["auc"] == clean["centre"]["auc"]
    assert only["centre"]["within_prior"] is None and clean["centre"]["within_prior"] is not None


def test_without_training_regions_there_is_no_mean_mask(accelerator: Accelerator) -> None:
    held_out = rectangles("a", 4)
    asked = asked_of(held_out)
    bare = Images([replace(s, regions=()) for s in rectangles("t", 8).samples], WORDS)
    found = [priors(held_out, data, asked, CONFIG, accelerator=accelerator) for data in (None, bare)]
    assert found[0] == found[1] and found[0]["mean_mask"] is None and found[0]["centre"]["auc"] > 0
    # A finding that no training image has is left out of the average, not scored by an empty map.
    edema = Images([s for s in rectangles("t", 12).samples if s.labels == ("edema",)], WORDS)
    some = priors(held_out, edema, asked, CONFIG, accelerator=accelerator)["mean_mask"]
    mean = torch.stack([s.regions[0].mask.double() for s in edema.samples]).mean(dim=0)
    own = [roc(mask, mean) for f, _, mask in truths(held_out, asked) if NAMES[f] == "edema"]
    assert some["auc"] == pytest.approx(np.mean(own), abs=1e-9) and some["training_images"] == len(edema)


def test_the_number_of_training_images_is_limited_for_each_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priors_module, "PRIOR_TRAINING_IMAGES", 3)
    held_out, training = rectangles("a", 2), rectangles("t", 6)
    training.samples += [replace(s, id=f"{s.id}#{n}") for s in training.samples for n in range(9)]
    found = training_rows(training, held_out, NAMES)
    for finding, rows in found.items():
        assert len({training.image_key(row) for row in rows}) == len(rows) == 3
        assert all(finding in training.labels(row) for row in rows)
    assert found == training_rows(training, held_out, NAMES) and training.read == [], "nothing is decoded"


def test_priors_are_computed_once_a_run(accelerator: Accelerator, tmp_path: Path) -> None:
    held_out, training = rectangles("a", 4), rectangles("t", 8, seed=1)
    asked, shared = asked_of(held_out), {"accelerator": accelerator, "folder": tmp_path}
    first = priors(held_out, training, asked, CONFIG, **shared)
    for dataset in (held_out, training):
        dataset.read.clear()
    assert priors(held_out, training, asked, CONFIG, **shared) == first
    assert held_out.read == training.read == [], "from the file"
    boxes = priors(held_out, None, asked, CONFIG, **shared)
    assert boxes["mean_mask"] is None and held_out.read, "another question"
    fewer = priors(held_out, training, asked[:2], CONFIG, **shared)
    assert fewer["centre"] != first["centre"]
    held_out.read.clear()
    assert priors(held_out, training, asked, CONFIG, **shared) == first and held_out.read == [], "still in the file"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mean_masks.safetensors", "priors.json"]
    kept = mean_masks(training, held_out, asked, CONFIG, accelerator, tmp_path)
    training.read.clear()
    (tmp_path / "priors.json").unlink()
    assert priors(held_out, training, asked, CONFIG, **shared) == first and training.read == [], "the masks are kept"
    for damage in (b"", b"[]", (tmp_path / "mean_masks.safetensors").read_bytes()[:-1]):
        (tmp_path / "mean_masks.safetensors").write_bytes(damage)
        again = mean_masks(training, held_out, asked, CONFIG, accelerator, tmp_path)
        assert again.images == kept.images == 8 and all(torch.equal(again.masks[f], kept.masks[f]) for f in NAMES)


class WithBoxes(Images):
    """Files whose boxes may change while the images stay, as those of a table."""

    def region_fingerprint(self, index: int) -> str:
        return str([region.boxes for region in self.samples[index].regions])


def test_corrected_boxes_of_training_images_give_other_priors(accelerator: Accelerator, tmp_path: Path) -> None:
    held_out, before, after = rectangles("a", 4), rectangles("t", 80, seed=1), rectangles("t", 80, seed=1)
    last = rectangles("t", 80, seed=2).samples[79]
    after.samples[79] = replace(after.samples[79], regions=last.regions)
    assert last.regions and before.fingerprint(79) == after.fingerprint(79)
    asked, shared = asked_of(held_out), {"accelerator": accelerator, "folder": tmp_path}
    old, new = (WithBoxes(data.samples, WORDS) for data in (before, after))
    first = priors(held_out, old, asked, CONFIG, **shared)
    corrected = priors(held_out, new, asked, CONFIG, **shared)
    assert corrected != first and corrected == priors(held_out, new, asked, CONFIG, accelerator=accelerator)
    assert priors(held_out, old, asked, CONFIG, **shared) == first


def test_priors_are_in_the_entry_of_localization(sd: Model, accelerator: Accelerator, tmp_path: Path) -> None:
    held_out, training = rectangles("a", 4), rectangles("t", 8, seed=1)
    shared: dict[str, Any] = {"accelerator": accelerator, "training": training}
    plain = localization(sd, held_out, CONFIG, accelerator=accelerator, arm_dir=tmp_path / "plain")
    found = localization(sd, held_out, CONFIG, arm_dir=tmp_path / "arm", priors_dir=tmp_path / "real", **shared)
    assert "priors" not in plain and plain["word"]["within_prior"] is None and plain["word"]["within_prior_pairs"] == 0
    for token in MAP_TOKENS:
        within = {key: value for key, value in found[token].items() if key.startswith("within_prior")}
        assert found[token] == plain[token] | within and within["within_prior_pairs"] == len(rows_of(tmp_path / "arm"))
        stored = [(row["within_prior"][token], row["finding"]) for row in rows_of(tmp_path / "arm")]
        expected = mean_of_findings([value for value, _ in stored], [finding for _, finding in stored])
        assert within["within_prior"] == pytest.approx(expected, abs=1e-12)
        low, high = within["within_prior_ci"]
        assert low <= expected <= high
    assert {k: v for k, v in found.items() if k not in (*MAP_TOKENS, "priors")} == {
        k: v for k, v in plain.items() if k not in MAP_TOKENS
    }
    asked = queries(held_out, sd, CONFIG)
    assert found["priors"] == priors(held_out, training, asked, CONFIG, accelerator=accelerator)
    assert (tmp_path / "real/priors.json").exists(), "kept for the run's other models"


def _rank(rank: int, folder: str) -> None:
    held_out, training = rectangles("a", 7), rectangles("t", 9, seed=1)
    shared: dict[str, Any] = {"accelerator": Accelerator(cpu=True), "folder": Path(folder)}
    found = [priors(held_out, training, asked_of(held_out), CONFIG, **shared) for _ in range(2)]
    (Path(folder) / f"result-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def test_two_processes_give_the_priors_of_one(accelerator: Accelerator, tmp_path: Path) -> None:
    in_two_processes(_rank, str(tmp_path))
    held_out = rectangles("a", 7)
    one = priors(held_out, rectangles("t", 9, seed=1), asked_of(held_out), CONFIG, accelerator=accelerator)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"result-{rank}.json").read_text(encoding="utf-8")) == [one, one]


# --- several seeds ----------------------------------------------------------------------------------------------------


def add_to(folder: Path, arm: str, values: dict[int, float], key: str) -> None:
    """Puts a measure of pairs into the files of a written run: of each seed one value for every pair."""
    for seed, value in values.items():
        path = folder / f"seed-{seed}" / arm / "pairs.jsonl"
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) | {key: {"word": value, "eos": None, "padding": value}} for line in lines]
        path.write_text("\n".join([head, *(json.dumps(row) for row in rows)]), encoding="utf-8")
        path = folder / f"seed-{seed}" / "metrics.json"
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics["arms"][arm]["localization"]["word"] |= {key: value, f"{key}_ci": [0.0, 1.0]}
        path.write_text(json.dumps(metrics), encoding="utf-8")


@pytest.mark.parametrize("key", PAIR_MEASURES)
def test_seeds_pair_what_is_made_of_all_maps(tmp_path: Path, key: str) -> None:
    for seed in (3, 4):
        write_run(tmp_path, seed, {"frozen": 0.0, "distilled": 0.1, "older": 0.1})
    add_to(tmp_path, "frozen", {3: 0.1, 4: 0.2}, key)
    add_to(tmp_path, "distilled", {3: 0.2, 4: 0.4}, key)
    metrics = combine(tmp_path, samples=100)
    found = metrics["paired"]["distilled - frozen"]
    assert found[f"word.{key}"]["value"] == pytest.approx(0.15)
    assert found[f"word.{key}"]["per_seed"] == pytest.approx({"3": 0.1, "4": 0.2})
    assert found[f"word.{key}"]["ci"] == pytest.approx([0.1, 0.2])
    assert f"eos.{key}" not in found, "of no pair"
    arm = metrics["arms"]["distilled"]
    assert [arm["per_seed"][seed][f"word.{key}"] for seed in ("3", "4")] == [0.2, 0.4]
    assert arm["localization"]["word"][key] == pytest.approx(0.3)
    assert arm["localization"]["word"][f"{key}_ci"] == pytest.approx([0.2, 0.4])
    older = metrics["paired"]["older - frozen"]
    assert f"word.{key}" not in older and "word.auc" in older, "a run from before this number"
    assert f"word.{key}" not in metrics["arms"]["older"]["per_seed"]["3"]


def test_intervals_of_blind_maps_draw_patients(tmp_path: Path) -> None:
    """And a kept result is not used where the patients are others."""
    accelerator, found = Accelerator(), []
    for patient in ("", "one", "two"):
        held_out = rectangles("b", 6)
        held_out.patient = lambda i, name=patient: name and (name if name == "one" else f"p{i // 2}")  # type: ignore[attr-defined]
        asked = asked_of(held_out)
        found.append(priors(held_out, None, asked, CONFIG, accelerator=accelerator, folder=tmp_path)["centre"])
    by_image, of_one, by_patient = found
    assert by_image["auc"] == of_one["auc"] == by_patient["auc"]
    assert by_image["auc_ci"] is not None and of_one["auc_ci"] is None, "one patient has no interval"
    assert by_patient["auc_ci"] not in (None, by_image["auc_ci"])

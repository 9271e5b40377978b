"""Shifts keep the ground truth that they say they keep, and the recipe ends with its table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from listed import Listed, sample
from recipe import config_class_of, recipe_module
from tiny import save_tiny

from distill.cli import parse
from distill.config import FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.data.sample import Sample, image_key
from distill.evaluation import robustness
from distill.evaluation.protocols import Query, queries
from distill.evaluation.robustness import (
    FOR_SYNONYMS,
    SHIFTS,
    ShiftedDataset,
    box_mask,
    comparable_sets,
    negation_queries,
    two_places,
    with_noise,
    with_swapped_sides,
    with_synonyms,
)
from distill.metrics import bootstrap_interval
from distill.models.family import Model
from distill.tokens import find_words

PHANTOMS = PhantomDataset("test", 60, resolution=64)


SIDES = {"left": "right", "RIGHT": "LEFT", "Right lower lobe": "Left lower lobe", "bilateral": "bilateral",
         "leftover": "leftover", "left-sided": "right-sided", "Left and right": "Right and left"}  # fmt: skip
BETWEEN = st.text(st.characters(max_codepoint=127), max_size=20)


@given(BETWEEN, st.sampled_from([*SIDES]), BETWEEN)
def test_sides_are_swapped_and_twice_gives_the_caption_back(before: str, side: str, after: str) -> None:
    swapped = with_swapped_sides(f"{before} {side} {after}")
    assert SIDES[side].lower() in swapped.lower()
    assert with_swapped_sides(swapped).lower() == f"{before} {side} {after}".lower()


def test_synonyms_name_every_finding_by_other_words_alone() -> None:
    shifted = ShiftedDataset(PHANTOMS, "synonyms")
    seen = set()
    for index in range(len(PHANTOMS)):
        caption = shifted.caption(index)
        assert with_synonyms(caption) == caption, "nothing is left to replace"
        for finding in PHANTOMS.labels(index):
            seen.add(finding)
            assert find_words(caption, shifted.query_words[finding]), (finding, caption)
            assert not find_words(caption, set(PHANTOMS.query_words[finding]) - {"cardiac"}), caption
    assert seen == set(PHANTOMS.findings)


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_changes_what_it_says_and_keeps_the_rest(name: str) -> None:
    shifted = ShiftedDataset(PHANTOMS, name)
    index = next(i for i in range(60) if PHANTOMS.labels(i) and "left" in PHANTOMS.caption(i).lower())
    before, after = PHANTOMS[index], shifted[index]
    assert after.caption == shifted.caption(index) and shifted.labels(index) == PHANTOMS.labels(index)
    changes_caption, changes_pixels = (
        name in ("synonyms", "swapped sides", "mirrored"),
        name in ("noise", "low contrast", "mirrored"),
    )
    assert (after.caption != before.caption) == changes_caption
    assert torch.equal(after.pixel_values, before.pixel_values) != changes_pixels
    assert after.pixel_values.abs().max() <= 1 and torch.equal(after.pixel_values, shifted[index].pixel_values)
    assert shifted.fingerprint(index) != PHANTOMS.fingerprint(index)
    for old, new in zip(before.regions, after.regions, strict=True):
        assert torch.equal(new.mask, old.mask.flip(-1) if name == "mirrored" else old.mask)
        rows, columns = new.mask.nonzero().T
        x, y = min(b[0] for b in new.boxes), min(b[1] for b in new.boxes)
        assert (int(columns.min()), int(rows.min())) == (int(x), int(y)), "boxes go with their masks"


class TwoCaptions(PhantomDataset):
    """Every image has two rows, as with several captions; findings are written with capitals."""

    findings = tuple(finding.title() for finding in PHANTOMS.findings)
    query_words = {finding.title(): words for finding, words in PHANTOMS.query_words.items()}

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        named = tuple(replace(r, finding=r.finding.title(), phrase=None) for r in sample.regions)
        return replace(sample, regions=named)

    def image_key(self, index: int) -> str:
        return str(index // 2)


@pytest.mark.parametrize("name", SHIFTS)
def test_a_shift_knows_images_phrases_and_findings_in_any_case(name: str) -> None:
    dataset = TwoCaptions("test", 60, resolution=64)
    shifted = ShiftedDataset(dataset, name)
    assert [image_key(shifted, row) for row in (0, 1, 2)] == ["0", "0", "1"]
    rows = [4, 5, 9, 1]
    found = robustness.means({"auc": [0.1, 0.9, 0.4, 0.3]}, shifted, rows, FullEvaluation())
    expected = bootstrap_interval([0.1, 0.9, 0.4, 0.3], [0, 0, 1, 2], np.mean)
    assert (found["images"], found["auc"], found["auc_ci"]) == (3, pytest.approx(0.425), expected)
    dataset.patient = lambda index: "p" if index > 3 else "q"  # type: ignore[attr-defined]
    two = robustness.means({"auc": [0.1, 0.9, 0.4, 0.3]}, shifted, rows, FullEvaluation())
    expected = bootstrap_interval([0.1, 0.9, 0.4, 0.3], [0, 0, 0, 1], np.mean)
    assert (two["images"], two["auc_ci"]) == (3, expected)
    row = next(i for i in range(60) if "pleural effusion" in PHANTOMS.labels(i))
    phrases = {region.finding: region.phrase for region in shifted[row].regions}
    assert phrases["Pleural Effusion"] == {"none": None, "synonyms": "fluid collection"}.get(name, "Pleural Effusion")
    text = shifted.caption(row)
    assert find_words(text, shifted.query_words["Pleural Effusion"]), "the words of the text are asked for"


def captioned(*rows: tuple[str, tuple[str, ...]]) -> Listed:
    words = {"pleural effusion": ("pleural", "effusion"), "edema": ("edema",), "nodule": ("nodule",)}
    return Listed([sample(str(n), text, *((f, None) for f in names)) for n, (text, names) in enumerate(rows)], words)


def pairs_of(data: Listed, sd: Model, **options: Any) -> dict[str, list[tuple[int, list[str]]] | None]:
    """Row of the table -> image, and findings that are asked for."""
    config = FullEvaluation(localization_images=4, **options)
    sets = comparable_sets(data, sd, config, Accelerator())
    return {
        name: one and [(q.image, [data.findings[f] for f in q.findings]) for q in queries(one, sd, config)]
        for name, one in sets.items()
    }


def test_all_shifts_are_compared_on_the_same_pairs_and_synonyms_with_the_plain_words_of_theirs(sd: Model) -> None:
    """`pleural disease` names an effusion by a word that no synonym replaces, and a nodule has none."""
    data = captioned(
        ("Pleural disease and edema.", ("pleural effusion", "edema")),
        ("Small effusion, a nodule.", ("pleural effusion", "nodule")),
        ("A nodule. No effusion.", ("nodule",)),
    )
    found = pairs_of(data, sd)
    assert list(found) == ["none", FOR_SYNONYMS, "synonyms", "swapped sides", "noise", "low contrast", "mirrored"]
    every = [(0, ["pleural effusion", "edema"]), (1, ["pleural effusion", "nodule"]), (2, ["nodule"])]
    theirs = [(0, ["edema"]), (1, ["pleural effusion"])]
    assert found == {name: theirs if "synonyms" in name else every for name in found}
    phrases = pairs_of(data, sd, localization_text="phrase")
    assert list(phrases) == list(SHIFTS) and len(phrases["none"] or []) == 5


def test_without_synonyms_there_is_no_such_row_and_where_all_have_one_no_other(sd: Model) -> None:
    none = pairs_of(captioned(("A nodule. No pleural effusion.", ("nodule",))), sd)
    assert none["synonyms"] is None and FOR_SYNONYMS not in none
    assert all(pairs == [(0, ["nodule"])] for name, pairs in none.items() if name != "synonyms")
    every = pairs_of(captioned(("Edema.", ("edema",))), sd)
    assert list(every) == list(SHIFTS) and all(pairs == [(0, ["edema"])] for pairs in every.values())


def test_phrases_change_sides_with_the_captions() -> None:
    dataset = ShiftedDataset(TwoCaptions("test", 60, resolution=64), "mirrored")
    sided = replace(PHANTOMS[0], regions=tuple(replace(r, phrase="Left base") for r in PHANTOMS[2].regions))
    dataset.dataset = cast("Any", [sided])
    assert sided.regions and {region.phrase for region in dataset[0].regions} == {"Right base"}


def test_negated_findings_are_those_that_the_caption_names_and_the_image_has_not(sd: Model) -> None:
    found = negation_queries(PHANTOMS, sd, 6)
    assert len(found) == 6
    for query in found:
        stated = int(query.truth)
        names = [PHANTOMS.findings[f] for f in query.findings]
        labels = PHANTOMS.labels(query.image)
        assert names[:stated] and all(name in labels for name in names[:stated])
        assert names[stated:] and not any(name in labels for name in names[stated:])
        assert not set(sum(query.tokens[:stated], ())) & set(sum(query.tokens[stated:], ()))


def test_a_map_of_one_of_two_places_is_worse_by_the_place_that_it_lacks(
    sd: Model, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With maps that are the true mask, and the mask of its first box alone."""
    config = FullEvaluation(localization_images=40, timesteps=(300,), bootstrap_samples=20)

    class InPairs(PhantomDataset):
        def image_key(self, index: int) -> str:
            return str(index // 20)

    def score(places: int, dataset: PhantomDataset = PHANTOMS) -> dict[str, float]:
        def true_maps(*arguments: Any, **options: Any) -> Iterator[tuple[Query, Sample, torch.Tensor]]:
            for query in arguments[2]:
                sample = PHANTOMS[query.image]
                regions = {region.finding: region for region in sample.regions}
                maps = []
                for finding in query.findings:
                    region = regions[PHANTOMS.findings[finding]]
                    shown = sum(box_mask(box, region.mask.shape) for box in region.boxes[:places]) > 0
                    maps.append((region.mask & shown).float())
                yield query, sample, torch.stack(maps)

        monkeypatch.setattr(robustness, "maps_of", true_maps)
        found = two_places(sd, dataset, config, accelerator=accelerator, label="")
        assert found is not None and found["pairs"] >= 5
        return found

    both, first = score(2), score(1)
    assert both["auc"] == both["lesser_auc"] == 1
    assert both["images"] > score(2, InPairs("test", 60, resolution=64))["images"] <= 3, "rows of one image count once"
    assert first["lesser_auc"] == pytest.approx(0.5, abs=0.02) and 0.5 < first["auc"] < 1


def test_the_recipe_scores_every_model_under_every_shift(tmp_path: Path) -> None:
    save_tiny(tmp_path / "sd", "sd")
    argv = [
        "--base.name", str(tmp_path / "sd"), "--data.resolution", "64", "--data.test_size", "30",
        "--evaluation.localization_images", "12", "--evaluation.timesteps", "[300]", "--output_dir", str(tmp_path / "out"),
        "--evaluation.bootstrap_samples", "20",
    ]  # fmt: skip
    recipe = recipe_module("robustness")
    recipe.robustness(parse(config_class_of(recipe), argv))
    found = json.loads((tmp_path / "out/robustness.json").read_text())["models"]["base"]
    assert set(found["shifts"]) - {FOR_SYNONYMS} == set(SHIFTS), "the tiny tokenizer cuts some longer synonyms off"
    assert all(0 <= s["auc"] <= 1 for s in found["shifts"].values())
    assert 0 <= found["two_places"]["lesser_auc"] <= found["two_places"]["auc"] <= 1
    assert found["negations"]["images"] >= 1 and found["negations"]["peak_ratio"] > 0
    assert "| mirrored |" in (tmp_path / "out/robustness.md").read_text()


def test_negations_of_one_image_count_once(
    sd: Model, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    class InPairs(PhantomDataset):
        def image_key(self, index: int) -> str:
            return str(index // 30)

    def maps(*arguments: Any, **options: Any) -> Iterator[tuple[Query, Sample, torch.Tensor]]:
        for query in arguments[2]:
            yield query, PHANTOMS[query.image], torch.rand(len(query.findings), 4, 4) + 0.1

    monkeypatch.setattr(robustness, "maps_of", maps)
    config = FullEvaluation(localization_images=40, bootstrap_samples=20)
    counts = []
    for dataset in (PHANTOMS, InPairs("test", 60, resolution=64)):
        found = robustness.negations(sd, dataset, config, accelerator=accelerator, label="")
        assert found is not None
        counts.append(found["images"])
    assert counts[0] > 2 >= counts[1]


def test_noise_is_of_its_own_at_each_pixel_and_alike_in_the_channels() -> None:
    noise = with_noise(torch.zeros(3, 40, 30), "a")
    assert torch.equal(noise[0], noise[2]) and noise.shape == (3, 40, 30)
    assert float(noise.std()) == pytest.approx(0.15, rel=0.1) and float(noise[0].std(dim=0).min()) > 0.05
    assert not torch.equal(noise, with_noise(torch.zeros(3, 40, 30), "b"))

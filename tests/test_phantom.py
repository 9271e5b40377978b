"""The phantom: rows are pure, masks are exact, and captions tell the findings without a give-away place."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn, idctn

from distill.data.captions import MS_CXR_QUERY_WORDS, query_words_for
from distill.data.phantom import dataset as phantom
from distill.data.phantom import pixels as phantom_pixels
from distill.data.phantom.dataset import PhantomDataset, picture_sheet
from distill.data.phantom.pixels import draw
from distill.data.phantom.scene import FINDINGS, MOVABLE, Scene, draw_scene
from distill.data.sample import ImageCaptionDataset, Sample, region_list
from distill.errors import UserError
from distill.metrics import PixelAUROC
from distill.tokens import find_words

ROWS = 100
CAPTIONS = 2000
NEGATION = re.compile(r"\b(no|not|negative|without)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def dataset() -> PhantomDataset:
    return PhantomDataset("train", CAPTIONS)


@pytest.fixture(scope="module")
def samples(dataset: PhantomDataset) -> list[Sample]:
    return [dataset[index] for index in range(ROWS)]


@pytest.fixture(scope="module")
def texts(dataset: PhantomDataset) -> list[tuple[str, tuple[str, ...]]]:
    return [(dataset.caption(index), dataset.labels(index)) for index in range(CAPTIONS)]


@pytest.fixture(scope="module")
def scenes_of() -> dict[str, list[Scene]]:
    """Four scenes of each finding, with the other findings taken away."""
    found: dict[str, list[Scene]] = {name: [] for name in FINDINGS}
    index = 0
    while any(len(scenes) < 4 for scenes in found.values()):
        scene = draw_scene(3, "test", index)
        index += 1
        for finding in scene.findings:
            found[finding.name].append(replace(scene, findings=(finding,)))
    return {name: scenes[:4] for name, scenes in found.items()}


def test_samples_are_what_the_contract_says(dataset: PhantomDataset, samples: list[Sample]) -> None:
    as_protocol: ImageCaptionDataset = dataset
    assert len(as_protocol) == CAPTIONS and tuple(as_protocol.findings) == FINDINGS
    assert all(tuple(dataset.query_words[name]) == query_words_for(name, {}) for name in FINDINGS)
    for index, sample in enumerate(samples):
        assert sample.pixel_values.shape == (3, 128, 128) and sample.pixel_values.dtype == torch.float32
        assert sample.pixel_values.min() >= -1 and sample.pixel_values.max() <= 1
        assert torch.equal(sample.pixel_values[0], sample.pixel_values[2])
        assert sample.caption == dataset.caption(index)
        assert sample.labels == dataset.labels(index) == tuple(region.finding for region in sample.regions)
        for region in sample.regions:
            assert region.mask.shape == (128, 128) and region.mask.dtype == torch.bool
            assert region.phrase is not None and region.phrase.lower() in sample.caption.lower()
            assert find_words(region.phrase, dataset.query_words[region.finding])


def test_a_row_depends_on_seed_split_index_and_resolution_only(samples: list[Sample]) -> None:
    again = PhantomDataset("train", 8)
    for index in (7, 0, 3):
        assert torch.equal(again[index].pixel_values, samples[index].pixel_values)
        assert again[index].id == samples[index].id and again[index].caption == samples[index].caption
    others = [PhantomDataset("train", 8, seed=1), PhantomDataset("validation", 8), PhantomDataset("train", 8, 0, 64)]
    fingerprints = {dataset.fingerprint(index) for dataset in (again, *others) for index in range(8)}
    assert len(fingerprints) == 4 * 8
    assert again.fingerprint(2) == PhantomDataset("train", 3).fingerprint(2)


def test_splits_share_no_row() -> None:
    sets = [PhantomDataset(split, 500) for split in ("train", "validation", "test")]
    assert len({repr(dataset.scene(index)) for dataset in sets for index in range(500)}) == 1500
    assert len({dataset[0].pixel_values.numpy().tobytes() for dataset in sets}) == 3
    assert len({dataset[0].id for dataset in sets}) == 3


def test_masks_lie_in_the_lungs_on_the_named_side(dataset: PhantomDataset, samples: list[Sample]) -> None:
    for index, sample in enumerate(samples):
        scene = dataset.scene(index)
        x, _, lungs = phantom_pixels._place(scene, 128)
        outline = {side: lung.shape() > 0 for side, lung in lungs.items()}
        for finding, region in zip(scene.findings, sample.regions, strict=True):
            mask = region.mask.numpy()
            assert mask.mean() > 0.015, (index, finding.name)
            if finding.name == "cardiomegaly":
                assert x[mask].mean() > 0, "the heart lies towards the patient's left, on the image's right"
                continue
            sides = ("right", "left") if finding.side == "bilateral" else (finding.side,)
            assert len(region.boxes) == len(sides)
            assert not (mask & ~np.logical_or.reduce([outline[side] for side in sides])).any()
            assert all((mask & outline[side]).any() for side in sides)
            if finding.side != "bilateral":
                assert (x[mask].mean() > 0) == (finding.side == "left")


@pytest.mark.parametrize("placement", ["anatomical", "balanced"])
def test_regions_are_those_of_the_sample_and_no_picture_is_drawn(
    placement: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = PhantomDataset("train", 60, 7, 64, placement=placement)
    drawn = [dataset[i].regions for i in range(60)]
    assert {region.finding for regions in drawn for region in regions} == set(dataset.findings)
    monkeypatch.setattr(phantom, "draw", lambda *given: pytest.fail("no picture is needed"))
    for i, regions in enumerate(drawn):
        for ours, theirs in zip(region_list(dataset, i), regions, strict=True):
            assert replace(ours, mask=theirs.mask) == theirs and torch.equal(ours.mask, theirs.mask)


def test_boxes_are_tight(samples: list[Sample]) -> None:
    for sample in samples:
        for region in sample.regions:
            mask, covered = region.mask.numpy(), np.zeros((128, 128), bool)
            for left, top, width, height in region.boxes:
                x, y, w, h = (int(value) for value in (left, top, width, height))
                inside = mask[y : y + h, x : x + w]
                assert inside.shape == (h, w)
                assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
                covered[y : y + h, x : x + w] = True
            assert not (mask & ~covered).any()


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_changes_the_picture_in_its_mask(name: str, scenes_of: dict[str, list[Scene]]) -> None:
    for scene in scenes_of[name]:
        drawing = draw(scene, 128)
        change = np.abs(drawing.image - draw(replace(scene, findings=()), 128).image)
        mask = np.logical_or.reduce(drawing.pieces[name])
        assert change[mask].mean() > 0.05
        assert change[mask].mean() > 10 * change[~mask].mean()


@pytest.mark.parametrize("name", FINDINGS)
def test_layout_does_not_depend_on_the_resolution(name: str, scenes_of: dict[str, list[Scene]]) -> None:
    for scene in scenes_of[name]:
        small, large = draw(scene, 64), draw(scene, 128)
        mask = np.logical_or.reduce(small.pieces[name])
        reduced = np.logical_or.reduce(large.pieces[name]).reshape(64, 2, 64, 2).mean((1, 3)) >= 0.5
        assert (mask & reduced).sum() / (mask | reduced).sum() > 0.8
        assert np.abs(small.image - large.image.reshape(64, 2, 64, 2).mean((1, 3))).mean() < 0.02


def test_every_resolution_is_drawn() -> None:
    for resolution in (64, 96, 512):
        dataset = PhantomDataset("test", 1, resolution=resolution)
        sample = dataset[0]
        assert sample.pixel_values.shape == (3, resolution, resolution) and dataset.size_ids(0) == sample.size_ids
        assert sample.original_size == (resolution, resolution)


def test_prevalence(texts: list[tuple[str, tuple[str, ...]]]) -> None:
    share = {name: np.mean([name in labels for _, labels in texts]) for name in FINDINGS}
    assert all(0.1 < value < 0.25 for value in share.values()), share
    assert 0.16 < np.mean([not labels for _, labels in texts]) < 0.24
    assert {len(labels) for _, labels in texts} == {0, 1, 2, 3}


def test_captions_state_what_is_there_and_deny_only_what_is_not(texts: list[tuple[str, tuple[str, ...]]]) -> None:
    for caption, labels in texts:
        sentences = re.findall(r"[^.]+\.", caption)
        assert 1 <= len(sentences) <= 4 and len(caption.split()) < 45
        stated = " ".join(sentence for sentence in sentences if not NEGATION.search(sentence))
        denied = " ".join(sentence for sentence in sentences if NEGATION.search(sentence))
        for name in FINDINGS:
            words = query_words_for(name, {})
            assert bool(find_words(stated, words)) == (name in labels), (name, caption)
            assert not (name in labels and find_words(denied, words)), (name, caption)
        if "cardiomegaly" in labels:
            assert "normal heart" not in caption.lower() and "heart size" not in caption.lower()
    assert len({caption for caption, _ in texts}) > 0.9 * len(texts)


def test_the_place_in_the_caption_tells_little(texts: list[tuple[str, tuple[str, ...]]]) -> None:
    """Of the variance of the place of stated words, the finding explains little; words also stand in late places."""
    places: dict[str, list[float]] = {name: [] for name in FINDINGS}
    for caption, labels in texts:
        for name in labels:
            start = find_words(caption, query_words_for(name, {}))[0][0]
            places[name].append(len(caption[:start].split()))
    everything = np.concatenate([np.asarray(values) for values in places.values()])
    between = sum(len(v) * (np.mean(v) - everything.mean()) ** 2 for v in places.values()) / len(everything)
    assert between / everything.var() < 0.05
    assert all(np.std(values) > 5 for values in places.values())
    every_word = [word for name in FINDINGS for word in query_words_for(name, {})]
    first = [caption.split(".")[0] for caption, labels in texts if labels]
    assert np.mean([bool(find_words(text, every_word)) and not NEGATION.search(text) for text in first]) < 0.8
    denied = np.mean([bool(NEGATION.search(caption)) for caption, _ in texts])
    assert 0.3 < denied < 0.8


def test_edges_are_soft_enough_for_an_autoencoder_that_reduces_by_eight(samples: list[Sample]) -> None:
    """Six cosines of each 8x8 block carry a picture to more than 30 dB."""
    low = np.add.outer(range(8), range(8)) <= 2
    quality = []
    for sample in samples:
        blocks = ((sample.pixel_values[0].numpy() + 1) / 2).reshape(16, 8, 16, 8).transpose(0, 2, 1, 3)
        kept = idctn(dctn(blocks, axes=(2, 3), norm="ortho") * low, axes=(2, 3), norm="ortho")
        quality.append(-10 * np.log10(((kept - blocks) ** 2).mean()))
    assert np.mean(quality) > 31


def test_wrong_arguments_are_listed_at_once() -> None:
    with pytest.raises(UserError) as error:
        PhantomDataset("training", 0, seed=-1, resolution=32)  # type: ignore[arg-type]
    message = str(error.value)
    assert all(part in message for part in ("'training'", "size is 0", "seed is -1", "resolution is 32", "validation"))
    with pytest.raises(IndexError):
        PhantomDataset("test", 3)[3]


def test_sheet_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "sheet.png"
    monkeypatch.setattr(sys, "argv", ["phantom", "--output", str(path), "--rows", "1", "--columns", "2"])
    phantom._main()
    assert capsys.readouterr().out.strip() == str(path)
    plain = np.asarray(Image.open(path))
    outlined = np.asarray(picture_sheet(PhantomDataset("train", 2), columns=2, outlines=True))
    assert plain.shape == outlined.shape and (plain != outlined).any()


def test_caption_styles_differ_in_what_they_add_to_the_findings() -> None:
    reports, affirmed, stated = (
        PhantomDataset("train", 300, captions=style) for style in ("reports", "affirmed", "stated")
    )
    counts = {"reports": 0, "affirmed": 0, "stated": 0}
    words = dict.fromkeys(counts, 0)
    for index in range(300):
        assert reports.scene(index) == affirmed.scene(index) == stated.scene(index)
        for dataset in (reports, affirmed, stated):
            sample_words = dataset.caption(index).split()
            words[dataset.captions] += len(sample_words)
            counts[dataset.captions] += bool(
                re.search(
                    r"\b(no|negative for) [^.]*(atel|cardiom|consol|edema|opac|effus|pneum)",
                    dataset.caption(index),
                    re.I,
                )
            )
            for name in dataset.labels(index):
                assert find_words(dataset.caption(index), dataset.query_words[name])
        if stated.labels(index):
            assert stated.caption(index).count(".") <= len(stated.labels(index))
    assert counts["reports"] > 100 and counts["affirmed"] == counts["stated"] == 0
    assert words["stated"] < words["affirmed"] < words["reports"]
    assert len({dataset.fingerprint(0) for dataset in (reports, affirmed, stated)}) == 3


@pytest.fixture(scope="module")
def balanced() -> PhantomDataset:
    return PhantomDataset("train", 3000, placement="balanced")


def test_balanced_findings_lie_anywhere_equally_often(balanced: PhantomDataset) -> None:
    scenes = [balanced.scene(index) for index in range(len(balanced))]
    named = Counter((f.name, f.side, f.zone) for scene in scenes for f in scene.findings)
    assert len(named) == 24 and {name for name, _, _ in named} == set(balanced.findings) == set(MOVABLE)
    expected = sum(named.values()) / 24
    # Chi-squared of 23 degrees of freedom; .999 lies at 49.7.
    assert sum((count - expected) ** 2 for count in named.values()) / expected < 49.7
    both = [scene for scene in scenes if scene.unnamed]
    assert 0.4 < len(both) / sum(bool(scene.findings) for scene in scenes) < 0.6
    for scene in both:
        (one,), (other,) = scene.findings, scene.unnamed
        assert one.name != other.name and (one.side, one.zone) != (other.side, other.zone)


def test_captions_leave_unnamed_findings_out(balanced: PhantomDataset) -> None:
    seen = 0
    for index in range(600):
        scene, caption = balanced.scene(index), balanced.caption(index)
        assert balanced.labels(index) == tuple(finding.name for finding in scene.findings)
        for finding in scene.unnamed:
            seen += 1
            assert not find_words(caption, MS_CXR_QUERY_WORDS[finding.name]), caption
            assert not re.search(r"clear|well aerated", caption), caption
    assert seen > 200


def test_unnamed_findings_are_drawn_and_have_no_region(balanced: PhantomDataset) -> None:
    index = next(i for i in range(100) if balanced.scene(i).unnamed)
    scene, sample = balanced.scene(index), balanced[index]
    without = draw(replace(scene, unnamed=()), balanced.resolution).image
    assert [region.finding for region in sample.regions] == [scene.findings[0].name]
    assert np.abs(draw(scene, balanced.resolution).image - without).max() > 0.1


def test_every_balanced_finding_is_in_the_picture() -> None:
    small = PhantomDataset("test", 150, resolution=64, placement="balanced")
    for index in range(len(small)):
        assert all(region.mask.sum() > 20 for region in small[index].regions), index


def test_balanced_places_tell_less_than_anatomical_ones(balanced: PhantomDataset) -> None:
    def auc_of_mean_mask(dataset: PhantomDataset) -> float:
        """Mean over findings of the AUC of their mean mask in half of the images, on the others."""
        masks: dict[str, list[torch.Tensor]] = {name: [] for name in MOVABLE}
        for index in range(len(dataset)):
            for region in dataset[index].regions if set(dataset.labels(index)) & set(MOVABLE) else ():
                if region.finding in masks:
                    masks[region.finding].append(region.mask)
        areas = []
        for found in masks.values():
            half = len(found) // 2
            blind = torch.stack(found[:half]).float().mean(0).expand(len(found) - half, -1, -1)
            areas.append(PixelAUROC().pair_scores(blind, torch.stack(found[half:])).mean())
        return float(torch.stack(areas).mean())

    anatomical, moved = (
        auc_of_mean_mask(PhantomDataset("train", 400, resolution=64, placement=placement))
        for placement in ("anatomical", "balanced")
    )
    assert moved < 0.78 and anatomical > 0.85, (moved, anatomical)


def test_a_scene_and_its_caption_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own = PhantomDataset("train", 3, seed=987_654)
    first = (own.caption(1), own.labels(1), own.scene(1))
    rng = np.random.default_rng
    made: list[object] = []
    monkeypatch.setattr(np.random, "default_rng", lambda key: made.append(key) or rng(key))
    assert (own.caption(1), own.labels(1), own.scene(1)) == first and not made
    others = [PhantomDataset("train", 3, seed=987_654, captions="labels"), PhantomDataset("test", 3, seed=987_654)]
    assert all(other.caption(1) != first[0] for other in others) and made
    with pytest.raises(IndexError, match="row 3"):
        own.caption(3)


@pytest.mark.parametrize("knots", [5, 22, 40])
def test_smooth_noise_has_no_denormal_factors_and_is_the_same_field(knots: int) -> None:
    """Denormal factors change no sum, and made a picture take an eighth more time."""
    basis = phantom_pixels._noise_basis(128, knots)
    assert not ((basis > 0) & (basis < 1e-30)).any()
    np.testing.assert_allclose((basis.astype(np.float64) ** 2).sum(1), 1.0, rtol=1e-5)

"""Protocols of localization: a right map scores as right, whatever the batch, the processes, and a kill between."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from listed import WORDS, Listed, sample
from pair import in_two_processes
from safetensors.torch import load_file, save_file
from tiny import save_tiny, tiny_sd

from distill.attention.heat_maps import normalize, to_image
from distill.attention.recording import AttentionMaps, attention_layers, record_attention
from distill.config import BaseConfig, FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.data.sample import Region
from distill.errors import UserError
from distill.evaluation.evaluate import finite
from distill.evaluation.localization import _read_maps, localization
from distill.evaluation.protocols import (
    DEFAULT_TIMESTEPS,
    PROTOCOLS,
    Query,
    Recorder,
    ground_truth,
    ground_truths,
    open_recorder,
    ours,
    post_process,
    prepare_inputs,
    queries,
    selection,
    vilouras_layers,
    with_subset,
)
from distill.metrics import PixelAUROC, macro_mean_interval
from distill.models import model_of
from distill.models.family import AttentionSubset, Model
from distill.models.loading import load_model
from distill.tokens import BOS, EOS, PADDING, WORD, token_groups

CONFIG = FullEvaluation(localization_images=4, timesteps=(100, 600), batch_size=4, bootstrap_samples=20)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_a_map_does_not_depend_on_the_batch(loaded: dict[str, Model], phantoms: PhantomDataset, kind: str) -> None:
    model = loaded[kind]
    found = queries(phantoms, model, CONFIG)[:4]
    with record_attention(model.denoiser) as maps:

        def of(batch: Sequence[Query]) -> torch.Tensor:
            samples = [phantoms[query.image] for query in batch]
            inputs = prepare_inputs(model, samples, batch, torch.device("cpu"))
            maps.reduce = inputs.reduce
            return ours(inputs, CONFIG, Recorder(maps))[0]

        together = of(found)
        assert together.shape == (4, 4 + max(len(query.tokens) for query in found), 8, 8)
        for query, row in zip(found, together, strict=True):
            alone = of([query])[0]
            torch.testing.assert_close(alone, row[: len(alone)], rtol=0, atol=1e-5)
            assert (row[len(alone) :] == 0).all()
            # Bilinear interpolation keeps sums of 1 at every place.
            torch.testing.assert_close(alone[:4].sum(dim=0), torch.ones(8, 8), rtol=0, atol=1e-5)


def test_scores_do_not_depend_on_the_batch_size(
    sd: Model, phantoms: PhantomDataset, accelerator: Accelerator, tmp_path: Path
) -> None:
    results, files = [], []
    for size in (1, 3):
        folder = tmp_path / str(size)
        config = CONFIG.model_copy(update=dict(batch_size=size))
        results.append(localization(sd, phantoms, config, accelerator=accelerator, arm_dir=folder, examples=[0, 1]))
        files.append(load_file(folder / "maps.safetensors"))
    assert_close(results[0], results[1], 1e-4)
    assert files[0].keys() == files[1].keys()
    for key, value in files[0].items():
        torch.testing.assert_close(value, files[1][key], rtol=0, atol=1e-3)


def assert_close(first: Any, second: Any, tolerance: float) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_close(first[key], second[key], tolerance)
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_close(a, b, tolerance)
    elif isinstance(first, float):
        assert first == pytest.approx(second, abs=tolerance)
    else:
        assert first == second


# --- queries and their tokens ---------------------------------------------------------------------------------------


def test_pairs_whose_words_the_caption_lacks_are_left_out(sd: Model) -> None:
    dataset = Listed(
        [
            sample("a", "Edema with small effusions.", ("edema", None), ("pleural effusion", None)),
            sample("b", "Lungs are wet.", ("edema", None)),
            sample("c", "Clear lungs."),
            sample("d", "Fluid and edema.", ("pleural effusion", None), ("edema", None)),
        ],
        WORDS,
    )
    found = queries(dataset, sd, CONFIG)
    assert [(query.image, [WORDS_OF[f] for f in query.findings]) for query in found] == [
        (0, ["edema", "pleural effusion"]),
        (3, ["edema"]),
    ]
    for query in found:
        for finding, tokens in zip(query.findings, query.tokens, strict=True):
            ids = sd.tokenizers[0](query.text)["input_ids"]
            word = sd.tokenizers[0].decode([ids[t] for t in tokens])
            assert word.strip() in WORDS[WORDS_OF[finding]]
    limited = queries(dataset, sd, CONFIG.model_copy(update=dict(localization_images=1)))
    assert [query.image for query in limited] == [0]


WORDS_OF = list(WORDS)


def test_phrase_mode_has_a_text_for_each_pair(sd: Model) -> None:
    dataset = Listed(
        [
            sample("a", "Nothing is said.", ("edema", "wet lungs"), ("pleural effusion", "a small effusion")),
            sample("b", "Nothing is said.", ("edema", None)),
        ],
        WORDS,
    )
    with pytest.raises(UserError, match="no held-out image has a region of a finding that its text names"):
        queries(dataset, sd, CONFIG)
    found = queries(dataset, sd, CONFIG.model_copy(update=dict(localization_text="phrase")))
    assert [(q.image, q.text, q.findings) for q in found] == [
        (0, "wet lungs", (0,)),
        (0, "a small effusion", (1,)),
        (1, "edema", (0,)),
    ]
    words = (token_groups(sd.tokenizers[0], "wet lungs", 77) == WORD).nonzero().flatten().tolist()
    assert found[0].tokens == (tuple(words),), "a phrase without the finding's word counts by all its words"
    assert len(found[1].tokens[0]) < len((found[1].groups == WORD).nonzero())
    assert (
        len(queries(dataset, sd, CONFIG.model_copy(update=dict(localization_text="phrase", localization_images=1))))
        == 2
    )


@given(
    words=st.integers(1, 60),
    pairs=st.lists(st.sets(st.integers(1, 60), min_size=1, max_size=5), min_size=1, max_size=3),
    spare=st.integers(0, 2),
)
@settings(max_examples=30)
def test_selection_sums_groups_and_averages_words(words: int, pairs: list[set[int]], spare: int) -> None:
    groups = torch.tensor([BOS] + [WORD] * words + [EOS] + [PADDING] * (75 - words))
    tokens = tuple(tuple(sorted(pair)) for pair in pairs)
    matrix = selection(Query(0, "", tuple(range(len(pairs))), tokens, groups), 4 + len(pairs) + spare)
    assert matrix.shape == (77, 4 + len(pairs) + spare) and matrix.dtype == torch.float32
    assert matrix[:, :4].sum(dim=0).tolist() == [1, words, 1, 75 - words]
    assert (matrix[:, :4].sum(dim=1) == 1).all(), "every token is in one group"
    torch.testing.assert_close(matrix[:, 4 : 4 + len(pairs)].sum(dim=0), torch.ones(len(pairs)))
    assert (matrix[:, 4 + len(pairs) :] == 0).all()
    for column, own in enumerate(tokens, start=4):
        assert matrix[:, column].nonzero().flatten().tolist() == list(own)


# --- attention that is known ----------------------------------------------------------------------------------------


def force_attention(monkeypatch: pytest.MonkeyPatch, mask: torch.Tensor, inside: list[int], outside: int) -> None:
    """Every layer looks at tokens `inside` within the mask and at token `outside` elsewhere."""
    reduced = AttentionMaps.reduced

    def forced(self: AttentionMaps, probabilities: torch.Tensor) -> torch.Tensor:
        side = math.isqrt(probabilities.shape[2])
        share = F.adaptive_avg_pool2d(mask[None].float(), side).flatten()[:, None]
        known = torch.zeros_like(probabilities)
        known[..., inside] = share / len(inside)
        known[..., outside] = 1 - share[:, 0]
        return reduced(self, known)

    monkeypatch.setattr(AttentionMaps, "reduced", forced)


def test_attention_within_the_mask_scores_one_through_the_whole_path(
    sd: Model, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask is on no diagonal and no axis of symmetry: a map turned, mirrored or shifted would score low."""
    dataset = Listed([sample("a", "Small effusion.", ("pleural effusion", None), size=128)], WORDS)
    (query,) = queries(dataset, sd, CONFIG)
    eos = int((query.groups == EOS).nonzero())
    mask = dataset[0].regions[0].mask
    force_attention(monkeypatch, mask, list(query.tokens[0]), eos)
    result = localization(sd, dataset, CONFIG, accelerator=accelerator, arm_dir=tmp_path, examples=[0])
    word, end = result["word"], result["eos"]
    assert word["auc"] > 0.98 and word["top1"] == 1 and word["iou"] > 0.5 and word["cnr"] > 1
    assert word["per_finding"].keys() == {"pleural effusion"}
    assert end["auc"] < 0.02 and end["top1"] == 0 and end["cnr"] < 0
    share = float(mask.float().mean())
    assert result["mass"] == pytest.approx({"bos": 0, "words": share, "eos": 1 - share, "padding": 0}, abs=1e-5)
    saved = load_file(tmp_path / "maps.safetensors")["a/pleural effusion"]
    assert (saved.min(), saved.max()) == (0, 1)
    assert saved.argmax() in mask.view(16, 8, 16, 8).any(dim=3).any(dim=1).flatten().nonzero()


def test_a_map_equal_to_the_mask_is_perfect(
    sd: Model, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Listed([sample(n, "Edema.", ("edema", None)) for n in "ab"], WORDS)

    def perfect(inputs: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.stack([dataset[i].regions[0].mask for i in inputs.images])[:, None].float()
        return torch.cat([1 - mask, mask, mask, 1 - mask, mask], dim=1) / 2, torch.full((len(mask), 4), 0.25)

    monkeypatch.setitem(PROTOCOLS, "ours", replace(PROTOCOLS["ours"], maps=perfect))
    result = localization(sd, dataset, CONFIG, accelerator=accelerator, arm_dir=tmp_path)
    for name in ("word", "eos"):
        assert (result[name]["auc"], result[name]["top1"], result[name]["iou"]) == (1, 1, 1)
        assert (result[name]["images"], result[name]["pairs"]) == (2, 2)
        assert result[name]["auc_ci"] == [1, 1]
    assert (result["padding"]["auc"], result["padding"]["top1"], result["padding"]["iou"]) == (0, 0, 0)
    assert not (tmp_path / "maps.safetensors").exists(), "no example was asked for"


def test_attention_that_is_everywhere_the_same_is_chance(
    sd: Model, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Listed([sample("a", "Edema.", ("edema", None))], WORDS)
    force_attention(monkeypatch, torch.zeros(64, 64), [1], 0)
    result = localization(sd, dataset, CONFIG, accelerator=accelerator, arm_dir=tmp_path)
    assert result["word"]["auc"] == result["padding"]["auc"] == 0.5
    assert result["mass"] == pytest.approx({"bos": 1, "words": 0, "eos": 0, "padding": 0})
    assert json.loads(json.dumps(finite(result), allow_nan=False))["word"]["images"] == 1


# --- protocols ------------------------------------------------------------------------------------------------------


def with_original(dataset: Listed, size: tuple[int, int]) -> Listed:
    dataset.samples = [replace(s, original_size=size) for s in dataset.samples]
    return dataset


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
@pytest.mark.parametrize("protocol", ["dombrowski", "vilouras"])
def test_the_published_protocols_run_on_every_architecture(
    loaded: dict[str, Model], accelerator: Accelerator, tmp_path: Path, protocol: Any, kind: str
) -> None:
    dataset = Listed(
        [sample("a", "Edema.", ("edema", None)), sample("b", "Wet lungs.", ("pleural effusion", None))], WORDS
    )
    config = CONFIG.model_copy(update=dict(protocol=protocol, timesteps=None))
    result = localization(
        loaded[kind], with_original(dataset, (96, 128)), config, accelerator=accelerator, arm_dir=tmp_path
    )
    assert result["protocol"] == protocol and result["word"]["pairs"] == 2, (
        "an unnamed finding is asked for by all words"
    )
    assert 0 <= result["word"]["auc"] <= 1 and math.isfinite(result["word"]["cnr"])
    assert sum(result["mass"].values()) == pytest.approx(1, abs=1e-3)
    if protocol == "dombrowski":
        assert result["word"]["average"] == "micro" and result["word"].keys() >= {"two_class_iou", "box_iou"}
        assert result["word"]["auc"] == result["word"]["micro"]["auc"]
    else:
        assert result["word"]["average"] == "macro" and result["word"]["top1"] is None
        assert result["word"]["cnr"] >= 0 and 0 <= result["word"]["mean_iou"] <= 1


@torch.no_grad()
def test_dombrowski_is_the_mean_of_the_last_forty_steps_over_layers_and_heads(sd: Model) -> None:
    """A loop over steps, layers, heads and tokens, with the stock functions of diffusers and torch only."""
    dataset = Listed([sample("a", "Small effusion and effusion.", ("pleural effusion", None))], WORDS)
    config = CONFIG.model_copy(update=dict(protocol="dombrowski"))
    (query,) = queries(dataset, sd, config)
    inputs = prepare_inputs(sd, [dataset[0]], [query], torch.device("cpu"))
    with record_attention(sd.denoiser) as maps:
        maps.reduce = inputs.reduce
        found = PROTOCOLS["dombrowski"].maps(inputs, config, Recorder(maps))[0][0, 4]
    scheduler = DDIMScheduler.from_config(sd.noise_scheduler.config)
    scheduler.set_timesteps(50)
    noise = torch.randn((40, *inputs.latents.shape[1:]), generator=torch.Generator().manual_seed(config.seed))
    total, count = torch.zeros(64, 64), 0
    for step, timestep in enumerate(scheduler.timesteps[10:]):
        alpha = sd.noise_scheduler.alphas_cumprod[timestep]
        noisy = alpha.sqrt() * inputs.latents + (1 - alpha).sqrt() * noise[step]
        with record_attention(sd.denoiser, reduce=lambda p: p) as every:
            sd.denoiser(noisy, timestep, inputs.conditions.embeds)
        for name, probabilities in every.by_layer.items():
            for head in probabilities[0]:
                for token in query.tokens[0]:
                    image = head[:, token].view(1, 1, *every.sizes[name])
                    total += F.interpolate(image, (64, 64), mode="nearest")[0, 0] / len(query.tokens[0])
            count += probabilities.shape[1]
    assert len(query.tokens[0]) >= 2
    torch.testing.assert_close(found, total / count, rtol=1e-4, atol=1e-6)


def test_vilouras_compares_at_the_size_of_the_square_in_the_file(sd: Model) -> None:
    dataset = with_original(Listed([sample("a", "Edema.", ("edema", None))], WORDS), (96, 128))
    config = CONFIG.model_copy(update=dict(protocol="vilouras"))
    (query,) = queries(dataset, sd, config)
    for square_px, size in ((0, 96), (96, 96), (128, 128)):
        shown = replace(dataset[0], square_px=square_px)
        assert ground_truths(query, shown, ["edema"], config)[0].shape == (1, size, size)


def test_the_layers_of_vilouras_are_those_of_sd_or_at_the_same_depth() -> None:
    sixteen = [str(i) for i in range(16)]
    assert vilouras_layers(sixteen) == ["3", "4", "6", "7"]
    assert vilouras_layers(sixteen[:7]) == ["1", "2", "3"]
    assert vilouras_layers([str(i) for i in range(70)]) == ["3", "4", "6", "7"]
    assert vilouras_layers(["0"]) == ["0"]


@given(
    x=st.floats(0, 60), y=st.floats(0, 60), width=st.floats(1, 64), height=st.floats(1, 64), size=st.integers(8, 200)
)
@settings(max_examples=50)
def test_the_union_of_boxes_holds_the_pixels_whose_centre_is_in_a_box(
    x: float, y: float, width: float, height: float, size: int
) -> None:
    region = Region("f", torch.zeros(64, 64, dtype=torch.bool), ((x, y, width, height), (0.0, 0.0, 4.0, 8.0)))
    mask, boxes = ground_truth(region, 64, size, "boxes")
    centres = (torch.arange(size).double() + 0.5) * 64 / size
    expected = torch.zeros(size, size, dtype=torch.bool)
    for left, top, w, h in region.boxes:
        columns, rows = (centres >= left) & (centres < left + w), (centres >= top) & (centres < top + h)
        expected |= rows[:, None] & columns[None]
    # A centre that lies on an edge may go either way by a rounding error.
    assert (mask ^ expected).sum() <= 2 * size
    on_edge = min((centres - edge).abs().min() for edge in (x, y, x + width, y + height)) < 1e-9
    assert on_edge or torch.equal(mask, expected)
    assert boxes[0] == pytest.approx(tuple(v * size / 64 for v in region.boxes[0]))


def test_masks_are_kept_where_there_are_no_boxes_or_masks_are_asked_for() -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[10:20, 30:50] = True
    assert torch.equal(ground_truth(Region("f", mask), 64, 64, "boxes")[0], mask)
    assert torch.equal(ground_truth(Region("f", mask, ((0, 0, 4, 4),)), 64, 64, "mask")[0], mask)
    doubled = ground_truth(Region("f", mask), 64, 128, "mask")[0]
    assert (doubled ^ mask.repeat_interleave(2, 0).repeat_interleave(2, 1)).sum() <= 120, "it differs at the edge only"


def test_the_models_own_subset_is_used_unless_the_configuration_says_otherwise(sd: Model) -> None:
    layers = attention_layers(sd.denoiser)
    model = replace(sd, subset=AttentionSubset((layers[1],), (333,)))
    plain = FullEvaluation()
    assert (with_subset(plain, sd).layers, with_subset(plain, sd).timesteps) == ((), DEFAULT_TIMESTEPS)
    assert (with_subset(plain, model).layers, with_subset(plain, model).timesteps) == ((layers[1],), (333,))
    assert with_subset(plain.model_copy(update=dict(timesteps=(5,))), model).layers == ()
    assert with_subset(plain.model_copy(update=dict(layers=("mid_block",))), model).timesteps == DEFAULT_TIMESTEPS


@torch.no_grad()
def test_maps_are_refined_by_self_attention(sd: Model, phantoms: PhantomDataset) -> None:
    query = queries(phantoms, sd, CONFIG)[0]
    config = CONFIG.model_copy(update=dict(self_attention_power=1))
    inputs = prepare_inputs(sd, [phantoms[query.image]], [query], torch.device("cpu"))

    def made(config: FullEvaluation) -> torch.Tensor:
        with ExitStack() as stack:
            recorder = open_recorder(stack, sd, attention_layers(sd.denoiser), config)
            recorder.cross.reduce = inputs.reduce
            return ours(inputs, config, recorder)[0]

    plain, refined = made(CONFIG), made(config)
    assert refined.shape == plain.shape
    # Rows of self-attention sum to 1: each new value is a mean of old ones.
    assert refined[0, 4].max() <= plain[0, 4].max() + 1e-6 and refined[0, 4].min() >= plain[0, 4].min() - 1e-6
    assert refined[0, 4].std() < plain[0, 4].std() and not torch.allclose(refined, plain)
    torch.testing.assert_close(refined[:, :4].sum(dim=1), torch.ones_like(refined[:, 0]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_scaled_layers_weigh_alike(sd: Model, phantoms: PhantomDataset) -> None:
    """min_max: the mean of the scaled maps of each layer and timestep. The mass stays that of the probabilities."""
    query = queries(phantoms, sd, CONFIG)[0]
    inputs = prepare_inputs(sd, [phantoms[query.image]], [query], torch.device("cpu"))

    def made(**options: object) -> tuple[torch.Tensor, torch.Tensor]:
        config = CONFIG.model_copy(update=options)
        with ExitStack() as stack:
            recorder = open_recorder(stack, sd, attention_layers(sd.denoiser, options.get("layers", ())), config)
            recorder.cross.reduce = inputs.reduce
            return ours(inputs, config, recorder)

    (plain, mass), (scaled, same_mass) = made(), made(layer_scaling="min_max")
    assert torch.equal(mass, same_mass) and not torch.allclose(normalize(plain), normalize(scaled))
    each = []
    for layer in attention_layers(sd.denoiser):
        for timestep in range(len(CONFIG.timesteps or ())):
            # The noise of a timestep depends on its place, so that others are run and left out.
            with ExitStack() as stack:
                recorder = open_recorder(stack, sd, [layer], CONFIG)
                recorder.cross.reduce = inputs.reduce
                found = list(inputs.renoised(CONFIG.timesteps, CONFIG.seed, recorder.cross))[timestep]
            each.append(normalize(to_image(found[layer], recorder.cross.sizes[layer], inputs.size)))
    torch.testing.assert_close(scaled, torch.stack(each).mean(dim=0), atol=1e-5, rtol=0)


def test_post_processing_keeps_the_largest_bright_part() -> None:
    maps = torch.zeros(1, 20, 20)
    maps[0, 2:9, 2:9] = 1.0
    maps[0, 15, 15] = 0.9
    maps += 0.01 * torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(0))
    for threshold in ("otsu", "mixture"):
        config = CONFIG.model_copy(update=dict(map_threshold=threshold, orphan_share=0.1))
        kept = post_process(maps, config)
        assert torch.equal(kept[0, 2:9, 2:9], maps[0, 2:9, 2:9]) and (kept > 0).sum() == 49
    # Otsu's threshold is the centre of a bin, so that some of the background's highest pixels pass it.
    assert 50 <= (post_process(maps, CONFIG.model_copy(update=dict(map_threshold="otsu"))) > 0).sum() <= 60
    assert torch.equal(post_process(maps, CONFIG), maps)
    assert post_process(maps, CONFIG.model_copy(update=dict(smoothing_sigma=2.0))).max() < 1


# --- a kill, and several processes ----------------------------------------------------------------------------------


def test_a_run_that_was_killed_continues_and_gives_the_same(
    sd: Model, phantoms: PhantomDataset, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update=dict(batch_size=1))
    whole = localization(sd, phantoms, config, accelerator=accelerator, arm_dir=tmp_path / "whole")
    calls = []

    def dies(inputs: Any, *rest: Any) -> Any:
        calls.append(inputs.images)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ours(inputs, *rest)

    monkeypatch.setitem(PROTOCOLS, "ours", replace(PROTOCOLS["ours"], maps=dies))
    with pytest.raises(KeyboardInterrupt):
        localization(sd, phantoms, config, accelerator=accelerator, arm_dir=tmp_path / "cut")
    part = tmp_path / "cut/scored.0.jsonl"
    part.write_text(part.read_text()[:-7], encoding="utf-8")  # the kill came in the middle of a line
    again = localization(sd, phantoms, config, accelerator=accelerator, arm_dir=tmp_path / "cut")
    asked = [query.image for query in queries(phantoms, sd, config)]
    assert [i for (i,) in calls] == [*asked[:3], *asked[1:]], "the first is done, the second was cut off"
    assert_close(again, whole, 0)
    calls.clear()
    assert_close(localization(sd, phantoms, config, accelerator=accelerator, arm_dir=tmp_path / "cut"), whole, 0)
    assert calls == [] and sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["pairs.jsonl", "scored.jsonl"]
    other = config.model_copy(update=dict(seed=7))
    localization(
        sd, phantoms, other.model_copy(update=dict(batch_size=8)), accelerator=accelerator, arm_dir=tmp_path / "cut"
    )
    assert sum(len(images) for images in calls) == len(asked), "another configuration starts anew"


def test_scores_of_another_ground_truth_are_not_taken_over(sd: Model, accelerator: Accelerator, tmp_path: Path) -> None:
    """The same images and captions, and the region elsewhere."""
    dataset = Listed([sample("a", "Edema.", ("edema", None))], WORDS)
    before = localization(sd, dataset, CONFIG, accelerator=accelerator, arm_dir=tmp_path)
    (region,) = dataset.samples[0].regions
    dataset.samples = [replace(dataset.samples[0], regions=(replace(region, mask=region.mask.flip(0)),))]
    after = localization(sd, dataset, CONFIG, accelerator=accelerator, arm_dir=tmp_path)
    assert after["word"]["auc"] != before["word"]["auc"]
    fresh = localization(sd, dataset, CONFIG, accelerator=accelerator, arm_dir=tmp_path / "fresh")
    assert_close(after, fresh, 0)


def test_scores_of_another_model_are_not_taken_over(sd: Model, accelerator: Accelerator, tmp_path: Path) -> None:
    dataset = Listed([sample("a", "Edema.", ("edema", None))], WORDS)
    before = localization(sd, dataset, CONFIG, accelerator=accelerator, arm_dir=tmp_path)
    other = model_of(tiny_sd(seed=1)).freeze()
    after = localization(other, dataset, CONFIG, accelerator=accelerator, arm_dir=tmp_path)
    assert after["word"]["auc"] != before["word"]["auc"]
    assert_close(after, localization(other, dataset, CONFIG, accelerator=accelerator, arm_dir=tmp_path / "fresh"), 0)


def test_a_caption_of_which_a_kill_left_one_finding_is_scored_again(
    sd: Model, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = ("edema", None), ("pleural effusion", None)
    dataset = Listed([sample(name, f"Edema and effusion, {name}.", *findings) for name in "abc"], WORDS)
    config = CONFIG.model_copy(update=dict(batch_size=1))
    whole = localization(sd, dataset, config, accelerator=accelerator, arm_dir=tmp_path / "whole")
    calls = []

    def dies(inputs: Any, *rest: Any) -> Any:
        calls.append(inputs.images)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ours(inputs, *rest)

    monkeypatch.setitem(PROTOCOLS, "ours", replace(PROTOCOLS["ours"], maps=dies))
    with pytest.raises(KeyboardInterrupt):
        localization(sd, dataset, config, accelerator=accelerator, arm_dir=tmp_path)
    part = tmp_path / "scored.0.jsonl"
    part.write_text("".join(part.read_text().splitlines(keepends=True)[:-1]), encoding="utf-8")
    again = localization(sd, dataset, config, accelerator=accelerator, arm_dir=tmp_path)
    assert [image for (image,) in calls] == [0, 1, 2, 1, 2]
    assert_close(again, whole, 0)


def test_means_and_intervals_are_over_images_and_findings(
    sd: Model, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two samples of each of three images; edema in all, effusion in one image."""
    findings = ("edema", None), ("pleural effusion", None)
    dataset = Listed([sample(n, f"Edema and effusion, {n}.", *findings[: 1 + (n in "ab")]) for n in "abcdef"], WORDS)
    monkeypatch.setattr(dataset, "image_key", lambda index: f"image {index // 2}", raising=False)
    config = CONFIG.model_copy(update=dict(localization_images=6, bootstrap_samples=50))
    averages: tuple[Literal["macro", "micro"], ...] = ("macro", "micro")
    for average in averages:
        monkeypatch.setitem(
            PROTOCOLS, "ours", replace(PROTOCOLS["ours"], metrics=lambda _, a=average: {"auc": PixelAUROC(a)})
        )
        found = localization(sd, dataset, config, accelerator=accelerator, arm_dir=tmp_path / average)["word"]
        lines = (tmp_path / average / "pairs.jsonl").read_text().splitlines()[1:]
        rows = [json.loads(line) for line in lines]
        values, groups, images = (
            np.array([get(row) for row in rows])
            for get in (lambda r: r["scores"]["word"]["auc"], lambda r: r["finding"], lambda r: r["cluster"])
        )
        assert set(images) == {"image 0", "image 1", "image 2"} and (found["images"], found["pairs"]) == (3, len(rows))
        macro = np.mean([values[groups == finding].mean() for finding in set(groups)])
        assert (found["micro"]["auc"], found["macro"]["auc"]) == pytest.approx((values.mean(), macro), abs=1e-6)
        assert found["average"] == average and found["auc"] == pytest.approx(found[average]["auc"], abs=1e-6)
        over = groups if average == "macro" else np.zeros_like(groups)
        expected = macro_mean_interval(values, over, images, 50, config.seed)
        assert found["auc_ci"] == pytest.approx(expected, abs=1e-6)
        for index, name in enumerate(dataset.findings):
            own = groups == index
            expected = macro_mean_interval(values[own], groups[own], images[own], 50, config.seed)
            of_one_image = name == "pleural effusion"
            assert found["per_finding"][name]["auc"] == pytest.approx(values[own].mean(), abs=1e-6)
            assert (expected is None) == of_one_image and own.sum() == (2 if of_one_image else 6)
            assert found["per_finding"][name]["auc_ci"] == (None if of_one_image else pytest.approx(expected, abs=1e-6))

    # Two images of one patient, whose images are drawn together.
    monkeypatch.setattr(dataset, "patient", lambda index: "pq"[index // 4], raising=False)
    known = localization(sd, dataset, config, accelerator=accelerator, arm_dir=tmp_path / average)["word"]
    patients = ["pq"[row["image"] // 4] for row in rows]
    assert known["auc_ci"] == pytest.approx(macro_mean_interval(values, over, patients, 50, config.seed), abs=1e-6)
    adds = [json.loads(line) for line in (tmp_path / average / "pairs.jsonl").read_text().splitlines()[1:]]
    assert {row["group"] for row in adds} == {"patient p", "patient q"} and known["images"] == 3
    some = [(row["image_adds"]["word"], p) for row, p in zip(adds, patients, strict=True)]
    measured, drawn = zip(*((value, p) for value, p in some if value is not None), strict=True)
    expected = macro_mean_interval(measured, np.zeros(len(drawn)), drawn, 50, config.seed)
    assert known["image_adds_ci"] == (expected if expected is None else pytest.approx(expected, abs=1e-6))


def _rank(rank: int, base: str, folder: str) -> None:
    model = load_model(BaseConfig(name=base)).freeze()
    dataset = PhantomDataset("test", 8, 0, 64)
    config = CONFIG.model_copy(update=dict(localization_images=7, batch_size=2))
    scored = []

    def counted(inputs: Any, *rest: Any) -> Any:
        scored.extend(inputs.images)
        return ours(inputs, *rest)

    PROTOCOLS["ours"] = replace(PROTOCOLS["ours"], maps=counted)
    result = localization(model, dataset, config, accelerator=Accelerator(cpu=True), arm_dir=Path(folder))
    found = {"result": finite(result), "scored": scored}
    (Path(folder) / f"result-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def test_two_processes_give_the_metrics_of_one(
    sd: Model, phantoms: PhantomDataset, accelerator: Accelerator, tmp_path: Path
) -> None:
    base = save_tiny(tmp_path / "base", "sd")
    (tmp_path / "two").mkdir()
    in_two_processes(_rank, str(base), str(tmp_path / "two"))
    config = CONFIG.model_copy(update=dict(localization_images=7, batch_size=2))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two have: another number of threads sums in another order
    try:
        one = localization(
            load_model(BaseConfig(name=str(base))).freeze(), phantoms, config, accelerator=accelerator,
            arm_dir=tmp_path / "one", examples=[],
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    two = [json.loads((tmp_path / f"two/result-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    for found in two:
        assert_close(found["result"], json.loads(json.dumps(finite(one))), 1e-5)
    asked = [query.image for query in queries(phantoms, sd, config)]
    assert [found["scored"] for found in two] == [asked[::2], asked[1::2]], "each scores its share"
    rows = [
        [json.loads(line) for line in (tmp_path / name / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("one", "two")
    ]
    assert len(rows[0]) == 1 + one["word"]["pairs"]
    assert_close(rows[0], rows[1], 1e-5)


def test_maps_of_another_key_are_not_read(tmp_path: Path) -> None:
    tensors = {"a/edema": torch.ones(2, 2)}
    save_file(tensors, tmp_path / "maps.safetensors", {"key": "one"})
    found = _read_maps(tmp_path / "maps.safetensors", "one")
    assert list(found) == ["a/edema"] and torch.equal(found["a/edema"], tensors["a/edema"])
    assert _read_maps(tmp_path / "maps.safetensors", "two") == {}
    (tmp_path / "torn.safetensors").write_bytes(b"no tensors")
    assert _read_maps(tmp_path / "torn.safetensors", "one") == {}

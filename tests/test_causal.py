"""Causal maps: 0 where words do nothing, at the place where they act, and only of the tokens that carry them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from listed import WORDS, Listed, sample
from sklearn.metrics import roc_auc_score

from distill.attention.heat_maps import normalize
from distill.attention.recording import attention_layers, record_attention
from distill.config import FullEvaluation
from distill.evaluation.causal import CAUSAL, causal_maps
from distill.evaluation.localization import localization
from distill.evaluation.protocols import open_recorder, prepare_inputs, queries
from distill.evaluation.seeds import combine
from distill.models.family import Conditions, Model
from distill.report import validate_metrics
from distill.tokens import EOS, PADDING

CONFIG = FullEvaluation(localization_images=4, timesteps=(100, 600), batch_size=4, bootstrap_samples=20, causal=True)
BOTH = ("Edema, small effusions.", ("edema", None), ("pleural effusion", None))


def dataset() -> Listed:
    return Listed([sample("a", "Small effusion.", ("pleural effusion", None)), sample("b", *BOTH)], WORDS)


def maps_of(model: Model, data: Listed, config: FullEvaluation = CONFIG, **changes: Any) -> list[torch.Tensor]:
    batch = [replace(query, **changes) for query in queries(data, model, config)]
    inputs = prepare_inputs(model, [data[q.image] for q in batch], batch, torch.device("cpu"))
    with ExitStack() as stack:
        recorder = open_recorder(stack, model, attention_layers(model.denoiser), config)
        recorder.cross.reduce = inputs.reduce
        return causal_maps(inputs, batch, config, recorder.cross)


def acts(monkeypatch: pytest.MonkeyPatch, model: Model, place: torch.Tensor, tokens: Any) -> None:
    """The prediction is 0, and inside `place` (latent size) the sum of the states of `tokens` (a slice or list)."""
    predict = type(model.family).predict

    def predicted(self: Any, denoiser: Any, noisy: torch.Tensor, steps: torch.Tensor, conditions: Conditions) -> Any:
        predict(self, denoiser, noisy, steps, conditions)  # whose attention is recorded
        states = conditions.embeds[:, tokens].square().sum(dim=(1, 2))
        return place * states[:, None, None, None].expand(-1, *noisy.shape[1:])

    monkeypatch.setattr(type(model.family), "predict", predicted)


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_there_is_a_map_of_each_pair_whatever_else_is_in_the_batch(loaded: dict[str, Model], kind: str) -> None:
    data = dataset()
    found = maps_of(loaded[kind], data)
    side = 64 // loaded[kind].vae_factor
    assert [own.shape for own in found] == [(1, 2, side, side), (2, 2, side, side)]
    assert all(float(one.std()) > 0 and float(one.min()) >= 0 for own in found for one in own.flatten(0, 1))
    assert not torch.allclose(found[1][0], found[1][1]), "each finding has its own"
    assert not torch.allclose(found[1][:, 0], found[1][:, 1]), "so has each way"
    alone = maps_of(loaded[kind], data, CONFIG.model_copy(update=dict(batch_size=1)))
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_words_that_the_denoiser_does_not_read_have_maps_that_are_exactly_zero(
    sd: Model, accelerator: Accelerator, tmp_path: Path
) -> None:
    layers = [sd.denoiser.get_submodule(name).to_v.weight for name in attention_layers(sd.denoiser)]
    before = [weight.clone() for weight in layers]
    try:
        for weight in layers:
            weight.data.zero_()
        assert all(own.eq(0).all() for own in maps_of(sd, dataset()))
        found = localization(sd, dataset(), CONFIG, accelerator=accelerator, arm_dir=tmp_path)
    finally:
        for weight, value in zip(layers, before, strict=True):
            weight.data.copy_(value)
    for name in CAUSAL:
        assert found[name]["auc"] == 0.5 and found[name]["image_adds"] == 0 and found[name]["pairs"] == 3


def test_a_word_that_acts_within_the_mask_scores_one(
    sd: Model, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Listed([sample("a", "Small effusion.", ("pleural effusion", None), size=128)], WORDS)
    (query,) = queries(data, sd, CONFIG)
    mask = data[0].regions[0].mask
    place = F.adaptive_avg_pool2d(mask[None].float(), 128 // sd.vae_factor)[0]
    acts(monkeypatch, sd, place, list(query.tokens[0]))
    found = localization(sd, data, CONFIG, accelerator=accelerator, arm_dir=tmp_path)
    for name in CAUSAL:
        assert found[name]["auc"] > 0.98 and found[name]["top1"] == 1, "on no axis of symmetry"
    acts(monkeypatch, sd, 1 - place, list(query.tokens[0]))
    found = localization(sd, data, CONFIG, accelerator=accelerator, arm_dir=tmp_path / "outside")
    assert found["causal_encoder"]["auc"] < 0.02


def test_what_moved_to_other_tokens_is_seen_in_the_encoder_only(sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser reads the end-of-text token alone, which a causal text encoder tells of the words before it."""
    data = dataset()
    query = queries(data, sd, CONFIG)[0]
    acts(monkeypatch, sd, torch.ones(1), (query.groups == EOS).nonzero().flatten().tolist())
    encoder, denoiser = maps_of(sd, Listed(data.samples[:1], WORDS))[0][0]
    assert denoiser.eq(0).all() and encoder.gt(0).all()


def test_padding_in_place_of_padding_changes_nothing_in_the_text(sd: Model) -> None:
    data = Listed(dataset().samples[:1], WORDS)
    padding = (queries(data, sd, CONFIG)[0].groups == PADDING).nonzero().flatten().tolist()
    encoder, denoiser = maps_of(sd, data, tokens=(tuple(padding),))[0][0]
    assert encoder.eq(0).all(), "the texts are equal"
    assert denoiser.gt(0).any(), "the padding of this text has read it, clean padding has not"


def test_if_no_token_reads_another_both_ways_are_the_same(sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(50_000, sd.text_encoders[0].config.hidden_size, generator=torch.Generator().manual_seed(0))
    place = torch.arange(sd.max_tokens)[:, None]
    monkeypatch.setattr(
        type(sd.family), "encode_text", lambda self, encoders, ids: (table[ids[0]] + torch.sin(place * 0.1), None)
    )
    for own in maps_of(sd, dataset()):
        assert torch.equal(own[:, 0], own[:, 1]) and own.gt(0).any()


def test_it_is_the_difference_that_a_loop_gives(sd: Model) -> None:
    data = Listed(dataset().samples[1:], WORDS)
    (query,) = queries(data, sd, CONFIG)
    inputs = prepare_inputs(sd, [data[0]], [query], torch.device("cpu"))
    noise = inputs.noise(2, CONFIG.seed)[:, :, :]
    ids = sd.tokenize([query.text])
    pad = sd.tokenizers[0].pad_token_id
    empty = ids[0].clone()
    empty[:, 1:] = pad
    for pair, tokens in enumerate(query.tokens):
        without, states = ids[0].clone(), sd.encode(ids)[0].clone()
        for token in tokens:
            without[0, token] = pad
            states[0, token] = sd.encode([empty])[0][0, token]
        for way, embeds in enumerate((sd.encode([without])[0], states)):
            total = torch.zeros(inputs.size)
            for place, timestep in enumerate((100, 600)):
                noisy = sd.family.add_noise(sd, inputs.latents, noise[:, place], torch.tensor([timestep]))
                one, other = (
                    sd.family.predict(sd.denoiser, noisy, torch.tensor([timestep]), Conditions(e))
                    for e in (sd.encode(ids)[0], embeds)
                )
                total += (one - other).abs().mean(dim=1)[0] / 2
            torch.testing.assert_close(maps_of(sd, data)[0][pair, way], total, rtol=1e-3, atol=1e-5)


def test_entries_stand_beside_those_of_attention_which_stay_the_same(
    sd: Model, accelerator: Accelerator, tmp_path: Path
) -> None:
    data = dataset()
    plain = localization(
        sd, data, CONFIG.model_copy(update=dict(causal=False)), accelerator=accelerator, arm_dir=tmp_path / "plain"
    )
    found = localization(sd, data, CONFIG, accelerator=accelerator, arm_dir=tmp_path / "arm")
    assert {key: value for key, value in found.items() if key not in CAUSAL} == plain
    rows = [json.loads(line) for line in (tmp_path / "arm/pairs.jsonl").read_text().splitlines()[1:]]
    maps = torch.cat(maps_of(sd, data))
    masks = [region.mask for one in data.samples for region in one.regions]
    for place, name in enumerate(CAUSAL):
        full = F.interpolate(normalize(maps[:, place])[None], (64, 64), mode="bilinear", align_corners=False)[0]
        areas = [
            roc_auc_score(mask.flatten().numpy(), one.flatten().numpy()) for mask, one in zip(masks, full, strict=True)
        ]
        assert [row["scores"][name]["auc"] for row in rows] == pytest.approx(areas, abs=1e-4)
        assert found[name].keys() == found["word"].keys() and found[name]["pairs"] == 3
    assert localization(sd, data, CONFIG, accelerator=accelerator, arm_dir=tmp_path / "arm") == found, "from the files"


def test_seeds_and_report_read_them(sd: Model, accelerator: Accelerator, tmp_path: Path) -> None:
    located = {}
    cost = dict.fromkeys(("train_seconds", "steps", "peak_memory_gb", "evaluation_seconds", "trainable_parameters"))
    for seed in (0, 1):
        run = tmp_path / f"seed-{seed}"
        for arm, config in (("a", CONFIG), ("b", CONFIG.model_copy(update=dict(seed=seed)))):
            located[arm] = localization(sd, dataset(), config, accelerator=accelerator, arm_dir=run / arm)
        arms = {arm: {"localization": one, "quality": None, "cost": cost} for arm, one in located.items()}
        origin = {"commit": "", "seeds": {"training": seed}, "seconds": {}, "config": {"seed": seed}}
        metrics = {"arms": arms, "real": {"quality": None}, "provenance": origin}
        validate_metrics(metrics)
        (run / "metrics.json").write_text(json.dumps(metrics))
    found = combine(tmp_path, samples=10)
    paired = found["paired"]["b - a"]
    assert {f"{name}.{key}" for name in CAUSAL for key in ("auc", "image_adds", "top1")} <= paired.keys()
    assert found["arms"]["a"]["per_seed"]["1"]["causal_encoder.auc"] == located["a"]["causal_encoder"]["auc"]


def test_a_paused_recorder_records_nothing_and_goes_on(sd: Model) -> None:
    latents, steps, conditions = sd.family.example_inputs(sd, 2, 8)
    with torch.no_grad(), record_attention(sd.denoiser) as recorder:
        whole = sd.family.predict(sd.denoiser, latents, steps, conditions)
        names = set(recorder.take())
        recorder.start()
        with recorder.paused():
            torch.testing.assert_close(sd.family.predict(sd.denoiser, latents, steps, conditions), whole)
        assert recorder.by_layer == {} and recorder.passes == 0
        sd.family.predict(sd.denoiser, latents, steps, conditions)
        assert set(recorder.take()) == names


@pytest.mark.parametrize("change", [{"protocol": "dombrowski"}, {"self_attention_power": 1}])
def test_other_maps_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="causal is true, protocol"):
        FullEvaluation.model_validate({"causal": True, **change})

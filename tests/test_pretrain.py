"""The recipe that makes the bundled base: every stage for one step, and what it records of its own drawings."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from recipe import ROOT, config_class_of, recipe_module

from distill.cli import parse
from distill.config import BaseConfig, FullEvaluation, TrainerConfig
from distill.data.pictures import PicturesDataset
from distill.data.sample import Sample
from distill.errors import UserError
from distill.experiment import pretraining, pretraining_record
from distill.files import read_json
from distill.models.loading import PHANTOM_BASE, load_model

CONFIG = ["--config", str(ROOT / "recipes/configs/phantom/pretrain.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize("text_encoder", ["frozen", "full"])
def test_a_dry_run_takes_one_step_of_every_stage(text_encoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_module("pretrain_phantom")
    before = {path: path.stat().st_mtime_ns for path in PHANTOM_BASE.rglob("*")}
    argv = [*CONFIG, "--dry_run", "true", "--unet_text_encoder", text_encoder]
    recipe.pretrain(parse(config_class_of(recipe), argv))
    printed = capsys.readouterr().out
    trained = {
        name: int(n.replace(",", ""))
        for name, n in re.findall(r"^(\w+): [\d,]+ parameters, ([\d,]+) tr", printed, re.M)
    }
    assert (trained["unet"] > trained["unet_longer"]) == (text_encoder == "full")
    assert re.findall(r"^(\w+): [\d,]+ parameters, .* 1 steps", printed, re.M) == list(recipe.TRAINED)
    assert {path: path.stat().st_mtime_ns for path in PHANTOM_BASE.rglob("*")} == before


def test_the_latents_of_a_new_autoencoder_get_a_deviation_of_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the first 512 pictures; the autoencoder here takes every eighth pixel three times."""
    torch.manual_seed(0)
    pixels, seen, trained = torch.randn(600, 3, 16, 16), [], []

    def encode(self: AutoencoderKL, part: torch.Tensor) -> SimpleNamespace:
        assert not torch.is_grad_enabled(), "512 pictures with their gradients fill a small GPU"
        seen.append(len(part))
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=3 * part[..., ::8, ::8]))

    monkeypatch.setattr(AutoencoderKL, "encode", encode)
    monkeypatch.setattr(pretraining, "train", lambda objective, *rest: trained.append(objective))
    rows: Any = [{"pixel_values": row} for row in pixels]
    for count in (600, 40):
        seen.clear()
        pretraining.train_vae(rows[:count], TrainerConfig(), tmp_path / str(count), 0, resolution=16, kl_weight=1e-3)
        used = min(512, count)
        assert sum(seen) == used and max(seen) <= 32
        scale = AutoencoderKL.from_pretrained(tmp_path / str(count) / "vae").config.scaling_factor
        assert scale == pytest.approx(1 / float((3 * pixels[:used, :, ::8, ::8]).std()), abs=5.1e-5)
    assert [(objective.crop_px, objective.kl_weight) for objective in trained] == [(8, 1e-3)] * 2


def test_the_psnr_of_an_autoencoder_is_the_mean_over_images() -> None:
    """Half of the images come back darker by .2, half by .02: 20 and 40 dB of a range of 2."""

    class Dims:
        device = torch.device("cpu")

        def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels))

        def decode(self, pixels: torch.Tensor) -> SimpleNamespace:
            steps = torch.tensor([0.2, 0.02]).repeat(len(pixels) // 2).view(-1, 1, 1, 1)
            return SimpleNamespace(sample=pixels - steps)

    images: Any = [SimpleNamespace(pixel_values=torch.full((3, 4, 4), place / 400)) for place in range(220)]
    model: Any = SimpleNamespace(vae=Dims())
    assert pretraining_record.vae_psnr_db(model, images) == pytest.approx(30.0, abs=1e-3)


def test_recognition_counts_each_picture_for_its_own_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier is one that reads a picture's number; what is drawn are real pictures of others or of these
    captions."""
    pictures = PicturesDataset("test", 30, 0, 128, clear=True)
    kinds, shift = list(pictures.findings), 0

    def numbered(index: int) -> torch.Tensor:
        return torch.full((3, 2, 2), index / 100)

    class Numbered(PicturesDataset):
        def __getitem__(self, index: int) -> Sample:
            return replace(super().__getitem__(index), pixel_values=numbered(index) * 2 - 1)

    class Classifier:
        def float(self) -> Classifier:
            return self

        eval = float

        def __call__(self, pixels: torch.Tensor) -> SimpleNamespace:
            read = ((pixels[:, 0, 0, 0] + 1) / 2 * 100).round().long().tolist()
            logits = [[1.0 if kind in pictures.labels(i % 30) else -1.0 for kind in kinds] for i in read]
            return SimpleNamespace(logits=torch.tensor(logits))

    monkeypatch.setattr(pretraining_record, "RECOGNISED_PICTURES", 8)
    loader = pretraining_record.ResNetForImageClassification
    monkeypatch.setattr(loader, "from_pretrained", lambda _: Classifier())
    monkeypatch.setattr(
        pretraining_record,
        "generate",
        lambda _, captions, some, *rest: torch.stack([numbered(i + shift) for i in some]),
    )

    def found() -> dict[str, Any]:
        dataset = Numbered("test", 30, 0, 128, clear=True)
        model = load_model(BaseConfig(name="phantom"))
        return pretraining_record.recognition(model, dataset, FullEvaluation(batch_size=3), Path("."))

    right = found()
    assert right["images"] == 8 and right["one_object_images"] == 8
    assert all(right[key]["auc"] == 1 and right[key]["top1"] == 1 for key in ("real", "generated"))
    assert list(right["real"]["per_finding"]) == kinds
    shift = 1  # each drawing is that of the next caption
    wrong = found()
    assert wrong["real"] == right["real"] and wrong["generated"]["auc"] < 0.9 and wrong["generated"]["top1"] < 0.5


def test_a_stage_replaces_the_base_and_not_its_measurements(tmp_path: Path) -> None:
    base, work = tmp_path / "base", tmp_path / "work"
    shutil.copytree(PHANTOM_BASE, base)
    (work / "unet_clear").mkdir(parents=True)
    (work / "unet_clear" / "cost.json").write_text('{"steps": 7}')
    (work / "unet_clear" / "train_log.jsonl").write_text('{"step": 7, "loss": 0.5, "lr": 0.1, "seconds": 3}\n')
    stages = {name: cost for name, cost in pretraining.stages_of(base).items() if name != "unet_clear"}
    (base / "pretraining.json").write_text(json.dumps({"stages": stages}))
    encoder = base / "text_encoder" / "config.json"
    encoder.write_text(json.dumps(read_json(encoder) | {"dtype": "float16"}))  # as an earlier version wrote it
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        next(pipeline.unet.parameters()).add_(1.0)
    pretraining.save_base(pipeline, "unet_clear", work, base)
    read = StableDiffusionPipeline.from_pretrained(base)
    assert torch.equal(next(read.unet.parameters()), next(pipeline.unet.parameters()).half().float())
    assert next(read.text_encoder.parameters()).dtype == torch.float32
    assert pretraining.stages_of(base) == stages | {"unet_clear": {"steps": 7, "last": {"step": 7, "loss": 0.5}}}
    assert not {"localization.json", "samples.png"} & {path.name for path in base.iterdir()}
    assert pretraining.stages_of(tmp_path / "base.before") == stages
    os.replace(base, tmp_path / "base.partial")  # as a kill between the renames leaves it
    pretraining.finish_saving(base)
    assert "unet_clear" in pretraining.stages_of(base)


def test_stages_that_write_alone_refuse_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = recipe_module("pretrain_phantom")
    monkeypatch.setattr("distill.processes.process_state", lambda: SimpleNamespace(num_processes=2))
    config = config_class_of(recipe)(work_dir=str(tmp_path / "work"), output_dir=str(tmp_path / "base"))
    with pytest.raises(
        UserError, match="pictures, tokenizer, text_encoder, vae, classifier, .*for one process, and this"
    ):
        recipe.pretrain(config)
    with pytest.raises(UserError, match="dry_run: for one process"):
        recipe.pretrain(config.model_copy(update={"stages": ("unet_clear",), "dry_run": True}))
    assert not list(tmp_path.iterdir())


def test_the_base_in_the_repository_meets_its_card() -> None:
    """As recorded when it was made; recipes/pretrain_phantom.py --stages "[record]" measures it again."""
    recorded = read_json(PHANTOM_BASE / "pretraining.json")
    assert recorded["pictures"]["localization"]["word"]["auc"] >= 0.85
    assert recorded["vae_psnr_db"]["phantoms"] >= 30 and recorded["classifier"]["auc"] >= 0.95

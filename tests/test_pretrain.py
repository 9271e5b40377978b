"""The recipe that makes the embedded base: every stage for one step, and what it records of its own drawings."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipe import ROOT, recipe_module

from distill.cli import parse
from distill.components import PHANTOM_BASE, load_components, read_json
from distill.config import BaseConfig, EvaluationConfig, PretrainConfig
from distill.data.pictures import PicturesDataset
from distill.embedded import new_classifier

CONFIG = ["--config", str(ROOT / "recipes/configs/phantom/pretrain.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize("text_encoder", ["frozen", "full"])
def test_a_dry_run_takes_one_step_of_every_stage(text_encoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_module("pretrain_phantom")
    before = {path: path.stat().st_mtime_ns for path in PHANTOM_BASE.rglob("*")}
    recipe.pretrain(parse(PretrainConfig, [*CONFIG, "--dry_run", "true", "--unet_text_encoder", text_encoder]))
    printed = capsys.readouterr().out
    trained = {
        name: int(n.replace(",", ""))
        for name, n in re.findall(r"^(\w+): [\d,]+ parameters, ([\d,]+) tr", printed, re.M)
    }
    assert (trained["unet"] > trained["unet_longer"]) == (text_encoder == "full")
    assert re.findall(r"^(\w+): [\d,]+ parameters, .* 1 steps", printed, re.M) == list(recipe.TRAINED)
    assert {path: path.stat().st_mtime_ns for path in PHANTOM_BASE.rglob("*")} == before


def test_recognition_scores_drawings_and_real_pictures_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the base's drawings replaced by the real pictures, both have the same areas."""
    recipe = recipe_module("pretrain_phantom")
    torch.manual_seed(0)
    new_classifier(PicturesDataset.findings).save_pretrained(tmp_path / "picture_classifier" / "model")
    pictures = PicturesDataset("test", 30, 0, 128)
    by_caption = {pictures.caption(i): pictures[i].pixel_values / 2 + 0.5 for i in range(30)}
    monkeypatch.setattr(recipe, "RECOGNISED_PICTURES", 6)
    monkeypatch.setattr(recipe, "generate", lambda _, captions, *rest: torch.stack([by_caption[c] for c in captions]))
    config = replace(PretrainConfig(), evaluation=EvaluationConfig(batch_size=4))
    found = recipe.recognition(load_components(BaseConfig(name="phantom")), pictures, config, tmp_path)
    assert found["images"] == 6 and found["one_object_images"] == 6 and found["real"]["auc"] is not None
    assert found["generated"]["auc"] == pytest.approx(found["real"]["auc"])
    assert found["generated"]["top1"] == found["real"]["top1"] and 0 <= found["real"]["top1"] <= 1
    assert list(found["real"]["per_finding"]) == list(PicturesDataset.findings)


def test_the_base_in_the_repository_meets_its_card() -> None:
    """As recorded when it was made; recipes/pretrain_phantom.py --stages "[record]" measures it again."""
    recorded = read_json(PHANTOM_BASE / "pretraining.json")
    assert recorded["pictures"]["localization"]["word"]["auc"] >= 0.85
    assert recorded["vae_psnr_db"]["phantoms"] >= 30 and recorded["classifier"]["auc"] >= 0.95

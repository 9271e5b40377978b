"""Configurations of an earlier version: each old key is answered with the key of today, and an old run is not
continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from recipe import recipe_module

from distill.cli import parse, to_yaml
from distill.config import EvaluationConfig, FullEvaluation
from distill.configuration import renamed as tables
from distill.configuration.options import renamed
from distill.errors import UserError
from distill.experiment.run import claim
from distill.settings import Settings

CLASSES = {
    "finetune": "FinetuneConfig",
    "tradeoff": "TradeoffConfig",
    "distill_attention": "DistillAttentionConfig",
    "compress": "CompressConfig",
    "distill_steps": "DistillStepsConfig",
    "compare": "CompareConfig",
}
FINETUNE = """
base:
  name: phantom
data:
  kind: phantom
  train_size: 2000
method: full
text_encoder: frozen
trainer:
  max_steps: 300
  batch_size: 16
"""
TRADEOFF = """
data:
  kind: phantom
  phantom_captions: stated
arms: [frozen, learnable, tail_penalized]
variants:
  token_kl: distilled --distillation.place_kl_weight 0 --distillation.mass_weight 0
  lora_1: lora --lora.rank 1 --lora.alpha 1
distillation:
  token_kl_weight: 1.0
  text_gradient: 0.5
lora:
  rank: 16
  alpha: 16
  unet_targets: [to_k]
lora_learning_rate: 2.0e-3
denoising:
  caption_dropout: 0.2
  arm_weight: 0.12
trainer:
  max_steps: 400
  keep_checkpoints: 3
  adam_beta1: 0.8
evaluation:
  localization_images: 500
  smoothing_sigma: 2.0
"""
DISTILL_ATTENTION = """
method: full
text_encoder: full
distillation:
  teacher: checkpoints/finetune
  start_from_teacher: true
  gate_reference: base
  ema_decay: 0.99
"""


def class_of(name: str) -> type[Settings]:
    found: type[Settings] = getattr(recipe_module(name), CLASSES[name])
    return found


def message_of(name: str, argv: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        parse(class_of(name), argv)
    return str(caught.value)


def of_file(name: str, text: str, folder: Path) -> list[str]:
    (folder / "old.yaml").write_text(text, encoding="utf-8")
    return message_of(name, ["--config", str(folder / "old.yaml")]).splitlines()[1:]


def expect(lines: list[str], notes: list[tuple[str, str]]) -> None:
    """Each line names its key and what to write, and none is left over."""
    assert len(lines) == len(notes), lines
    for key, note in notes:
        assert any(key in line and note in line for line in lines), (key, note, lines)


def test_an_old_finetune(tmp_path: Path) -> None:
    expect(of_file("finetune", FINETUNE, tmp_path), [("method: ", "denoiser now; method.kind says")])


def test_an_old_tradeoff(tmp_path: Path) -> None:
    expect(
        of_file("tradeoff", TRADEOFF, tmp_path),
        [
            ("data.phantom_captions", "it is data.captions now"),
            ("arms: expected a mapping", "arms is a mapping now, such as arms.frozen.text_encoder frozen"),
            ("variants", "arms.NAME.like names the arm that it varies"),
            ("distillation.token_kl_weight", "it is arms.NAME.method.token_kl_weight now"),
            ("distillation.text_gradient", "it is gone"),
            ("lora.rank", "it is arms.NAME.lora.rank now"),
            ("lora.alpha", "it is arms.NAME.lora.alpha now"),
            ("lora.unet_targets", "it is arms.NAME.lora.denoiser_targets now"),
            ("lora_learning_rate", "it is arms.NAME.learning_rate and arms.NAME.text_encoder_learning_rate now"),
            ("denoising.caption_dropout", "it is arms.NAME.denoising.caption_dropout now"),
            ("denoising.arm_weight", "an option of the method supervised_attention now, arm_weight"),
            ("trainer.keep_checkpoints", "leave it out: the newest two stay"),
            ("trainer.adam_beta1", "0.9 and 0.999 are used"),
            ("evaluation.smoothing_sigma", "only recipes/evaluate.py and the recipes that compare maps have it"),
        ],
    )


def test_an_old_distill_attention(tmp_path: Path) -> None:
    lines = of_file("distill_attention", DISTILL_ATTENTION, tmp_path)
    moved = [
        (f"distillation.{n}", f"it is method.{n} now") for n in ("teacher", "start_from_teacher", "gate_reference")
    ]
    expect(lines, [("method: ", "denoiser now"), *moved, ("distillation.ema_decay", "it is gone")])


@pytest.mark.parametrize(
    ("recipe", "words", "expected"),
    [
        ("finetune", ["--lock_keys", "true"], "set method.kind to key_lock"),
        ("finetune", ["--method", "lora"], "how the U-Net is trained is denoiser now"),
        ("finetune", ["--denoising.tail_weight", "1"], "the option weight of the method tail_penalty"),
        ("finetune", ["--denoising.region_images", "9"], "an option of the method supervised_attention now, images"),
        ("finetune", ["--denoising.region_mask_weight", "9"], "it is gone"),
        ("finetune", ["--trainer.localize_images", "9"], "leave it out: 100 images"),
        ("finetune", ["--lora.unet_targets", "[to_k]"], "it is denoiser_targets now"),
        ("finetune", ["--data.phantom_companions", "0.5"], "it is gone, since nothing was ever measured with it"),
        ("compress", ["--distillation.mass_weight", "0.5"], "it is method.mass_weight now"),
        ("distill_steps", ["--method", "full"], "how the U-Net is trained is denoiser now"),
        ("distill_steps", ["--consistency.huber_c", "1"], "it is method.huber_c now"),
        ("distill_steps", ["--distillation.words", "labels"], "it is method.words now"),
        ("tradeoff", ["--method", "lora"], "it is arms.NAME.denoiser now"),
        ("tradeoff", ["--seed", "3"], "it is seeds now, a list of one"),
        ("tradeoff", ["--rali_arm_weight", "1"], "it is arms.NAME.method.arm_weight now"),
        ("tradeoff", ["--denoising.tail_weight", "1"], "the option weight of the method tail_penalty"),
        ("compare", ["--references", "[a]"], "it is compare_to now"),
    ],
)
def test_old_words_of_the_command_line(recipe: str, words: list[str], expected: str) -> None:
    assert expected in message_of(recipe, words)


def test_evaluate_has_the_options_that_the_others_lost() -> None:
    for name in tables.EVALUATION:
        assert name in FullEvaluation.model_fields and name not in EvaluationConfig.model_fields
    with pytest.raises(UserError) as caught:
        parse(recipe_module("evaluate").EvaluateConfig, ["--evaluation.iou_threshold", "2"])
    text = str(caught.value)
    assert "iou_threshold" in text and "only recipes/evaluate.py" not in text


@pytest.mark.parametrize("name", CLASSES)
def test_no_key_of_today_is_called_old_but_those_that_changed_their_meaning(name: str) -> None:
    config_class = class_of(name)
    changed = {key for key in config_class.renamed if key in config_class.model_fields}
    assert changed <= {"arms", "method"}
    assert all(renamed(config_class, tuple(key.split("."))) for key in config_class.renamed)


def test_a_run_of_an_earlier_version_is_not_continued(tmp_path: Path) -> None:
    config: Any = class_of("finetune")()
    path = tmp_path / "config.yaml"
    claim(tmp_path, config)
    path.write_text(to_yaml(config), encoding="utf-8")
    claim(tmp_path, config)
    old = yaml.safe_load(to_yaml(config)) | {"lock_keys": False, "method": "full"}
    for text in (yaml.safe_dump(old), TRADEOFF, "[", "- a"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match="holds a run of an earlier version, .* choose another --output_dir"):
            claim(tmp_path, config)
    path.write_text(to_yaml(config.model_copy(update={"seed": 3})), encoding="utf-8")
    with pytest.raises(UserError, match=r"holds a run with other options(?s:.*)- seed: 3 there, 0 now"):
        claim(tmp_path, config)

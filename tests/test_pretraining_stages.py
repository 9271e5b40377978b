"""Stages of the bundled base: what each hands to the training loop, and what it writes. The loop itself is replaced."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from recipe import config_class_of, recipe_module
from tiny import save_tiny, tiny_tokenizer
from torch import nn
from transformers import CLIPTextModelWithProjection, ResNetForImageClassification

from distill.config import BaseConfig, DenoisingConfig, FullEvaluation, TrainerConfig
from distill.data.batch import Batch
from distill.data.phantom.dataset import PhantomDataset
from distill.data.pictures import VOCABULARY, PicturesDataset
from distill.errors import UserError
from distill.experiment import pretraining, pretraining_record
from distill.files import read_json
from distill.metrics import finding_auroc
from distill.metrics.features import PHANTOM_CLASSIFIER, PhantomFeatures
from distill.models.embedded import ImageTower, new_classifier, new_pipeline, new_text_encoder, new_vae
from distill.models.loading import PHANTOM_BASE, load_model

TRAINER = TrainerConfig(tracker="none", batch_size=2)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What each stage hands to `train`, which does nothing."""
    calls: list[Any] = []
    monkeypatch.setattr(pretraining, "train", lambda *arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize("main", [True, False])
def test_what_a_stage_took_is_recorded_once(
    main: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    accelerator = SimpleNamespace(is_main_process=main, num_processes=3)

    def fit(objective: nn.Module, rows: Any, trainer: TrainerConfig, **options: Any) -> Any:
        asked.append((objective, rows, trainer, options))
        return SimpleNamespace(steps=1234, seconds=5.678)

    monkeypatch.setattr(pretraining, "fit", fit)
    monkeypatch.setattr(pretraining, "make_accelerator", lambda *given: asked.append(given) or accelerator)
    objective = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    objective[1].requires_grad_(False)
    collate: Any = len
    pretraining.train(objective, "the rows", TRAINER, tmp_path / "vae", 7, collate)
    assert TRAINER.keep_last_state_gb > 0
    assert asked == [
        (TRAINER, tmp_path / "vae"),
        (objective, "the rows", TRAINER.model_copy(update={"keep_last_state_gb": 0.0}),
         {"accelerator": accelerator, "output_dir": tmp_path / "vae", "seed": 7, "collate": collate, "label": "vae"}),
    ]  # fmt: skip
    said = capsys.readouterr().out
    if not main:
        assert not said and not (tmp_path / "vae").exists()
        return
    assert said == "vae: 13 parameters, 9 trained, 1234 steps, 5.7 s\n"
    cost = {"steps": 1234, "seconds": 5.7, "parameters": 9, "processes": 3}
    assert read_json(tmp_path / "vae" / "cost.json") == cost


def test_a_batch_in_eight_of_the_text_encoder_has_unrelated_words_before_its_captions(
    tmp_path: Path, trained: list[Any]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    pixels = torch.randn(60, 3, 4, 4)
    pretraining.train_text_encoder("the pictures", TRAINER, tmp_path / "text_encoder", 3)  # type: ignore[arg-type]
    ((objective, pictures, trainer, work, seed, collate),) = trained
    assert (pictures, trainer, work, seed) == ("the pictures", TRAINER, tmp_path / "text_encoder", 3)
    assert objective.image_encoder.head.out_features == 128 == objective.text_encoder.config.projection_dim

    def ids_of(first: str) -> torch.Tensor:
        captions = [first, *(f"a cat {i}" for i in range(59))]
        rows = [{"pixel_values": p, "caption": c} for p, c in zip(pixels, captions, strict=True)]
        batch = collate(rows)
        assert torch.equal(batch["pixel_values"], pixels)
        found: torch.Tensor = batch["input_ids"]
        return found

    def tokens(texts: list[str]) -> torch.Tensor:
        found: torch.Tensor = tokenizer(
            texts, padding="longest", truncation=True, max_length=77, return_tensors="pt"
        ).input_ids
        return found

    others = [f"a cat {i}" for i in range(59)]
    assert torch.equal(ids_of("a dog now"), tokens(["a dog now", *others]))
    plain = ["a dog ok", *others]  # eight letters
    before = [VOCABULARY[7 * i % 400 :][: i % 50] for i in range(60)]
    expected = [
        " ".join([*words, caption]) if words else f" {caption}" for words, caption in zip(before, plain, strict=True)
    ]
    assert torch.equal(ids_of("a dog ok"), tokens(expected)) and tokens(expected).shape == (60, 77)
    saved = CLIPTextModelWithProjection.from_pretrained(tmp_path / "text_encoder" / "text_encoder_with_projection")
    torch.manual_seed(3)
    for ours, seeded in zip(saved.parameters(), new_text_encoder(tokenizer).parameters(), strict=True):
        assert torch.equal(ours, seeded)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """The parts that stages before the U-Net leave."""
    folder, tokenizer = tmp_path / "work", tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(5)
    new_text_encoder(tokenizer).save_pretrained(folder / "text_encoder" / "text_encoder_with_projection")
    new_vae(32).save_pretrained(folder / "vae" / "vae")
    return folder


@pytest.mark.parametrize(("stage", "how"), [("unet", "frozen"), ("unet", "full"), ("unet_clear", "full")])
def test_a_stage_of_the_denoiser_trains_it_beside_the_parts_there_are(
    stage: str, how: Any, work: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, cached, saved, made = save_tiny(work / "base"), [], [], []
    pictures = PicturesDataset("train", 3, 0, 32)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), is_main_process=True, main_process_first=nullcontext,
        wait_for_everyone=lambda: saved.append("waited"),
    )  # fmt: skip
    trainer = TRAINER.model_copy(update={"num_workers": 3})

    def cache(dataset: Any, vae: Any, folder: Path, **options: Any) -> str:
        cached.append((dataset, folder, options, vae.config.sample_size))
        return "the latents"

    monkeypatch.setattr(pretraining, "make_accelerator", lambda *given: made.append(given) or accelerator)
    monkeypatch.setattr(pretraining, "cache_latents", cache)
    monkeypatch.setattr(pretraining, "save_base", lambda *given: saved.append(given))
    monkeypatch.setattr(pretraining, "loader_processes", lambda count, device: (count, device))
    monkeypatch.setattr(pretraining, "TrainingRows", lambda *given, **options: (given, options))
    denoising = DenoisingConfig(caption_dropout=0.25)
    pretraining.train_unet(stage, pictures, trainer, work, base, 10, denoising=denoising, text_encoder=how)
    ((method, rows, given, folder, seed, collate),) = trained
    assert made == [(trainer, work / stage)] and given is trainer and folder == work / stage and collate == Batch.stack
    assert seed == 10 + ["unet", "unet_longer", "unet_clear"].index(stage), "noise that no stage before has seen"
    (pipeline, *where), waited = saved
    assert where == [stage, work, base] and waited == "waited"
    (data, model, text), options = rows
    assert data is pictures and text is denoising and options == {"latents": "the latents"}
    assert model.pipeline is pipeline and method.student is model and method.denoising is denoising
    shared = {"batch_size": 8, "flip": False, "device": torch.device("cpu"), "num_workers": (3, torch.device("cpu"))}
    assert cached == [(pictures, work / "latents", shared, 32 if stage == "unet" else 64)]
    trains = {
        name: {p.requires_grad for p in part.parameters()}
        for name, part in (("unet", pipeline.unet), ("text", pipeline.text_encoder), ("vae", pipeline.vae))
    }
    assert trains["unet"] == {True} and trains["vae"] == {False}
    assert trains["text"] == {False} or (stage == "unet" and how == "full")
    assert (True in trains["text"]) == (stage == "unet" and how == "full")
    if stage == "unet":
        source = CLIPTextModelWithProjection.from_pretrained(work / "text_encoder" / "text_encoder_with_projection")
        same = torch.equal(next(pipeline.text_encoder.parameters()), next(source.text_model.parameters()))
        assert same == (how == "frozen"), "in full it starts from a new one"
        torch.manual_seed(10)
        again = pretraining._untrained_pipeline(work, how)
        assert torch.equal(next(pipeline.unet.parameters()), next(again.unet.parameters()))
        assert torch.equal(
            next(pipeline.vae.parameters()), next(AutoencoderKL.from_pretrained(work / "vae" / "vae").parameters())
        )
    else:
        read = UNet2DConditionModel.from_pretrained(base / "unet")
        assert torch.equal(next(pipeline.unet.parameters()), next(read.parameters()))


def test_a_wider_denoiser_is_put_beside_the_parts_of_another_pipeline(
    work: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, saved = save_tiny(work / "source"), []
    monkeypatch.setattr(pretraining, "cache_latents", lambda *given, **options: None)
    monkeypatch.setattr(pretraining, "save_base", lambda *given: saved.append(given))
    pictures = PicturesDataset("train", 1, 0, 32)

    def train(parts: Path) -> None:
        pretraining.train_unet(
            "unet", pictures, TRAINER, work, work / "base", 0, denoising=DenoisingConfig(), text_encoder="frozen",
            parts=str(parts), channels=(16, 40),
        )  # fmt: skip

    train(source)
    ((pipeline, *_),) = saved
    model = trained[0][0].student
    assert model.denoiser is pipeline.unet and {p.requires_grad for p in pipeline.unet.parameters()} == {True}
    assert pipeline.unet.config.block_out_channels == (16, 40)
    given = load_model(BaseConfig(name=str(source))).pipeline
    for part in ("text_encoder", "vae"):
        for ours, theirs in zip(getattr(pipeline, part).parameters(), getattr(given, part).parameters(), strict=True):
            assert torch.equal(ours, theirs)
    size, width = given.vae.config.sample_size, given.text_encoder.config.hidden_size
    noisy = torch.randn(2, given.vae.config.latent_channels, size // 8, size // 8)
    assert pipeline.unet(noisy, 5, torch.randn(2, 7, width)).sample.shape == noisy.shape
    with pytest.raises(UserError, match="sdxl: a StableDiffusionXLPipeline; give a Stable Diffusion 1.x or 2.x"):
        train(save_tiny(work / "sdxl", "sdxl"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": ("vae", "unet")}, "parts is phantom, which stage unet takes; set stages to unet"),
        ({"stages": ("record",)}, "parts is phantom, which stage unet takes; set stages to unet"),
        ({"stages": ("unet",), "unet_text_encoder": "full"}, "unet_text_encoder full trains a new text encoder"),
        ({"stages": ("unet",), "unet_channels": (12, 16)}, "multiple of 8"),
    ],
)
def test_parts_that_no_stage_would_take_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_class_of(recipe_module("pretrain_phantom"))(parts="phantom", **given)


def test_other_processes_write_no_base(work: Path, trained: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), is_main_process=False, main_process_first=nullcontext,
        wait_for_everyone=lambda: waited.append("waited"),
    )  # fmt: skip
    monkeypatch.setattr(pretraining, "make_accelerator", lambda *given: accelerator)
    monkeypatch.setattr(pretraining, "cache_latents", lambda *given, **options: None)
    monkeypatch.setattr(pretraining, "save_base", lambda *given: pytest.fail("it is for the main process"))
    base = save_tiny(work / "base")
    pictures = PicturesDataset("train", 1, 0, 32)
    pretraining.train_unet(
        "unet_longer", pictures, TRAINER, work, base, 0, denoising=DenoisingConfig(), text_encoder="frozen"
    )
    assert waited == ["waited"] and trained[0][4] == 1


def test_pretraining_offers_a_method_nothing_but_its_student(tmp_path: Path) -> None:
    context = pretraining._context(Accelerator(), tmp_path, 5)
    assert torch.equal(
        torch.randn(3, generator=context.generator), torch.randn(3, generator=pretraining.generator_at(5, 0, 0))
    )
    assert context.is_main and context.device == torch.device("cpu") and context.log_dir == tmp_path
    assert not context.dry_run and context.layer_scores is None and context.frozen_dtype == torch.float32
    assert list(context.batches(8)) == [] == context.captions(8)
    with pytest.raises(UserError, match="pretraining has no model 'lora'"):
        context.load("lora")


def test_a_classifier_is_trained_on_images_and_their_labels(tmp_path: Path, trained: list[Any]) -> None:
    dataset, folder = PhantomDataset("train", 5, 0, 64), tmp_path / "classifier"
    pretraining.train_classifier(dataset, TRAINER, tmp_path / "work", folder, 4)
    ((objective, rows, trainer, work, seed, collate),) = trained
    assert (trainer, work, seed) == (TRAINER, tmp_path / "work", 4) and len(rows) == 5
    batch = collate(rows)
    wanted = torch.tensor([[float(name in dataset.labels(i)) for name in dataset.findings] for i in range(5)])
    assert torch.equal(batch["labels"], wanted) and 0 < wanted.mean() < 1
    pixels = torch.stack([dataset[i].pixel_values for i in range(5)])
    assert torch.equal(batch["pixel_values"], pixels.half().float()), "kept in half the memory"
    torch.manual_seed(4)
    fresh = new_classifier(dataset.findings)
    read = ResNetForImageClassification.from_pretrained(folder)
    assert {p.dtype for p in read.parameters()} == {torch.float32}
    for name, value in read.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name].half().to(value.dtype)), name
    assert read.config.id2label == dict(enumerate(dataset.findings))
    assert objective.classifier.config.id2label == read.config.id2label


def test_new_models_are_built_as_the_bundled_ones() -> None:
    """Every size of their configurations; the weights themselves are not made."""
    base = load_model(BaseConfig(name="phantom"))
    tokenizer, pipeline = base.tokenizers[0], base.pipeline
    apart = {"_name_or_path", "_use_default_values", "_diffusers_version", "scaling_factor", "transformers_version"}
    apart |= {"_class_name", "architectures", "dtype", "torch_dtype", "id2label", "label2id"}

    def sizes(config: Any) -> dict[str, Any]:
        found = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        return {key: list(v) if isinstance(v, tuple) else v for key, v in found.items() if key not in apart}

    encoder = new_text_encoder(tokenizer)
    with torch.device("meta"):
        vae = new_vae(128)
    fresh = new_pipeline(tokenizer, encoder, vae)
    for part in ("vae", "unet", "scheduler", "text_encoder"):
        assert sizes(getattr(fresh, part).config) == sizes(getattr(pipeline, part).config), part
    assert fresh.text_encoder.state_dict().keys() == pipeline.text_encoder.state_dict().keys()
    for name, value in fresh.text_encoder.state_dict().items():
        assert torch.equal(value, encoder.text_model.state_dict()[name.removeprefix("text_model.")])
    assert encoder.config.projection_dim == 128
    assert fresh.safety_checker is fresh.feature_extractor is None and not fresh.config.requires_safety_checker
    classifier = PhantomFeatures().model
    assert sizes(new_classifier(["a"] * classifier.config.num_labels).config) == sizes(classifier.config)
    assert new_classifier(["a", "b"]).config.label2id == {"a": 0, "b": 1}


def test_the_image_tower_sees_half_the_resolution() -> None:
    tower = ImageTower(5).eval()
    images = torch.randn(2, 3, 128, 128)
    halved = images.view(2, 3, 64, 2, 64, 2).mean(dim=(3, 5))
    features = tower.body(halved).last_hidden_state
    assert features.shape == (2, 128, 4, 4) and len(tower.body.encoder.stages) == 3
    assert [stage.layers[0].layer[0].convolution.out_channels for stage in tower.body.encoder.stages] == [32, 64, 128]
    assert [len(stage.layers) for stage in tower.body.encoder.stages] == [1, 1, 1]
    assert tower.body.config.embedding_size == 32
    pooled = features.view(2, 128, 2, 2, 2, 2).mean(dim=(3, 5)).flatten(1)
    torch.testing.assert_close(tower(images), tower.head(pooled), atol=1e-5, rtol=1e-5)


def test_the_record_measures_the_base_on_held_out_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, list[Any]] = {"generate": [], "localization": [], "recognition": []}
    base = save_tiny(tmp_path / "base")
    numbers = {"auc": 0.75, "auc_ci": [0.5, 0.9], "top1": 0.25, "top1_ci": [0.125, 0.5]}

    def generate(model: Any, captions: list[str], seeds: list[int], resolution: int, evaluation: Any) -> torch.Tensor:
        assert not torch.is_grad_enabled() and not model.denoiser.training
        asked["generate"].append((captions, seeds, resolution))
        return torch.arange(16.0).view(16, 1, 1, 1).expand(16, 3, 2, 2) / 16

    def localization(model: Any, dataset: Any, evaluation: Any, **options: Any) -> Any:
        assert options.pop("accelerator").device == torch.device("cpu")
        asked["localization"].append(
            (len(dataset), dataset.clear, dataset.split, dataset.resolution, dataset.seed, options)
        )
        return {"word": {"auc": 0.8, "auc_ci": [0.75, 0.85]}}

    def recognition(model: Any, pictures: Any, evaluation: Any, classifier: Path) -> Any:
        asked["recognition"].append((len(pictures), pictures.clear, classifier))
        return {"real": numbers, "generated": numbers | {"auc": 0.6}}

    sheets: list[torch.Tensor] = []
    monkeypatch.setattr(pretraining_record, "generate", generate)
    monkeypatch.setattr(pretraining_record, "localization", localization)
    monkeypatch.setattr(pretraining_record, "recognition", recognition)
    monkeypatch.setattr(pretraining_record, "save_png", lambda image, path: sheets.append((image, path)))  # type: ignore[arg-type]
    monkeypatch.setattr(
        pretraining_record, "vae_psnr_db", lambda model, dataset: (type(dataset).__name__, len(dataset))
    )
    monkeypatch.setattr(pretraining_record, "classifier_auc", lambda phantoms, folder: {"auc": 0.9, "of": (
        len(phantoms), phantoms.split, phantoms.seed, phantoms.resolution, folder)})  # fmt: skip
    arguments: Any = (base, tmp_path / "classifier", tmp_path, FullEvaluation())
    found = pretraining_record.record(*arguments, resolution=64, seed=9)
    clear = PicturesDataset("test", 16, 9, 64, True)
    captions = [clear.caption(i) for i in range(16)]
    assert asked["generate"] == [(captions, list(range(16)), 64)] and found["captions_of_samples"] == captions
    (sheet, path), *_ = sheets
    assert sheet.shape == (3, 4, 16) and path == base / "samples.png"
    assert (sheet[0, ::2, ::2] * 16).flatten().tolist() == list(range(16))
    assert found["vae_psnr_db"] == {
        "pictures": ("PicturesDataset", 3000), "clear_pictures": ("PicturesDataset", 3000), "phantoms": ("PhantomDataset", 500),
    }  # fmt: skip
    assert found["classifier"]["of"] == (500, "test", 9, 64, tmp_path / "classifier") and found["seed"] == 9
    assert asked["localization"] == [
        (200, clear, "test", 64, 9, {"arm_dir": tmp_path / f"maps_{name}", "label": name})
        for name, clear in (("pictures", False), ("clear_pictures", True))
    ]
    assert found["pictures"]["recognition"] is None and not asked["recognition"]
    assert "clear_pictures: recognition was not measured" in capsys.readouterr().out
    model = tmp_path / "picture_classifier" / "model"
    model.mkdir(parents=True)
    found = pretraining_record.record(*arguments, resolution=64, seed=9)
    assert asked["recognition"] == [(3000, False, model), (3000, True, model)]
    assert found["clear_pictures"]["recognition"]["generated"]["auc"] == 0.6
    assert found["pictures"]["localization"] == {"word": {"auc": 0.8, "auc_ci": [0.75, 0.85]}}
    said = capsys.readouterr().out
    assert (
        "pictures, generated: AUC of objects 0.600 [0.5, 0.9]; top-1 of captions with one object 0.250 [0.125, 0.5]"
        in said
    )
    pretraining_record.write_record(base, {"seed": 9}, {"unet": {"steps": 1}})
    assert read_json(base / "pretraining.json") == {"stages": {"unet": {"steps": 1}}, "seed": 9}


def test_the_classifier_is_judged_on_real_phantoms() -> None:
    phantoms, features = PhantomDataset("test", 9, 0, 128), PhantomFeatures()
    pixels = torch.stack([phantoms[i].pixel_values for i in range(9)])
    labels = torch.tensor([[name in phantoms.labels(i) for name in features.findings] for i in range(9)])
    with torch.no_grad():
        expected = finding_auroc(features(pixels)[1], labels)
        found = pretraining_record.classifier_auc(phantoms, PHANTOM_CLASSIFIER)
    assert found["images"] == 9 and found["auc"] == pytest.approx(expected["auc"]) and expected["auc"] > 0.6
    assert found.keys() == expected.keys() | {"images"}


def test_the_last_row_of_the_log_is_kept_without_its_clock(tmp_path: Path) -> None:
    rows = [
        {"step": 1, "loss": 9.0, "lr": 1, "seconds": 1},
        {"step": 2, "loss": 0.5, "psnr_db": 30.0, "lr": 1, "seconds": 2},
    ]
    (tmp_path / "train_log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "cost.json").write_text('{"steps": 2, "seconds": 7.5}')
    cost = {"steps": 2, "seconds": 7.5, "last": {"step": 2, "loss": 0.5, "psnr_db": 30.0}}
    assert pretraining.cost_of(tmp_path) == cost


def test_a_new_base_is_written_whole_and_carries_its_name(work: Path, tmp_path: Path) -> None:
    base, stage = tmp_path / "new-base", work / "unet"
    stage.mkdir()
    (stage / "train_log.jsonl").write_text('{"step": 1}\n')
    (stage / "cost.json").write_text("{}")
    pretraining.save_base(pretraining._untrained_pipeline(work, "frozen"), "unet", work, base)
    assert read_json(base / "pretraining.json") == {"stages": {"unet": {"last": {"step": 1}}}}
    assert read_json(base / "text_encoder" / "config.json")["dtype"] == "float32"
    text = "".join(p.read_text() for p in base.rglob("*.json"))
    assert str(tmp_path) not in text, "no path of this machine"
    assert not base.with_suffix(".before").exists() and not base.with_suffix(".partial").exists()
    assert PHANTOM_BASE.name == "phantom-base"

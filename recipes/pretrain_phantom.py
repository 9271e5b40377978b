"""Make the embedded base and the phantom's classifier from nothing, as Stable Diffusion is made.

    accelerate launch recipes/pretrain_phantom.py --config recipes/configs/phantom/pretrain.yaml

Text encoder by contrastive training with a small image tower, VAE on pictures, U-Net with the text encoder frozen; all
on generic captioned pictures (distill/data/pictures.py), never on phantoms. Architectures: distill/embedded.py; losses:
distill/objectives.py. A stage whose result exists is skipped; one that was cut off continues.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, ResNetForImageClassification

from distill.cli import main, to_yaml
from distill.components import Components, components_of, load_components, parameter_counts, prepare_training, read_json
from distill.config import BaseConfig, DenoisingConfig, LoraConfig, PretrainConfig, TrainerConfig
from distill.data import PhantomDataset
from distill.data.cache import cache_latents
from distill.data.pictures import VOCABULARY, PicturesDataset
from distill.data.training import TrainingRows
from distill.embedded import (
    ImageTower,
    RenderedPictures,
    new_classifier,
    new_pipeline,
    new_text_encoder,
    new_vae,
    render,
    train_tokenizer,
)
from distill.evaluate import generate, save_png
from distill.localization import localization
from distill.metrics import finding_auroc
from distill.metrics.features import PhantomFeatures
from distill.objectives import AutoencoderObjective, ClassificationObjective, ContrastiveObjective, DenoisingObjective
from distill.provenance import provenance
from distill.runs import quiet_libraries, write_json
from distill.trainer import fit, make_accelerator

Row = dict[str, Any]
TRAINED = ("text_encoder", "vae", "unet", "unet_longer", "classifier", "picture_classifier")
RECOGNISED_PICTURES = 400
"""Held-out captions whose drawings the object classifier looks at."""


def train(objective: nn.Module, rows: Any, trainer: TrainerConfig, work: Path, seed: int, collate: Any = None) -> None:
    """Fit, and record what it took in cost.json."""
    accelerator = make_accelerator(trainer, work)
    result = fit(
        objective, rows, trainer, accelerator=accelerator, output_dir=work, seed=seed, collate=collate, label=work.name
    )
    total, trainable = parameter_counts(objective)
    print(f"{work.name}: {total:,} parameters, {trainable:,} trained, {result.steps} steps, {result.seconds:.1f} s")
    objective.to("cpu")
    write_json(
        work / "cost.json", {"steps": result.steps, "seconds": round(result.seconds, 1), "parameters": trainable}
    )


def stack_pixels(rows: list[Row]) -> Row:
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}


def train_text_encoder(config: PretrainConfig, pictures: RenderedPictures, work: Path) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(work.parent / "tokenizer")

    def collate(rows: list[Row]) -> Row:
        captions = [row["caption"] for row in rows]
        # One batch in eight has unrelated words before the captions, so that all 77 positions are trained; the others
        # stay short, which is three times as fast.
        if len(captions[0]) % 8 == 0:
            captions = [f"{' '.join(VOCABULARY[7 * i % 400 :][: i % 50])} {c}" for i, c in enumerate(captions)]
        ids = tokenizer(captions, padding="longest", truncation=True, max_length=77, return_tensors="pt").input_ids
        return {"input_ids": ids, **stack_pixels(rows)}

    torch.manual_seed(config.seed)
    text_encoder = new_text_encoder(tokenizer)
    objective = ContrastiveObjective(text_encoder, ImageTower(128))
    train(objective, pictures, config.text_encoder, work, config.seed, collate)
    text_encoder.save_pretrained(work / "text_encoder_with_projection")


def train_vae(config: PretrainConfig, pictures: RenderedPictures, work: Path) -> None:
    torch.manual_seed(config.seed)
    vae = new_vae(config.resolution)
    objective = AutoencoderObjective(vae, config.kl_weight, crop_px=config.resolution // 2)
    train(objective, pictures, config.vae, work, config.seed, stack_pixels)
    with torch.no_grad():
        some = stack_pixels([pictures[i] for i in range(min(512, len(pictures)))])["pixel_values"]
        means = torch.cat([vae.encode(part).latent_dist.mean for part in some.split(32)])
    vae.register_to_config(scaling_factor=round(1 / float(means.std()), 4))
    vae.save_pretrained(work / "vae")


def train_unet(config: PretrainConfig, stage: str, work: Path, output_dir: Path) -> None:
    """Stage unet: a new U-Net beside the trained parts. Stage unet_longer: the U-Net of output_dir, which it replaces."""
    longer, trainer = stage == "unet_longer", getattr(config, stage)
    torch.manual_seed(config.seed)
    if longer:
        pipeline = StableDiffusionPipeline.from_pretrained(output_dir, torch_dtype=torch.float32)
    else:
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        if config.unet_text_encoder == "frozen":
            folder = work / "text_encoder" / "text_encoder_with_projection"
            text_encoder = CLIPTextModelWithProjection.from_pretrained(folder)
        else:
            text_encoder = new_text_encoder(tokenizer)
        pipeline = new_pipeline(tokenizer, text_encoder, AutoencoderKL.from_pretrained(work / "vae" / "vae"))
    components = components_of(pipeline)
    text_encoder_mode = "frozen" if longer else config.unet_text_encoder
    prepare_training(components, method="full", text_encoder=text_encoder_mode, lora=LoraConfig())
    device = make_accelerator(trainer, work / stage).device
    components.to(device)
    pictures = PicturesDataset("train", config.pictures, config.seed, config.resolution)
    latents = cache_latents(
        pictures,
        components.vae,
        work / "latents",
        batch_size=8,
        flip=False,
        device=device,
        num_workers=trainer.num_workers,
    )
    objective = DenoisingObjective(components, DenoisingConfig(caption_dropout=config.caption_dropout))
    rows = TrainingRows(pictures, components, latents=latents)
    # The seed gives the noise too: the longer training must not see that of the first one again.
    train(objective, rows, trainer, work / stage, config.seed + longer)
    pipeline.to("cpu", torch.float16)
    partial = output_dir.with_suffix(".partial")
    if longer:
        # Only the weights change; saved configurations would name the folder that they were loaded from.
        shutil.copytree(output_dir, partial, dirs_exist_ok=True)
        pipeline.unet.save_pretrained(partial / "unet")
        shutil.copy2(output_dir / "unet" / "config.json", partial / "unet")
        os.replace(output_dir, work / stage / "before")
    else:
        pipeline.save_pretrained(partial)
    os.replace(partial, output_dir)


def train_classifier(
    dataset: PhantomDataset | PicturesDataset, trainer: TrainerConfig, work: Path, output_dir: Path, seed: int
) -> None:
    """On real images, never on generated ones. Of phantoms: its features serve FID, its scores the faithfulness to captions.
    Of pictures: it tells whether the base's own drawings are recognised."""
    rows = []
    for i in tqdm(range(len(dataset)), desc="images", unit="image"):
        sample = dataset[i]
        labels = torch.tensor([name in sample.labels for name in dataset.findings], dtype=torch.float32)
        rows.append({"pixel_values": sample.pixel_values.half(), "labels": labels})

    def collate(batch: list[Row]) -> Row:
        return {key: torch.stack([row[key] for row in batch]).float() for key in batch[0]}

    torch.manual_seed(seed)
    classifier = new_classifier(dataset.findings)
    train(ClassificationObjective(classifier), rows, trainer, work, seed, collate)
    partial = output_dir.with_suffix(".partial")
    classifier.half().save_pretrained(partial)
    os.replace(partial, output_dir)


@torch.no_grad()
def record(config: PretrainConfig, work: Path) -> None:
    """pretraining.json and samples.png beside the base: what each stage took, and what the result can do, held out."""
    accelerator, output_dir = Accelerator(), Path(config.output_dir)
    components = load_components(BaseConfig(name=str(output_dir))).to(accelerator.device).freeze()
    pictures = PicturesDataset("test", 200, config.seed, config.resolution)
    phantoms = PhantomDataset("test", 500, config.seed, config.resolution)

    def psnr_db(dataset: Any) -> float:
        pixels = torch.stack([dataset[i].pixel_values for i in range(200)]).to(accelerator.device)
        drawn = torch.cat(
            [components.vae.decode(components.vae.encode(x).latent_dist.mean).sample for x in pixels.split(20)]
        )
        return float((10 * torch.log10(4 / (drawn.clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3)))).mean())

    located = localization(
        components, pictures, config.evaluation, accelerator=accelerator, arm_dir=work / "maps", label="pictures"
    )
    captions = [pictures.caption(i) for i in range(16)]
    images = generate(components, captions, list(range(16)), config.resolution, config.evaluation)
    save_png(torch.cat([torch.cat(list(row), dim=-1) for row in images.split(8)], dim=-2), output_dir / "samples.png")
    features = PhantomFeatures(Path(config.classifier_dir))
    scores = torch.cat([features(phantoms[i].pixel_values[None])[1] for i in range(len(phantoms))])
    labels = torch.tensor([[name in phantoms.labels(i) for name in features.findings] for i in range(len(phantoms))])
    earlier = output_dir / "pretraining.json"  # of stages whose work folder is gone
    stages = read_json(earlier)["stages"] if earlier.exists() else {}
    recognised = read_json(earlier)["pictures"].get("recognition") if earlier.exists() else None
    for name in TRAINED:
        if (work / name / "cost.json").exists():
            stages[name] = read_json(work / name / "cost.json") | {"last": _last_losses(work / name)}
    if (work / "picture_classifier" / "model").exists():
        recognised = recognition(components, config, work)
    result = {
        "stages": stages,
        "vae_psnr_db": {"pictures": psnr_db(pictures), "phantoms": psnr_db(phantoms)},
        "pictures": {"localization": located, "recognition": recognised, "captions_of_samples": captions},
        "classifier": finding_auroc(scores, labels) | {"images": len(phantoms)},
        "unet_text_encoder": config.unet_text_encoder,
        "seed": config.seed,
        "provenance": provenance(),
    }
    write_json(output_dir / "pretraining.json", result)
    words = located["word"]
    if recognised is not None:
        drawn, real = recognised["generated"], recognised["real"]
        print(
            f"objects recognised in drawn pictures: AUC {drawn['auc']:.3f} {drawn['auc_ci']}, in real ones {real['auc']:.3f}"
        )
    print(
        f"VAE {result['vae_psnr_db']} dB; word AUC on held-out pictures {words['auc']:.3f} {words['auc_ci']}; "
        f"classifier AUC {result['classifier']['auc']:.3f}\nrecorded in {output_dir / 'pretraining.json'}\n"
        "next: accelerate launch recipes/tradeoff.py --config recipes/configs/phantom/tradeoff_quick.yaml"
    )


@torch.no_grad()
def recognition(components: Components, config: PretrainConfig, work: Path) -> dict[str, Any]:
    """Per object: AUC of the object classifier's scores of held-out pictures, and of what the base draws for their captions,
    against the objects that the captions name."""
    pictures = PicturesDataset("test", RECOGNISED_PICTURES, config.seed, config.resolution)
    model = ResNetForImageClassification.from_pretrained(work / "picture_classifier" / "model").float().eval()
    labels = torch.tensor([[kind in pictures.labels(i) for kind in pictures.findings] for i in range(len(pictures))])
    scores: dict[str, list[torch.Tensor]] = {"real": [], "generated": []}
    size = config.evaluation.batch_size
    for start in tqdm(range(0, len(pictures), size), desc="drawing pictures", unit="batch"):
        some = list(range(start, min(start + size, len(pictures))))
        captions = [pictures.caption(i) for i in some]
        drawn = generate(components, captions, some, config.resolution, config.evaluation)
        scores["generated"].append(model(drawn * 2 - 1).logits)
        scores["real"].append(model(torch.stack([pictures[i].pixel_values for i in some])).logits)
    found = {key: finding_auroc(torch.cat(parts), labels) for key, parts in scores.items()}
    return {
        key: value | {"per_finding": dict(zip(pictures.findings, value["per_finding"], strict=True))}
        for key, value in found.items()
    } | {"images": len(pictures)}


def _last_losses(work: Path) -> Row:
    lines = (work / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return {k: v for k, v in json.loads(lines[-1]).items() if k not in ("lr", "seconds")}


def rehearse(config: PretrainConfig) -> PretrainConfig:
    """One step of every stage on a few pictures, in a scratch folder."""
    one = {
        name: replace(getattr(config, name), max_steps=1, warmup_steps=0, checkpoint_every_steps=None)
        for name in TRAINED
    }
    return replace(
        config,
        stages=tuple(s for s in config.stages if s != "record"),
        pictures=256,
        classifier_images=64,
        picture_classifier_images=64,
        **one,
    )


def pretrain(config: PretrainConfig) -> None:
    quiet_libraries()
    if config.dry_run:
        print(to_yaml(config))
        with tempfile.TemporaryDirectory() as scratch:
            folders = {name: str(Path(scratch) / name) for name in ("work_dir", "output_dir", "classifier_dir")}
            pretrain(replace(rehearse(config), **folders, dry_run=False))
        print("dry run: every stage took one step; multiply its seconds by its max_steps. Nothing was written")
        return
    work = Path(config.work_dir)
    base, classifier = Path(config.output_dir), Path(config.classifier_dir)
    if "pictures" in config.stages and not (work / "pictures" / "pixels.npy").exists():
        render(PicturesDataset("train", config.pictures, config.seed, config.resolution), work / "pictures")
    if "tokenizer" in config.stages and not (work / "tokenizer").exists():
        captions = RenderedPictures(work / "pictures").captions
        train_tokenizer(captions, config.vocabulary_size).save_pretrained(work / "tokenizer")
    if "text_encoder" in config.stages and not (work / "text_encoder" / "text_encoder_with_projection").exists():
        train_text_encoder(config, RenderedPictures(work / "pictures"), work / "text_encoder")
    if "vae" in config.stages and not (work / "vae" / "vae").exists():
        train_vae(config, RenderedPictures(work / "pictures"), work / "vae")
    if "unet" in config.stages and not base.exists():
        train_unet(config, "unet", work, base)
    if "unet_longer" in config.stages and not (work / "unet_longer" / "before").exists():
        train_unet(config, "unet_longer", work, base)
    if "classifier" in config.stages and not classifier.exists():
        phantoms = PhantomDataset("train", config.classifier_images, config.seed, config.resolution)
        train_classifier(phantoms, config.classifier, work / "classifier", classifier, config.seed)
    if "picture_classifier" in config.stages and not (objects := work / "picture_classifier" / "model").exists():
        pictures = PicturesDataset("train", config.picture_classifier_images, config.seed, config.resolution)
        train_classifier(pictures, config.picture_classifier, objects.parent, objects, config.seed)
    if "record" in config.stages:
        record(config, work)


if __name__ == "__main__":
    main(pretrain, PretrainConfig)

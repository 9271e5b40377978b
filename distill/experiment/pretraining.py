"""Stages that make the bundled base and the classifiers from nothing, on generic captioned pictures, never on
phantoms."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from distill.config import BaseConfig, DenoisingConfig, LoraConfig, TrainerConfig
from distill.data.batch import Batch
from distill.data.cache import cache_latents
from distill.data.phantom.dataset import PhantomDataset
from distill.data.pictures import VOCABULARY, PicturesDataset
from distill.data.rendered import PictureRow, RenderedPictures
from distill.data.rows import TrainingRows
from distill.devices import loader_processes
from distill.draws import generator_at
from distill.errors import UserError
from distill.files import JsonObject, read_json, whole_folder, write_atomic, write_json
from distill.methods.base import Context
from distill.methods.denoising import Denoising
from distill.methods.options import DenoisingOptions
from distill.methods.pretraining import AutoencoderObjective, ClassificationObjective, ContrastiveObjective
from distill.models import Model, model_of
from distill.models.adapters import parameter_counts, prepare_training
from distill.models.embedded import (
    UNET_CHANNELS,
    ImageTower,
    new_classifier,
    new_pipeline,
    new_text_encoder,
    new_unet,
    new_vae,
)
from distill.models.export import name_base
from distill.models.loading import SUBSET_FILE, load_model
from distill.trainer import Collate, fit, make_accelerator

UNET_STAGES = ("unet", "unet_longer", "unet_clear")
"""Each trains the same U-Net further; the last on clear pictures."""


def train(
    objective: nn.Module,
    rows: Any,
    trainer: TrainerConfig,
    work: Path,
    seed: int,
    collate: Collate | None = None,
) -> None:
    """Fit, and record what it took in cost.json."""
    accelerator = make_accelerator(trainer, work)
    # A stage starts from the files of the one before, so that none is made longer once it is done.
    trainer = trainer.model_copy(update={"keep_last_state_gb": 0.0})
    result = fit(
        objective, rows, trainer, accelerator=accelerator, output_dir=work, seed=seed, collate=collate, label=work.name
    )
    total, trainable = parameter_counts(objective)
    objective.to("cpu")
    if not accelerator.is_main_process:
        return
    print(f"{work.name}: {total:,} parameters, {trainable:,} trained, {result.steps} steps, {result.seconds:.1f} s")
    cost = {"steps": result.steps, "seconds": round(result.seconds, 1), "parameters": trainable}
    write_json(work / "cost.json", cost | {"processes": accelerator.num_processes})


def stack_pixels(rows: list[PictureRow]) -> dict[str, torch.Tensor]:
    """{"pixel_values": (batch, 3, height, width)} of rows with pixels."""
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}


def train_text_encoder(pictures: RenderedPictures, trainer: TrainerConfig, work: Path, seed: int) -> None:
    """Contrastive training beside a small image tower, with the tokenizer of work/../tokenizer."""
    tokenizer = CLIPTokenizer.from_pretrained(work.parent / "tokenizer")

    def collate(rows: list[PictureRow]) -> dict[str, torch.Tensor]:
        captions = [row["caption"] for row in rows]
        # One batch in eight has unrelated words before the captions, so that all 77 positions are trained; the others
        # stay short, which is three times as fast.
        if len(captions[0]) % 8 == 0:
            captions = [f"{' '.join(VOCABULARY[7 * i % 400 :][: i % 50])} {c}" for i, c in enumerate(captions)]
        ids = tokenizer(captions, padding="longest", truncation=True, max_length=77, return_tensors="pt").input_ids
        return {"input_ids": ids, **stack_pixels(rows)}

    torch.manual_seed(seed)
    text_encoder = new_text_encoder(tokenizer)
    train(ContrastiveObjective(text_encoder, ImageTower(128)), pictures, trainer, work, seed, collate)
    with whole_folder(work / "text_encoder_with_projection") as folder:
        text_encoder.save_pretrained(folder)


def train_vae(
    pictures: RenderedPictures, trainer: TrainerConfig, work: Path, seed: int, *, resolution: int, kl_weight: float
) -> None:
    """Autoencoder on crops of half the side; its latents are scaled to a standard deviation of 1."""
    torch.manual_seed(seed)
    vae = new_vae(resolution)
    train(AutoencoderObjective(vae, kl_weight, crop_px=resolution // 2), pictures, trainer, work, seed, stack_pixels)
    with torch.no_grad():
        some = stack_pixels([pictures[i] for i in range(min(512, len(pictures)))])["pixel_values"]
        means = torch.cat([vae.encode(part).latent_dist.mean for part in some.split(32)])
    vae.register_to_config(scaling_factor=round(1 / float(means.std()), 4))
    with whole_folder(work / "vae") as folder:
        vae.save_pretrained(folder)


def train_unet(
    stage: str,
    pictures: PicturesDataset,
    trainer: TrainerConfig,
    work: Path,
    base: Path,
    seed: int,
    *,
    denoising: DenoisingConfig,
    text_encoder: Literal["frozen", "full"],
    parts: str | None = None,
    channels: tuple[int, int] = UNET_CHANNELS,
) -> None:
    """Train a new U-Net beside the trained parts (stage unet), or the U-Net of `base` further; `base` then has it.

    text_encoder: how the text encoder of stage unet is trained; full starts from a new one. In later stages it is frozen.
    parts: a pipeline whose tokenizer, text encoder and VAE stage unet takes; None takes those of the stages before it.
    channels: of the two levels of a new U-Net.
    """
    accelerator = make_accelerator(trainer, work / stage)
    torch.manual_seed(seed)
    if stage == "unet":
        pipeline = _untrained_pipeline(work, text_encoder, channels) if parts is None else _widened(parts, channels)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32)
    model = model_of(pipeline)
    how = text_encoder if stage == "unet" else "frozen"
    prepare_training(model, denoiser="full", text_encoder=how, lora=LoraConfig())
    model.to(accelerator.device)
    with accelerator.main_process_first():
        latents = cache_latents(
            pictures,
            model.vae,
            work / "latents",
            batch_size=8,
            flip=False,
            device=accelerator.device,
            num_workers=loader_processes(trainer.num_workers, accelerator.device),
        )
    method = Denoising(DenoisingOptions(), denoising)
    method.setup(model, _context(accelerator, work / stage, seed))
    rows = TrainingRows(pictures, model, denoising, latents=latents)
    # The seed gives the noise too: a later stage must not see that of an earlier one again.
    train(method, rows, trainer, work / stage, seed + UNET_STAGES.index(stage), Batch.stack)
    if accelerator.is_main_process:
        save_base(pipeline, stage, work, base)
    accelerator.wait_for_everyone()


def _widened(parts: str, channels: tuple[int, int]) -> StableDiffusionPipeline:
    """The pipeline `parts` with a new U-Net in place of its own."""
    pipeline = load_model(BaseConfig(name=parts)).pipeline
    if not isinstance(pipeline, StableDiffusionPipeline):
        raise UserError(f"parts {parts}: a {type(pipeline).__name__}; give a Stable Diffusion 1.x or 2.x pipeline")
    pipeline.register_modules(unet=new_unet(pipeline.vae, pipeline.text_encoder.config.hidden_size, channels))
    return pipeline


def _untrained_pipeline(
    work: Path, text_encoder: Literal["frozen", "full"], channels: tuple[int, int] = UNET_CHANNELS
) -> StableDiffusionPipeline:
    """A new U-Net beside the trained VAE and, unless the text encoder is to be trained in full, the trained text
    encoder."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
    if text_encoder == "frozen":
        encoder = CLIPTextModelWithProjection.from_pretrained(work / "text_encoder" / "text_encoder_with_projection")
    else:
        encoder = new_text_encoder(tokenizer)
    return new_pipeline(tokenizer, encoder, AutoencoderKL.from_pretrained(work / "vae" / "vae"), channels)


def _context(accelerator: Accelerator, work: Path, seed: int) -> Context:
    """For a method that needs nothing but its student."""

    def load(reference: str) -> Model:
        raise UserError(f"pretraining has no model {reference!r}")

    def batches(images: int) -> Iterator[Batch]:
        return iter(())

    return Context(
        generator=generator_at(seed, 0, 0),
        device=accelerator.device,
        is_main=accelerator.is_main_process,
        log_dir=work,
        frozen_dtype=torch.float32,
        dry_run=False,
        load=load,
        batches=batches,
        captions=lambda count: [],
        layer_scores=None,
        say=print,
    )


def stages_of(base: Path) -> JsonObject:
    """What each stage took that `base` has had, by name; empty if there is no base."""
    found: JsonObject = {}
    if (base / "pretraining.json").exists():
        found = read_json(base / "pretraining.json")["stages"]
    return found


def save_base(pipeline: StableDiffusionPipeline, stage: str, work: Path, base: Path) -> None:
    """Write the pipeline to `base`, in fp16; what it replaces stays beside it as .before.

    Measurements of the replaced weights (stage record, recipes/atlas.py) are not taken over.
    """
    pipeline.to("cpu", torch.float16)
    partial, before = base.with_suffix(".partial"), base.with_suffix(".before")
    shutil.rmtree(partial, ignore_errors=True)
    if stage == "unet":
        pipeline.save_pretrained(partial)
        name_base(partial, base.name)
    else:
        # Only the weights change; saved configurations would name the folder that they were loaded from.
        measured = shutil.ignore_patterns("pretraining.json", SUBSET_FILE, "samples.png")
        shutil.copytree(base, partial, ignore=measured)
        pipeline.unet.save_pretrained(partial / "unet")
        shutil.copy2(base / "unet" / "config.json", partial / "unet")
    declare_float32(partial / "text_encoder")
    write_json(partial / "pretraining.json", {"stages": stages_of(base) | {stage: cost_of(work / stage)}})
    if base.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(base, before)
    finish_saving(base)


def declare_float32(folder: Path) -> None:
    """Make stock transformers read the 16-bit weights in `folder` as float32.

    transformers takes the type of config.json, diffusers float32: without this the parts of one pipeline differ in
    type.
    """
    path = folder / "config.json"
    config = read_json(path) | {"dtype": "float32"}
    write_atomic(path, json.dumps(config, indent=2, sort_keys=True) + "\n")


def finish_saving(base: Path) -> None:
    """Do the last rename of save_base, also after a kill before it; pretraining.json is what save_base writes last."""
    partial = base.with_suffix(".partial")
    if not base.exists() and (partial / "pretraining.json").exists():
        os.replace(partial, base)


def train_classifier(
    dataset: PhantomDataset | PicturesDataset, trainer: TrainerConfig, work: Path, classifier_dir: Path, seed: int
) -> None:
    """Train a classifier on real images, never on generated ones.

    Of phantoms, its features serve FID and its scores the faithfulness to captions. Of pictures, it tells whether the
    base's own drawings are recognised.
    """
    rows = []
    for i in tqdm(range(len(dataset)), desc="images", unit="image"):
        sample = dataset[i]
        labels = torch.tensor([name in sample.labels for name in dataset.findings], dtype=torch.float32)
        rows.append({"pixel_values": sample.pixel_values.half(), "labels": labels})

    def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in batch]).float() for key in batch[0]}

    torch.manual_seed(seed)
    classifier = new_classifier(dataset.findings)
    train(ClassificationObjective(classifier), rows, trainer, work, seed, collate)
    with whole_folder(classifier_dir) as folder:
        classifier.half().save_pretrained(folder)
        declare_float32(folder)


def cost_of(work: Path) -> JsonObject:
    """Steps, seconds and parameters of a stage, and its last logged losses."""
    lines = (work / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    last = {k: v for k, v in json.loads(lines[-1]).items() if k not in ("lr", "seconds")}
    cost: JsonObject = read_json(work / "cost.json")
    return cost | {"last": last}

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

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, ResNetForImageClassification

from distill.cli import main, to_yaml
from distill.components import (
    SUBSET_FILE,
    Components,
    components_of,
    load_components,
    parameter_counts,
    prepare_training,
    read_json,
)
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
from distill.errors import UserError
from distill.evaluate import generate, save_png
from distill.localization import localization
from distill.metrics import bootstrap_interval, finding_auroc
from distill.metrics.features import PhantomFeatures
from distill.objectives import AutoencoderObjective, ClassificationObjective, ContrastiveObjective, DenoisingObjective
from distill.processes import process_state
from distill.provenance import provenance
from distill.runs import quiet_libraries, write_json
from distill.trainer import fit, make_accelerator

Row = dict[str, Any]
UNET_STAGES = ("unet", "unet_longer", "unet_clear")
TRAINED = ("text_encoder", "vae", *UNET_STAGES, "classifier", "picture_classifier")
HELD_OUT_PICTURES = 3000
"""Of each kind of pictures; those of one object are looked for among them."""
RECOGNISED_PICTURES = 400
"""Held-out captions whose drawings the object classifier looks at: the first this many, and of those that name one object,
at most this many, some of which are among the first."""


def train(objective: nn.Module, rows: Any, trainer: TrainerConfig, work: Path, seed: int, collate: Any = None) -> None:
    """Fit, and record what it took in cost.json."""
    accelerator = make_accelerator(trainer, work)
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
    """Stage unet: a new U-Net beside the trained parts. The later stages: the U-Net of output_dir, which they replace."""
    trainer = getattr(config, stage)
    accelerator = make_accelerator(trainer, work / stage)
    torch.manual_seed(config.seed)
    if stage != "unet":
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
    text_encoder_mode = config.unet_text_encoder if stage == "unet" else "frozen"
    prepare_training(components, method="full", text_encoder=text_encoder_mode, lora=LoraConfig())
    components.to(accelerator.device)
    clear = stage == "unet_clear"
    count = config.clear_pictures if clear else config.pictures
    pictures = PicturesDataset("train", count, config.seed, config.resolution, clear)
    with accelerator.main_process_first():
        latents = cache_latents(
            pictures,
            components.vae,
            work / "latents",
            batch_size=8,
            flip=False,
            device=accelerator.device,
            num_workers=trainer.num_workers,
        )
    denoising = DenoisingConfig(
        caption_dropout=config.caption_dropout, min_snr_gamma=config.min_snr_gamma if clear else None
    )
    objective = DenoisingObjective(components, denoising)
    rows = TrainingRows(pictures, components, latents=latents)
    # The seed gives the noise too: a later stage must not see that of an earlier one again.
    train(objective, rows, trainer, work / stage, config.seed + UNET_STAGES.index(stage))
    if accelerator.is_main_process:
        save_base(pipeline, stage, work, output_dir)
    accelerator.wait_for_everyone()


def stages_of(base: Path) -> dict[str, Any]:
    """What the stages of training took that `base` has had, by name; nothing if there is no base."""
    return read_json(base / "pretraining.json")["stages"] if (base / "pretraining.json").exists() else {}


def save_base(pipeline: StableDiffusionPipeline, stage: str, work: Path, output_dir: Path) -> None:
    """The pipeline as output_dir, in fp16 files that stock loaders read as float32; what it replaces stays beside it as
    .before. Measurements of the replaced weights (`record`, recipes/atlas.py) are not taken over."""
    pipeline.to("cpu", torch.float16)
    partial, before = output_dir.with_suffix(".partial"), output_dir.with_suffix(".before")
    shutil.rmtree(partial, ignore_errors=True)
    if stage == "unet":
        pipeline.save_pretrained(partial)
    else:
        # Only the weights change; saved configurations would name the folder that they were loaded from.
        measured = shutil.ignore_patterns("pretraining.json", SUBSET_FILE, "samples.png")
        shutil.copytree(output_dir, partial, ignore=measured)
        pipeline.unet.save_pretrained(partial / "unet")
        shutil.copy2(output_dir / "unet" / "config.json", partial / "unet")
    declare_float32(partial / "text_encoder")
    write_json(partial / "pretraining.json", {"stages": stages_of(output_dir) | {stage: cost_of(work / stage)}})
    if output_dir.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(output_dir, before)
    finish_saving(output_dir)


def declare_float32(folder: Path) -> None:
    """Make stock transformers read the 16-bit weights in `folder` as float32.

    transformers takes the type of config.json, diffusers float32: without this the parts of one pipeline differ in type.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def finish_saving(output_dir: Path) -> None:
    """The last of the renames of save_base, also after a kill before it; pretraining.json is what it writes last."""
    partial = output_dir.with_suffix(".partial")
    if not output_dir.exists() and (partial / "pretraining.json").exists():
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
    declare_float32(partial)
    os.replace(partial, output_dir)


@torch.no_grad()
def record(config: PretrainConfig, work: Path) -> None:
    """pretraining.json and samples.png beside the base: what each stage took, and what the result can do, held out."""
    accelerator, output_dir = Accelerator(), Path(config.output_dir)
    components = load_components(BaseConfig(name=str(output_dir))).to(accelerator.device).freeze()
    phantoms = PhantomDataset("test", 500, config.seed, config.resolution)
    domains = {
        name: PicturesDataset("test", HELD_OUT_PICTURES, config.seed, config.resolution, clear)
        for name, clear in (("pictures", False), ("clear_pictures", True))
    }

    def psnr_db(dataset: Any) -> float:
        pixels = torch.stack([dataset[i].pixel_values for i in range(200)]).to(accelerator.device)
        drawn = torch.cat(
            [components.vae.decode(components.vae.encode(x).latent_dist.mean).sample for x in pixels.split(20)]
        )
        return float((10 * torch.log10(4 / (drawn.clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3)))).mean())

    captions = [domains["clear_pictures"].caption(i) for i in range(16)]
    images = generate(components, captions, list(range(16)), config.resolution, config.evaluation)
    save_png(torch.cat([torch.cat(list(row), dim=-1) for row in images.split(8)], dim=-2), output_dir / "samples.png")
    features = PhantomFeatures(Path(config.classifier_dir))
    scores = torch.cat([features(phantoms[i].pixel_values[None])[1] for i in range(len(phantoms))])
    labels = torch.tensor([[name in phantoms.labels(i) for name in features.findings] for i in range(len(phantoms))])
    stages = stages_of(output_dir)
    for name in TRAINED:
        if name not in UNET_STAGES and (work / name / "cost.json").exists():
            stages[name] = cost_of(work / name)
    result = {
        "stages": stages,
        "vae_psnr_db": {name: psnr_db(dataset) for name, dataset in (domains | {"phantoms": phantoms}).items()},
        "captions_of_samples": captions,
        "classifier": finding_auroc(scores, labels) | {"images": len(phantoms)},
        "unet_text_encoder": config.unet_text_encoder,
        "seed": config.seed,
        "provenance": provenance(),
    }
    print(f"VAE {result['vae_psnr_db']} dB; classifier of phantoms: AUC {result['classifier']['auc']:.3f}")
    for name, pictures in domains.items():
        some = PicturesDataset("test", 200, config.seed, config.resolution, pictures.clear)
        located = localization(
            components, some, config.evaluation, accelerator=accelerator, arm_dir=work / f"maps_{name}", label=name
        )
        result[name] = {"localization": located, "recognition": None}
        words = located["word"]
        print(f"{name}: word AUC {words['auc']:.3f} {words['auc_ci']}")
        if not (work / "picture_classifier" / "model").exists():
            print(f"{name}: whether drawings are recognised was not measured, for want of the stage picture_classifier")
        else:
            result[name]["recognition"] = recognised = recognition(components, pictures, config, work)
            for key in ("generated", "real"):
                of = recognised[key]
                print(
                    f"{name}, {key}: objects recognised with AUC {of['auc']:.3f} {of['auc_ci']}, where the caption names "
                    f"one, top-1 {of['top1']:.3f} {of['top1_ci']}"
                )
    write_json(output_dir / "pretraining.json", result)
    print(
        f"recorded in {output_dir / 'pretraining.json'}\n"
        "next: accelerate launch recipes/tradeoff.py --config recipes/configs/phantom/tradeoff_quick.yaml"
    )


@torch.no_grad()
def recognition(
    components: Components, pictures: PicturesDataset, config: PretrainConfig, work: Path
) -> dict[str, Any]:
    """Whether the object classifier finds in what the base draws for held-out captions what they name, and in the real
    pictures of these captions. For any number of objects, per object: AUC. For captions of one object: top-1, the share
    whose object has the highest score of all (chance: 1 in 20)."""
    model = ResNetForImageClassification.from_pretrained(work / "picture_classifier" / "model").float().eval()
    kinds, size = pictures.findings, config.evaluation.batch_size
    single = [i for i in range(len(pictures)) if len(pictures.labels(i)) == 1][:RECOGNISED_PICTURES]
    scores: dict[str, dict[int, torch.Tensor]] = {"real": {}, "generated": {}}
    wanted = sorted({*range(RECOGNISED_PICTURES), *single})
    for start in tqdm(range(0, len(wanted), size), desc="drawing pictures", unit="batch"):
        some = wanted[start : start + size]
        captions = [pictures.caption(i) for i in some]
        drawn = generate(components, captions, some, config.resolution, config.evaluation)
        scores["generated"] |= zip(some, model(drawn * 2 - 1).logits, strict=True)
        real = torch.stack([pictures[i].pixel_values for i in some])
        scores["real"] |= zip(some, model(real).logits, strict=True)
    labels = torch.tensor([[kind in pictures.labels(i) for kind in kinds] for i in range(RECOGNISED_PICTURES)])
    found: dict[str, Any] = {"images": RECOGNISED_PICTURES, "one_object_images": len(single)}
    for key, of in scores.items():
        areas = finding_auroc(torch.stack([of[i] for i in range(RECOGNISED_PICTURES)]), labels)
        hits = [float(kinds[int(of[i].argmax())] == pictures.labels(i)[0]) for i in single]
        found[key] = areas | {
            "per_finding": dict(zip(kinds, areas["per_finding"], strict=True)),
            "top1": float(np.mean(hits)),
            "top1_ci": bootstrap_interval(hits, single, np.mean),
        }
    return found


def cost_of(work: Path) -> Row:
    """Steps, seconds and parameters of a stage, and its last logged losses."""
    lines = (work / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    last = {k: v for k, v in json.loads(lines[-1]).items() if k not in ("lr", "seconds")}
    return read_json(work / "cost.json") | {"last": last}


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
        clear_pictures=256,
        classifier_images=64,
        picture_classifier_images=64,
        **one,
    )


def pretrain(config: PretrainConfig) -> None:
    quiet_libraries()
    alone = ["dry_run"] if config.dry_run else [stage for stage in config.stages if stage not in UNET_STAGES]
    if alone and (processes := process_state().num_processes) > 1:
        raise UserError(
            f"{', '.join(alone)}: for one process, and this launch has {processes}; the stages {', '.join(UNET_STAGES)} "
            "take several: name them by --stages"
        )
    if config.dry_run:
        print(to_yaml(config))
        with tempfile.TemporaryDirectory() as scratch:
            folders = {name: str(Path(scratch) / name) for name in ("work_dir", "output_dir", "classifier_dir")}
            pretrain(replace(rehearse(config), **folders, dry_run=False))
        print("dry run: every stage took one step; multiply its seconds by its max_steps. Nothing was written")
        return
    work = Path(config.work_dir)
    base, classifier = Path(config.output_dir), Path(config.classifier_dir)
    with process_state().main_process_first():
        finish_saving(base)
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
    for stage in UNET_STAGES[1:]:
        if stage in config.stages and stage not in stages_of(base):
            train_unet(config, stage, work, base)
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

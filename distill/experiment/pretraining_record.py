"""What the bundled base can do on held-out images, recorded beside it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm
from transformers import ResNetForImageClassification

from distill.config import BaseConfig, FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.data.pictures import PicturesDataset
from distill.evaluation.drawing import generate
from distill.evaluation.images import save_png
from distill.evaluation.localization import localization
from distill.files import JsonObject, provenance, write_json
from distill.metrics import bootstrap_interval, finding_auroc
from distill.metrics.features import PhantomFeatures
from distill.models import Model, load_model

HELD_OUT_PICTURES = 3000
"""Of each kind of pictures; those of one object are looked for among them."""
RECOGNISED_PICTURES = 400
"""Held-out captions whose drawings the object classifier looks at: the first this many, and of those that name one
object, at most this many, some of which are among the first."""


@torch.no_grad()
def record(
    base: Path, classifier_dir: Path, work: Path, evaluation: FullEvaluation, *, resolution: int, seed: int
) -> JsonObject:
    """Measure the base and the classifiers, write samples.png beside the base, and return what pretraining.json
    holds."""
    accelerator = Accelerator()
    model = load_model(BaseConfig(name=str(base))).to(accelerator.device).freeze()
    phantoms = PhantomDataset("test", 500, seed, resolution)
    domains = {
        name: PicturesDataset("test", HELD_OUT_PICTURES, seed, resolution, clear)
        for name, clear in (("pictures", False), ("clear_pictures", True))
    }
    captions = [domains["clear_pictures"].caption(i) for i in range(16)]
    images = generate(model, captions, list(range(16)), resolution, evaluation)
    save_png(torch.cat([torch.cat(list(row), dim=-1) for row in images.split(8)], dim=-2), base / "samples.png")
    result: JsonObject = {
        "vae_psnr_db": {
            name: vae_psnr_db(model, dataset) for name, dataset in (domains | {"phantoms": phantoms}).items()
        },
        "captions_of_samples": captions,
        "classifier": classifier_auc(phantoms, classifier_dir),
        "seed": seed,
        "provenance": provenance(),
    }
    print(f"VAE {result['vae_psnr_db']} dB; classifier of phantoms: AUC {result['classifier']['auc']:.3f}")
    for name, pictures in domains.items():
        some = PicturesDataset("test", 200, seed, resolution, pictures.clear)
        located = localization(
            model, some, evaluation, accelerator=accelerator, arm_dir=work / f"maps_{name}", label=name
        )
        assert located is not None
        result[name] = {"localization": located, "recognition": None}
        print(f"{name}: word AUC {located['word']['auc']:.3f} {located['word']['auc_ci']}")
        classifier = work / "picture_classifier" / "model"
        if classifier.exists():
            result[name]["recognition"] = recognition(model, pictures, evaluation, classifier)
            _print_recognition(name, result[name]["recognition"])
        else:
            print(f"{name}: recognition was not measured, because stage picture_classifier was not run")
    return result


def write_record(base: Path, result: JsonObject, stages: JsonObject) -> None:
    """pretraining.json. stages: what each stage took."""
    path = write_json(base / "pretraining.json", {"stages": stages} | result)
    print(
        f"recorded in {path}\n"
        "next: accelerate launch recipes/tradeoff.py --config recipes/configs/phantom/tradeoff_quick.yaml"
    )


def vae_psnr_db(model: Model, dataset: PhantomDataset | PicturesDataset) -> float:
    """Mean peak signal-to-noise ratio of the VAE's reconstruction of the first 200 images."""
    pixels = torch.stack([dataset[i].pixel_values for i in range(200)]).to(model.vae.device)
    drawn = torch.cat([model.vae.decode(model.vae.encode(x).latent_dist.mean).sample for x in pixels.split(20)])
    return float((10 * torch.log10(4 / (drawn.clamp(-1, 1) - pixels).square().mean(dim=(1, 2, 3)))).mean())


def classifier_auc(phantoms: PhantomDataset, classifier_dir: Path) -> JsonObject:
    """AUC of the phantoms' classifier on real held-out phantoms."""
    features = PhantomFeatures(classifier_dir)
    scores = torch.cat([features(phantoms[i].pixel_values[None])[1] for i in range(len(phantoms))])
    labels = torch.tensor([[name in phantoms.labels(i) for name in features.findings] for i in range(len(phantoms))])
    return finding_auroc(scores, labels) | {"images": len(phantoms)}


@torch.no_grad()
def recognition(
    model: Model, pictures: PicturesDataset, evaluation: FullEvaluation, classifier_dir: Path
) -> JsonObject:
    """Whether the object classifier finds what captions name, in the base's drawings and in the real pictures.

    For any number of objects: AUC, per object. For captions of one object: top-1, the share of images whose object has
    the highest score of all (chance: 1 in 20).
    """
    classifier = ResNetForImageClassification.from_pretrained(classifier_dir).float().eval()
    kinds, size = pictures.findings, evaluation.batch_size
    single = [i for i in range(len(pictures)) if len(pictures.labels(i)) == 1][:RECOGNISED_PICTURES]
    scores: dict[str, dict[int, torch.Tensor]] = {"real": {}, "generated": {}}
    wanted = sorted({*range(RECOGNISED_PICTURES), *single})
    for start in tqdm(range(0, len(wanted), size), desc="drawing pictures", unit="batch"):
        some = wanted[start : start + size]
        captions = [pictures.caption(i) for i in some]
        drawn = generate(model, captions, some, pictures.resolution, evaluation)
        scores["generated"] |= zip(some, classifier(drawn * 2 - 1).logits, strict=True)
        real = torch.stack([pictures[i].pixel_values for i in some])
        scores["real"] |= zip(some, classifier(real).logits, strict=True)
    labels = torch.tensor([[kind in pictures.labels(i) for kind in kinds] for i in range(RECOGNISED_PICTURES)])
    found: JsonObject = {"images": RECOGNISED_PICTURES, "one_object_images": len(single)}
    for key, of in scores.items():
        areas = finding_auroc(torch.stack([of[i] for i in range(RECOGNISED_PICTURES)]), labels)
        hits = [float(kinds[int(of[i].argmax())] == pictures.labels(i)[0]) for i in single]
        found[key] = areas | {
            "per_finding": dict(zip(kinds, areas["per_finding"], strict=True)),
            "top1": float(np.mean(hits)),
            "top1_ci": bootstrap_interval(hits, single, np.mean),
        }
    return found


def _print_recognition(name: str, found: JsonObject) -> None:
    for key in ("generated", "real"):
        of = found[key]
        print(
            f"{name}, {key}: AUC of objects {of['auc']:.3f} {of['auc_ci']}; top-1 of captions with one object "
            f"{of['top1']:.3f} {of['top1_ci']}"
        )

"""Localization and quality of one model, as dictionaries of metrics.json.

Evaluation never imports training: it takes a base and, as a user would, a run folder (models.load_model).
Work is shared between the processes of `accelerate launch`; every process must call these functions.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from distill.config import FullEvaluation
from distill.data.cache import model_fingerprint
from distill.data.remembered import Remembered
from distill.data.sample import ImageCaptionDataset, group_key, patient_of
from distill.devices import channels_last
from distill.evaluation.detection import LEAST_IMAGES, NAMES
from distill.evaluation.drawing import (
    OF_IMAGES,
    distinct_images,
    drawn_images,
    evaluation_order,
    quality,
    real_images,
    sampler,
    save_features,
)
from distill.evaluation.explanation import Pictures, explain, one_of_each_image, real_pictures, summary, write_explained
from distill.evaluation.fidelity import Generated, compare
from distill.evaluation.images import read_png, save_png
from distill.evaluation.kept import digest, features_key, weights_of
from distill.evaluation.localization import localization, query_key
from distill.evaluation.memorization import memorization
from distill.evaluation.priors import priors_key
from distill.evaluation.protocols import Query, RealLatents, queries, with_subset
from distill.evaluation.similarity import image_text_similarity
from distill.evaluation.utility import Task
from distill.evaluation.word_maps import write_word_maps
from distill.files import JsonObject, write_atomic
from distill.metrics.features import Features
from distill.metrics.image_text import ImageText
from distill.metrics.memorization import CROWD, NEAR
from distill.models.bits import fewer_bits, megabytes
from distill.models.blocks import model_size
from distill.models.family import Model
from distill.tokens import ReadsText

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """What all arms of a run are compared on. asked: the queries of localization. copied_from: the training images that
    a generated image may be a copy of."""

    dataset: ImageCaptionDataset
    examples: list[int]
    features: Features | None
    real: Generated
    quality: JsonObject
    training: ImageCaptionDataset | None = None
    priors_dir: Path | None = None
    asked: Sequence[Query] = ()
    copied_from: ImageCaptionDataset | None = None
    run_dir: Path | None = None
    image_text: ImageText | None = None
    latents: RealLatents = field(default_factory=RealLatents)

    def made_of(self, model: Model, weights: str, config: FullEvaluation, resolution: int) -> dict[str, JsonObject]:
        """Part of the evaluation -> the hashes and options that decide it. features: None where they were not
        loaded."""
        located = with_subset(config, model).model_dump(mode="json", exclude={*OF_NO_NUMBER, *OF_QUALITY, *OF_UTILITY})
        drawn = config.model_dump(mode="json", include={*OF_QUALITY, *OF_BOTH})
        order = evaluation_order(self.dataset, self.examples, config.generated_images)
        captions = [
            [i, self.dataset.caption(i), self.dataset.fingerprint(i), self.dataset.labels(i)]
            + [patient for patient in [patient_of(self.dataset, i)] if patient]
            for i in order
        ]
        shown = [[i, self.dataset.caption(i)] for i in self.examples]
        pairs = [query_key(self.dataset, query) for query in self.asked]
        alike = [query_key(self.dataset, replace(query, tokens=())) for query in self.asked]  # for any tokenizer
        told = priors_key(self.dataset, self.training, self.asked, config) if self.asked else None
        compared: list[list[list[str]]] | None = None
        if self.copied_from is not None and "memorization" in config.parts:
            compared = [_known(pool) for pool in (self.copied_from, self.dataset)]
        tested = [[*known, self.dataset.labels(i)] for i, known in enumerate(_known(self.dataset))]
        extracted = digest(features_key(self.features)) if self.features else None
        return {
            "localization": {
                "weights": weights,
                "data": digest(pairs, told, shown),
                "pairs": digest(alike),
                "options": located,
            },
            "quality": {
                "weights": weights,
                "data": digest(captions, self.examples, resolution),
                "features": extracted,
                "options": drawn,
            },
            "memorization": {
                "weights": weights,
                "data": digest(captions, resolution),
                "compared": digest(compared, CROWD, NEAR) if compared else None,
                "features": extracted,
                "options": {key: drawn[key] for key in (*OF_IMAGES, "seed", "bootstrap_samples", "generated_images")},
            },
            "utility": {
                "weights": weights,
                "data": digest(captions, tested, resolution),
                "options": {key: drawn[key] for key in (*OF_IMAGES, "seed", "generated_images")}
                | config.model_dump(mode="json", include={*OF_UTILITY}),
            },
            "similarity": {
                "weights": weights,
                "data": digest(captions, resolution),
                "features": model_fingerprint(self.image_text) if self.image_text else None,
                "options": {key: drawn[key] for key in (*OF_IMAGES, "seed", "bootstrap_samples", "generated_images")},
            },
            "explanation": {
                "weights": weights,
                "data": digest(captions, _known(self.dataset), resolution, NAMES),
                "options": {key: drawn[key] for key in (*OF_IMAGES, "seed", "generated_images")},
            },
        }


OF_DRAWN = ("memorization", "utility", "similarity", "explanation")
"""Parts of an evaluation that look at the drawn images."""
EXPLAINED_IMAGES = 500
"""Generated images, at most, that the detector of the explanation sees; more tell it nothing new, and take minutes."""
OF_NO_NUMBER = ("parts", "batch_size", "memorization_limit", "image_text_model")
"""Options of evaluation that change none by themselves."""
OF_QUALITY = ("generated_images", "diversity_captions", "diversity_samples", "num_inference_steps", "guidance_scale",
              "scheduler", "features", "neighbours")  # fmt: skip
"""Options of evaluation that change quality alone."""
OF_UTILITY = ("utility_steps", "utility_seeds")
"""Options of evaluation that change utility alone."""
OF_BOTH = ("seed", "bootstrap_samples", "examples", "quantization", "dtype")
"""Options of evaluation that change quality as well as localization."""


def example_images(
    dataset: ImageCaptionDataset, model: ReadsText, config: FullEvaluation, accelerator: Accelerator
) -> list[int]:
    """Held-out images that are shown: the first that localization asks about, or the first of all.

    Raises UserError if there are regions and no text names any of their findings.
    """
    few = min(config.examples, config.localization_images)
    asked = queries(dataset, model, config.model_copy(update={"localization_images": few}), accelerator)
    return _shown(dataset, asked, config)


def _shown(dataset: ImageCaptionDataset, asked: Sequence[Query], config: FullEvaluation) -> list[int]:
    return distinct_images(dataset, [query.image for query in asked] or range(len(dataset)))[: config.examples]


def _known(dataset: ImageCaptionDataset) -> list[list[str]]:
    """Of each row its picture, and its patient where the data name one."""
    return [[dataset.fingerprint(i), *filter(None, [patient_of(dataset, i)])] for i in range(len(dataset))]


def held_out(
    dataset: ImageCaptionDataset,
    model: ReadsText,
    config: FullEvaluation,
    features: Features | None,
    *,
    accelerator: Accelerator,
    run_dir: Path,
    training: ImageCaptionDataset | None = None,
    copied_from: ImageCaptionDataset | None = None,
    image_text: ImageText | None = None,
) -> HeldOut:
    """Choose the example images, write them to real/, and score real images as if they were generated.

    FIDELITY of the real row is between the real images that the arms are compared with and as many others, of other
    patients, so that it shows what the values are at this number of images when nothing is wrong. training: for the
    prior `mean_mask`.
    copied_from: the training images for memorization. image_text: the model for similarity.
    """
    dataset = Remembered(dataset)
    asked = queries(dataset, model, config, accelerator)
    examples = _shown(dataset, asked, config)
    if accelerator.is_main_process:
        write_examples(dataset, examples, run_dir / "real")
    order = evaluation_order(dataset, examples, len(dataset))
    first, rest = order[: config.generated_images], order[config.generated_images :]
    people, contents = {group_key(dataset, i) for i in first}, {dataset.fingerprint(i) for i in first}
    free = (i for i in reversed(rest) if group_key(dataset, i) not in people)
    different = {key: i for i in free if (key := dataset.fingerprint(i)) not in contents}
    others = sorted(different.values(), key=rest.index)[: config.generated_images]
    real = real_images(dataset, first, features, accelerator, config.batch_size)
    if accelerator.is_main_process:
        save_features(real, dataset, features, run_dir / "real" / "features.safetensors")
    halves = Generated([], None, None)
    if features is not None and len(others) < len(first) and accelerator.is_main_process:
        logger.warning(
            "FID and its kin have no row of real images: it takes as many other held-out images%s, %d, and there are %d",
            " of other patients" if any(patient_of(dataset, i) for i in order) else "",
            len(first), len(others),
        )  # fmt: skip
    if features is not None and len(others) == len(first) >= 2:
        halves = real_images(dataset, others, features, accelerator, config.batch_size)
    result = compare(real, halves, dataset, config, features, is_floor=True)
    result |= {"diversity": None}
    return HeldOut(
        dataset, examples, features, real, result, training, run_dir / "real", asked, copied_from, run_dir,
        image_text,
    )  # fmt: skip


def evaluate(
    model: Model,
    against: HeldOut,
    config: FullEvaluation,
    *,
    resolution: int,
    accelerator: Accelerator,
    arm_dir: Path,
    label: str,
    parts: Sequence[str] | None = None,
    weights: str | None = None,
) -> JsonObject:
    """{"localization", "quality", "size", "seconds": {"localization_seconds", "evaluation_seconds"}} of one model, and
    of OF_DRAWN those that are measured.

    parts: those to measure, by default config.parts; the others are None. weights: kept.weights_of the model.
    """
    began = time.perf_counter()
    parts, weights = config.parts if parts is None else parts, weights or weights_of(model)
    model.to(accelerator.device).freeze()
    fewer_bits(model, config.dtype, config.quantization)
    stored = megabytes(model)
    shared: dict[str, Any] = {"accelerator": accelerator, "arm_dir": arm_dir, "examples": against.examples}
    own: dict[str, Any] = shared | {"label": label, "weights": weights}
    located = drawn = None
    features = [] if against.features is None else [against.features]
    with channels_last([*model.modules(), *features], accelerator.device):
        if "localization" in parts:
            of_data: dict[str, Any] = {
                "training": against.training,
                "priors_dir": against.priors_dir,
                "latents": against.latents,
            }
            located = localization(model, against.dataset, config, **own, **of_data)
        localization_seconds = time.perf_counter() - began
        if "localization" in parts:
            write_word_maps(model, against.dataset, config, **shared)
        of_images = bool(set(OF_DRAWN) & set(parts))
        if "quality" in parts or of_images:
            drawn = quality(
                model,
                against.dataset,
                config,
                resolution=resolution,
                features=against.features,
                real=against.real,
                keep_images=of_images,
                is_measured="quality" in parts,
                **own,
            )
        more = _of_images(model, against, config, accelerator, arm_dir, parts)
    seconds = {
        "localization_seconds": localization_seconds,
        "evaluation_seconds": time.perf_counter() - began,
    }
    scheduler = sampler(model, config)
    scheduler.set_timesteps(config.num_inference_steps)
    passes = len(scheduler.timesteps) * (2 if config.guidance_scale > 1 else 1)
    size = model_size(model, resolution) | {"denoiser_passes_an_image": passes, "megabytes": stored}
    returned: JsonObject = finite(
        {"localization": located, "quality": drawn if "quality" in parts else None, "size": size, "seconds": seconds}
    )
    return returned | more


def _of_images(
    model: Model,
    against: HeldOut,
    config: FullEvaluation,
    accelerator: Accelerator,
    arm_dir: Path,
    parts: Sequence[str],
) -> JsonObject:
    """The entries of OF_DRAWN, of the images in drawn/."""
    found: JsonObject = {}
    if "memorization" in parts:
        found["memorization"] = _memorization(model, against, config, accelerator, arm_dir)
    if "utility" in parts:
        found["utility"] = _utility(against, config, arm_dir)
    if "similarity" in parts:
        found["similarity"] = _similarity(against, config, accelerator, arm_dir)
    if "explanation" in parts:
        found["explanation"] = _explanation(model, against, config, accelerator, arm_dir)
    return found


def _memorization(
    model: Model, against: HeldOut, config: FullEvaluation, accelerator: Accelerator, arm_dir: Path
) -> JsonObject:
    assert against.copied_from is not None and against.run_dir is not None
    images, own = drawn_images(against.dataset, against.examples, config, arm_dir)
    found: JsonObject = memorization(
        model, against.dataset, against.copied_from, images, own, config, features=against.features,
        accelerator=accelerator, arm_dir=arm_dir, run_dir=against.run_dir,
    )  # fmt: skip
    return found


def _utility(against: HeldOut, config: FullEvaluation, arm_dir: Path) -> JsonObject:
    images, own = drawn_images(against.dataset, against.examples, config, arm_dir)
    return Task.of(against.dataset, own).measure(
        len(images), lambda k: read_png(images[k]) * 2 - 1, lambda k: against.dataset.labels(own[k]),
        steps=config.utility_steps, seeds=config.utility_seeds,
    )  # fmt: skip


def _similarity(against: HeldOut, config: FullEvaluation, accelerator: Accelerator, arm_dir: Path) -> JsonObject:
    images, own = drawn_images(against.dataset, against.examples, config, arm_dir)
    found: list[JsonObject] = [{}]
    if accelerator.is_main_process:
        captions = [against.dataset.caption(row) for row in own]
        assert against.image_text is not None
        found[0] = image_text_similarity(
            against.image_text.to(accelerator.device), lambda k: read_png(images[k]) * 2 - 1, captions,
            [group_key(against.dataset, row) for row in own], against.dataset, own, config,
        )  # fmt: skip
    broadcast_object_list(found)
    return found[0]


def _explanation(
    model: Model, against: HeldOut, config: FullEvaluation, accelerator: Accelerator, arm_dir: Path
) -> JsonObject:
    """Of one generated image for each real one; explain.py compares several sets."""
    dataset = against.dataset
    images, own = drawn_images(dataset, against.examples, config, arm_dir)
    file_of = dict(zip(own, images, strict=True))
    real, compared = explained_rows(dataset, against.examples, config.generated_images)
    drawn = Pictures(
        lambda places: torch.stack([read_png(file_of[real[place]]) * 2 - 1 for place in places]),
        [group_key(dataset, row) for row in real[:compared]],
        [dataset.caption(row) for row in real[:compared]],
    )
    return explained(dataset, real, compared, drawn, config, accelerator=accelerator, arm_dir=arm_dir, model=model)


def explained_rows(dataset: ImageCaptionDataset, examples: Sequence[int], count: int) -> tuple[list[int], int]:
    """Held-out rows of different images for the explanation of `count` generated ones, and how many of them, the
    first, at most EXPLAINED_IMAGES, are compared with those; the others serve the control."""
    order = evaluation_order(dataset, examples, len(dataset))
    compared = one_of_each_image(dataset, order[:count], EXPLAINED_IMAGES)
    return one_of_each_image(dataset, order, 2 * max(len(compared), LEAST_IMAGES)), len(compared)


def explained(
    dataset: ImageCaptionDataset,
    real: Sequence[int],
    compared: int,
    drawn: Pictures,
    config: FullEvaluation,
    *,
    accelerator: Accelerator,
    arm_dir: Path,
    model: Model | None = None,
) -> JsonObject:
    """The part `explanation` of metrics.json; writes explain.json. real, compared: see `explained_rows`."""
    comparisons = explain(
        real_pictures(dataset, real), compared, [drawn], seed=config.seed, batch_size=config.batch_size,
        accelerator=accelerator, model=model,
    )  # fmt: skip
    if accelerator.is_main_process:
        write_explained(arm_dir, comparisons, drawn)
    return summary(comparisons)


def finite(value: object) -> Any:
    """The same nested value with null for what is not a finite number: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_examples(dataset: ImageCaptionDataset, examples: Sequence[int], folder: Path) -> None:
    """real/examples.jsonl and the images it names."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for place, index in enumerate(examples):
        sample = dataset[index]
        save_png((sample.pixel_values + 1) / 2, folder / f"{place:04d}.png")
        regions = [{"finding": r.finding, "boxes": [list(box) for box in r.boxes]} for r in sample.regions]
        row = {"id": sample.id, "image": f"real/{place:04d}.png", "caption": sample.caption, "regions": regions}
        lines.append(json.dumps(row) + "\n")
    write_atomic(folder / "examples.jsonl", "".join(lines))

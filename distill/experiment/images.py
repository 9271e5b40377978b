"""Evaluate images that another tool made; no denoiser runs."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm

from distill.data.captions import query_words_for
from distill.data.readers.folder import FolderDataset
from distill.data.readers.image_folder import SUFFIXES
from distill.data.readers.records import RecordDataset
from distill.data.sample import group_key, size_ids
from distill.data_config import Fit, FolderData
from distill.errors import UserError
from distill.evaluation.drawing import evaluation_order, real_images
from distill.evaluation.evaluate import explained, explained_rows, finite
from distill.evaluation.explanation import Pictures, check_groups
from distill.evaluation.fidelity import compare, unknown_findings
from distill.evaluation.images import save_png
from distill.evaluation.memorization import memorization
from distill.evaluation.similarity import image_text_similarity
from distill.evaluation.utility import Task
from distill.experiment.run import Run
from distill.files import JsonObject
from distill.memory import peak_memory_gb
from distill.models import load_model
from distill.processes import process_state

METADATA = ("metadata.csv", "metadata.jsonl")
logger = logging.getLogger(__name__)


def read_images(
    folder: Path, resolution: int, fit: Fit = "crop", query_words: Mapping[str, Sequence[str]] | None = None
) -> RecordDataset:
    """The images of a folder with metadata.csv or metadata.jsonl: columns file_name and text, and labels if there is
    one. query_words: those of the held-out data, by which captions are compared alike.

    Raises UserError for missing captions, fewer than two images, damaged files, files of the same picture, and images
    of one colour.
    """
    name = next((name for name in METADATA if (folder / name).is_file()), None)
    if name is None:
        raise UserError(
            f"--images {folder} has neither {' nor '.join(METADATA)}; write one row an image, with the columns "
            "file_name and text (its caption), and if you like labels"
        )
    try:
        found = FolderDataset(
            FolderData(
                root=str(folder), metadata_file=name, resolution=resolution, fit=fit, test_split="all", split_column="none",
                box_column="none", mask_column="none", phrase_column="none", patient_column="none",
            ),
            "test",
        )  # fmt: skip
    except UserError as error:
        # The option that its advice names is one of the held-out data.
        said = str(error).replace(
            "; set data.allow_empty_captions true to accept it", "; write the caption of the image"
        )
        raise UserError(f"--images {folder} cannot be evaluated: {said}") from None
    # Those of the labels: they have no boxes, by which a folder's findings are named otherwise.
    found.findings = tuple(sorted({label for index in range(len(found)) for label in found.labels(index)}))
    found.query_words = {name: query_words_for(name, query_words or {}) for name in found.findings}
    _check_pixels(found, f"--images {folder}")
    listed = {found.image_key(index) for index in range(len(found))}
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if left := [file for file in files if file not in listed]:
        logger.warning(
            "--images %s: %d images, such as %s, are not in %s, and are left out", folder, len(left), min(left), name
        )
    if len(found) < 2:
        raise UserError(
            f"--images {folder} has {len(found)} image; quality needs at least 2, and means little below 100"
        )
    return found


def _check_pixels(images: RecordDataset, named: str) -> None:
    """Raise UserError for files of the same picture, however they were saved."""
    first: dict[bytes, str] = {}
    for index in tqdm(
        range(len(images)), desc="checking images", unit="image", disable=not process_state().is_main_process
    ):
        name, pixels = images.image_key(index), images[index].pixel_values
        other = first.setdefault(hashlib.sha256(pixels.numpy().tobytes()).digest(), name)
        if other != name:
            raise UserError(f"{named}: {name} and {other} are the same picture; keep one")


def _some(images: int, count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(images, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    return sorted(order)


def _say_findings(run: Run, ours: Sequence[str] | None, real: Sequence[str] | None) -> None:
    if ours and real and list(ours) != list(real):
        run.say(
            f"finding AUC of the images is the mean over {', '.join(ours)}, and that of real images over "
            f"{', '.join(real)}: do not compare the two"
        )


def evaluate_images(run: Run, images: RecordDataset) -> JsonObject:
    """The entry of metrics.json of `images`: each part that is asked for, but localization.

    FID and its kin, and utility, compare evaluation.generated_images of the images, at random, with as many held-out
    ones. In memorization each image is compared with all held-out images: which of them had its caption is not known.
    """
    config, began = run.evaluation, time.perf_counter()
    resolution = run.config.data.resolution
    other = sum(size_ids(images, k)[:2] != (resolution, resolution) for k in range(len(images)))
    if other:
        run.say(f"images: {other:,} of {len(images):,} are made squares of {resolution} px as the data are")
    # Those that may refuse the images come before all that takes time.
    explanation = _explanation(run, images) if "explanation" in config.parts else None
    task = _task(run, images) if "utility" in config.parts else None
    entry: JsonObject = {"localization": None, "quality": None}
    if "quality" in config.parts:
        entry["quality"] = _quality(run, images)
    if "memorization" in config.parts:
        entry["memorization"] = _memorization(run, images)
    if task is not None:
        entry["utility"] = _utility(run, images, task)
    if explanation is not None:
        entry["explanation"] = explanation()
    if "similarity" in config.parts:
        entry["similarity"] = _similarity(run, images)
    unknown = dict.fromkeys(("train_seconds", "steps", "trainable_parameters"))
    cost = {"peak_memory_gb": peak_memory_gb(), "evaluation_seconds": time.perf_counter() - began}
    returned: JsonObject = finite(entry | {"cost": unknown | cost})
    return returned


def _folder(run: Run) -> Path:
    return run.folder / "images"


def _quality(run: Run, images: RecordDataset) -> JsonObject:
    config, against = run.evaluation, run.against
    count = min(len(images), len(against.real.indices))
    chosen = _some(len(images), count, config.seed)
    if count < len(images):
        more = ", and there are no more of these"
        if count == config.generated_images:
            more = "; --evaluation.generated_images takes more"
        run.say(f"images: quality is that of {count:,} of {len(images):,}, against as many held-out ones{more}")
    if left_out := unknown_findings(images, against.features):
        run.say(f"finding AUC leaves out {', '.join(left_out)}, labels of the images: the classifier has no such class")
    made = real_images(images, chosen, against.features, run.accelerator, config.batch_size)
    found = compare(made, against.real, images, config, against.features) | {"diversity": None}
    _say_findings(run, found.get("finding_auc_of"), against.quality.get("finding_auc_of"))
    return found


def _memorization(run: Run, images: RecordDataset) -> JsonObject:
    accelerator = run.accelerator
    assert run.train is not None
    files = [_folder(run) / "drawn" / f"{k:06d}.png" for k in range(len(images))]
    for k in range(accelerator.process_index, len(images), accelerator.num_processes):
        save_png((images[k].pixel_values + 1) / 2, files[k])
    accelerator.wait_for_everyone()
    model = load_model(run.base).to(accelerator.device).freeze()
    return memorization(
        model, run.test, run.train, files, [-1] * len(files), run.evaluation, features=run.against.features,
        accelerator=accelerator, arm_dir=_folder(run), run_dir=run.folder,
    )  # fmt: skip


def _task(run: Run, images: RecordDataset) -> Task:
    task = Task.of(run.test, evaluation_order(run.test, run.examples, run.evaluation.generated_images))
    return task.named_in([images.labels(k) for k in range(len(images))])


def _utility(run: Run, images: RecordDataset, task: Task) -> JsonObject:
    config = run.evaluation
    drawn = _some(len(images), min(len(images), len(task.real)), config.seed)
    return task.measure(
        len(drawn), lambda k: images[drawn[k]].pixel_values, lambda k: images.labels(drawn[k]),
        steps=config.utility_steps, seeds=config.utility_seeds,
    )  # fmt: skip


def _explanation(run: Run, images: RecordDataset) -> Callable[[], JsonObject]:
    """A function that measures the explanation. Raises UserError as `check_groups` does."""
    config = run.evaluation
    real, compared = explained_rows(run.test, run.examples, config.generated_images)
    placed = _some(len(images), compared, config.seed)
    drawn = Pictures(
        lambda places: torch.stack([images[placed[place]].pixel_values for place in places]),
        [group_key(images, k) for k in placed],
        [images.image_key(k) for k in placed],
    )
    check_groups([group_key(run.test, row) for row in real], compared, [drawn.groups])
    return partial(
        explained, run.test, real, compared, drawn, config, accelerator=run.accelerator, arm_dir=_folder(run)
    )


def _similarity(run: Run, images: RecordDataset) -> JsonObject:
    config, rows, scores = run.evaluation, range(len(images)), run.against.image_text
    assert scores is not None
    return image_text_similarity(
        scores.to(run.accelerator.device), lambda k: images[k].pixel_values, [images.caption(k) for k in rows],
        [group_key(images, k) for k in rows], run.test,
        evaluation_order(run.test, run.examples, config.generated_images), config,
    )  # fmt: skip

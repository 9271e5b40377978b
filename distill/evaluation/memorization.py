"""Are generated images copies of training images? The entry `memorization` of metrics.json, and the most suspicious
pairs.

Images are compared in features, in latents (mean of the VAE's posterior, flattened) and in pixels (`thumbnails`). A
generated image is compared as it is and mirrored, with all others alike: a training may mirror its images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from tqdm.auto import tqdm

from distill.config import FullEvaluation
from distill.data.cache import SHARD_ROWS, cache_vectors, model_fingerprint, read_vectors
from distill.data.sample import ImageCaptionDataset, Sample, group_key, image_key
from distill.errors import UserError
from distill.evaluation.images import read_png, save_png
from distill.evaluation.kept import digest, features_key
from distill.files import JsonObject, write_atomic, write_tensors
from distill.metrics.bootstrap import numbered
from distill.metrics.features import Features
from distill.metrics.memorization import (
    THUMBNAIL_PX,
    Array,
    Closeness,
    Copies,
    Nearest,
    closeness,
    closeness_in_crowd,
    copies,
    near_copies,
    nearer,
    nearest,
    suspicion,
    thumbnails,
    verdict,
)
from distill.models.family import Model

PAIRS = 10
"""Most suspicious pairs of which a picture is written."""
CLOSENESS_IMAGES = 1000
"""Held-out images whose distance to the training images is measured."""
VIEWS = ("", "mirrored_")
"""Before the name of a space in the files of `_write_vectors`: of the image as it is, and of its mirror image."""
MakeVectors = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]
NEAR_SPACES = ("latents", "pixels")
"""Where near copies are looked for; a classifier's features may be alike for different images."""


class Pool:
    """The different images of a data set: of rows with one picture the first. place: fingerprint -> number here.
    groups: (images,) number of each one's patient."""

    def __init__(self, dataset: ImageCaptionDataset) -> None:
        self.dataset, self.rows, self.place = dataset, list[int](), dict[str, int]()
        for row in range(len(dataset)):
            if self.place.setdefault(dataset.fingerprint(row), len(self.rows)) == len(self.rows):
                self.rows.append(row)
        self.groups = numbered([group_key(dataset, row) for row in self.rows])

    findings: Sequence[str] = ()
    query_words: dict[str, Sequence[str]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.rows[index]]

    def caption(self, index: int) -> str:
        return self.dataset.caption(self.rows[index])

    def labels(self, index: int) -> tuple[str, ...]:
        return self.dataset.labels(self.rows[index])

    def fingerprint(self, index: int) -> str:
        return self.dataset.fingerprint(self.rows[index])

    def name(self, index: int) -> str:
        return image_key(self.dataset, self.rows[index])

    def image(self, index: int) -> torch.Tensor:
        """(3, height, width) in [0, 1]."""
        return (self[index].pixel_values + 1) / 2


def memorization(
    model: Model,
    held_out: ImageCaptionDataset,
    training: ImageCaptionDataset,
    images: Sequence[Path],
    own: Sequence[int],
    config: FullEvaluation,
    *,
    features: Features | None,
    accelerator: Accelerator,
    arm_dir: Path,
    run_dir: Path,
) -> JsonObject:
    """The `memorization` entry; writes memorization.jsonl, and memorization/*.png: generated, training and held-out
    image.

    images: files of generated images. own: the row of `held_out` whose caption each is of, or -1; an image is not
    compared with the held-out image of its own caption, for no training image is as close to its caption by
    construction.
    Vectors of training and held-out images are kept in real/compared. All processes make vectors, and the main one
    compares them.
    """
    make = partial(_vectors, model, features, accelerator.device)
    key = digest(model_fingerprint(model.vae), features_key(features), THUMBNAIL_PX)
    pools = Pool(training), Pool(held_out)
    if len(pools[1]) < 2:
        raise UserError(f"memorization needs at least 2 different held-out images; there are {len(pools[1])}")
    process = {"rank": accelerator.process_index, "world": accelerator.num_processes}
    batch_size = min(config.batch_size, 32)
    compared = run_dir / "real" / "compared"
    files = [cache_vectors(pool, make, compared, key, batch_size=batch_size, **process) for pool in pools]
    generated_files = _write_vectors(images, make, arm_dir / "memorization" / ".partial", batch_size, **process)
    accelerator.wait_for_everyone()
    entry: list[JsonObject] = [{}]
    if accelerator.is_main_process:
        generated = _read_and_remove(generated_files)
        left_out = np.array([pools[1].place[held_out.fingerprint(row)] if row >= 0 else -1 for row in own])
        entry = [_compare(generated, files, left_out, pools, images, config, arm_dir)]
    broadcast_object_list(entry)
    return entry[0]


def _vectors(
    model: Model, features: Features | None, device: torch.device, images: torch.Tensor
) -> dict[str, torch.Tensor]:
    """images: (batch, 3, height, width) in [-1, 1], rounded to 8 bits as files of images are."""
    rounded = ((images + 1) * 127.5).round() / 127.5 - 1
    pixels = rounded.to(device, model.vae.dtype, memory_format=torch.channels_last)
    latents = model.vae.encode(pixels).latent_dist.mean
    found = {"latents": latents.flatten(1).float().cpu(), "pixels": thumbnails(rounded)}
    if features is not None:
        found = {"features": features.to(device)(rounded.to(device))[0].flatten(1).cpu()} | found
    return found


def _write_vectors(
    images: Sequence[Path], make: MakeVectors, folder: Path, batch_size: int, *, rank: int, world: int
) -> list[Path]:
    """Write the vectors of this process's share of the images and of their mirror images; the files of all processes, in
    the order of the images."""
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    shares = [batches[k * len(batches) // world : (k + 1) * len(batches) // world] for k in range(world)]
    paths = [folder / f"{k}.safetensors" for k in range(world)]
    if shares[rank]:
        with torch.no_grad():
            bar = tqdm(shares[rank], desc="comparing images", unit="batch", disable=rank > 0)
            read = (torch.stack([read_png(path) for path in batch]) * 2 - 1 for batch in bar)
            parts = [(make(pixels), make(pixels.flip(-1))) for pixels in read]
        tensors = {
            f"{view}{name}": torch.cat([part[place][name] for part in parts])
            for place, view in enumerate(VIEWS)
            for name in parts[0][0]
        }
        if not all(value.isfinite().all() for value in tensors.values()):
            raise UserError(
                f"{shares[rank][0][0].parent}: a vector of an image is not finite; use base.frozen_dtype fp32"
            )
        write_tensors(paths[rank], tensors)
    return [path for path, share in zip(paths, shares, strict=True) if share]


def _read_and_remove(paths: Sequence[Path]) -> dict[str, tuple[torch.Tensor, ...]]:
    """Name -> vectors of all images, and of their mirror images."""
    parts = [load_file(path) for path in paths]
    plain, mirrored = VIEWS
    names = [name for name in parts[0] if not name.startswith(mirrored)]
    found = {
        name: tuple(torch.cat([part[view + name] for part in parts]) for view in (plain, mirrored)) for name in names
    }
    del parts  # they map the files
    shutil.rmtree(paths[0].parent)
    return found


def _compare(
    generated: Mapping[str, Sequence[torch.Tensor]],
    files: Sequence[Sequence[Path]],
    left_out: np.ndarray,
    pools: tuple[Pool, Pool],
    images: Sequence[Path],
    config: FullEvaluation,
    arm_dir: Path,
) -> JsonObject:
    """generated: vectors of the images, and of their mirror images. files: of the vectors of training and held-out
    images. left_out: the held-out image that is none for each image."""
    counts = len(pools[0]), len(pools[1]) - int((left_out >= 0).any())
    groups = pools[0].groups, pools[1].groups
    several = any(side.max() + 1 < len(side) for side in groups)
    draws = config.bootstrap_samples, config.seed
    near: dict[str, tuple[Nearest, Nearest]] = {}
    found: dict[str, Copies] = {}
    near_by: dict[str, Closeness] = {}
    crowded: list[tuple[Array, Array]] = []
    for space, views in generated.items():
        plain, mirrored = (
            [nearest(view, read_vectors(files[k], space), out) for k, out in ((0, None), (1, left_out))]
            for view in views
        )
        near[space] = nearer(plain[0], mirrored[0]), nearer(plain[1], mirrored[1])
        real = torch.cat([*read_vectors(files[1][: -(-CLOSENESS_IMAGES // SHARD_ROWS)], space)])[:CLOSENESS_IMAGES]
        away = nearest(real, read_vectors(files[0], space))
        apart = away.distance
        if space in NEAR_SPACES:
            own = [
                closeness_in_crowd(view, read_vectors(files[0], space), side[0])
                for view, side in zip(views, (plain, mirrored), strict=True)
            ]
            crowded.append((np.fmin(*own), closeness_in_crowd(real, read_vectors(files[0], space), away)))
        found[space] = copies(*near[space], *counts, *draws, patients=groups if several else None)
        near_by[space] = closeness(plain[0].distance, apart, *draws, groups=groups[1][: len(apart)])
    _write_pairs(near, pools, images, arm_dir)
    used = {"images": len(images), "training_images": len(pools[0]), "held_out_images": len(pools[1])}
    if several:
        used |= {
            f"{name}_patients": int(side.max()) + 1 for name, side in zip(("training", "held_out"), groups, strict=True)
        }
    near_ones = near_copies(*(np.fmin.reduce(side) for side in zip(*crowded, strict=True)))
    return {
        **verdict(found),
        **near_ones,
        **used,
        "spaces": {name: {**found[name], "closeness": near_by[name]} for name in found},
    }


def _write_pairs(
    near: dict[str, tuple[Nearest, Nearest]], pools: tuple[Pool, Pool], images: Sequence[Path], arm_dir: Path
) -> None:
    """A line for each image, the most suspicious first, and pictures of the first.

    An image is as suspicious as the geometric mean of its ratios in all spaces; shown are its neighbours in the space
    of the lowest.
    """
    ratios = {space: suspicion(*both) for space, both in near.items()}
    with np.errstate(divide="ignore"):
        score = np.exp(np.nan_to_num(np.mean([np.log(ratio) for ratio in ratios.values()], axis=0), nan=0.0))
    lines = []
    for place, i in enumerate(np.argsort(score, kind="stable").tolist()):
        space = min(ratios, key=lambda name: ratios[name][i])
        rows = [int(side.row[i]) for side in near[space]]
        training, held_out = (pool.name(row) for pool, row in zip(pools, rows, strict=True))
        row = {"image": images[i].name, "training": training, "held_out": held_out, "space": space, "ratio": score[i]}
        distances = {name: [float(side.distance[i]) for side in both] for name, both in near.items()}
        lines.append(json.dumps(row | {"distances": distances}) + "\n")
        if place < PAIRS:
            three = [read_png(images[i]), *(pool.image(r) for pool, r in zip(pools, rows, strict=True))]
            save_png(torch.cat(three, dim=-1), arm_dir / "memorization" / f"{place:02d}.png")
    for old in sorted((arm_dir / "memorization").glob("*.png"))[len(images) :]:
        old.unlink()
    write_atomic(arm_dir / "memorization.jsonl", "".join(lines))

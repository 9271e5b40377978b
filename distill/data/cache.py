"""Latents and text embeddings computed once, in safetensors files whose names are hashes of all that decides them.

A changed image, caption or model therefore looks for a file that is not there; a stale one is never met. Each file
holds up to SHARD_ROWS rows, so that a killed run keeps what it had finished. Files are written under a temporary name
and renamed, carry a checksum, and are mapped into memory when read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from distill.data.captions import names_side
from distill.data.sample import ImageCaptionDataset, Sample
from distill.errors import UserError
from distill.files import write_tensors

SHARD_ROWS = 256
"""Rows a file: at 512 px 256 rows of latents take 67 MB in fp32, twice that with flips."""

_FORMAT = "1"
_SINGLE = "embeddings"
_STALE_TEMPORARY_S = 3600.0


def model_fingerprint(module: nn.Module) -> str:
    """Hash of the class, the config and the bytes of all weights and buffers of `module`.

    Equal weights at another path or on another device give the same hash; another dtype gives another.
    """
    config = getattr(module, "config", {})
    values: Mapping[str, Any] = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    shape = {key: value for key, value in values.items() if not key.startswith("_") and key != "transformers_version"}
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([type(module).__name__, shape], sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def weights_fingerprint(modules: Iterable[nn.Module]) -> str:
    """Hash of the bytes of all weights and buffers, tensor by tensor on all cores: about a second for 1 GB a core."""
    named = [pair for module in modules for pair in sorted(module.state_dict().items())]
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda pair: hashlib.blake2b(_bytes(pair[1]), digest_size=16).hexdigest(), named)
        lines = [
            f"{name} {tensor.dtype} {tuple(tensor.shape)} {found}"
            for (name, tensor), found in zip(named, hashes, strict=True)
        ]
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()


class LatentCache:
    """Posterior mean and std of every row's latents, before the VAE's scaling factor.

    cache[i]: (mean, std), each (channels, height / f, width / f) in the type of the VAE's weights.
    cache.flipped(i): the same of the mirrored image, or None where a flip is not allowed.
    """

    def __init__(self, paths: Sequence[Path], flips: Sequence[bool]) -> None:
        self._shards = _Shards(paths)
        self._flips = tuple(flips)
        # Mirrored rows lie packed in their shard: place of each row among them.
        self._flip_rows: list[int] = []
        for index in range(len(self._flips)):
            before = 0 if index % SHARD_ROWS == 0 else self._flip_rows[-1] + self._flips[index - 1]
            self._flip_rows.append(before)

    def __len__(self) -> int:
        return len(self._flips)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard, row = divmod(index, SHARD_ROWS)
        return self._shards.row(shard, "mean", row), self._shards.row(shard, "std", row)

    def may_flip(self, index: int) -> bool:
        """Whether `flipped` has the row."""
        return self._flips[index]

    def flipped(self, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not self._flips[index]:
            return None
        shard, row = index // SHARD_ROWS, self._flip_rows[index]
        return self._shards.row(shard, "flipped_mean", row), self._shards.row(shard, "flipped_std", row)


class TextEmbeddingCache:
    """cache[caption]: what `encode` gave for it, without the batch dimension; a tensor or a tuple of tensors."""

    def __init__(self, paths: Sequence[Path], captions: Sequence[str]) -> None:
        self._shards = _Shards(paths)
        self._rows = {caption: row for row, caption in enumerate(captions)}
        self._names = sorted(self._shards.names(0)) if captions else []

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, caption: str) -> torch.Tensor | tuple[torch.Tensor, ...]:
        shard, row = divmod(self._rows[caption], SHARD_ROWS)
        tensors = tuple(self._shards.row(shard, name, row) for name in self._names)
        return tensors[0] if self._names == [_SINGLE] else tensors


def cache_latents(
    dataset: ImageCaptionDataset,
    vae: AutoencoderKL,
    folder: str | Path,
    *,
    batch_size: int,
    flip: bool,
    device: torch.device | str,
    num_workers: int = 0,
    captions: Sequence[str] | None = None,
) -> LatentCache:
    """Encode the rows of `dataset` that are not in `folder` yet; `vae` is moved to `device`.

    flip: also encode the mirrored image of each row whose caption names no side. captions: the texts of the rows that
    are trained on, where they are not those of `dataset`.
    Several processes may call this at once; let the main process go first (accelerate's main_process_first), or all
    encode the same. Raises UserError if latents are not finite or `folder` cannot be written.
    """
    model_hash = model_fingerprint(vae)
    texts = captions if captions is not None else [dataset.caption(index) for index in range(len(dataset))]
    flips = [flip and not names_side(text) for text in texts]
    rows = [(dataset.fingerprint(index), flips[index]) for index in range(len(dataset))]
    paths, missing = _plan(Path(folder), "latents", model_hash, rows)
    vae.to(device)

    def encode(indices: list[int], pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        views = {"": pixel_values}
        mirrored = [place for place, index in enumerate(indices) if flips[index]]
        if mirrored:
            views["flipped_"] = pixel_values[mirrored].flip(-1)
        for prefix, view in views.items():
            latent_dist = vae.encode(view.to(device, vae.dtype)).latent_dist
            found |= {prefix + "mean": latent_dist.mean, prefix + "std": latent_dist.std}
        return found

    fault = f"the VAE in {vae.dtype} gives latents that are not finite"
    _encode(dataset, paths, missing, encode, batch_size=batch_size, num_workers=num_workers, fault=fault)
    return LatentCache(paths, flips)


def cache_vectors(
    dataset: ImageCaptionDataset,
    make: Callable[[torch.Tensor], Mapping[str, torch.Tensor]],
    folder: str | Path,
    model_hash: str,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
) -> list[Path]:
    """Files that hold what `make` gives for the image of each row, for `read_vectors`; those that are missing are made.

    make: (batch, 3, height, width) in [-1, 1] -> name -> (batch, d). model_hash: of all that `make` depends on. Of
    several processes each makes its files; wait for all before they are read. Raises UserError as `cache_latents` does.
    """
    rows = [dataset.fingerprint(index) for index in range(len(dataset))]
    paths, missing = _plan(Path(folder), "vectors", model_hash, rows)
    own = [shard for shard in missing if shard % world == rank]
    fault = "a vector of an image is not finite"
    _encode(dataset, paths, own, lambda _, pixel_values: make(pixel_values), batch_size=batch_size, fault=fault)
    return paths


def read_vectors(paths: Sequence[Path], name: str) -> Iterator[torch.Tensor]:
    """(rows of a file, d) of each file of `cache_vectors` in turn."""
    for path in paths:
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor(name)


def _encode(
    dataset: ImageCaptionDataset,
    paths: Sequence[Path],
    missing: Sequence[int],
    make: Callable[[list[int], torch.Tensor], Mapping[str, torch.Tensor]],
    *,
    batch_size: int,
    num_workers: int = 0,
    fault: str,
) -> None:
    """Write the missing files with what `make` gives for rows and their pixels. fault: what to say of values not
    finite."""
    count = len(dataset)
    batches = [list(part) for shard in missing for part in _split(_shard_range(shard, count), batch_size)]
    loader = DataLoader(
        cast("Dataset[Sample]", dataset), batch_sampler=batches, collate_fn=_collate, num_workers=num_workers
    )
    parts: dict[str, list[torch.Tensor]] = {}
    with _progress("encoding images", sum(map(len, batches)), "image") as bar, torch.no_grad():
        for indices, (pixel_values, ids) in zip(batches, loader, strict=True):
            for name, value in make(indices, pixel_values).items():
                if not torch.isfinite(value).all():
                    raise UserError(f"{fault}, for an image of {', '.join(ids)}; use base.frozen_dtype fp32")
                parts.setdefault(name, []).append(value.cpu())
            bar.update(len(indices))
            shard = indices[0] // SHARD_ROWS
            if indices[-1] + 1 == _shard_range(shard, count).stop:
                _write(paths[shard], parts)
                parts = {}


def cache_text_embeddings(
    captions: Iterable[str],
    encode: Callable[[list[str]], torch.Tensor | tuple[torch.Tensor, ...]],
    folder: str | Path,
    model_hash: str,
    batch_size: int,
) -> TextEmbeddingCache:
    """Encode the distinct `captions` that are not in `folder` yet.

    encode: captions -> one tensor or a tuple of tensors (SDXL: hidden states and pooled), batch first.
    model_hash: must cover every text encoder and tokenizer that `encode` uses, and what else it depends on.
    Raises UserError if embeddings are not finite or `folder` cannot be written.
    """
    distinct = sorted(set(captions))
    paths, missing = _plan(Path(folder), "text", model_hash, distinct)
    total = sum(len(_shard_range(shard, len(distinct))) for shard in missing)
    with _progress("encoding captions", total, "caption") as bar, torch.no_grad():
        for shard in missing:
            parts: dict[str, list[torch.Tensor]] = {}
            for indices in _split(_shard_range(shard, len(distinct)), batch_size):
                batch = [distinct[index] for index in indices]
                encoded = encode(batch)
                single = isinstance(encoded, torch.Tensor)
                for place, value in enumerate((encoded,) if single else encoded):
                    if not torch.isfinite(value).all():
                        raise UserError(f"the text encoder gives embeddings that are not finite, for one of {batch}")
                    parts.setdefault(_SINGLE if single else str(place), []).append(value.cpu())
                bar.update(len(batch))
            _write(paths[shard], parts)
    return TextEmbeddingCache(paths, distinct)


class _Shards:
    """Reads rows of the files; handles are opened on first use, and not carried into data loader processes."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = tuple(paths)
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_paths": self._paths, "_open": {}}

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self._paths[shard], framework="pt")
        return self._open[shard]

    def names(self, shard: int) -> list[str]:
        return list(self._file(shard).keys())

    def row(self, shard: int, name: str, row: int) -> torch.Tensor:
        # A slice is a view of the mapped file: without the copy, writing to it would change what is read next.
        returned: torch.Tensor = self._file(shard).get_slice(name)[row : row + 1][0].clone()
        return returned


def _plan(folder: Path, kind: str, model_hash: str, rows: Sequence[object]) -> tuple[list[Path], list[int]]:
    """The file of each shard of `rows`, and the shards whose file is missing or damaged."""
    paths = []
    for start in range(0, len(rows), SHARD_ROWS):
        key = json.dumps([_FORMAT, model_hash, rows[start : start + SHARD_ROWS]])
        paths.append(folder / f"{kind}-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors")
    for temporary in folder.glob("*.tmp"):
        with suppress(OSError):  # another process may remove it, or own it
            if time.time() - temporary.stat().st_mtime > _STALE_TEMPORARY_S:
                temporary.unlink()
    return paths, [shard for shard, path in enumerate(paths) if not _is_intact(path)]


def _shard_range(shard: int, rows: int) -> range:
    return range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, rows))


def _split(indices: range, batch_size: int) -> list[range]:
    return [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]


def _collate(samples: list[Sample]) -> tuple[torch.Tensor, list[str]]:
    return torch.stack([sample.pixel_values for sample in samples]), [sample.id for sample in samples]


def _progress(description: str, total: int, unit: str) -> tqdm[NoReturn]:
    main = os.environ.get("LOCAL_RANK", "0") == "0"
    return tqdm(desc=description, total=total, unit=unit, disable=not total or not main, dynamic_ncols=True)


def _write(path: Path, parts: Mapping[str, list[torch.Tensor]]) -> None:
    """All of the file or nothing: a temporary file is renamed once it is whole."""
    tensors = {name: torch.cat(values).contiguous() for name, values in parts.items()}
    try:
        write_tensors(path, tensors, {"crc32": _checksum(tensors)})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the cache file '{path}' cannot be written: {error}; free some space, point data.cache_dir to a folder "
            "that can be written, or set trainer.cache_latents and trainer.cache_text_embeddings false"
        ) from error


def _is_intact(path: Path) -> bool:
    """Costs one read of the file, about a second a GB; a flipped bit would otherwise train unseen."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
            return (file.metadata() or {}).get("crc32") == _checksum(tensors)
    except (OSError, SafetensorError):
        return False


def _checksum(tensors: Mapping[str, torch.Tensor]) -> str:
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(_bytes(tensor), checksum)
    return f"{checksum:08x}"


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

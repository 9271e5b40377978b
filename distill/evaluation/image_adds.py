"""What an image adds to its own map: AUC of its map minus the AUC of other images' maps, against its mask.

Word AUC alone rewards maps that ignore the image, because findings have preferred places. This difference is 0 for a
map that is the same for every image. The other image's map is of its own text, which also names the finding.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distill.attention.heat_maps import normalize
from distill.config import FullEvaluation
from distill.evaluation.causal import CAUSAL
from distill.evaluation.protocols import PROTOCOLS, Query, at_size
from distill.files import JsonObject
from distill.metrics import macro_mean_interval

OTHER_IMAGES = 5
"""Other images with the same finding whose maps are scored against an image's mask."""
PIXELS_AT_ONCE = 2**22
"""Pixels that are ranked at a time: 32 MiB of float64."""
MAP_TOKENS = ("word", "eos", "padding")
"""Attention maps of a pair, in the order in which they are stacked."""

PAIR_MEASURES = ("image_adds", "within_prior")
"""What is made of the maps of all pairs together, and kept for each pair beside its scores."""

Array = NDArray[np.float64]
Row = Mapping[str, Any]


# --- maps of the pairs, kept beside their scores until all are there -------------------------------------------------


def map_tokens(config: FullEvaluation) -> tuple[str, ...]:
    """Maps of a pair, in the order in which they are stacked."""
    return (*MAP_TOKENS, *CAUSAL) if config.causal else MAP_TOKENS


def packed_pairs(
    query: Query,
    maps: torch.Tensor,
    masks: torch.Tensor,
    config: FullEvaluation,
    causal: torch.Tensor | None = None,
) -> list[JsonObject]:
    """For each pair of a query {"maps", "mask"} as text, so that a killed evaluation keeps them with the pair's scores.

    maps: (4 + pairs, height, width), as the protocol made them. masks: (pairs, side, side) bool. causal: (pairs, 2,
    height, width). The maps are kept in float32 at their own size, so that nothing is lost: at 64 x 64 latents 64 kB a
    pair. "maps" is None for protocol `vilouras`: it compares at the size of each image file, where maps of two images
    do not fit one mask.
    """
    protocol = PROTOCOLS[config.protocol]
    if protocol.size == "original":
        return [{"maps": None} for _ in query.findings]
    found = []
    for place, mask in enumerate(masks):
        word = maps[4 + place] if protocol.words == "finding" else maps[1]
        others = () if causal is None else causal[place]
        values = torch.stack([word, maps[2], maps[3], *others]).float().cpu().numpy()
        bits = zlib.compress(np.packbits(mask.cpu().numpy()).tobytes())
        found.append(
            {
                "maps": [list(values.shape), base64.b64encode(values.tobytes()).decode()],
                "mask": [list(mask.shape), base64.b64encode(bits).decode()],
            }
        )
    return found


def unpacked(row: Row) -> tuple[torch.Tensor, NDArray[np.uint8], tuple[int, int]]:
    """Maps (tokens, height, width) float32, the packed bits of the mask, and the mask's shape."""
    shape, text = row["maps"]
    maps = torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).reshape(shape).copy())
    (height, width), text = row["mask"]
    return maps, np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8), (height, width)


# --- the choice of other images, and the areas -----------------------------------------------------------------------


def choose_others(findings: Sequence[str], clusters: Sequence[str], order: Sequence[int]) -> list[tuple[int, ...]]:
    """For each pair the positions of up to OTHER_IMAGES pairs of other images with the same finding.

    The images of a finding stand in a circle in the order of a hash, and each takes those that follow it. So the choice
    depends on the names alone, and every map is used equally often. clusters: the image of each pair. order: of several
    pairs of one image and finding, the one with the lowest number stands for the image.
    """
    circles: dict[str, dict[str, int]] = {}
    for place in sorted(range(len(findings)), key=lambda p: order[p]):
        circles.setdefault(findings[place], {}).setdefault(clusters[place], place)
    following: dict[tuple[str, str], tuple[int, ...]] = {}
    for finding, images in circles.items():
        names = sorted(images, key=lambda image: hashlib.sha256(f"{finding}\n{image}".encode()).hexdigest())
        for start, image in enumerate(names):
            after = (names[start + 1 :] + names[:start])[:OTHER_IMAGES]
            following[finding, image] = tuple(images[name] for name in after)
    return [following[pair] for pair in zip(findings, clusters, strict=True)]


def twice_midranks(rows: torch.Tensor) -> torch.Tensor:
    """(N, P) float -> (N, P) float64: twice the rank of each value in its row, from 1; ties share their mean rank."""
    # On a CPU NumPy takes half of the time of torch.
    on_cpu = rows.device.type == "cpu"
    order = torch.from_numpy(np.argsort(rows.numpy(), axis=1)) if on_cpu else rows.argsort(dim=1)
    values, pixels = rows.gather(1, order), rows.shape[1]
    begins = torch.ones_like(values, dtype=torch.bool)
    begins[:, 1:] = values[:, 1:] != values[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    lengths = torch.diff(starts, append=starts.new_tensor([rows.numel()]))
    twice = torch.repeat_interleave((2 * (starts % pixels) + lengths + 1).double(), lengths)
    return torch.empty(rows.shape, dtype=torch.float64, device=rows.device).scatter_(1, order, twice.view(rows.shape))


def areas(twice: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """(maps, masks) float64: AUC of each map against each mask, equal to PixelAUROC. NaN for an empty or full mask.

    AUC = (R - n (n + 1) / 2) / (n (P - n)), with R the sum of the ranks inside, n pixels inside, P pixels
    (Mann-Whitney). All sums are of whole numbers and exact. twice: see `twice_midranks`. masks: (masks, P) bool.
    """
    inside = masks.double()
    count = inside.sum(dim=1)
    twice_u = twice @ inside.T - count * (count + 1)
    return twice_u / (2 * count * (masks.shape[1] - count))


def readers_of(others: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """For each pair the pairs against whose masks its map is scored: itself, and those that chose it as another."""
    readers: list[list[int]] = [[place] for place in range(len(others))]
    for place, chosen in enumerate(others):
        for other in chosen:
            readers[other].append(place)
    return readers


@torch.no_grad()
def areas_of_maps(
    maps: torch.Tensor, bits: Sequence[NDArray[np.uint8]], shape: tuple[int, int], config: FullEvaluation
) -> torch.Tensor:
    """(masks, maps) float64 on the CPU: AUC of each map (maps, height, width), at its device, against each mask.

    The maps are resized to `shape`, that of the masks, as the protocol does. bits: packed bits of each mask. Each map
    is ranked once for all masks.
    """
    unpacked_bits = np.unpackbits(np.stack(bits), axis=1, count=shape[0] * shape[1])
    masks = torch.from_numpy(unpacked_bits).bool().to(maps.device)
    parts = maps.split(max(1, PIXELS_AT_ONCE // masks.shape[1]))
    tables = [areas(twice_midranks(at_size(normalize(part), shape, config).flatten(1)), masks) for part in parts]
    return torch.cat(tables).T.cpu()


def minus_others(found: Mapping[tuple[int, int], torch.Tensor], others: Sequence[tuple[int, ...]]) -> Array:
    """(pairs, ...): mean over a pair's others of AUC(own map) - AUC(other's map); NaN without another.

    found: (pair of the mask, pair of the map) -> AUC, each of the same shape.
    """
    if not others:
        return np.zeros((0, 0))
    nothing = torch.full_like(found[0, 0], float("nan"))
    rows = [
        torch.stack([found[own, own] - found[own, other] for other in chosen]).mean(dim=0) if chosen else nothing
        for own, chosen in enumerate(others)
    ]
    return torch.stack(rows).numpy()


def differences(
    maps: Sequence[torch.Tensor],
    bits: Sequence[NDArray[np.uint8]],
    shape: tuple[int, int],
    others: Sequence[tuple[int, ...]],
    config: FullEvaluation,
    device: torch.device,
) -> Array:
    """(pairs, maps a pair): mean over the other images of AUC(own map) - AUC(other's map), against the own mask.

    NaN without another image, and where the mask is empty or full. maps: for each pair (N, height, width) float32.
    bits: packed bits of its mask, whose shape is `shape`. others: see `choose_others`.
    """
    found: dict[tuple[int, int], torch.Tensor] = {}
    for source, targets in enumerate(readers_of(others)):
        table = areas_of_maps(maps[source].to(device), [bits[target] for target in targets], shape, config)
        found |= {(target, source): row for target, row in zip(targets, table, strict=True)}
    return minus_others(found, others)


# --- entries of pairs.jsonl and metrics.json ---------------------------------------------------------------------------


def finish_rows(
    rows: Sequence[Row], names: Sequence[str], config: FullEvaluation, device: torch.device
) -> list[JsonObject]:
    """The lines of all pairs, with row["image_adds"] = {token: number or None} in the place of the maps.

    Lines that already have it stay as they are. names: of the findings.
    """
    tokens = map_tokens(config)
    if any("image_adds" not in row and row["maps"] is not None for row in rows):
        stored = [unpacked(row) for row in rows]
        others = choose_others(
            [names[row["finding"]] for row in rows], [row["cluster"] for row in rows], [row["query"] for row in rows]
        )
        shape = stored[0][2]
        values = differences([s[0] for s in stored], [s[1] for s in stored], shape, others, config, device)
    else:
        values = np.full((len(rows), len(tokens)), np.nan)
    finished = []
    for row, own in zip(rows, values.tolist(), strict=True):
        added = {token: value if np.isfinite(value) else None for token, value in zip(tokens, own, strict=True)}
        kept = {key: value for key, value in row.items() if key not in ("maps", "mask")}
        finished.append(kept if "image_adds" in row else kept | {"image_adds": added})
    return finished


def summary(rows: Sequence[Row], config: FullEvaluation) -> dict[str, JsonObject]:
    """token -> {"image_adds", "image_adds_ci", "other_image_auc", "image_adds_pairs"} and {"within_prior",
    "within_prior_ci", "within_prior_pairs"}, averaged as the protocol's AUC.

    rows: see `finish_rows`, and with "within_prior" where it was measured. The intervals are 95 % bootstraps over
    images, or patients, of the pairs' values.
    """
    macro = PROTOCOLS[config.protocol].metrics(config)["auc"].average == "macro"
    found = {}
    for token in map_tokens(config):
        entry: JsonObject = {}
        for key in PAIR_MEASURES:
            scored = [row for row in rows if row.get(key, {}).get(token) is not None]
            values = np.array([row[key][token] for row in scored])
            groups = np.array([row["finding"] if macro else 0 for row in scored])
            clusters = [row.get("group", row["cluster"]) for row in scored]
            interval = (
                macro_mean_interval(values, groups, clusters, config.bootstrap_samples, config.seed) if scored else None
            )
            entry |= {key: mean_over(values, groups), f"{key}_ci": list(interval) if interval else None}
            entry[f"{key}_pairs"] = len(scored)
            if key == "image_adds":
                own = np.array([row["scores"][token]["auc"] for row in scored])
                entry["other_image_auc"] = mean_over(own - values, groups)
        found[token] = entry
    return found


def mean_over(values: Array, groups: NDArray[np.int64]) -> float | None:
    """Mean over groups of the mean over each group's values; None without values."""
    return float(np.mean([values[groups == g].mean() for g in np.unique(groups)])) if len(values) else None

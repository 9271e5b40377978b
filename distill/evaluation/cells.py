"""The attention maps of every cross-attention layer at every timestep, and their scores on images with regions.

A cell is a cross-attention layer at a timestep. Its scores are the AUC of its maps, and what the image adds to them
(see `distill.evaluation.image_adds`). The atlas chooses by them, and so do gates.
Work is shared between the processes of `accelerate launch`; every process must call these functions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from tqdm.auto import tqdm

from distill.attention.heat_maps import to_image
from distill.attention.recording import attention_layers, record_attention
from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset, image_key
from distill.errors import UserError
from distill.evaluation.image_adds import MAP_TOKENS, areas_of_maps, choose_others, minus_others, readers_of
from distill.evaluation.protocols import Query, ground_truths, prepare_inputs, queries
from distill.models.family import Model

Indices = tuple[int, ...]
Values = NDArray[np.float64]
Areas = dict[tuple[int, int], torch.Tensor]
"""(pair of the mask, pair of the map) -> AUC of the map against the mask, for several maps of the pair."""
Measure = Literal["image_adds", "auc"]
"""A score of maps: what an image adds to its own map, or the AUC."""
MEASURES: tuple[Measure, ...] = ("image_adds", "auc")


@dataclass(frozen=True)
class Pairs:
    """The (image, finding) pairs of all processes whose masks are neither empty nor full.

    queries: (pairs,) number of each pair's query. places: its place among the query's findings. findings, images:
    (pairs,) indices in the data set. masks: packed bits of each mask. shape: of the masks. others: see `choose_others`.
    """

    queries: NDArray[np.int64]
    places: NDArray[np.int64]
    findings: NDArray[np.int64]
    images: NDArray[np.int64]
    masks: Sequence[NDArray[np.uint8]]
    shape: tuple[int, int]
    others: Sequence[Indices]
    readers: Sequence[Sequence[int]] = field(init=False)
    """See `readers_of`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "readers", readers_of(self.others))

    def __len__(self) -> int:
        return len(self.findings)

    def against_masks(
        self, maps: torch.Tensor, place: int, config: FullEvaluation
    ) -> Iterator[tuple[tuple[int, int], torch.Tensor]]:
        """Items of Areas: maps (N, height, width) of the pair `place` against each mask that they are scored against."""
        targets = self.readers[place]
        table = areas_of_maps(maps, [self.masks[target] for target in targets], self.shape, config)
        yield from (((target, place), row) for target, row in zip(targets, table, strict=True))

    def scores(self, found: Areas) -> dict[Measure, Values]:
        """(pairs, ...) of each measure. What the image adds is NaN for a pair without another image.

        found: what this process measured. Every process must call this, and gets the same.
        """
        whole = dict(gather_object(list(found.items())))
        own = np.stack([whole[place, place].numpy() for place in range(len(self))])
        return {"auc": own, "image_adds": minus_others(whole, self.others)}

    def mean(self, values: Values, measure: Measure) -> Values | None:
        """`macro_mean` of (pairs, ...) over the pairs that have the measure; None without any."""
        known = np.array([measure == "auc" or bool(others) for others in self.others])
        return macro_mean(values[known], self.findings[known]) if known.any() else None


@dataclass(frozen=True)
class Cells:
    """The maps of every layer at every timestep, and their scores.

    mine: the pairs of this process, as positions in `pairs`. maps: (mine, layers, timesteps, height, width) float32,
    attention on the finding's words, at latent size. scores: for each measure (pairs, token maps, layers, timesteps),
    in the order of MAP_TOKENS.
    """

    layers: tuple[str, ...]
    timesteps: Indices
    pairs: Pairs
    mine: Indices
    maps: torch.Tensor
    scores: Mapping[Measure, Values]

    def mean(self, measure: Measure) -> Values | None:
        """(token maps, layers, timesteps): mean over findings; None if no pair has the measure."""
        return self.pairs.mean(self.scores[measure], measure)


def macro_mean(values: Values, findings: NDArray[np.int64]) -> Values:
    """(pairs, ...) -> (...): mean over findings of the mean over the finding's pairs."""
    returned: Values = np.mean([values[findings == f].mean(axis=0) for f in np.unique(findings)], axis=0)
    return returned


@torch.no_grad()
def compute_cells(
    model: Model,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    timesteps: Sequence[int],
    *,
    accelerator: Accelerator,
    by: Measure = "image_adds",
    label: str = "",
) -> Cells:
    """The cells of all cross-attention layers for the first `config.localization_images` images that have regions.

    timesteps: in ascending order. by: a measure that some pair must have; all are computed. The maps stay in memory:
    4 bytes x pairs x layers x timesteps x latent places, shared between the processes. Raises UserError if no region
    can be scored, or no pair has the measure.
    """
    asked = queries(dataset, model, config, accelerator)
    layers = attention_layers(model.denoiser)
    numbers = list(range(len(asked)))[accelerator.process_index :: accelerator.num_processes]
    pairs = find_pairs(asked, numbers, dataset, config, by)
    own = set(numbers)
    mine = tuple(place for place, number in enumerate(pairs.queries.tolist()) if number in own)
    maps: dict[int, torch.Tensor] = {}
    found: Areas = {}
    bar = tqdm(total=len(numbers), desc=f"{label} atlas", unit="image", disable=not accelerator.is_main_process)
    with record_attention(model.denoiser) as recorder:
        for start in range(0, len(numbers), config.batch_size):
            batch = numbers[start : start + config.batch_size]
            rows = {place: batch.index(number) for place in mine if (number := int(pairs.queries[place])) in batch}
            samples = [dataset[asked[number].image] for number in batch]
            inputs = prepare_inputs(model, samples, [asked[number] for number in batch], accelerator.device)
            recorder.reduce = partial(_chosen_columns, inputs.chosen)
            steps: dict[int, list[torch.Tensor]] = {place: [] for place in rows}
            scored: dict[tuple[int, int], list[torch.Tensor]] = {}
            for by_layer in inputs.renoised(timesteps, config.seed, recorder) if rows else ():
                images = torch.stack([to_image(by_layer[n], recorder.sizes[n], inputs.size) for n in layers], dim=1)
                for place, row in rows.items():
                    columns = [4 + int(pairs.places[place]), 2, 3]  # in the order of MAP_TOKENS
                    tokens = images[row][:, columns].transpose(0, 1)
                    steps[place].append(tokens[0].cpu())
                    for pair, areas in pairs.against_masks(tokens.flatten(0, 1), place, config):
                        scored.setdefault(pair, []).append(areas.view(len(MAP_TOKENS), len(layers)))
            maps |= {place: torch.stack(images, dim=1) for place, images in steps.items()}
            found |= {pair: torch.stack(areas, dim=-1) for pair, areas in scored.items()}
            bar.update(len(batch))
    bar.close()
    stacked = (
        torch.stack([maps[place] for place in mine]) if mine else torch.zeros(0, len(layers), len(timesteps), 1, 1)
    )
    return Cells(tuple(layers), tuple(timesteps), pairs, mine, stacked.float(), pairs.scores(found))


def find_pairs(
    asked: Sequence[Query], numbers: Sequence[int], dataset: ImageCaptionDataset, config: FullEvaluation, by: Measure
) -> Pairs:
    """The pairs of the queries `asked`, of which this process reads the masks of `numbers`.

    Raises UserError without any pair, and if none has the measure `by`.
    """
    own = []
    for number in numbers:
        query = asked[number]
        masks, _ = ground_truths(query, dataset[query.image], dataset.findings, config)
        for place, (finding, mask) in enumerate(zip(query.findings, masks, strict=True)):
            if mask.any() and not mask.all():
                row = (number, place, finding, query.image, image_key(dataset, query.image))
                own.append((row, np.packbits(mask.numpy()), tuple(mask.shape)))
    gathered = sorted(gather_object(own), key=lambda one: one[0])
    if not gathered:
        raise UserError("no validation image has a region that can be scored: each is empty or the whole image")
    rows, bits, shapes = zip(*gathered, strict=True)
    of_query, places, findings, images, names = zip(*rows, strict=True)
    others = choose_others([dataset.findings[finding] for finding in findings], names, of_query)
    if by == "image_adds" and not any(others):
        raise UserError(
            f"no finding has a region in two of the {len(set(names))} validation images that were looked at, so what an "
            "image adds to its map cannot be measured; raise validation_images (atlas.py) or method.gate_images (a gate)"
        )
    return Pairs(
        queries=np.array(of_query, dtype=np.int64),
        places=np.array(places, dtype=np.int64),
        findings=np.array(findings, dtype=np.int64),
        images=np.array(images, dtype=np.int64),
        masks=bits,
        shape=shapes[0],
        others=others,
    )


def _chosen_columns(chosen: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.mean(dim=1) @ chosen

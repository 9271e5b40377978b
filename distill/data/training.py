"""Rows of a captioned data set as the objectives want them."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from distill.components import Components
from distill.data.cache import LatentCache, TextEmbeddingCache
from distill.data.captions import find_words, insert_labels, names_side, token_groups, token_spans
from distill.data.sample import ImageCaptionDataset

REGION_SIZE = 32
"""Side of the grid that regions are kept on, in cells: SD 1.x attends at 64, 32, 16 and 8."""


def training_caption(dataset: ImageCaptionDataset, index: int, insert: Literal["none", "first", "random"]) -> str:
    """The caption of a training row, with the image's labels in it if that is asked for."""
    caption = dataset.caption(index)
    return caption if insert == "none" else insert_labels(caption, dataset.labels(index), insert, index)


class TrainingRows(Dataset[dict[str, Any]]):
    """Row i: latents_mean, latents_std (or pixel_values), input_ids_k (or prompt_embeds and pooled), groups, droppable.

    groups: (tokens,) codes of the token groups. droppable: whether caption dropout may take this caption.
    With `flip`, rows also have flippable (the caption names no side) and, with cached latents, latents_mean_flipped and
    latents_std_flipped; the objective mirrors half of the flippable ones. With `label_tokens`, rows also have label_tokens:
    (tokens,) bool, the words of the caption that name a label of the image. With `regions`, also regions: (tokens, S, S)
    uint8, 1 where the label that a word names is, with S = REGION_SIZE. insert: see `captions.insert_labels`.
    """

    def __init__(
        self,
        dataset: ImageCaptionDataset,
        components: Components,
        *,
        latents: LatentCache | None = None,
        text: TextEmbeddingCache | None = None,
        drop_only_label: str | None = None,
        flip: bool = False,
        insert: Literal["none", "first", "random"] = "none",
        label_tokens: bool = False,
        regions: bool = False,
    ) -> None:
        self.dataset, self.components, self.latents, self.text = dataset, components, latents, text
        self.drop_only_label, self.flip = drop_only_label, flip
        self.insert, self.label_tokens, self.regions = insert, label_tokens, regions
        self._regions: dict[int, dict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def caption(self, index: int) -> str:
        return training_caption(self.dataset, index, self.insert)

    def __getitem__(self, index: int) -> dict[str, Any]:
        caption = self.caption(index)
        row: dict[str, Any] = {}
        flippable = self.flip and not names_side(caption)
        if self.flip:
            row["flippable"] = torch.tensor(flippable)
        if self.latents is not None:
            row["latents_mean"], row["latents_std"] = self.latents[index]
            if self.flip:
                mirrored = self.latents.flipped(index) or self.latents[index]
                row["latents_mean_flipped"], row["latents_std_flipped"] = mirrored
        else:
            row["pixel_values"] = self.dataset[index].pixel_values
        if self.text is not None:
            embeds = self.text[caption]
            pair = (embeds,) if isinstance(embeds, torch.Tensor) else embeds
            row |= zip(("prompt_embeds", "pooled"), pair, strict=False)
        else:
            for i, ids in enumerate(self.components.tokenize([caption])):
                row[f"input_ids_{i}"] = ids[0]
        row["groups"] = token_groups(self.components.tokenizers[0], caption, self.components.max_tokens)
        labels = self.dataset.labels(index)
        length = self.components.max_tokens
        if self.label_tokens:
            row["label_tokens"] = torch.zeros(length, dtype=torch.bool)
            row["label_tokens"][[k for label in labels for k in self._tokens_of(label, caption)]] = True
        if self.regions:
            row["regions"] = torch.zeros(length, REGION_SIZE, REGION_SIZE, dtype=torch.uint8)
            for label, mask in self._regions_of(index).items():
                for k in self._tokens_of(label, caption):
                    row["regions"][k] |= mask
        row["droppable"] = torch.tensor(self.drop_only_label is None or self.drop_only_label in labels)
        if self.components.is_sdxl:
            row["time_ids"] = torch.tensor(self._time_ids(index), dtype=torch.float32)
        return row

    def _tokens_of(self, label: str, caption: str) -> list[int]:
        words = (label, *self.dataset.query_words.get(label, ()))
        return token_spans(
            self.components.tokenizers[0], caption, find_words(caption, words), self.components.max_tokens
        )

    def _regions_of(self, index: int) -> dict[str, torch.Tensor]:
        """Finding -> (S, S) uint8, kept from the first time on, so that no later epoch decodes the image for it."""
        if index not in self._regions:
            self._regions[index] = {
                region.finding: (F.adaptive_max_pool2d(region.mask[None].float(), REGION_SIZE)[0] > 0).to(torch.uint8)
                for region in self.dataset[index].regions
            }
        return self._regions[index]

    def _time_ids(self, index: int) -> tuple[int, ...]:
        sample = self.dataset[index]
        return (*sample.original_size, *sample.crop_top_left, *sample.pixel_values.shape[-2:])

"""Rows of a captioned data set as the objectives want them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from distill.config import DenoisingConfig
from distill.data.cache import LatentCache, TextEmbeddingCache
from distill.data.captions import NO_LABEL, insert_labels, names_side, text_of_labels
from distill.data.sample import ImageCaptionDataset
from distill.errors import UserError
from distill.models.family import Model
from distill.tokens import find_words, token_groups, token_spans

REGION_SIZE = 32
"""Side of the grid that regions are kept on, in cells: SD 1.x attends at 64, 32, 16 and 8."""


def training_caption(dataset: ImageCaptionDataset, index: int, config: DenoisingConfig) -> str:
    """The text of a training row: its caption, or what denoising.training_text and insert_labels make of its labels."""
    labels = dataset.labels(index)
    if config.training_text == "caption":
        text = dataset.caption(index)
    else:
        text = text_of_labels(labels, config.paraphrases if config.training_text == "paraphrases" else None, index)
    return text if config.insert_labels == "none" else insert_labels(text, labels, config.insert_labels, index)


def check_training_text(dataset: ImageCaptionDataset, model: Model, config: DenoisingConfig, *, truncate: bool) -> None:
    """UserError if a label has no paraphrase, or, without `truncate`, if a text made of labels is longer than the text
    encoder reads."""
    if config.training_text == "paraphrases":
        present = {label for i in range(len(dataset)) for label in dataset.labels(i)}
        if missing := sorted(label for label in present if not config.paraphrases.get(label)):
            raise UserError(f"denoising.paraphrases has no sentence for {', '.join(missing)}; give each at least one")
    if truncate or (config.training_text == "caption" and config.insert_labels == "none"):
        return  # the data set has checked its own captions
    texts = [training_caption(dataset, i, config) for i in range(len(dataset))]
    for tokenizer in model.tokenizers:
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]
        long = [i for i, length in enumerate(lengths) if length > model.max_tokens]
        if long:
            raise UserError(
                f"denoising.training_text and insert_labels: {len(long)} training texts are longer than the "
                f"{model.max_tokens} tokens that the text encoder reads, the first of row {long[0]}: {texts[long[0]]!r}"
            )


class TrainingRows(Dataset[dict[str, Any]]):
    """Row i: latents_mean, latents_std (or pixel_values), input_ids_k (or prompt_embeds and pooled), groups, droppable, and
    size_ids for a family that reads the image's size.

    groups: (tokens,) codes of the token groups. droppable: whether caption dropout may take this caption.
    With `flip`, rows also have flippable (the caption names no side) and, with cached latents, latents_mean_flipped and
    latents_std_flipped; the objective mirrors half of the flippable ones. With `label_tokens`, rows also have label_tokens:
    (tokens,) bool, the words of the caption that name a label of the image. With `regions`, also regions: (tokens, S, S)
    uint8, 1 where the label that a word names is, with S = REGION_SIZE. denoising: what the texts are; None for the captions.
    """

    def __init__(
        self,
        dataset: ImageCaptionDataset,
        model: Model,
        *,
        latents: LatentCache | None = None,
        text: TextEmbeddingCache | None = None,
        drop_only_label: str | None = None,
        flip: bool = False,
        denoising: DenoisingConfig | None = None,
        label_tokens: bool = False,
        regions: bool = False,
    ) -> None:
        self.dataset, self.model, self.latents, self.text = dataset, model, latents, text
        self.drop_only_label, self.flip = drop_only_label, flip
        self.denoising = denoising or DenoisingConfig()
        self.label_tokens, self.regions = label_tokens, regions
        self._regions: dict[int, dict[str, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def caption(self, index: int) -> str:
        return training_caption(self.dataset, index, self.denoising)

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
            for i, ids in enumerate(self.model.tokenize([caption])):
                row[f"input_ids_{i}"] = ids[0]
        row["groups"] = token_groups(self.model.tokenizers[0], caption, self.model.max_tokens)
        labels = self.dataset.labels(index)
        length = self.model.max_tokens
        if self.label_tokens:
            row["label_tokens"] = torch.zeros(length, dtype=torch.bool)
            row["label_tokens"][[k for label in labels for k in self._tokens_of(label, caption)]] = True
        if self.regions:
            row["regions"] = torch.zeros(length, REGION_SIZE, REGION_SIZE, dtype=torch.uint8)
            limit = self.denoising.region_images
            for label, mask in self._regions_of(index).items() if limit is None or index < limit else ():
                for k in self._tokens_of(label, caption):
                    row["regions"][k] |= mask
        row["droppable"] = torch.tensor(self.drop_only_label is None or self.drop_only_label in (labels or (NO_LABEL,)))
        if self.model.family.reads_size:
            row["size_ids"] = torch.tensor(self.dataset[index].size_ids, dtype=torch.float32)
        return row

    def _tokens_of(self, label: str, caption: str) -> list[int]:
        words = (label, *self.dataset.query_words.get(label, ()))
        return token_spans(self.model.tokenizers[0], caption, find_words(caption, words), self.model.max_tokens)

    def _regions_of(self, index: int) -> dict[str, torch.Tensor]:
        """Finding -> (S, S) uint8, kept from the first time on, so that no later epoch decodes the image for it."""
        if index not in self._regions:
            self._regions[index] = {
                region.finding: (F.adaptive_max_pool2d(region.mask[None].float(), REGION_SIZE)[0] > 0).to(torch.uint8)
                for region in self.dataset[index].regions
            }
        return self._regions[index]

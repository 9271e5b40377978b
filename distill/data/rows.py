"""Rows of a captioned data set as methods read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from distill.config import DenoisingConfig
from distill.data.batch import Batch, Pixels, Posterior, TextEmbeddings, Tokens
from distill.data.cache import LatentCache, TextEmbeddingCache
from distill.data.captions import has_label, insert_labels, names_side, text_of_labels
from distill.data.sample import ImageCaptionDataset, hash_of, region_fingerprint, region_list, size_ids
from distill.errors import UserError
from distill.tokens import find_words

if TYPE_CHECKING:
    from distill.models import Model

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
    long = [i for i, length in enumerate(model.caption_lengths(texts)) if length > model.longest_caption]
    if long:
        raise UserError(
            f"denoising.training_text and insert_labels: {len(long)} training texts are longer than the "
            f"{model.longest_caption} tokens that the text encoder reads with base.caption_chunks "
            f"{model.caption_chunks}, the first of row {long[0]}: {texts[long[0]]!r}"
        )


def row_fingerprints(
    data: ImageCaptionDataset, denoising: DenoisingConfig, *, label_tokens: bool = False, regions: bool = False
) -> dict[str, str]:
    """Hashes of all that decides the training rows, by what it is; no image is decoded. Options: see TrainingRows."""
    every = range(len(data))
    parts = {
        "training images": (data.fingerprint(i) for i in every),
        "training captions": (training_caption(data, i, denoising) for i in every),
    }
    if label_tokens or denoising.reads_labels:
        parts["training labels"] = ("\n".join(data.labels(i)) for i in every)
    if regions:
        parts["regions of the training images"] = (region_fingerprint(data, i) for i in every)
    return {name: hash_of(values) for name, values in parts.items()}


KEPT_ROWS = 50_000
"""Rows whose text stays in memory; 4 kB each in every process that reads rows."""


@dataclass(frozen=True)
class _Described:
    """What a row has besides its image and regions; equal in every epoch. Fields as in Batch."""

    caption: str
    tokens: Tokens | None
    groups: torch.Tensor
    droppable: torch.Tensor
    flippable: torch.Tensor | None
    size_ids: torch.Tensor | None
    label_tokens: torch.Tensor | None


class TrainingRows(Dataset[Batch]):
    """Row i of a data set, as a Batch without its first dimension.

    latents, text: caches; without them a row has pixels and token ids. flip: rows say whether their image may be
    mirrored. label_tokens, regions: rows say which words name a label of the image, and where that label is.
    region_images: give the regions of the first this many images alone.
    """

    def __init__(
        self,
        dataset: ImageCaptionDataset,
        model: Model,
        denoising: DenoisingConfig | None = None,
        *,
        latents: LatentCache | None = None,
        text: TextEmbeddingCache | None = None,
        flip: bool = False,
        label_tokens: bool = False,
        regions: bool = False,
        region_images: int | None = None,
    ) -> None:
        self.dataset, self.model, self.latents, self.text, self.flip = dataset, model, latents, text, flip
        self.denoising = denoising or DenoisingConfig()
        self.label_tokens, self.regions, self.region_images = label_tokens, regions, region_images
        self._regions: dict[int, dict[str, torch.Tensor]] = {}
        self._kept: dict[int, _Described] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def caption(self, index: int) -> str:
        return training_caption(self.dataset, index, self.denoising)

    def __getitem__(self, index: int) -> Batch:
        row = self._kept.get(index)
        if row is None:
            row = self._described(index)
            if len(self._kept) < KEPT_ROWS:
                self._kept[index] = row
        return Batch(
            image=self._image(index),
            text=row.tokens or self._embedded(row.caption),
            groups=row.groups,
            droppable=row.droppable,
            flippable=row.flippable,
            size_ids=row.size_ids,
            label_tokens=row.label_tokens,
            regions=self._region_tokens(index, row.caption) if self.regions else None,
        )

    def _described(self, index: int) -> _Described:
        caption, labels, model = self.caption(index), self.dataset.labels(index), self.model
        only = self.denoising.caption_dropout_label
        reads_size = model.family.reads_size
        return _Described(
            caption,
            tokens=None if self.text is not None else Tokens(tuple(ids[0] for ids in model.tokenize([caption]))),
            groups=model.token_groups(caption),
            droppable=torch.tensor(only is None or has_label(labels, only)),
            flippable=torch.tensor(self._may_flip(index, caption)) if self.flip else None,
            size_ids=torch.tensor(size_ids(self.dataset, index), dtype=torch.float32) if reads_size else None,
            label_tokens=self._label_tokens(labels, caption) if self.label_tokens else None,
        )

    def _may_flip(self, index: int, caption: str) -> bool:
        """An image that is not mirrored in the cache stays as it is, so that its regions do."""
        return self.latents.may_flip(index) if self.latents is not None else not names_side(caption)

    def _image(self, index: int) -> Pixels | Posterior:
        if self.latents is None:
            return Pixels(self.dataset[index].pixel_values)
        posterior = self.latents[index]
        return Posterior(*posterior, *((self.latents.flipped(index) or posterior) if self.flip else ()))

    def _embedded(self, caption: str) -> TextEmbeddings:
        assert self.text is not None
        embeds = self.text[caption]
        return TextEmbeddings(embeds) if isinstance(embeds, torch.Tensor) else TextEmbeddings(*embeds)

    def _label_tokens(self, labels: tuple[str, ...], caption: str) -> torch.Tensor:
        named = torch.zeros(self.model.max_tokens, dtype=torch.bool)
        named[[k for label in labels for k in self._tokens_of(label, caption)]] = True
        return named

    def _region_tokens(self, index: int, caption: str) -> torch.Tensor:
        regions = torch.zeros(self.model.max_tokens, REGION_SIZE, REGION_SIZE, dtype=torch.uint8)
        if self.region_images is None or index < self.region_images:
            for label, mask in self._regions_of(index).items():
                for k in self._tokens_of(label, caption):
                    regions[k] |= mask
        return regions

    def _tokens_of(self, label: str, caption: str) -> list[int]:
        words = (label, *self.dataset.query_words.get(label, ()))
        return self.model.token_spans(caption, find_words(caption, words))

    def _regions_of(self, index: int) -> dict[str, torch.Tensor]:
        """Finding -> (S, S) uint8, kept from the first time on, so that no later epoch decodes the image for it."""
        if index not in self._regions:
            self._regions[index] = {
                region.finding: (F.adaptive_max_pool2d(region.mask[None].float(), REGION_SIZE)[0] > 0).to(torch.uint8)
                for region in region_list(self.dataset, index)
            }
        return self._regions[index]

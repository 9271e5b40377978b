"""Generic pictures drawn once, and the tokenizer that learns from their captions."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from distill.data.pictures import UNRELATED, VOCABULARY, PicturesDataset
from distill.files import write_json

SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""  # CLIP's


class PictureRow(TypedDict):
    """pixel_values: (3, height, width) in [-1, 1]."""

    pixel_values: torch.Tensor
    caption: str


class RenderedPictures(Dataset[PictureRow]):
    """Pictures drawn once: uint8 (count, height, width) on disk, and their captions."""

    def __init__(self, folder: Path) -> None:
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self.captions: list[str] = json.loads((folder / "captions.json").read_text())

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> PictureRow:
        pixels = torch.from_numpy(self.pixels[index].astype(np.float32) / 127.5 - 1)
        return {"pixel_values": pixels.expand(3, -1, -1), "caption": self.captions[index]}


def render(pictures: PicturesDataset, folder: Path) -> None:
    """Draw all pictures once: pixels.npy and captions.json in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "pixels.npy.partial"
    shape = (len(pictures), pictures.resolution, pictures.resolution)
    pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    captions = []
    for i in tqdm(range(len(pictures)), desc="pictures", unit="picture"):
        sample = pictures[i]
        pixels[i] = ((sample.pixel_values[0] + 1) * 127.5).round().to(torch.uint8).numpy()
        captions.append(sample.caption)
    pixels.flush()
    write_json(folder / "captions.json", captions)
    os.replace(partial, folder / "pixels.npy")


def train_tokenizer(captions: Sequence[str], vocabulary_size: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE: 256 bytes, 256 bytes that end a word, merges learned from captions, two special tokens."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "removed", invert=True), byte_level]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([*captions, *UNRELATED * 20, *VOCABULARY * 20], trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: vocabulary_size - 2 - 2 * len(alphabet)]
    pieces = [
        *alphabet,
        *(a + "</w>" for a in alphabet),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges=merges, model_max_length=77
    )

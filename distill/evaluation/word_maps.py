"""Attention maps of every word of the example images' captions, for the report.

A pass of its own after the scored one, so that no number depends on it. Latents, noise, timesteps, layers and
aggregation are those of the protocol `ours`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open

from distill.attention.heat_maps import normalize, select_tokens
from distill.attention.recording import attention_layers
from distill.config import FullEvaluation
from distill.data.sample import ImageCaptionDataset
from distill.evaluation.protocols import Query, open_recorder, ours, prepare_inputs, with_subset
from distill.files import JsonObject, write_tensors
from distill.models.family import Model
from distill.tokens import find_words, words_of

WORD_MAPS_FILE = "word_maps.safetensors"
LARGEST_MAP = 64


@torch.no_grad()
def write_word_maps(
    model: Model,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    *,
    examples: Sequence[int],
    accelerator: Accelerator,
    arm_dir: Path,
) -> None:
    """Write word_maps.safetensors to `arm_dir`, from the main process; the other processes return at once.

    A map is uint8, (height, width), min-max scaled to 0..255, at latent size or at most 64 x 64. Its key is "<example
    number>/<word>", where the word is in lower case, or "[BOS]", "[EOS]" or "[PAD]". The file's metadata holds a JSON
    object `examples` with, for each example number: `words`, {word: [[start, end], ...]} in the caption's order with
    the spans of characters, and `findings`, {finding: its first word in the caption} of the image's regions.
    """
    if not accelerator.is_main_process or not examples:
        return
    config = with_subset(config.model_copy(update={"protocol": "ours", "self_attention_power": 0}), model)
    tensors: dict[str, torch.Tensor] = {}
    about: JsonObject = {}
    with ExitStack() as stack:
        recorder = open_recorder(stack, model, attention_layers(model.denoiser, config.layers), config)
        for start in range(0, len(examples), config.batch_size):
            indices = examples[start : start + config.batch_size]
            samples = [dataset[index] for index in indices]
            captions = [sample.caption for sample in samples]
            groups = [model.token_groups(text) for text in captions]
            batch = [
                Query(index, text, (), (), own) for index, text, own in zip(indices, captions, groups, strict=True)
            ]
            inputs = prepare_inputs(model, samples, batch, accelerator.device)
            chosen = select_tokens(
                model.tokenizers, captions, max_length=model.chunk_tokens, chunks=model.caption_chunks
            )
            recorder.cross.reduce = replace(inputs, chosen=chosen.matrix.to(inputs.chosen.device)).reduce
            maps, _ = ours(inputs, config, recorder)
            if max(maps.shape[-2:]) > LARGEST_MAP:
                size = [min(side, LARGEST_MAP) for side in maps.shape[-2:]]
                maps = F.interpolate(maps, size=size, mode="area")
            scaled = (normalize(maps.float()) * 255).round().to(torch.uint8).cpu()
            for place, (sample, names, own) in enumerate(zip(samples, chosen.names, scaled, strict=True)):
                number = start + place
                tensors |= {f"{number}/{name}": image.contiguous() for name, image in zip(names, own, strict=False)}
                spans = {name: find_words(sample.caption, [name]) if name[0] != "[" else [] for name in names}
                findings = {
                    region.finding: word
                    for region in sample.regions
                    if (word := _word_of(sample.caption, dataset.query_words[region.finding], spans)) is not None
                }
                about[str(number)] = {"words": spans, "findings": findings}
    # One entry: safetensors writes several in no fixed order.
    write_tensors(arm_dir / WORD_MAPS_FILE, tensors, {"examples": json.dumps(about)})


def _word_of(caption: str, query_words: Sequence[str], spans: Mapping[str, object]) -> str | None:
    """The last word of the first place where `caption` names a finding: "effusion" of "pleural effusion"."""
    places = find_words(caption, query_words)
    inside = [word for word in words_of(caption[slice(*places[0])]) if word in spans] if places else []
    return inside[-1] if inside else None


@dataclass(frozen=True)
class WordMaps:
    """Maps of one image. maps: word -> (height, width) uint8. spans: word -> its characters. findings: name -> word."""

    maps: Mapping[str, np.ndarray]
    spans: Mapping[str, Sequence[tuple[int, int]]]
    findings: Mapping[str, str]

    def pieces(self, caption: str) -> list[tuple[str, str | None]]:
        """The caption as (text, word of its map or None), then the maps that are of no word of it."""
        places = sorted((start, end, word) for word, spans in self.spans.items() for start, end in spans)
        pieces: list[tuple[str, str | None]] = []
        at = 0
        for start, end, word in places:
            if start >= at:
                pieces += [(caption[at:start], None), (caption[start:end], word)]
                at = end
        rest = [piece for word in self.maps if not self.spans.get(word) for piece in ((" ", None), (word, word))]
        return [*pieces, (caption[at:], None), *rest]


def read_word_maps(arm_dir: Path, number: int) -> WordMaps | None:
    """The maps of example `number`, None where none were written. Raises ValueError for a damaged file."""
    path = arm_dir / WORD_MAPS_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get("examples", "{}")).get(str(number))
            if about is None:
                return None
            maps = {word: file.get_tensor(f"{number}/{word}") for word in about["words"]}
            return WordMaps(maps, about["words"], about["findings"])
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from error

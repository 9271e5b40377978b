"""Does localization survive what training never showed? Other words, swapped sides, other images, and negations.

Each shift wraps a data set and changes captions or pixels; the ground truth stays. What is measured is the word AUC of
distill/localization.py, for negations how much attention a negated finding's word still gathers, and where a finding
lies in two places of one image whether both are found.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from distill.attention.recording import attention_layers
from distill.config import FullEvaluation
from distill.data.captions import negated_findings
from distill.data.sample import ImageCaptionDataset, Sample, group_key, image_key, patient_of
from distill.evaluation.protocols import PROTOCOLS, Query, open_recorder, prepare_inputs, queries, with_subset
from distill.files import JsonObject
from distill.metrics import PixelAUROC, bootstrap_interval
from distill.metrics.bootstrap import numbered
from distill.models.family import Model
from distill.tokens import ReadsText, find_words

REPLACED: tuple[tuple[str, str], ...] = (
    (r"pleural effusions?|effusions?|pleural fluid", "fluid collection"),
    (r"cardiomegaly", "big heart"),
    (r"cardiac silhouette", "heart shadow"),
    (r"pneumothorax|pneumothoraces", "collapsed lung"),
    (r"pneumonia", "lung infection"),
    (r"edema", "fluid overload"),
    (r"consolidations?|consolidative change", "airspace filling"),
    (r"atelectasis|atelectatic", "volume loss"),
    (r"lung opacity|opacity|opacities|opacification", "shadowing"),
)
"""Words that name a finding of MS-CXR -> words that the phantom's captions never use for it."""
SYNONYM_WORDS: dict[str, tuple[str, ...]] = {
    "atelectasis": ("volume loss",),
    "cardiomegaly": ("big heart", "heart shadow"),
    "consolidation": ("airspace filling",),
    "edema": ("fluid overload",),
    "lung opacity": ("shadowing",),
    "pleural effusion": ("fluid collection",),
    "pneumonia": ("lung infection",),
    "pneumothorax": ("collapsed lung",),
}


def with_synonyms(caption: str) -> str:
    """The caption with every finding named by other words."""
    for pattern, other in REPLACED:
        caption = re.sub(rf"\b(?:{pattern})\b", other, caption, flags=re.IGNORECASE)
    return caption


def with_swapped_sides(caption: str) -> str:
    """Left for right and right for left."""

    def other(found: re.Match[str]) -> str:
        swapped = {"left": "right", "right": "left"}[found[0].lower()]
        return swapped.upper() if found[0].isupper() else swapped.capitalize() if found[0][0].isupper() else swapped

    return re.sub(r"\b(left|right)\b", other, caption, flags=re.IGNORECASE)


def with_noise(pixels: torch.Tensor, key: str) -> torch.Tensor:
    """Gaussian noise of standard deviation .15 on [-1, 1], a function of `key`."""
    seed = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)
    noise = torch.randn(pixels.shape[-2:], generator=torch.Generator().manual_seed(seed))
    return (pixels + 0.15 * noise).clamp(-1, 1)


def with_low_contrast(pixels: torch.Tensor, key: str) -> torch.Tensor:
    """Half the contrast around the image's own mean."""
    mean = pixels.mean()
    return mean + 0.5 * (pixels - mean)


def mirrored(pixels: torch.Tensor, key: str) -> torch.Tensor:
    """Left-right mirrored anatomy (the heart on the other side); the ground truth is mirrored with it."""
    return pixels.flip(-1)


@dataclass(frozen=True)
class Shift:
    """What changes. words: names of findings after the change of captions. flips: whether regions are mirrored too."""

    caption: Callable[[str], str] = lambda caption: caption
    pixels: Callable[[torch.Tensor, str], torch.Tensor] = lambda pixels, key: pixels
    words: Mapping[str, Sequence[str]] = field(default_factory=dict)
    flips: bool = False


SYNONYMS, FOR_SYNONYMS = "synonyms", "none for synonyms"
SHIFTS: dict[str, Shift] = {
    "none": Shift(),
    SYNONYMS: Shift(caption=with_synonyms, words=SYNONYM_WORDS),
    "swapped sides": Shift(caption=with_swapped_sides),
    "noise": Shift(pixels=with_noise),
    "low contrast": Shift(pixels=with_low_contrast),
    "mirrored": Shift(caption=with_swapped_sides, pixels=mirrored, flips=True),
}


class ShiftedDataset:
    """A data set under a shift; implements `distill.data.sample.ImageCaptionDataset`. comparable: which regions it
    keeps; None keeps all."""

    def __init__(self, dataset: ImageCaptionDataset, name: str, comparable: Comparable | None = None) -> None:
        self.dataset, self.name, self.shift, self.comparable = dataset, name, SHIFTS[name], comparable

    @property
    def findings(self) -> Sequence[str]:
        return self.dataset.findings

    @property
    def query_words(self) -> Mapping[str, Sequence[str]]:
        words = {finding: self.shift.words.get(finding.casefold()) for finding in self.findings}
        return {**self.dataset.query_words, **{finding: own for finding, own in words.items() if own}}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        regions = sample.regions
        if self.comparable is not None:
            regions = tuple(r for r in regions if r.finding in self.comparable.findings(index))
        if self.shift.flips:
            side = sample.pixel_values.shape[-1]
            regions = tuple(
                replace(r, mask=r.mask.flip(-1), boxes=tuple((side - x - w, y, w, h) for x, y, w, h in r.boxes))
                for r in regions
            )
        if self.name != "none":
            regions = tuple(replace(r, phrase=self.shift.caption(r.phrase or r.finding)) for r in regions)
        pixels = self.shift.pixels(sample.pixel_values, sample.id)
        return replace(sample, pixel_values=pixels, caption=self.shift.caption(sample.caption), regions=regions)

    def caption(self, index: int) -> str:
        return self.shift.caption(self.dataset.caption(index))

    def labels(self, index: int) -> tuple[str, ...]:
        return self.dataset.labels(index)

    def fingerprint(self, index: int) -> str:
        return f"{self.dataset.fingerprint(index)} {self.name}"

    def image_key(self, index: int) -> str:
        return image_key(self.dataset, index)

    def patient(self, index: int) -> str:
        return patient_of(self.dataset, index)


class Comparable:
    """Which findings of a row its text names under all of `shifts`, so that these are compared on the same pairs. A
    finding without a synonym is not named under that shift: nothing would change."""

    def __init__(self, dataset: ImageCaptionDataset, model: ReadsText, shifts: Sequence[str]) -> None:
        self._model, self._names = model, tuple(dataset.findings)
        self._found: dict[int, frozenset[str]] = {}
        self._shifted = {name: ShiftedDataset(dataset, name) for name in shifts}
        self._words = {name: shifted.query_words for name, shifted in self._shifted.items()}

    def findings(self, index: int) -> frozenset[str]:
        if index not in self._found:
            captions = {name: shifted.caption(index) for name, shifted in self._shifted.items()}
            self._found[index] = frozenset(
                finding
                for finding in self._names
                if all(self._names_it(name, caption, finding) for name, caption in captions.items())
            )
        return self._found[index]

    def _names_it(self, shift: str, caption: str, finding: str) -> bool:
        if shift == SYNONYMS and finding.casefold() not in SYNONYM_WORDS:
            return False
        return bool(self._model.token_spans(caption, find_words(caption, self._words[shift][finding])))


def comparable_sets(
    dataset: ImageCaptionDataset, model: ReadsText, config: FullEvaluation, accelerator: Accelerator
) -> dict[str, ShiftedDataset | None]:
    """Row of the table -> what it is measured on; None where no text names a finding that has a synonym.

    Where captions are asked about by words, all shifts but synonyms are of the same pairs. `synonyms` is of those whose
    finding has one in the caption; if that are others, a row FOR_SYNONYMS measures them without a shift.
    """
    if config.protocol != "ours" or config.localization_text != "caption":
        return {name: ShiftedDataset(dataset, name) for name in SHIFTS}
    others = [name for name in SHIFTS if name != SYNONYMS]
    common, renamed = Comparable(dataset, model, others), Comparable(dataset, model, tuple(SHIFTS))
    plain = {kept: ShiftedDataset(dataset, "none", kept) for kept in (common, renamed)}
    all_pairs, theirs = (
        [(query.image, query.findings) for query in queries(plain[kept], model, config, accelerator)] for kept in plain
    )
    found: dict[str, ShiftedDataset | None] = {"none": plain[common]}
    found |= {FOR_SYNONYMS: plain[renamed]} if theirs and theirs != all_pairs else {}
    found |= {SYNONYMS: ShiftedDataset(dataset, SYNONYMS, renamed) if theirs else None}
    return found | {name: ShiftedDataset(dataset, name, common) for name in others[1:]}


def negation_queries(dataset: ImageCaptionDataset, model: Model, count: int) -> list[Query]:
    """Of the first `count` captions that state a finding and name another that the image does not have, both: the
    stated findings first. A finding is counted as stated or absent by the image's labels."""
    found: list[Query] = []
    for index in range(len(dataset)):
        if len(found) == count:
            break
        caption, labels = dataset.caption(index), set(dataset.labels(index))
        named: dict[str, tuple[int, ...]] = {}
        for finding in dataset.findings:
            spans = find_words(caption, dataset.query_words[finding])
            tokens = tuple(model.token_spans(caption, spans))
            if tokens:
                named[finding] = tokens
        stated = [f for f in named if f in labels]
        absent = [f for f in negated_findings(dataset, index) if f in named]
        if stated and absent:
            order = [*stated, *absent]
            findings = tuple(list(dataset.findings).index(f) for f in order)
            groups = model.token_groups(caption)
            found.append(Query(index, caption, findings, tuple(named[f] for f in order), groups, str(len(stated))))
    return found


@torch.no_grad()
def maps_of(
    model: Model,
    dataset: ImageCaptionDataset,
    asked: Sequence[Query],
    config: FullEvaluation,
    *,
    accelerator: Accelerator,
    label: str,
) -> Iterator[tuple[Query, Sample, torch.Tensor]]:
    """Of this process's share of the queries: the image, and its maps by protocol ours at latent size, not normalized,
    of shape (findings, height, width)."""
    config = with_subset(config.model_copy(update={"protocol": "ours"}), model)
    mine = asked[accelerator.process_index :: accelerator.num_processes]
    model.to(accelerator.device).freeze()
    with ExitStack() as stack:
        recorder = open_recorder(stack, model, attention_layers(model.denoiser, config.layers), config)
        starts = range(0, len(mine), config.batch_size)
        for start in tqdm(starts, desc=label, unit="batch", disable=not accelerator.is_main_process):
            batch = mine[start : start + config.batch_size]
            samples = [dataset[query.image] for query in batch]
            inputs = prepare_inputs(model, samples, batch, accelerator.device)
            recorder.cross.reduce = inputs.reduce
            maps, _ = PROTOCOLS["ours"].maps(inputs, config, recorder)
            for query, sample, own in zip(batch, samples, maps, strict=True):
                yield query, sample, own[4 : 4 + len(query.findings)]


def means(
    columns: Mapping[str, Sequence[float]], dataset: ImageCaptionDataset, rows: Sequence[int], config: FullEvaluation
) -> JsonObject:
    """Mean of each column over `rows` of the data set, its interval by patients (or images) drawn with replacement,
    and the number of images."""
    found: JsonObject = {"images": len({image_key(dataset, row) for row in rows})}
    groups = numbered([group_key(dataset, row) for row in rows])
    for name, values in columns.items():
        row = np.asarray(values, dtype=np.float64)
        found[name] = float(row.mean())
        found[f"{name}_ci"] = bootstrap_interval(
            row, groups, lambda v: float(v.mean()), config.bootstrap_samples, config.seed
        )
    return found


def negations(
    model: Model,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    *,
    accelerator: Accelerator,
    label: str,
) -> JsonObject | None:
    """How much a negated finding lights up, in images that also have a stated one; None if there is none.

    {"peak_ratio": mean over images of the largest attention on negated words over that on stated words (1: a negated
    finding lights up as a stated one does), "peak_ratio_ci", "stated_wins": share of images where the stated one's peak
    is larger, "stated_wins_ci", "images"}. Attention is that of protocol ours, not normalized.
    """
    asked = negation_queries(dataset, model, config.localization_images)
    rows: list[tuple[int, float]] = []
    label = f"{label} negations"
    for query, _, maps in maps_of(model, dataset, asked, config, accelerator=accelerator, label=label):
        peaks = maps.flatten(1).amax(dim=1)
        stated = int(query.truth)
        rows.append((query.image, float(peaks[stated:].mean() / peaks[:stated].mean())))
    rows = sorted(gather_object(rows))
    if not rows:
        return None
    images, ratio = zip(*rows, strict=True)
    columns = {"peak_ratio": ratio, "stated_wins": [float(value < 1) for value in ratio]}
    return means(columns, dataset, images, config)


def two_places(
    model: Model,
    dataset: ImageCaptionDataset,
    config: FullEvaluation,
    *,
    accelerator: Accelerator,
    label: str,
) -> JsonObject | None:
    """Two findings of one kind: is each found, where one word names both? None if no finding has two boxes in an image.

    {"auc": of all places of the finding, "lesser_auc": of the place that the map shows least, against all that is
    outside both, "auc_ci", "lesser_auc_ci", "images", "pairs"}: means over the (image, finding) pairs of two boxes or
    more among the first `localization_images` images, without post-processing of the maps. A place is a box's part of
    the mask.
    """
    asked = queries(dataset, model, config.model_copy(update={"protocol": "ours"}), accelerator)
    metric, rows = PixelAUROC(), []
    label = f"{label} two places"
    for query, sample, maps in maps_of(model, dataset, asked, config, accelerator=accelerator, label=label):
        regions = {region.finding: region for region in sample.regions}
        for finding, small in zip(query.findings, maps, strict=True):
            region = regions[dataset.findings[finding]]
            if len(region.boxes) < 2:
                continue
            side = region.mask.shape
            drawn = F.interpolate(small.cpu()[None, None], side, mode="bilinear", align_corners=False)[0]
            scores = []
            for box in region.boxes:
                place = region.mask & box_mask(box, side)
                kept = place | ~region.mask
                scores.append(float(metric.pair_scores(drawn[:, kept][None], place[kept][None, None])))
            whole = float(metric.pair_scores(drawn, region.mask[None]))
            if np.isfinite([whole, *scores]).all():  # neither a place nor what is around it is empty
                rows.append((query.image, finding, whole, min(scores)))
    rows = sorted(gather_object(rows))
    if not rows:
        return None
    images, _, whole_auc, lesser = zip(*rows, strict=True)
    return means({"auc": whole_auc, "lesser_auc": lesser}, dataset, images, config) | {"pairs": len(rows)}


def box_mask(box: tuple[float, float, float, float], size: Sequence[int]) -> torch.Tensor:
    """(height, width) bool, the pixels that a box (x, y, width, height) touches."""
    x, y, width, height = box
    mask = torch.zeros(*size, dtype=torch.bool)
    mask[int(y) : math.ceil(y + height), int(x) : math.ceil(x + width)] = True
    return mask

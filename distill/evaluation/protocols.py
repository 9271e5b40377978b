"""Protocols of localization, one a name: from real images and texts to maps, and by which metrics these are judged.

`ours`: real latents, noised at a few timesteps, layers and timesteps chosen on validation images (recipes/atlas.py).
`dombrowski`: Dombrowski et al., AAAI 2024, arXiv 2303.17908. `vilouras`: Vilouras et al. 2024, arXiv 2404.12920.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler

from distill.attention.heat_maps import aggregate, normalize, to_image
from distill.attention.recording import AttentionMaps, attention_layers, record_attention
from distill.config import FullEvaluation
from distill.data.cache import model_fingerprint
from distill.data.sample import ImageCaptionDataset, Region, Sample, region_list
from distill.errors import UserError
from distill.metrics import (
    AbsoluteCNR,
    BoxIoU,
    CentreDistance,
    IoUAtThreshold,
    LocalizationMetric,
    MeanIoU,
    MixtureIoU,
    MixtureTwoClassIoU,
    PixelAUROC,
    PointingGame,
    SignedCNR,
    ThresholdAUROC,
)
from distill.metrics.maps import (
    gaussian_smooth,
    mixture_threshold,
    otsu_threshold,
    refine_by_self_attention,
    remove_orphans,
)
from distill.models.family import Conditions, Model
from distill.tokens import BOS, EOS, PADDING, WORD, ReadsText, find_words

DEFAULT_TIMESTEPS = (100, 250, 400, 550, 700)


@dataclass(frozen=True)
class Query:
    """One text of one held-out image, and the findings whose maps are scored on it.

    image: index in the data set. groups: (tokens,) codes. tokens: for each pair, positions of the finding's words.
    truth: hash of the image's regions.
    """

    image: int
    text: str
    findings: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    groups: torch.Tensor
    truth: str = ""


def queries(
    dataset: ImageCaptionDataset,
    model: ReadsText,
    config: FullEvaluation,
    accelerator: Accelerator | None = None,
) -> list[Query]:
    """The (image, finding) pairs of the first `localization_images` images that have any, the same for every model.

    `caption`: the image's caption. `phrase`: the region's phrase, or the finding's name; one text a pair.
    A text that names the finding by none of its words is left out, or with the protocols `dombrowski` and `vilouras`,
    and with phrases, asked for by all of its word tokens.
    With an accelerator its processes share the images, which each has to decode for its regions; all must call this.
    Empty if no image has a region. Raises UserError if there are regions and no text names any of their findings.
    """
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    together = 16 * world if world > 1 else 1
    found: list[Query] = []
    images = regions = 0
    for start in range(0, len(dataset) if dataset.findings else 0, together):
        if images == config.localization_images:
            break
        indices = range(start, min(start + together, len(dataset)))
        looked, faults = [], []
        try:
            looked = [(index, *_queries_of(dataset, index, model, config)) for index in indices[rank::world]]
        except UserError as error:  # an image that cannot be read; the other processes must not wait for this one
            faults.append(str(error))
        if world > 1:
            looked, faults = gather_object(looked), gather_object(faults)
        if faults:
            raise UserError(faults[0])
        for _, count, own in sorted(looked, key=lambda part: part[0]):
            if images < config.localization_images:
                regions += count
                found += own
                images += bool(own)
    if regions and not found:
        raise UserError(
            "no held-out image has a region of a finding that its text names; check data.findings, data.query_words "
            "and evaluation.localization_text"
        )
    return found


def _queries_of(
    dataset: ImageCaptionDataset, index: int, model: ReadsText, config: FullEvaluation
) -> tuple[int, list[Query]]:
    """How many findings have a region in an image, and its queries."""
    names, regions = list(dataset.findings), region_list(dataset, index)
    texts: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
    phrases = {region.finding: region.phrase for region in regions}
    for finding in phrases:
        text = dataset.caption(index)
        if config.localization_text == "phrase":
            text = phrases[finding] or finding
        tokens = tuple(model.token_spans(text, find_words(text, dataset.query_words[finding])))
        if not tokens and (config.localization_text == "phrase" or config.protocol != "ours"):
            tokens = tuple((model.token_groups(text) == WORD).nonzero().flatten().tolist())
        if tokens:
            texts.setdefault(text, []).append((names.index(finding), tokens))
    own = []
    for text, pairs in texts.items():
        groups = model.token_groups(text)
        own.append(
            Query(index, text, tuple(f for f, _ in pairs), tuple(t for _, t in pairs), groups, _hash_of(regions))
        )
    return len(phrases), own


def _hash_of(regions: Sequence[Region]) -> str:
    parts = [f"{r.finding}{r.boxes}".encode() + np.packbits(r.mask.numpy()).tobytes() for r in regions]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


def selection(query: Query, columns: int) -> torch.Tensor:
    """(tokens, columns) float32 that maps token probabilities to BOS, words, EOS, padding sums and word means of the
    pairs."""
    matrix = torch.zeros(len(query.groups), columns)
    for column, code in enumerate((BOS, WORD, EOS, PADDING)):
        matrix[query.groups == code, column] = 1.0
    for column, tokens in enumerate(query.tokens, start=4):
        matrix[list(tokens), column] = 1.0 / len(tokens)
    return matrix


# --- from images and texts to maps --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """A batch of queries as the denoiser takes it.

    latents: (batch, channels, height, width) posterior means, scaled. chosen: (batch, tokens, 4 + pairs), see
    `selection`. images: index of each query's image.
    """

    model: Model
    latents: torch.Tensor
    conditions: Conditions
    chosen: torch.Tensor
    images: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        return self.latents.shape[-2], self.latents.shape[-1]

    def reduce(self, probabilities: torch.Tensor) -> torch.Tensor:
        """(batch, heads, places, tokens) -> (batch, places, 4 + pairs), for record_attention."""
        return probabilities.mean(dim=1) @ self.chosen

    def noise(self, count: int, seed: int) -> torch.Tensor:
        """(batch, count, channels, height, width) that depends on seed and image only, not on the batch."""
        shape = (count, *self.latents.shape[1:])
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in self.images]
        return torch.stack(drawn).to(self.latents.device)

    def steps(self, timestep: int) -> torch.Tensor:
        return torch.full((len(self.latents),), timestep, device=self.latents.device)

    def renoised(self, timesteps: Sequence[int], seed: int, maps: AttentionMaps) -> Iterator[dict[str, torch.Tensor]]:
        """Maps by layer, (batch, places, 4 + pairs), of the real latents noised at each of `timesteps`."""
        model, family = self.model, self.model.family
        noise = self.noise(len(timesteps), seed)
        for place, timestep in enumerate(timesteps):
            steps = self.steps(timestep)
            noisy = family.add_noise(model, self.latents, noise[:, place], steps)
            maps.start()
            maps.run(family.predict, model.denoiser, noisy, steps, self.conditions)
            yield maps.take()


class RealLatents:
    """Latents of real images, kept from one model to the next: arms of a run share their VAE. Not for data that
    changes."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._vae: weakref.ref[AutoencoderKL] | None = None
        self._weights = ""

    def of(self, vae: AutoencoderKL, images: tuple[int, ...], encode: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Those of one batch, which is kept as a whole: the composition of a batch can change the last bits."""
        if self._vae is None or self._vae() is not vae:
            self._vae, self._weights = weakref.ref(vae), model_fingerprint(vae)
        key = (self._weights, images)
        if key not in self._kept:
            self._kept[key] = encode()
        return self._kept[key]


def prepare_inputs(
    model: Model,
    samples: Sequence[Sample],
    batch: Sequence[Query],
    device: torch.device,
    known: RealLatents | None = None,
) -> Inputs:
    """Encode each query's image and text. Batches of any composition give the same rows, to rounding."""
    columns, images = 4 + max(len(query.tokens) for query in batch), tuple(query.image for query in batch)

    def encode() -> torch.Tensor:
        pixels = torch.stack([sample.pixel_values for sample in samples]).to(device, model.vae.dtype)
        with torch.autocast(device.type, enabled=False):  # stock VAEs overflow in half precision
            mean: torch.Tensor = model.vae.encode(pixels).latent_dist.mean
        scale: float = model.vae.config.scaling_factor
        return mean.float() * scale

    latents = encode() if known is None else known.of(model.vae, images, encode)
    ids = [x.to(device) for x in model.tokenize([query.text for query in batch])]
    embeds, pooled = model.encode(ids)
    sizes = None
    if model.family.reads_size:
        sizes = torch.tensor([sample.size_ids for sample in samples], dtype=torch.float32, device=device)
    chosen = torch.stack([selection(query, columns) for query in batch]).to(device)
    conditions = Conditions(embeds, pooled, sizes)
    return Inputs(model, latents, conditions, chosen, images)


@dataclass(frozen=True)
class Recorder:
    """Open recorders of a denoiser: cross-attention, and self-attention where maps are refined by it."""

    cross: AttentionMaps
    self_attention: AttentionMaps | None = None


def ours(inputs: Inputs, config: FullEvaluation, recorder: Recorder) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean over layers, heads and config.timesteps of the attention on the re-noised real latents, at latent size.

    -> maps (batch, 4 + pairs, height, width), mass of BOS, words, EOS and padding (batch, 4).
    """
    total = scaled = torch.zeros((), device=inputs.latents.device)
    assert config.timesteps is not None
    sizes = recorder.cross.sizes
    for by_layer in inputs.renoised(config.timesteps, config.seed, recorder.cross):
        total = total + aggregate(by_layer, sizes, inputs.size)
        if config.layer_scaling == "min_max":
            images = [normalize(to_image(values, sizes[name], inputs.size)) for name, values in by_layer.items()]
            scaled = scaled + torch.stack(images).mean(dim=0)
    maps = total / len(config.timesteps)
    mass = maps[:, :4].mean(dim=(-2, -1))
    return refine(maps if config.layer_scaling == "none" else scaled / len(config.timesteps), recorder, config), mass


def refine(maps: torch.Tensor, recorder: Recorder, config: FullEvaluation) -> torch.Tensor:
    """Maps times the self-attention of the last pass, config.self_attention_power times; at its own size."""
    if recorder.self_attention is None or config.self_attention_power == 0:
        return maps
    by_layer, sizes = recorder.self_attention.by_layer, recorder.self_attention.sizes
    size = max(size for name, size in sizes.items() if name in by_layer)
    same = torch.stack([m for name, m in by_layer.items() if sizes[name] == size]).mean(dim=0)
    small = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    returned: torch.Tensor = refine_by_self_attention(small.flatten(2), same, config.self_attention_power).unflatten(
        2, size
    )
    return returned


def ddim_timesteps(model: Model, steps: int) -> list[int]:
    scheduler = DDIMScheduler.from_config(model.noise_scheduler.config)
    scheduler.set_timesteps(steps)
    return [int(t) for t in scheduler.timesteps]


def dombrowski(inputs: Inputs, config: FullEvaluation, recorder: Recorder) -> tuple[torch.Tensor, torch.Tensor]:
    """The last 40 of 50 DDIM timesteps, all layers and heads, at 64 x 64 by nearest neighbour, mean. As `ours`."""
    total = torch.zeros((), device=inputs.latents.device)
    timesteps = ddim_timesteps(inputs.model, 50)[10:]
    for by_layer in inputs.renoised(timesteps, config.seed, recorder.cross):
        total = total + aggregate(by_layer, recorder.cross.sizes, (64, 64), mode="nearest")
    maps = total / len(timesteps)
    return maps, maps[:, :4].mean(dim=(-2, -1))


VILOURAS_STEPS, VILOURAS_RECORDED, VILOURAS_LAYERS = 300, range(120, 180), (3, 4, 6, 7)


def vilouras_layers(names: Sequence[str]) -> list[str]:
    """The layers 3, 4, 6, 7, from 0 and of SD's 16, and those at the same relative depth of a denoiser with fewer."""
    scale = min(1.0, (len(names) - 1) / 15)
    return list(dict.fromkeys(names[round(place * scale)] for place in VILOURAS_LAYERS))


def vilouras(inputs: Inputs, config: FullEvaluation, recorder: Recorder) -> tuple[torch.Tensor, torch.Tensor]:
    """DDIM inversion of the real latent in 300 steps without guidance; the steps 120 to 179 and four layers.

    Min-max for each layer and step, mean, Gaussian of sigma 2.5, min-max, times its Otsu mask. As `ours`, but at the
    size of the model's image, where the authors' code smooths; it also resizes each layer before the mean, where this
    resizes the mean.
    """
    model = inputs.model
    if not hasattr(model.noise_scheduler, "alphas_cumprod"):
        raise UserError(
            f"the protocol vilouras inverts a DDPM schedule; the family {model.family.name} has another one"
        )
    scheduler = DDIMInverseScheduler.from_config(model.noise_scheduler.config)
    scheduler.set_timesteps(VILOURAS_STEPS, device=inputs.latents.device)
    timesteps = [int(t) for t in scheduler.timesteps[: VILOURAS_RECORDED.stop]]
    latents, denoiser, maps = inputs.latents, model.denoiser, recorder.cross
    maps.timesteps = (timesteps[VILOURAS_RECORDED.start], timesteps[-1])
    total = torch.zeros((), device=latents.device)
    mass = torch.zeros((), device=latents.device)
    count = 0
    for timestep in timesteps:
        maps.start()
        predicted = model.family.predict(denoiser, latents, inputs.steps(timestep), inputs.conditions)
        latents = scheduler.step(predicted.float(), timestep, latents).prev_sample
        for name, values in maps.take().items():
            raw = to_image(values, maps.sizes[name], inputs.size)
            total, mass, count = total + normalize(raw), mass + raw[:, :4].mean(dim=(-2, -1)), count + 1
    if count != len(VILOURAS_RECORDED) * len(vilouras_layers(attention_layers(denoiser))):
        raise RuntimeError(f"{count} maps were recorded, where steps and layers ask for another number")
    side = [model.vae_factor * length for length in inputs.size]
    mean = F.interpolate(total / count, size=side, mode="bilinear", align_corners=False)
    smooth = normalize(gaussian_smooth(mean.flatten(0, 1), 2.5))
    masked = smooth * (smooth > otsu_threshold(smooth)[:, None, None])
    return masked.unflatten(0, (len(latents), -1)), mass / count


# --- protocols ----------------------------------------------------------------------------------------------------

MapFunction = Callable[[Inputs, FullEvaluation, Recorder], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Protocol:
    """maps: batch -> maps. metrics: key of metrics.json -> metric. size: side that maps and truth are compared at, None
    for the data's resolution, "original" for the image file's. resize: of the map. words: "finding" asks by the
    finding's words, "all" by all words. layers: of all cross-attention layers, those to record."""

    maps: MapFunction
    metrics: Callable[[FullEvaluation], dict[str, LocalizationMetric]]
    ground_truth: Literal["mask", "boxes"]
    size: int | Literal["original"] | None = None
    resize: Literal["bilinear", "nearest"] = "bilinear"
    words: Literal["finding", "all"] = "finding"
    layers: Callable[[Sequence[str]], Sequence[str]] = lambda names: names


def _ours_metrics(config: FullEvaluation) -> dict[str, LocalizationMetric]:
    return {
        "auc": PixelAUROC(),
        "cnr": SignedCNR(),
        "top1": PointingGame(),
        "iou": IoUAtThreshold(config.iou_threshold),
    }


def _dombrowski_metrics(config: FullEvaluation) -> dict[str, LocalizationMetric]:
    return {
        "auc": PixelAUROC("micro"),
        "cnr": SignedCNR("micro"),
        "top1": PointingGame("micro"),
        "iou": MixtureIoU("micro"),
        "two_class_iou": MixtureTwoClassIoU("micro"),
        "box_iou": BoxIoU("micro"),
        "centre_distance": CentreDistance("micro"),
    }


def _vilouras_metrics(config: FullEvaluation) -> dict[str, LocalizationMetric]:
    return {"auc": ThresholdAUROC(), "cnr": AbsoluteCNR(), "mean_iou": MeanIoU()}


PROTOCOLS: dict[str, Protocol] = {
    "ours": Protocol(ours, _ours_metrics, "mask"),
    "dombrowski": Protocol(dombrowski, _dombrowski_metrics, "boxes", size=512),
    "vilouras": Protocol(
        vilouras, _vilouras_metrics, "boxes", size="original", resize="nearest", words="all", layers=vilouras_layers
    ),
}


def with_subset(config: FullEvaluation, model: Model) -> FullEvaluation:
    """The configuration with the layers and timesteps that its maps are of: its own, the model's chosen subset
    (localization.json), or the defaults. The protocols of papers fix their own."""
    subset = model.subset if config.protocol == "ours" else None
    layers, timesteps = config.layers, config.timesteps
    if subset is not None and not layers and timesteps is None:
        layers, timesteps = subset.layers, subset.timesteps
    return config.model_copy(update={"layers": layers, "timesteps": timesteps or DEFAULT_TIMESTEPS})


def ground_truth(
    region: Region, resolution: int, size: int, kind: str
) -> tuple[torch.Tensor, list[tuple[float, float, float, float]]]:
    """(size, size) bool mask of the region, by its boxes if `kind` is "boxes" and it has some, and its boxes, at
    `size`."""
    scale = size / resolution
    boxes = [(x * scale, y * scale, width * scale, height * scale) for x, y, width, height in region.boxes]
    if kind == "boxes" and boxes:
        mask = torch.zeros(size, size, dtype=torch.bool)
        for x, y, width, height in boxes:  # a pixel is inside if its centre is
            rows = slice(max(0, int(np.ceil(y - 0.5))), max(0, int(np.ceil(y + height - 0.5))))
            mask[rows, max(0, int(np.ceil(x - 0.5))) : max(0, int(np.ceil(x + width - 0.5)))] = True
        return mask, boxes
    if size == resolution:
        return region.mask, boxes
    resized = F.interpolate(region.mask[None, None].float(), (size, size), mode="bilinear", align_corners=False)
    return resized[0, 0] >= 0.5, boxes


def ground_truths(
    query: Query, sample: Sample, names: Sequence[str], config: FullEvaluation
) -> tuple[torch.Tensor, list[list[tuple[float, float, float, float]]]]:
    """(pairs, size, size) bool masks of a query's pairs, and the boxes of each, at the size that maps are compared
    at."""
    protocol = PROTOCOLS[config.protocol]
    kind = protocol.ground_truth if config.ground_truth == "auto" else config.ground_truth
    resolution = sample.pixel_values.shape[-1]
    size = resolution if protocol.size is None else protocol.size
    if size == "original":
        size = sample.square_px or min(sample.original_size) or resolution
    regions = {region.finding: region for region in sample.regions}
    truths = [ground_truth(regions[names[f]], resolution, int(size), kind) for f in query.findings]
    return torch.stack([mask for mask, _ in truths]), [boxes for _, boxes in truths]


def at_size(normalized: torch.Tensor, size: Sequence[int], config: FullEvaluation) -> torch.Tensor:
    """(N, height, width) maps in [0, 1] -> (N, *size): resized as the protocol does, then post-processed."""
    mode = PROTOCOLS[config.protocol].resize
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return post_process(F.interpolate(normalized[None], tuple(size), mode=mode, **corners)[0], config)


def post_process(maps: torch.Tensor, config: FullEvaluation) -> torch.Tensor:
    """(N, height, width) -> the same: smoothing, threshold and orphan filter, as far as the configuration asks."""
    if config.smoothing_sigma:
        maps = gaussian_smooth(maps, config.smoothing_sigma)
    if config.map_threshold != "none":
        threshold = otsu_threshold(maps) if config.map_threshold == "otsu" else mixture_threshold(maps)
        kept = maps > threshold[:, None, None]
        if config.orphan_share:
            kept = remove_orphans(kept, config.orphan_share)
        maps = maps * kept
    return maps


def open_recorder(stack: ExitStack, model: Model, names: Sequence[str], config: FullEvaluation) -> Recorder:
    cross = stack.enter_context(record_attention(model.denoiser, names))
    if config.self_attention_power == 0:
        return Recorder(cross)
    # Of the self-attention layers, those of the finest size that has at most 32 x 32 places can be held.
    return Recorder(cross, stack.enter_context(record_attention(model.denoiser, kind="self", max_places=1024)))

"""Evaluation depends on neither batch size nor chance, scores a right map as right, and writes what it should."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import LCMScheduler
from listed import WORDS, Listed, sample
from PIL import Image
from safetensors.torch import load_file
from training import prepared

from distill.config import FullEvaluation
from distill.data.cache import model_fingerprint
from distill.data.phantom.dataset import PhantomDataset
from distill.data.remembered import Remembered
from distill.evaluation import drawing as drawing_module
from distill.evaluation import evaluate as module
from distill.evaluation import localization as localization_module
from distill.evaluation.drawing import evaluation_order, generate, quality
from distill.evaluation.evaluate import HeldOut, evaluate, finite, held_out
from distill.evaluation.fidelity import Generated
from distill.evaluation.images import read_png, save_png
from distill.evaluation.kept import Batches, digest, weights_of
from distill.evaluation.protocols import RealLatents
from distill.metrics import FIDELITY, MANIFOLD, Manifolds, frechet_distance, kernel_distance
from distill.metrics.features import Features
from distill.models import model_of
from distill.models.family import Model
from distill.report import validate_metrics

CONFIG = FullEvaluation(
    localization_images=4,
    timesteps=(100, 600),
    generated_images=4,
    diversity_captions=1,
    diversity_samples=2,
    num_inference_steps=2,
    batch_size=4,
    features="none",
    bootstrap_samples=20,
    examples=2,
)


# --- batch size -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_an_image_depends_on_its_caption_and_seed_only(loaded: dict[str, Model], kind: str) -> None:
    captions = ["No edema.", "Large pleural effusion on the left.", "", "Edema."]
    together = generate(loaded[kind], captions, [5, 6, 7, 8], 64, CONFIG)
    assert together.shape == (4, 3, 64, 64) and together.dtype == torch.float32
    assert together.min() >= 0 and together.max() <= 1 and together.std() > 0
    for place, caption in enumerate(captions):
        alone = generate(loaded[kind], [caption], [5 + place], 64, CONFIG)[0]
        torch.testing.assert_close(alone, together[place], rtol=0, atol=1e-4)
    other_seed = generate(loaded[kind], captions[:1], [6], 64, CONFIG)[0]
    assert (other_seed - together[0]).abs().max() > 1e-2


# --- chance and resolution ------------------------------------------------------------------------------------------


def run_all(model: Model, dataset: Any, config: FullEvaluation, folder: Path, resolution: int) -> Any:
    accelerator = Accelerator()
    against = held_out(dataset, model, config, None, accelerator=accelerator, run_dir=folder)
    return evaluate(
        model, against, config, resolution=resolution, accelerator=accelerator, arm_dir=folder / "model", label="m"
    )


def test_the_same_seed_gives_the_same_numbers_and_files(sd: Model, phantoms: PhantomDataset, tmp_path: Path) -> None:
    results = []
    for place, name in enumerate("ab"):
        torch.manual_seed(place)  # the global generator must not matter
        results.append(run_all(sd, phantoms, CONFIG, tmp_path / name, 64))
        assert results[-1].pop("seconds")["evaluation_seconds"] > 0
    assert results[0] == results[1]
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert [n.as_posix() for n in names] == [
        "model/drawn.jsonl",
        "model/maps.safetensors",
        "model/pairs.jsonl",
        "model/samples/0000.png",
        "model/samples/0001.png",
        "model/scored.jsonl",
        "model/word_maps.safetensors",
        "real/0000.png",
        "real/0001.png",
        "real/examples.jsonl",
        "real/priors.json",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    other = run_all(sd, phantoms, CONFIG.model_copy(update=dict(seed=1)), tmp_path / "c", 64)
    assert other["localization"]["mass"] != results[0]["localization"]["mass"]
    assert (tmp_path / "c/model/samples/0000.png").read_bytes() != (tmp_path / "a/model/samples/0000.png").read_bytes()


class Layout(Features):
    """Its features are the mean of an image; it notes the layout of its weights."""

    name = "layout"

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.seen = torch.nn.Conv2d(3, 2, 3), list[bool]()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        self.seen.append(self.conv.weight.is_contiguous())
        return images.mean(dim=(2, 3)), None


def test_on_a_cpu_models_are_measured_with_channels_last(
    sd: Model, phantoms: PhantomDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less time; afterwards the model can be saved."""
    weights = [next(w for w in part.parameters() if w.ndim == 4 and w.shape[-1] > 1) for part in (sd.denoiser, sd.vae)]
    drawn, features, accelerator = [], Layout(), Accelerator()

    def draw(*arguments: Any) -> torch.Tensor:
        drawn.extend(weight.is_contiguous() for weight in weights)
        return generate(*arguments)

    monkeypatch.setattr(drawing_module, "generate", draw)
    against = held_out(phantoms, sd, CONFIG, features, accelerator=accelerator, run_dir=tmp_path)
    of_real = len(features.seen)
    evaluate(sd, against, CONFIG, resolution=64, accelerator=accelerator, arm_dir=tmp_path / "model", label="m")
    assert 0 < of_real < len(features.seen) and drawn and not any([*features.seen, *drawn])
    assert all(weight.is_contiguous() for weight in (*weights, features.conv.weight))


@pytest.mark.parametrize("resolution", [64, 72, 128])
def test_evaluation_runs_at_the_resolution_of_the_data(sd: Model, tmp_path: Path, resolution: int) -> None:
    """72 px gives 9 x 9 latents, and 5 x 5 places one level down."""
    dataset = PhantomDataset("test", 4, 0, resolution)
    config = CONFIG.model_copy(update=dict(generated_images=2, localization_images=2))
    result = run_all(sd, dataset, config, tmp_path, resolution)
    validate_metrics(
        {
            "arms": {"m": {k: result[k] for k in ("localization", "quality")} | {"cost": cost()}},
            "provenance": {},
        }
    )
    assert Image.open(tmp_path / "model/samples/0000.png").size == (resolution, resolution)
    assert Image.open(tmp_path / "real/0000.png").size == (resolution, resolution)
    side = resolution // sd.vae_factor
    maps = load_file(tmp_path / "model/maps.safetensors")
    assert maps and all(value.shape == (side, side) and value.dtype == torch.float32 for value in maps.values())
    examples = [json.loads(line) for line in (tmp_path / "real/examples.jsonl").read_text().splitlines()]
    assert len(examples) == 2
    named = {f"{e['id']}/{region['finding']}" for e in examples for region in e["regions"]}
    assert maps.keys() <= named
    for x, y, width, height in (box for e in examples for region in e["regions"] for box in region["boxes"]):
        assert 0 <= x < x + width <= resolution and 0 <= y < y + height <= resolution


def cost() -> dict[str, None]:
    return dict.fromkeys(("train_seconds", "steps", "peak_memory_gb", "evaluation_seconds", "trainable_parameters"))


# --- quality --------------------------------------------------------------------------------------------------------


class Means(Features):
    """Features: the mean of each quarter. Score: brightness, as if edema were bright."""

    name = "means"
    findings = ("edema",)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        quarters = F.adaptive_avg_pool2d(images[:, :1], 2).flatten(1)
        return quarters, quarters.mean(dim=1, keepdim=True)


def pictures(count: int) -> Listed:
    """The odd ones have edema and are bright."""
    made = []
    for i in range(count):
        base = sample(f"{i}", "Edema." if i % 2 else f"Effusion {i}.", ("edema" if i % 2 else "pleural effusion", None))
        made.append(replace(base, pixel_values=(base.pixel_values * 0.2 + (0.5 if i % 2 else -0.5) + 0.01 * i)))
    return Listed(made, WORDS)


def draw_real(dataset: Listed) -> Any:
    """In place of generate(): the real image of the caption whose seed it is, at 8 bits as no other is."""

    def generated(model: Any, captions: Any, seeds: Sequence[int], *rest: Any) -> torch.Tensor:
        return torch.stack([(dataset[seed % 1_000_003].pixel_values + 1) / 2 for seed in seeds])

    return generated


def test_real_images_in_place_of_generated_ones_have_fid_0_full_finding_auc_and_diversity_0(
    sd: Model, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = pictures(8)
    config = CONFIG.model_copy(update=dict(generated_images=6, diversity_captions=2, diversity_samples=3, seed=0))
    against = held_out(dataset, sd, config, Means(), accelerator=accelerator, run_dir=tmp_path)
    monkeypatch.setattr(drawing_module, "generate", draw_real(dataset))
    result = quality(
        sd, dataset, config, resolution=64, features=against.features, real=against.real, accelerator=accelerator,
        arm_dir=tmp_path / "arm", examples=against.examples,
    )  # fmt: skip
    assert result["fid"] == pytest.approx(0, abs=1e-6)
    assert [result[name] for name in ("precision", "recall", "coverage")] == [1, 1, 1]
    assert result["kid"] == pytest.approx(kernel_distance(against.real.features, against.real.features)[0], abs=1e-6)
    assert result["neighbours"] == 5 and all(len(result[f"{name}_ci"]) == 2 for name in FIDELITY)
    assert result["finding_auc"] == 1 and result["finding_auc_ci"] == [1, 1]
    # The seeds of a caption's samples are 1,000,003 apart, so that draw_real gives the same image for each of them.
    assert result["diversity"] == pytest.approx(0, abs=1e-6)
    assert (result["images"], result["features"]) == (6, "means")
    about = {"name": "means", "resize": "none", "dimensions": 4, "real_images": 6}
    assert result["extractor"] == about | {"weights": model_fingerprint(Means())}
    assert sorted(p.name for p in (tmp_path / "arm/samples").iterdir()) == ["0000.png", "0001.png"]
    shown = (tmp_path / "arm/samples/0001.png").read_bytes()
    assert shown == (tmp_path / "real/0001.png").read_bytes(), "sample k is of the caption of example k"


def test_the_seed_of_an_image_is_of_its_caption_and_not_of_its_place(
    sd: Model, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, asked = pictures(6), []

    def generated(model: Any, captions: Sequence[str], seeds: Sequence[int], *rest: Any) -> torch.Tensor:
        asked.extend(zip(captions, seeds, strict=True))
        return torch.rand(len(seeds), 3, 64, 64)

    monkeypatch.setattr(drawing_module, "generate", generated)
    config = CONFIG.model_copy(update=dict(generated_images=3, diversity_samples=2, seed=10))
    quality(
        sd, dataset, config, resolution=64, features=None, real=Generated([], None, None), accelerator=accelerator,
        arm_dir=tmp_path, examples=[4, 2],
    )  # fmt: skip
    order = [(4, 14), (2, 12), (0, 10), (4, 14 + 1_000_003), (4, 14 + 2_000_006)]
    assert asked == [(dataset.caption(index), seed) for index, seed in order]


def test_diversity_is_above_0_for_images_that_differ(
    sd: Model, phantoms: PhantomDataset, accelerator: Accelerator, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update=dict(generated_images=1, diversity_captions=1, diversity_samples=3))
    (tmp_path / "features.safetensors").touch()  # of an earlier evaluation, with features
    result = quality(
        sd, phantoms, config, resolution=64, features=None, real=Generated([], None, None), accelerator=accelerator,
        arm_dir=tmp_path,
    )  # fmt: skip
    assert 0 < result["diversity"] <= 1
    assert not (tmp_path / "features.safetensors").exists(), "differences of models would be computed from it"
    assert result["features"] is result["fid"] is result["fid_ci"] is result["finding_auc"] is None


def test_the_real_row_has_the_distance_between_two_sets_of_real_images(
    sd: Model, accelerator: Accelerator, tmp_path: Path
) -> None:
    dataset = pictures(8)
    against = held_out(dataset, sd, CONFIG, Means(), accelerator=accelerator, run_dir=tmp_path)
    assert against.examples == [0, 1]
    order = evaluation_order(dataset, against.examples, 8)
    with torch.no_grad():
        features = Means()(torch.stack([dataset[i].pixel_values for i in order]))[0]
    assert against.quality["fid"] == pytest.approx(frechet_distance(features[:4], features[4:]), rel=1e-4)
    assert against.quality["fid"] > 0 and len(against.quality["fid_ci"]) == 2
    assert against.quality["kid"] == pytest.approx(kernel_distance(features[:4], features[4:])[0], rel=1e-4)
    near = held_out(
        dataset, sd, CONFIG.model_copy(update=dict(neighbours=2)), Means(), accelerator=accelerator, run_dir=tmp_path
    )
    expected = dict(zip(MANIFOLD, Manifolds(features[:4], features[4:], 2).values(), strict=True))
    assert {name: near.quality[name] for name in MANIFOLD} == pytest.approx(expected)
    assert all(against.quality[name] is None for name in MANIFOLD), "4 images have no fifth neighbour"
    assert against.quality["finding_auc"] == 1 and against.quality["diversity"] is None
    assert against.quality["images"] == 4 == len(against.real.indices)
    torch.testing.assert_close(against.real.features, features[:4], rtol=0, atol=1e-6)

    few = held_out(pictures(6), sd, CONFIG, Means(), accelerator=accelerator, run_dir=tmp_path)
    assert all(few.quality[name] is few.quality[f"{name}_ci"] is None for name in FIDELITY), "not as many others"


def test_examples_come_first_in_the_order_of_captions() -> None:
    dataset = pictures(6)
    assert evaluation_order(dataset, [3, 5], 4) == [3, 5, 0, 1]
    assert evaluation_order(dataset, [3, 5], 1) == [3]
    assert evaluation_order(dataset, [], 99) == [0, 1, 2, 3, 4, 5]


class TwoCaptions(Listed):
    """Rows 2 k and 2 k + 1 are two captions of one image, or of two files of the same bytes."""

    def fingerprint(self, index: int) -> str:
        return str(index // 2)


def test_an_image_of_several_captions_counts_once(sd: Model, accelerator: Accelerator, tmp_path: Path) -> None:
    dataset = TwoCaptions(pictures(8).samples, WORDS)
    assert evaluation_order(dataset, [3], 4) == [3, 0, 4, 6], "one of each image"
    assert evaluation_order(dataset, [3], 99) == evaluation_order(dataset, [3, 2], 99) == [3, 0, 4, 6]
    config = CONFIG.model_copy(update={"generated_images": 4, "neighbours": 2, "examples": 1})
    found = held_out(dataset, sd, config, Means(), accelerator=accelerator, run_dir=tmp_path)
    assert len({index // 2 for index in found.real.indices}) == 4
    assert found.quality["fid"] is None, "no image is left for the other side"
    config = config.model_copy(update={"generated_images": 2})
    found = held_out(dataset, sd, config, Means(), accelerator=accelerator, run_dir=tmp_path / "two")
    assert found.quality["fid"] is not None


def test_captions_without_boxes_have_quality_and_no_localization(sd: Model, tmp_path: Path) -> None:
    dataset = Listed([sample(n, f"A picture, {n}.") for n in "abcd"], {})
    result = run_all(sd, dataset, CONFIG, tmp_path, 64)
    assert result["localization"] is None and result["quality"]["images"] == 4
    assert (tmp_path / "real/0001.png").exists() and (tmp_path / "model/samples/0001.png").exists()
    assert not (tmp_path / "model/maps.safetensors").exists()


# --- the rest -------------------------------------------------------------------------------------------------------


def test_evaluation_leaves_the_model_as_it_was(sd: Model, phantoms: PhantomDataset, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in sd.denoiser.state_dict().items()}
    processors, scheduler = dict(sd.denoiser.attn_processors), sd.pipeline.scheduler
    against = HeldOut(phantoms, [0], None, Generated([], None, None), {})
    config = CONFIG.model_copy(update=dict(generated_images=1, localization_images=1, scheduler="lcm"))
    evaluate(sd, against, config, resolution=64, accelerator=Accelerator(), arm_dir=tmp_path, label="")
    assert all(torch.equal(value, before[name]) for name, value in sd.denoiser.state_dict().items())
    assert sd.denoiser.attn_processors == processors and sd.pipeline.scheduler is scheduler


def test_the_scheduler_is_given_back_where_drawing_fails(sd: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, used = sd.pipeline.scheduler, []

    def out_of_memory(self: Any, **options: Any) -> None:
        used.append(type(self.scheduler))
        raise MemoryError

    monkeypatch.setattr(type(sd.pipeline), "__call__", out_of_memory)
    with pytest.raises(MemoryError):
        generate(sd, ["edema"], [0], 64, CONFIG.model_copy(update=dict(scheduler="lcm")))
    assert used == [LCMScheduler] and sd.pipeline.scheduler is scheduler


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("nan"), None),
        (
            {"a": [1.0, float("inf"), -float("inf")], "b": (2, "nan", None, True)},
            {"a": [1.0, None, None], "b": [2, "nan", None, True]},
        ),
        ({}, {}),
        (0.0, 0.0),
    ],
)
def test_finite_turns_what_json_cannot_hold_into_null(value: Any, expected: Any) -> None:
    assert finite(value) == expected
    json.dumps(finite(value), allow_nan=False)


# --- what is used again ---------------------------------------------------------------------------------------------


def measured(model: Model, dataset: Any, folder: Path, **options: Any) -> dict[str, Any]:
    """Entry and files of one evaluation with features."""
    config = CONFIG.model_copy(update={"batch_size": 2} | options)
    accelerator = Accelerator()
    against = held_out(dataset, model, config, Means(), accelerator=accelerator, run_dir=folder)
    found = evaluate(
        model, against, config, resolution=64, accelerator=accelerator, arm_dir=folder / "model", label="m"
    )
    found.pop("seconds")
    names = ("pairs.jsonl", "maps.safetensors", "word_maps.safetensors", "features.safetensors", "samples/0001.png")
    files = {name: (folder / "model" / name).read_bytes() for name in names}
    return found | {"files": files}


def test_images_for_other_parts_leave_the_features_of_the_quality_that_was_measured(
    sd: Model, accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = measured(sd, pictures(6), tmp_path)["files"]["features.safetensors"]
    dataset, given = pictures(6), []
    monkeypatch.setattr(module, "_utility", lambda *parts: given.append(parts) or {})
    against = held_out(dataset, sd, CONFIG, None, accelerator=accelerator, run_dir=tmp_path)
    evaluate(
        sd, against, CONFIG, resolution=64, accelerator=accelerator, arm_dir=tmp_path / "model", label="m",
        parts=["utility"],
    )  # fmt: skip
    assert given and (tmp_path / "model/features.safetensors").read_bytes() == before


class Calls:
    """Counts the images that are drawn and the captions whose maps are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn, self.mapped = 0, 0
        draw, inputs = drawing_module.generate, localization_module.prepare_inputs

        def drawing(model: Any, captions: Sequence[str], *rest: Any) -> Any:
            self.drawn += len(captions)
            return draw(model, captions, *rest)

        def preparing(model: Any, samples: Any, batch: Sequence[Any], *rest: Any) -> Any:
            self.mapped += len(batch)
            return inputs(model, samples, batch, *rest)

        monkeypatch.setattr(drawing_module, "generate", drawing)
        monkeypatch.setattr(localization_module, "prepare_inputs", preparing)

    def take(self) -> tuple[int, int]:
        taken = self.drawn, self.mapped
        self.drawn = self.mapped = 0
        return taken


def test_more_images_are_added_and_the_numbers_are_those_of_one_evaluation(
    sd: Model, phantoms: PhantomDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, many = dict(generated_images=3, localization_images=3), dict(generated_images=6, localization_images=6)
    calls = Calls(monkeypatch)
    at_once = measured(sd, phantoms, tmp_path / "once", **many)
    assert calls.take() == (6 + 2, 6)
    measured(sd, phantoms, tmp_path / "added", **few)
    assert calls.take() == (3 + 2, 3)
    assert measured(sd, phantoms, tmp_path / "added", **many) == at_once
    assert calls.take() == (4 + 2, 4), "three, the third again, which was alone in its batch, and those beside it"
    assert measured(sd, phantoms, tmp_path / "added", **many) == at_once
    assert measured(sd, phantoms, tmp_path / "added", **many | {"bootstrap_samples": 20}) == at_once
    assert calls.take() == (0, 0)


def test_fewer_images_and_then_more_make_nothing(
    sd: Model, phantoms: PhantomDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many, few = dict(generated_images=6, localization_images=6), dict(generated_images=4, localization_images=4)
    calls = Calls(monkeypatch)
    whole = measured(sd, phantoms, tmp_path, **many)
    calls.take()
    assert measured(sd, phantoms, tmp_path, **few)["quality"]["images"] == 4
    assert measured(sd, phantoms, tmp_path, **many) == whole and calls.take() == (0, 0)


@pytest.mark.parametrize(
    ("change", "drawn", "mapped"),
    [({"guidance_scale": 2.0}, 6, 0), ({"num_inference_steps": 3}, 6, 0), ({"timesteps": (300,)}, 0, 4),
     ({"diversity_samples": 3}, 3, 0), ({"seed": 3}, 6, 4)],
)  # fmt: skip
def test_options_make_anew_what_they_decide(
    sd: Model,
    phantoms: PhantomDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    drawn: int,
    mapped: int,
) -> None:
    calls = Calls(monkeypatch)
    before = measured(sd, phantoms, tmp_path)
    calls.take()
    after = measured(sd, phantoms, tmp_path, **change)
    assert calls.take() == (drawn, mapped)
    assert (after["quality"] == before["quality"]) is (drawn == 0)
    assert (after["localization"] == before["localization"]) is (mapped == 0)


def test_lines_that_are_torn_or_changed_are_made_anew(
    sd: Model, phantoms: PhantomDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = measured(sd, phantoms, tmp_path)
    for name, old, new in (("scored", '"auc": 0.', '"auc": 0.0'), ("drawn", '"values": ["<f4", [4], "', None)):
        path = tmp_path / "model" / f"{name}.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        place = next(k for k, line in enumerate(lines) if k > 2 and old in line)  # of no example: those are made anew
        at = lines[place].index(old) + len(old)
        lines[place] = lines[place].replace(old, new) if new else f"{lines[place][:at]}AAAA{lines[place][at + 4 :]}"
        path.write_text("\n".join(lines)[:-20], encoding="utf-8")
    (tmp_path / "model" / "maps.safetensors").write_bytes(b"no tensors")
    (tmp_path / "model" / "samples" / "0001.png").write_bytes(b"no image")
    assert measured(sd, phantoms, tmp_path) == before


def test_images_of_another_caption_or_other_weights_are_made_anew(
    sd: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = pictures(4)
    calls = Calls(monkeypatch)
    first = measured(sd, dataset, tmp_path)
    assert calls.take() == (6, 4)
    dataset.samples[3] = replace(dataset.samples[3], caption="Edema again.")
    assert measured(sd, dataset, tmp_path) != first
    assert calls.take() == (2, 2), "the batch of the caption"
    weight = next(sd.denoiser.parameters())
    weight.data += 0.01
    try:
        changed = measured(sd, dataset, tmp_path)
    finally:
        weight.data -= 0.01
    assert calls.take() == (6, 4) and changed["quality"]["fid"] != first["quality"]["fid"]


def test_the_scale_of_an_adapter_and_the_noise_schedule_are_part_of_the_weights() -> None:
    model = prepared(denoiser="lora", text_encoder="frozen")
    before = weights_of(model)
    assert weights_of(model) == before
    layer = next(part for part in model.denoiser.modules() if hasattr(part, "scaling"))
    layer.scaling["default"] *= 2
    assert weights_of(model) != before
    layer.scaling["default"] /= 2
    assert weights_of(model) == before
    model.pipeline.scheduler.register_to_config(beta_end=0.5)
    assert weights_of(model) != before


def test_a_batch_is_there_if_it_was_full_or_is_the_same_batch() -> None:
    whole = Batches("abcde", 2)
    entries = {place: whole.mark(places) for places in ((0, 1), (2, 3), (4,)) for place in places}
    assert whole.missing({}) == [range(0, 2), range(2, 4), range(4, 5)] and whole.missing(entries) == []
    assert Batches("abcd", 4).missing(entries) == [], "of full batches"
    assert Batches("abcdef", 3).missing(entries | {5: entries[0]}) == [range(3, 6)], "one was cut short"
    assert Batches("abcde", 2, rank=1, world=2).missing({1: entries[1]}) == [range(1, 5, 2)]
    assert whole.mark((2, 3), end=3)["full"] is False, "half of it is of another kind"
    assert whole.names_with(range(3, 5)) == [entries[3]["batch"], entries[4]["batch"]]


@pytest.mark.parametrize("part", ["localization", "quality"])
def test_either_part_can_be_had_alone(sd: Model, phantoms: PhantomDataset, tmp_path: Path, part: str) -> None:
    found = run_all(sd, phantoms, CONFIG.model_copy(update={"parts": (part,)}), tmp_path, 64)
    other = "quality" if part == "localization" else "localization"
    assert found[part] is not None and found[other] is None
    assert (tmp_path / "model/pairs.jsonl").exists() is (part == "localization")
    assert (tmp_path / "model/samples/0000.png").exists() is (part == "quality")
    whole = run_all(sd, phantoms, CONFIG, tmp_path / "whole", 64)
    assert found[part] == whole[part]


def test_real_images_are_decoded_once_and_encoded_once_for_all_models(
    sd: Model, phantoms: PhantomDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = PhantomDataset.__getitem__
    monkeypatch.setattr(PhantomDataset, "__getitem__", lambda self, index: drawn.append(index) or draw(self, index))
    encoded: list[int] = []
    encode = sd.vae.encode
    monkeypatch.setattr(sd.vae, "encode", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    accelerator, config = Accelerator(), CONFIG.model_copy(update={"parts": ("localization",)})
    against = held_out(phantoms, sd, config, None, accelerator=accelerator, run_dir=tmp_path)
    shared: dict[str, Any] = {"resolution": 64, "accelerator": accelerator, "label": "m"}
    first = evaluate(sd, against, config, arm_dir=tmp_path / "first", **shared)
    assert len(drawn) == len(set(drawn))
    shown = -(-len(against.examples) // config.batch_size)  # write_word_maps encodes the examples by themselves
    batches = len(encoded) - shown
    assert batches > 0
    second = evaluate(sd, against, config, arm_dir=tmp_path / "second", **shared)
    assert len(encoded) == batches + 2 * shown and len(drawn) == len(set(drawn))
    assert first["localization"] == second["localization"]
    with torch.no_grad():
        weight = next(sd.vae.encoder.parameters())
        kept = weight.clone()
        weight.mul_(1.5)
    try:
        other = RealLatents()
        assert other.of(sd.vae, (0,), lambda: torch.zeros(1)) is other.of(sd.vae, (0,), lambda: torch.ones(1))
        changed = model_of(sd.pipeline)
        evaluate(changed, replace(against, latents=other), config, arm_dir=tmp_path / "third", **shared)
        assert len(encoded) == 2 * batches + 3 * shown
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_samples_beyond_the_limit_are_not_kept(phantoms: PhantomDataset) -> None:
    sample = phantoms[0]
    size = sample.pixel_values.nbytes + sum(region.mask.nbytes for region in sample.regions)
    kept = Remembered(phantoms, limit=size)
    assert kept[0] is kept[0] and kept[1] is not kept[1] and len(kept) == len(phantoms)
    assert kept.caption(1) == phantoms.caption(1) and kept.fingerprint(1) == phantoms.fingerprint(1)
    with pytest.raises(AttributeError):
        kept.regions_of_another_kind  # noqa: B018


def test_the_hash_of_values_is_that_of_their_content() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})


def test_a_picture_on_disk_has_the_pixels_that_it_was_given(tmp_path: Path) -> None:
    image = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5]).expand(3, 2, 5)
    save_png(image, tmp_path / "a.png")
    expected = torch.tensor([0.0, 0.0, 128 / 255, 1.0, 1.0]).expand(3, 2, 5)
    torch.testing.assert_close(read_png(tmp_path / "a.png"), expected)

"""Do images fit their captions, by a CLIP or SigLIP model in a local folder?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from recipe import recipe_module, refusal_of
from test_features import PREPROCESSOR, changed_config, save_vision_model, without
from test_memorization import HELD_OUT, drawing, evaluate_argv, image_folder
from test_reuse import never
from tiny import tiny_sd
from transformers import CLIPConfig, CLIPModel, PreTrainedModel, SiglipConfig, SiglipModel

from distill.cli import parse
from distill.config import FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.errors import UserError
from distill.evaluation import drawing as module
from distill.evaluation.similarity import image_text_similarity
from distill.metrics.bootstrap import resample_counts
from distill.metrics.image_text import ImageText, similarity

CAPTIONS = ["a small pleural effusion", "no effusion", "a large left pleural effusion with edema"]
SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_model(folder: Path, kind: str = "clip", seed: int = 0) -> Path:
    tokenizer = tiny_sd().tokenizer
    text = {
        **SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "projection_size": 16,
    }  # fmt: skip
    vision = {**SHAPE, "image_size": 28, "patch_size": 14}
    torch.manual_seed(seed)
    model: PreTrainedModel = (
        CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        if kind == "clip"
        else SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_embeddings_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    found = ImageText(save_model(tmp_path / "clip", kind))
    assert found.name == "clip" and not any(parameter.requires_grad for parameter in found.parameters())
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    first, second = found(images, CAPTIONS)
    tokens = found.tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        both = found.model(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=found.prepare(images)
        )
    torch.testing.assert_close(first, F.normalize(both.image_embeds, dim=-1))
    torch.testing.assert_close(second, F.normalize(both.text_embeds, dim=-1))
    assert not torch.allclose(second[0], second[1]) and not torch.allclose(first[0], first[1])
    long = "effusion " * 200
    torch.testing.assert_close(found(images[:1], [long])[1], found(images[:1], [long + "edema"])[1])


def test_what_a_caption_adds_is_against_all_others() -> None:
    captions = ["a", "b", "a", "c", "b", "d"]
    texts = {
        name: F.normalize(torch.randn(4, generator=torch.Generator().manual_seed(ord(name))), dim=0) for name in "abcd"
    }
    images = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), dim=1)
    found = similarity(images, torch.stack([texts[name] for name in captions]), captions, samples=200)
    own, adds = [], []
    for image, name in zip(images, captions, strict=True):
        others = [100 * float(image @ texts[other]) for other in captions if other != name]
        own.append(100 * float(image @ texts[name]))
        adds.append(own[-1] - sum(others) / len(others))
    assert found["own"] == pytest.approx(sum(own) / 6, abs=1e-4) and found["adds"] == pytest.approx(
        sum(adds) / 6, abs=1e-4
    )
    for name, value in (("own", found["own"]), ("adds", found["adds"])):
        low, high = found[f"{name}_ci"]  # type: ignore[literal-required]
        assert low < value < high  # type: ignore[operator]
    blind = similarity(images[:1].expand(4, 4), torch.stack([texts[name] for name in "abcd"]), list("abcd"))
    assert blind["adds"] == pytest.approx(0, abs=1e-9) and blind["own_ci"] is not None


def test_one_caption_alone_adds_nothing_that_can_be_measured() -> None:
    one = F.normalize(torch.randn(3, 4), dim=1)
    found = similarity(one, one, ["a", "a", "a"])
    assert found["own"] == pytest.approx(100, abs=1e-3) and found["adds"] is None and found["adds_ci"] is None
    assert similarity(one[:1], one[:1], ["a"])["own_ci"] is None


@pytest.mark.parametrize(
    ("images", "texts", "captions"),
    [
        (torch.ones(2, 4), torch.ones(2, 3), ["a", "b"]),
        (torch.ones(2, 4), torch.ones(2, 4), ["a"]),
        (torch.ones(0, 4), torch.ones(0, 4), []),
        (torch.full((2, 4), torch.nan), torch.ones(2, 4), ["a", "b"]),
    ],
)
def test_what_cannot_be_compared_is_refused(images: torch.Tensor, texts: torch.Tensor, captions: list[str]) -> None:
    with pytest.raises(ValueError, match="N captions|NaN"):
        similarity(images, texts, captions)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("config.json"), "it has no config.json"),
        (without("preprocessor_config.json"), "it has no preprocessor_config.json"),
        (without("tokenizer.json"), "it has none of tokenizer.json, vocab.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "it takes no image with a text"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "transformers cannot load it"),
        (changed_config(model_type="of its own", auto_map={"AutoModel": "code.Model"}), "transformers cannot load it"),
        (changed_config(vision_config={**SHAPE, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}),
         "its weights lack vision_model"),
        (changed_config(projection_dim=9), "transformers cannot load it|its weights lack"),
        (lambda folder: save_vision_model(folder), "Dinov2Model does not compare images with texts"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_such_model_is_one_error(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    folder = save_model(tmp_path / "clip")
    damage(folder)
    with pytest.raises(UserError, match=f"image_text_model .*clip: .*({said}).*; give a folder with"):
        ImageText(folder)


def argv_of(tmp_path: Path, *more: str) -> list[str]:
    argv = evaluate_argv(tmp_path, *more)
    argv[argv.index("quality,memorization")] = "similarity"
    return argv


def test_the_recipe_measures_similarity_and_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_module("evaluate")
    assert "give both a model" in refusal_of(recipe.evaluate, recipe.EvaluateConfig, argv_of(tmp_path), capsys)
    option = ["--evaluation.image_text_model", str(save_model(tmp_path / "clip"))]
    argv = argv_of(tmp_path, *option)
    assert "give both a model" in refusal_of(
        recipe.evaluate, recipe.EvaluateConfig, evaluate_argv(tmp_path, *option), capsys
    )
    monkeypatch.setattr(module, "generate", drawing(HELD_OUT))
    recipe.evaluate(parse(recipe.EvaluateConfig, argv))
    found = json.loads((tmp_path / "out/metrics.json").read_text())["arms"]["base"]["similarity"]
    # The drawn images are the real ones.
    assert found["own"] == pytest.approx(found["real"], abs=0.02)
    assert found["adds"] == pytest.approx(found["real_adds"], abs=0.02)
    assert found["own_ci"][0] <= found["own"] <= found["own_ci"][1] and found["model"] == "clip"
    report = (tmp_path / "out/report.html").read_text()
    assert "caption adds ↑" in report and "image-text similarity ↑" in report
    monkeypatch.setattr(module, "generate", never)
    recipe.evaluate(parse(recipe.EvaluateConfig, argv))
    assert "base: similarity is already evaluated" in capsys.readouterr().out
    save_model(tmp_path / "clip", seed=1)
    recipe.evaluate(parse(recipe.EvaluateConfig, argv))
    assert "base: similarity is measured anew" in capsys.readouterr().out
    again = json.loads((tmp_path / "out/metrics.json").read_text())["arms"]["base"]["similarity"]
    assert again["own"] != found["own"]


def test_images_and_real_images_each_have_their_own_captions(tmp_path: Path) -> None:
    """In batches of two, of which the last holds one."""
    model = ImageText(save_model(tmp_path / "clip"))
    made, real = PhantomDataset("train", 5, 0, 64), PhantomDataset("test", 8, 0, 64)
    captions, rows, groups = [made.caption(k) for k in range(5)], [6, 1, 4], [*"aabcc"]
    config = FullEvaluation(batch_size=2, bootstrap_samples=20)
    found = image_text_similarity(model, lambda k: made[k].pixel_values, captions, groups, real, rows, config)
    for data, places, name, adds in ((made, [*range(5)], "own", "adds"), (real, rows, "real", "real_adds")):
        texts = [data.caption(k) for k in places]
        both = model(torch.stack([data[k].pixel_values for k in places]), texts)
        own = np.array([0, 0, 1, 2, 2]) if data is made else None
        right = similarity(*both, texts, 20, config.seed, groups=own)
        assert found[name] == pytest.approx(right["own"], abs=1e-4), name
        assert found[adds] == pytest.approx(right["adds"], abs=1e-4), adds
        assert found[f"{name}_ci"] == pytest.approx(right["own_ci"], abs=1e-4), name
    assert found["images"] == 5 and found["own"] != found["real"]


def test_images_of_another_tool_are_compared_with_their_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "generate", never)
    images = image_folder(tmp_path / "images", PhantomDataset("train", 6, 0, 64), 6)
    option = ["--evaluation.image_text_model", str(save_model(tmp_path / "clip")), "--images", str(images)]
    recipe = recipe_module("evaluate")
    recipe.evaluate(parse(recipe.EvaluateConfig, argv_of(tmp_path, *option)))
    found = json.loads((tmp_path / "out/metrics.json").read_text())["arms"]["images"]["similarity"]
    assert found["images"] == 6 and found["own"] != found["real"]


def test_the_interval_is_of_whole_patients() -> None:
    """Against a loop that draws patients; each image counts once for each draw of its patient."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(6, 4, generator=generator), dim=1) for _ in range(2))
    groups = np.array([0, 0, 0, 0, 1, 2])
    found = similarity(images, texts, [*"abcdef"], 30, 0, groups=groups)
    own = 100 * (images * texts).sum(dim=1).double().numpy()
    means = []
    for counts in next(resample_counts(3, 30, 0)):
        drawn = [value for value, group in zip(own, groups, strict=True) for _ in range(int(counts[group]))]
        means.append(np.mean(drawn))
    assert found["own_ci"] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=1e-4)
    alone = similarity(images, texts, [*"abcdef"], 30, 0, groups=np.zeros(6, dtype=int))
    assert alone["own_ci"] is None and alone["own"] == found["own"]

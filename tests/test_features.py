"""A vision model of transformers in a local folder as extractor of features; what is none is one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_sd
from transformers import Dinov2Config, Dinov2Model, PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

from distill.data.cache import model_fingerprint
from distill.errors import UserError
from distill.metrics.features import load_features

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
PREPROCESSOR = {
    "size": {"shortest_edge": 32}, "do_center_crop": True, "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.5],
}  # fmt: skip


def save_vision_model(folder: Path, model: PreTrainedModel | None = None, **changed: object) -> Path:
    torch.manual_seed(0)
    (model or Dinov2Model(Dinov2Config(**SHAPE))).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | changed))
    return folder


def test_a_vision_model_in_a_folder_sees_what_its_preprocessor_says(tmp_path: Path) -> None:
    folder = save_vision_model(tmp_path / "rad")
    found = load_features(str(folder), phantom_data=True)
    assert found is not None and found.name == "rad" and found.resize == "28 px, bicubic with antialiasing"
    assert not any(parameter.requires_grad for parameter in found.parameters()) and not found.training
    images = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1).expand(2, 3, 64, 64)
    values, scores = found(images)
    right = (torch.tensor([0.0, 0.5, 1.0]) - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.2, 0.25, 0.5])
    expected = found.model(pixel_values=right.view(1, 3, 1, 1).expand(2, 3, 28, 28)).pooler_output
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    assert scores is None
    other = load_features(str(save_vision_model(tmp_path / "b", image_mean=[0.5] * 3)), phantom_data=True)
    assert model_fingerprint(other) != model_fingerprint(found), "what is done to an image is part of the hash"


def test_a_model_without_a_trained_pooler_gives_its_class_token(tmp_path: Path) -> None:
    model = ViTModel(ViTConfig(**SHAPE, intermediate_size=16), add_pooling_layer=False).eval()
    found = load_features(str(save_vision_model(tmp_path / "vit", model, do_normalize=False)), phantom_data=True)
    assert found is not None
    with torch.no_grad():
        expected = model(pixel_values=torch.full((1, 3, 28, 28), 0.5)).last_hidden_state[:, 0]
    torch.testing.assert_close(found(torch.zeros(1, 3, 28, 28))[0], expected, rtol=0, atol=1e-5)


def test_a_classifier_in_a_folder_scores_its_classes(tmp_path: Path) -> None:
    names = {0: "Pleural_Effusion", 1: "Nodule", 2: "Edema"}
    model = ViTForImageClassification(ViTConfig(**SHAPE, intermediate_size=16, id2label=names)).eval()
    found = load_features(str(save_vision_model(tmp_path / "vit", model, do_normalize=False)), phantom_data=False)
    assert found is not None and found.findings == ["pleural effusion", "nodule", "edema"]
    pixels = torch.rand(3, 3, 28, 28)
    with torch.no_grad():
        values, scores = found(pixels * 2 - 1)
        torch.testing.assert_close(scores, model(pixel_values=pixels).logits, rtol=0, atol=1e-5)
        expected = model.vit(pixel_values=pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def changed_config(**changed: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def pickled(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("config.json"), "it has no config.json"),
        (without("preprocessor_config.json"), "it has no preprocessor_config.json"),
        (pickled, r"it has no whole model as \*\.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "it has no whole model"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "transformers cannot load it"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("[1]"), "does not say size"),
        (changed_config(model_type="of its own", auto_map={"AutoModel": "code.Model"}), "transformers cannot load it"),
        (changed_config(num_hidden_layers=2), "its weights lack encoder.layer"),
        (changed_config(hidden_size=32), "transformers cannot load it|its weights lack"),
        (lambda folder: save_vision_model(folder, tiny_sd().text_encoder), "reads input_ids"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_vision_model_is_one_error(
    tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    folder = save_vision_model(tmp_path / "rad")
    damage(folder)
    with pytest.raises(UserError, match=f"evaluation.features .*rad: .*({said}).*; give a folder with"):
        load_features(str(folder), phantom_data=True)


def test_a_file_is_no_extractor(tmp_path: Path) -> None:
    (tmp_path / "resnet.pth").touch()
    with pytest.raises(UserError, match="it is a file; give a folder"):
        load_features(str(tmp_path / "resnet.pth"), phantom_data=True)
    with pytest.raises(
        UserError, match="no extractor 'nowhere/rad'; available: auto, none, .* there is no such folder"
    ):
        load_features("nowhere/rad", phantom_data=True)

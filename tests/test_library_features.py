"""Weights of torchvision and timm in a file as extractor of features; what cannot be one is one clear error."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distill.errors import UserError
from distill.metrics.features import Preprocessing, load_features
from distill.metrics.library_features import StateFeatures


def small(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(4, classes) if classes else nn.Identity()).eval()


def of_state(state: dict[str, torch.Tensor], model: nn.Module | None = None) -> StateFeatures:
    prepare = Preprocessing(16, [0.5] * 3, [0.25] * 3)
    return StateFeatures("small", model or small(0), prepare, state, ["4."])


def test_features_are_what_the_classifier_reads() -> None:
    model = small()
    with torch.no_grad():
        model[0].weight.normal_()
    found = of_state(model.state_dict())
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    resized = nn.functional.interpolate((images + 1) / 2, size=(16, 16), mode="bicubic", antialias=True).clamp(0, 1)
    values, scores = found(images)
    torch.testing.assert_close(values, model[:4]((resized - 0.5) / 0.25))
    assert scores is None and found.name == "small" and found.resize == "16 px, bicubic with antialiasing"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda state: state.pop("0.weight"), r'other weights: .*Missing key.*"0.weight"'),
        (lambda state: state.update(other=torch.zeros(1)), r'other weights: .*Unexpected key.*"other"'),
        (lambda state: state.update({"0.bias": torch.zeros(5)}), "other weights: .*size mismatch for 0.bias"),
    ],
)
def test_a_state_of_another_model_is_refused(damage: Callable[[dict[str, torch.Tensor]], object], said: str) -> None:
    state = dict(small().state_dict())
    damage(state)
    with pytest.raises(UserError, match=f"evaluation.features small: its file has {said}"):
        of_state(state)


def test_a_model_that_gives_no_row_of_features_is_refused() -> None:
    model = small(0)
    model[3] = nn.Identity()
    with pytest.raises(UserError, match=r"it gives \(2, 4, 1, 1\) for two images"):
        of_state(small().state_dict(), model)


class Hostile:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return (Path.touch, (Path("ran"),))  # type: ignore[return-value]


@pytest.mark.parametrize("library", ["inception", "xrv", "timm:resnet18", "torchvision:resnet18"])
@pytest.mark.parametrize(
    ("write", "said"),
    [
        (lambda path: None, "there is no file"),
        (lambda path: path.write_bytes(b"no"), "no state dict that can be read safely"),
        (lambda path: torch.save(Hostile(), path), "no state dict that can be read safely"),
        (lambda path: torch.save([1], path), "no state dict that can be read safely"),
        (lambda path: torch.save({"epoch": 3}, path), "it holds more than weights by their names"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_state_is_refused_before_a_library_is_asked(
    library: str, write: Callable[[Path], object], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "weights.pth")
    with pytest.raises(UserError, match=f"evaluation.features {library}:weights.pth: .*{said}"):
        load_features(f"{library}:weights.pth", phantom_data=False)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("chosen", ["torchvision:resnet18", "timm::weights.pth", "torch:resnet18:weights.pth"])
def test_what_is_written_otherwise_is_refused(chosen: str) -> None:
    with pytest.raises(UserError, match=f"evaluation.features {chosen}: .* are written inception:FILE"):
        load_features(chosen, phantom_data=False)


def library(name: str) -> None:
    """Skip where a library is not there, or fits another torch."""
    try:
        __import__(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"needs {name}: {error}")


@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_a_library_that_is_not_there_is_one_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (name, f"{name}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match=f"it needs {name}, and a torchvision that fits torch"):
        load_features(f"{name}:resnet18:{tmp_path / 'weights.safetensors'}", phantom_data=False)


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit_b_32", "convnext_tiny"])
def test_a_state_of_torchvision(name: str, wrapped: bool, tmp_path: Path) -> None:
    library("torchvision")
    from torchvision.models import get_model  # type: ignore[import-not-found, import-untyped, unused-ignore]

    torch.manual_seed(0)
    model = get_model(name, weights=None, num_classes=7).eval()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3} if wrapped else model.state_dict(), tmp_path / "w.pth")
    found = load_features(f"torchvision:{name}:{tmp_path / 'w.pth'}", phantom_data=False)
    assert found is not None and found.name == f"torchvision:{name}"
    read: list[torch.Tensor] = []
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    head.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        values, _ = found(images)
        model(found.prepare(images))  # type: ignore[operator]
    torch.testing.assert_close(values, read[0])


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "vit_small_patch14_dinov2", "convnext_atto"])
def test_a_state_of_timm(name: str, tmp_path: Path) -> None:
    library("timm")
    import timm  # type: ignore[import-not-found, import-untyped, unused-ignore]

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    found = load_features(f"timm:{name}:{tmp_path / 'w.safetensors'}", phantom_data=False)
    assert found is not None
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        prepared = found.prepare(images)  # type: ignore[operator]
        expected = model.forward_head(model.forward_features(prepared), pre_logits=True)
        torch.testing.assert_close(found(images)[0], expected)


@pytest.mark.parametrize(
    "name", ["torchvision:no_such_model", "timm:no_such_model", "torchvision:raft_small", "torchvision:googlenet"]
)
def test_a_name_that_a_library_lacks_is_one_error(name: str, tmp_path: Path) -> None:
    library(name.partition(":")[0])
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="makes no classifier of images of this name"):
        load_features(f"{name}:{tmp_path / 'w.safetensors'}", phantom_data=False)


@pytest.mark.parametrize("has_thresholds", [True, False])
def test_xrv_of_a_file(has_thresholds: bool, tmp_path: Path) -> None:
    """The fetched model has operating points in its state; one that was trained anew has none."""
    library("torchxrayvision")
    import torchxrayvision  # type: ignore[import-not-found, import-untyped, unused-ignore]

    torch.manual_seed(0)
    model = torchxrayvision.models.DenseNet(weights=None).eval()
    if has_thresholds:
        model.op_threshs = torch.linspace(0.1, 0.9, 18)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    found = load_features(f"xrv:{tmp_path / 'w.pt'}", phantom_data=False)
    assert found is not None and found.name == "xrv"
    assert len(found.findings) == 18 and "pleural effusion" in found.findings and "pleural thickening" in found.findings
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        values, scores = found(images)
        gray = images.mean(dim=1, keepdim=True) * 1024
        torch.testing.assert_close(values, model.features2(gray))
        torch.testing.assert_close(scores, model(gray))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"xrv: the file has other weights: Missing key.*features.conv0.weight"):
        load_features(f"xrv:{tmp_path / 'other.safetensors'}", phantom_data=False)


def test_inception_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library("torch_fidelity")
    from torchmetrics.image.fid import NoTrainInceptionV3

    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        model = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    torch.save(model.state_dict(), tmp_path / "w.pth")
    found = load_features(f"inception:{tmp_path / 'w.pth'}", phantom_data=False)
    assert found is not None and found.name == "inception"
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        expected = model(((images + 1) * 127.5).round().to(torch.uint8))
        torch.testing.assert_close(found(images)[0], expected)
    torch.save({"a": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="evaluation.features inception: .* has other weights"):
        load_features(f"inception:{tmp_path / 'w.pth'}", phantom_data=False)

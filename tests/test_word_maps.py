"""The maps of words that the report shows are those that the protocol scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from listed import WORDS, Listed, sample
from safetensors.torch import load_file

from distill.attention.recording import attention_layers
from distill.config import FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.evaluation.localization import localization
from distill.evaluation.word_maps import LARGEST_MAP, WORD_MAPS_FILE, WordMaps, read_word_maps, write_word_maps
from distill.models.family import Model

CONFIG = FullEvaluation(localization_images=4, timesteps=(100, 600), batch_size=2, bootstrap_samples=20)


@pytest.mark.parametrize("kind", ["sd", "v", "sdxl"])
def test_a_findings_word_has_the_map_that_is_scored(
    loaded: dict[str, Model], accelerator: Accelerator, tmp_path: Path, kind: str
) -> None:
    model = loaded[kind]
    captions = ("Mild edema at left.", "A large effusion, no edema.", "Pleural effusions and edema.")
    regions = (["edema"], ["pleural effusion"], ["pleural effusion", "edema"])
    samples = [sample(c, c, *((r, None) for r in names)) for c, names in zip(captions, regions, strict=True)]
    dataset = Listed(samples, WORDS)
    words = (
        {"edema": "edema"}, {"pleural effusion": "effusion"}, {"pleural effusion": "effusions", "edema": "edema"}
    )  # fmt: skip
    config = CONFIG.model_copy(update={"layers": tuple(attention_layers(model.denoiser))[-2:]})
    localization(model, dataset, config, accelerator=accelerator, arm_dir=tmp_path, examples=[0, 1, 2])
    scored = load_file(tmp_path / "maps.safetensors")
    write_word_maps(model, dataset, config, examples=[0, 1, 2], accelerator=accelerator, arm_dir=tmp_path)
    assert len(scored) == 4
    for number, caption in enumerate(captions):
        shown = read_word_maps(tmp_path, number)
        assert shown is not None and shown.findings == words[number]
        for finding, word in words[number].items():
            np.testing.assert_allclose(shown.maps[word] / 255, scored[f"{caption}/{finding}"].numpy(), atol=0.003)


def test_every_word_and_token_group_has_a_map_with_its_place(
    sd: Model, accelerator: Accelerator, tmp_path: Path
) -> None:
    caption = "Edema in the left lung; the edema's edge. plate-like"
    dataset = Listed([sample("one", caption), sample("two", "a " * 120 + "lost")], {})
    write_word_maps(sd, dataset, CONFIG, examples=[1, 0], accelerator=accelerator, arm_dir=tmp_path)
    shown = read_word_maps(tmp_path, 1)  # the place among the examples, not in the data
    assert shown is not None
    words = ["edema", "in", "the", "left", "lung", "edema's", "edge", "plate-like"]
    assert list(shown.maps) == ["[BOS]", *words, "[EOS]", "[PAD]"]
    pieces = shown.pieces(caption)
    assert "".join(text for text, _ in pieces).startswith(caption)
    assert [text for text, word in pieces if word == "the"] == ["the", "the"]
    assert [word for _, word in pieces[-6:] if word] == ["[BOS]", "[EOS]", "[PAD]"]
    for values in shown.maps.values():
        assert values.dtype == np.uint8 and max(values.shape) <= LARGEST_MAP
        assert values.min() == 0 and values.max() == 255
    cut_off = read_word_maps(tmp_path, 0)
    assert cut_off is not None and "a" in cut_off.maps and "lost" not in cut_off.maps
    assert read_word_maps(tmp_path, 2) is None and read_word_maps(tmp_path / "nowhere", 0) is None


def test_maps_depend_neither_on_the_batch_nor_on_scoring(
    sd: Model, phantoms: PhantomDataset, accelerator: Accelerator, tmp_path: Path
) -> None:
    found = []
    for size, protocol in ((1, "ours"), (3, "dombrowski")):
        config = CONFIG.model_copy(update=dict(batch_size=size, protocol=protocol))
        state = torch.get_rng_state()
        write_word_maps(sd, phantoms, config, examples=[0, 2, 5], accelerator=accelerator, arm_dir=tmp_path / str(size))
        assert torch.equal(torch.get_rng_state(), state)
        found.append(read_word_maps(tmp_path / str(size), 2))
        assert [path.name for path in (tmp_path / str(size)).iterdir()] == [WORD_MAPS_FILE]
    assert found[0] is not None and found[1] is not None
    for word, values in found[0].maps.items():
        assert np.abs(values.astype(int) - found[1].maps[word].astype(int)).max() <= 1


def test_a_damaged_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / WORD_MAPS_FILE).write_bytes(b"nothing")
    with pytest.raises(ValueError):
        read_word_maps(tmp_path, 0)


def test_pieces_of_words_inside_words() -> None:
    maps = WordMaps({}, {"ground-glass": [(0, 12)], "glass": [(7, 12), (17, 22)]}, {})
    assert maps.pieces("ground-glass and glass") == [
        ("", None), ("ground-glass", "ground-glass"), (" and ", None), ("glass", "glass"), ("", None)
    ]  # fmt: skip

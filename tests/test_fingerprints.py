"""What a checkpoint says its training was made of: a change of any part changes its hash, and no other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_options import data_options
from PIL import Image
from torch import nn

from distill.config import DenoisingConfig
from distill.data.cache import weights_fingerprint
from distill.data.loading import load_dataset
from distill.data.phantom.dataset import PhantomDataset
from distill.data.rows import row_fingerprints


class Changed(PhantomDataset):
    """Phantoms, of which one row says something else."""

    def __init__(self, what: str, row: int) -> None:
        super().__init__("train", 8, 0, 64)
        self.what, self.row = what, row

    def caption(self, index: int) -> str:
        return super().caption(index) + "." * (self.what == "caption" and index == self.row)

    def labels(self, index: int) -> tuple[str, ...]:
        return (*super().labels(index), *(["edema"] if self.what == "label" and index == self.row else []))

    def fingerprint(self, index: int) -> str:
        return super().fingerprint(index) + "x" * (self.what == "image" and index == self.row)

    def region_fingerprint(self, index: int) -> str:
        return PhantomDataset.fingerprint(self, index) + "x" * (self.what == "region" and index == self.row)


CHANGES = {
    "image": "training images",
    "caption": "training captions",
    "label": "training labels",
    "region": "regions of the training images",
}


@pytest.mark.parametrize("row", [0, 7])
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_in_any_row_is_told_by_its_name(what: str, row: int) -> None:
    options: dict[str, Any] = {"label_tokens": True, "regions": True}
    before = row_fingerprints(Changed("nothing", 0), DenoisingConfig(), **options)
    after = row_fingerprints(Changed(what, row), DenoisingConfig(), **options)
    assert set(before) == set(CHANGES.values())
    assert {name for name in before if before[name] != after[name]} == {CHANGES[what]}


def test_what_a_training_does_not_read_does_not_count() -> None:
    assert set(row_fingerprints(Changed("nothing", 0), DenoisingConfig())) == {"training images", "training captions"}
    denoising = DenoisingConfig(caption_dropout_label="edema")
    assert "training labels" in row_fingerprints(Changed("nothing", 0), denoising)


def test_rows_in_another_order_or_cut_elsewhere_are_other_rows() -> None:
    class Captions(PhantomDataset):
        def __init__(self, *captions: str) -> None:
            super().__init__("train", len(captions), 0, 64)
            self.captions_of_rows = captions

        def caption(self, index: int) -> str:
            return self.captions_of_rows[index]

    hashes = [
        row_fingerprints(Captions(*captions), DenoisingConfig())["training captions"]
        for captions in (("a", "b"), ("b", "a"), ("ab", ""), ("a", "b", ""))
    ]
    assert len(set(hashes)) == 4


def test_one_bit_of_any_weight_counts() -> None:
    def model(seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    same = weights_fingerprint([model()])
    assert weights_fingerprint([model()]) == same != weights_fingerprint([model(1)])
    for name in model().state_dict():
        changed = model()
        state = changed.state_dict()
        state[name].view(-1).view(torch.uint8)[-1] ^= 1 if state[name].dim() else 2
        assert weights_fingerprint([changed]) != same, name
    assert weights_fingerprint([model().half()]) != same
    assert weights_fingerprint([model(), model()]) != same


def test_regions_of_files_count_with_their_masks(tmp_path: Path) -> None:
    def of(box: str, mask: np.ndarray, finding: str = "edema") -> str:
        folder = tmp_path / "data"
        folder.mkdir(exist_ok=True)
        for name in ("a", "b"):
            Image.fromarray(np.full((64, 64), 90 + ord(name), dtype=np.uint8) - np.eye(64, dtype=np.uint8)).save(
                folder / f"{name}.png"
            )
        Image.fromarray(mask).save(folder / "mask.png")
        rows = ["file_name,text,split,finding,box,mask", f'a.png,{finding} here,train,{finding},"{box}",',
                f"a.png,{finding} here,train,{finding},,mask.png", "b.png,clear,test,,,"]  # fmt: skip
        (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
        columns = {name: f"{name}" for name in ("finding", "box", "mask")}
        options = {f"{name}_column": column for name, column in columns.items()} | {"caption_column": "text"}
        dataset = load_dataset(data_options(kind="folder", root=str(folder), resolution=64, **options), "train")
        return dataset.region_fingerprint(0)

    mask = np.zeros((64, 64), dtype=np.uint8)
    mask[8:20, 8:20] = 255
    moved = np.roll(mask, 5, axis=0)
    found = [of("8,8,20,20", mask), of("8,8,20,20", mask), of("9,8,20,20", mask), of("8,8,20,20", moved)]
    found.append(of("8,8,20,20", mask, "fluid"))
    assert found[0] == found[1] and len(set(found)) == 4


@pytest.mark.slow
def test_fingerprints_cost_about_a_second() -> None:
    """6,000 phantoms, and 0.4 GB of weights: less than a second each on one core that is free."""
    began = time.process_time()
    row_fingerprints(PhantomDataset("train", 6000, 0, 128), DenoisingConfig())
    rows = time.process_time() - began
    began = time.process_time()
    weights_fingerprint([nn.Linear(10_000, 10_000, bias=False)])
    weights = time.process_time() - began
    print(f"6,000 rows {rows:.2f} s, 0.4 GB {weights:.2f} s")
    assert rows < 10 and weights < 10

"""Generated data does not change unnoticed."""

from __future__ import annotations

import json

import pytest
from goldens.generators import FILE, data_sets, shown

VALUES = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", data_sets())
def test_rows_are_those_that_checkpoints_were_trained_on(name: str) -> None:
    dataset = data_sets()[name]
    for index, expected in enumerate(VALUES[name]):
        found = shown(dataset, index)
        assert (found["caption"], found["labels"]) == (expected["caption"], expected["labels"])
        assert found["pixels"] == pytest.approx(expected["pixels"], abs=2e-3), index
        assert found["regions"].keys() == expected["regions"].keys()
        for finding, sizes in expected["regions"].items():
            assert found["regions"][finding] == pytest.approx(sizes, abs=1), (index, finding)

"""Every number of every recipe is the one that was recorded, bit for bit (harness.py); minutes on one core.

The record is of one kind of CPU and one set of library versions, and elsewhere the tests are skipped: then run
harness.py on two checkouts, the old and the new, with --dump, and compare with --diff.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import harness
import pytest

pytestmark = pytest.mark.slow
TREE = Path(__file__).resolve().parents[2]
RECORD = json.loads(harness.VALUES.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dumps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All values of the cases that were asked for, run one after the other in one process of their own."""
    if other := harness.environment_differences(RECORD["environment"]):
        pytest.skip(f"the numbers were recorded elsewhere: {'; '.join(other)}")
    asked = [item for item in request.session.items if item.path == request.path and isinstance(item, pytest.Function)]
    names = [str(item.callspec.params["name"]) for item in asked if hasattr(item, "callspec")]
    folder = tmp_path_factory.mktemp("goldens")
    command = [sys.executable, str(Path(harness.__file__)), "--tree", str(TREE), "--cases", ",".join(names)]
    done = subprocess.run(
        [*command, "--dump", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not any(folder.iterdir()):
        pytest.fail(f"the harness did not start:\n{done.stdout[-3000:]}")
    return folder


@pytest.mark.parametrize("name", RECORD["cases"])
def test_the_numbers_are_those_that_were_recorded(name: str, dumps: Path) -> None:
    found = harness.read_dump(dumps, name)
    assert found is not None, "the harness ended before this case"
    faults = harness.compare(found, RECORD["cases"][name])
    assert not faults, "\n".join([*faults, f"all values: {dumps / name}.json; compare with --diff"])


def test_every_case_is_recorded() -> None:
    assert list(RECORD["cases"]) == list(harness.load_cases()["cases"])

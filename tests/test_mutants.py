"""The faults of `make mutants` are what they are called, and their sample is fair."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "mutation"))

from mutants import mutants_of, sample

SOURCE = '''"""A module."""

LIMIT: int = 3


@no_grad()
def scaled(x: list[int] | None, by: float = 0.5) -> float | None:
    """Scale x."""
    if x is None or not x:
        raise UserError(f"no {1}", 7)
    with torch.no_grad():
        y = f(x, by, weight=2)
    say(f"{len(x) + 1} values")
    cache[1] = y.detach()
    bar.update(1 + 1)
    check(zip(y, strict=True))
    return y * by
'''
CHANGED = {
    "LIMIT: int = (4)", "LIMIT: int = (2)", "by: float = (1.5)", "by: float = (-0.5)", "if (x is not None) or not x:",
    "if x is None or (x):", "if (x is None and (not x)):", "if (not (x is None or not x)):",
    "with torch.enable_grad():", "y = f(x, by)", "y = f(by, x, weight=2)", "weight=(3))", "weight=(1))", "cache[(2)]",
    "cache[(0)]", "= (y)", "return (y / by)", "return None",
}  # fmt: skip


def test_faults_are_of_code_and_not_of_types_or_texts() -> None:
    mutants = mutants_of("m.py", SOURCE)
    made = [mutant.apply(SOURCE) for mutant in mutants]
    assert all(any(text in source for source in made) for text in CHANGED)
    dropped = [mutant.before for mutant in mutants if mutant.after in ("pass", "")]
    assert dropped == [
        "no_grad()",
        "raise UserError(f'no {1}', 7)",
        "cache[1] = y.detach()",
        "check(zip(y, strict=True))",
    ]
    assert len(mutants) == len(CHANGED) + len(dropped) and len(set(made)) == len(made)
    assert all(source.count("\n") == SOURCE.count("\n") for source in made), "lines keep their numbers"


def test_a_sample_is_even_over_lines_and_a_larger_one_begins_with_a_smaller() -> None:
    mutants = {name: mutants_of(name, SOURCE * 20) for name in ("short.py", "long.py")}
    lines = {"short.py": 100, "long.py": 300}
    drawn = [mutant for mutant, _ in zip(sample(mutants, lines, seed=1), range(200), strict=False)]
    assert len({mutant.name for mutant in drawn}) == 200
    assert abs(sum(mutant.module == "long.py" for mutant in drawn) - 150) <= 3
    assert drawn != [mutant for mutant, _ in zip(sample(mutants, lines, seed=2), range(200), strict=False)]
    every = list(sample(mutants, lines, seed=1))
    assert every[:200] == drawn and len(every) == sum(map(len, mutants.values()))

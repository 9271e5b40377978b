"""Draw images of rare findings more often in training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill.config import NO_LABEL
from distill.errors import UserError

_SHOWN = 8


@dataclass(frozen=True)
class Balance:
    """How often rows are drawn. chances: of each row, with sum 1. shares: finding -> share of the rows that have it,
    and of the draws, in the mean; rarest first. Rows without a finding count as `no finding`."""

    chances: NDArray[np.float64]
    shares: Mapping[str, tuple[float, float]]


def balance_findings(labels: Sequence[Sequence[str]], power: float, only: Collection[str] = ()) -> Balance:
    """A row's chance is proportional to (1 / rows that have its rarest finding) ** power.

    labels: the findings of each row. only: those that count, in any case of letters; empty for all. This is the
    sampling by repeat factors of LVIS (Gupta et al. 2019, power 1/2), without its threshold. Raises UserError if no row
    has a finding.
    """
    wanted = {name.casefold() for name in only}
    names: dict[str, str] = {}
    rows: list[set[str]] = []
    for found in labels:
        keys = {names.setdefault(name.casefold(), name).casefold() for name in found}
        rows.append({key for key in keys if key in wanted or not wanted} or {NO_LABEL})
    counts = Counter(key for row in rows for key in row)
    if not counts.keys() - {NO_LABEL}:
        of = f" of {', '.join(only)}" if only else ""
        raise UserError(
            f"data.balance_findings is {power:g}, and no training image has a finding{of}; name a column by "
            "data.label_column or data.finding_column, or set it to 0"
        )
    weights = np.array([min(counts[key] for key in row) for row in rows], dtype=np.float64) ** -power
    chances = weights / weights.sum()
    draws = {key: float(sum(chances[i] for i, row in enumerate(rows) if key in row)) for key in counts}
    rarest = sorted(counts, key=lambda key: (counts[key], key))
    return Balance(chances, {names.get(key, key): (counts[key] / len(rows), draws[key]) for key in rarest})


def shares_text(shares: Mapping[str, tuple[float, float]]) -> str:
    """What of the drawn images has each finding, with and without balance, of the rarest first."""
    parts = [f"{name} {after:.1%} (unbalanced {before:.1%})" for name, (before, after) in list(shares.items())[:_SHOWN]]
    more = len(shares) - _SHOWN
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")

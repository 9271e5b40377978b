"""AUC within the finding's prior: pixels inside the mask against pixels outside that are as likely to be inside.

Pixels are put into strata of equal prior, which is the finding's mean mask over training images, and compared within
each. A map that knows only where findings usually are has .5, because within a stratum it has nothing to choose by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from distill.attention.heat_maps import normalize
from distill.config import FullEvaluation
from distill.evaluation.image_adds import Row, map_tokens, twice_midranks, unpacked
from distill.evaluation.protocols import PROTOCOLS, at_size

STRATA = 256
PIXELS = 16
"""At least so many pixels in a stratum, on average."""


def strata_of(prior: torch.Tensor) -> torch.Tensor:
    """(P,) float -> (P,) int64: STRATA groups of about equally many pixels by rank, fewer for small images.

    Pixels of equal prior are never apart, so that a stratum can be larger and others empty.
    """
    count = max(1, min(STRATA, prior.numel() // PIXELS))
    below = (twice_midranks(prior[None])[0] - 1) / (2 * prior.numel())  # in [0, 1)
    return (below * count).long()


def areas_within(maps: torch.Tensor, mask: torch.Tensor, strata: torch.Tensor) -> torch.Tensor:
    """(N,) float64: sum_s U_s / (N_s + 1) over sum_s n_s m_s / (N_s + 1); NaN where no stratum has both kinds.

    In stratum s, U_s counts the pairs of a pixel inside and one outside that the map ranks right, ties 1/2; n_s pixels
    are inside, m_s outside, N_s = n_s + m_s. The weights are those of van Elteren 1960 for stratified rank tests; with
    one stratum it is the AUC. If all pixels of a stratum are equally likely to be inside, then any map that does not
    depend on the mask has .5 (as a ratio of means). maps: (N, P). mask: (P,) bool. strata: (P,) int64.
    """
    # Ranks by stratum first and value second: a stratum's own ranks begin where those of the strata before it end.
    ranks = twice_midranks(strata * (2.0 * mask.numel() + 1) + twice_midranks(maps))
    sizes, inside = torch.bincount(strata).double(), torch.bincount(strata, weights=mask.double())
    before = sizes.cumsum(0) - sizes
    weights = 1 / (sizes + 1)
    twice_sums = (ranks - 2 * before[strata]) @ (mask * weights[strata])
    pairs = (weights * inside * (sizes - inside)).sum()
    return (twice_sums - (weights * inside * (inside + 1)).sum()) / (2 * pairs)


def prior_at(prior: torch.Tensor, shape: Sequence[int], config: FullEvaluation) -> torch.Tensor:
    """A mean mask at the size that maps are compared at."""
    mode = PROTOCOLS[config.protocol].resize
    corners = {"align_corners": False} if mode == "bilinear" else {}
    return F.interpolate(prior[None, None], tuple(shape), mode=mode, **corners)[0, 0]


@torch.no_grad()
def within_priors(
    rows: Sequence[Row],
    names: Sequence[str],
    priors: Mapping[str, torch.Tensor],
    config: FullEvaluation,
    device: torch.device,
) -> list[dict[str, float | None]]:
    """For each pair {token: AUC within the prior}; None for a finding without a prior, and where no stratum has both
    kinds.

    rows: as `packed_pairs` made them. names: of the findings. priors: finding -> (side, side) mean mask.
    """
    tokens, strata = map_tokens(config), dict[str, torch.Tensor]()
    found: list[dict[str, float | None]] = []
    for row in rows:
        finding = names[row["finding"]]
        if finding not in priors or row["maps"] is None:
            found.append(dict.fromkeys(tokens))
            continue
        maps, bits, shape = unpacked(row)
        mask = torch.from_numpy(np.unpackbits(bits, count=shape[0] * shape[1])).bool().to(device)
        if finding not in strata:
            strata[finding] = strata_of(prior_at(priors[finding].to(device), shape, config).flatten())
        full = at_size(normalize(maps.to(device)), shape, config).flatten(1)
        values = areas_within(full, mask, strata[finding]).tolist()
        found.append({t: v if np.isfinite(v) else None for t, v in zip(tokens, values, strict=True)})
    return found

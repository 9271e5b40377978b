"""Metrics of localization and of quality, and their bootstrap intervals."""

from distill.metrics.bootstrap import bootstrap_interval, macro_mean_interval
from distill.metrics.localization import (
    MASS_GROUPS,
    AttentionMass,
    IoUAtThreshold,
    LocalizationMetric,
    PixelAUROC,
    PointingGame,
    SignedCNR,
)
from distill.metrics.quality import Diversity, finding_auroc, frechet_distance, frechet_interval, ms_ssim_betas

__all__ = [
    "MASS_GROUPS",
    "AttentionMass",
    "Diversity",
    "IoUAtThreshold",
    "LocalizationMetric",
    "PixelAUROC",
    "PointingGame",
    "SignedCNR",
    "bootstrap_interval",
    "finding_auroc",
    "frechet_distance",
    "frechet_interval",
    "macro_mean_interval",
    "ms_ssim_betas",
]

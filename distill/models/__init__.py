"""Models: a file a family, loading, adapters, smaller models and export."""

from distill.models import sdxl, stable_diffusion  # noqa: F401  (registers the families)
from distill.models.family import (
    AttentionSubset,
    Conditions,
    Family,
    Model,
    denoiser_of,
    families,
    family_of_denoiser,
    family_of_pipeline,
    register,
)
from distill.models.loading import load_model, load_run, model_of
from distill.models.prompts import prompt_embeddings

__all__ = [
    "AttentionSubset",
    "Conditions",
    "Family",
    "Model",
    "denoiser_of",
    "families",
    "family_of_denoiser",
    "family_of_pipeline",
    "load_model",
    "load_run",
    "model_of",
    "prompt_embeddings",
    "register",
]

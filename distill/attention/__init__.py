"""Cross-attention of a denoiser: recording of probabilities, and the maps that are made of them."""

from distill.attention.heat_maps import PromptMaps, aggregate, normalize, record_pipeline, select_tokens, to_image
from distill.attention.recording import AttentionMaps, attention_layers, mean_over_heads, record_attention

__all__ = [
    "AttentionMaps",
    "PromptMaps",
    "aggregate",
    "attention_layers",
    "mean_over_heads",
    "normalize",
    "record_attention",
    "record_pipeline",
    "select_tokens",
    "to_image",
]

"""Fine-tune diffusion models, distill the attention of a frozen-encoder teacher, and measure quality and
localization."""

__version__ = "0.2.0"

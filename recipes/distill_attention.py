"""Fine-tune with the text encoder trained, while the cross-attention is held to a teacher's.

    accelerate launch recipes/distill_attention.py --config recipes/configs/phantom/distill_attention.yaml \
        --method.teacher checkpoints/finetune

The loss is in distill/methods/attention_distillation.py; the loop is `fit` in distill/trainer.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from distill.cli import main
from distill.config import FinetuningRunConfig
from distill.configuration import renamed as old
from distill.methods.options import AttentionDistillationOptions
from distill.methods.training import Trained, Training
from distill.settings import Text


class DistillAttentionConfig(FinetuningRunConfig, Training):
    """Fine-tune with the text encoder trained, and keep a teacher's cross-attention.

    accelerate launch recipes/distill_attention.py --config recipes/configs/phantom/distill_attention.yaml
    """

    common: ClassVar[tuple[str, ...]] = (
        "base.name", "data.kind", "data.root", "method.teacher", "denoiser", "text_encoder", "trainer.max_steps",
        "trainer.batch_size", "trainer.learning_rate", "output_dir",
    )  # fmt: skip
    renamed: ClassVar[dict[str, str]] = old.DISTILL_ATTENTION
    denoiser: Trained = "lora"
    """How the denoiser, such as the U-Net, is trained."""
    text_encoder: Trained = "lora"
    """How the text encoders are trained."""
    method: AttentionDistillationOptions = AttentionDistillationOptions()
    """Attention distillation."""
    output_dir: Text = "checkpoints/distill_attention"
    """Run folder."""


def distill_attention(config: DistillAttentionConfig) -> None:
    from distill.experiment.single import train_one

    teacher = Path(config.method.teacher or "")
    is_run = config.method.teacher is not None and teacher.is_dir() and not (teacher / "model_index.json").exists()
    train_one(config, compared_with={"teacher": teacher} if is_run else {})


if __name__ == "__main__":
    main(distill_attention, DistillAttentionConfig)

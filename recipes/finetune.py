"""Fine-tune a text-to-image model on captioned images; export it, evaluate it, report it.

    accelerate launch recipes/finetune.py --config recipes/configs/phantom/finetune.yaml

The loss is in the file of `method.kind` in distill/methods/; the loop is `fit` in distill/trainer.py.
"""

from __future__ import annotations

from typing import ClassVar

from distill.cli import main
from distill.config import FinetuningRunConfig
from distill.configuration import renamed as old
from distill.methods.training import Trained, Training
from distill.settings import Text


class FinetuneConfig(FinetuningRunConfig, Training):
    """Fine-tune a text-to-image model on captioned images.

    accelerate launch recipes/finetune.py --config recipes/configs/phantom/finetune.yaml
    """

    common: ClassVar[tuple[str, ...]] = (
        "base.name", "data.kind", "data.root", "denoiser", "text_encoder", "method.kind", "trainer.max_steps",
        "trainer.batch_size", "trainer.learning_rate", "output_dir",
    )  # fmt: skip
    renamed: ClassVar[dict[str, str]] = old.FINETUNE
    denoiser: Trained = "lora"
    """How the denoiser, such as the U-Net, is trained."""
    output_dir: Text = "checkpoints/finetune"
    """Run folder."""


def finetune(config: FinetuneConfig) -> None:
    from distill.experiment.single import train_one

    train_one(config)


if __name__ == "__main__":
    main(finetune, FinetuneConfig)

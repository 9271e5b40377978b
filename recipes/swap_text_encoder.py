"""Put another text encoder into a base: BERT, CXR-BERT, MiniLM, T5. Writes a stock diffusers pipeline, to be
fine-tuned.

    accelerate launch recipes/swap_text_encoder.py --text_encoder path/to/all-MiniLM-L6-v2 --output_dir checkpoints/minilm
    accelerate launch recipes/finetune.py --config recipes/configs/phantom/finetune.yaml --base.name checkpoints/minilm

How the new encoder is fitted to the denoiser is in distill/models/text_encoder.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from distill.cli import main
from distill.config import BaseConfig
from distill.data_config import AnyData, PhantomData
from distill.settings import Count, Settings, Text

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from distill.data.sample import ImageCaptionDataset


class SwapTextEncoderConfig(Settings):
    """Put another text encoder into a base, as a stock pipeline to fine-tune.

    accelerate launch recipes/swap_text_encoder.py --text_encoder path/to/all-MiniLM-L6-v2 --output_dir checkpoints/minilm
    """

    common: ClassVar[tuple[str, ...]] = (
        "base.name", "text_encoder", "model_type", "max_tokens", "data.kind", "data.root", "output_dir",
    )  # fmt: skip
    base: BaseConfig = BaseConfig()
    text_encoder: Text
    """Folder or hub id of a transformers encoder and its tokenizer, such as BERT, MiniLM or T5. Or `multi_label`: one
    token for each label of the training images, for captions that are lists of labels."""
    model_type: Text | None = None
    """Kind of the encoder, where its own names a class outside transformers: `bert` for CXR-BERT."""
    max_tokens: Annotated[int, Field(ge=3, le=10**5)] = 77
    """Positions of a caption, padding included."""
    data: AnyData = PhantomData()
    captions: Count = 2000
    """Training captions that the projection is fitted on."""
    output_dir: Text = "checkpoints/swapped"
    """Where the pipeline is written. It must not exist yet."""
    dry_run: bool = False
    """Check and fit, and write nothing."""


def save_checked(pipeline: StableDiffusionPipeline, folder: Path, base: str) -> float:
    """Write the pipeline whole or not at all; the largest difference of its outputs when it is loaded back.

    base: what its configs say that its parts come from.
    """
    import torch

    from distill.files import whole_folder
    from distill.models import load_model, model_of
    from distill.models.export import name_base, prove_parity

    with whole_folder(folder) as partial:
        pipeline.save_pretrained(partial, safe_serialization=True)
        name_base(partial, base)
        stock = load_model(BaseConfig(name=str(partial)))
        difference = prove_parity(model_of(pipeline), stock, torch.device("cpu"))
    return difference


def load_encoder(
    config: SwapTextEncoderConfig, train: ImageCaptionDataset, width: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The encoder and its tokenizer. train: whose labels `multi_label` has a token for. width: of its hidden states."""
    from distill.models.text_encoder import MULTI_LABEL, load_text_encoder, multi_label_encoder

    if config.text_encoder != MULTI_LABEL:
        return load_text_encoder(config.text_encoder, config.model_type, max_tokens=config.max_tokens)
    labels = sorted({label for i in range(len(train)) for label in train.labels(i)})
    return multi_label_encoder(labels, width=width, max_tokens=config.max_tokens)


def swap(config: SwapTextEncoderConfig) -> None:
    from distill.data.loading import load_dataset
    from distill.errors import UserError
    from distill.experiment.run import quiet_libraries
    from distill.models import load_model
    from distill.models.adapters import parameter_counts
    from distill.models.export import base_of
    from distill.models.text_encoder import MULTI_LABEL, swap_text_encoder
    from distill.processes import process_state

    quiet_libraries()
    if not process_state().is_main_process:
        return
    if config.text_encoder == MULTI_LABEL and config.model_type is not None:
        raise UserError(
            f"model_type is {config.model_type!r}, and text_encoder multi_label loads no encoder; leave it out"
        )
    if config.base.caption_chunks > 1:
        raise UserError(
            f"base.caption_chunks is {config.base.caption_chunks}, and the new text encoder reads a caption at once; "
            "leave it out, and set max_tokens"
        )
    folder = Path(config.output_dir)
    if folder.exists() and not config.dry_run:
        raise UserError(f"{folder} exists already; choose another --output_dir, or delete it")
    model, train = load_model(config.base), load_dataset(config.data, "train")
    captions = [train.caption(i) for i in range(min(config.captions, len(train)))]
    encoder, tokenizer = load_encoder(config, train, model.text_encoders[0].config.hidden_size)
    old, new = parameter_counts(model.text_encoders[0])[0], parameter_counts(encoder)[0]
    print(
        f"{config.base.name}: text encoder of {old / 1e6:.1f} M parameters -> {config.text_encoder}, {new / 1e6:.1f} M"
    )
    pipeline, fit = swap_text_encoder(model, encoder, tokenizer, captions)
    lengths = [len(ids) for ids in tokenizer(captions, verbose=False).input_ids]
    cut = sum(length > config.max_tokens for length in lengths)
    print(
        f"projection fitted on {len(set(captions)):,} captions; R^2 {fit:.3f} on the tenth held out, where 1 is the old "
        f"embeddings\n{sum(lengths) / len(lengths):.0f} tokens a caption, {max(lengths)} at most; {cut} captions are "
        "cut off"
    )
    if config.dry_run:
        print("dry run: nothing was written")
        return
    difference = save_checked(pipeline, folder, base_of(model))
    print(
        f"{folder}: a stock pipeline; loaded back, difference {difference:.1e}\n"
        f"next: accelerate launch recipes/finetune.py --base.name {folder}, to train it: the projection alone draws "
        "poorly"
    )


if __name__ == "__main__":
    main(swap, SwapTextEncoderConfig)

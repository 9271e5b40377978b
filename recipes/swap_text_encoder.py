"""Put another text encoder into a base: BERT, CXR-BERT, MiniLM, T5. Writes a stock diffusers pipeline, to be fine-tuned.

    accelerate launch recipes/swap_text_encoder.py --text_encoder path/to/all-MiniLM-L6-v2 --output_dir checkpoints/minilm
    accelerate launch recipes/finetune.py --config recipes/configs/phantom/finetune.yaml --base.name checkpoints/minilm

How the new encoder is fitted to the U-Net is in distill/swap.py.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from distill.arms import unused_data_options
from distill.cli import main, refuse_unused
from distill.config import SwapTextEncoderConfig
from distill.data.loading import load_dataset
from distill.errors import UserError
from distill.models.adapters import parameter_counts
from distill.models.export import prove_parity
from distill.models.loading import load_model, model_of
from distill.models.text_encoder import MULTI_LABEL, load_text_encoder, multi_label_encoder, swap_text_encoder
from distill.processes import process_state
from distill.runs import quiet_libraries


def unused_options(config: SwapTextEncoderConfig) -> dict[str, str]:
    """Dotted key -> why the swap never reads it."""
    unread = ("validation_size", "test_size", "test_split", "resolution", "horizontal_flip", "cache_dir")
    unused = {f"data.{name}": "only training captions are read" for name in unread}
    unused["base.frozen_dtype"] = "nothing is trained"
    if config.text_encoder == MULTI_LABEL:
        unused["model_type"] = "multi_label loads no encoder"
    return unused | unused_data_options(config.data.kind)


def swap(config: SwapTextEncoderConfig) -> None:
    quiet_libraries()
    if not process_state().is_main_process:
        return
    if config.text_encoder is None:
        raise UserError(
            "text_encoder is missing: a folder or hub id of a transformers encoder and its tokenizer, or multi_label"
        )
    refuse_unused(config, unused_options(config))
    folder = Path(config.output_dir)
    if folder.exists() and not config.dry_run:
        raise UserError(f"{folder} is there already; choose another --output_dir, or delete it")
    model = load_model(config.base)
    loaded = None
    if config.text_encoder != MULTI_LABEL:
        loaded = load_text_encoder(config.text_encoder, config.model_type, max_tokens=config.max_tokens)
    train = load_dataset(config.data, "train")
    captions = [train.caption(i) for i in range(min(config.captions, len(train)))]
    if loaded is None:
        labels = sorted({label for i in range(len(train)) for label in train.labels(i)})
        width = model.text_encoders[0].config.hidden_size
        loaded = multi_label_encoder(labels, width=width, max_tokens=config.max_tokens)
    encoder, tokenizer = loaded
    old, new = parameter_counts(model.text_encoders[0])[0], parameter_counts(encoder)[0]
    print(
        f"{config.base.name}: text encoder of {old / 1e6:.1f} M parameters -> {config.text_encoder}, {new / 1e6:.1f} M"
    )
    pipeline, fit = swap_text_encoder(model, encoder, tokenizer, captions)
    lengths = [len(ids) for ids in tokenizer(captions, verbose=False).input_ids]
    cut = sum(length > config.max_tokens for length in lengths)
    print(
        f"projection fitted on {len(captions):,} captions; R^2 {fit:.3f} on the tenth held out (1: the old embeddings)"
    )
    print(f"{sum(lengths) / len(lengths):.0f} tokens a caption, {max(lengths)} at most; {cut} captions are cut off")
    if config.dry_run:
        print("dry run: nothing was written")
        return
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        pipeline.save_pretrained(partial, safe_serialization=True)
        stock = load_model(type(config.base)(name=str(partial)))
        difference = prove_parity(model_of(pipeline), stock, torch.device("cpu"))
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    print(f"{folder}: a stock pipeline; loaded back, difference {difference:.1e}")
    print(
        f"next: accelerate launch recipes/finetune.py --base.name {folder}, to train it; until then it draws as told above"
    )


if __name__ == "__main__":
    main(swap, SwapTextEncoderConfig)

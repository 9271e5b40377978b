"""Makes the two text encoders of the rows "causal" and "bidirectional" of the map: twins in all but what a token sees.

    python recipes/results/direction.py checkpoints/direction
    accelerate launch recipes/swap_text_encoder.py --text_encoder checkpoints/direction/causal --max_tokens 52 \
        --output_dir checkpoints/causal
    accelerate launch recipes/tradeoff.py --config recipes/configs/phantom/tradeoff.yaml --base.name checkpoints/causal \
        --arms "[frozen,learnable]" --seeds "[0]" --output_dir checkpoints/tradeoff_causal

Both are BERTs of the embedded text encoder's size. Each learns to give the hidden states of that encoder on captions of
phantoms and of pictures, so that both start from the same maps and the same images, and training can then use what the
direction allows. No image is seen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from distill.config import BaseConfig
from distill.data.phantom.dataset import PhantomDataset
from distill.data.pictures import PicturesDataset
from distill.models.loading import load_model

STEPS, BATCH, RATE, HELD_OUT = 2500, 24, 2e-3, 500
POSITIONS = 52
"""As the longest captions; the map's row of 52 is much as the benchmark."""


def captions_of(split: str, phantoms: int, pictures: int) -> list[str]:
    sets = [kind(split, count) for kind, count in ((PhantomDataset, phantoms), (PicturesDataset, pictures)) if count]
    return [one.caption(i) for one in sets for i in range(len(one))]


def make(folder: Path, *, causal: bool) -> dict[str, float]:
    """One twin, saved with its tokenizer; R^2 of its hidden states on held-out captions, of phantoms and of pictures."""
    base = load_model(BaseConfig(name="phantom")).freeze()
    old, teacher = base.tokenizers[0], base.text_encoders[0].config
    # The base pads with the end token; with an attention mask, that would hide the end too.
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=old.backend_tokenizer,
        bos_token=old.bos_token,
        eos_token=old.eos_token,
        unk_token=old.eos_token,
        pad_token="<|pad|>",
        model_max_length=POSITIONS,
    )
    torch.manual_seed(0)
    twin = BertModel(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=teacher.hidden_size, intermediate_size=teacher.intermediate_size,
            num_hidden_layers=teacher.num_hidden_layers, num_attention_heads=teacher.num_attention_heads,
            max_position_embeddings=POSITIONS, pad_token_id=tokenizer.pad_token_id, is_decoder=causal, use_cache=False,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ),
        add_pooling_layer=False,
    )  # fmt: skip
    twin.config.use_attention_mask = True
    with torch.no_grad():
        twin.embeddings.word_embeddings.weight[: len(old)] = base.text_encoders[0].get_input_embeddings().weight

    def pair(captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokenizer(captions, padding="max_length", truncation=True, max_length=POSITIONS, return_tensors="pt")
        with torch.no_grad():
            # A causal encoder's first states do not depend on what is cut off.
            ids_of_base = [ids[:, :POSITIONS] for ids in base.tokenize(captions)]
            wanted = base.encode(ids_of_base)[0]
        return base.family.encode_text([twin], [ids.input_ids])[0], wanted

    train = captions_of("train", 4000, 12000)
    optimizer = torch.optim.AdamW(twin.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(STEPS), desc=folder.name, unit="step"):
        chosen = torch.randint(len(train), (BATCH,), generator=generator)
        found, wanted = pair([train[i] for i in chosen])
        loss = (found - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    fit = {}
    for name, counts in (("phantoms", (HELD_OUT, 0)), ("pictures", (0, HELD_OUT))):
        with torch.no_grad():
            parts = [pair([caption]) for caption in captions_of("test", *counts)]
        found, wanted = (torch.cat(side).flatten(0, 1) for side in zip(*parts, strict=True))
        fit[name] = float(1 - (found - wanted).square().sum() / (wanted - wanted.mean(dim=0)).square().sum())
    twin.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return fit


if __name__ == "__main__":
    target = Path(sys.argv[1])
    fits = {name: make(target / name, causal=name == "causal") for name in ("causal", "bidirectional")}
    (target / "fit.json").write_text(json.dumps(fits, indent=1))
    print(f"R^2 on held-out captions: {fits}")

"""Make the embedded base and the phantom's classifier from nothing, as Stable Diffusion is made.

    accelerate launch recipes/pretrain_phantom.py --config recipes/configs/phantom/pretrain.yaml

Text encoder by contrastive training with a small image tower, VAE on pictures, U-Net with the text encoder frozen; all on
generic captioned pictures, never on phantoms. A stage whose result exists is skipped; one that was cut off continues.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)

from distill.cli import main
from distill.components import components_of, prepare_training
from distill.config import DenoisingConfig, LoraConfig, PretrainConfig
from distill.data.cache import cache_latents
from distill.data.phantom import PhantomDataset
from distill.data.pictures import UNRELATED, VOCABULARY, PicturesDataset
from distill.data.training import TrainingRows
from distill.objectives import AutoencoderObjective, ClassificationObjective, ContrastiveObjective, DenoisingObjective
from distill.trainer import fit, make_accelerator

SPLIT = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""  # CLIP's


class RenderedPictures(Dataset[dict[str, Any]]):
    """Pictures drawn once: uint8 (count, height, width) on disk, and their captions."""

    def __init__(self, folder: Path) -> None:
        self.pixels = np.load(folder / "pixels.npy", mmap_mode="r")
        self.captions: list[str] = json.loads((folder / "captions.json").read_text())

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels = torch.from_numpy(self.pixels[index].astype(np.float32) / 127.5 - 1)
        return {"pixel_values": pixels.expand(3, -1, -1), "caption": self.captions[index]}


def stack_pixels(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}


def render(config: PretrainConfig, folder: Path) -> None:
    pictures = PicturesDataset("train", config.pictures, config.seed, config.resolution)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "pixels.npy.partial"
    shape = (len(pictures), config.resolution, config.resolution)
    pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    captions = []
    for i in tqdm(range(len(pictures)), desc="pictures", unit="picture"):
        sample = pictures[i]
        pixels[i] = ((sample.pixel_values[0] + 1) * 127.5).round().to(torch.uint8).numpy()
        captions.append(sample.caption)
    pixels.flush()
    (folder / "captions.json").write_text(json.dumps(captions))
    os.replace(partial, folder / "pixels.npy")


def train_tokenizer(config: PretrainConfig, captions: list[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE: 256 bytes, 256 bytes that end a word, merges learned from captions, two special tokens."""
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "removed", invert=True), byte_level]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary_size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([*captions, *UNRELATED * 20, *VOCABULARY * 20], trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: config.vocabulary_size - 2 - 2 * len(alphabet)]
    pieces = [
        *alphabet,
        *(a + "</w>" for a in alphabet),
        *("".join(m) for m in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, merges=merges, model_max_length=77
    )


class ImageTower(nn.Module):
    """(batch, 3, height, width) -> (batch, projection_dim), at half the resolution."""

    def __init__(self, projection_dim: int) -> None:
        super().__init__()
        sizes = [32, 64, 128]
        self.body = ResNetModel(
            ResNetConfig(embedding_size=32, hidden_sizes=sizes, depths=[1, 1, 1], layer_type="basic", hidden_act="relu")
        )
        self.head = nn.Linear(sizes[-1] * 4, projection_dim)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        features = self.body(nn.functional.avg_pool2d(pixel_values, 2)).last_hidden_state
        return self.head(nn.functional.adaptive_avg_pool2d(features, 2).flatten(1))


def train_text_encoder(
    config: PretrainConfig, pictures: RenderedPictures, tokenizer: CLIPTokenizer, work: Path
) -> None:
    torch.manual_seed(config.seed)
    text_encoder = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        captions = [row["caption"] for row in rows]
        # One batch in eight has unrelated words before the captions, so that all 77 positions are trained; the others
        # stay short, which is three times as fast.
        if len(captions[0]) % 8 == 0:
            captions = [f"{' '.join(VOCABULARY[7 * i % 400 :][: i % 50])} {c}" for i, c in enumerate(captions)]
        ids = tokenizer(captions, padding="longest", truncation=True, max_length=77, return_tensors="pt").input_ids
        return {"input_ids": ids, **stack_pixels(rows)}

    objective = ContrastiveObjective(text_encoder, ImageTower(128))
    accelerator = make_accelerator(config.text_encoder, work)
    fit(objective, pictures, config.text_encoder, accelerator=accelerator, output_dir=work, seed=config.seed,
        collate=collate, label="text encoder")  # fmt: skip
    text_encoder.save_pretrained(work / "text_encoder_with_projection")


def train_vae(config: PretrainConfig, pictures: RenderedPictures, work: Path) -> None:
    torch.manual_seed(config.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=config.resolution,
        mid_block_add_attention=False,
    )
    objective = AutoencoderObjective(vae, config.kl_weight, crop_px=config.resolution // 2)
    accelerator = make_accelerator(config.vae, work)
    fit(objective, pictures, config.vae, accelerator=accelerator, output_dir=work, seed=config.seed,
        collate=stack_pixels, label="vae")  # fmt: skip
    with torch.no_grad():
        batch = stack_pixels([pictures[i] for i in range(512)])["pixel_values"].to(accelerator.device)
        means = torch.cat([vae.encode(part).latent_dist.mean for part in batch.split(32)])
    vae.register_to_config(scaling_factor=round(1 / float(means.std()), 4))
    vae.save_pretrained(work / "vae")


def assemble(config: PretrainConfig, work: Path) -> StableDiffusionPipeline:
    """Stock pipeline of the stages' results and a fresh U-Net."""
    with_projection = CLIPTextModelWithProjection.from_pretrained(
        work / "text_encoder" / "text_encoder_with_projection"
    )
    text_encoder = CLIPTextModel(with_projection.config)
    flat = hasattr(text_encoder, "embeddings")  # transformers >= 5.6
    state = with_projection.text_model.state_dict()
    text_encoder.load_state_dict(state if flat else {f"text_model.{key}": value for key, value in state.items()})
    vae = AutoencoderKL.from_pretrained(work / "vae" / "vae")
    torch.manual_seed(config.seed)
    unet = UNet2DConditionModel(
        sample_size=config.resolution // 8,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        cross_attention_dim=text_encoder.config.hidden_size,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae, text_encoder, CLIPTokenizer.from_pretrained(work / "tokenizer"), unet, scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def train_unet(config: PretrainConfig, work: Path, output_dir: Path) -> None:
    pipeline = assemble(config, work.parent)
    components = components_of(pipeline)
    prepare_training(components, method="full", text_encoder="frozen", lora=LoraConfig())
    accelerator = make_accelerator(config.unet, work)
    components.to(accelerator.device)
    pictures = PicturesDataset("train", config.pictures, config.seed, config.resolution)
    latents = cache_latents(
        pictures, components.vae, work / "latents", batch_size=32, flip=False, device=accelerator.device
    )
    rows = TrainingRows(pictures, components, latents=latents)
    objective = DenoisingObjective(components, DenoisingConfig(caption_dropout=config.caption_dropout))
    fit(objective, rows, config.unet, accelerator=accelerator, output_dir=work, seed=config.seed, label="unet")
    pipeline.to("cpu", torch.float16)
    partial = output_dir.with_suffix(".partial")
    pipeline.save_pretrained(partial)
    os.replace(partial, output_dir)


def train_classifier(config: PretrainConfig, work: Path, output_dir: Path) -> None:
    """Multi-label finding classifier on real phantoms; its features serve the phantom's FID."""
    phantoms = PhantomDataset("train", config.classifier_images, config.seed, config.resolution)
    names = dict(enumerate(phantoms.findings))

    def row(index: int) -> dict[str, torch.Tensor]:
        labels = torch.tensor([name in phantoms.labels(index) for name in phantoms.findings], dtype=torch.float32)
        return {"pixel_values": phantoms[index].pixel_values.half(), "labels": labels}

    rows = [row(i) for i in tqdm(range(len(phantoms)), desc="phantoms", unit="image")]
    torch.manual_seed(config.seed)
    classifier = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=16, hidden_sizes=[32, 64, 96, 64], depths=[1, 1, 1, 1], layer_type="basic",
            problem_type="multi_label_classification", id2label=names, label2id={v: k for k, v in names.items()},
        )
    )  # fmt: skip

    def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        return {key: torch.stack([row[key] for row in batch]).float() for key in batch[0]}

    accelerator = make_accelerator(config.classifier, work)
    fit(ClassificationObjective(classifier), rows, config.classifier, accelerator=accelerator, output_dir=work,
        seed=config.seed, collate=collate, label="classifier")  # fmt: skip
    partial = output_dir.with_suffix(".partial")
    classifier.half().save_pretrained(partial)
    os.replace(partial, output_dir)


def pretrain(config: PretrainConfig) -> None:
    work = Path(config.work_dir)
    if "pictures" in config.stages and not (work / "pictures" / "pixels.npy").exists():
        render(config, work / "pictures")
    pictures = RenderedPictures(work / "pictures")
    if "tokenizer" in config.stages and not (work / "tokenizer").exists():
        train_tokenizer(config, pictures.captions).save_pretrained(work / "tokenizer")
    if "text_encoder" in config.stages and not (work / "text_encoder" / "text_encoder_with_projection").exists():
        tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        train_text_encoder(config, pictures, tokenizer, work / "text_encoder")
    if "vae" in config.stages and not (work / "vae" / "vae").exists():
        train_vae(config, pictures, work / "vae")
    if "unet" in config.stages and not Path(config.output_dir).exists():
        train_unet(config, work / "unet", Path(config.output_dir))
    if "classifier" in config.stages and not Path(config.classifier_dir).exists():
        train_classifier(config, work / "classifier", Path(config.classifier_dir))


if __name__ == "__main__":
    main(pretrain, PretrainConfig)

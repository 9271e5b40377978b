"""What the cases read: tiny random base models and small data sets on disk, made here from seeds and from nothing else.

Nothing of the package under test is used, so that the inputs stay the same when the package changes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
)

# --- base models ----------------------------------------------------------------------------------------------------


def tiny_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-level BPE with a dozen merges: every text becomes tokens, common words few."""
    alphabet = sorted(ByteLevel.alphabet())
    merges = [
        ("p", "l"), ("pl", "e"), ("e", "f"), ("ef", "f"), ("u", "s"), ("i", "o"), ("io", "n</w>"),
        ("t", "h"), ("th", "e</w>"), ("l", "e"), ("a", "l</w>"), ("e", "d"),
    ]  # fmt: skip
    joined = ["".join(merge) for merge in merges]
    pieces = [*alphabet, *(a + "</w>" for a in alphabet), *joined, "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, model_max_length=77)


def text_config(tokenizer: CLIPTokenizer, **options: Any) -> CLIPTextConfig:
    """A text encoder of two layers and width 16."""
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPTextConfig(**(settings | options))


def tiny_vae() -> AutoencoderKL:
    """Images of 64 px become 8 x 8 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def scheduler(prediction_type: str) -> DDIMScheduler:
    """Stable Diffusion's."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip


def sd_unet(**options: Any) -> UNet2DConditionModel:
    """A U-Net of Stable Diffusion's shape, of two stages, with cross-attention at 8 x 8 and 4 x 4."""
    settings: dict[str, Any] = {
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**(settings | options))


def sd_pipeline(prediction_type: str = "epsilon", **unet_options: Any) -> StableDiffusionPipeline:
    """Stable Diffusion's parts, tiny and random."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    unet = sd_unet(**unet_options)
    return StableDiffusionPipeline(
        tiny_vae(), CLIPTextModel(text_config(tokenizer)), tokenizer, unet, scheduler(prediction_type),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def pairs_pipeline() -> StableDiffusionPipeline:
    """With two pairs of blocks a stage, and an innermost stage as wide as the one before, as Stable Diffusion has."""
    return sd_pipeline(
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16, 16),
        layers_per_block=2,
    )


def sdxl_pipeline() -> StableDiffusionXLPipeline:
    """Two text encoders, a pooled embedding, time ids."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    unet = sd_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        tiny_vae(),
        CLIPTextModel(text_config(tokenizer)),
        CLIPTextModelWithProjection(text_config(tokenizer, hidden_act="gelu")),
        tokenizer,
        tiny_tokenizer(),
        unet,
        scheduler("epsilon"),
        add_watermarker=False,
    )


def save_bert(folder: Path) -> None:
    """A random BERT of one layer, whose tokens are the bytes' characters."""
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,;:-()/"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *letters, *(f"##{letter}" for letter in letters), "the", "effusion", "left", "right", "no"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(pieces), max_position_embeddings=128, **size)).save_pretrained(folder)
    fast.save_pretrained(folder)


# --- data sets on disk ----------------------------------------------------------------------------------------------

FINDINGS = ("effusion", "edema", "pneumothorax")


def box_of(number: int, width: int, height: int) -> tuple[int, int, int, int]:
    """x, y, width and height of image `number`'s box."""
    return 4 + 3 * (number % 5), 6 + 2 * (number % 4), width // 3, height // 3


def save_image(path: Path, number: int, size: tuple[int, int] = (80, 72)) -> None:
    """Smooth noise, brighter inside the image's box."""
    coarse = np.random.default_rng(number).integers(20, 160, (9, 10), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)).copy()
    x, y, width, height = box_of(number, *size)
    pixels[y : y + height, x : x + width] += 60
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # PNG whatever the name ends in: no decoder of JPEG is then part of the numbers
        Image.fromarray(pixels).save(file, format="PNG")


def save_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """The keys of the rows are the columns."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def split_of(number: int) -> str:
    """Of 18 images, 8 train, 4 validate and 6 test."""
    return "train" if number < 8 else "validation" if number < 12 else "test"


def save_folder_data(folder: Path) -> None:
    """kind folder: metadata.csv with one row a box, splits, findings, phrases, boxes, masks and labels."""
    rows = []
    for number in range(18):
        finding, name = FINDINGS[number % 3], f"images/{number:02d}.png"
        save_image(folder / name, number)
        box = box_of(number, 80, 72)
        other = FINDINGS[(number + 1) % 3]
        both = number % 4 == 0
        side = "left " if number % 3 == 1 else ""  # an image whose caption names a side is never mirrored
        caption = f"Small {side}{finding}{f' and mild {other}' if both else ''}, number {number}."
        labels = f"{finding}|{other}" if both else finding
        shared = {"file_name": name, "text": caption, "split": split_of(number), "labels": labels}
        rows.append(shared | {"finding": finding, "phrase": f"small {finding}", "box": ",".join(map(str, box))})
        if both:
            mask = np.zeros((72, 80), np.uint8)
            mask[40:60, 44:70] = 255
            Image.fromarray(mask).save(folder / f"images/{number:02d}_mask.png")
            mask_name = f"images/{number:02d}_mask.png"
            rows.append(shared | {"finding": other, "phrase": f"mild {other}", "mask": mask_name})
    save_csv(folder / "metadata.csv", rows)


def save_mimic_data(folder: Path) -> None:
    """kinds mimic and mscxr: the metadata CSV of the studies, and MS-CXR as JSON and as CSV with one row a box."""
    categories = ("Pleural Effusion", "Edema", "Pneumothorax")
    studies, boxes = [], []
    for number in range(18):
        category, dicom = categories[number % 3], f"d{number:02d}"
        split = "1" if number < 8 else "2" if number < 12 else "4"
        save_image(folder / f"files/p1/{dicom}.jpg", number)
        studies.append(
            {
                "dicom_id": dicom,
                "subject_id": f"s{number}",
                "path": f"files/p1/{dicom}.dcm",
                "split": split,
                "impression": f"Small {category.lower()} on the left, study {number}.",
                "Finding Labels ": category if number % 5 else "No Finding",
            }
        )
        if split == "4":
            phrase = f"small {category.lower()}"
            boxes.append({"dicom": dicom, "category": category, "text": phrase, "box": box_of(number, 80, 72)})
    save_csv(folder / "mimic.csv", studies)
    document = {
        "categories": [{"id": n, "name": name} for n, name in enumerate(categories, start=1)],
        "images": [
            {"id": n, "file_name": f"{b['dicom']}.jpg", "path": f"files/p1/{b['dicom']}.jpg", "width": 80, "height": 72}
            for n, b in enumerate(boxes, start=1)
        ],
        "annotations": [
            {
                "id": n, "image_id": n, "category_id": categories.index(b["category"]) + 1, "label_text": b["text"],
                "bbox": list(b["box"]), "width": 80, "height": 72,
            }
            for n, b in enumerate(boxes, start=1)
        ],
    }  # fmt: skip
    (folder / "boxes.json").write_text(json.dumps(document), encoding="utf-8")
    rows = [
        {
            "dicom_id": b["dicom"], "category_name": b["category"], "label_text": b["text"],
            "x": b["box"][0], "y": b["box"][1], "w": b["box"][2], "h": b["box"][3],
            "image_width": 80, "image_height": 72, "split": "test", "path": f"files/p1/{b['dicom']}.jpg",
        }
        for b in boxes
    ]  # fmt: skip
    save_csv(folder / "boxes.csv", rows)


def save_coco_data(folder: Path) -> None:
    """kind coco: captions and instances of the splits train and val: polygons, run lengths of a crowd, boxes alone."""
    categories = {1: "person", 18: "dog", 58: "hot dog"}
    for split, numbers in (("train", range(8)), ("val", range(8, 14))):
        images = [{"id": n, "file_name": f"{n:06d}.jpg", "width": 80, "height": 72} for n in numbers]
        captions, instances = [], []
        for n in numbers:
            save_image(folder / f"{split}2017/{n:06d}.jpg", n)
            category = list(categories)[n % 3]
            other = list(categories)[(n + 1) % 3]
            texts = [f"A {categories[category]} beside a {categories[other]}, {n}.", f"The {categories[category]}.\n"]
            captions += [{"id": 10 * n + i, "image_id": n, "caption": text} for i, text in enumerate(texts)]
            x, y, width, height = box_of(n, 80, 72)
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            crowd = np.zeros((72, 80), bool)
            crowd[40:60, 44:70] = True
            flat = crowd.T.reshape(-1)
            ends = [0, *(np.flatnonzero(np.diff(flat.astype(int))) + 1).tolist(), len(flat)]
            shapes = [
                (category, [x, y, width, height], [corners], 0),
                (other, [44, 40, 26, 20], {"size": [72, 80], "counts": np.diff(ends).tolist()}, 1),
                (category, [50, 8, 12, 10], [], 0),
            ]
            instances += [
                {
                    "id": 100 * n + i, "image_id": n, "category_id": shape[0], "bbox": shape[1],
                    "segmentation": shape[2], "iscrowd": shape[3], "area": 1.0,
                }
                for i, shape in enumerate(shapes)
            ]  # fmt: skip
        (folder / "annotations").mkdir(parents=True, exist_ok=True)
        named = [{"id": i, "name": name, "supercategory": "x"} for i, name in categories.items()]
        for kind, rows in (("captions", captions), ("instances", instances)):
            document = {"info": {}, "images": images, "annotations": rows, "categories": named}
            (folder / f"annotations/{kind}_{split}2017.json").write_text(json.dumps(document), encoding="utf-8")


INPUTS: dict[str, Callable[[Path], Any]] = {
    "sd": lambda folder: sd_pipeline().save_pretrained(folder),
    "v": lambda folder: sd_pipeline("v_prediction").save_pretrained(folder),
    "pairs": lambda folder: pairs_pipeline().save_pretrained(folder),
    "sdxl": lambda folder: sdxl_pipeline().save_pretrained(folder),
    "bert": save_bert,
    "folder_data": save_folder_data,
    "mimic_data": save_mimic_data,
    "coco_data": save_coco_data,
}
"""Name in the command lines, as ../inputs/<name> -> what writes it."""


def write_inputs(folder: Path) -> None:
    """All inputs, each in a folder of its own."""
    for name, write in INPUTS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        write(folder / name)

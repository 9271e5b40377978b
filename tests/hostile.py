"""Damage to the folders of a base, an adapter and a trained run, and what a user is told of each."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from distill.models.loading import LORA_FILE

Damage = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]
UNET, VAE, TEXT = "unet", "vae", "text_encoder"
WEIGHTS = {
    UNET: "unet/diffusion_pytorch_model.safetensors",
    VAE: "vae/diffusion_pytorch_model.safetensors",
    TEXT: "text_encoder/model.safetensors",
}
CONFIGS = {UNET: "unet/config.json", VAE: "vae/config.json", TEXT: "text_encoder/config.json"}
SCHEDULER = "scheduler/scheduler_config.json"
JSON_FILES = ("model_index.json", *CONFIGS.values(), SCHEDULER, "tokenizer/tokenizer_config.json")
RAN = "hostile_code_ran"
"""A file that code inside a model would leave in the working directory."""
CODE = (
    f"open({RAN!r}, 'w').close()\nclass Evil:\n    @classmethod\n    def from_pretrained(cls, *a, **k): return cls()\n"
)


@dataclass(frozen=True)
class Case:
    """said: what the message must match, None where the folder is fine. kind: which tiny base it is made of."""

    name: str
    damage: Damage
    said: str | None
    kind: str = "sd"


# --- what can happen to any file ---------------------------------------------------------------------------------------


def missing(folder: Path, name: str) -> None:
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def written(folder: Path, name: str, content: bytes | str) -> None:
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def truncated(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def zeroed(folder: Path, name: str) -> None:
    """As a disk that lost power leaves a file."""
    (folder / name).write_bytes(b"\0" * (folder / name).stat().st_size)


def into_folder(folder: Path, name: str) -> None:
    missing(folder, name)
    (folder / name).mkdir()


def into_file(folder: Path, name: str) -> None:
    shutil.rmtree(folder / name)
    (folder / name).write_text("a file")


def loop(folder: Path, name: str) -> None:
    missing(folder, name)
    (folder / name).symlink_to(folder / name)


def dangling(folder: Path, name: str) -> None:
    missing(folder, name)
    (folder / name).symlink_to(folder / "nowhere")


def pipe(folder: Path, name: str) -> None:
    missing(folder, name)
    os.mkfifo(folder / name)


def unreadable(folder: Path, name: str) -> None:
    (folder / name).chmod(0)


# --- JSON and weights --------------------------------------------------------------------------------------------------


def configured(folder: Path, name: str, **values: Any) -> None:
    """Values in a JSON file; None takes a key out."""
    content = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def tensors_of(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata() or {}


def reweighed(folder: Path, name: str, change: Callable[[Tensors], Tensors]) -> None:
    tensors, metadata = tensors_of(folder / name)
    changed = {key: value.contiguous() for key, value in change(tensors).items()}
    save_file(changed, folder / name, metadata | {"format": "pt"})


def headed(folder: Path, name: str, change: Callable[[dict[str, Any], bytes], bytes]) -> None:
    """The file with another header. change: of the header's entries and the data, to the whole file."""
    content = (folder / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    (folder / name).write_bytes(change(json.loads(content[8 : 8 + length]), content[8 + length :]))


def as_file(header: dict[str, Any], data: bytes, length: int | None = None) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _first(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header[next(key for key in header if key != "__metadata__")]
    return found


def wrong_dtype(header: dict[str, Any], data: bytes) -> bytes:
    _first(header)["dtype"] = "F64"
    return as_file(header, data)


def unknown_dtype(header: dict[str, Any], data: bytes) -> bytes:
    _first(header)["dtype"] = "Q7"
    return as_file(header, data)


def overlapping(header: dict[str, Any], data: bytes) -> bytes:
    for entry in list(header.values())[1:4]:
        entry["data_offsets"] = _first(header)["data_offsets"]
    return as_file(header, data)


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: change(value) for key, value in tensors.items()}


def largest(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """Change the tensor of most numbers."""

    def changed(tensors: Tensors) -> Tensors:
        name = max(tensors, key=lambda key: tensors[key].numel())
        return tensors | {name: change(tensors[name].clone())}

    return changed


def one_value(value: float) -> Callable[[Tensors], Tensors]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return largest(change)


def without_first(tensors: Tensors) -> Tensors:
    return {key: tensors[key] for key in sorted(tensors)[1:]}


def renamed(tensors: Tensors) -> Tensors:
    return {f"model.diffusion_model.{key}": value for key, value in tensors.items()}


def pickled(folder: Path, part: str) -> None:
    """Weights as a pickle that runs code when it is read, and none as safetensors."""

    class Evil:
        def __reduce__(self) -> Any:
            return (open, (RAN, "w"))

    path = folder / WEIGHTS[part]
    name = "pytorch_model.bin" if part == TEXT else "diffusion_pytorch_model.bin"
    torch.save({"weight": Evil()}, path.with_name(name))
    path.unlink()


# --- bases -------------------------------------------------------------------------------------------------------------


def index_entry(folder: Path, part: str, library: str, name: str) -> None:
    configured(folder, "model_index.json", **{part: [library, name]})


def custom_pipeline(folder: Path) -> None:
    (folder / "evil.py").write_text(CODE)
    configured(folder, "model_index.json", _class_name=["evil", "Evil"])


def custom_component(folder: Path) -> None:
    (folder / UNET / "evil.py").write_text(CODE)
    index_entry(folder, UNET, "evil", "Evil")


def module_beside(folder: Path) -> None:
    """A module in the working directory, which Python's path may hold."""
    Path("evil_module_beside.py").write_text(CODE)
    index_entry(folder, UNET, "evil_module_beside", "Evil")


def auto_map(folder: Path) -> None:
    (folder / TEXT / "evil.py").write_text(CODE)
    configured(folder, CONFIGS[TEXT], auto_map={"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"})


def auto_model(folder: Path) -> None:
    auto_map(folder)
    configured(folder, CONFIGS[TEXT], model_type="evil")
    index_entry(folder, TEXT, "transformers", "AutoModel")


def auto_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "evil.py").write_text(CODE)
    configured(
        folder,
        "tokenizer/tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
        tokenizer_class="Evil",
    )


def larger_vocabulary(folder: Path) -> None:
    """Ids that the text encoder has no row for."""
    path = folder / "tokenizer/tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] |= {f"more{i}</w>": len(vocabulary) + i for i in range(50)}
    path.write_text(json.dumps(content))


def smaller_text_encoder(folder: Path) -> None:
    reweighed(folder, WEIGHTS[TEXT], lambda t: {k: v[:100] if "token_embedding" in k else v for k, v in t.items()})
    configured(folder, CONFIGS[TEXT], vocab_size=100)


def base_of(folder: Path, build: Callable[[], Any]) -> None:
    shutil.rmtree(folder)
    build().save_pretrained(folder)


def other_part(folder: Path, part: str, build: Callable[[], Any]) -> None:
    shutil.rmtree(folder / part)
    build().save_pretrained(folder / part)


def other_unet(folder: Path, **options: Any) -> None:
    from diffusers import UNet2DConditionModel

    config = json.loads((folder / CONFIGS[UNET]).read_text())
    values = {k: v for k, v in config.items() if not k.startswith("_")} | options
    torch.manual_seed(0)
    other_part(folder, UNET, lambda: UNet2DConditionModel(**values))


def other_vae(folder: Path, **options: Any) -> None:
    from diffusers import AutoencoderKL

    config = json.loads((folder / CONFIGS[VAE]).read_text())
    torch.manual_seed(0)
    other_part(
        folder, VAE, lambda: AutoencoderKL(**({k: v for k, v in config.items() if not k.startswith("_")} | options))
    )


def other_class(folder: Path, name: str) -> None:
    configured(folder, "model_index.json", _class_name=name)


def file_cases(name: str, said: str) -> Iterator[Case]:
    """What can happen to one file that must be there."""
    for damage in (missing, truncated, zeroed, into_folder, loop, dangling, pipe):
        yield Case(f"{name} {damage.__name__}", partial(damage, name=name), said)
    for label, content in (
        ("empty", ""),
        ("a list", "[]"),
        ("a number", "7"),
        ("null", "null"),
        ("not UTF-8", b"\xff\xfe{}"),
        ("deeply nested", "[" * 100_000),
        ("foreign", '{"name": "left-pad", "version": "1.0.0"}'),
    ):
        yield Case(f"{name} {label}", partial(written, name=name, content=content), said)


def weight_cases(part: str) -> Iterator[Case]:
    name, said = WEIGHTS[part], rf"/{part}\b"
    for damage in (missing, truncated, zeroed, into_folder, loop, pipe):
        yield Case(f"{part} weights {damage.__name__}", partial(damage, name=name), said)
    yield Case(f"{part} weights empty", partial(written, name=name, content=""), said)
    headers: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
        "header longer than the file": lambda h, d: as_file(h, d, length=10**7),
        "header of 2**63 bytes": lambda h, d: as_file(h, d, length=2**63),
        "header of another length": lambda h, d: as_file(h, d, length=100),
        "header a list": lambda h, d: struct.pack("<Q", 2) + b"[]" + d,
        "wrong dtype": wrong_dtype,
        "unknown dtype": unknown_dtype,
        "overlapping offsets": overlapping,
    }
    for label, change in headers.items():
        yield Case(f"{part} weights {label}", partial(headed, name=name, change=change), said)
    changes: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
        "NaN": (one_value(float("nan")), "not finite"),
        "inf": (one_value(float("inf")), "not finite"),
        "all NaN": (every(lambda t: torch.full_like(t, float("nan"))), "not finite"),
        "all 0": (every(torch.zeros_like), "all weights are 0"),
        "of other shape": (largest(lambda t: t[:-1]), said),
        "a scalar": (largest(lambda t: t.flatten()[0]), said),
        "key missing": (without_first, f"{said}.*lacks"),
        "no keys": (lambda t: {}, said),
        "keys of another layout": (renamed, said),
        "of whole numbers": (every(lambda t: (t * 100).to(torch.int32)), "of type I32"),
        "of bool": (every(lambda t: t > 0), "of type BOOL"),
    }
    for label, (alter, expected) in changes.items():
        yield Case(f"{part} weights {label}", partial(reweighed, name=name, change=alter), expected)
    fine: dict[str, Callable[[Tensors], Tensors]] = {
        "fp16": every(lambda t: t.half()),
        "bf16": every(lambda t: t.bfloat16()),
        "fp64": every(lambda t: t.double()),
        "mixed": lambda tensors: {k: v.half() if i % 2 else v for i, (k, v) in enumerate(tensors.items())},
        "key in addition": lambda tensors: tensors | {"more": torch.zeros(3)},
    }
    for label, alter in fine.items():
        yield Case(f"{part} weights {label}", partial(reweighed, name=name, change=alter), None)
    yield Case(f"{part} pickle only", partial(pickled, part=part), said)


def config_cases() -> Iterator[Case]:
    for part, key in ((UNET, "in_channels"), (VAE, "latent_channels"), (TEXT, "hidden_size")):
        for value in (0, -1, "four", [4], 10**9, 3.5):
            yield Case(
                f"{part} {key} {value!r}", partial(configured, name=CONFIGS[part], **{key: value}), rf"/{part}\b"
            )
    for key, value in (
        ("block_out_channels", []),
        ("block_out_channels", "many"),
        ("down_block_types", ["NoSuchBlock", "DownBlock2D"]),
        ("cross_attention_dim", 0),
        ("attention_head_dim", 0),
        ("norm_num_groups", 7),
    ):
        yield Case(f"unet {key} {value!r}", partial(configured, name=CONFIGS[UNET], **{key: value}), "/unet")


def index_cases() -> Iterator[Case]:
    for name in (
        "NoSuchPipeline",
        "os.system",
        "eval",
        "",
        "UNet2DConditionModel",
        "DiffusionPipeline",
        "DDPMPipeline",
    ):
        said = "_class_name.*StableDiffusionPipeline"
        yield Case(f"class {name!r}", partial(other_class, name=name), said)
    for value in (7, None, {"a": 1}, ["a"], ["a", "b", "c"]):
        yield Case(
            f"class {value!r}",
            partial(configured, name="model_index.json", _class_name=value),
            "_class_name.*StableDiffusionPipeline",
        )
    for library, name in (
        ("os", "system"), ("builtins", "eval"), ("subprocess", "Popen"), ("diffusers", "NoSuchModel"),
        ("nowhere", "UNet2DConditionModel"), ("transformers", "CLIPTextModel"), ("diffusers", "AutoencoderKL"),
        ("", ""), ("diffusers", "DDIMScheduler"), ("diffusers", "__version__"), ("..", "unet"),
    ):  # fmt: skip
        yield Case(f"unet {library}.{name}", partial(index_entry, part=UNET, library=library, name=name), "unet")
    for value in (7, "UNet2DConditionModel", [], ["diffusers"], {"a": 1}, [["diffusers"], "UNet2DConditionModel"]):
        yield Case(f"unet entry {value!r}", partial(configured, name="model_index.json", unet=value), "unet")
    for part in (UNET, VAE, TEXT, "tokenizer", "scheduler"):
        yield Case(f"no entry {part}", partial(configured, name="model_index.json", **{part: None}), part)
        yield Case(f"null entry {part}", partial(configured, name="model_index.json", **{part: [None, None]}), part)
        yield Case(f"{part} a file", partial(into_file, name=part), part)
        yield Case(f"{part} missing", partial(missing, name=part), part)
    yield Case(
        "an entry in addition", partial(configured, name="model_index.json", more=["diffusers", "AutoencoderKL"]), None
    )
    yield Case("code: custom pipeline", custom_pipeline, "_class_name.*StableDiffusionPipeline")
    yield Case("code: custom component", custom_component, "unet")
    yield Case("code: module beside", module_beside, "unet")
    yield Case("code: auto_map", auto_map, None)
    yield Case("code: AutoModel", auto_model, "text_encoder")
    yield Case("code: AutoTokenizer", auto_tokenizer, None)


def scheduler_cases() -> Iterator[Case]:
    for name in ("NoSuchScheduler", "AutoencoderKL", "os.system"):
        entry = partial(index_entry, part="scheduler", library="diffusers", name=name)
        yield Case(f"scheduler class {name}", entry, "scheduler")
    for key, value in (
        ("prediction_type", "banana"), ("prediction_type", 7), ("num_train_timesteps", 0), ("num_train_timesteps", -5),
        ("num_train_timesteps", "many"), ("beta_schedule", "banana"), ("beta_start", "low"), ("beta_end", float("nan")),
        ("beta_end", 5.0), ("beta_start", -1.0), ("trained_betas", []), ("num_train_timesteps", 10**12),
    ):  # fmt: skip
        yield Case(
            f"scheduler {key} {value!r}", partial(configured, name=SCHEDULER, **{key: value}), "scheduler|predicts"
        )
    yield Case(
        "scheduler of flow matching",
        partial(index_entry, part="scheduler", library="diffusers", name="FlowMatchEulerDiscreteScheduler"),
        "scheduler",
    )
    yield Case("scheduler of v", partial(configured, name=SCHEDULER, prediction_type="v_prediction"), None)
    for name in ("DDPMScheduler", "EulerDiscreteScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"):
        yield Case(f"scheduler {name}", partial(index_entry, part="scheduler", library="diffusers", name=name), None)


def fit_cases() -> Iterator[Case]:
    """Parts that are sound, and do not fit each other."""
    yield Case("tokenizer of more tokens", larger_vocabulary, "tokenizer.*text_encoder")
    yield Case("text encoder of fewer tokens", smaller_text_encoder, "tokenizer.*text_encoder")
    yield Case(
        "U-Net of another text width", partial(other_unet, cross_attention_dim=24), "cross_attention_dim.*24.*16"
    )
    yield Case(
        "VAE of other latent channels",
        partial(other_vae, latent_channels=8),
        "in_channels is 4.*latent_channels.*8",
    )
    yield Case("VAE of half the scale", partial(
        other_vae, block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    ), None)  # fmt: skip
    yield Case("inpainting of 9 channels", partial(other_unet, in_channels=9), "in_channels.*9.*inpainting")
    yield Case("image to image of 8 channels", partial(other_unet, in_channels=8), "in_channels.*8")
    yield Case("learned variance", partial(other_unet, out_channels=8), "out_channels.*8")
    yield Case("inpainting pipeline", partial(other_class, name="StableDiffusionInpaintPipeline"), "_class_name")
    yield Case("image to image pipeline", partial(other_class, name="StableDiffusionImg2ImgPipeline"), "_class_name")
    yield Case("SDXL's index on SD", partial(other_class, name="StableDiffusionXLPipeline"), "tokenizer_2 is null")
    yield Case("SD's index on SDXL", partial(other_class, name="StableDiffusionPipeline"), "base", kind="sdxl")
    yield Case("scaling_factor 0", partial(configured, name=CONFIGS[VAE], scaling_factor=0.0), "scaling_factor")
    yield Case(
        "scaling_factor NaN", partial(configured, name=CONFIGS[VAE], scaling_factor=float("nan")), "scaling_factor"
    )
    yield Case("scaling_factor text", partial(configured, name=CONFIGS[VAE], scaling_factor="x"), "scaling_factor")
    yield Case("as it was", lambda folder: None, None)
    yield Case("SDXL as it was", lambda folder: None, None, kind="sdxl")
    yield Case("SDXL without text_encoder_2", partial(missing, name="text_encoder_2"), "text_encoder_2", kind="sdxl")
    yield Case("SDXL NaN in text_encoder_2", partial(
        reweighed, name="text_encoder_2/model.safetensors", change=one_value(float("nan"))
    ), "text_encoder_2.*not finite", kind="sdxl")  # fmt: skip
    yield Case("a file in place of the folder", lambda f: (shutil.rmtree(f), f.write_text("x"))[0], "folder|base")
    yield Case("an empty folder", lambda f: (shutil.rmtree(f), f.mkdir())[0], "model_index.json")
    for size in ("model_max_length",):
        for value in (0, -1, "many", 10**30):
            yield Case(
                f"tokenizer {size} {value!r}",
                partial(configured, name="tokenizer/tokenizer_config.json", **{size: value}),
                "tokenizer",
            )


def base_cases() -> list[Case]:
    cases: list[Case] = []
    for name in JSON_FILES:
        part = name.split("/")[0] if "/" in name else "model_index.json"
        cases += file_cases(name, part)
    cases += file_cases("tokenizer/tokenizer.json", "tokenizer")
    for part in WEIGHTS:
        cases += weight_cases(part)
    cases += [*config_cases(), *index_cases(), *scheduler_cases(), *fit_cases()]
    return cases


def unreadable_cases() -> list[Case]:
    """Files without permission; the superuser can read them."""
    names = (*JSON_FILES, *WEIGHTS.values())
    return [Case(f"{name} unreadable", partial(unreadable, name=name), name.split("/")[0]) for name in names]


# --- adapters and run folders ------------------------------------------------------------------------------------------


def lora(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    reweighed(folder, LORA_FILE, change)


def lora_metadata(folder: Path, content: Any) -> None:
    """content: a change of the adapter's options by the ends of their names, or the text in their place."""
    tensors, metadata = tensors_of(folder / LORA_FILE)
    if isinstance(content, dict):
        options = json.loads(metadata["lora_adapter_metadata"])
        content = json.dumps(
            {k: next((v for end, v in content.items() if k.endswith(end)), old) for k, old in options.items()}
        )
    save_file(tensors, folder / LORA_FILE, metadata | {"lora_adapter_metadata": content})


def without_metadata(folder: Path) -> None:
    save_file(tensors_of(folder / LORA_FILE)[0], folder / LORA_FILE)


def keys(change: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {change(key): value for key, value in tensors.items()}


def halved(tensors: Tensors) -> Tensors:
    """Of rank 1, where the metadata say 2."""
    return {k: v[:1] if ".down." in k or "lora_A" in k else v[:, :1] for k, v in tensors.items()}


def dora(tensors: Tensors) -> Tensors:
    more = {
        k.replace(".lora.down.weight", ".lora_magnitude_vector"): torch.ones(8) for k in tensors if ".lora.down" in k
    }
    return tensors | more


def loha(tensors: Tensors) -> Tensors:
    """The keys of LyCORIS."""
    return {
        f"lora_unet_{key.split('.lora')[0].replace('.', '_')}.hada_w{i}_{side}": value.clone()
        for key, value in tensors.items()
        for i, side in ((1, "a"), (1, "b"), (2, "a"), (2, "b"))
    }


def adapter_cases() -> Iterator[Case]:
    """Of a run folder whose U-Net and text encoder have an adapter of rank 2."""
    file, said = LORA_FILE, "pytorch_lora_weights.safetensors"
    for damage in (truncated, zeroed, into_folder, loop, dangling, pipe):
        yield Case(f"adapter {damage.__name__}", partial(damage, name=file), said)
    yield Case("adapter missing", partial(missing, name=file), "holds neither")

    yield Case("adapter empty", partial(written, name=file, content=""), said)
    for label, change in (
        ("wrong dtype", wrong_dtype), ("unknown dtype", unknown_dtype), ("overlapping", overlapping),
        ("huge header", lambda h, d: as_file(h, d, length=2**62)),
    ):  # fmt: skip
        yield Case(f"adapter {label}", partial(headed, name=file, change=change), said)
    changes: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
        "NaN": (one_value(float("nan")), "not finite"),
        "inf": (one_value(float("-inf")), "not finite"),
        "all 0": (every(torch.zeros_like), "all weights are 0"),
        "no keys": (lambda t: {}, "no weights"),
        "of whole numbers": (every(lambda t: t.to(torch.int64)), "of type I64"),
        "of another rank": (halved, said),
        "of other shapes": (largest(lambda t: t[:, :3]), said),
        "a key missing": (without_first, said),
        "keys of no module": (keys(lambda k: k.replace("down_blocks.0", "down_blocks.7")), said),
        "keys without a prefix": (keys(lambda k: k.split(".", 1)[1]), said),
        "keys of nothing": (keys(lambda k: f"nothing.{k}"), said),
        "a key in addition": (lambda t: t | {"unet.more.lora.down.weight": torch.ones(2, 2)}, said),
        "only down": (lambda t: {k: v for k, v in t.items() if ".down." in k}, said),
        "DoRA": (dora, said),
        "LoHa": (loha, said),
        "of full weights": (lambda t: {k.split(".lora")[0] + ".weight": v for k, v in t.items()}, said),
    }
    for label, (alter, expected) in changes.items():
        yield Case(f"adapter {label}", partial(lora, change=alter), expected)
    for alpha in (0, -4.0, float("nan"), float("inf"), "many", None, [4]):
        yield Case(f"adapter alpha {alpha!r}", partial(lora_metadata, content={"lora_alpha": alpha}), "lora_alpha")
    for rank in (0, -1, 3, "two", None, 10**9):
        yield Case(f"adapter rank {rank!r} in its metadata", partial(lora_metadata, content={".r": rank}), said)
    yield Case("adapter targets nothing", partial(lora_metadata, content={"target_modules": ["nothing"]}), said)
    for label, text in (("torn", '{"unet.r": '), ("a list", "[]"), ("deeply nested", "[" * 100_000)):
        yield Case(f"adapter metadata {label}", partial(lora_metadata, content=text), "lora_adapter_metadata")
    yield Case("adapter without metadata", without_metadata, None)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        yield Case(f"adapter {dtype}", partial(lora, change=every(lambda t, d=dtype: t.to(d))), None)
    yield Case("adapter as it was", lambda folder: None, None)
    yield Case("a folder of a run that is empty", lambda f: (shutil.rmtree(f), f.mkdir())[0], "holds neither")
    yield Case("a file in place of a run", lambda f: (shutil.rmtree(f), f.write_text("x"))[0], "run folder")
    yield Case("a run that is missing", lambda f: shutil.rmtree(f), "run folder")


def full_run_cases() -> Iterator[Case]:
    """Of a run folder with the whole U-Net and text encoder."""
    for part in (UNET, TEXT):
        for case in weight_cases(part):
            yield Case(f"run: {case.name}", case.damage, case.said)
        for case in file_cases(CONFIGS[part], part):
            yield Case(f"run: {case.name}", case.damage, case.said)
        yield Case(f"run: {part} a file", partial(into_file, name=part), part)
    for content in ("", "[]", "{}", '{"layers": 7, "timesteps": [1]}', '{"layers": ["x"], "timesteps": [1]}',
                    '{"layers": [], "timesteps": []}', '{"layers": [[1]], "timesteps": [1]}', "\0" * 20):  # fmt: skip
        yield Case(
            f"run: localization.json {content[:20]!r}",
            partial(written, name="localization.json", content=content),
            "localization.json",
        )
    deep = partial(written, name="localization.json", content="[" * 100_000)
    yield Case("run: localization.json deeply nested", deep, "localization.json")
    yield Case("run: as it was", lambda folder: None, None)

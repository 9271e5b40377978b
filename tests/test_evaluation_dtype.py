"""Evaluation in 16 bits: only the denoiser rounds, what was measured in another type is not used again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import EulerDiscreteScheduler
from tiny import tiny_sd, tiny_sdxl
from toy_family import toy_model

from distill.attention.recording import record_attention
from distill.config import FullEvaluation
from distill.data.phantom.dataset import PhantomDataset
from distill.errors import UserError
from distill.evaluation.drawing import generate
from distill.evaluation.evaluate import evaluate, held_out
from distill.evaluation.protocols import prepare_inputs, queries
from distill.models.bits import denoise_in, fewer_bits
from distill.models.family import Model
from distill.models.loading import model_of

CONFIG = FullEvaluation(
    generated_images=2, localization_images=2, diversity_captions=1, diversity_samples=2, num_inference_steps=2,
    batch_size=2, bootstrap_samples=10, examples=1, timesteps=(300,), features="none",
)  # fmt: skip
BUILD = {"sd": lambda: model_of(tiny_sd()), "sdxl": lambda: model_of(tiny_sdxl()), "toy": toy_model}


@torch.no_grad()
def maps_of(model: Model, phantoms: PhantomDataset) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Maps by layer, and the prediction."""
    batch = queries(phantoms, model, CONFIG)[:2]
    inputs = prepare_inputs(model, [phantoms[q.image] for q in batch], batch, torch.device("cpu"))
    with record_attention(model.denoiser, reduce=inputs.reduce) as maps:
        prediction = model.family.predict(model.denoiser, inputs.latents, inputs.steps(301), inputs.conditions)
    return maps.by_layer, prediction


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", list(BUILD))
def test_maps_and_predictions_are_off_by_rounding_and_are_float32(
    kind: str, dtype: torch.dtype, phantoms: PhantomDataset
) -> None:
    model = BUILD[kind]().freeze()
    exact, expected = maps_of(model, phantoms)
    denoise_in(model, dtype)
    assert {p.dtype for p in model.denoiser.parameters()} == {dtype}
    assert {p.dtype for part in (model.vae, *model.text_encoders) for p in part.parameters()} == {torch.float32}
    seen: list[Any] = []
    block = next(m for n, m in model.denoiser.named_modules() if n.endswith("attn2.to_q"))
    block.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    found, prediction = maps_of(model, phantoms)
    assert set(seen) == {dtype}, "computes in it"
    rounding = 4 * torch.finfo(dtype).eps
    for name, near in [*found.items(), ("", prediction)]:
        far = exact[name] if name else expected
        assert near.dtype == torch.float32 and 0 < float((near - far).norm() / far.norm()) < rounding, name
    # Sums of probabilities that were made in 16 bits would be off by their rounding.
    for values in found.values():
        torch.testing.assert_close(values[..., :4].sum(dim=-1), torch.ones(values.shape[:2]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_sd, tiny_sdxl])
def test_an_image_is_near_that_of_float32(build: Any) -> None:
    model = model_of(build()).freeze()
    model.pipeline.scheduler = EulerDiscreteScheduler.from_config(model.pipeline.scheduler.config)  # of fractions
    exact = generate(model, ["No edema.", "Effusion."], [1, 2], 64, CONFIG)
    steps: list[torch.Tensor] = []
    denoise_in(model, torch.bfloat16)
    embedding = model.denoiser.time_proj
    embedding.register_forward_pre_hook(lambda _, args: steps.append(args[0]))
    near = generate(model, ["No edema.", "Effusion."], [1, 2], 64, CONFIG)
    assert near.dtype == torch.float32 and 0 < float((near - exact).abs().mean()) < 0.003
    assert float(steps[0].flatten()[0]) == 999.0, "in 8 bits it would be 1000"


def test_what_was_measured_in_another_type_is_measured_anew(phantoms: PhantomDataset, tmp_path: Path) -> None:
    accelerator, found, keys = Accelerator(), [], []
    for dtype in ("fp32", "bf16", "bf16"):
        model, config = model_of(tiny_sd()).freeze(), CONFIG.model_copy(update={"dtype": dtype})
        against = held_out(phantoms, model, config, None, accelerator=accelerator, run_dir=tmp_path)
        keys.append(against.made_of(model, "weights", config, 64))
        arm = {"resolution": 64, "accelerator": accelerator, "arm_dir": tmp_path / "arm", "label": "m"}
        found.append(evaluate(model, against, config, **arm))
        found[-1].pop("seconds")
    one, other, again = found
    assert one["localization"] != other["localization"] == again["localization"]
    assert one["quality"] != other["quality"] == again["quality"] and one["size"] == other["size"]
    assert all(keys[0][part] != keys[1][part] == keys[2][part] for part in ("localization", "quality", "memorization"))
    assert other["localization"]["word"]["auc"] == pytest.approx(one["localization"]["word"]["auc"], abs=0.02)


def test_linear_layers_in_fewer_bits_take_16_bits_in() -> None:
    model = model_of(tiny_sd()).freeze()
    fewer_bits(model, "bf16", "int8")
    assert generate(model, ["Edema."], [1], 64, CONFIG).isfinite().all()


def test_numbers_beyond_fp16_end_with_a_word_on_the_type(phantoms: PhantomDataset, tmp_path: Path) -> None:
    model, config = model_of(tiny_sd()).freeze(), CONFIG.model_copy(update={"dtype": "fp16"})
    model.denoiser.conv_in.bias.data.fill_(1e6)
    against = held_out(phantoms, model, config, None, accelerator=Accelerator(), run_dir=tmp_path)
    for part, what in (("quality", "images"), ("localization", "maps")):
        with pytest.raises(
            UserError, match=f"evaluation.dtype is fp16, and the {what} are not finite; .* bf16 or fp32"
        ):
            evaluate(
                model_of(model.pipeline), against, config, resolution=64, accelerator=Accelerator(), arm_dir=tmp_path,
                label="m", parts=(part,),
            )  # fmt: skip

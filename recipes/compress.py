"""Make a smaller model: take blocks out of its U-Net, and let the whole model teach what is left.

    accelerate launch recipes/compress.py --config recipes/configs/phantom/compress.yaml --run checkpoints/finetune

What is taken out: distill/models/blocks.py. The loss is in distill/methods/attention_distillation.py, by default on
outputs and block features (BK-SDM); the loop is `fit` in distill/trainer.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import AfterValidator

from distill.cli import main
from distill.config import BlocksConfig, DenoisingConfig, TrainingRunConfig
from distill.configuration import renamed as old
from distill.methods.options import AttentionDistillationOptions
from distill.settings import HARMLESS, Text, once

if TYPE_CHECKING:
    from distill.experiment.run import Run
    from distill.files import JsonObject

WHOLE = "whole"


class CompressConfig(TrainingRunConfig):
    """Take blocks out of a U-Net, and train what is left with the whole one as teacher.

    accelerate launch recipes/compress.py --config recipes/configs/phantom/compress.yaml --run checkpoints/finetune
    """

    common: ClassVar[tuple[str, ...]] = (
        "base.name", "run", "data.kind", "data.root", "trainer.max_steps", "bits", "output_dir",
    )  # fmt: skip
    renamed: ClassVar[dict[str, str]] = old.COMPRESS
    run: Text | None = None
    """Run folder on the base that is compressed. None compresses the base itself."""
    blocks: BlocksConfig = BlocksConfig()
    """Blocks to take out."""
    text_encoder: Literal["frozen", "full"] = "frozen"
    """How the text encoders are trained, starting from the teacher's."""
    denoising: DenoisingConfig = DenoisingConfig()
    """The diffusion loss, and the text that it is conditioned on."""
    method: AttentionDistillationOptions = AttentionDistillationOptions(
        teacher=WHOLE, token_kl_weight=0.0, place_kl_weight=0.0, mass_weight=0.0, output_weight=1.0, feature_weight=1.0
    )
    """Distillation from the whole model. Attention terms are off: they cost maps here (recipes/results/)."""
    bits: Annotated[tuple[Literal["int8", "nf4"], ...], AfterValidator(once), HARMLESS] = ()
    """Evaluate the student also with its linear layers in these types."""
    output_dir: Text = "checkpoints/compress"
    """Run folder. pruned_base in it is the smaller pipeline before the training, which the run folder is loaded on."""


def compress(config: CompressConfig) -> None:
    from distill.errors import UserError
    from distill.experiment.arms import Arm
    from distill.experiment.derive import derived_base
    from distill.experiment.folder import held
    from distill.experiment.results import evaluate_arm, finish
    from distill.experiment.run import open_run
    from distill.experiment.train import dry_run, train_arm
    from distill.methods.training import Training
    from distill.models import load_model
    from distill.models.blocks import prune
    from distill.models.stock import PRUNED_BASE

    options = config.method
    if options.teacher != WHOLE or options.start_from_teacher or options.gate_reference is not None:
        raise UserError(
            "compress.py: the teacher is the whole model, base and run; leave method.teacher and its like out"
        )
    folder, evaluation = Path(config.output_dir), config.evaluation.full()
    training = Training(denoiser="full", text_encoder=config.text_encoder, method=options, denoising=config.denoising)
    arm = Arm("model", folder, training, config.trainer, evaluation)
    pruned = derived_base(config, config.run, PRUNED_BASE, partial(prune, blocks=config.blocks))
    with held(folder, write=not config.dry_run), pruned as base:
        references = {WHOLE: lambda: load_model(config.base, config.run)}
        run = open_run(config, {"model": arm}, base=base, references=references, compare_to=("teacher",))
        if config.dry_run:
            return dry_run(run)
        cost = train_arm(run, arm)
        teacher = Path(config.run) if config.run else None
        results: JsonObject = {
            "teacher": evaluate_arm(run, "teacher", teacher, base=config.base),
            "pruned": evaluate_arm(run, "pruned", None),
            "model": evaluate_arm(run, "model", folder, cost),
        }
        for bits in config.bits:
            fewer = config.evaluation.full(quantization=bits)
            results[f"model_{bits}"] = evaluate_arm(run, f"model_{bits}", folder, evaluation=fewer)
        compare_speed(run, config)
        finish(run, results, f"load it in diffusers as {folder / 'README.md'} shows")


def compare_speed(run: Run, config: CompressConfig) -> None:
    """Write speed.json, and say how much smaller and faster the student is."""
    from distill.attention import attention_layers
    from distill.experiment.derive import whole
    from distill.files import write_json
    from distill.models import load_model
    from distill.models.blocks import model_size, seconds_a_pass

    if not run.accelerator.is_main_process or (run.folder / "speed.json").exists():
        return
    device, batch = run.accelerator.device, config.evaluation.batch_size
    models = {
        "teacher": whole(config.base, config.run).to(device).freeze(),
        "model": load_model(run.base, run.folder).to(device).freeze(),
    }
    seconds = seconds_a_pass(models, config.data.resolution, batch)
    write_json(run.folder / "speed.json", {"batch_size": batch, "denoiser_seconds_a_pass": seconds})
    size = {name: model_size(model, config.data.resolution) for name, model in models.items()}
    layers = {name: len(attention_layers(model.denoiser)) for name, model in models.items()}
    parts = [
        f"{label} {size['model'][key] / size['teacher'][key]:.2f}"
        for key, label in (("denoiser_parameters", "parameters"), ("denoiser_gflops", "operations"))
    ]
    run.say(
        f"denoiser against the teacher's: {', '.join(parts)}, time of a pass "
        f"{seconds['model'] / seconds['teacher']:.2f}; "
        f"cross-attention layers {layers['model']} of {layers['teacher']}"
    )


if __name__ == "__main__":
    main(compress, CompressConfig)

"""What the training recipes share: open a run folder, train an arm, evaluate what it exported, write the results.

Stages meet through files only. The same command again continues: a trained arm is not trained twice.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from distill.arms import FROZEN_TEXT_ENCODER, OWN_TEACHERS, Arm, is_gated, label_readers, settings_of, unused_options
from distill.attention import attention_layers, record_attention
from distill.cli import refuse_unused, to_yaml
from distill.components import (
    DTYPES,
    LORA_FILE,
    PHANTOM_BASE,
    Components,
    check_lora_targets,
    encode_text,
    load_components,
    parameter_counts,
    prepare_training,
    read_json,
)
from distill.compress import name_in_teacher
from distill.config import (
    AttentionDistillationConfig,
    BaseConfig,
    CompressConfig,
    DenoisingConfig,
    DistillAttentionConfig,
    DistillStepsConfig,
    EvaluateConfig,
    EvaluationConfig,
    FinetuneConfig,
    TradeoffConfig,
    TrainerConfig,
)
from distill.data import PhantomDataset, RecordDataset, load_dataset
from distill.data.cache import cache_latents, cache_text_embeddings, model_fingerprint
from distill.data.captions import NO_LABEL
from distill.data.training import TrainingRows, check_training_text, training_caption
from distill.errors import UserError, raise_all
from distill.evaluate import HeldOut, evaluate, generate, held_out, quality, save_png
from distill.export import export, prove_parity
from distill.gate import choose_taught
from distill.keylock import MERGE_CAPTIONS, KeyLock, lock_faults, lock_keys, merge_keys
from distill.localization import localization
from distill.metrics.features import load_features
from distill.objectives import (
    EMA,
    AttentionDistillationObjective,
    ConsistencyObjective,
    DenoisingObjective,
    SupervisedAttentionObjective,
    check_same_shape,
)
from distill.provenance import code_version, provenance
from distill.quantize import quantize
from distill.report import terminal_table, validate_metrics, write_model_card, write_report
from distill.report.document import write_atomic
from distill.trainer import FitResult, StepSampler, fit, generator_at, make_accelerator, peak_memory_gb

TAIL_IMAGES = 512
"""Training images that denoising.tail_weight's allowance is measured on."""

TrainingConfig = FinetuneConfig | DistillAttentionConfig | TradeoffConfig | CompressConfig | DistillStepsConfig


@dataclass
class Run:
    """An open run folder with its data, all checked."""

    config: Any
    folder: Path
    accelerator: Accelerator
    train: PhantomDataset | RecordDataset | None
    test: PhantomDataset | RecordDataset
    console: Console
    seconds: dict[str, float]
    base: BaseConfig
    """What the arms are trained from."""
    against: HeldOut | None = None
    validation: PhantomDataset | RecordDataset | None = None

    def say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)


def open_run(config: Any, *, arms: list[Arm], base: BaseConfig | None = None) -> Run:
    """Check the whole configuration, base and data, and open (or continue) the run folder.

    base: what the arms are trained from, where it is not the configuration's.
    Raises UserError, before anything is written, with all faults of the data or the first of the rest.
    """
    quiet_libraries()
    code_version()
    refuse_unused(config, unused_options(config, arms))
    folder = Path(config.output_dir)
    if not config.dry_run:
        claim(folder, config)
    began = time.perf_counter()
    training = None if isinstance(config, EvaluateConfig) else config.trainer
    # A tracker of a dry run would leave its files in the run folder.
    quiet = replace(training, tracker="none") if training and config.dry_run else training
    accelerator = make_accelerator(quiet, folder) if quiet else Accelerator()
    set_seed(getattr(config, "seed", 0))
    components = load_components(base, None) if base else load_components(config.base, getattr(config, "run", None))
    base = base or config.base
    faults = []
    if config.data.resolution % components.vae_factor or config.data.resolution < 4 * components.vae_factor:
        faults.append(
            f"data.resolution is {config.data.resolution}; the VAE of {base.name} needs a "
            f"multiple of {components.vae_factor}, of at least {4 * components.vae_factor}"
        )
    steps = int(components.noise_scheduler.config.num_train_timesteps)
    if any(t >= steps for t in config.evaluation.timesteps or ()):
        faults.append(f"evaluation.timesteps must be in 0 .. {steps - 1}; got {config.evaluation.timesteps}")
    if training and training.cache_text_embeddings and any(arm.text_encoder != "frozen" for arm in arms):
        trained = ", ".join(arm.name for arm in arms if arm.text_encoder != "frozen")
        faults.append(
            f"trainer.cache_text_embeddings is true, but {trained} trains the text encoder, whose embeddings change at "
            "every step; set it to false"
        )
    faults += [
        f"consistency.solver_steps is {arm.consistency.solver_steps}; the base's {steps} timesteps must be a multiple of it"
        for arm in arms
        if arm.consistency and steps % arm.consistency.solver_steps
    ]
    if training and training.cache_text_embeddings and any(arm.distillation and not arm.consistency for arm in arms):
        faults.append("trainer.cache_text_embeddings: distillation needs the tokens for the teacher; set it to false")
    for arm in arms:
        if arm.distillation and arm.distillation.start_from_teacher and "lora" in (arm.method, arm.text_encoder):
            own = trains_teacher(config, arm)
            adapted = config.method == "lora" if own else (Path(arm.distillation.teacher or "") / LORA_FILE).exists()
            if arm.method != "lora" or not adapted:
                faults.append(
                    f"distillation.start_from_teacher is true, and {arm.name} trains adapters, which are of the base: it can "
                    "start only from a teacher that is an adapter of the U-Net too"
                )
            if own and arm.method == "lora" and (arm.lora or config.lora) != config.lora:
                faults.append(
                    f"{arm.name} starts from the adapters of frozen: its lora.* must be the run's, {config.lora}"
                )
        if (
            arm.lock_keys
            and arm.method == "lora"
            and not {"to_k", "attn2.to_k"} & set((arm.lora or config.lora).unet_targets)
        ):
            faults.append(
                f"{arm.name}: lock_keys: lora.unet_targets must hold to_k, whose adapters take in the keys at the end"
            )
        faults += [f"{arm.name}: {fault}" for fault in lock_faults(components)] if arm.lock_keys else []
    raise_all("the configuration does not fit the base", faults)
    attention_layers(components.unet, config.evaluation.layers)
    teachers = {arm.distillation.teacher for arm in arms if arm.distillation and not trains_teacher(config, arm)}
    references = {arm.distillation.gate_reference for arm in arms if arm.distillation and is_gated(arm)}
    for reference in references - {None, "base", str(folder / "learnable")}:
        check_same_shape(load_components(config.base, run=reference), components)
    for teacher in teachers - {None, *OWN_TEACHERS}:
        assert teacher is not None
        check_same_shape(load_teacher(config.base, teacher), components)
    for arm in arms:
        lora = arm.lora or config.lora
        if arm.distillation:
            attention_layers(components.unet, arm.distillation.layers)
        if arm.method == "lora":
            check_lora_targets(components.unet, lora.unet_targets, "unet")
        if arm.text_encoder == "lora":
            for encoder in components.text_encoders:
                check_lora_targets(encoder, lora.text_encoder_targets, "text_encoder")
    with accelerator.main_process_first():
        test = load_dataset(config.data, "test")
        train = load_dataset(config.data, "train") if arms else None
        validation = load_validation(config, arms)
    for dataset in (train, test, validation):
        if isinstance(dataset, RecordDataset):
            dataset.check_captions(components.tokenizers, components.max_tokens)
    console = Console()
    read = train if train is not None else test
    if isinstance(read, RecordDataset) and accelerator.is_main_process:
        console.print(read.summary, highlight=False, markup=False, soft_wrap=True)
    reads_labels = [key for key, is_read in label_readers(config, arms).items() if is_read]
    if train is not None and reads_labels and not any(train.labels(i) for i in range(len(train))):
        raise UserError(
            f"{reads_labels[0]} needs labels of the training images, and none has one; see data.label_column and "
            "data.finding_column, or the format's own column"
        )
    for label in {(arm.denoising or config.denoising).caption_dropout_label for arm in arms} - {None}:
        assert train is not None
        if not any(label in (train.labels(i) or (NO_LABEL,)) for i in range(len(train))):
            names = sorted({name for i in range(len(train)) for name in train.labels(i)})
            raise UserError(
                f"denoising.caption_dropout_label is {label!r}, and no training image has that label; there are "
                f"{', '.join(names)}, and {NO_LABEL!r} for images without one"
            )
    truncate = config.data.truncate_captions or not isinstance(train, RecordDataset)
    for arm in arms:
        assert train is not None
        denoising = arm.denoising or config.denoising
        check_training_text(train, components, denoising, truncate=truncate)
    supervised = [arm.denoising or config.denoising for arm in arms if not arm.distillation]
    for count in {denoising.region_images for denoising in supervised if denoising.reads_regions}:
        assert train is not None
        if not any(train[i].regions for i in range(len(train) if count is None else min(len(train), count))):
            raise UserError(
                "denoising.region_*_weight needs training images with regions of findings: set data.box_column or "
                "data.mask_column, and look at denoising.region_images"
            )
    by_words = config.evaluation.localization_text == "caption" and config.evaluation.protocol == "ours"
    if isinstance(test, RecordDataset) and by_words:
        test.check_queries()
    run = Run(config, folder, accelerator, train, test, console, {}, base, validation=validation)
    features = load_features(config.evaluation.features, phantom_data=config.data.kind == "phantom")
    sizes = f"{len(train):,} training and {len(test):,} held-out images" if train else f"{len(test):,} held-out images"
    total = parameter_counts(components.unet)[0] + sum(parameter_counts(t)[0] for t in components.text_encoders)
    run.say(
        f"{base.name}: {total / 1e6:,.1f} M parameters in U-Net and text encoder; {sizes} at "
        f"{config.data.resolution} px; {accelerator.num_processes} process(es) on {accelerator.device.type}"
    )
    if not config.dry_run:
        components.to(accelerator.device)
        run.against = held_out(test, components, config.evaluation, features, accelerator=accelerator, run_dir=folder)
        # Last, so that a configuration that is refused does not claim the folder.
        if accelerator.is_main_process:
            (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        accelerator.wait_for_everyone()
    run.seconds["checks and real images"] = time.perf_counter() - began
    return run


def load_validation(config: Any, arms: list[Arm]) -> PhantomDataset | RecordDataset | None:
    """The validation images, where a gate or localize_every_steps asks for them. Raises UserError if they cannot serve."""
    gate = any(is_gated(arm) for arm in arms)
    if not arms or not (gate or config.trainer.localize_every_steps):
        return None
    asks = "distillation's gate" if gate else "trainer.localize_every_steps"
    if config.data.kind == "phantom" and config.data.validation_size == 0:
        raise UserError(f"data.validation_size is 0, and {asks} looks at validation images; give at least 1")
    validation = load_dataset(config.data, "validation")
    if not any(validation.findings) or not any(validation[i].regions for i in range(len(validation))):
        raise UserError(
            f"{asks} needs validation images with regions of findings: set data.box_column or data.mask_column"
        )
    return validation


def quiet_libraries() -> None:
    """Only errors of diffusers and transformers: their notes on every load and every long caption hide our own."""
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def claim(folder: Path, config: Any) -> None:
    """Refuse a folder that holds a run with another configuration."""
    path = folder / "config.yaml"
    if path.exists() and path.read_text(encoding="utf-8") != to_yaml(config):
        old, new = path.read_text(encoding="utf-8").splitlines(), to_yaml(config).splitlines()
        first = next(
            (f"{a.strip()!r} there, {b.strip()!r} now" for a, b in zip(old, new, strict=False) if a != b), "length"
        )
        raise UserError(
            f"{folder} holds a run with another configuration ({first}); choose another --output_dir, or delete the folder"
        )


def trains_teacher(config: Any, arm: Arm) -> bool:
    """Whether the arm's teacher is a comparison's own frozen arm, which may not be there yet."""
    own = str(Path(config.output_dir) / "frozen")
    return isinstance(config, TradeoffConfig) and arm.distillation is not None and arm.distillation.teacher == own


def load_teacher(base: BaseConfig, teacher: str) -> Components:
    """A run folder on the base, the base itself by its name, a pipeline folder, or a hub id."""
    if teacher == base.name:
        return load_components(base)
    folder = Path(teacher)
    if folder.is_dir() and not (folder / "model_index.json").exists():
        return load_components(base, run=folder)
    return load_components(replace(base, name=teacher, revision=None))


def check_untrained(student: Components, base: Components, arm: Arm) -> None:
    """UserError if a student that starts from its teacher has other weights than the base in a part that is not exported
    in full: base and run folder would not give the trained model."""
    if student.prediction_type != base.prediction_type:
        raise UserError(
            f"distillation.start_from_teacher: the teacher predicts {student.prediction_type}, and the base "
            f"{base.prediction_type}; give the teacher, saved as a pipeline, as base.name"
        )
    parts = [("VAE", "frozen", student.vae, base.vae), ("U-Net", arm.method, student.unet, base.unet)]
    encoders = zip(student.text_encoders, base.text_encoders, strict=True)
    parts += [("text encoder", arm.text_encoder, ours, theirs) for ours, theirs in encoders]
    for name, method, ours, theirs in parts:
        if method == "full":
            continue
        found = {k.replace(".base_layer", ""): v for k, v in ours.state_dict().items() if ".lora_" not in k}
        wanted = theirs.state_dict()
        if found.keys() != wanted.keys() or not all(torch.equal(v, wanted[k]) for k, v in found.items()):
            raise UserError(
                f"distillation.start_from_teacher: the teacher's {name} is not the base's, and {arm.name} does not train it in "
                "full, so that its export would lack it; give the teacher, saved as a pipeline, as base.name"
            )


def train_arm(run: Run, arm: Arm) -> dict[str, Any]:
    """Train, export to arm.folder, and prove that the files give the trained model's outputs; returns `cost`.

    The losses are in distill/objectives.py: DenoisingObjective, and AttentionDistillationObjective for a distilled arm.
    """
    config, accelerator = run.config, run.accelerator
    done = arm.folder / "cost.json"
    if done.exists():
        run.say(f"{arm.name}: already trained, {arm.folder}; delete the folder to train again")
        return cast(dict[str, Any], read_json(done))
    taught = f", teacher {arm.distillation.teacher}" if arm.distillation else ""
    run.say(f"{arm.name}: U-Net {arm.method}, text encoder {arm.text_encoder}{taught}")
    log_dir = run.folder / arm.name
    components, result, besides = _fit(run, arm, arm.max_steps or config.trainer.max_steps, log_dir)
    cost = {
        "train_seconds": result.seconds + besides,
        "steps": result.steps,
        "peak_memory_gb": result.peak_memory_gb,
        "trainable_parameters": result.trainable_parameters,
    }
    if accelerator.is_main_process:
        written = export(components, arm.folder)
        loaded = load_components(run.base, run=arm.folder)
        difference = prove_parity(components, loaded, accelerator.device)
        run.say(
            f"{arm.name}: exported {', '.join(written.values())} to {arm.folder}; loaded back, difference {difference:.1e}"
        )
        done.write_text(json.dumps(cost), encoding="utf-8")
        shutil.rmtree(log_dir / "state", ignore_errors=True)
    accelerator.wait_for_everyone()
    return cost


def _fit(run: Run, arm: Arm, steps: int, log_dir: Path) -> tuple[Components, FitResult, float]:
    """The trained model, what its steps cost, and the seconds of what belongs to the training besides them."""
    config, accelerator = run.config, run.accelerator
    trainer = replace(config.trainer, max_steps=steps)
    lora = arm.lora or config.lora
    if config.dry_run:
        # One step needs few images; the caches would encode them all.
        trainer = replace(trainer, cache_latents=False, cache_text_embeddings=False)
    set_seed(config.seed)  # the same fresh adapters on every process
    distillation = arm.distillation
    teacher = distillation.teacher if distillation else None
    if distillation and distillation.start_from_teacher:
        assert teacher is not None
        components = load_teacher(config.base, teacher)
        adapted = any("lora_" in name for name, _ in components.unet.named_parameters())
        if adapted and arm.method != "lora":
            raise UserError(
                f"distillation.start_from_teacher: {teacher} is an adapter, and {arm.name} trains full weights; fuse it into "
                "a pipeline (pipe.fuse_lora, pipe.unload_lora_weights, pipe.save_pretrained) and give that"
            )
        check_untrained(components, load_components(run.base), arm)
    else:
        components = load_components(run.base)
    prepare_training(
        components,
        method=arm.method,
        text_encoder=arm.text_encoder,
        lora=lora,
        frozen_dtype=config.base.frozen_dtype,
        gradient_checkpointing=trainer.gradient_checkpointing,
    )
    lock = lock_keys(components, DTYPES[config.base.frozen_dtype]) if arm.lock_keys else None
    components.to(accelerator.device)
    denoising = arm.denoising or config.denoising
    label_tokens = distillation.words == "labels" if distillation else denoising.arm_weight > 0
    regions = denoising.reads_regions and not distillation
    rows = training_rows(run, components, trainer, denoising, label_tokens=label_tokens, regions=regions)
    besides = 0.0
    with ExitStack() as stack:
        if distillation:
            if teacher is None:
                raise UserError("distillation.teacher is missing: a run folder, a pipeline folder or a hub id")
            if teacher == FROZEN_TEXT_ENCODER:
                encoders = [
                    encoder.to(accelerator.device) for encoder in load_components(run.base).freeze().text_encoders
                ]
                frozen = replace(components, text_encoders=encoders)
            elif teacher == EMA:
                encoders = [copy.deepcopy(encoder) for encoder in components.text_encoders]
                frozen = replace(components, unet=copy.deepcopy(components.unet), text_encoders=encoders)
            else:
                frozen = load_teacher(config.base, teacher)
                prepare_training(
                    frozen,
                    method="frozen",
                    text_encoder="frozen",
                    lora=lora,
                    frozen_dtype=config.base.frozen_dtype,
                )
                frozen.to(accelerator.device)
                if distillation.gate_reference is not None and not config.dry_run:
                    layers = attention_layers(components.unet, distillation.layers)
                    began = time.perf_counter()
                    distillation = _gated(run, frozen, distillation, layers, log_dir)
                    besides += time.perf_counter() - began
            student_maps = stack.enter_context(
                record_attention(components.unet, distillation.layers, text_gradient=distillation.text_gradient)
            )
            teacher_maps = student_maps
            if frozen.unet is not components.unet:
                name_there = name_in_teacher(components.unet.config, frozen.unet.config)
                layers = [name_there(name) for name in attention_layers(components.unet, distillation.layers)]
                teacher_maps = stack.enter_context(record_attention(frozen.unet, layers))
            shared = (components, denoising, distillation, frozen, student_maps, teacher_maps)
            objective: DenoisingObjective
            if arm.consistency:
                objective = ConsistencyObjective(*shared, arm.consistency)
            else:
                objective = AttentionDistillationObjective(*shared)
        elif denoising.reads_attention:
            maps = stack.enter_context(record_attention(components.unet))
            objective = SupervisedAttentionObjective(components, denoising, maps)
            if denoising.tail_weight:
                began = time.perf_counter()
                objective.measure_tail(_first_batches(run, rows, trainer), generator_at(config.seed, 0, 0))
                besides += time.perf_counter() - began
        else:
            objective = DenoisingObjective(components, denoising)
        groups = [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": rate}
            for module, rate in (
                (objective.unet, arm.learning_rate),
                (objective.text_encoders, arm.text_encoder_learning_rate),
            )
        ]
        result = fit(
            objective,
            rows,
            trainer,
            accelerator=accelerator,
            output_dir=log_dir,
            seed=config.seed,
            parameter_groups=[group for group in groups if group["params"]],
            on_sample=lambda step: _sample(run, arm, components, log_dir / "progress" / f"step-{step:06d}.png"),
            on_localize=lambda step: _localize(run, components, log_dir, step),
            label=arm.name,
        )
    if lock is not None and config.dry_run:
        lock.release()
    elif lock is not None:
        besides += _merge(run, arm, lock, denoising, log_dir)
    return components, result, besides


def _first_batches(run: Run, rows: TrainingRows, trainer: TrainerConfig) -> Iterator[dict[str, Any]]:
    """About TAIL_IMAGES training images in batches, the same on every process."""
    size = trainer.batch_size
    count = 1 if run.config.dry_run else -(-TAIL_IMAGES // size)
    sampler = StepSampler(len(rows), size, run.config.seed, 0, 1, 0, count)
    device, main = run.accelerator.device, run.accelerator.is_main_process
    for batch in tqdm(
        DataLoader(rows, batch_sampler=sampler), desc="tail before training", unit="batch", disable=not main
    ):
        yield {key: value.to(device) for key, value in batch.items()}


def _merge(run: Run, arm: Arm, lock: KeyLock, denoising: DenoisingConfig, log_dir: Path) -> float:
    """The keys are the trained text encoder's again; key_lock.json says how well that goes. Returns the seconds."""
    assert run.train is not None
    started = time.perf_counter()
    # From the whole data set, which may be sorted.
    rows = sorted({round(i * (len(run.train) - 1) / (MERGE_CAPTIONS - 1)) for i in range(MERGE_CAPTIONS)})
    captions = [training_caption(run.train, i, denoising) for i in rows]
    rank = (arm.lora or run.config.lora).rank if arm.method == "lora" else None
    main = run.accelerator.is_main_process
    merged = merge_keys(lock, captions, rank=rank, progress=main)
    seconds = time.perf_counter() - started
    if main:
        write_json(log_dir / "key_lock.json", asdict(merged) | {"seconds": seconds})
    fits = ", ".join(
        f"{name} {value:.2f} (without {merged.r2_unmerged[name]:.2f})" for name, value in merged.r2.items()
    )
    run.say(f"{arm.name}: keys merged into the trained text encoder's; R^2 of {fits}; {log_dir / 'key_lock.json'}")
    worse = [name for name, value in merged.r2.items() if value < merged.r2_unmerged[name]]
    if worse:
        run.say(
            f"warning: {arm.name}: for {', '.join(worse)} the merge is worse than none; compare the maps, or train shorter"
        )
    return seconds


def _gated(
    run: Run, teacher: Components, distillation: AttentionDistillationConfig, layers: Sequence[str], log_dir: Path
) -> AttentionDistillationConfig:
    """What passes the gate; gate.json says by which numbers."""
    config, name = run.config, distillation.gate_reference
    assert run.validation is not None
    reference = load_components(config.base, run=None if name == "base" else name)
    started = time.perf_counter()
    taught = choose_taught(
        teacher,
        reference,
        run.validation,
        config.evaluation,
        images=distillation.gate_images,
        layers=layers,
        accelerator=run.accelerator,
    )
    if run.accelerator.is_main_process:
        write_json(log_dir / "gate.json", asdict(taught) | {"seconds": time.perf_counter() - started})
    run.say(
        f"gate: {len(taught.layers)} of {len(layers)} layers and the maps of {', '.join(taught.groups)} are taught, at "
        f"timesteps {taught.timesteps[0]} to {taught.timesteps[1]}; {log_dir / 'gate.json'}"
    )
    return taught.narrow(distillation)


def training_rows(
    run: Run,
    components: Components,
    trainer: TrainerConfig,
    denoising: DenoisingConfig,
    *,
    label_tokens: bool,
    regions: bool,
) -> TrainingRows:
    """Rows of the training split, with the caches that the configuration asks for."""
    config, accelerator = run.config, run.accelerator
    assert run.train is not None
    folder = Path(config.data.cache_dir or "checkpoints/.cache")
    latents = text = None
    with accelerator.main_process_first():
        if trainer.cache_latents:
            latents = cache_latents(
                run.train,
                components.vae,
                folder,
                batch_size=min(trainer.batch_size, 32),
                flip=config.data.horizontal_flip,
                device=accelerator.device,
                num_workers=trainer.num_workers,
            )
        if trainer.cache_text_embeddings:

            def encode(captions: list[str]) -> torch.Tensor | tuple[torch.Tensor, ...]:
                ids = [x.to(accelerator.device) for x in components.tokenize(captions)]
                embeds, pooled = encode_text(components.text_encoders, ids)
                return embeds if pooled is None else (embeds, pooled)

            captions = [training_caption(run.train, i, denoising) for i in range(len(run.train))]
            hashes = [model_fingerprint(encoder) for encoder in components.text_encoders]
            hashes += [str(ids.tolist()) for ids in components.tokenize(captions[:8])]
            text = cache_text_embeddings(captions, encode, folder, "-".join(hashes), trainer.batch_size)
    return TrainingRows(
        run.train,
        components,
        latents=latents,
        text=text,
        drop_only_label=denoising.caption_dropout_label,
        flip=config.data.horizontal_flip,
        denoising=denoising,
        label_tokens=label_tokens,
        regions=regions,
    )


@torch.no_grad()
def _sample(run: Run, arm: Arm, components: Components, path: Path) -> None:
    """A strip of images of held-out captions, to watch a training."""
    if run.against is None or not run.accelerator.is_main_process:
        return
    examples = run.against.examples[:4]
    captions = [run.test.caption(i) for i in examples]
    frozen, evaluation = DTYPES[run.config.base.frozen_dtype], arm.evaluation or run.config.evaluation
    # Trained and frozen weights may differ in type, and the stock pipeline expects one.
    with torch.autocast(run.accelerator.device.type, frozen, enabled=frozen != torch.float32):
        images = generate(
            components,
            captions,
            [evaluation.seed + i for i in examples],
            run.config.data.resolution,
            evaluation,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(torch.cat(list(images), dim=-1), path)


@torch.no_grad()
def _localize(run: Run, components: Components, log_dir: Path, step: int) -> None:
    """A line of localization_log.jsonl: AUC, CNR and mass of the token groups on validation images, in this step's state."""
    config = run.config
    assert run.validation is not None
    few = replace(config.evaluation, localization_images=config.trainer.localize_images, bootstrap_samples=1)
    frozen = DTYPES[config.base.frozen_dtype]
    with (
        tempfile.TemporaryDirectory() as scratch,
        torch.autocast(run.accelerator.device.type, frozen, enabled=frozen != torch.float32),
    ):
        found = localization(
            components, run.validation, few, accelerator=run.accelerator, arm_dir=Path(scratch), label=f"step {step}"
        )
    if found is None or not run.accelerator.is_main_process:
        return
    row: dict[str, Any] = {"step": step, "images": found["word"]["images"], "pairs": found["word"]["pairs"]}
    row |= {token: {key: found[token][key] for key in ("auc", "cnr", "top1")} for token in ("word", "eos", "padding")}
    path = log_dir / "localization_log.jsonl"
    # Not those of a run that was killed after this step and continues from a checkpoint before it.
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in lines if json.loads(line)["step"] < step] + [json.dumps(row | {"mass": found["mass"]})]
    write_atomic(path, "\n".join(lines) + "\n")


def evaluate_arm(
    run: Run,
    name: str,
    folder: Path | None,
    cost: dict[str, Any] | None = None,
    arm: Arm | None = None,
    *,
    base: BaseConfig | None = None,
    evaluation: EvaluationConfig | None = None,
) -> dict[str, Any]:
    """Load base and run folder as a user would, evaluate, and write <run>/<arm>/metrics.json; returns its entry.

    base: what `folder` is of, where it is not what the arms are trained from. evaluation: in place of the run's or arm's.
    cost, arm: of what this run has trained; its metrics.json then has the settings of its training, and it gets a model card.
    """
    assert run.against is not None
    config = run.config
    path = run.folder / name / "metrics.json"
    if path.exists():
        run.say(f"{name}: already evaluated, {path}")
        return cast(dict[str, Any], read_json(path)["arms"][name])
    components = load_components(base or run.base, run=folder)
    result = evaluate(
        components,
        run.against,
        evaluation or (arm and arm.evaluation) or config.evaluation,
        resolution=config.data.resolution,
        accelerator=run.accelerator,
        arm_dir=run.folder / name,
        label=name,
    )
    seconds = result.pop("seconds")
    empty = {"train_seconds": None, "steps": None, "peak_memory_gb": peak_memory_gb(), "trainable_parameters": None}
    entry = result | {"cost": (cost or empty) | seconds}
    if run.accelerator.is_main_process:
        settings = settings_of(config, arm) if arm else None
        written = {"arms": {name: entry}, "provenance": provenance()}
        write_json(path, written | ({"settings": settings} if settings else {}))
        if folder is not None and cost is not None:
            found = {part: part for part in ("unet", "text_encoder", "text_encoder_2") if (folder / part).is_dir()}
            if (folder / LORA_FILE).exists():
                found["lora"] = LORA_FILE
            write_model_card(
                folder, entry, settings or asdict(config), provenance(), base_name=run.base.name, export=found
            )
    run.accelerator.wait_for_everyone()
    return entry


def finish(run: Run, arms: dict[str, dict[str, Any]], next_command: str) -> None:
    """metrics.json of all arms, the report, the table in the terminal, paths, and the next command."""
    assert run.against is not None
    if not run.accelerator.is_main_process:
        return
    config = run.config
    for name, entry in arms.items():
        if entry["cost"]["train_seconds"] is not None:
            run.seconds[f"{name}: training"] = entry["cost"]["train_seconds"]
        run.seconds[f"{name}: evaluation"] = entry["cost"]["evaluation_seconds"]
    counts = {
        "training_images": len(run.train) if run.train is not None else None,
        "held_out_images": len(run.test),
        "localization_images": max(
            (e["localization"]["word"]["images"] for e in arms.values() if e["localization"]), default=0
        ),
        "generated_images": min(config.evaluation.generated_images, len(run.test)),
        "bootstrap_samples": config.evaluation.bootstrap_samples,
    }
    seeds = {"training": getattr(config, "seed", None), "evaluation": config.evaluation.seed, "data": config.data.seed}
    origin = provenance() | {
        "seeds": seeds,
        "counts": counts,
        "seconds": {k: round(v, 1) for k, v in run.seconds.items()},
        "peak_memory_gb": round(peak_memory_gb(), 3),
        "processes": run.accelerator.num_processes,
        "config": asdict(config),
    }
    metrics = {"arms": arms, "real": {"quality": run.against.quality}, "provenance": origin}
    validate_metrics(metrics)
    write_json(run.folder / "metrics.json", metrics)
    html, markdown = write_report(run.folder)
    run.console.print(terminal_table(metrics))
    for name in (name for name, entry in arms.items() if entry["cost"]["train_seconds"] is not None):
        exported = [p for p in (run.folder / name, run.folder) if (p / "cost.json").exists()]
        if exported:
            run.say(f"{name}: {exported[0]}")
    run.say(f"report: {html}\n        {markdown}\nnumbers: {run.folder / 'metrics.json'}\nnext: {next_command}")


def dry_run(run: Run, arms: list[Arm]) -> None:
    """Resolved configuration, parameter counts, and estimates from one real step of each arm. Writes nothing that stays."""
    run.say(to_yaml(run.config))
    for arm in arms:
        steps = arm.max_steps or run.config.trainer.max_steps
        with tempfile.TemporaryDirectory() as scratch:
            # A teacher that this run would train is as large as the base, so the base stands in for it.
            if arm.distillation and trains_teacher(run.config, arm):
                arm = replace(arm, distillation=replace(arm.distillation, teacher=_pipeline_name(run.config.base)))
            components, one, _ = _fit(run, arm, 1, Path(scratch))
        _, trainable = parameter_counts(components.unet)
        trainable_text = sum(parameter_counts(encoder)[1] for encoder in components.text_encoders)
        run.say(
            f"{arm.name}: U-Net {parameter_counts(components.unet)[0]:,} parameters ({trainable:,} trainable), text encoder "
            f"{sum(parameter_counts(e)[0] for e in components.text_encoders):,} ({trainable_text:,} trainable); one step "
            f"{one.seconds:.2f} s, so {steps:,} steps take about {one.seconds * steps / 60:.1f} min; "
            f"peak memory {one.peak_memory_gb:.2f} GB"
        )
    run.say("dry run: the data and the base are fine; nothing was written")


def dry_run_evaluation(run: Run) -> None:
    """Resolved configuration, and estimates from one batch of maps and one of images. Writes nothing that stays."""
    config, accelerator = run.config, run.accelerator
    run.say(to_yaml(config))
    c = config.evaluation
    few = replace(c, localization_images=c.batch_size, generated_images=c.batch_size, diversity_samples=0, examples=1)
    components = load_components(config.base, config.run).to(accelerator.device).freeze()
    if c.quantization != "none":
        quantize(components, c.quantization)
    with tempfile.TemporaryDirectory() as scratch:
        against = held_out(run.test, components, few, None, accelerator=accelerator, run_dir=Path(scratch))
        shared: dict[str, Any] = {"accelerator": accelerator, "arm_dir": Path(scratch), "label": "dry run"}
        began = time.perf_counter()
        localization(components, run.test, few, **shared)
        maps = (time.perf_counter() - began) / min(c.batch_size, len(run.test))
        began = time.perf_counter()
        quality(
            components, run.test, few, resolution=config.data.resolution, features=None, real=against.real, **shared
        )
        images = (time.perf_counter() - began) / min(c.batch_size, len(run.test))
    count = min(c.generated_images, len(run.test)) + c.diversity_captions * c.diversity_samples
    total = maps * min(c.localization_images, len(run.test)) + images * count
    unet, text = parameter_counts(components.unet)[0], sum(parameter_counts(e)[0] for e in components.text_encoders)
    run.say(
        f"U-Net {unet:,} parameters, text encoder {text:,}, none trainable; maps {maps:.2f} s an image, generation "
        f"{images:.2f} s an image, so about {total / 60:.1f} min a model; peak memory {peak_memory_gb():.2f} GB\n"
        "dry run: the data and the base are fine; nothing was written"
    )


def _pipeline_name(base: BaseConfig) -> str:
    return str(PHANTOM_BASE) if base.name == "phantom" else base.name


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(partial, path)

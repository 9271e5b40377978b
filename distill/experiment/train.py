"""Train an arm, export it, and prove that the files give the trained model."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from distill import checkpoints
from distill.cli import to_yaml
from distill.data.batch import Batch
from distill.data.cache import cache_latents, cache_text_embeddings, model_fingerprint, weights_fingerprint
from distill.data.remembered import Remembered
from distill.data.rows import TrainingRows, row_fingerprints, training_caption
from distill.data.sample import hash_of, region_fingerprint
from distill.devices import loader_processes
from distill.draws import generator_at
from distill.errors import UserError
from distill.evaluation.cells import compute_cells
from distill.evaluation.drawing import generate
from distill.evaluation.evaluate import OF_NO_NUMBER
from distill.evaluation.images import save_png
from distill.evaluation.kept import features_key
from distill.evaluation.results import Kept
from distill.evaluation.validation import LOG, SCORES, Looks, write_look
from distill.experiment.arms import BASE, Arm
from distill.experiment.cost import ForwardPasses, training_passes, with_teachers
from distill.experiment.folder import scratch_folder
from distill.experiment.gate_looks import GateLooks, Look
from distill.experiment.lengths import has_gone_on, length_fault
from distill.experiment.run import Run
from distill.files import JsonObject, read_json, write_atomic, write_json
from distill.memory import reset_peak_memory
from distill.methods import method_of
from distill.methods.base import Context
from distill.models import Model, load_model
from distill.models.adapters import DTYPES, parameter_counts, prepare_training
from distill.models.export import export, prove_parity
from distill.trainer import Chances, FitResult, StepSampler, fit

_NOT_OF_LOOKS = (
    *OF_NO_NUMBER, "localization_images", "generated_images", "diversity_captions", "diversity_samples", "bootstrap_samples",
    "examples", "neighbours", "features", "quantization", "dtype",
)  # fmt: skip
"""Options of evaluation that change no look. The extractor of features itself counts, and not its name."""


def train_arm(run: Run, arm: Arm) -> JsonObject:
    """Train, export to arm.folder, and prove that the files give the trained model's outputs; returns `cost`.

    The loss is in the file of the arm's method, in distill/methods/.
    """
    done, log_dir = arm.folder / "cost.json", run.folder / arm.name
    earlier = _cost_of(run, arm.name, done)
    if earlier is not None and not _is_longer(run, arm, int(earlier["steps"]), log_dir):
        run.say(f"{arm.name}: already trained, {arm.folder}; to train longer, raise max_steps")
        _tell_of_other_data(run, arm, earlier)
        if run.accelerator.is_main_process:  # a kill may have come before the last launch did this
            checkpoints.keep_only(log_dir / "state", int(earlier["steps"]))
        return earlier
    training = arm.training
    names = "".join(f", {name}" for name in training.method.references)
    run.say(
        f"{arm.name}: {training.method.kind}{names}; denoiser {training.denoiser}, text encoder {training.text_encoder}"
    )
    with restored(run):
        model, result, besides, passes = fit_arm(run, arm, log_dir)
    assert run.train is not None
    cost = {
        "train_seconds": result.seconds + besides,
        "steps": result.steps,
        "image_passes": passes,
        "image_passes_with_teachers": with_teachers(run, arm, passes),
        "peak_memory_gb": result.peak_memory_gb,
        "trainable_parameters": result.trainable_parameters,
        "training_images": len(run.train),
        "training_data": _training_data(run, arm),
    }
    cost |= _kept(run, arm, result) | _drawn(run)
    if run.accelerator.is_main_process:
        (arm.folder / "README.md").unlink(missing_ok=True)  # the card of other weights
        written = export(model, arm.folder)
        loaded = load_model(run.base, run=arm.folder)
        difference = prove_parity(model, loaded, run.accelerator.device)
        run.say(
            f"{arm.name}: exported {', '.join(written.values())} to {arm.folder}; loaded back, difference "
            f"{difference:.1e}"
        )
        write_json(done, cost)
        checkpoints.keep_only(log_dir / "state", result.steps)
    run.accelerator.wait_for_everyone()
    return cost


def _kept(run: Run, arm: Arm, result: FitResult) -> JsonObject:
    """Which weights are exported, where they are not meant to be the last."""
    if arm.keep == "last":
        return {}
    if result.best is None:
        run.say(f"{arm.name}: no look has a value for keep {arm.keep}; the weights after the last step are exported")
        return {}
    score = result.best.score
    kept = Kept(result.best.step, arm.keep, -score if arm.keep == "loss" else score)
    run.say(f"{arm.name}: {kept}")
    return {"kept": asdict(kept)}


def _drawn(run: Run) -> JsonObject:
    """How often training images of each finding were drawn, where not alike."""
    if run.balance is None:
        return {}
    return {"drawn": {name: {"before": a, "after": b} for name, (a, b) in run.balance.shares.items()}}


def _training_data(run: Run, arm: Arm) -> dict[str, str]:
    """Hashes of the training rows of an arm, for cost.json and the checkpoints; made once a run."""
    if arm.name not in run.data_hashes:
        assert run.train is not None
        training, method = arm.training, arm.training.method
        run.data_hashes[arm.name] = row_fingerprints(
            run.train,
            training.denoising,
            label_tokens=method.reads_labels or run.balance is not None,
            regions=method.reads_regions,
        )
    return run.data_hashes[arm.name]


def _tell_of_other_data(run: Run, arm: Arm, cost: Mapping[str, object]) -> None:
    """Say so if the training rows are no longer those that a trained arm has seen."""
    assert run.train is not None
    then = cost.get("training_data")
    if isinstance(then, dict) and then != _training_data(run, arm):  # earlier versions wrote one hash of another kind
        run.say(
            f"{arm.name}: it was trained on other data, {cost['training_images']:,} images; there are "
            f"{len(run.train):,} now. It stays as it is; to train on these, choose another --output_dir"
        )


def _cost_of(run: Run, name: str, path: Path) -> JsonObject | None:
    """What an earlier training took; None where there was none, or its file is damaged."""
    if not path.exists():
        return None
    if path.is_dir():  # found now, and not when the training has ended
        raise UserError(f"{path} is a folder, and a file is to be written there; remove it")
    try:
        cost = read_json(path)
        if not all(isinstance(cost[key], (int, float)) for key in ("steps", "train_seconds")):
            raise UserError(f"{path}: steps and train_seconds must be numbers")
    except (UserError, KeyError, TypeError) as error:
        run.say(f"{name}: trained again, because {path} cannot be used: {error}")
        return None
    return cast(JsonObject, cost)


def _is_longer(run: Run, arm: Arm, steps: int, log_dir: Path) -> bool:
    """Whether a finished arm is to be trained further, than `steps`. Raises UserError where it cannot."""
    if fault := length_fault(run.arms, arm, steps, log_dir / "state"):
        raise UserError(f"{arm.name}: {fault}")
    if arm.trainer.max_steps == steps:
        return False
    run.say(f"{arm.name}: trained for {steps} steps; goes on to {arm.trainer.max_steps}")
    return True


@contextmanager
def restored(run: Run) -> Iterator[None]:
    """Give config.yaml back as it was where a training that ended cannot go on, so that the command before works."""
    try:
        yield
    except UserError:
        before, main = run.former_config, run.accelerator.is_main_process
        if before is not None and main and not any(has_gone_on(arm, run.folder) for arm in run.arms.values()):
            write_atomic(run.folder / "config.yaml", before)
        raise


def fit_arm(run: Run, arm: Arm, log_dir: Path) -> tuple[Model, FitResult, float, int]:
    """The trained model, what its steps cost, the seconds of set-up and finish, and the image-passes of all."""
    trainer, dry = arm.trainer, run.config.dry_run
    if dry:
        # One step needs few images; the caches would encode them all.
        few = {"max_steps": 1, "warmup_steps": 0, "cache_latents": False, "cache_text_embeddings": False}
        trainer = trainer.model_copy(update=few | {"keep_last_state_gb": 0.0})
    reset_peak_memory()
    set_seed(run.seed)  # the same fresh adapters on every process
    hashes: dict[str, str] = {}
    model = _student(run, arm, hashes)
    model.to(run.accelerator.device)
    before = ForwardPasses()
    before.watch(model)
    method = method_of(arm.training.method, arm.training.denoising)
    rows = training_rows(run, arm, model, cached=not dry)
    began = time.perf_counter()
    method.setup(model, _context(run, arm, rows, log_dir, before, hashes))
    passes = before.stop() + training_passes(method, trainer, run.accelerator.num_processes)
    if not dry:
        hashes |= _training_data(run, arm) | _validation_fingerprint(run, arm)
    besides = time.perf_counter() - began
    looks = _Validation(run, arm, log_dir) if trainer.validate_every_steps and not dry else None
    text_rate = trainer.text_encoder_learning_rate or trainer.learning_rate
    result = fit(
        method,
        rows,
        trainer,
        accelerator=run.accelerator,
        output_dir=log_dir,
        seed=run.seed,
        collate=Batch.stack,
        parameter_groups=method.parameter_groups(trainer.learning_rate, text_rate, arm.training.text_encoder_steps),
        on_sample=lambda step: _sample(run, arm, model, log_dir / "progress" / f"step-{step:06d}.png"),
        on_validate=None if looks is None else partial(looks.look, model),
        keep_best=arm.keep != "last",
        label=arm.name,
        fingerprints=hashes,
        chances=_chances(run),
    )
    began = time.perf_counter()
    method.finish()
    return model, result, besides + time.perf_counter() - began, passes


def _chances(run: Run) -> Chances | None:
    return None if run.balance is None else run.balance.chances


def _weights_hash(run: Run, key: str, model: Model) -> str:
    """Hash of the weights and the noise schedule of a model that was just loaded; made once a run for each key."""
    if key not in run.weight_hashes:
        schedule = json.dumps(dict(model.noise_scheduler.config), sort_keys=True, default=str)
        run.weight_hashes[key] = hash_of([weights_fingerprint(model.modules()), schedule])
    return run.weight_hashes[key]


def _validation_fingerprint(run: Run, arm: Arm) -> dict[str, str]:
    """Of the validation images that the weights depend on, and of the options of looks where one of these is
    exported."""
    data, keeps = run.validation, arm.keep != "last"
    if data is None or not (arm.training.method.needs_validation or keeps):
        return {}
    of_row = (data.fingerprint, data.caption, lambda i: region_fingerprint(data, i))
    found = {"validation images": hash_of(part(i) for i in range(len(data)) for part in of_row)}
    if keeps:
        options = [part.model_dump_json(exclude={*_NOT_OF_LOOKS}) for part in (run.evaluation, arm.evaluation)]
        used = [*options, str(features_key(run.features)), str(arm.trainer.validate_every_steps), arm.keep]
        found["options of evaluation, or trainer.validate_every_steps,"] = hash_of(used)
    return found


def _student(run: Run, arm: Arm, hashes: dict[str, str]) -> Model:
    """The model that is trained, with the parameters chosen that train."""
    training, start = arm.training, arm.training.method.starts_from
    model = load_model(run.base) if start is None else run.load(start)
    # The base of a compressed student is another than the one that methods name so.
    key = run.base.model_dump_json() if start is None else start
    hashes[f"weights of {start or BASE}"] = _weights_hash(run, key, model)
    if start is not None:
        parts = [("denoiser", training.denoiser, model.denoiser)]
        parts += [("text_encoder", training.text_encoder, encoder) for encoder in model.text_encoders]
        for part, how, module in parts:
            if how != "lora" and any("lora_" in name for name, _ in module.named_parameters()):
                raise UserError(
                    f"{arm.name}: {start} has an adapter on its {part}, and this arm has {part} {how}; set it to lora, "
                    "or fuse the adapter into a pipeline (pipe.fuse_lora, pipe.unload_lora_weights, "
                    "pipe.save_pretrained) and give that"
                )
        check_untrained(model, load_model(run.base), arm)
    prepare_training(
        model,
        denoiser=training.denoiser,
        text_encoder=training.text_encoder,
        lora=training.lora,
        frozen_dtype=run.config.base.frozen_dtype,
        gradient_checkpointing=arm.trainer.gradient_checkpointing,
    )
    return model


def check_untrained(student: Model, base: Model, arm: Arm) -> None:
    """UserError if a student that starts from another model differs from the base in a part that is not exported in
    full: base and run folder would not give the trained model."""
    if student.prediction_type != base.prediction_type:
        raise UserError(
            f"{arm.name} starts from a model that predicts {student.prediction_type}, and the base predicts "
            f"{base.prediction_type}; give that model, saved as a pipeline, as base.name"
        )
    training = arm.training
    parts = [("VAE", "frozen", student.vae, base.vae), ("denoiser", training.denoiser, student.denoiser, base.denoiser)]
    encoders = zip(student.text_encoders, base.text_encoders, strict=True)
    parts += [("text encoder", training.text_encoder, ours, theirs) for ours, theirs in encoders]
    for name, trained, ours, theirs in parts:
        if trained == "full":
            continue
        found = {k.replace(".base_layer", ""): v for k, v in ours.state_dict().items() if ".lora_" not in k}
        wanted = theirs.state_dict()
        if found.keys() != wanted.keys() or not all(torch.equal(v, wanted[k]) for k, v in found.items()):
            raise UserError(
                f"{arm.name} starts from a model whose {name} is not the base's, and does not train it in full, so "
                "that its export would lack it; give that model, saved as a pipeline, as base.name"
            )


def training_rows(run: Run, arm: Arm, model: Model, *, cached: bool) -> TrainingRows:
    """Rows of the training split, with the caches that the configuration asks for."""
    config, train, training, trainer = run.config, run.train, arm.training, arm.trainer
    assert train is not None
    folder, flip = Path(config.data.cache_dir or "checkpoints/.cache"), getattr(config.data, "horizontal_flip", False)
    device = run.accelerator.device
    latents = text = None
    captions = [training_caption(train, i, training.denoising) for i in range(len(train))]
    with run.accelerator.main_process_first():
        if trainer.cache_latents and cached:
            latents = cache_latents(
                train,
                model.vae,
                folder,
                batch_size=min(trainer.batch_size, 32),
                flip=flip,
                device=device,
                num_workers=loader_processes(trainer.num_workers, device),
                captions=captions,
            )
        if trainer.cache_text_embeddings and cached:

            def encode(captions: list[str]) -> torch.Tensor | tuple[torch.Tensor, ...]:
                embeds, pooled = model.encode([x.to(device) for x in model.tokenize(captions)])
                return embeds if pooled is None else (embeds, pooled)

            hashes = [model_fingerprint(encoder) for encoder in model.text_encoders]
            hashes += [str(ids.tolist()) for ids in model.tokenize(captions[:8])]
            text = cache_text_embeddings(captions, encode, folder, "-".join(hashes), trainer.batch_size)
    return TrainingRows(
        train,
        model,
        training.denoising,
        latents=latents,
        text=text,
        flip=flip,
        label_tokens=training.method.reads_labels,
        regions=training.method.reads_regions,
        region_images=training.method.region_images,
    )


def _context(
    run: Run, arm: Arm, rows: TrainingRows, log_dir: Path, passes: ForwardPasses, hashes: dict[str, str]
) -> Context:
    """What the arm's method is handed at set-up. passes, hashes: get the passes and the hashes of the models that it
    loads."""
    dry = run.config.dry_run
    looks, of_model = GateLooks(log_dir, run.accelerator, passes), dict[int, str]()

    def load(name: str) -> Model:
        model = run.load(name)
        hashes[f"weights of {name}"] = of_model[id(model)] = _weights_hash(run, name, model)
        return passes.watch(model)

    def layer_scores(model: Model, images: int, timesteps: Sequence[int], label: str) -> Look:
        said = [of_model[id(model)], *_validation_fingerprint(run, arm).values(), run.config.data.model_dump_json()]
        said += [run.evaluation.model_dump_json(), run.config.base.frozen_dtype, str(images), str(timesteps)]
        return looks.get(label, hash_of(said), lambda: _layer_scores(run, model, images, timesteps, label))

    return Context(
        generator=generator_at(run.seed, 0, 0),
        device=run.accelerator.device,
        is_main=run.accelerator.is_main_process,
        log_dir=log_dir,
        frozen_dtype=DTYPES[run.config.base.frozen_dtype],
        dry_run=dry,
        load=load,
        batches=lambda images: _first_batches(run, rows, arm.trainer.batch_size, 1 if dry else images),
        captions=lambda count: _spread_captions(rows, count),
        layer_scores=None if dry or run.validation is None else layer_scores,
        say=lambda message: run.say(f"{arm.name}: {message}"),
    )


def _first_batches(run: Run, rows: TrainingRows, size: int, images: int) -> Iterator[Batch]:
    """About `images` training images in batches, the same on every process."""
    sampler = StepSampler(len(rows), size, run.seed, 0, 1, 0, -(-images // size), _chances(run))
    loader = DataLoader(rows, batch_sampler=sampler, collate_fn=Batch.stack)
    hidden = not run.accelerator.is_main_process
    for batch in tqdm(loader, desc="measuring before the training", unit="batch", disable=hidden):
        yield batch.to(run.accelerator.device)


def _spread_captions(rows: TrainingRows, count: int) -> list[str]:
    """Training texts from the whole data set, which may be sorted."""
    last = len(rows) - 1
    return [rows.caption(i) for i in sorted({round(i * last / (count - 1)) for i in range(count)})]


def _layer_scores(run: Run, model: Model, images: int, timesteps: Sequence[int], label: str) -> Look:
    """What images add to a model's maps, on validation images."""
    assert run.validation is not None
    few = run.evaluation.model_copy(update={"localization_images": images})
    model.to(run.accelerator.device)
    cells = compute_cells(model, run.validation, few, timesteps, accelerator=run.accelerator, label=label)
    scores = cells.mean("image_adds")
    assert scores is not None, "compute_cells has refused such images"
    return scores, cells.layers


@torch.no_grad()
def _sample(run: Run, arm: Arm, model: Model, path: Path) -> None:
    """A strip of images of held-out captions, to watch a training."""
    if run.config.dry_run or not run.accelerator.is_main_process:
        return
    examples = run.examples[:4]
    captions = [run.test.caption(i) for i in examples]
    frozen = DTYPES[run.config.base.frozen_dtype]
    seeds = [arm.evaluation.seed + i for i in examples]
    # Trained and frozen weights may differ in type, and the stock pipeline expects one.
    with torch.autocast(run.accelerator.device.type, frozen, enabled=frozen != torch.float32):
        images = generate(model, captions, seeds, run.config.data.resolution, arm.evaluation)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(torch.cat(list(images), dim=-1), path)


class _Validation:
    """Looks at validation images while an arm trains, as rows of validation_log.jsonl."""

    def __init__(self, run: Run, arm: Arm, log_dir: Path) -> None:
        assert run.validation is not None
        self.run, self.arm, self.path = run, arm, log_dir / LOG
        self.looks = Looks(
            Remembered(run.validation), run.evaluation, arm.evaluation, run.config.data.resolution, run.features,
            run.accelerator, log_dir / "look.partial",
        )  # fmt: skip

    def look(self, model: Model, step: int) -> float | None:
        """Write a row; returns how good the weights are, by the arm's rule."""
        frozen = DTYPES[self.run.config.base.frozen_dtype]
        with torch.autocast(self.run.accelerator.device.type, frozen, enabled=frozen != torch.float32):
            row = self.looks.look(model, step)
        if self.run.accelerator.is_main_process:
            write_look(self.path, row)
        return None if self.arm.keep == "last" else SCORES[self.arm.keep](row)


def dry_run(run: Run) -> None:
    """Resolved configuration, parameter counts, and estimates from one real step of each arm. Writes nothing that
    stays."""
    run.say(to_yaml(run.config))
    for arm in run.arms.values():
        with scratch_folder() as scratch:
            model, one, _, _ = fit_arm(run, arm, scratch)
        total, trainable = parameter_counts(model.denoiser)
        counts = [parameter_counts(encoder) for encoder in model.text_encoders]
        steps = arm.trainer.max_steps
        run.say(
            f"{arm.name}: denoiser {total:,} parameters ({trainable:,} trainable), text encoder "
            f"{sum(c[0] for c in counts):,} ({sum(c[1] for c in counts):,} trainable); one step {one.seconds:.2f} s, "
            f"so {steps:,} steps take about {one.seconds * steps / 60:.1f} min; peak memory {one.peak_memory_gb:.2f} GB"
        )
    run.say("dry run: the data and the base are fine; nothing was written")

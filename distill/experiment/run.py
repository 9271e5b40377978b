"""Open a run folder: the configuration, the base and the data are checked before anything is written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import diffusers
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import ValidationError
from rich.console import Console

from distill.attention import attention_layers
from distill.cli import to_yaml
from distill.config import NO_LABEL, BaseConfig, FullEvaluation, RunConfig
from distill.configuration.changes import changes
from distill.data.balance import Balance, balance_findings, shares_text
from distill.data.captions import has_label
from distill.data.loading import load_dataset, refuse_shared_pictures
from distill.data.readers.records import RecordDataset
from distill.data.readers.tables import VALIDATION_SPLITS
from distill.data.rows import check_training_text
from distill.data.sample import group_key, has_finding_twice, hash_of, region_list
from distill.data_config import DataConfig, FolderData, PhantomData
from distill.errors import UserError, raise_all
from distill.evaluation.drawing import evaluation_order
from distill.evaluation.evaluate import HeldOut, example_images, explained_rows, held_out
from distill.evaluation.explanation import check_groups
from distill.evaluation.fidelity import finding_labels, unknown_findings
from distill.evaluation.utility import Task
from distill.evaluation.validation import DRAWN
from distill.experiment.arms import BASE, Arm
from distill.experiment.lengths import check_lengths, steps_faults
from distill.files import code_version, read_json, write_atomic
from distill.memory import keep_freed_memory
from distill.methods import method_of
from distill.methods.attention_distillation import check_same_shape
from distill.metrics.features import Features, load_features
from distill.metrics.image_text import ImageText
from distill.models import Model, load_model
from distill.models.adapters import check_lora_targets, lora_targets, parameter_counts
from distill.models.loading import LORA_FILE, PHANTOM_BASE
from distill.models.single_file import is_adapter
from distill.processes import ignored_by_launch, thread_advice
from distill.settings import Settings
from distill.tokens import Tokenizers
from distill.trainer import make_accelerator

if TYPE_CHECKING:
    from distill.data.phantom.dataset import PhantomDataset


@dataclass
class Run:
    """An open run folder with its data, all checked.

    base: what the arms are trained from. evaluation: of every model, unless an arm has its own. references: further
    models that methods may name, such as the model that a smaller one is made of. data_hashes: of the training rows of
    each arm. weight_hashes: of the models that were loaded, by the name that they were asked for by.
    examples: held-out images that are shown. features: of quality. balance: how often training images are drawn, where
    that is not alike. make_against: draws or reads the real images of the evaluation.
    """

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    base: BaseConfig
    arms: Mapping[str, Arm]
    evaluation: FullEvaluation
    train: PhantomDataset | RecordDataset | None
    test: PhantomDataset | RecordDataset
    validation: PhantomDataset | RecordDataset | None = None
    references: Mapping[str, Callable[[], Model]] = field(default_factory=dict)
    compare_to: tuple[str, ...] = ()
    console: Console = field(default_factory=Console)
    seconds: dict[str, float] = field(default_factory=dict)
    data_hashes: dict[str, dict[str, str]] = field(default_factory=dict)
    weight_hashes: dict[str, str] = field(default_factory=dict)
    examples: Sequence[int] = ()
    features: Features | None = None
    balance: Balance | None = None
    make_against: Callable[[], HeldOut] | None = None
    former_config: str | None = None
    """config.yaml as this launch found it."""

    @cached_property
    def against(self) -> HeldOut:
        """What models are compared on. Made when it is first asked for, which all processes must do together."""
        assert self.make_against is not None
        began = time.perf_counter()
        made = self.make_against()
        self.seconds["real images"] = time.perf_counter() - began
        return made

    @property
    def seed(self) -> int:
        """The training seed."""
        return self.config.training_seed

    def say(self, message: str) -> None:
        if self.accelerator.is_main_process:
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def load(self, reference: str) -> Model:
        """A model by the name of an arm, `base`, one of `references`, a run folder, an adapter file, a pipeline folder,
        a whole checkpoint or a hub id."""
        if reference in self.references:
            return self.references[reference]()
        if reference in self.arms:
            # A dry run trains no teacher; the base, which is as large, stands in for it.
            return load_model(self.base, None if self.config.dry_run else self.arms[reference].folder)
        if reference in (BASE, self.config.base.name):
            return load_model(self.config.base)
        folder = Path(reference)
        if (folder.is_file() and is_adapter(folder)) or (
            folder.is_dir() and not (folder / "model_index.json").exists()
        ):
            return load_model(self.config.base, folder)
        base = self.config.base
        # A teacher has the shape of its student, so that the configs of the base are right for its file.
        own = str(PHANTOM_BASE) if base.name == "phantom" else None if Path(base.name).is_file() else base.name
        changed = {
            "name": reference,
            "revision": None,
            "variant": None,
            "single_file_config": base.single_file_config or own,
        }
        try:
            return load_model(base.model_copy(update=changed))
        except UserError as error:
            raise UserError(f"the model {reference}: {str(error).removeprefix('base.name: ')}") from error.__cause__


def open_run(
    config: RunConfig,
    arms: Mapping[str, Arm],
    *,
    evaluation: FullEvaluation | None = None,
    base: BaseConfig | None = None,
    run: str | None = None,
    references: Mapping[str, Callable[[], Model]] | None = None,
    compare_to: tuple[str, ...] = (),
) -> Run:
    """Check the configuration, the base and the data, and open or continue the run folder.

    base: what the arms are trained from, where it is not the configuration's. run: a run folder that is checked too.
    Raises UserError, before anything is written, with all faults of the data or the first of the rest.
    """
    quiet_libraries()
    keep_freed_memory()
    code_version()
    folder, began = Path(config.output_dir), time.perf_counter()
    if not config.dry_run:
        claim(folder, config)
        check_lengths(arms, folder)
    accelerator = _accelerator(config, folder)
    set_seed(config.training_seed)
    model = load_model(base or config.base, run)
    evaluation = evaluation or config.evaluation.full()
    raise_all("the configuration does not fit the base", _base_faults(config, evaluation, model, arms))
    with accelerator.main_process_first():
        test = load_dataset(config.data, "test")
        looks_for_copies = "memorization" in evaluation.parts
        train = load_dataset(config.data, "train") if arms or looks_for_copies else None
        # Also where images alone are measured: it decides whether maps that were measured before are still of this
        # data.
        prior, no_prior = (train, "") if train else _prior_images(config.data)
        validation = _load_validation(config, arms)
        refuse_shared_pictures(train or prior, test, validation)
    opened = Run(
        config, folder, accelerator, base or config.base, arms, evaluation, train, test, validation,
        references or {}, compare_to,
    )  # fmt: skip
    _check_references(opened, model)
    if run and looks_for_copies:
        _check_trained_on(opened, Path(run))
    _check_captions(opened, model)
    _check_data(opened, model)
    _balance(opened)
    _load_features(opened)
    image_text = ImageText(Path(evaluation.image_text_model)) if evaluation.image_text_model else None
    _check_keep(opened)
    _say_what_runs(opened, model, no_prior)
    opened.examples = example_images(test, model, evaluation, accelerator)
    _check_parts(opened)
    if not config.dry_run:
        tokens = Tokenizers(model.tokenizers, model.caption_chunks)  # not the model, whose weights would stay in memory
        opened.make_against = partial(
            held_out, test, tokens, evaluation, opened.features, accelerator=accelerator, run_dir=folder,
            training=prior, copied_from=train, image_text=image_text,
        )  # fmt: skip
        # Last, so that a configuration that is refused does not claim the folder.
        if accelerator.is_main_process:
            if (folder / "config.yaml").exists():
                opened.former_config = (folder / "config.yaml").read_text(encoding="utf-8")
            write_atomic(folder / "config.yaml", to_yaml(config))
        accelerator.wait_for_everyone()
    opened.seconds["checks"] = time.perf_counter() - began
    return opened


def _load_features(run: Run) -> None:
    """Set `run.features`, where a part asks for them."""
    if {"quality", "memorization"} & set(run.evaluation.parts):
        run.features = load_features(run.evaluation.features, phantom_data=isinstance(run.config.data, PhantomData))
        if unknown := unknown_findings(run.test, run.features):
            run.say(f"finding AUC leaves out {', '.join(unknown)}: the classifier has no class of that name")


def _check_parts(run: Run) -> None:
    """Raise UserError where the held-out images are too few for a part."""
    count, parts = run.evaluation.generated_images, run.evaluation.parts
    if "utility" in parts:
        Task.of(run.test, evaluation_order(run.test, run.examples, count))
    if "explanation" in parts:
        real, compared = explained_rows(run.test, run.examples, count)
        check_groups([group_key(run.test, row) for row in real], compared, [])


def _say_what_runs(run: Run, model: Model, no_prior: str) -> None:
    """no_prior: why the training split, which blind maps are made from, is not there."""
    total = parameter_counts(model.denoiser)[0] + sum(parameter_counts(t)[0] for t in model.text_encoders)
    held_out = f"{len(run.test):,} held-out images"
    sizes = f"{len(run.train):,} training and {held_out}" if run.train else held_out
    device, processes = run.accelerator.device.type, run.accelerator.num_processes
    run.say(
        f"{run.base.name}: {total / 1e6:,.1f} M parameters in denoiser and text encoder; {sizes} at "
        f"{run.config.data.resolution} px; {processes} process(es) on {device}"
    )
    if no_prior and "localization" in run.evaluation.parts:
        run.say(f"the mean training mask and the AUC within the prior are not measured: {no_prior}")
    threads = thread_advice(torch.get_num_threads(), processes)
    if threads and device == "cpu":
        run.say(threads)
    if trainer := run.config.trainer_options:
        for ignored in ignored_by_launch(trainer.mixed_precision, trainer.gradient_accumulation_steps):
            run.say(ignored)


def quiet_libraries() -> None:
    """Only errors of diffusers and transformers: their notes on every load and every long caption hide our own."""
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def claim(folder: Path, config: Settings) -> None:
    """Refuse a folder that holds a run with other options that its weights depend on, of another recipe, or of an
    earlier version. Options that may differ are declared beside themselves, see distill/settings.py."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    before = _read_config(type(config), path)
    refused = [str(change) for change in changes(before, config) if not change.is_allowed]
    raise_all(
        f"{folder} holds a run with other options; choose another --output_dir, or give those of {path}. To train "
        "longer, raise only max_steps. To train on from its weights on more images, load the model as its README.md "
        "shows, save it with save_pretrained, and give that folder as base.name, with a new --output_dir",
        refused,
    )


def _read_config(config_class: type[Settings], path: Path) -> Settings:
    """The configuration of a run folder, with defaults for keys that it lacks."""
    another = UserError(
        f"{path.parent} holds a run of an earlier version, or of another recipe; choose another --output_dir"
    )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return config_class.model_validate_json(json.dumps(content), strict=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; choose another --output_dir") from None
    except (ValidationError, yaml.YAMLError, TypeError, ValueError):
        raise another from None


def _accelerator(config: RunConfig, folder: Path) -> Accelerator:
    trainer = config.trainer_options
    if trainer is None:
        return Accelerator()
    # A tracker of a dry run would leave its files in the run folder.
    quiet = trainer.model_copy(update={"tracker": "none"}) if config.dry_run else trainer
    return make_accelerator(quiet, folder)


def _base_faults(config: RunConfig, evaluation: FullEvaluation, model: Model, arms: Mapping[str, Arm]) -> list[str]:
    """What of the configuration does not fit the base. Raises UserError for layers and adapter targets that are not
    there."""
    faults = []
    if config.data.resolution % model.vae_factor or config.data.resolution < 4 * model.vae_factor:
        faults.append(
            f"data.resolution is {config.data.resolution}; the VAE of {config.base.name} needs a "
            f"multiple of {model.vae_factor}, of at least {4 * model.vae_factor}"
        )
    steps = model.family.num_timesteps(model)
    if any(t >= steps for t in evaluation.timesteps or ()):
        faults.append(f"evaluation.timesteps must be in 0 .. {steps - 1}; got {evaluation.timesteps}")
    attention_layers(model.denoiser, evaluation.layers)
    for arm in arms.values():
        training, cached = arm.training, arm.trainer.cache_text_embeddings
        own = method_of(training.method, training.denoising).faults(model, training)
        if arm.trainer.compile and getattr(training.method, "self_attention_weight", False):
            own.append(
                "trainer.compile: method.self_attention_weight looks into the compiled blocks; leave one of them out"
            )
        if cached and training.text_encoder != "frozen":
            own.append("trainer.cache_text_embeddings needs a frozen text encoder; set it to false")
        if cached and training.method.needs_tokens:
            own.append("trainer.cache_text_embeddings: this method needs the tokens of each caption; set it to false")
        own += steps_faults(arm)
        faults += [f"{arm.name}: {fault}" for fault in own + _start_faults(arm, arms)]
        if training.denoiser == "lora":
            check_lora_targets(model.denoiser, lora_targets(model, training.lora, "denoiser"), "denoiser")
        if training.text_encoder == "lora":
            for encoder in model.text_encoders:
                check_lora_targets(encoder, lora_targets(model, training.lora, "text_encoder"), "text_encoder")
    return faults


def _start_faults(arm: Arm, arms: Mapping[str, Arm]) -> list[str]:
    """Why an arm cannot start from the model that it asks for."""
    training, start = arm.training, arm.training.method.starts_from
    other = arms[start].training if start is not None and start in arms else None
    if start is not None and "lora" in (training.denoiser, training.text_encoder):
        path = Path(start)
        adapted = (
            other.denoiser == "lora" if other else (path / LORA_FILE).exists() or (path.is_file() and is_adapter(path))
        )
        if training.denoiser != "lora" or not adapted:
            return [
                f"it trains adapters of the base, and can start only from adapters of the denoiser; {start} has none"
            ]
        if other and other.lora != training.lora:
            return [f"it starts from the adapters of {start}: its lora options must be the same, {other.lora}"]
    return [
        f"it starts from {start}, whose {part} is {there}, and its own is {here}; set {part} to {there}"
        for part in ("denoiser", "text_encoder")
        if other and (there := getattr(other, part)) in ("lora", "full") and there != (here := getattr(training, part))
    ]


def _load_validation(config: RunConfig, arms: Mapping[str, Arm]) -> PhantomDataset | RecordDataset | None:
    """The validation images, where something looks at them. Raises UserError if they cannot serve."""
    gate = [arm.name for arm in arms.values() if arm.training.method.needs_validation]
    trainer = config.trainer_options
    looks = trainer is not None and trainer.validate_every_steps
    if not gate and not (arms and looks):
        return None
    kept = [f"keep {arm.keep}" for arm in arms.values() if arm.keep in ("image_adds", "word_auc")]
    located = [f"the gate of {name}" for name in gate] + kept
    asks = (*located, "trainer.validate_every_steps")[0]
    if isinstance(config.data, PhantomData) and config.data.validation_size == 0:
        raise UserError(f"data.validation_size is 0, and {asks} looks at validation images; give at least 1")
    validation = load_dataset(config.data, "validation")
    if located and not (any(validation.findings) and any(region_list(validation, i) for i in range(len(validation)))):
        raise UserError(
            f"{asks} needs validation images with a box or mask of a finding, and none of the {len(validation):,} has "
            f"one{_why_no_regions(validation)}"
        )
    if gate and not has_finding_twice(validation):
        raise UserError(
            f"{asks} compares the maps of validation images with the same finding, and no finding has a box or mask in "
            f"two of the {len(validation):,}; give more validation images"
        )
    return validation


def _check_keep(run: Run) -> None:
    """UserError where looks are to be judged by the finding AUC, and there will be none."""
    if not any(arm.keep == "finding_auc" for arm in run.arms.values()):
        return
    assert run.validation is not None
    if run.features is None or not run.features.findings:
        raise UserError(
            f"keep is finding_auc, evaluation.features {run.evaluation.features}, and evaluation.parts "
            f"{', '.join(run.evaluation.parts)}: no classifier of findings is loaded; set features to xrv (or phantom, "
            "on phantom data) with quality in parts, or keep to loss"
        )
    images = range(min(DRAWN, len(run.validation)))
    _, labels = finding_labels(run.validation, images, run.features)
    if not any(column.any() and not column.all() for column in labels.T):
        raise UserError(
            f"keep is finding_auc, and no finding of the classifier ({', '.join(run.features.findings)}) is in some "
            f"and not in all of the first {len(images)} validation captions; set keep to loss"
        )


def _prior_images(data: DataConfig) -> tuple[PhantomDataset | RecordDataset | None, str]:
    """The training images for the priors of localization where nothing else reads them, or why there are none.

    Their masks and boxes are read, not their captions. A folder's files are all checked with its test split; those of
    other kinds would take hours.
    """
    if not isinstance(data, (PhantomData, FolderData)):
        return None, f"with data.kind {data.kind} evaluate.py opens no training images; tradeoff.py does"
    try:
        return load_dataset(data, "train"), ""
    except UserError as error:
        return None, f"there are no training images ({str(error).partition(chr(10))[0]})"


def _why_no_regions(dataset: PhantomDataset | RecordDataset) -> str:
    if not isinstance(dataset, RecordDataset):
        return ""
    names = f"; the validation split is called {', '.join(VALIDATION_SPLITS)}" if dataset.split == "validation" else ""
    return f": {dataset.no_regions}; see data.findings{names}"


def _check_references(run: Run, model: Model) -> None:
    """Load each model that a method names and that is no arm, and compare its shape with the base's."""
    names = [name for arm in run.arms.values() for name in arm.training.method.references if name not in run.arms]
    for name in dict.fromkeys(names):
        if name != BASE or run.base != run.config.base:
            check_same_shape(run.load(name), model)


def _check_trained_on(run: Run, folder: Path) -> None:
    """Raise UserError if the training images of the data are not those that the run in `folder` was trained on, so far
    as its cost.json says."""
    path = folder / "cost.json"
    trained = (read_json(path).get("training_data") or {}) if path.is_file() else {}
    then = trained.get("training images") if isinstance(trained, dict) else None
    if run.train is not None and then is not None:
        now = hash_of(run.train.fingerprint(i) for i in range(len(run.train)))
        if now != then:
            raise UserError(
                f"evaluation.parts has memorization, and the {len(run.train):,} training images of data.* are not those "
                f"that {folder} was trained on: copies would be looked for in the wrong place. Give data.* as the "
                "config.yaml of that run does, or leave memorization out"
            )


def _check_captions(run: Run, model: Model) -> None:
    """Say what was read of files, and how many captions are cut. Raises UserError if some are too long."""
    read = [dataset for dataset in (run.train, run.test, run.validation) if isinstance(dataset, RecordDataset)]
    for dataset in read:
        dataset.check_captions(model)
    for place, dataset in enumerate(read):
        run.say(dataset.counts if place else dataset.summary)


def _balance(run: Run) -> None:
    """Set `run.balance` as data.balance_findings says, and say so."""
    train, power = run.train, getattr(run.config.data, "balance_findings", 0.0)
    if train is not None and run.arms and power:
        labels = [train.labels(i) for i in range(len(train))]
        run.balance = balance_findings(labels, power, getattr(run.config.data, "findings", ()))
        run.say(f"data.balance_findings {power:g}: of the drawn images have {shares_text(run.balance.shares)}")


def _check_data(run: Run, model: Model) -> None:
    """Labels, regions and queries; raises UserError for what the arms or the evaluation need and is not there."""
    train, config = run.train, run.config
    trainings = {arm.name: arm.training for arm in run.arms.values()}
    if train is not None:
        labels = [train.labels(i) for i in range(len(train))]
        reads = [name for name, t in trainings.items() if t.method.reads_labels or t.denoising.reads_labels]
        if reads and not any(labels):
            raise UserError(
                f"{reads[0]} needs labels of the training images, and none has one; see data.label_column and "
                "data.finding_column, or the format's own column"
            )
        for label in {name for t in trainings.values() if (name := t.denoising.caption_dropout_label)}:
            if not any(has_label(found, label) for found in labels):
                raise UserError(
                    f"denoising.caption_dropout_label is {label!r}, and no training image has that label; there are "
                    f"{', '.join(sorted({name for found in labels for name in found}))}, and {NO_LABEL!r} for images "
                    "without one"
                )
        truncate = getattr(config.data, "truncate_captions", True)
        for training in trainings.values():
            check_training_text(train, model, training.denoising, truncate=truncate)
            count = training.method.region_images or len(train)
            if training.method.reads_regions and not any(region_list(train, i) for i in range(min(len(train), count))):
                raise UserError(
                    "region weights need training images with a box or mask of a finding, and none of the first "
                    f"{min(len(train), count):,} has one{_why_no_regions(train)}; see also method.images"
                )
    by_words = run.evaluation.protocol == "ours" and run.evaluation.localization_text == "caption"
    if isinstance(run.test, RecordDataset) and by_words and "localization" in run.evaluation.parts:
        run.test.check_queries()

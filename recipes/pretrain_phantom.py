"""Make the bundled base and the phantom's classifier from nothing, as Stable Diffusion is made.

    accelerate launch recipes/pretrain_phantom.py --config recipes/configs/phantom/pretrain.yaml

Text encoder by contrastive training with a small image tower, VAE on pictures, U-Net with the text encoder frozen; all
on generic captioned pictures (distill/data/pictures.py), never on phantoms. Architectures: distill/models/embedded.py;
losses: distill/methods/pretraining.py; stages: distill/experiment/pretraining.py. A stage whose result exists is
skipped; one that was cut off continues.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from distill.cli import main, to_yaml
from distill.config import LayerEvaluation, TrainerConfig
from distill.settings import Count, Positive, Probability, Seed, Settings, Text, Weight, once

if TYPE_CHECKING:
    from distill.files import JsonObject

Stage = Literal[
    "pictures", "tokenizer", "text_encoder", "vae", "unet", "unet_longer", "unet_clear", "classifier",
    "picture_classifier", "record",
]  # fmt: skip
Channels = Annotated[int, Field(ge=8, le=4096, multiple_of=8)]
TRAINED = ("text_encoder", "vae", "unet", "unet_longer", "unet_clear", "classifier", "picture_classifier")
"""Stages with a training loop."""


class RecordEvaluation(LayerEvaluation):
    """How stage record measures the base, on held-out pictures."""

    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Denoising steps of an image."""
    guidance_scale: Annotated[float, Field(ge=0, le=1000)] = 4.0
    """Classifier-free guidance; at most 1 switches it off."""


class PretrainConfig(Settings):
    """Make the bundled base and its classifiers from nothing, on generic captioned pictures.

    accelerate launch recipes/pretrain_phantom.py --config recipes/configs/phantom/pretrain.yaml
    """

    common: ClassVar[tuple[str, ...]] = ("stages", "work_dir", "output_dir", "classifier_dir", "seed")
    stages: Annotated[tuple[Stage, ...], Field(min_length=1), AfterValidator(once)] = get_args(Stage)
    """What to run, in this order. A stage whose result exists is skipped; a stage that was cut off continues."""
    pictures: Count = 30000
    """Training pictures of all stages but unet_clear and the classifiers."""
    resolution: Annotated[int, Field(ge=32, le=16384, multiple_of=8)] = 128
    """Side of a picture, in pixels."""
    vocabulary_size: Annotated[int, Field(ge=514, le=10**6)] = 2500
    """Tokens of the byte-level BPE, with the 512 bytes and the two special ones."""
    text_encoder: TrainerConfig = TrainerConfig()
    """Contrastive training."""
    vae: TrainerConfig = TrainerConfig()
    """Autoencoder."""
    unet: TrainerConfig = TrainerConfig()
    """U-Net, beside the trained text encoder and VAE."""
    unet_text_encoder: Literal["frozen", "full"] = "frozen"
    """Text encoder of stage unet. frozen takes that of stage text_encoder; full trains a new one by the diffusion
    loss."""
    unet_channels: tuple[Channels, Channels] = (64, 96)
    """Channels of the two levels of a new U-Net: multiples of 8. 224,320 gives it 31 M parameters, and not 2.8 M."""
    parts: Text | None = None
    """Pipeline folder whose tokenizer, text encoder and VAE stage unet takes. None takes those of the stages before
    it."""
    unet_longer: TrainerConfig = TrainerConfig()
    """The U-Net of output_dir again, with a learning rate that starts anew."""
    unet_clear: TrainerConfig = TrainerConfig()
    """The U-Net of output_dir a third time, on clear pictures, weighted by min_snr_gamma."""
    clear_pictures: Count = 24000
    """Training pictures of stage unet_clear."""
    min_snr_gamma: Positive = 5.0
    """Min-SNR weighting of stage unet_clear (Hang et al. 2023): timesteps with little noise count less."""
    classifier: TrainerConfig = TrainerConfig()
    """Finding classifier, on real phantoms."""
    classifier_images: Count = 6000
    """Phantoms that the classifier is trained on."""
    picture_classifier: TrainerConfig = TrainerConfig()
    """Object classifier, on real pictures; it tells whether the base's drawings are recognised."""
    picture_classifier_images: Count = 12000
    """Pictures that the object classifier is trained on; the held-out ones are not among them."""
    kl_weight: Weight = 1e-6
    """Weight of the VAE's KL term."""
    caption_dropout: Probability = 0.1
    """Probability that a caption is replaced by the empty one."""
    work_dir: Text = "checkpoints/pretrain_phantom"
    """Rendered pictures, logs and states."""
    output_dir: Text = "checkpoints/phantom-base"
    """The pipeline folder."""
    classifier_dir: Text = "checkpoints/phantom-classifier"
    """The classifier's folder."""
    evaluation: RecordEvaluation = RecordEvaluation()
    seed: Seed = 0
    """Seed of pictures, weights, order of data, noise and timesteps."""
    dry_run: bool = False
    """Take one step of every stage in a scratch folder, print what it took, and stop."""

    @model_validator(mode="after")
    def _check_parts(self) -> PretrainConfig:
        made = [stage for stage in ("tokenizer", "text_encoder", "vae") if stage in self.stages]
        if self.parts is not None and (made or "unet" not in self.stages):
            raise ValueError(f"parts is {self.parts}, which stage unet takes; set stages to unet and those after it")
        if self.parts is not None and self.unet_text_encoder == "full":
            raise ValueError(
                f"parts is {self.parts}, and unet_text_encoder full trains a new text encoder; leave out one"
            )
        return self


def rehearsal(config: PretrainConfig, scratch: Path) -> PretrainConfig:
    """One step of every stage on a few pictures, in a scratch folder."""
    one = {"max_steps": 1, "warmup_steps": 0, "checkpoint_every_steps": None}
    counts = {"pictures": 256, "clear_pictures": 256, "classifier_images": 64, "picture_classifier_images": 64}
    stages = {"stages": tuple(stage for stage in config.stages if stage != "record")}
    trainers = {name: getattr(config, name).model_copy(update=one) for name in TRAINED}
    folders = {name: str(scratch / name) for name in ("work_dir", "output_dir", "classifier_dir")}
    return config.model_copy(update=stages | counts | trainers | folders | {"dry_run": False})


def check_processes(config: PretrainConfig) -> None:
    """Raise UserError if a stage that writes alone was launched with several processes."""
    from distill.errors import UserError
    from distill.experiment.pretraining import UNET_STAGES
    from distill.processes import process_state

    alone = ["dry_run"] if config.dry_run else [stage for stage in config.stages if stage not in UNET_STAGES]
    if alone and (processes := process_state().num_processes) > 1:
        raise UserError(
            f"{', '.join(alone)}: for one process, and this launch has {processes}; only the stages "
            f"{', '.join(UNET_STAGES)} take several: name them by --stages"
        )


def train_parts(config: PretrainConfig, work: Path) -> None:
    """Stages before the U-Net: pictures, tokenizer, text encoder, VAE."""
    from distill.data.pictures import PicturesDataset
    from distill.data.rendered import RenderedPictures, render, train_tokenizer
    from distill.experiment.pretraining import train_text_encoder, train_vae
    from distill.files import whole_folder

    stages, pictures = config.stages, work / "pictures"
    if "pictures" in stages and not (pictures / "pixels.npy").exists():
        render(PicturesDataset("train", config.pictures, config.seed, config.resolution), pictures)
    if "tokenizer" in stages and not (work / "tokenizer").exists():
        captions = RenderedPictures(pictures).captions
        with whole_folder(work / "tokenizer") as folder:
            train_tokenizer(captions, config.vocabulary_size).save_pretrained(folder)
    if "text_encoder" in stages and not (work / "text_encoder" / "text_encoder_with_projection").exists():
        train_text_encoder(RenderedPictures(pictures), config.text_encoder, work / "text_encoder", config.seed)
    if "vae" in stages and not (work / "vae" / "vae").exists():
        train_vae(
            RenderedPictures(pictures),
            config.vae,
            work / "vae",
            config.seed,
            resolution=config.resolution,
            kl_weight=config.kl_weight,
        )


def train_stage(config: PretrainConfig, stage: str, work: Path, base: Path) -> None:
    """One of the stages of the U-Net."""
    from distill.config import DenoisingConfig
    from distill.data.pictures import PicturesDataset
    from distill.experiment.pretraining import train_unet

    clear = stage == "unet_clear"
    count = config.clear_pictures if clear else config.pictures
    train_unet(
        stage,
        PicturesDataset("train", count, config.seed, config.resolution, clear),
        getattr(config, stage),
        work,
        base,
        config.seed,
        denoising=DenoisingConfig(
            caption_dropout=config.caption_dropout, min_snr_gamma=config.min_snr_gamma if clear else None
        ),
        text_encoder=config.unet_text_encoder,
        parts=config.parts,
        channels=config.unet_channels,
    )


def train_classifiers(config: PretrainConfig, work: Path) -> None:
    """Stages after the U-Net: the classifiers."""
    from distill.data.phantom.dataset import PhantomDataset
    from distill.data.pictures import PicturesDataset
    from distill.experiment.pretraining import train_classifier

    classifier, objects = Path(config.classifier_dir), work / "picture_classifier" / "model"
    if "classifier" in config.stages and not classifier.exists():
        phantoms = PhantomDataset("train", config.classifier_images, config.seed, config.resolution)
        train_classifier(phantoms, config.classifier, work / "classifier", classifier, config.seed)
    if "picture_classifier" in config.stages and not objects.exists():
        pictures = PicturesDataset("train", config.picture_classifier_images, config.seed, config.resolution)
        train_classifier(pictures, config.picture_classifier, objects.parent, objects, config.seed)


def write_measurements(config: PretrainConfig, work: Path, base: Path) -> None:
    """Stage record."""
    from distill.experiment.pretraining import UNET_STAGES, cost_of, stages_of
    from distill.experiment.pretraining_record import record, write_record

    evaluation, classifier = config.evaluation.full(), Path(config.classifier_dir)
    result = record(base, classifier, work, evaluation, resolution=config.resolution, seed=config.seed)
    stages: JsonObject = stages_of(base)
    for name in TRAINED:
        if name not in UNET_STAGES and (work / name / "cost.json").exists():
            stages[name] = cost_of(work / name)
    write_record(base, result | {"unet_text_encoder": config.unet_text_encoder}, stages)


def pretrain(config: PretrainConfig) -> None:
    from distill.experiment.folder import held
    from distill.experiment.run import quiet_libraries

    quiet_libraries()
    check_processes(config)
    if config.dry_run:
        print(to_yaml(config))
        with tempfile.TemporaryDirectory() as scratch:
            pretrain(rehearsal(config, Path(scratch)))
        print("dry run: every stage took one step; multiply its seconds by its max_steps. Nothing was written")
        return
    with held(Path(config.work_dir)):
        train_stages(config, Path(config.work_dir), Path(config.output_dir))


def train_stages(config: PretrainConfig, work: Path, base: Path) -> None:
    """All stages that were asked for and are not done."""
    from distill.experiment.pretraining import UNET_STAGES, finish_saving, stages_of
    from distill.processes import process_state

    with process_state().main_process_first():
        finish_saving(base)
    train_parts(config, work)
    if "unet" in config.stages and not base.exists():
        train_stage(config, "unet", work, base)
    for stage in UNET_STAGES[1:]:
        if stage in config.stages and stage not in stages_of(base):
            train_stage(config, stage, work, base)
    train_classifiers(config, work)
    if "record" in config.stages:
        write_measurements(config, work, base)


if __name__ == "__main__":
    main(pretrain, PretrainConfig)

"""Configuration that recipes share: frozen, strict groups of options. The docstring under an option is its help.

Options of methods are in distill/methods/options.py, options of a kind of data in distill/data_config.py.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from distill.configuration import renamed as old
from distill.data_config import AnyData, PhantomData
from distill.settings import (
    HARMLESS,
    MAY_GROW,
    Batch,
    BelowOne,
    Count,
    Inside,
    Number,
    Positive,
    Probability,
    Rate,
    Seed,
    Settings,
    Text,
    Texts,
    Timesteps,
    once,
)  # fmt: skip

NO_LABEL = "no finding"
"""Text of an image without a label."""


class BaseConfig(Settings):
    """The model that is fine-tuned or evaluated."""

    name: Text = "phantom"
    """`phantom` (the bundled base), a diffusers pipeline folder, a hub id, or a model in one .safetensors file."""
    single_file_config: Text | None = None
    """Folder or hub id of a pipeline with the configs of a whole checkpoint. None takes the original model's, from the
    hub."""
    revision: Text | None = None
    """Hub revision: a branch, a tag or a commit."""
    variant: Text | None = None
    """File variant of the weights, such as `fp16`."""
    frozen_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the weights that are not trained. Trained weights are always fp32."""
    caption_chunks: Annotated[int, Field(ge=1, le=4)] = 1
    """Chunks of 75 tokens that a caption may have; each is encoded by itself. Raise it for reports that are longer.
    More take more time, also for short captions, and a model is drawn with as many as it was trained with."""

    @model_validator(mode="after")
    def _check(self) -> BaseConfig:
        if self.single_file_config is not None and not self.name.lower().endswith(".safetensors"):
            raise ValueError(f"single_file_config is of a .safetensors file, and name is {self.name}; leave it out")
        return self


class LoraConfig(Settings):
    """Low-rank adapters (Hu et al. 2021)."""

    renamed: ClassVar[dict[str, str]] = old.LORA
    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Rank of the update: 4 to 64 is usual. A higher one learns more and makes a larger file."""
    alpha: Annotated[float, Field(gt=0, le=65536)] = 8.0
    """The update is scaled by alpha / rank. Set it equal to rank for a scale of 1."""
    dropout: BelowOne = 0.0
    """Dropout on the adapter's input."""
    denoiser_targets: Texts = ()
    """Layers of the denoiser that get an adapter, by name suffix. Empty: to_q, to_k, to_v, to_out.0 for U-Nets."""
    text_encoder_targets: Texts = ()
    """Layers of the text encoders that get an adapter, by name suffix. Empty: q_proj, k_proj, v_proj, out_proj."""


class DenoisingConfig(Settings):
    """The diffusion loss, and the text that it is conditioned on."""

    renamed: ClassVar[dict[str, str]] = old.DENOISING
    min_snr_gamma: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Min-SNR weighting (Hang et al. 2023); 5.0 is usual. None weighs all timesteps alike."""
    caption_dropout: Probability = 0.1
    """Probability that a caption is replaced by the empty one, for classifier-free guidance."""
    caption_dropout_label: Text | None = None
    """Drop only captions of images with this label; `no finding` means images without a label. None drops any
    caption."""
    training_text: Literal["caption", "labels", "paraphrases"] = "caption"
    """Training text of an image: its caption, its labels in random order, or a paraphrase of each label."""
    paraphrases: dict[Text, Annotated[list[Text], Field(min_length=1)]] = Field(default_factory=dict)
    """Label -> sentences that state it, for training_text paraphrases."""
    insert_labels: Literal["none", "first", "random"] = "none"
    """RaLI (Dombrowski et al.): insert the image's labels before word 0 (first), or before one of words 0 to 5
    (random)."""

    @model_validator(mode="after")
    def _check(self) -> DenoisingConfig:
        if self.paraphrases and self.training_text != "paraphrases":
            raise ValueError("paraphrases are given, and training_text is not paraphrases; set it, or leave them out")
        if self.training_text == "paraphrases" and not self.paraphrases:
            raise ValueError("training_text is paraphrases, and none are given; set paraphrases")
        if self.caption_dropout_label is not None and self.caption_dropout == 0:
            raise ValueError("caption_dropout_label is set, and caption_dropout is 0; raise it, or leave the label out")
        return self

    @property
    def reads_labels(self) -> bool:
        """Whether the training text depends on the labels of an image."""
        return self.training_text != "caption" or self.insert_labels != "none" or self.caption_dropout_label is not None


class TrainerConfig(Settings):
    """The training loop."""

    renamed: ClassVar[dict[str, str]] = old.TRAINER
    max_steps: Annotated[Count, MAY_GROW] = 1000
    """Optimizer steps, of batch_size x gradient_accumulation_steps images on each device. A finished run with
    lr_schedule constant can be given more."""
    batch_size: Batch = 16
    """Images of a forward pass on each device. Lower it when memory runs out."""
    gradient_accumulation_steps: Batch = 1
    """Batches for one optimizer step."""
    learning_rate: Rate = 1e-4
    """Learning rate of the denoiser, and of the text encoder unless it has its own."""
    text_encoder_learning_rate: Rate | None = None
    """Learning rate of the text encoder. None uses learning_rate."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw is torch's; adamw8bit, of bitsandbytes, keeps its state in 8 bits and takes less memory."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 1e-2
    """Decoupled weight decay of AdamW."""
    max_grad_norm: Positive = 1.0
    """Gradients of a larger norm are scaled down to it."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up: constant, or falling to 0 in a line or a cosine."""
    warmup_steps: Number = 0
    """Steps of linear warm-up from 0."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision of the training: bf16 for recent GPUs, fp16 for older ones, no for float32."""
    compile: bool = False
    """Compile the denoiser's blocks by torch.compile: minutes before the first step, then faster steps. Losses differ
    by rounding. For long trainings on a GPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    ema_decay: Inside | None = None
    """Export an exponential moving average of the trained weights with this decay. None exports the weights."""
    cache_latents: bool = True
    """Encode each image by the VAE once, and keep the latents on disk."""
    cache_text_embeddings: bool = False
    """Encode each caption once, and keep the embeddings on disk; only with a frozen text encoder."""
    num_workers: Annotated[Annotated[int, Field(ge=0, le=256)] | None, HARMLESS] = None
    """Data loader processes. None starts 4 for a GPU, fewer on few cores, and none on a CPU."""
    log_every_steps: Annotated[Count, HARMLESS] = 10
    """Steps between two lines of train_log.jsonl."""
    tracker: Annotated[Literal["none", "tensorboard", "wandb"], HARMLESS] = "tensorboard"
    """Where the log goes in addition to train_log.jsonl."""
    checkpoint_every_steps: Annotated[Count | None, HARMLESS] = None
    """Steps between two checkpoints; the same command continues from the newest. One is always written when Ctrl-C or
    SIGTERM stops the training; None writes no others."""
    keep_last_state_gb: Annotated[float, Field(ge=0, le=1e6), HARMLESS] = 1.0
    """Keep the state after the last step if it takes at most this many GB, so that a larger max_steps continues from
    it. It takes three times the size of the trained weights, four times with ema_decay. 0 keeps none."""
    sample_every_steps: Annotated[Count | None, HARMLESS] = None
    """Steps between two sets of sample images. None draws none."""
    validate_every_steps: Annotated[Count | None, HARMLESS] = None
    """Steps between two looks at validation images: the diffusion loss with fixed noise, localization, and the finding
    AUC of 32 drawn images where evaluation.features has a classifier. None makes none."""

    @model_validator(mode="after")
    def _check(self) -> TrainerConfig:
        if self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, above max_steps, {self.max_steps}; lower it")
        for name in INTERVALS:
            every = getattr(self, name)
            if every is not None and every > self.max_steps:
                raise ValueError(
                    f"{name} is {every}, above max_steps, {self.max_steps}, so that none is made; lower it, or set it "
                    "to null"
                )
        return self


INTERVALS = ("checkpoint_every_steps", "sample_every_steps", "validate_every_steps")
"""Options of TrainerConfig that are at most max_steps."""


class EvaluationConfig(Settings):
    """Quality and localization, measured on held-out images."""

    renamed: ClassVar[dict[str, str]] = old.EVALUATION
    parts: Annotated[
        tuple[Literal["localization", "quality", "memorization"], ...], Field(min_length=1), AfterValidator(once), HARMLESS
    ] = (
        "localization", "quality",
    )  # fmt: skip
    """What to measure: attention maps (localization), generated images (quality), copies of training images
    (memorization). What was measured before is kept."""
    localization_images: Annotated[Count, HARMLESS] = 200
    """Held-out images whose attention maps are scored."""
    timesteps: Timesteps | None = None
    """Protocol ours: timesteps at which real latents are noised. None: those of localization.json, else 100, 250, 400, 550,
    700."""
    layers: Texts = ()
    """Protocol ours: cross-attention layers to average, by name prefix such as up_blocks.1. Empty takes those of
    localization.json, unless timesteps are given; else all."""
    localization_text: Literal["caption", "phrase"] = "caption"
    """Prompt of the attention maps: the image's caption, or the region's phrase."""
    generated_images: Annotated[Count, HARMLESS] = 200
    """Images generated from held-out captions, at most one of each held-out image."""
    diversity_captions: Annotated[Count, HARMLESS] = 10
    """Captions of which several images are generated."""
    diversity_samples: Annotated[int, Field(ge=2, le=1000), HARMLESS] = 4
    """Images a caption for the diversity."""
    num_inference_steps: Annotated[int, Field(ge=1, le=1000), HARMLESS] = 20
    """Denoising steps of an image."""
    guidance_scale: Annotated[float, Field(ge=0, le=1000), HARMLESS] = 4.0
    """Classifier-free guidance; at most 1 switches it off."""
    batch_size: Annotated[Batch, HARMLESS] = 16
    """Images at a time. It changes the speed, not the images."""
    features: Annotated[Text, HARMLESS] = "auto"
    """Features of quality: `inception`, `xrv` (chest X-rays), `phantom`, `none`, the folder of a vision model or a
    classifier of transformers, such as RadDINO, or weights in a file: `inception:FILE`, `xrv:FILE` (a state_dict),
    `torchvision:MODEL:FILE`, `timm:MODEL:FILE`. `auto`: phantom on phantom data, else none. Only inception and xrv
    without a file fetch weights, once."""
    bootstrap_samples: Annotated[int, Field(ge=1, le=10**6), HARMLESS] = 1000
    """Resamples behind each 95 % interval; behind those of FID and its kin at most 200."""
    seed: Seed = 1234
    """Seed of evaluation noise; image k uses seed + k."""
    examples: Annotated[int, Field(ge=1, le=1000), HARMLESS] = 6
    """Held-out images shown in the report."""

    def full(self, **options: Any) -> FullEvaluation:
        """With the options that only evaluation of one model has."""
        return FullEvaluation.model_validate(self.model_dump() | options)


AnyPart = Literal["localization", "quality", "memorization", "utility", "similarity", "explanation"]
AnyParts = Annotated[tuple[AnyPart, ...], Field(min_length=1), AfterValidator(once), HARMLESS]


class FullEvaluation(EvaluationConfig):
    """Quality and localization, measured on held-out images."""

    renamed: ClassVar[dict[str, str]] = {}
    parts: AnyParts = ("localization", "quality")  # type: ignore[assignment]
    """What to measure: attention maps (localization), generated images (quality), copies of training images
    (memorization), how well classifiers learn from generated images (utility), how near a model such as CLIP finds
    images to their captions (similarity), and what tells generated from real images (explanation). What was measured
    before is kept."""
    image_text_model: Annotated[Text | None, HARMLESS] = None
    """For similarity: the folder of a CLIP or SigLIP model of transformers. Nothing is fetched."""
    utility_steps: Annotated[Count, HARMLESS] = 200
    """Training steps of each of the classifiers of utility."""
    utility_seeds: Annotated[int, Field(ge=2, le=100), HARMLESS] = 4
    """Seeds of the utility classifiers; the intervals are over seeds. Each seed trains three classifiers."""
    protocol: Literal["ours", "dombrowski", "vilouras"] = "ours"
    """How maps are made and compared. ours is fast; dombrowski and vilouras are as published, and much slower."""
    ground_truth: Literal["auto", "mask", "boxes"] = "auto"
    """What maps are compared with; auto: masks for ours, boxes where there are any for the other protocols."""
    iou_threshold: Inside = 0.5
    """Protocol ours: the predicted region is where the min-max normalized map is above this."""
    layer_scaling: Literal["none", "min_max"] = "none"
    """Protocol ours: scale the map of each layer and timestep to 0 .. 1 before the mean, so that all weigh alike."""
    self_attention_power: Annotated[int, Field(ge=0, le=100)] = 0
    """Protocol ours: how often the map is multiplied by the self-attention, which sharpens it. 0 is off."""
    causal: Annotated[bool, HARMLESS] = False
    """Protocol ours: also map where the prediction changes without the finding's words. Three more passes a finding and
    timestep."""
    smoothing_sigma: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Gaussian smoothing of the maps before they are compared, in pixels. 0 switches it off."""
    map_threshold: Literal["none", "otsu", "mixture"] = "none"
    """Set pixels of the map below this threshold to 0 before it is compared."""
    orphan_share: BelowOne = 0.0
    """With a map_threshold: drop parts smaller than this share of the largest. 0 keeps all."""
    neighbours: Annotated[int, Field(ge=1, le=1000), HARMLESS] = 5
    """Precision, recall, density and coverage: the ball around an image reaches its neighbour of this rank."""
    memorization_limit: Annotated[Probability | None, HARMLESS] = None
    """Largest share of generated images that may be copies of training images. With a larger share that chance does not
    explain, evaluate.py marks the model card and ends with an error. Needs memorization in parts. None sets no
    limit."""
    quantization: Annotated[Literal["none", "int8", "nf4"], HARMLESS] = "none"
    """Evaluate with the linear layers in 8 or 4 bits (distill/models/bits.py)."""
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], HARMLESS] = "fp32"
    """Type that the denoiser computes in: bf16 and fp16 are faster on a GPU. All else stays fp32: text, sampler, VAE,
    attention probabilities, metrics. The difference it makes is in recipes/README.md; models are compared in one
    type."""
    scheduler: Annotated[Literal["base", "lcm"], HARMLESS] = "base"
    """Sampler: the base's own, or LCMScheduler for students of distill_steps.py (with guidance_scale 1)."""

    @model_validator(mode="after")
    def _check(self) -> FullEvaluation:
        if self.scheduler == "lcm" and self.num_inference_steps > 50:
            raise ValueError(f"num_inference_steps is {self.num_inference_steps}; scheduler lcm takes at most 50")
        if self.causal and (self.protocol != "ours" or self.self_attention_power):
            raise ValueError(
                f"causal is true, protocol {self.protocol}, and self_attention_power {self.self_attention_power}; "
                "set them to ours and 0, or causal to false"
            )
        if self.memorization_limit is not None and "memorization" not in self.parts:
            raise ValueError(
                f"memorization_limit is {self.memorization_limit}, and parts lacks memorization; add it, or leave the "
                "limit out"
            )
        if (self.image_text_model is None) == ("similarity" in self.parts):
            raise ValueError(
                f"image_text_model is {self.image_text_model}, and parts is {','.join(self.parts)}; give both a model "
                "and the part similarity, or neither"
            )
        check_parts(self)
        return self


def check_parts(evaluation: FullEvaluation | MapEvaluation) -> None:
    if evaluation.orphan_share and evaluation.map_threshold == "none":
        raise ValueError(
            f"orphan_share is {evaluation.orphan_share}, and map_threshold is none; set it to otsu or mixture"
        )


class MapEvaluation(Settings):
    """How attention maps are compared with regions, where no image is generated."""

    localization_images: Count = 200
    """Held-out images whose attention maps are scored."""
    localization_text: Literal["caption", "phrase"] = "caption"
    """Prompt of the attention maps: the image's caption, or the region's phrase."""
    ground_truth: Literal["auto", "mask", "boxes"] = "auto"
    """What maps are compared with; auto: masks for ours, boxes where there are any for the other protocols."""
    iou_threshold: Inside = 0.5
    """Protocol ours: the predicted region is where the min-max normalized map is above this."""
    smoothing_sigma: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Gaussian smoothing of the maps before they are compared, in pixels. 0 switches it off."""
    map_threshold: Literal["none", "otsu", "mixture"] = "none"
    """Set pixels of the map below this threshold to 0 before it is compared."""
    orphan_share: BelowOne = 0.0
    """With a map_threshold: drop parts smaller than this share of the largest. 0 keeps all."""
    batch_size: Batch = 16
    """Images at a time. It changes the speed, not the maps."""
    bootstrap_samples: Annotated[int, Field(ge=1, le=10**6)] = 1000
    """Resamples behind each 95 % interval."""
    seed: Seed = 1234
    """Seed of evaluation noise; image k uses seed + k."""

    @model_validator(mode="after")
    def _check(self) -> MapEvaluation:
        check_parts(self)
        return self

    def full(self, **options: Any) -> FullEvaluation:
        """With defaults for all else that evaluation has."""
        return FullEvaluation.model_validate(self.model_dump() | options)


class LayerEvaluation(MapEvaluation):
    """How attention maps are made and compared with regions, where no image is generated."""

    timesteps: Timesteps | None = None
    """Protocol ours: timesteps at which real latents are noised. None: those of localization.json, else 100, 250, 400, 550,
    700."""
    layers: Texts = ()
    """Protocol ours: cross-attention layers to average, by name prefix such as up_blocks.1. Empty takes those of
    localization.json, unless timesteps are given; else all."""
    self_attention_power: Annotated[int, Field(ge=0, le=100)] = 0
    """Protocol ours: how often the map is multiplied by the self-attention, which sharpens it. 0 is off."""


class RunConfig(Settings):
    """What every recipe with a run folder has."""

    base: BaseConfig = BaseConfig()
    data: AnyData = PhantomData()
    evaluation: EvaluationConfig = EvaluationConfig()
    output_dir: Annotated[Text, HARMLESS] = "checkpoints/run"
    """Run folder."""
    dry_run: Annotated[bool, HARMLESS] = False
    """Check everything, take one real step, print sizes and estimates of time and memory, and stop. Writes no model."""

    @model_validator(mode="after")
    def _check_precision(self) -> RunConfig:
        trainer = self.trainer_options
        if trainer is not None and self.base.frozen_dtype == "fp16" and trainer.mixed_precision != "fp16":
            raise ValueError(
                f"base.frozen_dtype is fp16, and trainer.mixed_precision is {trainer.mixed_precision}: small gradients "
                "would become 0 in fp16 layers; set trainer.mixed_precision to fp16, which scales the loss, or "
                "base.frozen_dtype to bf16"
            )
        return self

    @property
    def trainer_options(self) -> TrainerConfig | None:
        """The training loop of a recipe that trains, else None."""
        return getattr(self, "trainer", None)

    @property
    def training_seed(self) -> int:
        """The seed of a recipe that trains."""
        return 0


class TrainingRunConfig(RunConfig):
    """What every recipe that trains one model has."""

    trainer: TrainerConfig = TrainerConfig()
    seed: Seed = 0
    """Seed of weights, order of data, noise and timesteps."""

    @model_validator(mode="after")
    def _check_rates(self) -> TrainingRunConfig:
        rate = self.trainer.text_encoder_learning_rate
        if rate is not None and getattr(self, "text_encoder", "frozen") == "frozen":
            raise ValueError(
                f"trainer.text_encoder_learning_rate is {rate}, and the text encoder is not trained; leave it out"
            )
        return self

    @property
    def training_seed(self) -> int:
        return self.seed


Keep = Literal["last", "loss", "image_adds", "word_auc", "finding_auc"]


class FinetuningRunConfig(TrainingRunConfig):
    """What every recipe has that can export weights of an earlier step than the last."""

    keep: Keep = "last"
    """Weights that are exported: after the last step, or at the look (trainer.validate_every_steps) with the lowest
    validation loss, or the highest image_adds, word_auc or finding_auc. Of equal looks the first. Let
    validate_every_steps divide max_steps, so that the last weights are looked at too. It takes one more copy of the
    trained weights on the disk."""

    @model_validator(mode="after")
    def _check_keep(self) -> FinetuningRunConfig:
        if self.keep != "last" and self.trainer.validate_every_steps is None:
            raise ValueError(
                f"keep is {self.keep}, and trainer.validate_every_steps is not set; set it, or set keep to last"
            )
        return self


class BlocksConfig(Settings):
    """Blocks to take out of a U-Net.

    BK-SDM-Base is layers_per_block 1; Small also has remove_mid_block; Tiny also has remove_stages 1.
    """

    layers_per_block: Annotated[int, Field(ge=1, le=64)] | None = None
    """Pairs of a residual and an attention block that stay in each stage; the up stages keep one more. None keeps
    all."""
    remove_mid_block: bool = False
    """Take out the middle block."""
    remove_stages: Annotated[int, Field(ge=0, le=16)] = 0
    """Innermost stages to take out, with the middle block, where the next one has as many channels (SD 1 and 2: 1)."""
    transformer_layers: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Transformer layers that stay in each attention block (SDXL has up to 10). None keeps all."""

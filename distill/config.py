"""Configuration of every recipe: frozen dataclasses, whose comments are the command line's help. Legal values: rules.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args


@dataclass(frozen=True)
class BaseConfig:
    """The model that is fine-tuned or evaluated."""

    name: str = "phantom"
    """`phantom` (the embedded base), a diffusers pipeline folder, or a hub id."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    variant: str | None = None
    """File variant of the weights, such as `fp16`."""
    frozen_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the weights that are not trained; trained weights are always fp32."""


@dataclass(frozen=True)
class DataConfig:
    """Images, captions and ground truth."""

    kind: Literal["phantom", "folder", "mimic", "mscxr", "coco"] = "phantom"
    """`phantom` is drawn from a seed; the others read images and the files that describe them: `folder` (any images),
    `mimic` (MIMIC-CXR-JPG), `mscxr` (MS-CXR), `coco` (COCO)."""
    resolution: int = 128
    """Side of the square training image, in pixels."""
    seed: int = 0
    """phantom: which infinite data set is drawn."""
    train_size: int = 4000
    """phantom: images of the training split."""
    validation_size: int = 500
    """phantom: images of the validation split."""
    test_size: int = 500
    """phantom: images of the test split."""
    phantom_captions: Literal["reports", "affirmed", "stated", "labels"] = "reports"
    """phantom: reports state findings, negate others and add normal sentences; affirmed negates none; stated has nothing
    but the findings; labels is their names alone, in random order, or `no finding`."""
    phantom_companions: float = 0.0
    """phantom: probability that a finding brings its companion, such as an effusion an atelectasis; 0: independent."""
    root: str | None = None
    """The folder that holds the images; names of files are relative to it."""
    metadata_file: str = "metadata.csv"
    """folder: metadata.csv or metadata.jsonl; one row an image, or one row a box. mimic: CSV with dicom_id, path, split,
    impression, Finding Labels. mscxr: MS-CXR's JSON or CSV, or the CSV with bboxxywh."""
    image_column: str = "file_name"
    """folder: path of the image, relative to root."""
    caption_column: str = "text"
    """folder: the caption."""
    split_column: str = "auto"
    """folder: split of the image. `auto` takes the column `split` if there is one; `none` takes none. Without a column, images
    are split by the hash of their patient, else of their name: 10 % test, 10 % validation, the rest train; images of one
    patient and files of the same bytes stay together. mscxr: only a column that is named here; without it all are test."""
    train_split: str = "train"
    """Value of the split column for training; mimic, coco's CSV: name or number of a split (test, train, val, p19, mscxr).
    Validation images, where a recipe reads some, have the value `validation`, `val` or `valid`."""
    test_split: str = "test"
    """The same for evaluation. folder: `all` evaluates every image, whatever its split; no training takes it."""
    finding_column: str = "auto"
    """folder: finding (class) of the row's box, or a list of one finding for each box. `auto` takes the column `finding` if
    there is one; `none` takes none."""
    phrase_column: str = "auto"
    """folder: short phrase that describes the row's box. `auto` takes the column `phrase` if there is one; `none` takes
    none."""
    box_column: str = "auto"
    """folder: box as `x,y,w,h` in pixels of the image file, or a list of such boxes. `auto` takes the column `bbox` if there
    is one; `none` takes none."""
    mask_column: str = "auto"
    """folder: path of a mask image (non-zero is inside), relative to root; it goes before the box. `auto` takes the column
    `mask` if there is one; `none` takes none."""
    label_column: str = "auto"
    """folder: findings of the whole image, joined by `|`; without a column, the findings of its boxes. `auto` takes the column
    `labels` if there is one; `none` takes none."""
    patient_column: str = "auto"
    """folder: patient of the image; no patient may be in two splits. `auto` takes the column `patient` if there is one; `none`
    takes none."""
    findings: tuple[str, ...] = ()
    """Findings to keep and evaluate; empty keeps all that the files name."""
    query_words: dict[str, list[str]] = field(default_factory=dict)
    """Words that name a finding in a caption; default: the published lists for MS-CXR findings, else its own words
    (coco: its whole name, in singular and plural)."""
    mimic_file: str | None = None
    """mscxr: MIMIC metadata CSV, whose impressions are captions, and whose train_split is trained on."""
    caption_source: Literal["impression", "phrase"] = "impression"
    """mscxr: caption of a sample: the report's impression (a sample an image), or MS-CXR's phrase (a sample a phrase)."""
    mentioned_only: bool = False
    """mscxr: keep only findings that the caption names by their query words."""
    captions_file: str = "annotations/captions_{split}2017.json"
    """coco: captions JSON, or a CSV with path, captions, split; {split} stands for train_split or test_split."""
    instances_file: str | None = "annotations/instances_{split}2017.json"
    """coco: instances JSON; none reads captions only."""
    image_dir: str = "{split}2017"
    """coco: folder of the file names in JSON; paths in a CSV are relative to root."""
    allow_empty_captions: bool = False
    """Accept rows with an empty caption."""
    truncate_captions: bool = False
    """Accept captions of more tokens than the text encoder takes, and cut them."""
    horizontal_flip: bool = False
    """Mirror images at random in training, only those whose caption names no side."""
    cache_dir: str | None = None
    """Where latents and text embeddings are cached; default: checkpoints/.cache."""


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021), by peft."""

    rank: int = 8
    """Rank of the update."""
    alpha: float = 8.0
    """Scale of the update is alpha / rank."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    unet_targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Module names of the U-Net that get an adapter (matched at the end of the name)."""
    text_encoder_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Module names of the text encoder(s) that get an adapter."""


@dataclass(frozen=True)
class DenoisingConfig:
    """The diffusion loss."""

    min_snr_gamma: float | None = None
    """Weight of Hang et al. 2023 (5.0 is usual); none weighs all timesteps alike."""
    caption_dropout: float = 0.1
    """Probability that a caption is replaced by the empty one, for classifier-free guidance."""
    caption_dropout_label: str | None = None
    """Drop captions only of images with this label (the paper: `No Finding`), or, with `no finding`, also of images without
    a label; None drops any caption."""
    training_text: Literal["caption", "labels", "paraphrases"] = "caption"
    """Text of a training image, as the paper compares: its caption; the names of its labels in random order; or of each
    label, in random order, one of `paraphrases`. Images without a label then have the text `no finding`."""
    paraphrases: dict[str, list[str]] = field(default_factory=dict)
    """Label -> sentences that state it."""
    insert_labels: Literal["none", "first", "random"] = "none"
    """RaLI of the paper, in training captions: the image's labels in random order before word 0 (first), or before one of
    the words 0 to 5 (random)."""
    arm_weight: float = 0.0
    """ARM of the paper (it uses 0.12): rewards attention on the words that name a label; not with distillation."""
    tail_weight: float = 0.0
    """Penalty on the attention mass of EOS and padding beyond that of the model before the training, at the same layer and
    noise level. It needs no labels and no teacher; not with distillation, which has its own."""
    region_token_weight: float = 0.0
    """TokenCompose's token loss (it uses 1e-3): attention of the words that name a label belongs in the label's boxes or
    mask, where the training data has them; not with distillation."""
    region_pixel_weight: float = 0.0
    """TokenCompose's pixel loss (it uses 5e-5): cross-entropy of that attention and the region."""
    region_mask_weight: float = 0.0
    """Break-A-Scene's loss (it uses 1e-2): squared difference of that attention, over its largest, and the region."""
    region_images: int | None = None
    """Use the regions of the first this many training images alone, as where few have been drawn; None uses all."""

    @property
    def reads_regions(self) -> bool:
        return max(self.region_token_weight, self.region_pixel_weight, self.region_mask_weight) > 0

    @property
    def reads_attention(self) -> bool:
        return self.reads_regions or max(self.arm_weight, self.tail_weight) > 0


@dataclass(frozen=True)
class AttentionDistillationConfig:
    """Match of the student's cross-attention to the teacher's, on the same noisy latents and timesteps."""

    teacher: str | None = None
    """Run folder, pipeline folder or hub id of the teacher; tradeoff.py uses its own frozen arm. `frozen_text_encoder`: the
    student's own U-Net, fed by the text encoder as it was before the training, so that no teacher has to be trained. `ema`:
    the student's own past, an average of its weights (mean teacher)."""
    ema_decay: float = 0.999
    """With teacher ema: share of the average that each forward pass keeps. Tarvainen and Valpola 2017 use .999."""
    start_from_teacher: bool = False
    """Start from the teacher's weights and not the base's: a run folder trained in full, a pipeline, or, for a student of
    adapters, a run folder of such adapters. The teacher's training then is the first part of the student's. With it the
    student's FID was 15 % below the teacher's, without 5 % (three seeds)."""
    batch_share: float = 1.0
    """Share of each batch that is distilled, at least one image; a smaller one costs less time."""
    frozen_share: float = 0.0
    """With teacher frozen_text_encoder: share of each batch, its last images, that the U-Net is trained on through the frozen
    text encoder and not the trained one, so that it can go on teaching; at most 1 - batch_share."""
    token_kl_weight: float = 0.1
    """(a) KL over tokens at each place. 0.1 for this and the next two kept the teacher's maps (word AUC +.000 [-.001, +.002])
    and drew better than it (FID -5 % [-8 %, -1 %]): recipes/results/tradeoff.md. 1 kept its maps and its FID
    (earlier_base.md)."""
    place_kl_weight: float = 0.1
    """(b) KL over places for each word token."""
    mass_weight: float = 0.1
    """(c) squared difference of the attention mass of the BOS, word, EOS and padding groups."""
    tail_weight: float = 0.0
    """Penalty on attention mass of EOS and padding beyond the teacher's."""
    output_weight: float = 0.0
    """Squared difference of the U-Nets' outputs (BK-SDM)."""
    feature_weight: float = 0.0
    """Squared difference of the outputs of the U-Nets' blocks (BK-SDM)."""
    self_attention_weight: float = 0.0
    """Squared difference of the outputs of the U-Nets' self-attention layers (KOALA)."""
    place_groups: tuple[Literal["words", "eos", "padding"], ...] = ("words",)
    """Tokens whose maps (b) compares."""
    text_gradient: float = 1.0
    """Share, 0 to 1, of the gradient of (a) to (c) that reaches the text encoder through the keys; the rest still comes
    through the queries of later layers. The diffusion loss's gradient there is about a hundredth of that of the maps at a
    weight of 1. At 0 the U-Net alone keeps the maps, and the text encoder learns from the diffusion loss."""
    words: Literal["all", "labels"] = "all"
    """labels: (a) and (b) compare, of the words, only those that name a label of the image; (a) takes all other tokens as
    one. It leaves the student free in what the teacher need not know, such as what `no` does to a finding's word."""
    gate_reference: str | None = None
    """Teach only at the timesteps at which the teacher localizes on validation images, and the layers and token groups that
    localize there at least as well in the teacher as in this model: a run folder, such as the same training without a
    teacher, or `base`. The groups are those of (b), in place of place_groups. None teaches all. The winner
    (recipes/results/tradeoff.md, three seeds), with start_from_teacher: maps better than the teacher's (word AUC +.008 [+.001,
    +.020]), FID 11 % below that of the same training without a teacher [-20 %, +1 %]."""
    gate_images: int = 100
    """Validation images of the gate."""
    layers: tuple[str, ...] = ()
    """Prefixes of cross-attention layer names; empty takes all."""
    min_timestep: int = 0
    """Distill only at timesteps of at least this."""
    max_timestep: int = 999
    """Distill only at timesteps of at most this."""


@dataclass(frozen=True)
class TrainerConfig:
    """The one training loop."""

    max_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 16
    """Images a step on each device."""
    gradient_accumulation_steps: int = 1
    """Batches for one optimizer step."""
    learning_rate: float = 1e-4
    """Learning rate of the U-Net (and of the text encoder, unless it has its own)."""
    text_encoder_learning_rate: float | None = None
    """None uses learning_rate."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit is bitsandbytes'."""
    weight_decay: float = 1e-2
    """Decoupled weight decay of AdamW."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Type that autocast computes in."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    ema_decay: float | None = None
    """Exponential moving average of the trained weights, exported instead of them; none keeps none."""
    cache_latents: bool = True
    """Encode each image by the VAE once, and keep the latents on disk."""
    cache_text_embeddings: bool = False
    """Only with a frozen text encoder."""
    num_workers: int = 0
    """Data loader processes."""
    log_every_steps: int = 10
    """Steps between two lines of train_log.jsonl."""
    tracker: Literal["none", "tensorboard", "wandb"] = "tensorboard"
    """Where the log goes besides train_log.jsonl."""
    checkpoint_every_steps: int | None = None
    """Steps between two checkpoints; none writes no checkpoint before the end."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest."""
    sample_every_steps: int | None = None
    """Steps between two sets of sample images; none draws none."""
    localize_every_steps: int | None = None
    """Steps between two looks at where the attention is, on validation images (localization_log.jsonl); none looks not."""
    localize_images: int = 100
    """Validation images of each look."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Quality and localization of one model, on held-out images."""

    localization_images: int = 200
    """Held-out images whose attention maps are scored."""
    protocol: Literal["ours", "dombrowski", "vilouras"] = "ours"
    """How maps are made, compared and averaged; the other two are as published (distill/protocols.py)."""
    timesteps: tuple[int, ...] | None = None
    """ours: timesteps at which the real latents are re-noised; none takes the model's localization.json, else 100, 250,
    400, 550, 700."""
    layers: tuple[str, ...] = ()
    """ours: prefixes of cross-attention layers whose maps are averaged; empty takes the model's localization.json, else
    all."""
    iou_threshold: float = 0.5
    """ours: the min-max normalized map above this is the predicted region."""
    localization_text: Literal["caption", "phrase"] = "caption"
    """Text that the maps are of."""
    ground_truth: Literal["auto", "mask", "boxes"] = "auto"
    """What maps are compared with; auto: masks for ours, boxes where there are any for the others."""
    self_attention_power: int = 0
    """ours: times that the map is multiplied by the U-Net's self-attention."""
    smoothing_sigma: float = 0.0
    """Gaussian smoothing of the maps before they are compared, in pixels; 0 for none."""
    map_threshold: Literal["none", "otsu", "mixture"] = "none"
    """Pixels of the map below this threshold become 0 before maps are compared."""
    orphan_share: float = 0.0
    """With a map_threshold: drop parts smaller than this share of the largest; 0 keeps all."""
    generated_images: int = 200
    """Images generated from held-out captions."""
    diversity_captions: int = 10
    """Captions of which several images are generated."""
    diversity_samples: int = 4
    """Images a caption for the diversity."""
    num_inference_steps: int = 20
    """Denoising steps of an image."""
    guidance_scale: float = 4.0
    """Classifier-free guidance; at most 1 is none."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Linear layers of U-Net and text encoders in 8 or 4 bits (distill/quantize.py)."""
    scheduler: Literal["base", "lcm"] = "base"
    """Sampler: the base's own, or LCMScheduler, for what distill_steps.py makes (with guidance_scale 1)."""
    batch_size: int = 16
    """Images at a time; it changes the speed, not the images."""
    features: str = "auto"
    """For FID and findings: `auto` (phantom on phantom data, else none), `phantom`, `inception`, `xrv`, `none`."""
    bootstrap_samples: int = 1000
    """Resamples behind each 95 % interval."""
    seed: int = 1234
    """Seed of evaluation noise; image k uses seed + k."""
    examples: int = 6
    """Held-out images shown in the report."""


@dataclass(frozen=True)
class FinetuneConfig:
    """recipes/finetune.py: fine-tune a text-to-image model on captioned images."""

    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: Literal["lora", "full"] = "lora"
    """How the U-Net is trained."""
    text_encoder: Literal["frozen", "lora", "full"] = "frozen"
    """How the text encoder(s) are trained."""
    lock_keys: bool = False
    """While training, the keys of cross-attention see the text encoder as it was, and only the values the trained one, so
    that attention maps stay those of a frozen encoder (distill/keylock.py). Merged at the end, so that the export is stock;
    adapters of to_k then have twice lora.rank."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output_dir: str = "checkpoints/finetune"
    """Run folder."""
    seed: int = 0
    """Seed of weights, order of data, noise and timesteps."""
    dry_run: bool = False
    """Check everything, take one real step, print sizes and estimates, and stop."""


@dataclass(frozen=True)
class DistillAttentionConfig:
    """recipes/distill_attention.py: fine-tune with the text encoder trained, and keep the teacher's attention."""

    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: Literal["lora", "full"] = "lora"
    """How the U-Net is trained."""
    text_encoder: Literal["frozen", "lora", "full"] = "lora"
    """How the text encoder(s) are trained."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    distillation: AttentionDistillationConfig = field(default_factory=AttentionDistillationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output_dir: str = "checkpoints/distill_attention"
    """Run folder."""
    seed: int = 0
    """Seed of weights, order of data, noise and timesteps."""
    dry_run: bool = False
    """Check everything, take one real step, print sizes and estimates, and stop."""


@dataclass(frozen=True)
class BlocksConfig:
    """What is taken out of a U-Net (distill/compress.py). BK-SDM-Base of Stable Diffusion 1 and 2: layers_per_block 1; Small:
    also remove_mid_block; Tiny: also remove_stages 1."""

    layers_per_block: int | None = None
    """Pairs of a residual and an attention block that stay in each stage (Stable Diffusion has 2); the up stages keep one
    more. None keeps all."""
    remove_mid_block: bool = False
    """Take out the middle block."""
    remove_stages: int = 0
    """Innermost stages to take out, together with the middle block, where the next one has as many channels (Stable Diffusion
    1 and 2: 1)."""
    transformer_layers: int | None = None
    """Transformer layers that stay in each attention block (SDXL has up to 10). None keeps all."""


@dataclass(frozen=True)
class CompressConfig:
    """recipes/compress.py: a smaller U-Net, taught by the one that it is made of."""

    base: BaseConfig = field(default_factory=BaseConfig)
    run: str | None = None
    """What is compressed: a run folder on base; none compresses the base itself."""
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    data: DataConfig = field(default_factory=DataConfig)
    text_encoder: Literal["frozen", "full"] = "frozen"
    """How the text encoder(s) are trained, from the teacher's on."""
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    distillation: AttentionDistillationConfig = field(
        default_factory=lambda: AttentionDistillationConfig(
            token_kl_weight=0.0, place_kl_weight=0.0, mass_weight=0.0, output_weight=1.0, feature_weight=1.0
        )
    )
    """Outputs and features alone by default: under a frozen text encoder the attention terms cost maps
    (recipes/results/compression.md)."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    bits: tuple[Literal["int8", "nf4"], ...] = ()
    """Evaluate the student also with its linear layers in these types."""
    output_dir: str = "checkpoints/compress"
    """Run folder; pruned_base in it is the smaller pipeline before the training, on which the run folder is loaded."""
    seed: int = 0
    """Seed of order of data, noise and timesteps."""
    dry_run: bool = False
    """Check everything, take one real step, print sizes and estimates, and stop."""


@dataclass(frozen=True)
class ConsistencyConfig:
    """Latent consistency distillation (Luo et al. 2023)."""

    solver_steps: int = 50
    """Timesteps of the teacher's DDIM path that the student is trained at; LCMScheduler samples at some of 50, so a multiple of
    50."""
    guidance_scale: float = 4.0
    """Classifier-free guidance of the teacher, which the student takes in: it is sampled without."""
    huber_c: float = 0.001
    """Below about this a difference of latents counts by its square, above it by its size."""


@dataclass(frozen=True)
class DistillStepsConfig:
    """recipes/distill_steps.py: a student that draws in a few steps and without guidance, for stock LCMScheduler."""

    base: BaseConfig = field(default_factory=BaseConfig)
    run: str | None = None
    """The teacher, and what the student starts from: a run folder on base; none takes the base itself."""
    data: DataConfig = field(default_factory=DataConfig)
    method: Literal["lora", "full"] = "lora"
    """How the U-Net is trained; the text encoder stays the teacher's."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    consistency: ConsistencyConfig = field(default_factory=ConsistencyConfig)
    denoising: DenoisingConfig = field(default_factory=lambda: DenoisingConfig(caption_dropout=0.0))
    distillation: AttentionDistillationConfig = field(default_factory=AttentionDistillationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    student_steps: int = 4
    """Denoising steps of the student's images; the teacher's are evaluation.num_inference_steps."""
    output_dir: str = "checkpoints/distill_steps"
    """Run folder; with a run, whole_base in it is the teacher as one pipeline, on which the run folder is loaded."""
    seed: int = 0
    """Seed of weights, order of data, noise and timesteps."""
    dry_run: bool = False
    """Check everything, take one real step, print sizes and estimates, and stop."""


@dataclass(frozen=True)
class TradeoffConfig:
    """recipes/tradeoff.py: arms from one base, evaluated alike, and one report."""

    base: BaseConfig = field(default_factory=BaseConfig)
    data: DataConfig = field(default_factory=DataConfig)
    arms: tuple[
        Literal[
            "frozen",
            "learnable",
            "distilled",
            "gated",
            "self_taught",
            "lora",
            "rali",
            "rali_arm",
            "supervised",
            "continued",
            "key_locked",
            "tail_penalized",
        ],
        ...,
    ] = (
        "frozen",
        "learnable",
        "distilled",
        "lora",
    )
    """Arms to train; `frozen` is the teacher of `distilled`, `continued`, `lora` and `gated`, and `self_taught` needs none.
    `continued`: `distilled`, started from frozen's weights. `gated`: `continued`, taught at the timesteps at which frozen
    localizes, and in the layers and token groups where it does so at least as well as learnable. `rali`, `rali_arm`:
    `learnable` with the paper's own remedies, labels inserted into the captions, and attention regularization besides.
    `supervised`: `learnable` with TokenCompose's losses on the findings' boxes or masks. `key_locked`: `learnable` with the
    keys of cross-attention locked to the text encoder as it was; it needs no teacher. `tail_penalized`: `learnable` with a
    penalty on the attention mass of EOS and padding; it needs no teacher either."""
    tail_penalty_weight: float = 0.1
    """denoising.tail_weight of the arm tail_penalized."""
    rali_arm_weight: float = 0.12
    """denoising.arm_weight of the arm rali_arm."""
    supervised_token_weight: float = 0.01
    """denoising.region_token_weight of the arm supervised."""
    supervised_pixel_weight: float = 0.0
    """denoising.region_pixel_weight of the arm supervised."""
    self_taught_batch_share: float = 0.5
    """distillation.batch_share of the arm self_taught."""
    self_taught_frozen_share: float = 0.5
    """distillation.frozen_share of the arm self_taught."""
    variants: dict[str, str] = field(default_factory=dict)
    """Further arms: name -> an arm, not necessarily of `arms`, and what it has otherwise, as on the command line, such as
    `lora --lora.rank 4 --lora.alpha 4`. Of the options, those that say how an arm is trained: distillation.*, denoising.*,
    lora.*, method, learning rates, trainer.max_steps, and weights of the named arms."""
    method: Literal["full", "lora"] = "full"
    """How the U-Net of the arms frozen, learnable, distilled and self_taught is trained; their text encoder is trained in
    full, or not at all."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    lora_learning_rate: float = 1e-3
    """Learning rate of adapters; full weights use trainer.learning_rate."""
    denoising: DenoisingConfig = field(default_factory=DenoisingConfig)
    distillation: AttentionDistillationConfig = field(default_factory=AttentionDistillationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output_dir: str = "checkpoints/tradeoff"
    """Run folder; each arm gets a folder of its own in it."""
    seed: int = 0
    """Seed of weights, order of data, noise and timesteps."""
    seeds: tuple[int, ...] = ()
    """Several training seeds: each gets a folder seed-N of its own in output_dir, and one report is of all that are there;
    empty trains `seed` only."""
    dry_run: bool = False
    """Check everything, take one real step, print sizes and estimates, and stop."""


@dataclass(frozen=True)
class EvaluateConfig:
    """recipes/evaluate.py: quality and localization of a base, with or without a trained run on it."""

    base: BaseConfig = field(default_factory=BaseConfig)
    run: str | None = None
    """Run folder whose adapters or full weights are put on the base; none evaluates the base itself."""
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output_dir: str = "checkpoints/evaluate"
    """Where metrics.json, samples, maps and the report are written."""
    dry_run: bool = False
    """Check everything, take one real step, print sizes and estimates, and stop."""


@dataclass(frozen=True)
class AtlasConfig:
    """recipes/atlas.py: which layers and timesteps localize, chosen on validation images and stored with the model."""

    base: BaseConfig = field(default_factory=BaseConfig)
    runs: tuple[str, ...] = ()
    """Run folders on the base that are looked at besides the base itself."""
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    timesteps: tuple[int, ...] = (25, 100, 175, 250, 325, 400, 475, 550, 625, 700, 775, 850, 925)
    """Timesteps of the atlas, from which the subset is chosen; those of the default (100, 250, 400, 550, 700) are added."""
    max_timesteps: int = 3
    """Most timesteps of the subset: the forward passes that it costs an image."""
    validation_images: int = 100
    """Validation images that the subset is chosen on; evaluation.localization_images test images check it."""
    store: bool = True
    """Write the subset as localization.json into each run folder, where evaluation and users of the run find it."""
    store_base: bool = False
    """Write the base's subset into the base's own folder, which then counts for all runs that have none."""
    output_dir: str = "checkpoints/atlas"
    """Where atlas.json, atlas.md and each model's heat maps are written."""
    dry_run: bool = False
    """Check everything, take one real step, print sizes and estimates, and stop."""


@dataclass(frozen=True)
class RobustnessConfig:
    """recipes/robustness.py: localization under other words, swapped sides, other images, and negations."""

    base: BaseConfig = field(default_factory=BaseConfig)
    runs: tuple[str, ...] = ()
    """Run folders on the base that are looked at besides the base itself."""
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    output_dir: str = "checkpoints/robustness"
    """Where robustness.json and robustness.md are written."""
    dry_run: bool = False
    """Check everything, print what would be measured, and stop."""


@dataclass(frozen=True)
class CompareConfig:
    """recipes/compare.py: runs of several commands in one report, with paired differences."""

    arms: dict[str, str] = field(default_factory=dict)
    """Name in the report -> its evaluated folder, `<run>/<arm>`, or a run folder that holds one trained arm."""
    seeds: tuple[int, ...] = ()
    """Training seeds that `{seed}` in the folders of `arms` stands for; none where each arm is one run."""
    references: tuple[str, ...] = ()
    """Arms that every other is compared with; none takes `frozen` and `learnable` where they are arms, else the first."""
    output_dir: str = "checkpoints/compare"
    """Where metrics.json and the report are written, with a copy of what they are made from; no weights."""
    dry_run: bool = False
    """Check that the runs can be compared, print what would be, and stop."""


@dataclass(frozen=True)
class SwapTextEncoderConfig:
    """recipes/swap_text_encoder.py: put another text encoder into a base, as a stock pipeline to fine-tune."""

    base: BaseConfig = field(default_factory=BaseConfig)
    text_encoder: str | None = None
    """Folder or hub id of a transformers encoder and its tokenizer: BERT, CXR-BERT, MiniLM, T5 and others. Or `multi_label`:
    no language model, but one token for each label of the training images, for captions that are lists of labels."""
    model_type: str | None = None
    """In place of the encoder's own, where that names a class outside transformers: `bert` for CXR-BERT."""
    max_tokens: int = 77
    """Positions of a caption, padding included."""
    data: DataConfig = field(default_factory=DataConfig)
    captions: int = 2000
    """Training captions that the projection is fitted on."""
    output_dir: str = "checkpoints/swapped"
    """Where the pipeline is written; must not be there yet."""
    dry_run: bool = False
    """Check and fit, and write nothing."""


@dataclass(frozen=True)
class BenchmarkLocalizationConfig:
    """recipes/benchmark_localization.py: what localization costs and gives, beside the paper's way and a peer."""

    base: BaseConfig = field(default_factory=BaseConfig)
    run: str | None = None
    """Run folder whose adapters or full weights are put on the base; none takes the base itself."""
    data: DataConfig = field(default_factory=DataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    parts: tuple[Literal["overhead", "paper", "memory", "protocols", "scale", "full_size"], ...] = (
        "overhead",
        "paper",
        "memory",
        "protocols",
        "scale",
        "full_size",
    )
    """What to measure."""
    repeats: int = 40
    """overhead: forward passes of each way."""
    memory_budget_gb: float = 24.0
    """full_size: memory that the largest batch must fit in, in units of 1e9 bytes."""
    output_dir: str = "checkpoints/benchmark_localization"
    """Where benchmark.json and the scores of each pair are written."""
    dry_run: bool = False
    """Check everything, print what would be measured, and stop."""


PretrainStage = Literal[
    "pictures",
    "tokenizer",
    "text_encoder",
    "vae",
    "unet",
    "unet_longer",
    "unet_clear",
    "classifier",
    "picture_classifier",
    "record",
]


@dataclass(frozen=True)
class PretrainConfig:
    """recipes/pretrain_phantom.py: the embedded base, from nothing, on generic captioned pictures."""

    stages: tuple[PretrainStage, ...] = get_args(PretrainStage)
    """What to run, in this order; a stage whose result exists is skipped, a stage that was cut off continues."""
    pictures: int = 30000
    """Training pictures of all stages but unet_clear and the classifiers."""
    resolution: int = 128
    """Side of a picture, in pixels."""
    vocabulary_size: int = 2500
    """Tokens of the byte-level BPE, the 512 bytes and the two special ones included."""
    text_encoder: TrainerConfig = field(default_factory=TrainerConfig)
    """Contrastive training."""
    vae: TrainerConfig = field(default_factory=TrainerConfig)
    """Autoencoder."""
    unet: TrainerConfig = field(default_factory=TrainerConfig)
    """U-Net, beside the trained text encoder and VAE."""
    unet_text_encoder: Literal["frozen", "full"] = "frozen"
    """Text encoder of the stage unet. frozen: that of the stage text_encoder, as Stable Diffusion is made. full: a new one,
    which the diffusion loss alone trains; to compare."""
    unet_longer: TrainerConfig = field(default_factory=TrainerConfig)
    """The same U-Net again, from where output_dir has it, with a learning rate that starts anew."""
    unet_clear: TrainerConfig = field(default_factory=TrainerConfig)
    """A third training of the U-Net of output_dir: on clear pictures, weighted by `min_snr_gamma`."""
    clear_pictures: int = 24000
    """Training pictures of the stage unet_clear."""
    min_snr_gamma: float = 5.0
    """Of the stage unet_clear (Hang et al. 2023): timesteps with little noise, which make most of the loss and little of what
    a picture shows, count less."""
    classifier: TrainerConfig = field(default_factory=TrainerConfig)
    """Finding classifier, on real phantoms."""
    classifier_images: int = 6000
    """Phantoms that the classifier is trained on."""
    picture_classifier: TrainerConfig = field(default_factory=TrainerConfig)
    """Object classifier, on real pictures: whether what the base draws in its own domain is recognised."""
    picture_classifier_images: int = 12000
    """Pictures that the object classifier is trained on, others than the base's held-out ones."""
    kl_weight: float = 1e-6
    """Weight of the VAE's KL term."""
    caption_dropout: float = 0.1
    """Probability that a caption is replaced by the empty one."""
    work_dir: str = "checkpoints/pretrain_phantom"
    """Rendered pictures, logs and states."""
    output_dir: str = "checkpoints/phantom-base"
    """The pipeline folder."""
    classifier_dir: str = "checkpoints/phantom-classifier"
    """The classifier's folder."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Of the base in its own domain: pictures, and clear pictures."""
    seed: int = 0
    """Seed of pictures, weights, order of data, noise and timesteps."""
    dry_run: bool = False
    """Check everything, print sizes and estimates, and stop."""

"""The trade-off in one run: arms from one base, evaluated alike, and one report.

    accelerate launch recipes/tradeoff.py --config recipes/configs/phantom/tradeoff_quick.yaml

    frozen     U-Net trained, text encoder frozen; it is also the teacher
    learnable  U-Net and text encoder trained
    distilled  like learnable, with the attention held to the frozen arm's
    continued  like distilled, started from the frozen arm's weights
    gated      like continued, only at the timesteps at which frozen localizes, and in the layers and token groups where it
               does so at least as well as learnable
    key_locked  like learnable, with the keys of cross-attention locked to the text encoder as it was; no teacher
    tail_penalized  like learnable, with a penalty on the attention mass of EOS and padding; no teacher
    self_taught  like learnable, with the attention held to that of its own U-Net under the text encoder of the base
    rali       like learnable, with the image's labels inserted first into the training captions (RaLI of the paper)
    rali_arm   like rali, with attention regularization (ARM of the paper)
    supervised  like learnable, with the attention of a finding's words drawn into its boxes or mask (TokenCompose)
    lora       LoRA on U-Net and text encoder, with the distillation from the frozen arm

Besides, `variants` names arms that are one of these with other options, such as one loss alone or another rank
(recipes/configs/phantom/tradeoff_objectives.yaml).

The same command again continues. Started several times at once, each takes the arms that no other is at, and the last to
end reports them all; with `seeds`, give each another order of seeds.

The losses are in distill/objectives.py; the loop is `fit` in distill/trainer.py.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from distill.arms import FROZEN_TEXT_ENCODER, OWN_TEACHERS, Arm, can_be_arm, is_gated, unused_options
from distill.cli import main, override
from distill.config import TradeoffConfig
from distill.errors import UserError, raise_all
from distill.runs import dry_run, evaluate_arm, finish, open_run, train_arm, trains_teacher
from distill.sharing import Job, finish_seeds, share_base, share_out

VARIED = ("distillation.", "denoising.", "lora.", "supervised_", "self_taught_")
VARIED_KEYS = (
    "method", "lora_learning_rate", "trainer.learning_rate", "trainer.text_encoder_learning_rate", "trainer.max_steps",
    "rali_arm_weight", "tail_penalty_weight",
)  # fmt: skip
"""Options of a variant: those that say how one arm is trained, and not what all arms share."""


def named_arms(config: TradeoffConfig) -> dict[str, Arm]:
    folder, full_rate, lora_rate = Path(config.output_dir), config.trainer.learning_rate, config.lora_learning_rate
    rate = full_rate if config.method == "full" else lora_rate
    text_rate = config.trainer.text_encoder_learning_rate or full_rate

    taught = replace(config.distillation, teacher=config.distillation.teacher or str(folder / "frozen"))

    def arm(name: str, text_encoder: Literal["frozen", "full"], **options: Any) -> Arm:
        return Arm(name, folder / name, config.method, text_encoder, rate, text_rate, **options)

    arms: dict[str, Arm] = {
        "frozen": arm("frozen", "frozen"),
        "learnable": arm("learnable", "full"),
        "distilled": arm("distilled", "full", distillation=taught),
        "key_locked": arm("key_locked", "full", lock_keys=True),
        "tail_penalized": arm(
            "tail_penalized", "full", denoising=replace(config.denoising, tail_weight=config.tail_penalty_weight)
        ),
        "continued": arm("continued", "full", distillation=replace(taught, start_from_teacher=True)),
        "gated": arm(
            "gated",
            "full",
            distillation=replace(
                taught,
                start_from_teacher=True,
                gate_reference=str(folder / "learnable") if "learnable" in config.arms else "base",
            ),
        ),
        "self_taught": arm(
            "self_taught",
            "full",
            distillation=replace(
                config.distillation,
                teacher=FROZEN_TEXT_ENCODER,
                start_from_teacher=False,
                batch_share=config.self_taught_batch_share,
                frozen_share=config.self_taught_frozen_share,
            ),
        ),
        "lora": Arm("lora", folder / "lora", "lora", "lora", lora_rate, lora_rate, distillation=taught),
        "rali": arm("rali", "full", denoising=replace(config.denoising, insert_labels="first")),
        "rali_arm": arm(
            "rali_arm",
            "full",
            denoising=replace(config.denoising, insert_labels="first", arm_weight=config.rali_arm_weight),
        ),
    }
    arms["supervised"] = arm(
        "supervised",
        "full",
        denoising=replace(
            config.denoising,
            region_token_weight=config.supervised_token_weight,
            region_pixel_weight=config.supervised_pixel_weight,
        ),
    )
    return arms


def variant(config: TradeoffConfig, name: str) -> Arm:
    """One of `variants`. Raises a UserError that lists what is wrong with it."""
    base, *words = shlex.split(config.variants[name]) or [""]
    arms = named_arms(config)
    if not re.fullmatch(r"\w[\w.-]*", name) or not can_be_arm(name) or name in (*arms, "base"):
        raise UserError(
            "another name is needed, of letters, digits, '_', '-' and '.', that no arm and no other entry of a run folder has"
        )
    if base not in arms:
        raise UserError(f"{base!r} is no arm; there are {', '.join(arms)}")
    other, keys = override(config, words)
    arm = named_arms(other)[base]
    shared = [key for key in keys if not key.startswith(VARIED) and key not in VARIED_KEYS]
    raise_all("options that all arms share", [f"{key}: set it for the whole run" for key in shared])
    unread = unused_options(replace(other, arms=(base,), variants={}), [arm])  # type: ignore[arg-type]
    idle = [(key, name) for key in keys for name in unread if key == name or key.startswith(f"{name}.")]
    raise_all("options without effect", [f"{key}: {unread[name]}" for key, name in idle])
    used = {"distillation": arm.distillation, "denoising": arm.denoising or other.denoising, "method": arm.method}
    for key in keys:
        group, option, *_ = [*key.split("."), ""]
        asked, has = getattr(other, group), used.get(group)
        if has is not None and (getattr(asked, option, asked) != getattr(has, option, has)):
            raise UserError(f"{key}: {base} has its own, {getattr(has, option, has)!r}")
    return replace(
        arm,
        name=name,
        folder=Path(config.output_dir) / name,
        denoising=arm.denoising or (other.denoising if other.denoising != config.denoising else None),
        lora=other.lora,
        max_steps=other.trainer.max_steps,
        variant_of=base,
    )


def arms_of(config: TradeoffConfig) -> list[Arm]:
    chosen = [arm for name, arm in named_arms(config).items() if name in config.arms]
    faults = []
    for name in config.variants:
        try:
            chosen.append(variant(config, name))
        except (UserError, ValueError) as error:  # ValueError: a quotation mark that is not closed
            faults.append(f"variants.{name}: {error}")
    raise_all("arms that cannot be trained", faults)
    for arm in chosen:
        c = arm.distillation
        if c and c.start_from_teacher and c.teacher in OWN_TEACHERS:
            raise UserError(
                f"arms: {arm.name} starts from a teacher of weights of its own, and distillation.teacher is {c.teacher}"
            )
    taught_by_frozen = [arm.name for arm in chosen if trains_teacher(config, arm)]
    if "frozen" not in config.arms and taught_by_frozen:
        raise UserError(
            f"arms: {', '.join(taught_by_frozen)} need the arm frozen as their teacher, or distillation.teacher"
        )
    return chosen


def one_seed(config: TradeoffConfig) -> None:
    arms = arms_of(config)
    run = open_run(config, arms=arms)
    if config.dry_run:
        return dry_run(run, arms)
    results: dict[str, Any] = {}

    def base() -> None:
        results["base"] = evaluate_arm(run, "base", None)

    def make(arm: Arm) -> None:
        cost = train_arm(run, arm)
        results[arm.name] = evaluate_arm(run, arm.name, arm.folder, cost, arm)

    def needs(arm: Arm) -> list[str]:
        own = ["frozen"] if trains_teacher(config, arm) else []
        return own + (["learnable"] if is_gated(arm) and "learnable" in config.arms else [])

    jobs = {"base": Job(base)} | {arm.name: Job(partial(make, arm), needs(arm)) for arm in arms}
    share_out(run, jobs)
    results = {name: results[name] for name in jobs}
    next_command = f"open {Path(config.output_dir) / 'report.html'}"
    if config.data.kind == "phantom":
        next_command = "accelerate launch recipes/tradeoff.py --config recipes/configs/phantom/tradeoff.yaml"
    finish(run, results, next_command)


def tradeoff(config: TradeoffConfig) -> None:
    if not config.seeds or config.dry_run:
        return one_seed(replace(config, seeds=()))
    if config.seed:
        raise UserError(f"seed is {config.seed} and seeds is {list(config.seeds)}; give one of the two")
    folder = Path(config.output_dir)
    for seed in config.seeds:
        one = replace(config, seed=seed, seeds=(), output_dir=str(folder / f"seed-{seed}"))
        share_base(folder, one)
        one_seed(one)
    finish_seeds(folder)


if __name__ == "__main__":
    main(tradeoff, TradeoffConfig)

"""Options that make no sense are refused with key, value and what is legal, in every recipe; so are hostile files."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter
from recipe import ROOT, config_class_of, recipe_module, refusal_of

from distill.cli import parse, to_yaml
from distill.config import EvaluationConfig, FullEvaluation, MapEvaluation, TrainerConfig
from distill.configuration.options import KIND, field_types, models_of
from distill.errors import UserError
from distill.methods.options import AttentionMatch, SupervisedAttentionOptions
from distill.methods.training import Training
from distill.settings import Settings

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
CLASSES = {name: config_class_of(recipe_module(name)) for name in RECIPES}
NEEDED = {"compare": ["--arms={a: x, b: y}"], "swap_text_encoder": ["--text_encoder", "x"]}
"""Options without a default."""

REFUSED = [
    ("finetune", "--seed=4294967296", "seed: expected a whole number"),
    ("finetune", "--seed=9223372036854775808", "seed: expected a whole number"),
    ("tradeoff", "--seeds=[1,1]", "seeds: each only once"),
    ("tradeoff", "--seeds=[4294967296]", "seeds[0]: expected"),
    ("tradeoff", "--compare_to=[base,base]", "compare_to: expected each only once, got 'base'"),
    ("compare", "--seeds=[3,3]", "seeds: expected each only once, got 3"),
    ("compare", "--compare_to=[' ']", "compare_to[0]: expected text that is not blank"),
    ("finetune", "--data.seed=4294967296", "data.seed: expected"),
    ("finetune", "--data.resolution=1", "data.resolution: expected a whole number from 8 to 16384, got 1"),
    ("finetune", "--data.resolution=65536", "data.resolution: expected"),
    ("finetune", "--data.cache_dir= ", "data.cache_dir: expected text that is not blank"),
    ("finetune", "--data.train_size=2147483647", "data.train_size: expected"),
    ("finetune", "--base.revision= ", "base.revision: expected text that is not blank"),
    ("finetune", "--base.variant=", "base.variant: expected text that is not blank"),
    ("finetune", "--base.name=a\0b", "base.name: expected text without NUL"),
    ("finetune", "--base.name=" + "a" * 5000, "base.name: expected text that is not blank"),
    ("finetune", "--lora.alpha=1e6", "lora.alpha: expected a number above 0"),
    ("finetune", "--lora.rank=2147483648", "lora.rank: expected"),
    ("finetune", "--lora.denoiser_targets=[to_q,to_q]", "lora.denoiser_targets: expected each only once, got 'to_q'"),
    ("finetune", "--lora.text_encoder_targets=[q_proj]", "lora.text_encoder_targets is set, and text_encoder is frozen"),
    ("finetune", "--denoising.min_snr_gamma=1e6", "denoising.min_snr_gamma: expected a number above 0"),
    ("finetune", "--denoising.training_text=paraphrases", "training_text is paraphrases, and none are given"),
    ("finetune", "--denoising.caption_dropout_label= ", "denoising.caption_dropout_label: expected text"),
    ("finetune", "--trainer.batch_size=1000000", "trainer.batch_size: expected"),
    ("finetune", "--trainer.gradient_accumulation_steps=1000000", "trainer.gradient_accumulation_steps: expected"),
    ("finetune", "--trainer.learning_rate=2", "trainer.learning_rate: expected a number from 1e-12 to 1, got 2"),
    ("finetune", "--trainer.learning_rate=1e-300", "trainer.learning_rate: expected a number from 1e-12 to 1"),
    ("finetune", "--trainer.text_encoder_learning_rate=1e-5", "trainer.text_encoder_learning_rate is 1e-05, and the text"),
    ("compress", "--trainer.text_encoder_learning_rate=1e-5", "trainer.text_encoder_learning_rate is 1e-05, and the text"),
    ("finetune", "--trainer.weight_decay=1e30", "trainer.weight_decay: expected a number from 0 to 1"),
    ("finetune", "--trainer.weight_decay=2", "trainer.weight_decay: expected a number from 0 to 1"),
    ("finetune", "--trainer.num_workers=1000", "trainer.num_workers: expected"),
    ("finetune", "--trainer.max_steps=2147483647", "trainer.max_steps: expected"),
    ("finetune", "--trainer.warmup_steps=1001", "warmup_steps is 1001, above max_steps, 1000"),
    ("finetune", "--trainer.checkpoint_every_steps=1001", "checkpoint_every_steps is 1001, above max_steps, 1000"),
    ("finetune", "--trainer.sample_every_steps=1001", "sample_every_steps is 1001, above max_steps, 1000"),
    ("finetune", "--keep=loss", "keep is loss, and trainer.validate_every_steps is not set"),
    ("tradeoff", "--keep=loss", "unknown key keep"),
    ("finetune", "--trainer.validate_every_steps=1001", "validate_every_steps is 1001, above max_steps, 1000"),
    ("finetune", "--evaluation.timesteps=[100,100]", "evaluation.timesteps: expected each only once, got 100"),
    ("finetune", "--evaluation.timesteps=[2147483647]", "evaluation.timesteps[0]: expected"),
    ("robustness", "--evaluation.timesteps=[7,7]", "evaluation.timesteps: expected each only once, got 7"),
    ("atlas", "--timesteps=[7,7]", "timesteps: expected each only once, got 7"),
    ("atlas", "--runs=[a,a]", "runs: expected each only once, got 'a'"),
    ("atlas", "--max_timesteps=100000", "max_timesteps: expected"),
    ("robustness", "--runs=[a,a]", "runs: expected each only once, got 'a'"),
    ("explain", "--images=[a,a]", "images: expected each only once, got 'a'"),
    ("explain", "--images=[a] --run=b", "images is set, so that none are drawn, and run is b"),
    ("explain", "--drawing.count=9", "drawing.count: expected"),
    ("finetune", "--evaluation.layers=[a,a]", "evaluation.layers: expected each only once, got 'a'"),
    ("finetune", "--evaluation.num_inference_steps=1001", "evaluation.num_inference_steps: expected"),
    ("finetune", "--evaluation.bootstrap_samples=2000000", "evaluation.bootstrap_samples: expected"),
    ("finetune", "--evaluation.batch_size=1000000", "evaluation.batch_size: expected"),
    ("finetune", "--evaluation.examples=2000", "evaluation.examples: expected"),
    ("finetune", "--evaluation.parts=[quality,quality]", "evaluation.parts: expected each only once, got 'quality'"),
    ("evaluate", "--evaluation.orphan_share=0.5", "orphan_share is 0.5, and map_threshold is none"),
    ("atlas", "--evaluation.orphan_share=0.5", "orphan_share is 0.5, and map_threshold is none"),
    ("evaluate", "--run= ", "run: expected text that is not blank"),
    ("compress", "--run=", "run: expected text that is not blank"),
    ("compress", "--bits=[nf4,nf4]", "bits: expected each only once, got 'nf4'"),
    ("compress", "--blocks.remove_stages=1000", "blocks.remove_stages: expected a whole number from 0 to 16"),
    ("compress", "--blocks.layers_per_block=1000", "blocks.layers_per_block: expected"),
    ("compress", "--blocks.transformer_layers=100000", "blocks.transformer_layers: expected"),
    ("distill_attention", "--method.max_timestep=2147483647", "method.max_timestep: expected"),
    ("distill_attention", "--method.layers=[a,a]", "method.layers: expected each only once, got 'a'"),
    ("distill_attention", "--method.token_kl_weight=1e22", "method.token_kl_weight: expected"),
    ("distill_steps", "--lora.text_encoder_targets=[q_proj]", "lora.text_encoder_targets is set"),
    ("benchmark_localization", "--parts=[paper,paper]", "parts: expected each only once, got 'paper'"),
    ("pretrain_phantom", "--stages=[]", "stages: expected"),
    ("pretrain_phantom", "--stages=[vae,vae]", "stages: expected each only once, got 'vae'"),
    ("pretrain_phantom", "--resolution=100", "resolution: expected"),
    ("pretrain_phantom", "--vocabulary_size=2147483647", "vocabulary_size: expected"),
    ("pretrain_phantom", "--unet.checkpoint_every_steps=5000", "checkpoint_every_steps is 5000, above max_steps, 1000"),
    ("swap_text_encoder", "--max_tokens=1", "max_tokens: expected"),
    ("swap_text_encoder", "--model_type= ", "model_type: expected text that is not blank"),
    ("finetune", "--data.kind=folder --data.findings=[a,a]", "data.findings: expected each only once, got 'a'"),
    ("finetune", "--data.kind=folder --data.query_words={a: []}", "data.query_words.a: expected"),
    *((name, "--output_dir=\t", "output_dir: expected text that is not blank") for name in RECIPES if name != "verify"),
]  # fmt: skip


def words_of(recipe: str, text: str) -> list[str]:
    """Words of a command line; only an option may begin after a space."""
    return [*NEEDED.get(recipe, []), *(f"--{word}" for word in text.removeprefix("--").split(" --"))]


@pytest.mark.parametrize(("recipe", "text", "said"), REFUSED, ids=lambda value: str(value)[:60])
def test_an_option_that_makes_no_sense_is_refused(recipe: str, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(CLASSES[recipe], words_of(recipe, text))
    assert said in str(caught.value)


def test_adapter_options_without_an_adapter_are_refused_before_anything_is_loaded() -> None:
    with pytest.raises(UserError, match="lora options are set, and denoiser is full"):
        parse(CLASSES["distill_steps"], ["--denoiser", "full", "--lora.rank", "4"])


# --- random options ----------------------------------------------------------------------------------------------------

ABSURD: tuple[Any, ...] = (
    2**63, 2**31, -1, 0, 1, 10**30, 1e30, -1e-9, 1e-320, "nan", "inf", "", " ", "a\0b", "x" * 5000, "null", None, True, [],
    [1, 1], [-1], ["a", "a"], [" "], [[]], {}, {"a": 1}, {" ": []}, "!!python/object:os.system", "\u2028", "~",
)  # fmt: skip


def leaves(model: type[Settings], prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """(chooser, dotted key, type) of every option. chooser: what has to be given first, such as --data.kind=coco."""
    for name, hint in field_types(model).items():
        models = models_of(hint)
        for kind, inner in models.items():
            chooser = f"--{prefix}{name}.{KIND}={kind}" if len(models) > 1 else ""
            yield from ((chooser or deeper, *rest) for deeper, *rest in leaves(inner, f"{prefix}{name}."))  # type: ignore[misc]
        if not models and name != KIND:
            yield "", f"{prefix}{name}", hint


def legal(schema: dict[str, Any], rng: random.Random) -> Any:
    """A value of a JSON schema: within its bounds, or just at them."""
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return legal(rng.choice(options), rng)
    if "enum" in schema or "const" in schema:
        return rng.choice(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
    high = schema.get("maximum", schema.get("exclusiveMaximum", 1))
    if kind == "integer":
        return rng.choice([low, high, rng.randint(low, high), min(high, low + rng.randint(0, 2000))])
    if kind == "number":
        return rng.choice([low, high, rng.uniform(low, high), min(high, low + 10 ** rng.uniform(-6, 0))])
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "string":
        return rng.choice(["a", "to_q", "checkpoints/x", "up_blocks", "ß x"])
    if kind == "array":
        inner = schema.get("prefixItems") or [schema.get("items", {})] * rng.randint(schema.get("minItems", 0), 3)
        return [legal(item, rng) for item in inner]
    if kind == "object":
        return {}
    return None


def draw(recipe: str, rng: random.Random, absurd_share: float = 0.25) -> list[str]:
    """A command line of some random options."""
    options = list(leaves(CLASSES[recipe]))
    words = list(NEEDED.get(recipe, []))
    for chooser, key, hint in rng.sample(options, rng.randint(1, min(6, len(options)))):
        is_absurd = rng.random() < absurd_share
        value = rng.choice(ABSURD) if is_absurd else legal(TypeAdapter(hint).json_schema(), rng)
        text = value if isinstance(value, str) else json.dumps(value)
        words += [chooser] * bool(chooser) + [f"--{key}={text}"]
    return words


def parts_of(value: Any) -> Iterator[Any]:
    """Every value of a configuration, groups too."""
    yield value
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from parts_of(getattr(value, name))
    elif isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from parts_of(child)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from parts_of(child)


def violations(config: Settings) -> Iterator[str]:
    """What no accepted configuration may have, whatever its recipe."""
    for part in parts_of(config):
        if isinstance(part, float) and not (math.isfinite(part) and abs(part) <= 1e6):
            yield f"the number {part}"
        if isinstance(part, int) and not 0 <= part < 2**32:
            yield f"the whole number {part}"
        if isinstance(part, str) and (not part.strip() or "\0" in part or len(part) > 4096):
            yield f"the text {part[:20]!r}"
        if isinstance(part, tuple) and len(set(part)) < len(part) and not all(isinstance(v, float) for v in part):
            yield f"a value several times in {part}"
        if isinstance(part, TrainerConfig):
            every = (part.checkpoint_every_steps, part.sample_every_steps, part.validate_every_steps, part.warmup_steps)
            if any(steps is not None and steps > part.max_steps for steps in every):
                yield "steps above max_steps"
            if not (1e-12 <= part.learning_rate <= 1 and part.weight_decay <= 1):
                yield "a rate"
        if isinstance(part, (EvaluationConfig, MapEvaluation)) and not 8 <= part.batch_size * 8 <= 2**19:
            yield "a batch"
        if isinstance(part, FullEvaluation) and part.scheduler == "lcm" and part.num_inference_steps > 50:
            yield "steps of LCM"
        if isinstance(part, (FullEvaluation, MapEvaluation)) and part.orphan_share and part.map_threshold == "none":
            yield "a share of nothing"
        if isinstance(part, AttentionMatch) and part.min_timestep > part.max_timestep:
            yield "no timestep"
        if isinstance(part, SupervisedAttentionOptions) and not (part.arm_weight or part.reads_regions):
            yield "a method that does nothing"
        if isinstance(part, Training) and part.denoiser == part.text_encoder == "frozen":
            yield "nothing is trained"


def try_many(count: int) -> tuple[int, int]:
    """Parse `count` random command lines; how many were accepted and refused. No other exception may come."""
    rng, accepted = random.Random(0), 0
    for _ in range(count):
        recipe = rng.choice(RECIPES)
        words = draw(recipe, rng)
        try:
            config = parse(CLASSES[recipe], words)
        except UserError as error:
            assert "is not valid" in str(error)
            continue
        accepted += 1
        assert list(violations(config)) == [], words
        assert type(config).model_validate_json(json.dumps(config.model_dump(mode="json")), strict=True) == config
        assert to_yaml(config)
    return accepted, count - accepted


def test_random_options_are_legal_or_refused() -> None:
    accepted, refused = try_many(200)
    assert accepted > 20 and refused > 20


@pytest.mark.slow
def test_many_random_options_are_legal_or_refused() -> None:
    accepted, refused = try_many(2000)
    print(f"\n2000 random command lines: {accepted} accepted, {refused} refused")
    assert accepted > 200 and refused > 200


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["finetune", "evaluate"])
def test_random_options_that_are_legal_pass_a_dry_run_or_are_refused(recipe: str, tmp_path: Path) -> None:
    from tiny import save_tiny

    base, rng, done = save_tiny(tmp_path / "sd"), random.Random(1), 0
    small = [
        f"--base.name={base}", "--data.kind=phantom", "--data.resolution=64", "--data.train_size=4", "--data.test_size=4",
        "--data.validation_size=2", "--evaluation.localization_images=2", "--evaluation.generated_images=2",
        "--evaluation.diversity_captions=1", "--evaluation.diversity_samples=2", "--evaluation.num_inference_steps=2",
        "--evaluation.batch_size=2", "--evaluation.bootstrap_samples=2", "--evaluation.examples=1", "--dry_run=true",
        f"--output_dir={tmp_path / 'out'}",
    ]  # fmt: skip
    if recipe == "finetune":
        small += ["--trainer.batch_size=2", "--trainer.tracker=none", "--trainer.num_workers=0", "--lora.rank=2",
                  "--trainer.gradient_accumulation_steps=1", "--denoiser=lora"]  # fmt: skip
    while done < 10:
        words = [word for word in draw(recipe, rng, absurd_share=0) if not word.startswith(("--data.", "--base."))]
        try:
            config = parse(CLASSES[recipe], [*words, *small])
        except UserError:
            continue
        done += 1
        try:
            getattr(recipe_module(recipe), recipe)(config)
        except UserError as error:
            assert str(error)
        assert not (tmp_path / "out").exists(), "a dry run writes nothing"


# --- files -------------------------------------------------------------------------------------------------------------

FILES: dict[str, bytes] = {
    "NUL": b"seed: \0\n",
    "NUL in a text": b'output_dir: "a\\0b"\n',
    "not UTF-8": b"output_dir: \xff\n",
    "a list": b"[1, 2]\n",
    "a number": b"7\n",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "repeated key": b"seed: 1\nseed: 2\n",
    "unknown key": b"sed: 1\n",
    "key that is no text": b"3: 1\n",
    "tag": b"seed: !!python/object/apply:os.system ['touch ran']\n",
    "object": b"seed: !!python/object/new:os.system [touch ran]\n",
    "billion laughs": b"a: &a [x, x]\n"
    + b"".join(b"%c: &%c [*%c, *%c]\n" % (c + 1, c + 1, c, c) for c in range(97, 121)),
    "anchor in itself": b"data: &a {b: *a}\n",
    "alias of nothing": b"data: *a\n",
    "nested": b"data: " + b"[" * 10_000,
    "nested mappings": b"".join(b" " * i + b"a:\n" for i in range(2000)),
    "tab": b"data:\n\tkind: phantom\n",
    "control characters": b"output_dir: \x1b[31m\n",
    "a huge number": b"seed: " + b"9" * 10_000 + b"\n",
    "inf": b"trainer: {learning_rate: .inf}\n",
    "nan": b"trainer: {learning_rate: .nan}\n",
    "a date": b"output_dir: 2024-01-01\nseed: 2024-01-01\n",
    "half": b"trainer: {max_steps: 3\n",
}


@pytest.mark.parametrize("flag", ["", "--print_config"])
@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_one_clear_error(
    name: str, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.yaml"
    path.write_bytes(FILES[name])
    message = refusal_of(
        lambda config: None, CLASSES["finetune"], ["--config", str(path), *([flag] if flag else [])], capsys
    )
    assert "hostile.yaml" in message and len(message) < 3000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "."], "config file . cannot be read: Is a directory"),
        (["--config", ""], "config file"),
        (["--config", "a\0b"], "config file"),
        (["--config", "/dev/null/x"], "config file /dev/null/x cannot be read"),
        (["--config", "x" * 5000], "config file"),
        (["--config"], "--config needs a value"),
        (["--print_config", "--seed", "x"], "seed: expected a whole number"),
        (["--print_config", "--sed", "1"], "unknown key sed; did you mean seed?"),
        (["--seed", "1", "seed"], "unexpected argument 'seed'"),
        (["--", "--seed"], "unexpected argument '--'"),
    ],
)
def test_a_hostile_command_line_is_one_clear_error(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal_of(lambda config: None, CLASSES["finetune"], words, capsys)


@pytest.mark.parametrize("place", ["file/below", "loop/below", "n" * 300])
def test_an_output_folder_that_no_system_can_make_is_one_clear_error(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("loop").symlink_to("loop")
    message = refusal_of(
        lambda config: Path(config.output_dir).mkdir(parents=True), CLASSES["finetune"], ["--output_dir", place], capsys
    )
    assert "choose another output_dir" in message and place[:20] in message


def test_help_answers_whatever_else_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(CLASSES["finetune"], ["--seed", "x", "--sed", "1", "--config", "nowhere.yaml", "--help"])
    assert caught.value.code == 0 and "--trainer.max_steps" in capsys.readouterr().out

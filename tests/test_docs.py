"""Code and commands of the documents run as written: README.md, checkpoints/*.md, recipes/**/*.md, and the cards of a
run."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from recipe import ROOT, recipe_module
from tiny import tiny_sd
from transformers import BertConfig, BertModel, CLIPTextModel, ResNetForImageClassification

from distill.cli import parse
from distill.config import BaseConfig
from distill.metrics.features import PHANTOM_CLASSIFIER
from distill.models import load_model
from distill.models.loading import PHANTOM_BASE
from distill.report import write_model_card

DOCUMENTS = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "checkpoints").glob("*.md"),
        *(ROOT / "recipes").rglob("*.md"),
        *(ROOT / "distill").glob("*.md"),
    ]
)
CARDS = ("frozen", "learnable", "distilled", "lora")
FEW = [
    "--trainer.max_steps", "1", "--trainer.warmup_steps", "0", "--trainer.batch_size", "2", "--trainer.tracker", "none",
    "--data.train_size", "2", "--data.test_size", "4", "--evaluation.localization_images", "2",
    "--evaluation.timesteps", "[450]", "--evaluation.generated_images", "2", "--evaluation.num_inference_steps", "1",
    "--evaluation.diversity_captions", "1", "--evaluation.diversity_samples", "2", "--evaluation.examples", "1",
    "--evaluation.bootstrap_samples", "10", "--evaluation.features", "none",
    "--arms.lora.denoiser", "lora", "--arms.lora.text_encoder", "lora",
]  # fmt: skip


# --- links --------------------------------------------------------------------------------------------------------


def anchors(document: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> list[str]:
    """Targets in the project that are not there: files, and headings of documents."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not target.startswith(("http:", "https:")) and (
            not file.exists() or (anchor and anchor not in anchors(file))
        ):
            found.append(target)
    return found


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    assert not broken_links(document)


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# Is it, then?\n```\n# no heading\n```\n", encoding="utf-8")
    good = "[a](other.md) [b](other.md#is-it-then) [c](https://example.org/x) [d](#here) ![e](other.md)"
    bad = "[f](missing.md) [g](other.md#no-heading) [h](#there) ![i](p.png)"
    (tmp_path / "document.md").write_text(f"## Here\n{good}\n{bad}\n", encoding="utf-8")
    assert broken_links(tmp_path / "document.md") == ["missing.md", "other.md#no-heading", "#there", "p.png"]


# --- Python -------------------------------------------------------------------------------------------------------


def python_blocks(document: Path) -> list[tuple[int, str]]:
    """(line, code) of each fenced block of Python."""
    text = document.read_text(encoding="utf-8")
    found = re.finditer(r"^```python *\n(.*?)^``` *$", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The layout that the documents speak of: the bundled base, and the demo's run with one step an arm."""
    root = tmp_path_factory.mktemp("project")
    (root / "checkpoints").mkdir()
    for folder in (PHANTOM_BASE, PHANTOM_CLASSIFIER):
        (root / "checkpoints" / folder.name).symlink_to(folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.chdir(root)
        config = ["--config", str(ROOT / "recipes/configs/phantom/tradeoff_quick.yaml"), *FEW]
        recipe_module("tradeoff").tradeoff(parse(recipe_module("tradeoff").TradeoffConfig, config))
        yield root


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every pipeline that is loaded while the test runs; they draw in two steps, not 50."""
    made: list[Any] = []
    original = DiffusionPipeline.from_pretrained.__func__  # type: ignore[attr-defined]

    def recorded(cls: type, *arguments: Any, **options: Any) -> Any:
        made.append(original(cls, *arguments, **options))
        return made[-1]

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(recorded))
    draw = StableDiffusionPipeline.__call__

    @functools.wraps(draw)
    def in_few_steps(*arguments: Any, **options: Any) -> Any:
        return draw(*arguments, **{"num_inference_steps": 2} | options)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", in_few_steps)
    return made


def run_blocks(document: Path, pipelines: list[Any]) -> None:
    """Run the blocks one after the other, as a reader does, and draw with each pipeline that they load."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    for line, code in python_blocks(document):
        exec(compile("\n" * (line - 1) + code, str(document), "exec"), scope)
    for pipe in pipelines:
        pipe.set_progress_bar_config(disable=True)
        parts = [module for module in pipe.components.values() if isinstance(module, torch.nn.Module)]
        assert {parameter.dtype for module in parts for parameter in module.parameters()} == {torch.float32}
        image = np.asarray(pipe("a small pleural effusion").images[0], dtype=float)
        assert image.std() > 0


def test_the_documents_have_python_blocks() -> None:
    assert python_blocks(ROOT / "README.md")


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if python_blocks(d)], ids=lambda path: str(path.relative_to(ROOT))
)
def test_python_blocks_run_as_written(document: Path, project: Path, pipelines: list[Any]) -> None:
    run_blocks(document, pipelines)


@pytest.mark.parametrize("arm", CARDS)
def test_the_code_of_a_model_card_runs(arm: str, project: Path, pipelines: list[Any]) -> None:
    card = project / "checkpoints" / "tradeoff_quick" / arm / "README.md"
    run_blocks(card, pipelines)
    assert len(pipelines) == 1
    trained = load_model(BaseConfig(), run=card.parent).pipeline
    for part in ("unet", "text_encoder"):
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in (pipelines[0], trained))
        ours = {name.replace("default_0", "default"): value for name, value in ours.items()}
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_code_of_a_model_card_runs_on_a_base_in_half_precision_with_another_text_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipelines: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    pipe = tiny_sd()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = BertModel(BertConfig(vocab_size=len(pipe.tokenizer), **sizes)).eval()
    encoder.save_pretrained(tmp_path / "run" / "text_encoder")
    pipe.register_modules(text_encoder=encoder)
    pipe.to(torch.float16).save_pretrained(tmp_path / "base")
    cost = dict.fromkeys(("train_seconds", "steps", "peak_memory_gb", "evaluation_seconds", "trainable_parameters"))
    entry = {"localization": None, "quality": None, "cost": cost}
    export = {"text_encoder": "text_encoder"}
    card = write_model_card(tmp_path / "run", entry, {}, {}, base_name="base", export=export)
    # The card shows no folder of the machine that wrote it; the user puts in the base.
    card.write_text(card.read_text(encoding="utf-8").replace("'BASE'", "'base'"), encoding="utf-8")
    run_blocks(card, pipelines)
    assert type(pipelines[0].text_encoder) is BertModel


# --- what stock loaders give --------------------------------------------------------------------------------------


def test_stock_loading_gives_float32_and_the_weights_of_our_loader() -> None:
    stock, ours = StableDiffusionPipeline.from_pretrained(PHANTOM_BASE), load_model(BaseConfig()).pipeline
    for part in ("unet", "vae", "text_encoder"):
        found, wanted = getattr(stock, part).state_dict(), getattr(ours, part).state_dict()
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            assert value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]), f"{part} {name}"
    parts = (CLIPTextModel.from_pretrained(PHANTOM_BASE / "text_encoder"), stock.unet)
    parts += (ResNetForImageClassification.from_pretrained(PHANTOM_CLASSIFIER),)
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}


# --- commands -----------------------------------------------------------------------------------------------------


def commands(document: Path) -> list[str]:
    """`accelerate launch ...` of fenced blocks, and code spans that name a recipe and its options."""
    text = re.sub(r"\\\n\s*", " ", document.read_text(encoding="utf-8"))
    found = [line.strip() for line in text.splitlines() if re.match(r"\s*(?:# )?accelerate launch ", line)]
    found += re.findall(r"(?<!`)`(accelerate launch [^`\n]+)`", text)
    scripts = "|".join(path.name for path in (ROOT / "recipes").glob("*.py"))
    spans = re.findall(rf"`((?:{scripts})(?: \.\.\.)? --[^`\n]+)`", text)
    # An option without a value is spoken of, and not a command.
    found += [f"accelerate launch recipes/{span}" for span in spans if not re.search(r"--[\w.]+$", span)]
    return [command.removeprefix("# ") for command in found]


NAMED = sorted({(str(path.relative_to(ROOT)), command) for path in DOCUMENTS for command in commands(path)})


def test_the_documents_name_commands() -> None:
    assert NAMED


@pytest.mark.parametrize(("document", "command"), NAMED)
def test_commands_parse(document: str, command: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Of accelerate's own options, the recipe, its configuration and its options; words in capitals stand for paths."""
    words = [word for word in shlex.split(command, comments=True) if word not in ("...", "…")]
    if words[2:] in (["recipes/..."], ["--quiet", "recipes/..."]):
        return  # stands for any recipe
    launched = launch_command_parser().parse_args(words[2:])
    assert (ROOT / launched.training_script).is_file(), f"{document}: {launched.training_script} is no file"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [launched.training_script, *launched.training_script_args, "--print_config"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(launched.training_script, run_name="__main__")
    printed = capfd.readouterr()
    assert stopped.value.code == 0, f"{document}: {command}\n{printed.err}"

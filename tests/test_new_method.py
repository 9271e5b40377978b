"""A method is one file and one line: a toy one is added to a copy of the project and trained from its command line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from recipe import ROOT
from tiny import save_tiny

from distill.config import BaseConfig
from distill.models import load_model

TOY = '''\
"""A penalty on the size of the prediction."""

from typing import Literal

import torch

from distill.data.batch import Batch
from distill.methods.base import Method, Terms
from distill.methods.options import Options
from distill.settings import Weight


class ToyOptions(Options):
    """The diffusion loss, and a penalty on the size of what is predicted."""

    kind: Literal["toy"] = "toy"
    """What is minimized."""
    strength: Weight = 1.0
    """Weight of the penalty."""


class Toy(Method):
    """Fine-tune, and predict little."""

    options: ToyOptions

    def forward(self, batch: Batch, generator: torch.Generator) -> Terms:
        x = self.noised(batch, generator)
        prediction = self.predict_student(x)
        denoising, size = self.denoising_loss(prediction, x), prediction.float().square().mean()
        return {"loss": denoising + self.options.strength * size, "denoising": denoising, "size": size}
'''
REGISTRY = '    ConsistencyOptions: "consistency:Consistency",\n'
LINE = '    ToyOptions: "toy:Toy",\n'
IMPORT = "\nif TYPE_CHECKING:\n    from"
OPTIONS = [
    "--data.resolution", "64", "--data.train_size", "6", "--data.test_size", "6", "--trainer.max_steps", "2",
    "--trainer.batch_size", "2", "--trainer.tracker", "none", "--trainer.log_every_steps", "1", "--trainer.learning_rate",
    "1e-2", "--evaluation.localization_images", "3", "--evaluation.generated_images", "3", "--evaluation.features", "none",
    "--evaluation.num_inference_steps", "2", "--evaluation.diversity_captions", "1", "--evaluation.timesteps", "300",
    "--evaluation.diversity_samples", "2", "--evaluation.examples", "1", "--evaluation.bootstrap_samples", "10",
    "--evaluation.parts", "localization",
]  # fmt: skip


def run(project: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "recipes/finetune.py", *argv],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project)},
        capture_output=True,
        text=True,
    )


def test_a_toy_method_needs_one_file_and_its_class_in_the_registry(tmp_path: Path) -> None:
    project, out = tmp_path / "project", tmp_path / "run"
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for folder in ("distill", "recipes"):
        shutil.copytree(ROOT / folder, project / folder, ignore=ignored)
    (project / "distill/methods/toy.py").write_text(TOY, encoding="utf-8")
    registry = project / "distill/methods/__init__.py"
    text = registry.read_text(encoding="utf-8")
    assert text.count(REGISTRY) == 1 and text.count(IMPORT) == 1
    with_toy = text.replace(REGISTRY, REGISTRY + LINE).replace(
        IMPORT, f"from distill.methods.toy import ToyOptions\n{IMPORT}"
    )
    registry.write_text(with_toy, encoding="utf-8")

    listed = run(project, "--method.kind", "toy", "--help")
    assert listed.returncode == 0 and "--method.strength" in listed.stdout, listed.stderr

    base = save_tiny(tmp_path / "base")
    argv = ["--base.name", str(base), "--output_dir", str(out), "--data.cache_dir", str(tmp_path / "cache"), *OPTIONS]
    done = run(project, "--method.kind", "toy", "--method.strength", "0.5", *argv)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (out / "model/train_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["size"] > 0 and abs(row["loss"] - row["denoising"] - 0.5 * row["size"]) < 1e-5
    trained, before = load_model(BaseConfig(name=str(base)), run=out), load_model(BaseConfig(name=str(base)))
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in trained.denoiser.named_parameters())
    latents, timesteps, conditions = trained.family.example_inputs(trained, 1, 8)
    with torch.no_grad():
        after, plain = (m.family.predict(m.denoiser, latents, timesteps, conditions) for m in (trained, before))
    assert not torch.equal(after, plain)

    refused = run(project, "--method.strength", "0.5", *argv)
    assert refused.returncode == 2
    assert "an option of method.kind toy; method.kind is denoising" in refused.stderr

"""Imports go one way, the library never imports recipes, and nothing optional is imported at import time."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
LAYERS = (
    ("errors", "processes", "settings"),
    ("configuration", "devices", "draws", "files", "interrupts", "losses", "memory", "tokens"),
    ("agreement", "checkpoints", "data_config"),
    ("config",),
    ("cli", "models"),
    ("attention", "data"),
    ("methods", "metrics", "trainer"),
    ("evaluation",),
    ("report",),
    ("experiment",),
)
"""A module or folder may import those of the lines above its own, and nothing of its own line."""
HEAVY = ("accelerate", "diffusers", "transformers", "torch", "torchvision", "scipy", "matplotlib")
"""Libraries whose import takes seconds, so that `--help` and faults of a configuration do not wait for them."""
OPTIONAL = {"pydicom", "sklearn", "torchvision", "torchxrayvision", "torch_fidelity", "wandb"}


def imported(node: ast.AST, package: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Dotted names, as tuples, that one statement imports; `package` resolves relative imports."""
    if isinstance(node, ast.Import):
        return [tuple(alias.name.split(".")) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = package[: len(package) - node.level + 1] if node.level else ()
        base += tuple(node.module.split(".")) if node.module else ()
        return [(*base, alias.name) for alias in node.names]
    return []


def walk(node: ast.AST, *, into_functions: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or for_types
        if into_functions or not later:
            yield child
            yield from walk(child, into_functions=into_functions)


def imports_of(path: Path, root: Path, *, into_functions: bool = True) -> Iterator[tuple[str, ...]]:
    package = path.relative_to(root).parent.parts
    for node in walk(ast.parse(path.read_text(encoding="utf-8"), str(path)), into_functions=into_functions):
        yield from imported(node, package)


def layer_faults(root: Path) -> list[str]:
    """Imports inside root/distill that go against LAYERS, and modules that have no layer."""
    rank = {name: index for index, names in enumerate(LAYERS) for name in names}
    faults = []
    for path in sorted((root / "distill").rglob("*.py")):
        place = path.relative_to(root)
        own = place.parts[1].removesuffix(".py")
        if own != "__init__" and own not in rank:
            faults.append(f"{place}: {own} has no place in LAYERS")
            continue
        for name in imports_of(path, root):
            if name[0] != "distill" or len(name) < 2 or name[1] in (own, "__version__"):
                continue
            if rank.get(name[1], len(LAYERS)) >= rank.get(own, 0):
                faults.append(f"{place} imports distill.{name[1]}")
    return faults


def test_library_imports_go_one_way() -> None:
    assert layer_faults(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line", "is_legal"),
    [
        ("distill/losses.py", "from distill.errors import UserError", True),
        ("distill/losses.py", "from distill import metrics", False),
        ("distill/trainer.py", "from .losses import attention_kl", True),
        ("distill/trainer.py", "from .methods import Method", False),
        ("distill/data/folder.py", "from ..models import Model", True),
        ("distill/data/folder.py", "from .sample import Sample", True),
        ("distill/data/folder.py", "from ..trainer import fit", False),
        ("distill/data/folder.py", "def late():\n    import distill.trainer", False),
        ("distill/models/sdxl.py", "from distill.data.batch import Batch", False),
        ("distill/methods/gate.py", "from distill.evaluation.atlas import cells", False),
        ("distill/report/page.py", "from distill.experiment import arms", False),
        ("distill/config.py", "import distill.trainer", False),
        ("distill/cli.py", "import distill.errors", True),
        ("distill/cli.py", "import distill.models", False),
        ("distill/evaluation/atlas.py", "from distill.report.page import page", False),
        ("distill/evaluation/atlas.py", "from distill.experiment.run import Run", False),
        ("distill/novelty.py", "import torch", False),
    ],
)
def test_the_check_sees_a_wrong_import(tmp_path: Path, path: str, line: str, is_legal: bool) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(line)
    assert (layer_faults(tmp_path) == []) is is_legal


def test_library_never_imports_recipes_and_recipes_never_each_other() -> None:
    recipes = {path.stem for path in (ROOT / "recipes").glob("*.py")}
    faults = []
    for path in sorted([*(ROOT / "distill").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]):
        # `recipes/evaluate.py` and the library's `distill.evaluation.evaluate` share a name, so the first part decides.
        wrong = {name[0] for name in imports_of(path, ROOT)} & (recipes | {"recipes", "tests"})
        faults += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(wrong)]
    assert faults == []


def test_optional_packages_are_not_needed_to_import_anything() -> None:
    faults = []
    for folder in ("distill", "recipes"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            wrong = {name[0] for name in imports_of(path, ROOT, into_functions=False)} & OPTIONAL
            faults += [f"{path.relative_to(ROOT)} imports {name} at import time" for name in sorted(wrong)]
    assert faults == []


def test_a_command_line_is_read_before_any_large_library() -> None:
    """So that `--help` and a fault of the configuration come at once."""
    script = f"""
import importlib, sys
sys.path.insert(0, "recipes")
for name in {["distill.cli", "distill.methods.training", *RECIPES]}:
    importlib.import_module(name)
    found = [heavy for heavy in {HEAVY} if heavy in sys.modules]
    if found:
        sys.exit(f"{{name}} imports {{', '.join(found)}}")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

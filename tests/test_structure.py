"""What keeps the library small: rooms that do not know each other's names, and options that a person can read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from recipe import ROOT, recipe_module

from distill.cli import options
from distill.methods import METHODS

NAMES = {
    "learnable", "distilled", "gated", "key_locked", "continued", "tail_penalized", "rali", "rali_arm", "supervised",
    "self_taught",
}  # fmt: skip
"""Arms of published comparisons. `frozen` is one too, and a legal value of text_encoder and denoiser."""
KINDS = {options.model_fields["kind"].default for options in METHODS}
CLASSES = {name for options, place in METHODS.items() for name in (options.__name__, place.partition(":")[2])}
MODES = ("text_encoder", "denoiser")
PRETRAINING = "pretraining.py"
"""Trains the bundled base, which is no arm, with the diffusion loss."""


def texts(tree: ast.AST) -> Iterator[tuple[ast.Constant, str]]:
    """String literals other than docstrings."""
    described = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
            yield node, node.value


def modes(tree: ast.AST) -> set[int]:
    """Literals of expressions, assignments and arguments that speak of how a part is trained."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare | ast.keyword | ast.Tuple | ast.Assign | ast.AnnAssign | ast.arg) and any(
            name in ast.unparse(node) for name in MODES
        ):
            found |= {id(child) for child in ast.walk(node)}
    return found


def name_faults(root: Path) -> list[str]:
    """String literals in the rooms that serve all methods, that name one or an arm."""
    rooms = ("distill/experiment", "distill/evaluation", "distill/report", "distill/trainer.py")
    files = [
        path for room in rooms for path in ((root / room).rglob("*.py") if (root / room).is_dir() else [root / room])
    ]
    faults = []
    for path in sorted(file for file in files if file.exists()):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        legal = modes(tree)
        for node, text in texts(tree):
            known = {word for word in re.findall(r"\w+", text) if word in NAMES | KINDS - {"denoising"}}
            if text == "denoising" and path.parent.name == "experiment":
                known = set()  # the group of options
            elif text in ("denoising", "frozen") and id(node) not in legal:
                known.add(text)
            faults += [f"{path.relative_to(root)}:{node.lineno}: {word!r}" for word in sorted(known)]
    return faults


def class_faults(root: Path) -> list[str]:
    """Names of classes of methods in distill/experiment."""
    faults = []
    for path in sorted((root / "distill/experiment").rglob("*.py")):
        if path.name == PRETRAINING:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = {ast.Name: "id", ast.Attribute: "attr", ast.alias: "name"}.get(type(node))
            if name and getattr(node, name).split(".")[-1] in CLASSES:
                faults.append(f"{path.relative_to(root)}: {getattr(node, name)}")
    return faults


def test_no_room_that_serves_all_methods_names_one_or_an_arm() -> None:
    assert name_faults(ROOT) == [] and class_faults(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line", "is_legal"),
    [
        ("distill/report/page.py", "BASELINE = 'learnable'", False),
        ("distill/report/page.py", "first = 'frozen'", False),
        ("distill/report/page.py", "if text_encoder == 'frozen': pass", True),
        ("distill/report/page.py", "title = 'better than learnable in all'", False),
        ("distill/report/page.py", '"""Beside learnable."""', True),
        ("distill/evaluation/seeds.py", "kind = 'key_lock'", False),
        ("distill/trainer.py", "label = 'denoising'", False),
        ("distill/experiment/arms.py", "groups = ('method', 'lora', 'denoising')", True),
        ("distill/experiment/run.py", "part = ('denoiser', 'frozen')", True),
        ("distill/experiment/run.py", "arm = 'gated'", False),
        ("distill/experiment/run.py", "from distill.methods.key_lock import KeyLocked", False),
        ("distill/experiment/run.py", "isinstance(x, methods.TailPenaltyOptions)", False),
        ("distill/methods/key_lock.py", "kind = 'key_lock'", True),
    ],
)
def test_the_check_sees_a_name(tmp_path: Path, path: str, line: str, is_legal: bool) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(line)
    assert (name_faults(tmp_path) + class_faults(tmp_path) == []) is is_legal


def test_the_main_command_has_options_that_a_person_can_read() -> None:
    found = options(recipe_module("tradeoff").TradeoffConfig, [])
    assert 20 < len(found) <= 60


def any_count(source: str) -> int:
    """How often a source says `Any` outside imports."""
    nodes = list(ast.walk(ast.parse(source)))
    return sum(isinstance(node, ast.Name) and node.id == "Any" for node in nodes) + sum(
        isinstance(node, ast.Attribute) and node.attr == "Any" for node in nodes
    )


def test_types_are_given_rather_than_any() -> None:
    """Lower the bound when a type is given in place of `Any`; it never goes up."""
    assert any_count("x: typing.Any\ndef f(y: dict[str, Any]) -> None: ...") == 2
    files = [*(ROOT / "distill").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]
    assert sum(any_count(path.read_text(encoding="utf-8")) for path in files) <= 154

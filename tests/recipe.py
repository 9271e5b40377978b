"""Recipes are scripts, not modules: load one, and read what it refuses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from distill.cli import main

ROOT = Path(__file__).parents[1]


def recipe_module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "recipes" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module there
    spec.loader.exec_module(module)
    return module


def config_class_of(module: Any) -> Any:
    """The class that a recipe reads its command line into: the Settings class that it defines, named ...Config."""
    (found,) = [
        value
        for name, value in vars(module).items()
        if name.endswith("Config") and isinstance(value, type) and value.__module__ == module.__name__
    ]
    return found


def refusal_of(
    recipe: Any, config_class: type, argv: list[str], capsys: pytest.CaptureFixture[str], **options: Any
) -> str:
    """The one message that a user gets, without a traceback and with exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(recipe, config_class, argv, **options)
    message = capsys.readouterr().err
    assert caught.value.code == 2
    assert "Traceback" not in message and message.count("error: ") == 1
    return message[message.index("error: ") :]

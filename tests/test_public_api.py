"""Public names: listed, importable, sorted, without import side effects."""

import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import torch_prepared

SECTIONS = sorted(info.name for info in pkgutil.iter_modules(torch_prepared.__path__) if info.ispkg)


@pytest.mark.parametrize("section", SECTIONS)
def test_every_listed_name_exists(section: str) -> None:
    module = importlib.import_module(f"torch_prepared.{section}")
    names = getattr(module, "__all__", [])
    assert len(names) == len(set(names))
    missing = [name for name in names if not hasattr(module, name)]
    assert missing == []


@pytest.mark.parametrize("section", SECTIONS)
def test_listed_names_are_documented(section: str) -> None:
    module = importlib.import_module(f"torch_prepared.{section}")
    assert module.__doc__
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        if callable(value) and getattr(value, "__module__", "").startswith("torch_prepared"):
            assert value.__doc__, f"torch_prepared.{section}.{name} has no docstring"


def test_no_public_name_shadows_a_subpackage() -> None:
    for name in getattr(torch_prepared, "__all__", []):
        value = getattr(torch_prepared, name)
        assert name not in SECTIONS or value is sys.modules[f"torch_prepared.{name}"]


def test_certify_does_not_import_torch() -> None:
    """The checker's modules, loaded on their own, bring in neither torch nor the package's rest."""
    root = Path(torch_prepared.__path__[0])
    code = f"""
import importlib, sys, types
package = types.ModuleType("torch_prepared")
package.__path__ = [{str(root)!r}]
sys.modules["torch_prepared"] = package
importlib.import_module("torch_prepared.certify")
loaded = {{n for n in sys.modules if n.startswith("torch_prepared.")}}
assert "torch" not in sys.modules
assert all(n.split(".")[1] in ("certify", "errors") for n in loaded), loaded
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

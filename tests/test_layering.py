"""Imports only go down: read from syntax trees, imports inside functions included."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "torch_prepared"
NAME = PACKAGE.name
RANKS = {
    "errors": 0, "_types": 0, "_version": 0,
    "ops": 1, "certify": 1,
    "core": 2,
    "specs": 3, "relax": 3, "solvers": 3,
    "bounds": 4,
    "edit": 5,
    "interpret": 6, "calibrate": 6, "invert": 6,
    "hooks": 7, "testing": 7,
    "cli": 8, "cluster": 8,
}  # fmt: skip
SIDEWAYS = {("cli", "cluster"), ("testing", "hooks")}
LAZY = {"cli"}  # commands import what they run, so that help and usage errors appear at once
OPTIONAL = {
    "auto_LiRPA", "cuopt", "cupy", "gurobipy", "jaxtyping", "lightning", "moreau",
    "pytorch_lightning", "scs", "sklearn", "submitit", "transformers", "z3",
}  # fmt: skip
CERTIFY_MAY_IMPORT = {"numpy", *sys.stdlib_module_names}
FILES = sorted(PACKAGE.rglob("*.py"))


def section(path: Path) -> str:
    """Top-level member of the package that a file belongs to; '' for ``__init__``."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first.startswith("__") else first


def imported(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Absolute dotted names that a file imports, with line and whether inside a function."""
    package = (NAME, *path.relative_to(PACKAGE).parent.parts)
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    local = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in local
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join((*package[: len(package) - node.level + 1], base)).rstrip(".")
            if base == NAME:
                for alias in node.names:
                    yield f"{NAME}.{alias.name}", node.lineno, id(node) in local
            else:
                yield base, node.lineno, id(node) in local


def violations(path: Path) -> Iterator[str]:
    """Every import of a file that the layering forbids."""
    source = section(path)
    for name, line, local in imported(path):
        top, *rest = name.split(".")
        where = f"{path.relative_to(PACKAGE.parent)}:{line}: {source or NAME} imports {name}"
        if top != NAME:
            if source == "certify" and top not in CERTIFY_MAY_IMPORT:
                yield f"{where}: certify may use NumPy and the standard library only"
            if (
                local
                and source not in LAZY
                and top not in OPTIONAL
                and top not in sys.stdlib_module_names
            ):
                yield f"{where} inside a function: only optional packages may"
            continue
        if not source:
            continue
        if local and source not in LAZY:
            yield f"{where} inside a function: our own modules are imported at the top"
        target = rest[0] if rest else ""
        if target not in RANKS:
            if source not in {"cli", "testing"} and not target.startswith("__"):
                yield f"{where}: not a section of the package"
        elif source == "certify" and target not in {"certify", "errors"}:
            yield f"{where}: certify may import only errors of ours"
        elif target != source and RANKS[target] >= RANKS[source]:
            if (source, target) not in SIDEWAYS:
                yield f"{where}: upward or sideways"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    assert section(path) in {*RANKS, ""}, f"{path}: section has no rank; add it to RANKS"
    assert list(violations(path)) == []


def test_the_reader_sees_function_level_relative_and_sideways_imports() -> None:
    probe = PACKAGE / "specs" / "_probe_.py"

    class Source(type(probe)):  # type: ignore[misc]  # a path whose text is given here
        def read_text(self, *args: object, **kwargs: object) -> str:
            return (
                "from ..bounds import api\n"
                "from torch_prepared import edit\n"
                "def f():\n    import torch_prepared.relax.relu\n    import scipy\n"
            )

    found = list(violations(Source(probe)))
    assert len([f for f in found if "upward or sideways" in f]) == 3
    assert len([f for f in found if "inside a function" in f]) == 2

"""Reader and writer of VNN-LIB 1.0 property files (.vnnlib and .vnnlib.gz).

A file states the *unsafe* set: inputs X and outputs Y = f(X) that satisfy all its assertions. The
reader expands the assertions to disjuncts (input box, conjunction of linear output atoms), groups
the disjuncts of equal box, and negates: over each box the network must falsify every conjunction.

Soundness: decimals that float64 cannot hold are rounded so that the input box and the unsafe set
of outputs only grow, and strict input bounds are closed; a property proved for what is loaded
holds for what the file says. Output coefficients are exact (scaled by a positive number where
needed). Where strict and non-strict output atoms meet in one property, all count as non-strict.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

import torch
from torch import Tensor

from torch_prepared.errors import SpecError
from torch_prepared.specs._vnnlib_syntax import (
    Atom,
    Formula,
    InputBound,
    OutputAtom,
    parse_formula,
)
from torch_prepared.specs.box import Box
from torch_prepared.specs.output import Property, SafeSet

__all__ = ["load_vnnlib", "save_vnnlib"]

_MAX_BYTES = 2**28
_MAX_BOUNDS = 2**26


def load_vnnlib(
    path: str | os.PathLike[str],
    *,
    input_size: int | None = None,
    output_size: int | None = None,
    max_bytes: int = _MAX_BYTES,
) -> tuple[Property, ...]:
    """Read a property file; a network satisfies the file iff it satisfies all the properties.

    Supported are declarations of ``X_i`` and ``Y_j`` as Real and assertions of ``<=``, ``>=``,
    ``<``, ``>`` between linear terms (``+``, ``-``, ``*``) under nested ``and`` and ``or``, where
    an atom speaks of one input variable or of outputs only.

    Args:
        path: a text file, or its gzip when the name ends in ``.gz``.
        input_size: the network's number of inputs, if known.
        output_size: the network's number of outputs, if known.
        max_bytes: largest decompressed size that is read.

    Returns:
        One property over a :class:`Box` per distinct input box, in the file's order. Boxes may
        overlap. Names are the file's stem, with ``#k`` where there are several.

    Raises:
        SpecError: the file cannot be read, is malformed, unsupported or too large, bounds no
            output or not every input, has only empty boxes, or has other sizes than expected;
            one line with file, line or variable.
    """
    source = Path(path)
    formula = parse_formula(_read_text(source, max_bytes), str(source))
    for kind, got, expected in (
        ("input", formula.inputs, input_size),
        ("output", formula.outputs, output_size),
    ):
        if expected is not None and got != expected:
            raise SpecError(
                f"{source}: got {got} {kind} variables; expected {expected}, as the network has; "
                "check that file and network belong together"
            )
    groups = _group_by_box(formula, source)
    stem = source.name.removesuffix(".gz").removesuffix(".vnnlib")
    return tuple(
        Property(
            Box(lower, upper),
            _negate(conjunctions, formula.outputs),
            stem if len(groups) == 1 else f"{stem}#{k}",
        )
        for k, ((lower, upper), conjunctions) in enumerate(groups.items())
    )


def save_vnnlib(properties: Sequence[Property], path: str | os.PathLike[str]) -> None:
    """Write properties to one file, gzip when the name ends in ``.gz``.

    The file appears whole or not at all. Numbers are written as the exact decimals of their
    float64 values, so :func:`load_vnnlib` returns identical boxes and clauses. Names are lost,
    and properties over identical boxes come back as one.

    Raises:
        SpecError: nothing to write, sizes that differ, or a region that is not a :class:`Box`.
    """
    sizes = {(prop.region.size, prop.safe.size) for prop in properties}
    if len(sizes) != 1:
        raise SpecError(
            f"save_vnnlib: got {len(properties)} properties of {len(sizes)} different sizes; "
            "expected at least one, all for one network"
        )
    for prop in properties:
        if not isinstance(prop.region, Box):
            raise SpecError(
                f"save_vnnlib: got a {type(prop.region).__name__} as region of '{prop.name}'; "
                "expected a Box, the only region that VNN-LIB files describe here"
            )
    target = Path(path)
    content = "\n".join(_lines(properties, *sizes.pop())).encode("ascii") + b"\n"
    if target.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read_text(path: Path, max_bytes: int) -> str:
    """The file's text, decompressed at most to ``max_bytes``."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            content = stream.read(max_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise SpecError(f"{path}: cannot be read: {error}") from error
    if len(content) > max_bytes:
        raise SpecError(
            f"{path}: got more than {max_bytes} bytes after decompression; expected a smaller "
            "file; raise max_bytes if it can be trusted"
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: got bytes that are no text: {error.reason}") from error


_Sides = tuple[tuple[float, ...], tuple[float, ...]]


def _group_by_box(formula: Formula, path: Path) -> dict[_Sides, list[list[OutputAtom]]]:
    """The conjunctions of output atoms under each distinct box that is not empty."""
    lower, upper = [-math.inf] * formula.inputs, [math.inf] * formula.inputs
    common = _apply_bounds(formula.common, lower, upper)
    shared = (tuple(lower), tuple(upper))
    boxed = sum(any(isinstance(a, InputBound) for a in d) for d in formula.disjuncts)
    if boxed * formula.inputs > _MAX_BOUNDS:
        raise SpecError(
            f"{path}: got {boxed} input boxes of {formula.inputs} variables; expected at most "
            f"{_MAX_BOUNDS} bounds in all; split the file"
        )
    groups: dict[_Sides, list[list[OutputAtom]]] = {}
    crossed: str | None = None
    for disjunct in formula.disjuncts:
        sides, conjunction = shared, common + [a for a in disjunct if isinstance(a, OutputAtom)]
        if len(conjunction) < len(common) + len(disjunct):
            low, high = lower.copy(), upper.copy()
            _apply_bounds(disjunct, low, high)
            sides = (tuple(low), tuple(high))
        if sides not in groups:
            empty = _first_empty(sides, path)
            if empty is not None:
                crossed = crossed or empty
                continue
        if not conjunction:
            raise SpecError(
                f"{path}: got no output constraint (in some disjunct); expected one; without it "
                "every network is unsafe"
            )
        groups.setdefault(sides, []).append(conjunction)
    if not groups:
        reason = f", as the bounds of {crossed} contradict each other" if crossed else ""
        raise SpecError(f"{path}: got an unsafe set that is empty{reason}; expected a real one")
    return groups


def _apply_bounds(
    atoms: Sequence[Atom], lower: list[float], upper: list[float]
) -> list[OutputAtom]:
    """Intersect the box, in place, with the input bounds; the output atoms remain."""
    outputs: list[OutputAtom] = []
    for atom in atoms:
        if isinstance(atom, OutputAtom):
            outputs.append(atom)
        elif atom.is_upper:
            upper[atom.variable] = min(upper[atom.variable], atom.value)
        else:
            lower[atom.variable] = max(lower[atom.variable], atom.value)
    return outputs


def _first_empty(sides: _Sides, path: Path) -> str | None:
    """The first variable whose bounds cross; a variable without both bounds is an error."""
    empty = None
    for index, (low, high) in enumerate(zip(*sides, strict=True)):
        if math.isinf(low) or math.isinf(high):
            raise SpecError(
                f"{path}: got no {'lower' if math.isinf(low) else 'upper'} bound of X_{index}; "
                "expected both for every input"
            )
        if low > high and empty is None:
            empty = f"X_{index}"
    return empty


def _negate(conjunctions: list[list[OutputAtom]], outputs: int) -> SafeSet:
    """Outputs that falsify an atom of every conjunction."""
    clauses: list[tuple[Tensor, Tensor]] = []
    for atoms in conjunctions:
        rows = torch.zeros(len(atoms), outputs, dtype=torch.float64)
        for row, atom in enumerate(atoms):
            for index, coefficient in atom.terms:
                rows[row, index] = coefficient
        offset = torch.tensor([0.0 - atom.constant for atom in atoms], dtype=torch.float64)
        clauses.append((rows, offset))
    strict = any(not atom.strict for atoms in conjunctions for atom in atoms)
    return SafeSet(tuple(clauses), strict=strict)


def _lines(properties: Sequence[Property], inputs: int, outputs: int) -> Iterator[str]:
    """The file's lines."""
    yield from (f"(declare-const X_{index} Real)" for index in range(inputs))
    yield from (f"(declare-const Y_{index} Real)" for index in range(outputs))
    boxes = [list(_bounds(prop)) for prop in properties]
    if len(properties) == 1:
        yield from (f"(assert {bound})" for bound in boxes[0])
        boxes = [[]]
    yield "(assert (or"
    for prop, box in zip(properties, boxes, strict=True):
        operator = "<=" if prop.safe.strict else "<"
        for rows, offset in prop.safe.clauses:
            atoms = map(_atom, rows, offset.tolist(), itertools.repeat(operator))
            yield f"    (and {' '.join([*box, *atoms])})"
    yield "))"


def _bounds(prop: Property) -> Iterator[str]:
    sides = zip(prop.region.lower.tolist(), prop.region.upper.tolist(), strict=True)
    for index, (low, high) in enumerate(sides):
        yield f"(>= X_{index} {_decimal(low)})"
        yield f"(<= X_{index} {_decimal(high)})"


def _atom(row: Tensor, offset: float, operator: str) -> str:
    """``row @ y + offset <= 0`` in the plainest form."""
    terms = [(index, float(row[index])) for index in row.nonzero()[:, 0].tolist()]
    if terms[0][1] == 1 and len(terms) == 1:
        return f"({operator} Y_{terms[0][0]} {_decimal(-offset)})"
    if terms[0][1] == -1 and len(terms) == 1:
        return f"({operator.replace('<', '>')} Y_{terms[0][0]} {_decimal(offset)})"
    if offset == 0 and sorted(value for _, value in terms) == [-1.0, 1.0]:
        (left, _), (right, _) = sorted(terms, key=lambda term: -term[1])
        return f"({operator} Y_{left} Y_{right})"
    products = " ".join(f"(* {_decimal(value)} Y_{index})" for index, value in terms)
    return f"({operator} (+ {products}) {_decimal(-offset)})"


def _decimal(value: float) -> str:
    """The exact decimal of a float64, without an exponent, as SMT-LIB wants it."""
    text = format(Decimal(value + 0.0), "f")
    return text if "." in text else f"{text}.0"

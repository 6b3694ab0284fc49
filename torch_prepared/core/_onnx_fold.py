"""Constant folding of single ONNX nodes through the reference implementation of the standard.

Only operators of a short list are evaluated, and the size of a result is known before it is
computed, so that a small malicious file cannot ask for a huge array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator

from torch_prepared.core._builder import MAX_ELEMENTS, GraphBuilder
from torch_prepared.errors import ModelFormatError

__all__ = ["FOLDABLE", "MOVEMENTS", "RESHAPES", "evaluate"]

RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators that keep the row-major order of their first operand."""

MOVEMENTS = RESHAPES | {"Expand", "Gather", "Slice", "Split", "Transpose"}
"""Operators that only move or repeat scalars of their first operand."""

_BROADCASTING = frozenset({"Add", "Sub", "Mul", "Div", "Pow", "Expand", "MatMul"})

FOLDABLE = (
    MOVEMENTS
    | _BROADCASTING
    | {"Cast", "Concat", "ConstantOfShape", "Dropout", "Identity", "Neg", "Reciprocal"}
    | {"ReduceProd", "Sqrt"}
)
"""Operators evaluated when all their operands are constant."""


def evaluate(
    builder: GraphBuilder,
    op: str,
    opset: int,
    operands: Sequence[np.ndarray | None],
    attributes: Mapping[str, object],
    outputs: int = 1,
) -> list[np.ndarray]:
    """Results of one operator on arrays.

    Raises:
        UnsupportedOperationError: a result would be larger than ``MAX_ELEMENTS``.
        ModelFormatError: the operator rejects its operands.
    """
    if _size(op, operands, attributes) > MAX_ELEMENTS:
        builder.refuse(f"would compute a constant of more than {MAX_ELEMENTS} numbers")
    names = ["" if array is None else f"x{i}" for i, array in enumerate(operands)]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, results)
    node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    graph = helper.make_graph(
        [node],
        "fold",
        [helper.make_value_info(name, onnx.TypeProto()) for name in names if name],
        [helper.make_value_info(name, onnx.TypeProto()) for name in results],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    feeds = {name: array for name, array in zip(names, operands, strict=True) if name}
    try:
        with np.errstate(all="ignore"):
            computed = ReferenceEvaluator(model).run(None, feeds)
    except Exception as error:
        text = " ".join(str(error).split())[:160]
        raise ModelFormatError(f"{builder.where}: cannot be evaluated ({text})") from error
    return [np.asarray(array) for array in computed]


def _size(op: str, operands: Sequence[np.ndarray | None], attributes: Mapping[str, object]) -> int:
    """Upper estimate of the number of scalars in the result."""
    arrays = [array for array in operands if array is not None]
    shapes = [array.shape for array in arrays]
    if op == "ConstantOfShape":
        return math.prod(abs(int(size)) for size in arrays[0].reshape(-1))
    if op == "Expand" and len(arrays) > 1:
        shapes[1] = tuple(abs(int(size)) for size in arrays[1].reshape(-1))
    if op in _BROADCASTING:
        rank = max(len(shape) for shape in shapes)
        padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
        return math.prod(max(sizes) for sizes in zip(*padded, strict=True))
    if op == "Gather" and len(arrays) > 1 and arrays[0].ndim:
        axis = attributes.get("axis", 0)
        length = arrays[0].shape[axis % arrays[0].ndim] if isinstance(axis, int) else 1
        return arrays[0].size // max(1, length) * arrays[1].size
    return sum(array.size for array in arrays)

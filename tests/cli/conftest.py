"""A network one can compute by hand, property files for it, and a way to run commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

from torch_prepared.cli.main import command_line

Run = Callable[..., Result]
WriteProperty = Callable[..., Path]
WriteModel = Callable[..., Path]


@pytest.fixture
def run() -> Run:
    """Run a command line in this process."""

    def invoke(*arguments: object) -> Result:
        result = CliRunner().invoke(command_line, [str(a) for a in arguments], prog_name="tp")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result

    return invoke


@pytest.fixture
def write_model(tmp_path: Path) -> WriteModel:
    """Write y = (|x_0| + |x_1|, 1) as Gemm, Relu, Gemm; other weights or operators on demand."""

    def write(name: str = "net.onnx", *, output_weight: float = 1.0, op: str = "Relu") -> Path:
        weights = {
            "first.weight": np.array([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32),
            "first.bias": np.zeros(4, np.float32),
            "second.weight": np.array([[output_weight] * 4, [0] * 4], np.float32),
            "second.bias": np.array([0, 1], np.float32),
        }
        nodes = [
            helper.make_node("Gemm", ["x", "first.weight", "first.bias"], ["h"], "first", transB=1),
            helper.make_node(op, ["h"], ["r"], "activation"),
            helper.make_node(
                "Gemm", ["r", "second.weight", "second.bias"], ["y"], "second", transB=1
            ),
        ]
        graph = helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
            [numpy_helper.from_array(value, key) for key, value in weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path = tmp_path / name
        onnx.save_model(model, str(path))
        return path

    return write


@pytest.fixture
def write_property(tmp_path: Path) -> WriteProperty:
    """Write 'for all x in [low, high]^2 not (atom)'."""

    def write(
        atom: str = "(>= Y_0 1.5)",
        low: float = -1.0,
        high: float = 1.0,
        name: str = "prop.vnnlib",
        inputs: int = 2,
    ) -> Path:
        lines = [f"(declare-const X_{i} Real)" for i in range(inputs)]
        lines += [f"(declare-const Y_{i} Real)" for i in range(2)]
        for i in range(inputs):
            lines += [f"(assert (>= X_{i} {low}))", f"(assert (<= X_{i} {high}))"]
        path = tmp_path / name
        path.write_text("\n".join([*lines, f"(assert {atom})"]) + "\n")
        return path

    return write


def one_line_error(result: Result, code: int = 2) -> str:
    """The error of a failed command: exactly one line on standard error, nothing else."""
    assert result.exit_code == code, (result.exit_code, result.stderr, result.stdout)
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    return lines[0]


def only_json(result: Result) -> dict[str, object]:
    """Standard output as the one strict JSON object that it must be."""

    def refuse(text: str) -> object:
        raise AssertionError(f"not strict JSON: {text}")

    data = json.loads(result.stdout, parse_constant=refuse)
    assert isinstance(data, dict)
    return data

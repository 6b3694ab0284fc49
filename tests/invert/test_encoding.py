import numpy as np
import pytest
import torch

from tests.helpers import NETWORKS
from torch_prepared.bounds import RegionBatch, bound_nodes
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.invert._encoding import Program, encode_copy
from torch_prepared.invert._network import PiecewiseNetwork
from torch_prepared.relax import evaluate_graph
from torch_prepared.solvers import HighsSolver, LinearProgram, Status
from torch_prepared.specs import Box


def _extreme(net, boxes, box, x, output, sign):
    """Smallest ``sign * output`` of the program with the input fixed at ``x``."""
    program = Program()
    inputs = program.add("x", x, x)
    copy = encode_copy(program, "f", net.graph, boxes, inputs)
    y = program.add("y", np.full(1, -1e6), np.full(1, 1e6))
    program.equal(program.pick(y) - copy.output[np.array([output])])
    cost = np.zeros(program.columns)
    cost[y] = sign
    problem = LinearProgram(
        cost, program.build_rows(), program.unknowns.lower, program.unknowns.upper, program.integer
    )
    found = HighsSolver(find_ray=False).solve(problem, time_limit=20.0)
    assert found.status is Status.OPTIMAL
    return sign * found.objective


@pytest.mark.parametrize("op", ["relu", "leaky_relu"])
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"residual"}))
def test_the_only_solution_at_a_point_is_the_networks_value(name, op):
    graph = NETWORKS[name](op)
    net = PiecewiseNetwork.of(graph, graph.input_size)
    generator = torch.Generator().manual_seed(3)
    center = torch.randn(graph.input_size, generator=generator, dtype=torch.float64)
    box = Box(center - 0.5, center + 0.5)
    with torch.no_grad():
        boxes = bound_nodes(net.graph, RegionBatch.of([box]))
    x = box.sample(1, generator)
    with torch.no_grad():
        value = evaluate_graph(graph, x).flatten().numpy()
    for sign in (1.0, -1.0):
        found = _extreme(net, boxes, box, x[0].numpy(), 0, sign)
        assert found == pytest.approx(value[0], abs=1e-5 * (1 + abs(value[0])))


def test_operators_that_are_not_piecewise_affine_are_refused_by_name():
    for name, op, word in (("mlp", "tanh", "tanh"), ("residual", "relu", "batch_norm")):
        graph = NETWORKS[name](op)
        with pytest.raises(UnsupportedOperationError, match=word):
            PiecewiseNetwork.of(graph, graph.input_size)

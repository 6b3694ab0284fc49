"""A sufficient condition for injectivity that needs no integers: interval Jacobians.

On a convex set B a piecewise affine network satisfies ``f(x) - f(y) = S (x - y)`` with ``S`` in the
convex hull of its slopes on B. If ``||I - C S|| < 1`` for some C and every S of an interval matrix
that holds them, every such S has full column rank, so that f is injective on B.

Source: the mean value form of interval analysis (Neumaier, "Interval Methods for Systems of
Equations", 1990, chapter 5); the hull of slopes of piecewise affine maps is ours.
"""

from __future__ import annotations

import math

import numpy as np

from torch_prepared.core.graph import Node
from torch_prepared.core.interval import Interval
from torch_prepared.core.rows import Floats
from torch_prepared.invert._ball import Ball, as_norm
from torch_prepared.invert._encoding import node_matrices
from torch_prepared.invert._network import Network, PiecewiseNetwork, PointLike, as_point
from torch_prepared.invert._solve import bound_network
from torch_prepared.relax.pool import pool_windows

__all__ = ["injective_on_ball", "injectivity_certificate_fast", "largest_injective_radius"]

_INFLATION = 1e-9  #: relative; far above the rounding of products of a few thousand terms
_MAX_INPUTS = 256

Matrix = tuple[Floats, Floats]
"""Center and radius (m, n) of an interval matrix."""


def injectivity_certificate_fast(
    network: Network, center: PointLike, radius: float, *, norm: float | str = math.inf
) -> bool:
    """Whether interval Jacobians show that a network is injective on a ball.

    Args:
        network: module, ONNX network or file, or graph; piecewise affine.
        center: (n,) in the unit of the inputs.
        radius: of the ball.
        norm: 1, 2 or inf.

    Returns:
        True is a proof in float64 arithmetic with rounding slack; False says nothing.

    Raises:
        SpecError: numbers that do not fit or are not finite.
        UnsupportedOperationError: an operator that is not piecewise affine.
    """
    point = as_point(center)
    net = PiecewiseNetwork.of(network, len(point))
    return injective_on_ball(net, Ball(point, radius, as_norm(norm)))


def injective_on_ball(net: PiecewiseNetwork, ball: Ball) -> bool:
    """Whether interval Jacobians show that no two points of the ball collide.

    Soundness: float64 arithmetic, every product of matrices widened by 1e-9 of its magnitude and
    every switch counted as open unless it is clear of zero by 1e-9 of its size; False proves
    nothing.
    """
    n, m = net.input_size, net.output_size
    if m < n or n > _MAX_INPUTS:
        return False
    slopes = _slopes(net, bound_network(net, ball, "crown"))
    if slopes is None:
        return False
    center, radius = slopes
    if not bool(np.isfinite(center).all() and np.isfinite(radius).all()):
        return False
    inverse = np.linalg.pinv(center)
    rest = np.abs(np.eye(n) - inverse @ center) + np.abs(inverse) @ radius
    rest += _INFLATION * (1.0 + np.abs(inverse) @ np.abs(center))
    return bool(rest.sum(axis=1).max() < 1.0)


def largest_injective_radius(net: PiecewiseNetwork, ball: Ball, steps: int = 24) -> float:
    """A radius, at most the ball's, that :func:`injective_on_ball` accepts; 0 if it finds none."""
    if injective_on_ball(net, ball):
        return ball.radius
    low, high = 0.0, ball.radius
    for _ in range(steps):
        middle = high / 4 if low == 0.0 else (low * high) ** 0.5
        if injective_on_ball(net, ball.resized(middle)):
            low = middle
        else:
            high = middle
        if low and high < 1.001 * low:
            break
    return low


def _slopes(net: PiecewiseNetwork, boxes: dict[str, Interval]) -> Matrix | None:
    """An interval matrix that holds the slopes of the output over the region."""
    graph = net.graph
    eye = np.eye(net.input_size)
    found: dict[str, Matrix] = {graph.nodes[0].name: (eye, np.zeros_like(eye))}
    for node in graph.nodes[1:]:
        if node.op in ("relu", "leaky_relu"):
            found[node.name] = _through_relu(node, boxes[node.inputs[0]], found[node.inputs[0]])
        elif node.op == "max_pool":
            shape = graph.node(node.inputs[0]).shape
            found[node.name] = _through_pool(node, shape, found[node.inputs[0]])
        else:
            center = np.zeros((node.size, net.input_size))
            radius, size = np.zeros_like(center), np.zeros_like(center)
            for name, matrix in zip(node.inputs, node_matrices(graph, node), strict=True):
                weight = abs(matrix)
                center += matrix @ found[name][0]
                radius += weight @ found[name][1]
                size += weight @ (np.abs(found[name][0]) + found[name][1])
            found[node.name] = (center, radius + _INFLATION * size)
    return found[graph.nodes[-1].name]


def _through_relu(node: Node, box: Interval, inner: Matrix) -> Matrix:
    """Times a factor in [a, 1] that is 1 or a where the switch is settled."""
    low = box.lower[0].flatten().numpy()[:, None]
    high = box.upper[0].flatten().numpy()[:, None]
    slack = _INFLATION * (1.0 + np.maximum(np.abs(low), np.abs(high)))
    small = float(node.attrs.get("alpha", 0.0))  # type: ignore[arg-type]
    least = np.where(low > slack, 1.0, small)
    most = np.where(high < -slack, small, 1.0)
    middle, half = (least + most) / 2, (most - least) / 2
    center, radius = inner
    return middle * center, (middle + half) * radius + half * np.abs(center)


def _through_pool(node: Node, shape: tuple[int, ...], inner: Matrix) -> Matrix:
    """The hull of the slopes of every scalar in the window."""
    windows = pool_windows(node, shape).numpy()
    outside = (windows < 0)[:, :, None]
    low = np.where(outside, np.inf, (inner[0] - inner[1])[windows]).min(axis=1)
    high = np.where(outside, -np.inf, (inner[0] + inner[1])[windows]).max(axis=1)
    return (low + high) / 2, (high - low) / 2 + _INFLATION * np.maximum(np.abs(low), np.abs(high))

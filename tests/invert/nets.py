"""Networks whose radii are known, and brute force for those whose are not."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch

from torch_prepared.core.graph import Graph, Node, ParameterRef
from torch_prepared.invert._exact import jacobian
from torch_prepared.invert._network import PiecewiseNetwork


def chain(*layers: tuple[object, object], dtype: torch.dtype = torch.float64) -> Graph:
    """Linear layers (weight, bias) with ReLU between."""
    weights = [torch.as_tensor(np.asarray(w, dtype=np.float64)) for w, _ in layers]
    nodes = [Node("x", "input", (), (weights[0].shape[1],))]
    parameters = {}
    for k, (weight, (_, bias)) in enumerate(zip(weights, layers, strict=True)):
        if k:
            nodes.append(Node(f"r{k}", "relu", (nodes[-1].name,), nodes[-1].shape))
        shift = np.zeros(len(weight)) if bias is None else np.asarray(bias, dtype=np.float64)
        parameters |= {f"w{k}": weight.to(dtype), f"b{k}": torch.as_tensor(shift).to(dtype)}
        refs = {"weight": ParameterRef(f"w{k}"), "bias": ParameterRef(f"b{k}")}
        nodes.append(Node(f"l{k}", "linear", (nodes[-1].name,), (len(weight),), refs))
    return Graph(tuple(nodes), parameters, frozenset(parameters))


def affine(matrix: list[list[float]]) -> Graph:
    """One linear layer."""
    return chain((matrix, None))


def absolute(dtype: torch.dtype = torch.float64, right: float = 1.0) -> Graph:
    """f(x) = |x| (or ``right`` times it on the left), one input."""
    return chain(([[1.0], [-1.0]], None), ([[1.0, right]], None), dtype=dtype)


def fold(angle: float = 0.0) -> Graph:
    """f(x, y) = (|x|, y) after a rotation: folds the plane along a line."""
    c, s = np.cos(angle), np.sin(angle)
    first = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    last = [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, -1.0]]
    return chain((first @ np.array([[c, s], [-s, c]]), None), (last, None))


def random_net(sizes: tuple[int, ...], seed: int, spread: float = 1.4) -> Graph:
    """Linear layers with ReLU between, normally distributed."""
    rng = np.random.default_rng(seed)
    pairs = [
        (spread * rng.normal(size=(m, n)) * n**-0.5, 0.7 * rng.normal(size=m))
        for n, m in pairwise(sizes)
    ]
    return chain(*pairs)


def on_line(net: Graph, center: float, reach: float, count: int = 400_001) -> tuple:
    """Radii (r, R) of a one-input net by a fine grid, and the grid's step; inf beyond ``reach``."""
    x = np.linspace(center - reach, center + reach, count)
    y = PiecewiseNetwork.of(net, 1).values(x[:, None])[:, 0]
    middle = count // 2
    sign = np.sign(np.diff(y))
    away = np.abs((x[1:] + x[:-1]) / 2 - center)
    turned = sign != sign[middle]
    r = float(away[turned].min()) if turned.any() else math.inf
    level = y - y[middle]
    crossed = (np.sign(level[1:]) != np.sign(level[:-1])) | (level[1:] == 0)
    crossed[middle - 2 : middle + 2] = False
    big = float(away[crossed].min()) if crossed.any() else math.inf
    return r, big, float(x[1] - x[0])


def colliding_on_grid(
    net: Graph, center: np.ndarray, radius: float, least: float, count: int = 61
) -> bool:
    """Whether brute force over a grid of the square meets an approximate collision.

    True only where two grid points ``least`` apart have outputs much closer than their inputs
    explain anywhere in the square.
    """
    ticks = np.linspace(-radius, radius, count)
    points = center + np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    piecewise = PiecewiseNetwork.of(net, 2)
    outputs = piecewise.values(points)
    slopes = np.linalg.svd(jacobian(piecewise, points), compute_uv=False)
    cover = slopes[:, 0].max() * (ticks[1] - ticks[0])
    for start in range(0, len(points), 500):
        far = np.abs(points[start : start + 500, None] - points[None]).max(axis=2) >= least
        near = np.abs(outputs[start : start + 500, None] - outputs[None]).max(axis=2)
        if bool((far & (near < 0.02 * cover)).any()):
            return True
    return False

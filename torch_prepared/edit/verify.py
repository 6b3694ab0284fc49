"""Is a network safe as it is? Search for violating inputs, then try to prove there are none."""

from __future__ import annotations

import enum
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torch_prepared._version import __version__
from torch_prepared.certify import Verdict
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.graph import Graph
from torch_prepared.core.onnx import OnnxNetwork, OnnxSession
from torch_prepared.edit._certify import (
    LOW_DIMENSION,
    Certified,
    certify_network,
    check_and_mend,
    prove,
    prove_by_splitting,
)
from torch_prepared.edit.attack import confirm_with_onnx, find_counterexamples, is_violation
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Property

__all__ = [
    "Agreement",
    "Answer",
    "Counterexample",
    "CrossCheck",
    "PropertyAnswer",
    "Verification",
    "compare_with_onnxruntime",
    "cross_check",
    "prove_or_refute",
    "verify_network",
]


SEARCH_SHARE = 0.5
"""Of the time left, for branch and bound; replaying its tree takes about as long."""


class Answer(enum.Enum):
    """What verification says. ``PROVED`` is the certificate checker's verdict."""

    PROVED = "proved"
    REFUTED = "refuted"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Counterexample:
    """A violating input.

    Args:
        x: (n,) float64, inside the property's region.
        margin: safety margin in float64 on the stored weights.
        deployed_margin: safety margin of onnxruntime's output.
        output: (m,) onnxruntime's output.
    """

    x: np.ndarray
    margin: float
    deployed_margin: float
    output: np.ndarray


@dataclass(frozen=True)
class PropertyAnswer:
    """Answer for one property.

    ``bound`` is a proved lower bound of the safety margin (NaN if none), ``worst`` the smallest
    margin that the attack met.
    """

    name: str
    answer: Answer
    bound: float
    worst: float
    reason: str
    counterexample: Counterexample | None = None


@dataclass(frozen=True)
class Verification:
    """Answers for all properties, and the certificate when all are proved."""

    answer: Answer
    properties: tuple[PropertyAnswer, ...]
    certified: Certified | None
    attack_seconds: float
    proof_seconds: float


@dataclass(frozen=True)
class CrossCheck:
    """Outcome of attacking a network in onnxruntime.

    ``smallest_margin`` is the least margin of onnxruntime's outputs on ``points`` inputs, NaN as
    soon as one output is not finite; ``violations`` names the properties violated.
    """

    points: int
    smallest_margin: float
    violations: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Agreement:
    """Outputs of the imported graph against onnxruntime's on random inputs of the regions.

    ``tolerance`` is what float32 rounding explains, measured by the graph's own evaluation in the
    network's float type against float64.
    """

    points: int
    largest_difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the tolerance; NaN is not."""
        return self.largest_difference <= self.tolerance


def prove_or_refute(
    graph: Graph, properties: Sequence[Property], deadline: Deadline
) -> tuple[Certified, dict[int, Tensor]]:
    """Try to prove all properties; the one place where the proof method is chosen.

    Returns:
        A certificate with the checker's verdict, and inputs (n,) by position of a property that
        the search for a proof believes to violate it.
    """
    proofs, margins = prove(graph, properties)
    believed = {}
    for i, prop in enumerate(properties):
        wide = int((prop.region.upper > prop.region.lower).sum())
        if margins[i] > 0 or wide > LOW_DIMENSION:
            continue
        share = deadline.share(SEARCH_SHARE / (len(properties) - i))
        proof, x = prove_by_splitting(graph, prop, share)
        if proof is not None:
            proofs[i] = proof
        elif x is not None:
            believed[i] = x
    metadata = {"generator": f"torch_prepared {__version__}", "method": "verify"}
    found = check_and_mend(certify_network, graph, properties, proofs, metadata, deadline)
    return found, believed


def verify_network(
    network: OnnxNetwork,
    properties: Sequence[Property],
    *,
    time_limit: float | None = None,
    attack_limit: float = 5.0,
    starts: Tensor | None = None,
    seed: int = 0,
) -> Verification:
    """Refute, prove, or say unknown, for every property.

    Args:
        network: as imported; judged with its weights as stored.
        properties: what must hold.
        time_limit: wall seconds for everything; at most a quarter goes to the attack.
        attack_limit: most wall seconds for the attack.
        starts: points for the attack to begin with, see :func:`find_counterexamples`.
        seed: of the attack.

    Returns:
        A :class:`Verification`. ``REFUTED`` needs a point of the region whose output violates in
        float64 on the stored weights and in onnxruntime; ``PROVED`` the checker's verdict.

    Raises:
        SpecError: properties that do not fit the network.

    Soundness: see ``certify.check_certificate``.
    """
    deadline = Deadline(time_limit)
    limit = min(attack_limit, deadline.left / 4)
    attack = find_counterexamples(
        network.graph, properties, starts=starts, time_limit=limit, seed=seed
    )
    session = OnnxSession(network)
    found = {
        i: _counterexample(session, prop, attack.inputs[i], float(attack.margins[i]))
        for i, prop in enumerate(properties)
        if bool(attack.violated[i])
    }
    attack_seconds, certified = deadline.elapsed, None
    open_positions = [i for i in range(len(properties)) if i not in found]
    checks = {}
    if open_positions:
        asked = [properties[i] for i in open_positions]
        certified, believed = prove_or_refute(network.graph, asked, deadline)
        checks = dict(zip(open_positions, certified.check.per_property, strict=True))
        for position, x in believed.items():
            i = open_positions[position]
            margin = _exact_margin(network.graph, properties[i], x)
            if is_violation(properties[i], margin):
                found[i] = _counterexample(session, properties[i], x, margin)
    answers = []
    for i, prop in enumerate(properties):
        worst = float(attack.margins[i])
        if i in found:
            answers.append(_refuted(prop, found[i], worst))
            continue
        check = checks[i]
        proved = check.status is Verdict.CERTIFIED
        answer = Answer.PROVED if proved else Answer.UNKNOWN
        answers.append(PropertyAnswer(prop.name, answer, check.margin, worst, check.reason))
    return Verification(
        _overall([a.answer for a in answers]),
        tuple(answers),
        certified if len(open_positions) == len(properties) else None,
        attack_seconds,
        deadline.elapsed - attack_seconds,
    )


def cross_check(
    network: OnnxNetwork,
    properties: Sequence[Property],
    *,
    starts: Tensor | None = None,
    time_limit: float | None = 10.0,
    seed: int = 0,
    samples: int = 16,
) -> CrossCheck:
    """Attack a network that is believed safe, every output computed by onnxruntime.

    The worst point of the attack, ``samples`` random points and as many random corners of every
    region are run. An output that is not finite counts as a violation.
    """
    clock = time.monotonic()
    attack = find_counterexamples(
        network.graph, properties, starts=starts, time_limit=time_limit, seed=seed
    )
    session = OnnxSession(network)
    generator = torch.Generator().manual_seed(seed)
    smallest, violations, points = np.inf, [], 0
    for prop, worst in zip(properties, attack.inputs, strict=True):
        rows = torch.randn(samples, prop.region.size, generator=generator, dtype=torch.float64)
        drawn = [worst[None], prop.region.sample(samples, generator), prop.region.corner(rows)]
        outputs = torch.from_numpy(session(torch.cat(drawn).numpy())).to(torch.float64)
        margins = prop.safe.margin(outputs)
        margin = float(margins.min()) if bool(torch.isfinite(outputs).all()) else float("nan")
        if np.isnan(margin) or is_violation(prop, margin):
            violations.append(prop.name)
        smallest, points = float(np.minimum(smallest, margin)), points + len(outputs)
    return CrossCheck(points, smallest, tuple(violations), time.monotonic() - clock)


def compare_with_onnxruntime(
    network: OnnxNetwork, properties: Sequence[Property], *, points: int = 64, seed: int = 0
) -> Agreement:
    """Run the imported graph and onnxruntime on random points of the regions.

    Every region gives at least one point. A fault of the importer shows as a difference far above
    float32 rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    each = -(-points // len(properties))
    graph = network.graph.to(device="cpu")
    x = torch.cat([p.region.sample(each, generator) for p in properties]).to(graph.dtype)
    deployed = torch.from_numpy(OnnxSession(network)(x.numpy())).to(torch.float64)
    with torch.no_grad():
        stored = evaluate_graph(graph, x).flatten(1).to(torch.float64)
        exact = evaluate_graph(graph.to(torch.float64), x.to(torch.float64)).flatten(1)
    scale = float(exact.abs().max())
    tolerance = 32 * float((stored - exact).abs().max()) + 1e-5 * scale
    return Agreement(len(x), float((deployed - exact).abs().max()), tolerance)


def _exact_margin(graph: Graph, prop: Property, x: Tensor) -> float:
    """Margin of one point (n,) in float64; NaN if it is not in the region."""
    if not bool(prop.region.contains(x[None])[0]):
        return float("nan")
    with torch.no_grad():
        y = evaluate_graph(graph.to(torch.float64, "cpu"), x[None].to("cpu", torch.float64))
    return float(prop.safe.margin(y.flatten(1))[0])


def _counterexample(
    session: OnnxSession, prop: Property, x: Tensor, margin: float
) -> Counterexample:
    """A violating point with what onnxruntime says of it."""
    point = x.detach().cpu().numpy()
    deployed = confirm_with_onnx(session, prop, point)
    return Counterexample(point, margin, deployed, session(point[None])[0])


def _refuted(prop: Property, found: Counterexample, worst: float) -> PropertyAnswer:
    """Refuted when onnxruntime agrees, else unknown."""
    if is_violation(prop, found.deployed_margin):
        reason, answer = f"violated with margin {found.margin:.6g}", Answer.REFUTED
    else:
        answer = Answer.UNKNOWN
        reason = (
            f"violated in exact arithmetic (margin {found.margin:.3g}) but not by onnxruntime "
            f"(margin {found.deployed_margin:.3g})"
        )
    kept = found if answer is Answer.REFUTED else None
    return PropertyAnswer(prop.name, answer, float("nan"), min(worst, found.margin), reason, kept)


def _overall(answers: Sequence[Answer]) -> Answer:
    """Refuted if any is, proved if all are."""
    if Answer.REFUTED in answers:
        return Answer.REFUTED
    return Answer.PROVED if set(answers) == {Answer.PROVED} else Answer.UNKNOWN

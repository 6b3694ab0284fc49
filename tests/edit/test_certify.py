"""From an engine's proof to the checker's verdict: ties, refused leaves, what cannot be mended."""

from __future__ import annotations

import pytest
import torch
from helpers import mlp

import torch_prepared as tp
from torch_prepared.bounds import PropertyBatch
from torch_prepared.bounds.crown import tightened_names
from torch_prepared.bounds.engine import general_engine, leaf_engine
from torch_prepared.certify import MOST_FAILED, ProofTree, Verdict
from torch_prepared.core.deadline import Deadline
from torch_prepared.core.interval import Interval
from torch_prepared.edit._certify import Certified, certify_network, check_and_mend
from torch_prepared.specs import Box, Property, SafeSet


def output_above(region: tp.Region, bound: float) -> Property:
    rows = torch.tensor([[-1.0]], dtype=torch.float64)
    return Property(region, SafeSet.polytope(rows, torch.tensor([-bound]).double()), "above")


def margin(graph: tp.Graph, prop: Property, proof: ProofTree) -> float:
    return certify_network(graph, [prop], [proof], {}).check.margin


def odd_network(seed: int) -> tp.Graph:
    """Every neuron has a mirror image, so that ``upper = -lower`` on boxes centered at zero."""
    graph = mlp((3, 20, 20, 20, 1), seed=seed)
    parameters, previous = dict(graph.parameters), 0
    for name, value in graph.parameters.items():
        value = value.clone()
        if value.dim() == 1:
            value.zero_()
        else:
            if previous:  # reads relu(z) - relu(-z) = z
                value[:, previous // 2 :] = -value[:, : previous // 2]
            if len(value) > 1:
                value[len(value) // 2 :] = -value[: len(value) // 2]
            previous = len(value)
        parameters[name] = value
    return graph.with_parameters(parameters)


@pytest.mark.parametrize("seed", range(6))
def test_ties_are_broken_alike_by_engines_and_checker(seed: int) -> None:
    """Rounding would choose the lower lines of most neurons of these networks."""
    graph = odd_network(seed)
    region = Box(torch.tensor([-0.9, -0.7, -0.3]), torch.tensor([0.9, 0.7, 0.3]))
    prop = output_above(region, -1e6)
    batch, box = PropertyBatch.of([prop]), Interval(region.lower[None], region.upper[None])
    checked = margin(graph, prop, ProofTree.leaf([0], tighten=tightened_names(graph, True)))
    for engine in (leaf_engine(graph, batch), general_engine(graph, batch)):
        found = float((engine(box).values + batch.offset).min())
        assert found == pytest.approx(checked, rel=0, abs=1e-6)


def refused(by: float) -> tuple[tp.Graph, Property, ProofTree]:
    """A property that the proof of one leaf misses by a share of the network's spread."""
    graph = mlp((2, 12, 12, 1), seed=3)
    region = Box(torch.tensor([-1.0, 0.5]), torch.tensor([1.0, 0.5]))
    proof = ProofTree.leaf([0], tighten=tightened_names(graph, True))
    bound = margin(graph, output_above(region, 0.0), proof)
    return graph, output_above(region, bound + by), proof


def mend(
    graph: tp.Graph, prop: Property, proof: ProofTree, seconds: float | None = None
) -> Certified:
    return check_and_mend(certify_network, graph, [prop], [proof], {}, Deadline(seconds))


def test_a_leaf_that_fails_by_little_is_split_until_it_holds() -> None:
    graph, prop, proof = refused(0.03)
    before = certify_network(graph, [prop], [proof], {}).check.per_property[0]
    assert before.status is Verdict.UNKNOWN
    assert before.failed == (0,)
    mended = mend(graph, prop, proof)
    assert mended.holds
    assert mended.certificate.proofs[0].leaves in range(2, 17)
    assert proof.leaves == 1
    # the second input has no width, so no split helps there
    assert set(mended.certificate.proofs[0].split_dim.tolist()) == {0, -1}


def test_only_refused_leaves_are_split() -> None:
    graph, prop, proof = refused(0.03)
    mended = mend(graph, prop, proof).certificate.proofs[0]
    again = mend(graph, prop, mended)
    assert again.holds
    assert again.certificate.proofs[0].leaves == mended.leaves


def test_what_no_split_proves_stays_unknown() -> None:
    graph, prop, proof = refused(1e4)
    result = mend(graph, prop, proof)
    assert not result.holds
    assert result.certificate.proofs[0].leaves <= MOST_FAILED


def test_no_time_or_no_few_coordinates_no_mending() -> None:
    graph, prop, proof = refused(0.03)
    assert mend(graph, prop, proof, seconds=0.0).certificate.proofs[0].leaves == 1
    wide = mlp((17, 8, 1), seed=0)
    region = Box(torch.full((17,), -1.0), torch.full((17,), 1.0))
    result = mend(wide, output_above(region, 1e4), ProofTree.leaf([0]))
    assert not result.holds
    assert result.certificate.proofs[0].leaves == 1

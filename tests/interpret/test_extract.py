"""Sufficient sets: replayed by the checker, irreducible, smallest; both modes; refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.helpers import attack, mlp
from torch_prepared.certify import (
    Verdict,
    check_certificate,
    evaluate_exactly,
    margin_exactly,
)
from torch_prepared.certify.records import NetworkRecord, PropertyRecord
from torch_prepared.errors import SpecError
from torch_prepared.interpret import (
    Outcome,
    ProofFeatures,
    extract_sufficient,
    proof_features,
    proof_size_report,
    widen_region,
)
from torch_prepared.interpret import extract as extract_module
from torch_prepared.interpret._confirmation import Confirmation
from torch_prepared.interpret._query import PruneQuery, ReductionMode, make_query
from torch_prepared.relax import evaluate_graph
from torch_prepared.specs import Box, Property, SafeSet

from .cases import METHODS, network, property_at_center, proved_cases

SEARCHES = ("prefix", "greedy", "exact")


def least_margin(record: NetworkRecord, claim: PropertyRecord, x: torch.Tensor) -> float:
    """Smallest margin of points (q, n), in rational arithmetic."""
    return min(margin_exactly(claim, evaluate_exactly(record, p.numpy())) for p in x)


def all_masks(n: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product((False, True), repeat=n)))


@pytest.mark.parametrize("method", METHODS)
def test_kept_sets_shrink_and_the_smallest_equals_enumeration(method: str) -> None:
    sizes = []
    for features in proved_cases(6, method):
        sets = [extract_sufficient(features, method=s) for s in SEARCHES]
        assert all(s.sufficient for s in sets)
        counts = [len(s.kept) for s in sets]
        assert counts == sorted(counts, reverse=True)
        masks = all_masks(features.size)
        enough = masks[PruneQuery(features).sufficient(masks)]
        assert sets[2].minimum
        assert counts[2] == int(enough.sum(dim=1).min())
        sizes.append(counts[2])
    assert max(sizes) >= 1  # otherwise the biases decided everything


@pytest.mark.parametrize("method", ["ibp", "zonotope", "crown"])
def test_branch_and_cut_alone_finds_the_smallest(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch_prepared.interpret import _exact

    monkeypatch.setattr(_exact, "_MAX_PAIRS", -1)
    for features in proved_cases(4, method):
        found = extract_sufficient(features, method="exact")
        masks = all_masks(features.size)
        least = int(masks[PruneQuery(features).sufficient(masks)].sum(dim=1).min())
        assert found.sufficient
        assert found.fewest <= least
        if method != "crown":  # where excluding sets one by one may end without an answer
            assert found.minimum
        if found.minimum:
            assert len(found.kept) == least


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("search", SEARCHES)
def test_reduced_proof_replays_and_its_network_satisfies_the_property(
    method: str, search: str
) -> None:
    for features in proved_cases(3, method):
        found = extract_sufficient(features, method=search)
        assert found.outcome is Outcome.SUFFICIENT
        replay = found.confirmation
        assert replay is not None
        assert replay.certificate is not None
        assert replay.network is not None
        claims, record = [features.prop.record()], features.cut.pruned(found.kept).record()
        check = check_certificate(replay.certificate, record, claims)
        assert check.status is Verdict.CERTIFIED
        x = attack(lambda p, g=replay.network: evaluate_graph(g, p), features.prop.region)
        assert found.margin <= least_margin(record, claims[0], x[-12:])
        assert found.margin >= found.claimed - 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_greedy_sets_lose_the_proof_with_any_single_feature(method: str) -> None:
    for features in proved_cases(5, method):
        found = extract_sufficient(features, method="greedy", order="random", seed=7)
        assert found.irreducible
        query = PruneQuery(features)
        for i in found.kept.tolist():
            mask = torch.zeros(1, features.size, dtype=torch.bool)
            mask[0, found.kept] = True
            mask[0, i] = False
            assert not bool(query.sufficient(mask)[0])


def test_one_row_over_a_box_keeps_the_largest_contributions() -> None:
    checked = 0
    for features in proved_cases(5, "ibp"):
        row, offset = features.prop.safe.clauses[0]
        single = Property(features.prop.region, SafeSet(((row, offset - 0.3),)))
        one = proof_features(features.cut.graph, single, "ibp")
        if not one.proved:
            continue
        gains = torch.minimum(one.rows * one.lower, one.rows * one.upper)[0]
        sums = one.offset + gains.sort(descending=True).values.cumsum(0)
        enough = (sums >= one.slack).nonzero().flatten()
        least = 0 if float(one.offset) >= one.slack else 1 + int(enough[0])
        assert len(extract_sufficient(one, method="exact").kept) == least
        checked += 1
    assert checked


@pytest.mark.parametrize("name", ["conv", "residual", "sequence", "mixed", "branching", "pooling"])
def test_every_architecture_is_replayed(name: str) -> None:
    for seed in range(3):
        graph = network(name, seed)
        features = proof_features(graph, property_at_center(graph, seed, 1e-3), "crown")
        found = extract_sufficient(features, method="exact", time_limit=10)
        expected = Outcome.SUFFICIENT if features.proved else Outcome.NOT_PROVED
        assert found.outcome is expected


def test_smooth_activations_are_replayed() -> None:
    graph = mlp(op="tanh", seed=1)
    found = extract_sufficient(proof_features(graph, property_at_center(graph), "crown"))
    assert found.sufficient


class TestCoarsen:
    @pytest.fixture(params=METHODS)
    def features(self, request: pytest.FixtureRequest) -> ProofFeatures:
        for features in proved_cases(20, request.param):
            domain = widen_region(features.prop.region, 1.0)
            if extract_sufficient(features, mode="coarsen", domain=domain).sufficient:
                return features
        raise AssertionError("no proof whose intervals alone prove the property")

    def test_margin_grows_with_the_kept_set_and_ends_at_the_box_proof(
        self, features: ProofFeatures
    ) -> None:
        query = make_query(features, ReductionMode.COARSEN, widen_region(features.prop.region, 8.0))
        masks = torch.rand(50, features.size) < 0.5
        more = masks | (torch.rand(50, features.size) < 0.3)
        assert bool((query.margins(more) >= query.margins(masks) - 1e-12).all())
        ends = torch.minimum(features.rows * features.lower, features.rows * features.upper)
        whole = (ends.sum(dim=1) + features.offset).min()
        everything = torch.ones(1, features.size, dtype=torch.bool)
        torch.testing.assert_close(query.margins(everything)[0], whole)

    @pytest.mark.parametrize("search", SEARCHES)
    def test_the_original_network_has_the_margin_that_was_proved(
        self, features: ProofFeatures, search: str
    ) -> None:
        domain = widen_region(features.prop.region, 6.0)
        found = extract_sufficient(features, method=search, mode="coarsen", domain=domain)
        assert found.sufficient, found.confirmation
        assert "The network itself" in found.statement
        graph, prop = features.cut.graph, features.prop
        x = attack(lambda p: evaluate_graph(graph, p), prop.region)
        assert found.margin <= least_margin(graph.record(), prop.record(), x[-12:])

    def test_the_domain_must_hold_the_region(self, features: ProofFeatures) -> None:
        with pytest.raises(SpecError, match="got no domain"):
            extract_sufficient(features, mode="coarsen")
        away = Box(features.prop.region.lower + 1, features.prop.region.upper + 1)
        with pytest.raises(SpecError, match="does not hold the region"):
            extract_sufficient(features, mode="coarsen", domain=away)


def test_positive_constants_need_no_features() -> None:
    graph = mlp((3, 5, 2), seed=1)
    bias = graph.nodes[-1].params["bias"].name
    graph = graph.with_parameters({bias: torch.tensor([50.0, 0.0], dtype=torch.float64)})
    prop = Property(Box([-1.0] * 3, [1.0] * 3), SafeSet.argmax(0, 2))
    for search in SEARCHES:
        found = extract_sufficient(proof_features(graph, prop, "ibp"), method=search)
        assert (found.sufficient, len(found.kept), found.minimum) == (True, 0, True)


def test_one_feature_and_unused_features() -> None:
    single = mlp((2, 1, 2), seed=4)
    zero = mlp((2, 3, 2), seed=4)
    weight = zero.nodes[-1].params["weight"].name
    zero = zero.with_parameters({weight: torch.zeros_like(zero.parameters[weight])})
    for graph in (single, zero):
        found = extract_sufficient(proof_features(graph, property_at_center(graph, 1)))
        assert found.sufficient
    assert found.candidates == 0


def test_a_margin_of_exactly_zero_is_not_proved() -> None:
    graph = mlp((2, 3, 2), seed=4)
    flat = graph.with_parameters({n: torch.zeros_like(v) for n, v in graph.parameters.items()})
    prop = Property(Box([-1.0] * 2, [1.0] * 2), SafeSet.argmax(0, 2))
    found = extract_sufficient(proof_features(flat, prop))
    assert found.outcome is Outcome.NOT_PROVED
    assert math.isnan(found.margin)
    assert len(found.kept) == 0
    assert found.minimum is None


def test_a_wide_region_is_not_proved_without_an_error() -> None:
    graph = mlp(seed=1)
    found = extract_sufficient(proof_features(graph, property_at_center(graph, radius=50.0)))
    assert found.outcome is Outcome.NOT_PROVED
    assert found.statement.startswith("Nothing")


def test_what_the_checker_refuses_is_not_sufficient(monkeypatch: pytest.MonkeyPatch) -> None:
    features = proved_cases(1, "crown")[0]
    refusal = Confirmation(Verdict.UNKNOWN, math.nan, None, None, "refused")
    monkeypatch.setattr(extract_module, "confirm", lambda *_: refusal)
    found = extract_sufficient(features)
    assert found.outcome is Outcome.UNCONFIRMED
    assert not found.sufficient
    assert found.minimum is None
    assert found.statement.startswith("Nothing")


def test_an_insufficient_set_is_not_confirmed() -> None:
    from torch_prepared.core.deadline import Deadline
    from torch_prepared.interpret._confirm import confirm

    for method in METHODS:
        features = proved_cases(1, method)[0]  # whose constants are zero
        query = PruneQuery(features)
        empty = torch.zeros(features.size, dtype=torch.bool)
        assert not confirm(query, empty, Deadline(None)).holds


def test_no_time_still_gives_a_replayed_set() -> None:
    features = proved_cases(1, "crown")[0]
    found = extract_sufficient(features, method="exact", time_limit=1e-9)
    assert found.outcome in (Outcome.SUFFICIENT, Outcome.UNCONFIRMED)
    assert not (found.complete and len(found.kept) > 0)


def test_unknown_names_are_refused() -> None:
    features = proved_cases(1, "ibp")[0]
    for argument in ("method", "mode", "order"):
        with pytest.raises(SpecError, match="got 'nonsense'; expected one of"):
            extract_sufficient(features, **{argument: "nonsense"})


def test_report_counts_proofs_and_sizes() -> None:
    graph = mlp(seed=1)
    properties = [property_at_center(graph, seed, 1e-3) for seed in range(3)]
    properties.append(property_at_center(graph, 0, 50.0))
    seen = []
    rows = proof_size_report(
        graph,
        properties,
        searches=(("prefix", "priority"), ("prefix", "random")),
        visit=lambda i, f, s: seen.append((i, f.proved, len(s))),
    )
    assert [(r.method, r.order) for r in rows] == [("prefix", "priority"), ("prefix", "random")]
    assert rows[0].properties == 4
    assert rows[0].proofs + rows[0].unconfirmed == sum(proved for _, proved, _ in seen)
    assert seen[3] == (3, False, 0)

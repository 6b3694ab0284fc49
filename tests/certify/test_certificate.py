"""Files: round trip, every altered field rejected, hostile input bounded."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from torch_prepared.certify import (
    Certificate,
    InputRecord,
    NetworkRecord,
    ProofTree,
    PropertyRecord,
    Slopes,
    Verdict,
    check_certificate,
    evaluate_exactly,
    margin_exactly,
)
from torch_prepared.certify.encoding import ArrayReader, digest, encode_array
from torch_prepared.errors import CertificateError, UnsupportedOperationError

from .nets import box, mlp, nonlinear_inputs


def example() -> tuple[NetworkRecord, list[PropertyRecord], Certificate]:
    net = mlp((2, 5, 5, 3), 4).record()
    output = evaluate_exactly(net, np.zeros(2))
    order = np.argsort([float(v) for v in output])
    row = np.zeros((2, 3))
    row[:, order[-1]], row[0, order[0]], row[1, order[1]] = 1.0, -1.0, -1.0
    region = box(np.full(2, -0.01), np.full(2, 0.02))
    ball = InputRecord(
        "lp_ball", region.lower, region.upper, center=np.zeros(2), radius=0.01, p=float("inf")
    )
    hull = InputRecord(
        "v_polytope", region.lower, region.upper, vertices=np.array([[-0.01, 0.0], [0.02, 0.01]])
    )
    clauses = [(row[:1], np.zeros(1)), (row, np.zeros(2))]
    properties = [PropertyRecord(r, clauses, name=r.kind) for r in (region, ball, hull)]
    tree = ProofTree(
        split_dim=np.array([0, -1, 1, -1, -1], dtype=np.int32),
        split_value=np.array([0.005, 0, 0.0, 0, 0]),
        rows=np.array([[0, 0], [0, 1], [0, 0]], dtype=np.int32),
        tighten=np.array([True, False, False, False, True]),
        plan=nonlinear_inputs(net),
        slopes={"relu2": Slopes(lower=np.full((3, 5), 0.5, dtype=np.float32))},
        tighten_slopes={"relu4": Slopes(np.full((1, 5), 0.5), np.full((2, 5), 0.5))},
    )
    leaf = ProofTree.leaf([0, 1], tighten=nonlinear_inputs(net))
    return net, properties, Certificate.create(net, properties, [tree, leaf, leaf], {"by": "me"})


@pytest.mark.parametrize("name", ["c.json", "c.json.gz"])
def test_round_trip_is_certified(tmp_path: Path, name: str) -> None:
    net, properties, certificate = example()
    certificate.save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    loaded = Certificate.load(tmp_path / name)
    result = check_certificate(loaded, net, properties)
    assert result.status is Verdict.CERTIFIED
    assert all(c.status is Verdict.CERTIFIED and c.margin > 0 for c in result.per_property)
    assert loaded.to_json() == certificate.to_json()
    deployed = check_certificate(loaded, net, properties, arithmetic="float32")
    assert deployed.status is Verdict.CERTIFIED
    assert deployed.margin < result.margin


def json_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from json_paths(value[key], (*path, key))
    elif isinstance(value, list):
        for k, item in enumerate(value):
            yield from json_paths(item, (*path, k))


def replaced(data: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    mutant = copy.deepcopy(data)
    if not path:
        return change(mutant)
    parent = mutant
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = change(parent[path[-1]])
    return mutant


def dropped(data: Any, path: tuple[Any, ...]) -> Any:
    mutant = copy.deepcopy(data)
    parent = mutant
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return mutant


def altered(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value[:-1] + ("A" if not value.endswith("A") else "B")
    if isinstance(value, list):
        return [*value, 0]
    if isinstance(value, dict):
        return {**value, "strange": 0}
    return 1


def test_every_altered_or_missing_field_is_rejected() -> None:
    data = json.loads(json.dumps(example()[2].to_json()))
    for path in json_paths(data):
        with pytest.raises(CertificateError):
            Certificate.from_json(replaced(data, path, altered))
        if path:
            with pytest.raises(CertificateError):
                Certificate.from_json(dropped(data, path))


def resealed(data: Any) -> Any:
    """The data with all digests recomputed, as a forger would."""
    if not isinstance(data, dict):
        return data
    content = {key: value for key, value in data.items() if key != "digest"}
    if isinstance(content.get("structure"), dict):
        content["structure_digest"] = digest(content["structure"])
    return {**content, "digest": digest(content)}


def test_resealed_mutants_are_rejected_or_still_true() -> None:
    """A forger who recomputes the digests gets an error, UNKNOWN, or a true statement."""
    net, properties, certificate = example()
    data = json.loads(json.dumps(certificate.to_json()))
    harmless = ("name", "metadata", "tighten", "plan", "slopes", "tighten_slopes", "digest")
    harmless += ("structure_digest", "split_value", "split_dim", "rows")
    for path in json_paths(data):
        mutants = [lambda path=path: replaced(data, path, altered)]
        if path:
            mutants.append(lambda path=path: dropped(data, path))
        for make in mutants:
            try:
                mutant = Certificate.from_json(resealed(make()))
                result = check_certificate(mutant, net, properties)
            except (CertificateError, UnsupportedOperationError):
                continue
            if result.status is Verdict.CERTIFIED:
                assert any(key in harmless for key in path), path


def test_forged_arrays_never_certify_a_false_statement() -> None:
    """Random bytes in the proof's arrays cannot prove a property that is violated."""
    net, properties, certificate = example()
    false = [
        PropertyRecord(p.region, [(-rows, offset) for rows, offset in p.clauses])
        for p in properties
    ]
    for prop in false:
        assert margin_exactly(prop, evaluate_exactly(net, np.zeros(2))) < Fraction(0)
    rng = np.random.default_rng(0)
    for _ in range(40):
        dims = np.array([rng.integers(0, 2), -1, rng.integers(0, 2), -1, -1], dtype=np.int32)
        tree = ProofTree(
            dims,
            rng.normal(size=5) * 10.0 ** rng.integers(-3, 300),
            rng.integers(0, 1, (3, 2)).astype(np.int32),
            rng.random(5) < 0.5,
            nonlinear_inputs(net),
            {"relu2": Slopes(rng.normal(size=(3, 5)) * 10.0 ** rng.integers(0, 300))},
        )
        forged = Certificate.create(net, false, [tree] * 3)
        result = check_certificate(forged, net, false)
        assert result.status is Verdict.UNKNOWN
        assert all(c.status is Verdict.UNKNOWN for c in result.per_property)
    assert certificate.proofs


def test_one_flipped_bit_of_a_weight_is_rejected() -> None:
    net, properties, certificate = example()
    for name, value in net.weights.items():
        raw = bytearray(value.tobytes())
        raw[len(raw) // 2] ^= 1
        flipped = np.frombuffer(bytes(raw), dtype=value.dtype).reshape(value.shape)
        other = NetworkRecord(net.structure, {**net.weights, name: flipped})
        with pytest.raises(CertificateError, match="weights"):
            check_certificate(certificate, other, properties)


def test_other_properties_or_structure_are_rejected() -> None:
    net, properties, certificate = example()
    with pytest.raises(CertificateError, match="3 properties"):
        check_certificate(certificate, net, properties[:2])
    with pytest.raises(CertificateError, match="another property"):
        check_certificate(certificate, net, [properties[1], properties[0], properties[2]])
    first = properties[0]
    wider = PropertyRecord(box(first.region.lower - 1e-9, first.region.upper), first.clauses)
    with pytest.raises(CertificateError, match="another property"):
        check_certificate(certificate, net, [wider, *properties[1:]])
    structure = copy.deepcopy(dict(net.structure))
    structure["nodes"][2]["op"] = "abs"
    with pytest.raises(CertificateError, match="structure"):
        check_certificate(certificate, NetworkRecord(structure, net.weights), properties)


@pytest.mark.parametrize(
    "change",
    [
        {"rows": np.array([[0, 2]], dtype=np.int32)},
        {"rows": np.array([[-1, 0]], dtype=np.int32)},
        {"rows": np.array([[0]], dtype=np.int32)},
        {"rows": np.array([[0, 0], [0, 0]], dtype=np.int32)},
        {"rows": np.array([[0, 0]])},
        {"split_dim": np.array([0], dtype=np.int32)},
        {"split_dim": np.array([-2], dtype=np.int32)},
        {"split_dim": np.zeros(0, dtype=np.int32)},
        {"split_value": np.array([np.nan])},
        {"split_value": np.zeros(2)},
        {"plan": ("nothing",)},
        {"plan": ("relu2",)},
        {"slopes": {"linear1": Slopes(np.zeros((1, 5)))}},
        {"slopes": {"relu2": Slopes(np.zeros((1, 4)))}},
        {"slopes": {"relu2": Slopes(np.zeros((2, 5)))}},
        {"slopes": {"relu2": Slopes(np.full((1, 5), np.inf))}},
        {"slopes": {"relu2": Slopes(np.zeros((1, 5), dtype=np.int32))}},
    ],
)
def test_malformed_proofs_are_refused(change: dict[str, Any]) -> None:
    net, properties, _ = example()
    parts: dict[str, Any] = {
        "split_dim": np.array([-1], dtype=np.int32),
        "split_value": np.zeros(1),
        "rows": np.array([[0, 0]], dtype=np.int32),
        "tighten": np.array([False]),
    }
    with pytest.raises(CertificateError):
        check_certificate(
            Certificate.create(net, properties[:1], [ProofTree(**{**parts, **change})]),
            net,
            properties[:1],
        )


def test_split_beyond_the_inputs_is_refused() -> None:
    net, properties, _ = example()
    tree = ProofTree(
        np.array([2, -1, -1], dtype=np.int32),
        np.zeros(3),
        np.zeros((2, 2), dtype=np.int32),
        np.zeros(3, dtype=np.bool_),
    )
    with pytest.raises(CertificateError, match="input"):
        check_certificate(Certificate.create(net, properties[:1], [tree]), net, properties[:1])


def test_a_number_beyond_float64_is_refused() -> None:
    data = example()[2].to_json()
    data["properties"][1]["region"]["radius"] = 10**400
    content = {key: value for key, value in data.items() if key != "digest"}
    with pytest.raises(CertificateError, match="radius"):
        Certificate.from_json({**content, "digest": digest(content)})


def bomb(size: int) -> str:
    return base64.b64encode(zlib.compress(bytes(size))).decode()


@pytest.mark.parametrize(
    "value",
    [
        {"dtype": "float64", "shape": [2**31 - 1, 2**30], "data": ""},
        {"dtype": "float64", "shape": [2**40], "data": ""},
        {"dtype": "float64", "shape": [-1], "data": ""},
        {"dtype": "float64", "shape": [True], "data": ""},
        {"dtype": "float64", "shape": [1] * 40, "data": bomb(8)},
        {"dtype": "float64", "shape": [1], "data": bomb(10**8)},
        {"dtype": "float64", "shape": [2], "data": bomb(8)},
        {"dtype": "float64", "shape": [1], "data": bomb(8)[:-4]},
        {"dtype": "float64", "shape": [1], "data": "!"},
        {"dtype": "object", "shape": [1], "data": bomb(8)},
        {"dtype": "bool", "shape": [1], "data": base64.b64encode(zlib.compress(b"\x02")).decode()},
        {"dtype": "float64", "shape": [1]},
        {"dtype": "float64", "shape": [1], "data": bomb(8), "more": 1},
        [1.0],
    ],
)
def test_hostile_arrays_are_refused(value: Any) -> None:
    with pytest.raises(CertificateError):
        ArrayReader().read(value, "array")


def test_array_budget_is_shared() -> None:
    reader = ArrayReader(budget=100)
    value = encode_array(np.zeros(10))
    reader.read(value, "first")
    with pytest.raises(CertificateError, match="left"):
        reader.read(value, "second")


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"version": NaN}',
        b'{"version": Infinity}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
@pytest.mark.parametrize("name", ["c.json", "c.json.gz"])
def test_bad_files_are_refused(tmp_path: Path, text: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    with pytest.raises(CertificateError) as caught:
        Certificate.load(path)
    assert "\n" not in str(caught.value)


def test_missing_and_truncated_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CertificateError):
        Certificate.load(tmp_path / "none.json")
    example()[2].save(tmp_path / "c.json.gz")
    whole = (tmp_path / "c.json.gz").read_bytes()
    (tmp_path / "c.json.gz").write_bytes(whole[:-20])
    with pytest.raises(CertificateError):
        Certificate.load(tmp_path / "c.json.gz")


def test_nan_weights_and_bad_regions_are_refused() -> None:
    net, properties, _ = example()
    leaf = ProofTree.leaf([0, 0])
    name = next(iter(net.weights))
    broken = NetworkRecord(net.structure, {**net.weights, name: net.weights[name] * np.nan})
    with pytest.raises(CertificateError, match="not finite"):
        check_certificate(
            Certificate.create(broken, properties[:1], [leaf]), broken, properties[:1]
        )
    for region in (
        box(np.ones(2), np.zeros(2)),
        box(np.array([np.nan, 0.0]), np.ones(2)),
        box(np.zeros(3), np.ones(3)),
        box(np.zeros(2), np.array([1.0, np.inf])),
        InputRecord("v_polytope", np.zeros(2), np.ones(2), vertices=np.array([[0.0, 1.1]])),
        InputRecord("lp_ball", np.zeros(2), np.ones(2), center=np.zeros(2), radius=-1.0, p=2.0),
        InputRecord("lp_ball", np.zeros(2), np.ones(2), center=np.zeros(2), radius=1.0, p=3.0),
        InputRecord("cone", np.zeros(2), np.ones(2)),
    ):
        prop = PropertyRecord(region, properties[0].clauses)
        with pytest.raises(CertificateError):
            check_certificate(Certificate.create(net, [prop], [leaf]), net, [prop])


def test_overflow_is_unknown_with_a_reason() -> None:
    net, properties, _ = example()
    prop = PropertyRecord(box(np.full(2, -1e308), np.full(2, 1e308)), properties[0].clauses)
    for plan in ((), nonlinear_inputs(net)):
        certificate = Certificate.create(net, [prop], [ProofTree.leaf([0, 0], tighten=plan)])
        result = check_certificate(certificate, net, [prop])
        assert result.status is Verdict.UNKNOWN
        assert "not finite" in result.per_property[0].reason
        assert np.isnan(result.margin)


def test_strictness_decides_at_zero() -> None:
    """An output that is exactly 0 satisfies >= 0 only, and rounding terms may deny even that."""
    net, properties, _ = example()
    rows = np.zeros((1, 3))
    strict = PropertyRecord(properties[0].region, [(rows, np.zeros(1))])
    certificate = Certificate.create(net, [strict], [ProofTree.leaf([0])])
    assert check_certificate(certificate, net, [strict]).status is Verdict.UNKNOWN


def test_float32_mode_needs_float32_weights_and_known_activations() -> None:
    net = mlp((2, 3, 2), 0, "tanh").record()
    prop = PropertyRecord(box(np.zeros(2), np.ones(2)), [(np.eye(2)[:1], np.full(1, 1e3))])
    certificate = Certificate.create(net, [prop], [ProofTree.leaf([0])])

    def verdict(**options: Any) -> Verdict:
        return check_certificate(certificate, net, [prop], **options).status

    assert verdict() is Verdict.CERTIFIED
    assert verdict(arithmetic="float32") is Verdict.UNKNOWN
    assert verdict(arithmetic="float32", activation_ulp=4.0) is Verdict.CERTIFIED
    wide = NetworkRecord(net.structure, {k: v.astype(np.float64) for k, v in net.weights.items()})
    certificate = Certificate.create(wide, [prop], [ProofTree.leaf([0])])
    result = check_certificate(certificate, wide, [prop], arithmetic="float32", activation_ulp=4.0)
    assert result.status is Verdict.UNKNOWN
    assert "float64" in result.per_property[0].reason

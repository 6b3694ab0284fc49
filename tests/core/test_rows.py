import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.core.rows import LinearRows, RowBuilder, Unknowns
from torch_prepared.errors import SolverError


def test_blocks_are_contiguous_and_split_back() -> None:
    unknowns = Unknowns()
    w = unknowns.add("w", (2, 3), lower=-1.0, upper=np.arange(6.0).reshape(2, 3))
    t = unknowns.add("t", lower=0.0)
    none = unknowns.add("none", (0, 4))
    assert (w.start, w.stop, t.start, none.size, unknowns.count) == (0, 6, 6, 0, 7)
    assert t.columns.shape == ()
    assert int(t.columns) == 6
    assert unknowns.upper.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, np.inf]
    vector = np.arange(9.0)
    parts = unknowns.split(vector)
    assert np.array_equal(parts["w"], vector[:6].reshape(2, 3))
    assert parts["t"] == 6.0
    parts["w"][:] = -1.0
    assert vector[0] == 0.0
    assert [b.name for b in unknowns] == ["w", "t", "none"]
    assert "t" in unknowns


@pytest.mark.parametrize(
    ("name", "shape", "bounds", "match"),
    [
        ("w", (1,), {}, "twice"),
        ("a", (2,), {"lower": np.zeros(3)}, "broadcasts"),
        ("a", (2,), {"lower": 1.0, "upper": 0.0}, "lower > upper"),
        ("a", (2,), {"lower": np.nan}, "NaN"),
    ],
)
def test_bad_blocks_are_refused(
    name: str, shape: tuple[int, ...], bounds: dict[str, object], match: str
) -> None:
    unknowns = Unknowns()
    unknowns.add("w", (2,))
    with pytest.raises(SolverError, match=match):
        unknowns.add(name, shape, **bounds)
    assert unknowns.count == 2


def test_unknown_block_and_short_vector_are_named() -> None:
    unknowns = Unknowns()
    unknowns.add("w", (2,))
    with pytest.raises(SolverError, match="one of: w"):
        unknowns["v"]
    with pytest.raises(SolverError, match="at least 2"):
        unknowns.split(np.zeros(1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_builder_equals_dense_accumulation(seed: int, equal: bool) -> None:
    rng = np.random.default_rng(seed)
    builder, dense = RowBuilder(), np.zeros((7, 5))
    first, second = builder.ge(np.ones((2, 3))), (builder.eq if equal else builder.ge)(2.0)
    assert first.shape == (2, 3)
    assert second.shape == ()
    for _ in range(4):
        rows, cols, values = rng.integers(0, 7, 6), rng.integers(0, 5, 6), rng.normal(size=6)
        builder.add(rows, cols, values)
        np.add.at(dense, (rows, cols), values)
    builder.add(first[:, :, None], np.arange(3), 0.5)
    dense[:6, :3] += 0.5
    built = builder.build(5)
    assert np.allclose(built.matrix.toarray(), dense, atol=1e-15)
    assert built.rhs.tolist() == [1.0] * 6 + [2.0]
    assert built.equal.tolist() == [False] * 6 + [equal]


def test_builder_refuses_entries_out_of_range() -> None:
    builder = RowBuilder()
    builder.add(builder.ge(0.0), 3, 1.0)
    with pytest.raises(SolverError, match="column 3"):
        builder.build(3)
    builder = RowBuilder()
    builder.add(0, 0, 1.0)
    with pytest.raises(SolverError, match="row 0"):
        builder.build(1)


@pytest.mark.parametrize("dense", [False, True])
def test_nonfinite_and_misshapen_rows_are_refused(dense: bool) -> None:
    def form(m: np.ndarray) -> np.ndarray | sp.csr_matrix:
        return m if dense else sp.csr_matrix(m)

    with pytest.raises(SolverError, match="NaN"):
        LinearRows(form(np.array([[np.nan]])), np.zeros(1))
    with pytest.raises(SolverError, match="infinite"):
        LinearRows(form(np.ones((1, 1))), np.array([-np.inf]))
    with pytest.raises(SolverError, match="expected"):
        LinearRows(form(np.ones((2, 1))), np.zeros(1))
    with pytest.raises(SolverError, match="expected"):
        LinearRows(form(np.ones((1, 1))), np.zeros(1), np.zeros(2, dtype=bool))


def test_stack_widens_and_keeps_dense_only_if_all_are() -> None:
    a = LinearRows(np.ones((1, 2)), np.ones(1), np.array([True]))
    b = LinearRows(np.full((2, 3), 2.0), np.zeros(2))
    both = LinearRows.stack([a, b])
    assert isinstance(both.matrix, np.ndarray)
    assert both.matrix.shape == (3, 3)
    assert both.matrix[0].tolist() == [1.0, 1.0, 0.0]
    assert both.equal.tolist() == [
        True,
        False,
        False,
    ]
    sparse = LinearRows(sp.csr_matrix((1, 4)), np.zeros(1))
    mixed = LinearRows.stack([a, sparse], columns=6)
    assert sp.issparse(mixed.matrix)
    assert mixed.columns == 6
    assert LinearRows.stack([], columns=3).columns == 3
    with pytest.raises(SolverError, match="at least 3"):
        b.widen(2)


def test_violation_is_zero_exactly_where_rows_hold() -> None:
    rows = LinearRows(np.eye(3), np.array([1.0, 1.0, 1.0]), np.array([False, False, True]))
    assert rows.violation([2.0, 0.5, 1.5]).tolist() == [0.0, 0.5, 0.5]
    assert rows.violation([np.nan, 1.0, 1.0])[0] == np.inf
    chosen = rows.select(np.array([2, 0]))
    assert chosen.equal.tolist() == [True, False]
    assert chosen.matrix[0].tolist() == [0.0, 0.0, 1.0]


def test_million_rows_are_built_without_loops() -> None:
    builder, k = RowBuilder(), 1_000_000
    rows = builder.ge(np.zeros(k))
    columns = np.arange(k)
    for shift in range(3):
        builder.add(rows, (columns + shift) % k, 1.0)
    built = builder.build(k)
    assert built.entries == 3 * k
    assert built.violation(np.ones(k)).max() == 0.0


def test_repeated_entries_are_summed_without_touching_the_input() -> None:
    matrix = sp.csr_matrix((np.ones(2), np.zeros(2, dtype=int), np.array([0, 2])), shape=(1, 1))
    rows = LinearRows(matrix, np.ones(1))
    assert rows.entries == 1
    assert matrix.nnz == 2

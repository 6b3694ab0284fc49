"""The VNN-LIB reader and writer: meaning, rounding, refusals and round trips."""

import gzip
import random
import re
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_prepared.errors import SpecError
from torch_prepared.specs import Box, LpBall, Property, SafeSet, load_vnnlib, save_vnnlib

HEADER = """; comment (with parentheses
(declare-const X_0 Real)
(declare-fun X_1 () Real)
(declare-const Y_0 Real)
(declare-const Y_1 Real)
"""
BOX = "(assert (>= X_0 0)) (assert (<= X_0 1)) (assert (>= X_1 -1)) (assert (<= X_1 1))\n"
OUT = "(assert (<= Y_0 Y_1))\n"


def load_text(folder, text, **options):
    path = folder / "file.vnnlib"
    path.write_text(text)
    return load_vnnlib(path, **options)


def load_or_none(folder, text):
    """The properties, or None where the random file has no unsafe point or no output atom."""
    try:
        return load_text(folder, text)
    except SpecError as error:
        if not re.search("unsafe set that is empty|no output constraint", str(error)):
            raise
        return None


# --- an independent, naive evaluator -----------------------------------------------------------


def read_expressions(text):
    """All top-level S-expressions as nested lists of strings."""
    tokens = re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text))
    stack = [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")":
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    return stack[0]


def evaluate(node, values):
    """Exact value, boolean or rational, of one expression at a point."""
    if isinstance(node, str):
        return values[node] if node in values else Fraction(Decimal(node))
    operator, *arguments = node[0], *[evaluate(argument, values) for argument in node[1:]]
    if operator in ("and", "or"):
        return all(arguments) if operator == "and" else any(arguments)
    if operator == "*":
        return arguments[0] * arguments[1]
    if operator == "+":
        return sum(arguments)
    if operator == "-":
        return -arguments[0] if len(arguments) == 1 else arguments[0] - sum(arguments[1:])
    a, b = arguments
    return {"<=": a <= b, "<": a < b, ">=": a >= b, ">": a > b}[operator]


def is_violation(expressions, x, y):
    values = {f"X_{i}": Fraction(v) for i, v in enumerate(x)}
    values |= {f"Y_{i}": Fraction(v) for i, v in enumerate(y)}
    return all(evaluate(e[1], values) for e in expressions if e[0] == "assert")


def violations_of(properties, x, y):
    """Which pairs of points (b, n) and outputs (b, m) violate one of the properties."""
    points, outputs = torch.tensor(x).double(), torch.tensor(y).double()
    found = [p.region.contains(points) & ~p.safe.contains(outputs) for p in properties]
    return torch.stack(found).any(dim=0).tolist()


class FormulaWriter:
    """Random formulas over small dyadic numbers, on which floating point is exact."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def number(self):
        value = self.random.randint(-8, 8) / 4
        text = f"{value}" if self.random.random() < 0.7 else f"{int(value * 4)}e0"
        return text if "e" not in text else f"(* 0.25 {text})"

    def operator(self, strict):
        return self.random.choice(("<", ">") if strict else ("<=", ">="))

    def output_atom(self, strict):
        kind = self.random.randrange(4)
        left = f"Y_{self.random.randrange(3)}"
        if kind == 0:
            right = self.number()
        elif kind == 1:
            right = f"Y_{self.random.randrange(3)}"
        elif kind == 2:
            left, right = self.number(), left
        else:
            left = f"(+ (* {self.number()} {left}) (- Y_0 Y_1) {self.number()})"
            right = f"(- (* Y_2 {self.number()}))"
        return f"({self.operator(strict)} {left} {right})"

    def box(self):
        parts = []
        for i in range(2):
            low, high = sorted((self.random.randint(-8, 8) / 4, self.random.randint(-8, 8) / 4))
            parts += [f"(>= X_{i} {low})", f"(<= X_{i} {high})"]
        if self.random.random() < 0.3:
            parts.append(f"(<= (+ X_0 (* 2 X_0)) {self.number()})")
        return " ".join(parts)

    def formula(self, depth, strict):
        if depth == 0 or self.random.random() < 0.3:
            return self.output_atom(strict)
        parts = " ".join(self.formula(depth - 1, strict) for _ in range(self.random.randint(1, 3)))
        return f"({self.random.choice(('and', 'or'))} {parts})"

    def file(self, strict):
        lines = [f"(declare-const X_{i} Real)" for i in range(2)]
        lines += [f"(declare-const Y_{i} Real)" for i in range(3)]
        if self.random.random() < 0.5:
            lines.append(f"(assert (and {self.box()}))")
        else:
            parts = [
                f"(and {self.box()} {self.formula(1, strict)})"
                for _ in range(self.random.randint(1, 3))
            ]
            lines.append(f"(assert (or {' '.join(parts)}))")
        lines.append(f"(assert {self.formula(2, strict)})")
        return "\n".join(lines)


@pytest.mark.parametrize("strict", [False, True])
def test_meaning_equals_the_naive_evaluator(tmp_path, strict):
    """Random files, 60 points each with ties provoked; strictness is uniform per file."""
    generator = random.Random(5)
    agreed, violated = 0, 0
    for seed in range(200):
        text = FormulaWriter(seed).file(strict)
        expressions = read_expressions(text)
        x = [[generator.randint(-8, 8) / 4 for _ in range(2)] for _ in range(60)]
        y = [[generator.randint(-6, 6) / 4 for _ in range(3)] for _ in range(60)]
        expected = [is_violation(expressions, *pair) for pair in zip(x, y, strict=True)]
        properties = load_or_none(tmp_path, text)
        if properties is None:
            continue
        assert violations_of(properties, x, y) == expected, text
        agreed, violated = agreed + len(x), violated + sum(expected)
    assert agreed > 8_000
    assert violated > 500


def test_mixed_strictness_only_enlarges_the_unsafe_set(tmp_path):
    text = HEADER + BOX + "(assert (or (<= Y_0 0) (< Y_1 0)))"
    (prop,) = load_text(tmp_path, text)
    assert prop.safe.strict
    assert prop.safe.contains(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist() == [False, True]


# --- rounding ----------------------------------------------------------------------------------


@given(
    st.decimals(-(10**6), 10**6, allow_nan=False, allow_infinity=False),
    st.sampled_from(["plain", "reversed"]),
)
@settings(max_examples=200, deadline=None)
def test_box_contains_the_decimal_box(tmp_path_factory, value, form):
    folder = tmp_path_factory.mktemp("vnnlib")
    low, high = (f"{value:f}", f"{value + 1:f}")
    atoms = (
        f"(assert (>= X_0 {low})) (assert (<= X_0 {high}))"
        if form == "plain"
        else f"(assert (<= {low} X_0)) (assert (>= {high} X_0))"
    )
    text = f"(declare-const X_0 Real)(declare-const Y_0 Real){atoms}(assert (<= Y_0 {low}))"
    (prop,) = load_text(folder, text)
    lower, upper = prop.region.lower[0].item(), prop.region.upper[0].item()
    assert (
        Fraction(lower) <= Fraction(Decimal(low)) <= Fraction(lower + abs(lower) * 2**-52 + 5e-324)
    )
    assert (
        Fraction(upper) >= Fraction(Decimal(high)) >= Fraction(upper - abs(upper) * 2**-52 - 5e-324)
    )
    offset = prop.safe.clauses[0][1][0].item()
    assert Fraction(-offset) >= Fraction(Decimal(low))


def test_exact_decimals_stay(tmp_path):
    text = HEADER.replace("Y_1", "Y_1") + (
        "(assert (>= X_0 0.5)) (assert (<= X_0 1e3)) (assert (>= X_1 -0.0)) (assert (<= X_1 .25))"
        + OUT
    )
    (prop,) = load_text(tmp_path, text)
    assert prop.region.lower.tolist() == [0.5, 0.0]
    assert prop.region.upper.tolist() == [1000.0, 0.25]


def test_decimal_coefficients_are_scaled_to_exact_ones(tmp_path):
    (prop,) = load_text(tmp_path, HEADER + BOX + "(assert (<= (+ (* 0.1 Y_0) (* 0.3 Y_1)) 0.5))")
    rows, offset = prop.safe.clauses[0]
    assert (rows.tolist(), offset.tolist()) == ([[1.0, 3.0]], [-5.0])


# --- structure ---------------------------------------------------------------------------------


def test_disjuncts_of_one_box_are_one_property(tmp_path):
    first = "(>= X_0 0) (<= X_0 1) (>= X_1 0) (<= X_1 1)"
    second = "(>= X_0 2) (<= X_0 3) (>= X_1 0) (<= X_1 1)"
    text = HEADER + (
        f"(assert (or (and {first} (<= Y_0 0)) (and {second} (<= Y_0 1)) (and {first} (>= Y_1 2))"
        f" (and (>= X_0 5) (<= X_0 4) (>= X_1 0) (<= X_1 1) (<= Y_0 9))))"
    )
    props = load_text(tmp_path, text)
    assert [p.name for p in props] == ["file#0", "file#1"]
    assert [len(p.safe.clauses) for p in props] == [2, 1]
    assert props[1].region.lower.tolist() == [2.0, 0.0]


def test_sizes_are_checked(tmp_path):
    text = HEADER + BOX + OUT
    assert len(load_text(tmp_path, text, input_size=2, output_size=2)) == 1
    with pytest.raises(SpecError, match="got 2 input variables; expected 5"):
        load_text(tmp_path, text, input_size=5)
    with pytest.raises(SpecError, match="got 2 output variables; expected 10"):
        load_text(tmp_path, text, output_size=10)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (BOX, "no output constraint"),
        (BOX + "(assert (or (<= Y_0 0) (<= 0 1)))", "no output constraint"),
        (OUT, "no lower bound of X_0"),
        (BOX.replace("(assert (<= X_1 1))", "") + OUT, "no upper bound of X_1"),
        (BOX + OUT + "(assert (>= X_1 3))", "bounds of X_1 contradict"),
        (BOX + "(assert (and (<= Y_0 0) (< 1 1)))", "unsafe set that is empty;"),
        (BOX + OUT + "\n\n(assert (<= X_2 1))", ":10: X_2 is used but not declared"),
        (BOX + "(assert (<= Y_0 Y_7))", ":7: Y_7 is used but not declared"),
        (BOX + OUT + "(assert (<= (+ X_0 X_1) 1))", ":8: got an atom over X_0 and X_1"),
        (BOX + "(assert (<= X_0 Y_0))", "atom over X_0 and Y_0"),
        (BOX + OUT + "(assert (<= X_0 nan))", "got 'nan'"),
        (BOX + OUT + "(assert (<= X_0 inf))", "got 'inf'"),
        (BOX + OUT + "(assert (<= X_0 1e400))", "beyond the range"),
        (BOX + OUT + "(assert (<= Y_0 -1e400))", "beyond the range"),
        (BOX + OUT + "(assert (<= X_0 1e99999999))", "expected a finite decimal"),
        (BOX + OUT + "(assert (<= X_0 1.2.3))", "expected a finite decimal"),
        (BOX + OUT + f"(assert (<= X_0 0.{'1' * 5000}))", "longer than 1200|at most 1200"),
        (BOX + OUT + f"(assert (<= Y_0 0.{'1' * 5000}))", "at most 1200"),
        (BOX + OUT + "(assert (<= Y_0 (* Y_0 Y_1)))", "product of two variables"),
        (BOX + OUT + "(assert (<= Y_0 (+)))", "no operands"),
        (BOX + OUT + "(assert (<= Y_0))", "1 operands of '<='"),
        (BOX + OUT + "(assert (<= Y_0 1 2))", "3 operands of '<='"),
        (BOX + OUT + "(assert (<= Y_0 (<= Y_0 Y_1)))", "cannot stand inside"),
        (BOX + OUT + "(assert (<= Y_0 (<= X_0 1)))", "outside of assert"),
        (BOX + OUT + "(assert (+ Y_0 1))", "cannot stand inside"),
        (BOX + OUT + "(assert Y_0)", "expected a parenthesis"),
        (BOX + OUT + "(assert)", "0 operands of 'assert'"),
        (BOX + OUT + "(assert (or))", "at least one"),
        (BOX + OUT + "(assert (not (<= Y_0 0)))", "unsupported"),
        (BOX + OUT + "(assert (= Y_0 0))", "unsupported"),
        (BOX + OUT + "(check-sat)", "unsupported"),
        (BOX + OUT + "()", "unsupported"),
        (BOX + OUT + "(<= X_0 1)", "outside of assert"),
        (BOX + OUT + "hello", "expected a parenthesis"),
        (BOX + OUT + "(assert (<= Y_0 1)", ":8: the parenthesis opened here is never closed"),
        (BOX + OUT + "(assert (<= Y_0 1)))", "without an open parenthesis"),
        (BOX + OUT + "(declare-const X_0 Real)", "declared twice"),
        (BOX + OUT + "(declare-const X_3 Real)", "no declaration of X_2"),
        (BOX + OUT + "(declare-const Z_0 Real)", "unsupported"),
        (BOX + OUT + "(assert (declare-const X_2 Real))", "inside another expression"),
        (BOX + OUT + "(assert " + "(and " * 5000 + "(<= Y_0 1)" + ")" * 5001, "nested deeper"),
        (BOX + "(assert (or (<= Y_0 0) (<= Y_0 1)))" * 40, "expands to more than"),
        (BOX + OUT + "(assert (<= Y_0 (* 1e9000 1e9000 1e9000)))", "too long to handle"),
        (
            BOX + "(assert (<= (+ (* 0.1234567890123456789 Y_0) (* 0.3 Y_1)) 0))",
            "float64 cannot hold exactly",
        ),
    ],
)
def test_malformed_files_are_refused_in_one_line(tmp_path, body, message):
    with pytest.raises(SpecError, match=message) as caught:
        load_text(tmp_path, HEADER + body)
    assert "\n" not in str(caught.value)
    assert "file.vnnlib" in str(caught.value)


@pytest.mark.parametrize("text", ["", "; nothing\n", "(declare-const X_0 Real)"])
def test_files_without_variables_are_refused(tmp_path, text):
    with pytest.raises(SpecError, match="no declaration of any"):
        load_text(tmp_path, text)


def test_broken_containers_are_refused(tmp_path):
    good = gzip.compress((HEADER + BOX + OUT).encode())
    cases = {
        "cut.vnnlib.gz": (good[:-20], "cannot be read"),
        "plain.vnnlib.gz": (b"(assert)", "cannot be read"),
        "flipped.vnnlib.gz": (good[:30] + b"\xff\xff\xff" + good[33:], "cannot be read"),
        "binary.vnnlib": (b"\xff\xfe\x00", "no text"),
        "bomb.vnnlib.gz": (gzip.compress(b" " * 10**6), "more than 100000 bytes"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SpecError, match=message):
            load_vnnlib(tmp_path / name, max_bytes=100_000)
    with pytest.raises(SpecError, match="cannot be read"):
        load_vnnlib(tmp_path / "absent.vnnlib")


@given(st.text(alphabet="()<=>+-*. \nXY_01assertandor;eE", max_size=200))
@settings(max_examples=300, deadline=None)
def test_garbage_raises_nothing_but_spec_errors(tmp_path_factory, garbage):
    path = tmp_path_factory.mktemp("vnnlib") / "file.vnnlib"
    path.write_text(HEADER + BOX + garbage)
    with pytest.raises(SpecError):
        load_vnnlib(path)


# --- writer ------------------------------------------------------------------------------------

numbers = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def properties(draw):
    inputs, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 3))

    def one():
        ends = [sorted((draw(numbers), draw(numbers))) for _ in range(inputs)]
        clauses = []
        for _ in range(draw(st.integers(1, 3))):
            rows = [[draw(numbers) for _ in range(outputs)] for _ in range(draw(st.integers(1, 3)))]
            if draw(st.booleans()):
                rows = [[float(draw(st.sampled_from((1, -1, 0)))) for _ in row] for row in rows]
            rows = [[1.0] * outputs if not any(row) else row for row in rows]
            offset = [draw(st.one_of(st.just(0.0), numbers)) for _ in rows]
            clauses.append(
                (torch.tensor(rows, dtype=torch.float64), torch.tensor(offset, dtype=torch.float64))
            )
        lower, upper = zip(*ends, strict=True)
        return Property(Box(lower, upper), SafeSet(tuple(clauses), strict=draw(st.booleans())))

    many = [one() for _ in range(draw(st.integers(1, 3)))]
    boxes = {(*p.region.lower.tolist(), *p.region.upper.tolist()) for p in many}
    return many if len(boxes) == len(many) else many[:1]


@given(many=properties(), suffix=st.sampled_from([".vnnlib", ".vnnlib.gz"]))
@settings(max_examples=100, deadline=None)
def test_writing_and_reading_changes_nothing(tmp_path_factory, many, suffix):
    path = tmp_path_factory.mktemp("vnnlib") / f"file{suffix}"
    save_vnnlib(many, path)
    loaded = load_vnnlib(path)
    assert len(loaded) == len(many)
    for before, after in zip(many, loaded, strict=True):
        assert torch.equal(before.region.lower, after.region.lower)
        assert torch.equal(before.region.upper, after.region.upper)
        assert before.safe.strict == after.safe.strict
        for (rows, offset), (rows2, offset2) in zip(
            before.safe.clauses, after.safe.clauses, strict=True
        ):
            assert torch.equal(rows, rows2)
            assert torch.equal(offset, offset2)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_writer_refuses_what_the_format_cannot_say(tmp_path):
    safe = SafeSet.argmax(0, 2)
    with pytest.raises(SpecError, match="got 0 properties"):
        save_vnnlib([], tmp_path / "a.vnnlib")
    with pytest.raises(SpecError, match="got a LpBall"):
        save_vnnlib([Property(LpBall([0.0], 1.0, 2), safe)], tmp_path / "a.vnnlib")
    pair = [Property(Box([0.0], [1.0]), safe), Property(Box([0.0] * 2, [1.0] * 2), safe)]
    with pytest.raises(SpecError, match="2 different sizes"):
        save_vnnlib(pair, tmp_path / "a.vnnlib")
    assert list(tmp_path.iterdir()) == []

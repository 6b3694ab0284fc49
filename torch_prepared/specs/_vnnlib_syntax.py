"""VNN-LIB 1.0 text to a disjunction of conjunctions of linear atoms.

One compiled regular expression splits the text and one explicit stack follows the parentheses, so
nesting cannot overflow the interpreter. Every subformula is held in disjunctive normal form while
it is read: a list of disjuncts, each a list of atoms; true is ``[[]]`` and false is ``[]``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple, NoReturn

from torch_prepared.errors import SpecError

__all__ = ["Atom", "Formula", "InputBound", "OutputAtom", "parse_formula"]

MAX_DEPTH = 200
"""Deepest nesting of parentheses that is read."""
MAX_ATOMS = 5_000_000
"""Most atoms, counted with repetition, that expanding to disjunctive normal form may create."""
_MAX_NUMBER_LENGTH = 1200
_MAX_COEFFICIENT_BITS = 40_000

_VARIABLE = r"[XY]_(?:0|[1-9]\d{0,8})"
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,4})?"
_TOKEN = re.compile(
    rf"""\s*(?:
    (\(\s*(<=|>=|<|>)\s+(X_(?:0|[1-9]\d{{0,8}}))\s+({_NUMBER})\s*\))                   # 1: 2 3 4
    |(\(\s*declare-(?:const\s+({_VARIABLE})|fun\s+({_VARIABLE})\s*\(\s*\))\s+Real\s*\)) # 5: 6 7
    |\(\s*([^\s()]*)                                                                   # 8
    |(\))                                                                              # 9
    |([^\s()]+)                                                                        # 10
    )""",
    re.VERBOSE,
)
_BOUND, _DECLARE, _OPEN, _CLOSE, _WORD = 1, 5, 8, 9, 10
_IS_VARIABLE = re.compile(_VARIABLE)
_IS_NUMBER = re.compile(_NUMBER)
_COMMENT = re.compile(r";[^\n]*")
_LOGIC = frozenset({"assert", "and", "or"})
_COMPARE = frozenset({"<=", ">=", "<", ">"})
_ARITHMETIC = frozenset({"+", "-", "*"})

Variable = tuple[str, int]
Linear = dict[Variable | None, Fraction]


class InputBound(NamedTuple):
    """``X_variable <= value`` or ``>=``, the value rounded so that the box only grows."""

    variable: int
    is_upper: bool
    value: float


@dataclass(frozen=True)
class OutputAtom:
    """``sum coefficient * Y_index <= constant``, or ``<``; the constant rounded upward."""

    terms: tuple[tuple[int, float], ...]
    constant: float
    strict: bool


Atom = InputBound | OutputAtom
Disjuncts = list[list[Atom]]


@dataclass(frozen=True)
class Formula:
    """The whole file: atoms that always hold, and the disjuncts that are added to them."""

    inputs: int
    outputs: int
    common: list[Atom]
    disjuncts: Disjuncts


class _Frame:
    """One open parenthesis: its operator, where it stands, and what it holds so far."""

    __slots__ = ("items", "operator", "position", "terms")

    def __init__(self, operator: str, position: int) -> None:
        self.operator = operator
        self.position = position
        self.items: list[Atom | Disjuncts] = []
        self.terms: list[Linear] = []


def parse_formula(text: str, origin: str) -> Formula:
    """Read VNN-LIB text.

    Args:
        text: the file's content.
        origin: the file's name, for messages.

    Raises:
        SpecError: with the file and line of whatever is malformed, unsupported or too large.
    """
    return _Parser(text, origin).parse()


class _Parser:
    def __init__(self, text: str, origin: str) -> None:
        self.text = _COMMENT.sub("", text).rstrip()
        self.origin = origin
        self.declared: dict[str, Variable] = {}
        self.numbers: dict[str, tuple[float, float]] = {}
        self.bounds: dict[str, InputBound] = {}
        self.stack: list[_Frame] = []
        self.top: list[Atom | Disjuncts] = []
        self.created = 0
        self.position = 0

    def parse(self) -> Formula:
        bounds, stack = self.bounds, self.stack
        for match in _TOKEN.finditer(self.text):
            kind = match.lastindex
            self.position = match.end()
            if kind == _BOUND:
                bound = bounds.get(match[_BOUND]) or self._read_bound(match)
                if not stack or stack[-1].operator not in _LOGIC:
                    self._fail("a comparison stands outside of assert, and, or")
                stack[-1].items.append(bound)
            elif kind == _OPEN:
                self._open(match[_OPEN])
            elif kind == _CLOSE:
                self._close()
            elif kind == _DECLARE:
                self._declare(match[6] or match[7])
            else:
                self._word(match[_WORD])
        if stack:
            self.position = stack[0].position
            self._fail("the parenthesis opened here is never closed; is the file truncated?")
        common, disjuncts = self._conjoin(self.top)
        return Formula(self._count("X"), self._count("Y"), common, disjuncts)

    def _fail(self, message: str) -> NoReturn:
        line = self.text.count("\n", 0, max(self.position - 1, 0)) + 1
        raise SpecError(f"{self.origin}:{line}: {message}")

    def _count(self, kind: str) -> int:
        """Number of declared variables of a kind, which must be numbered from zero."""
        indices = sorted(index for name, index in self.declared.values() if name == kind)
        for position, index in enumerate(indices):
            if position != index:
                raise SpecError(
                    f"{self.origin}: got no declaration of {kind}_{position}; expected "
                    f"{kind}_0 to {kind}_{indices[-1]} without gaps"
                )
        if not indices:
            raise SpecError(f"{self.origin}: got no declaration of any {kind}_i; expected some")
        return len(indices)

    def _declare(self, name: str) -> None:
        if self.stack:
            self._fail(f"{name} is declared inside another expression")
        if name in self.declared:
            self._fail(f"{name} is declared twice")
        self.declared[name] = (name[0], int(name[2:]))

    def _open(self, operator: str) -> None:
        if operator not in _LOGIC | _COMPARE | _ARITHMETIC:
            self._fail(
                f"got '({operator[:40]}'; expected declare-const X_i Real, declare-const Y_i Real, "
                "assert, and, or, <=, >=, <, >, +, - or *; other commands are unsupported"
            )
        parent = self.stack[-1].operator if self.stack else None
        wanted = (
            {"assert"} if parent is None
            else (_LOGIC | _COMPARE) - {"assert"} if parent in _LOGIC
            else _ARITHMETIC
        )  # fmt: skip
        if operator not in wanted:
            self._fail(f"'{operator}' cannot stand inside '{parent or 'the file'}'")
        if len(self.stack) >= MAX_DEPTH:
            self._fail(f"got parentheses nested deeper than {MAX_DEPTH}, which is unsupported")
        self.stack.append(_Frame(operator, self.position))

    def _word(self, word: str) -> None:
        """A number or variable inside a comparison or an arithmetic term."""
        if not self.stack or self.stack[-1].operator in _LOGIC:
            self._fail(f"got '{word[:40]}'; expected a parenthesis")
        if _IS_VARIABLE.fullmatch(word):
            self.stack[-1].terms.append({self._variable(word): Fraction(1)})
        elif _IS_NUMBER.fullmatch(word) and len(word) <= _MAX_NUMBER_LENGTH:
            self.stack[-1].terms.append({None: Fraction(Decimal(word))})
        else:
            self._fail(
                f"got '{word[:40]}'; expected a finite decimal of at most {_MAX_NUMBER_LENGTH} "
                "characters or a variable X_i or Y_i"
            )

    def _variable(self, name: str) -> Variable:
        variable = self.declared.get(name)
        if variable is None:
            self._fail(f"{name} is used but not declared")
        return variable

    def _read_bound(self, match: re.Match[str]) -> InputBound:
        """The common case ``(<= X_i number)`` without any arithmetic."""
        operator, name, number = match[2], match[3], match[4]
        _, index = self._variable(name)
        interval = self.numbers.get(number)
        if interval is None:
            if len(number) > _MAX_NUMBER_LENGTH:
                self._fail(f"got a number longer than {_MAX_NUMBER_LENGTH} characters")
            interval = self.numbers[number] = self._enclose(Decimal(number))
        is_upper = operator in ("<=", "<")
        bound = InputBound(index, is_upper, interval[is_upper])
        self.bounds[match[_BOUND]] = bound
        return bound

    def _enclose(self, value: Decimal | Fraction) -> tuple[float, float]:
        """The float64 numbers next to an exact value; both are it when it is a float64."""
        try:
            nearest = float(value) + 0.0
        except OverflowError:
            nearest = math.inf
        if math.isinf(nearest):
            self._fail("got a number beyond the range of float64; expected a finite one")
        exact = Decimal(nearest) if isinstance(value, Decimal) else Fraction(nearest)
        if exact == value:
            return nearest, nearest
        if exact < value:
            return nearest, self._finite(math.nextafter(nearest, math.inf))
        return self._finite(math.nextafter(nearest, -math.inf)), nearest

    def _finite(self, value: float) -> float:
        if math.isinf(value):
            self._fail("got a number beyond the range of float64; expected a finite one")
        return value

    def _close(self) -> None:
        if not self.stack:
            self._fail("got ')' without an open parenthesis")
        frame = self.stack.pop()
        if frame.operator in _LOGIC:
            self._close_logic(frame)
        elif frame.operator in _COMPARE:
            if len(frame.terms) != 2:
                self._fail(f"got {len(frame.terms)} operands of '{frame.operator}'; expected two")
            self.stack[-1].items.append(self._compare(frame.operator, *frame.terms))
        else:
            self.stack[-1].terms.append(self._combine(frame))

    def _close_logic(self, frame: _Frame) -> None:
        if not frame.items or (frame.operator == "assert" and len(frame.items) != 1):
            self._fail(
                f"got {len(frame.items)} operands of '{frame.operator}'; expected "
                f"{'one' if frame.operator == 'assert' else 'at least one'}"
            )
        if frame.operator == "assert":
            self.top.append(frame.items[0])
            return
        disjuncts: Disjuncts = []
        if frame.operator == "and":
            common, choices = self._conjoin(frame.items)
            self._charge(len(common) * (len(choices) - 1))
            disjuncts = [common + choice for choice in choices]
        else:
            for item in frame.items:
                if isinstance(item, list):
                    disjuncts.extend(item)
                else:
                    disjuncts.append([item])
        self.stack[-1].items.append(disjuncts)

    def _conjoin(self, items: list[Atom | Disjuncts]) -> tuple[list[Atom], Disjuncts]:
        """The conjunction as common atoms and the product of everything with alternatives."""
        common: list[Atom] = []
        choices: Disjuncts = [[]]
        for item in items:
            if not isinstance(item, list):
                common.append(item)
            elif len(item) == 1:
                common.extend(item[0])
            elif choices == [[]]:
                choices = item
            else:
                old, new = sum(map(len, choices)), sum(map(len, item))
                self._charge(len(choices) * (new + len(item)) + len(item) * old)
                choices = [left + right for left in choices for right in item]
        return common, choices

    def _charge(self, atoms: int) -> None:
        """Count atoms created by distribution against the limit, before creating them."""
        self.created += atoms
        if self.created > MAX_ATOMS:
            self._fail(
                f"the formula expands to more than {MAX_ATOMS} atoms in disjunctive normal form; "
                "split the file"
            )

    def _combine(self, frame: _Frame) -> Linear:
        """The value of ``(+ ...)``, ``(- ...)`` or ``(* ...)``."""
        terms = frame.terms
        if not terms:
            self._fail(f"got no operands of '{frame.operator}'; expected at least one")
        if frame.operator == "*":
            result: Linear = {None: Fraction(1)}
            for term in terms:
                factor, other = (term, result) if term.keys() <= {None} else (result, term)
                if not factor.keys() <= {None}:
                    self._fail("got a product of two variables, which is unsupported")
                scale = factor.get(None, Fraction(0))
                result = self._bounded({key: value * scale for key, value in other.items()})
            return result
        if frame.operator == "-" and len(terms) == 1:
            terms = [{}, *terms]
        result = dict(terms[0])
        for term in terms[1:]:
            for key, value in term.items():
                signed = -value if frame.operator == "-" else value
                result[key] = result.get(key, Fraction(0)) + signed
        return self._bounded(result)

    def _bounded(self, term: Linear) -> Linear:
        for value in term.values():
            if value.numerator.bit_length() + value.denominator.bit_length() > (
                _MAX_COEFFICIENT_BITS
            ):
                self._fail("got arithmetic with numbers too long to handle")
        return term

    def _compare(self, operator: str, left: Linear, right: Linear) -> Atom | Disjuncts:
        """The atom ``left operator right``, or true or false when no variable remains."""
        if operator in (">=", ">"):
            left, right = right, left
        strict = operator in ("<", ">")
        gap = dict(left)
        for key, value in right.items():
            gap[key] = gap.get(key, Fraction(0)) - value
        bound = -gap.pop(None, Fraction(0))
        terms = sorted((key, value) for key, value in gap.items() if key is not None and value)
        if not terms:
            return [[]] if (bound > 0 if strict else bound >= 0) else []
        if all(kind == "Y" for (kind, _), _ in terms):
            return self._output_atom([(i, value) for (_, i), value in terms], bound, strict)
        if len(terms) > 1:
            names = " and ".join(f"{kind}_{index}" for (kind, index), _ in terms[:2])
            self._fail(
                f"got an atom over {names}; expected one input variable, or outputs only; mixed "
                "and multi-variable input constraints are unsupported"
            )
        ((_, index), coefficient), is_upper = terms[0], terms[0][1] > 0
        return InputBound(index, is_upper, self._enclose(bound / coefficient)[is_upper])

    def _output_atom(
        self, terms: list[tuple[int, Fraction]], bound: Fraction, strict: bool
    ) -> OutputAtom:
        """Scale an atom, where needed, so that float64 holds its coefficients exactly."""
        if not all(_is_float64(value) for _, value in terms):
            unit = math.lcm(*(value.denominator for _, value in terms))
            common = math.gcd(*(int(value * unit) for _, value in terms))
            scale = Fraction(unit, common)
            terms = [(index, value * scale) for index, value in terms]
            bound *= scale
            if not all(_is_float64(value) for _, value in terms):
                self._fail("got output coefficients that float64 cannot hold exactly; shorten them")
        exact = tuple((index, float(value)) for index, value in terms)
        return OutputAtom(exact, self._enclose(bound)[1], strict)


def _is_float64(value: Fraction) -> bool:
    try:
        return Fraction(float(value)) == value
    except OverflowError:
        return False

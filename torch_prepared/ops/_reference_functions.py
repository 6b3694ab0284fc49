"""Facts about smooth activations in plain torch, the counterpart of csrc/common/activations.h.

Every method takes and returns float64 tensors. ``value`` and ``derivative`` come with a bound on
the absolute error of the computed number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Smooth", "smooth_function"]

EPS = torch.finfo(torch.float64).eps
TINY = torch.finfo(torch.float64).tiny

Evaluated = tuple[Tensor, Tensor]
Core = tuple[Tensor, Tensor]


def _within_ulps(value: Tensor, ulps: float | Tensor) -> Evaluated:
    return value, ulps * EPS * value.abs() + TINY


def _logistic_slope(x: Tensor) -> Tensor:
    e = torch.exp(-x.abs())
    return e / (1 + e).square()


def _core(like: Tensor, begin: float, end: float) -> Core:
    return torch.full_like(like, begin), torch.full_like(like, end)


def _s_shaped(upper: bool, like: Tensor) -> Core:
    return _core(like, 0.0, math.inf) if upper else _core(like, -math.inf, 0.0)


def _convex(upper: bool, like: Tensor) -> Core:
    return _core(like, math.inf, -math.inf) if upper else _core(like, -math.inf, math.inf)


class Smooth(ABC):
    """An activation: value, two derivatives, range of slopes and where it is concave.

    Attributes:
        slope_min, slope_max: a range that contains every derivative.
        kinked: whether the derivative jumps somewhere.
        valley: a lower bound of the local minima; +inf for a monotone function.
    """

    slope_min = 0.0
    slope_max = 1.0
    valley = math.inf
    kinked = False

    @abstractmethod
    def value(self, x: Tensor) -> Evaluated:
        """The function and the error of computing it."""

    @abstractmethod
    def derivative(self, x: Tensor) -> Evaluated:
        """The derivative and the error of computing it."""

    @abstractmethod
    def second(self, x: Tensor) -> Tensor:
        """The second derivative."""

    def core(self, upper: bool, u: Tensor) -> Core:
        """Where the function (upper lines) or its negative (lower lines) is concave."""
        return _s_shaped(upper, u)


class Sigmoid(Smooth):
    """1 / (1 + exp(-x))."""

    slope_max = 0.25

    def value(self, x: Tensor) -> Evaluated:
        return _within_ulps(1 / (1 + torch.exp(-x)), 8.0)

    def derivative(self, x: Tensor) -> Evaluated:
        return _within_ulps(_logistic_slope(x), 16.0)

    def second(self, x: Tensor) -> Tensor:
        return _logistic_slope(x) * (1 - 2 / (1 + torch.exp(-x)))


class Tanh(Smooth):
    """The hyperbolic tangent."""

    def value(self, x: Tensor) -> Evaluated:
        return _within_ulps(torch.tanh(x), 8.0)

    def derivative(self, x: Tensor) -> Evaluated:
        return _within_ulps(4 * _logistic_slope(2 * x), 16.0)

    def second(self, x: Tensor) -> Tensor:
        return -8 * torch.tanh(x) * _logistic_slope(2 * x)


class Softplus(Smooth):
    """log(1 + exp(x))."""

    def value(self, x: Tensor) -> Evaluated:
        return _within_ulps(x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())), 8.0)

    def derivative(self, x: Tensor) -> Evaluated:
        return _within_ulps(1 / (1 + torch.exp(-x)), 8.0)

    def second(self, x: Tensor) -> Tensor:
        return _logistic_slope(x)

    def core(self, upper: bool, u: Tensor) -> Core:
        return _convex(upper, u)


class Elu(Smooth):
    """x for x > 0, alpha (exp(x) - 1) otherwise; convex when alpha <= 1, else S-shaped."""

    kinked = True

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.slope_max = max(1.0, alpha)

    def value(self, x: Tensor) -> Evaluated:
        value, error = _within_ulps(self.alpha * torch.expm1(x.clamp(max=0)), 8.0)
        return torch.where(x > 0, x, value), torch.where(x > 0, 0.0, error)

    def derivative(self, x: Tensor) -> Evaluated:
        value, error = _within_ulps(self.alpha * torch.exp(x.clamp(max=0)), 8.0)
        return torch.where(x > 0, 1.0, value), torch.where(x > 0, 0.0, error)

    def second(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, 0.0, self.alpha * torch.exp(x.clamp(max=0)))

    def core(self, upper: bool, u: Tensor) -> Core:
        return _s_shaped(upper, u) if self.alpha > 1 else _convex(upper, u)


class _TwoTailed(Smooth):
    """Concave, convex, concave; see ``two_tailed`` in csrc/common/activations.h."""

    inflection: float

    def core(self, upper: bool, u: Tensor) -> Core:
        if not upper:
            return _core(u, -self.inflection, self.inflection)
        left, right = _core(u, -math.inf, -self.inflection), _core(u, self.inflection, math.inf)
        reaches = u > self.inflection
        return torch.where(reaches, right[0], left[0]), torch.where(reaches, right[1], left[1])


class Silu(_TwoTailed):
    """x / (1 + exp(-x)); the inflection solves x tanh(x / 2) = 2."""

    inflection = 2.3993572805154675
    slope_min, slope_max, valley = -0.125, 1.125, -0.27847

    def value(self, x: Tensor) -> Evaluated:
        value, error = _within_ulps(x / (1 + torch.exp(-x)), 8.0)
        return torch.where(x < -800, 0.0, value), torch.where(x < -800, TINY, error)

    def derivative(self, x: Tensor) -> Evaluated:
        s, bend = 1 / (1 + torch.exp(-x)), x * _logistic_slope(x)
        return s + bend, 24 * EPS * (s + bend.abs()) + TINY

    def second(self, x: Tensor) -> Tensor:
        return _logistic_slope(x) * (2 + x * (1 - 2 / (1 + torch.exp(-x))))


class Gelu(_TwoTailed):
    """x Phi(x), by the error function; inflections at -sqrt 2 and sqrt 2."""

    inflection = math.sqrt(2.0)
    slope_min, slope_max, valley = -0.1875, 1.1875, -0.17

    def _ulps(self, x: Tensor) -> Tensor:
        return 16 + 2 * x.clamp(max=0).square()

    def _cumulative(self, x: Tensor) -> Tensor:
        return 0.5 * torch.erfc(-x * math.sqrt(0.5))

    def _density(self, x: Tensor) -> Tensor:
        return torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)

    def value(self, x: Tensor) -> Evaluated:
        value, error = _within_ulps(x * self._cumulative(x), self._ulps(x))
        return torch.where(x < -40, 0.0, value), torch.where(x < -40, TINY, error)

    def derivative(self, x: Tensor) -> Evaluated:
        phi = self._cumulative(x)
        bend = torch.where(x.abs() > 40, 0.0, x * self._density(x))
        error = EPS * (phi * self._ulps(x) + bend.abs() * (16 + x * x)) + TINY
        return phi + bend, error

    def second(self, x: Tensor) -> Tensor:
        return torch.where(x.abs() > 40, 0.0, self._density(x) * (2 - x * x))


class GeluTanh(_TwoTailed):
    """``x / (1 + exp(-q))``, q = 2 sqrt(2 / pi) (x + 0.044715 x^3): GELU's form by tanh."""

    inflection = 1.4185040087908283
    slope_min, slope_max, valley = -0.1875, 1.1875, -0.1701
    _scale, _cube = 1.5957691216057308, 0.044715

    def _inner(self, x: Tensor) -> Tensor:
        return self._scale * (x + self._cube * x * x * x)

    def _rise(self, x: Tensor) -> Tensor:
        return self._scale * (1 + 3 * self._cube * x * x)

    def _ulps(self, x: Tensor) -> Tensor:
        return 16 + 8 * self._inner(x.clamp(max=0)).abs()

    def _near(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where x or 0 is all that is left, x inside, and the logistic factor there."""
        far = x.abs() > 22
        inside = torch.where(far, 0.0, x)
        return far, inside, 1 / (1 + torch.exp(-self._inner(inside)))

    def value(self, x: Tensor) -> Evaluated:
        far, inside, share = self._near(x)
        y = inside * share
        error = self._ulps(inside) * EPS * y.abs()
        value = torch.where(far, x.clamp(min=0), y)
        return value, torch.where(far, 0.0, error) + 64 * TINY

    def derivative(self, x: Tensor) -> Evaluated:
        far, inside, share = self._near(x)
        q = self._inner(inside)
        bend = inside * _logistic_slope(q) * self._rise(inside)
        error = EPS * (share * self._ulps(inside) + bend.abs() * (32 + 8 * q.abs()))
        ends = (x > 0).to(x.dtype)
        return torch.where(far, ends, share + bend), torch.where(far, 0.0, error) + 1e4 * TINY

    def second(self, x: Tensor) -> Tensor:
        far, inside, share = self._near(x)
        rise, turn = self._rise(inside), 6 * self._scale * self._cube * inside
        bracket = 2 * rise + inside * ((1 - 2 * share) * rise * rise + turn)
        return torch.where(far, 0.0, _logistic_slope(self._inner(inside)) * bracket)


def smooth_function(kind: str, parameter: float) -> Smooth:
    """The activation called ``kind``; ``parameter`` is ELU's alpha."""
    if kind == "elu":
        return Elu(parameter)
    table: dict[str, Callable[[], Smooth]] = {
        "tanh": Tanh,
        "sigmoid": Sigmoid,
        "softplus": Softplus,
        "gelu": Gelu,
        "gelu_tanh": GeluTanh,
        "silu": Silu,
    }
    return table[kind]()

"""Numbers on the command line."""

from __future__ import annotations

import math
from typing import Any

import click

__all__ = ["Number"]


class Number(click.FloatRange):
    """A float in a range; NaN, which is in none, is refused."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number that a text stands for."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"got {value!r}; expected a number", param, ctx)
        return number

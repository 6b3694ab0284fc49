"""Random programs that several tests of the layers share."""

import torch
from torch import Tensor


def problem(
    batch: int, n: int, m: int, seed: int = 0, room: float = 0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """Points (b, n), dense rows (b, m, n) and right-hand sides with a feasible point."""
    generator = torch.Generator().manual_seed(seed)
    kind = {"generator": generator, "dtype": torch.float64}
    rows, inside = torch.randn(batch, m, n, **kind), torch.randn(batch, n, 1, **kind)
    rhs = (rows @ inside)[:, :, 0] + room * torch.rand(batch, m, **kind)
    return torch.randn(batch, n, **kind), rows, rhs

"""Properties of one network as batched output rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torch_prepared.bounds._regions import RegionBatch
from torch_prepared.core.rounding import outward
from torch_prepared.errors import SpecError
from torch_prepared.specs import Property

__all__ = ["PropertyBatch"]


@dataclass(frozen=True)
class PropertyBatch:
    """``b`` properties: regions, and rows padded to a common count.

    Args:
        regions: the b input sets.
        rows: (b, s, m) coefficients on the flattened output; padding rows are zero.
        offset: (b, s); padding is ``-inf`` and so never the best row of a clause.
        clause: (b, s) int64, the clause each row belongs to.
        present: (b, k) bool, which of k clauses exist.
    """

    regions: RegionBatch
    rows: Tensor
    offset: Tensor
    clause: Tensor
    present: Tensor

    @classmethod
    def of(
        cls,
        properties: Sequence[Property],
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> PropertyBatch:
        """The batch of the given properties, all on one network."""
        if not properties:
            raise SpecError("properties: got none; expected at least one property to bound")
        counts = [[len(offset) for _, offset in p.safe.clauses] for p in properties]
        s, k = max(sum(c) for c in counts), max(len(c) for c in counts)
        m = properties[0].safe.clauses[0][0].shape[1]
        rows = torch.zeros(len(properties), s, m, dtype=dtype)
        offset = torch.full((len(properties), s), -torch.inf, dtype=dtype)
        clause = torch.zeros(len(properties), s, dtype=torch.int64)
        present = torch.zeros(len(properties), k, dtype=torch.bool)
        for i, p in enumerate(properties):
            total = sum(counts[i])
            rows[i, :total] = torch.cat([r for r, _ in p.safe.clauses]).to(dtype)
            offset[i, :total] = torch.cat([o for _, o in p.safe.clauses]).to(dtype)
            clause[i, :total] = torch.repeat_interleave(
                torch.arange(len(counts[i])), torch.tensor(counts[i])
            )
            present[i, : len(counts[i])] = True
        regions = RegionBatch.of([p.region for p in properties], dtype, device)
        return cls(
            regions, rows.to(device), offset.to(device), clause.to(device), present.to(device)
        )

    def __len__(self) -> int:
        return self.rows.shape[0]

    def __getitem__(self, index: slice) -> PropertyBatch:
        return PropertyBatch(
            self.regions[index],
            self.rows[index],
            self.offset[index],
            self.clause[index],
            self.present[index],
        )

    def to(self, dtype: torch.dtype) -> PropertyBatch:
        """The batch in another floating dtype, boxes rounded outward."""
        box = outward(self.regions.lower, self.regions.upper, dtype)
        regions = RegionBatch(box.lower, box.upper, self.regions.sets)
        return PropertyBatch(
            regions, self.rows.to(dtype), self.offset.to(dtype), self.clause, self.present
        )

    def clause_margins(self, values: Tensor) -> Tensor:
        """Best row of each clause: row values (..., b, s) to (..., b, k); absent clauses +inf."""
        spread = self.clause.expand_as(values)  # one property serves any number of value rows
        start = values.new_full((*values.shape[:-1], self.present.shape[1]), -torch.inf)
        best = start.scatter_reduce(-1, spread, values, "amax", include_self=True)
        return best.masked_fill(~self.present, torch.inf)

    def margins(self, values: Tensor) -> Tensor:
        """Safety margin from row values ``rows . y + offset``: (..., b, s) to (..., b)."""
        return self.clause_margins(values).amin(dim=-1)

    def best_rows(self, values: Tensor) -> Tensor:
        """Position (b, k) in ``rows`` of each clause's best row; -1 for absent clauses."""
        best = self.clause_margins(values)
        mine = values.unsqueeze(-2) >= best.unsqueeze(-1)  # (b, k, s)
        member = (
            self.clause.unsqueeze(-2) == torch.arange(best.shape[-1], device=best.device)[:, None]
        )
        return (mine & member).to(torch.int8).argmax(dim=-1).masked_fill(~self.present, -1)

    def outputs(self, y: Tensor) -> Tensor:
        """Row values of outputs: y (b, q, m) to (b, q, s)."""
        return y @ self.rows.transpose(1, 2) + self.offset.unsqueeze(1)

"""row_program: the native kernel against the plain-torch oracle, its gradient and its refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from torch_prepared import ops
from torch_prepared.errors import UnsupportedOperationError
from torch_prepared.ops import _reference_program as reference

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-12}
CONV, LINEAR, RELAX, DOT, ADD, SCALE, CUT = range(7)
ADDS, FIRST, ONLY = range(3)
PLAIN = (1, 1, 1, 1, 0, 0, 1, 1, 1)  # kernel, stride, padding, dilation, groups


class Case(NamedTuple):
    """A program with everything it reads; four regions, 6 x 5 pixels, a residual connection."""

    program: ops.RowProgram
    lines: list[Tensor]
    boxes: list[Tensor]
    free: list[Tensor]


def _case(dtype: torch.dtype, groups: int = 1, rows: bool = False, regions: int = 4) -> Case:
    """(3 x 3 x 4) <- conv <- relu (6 x 5 x 4) <- scale <- conv <- (6 x 5 x 2), and a shortcut."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    slots = torch.tensor([[3, 3, 4], [6, 5, 4], [6, 5, 2]])
    strided = (3, 3, 2, 2, 1, 1, 1, 1, groups)
    dilated = (2, 3, 1, 1, 1, 2, 2, 2, 1)
    shortcut = (1, 1, 2, 2, 0, 0, 1, 1, 1)
    steps = [
        (DOT, 0, 0, ONLY, -1, 0, 1, *PLAIN),
        (CONV, 0, 1, ONLY, 0, 1, 1, *strided),
        (RELAX, 1, 1, ONLY, -1, 0, 1, *PLAIN),
        (SCALE, 1, 1, ONLY, -1, 2, 1, *PLAIN),
        (CONV, 1, 2, FIRST, -1, 3, 1, *dilated),
        (CONV, 0, 2, ADDS, -1, 4, 1, *shortcut),
        (CUT, 2, 2, ONLY, -1, 0, 1, *PLAIN),
    ]
    tensors = (
        draw(36), draw(9 * 4 * 4 // groups), draw(120), draw(6 * 4 * 2), draw(4 * 2),
    )  # fmt: skip
    lines = draw(4, regions, 120)
    lines[3] = lines[3].abs()
    lines[:, :, ::3] = 0  # neurons that are constantly zero
    free = (torch.rand(regions, 120, generator=generator) > 0.5).to(dtype) * 0.75
    free[:, ::3] = 0
    boxes = draw(2, regions, 60)
    boxes[1] = boxes[1].abs()
    picked = [torch.arange(0, 36, 1 + r) for r in range(regions)]
    if rows:
        picked = []
    starts = torch.tensor([0, *(len(p) for p in picked)]).cumsum(0) if picked else torch.zeros(0)
    index = torch.cat([torch.zeros(0, dtype=torch.int64), *picked])
    program = ops.RowProgram(
        slots, torch.tensor(steps), tensors, starts.to(torch.int64), index, input_slot=2
    )
    return Case(program, [lines], [boxes], [free])


def _dense_rows(case: Case, count: int) -> Tensor:
    like = case.boxes[0]
    generator = torch.Generator().manual_seed(2)
    return torch.randn(like.shape[1], count, 36, generator=generator, dtype=like.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("count", [None, 1, 3, 70])
def test_kernel_equals_reference(dtype: torch.dtype, groups: int, count: int | None) -> None:
    case = _case(dtype, groups, count is not None)
    rows = None if count is None else _dense_rows(case, count)
    got = ops.row_program(case.program, case.lines, case.boxes, rows)
    arguments = case.program.arguments(case.lines, case.boxes, rows)
    expected = reference.row_program_reference(*arguments, [], None, None)
    for mine, theirs in zip(got, expected, strict=True):
        scale = 1 + float(theirs.abs().max()) if theirs.numel() else 1.0
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_a_region_does_not_depend_on_the_others() -> None:
    case = _case(torch.float32)
    whole = ops.row_program(case.program, case.lines, case.boxes)[0]
    starts = case.program.starts
    for r in range(4):
        part = slice(int(starts[r]), int(starts[r + 1]))
        alone = replace(
            case.program,
            starts=torch.tensor([0, part.stop - part.start]),
            index=case.program.index[part],
        )
        lines = [line[:, r : r + 1] for line in case.lines]
        got = ops.row_program(alone, lines, [box[:, r : r + 1] for box in case.boxes])[0]
        assert torch.equal(got, whole[:, part])


@pytest.mark.parametrize("count", [None, 5])
@pytest.mark.parametrize("regions", [3, 9])
def test_shares_start_at_the_lines_and_have_exact_gradients(
    count: int | None, regions: int
) -> None:
    case = _case(torch.float64, 2, count is not None, regions)
    rows = None if count is None else _dense_rows(case, count)
    line = case.lines[0].clone()
    line[0] = torch.where(case.free[0] > 0, 0.25 + 0.5 * line[0].sigmoid(), line[0])
    shares = ops.row_shares(case.program, [line], case.boxes, case.free, rows)
    assert shares.values.numel() > 0
    plain = ops.row_program(case.program, [line], case.boxes, rows)[0]
    same = ops.row_program(case.program, [line], case.boxes, rows, shares)[0]
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-12)

    kept = line != 0  # what is constantly zero is left out, also by the gradient

    def bound(values: Tensor, moved: Tensor) -> Tensor:
        lines = [torch.where(kept, moved, line)]
        own = replace(shares, values=values)
        return ops.row_program(case.program, lines, case.boxes, rows, own)[0]

    leaves = (shares.values.clone().requires_grad_(), line.clone().requires_grad_())
    assert torch.autograd.gradcheck(bound, leaves, fast_mode=True)


def test_gradient_of_lines_equals_the_reference() -> None:
    case = _case(torch.float64)
    lines = [(case.lines[0] + 0.01).requires_grad_()]
    lower = ops.row_program(case.program, lines, case.boxes)[0]
    weights = torch.randn_like(lower)
    (got,) = torch.autograd.grad((lower * weights).sum(), lines)
    arguments = case.program.arguments([lines[0].detach()], case.boxes, None)
    flat, _ = reference.row_program_grad_reference(weights, *arguments, [], None, None)
    expected = flat.reshape(4, *got.shape).sum(0)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_opcheck() -> None:
    case = _case(torch.float64)
    arguments = (*case.program.arguments(case.lines, case.boxes, None), [], None, None)
    tests = ("test_schema", "test_faketensor")
    kernels = torch.ops.torch_prepared
    torch.library.opcheck(kernels.row_program, arguments, test_utils=tests)
    grad = torch.randn(2, len(case.program.index), dtype=torch.float64)
    torch.library.opcheck(kernels.row_program_grad, (grad, *arguments), test_utils=tests)


def test_nan_in_a_line_reaches_the_bounds_that_use_it_and_no_other_region() -> None:
    case = _case(torch.float64)
    lines = [case.lines[0].clone()]
    lines[0][:, 1] = torch.nan
    plain = ops.row_program(case.program, case.lines, case.boxes)[0]
    got = ops.row_program(case.program, lines, case.boxes)[0]
    starts = case.program.starts
    mine = slice(int(starts[1]), int(starts[2]))
    assert bool(torch.isnan(got[:, mine]).all())
    got[:, mine] = plain[:, mine]
    assert torch.equal(got, plain)


def test_programs_that_do_not_fit_are_refused() -> None:
    case = _case(torch.float64)
    program = case.program
    short = program.tensors[0][:-1]
    late = program.steps.clone()
    late[1, 2] = 7
    kind = program.steps.clone()
    kind[0, 0] = 9
    broken = [
        (replace(program, tensors=(short, *program.tensors[1:])), "one number per entry"),
        (replace(program, steps=late), "slots that exist"),
        (replace(program, steps=kind), "known kinds"),
        (replace(program, index=program.index.flip(0)), "increasing entries"),
        (replace(program, starts=program.starts[:-1]), "starts"),
    ]
    if not ops.build_info().native:
        pytest.skip("the reference does not check programs")
    for wrong, message in broken:
        with pytest.raises(RuntimeError, match=message):
            ops.row_program(wrong, case.lines, case.boxes)
    with pytest.raises(RuntimeError, match="lines"):
        ops.row_program(program, [case.lines[0].float()], case.boxes)


def test_gradients_in_weights_are_refused() -> None:
    case = _case(torch.float64)
    first, *rest = case.program.tensors
    program = replace(case.program, tensors=(first.clone().requires_grad_(), *rest))
    with pytest.raises(UnsupportedOperationError, match="certified_margin"):
        ops.row_program(program, case.lines, case.boxes)

import pytest
import torch

from torch_prepared import ops
from torch_prepared.ops._reference import concretize_reference


@pytest.mark.parametrize("batch", ["b", "1"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (3, 70, 50), (1, 1, 1), (2, 9, 4096)], ids=str)
def test_agrees_with_the_reference(
    shape: tuple[int, int, int], batch: str, device: str, dtype: torch.dtype
) -> None:
    rows = torch.randn(shape, device=device, dtype=dtype)
    size = (shape[0] if batch == "b" else 1, shape[2])
    center = torch.randn(size, device=device, dtype=dtype)
    radius = torch.rand(size, device=device, dtype=dtype)
    tolerance = {"atol": 2e-3, "rtol": 1e-5} if dtype == torch.float32 else {}
    torch.testing.assert_close(
        ops.concretize(rows, center, radius),
        concretize_reference(rows, center, radius),
        **tolerance,
    )


def test_is_below_every_point_of_the_box(device: str) -> None:
    rows = torch.randn(2, 3, 6, device=device, dtype=torch.float64)
    center = torch.randn(2, 6, device=device, dtype=torch.float64)
    radius = torch.rand(2, 6, device=device, dtype=torch.float64)
    points = center + radius * (2 * torch.rand(500, 2, 6, device=device).double() - 1)
    values = torch.einsum("bsn,kbn->kbs", rows, points)
    corner = torch.einsum("bsn,bsn->bs", rows, center[:, None] - rows.sign() * radius[:, None])
    bound = ops.concretize(rows, center, radius)
    assert bool((values >= bound - 1e-12).all())
    torch.testing.assert_close(corner, bound)


def test_strided_and_empty_inputs(device: str, dtype: torch.dtype) -> None:
    rows = torch.randn(5, 4, 6, device=device, dtype=dtype).transpose(0, 2)
    center = torch.randn(5, 6, device=device, dtype=dtype).T
    torch.testing.assert_close(
        ops.concretize(rows, center, center.abs()),
        concretize_reference(rows, center, center.abs()),
    )
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        empty = torch.empty(shape, device=device, dtype=dtype)
        box = torch.empty(shape[0], shape[2], device=device, dtype=dtype)
        result = ops.concretize(empty, box, box)
        assert torch.equal(result, torch.zeros(shape[:2], device=device, dtype=dtype))


def test_gradcheck_and_opcheck(device: str) -> None:
    for batch in (2, 1):
        arguments = (
            torch.randn(2, 3, 4, device=device, dtype=torch.float64).requires_grad_(),
            torch.randn(batch, 4, device=device, dtype=torch.float64).requires_grad_(),
            torch.rand(batch, 4, device=device, dtype=torch.float64).requires_grad_(),
        )
        assert torch.autograd.gradcheck(ops.concretize, arguments)
        torch.library.opcheck(torch.ops.torch_prepared.concretize, arguments)

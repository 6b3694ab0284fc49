"""Local robustness: one label on a ball around an input."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_prepared.errors import SpecError
from torch_prepared.specs._base import InputSet, add_up, as_vector, subtract_down
from torch_prepared.specs.box import Box
from torch_prepared.specs.lp_ball import LpBall
from torch_prepared.specs.output import Property, SafeSet

__all__ = ["local_robustness", "local_robustness_batch"]

Clip = tuple[float | Tensor, float | Tensor]


def local_robustness(
    x: Tensor,
    label: int,
    eps: float | Tensor,
    classes: int,
    p: float = math.inf,
    clip: Clip | None = None,
    name: str | None = None,
) -> Property:
    r"""Output ``label`` is strictly the largest for all x' with :math:`\|x' - x\|_p \le` eps.

    Args:
        x: one input without batch axis, any shape and dtype; its stored values are the center.
        label: the class to keep, 0 to classes - 1.
        eps: radius in the unit of x, >= 0; for p = inf also one per scalar (broadcast to x's
            shape), as for inputs whose channels are scaled differently.
        classes: number of outputs.
        p: 1, 2 or ``math.inf``.
        clip: lower and upper limit of every valid input, numbers or tensors that broadcast to
            x's shape; None for no limit.
        name: of the property.

    Returns:
        A property over a :class:`Box` for p = inf and an :class:`LpBall` otherwise.

    Raises:
        SpecError: malformed numbers, or an x so far outside of the clip that nothing remains.

    Soundness:
        The sides of the box are rounded outward, so it contains the ball around the stored x.

    Example:
        >>> import torch
        >>> prop = local_robustness(torch.tensor([0.5, 1.0]), 0, 0.25, classes=2, clip=(0.0, 1.0))
        >>> prop.region.upper.tolist()
        [0.75, 1.0]
    """
    center = as_vector(x, "local_robustness x")
    low, high = (None, None) if clip is None else (_spread(end, x, "clip") for end in clip)
    region: InputSet
    if p == math.inf:
        radius = _spread(eps, x, "eps")
        if bool((radius < 0).any()):
            raise SpecError(f"local_robustness eps: got {float(radius.min())}; expected >= 0")
        lower, upper = subtract_down(center, radius), add_up(center, radius)
        if low is not None and high is not None:
            lower, upper = torch.maximum(lower, low), torch.minimum(upper, high)
        region = Box(lower, upper)
    else:
        region = LpBall(center, float(_spread(eps, None, "eps")), p, low, high)
    return Property(region, SafeSet.argmax(label, classes), name or f"robust-{label}")


def local_robustness_batch(
    images: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    classes: int,
    p: float = math.inf,
    clip: Clip | None = None,
) -> tuple[Property, ...]:
    """One :func:`local_robustness` property per image.

    Args:
        images: (b, ...) inputs.
        labels: integer (b,).
        eps: as for one image; the same for all.
        classes: number of outputs.
        p: 1, 2 or ``math.inf``.
        clip: as for one image.

    Returns:
        b properties called ``robust-<position>-<label>``.

    Raises:
        SpecError: as many labels as images are needed; and whatever one image raises.
    """
    if labels.dim() != 1 or len(images) != len(labels):
        raise SpecError(
            f"local_robustness_batch: got images {tuple(images.shape)} and labels "
            f"{tuple(labels.shape)}; expected (b, ...) and (b,)"
        )
    return tuple(
        local_robustness(image, int(label), eps, classes, p, clip, name=f"robust-{k}-{int(label)}")
        for k, (image, label) in enumerate(zip(images, labels, strict=True))
    )


def _spread(value: float | Tensor, like: Tensor | None, name: str) -> Tensor:
    """``value`` broadcast to the shape of ``like`` and flattened in float64."""
    tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    shape = torch.Size(()) if like is None else like.shape
    try:
        tensor = tensor.broadcast_to(shape)
    except RuntimeError as error:
        raise SpecError(
            f"local_robustness {name}: got shape {tuple(tensor.shape)}; expected one that "
            f"broadcasts to {tuple(shape)}"
        ) from error
    return as_vector(tensor, f"local_robustness {name}")

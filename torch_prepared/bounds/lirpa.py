"""auto_LiRPA behind our interface: for operators we lack, and to cross-check our own bounds.

Works with the release on PyPI (0.3) and with the current one (0.7). Version 0.3 expects names that
newer NumPy and PyTorch releases dropped; they are supplied here while it is imported or traces a
module, and taken away again afterwards.

Bounds from here are evidence, not proof: what is certified is what the certificate checker replays.
Release 0.3 is known to be wrong on indexing that repeats a scalar (a bound above sampled outputs).

Source: Xu et al., "Automatic Perturbation Analysis for Scalable Certified Robustness and Beyond"
(NeurIPS 2020); Xu et al., "Fast and Complete: Enabling Complete Neural Network Verification with
Rapid and Massively Parallel Incomplete Verifiers" (ICLR 2021) for alpha-CROWN.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from torch_prepared.core.interval import Interval
from torch_prepared.errors import MissingDependencyError, SpecError, UnsupportedOperationError

__all__ = ["LirpaMethod", "lirpa_available", "lirpa_bounds"]

LirpaMethod = Literal["IBP", "CROWN", "CROWN-IBP", "alpha-CROWN"]

_INSTALL = "pip install --no-deps auto-LiRPA==0.3 appdirs pyyaml"
_EXPORTER = "torch.onnx._internal.torchscript_exporter"
_FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_NAMES = {
    "IBP": "IBP",
    "CROWN": "CROWN",
    "CROWN-IBP": "CROWN-IBP",
    "alpha-CROWN": "CROWN-Optimized",
}


def lirpa_available() -> bool:
    """Whether auto_LiRPA can be imported."""
    try:
        _load()
    except MissingDependencyError:
        return False
    return True


def lirpa_bounds(
    module: nn.Module,
    box: Interval,
    rows: Tensor | None = None,
    method: LirpaMethod = "CROWN",
    iterations: int = 20,
) -> Interval:
    """Bounds of a module's outputs, or of rows of them, over a batch of boxes.

    Args:
        module: maps (b, *shape) to (b, m); in evaluation mode for the bounds, not changed.
        box: (b, *shape), in the dtype and on the device of the module.
        rows: (b, s, m) or (s, m) coefficients on the output; the identity when None.
        method: ``"IBP"``, ``"CROWN-IBP"`` (backward from the output over interval relaxations),
            ``"CROWN"``, or ``"alpha-CROWN"`` (optimized slopes).
        iterations: gradient steps of ``"alpha-CROWN"``.

    Returns:
        Interval (b, s), without gradient.

    Raises:
        MissingDependencyError: auto_LiRPA is not installed or cannot be imported.
        UnsupportedOperationError: it cannot trace or bound the module; its message is passed on.
        SpecError: an unknown method, crossed ends or NaN.

    Soundness: in exact arithmetic as far as auto_LiRPA is right; NaN is refused.
    """
    if method not in _NAMES:
        raise SpecError(f"method: got {method!r}; expected one of {', '.join(_NAMES)}")
    box = Interval.checked(box.lower, box.upper, "lirpa_bounds box")
    library = _load()
    center = box.center.detach()
    if rows is not None and rows.dim() == 2:
        rows = rows.expand(len(center), *rows.shape)
    bounded = _bounded(library, module, center)
    region = library.PerturbationLpNorm(
        norm=np.inf, x_L=box.lower.detach(), x_U=box.upper.detach(), eps=None
    )
    point = library.BoundedTensor(center, region)
    if method == "alpha-CROWN":
        options = {"iteration": iterations, "lr_alpha": 0.1, "verbosity": 0}
        bounded.set_bound_opts({"optimize_bound_args": options})
    grad = torch.enable_grad if method == "alpha-CROWN" else torch.no_grad
    try:
        with grad(), _quiet():
            lower, upper = bounded.compute_bounds(x=(point,), C=rows, method=_NAMES[method])
    except _FAILURES as error:
        raise _refusal("bound", method, error) from error
    return Interval.checked(lower.detach(), upper.detach(), f"auto_LiRPA's {method} result")


def _bounded(library: types.ModuleType, module: nn.Module, example: Tensor) -> Any:
    """auto_LiRPA's form of a private copy of ``module``."""
    private = copy.deepcopy(module).eval()
    for name, part in list(private.named_modules()):
        if name and isinstance(part, _DROPOUTS):  # the library samples them even in evaluation mode
            private.set_submodule(name, nn.Identity())
    # In 0.3 the compact form of convolutions fails on batches (storage out of bounds).
    old = library.__version__ == "0.3"
    options = {"conv_mode": "matrix"} if old else {}
    example = torch.zeros_like(example)
    try:
        with _expected_names(), _quiet():
            bounded = library.BoundedModule(
                private, example, bound_opts=options, device=example.device, verbose=False
            )
    except _FAILURES as error:
        raise _refusal("trace", type(module).__name__, error) from error
    if old:
        members = bounded._named_members

        def named_members(*arguments: Any, remove_duplicate: bool = True, **more: Any) -> Any:
            return members(*arguments, **more)  # 0.3 does not know the newer argument

        bounded._named_members = named_members
    return bounded


def _refusal(step: str, what: str, error: Exception) -> UnsupportedOperationError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    return UnsupportedOperationError(
        f"auto_LiRPA: cannot {step} {what}: {reason}; expected operators it supports"
    )


def _load() -> types.ModuleType:
    """The imported package."""
    loaded = sys.modules.get("auto_LiRPA")
    if loaded is not None:
        return loaded
    try:
        with _expected_names(), _quiet():
            return importlib.import_module("auto_LiRPA")
    except ImportError as error:
        for name in [n for n in sys.modules if n.split(".")[0] == "auto_LiRPA"]:
            del sys.modules[name]  # a half-imported package would look complete next time
        raise MissingDependencyError(
            f"auto_LiRPA: cannot be imported ({error}); install it with: {_INSTALL}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's prints and deprecation warnings away from the caller's output."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _expected_names() -> Iterator[None]:
    """Supply what auto_LiRPA 0.3 expects of NumPy and PyTorch, and nothing that exists already."""
    # By full name: as attributes of torch.onnx these are other modules in current releases.
    symbolic_helper = importlib.import_module("torch.onnx.symbolic_helper")
    utils = importlib.import_module("torch.onnx.utils")
    with contextlib.ExitStack() as stack:
        if "numpy.lib.arraysetops" not in sys.modules:
            arrays = types.ModuleType("numpy.lib.arraysetops")
            arrays.isin = np.isin  # type: ignore[attr-defined]
            sys.modules["numpy.lib.arraysetops"] = arrays
            stack.callback(sys.modules.pop, "numpy.lib.arraysetops", None)
        for owner, name, value in (
            (symbolic_helper, "_set_opset_version", _set_opset_version),
            (utils, "_optimize_graph", _optimize_graph),
            (torch._C.Node, "__getitem__", _attribute),
        ):
            if not hasattr(owner, name):
                setattr(owner, name, value)
                stack.callback(delattr, owner, name)
        yield


def _set_opset_version(version: int) -> None:
    state = importlib.import_module(f"{_EXPORTER}._globals").GLOBALS
    state.export_onnx_opset_version = version


def _optimize_graph(*arguments: Any, **options: Any) -> object:
    utils = importlib.import_module(f"{_EXPORTER}.utils")
    optimized: object = utils._optimize_graph(*arguments, **options)
    return optimized


def _attribute(node: torch._C.Node, name: str) -> object:
    """The attribute ``name`` of a traced operation, whatever its kind."""
    return getattr(node, node.kindOf(name))(name)

"""How far a result may lie from exact attention: within twice torch's own error in the same dtype.

A backend with a declared tolerance may lie as far as it declares, or within twice the error that INT8 queries and keys
cause where scores are so large that this is more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..capabilities import Tolerance

# A mistaken base is off by 0.3 of the value, a missing block of keys by whole tenths; quantisation is far below.
_QUANTISED_LSE_ERROR = 0.1
# Rounding errors of the accumulation that add up to the error of one sum.
_ACCUMULATED = 8


def allowed_error(exact: Tensor, low: Tensor, dtype: torch.dtype, cancelled: float = 0.0, unit: float = 0.0) -> float:
    """Largest absolute error: 2 x (error of torch's own result + rounding band).

    Args:
        exact: the float64 result.
        low: the same formula evaluated in ``dtype``.
        dtype: of the compared result; its spacing at the largest value is the rounding band.
        cancelled: size of terms that cancel in the result. Gradients of q and k are differences of terms as large as
            the gradient of v: with a single key they are 0, and kernels return the rounding of what cancelled.
        unit: smallest magnitude that rounding is relative to; 1 for an LSE, a logarithm of a rounded sum.
    """
    finite = exact.isfinite()
    if not bool(finite.any()):
        return 0.0
    own = float((low.double() - exact)[finite].abs().max())
    largest = max(unit, float(exact[finite].abs().max()))
    band = torch.finfo(dtype).eps * largest
    # In float64 the exact result has errors of its own.
    inner = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    band += _ACCUMULATED * inner * max(cancelled, largest)
    return 2.0 * (own + band)


def difference(
    actual: Tensor, exact: Tensor, low: Tensor, dtype: torch.dtype, cancelled: float = 0.0, unit: float = 0.0
) -> str | None:
    """What is wrong with ``actual``, in words; None if it lies within :func:`allowed_error`.

    Infinities must be where the exact result has them, and nothing else may be infinite or NaN.
    """
    shape = _shape_difference(actual, exact) or _infinity_difference(actual, exact)
    if shape is not None:
        return shape
    finite = exact.isfinite()
    if not bool(finite.any()):
        return None
    errors = (actual.double() - exact)[finite].abs()
    allowed = allowed_error(exact, low, dtype, cancelled, unit)
    return None if float(errors.max()) <= allowed else f"largest error {float(errors.max()):.3g}, allowed {allowed:.3g}"


def declared_difference(actual: Tensor, exact: Tensor, rounded: Tensor, tolerance: Tolerance) -> str | None:
    """Like :func:`difference` for an output with a declared tolerance: relative L2 error and cosine similarity.

    Args:
        rounded: the exact result of 8-bit q and k; see :func:`~.oracle.eight_bit_attention`.
    """
    problem = _shape_difference(actual, exact) or _infinity_difference(actual, exact)
    if problem is not None:
        return problem
    inevitable = 2.0 * _relative_error(rounded, exact)
    error, allowed = _relative_error(actual, exact), max(tolerance.relative_l2, inevitable)
    if error > allowed:
        return f"relative L2 error {error:.3g}, allowed {allowed:.3g}"
    # The angle between two vectors whose difference is that long.
    least = min(tolerance.cosine, 1.0 - inevitable**2 / 2)
    cosine = float(torch.nn.functional.cosine_similarity(actual.double().flatten(), exact.flatten(), dim=0))
    if bool(exact.any()) and cosine < least:
        return f"cosine similarity {cosine:.5f}, allowed {least:.5f}"
    return None


def declared_lse_difference(actual: Tensor, exact: Tensor, rounded: Tensor) -> str | None:
    """Like :func:`difference` for the LSE of a backend with a declared tolerance."""
    problem = _shape_difference(actual, exact) or _infinity_difference(actual, exact)
    finite = exact.isfinite()
    if problem is not None or not bool(finite.any()):
        return problem
    error = float((actual.double() - exact)[finite].abs().max())
    allowed = max(_QUANTISED_LSE_ERROR, 2.0 * float((rounded - exact)[finite].abs().max()))
    return None if error <= allowed else f"largest error {error:.3g}, allowed {allowed:.3g}"


def _relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm().clamp_min(1e-30))


def _shape_difference(actual: Tensor, exact: Tensor) -> str | None:
    if actual.shape == exact.shape:
        return None
    return f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"


def _infinity_difference(actual: Tensor, exact: Tensor) -> str | None:
    if not torch.equal(actual == float("-inf"), exact == float("-inf")):
        return "-inf is not where the exact result has it"
    other = ~actual.isfinite() & exact.isfinite()
    return f"{int(other.sum())} values are infinite or NaN" if bool(other.any()) else None

"""Where the kernels written in Gluon for Hopper (sm_90) may run; elsewhere, the plain Triton kernels do.

Gluon is Triton's lower level: layouts, copies and barriers are written out, and their interface changes between versions, so
only the version with which these kernels were checked is accepted.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from .arguments import KeyRange

_CHECKED_VERSION = "3.6."


@lru_cache(None)
def _is_checked_hopper(index: int) -> bool:
    return (
        triton.__version__.startswith(_CHECKED_VERSION)
        and torch.version.hip is None
        and torch.cuda.get_device_capability(index) == (9, 0)
    )


def runs_on_hopper(query: Tensor, keys: KeyRange, *refused: Tensor | float | None) -> bool:
    """Whether the Gluon kernels may take this call: on sm_90, every key or a causal mask, and nothing of `refused` given."""
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if keys not in ((-1, -1), (-1, 0)) or any(
        x is not None and not (isinstance(x, float) and x == 0.0) for x in refused
    ):
        return False
    return _is_checked_hopper(query.device.index if query.device.index is not None else torch.cuda.current_device())

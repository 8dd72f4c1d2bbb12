"""Memory that shows when it was read without having been written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_FREED_BLOCKS = 3


@contextlib.contextmanager
def poisoned_memory(*like: Tensor) -> Iterator[None]:
    """Within it, ``torch.empty`` and its relatives return NaN, and freed memory of the given sizes holds NaN.

    The first reaches kernels launched from Python; the second, by way of the allocator's cache, those that allocate
    their output themselves.

    Args:
        like: floating tensors as large as the outputs that are expected.
    """
    freed = [torch.full_like(tensor, float("nan")) for tensor in like for _ in range(_FREED_BLOCKS)]
    with (
        mock.patch.object(torch, "empty", _poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", _poisoned(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", _poisoned(torch.empty_strided)),
        mock.patch.object(Tensor, "new_empty", _poisoned(Tensor.new_empty)),
    ):
        del freed
        yield


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point() and not torch.compiler.is_compiling() and tensor.device.type != "meta":
            with torch.no_grad():
                tensor.detach().fill_(float("nan"))
        return tensor

    return poisoned

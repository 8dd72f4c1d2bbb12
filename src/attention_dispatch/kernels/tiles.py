"""Tile shapes by architecture and head_dim. No search at run time: a user's first call compiles one kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _tile(
    block_m: int, block_n: int, warps: int, stages: int, tma: bool = False, registers: int | None = None
) -> dict[str, Any]:
    """`registers` caps registers per thread, so that more programs fit on a multiprocessor."""
    options = {"num_warps": warps} if registers is None else {"num_warps": warps, "maxnreg": registers}
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "STAGES": stages, "TMA": tma, "options": options}


def forward_tile(query: Tensor, head_dim: int, plain: bool) -> dict[str, Any]:
    """Tile of the exact forward kernel for a padded head_dim; `plain` says that most key blocks need no mask."""
    if query.dtype == torch.float32:
        return _tile(32, 32, 4, 1)
    hopper = query.device.type == "cuda" and torch.cuda.get_device_capability(query.device)[0] == 9
    if head_dim <= 64:
        return _tile(64, 64, 4, 3, hopper) if hopper else _tile(128, 64, 4, 3)
    if head_dim <= 128:
        return _tile(128, 64, 8, 3, hopper) if hopper else _tile(128, 32, 4, 3)
    return _tile(64, 32, 4, 2)


def backward_tiles(query: Tensor, head_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tiles of the two backward kernels: the one that owns keys, and the one that owns queries."""
    if query.dtype == torch.float32:
        small = _tile(32, 32, 4, 1)
        return small, small
    hopper = query.device.type == "cuda" and torch.cuda.get_device_capability(query.device)[0] == 9
    if head_dim <= 64:
        return _tile(64, 128, 4 if hopper else 8, 2), _tile(128, 64, 4 if hopper else 8, 2)
    if head_dim <= 128:
        return _tile(64, 128, 8, 2), _tile(128, 64, 8, 2)
    return _tile(32, 64, 8, 1), _tile(64, 32, 8, 1)


def sage_tile(query: Tensor, head_dim: int, fp8: bool) -> dict[str, Any]:
    """Tile of the quantised forward kernel for a padded head_dim. Key blocks never exceed the 128 that share a scale."""
    hopper = query.device.type == "cuda" and torch.cuda.get_device_capability(query.device)[0] == 9
    if head_dim <= 128:
        return _tile(64, 128 if fp8 else 64, 4, 2, hopper) if hopper else _tile(64, 64, 4, 2)
    return _tile(64, 64, 4, 2, hopper)

"""Tile shapes by architecture and head_dim. No search at run time: a user's first call compiles one kernel.

Measured on one H100 80GB HBM3 (torch 2.11.0+cu130, Triton 3.6.0, 2026-11-25), bf16, 24 heads: forward at 1 x 16384, backward at
2 x 4096; the runners-up are in docs/kernels-log.md. Elsewhere the shapes are those that fit 100 KB of shared memory, unmeasured.
"""

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


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def forward_tile(query: Tensor, head_dim: int, plain: bool) -> dict[str, Any]:
    """Tile of the exact forward kernel for a padded head_dim; `plain`: no mask, bias, softcap or dropout to hold in registers."""
    if query.dtype == torch.float32:
        return _tile(32, 32, 4, 1)
    hopper = _is_hopper(query.device)
    if head_dim <= 64:
        return _tile(64, 128, 4, 3, True) if hopper and plain else _tile(64, 64, 4, 2, hopper)
    if head_dim <= 128:
        if not hopper:
            return _tile(64, 32, 4, 2)
        return _tile(128, 64, 8, 2, True, 128 if plain else None)
    return _tile(64, 32, 4, 2, hopper)


def sage_tile(query: Tensor, head_dim: int, fp8: bool) -> dict[str, Any]:
    """Tile of the quantised forward kernel for a padded head_dim. Key blocks never exceed the 128 that share a scale."""
    if not _is_hopper(query.device):
        return _tile(64, 64, 4, 2)
    if head_dim <= 64:
        return _tile(64, 128, 4, 3, True, 128) if fp8 else _tile(64, 64, 4, 3, True, 128)
    if head_dim <= 128:
        return _tile(64, 128, 4, 2, True, 168) if fp8 else _tile(64, 64, 4, 2, True, 168)
    return _tile(64, 64, 4, 2, True)


def backward_tiles(query: Tensor, head_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tiles of the two backward kernels: the one that owns keys, and the one that owns queries."""
    if query.dtype == torch.float32:
        return _tile(32, 32, 4, 1), _tile(32, 32, 4, 1)
    if head_dim <= 64:
        return _tile(32, 128, 4, 3), _tile(64, 64, 4, 3)
    if head_dim <= 128:
        if not _is_hopper(query.device):
            return _tile(32, 64, 4, 2), _tile(64, 32, 4, 2)
        return _tile(64, 64, 4, 2), _tile(128, 64, 8, 3)
    return _tile(32, 64, 8, 1), _tile(64, 32, 8, 1)

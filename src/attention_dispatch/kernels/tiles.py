"""Tile shapes of the forward kernels by architecture and head_dim: from a table, or as measured on this machine.

No search at run time: a user's first call compiles one kernel. The table was measured on one H100 80GB HBM3 (torch
2.11.0+cu130, Triton 3.6.0, 2026-11-25), bf16, 24 heads: forward at 1 x 16384, backward at 2 x 4096; the runners-up are in
docs/kernels-log.md. Elsewhere the shapes are those that fit 100 KB of shared memory, unmeasured. `use` puts what was measured
before the table.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TileKey(NamedTuple):
    """What a choice of a tile holds for.

    Attributes:
        kernel: ``flash``, ``sage_fp8`` or ``sage_fp16``. architecture: such as ``sm_90``; ``cpu`` under the interpreter.
        dtype: of q, k and v. head_dim: the larger of the padded ones of k and v.
        kind: ``padded`` with key padding, which walks lists of blocks; ``rich`` with what is held in registers besides (a
            mask, bias, softcap or dropout), with padding or without; ``plain``.
    """

    kernel: str
    architecture: str
    dtype: str
    head_dim: int
    kind: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.architecture} {self.dtype} head_dim={self.head_dim} {self.kind}"

    @classmethod
    def parse(cls, text: str) -> TileKey:
        """Of ``str(key)``; ValueError for anything else."""
        kernel, architecture, dtype, head_dim, kind = text.split(" ")
        return cls(kernel, architecture, dtype, int(head_dim.removeprefix("head_dim=")), kind)


class Tile(NamedTuple):
    """Queries and keys of a tile, warps, pipeline stages, and a cap on registers per thread (more programs fit)."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None


# Candidates for a measurement, by kernel and the largest head_dim they are for; the table's choice is tried besides.
_CANDIDATES: dict[tuple[str, int], tuple[Tile, ...]] = {
    ("flash", 64): (Tile(64, 128, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 3), Tile(128, 64, 8, 3)),
    ("flash", 128): (Tile(128, 64, 8, 2, 128), Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    ("flash", 256): (Tile(64, 32, 4, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    ("sage_fp8", 64): (Tile(64, 128, 4, 3, 128), Tile(64, 128, 4, 2), Tile(64, 64, 4, 3), Tile(128, 64, 8, 2)),
    ("sage_fp8", 128): (Tile(64, 128, 4, 2, 168), Tile(64, 128, 4, 2), Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),
    ("sage_fp8", 256): (Tile(64, 64, 4, 2), Tile(64, 64, 8, 2), Tile(64, 32, 4, 2)),
    ("sage_fp16", 64): (Tile(64, 64, 4, 3, 128), Tile(64, 64, 4, 2), Tile(64, 128, 4, 2), Tile(128, 64, 8, 2)),
    ("sage_fp16", 128): (Tile(64, 64, 4, 2, 168), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(128, 64, 8, 2)),
    ("sage_fp16", 256): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)),
}
# Of one multiprocessor of an H100; the compiler tells what a smaller GPU lacks.
_SHARED_BYTES = 227 * 1024

KINDS = ("plain", "padded", "rich")

_measured: dict[TileKey, Tile] = {}


class _Trial(threading.local):
    """What a measurement tries in its own thread; other threads' calls keep their tiles."""

    tiles: Mapping[TileKey, Tile] | None = None
    asked: dict[TileKey, Tile] | None = None


_trial = _Trial()


def problem_with(key: TileKey, tile: Tile) -> str | None:
    """Why a tile cannot be one of this kernel's; None if it can."""
    if (key.kernel, 256) not in _CANDIDATES:
        return f"there is no kernel {key.kernel!r}"
    if key.kind not in KINDS:
        return f"there are calls of the kinds {', '.join(KINDS)}, not {key.kind!r}"
    for name, value, least, most in (
        ("block_m", tile.block_m, 16, 256), ("block_n", tile.block_n, 16, 256), ("warps", tile.warps, 1, 16),
    ):  # fmt: skip
        if not isinstance(value, int) or not least <= value <= most or value & (value - 1):
            return f"{name} is a power of two from {least} to {most}, not {value!r}"
    if not isinstance(tile.stages, int) or not 1 <= tile.stages <= 8:
        return f"stages is 1 to 8, not {tile.stages!r}"
    registers = tile.registers
    if registers is not None and (not isinstance(registers, int) or registers % 8 or not 24 <= registers <= 248):
        return f"registers is a multiple of 8 from 24 to 248, or none, not {registers!r}"
    if key.kernel.startswith("sage") and tile.block_n > 128:
        return f"128 keys share a scale, so block_n is at most 128, not {tile.block_n}"
    size = 4 if key.dtype == "float32" else 1 if key.kernel == "sage_fp8" else 2
    if (tile.block_m + 2 * tile.block_n * tile.stages) * key.head_dim * size > _SHARED_BYTES:
        return "it does not fit shared memory"
    return None


def candidates(key: TileKey) -> tuple[Tile, ...]:
    """Tiles worth measuring."""
    largest = next(limit for limit in (64, 128, 256) if key.head_dim <= limit)
    return tuple(tile for tile in _CANDIDATES[key.kernel, largest] if problem_with(key, tile) is None)


def use(tiles: Mapping[TileKey, Tile]) -> None:
    """Take these tiles from now on, and the table's for all else."""
    global _measured
    _measured = dict(tiles)


@contextmanager
def using(key: TileKey, tile: Tile) -> Iterator[None]:
    """Take a tile inside the scope, in this thread."""
    before = _trial.tiles
    _trial.tiles = {**(before or {}), key: tile}
    try:
        yield
    finally:
        _trial.tiles = before


def asked_by(run: Callable[[], object]) -> dict[TileKey, Tile]:
    """The choices that ``run`` makes now, in this thread; empty where it uses kernels whose tiles are fixed."""
    found: dict[TileKey, Tile] = {}
    _trial.asked = found
    try:
        run()
    finally:
        _trial.asked = None
    return found


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def kind_of(padded: bool, rich: bool) -> str:
    """The kind of a call; see :class:`TileKey`."""
    return "rich" if rich else "padded" if padded else "plain"


def forward_tile(query: Tensor, head_dim: int, kind: str) -> dict[str, Any]:
    """Tile of the exact forward kernel for a padded head_dim."""
    hopper, plain = _is_hopper(query.device), kind != "rich"
    if query.dtype == torch.float32:
        return _chosen("flash", query, head_dim, kind, Tile(32, 32, 4, 1), False)
    if head_dim <= 64:
        tile = Tile(64, 128, 4, 3) if hopper and plain else Tile(64, 64, 4, 2)
    elif head_dim <= 128:
        tile = Tile(128, 64, 8, 2, 128 if plain else None) if hopper else Tile(64, 32, 4, 2)
    else:
        tile = Tile(64, 32, 4, 2)
    return _chosen("flash", query, head_dim, kind, tile, hopper)


def sage_tile(query: Tensor, head_dim: int, fp8: bool, kind: str = "plain") -> dict[str, Any]:
    """Tile of the quantised forward kernel for a padded head_dim. Key blocks never exceed the 128 that share a scale."""
    hopper = _is_hopper(query.device)
    if not hopper or head_dim > 128:
        tile = Tile(64, 64, 4, 2)
    elif head_dim <= 64:
        tile = Tile(64, 128, 4, 3, 128) if fp8 else Tile(64, 64, 4, 3, 128)
    else:
        tile = Tile(64, 128, 4, 2, 168) if fp8 else Tile(64, 64, 4, 2, 168)
    return _chosen("sage_fp8" if fp8 else "sage_fp16", query, head_dim, kind, tile, hopper)


def backward_tiles(query: Tensor, head_dim: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tiles of the two backward kernels: the one that owns keys, and the one that owns queries."""
    if query.dtype == torch.float32:
        tiles = Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)
    elif head_dim <= 64:
        tiles = Tile(32, 128, 4, 3), Tile(64, 64, 4, 3)
    elif head_dim <= 128:
        hopper = _is_hopper(query.device)
        tiles = (Tile(64, 64, 4, 2), Tile(128, 64, 8, 3)) if hopper else (Tile(32, 64, 4, 2), Tile(64, 32, 4, 2))
    else:
        tiles = Tile(32, 64, 8, 1), Tile(64, 32, 8, 1)
    return _arguments(tiles[0], False), _arguments(tiles[1], False)


def _chosen(kernel: str, query: Tensor, head_dim: int, kind: str, default: Tile, tma: bool) -> dict[str, Any]:
    trial, asked = _trial.tiles, _trial.asked
    if not _measured and trial is None and asked is None:
        return _arguments(default, tma)
    device = query.device
    architecture = device.type
    if architecture == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        architecture = f"sm_{major}{minor}"
    key = TileKey(kernel, architecture, str(query.dtype).removeprefix("torch."), head_dim, kind)
    tile = (trial or {}).get(key) or _measured.get(key, default)
    if asked is not None:
        asked[key] = tile
    return _arguments(tile, tma)


def _arguments(tile: Tile, tma: bool) -> dict[str, Any]:
    options = (
        {"num_warps": tile.warps} if tile.registers is None else {"num_warps": tile.warps, "maxnreg": tile.registers}
    )
    return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.stages, "TMA": tma, "options": options}

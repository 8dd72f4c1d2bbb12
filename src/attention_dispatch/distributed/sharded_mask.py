"""A mask of the whole attention, of which each rank was given some part, and the slices that blocks need.

Which part a rank was given is read from the sizes on all ranks, so that every rank reads it the same way:

* keys: as many as the rank's own keys (sharded with them) or as all keys, or 1;
* query rows: as many as the rank's own queries, or as all queries, or 1.

A mask with own rows and own keys does not say how the rows relate to other ranks' keys and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import InvalidCallError
from .blocks import Block
from .exchange import gather_shards
from .positions import Range, ShardLayout

_READINGS = (
    "(B, Sk) key padding with local or global Sk, (Sq, Sk), (B, Sq, Sk), or 4-D broadcastable to (B, H, Sq, Sk), "
    "where Sq is local or global and Sk is global (local Sk only if the mask does not depend on the query)"
)


class MaskForm(NamedTuple):
    """How the masks of all ranks are to be read.

    Attributes:
        is_padding: a 2-D mask over batch and keys.
        rows: ``"local"``, ``"global"`` or ``"broadcast"``.
        keys: the same.
    """

    is_padding: bool
    rows: str
    keys: str

    def kind(self, mask: Tensor) -> str:
        """``"bias"``, ``"key_padding"`` or ``"bool"``."""
        if mask.dtype != torch.bool:
            return "bias"
        per_head = mask.ndim == 4 and mask.shape[1] != 1
        return "key_padding" if self.rows == "broadcast" and not per_head else "bool"


def read_masks(
    sizes: Sequence[Sequence[int]], batch: int, heads: int, q_layout: ShardLayout, kv_layout: ShardLayout
) -> MaskForm:
    """One reading for the masks of all ranks.

    Args:
        sizes: shape of the mask of each rank; the same number of dimensions on all.
        batch: batch size.
        heads: number of query heads.
        q_layout: query tokens of each rank.
        kv_layout: key tokens of each rank.

    Raises:
        InvalidCallError: the shapes fit no reading, or two. Raised alike on every rank.
    """
    ndim = len(sizes[0])
    keys = _extent([size[-1] for size in sizes], kv_layout)
    rows = _extent([size[-2] for size in sizes], q_layout)
    others_fit = all(size[0] in (1, batch) for size in sizes) and (ndim < 4 or all(s[1] in (1, heads) for s in sizes))
    enough = keys in ("global", "broadcast") or rows == "broadcast" or kv_layout.world == 1
    dense = ndim > 1 and rows is not None and keys is not None and enough and (others_fit or ndim == 2)
    if ndim == 2:
        padding = others_fit and keys in ("local", "global")
        if padding and dense and not (rows == "broadcast" and sizes[0][0] == 1):
            raise InvalidCallError(
                f"a mask of shape {tuple(sizes[0])} fits two readings, (B, Sk) and (Sq, Sk), because B = Sq.\n"
                "  Do:    pass the 4-D form: mask[:, None, None, :] for key padding, mask[None, None] for (Sq, Sk)."
            )
        if padding:
            return MaskForm(True, "broadcast", str(keys))
    if not dense or ndim not in (2, 3, 4):
        raise InvalidCallError(
            f"attn_mask has shape {[tuple(size) for size in sizes]} on ranks 0..{len(sizes) - 1}, with local query "
            f"lengths {q_layout.lengths} and key lengths {kv_layout.lengths}.\n"
            f"  Why:   under context parallelism a mask must be {_READINGS}.\n"
            "  Do:    pass the rows of this rank's queries against all keys, or the mask of the whole attention."
        )
    return MaskForm(False, str(rows), str(keys))


def _extent(sizes: Sequence[int], layout: ShardLayout) -> str | None:
    if layout.world > 1 and tuple(sizes) == layout.lengths:
        return "local"
    if all(size == layout.total for size in sizes):
        return "global"
    return "broadcast" if all(size == 1 for size in sizes) else None


class ShardedMask:
    """The mask rows of this rank's ring position, against all keys.

    Args:
        tensor: the mask as given, bool or floating point.
        form: its reading.
        kv_layout: key tokens of every rank.
        group: all ranks, for sharded keys; None if there is one rank.
        row_group: ``(group, layout, global ranges)`` of the ranks whose queries are attended together (the Ulysses
            group) and the ranges that they make up.
    """

    def __init__(
        self,
        tensor: Tensor,
        form: MaskForm,
        kv_layout: ShardLayout,
        group: dist.ProcessGroup | None,
        row_group: tuple[dist.ProcessGroup | None, ShardLayout, tuple[Range, ...]],
    ):
        if form.is_padding:
            mask = tensor[:, None, None, :]
        elif tensor.ndim == 4:
            mask = tensor
        else:
            mask = tensor[None, None] if tensor.ndim == 2 else tensor[:, None]
        if form.keys == "local" and group is not None:
            mask = gather_shards(mask, 3, kv_layout, group)
        elif form.keys == "broadcast":
            mask = mask.expand(-1, -1, -1, kv_layout.total)
        rows_group, rows_layout, ranges = row_group
        if form.rows == "local" and rows_group is not None:
            mask = gather_shards(mask, 2, rows_layout, rows_group)
        elif form.rows == "global":
            mask = _take(mask, 2, ranges)
        self._mask = mask
        self._columns: dict[tuple[Range, ...], Tensor] = {}

    def of_block(self, block: Block, keys: tuple[Range, ...], heads: tuple[int, int]) -> Tensor:
        """(B or 1, heads or 1, rows or 1, keys) of one block.

        Args:
            block: slices of the local rows and of the visiting keys.
            keys: global ranges of the visiting keys.
            heads: range of query heads.
        """
        columns = self._columns.get(keys)
        if columns is None:
            # Only the visiting keys' columns are kept: a copy is made where the keys are not contiguous.
            self._columns = {keys: _take(self._mask, 3, keys)}
            columns = self._columns[keys]
        part = columns[..., block.keys]
        if part.shape[2] != 1:
            part = part[:, :, block.queries]
        return part[:, slice(*heads)] if part.shape[1] != 1 else part


def _take(tensor: Tensor, dim: int, ranges: tuple[Range, ...]) -> Tensor:
    parts = [tensor.narrow(dim, start, stop - start) for start, stop in ranges]
    if not parts:
        return tensor.narrow(dim, 0, 0)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def restrict(mask: Tensor | None, visible: Tensor) -> Tensor:
    """Logical and of a 4-D mask slice and the dense visibility (rows, keys) of a block; a bias gets -inf."""
    if mask is None:
        return visible[None, None]
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, -torch.inf)

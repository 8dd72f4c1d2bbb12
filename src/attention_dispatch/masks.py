"""What an attention mask means: one normal form for every shape and kind a caller may pass.

Shape legend: B batch, H query heads, Q query length, K key length. True always means "attend".
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import InvalidCallError

T = TypeVar("T")

KINDS = ("key_padding", "bool", "bias", "block")
"""key_padding: bool over keys; bool: may depend on query and head; bias: additive float; block: a BlockMask."""


class Mask(NamedTuple):
    """A mask in normal form.

    Attributes:
        kind: one of :data:`KINDS`.
        tensor: ``key_padding``: bool ``(B or 1, K)``. ``bool``: bool, 4-D, broadcastable to ``(B, H, Q, K)``.
            ``bias``: floating, 4-D, broadcastable to ``(B, H, Q, K)``, added to the scaled scores. ``block``: None.
        block_mask: the caller's ``BlockMask`` for kind ``block``.
    """

    kind: str
    tensor: Tensor | None
    block_mask: BlockMask | None = None


def normalise(attn_mask: Any, batch: int, heads: int, q_len: int, k_len: int, device: torch.device) -> Mask | None:
    """Bring ``attn_mask`` into normal form; None when it is known to mask nothing.

    Raises:
        InvalidCallError: wrong type, dtype, device or shape; or a 2-D mask that fits two readings.
    """
    if isinstance(attn_mask, BlockMask):
        return _normalise_block_mask(attn_mask, batch, heads, q_len, k_len, device)
    if not isinstance(attn_mask, Tensor):
        raise InvalidCallError(
            f"attn_mask must be a tensor or a BlockMask, got {type(attn_mask).__name__}. Pass a bool tensor (True = "
            f"attend) or an additive float tensor."
        )
    check_dense("attn_mask", attn_mask)
    if attn_mask.dtype != torch.bool and not attn_mask.is_floating_point():
        raise InvalidCallError(
            f"attn_mask has dtype {attn_mask.dtype}, which could mean either kind of mask. Pass attn_mask.bool() "
            f"(True = attend) or an additive floating-point mask."
        )
    if attn_mask.device != device:
        raise InvalidCallError(
            f"attn_mask is on {attn_mask.device} but query is on {device}. Move it: mask.to(query.device)."
        )
    mask = _to_four_dims(attn_mask, batch, heads, q_len, k_len)
    if runs_now(mask):
        # In a trace or a graph, the next mask of this shape may be neither expanded nor trivial.
        mask = _drop_expanded_dims(mask)
        if (
            mask.device.type == "cpu"
            and not mask.requires_grad
            and derived(mask, ("trivial",), lambda: _is_trivial(mask))
        ):
            return None
    if mask.dtype != torch.bool:
        return Mask("bias", mask)
    if mask.shape[1] == 1 and mask.shape[2] == 1:
        return Mask("key_padding", mask[:, 0, 0])
    return Mask("bool", mask)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise for nested and sparse tensors, of which shapes and strides mean something else."""
    if tensor.is_nested:
        raise InvalidCallError(
            f"{name} is a nested tensor. Use {name}.to_padded_tensor(0.0), with a mask of its padding."
        )
    if tensor.layout != torch.strided:
        raise InvalidCallError(f"{name} has layout {tensor.layout}. Use {name}.to_dense().")


def keep_matrix(q_len: int, k_len: int, is_causal: bool, window_size: tuple[int, int], device: torch.device) -> Tensor:
    """Bool ``(Q, K)``: True where top-left causal masking and the window let query i see key j."""
    rows = torch.arange(q_len, device=device)[:, None]
    columns = torch.arange(k_len, device=device)[None, :]
    keep = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    if is_causal:
        keep = keep & (columns <= rows)
    left, right = window_size
    if left >= 0:
        keep = keep & (columns >= rows - left)
    if right >= 0:
        keep = keep & (columns <= rows + right)
    return keep


class BlockTable(NamedTuple):
    """The blocks that a BlockMask lists, as bool (B or 1, H or 1, ceil(Q / block), ceil(K / block)).

    Attributes:
        partial: blocks in which ``mask_mod`` decides. full: blocks that are visible throughout, or None.
        q_block, k_block: their sizes.
    """

    partial: Tensor
    full: Tensor | None
    q_block: int
    k_block: int


def block_table(block_mask: BlockMask) -> BlockTable:
    """What a BlockMask shows besides its ``mask_mod``: a table that the caller made may list any blocks."""
    q_block, k_block = block_mask.BLOCK_SIZE
    full = None
    if block_mask.full_kv_num_blocks is not None and block_mask.full_kv_indices is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    return BlockTable(_listed(block_mask.kv_num_blocks, block_mask.kv_indices), full, q_block, k_block)


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]
    blocks = torch.zeros(indices.shape, dtype=torch.int32, device=indices.device)
    return blocks.scatter_add(-1, indices.long(), valid.to(torch.int32)) > 0


_memo = WeakTensorKeyDictionary()
_memo_lock = threading.Lock()


def runs_now(tensor: Tensor | None = None) -> bool:
    """Whether operations run now and only now, on memory: nothing traces, transforms or records them for later runs.

    What is computed may be remembered, and values read, only then. Traces are those of torch.compile, torch.export,
    torch.jit.trace and make_fx, transforms those of torch.func. FakeTensor has no memory.

    Args:
        tensor: what the operations read, where there is one; a CUDA graph that records them reads it anew each time.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return tensor is None or (type(tensor) in (Tensor, torch.nn.Parameter) and not records_graph(tensor.device))


def records_graph(device: torch.device) -> bool:
    """Whether a CUDA graph records what this thread does on a device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def derived(tensor: Tensor, key: Hashable, build: Callable[[], T]) -> T:
    """``build()``, remembered for as long as the mask object lives and is not written to.

    Views of one tensor share its memory of results, so that a mask re-viewed in every layer is prepared once per
    forward. Writing is noticed by torch's version counter; inference tensors, which have none, and memory shared with
    numpy, where writes are not counted, rebuild. A write to ``mask.data`` is noticed by nobody. What is built must not
    hold ``tensor`` itself (hold ``tensor.detach()``), or neither is ever freed.
    """
    if not runs_now(tensor) or tensor.is_inference():
        return build()
    address = 0
    if tensor.device.type in ("cpu", "cuda"):
        if not tensor.untyped_storage().resizable():
            return build()
        address = tensor.data_ptr()
    root = tensor._base if tensor._base is not None else tensor
    full_key = (address, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, key)
    with _memo_lock:
        entry = _memo.get(root)
        if entry is None or entry[0] != root._version:
            entry = (root._version, {})
            _memo[root] = entry
    results = entry[1]
    if full_key not in results:
        results[full_key] = lasting(build)
    return results[full_key]


def lasting(build: Callable[[], T]) -> T:
    """``build()``, of which later calls with gradients may make use: in inference mode too, of ordinary tensors."""
    if not torch.is_inference_mode_enabled():
        return build()
    with torch.inference_mode(False), torch.no_grad():
        return build()


def _is_trivial(mask: Tensor) -> bool:
    return bool(mask.all()) if mask.dtype == torch.bool else not bool(mask.any())


def _to_four_dims(mask: Tensor, batch: int, heads: int, q_len: int, k_len: int) -> Tensor:
    shape = tuple(mask.shape)
    if mask.ndim == 2:
        return _two_dims_to_four(mask, batch, q_len, k_len)
    if mask.ndim == 3:
        if shape[0] in (1, batch) and shape[1] in (1, q_len) and shape[2] == k_len:
            return mask[:, None]
        raise InvalidCallError(
            f"a 3-D attn_mask is (batch, q_len, k_len) = ({batch}, {q_len}, {k_len}), got {shape}. For a mask per "
            f"head pass 4-D (batch or 1, heads, q_len, k_len)."
        )
    if mask.ndim == 4:
        target = (batch, heads, q_len, k_len)
        if all(have in (1, want) for have, want in zip(shape, target, strict=True)):
            return mask if shape[3] == k_len else mask.expand(-1, -1, -1, k_len)
        raise InvalidCallError(
            f"attn_mask of shape {shape} does not broadcast to (batch, heads, q_len, k_len) = {target}. "
            f"Each dimension must be 1 or the full size."
        )
    raise InvalidCallError(f"attn_mask must have 2, 3 or 4 dimensions, got {mask.ndim} (shape {shape}).")


def _two_dims_to_four(mask: Tensor, batch: int, q_len: int, k_len: int) -> Tensor:
    rows, columns = mask.shape
    if columns == k_len and rows == 1:
        return mask[:, None, None]
    if columns == k_len and rows == batch and rows == q_len:
        raise InvalidCallError(
            f"a 2-D attn_mask of shape ({rows}, {columns}) can mean (batch, k_len) or (q_len, k_len), since both "
            f"batch and q_len are {rows}. Pass mask[:, None, None, :] for key padding or mask[None, None] for (q_len, k_len)."
        )
    if columns == k_len and rows == batch:
        return mask[:, None, None]
    if columns == k_len and rows == q_len:
        return mask[None, None]
    raise InvalidCallError(
        f"a 2-D attn_mask is (q_len, k_len) = ({q_len}, {k_len}) or key padding (batch, k_len) = ({batch}, {k_len}), "
        f"got {(rows, columns)}."
    )


def _drop_expanded_dims(mask: Tensor) -> Tensor:
    """Undo ``expand``: a stride of 0 says that a dimension only repeats."""
    strides = mask.stride()
    for dim in (0, 1, 2):
        if strides[dim] == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _normalise_block_mask(
    block_mask: BlockMask, batch: int, heads: int, q_len: int, k_len: int, device: torch.device
) -> Mask:
    mask_batch, mask_heads = block_mask.kv_num_blocks.shape[:2]
    if block_mask.kv_num_blocks.device != device:
        raise InvalidCallError(
            f"the BlockMask is on {block_mask.kv_num_blocks.device} but query is on {device}. Use block_mask.to(query.device)."
        )
    if mask_batch not in (1, batch) or mask_heads not in (1, heads) or tuple(block_mask.seq_lengths) != (q_len, k_len):
        raise InvalidCallError(
            f"the BlockMask is for (batch, heads, q_len, k_len) = "
            f"{(mask_batch, mask_heads, *block_mask.seq_lengths)}, the call has {(batch, heads, q_len, k_len)}."
        )
    return Mask("block", None, block_mask)

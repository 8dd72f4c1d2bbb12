"""FlexAttention: masks and causal masking become a BlockMask built once per mask object, bias and softcap a score_mod.

On accelerators the kernel is compiled once per kind of call. On CPU it runs unfused by default, because compiling
C++ takes longer than most CPU calls (``ATTENTION_DISPATCH_FLEX_COMPILE=1`` compiles there too).
https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
"""

from __future__ import annotations

import itertools
import threading
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from .. import known_bad, settings
from ..call import AttentionCall, AttentionOutput, CallSpec
from ..capabilities import Capabilities
from ..masks import block_table, derived, lasting, records_graph, runs_now
from ..registry import Backend
from .mask_mods import both, broadcast_index, padding, structure_of, with_explicit_defaults
from .source import release

_MASKS = frozenset({"key_padding", "bool", "bias", "block"})
_MAX_STRUCTURAL_MASKS = 64
_DECODE_LENGTH = 16
_BLOCK = 128
# create_block_mask asks for the signature of its function, which Dynamo cannot trace in torch 2.9.
_CANNOT_SUMMARISE_IN_A_GRAPH = release(torch.__version__)[:2] < (2, 10)


_structural: OrderedDict[Any, BlockMask] = OrderedDict()
# A CUDA graph reads the memory of what it was recorded with for as long as it lives.
_recorded: dict[Any, BlockMask] = {}
_structural_lock = threading.Lock()


def _block_mask(call: AttentionCall) -> BlockMask | None:
    structure = structure_of(call)
    mask = call.mask
    device = call.query.device
    q_len, k_len = call.query.shape[1], call.key.shape[1]
    if mask is not None and mask.kind == "block":
        # Unfused, FlexAttention evaluates mask_mod everywhere and does not look at the listed blocks.
        if structure is None and device.type != "cpu":
            assert mask.block_mask is not None
            return with_explicit_defaults(mask.block_mask)
        return _with_structure(call, structure)
    if mask is None or mask.kind == "bias":
        if structure is None:
            return None
        return _structural_mask(structure, (call.is_causal, call.window_size, q_len, k_len, device))
    tensor = mask.tensor
    assert tensor is not None
    batch, heads = tensor.shape[0], tensor.shape[1] if tensor.ndim == 4 else 1

    def build() -> BlockMask:
        # Detached: a result that held the caller's tensor would keep it, and so itself, alive.
        held = tensor.detach()
        mod = padding(held) if mask.kind == "key_padding" else broadcast_index(held)
        return _create(both(mod, structure) if structure else mod, batch, heads, q_len, k_len, device)

    return derived(tensor, ("block", call.is_causal, call.window_size, q_len, k_len), build)


def _structural_mask(structure: Callable[..., Tensor], key: tuple[Any, ...]) -> BlockMask:
    q_len, k_len, device = key[2:]
    if not runs_now():
        return _create(structure, 1, 1, q_len, k_len, device)
    with _structural_lock:
        found = _structural.get(key)
        if found is not None and records_graph(device):
            _recorded[key] = found
    if found is None:
        found = lasting(lambda: _create(structure, 1, 1, q_len, k_len, device))
        if records_graph(device):
            # Nothing was computed yet.
            return found
        with _structural_lock:
            _structural[key] = found
            while len(_structural) > _MAX_STRUCTURAL_MASKS:
                _structural.popitem(last=False)
    return found


def _with_structure(call: AttentionCall, structure: Callable[..., Tensor] | None) -> BlockMask:
    """The caller's BlockMask, its listed blocks included, and causal masking and window, as one mask_mod."""
    assert call.mask is not None and call.mask.block_mask is not None
    block_mask = call.mask.block_mask
    q_len, k_len = call.query.shape[1], call.key.shape[1]

    def build() -> BlockMask:
        listed = _listed_blocks(block_mask)
        mod = both(listed, structure) if structure else listed
        batch, heads = block_mask.kv_num_blocks.shape[:2]
        return _create(mod, batch, heads, q_len, k_len, block_mask.kv_num_blocks.device)

    key = ("with_structure", block_mask.mask_mod, call.is_causal, call.window_size, q_len, k_len)
    return derived(block_mask.kv_indices, key, build)


def _listed_blocks(block_mask: BlockMask) -> Callable[..., Tensor]:
    """mask_mod that is true where a BlockMask shows a key: in a full block, or by its own mask_mod in a partial one."""
    table, inside = block_table(block_mask), with_explicit_defaults(block_mask).mask_mod
    read_partial = _broadcast_blocks(table.partial, table.q_block, table.k_block)
    if table.full is None:
        return lambda b, h, q, k: read_partial(b, h, q, k) & inside(b, h, q, k)
    read_full = _broadcast_blocks(table.full, table.q_block, table.k_block)
    return lambda b, h, q, k: (read_partial(b, h, q, k) & inside(b, h, q, k)) | read_full(b, h, q, k)


def _broadcast_blocks(blocks: Tensor, q_block: int, k_block: int) -> Callable[..., Tensor]:
    read = broadcast_index(blocks)
    return lambda b, h, q, k: read(b, h, q // q_block, k // k_block)


def _create(
    mod: Callable[..., Tensor], batch: int, heads: int, q_len: int, k_len: int, device: torch.device
) -> BlockMask:
    if torch.compiler.is_compiling() and _CANNOT_SUMMARISE_IN_A_GRAPH:
        return _every_block(mod, q_len, k_len, device)
    # Compiled, it does not materialise the Q x K mask that it summarises.
    compiled = device.type == "cuda" and not torch.compiler.is_compiling()
    return create_block_mask(mod, batch, heads, q_len, k_len, device=device, _compile=compiled)


def _every_block(mod: Callable[..., Tensor], q_len: int, k_len: int, device: torch.device) -> BlockMask:
    """A BlockMask that skips nothing and asks ``mod`` everywhere."""
    rows, columns = (-(-length // _BLOCK) for length in (q_len, k_len))
    count = torch.full((1, 1, rows), columns, dtype=torch.int32, device=device)
    indices = torch.arange(columns, dtype=torch.int32, device=device).repeat(1, 1, rows, 1)
    return BlockMask.from_kv_blocks(count, indices, BLOCK_SIZE=_BLOCK, mask_mod=mod, seq_lengths=(q_len, k_len))


def _score_mod(call: AttentionCall) -> Callable[..., Tensor] | None:
    softcap = call.softcap
    if torch.compiler.is_compiling():
        # With dynamic=True floats are symbolic, which flex_attention cannot capture (torch 2.13); spelling one makes it
        # a constant of the graph.
        softcap = float.fromhex(softcap.hex())
    bias = call.mask.tensor if call.mask is not None and call.mask.kind == "bias" else None
    if bias is None:
        return (lambda score, b, h, q, k: softcap * torch.tanh(score / softcap)) if softcap else None
    read = broadcast_index(bias)
    if softcap:
        return lambda score, b, h, q, k: softcap * torch.tanh(score / softcap) + read(b, h, q, k)
    return lambda score, b, h, q, k: score + read(b, h, q, k)


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None,
    block_mask: BlockMask | None,
    scale: float,
    enable_gqa: bool,
    lse: bool,
    kernel_options: Any,
) -> Any:
    return flex_attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=block_mask,
        scale=scale,
        enable_gqa=enable_gqa,
        return_aux=AuxRequest(lse=True) if lse else None,
        kernel_options=kernel_options,
    )


def _kernel_options(call: AttentionCall) -> dict[str, Any] | None:
    if call.query.device.type == "cpu" or call.query.shape[1] <= _DECODE_LENGTH:
        return None
    # Below 128 queries torch takes its decoding kernel, which finds no configuration for 100 queries with a BlockMask
    # (H100, torch 2.11.0+cu130, 2026-11-25).
    return {"FORCE_USE_FLEX_ATTENTION": True}


# Least recently made first. A scale that changes with every call makes a kind of every call.
_compiled: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
_MAX_COMPILED = 128
_made = itertools.count()


def _kind_of(call: AttentionCall) -> tuple[Any, ...]:
    """What calls must have in common to share one compiled function."""
    query, mask = call.query, call.mask
    tensor = None if mask is None else mask.tensor
    broadcast = () if tensor is None else tuple(size == 1 for size in tensor.shape)
    return (query.device.type, query.dtype, query.shape[3], call.value.shape[3], None if mask is None else mask.kind,
            broadcast, call.is_causal, call.window_size, call.softcap, call.return_lse, call.enable_gqa, call.scale,
            query.shape[1] <= _DECODE_LENGTH)  # fmt: skip


def _compile(device: str) -> Callable[..., Any]:
    """A compiled ``_run`` with a code object of its own.

    Dynamo counts recompilations per code object and stops at a limit; kinds of calls must not use up each other's.
    """
    own = types.FunctionType(_run.__code__.replace(co_name=f"flex_{next(_made)}"), globals(), closure=None)
    forced = settings.flex_compile()
    fused = device != "cpu" if forced is None else forced
    return torch.compile(own, fullgraph=True) if fused else torch.compile(own, fullgraph=True, backend="eager")


def _run_compiled(call: AttentionCall, arguments: tuple[Any, ...]) -> Any:
    kind = _kind_of(call)
    function = _compiled.get(kind)
    if function is None:
        function = _compiled[kind] = _compile(call.query.device.type)
        while len(_compiled) > _MAX_COMPILED:
            _compiled.popitem(last=False)
    try:
        return function(*arguments)
    except FailOnRecompileLimitHit:
        # Many different mask_mods of the caller's own, for example: start over with an empty count.
        function = _compiled[kind] = _compile(call.query.device.type)
        return function(*arguments)


def _flex(call: AttentionCall) -> AttentionOutput:
    query, key, value = call.query, call.key, call.value
    if query.device.type == "cpu":
        # FlexAttention refuses there what requires a gradient, though nobody asks for one under no_grad.
        query, key, value = query.detach(), key.detach(), value.detach()
    arguments = (
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        _score_mod(call),
        _block_mask(call),
        call.scale,
        call.enable_gqa,
        call.return_lse,
        _kernel_options(call),
    )
    result = _run(*arguments) if torch.compiler.is_compiling() else _run_compiled(call, arguments)
    if not call.return_lse:
        return AttentionOutput(result.transpose(1, 2))
    out, aux = result
    return AttentionOutput(out.transpose(1, 2), aux.lse.detach().to(torch.float32))


def _adapters(spec: CallSpec) -> tuple[str, ...]:
    # Without compilation the scores are built in full.
    return ("dense_mask",) if spec.device == "cpu" else ()


FLEX = Backend(
    name="flex",
    family="flex",
    capabilities=(
        Capabilities(
            devices=("cpu",),
            dtypes=(torch.float32, torch.bfloat16, torch.float16),
            head_dim_v=True,
            masks=_MASKS,
            causal="any",
            window="any",
            softcap=True,
            gqa=True,
        ),
        Capabilities(
            devices=("cuda", "xpu"),
            dtypes=(torch.float32, torch.bfloat16, torch.float16),
            max_head_dim=256,
            head_dim_v=True,
            masks=_MASKS,
            causal="any",
            window="any",
            softcap=True,
            gqa=True,
            gradients=True,
            lse=True,
        ),
    ),
    forward=_flex,
    extra_reasons=lambda spec: known_bad.reasons("flex", spec),
    adapters=_adapters,
    url="https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html",
    summary="torch FlexAttention, compiled on accelerators",
)

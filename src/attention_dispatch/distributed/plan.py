"""Everything about a context-parallel call that does not depend on its tensors' contents, worked out once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..errors import BackendRejectedError, Reason
from .blocks import Block, plan_blocks, tile_band
from .config import ContextParallel
from .exchange import HeadExchange, HeadRange, assign_heads, chunk_heads
from .pair import AttentionPair, BlockFacts
from .positions import Range, ShardLayout
from .ring import Ring
from .sharded_mask import MaskForm

# A chunk of heads should still fill the GPU: about four tiles of 128 query rows for each of an H100's 132 SMs (chunks of
# half that size made the kernel 5 % slower), and keep it busy, at 600 TFLOP/s, for the millisecond that the launches of a
# ring step may take.
_TILE_ROWS, _TILES_PER_CHUNK, _OPERATIONS_PER_CHUNK = 128, 500, 0.6e12


class CallOptions(NamedTuple):
    """Arguments of the whole call that every block inherits."""

    scale: float
    softcap: float
    deterministic: bool
    is_causal: bool
    window: tuple[int, int]
    needs_grad: bool
    return_lse: bool


class Step(NamedTuple):
    """One kernel call of a ring step, and in which form its mask is given."""

    block: Block
    mask_kind: str


@dataclass
class Plan:
    """Layouts, heads and kernel calls of one rank.

    Attributes:
        options: arguments of the call.
        needs_lse: kernels have to return the LSE.
        q_layout, kv_layout: tokens of every rank.
        q_exchange, kv_exchange: between tokens and heads within the Ulysses group.
        ring: the ring of this rank.
        ring_keys: tokens of every ring position.
        queries: global ranges of the queries that this rank attends from, after the exchange of heads.
        chunks: ``chunks[chunk][ulysses rank]``: heads computed together.
        steps: for each ring position, the kernel calls against its keys.
        mask_form: reading of the mask; None without one.
        by_autograd: the one kernel call is differentiated by autograd, not by the pair's backward.
        replicated: some key head is held by several ranks of the Ulysses group.
    """

    options: CallOptions
    needs_lse: bool
    q_layout: ShardLayout
    kv_layout: ShardLayout
    q_exchange: HeadExchange
    kv_exchange: HeadExchange
    ring: Ring
    ring_keys: ShardLayout
    queries: tuple[Range, ...]
    chunks: tuple[tuple[HeadRange, ...], ...]
    steps: tuple[tuple[Step, ...], ...]
    mask_form: MaskForm | None
    by_autograd: bool
    replicated: bool


def make_plan(
    parallel: ContextParallel,
    pair: AttentionPair,
    tensors: tuple[Tensor, Tensor, Tensor],
    q_layout: ShardLayout,
    kv_layout: ShardLayout,
    options: CallOptions,
    mask_kind: str,
    mask_form: MaskForm | None,
) -> Plan:
    """Plan of this rank.

    Raises:
        BackendRejectedError: the kernel cannot serve one of the blocks in any form.
    """
    query, key, _ = tensors
    rows = parallel.group_rows
    ring_queries, ring_keys = q_layout.joined(rows), kv_layout.joined(rows)
    mine = rows[parallel.ring_rank]
    heads = assign_heads(query.shape[2], key.shape[2], parallel.ulysses)
    queries = ring_queries.ranges[parallel.ring_rank]
    own_rows = ring_queries.lengths[parallel.ring_rank]
    chunk_count = parallel.head_chunks or _choose_chunks(
        query, parallel.ring, min(ring_queries.lengths), min(ring_keys.lengths), heads
    )
    steps, by_autograd = None, False
    if parallel.ring == 1 and own_rows and ring_keys.total:
        # All keys are here: one call, differentiated by the kernel's own autograd if it has one.
        by_autograd = options.needs_grad and pair.differentiable
        needs_lse = options.return_lse or (options.needs_grad and not by_autograd)
        window = options.window
        whole = Block(0, own_rows, 0, ring_keys.total, is_causal=options.is_causal, window=window)
        steps = _Lowering(pair, tensors, options, mask_kind, needs_lse).whole(whole)
        by_autograd = by_autograd and steps is not None
    if steps is None:
        needs_lse = True
        lowering = _Lowering(pair, tensors, options, mask_kind, needs_lse)
        blocks = [plan_blocks(queries, keys, options.is_causal, options.window) for keys in ring_keys.ranges]
        steps = tuple(lowering.steps(found) for found in blocks)
    return Plan(
        options=options,
        needs_lse=needs_lse,
        q_layout=q_layout,
        kv_layout=kv_layout,
        q_exchange=HeadExchange(
            parallel.ulysses_group, parallel.ulysses_rank, ShardLayout(tuple(q_layout.ranges[rank] for rank in mine))
        ),
        kv_exchange=HeadExchange(
            parallel.ulysses_group, parallel.ulysses_rank, ShardLayout(tuple(kv_layout.ranges[rank] for rank in mine))
        ),
        ring=Ring(parallel.ring_group, parallel.ring_rank, ring_keys.lengths),
        ring_keys=ring_keys,
        queries=queries,
        chunks=chunk_heads(heads, chunk_count),
        steps=steps,
        by_autograd=by_autograd,
        mask_form=mask_form,
        replicated=parallel.ulysses > key.shape[2],
    )


def _choose_chunks(query: Tensor, ring: int, rows: int, keys: int, heads: Sequence[HeadRange]) -> int:
    """Number of head chunks: in a ring as many as leave each chunk enough work for a GPU; 1 on CPU, and in Ulysses.

    A ring's memory falls with the chunks and its transfers hide behind them. In Ulysses the ranks wait for each other at
    every chunk, and a transfer that waits keeps a tenth of the GPU from the kernel: 2 to 4 chunks of 65,536 tokens took
    47 ms, one 45.6 ms (2 H100, 2026-11-25). Uses the smallest shard of any rank, so that all arrive at the same number.
    """
    kv_heads = min(rank.kv_stop - rank.kv_start for rank in heads)
    if query.device.type == "cpu" or kv_heads < 2 or ring == 1:
        return 1
    group = max(rank.q_stop - rank.q_start for rank in heads) // max(rank.kv_stop - rank.kv_start for rank in heads)
    tiles = query.shape[0] * -(-rows // _TILE_ROWS) * group
    operations = 4.0 * query.shape[0] * rows * keys * group * query.shape[3]
    fewest = max(math.ceil(_TILES_PER_CHUNK / max(1, tiles)), math.ceil(_OPERATIONS_PER_CHUNK / max(1.0, operations)))
    return max(1, kv_heads // fewest)


class _Lowering:
    """Turns blocks into kernel calls, each in the first form that the kernel serves.

    The forms are the block as it is, a padding mask given in 4-D, and a causal or windowed block as tiles with dense
    masks.
    """

    def __init__(
        self,
        pair: AttentionPair,
        tensors: tuple[Tensor, Tensor, Tensor],
        options: CallOptions,
        mask_kind: str,
        needs_lse: bool,
    ):
        self._pair, self._tensors, self._options = pair, tensors, options
        self._mask_kind, self._needs_lse = mask_kind, needs_lse
        self._known: dict[BlockFacts, tuple[Reason, ...]] = {}

    def steps(self, blocks: Sequence[Block]) -> tuple[Step, ...]:
        """Kernel calls that serve the blocks.

        Raises:
            BackendRejectedError: no form of some block can be served.
        """
        return tuple(step for block in blocks for step in self._serve(block))

    def whole(self, block: Block) -> tuple[tuple[Step, ...], ...] | None:
        """Steps of a ring of one if a single call serves everything; None if it has to be cut."""
        kinds = (self._mask_kind, "bool") if self._mask_kind == "key_padding" else (self._mask_kind,)
        for kind in kinds:
            if not self._against(Step(block, kind)):
                return ((Step(block, kind),),)
        return None

    def _serve(self, block: Block) -> Sequence[Step]:
        kind = self._mask_kind
        dense = "bias" if kind == "bias" else "bool"
        forms = [[Step(block, kind)]]
        if kind == "key_padding":
            forms.append([Step(block, "bool")])
        band = block._replace(is_causal=False, window=(-1, 0)) if block.is_causal else block
        if band.window != (-1, -1):
            tiles = tile_band(band)
            plain = ("key_padding", "bool") if kind == "key_padding" else (kind,)
            forms += [[Step(tile, dense if tile.dense else other) for tile in tiles] for other in plain]
        first: Sequence[Reason] = ()
        for form in forms:
            reasons = [reason for step in form for reason in self._against(step)]
            if not reasons:
                return form
            first = first or reasons
        raise self._rejected(list(dict.fromkeys(first)))

    def _against(self, step: Step) -> tuple[Reason, ...]:
        block, options = step.block, self._options
        rows, columns = block.shape
        lengths = "equal" if rows == columns else "fewer_queries" if rows < columns else "more_queries"
        facts = BlockFacts(
            step.mask_kind,
            block.is_causal,
            not block.dense and block.window != (-1, -1),
            lengths,
            bool(options.softcap),
            options.deterministic,
            self._needs_lse,
            options.needs_grad,
        )
        if facts not in self._known:
            self._known[facts] = tuple(self._pair.reasons_against(*self._tensors, facts))
        return self._known[facts]

    def _rejected(self, reasons: list[Reason]) -> BackendRejectedError:
        why = "\n         ".join(str(reason) for reason in reasons)
        fixes = "\n         ".join(dict.fromkeys(reason.fix for reason in reasons))
        return BackendRejectedError(
            f"backend {self._pair.name!r} cannot run this call under context parallelism; no tensor was sent.\n"
            f"  Why:   {why}\n  Do:    {fixes}",
            reasons,
        )

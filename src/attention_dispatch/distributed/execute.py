"""Forward and backward of a planned call: the order of communication and computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .agreement import Agreement, Failures
from .exchange import HeadRange, Pending
from .merge import RunningAttention, accumulation_dtype
from .pair import AttentionPair, BlockCall
from .plan import Plan, Step
from .positions import count
from .ring import GradientRotation, empty_gradients
from .sharded_mask import ShardedMask, restrict
from .visits import Visit, visits

# Message tags of what is under way between two ranks at once; the ring's are its own.
_QUERY_TAG, _KEY_TAG, _VALUE_TAG, _OUT_TAG, _LSE_TAG = range(11, 16)


class Execution:
    """One call on one rank.

    Args:
        plan: the planned call.
        pair: the kernel.
        mask: rows of this rank's ring position, or None.
        agreement: closes the call on all ranks; None leaves a failing rank to raise alone.
        ulysses_rank: position within the Ulysses group.
    """

    def __init__(
        self, plan: Plan, pair: AttentionPair, mask: ShardedMask | None, agreement: Agreement | None, ulysses_rank: int
    ):
        self._plan, self._pair, self._mask, self._agreement = plan, pair, mask, agreement
        self._rank = ulysses_rank
        self._rows = count(plan.queries)
        self._exchanges = plan.q_exchange.group is not None
        # Recorded kernel calls by chunk of heads: query, key, value, out.
        self.graphs: dict[int, tuple[Tensor, ...]] = {}
        self._inputs: list[tuple[Tensor, ...]] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Attention of this rank's queries.

        Returns:
            out (B, my tokens, Hq, Dv); lse (B, Hq, my tokens), meaningful if it is returned or saved; and the tensors
            that the backward needs besides, five per chunk of heads, none without an exchange or without gradients.
        """
        plan, failures = self._plan, Failures()
        batch, tokens, heads, _ = query.shape
        out = query.new_empty(batch, tokens, heads, value.shape[3])
        lse = query.new_empty(batch, heads, tokens, dtype=accumulation_dtype(query.dtype))
        saved: list[Tensor] = []
        leaving: list[tuple[list[tuple[int, int]], Pending]] = []

        def depart(chunk: int) -> Pending:
            return self._depart(query, key, value, chunk)

        def arrive(_: int, pending: Pending) -> tuple[Tensor, ...]:
            found, *held = pending.wait()
            return (plan.q_exchange.in_global_order(found), *map(plan.kv_exchange.in_global_order, held))

        running = None
        for visit in visits(plan.ring, len(plan.chunks), depart, arrive):
            if running is None:
                running = RunningAttention(self._rows, self._place(visit.chunk, out, lse))
            steps = plan.steps[visit.source]
            for index, step in enumerate(steps):
                failures.run(self._attend, running, step, visit, visit.is_last and index == len(steps) - 1)
            if not visit.is_last:
                continue
            part, part_lse = self._result(running, visit)
            running = None
            if plan.by_autograd:
                part = part.detach()
                self._inputs.append(visit.own)
            elif plan.options.needs_grad and self._exchanges:
                saved += [*visit.own, part, part_lse]
            if self._exchanges:
                by_rank = [heads.queries for heads in plan.chunks[visit.chunk]]
                leaving.append((by_rank, self._send_result(part, part_lse, by_rank)))
                # The chunk before had this chunk's computation to arrive.
                self._deliver(leaving[:-1], out, lse)
                del leaving[:-1]
        self._deliver(leaving, out, lse)
        self._close(failures)
        return out, lse, saved

    def backward(
        self,
        grad_out: Tensor,
        chunk_tensors: Callable[[int], tuple[Tensor, ...]],
        gradients: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Gradients of this rank's query, key and value.

        Args:
            grad_out: (B, my tokens, Hq, Dv).
            chunk_tensors: gives query, key, value, out and lse of a chunk of heads, as the forward had them.
            gradients: dq, dk, dv to be filled; zeros where a key head is held by several ranks.
        """
        plan, failures = self._plan, Failures()
        leaving: list[Callable[[], None]] = []

        def depart(chunk: int) -> Pending:
            queries = [heads.queries for heads in plan.chunks[chunk]]
            return Pending([plan.q_exchange.to_heads(grad_out, queries, _OUT_TAG)])

        def arrive(chunk: int, pending: Pending) -> tuple[Tensor, ...]:
            [received] = pending.wait()
            return (*chunk_tensors(chunk), plan.q_exchange.in_global_order(received))

        d_query = row_lse = None
        rotation = GradientRotation(plan.ring)
        for visit in visits(plan.ring, len(plan.chunks), depart, arrive):
            dtype = accumulation_dtype(visit.key.dtype)
            if d_query is None:
                d_query = torch.zeros_like(visit.own[0], dtype=dtype)
                if not plan.by_autograd:
                    row_lse = visit.own[4].masked_fill(visit.own[4] == -torch.inf, torch.inf)
            sums = empty_gradients(visit.key, visit.value, dtype)
            for step in plan.steps[visit.source]:
                failures.run(self._differentiate, step, visit, row_lse, d_query, *sums.parts)
            rotation.add(sums)
            if visit.is_last:
                leaving.append(self._send_gradients(visit.chunk, d_query, rotation, gradients))
                for deliver in leaving[:-1]:
                    deliver()
                del leaving[:-1]
                d_query, rotation = None, GradientRotation(plan.ring)
        for deliver in leaving:
            deliver()
        self._close(failures)

    def recorded(self, chunk: int) -> tuple[Tensor, ...]:
        """Query, key and value of a chunk of heads whose kernel call was recorded for autograd."""
        return self._inputs[chunk]

    def _depart(self, query: Tensor, key: Tensor, value: Tensor, chunk: int) -> Pending:
        """Start exchanging the tokens of one chunk of heads."""
        plan = self._plan
        queries = [heads.queries for heads in plan.chunks[chunk]]
        keys = [heads.keys for heads in plan.chunks[chunk]]
        return Pending(
            [
                plan.q_exchange.to_heads(query, queries, _QUERY_TAG),
                plan.kv_exchange.to_heads(key, keys, _KEY_TAG),
                plan.kv_exchange.to_heads(value, keys, _VALUE_TAG),
            ]
        )

    def _place(self, chunk: int, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where the result of a chunk belongs, if it stays on this rank."""
        if self._exchanges:
            return None
        heads = slice(*self._plan.chunks[chunk][self._rank].queries)
        return out[:, :, heads], lse[:, heads]

    def _send_result(self, part: Tensor, part_lse: Tensor, by_rank: list[tuple[int, int]]) -> Pending:
        exchange = self._plan.q_exchange
        messages = [exchange.to_tokens(part, by_rank, _OUT_TAG)]
        if self._plan.options.return_lse:
            messages.append(exchange.to_tokens(part_lse.transpose(1, 2).unsqueeze(-1), by_rank, _LSE_TAG))
        return Pending(messages)

    def _deliver(self, leaving: Sequence[tuple[list[tuple[int, int]], Pending]], out: Tensor, lse: Tensor) -> None:
        exchange = self._plan.q_exchange
        for by_rank, pending in leaving:
            for received, into in zip(pending.wait(), (out, lse.transpose(1, 2).unsqueeze(-1))):
                exchange.deliver(received, into, by_rank)

    def _send_gradients(
        self, chunk: int, d_query: Tensor, rotation: GradientRotation, gradients: tuple[Tensor, Tensor, Tensor]
    ) -> Callable[[], None]:
        """Start sending a chunk's gradients to the owners of the tokens; the result waits and writes them."""
        plan = self._plan
        queries = [heads.queries for heads in plan.chunks[chunk]]
        keys = [heads.keys for heads in plan.chunks[chunk]]
        sent_query = Pending([plan.q_exchange.to_tokens(d_query.to(gradients[0].dtype), queries, _QUERY_TAG)])

        def deliver() -> None:
            [received] = sent_query.wait()
            plan.q_exchange.deliver(received, gradients[0], queries)
            sent = Pending(
                [
                    plan.kv_exchange.to_tokens(summed.to(into.dtype), keys, tag)
                    for summed, into, tag in zip(rotation.result(), gradients[1:], (_KEY_TAG, _VALUE_TAG))
                ]
            )
            for received, into in zip(sent.wait(), gradients[1:]):
                plan.kv_exchange.deliver(received, into, keys, add=plan.replicated)

        return deliver

    def _call(self, step: Step, source: int, heads: HeadRange) -> BlockCall:
        """Arguments of one kernel call."""
        block, options = step.block, self._plan.options
        mask = None
        if self._mask is not None:
            mask = self._mask.of_block(block, self._plan.ring_keys.ranges[source], heads.queries)
        if block.dense:
            mask = restrict(mask, block.visible(self._device))
        elif step.mask_kind == "key_padding" and mask is not None:
            mask = mask[:, 0, 0]
        return BlockCall(
            mask,
            step.mask_kind,
            block.is_causal,
            (-1, -1) if block.dense else block.window,
            options.scale,
            options.softcap,
            options.deterministic,
            self._plan.needs_lse,
            options.needs_grad,
        )

    def _attend(self, running: RunningAttention, step: Step, visit: Visit, is_last: bool) -> None:
        query, block = visit.own[0], step.block
        heads = self._plan.chunks[visit.chunk][self._rank]
        self._device = query.device
        if query.shape[2] == 0:
            return
        call = self._call(step, visit.source, heads)
        tile_query, tile_key, tile_value = query[:, block.queries], visit.key[:, block.keys], visit.value[:, block.keys]
        if self._plan.by_autograd:
            with torch.enable_grad():
                leaves = tile_query, tile_key, tile_value = (
                    tile_query.detach().requires_grad_(),
                    tile_key.detach().requires_grad_(),
                    tile_value.detach().requires_grad_(),
                )
                out, lse = self._pair.forward(tile_query, tile_key, tile_value, call)
            self.graphs[visit.chunk] = (*leaves, out)
        else:
            out, lse = self._pair.forward(tile_query, tile_key, tile_value, call)
        running.add(block.queries, out, lse, is_last)

    def _differentiate(
        self, step: Step, visit: Visit, row_lse: Tensor, d_query: Tensor, d_key: Tensor, d_value: Tensor
    ) -> None:
        if self._plan.by_autograd:
            self._differentiate_graph(visit, d_query, d_key, d_value)
            return
        query, _, _, out, _, grad_out = visit.own
        block = step.block
        heads = self._plan.chunks[visit.chunk][self._rank]
        self._device = query.device
        if query.shape[2] == 0:
            return
        call = self._call(step, visit.source, heads)
        rows, keys = block.queries, block.keys
        dq, dk, dv = self._pair.backward(
            grad_out[:, rows],
            query[:, rows],
            visit.key[:, keys],
            visit.value[:, keys],
            out[:, rows],
            row_lse[:, :, rows],
            call,
        )
        d_query[:, rows] += dq
        d_key[:, keys] += dk
        d_value[:, keys] += dv

    def _differentiate_graph(self, visit: Visit, d_query: Tensor, d_key: Tensor, d_value: Tensor) -> None:
        if visit.chunk not in self.graphs:
            return
        *leaves, out = self.graphs[visit.chunk]
        # Retained, so that the caller may differentiate twice; it is freed with the call.
        found = torch.autograd.grad(out, leaves, visit.own[-1], retain_graph=True, allow_unused=True)
        for total, gradient in zip((d_query, d_key, d_value), found):
            if gradient is not None:
                total.copy_(gradient)

    def _result(self, running: RunningAttention, visit: Visit) -> tuple[Tensor, Tensor]:
        """Output (B, rows, heads, Dv) and LSE (B, heads, rows) of a chunk; 0 and -inf where nothing was seen."""
        query, value = visit.own[0], visit.own[2]
        out, lse = running.result()
        batch, rows, heads, _ = query.shape
        if out is None:
            out = query.new_zeros(batch, rows, heads, value.shape[3])
        if lse is None:
            lse = query.new_full((batch, heads, rows), -torch.inf, dtype=accumulation_dtype(query.dtype))
        return out, lse

    def _close(self, failures: Failures) -> None:
        if self._agreement is not None:
            self._agreement.close(failures.error)
        elif failures.error is not None:
            raise failures.error

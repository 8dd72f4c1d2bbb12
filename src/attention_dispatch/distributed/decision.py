"""What would happen to a call under context parallelism: which kernel for all ranks, in which pieces, and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from .. import registry
from ..decision import refused_lines
from ..errors import BackendRejectedError, NoBackendError, Reason
from ..request import Request
from .attention import open_call
from .config import ContextParallel, as_context_parallel
from .connect import arguments_of, names_for, pair_named
from .cost import ParallelismPlan, plan_parallelism
from .plan import Plan
from .survey import refusal_of, survey


@dataclass(frozen=True)
class ParallelDecision:
    """What would happen on this rank.

    Attributes:
        request: what was asked for.
        parallel: the ranks and how they share the sequence, in words.
        ring, ulysses: the degrees.
        tokens: query tokens of every rank.
        backend: the kernel of all ranks; None if the call is refused.
        heads: query heads of every rank of this Ulysses group.
        head_chunks: parts in which the heads are computed, so that communication overlaps.
        kernel_calls: the calls of the kernel on this rank for one chunk, in words, with their number.
        sent_bytes: what this rank sends to others.
        gradients: how they are computed; empty without.
        verdicts: every registered backend with its reasons on this rank; no reasons means that it could.
        offers: of the request's candidates, those that each rank could use.
        error: text of the error that the call would raise, if any.
        planned: what the cost model says of all degrees for this number of ranks.
    """

    request: str
    parallel: str
    ring: int
    ulysses: int
    tokens: tuple[int, ...]
    backend: str | None
    heads: tuple[int, ...]
    head_chunks: int
    kernel_calls: tuple[str, ...]
    sent_bytes: int
    gradients: str
    verdicts: tuple[tuple[str, tuple[Reason, ...]], ...]
    offers: tuple[tuple[str, ...], ...]
    error: str | None
    planned: ParallelismPlan

    def why_not(self, name: str) -> tuple[Reason, ...]:
        """The reasons against a backend on this rank; empty if it could run the call."""
        return dict(self.verdicts)[name]

    def to_json(self) -> str:
        data: dict[str, Any] = asdict(self)
        data["verdicts"] = [{"backend": name, "reasons": [r._asdict() for r in found]} for name, found in self.verdicts]
        return json.dumps(data, indent=2)

    def __str__(self) -> str:
        lines = [f"Ranks:    {self.parallel}", f"Request:  {self.request}"]
        lines.append(f"Tokens:   {', '.join(map(str, self.tokens))} by rank")
        if self.backend is None:
            lines.append("Backend:  none: the call is refused on every rank")
        else:
            lines.append(f"Backend:  {self.backend}, on every rank")
            lines.append(f"Heads:    {', '.join(map(str, self.heads))} by Ulysses rank, in {self.head_chunks} chunks")
            lines += [f"Computes: {text}" for text in self.kernel_calls]
            lines.append(f"Sends:    {self.sent_bytes:,} bytes from this rank")
            if self.gradients:
                lines.append(f"Backward: {self.gradients}")
        if len(set(self.offers)) > 1:
            lines.append(f"By rank:  {'; '.join(', '.join(offer) or 'none' for offer in self.offers)}")
        able = [name for name, reasons in self.verdicts if not reasons and name != self.backend]
        lines.append(f"Could:    {', '.join(able) or 'no other backend'}")
        lines.append(f"Degrees:  {self.planned.why}")
        return "\n".join([*lines, *refused_lines(self.verdicts)])


def explain_parallel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    attention_kwargs: Mapping[str, Any] | None,
    request: Request,
    parallel_config: Any,
) -> ParallelDecision:
    """``explain`` with a ``parallel_config``: a collective call that computes nothing and sends none of the tensors.

    Raises:
        InvalidCallError, PeerError: as the call itself would, on every rank.
    """
    parallel = as_context_parallel(parallel_config)
    assert parallel is not None
    request = request.for_lengths(query.shape[1], key.shape[1])
    tensors = query, key, value
    options, find = arguments_of(*tensors, enable_gqa, attention_kwargs, tuple)
    calls, _, facts = open_call(
        *tensors, attn_mask, parallel, find, str(request), dropout_p, is_causal, scale, **options
    )
    wanted = names_for(request, *tensors)
    names = list(dict.fromkeys([*wanted, *registry.names()]))
    found = survey(parallel, [pair_named(name, query.device.type) for name in names], calls, tensors, attn_mask, facts)
    asked = found._replace(
        refused={name: refusal for name, refusal in found.refused.items() if name in wanted},
        common=tuple(name for name in found.common if name in wanted),
        offers=tuple(tuple(name for name in offer if name in wanted) for offer in found.offers),
    )
    error: BackendRejectedError | NoBackendError | None = None
    backend = min(asked.common, key=wanted.index) if asked.common else None
    if backend is None:
        error = refusal_of(asked)
    planned = plan_parallelism(
        sum(call.query_tokens for call in calls),
        query.shape[2],
        key.shape[2],
        parallel.world,
        head_dim=query.shape[3],
        batch=query.shape[0],
        element_size=query.element_size(),
        is_causal=is_causal,
    )
    plan = found.able[backend][0] if backend else None
    verdicts = {name: () if name in found.able else tuple(found.refused[name].reasons) for name in names}
    return ParallelDecision(
        request=str(request),
        parallel=repr(parallel),
        ring=parallel.ring,
        ulysses=parallel.ulysses,
        tokens=tuple(call.query_tokens for call in calls),
        backend=backend,
        heads=() if plan is None else _heads(plan),
        head_chunks=0 if plan is None else len(plan.chunks),
        kernel_calls=() if plan is None else _kernel_calls(plan),
        sent_bytes=0 if plan is None else _sent_bytes(plan, parallel, tensors),
        gradients="" if plan is None or backend is None else _gradients(plan, backend),
        verdicts=tuple(verdicts.items()),
        offers=asked.offers,
        error=None if error is None else str(error),
        planned=planned,
    )


def _heads(plan: Plan) -> tuple[int, ...]:
    return tuple(sum(heads.q_stop - heads.q_start for heads in ranks) for ranks in zip(*plan.chunks))


def _kernel_calls(plan: Plan) -> tuple[str, ...]:
    texts: Counter[str] = Counter()
    for steps in plan.steps:
        for block, mask_kind in steps:
            rows, columns = block.shape
            kind = "causal" if block.is_causal else "plain" if block.window == (-1, -1) else "window"
            mask = "" if mask_kind == "none" else f", {mask_kind} mask"
            texts[f"{rows} queries x {columns} keys, {kind}{mask}"] += 1
    return tuple(f"{number} x {text}" for text, number in texts.items())


def _sent_bytes(plan: Plan, parallel: ContextParallel, tensors: tuple[Tensor, Tensor, Tensor]) -> int:
    """Bytes that leave this rank in a forward call."""
    query, key, value = tensors
    me, size = parallel.ulysses_rank, query.shape[0] * query.element_size()
    total = 0
    for chunk in plan.chunks:
        queries = [heads.q_stop - heads.q_start for heads in chunk]
        keys = [heads.kv_stop - heads.kv_start for heads in chunk]
        for peer in range(parallel.ulysses):
            if peer != me:
                total += query.shape[1] * queries[peer] * query.shape[3]
                total += key.shape[1] * keys[peer] * (key.shape[3] + value.shape[3])
                total += plan.q_exchange.layout.lengths[peer] * queries[me] * value.shape[3]
        for step in range(parallel.ring - 1):
            visiting = plan.ring.lengths[plan.ring.source(step)]
            total += visiting * keys[me] * (key.shape[3] + value.shape[3])
    return total * size


def _gradients(plan: Plan, backend: str) -> str:
    if not plan.options.needs_grad:
        return ""
    if plan.by_autograd:
        return "the kernel's own, by autograd"
    if registry.get(backend).backward is not None:
        return "the kernel's own, from the LSE of the whole row"
    return "plain torch from the LSE of the whole row: exact and slow, as this backend has no backward of its own"

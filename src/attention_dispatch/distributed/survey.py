"""Which kernels can serve a call on every rank, and what each of them would do there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..errors import BackendRejectedError, NoBackendError
from .agreement import CallFacts
from .config import ContextParallel
from .pair import AttentionPair
from .plan import CallOptions, Plan, make_plan
from .sharded_mask import read_masks

# Every length of a sequence is a plan of its own.
_MAX_PLANS = 4096


class Survey(NamedTuple):
    """What came of all candidates.

    Attributes:
        able: plans of this rank for the candidates that can serve it.
        refused: the others.
        common: names that can serve every rank, in the order of rank 0.
        offers: names that can serve each rank.
    """

    able: dict[str, tuple[Plan, AttentionPair]]
    refused: dict[str, BackendRejectedError]
    common: tuple[str, ...]
    offers: tuple[tuple[str, ...], ...]


def survey(
    parallel: ContextParallel,
    pairs: Sequence[AttentionPair],
    calls: tuple[CallFacts, ...],
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    options: CallOptions,
) -> Survey:
    """Plan a call that all ranks agreed on with every candidate. A collective call; no tensor of the call is sent.

    Raises:
        InvalidCallError: the masks or shards of the ranks do not fit together.
        PeerError: another rank could not go on.
    """
    q_layout = parallel.layout_of([call.query_tokens for call in calls])
    kv_layout = parallel.layout_of([call.key_tokens for call in calls])
    form, kind = None, "none"
    if mask is not None:
        sizes = [call.mask_sizes for call in calls]
        form = read_masks(sizes, calls[0].batch, calls[0].query_heads, q_layout, kv_layout)
        kind = form.kind(mask)
    able: dict[str, tuple[Plan, AttentionPair]] = {}
    refused: dict[str, BackendRejectedError] = {}
    error: Exception | None = None
    for pair in pairs:
        try:
            able[pair.name] = make_plan(parallel, pair, tensors, q_layout, kv_layout, options, kind, form), pair
        except BackendRejectedError as refusal:
            refused[pair.name] = refusal
        except Exception as caught:
            error = caught
    parallel.agreement.close(error)
    offers = tuple(parallel.agreement.all(tuple(able)))
    return Survey(able, refused, tuple(n for n in offers[0] if all(n in offer for offer in offers)), offers)


def chosen(
    parallel: ContextParallel,
    pairs: Sequence[AttentionPair],
    calls: tuple[CallFacts, ...],
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    options: CallOptions,
) -> tuple[Plan, AttentionPair]:
    """The plan for a call and the kernel that serves it on every rank: the first of rank 0's candidates; made once.

    The key holds nothing but agreed facts, so all ranks find a plan or all of them make one, and forget them together.

    Raises:
        BackendRejectedError, NoBackendError: no candidate can serve every rank.
    """
    known = parallel.plans.get(calls)
    if known is not None:
        return known
    found = survey(parallel, pairs, calls, tensors, mask, options)
    if not found.common:
        raise refusal_of(found)
    if len(parallel.plans) >= _MAX_PLANS:
        parallel.plans.clear()
    parallel.plans[calls] = found.able[found.common[0]]
    return parallel.plans[calls]


def refusal_of(found: Survey) -> BackendRejectedError | NoBackendError:
    """The error of a survey in which nothing can serve every rank."""
    refused = list(found.refused.values())
    if not any(found.offers):
        if len(refused) == 1:
            return refused[0]
        text = "no backend of the request can run this call under context parallelism; no tensor was sent."
    else:
        text = f"no backend can serve the call on every rank; by rank: {list(found.offers)}"
    reasons = [reason for refusal in refused for reason in refusal.reasons]
    return NoBackendError("\n".join([text, *map(str, refused)]), reasons)

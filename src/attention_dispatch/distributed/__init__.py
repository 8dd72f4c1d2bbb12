"""Context parallelism: one sequence over several GPUs, with any kernel.

Ulysses (all-to-all over heads), ring (keys and values passed on) and their product, over the process groups of
torch.distributed. See ``docs/context-parallel.md``.
"""

from .agreement import PeerError
from .attention import context_parallel_attention
from .config import ContextParallel, as_context_parallel
from .connect import dispatch_parallel
from .cost import Link, ParallelismPlan, plan_parallelism
from .decision import ParallelDecision, explain_parallel
from .model import context_parallel, gather, give, has_carriers, one_process, shard
from .pair import AttentionPair, BlockCall, BlockFacts, exact_backward

__all__ = [
    "AttentionPair",
    "BlockCall",
    "BlockFacts",
    "ContextParallel",
    "Link",
    "ParallelDecision",
    "ParallelismPlan",
    "PeerError",
    "as_context_parallel",
    "context_parallel",
    "context_parallel_attention",
    "dispatch_parallel",
    "exact_backward",
    "explain_parallel",
    "gather",
    "give",
    "has_carriers",
    "one_process",
    "plan_parallelism",
    "shard",
]

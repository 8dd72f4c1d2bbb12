"""Context parallelism: one sequence over several GPUs, with any kernel.

Ulysses (all-to-all over heads), ring (keys and values passed on) and their product, over the process groups of
torch.distributed. See ``docs/context-parallel.md``.
"""

from .agreement import PeerError
from .attention import context_parallel_attention
from .config import ContextParallel, as_context_parallel
from .pair import AttentionPair, BlockCall, BlockFacts, exact_backward

__all__ = [
    "AttentionPair",
    "BlockCall",
    "BlockFacts",
    "ContextParallel",
    "PeerError",
    "as_context_parallel",
    "context_parallel_attention",
    "exact_backward",
]

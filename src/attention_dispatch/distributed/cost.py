"""Choosing ring and Ulysses degrees by an alpha-beta model: each message costs a latency plus its bytes by bandwidth.

Attention of N tokens does ``4 N^2 H D`` floating-point operations (half when causal), so on P ranks computation falls
as N^2 / P while a ring moves all keys and values past every rank and Ulysses moves each tensor about once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Machine figures: 600 TFLOP/s is the aten cuDNN forward on an H100 in bfloat16 (head dim 128, 16k tokens). Links as in
# NVIDIA's data sheets, one direction, at 75 % of the peak: NVLink 4 450 GB/s, one 400 Gb/s adapter for each GPU.
# Latencies are the usual order of a collective within a host and between hosts.
DEFAULT_TFLOPS = 600.0
NVLINK_BYTES_S, NVLINK_LATENCY_S = 0.75 * 450e9, 10e-6
NETWORK_BYTES_S, NETWORK_LATENCY_S = 0.75 * 50e9, 25e-6


@dataclass(frozen=True)
class Link:
    """Cost of a message of b bytes: ``latency_s + b / bytes_per_s``."""

    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Estimate:
    """What the model says of one pair of degrees, per rank and forward call; seconds and bytes.

    Attributes:
        exposed_s: communication that computation does not hide.
        memory_bytes: q, k, v and out of the shard, plus what the scheme holds besides.
        heads_per_rank: the largest number of query heads of a rank; above ``heads / ulysses`` heads are uneven.
    """

    ring: int
    ulysses: int
    compute_s: float
    ring_s: float
    ulysses_s: float
    exposed_s: float
    sent_bytes: int
    messages: int
    memory_bytes: int
    heads_per_rank: int

    @property
    def total_s(self) -> float:
        """Time of one forward call."""
        return self.compute_s + self.exposed_s

    def efficiency(self, one_gpu_s: float) -> float:
        """Speed-up over one GPU, divided by the number of ranks."""
        return one_gpu_s / (self.total_s * self.ring * self.ulysses)


@dataclass(frozen=True)
class ParallelismPlan:
    """The chosen degrees, and every alternative with its estimate, best first."""

    ring: int
    ulysses: int
    layout: str
    estimates: tuple[Estimate, ...]
    one_gpu_s: float
    why: str

    def __str__(self) -> str:
        lines = [
            f"ring={self.ring}, ulysses={self.ulysses}, layout={self.layout!r}: {self.why}",
            "  ring ulysses   compute   ring comm  all-to-all    exposed      total  efficiency  sent/rank  memory",
        ]
        for one in self.estimates:
            lines.append(
                f"  {one.ring:4d} {one.ulysses:7d} {one.compute_s * 1e3:8.3f}ms {one.ring_s * 1e3:9.3f}ms "
                f"{one.ulysses_s * 1e3:9.3f}ms {one.exposed_s * 1e3:8.3f}ms {one.total_s * 1e3:8.3f}ms "
                f"{one.efficiency(self.one_gpu_s):11.2f} {one.sent_bytes / 1e6:8.1f}MB {one.memory_bytes / 1e9:6.2f}GB"
            )
        return "\n".join(lines)


def plan_parallelism(
    seq_len: int,
    heads: int,
    kv_heads: int | None = None,
    mesh_or_size: Any = 1,
    *,
    head_dim: int = 128,
    batch: int = 1,
    element_size: int = 2,
    is_causal: bool = False,
    tflops: float = DEFAULT_TFLOPS,
    gpus_per_host: int = 8,
    link: Link | None = None,
    between_hosts: Link | None = None,
) -> ParallelismPlan:
    """Ring and Ulysses degrees for a number of ranks, and why.

    Args:
        seq_len: tokens of the whole sequence.
        heads, kv_heads: query and key heads; None is as many key heads.
        mesh_or_size: a DeviceMesh, or the number of ranks.
        head_dim: of q, k and v.
        batch: batch size.
        element_size: bytes of one element.
        is_causal: halves the work; the head-tail layout keeps it balanced.
        tflops: speed of the kernel on one GPU, in TFLOP/s.
        gpus_per_host: ranks whose messages take ``link``; consecutive ranks share a host.
        link, between_hosts: costs of messages within and between hosts.

    Returns:
        A :class:`ParallelismPlan`; ``str()`` of it is a table.

    Example:
        >>> from attention_dispatch.distributed import plan_parallelism
        >>> plan = plan_parallelism(65536, heads=24, mesh_or_size=2)
        >>> plan.ring * plan.ulysses
        2
    """
    kv_heads = heads if kv_heads is None else kv_heads
    size = mesh_or_size if isinstance(mesh_or_size, int) else mesh_or_size.size()
    near = link or Link(NVLINK_BYTES_S, NVLINK_LATENCY_S)
    far = between_hosts or Link(NETWORK_BYTES_S, NETWORK_LATENCY_S)
    work = 4.0 * batch * seq_len * seq_len * heads * head_dim / (2 if is_causal else 1)
    one_gpu_s = work / (tflops * 1e12)
    token = batch * head_dim * element_size

    def estimate(ring: int, ulysses: int) -> Estimate:
        most_heads = _most_heads(heads, kv_heads, ulysses)
        compute = one_gpu_s / ring * most_heads / heads
        local = seq_len / size
        # Two exchanges, of q with k and v and of out: a rank keeps 1/ulysses of its tokens' heads and sends the rest; keys
        # that are shared are copied.
        copies = max(1.0, ulysses / kv_heads)
        leaves = (ulysses - 1) / ulysses * local * token * (2 * heads + 2 * kv_heads * copies)
        a2a_link = near if ulysses <= gpus_per_host else far
        ulysses_s = 2 * a2a_link.latency_s + leaves / a2a_link.bytes_per_s if ulysses > 1 else 0.0
        # Ring: every step passes on the keys and values of a ring position, whose heads this rank has.
        step_bytes = 2 * local * ulysses * token * max(1.0, kv_heads / ulysses)
        ring_link = near if size <= gpus_per_host else far
        step_s = ring_link.latency_s + step_bytes / ring_link.bytes_per_s
        ring_s = (ring - 1) * step_s
        exposed = ulysses_s + max(0.0, step_s - compute / ring) * (ring - 1)
        shard = local * token * (2 * heads + 2 * kv_heads)
        visiting = min(ring - 1, 2) * step_bytes if ring > 1 else 0
        gathered = shard if ulysses > 1 else 0
        return Estimate(
            ring,
            ulysses,
            compute,
            ring_s,
            ulysses_s,
            exposed,
            int(leaves + (ring - 1) * step_bytes),
            (ring - 1) + (2 if ulysses > 1 else 0),
            int(shard + gathered + visiting),
            most_heads,
        )

    degrees = [(size // ulysses, ulysses) for ulysses in range(1, size + 1) if size % ulysses == 0 and ulysses <= heads]
    ordered = tuple(sorted((estimate(*pair) for pair in degrees), key=lambda one: (one.total_s, one.memory_bytes)))
    best = ordered[0]
    layout = "head_tail" if is_causal and best.ring > 1 else "contiguous"
    return ParallelismPlan(best.ring, best.ulysses, layout, ordered, one_gpu_s, _explain(best, ordered, heads, size))


def _most_heads(heads: int, kv_heads: int, ulysses: int) -> int:
    from .exchange import assign_heads

    return max(rank.q_stop - rank.q_start for rank in assign_heads(heads, kv_heads, ulysses))


def _explain(best: Estimate, ordered: tuple[Estimate, ...], heads: int, size: int) -> str:
    if size == 1:
        return "one rank, nothing to divide."
    reasons = [
        f"{best.total_s * 1e3:.3f} ms a call by the model, {best.exposed_s * 1e3:.3f} ms of it exposed communication"
    ]
    if best.heads_per_rank * best.ulysses != heads:
        reasons.append(f"{heads} heads are uneven over {best.ulysses} ranks (at most {best.heads_per_rank})")
    if len(ordered) > 1:
        other = ordered[1]
        reasons.append(f"next best ring={other.ring}, ulysses={other.ulysses} with {other.total_s * 1e3:.3f} ms")
    if size > heads:
        reasons.append(f"{size} ranks are more than {heads} heads, so Ulysses alone cannot use them")
    return "; ".join(reasons) + "."

"""How the ranks of a mesh share one sequence."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..errors import InvalidCallError
from .agreement import Agreement
from .positions import ShardLayout, contiguous, even_lengths, head_tail

LAYOUTS = ("contiguous", "head_tail")


class ContextParallel:
    """Ranks that hold one sequence together, and how they attend to it.

    Rank ``r * ulysses + u`` of the mesh is ring position r and Ulysses position u. Ulysses ranks exchange heads for
    tokens (https://arxiv.org/abs/2309.14509), ring ranks pass keys and values on (https://arxiv.org/abs/2310.01889);
    with both degrees above 1 every Ulysses group is one position of the ring (https://arxiv.org/abs/2405.07719).
    Making one is a collective call: every rank of the mesh has to make it.

    Args:
        mesh: a DeviceMesh with ``ring * ulysses`` ranks. If it has dimensions named "ring" or "ulysses" these are
            used, and the degrees may be left out. None is all ranks of the default process group.
        ring: degree of the ring.
        ulysses: degree of the all-to-all. Need not divide the number of heads.
        layout: which tokens a rank holds: ``"contiguous"``, or ``"head_tail"``, which gives every rank the same amount
            of causal work. :func:`shard` cuts either.
        head_chunks: parts into which the heads are cut, so that communication of one part overlaps with computation
            of another and buffers hold one part only. None chooses.
        agreement: ``"always"``: all ranks agree before and after every call. ``"first"``: only on the first call of
            each shape; cheaper, but a rank that fails later leaves the others waiting for the timeout.
        timeout: how long the agreement waits for a missing rank; None is torch.distributed's default for gloo,
            30 minutes. The timeouts of the data are those of the mesh's process groups.

    Raises:
        InvalidCallError: degrees that do not fit the mesh, or an unknown option.
    """

    def __init__(
        self,
        mesh: DeviceMesh | None = None,
        *,
        ring: int | None = None,
        ulysses: int | None = None,
        layout: str = "contiguous",
        head_chunks: int | None = None,
        agreement: str = "always",
        timeout: timedelta | None = None,
    ):
        if layout not in LAYOUTS:
            raise InvalidCallError(f"layout must be one of {LAYOUTS}, got {layout!r}")
        if agreement not in ("always", "first"):
            raise InvalidCallError(f"agreement must be 'always' or 'first', got {agreement!r}")
        if head_chunks is not None and head_chunks < 1:
            raise InvalidCallError(f"head_chunks must be at least 1, got {head_chunks}")
        ranks, ring, ulysses, groups = _read_mesh(mesh, ring, ulysses)
        self._set_up(ranks, ring, ulysses, groups, timeout)
        self.layout, self.head_chunks = layout, head_chunks
        self.agree_always = agreement == "always"

    def _set_up(
        self,
        ranks: Sequence[int],
        ring: int,
        ulysses: int,
        groups: dict[str, dist.ProcessGroup],
        timeout: timedelta | None,
    ) -> None:
        self.ranks, self.ring, self.ulysses = tuple(ranks), ring, ulysses
        self.world = ring * ulysses
        self.rank = self.ranks.index(dist.get_rank())
        self.ring_rank, self.ulysses_rank = divmod(self.rank, ulysses)
        first = self.ring_rank * ulysses
        row = self.ranks[first : first + ulysses]
        column = self.ranks[self.ulysses_rank :: ulysses]
        self.ring_group = groups.get("ring") or _group(column)
        self.ulysses_group = groups.get("ulysses") or _group(row)
        if ring > 1 and ulysses > 1:
            self.group = groups.get("all") or _group(self.ranks)
        else:
            self.group = self.ring_group if ring > 1 else self.ulysses_group
        self.agreement = Agreement(self.ranks, timeout)
        # What a call needs besides its tensors, by the facts that all ranks agreed on.
        self.plans: dict[Any, Any] = {}
        # With agreement="first": the ranks' facts, by this rank's.
        self.agreed: dict[Any, Any] = {}

    @property
    def group_rows(self) -> list[list[int]]:
        """Ranks of each ring position: the members of each Ulysses group."""
        return [list(range(r * self.ulysses, (r + 1) * self.ulysses)) for r in range(self.ring)]

    def layout_of(self, lengths: Sequence[int]) -> ShardLayout:
        """Tokens of every rank, from the number that each holds.

        Raises:
            InvalidCallError: the lengths are not those of the layout.
        """
        if self.layout == "contiguous" or self.world == 1:
            return contiguous(lengths)
        layout = head_tail(sum(lengths), self.world)
        if layout.lengths != tuple(lengths):
            raise InvalidCallError(
                f"layout 'head_tail' of {sum(lengths)} tokens over {self.world} ranks has {layout.lengths} tokens per "
                f"rank, but the ranks hold {tuple(lengths)}.\n"
                "  Do:    cut the sequence with attention_dispatch.distributed.shard(tensor, parallel), or use "
                "layout='contiguous'."
            )
        return layout

    def layout_for(self, total: int) -> ShardLayout:
        """Tokens of every rank when ``total`` tokens are cut as evenly as possible."""
        if self.layout == "head_tail":
            return head_tail(total, self.world)
        return contiguous(even_lengths(total, self.world))

    def __repr__(self) -> str:
        return (
            f"ContextParallel(ring={self.ring}, ulysses={self.ulysses}, layout={self.layout!r}, "
            f"rank={self.rank} of {self.world})"
        )


def _group(ranks: Sequence[int]) -> dist.ProcessGroup | None:
    """Process group of the given global ranks; None for one rank. Only its members have to call."""
    if len(ranks) == 1:
        return None
    if list(ranks) == list(range(dist.get_world_size())):
        return dist.group.WORLD
    return dist.new_group(list(ranks), use_local_synchronization=True)


def _read_mesh(
    mesh: DeviceMesh | None,
    ring: int | None,
    ulysses: int | None,
) -> tuple[list[int], int, int, dict[str, dist.ProcessGroup]]:
    """Ranks in ring-major order, both degrees, and the process groups that the mesh already has."""
    if not dist.is_available() or not dist.is_initialized():
        raise InvalidCallError(
            "context parallelism needs torch.distributed, which is not initialised.\n"
            "  Do:    start with torchrun and call torch.distributed.init_process_group() first."
        )
    names = () if mesh is None else tuple(mesh.mesh_dim_names or ())
    groups: dict[str, dist.ProcessGroup] = {}
    if mesh is None:
        ranks = list(range(dist.get_world_size()))
    elif "ring" in names or "ulysses" in names:
        used = tuple(name for name in ("ring", "ulysses") if name in names)
        part = mesh if names == used else mesh[used]
        ranks = part.mesh.flatten().tolist()
        sizes = {name: part.size(index) for index, name in enumerate(used)}
        if ring not in (None, sizes.get("ring", 1)) or ulysses not in (None, sizes.get("ulysses", 1)):
            raise InvalidCallError(f"ring={ring}, ulysses={ulysses} differ from the mesh's dimensions {sizes}")
        ring, ulysses = sizes.get("ring", 1), sizes.get("ulysses", 1)
        groups = {name: part.get_group(name) for name in used if sizes[name] > 1}
    else:
        ranks = mesh.mesh.flatten().tolist()
    ring, ulysses = ring or 1, ulysses or 1
    if ring < 1 or ulysses < 1 or ring * ulysses != len(ranks):
        raise InvalidCallError(
            f"ring={ring} times ulysses={ulysses} is {ring * ulysses}, but the mesh has {len(ranks)} ranks.\n"
            "  Do:    choose degrees whose product is the number of ranks; attention_dispatch.distributed."
            "plan_parallelism(...) suggests them."
        )
    if dist.get_rank() not in ranks:
        raise InvalidCallError(f"this process (rank {dist.get_rank()}) is not in the mesh of ranks {ranks}")
    return ranks, ring, ulysses, groups


class Local:
    """A ``parallel_config`` that says that this call stays on this rank, whatever is set around it."""

    context_parallel_config = None


LOCAL = Local()

_converted: dict[int, tuple[weakref.ref, ContextParallel]] = {}


def as_context_parallel(parallel_config: Any) -> ContextParallel | None:
    """The :class:`ContextParallel` that a ``parallel_config`` argument means.

    Accepts None, a ContextParallel, and by their attributes diffusers' ``ContextParallelConfig`` or the
    ``ParallelConfig`` around one, after their ``setup`` (``model.enable_parallelism``). One with tensor parallelism
    only means None. ``convert_to_fp32`` and the ``*_anything`` switches need nothing: partial results are always
    merged in float32, and any lengths and head counts are served.

    Raises:
        InvalidCallError: an object of another kind, or one that has not been set up.
    """
    if parallel_config is None or isinstance(parallel_config, ContextParallel):
        return parallel_config
    inner = getattr(parallel_config, "context_parallel_config", parallel_config)
    if inner is None:
        return None
    if not (hasattr(inner, "ring_degree") and hasattr(inner, "ulysses_degree")):
        raise InvalidCallError(
            f"parallel_config must be a ContextParallel or diffusers' ContextParallelConfig, got "
            f"{type(parallel_config).__name__}.\n  Do:    attention_dispatch.distributed.ContextParallel(mesh, ring=...)"
        )
    known = _converted.get(id(inner))
    if known is not None and known[0]() is inner:
        return known[1]
    mesh = getattr(inner, "_mesh", None)
    if mesh is None:
        raise InvalidCallError(
            "this ContextParallelConfig has not been set up.\n"
            "  Do:    pass it to model.enable_parallelism(config=...) first, or call its setup()."
        )
    parallel = ContextParallel(mesh)
    key = id(inner)
    _converted[key] = (weakref.ref(inner, lambda _: _converted.pop(key, None)), parallel)
    return parallel

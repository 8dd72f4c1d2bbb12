"""A refusal in a compiled graph: an operator that raises it when the graph runs.

An exception raised while Dynamo traces reaches users as its internal error, which asks them to report a bug to PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import AttentionCall, AttentionOutput
from .errors import AttentionDispatchError

_refusals: dict[str, AttentionDispatchError] = {}

_library = torch.library.Library("attention_dispatch", "FRAGMENT")
_library.define("refusal(str key, Tensor query, Tensor value) -> (Tensor, Tensor)")


def remember(key: str, error: AttentionDispatchError) -> None:
    """Keep what :func:`raised` is to raise; ``key`` stands for it in a graph."""
    _refusals[key] = error


def raised(key: str, call: AttentionCall) -> AttentionOutput:
    """The forward pass of a call that was refused; can be traced, and raises when it runs.

    Raises:
        AttentionDispatchError: the one that was remembered.
    """
    return AttentionOutput(*torch.ops.attention_dispatch.refusal(key, call.query, call.value))


def _raise(key: str, query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    raise _refusals[key].with_traceback(None)


def _shapes(key: str, query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _ = query.shape
    out = query.new_empty((batch, q_len, heads, value.shape[3]))
    return out, query.new_empty((batch, heads, q_len), dtype=torch.float32)


def _no_gradients(ctx, _grad_out: Tensor | None, _grad_lse: Tensor | None) -> tuple[None, None, None]:
    """Never run, but asked for when a graph with a backward pass is traced."""
    return None, None, None


_library.impl("refusal", _raise, "CompositeExplicitAutograd")
torch.library.register_fake("attention_dispatch::refusal", _shapes, lib=_library)
torch.library.register_autograd("attention_dispatch::refusal", _no_gradients, lib=_library)

"""What other dispatchers got wrong under context parallelism, as cases of a world of three processes.

Keys name the finding; the numbers are those of the list in ``test_findings``.
"""

from __future__ import annotations

from typing import Any

import torch

from attention_dispatch import backend_status, dispatch_attention_fn, list_backends
from attention_dispatch.backends import reference
from attention_dispatch.capabilities import Capabilities
from attention_dispatch.distributed import ContextParallel, shard
from attention_dispatch.registry import Backend, register_backend

from .oracle import attention
from .product import relative_error
from .worlds import outcome

TOKENS, HEADS = 13, 4


def inputs(columns: int = TOKENS, kv_heads: int = HEADS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(columns)
    return [torch.randn(2, TOKENS, HEADS, 8, generator=generator),
            torch.randn(2, columns, kv_heads, 8, generator=generator),
            torch.randn(2, columns, kv_heads, 8, generator=generator)]


def errors(parallel: ContextParallel, whole: list[torch.Tensor], mask: Any = None, dense: Any = None, *,
           backend: Any = "reference", training: bool = False, is_causal: bool = False) -> dict[str, float]:
    """Relative errors of this rank's shard, and of the gradients."""
    exact = [tensor.double().requires_grad_() for tensor in whole]
    out, _ = attention(*exact, dense, is_causal=is_causal)
    leaves = [shard(tensor, parallel).requires_grad_(training) for tensor in whole]
    found = dispatch_attention_fn(*leaves, mask, is_causal=is_causal, enable_gqa=whole[0].shape[2] != whole[1].shape[2],
                                  backend=backend, parallel_config=parallel)
    result = {"out": relative_error(found.detach(), shard(out.detach(), parallel))}
    if training:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wanted = torch.autograd.grad(out, exact, grad)
        found.backward(shard(grad, parallel).float())
        for name, leaf, want in zip(("dq", "dk", "dv"), leaves, wanted):
            result[name] = relative_error(leaf.grad, shard(want, parallel))
    return result


def every_backend(parallel: ContextParallel) -> dict[str, Any]:
    """Each backend that is usable here: its error, or the kind of its refusal."""
    found: dict[str, Any] = {}
    for name in list_backends():
        if backend_status(name).available:
            text = outcome(lambda name=name: errors(parallel, inputs(), backend=name)["out"])
            found[name] = text if isinstance(text, float) else text.split(":")[0]
    return found


def gap() -> tuple[torch.Tensor, torch.Tensor]:
    """Key padding (B, Sk) with a gap inside, and its 4-D form."""
    keep = torch.ones(2, TOKENS, dtype=torch.bool)
    keep[0, 3:8], keep[1, 9:] = False, False
    return keep, keep[:, None, None]


def lse(parallel: ContextParallel) -> dict[str, float]:
    whole = inputs()
    _, wanted = attention(*(tensor.double() for tensor in whole))
    local = [shard(tensor, parallel) for tensor in whole]
    _, found = dispatch_attention_fn(*local, attention_kwargs={"return_lse": True}, backend="reference",
                                     parallel_config=parallel)
    assert found.dtype == torch.float32 and found.shape == (2, HEADS, local[0].shape[1])
    return {"lse": relative_error(found, shard(wanted, parallel, 2))}


def run_findings(rank: int) -> dict[str, Any]:
    register_backend(Backend("forward_only", "test", (Capabilities(
        devices=("cpu",), dtypes=(torch.float32,), causal="any", lse=True, gqa=True),), reference.attention))
    padding, dense = gap()
    generator = torch.Generator().manual_seed(5)
    per_head = torch.rand(2, HEADS, TOKENS, TOKENS, generator=generator) > 0.3
    found: dict[str, Any] = {}
    for name, parallel in (("ring", ContextParallel(ring=3)), ("ulysses", ContextParallel(ulysses=3))):
        local_padding = shard(padding, parallel)
        rows = shard(per_head, parallel, 2)

        def dropout(parallel: ContextParallel = parallel) -> Any:
            local = [shard(tensor, parallel) for tensor in inputs()]
            return dispatch_attention_fn(*local, dropout_p=0.1, backend="native", parallel_config=parallel)

        cases = {
            "every backend": lambda parallel=parallel: every_backend(parallel),
            "padding with a gap": lambda p=parallel, m=local_padding: errors(p, inputs(), m, dense, training=True),
            "dropout": dropout,
            "forward-only under autograd": lambda p=parallel: errors(p, inputs(), backend="forward_only", training=True),
            "forward-only in inference": lambda p=parallel: errors(p, inputs(), backend="forward_only"),
            "native": lambda p=parallel: errors(p, inputs(), backend="native", training=True, is_causal=True),
            "cross-attention": lambda p=parallel: errors(p, inputs(22), training=True),
            "heads that do not divide": lambda p=parallel: errors(p, inputs(), training=True, is_causal=True),
            "mask by row and head": lambda p=parallel, m=rows: errors(p, inputs(), m, per_head, training=True),
            "grouped heads": lambda p=parallel: errors(p, inputs(kv_heads=2), training=True),
            "lse": lambda p=parallel: lse(p),
        }
        found.update({f"{name}: {case}": outcome(function) for case, function in cases.items()})
    return found

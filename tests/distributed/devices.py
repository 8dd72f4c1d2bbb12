"""Real kernels over NCCL, forward and gradients, run inside a world of two GPUs."""

from __future__ import annotations

from typing import Any

import torch

from attention_dispatch import backend_status, dispatch_attention_fn
from attention_dispatch.distributed import ContextParallel, shard
from attention_dispatch.errors import BackendRejectedError

from .oracle import attention
from .product import relative_error
from .worlds import outcome

BACKENDS = ("native", "_native_flash", "_native_cudnn", "_native_efficient", "triton_flash", "triton_sage", "_flash_3")
SCHEMES = ("ring", "ulysses", "ring head_tail")
# tokens, key tokens, key heads, causal, padded
CALLS = {
    "plain": (517, 517, 4, False, False),
    "causal": (517, 517, 4, True, False),
    "grouped": (512, 512, 1, True, False),
    "cross": (300, 517, 4, False, False),
    "padded": (517, 517, 4, False, True),
}


def run_call(backend: str, parallel: ContextParallel, name: str, training: bool) -> dict[str, float] | str:
    """Relative errors of this rank's shard against float64 on one process; "refused" with the code of a reason."""
    rows, columns, kv_heads, is_causal, padded = CALLS[name]
    generator = torch.Generator().manual_seed(rows + columns)
    shapes = [(2, rows, 4, 64), (2, columns, kv_heads, 64), (2, columns, kv_heads, 64), (2, rows, 4, 64)]
    *whole, grad = (torch.randn(shape, generator=generator).bfloat16() for shape in shapes)
    mask = None
    if padded:
        mask = torch.ones(2, columns, dtype=torch.bool)
        mask[0, :50], mask[1, 200:260] = False, False
    exact = [tensor.double().requires_grad_() for tensor in whole]
    out, _ = attention(*exact, None if mask is None else mask[:, None, None], is_causal=is_causal)
    local = [shard(tensor.cuda(), parallel).requires_grad_(training) for tensor in whole]
    local_mask = None if mask is None else shard(mask, parallel).cuda()
    try:
        found = dispatch_attention_fn(*local, local_mask, is_causal=is_causal, enable_gqa=kv_heads != 4, backend=backend,
                                      parallel_config=parallel)
    except BackendRejectedError as refusal:
        return f"refused: {refusal.reasons[0].code}"
    errors = {"out": relative_error(found.detach(), shard(out.detach(), parallel))}
    if training:
        found.backward(shard(grad.cuda(), parallel))
        wanted = torch.autograd.grad(out, exact, grad.double())
        for one, tensor, want in zip(("dq", "dk", "dv"), local, wanted):
            errors[one] = relative_error(tensor.grad, shard(want, parallel))
    return errors


def run_device(rank: int, backend: str) -> dict[str, Any]:
    """Results by "scheme call mode"; "unavailable" alone where the backend is not here."""
    status = backend_status(backend)
    if not status.available:
        return {"unavailable": str(status)}
    made = {"ring": ContextParallel(ring=2), "ulysses": ContextParallel(ulysses=2),
            "ring head_tail": ContextParallel(ring=2, layout="head_tail")}
    found: dict[str, Any] = {}
    for scheme in SCHEMES:
        for name in CALLS:
            for training in (False, True):
                key = f"{scheme} {name} {'training' if training else 'inference'}"
                found[key] = outcome(lambda scheme=scheme, name=name, training=training:
                                     run_call(backend, made[scheme], name, training))
    return found

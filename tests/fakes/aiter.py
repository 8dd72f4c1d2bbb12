"""aiter: the package (with gradients, asserting ``return_lse``) and the forward-only Hub kernel."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from contracts import FunctionContract
from fakes.flash import _check, _run


def flash_attn(contract: FunctionContract, record: str, call: SimpleNamespace) -> object:
    """``flash_attn_func`` and its varlen form; the window may carry a third element, the number of sink tokens."""
    hub = record.startswith("hub-")
    if len(call.window_size) != len(contract.signature.parameters["window_size"].default):
        raise ValueError(f"window_size={call.window_size}")
    if call.bias is not None or call.alibi_slopes is not None:
        raise NotImplementedError("the fake has no bias")
    call.softcap = getattr(call, "logits_soft_cap", 0.0)
    _check(call, same_value_dim=False)
    needs_gradients = torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v))
    if needs_gradients and not hub and not call.return_lse:
        raise AssertionError("return_lse")
    with torch.set_grad_enabled(needs_gradients and not hub):
        out, lse = _run(call, call.window_size[:2], call.dropout_p)
    result = (out,)
    result += (lse.detach(),) if call.return_lse else ()
    result += (None,) if call.return_attn_probs else ()
    return result if len(result) > 1 else out

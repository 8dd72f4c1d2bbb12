"""Backends with one deliberate mistake each. A conformance suite that passes one of them proves nothing.

Each declares everything, so that nothing is refused, and computes everything right but for its mistake. The mistakes
are those that dispatchers and kernels have shipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from ..backends.reference import CAPABILITIES, attention
from ..call import FULL_WINDOW, AttentionCall, AttentionOutput
from ..errors import BackendRejectedError, Reason
from ..masks import Mask
from ..registry import Backend

Forward = Callable[[AttentionCall], AttentionOutput]


def _ignores_causal(call: AttentionCall) -> AttentionOutput:
    return attention(call.replaced(is_causal=False))


def _causal_bottom_right(call: AttentionCall) -> AttentionOutput:
    if not call.is_causal:
        return attention(call)
    shift = call.key.shape[1] - call.query.shape[1]
    left, right = call.window_size
    right = shift if right < 0 else min(right, shift)
    if right < 0:
        # No window says "up to a key before the first"; the rows without keys are what such kernels return.
        rows = torch.arange(call.query.shape[1])[:, None] + shift
        keep = (torch.arange(call.key.shape[1])[None] <= rows)[None, None].to(call.query.device)
        return attention(call.replaced(is_causal=False, mask=call.mask or Mask("bool", keep)))
    return attention(call.replaced(is_causal=False, window_size=(left, right)))


def _mask_beats_causal(call: AttentionCall) -> AttentionOutput:
    return attention(call if call.mask is None else call.replaced(is_causal=False))


def _ignores_window(call: AttentionCall) -> AttentionOutput:
    return attention(call.replaced(window_size=FULL_WINDOW))


def _ignores_scale(call: AttentionCall) -> AttentionOutput:
    return attention(call.replaced(scale=call.query.shape[3] ** -0.5))


def _ignores_softcap(call: AttentionCall) -> AttentionOutput:
    return attention(call.replaced(softcap=0.0))


def _drops_dropout(call: AttentionCall) -> AttentionOutput:
    return attention(call.replaced(dropout_p=0.0))


def _does_not_rescale_dropout(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    return output if not call.dropout_p else output._replace(out=output.out * (1 - call.dropout_p))


def _pads_right_only(call: AttentionCall) -> AttentionOutput:
    """Keeps as many keys as the mask has, counted from the first."""
    if call.mask is None or call.mask.kind != "key_padding":
        return attention(call)
    assert call.mask.tensor is not None
    counts = call.mask.tensor.sum(dim=1, keepdim=True)
    columns = torch.arange(call.key.shape[1], device=counts.device)[None]
    return attention(call.replaced(mask=Mask("key_padding", columns < counts)))


def _any_over_queries(call: AttentionCall) -> AttentionOutput:
    """Reduces a mask over queries and heads to key padding."""
    if call.mask is None or call.mask.kind != "bool":
        return attention(call)
    assert call.mask.tensor is not None
    keep = call.mask.tensor.any(dim=2).any(dim=1)
    return attention(call.replaced(mask=Mask("key_padding", keep)))


def _first_head_mask(call: AttentionCall) -> AttentionOutput:
    if call.mask is None or call.mask.tensor is None or call.mask.tensor.ndim != 4:
        return attention(call)
    return attention(call.replaced(mask=call.mask._replace(tensor=call.mask.tensor[:, :1])))


def _bool_mask_as_numbers(call: AttentionCall) -> AttentionOutput:
    """Adds True and False as 1 and 0."""
    if call.mask is None or call.mask.kind not in ("bool", "key_padding"):
        return attention(call)
    assert call.mask.tensor is not None
    tensor = call.mask.tensor if call.mask.kind == "bool" else call.mask.tensor[:, None, None]
    return attention(call.replaced(mask=Mask("bias", tensor.to(call.query.dtype))))


def _ignores_block_table(call: AttentionCall) -> AttentionOutput:
    """Reads a BlockMask's mask_mod and forgets which blocks it lists."""
    if call.mask is None or call.mask.block_mask is None:
        return attention(call)
    from torch.nn.attention.flex_attention import create_mask

    block_mask = call.mask.block_mask
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    lengths = (call.query.shape[1], call.key.shape[1])
    keep = create_mask(block_mask.mask_mod, batch, heads, *lengths, device=call.query.device)
    return attention(call.replaced(mask=Mask("bool", keep)))


def _kv_head_modulo(call: AttentionCall) -> AttentionOutput:
    """Query head h reads key head h % G instead of h // (H / G)."""
    groups = call.query.shape[2] // call.key.shape[2]
    return attention(call.replaced(key=call.key.repeat(1, 1, groups, 1), value=call.value.repeat(1, 1, groups, 1)))


def _lse_base_two(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    return output if output.lse is None else output._replace(lse=output.lse / math.log(2))


def _lse_by_query(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    return output if output.lse is None else output._replace(lse=output.lse.transpose(1, 2))


def _lse_of_empty_rows_zero(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    if output.lse is None:
        return output
    return output._replace(lse=output.lse.masked_fill(output.lse == float("-inf"), 0.0))


def _no_lse(call: AttentionCall) -> AttentionOutput:
    return AttentionOutput(attention(call.replaced(return_lse=False)).out)


def _empty_rows_nan(call: AttentionCall) -> AttentionOutput:
    output = attention(call.replaced(return_lse=True))
    assert output.lse is not None
    out = output.out.masked_fill((output.lse == float("-inf")).transpose(1, 2)[..., None], float("nan"))
    return AttentionOutput(out, output.lse if call.return_lse else None)


def _empty_rows_average(call: AttentionCall) -> AttentionOutput:
    """The softmax of a row of equal, very negative scores is their mean."""
    output = attention(call.replaced(return_lse=True))
    assert output.lse is not None
    mean = call.value.mean(dim=1, keepdim=True).repeat_interleave(call.query.shape[2] // call.value.shape[2], dim=2)
    out = torch.where((output.lse == float("-inf")).transpose(1, 2)[..., None], mean, output.out)
    return AttentionOutput(out, output.lse if call.return_lse else None)


def _leaves_unwritten(call: AttentionCall) -> AttentionOutput:
    """Returns its output without having written the last query."""
    output = attention(call)
    out = torch.empty_like(output.out)
    out[:, :-1] = output.out[:, :-1]
    return output._replace(out=out)


def _writes_nothing(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    return output._replace(out=torch.empty_like(output.out) + 0 * output.out)


def _constant(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    return output._replace(out=torch.full_like(output.out, 0.1) + 0 * output.out)


def _first_result(call: AttentionCall) -> AttentionOutput:
    """Returns for every call of one shape what the first of them gave."""
    key = (tuple(call.query.shape), tuple(call.key.shape), call.query.dtype, call.return_lse)
    return _remembered.setdefault(key, attention(call))


_remembered: dict[object, AttentionOutput] = {}


def _detaches_gradients(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    return output._replace(out=output.out.detach())


def _wrong_key_gradient(call: AttentionCall) -> AttentionOutput:
    return attention(call.replaced(key=call.key.detach() + 0.5 * (call.key - call.key.detach())))


def _no_mask_gradient(call: AttentionCall) -> AttentionOutput:
    if call.mask is None or call.mask.tensor is None or not call.mask.tensor.requires_grad:
        return attention(call)
    half = call.mask.tensor.detach() + 0.5 * (call.mask.tensor - call.mask.tensor.detach())
    return attention(call.replaced(mask=call.mask._replace(tensor=half)))


def _differentiable_lse(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    return output if output.lse is None else output._replace(lse=output.lse + 0 * call.query.sum())


def _writes_into_query(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    with torch.no_grad():
        call.query.detach().mul_(1.5)
    return output


def _low_precision(call: AttentionCall) -> AttentionOutput:
    """Computes with 3 bits of mantissa less than its inputs have."""
    output = attention(call)
    step = 8 * torch.finfo(output.out.dtype).eps
    noise = torch.rand_like(output.out) - 0.5
    return output._replace(out=output.out + (noise * 8 * step * output.out.detach().abs().max()).detach())


def _random(call: AttentionCall) -> AttentionOutput:
    """Differs from call to call in the last bit."""
    output = attention(call)
    step = torch.finfo(output.out.dtype).eps * 0.5
    return output._replace(out=output.out * (1 + step * torch.randint_like(output.out, -1, 2)))


def _returns_float32(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    return output._replace(out=output.out.float())


def _transposes_output(call: AttentionCall) -> AttentionOutput:
    output = attention(call)
    return output._replace(out=output.out.transpose(1, 2))


def _crashes_on_odd_lengths(call: AttentionCall) -> AttentionOutput:
    if call.query.shape[1] % 2:
        raise RuntimeError("CUDA error: misaligned address")
    return attention(call)


def _refuses_undeclared(call: AttentionCall) -> AttentionOutput:
    if call.softcap:
        raise BackendRejectedError("no softcap", (Reason("softcap", "no softcap", "use another backend."),))
    return attention(call)


_MISTAKES: dict[str, Forward] = {
    "ignores_causal": _ignores_causal,
    "causal_bottom_right": _causal_bottom_right,
    "mask_beats_causal": _mask_beats_causal,
    "ignores_window": _ignores_window,
    "ignores_scale": _ignores_scale,
    "ignores_softcap": _ignores_softcap,
    "drops_dropout": _drops_dropout,
    "does_not_rescale_dropout": _does_not_rescale_dropout,
    "pads_right_only": _pads_right_only,
    "any_over_queries": _any_over_queries,
    "first_head_mask": _first_head_mask,
    "bool_mask_as_numbers": _bool_mask_as_numbers,
    "ignores_block_table": _ignores_block_table,
    "kv_head_modulo": _kv_head_modulo,
    "lse_base_two": _lse_base_two,
    "lse_by_query": _lse_by_query,
    "lse_of_empty_rows_zero": _lse_of_empty_rows_zero,
    "no_lse": _no_lse,
    "empty_rows_nan": _empty_rows_nan,
    "empty_rows_average": _empty_rows_average,
    "leaves_unwritten": _leaves_unwritten,
    "writes_nothing": _writes_nothing,
    "constant": _constant,
    "first_result": _first_result,
    "detaches_gradients": _detaches_gradients,
    "wrong_key_gradient": _wrong_key_gradient,
    "no_mask_gradient": _no_mask_gradient,
    "differentiable_lse": _differentiable_lse,
    "writes_into_query": _writes_into_query,
    "low_precision": _low_precision,
    "random": _random,
    "returns_float32": _returns_float32,
    "transposes_output": _transposes_output,
    "crashes_on_odd_lengths": _crashes_on_odd_lengths,
    "refuses_undeclared": _refuses_undeclared,
}


def _backend(name: str, forward: Forward) -> Backend:
    return Backend(name=name, family="wrong", capabilities=(replace(CAPABILITIES),), forward=forward)


HONEST_BACKEND = _backend("honest", attention)
"""What the others are without their mistakes; it must pass."""

WRONG_BACKENDS: dict[str, Backend] = {name: _backend(f"wrong_{name}", forward) for name, forward in _MISTAKES.items()}
"""Mistake -> a backend that makes it."""

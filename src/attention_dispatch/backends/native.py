"""torch's own kernels: ``scaled_dot_product_attention`` and the aten operators behind it, torch 2.9 to 2.13.

The ``_native_*`` backends call the aten operators, not ``torch.nn.attention.sdpa_kernel``: that switch is global to
the process, costs about 10 us a call and is not safe with threads.
https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from .. import adapt, known_bad
from ..call import FULL_WINDOW, AttentionCall, AttentionOutput, CallSpec
from ..capabilities import Capabilities
from ..errors import Reason
from ..registry import Backend
from . import native_backward
from .native_backward import mask_and_causal

_HALF = (torch.bfloat16, torch.float16)
_EFFICIENT_DTYPES = (torch.float32, *_HALF)
_TENSOR_MASKS = frozenset({"key_padding", "bool", "bias"})

# Bound once: the attribute of torch.nn.functional may be replaced while unmodified models are routed.
_sdpa = F.scaled_dot_product_attention

_ANY_DEVICE = Capabilities(
    devices=("cpu", "cuda", "xpu", "mps", "npu", "xla", "hpu", "mtia", "meta"),
    dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16),
    head_dim_v=True,
    masks=_TENSOR_MASKS,
    causal="any",
    window="any",
    dropout=True,
    gqa=True,
    gradients=True,
    mask_gradients=True,
    deterministic="forward",
)


def _dense_mask_adapters(spec: CallSpec) -> tuple[str, ...]:
    needs_merge = spec.window or (spec.is_causal and spec.mask != "none")
    return ("dense_mask",) if needs_merge else ()


def _sdpa_mask_and_causal(call: AttentionCall) -> tuple[Tensor | None, bool]:
    mask, is_causal = mask_and_causal(call)
    if mask is not None and mask.dtype == torch.bool and call.query.device.type == "cuda":
        # With a bool mask, the cuDNN path of SDPA averages the values for a row without keys; with an additive one
        # it returns 0 (H100, torch 2.11.0+cu130, 2026-11-25).
        mask = adapt.as_additive(mask, call.query.dtype)
    return mask, is_causal


def _native(call: AttentionCall) -> AttentionOutput:
    mask, is_causal = _sdpa_mask_and_causal(call)
    if mask is not None and mask.requires_grad and call.query.dtype in _EFFICIENT_DTYPES and _only_mask_grad(call):
        # SDPA asks whether q, k or v need gradients, and keeps no LSE for the backward pass of the mask alone: "LSE is
        # not correctly aligned" (H100, torch 2.11.0+cu130, 2026-11-25).
        return _efficient(call)
    out = _sdpa(
        call.query.transpose(1, 2),
        call.key.transpose(1, 2),
        call.value.transpose(1, 2),
        mask,
        call.dropout_p,
        is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )
    return AttentionOutput(out.transpose(1, 2))


def _only_mask_grad(call: AttentionCall) -> bool:
    return (
        call.query.device.type == "cuda"
        and torch.is_grad_enabled()
        and not (call.query.requires_grad or call.key.requires_grad or call.value.requires_grad)
    )


def _native_adapters(spec: CallSpec) -> tuple[str, ...]:
    hides_more = spec.mask in ("key_padding", "bool") or (spec.mask == "none" and spec.window)
    additive = ("additive_mask",) if spec.device == "cuda" and hides_more else ()
    return _dense_mask_adapters(spec) + additive


def _bind_native(call: AttentionCall) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    if call.mask is not None or call.window_size != FULL_WINDOW or call.return_lse:
        return None
    dropout_p, is_causal, scale, enable_gqa = call.dropout_p, call.is_causal, call.scale, call.enable_gqa
    if not (dropout_p or is_causal or enable_gqa) and scale == 1.0 / math.sqrt(call.query.shape[3]):
        # Parsing arguments that say nothing costs 0.4 us a call (EPYC, torch 2.13, 2026-11-25).
        return lambda query, key, value: _sdpa(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        ).transpose(1, 2)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _sdpa(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            None,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        ).transpose(1, 2)

    return run


def aten_choice(call: AttentionCall) -> SDPBackend:
    """The kernel that ``scaled_dot_product_attention`` takes for a call, as torch's own chooser answers."""
    mask, is_causal = _sdpa_mask_and_causal(call)
    choice = torch._fused_sdp_choice(
        call.query.transpose(1, 2),
        call.key.transpose(1, 2),
        call.value.transpose(1, 2),
        mask,
        call.dropout_p,
        is_causal,
        scale=call.scale,
        enable_gqa=call.enable_gqa,
    )
    return SDPBackend(choice)


def _native_kernel(call: AttentionCall) -> str:
    return f"aten {aten_choice(call).name}"


_WITH_LSE = {
    SDPBackend.CUDNN_ATTENTION: "_native_cudnn",
    SDPBackend.FLASH_ATTENTION: "_native_flash",
    SDPBackend.EFFICIENT_ATTENTION: "_native_efficient",
    SDPBackend.MATH: "reference",
}


def _native_with_lse(call: AttentionCall) -> tuple[str, ...]:
    """torch's own choice first. ``reference`` stands for aten math, whose operator returns no LSE."""
    return tuple(dict.fromkeys((_WITH_LSE.get(aten_choice(call), "_native_flash"), *_WITH_LSE.values())))


NATIVE = Backend(
    name="native",
    family="native",
    capabilities=(_ANY_DEVICE,),
    forward=_native,
    adapters=_native_adapters,
    bind=_bind_native,
    kernel=_native_kernel,
    with_lse=_native_with_lse,
    url="https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html",
    summary="torch's scaled_dot_product_attention; torch picks the kernel",
)


def _math(call: AttentionCall) -> AttentionOutput:
    mask, is_causal = mask_and_causal(call)
    if mask is not None:
        # The operator itself would add a bool mask as 0 and 1.
        mask = adapt.as_additive(mask, call.query.dtype)
    # The operator is made of others, which autocast would cast once more: its softmax then gives a gradient of the
    # wrong dtype (H100, torch 2.11.0+cu130, 2026-11-25).
    device = call.query.device.type
    with torch.autocast(device, enabled=False) if _autocasts(device) else contextlib.nullcontext():
        out, _weights = torch.ops.aten._scaled_dot_product_attention_math(
            call.query.transpose(1, 2),
            call.key.transpose(1, 2),
            call.value.transpose(1, 2),
            mask,
            call.dropout_p,
            is_causal,
            None,
            scale=call.scale,
            enable_gqa=call.enable_gqa,
        )
    return AttentionOutput(out.transpose(1, 2))


def _autocasts(device: str) -> bool:
    return torch._C._is_any_autocast_enabled() and device != "meta" and torch.is_autocast_enabled(device)


MATH = Backend(
    name="_native_math",
    family="native",
    capabilities=(
        Capabilities(
            devices=_ANY_DEVICE.devices,
            dtypes=_ANY_DEVICE.dtypes,
            head_dim_v=True,
            masks=_TENSOR_MASKS,
            causal="any",
            window="any",
            dropout=True,
            gqa=True,
            gradients=True,
            mask_gradients=True,
        ),
    ),
    forward=_math,
    adapters=lambda spec: ("dense_mask",),
    summary="aten math: unfused, builds the score matrix",
)


def _flash(call: AttentionCall) -> AttentionOutput:
    return _flash_cpu(call) if call.query.device.type == "cpu" else _flash_cuda(call)


def _flash_cpu(call: AttentionCall) -> AttentionOutput:
    mask, is_causal = mask_and_causal(call)
    key, value = adapt.expand_kv(call)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        call.query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        0.0,
        is_causal,
        attn_mask=None if mask is None else adapt.as_additive(mask, call.query.dtype),
        scale=call.scale,
    )
    out = out.transpose(1, 2)
    if not call.return_lse:
        return AttentionOutput(out)
    # This kernel reports an LSE of 0.0 for a row without keys.
    empty = adapt.rows_without_key(call)
    lse = lse.detach().to(torch.float32)
    return AttentionOutput(out, lse if empty is None else lse.masked_fill(empty, float("-inf")))


def _flash_cuda(call: AttentionCall) -> AttentionOutput:
    if call.is_causal:
        # The operator itself is bottom-right aligned.
        call = adapt.top_left_by_slicing(call)
    head_dim = call.query.shape[3]
    query, key, value = (adapt.pad_head_dim(tensor, 8).transpose(1, 2) for tensor in (call.query, call.key, call.value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, call.dropout_p, call.is_causal, False, scale=call.scale
    )
    out = out[..., :head_dim].transpose(1, 2)
    return AttentionOutput(out, lse[..., : out.shape[1]].detach() if call.return_lse else None)


def _flash_adapters(spec: CallSpec) -> tuple[str, ...]:
    if spec.device == "cpu":
        gqa = ("expand_kv",) if spec.heads != spec.kv_heads else ()
        additive = ("additive_mask",) if spec.mask in ("key_padding", "bool") else ()
        return _dense_mask_adapters(spec) + additive + gqa
    return ("pad_head_dim",) if spec.head_dim % 8 else ()


FLASH = Backend(
    name="_native_flash",
    family="native",
    capabilities=(
        Capabilities(
            devices=("cpu",),
            dtypes=(torch.float64, torch.float32, *_HALF),
            masks=_TENSOR_MASKS,
            causal="any",
            window="any",
            gqa=True,
            gradients=True,
            lse=True,
        ),
        Capabilities(
            devices=("cuda",),
            dtypes=_HALF,
            min_sm=80,
            max_head_dim=256,
            causal="fewer_queries",
            dropout=True,
            gqa=True,
            gradients=True,
            lse=True,
            deterministic="forward",
        ),
    ),
    forward=_flash,
    backward=native_backward.flash,
    adapters=_flash_adapters,
    summary="aten flash: FlashAttention-2 on CUDA, the fused CPU kernel on CPU",
)


def _gpu_probe() -> tuple[Reason, ...]:
    if torch.cuda.is_available():
        return ()
    what = f"torch {torch.__version__} sees no GPU"
    return (Reason("device", what, "run it on a machine with a GPU, with a torch built for that GPU."),)


def _efficient(call: AttentionCall) -> AttentionOutput:
    key, value = adapt.expand_kv(call)
    head_dim_v = value.shape[3]
    mask, is_causal = mask_and_causal(call)
    batch, q_len, heads, _ = call.query.shape
    bias = None
    if mask is not None:
        bias = adapt.aligned_bias(mask, (batch, heads, q_len, key.shape[1]), call.query.dtype)
    query, key, value = (adapt.pad_head_dim(tensor, 8).transpose(1, 2) for tensor in (call.query, key, value))
    needs_lse = call.return_lse or (
        torch.is_grad_enabled()
        and (
            query.requires_grad or key.requires_grad or value.requires_grad or (bias is not None and bias.requires_grad)
        )
    )
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, needs_lse, call.dropout_p, is_causal, scale=call.scale
    )
    out = out[..., :head_dim_v].transpose(1, 2)
    if not call.return_lse:
        return AttentionOutput(out)
    # The LSE is padded to a multiple of 32 rows, and is 0.0 for a row without keys.
    lse = lse[..., :q_len].detach()
    empty = adapt.rows_without_key(call)
    return AttentionOutput(out, lse if empty is None else lse.masked_fill(empty, float("-inf")))


def _fused_mask_adapters(spec: CallSpec) -> tuple[str, ...]:
    gqa = ("expand_kv",) if spec.heads != spec.kv_heads else ()
    pad = ("pad_head_dim",) if spec.head_dim % 8 or spec.head_dim_v % 8 else ()
    bias = ("aligned_bias", "dense_mask") if spec.mask != "none" or spec.window else ()
    return bias + gqa + pad


EFFICIENT = Backend(
    name="_native_efficient",
    family="native",
    capabilities=(
        Capabilities(
            devices=("cuda",),
            dtypes=_EFFICIENT_DTYPES,
            min_sm=50,
            head_dim_v=True,
            masks=_TENSOR_MASKS,
            causal="any",
            window="any",
            dropout=True,
            gqa=True,
            gradients=True,
            mask_gradients=True,
            lse=True,
            deterministic="forward",
        ),
    ),
    forward=_efficient,
    backward=native_backward.efficient,
    probe=_gpu_probe,
    adapters=_fused_mask_adapters,
    summary="aten memory-efficient (cutlass), CUDA",
)


def _cudnn(call: AttentionCall) -> AttentionOutput:
    if call.is_causal and call.mask is None and call.window_size == FULL_WINDOW:
        call = adapt.top_left_by_slicing(call)
    needs_grad = torch.is_grad_enabled() and (
        call.query.requires_grad or call.key.requires_grad or call.value.requires_grad
    )
    rows = call.query.shape[1]
    if needs_grad and rows == 1 and call.key.shape[1] == 1:
        # cuDNN has no backward pass for one query and one key: the query is sent twice, and one result dropped.
        call = call.replaced(query=call.query.repeat(1, 2, 1, 1), is_causal=False, window_size=FULL_WINDOW)
    mask, is_causal = mask_and_causal(call)
    batch, q_len, heads, _head_dim = call.query.shape
    bias = None
    if mask is not None:
        bias = adapt.aligned_bias(mask, (batch, heads, q_len, call.key.shape[1]), call.query.dtype)
    head_dim_v = call.value.shape[3]
    query, key, value = (adapt.pad_head_dim(tensor, 8).transpose(1, 2) for tensor in (call.query, call.key, call.value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        query, key, value, bias, call.return_lse or needs_grad, call.dropout_p, is_causal, False, scale=call.scale
    )
    out = out[..., :rows, :head_dim_v].transpose(1, 2)
    if not call.return_lse:
        return AttentionOutput(out)
    lse = lse.squeeze(-1) if lse.ndim == 4 else lse
    return AttentionOutput(out, lse[..., :rows].detach())


def _cudnn_probe() -> tuple[Reason, ...]:
    if torch.backends.cudnn.is_available():
        return ()
    return (
        Reason("package", "this torch has no cuDNN", "install a CUDA build of torch: https://pytorch.org/get-started"),
    )


CUDNN = Backend(
    name="_native_cudnn",
    family="native",
    capabilities=(
        Capabilities(
            devices=("cuda",),
            dtypes=_HALF,
            min_sm=80,
            max_head_dim=128,
            head_dim_v=True,
            masks=_TENSOR_MASKS,
            causal="fewer_queries",
            window="any",
            dropout=True,
            gqa=True,
            gradients=True,
            lse=True,
            deterministic="forward",
        ),
    ),
    forward=_cudnn,
    backward=native_backward.cudnn,
    probe=_cudnn_probe,
    extra_reasons=lambda spec: known_bad.reasons("_native_cudnn", spec),
    adapters=_fused_mask_adapters,
    summary="aten cuDNN, CUDA sm_80 and newer",
)

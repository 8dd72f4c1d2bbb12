"""One attention call in canonical form: its tensors (`AttentionCall`) and its facts (`CallSpec`).

Shape legend: B batch, Q query length, K key length, H query heads, G key/value heads, D head dim of q and k, V of v.
Layout is BSHD = (batch, seq, heads, head_dim) everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .errors import AttentionDispatchError, InvalidCallError
from .masks import Mask, normalise
from .validation import check_numbers, check_shapes, check_tensors, checked_flag, checked_softcap, checked_window

FULL_WINDOW = (-1, -1)
STANDARD_KWARGS = ("return_lse", "window_size", "softcap", "deterministic")


class AttentionOutput(NamedTuple):
    """What a backend returns: ``out`` (B, Q, H, V); ``lse`` float32 natural log (B, H, Q), or None if not asked for."""

    out: Tensor
    lse: Tensor | None = None


class AttentionCall:
    """A validated call. Every field is canonical: no None for scale, no 2-D masks, no unknown options.

    Attributes:
        query: (B, Q, H, D). key: (B, K, G, D). value: (B, K, G, V). The last dimension is contiguous.
        mask: :class:`~attention_dispatch.masks.Mask` or None.
        dropout_p: probability in [0, 1).
        is_causal: query i sees keys j <= i (top-left aligned).
        scale: factor of the scores, > 0; the sign of a negative one is in ``query``.
        enable_gqa: H != G.
        window_size: (left, right); query i sees keys i - left <= j <= i + right; -1 is unbounded.
        softcap: scores become softcap * tanh(scores / softcap) before masking; 0.0 is off.
        deterministic: bitwise equal results, gradients included, from run to run are required.
        return_lse: whether the log-sum-exp is asked for.
        options: backend-specific keyword arguments.
    """

    __slots__ = (
        "deterministic",
        "dropout_p",
        "enable_gqa",
        "is_causal",
        "key",
        "mask",
        "options",
        "query",
        "return_lse",
        "scale",
        "softcap",
        "value",
        "window_size",
    )

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float = 1.0,
        enable_gqa: bool = False,
        window_size: tuple[int, int] = FULL_WINDOW,
        softcap: float = 0.0,
        deterministic: bool = False,
        return_lse: bool = False,
        options: Mapping[str, Any] | None = None,
    ):
        self.query = query
        self.key = key
        self.value = value
        self.mask = mask
        self.dropout_p = dropout_p
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa
        self.window_size = window_size
        self.softcap = softcap
        self.deterministic = deterministic
        self.return_lse = return_lse
        self.options = options or {}

    def replaced(self, **changes: Any) -> AttentionCall:
        """A copy with some fields changed."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return AttentionCall(**{**fields, **changes})


class CallSpec(NamedTuple):
    """The facts of a call that decide which backend can run it: no tensors and no lengths, so it can key a cache.

    ``lengths`` is ``"equal"``, ``"fewer_queries"`` or ``"more_queries"`` (than keys) where causal masking or a window
    compares positions, else ``"any"``: comparing lengths costs a traced graph its generality. ``architecture`` is vendor
    tagged, such as ``"sm_90"`` or ``"gfx942"``, and empty where a device has none.
    """

    device: str
    architecture: str
    dtype: torch.dtype
    head_dim: int
    head_dim_v: int
    heads: int
    kv_heads: int
    mask: str
    mask_per_head: bool
    mask_grad: bool
    is_causal: bool
    window: bool
    softcap: bool
    dropout: bool
    grad: bool
    lse: bool
    deterministic: bool
    lengths: str
    options: tuple[str, ...]


def canonicalise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: Mapping[str, Any] | None = None,
    known_options: frozenset[str] = frozenset(),
) -> AttentionCall:
    """Validate a call and bring it into canonical form.

    Raises:
        InvalidCallError: the caller's mistake, the same for every backend.
    """
    check_tensors(query, key, value)
    query, key, value = _apply_autocast(query, key, value)
    batch, q_len, heads, head_dim = query.shape
    check_shapes(query, key, value, enable_gqa)
    check_numbers(dropout_p, scale)
    mask = None
    if attn_mask is not None:
        mask = normalise(attn_mask, batch, heads, q_len, key.shape[1], query.device)
    factor = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    if factor <= 0.0:
        query, factor = _positive_scale(query, factor)
    call = AttentionCall(
        query if query.stride(3) == 1 else query.contiguous(),
        key if key.stride(3) == 1 else key.contiguous(),
        value if value.stride(3) == 1 else value.contiguous(),
        mask,
        float(dropout_p),
        checked_flag("is_causal", is_causal),
        factor,
        index(heads) != index(key.shape[2]),
    )
    if attention_kwargs:
        if not isinstance(attention_kwargs, Mapping):
            raise InvalidCallError(
                f"attention_kwargs must be a dict such as {{'return_lse': True}}, got {type(attention_kwargs).__name__}."
            )
        _apply_kwargs(call, attention_kwargs, known_options)
    return call


def spec_of(call: AttentionCall) -> CallSpec:
    """The :class:`CallSpec` of a canonical call."""
    query, key, mask = call.query, call.key, call.mask
    q_len, k_len = query.shape[1], key.shape[1]
    mask_kind, per_head, mask_grad = "none", False, False
    if mask is not None:
        mask_kind = mask.kind
        tensor = mask.tensor
        if tensor is not None:
            # Shapes are symbolic while a graph is traced; a branch makes their facts constants.
            per_head = True if tensor.ndim == 4 and tensor.shape[1] != 1 else False
            mask_grad = torch.is_grad_enabled() and tensor.requires_grad
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or call.value.requires_grad)
    if forward_ad._current_level >= 0:
        grad = grad or any(forward_ad.unpack_dual(part).tangent is not None for part in (query, key, call.value))
    return CallSpec(
        query.device.type,
        architecture(query.device.type, query.device.index),
        query.dtype,
        # index() makes these constants where a graph is traced with dynamic shapes; lengths stay symbolic.
        index(query.shape[3]),
        index(call.value.shape[3]),
        index(query.shape[2]),
        index(key.shape[2]),
        mask_kind,
        per_head,
        mask_grad,
        call.is_causal,
        call.window_size != FULL_WINDOW,
        # Floats are symbolic too.
        True if call.softcap else False,
        True if call.dropout_p else False,
        grad or mask_grad,
        call.return_lse,
        call.deterministic,
        _order_of_lengths(q_len, k_len) if call.is_causal or call.window_size != FULL_WINDOW else "any",
        tuple(sorted(call.options)) if call.options else (),
    )


def _order_of_lengths(q_len: int, k_len: int) -> str:
    return "equal" if q_len == k_len else ("fewer_queries" if q_len < k_len else "more_queries")


def check_output(backend: str, call: AttentionCall, output: Any) -> None:
    """Raise if what a backend returned is not what the contract says.

    Raises:
        AttentionDispatchError: not an :class:`AttentionOutput`, or one of the wrong shape, dtype or without an LSE that
            was asked for.
    """
    batch, q_len, heads, _ = call.query.shape
    wanted = f"out {(batch, q_len, heads, call.value.shape[3])} {call.query.dtype}"
    if call.return_lse:
        wanted += f" and lse {(batch, heads, q_len)} torch.float32"
    if not isinstance(output, AttentionOutput):
        raise AttentionDispatchError(
            f"backend {backend!r} returned {type(output).__name__}, not AttentionOutput with {wanted}."
        )
    out, lse = output
    right = out.shape == (batch, q_len, heads, call.value.shape[3]) and out.dtype is call.query.dtype
    if call.return_lse:
        right = right and lse is not None and lse.shape == (batch, heads, q_len) and lse.dtype is torch.float32
    if not right:
        found = f"out {tuple(out.shape)} {out.dtype}"
        found += "" if lse is None else f" and lse {tuple(lse.shape)} {lse.dtype}"
        raise AttentionDispatchError(f"backend {backend!r} returned {found}, the call asks for {wanted}.")


_architectures: dict[tuple[str, int | None], str] = {}


@torch._dynamo.assume_constant_result
def architecture(device_type: str, index: int | None) -> str:
    """``"sm_90"``, ``"gfx942"`` or ``""``; asked of the driver once per device."""
    found = _architectures.get((device_type, index))
    if found is None:
        found = ""
        if device_type == "cuda":
            if torch.version.hip:
                found = torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
            else:
                major, minor = torch.cuda.get_device_capability(index)
                found = f"sm_{major}{minor}"
        _architectures[(device_type, index)] = found
    return found


_MASK_WORDS = {"key_padding": "key-padding mask", "bool": "bool mask", "bias": "additive mask", "block": "BlockMask"}


def describe(call: AttentionCall, spec: CallSpec) -> str:
    """One line for people: shapes, dtype, device and everything out of the ordinary."""
    query, key, value = call.query, call.key, call.value
    same = query.shape == key.shape == value.shape
    others = "k/v the same" if same else f"k {tuple(key.shape)}, v {tuple(value.shape)}"
    extras = _extras(
        spec, f"window_size={call.window_size}", f"softcap={call.softcap:g}", f"dropout_p={call.dropout_p:g}"
    )
    extras += [f"{name}={value!r}" for name, value in call.options.items()]
    return "; ".join([f"q {tuple(query.shape)} {_kind(spec)}, {others}", *extras])


def describe_kind(spec: CallSpec) -> str:
    """The same of a call that is traced, whose lengths are not known."""
    same = spec.heads == spec.kv_heads and spec.head_dim == spec.head_dim_v and spec.lengths in ("equal", "any")
    others = "k/v the same" if same else f"k (B, K, {spec.kv_heads}, {spec.head_dim}), v (.., {spec.head_dim_v})"
    extras = [*_extras(spec, "window_size", "softcap", "dropout"), *spec.options]
    return "; ".join([f"q (B, S, {spec.heads}, {spec.head_dim}) {_kind(spec)}, {others}", *extras])


def _kind(spec: CallSpec) -> str:
    return f"{str(spec.dtype).removeprefix('torch.')} on {spec.device} {spec.architecture}".rstrip()


def _extras(spec: CallSpec, window: str, softcap: str, dropout: str) -> list[str]:
    words = (
        (_MASK_WORDS.get(spec.mask, ""), spec.mask != "none"),
        ("causal", spec.is_causal),
        (window, spec.window),
        (softcap, spec.softcap),
        (dropout, spec.dropout),
        ("gradients needed", spec.grad),
        ("return_lse", spec.lse),
        ("deterministic", spec.deterministic),
    )
    return [word for word, on in words if on]


def _apply_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast as ``scaled_dot_product_attention`` does inside an autocast region; then all three must agree."""
    device = query.device.type
    if (
        torch._C._is_any_autocast_enabled()
        and device != "meta"
        and torch.is_autocast_enabled(device)
        and query.dtype != torch.float64
    ):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.dtype != key.dtype or query.dtype != value.dtype:
        raise InvalidCallError(
            f"query, key and value must share one dtype, got {query.dtype}, {key.dtype} and {value.dtype}."
        )
    return query, key, value


def _positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale > 0: fused kernels take the maximum of a row before they scale it.

    With scale <= 0 and causal masking, torch's own CPU kernel returns NaN (torch 2.13).
    """
    return (-query, -scale) if scale < 0.0 else (query * 0.0, 1.0)


def _apply_kwargs(call: AttentionCall, attention_kwargs: Mapping[str, Any], known_options: frozenset[str]) -> None:
    options = {}
    for name, value in attention_kwargs.items():
        if name == "return_lse":
            call.return_lse = checked_flag(name, value)
        elif name == "deterministic":
            call.deterministic = checked_flag(name, value)
        elif name == "softcap":
            call.softcap = checked_softcap(value)
        elif name == "window_size":
            call.window_size = FULL_WINDOW if value is None else checked_window(value)
        elif name in known_options:
            options[name] = value
        else:
            known = ", ".join((*STANDARD_KWARGS, *sorted(known_options)))
            raise InvalidCallError(f"unknown attention_kwargs key {name!r}. Known: {known}.")
    if options:
        call.options = options

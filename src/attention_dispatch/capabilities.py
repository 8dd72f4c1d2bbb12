"""What a backend can do, as data, and the one function that compares it with a call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from .call import CallSpec
from .errors import Reason

Lengths = Literal["none", "equal", "fewer_queries", "any"]
"""Where top-left causal masking (or a window) is served: nowhere; Q = K only; Q <= K; any lengths."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far results may lie from exact attention. Zeros mean: within twice torch's own error in the same dtype.

    Anything else is for kernels with 8-bit q and k. It holds for scores of ordinary size (a standard deviation of about
    1); larger scores amplify the rounding, and there twice the error of exact attention on 8-bit q and k is allowed.

    Attributes:
        relative_l2: largest ||out - exact|| / ||exact||.
        cosine: smallest cosine similarity with the exact output.
    """

    relative_l2: float = 0.0
    cosine: float = 1.0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Everything a backend can be asked on some devices. What is not declared is refused.

    Attributes:
        devices: ``torch.device.type`` values.
        dtypes: dtypes of q, k and v.
        architectures: allowed architectures such as ``"sm_90"``; empty means every one.
        min_sm: smallest CUDA compute capability times ten (80 for sm_80); 0 asks for none.
        head_dims: allowed head dims; empty means every one up to ``max_head_dim``.
        max_head_dim: largest head dim of q, k and v.
        head_dim_multiple: head dims must be a multiple of this.
        head_dim_v: whether v's head dim may differ.
        masks: mask kinds served (see ``masks.KINDS``).
        mask_with_causal: whether a mask may be combined with causal masking or a window.
        causal, window: lengths for which each is served exactly.
        softcap, dropout, gqa: whether served.
        gradients: for q, k, v. mask_gradients: for an additive mask. gradients_with: mask kinds for which gradients
            are served; None means all of ``masks``.
        lse: whether the log-sum-exp is served (always detached). lse_with_mask: also beside a mask.
        deterministic: ``"always"``; ``"forward"`` if only the forward pass is; ``"never"``.
        options: backend-specific keyword arguments that are understood.
        quantised: whether operands are rounded to 8 bits or fewer; never chosen unless asked for.
        tolerance: declared error; see :class:`Tolerance`.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    architectures: tuple[str, ...] = ()
    min_sm: int = 0
    head_dims: tuple[int, ...] = ()
    max_head_dim: int = 1 << 16
    head_dim_multiple: int = 1
    head_dim_v: bool = False
    masks: frozenset[str] = frozenset()
    mask_with_causal: bool = True
    causal: Lengths = "none"
    window: Lengths = "none"
    softcap: bool = False
    dropout: bool = False
    gqa: bool = False
    gradients: bool = False
    mask_gradients: bool = False
    gradients_with: frozenset[str] | None = None
    lse: bool = False
    lse_with_mask: bool = True
    deterministic: Literal["always", "forward", "never"] = "always"
    options: tuple[str, ...] = ()
    quantised: bool = False
    tolerance: Tolerance = field(default_factory=Tolerance)


_MASK_WORDS = {
    "key_padding": "a key-padding mask",
    "bool": "a bool mask that depends on the query or head",
    "bias": "an additive float mask",
    "block": "a BlockMask",
}
_ALIGNMENT_FIX = "make q and k equally long, or use a backend with top-left causal masking: backend='native' or 'flex'."
_CAST_FIX = "cast q, k and v: .to(torch.bfloat16)."


def reasons_against(capabilities: tuple[Capabilities, ...], spec: CallSpec) -> tuple[Reason, ...]:
    """Every reason why a backend with these capabilities cannot run a call; empty when it can.

    Pure: looks at no device and imports nothing. Empty too where nothing is declared: then its status tells.
    """
    if not capabilities:
        return ()
    row = row_for(capabilities, spec.device)
    if row is None:
        devices = sorted({device for entry in capabilities for device in entry.devices})
        return (
            Reason(
                "device",
                f"it runs on {' or '.join(devices)}, not on {spec.device}",
                f"move the tensors to {devices[0]}, or use backend='native'.",
            ),
        )
    return (
        *_hardware_reasons(row, spec),
        *_shape_reasons(row, spec),
        *_mask_reasons(row, spec),
        *_feature_reasons(row, spec),
    )


def row_for(capabilities: tuple[Capabilities, ...], device: str) -> Capabilities | None:
    """The capabilities that apply on a device type, or None."""
    for row in capabilities:
        if device in row.devices:
            return row
    return None


def _hardware_reasons(row: Capabilities, spec: CallSpec) -> list[Reason]:
    reasons = []
    arch = spec.architecture
    if row.architectures and arch not in row.architectures:
        reasons.append(
            Reason(
                "arch",
                f"it is built for {', '.join(row.architectures)}, this GPU is {arch or 'unknown'}",
                "use backend='native' or 'auto' on this GPU.",
            )
        )
    elif row.min_sm and not (arch.startswith("sm_") and int(arch[3:]) >= row.min_sm):
        reasons.append(
            Reason(
                "arch",
                f"it needs an NVIDIA GPU of sm_{row.min_sm} or newer, this one is {arch or spec.device}",
                "use backend='native' or 'auto' on this GPU.",
            )
        )
    if spec.dtype not in row.dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)
        reasons.append(
            Reason(
                "dtype",
                f"dtype {str(spec.dtype).removeprefix('torch.')} is not supported (supported: {names})",
                _CAST_FIX,
            )
        )
    return reasons


def _shape_reasons(row: Capabilities, spec: CallSpec) -> list[Reason]:
    reasons = []
    for name, dim in {"head_dim": spec.head_dim, "head_dim of v": spec.head_dim_v}.items():
        if row.head_dims and dim not in row.head_dims:
            reasons.append(
                Reason(
                    "head_dim",
                    f"{name} {dim} is not supported (supported: {', '.join(map(str, row.head_dims))})",
                    "use backend='native' for this head_dim.",
                )
            )
        elif dim > row.max_head_dim:
            reasons.append(
                Reason(
                    "head_dim",
                    f"{name} {dim} is larger than {row.max_head_dim}",
                    "use backend='native' for this head_dim.",
                )
            )
        elif dim % row.head_dim_multiple:
            reasons.append(
                Reason(
                    "head_dim",
                    f"{name} {dim} is not a multiple of {row.head_dim_multiple}",
                    "use backend='native' for this head_dim.",
                )
            )
    if spec.head_dim != spec.head_dim_v and not row.head_dim_v:
        reasons.append(
            Reason(
                "head_dim_v",
                f"v has head_dim {spec.head_dim_v} but q and k have {spec.head_dim}",
                "use backend='native', which allows it.",
            )
        )
    if spec.heads != spec.kv_heads and not row.gqa:
        reasons.append(
            Reason(
                "gqa",
                "grouped-query attention is not supported",
                "repeat k and v to as many heads as q: .repeat_interleave(groups, dim=2).",
            )
        )
    return reasons


def _mask_reasons(row: Capabilities, spec: CallSpec) -> list[Reason]:
    reasons = []
    if spec.mask != "none":
        if spec.mask not in row.masks:
            supported = ", ".join(["none", *sorted(row.masks), *(["causal"] if row.causal != "none" else [])])
            reasons.append(
                Reason(
                    "mask",
                    f"{_MASK_WORDS[spec.mask]} is not supported (supported: {supported})",
                    "drop the mask if it masks nothing, or use backend='native' or 'flex'.",
                )
            )
        elif (spec.is_causal or spec.window) and not row.mask_with_causal:
            reasons.append(
                Reason(
                    "mask",
                    "a mask together with causal masking or a window is not supported",
                    "merge them into one mask, or use backend='native' or 'flex'.",
                )
            )
    if spec.is_causal:
        reasons += _length_reasons("causal", "causal masking", row.causal, spec)
    if spec.window:
        reasons += _length_reasons("window", "window_size", row.window, spec)
    return reasons


def _length_reasons(code: str, word: str, served: Lengths, spec: CallSpec) -> list[Reason]:
    if served == "none":
        return [Reason(code, f"{word} is not supported", "use backend='native' or 'flex'.")]
    if served == "equal" and spec.lengths != "equal":
        return [
            Reason(
                code,
                f"{word} with different query and key lengths is aligned differently by this kernel",
                _ALIGNMENT_FIX,
            )
        ]
    if served == "fewer_queries" and spec.lengths == "more_queries":
        return [
            Reason(code, f"{word} with more queries than keys is aligned differently by this kernel", _ALIGNMENT_FIX)
        ]
    return []


def _feature_reasons(row: Capabilities, spec: CallSpec) -> list[Reason]:
    reasons = []
    if spec.softcap and not row.softcap:
        reasons.append(Reason("softcap", "softcap is not supported", "use backend='flex' or 'reference'."))
    if spec.dropout and not row.dropout:
        reasons.append(Reason("dropout", "dropout_p > 0 is not supported", "use dropout_p=0.0 or backend='native'."))
    if spec.grad and not row.gradients:
        reasons.append(
            Reason(
                "gradients",
                "gradients are needed and it is forward-only here",
                "call it under torch.no_grad(), or use backend='native'.",
            )
        )
    elif spec.grad and row.gradients_with is not None and spec.mask != "none" and spec.mask not in row.gradients_with:
        reasons.append(
            Reason(
                "gradients",
                f"gradients are not served together with {_MASK_WORDS[spec.mask]}",
                "call it under torch.no_grad(), or use backend='native'.",
            )
        )
    if spec.mask_grad and not row.mask_gradients and row.gradients:
        reasons.append(
            Reason(
                "gradients",
                "a gradient for the additive mask is not supported",
                "detach the mask, or use backend='_native_math'.",
            )
        )
    if spec.lse and not (row.lse and (row.lse_with_mask or spec.mask == "none")):
        reasons.append(
            Reason(
                "lse",
                "return_lse is not supported for this call",
                "use backend='_native_flash' or 'reference' for the LSE.",
            )
        )
    if spec.deterministic and (row.deterministic == "never" or (row.deterministic == "forward" and spec.grad)):
        reasons.append(
            Reason(
                "deterministic",
                "it cannot be deterministic for this call",
                "drop deterministic=True, or use backend='_native_math'.",
            )
        )
    unknown = [name for name in spec.options if name not in row.options]
    if unknown:
        reasons.append(
            Reason(
                "options",
                f"it does not know the option {', '.join(unknown)}",
                f"remove {', '.join(unknown)} from attention_kwargs.",
            )
        )
    return reasons

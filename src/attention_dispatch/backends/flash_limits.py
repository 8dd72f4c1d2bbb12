"""What FlashAttention 2, 3 and 4 cannot do, beyond their capability rows: by version, and by build for version 3."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch

from ..call import CallSpec
from ..errors import Reason
from . import source

INSTALL_3 = "pip install 'git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper' --no-build-isolation"

NO_LSE = Reason(
    "lse",
    "this build of FlashAttention 3 (July and August 2025) does not return the LSE",
    f"update it: {INSTALL_3}",
)


def of_version_2(spec: CallSpec) -> tuple[Reason, ...]:
    reasons = []
    if spec.softcap and spec.dropout:
        reasons.append(Reason("softcap", "softcap together with dropout is not supported", "use dropout_p=0.0."))
    small_memory = spec.architecture in ("sm_86", "sm_89", "sm_120", "sm_121")
    if small_memory and spec.grad and spec.dropout and spec.head_dim > 192:
        what = f"gradients with dropout for head_dim {spec.head_dim} do not fit {spec.architecture}"
        reasons.append(Reason("dropout", what, "use dropout_p=0.0 or backend='native'."))
    return tuple(reasons)


def of_version_3(spec: CallSpec) -> tuple[Reason, ...]:
    reasons = []
    dim, dim_v = _multiple_of_8(spec.head_dim), _multiple_of_8(spec.head_dim_v)
    if dim != dim_v and not ((128 < dim <= 192 and 96 < dim_v <= 128) or (dim <= 64 and dim_v <= 512)):
        what = f"head_dim {spec.head_dim} with {spec.head_dim_v} for v is not supported"
        reasons.append(Reason("head_dim_v", what, "use backend='native' for these head dims."))
    if spec.deterministic and spec.grad and dim > 192:
        what = f"its backward pass is not deterministic for head_dim {spec.head_dim}"
        reasons.append(Reason("deterministic", what, "drop deterministic=True, or use backend='flash'."))
    return tuple(reasons)


def of_version_4(spec: CallSpec) -> tuple[Reason, ...]:
    dim, dim_v = dims = _multiple_of_8(spec.head_dim), _multiple_of_8(spec.head_dim_v)
    serves = True
    if spec.architecture.startswith("sm_10"):
        serves = max(dims) <= 128 or dims in ((192, 128), (256, 256))
    elif spec.architecture == "sm_90":
        # What 4.0.0b36 compiles with nvidia-cutlass-dsl 4.6.2 to 4.8.1; upstream raises errors of the compiler.
        serves = dim_v <= 192 or dim > 96
        if serves and spec.grad:
            serves = not 96 < dim <= 112 if dim == dim_v else dims == (192, 128)
    if serves:
        return ()
    gradients = " with gradients" if spec.grad else ""
    what = f"head dims {spec.head_dim} and {spec.head_dim_v} (v){gradients} are not supported on {spec.architecture}"
    return (Reason("head_dim", what, "use backend='native' for these head dims."),)


_FLAG = "FLASHATTENTION_DISABLE_"
_HEAD_DIMS_3 = (64, 96, 128, 192, 256)


def left_out(spec: CallSpec, varlen: bool) -> tuple[Reason, ...]:
    """What the installed FlashAttention 3 was built without.

    Its build writes the switches it was given into the module ``flash_attn_config``:
    https://github.com/Dao-AILab/flash-attention/blob/main/hopper/setup.py
    """
    flags = _build_flags()
    if not flags:
        return ()
    asked = {
        "BACKWARD": ("grad", "gradients", spec.grad),
        "FP16": ("dtype", "float16", spec.dtype == torch.float16),
        "SOFTCAP": ("softcap", "softcap", spec.softcap),
        "LOCAL": ("window", "windows", spec.window),
        "VARLEN": ("mask", "packed sequences", varlen),
    }
    reasons = [
        Reason(code, f"this FlashAttention 3 was built without {what} ({_FLAG}{name})", _rebuild(name))
        for name, (code, what, needed) in asked.items()
        if needed and flags.get(_FLAG + name)
    ]
    widest = max(spec.head_dim, spec.head_dim_v)
    built = [dim for dim in _HEAD_DIMS_3 if not flags.get(f"{_FLAG}HDIM{dim}")]
    if widest <= 256 and not any(dim >= widest for dim in built):
        what = f"this FlashAttention 3 was built for head dims up to {max(built, default=0)}, not {widest}"
        reasons.append(Reason("head_dim", what, _rebuild(f"HDIM{min(d for d in _HEAD_DIMS_3 if d >= widest)}")))
    return tuple(reasons)


def _rebuild(name: str) -> str:
    return f"build it without {_FLAG}{name}: {INSTALL_3}"


def _build_flags() -> dict[str, bool]:
    try:
        config = importlib.import_module("flash_attn_config")
    except ImportError:  # builds before August 2025 write none
        return {}
    flags: dict[str, bool] = getattr(config, "CONFIG", {}).get("build_flags", {})
    return flags


def lacks_lse(function: Callable) -> bool:
    """Whether a build of version 3 is one of those that return the output alone; only its function tells."""
    return "return_attn_probs" not in source.parameters(function) and _returns_bare_tensor(function)


def _returns_bare_tensor(function: Callable) -> bool:
    """Builds without ``return_attn_probs`` either always return a pair or never do; a tiny call shows which."""
    if function not in _bare:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tiny = torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device=device)
        _bare[function] = not isinstance(function(tiny, tiny, tiny), tuple)
    return _bare[function]


_bare: dict[Callable, bool] = {}


def _multiple_of_8(head_dim: int) -> int:
    return math.ceil(head_dim / 8) * 8

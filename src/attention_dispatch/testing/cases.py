"""Calls that together touch every clause of the contract, derived from it and not from any backend."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .case_masks import MASKS, MaskInput, MaskShape

LAYOUTS = ("contiguous", "transposed", "packed", "padded", "expanded", "stepped")


@dataclass(frozen=True)
class Case:
    """One call, as data. Shapes are BSHD.

    Attributes:
        name: unique; also the seed of the inputs.
        mask: a key of ``case_masks.MASKS``, or ``"none"``.
        grad: whether gradients of q, k and v are asked for; ``mask_grad``: of the additive mask too.
        lse, deterministic, dropout_p, is_causal, scale, window_size, softcap: as in the call.
        layout: how q, k and v lie in memory, one of :data:`LAYOUTS`.
        autocast: dtype of the autocast region around the call, or None.
        magnitude: factor of q and k; large ones saturate the softmax.
        core: belongs to the few that a backend with long compile times runs.
    """

    name: str
    batch: int = 3
    q_len: int = 24
    k_len: int = 24
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 64
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    mask: str = "none"
    grad: bool = False
    mask_grad: bool = False
    lse: bool = False
    deterministic: bool = False
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    layout: str = "contiguous"
    autocast: torch.dtype | None = None
    magnitude: float = 1.0
    core: bool = False

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype the kernel sees."""
        return self.autocast or self.dtype

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the call besides the tensors."""
        extra: dict[str, Any] = {}
        if self.lse:
            extra["return_lse"] = True
        if self.deterministic:
            extra["deterministic"] = True
        if self.softcap:
            extra["softcap"] = self.softcap
        if self.window_size != (-1, -1):
            extra["window_size"] = self.window_size
        return {
            "dropout_p": self.dropout_p,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "enable_gqa": self.heads != self.kv_heads,
            "attention_kwargs": extra or None,
        }


class Inputs(NamedTuple):
    """The tensors of a case: query (B, Q, H, D), key (B, K, G, D), value (B, K, G, V), and the mask."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: MaskInput


def build(case: Case, device: str | torch.device = "cpu") -> Inputs:
    """The inputs of a case, the same every time; made on the CPU, so that devices see the same numbers."""
    device = torch.device(device)
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    if case.dropout_p:
        query, key, value = _dropout_tensors(case, generator, device)
    else:
        query, key, value = _tensors(case, generator, device)
    mask = MaskInput(None)
    if case.mask != "none":
        shape = MaskShape(case.batch, case.heads, case.q_len, case.k_len, case.dtype, device)
        mask = MASKS[case.mask](shape, generator)
        if case.mask_grad:
            assert mask.bias is not None
            # The argument is a view of the leaf, so that both see one gradient.
            leaf = mask.bias.detach().requires_grad_()
            mask = MaskInput(leaf[0, 0] if mask.argument.ndim == 2 else leaf, None, leaf)
    for tensor in (query, key, value):
        tensor.requires_grad_(case.grad)
    return Inputs(query, key, value, mask)


def _tensors(case: Case, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    head_dim_v = case.head_dim_v or case.head_dim
    if case.layout == "packed":
        packed = torch.randn(case.batch, case.q_len, 3, case.heads, case.head_dim, generator=generator)
        packed[:, :, :2] *= case.magnitude
        query, key, value = packed.to(device, case.dtype).unbind(2)
        return query, key, value
    query = _tensor(case, case.q_len, case.heads, case.head_dim, generator, device, case.magnitude)
    key = _tensor(case, case.k_len, case.kv_heads, case.head_dim, generator, device, case.magnitude)
    value = _tensor(case, case.k_len, case.kv_heads, head_dim_v, generator, device)
    if case.layout == "expanded":
        key, value = (tensor[:1].expand(case.batch, -1, -1, -1) for tensor in (key, value))
    return query, key, value


def _tensor(
    case: Case,
    length: int,
    heads: int,
    head_dim: int,
    generator: torch.Generator,
    device: torch.device,
    factor: float = 1.0,
) -> Tensor:
    values = (torch.randn(case.batch, length, heads, head_dim, generator=generator) * factor).to(device, case.dtype)
    if case.layout == "transposed":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if case.layout == "padded":
        storage = torch.zeros(case.batch, length + 1, heads, head_dim + 8, dtype=case.dtype, device=device)
        storage[:, 1:, :, :head_dim] = values
        return storage[:, 1:, :, :head_dim]
    if case.layout == "stepped":
        storage = torch.zeros(case.batch, length, heads, head_dim, 2, dtype=case.dtype, device=device)
        storage[..., 0] = values
        return storage[..., 0]
    return values


def _dropout_tensors(case: Case, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """v is the identity, so that the output shows the weights themselves."""
    assert case.k_len == (case.head_dim_v or case.head_dim)
    query = torch.randn(case.batch, case.q_len, case.heads, case.head_dim, generator=generator)
    key = torch.randn(case.batch, case.k_len, case.kv_heads, case.head_dim, generator=generator)
    value = torch.eye(case.k_len)[None, :, None, :].repeat(case.batch, 1, case.kv_heads, 1)
    # Nearly equal weights: each one is far from zero, so that a dropped one is told from a small one.
    query, key, value = ((tensor * factor).to(device, case.dtype) for tensor, factor in ((query, 0.1), (key, 0.1), (value, 1.0)))  # fmt: skip
    return query, key, value


class _Sizes(NamedTuple):
    """What differs between devices: lengths that are no multiple of a block, and the usual dtype."""

    length: int
    short: int
    long: int
    block: int
    dtype: torch.dtype


_CPU = _Sizes(24, 13, 37, 32, torch.float32)
_GPU = _Sizes(200, 77, 333, 128, torch.bfloat16)
_HALF = (torch.bfloat16, torch.float16)
_WINDOWS = ((5, 3), (0, 0), (4, -1), (-1, 6), (0, 4))
_PADDING = ("padding_right", "padding_left", "padding_interior", "padding_scattered", "padding_empty")


def conformance_cases(device: str | torch.device = "cpu") -> tuple[Case, ...]:
    """The cases for a device: short and mostly float32 on the CPU; longer and mostly bfloat16 elsewhere."""
    sizes = _CPU if torch.device(device).type == "cpu" else _GPU
    base = Case("", q_len=sizes.length, k_len=sizes.length, dtype=sizes.dtype)
    cases = [
        *_shape_cases(base, sizes),
        *_structure_cases(base, sizes),
        *_mask_cases(base, sizes),
        *_feature_cases(base, sizes),
        *_memory_cases(base, sizes),
    ]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), sorted(name for name in names if names.count(name) > 1)
    return tuple(cases)


def _shape_cases(base: Case, sizes: _Sizes) -> list[Case]:
    lengths = {
        "one_query": (1, sizes.length),
        "one_key": (sizes.length, 1),
        "one_by_one": (1, 1),
        "whole_blocks": (sizes.block, 2 * sizes.block),
        "block_plus_one": (sizes.block + 1, 2 * sizes.block + 1),
        "fewer_queries": (sizes.short, sizes.long),
        "more_queries": (sizes.long, sizes.short),
    }
    dims = (20, 40, 72, 76, 80, 96, 128, 192, 256)
    dtypes = (torch.float64, torch.float32, *_HALF)
    short = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    return [
        *(replace(base, name=f"plain_{short[dtype]}", dtype=dtype, core=dtype == torch.bfloat16) for dtype in dtypes),
        *(replace(base, name=f"grad_{short[dtype]}", dtype=dtype, grad=True, lse=True) for dtype in dtypes),
        *(replace(base, name=name, q_len=q, k_len=k, lse=True) for name, (q, k) in lengths.items()),
        *(
            replace(base, name=f"{name}_grad", q_len=q, k_len=k, grad=True, core=name == "fewer_queries")
            for name, (q, k) in lengths.items()
        ),
        *(replace(base, name=f"dim_{dim}", head_dim=dim) for dim in dims),
        *(replace(base, name=f"dim_{dim}_grad", head_dim=dim, grad=True) for dim in (20, 40, 96, 128, 256)),
        replace(base, name="dim_40_lse_causal", head_dim=40, lse=True, is_causal=True),
        replace(base, name="dim_v_smaller", head_dim_v=32, lse=True),
        replace(base, name="dim_v_larger", head_dim_v=96, grad=True),
        replace(base, name="dim_192_128", head_dim=192, head_dim_v=128),
        replace(base, name="gqa", kv_heads=2, lse=True, core=True),
        replace(base, name="mqa", kv_heads=1, lse=True, dtype=torch.float16),
        replace(base, name="gqa_grad", kv_heads=2, grad=True),
        replace(base, name="mqa_grad_causal", kv_heads=1, grad=True, is_causal=True),
        replace(base, name="one_head_one_sample", batch=1, heads=1, kv_heads=1, lse=True),
    ]


def _structure_cases(base: Case, sizes: _Sizes) -> list[Case]:
    """Causal masking and windows, alone and together, for every relation of the lengths."""
    relations = {
        "": (sizes.length, sizes.length),
        "_fewer_queries": (sizes.short, sizes.long),
        "_more_queries": (sizes.long, sizes.short),
        "_one_query": (1, sizes.length),
    }
    cases = []
    for suffix, (q_len, k_len) in relations.items():
        at = replace(base, q_len=q_len, k_len=k_len)
        core = suffix == "_more_queries"
        cases += [
            replace(at, name=f"causal{suffix}", is_causal=True),
            replace(at, name=f"causal_lse{suffix}", is_causal=True, lse=True, core=core),
            replace(at, name=f"causal_grad{suffix}", is_causal=True, grad=True),
            replace(at, name=f"causal_gqa_grad_lse{suffix}", is_causal=True, kv_heads=2, grad=True, lse=True),
            replace(at, name=f"causal_padding{suffix}", is_causal=True, mask="padding_left", lse=True),
            replace(at, name=f"causal_bias{suffix}", is_causal=True, mask="bias_heads"),
        ]
        for left, right in _WINDOWS:
            name = f"window_{left}_{right}".replace("-1", "open")
            cases.append(replace(at, name=f"{name}{suffix}", window_size=(left, right)))
        cases += [
            replace(at, name=f"window_lse{suffix}", window_size=(3, 2), lse=True, core=core),
            replace(at, name=f"window_grad{suffix}", window_size=(3, 2), grad=True),
            replace(at, name=f"window_causal{suffix}", window_size=(4, 2), is_causal=True, lse=True),
            replace(at, name=f"window_padding{suffix}", window_size=(6, 2), mask="padding_scattered"),
        ]
    return cases


def _mask_cases(base: Case, sizes: _Sizes) -> list[Case]:
    cases = []
    core = ("bool_per_head", "bias_heads", "block_per_head")
    for mask in MASKS:
        crossed = replace(base, q_len=sizes.short, k_len=sizes.long)
        cases += [
            replace(base, name=mask, mask=mask, core=mask in core),
            replace(base, name=f"{mask}_lse", mask=mask, lse=True, kv_heads=2),
            replace(base, name=f"{mask}_cross", mask=mask, q_len=crossed.q_len, k_len=crossed.k_len),
            replace(base, name=f"{mask}_causal", mask=mask, is_causal=True),
            replace(base, name=f"{mask}_grad", mask=mask, grad=True, core=mask == "padding_interior"),
            replace(base, name=f"{mask}_fp16", mask=mask, dtype=torch.float16, head_dim=40),
        ]
        if mask.startswith("bias") and mask != "bias_BQK":
            cases.append(replace(base, name=f"{mask}_mask_grad", mask=mask, grad=True, mask_grad=True))
    cases.append(replace(base, name="bias_mask_grad_only", mask="bias_heads", mask_grad=True))
    cases.append(
        replace(base, name="bias_mask_grad_causal", mask="bias_full", grad=True, mask_grad=True, is_causal=True)
    )
    return cases


def _feature_cases(base: Case, sizes: _Sizes) -> list[Case]:
    dropout = replace(base, q_len=sizes.block, k_len=64, dropout_p=0.5)
    return [
        *(replace(base, name=f"scale_{name}", scale=scale, is_causal=True, lse=True)
          for name, scale in {"larger": 0.5, "one": 1.0, "negative": -0.2, "zero": 0.0}.items()),
        replace(base, name="scale_grad", scale=0.3, grad=True),
        replace(base, name="softcap", softcap=2.0, core=True),
        replace(base, name="softcap_lse_causal", softcap=2.0, lse=True, is_causal=True),
        replace(base, name="softcap_grad", softcap=2.0, grad=True),
        replace(base, name="softcap_bias", softcap=2.0, mask="bias_heads", lse=True),
        replace(base, name="softcap_window_padding", softcap=2.0, mask="padding_left", window_size=(7, 7)),
        replace(base, name="large_scores", magnitude=6.0, lse=True),
        replace(base, name="large_scores_grad", magnitude=3.0, grad=True),
        replace(base, name="deterministic", deterministic=True, lse=True),
        replace(base, name="deterministic_grad", deterministic=True, grad=True),
        replace(base, name="deterministic_causal_padding", deterministic=True, is_causal=True, mask="padding_right"),
        replace(dropout, name="dropout"),
        replace(dropout, name="dropout_causal", is_causal=True, dropout_p=0.25),
        replace(dropout, name="dropout_grad", grad=True),
        replace(dropout, name="dropout_padding", mask="padding_left", dropout_p=0.25),
    ]  # fmt: skip


def _memory_cases(base: Case, sizes: _Sizes) -> list[Case]:
    cases = []
    for layout in LAYOUTS[1:]:
        cases += [
            replace(base, name=f"layout_{layout}", layout=layout, lse=True),
            replace(base, name=f"layout_{layout}_causal", layout=layout, is_causal=True),
            replace(base, name=f"layout_{layout}_grad", layout=layout, grad=True),
            replace(base, name=f"layout_{layout}_padding", layout=layout, mask="padding_interior"),
        ]
    for autocast in _HALF:
        word = str(autocast).removeprefix("torch.")
        region = replace(base, dtype=torch.float32, autocast=autocast)
        cases += [
            replace(region, name=f"autocast_{word}"),
            replace(region, name=f"autocast_{word}_grad", grad=True, is_causal=True),
            replace(region, name=f"autocast_{word}_bias", mask="bias_heads"),
            replace(region, name=f"autocast_{word}_padding_lse", mask="padding_scattered", lse=True),
        ]
    return cases

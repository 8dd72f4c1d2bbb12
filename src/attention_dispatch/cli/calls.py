"""Flags that describe attention calls, shared by explain, bench and tune."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..tuning import shapes
from ..tuning.shapes import DTYPES, MASKS, MODELS, Shape

# A Q x K mask of more elements than this is only described, not built.
_LARGEST_MASK = 1 << 28


def add_flags(parser: argparse.ArgumentParser) -> None:
    """--model, --shapes, or sizes."""
    group = parser.add_argument_group("the call")
    group.add_argument("--model", action="append", metavar="NAME", help=f"calls of a model: {', '.join(MODELS)}")
    group.add_argument("--shapes", type=Path, metavar="FILE", help="a JSON list of calls")
    group.add_argument("--batch", type=int, default=1)
    group.add_argument("--seq", type=int, help="query length; key length too, unless --kv-seq is given")
    group.add_argument("--kv-seq", type=int)
    group.add_argument("--heads", type=int, default=24)
    group.add_argument("--kv-heads", type=int)
    group.add_argument("--head-dim", type=int, default=128)
    group.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16; for --model its own")
    group.add_argument("--causal", action="store_true")
    group.add_argument("--mask", choices=MASKS, default="none")
    group.add_argument("--grad", action="store_true", help="forward and backward")
    parser.add_argument("--device", help="cpu, cuda, ...; default: the accelerator of this machine, else cpu")


def wanted(options: argparse.Namespace) -> list[Shape]:
    """The shapes that the flags describe; empty if they describe none.

    Raises:
        ValueError: an unknown model or a bad file.
    """
    found: list[Shape] = []
    for name in options.model or ():
        for shape in shapes.of_model(name).shapes:
            found.append(shape._replace(name=f"{name} {shape.name}".strip()))
    if options.shapes is not None:
        found += shapes.read(options.shapes)
    if options.dtype:
        found = [shape._replace(dtype=options.dtype) for shape in found]
    if options.seq is not None:
        found.append(
            Shape(
                "",
                options.batch,
                options.seq,
                options.kv_seq or options.seq,
                options.heads,
                options.kv_heads or options.heads,
                options.head_dim,
                options.causal,
                options.mask,
                options.grad,
                options.dtype or "bfloat16",
            )
        )
    return found


def device_of(options: argparse.Namespace) -> torch.device:
    """The device asked for, or the accelerator, or the CPU."""
    if options.device:
        return torch.device(options.device)
    if torch.accelerator.is_available():
        return torch.device(str(torch.accelerator.current_accelerator()))
    return torch.device("cpu")


def arguments(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Arguments of ``dispatch_attention_fn`` for a shape, with memory that holds nothing in particular.

    On ``meta`` where the device is not on this machine or the mask would be large.
    """
    here = device.type == "cpu" or (torch.accelerator.is_available() and _accelerator() == device.type)
    dense = shape.mask in ("bool", "bias")
    place = device if here and not (dense and shape.q_len * shape.k_len > _LARGEST_MASK) else torch.device("meta")
    dtype = DTYPES[shape.dtype]
    sizes = [(shape.q_len, shape.heads), (shape.k_len, shape.kv_heads), (shape.k_len, shape.kv_heads)]
    query, key, value = (
        torch.empty(shape.batch, length, heads, shape.head_dim, dtype=dtype, device=place, requires_grad=shape.grad)
        for length, heads in sizes
    )
    mask = None
    if shape.mask == "key_padding":
        mask = torch.zeros(shape.batch, 1, 1, shape.k_len, dtype=torch.bool, device=place)
    elif shape.mask == "key_bias":
        mask = torch.ones(shape.batch, shape.heads, 1, shape.k_len, dtype=dtype, device=place)
    elif dense:
        kind = torch.bool if shape.mask == "bool" else dtype
        mask = torch.zeros(1, 1, shape.q_len, shape.k_len, dtype=kind, device=place)
        if shape.mask == "bias":
            # All zeros would mask nothing, and be dropped.
            mask += 1.0
    return {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": mask,
        "is_causal": shape.causal,
        "enable_gqa": shape.heads != shape.kv_heads,
    }


def _accelerator() -> str:
    found = torch.accelerator.current_accelerator()
    return "" if found is None else found.type

"""Combinations of version, GPU and call that are known to compute wrong results or crash, with their upstream reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from . import settings
from .backends.source import installed_version, release
from .call import CallSpec
from .errors import Reason

Action = Literal["refuse", "verify", "note"]


class KnownBad(NamedTuple):
    """One entry.

    Attributes:
        backends: names it concerns.
        action: ``"refuse"``; ``"verify"``: run only after the first-use self-test passed, because good and bad builds
            carry one version; ``"note"``: shown by ``explain`` and ``doctor`` only.
        versions: whether the installed versions are affected.
        applies: whether a call is.
        what, fix: see :class:`~attention_dispatch.errors.Reason`.
        url: upstream report.
    """

    backends: tuple[str, ...]
    action: Action
    versions: Callable[[], bool]
    applies: Callable[[CallSpec], bool]
    what: str
    fix: str
    url: str


def _torch_between(first: str, last: str) -> Callable[[], bool]:
    """Whether torch is in a range of releases, both ends included."""
    return lambda: release(first) <= release(torch.__version__)[: len(release(last))] <= release(last)


def _installed(distribution: str, first: str, last: str) -> Callable[[], bool]:
    def affected() -> bool:
        found = installed_version(distribution)
        return found is not None and release(first) <= release(found) <= release(last)

    return affected


_B200 = ("sm_100", "sm_103")
_FLASH_4 = ("flash_4", "flash_4_hub")
_FLASH_4_HANGS = "https://github.com/Dao-AILab/flash-attention/issues/2797"
_SAGE_HOPPER = ("sage", "_sage_qk_int8_pv_fp8_cuda_sm90")

KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(
        ("_native_cudnn",),
        "refuse",
        _torch_between("2.11", "2.13"),
        lambda spec: spec.architecture in _B200 and spec.kv_heads < 8,
        "cuDNN attention with fewer than 8 key heads returns wrong results on B200 in torch 2.11 to 2.13",
        "use backend='_native_flash' or 'flex' on this GPU.",
        "https://github.com/pytorch/pytorch/issues/193893",
    ),
    KnownBad(
        ("native",),
        "note",
        _torch_between("2.11", "2.13"),
        lambda spec: spec.architecture in _B200 and spec.kv_heads < 8,
        "torch prefers cuDNN here, whose results with fewer than 8 key heads are wrong on B200 in torch 2.11 to 2.13",
        "use backend='_native_flash' or 'flex' on this GPU.",
        "https://github.com/pytorch/pytorch/issues/193893",
    ),
    KnownBad(
        ("_native_cudnn",),
        "refuse",
        _torch_between("2.9", "2.13"),
        # A window reaches cuDNN as a mask.
        lambda spec: spec.grad and (spec.mask != "none" or spec.window),
        "the cuDNN backward pass with a mask gives NaN for lengths of 64 modulo 128",
        "use backend='_native_efficient' or 'flex' for training with a mask.",
        "https://github.com/pytorch/pytorch/issues/196678",
    ),
    KnownBad(
        ("flex",),
        "refuse",
        _torch_between("2.10", "2.12"),
        lambda spec: spec.lse and "kernel_options" in spec.options,
        "FlexAttention's FLASH kernel returns an LSE that is wrong by a factor of ln 2 before torch 2.13",
        "drop kernel_options, or update torch to 2.13.",
        "https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html",
    ),
    KnownBad(
        _SAGE_HOPPER,
        "verify",
        _installed("sageattention", "2.2.0", "2.2.0"),
        lambda spec: spec.architecture == "sm_90",
        "the 2.2.0 tag of SageAttention leaves its output unwritten on Hopper, and the repaired source has the same version",
        "leave the self-test on (ATTENTION_DISPATCH_SELF_TEST=1), and install SageAttention from its main branch.",
        "https://github.com/thu-ml/SageAttention/issues/320",
    ),
    KnownBad(
        ("sage", "sage_varlen"),
        "note",
        _installed("sageattention", "1.0.6", "1.0.6"),
        lambda spec: not spec.is_causal,
        "SageAttention 1.0.6 counts the missing keys of its last block of 64; a second call repairs what the first returns "
        "where a sequence of keys is no multiple of 64 long, for twice the time",
        "pad keys to a multiple of 64 under a mask, or install SageAttention 2: "
        "pip install git+https://github.com/thu-ml/SageAttention --no-build-isolation.",
        "https://pypi.org/project/sageattention/1.0.6/",
    ),
    KnownBad(
        _FLASH_4,
        "refuse",
        _installed("nvidia-cutlass-dsl", "4.6.0", "4.6.3"),
        lambda spec: spec.grad and spec.architecture == "sm_90",
        "the backward pass of FlashAttention 4 never returns on Hopper where nvidia-cutlass-dsl 4.6 compiled it",
        "update its compiler: pip install -U 'nvidia-cutlass-dsl>=4.8.1' 'quack-kernels>=0.6.5'.",
        _FLASH_4_HANGS,
    ),
    KnownBad(
        _FLASH_4,
        "refuse",
        _installed("nvidia-cutlass-dsl", "4.6.0", "4.6.1"),
        lambda spec: spec.grad and spec.architecture in _B200,
        "the backward pass of FlashAttention 4 never returns on Blackwell where nvidia-cutlass-dsl 4.6.0 or 4.6.1 compiled it",
        "update its compiler: pip install -U 'nvidia-cutlass-dsl>=4.8.1' 'quack-kernels>=0.6.5'.",
        _FLASH_4_HANGS,
    ),
    KnownBad(
        ("flash_4",),
        "verify",
        _installed("flash-attn-4", "4.0.0", "4.0.0"),
        # Of those measured with 4.0.0b36 on an H100, 24 was right and 40 wrong: an error of 1.4 in the gradient of q.
        lambda spec: spec.grad and spec.architecture == "sm_90" and 0 < spec.head_dim % 16 <= 8,
        "FlashAttention 4 returns a wrong gradient of q on Hopper at head dim 40, and may at others that are 8 modulo 16",
        "leave the self-test on (ATTENTION_DISPATCH_SELF_TEST=1), or pad head_dim to a multiple of 16.",
        "https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute",
    ),
    KnownBad(
        ("xformers",),
        "refuse",
        _installed("xformers", "0", "0.0.35"),
        lambda spec: spec.architecture in (*_B200, "sm_120", "sm_121") and spec.dtype == torch.float32,
        "no xformers operator takes float32 on Blackwell: its cutlass kernels end at sm_90",
        "cast q, k and v: .to(torch.bfloat16), or use backend='_native_efficient'.",
        "https://github.com/facebookresearch/xformers/blob/v0.0.35/xformers/ops/fmha/cutlass.py",
    ),
)


def reasons(backend: str, spec: CallSpec) -> tuple[Reason, ...]:
    """Why a call must not run on ``backend`` with the installed versions; looks at metadata only."""
    unverified = not settings.self_test_enabled()
    return tuple(
        Reason("known_bad", f"{entry.what} ({entry.url})", entry.fix)
        for entry in _matching(backend, spec)
        if entry.action == "refuse" or (entry.action == "verify" and unverified)
    )


def notes(backend: str, spec: CallSpec) -> tuple[str, ...]:
    """What is known against a call on ``backend`` without refusing it, one sentence each."""
    return tuple(
        f"{entry.what} ({entry.url}); {entry.fix}" for entry in _matching(backend, spec) if entry.action != "refuse"
    )


def _matching(backend: str, spec: CallSpec) -> list[KnownBad]:
    return [entry for entry in KNOWN_BAD if backend in entry.backends and entry.applies(spec) and entry.versions()]

"""The first-use check of kernels that are not torch's: tiny calls against the oracle, with poisoned memory.

A version does not vouch for a build (a released SageAttention writes nothing on Hopper, and the repaired one carries
the same version), nor does a test on one machine for what Triton compiles on another; so each kernel is asked once per
(device, dtype, head dims) and process, and the verdict is kept. Backward passes are kernels of their own (FlashAttention 4
had a wrong gradient of q at head dim 40, beside a right output): they are proven when gradients are first needed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import settings
from .backends.reference import attention
from .call import AttentionCall, CallSpec, architecture, spec_of
from .capabilities import reasons_against, row_for
from .errors import Reason
from .masks import Mask
from .registry import Backend

# Not a multiple of any block size; long enough for more than one block of keys.
_LENGTH = 200
_HEADS = 2
_POISONED_BLOCKS = 4
# An exact kernel's own error is about a quarter of the dtype's step; TF32 products set the floor for float32.
_EXACT_STEPS = 2.0
_FLOAT32_ERROR = 2e-3
# Gradients pass through one more product than outputs.
_GRADIENT_FACTOR = 2.0

# Masks that depend on the query are often another kernel again, compiled when first asked for, and proven then.
_DENSE = ("bool", "bias")

_Key = tuple[str, str, str, torch.dtype, int, int, str, bool]
_verdicts: dict[_Key, tuple[Reason, ...]] = {}
_lock = threading.RLock()


def reasons(backend: Backend, spec: CallSpec) -> tuple[Reason, ...]:
    """Why an available kernel that is not torch's must not be trusted with calls like this one; empty when it passed.

    Runs the kernel on first use. Answers nothing, and keeps nothing, where it cannot run now: on a device that is not
    here, or while a CUDA graph is captured.
    """
    if not backend.external or not settings.self_test_enabled() or not _can_run_now(spec):
        return ()
    kind = spec.mask if spec.mask in _DENSE else ""
    key = (backend.name, spec.device, spec.architecture, spec.dtype, spec.head_dim, spec.head_dim_v, kind, spec.grad)
    with _lock:
        if key not in _verdicts:
            _verdicts[key] = _test(backend, spec)
        return _verdicts[key]


def forget() -> None:
    """Forget all verdicts, for example after a package was replaced."""
    _verdicts.clear()


def _can_run_now(spec: CallSpec) -> bool:
    if spec.device == "cuda":
        here = torch.cuda.is_available() and architecture("cuda", torch.cuda.current_device()) == spec.architecture
        return here and not torch.cuda.is_current_stream_capturing()
    return spec.device == "cpu"


def _test(backend: Backend, spec: CallSpec) -> tuple[Reason, ...]:
    with _undisturbed(spec.grad):
        for call in _allowed_calls(backend, spec):
            problem = _problem(backend, spec, call)
            if problem is not None:
                with_mask = "" if call.mask is None else f" with a {call.mask.kind} mask"
                what = f"its first-use self-test failed{with_mask}: {problem}"
                fix = (
                    f"reinstall what {backend.name!r} is built with (its package, or Triton) for this torch and GPU, or use "
                    "another backend."
                )
                return (Reason("self_test", what, fix),)
    return ()


@contextlib.contextmanager
def _undisturbed(grad: bool) -> Iterator[None]:
    """Nothing of the caller's sees the test: dispatch modes trace, count or cache operators, as selective checkpointing
    does, and so do hooks of saved tensors, as checkpointing does."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.set_grad_enabled(grad))
        # torch.func forbids such hooks where it runs, so there are none to keep out.
        with contextlib.suppress(RuntimeError):
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor))
        yield


def _problem(backend: Backend, spec: CallSpec, call: AttentionCall) -> str | None:
    bound = _bound(backend, spec)
    try:
        expected = attention(call)
        _poison(call)
        actual = backend.forward(call)
        problem = _difference("output", bound, actual.out, expected.out)
        if problem is None and expected.lse is not None:
            problem = _lse_difference(actual.lse, expected.lse)
        if problem is None and spec.grad:
            problem = _gradient_difference(bound, call, actual.out, expected.out)
    except Exception as error:  # whatever a kernel raises on a call it declared to serve is the finding
        return f"it raised {type(error).__name__}: {error}"
    return problem


def _allowed_calls(backend: Backend, spec: CallSpec) -> list[AttentionCall]:
    """Tiny calls, where the capabilities allow them: with a mask like the call's if that depends on the query, else with
    key padding and without, which may be two kernels."""
    row = row_for(backend.capabilities, spec.device)
    if row is None:
        return []
    kinds = (spec.mask,) if spec.mask in _DENSE else ("key_padding", "none")
    calls = []
    for kind in kinds:
        for lse in (True, False):
            call = _call(spec, kind, lse)
            facts = spec_of(call)
            if not reasons_against(backend.capabilities, facts) and not backend.extra_reasons(facts):
                calls.append(call)
                break
    return calls


def _call(spec: CallSpec, kind: str, lse: bool) -> AttentionCall:
    generator = torch.Generator("cpu").manual_seed(0)

    def tensor(head_dim: int, offset: float = 0.0) -> Tensor:
        # The device is said everywhere: the caller may have set another default.
        values = torch.randn(3, _LENGTH, _HEADS, head_dim, generator=generator, device="cpu")
        # Keys of real models carry an offset per channel, which is what breaks careless quantisation.
        values += offset * torch.randn(1, 1, _HEADS, head_dim, generator=generator, device="cpu")
        return values.to(spec.device, spec.dtype).requires_grad_(spec.grad)

    query, key, value = tensor(spec.head_dim), tensor(spec.head_dim, 1.0), tensor(spec.head_dim_v)
    return AttentionCall(query, key, value, _mask(kind, spec.device), scale=spec.head_dim**-0.5, return_lse=lse)


def _mask(kind: str, device: str) -> Mask | None:
    """Of the kind, with rows that see no key."""
    if kind == "none":
        return None
    if kind == "key_padding":
        keep = torch.ones(3, _LENGTH, dtype=torch.bool, device="cpu")
        keep[0, 3:60] = keep[1, 150:] = keep[2, :] = False
        return Mask("key_padding", keep.to(device))
    generator = torch.Generator("cpu").manual_seed(1)
    bias = torch.randn(3, _HEADS, _LENGTH, _LENGTH, generator=generator, device="cpu")
    bias[0, 1, 5] = float("-inf")
    return Mask(kind, (bias if kind == "bias" else bias > 0).to(device))


def _poison(call: AttentionCall) -> None:
    """Leave NaN in the memory that the kernel's output is likely to be given."""
    shape = (*call.query.shape[:3], call.value.shape[3])
    blocks = [
        torch.full(shape, float("nan"), dtype=call.query.dtype, device=call.query.device)
        for _ in range(_POISONED_BLOCKS)
    ]
    del blocks


def _bound(backend: Backend, spec: CallSpec) -> float:
    row = row_for(backend.capabilities, spec.device)
    declared = 0.0 if row is None else row.tolerance.relative_l2
    return declared or (_FLOAT32_ERROR if spec.dtype == torch.float32 else _EXACT_STEPS * torch.finfo(spec.dtype).eps)


def _difference(name: str, bound: float, actual: Tensor, expected: Tensor) -> str | None:
    if actual.shape != expected.shape:
        return f"the {name} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not bool(actual.isfinite().all()):
        return f"the {name} is not finite everywhere"
    wide, exact = actual.double(), expected.double()
    error = float((wide - exact).norm() / exact.norm())
    return None if error <= bound else f"relative error {error:.3g} of the {name}, allowed {bound:.3g}"


def _gradient_difference(bound: float, call: AttentionCall, actual: Tensor, expected: Tensor) -> str | None:
    inputs = (call.query, call.key, call.value)
    weight = torch.randn(actual.shape, generator=torch.Generator("cpu").manual_seed(2), device="cpu").to(actual)
    _poison(call)
    found = torch.autograd.grad(actual, inputs, weight)
    wanted = torch.autograd.grad(expected, inputs, weight.to(expected.dtype))
    for letter, one, other in zip("qkv", found, wanted, strict=True):
        problem = _difference(f"gradient of {letter}", _GRADIENT_FACTOR * bound, one, other)
        if problem is not None:
            return problem
    return None


def _lse_difference(actual: Tensor | None, expected: Tensor) -> str | None:
    if actual is None or actual.shape != expected.shape:
        return f"the LSE is {None if actual is None else tuple(actual.shape)}, expected {tuple(expected.shape)}"
    empty = expected == float("-inf")
    if not torch.equal(actual == float("-inf"), empty):
        return "the LSE of a row without keys is not -inf"
    error = float((actual - expected)[~empty].abs().max())
    # A mistaken base is off by 0.3 of the value, a missing term by whole units; rounding is far below this.
    return None if error <= 0.1 else f"the LSE is off by {error:.3g}"

"""The first-use check finds kernels that compute something else, once, and passes those that are right."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from family_rows import ROWS
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from attention_dispatch import BackendRejectedError, dispatch_attention_fn, known_bad, registry, self_test
from attention_dispatch.backends import flash_limits, source
from attention_dispatch.call import AttentionOutput, CallSpec, canonicalise, spec_of
from attention_dispatch.capabilities import reasons_against
from attention_dispatch.registry import register_backend


def spec(head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> CallSpec:
    return spec_of(canonicalise(*[torch.zeros(1, 4, 2, head_dim, dtype=dtype)] * 3))


def altered(backend, change):
    """The backend with ``change(out, lse, call)`` applied to what it returns."""
    return replace(backend, forward=lambda call: change(*backend.forward(call), call))


@pytest.mark.parametrize(("name", "record"), ROWS)
def test_right_kernels_pass(name, record, on_cpu):
    backend, _ = on_cpu(name, record)
    assert self_test.reasons(backend, spec()) == ()


def with_gradients(head_dim: int = 64) -> CallSpec:
    tensors = [torch.zeros(1, 4, 2, head_dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    return spec_of(canonicalise(*tensors))


@pytest.mark.parametrize(("name", "record"), ROWS)
def test_right_backward_passes_pass(name, record, on_cpu):
    backend, calls = on_cpu(name, record)
    if not reasons_against(backend.capabilities, with_gradients()):
        assert self_test.reasons(backend, with_gradients()) == ()
        assert any(tensor.requires_grad for _, asked in calls.calls for tensor in asked.values() if torch.is_tensor(tensor))


def _constant(out, lse, call):
    return AttentionOutput(torch.full_like(out, 0.5), lse)


def _unwritten(out, lse, call):
    return AttentionOutput(torch.full_like(out, float("nan")), lse)


def _base_two(out, lse, call):
    return AttentionOutput(out, lse / 0.6931)


def _infinite_for_empty_rows(out, lse, call):
    return AttentionOutput(out, lse.masked_fill(lse == float("-inf"), float("inf")))


def _without_the_mask(out, lse, call):
    scores = torch.einsum("bqhd,bkhd->bhqk", call.query.float(), call.key.float()) * call.scale
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), call.value.float()).to(out.dtype)
    return AttentionOutput(out, lse)


def _raises(out, lse, call):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize(
    "change", [_constant, _unwritten, _base_two, _infinite_for_empty_rows, _without_the_mask, _raises]
)
def test_wrong_kernels_are_found(change, on_cpu):
    backend, _ = on_cpu("flash_varlen", "flash_attn-2.8.3")
    [reason] = self_test.reasons(altered(backend, change), spec())
    assert reason.code == "self_test" and reason.fix


def test_verdict_is_kept_per_dtype_and_head_dim(on_cpu):
    backend, _ = on_cpu("flash", "flash_attn-2.8.3")
    runs = []
    counting = altered(backend, lambda out, lse, call: (runs.append(call), AttentionOutput(out, lse))[1])
    for _ in range(3):
        self_test.reasons(counting, spec())
    assert len(runs) == 1
    self_test.reasons(counting, spec(head_dim=128))
    self_test.reasons(counting, spec(dtype=torch.float16))
    assert len(runs) == 3


def _upside_down(out, lse, call):
    wrong = call.mask is not None and call.mask.kind in ("bool", "bias")
    return AttentionOutput(out.flip(1) if wrong else out, lse)


@pytest.mark.parametrize("kind", ["bool", "bias"])
def test_masks_that_depend_on_the_query_are_proven_when_first_asked_for(kind, on_cpu):
    backend, _ = on_cpu("xformers", "xformers-0.0.35")
    assert self_test.reasons(altered(backend, _upside_down), spec()) == ()
    [reason] = self_test.reasons(altered(backend, _upside_down), spec()._replace(mask=kind))
    assert f"with a {kind} mask" in reason.what
    self_test.forget()
    assert self_test.reasons(backend, spec()._replace(mask=kind)) == ()


class _WrongGradient(torch.autograd.Function):
    """Right outputs, and ``change`` applied to the gradient that comes back."""

    @staticmethod
    def forward(ctx, tensor, change):
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda grad: grad.flip(1), "relative error 1.* of the gradient of"),
        (lambda grad: grad * 1.1, r"relative error 0\.1 of the gradient of"),
        (lambda grad: grad * float("nan"), "is not finite"),
        (lambda grad: 1 / 0, "it raised ZeroDivisionError"),
    ],
)
def test_wrong_gradients_are_found_when_gradients_are_needed(which, change, told, on_cpu):
    backend, _ = on_cpu("flash", "flash_attn-2.8.3")

    def forward(call):
        name = ("query", "key", "value")[which]
        return backend.forward(call.replaced(**{name: _WrongGradient.apply(getattr(call, name), change)}))

    wrong = replace(backend, forward=forward)
    assert self_test.reasons(wrong, spec()) == ()
    [reason] = self_test.reasons(wrong, with_gradients())
    assert re.search(told, reason.what)
    assert self_test.reasons(wrong, spec()) == ()


def test_calls_without_gradients_do_not_vouch_for_later_ones(on_cpu):
    backend, _ = on_cpu("flash", "flash_attn-2.8.3")

    def forward(call):
        return backend.forward(call.replaced(query=_WrongGradient.apply(call.query, torch.zeros_like)))

    def bind(call):
        attend = backend.bind(call)
        return lambda query, key, value: attend(_WrongGradient.apply(query, torch.zeros_like), key, value)

    register_backend(replace(backend, forward=forward, bind=bind), replace=True)
    query, key, value = (torch.randn(1, 8, 2, 64).to(torch.bfloat16) for _ in range(3))
    for _ in range(3):
        dispatch_attention_fn(query, key, value, backend="flash")
    with pytest.raises(BackendRejectedError, match="gradient of q") as caught:
        dispatch_attention_fn(query.requires_grad_(), key, value, backend="flash")
    assert caught.value.codes == ("self_test",)
    with torch.no_grad():
        dispatch_attention_fn(query, key, value, backend="flash")


def test_checkpoints_and_hooks_do_not_see_the_test(on_cpu):
    on_cpu("flash", "flash_attn-2.8.3")
    query, key, value = (torch.randn(1, 8, 2, 64).to(torch.bfloat16).requires_grad_() for _ in range(3))

    def attend(*tensors):
        return dispatch_attention_fn(*tensors, backend="flash")

    out = checkpoint(attend, query, key, value, use_reentrant=False)
    grads = torch.autograd.grad(out.float().sum(), (query, key, value))
    expected = torch.autograd.grad(attend(query, key, value).float().sum(), (query, key, value))
    assert all(torch.equal(one, other) for one, other in zip(grads, expected, strict=True))

    self_test.forget()
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: shapes.append(saved.shape) or saved, lambda saved: saved):
        attend(query, key, value)
    assert shapes and all(max(shape) <= 64 for shape in shapes if shape), "the test has sequences of 200"


def test_modes_and_defaults_of_the_caller_do_not_reach_the_test():
    calls = []
    oracle = registry.get("reference")
    backend = replace(
        oracle, name="oracle", external=True, forward=lambda call: calls.append(call) or oracle.forward(call)
    )
    asked = spec(), with_gradients()
    with torch.device("meta"), FlopCounterMode(display=False) as counted:
        assert [self_test.reasons(backend, facts) for facts in asked] == [(), ()]
    assert counted.get_total_flops() == 0 and len(calls) == 4


def test_it_can_be_switched_off(on_cpu, monkeypatch):
    backend, _ = on_cpu("flash", "flash_attn-2.8.3")
    monkeypatch.setenv("ATTENTION_DISPATCH_SELF_TEST", "0")
    assert self_test.reasons(altered(backend, _constant), spec()) == ()


def test_it_leaves_random_numbers_and_gradients_alone(on_cpu):
    backend, _ = on_cpu("flash", "flash_attn-2.8.3")
    state = torch.get_rng_state()
    self_test.reasons(backend, spec())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_nothing_is_run_for_a_device_that_is_not_here(on_cpu):
    backend, _ = on_cpu("flash", "flash_attn-2.8.3")
    elsewhere = spec()._replace(device="cuda", architecture="sm_00")
    assert self_test.reasons(altered(backend, _raises), elsewhere) == ()


def _break() -> None:
    """Let every function of the loaded source leave its output unwritten, as SageAttention 2.2.0 does on Hopper."""
    for functions in source._loaded.values():
        for name in functions:
            functions[name] = _writes_nothing


def _writes_nothing(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False):
    out = torch.full_like(q, float("nan"))
    return (out, torch.zeros(q.shape[0], q.shape[2], q.shape[1])) if return_lse else out


def test_unwritten_output_of_sage_on_hopper_is_found(on_cpu):
    backend, _ = on_cpu("_sage_qk_int8_pv_fp8_cuda_sm90", "sageattention-2.2.0")
    backend.load()
    _break()
    [reason] = self_test.reasons(backend, spec())
    assert "not finite" in reason.what


def test_a_broken_kernel_is_refused_and_passed_over(on_cpu):
    backend, _ = on_cpu("sage_hub", "hub-sage_attention-v1")
    backend.load()
    _break()
    query, key, value = torch.randn(3, 1, 8, 2, 64).to(torch.bfloat16).unbind(0)
    with pytest.raises(BackendRejectedError) as caught:
        dispatch_attention_fn(query, key, value, backend="sage_hub")
    assert caught.value.codes == ("self_test",)
    assert dispatch_attention_fn(query, key, value, backend=["sage_hub", "native"]).isfinite().all()


def test_builds_that_only_a_test_can_tell_apart_need_the_self_test(monkeypatch):
    monkeypatch.setattr(known_bad, "installed_version", lambda distribution: "2.2.0")
    hopper = spec()._replace(device="cuda", architecture="sm_90")
    assert known_bad.reasons("sage", hopper) == ()
    assert len(known_bad.notes("sage", hopper)) == 1
    monkeypatch.setenv("ATTENTION_DISPATCH_SELF_TEST", "0")
    [reason] = known_bad.reasons("sage", hopper)
    assert reason.code == "known_bad" and "github.com/thu-ml/SageAttention" in reason.what
    monkeypatch.setattr(known_bad, "installed_version", lambda distribution: "2.1.1")
    assert known_bad.reasons("sage", hopper) == ()


@pytest.mark.parametrize(
    ("backend", "version", "facts", "refused"),
    [
        ("_native_cudnn", "2.12.1", {"architecture": "sm_100", "kv_heads": 2}, True),
        ("_native_cudnn", "2.12.1", {"architecture": "sm_100", "kv_heads": 8}, False),
        ("_native_cudnn", "2.12.1", {"architecture": "sm_90", "kv_heads": 2}, False),
        ("_native_cudnn", "2.14.0", {"architecture": "sm_100", "kv_heads": 2}, False),
        ("_native_cudnn", "2.13.0+cu130", {"architecture": "sm_90", "grad": True, "mask": "bool"}, True),
        ("_native_cudnn", "2.13.0+cu130", {"architecture": "sm_90", "grad": True, "window": True}, True),
        ("_native_cudnn", "2.13.0+cu130", {"architecture": "sm_90", "grad": True}, False),
        ("native", "2.12.1", {"architecture": "sm_100", "kv_heads": 2}, False),
        ("flex", "2.11.0", {"lse": True, "options": ("kernel_options",)}, True),
        ("flex", "2.13.0", {"lse": True, "options": ("kernel_options",)}, False),
    ],
)
def test_known_bad_rows(backend, version, facts, refused, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    found = known_bad.reasons(backend, spec()._replace(device="cuda", **facts))
    assert bool(found) is refused


@pytest.mark.parametrize(
    ("compiler", "facts", "refused"),
    [
        ("4.6.2", {"architecture": "sm_90", "grad": True}, True),
        ("4.6.3", {"architecture": "sm_90", "grad": True}, True),
        ("4.6.3", {"architecture": "sm_90"}, False),
        ("4.8.1", {"architecture": "sm_90", "grad": True}, False),
        ("4.6.1", {"architecture": "sm_103", "grad": True}, True),
        ("4.6.2", {"architecture": "sm_103", "grad": True}, False),
        (None, {"architecture": "sm_90", "grad": True}, False),
    ],
)
def test_compilers_whose_flash_4_backward_pass_never_returns(compiler, facts, refused, monkeypatch):
    monkeypatch.setattr(known_bad, "installed_version", {"nvidia-cutlass-dsl": compiler}.get)
    found = known_bad.reasons("flash_4", spec()._replace(device="cuda", **facts))
    assert bool(found) is refused
    assert known_bad.reasons("flash", spec()._replace(device="cuda", **facts)) == ()


@pytest.mark.parametrize(("head_dim", "doubtful"), [(40, True), (33, True), (24, True), (48, False), (64, False)])
def test_gradients_of_flash_4_that_only_a_test_can_tell_right_from_wrong(head_dim, doubtful, monkeypatch):
    monkeypatch.setattr(known_bad, "installed_version", {"flash-attn-4": "4.0.0b36"}.get)
    facts = spec()._replace(device="cuda", architecture="sm_90", grad=True, head_dim=head_dim, head_dim_v=head_dim)
    assert known_bad.reasons("flash_4", facts) == ()
    monkeypatch.setenv("ATTENTION_DISPATCH_SELF_TEST", "0")
    assert bool(known_bad.reasons("flash_4", facts)) is doubtful
    assert known_bad.reasons("flash_4", facts._replace(grad=False)) == ()


@pytest.mark.parametrize(
    ("dims", "forward", "gradients"),
    [
        ((64, 64), True, True),
        ((96, 96), True, True),
        ((97, 97), True, False),
        ((112, 112), True, False),
        ((120, 120), True, True),
        ((64, 96), True, False),
        ((96, 64), True, False),
        ((192, 128), True, True),
        ((96, 200), False, False),
        ((128, 256), True, False),
        ((256, 256), True, True),
    ],
)
def test_head_dims_that_flash_4_compiles_for_hopper(dims, forward, gradients):
    facts = spec()._replace(device="cuda", architecture="sm_90", head_dim=dims[0], head_dim_v=dims[1])
    assert (flash_limits.of_version_4(facts) == ()) is forward
    assert (flash_limits.of_version_4(facts._replace(grad=True)) == ()) is gradients


def test_every_known_bad_row_links_its_report():
    assert all(entry.url.startswith("https://") and entry.fix.endswith(".") for entry in known_bad.KNOWN_BAD)

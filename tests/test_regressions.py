"""What goes wrong in other dispatchers, one test per finding; those of torch's own backends are here.

Found in diffusers 0.42 by reading and by running it. ``families`` is ``families/test_regressions.py``, where vendors'
kernels are replaced by exact ones; ``diffusers`` is ``diffusers/test_findings.py``; ``distributed`` compares worlds of two
to four processes with one.

2A, silently wrong: 1 flex drops is_causal without a mask. 2 a mask beside is_causal is dropped (flex; xformers:
families). 3 flex pads queries instead of keys. 4 flex takes the blocks of head 0 for all heads. 5 varlen packs a prefix
(families; a padded prompt in ``diffusers/test_pictures.py``). 6 masks over queries or heads are reduced to padding (here
and families). 7 bool masks are added as numbers (here and families). 8 additive masks are inverted, or dropped where
nowhere zero (here and families). 9 NPU drops is_causal (families). 10 scale is dropped (here and families). 11 dropout
is dropped (here and families). 12 unknown keywords are dropped, known ones override arguments (here and families).
13 a parallel config is ignored (here; served: distributed). 14 a ring reuses the local mask; 15 uneven Ulysses misplaces
masks from three ranks on (distributed: the product of masks, schemes and lengths). 16 cuDNN is given bool masks. 17 the
backward pass drops other weights than the forward pass (here; refused: distributed). 18 outputs come detached (here and
families). 19 3-D masks are taken per head. 20 2-D masks of two readings are guessed. 21 causal masking of different
lengths is aligned to the bottom right (here and families). 22 models without a setting are sharded but not their
attention (distributed: models without the attribute).

2B, crashes: LSE; names given by argument or environment are not checked; upper case; names nobody knows; cross-attention
in the backward pass, heads that ranks do not divide, masks per row (distributed); no backward pass, kernels kept from
their own GPU (families). 2C, state: everything about settings (here and diffusers), inference mode, warnings. 2D, the
log-sum-exp: its layout, base and dtype (here and families). 2E: cost without need (families).
"""

from __future__ import annotations

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from attention_dispatch import (
    BackendRejectedError,
    BackendUnavailableError,
    InvalidCallError,
    UnknownBackendError,
    attention_backend,
    backend_status,
    dispatch_attention_fn,
    list_backends,
    reset_attention_backend,
    set_attention_backend,
    set_checks,
)
from attention_dispatch.backends.flex import _block_mask
from attention_dispatch.call import canonicalise
from attention_dispatch.masks import block_table
from attention_dispatch.testing import attend

pytestmark = pytest.mark.usefixtures("one_thread")

NATIVES = ("native", "_native_math", "_native_flash")
ALL = (*NATIVES, "flex", "reference")
B, S, H, D = 2, 24, 4, 32


def tensors(batch=B, q_len=S, k_len=S, heads=H, kv_heads=H, dim=D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, length, count, dim, generator=generator)
        for length, count in ((q_len, heads), (k_len, kv_heads), (k_len, kv_heads))
    ]


def truth(query, key, value, **arguments):
    wide = (tensor.detach().double() for tensor in (query, key, value))
    return attend(*wide, **arguments)


def assert_close(actual, expected, error=1e-5):
    assert actual.shape == expected.shape
    largest = float((actual.double() - expected).abs().max())
    assert largest < error, largest


def scattered(batch=B, length=S):
    keep = torch.rand(batch, length, generator=torch.Generator().manual_seed(5)) < 0.6
    keep[:, 1] = True
    return keep


@pytest.mark.parametrize("name", ALL)
def test_2A1_flex_causal_without_mask(name):
    query, key, value = tensors()
    out = dispatch_attention_fn(query, key, value, is_causal=True, backend=name)
    assert_close(out, truth(query, key, value, is_causal=True)[0])


@pytest.mark.parametrize("name", ALL)
def test_2A2_mask_and_causal_both_apply(name):
    query, key, value = tensors()
    keep = scattered()
    out = dispatch_attention_fn(query, key, value, keep[:, None, None], is_causal=True, backend=name)
    assert_close(out, truth(query, key, value, keep=keep[:, None, None], is_causal=True)[0])


@pytest.mark.parametrize("name", ALL)
def test_2A3_a_2d_mask_pads_keys_not_queries(name):
    query, key, value = tensors()
    keep = scattered()
    out = dispatch_attention_fn(query, key, value, keep, backend=name)
    assert_close(out, truth(query, key, value, keep=keep[:, None, None])[0])


@pytest.mark.parametrize("outer", ["eager call", "compiled model"])
def test_2A4_flex_masks_per_head(outer):
    """Blocks of 128 that only some heads fill: with the table of head 0 the other heads lose or gain blocks."""
    query, key, value = tensors(1, 256, 256, 2, 2, 16)
    keep = torch.ones(1, 2, 256, 256, dtype=torch.bool)
    keep[:, 0, :, 128:] = False
    keep[:, 1, :, :128] = False

    def call(query, key, value, keep):
        return dispatch_attention_fn(query, key, value, keep, backend="flex")

    run = call if outer == "eager call" else torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(run(query, key, value, keep), truth(query, key, value, keep=keep)[0])
    # Unfused, as on a CPU, the table of blocks is not used; it must be right all the same.
    table = block_table(_block_mask(canonicalise(query, key, value, keep)))
    seen = table.partial if table.full is None else table.partial | table.full
    assert seen[0].tolist() == [[[True, False], [True, False]], [[False, True], [False, True]]]


@pytest.mark.parametrize("name", ALL)
def test_2A6_a_mask_over_queries_is_not_reduced_to_padding(name):
    query, key, value = tensors()
    keep = torch.ones(S, S, dtype=torch.bool).tril()
    out = dispatch_attention_fn(query, key, value, keep[None, None], backend=name)
    assert_close(out, truth(query, key, value, is_causal=True)[0])


@pytest.mark.parametrize("name", ALL)
def test_2A7_a_bool_mask_is_not_added_as_numbers(name):
    query, key, value = tensors()
    keep = torch.rand(B, H, S, S, generator=torch.Generator().manual_seed(2)) < 0.5
    keep[..., 3] = True
    out = dispatch_attention_fn(query, key, value, keep, backend=name)
    assert_close(out, truth(query, key, value, keep=keep)[0])


@pytest.mark.parametrize("name", ALL)
def test_2A8_a_bias_that_is_nowhere_zero_is_kept(name):
    query, key, value = tensors()
    distance = (torch.arange(S)[None] - torch.arange(S)[:, None]).abs()
    bias = -0.3 * (1 + distance)[None, None].float()
    out = dispatch_attention_fn(query, key, value, bias, backend=name)
    assert_close(out, truth(query, key, value, bias=bias)[0])


@pytest.mark.parametrize("name", ALL)
def test_2A10_scale_is_honoured(name):
    query, key, value = tensors()
    out = dispatch_attention_fn(query, key, value, scale=1.0, backend=name)
    assert_close(out, truth(query, key, value, scale=1.0)[0])


def test_2A11_flex_dropout_is_refused_not_dropped():
    with pytest.raises(BackendRejectedError) as caught:
        dispatch_attention_fn(*tensors(), dropout_p=0.1, backend="flex")
    assert "dropout" in caught.value.codes


@pytest.mark.parametrize("name", ["native", "_native_math", "reference"])
def test_2A11_dropout_drops_and_rescales(name):
    query, key, value = tensors(1, 64, 64, 2, 2, 8)
    torch.manual_seed(0)
    out = dispatch_attention_fn(query * 0, key, torch.ones_like(value), dropout_p=0.5, backend=name)
    # Each output is the sum of 64 equal weights, of which about half are left, doubled.
    assert float(out.std()) > 0.05 and abs(float(out.mean()) - 1.0) < 0.05


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("kwargs", "code"), [({"window_size": (2, 2)}, "window"), ({"softcap": 5.0}, "softcap")], ids=["window", "softcap"]
)
def test_2A12_attention_kwargs_are_served_or_refused(name, kwargs, code):
    query, key, value = tensors()
    try:
        out = dispatch_attention_fn(query, key, value, attention_kwargs=kwargs, backend=name)
    except BackendRejectedError as error:
        assert error.codes == (code,)
    else:
        assert_close(out, truth(query, key, value, **kwargs)[0])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kwargs", [{"windw_size": (2, 2)}, {"scale": 0.1}, {"is_causal": True}, {"dropout_p": 0.5}])
def test_2A12_unknown_kwargs_raise_and_cannot_override_arguments(name, kwargs):
    with pytest.raises(InvalidCallError, match=next(iter(kwargs))):
        dispatch_attention_fn(*tensors(), attention_kwargs=kwargs, backend=name)


@pytest.mark.parametrize("name", ALL)
def test_2A13_a_parallel_config_is_never_ignored(name):
    with pytest.raises(InvalidCallError, match="parallel_config"):
        dispatch_attention_fn(*tensors(), backend=name, parallel_config=object())


@pytest.mark.gpu
def test_2A16_cudnn_bool_masks(cuda):
    query, key, value = (tensor.to(cuda, torch.bfloat16) for tensor in tensors(q_len=136, k_len=136, dim=64))
    keep = scattered(length=136).to(cuda)
    out = dispatch_attention_fn(query, key, value, keep, backend="_native_cudnn")
    assert_close(out, truth(query, key, value, keep=keep[:, None, None])[0], 2e-2)


@pytest.mark.parametrize("name", ["native", "_native_math", "reference"])
def test_2A17_the_backward_pass_drops_what_the_forward_pass_dropped(name):
    """The output is linear in the values, so that <gradient, values> = <output, output gradient>."""
    query, key, value = tensors()
    value.requires_grad_()
    out = dispatch_attention_fn(query, key, value, dropout_p=0.4, backend=name)
    grad_out = tensors(seed=1)[0]
    [grad] = torch.autograd.grad(out, value, grad_out)
    assert abs(float((grad * value).sum() - (out * grad_out).sum())) < 1e-3


@pytest.mark.parametrize("name", [*ALL, "auto"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_2A18_an_output_is_never_detached(name, which):
    """Called without gradients before, so that whatever was remembered of such calls must not answer."""
    given = tensors()
    for _ in range(2):
        dispatch_attention_fn(*given, backend=name)
    given[which].requires_grad_()
    try:
        out = dispatch_attention_fn(*given, backend=name)
    except BackendRejectedError as error:
        assert error.codes == ("gradients",)
        return
    grad_out = tensors(seed=1)[0]
    [grad] = torch.autograd.grad(out, given[which], grad_out)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = torch.autograd.grad(attend(*wide)[0], wide, grad_out.double())
    assert_close(grad, expected[which])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [2, H], ids=["B differs from H", "B equals H"])
def test_2A19_a_3d_mask_is_per_sample(name, batch):
    query, key, value = tensors(batch)
    keep = torch.rand(batch, S, S, generator=torch.Generator().manual_seed(4)) < 0.6
    keep[..., 0] = True
    out = dispatch_attention_fn(query, key, value, keep, backend=name)
    assert_close(out, truth(query, key, value, keep=keep[:, None])[0])


@pytest.mark.parametrize("name", ALL)
def test_2A20_an_ambiguous_2d_mask_raises(name):
    query, key, value = tensors(batch=6, q_len=6, k_len=9)
    with pytest.raises(InvalidCallError, match=r"mask\[:, None, None, :\].*mask\[None, None\]"):
        dispatch_attention_fn(query, key, value, torch.ones(6, 9, dtype=torch.bool).tril(2), backend=name)


@pytest.mark.parametrize("name", ALL)
def test_2A20_a_2d_mask_over_queries_is_read_as_torch_reads_it(name):
    query, key, value = tensors(q_len=7, k_len=9)
    keep = torch.ones(7, 9, dtype=torch.bool).tril(2)
    out = dispatch_attention_fn(query, key, value, keep, backend=name)
    assert_close(out, truth(query, key, value, keep=keep)[0])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("q_len", "k_len"), [(5, 9), (9, 5), (1, 9)])
def test_2A21_causal_is_aligned_to_the_top_left(name, q_len, k_len):
    query, key, value = tensors(q_len=q_len, k_len=k_len)
    out = dispatch_attention_fn(query, key, value, is_causal=True, backend=name)
    assert_close(out, truth(query, key, value, is_causal=True)[0])
    assert_close(out[:, 0], value[:, 0].double())


@pytest.mark.parametrize("name", [*ALL, "_native_cudnn", "_native_efficient"])
def test_2B_lse_is_served_or_refused(name):
    query, key, value = tensors()
    if not backend_status(name).available:
        pytest.skip(str(backend_status(name)))
    try:
        out, lse = dispatch_attention_fn(query, key, value, attention_kwargs={"return_lse": True}, backend=name)
    except BackendRejectedError as error:
        assert set(error.codes) & {"lse", "device"}
    else:
        expected, expected_lse = truth(query, key, value)
        assert_close(out, expected)
        assert_close(lse, expected_lse)


@pytest.mark.parametrize("way", ["argument", "scope", "environment"])
def test_2B_a_missing_package_is_said_whichever_way_it_is_asked_for(way, monkeypatch):
    missing = next((name for name in list_backends() if not backend_status(name).available), None)
    if missing is None:
        pytest.skip("every registered backend is available here")
    query, key, value = (tensor.bfloat16() for tensor in tensors(dim=64))
    with pytest.raises(BackendUnavailableError) as caught:
        if way == "argument":
            dispatch_attention_fn(query, key, value, backend=missing)
        elif way == "scope":
            with attention_backend(missing):
                dispatch_attention_fn(query, key, value)
        else:
            monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", missing)
            dispatch_attention_fn(query, key, value)
    assert isinstance(caught.value, ImportError)
    assert all(reason.fix for reason in caught.value.reasons)


@pytest.mark.parametrize("name", ["NATIVE", "Flex", "_NATIVE_MATH"])
def test_2B_names_are_case_insensitive_everywhere(name):
    query, key, value = tensors()
    model = Attention()
    set_attention_backend(model, name)
    with attention_backend(name):
        assert_close(dispatch_attention_fn(query, key, value), truth(query, key, value)[0])
    assert_close(dispatch_attention_fn(query, key, value, backend=name), truth(query, key, value)[0])
    reset_attention_backend(model)


@pytest.mark.parametrize("name", ["_fused_npu", "flash_5", "nativ"])
def test_2B_a_name_nobody_knows_is_refused_where_it_is_given(name):
    with pytest.raises(UnknownBackendError):
        attention_backend(name)
    with pytest.raises(UnknownBackendError):
        set_attention_backend(Attention(), name)


class Attention(torch.nn.Module):
    """One that dispatches, with a setting that its class requires."""

    _attention_backend = "reference"

    def forward(self, query, key, value, **arguments):
        return dispatch_attention_fn(query, key, value, backend=self._attention_backend, **arguments)


class PlainAttention(torch.nn.Module):
    """One that calls torch."""

    def forward(self, query, key, value):
        return F.scaled_dot_product_attention(query, key, value)


def test_2C_a_setting_of_one_model_is_none_of_another(monkeypatch):
    """Softcap is refused by native alone, which shows who runs a call."""
    first, second = Attention(), Attention()
    set_attention_backend(first, "native")
    query, key, value = tensors()
    with pytest.raises(BackendRejectedError):
        first(query, key, value, attention_kwargs={"softcap": 2.0})
    second(query, key, value, attention_kwargs={"softcap": 2.0})
    with pytest.raises(BackendRejectedError, match="softcap"):
        dispatch_attention_fn(query, key, value, attention_kwargs={"softcap": 2.0})


def test_2C_reset_restores_the_default_of_the_class():
    model = Attention()
    set_attention_backend(model, "native")
    set_attention_backend(model, "flex")
    reset_attention_backend(model)
    assert model._attention_backend == "reference" and "_attention_backend" not in vars(model)


def test_2C_reset_restores_what_was_set_on_the_instance():
    model = Attention()
    model._attention_backend = "flex"
    set_attention_backend(model, "native")
    reset_attention_backend(model)
    assert vars(model)["_attention_backend"] == "flex"
    reset_attention_backend(model)
    assert vars(model)["_attention_backend"] == "flex"


def test_2C_a_model_that_cannot_be_routed_raises_and_changes_nothing():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    before = F.scaled_dot_product_attention
    with pytest.raises(InvalidCallError, match="nothing to route"):
        set_attention_backend(model, "flex")
    assert F.scaled_dot_product_attention is before


def test_2C_scopes_of_two_threads_may_overlap():
    """Interleaved: the first enters, the second enters, the first leaves, the second leaves."""
    step = threading.Barrier(2)
    query, key, value = tensors()
    softcap = {"attention_kwargs": {"softcap": 2.0}}
    refused: dict[str, list[bool]] = {"reference": [], "native": []}

    def attempt(name):
        try:
            dispatch_attention_fn(query, key, value, **softcap)
        except BackendRejectedError:
            refused[name].append(True)
        else:
            refused[name].append(False)

    def run(name, first):
        if not first:
            step.wait()
        with attention_backend(name):
            if first:
                step.wait()
            step.wait()
            attempt(name)
            if not first:
                step.wait()
        if first:
            step.wait()
        attempt(name)

    threads = [
        threading.Thread(target=run, args=("reference", True)),
        threading.Thread(target=run, args=("native", False)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert refused == {"reference": [False, True], "native": [True, True]}


@pytest.mark.parametrize("name", NATIVES)
def test_2C_the_switches_of_torch_are_not_touched(name, monkeypatch):
    touched = []
    for switch in ("enable_flash_sdp", "enable_math_sdp", "enable_mem_efficient_sdp", "enable_cudnn_sdp"):
        monkeypatch.setattr(torch.backends.cuda, switch, lambda value, switch=switch: touched.append(switch))
        monkeypatch.setattr(torch._C, f"_set_sdp_use_{switch.split('_')[1]}", touched.append, raising=False)
    dispatch_attention_fn(*tensors(), is_causal=True, backend=name)
    assert touched == []


def test_2C_the_nearer_setting_wins_call_model_scope():
    query, key, value = tensors()
    softcap = {"attention_kwargs": {"softcap": 2.0}}
    model = PlainAttention()
    with attention_backend("native"):
        dispatch_attention_fn(query, key, value, backend="reference", **softcap)
        with pytest.raises(BackendRejectedError):
            dispatch_attention_fn(query, key, value, **softcap)
        set_attention_backend(model, "reference")
        assert_close(
            model(*(tensor.transpose(1, 2) for tensor in (query, key, value))).transpose(1, 2),
            truth(query, key, value)[0],
        )
    reset_attention_backend(model)


@pytest.mark.parametrize("name", ALL)
def test_2C_a_first_call_under_inference_mode_does_not_poison_training(name):
    query, key, value = tensors()
    keep = scattered()
    with torch.inference_mode():
        dispatch_attention_fn(query, key, value, keep, is_causal=True, backend=name)
        dispatch_attention_fn(query, key, value, scattered(), is_causal=True, backend=name)
    leaves = [tensor.requires_grad_() for tensor in tensors()]
    try:
        out = dispatch_attention_fn(*leaves, keep, is_causal=True, backend=name)
    except BackendRejectedError as error:
        assert error.codes == ("gradients",)
        return
    out.sum().backward()
    assert all(bool(leaf.grad.isfinite().all()) for leaf in leaves)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_are_no_reason_for_gradients_where_none_are_recorded(name, mode):
    query, key, value = (torch.nn.Parameter(tensor) for tensor in tensors())
    with mode():
        out = dispatch_attention_fn(query, key, value, scattered(), is_causal=True, backend=name)
    assert not out.requires_grad
    assert_close(out, truth(query, key, value, keep=scattered()[:, None, None], is_causal=True)[0])


@pytest.mark.parametrize("request_", ["flex", ["flex", "reference"]], ids=["demand", "permission"])
def test_derivatives_in_forward_mode_are_needed_gradients_too(request_):
    """No tensor requires a gradient then; a kernel that is forward-only would drop the tangent."""
    query, key, value = tensors()

    def call(query):
        return dispatch_attention_fn(query, key, value, backend=request_)

    for _ in range(3):
        call(query)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        if request_ == "flex":
            with pytest.raises(BackendRejectedError) as caught:
                call(dual)
            assert caught.value.codes == ("gradients",)
            return
        tangent = forward_ad.unpack_dual(call(dual)).tangent
    step = 1e-4 * torch.ones_like(query).double()
    ahead, behind = (truth(query.double() + sign * step, key, value)[0] for sign in (1, -1))
    assert_close(tangent, (ahead - behind) / 2e-4, 1e-4)


def test_2C_checks_do_not_warn_about_defaults(recwarn):
    set_checks(True)
    dispatch_attention_fn(*tensors(), backend="flex")
    assert not [warning for warning in recwarn if "argument" in str(warning.message)]


def test_2D_the_lse_has_one_layout_base_and_dtype():
    query, key, value = tensors(kv_heads=2)
    expected = truth(query, key, value, is_causal=True)[1]
    found = {}
    for name in ALL:
        arguments = {"is_causal": True, "enable_gqa": True, "attention_kwargs": {"return_lse": True}}
        try:
            _, found[name] = dispatch_attention_fn(query, key, value, backend=name, **arguments)
        except BackendRejectedError as error:
            assert error.codes == ("lse",), name
    assert {"_native_flash", "reference"} <= set(found)
    for lse in found.values():
        assert lse.dtype == torch.float32 and lse.shape == (B, H, S) and not lse.requires_grad
        assert_close(lse, expected)

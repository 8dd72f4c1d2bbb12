"""Masks as objects: what is remembered about them, for how long, and that a changed mask is not the old one."""

from __future__ import annotations

import gc
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention.flex_attention import and_masks, create_block_mask

from attention_dispatch import BackendRejectedError, InvalidCallError, dispatch_attention_fn, explain, masks
from attention_dispatch.backends import flex, mask_mods
from attention_dispatch.testing import attend

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("native", "_native_math", "_native_flash", "flex", "reference")


def tensors(length=24):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, length, 4, 16, generator=generator) for _ in range(3)]


def assert_close(out, expected):
    assert float((out - expected).abs().max()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_changed_in_place_is_read_again(name):
    query, key, value = tensors()
    mask = torch.ones(2, 1, 24, 24, dtype=torch.bool).tril()
    dispatch_attention_fn(query, key, value, mask, is_causal=True, backend=name)
    mask[..., 5:] = False
    out = dispatch_attention_fn(query, key, value, mask, is_causal=True, backend=name)
    assert_close(out, attend(query.double(), key.double(), value.double(), keep=mask, is_causal=True)[0])
    mask.fill_(True)
    out = dispatch_attention_fn(query, key, value, mask, backend=name)
    assert_close(out, attend(query.double(), key.double(), value.double())[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", ["from numpy", "through numpy", "other memory"])
def test_a_mask_changed_past_the_version_counter_is_read_again(name, way):
    query, key, value = tensors()
    array = np.ones((2, 1, 1, 24), dtype=bool)
    mask = torch.from_numpy(array) if way == "from numpy" else torch.ones(2, 1, 1, 24, dtype=torch.bool)
    for is_causal in (True, False):
        dispatch_attention_fn(query, key, value, mask, is_causal=is_causal, backend=name)
    if way == "other memory":
        mask.data = torch.arange(24).expand(2, 1, 1, 24) < 5
    else:
        (array if way == "from numpy" else mask.numpy())[..., 5:] = False
    for is_causal in (True, False):
        out = dispatch_attention_fn(query, key, value, mask, is_causal=is_causal, backend=name)
        wide = (tensor.double() for tensor in (query, key, value))
        assert_close(out, attend(*wide, keep=mask, is_causal=is_causal)[0])


@pytest.mark.parametrize("name", NAMES)
def test_views_of_one_mask_are_told_apart(name):
    query, key, value = tensors()
    whole = torch.rand(2, 48, generator=torch.Generator().manual_seed(1)) < 0.6
    whole[:, ::24] = True
    for part in (whole[:, :24], whole[:, 24:], whole[:, :24].flip(0), whole[:1, :24].expand(2, -1)):
        out = dispatch_attention_fn(query, key, value, part[:, None, None], is_causal=True, backend=name)
        wide = (tensor.double() for tensor in (query, key, value))
        assert_close(out, attend(*wide, keep=part[:, None, None], is_causal=True)[0])


@pytest.mark.parametrize("shape", [(2, 24), (2, 1, 1, 24), (2, 1, 24, 24), (2, 4, 24, 24)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_is_freed_with_its_last_user(shape, dtype):
    query, key, value = tensors()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask = mask if dtype == torch.bool else mask.float()
    alive = weakref.ref(mask)
    for name in NAMES:
        dispatch_attention_fn(
            query, key, value, mask if len(shape) == 4 else mask[:, None, None], is_causal=True, backend=name
        )
    del mask
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["padding", "bias"])
def test_what_inference_mode_prepared_of_a_mask_serves_training(name, kind):
    """A tensor made in inference mode cannot be saved for a backward pass, and what is remembered may be one."""
    mask = torch.rand(2, 1, 1, 24, generator=torch.Generator().manual_seed(1))
    mask = mask < 0.8 if kind == "padding" else mask
    with torch.inference_mode():
        dispatch_attention_fn(*tensors(), mask, is_causal=True, backend=name)
        dispatch_attention_fn(*tensors(), mask, backend=name)
    leaves = [tensor.requires_grad_() for tensor in tensors()]
    for is_causal in (True, False):
        try:
            out = dispatch_attention_fn(*leaves, mask, is_causal=is_causal, backend=name)
        except BackendRejectedError as error:
            assert (name, error.codes) == ("flex", ("gradients",))
            continue
        found = torch.autograd.grad(out.sum(), leaves)
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        given = {"keep": mask} if kind == "padding" else {"bias": mask.double()}
        expected = torch.autograd.grad(attend(*wide, is_causal=is_causal, **given)[0].sum(), wide)
        for gradient, wanted in zip(found, expected):
            assert_close(gradient, wanted)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flex"])
@pytest.mark.parametrize("tracer", ["jit", "make_fx"])
def test_a_trace_reads_the_mask_it_is_given_not_the_one_it_was_made_with(name, tracer):
    query, key, value = tensors()
    traced_with = torch.ones(1, 1, 1, 24, dtype=torch.bool).expand(2, 1, 1, 24)
    mask = torch.rand(2, 1, 1, 24, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[..., 0] = True

    def call(query, key, value, mask):
        return dispatch_attention_fn(query, key, value, mask, is_causal=True, backend=name)

    call(query, key, value, traced_with)
    if tracer == "jit":
        traced = torch.jit.trace(call, (query, key, value, traced_with), check_trace=False)
    else:
        traced = make_fx(call)(query, key, value, traced_with)
    out = traced(query, key, value, mask)
    assert_close(out, attend(query.double(), key.double(), value.double(), keep=mask, is_causal=True)[0])


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_take_masks_and_leave_nothing_behind(name):
    query, key, value = tensors(26)
    with FakeTensorMode():
        fake = torch.empty(2, 26, 4, 16)
        for mask in (None, torch.empty(2, 1, 1, 26, dtype=torch.bool), torch.empty(2, 1, 26, 26)):
            out = dispatch_attention_fn(fake, fake, fake, mask, is_causal=True, backend=name)
            assert isinstance(out, FakeTensor) and out.shape == fake.shape
    out = dispatch_attention_fn(query, key, value, is_causal=True, backend=name)
    assert_close(out, attend(query.double(), key.double(), value.double(), is_causal=True)[0])


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flex"])
@pytest.mark.parametrize("kind", ["padding", "bias"])
def test_vmap_over_masks(name, kind):
    stacked = [torch.stack([tensor, -tensor]) for tensor in tensors()]
    given = torch.rand(2, 2, 1, 1, 24, generator=torch.Generator().manual_seed(1))
    given = given < 0.8 if kind == "padding" else given
    out = torch.vmap(lambda q, k, v, mask: dispatch_attention_fn(q, k, v, mask, is_causal=True, backend=name))(
        *stacked, given
    )
    for sample in range(2):
        wide = [tensor[sample].double() for tensor in stacked]
        hides = {"keep": given[sample]} if kind == "padding" else {"bias": given[sample].double()}
        assert_close(out[sample], attend(*wide, is_causal=True, **hides)[0])


def test_nothing_is_remembered_while_a_cuda_graph_records(monkeypatch):
    """A replay must compute what depends on the mask again; a result from before would be that of the first mask."""
    built = []
    mask = torch.ones(2, 8)
    for _ in range(2):
        masks.derived(mask, "key", lambda: built.append(mask))
    assert len(built) == 1
    monkeypatch.setattr(masks, "records_graph", lambda device: True)
    masks.derived(mask, "key", lambda: built.append(mask))
    assert len(built) == 2


def test_flex_builds_one_block_mask_per_mask_object(monkeypatch):
    built = []
    original = flex._create
    monkeypatch.setattr(flex, "_create", lambda *arguments: built.append(arguments) or original(*arguments))
    query, key, value = tensors()
    mask = torch.rand(2, 24, generator=torch.Generator().manual_seed(1)) < 0.6
    for _layer in range(4):
        dispatch_attention_fn(query, key, value, mask[:, None, None, :], backend="flex")
    assert len(built) == 1
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 24, 24, device="cpu")
    for _layer in range(4):
        dispatch_attention_fn(query, key, value, block_mask, backend="flex", attention_kwargs={"window_size": (3, -1)})
    assert len(built) == 2


def test_two_block_masks_that_share_a_table_are_told_apart():
    query, key, value = tensors()
    wide = create_block_mask(lambda b, h, q, k: q >= k, None, None, 24, 24, device="cpu")
    narrow = create_block_mask(lambda b, h, q, k: q == k, None, None, 24, 24, device="cpu")
    narrow.kv_indices, narrow.kv_num_blocks = wide.kv_indices, wide.kv_num_blocks
    dispatch_attention_fn(query, key, value, wide, backend="flex")
    assert_close(dispatch_attention_fn(query, key, value, narrow, backend="flex"), value.double())


def test_flex_outlives_the_recompile_limit_of_dynamo():
    query, key, value = tensors()
    limit = torch._dynamo.config.recompile_limit
    for reach in range(limit + 2):
        # Each mask_mod has its own constant, which dynamo compiles anew.
        mask = create_block_mask(
            lambda b, h, q, k, reach=reach: (q - k).abs() <= reach, None, None, 24, 24, device="cpu"
        )
        out = dispatch_attention_fn(query, key, value, mask, backend="flex")
        distance = (torch.arange(24)[None] - torch.arange(24)[:, None]).abs()
        assert_close(out, attend(query.double(), key.double(), value.double(), keep=distance <= reach)[0])


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 24).bool(), torch.ones(24, 24).bool(), torch.zeros(2, 1, 24, 24), torch.ones(1, 1, 1, 1).bool()],
    ids=["padding", "square", "bias", "one value"],
)
def test_a_mask_that_masks_nothing_does_not_cost_a_kernel(mask):
    query, key, value = tensors()
    assert explain(query, key, value, mask).spec.mask == "none"


def test_a_mask_that_needs_a_gradient_is_kept_even_if_it_is_zero():
    query, key, value = tensors()
    bias = torch.zeros(2, 1, 24, 24, requires_grad=True)
    dispatch_attention_fn(query, key, value, bias).square().sum().backward()
    assert bool(bias.grad.any())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive_with_causal_masking(name, scale):
    query, key, value = tensors()
    out = dispatch_attention_fn(query, key, value, is_causal=True, scale=scale, backend=name)
    assert_close(out, attend(query.double(), key.double(), value.double(), is_causal=True, scale=scale)[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_finite_numbers_of_a_mask_in_float32_stay_finite(name, dtype):
    """Cast, torch.finfo(torch.float32).min is -inf; but a row of it has keys, all of them equally unlikely."""
    query, key, value = (tensor.to(dtype) for tensor in tensors())
    bias = torch.zeros(2, 1, 24, 24)
    bias[..., 5:] = -1e38
    bias[0, :, 3] = torch.finfo(torch.float32).min
    bias[1, :, 3] = float("-inf")
    out = dispatch_attention_fn(torch.zeros_like(query), key, value, bias, backend=name)
    expected = attend(torch.zeros_like(query).double(), key.double(), value.double(), bias=bias.double())[0]
    assert float((out - expected).abs().max()) < 8 * torch.finfo(dtype).eps
    assert bool(out[0, 3].any()) and not bool(out[1, 3].any())


def test_flex_keeps_a_bounded_number_of_compiled_functions(monkeypatch):
    """A scale that is learned makes a kind of every call."""
    monkeypatch.setattr(flex, "_MAX_COMPILED", 2)
    monkeypatch.setattr(flex, "_compiled", OrderedDict())
    query, key, value = tensors()
    for scale in (0.1, 0.2, 0.3, 0.1):
        out = dispatch_attention_fn(query, key, value, scale=scale, backend="flex")
        assert_close(out, attend(query.double(), key.double(), value.double(), scale=scale)[0])
    assert len(flex._compiled) == 2


def test_no_keys_and_half_precision_sums_that_overflow():
    query = torch.full((1, 300, 4, 64), 60.0, dtype=torch.float16)
    assert not bool(dispatch_attention_fn(query, query[:, :0], query[:, :0]).any())


def _reaching(style: str, reach: int):
    if style == "default":
        return lambda b, h, q, k, reach=reach: (q - k).abs() <= reach
    if style == "nested default":
        return and_masks(lambda b, h, q, k: q >= 0, lambda b, h, q, k, reach=reach: (q - k).abs() <= reach)
    return lambda b, h, q, k: (q - k).abs() <= reach


@pytest.fixture(params=["as it is", "as before 2.12"])
def forgets_defaults(request, monkeypatch) -> bool:
    """Whether torch is taken to forget defaults; where it does not, what is done about it must do no harm."""
    if request.param == "as before 2.12":
        monkeypatch.setattr(mask_mods, "_DEFAULTS_ARE_FORGOTTEN", True)
    return mask_mods._DEFAULTS_ARE_FORGOTTEN


@pytest.mark.parametrize("style", ["default", "nested default", "closure"])
def test_flex_tells_masks_apart_that_differ_in_a_number(style, forgets_defaults):
    query, key, value = tensors()
    distance = (torch.arange(24)[None] - torch.arange(24)[:, None]).abs()
    for reach in (0, 2, 5):
        mask = create_block_mask(_reaching(style, reach), None, None, 24, 24, device="cpu")
        if style == "nested default" and forgets_defaults:
            with pytest.raises(InvalidCallError, match="enclosing function"):
                dispatch_attention_fn(query, key, value, mask, backend="flex")
            continue
        out = dispatch_attention_fn(query, key, value, mask, backend="flex")
        assert_close(out, attend(query.double(), key.double(), value.double(), keep=distance <= reach)[0])


def test_flex_in_a_graph_tells_masks_apart_that_differ_in_a_default_or_refuses_them(forgets_defaults):
    query, key, value = tensors()
    torch._dynamo.reset()
    distance = (torch.arange(24)[None] - torch.arange(24)[:, None]).abs()
    attend_on_flex = torch.compile(
        lambda mask: dispatch_attention_fn(query, key, value, mask, backend="flex"), fullgraph=True, backend="eager"
    )
    for reach in (0, 2, 5):
        mask = create_block_mask(_reaching("default", reach), None, None, 24, 24, device="cpu")
        if forgets_defaults:
            with pytest.raises(torch._dynamo.exc.Unsupported, match="InvalidCallError"):
                attend_on_flex(mask)
            continue
        assert_close(attend_on_flex(mask), attend(query.double(), key.double(), value.double(), keep=distance <= reach)[0])


def test_a_mask_function_may_hold_itself(forgets_defaults):
    def within(b, h, q, k):
        return ((q - k).abs() <= 2) & (within is not None)

    query, key, value = tensors()
    distance = (torch.arange(24)[None] - torch.arange(24)[:, None]).abs()
    mask = create_block_mask(within, None, None, 24, 24, device="cpu")
    out = dispatch_attention_fn(query, key, value, mask, backend="flex")
    assert_close(out, attend(query.double(), key.double(), value.double(), keep=distance <= 2)[0])


@pytest.mark.parametrize("shape", [(2, 24), (1, 1, 24, 24), (2, 4, 24, 24)])
def test_masks_in_graphs_that_cannot_summarise_them(shape, monkeypatch):
    """What torch 2.9 needs, on any torch."""
    monkeypatch.setattr(flex, "_CANNOT_SUMMARISE_IN_A_GRAPH", True)
    torch._dynamo.reset()
    query, key, value = tensors()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    run = torch.compile(
        lambda q, m: dispatch_attention_fn(q, key, value, m, is_causal=True, backend="flex"), fullgraph=True, backend="eager"
    )
    wide = mask if mask.ndim == 4 else mask[:, None, None]
    expected = attend(query.double(), key.double(), value.double(), keep=wide, is_causal=True)[0]
    assert_close(run(query, mask), expected)

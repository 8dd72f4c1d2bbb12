"""Mistakes of the caller: one clear error each, the same on every backend, and nothing changed."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from attention_dispatch import (
    AttentionDispatchError,
    InvalidCallError,
    UnknownBackendError,
    attention_backend,
    backend_status,
    dispatch_attention_fn,
    explain,
    list_backends,
    register_backend,
    scaled_dot_product_attention,
    set_attention_backend,
    set_checks,
)
from attention_dispatch.registry import get
from attention_dispatch.request import current

Q = torch.zeros(2, 6, 4, 16)
K = torch.zeros(2, 6, 2, 16)
RAGGED = torch.nested.nested_tensor([Q[0, :3], Q[0]], layout=torch.jagged)


def blocks(q_len, k_len):
    return create_block_mask(lambda b, h, q, k: q >= k, None, None, q_len, k_len, device="cpu")


MISTAKES = {
    "query is no tensor": (([1.0], Q, Q), {}, "query must be a torch.Tensor, got list"),
    "three dimensions": ((Q[0], Q, Q), {}, "query must have 4 dimensions"),
    "integers": ((Q.int(), Q.int(), Q.int()), {}, r"query must be floating point.*\.to\("),
    "booleans": ((Q, Q, Q.bool()), {}, "value must be floating point"),
    "complex": ((Q.cfloat(), Q.cfloat(), Q.cfloat()), {}, "query must be floating point"),
    "nested": ((RAGGED, RAGGED, RAGGED), {}, r"query is a nested tensor.*to_padded_tensor"),
    "sparse": ((Q, Q.to_sparse(), Q), {}, r"key has layout torch.sparse_coo.*to_dense"),
    "no head dim": ((Q[..., :0], Q[..., :0], Q), {}, "head_dim must be at least 1"),
    "two devices": ((Q, Q.to("meta"), Q), {}, "one device, got cpu, meta and cpu"),
    "two dtypes": ((Q, Q.half(), Q), {}, "share one dtype, got torch.float32, torch.float16"),
    "two batch sizes": ((Q, Q[:1], Q[:1]), {}, "batch sizes differ: query 2, key 1"),
    "k and v of two lengths": ((Q, Q, Q[:, :5]), {}, "one sequence length, got 6 and 5"),
    "two head dims": ((Q, Q[..., :8], Q), {}, "one head_dim, got 16 and 8"),
    "k and v of two head counts": ((Q, K, Q), {"enable_gqa": True}, "as many heads, got 2 and 4"),
    "gqa without enable_gqa": ((Q, K, K), {}, "pass enable_gqa=True"),
    "heads that do not divide": ((Q, Q[:, :, :3], Q[:, :, :3]), {"enable_gqa": True}, r"query heads \(4\) must be a multiple"),
    "no key heads": ((Q, Q[:, :, :0], Q[:, :, :0]), {"enable_gqa": True}, "must be a multiple of key heads"),
    "NaN scale": ((Q, Q, Q), {"scale": math.nan}, "scale must be finite, got nan"),
    "infinite scale": ((Q, Q, Q), {"scale": math.inf}, "scale must be finite"),
    "tensor scale": ((Q, Q, Q), {"scale": torch.tensor(0.5)}, r"scale must be a float.*scale\.item\(\)"),
    "text scale": ((Q, Q, Q), {"scale": "0.5"}, "scale must be a float or None, got str"),
    "negative dropout": ((Q, Q, Q), {"dropout_p": -0.1}, r"dropout_p must be a number in \[0, 1\)"),
    "dropout of one": ((Q, Q, Q), {"dropout_p": 1.0}, "dropout_p must be"),
    "NaN dropout": ((Q, Q, Q), {"dropout_p": math.nan}, "dropout_p must be"),
    "tensor dropout": ((Q, Q, Q), {"dropout_p": torch.tensor(0.1)}, "dropout_p must be"),
    "text is_causal": ((Q, Q, Q), {"is_causal": "False"}, "is_causal must be True or False, got 'False'"),
    "sparse mask": ((Q, Q, Q), {"attn_mask": torch.ones(2, 1, 1, 6).to_sparse()}, "attn_mask has layout torch.sparse_coo"),
    "list mask": ((Q, Q, Q), {"attn_mask": [[True]]}, "attn_mask must be a tensor or a BlockMask, got list"),
    "integer mask": ((Q, Q, Q), {"attn_mask": torch.ones(2, 6, dtype=torch.int64)}, r"attn_mask\.bool\(\)"),
    "mask on another device": ((Q, Q, Q), {"attn_mask": torch.ones(2, 6, device="meta").bool()}, "attn_mask is on meta"),
    "mask of a wrong length": ((Q, Q, Q), {"attn_mask": torch.ones(2, 5).bool()}, r"got \(2, 5\)"),
    "3-D mask per head": ((Q, Q, Q), {"attn_mask": torch.ones(4, 6, 6).bool()}, "pass 4-D"),
    "4-D mask of wrong heads": ((Q, Q, Q), {"attn_mask": torch.ones(2, 3, 6, 6).bool()}, "does not broadcast"),
    "1-D mask": ((Q, Q, Q), {"attn_mask": torch.ones(6).bool()}, "2, 3 or 4 dimensions, got 1"),
    "5-D mask": ((Q, Q, Q), {"attn_mask": torch.ones(1, 2, 4, 6, 6).bool()}, "2, 3 or 4 dimensions, got 5"),
    "BlockMask of other lengths": ((Q, Q, Q), {"attn_mask": blocks(8, 6)}, "the BlockMask is for"),
    "unknown keyword": ((Q, Q, Q), {"attention_kwargs": {"sofcap": 1.0}}, "unknown attention_kwargs key 'sofcap'.*softcap"),
    "keywords in a list": ((Q, Q, Q), {"attention_kwargs": ["softcap"]}, "attention_kwargs must be a dict.*got list"),
    "keyword that is a number": ((Q, Q, Q), {"attention_kwargs": {1: 2}}, "unknown attention_kwargs key 1"),
    "text return_lse": ((Q, Q, Q), {"attention_kwargs": {"return_lse": "no"}}, "return_lse must be True or False"),
    "negative softcap": ((Q, Q, Q), {"attention_kwargs": {"softcap": -1.0}}, "softcap must be a finite number >= 0"),
    "NaN softcap": ((Q, Q, Q), {"attention_kwargs": {"softcap": math.nan}}, "softcap must be"),
    "window of one": ((Q, Q, Q), {"attention_kwargs": {"window_size": 4}}, "window_size must be a pair"),
    "window of floats": ((Q, Q, Q), {"attention_kwargs": {"window_size": (1.0, 2)}}, "window_size must be a pair"),
    "negative window": ((Q, Q, Q), {"attention_kwargs": {"window_size": (-2, 0)}}, "ints >= -1"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "keywords", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_the_same_error_on_every_backend(arguments, keywords, message):
    model = torch.nn.MultiheadAttention(16, 4)
    set_attention_backend(model, "reference")
    before = {name: value for name, value in vars(model).items() if "attention" in name}
    texts = set()
    with attention_backend("flex"):
        for name in (*list_backends(), "auto", "auto_quantized", ["flash", "native"], None):
            with pytest.raises(InvalidCallError, match=message) as caught:
                dispatch_attention_fn(*arguments, backend=name, **keywords)
            texts.add(str(caught.value))
            assert isinstance(caught.value, (ValueError, AttentionDispatchError))
        with pytest.raises(InvalidCallError, match=message):
            explain(*arguments, **keywords)
        assert current.scope.names == ("flex",)
    assert len(texts) == 1
    assert {name: value for name, value in vars(model).items() if "attention" in name} == before
    assert not Q.any() and not K.any()


def test_a_mistake_after_the_same_call_was_right_is_still_noticed():
    """The remembered way must not swallow what the long way checks."""
    dispatch_attention_fn(Q, Q, Q)
    dispatch_attention_fn(Q, Q, Q)
    for keys, values, message in (
        (Q.half(), Q, "share one dtype"),
        (Q, Q.double(), "share one dtype"),
        (Q.to("meta"), Q, "one device"),
        (Q, Q.to("meta"), "one device"),
    ):
        with pytest.raises(InvalidCallError, match=message):
            dispatch_attention_fn(Q, keys, values)


def test_the_mistake_names_the_layout_of_the_function_that_was_called():
    with pytest.raises(InvalidCallError, match=r"\(batch, heads, seq, head_dim\)"):
        scaled_dot_product_attention(Q[0], Q, Q)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("flahs", "flash"),
        ("sage_attention", "sage"),
        ("native_flash", "_native_flash"),
        ("xformer", "xformers"),
        ("", "native"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        lambda name: dispatch_attention_fn(Q, Q, Q, backend=name),
        lambda name: dispatch_attention_fn(Q, Q, Q, backend=["native", name]),
        attention_backend,
        lambda name: set_attention_backend(torch.nn.MultiheadAttention(16, 4), name),
        lambda name: explain(Q, Q, Q, backend=name),
        backend_status,
    ],
    ids=["call", "sequence", "scope", "model", "explain", "status"],
)
def test_an_unknown_name_lists_the_nearest(wrong, near, use):
    with pytest.raises(UnknownBackendError) as caught:
        use(wrong)
    assert repr(near) in str(caught.value) or near in str(caught.value).split("Known:")[-1]


@pytest.mark.parametrize("request_", [3, 1.5, [], (), {}, object(), b"native", ["native", 3], ["auto", "native"]])
def test_what_is_no_request_is_refused(request_):
    with pytest.raises(InvalidCallError):
        dispatch_attention_fn(Q, Q, Q, backend=request_)
    with pytest.raises(InvalidCallError):
        attention_backend(request_)


def test_checks_refuse_a_mask_with_is_causal_and_only_when_on():
    mask = torch.ones(2, 1, 6, 6).bool().tril()
    for switch in (lambda on: set_checks(on), _documented_switch):
        dispatch_attention_fn(Q, Q, Q, mask, is_causal=True)
        switch(True)
        with pytest.raises(InvalidCallError, match="checks are on"):
            dispatch_attention_fn(Q, Q, Q, mask, is_causal=True)
        dispatch_attention_fn(Q, Q, Q, mask)
        dispatch_attention_fn(Q, Q, Q, is_causal=True)
        switch(False)
        dispatch_attention_fn(Q, Q, Q, mask, is_causal=True)


def _documented_switch(on: bool) -> None:
    from attention_dispatch import _AttentionBackendRegistry

    _AttentionBackendRegistry._checks_enabled = on
    assert _AttentionBackendRegistry._checks_enabled is on


def test_an_unknown_mode_of_checks_is_refused():
    with pytest.raises(ValueError, match="checks must be"):
        set_checks("everything")


def test_registering_a_taken_name_is_refused():
    with pytest.raises(InvalidCallError, match="already registered"):
        register_backend(get("native"))

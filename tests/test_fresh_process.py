"""What only a fresh interpreter shows: the first call compiled, counts of compilations, imports, the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

COMPILED = ("native", "_native_math", "_native_flash", "flex")


def run(code: str, **environment: str) -> str:
    """Run code in a fresh interpreter; its standard output. Fails with its standard error."""
    clean = {name: value for name, value in os.environ.items() if not name.endswith(("_ATTN_BACKEND", "_ATTN_CHECKS"))}
    clean = {name: value for name, value in clean.items() if not name.startswith("ATTENTION_DISPATCH_")}
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout.strip()


COMPILE = """
import sys
import torch
import attention_dispatch as ad
from attention_dispatch.testing import attend

name = sys.argv[1] if len(sys.argv) > 1 else NAME
generator = torch.Generator().manual_seed(0)
compilations = []

def counting(graph, inputs):
    compilations.append(graph)
    return graph.forward

def tensors(length, batch=2):
    return [torch.randn(batch, length, 2, 16, generator=generator) for _ in range(3)]

def step(query, key, value):
    return ad.dispatch_attention_fn(query * 1.0, key, value, is_causal=True, backend=name)

def check(function, length):
    query, key, value = tensors(length)
    out = function(query, key, value)
    expected, _ = attend(query.double(), key.double(), value.double(), is_causal=True)
    assert float((out - expected).abs().max()) < 1e-5, (name, length)
"""


@pytest.mark.parametrize("name", COMPILED)
def test_fullgraph_is_the_very_first_call_and_lengths_compile_twice_at_most(name):
    """The first call fixes a length, the second makes it symbolic; three more lengths cost nothing."""
    code = (
        f"NAME = {name!r}\n"
        + COMPILE
        + textwrap.dedent("""
        dynamic = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
        for length in (16, 24, 40, 33, 57):
            check(dynamic, length)
        print(len(compilations))
        torch.compiler.reset()
        compilations.clear()
        unmarked = torch.compile(step, fullgraph=True, backend=counting)
        for length in (16, 24, 40, 33, 57):
            check(unmarked, length)
        print(len(compilations))
        """)
    )
    marked, unmarked = map(int, run(code).split())
    assert marked <= 2
    assert unmarked <= 2


@pytest.mark.parametrize("way", ["nothing", "environment", "scope outside", "scope inside", "auto", "sequence"])
def test_fullgraph_first_whichever_way_the_backend_is_set(way):
    environment = {"ATTENTION_DISPATCH_BACKEND": "_native_math"} if way == "environment" else {}
    code = (
        "NAME = None\n"
        + COMPILE
        + textwrap.dedent(f"""
        import contextlib
        way = {way!r}
        backend = {{"auto": "auto", "sequence": ["flash", "_native_flash"]}}.get(way)
        outside = ad.attention_backend("flex") if way == "scope outside" else contextlib.nullcontext()

        def attend_in_scope(query, key, value):
            with ad.attention_backend("_native_math"):
                return ad.dispatch_attention_fn(query, key, value, is_causal=True)

        def attend_plainly(query, key, value):
            return ad.dispatch_attention_fn(query, key, value, is_causal=True, backend=backend)

        function = attend_in_scope if way == "scope inside" else attend_plainly
        with outside:
            check(torch.compile(function, fullgraph=True, backend=counting), 24)
        print(len(compilations))
        """)
    )
    assert run(code, **environment) == "1"


@pytest.mark.parametrize("name", COMPILED)
def test_gradients_under_fullgraph(name):
    code = (
        f"NAME = {name!r}\n"
        + COMPILE
        + textwrap.dedent("""
        leaves = [tensor.requires_grad_() for tensor in tensors(24)]
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        try:
            grads = torch.autograd.grad(compiled(*leaves).sum(), leaves)
        except ad.BackendRejectedError as error:
            print("refused", *error.codes)
        else:
            wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
            expected = torch.autograd.grad(attend(*wide, is_causal=True)[0].sum(), wide)
            assert all(float((a - b).abs().max()) < 1e-4 for a, b in zip(grads, expected))
            print("computed")
        """)
    )
    if name != "flex":
        assert run(code) == "computed"
        return
    # flex is forward-only on a CPU; a refusal while compiling must name the reason, whatever dynamo wraps it in.
    code = code.replace("except ad.BackendRejectedError as error:", "except Exception as error:")
    code = code.replace('print("refused", *error.codes)', 'print("refused" if "forward-only" in str(error) else error)')
    assert run(code) == "refused"


def test_backends_that_were_never_used_before_meet_in_one_graph():
    code = """
    import torch, torch.nn as nn, torch.nn.functional as F
    import attention_dispatch as ad

    class Attention(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, torch.cat([x, x], -1))[..., :16]

    model = nn.Sequential(*(Attention() for _ in range(4)))
    x = torch.randn(1, 2, 8, 16)
    plain = model(x)
    ad.set_attention_backend(model, {"0": "native", "1": "_native_math", "2": "reference"})
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), plain)
    ad.set_attention_backend(model, {"0": "native", "3": "_native_flash"})
    try:
        compiled(x)
    except ad.BackendRejectedError as error:
        print(error.reasons[0].code)
    """
    assert run(code) == "head_dim_v"


def test_switching_between_calls_is_respected_and_compiles_once_per_setting():
    code = COMPILE.replace("backend=name)", ")") + textwrap.dedent("""
        from attention_dispatch.registry import get, register_backend, Backend

        native = get("native")
        # The value of a backend is its sign of life: each multiplies the output by its own number.
        for factor in (2.0, 3.0):
            def forward(call, factor=factor):
                out = native.forward(call)
                return out._replace(out=out.out * factor)
            register_backend(Backend(f"times_{factor:g}", "test", get("native").capabilities, forward))
        compiled = torch.compile(step, fullgraph=True, backend=counting)
        query, key, value = tensors(16)
        plain = step(query, key, value)
        for _ in range(2):
            for factor in (2.0, 3.0):
                with ad.attention_backend(f"times_{factor:g}"):
                    assert torch.allclose(compiled(query, key, value), plain * factor), factor
            assert torch.allclose(compiled(query, key, value), plain)
        print(len(compilations))
        """)
    assert run(code.replace("sys.argv[1] if len(sys.argv) > 1 else NAME", "None")) == "3"


def test_switching_a_model_between_calls_is_respected():
    code = COMPILE.replace("sys.argv[1] if len(sys.argv) > 1 else NAME", "None") + textwrap.dedent("""
        from attention_dispatch.registry import get, register_backend, Backend
        import torch.nn.functional as F

        native = get("native")
        def forward(call):
            out = native.forward(call)
            return out._replace(out=out.out * 2.0)
        register_backend(Backend("twice", "test", get("native").capabilities, forward))

        class Plain(torch.nn.Module):
            def forward(self, x):
                return F.scaled_dot_product_attention(x, x, x)

        class Dispatching(torch.nn.Module):
            _attention_backend = None
            def forward(self, x):
                return ad.dispatch_attention_fn(x, x, x, backend=self._attention_backend)

        for model in (Plain(), Dispatching()):
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
            x = tensors(16)[0]
            plain = model(x)
            assert torch.allclose(compiled(x), plain)
            ad.set_attention_backend(model, "twice")
            assert torch.allclose(compiled(x), 2 * plain), type(model)
            ad.reset_attention_backend(model)
            assert torch.allclose(compiled(x), plain), type(model)
        print("respected")
        """)
    assert run(code) == "respected"


BLOCKED = """
import builtins, sys

VENDORS = ("flash_attn", "flash_attn_interface", "sageattention", "xformers", "triton", "kernels", "diffusers",
           "transformers", "aiter", "torch_npu", "torch_xla")
asked = []
original = builtins.__import__

def guarded(name, globals=None, locals=None, fromlist=(), level=0):
    if level == 0 and name.partition(".")[0] in VENDORS:
        importer = (globals or {}).get("__name__", "")
        if importer.partition(".")[0] != "torch":
            asked.append((name, importer))
            raise ImportError(f"{name} is blocked")
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = guarded
"""


def test_importing_listing_and_calling_work_without_any_vendor():
    code = BLOCKED + textwrap.dedent("""
        import torch
        import attention_dispatch as ad

        names = ad.list_backends()
        assert {"native", "flex", "reference", "flash", "sage", "xformers"} <= set(names), names
        query = torch.randn(1, 8, 2, 16)
        with ad.attention_backend(["flash", "sage", "native"]):
            out = ad.dispatch_attention_fn(query, query, query)
        assert out.shape == (1, 8, 2, 16)
        ad.dispatch_attention_fn(query, query, query, backend="auto")
        print([name for name, importer in asked if importer.startswith("attention_dispatch")])
        """)
    assert run(code) == "[]"


def test_importing_and_listing_import_no_vendor():
    code = """
        import sys
        import attention_dispatch as ad
        before = set(sys.modules)
        ad.list_backends()
        import attention_dispatch.testing
        vendors = ("flash_attn", "flash_attn_interface", "sageattention", "xformers", "kernels", "diffusers",
                   "transformers", "aiter", "hypothesis", "pytest", "numpy.testing")
        print([name for name in vendors if name in sys.modules])
    """
    assert run(code) == "[]"


@pytest.mark.parametrize("variable", ["ATTENTION_DISPATCH_BACKEND", "DIFFUSERS_ATTN_BACKEND"])
def test_a_wrong_name_in_the_environment_raises_at_first_use_with_the_nearest(variable):
    code = """
        import torch
        import attention_dispatch as ad
        query = torch.randn(1, 4, 1, 8)
        ad.dispatch_attention_fn(query, query, query, backend="native")
        try:
            ad.dispatch_attention_fn(query, query, query)
        except ad.UnknownBackendError as error:
            print("flex" in str(error) and "flexx" in str(error))
    """
    assert run(code, **{variable: "flexx"}) == "True"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ATTENTION_DISPATCH_BACKEND": "reference"}, "reference"),
        ({"DIFFUSERS_ATTN_BACKEND": "_native_math"}, "_native_math"),
        ({"ATTENTION_DISPATCH_BACKEND": "reference", "DIFFUSERS_ATTN_BACKEND": "flexx"}, "reference"),
        ({"ATTENTION_DISPATCH_BACKEND": "flash, _native_math"}, "_native_math"),
        ({"ATTENTION_DISPATCH_BACKEND": "AUTO"}, "native"),
        ({"ATTENTION_DISPATCH_BACKEND": ""}, "native"),
        ({}, "native"),
    ],
)
def test_the_environment_is_the_last_setting_asked(environment, expected):
    code = """
        import torch
        import attention_dispatch as ad
        query = torch.randn(1, 4, 1, 8)
        print(ad.explain(query, query, query).backend)
        with ad.attention_backend("flex"):
            print(ad.explain(query, query, query).backend)
    """
    assert run(code, **environment).split() == [expected, "flex"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"ATTENTION_DISPATCH_CHECKS": "1"}, "True"),
        ({"DIFFUSERS_ATTN_CHECKS": "yes"}, "True"),
        ({"DIFFUSERS_ATTN_CHECKS": "0"}, "False"),
        ({}, "False"),
    ],
)
def test_checks_can_be_switched_on_by_the_environment(environment, expected):
    code = """
        import attention_dispatch as ad
        print(ad._AttentionBackendRegistry._checks_enabled)
    """
    assert run(code, **environment) == expected

"""The records are well formed, and ``record.py`` reads them out of a source tree without importing it."""

from __future__ import annotations

import json
import sys

import pytest

from contracts import RECORDS, load_record, names
from contracts.record import SOURCES, describe, main

SOURCE = """
raise RuntimeError("this module must not be imported")

class Attention(Function):
    @staticmethod
    def forward(ctx, q, scale, return_lse):
        def helper():
            return "not the function's own"
        return (q, scale) if return_lse else q

def attention(q, /, k, *, scale: float = 1.0 / 8, window=(-1, -1), **kwargs):
    k -= k.mean()
    return Attention.apply(q, scale, window)

def pair(q):
    result = (q,)
    return result
"""


def test_every_record_has_a_source_and_every_source_a_record():
    assert set(names()) == set(SOURCES)


@pytest.mark.parametrize("name", names())
def test_record_is_well_formed(name):
    contract = load_record(name)
    source = SOURCES[name]
    assert (contract.record, contract.distribution, contract.version) == (name, source.distribution, source.version)
    assert contract.origin.startswith("https://")
    assert set(contract.functions) == {function.removesuffix(source.suffix) for function in source.functions}
    for function in contract.functions.values():
        parameters = function.signature.parameters
        assert function.returns
        assert function.convention in {"tensor", "tuple", "either", "delegated"}
        assert function.unused | function.in_place <= set(parameters)


def test_describe_reads_parameters_returns_and_body():
    described = describe(SOURCE, ("attention", "pair"))
    assert described["attention"] == {
        "parameters": [
            {"name": "q", "kind": "POSITIONAL_ONLY"},
            {"name": "k", "kind": "POSITIONAL_OR_KEYWORD"},
            {"name": "scale", "kind": "KEYWORD_ONLY", "default": "1.0 / 8"},
            {"name": "window", "kind": "KEYWORD_ONLY", "default": "(-1, -1)"},
            {"name": "kwargs", "kind": "VAR_KEYWORD"},
        ],
        "returns": ["(q, scale) if return_lse else q"],
        "convention": "either",
        "unused": ["kwargs"],
        "in_place": ["k"],
    }
    assert described["pair"]["convention"] == "tuple"


def test_missing_function_is_an_error():
    with pytest.raises(LookupError, match="absent"):
        describe(SOURCE, ("attention", "absent"))


def test_regeneration_from_a_source_tree(tmp_path):
    original = json.loads((RECORDS / "sageattention-1.0.6.json").read_text())
    package = tmp_path / "sageattention"
    package.mkdir()
    definitions = []
    for name, fields in original["functions"].items():
        arguments = ", ".join(_declared(parameter) for parameter in fields["parameters"])
        body = "".join(f"    return {value}\n" for value in fields["returns"])
        reads = " ".join(p["name"] + ";" for p in fields["parameters"] if p["name"] not in fields["unused"])
        definitions.append(f"def {name}({arguments}):\n    k -= km\n    {reads}\n{body}")
    (package / "core.py").write_text("import triton_that_is_not_installed\n" + "\n".join(definitions))

    assert main(["sageattention-1.0.6", "--source", str(tmp_path), "--into", str(tmp_path)]) == 0

    assert json.loads((tmp_path / "sageattention-1.0.6.json").read_text()) == original
    assert "triton_that_is_not_installed" not in sys.modules


def test_record_without_a_wheel_asks_for_its_source(capsys):
    with pytest.raises(SystemExit):
        main(["flash_attn-2.8.3"])
    assert "--source" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "function", "facts"),
    [
        ("sageattention-1.0.6", "sageattn", {"in_place": {"k"}, "unused": {"kwargs"}}),
        ("sageattention-2.2.0", "sageattn", {"in_place": set(), "unused": {"kwargs"}}),
        ("hub-aiter_flash_attn_ck-v1", "flash_attn_func", {"unused": {"kwargs"}, "convention": "either"}),
        ("flash_attn_3-tuple", "flash_attn_func", {"convention": "tuple"}),
        ("flash_attn_3-tensor", "flash_attn_func", {"convention": "tensor"}),
        ("flash_attn_3-optional", "flash_attn_func", {"convention": "either"}),
        ("flash_attn_4-4.0.0b36", "flash_attn_func", {"convention": "tuple"}),
    ],
)
def test_facts_that_adapters_rely_on(name, function, facts):
    recorded = load_record(name).functions[function]
    assert {fact: getattr(recorded, fact) for fact in facts} == facts


@pytest.mark.parametrize(
    ("name", "function", "parameter", "default"),
    [
        ("torch_npu-2.13.0", "npu_fusion_attention", "scale", 1.0),
        ("torch_xla-2.9.0", "flash_attention", "sm_scale", 1.0),
        ("flash_attn_4-4.0.0b36", "flash_attn_func", "window_size", (None, None)),
        ("aiter-0.1.7", "flash_attn_func", "window_size", (-1, -1)),
        ("hub-aiter_flash_attn_ck-v1", "flash_attn_func", "window_size", (-1, -1, 0)),
        ("flash_attn-2.8.3", "flash_attn_func", "softmax_scale", None),
    ],
)
def test_defaults_that_differ_between_vendors(name, function, parameter, default):
    parameters = load_record(name).functions[function].signature.parameters
    assert parameters[parameter].default == default


@pytest.mark.parametrize("name", ["kernels-0.12.3", "kernels-0.17.2"])
def test_a_hub_kernel_can_be_pinned_to_a_version_in_every_supported_library(name):
    assert {"repo_id", "version"} <= set(load_record(name).functions["get_kernel"].signature.parameters)


def test_only_the_newest_flash_3_can_be_asked_for_its_lse():
    with_argument = [
        name
        for name in names()
        if name.startswith("flash_attn_3-")
        and "return_attn_probs" in load_record(name).functions["flash_attn_func"].signature.parameters
    ]
    assert with_argument == ["flash_attn_3-optional"]


def _declared(parameter: dict) -> str:
    prefix = {"VAR_KEYWORD": "**", "VAR_POSITIONAL": "*"}.get(parameter["kind"], "")
    default = f"={parameter['default']}" if "default" in parameter else ""
    return f"{prefix}{parameter['name']}{default}"

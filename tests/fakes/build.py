"""Functions with a recorded signature and a fake body."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

from contracts import FunctionContract, load_record
from fakes import aiter, flash, npu, sage, xformers, xla

_BODIES: dict[str, Callable[[FunctionContract, str, SimpleNamespace], object]] = {
    "flash_attn-": flash.flash_2,
    "flash_attn_3-": flash.flash_3,
    "flash_attn_4-": flash.flash_4,
    "hub-flash_attn2-": flash.flash_2,
    "hub-flash_attn3-": flash.flash_3,
    "hub-flash_attn4-": flash.flash_4,
    "sageattention-1": sage.sage_1,
    "sageattention-2": sage.sage_2,
    "hub-sage_attention-": sage.sage_2,
    "xformers-": xformers.memory_efficient_attention,
    "torch_npu-": npu.npu_fusion_attention,
    "torch_xla-": xla.flash_attention,
    "aiter-": aiter.flash_attn,
    "hub-aiter_flash_attn_ck-": aiter.flash_attn,
}


@dataclass
class FakeCalls:
    """What was asked of one fake: the bound arguments of each call, and the arguments it swallowed without using."""

    calls: list[tuple[str, dict]] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)

    def named(self, function: str) -> list[dict]:
        """Arguments of the calls of ``function``, defaults filled in."""
        return [arguments for name, arguments in self.calls if name == function]


def functions(record: str, calls: FakeCalls | None = None) -> dict[str, Callable]:
    """Fake functions of ``record``, by name. ``calls`` collects what they are called with."""
    body = next(body for prefix, body in _BODIES.items() if record.startswith(prefix))
    contract = load_record(record)
    calls = FakeCalls() if calls is None else calls
    return {name: _function(function, record, body, calls) for name, function in contract.functions.items()}


def _function(contract: FunctionContract, record: str, body: Callable, calls: FakeCalls) -> Callable:
    def fake(*args, **kwargs):
        bound = contract.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        swallowed = {name for name in contract.unused if _is_var_keyword(contract, name)}
        for name in swallowed:
            calls.dropped += [(contract.name, dropped) for dropped in arguments.pop(name)]
        calls.calls.append((contract.name, arguments))
        return body(contract, record, SimpleNamespace(**arguments))

    functools.update_wrapper(fake, SimpleNamespace(__name__=contract.name, __doc__=f"Fake of {record}"))
    fake.__signature__ = contract.signature
    fake.fake_calls = calls
    return fake


def _is_var_keyword(contract: FunctionContract, name: str) -> bool:
    return contract.signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD

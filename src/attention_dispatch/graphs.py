"""The choice of a backend in a graph that torch.compile traces: a constant of the graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import refusal
from .call import AttentionCall, AttentionOutput, CallSpec
from .errors import AttentionDispatchError
from .request import Request
from .resolve import plan_for


class TracedForwards:
    """Forward passes as attributes: Dynamo reads a dict once per graph, and a later call in the same graph may be the
    first ever of its backend."""


# Which backend every kind of call got that was traced into a graph; a graph itself cannot be asked.
traced_choices: dict[tuple[Request, CallSpec], str] = {}


@torch._dynamo.assume_constant_result
def traced_choice(mode: str, names: tuple[str, ...], *facts: Any) -> str:
    """An attribute of :class:`TracedForwards` for a request and a :class:`~attention_dispatch.call.CallSpec`.

    A decision imports, locks and formats, which cannot be traced; nor can an error be raised while it is made, so a
    refused call gets a function that raises.
    """
    request, spec = Request(mode, names), CallSpec(*facts)
    try:
        backend = plan_for(request, spec).backend
    except AttentionDispatchError as error:
        refused = f"refused: {request} {spec}"
        refusal.remember(refused, error)
        return _attribute(refused, partial(refusal.raised, refused))
    traced_choices[request, spec] = backend.name
    return _attribute(backend.name, backend.forward)


def _attribute(key: str, forward: Callable[[AttentionCall], AttentionOutput]) -> str:
    name = f"of_{key.encode().hex()}"  # Dynamo's names of attributes hold no dots
    setattr(TracedForwards, name, staticmethod(forward))
    return name

"""Perturbed attention guidance of diffusers (``skip_attention_scores``) on every backend."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from diffusers.hooks import layer_skip

from ..call import AttentionOutput
from ..request import current

_upstream_skip = layer_skip.AttentionProcessorSkipHook.new_forward


def skip_scores(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``AttentionProcessorSkipHook.new_forward`` for perturbed attention guidance (``skip_attention_scores``).

    diffusers watches for calls of torch's function, which most backends do not make.
    """
    if not self.skip_attention_scores or not math.isclose(self.dropout, 1.0):
        return _upstream_skip(self, module, *args, **kwargs)
    return _skip_scores_eagerly(self, module, *args, **kwargs)


@torch.compiler.disable(reason="attention scores are skipped outside of compiled graphs")
def _skip_scores_eagerly(self: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with _values_as_outputs():
        return _upstream_skip(self, module, *args, **kwargs)


@contextmanager
def _values_as_outputs() -> Iterator[None]:
    """Attention of this thread gives the values themselves, where there are as many as queries."""
    outer = current.observer

    def observe(call: Any, spec: Any, request: Any, plan: Any, output: AttentionOutput) -> AttentionOutput:
        if outer is not None:
            output = outer(call, spec, request, plan, output)
        if call.key.shape[1] != call.query.shape[1]:
            return output
        repeats = call.query.shape[2] // call.value.shape[2]
        value = call.value if repeats == 1 else call.value.repeat_interleave(repeats, dim=2)
        return AttentionOutput(value, output.lse)

    current.observer = observe
    current.refresh()
    try:
        yield
    finally:
        current.observer = outer
        current.refresh()

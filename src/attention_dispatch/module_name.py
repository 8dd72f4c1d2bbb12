"""Which module is running its forward, by name."""

from __future__ import annotations

import inspect
import weakref

import torch.nn as nn

_MODULE_CALL = nn.Module._call_impl.__code__
_names: weakref.WeakKeyDictionary[nn.Module, dict[int, str]] = weakref.WeakKeyDictionary()


def module_name() -> str:
    """Name of the innermost module whose forward is running, in the outermost one; empty outside of modules.

    Read from the stack, so that modules need no hooks.
    """
    running: list[nn.Module] = []
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _MODULE_CALL:
            running.append(frame.f_locals["self"])
        frame = frame.f_back
    if not running:
        return ""
    inner, outer = running[0], running[-1]
    names = _names.get(outer)
    if names is None or id(inner) not in names:
        names = {id(module): name for name, module in outer.named_modules()}
        _names[outer] = names
    return names.get(id(inner)) or type(inner).__name__

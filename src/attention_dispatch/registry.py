"""The backends: a name, where its object lives, and how to install what it needs. Nothing is imported until used."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import NamedTuple

import torch

from .declaration import Backend, Row, unusable, what_is_wrong
from .errors import BackendUnavailableError, InvalidCallError, Reason, UnknownBackendError, unavailable_message

ENTRY_POINT_GROUP = "attention_dispatch.backends"


class Status(NamedTuple):
    """Whether a backend can be used on this machine; ``reasons`` say why not and what to type."""

    name: str
    available: bool
    reasons: tuple[Reason, ...]

    def __str__(self) -> str:
        if self.available:
            return f"{self.name}: available"
        return f"{self.name}: not available: " + "; ".join(f"{reason.what} -> {reason.fix}" for reason in self.reasons)


_HERE = "attention_dispatch.backends."

_rows: dict[str, Row] = {
    "_flash_3": Row(_HERE + "flash:FLASH_3"),
    "_flash_3_hub": Row(_HERE + "flash:FLASH_3_HUB"),
    "_flash_3_varlen_hub": Row(_HERE + "flash:FLASH_3_VARLEN_HUB"),
    "_flash_varlen_3": Row(_HERE + "flash:FLASH_VARLEN_3"),
    "_native_cudnn": Row(_HERE + "native:CUDNN"),
    "_native_efficient": Row(_HERE + "native:EFFICIENT"),
    "_native_flash": Row(_HERE + "native:FLASH"),
    "_native_math": Row(_HERE + "native:MATH"),
    "_native_npu": Row(_HERE + "npu:NPU"),
    "_native_xla": Row(_HERE + "xla:XLA"),
    "_sage_qk_int8_pv_fp16_cuda": Row(_HERE + "sage:SAGE_FP16_CUDA"),
    "_sage_qk_int8_pv_fp16_triton": Row(_HERE + "sage:SAGE_FP16_TRITON"),
    "_sage_qk_int8_pv_fp8_cuda": Row(_HERE + "sage:SAGE_FP8_CUDA"),
    "_sage_qk_int8_pv_fp8_cuda_sm90": Row(_HERE + "sage:SAGE_FP8_CUDA_SM90"),
    "aiter_fa2_hub": Row(_HERE + "aiter:AITER"),
    "flash": Row(_HERE + "flash:FLASH"),
    "flash_4": Row(_HERE + "flash:FLASH_4"),
    "flash_4_hub": Row(_HERE + "flash:FLASH_4_HUB"),
    "flash_hub": Row(_HERE + "flash:FLASH_HUB"),
    "flash_varlen": Row(_HERE + "flash:FLASH_VARLEN"),
    "flash_varlen_hub": Row(_HERE + "flash:FLASH_VARLEN_HUB"),
    "flex": Row(_HERE + "flex:FLEX"),
    "native": Row(_HERE + "native:NATIVE"),
    "reference": Row(_HERE + "reference:REFERENCE"),
    "sage": Row(_HERE + "sage:SAGE"),
    "sage_hub": Row(_HERE + "sage:SAGE_HUB"),
    "sage_varlen": Row(_HERE + "sage:SAGE_VARLEN"),
    "triton_flash": Row(_HERE + "triton:FLASH"),
    "triton_sage": Row(_HERE + "triton:SAGE"),
    "triton_sage_fp16": Row(_HERE + "triton:SAGE_FP16"),
    "xformers": Row(_HERE + "xformers:XFORMERS"),
}

registry: Mapping[str, Row] = MappingProxyType(_rows)
"""Read-only view of the registered rows."""

_states: dict[str, Status] = {}
# Of rows whose file fails to import, or holds no backend.
_stand_ins: dict[str, Backend] = {}
_causes: dict[str, BaseException] = {}
_lock = threading.RLock()
_plugins_read = False
_on_change: list[Callable[[], None]] = []


def register_backend(backend: Backend, *, install: str = "", replace: bool = False) -> None:
    """Add a backend to this process. Packages use the entry point group ``attention_dispatch.backends`` instead.

    Args:
        backend: the object; its ``name`` becomes a valid request.
        install: command that installs what it needs, shown when it is missing.
        replace: allow a name that is already registered.

    Raises:
        InvalidCallError: the name is taken and ``replace`` is False, or nobody could ask for it; or ``backend`` is no
            :class:`Backend` with capabilities.
    """
    wrong = what_is_wrong(backend)
    if wrong:
        raise InvalidCallError(f"{wrong} See docs/add-a-backend.md.")
    with _lock:
        if backend.name in _rows and not replace:
            raise InvalidCallError(f"backend {backend.name!r} is already registered. Pass replace=True to replace it.")
        _rows[backend.name] = Row(backend, install)
        _forget(backend.name)


def unregister_backend(name: str) -> None:
    """Remove a backend added by :func:`register_backend`."""
    with _lock:
        _rows.pop(name, None)
        _forget(name)


def forget_status(name: str) -> None:
    """Forget what was found out about a backend, for example after installing its package."""
    with _lock:
        _forget(name)


def _forget(name: str) -> None:
    _states.pop(name, None)
    _stand_ins.pop(name, None)
    _causes.pop(name, None)
    for notify in _on_change:
        notify()


def names() -> tuple[str, ...]:
    """All registered names, entry points included. Imports no backend."""
    global _plugins_read
    if not _plugins_read:
        with _lock:
            for entry in entry_points(group=ENTRY_POINT_GROUP):
                _rows.setdefault(entry.name.lower(), Row(entry.value, ""))
            _plugins_read = True
    return tuple(sorted(_rows))


def check_name(name: str) -> None:
    """Nothing for a registered name. Imports no backend, so that it can be traced.

    Raises:
        UnknownBackendError: no such name; the message has the nearest ones.
    """
    if name not in _rows and name not in names():
        raise UnknownBackendError(_unknown_message(name))


def get(name: str) -> Backend:
    """The backend object of a name. Imports the family's file, not the vendor.

    Raises:
        UnknownBackendError: no such name; the message has the nearest ones.
    """
    check_name(name)
    row = _rows[name]
    if isinstance(row.target, Backend):
        return row.target
    return _stand_ins.get(name) or _imported(name, row.target)


def _imported(name: str, target: str) -> Backend:
    """The object at ``"module:OBJECT"``. One broken package must not keep others from being listed or chosen."""
    module, _, attribute = target.partition(":")
    if module.startswith(_HERE):
        return getattr(import_module(module), attribute)
    cause: Exception | None = None
    try:
        backend = getattr(import_module(module), attribute)
        wrong = what_is_wrong(backend, name)
    except Exception as error:  # whatever a package's file raises is the status of its backend
        wrong, cause = f"importing {target} failed: {type(error).__name__}: {error}", error
    if wrong:
        backend = _stand_ins[name] = unusable(name, wrong, cause)
    return backend


def status(name: str) -> Status:
    """Whether a backend is usable, found once per process. Loads the vendor package if its metadata looks right."""
    known = _states.get(name)
    if known is not None:
        return known
    with _lock:
        known = _states.get(name)
        if known is None:
            known = _states[name] = _find_status(get(name), _rows[name].install)
    return known


def require(name: str) -> Backend:
    """The loaded backend.

    Raises:
        UnknownBackendError: no such name.
        BackendUnavailableError: it cannot be used here; the caught exception is chained.
    """
    backend = get(name)
    found = status(name)
    if not found.available:
        raise BackendUnavailableError(unavailable_message(name, found.reasons), found.reasons) from _causes.get(name)
    return backend


def _find_status(backend: Backend, install: str) -> Status:
    reasons: tuple[Reason, ...] = ()
    try:
        reasons = tuple(backend.probe())
        if not reasons:
            backend.load()
    except BackendUnavailableError as error:
        reasons = error.reasons
        _causes[backend.name] = error.__cause__ or error
    except Exception as error:  # whatever a vendor's import raises is that backend's status, not ours
        fix = f"reinstall it for this torch: {install}" if install else "reinstall the package for this torch."
        reasons = (Reason("import", f"importing it failed: {type(error).__name__}: {error}", fix),)
        _causes[backend.name] = error
    return Status(backend.name, not reasons, reasons)


def known_options() -> frozenset[str]:
    """Backend-specific attention_kwargs that at least one registered backend understands."""
    return frozenset(_known_options())


_options: list[tuple[str, ...]] = []
_on_change.append(_options.clear)


@torch._dynamo.assume_constant_result
def _known_options() -> tuple[str, ...]:
    if not _options:
        found = {option for name in names() for row in get(name).capabilities for option in row.options}
        _options.append(tuple(sorted(found)))
    return _options[0]


def _unknown_message(name: str) -> str:
    known = names()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    near += [
        candidate for candidate in known if name.strip("_") and name.strip("_") in candidate and candidate not in near
    ][:3]
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Known: {', '.join(known)}."
    return f"unknown attention backend {name!r}. {hint} All names: attention_dispatch.list_backends()."

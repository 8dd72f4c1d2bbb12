"""Every environment variable, once; and the two switches that can also be set in code.

| variable | meaning |
|---|---|
| ``ATTENTION_DISPATCH_BACKEND`` | request used when nothing nearer is set; a name, ``auto``, or names separated by commas |
| ``ATTENTION_DISPATCH_CHECKS`` | ``1``: verify every call; ``numerics``: also compare each distinct call with the oracle |
| ``ATTENTION_DISPATCH_CACHE`` | directory of the tuning store |
| ``ATTENTION_DISPATCH_SELF_TEST`` | ``0`` switches off the first-use numerical test of external kernels |
| ``ATTENTION_DISPATCH_FLEX_COMPILE`` | ``1``/``0``: compile FlexAttention on every device / on none (default: on all but CPU) |
| ``DIFFUSERS_ATTN_BACKEND``, ``DIFFUSERS_ATTN_CHECKS`` | honoured where the variable of this library is not set |
"""

from __future__ import annotations

import os
from collections.abc import Callable

from .errors import InvalidCallError

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"", "0", "false", "no", "off"}
_BACKEND_VARIABLES = ("ATTENTION_DISPATCH_BACKEND", "DIFFUSERS_ATTN_BACKEND")

# Called after a switch changed, so that decisions taken under the old value are forgotten.
_on_change: list[Callable[[], None]] = []


def _read(*names: str) -> str | None:
    for name in names:
        value = os.environ.get(name)
        if value:
            return value
    return None


def default_backend() -> str | list[str] | None:
    """The request in the environment, its names not yet validated; None when there is none.

    Raises:
        InvalidCallError: the variable holds nothing but commas.
    """
    value = _read(*_BACKEND_VARIABLES)
    if value is None:
        return None
    names = [name.strip() for name in value.split(",") if name.strip()]
    if not names:
        raise InvalidCallError(f"{default_backend_variable()}={value!r} names no backend. Unset it, or use 'native'.")
    return names if len(names) > 1 else names[0]


def default_backend_variable() -> str:
    """The variable that :func:`default_backend` comes from; empty when there is none."""
    return next((name for name in _BACKEND_VARIABLES if os.environ.get(name)), "")


def cache_dir() -> str | None:
    """Directory chosen for the tuning store; None leaves the choice to the platform."""
    return _read("ATTENTION_DISPATCH_CACHE")


def self_test_enabled() -> bool:
    """Whether kernels that are not torch's are checked numerically before their first use."""
    return (os.environ.get("ATTENTION_DISPATCH_SELF_TEST") or "1").lower() not in _FALSE


def flex_compile() -> bool | None:
    """Forced choice for compiling FlexAttention; None leaves it to the backend."""
    value = os.environ.get("ATTENTION_DISPATCH_FLEX_COMPILE")
    return None if not value else value.lower() in _TRUE


def _initial_checks() -> str:
    value = (_read("ATTENTION_DISPATCH_CHECKS", "DIFFUSERS_ATTN_CHECKS") or "").lower()
    if value in _FALSE:
        return ""
    return value if value == "numerics" else "calls"


_checks = _initial_checks()


def checks() -> str:
    """``""`` (off), ``"calls"`` or ``"numerics"``."""
    return _checks


def set_checks(mode: str | bool) -> None:
    """Switch the per-call checks of the process.

    Args:
        mode: True or ``"calls"``: every call verifies devices, dtypes, shapes and that no mask is mixed with
            ``is_causal``. ``"numerics"``: each distinct call is also repeated once on the reference. False: off.
    """
    global _checks
    value = {True: "calls", False: ""}.get(mode, mode) if isinstance(mode, bool) else mode
    if value not in ("", "calls", "numerics"):
        raise ValueError(f"checks must be True, False, 'calls' or 'numerics', got {mode!r}")
    _checks = value
    for notify in _on_change:
        notify()


class _ChecksSwitch(type):
    @property
    def _checks_enabled(cls) -> bool:
        return bool(_checks)

    @_checks_enabled.setter
    def _checks_enabled(cls, enabled: bool) -> None:
        set_checks(bool(enabled))


class _AttentionBackendRegistry(metaclass=_ChecksSwitch):
    """The documented switch: ``_AttentionBackendRegistry._checks_enabled = True``."""

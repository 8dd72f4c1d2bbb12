"""What a user may ask for, and whose wish counts: call > model > ``with`` scope > environment > native."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from enum import Enum
from typing import Any, NamedTuple

from . import registry, settings
from .errors import InvalidCallError, UnknownBackendError

AUTO = "auto"
AUTO_QUANTIZED = "auto_quantized"
ROLES = "roles"


class Request(NamedTuple):
    """A validated request.

    Attributes:
        mode: ``"demand"`` (one name, never falls back), ``"permission"`` (names in order), ``"auto"``,
            ``"auto_quantized"``, or ``"roles"`` (a request for self- and one for cross-attention, told apart by lengths).
        names: the backends of a demand or permission; the two requests of ``"roles"``.
    """

    mode: str
    names: tuple[Any, ...] = ()

    def for_lengths(self, q_len: int, k_len: int) -> Request:
        """The request itself, or for ``"roles"`` the one that counts for these lengths."""
        if self.mode != ROLES:
            return self
        found: Request = self.names[0] if q_len == k_len else self.names[1]
        return found

    def __str__(self) -> str:
        if self.mode == ROLES:
            return f"{self.names[0]} where q and k are equally long, else {self.names[1]}"
        if self.mode == "demand":
            return repr(self.names[0])
        return str(list(self.names)) if self.mode == "permission" else repr(self.mode)


NATIVE = Request("demand", ("native",))


def parse(request: Any) -> Request:
    """Validate a request: a name, a sequence of names, ``"auto"``, ``"auto_quantized"`` or a :class:`Request`.

    Names are case-insensitive; members of string enums are taken by value.

    Raises:
        UnknownBackendError: a name nobody registered, with the nearest names.
        InvalidCallError: not a request at all.
    """
    if isinstance(request, Request):
        return request
    if isinstance(request, str):
        name = _plain(request)
        if name in (AUTO, AUTO_QUANTIZED):
            return Request(name)
        registry.check_name(name)
        return Request("demand", (name,))
    if isinstance(request, Sequence) and request and all(isinstance(item, str) for item in request):
        names = tuple(dict.fromkeys(_plain(item) for item in request))
        for name in names:
            if name in (AUTO, AUTO_QUANTIZED):
                raise InvalidCallError(
                    f"{name!r} stands alone: it cannot be one name of a sequence, got {list(names)}."
                )
            registry.check_name(name)
        return Request("permission", names)
    raise InvalidCallError(
        f"a backend request is a name, a sequence of names, 'auto' or 'auto_quantized', got {request!r}."
    )


def _plain(name: str) -> str:
    value = name.value if isinstance(name, Enum) else name
    return str(value).lower()


class Observed(NamedTuple):
    """The effective setting while calls are recorded: unlike every other, so that no shortened path is taken."""

    request: Request | None
    observer: Any


def _field(name: str) -> property:
    def read(self: Settings) -> Any:
        return self.fields[name]

    def write(self: Settings, value: Any) -> None:
        self.fields[name] = value

    return property(read, write)


class Settings:
    """The settings of one thread.

    Attributes:
        model: the request of the innermost routed module whose forward is running; ``stack`` holds the outer ones, each
            with the setting of the module that replaced it.
        scope: the request of the innermost ``with attention_backend``; ``scopes`` holds those of all that are entered,
            outermost first, with None for one that was left before one inside it.
        observer: called after each call while calls are recorded.
        step: the denoising step, None outside of one; ``steps`` holds those of all scopes, as ``scopes`` does, and
            ``scheduled`` the requests of policies for the innermost.
        effective: what these amount to, kept so that a call reads one value.
        fields: what traced code writes. torch.compile (2.13) loses what it writes to an attribute, but not to a dict,
            after flex_attention in the same graph; and it guards on every value of a dict that it writes to.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {
            "model": None,
            "stack": [],
            "scope": None,
            "scopes": [],
            "observer": None,
            "effective": None,
        }
        self.steps: list[int | None] = []
        self.step: int | None = None
        self.scheduled: dict[str, Request] = {}

    model, stack, scope, scopes = (_field(name) for name in ("model", "stack", "scope", "scopes"))
    observer, effective = (_field(name) for name in ("observer", "effective"))

    def refresh(self) -> None:
        """Recompute ``effective`` after another field changed."""
        fields = self.fields
        model, observer = fields["model"], fields["observer"]
        request = fields["scope"] if model is None else model
        fields["effective"] = request if observer is None else Observed(request, observer)


def _of_thread(name: str) -> property:
    def read(self: _ThreadSettings) -> Any:
        return getattr(self.state, name)

    def write(self: _ThreadSettings, value: Any) -> None:
        setattr(self.state, name, value)

    return property(read, write)


class _ThreadSettings(threading.local):
    """The :class:`Settings` of the running thread, under ``state``, and each of its fields by name.

    A plain object holds them, because torch.compile (2.13) loses what traced code writes to a ``threading.local``.
    """

    def __init__(self) -> None:
        self.state = Settings()
        self.fields = self.state.fields
        with _threads_lock:
            _threads.add(self.state)

    model, stack, scope, scopes = (_of_thread(name) for name in ("model", "stack", "scope", "scopes"))
    step, steps, scheduled = (_of_thread(name) for name in ("step", "steps", "scheduled"))
    observer, effective = (_of_thread(name) for name in ("observer", "effective"))

    def refresh(self) -> None:
        """See :meth:`Settings.refresh`."""
        self.state.refresh()


_threads: weakref.WeakSet[Settings] = weakref.WeakSet()
_threads_lock = threading.Lock()


def of_all_threads() -> list[Settings]:
    """The settings of every thread that has made a call and still runs."""
    with _threads_lock:
        return list(_threads)


current = _ThreadSettings()

_environment: Request | None = None
_environment_variable = ""


def environment() -> Request:
    """The request of the environment, validated at first use; native when there is none."""
    global _environment, _environment_variable
    if _environment is None:
        wanted = settings.default_backend()
        _environment_variable = settings.default_backend_variable()
        try:
            _environment = NATIVE if wanted is None else parse(wanted)
        except (UnknownBackendError, InvalidCallError) as error:
            # Nothing in the caller's program names it, so the message has to say where it comes from.
            raise type(error)(f"{error} The environment variable {_environment_variable} asks for it.") from None
    return _environment


def environment_variable() -> str:
    """The variable that :func:`environment` was read from; empty where it was none."""
    environment()
    return _environment_variable


def forget_environment() -> None:
    """Read the environment variables again at the next call."""
    global _environment
    _environment = None
    for notify in settings._on_change:
        notify()


def leave(entered: list[Any], index: int) -> Any:
    """Take one scope out of a thread's list, in whatever order they end.

    Args:
        entered: what each scope set, outermost first; changed in place.
        index: the place of the scope that ends.

    Returns:
        What the innermost scope that is left set; None if there is none.
    """
    entered[index] = None
    while entered:
        if entered[-1] is not None:
            return entered[-1]
        entered.pop()
    return None


class attention_backend:  # lower case: it is used like a function, as in diffusers
    """Scope in which attention calls of this thread use ``request``, unless a call or a model says otherwise.

    Leaving the scope, by an exception too, restores what was there. Scopes nest; other threads are not affected. The
    innermost scope counts, also where scopes end in another order than they nest, as in generators and coroutines: one
    that ends takes away its own request and no other. While a generator or coroutine waits inside a scope, the scope
    counts for everything else that the thread runs. Threads that are in a scope at the same time need an object each.

    Args:
        request: a name, a sequence of names, ``"auto"`` or ``"auto_quantized"``.

    Raises:
        UnknownBackendError: at construction, with the nearest names.

    Example:
        >>> import torch, attention_dispatch as ad
        >>> q = k = v = torch.randn(1, 16, 2, 32)
        >>> with ad.attention_backend("reference"):
        ...     out = ad.dispatch_attention_fn(q, k, v)
        >>> out.shape
        torch.Size([1, 16, 2, 32])
    """

    __slots__ = ("_place", "request")

    def __init__(self, request: Any = "native"):
        self.request = parsed(request)
        # Thread and index in its list; then the same of the time before that this object was entered and not left yet.
        self._place: Any = None

    def __enter__(self) -> attention_backend:
        state = current.state
        fields = state.fields
        scopes = fields["scopes"]
        self._place = (state, len(scopes), self._place)
        scopes.append(self.request)
        fields["scope"] = self.request
        state.refresh()
        return self

    def __exit__(self, *exception: object) -> None:
        # A generator may end in another thread than it began in.
        state, index, self._place = self._place
        state.fields["scope"] = leave(state.fields["scopes"], index)
        state.refresh()


_parsed: dict[Any, Request] = {}


def parsed(request: Any) -> Request:
    """:func:`parse`, remembered for hashable requests."""
    if isinstance(request, list):
        # Traced, looking up what cannot be hashed raises nothing.
        return parse(request)
    try:
        found = _parsed.get(request)
    except TypeError:
        return parse(request)
    if found is None:
        found = parse(request)
        _parsed[request] = found
    return found


registry._on_change.append(_parsed.clear)

"""What was measured on this machine, in one readable JSON file per environment and device type.

Read once per process. Reading never fails: a corrupt or foreign file is a miss with one warning. Writing merges with what
other processes wrote meanwhile, under a lock that dies with its process, and replaces the file in one step; a directory
that cannot be written to costs one warning, and the results stay in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .. import settings
from ..call import CallSpec
from . import environment

FORMAT = 1
POLICIES = ("eager", "graph")
_ABANDONED_AFTER_S = 3600.0


class Extent(NamedTuple):
    """The sizes of a call that its spec leaves out.

    Attributes:
        batch, q_len, k_len: sizes.
        contiguous: whether q, k and v are contiguous as (batch, seq, heads, head_dim).
    """

    batch: int
    q_len: int
    k_len: int
    contiguous: bool = True


# Called when choices or verdicts changed, so that decisions taken before are forgotten.
on_change: list[Callable[[], None]] = []

_lock = threading.RLock()
_generation = 0
_loaded: dict[str, dict[str, Any]] = {}
_warned: set[str] = set()


def directory() -> Path:
    """Where the store lives: ``ATTENTION_DISPATCH_CACHE``, else the user's cache directory."""
    chosen = settings.cache_dir()
    if chosen:
        return Path(chosen).expanduser()
    try:
        from platformdirs import user_cache_dir
    except ImportError:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attention-dispatch"
    return Path(user_cache_dir("attention-dispatch", appauthor=False))


def path(device: str) -> Path:
    """The file of a device type in this process's environment."""
    return directory() / f"tuning-{device}-{environment.fingerprint(environment.manifest(device))}.json"


def key(spec: CallSpec, extent: Extent, policy: str = "eager") -> str:
    """Readable key of all calls that share one measurement: facts, and sizes rounded to half octaves."""
    return f"{_facts(spec)} strides={'dense' if extent.contiguous else 'views'} {_sizes(extent)} policy={policy}"


def rounded(size: int) -> int:
    """The nearest of 1, 1.4, 2, 2.8, 4 ... times the powers of two; sizes that round alike share a choice."""
    if size <= 1:
        return size
    octave = size.bit_length() - 1
    # 2^(1/4) and 2^(3/4) divide an octave around its lower end, its middle and the next power.
    position = size / (1 << octave)
    if position < 1.189:
        return 1 << octave
    return round((1 << octave) * 1.4142) if position < 1.682 else 1 << (octave + 1)


def _facts(spec: CallSpec) -> str:
    device = f"{spec.device}:{spec.architecture}" if spec.architecture else spec.device
    flags = [
        name
        for name in ("mask_per_head", "mask_grad", "is_causal", "window", "softcap", "dropout", "grad", "lse")
        if getattr(spec, name)
    ]
    flags += ["deterministic"] if spec.deterministic else []
    flags += list(spec.options)
    return (
        f"{device} {str(spec.dtype).removeprefix('torch.')} heads={spec.heads}/{spec.kv_heads} "
        f"head_dim={spec.head_dim}/{spec.head_dim_v} mask={spec.mask} flags={'+'.join(flags) or 'none'} "
        f"lengths={spec.lengths}"
    )


def _sizes(extent: Extent) -> str:
    return f"batch~{rounded(extent.batch)} q~{rounded(extent.q_len)} k~{rounded(extent.k_len)}"


def measured(spec: CallSpec, extent: Extent | None) -> dict[str, Any] | None:
    """The entry for a call, or None; where the sizes are not known, one on whose choices all sizes agree."""
    entries: dict[str, Any] = _content(spec.device)["entries"]
    if not entries:
        return None
    if extent is not None:
        for policy in POLICIES:
            entry = entries.get(key(spec, extent, policy))
            if entry is not None:
                return entry
        return None
    prefix = _facts(spec) + " strides="
    alike = [entry for name, entry in entries.items() if name.startswith(prefix)]
    choices = {(entry["exact"], entry.get("quantised")) for entry in alike}
    return alike[0] if len(choices) == 1 else None


def ranking(spec: CallSpec, extent: Extent | None, quantised: bool) -> tuple[str, ...]:
    """Measured backends for a call, the choice first and the others by time; empty if nothing was measured."""
    entry = measured(spec, extent)
    if entry is None:
        return ()
    choice = entry.get("quantised") if quantised and entry.get("quantised") else entry["exact"]
    exact = [name for name in entry["times_us"] if quantised or name not in entry["quantised_names"]]
    others = sorted((name for name in exact if name != choice), key=lambda name: entry["times_us"][name])
    return (choice, *others) if choice else tuple(others)


def entries(device: str) -> dict[str, Any]:
    """All entries of a device type by key."""
    return dict(_content(device)["entries"])


def verdicts(device: str) -> dict[str, Any]:
    """What the last checks found, by backend."""
    return dict(_content(device)["verdicts"])


def verdict(backend: str, device: str) -> dict[str, Any] | None:
    """The verdict of the last check of a backend, or None if it was never checked here."""
    found: dict[str, Any] | None = _content(device)["verdicts"].get(backend)
    return found


def tiles(device: str) -> dict[str, Any]:
    """Measured tile shapes of this project's kernels, by what they hold for."""
    return dict(_content(device)["tiles"])


def add(
    device: str,
    entries: dict[str, Any] | None = None,
    verdicts: dict[str, Any] | None = None,
    tiles: dict[str, Any] | None = None,
    save: bool = True,
) -> None:
    """Take over measurements and verdicts, at once for this process and, with ``save``, on disk."""
    news = {"entries": entries or {}, "verdicts": verdicts or {}, "tiles": tiles or {}}
    with _lock:
        merged = _merge(_content(device), news)
        if save:
            try:
                with _exclusive(directory()):
                    merged = _merge(_merge(_read(device), merged), news)
                    _write(device, merged)
            except OSError as error:
                _warn_once(
                    "write", f"the tuning store in {directory()} cannot be written ({error}); results last until exit."
                )
        _loaded[device] = merged
    _notify()


def clear() -> list[Path]:
    """Delete the files of all environments; returns what was deleted."""
    found = sorted(directory().glob("tuning-*.json"))
    for file in found:
        file.unlink(missing_ok=True)
    reload()
    return found


def export(device: str) -> dict[str, Any]:
    """Everything of a device type, as :func:`adopt` takes it."""
    return {"format": FORMAT, "environment": environment.manifest(device), **_content(device)}


def adopt(data: Any) -> int:
    """Merge what :func:`export` gave in the same environment; returns the number of entries.

    Raises:
        ValueError: not such data, or of another environment; the message names the differences.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("entries"), dict):
        raise ValueError("this is not a file that `attention-dispatch tune --export` wrote.")
    there = data.get("environment") or {}
    device = str(there.get("device", "cpu"))
    here = environment.manifest(device)
    differences = [
        f"{name}: {there.get(name, 'absent')} there, {here.get(name, 'absent')} here"
        for name in sorted({*here, *there})
        if here.get(name) != there.get(name)
    ]
    if differences:
        raise ValueError("it was measured in another environment (" + "; ".join(differences) + "). Tune here instead.")
    valid = _valid(data)
    add(device, valid["entries"], valid["verdicts"], valid["tiles"])
    return len(valid["entries"]) + len(valid["tiles"])


def reload() -> None:
    """Read the file again at the next decision."""
    with _lock:
        _loaded.clear()
        _warned.clear()
    _notify()


def generation() -> int:
    """A number that grows with every change of choices or verdicts.

    A decision is made from what was stored when it began. Whoever remembers one looks at this number before and after,
    and forgets again what another thread's change has overtaken.
    """
    return _generation


def _notify() -> None:
    global _generation
    with _lock:
        _generation += 1
    for notify in on_change:
        notify()


def _content(device: str) -> dict[str, Any]:
    content = _loaded.get(device)
    if content is None:
        with _lock:
            content = _loaded.get(device) or _read(device)
            _loaded[device] = content
    return content


def _read(device: str) -> dict[str, Any]:
    file = path(device)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return _valid({})
    except (OSError, ValueError) as error:
        _warn_once(str(file), f"the tuning store {file} cannot be read ({error}); nothing in it is used.")
        return _valid({})
    right = isinstance(data, dict) and data.get("format") == FORMAT
    if not right or data.get("environment") != environment.manifest(device):
        _warn_once(str(file), f"the tuning store {file} is of another format or environment; nothing in it is used.")
        return _valid({})
    return _valid(data)


def _valid(data: dict[str, Any]) -> dict[str, Any]:
    """Entries, verdicts and tiles that have what readers rely on."""
    entries, verdicts, tiles = data.get("entries"), data.get("verdicts"), data.get("tiles")
    return {
        "entries": {
            name: entry
            for name, entry in (entries.items() if isinstance(entries, dict) else ())
            if isinstance(entry, dict)
            and isinstance(entry.get("exact"), str)
            and isinstance(entry.get("quantised_names"), list)
            and isinstance(entry.get("times_us"), dict)
            and all(isinstance(value, (int, float)) for value in entry["times_us"].values())
        },
        "verdicts": {
            name: found
            for name, found in (verdicts.items() if isinstance(verdicts, dict) else ())
            if isinstance(found, dict) and isinstance(found.get("state"), str)
        },
        "tiles": {
            name: entry
            for name, entry in (tiles.items() if isinstance(tiles, dict) else ())
            if isinstance(entry, dict) and isinstance(entry.get("tile"), dict)
        },
    }


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {part: {**old[part], **new[part]} for part in ("entries", "verdicts", "tiles")}


def _write(device: str, content: dict[str, Any]) -> None:
    file = path(device)
    data = {"format": FORMAT, "environment": environment.manifest(device), **content}
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(data, stream, indent=1, sort_keys=True)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    for leftover in file.parent.glob("tuning-*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _ABANDONED_AFTER_S:
                leftover.unlink()


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """One writer at a time. The lock is the operating system's, so that a killed writer leaves none behind."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        # Without file locks, two writers at once may lose one's entries, never the file.
        yield
        return
    with open(folder / "lock", "a", encoding="ascii") as stream:
        # Some network file systems have no locks; then as above.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _warn_once(about: str, text: str) -> None:
    if about not in _warned:
        _warned.add(about)
        warnings.warn(text, stacklevel=4)

"""Where the functions of a family come from: an installed package, or a kernel of the Hugging Face Hub.

A source answers from metadata whether it can be there (``probe``), and imports it once (``load``). The Hub is read by
the ``kernels`` library with its own cache, pins, trust rules and ``LOCAL_KERNELS``: https://github.com/huggingface/kernels
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..call import architecture
from ..capabilities import Capabilities
from ..errors import BackendUnavailableError, Reason, unavailable_message

KERNELS_MINIMUM = "0.12"
KERNELS_INSTALL = "pip install 'kernels>=0.12'"
_EXIT_TIMEOUT_S = 120.0


@dataclass(frozen=True, eq=False)
class Package:
    """A package that users install.

    Attributes:
        module: module the functions are imported from.
        functions: their names.
        install: what to type.
        distribution: name in the package metadata; empty where builds carry none.
        minimum: smallest version that serves; empty for any.
        parameter: parameter that every function must have, for versions that cannot be told apart otherwise.
    """

    module: str
    functions: tuple[str, ...]
    install: str
    distribution: str = ""
    minimum: str = ""
    parameter: str = ""

    @property
    def label(self) -> str:
        return self.distribution or self.module

    def probe(self) -> tuple[Reason, ...]:
        """Reasons why the package is missing or too old; imports nothing."""
        missing = Reason("package", f"the package {self.label} is not installed", f"install it: {self.install}")
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return (missing,)
        if not self.distribution:
            return ()
        found = installed_version(self.distribution)
        if found is None:
            return (missing,)
        if self.minimum and release(found) < release(self.minimum):
            what = f"{self.distribution} {found} is installed, {self.minimum} or newer is needed"
            return (Reason("version", what, f"update it: {self.install}"),)
        return ()

    def load(self) -> dict[str, Callable]:
        """Import the functions.

        Raises:
            BackendUnavailableError: the import fails, with the loader's message, or a function is not as expected.
        """
        try:
            module = importlib.import_module(self.module)
        except Exception as error:  # a broken binary raises anything; all of it is this package's status
            found = installed_version(self.distribution) if self.distribution else None
            what = f"importing {self.module} failed: {error} ({self.label} {found or 'of unknown version'}, torch {torch.__version__})"
            fix = f"install a build of {self.label} for this torch: {self.install}"
            if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn.flash_attn_interface":
                # xformers 0.0.35 and others ask only whether there is a flash_attn.
                fix = (
                    "flash-attn-4 brings a flash_attn without the functions of FlashAttention 2: "
                    "pip install 'flash-attn>=2.6.3' --no-build-isolation, or pip uninstall flash-attn-4"
                )
            raise _unavailable(self.label, Reason("import", what, fix)) from error
        return _checked(self.label, module, self.functions, self.parameter, self.install)


@dataclass(frozen=True, eq=False)
class HubKernel:
    """A kernel of the Hugging Face Hub, pinned to a version."""

    repository: str
    version: int
    functions: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.repository} v{self.version}"

    def probe(self) -> tuple[Reason, ...]:
        """Reasons why the ``kernels`` library is missing or too old; downloads nothing."""
        found = installed_version("kernels")
        if found is None:
            what = f"the kernels library, which loads {self.repository}, is not installed"
            return (Reason("package", what, f"install it: {KERNELS_INSTALL}"),)
        if release(found) < release(KERNELS_MINIMUM):
            what = f"kernels {found} is installed, {KERNELS_MINIMUM} or newer is needed"
            return (Reason("version", what, f"update it: {KERNELS_INSTALL}"),)
        return ()

    def load(self) -> dict[str, Callable]:
        """Load the kernel: from ``LOCAL_KERNELS``, the cache, or the Hub.

        Raises:
            BackendUnavailableError: no build for this torch, offline and not cached, not trusted, or a broken build.
        """
        try:
            library = importlib.import_module("kernels")
            # A folder of that name in the working directory is found before the library.
            if not hasattr(library, "get_kernel"):
                where = getattr(library, "__file__", None) or ", ".join(library.__path__)
                what = f"the module 'kernels' that Python finds at {where} is not the Hugging Face library"
                raise _unavailable(self.label, Reason("import", what, "rename it, or start Python in another folder."))
            module = self._import(library)
        except BackendUnavailableError:
            raise
        except Exception as error:  # the library raises its own, the Hub client's and the kernel's exceptions
            raise _unavailable(self.label, self._reason(error)) from error
        return _checked(self.label, module, self.functions, "", f"a newer version of {self.repository}")

    def _import(self, library: Any) -> object:
        if "backend" in parameters(library.get_kernel):
            return library.get_kernel(self.repository, version=self.version)
        # kernels 0.12 does not read LOCAL_KERNELS, and asks the Hub for the branch of a version even when offline.
        for entry in os.environ.get("LOCAL_KERNELS", "").split(":"):
            repository, _, path = entry.partition("=")
            if repository == self.repository:
                package = repository.rpartition("/")[2].replace("-", "_")
                return library.get_local_kernel(Path(path), package)
        return library.get_kernel(self.repository, revision=f"v{self.version}")

    def _reason(self, error: BaseException) -> Reason:
        elsewhere = f"point LOCAL_KERNELS={self.repository}=/path at a local build"
        text = " ".join(str(error).split())
        if "build variant" in text:
            what = f"{self.label} has no build for torch {torch.__version__}: {text}"
            page = f"https://huggingface.co/{self.repository}"
            return Reason("build", what, f"install a torch that {page} has a build for, or {elsewhere}.")
        kinds = {type(link).__name__ for link in _chain(error)}
        if kinds & _OFFLINE or "offline mode" in text:
            what = f"{self.label} is not in the cache and the Hub cannot be reached: {text}"
            command = f"python -c \"import kernels; kernels.get_kernel('{self.repository}', version={self.version})\""
            return Reason("offline", what, f"run once with a connection: {command}; or {elsewhere}.")
        if "trust" in text.lower():
            what = f"kernels does not trust {self.repository}: {text}"
            return Reason("trust", what, f"{elsewhere}, after reviewing it.")
        what = f"loading {self.label} failed: {type(error).__name__}: {text} (torch {torch.__version__})"
        return Reason("import", what, f"clear its cached files and load it again, or {elsewhere}.")


Source = Package | HubKernel

_OFFLINE = {
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "ConnectionError",
    "ConnectError",
    "ConnectTimeout",
    "ProxyError",
    "MaxRetryError",
    "gaierror",
}

_loaded: dict[Source, dict[str, Callable]] = {}
_lock = threading.RLock()


def functions(source: Source) -> dict[str, Callable]:
    """Functions of ``source`` by name, imported by the first caller."""
    found = _loaded.get(source)
    if found is None:
        with _lock:
            found = _loaded.get(source)
            if found is None:
                found = _loaded[source] = source.load()
    return found


def load(source: Source) -> None:
    """Import ``source`` if it is not; the ``load`` of a backend."""
    functions(source)


def forget() -> None:
    """Forget what was loaded and which versions were found, for example after an installation."""
    with _lock:
        _loaded.clear()
        installed_version.cache_clear()
        parameters.cache_clear()


@functools.lru_cache(maxsize=256)
def parameters(function: Callable) -> frozenset[str]:
    """Names of the parameters of a vendor function; asked of the function, since versions do not tell."""
    return frozenset(inspect.signature(function).parameters)


@functools.lru_cache(maxsize=64)
def installed_version(distribution: str) -> str | None:
    """Version in the metadata of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def release(text: str) -> tuple[int, ...]:
    """Leading numbers of a version: ``"2.8.3.post1"`` is (2, 8, 3)."""
    numbers = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in numbers.group().split(".")) if numbers else ()


def platform_reasons(capabilities: tuple[Capabilities, ...]) -> tuple[Reason, ...]:
    """Why no device of this machine is one that ``capabilities`` name. Some kernels end the process on a wrong GPU."""
    rows = [row for row in capabilities if "cuda" in row.devices]
    if not rows:
        return ()
    if not torch.cuda.is_available():
        what = f"torch {torch.__version__} sees no GPU"
        return (Reason("device", what, "run it on a machine with a GPU, with a torch built for that GPU."),)
    present = [architecture("cuda", index) for index in range(torch.cuda.device_count())]
    if any(_runs_on(row, arch) for row in rows for arch in present):
        return ()
    wanted = ", ".join(rows[0].architectures) or f"sm_{rows[0].min_sm} or newer"
    what = f"it is built for {wanted}; this machine has {', '.join(sorted(set(present)))}"
    return (Reason("arch", what, "use backend='native' or 'auto' on this GPU."),)


def _runs_on(row: Capabilities, arch: str) -> bool:
    if row.architectures:
        return arch in row.architectures
    return not row.min_sm or (arch.startswith("sm_") and int(arch[3:]) >= row.min_sm)


def probe(source: Source, capabilities: tuple[Capabilities, ...]) -> tuple[Reason, ...]:
    """Reasons against a backend on this machine before anything is imported: the device first, then the package."""
    return platform_reasons(capabilities) or source.probe()


def probe_in_child(name: str, timeout_s: float = _EXIT_TIMEOUT_S) -> tuple[Reason, ...]:
    """Status of a backend, found in a process of its own, so that a kernel that ends its process only ends that one.

    Args:
        name: backend name.
        timeout_s: seconds to wait.

    Returns:
        Reasons why it cannot be used; empty when it can.
    """
    program = f"from attention_dispatch import registry; s = registry.status({name!r}); print(s); raise SystemExit(not s.available)"
    try:
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return (
            Reason("import", f"loading {name!r} took longer than {timeout_s:g} s", "load it by itself to see why."),
        )
    if child.returncode == 0:
        return ()
    lines = (child.stdout + child.stderr).strip().splitlines() or ["no output"]
    what = f"loading {name!r} in a process of its own ended with code {child.returncode}: {lines[-1]}"
    return (Reason("import", what, f"see attention_dispatch.backend_status({name!r})."),)


def _checked(label: str, module: object, names: tuple[str, ...], parameter: str, install: str) -> dict[str, Callable]:
    missing = [name for name in names if not callable(getattr(module, name, None))]
    if missing:
        what = f"{label} has no function {', '.join(missing)}"
        raise _unavailable(label, Reason("version", what, f"update it: {install}"))
    found: dict[str, Callable] = {name: getattr(module, name) for name in names}
    if parameter and any(parameter not in parameters(function) for function in found.values()):
        what = f"{label} is an older copy: its functions have no parameter {parameter}"
        raise _unavailable(label, Reason("version", what, f"update it: {install}"))
    return found


def _unavailable(label: str, reason: Reason) -> BackendUnavailableError:
    return BackendUnavailableError(unavailable_message(label, (reason,)), (reason,))


def _chain(error: BaseException | None) -> list[BaseException]:
    links = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links

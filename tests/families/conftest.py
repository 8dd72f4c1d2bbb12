"""Backends of external packages on CPU: their fakes installed, their declared devices widened by ``cpu``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from family_rows import BACKENDS

from attention_dispatch import registry, self_test
from attention_dispatch.backends import source
from attention_dispatch.registry import Backend, register_backend, unregister_backend

# The packages contracts and fakes lie beside this folder. Last, so that no folder of tests hides a library.
sys.path.append(str(Path(__file__).parents[1]))

from contracts import load_record
from fakes import FakeCalls, installed, kernel_repository, local_kernels


class Installed(NamedTuple):
    """One backend that runs on CPU over a fake: the backend as registered, and what was asked of the fake."""

    backend: Backend
    calls: FakeCalls


@contextlib.contextmanager
def _fake_package(record: str, directory) -> Iterator[FakeCalls]:
    if not record.startswith("hub-"):
        with installed(record) as calls:
            yield calls
        return
    pytest.importorskip("kernels", reason="the kernels library is not installed: pip install kernels")
    contract = load_record(record)
    repository = kernel_repository(directory, record)
    with local_kernels({contract.distribution: repository}):
        functions = source.HubKernel(contract.distribution, int(contract.version), tuple(contract.functions)).load()
        yield next(iter(functions.values())).fake_calls


def forget_everything() -> None:
    source.forget()
    self_test.forget()
    for name in BACKENDS:
        registry.forget_status(name)


@pytest.fixture
def on_cpu(tmp_path, monkeypatch) -> Iterator[Callable[[str, str], Installed]]:
    """``on_cpu(name, record)``: the backend registered as able to run on CPU, its package replaced by a fake."""
    monkeypatch.setattr(source, "platform_reasons", lambda capabilities: ())
    with contextlib.ExitStack() as stack:

        def install(name: str, record: str) -> Installed:
            calls = stack.enter_context(_fake_package(record, tmp_path))
            backend = BACKENDS[name]
            rows = tuple(
                replace(row, devices=(*row.devices, "cpu"), architectures=(), min_sm=0) for row in backend.capabilities
            )
            stack.enter_context(_registered(replace(backend, capabilities=rows)))
            return Installed(registry.get(name), calls)

        forget_everything()
        yield install
        forget_everything()


@contextlib.contextmanager
def _registered(backend: Backend) -> Iterator[None]:
    before = registry._rows.get(backend.name)
    register_backend(backend, replace=True)
    try:
        yield
    finally:
        unregister_backend(backend.name)
        if before is not None:
            registry._rows[backend.name] = before
            registry.forget_status(backend.name)


@pytest.fixture
def registered() -> Iterator[None]:
    """All families registered as they are, on the devices they declare."""
    with contextlib.ExitStack() as stack:
        for backend in BACKENDS.values():
            stack.enter_context(_registered(backend))
        forget_everything()
        yield
        forget_everything()

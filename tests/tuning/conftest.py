"""Each test has a store of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attention_dispatch.registry import Backend, register_backend, unregister_backend
from attention_dispatch.tuning import store


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ATTENTION_DISPATCH_CACHE", str(tmp_path / "cache"))
    store.reload()
    yield tmp_path / "cache"
    monkeypatch.undo()
    store.reload()


@pytest.fixture
def registered() -> Iterator[Callable[[Backend], None]]:
    """Register backends for one test."""
    names: list[str] = []

    def add(backend: Backend) -> None:
        register_backend(backend)
        names.append(backend.name)

    yield add
    for name in names:
        unregister_backend(name)

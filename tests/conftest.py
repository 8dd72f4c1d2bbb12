"""What all tests share: a pristine process setting around each, and no leftovers in torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from attention_dispatch import settings
from attention_dispatch.request import current, forget_environment

_SDPA = F.scaled_dot_product_attention


@pytest.fixture(autouse=True, scope="session")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a developer has tuned must not choose for the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATTENTION_DISPATCH_CACHE", str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture(autouse=True)
def no_setting_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts without any setting, and must leave none behind."""
    for name in ("ATTENTION_DISPATCH_BACKEND", "DIFFUSERS_ATTN_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    forget_environment()
    settings.set_checks(False)
    yield
    left = (current.model, current.stack, current.scope, current.observer)
    current.__init__()  # type: ignore[misc]
    settings.set_checks(False)
    forget_environment()
    assert left == (None, [], None, None), f"the test left a setting behind: {left}"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For many tiny calls: threads would wait for each other longer than they compute, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cuda() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU on this machine")
    return "cuda"

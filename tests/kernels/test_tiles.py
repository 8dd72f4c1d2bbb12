"""Tiles that a measurement chooses: which is fastest right one wins, and the kernel runs with it."""

from __future__ import annotations

import pytest
import torch

from attention_dispatch import dispatch_attention_fn, kernels, registry, self_test, tuning
from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.kernels import tiles
from attention_dispatch.kernels.tiles import Tile
from attention_dispatch.tuning import store
from attention_dispatch.tuning.measure import Timing
from attention_dispatch.tuning.tiles import measure_tiles

from .exact import relative_error


@pytest.fixture(autouse=True)
def empty_store(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTENTION_DISPATCH_CACHE", str(tmp_path))
    store.reload()
    yield
    monkeypatch.undo()
    store.reload()
    tiles.use({})


def tensors(device: str) -> list[torch.Tensor]:
    return [torch.randn(1, 40, 2, 32, device=device, dtype=torch.float16) for _ in range(3)]


def test_the_fastest_right_tile_wins(device: str) -> None:
    call = canonicalise(*tensors(device), torch.ones(1, 40, dtype=torch.bool, device=device), is_causal=True)
    timed = []

    def timer(ways, where, budget_s, policy):
        timed.append(ways)
        return {tile: Timing(50.0 if tile == [*ways][-1] else 100.0, 0.0, 5) for tile in ways}

    everything = measure_tiles(call, spec_of(call), quantised=True, timer=timer)
    assert {one.backend for one in everything} == {"triton_flash", "triton_sage", "triton_sage_fp16"}
    for found, ways in zip(everything, timed, strict=True):
        assert found.choice == [*ways][-1] != found.before
        assert not found.rejected
        for tile, way in ways.items():
            assert tiles.asked_by(way) == {found.key: tile}


def test_a_tile_that_computes_something_else_is_rejected(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attention_dispatch.kernels import flash

    call = canonicalise(*tensors(device), torch.ones(1, 1, 40, 40, dtype=torch.bool, device=device).tril())
    wrong = Tile(128, 64, 8, 3)
    real = flash.flash_forward_kernel

    class Miscompiled:
        __name__ = real.__name__

        def __getitem__(self, grid):
            def run(*arguments, **constants):
                real[grid](*arguments, **constants)
                if constants["BLOCK_M"] == wrong.block_m:
                    out = arguments[3]
                    out.mul_(1.5)

            return run

    monkeypatch.setattr(flash, "flash_forward_kernel", Miscompiled())
    with pytest.warns(UserWarning, match="128 x 64, 8 warps, 3 stages is wrong for"):
        found = measure_tiles(call, spec_of(call), timer=as_fast)
    assert [(one.choice, [*one.rejected]) for one in found] == [(found[0].before, [wrong])]


def test_a_kernel_that_fails_does_not_end_the_model_that_is_measured(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = canonicalise(*tensors(device))
    spec = spec_of(call)
    assert registry.status("triton_flash").available
    self_test.reasons(registry.get("triton_flash"), spec)

    def fails(*_, **__):
        raise MemoryError("not enough memory")

    monkeypatch.setattr(kernels, "flash_attention", fails, raising=False)
    with pytest.warns(UserWarning, match="not enough memory"):
        assert measure_tiles(call, spec, names=["triton_flash"], timer=as_fast) == []


def as_fast(ways, where, budget_s, policy):
    return dict.fromkeys(ways, Timing(100.0, 0.0, 5))


def test_tuning_stores_tiles_and_kernels_follow(device: str) -> None:
    query, key, value = tensors(device)
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool, device=device).tril()
    with tuning(tiles=True, budget_s=0.001, names=["triton_flash"]) as tuned:
        dispatch_attention_fn(query, key, value, mask, backend="triton_flash")
    kernels = {found.key.kernel for found in tuned.tiles}
    assert "flash" in kernels
    where = "cuda" if device == "cuda" else "cpu"
    assert set(store.tiles(where)) == {str(found.key) for found in tuned.tiles}
    [found] = [found for found in tuned.tiles if found.key.kernel == "flash"]
    other = next(tile for tile in tiles.candidates(found.key) if tile != found.choice)
    store.add(where, tiles={str(found.key): {"tile": other._asdict()}})
    asked = tiles.asked_by(lambda: dispatch_attention_fn(query, key, value, mask, backend="triton_flash"))
    assert asked == {found.key: other}
    out = dispatch_attention_fn(query, key, value, mask, backend="triton_flash")
    exact = dispatch_attention_fn(query.double(), key.double(), value.double(), mask, backend="reference")
    assert relative_error(out, exact) < 1.5e-3

"""Tile shapes in the store: what is valid is followed, anything else is a miss with one warning."""

from __future__ import annotations

import json
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from attention_dispatch.kernels import tiles
from attention_dispatch.kernels.tiles import Tile, TileKey
from attention_dispatch.tuning import store
from attention_dispatch.tuning import tiles as followed
from attention_dispatch.tuning.tiles import follow_store

KEY = TileKey("flash", "cpu", "float32", 64, "padded")
GOOD = {"block_m": 64, "block_n": 32, "warps": 4, "stages": 2, "registers": None}


@pytest.fixture(autouse=True)
def table_only():
    yield
    tiles.use({})


def in_use() -> Tile:
    [(key, tile)] = tiles.asked_by(lambda: tiles.forward_tile(torch.zeros(1, 1, 1, 64), 64, "padded")).items()
    assert key == KEY
    return tile


def test_a_stored_tile_is_followed_and_survives_export_and_import(tmp_path):
    before = in_use()
    store.add("cpu", tiles={str(KEY): {"tile": GOOD}})
    follow_store("cpu")
    assert in_use() == Tile(**GOOD) != before
    assert tiles.forward_tile(torch.zeros(1, 1, 1, 64), 64, "padded")["BLOCK_N"] == 32
    exported = json.loads(json.dumps(store.export("cpu")))
    store.clear()
    follow_store("cpu")
    assert in_use() == before
    assert store.adopt(exported) == 1
    follow_store("cpu")
    assert in_use() == Tile(**GOOD)


@pytest.mark.parametrize(
    ("name", "entry", "why"),
    [
        (str(KEY), {**GOOD, "block_m": 48}, "power of two"),
        (str(KEY), {**GOOD, "block_n": "64"}, "power of two"),
        (str(KEY), {**GOOD, "stages": 9}, "stages"),
        (str(KEY), {**GOOD, "registers": 100}, "registers"),
        (str(KEY), {**GOOD, "block_m": 256, "block_n": 256}, "shared memory"),
        (str(KEY), {**GOOD, "depth": 1}, "depth"),
        (str(KEY._replace(kernel="sage_fp8")), {**GOOD, "block_n": 256}, "at most 128"),
        (str(KEY._replace(kernel="other")), GOOD, "no kernel 'other'"),
        (str(KEY._replace(kind="striped")), GOOD, "not 'striped'"),
        ("nonsense", GOOD, "unpack"),
    ],
)
def test_what_no_kernel_can_use_is_a_miss_with_one_warning(name, entry, why, monkeypatch):
    monkeypatch.setattr(followed, "_warned", set())
    before = in_use()
    store.add("cpu", tiles={name: {"tile": entry}})
    with pytest.warns(UserWarning, match=why):
        follow_store("cpu")
    assert in_use() == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        follow_store("cpu")


def test_candidates_are_tiles_a_kernel_can_use():
    for kernel in ("flash", "sage_fp8", "sage_fp16"):
        for head_dim in (16, 64, 128, 256):
            key = TileKey(kernel, "sm_90", "bfloat16", head_dim, "rich")
            found = tiles.candidates(key)
            assert 2 <= len(found) <= 6
            assert all(tiles.problem_with(key, tile) is None for tile in found)
            assert TileKey.parse(str(key)) == key


def test_a_scope_ends_with_what_was_before():
    before = in_use()
    with pytest.raises(ZeroDivisionError), tiles.using(KEY, Tile(16, 16, 4, 1)):
        assert in_use() == Tile(16, 16, 4, 1)
        raise ZeroDivisionError
    assert in_use() == before


def test_what_a_thread_tries_is_its_own():
    before = in_use()
    with tiles.using(KEY, Tile(16, 16, 4, 1)), ThreadPoolExecutor(1) as other:
        assert other.submit(in_use).result() == before
        assert tiles.asked_by(lambda: other.submit(tiles.forward_tile, torch.zeros(1, 1, 1, 64), 64, "padded").result()) == {}
        assert in_use() == Tile(16, 16, 4, 1)

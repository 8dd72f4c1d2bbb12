"""The store survives everything that happens to files: concurrent and killed writers, full disks, foreign content."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from attention_dispatch.call import canonicalise, spec_of
from attention_dispatch.tuning import environment, store
from attention_dispatch.tuning.store import Extent

from .entries import entry

ROOT = Path(__file__).parent.parent.parent


def writer(names: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.tuning.entries", names, str(count)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def spec_for(*shape: int):
    tensor = torch.empty(shape)
    return spec_of(canonicalise(tensor, tensor, tensor))


def on_disk() -> dict:
    return json.loads(store.path("cpu").read_text())


def test_another_revision_of_a_hub_kernel_is_another_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KERNELS_CACHE", str(tmp_path))
    reference = tmp_path / "models--kernels-community--flash-attn3" / "refs" / "v1"
    reference.parent.mkdir(parents=True)
    prints = []
    for revision in ("aaaa", "bbbb"):
        reference.write_text(revision)
        environment._manifest.cache_clear()
        facts = environment.manifest("cpu")
        assert facts["kernels-community/flash-attn3@v1"] == revision
        prints.append(environment.fingerprint(facts))
    monkeypatch.undo()
    environment._manifest.cache_clear()
    assert len({*prints, environment.fingerprint(environment.manifest("cpu"))}) == 3


def test_what_is_added_is_there_in_this_process_and_in_the_next():
    store.add("cpu", {"a": entry()}, {"native": {"state": "ok"}})
    assert set(store.entries("cpu")) == {"a"}
    store.reload()
    assert set(store.entries("cpu")) == {"a"} and store.verdict("native", "cpu") == {"state": "ok"}
    assert on_disk()["environment"] == environment.manifest("cpu")


def test_eight_writers_at_once_lose_nothing():
    process = writer(",".join(f"writer{number}" for number in range(8)), 2)
    process.communicate(timeout=80)
    assert process.returncode == 0
    assert set(store.entries("cpu")) == {f"writer{n}-{i}" for n in range(8) for i in range(2)}
    assert list(store.directory().glob("*.tmp")) == []


def test_a_writer_killed_in_the_middle_leaves_a_readable_file_and_no_lock():
    process = writer("killed", 100_000)
    for _ in range(3):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.add("cpu", {"after": entry()})
    assert {"killed-0", "killed-1", "after"} <= set(on_disk()["entries"])


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 999, "entries": {}}', "\x00\xff"])
def test_a_corrupt_or_foreign_file_is_a_miss_with_one_warning(text):
    file = store.path("cpu")
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8")
    with pytest.warns(UserWarning, match="nothing in it is used") as caught:
        assert store.entries("cpu") == {}
        store.entries("cpu")
        store.add("cpu", {"new": entry()})
    assert len(caught) == 1
    assert set(on_disk()["entries"]) == {"new"}


def test_broken_entries_are_left_out_and_others_kept():
    good = entry()
    file = store.path("cpu")
    file.parent.mkdir(parents=True)
    bad = {"text": "x", "no choice": {"times_us": {}}, "bad time": {**good, "times_us": {"native": "fast"}}}
    file.write_text(
        json.dumps(
            {"format": 1, "environment": environment.manifest("cpu"), "entries": {**bad, "good": good}, "verdicts": [1]}
        )
    )
    assert set(store.entries("cpu")) == {"good"} and store.verdicts("cpu") == {}


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_full_disk_costs_one_warning_and_keeps_the_old_file(function, monkeypatch):
    store.add("cpu", {"old": entry()})

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, function, full)
    with pytest.warns(UserWarning, match="No space left") as caught:
        store.add("cpu", {"new": entry()})
        store.add("cpu", {"newer": entry()})
    assert len(caught) == 1
    assert {"old", "new", "newer"} == set(store.entries("cpu")), "results last in memory"
    assert set(on_disk()["entries"]) == {"old"}
    assert list(store.directory().glob("*.tmp")) == []


def test_a_directory_that_cannot_be_written_costs_one_warning(tmp_path, monkeypatch):
    # A file in its place stops root too, whom permissions do not.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTENTION_DISPATCH_CACHE", str(tmp_path / "file" / "cache"))
    store.reload()
    with pytest.warns(UserWarning, match="cannot be"):
        store.add("cpu", {"new": entry()})
    assert set(store.entries("cpu")) == {"new"}


def test_the_file_is_read_once(monkeypatch):
    store.add("cpu", {"a": entry()})
    store.reload()
    reads = []
    original = store._read
    monkeypatch.setattr(store, "_read", lambda device: (reads.append(device), original(device))[1])
    for _ in range(3):
        store.entries("cpu")
        store.ranking(spec_for(1, 8, 2, 16), None, False)
    assert reads == ["cpu"]


def test_another_version_of_anything_is_another_file(monkeypatch):
    before = store.path("cpu")
    facts = environment.manifest("cpu")
    monkeypatch.setattr(environment, "manifest", lambda device: {**facts, "torch": "99.0"})
    assert store.path("cpu") != before


def test_sizes_that_round_alike_share_a_key_and_others_do_not():
    spec = spec_for(1, 4096, 2, 64)
    base = store.key(spec, Extent(1, 4096, 4096))
    assert store.key(spec, Extent(1, 4250, 4096)) == base
    different = [
        store.key(spec, Extent(1, 8192, 4096)),
        store.key(spec, Extent(2, 4096, 4096)),
        store.key(spec, Extent(1, 4096, 4096, contiguous=False)),
        store.key(spec, Extent(1, 4096, 4096), "graph"),
        store.key(spec._replace(grad=True), Extent(1, 4096, 4096)),
        store.key(spec._replace(mask="bias"), Extent(1, 4096, 4096)),
        store.key(spec._replace(dtype=torch.bfloat16), Extent(1, 4096, 4096)),
    ]
    assert len({base, *different}) == len(different) + 1


@pytest.mark.parametrize("size", [1, 2, 3, 77, 512, 4250, 32760, 75600])
def test_rounding_moves_a_size_by_less_than_a_quarter(size):
    assert abs(store.rounded(size) / size - 1) < 0.25
    assert store.rounded(store.rounded(size)) == store.rounded(size)


def test_export_and_adopt_round_trip_and_refuse_another_environment(monkeypatch):
    store.add("cpu", {"a": entry()}, {"native": {"state": "ok"}})
    data = json.loads(json.dumps(store.export("cpu")))
    assert len(store.clear()) == 1 and store.entries("cpu") == {}
    assert store.adopt(data) == 1 and set(store.entries("cpu")) == {"a"}
    data["environment"]["torch"] = "1.0"
    with pytest.raises(ValueError, match=r"torch: 1\.0 there"):
        store.adopt(data)
    with pytest.raises(ValueError, match="--export"):
        store.adopt({"format": 1})


def test_without_sizes_a_choice_counts_only_where_all_sizes_agree():
    spec = spec_for(1, 64, 2, 64)
    keys = [store.key(spec, Extent(1, size, size)) for size in (64, 1024)]
    store.add("cpu", {keys[0]: entry("_native_flash", native=2.0, _native_flash=1.0)})
    assert store.ranking(spec, None, False) == ("_native_flash", "native")
    store.add("cpu", {keys[1]: entry("native", native=1.0, _native_flash=2.0)})
    assert store.ranking(spec, None, False) == ()

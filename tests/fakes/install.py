"""Putting a fake where ``import`` and ``importlib.metadata`` find it, and taking it away again."""

from __future__ import annotations

import contextlib
import importlib
import sys
import tempfile
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch

from contracts import load_record
from fakes import xformers
from fakes.build import FakeCalls, functions

_DISTRIBUTION_VERSIONS = {"flash_attn_3": "3.0.0b1"}


@contextlib.contextmanager
def installed(record: str, *, version: str | None = None) -> Iterator[FakeCalls]:
    """Make the package of ``record`` importable for the duration, with the metadata of its distribution.

    Args:
        record: Name of a record, e.g. ``"flash_attn-2.8.3"``.
        version: Version to report instead of the recorded one.

    Yields:
        What is asked of the fake.
    """
    contract = load_record(record)
    calls = FakeCalls()
    fakes = functions(record, calls)
    modules = _package(contract.module, fakes)
    if contract.distribution == "xformers":
        _add_xformers_biases(modules)
    root = contract.module.partition(".")[0]
    roots = {root}
    if contract.module == "flash_attn.cute":
        modules.update(_cute_language(modules["flash_attn.cute"]))
        roots.add("cutlass")

    def is_faked(name: str) -> bool:
        return name.partition(".")[0] in roots

    saved = {name: module for name, module in sys.modules.items() if is_faked(name)}
    reported = version or _DISTRIBUTION_VERSIONS.get(contract.distribution, contract.version)
    with tempfile.TemporaryDirectory() as directory:
        _write_metadata(Path(directory), contract.distribution, reported, root)
        for name in saved:
            del sys.modules[name]
        sys.modules.update(modules)
        sys.path.insert(0, directory)
        importlib.invalidate_caches()
        try:
            yield calls
        finally:
            sys.path.remove(directory)
            for name in [name for name in sys.modules if is_faked(name)]:
                del sys.modules[name]
            sys.modules.update(saved)
            importlib.invalidate_caches()


def _package(dotted: str, attributes: dict) -> dict[str, ModuleType]:
    modules: dict[str, ModuleType] = {}
    parts = dotted.split(".")
    for depth in range(1, len(parts) + 1):
        name = ".".join(parts[:depth])
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, loader=None, origin="fake", is_package=True)
        module.__path__ = []
        if depth > 1:
            setattr(modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
        modules[name] = module
    for name, value in attributes.items():
        setattr(modules[dotted], name, value)
    return modules


def _cute_language(flash_attn_cute: ModuleType) -> dict[str, ModuleType]:
    """What functions for mask_mod and score_mod are written in, on plain numbers: a value of the DSL is a list of one."""
    modules = _package("cutlass.cute", {"jit": lambda function: function})
    modules["cutlass"].Uint8 = int
    modules["cutlass"].Float32 = float
    utils = ModuleType("flash_attn.cute.utils")
    utils.scalar_to_ssa = lambda number, dtype: torch.tensor([float(dtype(number))], dtype=torch.float64)
    flash_attn_cute.utils = utils
    return {**modules, "flash_attn.cute.utils": utils}


def _add_xformers_biases(modules: dict[str, ModuleType]) -> None:
    biases = {"AttentionBias": xformers.AttentionBias, "LowerTriangularMask": xformers.LowerTriangularMask}
    nested = _package("xformers.ops.fmha.attn_bias", biases)
    operations = modules["xformers.ops"]
    operations.fmha = nested["xformers.ops.fmha"]
    for name, value in biases.items():
        setattr(operations, name, value)
    modules.update({name: module for name, module in nested.items() if name.count(".") >= 2})


def _write_metadata(directory: Path, distribution: str, version: str, top_level: str) -> None:
    folder = directory / f"{distribution.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (folder / "top_level.txt").write_text(f"{top_level}\n")

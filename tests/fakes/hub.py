"""A Hub kernel on disk that the real ``kernels`` library loads offline.

The layout is the one ``kernels`` documents (https://github.com/huggingface/kernels): ``build/<variant>/`` with
``__init__.py``, ``metadata.json`` and a shim package of the old layout.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

from contracts import load_record

_BODY = '''"""Kernel built from a recorded contract."""
from fakes.build import functions

globals().update(functions({record!r}))
'''


def kernel_repository(
    root: Path, record: str, *, backends: tuple[str, ...] = ("cpu", "cuda"), body: str = _BODY
) -> Path:
    """Write a kernel repository for ``record`` below ``root`` and return its directory.

    Args:
        backends: Variants to write, ``torch-<backend>`` each. An installation for which there is none finds no build.
        body: Source of the kernel module; ``{record!r}`` is filled in.
    """
    contract = load_record(record)
    name = contract.distribution.rpartition("/")[2]
    package = name.replace("-", "_")
    repository = root / name
    for backend in backends:
        variant = repository / "build" / f"torch-{backend}"
        (variant / package).mkdir(parents=True)
        (variant / "__init__.py").write_text(body.format(record=record))
        (variant / package / "__init__.py").write_text("from .. import *\n")
        metadata = {
            "name": name,
            # The id is the key in sys.modules, so it names the place as well.
            "id": f"_{package}_{backend}_{abs(hash(str(repository))):x}",
            "version": int(contract.version),
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata))
    return repository


@contextlib.contextmanager
def local_kernels(repositories: Mapping[str, Path]) -> Iterator[None]:
    """Let ``kernels`` resolve repository names to directories, with no network, for the duration."""
    overrides = ":".join(f"{name}={path}" for name, path in repositories.items())
    with mock.patch.dict(os.environ, {"LOCAL_KERNELS": overrides, "HF_HUB_OFFLINE": "1"}):
        yield

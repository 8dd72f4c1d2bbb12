"""What a measurement holds for: the machine and every version that may change which kernel is fastest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..call import architecture

# Distributions whose kernels are candidates, or compile them.
_PACKAGES = (
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "sageattention",
    "xformers",
    "kernels",
    "aiter",
    "torch-npu",
    "torch-xla",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "attention-dispatch",
)

_HUB_OWNER = "kernels-community"


@lru_cache(maxsize=8)
def _manifest(device_index: int) -> tuple[tuple[str, str], ...]:
    facts = {"torch": torch.__version__, "machine": platform.machine(), "cpu": _cpu_name()}
    if device_index >= 0:
        facts["gpu"] = torch.cuda.get_device_name(device_index)
        facts["architecture"] = architecture("cuda", device_index)
        facts["driver"] = _driver()
        facts["cudnn"] = str(torch.backends.cudnn.version())
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    facts.update(_hub_kernels())
    return tuple(sorted(facts.items()))


def _hub_kernels() -> dict[str, str]:
    """Revisions of the Hub kernels in the cache by repository and branch, and what local builds stand in for them.

    A branch of the Hub moves; what was measured holds for the revision it pointed to.
    """
    facts = {"LOCAL_KERNELS": os.environ["LOCAL_KERNELS"]} if os.environ.get("LOCAL_KERNELS") else {}
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    folder = os.environ.get("KERNELS_CACHE") or os.environ.get("HF_HUB_CACHE") or Path(home, "hub")
    # Without a home directory (RuntimeError), or rights to read it, there is no cache either.
    with contextlib.suppress(OSError, RuntimeError):
        for reference in Path(folder).expanduser().glob(f"*--{_HUB_OWNER}--*/refs/*"):
            repository = reference.parts[-3].partition("--")[2].replace("--", "/")
            facts[f"{repository}@{reference.name}"] = reference.read_text(encoding="ascii", errors="replace").strip()
    return facts


def manifest(device: str) -> dict[str, str]:
    """Names and versions that measurements on a device type hold for; for ``"cuda"``, on the current GPU.

    Other device types leave CUDA alone, so that calls on the CPU never initialise it.
    """
    cuda = device == "cuda" and torch.cuda.is_available()
    return {"device": device, **dict(_manifest(torch.cuda.current_device() if cuda else -1))}


def fingerprint(facts: dict[str, str]) -> str:
    """12 hex digits that differ when any fact does."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def _driver() -> str:
    if torch.version.hip:
        return f"hip {torch.version.hip}"
    path = Path("/proc/driver/nvidia/version")
    try:
        found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", path.read_text(encoding="ascii", errors="replace"))
    except OSError:
        found = None
    return found.group() if found else "unknown"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.processor()

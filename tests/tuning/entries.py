"""Entries as measurements leave them, and a process that writes many of them."""

from __future__ import annotations

import sys
from typing import Any

from attention_dispatch.tuning import store


def entry(exact: str = "native", **times: float) -> dict[str, Any]:
    return {
        "exact": exact,
        "quantised": None,
        "quantised_names": [],
        "static": "native",
        "times_us": times or {"native": 1.0},
    }


if __name__ == "__main__":
    for number in range(int(sys.argv[2])):
        store.add("cpu", {f"{sys.argv[1]}-{number}": entry()})
        print(number, flush=True)

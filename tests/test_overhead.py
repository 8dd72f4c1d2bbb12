"""The benchmark of the cost of a call runs, and its figures have not grown out of proportion."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "overhead.py"


def test_a_call_costs_less_than_through_diffusers():
    command = [sys.executable, str(SCRIPT), "--json", "--batches", "60", "--calls", "100"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(finished.stdout)
    costs, ratios = found["microseconds"], found["ratio to diffusers"]
    assert costs["raw torch"] < costs["no setting"] < costs["scope and call"]
    # Wider than the goals of the script: other work on the machine must not fail a test.
    assert costs["model setting"] < 1.3 * costs["no setting"]
    if not ratios:
        pytest.skip("diffusers is not installed, so there is nothing to compare with")
    assert ratios["no setting"] < 1.0
    assert ratios["scope entered"] < 0.55

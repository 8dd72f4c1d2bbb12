"""The benchmark of the cost of a call runs and reports what it says; how fast is not for a test to judge."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "overhead.py"


def test_the_benchmark_reports_every_figure():
    command = [sys.executable, str(SCRIPT), "--json", "--batches", "3", "--calls", "20"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    costs = json.loads(finished.stdout)["microseconds"]
    assert {"raw torch", "no setting", "backend=", "model setting", "scope entered", "scope and call"} <= set(costs)
    assert all(math.isfinite(cost) and cost > 0 for cost in costs.values())

"""Every registered backend against every case of the contract; nobody opts in."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from attention_dispatch import backend_status, list_backends, registry
from attention_dispatch.testing import build, check_conformance, conformance_cases, predicted_codes
from attention_dispatch.testing.conformance import Outcome

pytestmark = pytest.mark.usefixtures("one_thread")

BUILT_IN = ("native", "_native_math", "_native_flash", "flex", "reference")
# Their kernels are compiled anew for each kind of call, which on a GPU takes seconds.
COMPILED = {"flex", "triton_flash", "triton_sage", "triton_sage_fp16", "flash_4", "flash_4_hub"}


def skip_unless_available(name: str) -> None:
    status = backend_status(name)
    if not status.available:
        pytest.skip(str(status))


def every_call() -> list:
    """(name, case) of every available backend, and one skip with its reason for each other one."""
    rows = []
    for name in list_backends():
        status = backend_status(name)
        if status.available:
            rows += [pytest.param(name, case, id=f"{name}-{case.name}") for case in conformance_cases("cpu")]
        else:
            rows.append(pytest.param(name, None, id=name, marks=pytest.mark.skip(reason=str(status))))
    return rows


@pytest.mark.parametrize(("name", "case"), every_call())
def test_exact_or_refused_as_declared(name, case):
    check_conformance(name, case, "cpu")


@pytest.mark.parametrize("name", BUILT_IN)
def test_enough_is_computed(name):
    """A backend that refused everything would pass every case; what torch's own must serve is counted."""
    cases = conformance_cases("cpu")
    served = {"reference": 1.0, "_native_flash": 0.8, "native": 0.6, "_native_math": 0.6, "flex": 0.4}
    outcomes = Counter(_prediction(name, case) for case in cases)
    assert outcomes["computed"] >= served[name] * len(cases), outcomes


def _prediction(name, case) -> str:
    return "refused" if _refuses(registry.get(name), case, "cpu") else "computed"


@pytest.mark.gpu
@pytest.mark.parametrize("name", list_backends())
def test_exact_or_refused_as_declared_on_a_gpu(name, cuda):
    """One test per backend, so that kernels are compiled once; all mistakes of a backend are reported together."""
    skip_unless_available(name)
    backend = registry.get(name)
    outcomes: dict[str, Outcome] = {}
    failures: dict[str, str] = {}
    for case in conformance_cases(cuda):
        if name in COMPILED and not case.core and not _refuses(backend, case, cuda):
            continue
        try:
            outcomes[case.name] = check_conformance(name, case, cuda)
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            failures[case.name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            print(f"\n{case.name}: {failures[case.name]}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    report = "\n".join(f"{case}: {error}" for case, error in failures.items())
    assert not failures, f"{len(failures)} of {len(outcomes) + len(failures)} cases fail on {name}:\n{report}"
    print(name, Counter(outcome.status for outcome in outcomes.values()))


def _refuses(backend, case, device) -> bool:
    return bool(predicted_codes(backend, case, build(case, device)))

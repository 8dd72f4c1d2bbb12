"""The contract of a call as a test suite: cases, a float64 oracle, tolerances, and backends that must fail it.

For the tests of a backend that lives elsewhere::

    import pytest
    from attention_dispatch import backend_status
    from attention_dispatch.testing import check_conformance, conformance_cases

    @pytest.mark.parametrize("case", conformance_cases("cuda"), ids=lambda case: case.name)
    def test_conformance(case):
        if not backend_status("mine").available:
            pytest.skip(str(backend_status("mine")))
        check_conformance("mine", case, "cuda")
"""

from .cases import Case, Inputs, build, conformance_cases
from .conformance import ConformanceError, Outcome, check_conformance, predicted_codes
from .oracle import Exact, attend, exact_attention
from .poison import poisoned_memory
from .tolerances import allowed_error, difference
from .wrong_backends import WRONG_BACKENDS

__all__ = [
    "WRONG_BACKENDS",
    "Case",
    "ConformanceError",
    "Exact",
    "Inputs",
    "Outcome",
    "allowed_error",
    "attend",
    "build",
    "check_conformance",
    "conformance_cases",
    "difference",
    "exact_attention",
    "poisoned_memory",
    "predicted_codes",
]

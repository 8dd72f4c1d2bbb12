"""A backend that crashes, hangs, returns NaN or lies is a verdict, not the end of the process that asked."""

from __future__ import annotations

import torch

import attention_dispatch as ad
from attention_dispatch.tuning import health, store

FAKES = ("tests.tuning.registered_fakes",)


def test_every_failure_is_reported_and_the_next_backend_still_checked():
    names = ["fake_dies_at_import", "flash", "fake_crash", "fake_hang", "fake_nan", "fake_refuses", "fake_right"]
    seen = []
    found = health.check(
        names, "cpu", timeout_s=5.0, imports=FAKES, progress=lambda result: seen.append(result.backend)
    )
    states = {result.backend: result.state for result in found}
    assert states == {
        "fake_dies_at_import": "crashed",
        "flash": "absent",
        "fake_crash": "crashed",
        "fake_hang": "hung",
        "fake_nan": "wrong",
        "fake_refuses": "unchecked",
        "fake_right": "ok",
    }
    assert seen == names
    by_name = {result.backend: result.what for result in found}
    assert "plain_fp32: the process ended with code 7" in by_name["fake_crash"]
    assert "importing it: the process ended with code 9" in by_name["fake_dies_at_import"]
    assert "->" in by_name["flash"], "it says what to do"
    assert "no answer for 5 s" in by_name["fake_hang"]
    assert found[-1].computed > 10


def test_verdicts_are_remembered_in_the_store():
    health.remember([health.Health("native", "wrong", "a case"), health.Health("flex", "ok")], "cpu")
    store.reload()
    assert store.verdict("native", "cpu")["state"] == "wrong"
    tensor = torch.randn(1, 8, 2, 16)
    assert ad.explain(tensor, tensor, tensor, backend="auto").backend == "_native_flash"


def test_what_refused_every_case_is_neither_right_nor_wrong():
    health.remember([health.Health("flex", "unchecked", "it refused every case")], "cpu")
    store.reload()
    assert store.verdict("flex", "cpu") is None


def test_the_quick_cases_exist():
    from attention_dispatch.testing import conformance_cases

    assert set(health.QUICK) <= {case.name for case in conformance_cases("cpu")}

"""record() and the shadow checks tell which module ran where, and which first went wrong."""

from __future__ import annotations

import json
import threading
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

import attention_dispatch as ad
from attention_dispatch import numerics

from .fakes import backend


class Attention(nn.Module):
    def __init__(self, backend_name: str | None = None):
        super().__init__()
        self.backend_name = backend_name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + ad.dispatch_attention_fn(x, x, x, backend=self.backend_name)


class Model(nn.Module):
    def __init__(self, *names: str | None):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Attention(name)) for name in names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(1, 12, 2, 16)


@pytest.fixture(autouse=True)
def fresh_checks():
    numerics.forget_checks()
    yield
    numerics.forget_checks()


def test_each_module_is_listed_with_its_backend_and_count(x):
    model = Model(None, "_native_math")
    with ad.record() as calls:
        model(x)
        model(x)
    found = [(record.module, record.backend, record.count) for record in calls.records]
    assert found == [("blocks.0.0", "native", 2), ("blocks.1.0", "_native_math", 2)]
    assert calls.backends() == {"native": 2, "_native_math": 2}
    assert json.loads(calls.to_json())["calls"][1]["backend"] == "_native_math"
    assert "blocks.1.0" in calls.table()


def test_a_permission_says_why_not_the_names_before(x):
    with ad.record() as calls:
        ad.dispatch_attention_fn(x, x, x, backend=["flash", "native"])
    assert calls.records[0].module == "" and "not on cpu" in calls.records[0].refused["flash"]
    assert "not flash" in calls.table()


def test_the_remembered_way_is_recorded_too_and_left_untouched_after(x):
    for _ in range(3):
        ad.dispatch_attention_fn(x, x, x)
    with ad.record() as calls:
        ad.dispatch_attention_fn(x, x, x)
    ad.dispatch_attention_fn(x, x, x)
    assert [record.count for record in calls.records] == [1]


def test_scopes_nest_and_end_with_an_exception(x):
    with ad.record() as outer:
        with pytest.raises(ad.InvalidCallError), ad.record() as inner:
            ad.dispatch_attention_fn(x, x, x)
            ad.dispatch_attention_fn(x, x, x, dropout_p=2.0)
        ad.dispatch_attention_fn(x, x, x)
    assert inner.backends() == {"native": 1} and outer.backends() == {"native": 2}


def test_other_threads_are_not_recorded(x):
    with ad.record() as calls:
        other = threading.Thread(target=lambda: ad.dispatch_attention_fn(x, x, x))
        other.start()
        other.join()
    assert calls.records == []


def test_comparison_finds_the_module_that_deviates(x, registered):
    registered(backend("fake_lie"))
    with ad.record(compare="reference") as calls:
        Model(None, "fake_lie")(x)
    right, wrong = calls.records
    assert right.check.ok and right.check.relative_l2 < 1e-5
    assert not wrong.check.ok and wrong.check.relative_l2 > 0.05 and "allowed" in calls.table()


def test_nan_is_traced_to_the_first_module_that_made_it(x, registered):
    registered(backend("fake_nan"))
    with ad.record(compare="reference") as calls:
        Model(None, "fake_nan", None)(x)
    assert calls.first_not_finite().module == "blocks.1.0"
    assert not calls.records[2].check.finite_inputs
    assert "The first output that is not finite came from 'blocks.1.0'" in calls.table()


def test_nan_in_a_later_call_is_found(x):
    model = Model("_native_math")
    with ad.record(compare="reference") as calls:
        model(x)
        model(x * float("inf"))
    assert not calls.records[0].check.finite and calls.first_not_finite() is None, "its inputs were the cause"


def test_numerics_mode_warns_once_per_module_without_any_scope(x, registered):
    registered(backend("fake_lie"))
    model = Model(None, "fake_lie", "fake_lie")
    ad.set_checks("numerics")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(x)
        model(x)
        model(x[:, :10])
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2 and "'blocks.1.0'" in texts[0] and "'blocks.2.0'" in texts[1]
    assert "relative error" in texts[0] and "allowed 0.002" in texts[0]


def test_numerics_mode_names_the_maker_of_nan_and_not_its_followers(x, registered):
    registered(backend("fake_nan"))
    ad.set_checks("numerics")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Model("fake_nan", None, None)(x)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert "'fake_nan' in 'blocks.0.0' returned NaN" in texts[0] and "the cause lies before" in texts[1]


def test_numerics_mode_logs_every_error_and_warns_of_none_that_is_allowed(x, caplog):
    ad.set_checks("numerics")
    model = Model(None, "_native_flash", "reference")
    with warnings.catch_warnings(), caplog.at_level("INFO", logger="attention_dispatch"):
        warnings.simplefilter("error")
        model(x)
        model(x)
    lines = [record.getMessage() for record in caplog.records]
    assert ["blocks.1.0" in line and "relative error" in line for line in lines] == [False, True, False]


def test_numerics_mode_sees_nan_in_a_later_call(x, registered):
    from dataclasses import replace

    right, later = backend("fake_right"), []

    def forward(call):
        output = right.forward(call)
        later.append(1)
        return output if len(later) == 1 else output._replace(out=output.out * float("inf"))

    registered(replace(right, name="breaks_later", forward=forward))
    ad.set_checks("numerics")
    model = Model(None, "breaks_later")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x)
    with pytest.warns(UserWarning, match="'breaks_later' in 'blocks.1.0' returned NaN"):
        model(x)


@pytest.fixture
def parallel(tmp_path):
    import torch.distributed as dist

    from attention_dispatch.distributed import ContextParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield ContextParallel(ring=1, ulysses=1)
    dist.destroy_process_group()


def test_calls_with_context_parallelism_are_recorded(x, parallel):
    class Sharded(nn.Module):
        def forward(self, x):
            return ad.dispatch_attention_fn(x, x, x, backend=["flash", "_native_flash"], parallel_config=parallel)

    model = nn.Sequential(OrderedDict(block=Sharded()))
    with ad.record() as outer, ad.record(compare="reference") as calls:
        for _ in range(2):
            model(x)
    assert outer.backends() == calls.backends() == {"_native_flash": 2}
    [found] = calls.records
    assert found.module == "block" and "ring=1, ulysses=1" in found.call and found.check is None
    assert found.request == "['flash', '_native_flash']" and json.loads(calls.to_json())["calls"][0]["count"] == 2
    model(x)
    assert found.count == 2

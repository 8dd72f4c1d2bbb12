"""Scopes of one thread that end in another order than they nest: generators, coroutines, objects entered twice."""

import asyncio
import itertools
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import attention_dispatch as ad
from attention_dispatch import policies
from attention_dispatch.errors import InvalidCallError
from attention_dispatch.request import current

NAMES = ("native", "reference", "flex")


def in_force():
    return None if current.scope is None else current.scope.names[0]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_innermost_that_is_left_counts(order):
    scopes = [ad.attention_backend(name) for name in NAMES]
    for scope in scopes:
        scope.__enter__()
    open_ = list(range(3))
    for index in order:
        assert in_force() == NAMES[open_[-1]]
        scopes[index].__exit__()
        open_.remove(index)
    assert in_force() is None and current.effective is None and not current.scopes


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_steps_likewise(order):
    scopes = [policies.at_step(step) for step in range(3)]
    for scope in scopes:
        scope.__enter__()
    open_ = list(range(3))
    for index in order:
        assert current.step == open_[-1]
        scopes[index].__exit__()
        open_.remove(index)
    assert current.step is None and not current.steps and not current.scheduled


def test_one_object_entered_twice():
    scope = ad.attention_backend("reference")
    with scope:
        with ad.attention_backend("flex"), scope:
            assert in_force() == "reference"
        assert in_force() == "reference"
    assert in_force() is None


def work(name):
    with ad.attention_backend(name):
        yield in_force()
        yield in_force()


def test_generators_that_take_turns():
    first, second = work("reference"), work("flex")
    assert next(first) == "reference" and next(second) == "flex"
    # While both wait, the scope that was entered last counts for all that the thread runs.
    assert in_force() == "flex" and next(first) == "flex"
    first.close()
    assert in_force() == "flex"
    second.close()
    assert in_force() is None


def test_a_generator_that_ends_in_another_thread():
    generator = work("reference")
    next(generator)
    thread = threading.Thread(target=generator.close)
    thread.start()
    thread.join()
    assert in_force() is None


def test_coroutines():
    async def task(name, wait):
        with ad.attention_backend(name):
            await asyncio.sleep(wait)

    async def all_of_them():
        await asyncio.gather(task("reference", 0.01), task("flex", 0.03), task("native", 0.02))

    asyncio.run(all_of_them())
    assert in_force() is None and not current.scopes


def test_a_step_cannot_be_advanced_outside_of_one():
    with pytest.raises(InvalidCallError, match="at_step"):
        policies.advance_step(None, 0, None, {})
    assert current.step is None


def test_a_scope_inside_a_compiled_function_inside_another():
    q = torch.randn(1, 4, 2, 8)

    def run(q):
        with ad.attention_backend("reference"):
            return ad.dispatch_attention_fn(q, q, q)

    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for name in (None, "native", None):
        if name is None:
            result = compiled(q)
        else:
            with ad.attention_backend(name):
                result = compiled(q)
                assert in_force() == name
        torch.testing.assert_close(result, run(q))
        assert in_force() is None and not current.scopes


def test_forwards_that_run_after_their_hooks_are_left():
    class Async(nn.Module):
        async def forward(self, q):
            return F.scaled_dot_product_attention(q, q, q)

    class Lazy(nn.Module):
        def forward(self, q):
            yield F.scaled_dot_product_attention(q, q, q)

    for kind in (Async, Lazy):
        with pytest.raises(InvalidCallError, match="coroutine or generator"):
            ad.set_attention_backend(kind(), "native")

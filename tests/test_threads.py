"""Settings belong to a thread or to a model: threads at work at once never see each other's."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F

from attention_dispatch import (
    attention_backend,
    dispatch_attention_fn,
    reset_attention_backend,
    set_attention_backend,
)
from attention_dispatch.registry import Backend, get, register_backend, unregister_backend

THREADS, CALLS = 8, 1000


def recording(name: str, seen: threading.local) -> Backend:
    """A backend that notes in the thread that calls it who ran the call; native computes it."""
    native = get("native")

    def forward(call):
        seen.name = name
        return native.forward(call)

    return Backend(name, "test", native.capabilities, forward)


class Dispatching(torch.nn.Module):
    _attention_backend = None

    def forward(self, query):
        return dispatch_attention_fn(query, query, query, backend=self._attention_backend)


class Plain(torch.nn.Module):
    def forward(self, query):
        query = query.transpose(1, 2)
        return F.scaled_dot_product_attention(query, query, query, is_causal=True)


def work(index: int, seen: threading.local, start: threading.Barrier, wrong: list[str]) -> None:
    own, other = f"thread_{index}", f"thread_{(index + 1) % THREADS}"
    query = torch.randn(1, 4, 2, 8)
    models = (Dispatching(), Plain())
    for model in models:
        set_attention_backend(model, own)
    ways = {
        "argument": (own, lambda: dispatch_attention_fn(query, query, query, backend=own)),
        "scope": (own, lambda: dispatch_attention_fn(query, query, query)),
        "attribute model": (own, lambda: models[0](query)),
        "scope model": (own, lambda: models[1](query)),
        "argument within a scope": (other, lambda: dispatch_attention_fn(query, query, query, backend=other)),
    }
    start.wait()
    with attention_backend(own):
        for count in range(CALLS):
            way, (expected, call) = list(ways.items())[count % len(ways)]
            call()
            if seen.name != expected:
                wrong.append(f"call {count} of thread {index} by {way} ran on {seen.name}")
            if count % 100 == 99:
                with attention_backend(other):
                    dispatch_attention_fn(query, query, query)
                if seen.name != other:
                    wrong.append(f"nested scope of thread {index} ran on {seen.name}")
    for model in models:
        reset_attention_backend(model)


def test_eight_threads_never_see_each_others_settings():
    seen = threading.local()
    before = F.scaled_dot_product_attention
    names = [f"thread_{index}" for index in range(THREADS)]
    for name in names:
        register_backend(recording(name, seen))
    wrong: list[str] = []
    start = threading.Barrier(THREADS)
    threads = [threading.Thread(target=work, args=(index, seen, start, wrong)) for index in range(THREADS)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
    finally:
        for name in names:
            unregister_backend(name)
    assert wrong == []
    assert F.scaled_dot_product_attention is before


def test_a_new_thread_starts_without_the_scope_of_its_creator():
    found: list[str] = []
    query = torch.randn(1, 4, 2, 8)
    softcap = {"softcap": 2.0}

    def call():
        try:
            dispatch_attention_fn(query, query, query, attention_kwargs=softcap)
        except NotImplementedError as error:
            found.append(str(error).splitlines()[0])

    with attention_backend("reference"):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join(20)
        dispatch_attention_fn(query, query, query, attention_kwargs=softcap)
    assert found == ["backend 'native' cannot run this call."]

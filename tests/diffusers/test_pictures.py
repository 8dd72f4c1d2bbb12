"""Ten pipelines draw what plain diffusers draws, on the backend asked for, whichever documented way it was asked."""

from __future__ import annotations

import pytest
from diffusers.models.attention_dispatch import attention_backend

from attention_dispatch.backends import reference
from attention_dispatch.call import AttentionOutput
from attention_dispatch.integrations import diffusers as integration
from attention_dispatch.registry import Backend, register_backend, unregister_backend

from .conftest import SdpaCalls
from .pipelines import MASKED, PIPELINES, build, denoiser, draw

# native runs the same kernels in the same order; the others round differently in float32.
TOLERANCE = {"native": 1e-5, "reference": 1e-4, "flex": 1e-4}


@pytest.mark.parametrize("backend", TOLERANCE)
@pytest.mark.parametrize("name", PIPELINES)
def test_install_draws_the_same_on_the_backend(name, backend, plain, ran):
    expected = plain(name)
    ran.clear()
    pipeline, arguments = build(name)
    report = integration.install(pipeline, backend)
    assert any(module.startswith(("transformer.", "unet.")) for module, _ in report.routed)
    assert (draw(pipeline, arguments) - expected.picture).abs().max() <= TOLERANCE[backend]
    assert ran == {backend: expected.calls}
    integration.uninstall()
    ran.clear()
    assert (draw(pipeline, arguments) - expected.picture).abs().max() == 0
    assert not ran


@pytest.mark.parametrize("backend", TOLERANCE)
@pytest.mark.parametrize("name", PIPELINES)
def test_documented_setter_draws_the_same_on_the_backend(name, backend, plain, ran):
    expected = plain(name)
    ran.clear()
    pipeline, arguments = build(name)
    denoiser(pipeline).set_attention_backend(backend)
    assert (draw(pipeline, arguments) - expected.picture).abs().max() <= TOLERANCE[backend]
    assert ran.total() == expected.calls
    assert ran[backend] > 0
    denoiser(pipeline).reset_attention_backend()
    ran.clear()
    assert (draw(pipeline, arguments) - expected.picture).abs().max() <= TOLERANCE["native"]
    assert ran == {"native": expected.calls}


@pytest.mark.parametrize("backend", TOLERANCE)
@pytest.mark.parametrize("name", PIPELINES)
def test_documented_scope_draws_the_same_on_the_backend(name, backend, plain, ran):
    expected = plain(name)
    ran.clear()
    pipeline, arguments = build(name)
    with attention_backend(backend):
        picture = draw(pipeline, arguments)
    assert (picture - expected.picture).abs().max() <= TOLERANCE[backend]
    assert ran == {backend: expected.calls}


@pytest.mark.parametrize("name", PIPELINES)
def test_setter_takes_every_call_of_the_denoiser_and_none_of_the_vae(name, spy, plain):
    expected = plain(name)
    pipeline, arguments = build(name)
    denoiser(pipeline).set_attention_backend("spy")
    with SdpaCalls() as others:
        draw(pipeline, arguments)
    by_denoiser = len(spy)
    spy.clear()
    if others.count:
        pipeline.vae.set_attention_backend("spy")
    with SdpaCalls() as left:
        draw(pipeline, arguments)
    assert by_denoiser + others.count == expected.calls
    assert left.count == 0
    assert len(spy) == expected.calls


@pytest.mark.parametrize("name", PIPELINES)
def test_scope_takes_every_call_from_torch(name, spy, plain):
    expected = plain(name)
    pipeline, arguments = build(name)
    with attention_backend("spy"), SdpaCalls() as others:
        draw(pipeline, arguments)
    assert len(spy) == expected.calls
    assert others.count == 0


@pytest.fixture
def wrong():
    """``wrong(change)``: a backend that changes the call, or returns zeros for None."""

    def register(change):
        def forward(call):
            if change is None:
                output = reference.attention(call)
                return AttentionOutput(output.out * 0, output.lse)
            change(call)
            return reference.attention(call)

        register_backend(Backend("wrong", "test", (reference.CAPABILITIES,), forward))

    yield register
    unregister_backend("wrong")


@pytest.mark.parametrize("name", PIPELINES)
def test_pictures_show_a_wrong_backend(name, plain, wrong):
    expected = plain(name)
    wrong(None)
    pipeline, arguments = build(name)
    integration.install(pipeline, "wrong")
    assert (draw(pipeline, arguments) - expected.picture).abs().max() > 10 * TOLERANCE["flex"]


@pytest.mark.parametrize("name", MASKED)
def test_pictures_show_a_dropped_mask(name, plain, wrong):
    expected = plain(name)
    wrong(lambda call: setattr(call, "mask", None))
    pipeline, arguments = build(name)
    integration.install(pipeline, "wrong")
    assert (draw(pipeline, arguments) - expected.picture).abs().max() > 10 * TOLERANCE["flex"]

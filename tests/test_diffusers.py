"""diffusers' pipelines through this library: the same pictures, on the backend asked for, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

diffusers = pytest.importorskip("diffusers", reason="pip install diffusers")

import diffusers.models.attention_dispatch as upstream  # noqa: E402

import attention_dispatch as ad  # noqa: E402
from attention_dispatch.integrations import diffusers as integration  # noqa: E402
from attention_dispatch.registry import Backend, register_backend, unregister_backend  # noqa: E402
from tests.tiny_pipelines import PIPELINES, flux, run  # noqa: E402


# native runs the same kernels in the same order; the others round differently in float32.
TOLERANCE = {"native": 1e-5, "reference": 1e-4, "flex": 1e-4}


def build(name):
    torch.manual_seed(0)
    pipeline, arguments = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, arguments


def denoiser(pipeline):
    return getattr(pipeline, "transformer", None) or pipeline.unet


@pytest.fixture(scope="module")
def plain_pictures():
    """What diffusers draws by itself, per pipeline."""
    integration.deactivate()
    pictures = {name: run(*build(name)) for name in PIPELINES}
    integration.activate()
    return pictures


@pytest.fixture
def active():
    integration.activate()
    yield
    integration.uninstall()


@pytest.fixture
def spy():
    """A backend that counts its calls and computes with the reference."""
    from attention_dispatch.backends import reference

    calls = []

    def forward(call):
        calls.append(call.query.shape)
        return reference.attention(call)

    register_backend(Backend("spy", "test", (reference.CAPABILITIES,), forward))
    yield calls
    unregister_backend("spy")


@pytest.mark.parametrize("backend", TOLERANCE)
@pytest.mark.parametrize("name", PIPELINES)
def test_same_pictures_as_plain_diffusers(name, backend, plain_pictures, active):
    pipeline, arguments = build(name)
    report = integration.install(pipeline, backend)
    assert any(module.startswith(("transformer", "unet")) for module, _ in report.routed)
    assert (run(pipeline, arguments) - plain_pictures[name]).abs().max() <= TOLERANCE[backend]


@pytest.mark.parametrize("name", PIPELINES)
def test_the_documented_setter_reaches_every_attention_call(name, spy, active):
    pipeline, arguments = build(name)
    seen = []
    handles = [
        module.register_forward_hook(lambda *_: seen.append(1))
        for module in denoiser(pipeline).modules()
        if type(module).__name__.endswith(("Attention", "WanAttention")) and hasattr(module, "processor")
    ]
    denoiser(pipeline).set_attention_backend("spy")
    run(pipeline, arguments)
    for handle in handles:
        handle.remove()
    assert spy
    assert len(spy) >= len(seen) > 0
    spy.clear()
    denoiser(pipeline).reset_attention_backend()
    run(pipeline, arguments)
    assert not spy


@pytest.mark.parametrize("name", ["flux", "qwen_image", "stable_diffusion_3", "stable_diffusion_xl"])
def test_the_documented_scope_reaches_models_and_vae(name, spy, active):
    from diffusers.models.attention_dispatch import attention_backend

    pipeline, arguments = build(name)
    denoiser(pipeline).set_attention_backend("spy")
    run(pipeline, arguments)
    with_model = len(spy)
    denoiser(pipeline).reset_attention_backend()
    spy.clear()
    with attention_backend("spy"):
        run(pipeline, arguments)
    assert len(spy) > with_model, "the VAE's attention is not counted by the model's setting, but is by the scope"


def test_2C_one_model_does_not_change_another(spy, active):
    first, arguments = build("flux")
    second, _ = build("flux")
    first.transformer.set_attention_backend("spy")
    run(second, arguments)
    assert not spy


def test_2C_reset_restores_class_defaults(active):
    pipeline, _ = build("flux")
    processor = pipeline.transformer.transformer_blocks[0].attn.processor
    assert "_attention_backend" not in vars(processor)
    pipeline.transformer.set_attention_backend("reference")
    assert processor._attention_backend == "reference"
    pipeline.transformer.reset_attention_backend()
    assert "_attention_backend" not in vars(processor)


def test_2C_pinned_module_backend_survives_a_reset(active):
    pipeline, _ = build("flux")
    processor = pipeline.transformer.transformer_blocks[0].attn.processor
    processor._attention_backend = "flex"
    pipeline.transformer.set_attention_backend("reference")
    pipeline.transformer.reset_attention_backend()
    assert processor._attention_backend == "flex"


def test_members_of_the_enum_are_requests(spy, active):
    pipeline, arguments = build("flux")
    pipeline.transformer.set_attention_backend("spy")
    run(pipeline, arguments)
    assert spy
    pipeline.transformer.set_attention_backend(upstream.AttentionBackendName.NATIVE)
    spy.clear()
    run(pipeline, arguments)
    assert not spy


def test_nothing_is_left_behind():
    integration.deactivate()
    tables = upstream._AttentionBackendRegistry
    before = {
        "functions": [
            (name, attribute, vars(module).get(attribute))
            for name, module in sys.modules.items()
            if name.startswith("diffusers.")
            for attribute in ("dispatch_attention_fn", "attention_backend", "F")
            if attribute in vars(module)
        ],
        "members": list(upstream.AttentionBackendName._member_names_),
        "values": dict(upstream.AttentionBackendName._value2member_map_),
        "tables": (dict(tables._backends), dict(tables._constraints), dict(tables._supported_arg_names)),
        "methods": [diffusers.ModelMixin.set_attention_backend, diffusers.ModelMixin.__init__],
        "sdpa": F.scaled_dot_product_attention,
    }
    pipeline, arguments = build("flux")
    integration.install(pipeline, "reference")
    run(pipeline, arguments)
    assert diffusers.ModelMixin.set_attention_backend is not before["methods"][0]
    integration.uninstall()
    assert before["functions"] == [
        (name, attribute, vars(sys.modules[name])[attribute]) for name, attribute, _ in before["functions"]
    ]
    assert before["members"] == list(upstream.AttentionBackendName._member_names_)
    assert before["values"] == dict(upstream.AttentionBackendName._value2member_map_)
    assert before["tables"] == (dict(tables._backends), dict(tables._constraints), dict(tables._supported_arg_names))
    assert before["methods"] == [diffusers.ModelMixin.set_attention_backend, diffusers.ModelMixin.__init__]
    assert F.scaled_dot_product_attention is before["sdpa"]
    assert "_attention_backend" not in vars(pipeline.transformer.transformer_blocks[0].attn.processor)


def test_a_failed_install_changes_nothing(active):
    pipeline, arguments = build("flux")
    with pytest.raises(ad.BackendUnavailableError, match="_native_xla"):
        integration.install(pipeline, "_native_xla")
    with pytest.raises(ad.UnknownBackendError, match="reference"):
        integration.install(pipeline, "referense")
    assert "_attention_backend" not in vars(pipeline.transformer.transformer_blocks[0].attn.processor)
    run(pipeline, arguments)


@pytest.mark.parametrize("backend", ["native", "flex"])
def test_compiled_model_equals_eager(backend, active):
    pipeline, _ = build("flux")
    model = pipeline.transformer.eval()
    inputs = dict(
        hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 7, 32),
        pooled_projections=torch.randn(1, 32), timestep=torch.tensor([1.0]), img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(7, 3), return_dict=False,
    )  # fmt: skip
    with torch.no_grad():
        expected = model(**inputs)[0]
        model.set_attention_backend(backend)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs)[0], expected, atol=1e-4, rtol=1e-4)


def test_the_environment_is_honoured_in_a_fresh_process():
    code = (
        "import torch, attention_dispatch.integrations.diffusers\n"
        "from diffusers.models.attention_dispatch import dispatch_attention_fn\n"
        "from attention_dispatch.request import environment\n"
        "q = torch.randn(1, 8, 2, 16)\n"
        "dispatch_attention_fn(q, q, q)\n"
        "print(environment().names)\n"
    )
    env = {**os.environ, "DIFFUSERS_ATTN_BACKEND": "flex"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert "('flex',)" in done.stdout, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "backend", ["native", "_native_flash", "_native_cudnn", "_native_efficient", "flex", "triton_flash"]
)
def test_flux_on_a_gpu(backend, active):
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")
    torch.manual_seed(0)
    pipeline, arguments = flux()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda", torch.bfloat16)
    arguments = {
        name: value.to("cuda", torch.bfloat16) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    expected = run(pipeline, arguments)
    pipeline.transformer.set_attention_backend(backend)
    torch.testing.assert_close(run(pipeline, arguments), expected, atol=3e-2, rtol=3e-2)

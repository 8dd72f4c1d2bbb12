"""What activation, install and uninstall touch, and that all of it is given back."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import types

import diffusers
import diffusers.models.attention_dispatch as upstream
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend

import attention_dispatch as ad
from attention_dispatch.integrations import diffusers as integration
from attention_dispatch.registry import Backend, get, register_backend, unregister_backend

from .models import flux_transformer, forward, sd3_transformer, unet
from .pipelines import build, draw


def in_fresh_process(code: str, **environment: str) -> str:
    """Output of a program that starts without this library or diffusers loaded."""
    inherited = {name: value for name, value in os.environ.items() if not name.endswith(("ATTN_BACKEND", "CHECKS"))}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env={**inherited, **environment, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=120, cwd=os.getcwd(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_uninstall_gives_back_every_object_that_was_there():
    """Compares, by identity, all globals of all loaded files and all attributes of all classes of diffusers."""
    out = in_fresh_process("""
        import sys, torch.nn.functional as F
        from tests.diffusers.models import flux_transformer, forward, unet
        import diffusers, diffusers.hooks.layer_skip
        import diffusers.models.attention_dispatch as upstream
        from diffusers.models.attention_dispatch import attention_backend as mine

        def objects():
            found = {}
            for name, module in list(sys.modules.items()):
                if name.startswith(("diffusers", "tests", "__main__")) or name == "torch.nn.functional":
                    for attribute, value in list(vars(module).items()):
                        if attribute in ("before", "after", "objects") or attribute.startswith("__"):
                            continue
                        found[name, attribute] = value
                        if isinstance(value, type) and value.__module__.startswith("diffusers"):
                            for part, inner in list(vars(value).items()):
                                if not part.startswith("_abc_"):
                                    found[name, attribute, part] = inner
            registry, enum = upstream._AttentionBackendRegistry, upstream.AttentionBackendName
            for table in (registry._backends, registry._constraints, registry._supported_arg_names,
                          enum._member_map_, enum._value2member_map_):
                found |= {(id(table), key): value for key, value in table.items()}
            found["names"] = tuple(enum._member_names_)
            found["members"] = tuple(enum)
            return found

        flux, inputs = flux_transformer()
        net, net_inputs = unet()
        before = objects()
        plain = [forward(flux, inputs), forward(net, net_inputs)]

        from attention_dispatch.integrations.diffusers import install, uninstall
        changed = {key for key, value in objects().items() if before.get(key) is not value}
        assert ("__main__", "mine") in changed and ("diffusers.models.attention_processor", "F") in changed, changed
        install(flux, "reference")
        net.set_attention_backend("reference")
        with mine("native"):
            forward(flux, inputs), forward(net, net_inputs)
        uninstall()

        after = objects()
        different = {key for key, value in before.items() if key in after and value is not after[key]}
        different = {key for key in different if before[key] != after[key] or not isinstance(before[key], tuple)}
        assert not different, different
        assert not (before.keys() - after.keys()), before.keys() - after.keys()
        new = {key for key in after.keys() - before.keys() if key[0] != "__main__"}
        assert not new, new
        assert "_attention_backend" not in vars(flux.transformer_blocks[0].attn.processor)
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
        assert (forward(flux, inputs) - plain[0]).abs().max() == 0 == (forward(net, net_inputs) - plain[1]).abs().max()
        print("same")
    """)
    assert "same" in out


def test_environment_of_diffusers_is_honoured_in_a_fresh_process():
    out = in_fresh_process(
        """
        import attention_dispatch.integrations.diffusers
        from attention_dispatch.request import current
        from tests.diffusers.models import flux_transformer, forward, unet

        def observe(call, spec, request, plan, output):
            print(plan.backend.name)
            return output

        current.observer = observe
        current.refresh()
        forward(*flux_transformer())
        forward(*unet())
    """,
        DIFFUSERS_ATTN_BACKEND="_native_math",
    )
    assert set(out.split()) == {"_native_math"}


def test_files_imported_after_activation_are_routed():
    out = in_fresh_process("""
        import pickle, sys, torch
        import attention_dispatch.integrations.diffusers
        from attention_dispatch.request import current

        names = ("diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers.models.transformers.transformer_wan")
        assert not any(name in sys.modules for name in names)
        from tests.diffusers.models import forward, wan_transformer
        import diffusers
        ran = []

        def observe(call, spec, request, plan, output):
            ran.append(plan.backend.name)
            return output

        current.observer = observe
        current.refresh()
        vae = diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True])
        with diffusers.attention_backend("_native_math"), torch.no_grad():
            forward(*wan_transformer())
            by_transformer = len(ran)
            vae.decode(torch.randn(1, 4, 1, 4, 4))
        assert set(ran) == {"_native_math"}, ran
        assert len(ran) > by_transformer == 2
        print("routed")
    """)
    assert "routed" in out


def test_a_model_read_from_a_pickle_is_routed():
    """Reading it imports its file but does not initialise it."""
    net, inputs = unet()
    data = pickle.dumps((net, inputs))
    file = sys.modules["diffusers.models.attention_processor"]
    file.F = F  # as a file is that has just been imported
    net, inputs = pickle.loads(data)
    assert file.F is not F
    forward(net, inputs)


def test_a_copy_of_a_model_keeps_its_setting(spy):
    for model, inputs in (flux_transformer(), unet()):
        model.set_attention_backend("spy")
        again = copy.deepcopy(model)
        model.reset_attention_backend()
        forward(model, inputs)
        assert not spy
        forward(again, inputs)
        assert spy
        again.reset_attention_backend()
        spy.clear()


def test_uninstall_resets_what_the_documented_setter_set():
    model, inputs = flux_transformer()
    model.set_attention_backend("reference")
    model.transformer_blocks[0].attn.set_attention_backend("flex")
    integration.uninstall()
    assert "_attention_backend" not in vars(model.transformer_blocks[0].attn.processor)
    forward(model, inputs)


def test_two_models_keep_their_own_backends(ran):
    first, inputs = flux_transformer()
    second, _ = flux_transformer()
    integration.install(first, "reference")
    integration.install(second, "flex")
    forward(first, inputs)
    assert set(ran) == {"reference"}
    ran.clear()
    forward(second, inputs)
    assert set(ran) == {"flex"}
    first.reset_attention_backend()
    ran.clear()
    forward(first, inputs)
    forward(second, inputs)
    assert set(ran) == {"native", "flex"}


@pytest.mark.parametrize("model", [flux_transformer, unet])
def test_a_failed_install_changes_nothing(model):
    routed, inputs = model()
    routed.set_attention_backend("reference")
    expected = forward(routed, inputs)
    before = [dict(vars(part.processor)) for part in routed.modules() if hasattr(part, "processor")]
    for request, error in (("_native_xla", ad.BackendUnavailableError), ("referense", ad.UnknownBackendError), (7, ValueError)):
        with pytest.raises(error):
            integration.install(routed, request)
    assert before == [dict(vars(part.processor)) for part in routed.modules() if hasattr(part, "processor")]
    assert (forward(routed, inputs) - expected).abs().max() == 0


def test_a_failed_install_leaves_an_inactive_integration_inactive():
    pipeline, _ = build("flux")
    integration.deactivate()
    with pytest.raises(ad.UnknownBackendError, match="Did you mean 'reference'"):
        integration.install(pipeline, "referense")
    assert upstream.dispatch_attention_fn is not integration.dispatch_attention_fn


def test_members_of_the_enum_are_requests(ran):
    model, inputs = flux_transformer()
    name = upstream.AttentionBackendName
    model.set_attention_backend(name._NATIVE_MATH)
    forward(model, inputs)
    assert set(ran) == {"_native_math"}
    model.reset_attention_backend()
    ran.clear()
    with attention_backend(name.FLEX):
        forward(model, inputs)
    assert set(ran) == {"flex"}
    ran.clear()
    # What models that insist on a backend do.
    query = torch.randn(1, 4, 2, 16)
    upstream.dispatch_attention_fn(query, query, query, backend=name.NATIVE)
    upstream.dispatch_attention_fn(query, query, query, backend=name("reference"))
    assert ran == {"native": 1, "reference": 1}


def test_names_registered_later_join_and_leave_the_enum():
    names = upstream.AttentionBackendName
    register_backend(Backend("late", "test", get("native").capabilities, lambda call: None))
    assert names("late").name == "LATE"
    assert "LATE" in names.__members__
    assert names("late") in upstream._AttentionBackendRegistry._backends
    unregister_backend("late")
    with pytest.raises(ValueError, match="late"):
        names("late")


def test_a_request_of_several_names_converts_to_a_member():
    """ACE-Step's processors convert their setting to a member before each call."""
    from diffusers.models.transformers import ace_step_transformer as ace_step

    processor = types.SimpleNamespace(_attention_backend=("flash", "native"))
    assert ace_step._get_current_attention_backend(processor) is upstream.AttentionBackendName.NATIVE
    processor._attention_backend = None
    with attention_backend("flash_varlen"):
        assert ace_step._is_flash_attention_backend(processor)
    assert not ace_step._is_flash_attention_backend(processor)


def test_a_program_that_replaced_torchs_function_is_respected_where_nothing_is_set(monkeypatch, spy):
    net, inputs = unet()
    with attention_backend("native"):  # the backend keeps the function that was there when it was loaded
        forward(net, inputs)
    seen = []

    def patched(*args, **kwargs):
        seen.append(1)
        return torch._C._nn.scaled_dot_product_attention(*args, **kwargs)

    with monkeypatch.context() as patches:
        patches.setattr(F, "scaled_dot_product_attention", patched)
        forward(net, inputs)
        assert seen
        seen.clear()
        with attention_backend("spy"):
            forward(net, inputs)
        assert spy
        assert not seen


def test_text_encoders_of_transformers_are_not_affected(spy):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    config = transformers.CLIPTextConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )
    encoder = transformers.CLIPTextModel(config).eval()
    tokens = torch.arange(6)[None]
    pipeline, arguments = build("stable_diffusion_3")
    pipeline.register_modules(text_encoder=encoder)
    report = integration.install(pipeline, "spy")
    assert not any(name.startswith("text_encoder") for name, _ in (*report.routed, *report.left))
    draw(pipeline, arguments)
    assert spy
    spy.clear()
    with torch.no_grad(), attention_backend("spy"):
        encoder(tokens)
    assert not spy


def test_a_compiled_component_of_a_pipeline_is_routed():
    pipeline, _ = build("flux")
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    report = integration.install(pipeline, "reference")
    assert any(name.startswith("transformer.") for name, _ in report.routed)


def test_what_cannot_be_routed_is_an_error():
    with pytest.raises(ad.InvalidCallError, match="expected a diffusers model or pipeline, got str"):
        integration.install("flux", "native")
    with pytest.raises(ad.InvalidCallError, match="no diffusers model that computes attention"):
        integration.install(types.SimpleNamespace(components={"scheduler": object()}), "native")


def test_include_and_exclude_narrow_a_pipeline_down(ran):
    pipeline, arguments = build("stable_diffusion_3")
    report = integration.install(pipeline, "reference", exclude="vae.*")
    assert all(name.startswith("transformer.") for name, _ in report.routed)
    assert all(name.startswith("vae.") for name, _ in report.left)
    draw(pipeline, arguments)
    assert ran["reference"] > 0
    assert ran["native"] > 0


def test_setting_and_resetting_twice_is_as_once(spy):
    model, inputs = sd3_transformer()
    model.set_attention_backend("reference")
    model.set_attention_backend("spy")
    forward(model, inputs)
    assert spy
    model.reset_attention_backend()
    model.reset_attention_backend()
    spy.clear()
    forward(model, inputs)
    assert not spy
    integration.uninstall()
    integration.uninstall()
    assert diffusers.ModelMixin.set_attention_backend.__module__.startswith("diffusers")


def test_attention_computed_by_hand_is_left_and_said():
    from diffusers.models.attention_processor import AttnProcessor

    net, inputs = unet()
    first = next(name for name in net.attn_processors)
    net.set_attn_processor({name: AttnProcessor() if name == first else old for name, old in net.attn_processors.items()})
    report = net.set_attention_backend("reference")
    left = dict(report.left)
    assert list(left) == [first.removesuffix(".processor")]
    assert "by hand" in left[first.removesuffix(".processor")]
    forward(net, inputs)
    net.set_attn_processor(AttnProcessor())
    net.reset_attention_backend()
    with pytest.raises(ad.InvalidCallError, match="by hand"):
        net.set_attention_backend("reference")


def test_policies_and_patterns_go_through_the_documented_setter(ran):
    model, inputs = flux_transformer()
    model.set_attention_backend({"transformer_blocks.*": "reference", "single_transformer_blocks.*": "_native_math"})
    forward(model, inputs)
    assert ran == {"reference": 1, "_native_math": 1}

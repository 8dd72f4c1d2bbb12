"""Policies as values, and what they do to a model."""

import json

import pytest
import torch

import attention_dispatch as ad
from attention_dispatch import policies
from attention_dispatch.errors import InvalidCallError, UnknownBackendError
from attention_dispatch.request import current

from .blocks import DIM, CrossModel, ExtraTail, VisionTransformer


class Pipeline:
    """What set_attention_backend needs of a pipeline: a dict of components."""

    def __init__(self):
        self.components = {
            "transformer": CrossModel(),
            "text_encoder": VisionTransformer(2),
            "scheduler": object(),
            "projection": torch.nn.Linear(2, 2),
        }


POLICIES = [
    policies.modules({"blocks.0.*": "native", "re:blocks\\.[12]\\..*": ["reference", "native"]}),
    policies.modules({"blocks.1.*": None}, default="auto"),
    policies.ends("native", "reference", blocks=1),
    policies.roles(self="native", cross="auto_quantized"),
    policies.components(transformer=policies.roles(cross="reference"), text_encoder="native"),
    policies.steps({"0:2": "native", "2:-2": policies.ends("native", "reference", 1), "-2:": "native"}, total=10),
    policies.steps({"0:4": "native", "4:": "reference"}),
]


@pytest.mark.parametrize("policy", POLICIES, ids=[policy.kind for policy in POLICIES])
def test_a_policy_is_a_value(policy):
    again = policies.from_json(policy.to_json())
    assert again == policy and hash(again) == hash(policy)
    assert eval(repr(policy), vars(policies)) == policy
    assert json.loads(policy.to_json())["policy"] == policy.kind


@pytest.mark.parametrize("text", ["", "3", '"native"', '{"policy": "other", "rules": {}}', '{"rules": {}}'])
def test_other_json_is_refused(text):
    with pytest.raises(InvalidCallError, match="policy"):
        policies.from_json(text)


def test_keep_the_first_and_last_two_blocks_exact(probes):
    model = VisionTransformer(7).eval()
    report = ad.set_attention_backend(model, policies.ends("probe_a", "probe_b", blocks=2))
    assert [request for _, request in report.routed] == ["'probe_a'"] * 2 + ["'probe_b'"] * 3 + ["'probe_a'"] * 2
    model(torch.randn(1, 3, 16, 16))
    assert [probe.taken() for probe in probes] == [4, 3]
    ad.reset_attention_backend(model)
    with pytest.raises(InvalidCallError, match="no block in the middle"):
        ad.set_attention_backend(VisionTransformer(4), policies.ends("probe_a", "probe_b", blocks=2))


def test_modules_by_glob_and_regular_expression(probes):
    model = VisionTransformer(4).eval()
    report = ad.set_attention_backend(
        model, policies.modules({"blocks.0.*": "probe_a", r"re:blocks\.[12]\.attn": "probe_b"})
    )
    assert dict(report.left) == {"blocks.3.attn": "no pattern matches"}
    model(torch.randn(1, 3, 16, 16))
    assert [probe.taken() for probe in probes] == [1, 2]
    ad.reset_attention_backend(model)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (policies.modules({"blocks.9.*": "native"}), "blocks.9"),
        (policies.modules({"blocks.*": "native", "*.0.*": "reference"}), "both match 'blocks.0.attn'"),
        (policies.roles(self="native"), "nothing|both self= and cross="),
        (policies.components(transformer="native"), "transformer"),
        ({"nothing.*": "native"}, "nothing"),
        (None, "nothing of VisionTransformer was routed"),
        (policies.modules({"blocks.0.*": policies.steps({"0:": None})}), "names no backend"),
    ],
)
def test_conflicts_and_patterns_that_match_nothing_change_nothing(policy, message):
    model = VisionTransformer(3)
    with pytest.raises(InvalidCallError, match=message):
        ad.set_attention_backend(model, policy)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "make",
    [
        lambda: policies.modules({"re:(": "native"}),
        lambda: policies.modules({3: "native"}),
        lambda: policies.roles(middle="native"),
        lambda: policies.roles(),
        lambda: policies.components(),
        lambda: policies.ends("native", "native", blocks=0),
        lambda: policies.steps({"0:2": "native", "3:": "native"}),
        lambda: policies.steps({"0:3": "native", "2:": "native"}),
        lambda: policies.steps({"0:3": "native"}),
        lambda: policies.steps({"0:3": "native"}, total=4),
        lambda: policies.steps({"0:-1": "native", "-1:": "native"}),
        lambda: policies.steps({"first": "native"}),
        lambda: policies.steps({"0:": "native"}, total=0),
        lambda: policies.at_step(-1),
    ],
)
def test_mistakes_are_found_when_a_policy_is_made(make):
    with pytest.raises(InvalidCallError):
        make()


def test_unknown_names_are_found_when_a_policy_is_made():
    with pytest.raises(UnknownBackendError, match="native"):
        policies.modules({"*": "nativ"})


def test_roles_by_name_and_by_length(probes):
    model, x, context = CrossModel(2).eval(), torch.randn(1, 4, DIM), torch.randn(1, 6, DIM)
    ad.set_attention_backend(model, policies.roles(self="probe_a", cross="probe_b"))
    model(x, context)
    assert [probe.taken() for probe in probes] == [4, 4]
    model(x, x)  # attn2 is cross-attention by its name; only of mixer do the lengths tell
    assert [probe.taken() for probe in probes] == [6, 2]
    ad.set_attention_backend(model, {"*.attn?": policies.roles(cross="probe_a")})
    ad.reset_attention_backend(model)


def test_steps(probes):
    model, images = VisionTransformer(1).eval(), torch.randn(1, 3, 16, 16)
    policy = policies.steps({"0:1": "probe_a", "1:-1": "probe_b", "-1:": "probe_a"}, total=4)
    ad.set_attention_backend(model, policy)
    with pytest.raises(InvalidCallError, match="at_step"):
        model(images)
    for step in range(4):
        with policies.at_step(step):
            model(images)
    assert [probe.taken() for probe in probes] == [2, 2]
    with policies.at_step(4), pytest.raises(InvalidCallError, match="past the end"):
        model(images)
    with policies.at_step(0):
        for step in range(4):
            model(images)
            assert policies.advance_step(None, step, None, {"latents": 1}) == {"latents": 1}
        assert current.step == 4
        with policies.at_step(1):
            model(images)
        assert current.step == 4
    assert current.step is None
    assert [probe.taken() for probe in probes] == [2, 3]
    ad.reset_attention_backend(model)


def test_a_policy_set_while_a_step_is_running_counts_at_once(probes):
    model, images = VisionTransformer(1).eval(), torch.randn(1, 3, 16, 16)
    with policies.at_step(3):
        ad.set_attention_backend(model, policies.steps({"0:3": "probe_a", "3:": "probe_b"}))
        model(images)
    assert [probe.taken() for probe in probes] == [0, 1]
    ad.reset_attention_backend(model)


def test_components_of_a_pipeline(probes):
    pipeline = Pipeline()
    policy = policies.components(transformer=policies.roles(self="probe_a", cross="probe_b"), text_encoder="probe_a")
    report = ad.set_attention_backend(pipeline, policy)
    assert ("text_encoder.blocks.0.attn", "'probe_a'") in report.routed
    pipeline.components["text_encoder"](torch.randn(1, 3, 16, 16))
    assert probes[0].taken() == 2
    before = [module._forward_hooks.keys() for module in pipeline.components["transformer"].modules()]
    with pytest.raises(InvalidCallError, match="vae"):
        ad.set_attention_backend(pipeline, policies.components(transformer="native", vae="native"))
    assert [module._forward_hooks.keys() for module in pipeline.components["transformer"].modules()] == before
    ad.reset_attention_backend(pipeline)
    pipeline.components["text_encoder"](torch.randn(1, 3, 16, 16))
    assert probes[0].taken() == 0


def test_setting_twice_replaces_only_what_is_named(probes):
    model, images = VisionTransformer(3).eval(), torch.randn(1, 3, 16, 16)
    ad.set_attention_backend(model, "probe_a")
    report = ad.set_attention_backend(model, "probe_b", include="blocks.1.*")
    assert dict(report.left)["blocks.0.attn"] == "not in include; keeps 'probe_a'"
    model(images)
    assert [probe.taken() for probe in probes] == [2, 1]
    ad.reset_attention_backend(model.blocks[0])
    model(images)
    assert [probe.taken() for probe in probes] == [1, 1]
    ad.reset_attention_backend(model)
    ad.reset_attention_backend(model)
    model(images)
    assert [probe.taken() for probe in probes] == [0, 0]


def test_models_before_scopes_and_the_innermost_model_first(probes):
    model, x = ExtraTail().eval(), torch.randn(1, 4, DIM)
    ad.set_attention_backend(model, "probe_a")
    ad.set_attention_backend(model.inner, "probe_b")
    with ad.attention_backend("reference"):
        model(x)
    assert [probe.taken() for probe in probes] == [1, 1]
    ad.reset_attention_backend(model.inner)
    ad.reset_attention_backend(model)


def test_a_failure_while_applying_leaves_everything_as_it_was(probes, monkeypatch):
    from attention_dispatch import routing

    model, images = VisionTransformer(3).eval(), torch.randn(1, 3, 16, 16)
    ad.set_attention_backend(model, "probe_a", include="blocks.0.*")
    calls = []

    def fails_at_third(site, choice, upstream=routing._set):
        calls.append(site.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        upstream(site, choice)

    monkeypatch.setattr(routing, "_set", fails_at_third)
    with pytest.raises(KeyboardInterrupt):
        ad.set_attention_backend(model, "probe_b")
    model(images)
    assert [probe.taken() for probe in probes] == [1, 0]
    ad.reset_attention_backend(model)


def test_one_holder_cannot_have_two_settings(probes):
    class Processor:
        _attention_backend = None

        def __call__(self, module, x):
            return ad.dispatch_attention_fn(x, x, x, backend=self._attention_backend)

    class Attention(torch.nn.Module):
        def __init__(self, processor):
            super().__init__()
            self.processor = processor

        def forward(self, x):
            return self.processor(self, x)

    shared = Processor()
    model = torch.nn.Sequential(Attention(shared), Attention(shared))
    with pytest.raises(InvalidCallError, match="share one Processor"):
        ad.set_attention_backend(model, {"0": "probe_a", "1": "probe_b"})
    ad.set_attention_backend(model, "probe_a")
    model(torch.randn(1, 4, 2, 8))
    assert probes[0].taken() == 2
    ad.reset_attention_backend(model)
    assert "_attention_backend" not in vars(shared)

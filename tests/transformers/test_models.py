"""Real model code with tiny random weights: the same numbers and tokens as with sdpa."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import attention_dispatch as ad
from attention_dispatch import policies
from attention_dispatch.errors import (
    BackendRejectedError,
    BackendUnavailableError,
    InvalidCallError,
    UnknownBackendError,
)
from attention_dispatch.integrations import transformers as integration
from attention_dispatch.request import current

from .tiny import DECODERS, inputs, make, prompt


@pytest.fixture
def seen():
    """The calls made: (backend, mask kind, causal, window, Sq, Sk)."""
    found = []

    def note(call, spec, request, plan, output):
        facts = (spec.mask, call.is_causal, call.window_size, call.query.shape[1], call.key.shape[1])
        found.append((plan.backend.name, *facts))
        return output

    current.observer = note
    current.refresh()
    yield found
    current.observer = None
    current.refresh()


def hidden(model, **kwargs):
    with torch.no_grad():
        output = model(**kwargs)
    return output.logits if "logits" in output else output[0] if "last_hidden_state" in output else output.logits_per_image


def baseline(name):
    """What the tests compare with: sdpa, or eager where transformers has no sdpa for the model."""
    return "eager" if name in ("gemma2", "gpt_oss") else "sdpa"


def kept(name, values):
    """Values without the rows of padding, which see no key: there, libraries differ by design."""
    if name in (*DECODERS, "gemma2", "gpt_oss"):
        return values[prompt()["attention_mask"].bool()]
    return values[inputs("bert")["attention_mask"].bool()] if name == "bert" else values


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss", "bert", "vit", "clip", "whisper", "t5"]
)
def test_forward_is_that_of_transformers(name, seen):
    model = make(name)
    model.set_attn_implementation(baseline(name))
    expected = hidden(model, **inputs(name))
    report = ad.set_attention_backend(model, "reference")
    assert len(report.routed) == {"clip": 4, "whisper": 6, "t5": 6}.get(name, 2) and not report.left
    result = hidden(model, **inputs(name))
    assert {backend for backend, *_ in seen} == {"reference"} and len(seen) == len(report.routed)
    torch.testing.assert_close(kept(name, result), kept(name, expected), atol=2e-5, rtol=1e-4)
    ad.reset_attention_backend(model)
    assert torch.equal(hidden(model, **inputs(name)), expected) and len(seen) == len(report.routed)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("name", [*DECODERS, "gemma2", "gpt_oss"])
def test_generate_gives_the_same_tokens(name, cache, seen):
    model = make(name)
    model.set_attn_implementation(baseline(name))
    kwargs = {"max_new_tokens": 8, "do_sample": False, "use_cache": cache is not None, "disable_compile": True}
    if cache:
        kwargs["cache_implementation"] = {"dynamic": "dynamic", "static": "static"}[cache]
    expected = model.generate(**prompt(), **kwargs)
    backend = "reference" if name in ("gemma2", "gpt_oss") else "native"
    model.set_attn_implementation(f"attention_dispatch:{backend}")
    assert torch.equal(model.generate(**prompt(), **kwargs), expected)
    assert {used for used, *_ in seen} == {backend}


def test_whisper_and_t5_generate_the_same_tokens():
    for name in ("whisper", "t5"):
        model, given = make(name), inputs(name)
        given.pop("decoder_input_ids")
        expected = model.generate(**given, max_new_tokens=8, do_sample=False)
        ad.set_attention_backend(model, "native")
        assert torch.equal(model.generate(**given, max_new_tokens=8, do_sample=False), expected)


def test_prefill_in_chunks_is_aligned_to_the_last_key(seen):
    for name in ("llama", "qwen2"):
        model, ids = make(name), prompt()["input_ids"][1:]
        with torch.no_grad():
            expected = model(ids).logits
            model.set_attn_implementation("attention_dispatch:native")
            seen.clear()
            first = model(ids[:, :3], use_cache=True)
            second = model(ids[:, 3:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), expected, atol=2e-5, rtol=1e-4)
    assert ("native", "none", False, (-1, 3), 4, 7) in seen


def test_masks_arrive_as_structure(seen):
    model = make("qwen2")  # a window of 4 in its first layer
    ad.set_attention_backend(model, "native")
    with torch.no_grad():
        model(**prompt())
        assert [facts[1:4] for facts in seen] == [("key_padding", True, (3, 0)), ("key_padding", True, (-1, -1))]
        seen.clear()
        model(prompt()["input_ids"])
        assert [facts[1:4] for facts in seen] == [("none", True, (3, 0)), ("none", True, (-1, -1))]
    bert = make("bert")
    ad.set_attention_backend(bert, "native")
    seen.clear()
    hidden(bert, **inputs("bert"))
    assert {facts[1:3] for facts in seen} == {("key_padding", False)}
    ad.reset_attention_backend(model), ad.reset_attention_backend(bert)


def test_padding_that_hides_nothing_is_no_mask(seen):
    model = make("llama")
    model.set_attn_implementation("attention_dispatch")
    ids = prompt()["input_ids"]
    with torch.no_grad(), ad.attention_backend("reference"):
        model(ids, attention_mask=torch.ones_like(ids))
    assert [facts[:3] for facts in seen] == [("reference", "none", True)] * 2


def test_masks_of_ones_own_and_packed_sequences_are_exact():
    model, ids = make("llama"), prompt()["input_ids"]
    own = torch.rand(2, 1, 7, 7) > 0.3
    own[:, :, range(7), range(7)] = True
    packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3]] * 2)
    cases = [{"attention_mask": own}, {"position_ids": packed, "use_cache": False}]
    with torch.no_grad():
        for extra in cases:
            model.set_attn_implementation("sdpa")
            expected = model(ids, **extra).logits
            model.set_attn_implementation("attention_dispatch:reference")
            torch.testing.assert_close(model(ids, **extra).logits, expected, atol=2e-5, rtol=1e-4)


def test_softcap_and_sinks_are_refused_by_kernels_without_them():
    for name, code in (("gemma2", "softcap"), ("gpt_oss", "lse")):
        model = make(name)
        model.set_attn_implementation("attention_dispatch:native")
        with torch.no_grad(), pytest.raises(BackendRejectedError) as caught:
            model(**prompt())
        assert code in caught.value.codes
    model.set_attn_implementation("attention_dispatch:reference")
    with pytest.raises(BackendRejectedError, match="gradients"):
        model(**prompt())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "gpt_oss", "bert", "vit", "whisper", "t5"])
def test_attention_weights_are_those_of_eager(name):
    model, given = make(name), inputs(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**given, output_attentions=True)
        ad.set_attention_backend(model, "reference")
        result = model(**given, output_attentions=True)
    kinds = [kind for kind in expected if kind.endswith("attentions") and expected[kind]]
    assert kinds
    for kind in kinds:
        assert len(result[kind]) == len(expected[kind]) == 2
        for ours, theirs in zip(result[kind], expected[kind]):
            if "attention_mask" in given and kind == "attentions":
                # Rows of padding see no key.
                rows = given["attention_mask"].bool()
                ours, theirs = ours.transpose(1, 2)[rows], theirs.transpose(1, 2)[rows]
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    ad.reset_attention_backend(model)


def test_attention_weights_in_generate_with_a_static_cache():
    model = make("llama")
    kwargs = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_attentions": True}
    kwargs |= {"cache_implementation": "static", "disable_compile": True}
    ids = prompt()["input_ids"][1:]
    found = []
    for implementation in ("eager", "attention_dispatch:native"):
        model.set_attn_implementation(implementation)
        found.append(model.generate(ids, **kwargs).attentions)
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_attention_weights_asked_for_by_the_config():
    model = make("bert")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    expected = model(**inputs("bert")).attentions
    ad.set_attention_backend(model, "native")
    rows = inputs("bert")["attention_mask"].bool()
    for ours, theirs in zip(model(**inputs("bert")).attentions, expected):
        torch.testing.assert_close(ours.transpose(1, 2)[rows], theirs.transpose(1, 2)[rows], atol=2e-5, rtol=1e-4)
    model.train()
    with pytest.raises(InvalidCallError, match="dropped"):
        model(**inputs("bert"))
    ad.reset_attention_backend(model)


def test_what_cannot_be_served_is_refused():
    model = make("bert")
    module = model.encoder.layer[0].attention.self
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(BackendRejectedError, match="block_indices"):
        integration.attention_forward(module, q, q, q, None, block_indices=torch.zeros(1))
    with pytest.raises(InvalidCallError, match="changed its mask"):
        integration.attention_forward(module, q, q, q, torch.ones(1, 1, 3, 3, dtype=torch.int8))


def test_names_are_checked_like_every_request():
    model = make("llama")
    for spelled in ("attention_dispatch:native", "attention_dispatch:NATIVE", "attention_dispatch:_native_flash"):
        model.set_attn_implementation(spelled)
        assert model.config._attn_implementation.lower() == spelled.lower()
        hidden(model, **prompt())
    with pytest.raises(UnknownBackendError, match="native"):
        model.set_attn_implementation("attention_dispatch:nativ")
    with pytest.raises(BackendUnavailableError):
        model.set_attn_implementation("attention_dispatch:flash_4")


def test_every_backend_has_a_name_and_deactivate_leaves_none():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name in ad.list_backends():
        assert integration.implementation(name) in ALL_ATTENTION_FUNCTIONS
        assert "flash" not in integration.implementation(name)
    integration.deactivate()
    try:
        assert not [key for key in ALL_ATTENTION_FUNCTIONS if key.startswith("attention_dispatch")]
    finally:
        integration.activate()


def test_reset_restores_each_config_and_sharing_is_respected(seen):
    model = make("clip")
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    before = [model.config._attn_implementation, model.text_model.config._attn_implementation]
    text, vision = model.text_model, model.vision_model
    ad.set_attention_backend(text, "reference")
    ad.set_attention_backend(vision.encoder.layers[0], "reference")
    hidden(model, **inputs("clip"))
    # The other layer of the vision model shares the config, and runs on the nearest setting.
    assert sorted(backend for backend, *_ in seen) == ["native", "reference", "reference", "reference"]
    ad.reset_attention_backend(vision.encoder.layers[0])
    seen.clear()
    hidden(model, **inputs("clip"))
    assert [backend for backend, *_ in seen] == ["reference", "reference"]
    ad.reset_attention_backend(model)
    assert [model.config._attn_implementation, text.config._attn_implementation] == before
    assert vision.config._attn_implementation == "sdpa"


def test_copies_keep_their_setting_and_save_pretrained_does_not(seen, tmp_path):
    model = make("llama")
    ad.set_attention_backend(model, "reference")
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    model.save_pretrained(tmp_path)
    assert "attention_dispatch" not in (tmp_path / "config.json").read_text()
    ad.reset_attention_backend(model)
    for twin in twins:
        seen.clear()
        hidden(twin, **prompt())
        assert [backend for backend, *_ in seen] == ["reference"] * 2
        ad.reset_attention_backend(twin)
        assert twin.config._attn_implementation == "sdpa"


def test_policies_choose_by_role_layer_and_step(seen):
    model = make("whisper")
    ad.set_attention_backend(model, policies.roles(self="reference", cross="_native_math"))
    hidden(model, **inputs("whisper"))
    assert sorted(backend for backend, *_ in seen) == ["_native_math"] * 2 + ["reference"] * 4
    ad.reset_attention_backend(model)
    model = make("llama")
    seen.clear()
    steps = policies.steps({"0:1": "reference", "1:": "_native_math"})
    ad.set_attention_backend(model, policies.modules({"*.0.*": steps}, default="native"))
    for step in range(2):
        with policies.at_step(step):
            hidden(model, **prompt())
    assert [backend for backend, *_ in seen] == ["reference", "native", "_native_math", "native"]
    ad.reset_attention_backend(model)


@pytest.mark.parametrize("name", ["llama", "qwen2", "bert"])
def test_fullgraph(name):
    torch._dynamo.reset()
    model = make(name)
    ad.set_attention_backend(model, "_native_math")
    expected = hidden(model, **inputs(name))
    counter = CompileCounter()
    run = torch.compile(model, fullgraph=True, backend=counter)
    given = {**inputs(name), **({} if name == "bert" else {"use_cache": False})}
    torch.testing.assert_close(kept(name, hidden(run, **given)), kept(name, expected), atol=1e-5, rtol=1e-4)
    assert counter.frame_count == 1
    ad.reset_attention_backend(model)


def test_training_has_the_gradients_of_sdpa():
    gradients = []
    for implementation in ("sdpa", "attention_dispatch:reference"):
        model = make("llama").train()
        model.set_attn_implementation(implementation)
        ids = prompt()["input_ids"][1:]
        model(ids, labels=ids).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)

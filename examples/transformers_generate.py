"""Generate with a transformers model on several backends: the same tokens from each.

    python examples/transformers_generate.py

The model is a tiny Qwen3 with random weights, so the text is noise; put a checkpoint of yours in its place with
``AutoModelForCausalLM.from_pretrained(name, attn_implementation="attention_dispatch:native")``.
"""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

import attention_dispatch as ad
import attention_dispatch.integrations.transformers  # registers "attention_dispatch" and "attention_dispatch:NAME"

CONFIG = Qwen3Config(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(CONFIG).eval()
    # Two prompts of different lengths, padded on the left.
    ids = torch.randint(3, 256, (2, 12))
    attention_mask = torch.ones_like(ids)
    attention_mask[0, :5] = 0
    arguments = {"input_ids": ids, "attention_mask": attention_mask, "max_new_tokens": 12, "do_sample": False}

    expected = model.generate(**arguments)
    print("sdpa".ljust(36), expected[0, 12:].tolist())
    for name in ("native", "_native_flash", "reference", "auto"):
        model.set_attn_implementation(f"attention_dispatch:{name}")
        tokens = model.generate(**arguments)
        print(f"attention_dispatch:{name}".ljust(36), "the same tokens" if torch.equal(tokens, expected) else "DIFFERENT")

    # Per layer, by a policy; set_attention_backend also switches the implementation, and reset puts it back.
    model.set_attn_implementation("sdpa")
    print(ad.set_attention_backend(model, ad.policies.ends("reference", "native", blocks=1)))
    print("the same tokens" if torch.equal(model.generate(**arguments), expected) else "DIFFERENT")
    ad.reset_attention_backend(model)
    print("after the reset:", model.config._attn_implementation)


if __name__ == "__main__":
    main()

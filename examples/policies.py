"""Policies: different backends for parts of a model and for parts of a denoising run, as one printable value.

    python examples/policies.py
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import attention_dispatch as ad
from attention_dispatch import policies


class Attention(nn.Module):
    def __init__(self, dim: int = 32, heads: int = 4):
        super().__init__()
        self.heads, self.q, self.kv = heads, nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x, context):
        parts = (self.q(x), *self.kv(context).chunk(2, dim=-1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(), Attention()

    def forward(self, x, context):
        x = x + self.self_attn(x, x)
        return x + self.cross_attn(x, context)


class Denoiser(nn.Module):
    def __init__(self, depth: int = 6):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x, context):
        for block in self.blocks:
            x = block(x, context)
        return x


def main() -> None:
    torch.manual_seed(0)
    model, x, context = Denoiser().eval(), torch.randn(1, 16, 32), torch.randn(1, 7, 32)
    # On a GPU, FAST would be a quantised kernel, such as "triton_sage"; these two run everywhere.
    exact, fast = "reference", "native"

    # Keep the first and the last two blocks exact.
    print(ad.set_attention_backend(model, policies.ends(exact, fast, blocks=2)), "\n")

    # Self-attention fast, cross-attention exact; and the first and last two of 10 steps exact altogether.
    policy = policies.steps(
        {"0:2": exact, "2:-2": policies.roles(self=fast, cross=exact), "-2:": exact}, total=10
    )
    print(policy)
    print("read back from JSON, it is equal:", policies.from_json(policy.to_json()) == policy, "\n")
    ad.set_attention_backend(model, policy)

    # One graph for each different choice, not for each step.
    graphs = []
    compiled = torch.compile(model, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    with torch.no_grad():
        for step in range(10):
            with policies.at_step(step):
                x = compiled(x, context)
    print(f"10 steps ran, {len(graphs)} graphs were compiled")
    ad.reset_attention_backend(model)


if __name__ == "__main__":
    main()

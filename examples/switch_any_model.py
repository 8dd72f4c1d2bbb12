"""Route a model that knows nothing of this library, see what happened, compile it, and take it back.

    python examples/switch_any_model.py
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import attention_dispatch as ad


class Attention(nn.Module):
    """Attention as it stands in many models: nothing here is made for this library."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, dim: int = 64, heads: int = 4):
        super().__init__()
        self.own = Attention(dim, heads)
        self.torchs = nn.TransformerEncoderLayer(dim, heads, 2 * dim, batch_first=True)

    def forward(self, x):
        return self.torchs(x + self.own(x))


def main() -> None:
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(2, 50, 64)
    with torch.no_grad():
        before = model(x)
        print(ad.set_attention_backend(model, ["flash", "_native_flash", "reference"]), "\n")
        print(f"largest difference from before: {(model(x) - before).abs().max():.1e}")

        compiled = torch.compile(model, fullgraph=True, backend="eager")
        print(f"the same, compiled:             {(compiled(x) - before).abs().max():.1e}\n")

        q = torch.randn(2, 50, 4, 16)
        decision = ad.explain(q, q, q, module=model.own)
        print(f"{decision.call}\nruns on {decision.backend}; asked for: {decision.request}, {decision.origin}")
        for reason in decision.why_not("flash"):
            print(f"not flash: {reason.what} -> {reason.fix}")

        ad.reset_attention_backend(model)
        print(f"\nafter the reset, exactly as before: {torch.equal(model(x), before)}")


if __name__ == "__main__":
    main()

"""The merge kernel against the merge in plain torch; on a GPU, or under ``TRITON_INTERPRET=1``."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed; a CUDA build of torch brings it")

from attention_dispatch.distributed.merge import merge_attention
from attention_dispatch.distributed.merge_kernel import merge_into

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if interpreted else "cuda"

pytestmark = [] if interpreted else [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, or TRITON_INTERPRET=1"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] if interpreted else [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 40])
def test_equals_plain_torch(dtype, head_dim):
    torch.manual_seed(0)
    # Strided as a chunk of heads of a larger tensor is.
    wide = [torch.randn(2, 37, 5, head_dim, device=DEVICE).to(dtype) for _ in range(3)]
    out_a, out_b, into_out = (tensor[:, :, 1:4] for tensor in wide)
    lse_a, lse_b, into_lse = (torch.randn(2, 5, 37, device=DEVICE)[:, 1:4] * 30 for _ in range(3))
    lse_a[:, :, 3], lse_b[:, :, 5], lse_a[:, 1, 7], lse_b[:, 1, 7] = (-torch.inf,) * 4
    out_a[:, 7, 1] = out_b[:, 7, 1] = 0
    wanted, wanted_lse = merge_attention(out_a.double(), lse_a.double(), out_b.double(), lse_b.double())
    kept = wide[2][:, :, 0].clone()
    merge_into(out_a, lse_a, out_b, lse_b, into_out, into_lse)
    limit = 1e-6 if dtype == torch.float32 else 2 ** -8
    assert (into_out.double() - wanted).norm() / wanted.norm() < limit
    assert torch.equal(torch.isinf(into_lse), torch.isinf(wanted_lse))
    assert torch.allclose(into_lse.double(), wanted_lse, rtol=1e-6, atol=1e-6)
    assert torch.equal(wide[2][:, :, 0], kept)
    merge_into(out_a, lse_a, out_b, lse_b, out_a, lse_a)
    assert torch.equal(out_a, into_out) and torch.equal(lse_a, into_lse)

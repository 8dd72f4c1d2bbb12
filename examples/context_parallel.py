"""One sequence over two processes, on CPU as pasted and on GPUs where there are some.

    torchrun --nproc-per-node=2 examples/context_parallel.py
"""

import os

import torch
import torch.distributed as dist

from attention_dispatch import dispatch_attention_fn
from attention_dispatch.distributed import ContextParallel, context_parallel, gather, shard


def main() -> None:
    """Compare a ring and Ulysses with the same attention on one process."""
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    world = dist.get_world_size()
    torch.manual_seed(0)
    # 1001 tokens do not divide by the number of ranks, and need not.
    query, key, value = (torch.randn(1, 1001, heads, 64, device=device) for heads in (8, 2, 2))
    padding = torch.arange(1001, device=device)[None] >= 100

    def attend(parallel: ContextParallel) -> torch.Tensor:
        local = [shard(tensor, parallel) for tensor in (query, key, value)]
        out = dispatch_attention_fn(
            *local, padding, is_causal=True, enable_gqa=True, backend="reference", parallel_config=parallel
        )
        return gather(out, parallel)

    hidden = ~(padding[:, None] & torch.ones(1001, 1001, dtype=torch.bool, device=device).tril())
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(4, 2)) / 8
    weights = torch.softmax(scores.masked_fill(hidden[:, None], -torch.inf), -1).nan_to_num(0.0)
    alone = torch.einsum("bhqk,bkhd->bqhd", weights, value.repeat_interleave(4, 2))
    settings = {
        "ring": context_parallel(None, ring=world, layout="head_tail"),
        "ulysses": context_parallel(None, ulysses=world),
    }
    for name, parallel in settings.items():
        difference = (attend(parallel) - alone).norm() / alone.norm()
        if dist.get_rank() == 0:
            print(f"{name}: relative difference to one process {difference:.1e}")
        assert difference < 1e-5
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

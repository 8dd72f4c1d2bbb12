"""Context parallelism on paper and as measured.

    python benchmarks/distributed.py                                             # the model, 2 to 1024 GPUs
    torchrun --nproc-per-node=2 benchmarks/distributed.py                        # measured; CUDA if there is one
    torchrun --nproc-per-node=2 benchmarks/distributed.py --json results.json

Measured rows: one process, Ulysses and ring, and diffusers' own context parallelism with the same kernels where
diffusers is installed, timed in turns. Times are medians of the slowest rank, forward, without gradients. ``error`` is the relative
L2 distance of sampled rows from float64 attention; a row whose error is too large has no efficiency. ``overlap`` is the
share of the communication (the same call with a kernel that computes nothing) hidden behind the kernels.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attention_dispatch import registry
from attention_dispatch.capabilities import row_for
from attention_dispatch.distributed import (
    BlockCall,
    ContextParallel,
    Link,
    context_parallel_attention,
    plan_parallelism,
    shard,
)
from attention_dispatch.distributed.connect import pairs_for
from attention_dispatch.errors import AttentionDispatchError
from attention_dispatch.request import parse

# Largest relative error of a row that counts as right; quantised kernels declare theirs.
ERROR_LIMIT = 2e-2
SAMPLED_ROWS = 64
COLUMNS = ("scheme", "backend", "tokens", "ms", "efficiency", "peak GB", "peak/one", "overlap", "error", "predicted ms")


class NoKernel:
    """A kernel that computes nothing: what is left of a call is communication, copies and merging."""

    name, differentiable = "nothing", False

    def reasons_against(self, *_: Any) -> tuple[()]:
        return ()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, call: BlockCall) -> tuple[Tensor, Tensor]:
        out = query.new_empty(*query.shape[:3], value.shape[3])
        return out, query.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=torch.float32)

    def backward(self, *_: Any) -> Any:
        raise NotImplementedError("communication is timed forward only")


def print_model(arguments: argparse.Namespace) -> None:
    """Chosen degrees for 2 to 1024 GPUs and three lengths."""
    print("Model (H100, NVLink 4 within hosts of 8, 400 Gb/s per GPU between them), forward, "
          f"H{arguments.heads} KV{arguments.kv_heads} D{arguments.head_dim} bf16")
    print(f"{'tokens':>9} {'GPUs':>5} {'ring':>5} {'ulysses':>7} {'ms':>10} {'efficiency':>10} {'sent MB/rank':>12} "
          f"{'messages':>8} {'GB/rank':>8}")
    for tokens in (65536, 262144, 1 << 20):
        for size in (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
            plan = plan_parallelism(tokens, arguments.heads, arguments.kv_heads, size, head_dim=arguments.head_dim,
                                    is_causal=arguments.causal)
            best = plan.estimates[0]
            print(f"{tokens:9d} {size:5d} {plan.ring:5d} {plan.ulysses:7d} {best.total_s * 1e3:10.3f} "
                  f"{best.efficiency(plan.one_gpu_s):10.2f} {best.sent_bytes / 1e6:12.1f} {best.messages:8d} "
                  f"{best.memory_bytes / 1e9:8.2f}")


@dataclass
class Scheme:
    """A way to run the call, and what was measured of it."""

    name: str
    run: Callable[[], Tensor]
    communicate: Callable[[], Any] | None = None
    chunks: int = 0
    peak: float = 0.0
    error: float = 0.0
    seconds: float = 0.0
    moving: float | None = None


class Bench:
    """Measurements of one process of the world."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.cuda = torch.cuda.is_available()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.cuda else torch.device("cpu")
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.rows: list[dict[str, Any]] = []
        # Bytes that belong to no scheme under measurement.
        self.held = 0
        layout = "head_tail" if arguments.causal else "contiguous"
        self.parallel = {"ring": ContextParallel(ring=self.world, layout=layout),
                         "ulysses": ContextParallel(ulysses=self.world)}

    def allocated(self) -> int:
        """Bytes of this rank's tensors."""
        return torch.cuda.memory_allocated() if self.cuda else 0

    def peak(self, function: Callable[[], Any]) -> float:
        """Peak bytes of the rank that needs most, inputs included and those of other schemes left out."""
        function()
        if not self.cuda:
            return 0.0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        function()
        return self.worst(torch.cuda.max_memory_allocated() - self.held)

    def in_turns(self, functions: list[Callable[[], Any]]) -> list[float]:
        """Median seconds of each on the slowest rank; every round times all of them, so that clocks and heat weigh on each alike."""
        seconds: list[list[float]] = [[] for _ in functions]
        for _ in range(self.arguments.repeats):
            for function, taken in zip(functions, seconds):
                dist.barrier()
                self.wait()
                start = time.perf_counter()
                function()
                self.wait()
                taken.append(time.perf_counter() - start)
        return [self.worst(statistics.median(taken)) for taken in seconds]

    def worst(self, number: float) -> float:
        """The largest of all ranks."""
        largest = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.item()

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize()

    def inputs(self, tokens: int) -> list[Tensor]:
        """q, k, v of the whole sequence, alike on every rank; k with a channel offset as diffusion models have."""
        generator = torch.Generator(self.device).manual_seed(0)
        heads = (self.arguments.heads, self.arguments.kv_heads, self.arguments.kv_heads)
        tensors = [torch.randn(1, tokens, count, self.arguments.head_dim, generator=generator, device=self.device,
                               dtype=self.dtype) for count in heads]
        tensors[1] += torch.randn(1, 1, heads[1], self.arguments.head_dim, generator=generator, device=self.device,
                                  dtype=self.dtype) * 2
        return tensors

    def exact(self, whole: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Sampled query positions and float64 attention of head 0 there."""
        query, key, value = whole
        tokens = query.shape[1]
        rows = torch.linspace(0, tokens - 1, SAMPLED_ROWS, device=self.device).long()
        scores = query[0, rows, 0].double() @ key[0, :, 0].double().T / math.sqrt(query.shape[3])
        if self.arguments.causal:
            scores.masked_fill_(torch.arange(tokens, device=self.device) > rows[:, None], -torch.inf)
        return rows, torch.softmax(scores, -1) @ value[0, :, 0].double()

    def error(self, out: Tensor, positions: Tensor, rows: Tensor, exact: Tensor) -> float:
        """Relative error of the sampled rows that this rank holds; the worst rank's."""
        held = torch.isin(rows, positions)
        at = torch.searchsorted(positions, rows[held])
        found = out[0, at, 0].double()
        return self.worst(((found - exact[held]).norm() / exact[held].norm()).item())

    def run(self, tokens: int, backend: str) -> None:
        """All schemes with one kernel at one length."""
        self.held = self.allocated()
        whole = self.inputs(tokens)
        truth = self.exact(whole)
        try:
            [pair] = pairs_for(parse(backend), *whole)
        except AttentionDispatchError as error:
            self.skip("one process", backend, tokens, error)
            return
        call = BlockCall(is_causal=self.arguments.causal, scale=self.arguments.head_dim ** -0.5, needs_lse=False)
        every = torch.arange(tokens, device=self.device)
        with torch.no_grad():
            schemes = [Scheme("one process", lambda: pair.forward(*whole, call)[0])]
            self.prove(schemes[0], every, truth)
            # A rank of a scheme holds its shard only.
            whole.clear()
            for name, parallel in self.parallel.items():
                self.held = self.allocated()
                local = [shard(tensor, parallel) for tensor in self.inputs(tokens)]
                schemes += self.own(name, backend, tokens, parallel, pair, local, shard(every[None], parallel)[0], truth)
            schemes += self.peers(backend, tokens, truth)
            whole.extend(self.inputs(tokens))
            times = self.in_turns([run for scheme in schemes for run in (scheme.run, scheme.communicate) if run])
            for scheme in schemes:
                scheme.seconds = times.pop(0)
                scheme.moving = times.pop(0) if scheme.communicate else None
        for scheme in schemes:
            self.record(scheme, schemes[0], backend, tokens)

    def prove(self, scheme: Scheme, positions: Tensor, truth: tuple[Tensor, Tensor]) -> Scheme:
        """Its peak and its error."""
        scheme.peak = self.peak(scheme.run)
        scheme.error = self.error(scheme.run(), positions, *truth)
        return scheme

    def own(self, name: str, backend: str, tokens: int, parallel: ContextParallel, pair: Any, local: list[Tensor],
            positions: Tensor, truth: tuple[Tensor, Tensor]) -> list[Scheme]:
        """One of this project's schemes; none where it refuses the call."""

        def attend(kernel: Any) -> Tensor:
            return context_parallel_attention(*local, parallel=parallel, pair=kernel, is_causal=self.arguments.causal)

        try:
            scheme = self.prove(Scheme(name, lambda: attend(pair), lambda: attend(NoKernel())), positions, truth)
        except AttentionDispatchError as refusal:
            self.skip(name, backend, tokens, refusal)
            return []
        plan, _ = list(parallel.plans.values())[-1]
        scheme.chunks = len(plan.chunks)
        return [scheme]

    def predicted(self, scheme: str, tokens: int, one_process_s: float) -> float:
        """Seconds by the alpha-beta model with the kernel speed measured on one process."""
        work = 4.0 * tokens * tokens * self.arguments.heads * self.arguments.head_dim
        work /= 2 if self.arguments.causal else 1
        link = None if self.cuda else Link(2e9, 100e-6)
        plan = plan_parallelism(tokens, self.arguments.heads, self.arguments.kv_heads, self.world,
                                head_dim=self.arguments.head_dim, element_size=self.dtype.itemsize,
                                is_causal=self.arguments.causal, tflops=work / one_process_s / 1e12, link=link)
        wanted = (self.world, 1) if scheme == "ring" else (1, self.world)
        return next(e.total_s for e in plan.estimates if (e.ring, e.ulysses) == wanted)

    def peers(self, backend: str, tokens: int, truth: tuple[Tensor, Tensor]) -> list[Scheme]:
        """diffusers' context parallelism with its kernel of the same name."""
        if self.arguments.causal or not self.cuda or self.arguments.heads != self.arguments.kv_heads:
            return []
        try:
            from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
            from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
        except ImportError as error:
            self.skip("diffusers", backend, tokens, error)
            return []
        if backend not in {member.value for member in AttentionBackendName}:
            return []
        parallel = self.parallel["ulysses"]
        self.held = self.allocated()
        local = [shard(tensor, parallel).clone() for tensor in self.inputs(tokens)]
        positions = shard(torch.arange(tokens, device=self.device)[None], parallel)[0]
        found = []
        for name, shape in (("ulysses", (1, self.world)), ("ring", (self.world, 1))):
            mesh = dist.device_mesh.init_device_mesh("cuda", shape, mesh_dim_names=("ring", "ulysses"))
            inner = ContextParallelConfig(ring_degree=shape[0], ulysses_degree=shape[1], mesh=mesh)
            config = ParallelConfig(context_parallel_config=inner)
            config.setup(self.rank, self.world, self.device, mesh=mesh)

            def attend(config: Any = config) -> Tensor:
                return dispatch_attention_fn(*local, backend=AttentionBackendName(backend), parallel_config=config)

            try:
                found.append(self.prove(Scheme(f"diffusers {name}", attend), positions, truth))
            except Exception as error:  # another project's failure is its result here
                self.skip(f"diffusers {name}", backend, tokens, error)
        return found

    def skip(self, scheme: str, backend: str, tokens: int, error: Exception) -> None:
        """Note what was not measured, and why."""
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        self.rows.append({"scheme": scheme, "backend": backend, "tokens": tokens, "not measured": text})
        if self.rank == 0:
            print(f"{scheme:18} {backend:16} {tokens:8d}  not measured: {text}", flush=True)

    def record(self, scheme: Scheme, one: Scheme, backend: str, tokens: int) -> None:
        """Keep a row and print it on rank 0."""
        declared = row_for(registry.get(backend).capabilities, self.device.type)
        right = scheme.error < max(ERROR_LIMIT, declared.tolerance.relative_l2 if declared is not None else 0.0)
        ranks = 1 if scheme is one else self.world
        overlap = predicted = None
        if scheme.moving is not None:
            overlap = max(0.0, min(1.0, 1 - (scheme.seconds - one.seconds / ranks) / scheme.moving))
            predicted = self.predicted(scheme.name, tokens, one.seconds) * 1e3
        row = {"scheme": scheme.name, "backend": backend, "tokens": tokens, "ms": scheme.seconds * 1e3,
               "efficiency": one.seconds / scheme.seconds / ranks if right else None, "peak GB": scheme.peak / 1e9,
               "peak/one": scheme.peak / one.peak if one.peak else None, "overlap": overlap, "error": scheme.error,
               "predicted ms": predicted}
        if scheme.chunks:
            row["head chunks"] = scheme.chunks
        self.rows.append(row)
        if self.rank == 0:
            if len([r for r in self.rows if "ms" in r]) == 1:
                print(f"{'scheme':18} {'backend':16} {'tokens':>8} {'ms':>10} {'effic.':>7} {'peak GB':>8} "
                      f"{'peak/one':>8} {'overlap':>7} {'error':>8} {'predicted':>10}")
            cells = [row[name] for name in COLUMNS[3:]]
            formats = ("10.3f", "7.3f", "8.3f", "8.3f", "7.2f", "8.1e", "10.3f")
            text = [f"{'-':>{form.split('.')[0]}}" if cell is None else format(cell, form)
                    for cell, form in zip(cells, formats)]
            print(f"{scheme.name:18} {backend:16} {tokens:8d} " + " ".join(text) + ("" if right else "  WRONG"), flush=True)


def measure(arguments: argparse.Namespace) -> None:
    """Run every length and kernel in a world started by torchrun."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo")
    bench = Bench(arguments)
    for tokens in arguments.tokens or ((16384, 65536, 262144) if cuda else (1024, 4096)):
        for backend in arguments.backends or (("_native_cudnn", "_native_flash", "triton_flash") if cuda
                                              else ("_native_flash",)):
            bench.run(tokens, backend)
            save(bench, arguments)
    dist.destroy_process_group()


def save(bench: Bench, arguments: argparse.Namespace) -> None:
    """The rows so far, so that a run that is cut off leaves them."""
    if arguments.json and bench.rank == 0:
        machine = torch.cuda.get_device_name() if bench.cuda else platform.processor() or platform.machine()
        Path(arguments.json).write_text(json.dumps({
            "date": str(date.today()), "machine": f"{bench.world} x {machine}", "torch": torch.__version__,
            "heads": arguments.heads, "kv_heads": arguments.kv_heads, "head_dim": arguments.head_dim,
            "causal": arguments.causal, "dtype": str(bench.dtype), "rows": bench.rows}, indent=1))


def main() -> None:
    """Parse the command line; measure inside a world, print the model outside one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths of the whole sequence")
    parser.add_argument("--backends", nargs="+", help="kernels to measure")
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also write the results to this file")
    arguments = parser.parse_args()
    arguments.kv_heads = arguments.kv_heads or arguments.heads
    if "RANK" in os.environ:
        measure(arguments)
    else:
        print_model(arguments)


if __name__ == "__main__":
    main()

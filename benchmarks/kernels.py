"""Speed, error, memory and first-call cost of this project's kernels beside torch's own, on one CUDA GPU.

    python benchmarks/kernels.py [--shapes 1x16384x24x128 ...] [--json out.json] [--plot out.png] [--quick]

All kernels of a shape are timed in turns within one run, so that clocks and neighbours weigh on each alike, and each timing
starts after a rest (`--rest`, 0.1 s): long calls reach the power limit of an H100 within tens of milliseconds, its clock then
falls by up to a quarter, and without a rest a kernel pays for the one before it. `--rest 0` shows that. Quantised kernels are timed end to end, quantisation included. Times are medians over CUDA-event timings; TFLOP/s counts 4·B·H·Sq·Sk·D, halved
under a causal mask, times 3.5 for forward and backward. K carries a per-channel offset of 2σ, as diffusion transformers' keys
do. Errors are relative L2 against float64 on one head; a kernel whose error exceeds its tolerance gets no speed-up.
Besides torch's kernels, SageAttention and FlashAttention 2, 3 and 4 are measured where they are installed.
`first call` is the time of the first call in this process: compilation, or where Triton's cache on disk has the kernel, loading it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

EXACT_TOLERANCE = 5e-3
GRADIENT_TOLERANCE = 2e-2
TOLERANCE = {"triton_sage": 5e-2, "triton_sage_fp16": 2e-2, "sageattention": 5e-2}
ROUNDS = 5
# So that the figure of a kernel that runs for milliseconds does not rest on single calls between pauses.
LEAST_CALLS = 5


class Shape(NamedTuple):
    batch: int
    seq_q: int
    seq_k: int
    heads: int
    head_dim: int
    causal: bool = False
    padded: bool = False

    def __str__(self) -> str:
        lengths = str(self.seq_q) if self.seq_q == self.seq_k else f"{self.seq_q}q/{self.seq_k}kv"
        extra = " causal" if self.causal else " key padding" if self.padded else ""
        return f"{self.batch}x{lengths} H{self.heads} D{self.head_dim}{extra}"

    @property
    def flops(self) -> float:
        return 4 * self.batch * self.heads * self.seq_q * self.seq_k * self.head_dim / (2 if self.causal else 1)

    @classmethod
    def parse(cls, text: str) -> Shape:
        batch, seq, heads, head_dim = (int(part) for part in text.split("x"))
        return cls(batch, seq, seq, heads, head_dim)


SHAPES = [
    Shape(2, 4096, 4096, 24, 128),
    Shape(1, 16384, 16384, 24, 128),
    Shape(2, 4096, 4096, 24, 64),
    Shape(1, 16384, 16384, 24, 64),
    Shape(1, 16384, 16384, 24, 128, causal=True),
    Shape(1, 32768, 512, 24, 128),
    Shape(1, 4096, 4096, 24, 128),
    Shape(1, 1024, 1024, 24, 128),
    Shape(1, 4250, 4250, 24, 128, padded=True),
]
BACKWARD_SHAPES = [Shape(2, 4096, 4096, 24, 128), Shape(2, 4096, 4096, 24, 64), Shape(2, 4096, 4096, 24, 128, causal=True)]
PLOT_LENGTHS = (1024, 2048, 4096, 8192, 16384)
NOT_DRAWN = "aten efficient"
DIFFERENTIABLE = ("cudnn", "aten flash", "flash_attn_2", "flash_attn_4", "triton_flash")

Kernel = Callable[[Tensor, Tensor, Tensor, Shape, "Tensor | None"], Tensor]


def torch_kernel(backend: SDPBackend) -> Kernel:
    def run(query: Tensor, key: Tensor, value: Tensor, shape: Shape, padding: Tensor | None) -> Tensor:
        mask = None if padding is None else padding[:, None, None, :].expand(-1, 1, shape.seq_q, -1)
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, is_causal=shape.causal
            )
        return out.transpose(1, 2)

    return run


def own_kernel(name: str) -> Kernel:
    from attention_dispatch.kernels import flash_attention, sage_attention

    def run(query: Tensor, key: Tensor, value: Tensor, shape: Shape, padding: Tensor | None) -> Tensor:
        arguments: dict[str, Any] = {
            "scale": shape.head_dim**-0.5,
            "is_causal": shape.causal,
            "key_padding": padding,
        }
        if name == "triton_flash":
            return flash_attention(query, key, value, **arguments)[0]
        return sage_attention(query, key, value, **arguments, pv="fp16" if name == "triton_sage_fp16" else "fp8")[0]

    return run


def installed_kernels() -> dict[str, Kernel]:
    """Kernels of other packages that are importable here and take a plain or causal call."""
    found: dict[str, Kernel] = {}
    if importlib.util.find_spec("sageattention"):
        from sageattention import sageattn

        def sage(query: Tensor, key: Tensor, value: Tensor, shape: Shape, padding: Tensor | None) -> Tensor:
            if padding is not None:
                raise NotImplementedError("sageattention takes no key padding")
            return sageattn(query, key, value, tensor_layout="NHD", is_causal=shape.causal)

        found["sageattention"] = sage
    if importlib.util.find_spec("flash_attn_interface"):
        from flash_attn_interface import flash_attn_func as flash3

        found["flash_attn_3"] = dense(flash3)
    if importlib.util.find_spec("flash_attn_2_cuda"):
        from flash_attn import flash_attn_func as flash2

        found["flash_attn_2"] = dense(flash2)
    # FlashAttention 2's own wheel has an old folder flash_attn/cute.
    if importlib.util.find_spec("cutlass") and any(importlib.metadata.distributions(name="flash-attn-4")):
        from flash_attn.cute import flash_attn_func as flash4

        found["flash_attn_4"] = dense(flash4)
    return found


def dense(function: Callable[..., Any]) -> Kernel:
    """A ``flash_attn_func`` of FlashAttention."""

    def run(query: Tensor, key: Tensor, value: Tensor, shape: Shape, padding: Tensor | None) -> Tensor:
        if padding is not None:
            raise NotImplementedError("flash_attn_func takes no key padding")
        out = function(query, key, value, causal=shape.causal)
        return out[0] if isinstance(out, tuple) else out

    return run


def make_inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    torch.manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    query = normal(shape.batch, shape.seq_q, shape.heads, shape.head_dim)
    key = normal(shape.batch, shape.seq_k, shape.heads, shape.head_dim) + 2 * normal(1, 1, shape.heads, shape.head_dim)
    value = normal(shape.batch, shape.seq_k, shape.heads, shape.head_dim)
    padding = None
    if shape.padded:
        # Image tokens, then 512 places of text of which 154 are used.
        padding = (torch.arange(shape.seq_k, device="cuda") < shape.seq_k - 358)[None].expand(shape.batch, -1).contiguous()
    return query, key, value, padding


def float64_rows(
    query: Tensor, key: Tensor, value: Tensor, shape: Shape, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(rows, answer): up to 512 rows of the first head of the first batch entry, in float64."""
    rows = torch.linspace(0, shape.seq_q - 1, min(512, shape.seq_q), device="cuda").long()
    q, k, v = query[0, rows, 0].double(), key[0, :, 0].double(), value[0, :, 0].double()
    scores = q @ k.T * shape.head_dim**-0.5
    if shape.causal:
        scores.masked_fill_(torch.arange(shape.seq_k, device="cuda")[None] > rows[:, None], float("-inf"))
    if padding is not None:
        scores.masked_fill_(~padding[:1], float("-inf"))
    return rows, scores.softmax(-1) @ v


def milliseconds(run: Callable[[], Any], budget_ms: float) -> float:
    """Median time of calls within about `budget_ms`, the cache cleared before each."""
    from triton.testing import do_bench

    return do_bench(run, warmup=math.ceil(budget_ms / 5), rep=math.ceil(budget_ms), return_mode="median")


class Pace(NamedTuple):
    """Milliseconds to spend on each kernel of a shape, and seconds of rest before each of its timings."""

    budget_ms: float
    rest_s: float


def in_turns(runs: Sequence[Callable[[], Any]], pace: Pace) -> list[float]:
    """For each of `runs` the median over ROUNDS of its time, in ms; all are timed once in every round."""
    budgets = [max(pace.budget_ms / ROUNDS, LEAST_CALLS * milliseconds(run, 1)) for run in runs]
    rounds = []
    for _ in range(ROUNDS):
        times = []
        for run, budget in zip(runs, budgets):
            torch.cuda.synchronize()
            time.sleep(pace.rest_s)
            times.append(milliseconds(run, budget))
        rounds.append(times)
    return [statistics.median(times) for times in zip(*rounds)]


def measure(shape: Shape, kernels: dict[str, Kernel], pace: Pace) -> list[dict[str, Any]]:
    query, key, value, padding = make_inputs(shape)
    rows, want = float64_rows(query, key, value, shape, padding)
    results: list[dict[str, Any]] = []
    runs: list[Callable[[], Tensor]] = []
    for name, kernel in kernels.items():

        def run(kernel: Kernel = kernel) -> Tensor:
            return kernel(query, key, value, shape, padding)

        torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            out = run()
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"  {name}: cannot run this ({str(error).splitlines()[0][:90]})")
            continue
        torch.cuda.synchronize()
        first_call = time.perf_counter() - start
        got = out[0, rows, 0].double()
        error_norm = float((got - want).norm() / want.norm())
        cosine = float(F.cosine_similarity(got.flatten(), want.flatten(), 0))
        del out
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
        runs.append(run)
        results.append(
            {"shape": str(shape), "kernel": name, "error": error_norm, "cosine": cosine, "first_call_s": first_call, "peak_bytes": peak}
        )
    for result, ms in zip(results, in_turns(runs, pace)):
        result["ms"] = ms
        result["tflops"] = shape.flops / result["ms"] / 1e9
    return with_speedups(results)


def with_speedups(results: list[dict[str, Any]], tolerance: float = EXACT_TOLERANCE) -> list[dict[str, Any]]:
    """Adds the ratio to cuDNN where both results are right; a wrong result gets none."""
    baseline = next((r for r in results if r["kernel"] == "cudnn" and r["error"] <= tolerance), None)
    for result in results:
        right = result["error"] <= TOLERANCE.get(result["kernel"], tolerance)
        result["right"] = right
        result["speedup"] = baseline["ms"] / result["ms"] if baseline and right else None
    return results


def measure_backward(shape: Shape, kernels: dict[str, Kernel], pace: Pace) -> list[dict[str, Any]]:
    query, key, value, _ = make_inputs(shape)
    leaves = [x.requires_grad_() for x in (query, key, value)]
    grad = torch.randn_like(query)
    half = [x[:1, :, :1].detach().double().requires_grad_() for x in leaves]
    scores = torch.einsum("bqhd,bkhd->bhqk", half[0], half[1]) * shape.head_dim**-0.5
    if shape.causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), float("-inf"))
    exact = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), half[2])
    want = torch.autograd.grad(exact, half, grad[:1, :, :1].double())
    del scores, exact
    results = []
    runs = []
    for name, kernel in kernels.items():

        def run(kernel: Kernel = kernel) -> tuple[Tensor, ...]:
            return torch.autograd.grad(kernel(*leaves, shape, None), leaves, grad)

        try:
            got = run()
        except (RuntimeError, NotImplementedError) as error:
            print(f"  {name}: cannot run this ({str(error).splitlines()[0][:90]})")
            continue
        error = max(
            float((g[:1, :, :1].double() - w).norm() / w.norm()) for g, w in zip(got, want)
        )
        runs.append(run)
        results.append({"shape": f"{shape} fwd+bwd", "kernel": name, "error": error})
    for result, ms in zip(results, in_turns(runs, pace)):
        result["ms"] = ms
        result["tflops"] = 3.5 * shape.flops / result["ms"] / 1e9
    return with_speedups(results, GRADIENT_TOLERANCE)


def never_returns(name: str) -> bool:
    """Whether a backward pass is known to occupy the GPU for ever with what is installed here."""
    if name != "flash_attn_4":
        return False
    from attention_dispatch import known_bad
    from attention_dispatch.call import canonicalise, spec_of

    tensor = torch.zeros(1, 8, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found = known_bad.reasons("flash_4", spec_of(canonicalise(tensor, tensor, tensor)))
    for reason in found:
        print(f"{name} is not measured backward: {reason}")
    return bool(found)


def show(results: list[dict[str, Any]]) -> None:
    for r in results:
        speedup = f"{r['speedup']:.2f}x cudnn" if r.get("speedup") else "" if r["right"] else "WRONG RESULT: no speed-up"
        extra = ""
        if "peak_bytes" in r:
            extra = f"  cosine {r['cosine']:.5f}  +{r['peak_bytes'] / 2**20:.0f} MiB  first call {r['first_call_s']:.1f} s"
        print(f"  {r['kernel']:17s} {r['tflops']:6.0f} TFLOP/s  {r['ms']:8.3f} ms  error {r['error']:.1e}  {speedup}{extra}")


def drawn_shapes(head_dim: int) -> list[Shape]:
    return [Shape(1, length, length, 24, head_dim) for length in PLOT_LENGTHS]


def plot(path: str, gpu: str, results: list[dict[str, Any]]) -> None:
    """TFLOP/s by length, one line per kernel, head_dim 128 and 64 side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for axis, head_dim in zip(axes, (128, 64)):
        lines: dict[str, list[tuple[int, float]]] = {}
        for shape in drawn_shapes(head_dim):
            for result in results:
                if result["shape"] == str(shape) and result["right"] and result["kernel"] != NOT_DRAWN:
                    lines.setdefault(result["kernel"], []).append((shape.seq_q, result["tflops"]))
        for name, points in lines.items():
            axis.plot(*zip(*points), marker="o", label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(PLOT_LENGTHS, [str(length) for length in PLOT_LENGTHS])
        axis.set_title(f"batch 1, 24 heads, head_dim {head_dim}")
        axis.set_xlabel("sequence length")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("TFLOP/s, end to end")
    axes[1].legend(loc="upper left", ncols=2)
    figure.suptitle(gpu)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", type=Shape.parse, help="BxSxHxD, e.g. 1x16384x24x128 (default: the table)")
    parser.add_argument("--kernels", nargs="*", metavar="NAME", help="measure these only (default: all that are installed)")
    parser.add_argument("--json", help="write every result to this file")
    parser.add_argument("--lengths", action="store_true", help="also measure the lengths of the plot")
    parser.add_argument("--plot", help="write TFLOP/s by length to this PNG; measures the lengths")
    parser.add_argument("--draw", metavar="JSON", help="measure nothing; plot what an earlier run wrote")
    parser.add_argument("--quick", action="store_true", help="a tenth of the repetitions")
    parser.add_argument("--rest", type=float, default=0.1, metavar="S", help="seconds without work before each timing")
    arguments = parser.parse_args()
    if arguments.draw:
        if not arguments.plot:
            parser.error("--draw needs --plot out.png")
        with open(arguments.draw) as file:
            earlier = json.load(file)
        plot(arguments.plot, earlier["gpu"], earlier["results"])
        return
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs a CUDA GPU; this machine has none")
    import triton

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}")
    pace = Pace(40.0 if arguments.quick else 300.0, arguments.rest)
    kernels: dict[str, Kernel] = {
        "cudnn": torch_kernel(SDPBackend.CUDNN_ATTENTION),
        "aten flash": torch_kernel(SDPBackend.FLASH_ATTENTION),
        "aten efficient": torch_kernel(SDPBackend.EFFICIENT_ATTENTION),
        **installed_kernels(),
        **{name: own_kernel(name) for name in ("triton_flash", "triton_sage", "triton_sage_fp16")},
    }
    if arguments.kernels:
        unknown = set(arguments.kernels) - set(kernels)
        if unknown:
            parser.error(f"no kernel {', '.join(sorted(unknown))} here; there are {', '.join(map(repr, kernels))}")
        kernels = {name: run for name, run in kernels.items() if name in arguments.kernels}
    differentiable = {name: run for name, run in kernels.items() if name in DIFFERENTIABLE and not never_returns(name)}
    everything: list[dict[str, Any]] = []

    def record(results: list[dict[str, Any]]) -> None:
        everything.extend(results)
        if arguments.json:
            versions = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "rest_s": pace.rest_s}
            with open(arguments.json, "w") as file:
                json.dump({**versions, "results": everything}, file, indent=1)

    for shape in arguments.shapes or SHAPES:
        print(shape, flush=True)
        results = measure(shape, kernels, pace)
        show(results)
        record(results)
    if not arguments.shapes:
        for shape in BACKWARD_SHAPES:
            print(f"{shape} forward and backward", flush=True)
            results = measure_backward(shape, differentiable, pace)
            show(results)
            record(results)
    if arguments.lengths or arguments.plot:
        shapes = {str(shape): shape for head_dim in (128, 64) for shape in drawn_shapes(head_dim)}
        for result in everything:
            shapes.pop(result["shape"], None)
        for shape in shapes.values():
            print(shape, flush=True)
            results = measure(shape, {name: run for name, run in kernels.items() if name != NOT_DRAWN}, pace)
            show(results)
            record(results)
    if arguments.plot:
        plot(arguments.plot, torch.cuda.get_device_name(), everything)


if __name__ == "__main__":
    main()

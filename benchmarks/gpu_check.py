"""Correctness, then speed, of the kernels on a GPU: one dated Markdown file.

    make gpu-check            (= the kernel tests on the device, then this script)
    python benchmarks/gpu_check.py --out benchmarks/

Each operation is timed beside torch's dense form, F.embedding_bag, torch.sparse CSR and, where it is installed,
eai-sparsify's Triton decoder: interleaved, median of several, with the GPU's own clock. A form that runs out of memory
is reported as such. `--device cpu --tiny` runs the whole script without a GPU, to see that it works.
"""

import argparse
import datetime
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import SHAPES, TINY, Shape
from torch import Tensor
from torch.nn import functional as F

from skipcoder.kernels.candidates import candidates
from skipcoder.kernels.decode import sparse_decode
from skipcoder.kernels.encode import encode_batchtopk, encode_topk
from skipcoder.kernels.preactivations import Search
from skipcoder.kernels.rows import by_latent, gather_dot, gather_sum
from skipcoder.kernels.update import sign_step
from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.config import CoderConfig, EncodeConfig, EncodeMode, Kind, TrainConfig
from skipcoder.trainer.step.learner import Learner

Form = Callable[[], object]


def dense_codes(values_NK: Tensor, indices_NK: Tensor, m: int) -> Tensor:
    """[N, M] with the values in place."""
    return values_NK.new_zeros(len(values_NK), m).scatter_(1, indices_NK, values_NK)


def csr_codes(values_NK: Tensor, indices_NK: Tensor, m: int) -> Tensor:
    """The same as a sparse CSR matrix."""
    n, k = values_NK.shape
    rows = torch.arange(0, n * k + 1, k, device=values_NK.device)
    order = indices_NK.argsort(1)
    columns, values = indices_NK.gather(1, order).flatten(), values_NK.gather(1, order).flatten()
    return torch.sparse_csr_tensor(rows, columns, values, (n, m))


def plain_sign_step(y: Tensor, z: Tensor, grad: Tensor) -> None:
    """The same update, an operation at a time."""
    sign = grad.sign()
    y.lerp_(z, 0.5).sub_(sign, alpha=1e-9)
    z.sub_(sign, alpha=1e-9)


def forms(shape: Shape, device: str) -> dict[str, dict[str, Form]]:
    """{operation: {form: function}} for one shape."""
    n, d, m, k = shape
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(n, d, generator=g).to(device) for _ in range(2))
    W_enc, W_dec = ((torch.randn(m, d, generator=g) / d**0.5).to(device) for _ in range(2))
    b_enc, b_dec = torch.zeros(m, device=device), torch.zeros(d, device=device)
    codes = encode_topk(x, W_enc, b_enc, k, search=Search("bfloat16"))
    values, indices = codes.values, codes.indices
    grad_W = torch.randn(m, d, generator=g).to(device)
    csr = csr_codes(values, indices, m)

    def backward() -> Tensor:
        latents = by_latent(indices, m)
        d_values = gather_dot(grad, W_dec, indices)
        latents.sum_rows(values, grad)
        latents.sum_weights(d_values)
        return latents.sum_rows(d_values, x)

    def backward_bags() -> None:
        W = W_dec.detach().requires_grad_()
        v = values.detach().requires_grad_()
        F.embedding_bag(indices, W, mode="sum", per_sample_weights=v).backward(grad)

    def backward_dense() -> None:
        W = W_dec.detach().requires_grad_()
        (dense_codes(values, indices, m) @ W).backward(grad)

    learners = {}
    for mode in EncodeMode:
        cfg = TrainConfig(coder=CoderConfig(kind=Kind.transcoder, k=k, width=m), encode=EncodeConfig(mode=mode))
        learners[mode.value] = Learner(cfg, Moments.of(x.cpu().numpy()), Moments.of(grad.cpu().numpy()), 1000, device)
    operations: dict[str, dict[str, Form]] = {
        "encode": {
            "ours bf16": lambda: encode_topk(x, W_enc, b_enc, k, search=Search("bfloat16")),
            "ours scout (int8)": lambda: encode_topk(x, W_enc, b_enc, k, search=Search("scout")),
            "ours f32": lambda: encode_topk(x, W_enc, b_enc, k),
            "ours bf16, batchtopk": lambda: encode_batchtopk(x, W_enc, b_enc, k, search=Search("bfloat16")),
            "torch bf16 GEMM alone": lambda: x.bfloat16() @ W_enc.bfloat16().T,
            "torch bf16 GEMM + topk": lambda: torch.topk(x.bfloat16() @ W_enc.bfloat16().T, k),
        },
        "decode": {
            "ours": lambda: sparse_decode(codes, W_dec, b_dec),
            "embedding_bag": lambda: F.embedding_bag(indices, W_dec, mode="sum", per_sample_weights=values),
            "CSR": lambda: csr @ W_dec,
            "dense": lambda: dense_codes(values, indices, m) @ W_dec,
        },
        "backward": {
            "ours (decoder and encoder)": backward,
            "embedding_bag (decoder)": backward_bags,
            "dense (decoder)": backward_dense,
        },
        "schedule-free sign step": {
            "ours": lambda: sign_step(W_enc, W_dec, grad_W, 1e-9, 0.9, 0.5),
            "lerp, sign, add, add": lambda: plain_sign_step(W_enc, W_dec, grad_W),
        },
        "step": {f"ours {mode}": partial(one.step, x, grad, n) for mode, one in learners.items()},
    }
    if device == "cuda":
        from skipcoder.kernels.gpu import rows as gpu

        operations["decode, by width of tile"] = {
            f"{tile}": partial(gpu.gather_sum, indices, values, W_dec, None, b_dec, tile) for tile in (512, 256, 1024)
        }
    if device == "cuda" and importlib.util.find_spec("sparsify"):
        from sparsify.utils import triton_decode

        operations["decode"]["eai-sparsify Triton"] = lambda: triton_decode(indices, values, W_dec.mT)
    return operations


def check(shape: Shape, device: str) -> list[str]:
    """Sparse operations against float64 on the device, on at most 256 tokens; the worst relative error of each."""
    n, d, m, k = (min(shape[0], 256), *shape[1:])
    g = torch.Generator().manual_seed(1)
    x, W = torch.randn(n, d, generator=g).to(device), torch.randn(m, d, generator=g).to(device)
    indices = torch.rand(n, m, generator=g).topk(k).indices.to(device)
    weights = torch.randn(n, k, generator=g).to(device)
    W64, x64, w64 = W.double(), x.double(), weights.double()
    chosen = [W64[indices[:, j]] for j in range(k)]
    rows = torch.zeros(m, d, dtype=torch.float64, device=device)
    for j in range(k):
        rows.index_add_(0, indices[:, j], w64[:, j, None] * x64)
    pairs: dict[str, tuple[Tensor, Any]] = {
        "gather_sum": (gather_sum(indices, weights, W), sum(w64[:, j, None] * chosen[j] for j in range(k))),
        "gather_dot": (
            gather_dot(x, W, indices),
            torch.stack([(x64 * W64[indices[:, j]]).sum(1) for j in range(k)], 1),
        ),
        "sum_rows": (by_latent(indices, m).sum_rows(weights, x), rows),
    }
    again = by_latent(indices, m).sum_rows(weights, x)
    lines = []
    for name, (got, exact) in pairs.items():
        error = float((got.double() - exact).norm() / exact.norm())
        if not error < 1e-5:
            raise SystemExit(f"{name} is wrong at {shape}: relative error {error:.2e}")
        lines.append(f"{name} {error:.1e}")
    pre = torch.randn(n, m, generator=g).to(device)
    found, wanted = candidates(pre, k), torch.topk(pre, k).indices
    if not (wanted[:, :, None] == found[:, None]).any(2).all():
        raise SystemExit(f"candidates misses some of the {k} largest at {shape}")
    lines.append("candidates complete")
    if not torch.equal(again, pairs["sum_rows"][0]):
        raise SystemExit(f"sum_rows is not the same from run to run at {shape}")
    return lines


def seconds(form: Form, device: str) -> float:
    """One run, by CUDA events on a GPU."""
    if device == "cpu":
        begun = time.perf_counter()
        form()
        return time.perf_counter() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    form()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(operations: dict[str, Form], device: str, rounds: int) -> dict[str, float | None]:
    """Median seconds of each form, interleaved; None where it ran out of memory."""
    times: dict[str, list[float]] = {name: [] for name in operations}
    failed: set[str] = set()
    for i in range(rounds + 2):  # two rounds warm up
        for name, form in operations.items():
            if name in failed:
                continue
            try:
                took = seconds(form, device)
            except torch.OutOfMemoryError:
                failed.add(name)
                torch.cuda.empty_cache()
                continue
            if i >= 2:
                times[name].append(took)
    return {name: None if name in failed else statistics.median(times[name]) for name in operations}


def main() -> int:
    """Check, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="one small shape, to try the script itself")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, help="folder for the dated file; without it, print")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch sees no GPU here; try --device cpu --tiny", file=sys.stderr)
        return 2
    today = datetime.date.today()
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    lines = [
        f"# Kernels on {machine}",
        "",
        f"{today}, torch {torch.__version__}, median of {args.rounds}.",
    ]
    for model, shape in (TINY if args.tiny else SHAPES).items():
        n, d, m, k = shape
        lines += ["", f"## {model}: {n} tokens, d {d}, {m} latents, k {k}", ""]
        lines += ["Relative errors against float64: " + ", ".join(check(shape, args.device)) + ".", ""]
        lines += ["| operation | form | ms | / ours |", "|---|---|---|---|"]
        for operation, group in forms(shape, args.device).items():
            medians = measure(group, args.device, args.rounds)
            ours = next(iter(medians.values()))
            for name, median in medians.items():
                cells = (
                    ("out of memory", "")
                    if median is None or ours is None
                    else (f"{median * 1e3:.3f}", f"{median / ours:.2f}")
                )
                lines.append(f"| {operation} | {name} | {cells[0]} | {cells[1]} |")
    text = "\n".join(lines) + "\n"
    if args.out:
        name = f"gpu_check-{machine.replace(' ', '-')}-{today}.md"
        (args.out / name).write_text(text)
        print(f"wrote {args.out / name}")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A training step of a crosscoder beside the dense formulation in torch, interleaved in one run.

    python benchmarks/spanning.py [--json OUT] [--rounds 7] [--sides 3]

Each contender is a process that makes one step when asked, on the same numbers: forward, loss (the mean of the sides'
FVUs), backward, clipping, fused Adam, and bringing decoder rows back to length 1.

    dense      pre-activations, code and reconstruction as whole matrices, one tensor for each side, by autograd
    ours       the trainer's step
    sae        the trainer's step of an SAE on one side with as many latents: what the other sides cost
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from train_step import _cpu, ask

from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.config import CoderConfig, EncodeConfig, EncodeMode, Kind, TrainConfig
from skipcoder.trainer.step.learner import Learner

N, D, M, K = 4096, 576, 18432, 32
CONTENDERS = ("dense", "ours_float32", "ours", "sae")


def sides(count: int) -> list[torch.Tensor]:
    """The same numbers for everyone: sides of different size that have much in common."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=g)
    return [(1 + s) * torch.relu(x @ torch.randn(D, D, generator=g) / D**0.5) for s in range(count)]


def dense(count: int) -> Callable[[], float]:
    """A tensor for each side, whole matrices, autograd."""
    data = [z / z.std() for z in sides(count)]
    variances = [float(z.var(0).sum()) for z in data]
    W_enc = torch.nn.Parameter(torch.rand(count, D, M).sub_(0.5) * 2 / (count * D) ** 0.5)
    W_dec = torch.nn.Parameter(torch.nn.functional.normalize(W_enc.detach().permute(2, 0, 1).flatten(1), dim=1))
    b_enc, b_dec = torch.nn.Parameter(torch.zeros(M)), torch.nn.Parameter(torch.stack([z.mean(0) for z in data]))
    parameters = [W_enc, W_dec, b_enc, b_dec]
    adam = torch.optim.Adam(parameters, lr=2e-4, fused=True)

    def step() -> float:
        pre = sum((z - b_dec[s]) @ W_enc[s] for s, z in enumerate(data)) + b_enc
        values, indices = torch.relu(pre).topk(K)
        code = torch.zeros_like(pre).scatter(1, indices, values)
        loss = torch.zeros(())
        for s, z in enumerate(data):
            error = z - code @ W_dec[:, s * D : (s + 1) * D] - b_dec[s]
            loss = loss + error.square().sum() / (N * variances[s] * count)
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
        return float(loss)

    return step


def ours(count: int, mode: str | None = None, kind: Kind = Kind.crosscoder) -> Callable[[], float]:
    """A step of the trainer."""
    data = sides(count)
    encode = EncodeConfig(mode=None if mode is None else EncodeMode(mode))
    cfg = TrainConfig(coder=CoderConfig(kind=kind, k=K, width=M), encode=encode)
    moments = [Moments.of(z) for z in data]
    learner = Learner(cfg, moments, moments, 1000, "cpu")
    return lambda: float(learner.step([], data, N)["fvu"])


def serve(contender: str, count: int) -> None:
    """One step for every line on stdin; seconds, loss and peak MiB above what was held before on stdout."""
    torch.set_num_threads(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = {
        "dense": lambda: dense(count),
        "ours": lambda: ours(count),
        "ours_float32": lambda: ours(count, "float32"),
        "sae": lambda: ours(1, None, Kind.sae),
    }[contender]()
    for _ in sys.stdin:
        begun = time.perf_counter()
        loss = step()
        took, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f"RESULT {took} {loss} {peak / 1024:.0f}", flush=True)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sides", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve, args.sides)
        return
    found: dict[str, list[list[float]]] = {name: [] for name in CONTENDERS}
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, "--serve", name, "--sides", str(args.sides)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"},
        )
        for name in CONTENDERS
    }  # fmt: skip
    for turn in range(args.rounds + 2):  # two warm up
        for name, process in processes.items():
            line = ask(process)
            if turn >= 2:
                found[name].append(line)
    for process in processes.values():
        process.kill()
    median = {name: statistics.median(line[0] for line in lines) for name, lines in found.items()}
    peak = {name: lines[-1][2] for name, lines in found.items()}
    print(f"{args.sides} sides of {D}, {N:,} tokens, {M:,} latents, k {K}")
    print(f"{'contender':14}{'median s':>10}{'/ ours':>10}{'peak MiB':>10}{'/ ours':>10}")
    for name in CONTENDERS:
        times, bytes_ = median[name] / median["ours"], peak[name] / peak["ours"]
        print(f"{name:14}{median[name]:10.3f}{times:10.2f}{peak[name]:10.0f}{bytes_:10.2f}")
    if args.json:
        shape = {"sides": args.sides, "d": D, "n": N, "m": M, "k": K}
        versions = {"torch": torch.__version__, "python": platform.python_version(), "cpu": _cpu()}
        content = {"shape": shape, **versions, "seconds_loss_mib": found, "median": median, "peak_mib": peak}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

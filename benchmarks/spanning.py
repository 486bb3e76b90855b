"""A training step of a crosscoder and of a cross-layer transcoder beside dense formulations in torch, in one run.

    python benchmarks/spanning.py crosscoder|clt [--json OUT] [--rounds 7] [--sides 3] [--latents 18432]

Each contender is a process that makes one step when asked, on the same numbers: forward, loss (the mean of the sides'
FVUs, or their sum), backward, clipping, fused Adam, and for crosscoders bringing decoder rows back to length 1.

    dense      pre-activations, codes and reconstructions as whole matrices, one tensor for each side, by autograd
    ours       the trainer's step
    alone      the trainer's steps of SAEs on each side, or of transcoders of each layer, with as many latents in all
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
from typing import NamedTuple

import torch
from train_step import _cpu, ask

from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.config import CoderConfig, EncodeConfig, EncodeMode, Kind, TrainConfig
from skipcoder.trainer.step.cross_layer import CrossLayerLearner
from skipcoder.trainer.step.learner import Learner

N, D, K = 4096, 576, 32
CONTENDERS = ("dense", "ours_float32", "ours", "alone")


class Case(NamedTuple):
    """What is timed."""

    what: str
    sides: int
    latents: int
    """In all."""


def sides(count: int) -> list[torch.Tensor]:
    """The same numbers for everyone: sides of different size that have much in common."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(N, D, generator=g)
    return [(1 + s) * torch.relu(x @ torch.randn(D, D, generator=g) / D**0.5) for s in range(count)]


def dense_crosscoder(case: Case) -> Callable[[], float]:
    """A tensor for each side, whole matrices, autograd."""
    count, m = case.sides, case.latents
    data = [z / z.std() for z in sides(count)]
    variances = [float(z.var(0).sum()) for z in data]
    W_enc = torch.nn.Parameter(torch.rand(count, D, m).sub_(0.5) * 2 / (count * D) ** 0.5)
    W_dec = torch.nn.Parameter(torch.nn.functional.normalize(W_enc.detach().permute(2, 0, 1).flatten(1), dim=1))
    b_enc, b_dec = torch.nn.Parameter(torch.zeros(m)), torch.nn.Parameter(torch.stack([z.mean(0) for z in data]))
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


def dense_clt(case: Case) -> Callable[[], float]:
    """A code for each layer and a decoder for each pair of layers, whole matrices, autograd."""
    count, m = case.sides, case.latents // case.sides
    data = [z / z.std() for z in sides(count)]
    variances = [float(z.var(0).sum()) for z in data]
    W_enc = [torch.nn.Parameter(torch.rand(D, m).sub_(0.5) * 2 / D**0.5) for _ in data]
    W_dec = [torch.nn.Parameter(torch.zeros(count - layer, m, D)) for layer in range(count)]
    b_enc = [torch.nn.Parameter(torch.zeros(m)) for _ in data]
    b_dec = [torch.nn.Parameter(z.mean(0)) for z in data]
    layers = list(zip(W_enc, W_dec, b_enc, b_dec, strict=True))
    adam = torch.optim.Adam([p for layer in layers for p in layer], lr=2e-4, fused=True)

    def step() -> float:
        y_hat: list[torch.Tensor] = list(b_dec)
        for layer, x in enumerate(data):
            pre = torch.relu(x @ W_enc[layer] + b_enc[layer])
            values, indices = pre.topk(K)
            code = torch.zeros_like(pre).scatter(1, indices, values)
            for later in range(layer, count):
                y_hat[later] = y_hat[later] + code @ W_dec[layer][later - layer]
        fvus = [(y - z).square().sum() / (N * v) for y, z, v in zip(data, y_hat, variances, strict=True)]
        loss = torch.stack(fvus).sum()
        loss.backward()
        for parameters in layers:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        return float(loss) / count

    return step


def ours(case: Case, mode: str | None = None) -> Callable[[], float]:
    """A step of the trainer."""
    data = sides(case.sides)
    encode = EncodeConfig(mode=None if mode is None else EncodeMode(mode))
    moments = [Moments.of(z) for z in data]
    if case.what == "clt":
        coder = CoderConfig(kind=Kind.clt, k=K, width=case.latents // case.sides)
        layers = CrossLayerLearner(TrainConfig(coder=coder, encode=encode), moments, moments, 1000, "cpu")
        return lambda: float(layers.step(data, data, N)["fvu"])
    coder = CoderConfig(kind=Kind.crosscoder, k=K, width=case.latents)
    learner = Learner(TrainConfig(coder=coder, encode=encode), moments, moments, 1000, "cpu")
    return lambda: float(learner.step([], data, N)["fvu"])


def alone(case: Case) -> Callable[[], float]:
    """A step of a coder of each side by itself."""
    data, kind = sides(case.sides), Kind.transcoder if case.what == "clt" else Kind.sae
    coder = CoderConfig(kind=kind, k=K if case.what == "clt" else -(-K // case.sides), width=case.latents // case.sides)
    moments = [Moments.of(z) for z in data]
    learners = [Learner(TrainConfig(coder=coder), m, m, 1000, "cpu") for m in moments]
    return lambda: sum(float(one.step(z, z, N)["fvu"]) for one, z in zip(learners, data, strict=True)) / case.sides


def serve(contender: str, case: Case) -> None:
    """One step for every line on stdin; seconds, loss and peak MiB above what was held before on stdout."""
    torch.set_num_threads(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = {
        "dense": lambda: (dense_clt if case.what == "clt" else dense_crosscoder)(case),
        "ours": lambda: ours(case),
        "ours_float32": lambda: ours(case, "float32"),
        "alone": lambda: alone(case),
    }[contender]()
    for _ in sys.stdin:
        begun = time.perf_counter()
        loss = step()
        took, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(f"RESULT {took} {loss} {peak / 1024:.0f}", flush=True)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["crosscoder", "clt"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sides", type=int, default=3)
    parser.add_argument("--latents", type=int, default=18432, help="in all")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    case = Case(args.what, args.sides, args.latents)
    if args.serve:
        serve(args.serve, case)
        return
    found: dict[str, list[list[float]]] = {name: [] for name in CONTENDERS}
    processes = {
        name: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--serve", name],
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
    print(f"{case.what}: {case.sides} sides of {D}, {N:,} tokens, {case.latents:,} latents in all, k {K}")
    print(f"{'contender':14}{'median s':>10}{'/ ours':>10}{'peak MiB':>10}{'/ ours':>10}")
    for name in CONTENDERS:
        times, bytes_ = median[name] / median["ours"], peak[name] / peak["ours"]
        print(f"{name:14}{median[name]:10.3f}{times:10.2f}{peak[name]:10.0f}{bytes_:10.2f}")
    if args.json:
        shape = {**case._asdict(), "d": D, "n": N, "k": K}
        versions = {"torch": torch.__version__, "python": platform.python_version(), "cpu": _cpu()}
        content = {"shape": shape, **versions, "seconds_loss_mib": found, "median": median, "peak_mib": peak}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()

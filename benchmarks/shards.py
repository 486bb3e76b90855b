r"""A coder's latents in several processes, beside every process holding the whole coder: bytes and seconds of a step.

    python benchmarks/shards.py [--widths 2048 8192 32768] [--processes 2 4] [--json OUT]
    python benchmarks/shards.py --widest 1048576 --json OUT

Processes of this machine, by gloo, each with an equal share of its cores. Both ways train a transcoder on the same
batches, step by step in turn. Bytes are those that the loopback interface carried, divided by steps and processes,
beside what arithmetic says. `--widest`: some steps of one coder in two processes by signum, and each one's peak memory.

`simulate` puts the same arithmetic to GPUs; what it assumes is written with its results. It measures nothing.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.config import CoderConfig, EncodeConfig, EncodeMode, Kind, LoopConfig, OptimConfig, OptimName
from skipcoder.trainer.config import TrainConfig as Config
from skipcoder.trainer.data import turns
from skipcoder.trainer.data.ranks import Ranks
from skipcoder.trainer.step import learner as learning
from skipcoder.trainer.step.learner import Learner

D, TOKENS, K, ROUNDS = 768, 2048, 32, 5


def sharded_bytes(n: int, k: int, d_out: int, size: int) -> float:
    """What each of `size` processes sends in a step of a topk coder over n tokens: N k numbers that decide to each of
    the others, and a sum over [N, E] in two halves."""
    return 4 * ((size - 1) * n * k + 2 * (size - 1) / size * n * d_out)


def data_parallel_bytes(m: int, d_in: int, d_out: int, size: int) -> float:
    """What each process sends if all hold the coder: the gradients, summed in a ring."""
    return 4 * 2 * (size - 1) / size * (m * (d_in + d_out + 1) + d_out)


def pays_from(n: int, k: int, d: int, size: int) -> float:
    """The width from which shards send less than data parallel processes (d_in = d_out = d)."""
    return n * (k * size + 2 * d) / (2 * (2 * d + 1))


def simulate() -> dict[str, Any]:
    """Milliseconds of a step of a topk coder on 8 GPUs of one machine, and on 32 of four, by arithmetic."""
    n, k, d, flops, memory, inside, across, latency = 8192, 64, 4096, 6e14, 3e12, 900e9, 50e9, 30e-6
    assumed = {
        "tokens": n, "k": k, "d": d, "nominating product, FLOP/s": flops, "memory, bytes/s": memory,
        "between GPUs, bytes/s": inside, "between machines, bytes/s each": across, "a collective, s": latency,
        "not counted": "anything that overlaps",
    }  # fmt: skip

    def compute(m: int, rows: int, shards: int) -> float:
        """Of one GPU: the product, four passes over k rows a token, the errors, and Adam's 28 bytes a weight."""
        tokens, latents = n / rows, m / shards
        moved = 4 * 4 * tokens * k * d / shards + 16 * tokens * d + 2 * 28 * latents * d
        return 2 * tokens * d * latents / flops + moved / memory

    found = []
    for m in (2**17, 2**19, 2**20):
        weights = 4 * 2 * m * d
        ways = {
            "8 GPUs, shards": (1, 8, sharded_bytes(n, k, d, 8) / inside + 4 * latency),
            "8 GPUs, data parallel": (8, 1, 2 * 7 / 8 * weights / inside + latency),
            # A quarter of what a GPU sends one by one stays in its machine; rings cross to the next machine once.
            "4 x 8 GPUs, 32 shards": (
                1, 32, 4 * (8 * 0.75 * n * d + n * d + 31 * n * k) / across + 4 * latency
            ),
            "4 x 8 GPUs, 8 shards": (
                4, 8, sharded_bytes(n // 4, k, d, 8) / inside + 2 * 3 / 4 * weights / across + 5 * latency
            ),
            "4 x 8 GPUs, data parallel": (32, 1, 2 * 31 / 32 * weights / across + latency),
        }  # fmt: skip
        for name, (rows, shards, sending) in ways.items():
            state = 3 * weights / shards / 2**30
            times = {"compute, ms": 1e3 * compute(m, rows, shards), "sending, ms": 1e3 * sending}
            found.append({"on": name, "width": m, **times, "weights and moments, GiB a GPU": state})
    return {"assumed": assumed, "found": found}


def loopback() -> int:
    """Bytes that the loopback interface has carried."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def learner(width: int, ranks: Ranks, shards: int, sign: bool = False, micro_batches: int = 1) -> Learner:
    """A transcoder over random activations."""
    cfg = Config(
        coder=CoderConfig(kind=Kind.transcoder, k=K, width=width),
        encode=EncodeConfig(mode=EncodeMode.float32),
        optim=OptimConfig(name=OptimName.signum if sign else OptimName.adam, lr=1e-3),
        train=LoopConfig(
            tokens=100 * TOKENS, batch_tokens=TOKENS, shards=shards, log_every=1000, micro_batches=micro_batches
        ),
    )
    x, y = batch(0)
    return Learner(cfg, Moments.of(x), Moments.of(y), 100, "cpu", ranks)


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of a whole batch."""
    x, y = torch.randn(2, TOKENS, D, generator=torch.Generator().manual_seed(seed))
    return x, y


def compare(width: int) -> dict[str, Any]:
    """Both ways, step by step in turn."""
    size = int(os.environ["WORLD_SIZE"])
    ways = {"shards": (Ranks.join(size), size), "data parallel": (Ranks.join(), 1)}
    learners = {name: learner(width, ranks, shards) for name, (ranks, shards) in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    carried = dict.fromkeys(ways, 0)
    x, y = batch(1)
    for step in range(ROUNDS + 1):
        for name, (ranks, _) in ways.items():
            mine = slice(ranks.data.rank, None, ranks.data.size)
            ranks.total(0)  # all begin together
            before, begun = loopback(), time.perf_counter()
            learners[name].step(x[mine], y[mine], TOKENS)
            ranks.total(0)
            if step:
                seconds[name].append(time.perf_counter() - begun)
                carried[name] += loopback() - before
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    return {
        "width": width, "processes": size, "seconds": medians,
        "ratio": medians["data parallel"] / medians["shards"],
        "bytes a process": {name: carried[name] / ROUNDS / size for name in ways},
        "by arithmetic": {
            "shards": sharded_bytes(TOKENS, K, D, size), "data parallel": data_parallel_bytes(width, D, D, size)
        },
    }  # fmt: skip


def in_turns(width: int) -> dict[str, Any]:
    """Four micro-batches of one coder's shards, in turns and one by one."""
    size = int(os.environ["WORLD_SIZE"])
    ranks, usual = Ranks.join(size), turns.in_turns
    ways: dict[str, Any] = {"in turns": usual, "one by one": lambda works: [work() for work in works]}
    learners = {name: learner(width, ranks, size, micro_batches=4) for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    x, y = batch(1)
    for number in range(ROUNDS + 1):
        for name, way in ways.items():
            setattr(learning, "in_turns", way)  # noqa: B010
            ranks.total(0)
            begun = time.perf_counter()
            learners[name].step(x, y, TOKENS)
            ranks.total(0)
            if number:
                seconds[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    ratio = medians["in turns"] / medians["one by one"]
    return {"width": width, "processes": size, "micro-batches, seconds": medians, "ratio": ratio}


def widest(width: int) -> dict[str, Any]:
    """Some steps of one wide coder."""
    ranks = Ranks.join(2)
    one, lines = learner(width, ranks, 2, sign=True), []
    for step in range(3):
        begun = time.perf_counter()
        found = one.step(*batch(step), TOKENS)
        lines.append({"fvu": float(found["fvu"]), "l0": float(found["l0"]), "seconds": time.perf_counter() - begun})
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    return {"width": width, "d": D, "steps": lines, "peak GiB": [float(p) / 2**30 for p in ranks.latents.stack(peak)]}


def in_processes(size: int, *arguments: str) -> Any:
    """Run this script in several processes, and return what the first found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        subprocess.run([sys.executable, *torchrun, __file__, "--out", str(out), *arguments], check=True)
        return json.loads(out.read_text())


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--widest", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["WORLD_SIZE"])))
        found: Any = (
            widest(args.widest)
            if args.widest
            else {"ways": [compare(w) for w in args.widths], "turns": [in_turns(w) for w in args.widths]}
        )
        if Ranks.join().is_main:
            args.out.write_text(json.dumps(found))
        return
    facts = {"torch": torch.__version__, "cores": os.cpu_count(), "processor": platform.machine()}
    shape = {"tokens": TOKENS, "d": D, "k": K}
    if args.widest:
        result = {**facts, **shape, "widest": in_processes(2, "--widest", str(args.widest))}
    else:
        widths = ["--widths", *map(str, args.widths)]
        each = [in_processes(size, *widths) for size in args.processes]
        measured, in_turn = ([one for found in each for one in found[key]] for key in ("ways", "turns"))
        pays = {size: pays_from(TOKENS, K, D, size) for size in args.processes}
        result = {
            **facts,
            **shape,
            "measured": measured,
            "turns": in_turn,
            "shards send less from width": pays,
            "simulated": simulate(),
        }
    print(json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Peak memory of a training step on CPU, beyond what must be there.

    python benchmarks/memory.py [--json OUT]

A transcoder, 8,192 tokens, d 768, 131,072 latents, k 32: parameters, gradients and Adam's two moments are 3 GiB; what a
step needs on top of them is reported for each mode of the encoder, from the peak resident memory of a process of its
own. Dense pre-activations of one batch would be 4 GiB in float32.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.config import CoderConfig, EncodeConfig, EncodeMode, Kind, TrainConfig
from skipcoder.trainer.step.learner import Learner

SHAPE = {"n": 8192, "d": 768, "m": 131072, "k": 32}


def measure(mode: str, n: int, d: int, m: int, k: int) -> dict[str, int]:
    """Bytes: {must, extra} of two steps in this process."""
    torch.set_num_threads(2)
    x, y = (torch.randn(n, d, generator=torch.Generator().manual_seed(i)) for i in range(2))
    cfg = TrainConfig(coder=CoderConfig(kind=Kind.transcoder, k=k, width=m), encode=EncodeConfig(mode=EncodeMode(mode)))
    moments = Moments.of(x), Moments.of(y)
    before = resident()
    learner = Learner(cfg, *moments, 1000, "cpu")
    must = 4 * sum(p.numel() * p.element_size() for p in learner.coder.parameters())
    for _ in range(2):
        learner.step(x, y, n)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"must": must, "extra": peak - before - must}


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    """Measure each mode in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--shape", type=json.loads, default=SHAPE)
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args.mode, **args.shape)))
        return
    results = {}
    print(f"{'mode':10}{'must GiB':>10}{'extra GiB':>11}")
    for mode in EncodeMode:
        command = [sys.executable, __file__, "--mode", mode.value, "--shape", json.dumps(args.shape)]
        results[mode.value] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        must, extra = (results[mode.value][key] / 2**30 for key in ("must", "extra"))
        print(f"{mode.value:10}{must:10.2f}{extra:11.2f}")
    if args.json:
        args.json.write_text(json.dumps({"shape": args.shape, "torch": torch.__version__, "bytes": results}, indent=2))


if __name__ == "__main__":
    main()

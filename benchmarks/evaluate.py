"""Evaluating eight coders together against one by one, by the commands that a user types.

    python benchmarks/evaluate.py --store PATH [--rounds 3] [--json OUT]

PATH: a store of the default model. Eight transcoders of 2,304 latents are trained on it for a moment (what they learn
does not matter here); then `python evals/evaluate.py runs=...` once, and `run=...` eight times, take turns.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent


def run(*words: str) -> float:
    """Seconds of a command."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=REPO, check=True, capture_output=True)
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"together": [], "one by one": []}
    with tempfile.TemporaryDirectory() as name:
        run(
            "trainer/train.py", "-m", f"store.path={args.store.resolve()}", "coder=transcoder", "coder.k=8,16,32,64",
            "coder.width=2304", "seed=0,1", "train.tokens=40960", "optim.lr=8e-3", f"hydra.sweep.dir={name}/sweep",
        )  # fmt: skip
        runs = sorted(Path(name, "sweep").glob("[0-9]"))
        assert len(runs) == 8
        for _ in range(args.rounds):
            seconds["together"].append(run("evals/evaluate.py", f"runs={name}/sweep/*", f"out={name}/table.json"))
            seconds["one by one"].append(sum(run("evals/evaluate.py", f"run={one}") for one in runs))
            print({way: round(s[-1], 1) for way, s in seconds.items()}, flush=True)
    ratios = [alone / together for together, alone in zip(*seconds.values(), strict=True)]
    print(f"one by one takes {statistics.median(ratios):.2f} x the time")
    if args.json:
        args.json.write_text(json.dumps(seconds, indent=2))


if __name__ == "__main__":
    main()

"""A sweep as one bank against the same runs one after the other.

    python benchmarks/sweep.py --store PATH [--tokens 200000] [--json OUT]

Eight variants (two kinds, two k, two seeds; 4,608 latents) on one store: once as a bank, once alone each, taking turns
in one process; every run must end with the same FVU in both. What is saved is reading and decoding; the steps are the
in one process; every run must end with the same FVU both times. What is saved is reading and decoding; the steps are
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from skipcoder.trainer.bank import train_bank
from skipcoder.trainer.config import CoderConfig, Kind, LoopConfig, OptimConfig, StoreRef, TrainConfig


def variants(store: Path, tokens: int) -> list[TrainConfig]:
    """The eight."""
    return [
        TrainConfig(
            store=StoreRef(str(store)),
            coder=CoderConfig(kind=kind, k=k, width=4608),
            optim=OptimConfig(lr=2e-3),
            train=LoopConfig(tokens=tokens, save_every=10**6, eval_tokens=0),
            seed=seed,
        )
        for kind, k, seed in itertools.product((Kind.transcoder, Kind.skip_transcoder), (32, 64), (0, 1))
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    seconds: dict[str, list[float]] = {"bank": [], "one by one": []}
    for _ in range(args.rounds):
        fvu = {}
        for way in seconds:
            with tempfile.TemporaryDirectory() as folder:
                jobs = [(cfg, Path(folder) / str(i)) for i, cfg in enumerate(variants(args.store, args.tokens))]
                begun = time.perf_counter()
                outcomes = train_bank(jobs) if way == "bank" else [train_bank([job])[0] for job in jobs]
                seconds[way].append(time.perf_counter() - begun)
                fvu[way] = [outcome.summary["train_fvu"] for outcome in outcomes if outcome.summary]
        assert len(fvu["bank"]) == 8 and fvu["bank"] == fvu["one by one"]
    median = {way: statistics.median(s) for way, s in seconds.items()}
    for way, s in median.items():
        print(f"{way:12}{s:8.1f} s   {s / median['bank']:.2f} x the bank")
    if args.json:
        args.json.write_text(json.dumps({"seconds": seconds, "tokens": args.tokens, "fvu": fvu}, indent=2))


if __name__ == "__main__":
    main()

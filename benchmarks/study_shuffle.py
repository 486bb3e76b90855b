"""Does the size of the window in which tokens are shuffled matter?

    python benchmarks/study_shuffle.py --store PATH [--orders NAME ...]   # -> docs/studies/shuffle.{json,svg}, a table

The training tokens of a store are put back into the order of the text and shuffled in windows of W consecutive tokens:
W = 1 (none), 2^12 (one batch), 2^15, 2^18, all. Beside them `stream`: the order of skipcoder's stream as it is. One
epoch of a transcoder for each order and seed. Orders that are not named keep their results.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot
from study import BATCH, OUT, SEEDS, Judge, config, from_stream, interval, keep, table, trained
from torch import Tensor

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.data.filter import TokenFilter

WINDOWS = {"none": 1, "2^12": 2**12, "2^15": 2**15, "2^18": 2**18, "all": 2**62}
ORDERS = (*WINDOWS, "stream")
METRICS = {"fvu": "held-out FVU", "dead_fraction": "dead fraction", "ce_spliced": "cross-entropy, spliced (nats)"}


def in_text_order(store: ActivationStore) -> tuple[Tensor, Tensor]:
    """(x, y) bfloat16 of all training tokens, as the text has them."""
    hookpoint, kept = store.hookpoint(None), TokenFilter()
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for unit in store.split("train"):
        start, stop = store.unit_range(unit)
        position = store.read("index", start, stop).astype(np.int64)
        keep_B = kept.keep(
            np.arange(start, stop), store.tokens(unit).ravel(), store.context, store.attrs["special_tokens"]
        )
        rows = torch.from_numpy(np.argsort(position)[keep_B])
        for side, found in zip(("input", "output"), sides, strict=True):
            found.append(store.activations(hookpoint, side, start, stop)[rows])
    return torch.cat(sides[0]), torch.cat(sides[1])


def windowed(n: int, window: int, seed: int) -> Tensor:
    """0..n-1, permuted inside windows of consecutive numbers."""
    rng = np.random.default_rng(seed)
    order = np.arange(n)
    for start in range(0, n if window > 1 else 0, window):
        rng.shuffle(order[start : start + window])
    return torch.from_numpy(order)


def batches(order: str, seed: int, x: Tensor, y: Tensor, store: ActivationStore) -> Iterable[tuple[Tensor, Tensor]]:
    """One epoch."""
    if order == "stream":
        return from_stream(config(store, len(x), seed), store)
    return ((x[rows], y[rows]) for rows in windowed(len(x), WINDOWS[order], seed).split(BATCH))


def plot(results: dict[str, list[dict]]) -> None:
    """One panel for each metric."""
    _, panels = pyplot.subplots(1, len(METRICS), figsize=(10, 3), layout="constrained")
    for panel, (key, label) in zip(panels, METRICS.items(), strict=True):
        means, halves = zip(*(interval([run[key] for run in runs]) for runs in results.values()), strict=True)
        panel.errorbar(list(results), means, halves, fmt="o", capsize=4)
        for name, runs in results.items():
            panel.plot([name] * len(runs), [run[key] for run in runs], ".", color="grey", markersize=4)
        panel.set(xlabel="window (tokens)", title=label)
    pyplot.savefig(OUT / "shuffle.svg", metadata={"Date": None})


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=ORDERS)
    args = parser.parse_args()
    store = ActivationStore.open(args.store)
    judge = Judge(store)
    x, y = in_text_order(store)
    before = json.loads((OUT / "shuffle.json").read_text())["results"] if set(args.orders) < set(ORDERS) else {}
    results: dict[str, list[dict]] = {name: [] if name in args.orders else before[name] for name in ORDERS}
    for seed in SEEDS:
        for name in args.orders:
            learner = trained(config(store, len(x), seed), store, batches(name, seed, x, y, store))
            results[name].append({"seed": seed, **judge(learner)})
            print(json.dumps({"order": name, **results[name][-1]}), flush=True)
    keep("shuffle", store, results)
    plot(results)
    print(table(results, "all", tuple(METRICS)))


if __name__ == "__main__":
    main()

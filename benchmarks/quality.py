"""Held-out FVU and dead latents beside eai-sparsify: the same tokens, order, width, k, batch and steps.

    python benchmarks/quality.py --store PATH --sparsify DIR [--tokens 400000] [--json OUT]

Its Trainer reads the cached pairs through a model that plays them back (peer_sparsify.Playback), in the order of our
stream. Both use Adam with 5 % warm-up and linear decay. Each side's learning rate is its best for each kind, by
held-out FVU at seed 0: doubled or halved from 4e-3 for as long as that helps (it takes activations as they are, we
scale them, so the rates differ); then three seeds at that rate.
"""

import argparse
import contextlib
import io
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peer_sparsify import Playback, Recipe, fit, measure, use
from study import BATCH, SEEDS, config, interval, show, trained
from torch import Tensor

from skipcoder.evals.core.metrics import ReconstructionMetrics, Targets
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.config import Kind
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.build import make_stream

FIRST_RATE = 4e-3
CONTEXT = 256


def pairs(stream: ActivationStream, tokens: int) -> tuple[Tensor, Tensor]:
    """(x, y) of the first `tokens` tokens, in the stream's order."""
    xs, ys, seen = [], [], 0
    for batch in stream:
        xs.append(batch.x.bfloat16())
        ys.append(batch.y.bfloat16())
        seen += len(batch.x)
        if seen >= tokens:
            break
    return torch.cat(xs)[:tokens], torch.cat(ys)[:tokens]


class Contest:
    """Both trainers on the same pairs."""

    def __init__(self, store: ActivationStore, tokens: int) -> None:
        self.store, self.tokens = store, tokens // BATCH * BATCH
        self.x, self.y = pairs(make_stream(config(store, tokens, 0), store, "cpu"), self.tokens)
        held_out = ActivationStream(store, store.hookpoint(None), BATCH, split="test", epochs=1)
        self.x_held, self.y_held = pairs(held_out, 10**9)

    def ours(self, kind: Kind, lr: float, seed: int) -> dict[str, Any]:
        """FVU and dead fraction of skipcoder's coder."""
        cfg = config(self.store, self.tokens, seed, kind, lr=lr)
        learner = trained(cfg, self.store, zip(self.x.split(BATCH), self.y.split(BATCH), strict=True))
        coder = learner.folded()
        targets = Targets([coder.d_out])
        metrics = ReconstructionMetrics(coder.cfg.width, targets)
        with torch.no_grad():
            for x, y in zip(self.x_held.float().split(4096), self.y_held.float().split(4096), strict=True):
                out = coder(y if kind == Kind.sae else x)
                metrics.update(targets.add(y), out.y_hat, out.values, out.indices)
        return metrics.result()

    def theirs(self, kind: Kind, lr: float, seed: int) -> dict[str, Any]:
        """FVU and dead fraction of eai-sparsify's coder."""
        model = Playback(self.x, self.y)
        numbers = torch.arange(self.tokens).view(-1, CONTEXT)
        recipe = Recipe(kind, 32, 4608, lr, seed)
        silence = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with tempfile.TemporaryDirectory() as folder, silence[0], silence[1]:
            coder = fit(model, Playback.hookpoint, numbers, BATCH // CONTEXT, recipe, Path(folder))
        return measure(coder, kind, self.x_held, self.y_held)


def climb(run: Callable[[float], dict[str, Any]]) -> dict[float, dict[str, Any]]:
    """Results by learning rate; the best one has a worse neighbour on either side."""
    tried = {FIRST_RATE: run(FIRST_RATE)}
    for factor in (2.0, 0.5):
        rate = FIRST_RATE
        while rate * factor not in tried:
            tried[rate * factor] = run(rate * factor)
            if tried[rate * factor]["fvu"] > tried[rate]["fvu"]:
                break
            rate *= factor
        if rate != FIRST_RATE:
            break
    return tried


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--sparsify", type=Path, required=True, help="where eai-sparsify is installed")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    use(args.sparsify)
    torch.set_num_threads(2)
    contest = Contest(ActivationStore.open(args.store), args.tokens)
    results: dict[str, Any] = {}
    print("| kind | trainer | lr | held-out FVU | dead fraction |\n|---|---|---|---|---|")
    for kind in Kind:
        for name, run in (("skipcoder", contest.ours), ("eai-sparsify", contest.theirs)):
            first = climb(partial(run, kind, seed=SEEDS[0]))
            lr = min(first, key=lambda rate: first[rate]["fvu"])
            runs = [first[lr], *(run(kind, lr, seed) for seed in SEEDS[1:])]
            fvu, dead = ([r[key] for r in runs] for key in ("fvu", "dead_fraction"))
            results[f"{kind} {name}"] = {
                "lr": lr,
                "fvu": fvu,
                "dead": dead,
                "by_lr": {r: first[r]["fvu"] for r in sorted(first)},
            }
            print(f"| {kind} | {name} | {lr:g} | {show(interval(fvu))} | {show(interval(dead), 3)} |", flush=True)
        mine, other = (results[f"{kind} {name}"]["fvu"] for name in ("skipcoder", "eai-sparsify"))
        difference = interval([a - b for a, b in zip(mine, other, strict=True)])
        print(f"| {kind} | difference | | {show(difference)} | |", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"tokens": contest.tokens, "results": results}, indent=2))


if __name__ == "__main__":
    main()

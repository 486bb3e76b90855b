"""How many tokens does `coder.skip_init=ridge` save, and do the latents still carry their share?

    python benchmarks/study_ridge.py --store PATH          # -> docs/studies/ridge.{json,svg} and a table

Skip transcoders of several lengths of training, each with its own whole schedule, from zero (the paper) and from the
ridge solution. Beside them the ridge solution alone (no step is made, so no latent has a decoder).
"""

import argparse
import json
from pathlib import Path

from matplotlib import pyplot
from study import BATCH, OUT, SEEDS, Judge, config, from_stream, interval, keep, show, trained

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.config import Kind, SkipInit

STEPS = (15, 30, 60, 120, 235)
METRICS = {
    "fvu": "held-out FVU",
    "ce_spliced": "cross-entropy, spliced (nats)",
    "ce_skip_only": "cross-entropy, skip alone (nats)",
    "dead_fraction": "dead fraction",
}


def plot(results: dict[str, dict[int, list[dict]]], affine: dict) -> None:
    """Each metric against tokens, both starts."""
    _, panels = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained")
    for panel, (key, label) in zip(panels.flat, METRICS.items(), strict=True):
        for name, by_tokens in results.items():
            means, halves = zip(*(interval([run[key] for run in runs]) for runs in by_tokens.values()), strict=True)
            panel.errorbar(list(by_tokens), means, halves, fmt="o-", capsize=3, label=f"from {name}")
        if key in ("fvu", "ce_spliced"):
            panel.axhline(affine[key], linestyle=":", color="grey", label="ridge solution alone")
        panel.set(xscale="log", xlabel="tokens trained on", title=label)
        panel.legend()
    pyplot.savefig(OUT / "ridge.svg", metadata={"Date": None})


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--lr", type=float, default=2e-3)
    args = parser.parse_args()
    store = ActivationStore.open(args.store)
    judge = Judge(store)
    start = config(store, BATCH - 1, 0, Kind.skip_transcoder, SkipInit.ridge)  # no step is made
    affine = judge(trained(start, store, []))
    print(json.dumps({"affine": affine}), flush=True)
    results: dict[str, dict[int, list[dict]]] = {"zero": {}, "ridge": {}}
    for steps in STEPS:
        for seed in SEEDS:
            for init in SkipInit:
                cfg = config(store, steps * BATCH, seed, Kind.skip_transcoder, init, args.lr)
                learner = trained(cfg, store, from_stream(cfg, store))
                result = {"seed": seed, **judge(learner)}
                results[init.value].setdefault(steps * BATCH, []).append(result)
                print(json.dumps({"init": init.value, "tokens": steps * BATCH, **result}), flush=True)
    keep("ridge", store, {"lr": args.lr, "affine": affine, "runs": results})
    plot(results, affine)
    print(f"| tokens | start | {' | '.join(METRICS)} |\n{'|---' * (len(METRICS) + 2)}|")
    for tokens in results["zero"]:
        for name in results:
            cells = [show(interval([run[key] for run in results[name][tokens]])) for key in METRICS]
            print(f"| {tokens:,} | {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

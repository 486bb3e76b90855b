"""Does an int8 or fp8 cache change what is learned?

    python benchmarks/study_codec.py --store PATH          # -> docs/studies/codec.{json,svg} and a table

PATH holds bf16 activations of a model that runs in bfloat16, so it holds the model's own values; from it two stores
with int8 and fp8 codes are made, the same to the byte as capturing with `store.codec` would. SAEs and transcoders are
trained on each in the same order, and all evaluated on the bf16 store.
"""

import argparse
import json
import tempfile
from pathlib import Path

from matplotlib import pyplot
from recode import recoded
from study import OUT, SEEDS, Judge, config, from_stream, interval, keep, table, trained

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.config import Kind

METRICS = {"fvu": "held-out FVU", "dead_fraction": "dead fraction", "ce_spliced": "cross-entropy, spliced (nats)"}


def bytes_per_token(store: ActivationStore) -> float:
    """Of activations and scales, on the disk."""
    shards = [
        s
        for r in store.commits.values()
        for s in r.shards.items()
        if not s[0].startswith(("tokens", "document", "index", "statistics"))
    ]
    return sum(facts["bytes"] for _, facts in shards) / (store.rows * store.context)


def plot(results: dict[str, list[dict]]) -> None:
    """One panel for each metric and kind."""
    _, panels = pyplot.subplots(2, len(METRICS), figsize=(10, 5), layout="constrained")
    for row, kind in zip(panels, ("sae", "transcoder"), strict=True):
        for panel, (key, label) in zip(row, METRICS.items(), strict=True):
            mine = {name.split()[1]: runs for name, runs in results.items() if name.startswith(f"{kind} ")}
            means, halves = zip(*(interval([run[key] for run in runs]) for runs in mine.values()), strict=True)
            panel.errorbar(list(mine), means, halves, fmt="o", capsize=4)
            for name, runs in mine.items():
                panel.plot([name] * len(runs), [run[key] for run in runs], ".", color="grey", markersize=4)
            panel.set(title=f"{kind}: {label}")
    pyplot.savefig(OUT / "codec.svg", metadata={"Date": None})


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=600_000)
    args = parser.parse_args()
    bf16 = ActivationStore.open(args.store)
    judge = Judge(bf16)
    results: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        stores = {"bf16": bf16} | {
            codec: recoded(bf16, Path(folder) / codec, len(bf16.units), codec=codec)[0] for codec in ("int8", "fp8")
        }
        facts = {
            codec: {
                "bytes_per_token": bytes_per_token(store),
                **{side: store.moments(store.hookpoint(None), side, split=None).lost for side in ("input", "output")},
            }
            for codec, store in stores.items()
        }
        print(json.dumps(facts, indent=1), flush=True)
        for seed in SEEDS:
            for kind in (Kind.sae, Kind.transcoder):
                for codec, store in stores.items():
                    cfg = config(store, args.tokens, seed, kind)
                    learner = trained(cfg, store, from_stream(cfg, store))
                    result = {"seed": seed, **judge(learner)}
                    results.setdefault(f"{kind} {codec}", []).append(result)
                    print(json.dumps({"kind": str(kind), "codec": codec, **result}), flush=True)
    keep("codec", bf16, {"stores": facts, "runs": results})
    plot(results)
    for name_of in ("sae", "transcoder"):
        mine = {name: runs for name, runs in results.items() if name.startswith(f"{name_of} ")}
        print(table(mine, f"{name_of} bf16", tuple(METRICS)))


if __name__ == "__main__":
    main()

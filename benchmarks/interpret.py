"""How long it takes to find where latents fire, and to make their examples, and how much memory.

    python benchmarks/interpret.py --run DIR [--latents 1000] [--json OUT]

The run's store is encoded anew into a temporary copy of the run (the language model does not run), then the windows of
so many latents are made. Peak memory is this process', measured after each part; reading torch alone takes some of it.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from skipcoder.evals.config import ExamplesConfig
from skipcoder.evals.latents.examples import ExampleMaker
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.run.run import Run


def peak() -> float:
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--latents", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        copy = Path(shutil.copytree(args.run, Path(name) / "run", ignore=shutil.ignore_patterns("latents", "features")))
        run = Run.open(copy)
        store = ActivationStore.open(run.store_path)
        found["peak MB before"] = peak()
        begun = time.perf_counter()
        index = LatentIndex(run, store)
        index.build("cpu")
        found |= {"tokens": store.rows * store.context, "encoding s": time.perf_counter() - begun}
        found["firings"] = int(index.counts.sum())
        found["index MB"] = sum(file.stat().st_size for file in index.folder.iterdir()) / 1e6
        found["peak MB after encoding"] = peak()
        begun = time.perf_counter()
        maker = ExampleMaker(index, ExamplesConfig())
        alive = np.flatnonzero(index.counts)[: args.latents]
        examples = [maker.of(int(latent)) for latent in alive]
        found |= {"latents": len(examples), "examples s": time.perf_counter() - begun}
        found["with enough windows"] = sum(e.problem is None for e in examples)
        found["peak MB after examples"] = peak()
    for key, value in found.items():
        print(f"{key:26} {value:,.1f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

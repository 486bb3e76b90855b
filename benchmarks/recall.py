"""How many of the latents that float32 chooses does a cheaper encoder choose?

    python benchmarks/recall.py [--store PATH --runs DIR [DIR ...]] [--nominated 1.25]

On random inputs and weights, and on real activations with trained coders (`make demo` leaves a store and runs), once as
training sees them and once with first positions and special tokens, whose activations are massive. "alone" is the
estimate without nominating more than k: what a plain bfloat16 encoder does.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from skipcoder.kernels.preactivations import MODES, Search
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.encoding import make_search, recall
from skipcoder.trainer.config import CoderConfig, EncodeConfig, Kind
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.stream import ActivationStream

TOKENS = 8192


def search(x: Moments, width: int) -> Search:
    """An exact search, with the statistics of the others."""
    mean, variance = torch.from_numpy(x.mean), torch.from_numpy(x.variance)
    return make_search(EncodeConfig(), mean, variance, "cpu", width)._replace(mode="float32")


def problems(store: Path | None, runs: list[Path]) -> list[tuple[str, SparseCoder, Tensor]]:
    """(name, coder with statistics, inputs)."""
    g = torch.Generator().manual_seed(0)
    random = SparseCoder(CoderConfig(kind=Kind.transcoder, k=32, width=18432), 576, 576)
    x = torch.randn(TOKENS, 576, generator=g)
    random.search = search(Moments.of(x), 18432)
    found = [("random", random, x)]
    for run in runs:
        assert store is not None
        opened, coder = ActivationStore.open(store), SparseCoder.load(run)
        side = coder.meta["read"]["side"]
        for name, kept in (("training", TokenFilter()), ("all", TokenFilter(0, False))):
            stream = ActivationStream(opened, coder.meta["hookpoint"], TOKENS, filter=kept)
            batch = next(iter(stream))
            moments = opened.moments(coder.meta["hookpoint"], side, positions=TokenFilter().classes)
            coder.search = search(moments, coder.cfg.width)
            label = f"{coder.cfg.kind} k={coder.cfg.k}, {name} tokens"
            found.append((label, coder, batch.x if side == "input" else batch.y))
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--nominated", type=float, help="as a multiple of k; what each mode needs by default")
    args = parser.parse_args()
    modes = [mode for mode in MODES if mode != "float32"]
    print(f"{'inputs and coder':40}" + "".join(f"{label:>16}" for label in [*modes, *(f"{m} alone" for m in modes)]))
    for name, coder, x in problems(args.store, args.runs):
        values, exact = [], coder.search
        for nominated in (args.nominated, 1.0):
            for mode in modes:
                coder.search = exact._replace(mode=mode, nominated=nominated)
                values.append(recall(coder, x, TOKENS))
        print(f"{name:40}" + "".join(f"{value:16.6f}" for value in values), flush=True)


if __name__ == "__main__":
    main()

"""How fast, and how well mixed, do shuffled pairs come?

    python benchmarks/stream.py --store PATH [--saelens DIR] [--json OUT]   # speed, and mixing on that store
    python benchmarks/stream.py --mixing                # mixing of large layouts, by the pure order functions

Speed: tokens per second of shuffled float32 pairs from a warm store (compressed, read and decoded anew in every epoch),
beside (a) a raw memmap of the same pairs in uncompressed bf16, read in the same order of chunks and permuted likewise,
(b) SAELens' ActivationsStore on its cache format (Arrow; both sides in one column, since it has no pairs), and (c)
safetensors files of one chunk each through a torch DataLoader with two workers. Epochs are interleaved.

Mixing: distinct text rows in a batch, over what a uniform sample of the whole store would hold.

DIR: pip install --no-deps --target DIR sae-lens==6.54.12 transformer-lens==3.9.0 einops jaxtyping better_abc \
         simple_parsing docstring_parser
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peer_saelens
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.order import block_permutation, epoch_order
from skipcoder.trainer.data.reading import Chunk
from skipcoder.trainer.data.stream import ActivationStream

BATCH = 4096
KEEP_ALL = TokenFilter(0, False)


def ours(store: ActivationStore, hookpoint: str) -> Callable[[], int]:
    """An epoch of the stream, with nothing kept from the epoch before but its empty buffers."""
    stream = ActivationStream(store, hookpoint, BATCH, filter=KEEP_ALL, epochs=1)

    def epoch() -> int:
        stream.load_state_dict(stream.beginning())
        return sum(len(batch.x) for batch in stream)

    return epoch


def chunks_of(store: ActivationStore, hookpoint: str) -> list[Chunk]:
    """(unit, first row, end) of each training chunk."""
    return ActivationStream(store, hookpoint, BATCH, epochs=1).chunks


def memmap(store: ActivationStore, hookpoint: str, folder: Path) -> Callable[[], int]:
    """The same order from uncompressed bf16 on disk."""
    chunks = chunks_of(store, hookpoint)
    pool = ActivationStream(store, hookpoint, BATCH, epochs=1).pool_chunks
    sides = []
    for side in ("input", "output"):
        whole = store.activations(hookpoint, side, 0, chunks[-1][2])
        whole.view(torch.int16).numpy().tofile(folder / side)
        sides.append(np.memmap(folder / side, np.int16, "r").reshape(whole.shape))

    def epoch() -> int:
        order, seen = epoch_order(0, 0, [unit for unit, _, _ in chunks]), 0
        for block in range(-(-len(order) // pool)):
            chosen = [chunks[i] for i in order[block * pool : (block + 1) * pool]]
            x: Any
            y: Any
            x, y = (np.concatenate([side[a:b] for _, a, b in chosen]) for side in sides)
            shuffle = block_permutation(0, 0, block, len(x))
            x, y = (torch.from_numpy(z[shuffle]).view(torch.bfloat16) for z in (x, y))
            for start in range(0, len(x), BATCH):
                seen += len(x[start : start + BATCH].float())
                y[start : start + BATCH].float()
        return seen

    return epoch


class Files(Dataset[dict[str, Tensor]]):
    """One safetensors file for each chunk."""

    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        pair = load_file(self.paths[i])
        shuffle = torch.randperm(len(pair["x"]))
        return {side: rows[shuffle].float() for side, rows in pair.items()}


def safetensors(store: ActivationStore, hookpoint: str, folder: Path) -> Callable[[], int]:
    """Chunks in random order, each permuted; no mixing between chunks."""
    paths = []
    for i, (_, start, stop) in enumerate(chunks_of(store, hookpoint)):
        x, y = (store.activations(hookpoint, side, start, stop) for side in ("input", "output"))
        paths.append(folder / f"{i}.safetensors")
        save_file({"x": x.contiguous(), "y": y.contiguous()}, paths[-1])
    loader = DataLoader(
        Files(paths), batch_size=None, shuffle=True, num_workers=2, prefetch_factor=4, persistent_workers=True
    )
    return lambda: sum(len(pair["x"]) for pair in loader)


def distinct(rows: np.ndarray, all_rows: int) -> float:
    """Distinct rows in a batch over the expectation for a uniform sample."""
    return len(np.unique(rows)) / (all_rows * (1 - (1 - 1 / all_rows) ** len(rows)))


def mixing(store: ActivationStore, hookpoint: str) -> float:
    """Mean over an epoch's whole batches of a store."""
    stream = ActivationStream(store, hookpoint, BATCH, filter=KEEP_ALL, epochs=1)
    rows = [b.position.numpy() // store.context for b in stream if len(b.position) == BATCH]
    all_rows = len(np.unique(np.concatenate(rows)))
    return float(np.mean([distinct(batch, all_rows) for batch in rows]))


def simulated(tokens: int, pool: int, context: int = 256, unit_rows: int = 64, chunk: int = 1024) -> float:
    """Mean over the batches of the first block: chunks are random samples of their unit's tokens."""
    units = tokens // (unit_rows * context)
    per_unit = unit_rows * context // chunk
    order = epoch_order(0, 0, np.repeat(np.arange(units), per_unit).tolist())[:pool]
    rng = np.random.default_rng(0)
    unit = order // per_unit
    rows = np.concatenate([u * unit_rows + rng.integers(0, unit_rows, chunk) for u in unit])
    rows = rows[block_permutation(0, 0, 0, len(rows))]
    batches: Iterator[np.ndarray] = (rows[i : i + BATCH] for i in range(0, len(rows) - BATCH + 1, BATCH))
    return float(np.mean([distinct(batch, units * unit_rows) for batch in batches]))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path)
    parser.add_argument("--mixing", action="store_true", help="simulate large layouts")
    parser.add_argument("--saelens", type=Path, help="where SAELens is installed")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.mixing:
        pools = (16, 64, 256, 1024)
        print(f"{'tokens in store':>16}" + "".join(f"{f'pool {p}':>12}" for p in pools))
        for tokens in (10**6, 10**7, 10**8, 10**9):
            print(f"{tokens:16,}" + "".join(f"{simulated(tokens, pool):12.3f}" for pool in pools), flush=True)
    if args.store is None:
        return
    store = ActivationStore.open(args.store)
    hookpoint = store.hookpoint(None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        contenders = {
            "ours": ours(store, hookpoint),
            "memmap": memmap(store, hookpoint, folder),
            "safetensors": safetensors(store, hookpoint, folder),
        }
        if args.saelens:
            peer_saelens.use(args.saelens)
            train = [unit for unit in store.split("train")]
            rows = np.concatenate([store.tokens(unit) for unit in train])
            contenders["SAELens"] = peer_saelens.epoch(store, hookpoint, folder / "arrow", BATCH)
            row_numbers = np.arange(len(rows)).repeat(store.context)
            for batches in peer_saelens.CONTEXTS_IN_BUFFER:
                seen = peer_saelens.row_batches(row_numbers, store.context, folder / f"rows{batches}", BATCH, batches)
                mixed = np.mean([distinct(batch, len(rows)) for batch in seen])
                print(f"mixing of SAELens' buffer of {batches} contexts: {mixed:.3f}", flush=True)
        speeds: dict[str, list[float]] = {contender: [] for contender in contenders}
        for _ in range(args.rounds):
            for contender, epoch in contenders.items():
                epoch()  # the others have taken the caches and the memory; training reads epoch after epoch
                begun = time.perf_counter()
                tokens = epoch()
                speeds[contender].append(tokens / (time.perf_counter() - begun))
    median = {contender: statistics.median(s) for contender, s in speeds.items()}
    for contender, speed in median.items():
        print(f"{contender:14}{speed:12,.0f} tokens/s   ours / this {median['ours'] / speed:6.2f}")
    print(f"mixing on this store {mixing(store, hookpoint):.3f}")
    if args.json:
        args.json.write_text(json.dumps({"median": median, "all": speeds, "torch": torch.__version__}, indent=2))


if __name__ == "__main__":
    main()

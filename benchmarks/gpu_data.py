"""How fast does data move on this GPU: capture, store, stream? One dated Markdown and JSON file.

    python benchmarks/gpu_data.py --out benchmarks/ [--folder DIR] [--tokens 1048576] [--ray] [--layers 3 4 5 6 7 8]

A model of Llama-3.2-1B's shape with random weights (and 2,000 words) is captured into a store under DIR, in this
process by the worker that Ray would start, with --ray also by `pipeline/cache.py`; beside it, in the same run, the bare
forward pass that captures and drops, and what the disk writes and syncs. The store is recoded with lz4, and both are
streamed to the GPU from the page cache; then a lone coder of 16,384 latents is trained from the stream and on one
batch. Checked on the way: one writer gives the bytes of several, and the stream the batches of one on a CPU.
`--device cpu --tiny` tries all of it without a GPU.
"""

import argparse
import datetime
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_captures import (
    Found,
    capture_here,
    capture_with_ray,
    configured,
    disk,
    make_model,
    one_writer_gives_the_same,
    wait,
)

from skipcoder.pipeline.store import recode
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.config import CoderConfig, Kind, LoopConfig, TrainConfig
from skipcoder.trainer.data import stream as streams
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.step.learner import Learner


@contextmanager
def nothing_kept() -> Iterator[None]:
    """Read every epoch anew."""
    module: Any = streams
    before, module.KEEP_BYTES = module.KEEP_BYTES, -1
    try:
        yield
    finally:
        module.KEEP_BYTES = before


def streaming(store: ActivationStore, args: argparse.Namespace, readers: int | None = None) -> dict[str, Any]:
    """Tokens a second of the stream alone, from the page cache, after a first round."""
    hookpoint = next(iter(store.hookpoints))
    with nothing_kept():
        stream = ActivationStream(store, hookpoint, args.batch, device=args.device, readers=readers)
    batches, rates, total = iter(stream), [], stream.tokens
    for _ in range(3):
        wait(args.device)
        begun, tokens = time.perf_counter(), 0
        while tokens < total * 0.9:
            tokens += len(next(batches).x)
        wait(args.device)
        rates.append(tokens / (time.perf_counter() - begun))
    batches.close()
    return {"tokens/s": statistics.median(rates[1:]), "readers": stream.readers}


def reading(store: ActivationStore, threads: int) -> float:
    """Tokens a second of which threads read, check and decompress the codes of both sides, into memory used again."""
    hookpoint, rows = next(iter(store.hookpoints)), store.chunk_rows
    held = threading.local()

    def read(start: int) -> None:
        for side in ("input", "output"):
            if not hasattr(held, side):
                shapes = store.code_shapes(hookpoint, side, rows)
                setattr(held, side, {suffix: np.empty(shape, dtype) for suffix, (shape, dtype) in shapes.items()})
            store.codes(hookpoint, side, start, start + rows, getattr(held, side))

    starts = range(0, store.rows * store.context // rows * rows, rows)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, starts[: 4 * threads]))
        begun = time.perf_counter()
        list(pool.map(read, starts))
        return len(starts) * rows / (time.perf_counter() - begun)


def lone_coder(store: ActivationStore, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step from the stream and on one batch, and the share spent waiting for data."""
    hookpoint = next(iter(store.hookpoints))
    with nothing_kept():
        stream = ActivationStream(store, hookpoint, args.batch, device=args.device)
    cfg = TrainConfig(
        coder=CoderConfig(kind=Kind.transcoder, k=32, width=256 if args.tiny else 16384),
        train=LoopConfig(tokens=10**9, batch_tokens=args.batch, log_every=10**9),
    )
    x, y = (store.moments(hookpoint, side) for side in ("input", "output"))
    learner = Learner(cfg, x, y, 10**6, args.device, in_bfloat16=True)
    batches = iter(stream)
    steps = 3 if args.tiny else 60

    def turn(same: Any) -> float:
        wait(args.device)
        begun = time.perf_counter()
        for _ in range(steps):
            batch = same or next(batches)
            while len(batch.x) < args.batch:  # the short last one has no graph
                batch = next(batches)
            learner.step(batch.x, batch.y, args.batch)
        wait(args.device)
        return 1e3 * (time.perf_counter() - begun) / steps

    one = next(batches)
    turn(one)
    alone: list[float] = []
    streamed: list[float] = []
    for _ in range(3):
        alone.append(turn(one))
        turn(None)  # uses up what was read meanwhile
        streamed.append(turn(None))
    batches.close()
    a, s = statistics.median(alone), statistics.median(streamed)
    return {
        "ms on one batch": a,
        "ms from the stream": s,
        "waiting": max(0.0, 1 - a / s),
        "tokens/s": args.batch / s * 1e3,
    }


def as_on_a_cpu(store: ActivationStore, args: argparse.Namespace) -> bool:
    """Compare batches of several pools with those of a stream on a CPU."""
    hookpoint = next(iter(store.hookpoints))
    here, there = (ActivationStream(store, hookpoint, 1000, device=d, pool_chunks=3) for d in ("cpu", args.device))
    return all(
        torch.equal(a.x, b.x.cpu()) and torch.equal(a.y, b.y.cpu()) and torch.equal(a.position, b.position)
        for a, b, _ in zip(here, there, range(12), strict=False)
    )


def measure(args: argparse.Namespace, folder: Path) -> Found:
    """Everything."""
    found = Found()
    cfg = configured(args, make_model(folder / "model", args.tiny, args.device), folder / "s.zarr")
    wide = 2 * sum(2 * (64 if args.tiny else 2048) for _ in args.layers)
    rates = [disk(folder, 2**25 if args.tiny else 2**32)]
    capture_here(args, cfg, found)
    if args.ray:
        with_ray = configured(args, folder / "model", folder / "ray.zarr")
        capture_with_ray(args, with_ray, found)
    rates.append(disk(folder, 2**25 if args.tiny else 2**32))
    store = ActivationStore.open(folder / "s.zarr")
    size = sum(facts["bytes"] for record in store.commits.values() for facts in record.shards.values())
    per_token = size / (store.rows * store.context)
    found["disk, MB/s"] = statistics.median(rates) / 1e6
    found["bytes per token"], found["of raw"] = per_token, per_token / wide
    found["disk, tokens/s"] = statistics.median(rates) / per_token
    best = max(found[f"capture, {writers} writers, tokens/s"] for writers in args.writers)
    found["capture / forward"] = best / found["bare forward, tokens/s"]
    found["capture / disk"] = best / found["disk, tokens/s"]
    if len(args.layers) == 1:
        list(recode.recode(store, place_at(folder / "lz4.zarr"), "lz4"))
        for name, path in (("zstd", "s.zarr"), ("lz4", "lz4.zarr")):
            one = ActivationStore.open(folder / path)
            for threads in (1, 4, os.cpu_count() or 1):
                found[f"codes read, {name}, {threads} threads, tokens/s"] = reading(one, threads)
            for readers in (None, 6) if not args.tiny else (None,):
                said = streaming(one, args, readers)
                found[f"stream, {name}, {said['readers']} readers, tokens/s"] = said["tokens/s"]
            found[f"lone coder, {name}"] = lone_coder(one, args)
    found["batches are those of a CPU"] = as_on_a_cpu(store, args)
    found["one writer gives the same bytes"] = one_writer_gives_the_same(args, folder)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a small model, to try the script itself")
    parser.add_argument("--tokens", type=int, default=2**20)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8192)
    parser.add_argument("--layers", type=int, nargs="+", default=[8])
    parser.add_argument("--writers", type=int, nargs="+", default=[4, 8], help="ray.writers")
    parser.add_argument("--ray", action="store_true", help="also by cache.py")
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    parser.add_argument("--commit", default="unknown", help="for the report")
    parser.add_argument("--out", type=Path, help="folder for the dated files; without it, print only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(args, Path(folder))
    card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    about = {
        "card": card,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": args.commit,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "arguments": {key: str(value) for key, value in vars(args).items() if key in ("tokens", "layers", "writers")},
    }
    lines = [f"# Capture and stream on {card}", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += ["| what | |", "|---|---|"]
    for key, value in found.items():
        shown = ", ".join(f"{k} {v:,.3g}" for k, v in value.items()) if isinstance(value, dict) else f"{value:,.4g}"
        lines.append(f"| {key} | {shown} |")
    print("\n".join(lines))
    if args.out:
        name = f"gpu_data-{card.replace(' ', '-')}-{about['date']}"
        (args.out / f"{name}.json").write_text(json.dumps({"about": about, "found": found}, indent=1))
        (args.out / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Bytes and speed of the store: codecs, compressors, and who reads the chunks.

    python benchmarks/storage.py --store PATH [--units 8] [--readers DIR] [--json OUT]

PATH: a bf16 store of real activations. Its first units are written anew with every codec and compressor, and as format
2 had it, by the writer that a capture uses (statistics, checksums and fsync included), and read back chunk by chunk,
one thread, page cache warm. Writing and reading take turns over all ways, three times; medians.
DIR: pip install --no-deps --target DIR zarrs tensorstore ml_dtypes
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import zarr
from recode import recoded

from skipcoder.pipeline.store.commit import SIDES
from skipcoder.pipeline.store.reader import ActivationStore

CODECS, COMPRESSIONS = ("bf16", "int8", "fp8"), ("zstd", "lz4")


def chunks(store: ActivationStore, units: int) -> list[tuple[int, int]]:
    """[start, stop) of each chunk of the first units."""
    end = store.unit_range(units - 1)[1]
    return [(start, min(start + store.chunk_rows, end)) for start in range(0, end, store.chunk_rows)]


def median_seconds(task: Callable[[], object], rounds: int = 5) -> float:
    """After one unmeasured round."""
    task()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        task()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def readers(store: ActivationStore, folder: Path | None) -> dict[str, Callable[[int, int], Any]]:
    """Ways to read rows of one array."""
    name = f"{store.hookpoint(None)}/input_exponent"
    array = store.array(name)
    ways: dict[str, Callable[[int, int], Any]] = {
        "skipcoder": lambda a, b: store.read(name, a, b),
        "zarr-python": lambda a, b: array[a:b],
    }
    if folder:
        sys.path.insert(0, str(folder))
        import tensorstore
        from zarr.registry import register_pipeline
        from zarrs import ZarrsCodecPipeline

        register_pipeline(ZarrsCodecPipeline)
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            rust = zarr.open_array(store.path / name, mode="r")
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.path / name)}}
        opened = tensorstore.open(spec, open=True).result()
        ways["zarrs"] = lambda a, b: rust[a:b]
        ways["tensorstore"] = lambda a, b: opened[a:b].read().result()
    return ways


def read_both(store: ActivationStore, hookpoint: str, spans: Sequence[tuple[int, int]]) -> None:
    """Activations of both sides, in memory that is used again."""
    outs = {side: torch.empty(store.chunk_rows, store.width(hookpoint, side), dtype=torch.bfloat16) for side in SIDES}
    for a, b in spans:
        for side, out in outs.items():
            store.activations(hookpoint, side, a, b, out=out[: b - a])


def read_each(read_rows: Callable[[int, int], Any], spans: Sequence[tuple[int, int]]) -> list[Any]:
    """Rows of every span."""
    return [read_rows(a, b) for a, b in spans]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--units", type=int, default=8)
    parser.add_argument("--readers", type=Path, help="where zarrs and tensorstore are installed")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = ActivationStore.open(args.store)
    hookpoint = store.hookpoint(None)
    raw = sum(2 * store.hookpoints[hookpoint][d] for d in ("d_in", "d_out"))
    tokens = args.units * store.unit_rows * store.context
    results: dict[str, dict[str, Any]] = {}
    ways = [(codec, compression, 3) for codec in CODECS for compression in COMPRESSIONS]
    ways += [("bf16", compression, 2) for compression in COMPRESSIONS]
    for _ in range(3):
        for codec, compression, version in ways:
            with tempfile.TemporaryDirectory() as folder:
                how: Any = {"codec": codec, "compression": compression, "version": version}
                new, seconds = recoded(store, Path(folder) / "s.zarr", args.units, **how)
                shards = (s for r in new.commits.values() for s in r.shards.items() if s[0].startswith(hookpoint))
                found = results.setdefault(f"{codec} {compression}, format {version}", {"write": [], "read": []})
                found["bytes"] = sum(facts["bytes"] for _, facts in shards) / tokens
                found["lost"] = [new.moments(hookpoint, side, split=None).lost for side in ("input", "output")]
                read = median_seconds(partial(read_both, new, hookpoint, chunks(new, args.units)), 3)
                found["write"].append(raw * tokens / seconds / 1e6)
                found["read"].append(raw * tokens / read / 1e6)
    print("| codec, compressor | bytes/token | of raw bf16 | write MB/s | read MB/s | lost (in, out) |")
    print("|---" * 6 + "|")
    for way, found in results.items():
        speeds = " | ".join(f"{statistics.median(found[key]):,.0f}" for key in ("write", "read"))
        lost = ", ".join(f"{x:.1e}" for x in found["lost"])
        print(f"| {way} | {found['bytes']:,.0f} | {found['bytes'] / raw:.3f} | {speeds} | {lost} |")
    spans = chunks(store, args.units)
    width = -(-store.hookpoints[hookpoint]["d_in"] // 2)
    for way, read_rows in readers(store, args.readers).items():
        seconds = median_seconds(partial(read_each, read_rows, spans))
        results[way] = {"read": width * tokens / seconds / 1e6}
        print(f"{way:12} {results[way]['read']:8,.0f} MB/s of exponents")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

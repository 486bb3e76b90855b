"""Bytes and speed of the store: codecs, compressors, and who reads the chunks.

    python benchmarks/storage.py --store PATH [--units 8] [--readers DIR] [--json OUT]

PATH: a bf16 store of real activations. Its first units are written anew with every codec and compressor, by the writer
that a capture uses (statistics, checksums and fsync included), and read back chunk by chunk, one thread, page cache
warm.
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

import numpy as np
import torch
import zarr
from numcodecs import blosc
from recode import recoded

from skipcoder.pipeline.store.codec import BLOCK, LEVELS
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


def pack(codes: Sequence[np.ndarray], compressor: bytes, level: int, shuffle: int) -> list[bytes]:
    """Every chunk, compressed."""
    return [blosc.compress(c, compressor, level, shuffle, BLOCK) for c in codes]


def unpack(packed: Sequence[bytes], out: np.ndarray) -> None:
    """Every chunk, decompressed into `out`."""
    for p in packed:
        blosc.decompress(p, out)


def shuffles(store: ActivationStore, units: int) -> dict[str, tuple[float, float, float]]:
    """Blosc alone on bf16 codes: (size over raw, MB/s to compress, MB/s to decompress), bytes or bits shuffled."""
    name = f"{store.hookpoint(None)}/input"
    codes = [store.read(name, a, b) for a, b in chunks(store, units)]
    raw, out, found = sum(c.nbytes for c in codes), np.empty_like(codes[0]), {}
    for compressor in (b"zstd", b"lz4"):
        for label, shuffle in (("bytes", blosc.SHUFFLE), ("bits", blosc.BITSHUFFLE)):
            level = LEVELS[compressor.decode()]
            packed = pack(codes, compressor, level, shuffle)
            write = median_seconds(partial(pack, codes[:8], compressor, level, shuffle), 3)
            read = median_seconds(partial(unpack, packed, out))
            speed = sum(c.nbytes for c in codes[:8]) / write / 1e6
            found[f"{compressor.decode()}-{level}, {label} shuffled"] = (
                sum(map(len, packed)) / raw,
                speed,
                raw / read / 1e6,
            )
    return found


def readers(store: ActivationStore, folder: Path | None) -> dict[str, Callable[[int, int], Any]]:
    """Ways to read rows of one array."""
    name = f"{store.hookpoint(None)}/input"
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


def read_both(store: ActivationStore, hookpoint: str, spans: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Activations of both sides."""
    return [store.activations(hookpoint, side, a, b) for a, b in spans for side in ("input", "output")]


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
    results: dict[str, Any] = {}
    print("| codec | compressor | bytes/token | of raw bf16 | write MB/s | read MB/s | lost (in, out) |")
    print("|---" * 7 + "|")
    for codec in CODECS:
        for compression in COMPRESSIONS:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "s.zarr"
                new, seconds = recoded(store, path, args.units, codec=codec, compression=compression)
                shards = (s for r in new.commits.values() for s in r.shards.items() if s[0].startswith(hookpoint))
                size = sum(facts["bytes"] for _, facts in shards) / tokens
                spans = chunks(new, args.units)
                read = median_seconds(partial(read_both, new, hookpoint, spans))
                lost = [new.moments(hookpoint, side, split=None).lost for side in ("input", "output")]
            speeds = [raw * tokens / s / 1e6 for s in (seconds, read)]
            results[f"{codec} {compression}"] = {"bytes": size, "write": speeds[0], "read": speeds[1], "lost": lost}
            print(
                f"| {codec} | {compression} | {size:,.0f} | {size / raw:.3f} | {speeds[0]:,.0f} | {speeds[1]:,.0f} "
                f"| {lost[0]:.1e}, {lost[1]:.1e} |",
                flush=True,
            )
    for way, (size, write, decode) in shuffles(store, args.units).items():
        results[way] = {"bytes": size, "write": write, "read": decode}
        print(f"{way:22} {size:.3f} of bf16, {write:6,.0f} MB/s to compress, {decode:6,.0f} MB/s to decompress")
    spans = chunks(store, args.units)
    width = 2 * store.hookpoints[hookpoint]["d_in"]
    for way, read_rows in readers(store, args.readers).items():
        seconds = median_seconds(partial(read_each, read_rows, spans))
        results[way] = width * tokens / seconds / 1e6
        print(f"{way:12} {results[way]:8,.0f} MB/s of decoded bf16")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

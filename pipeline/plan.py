"""What a capture will cost, before it begins: `plan=true`. No weights are loaded and nothing stays written.

torch counts the FLOP of the forward pass on fake tensors; its time, a lower bound, assumes the speed of a bare matrix
product on this machine. Sizes and the speeds of codec and compressor are measured on normally distributed activations,
which compress much like real ones, on the device and with the threads that a capture or a stream would use; the disk by
writing and syncing a file without a name.
"""

import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from skipcoder.pipeline.config import CacheConfig, Compression
from skipcoder.pipeline.model import half_precision
from skipcoder.pipeline.model.load import describe
from skipcoder.pipeline.store import layout
from skipcoder.pipeline.store.codecs import CODECS
from skipcoder.pipeline.store.codecs.base import blosc_of
from skipcoder.pipeline.store.place import Directory
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.stats import sums

_SECONDS = 0.3
"""Seconds for which a matrix product is timed."""

_WRITTEN = 2**26
"""Bytes written to time the disk."""


class Plan(NamedTuple):
    """Cost of one capture; times in seconds for all of its tokens, by one worker on this machine."""

    tokens: int
    flops: float
    """FLOP per token."""
    flops_per_second: float
    sizes: dict[str, tuple[int, float]]
    """Hookpoint -> bytes per token (as bfloat16, as stored)."""
    encode: float
    """Encoding and statistics, where the model runs."""
    pack: float
    """Compressing."""
    disk: float | None
    """Writing and syncing; None if that is not known, as with an object store."""
    read: float
    on_gpu: bool
    weights: int
    """Bytes of the model's weights."""

    @property
    def forward(self) -> float:
        """Seconds at the speed of a bare matrix product."""
        return self.tokens * self.flops / self.flops_per_second

    @property
    def capture(self) -> float:
        """Seconds of the whole. Beside a GPU, others compress and write meanwhile; a CPU does one after the other."""
        parts = self.forward + self.encode, self.pack, self.disk or 0.0
        return max(parts) if self.on_gpu else sum(parts)

    @property
    def break_even(self) -> int | None:
        """Smallest number of coders for which capturing once and reading is faster than running the model for each;
        None if reading takes longer than the model."""
        saved = self.forward - self.read
        return None if saved <= 0 else max(1, int(self.capture / saved) + 1)


def make(cfg: CacheConfig) -> Plan:
    """Estimate what a capture costs."""
    hookpoints, widths, flops, _, weights = describe(cfg.model, cfg.hookpoints, cfg.data.context, count_flops=True)
    rows = -(-cfg.data.tokens // cfg.data.context)
    tokens = rows * cfg.data.context
    unit_rows = cfg.store.unit_rows or layout.auto_unit_rows(rows, cfg.data.context)
    chunk = layout.chunk_rows(unit_rows * cfg.data.context)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    costs = {d: _codec(cfg, chunk, d, device) for d in {d for sides in widths.values() for d in sides.values()}}
    of = {h.name: list(widths[h.name].values()) for h in hookpoints}
    sizes = {name: (2 * sum(each), sum(costs[d].size for d in each)) for name, each in of.items()}
    sides = [costs[d] for each in of.values() for d in each]
    encode, pack, read = (tokens * sum(times) for times in zip(*(side[1:] for side in sides), strict=True))
    speed = _disk_speed(cfg.store.path)
    disk = speed and tokens * sum(stored for _, stored in sizes.values()) / speed
    matmul = _matmul_speed(max(costs), getattr(torch, cfg.model.dtype.value), device)
    return Plan(tokens, flops, matmul, sizes, encode, pack, disk, read, device == "cuda", weights)


def show(cfg: CacheConfig) -> None:
    """Print the plan."""
    plan = make(cfg)
    stored = sum(size for _, size in plan.sizes.values())
    print(f"{cfg.store.path}: {plan.tokens:,} tokens, {len(plan.sizes)} hookpoints, {_bytes(plan.tokens * stored)}")
    for name, (raw, size) in plan.sizes.items():
        print(f"  {name}: {raw:,} bytes a token, about {size:,.0f} as {cfg.store.codec}")
    print(f"  {fits(plan.weights, cfg)}")
    speed = plan.flops_per_second / 1e12
    print(f"  forward: {plan.flops / 1e9:.3g} GFLOP a token; at {speed:.3g} TFLOP/s at least {_time(plan.forward)}")
    disk = "the disk not counted" if plan.disk is None else f"writing {_time(plan.disk)}"
    print(f"  encoding {_time(plan.encode)}, compressing {_time(plan.pack)}, {disk}, reading {_time(plan.read)}")
    how = "the longest of these" if plan.on_gpu else "all together"
    print(f"  a capture, {how}: at most {plan.tokens / plan.capture:,.0f} tokens/s")
    print(f"  a stream from the page cache: at most {plan.tokens / plan.read:,.0f} tokens/s")
    least = plan.break_even
    print(
        "  the model is faster than the store: cache nothing"
        if least is None
        else f"  cheaper than running the model for every coder from {least} coders on"
    )


def fits(weights: int, cfg: CacheConfig) -> str:
    """Say whether a model's weights go where a worker on this machine would put them."""
    have, where = psutil.virtual_memory().available, "this machine's memory"
    asked = cfg.ray.gpus_per_worker
    count = 1 if asked is None else math.ceil(asked)
    if torch.cuda.is_available() and count:
        free = [torch.cuda.mem_get_info(i)[0] for i in range(min(count, torch.cuda.device_count()))]
        have, where = sum(free), f"{len(free)} GPU{'s' if len(free) > 1 else ''}"
    said = f"weights: {_bytes(weights)}; {where}: {_bytes(have)} free"
    if weights < 0.9 * have:
        return said
    if cfg.model.device_map is not None:
        return f"{said}: too little; what does not fit goes to memory and model.offload_folder, and is slower"
    more = "ray.gpus_per_worker, " if torch.cuda.is_available() else ""
    return (
        f"{said}: too little. Try {more}model.quantization=int8, or model.device_map=auto model.offload_folder=FOLDER"
    )


class _Cost(NamedTuple):
    """Of one token of one side: bytes, and seconds."""

    size: float
    encode: float
    pack: float
    read: float


def _codec(cfg: CacheConfig, chunk: int, d: int, device: str) -> _Cost:
    from numcodecs import blosc

    codec, z_ND = CODECS[cfg.store.codec], torch.randn(chunk, d, device=device).bfloat16()
    compression = (cfg.store.compression or Compression.zstd).value
    how = {suffix: blosc_of(spec, compression) for suffix, spec in codec.arrays.items()}
    cores = os.cpu_count() or 1
    writers, readers = (min(cores, 16), min(cores, 16)) if device == "cuda" else (min(cores, 4), min(cores, 2))

    def encode() -> None:
        z = codec.encode(z_ND)
        float(sums(z_ND)[0]), float(z[""][0, 0])  # waits for the device

    coded = {suffix: z.cpu() for suffix, z in codec.encode(z_ND).items()}

    def pack() -> dict[str, bytes]:
        return {s: blosc.compress(z.numpy(), *h) if (h := how[s]) else z.numpy().tobytes() for s, z in coded.items()}

    packed = pack()

    def read() -> None:
        unpacked = {suffix: torch.empty_like(z) for suffix, z in coded.items()}
        for suffix in filter(how.get, packed):
            blosc.decompress(packed[suffix], unpacked[suffix].numpy())
        if device == "cpu":  # a GPU decodes meanwhile
            codec.decode(coded, torch.empty_like(z_ND))

    size = sum(len(packed[suffix]) for suffix, spec in codec.arrays.items() if not spec.per_unit)
    seconds = _seconds(encode, 1), _seconds(pack, writers), _seconds(read, readers)
    return _Cost(size / chunk, *(s / chunk for s in seconds))


def _seconds(work: Callable[[], object], threads: int) -> float:
    """Of one piece of work, where so many threads do the same."""
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(3):  # the first warms up
            begun = time.perf_counter()
            for done in [pool.submit(work) for _ in range(threads)]:
                done.result()
            found.append(time.perf_counter() - begun)
    return min(found) / threads


def _disk_speed(path: str) -> float | None:
    """Bytes a second written and synced where the store would lie; None if that is no directory or may not be
    written."""
    place = place_at(path)
    if not isinstance(place, Directory):
        return None
    folder = next(f for f in Path(place.address).parents if f.is_dir())
    content = os.urandom(_WRITTEN)
    with suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        begun = time.perf_counter()
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return _WRITTEN / (time.perf_counter() - begun)
    return None


def _matmul_speed(d: int, dtype: torch.dtype, device: str) -> float:
    """FLOP/s of [4096, d] x [d, 4 d]."""
    if device == "cpu" and not half_precision.supported(dtype):
        dtype = torch.float32  # as in the model's linear layers
    a, b = torch.randn(4096, d, device=device, dtype=dtype), torch.randn(d, 4 * d, device=device, dtype=dtype)
    float((a @ b)[0, 0])
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < _SECONDS:
        float((a @ b)[0, 0])  # waits for the device
        done += 1
    return done * 2 * 4096 * d * 4 * d / (time.perf_counter() - begun)


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:,.0f} PB"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"

"""What a capture will cost, before it begins: `plan=true`. No weights are loaded and nothing is written.

torch counts the FLOP of the forward pass on fake tensors; its time, a lower bound, assumes the speed of a bare matrix
product on this machine. Sizes and codec speeds are measured on normally distributed activations, which compress much
like real ones.
"""

import time
from typing import NamedTuple

import torch

from skipcoder.pipeline.config import CacheConfig, Compression
from skipcoder.pipeline.model import half_precision
from skipcoder.pipeline.model.load import describe
from skipcoder.pipeline.store import layout
from skipcoder.pipeline.store.codecs import CODECS
from skipcoder.pipeline.store.codecs.base import blosc_of
from skipcoder.pipeline.store.stats import sums

_SECONDS = 0.3
"""Seconds for which a matrix product is timed."""


class Plan(NamedTuple):
    """Cost of one capture; times in seconds for all of its tokens, by one worker on this machine."""

    tokens: int
    flops: float
    """FLOP per token."""
    flops_per_second: float
    sizes: dict[str, tuple[int, float]]
    """Hookpoint -> bytes per token (as bfloat16, as stored)."""
    write: float
    read: float

    @property
    def forward(self) -> float:
        """Seconds at the speed of a bare matrix product."""
        return self.tokens * self.flops / self.flops_per_second

    @property
    def break_even(self) -> int | None:
        """Smallest number of coders for which capturing once and reading is faster than running the model for each;
        None if reading takes longer than the model."""
        saved = self.forward - self.read
        return None if saved <= 0 else max(1, int((self.forward + self.write) / saved) + 1)


def make(cfg: CacheConfig) -> Plan:
    """Estimate what a capture costs."""
    hookpoints, widths, flops, _ = describe(cfg.model, cfg.hookpoints, cfg.data.context, count_flops=True)
    rows = -(-cfg.data.tokens // cfg.data.context)
    tokens = rows * cfg.data.context
    unit_rows = cfg.store.unit_rows or layout.auto_unit_rows(rows, cfg.data.context)
    chunk = layout.chunk_rows(unit_rows * cfg.data.context)
    sizes, write, read = {}, 0.0, 0.0
    for h in hookpoints:
        raw, stored = 0, 0.0
        for d in widths[h.name]:
            size, w, r = _codec(cfg, chunk, d)
            raw, stored, write, read = raw + 2 * d, stored + size, write + w * tokens, read + r * tokens
        sizes[h.name] = (raw, stored)
    d = max(max(pair) for pair in widths.values())
    return Plan(tokens, flops, _matmul_speed(d, getattr(torch, cfg.model.dtype.value)), sizes, write, read)


def show(cfg: CacheConfig) -> None:
    """Print the plan."""
    plan = make(cfg)
    stored = sum(size for _, size in plan.sizes.values())
    print(f"{cfg.store.path}: {plan.tokens:,} tokens, {len(plan.sizes)} hookpoints, {_bytes(plan.tokens * stored)}")
    for name, (raw, size) in plan.sizes.items():
        print(f"  {name}: {raw:,} bytes a token, about {size:,.0f} as {cfg.store.codec}")
    speed = plan.flops_per_second / 1e12
    print(f"  forward: {plan.flops / 1e9:.3g} GFLOP a token; at {speed:.3g} TFLOP/s at least {_time(plan.forward)}")
    print(f"  encoding and writing {_time(plan.write)}, reading {_time(plan.read)} (the disk not counted)")
    least = plan.break_even
    print(
        "  the model is faster than the store: cache nothing"
        if least is None
        else f"  cheaper than running the model for every coder from {least} coders on"
    )


def _codec(cfg: CacheConfig, chunk: int, d: int) -> tuple[float, float, float]:
    """(stored bytes, seconds to write, seconds to read) of one token of width d."""
    from numcodecs import blosc

    codec, z_ND = CODECS[cfg.store.codec], torch.randn(chunk, d).bfloat16()
    compression = (cfg.store.compression or Compression.zstd).value
    how = {suffix: blosc_of(spec, compression) for suffix, spec in codec.arrays.items()}
    write = read = float("inf")
    for _ in range(3):  # the first warms up
        begun = time.perf_counter()
        coded = codec.encode(z_ND)
        packed = {s: blosc.compress(z.numpy(), *h) if (h := how[s]) else z.numpy().tobytes() for s, z in coded.items()}
        sums(z_ND)
        written = time.perf_counter()
        for suffix in filter(how.get, packed):
            blosc.decompress(packed[suffix], coded[suffix].numpy())
        codec.decode(coded, z_ND)
        write, read = min(write, written - begun), min(read, time.perf_counter() - written)
    size = sum(len(packed[suffix]) for suffix, spec in codec.arrays.items() if not spec.per_unit)
    return size / chunk, write / chunk, read / chunk


def _matmul_speed(d: int, dtype: torch.dtype) -> float:
    """FLOP/s of [4096, d] x [d, 4 d]."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
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

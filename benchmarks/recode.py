"""Activations of a store in another codec, written by the writer that captures use."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipcoder.pipeline.store import writer
from skipcoder.pipeline.store.attrs import read_attrs
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore


def recoded(store: ActivationStore, path: Path, units: int, **identity: str) -> tuple[ActivationStore, float]:
    """The first `units` units of `store` at `path`, with another `codec` or `compression`; seconds that writing took
    (encoding, compression, statistics, checksums, fsync)."""
    own = ("format", "version", "identity_hash", "rows")
    described: Any = {key: value for key, value in store.attrs.items() if key not in own}
    described["identity"] = {**store.attrs["identity"], **identity}
    place, seconds = place_at(path), 0.0
    empty = writer.create(place, described)
    rows = min(units * store.unit_rows, store.rows)
    writer.write_tokens(place, empty, rows, (row for unit in range(units) for row in store.tokens(unit)))
    now = read_attrs(place)
    assert now is not None
    for unit in range(units):
        span = store.unit_range(unit)
        back = torch.from_numpy(np.argsort(store.read("index", *span)))
        pairs = {
            h: (store.activations(h, "input", *span)[back], store.activations(h, "output", *span)[back])
            for h in store.hookpoints
        }
        begun = time.perf_counter()
        writer.write_unit(place, now, unit, pairs, store.tokens(unit))
        seconds += time.perf_counter() - begun
    return ActivationStore.open(path), seconds

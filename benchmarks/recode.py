"""Activations of a store in another codec, written by the writer that captures use."""

import time
from pathlib import Path

import numpy as np
import torch

from skipcoder.pipeline.capture.unit import code, plan
from skipcoder.pipeline.store import writer
from skipcoder.pipeline.store.attrs import VERSION, Attributes, compression_of, identity_hash, read_attrs
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore


def recoded(
    store: ActivationStore,
    path: Path,
    units: int,
    codec: str | None = None,
    compression: str | None = None,
    version: int = VERSION,
) -> tuple[ActivationStore, float]:
    """The first `units` units of `store` at `path`, with another codec, compression or format; seconds that writing
    took (encoding, compression, statistics, checksums, fsync)."""
    attrs: Attributes = {**store.attrs, "version": version, "rows": 0}
    attrs["compression"] = compression or compression_of(store.attrs)
    attrs["identity"] = {**store.attrs["identity"], "codec": codec or store.attrs["identity"]["codec"]}
    attrs["identity_hash"] = identity_hash(attrs["identity"])
    place, seconds = place_at(path), 0.0
    empty = writer.create(place, attrs)
    rows = min(units * store.unit_rows, store.rows)
    writer.write_tokens(place, empty, rows, store.text(rows))
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
        coded = code(now, plan(now, unit, store.tokens(unit), "cpu"), pairs.items()).finished()
        writer.write_unit(place, now, coded)
        seconds += time.perf_counter() - begun
    return ActivationStore.open(path), seconds

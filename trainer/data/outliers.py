"""Tokens that are far longer than others, which `stream.max_norm` leaves out.

Models write a few tokens a hundred or a thousand times as long as all others: attention sinks and what repeats them.
One such token outweighs a batch. How long a token may be is a multiple of the median over the first training units;
where longer ones are is found in one pass over the store, and kept beside it.

Legend: N tokens of a unit.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from skipcoder.errors import UserError
from skipcoder.pipeline.store.attrs import widths_of
from skipcoder.pipeline.store.commit import SIDES, read_statistics
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments, merge_all, pack, unpack
from skipcoder.progress import progress
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.reading import Chunk, read_positions

UNITS = 16
"""Training units that the median is taken over."""


class Outliers(NamedTuple):
    """The tokens of a store that are too long."""

    position: np.ndarray
    """int64, rising: those of all units that the filter would keep otherwise."""
    moments: dict[str, Moments]
    """Of each side, over those of the training units."""


def limited(kept: TokenFilter, max_norm: float, store: ActivationStore, hookpoint: str) -> TokenFilter:
    """Return the filter that also leaves out what is longer than `max_norm` medians of what it keeps."""
    medians = _medians(_Key(store), hookpoint, kept)
    read, written = (None if median is None else max_norm * median for median in medians)
    return in_store(replace(kept, max_norm=max_norm, longest=(read, written)), store, [hookpoint])


def in_store(kept: TokenFilter, store: ActivationStore, hookpoints: Sequence[str]) -> TokenFilter:
    """Return the filter with the places of the long tokens of a store."""
    if kept.longest is None or kept.long is not None:
        return kept
    found = [outliers(kept, store, name).position for name in hookpoints]
    return replace(kept, long=np.unique(np.concatenate(found)))


def moments(store: ActivationStore, hookpoint: str, side: str, kept: TokenFilter) -> Moments:
    """Return the statistics of one side over the training tokens that a filter keeps."""
    if kept.roles is not None or (kept.longest is not None and kept.first_positions != 1):
        return _measured(_Key(store), hookpoint, side, replace(kept, long=None))
    every = store.moments(hookpoint, side, positions=kept.classes)
    return every if kept.longest is None else every.without(outliers(kept, store, hookpoint).moments[side])


def outliers(kept: TokenFilter, store: ActivationStore, hookpoint: str) -> Outliers:
    """Return the tokens of a store that are longer than a filter's `longest`; found once, and kept beside the store."""
    return _found(_Key(store), hookpoint, replace(kept, long=None))


class _Key:
    """A store by its content, for the memory of what was found."""

    def __init__(self, store: ActivationStore) -> None:
        self.store, self.content = store, store.content

    def name(self, hookpoint: str, kept: TokenFilter) -> str:
        """Part of the names of files beside the store, made from all that what they hold depends on."""
        return hashlib.sha256(json.dumps([self.content, hookpoint, kept.facts()]).encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.content == other.content


@lru_cache(maxsize=64)
def _found(key: _Key, hookpoint: str, kept: TokenFilter) -> Outliers:
    store, name = key.store, key.name(hookpoint, kept)
    place, about = f"outliers-{name}.safetensors", f"outlier-moments-{name}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):  # missing or incomplete: sought anew
        return Outliers(load(store.derived.read(place))["position"], unpack(store.derived.read(about)))
    found = _scan(store, hookpoint, kept)
    with suppress(OSError, UserError):  # where a (shared) store cannot be written, each run seeks for itself
        store.derived.write(about, pack(found.moments))
        store.derived.write(place, save({"position": found.position}))
    return found


@lru_cache(maxsize=64)
def _measured(key: _Key, hookpoint: str, side: str, kept: TokenFilter) -> Moments:
    """The statistics of what the units' own, by class of position, do not tell apart: from a pass over the store."""
    store = key.store
    file = f"kept-{side}-{key.name(hookpoint, kept)}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):
        return unpack(store.derived.read(file))["kept"]
    here = in_store(kept, store, [hookpoint])

    def look(unit: int) -> Moments:
        keep = torch.from_numpy(_positions(store, unit, here)[1])
        return Moments.of(store.activations(hookpoint, side, *store.unit_range(unit))[keep].float())

    with ThreadPoolExecutor(store.place.parallel) as threads:
        found = merge_all(threads.map(look, store.split("train")), Moments.empty(store.width(hookpoint, side)))
    with suppress(OSError, UserError):
        store.derived.write(file, pack({"kept": found}))
    return found


def _scan(store: ActivationStore, hookpoint: str, kept: TokenFilter) -> Outliers:
    assert kept.longest is not None
    training, widths = set(store.split("train")), widths_of(store.hookpoints[hookpoint])
    longest = {side: most for side, most in zip(SIDES, kept.longest, strict=True) if most is not None}

    def look(unit: int) -> tuple[np.ndarray, dict[str, Moments]]:
        recorded = read_statistics(store.place, hookpoint, store.commits[unit])
        # No token is longer than one that has each dimension's largest magnitude.
        bounds = {
            side: max(float(np.linalg.norm(recorded[f"{side}/{where}"].absmax)) for where in kept.classes)
            for side in longest
        }
        if all(bounds[side] <= longest[side] for side in longest):
            return np.empty(0, np.int64), {}
        position, keep = _positions(store, unit, kept)
        sides = {side: store.activations(hookpoint, side, *store.unit_range(unit)) for side in widths}
        long = keep & np.any([_lengths(sides[side]) > most for side, most in longest.items()], axis=0)
        rows = torch.from_numpy(long)
        return position[long], {side: Moments.of(z[rows].float()) for side, z in sides.items() if unit in training}

    with ThreadPoolExecutor(store.place.parallel) as threads, progress("long tokens", store.rows * store.context) as on:
        found = []
        for one, unit in zip(threads.map(look, store.units), store.units, strict=True):
            found.append(one)
            begin, end = store.unit_range(unit)
            on(end - begin)
    position = np.sort(np.concatenate([np.empty(0, np.int64), *(position for position, _ in found)]))
    return Outliers(
        position,
        {side: merge_all((of[side] for _, of in found if side in of), Moments.empty(d)) for side, d in widths.items()},
    )


@lru_cache(maxsize=64)
def _medians(key: _Key, hookpoint: str, kept: TokenFilter) -> list[float | None]:
    """Of both sides' lengths, None of one that is not stored; found once, as another processor might give other last
    bits."""
    store = key.store
    file = f"median-lengths-{key.name(hookpoint, kept)}.json"
    with suppress(OSError, ValueError):
        return [None if median is None else float(median) for median in json.loads(store.derived.read(file))]
    units = store.split("train")[:UNITS]
    found: list[float | None] = []
    for side in SIDES:
        if side not in widths_of(store.hookpoints[hookpoint]):
            found.append(None)
            continue
        lengths = [
            _lengths(store.activations(hookpoint, side, *store.unit_range(unit)))[_positions(store, unit, kept)[1]]
            for unit in units
        ]
        found.append(float(np.median(np.concatenate(lengths))))
    with suppress(OSError, UserError):
        store.derived.write(file, json.dumps(found).encode())
    return found


def _positions(store: ActivationStore, unit: int, kept: TokenFilter) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N] a unit's positions, and whether the filter keeps them, long or not."""
    start, stop = store.unit_range(unit)
    position = np.empty(stop - start, np.int64)
    return position, read_positions(store, kept, Chunk(unit, start, stop), position)


def _lengths(z_ND: torch.Tensor) -> np.ndarray:
    lengths: np.ndarray = torch.linalg.vector_norm(z_ND, dim=1, dtype=torch.float32).numpy()
    return lengths

"""Where each latent fires: a run's codes on its whole store, sorted by latent. The language model does not run.

    RUN/latents/identity.json                       which weights, store and filter
    RUN/latents/00000000-00000031-HASH.safetensors  for these units: `starts` [M + 1], `position` and `value` [L]

A part holds some units and is written whole or not at all, so building can be interrupted. HASH covers the units'
checksums: when a store has grown, unchanged parts are kept. Building needs the memory of one part.

Legend: L entries, M latents, N tokens.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from safetensors import safe_open
from safetensors.numpy import save

from skipcoder.errors import UserError
from skipcoder.files import write_atomically
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.progress import progress
from skipcoder.trainer.run.device import on_device
from skipcoder.trainer.run.run import Run

PART_TOKENS = 2**18
BATCH = 4096


class Firing(NamedTuple):
    """Where one latent fires, in the order of the text."""

    position: np.ndarray
    """int64 [n]: row * context + position in the row."""
    value: np.ndarray
    """float32 [n]."""


class LatentIndex:
    """One run's index: `build` writes it, the rest reads it."""

    def __init__(self, run: Run, store: ActivationStore) -> None:
        if not store.is_complete:
            raise UserError(f"{store.place} is not complete; finish its capture first")
        run.check(store)
        self.run, self.store = run, store
        self.folder, self.width = run.path / "latents", run.latents
        self.parts = _parts(store)

    def identity(self) -> dict[str, str]:
        """The weights, store and filter of the index."""
        return {
            "weights": self.run.weights,
            "store": self.store.attrs["identity_hash"],
            "filter": f"TokenFilter({', '.join(f'{k}={v!r}' for k, v in self.run.filter.facts().items())})",
        }

    def missing(self) -> list[list[int]]:
        """Units of each part that is missing or made from other weights or text."""
        try:
            known = json.loads((self.folder / "identity.json").read_text()) == self.identity()
        except (OSError, ValueError):
            known = False
        return [units for units in self.parts if not known or not self._file(units).exists()]

    def build(self, device: str, advance: Callable[[int], object] = lambda tokens: None) -> None:
        """Encode the missing parts; `advance` gets the tokens done."""
        self.folder.mkdir(exist_ok=True)
        self._claim()
        with on_device([self.run.coder], device):
            for units in self.missing():
                entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
                for unit in units:
                    for position, latent, value in self._encode(self.run.coder, unit, device):
                        entries.append((latent, position, value))
                    advance(self.store.unit_range(unit)[1] - self.store.unit_range(unit)[0])
                latent, position, value = (np.concatenate(column) for column in zip(*entries, strict=True))
                order = np.lexsort((position, latent))
                starts = np.searchsorted(latent[order], np.arange(self.width + 1)).astype(np.int64)
                tensors = {"starts": starts, "position": position[order], "value": value[order]}
                write_atomically(self._file(units), save(tensors))
        kept = {self._file(units).name for units in self.parts}
        for file in self.folder.glob("*-*.safetensors"):  # parts from before the store grew
            if file.name not in kept:
                file.unlink()

    def ensure(self, device: str) -> None:
        """Encode the missing parts, with a progress bar."""
        if units := [unit for part in self.missing() for unit in part]:
            total = sum(b - a for a, b in map(self.store.unit_range, units))
            with progress("encoding", total) as advance:
                self.build(device, advance)

    def of(self, latent: int) -> Firing:
        """Everywhere that the latent fires."""
        found = []
        for starts, file in self._open:
            a, b = int(starts[latent]), int(starts[latent + 1])
            found.append((file.get_slice("position")[a:b], file.get_slice("value")[a:b]))
        return Firing(*(np.concatenate(column) for column in zip(*found, strict=True)))

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [M]: tokens on which each latent fires."""
        return sum((np.diff(starts) for starts, _ in self._open), np.zeros(self.width, np.int64))

    def overlap(self, latents: np.ndarray) -> np.ndarray:
        """float [len(latents), M]: tokens on which both fire / tokens on which either does, in the first part."""
        starts, file = self._open[0]
        position = file.get_tensor("position")
        token = np.unique(position, return_inverse=True)[1]
        shape = (int(token.max(initial=-1)) + 1, self.width)
        fires = scipy.sparse.csc_array((np.ones(len(token), np.float32), token, starts), shape=shape)
        both = (fires[:, latents].T @ fires).toarray()  # float32 [len(latents), M]: ask for a few hundred at a time
        counts = np.diff(starts).astype(np.float32)
        result: np.ndarray = both / np.maximum(counts[latents][:, None] + counts[None] - both, 1)
        return result

    @cached_property
    def tokens(self) -> np.ndarray:
        """int32 [rows, context]: the store's text."""
        return np.concatenate([self.store.tokens(unit) for units in self.parts for unit in units])

    @cached_property
    def _open(self) -> list[tuple[np.ndarray, Any]]:
        if self.missing():
            raise UserError(f"{self.folder} is not complete; build it first")
        files = [safe_open(str(self._file(units)), "numpy") for units in self.parts]
        return [(file.get_tensor("starts"), file) for file in files]

    def _claim(self) -> None:
        if len(self.missing()) == len(self.parts):
            for part in self.folder.glob("*-*.safetensors"):  # made from other weights or text
                part.unlink()
        write_atomically(self.folder / "identity.json", json.dumps(self.identity(), indent=2).encode())

    def _file(self, units: list[int]) -> Path:
        content = json.dumps([self.store.commits[unit].shards for unit in units], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        return self.folder / f"{units[0]:08d}-{units[-1]:08d}-{digest}.safetensors"

    @torch.no_grad()
    def _encode(
        self, coder: torch.nn.Module, unit: int, device: str
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield (position, latent, value), a batch of tokens at a time."""
        start, stop = self.store.unit_range(unit)
        flat = self.store.read("index", start, stop).astype(np.int64)
        token = self.store.tokens(unit).ravel()[flat - flat.min() // self.store.context * self.store.context]
        keep = self.run.keeps(self.store, flat, token)
        for a in range(start, stop, BATCH):
            b = min(a + BATCH, stop)
            kept = keep[a - start : b - start]
            x = self.run.rows(self.store, a, b)[torch.from_numpy(kept)]
            out = coder(x.to(device))
            active = (out.values > 0).cpu().numpy()
            position = np.repeat(flat[a - start : b - start][kept], active.sum(1))
            yield position, out.indices.cpu().numpy()[active], out.values.cpu().numpy()[active]


def _parts(store: ActivationStore) -> list[list[int]]:
    """Committed units in groups of about PART_TOKENS."""
    each = max(1, PART_TOKENS // (store.unit_rows * store.context))
    return [store.units[i : i + each] for i in range(0, len(store.units), each)]

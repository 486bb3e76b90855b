"""A process that writes units: what a worker with a GPU copies into memory that both share, it compresses, writes and
commits. The worker's Python has no part in that, so its lock is free for the model.

A worker on a CPU does the same by itself: there the model keeps the cores busy, not Python.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from skipcoder.helpers import Helper, HelperEndedError, SharedArrays
from skipcoder.pipeline.store import commit, layout
from skipcoder.pipeline.store.attrs import Attributes, widths_of
from skipcoder.pipeline.store.codecs import codec_of
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments
from skipcoder.pipeline.store.writer import CodedUnit, classes_of, write_unit

Found = Mapping[Any, np.ndarray]
"""What was found of a unit: its arrays by name; under ("sums", hookpoint, "<side>/<class of positions>") the `sums` of
their tokens, and under ("lost", ...) what the codec lost of them."""


class NonFiniteError(ValueError):
    """An activation is NaN or infinite; the message says where."""


class UnitWriter:
    """A process that writes, and the memory where it finds a unit."""

    def __init__(self, place: Place, attrs: Attributes) -> None:
        self.memory = SharedArrays(_specs(attrs))
        self._setup = place.address, attrs, self.memory.descriptor
        self._helper = self._start()

    def _start(self) -> Helper:
        return Helper(_writing, self._setup, [self.memory.descriptor])

    def write(self, unit: int) -> None:
        """Write and commit a unit that lies in the memory; NonFiniteError if it holds NaN or infinity."""
        self._helper.ask(unit)
        try:
            self._helper.answer()
        except HelperEndedError:  # killed, perhaps for want of memory; the unit still lies there
            self._helper.close()
            self._helper = self._start()
            self._helper.ask(unit)
            self._helper.answer()

    def close(self) -> None:
        """End the process, and let go of the memory."""
        self._helper.close()
        self.memory.close()


def _specs(attrs: Attributes) -> dict[Any, Any]:
    """Shapes and dtypes of `Found` of a full unit."""
    specs: dict[Any, Any] = {
        name: (array.shard, array.spec.dtype)
        for name, array in layout.arrays(attrs).items()
        if name not in ("index", *layout.text_arrays(attrs))
    }
    for name, facts in attrs["hookpoints"].items():
        for side, d in widths_of(facts).items():
            for where in commit.POSITIONS:
                specs["sums", name, f"{side}/{where}"] = ((4 * d + 1,), np.float64)
                specs["lost", name, f"{side}/{where}"] = ((), np.float64)
    return specs


def _writing(setup: tuple[str, Attributes, int]) -> Callable[[int], None]:
    """What the process does."""
    address, attrs, descriptor = setup
    place = place_at(address)
    store = ActivationStore(place, attrs)
    memory = SharedArrays(_specs(attrs), descriptor)

    def write(unit: int) -> None:
        tokens = store.tokens(unit)
        found = {
            key: rows if isinstance(key, tuple) or len(rows) == 1 else rows[: tokens.size]
            for key, rows in memory.arrays.items()
        }
        write_unit(place, attrs, coded_unit(attrs, unit, tokens, found))

    return write


def coded_unit(attrs: Attributes, unit: int, tokens: np.ndarray, found: Found) -> CodedUnit:
    """Bring a unit into the form in which it is written. NonFiniteError if the model gave NaN or infinity."""
    identity = attrs["identity"]
    first = layout.unit_token_rows(unit, attrs["rows"], identity["unit_rows"]).start
    order = layout.permutation(identity["seed"], unit, tokens.size)
    position = first * identity["context"] + order
    counts = {where: int(c.sum()) for where, c in classes_of(attrs, position, tokens.ravel()[order]).items()}
    arrays = {"index": position.astype(np.uint64)} | {k: rows for k, rows in found.items() if isinstance(k, str)}
    moments: dict[str, dict[str, Moments]] = {}
    for name, facts in attrs["hookpoints"].items():
        for key in (f"{side}/{where}" for side in widths_of(facts) for where in commit.POSITIONS):
            count = counts[key.split("/")[1]]
            m = Moments.of_sums(count, found["sums", name, key], float(found["lost", name, key]))
            moments.setdefault(name, {})[key] = m
            if not np.isfinite([m.norms, m.error]).all():
                _refuse(f"{name}/{key.split('/')[0]}", attrs, found, position)
    return CodedUnit(unit, tokens, arrays, moments)


def _refuse(array: str, attrs: Attributes, found: Found, position_N: np.ndarray) -> None:
    import torch

    codec = codec_of(attrs["identity"]["codec"], attrs["version"])
    coded = {suffix: torch.from_numpy(found[array + suffix]) for suffix in codec.arrays}
    z_ND = torch.empty(coded[""].shape, dtype=torch.bfloat16)
    codec.decode(coded, z_ND)
    bad = np.sort(position_N[(~torch.isfinite(z_ND)).any(dim=1).numpy()])
    row, position = divmod(int(bad[0]), attrs["identity"]["context"])
    raise NonFiniteError(
        f"{array}: activation at row {row}, position {position} is NaN or infinite "
        f"({len(bad)} such tokens in this unit); nothing of the unit was stored. "
        f"Try model.dtype=float32 or bfloat16, or leave this text out"
    )

"""The activation store, for readers: open it, see what is in it, read units and chunks.

On disk (Zarr v3 group): `tokens` [rows, context], `index` [n], `<hookpoint>/input` and `/output` [n, d] with what their
codec adds (`codecs/`), `commits/` and `statistics/`. A unit is a range of token rows and one shard of every array; it
exists only if it has a commit record. Only reading activations as tensors needs torch.
"""

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skipcoder.errors import UserError
from skipcoder.pipeline.model import load
from skipcoder.pipeline.store import commit, layout
from skipcoder.pipeline.store.attrs import Attributes, HookpointFacts, extent, model_config, read_attrs, widths_of
from skipcoder.pipeline.store.codecs import codec_of
from skipcoder.pipeline.store.place import Directory, Place
from skipcoder.pipeline.store.places import beside, place_at
from skipcoder.pipeline.store.shards import ShardReader
from skipcoder.pipeline.store.stats import Moments
from skipcoder.pipeline.text.rows import PIECE, documents_by_ends

if TYPE_CHECKING:
    from torch import Tensor


KEPT_UNIT_ROWS = 4096
"""Rows of arrays with one for each unit that are kept in memory."""


class ActivationStore:
    """A store of one model's MLP inputs and outputs over one token set; use `ActivationStore.open`."""

    def __init__(self, place: Place, attrs: Attributes) -> None:
        self.place = place
        self.attrs = attrs
        self._arrays: dict[str, Any] = {}
        self._layouts = layout.arrays(attrs)
        self._readers: dict[str, ShardReader] = {}
        self.codec = codec_of(attrs["identity"]["codec"], attrs["version"])
        self._held = threading.local()
        self._unit_rows: dict[tuple[str, int], np.ndarray] = {}

    @classmethod
    def open(cls, path: str | Path | Place) -> "ActivationStore":
        """Open a store (a directory or `s3://...`) for reading. UserError where there is none or it is damaged."""
        place = place_at(path)
        attrs = read_attrs(place)
        if attrs is None:
            raise UserError(
                f"no activation store at {place}; make one with: python pipeline/cache.py store.path={place}"
            )
        store = cls(place, attrs)
        if not store.units:
            raise UserError(f"{place} holds no finished unit yet; run pipeline/cache.py on it again")
        sizes = place.sizes()
        for record in store.commits.values():
            for name, facts in record.shards.items():
                found = sizes.get(name, "no such file")
                if found != facts["bytes"]:
                    mend = store._remedy(name.split("/")[0], record.unit)
                    raise UserError(f"{place}/{name}: expected {facts['bytes']} bytes, found {found}; {mend}")
        return store

    @property
    def path(self) -> Path:
        """Path of a store that is a directory."""
        assert isinstance(self.place, Directory)
        return self.place.path

    def __repr__(self) -> str:
        sites = ", ".join(f"{name} ({extent(facts)})" for name, facts in self.hookpoints.items())
        state = "" if self.is_complete else f", {len(self.units)} units so far"
        return (
            f"<ActivationStore {self.place}: {self.attrs['model']['name']}, {self.rows * self.context:,} tokens in "
            f"rows of {self.context}{state}; {sites}>"
        )

    # ---- what it is -------------------------------------------------------------------------------

    @property
    def context(self) -> int:
        """Tokens in a row."""
        return int(self.attrs["identity"]["context"])

    @property
    def rows(self) -> int:
        """Token rows of the finished store."""
        return int(self.attrs["rows"])

    @property
    def unit_rows(self) -> int:
        """Token rows in a full unit."""
        return int(self.attrs["identity"]["unit_rows"])

    @property
    def hookpoints(self) -> dict[str, HookpointFacts]:
        """{name: facts}."""
        return self.attrs["hookpoints"]

    @cached_property
    def commits(self) -> dict[int, commit.Commit]:
        """Record of every finished unit, in unit order."""
        records = commit.read_all(self.place, self.derived, self.attrs["identity_hash"])
        for unit, record in records.items():
            if record.identity != self.attrs["identity_hash"]:
                raise UserError(
                    f"{self.place}/{commit.record_file(unit)} belongs to another store (identity {record.identity})"
                )
            commit.refuse_other_rows(self.place, record, self.rows_of(unit))
        return records

    @property
    def units(self) -> list[int]:
        """Finished units."""
        return list(self.commits)

    @property
    def is_complete(self) -> bool:
        """Whether every unit is finished."""
        return len(self.commits) == layout.num_units(self.rows, self.unit_rows)

    @property
    def split_scheme(self) -> str | None:
        """How documents and splits go together; None in stores of before, where documents cross."""
        return self.attrs["identity"].get("split_scheme")

    def split(self, name: str) -> list[int]:
        """Finished units of the `train`, `validation` or `test` split."""
        units = layout.num_units(self.rows, self.unit_rows)
        of = layout.split(units, self.split_scheme)
        if not of["test"]:
            raise UserError(f"{self.place} has {units} {layout.TOO_FEW}")
        return [unit for unit in of[name] if unit in self.commits]

    def hookpoint(self, name: str | None) -> str:
        """`name` if the store has it; for None the only hookpoint; else UserError listing them all."""
        if name is not None and name in self.hookpoints:
            return name
        if name is None and len(self.hookpoints) == 1:
            return next(iter(self.hookpoints))
        fault = "hookpoint is not set" if name is None else f"no hookpoint {name!r}"
        raise UserError(f"{fault}: {self.place} holds {', '.join(self.hookpoints)}; choose one with hookpoint=NAME")

    def width(self, hookpoint: str, side: str) -> int:
        """Dimensions of the `input` or `output` of a hookpoint."""
        widths = widths_of(self.hookpoints[self.hookpoint(hookpoint)])
        if side not in widths:
            raise UserError(f"side {side!r} of {hookpoint}: {self.place} has only its {' and '.join(widths)}")
        return widths[side]

    def moments(
        self, hookpoint: str, side: str, split: str | None = "train", positions: tuple[str, ...] = ("other",)
    ) -> Moments:
        """Merged statistics of one side over a split (None: over all units), for these classes of `positions` (see
        commit.POSITIONS). Merged once; the result is kept beside the store."""
        units = self.units if split is None else self.split(split)
        records = [self.commits[unit] for unit in units]
        names = [f"{side}/{where}" for where in positions]
        empty = Moments.empty(self.width(hookpoint, side))
        return commit.merged_statistics(self.place, self.derived, self.content, hookpoint, records, names, empty)

    @cached_property
    def content(self) -> str:
        """Hash of the checksums of all files; it differs if any byte does."""
        facts = json.dumps({unit: record.shards for unit, record in self.commits.items()}, sort_keys=True)
        return hashlib.sha256(facts.encode()).hexdigest()[:32]

    @property
    def derived(self) -> Place:
        """Place beside the store for what can be recomputed from it (`NAME.derived/`)."""
        return beside(self.place)

    def load_model(self, device: str = "cpu") -> Any:
        """The captured language model, with its head. UserError if it has changed."""
        then = self.attrs["identity"]["model"]
        return load.load_captured(model_config(self.attrs), then, str(self.place), device)

    def load_tokenizer(self) -> Any:
        """That model's tokenizer."""
        return load.load_tokenizer(model_config(self.attrs))

    # ---- what is in it ----------------------------------------------------------------------------

    @cached_property
    def _group(self) -> Any:
        import zarr

        return zarr.open_group(self.place.zarr(), mode="r")

    def array(self, name: str) -> Any:
        """The Zarr array `tokens`, `index` or `<hookpoint>/<side>`, opened once."""
        if name not in self._arrays:
            self._arrays[name] = self._group[name]
        return self._arrays[name]

    @property
    def chunk_rows(self) -> int:
        """Stored tokens per compressed chunk."""
        return self._layouts["index"].chunk[0]

    def rows_of(self, unit: int) -> tuple[int, int]:
        """Token rows [start, stop) of a unit."""
        rows = layout.unit_token_rows(unit, self.rows, self.unit_rows)
        return rows.start, rows.stop

    def unit_range(self, unit: int) -> tuple[int, int]:
        """Stored tokens [start, stop) of a unit, in every array but those of the text."""
        start, stop = self.rows_of(unit)
        return start * self.context, stop * self.context

    def tokens(self, unit: int) -> np.ndarray:
        """Token ids int32 [rows of the unit, context]."""
        return self.read("tokens", *self.rows_of(unit))

    def text(self, rows: int) -> Iterator[np.ndarray]:
        """The first `rows` token rows [context] of PIECE (text/rows.py)."""
        for unit in range(layout.num_units(rows, self.unit_rows)):
            start, stop = self.rows_of(unit)
            pieces = np.zeros((stop - start, self.context), PIECE)
            for name in layout.text_arrays(self.attrs):
                pieces[name] = self.read(name, start, stop)
            yield from pieces[: rows - start]

    def documents(self, unit: int) -> np.ndarray:
        """The document of each position, uint64 [rows of the unit, context]: the hash of its text. A store of before
        has none; there, the special tokens inside rows are counted, from the start of each unit."""
        if self.split_scheme is not None:
            return self.read("document", *self.rows_of(unit))
        return documents_by_ends(self.tokens(unit), self.attrs["special_tokens"], self.attrs["bos"], unit)

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [start, stop) of an array as stored, in `out` if that is given. UserError names a damaged chunk."""
        if name not in self._readers:
            self._readers[name] = ShardReader(self.place, name, self._layouts[name])
        try:
            return self._readers[name].read(start, stop, out)
        except UserError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            unit = self._unit_of(name, start)
            raise UserError(
                f"{self.place}/{name}: rows {start}-{stop} (unit {unit}) cannot be decoded ({error}); "
                f"{self._remedy(name, unit)}"
            ) from error

    def _unit_of(self, array: str, row: int) -> int:
        if self._layouts[array].spec.per_unit:
            return row
        return row // (self.unit_rows * (1 if array in layout.text_arrays(self.attrs) else self.context))

    def _remedy(self, array: str, unit: int) -> str:
        """How to mend a damaged shard: a re-run rewrites activations, but never the text."""
        if array in layout.text_arrays(self.attrs):
            return "delete the store and capture anew"
        return f"delete {self.place}/{commit.record_file(unit)} and re-run the capture to mend it"

    def activations(self, hookpoint: str, side: str, start: int, stop: int, out: "Tensor | None" = None) -> "Tensor":
        """Stored tokens [start, stop) of one side: a bfloat16 tensor [stop - start, d], `out` if that is given."""
        import torch

        d = self.width(hookpoint, side)
        if not 0 <= start <= stop <= self.rows * self.context:
            raise UserError(f"tokens [{start}, {stop}): {self.place} holds {self.rows * self.context:,} tokens")
        if out is None:
            out = torch.empty(stop - start, d, dtype=torch.bfloat16)
        # A thread uses its memory again and again: the first touch of fresh memory costs as much as reading.
        held: dict[Any, dict[str, np.ndarray]] = self._held.__dict__
        if d not in held or len(held[d][""]) < min(stop - start, self.chunk_rows):
            shapes = self.code_shapes(hookpoint, side, min(stop - start, self.chunk_rows))
            held[d] = {suffix: np.empty(shape, dtype) for suffix, (shape, dtype) in shapes.items()}
        at, unit_tokens = start, self.unit_rows * self.context
        while at < stop:
            end = min(stop, (at // unit_tokens + 1) * unit_tokens, at + len(held[d][""]))
            codes = self.codes(hookpoint, side, at, end, held[d])
            coded = {suffix: torch.from_numpy(z) for suffix, z in codes.items()}
            self.codec.decode(coded, out[at - start : end - start])
            at = end
        return out

    def code_shapes(self, hookpoint: str, side: str, rows: int) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each array of codes, by suffix, of so many tokens of one side."""
        return {
            suffix: (
                (1 if spec.per_unit else rows, *self._layouts[f"{hookpoint}/{side}{suffix}"].chunk[1:]),
                spec.dtype,
            )
            for suffix, spec in self.codec.arrays.items()
        }

    def codes(
        self, hookpoint: str, side: str, start: int, stop: int, out: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Read the codes of stored tokens [start, stop) of one unit into arrays of at least their `code_shapes`; return
        the parts that hold them."""
        filled, unit = {}, start // (self.unit_rows * self.context)
        for suffix, spec in self.codec.arrays.items():
            name = f"{hookpoint}/{side}{suffix}"
            filled[suffix] = out[suffix][: 1 if spec.per_unit else stop - start]
            if spec.per_unit:
                filled[suffix][:] = self._of_unit(name, unit)
            else:
                self.read(name, start, stop, filled[suffix])
        return filled

    def _of_unit(self, name: str, unit: int) -> np.ndarray:
        """A unit's row of an array that has one for each; the latest are kept."""
        row = self._unit_rows.get((name, unit))
        if row is None:
            if len(self._unit_rows) >= KEPT_UNIT_ROWS:
                self._unit_rows.clear()
            row = self._unit_rows[name, unit] = self.read(name, unit, unit + 1)
        return row

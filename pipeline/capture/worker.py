"""One capture worker: holds the model, turns units of token rows into committed units of the store."""

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipcoder.files import DISK_FULL
from skipcoder.pipeline.config import ModelConfig
from skipcoder.pipeline.model.hookpoints import Hookpoint
from skipcoder.pipeline.model.hooks import capture
from skipcoder.pipeline.model.load import load_trunk
from skipcoder.pipeline.store import commit, layout, writer
from skipcoder.pipeline.store.attrs import Attributes, read_attrs
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore


class NonFiniteError(ValueError):
    """An activation is NaN or infinite; the message says where."""


class Worker:
    """A Ray Data actor: batches of unit numbers in, one row of facts per unit out.

    With `ray.overlap` Ray makes two calls at once: while one encodes and writes, the other runs the model. Memory
    besides the model's: for each call the unit in bfloat16, and what encoding takes for one side, 12 bytes a number.
    """

    def __init__(self, store: str, model: ModelConfig, threads: int, device: str) -> None:
        torch.set_num_threads(threads)  # Ray sets OMP_NUM_THREADS itself, rounded down
        place = place_at(store)
        attrs = read_attrs(place)
        assert attrs is not None
        self.store = ActivationStore(place, attrs)
        self.hookpoints = hookpoints_of(attrs)
        self.device = device
        self._forward = threading.Lock()
        self.model = load_trunk(model, self.hookpoints, device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Commit each unit before returning: a unit that Ray counts as done is on the disk."""
        units = [int(unit) for unit in batch["item"]]
        # Errors are returned as text: Ray would report an exception as a worker's failure, with a traceback.
        errors = []
        for unit in units:
            try:
                capture_unit(self.model, self.store, self.hookpoints, unit, self.device, self._forward)
                errors.append("")
            except NonFiniteError as error:
                errors.append(str(error))
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                errors.append(f"no space left on the disk while writing unit {unit} of {self.store.place}")
        return {"unit": units, "error": errors}


def hookpoints_of(attrs: Attributes) -> list[Hookpoint]:
    """The store's hookpoints in the form that `capture` takes."""
    return [Hookpoint(name, facts["read"], facts["write"]) for name, facts in attrs["hookpoints"].items()]


def capture_unit(
    model: torch.nn.Module,
    store: ActivationStore,
    hookpoints: list[Hookpoint],
    unit: int,
    device: str,
    alone: AbstractContextManager[Any] | None = None,
) -> None:
    """Run the model over a unit's rows (holding `alone`), then write and commit the unit; skip it if committed."""
    if store.place.exists(commit.record_file(unit)):
        commit.refuse_other_rows(store.place, commit.read(store.place, unit), store.rows_of(unit))
        return
    tokens = store.tokens(unit)
    rows = micro_batch_rows(store.attrs["identity"]["micro_batch_tokens"], store.context)
    sides: dict[str, list[list[Tensor]]] = {h.name: [[], []] for h in hookpoints}
    with alone or nullcontext():
        for i in range(0, len(tokens), rows):
            part = capture(model, hookpoints, torch.from_numpy(tokens[i : i + rows]).long().to(device))
            for name, pair in part.items():
                for taken, z in zip(sides[name], pair, strict=True):
                    taken.append(z.cpu())  # now, so that a GPU holds one micro-batch, not the unit
    first_row = layout.unit_token_rows(unit, store.rows, store.unit_rows).start
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in list(sides):
        x, y = (torch.cat(parts) for parts in sides.pop(name))
        for side, z in zip(commit.SIDES, (x, y), strict=True):
            _check_finite(z, f"{name}/{side}", first_row, store.context)
        pairs[name] = (x, y)
    writer.write_unit(store.place, store.attrs, unit, pairs, tokens)


def micro_batch_rows(micro_batch_tokens: int, context: int) -> int:
    """Rows in one forward pass. They follow from the store's identity alone, as bits may depend on them."""
    return max(1, micro_batch_tokens // context)


def _check_finite(z_ND: Tensor, name: str, first_row: int, context: int) -> None:
    # A sum is finite unless an element is not (or the sum overflows): cheaper than testing each.
    if torch.isfinite(z_ND.sum(dtype=torch.float64)):
        return
    bad = (~torch.isfinite(z_ND)).any(dim=1).nonzero()
    if len(bad):
        row, position = divmod(int(bad[0]), context)
        raise NonFiniteError(
            f"{name}: activation at row {first_row + row}, position {position} is NaN or infinite "
            f"({len(bad)} such tokens in this unit); nothing of the unit was stored. "
            f"Try model.dtype=float32 or bfloat16, or leave this text out"
        )

"""One capture worker: holds the model, turns units of token rows into committed units of the store."""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipcoder.files import DISK_FULL
from skipcoder.pipeline.capture.unit import code, plan
from skipcoder.pipeline.capture.writers import NonFiniteError, UnitWriter
from skipcoder.pipeline.config import ModelConfig
from skipcoder.pipeline.model.hookpoints import Hookpoint
from skipcoder.pipeline.model.hooks import capture, refuse_if_documents_meet
from skipcoder.pipeline.model.load import load_trunk
from skipcoder.pipeline.store import commit, writer
from skipcoder.pipeline.store.attrs import Attributes, read_attrs, widths_of
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.text.rows import places


class Worker:
    """A Ray Data actor: batches of unit numbers in, one row of facts per unit out.

    Ray makes several calls at once (`ray.writers`): while some compress and write, another runs the model. Each call
    takes memory for its unit in bfloat16, on a GPU pinned, and there has a process that writes.
    """

    def __init__(self, store: str, model: ModelConfig, threads: int, device: str) -> None:
        begun = time.perf_counter()
        torch.set_num_threads(threads)  # Ray sets OMP_NUM_THREADS itself, rounded down
        place = place_at(store)
        attrs = read_attrs(place)
        assert attrs is not None
        self.store = ActivationStore(place, attrs)
        self.hookpoints = hookpoints_of(attrs)
        self.device = device
        self._forward = threading.Lock()
        self._idle: queue.LifoQueue[UnitWriter] = queue.LifoQueue()
        self.model = load_trunk(model, self.hookpoints, device)
        if attrs["identity"]["data"].get("separate"):
            refuse_if_documents_meet(self.model, self.hookpoints, device)
        self.loading = time.perf_counter() - begun

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Commit each unit before returning: a unit that Ray counts as done is on the disk."""
        units, begun = [int(unit) for unit in batch["item"]], time.perf_counter()
        # Errors are returned as text: Ray would report an exception as a worker's failure, with a traceback.
        errors = []
        for unit in units:
            try:
                with self._writer() as apart:
                    capture_unit(self.model, self.store, self.hookpoints, unit, self.device, self._forward, apart)
                errors.append("")
            except NonFiniteError as error:
                errors.append(str(error))
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                errors.append(f"no space left on the disk while writing unit {unit} of {self.store.place}")
        times = {"loading": self.loading, "seconds": time.perf_counter() - begun}
        return {"unit": units, "error": errors, **{name: [value] * len(units) for name, value in times.items()}}

    @contextmanager
    def _writer(self) -> Iterator[UnitWriter | None]:
        """A writer that has nothing to do, if need be a new one; None on a CPU."""
        if self.device == "cpu":
            yield None
            return
        try:
            writer = self._idle.get_nowait()
        except queue.Empty:
            writer = UnitWriter(self.store.place, self.store.attrs)
            writer.memory.pin()
        try:
            yield writer
        except (NonFiniteError, OSError):
            self._idle.put(writer)
            raise
        except BaseException:  # it may be at work still
            writer.close()
            raise
        self._idle.put(writer)


def hookpoints_of(attrs: Attributes) -> list[Hookpoint]:
    """The store's hookpoints in the form that `capture` takes."""
    return [
        Hookpoint(name, facts["read"], facts["write"], tuple(widths_of(facts)))
        for name, facts in attrs["hookpoints"].items()
    ]


def capture_unit(
    model: torch.nn.Module,
    store: ActivationStore,
    hookpoints: list[Hookpoint],
    unit: int,
    device: str,
    alone: AbstractContextManager[Any] | None = None,
    apart: UnitWriter | None = None,
) -> None:
    """Run the model over a unit's rows and encode them (holding `alone`), then write and commit the unit, or have it
    written `apart`; skip it if it is committed."""
    if store.place.exists(commit.record_file(unit)):
        commit.refuse_other_rows(store.place, commit.read(store.place, unit), store.rows_of(unit))
        return
    tokens = store.tokens(unit)
    rows = micro_batch_rows(store.attrs["identity"]["micro_batch_tokens"], store.context)
    sides: dict[str, list[list[Tensor]]] = {h.name: [[] for _ in h.sides] for h in hookpoints}
    ahead, held = plan(store.attrs, unit, tokens, device), _where_to_hold(store, device)
    ids = torch.from_numpy(tokens).long().to(device)
    positions = None
    if store.attrs["identity"]["data"].get("separate"):
        positions = torch.from_numpy(places(store.read("document_number", *store.rows_of(unit)))).to(device)
    with alone or nullcontext():
        for i in range(0, len(tokens), rows):
            where = None if positions is None else positions[i : i + rows]
            part = capture(model, hookpoints, ids[i : i + rows], where)
            for name, of_it in part.items():
                for taken, z in zip(sides[name], of_it, strict=True):
                    taken.append(z.to(held))
        whole = ((name, _joined(sides.pop(name), device)) for name in list(sides))
        coding = code(store.attrs, ahead, whole, None if apart is None else apart.memory.arrays)
    if apart is None:
        writer.write_unit(store.place, store.attrs, coding.finished())
    else:
        coding.wait()
        apart.write(unit)


def _joined(sides: list[list[Tensor]], device: str) -> list[Tensor]:
    return [torch.cat(parts).to(device) for parts in sides]


def _where_to_hold(store: ActivationStore, device: str) -> str:
    """Where a unit's activations are kept while the model runs over it: on its device, unless they would take more than
    a quarter of it, as those of all layers of a large model."""
    unit_tokens = store.unit_rows * store.context
    size = sum(2 * sum(widths_of(facts).values()) for facts in store.hookpoints.values()) * unit_tokens
    return device if device == "cpu" or size < torch.cuda.mem_get_info(device)[1] / 4 else "cpu"


def micro_batch_rows(micro_batch_tokens: int, context: int) -> int:
    """Rows in one forward pass. They follow from the store's identity alone, as bits may depend on them."""
    return max(1, micro_batch_tokens // context)

"""Units that are written by a process of their own, as those of a worker with a GPU are."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from skipcoder.pipeline.capture import worker
from skipcoder.pipeline.capture.writers import NonFiniteError, UnitWriter
from skipcoder.pipeline.config import CacheConfig
from skipcoder.pipeline.model.hookpoints import Hookpoint
from skipcoder.pipeline.store import commit
from skipcoder.pipeline.store.reader import ActivationStore
from tests.conftest import D_MODEL


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_a_process_writes_the_same_bytes(
    codec: str,
    cache_config: Callable[..., CacheConfig],
    capture_here: Callable[[CacheConfig], ActivationStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of full units and a short one, in memory that is used again."""
    here = capture_here(cache_config(tmp_path / "here.zarr", ("layers.*.mlp",), rows=71, codec=codec))
    started: list[UnitWriter] = []

    @contextmanager
    def apart(self: worker.Worker) -> Iterator[UnitWriter]:
        if not started:
            started.append(UnitWriter(self.store.place, self.store.attrs))
        yield started[0]

    monkeypatch.setattr(worker.Worker, "_writer", apart)
    there = capture_here(cache_config(tmp_path / "there.zarr", ("layers.*.mlp",), rows=71, codec=codec))
    started[0].close()
    assert files(there.path) == files(here.path)


def test_what_a_process_refuses_is_refused_as_here(
    cache_config: Callable[..., CacheConfig],
    capture_here: Callable[[CacheConfig], ActivationStore],
    tmp_path: Path,
) -> None:
    store = capture_here(cache_config(tmp_path / "s.zarr"))
    for unit in (2, 3):
        commit.withdraw(store.place, unit)

    class Model(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.mlp, self.value = torch.nn.Identity(), value

        def forward(self, tokens: torch.Tensor, use_cache: bool) -> torch.Tensor:
            z = torch.ones(*tokens.shape, D_MODEL)
            z[1, 5, 3] = self.value
            return self.mlp(z)

    hookpoints, apart = [Hookpoint("layers.1.mlp", "mlp", "mlp")], UnitWriter(store.place, store.attrs)
    with pytest.raises(NonFiniteError, match=r"layers.1.mlp/input: activation at row 9, position 5"):
        worker.capture_unit(Model(float("nan")), store, hookpoints, 2, "cpu", apart=apart)
    worker.capture_unit(Model(2.0), store, hookpoints, 3, "cpu", apart=apart)
    commit.withdraw(store.place, 3)
    apart._helper._process.kill()  # as the system does for want of memory: another writes what lies in the memory
    worker.capture_unit(Model(2.0), store, hookpoints, 3, "cpu", apart=apart)
    apart.close()
    assert commit.committed_units(store.place) == {*store.units} - {2}

"""Making a store, growing it and mending it; what is refused leaves it as it was."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from skipcoder.errors import UserError
from skipcoder.pipeline import cache
from skipcoder.pipeline.capture import worker
from skipcoder.pipeline.capture.unit import code, plan
from skipcoder.pipeline.capture.writers import NonFiniteError
from skipcoder.pipeline.config import Compression
from skipcoder.pipeline.model.hookpoints import Hookpoint
from skipcoder.pipeline.store import commit, layout, writer
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.text import sources
from tests.conftest import D_MODEL, UNIT_ROWS, UNITS

pytestmark = pytest.mark.slow


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_recapturing_lost_units_gives_the_same_bytes(
    copy: Path, cache_config: Any, capture_here: Any, store: ActivationStore
) -> None:
    whole = files(copy)
    for unit in (0, 5, 32):
        commit.withdraw(place_at(copy), unit)
        (copy / f"layers.1.mlp/output/c/{unit}/0").unlink()
    (copy / "layers.2.mlp/output/c/5/0").write_bytes(b"torn")
    capture_here(cache_config(copy, ("layers.*.mlp",)))
    assert files(copy) == whole


def test_growing_equals_capturing_at_once(tmp_path: Path, cache_config: Any, capture_here: Any) -> None:
    """The last unit was short (70 = 17 * 4 + 2 rows): it is withdrawn and written anew."""
    for rows in (70, 100):
        capture_here(cache_config(tmp_path / "grown.zarr", rows=rows))
    capture_here(cache_config(tmp_path / "whole.zarr", rows=100))
    assert files(tmp_path / "grown.zarr") == files(tmp_path / "whole.zarr")


def test_a_path_that_is_no_store_is_left_alone(tmp_path: Path, cache_config: Any) -> None:
    (tmp_path / "home").mkdir()
    for name in ("film.partial", ".x.1-1.partial"):
        (tmp_path / "home" / name).write_text("mine")
    with pytest.raises(UserError, match="is not an activation store"):
        cache.capture(cache_config(tmp_path / "home"))
    assert len(list((tmp_path / "home").iterdir())) == 2


@pytest.mark.parametrize("other", [{"unit_rows": 2}, {"compression": Compression.lz4}])
def test_an_unfinished_layout_makes_room_for_another_capture(
    other: dict[str, Any], tmp_path: Path, cache_config: Any, capture_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while tokenising; then a mistake; then the right command."""

    class KilledError(Exception):
        pass

    def kill(*_: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(cache, "rows_of", kill)
        capture_here(cache_config(tmp_path / "s.zarr", **other))
    with pytest.raises(UserError, match="matches no module"):
        capture_here(cache_config(tmp_path / "s.zarr", ("no.such",)))
    capture_here(cache_config(tmp_path / "s.zarr", compression=Compression.zstd))
    (tmp_path / "fresh").mkdir()
    capture_here(cache_config(tmp_path / "fresh" / "s.zarr"))
    assert files(tmp_path / "s.zarr") == files(tmp_path / "fresh" / "s.zarr")


def test_a_record_of_a_shorter_capture_does_not_count(tmp_path: Path, cache_config: Any, capture_here: Any) -> None:
    """As its worker might have made it while the store grew."""
    short = capture_here(cache_config(tmp_path / "s.zarr", rows=70)).commits[17]
    store = capture_here(cache_config(tmp_path / "s.zarr", rows=100))
    commit.withdraw(store.place, 17)
    commit.write(store.place, short)
    for task in (
        lambda: ActivationStore.open(tmp_path / "s.zarr"),
        lambda: worker.capture_unit(torch.nn.Identity(), store, [], 17, "cpu"),
    ):
        with pytest.raises(UserError, match=r"00000017.json is of rows \(68, 70\), not \(68, 72\).*delete it"):
            task()


def test_a_worker_of_a_shorter_capture_commits_nothing(tmp_path: Path, cache_config: Any, capture_here: Any) -> None:
    short = capture_here(cache_config(tmp_path / "s.zarr", rows=70))
    pairs = [("layers.1.mlp", (torch.zeros(32, D_MODEL), torch.zeros(32, D_MODEL)))]
    coded = code(short.attrs, plan(short.attrs, 17, short.tokens(17), "cpu"), pairs).finished()
    store = capture_here(cache_config(tmp_path / "s.zarr", rows=100))
    commit.withdraw(store.place, 17)
    with pytest.raises(UserError, match="has grown while it was captured"):
        writer.write_unit(store.place, short.attrs, coded)
    assert 17 not in commit.committed_units(store.place)


@pytest.mark.parametrize(
    "other", [None, "context", "repeat", "model", "units", "by unit", "part", "rows", "broken", "unreadable"]
)
def test_token_rows_of_a_neighbour_are_taken_if_they_are_the_same(
    tmp_path: Path, cache_config: Any, capture_here: Any, other: str | None, capsys: Any
) -> None:
    """Other layers, the same text; and what keeps rows from being the same, or from being read."""
    first = cache_config(tmp_path / "first.zarr", ("layers.0.mlp",), rows=20 if other == "rows" else 40)
    store = capture_here(first)
    metadata = json.loads((store.path / "zarr.json").read_text())
    identity = metadata["attributes"]["identity"]
    changed = {"context": {"context": 8}, "repeat": {"repeat": True}, "model": {"model": {"fingerprint": "x"}}}
    identity |= (changed | {"units": {"unit_rows": 2}, "part": {"held_out_rows": 9}}).get(other or "", {})
    if other == "by unit":  # a store of before, whose documents cross splits
        del identity["split_scheme"], identity["held_out_rows"]
    (store.path / "zarr.json").write_text("[]" if other == "broken" else json.dumps(metadata))
    if other == "unreadable":
        (tmp_path / "loop.zarr").symlink_to(tmp_path / "loop.zarr")
    second = capture_here(cache_config(tmp_path / "second.zarr", rows=40))
    said = capsys.readouterr().out
    assert ("taking the token rows of" in said) == (other in (None, "unreadable"))
    (tmp_path / "alone").mkdir()
    alone = capture_here(cache_config(tmp_path / "alone" / "s.zarr", rows=40))
    assert files(second.path) == files(alone.path)


@pytest.mark.parametrize(("rows", "taken"), [(40, 2), (20, 1)])
def test_units_are_a_neighbours_where_that_leaves_enough(
    rows: int, taken: int, tmp_path: Path, cache_config: Any, capture_here: Any
) -> None:
    """So that its rows can be taken and row i is the same token in both."""
    capture_here(cache_config(tmp_path / "first.zarr", ("layers.0.mlp",), rows=40, unit_rows=2))
    assert capture_here(cache_config(tmp_path / "second.zarr", rows=rows, unit_rows=None)).unit_rows == taken


def test_finished_store_is_left_alone(store: ActivationStore, cache_config: Any, capsys: Any) -> None:
    before = files(store.path)
    cache.capture(cache_config(store.path, ("layers.*.mlp",)))
    assert "complete, nothing to do" in capsys.readouterr().out
    assert files(store.path) == before


@pytest.mark.cli
def test_finding_nothing_to_do_loads_nothing_heavy(store: ActivationStore, cache_config: Any) -> None:
    """It takes a second then, whatever the model."""
    cfg = OmegaConf.to_container(OmegaConf.structured(cache_config(store.path, ("layers.*.mlp",))), enum_to_str=True)
    script = f"""
import sys
from omegaconf import OmegaConf
from skipcoder.pipeline import cache
from skipcoder.settings import typed

cfg = OmegaConf.create({cfg})
cache.capture(typed(cfg, cache.CacheConfig))
print(sorted({{"torch", "transformers", "ray", "datasets"}} & sys.modules.keys()))
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "complete, nothing to do" in said.stdout and said.stdout.splitlines()[-1] == "[]", said.stderr


def test_another_capture_at_this_path_is_refused_naming_the_keys(store: ActivationStore, cache_config: Any) -> None:
    other = cache_config(store.path, ("layers.*.mlp",), unit_rows=2)
    other.seed = 7
    with pytest.raises(UserError, match=r"seed: 0 there, 7 asked; unit_rows: 4 there, 2 asked"):
        cache.capture(other)


def test_changed_text_is_refused_when_growing(
    tmp_path: Path, cache_config: Any, capture_here: Any, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = cache_config(tmp_path / "s.zarr", rows=64)
    capture_here(cfg)
    identity = sources.identity(cfg.data)
    monkeypatch.setattr(sources, "identity", lambda _: identity)  # as if the fingerprint had missed the change
    (tmp_path / "other.jsonl").write_text("".join(text_file.read_text().splitlines(keepends=True)[1:]))
    cfg = cache_config(tmp_path / "s.zarr", rows=80)
    cfg.data.path = str(tmp_path / "other.jsonl")
    with pytest.raises(UserError, match="other tokens than it did"):
        capture_here(cfg)


def test_nan_fails_its_unit_with_its_place_and_commits_nothing(
    tmp_path: Path, cache_config: Any, capture_here: Any
) -> None:
    store = capture_here(cache_config(tmp_path / "s.zarr"))
    commit.withdraw(place_at(store.path), 2)

    class Poisoned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = torch.nn.Identity()

        def forward(self, tokens: torch.Tensor, use_cache: bool) -> torch.Tensor:
            z = torch.ones(*tokens.shape, D_MODEL)
            z[1, 5, 3] = float("nan")
            return self.mlp(z)

    hookpoint = Hookpoint("layers.1.mlp", "mlp", "mlp")
    with pytest.raises(NonFiniteError, match=r"layers.1.mlp/input: activation at row 9, position 5"):
        worker.capture_unit(Poisoned(), store, [hookpoint], 2, "cpu")
    assert 2 not in commit.committed_units(place_at(store.path))
    assert layout.num_units(store.rows, UNIT_ROWS) == UNITS


def test_failed_growth_loses_nothing(tmp_path: Path, cache_config: Any, capture_here: Any) -> None:
    """More is asked than the text holds: refused, and the short last unit is still there."""
    store = capture_here(cache_config(tmp_path / "s.zarr", rows=70))
    units, rows = store.units, store.rows
    with pytest.raises(UserError, match=r"but data\.tokens asks for"):
        capture_here(cache_config(tmp_path / "s.zarr", rows=10**6))
    again = ActivationStore.open(tmp_path / "s.zarr")
    assert (again.units, again.rows) == (units, rows) and again.is_complete
    again.tokens(units[-1])


def test_a_second_capture_on_the_same_store_is_refused(store: ActivationStore, cache_config: Any) -> None:
    with (
        place_at(store.path).only_writer(),
        pytest.raises(UserError, match="another capture is at work"),
    ):
        cache.capture(cache_config(store.path, ("layers.*.mlp",)))
